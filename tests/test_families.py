"""What holds for every family, from the names in its adapter to the checkpoint loaded again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    StaticCache,
)

import lorap
from lorap import CompressionConfig, UsageError
from lorap.audit import audit
from lorap.families import FAMILIES, Family, modeling_lorap
from lorap.families.base import JOINT
from lorap.families.fused import join, split
from lorap.pipeline import in_memory
from tests.tiny_models import (
    FAMILY_FIELDS,
    randomise_,
    tiny_family_model,
    tiny_structure,
    token_ids,
    varied_structure,
)

IDS = token_ids(8, 16)
RATIO = 0.3


def family_structure(family: Family, layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a structure of LLaMA under the family's names, without what it cannot have."""
    plain = FAMILIES["llama"]
    names = {plain.attention[role]: name for role, name in family.attention.items()}
    names |= {plain.ffn[role]: name for role, name in family.ffn.items()}
    return [
        {
            names.get(name, name): dict(entry)
            for name, entry in layer.items()
            if family.prunes_heads or name != family.attention_block
        }
        for layer in layers
    ]


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    result: torch.Tensor = model(token_ids() if ids is None else ids).logits
    return result


@torch.no_grad()
def generate(model: Any, **options: Any) -> torch.Tensor:
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


# Dense and compressed forms


@dataclass(frozen=True)
class Case:
    """A family with a random model of it."""

    family: Family
    original: PreTrainedModel

    def compressed(self, layers: list[dict[str, Any]], seed: int = 1) -> Any:
        """Return a random model of a structure that is given in the names of LLaMA."""
        structure = family_structure(self.family, layers)
        model = self.family.model_class(
            self.family.compressed_config(self.original.config, structure)
        )
        randomise_(model, seed)
        return model.eval()


