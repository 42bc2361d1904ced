"""The measurements that tables and figures are made of.

Each takes the data and its own arguments, plain values both of them, and returns rows of plain
values by the names of the columns. What is a list is for the picture alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import lorap
from bench.models import SHAPES, configuration
from bench.paper.data import Data
from bench.sampling import CALIBRATION, LENGTH
from lorap.checkpoint.reader import open_checkpoint
from lorap.config import Override
from lorap.data.tokenizers import load_tokenizer
from lorap.errors import UsageError
from lorap.evaluation import PAPER_METRICS, evaluate, load_evaluation_chunks
from lorap.evaluation.tasks import PAPER
from lorap.families import family_of
from lorap.ops.importance import weight_importance
from lorap.ops.wanda import wanda_mask
from lorap.pipeline.on_disk import decoder_of
from lorap.pipeline.statistics import INPUT_OF
from lorap.plan import Plan, make_plan
from lorap.runtime import choose_device

Row = dict[str, Any]
Settings = Mapping[str, Any]
Measure = Callable[..., list[Row]]


def configured(settings: Settings) -> lorap.CompressionConfig:
    """Return the settings of a compression from plain values, a preset and overrides among them."""
    values = dict(settings)
    preset = values.pop("preset", "lorap")
    overrides = tuple(Override(**override) for override in values.pop("overrides", ()))
    return lorap.CompressionConfig.from_preset(preset, **values, overrides=overrides)


def quality(
    data: Data,
    *,
    settings: Settings | None,
    recovery: Settings | None = None,
    pool: int = CALIBRATION,
) -> list[Row]:
    """Compress, train if asked to, and evaluate.

    Parameters
    ----------
    data : Data
    settings : mapping or None
        Of the compression; None for the dense model.
    recovery : mapping, optional
        Fields of ``RecoveryConfig``; its updates are merged exactly, so that the factors' ranks
        grow by theirs, as in the authors' code.
    pool : int
        Rows that are sampled to choose the calibration samples from.
    """
    with TemporaryDirectory(dir=data.folder, prefix="making-") as name:
        try:
            model, row = _made(data, settings, recovery, pool, Path(name))
        except UsageError as refusal:
            return [{"note": f"refused: {refusal}"}]
        for label, source in data.evaluation_sources().items():
            found = lorap.evaluate_perplexity(model, source)
            row[f"perplexity, {label}"] = found.perplexity
        if data.tasks:
            scores = evaluate(model, tasks=[PAPER]).tasks
            assert scores is not None
            for task, metric in PAPER_METRICS.items():
                row[task] = scores.results[task][metric]["value"]
            row["mean of tasks"] = scores.mean
    return [row]


def rank_shares(data: Data, *, seed: int) -> list[Row]:
    """Take the share of the ranks that holds 80% of the energy, per layer and in the mean."""
    survey = lorap.inspect_checkpoint(
        data.model,
        calibration=data.calibration_source(),
        samples=CALIBRATION,
        seqlen=LENGTH,
        seed=seed,
    )
    means = survey.mean_rank_shares(0.8)
    rows: list[Row] = [
        {"layer": "mean", "method": method.upper(), **means[method]} for method in means
    ]
    for layer in survey.layers:
        for method in means:
            shares = {role: one.rank_share(0.8) for role, one in getattr(layer, method).items()}
            rows.append({"layer": layer.index, "method": method.upper(), **shares})
    return rows


def planned(data: Data, *, settings: Settings, shape: str | None = None) -> list[Row]:
    """Plan without weights: the ratio of the layers, and sizes.

    Parameters
    ----------
    data : Data
    settings : mapping
    shape : str, optional
        Of ``bench.models.SHAPES``, in the place of the model.
    """
    plan = _plan(data, settings, shape)
    assert plan.ratio is not None
    assert plan.layer_ratio is not None
    return [
        {
            "ratio of the layers": plan.layer_ratio,
            "factor": plan.layer_ratio / plan.ratio,
            "removed": plan.achieved_ratio,
        }
    ]


def sizes(
    data: Data, *, settings: Settings, shape: str | None = None, rounds: int = 30
) -> list[Row]:
    """Take parameters, multiply-accumulates, and the time of a forward over one sequence.

    Parameters
    ----------
    data : Data
    settings : mapping
        Their ``seqlen`` is the length of the sequence.
    shape : str, optional
        Of ``bench.models.SHAPES``, in the place of the model: planned alone, not timed.
    rounds : int
        Forwards of the dense and of the compressed model, in turn; their medians count.
    """
    plan = _plan(data, settings, shape)
    row: Row = {
        "parameters": plan.parameters,
        "removed": plan.achieved_ratio,
        "MACs": plan.macs,
        "MACs of dense": plan.macs / plan.macs_before,
    }
    if shape is None:
        with TemporaryDirectory(dir=data.folder, prefix="making-") as name:
            # The samples are as long as ever; only the plan is for the shorter sequence.
            usual = {key: value for key, value in settings.items() if key != "seqlen"}
            path, _ = _made(data, usual, None, CALIBRATION, Path(name))
            dense, small = _latencies([data.model, path], plan.tokens, rounds)
        row |= {"ms, dense": 1000 * dense, "ms": 1000 * small, "time of dense": small / dense}
    return [row]


def masks(data: Data, *, roles: Sequence[str], layer: int, sparsity: float) -> list[Row]:
    """Take Wanda's masks of a layer, and how unevenly they keep the input features.

    Parameters
    ----------
    data : Data
    roles : sequence of str
    layer : int
    sparsity : float

    Returns
    -------
    list of dict
        For each matrix, the share of the weights kept that lies in the half of the input features
        that keeps most; and what it would be were the weights kept at random. Each output row keeps
        the same number by Wanda's rule. ``picture`` holds the shares kept in blocks.
    """
    survey = lorap.inspect_checkpoint(
        data.model,
        calibration=data.calibration_source(),
        layers=[layer],
        samples=CALIBRATION,
        seqlen=LENGTH,
    )
    norms = survey.layers[0].norms
    decoder = decoder_of(open_checkpoint(data.model), choose_device("cpu"), None)
    weights = decoder.split(decoder.tensors(layer))
    names = {**decoder.family.attention, **decoder.family.ffn}
    rows: list[Row] = []
    for role in roles:
        weight = weights[f"{names[role]}.weight"].float()
        scores = weight_importance(weight, norms[INPUT_OF[role]].to(weight))
        mask = wanda_mask(scores, sparsity)
        by_input = mask.double().sum(0).sort(descending=True).values
        half = float(by_input[: len(by_input) // 2].sum() / by_input.sum())
        # The mean of the upper half of a normal distribution is sqrt(2 / pi) deviations above 0.
        count, kept = mask.shape[0], 1 - sparsity
        spread = (count * kept * sparsity) ** 0.5 * (2 / torch.pi) ** 0.5
        rows.append(
            {
                "matrix": role,
                "kept in half of the inputs": half,
                "by chance": 0.5 + 0.5 * spread / (count * kept),
                "picture": _blocks(mask),
            }
        )
    return rows


def generations(
    data: Data,
    *,
    settings: Settings | None,
    prompts: Sequence[str],
    tokens: int,
    recovery: Settings | None = None,
) -> list[Row]:
    """Have a model go on with prompts, greedily.

    Parameters
    ----------
    data : Data
    settings, recovery
        As for ``quality``.
    prompts : sequence of str
        Without one: the first 8 tokens of the first three chunks of the evaluation.
    tokens : int
        To add at most.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(Path(data.model), "the prompt")
    if prompts:
        begun = [tokenizer(text, return_tensors="pt").input_ids for text in prompts]
    else:
        source = next(iter(data.evaluation_sources().values()))
        chunks, _ = load_evaluation_chunks(
            source,
            tokenizer=lambda: tokenizer,
            seqlen=LENGTH,
            vocab_size=data.config.vocab_size,
            max_positions=None,
        )
        begun = [chunk[None, :8] for chunk in chunks[:3]]
    with TemporaryDirectory(dir=data.folder, prefix="making-") as name:
        try:
            path, _ = _made(data, settings, recovery, CALIBRATION, Path(name))
        except UsageError as refusal:
            return [{"note": f"refused: {refusal}"}]
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    rows: list[Row] = []
    for ids in begun:
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=model.generation_config.eos_token_id,
            )
        prompt, told = (
            " ".join(str(tokenizer.decode(part, skip_special_tokens=True)).split())
            for part in (ids[0], output[0, ids.shape[1] :])
        )
        rows.append({"prompt": prompt, "goes on": told})
    return rows


