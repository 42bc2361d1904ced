"""What the README shows works: its recipe, its command lines, its Python, its tables."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import transformers
from typer.main import get_command

from lorap.cli import app
from lorap.config import CompressionConfig, load_recipe
from lorap.data import NAMED_SOURCES
from lorap.families import family_of
from lorap.plan import make_plan
from lorap.recovery import RecoveryConfig
from lorap.recovery.layers import lora_config
from tests.tiny_models import save_tiny_checkpoint

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
LINES = [
    line.split("#")[0].strip()
    for kind, block in BLOCKS
    if kind == "sh"
    for line in block.split("\n")
]


def blocks(kind: str) -> list[str]:
    return [block for name, block in BLOCKS if name == kind]


def test_the_two_commands_come_first() -> None:
    first = next(block for kind, block in BLOCKS if kind == "sh")
    assert [line.split()[:2] for line in first.splitlines()] == [["make", "demo"], ["make", "test"]]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^`{0,1}make ([a-z-]+)", text, flags=re.MULTILINE))
    assert {"demo", "test", "test-full"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("lorap ")])
def test_command_lines_are_understood(line: str) -> None:
    _, command, *words = shlex.split(line)
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    with commands[command].make_context(command, words) as context:
        assert context.params.get("model") or context.params.get("folders")


def test_options_named_in_the_text_exist() -> None:
    commands: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    known = {
        option for command in commands.values() for p in command.params for option in p.opts
    } | {"--help"}
    named = set(re.findall(r"`(--[a-z-]+)", README))
    assert len(named) > 5
    assert named <= known


def test_the_recipe_fits_llama_7b(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    recipe = load_recipe(file)
    assert (recipe.run["calibration"], recipe.run["output"]) == ("c4", "llama-20")
    model = transformers.LlamaConfig()
    plan = make_plan(model, family_of(model), CompressionConfig(**recipe.settings))
    assert all(m.kind == "dense" for layer in plan.layers[:4] for m in layer.values())
    assert plan.layers[12]["self_attn.q_proj"].rank == 1024
    assert plan.layers[4]["self_attn.q_proj"].rank != 1024
    assert plan.layers[30]["mlp"].width == 8192
    assert plan.layers[31]["mlp"].parameters / plan.layers[31]["mlp"].parameters_before > 0.89
    assert plan.achieved_ratio == pytest.approx(0.2, abs=1e-3)


def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_checkpoint(tmp_path / "path/to/llama", max_position_embeddings=128)
    np.save("ids.npy", np.random.default_rng(0).integers(3, 96, (2, 128)))
    Path("calibration.txt").write_text(" ".join(f"w{i % 90}" for i in range(400)))
    examples = blocks("python")
    # The examples that load the result stand before the one that makes it.
    examples.sort(key=lambda code: '"llama-20"' in code and "compress_checkpoint" not in code)
    examples.sort(key=lambda code: "llama-20-adapter" in code)
    assert sum('"llama-20"' in code for code in examples) == 5
    scopes: list[dict[str, Any]] = [{} for _ in examples]
    for code, scope in zip(examples, scopes, strict=True):
        if "llama-20-adapter" in code:
            model = transformers.AutoModelForCausalLM.from_pretrained("llama-20")
            adapted = peft.get_peft_model(model, lora_config(model, RecoveryConfig()))
            adapted.save_pretrained("llama-20-adapter")
        exec(compile(code, "README.md", "exec"), scope)
    assert abs(scopes[0]["report"]["achieved_ratio"] - 0.2) < 0.02
    assert scopes[1]["smaller"].num_parameters() < scopes[1]["model"].num_parameters()
    size = scopes[0]["report"]["parameters"]["after"]
    assert len(scopes) == 6
    assert [scope["model"].num_parameters() for scope in scopes[2:5]] == [size] * 3
    assert Path("llama-20-int8/model.safetensors").is_file()
    assert isinstance(scopes[5]["model"], peft.PeftModel)
    # A and B of rank 8: of each projection, the widths of its input and its output.
    projections = [(32, 32)] * 4 + [(32, scopes[5]["model"].base_model.model.config.width(0))] * 3
    updates = scopes[5]["model"].num_parameters() - size
    assert updates == 3 * 8 * sum(map(sum, projections))


def test_the_table_of_sources_is_the_code_s() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", README, flags=re.MULTILINE))
    assert rows.keys() == NAMED_SOURCES.keys()
    for name, named in NAMED_SOURCES.items():
        hub = named.calibration
        for value in (hub.path, hub.config, hub.data_file, hub.revision, hub.split, hub.field):
            assert value is None or f"`{value}`" in rows[name]
        if named.evaluation is None:
            assert f"`{name}` has none" in README
    assert f"`wikitext2` for `{NAMED_SOURCES['wikitext2'].evaluation.split}`" in README  # type: ignore[union-attr]
    assert f"`ptb` for `{NAMED_SOURCES['ptb'].evaluation.split}`" in README  # type: ignore[union-attr]
    assert NAMED_SOURCES["c4"].evaluation.split == "validation[:1100]"  # type: ignore[union-attr]


def test_links_folders_and_rules_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for cell in re.findall(
        r"^\| (`[^|]*/[^|]*`) \|", README.partition("## Layout")[2], re.MULTILINE
    ):
        for path in re.findall(r"`([^`]+)`", cell):
            assert (ROOT / path).exists(), path
    rules = re.findall(r"^### `([a-z.-]+)`", (ROOT / "SPEC.md").read_text("utf-8"), re.MULTILINE)
    named = re.findall(r"`((?:budget|awsvd|prune)\.[a-z.-]+)`", README)
    assert len(named) >= 3
    assert set(named) <= set(rules)