@pytest.fixture(scope="module", params=FAMILY_FIELDS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(FAMILIES[request.param], tiny_family_model(request.param))


def test_every_family_has_a_tiny_model() -> None:
    assert set(FAMILY_FIELDS) == set(FAMILIES)


class TestForms:
    def test_the_adapter_names_what_the_model_has(self, case: Case) -> None:
        family = case.family
        assert case.original.config.model_type == family.model_type
        state = case.original.state_dict()
        assert {family.embedding, family.head} <= set(state)
        for index in range(3):
            layer = case.original.get_submodule(f"{family.layers_path}.{index}")
            linears = {n for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
            named = (*family.attention.values(), *family.ffn.values())
            assert linears == {family.dense_name(name) for name in named}
            assert {name.split(".")[0] for name in family.attention.values()} == {
                family.attention_block
            }
            assert {name.split(".")[0] for name in family.ffn.values()} == {family.ffn_block}

    def test_the_shipped_file_says_the_same_as_the_adapter(self, case: Case) -> None:
        family, stock = case.family, case.family.config_class.stock
        assert stock.linears == {**family.attention, **family.ffn}
        assert stock.prunes_heads == family.prunes_heads
        assert case.family.config_class.model_type == family.compressed_type
        assert JOINT == modeling_lorap.JOINT
        assert family.attention_block == modeling_lorap.ATTENTION
        assert family.ffn_block == modeling_lorap.FFN

    def test_without_structure_it_computes_what_the_original_computes(self, case: Case) -> None:
        dense = case.family.model_class(case.family.compressed_config(case.original.config, None))
        dense.load_state_dict(case.original.state_dict())
        assert torch.equal(logits(dense.eval()), logits(case.original))

    @pytest.mark.parametrize("kernel", ["eager", "sdpa"])
    @pytest.mark.parametrize("layers", [tiny_structure(), varied_structure()])
    def test_every_structure_computes_what_it_stands_for(
        self, layers: list[dict[str, Any]], kernel: str, case: Case
    ) -> None:
        if kernel == "sdpa" and not case.family.base_class._supports_sdpa:
            pytest.skip("the family has no sdpa")
        model = case.compressed(layers)
        twin = AutoModelForCausalLM.from_config(case.original.config)
        make_dense_twin_(twin, model, case.family)
        for each in (model, twin):
            each.set_attn_implementation(kernel)
        torch.testing.assert_close(logits(model), logits(twin.eval()), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("layers", [tiny_structure(), varied_structure()])
    def test_generation_with_a_cache_equals_generation_without(
        self, layers: list[dict[str, Any]], case: Case
    ) -> None:
        model = case.compressed(layers)
        cached = generate(model)
        assert cached.shape[1] > token_ids().shape[1]
        assert torch.equal(cached, generate(model, use_cache=False))

    def test_a_static_cache_gives_the_logits_of_a_plain_forward(self, case: Case) -> None:
        model, ids = case.compressed(varied_structure()), token_ids()
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=cache, use_cache=True)
            last = model(ids[:, -1:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(last[:, 0], logits(model)[:, -1], rtol=1e-4, atol=1e-4)

    def test_inference_engines_can_build_it(self, case: Case, tmp_path: Path) -> None:
        """The rules of vLLM's Transformers backend."""
        model = case.compressed(tiny_structure())
        model.config.save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        with torch.device("meta"):
            base = AutoModel.from_config(config)
        assert type(base) is case.family.base_class
        assert {tensor.device.type for tensor in base.parameters()} == {"meta"}
        stock = type(case.original.model.layers[0].self_attn)
        first, second, last = (type(layer.self_attn) for layer in base.layers)
        assert first is second is not last is stock
        assert issubclass(first, stock)
        # None of the base model can be split, and the plan says so.
        assert base.tp_plan == {}
        for flag in ("_supports_attention_backend", "_supports_flash_attn", "_supports_sdpa"):
            assert getattr(base, flag) == getattr(case.original, flag)

    def test_heads_that_a_norm_spans_cannot_be_left_out(self, case: Case) -> None:
        layers: list[dict[str, Any]] = [{"self_attn": {"kv_heads": 1}}, {}, {}]
        if case.family.prunes_heads:
            case.family.compressed_config(case.original.config, layers)
        else:
            with pytest.raises(ValueError, match="no heads can be left out, since a norm spans"):
                case.family.compressed_config(case.original.config, layers)


@torch.no_grad()
def make_dense_twin_(twin: Any, model: Any, family: Family) -> None:
    """Give a dense model linears that do what those of a compressed one do.

    Channels and heads that are gone are there, and zero; every linear has a bias.
    """
    own = twin.state_dict()
    fitting = {n: t for n, t in model.state_dict().items() if n in own and t.shape == own[n].shape}
    twin.load_state_dict(fitting, strict=False)
    dense = family.compressed_config(twin.config, None).linears(0)
    for index, layer in enumerate(model.model.layers):
        found: dict[str, list[torch.nn.Linear]] = {}
        for name, shape in model.config.linears(index).items():
            linear = torch.nn.Linear(dense[name].d_in, dense[name].d_out)
            weight, bias = asked(layer, name, model.config.linears(index), family)
            linear.weight.zero_()[: shape.d_out, : shape.d_in] = weight
            linear.bias.zero_()[: shape.d_out] = bias
            found.setdefault(family.dense_name(name), []).append(linear)
        for name, parts in found.items():
            whole = torch.nn.Linear(parts[0].in_features, sum(p.out_features for p in parts))
            whole.weight.copy_(torch.cat([part.weight for part in parts]))
            whole.bias.copy_(torch.cat([part.bias for part in parts]))
            twin.model.layers[index].set_submodule(name, whole)


def asked(
    layer: Any, name: str, linears: dict[str, Any], family: Family
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrix and the bias that a linear applies, by calling it."""
    whole = family.dense_name(name)
    module, rows = layer.get_submodule(whole), slice(None)
    if whole != name and isinstance(module, torch.nn.Linear):
        sizes = [linears[part].d_out for part in family.fused[whole]]
        start = sum(sizes[: family.fused[whole].index(name)])
        rows = slice(start, start + linears[name].d_out)
    elif whole != name:
        module = layer.get_submodule(name)
    bias = module(torch.zeros(linears[name].d_in))
    weight = module(torch.eye(linears[name].d_in)) - bias
    return weight.T[rows], bias[rows]


# Compression, from the original to the checkpoint loaded again


@dataclass(frozen=True)
class Written:
    """A family's model compressed in memory and on disk."""

    family: Family
    original: PreTrainedModel
    in_memory: Any
    folder: Path
    report: dict[str, Any]
    outputs: torch.Tensor
    """Of the last layer, as the compression computed them."""


@pytest.fixture(scope="module", params=FAMILY_FIELDS)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp(request.param)
    original = tiny_family_model(request.param)
    original.save_pretrained(folder / "original")
    np.save(folder / "ids.npy", IDS.numpy())
    config = CompressionConfig(ratio=RATIO, samples=8, seqlen=16, batch_size=3)
    report = lorap.compress_checkpoint(
        folder / "original", folder / "out", config, calibration=str(folder / "ids.npy")
    )
    outputs: list[torch.Tensor] = []
    real = in_memory.compress_layers

    def recording(decoder: Any, batches: Any, *args: Any) -> Iterator[Any]:
        for layer in real(decoder, batches, *args):
            outputs[:] = [batch.kept.load() for batch in batches]
            yield layer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_memory, "compress_layers", recording)
        compressed = lorap.compress(original, config, calibration=IDS)
    return Written(
        FAMILIES[request.param], original, compressed, folder / "out", report, torch.cat(outputs)
    )


class TestCompression:
    def test_memory_disk_and_reload_agree_bit_for_bit(self, written: Written) -> None:
        reloaded, info = AutoModelForCausalLM.from_pretrained(
            written.folder, dtype="auto", output_loading_info=True
        )
        assert type(reloaded) is type(written.in_memory) is written.family.model_class
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        expected, got = written.in_memory.state_dict(), reloaded.state_dict()
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected)
        assert torch.equal(logits(written.in_memory), logits(reloaded))
        assert torch.equal(generate(written.in_memory), generate(reloaded))
        base = AutoModel.from_pretrained(written.folder)
        with torch.no_grad():
            hidden = [model(IDS).last_hidden_state for model in (base, reloaded.model)]
        assert torch.equal(*hidden)
        tied = reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
        assert tied == written.original.config.tie_word_embeddings

    def test_it_has_the_parameters_that_the_plan_gives_it(self, written: Written) -> None:
        parameters = written.report["parameters"]
        assert parameters["before"] == written.original.num_parameters()
        assert parameters["after"] == written.in_memory.num_parameters()
        assert written.report["achieved_ratio"] == pytest.approx(RATIO, abs=0.03)
        for layer, built in zip(
            written.report["layers"], written.in_memory.model.layers, strict=True
        ):
            stays = sum(p.numel() for n, p in built.named_parameters() if "norm" in n)
            listed = sum(module["parameters"] for module in layer["modules"].values())
            assert listed + stays == sum(p.numel() for p in built.parameters())

    def test_layer_by_layer_is_the_forward_of_the_compressed_model(self, written: Written) -> None:
        seen: list[torch.Tensor] = []
        handle = written.in_memory.model.norm.register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        logits(written.in_memory, IDS)
        handle.remove()
        torch.testing.assert_close(written.outputs, seen[0], rtol=1e-4, atol=1e-4)

    def test_the_statistics_are_those_of_the_originals_own_forward(self, written: Written) -> None:
        norms = load_file(written.folder / "lorap_statistics.safetensors")
        family, layer = written.family, written.original.model.layers[0]
        watched = {
            "attention": family.attention["q"],
            "o": family.attention["o"],
            "ffn": family.ffn["up"],
            "down": family.ffn["down"],
        }
        kinds = {name.split(".")[-2] for name in norms}
        assert {"attention", "ffn", "down"} <= kinds
        for kind in kinds:
            seen: list[torch.Tensor] = []
            linear = layer.get_submodule(family.dense_name(watched[kind]))
            handle = linear.register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            logits(written.original, IDS)
            handle.remove()
            expected = seen[0].double().flatten(0, 1).norm(dim=0)
            torch.testing.assert_close(
                norms[f"{family.layers_path}.0.{kind}.norms"], expected, rtol=1e-5, atol=1e-6
            )

    @pytest.mark.parametrize(
        "methods",
        [
            {"mha": "pca", "ffn": "afm", "joint_qk": True, "allocation": "mgaa"},
            {"mha": "heads", "importance": "taylor", "aggregation": "l1", "ratio": 0.55},
            {"mha": "asvd", "ffn": "svd", "allocation": "mgaa-within"},
        ],
        ids=["mgaa", "heads", "within"],
    )
    def test_other_methods_fit_it_too(self, methods: dict[str, Any], written: Written) -> None:
        settings = {"ratio": 0.4, "ratio_scope": "layer", "batch_size": 3} | methods
        config = CompressionConfig(**settings)
        if methods["mha"] == "heads" and not written.family.prunes_heads:
            with pytest.raises(UsageError, match="normalises q and k over all heads"):
                lorap.compress(written.original, config, calibration=IDS)
            return
        compressed = lorap.compress(written.original, config, calibration=IDS)
        found = logits(compressed)
        assert torch.isfinite(found).all()
        dense = logits(written.original)
        # Not the dense model, and not noise either.
        assert 0.01 < torch.linalg.norm(found - dense) / torch.linalg.norm(dense) < 1.5
        before, after = (
            sum(parameter.numel() for parameter in model.model.layers.parameters())
            for model in (written.original, compressed)
        )
        assert 1 - after / before == pytest.approx(config.ratio, abs=0.15)
        assert torch.equal(generate(compressed), generate(compressed, use_cache=False))

    def test_it_is_saved_again_in_shards(self, written: Written, tmp_path: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(written.folder)
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(logits(again), logits(written.in_memory))
        fields = [each.config.to_dict() | {"_name_or_path": ""} for each in (again, model)]
        assert fields[0] == fields[1]

    def test_it_is_placed_by_a_device_map(self, written: Written, tmp_path: Path) -> None:
        mapped = AutoModelForCausalLM.from_pretrained(written.folder, device_map="auto")
        found = logits(mapped, token_ids().to(mapped.device)).cpu()
        torch.testing.assert_close(found, logits(written.in_memory))
        device_map = {f"model.{name}": "cpu" for name, _ in mapped.model.named_children()}
        del device_map["model.layers"]
        device_map |= {"lm_head": "cpu", "model.layers.2": "cpu"}
        device_map |= {"model.layers.0": "disk", "model.layers.1": "disk"}
        mapped = AutoModelForCausalLM.from_pretrained(
            written.folder, device_map=device_map, offload_folder=tmp_path
        )
        assert {item.device.type for item in mapped.model.layers[0].parameters()} == {"meta"}
        assert torch.equal(logits(mapped), logits(written.in_memory))

    def test_the_audit_says_what_its_reference_does_not_know(self, written: Written) -> None:
        original, family = written.folder.parent / "original", written.family
        if family.model_type == "llama":
            assert audit(original, written.folder).passed
            return
        message = f"forward of llama, mistral, qwen2, not that of {family.model_type}"
        if family.plain_forward:
            message = "of 6 tokens, is shorter than the samples of 16"
        with pytest.raises(UsageError, match=message):
            audit(original, written.folder)

    def test_what_a_layer_keeps_dense_stays_as_it_was(self, written: Written) -> None:
        config = CompressionConfig(ratio=0.1, sublayers=("ffn",))
        compressed = lorap.compress(written.original, config, calibration=IDS).state_dict()
        for name, tensor in written.original.state_dict().items():
            if ".mlp." not in name:
                assert torch.equal(compressed[name], tensor)
        assert set(compressed) == set(written.original.state_dict())


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("mistral", {"sliding_window": 16}),
        ("mistral", {"sliding_window": None, "head_dim": 16}),
        ("qwen2", {"sliding_window": 16}),
        ("qwen2", {"use_sliding_window": False, "layer_types": ["full_attention"] * 3}),
    ],
)
def test_the_audit_passes_where_its_reference_knows_the_forward(
    model_type: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    tiny_family_model(model_type, **fields).save_pretrained(tmp_path / "original")
    np.save(tmp_path / "ids.npy", IDS.numpy())
    lorap.compress_checkpoint(
        tmp_path / "original",
        tmp_path / "out",
        CompressionConfig(ratio=RATIO, samples=8, seqlen=16),
        calibration=str(tmp_path / "ids.npy"),
    )
    result = audit(tmp_path / "original", tmp_path / "out")
    assert result.passed, [module for module in result.modules if not module.passed]


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
from transformers import AutoModelForCausalLM

root, trust = Path(sys.argv[1]), {"trust_remote_code": True}
ids, results, modules = load_file(root / "ids.safetensors")["ids"], {}, set()
for folder in sorted(root.glob("*/")):
    model = AutoModelForCausalLM.from_pretrained(folder, **trust)
    modules.add(type(model).__module__.split(".")[0])
    results[f"{folder.name}.generated"] = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    model.save_pretrained(folder / "again")
    again = AutoModelForCausalLM.from_pretrained(folder / "again", **trust)
    with torch.no_grad():
        results[f"{folder.name}.first"] = model(ids).logits
        results[f"{folder.name}.again"] = again(ids).logits
save_file(results, root / "results.safetensors")
print(json.dumps({"modules": sorted(modules), "lorap": "lorap" in sys.modules}))
"""


def test_all_load_and_save_where_lorap_is_not_installed(tmp_path: Path) -> None:
    models = {}
    for model_type, family in FAMILIES.items():
        case = Case(family, tiny_family_model(model_type))
        models[model_type] = case.compressed(varied_structure())
        models[model_type].save_pretrained(tmp_path / model_type)
    save_file({"ids": token_ids()}, tmp_path / "ids.safetensors")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path.parent / "modules"),
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_LORAP, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"modules": ["transformers_modules"], "lorap": False}
    results = load_file(tmp_path / "results.safetensors")
    for model_type, model in models.items():
        assert torch.equal(results[f"{model_type}.first"], logits(model))
        assert torch.equal(results[f"{model_type}.again"], logits(model))
        assert torch.equal(results[f"{model_type}.generated"], generate(model))


# Rotary embeddings in the spelling of either version of transformers

LONG = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}


@pytest.mark.parametrize(
    ("model_type", "rope", "spelled"),
    [
        ("qwen2", {"rope_type": "default"}, {"rope_scaling": None}),
        (
            "mistral",
            {"rope_type": "linear", "factor": 2.0},
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            "olmo2",
            {"rope_type": "linear", "factor": 2.0},
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
        (
            "phi3",
            {"rope_type": "longrope", "partial_rotary_factor": 0.5, **LONG},
            {"rope_scaling": {"type": "longrope", **LONG}, "partial_rotary_factor": 0.5},
        ),
        (
            "gemma3_text",
            {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 40.0},
            },
            {
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_local_base_freq": 40.0,
            },
        ),
    ],
)
def test_both_versions_of_transformers_read_the_same_rotary_embedding(
    model_type: str, rope: dict[str, Any], spelled: dict[str, Any], tmp_path: Path
) -> None:
    family = FAMILIES[model_type]
    fields = tiny_family_model(model_type).config.to_dict()
    for name in ("model_type", "rope_parameters", "rope_theta", *spelled):
        fields.pop(name, None)
    if "full_attention" not in rope:
        rope = rope | {"rope_theta": 300.0}
    config = family.config_class(**fields, rope_parameters=rope)
    model = family.model_class(config)
    randomise_(model, seed=3)
    model.eval().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {name: written[name] for name in spelled} == spelled
    assert written["rope_theta"] == 300.0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    # What the other version would read alone.
    for dropped in (["rope_parameters"], ["rope_theta", *spelled]):
        left = {name: value for name, value in written.items() if name not in dropped}
        if dropped == ["rope_parameters"] or "rope_parameters" in written:
            (tmp_path / "config.json").write_text(json.dumps(left))
            again = AutoModelForCausalLM.from_pretrained(tmp_path)
            assert torch.equal(logits(again), logits(model))


# Fused linears


@pytest.mark.spec("family.parts")
def test_fused_linears_are_split_into_rows_and_joined_where_no_part_is_named() -> None:
    family, original = FAMILIES["phi3"], tiny_family_model("phi3")
    config = family.compressed_config(original.config, None)
    layer = original.model.layers[0].state_dict()
    parts = split(family, config, layer)
    qkv, gate_up = layer["self_attn.qkv_proj.weight"], layer["mlp.gate_up_proj.weight"]
    expected = {
        "self_attn.qkv_proj.q.weight": qkv[:32],
        "self_attn.qkv_proj.k.weight": qkv[32:48],
        "self_attn.qkv_proj.v.weight": qkv[48:],
        "mlp.gate_up_proj.gate.weight": gate_up[:48],
        "mlp.gate_up_proj.up.weight": gate_up[48:],
    }
    for name, tensor in expected.items():
        assert torch.equal(parts[name], tensor)
        assert parts[name].untyped_storage().nbytes() == tensor.nbytes
    assert set(parts) - set(expected) == set(layer) & set(parts)
    joined = join(family, {"mlp": {"width": 3}}, parts)
    assert set(joined) == set(layer)
    assert all(torch.equal(joined[name], layer[name]) for name in layer)
    for named in ("self_attn.qkv_proj.v", JOINT):
        partly = join(family, {named: {"rank": 3}}, parts)
        assert "self_attn.qkv_proj.q.weight" in partly
        assert torch.equal(partly["mlp.gate_up_proj.weight"], gate_up)


def test_where_nothing_is_fused_nothing_changes() -> None:
    family, original = FAMILIES["qwen2"], tiny_family_model("qwen2")
    layer = original.model.layers[0].state_dict()
    config = family.compressed_config(original.config, None)
    assert split(family, config, layer) == layer
    assert join(family, {}, layer) == layer


def test_a_family_that_transformers_does_not_have_is_no_obstacle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stock = modeling_lorap._Stock("of_the_future")
    monkeypatch.setitem(modeling_lorap._FAMILIES, "OfTheFuture", stock)
    with pytest.raises(ImportError, match="of_the_future"):
        modeling_lorap.LorapOfTheFutureConfig  # noqa: B018
    Family("of_the_future", "LorapOfTheFuture").register(modeling_lorap)
    assert modeling_lorap.LorapLlamaConfig.model_type == "lorap_llama"
    with pytest.raises(AttributeError, match="has no attribute 'LorapLlamaMLP'"):
        modeling_lorap.LorapLlamaMLP  # noqa: B018
