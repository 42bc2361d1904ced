"""The tokenizer of a model, for data that is text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorap.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path, data: str = "the data") -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model.

    Parameters
    ----------
    folder : Path
        Of the model, or of its tokenizer's files.
    data : str
        What it is needed for, for the error.

    Raises
    ------
    UsageError
        If there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        # A damaged tokenizer raises errors of many types.
        raise UsageError(
            f"{folder}: {data} is text, and the model's tokenizer cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
