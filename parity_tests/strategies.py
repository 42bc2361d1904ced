"""Inputs for the parity tests: drawn once, given to both sides.

Two families of matrices. Small integer-valued ones shrink well and hold exact ties; those made from
a spectrum have a condition number, a rank and a scale that are known. ``test_strategies.py`` proves
that the edges named there occur within the examples of the ``ci`` profile.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import hypothesis.extra.numpy as hnp
import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lorap_reference.llama import LlamaShape

Array = NDArray[np.float64]
Ids = NDArray[np.int64]
Shape = tuple[int, int]
Layout = Literal["c", "transposed", "strided", "expanded"]

LAYOUTS: tuple[Layout, ...] = ("c", "transposed", "strided", "expanded")
SPECTRA = ("flat", "linear", "geometric", "condition_1e12", "deficient", "duplicate", "outlier")
NORM_KINDS = ("positive", "equal", "dead", "all_dead", "outlier", "integer")
AGGREGATIONS: tuple[Literal["mean", "l1", "l2", "linf"], ...] = ("mean", "l1", "l2", "linf")

MAX_SIDE = 24
"""Sides of the larger matrices: a suite of thousands of decompositions stays within minutes."""

of_whole_models = settings(max_examples=max(25, settings.default.max_examples // 4))
"""For tests that run or compress a model for each example."""

seeds = st.integers(0, 2**32 - 1)
scales = st.integers(-6, 6).map(lambda exponent: 10.0**exponent)
layouts = st.sampled_from(LAYOUTS)
aggregations = st.sampled_from(AGGREGATIONS)


@dataclass(frozen=True)
class Pair:
    """One input as both sides get it.

    Attributes
    ----------
    array : numpy array, float64
        Read-only: a reference function that writes into it raises.
    tensor : Tensor
        The same values in the layout and dtype asked for.
    before : Tensor
        A copy of `tensor`.
    """

    array: Array
    tensor: Tensor
    before: Tensor

    def unchanged(self) -> bool:
        """Tell whether the torch side has left its input alone."""
        return torch.equal(self.tensor, self.before)


def laid_out(values: Tensor, layout: Layout) -> Tensor:
    """Return a tensor with the memory layout asked for.

    Parameters
    ----------
    values : tensor of any rank
    layout : {"c", "transposed", "strided", "expanded"}
        ``transposed`` is Fortran order. ``expanded`` repeats the first entry of the first axis with
        stride 0, so that it has other values than `values`; the rest keep them.

    Returns
    -------
    tensor of the same shape
    """
    if layout == "transposed":
        reverse = tuple(range(values.ndim))[::-1]
        copy = values.permute(reverse).clone(memory_format=torch.contiguous_format)
        return copy.permute(reverse)
    if layout == "strided":
        wide = torch.full([2 * side for side in values.shape], torch.nan, dtype=values.dtype)
        inside = wide[tuple(slice(None, None, 2) for _ in values.shape)]
        return inside.copy_(values)
    if layout == "expanded" and values.ndim > 0 and values.shape[0] > 0:
        return values[:1].clone().expand(values.shape)
    return values.clone(memory_format=torch.contiguous_format)


def pair(values: Array, layout: Layout = "c", dtype: torch.dtype = torch.float64) -> Pair:
    """Return the input of both sides; what `dtype` cannot hold is rounded for both.

    Parameters
    ----------
    values : array of any rank
    layout : see ``laid_out``
    dtype : torch.dtype
        Of the tensor. The array holds the tensor's values in float64, in the same layout.
    """
    tensor = laid_out(torch.from_numpy(np.array(values, dtype=np.float64)).to(dtype), layout)
    array = laid_out(tensor.double(), layout).numpy()
    array.flags.writeable = False
    return Pair(array, tensor, tensor.clone())


def orthonormal(rows: int, columns: int, rng: np.random.Generator) -> Array:
    """Return a random ``(rows, columns)`` matrix with orthonormal columns, rows >= columns."""
    q, _ = np.linalg.qr(rng.standard_normal((rows, columns)))
    return np.asarray(q)


def from_spectrum(shape: Shape, kind: str, scale: float, seed: int) -> Array:
    """Return ``U diag(s) V^T`` with a spectrum of the kind asked for.

    Parameters
    ----------
    shape : (d_out, d_in)
        Both at least 1.
    kind : {"flat", "linear", "geometric", "condition_1e12", "deficient", "duplicate", "outlier"}
        ``flat``: all singular values equal, so that no cut has a gap. ``linear``: n, n - 1, ..., 1.
        ``geometric``: halving. ``condition_1e12``: from 1 to 1e-12. ``deficient``: half of them
        zero. ``duplicate``: ``linear`` with equal columns. ``outlier``: ``linear`` with one column
        a thousand times the rest.
    scale : float
        Factor of the whole.
    seed : int
    """
    rng = np.random.default_rng(seed)
    k = min(shape)
    s = np.arange(k, 0, -1, dtype=np.float64)
    if kind == "flat":
        s = np.ones(k)
    elif kind == "geometric":
        s = 0.5 ** np.arange(k, dtype=np.float64)
    elif kind == "condition_1e12":
        s = np.logspace(0, -12, k)
    elif kind == "deficient":
        s[k // 2 :] = 0
    A = (orthonormal(shape[0], k, rng) * s) @ orthonormal(shape[1], k, rng).T
    if kind == "duplicate":
        A[:, shape[1] // 2 :] = A[:, :1]
    elif kind == "outlier":
        A[:, int(rng.integers(shape[1]))] *= 1000
    return np.asarray(A * scale)


def sides(smallest: int = 1, largest: int = MAX_SIDE) -> st.SearchStrategy[int]:
    """Sides of a matrix."""
    return st.integers(smallest, largest)


@st.composite
def integer_matrices(draw: st.DrawFn, shape: Shape | None = None, smallest: int = 0) -> Array:
    """Draw an integer-valued matrix with sides from `smallest` to 4, entries from -3 to 3."""
    if shape is None:
        shape = (draw(sides(smallest, 4)), draw(sides(smallest, 4)))
    return draw(hnp.arrays(np.float64, shape, elements=st.integers(-3, 3).map(float)))


@st.composite
def spectral_matrices(draw: st.DrawFn, shape: Shape | None = None) -> Array:
    """Draw ``U diag(s) V^T`` from shape, kind of spectrum, scale and seed."""
    if shape is None:
        shape = (draw(sides()), draw(sides()))
    return from_spectrum(shape, draw(st.sampled_from(SPECTRA)), draw(scales), draw(seeds))


def matrices(smallest: int = 0) -> st.SearchStrategy[Array]:
    """Both families; `smallest` is the least side of the integer-valued ones."""
    return st.one_of(integer_matrices(smallest=smallest), spectral_matrices())


def norm_vector(size: int, kind: str, scale: float, seed: int) -> Array:
    """Return norms of input features.

    Parameters
    ----------
    size : int
    kind : {"positive", "equal", "dead", "all_dead", "outlier", "integer"}
        ``dead``: about half of the features, at least one, are zero. ``outlier``: one is a thousand
        times the largest of the others.
    scale : float
    seed : int
    """
    rng = np.random.default_rng(seed)
    x = rng.uniform(0.5, 2.0, size)
    if kind == "equal":
        x = np.ones(size)
    elif kind == "all_dead":
        x = np.zeros(size)
    elif kind == "integer":
        x = rng.integers(0, 4, size).astype(np.float64)
    elif kind == "dead" and size > 0:
        x[rng.permutation(size)[: max(1, size // 2)]] = 0
    elif kind == "outlier" and size > 0:
        x[int(rng.integers(size))] = 1000 * np.max(x)
    return np.asarray(x * scale)


@st.composite
def norm_vectors(draw: st.DrawFn, size: int, kinds: tuple[str, ...] = NORM_KINDS) -> Array:
    """Draw norms of `size` input features, of the kinds in ``norm_vector``."""
    return norm_vector(size, draw(st.sampled_from(kinds)), draw(scales), draw(seeds))


@dataclass(frozen=True)
class Problem:
    """One weighted low-rank problem: ``W`` (d_out, d_in), ``scale`` (d_in,), ``rank``."""

    W: Array
    scale: Array
    rank: int


@st.composite
def problems(draw: st.DrawFn, kinds: tuple[str, ...] = NORM_KINDS) -> Problem:
    """Draw a matrix, the diagonal of D and a rank from 0 to full."""
    W = draw(matrices(), label="W")
    scale = draw(norm_vectors(W.shape[1], kinds), label="scale")
    return Problem(W, scale, draw(st.integers(0, min(W.shape)), label="rank"))


@st.composite
def tokens(draw: st.DrawFn) -> Array:
    """Draw inputs of a linear, ``(tokens, d_in)``: none, one or many tokens; dead features."""
    if draw(st.booleans()):
        return draw(integer_matrices(smallest=0))
    count, features = draw(st.integers(1, 200)), draw(sides())
    rng = np.random.default_rng(draw(seeds))
    return np.asarray(
        rng.standard_normal((count, features)) * draw(norm_vectors(features), label="feature sizes")
    )


INPUT_KINDS = ("few", "many", "offset", "constant", "dead", "outlier", "integer")


def input_tokens(features: int, kind: str, scale: float, seed: int) -> Array:
    """Return inputs of a linear, ``(tokens, features)``.

    Parameters
    ----------
    features : int
    kind : {"few", "many", "offset", "constant", "dead", "outlier", "integer"}
        ``few``: fewer tokens than features, so that their moment is singular; also none or one.
        ``many``: at least twice as many tokens as features; ``dead`` and ``outlier`` likewise, with
        features as in ``norm_vector``. ``offset``: a mean of a hundred times the spread.
        ``constant``: all tokens equal. ``integer``: from -3 to 3, so that moments are exact.
    scale : float
    seed : int
    """
    rng = np.random.default_rng(seed)
    if kind == "integer":
        X = rng.integers(-3, 4, (int(rng.integers(0, 8)), features)).astype(np.float64)
        return np.asarray(X * scale)
    count = 2 * features + int(rng.integers(1, 100))
    if kind == "few":
        count = int(rng.integers(0, max(2, features)))
    X = rng.standard_normal((count, features))
    if kind == "offset":
        X += 100 * rng.standard_normal(features)
    elif kind == "constant":
        X[:] = X[:1]
    elif kind in ("dead", "outlier"):
        X *= norm_vector(features, kind, 1.0, seed)
    return np.asarray(X * scale)


@dataclass(frozen=True)
class OutputProblem:
    """One low-rank problem by outputs: ``W`` (d_out, d_in), ``X`` (tokens, d_in), ``rank``."""

    W: Array
    X: Array
    rank: int

    @property
    def C(self) -> Array:  # noqa: N802 - the letter of SPEC.md
        """Second moment of the inputs."""
        return self.X.T @ self.X

    @property
    def t(self) -> Array:
        """Sum of the tokens."""
        return np.asarray(np.sum(self.X, axis=0))

    @property
    def n(self) -> int:
        """Tokens."""
        return self.X.shape[0]


@st.composite
def output_problems(draw: st.DrawFn, kinds: tuple[str, ...] = INPUT_KINDS) -> OutputProblem:
    """Draw a matrix, inputs of the kinds in ``input_tokens``, and a rank from 0 to full."""
    W = draw(matrices(), label="W")
    kind = draw(st.sampled_from(kinds), label="inputs")
    X = input_tokens(W.shape[1], kind, draw(scales), draw(seeds))
    return OutputProblem(W, X, draw(st.integers(0, min(W.shape)), label="rank"))


@st.composite
def scores(draw: st.DrawFn) -> Array:
    """Draw scores of channels: all equal, drawn from a few values (ties), or all apart."""
    size = draw(st.integers(0, 30))
    kind = draw(st.sampled_from(("equal", "few", "apart")))
    rng = np.random.default_rng(draw(seeds))
    if kind == "equal":
        return np.full(size, draw(st.sampled_from((0.0, 1.0))))
    if kind == "few":
        return draw(hnp.arrays(np.float64, size, elements=st.integers(0, 3).map(float)))
    return rng.permutation(size) * draw(scales)


@dataclass(frozen=True)
class Channels:
    """An FFN, ``up`` and ``gate`` (d_m, d), ``down`` (d, d_m), with the norms of its inputs."""

    up: Array
    gate: Array
    down: Array
    x_ffn: Array
    x_down: Array


@st.composite
def channels(draw: st.DrawFn, smallest: int = 1) -> Channels:
    """Draw an FFN, integer-valued or from spectra, of at least `smallest` channels."""
    integer = draw(st.booleans())
    largest = 4 if integer else MAX_SIDE
    d_m, d = draw(sides(smallest, largest), label="d_m"), draw(sides(1, largest), label="d")
    kind = integer_matrices if integer or d_m == 0 else spectral_matrices
    up, gate, down = (draw(kind(shape)) for shape in ((d_m, d), (d_m, d), (d, d_m)))
    return Channels(up, gate, down, draw(norm_vectors(d)), draw(norm_vectors(d_m)))


@dataclass(frozen=True)
class Heads:
    """The matrices of an MHA.

    Attributes
    ----------
    q : (kv_heads * share * head_dim, d)
    k, v : (kv_heads * head_dim, d)
    o : (d, kv_heads * share * head_dim)
    kv_heads : int
    """

    q: Array
    k: Array
    v: Array
    o: Array
    kv_heads: int

    @property
    def matrices(self) -> tuple[Array, Array, Array, Array]:
        """q, k, v and o."""
        return self.q, self.k, self.v, self.o


@st.composite
def heads(draw: st.DrawFn) -> Heads:
    """Draw an MHA: integer-valued, from spectra, or with all weights equal, so that groups tie."""
    kv_heads, share = draw(st.integers(1, 4), label="kv_heads"), draw(st.integers(1, 3))
    head_dim, d = draw(st.sampled_from((1, 2, 4)), label="head_dim"), draw(sides(1, 6), label="d")
    queries, keys = kv_heads * share * head_dim, kv_heads * head_dim
    kind = draw(st.sampled_from(("integer", "spectrum", "equal")))

    def matrix(shape: Shape) -> Array:
        if kind == "equal":
            return np.full(shape, 2.0)
        return draw(integer_matrices(shape) if kind == "integer" else spectral_matrices(shape))

    return Heads(
        *(matrix(shape) for shape in ((queries, d), (keys, d), (keys, d), (d, queries))), kv_heads
    )


ratios = st.one_of(
    st.sampled_from((0.0, 0.1, 0.2, 1 / 3, 0.34, 0.5, 2 / 3, 0.8, 0.99, 1.0)),
    st.integers(0, 10_000).map(lambda n: n / 10_000),
    st.floats(0, 1),
)
allocations = st.one_of(
    st.sampled_from((1, 2, 3, 7)), st.sampled_from((0.25, 0.5, 2.5)), st.floats(0.05, 50)
)


@st.composite
def attention_shapes(draw: st.DrawFn) -> Mapping[str, Shape]:
    """Draw shapes of a subset of q, k, v, o: square, grouped-query, or any at all."""
    kind = draw(st.sampled_from(("square", "grouped", "any")))
    names = draw(st.lists(st.sampled_from("qkvo"), min_size=1, unique=True), label="matrices")
    if kind == "any":
        side = st.one_of(st.integers(1, 12), st.integers(1, 9000))
        return {name: (draw(side), draw(side)) for name in names}
    if kind == "square":
        d = draw(st.one_of(st.integers(1, 300), st.sampled_from((2048, 4096, 5120, 6656, 8192))))
        return dict.fromkeys(names, (d, d))
    head_dim = draw(st.sampled_from((4, 8, 64, 128)))
    kv_heads, share = draw(st.integers(1, 16)), draw(st.integers(1, 8))
    d = draw(st.sampled_from((kv_heads * share * head_dim, 512, 4096)))
    queries, keys = kv_heads * share * head_dim, kv_heads * head_dim
    shapes = {"q": (queries, d), "k": (keys, d), "v": (keys, d), "o": (d, queries)}
    return {name: shapes[name] for name in names}


ROLES = ("q", "k", "qk", "v", "o", "gate", "up", "down")
"""Matrices that may share a budget."""


@st.composite
def low_rank_shapes(draw: st.DrawFn) -> Mapping[str, Shape]:
    """Draw shapes of the attention's matrices, of the FFN's, or of both; q and k joint or not."""
    shapes = dict(draw(attention_shapes()))
    if {"q", "k"} <= shapes.keys() and shapes["q"][1] == shapes["k"][1] and draw(st.booleans()):
        q, k = shapes.pop("q"), shapes.pop("k")
        shapes["qk"] = (q[0] + k[0], q[1])
    take = draw(st.sampled_from(("attention", "ffn", "both")))
    if take == "attention":
        return shapes
    d = draw(st.sampled_from([side for shape in shapes.values() for side in shape]), label="d")
    d_m = draw(st.one_of(st.integers(1, 4 * d), st.sampled_from((11008, 13824, 28672))))
    names = draw(
        st.lists(st.sampled_from(("gate", "up", "down")), min_size=1, unique=True), label="matrices"
    )
    ffn = {name: (d, d_m) if name == "down" else (d_m, d) for name in names}
    return ffn if take == "ffn" else shapes | ffn


@st.composite
def streams(draw: st.DrawFn) -> tuple[Array, Array]:
    """Draw the residual stream before and after a sub-layer, ``(tokens, d)`` each, d at least 1.

    Some tokens are zero on one side or both, some do not change, some are far from 1 in size.
    """
    count, features = draw(st.integers(0, 40), label="tokens"), draw(sides(), label="d")
    rng = np.random.default_rng(draw(seeds))
    X = rng.standard_normal((count, features))
    kind = draw(st.sampled_from(("near", "apart", "integer", "huge and tiny")))
    if kind == "integer":
        X = rng.integers(-1, 2, X.shape).astype(np.float64)
        Y = rng.integers(-1, 2, X.shape).astype(np.float64)
    elif kind == "apart":
        Y = rng.standard_normal(X.shape)
    else:
        Y = X + draw(st.sampled_from((0.0, 1e-6, 0.1, 1.0))) * rng.standard_normal(X.shape)
    if kind == "huge and tiny":
        X, Y = (Z * 10.0 ** rng.integers(-290, 291, (count, 1)) for Z in (X, Y))
    for Z in (X, Y):
        Z[rng.random(count) < draw(st.sampled_from((0.0, 0.1, 0.5)))] = 0
    return X, Y


@st.composite
def similarities(draw: st.DrawFn) -> list[float]:
    """Draw the similarities of one to forty sub-layers: equal, nearly so, or apart."""
    count = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(seeds))
    spread = draw(st.sampled_from((0.0, 1e-16, 1e-12, 2.0**-32, 1e-6, 0.01, 1.0)))
    values: list[float] = (draw(st.floats(-1, 1)) + spread * rng.uniform(-1, 1, count)).tolist()
    return values


@dataclass(frozen=True)
class SubLayers:
    """The sub-layers that a target is spread over; see ``mgaa.sublayer_ratios``."""

    z: list[float]
    sizes: list[int]
    target: float
    alpha: float
    highest: list[float]

    @property
    def arguments(self) -> tuple[list[float], list[int], float, float, list[float]]:
        """As the function takes them."""
        return self.z, self.sizes, self.target, self.alpha, self.highest

    @property
    def wanted(self) -> list[float]:
        """Eq. (14), before the shift."""
        return [self.alpha * z + self.target for z in self.z]


@st.composite
def sublayers(draw: st.DrawFn) -> SubLayers:
    """Draw one to sixteen sub-layers, of a LLaMA's sizes or any; bounds that allow it or not."""
    count = draw(st.integers(1, 16), label="sub-layers")
    rng = np.random.default_rng(draw(seeds))
    z = {
        "equal": np.zeros(count),
        "integer": rng.integers(-2, 3, count).astype(np.float64),
        "normal": rng.standard_normal(count),
    }[draw(st.sampled_from(("normal", "integer", "normal", "equal")), label="scores")]
    if draw(st.booleans()):
        d, d_m = draw(st.sampled_from(((4096, 11008), (5120, 13824), (6, 20))))
        sizes = [(4 * d * d, 3 * d * d_m)[s % 2] for s in range(count)]
    else:
        sizes = rng.integers(1, 10 ** draw(st.integers(1, 10)), count).tolist()
    target, floor = draw(ratios, label="target"), draw(st.sampled_from((0.0, 0.25, 0.5, 1.0)))
    highest = [target + (1 - floor) * (1 - target)] * count
    if draw(st.booleans()):
        highest = rng.choice((0.0, 0.3, 0.5, 0.9, 1.0), count).tolist()
    alpha = draw(st.one_of(st.sampled_from((0.35, 0.1, 0.5, 10.0, 0.0)), st.floats(0.01, 2)))
    return SubLayers(z.tolist(), sizes, target, alpha, highest)


