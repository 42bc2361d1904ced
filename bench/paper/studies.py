"""The tables and figures: what is measured for each, and what the papers say."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.models import SHAPES
from bench.paper import known
from bench.paper.data import SAMPLED, Data
from bench.paper.known import DENSE, LORAP
from bench.paper.measures import (
    Measure,
    Row,
    generations,
    masks,
    planned,
    quality,
    rank_shares,
    sizes,
)
from bench.sampling import CALIBRATION, LENGTH
from lorap.pages.charts import Chart, Series, lines


@dataclass(frozen=True)
class Cell:
    """A measurement.

    Attributes
    ----------
    labels : mapping
        What its rows begin with, by column.
    measure : callable
        Of :mod:`bench.paper.measures`.
    arguments : mapping
        Its keyword arguments, plain values.
    """

    labels: Mapping[str, Any]
    measure: Measure
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes
    ----------
    data : Data
    scope : {"model", "layer"}
    recovery : mapping
        Fields of ``RecoveryConfig`` for what is trained.
    prompts : tuple of str
    """

    data: Data
    scope: str = "model"
    recovery: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()

    def settings(self, ratio: float | None, **more: Any) -> dict[str, Any]:
        """Return the settings of a compression."""
        scope = {} if ratio is None else {"ratio_scope": self.scope}
        return {"ratio": ratio, "seed": self.data.seed} | scope | more


Cells = Callable[[Request, Sequence[float]], list[Cell]]


@dataclass(frozen=True)
class Study:
    """A table or figure.

    Attributes
    ----------
    about : str
    claim : str
        What the paper says, and where; the numbers are of its models and data.
    cells : callable
        Of a request and the ratios.
    ratios : tuple of float
        Where none are asked for.
    paper : tuple of dict
        The paper's rows; one belongs to ours where the columns before ``paper:`` are equal.
    paper_data : bool
        Whether it is on the paper's own data unless told otherwise.
    summary : callable, optional
        Rows to add, from those measured.
    charts : callable, optional
        The picture, from the rows.
    """

    about: str
    claim: str
    cells: Cells
    ratios: tuple[float, ...] = (0.2, 0.5)
    paper: tuple[Row, ...] = ()
    paper_data: bool = False
    summary: Callable[[Sequence[Row]], list[Row]] | None = None
    charts: Callable[[Sequence[Row]], list[Chart]] | None = None


# --- quality -------------------------------------------------------------------------------------

METHODS: Mapping[str, Mapping[str, Any]] = {
    LORAP: {},
    "heads and channels by Taylor": {"mha": "heads", "importance": "taylor"},
    "preset best": {"preset": "best"},
}
"""Those that Table 2 is measured for here. LLM-Pruner scores by a Taylor expansion as well, but
groups and spares layers in its own way."""


def _dense(**labels: Any) -> Cell:
    return Cell({"ratio": 0.0, **labels}, quality, {"settings": None})


def _variants(variants: Mapping[str, Mapping[str, Any]], column: str) -> Cells:
    """Return cells for each ratio and variant of the settings, the dense model first."""

    def cells(request: Request, ratios: Sequence[float]) -> list[Cell]:
        return [
            _dense(**{column: DENSE}),
            *(
                Cell(
                    {"ratio": ratio, column: name},
                    quality,
                    {"settings": request.settings(ratio, **settings)},
                )
                for ratio in ratios
                for name, settings in variants.items()
            ),
        ]

    return cells


def _main_table(request: Request, ratios: Sequence[float]) -> list[Cell]:
    cells = [_dense(tuned="", method=DENSE)]
    for ratio in ratios:
        for tuned in ("no", "yes"):
            for method, settings in METHODS.items():
                arguments: dict[str, Any] = {"settings": request.settings(ratio, **settings)}
                if tuned == "yes":
                    arguments["recovery"] = dict(request.recovery)
                labels = {"ratio": ratio, "tuned": tuned, "method": method}
                cells.append(Cell(labels, quality, arguments))
    return cells


