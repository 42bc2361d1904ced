"""The Trainer of transformers, as a recovery needs it."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from lorap.errors import LorapError
from lorap.recovery.examples import IGNORED, Example, TrainingData, labels
from lorap.recovery.layers import lora_config
from lorap.recovery.run import Run
from lorap.recovery.settings import RecoveryConfig, Schedule

if TYPE_CHECKING:
    from collections.abc import Callable

    from peft import PeftModel
    from transformers import PreTrainedModel

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

CHECKPOINTS = 2
"""Checkpoints that are kept: the last, and the one before it."""


class Examples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Examples as the Trainer takes them.

    Parameters
    ----------
    examples : sequence of Example
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        example = self._examples[index]
        (label,) = labels([example])
        return {
            "input_ids": torch.from_numpy(example.ids).long(),
            "labels": torch.from_numpy(label),
        }


def padded(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put examples into a batch, ``(batch, L)``, with padding on the right.

    Parameters
    ----------
    rows : sequence of mappings
        ``input_ids`` and ``labels``, ``(L,)``.
    """
    attended = [torch.ones_like(row["input_ids"]) for row in rows]

    def together(parts: Sequence[Tensor], fill: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(parts), True, fill)

    return {
        "input_ids": together([row["input_ids"] for row in rows], 0),
        "attention_mask": together(attended, 0),
        "labels": together([row["labels"] for row in rows], IGNORED),
    }