@dataclass(frozen=True)
class Energies:
    """The matrices of a sub-layer that share a budget; see ``mgaa.common_energy_ranks``."""

    spectra: dict[str, Array]
    shapes: dict[str, Shape]
    budget: float
    floors: dict[str, int]


def spectrum(size: int, kind: str, rng: np.random.Generator) -> Array:
    """Return singular values, descending.

    Parameters
    ----------
    size : int
    kind : {"integer", "flat", "geometric", "power", "zero"}
        ``integer``: from 0 to 3, with ties. ``geometric``: so steep that the last ones add nothing
        to a sum of doubles, where there are many.
    rng : numpy.random.Generator
    """
    index = np.arange(size, dtype=np.float64)
    values = {
        "integer": np.sort(rng.integers(0, 4, size).astype(np.float64))[::-1],
        "flat": np.full(size, rng.uniform(0.1, 10)),
        "geometric": rng.uniform(0.1, 0.9) ** index,
        "power": rng.uniform(0.1, 10) * (1 + index) ** -rng.uniform(0.1, 2),
        "zero": np.zeros(size),
    }[kind]
    return values.copy()


@st.composite
def energies(draw: st.DrawFn) -> Energies:
    """Draw one to seven matrices, all alike or not, floors, and a budget that mostly fits them."""
    names = draw(st.lists(st.sampled_from(ROLES), min_size=1, max_size=7, unique=True))
    rng = np.random.default_rng(draw(seeds))
    kinds = st.sampled_from(("integer", "flat", "geometric", "power", "zero"))
    side = st.one_of(st.integers(1, 12), st.integers(8, 80))
    alike = draw(st.booleans(), label="alike")
    shape, kind = (draw(side), draw(side)), draw(kinds)
    one = spectrum(min(shape), kind, rng)
    shapes, spectra, floors = {}, {}, {}
    most = draw(st.sampled_from((1, 2, 100)), label="highest floor")
    for name in names:
        shapes[name] = shape if alike else (draw(side), draw(side))
        spectra[name] = one if alike else spectrum(min(shapes[name]), draw(kinds), rng)
        floors[name] = int(rng.integers(0, min(most, min(shapes[name])) + 1))
    total = sum(d_out * d_in for d_out, d_in in shapes.values())
    least = sum(
        min(max(1, floors[name]) * (d_out + d_in), d_out * d_in)
        for name, (d_out, d_in) in shapes.items()
    )
    budget = least + draw(st.floats(0, 1), label="of the rest") * (total - least)
    if draw(st.integers(0, 7)) == 0:
        budget = draw(st.floats(0, 1.1), label="of all") * total
    return Energies(spectra, shapes, budget, floors)


