"""The compressed LLaMA as transformers sees it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, StaticCache

import lorap  # noqa: F401  (registers the Auto classes)
from lorap.families import FAMILIES, modeling_file
from lorap.families.modeling_lorap import (
    LorapLlamaConfig,
    LorapLlamaForCausalLM,
    LorapLlamaModel,
    LowRankLinear,
)
from tests.tiny_models import (
    VARIANTS,
    multiplied_out,
    randomise_,
    tiny_config,
    tiny_model,
    tiny_structure,
    token_ids,
    varied_structure,
)

LLAMA = FAMILIES["llama"]


def compressed_model(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    structure: list[dict[str, Any]] | None = None,
    **overrides: Any,
) -> LorapLlamaForCausalLM:
    config = LLAMA.compressed_config(tiny_config(**overrides), structure or tiny_structure())
    model = LorapLlamaForCausalLM(config)
    randomise_(model, seed, dtype)
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    result: torch.Tensor = model(token_ids()).logits
    return result


# Structure


@pytest.mark.parametrize("variant", VARIANTS)
def test_modules_have_the_ranks_and_widths_of_the_structure(variant: str) -> None:
    model = compressed_model(**VARIANTS[variant])
    for layer, structure in zip(model.model.layers, tiny_structure(), strict=True):
        dense = tiny_model(**VARIANTS[variant]).model.layers[0]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            module = getattr(layer.self_attn, name)
            original = getattr(dense.self_attn, name)
            assert module.in_features == original.in_features
            assert module.out_features == original.out_features
            entry = structure.get(f"self_attn.{name}")
            if entry is None:
                assert type(module) is torch.nn.Linear
                assert (module.bias is None) == (original.bias is None)
            else:
                assert module.right.weight.shape == (entry["rank"], original.in_features)
                assert module.left.weight.shape == (original.out_features, entry["rank"])
                assert module.right.bias is None
                assert (module.left.bias is None) == (original.bias is None)
        width = structure.get("mlp", {"width": 48})["width"]
        assert layer.mlp.gate_proj.weight.shape == (width, 32)
        assert layer.mlp.up_proj.weight.shape == (width, 32)
        assert layer.mlp.down_proj.weight.shape == (32, width)
        assert (layer.mlp.down_proj.bias is None) == (not model.config.mlp_bias)


def test_low_rank_linear_is_left_after_right_plus_bias() -> None:
    module = LowRankLinear(3, 4, 2)
    hidden = torch.randn(5, 3)
    product = module.left.weight @ module.right.weight
    expected = hidden @ product.T + module.left.bias
    torch.testing.assert_close(module(hidden), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_structure_it_computes_what_llama_computes(variant: str) -> None:
    original = tiny_model(seed=3, **VARIANTS[variant])
    dense = LorapLlamaForCausalLM(LLAMA.compressed_config(original.config, None)).eval()
    dense.load_state_dict(original.state_dict())
    assert torch.equal(logits(dense), logits(original))


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("structure", [tiny_structure(), varied_structure()])
@pytest.mark.parametrize("variant", ["gqa", "biased"])
def test_every_structure_computes_what_it_stands_for(
    variant: str, structure: list[dict[str, Any]], kernel: str
) -> None:
    settings = VARIANTS[variant] | {"attn_implementation": kernel}
    compressed = compressed_model(4, structure=structure, **settings)
    dense = tiny_model(**settings | {"attention_bias": True, "mlp_bias": True})
    dense.load_state_dict(multiplied_out(compressed.state_dict(), dense.state_dict()))
    torch.testing.assert_close(logits(compressed), logits(dense), rtol=1e-4, atol=1e-4)


def test_q_and_k_share_a_right_factor_that_is_applied_once() -> None:
    model = compressed_model(structure=varied_structure(), **VARIANTS["gqa"])
    attention = model.model.layers[0].self_attn
    keys = {name for name in attention.state_dict() if ".v_" not in name and ".o_" not in name}
    assert {name for name in keys if name.startswith(("q", "k"))} == {
        "qk_right.weight",
        *(f"{name}.left.{kind}" for name in ("q_proj", "k_proj") for kind in ("weight", "bias")),
    }
    assert attention.qk_right.weight.shape == (9, 32)
    assert attention.q_proj.left.weight.shape == (32, 9)
    assert attention.k_proj.left.weight.shape == (16, 9)
    calls: list[torch.Tensor] = []
    attention.qk_right.register_forward_hook(lambda *args: calls.append(args[-1]))
    before = logits(model)
    assert len(calls) == 1
    # Each is a module that can be called on its own, and follows a replaced factor.
    hidden = torch.randn(2, 5, 32)
    for projection in (attention.q_proj, attention.k_proj):
        expected = projection.left(hidden @ attention.qk_right.weight.T)
        torch.testing.assert_close(projection(hidden), expected)
    assert len(calls) == 3
    attention.qk_right = torch.nn.Linear(32, 9, bias=False)
    assert not torch.equal(logits(model), before)


def test_a_copy_has_a_shared_factor_of_its_own() -> None:
    model = compressed_model(structure=varied_structure(), **VARIANTS["gqa"])
    before = logits(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for layer in model.model.layers[::2]:
            layer.self_attn.qk_right.weight.zero_()
    assert torch.equal(logits(copied), before)
    assert not torch.equal(logits(model), before)


def test_layers_have_their_own_numbers_of_heads() -> None:
    model = compressed_model(structure=varied_structure(), **VARIANTS["gqa"])
    attention = model.model.layers[1].self_attn
    shapes = [getattr(attention, f"{role}_proj").weight.shape for role in ("q", "k", "v", "o")]
    assert shapes == [(16, 32), (8, 32), (8, 32), (32, 16)]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(token_ids(), output_attentions=True, use_cache=True)
    assert [item.shape[1] for item in output.attentions] == [4, 2, 4]
    assert [layer.keys.shape[1] for layer in output.past_key_values.layers] == [2, 1, 2]


def test_only_blocks_with_more_than_plain_linears_have_another_type() -> None:
    # vLLM's Transformers backend decides once per type what it fuses.
    structure: list[dict[str, Any]] = [{"self_attn.o_proj": {"rank": 3}, "mlp": {"width": 5}}]
    structure += [{"mlp.up_proj": {"bias": True}}, {"self_attn": {"kv_heads": 1}}]
    model = compressed_model(structure=structure, **VARIANTS["gqa"])
    types = [type(layer.self_attn).__name__ for layer in model.model.layers]
    assert types == ["LorapLlamaAttention", "LlamaAttention", "LlamaAttention"]
    types = [type(layer.mlp).__name__ for layer in model.model.layers]
    assert types == ["LlamaMLP", "LorapLlamaMLP", "LlamaMLP"]


# Configuration


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([{}, {}], r"expected 3 entries \(num_hidden_layers\), got 2"),
        ([{}, {"self_attn.z_proj": {"rank": 3}}, {}], r"layers\[1\].*unknown module"),
        ([{"self_attn.k_proj": {"rank": 17}}, {}, {}], "rank from 1 to 16, got 17"),
        ([{"self_attn.q_proj": {"rank": 0}}, {}, {}], "rank from 1 to 32, got 0"),
        ([{"self_attn.q_proj": {"rank": 2.0}}, {}, {}], "rank from 1 to 32, got 2.0"),
        ([{"self_attn.q_proj": {"width": 2}}, {}, {}], "expected {'rank': number}"),
        ([{}, {}, {"mlp": {"width": 49}}], "width from 1 to 48, got 49"),
        ([{}, {"self_attn": {"kv_heads": 3}}, {}], "kv_heads from 1 to 2, got 3"),
        ([{}, {"self_attn": {"rank": 3}}, {}], "expected {'kv_heads': number}, got"),
        ([{"mlp.up_proj": {"rank": 33}}, {}, {}], "rank from 1 to 32, got 33"),
        ([{"mlp": {"width": 7}, "mlp.up_proj": {"rank": 8}}, {}, {}], "from 1 to 7, got 8"),
        ([{"self_attn.qk_proj": {"rank": 33}}, {}, {}], "rank from 1 to 32, got 33"),
        ([{"self_attn.qk_proj": {"bias": True}}, {}, {}], "expected {'rank': number}, with"),
        ([{"self_attn.q_proj": {"bias": False}}, {}, {}], "expected True for 'bias', got False"),
        ([{"self_attn.q_proj": {"rank": 3, "x": 1}}, {}, {}], "or {'bias': True}, got"),
        ([{"self_attn.q_proj": {}}, {}, {}], "expected {'rank': number}"),
        ([{"self_attn.q_proj": 3}, {}, {}], "expected {'rank': number}.*got 3"),
        (
            [{"self_attn.qk_proj": {"rank": 3}, "self_attn.k_proj": {"bias": True}}, {}, {}],
            "expected self_attn.qk_proj or self_attn.k_proj, got both",
        ),
        (
            [{"self_attn": {"kv_heads": 1}, "self_attn.v_proj": {"rank": 3}}, {}, {}],
            "expected kv_heads or a rank of self_attn.v_proj, got both",
        ),
        ([3, {}, {}], "one mapping per decoder layer"),
        ("q_proj", "expected a list"),
    ],
)
def test_a_structure_that_does_not_fit_is_refused(layers: Any, message: str) -> None:
    values = tiny_config(num_key_value_heads=2).to_dict()
    del values["model_type"]
    with pytest.raises(ValueError, match=message):
        LorapLlamaConfig(lorap={"format_version": 1, "layers": layers}, **values)


def test_another_format_version_is_refused() -> None:
    with pytest.raises(ValueError, match="format_version: expected 1, got 2"):
        LorapLlamaConfig(lorap={"format_version": 2, "layers": []})


def test_layers_changed_after_the_configuration_was_made_are_refused() -> None:
    config = compressed_model().config
    config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="got 3"):
        LorapLlamaModel(config)


def test_the_configuration_survives_saving_and_says_the_rotary_base_in_both_spellings(
    tmp_path: Path,
) -> None:
    config = compressed_model().config
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == 500.0
    assert set(written["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert written["intermediate_size"] == 48
    again = LorapLlamaConfig.from_pretrained(tmp_path)
    assert again.lorap == config.lorap
    assert again.to_dict()["rope_theta"] == 500.0
    assert (tmp_path / modeling_file().name).read_bytes() == modeling_file().read_bytes()


def test_scaled_rotary_embeddings_are_written_in_both_spellings(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    old = tiny_config(rope_scaling=scaling, rope_theta=700.0, rope_parameters=None)
    model = LorapLlamaForCausalLM(LLAMA.compressed_config(old, None)).eval()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["rope_theta"] == 700.0
    assert written["rope_scaling"]["rope_type"] == "llama3"
    assert "rope_theta" not in written["rope_scaling"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(
        again.model.rotary_emb.inv_freq, tiny_frequencies(old, model.model.rotary_emb)
    )
    assert torch.equal(logits(again), logits(model))


def tiny_frequencies(config: Any, like: torch.nn.Module) -> torch.Tensor:
    frequencies: torch.Tensor = type(like)(config=config).inv_freq
    return frequencies


# Loading


STRUCTURES = {name: tiny_structure() for name in VARIANTS} | {"varied": varied_structure()}
"""A structure for each variant; "varied" is a variant with grouped heads."""


def variant_model(variant: str, seed: int, **settings: Any) -> LorapLlamaForCausalLM:
    overrides = VARIANTS["gqa" if variant == "varied" else variant]
    return compressed_model(seed, structure=STRUCTURES[variant], **settings, **overrides)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", STRUCTURES)
def test_reloaded_logits_are_equal(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = variant_model(variant, seed=1, dtype=dtype)
    model.save_pretrained(tmp_path)
    reloaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, output_loading_info=True
    )
    assert type(reloaded) is LorapLlamaForCausalLM
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert reloaded.dtype == dtype
    assert torch.equal(logits(reloaded), logits(model))
    tied = reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    reloaded.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)
    assert torch.equal(logits(again), logits(model))


WITHOUT_LORAP = """
import json, sys
from importlib.abc import MetaPathFinder
from pathlib import Path

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lorap":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Blocker())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

