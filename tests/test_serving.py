"""What inference engines need of a compressed model: vLLM's Transformers backend, torchao."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import lorap
from lorap.families import FAMILIES, modeling_lorap
from tests.test_dense import Structure, save_compressed
from tests.test_families import family_structure
from tests.tiny_models import (
    FAMILY_FIELDS,
    tiny_family_model,
    tiny_structure,
    token_ids,
    varied_structure,
)

UNIFORM: Structure = [
    {
        "self_attn.qk_proj": {"rank": 9, "bias": True},
        "self_attn.o_proj": {"rank": 8},
        "mlp": {"width": 30},
        "mlp.gate_proj": {"rank": 6},
        "mlp.down_proj": {"rank": 5, "bias": True},
    }
] * 3
"""The same in all layers."""

MIXED: Structure = [
    {"self_attn.q_proj": {"rank": 9}, "mlp": {"width": 30}},
    {"self_attn.v_proj": {"rank": 4}, "self_attn.o_proj": {"rank": 4, "bias": True}},
    {},
]
"""Linears that are factored in some layers alone."""

STRUCTURES = {
    "uniform": UNIFORM,
    "mixed": MIXED,
    "tiny": tiny_structure(),
    "varied": varied_structure(),
}


def base_model(model_type: str, layers: Structure) -> Any:
    """Build a base model as vLLM does: from its configuration, on the meta device."""
    family = FAMILIES[model_type]
    original = tiny_family_model(model_type).config
    config = family.compressed_config(original, family_structure(family, layers))
    with torch.device("meta"):
        model: Any = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    return model


def kind(module: nn.Module) -> tuple[Any, ...]:
    """Return what an engine takes for granted of all modules of a type."""
    return tuple(
        (name, type(child), getattr(child, "bias", None) is None)
        for name, child in module.named_children()
        if "proj" in name
    )


@pytest.mark.parametrize("layers", STRUCTURES.values(), ids=STRUCTURES)
@pytest.mark.parametrize("model_type", FAMILY_FIELDS)
def test_linears_are_fused_by_type_only_where_all_are_plain(
    model_type: str, layers: Structure
) -> None:
    model = base_model(model_type, layers)
    assert {tensor.device.type for tensor in model.parameters()} == {"meta"}
    stock = tiny_family_model(model_type).model.layers[0]
    for layer in model.layers:
        for own, original in ((layer.self_attn, stock.self_attn), (layer.mlp, stock.mlp)):
            assert isinstance(own, type(original))
            # An engine looks at one module of a type, and takes the others for the same.
            plain = kind(own) == kind(original)
            assert (type(own) is type(original)) == plain
            # It rewrites the source of the forward in which it finds the linears by their names.
            source = inspect.getsource(type(own).forward)
            assert ("_proj" in source) == plain
    if layers is not MIXED:
        return
    types = {(type(x.self_attn).__name__, type(x.mlp).__name__) for x in model.layers}
    assert len(types) == 2


def vllm_style(plan: dict[str, str], name: str) -> str:
    """Return the style of a linear as vLLM's Transformers backend looks it up."""
    return next((style for key, style in plan.items() if re.match(key, name)), "replicate")


@pytest.mark.parametrize("layers", STRUCTURES.values(), ids=STRUCTURES)
@pytest.mark.parametrize("model_type", FAMILY_FIELDS)
def test_every_linear_is_split_as_its_place_asks(model_type: str, layers: Structure) -> None:
    model = base_model(model_type, layers)
    stock = tiny_family_model(model_type).config.base_model_tp_plan
    plan = dict(model.tp_plan)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        expected = "replicate"
        for pattern, style in stock.items():
            whole = re.match(pattern.replace(".", r"\.").replace("*", r"\d+") + r"(\.|$)", name)
            split = "left" if style.startswith("colwise") else "right"
            if whole and name.rpartition(".")[2] not in {"left", "right"} - {split}:
                expected = style
        assert vllm_style(plan, name) == expected, name
        assert expected != "replicate" or name.endswith((".left", ".right", "qk_right"))
    norms = {n: s for n, s in stock.items() if "norm" in n}
    assert norms.items() <= {re.sub(r"\.\d+\.", ".*.", n): s for n, s in plan.items()}.items()


@pytest.mark.parametrize("layers", STRUCTURES.values(), ids=STRUCTURES)
@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_rules_for_all_layers_meet_linears_alone(model_type: str, layers: Structure) -> None:
    # transformers knows no others, and installs what it finds on any module of that name.
    model = base_model(model_type, layers)
    rules = {name for name in model.tp_plan if "*" in name}
    blocks: dict[tuple[str, str], set[bool]] = {}
    for name, module in model.named_modules():
        if ".self_attn." in name or ".mlp." in name:
            general = re.sub(r"\d+", "*", name)
            if general in rules:
                assert isinstance(module, nn.Linear) or "norm" in name, name
            if isinstance(module, nn.Linear):
                _, index, block, _ = name.split(".", 3)
                told = vllm_style(dict(model.tp_plan), name) != "replicate"
                if told:
                    blocks.setdefault((index, block), set()).add(general in rules)
    # A block is split whole or not at all.
    assert all(len(found) == 1 for found in blocks.values())


