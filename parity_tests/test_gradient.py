"""The loss and its gradients: the reference's backward by hand against torch's autograd."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorap.demo import MODEL
from lorap.families.modeling_lorap import LowRankLinear
from lorap.ops import heads, importance, pruning
from lorap_reference import budget, gradient, llama
from lorap_reference import heads as reference_heads
from lorap_reference import importance as reference_importance
from lorap_reference import pruning as reference_pruning
from parity_tests import compare, llamas, tolerances, tracked
from parity_tests import strategies as own
from parity_tests.tolerances import CONFIDENCE, EPS64


def check(
    model: PreTrainedModel,
    weights: dict[str, own.Array],
    shape: llama.LlamaShape,
    ids: own.Ids,
    prefix: str = "",
) -> None:
    """Compare the loss and every gradient, entry by entry."""
    loss, gradients = llamas.torch_gradients(model, ids)
    compare.close(
        f"{prefix}loss",
        loss,
        gradient.loss(weights, shape, ids),
        CONFIDENCE * tracked.loss(weights, shape, ids).spread,
    )
    reference = gradient.loss_gradients(weights, shape, ids)
    spreads = tracked.loss_gradients(weights, shape, ids)
    assert gradients.keys() == reference.keys() == weights.keys()
    for name, theirs in reference.items():
        quantity = ".".join(part for part in name.split(".")[-3:] if not part.isdigit())
        llamas.close(
            f"{prefix}gradient of {quantity}", gradients[name], theirs, spreads[name].spread
        )


@pytest.mark.spec("gradient.loss", "gradient.backward")
@own.of_whole_models
@given(model=own.small_llamas(), samples=st.integers(1, 3), length=st.integers(2, 10))
@llamas.float64_throughout()
def test_loss_gradients(model: own.SmallLlama, samples: int, length: int) -> None:
    ids = own.calibration_ids(model, samples, length)
    check(model.model(), model.weights(), model.shape, ids)


def factor_(model: PreTrainedModel, seed: int) -> None:
    """Put random factors of random ranks, full ones included, in the place of some linears."""
    rng = np.random.default_rng(seed)
    for layer in model.model.layers:
        for name, linear in list(layer.named_modules()):
            if not isinstance(linear, torch.nn.Linear) or rng.random() < 0.3:
                continue
            d_out, d_in = linear.weight.shape
            rank = int(rng.integers(1, min(d_out, d_in) + 1))
            biased = linear.bias is not None
            factored = LowRankLinear(d_in, d_out, rank, bias=biased, dtype=torch.float64)
            for parameter in factored.parameters():
                values = rng.standard_normal(parameter.shape) / np.sqrt(parameter.shape[-1])
                parameter.data = torch.from_numpy(values)
            parent, _, child = name.rpartition(".")
            setattr(layer.get_submodule(parent), child, factored)


@pytest.mark.spec("gradient.backward")
@own.of_whole_models
@given(llama_=own.small_llamas(), length=st.integers(2, 8), seed=own.seeds)
@llamas.float64_throughout()
def test_gradients_of_factored_weights(llama_: own.SmallLlama, length: int, seed: int) -> None:
    """Both factors of a low-rank linear, and the bias of the left one."""
    ids = own.calibration_ids(llama_, 2, length)
    model = llama_.model()
    factor_(model, seed)
    weights = {name: compare.as_array(weight) for name, weight in model.named_parameters()}
    check(model, weights, llama_.shape, ids, "factored: ")


@pytest.fixture(scope="module")
def embedded() -> PreTrainedModel:
    """The embedded model, in float64."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64).eval()


@pytest.mark.spec("gradient.loss", "gradient.backward")
@llamas.float64_throughout()
def test_gradients_of_the_embedded_model(embedded: PreTrainedModel) -> None:
    """Trained weights, six layers, three rows of 64 tokens."""
    ids = np.random.default_rng(0).integers(0, embedded.config.vocab_size, (3, 64))
    weights, shape = llamas.reference_weights(embedded), llamas.reference_shape(embedded)
    check(embedded, weights, shape, ids, "embedded model: ")


@pytest.mark.spec("importance.taylor", "importance.group-scores", "heads.scores")
@own.of_whole_models
@given(
    model=own.small_llamas(),
    length=st.integers(2, 8),
    aggregation=own.aggregations,
    ratio=own.ratios,
)
@llamas.float64_throughout()
def test_taylor_scores_of_a_model(
    model: own.SmallLlama,
    length: int,
    aggregation: reference_importance.Aggregation,
    ratio: float,
) -> None:
    """Each side scores by its own gradients, and keeps channels and groups by its own scores."""
    weights, kv_heads = model.weights(), model.shape.kv_heads
    ids = own.calibration_ids(model, 2, length)
    _, gradients = llamas.torch_gradients(model.model(), ids)
    theirs = gradient.loss_gradients(weights, model.shape, ids)
    spreads = tracked.loss_gradients(weights, model.shape, ids)

    def compare_scores(
        kind: str,
        names: list[str],
        ours: Callable[..., torch.Tensor],
        reference: Callable[..., own.Array],
        rounded: float,
    ) -> None:
        mine = ours(
            importance.taylor_importance(
                torch.from_numpy(weights[name]), torch.from_numpy(gradients[name])
            )
            for name in names
        )
        C = reference(
            reference_importance.taylor_importance(weights[name], theirs[name]) for name in names
        )
        # Norms of magnitudes: the scores of the distances bound the distance of the scores.
        moved = reference(
            CONFIDENCE * np.abs(weights[name]) * spreads[name].spread for name in names
        )
        error = moved + (rounded + EPS64) * C
        compare.close(f"Taylor scores of {kind}", mine, C, error)
        band = budget.removed_band(C.size, ratio, 0.1)
        compare.kept_channels(
            f"{kind} kept by Taylor scores",
            pruning.kept_channels(mine, *band),
            reference_pruning.kept_channels(C, *band),
            C,
            error,
            band,
        )

    for index in range(model.shape.layers):
        prefix = f"model.layers.{index}"
        compare_scores(
            "channels",
            [f"{prefix}.mlp.{m}_proj.weight" for m in ("up", "gate", "down")],
            lambda scores: importance.group_scores(*scores, aggregation),
            lambda scores: reference_importance.group_scores(*scores, aggregation),
            tolerances.group_importance(model.hidden, EPS64),
        )
        q = f"{prefix}.self_attn.q_proj.weight"
        compare_scores(
            "groups",
            [f"{prefix}.self_attn.{m}_proj.weight" for m in "qkvo"],
            lambda scores: heads.head_scores(*scores, kv_heads, aggregation),
            lambda scores: reference_heads.head_scores(*scores, kv_heads, aggregation),
            tolerances.head_scores(weights[q].size // kv_heads),
        )
