"""Reading originals, writing compressed checkpoints, and refusing what cannot work."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorap  # noqa: F401  (registers the Auto classes)
from lorap.checkpoint import (
    REPORT,
    REPORT_PAGE,
    CheckpointWriter,
    check_output,
    fetch_tokenizer_files,
    model_card,
    open_checkpoint,
    read_config,
)
from lorap.config import CompressionConfig
from lorap.errors import LorapError, UsageError
from lorap.families import FAMILIES
from tests.tiny_models import (
    VARIANTS,
    randomise_,
    save_tiny_checkpoint,
    tiny_config,
    tiny_structure,
    token_ids,
)

LLAMA = FAMILIES["llama"]


def names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


# Reading


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_is_read_as_stored(variant: str, shard_size: str, tmp_path: Path) -> None:
    model = save_tiny_checkpoint(
        tmp_path, dtype=torch.bfloat16, shard_size=shard_size, **VARIANTS[variant]
    )
    reader = open_checkpoint(str(tmp_path))
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert set(reader.keys()) == set(expected)
    assert reader.size_bytes == sum(tensor.nbytes for tensor in expected.values())
    assert reader.dtype == torch.bfloat16
    assert reader.family is LLAMA
    assert reader.config.to_dict() == read_config(tmp_path).to_dict()
    for name, tensor in reader.load().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name])


def test_a_layer_is_read_by_its_prefix_and_alone(tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path, shard_size="20KB")
    layer = open_checkpoint(tmp_path).load("model.layers.1.")
    expected = model.model.layers[1].state_dict()
    assert list(layer) == [name for name in expected if name in layer]
    assert set(layer) == set(expected)
    assert all(torch.equal(layer[name], expected[name]) for name in expected)
    with pytest.raises(KeyError, match="nowhere"):
        open_checkpoint(tmp_path).load("nowhere.")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_loaded_tensors_do_not_keep_the_file_mapped(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path)
    kept = open_checkpoint(tmp_path).load()
    assert kept
    assert str(tmp_path / "model.safetensors") not in Path("/proc/self/maps").read_text()


def test_a_layer_is_read_to_a_device(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path)
    reader = open_checkpoint(tmp_path)
    kept = reader.load("model.layers.0.")
    # That of no memory stands for a GPU.
    read = reader.load("model.layers.0.", "meta")
    assert read.keys() == kept.keys()
    assert all(tensor.is_meta for tensor in read.values())
    assert {name: t.shape for name, t in read.items()} == {n: t.shape for n, t in kept.items()}


@pytest.mark.parametrize("variant", ["plain", "tied", "biased"])
def test_what_lies_outside_the_layers_is_read_under_full_names(
    variant: str, tmp_path: Path
) -> None:
    model = save_tiny_checkpoint(tmp_path, shard_size="20KB", **VARIANTS[variant])
    reader = open_checkpoint(tmp_path)
    others = reader.load_others()
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert set(others) == (expected - {"lm_head.weight"} if variant == "tied" else expected)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in others.items())
    layers = [name for name in reader.tensors if name.startswith("model.layers.")]
    assert len(layers) + len(others) == len(reader.keys())


@pytest.mark.parametrize("pickled", [False, True])
def test_all_tensors_are_gone_through_once_shard_by_shard(pickled: bool, tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path, shard_size="20KB")
    if pickled:
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        for file in tmp_path.glob("model*"):
            file.unlink()
    reader = open_checkpoint(tmp_path, allow_bin=pickled)
    seen: list[str] = []
    for name, tensor in reader.iter_tensors():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name])
        seen.append(name)
    assert sorted(seen) == sorted(reader.keys())
    files = [reader.tensors[name].file for name in seen]
    assert len(set(files)) == (1 if pickled else len(list(tmp_path.glob("model-*.safetensors"))))
    switches = sum(a != b for a, b in pairwise(files))
    assert switches == len(set(files)) - 1


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_tensors_gone_through_are_not_copied_and_let_go_one_by_one(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path)

    def mapped() -> int:
        file = str(tmp_path / "model.safetensors")
        return Path("/proc/self/maps").read_text().count(file)

    for _, tensor in open_checkpoint(tmp_path).iter_tensors():
        assert tensor.numel()
        del tensor
        assert mapped() <= 1
    assert mapped() == 0


def test_tensors_that_no_model_reads_are_passed_over(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.position_ids": torch.arange(64),
        "model.layers.0.self_attn.mask": torch.ones(4, dtype=torch.bool),
    }
    save_file(load_file(file) | extra, file)
    reader = open_checkpoint(tmp_path)
    assert not set(extra) & set(reader.load())


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
def test_a_stored_head_that_differs_from_the_tied_embedding_is_kept(
    shard_size: str, tmp_path: Path
) -> None:
    original = tmp_path / "original"
    save_tiny_checkpoint(original, shard_size=shard_size)
    edit_config(tie_word_embeddings=True)(original)
    assert read_config(original).tie_word_embeddings
    reader = open_checkpoint(original)
    assert not reader.config.tie_word_embeddings
    assert "lm_head.weight" in reader.tensors

    config = LLAMA.compressed_config(reader.config, None)
    with CheckpointWriter(tmp_path / "output") as writer:
        writer.write_shard(reader.load())
        output = writer.commit(config)
    reloaded = AutoModelForCausalLM.from_pretrained(output)
    assert torch.equal(reloaded.lm_head.weight, reader.load("lm_head.")["weight"])
    assert not torch.equal(reloaded.lm_head.weight, reloaded.model.embed_tokens.weight)


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_stored_head_that_is_the_tied_embedding_is_dropped(value: float, tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    state["model.embed_tokens.weight"][0, 0] = value
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, file)
    reader = open_checkpoint(tmp_path)
    assert reader.config.tie_word_embeddings
    assert "lm_head.weight" not in reader.tensors


def test_a_head_of_another_type_than_the_tied_embedding_is_kept(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path, dtype=torch.bfloat16, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    # The same bytes, and other numbers.
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone().view(torch.float16)
    save_file(state, file)
    assert open_checkpoint(tmp_path).load("lm_head.")["weight"].dtype == torch.float16


@pytest.mark.parametrize("shard_size", ["50GB", "20KB"])
def test_a_base_model_is_read_if_its_head_is_tied(shard_size: str, tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    (tmp_path / "model.safetensors").unlink()
    model.model.save_pretrained(tmp_path, max_shard_size=shard_size)
    reader = open_checkpoint(tmp_path)
    expected = model.state_dict()
    del expected["lm_head.weight"]
    loaded = reader.load()
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert set(dict(reader.iter_tensors())) == set(expected)


def test_a_base_model_without_a_head_is_refused(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path).model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="a base model without a language-modelling head"):
        open_checkpoint(tmp_path)


def test_pickled_weights_are_read_only_where_allowed(tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    torch.save(load_file(file), tmp_path / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(UsageError, match=r"pickled weights only .*--allow-bin"):
        open_checkpoint(tmp_path)
    loaded = open_checkpoint(tmp_path, allow_bin=True).load("model.layers.2.")
    expected = model.model.layers[2].state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_sharded_and_old_pickles_are_read_too(tmp_path: Path) -> None:
    model = save_tiny_checkpoint(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number, chunk in enumerate((sorted(state)[::2], sorted(state)[1::2])):
        name = f"pytorch_model-{number}.bin"
        torch.save(
            {key: state[key] for key in chunk},
            tmp_path / name,
            _use_new_zipfile_serialization=number == 0,
        )
        weight_map |= dict.fromkeys(chunk, name)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    loaded = open_checkpoint(tmp_path, allow_bin=True).load()
    assert all(torch.equal(loaded[name], item) for name, item in model.state_dict().items())


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("made-by-a-pickle",))


def test_code_in_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"x": Malice()}, tmp_path / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"pytorch_model\.bin: expected a pickled state"):
        open_checkpoint(tmp_path, allow_bin=True)
    assert not (tmp_path / "made-by-a-pickle").exists()


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return edit


def edit_state(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return edit


def stored_as(dtype: torch.dtype) -> Callable[[Path], None]:
    name = "model.layers.1.mlp.down_proj.weight"
    return edit_state(lambda state: state.update({name: state[name].to(dtype)}))


def cut(size: int) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:size])

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not readable as JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "expected a JSON object"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (edit_config(model_type="mamba"), "mamba is not supported; supported: .*llama"),
        (edit_config(quantization_config={"quant_method": "awq"}), r"quantised \(awq\)"),
        (edit_config(model_type="lorap_llama"), "compressed already"),
        (edit_config(num_hidden_layers="three"), "not a usable configuration"),
        (edit_config(num_hidden_layers=4), r"model\.layers\.3\.self_attn\.\w+\.weight is missing"),
        (edit_config(intermediate_size=50), r"mlp.*has the shape .* expected \(50, 32\)"),
        (edit_state(lambda state: state.pop("model.norm.weight")), "norm.weight is missing"),
        (edit_state(lambda state: state.pop("lm_head.weight")), "lm_head.weight is missing"),
        (stored_as(torch.int8), r"down_proj\.weight is stored as I8"),
        (stored_as(torch.float8_e4m3fn), r"down_proj\.weight is stored as F8_E4M3"),
        (cut(4), "truncated"),
        (cut(400), "truncated"),
        (cut(-1), "truncated or damaged: expected .* bytes, got"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(bytes([2] + [0] * 7) + b"{?"),
            "header is damaged",
        ),
    ],
)
def test_a_model_that_cannot_be_used_is_refused(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    save_tiny_checkpoint(tmp_path)
    open_checkpoint(tmp_path)
    damage(tmp_path)
    with pytest.raises(UsageError, match=message):
        open_checkpoint(tmp_path)


def rename_shard(index: Path, shard: str, name: str) -> None:
    """Place the shard elsewhere in the index; the file there would do."""
    shutil.copy(index.parent / shard, index.parent.parent / shard)
    index.write_text(index.read_text().replace(f'"{shard}"', f'"{name}"'))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda index, first: (index.parent / first).unlink(), "names the shard .* is missing"),
        (lambda index, first: index.write_text("{}"), "expected a weight_map"),
        (lambda index, first: rename_shard(index, first, f"../{first}"), "got '../model-"),
        (lambda index, first: rename_shard(index, first, f"x/../../{first}"), "got 'x/../../mod"),
        (
            lambda index, first: rename_shard(index, first, str(index.parent / first)),
            "expected the names of files in its folder, got '/",
        ),
        (
            lambda index, first: index.write_text(
                index.read_text().replace('"weight_map": {', f'"weight_map": {{"x": "{first}",')
            ),
            "places x in .*, which does not hold it",
        ),
        (
            lambda index, first: (index.parent / first).write_bytes(
                (index.parent / first).read_bytes()[:-2]
            ),
            "truncated or damaged",
        ),
    ],
)
def test_damaged_shards_are_refused(
    edit: Callable[[Path, str], object], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    save_tiny_checkpoint(folder, shard_size="20KB")
    first = min(file.name for file in folder.glob("model-*.safetensors"))
    edit(folder / "model.safetensors.index.json", first)
    with pytest.raises(UsageError, match=message):
        open_checkpoint(folder)


def test_names_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match="expected a model folder, got a file"):
        open_checkpoint(file)
    with pytest.raises(UsageError, match="no such folder"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(UsageError, match="no such folder"):
        read_config("./absent")
    with pytest.raises(UsageError, match="revision belongs to a hub name"):
        open_checkpoint(tmp_path, revision="main")
    with pytest.raises(UsageError, match="neither a folder here nor a model on the hub"):
        open_checkpoint("not a name!")
    with pytest.raises(UsageError, match="no such folder"):
        fetch_tokenizer_files(tmp_path / "absent")
    with pytest.raises(UsageError, match="revision belongs to a hub name"):
        fetch_tokenizer_files(tmp_path, revision="main")
    with pytest.raises(UsageError, match="neither a folder here nor a model on the hub"):
        fetch_tokenizer_files("not a name!")


def hub_error(name: str) -> Exception:
    # The constructors ask for a response of the HTTP library, which differs between versions.
    kind: type[Exception] = getattr(errors, name)
    error = kind.__new__(kind)
    Exception.__init__(error, "refused")
    return error


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("GatedRepoError", UsageError, "owner/model is gated: accept its terms"),
        ("RepositoryNotFoundError", UsageError, "neither a folder here nor a model on the hub"),
        ("RevisionNotFoundError", UsageError, "owner/model has no revision v9"),
        ("LocalEntryNotFoundError", LorapError, "the hub cannot be reached"),
        ("HfHubHTTPError", LorapError, "the hub cannot be reached"),
    ],
)
def test_a_hub_name_that_cannot_be_had_is_refused(
    name: str, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise hub_error(name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(LorapError, match=message) as caught:
        open_checkpoint("owner/model", revision="v9")
    assert type(caught.value) is kind


def test_a_hub_model_is_fetched_in_steps_the_configuration_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, cache = tmp_path / "original", tmp_path / "cache"
    save_tiny_checkpoint(original)
    for other in (
        "consolidated.safetensors",
        "README.md",
        "additional_chat_templates/tool.jinja",
        "additional_chat_templates/old/tool.jinja",
        "tokenizer/other.json",
        "onnx/config.json",
    ):
        (original / other).parent.mkdir(exist_ok=True)
        (original / other).touch()
    cache.mkdir()
    on_hub = [str(file.relative_to(original)) for file in original.rglob("*") if file.is_file()]

    def download(
        name: str, *, revision: str, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        assert (name, revision) == ("owner/model", "v1")
        for file in filter_repo_objects(
            on_hub, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (cache / file).parent.mkdir(exist_ok=True)
            shutil.copy(original / file, cache / file)
        return str(cache)

    def fetched() -> set[str]:
        return {str(file.relative_to(cache)) for file in cache.rglob("*") if file.is_file()}

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert read_config("owner/model", revision="v1").num_hidden_layers == 3
    assert fetched() == {"config.json"}
    assert fetch_tokenizer_files("owner/model", revision="v1") == cache
    side = {
        "LICENSE.txt",
        "README.md",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert fetched() - {"special_tokens_map.json"} == side | {"config.json"}
    assert len(AutoTokenizer.from_pretrained(cache)) == 96
    reader = open_checkpoint("owner/model", revision="v1")
    assert reader.path == cache
    assert fetched() - {"special_tokens_map.json"} == side | {"config.json", "model.safetensors"}


def test_the_tokenizer_of_a_local_folder_is_where_it_is(tmp_path: Path) -> None:
    assert fetch_tokenizer_files(str(tmp_path)) == tmp_path
    assert names(tmp_path) == []


@pytest.mark.parametrize("link", ["tokenizer.model", "LICENSE", "additional_chat_templates"])
def test_links_out_of_a_local_folder_are_refused(link: str, tmp_path: Path) -> None:
    folder, secret = tmp_path / "model", tmp_path / "secret"
    save_tiny_checkpoint(folder)
    (folder / "NOTICE").symlink_to("LICENSE.txt")
    open_checkpoint(folder)
    secret.mkdir()
    (secret / "key.jinja").write_text("secret")
    (folder / link).symlink_to(secret if link.startswith("add") else secret / "key.jinja")
    with pytest.raises(UsageError, match=rf"{link}.* leads out of its folder, to .*key"):
        open_checkpoint(folder)
    with CheckpointWriter(tmp_path / "output") as writer:
        with pytest.raises(UsageError, match="leads out of its folder"):
            writer.copy_side_files(folder)
        assert not any("secret" in file.read_text() for file in writer.folder.rglob("*.jinja"))


def test_the_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--model"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abcd"
    save_tiny_checkpoint(blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    reader = open_checkpoint(snapshot)
    with CheckpointWriter(tmp_path / "output") as writer:
        writer.copy_side_files(reader.path)
        copied = writer.folder / "LICENSE.txt"
        assert not copied.is_symlink()
        assert copied.read_bytes() == (blobs / "LICENSE.txt").read_bytes()
    (snapshot / "NOTICE").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("secret")
    with pytest.raises(UsageError, match="NOTICE leads out of its folder"):
        open_checkpoint(snapshot)


# Writing


def compressed(seed: int = 0, **overrides: Any) -> Any:
    config = LLAMA.compressed_config(tiny_config(**overrides), tiny_structure())
    model: Any = LLAMA.model_class(config)
    randomise_(model, seed)
    return model.eval()


def stored_state(model: Any) -> dict[str, torch.Tensor]:
    shapes = LLAMA.tensor_shapes(model.config)
    return {name: item for name, item in model.state_dict().items() if name in shapes}


def write(model: Any, output: Path, *, shards: int = 1, **options: Any) -> Path:
    state = stored_state(model)
    names = list(state)
    with CheckpointWriter(output, **options) as writer:
        for start in range(shards):
            writer.write_shard({name: state[name] for name in names[start::shards]})
        writer.write_json(REPORT, {"ratio": 0.2})
        return writer.commit(model.config)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("variant", ["plain", "tied", "biased"])
def test_a_written_checkpoint_loads_exactly(variant: str, shards: int, tmp_path: Path) -> None:
    model = compressed(**VARIANTS[variant])
    output = write(model, tmp_path / "deep" / "output", shards=shards)
    assert output == tmp_path / "deep" / "output"
    assert names(output.parent) == ["output"]
    weights = sorted(file.name for file in output.glob("*.safetensors"))
    if shards == 1:
        assert weights == ["model.safetensors"]
        assert not (output / "model.safetensors.index.json").exists()
    else:
        assert weights == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
        index = json.loads((output / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(stored_state(model))
        size = sum(item.nbytes for item in stored_state(model).values())
        assert index["metadata"]["total_size"] == size
    with safe_open(output / weights[0], framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    reloaded = AutoModelForCausalLM.from_pretrained(output)
    with torch.no_grad():
        assert torch.equal(reloaded(token_ids()).logits, model(token_ids()).logits)
    written = json.loads((output / "config.json").read_text())
    assert written["architectures"] == ["LorapLlamaForCausalLM"]
    assert written["dtype"] == "float32"
    assert model.config.architectures is None
    with pytest.raises(UsageError, match="compressed already"):
        open_checkpoint(output)


def test_others_may_read_what_was_written(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        output = write(compressed(), tmp_path / "output")
    finally:
        os.umask(before)
    assert stat.S_IMODE(output.stat().st_mode) == 0o755
    assert {stat.S_IMODE(file.stat().st_mode) for file in output.iterdir()} == {0o644}


def test_side_files_are_carried_over_unchanged(tmp_path: Path) -> None:
    source = tmp_path / "source"
    original = save_tiny_checkpoint(source)
    (source / "USE_POLICY.md").write_text("policy")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (source / "README.md").write_text("the card of another model")
    model = compressed()
    with CheckpointWriter(tmp_path / "output") as writer:
        writer.copy_side_files(source)
        writer.write_shard(stored_state(model))
        output = writer.commit(model.config)
    carried = {
        str(file.relative_to(output))
        for file in output.rglob("*")
        if file.is_file() and (source / file.relative_to(output)).is_file()
    } - {"config.json", "model.safetensors"}
    assert carried >= {
        "LICENSE.txt",
        "USE_POLICY.md",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "README.md" not in carried
    for name in carried:
        assert (output / name).read_bytes() == (source / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer("w3 w90")["input_ids"] == [6, 93]
    messages = [{"role": "user", "content": "w5"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False).strip() == "w5"
    assert original.config.vocab_size == len(tokenizer)


class Interruption(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Interruption])
def test_an_error_leaves_nothing_behind(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        with CheckpointWriter(tmp_path / "output") as writer:
            writer.write_shard(stored_state(compressed()))
            assert writer.folder.parent == tmp_path
            assert not writer.output.exists()
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == []


def test_leaving_without_a_commit_leaves_nothing_behind(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "output") as writer:
        writer.write_text("note.txt", "x")
    assert names(tmp_path) == []


def test_an_incomplete_or_wrong_checkpoint_is_not_committed(tmp_path: Path) -> None:
    model = compressed()
    name = "model.layers.0.self_attn.q_proj.left.weight"
    missing = {key: value for key, value in stored_state(model).items() if key != name}
    for state, message in (
        (missing, f"{name} was not written"),
        (missing | {name: torch.zeros(32, 6)}, r"the shape \(32, 6\), expected \(32, 5\)"),
        (stored_state(model) | {"model.extra": torch.zeros(1)}, r"no place for model\.extra"),
    ):
        with CheckpointWriter(tmp_path / "output") as writer:
            writer.write_shard(state)
            with pytest.raises(LorapError, match=message):
                writer.commit(model.config)
    assert names(tmp_path) == []


def test_a_tensor_is_written_once(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "output") as writer:
        writer.write_shard({"a": torch.zeros(1), "b": torch.zeros(1)})
        with pytest.raises(ValueError, match="written twice: b"):
            writer.write_shard({"b": torch.zeros(1), "c": torch.zeros(1)})
        with pytest.raises(ValueError, match="at least one tensor"):
            writer.write_shard({})


def test_nan_in_a_report_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="JSON"),
        CheckpointWriter(tmp_path / "output") as writer,
    ):
        writer.write_json(REPORT, {"ratio": float("nan")})


def test_an_existing_output_is_replaced_only_if_asked_and_ours(tmp_path: Path) -> None:
    output = tmp_path / "output"
    write(compressed(seed=1), output, shards=2)
    with pytest.raises(UsageError, match="exists already; --overwrite"):
        CheckpointWriter(output)
    model = compressed(seed=2)
    write(model, output, overwrite=True)
    assert not (output / "model.safetensors.index.json").exists()
    assert names(tmp_path) == ["output"]
    reloaded = AutoModelForCausalLM.from_pretrained(output)
    assert torch.equal(reloaded.lm_head.weight, model.lm_head.weight)
    (output / REPORT).unlink()
    with pytest.raises(UsageError, match="neither empty nor a checkpoint of lorap"):
        CheckpointWriter(output, overwrite=True)
    assert (output / "config.json").exists()


def foreign_folder(folder: Path) -> None:
    save_tiny_checkpoint(folder / "original")


@pytest.mark.parametrize(
    ("add", "named"),
    [
        (lambda folder: (folder / "notes.txt").touch(), "notes.txt"),
        (lambda folder: (folder / ".hidden").touch(), ".hidden"),
        (foreign_folder, "original/"),
        (lambda folder: (folder / "empty").mkdir(), "empty/"),
        (lambda folder: (folder / "LICENSES").mkdir(), "LICENSES/"),
        (lambda folder: (folder / "model-mine.safetensors").touch(), "model-mine.safetensors"),
        (lambda folder: (folder / "LICENSE").symlink_to("config.json"), "LICENSE"),
        (lambda folder: (folder / "tokenizer.model").symlink_to("/", True), "tokenizer.model"),
        (
            lambda folder: (folder / "additional_chat_templates" / "x.txt").touch(),
            "additional_chat_templates/x.txt",
        ),
        (
            lambda folder: (folder / "additional_chat_templates" / "x.jinja").mkdir(),
            "additional_chat_templates/x.jinja/",
        ),
        (
            lambda folder: [(folder / f"n{number}").touch() for number in range(5)],
            "n0, n1, n2 and 2 more",
        ),
    ],
)
def test_what_lorap_did_not_write_is_never_deleted(
    add: Callable[[Path], object], named: str, tmp_path: Path
) -> None:
    output, source = tmp_path / "output", tmp_path / "source"
    save_tiny_checkpoint(source)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").touch()
    model = compressed()

    def run(meanwhile: Callable[[], object] = lambda: None) -> None:
        with CheckpointWriter(output, overwrite=True) as writer:
            writer.copy_side_files(source)
            writer.write_shard(stored_state(model))
            writer.write_text("README.md", "card")
            writer.write_text(REPORT_PAGE, "page")
            for name in (REPORT, "lorap_calibration.safetensors", "lorap_statistics.safetensors"):
                writer.write_json(name, {})
            meanwhile()
            writer.commit(model.config)

    run()
    run()
    entries = {file: file.stat().st_mtime_ns for file in output.rglob("*")}
    # Both when the run starts and, a second time, when it ends.
    with pytest.raises(UsageError, match=f"lorap did not write {named} there"):
        run(lambda: add(output))
    with pytest.raises(UsageError, match=f"lorap did not write {named} there"):
        check_output(output, overwrite=True)
    assert names(tmp_path) in (["output", "source"], ["source", "output"])
    assert all(file.stat().st_mtime_ns == time or file.is_dir() for file, time in entries.items())
    assert set(entries) < set(output.rglob("*"))


def test_an_original_that_holds_a_report_is_not_replaced(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path)
    (tmp_path / "LICENSE.txt").unlink()
    (tmp_path / REPORT).write_text("{}")
    with pytest.raises(UsageError, match=r"nor a checkpoint of lorap \(expected a lorap_report"):
        check_output(tmp_path, overwrite=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="nor a checkpoint of lorap"):
        check_output(tmp_path, overwrite=True)


def test_an_output_that_holds_an_input_is_refused(tmp_path: Path) -> None:
    output = write(compressed(), tmp_path / "output")
    (tmp_path / "link").symlink_to(output)
    for given in (
        output,
        output / "lorap_report.json",
        tmp_path / "link" / "lorap_report.json",
        tmp_path / "x" / ".." / "output" / "model",
    ):
        with pytest.raises(UsageError, match=r"output is not replaced: .*, which is read"):
            check_output(output, overwrite=True, inputs=[tmp_path / "other", given])
    beside = [tmp_path, tmp_path / "output2", tmp_path / "output.jsonl"]
    assert check_output(output, overwrite=True, inputs=beside) == output


def test_a_name_as_long_as_names_may_be_is_written_and_a_longer_one_refused(
    tmp_path: Path,
) -> None:
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    output = tmp_path / ("x" * longest)
    write(compressed(), output)
    assert write(compressed(), output, overwrite=True) == output
    assert names(tmp_path) == [output.name]
    with pytest.raises(UsageError, match=r"cannot be written: .*File name too long"):
        check_output(tmp_path / ("x" * (longest + 1)))
    with pytest.raises(UsageError, match=r"cannot be written: .*File name too long"):
        check_output(tmp_path / ("x" * (longest + 1)) / "output")


def test_an_empty_folder_is_replaced_if_asked(tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    with pytest.raises(UsageError, match="exists already"):
        check_output(output)
    assert (write(compressed(), output, overwrite=True) / "config.json").exists()


def test_a_failed_replacement_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "output"
    write(compressed(seed=1), output)
    before = (output / "model.safetensors").read_bytes()
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise PermissionError(f"no renaming of {self}")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(PermissionError, match="no renaming"):
        write(compressed(seed=2), output, overwrite=True)
    monkeypatch.undo()
    assert names(tmp_path) == ["output"]
    assert (output / "model.safetensors").read_bytes() == before


def test_an_output_made_meanwhile_is_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "output"
    model = compressed()
    with CheckpointWriter(output) as writer:
        writer.write_shard(stored_state(model))
        output.mkdir()
        with pytest.raises(UsageError, match="exists already"):
            writer.commit(model.config)
    assert names(tmp_path) == ["output"]
    assert names(output) == []


def test_an_output_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match="expected a folder, got a file"):
        check_output(file)
    with pytest.raises(UsageError, match="cannot be written"):
        check_output(file / "output")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lorap.checkpoint.writer.tempfile.TemporaryDirectory", refuse)
    with pytest.raises(UsageError, match=r"cannot be written: .*Permission denied"):
        check_output(tmp_path / "output")
    assert names(tmp_path) == ["file"]


def test_too_little_disk_space_is_refused(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(UsageError, match=r"needs \d+\.\d\d GiB of disk space"):
        check_output(tmp_path / "a" / "output", needed_bytes=2 * free)
    assert check_output(tmp_path / "a" / "output", needed_bytes=1) == tmp_path / "a" / "output"
    assert names(tmp_path) == []


# The model card

SAMPLE_REPORT = {
    "model": "owner/model",
    "ratio": 0.2,
    "ratio_scope": "model",
    "layer_ratio": 0.2081,
    "achieved_ratio": 0.1999,
    "parameters": {"before": 6738415616, "after": 5391000000},
    "settings": CompressionConfig().to_dict(),
    "calibration": {"source": "c4", "samples": 128, "seqlen": 128, "fingerprint": "ab12"},
    "versions": {"lorap": "0.1.0", "torch": "2.13.0"},
    "command": "lorap compress owner/model --ratio 0.2 --output 'my dir'",
}


def test_the_card_says_what_was_done_and_how_to_load_it(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: llama2\ntags: [x]\n---\n# Model\n---\n")
    card = model_card(SAMPLE_REPORT, name="small", original=tmp_path)
    _, front, body = card.split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["license"] == "llama2"
    assert values["base_model"] == "owner/model"
    assert values["library_name"] == "transformers"
    assert "lorap" in values["tags"]
    assert "x" not in values["tags"]
    for text in (
        "# small",
        "20.00% of all parameters",
        "19.99%",
        "5,391,000,000 of 6,738,415,616",
        "import lorap",
        'from_pretrained("path/to/small", dtype="auto")',
        'from_pretrained(..., dtype="auto", trust_remote_code=True)',
        "owner/model, made smaller",
        "lorap compress owner/model --ratio 0.2 --output 'my dir'",
        "ab12",
        "torch 2.13.0",
    ):
        assert text in body


@pytest.mark.parametrize(
    ("settings", "sentences"),
    [
        ({}, ["two thin matrices (activation-weighted SVD)", "channels (scored by activation)"]),
        ({"mha": "heads", "importance": "taylor"}, ["attention heads (scored by taylor)"]),
        ({"mha": "pca", "joint_qk": True}, ["q and k with a common one (PCA of the outputs)"]),
        ({"ffn": "afm", "sublayers": "ffn"}, ["feed-forward projections are products", "(AFM)"]),
    ],
)
def test_the_card_names_the_methods(settings: dict[str, Any], sentences: list[str]) -> None:
    report = SAMPLE_REPORT | {"settings": CompressionConfig(**settings).to_dict()}
    card = model_card(report, name="small")
    for sentence in sentences:
        assert sentence in card
    assert ("attention" in card) == ("mha" in report["settings"]["sublayers"])


def test_the_card_of_a_local_original_does_not_name_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parent" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for given in (tmp_path / "parent" / "llama", "parent/llama", "./parent/llama/"):
        card = model_card(SAMPLE_REPORT | {"model": str(given)}, name="small")
        _, front, body = card.split("---\n", 2)
        assert "base_model" not in yaml.safe_load(front)
        assert "\nllama, made smaller" in body
        assert "parent" not in card


@pytest.mark.parametrize("text", [None, "# no front matter", "---\n: [\n---\n", "---\nx\n---\n"])
def test_a_card_without_usable_front_matter_gives_no_licence(
    text: str | None, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    card = model_card(SAMPLE_REPORT, name="small", original=tmp_path)
    assert "license" not in yaml.safe_load(card.split("---\n", 2)[1])


def test_folders_made_for_a_run_that_fails_are_removed(tmp_path: Path) -> None:
    def run() -> None:
        with CheckpointWriter(tmp_path / "a" / "b" / "output") as writer:
            writer.write_shard({"x": torch.ones(2)})
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run()
    assert list(tmp_path.iterdir()) == []
