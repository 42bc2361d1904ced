"""How much memory the torch path takes beside its inputs and results."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorap.ops import lowrank
from lorap.ops.importance import channel_importance
from lorap.ops.marginal import divergence_sum
from lorap.ops.mgaa import cosine_sum
from lorap.ops.precision import all_finite
from lorap.ops.statistics import (
    cross_moment,
    second_moment,
    sum_of_magnitudes,
    sum_of_squares,
    token_sum,
)


class Allocations(TorchDispatchMode):
    """Notes the elements of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.made.append((func.overloadpacket.__name__, leaf.numel()))
        return result


def allocations(function: Callable[..., object], *arguments: object) -> list[tuple[str, int]]:
    with Allocations() as mode:
        function(*arguments)
    return mode.made


@pytest.mark.spec("precision.statistics")
@pytest.mark.parametrize(
    ("function", "inputs", "device", "mib"),
    [
        (second_moment, 1, "cpu", 32),
        (cross_moment, 2, "cpu", 32),
        (sum_of_squares, 1, "cpu", 2),
        (sum_of_magnitudes, 1, "cpu", 2),
        (token_sum, 1, "cpu", 2),
        (sum_of_squares, 1, "meta", 32),
        (partial(channel_importance, axis=0), 1, "cpu", 2),
        (partial(channel_importance, axis=1), 1, "cpu", 2),
        (partial(channel_importance, axis=1), 1, "meta", 32),
    ],
)
def test_inputs_are_widened_some_mib_at_a_time(
    function: Callable[..., Tensor], inputs: int, device: str, mib: int
) -> None:
    """And no less, so that the work is not done in crumbs; meta stands for a GPU."""
    chunk = mib * 2**20 // 8
    x = torch.ones(5 * chunk // 2 // 128, 128, dtype=torch.float16, device=device)
    made = allocations(function, *[x] * inputs)
    widened = [size for name, size in made if name == "_to_copy"]
    assert widened == [chunk] * 2 * inputs + [chunk // 2] * inputs


@pytest.mark.spec("precision.statistics")
@pytest.mark.parametrize("features", [0, 1, 3])
def test_few_features_are_widened_as_many_tokens_at_a_time(
    features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorap.ops.precision.CACHED_ELEMENTS", 2)
    inputs = torch.ones(5, features, dtype=torch.float32)
    widened = [size for name, size in allocations(sum_of_squares, inputs) if name == "_to_copy"]
    assert widened == {0: [0, 0, 0], 1: [2, 2, 1], 3: [3] * 5}[features]


@pytest.mark.spec("precision.statistics")
def test_samples_are_widened_by_features_and_not_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorap.ops.precision.CACHED_ELEMENTS", 6)
    inputs = torch.ones(2, 6, 3, dtype=torch.float32)
    widened = [size for name, size in allocations(sum_of_squares, inputs) if name == "_to_copy"]
    assert widened == [6] * 6


@pytest.mark.spec("stats.cross-moment", "precision.statistics")
@pytest.mark.parametrize("features", [(1, 3), (3, 1)])
def test_two_inputs_are_widened_as_many_tokens_at_a_time_as_the_wider_one_allows(
    features: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorap.ops.precision.CHUNK_ELEMENTS", 6)
    rng = torch.Generator().manual_seed(0)
    inputs, others = (torch.randn(5, d, generator=rng) for d in features)
    made = allocations(cross_moment, inputs, others)
    widths = [tokens * d for tokens in (2, 2, 1) for d in features]
    assert [size for name, size in made if name == "_to_copy"] == widths
    expected = inputs.double().T @ others.double()
    torch.testing.assert_close(cross_moment(inputs, others), expected)


@pytest.mark.spec("mgaa.similarity", "precision.statistics")
def test_streams_are_widened_16_mib_at_a_time_each() -> None:
    chunk = 16 * 2**20 // 8
    stream = torch.ones(5 * chunk // 2 // 128, 128, dtype=torch.float16)
    made = allocations(cosine_sum, stream, stream)
    widened = [size for name, size in made if name == "_to_copy" and size > chunk // 4]
    assert widened == [chunk] * 4 + [chunk // 2] * 2


@pytest.mark.spec("mgaa.similarity", "precision.statistics")
@pytest.mark.parametrize(
    ("features", "expected"), [(1, [2, 2, 2, 2, 2, 2, 1, 1, 1]), (3, [3, 3, 1] * 5)]
)
def test_few_features_are_widened_as_many_tokens_at_a_time_of_each_stream(
    features: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third time it is what tells tokens apart that are zero."""
    monkeypatch.setattr("lorap.ops.mgaa._CHUNK_ELEMENTS", 2)
    stream = torch.ones(5, features, dtype=torch.float32)
    made = allocations(cosine_sum, stream, stream)
    assert [size for name, size in made if name == "_to_copy"] == expected


@pytest.mark.spec("marginal.divergence", "precision.statistics")
def test_logits_are_widened_16_mib_at_a_time_each() -> None:
    chunk = 16 * 2**20 // 8
    logits = torch.ones(5 * chunk // 2 // 128, 128, dtype=torch.float16)
    widened = [n for name, n in allocations(divergence_sum, logits, logits) if name == "_to_copy"]
    assert widened == [chunk] * 4 + [chunk // 2] * 2


@pytest.mark.spec("marginal.divergence", "precision.statistics")
@pytest.mark.parametrize(
    ("vocabulary", "expected"), [(1, [2, 2, 2, 2, 1, 1]), (3, [3] * 10), (9, [9] * 10)]
)
def test_a_small_vocabulary_is_widened_as_many_tokens_at_a_time(
    vocabulary: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorap.ops.marginal._CHUNK_ELEMENTS", 2)
    logits = torch.ones(5, vocabulary, dtype=torch.float32)
    made = allocations(divergence_sum, logits, logits)
    assert [size for name, size in made if name == "_to_copy"] == expected


@pytest.mark.spec("precision.decomposition")
@pytest.mark.parametrize("shape", [(400, 2), (2, 400)])
@pytest.mark.parametrize("function", ["svd_low_rank", "awsvd"])
def test_singular_vectors_that_no_rank_can_use_are_not_made(
    function: str, shape: tuple[int, int]
) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    scale = () if function == "svd_low_rank" else (torch.ones(shape[1]),)
    made = allocations(getattr(lowrank, function), W, *scale, 2)
    assert max(size for _, size in made) == W.numel()


@pytest.mark.spec("awsvd.deficient")
def test_spare_directions_take_no_square_of_the_inputs() -> None:
    W, scale = torch.eye(2, 400), torch.zeros(400)
    scale[0] = 1
    assert max(size for _, size in allocations(lowrank.awsvd, W, scale, 2)) == W.numel()


@pytest.mark.spec("algorithm.sequence")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_wherever_it_stands(value: float, dtype: torch.dtype) -> None:
    """In whole vectors of the processor, behind them, and where rows are not in a row."""
    for size in (1, 3, 8, 33, 64, 70_001):
        tensor = torch.linspace(-2, 2, size, dtype=dtype)
        assert all_finite(tensor) is True
        for place in {0, size // 3, size - 1}:
            bad = tensor.clone()
            bad[place] = value
            assert not all_finite(bad)
    table = torch.zeros(5, 6, dtype=dtype)
    table[3, 4] = value
    assert not all_finite(table.T)
    assert not all_finite(table[:, ::2])
    assert all_finite(table[::2])
    assert all_finite(table[:0])
    assert not all_finite(table[3, 4])
    assert all_finite(torch.full((3,), torch.finfo(dtype).max, dtype=dtype))


@pytest.mark.spec("algorithm.sequence")
def test_to_see_that_all_is_finite_takes_no_memory() -> None:
    assert max(size for _, size in allocations(all_finite, torch.ones(999))) == 2