def _by_sublayer(request: Request, ratios: Sequence[float]) -> list[Cell]:
    """One sub-layer compressed, the other left; the ratio is of what is compressed."""
    methods: dict[str, dict[str, dict[str, Any]]] = {
        "mha": {"heads": {"mha": "heads"}},
        "ffn": {"channels": {}},
    }
    for method in ("svd", "afm", "awsvd"):
        # Numbers, as the configuration takes them; 1 is an even split.
        methods["mha"][method] = {"mha": method, "allocation": 1.0}
        methods["mha"][f"{method}*"] = {"mha": method}
        methods["ffn"][method] = {"ffn": method}
    return [
        _dense(**{"sub-layer": "", "method": DENSE}),
        *(
            Cell(
                {"ratio": ratio, "sub-layer": sublayer, "method": name},
                quality,
                {
                    "settings": request.settings(ratio, **settings)
                    | {"sublayers": sublayer, "ratio_scope": "layer"}
                },
            )
            for ratio in ratios
            for sublayer, named in methods.items()
            for name, settings in named.items()
        ),
    ]


def _alone(request: Request, ratios: Sequence[float]) -> list[Cell]:
    """Each matrix of the MHA alone, in all layers; the ratio is of that matrix."""
    cells = [_dense(matrix=DENSE)]
    for role, name in request.data.family.attention.items():
        for ratio in ratios:
            overrides = [
                {"match": "layers.*", "skip": True},
                {"match": f"layers.*.{name}", "ratio": ratio},
            ]
            settings = request.settings(None, sublayers="mha", overrides=overrides)
            cells.append(Cell({"ratio": ratio, "matrix": role}, quality, {"settings": settings}))
    return cells


SAMPLES = (4, 16, 64, 128, 256, 512, 1024, 2048)
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)
"""Of calibration samples, and tokens in each (App. A.1 names the ends)."""


def _calibration(request: Request, ratios: Sequence[float]) -> list[Cell]:
    """More samples, and longer ones, as far as the model's positions go."""
    longest = int(request.data.config.max_position_embeddings)
    drawn = [(samples, LENGTH, SAMPLES[-1]) for samples in SAMPLES]
    drawn += [
        (CALIBRATION, length, CALIBRATION)
        for length in LENGTHS
        if length <= longest and length != LENGTH
    ]
    return [
        _dense(samples="", length=""),
        *(
            Cell(
                {"ratio": ratio, "samples": samples, "length": length},
                quality,
                {
                    "settings": request.settings(ratio, samples=samples, seqlen=length),
                    "pool": pool,
                },
            )
            for ratio in ratios
            for samples, length, pool in drawn
        ),
    ]


SEEDS = 10


def _seeds(request: Request, ratios: Sequence[float]) -> list[Cell]:
    return [
        Cell(
            {"ratio": ratio, "seed": seed},
            quality,
            {"settings": request.settings(ratio) | {"seed": seed}, "pool": SEEDS * CALIBRATION},
        )
        for ratio in ratios
        for seed in range(SEEDS)
    ]


def _mean_and_deviation(rows: Sequence[Row]) -> list[Row]:
    """Return mean and sample deviation of the perplexities, by ratio."""
    found: list[Row] = []
    for ratio in dict.fromkeys(row["ratio"] for row in rows):
        own = [row for row in rows if row["ratio"] == ratio and "note" not in row]
        names = [name for name in (own[0] if own else ()) if name.startswith("perplexity")]
        for word, of in (("mean", statistics.mean), ("deviation", statistics.stdev)):
            values = {name: of([row[name] for row in own]) for name in names}
            found.append({"ratio": ratio, "seed": word, **values})
    return found


def _mgaa(request: Request, ratios: Sequence[float]) -> list[Cell]:
    base: dict[str, Any] = {"mha": "pca", "ffn": "pca"}
    variants: dict[str, dict[str, Any]] = {
        "PCA": base | {"allocation": 1.0},
        "PCA, between": base | {"allocation": "mgaa-between"},
        "PCA, within": base | {"allocation": "mgaa-within"},
        "PCA, both": base | {"allocation": "mgaa"},
        "joint, both": base | {"allocation": "mgaa", "joint_qk": True},
    }
    cells = [_dense(method=DENSE, alpha="")]
    for ratio in ratios:
        for name, settings in variants.items():
            labels = {"ratio": ratio, "method": name, "alpha": ""}
            arguments = {"settings": request.settings(ratio, **settings)}
            cells.append(Cell(labels, quality, arguments))
    if 0.5 in ratios:
        for alpha in known.MGAA_ALPHAS:
            settings = variants["PCA, between"] | {"mgaa_alpha": alpha}
            labels = {"ratio": 0.5, "method": "PCA, between", "alpha": alpha}
            cells.append(Cell(labels, quality, {"settings": request.settings(0.5, **settings)}))
    return cells


