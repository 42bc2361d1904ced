"""Recovery: examples and their masks, the schedule, the training, and going on after a break."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import lorap
from lorap import LorapError, RecoveryConfig, UsageError
from lorap.data.instructions import Instruction
from lorap.errors import Interrupted
from lorap.recovery import curve, training
from lorap.recovery.examples import IGNORED, TrainingData, labels, load_examples
from lorap.recovery.layers import lora_config, target_modules
from lorap.recovery.run import Run
from lorap.recovery.settings import held_out, schedule
from lorap.recovery.trainer import losses_of_rows, mean_loss, mean_since_evaluation, padded
from tests.tiny_models import save_tiny_checkpoint, tiny_tokenizer

# --- examples -------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} stop {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def word_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words given, split at white space and at punctuation."""
    names = ["<unk>", "<s>", "</s>", *words]
    model = models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def examples_of(
    folder: Path, rows: list[Any], tokenizer: Any = None, **options: Any
) -> TrainingData:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {"cutoff": 256, "validation": 0, "seed": 0, "vocab_size": 96}
    return load_examples(
        str(file), tokenizer=lambda: tokenizer or tiny_tokenizer(), **(values | options)
    )


def decoded(data: TrainingData, tokenizer: Any) -> list[tuple[str, str]]:
    """Return of each example all of its words, and those that count."""
    return [
        tuple(
            " ".join(tokenizer.convert_ids_to_tokens(ids))
            for ids in (example.ids, example.ids[example.counts])
        )
        for example in data.training
    ]


@pytest.mark.spec("recovery.labels", "recovery.prompt")
def test_the_response_counts_and_the_prompt_does_not(tmp_path: Path) -> None:
    tokenizer = word_tokenizer("Response", "Input", "two", "three", "five", "add")
    rows = [
        {"instruction": "add", "input": "two three", "output": "five"},
        {"instruction": "two", "output": "three three"},
        {"instruction": "two", "input": "", "output": "add"},
        {"instruction": "two", "input": None, "output": "add"},
    ]
    data = examples_of(tmp_path, rows, tokenizer)
    assert data.kind == "instructions"
    found = sorted(counted for _, counted in decoded(data, tokenizer))
    assert found == ["add </s>", "add </s>", "five </s>", "three three </s>"]
    (row,) = [text for text, counted in decoded(data, tokenizer) if counted == "five </s>"]
    assert row.split("add")[1].replace("<unk>", "").split() == [
        "Input", "two", "three", "Response", "five", "</s>",
    ]  # fmt: skip


@pytest.mark.spec("recovery.prompt")
def test_the_prompt_is_that_of_alpaca() -> None:
    with_input = Instruction("Add.", "1 2", "3").text()
    assert with_input.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3")
    assert with_input.startswith("Below is an instruction that describes a task, paired with an ")
    without = Instruction("Add.", "", "3")
    assert without.text() == without.prompt() + "3"
    assert without.prompt() == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n"
    )


@pytest.mark.spec("recovery.labels")
def test_a_token_that_joins_prompt_and_response_counts(tmp_path: Path) -> None:
    tokenizer = word_tokenizer("five", "Response")
    # One token for the line break and the word after it, as byte-pair encodings make them.
    tokenizer.add_tokens([AddedToken("\nfive", normalized=False)])
    data = examples_of(tmp_path, [{"instruction": "two", "output": "five"}], tokenizer)
    (example,) = data.training
    assert tokenizer.convert_ids_to_tokens(example.ids[example.counts]) == ["\nfive", "</s>"]


@pytest.mark.spec("recovery.labels")
def test_the_assistant_counts_in_a_conversation(tmp_path: Path) -> None:
    tokenizer = word_tokenizer("user", "assistant", "stop", "hi", "there", "more", "enough")
    turns = [("user", "hi"), ("assistant", "there"), ("user", "more"), ("assistant", "enough")]
    messages = [{"role": role, "content": content} for role, content in turns]
    data = examples_of(tmp_path, [{"messages": messages}], tokenizer)
    assert data.kind == "messages"
    whole = "user hi stop assistant there stop user more stop assistant enough stop"
    assert decoded(data, tokenizer) == [(whole, "there stop enough stop")]


