"""How many parameters each matrix keeps: Section 3.2 (allocation), Section 3.3, App. C.1.

Pure Python: ranks and widths follow from shapes alone. The order of the floating-point operations
is part of the rule (SPEC: ``budget.ieee``).
"""

from collections.abc import Mapping, Sequence
from math import ceil, fsum

Shape = tuple[int, int]

ALLOCATION_GROUP: Mapping[str, int] = {
    "q": 0,
    "k": 0,
    "qk": 0,
    "v": 1,
    "o": 1,
    "gate": 0,
    "up": 0,
    "down": 0,
}
"""Section 3.2: v and o (1) get `allocation` times what q and k (0) get, or any other matrix."""


def layer_ratio(total: int, layers: int, layer: int, ratio: float) -> float:
    """App. C.1: the ratio of the compressible parameters that removes `ratio` of all parameters.

    Parameters
    ----------
    total : int
        All parameters of the model, tied ones once.
    layers : int
        Decoder layers.
    layer : int
        Compressible parameters of one layer.
    ratio : float
        Share of `total` to remove.

    Returns
    -------
    float
        1 or more cannot be reached.

    Notes
    -----
    SPEC: ``budget.layer-ratio``.
    """
    return total * ratio / (layers * layer)


def break_even_rank(shape: Shape) -> float:
    """Rank at which two factors hold as many parameters as the matrix.

    Parameters
    ----------
    shape : (d_out, d_in)

    Notes
    -----
    SPEC: ``budget.break-even``.
    """
    d_out, d_in = shape
    return d_out * d_in / (d_out + d_in)


def ranks(
    shapes: Mapping[str, Shape], ratio: float, allocation: float, nested: bool
) -> dict[str, int | None]:
    """Ranks of matrices that share a budget; None stands for dense. Section 3.2, App. C.1.

    Each matrix is due the share of the retained parameters that its group's weight gives it. Those
    due their break-even rank or more stay dense and hand their surplus to the others by the same
    weights, until no further matrix is due so much.

    Parameters
    ----------
    shapes : mapping from {"q", "k", "qk", "v", "o", "gate", "up", "down"} to (d_out, d_in)
        The matrices that take part, in any number. ``qk`` is the stack of q and k by rows, which
        are then factored together.
    ratio : float
        Layer ratio, the share removed.
    allocation : float
        Weight of v and o against that of the others, 3 in the paper.
    nested : bool
        Floor the uniform rank before the weight is applied, as the authors do (layer scope).

    Returns
    -------
    dict
        Rank by matrix in the order of `shapes`. A rank of 0 means that the ratio cannot be reached.

    Notes
    -----
    SPEC: ``budget.ranks``, ``budget.overflow``, ``budget.slack``.
    """
    retained = 1 - ratio
    sizes = {name: d_out * d_in for name, (d_out, d_in) in shapes.items()}
    weights = {name: allocation if ALLOCATION_GROUP[name] else 1 for name in shapes}
    total = sum(sizes.values())
    weighted = fsum(weights[name] * sizes[name] for name in shapes)
    rank: dict[str, int | None] = {}
    due: dict[str, float] = {}
    for name, shape in shapes.items():
        uniform = retained * break_even_rank(shape)
        share = (int(uniform) if nested else uniform) * (weights[name] * total) / weighted
        rank[name] = due[name] = int(share)

    while True:
        overflowing = [name for name in due if due[name] >= break_even_rank(shapes[name])]
        if not overflowing:
            return rank
        for name in overflowing:
            rank[name] = None
            del due[name]
        if len({weights[name] for name in due}) == 1:
            weights.update(dict.fromkeys(due, 1))
        held = sum(sizes[name] for name in shapes if name not in due)
        weighted = fsum(weights[name] * sizes[name] for name in due)
        for name in due:
            break_even = break_even_rank(shapes[name])
            kept = retained * (total * weights[name] * break_even / weighted)
            lost = held * weights[name] * break_even / weighted
            due[name] = kept - lost
            rank[name] = min(int(kept) - int(lost), ceil(break_even) - 1)


def removed_band(width: int, ratio: float, least_important: float) -> tuple[int, int]:
    """Eq. (11) in whole channels: ``[low, high)`` of the ascending order is removed.

    Parameters
    ----------
    width : int
        Channels of the FFN.
    ratio : float
        Layer ratio, the share removed.
    least_important : float
        Share of least important channels that is kept, 0.01 in the paper.

    Returns
    -------
    low, high : int
        ``high >= width`` means that no channel of the top would be kept: not reachable.

    Notes
    -----
    SPEC: ``budget.channels``.
    """
    return int(least_important * width), int((ratio + least_important) * width)


def rounded_sizes(
    sizes: Sequence[int], per_unit: int, dense: int, multiple: int
) -> list[int | None]:
    """Sizes of one module in the layers that share a budget, as multiples; None stands for dense.

    What one layer gets too much or too little is carried to the next.

    Parameters
    ----------
    sizes : sequence
        Ranks, or numbers of channels, by layer, without those that are dense.
    per_unit : int
        Parameters of one rank or channel.
    dense : int
        Parameters of the dense module.
    multiple : int
        1 returns the sizes as they are.

    Notes
    -----
    SPEC: ``budget.multiple``.
    """
    step = multiple * per_unit
    rounded: list[int | None] = []
    carried = 0
    for size in sizes:
        if size < multiple:
            rounded.append(size)
            continue
        # More than half a step, so that it never goes to zero.
        due = size * per_unit + carried
        below = due // step * step
        above = min(below + step, dense)
        held = above if above - due < due - below else below
        carried = due - held
        rounded.append(None if held == dense else held // per_unit)
    return rounded