# --- others --------------------------------------------------------------------------------------


def _rank_shares(request: Request, _: Sequence[float]) -> list[Cell]:
    return [Cell({}, rank_shares, {"seed": request.data.seed})]


def _sizes(request: Request, ratios: Sequence[float]) -> list[Cell]:
    """The model, timed; and the shape of LLaMA-7B, planned by the ratio of the layers."""
    own = [
        Cell(
            {"model": "given", "ratio": ratio, "method": name},
            sizes,
            {"settings": request.settings(ratio, **settings, seqlen=64)},
        )
        for ratio in ratios
        for name, settings in METHODS.items()
        if name != "preset best"
    ]
    llama = [
        Cell(
            {"model": "llama-7b", "ratio": ratio, "method": LORAP},
            sizes,
            {"settings": {"ratio": ratio, "ratio_scope": "layer", "seqlen": 64}}
            | {"shape": "llama-7b"},
        )
        for ratio in known.PARAMETERS
    ]
    return own + llama


def _ratios(_: Request, ratios: Sequence[float]) -> list[Cell]:
    """The model, and the shapes of the paper's."""
    return [
        Cell(
            {"model": shape or "given", "ratio": ratio},
            planned,
            {"settings": {"ratio": ratio}, "shape": shape},
        )
        for shape in (None, *known.FACTORS)
        for ratio in ratios
    ]


def _masks(*roles: str) -> Cells:
    def cells(_: Request, __: Sequence[float]) -> list[Cell]:
        return [Cell({}, masks, {"roles": list(roles), "layer": 0, "sparsity": 0.5})]

    return cells


def _generations(request: Request, ratios: Sequence[float]) -> list[Cell]:
    common: dict[str, Any] = {"prompts": list(request.prompts), "tokens": 48}
    cells = [Cell({"ratio": 0.0, "tuned": ""}, generations, common | {"settings": None})]
    for ratio in ratios:
        for tuned in ("no", "yes"):
            arguments = common | {"settings": request.settings(ratio)}
            if tuned == "yes":
                arguments["recovery"] = dict(request.recovery)
            cells.append(Cell({"ratio": ratio, "tuned": tuned}, generations, arguments))
    return cells


# --- pictures ------------------------------------------------------------------------------------

_COLOURS = tuple(f"var(--c{at})" for at in (0, 2, 4, 6, 3, 5, 1))


def _curves(rows: Sequence[Row], along: str, by: str | None, across: str) -> list[Chart]:
    """Return a chart for each perplexity, with a curve for each value of a column.

    Parameters
    ----------
    rows : sequence of dict
    along : str
        Column of the horizontal axis; shares are drawn as percent.
    by : str or None
        Column of the curves.
    across : str
        What the horizontal axis is.
    """
    drawn = [row for row in rows if isinstance(row.get(along), int | float) and "note" not in row]
    places = sorted({row[along] for row in drawn})
    names = list(dict.fromkeys(name for row in drawn for name in row))
    charts = []
    for name in names:
        if not name.startswith("perplexity"):
            continue
        curves = []
        for at, kind in enumerate(dict.fromkeys(row[by] if by else "" for row in drawn)):
            own = {row[along]: row[name] for row in drawn if not by or row[by] == kind}
            values = [math.log10(own[place]) if place in own else None for place in places]
            curves.append(Series(str(kind), values, _COLOURS[at % len(_COLOURS)]))
        scaled = [100 * place if along == "ratio" else math.log2(place) for place in places]
        charts.append(lines(name, scaled, curves, unit="log", across=across))
    return charts


