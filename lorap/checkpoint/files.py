"""Names of the files of a checkpoint."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from lorap.errors import UsageError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
REPORT = "lorap_report.json"
REPORT_PAGE = "lorap_report.html"
CALIBRATION = "lorap_calibration.safetensors"
STATISTICS = "lorap_statistics.safetensors"
EXPORT = "lorap_export.json"
EVALUATION = "lorap_evaluation.json"
CARD = "README.md"
TEMPLATES = "additional_chat_templates/*.jinja"

# What goes from the original to the compressed checkpoint unchanged.
SIDE_FILES = (
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    TEMPLATES,
)


_BLOCK, _BLOCKS = 4096, 257
"""Bytes of a block that ``sample_digest`` reads, and how many: they overlap up to 1 MiB."""


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sample_digest(file: Path) -> str:
    """Return a digest of a file's size, and of blocks of its contents spread over all of it.

    Of a file of up to 1 MiB all bytes count. Of larger ones only what changes at large shows, which
    another training, or other quantisation, does.
    """
    size = file.stat().st_size
    digest = hashlib.sha256(f"{size}:".encode())
    last = max(0, size - _BLOCK)
    with open(file, "rb", buffering=0) as content:
        for start in sorted({last * i // (_BLOCKS - 1) for i in range(_BLOCKS)}):
            content.seek(start)
            digest.update(content.read(_BLOCK))
    return digest.hexdigest()


def side_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint that are carried over unchanged.

    Parameters
    ----------
    folder : Path
        Folder of the original checkpoint.

    Raises
    ------
    UsageError
        If one is a link out of the folder: what lies there is not the model's to pass on.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        # The hub's cache: every file is a link to the repository's ../../blobs.
        root = root.parent.parent
    found = {file for pattern in SIDE_FILES for file in folder.glob(pattern) if file.is_file()}
    for file in sorted(found):
        target = file.resolve()
        if not target.is_relative_to(root):
            raise UsageError(
                f"{file} leads out of its folder, to {target}: expected a file in the folder; "
                "if it belongs to the model, copy it there"
            )
    return sorted(found)
