"""The demonstration: the embedded tiny LLaMA, compressed and compared with itself.

Beside this file lie the model, its calibration text and held-out text, and ``embedded.json``, the
record of how the model was made and how good it is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorap.checkpoint.files import REPORT
from lorap.config import CompressionConfig
from lorap.evaluation import load_evaluation_chunks, perplexity
from lorap.pipeline.on_disk import compress_checkpoint
from lorap.pipeline.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
CALIBRATION = FOLDER / "calibration.txt"
HELDOUT = FOLDER / "heldout.txt"

RATIO = 0.2
SEQLEN = 128
PROMPT = "Ruth, a farmer from Stockholm, travelled to Italy. She speaks"
NEW_TOKENS = 24


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes
    ----------
    parameters : int
        Tied ones once.
    perplexity : float
        On the held-out text.
    continuation : str
        What the model writes after the prompt, always taking the most likely token.
    """

    parameters: int
    perplexity: float
    continuation: str


@dataclass(frozen=True)
class DemoResult:
    """The two models side by side.

    Attributes
    ----------
    output : str
        Folder of the compressed model.
    report : str
        Name of the report in it.
    ratio, achieved_ratio : float
        Share of all parameters asked to be removed, and removed.
    original, compressed : Side
    tokens : int
        Targets that the perplexities are taken over.
    protocol : str
        How they are taken, in words.
    prompt : str
    seconds : float
        Wall time in all.
    """

    output: str
    report: str
    ratio: float
    achieved_ratio: float
    original: Side
    compressed: Side
    tokens: int
    protocol: str
    prompt: str
    seconds: float


def run_demo(
    output: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> DemoResult:
    """Compress the embedded model, load the result with transformers, and compare the two.

    Parameters
    ----------
    output : str or Path
        Folder for the compressed model.
    overwrite : bool
        Replace a folder that an earlier compression wrote.
    progress : callable, optional
        Called with the layers done and the layers in all.

    Raises
    ------
    UsageError
        If the output cannot be written.
    """
    from transformers import AutoConfig, AutoTokenizer

    started = time.perf_counter()
    report = compress_checkpoint(
        MODEL,
        output,
        # The CPU, so that everybody sees the same numbers.
        CompressionConfig(ratio=RATIO, seqlen=SEQLEN, device="cpu"),
        calibration=str(CALIBRATION),
        overwrite=overwrite,
        command="lorap demo",
        progress=progress,
    )
    config = AutoConfig.from_pretrained(MODEL)
    chunks, protocol = load_evaluation_chunks(
        HELDOUT,
        tokenizer=lambda: AutoTokenizer.from_pretrained(MODEL),
        seqlen=SEQLEN,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
    )
    original, compressed = (_look_at(folder, chunks) for folder in (MODEL, Path(output)))
    return DemoResult(
        output=str(output),
        report=REPORT,
        ratio=RATIO,
        achieved_ratio=report["achieved_ratio"],
        original=original,
        compressed=compressed,
        tokens=chunks.shape[0] * (SEQLEN - 1),
        protocol=protocol.sentence,
        prompt=PROMPT,
        seconds=time.perf_counter() - started,
    )


def _look_at(folder: Path, chunks: Tensor) -> Side:
    """Load a model as any user of transformers would, and try it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Many CPUs take several times as long in the bfloat16 of the checkpoint.
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    new = written[0, prompt["input_ids"].shape[1] :]
    return Side(
        parameters=model.num_parameters(),
        perplexity=perplexity(model, chunks).perplexity,
        continuation=tokenizer.decode(new, skip_special_tokens=True).strip(),
    )