@pytest.mark.spec("recovery.labels")
def test_a_template_that_hides_the_assistant(tmp_path: Path) -> None:
    tokenizer = word_tokenizer("hi", "there")
    tokenizer.chat_template = (
        "{% for m in messages[::-1] %}{{ m['content'] }} {% endfor %}"  # the last one first
    )
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
    data = examples_of(tmp_path, [{"messages": messages}], tokenizer)
    assert decoded(data, tokenizer) == [("there hi", "there hi")]
    assert data.tally.all_counts == 1
    assert any("in 1 conversations all tokens count" in line for line in training.notes(data))


@pytest.mark.spec("recovery.labels")
def test_text_goes_on_in_another_example_and_a_response_is_cut(tmp_path: Path) -> None:
    words = " ".join(f"w{index}" for index in range(7))
    data = examples_of(tmp_path, [{"text": words}], cutoff=3)
    assert [len(example.ids) for example in data.training] == [3, 3]  # the seventh has no context
    assert all(example.counts.all() for example in data.training)
    assert data.tally.cut == 1
    tokenizer = word_tokenizer("two", "five")
    long = {"instruction": "two", "output": "five " * 400}
    (example,) = examples_of(tmp_path, [long], tokenizer, cutoff=100).training
    assert len(example.ids) == 100
    assert example.ids[-1] == tokenizer.convert_tokens_to_ids("five")
    with pytest.raises(UsageError, match="1 have no token to predict within 20 tokens"):
        examples_of(tmp_path, [long], tokenizer, cutoff=20)


@pytest.mark.spec("recovery.labels")
def test_a_batch_is_padded_on_the_right_and_padding_does_not_count() -> None:
    rows = [
        {"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([IGNORED, 6])},
        {"input_ids": torch.tensor([7, 8, 9]), "labels": torch.tensor([7, 8, 9])},
    ]
    batch = padded(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, IGNORED], [7, 8, 9]]


@pytest.mark.spec("recovery.split")
def test_the_split_is_by_the_seed_and_takes_a_tenth_at_most(tmp_path: Path) -> None:
    assert [held_out(rows, 2000) for rows in (9, 10, 99, 19_999, 20_000, 51_760)] == [
        0, 1, 9, 1999, 2000, 2000,
    ]  # fmt: skip
    rows = [{"text": f"w{n} w{n + 1}"} for n in range(40)]

    def firsts(examples: list[Any]) -> list[int]:
        return [int(example.ids[0]) for example in examples]

    one, same, other = (examples_of(tmp_path, rows, validation=3, seed=seed) for seed in (1, 1, 2))
    assert len(one.validation) == 3
    assert firsts(one.validation) == firsts(same.validation) != firsts(other.validation)
    assert sorted(firsts(one.validation) + firsts(one.training)) == sorted(
        firsts(other.validation) + firsts(other.training)
    )
    assert one.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.spec("recovery.schedule")