def _by_ratio(rows: Sequence[Row]) -> list[Chart]:
    return _curves(rows, "ratio", None, "percent of all parameters removed")


def _by_matrix(rows: Sequence[Row]) -> list[Chart]:
    compressed = [row for row in rows if row["matrix"] != DENSE]
    return _curves(compressed, "ratio", "matrix", "percent of the matrix removed")


def _by_calibration(rows: Sequence[Row]) -> list[Chart]:
    more = [row for row in rows if row["length"] == LENGTH]
    longer = [row for row in rows if row["samples"] == CALIBRATION]
    return [
        *_curves(more, "samples", "ratio", f"log2 of the samples of {LENGTH} tokens"),
        *_curves(longer, "length", "ratio", f"log2 of the tokens in each of {CALIBRATION} samples"),
    ]


def mask_charts(rows: Sequence[Row]) -> list[Chart]:
    """Return the masks: black where weights are pruned, white where they stay."""
    return [_mask_chart(row["matrix"], row["picture"]) for row in rows]


def _mask_chart(title: str, blocks: Sequence[Sequence[float]]) -> Chart:
    height, width = len(blocks), len(blocks[0])
    size = 384 / max(height, width)
    paths: dict[int, list[str]] = {}
    for y, row in enumerate(blocks):
        for x, share in enumerate(row):
            grey = round(15 * share)
            paths.setdefault(grey, []).append(
                f"M{x * size:.4g} {y * size:.4g}h{size:.4g}v{size:.4g}h-{size:.4g}z"
            )
    body = "".join(
        f'<path fill="#{3 * f"{grey:x}"}" d="{"".join(parts)}"/>'
        for grey, parts in sorted(paths.items())
    )
    wide, high = math.ceil(width * size), math.ceil(height * size)
    frame = f'<rect class="grid" width="{wide}" height="{high}"/>'
    return Chart(title, wide, high, body + frame)


# --- all -----------------------------------------------------------------------------------------

_NOT_AT_HAND = "The table itself is not at hand."