def losses_of_rows(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Return by row the sum of the losses, and the tokens that it is the sum of.

    Parameters
    ----------
    logits : (batch, L, vocabulary)
        Or a tuple that begins with them.
    labels : (batch, L)

    Returns
    -------
    (batch, 2) float64
    """
    if isinstance(logits, tuple):
        logits = logits[0]
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), targets, ignore_index=IGNORED, reduction="none"
    )
    return torch.stack([losses.double().sum(1), (targets != IGNORED).sum(1).double()], dim=1)


def mean_loss(evaluated: Any) -> dict[str, float]:
    """Return the mean loss of all tokens. SPEC: ``recovery.best``.

    Parameters
    ----------
    evaluated : EvalPrediction
        With what ``losses_of_rows`` gives.
    """
    loss, tokens = evaluated.predictions.sum(axis=0)
    return {"nll": float(loss / tokens)}


def mean_since_evaluation(history: Sequence[Mapping[str, float]]) -> float:
    """Return the mean training loss of the steps between the last two evaluations.

    Parameters
    ----------
    history : sequence of mappings
        The Trainer's; its last entry is of an evaluation.
    """
    losses: list[float] = []
    for entry in reversed(history[:-1]):
        if "eval_nll" in entry:
            break
        if "loss" in entry:
            losses.append(entry["loss"])
    return sum(losses) / len(losses) if losses else math.nan


class Watch(TrainerCallback):
    """Tells how the training goes, keeps the best adapter, and stops where a signal asks for it.

    Attributes
    ----------
    run : Run
    trainer : Trainer
        Set once there is one.
    progress : callable
        Takes the steps done and the steps in all.
    say : callable
        Takes a line.
    signal : int or None
        That has asked for an end.
    """

    trainer: Trainer

    def __init__(
        self, run: Run, progress: Callable[[int, int], None], say: Callable[[str], None]
    ) -> None:
        self.run = run
        self.progress = progress
        self.say = say
        self.signal: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin at the step that there is a checkpoint of."""
        self.run.drop_best_after(state.global_step)
        self.progress(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the step; save and stop where a process was told to end."""
        self.progress(state.global_step, state.max_steps)
        if self._is_asked_to_end(args):
            self.signal = self.signal or signal.SIGTERM
            control.should_save = control.should_training_stop = True

    def _is_asked_to_end(self, args: Any) -> bool:
        asked = self.signal is not None
        if args.world_size == 1:
            return asked
        # All processes stop after the same step, or some would wait for the others for ever.
        flag = torch.tensor(int(asked), device=args.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Look at the loss."""
        logs: Mapping[str, float] = given["logs"]
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise LorapError(
                f"the training loss is {logs['loss']} at step {state.global_step}: a smaller "
                "--learning-rate, or --dtype float32, may help"
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Tell the losses, and keep the adapter if it is the best so far."""
        loss, step = float(given["metrics"]["eval_nll"]), state.global_step
        if step == 0:
            self.say(f"before training: validation loss {loss:.4f}")
            return
        training = mean_since_evaluation(state.log_history)
        self.say(f"step {step}: training loss {training:.4f}, validation loss {loss:.4f}")
        best = self.run.best()
        # All processes decide by what they had before the main one writes.
        self.trainer.accelerator.wait_for_everyone()
        if best is None or loss < best[1]:
            written = self.run.folder / "best.partial"
            self.trainer.save_model(str(written))
            if self.run.main:
                self.run.keep_best(written, step, loss)


def make_trainer(
    model: PreTrainedModel,
    data: TrainingData,
    config: RecoveryConfig,
    steps: Schedule,
    watch: Watch,
    *,
    device: torch.device,
    dtype: torch.dtype,
    resuming: bool,
) -> Trainer:
    """Put updates on a model, and a Trainer around it.

    Parameters
    ----------
    model : PreTrainedModel
        Compressed; changed in place.
    data : TrainingData
    config : RecoveryConfig
    steps : Schedule
    watch : Watch
    device : torch.device
        Of this kind; with several processes each has its own.
    dtype : torch.dtype
        Of the forwards.
    resuming : bool
        Whether the training goes on from a checkpoint.

    Notes
    -----
    SPEC: ``recovery.precision``.
    """
    from peft import get_peft_model

    validates = bool(data.validation)
    arguments = TrainingArguments(
        output_dir=str(watch.run.folder),
        use_cpu=device.type == "cpu",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        seed=config.seed,
        max_steps=steps.steps,
        per_device_train_batch_size=config.micro_batch,
        per_device_eval_batch_size=config.micro_batch,
        gradient_accumulation_steps=steps.accumulation,
        optim="adamw_torch",
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=steps.warmup,
        weight_decay=0.0,
        max_grad_norm=1.0,
        # A point of the curve for each step, so that it has the same points after a break.
        logging_steps=1,
        # A loss that is not finite is to be seen.
        logging_nan_inf_filter=False,
        eval_strategy="steps" if validates else "no",
        eval_steps=steps.evaluate_every,
        eval_on_start=validates and not resuming,
        save_strategy="steps",
        save_steps=steps.save_every,
        save_total_limit=CHECKPOINTS,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=device.type != "cpu",
        ddp_find_unused_parameters=False,
        report_to="none",
        disable_tqdm=True,
    )
    _ = arguments.device
    # Several GPUs are for several processes: the Trainer would copy the model to all of them.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    model.config.use_cache = False
    set_seed(config.seed)
    with third_party_warnings():
        adapted: PeftModel = get_peft_model(model, lora_config(model, config))
        trainer = Trainer(
            model=adapted,
            args=arguments,
            train_dataset=Examples(data.training),
            eval_dataset=Examples(data.validation) if validates else None,
            data_collator=padded,
            compute_metrics=mean_loss,
            preprocess_logits_for_metrics=losses_of_rows,
            callbacks=[watch],
        )
    trainer.remove_callback(PrinterCallback)
    watch.trainer = trainer
    return trainer


@contextlib.contextmanager
def third_party_warnings() -> Iterator[None]:
    """Leave out what PEFT and transformers have to tell each other, and users can do nothing about.

    PEFT 0.21 asks a model of transformers 5.2x for ``is_gradient_checkpointing``, which is to be
    renamed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
        )
        yield


@contextlib.contextmanager
def signals_noted(watch: Watch) -> Iterator[None]:
    """Let the first signal that ends a run end it after the step; the second ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def note(number: int, _: object) -> None:
        watch.signal = number
        watch.say("ending after this step; once more ends at once, without a checkpoint")
        for each, handler in before.items():
            signal.signal(each, handler)

    for number, handler in before.items():
        # nohup has a run outlive its terminal.
        if handler is not signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