@pytest.mark.parametrize(
    ("options", "samples", "processes", "expected"),
    [
        # (steps, warm-up, evaluations, checkpoints, accumulation)
        ({}, 49_760, 1, (1556, 100, 100, 200, 16)),
        ({}, 49_760, 4, (1556, 100, 100, 200, 4)),
        ({}, 900, 1, (30, 3, 8, 8, 16)),
        ({"batch": 4, "epochs": 1}, 5, 1, (2, 0, 1, 1, 1)),
        ({"batch": 8, "micro_batch": 8, "epochs": 0.5}, 64, 1, (4, 0, 1, 1, 1)),
    ],
)
def test_schedule(
    options: dict[str, Any], samples: int, processes: int, expected: tuple[int, ...]
) -> None:
    found = schedule(RecoveryConfig(**options), samples, processes)
    assert (
        found.steps,
        found.warmup,
        found.evaluate_every,
        found.save_every,
        found.accumulation,
    ) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank: expected a whole number of at least 1"),
        ({"alpha": 0}, "alpha: expected more than 0"),
        ({"alpha": math.nan}, "alpha: expected a number"),
        ({"dropout": 1.0}, "dropout: expected a share of at least 0 and below 1"),
        ({"epochs": -1}, "epochs: expected more than 0"),
        ({"on": "heads"}, "on: expected one of matrices, factors"),
        ({"dtype": "float64"}, "dtype: expected float32, bfloat16 or float16"),
        ({"cutoff": 1}, "cutoff: expected a whole number of at least 2"),
        ({"device": "tpu"}, "device: expected one of"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RecoveryConfig(**options)


def test_a_batch_that_cannot_be_shared_out() -> None:
    with pytest.raises(UsageError, match=r"expected a multiple of the 4 samples of a micro-batch$"):
        schedule(RecoveryConfig(batch=6), 100)
    with pytest.raises(UsageError, match="micro-batch in each of 3 processes"):
        schedule(RecoveryConfig(), 100, 3)


@pytest.mark.spec("recovery.best")
def test_the_validation_loss_is_a_mean_over_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator)
    label = torch.tensor([[0, 1, 2, 3, 4], [IGNORED, IGNORED, 2, IGNORED, 1], [IGNORED] * 5])
    found = losses_of_rows(logits, label)
    assert found[:, 1].tolist() == [4, 2, 0]
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), label[:, 1:].flatten(), ignore_index=IGNORED
    )
    evaluated: Any = type("Evaluated", (), {"predictions": found.numpy()})
    assert mean_loss(evaluated)["nll"] == pytest.approx(float(expected), rel=1e-6)
    history = [{"eval_nll": 9.0}, {"loss": 4.0}, {"eval_nll": 3.0}, {"loss": 1.0}, {"loss": 2.0}]
    assert mean_since_evaluation([*history, {"eval_nll": 1.0}]) == 1.5
    assert math.isnan(mean_since_evaluation([{"eval_nll": 9.0}]))


@pytest.mark.spec("recovery.precision")
def test_a_cpu_does_not_train_in_fp16() -> None:
    cpu = torch.device("cpu")
    assert training.training_dtype(RecoveryConfig(), cpu) == torch.float32
    assert training.training_dtype(RecoveryConfig(dtype="bfloat16"), cpu) == torch.bfloat16
    with pytest.raises(UsageError, match="dtype float16: on a CPU expected float32 or bfloat16"):
        training.training_dtype(RecoveryConfig(dtype="float16"), cpu)


def test_curves() -> None:
    assert curve.sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert curve.sparkline([1.0, 1.0]) == "▁▁"
    assert len(curve.sparkline(list(range(1000)))) == 40
    picture = curve.svg([(1, 2.0), (2, 1.5)], [(0, 2.5), (2, 1.0)])
    assert picture.count("<polyline") == 2
    assert picture.startswith("<svg")
    assert curve.svg([(1, 1.0)], []).count("<polyline") == 1


# --- training -------------------------------------------------------------------------------------