def _made(
    data: Data,
    settings: Settings | None,
    recovery: Settings | None,
    pool: int,
    folder: Path,
) -> tuple[str, Row]:
    """Return where the model is, and its size."""
    if settings is None:
        return data.model, {"removed": 0.0, "parameters": data.dense.parameters_before}
    config = configured(settings)
    small = folder / "small"
    report = lorap.compress_checkpoint(
        data.model,
        small,
        config,
        calibration=data.calibration_source(pool, config.seqlen),
    )
    if recovery is not None:
        adapter, merged = folder / "adapter", folder / "merged"
        training = data.training_source()
        lorap.recover(small, adapter, lorap.RecoveryConfig(**recovery), data=training)
        report = lorap.merge_adapter(small, adapter, merged)
        small = merged
    after = int(report["parameters"]["after"])
    removed = 1 - after / data.dense.parameters_before
    return str(small), {"removed": removed, "parameters": after}


def _plan(data: Data, settings: Settings, shape: str | None) -> Plan:
    config = configured(settings)
    if shape is None:
        return make_plan(data.config, data.family, config)
    from transformers import LlamaConfig

    model = LlamaConfig(**configuration(SHAPES[shape]))
    return make_plan(model, family_of(model), config)


def _latencies(paths: Sequence[str], tokens: int, rounds: int) -> list[float]:
    """Return the median seconds of a forward over one sequence, the models taken in turn."""
    from transformers import AutoModelForCausalLM

    device = choose_device("auto")
    loaded: list[Any] = [AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in paths]
    models = [model.to(device).eval() for model in loaded]
    ids = torch.arange(tokens, device=device)[None] % models[0].config.vocab_size
    taken: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for turn in range(rounds + 3):
            for times, model in zip(taken, models, strict=True):
                start = time.perf_counter()
                model(input_ids=ids, use_cache=False)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                # The first ones warm up.
                if turn >= 3:
                    times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


PICTURE = 96
"""Blocks of a picture along the longer side."""


def _blocks(mask: torch.Tensor) -> list[list[float]]:
    """Return the share of weights kept in square blocks."""
    size = -(-max(mask.shape) // PICTURE)
    pooled = torch.nn.functional.avg_pool2d(mask.double()[None], size, ceil_mode=True)[0]
    return [[round(value, 3) for value in row] for row in pooled.tolist()]