folder, again = Path(sys.argv[1]), Path(sys.argv[2])
ids = load_file(folder / "ids.safetensors")["ids"]
trust = {"trust_remote_code": True}
model = AutoModelForCausalLM.from_pretrained(folder, **trust)
base = AutoModel.from_pretrained(folder, **trust)
with torch.no_grad():
    results = {"logits": model(ids).logits, "hidden": base(ids).last_hidden_state}
results["generated"] = model.generate(
    ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
)
model.save_pretrained(again)
reloaded = AutoModelForCausalLM.from_pretrained(again, **trust)
with torch.no_grad():
    results["again"] = reloaded(ids).logits
save_file(results, folder / "results.safetensors")
print(json.dumps({"module": type(model).__module__, "lorap": "lorap" in sys.modules}))
"""


def test_it_loads_and_saves_where_lorap_is_not_installed(tmp_path: Path) -> None:
    model = compressed_model(seed=2, **VARIANTS["tied"])
    folder, again = tmp_path / "model", tmp_path / "again"
    model.save_pretrained(folder)
    ids = token_ids()
    save_file({"ids": ids}, folder / "ids.safetensors")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_LORAP, str(folder), str(again)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["module"].startswith("transformers_modules.")
    assert not said["lorap"]
    results = load_file(folder / "results.safetensors")
    with torch.no_grad():
        assert torch.equal(results["hidden"], model.model(ids).last_hidden_state)
    assert torch.equal(results["logits"], logits(model))
    assert torch.equal(results["again"], logits(model))
    assert torch.equal(results["generated"], generate(model))
    here = AutoModelForCausalLM.from_pretrained(again)
    assert type(here) is LorapLlamaForCausalLM
    assert torch.equal(logits(here), logits(model))


def test_automatic_device_map_gives_equal_logits(tmp_path: Path) -> None:
    model = compressed_model(seed=5)
    model.save_pretrained(tmp_path)
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")
    with torch.no_grad():
        found = mapped(token_ids().to(mapped.device)).logits.cpu()
    torch.testing.assert_close(found, logits(model))


@pytest.mark.parametrize("variant", ["gqa", "varied"])
def test_layers_can_be_offloaded_to_disk(variant: str, tmp_path: Path) -> None:
    model = variant_model(variant, seed=6)
    model.save_pretrained(tmp_path)
    device_map: dict[str, str] = dict.fromkeys(
        ("model.embed_tokens", "model.layers.2", "model.norm", "model.rotary_emb", "lm_head"),
        "cpu",
    )
    device_map |= {"model.layers.0": "disk", "model.layers.1": "disk"}
    mapped = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert {item.device.type for item in mapped.model.layers[0].parameters()} == {"meta"}
    assert torch.equal(logits(mapped), logits(model))


def test_a_decoder_layer_is_never_split_between_devices() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = compressed_model()
    layer_size = sum(item.nbytes for item in model.model.layers[0].parameters())
    device_map = accelerate.infer_auto_device_map(
        model,
        max_memory={"cpu": 4 * layer_size, "disk": 10**9},
        no_split_module_classes=list(model._no_split_modules),
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    assert not any(".self_attn" in name or ".mlp" in name for name in device_map)


def test_it_is_built_on_the_meta_device(tmp_path: Path) -> None:
    compressed_model().config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        base = AutoModel.from_config(config)
        model = AutoModelForCausalLM.from_config(config)
    assert type(base) is LorapLlamaModel
    assert {tensor.device.type for tensor in model.parameters()} == {"meta"}
    assert "layers.1.self_attn.q_proj.right.weight" in base.state_dict()


# Running


@torch.no_grad()
def generate(model: torch.nn.Module, **options: Any) -> torch.Tensor:
    ids = token_ids()
    result: torch.Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return result


@pytest.mark.parametrize("variant", STRUCTURES)
def test_generation_with_the_cache_equals_generation_without(variant: str) -> None:
    model = variant_model(variant, seed=7)
    cached = generate(model)
    assert cached.shape[1] > token_ids().shape[1]
    assert torch.equal(cached, generate(model, use_cache=False))


@pytest.mark.parametrize("variant", ["gqa", "varied"])
def test_a_static_cache_gives_the_logits_of_a_plain_forward(variant: str) -> None:
    model = variant_model(variant, seed=8)
    ids = token_ids()
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache, use_cache=True)
        last = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(last[:, 0], logits(model)[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["gqa", "varied"])
def test_gradient_checkpointing_gives_the_same_gradients(variant: str) -> None:
    model = variant_model(variant, seed=9)
    ids = token_ids()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            # Renamed in transformers 5.
            name = "activation_checkpointing_enable"
            if not hasattr(model, name):
                name = "gradient_checkpointing_enable"
            getattr(model, name)({"use_reentrant": False})
        model.train()
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        attention = model.model.layers[0].self_attn
        weight = (attention.qk_right or attention.q_proj.right).weight
        assert weight.grad is not None
        gradients.append(weight.grad.clone())
    assert bool(gradients[0].abs().max() > 0)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_hidden_states_and_attentions_are_recorded() -> None:
    config = LLAMA.compressed_config(tiny_config(attn_implementation="eager"), tiny_structure())
    model = LorapLlamaForCausalLM(config).eval()
    output = model(token_ids(), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4
    assert [item.shape for item in output.attentions] == [(2, 4, 11, 11)] * 3