STUDIES: Mapping[str, Study] = {
    "table1": Study(
        "rank share at 80% of the energy, SVD and AWSVD, by layer and matrix",
        "Table 1 and Section 3: attention needs a smaller share than the feed-forward block, q and "
        f"k less than v and o; AWSVD less than SVD, most so in attention. {_NOT_AT_HAND}",
        _rank_shares,
        ratios=(),
    ),
    "table2": Study(
        "ratios, tuned or not, by method: perplexity and the seven tasks (LLaMA-7B)",
        "Table 2: LoRAP is best untuned at both ratios by far, and mostly when tuned.",
        _main_table,
        paper=known.TABLE_2,
        paper_data=True,
    ),
    "table3": Study(
        "the same for LLaMA-13B",
        "Table 3: LoRAP is significantly better than the others, more so at higher ratios. "
        f"{_NOT_AT_HAND}",
        _main_table,
        paper_data=True,
    ),
    "table4": Study(
        "parameters, MACs and latency of one sequence of 64 tokens",
        "Table 4: at 50% LoRAP saves 31.25% of the time of a forward on an A40, LLM-Pruner 33.8%. "
        f"{_NOT_AT_HAND} Parameters of LLaMA-7B: by the formulas of the authors' code.",
        _sizes,
        paper=tuple(
            {"model": "llama-7b", "ratio": ratio, "method": LORAP, "paper: parameters": count}
            for ratio, count in known.PARAMETERS.items()
        ),
    ),
    "table5": Study(
        "share of the least important channels that is kept",
        "Table 5: keeping the lowest 1% lowers the perplexity, by about 15% at 50%; keeping more "
        f"gains nothing further. {_NOT_AT_HAND}",
        _variants(
            {
                f"{share:.1%}": {"least_important": share}
                for share in (0.0, 0.005, 0.01, 0.02, 0.05)
            },
            "least important kept",
        ),
    ),
    "table6": Study(
        "parameters of q and k against v and o",
        f"Table 6: 1:3 is the best split. {_NOT_AT_HAND}",
        _variants(
            {f"1:{parts}": {"allocation": float(parts)} for parts in (1, 2, 3, 4, 5)}, "allocation"
        ),
    ),
    "table7": Study(
        "how the scores of a channel's weights become one",
        f"Table 7: comparable at 20%, l2 clearly better at 50%. {_NOT_AT_HAND}",
        _variants({name: {"aggregation": name} for name in ("l1", "l2", "linf")}, "aggregation"),
    ),
    "table8": Study(
        "methods by sub-layer, the other one left dense; * with the allocation 1:3",
        "Table 8: in the feed-forward block channel pruning beats all low-rank methods by far; in "
        "attention low rank is mostly better than pruning heads, AWSVD clearly better than AFM and "
        f"SVD, and 1:3 helps each. {_NOT_AT_HAND}",
        _by_sublayer,
    ),
    "table13": Study(
        "ratio of the layers against that of the model (App. C.1)",
        "Table 13, derived: the factor by the formula of App. C.1.",
        _ratios,
        ratios=(0.1, 0.2, 0.3, 0.4, 0.5),
        paper=tuple(
            {"model": shape, "ratio": ratio, "paper: factor": factor}
            for shape, factor in known.FACTORS.items()
            for ratio in (0.1, 0.2, 0.3, 0.4, 0.5)
        ),
    ),
    "fig2": Study(
        "Wanda's masks of the first layer's attention at 50%",
        "Fig. 2: the weights that stay gather in some rows or columns.",
        _masks("q", "k", "v", "o"),
        ratios=(),
        charts=mask_charts,
    ),
    "fig3": Study(
        "Wanda's masks of the first layer's feed-forward block at 50%",
        "Fig. 3: the weights that stay are spread otherwise than in attention, less like low rank.",
        _masks("down", "gate", "up"),
        ratios=(),
        charts=mask_charts,
    ),
    "fig4": Study(
        "each matrix of attention alone at growing ratios",
        "Fig. 4: at the same ratio, compressing q or k costs less than v or o.",
        _alone,
        ratios=(0.2, 0.4, 0.6, 0.8, 0.9),
        charts=_by_matrix,
    ),
    "fig5": Study(
        "number and length of the calibration samples",
        "Fig. 5: more samples lower the perplexity; longer ones lower it at first, then raise it.",
        _calibration,
        ratios=(0.2,),
        charts=_by_calibration,
    ),
    "fig6": Study(
        "six ratios",
        "Fig. 6: larger models keep more at the same ratio. The paper's values here are those of "
        "Table 2.",
        _variants({LORAP: {}}, "method"),
        ratios=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
        paper=tuple(row | {"method": LORAP if row["ratio"] else DENSE} for row in known.FIGURE_6),
        charts=_by_ratio,
    ),
    "seeds": Study(
        "ten seeds, mean and sample deviation",
        "App. A.2: 15.734 +- 0.073 at 20%, 49.116 +- 0.947 at 50%: the choice of samples matters "
        "little.",
        _seeds,
        paper=known.SEEDS,
        summary=_mean_and_deviation,
    ),
    "generations": Study(
        "what the models write, greedily (Tables 15 to 17)",
        "App. E: fluent at low ratios; at high ones repetitive or wrong unless tuned. The paper's "
        "prompts are not at hand.",
        _generations,
    ),
    "mgaa": Study(
        "MGAA: both parts of the allocation, and alpha",
        "MGAA: each part helps, both help most, most so at 50%; alpha 0.35 is best; joint q and k "
        "help further. Its similarity measures other than the cosine are not built in.",
        _mgaa,
        ratios=(0.2, 0.3, 0.4, 0.5),
        paper=known.MGAA,
    ),
}
"""By name, in the order of the papers."""

PAPER_DATA: Mapping[str, Any] = {
    "calibration": "bookcorpus",
    "evaluation": ("wikitext2", "ptb"),
    "training": "yahma/alpaca-cleaned",
    "tasks": True,
}
LOCAL_DATA: Mapping[str, Any] = {
    "calibration": SAMPLED,
    "evaluation": (SAMPLED,),
    "training": SAMPLED,
    "tasks": False,
}
"""Where nothing else is asked for."""

assert known.FACTORS.keys() <= SHAPES.keys()