QUICK = RecoveryConfig(
    rank=4,
    alpha=8,
    learning_rate=1e-2,
    batch=4,
    micro_batch=2,
    epochs=1,
    device="cpu",
    evaluate_every=3,
    save_every=2,
    cutoff=16,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a compressed model, and text in which one word follows another."""
    folder = tmp_path_factory.mktemp("recovery")
    save_tiny_checkpoint(folder / "model", num_key_value_heads=2)
    rng = np.random.default_rng(0)
    np.save(folder / "ids.npy", rng.integers(3, 96, (4, 16)))
    config = lorap.CompressionConfig(
        ratio=0.5, samples=4, seqlen=16, device="cpu", joint_qk=True, mha="afm"
    )
    lorap.compress_checkpoint(
        folder / "model", folder / "small", config, calibration=str(folder / "ids.npy")
    )
    starts = rng.integers(0, 80, 44)
    lines = (" ".join(f"w{start + step}" for step in range(12)) for start in starts)
    (folder / "data.txt").write_text("\n".join(lines))
    return folder


def recover(
    place: Path, output: Path, config: RecoveryConfig = QUICK, **options: Any
) -> dict[str, Any]:
    values = {"data": str(place / "data.txt")} | options
    return lorap.recover(place / "small", output, config, **values)


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, Any]:
    """Return the record of a run without a break, in ``place/adapter``."""
    return recover(place, place / "adapter")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.spec("recovery.best", "recovery.schedule", "lora.factored")
def test_training_lowers_the_loss_and_leaves_the_model(place: Path, whole: dict[str, Any]) -> None:
    files = {path.name for path in (place / "adapter").iterdir()}
    assert files == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorap_recovery.json",
        "loss.svg",
        "README.md",
    }
    assert json.loads((place / "adapter" / "lorap_recovery.json").read_text()) == json.loads(
        json.dumps(whole)
    )
    loss = whole["loss"]
    assert loss["best"] < loss["before"] - 0.2
    assert [step for step, _ in loss["training"]] == list(range(1, 11))
    assert [step for step, _ in loss["validation"]] == [0, 3, 6, 9, 10][: len(loss["validation"])]
    assert loss["best"] == min(value for _, value in loss["validation"])
    assert whole["data"]["validation"] == 4
    assert not (place / "adapter.unfinished").exists()
    # Dropout aside, the first evaluation is the compressed model's.
    data = load_examples(
        str(place / "data.txt"),
        tokenizer=tiny_tokenizer,
        vocab_size=96,
        cutoff=QUICK.cutoff,
        validation=QUICK.validation,
        seed=QUICK.seed,
    )
    sums = np.zeros(2)
    model = load(place / "small")
    for example, label in zip(data.validation, labels(data.validation), strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(example.ids[None]).long()).logits
        sums += losses_of_rows(logits, torch.tensor(label[None])).numpy()[0]
    assert loss["before"] == pytest.approx(sums[0] / sums[1], rel=1e-5)


def test_the_adapter_loads_with_peft_and_is_the_best_one(
    place: Path, whole: dict[str, Any]
) -> None:
    model = PeftModel.from_pretrained(load(place / "small"), place / "adapter").eval()
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    tensors = load_file(place / "adapter" / "adapter_model.safetensors")
    assert len(names) == len(tensors) == 2 * 3 * 7
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    lorap.merge_adapter(place / "small", place / "adapter", place / "merged", overwrite=True)
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = model(input_ids=ids).logits, load(place / "merged")(input_ids=ids).logits
    assert torch.allclose(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.spec("recovery.schedule")
def test_the_loss_of_a_step_does_not_depend_on_the_micro_batch(place: Path, tmp_path: Path) -> None:
    rows = [" ".join(f"w{n + k}" for k in range(2 + n % 9)) for n in range(20)]
    (tmp_path / "uneven.txt").write_text("\n".join(rows))
    config = replace(QUICK, dropout=0.0, validation=0)
    curves = [
        recover(
            place,
            tmp_path / f"by-{micro}",
            replace(config, micro_batch=micro),
            data=str(tmp_path / "uneven.txt"),
        )["loss"]["training"]
        for micro in (1, 4)
    ]
    assert np.allclose(*curves, rtol=1e-4)


def test_updates_on_factors_need_no_lorap(place: Path, tmp_path: Path) -> None:
    record = recover(place, tmp_path / "adapter", replace(QUICK, on="factors", epochs=0.3))
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("q_proj.left.lora_A" in name for name in names)
    assert any("qk_right.lora_A" in name for name in names)
    assert record["settings"]["on"] == "factors"
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "PEFT knows by itself" in card
    merged = lorap.merge_adapter(place / "small", tmp_path / "adapter", tmp_path / "merged")
    sizes = merged["recovery"]["merge"]["parameters"]
    assert sizes["before"] == sizes["after"]


WITHOUT_LORAP = """
import sys

sys.modules["lorap"] = None
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

small, adapter, result = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(small, trust_remote_code=True)
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.arange(3, 13)[None]).logits}, result)
"""


@pytest.mark.slow
def test_updates_on_factors_load_where_lorap_is_not_installed(place: Path, tmp_path: Path) -> None:
    recover(place, tmp_path / "adapter", replace(QUICK, on="factors"))
    files = (place / "small", tmp_path / "adapter", tmp_path / "result.safetensors")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_LORAP, *map(str, files)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    model = PeftModel.from_pretrained(load(place / "small"), tmp_path / "adapter").eval()
    with torch.no_grad():
        here = model(input_ids=torch.arange(3, 13)[None]).logits
    assert torch.allclose(load_file(files[2])["logits"], here, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_two_processes_train_as_one_does(place: Path, tmp_path: Path) -> None:
    """By torchrun, on the CPU: half of each step is another process's."""
    config = replace(QUICK, dropout=0.0)
    whole = recover(place, tmp_path / "one", config)
    words = {
        "rank": 4, "alpha": 8, "learning-rate": 0.01, "batch": 4, "micro-batch": 2, "epochs": 1,
        "evaluate-every": 3, "save-every": 2, "cutoff": 16, "dropout": 0, "device": "cpu",
        "data": place / "data.txt", "output": tmp_path / "two",
    }  # fmt: skip
    options = [str(word) for name, value in words.items() for word in (f"--{name}", value)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "lorap", "recover", str(place / "small"), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("next: lorap merge") == 1
    record = json.loads((tmp_path / "two" / "lorap_recovery.json").read_text())
    assert record["schedule"]["processes"] == 2
    for kind in ("training", "validation"):
        assert np.allclose(record["loss"][kind], whole["loss"][kind], rtol=1e-3)


@pytest.mark.spec("lora.gradient", "lora.factored", "lora.dense")
@pytest.mark.parametrize("on", ["matrices", "factors"])
def test_gradients_of_a_whole_model_are_those_of_differences(place: Path, on: str) -> None:
    model = load(place / "small", torch.float64)
    config: Any = replace(QUICK, on=on, dropout=0.0)  # type: ignore[arg-type]
    adapted: Any = get_peft_model(model, lora_config(model, config)).double()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = 0.1 * noise
    ids = torch.randint(3, 96, (2, 8), generator=generator)

    def loss() -> torch.Tensor:
        logits = adapted(input_ids=ids).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    loss().backward()
    step = 1e-4
    for name, parameter in adapted.named_parameters():
        if "lora_" not in name:
            assert parameter.grad is None, "only updates are trained"
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        sides = []
        with torch.no_grad():
            for sign in (1, -2):
                parameter += sign * step * direction
                sides.append(float(loss()))
            parameter += step * direction
        slope = (sides[0] - sides[1]) / (2 * step)
        # RMSNorm and the rotary angles are float32: the loss is known to about 1e-7.
        assert slope == pytest.approx(float((parameter.grad * direction).sum()), abs=3e-3, rel=3e-3)


def test_targets_are_the_linears_of_the_layers(place: Path) -> None:
    model = load(place / "small")
    matrices = get_peft_model(model, lora_config(model, QUICK)).targeted_module_names
    projections = [f"self_attn.{m}_proj" for m in "qkvo"] + [
        f"mlp.{m}_proj" for m in ("gate", "up", "down")
    ]
    assert sorted(matrices) == sorted(
        f"model.layers.{index}.{name}" for index in range(3) for name in projections
    )
    other = load(place / "small")
    assert "lm_head" not in target_modules(other, "factors")


# --- breaks ---------------------------------------------------------------------------------------


class CrashError(Exception):
    """Stands for whatever ends a process."""


def crash_at(step: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == step:
            raise CrashError

    return progress


def same_curves(record: dict[str, Any], other: dict[str, Any]) -> None:
    """Assert that the losses are the same to the last bit."""
    assert record["loss"] == other["loss"]


@pytest.mark.parametrize(
    ("step", "damaged", "resumed_from"),
    [(1, None, None), (5, None, 4), (8, "checkpoint-6", 4)],
)
def test_a_run_that_crashed_is_resumed_to_the_same_curve(
    place: Path,
    whole: dict[str, Any],
    tmp_path: Path,
    step: int,
    damaged: str | None,
    resumed_from: int | None,
) -> None:
    with pytest.raises(CrashError):
        recover(place, tmp_path / "adapter", progress=crash_at(step))
    assert not (tmp_path / "adapter").exists()
    left = tmp_path / "adapter.unfinished"
    assert left.exists() == (resumed_from is not None)
    if damaged is not None:
        (left / damaged / "trainer_state.json").write_text("{")
    if left.exists():
        with pytest.raises(UsageError, match="--resume goes on with it"):
            recover(place, tmp_path / "adapter")
        with pytest.raises(UsageError, match="cannot be resumed: rank was 4 and is 5 now"):
            recover(place, tmp_path / "adapter", replace(QUICK, rank=5), resume=True)
    again = recover(place, tmp_path / "adapter", resume=True)
    assert again["resumed_from"] == resumed_from
    same_curves(again, whole)
    one, two = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path / "adapter", place / "adapter")
    )
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert not left.exists()