def test_the_dense_form_keeps_the_plan_of_the_family() -> None:
    family = FAMILIES["llama"]
    original = tiny_family_model("llama").config
    config: Any = family.compressed_config(original, None)
    assert config.base_model_tp_plan == original.base_model_tp_plan
    assert "base_model_tp_plan" not in config.to_dict()


def test_it_compiles_in_one_graph(tmp_path: Path) -> None:
    model = save_compressed(tmp_path, "llama", varied_structure())
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(token_ids()).logits, model(token_ids()).logits)


def test_kernels_are_called_by_name_with_the_layer_s_number(tmp_path: Path) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    save_compressed(tmp_path, "llama", UNIFORM)
    model = AutoModel.from_pretrained(tmp_path)
    seen: list[tuple[int, int, Any]] = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def kernel(module: Any, *args: Any, engine: Any = None, **kwargs: Any) -> Any:
        seen.append((module.layer_idx, args[0].shape[1], engine))
        return sdpa(module, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("lorap_test", kernel)
    # An engine exchanges the kernel in the configuration, and hands its own state through.
    model.config._attn_implementation = "lorap_test"
    with torch.no_grad():
        model(token_ids(), engine="state")
    assert seen == [(0, 4, "state"), (1, 4, "state"), (2, 4, "state")]


def test_the_loaded_class_says_that_engines_may_run_it(tmp_path: Path) -> None:
    save_compressed(tmp_path, "llama", UNIFORM)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_dict()["auto_map"]["AutoModel"] == "modeling_lorap.LorapLlamaModel"
    assert modeling_lorap.LorapLlamaModel._supports_attention_backend
    assert config.base_model_pp_plan == tiny_family_model("llama").config.base_model_pp_plan


PARALLEL = """
import sys
import torch
import torch.distributed
import lorap
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

try:
    from transformers.distributed import DistributedConfig
    options = {"distributed_config": DistributedConfig(tp_plan="auto")}
except ImportError:
    options = {"tp_plan": "auto"}
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        logits = model(load_file(f"{folder}/ids.safetensors")["ids"]).logits
    split = [n for n, p in model.named_parameters() if hasattr(p, "to_local")]
    if torch.distributed.get_rank() == 0:
        found = {"logits": logits, "split": torch.tensor(len(split))}
        save_file(found, f"{folder}/out.safetensors")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    (tmp_path / "parallel.py").write_text(PARALLEL)
    cases = {
        "uniform": ("qwen3", UNIFORM),
        "mixed": ("llama", MIXED),
        "fused": ("phi3", [*tiny_structure()[:2], tiny_structure()[0]]),
    }
    models = {}
    for name, (model_type, layers) in cases.items():
        models[name] = save_compressed(tmp_path / name, model_type, layers)
        save_file({"ids": token_ids()}, tmp_path / name / "ids.safetensors")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    folders = [str(tmp_path / name) for name in cases]
    done = subprocess.run(
        [*command, str(tmp_path / "parallel.py"), *folders],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name, model in models.items():
        found = load_file(tmp_path / name / "out.safetensors")
        assert int(found["split"]) > 0
        with torch.no_grad():
            expected = model(token_ids()).logits
        torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-4)


# torchao, on top


@pytest.fixture
def torchao() -> Any:
    return pytest.importorskip("torchao.quantization", exc_type=ImportError)


def is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits are those of another model but for what 8 bits round."""
    distance = (found - expected).norm() / expected.norm()
    return 1e-5 < float(distance) < 0.05


@pytest.mark.parametrize("layers", [UNIFORM, tiny_structure()], ids=["joint", "plain"])
def test_a_model_in_memory_is_quantised(layers: Structure, torchao: Any, tmp_path: Path) -> None:
    model = save_compressed(tmp_path, "llama", layers)
    with torch.no_grad():
        before = model(token_ids()).logits
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        after = model(token_ids()).logits
    attention = model.model.layers[0].self_attn
    factors = [attention.q_proj.left, attention.qk_right or attention.q_proj.right]
    assert all(type(factor.weight) is not nn.Parameter for factor in factors)
    assert is_close(after, before)


def test_a_checkpoint_is_quantised_saved_evaluated_and_loaded(torchao: Any, tmp_path: Path) -> None:
    from transformers import TorchAoConfig

    model = save_compressed(tmp_path / "small", "llama", tiny_structure())
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", dtype=torch.float32, quantization_config=config
    )
    with torch.no_grad():
        expected, found = (each(token_ids()).logits for each in (model, quantised))
    assert is_close(found, expected)
    quantised.save_pretrained(tmp_path / "int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, found)
    np.save(tmp_path / "ids.npy", token_ids(8, 16).numpy())
    numbers = [
        lorap.evaluate_perplexity(
            tmp_path / name, tmp_path / "ids.npy", seqlen=16, device="cpu"
        ).mean_nll
        for name in ("small", "int8")
    ]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02)
    assert numbers[0] != numbers[1]
