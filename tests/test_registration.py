"""What ``import lorap`` costs, exports and registers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lorap
from lorap.errors import UsageError
from lorap.families import FAMILIES, MODELING_MODULE, family_of, modeling_file
from lorap.families.modeling_lorap import LorapLlamaConfig, LorapLlamaForCausalLM
from tests.tiny_models import tiny_config, tiny_structure

HEAVY = ("torch", "transformers", "numpy", "safetensors", "huggingface_hub")


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_import_loads_nothing_heavy() -> None:
    found = run_python(
        f"import sys, lorap; print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert found == "[]"


def test_exports_are_the_table() -> None:
    assert set(lorap.__all__) == {*lorap._EXPORTS, "__version__"}
    assert set(lorap.__all__) <= set(dir(lorap))
    assert lorap.UsageError is UsageError
    for name, module in lorap._EXPORTS.items():
        if importlib.util.find_spec(module) is not None:
            assert getattr(lorap, name).__module__.startswith(module)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'compres'"):
        lorap.compres  # noqa: B018


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    config = FAMILIES["llama"].compressed_config(tiny_config(), tiny_structure())
    LorapLlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "imports",
    [
        "import lorap; from transformers import AutoConfig as auto",
        "from transformers import AutoModel as auto; import lorap",
        pytest.param(
            "import lorap; from transformers.models.llama import LlamaForCausalLM; "
            "from transformers import AutoModelForCausalLM as auto",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "import lorap; from transformers.models.auto.modeling_auto import AutoModel as auto",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "import lorap.families.modeling_lorap; from transformers import AutoModel as auto",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_auto_classes_load_in_every_order_of_imports(imports: str, checkpoint: Path) -> None:
    kind = run_python(f"{imports}; print(type(auto.from_pretrained({str(checkpoint)!r})))")
    assert kind.startswith("<class 'lorap.families.modeling_lorap.LorapLlama")


def test_registering_again_changes_nothing() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    family = FAMILIES["llama"]
    family.register(sys.modules[MODELING_MODULE])
    config = AutoConfig.for_model("lorap_llama")
    assert type(config) is LorapLlamaConfig
    assert AutoModelForCausalLM._model_mapping[LorapLlamaConfig] is LorapLlamaForCausalLM


def test_the_family_of_a_llama() -> None:
    config = tiny_config()
    assert family_of(config) is FAMILIES["llama"]
    assert family_of({"model_type": "llama"}) is FAMILIES["llama"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gpt2"}, "gpt2 is not supported; supported: gemma2, .*, smollm3"),
        (
            {"model_type": "mixtral", "num_local_experts": 8},
            "mixtral, a mixture of experts, is not",
        ),
        ({"model_type": "qwen2_moe", "num_experts": 60}, "qwen2_moe, a mixture of experts, is not"),
        ({"model_type": "bert"}, "bert, an encoder, is not supported; supported: "),
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5, an encoder-decoder, is not"),
        ({"model_type": "mbart"}, "mbart, an encoder-decoder, is not"),
        ({"model_type": "gemma3", "vision_config": {}}, "gemma3, a multimodal model, is not"),
        ({"model_type": "qwen2_audio", "audio_config": {}}, "qwen2_audio, a multimodal model,"),
        ({}, "names no model_type"),
        ({"model_type": "lorap_llama"}, "compressed already"),
        ({"model_type": "lorap_gemma3_text"}, "compressed already"),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}},
            r"quantised \(gptq\)",
        ),
    ],
)
def test_other_models_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        family_of(values)


def test_the_shipped_file_is_there() -> None:
    assert modeling_file().name == "modeling_lorap.py"
    assert modeling_file().is_file()


def test_the_compressed_configuration_keeps_the_fields_of_the_original() -> None:
    config = tiny_config(rms_norm_eps=3e-5, attention_bias=True, attn_implementation="eager")
    before = config.to_dict()
    compressed = FAMILIES["llama"].compressed_config(config, tiny_structure())
    assert config.to_dict() == before
    assert compressed.rms_norm_eps == 3e-5
    assert compressed._attn_implementation == "eager"
    after = compressed.to_dict()
    own = {"auto_map", "lorap", "model_type", "rope_theta", "rope_scaling", "architectures"}
    assert {key: after[key] for key in before if key not in own} == {
        key: value for key, value in before.items() if key not in own
    }
    structure = tiny_structure()
    compressed = FAMILIES["llama"].compressed_config(config, structure)
    structure[0]["mlp"]["width"] = 1
    assert compressed.lorap["layers"] == tiny_structure()
