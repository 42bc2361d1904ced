"""Loading a model to be evaluated, with plain transformers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lorap.checkpoint.reader import fetch_tokenizer_files, is_local
from lorap.errors import UsageError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Candidate:
    """A model that was found, and of which the configuration is read; see :func:`find_model`.

    Attributes
    ----------
    name : str
        As the user gave it.
    whole : PretrainedConfig
        Its configuration.
    """

    name: str
    whole: PretrainedConfig
    _location: str
    _options: Mapping[str, Any]

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the language model: of a multimodal model, a part of it."""
        return self.whole.get_text_config()

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that the model takes, in tokens; None if it has no such limit."""
        return getattr(self.config, "max_position_embeddings", None)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer.

        Raises
        ------
        UsageError
            If it cannot be loaded.
        """
        from transformers import AutoTokenizer

        tokenizer: PreTrainedTokenizerBase = self._load(AutoTokenizer)
        return tokenizer

    def load(self, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
        """Load the weights.

        Parameters
        ----------
        dtype : torch.dtype or None
            Type to run in; None for the checkpoint's own.
        device : torch.device

        Raises
        ------
        UsageError
            If the model cannot be loaded, or a weight is missing or has another shape.
        """
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        # Weights that do not fit are named below; transformers alone would leave them random.
        model, loaded = self._load(
            AutoModelForCausalLM if self.whole is self.config else AutoModelForImageTextToText,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        _check_loaded(loaded, self.name)
        placed: PreTrainedModel = model.to(device)
        return placed

    def _load(self, auto_class: Any, **extra: Any) -> Any:
        return _load(auto_class, self.name, self._location, **self._options, **extra)


def find_model(
    model_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Candidate:
    """Find a model and read its configuration, without its weights.

    Parameters
    ----------
    model_path : str or path
        Folder or hub name of a causal language model, compressed or not.
    revision : str, optional
        Branch, tag or commit of a hub name.
    trust_remote_code : bool
        Run modeling code that the model brings along.

    Raises
    ------
    UsageError
        If there is no such model, or its configuration cannot be loaded.
    LorapError
        If the hub cannot be reached.
    """
    from transformers import AutoConfig

    name = os.fspath(model_path)
    location = _locate(name, revision)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    return Candidate(name, _load(AutoConfig, name, location, **options), location, options)


def _load(auto_class: Any, name: str, location: str, **options: Any) -> Any:
    try:
        return auto_class.from_pretrained(location, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files raise errors of many kinds in transformers
        what = auto_class.__name__.removeprefix("Auto")
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise UsageError(
            f"cannot load {what} of the model {name!r}: {kind}{' '.join(str(error).split())}"
        ) from error


def _locate(name: str, revision: str | None) -> str:
    """Return the folder or hub name to load a model from, once it is found.

    Raises
    ------
    UsageError
        If there is no such folder or hub name, or it holds no model.
    LorapError
        If the hub cannot be reached.
    """
    folder = fetch_tokenizer_files(name, revision=revision)
    if not is_local(name):
        return name
    if not (folder / "config.json").is_file():
        raise UsageError(f"{name} is not a model folder: it holds no config.json")
    return str(folder)


def _check_loaded(info: Mapping[str, Any], name: str) -> None:
    """Check what transformers tells about a loading: that no weight was left as initialised.

    Raises
    ------
    UsageError
        Naming the first weight that is missing or has another shape.
    """
    problems = [f"{key} is missing" for key in sorted(info["missing_keys"])]
    problems += [
        f"{key} has the shape {tuple(found)}, expected {tuple(expected)}"
        for key, found, expected in sorted(info["mismatched_keys"])
    ]
    problems += list(info["error_msgs"])
    if problems:
        others = f" (and {len(problems) - 1} more such weights)" if len(problems) > 1 else ""
        raise UsageError(f"{name} does not fit its config.json: {problems[0]}{others}")