@dataclass(frozen=True)
class SmallLlama:
    """A random LLaMA, small enough for hundreds of compressions.

    Attributes
    ----------
    shape : LlamaShape
    hidden, width, vocabulary : int
    tied, attention_bias, mlp_bias : bool
    seed : int
        Of the weights.
    """

    shape: LlamaShape
    hidden: int
    width: int
    vocabulary: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    seed: int

    def config(self) -> LlamaConfig:
        """Return its configuration for transformers."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.width,
            num_hidden_layers=self.shape.layers,
            num_attention_heads=self.shape.heads,
            num_key_value_heads=self.shape.kv_heads,
            head_dim=self.shape.head_dim,
            rms_norm_eps=self.shape.rms_eps,
            rope_theta=self.shape.rope_theta,
            max_position_embeddings=64,
            tie_word_embeddings=self.tied,
            attention_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
            bos_token_id=None,
            eos_token_id=None,
        )

    def weights(self) -> dict[str, Array]:
        """Return its weights under the names of a Hugging Face checkpoint."""
        rng = np.random.default_rng(self.seed)
        d, queries = self.hidden, self.shape.heads * self.shape.head_dim
        keys = self.shape.kv_heads * self.shape.head_dim
        linears = {
            "self_attn.q_proj": (queries, d, self.attention_bias),
            "self_attn.k_proj": (keys, d, self.attention_bias),
            "self_attn.v_proj": (keys, d, self.attention_bias),
            "self_attn.o_proj": (d, queries, self.attention_bias),
            "mlp.gate_proj": (self.width, d, self.mlp_bias),
            "mlp.up_proj": (self.width, d, self.mlp_bias),
            "mlp.down_proj": (d, self.width, self.mlp_bias),
        }
        weights: dict[str, Any] = {
            "model.embed_tokens.weight": rng.standard_normal((self.vocabulary, d)),
            "model.norm.weight": rng.uniform(0.5, 1.5, d),
        }
        if not self.tied:
            weights["lm_head.weight"] = rng.standard_normal((self.vocabulary, d)) / np.sqrt(d)
        for index in range(self.shape.layers):
            prefix = f"model.layers.{index}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                weights[f"{prefix}{norm}.weight"] = rng.uniform(0.5, 1.5, d)
            for name, (d_out, d_in, bias) in linears.items():
                weights[f"{prefix}{name}.weight"] = rng.standard_normal((d_out, d_in)) / np.sqrt(
                    d_in
                )
                if bias:
                    weights[f"{prefix}{name}.bias"] = rng.standard_normal(d_out) / 2
        return weights

    def model(self, dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
        """Return the same model for transformers."""
        return self.model_of(self.weights(), dtype)

    def model_of(
        self, weights: Mapping[str, Array], dtype: torch.dtype = torch.float64
    ) -> LlamaForCausalLM:
        """Return other weights of the same shapes as a model for transformers."""
        state = {name: torch.from_numpy(value) for name, value in weights.items()}
        if self.tied:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model = LlamaForCausalLM(self.config()).to(dtype)
        model.load_state_dict(state)
        return model.eval()


def grouped_llama(layers: int, seed: int) -> SmallLlama:
    """Return a small model with grouped queries, biases everywhere, and a head of its own."""
    return SmallLlama(
        LlamaShape(layers, heads=4, kv_heads=2, head_dim=4),
        hidden=16,
        width=24,
        vocabulary=40,
        tied=False,
        attention_bias=True,
        mlp_bias=True,
        seed=seed,
    )


@st.composite
def small_llamas(draw: st.DrawFn) -> SmallLlama:
    """Draw a LLaMA of one to three layers: grouped queries or not, tied or not, biases or not."""
    kv_heads, share = draw(st.sampled_from(((1, 1), (2, 1), (1, 2), (2, 2), (1, 4))), label="heads")
    return SmallLlama(
        shape=LlamaShape(
            layers=draw(st.integers(1, 3), label="layers"),
            heads=kv_heads * share,
            kv_heads=kv_heads,
            head_dim=draw(st.sampled_from((2, 4, 8)), label="head_dim"),
            rope_theta=draw(st.sampled_from((100.0, 10000.0)), label="rope_theta"),
            rms_eps=draw(st.sampled_from((1e-5, 1e-6)), label="rms_eps"),
        ),
        hidden=kv_heads * share * draw(st.integers(2, 6), label="hidden per head"),
        width=draw(st.integers(5, 40), label="width"),
        vocabulary=draw(st.integers(8, 30), label="vocabulary"),
        tied=draw(st.booleans(), label="tied"),
        attention_bias=draw(st.booleans(), label="attention_bias"),
        mlp_bias=draw(st.booleans(), label="mlp_bias"),
        seed=draw(seeds, label="seed"),
    )


def calibration_ids(llama: SmallLlama, samples: int, length: int) -> Ids:
    """Return token ids ``(samples, length)`` from the model's seed."""
    rng = np.random.default_rng(llama.seed)
    return rng.integers(0, llama.vocabulary, (samples, length))