def test_a_signal_ends_a_run_after_a_checkpoint(
    place: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    said: list[str] = []

    def interrupt(done: int, total: int) -> None:
        if done == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted) as caught:
        recover(place, tmp_path / "adapter", progress=interrupt, say=said.append)
    assert caught.value.number == signal.SIGINT
    (note,) = caught.value.__notes__
    assert note.startswith(("step 5 of 10 is saved", "step 6 of 10 is saved"))
    assert any("once more ends at once" in line for line in said)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    same_curves(recover(place, tmp_path / "adapter", resume=True), whole)


def test_two_runs_do_not_share_a_folder(place: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "adapter", True)
    with (
        run.held({}, resume=False),
        pytest.raises(UsageError, match="another run is going on there"),
        Run(tmp_path / "adapter", True).held({}, resume=True),
    ):
        pass
    assert not run.folder.exists()


def test_an_output_that_was_created_meanwhile_is_left_alone(place: Path, tmp_path: Path) -> None:
    def create(done: int, total: int) -> None:
        (tmp_path / "adapter").mkdir(exist_ok=True)

    with pytest.raises(UsageError, match="was created meanwhile; the adapter is in"):
        recover(place, tmp_path / "adapter", replace(QUICK, epochs=0.4), progress=create)
    assert (tmp_path / "adapter.unfinished" / "adapter" / "adapter_config.json").exists()


