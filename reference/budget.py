"""How many parameters each matrix keeps: Section 3.2 (allocation), Section 3.3, App. C.1.

Everything here is arithmetic in IEEE doubles, in the order written: a rank is the floor of a
product, and another order of the same factors can land on the other side of an integer
(SPEC: ``budget.ieee``).
"""

from collections.abc import Mapping, Sequence
from math import ceil, fsum

Shape = tuple[int, int]


def layer_ratio(param_total: int, layers: int, param_layer: int, ratio_s: float) -> float:
    """App. C.1: ``Ratio_l = Param_total * Ratio_s / (layers * Param_layer)``.

    Parameters
    ----------
    param_total : int
        All parameters of the model, embeddings and head included; tied ones once.
    layers : int
        Decoder layers.
    param_layer : int
        Compressible parameters of one layer.
    ratio_s : float
        Share of all parameters to remove.

    Returns
    -------
    float
        Share of the compressible parameters to remove; 1 or more cannot be reached.

    Notes
    -----
    SPEC: ``budget.layer-ratio``.
    """
    return param_total * ratio_s / (layers * param_layer)


def break_even_rank(shape: Shape) -> float:
    """Rank at which two factors hold as many parameters as the matrix: d/2 for a square one.

    Parameters
    ----------
    shape : (d_out, d_in)

    Notes
    -----
    SPEC: ``budget.break-even``.
    """
    d_out, d_in = shape
    return d_out * d_in / (d_out + d_in)


def authors_ranks(d: int, s: float, a: int) -> dict[str, int | None]:
    """The authors' ranks for square matrices, by their published formulas; None stands for dense.

    Parameters
    ----------
    d : int
        Hidden size: q, k, v, o are d x d.
    s : float
        Layer ratio, the share removed.
    a : int
        The ratio (v+o):(q+k).

    Notes
    -----
    SPEC: ``budget.ranks.square``. Source: the authors' repository at commit 4e34b7f.
    """
    p = 1 - s
    k_att = int(p * d / 2)
    k_max = int(k_att * 2 * a / (1 + a))
    if k_max >= d / 2:
        rest = int(p * d) - int(d / 2)
        return {"q": rest, "k": rest, "v": None, "o": None}
    k_min = int(k_att * 2 / (1 + a))
    return {"q": k_min, "k": k_min, "v": k_max, "o": k_max}


def ranks(shapes: Mapping[str, Shape], s: float, a: float, nested: bool) -> dict[str, int | None]:
    """Ranks of matrices of any shapes; None stands for dense. Section 3.2, App. C.1.

    v and o weigh ``a``, all others weigh 1. With ``N`` the dense parameters of all and ``W`` their
    weighted sum, matrix m is due ``p * b_m * (w_m * N / W)`` ranks, b_m its break-even rank. Those
    due b_m or more stay dense; the rest of the budget, ``p * N`` less what the dense ones hold,
    goes to the others by the same weights, until none is due its b_m any more.

    Parameters
    ----------
    shapes : mapping from {"q", "k", "qk", "v", "o", "gate", "up", "down"} to (d_out, d_in)
        The matrices that take part; ``qk`` is q on top of k, factored as one matrix.
    s : float
        Layer ratio, the share removed.
    a : float
        The ratio (v+o):(q+k).
    nested : bool
        Floor ``p * b_m`` before the weight is applied, as the authors do.

    Returns
    -------
    dict
        Rank by matrix, None where it stays dense. A rank of 0 means that s cannot be reached.

    Notes
    -----
    SPEC: ``budget.ranks``, ``budget.overflow``, ``budget.slack``.
    """
    p = 1 - s
    weight = {m: a if m in ("v", "o") else 1 for m in shapes}
    size = {m: d_out * d_in for m, (d_out, d_in) in shapes.items()}
    b = {m: break_even_rank(shape) for m, shape in shapes.items()}
    N = sum(size.values())

    W = fsum(weight[m] * size[m] for m in shapes)
    rank = {}
    for m in shapes:
        uniform = p * b[m]
        rank[m] = int((int(uniform) if nested else uniform) * (weight[m] * N) / W)

    due: dict[str, float] = dict(rank)
    dense: set[str] = set()
    while any(due[m] >= b[m] for m in shapes if m not in dense):
        dense |= {m for m in shapes if due[m] >= b[m]}
        rest = [m for m in shapes if m not in dense]
        N_dense = sum(size[m] for m in dense)
        equal = len({weight[m] for m in rest}) == 1
        w = {m: 1 if equal else weight[m] for m in rest}
        W = fsum(w[m] * size[m] for m in rest)
        for m in rest:
            kept = p * (N * w[m] * b[m] / W)
            held = N_dense * w[m] * b[m] / W
            due[m] = kept - held
            rank[m] = min(int(kept) - int(held), ceil(b[m]) - 1)
    return {m: None if m in dense else rank[m] for m in shapes}


def removed_band(d_m: int, s: float, least: float) -> tuple[int, int]:
    """Eq. (11) in whole channels: ``[low, high)`` of the ascending order is removed.

    Parameters
    ----------
    d_m : int
        Channels of the FFN.
    s : float
        Layer ratio, the share removed.
    least : float
        Share of least important channels that is kept, 0.01 in the paper.

    Returns
    -------
    low, high : int
        ``int(least * d_m)`` and ``int((s + least) * d_m)``. ``high >= d_m`` would keep no channel
        of the top: such an s cannot be reached.

    Notes
    -----
    SPEC: ``budget.channels``.
    """
    return int(least * d_m), int((s + least) * d_m)


def rounded_sizes(r: Sequence[int], u: int, n: int, M: int) -> list[int | None]:
    """Sizes of one module in the layers that share a budget, as multiples; None stands for dense.

    In the order of the layers, each gets the multiple at which the parameters of the layers so far
    are nearest to those of the sizes given, or the dense module where that is nearer. So layers
    differ, and their sum is kept.

    Parameters
    ----------
    r : sequence
        Ranks, or numbers of channels, by layer, without those that are dense.
    u : int
        Parameters of one rank or channel.
    n : int
        Parameters of the dense module.
    M : int
        What the sizes are to be multiples of; 1 returns them as they are.

    Notes
    -----
    SPEC: ``budget.multiple``.
    """
    choices = [*range(M * u, n, M * u), n]
    sizes: list[int | None] = []
    owed = 0
    for r_l in r:
        if r_l < M:
            sizes.append(r_l)
            continue
        due = r_l * u + owed
        held = min(choices, key=lambda h: (abs(h - due), h))
        owed = due - held
        sizes.append(None if held == n else held // u)
    return sizes
