"""What an adapter folder says of itself: its record, its card, and the model that it is for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lorap.checkpoint.files import CONFIG
from lorap.checkpoint.reader import CheckpointReader
from lorap.errors import UsageError

FORMAT_VERSION = 1

RECORD = "lorap_recovery.json"
CURVE = "loss.svg"
CARD = "README.md"


def fingerprint(reader: CheckpointReader) -> str:
    """Return what tells a compressed model from others of the same shape.

    Parameters
    ----------
    reader : CheckpointReader

    Returns
    -------
    str
        SHA-256, in hexadecimal, of the structure, and of name, type, shape and first row of each
        tensor.
    """
    config: Any = reader.config
    digest = hashlib.sha256(json.dumps(config.lorap, sort_keys=True).encode())
    for name, stored in sorted(reader.tensors.items()):
        digest.update(f"{name} {stored.dtype} {stored.shape}".encode())
        with safe_open(stored.file, framework="pt", device="cpu") as handle:
            row = handle.get_slice(stored.key)[:1].contiguous()
        digest.update(row.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_complete(reader: CheckpointReader) -> None:
    """Raise UsageError unless the tensors stored are those that the configuration asks for."""
    expected = reader.family.tensor_shapes(reader.config)
    for name, shape in expected.items():
        stored = reader.tensors.get(name)
        if stored is None or stored.shape != shape:
            found = "is missing" if stored is None else f"has the shape {stored.shape}"
            raise UsageError(
                f"{reader.source} does not fit its {CONFIG}: {name} {found}, expected {shape}"
            )


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of an adapter folder; None where lorap did not write it.

    Raises
    ------
    UsageError
        If the file is there and damaged.
    """
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(record, dict) or record.get("format_version") != FORMAT_VERSION:
        raise UsageError(f"{file}: expected a record of format version {FORMAT_VERSION}")
    return record


_NEEDS_LORAP = """\
The updates stand around the factored linears as a whole, which plain PEFT does not know: import
lorap first, or PEFT answers "Target module LowRankLinear ... is not supported".
"""

_PLAIN = "The updates are on linears that PEFT knows by itself; only the model may need lorap.\n"


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file; NaN and infinity are refused."""
    file.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def adapter_card(record: Mapping[str, Any], name: str) -> str:
    """Return the README.md of an adapter folder.

    Parameters
    ----------
    record : mapping
        The contents of ``lorap_recovery.json``.
    name : str
        Of the folder.
    """
    settings, data, loss = record["settings"], record["data"], record["loss"]
    model = Path(record["model"]).name or str(record["model"])
    around = settings["on"] == "matrices"
    validated = (
        "no validation"
        if loss["best"] is None
        else f"{loss['before']:.4f} before, {loss['best']:.4f} at step {loss['best_step']}"
    )
    versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
    return f"""---
library_name: peft
tags: [lorap, lora]
---

# {name}

A LoRA adapter that recovers {model}, a model that lorap compressed.

| | |
|---|---|
| data | {data["description"]}: {data["training"]:,} examples, {data["validation"]:,} held out |
| LoRA | rank {settings["rank"]}, alpha {settings["alpha"]:g}, on the {settings["on"]} |
| steps | {record["schedule"]["steps"]:,} of {settings["batch"]} samples |
| validation loss | {validated} |

`{RECORD}` holds settings, data and both loss curves; `{CURVE}` shows them.

## Use

```python
import lorap
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/{model}", dtype="auto")
model = PeftModel.from_pretrained(model, "path/to/{name}")
```

{_NEEDS_LORAP if around else _PLAIN}
Merged into a checkpoint of its own, which needs no PEFT:

```sh
lorap merge path/to/{model} path/to/{name} --output recovered
```

## How it was made

```
{record["command"]}
```

Versions: {versions}.
"""