FORKSERVER = multiprocessing.get_context("forkserver")


def recover_until_killed(place: Path, output: Path, at: int) -> None:
    """Train, and be killed after a step."""

    def progress(done: int, total: int) -> None:
        if done == at:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    recover(place, output, progress=progress)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 8])
def test_a_run_that_was_killed_is_resumed_to_the_same_curve(
    place: Path, tmp_path: Path, step: int
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        undisturbed = recover(place, tmp_path / "whole")
        child = FORKSERVER.Process(
            target=recover_until_killed, args=(place, tmp_path / "adapter", step)
        )
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        again = recover(place, tmp_path / "adapter", resume=True)
    finally:
        torch.set_num_threads(threads)
    assert again["resumed_from"] == (step - 1) // 2 * 2
    same_curves(again, undisturbed)


# --- errors ---------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(place: Path, tmp_path: Path) -> None:
    with pytest.raises(LorapError, match=r"the training loss is .* at step .*--learning-rate"):
        recover(place, tmp_path / "adapter", replace(QUICK, learning_rate=1e30))
    assert not (tmp_path / "adapter").exists()


def test_a_missing_package_is_said_with_its_remedy(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        LorapError, match=r"needs the package peft: .*pip install 'lorap\[recover\]'"
    ):
        recover(place, tmp_path / "adapter")


def test_what_cannot_be_recovered(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="model"):
        lorap.recover(place / "model", tmp_path / "a", QUICK, data=str(place / "data.txt"))
    with pytest.raises(UsageError, match="does not exist"):
        recover(place, tmp_path / "a", data=str(place / "none.txt"))
    with pytest.raises(UsageError, match="exists already; choose another folder"):
        recover(place, place / "model")
    shutil.copytree(place / "small", tmp_path / "bare")
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UsageError, match="the model's tokenizer cannot be loaded"):
        lorap.recover(tmp_path / "bare", tmp_path / "a", QUICK, data=str(place / "data.txt"))
    # Token ids need none.
    record = lorap.recover(
        tmp_path / "bare", tmp_path / "a", replace(QUICK, epochs=1), data=str(place / "ids.npy")
    )
    assert record["loss"]["best"] is None
    assert record["data"]["kind"] == "ids"


def test_factored_linears_refuse_what_they_cannot_do(place: Path) -> None:
    model = load(place / "small")
    adapted: Any = get_peft_model(model, lora_config(model, QUICK))
    with pytest.raises(NotImplementedError, match="lorap merge MODEL ADAPTER"):
        adapted.merge_and_unload()
    for options in ({"init_lora_weights": "pissa"}, {"use_dora": True}):
        other = load(place / "small")
        config = lora_config(other, QUICK)
        for name, value in options.items():
            setattr(config, name, value)
        with pytest.raises(ValueError, match=r"init_lora_weights=.pissa.|use_dora=True"):
            get_peft_model(other, config)
