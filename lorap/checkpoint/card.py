"""The model card of a compressed checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lorap.checkpoint.files import CARD, EXPORT, REPORT, REPORT_PAGE
from lorap.checkpoint.reader import is_local

# Fields of the original's card that hold for the compressed model as well.
_INHERITED = ("license", "license_name", "license_link", "language")


_WITHOUT_LORAP = """\
Without it, `from_pretrained(..., dtype="auto", trust_remote_code=True)` loads the classes from
`modeling_lorap.py` in this folder; the file imports torch and transformers only."""


def model_card(
    report: Mapping[str, Any],
    *,
    name: str,
    original: Path | None = None,
    multimodal: bool = False,
) -> str:
    """Return the README.md of a compressed checkpoint.

    Parameters
    ----------
    report : mapping
        The contents of ``lorap_report.json``.
    name : str
        The model's name, for the title: that of the output folder.
    original : Path, optional
        Folder of the original checkpoint, whose own card gives licence and language.
    multimodal : bool
        Whether it is a language model within another that was compressed.

    Returns
    -------
    str
        Markdown with a YAML front matter.
    """
    before, after = report["parameters"]["before"], report["parameters"]["after"]
    calibration = report["calibration"]
    model, base = str(report["model"]), {"base_model": str(report["model"])}
    if is_local(model):
        # Neither the hub nor other readers know this machine's folders.
        model, base = Path(os.path.expanduser(model)).resolve().name, {}
    front = {
        **_inherited(original),
        **base,
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if multimodal else "text-generation",
        "tags": ["lorap", "pruning", "low-rank"],
    }
    tokens = f"{calibration['samples']} x {calibration['seqlen']} tokens"
    of_what = "all parameters" if report["ratio_scope"] == "model" else "each layer's parameters"
    # Neither exists where a recipe fixes every module.
    asked = f"{report['ratio']:.2%} of {of_what}" if report["ratio"] else "set by the recipe"
    layer_ratio = f"{report['layer_ratio']:.2%}" if report["layer_ratio"] else "set by the recipe"
    auto_model, auto_text = "AutoModelForCausalLM", "AutoTokenizer"
    where, without = "", _WITHOUT_LORAP
    if multimodal:
        auto_model, auto_text = "AutoModelForImageTextToText", "AutoProcessor"
        where = ", in its language model"
        without = "It does not load without lorap."
    versions = ", ".join(f"{key} {value}" for key, value in report["versions"].items())
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}
---

# {name}

{model}, made smaller with lorap{where}. {_what_was_done(report["settings"])}

| | |
|---|---|
| ratio asked | {asked} |
| ratio achieved | {report["achieved_ratio"]:.2%} |
| layer ratio | {layer_ratio} |
| parameters | {after:,} of {before:,} |
| calibration | {tokens} of {calibration["source"]} |

`{REPORT}` holds rank, width and error of every module; `{REPORT_PAGE}` shows them.
{_what_was_recovered(report)}
## Use

With lorap installed:

```python
import lorap
from transformers import {auto_model}, {auto_text}

model = {auto_model}.from_pretrained("path/to/{name}", dtype="auto")
{auto_text.removeprefix("Auto").lower()} = {auto_text}.from_pretrained("path/to/{name}")
```

{without}

## How it was made

```
{report["command"]}
```

Calibration ids: sha256 `{calibration["fingerprint"]}`. Versions: {versions}.
"""


_LOW_RANK = {
    "awsvd": "activation-weighted SVD",
    "svd": "SVD",
    "asvd": "ASVD",
    "pca": "PCA of the outputs",
    "afm": "AFM",
}


def _what_was_done(settings: Mapping[str, Any]) -> str:
    """Return a sentence on each sub-layer."""
    done = []
    for sublayer, low_rank, pruned in (
        ("mha", "The attention projections are products of two thin matrices", "attention heads"),
        ("ffn", "The feed-forward projections are products of two thin matrices", "channels"),
    ):
        if sublayer not in settings["sublayers"]:
            continue
        method = settings[sublayer]
        if method in _LOW_RANK:
            joint = (
                ", q and k with a common one" if settings["joint_qk"] and sublayer == "mha" else ""
            )
            done.append(f"{low_rank}{joint} ({_LOW_RANK[method]}).")
        else:
            block = "attention" if sublayer == "mha" else "feed-forward"
            done.append(
                f"The {block} blocks keep their most important {pruned} "
                f"(scored by {settings['importance']})."
            )
    return "\n".join(done)


def dense_card(report: Mapping[str, Any], *, name: str, source: Path) -> str:
    """Return the README.md of a model exported to the stock architecture.

    Parameters
    ----------
    report : mapping
        The contents of ``lorap_export.json``.
    name : str
        The model's name, for the title: that of the output folder.
    source : Path
        Folder of the compressed model, whose own card gives licence and language.

    Returns
    -------
    str
        Markdown with a YAML front matter.
    """
    sizes = report["parameters"]
    front = {
        **_inherited(source),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lorap", "pruning"],
    }
    versions = ", ".join(f"{key} {value}" for key, value in report["versions"].items())
    original = "not known" if sizes["original"] is None else f"{sizes['original']:,}"
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}
---

# {name}

{source.resolve().name}, a model that lorap made smaller, as a plain `{report["architecture"]}`.
Its factors are multiplied out, so that it loads anywhere, and is larger.

| | parameters |
|---|---|
| original | {original} |
| compressed | {sizes["compressed"]:,} |
| this model | {sizes["exported"]:,} |

`{EXPORT}` says what was filled up with zeros. Versions: {versions}.
"""


def _what_was_recovered(report: Mapping[str, Any]) -> str:
    """Return a section on the recovery; nothing where there was none."""
    recovery = report.get("recovery")
    if recovery is None:
        return ""
    merge, training = recovery["merge"], recovery["training"]
    sizes = merge["parameters"]
    trained = "LoRA updates"
    if training is not None:
        settings, data = training["settings"], training["data"]
        trained += (
            f" of rank {settings['rank']} on the {settings['on']}, trained on "
            f"{data['training']:,} examples of {data['description']}"
        )
    how = {
        "exact": "exactly: what the table says of the size is with them",
        "same-size": "and cut back to the size that the compressed model had",
    }[merge["mode"]]
    return f"""
## Recovery

{trained}, were merged {how}. {sizes["before"]:,} parameters before, {sizes["after"]:,} after.
`{REPORT}` has it under `recovery`; errors and ranks of its modules are those of the compression.
"""


def _inherited(original: Path | None) -> dict[str, Any]:
    """Return the fields of the original's card that still hold; none where it cannot be read."""
    card = None if original is None else original / CARD
    if card is None or not card.is_file():
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    if not isinstance(front, dict):
        return {}
    return {key: front[key] for key in _INHERITED if key in front}
