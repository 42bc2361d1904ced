"""Pages of the documentation that are made from what the repository holds: a hook of mkdocs.

README, SPEC, measurements, changelog and guide are pages as they are; each public module has a page
of its docstrings. ``make docs`` builds the site.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

PAGES = {
    "README.md": "index.md",
    "SPEC.md": "spec.md",
    "bench/RESULTS.md": "results.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
"""File of the repository to page."""

PUBLIC = {
    "compress_checkpoint": "lorap.pipeline.on_disk.compress_checkpoint",
    "plan_checkpoint": "lorap.pipeline.on_disk.plan_checkpoint",
    "compress": "lorap.pipeline.in_memory.compress",
    "CompressionConfig": "lorap.config.CompressionConfig",
    "Override": "lorap.config.Override",
    "inspect_checkpoint": "lorap.pipeline.survey.inspect_checkpoint",
    "compare": "lorap.comparison.compare",
    "audit": "lorap.audit.run.audit",
    "evaluate": "lorap.evaluation.run.evaluate",
    "evaluate_perplexity": "lorap.evaluation.run.evaluate_perplexity",
    "recover": "lorap.recovery.training.recover",
    "RecoveryConfig": "lorap.recovery.settings.RecoveryConfig",
    "merge_adapter": "lorap.recovery.merging.merge_adapter",
    "export_dense": "lorap.dense.export_dense",
    "LorapError": "lorap.errors.LorapError",
    "UsageError": "lorap.errors.UsageError",
}
"""What users call, by the name that they know it under."""

MATH = {"lorap/ops": "lorap.ops", "reference": "lorap_reference"}
"""Folders of the two sides, and the names that they are imported by."""


def _modules() -> dict[str, list[Path]]:
    """Return the files of the two sides, by the name of the package."""
    return {package: sorted((ROOT / folder).glob("[!_]*.py")) for folder, package in MATH.items()}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages of the modules to the navigation."""
    pages: list[object] = ["api/index.md"]
    for package, files in _modules().items():
        names = [file.stem for file in files]
        pages.append({package: [{name: f"api/{package}/{name}.md"} for name in names]})
    config.nav = [*(config.nav or ()), {"Python API": pages}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    pages = {page: _linked((ROOT / file).read_text("utf-8")) for file, page in PAGES.items()}
    pages["api/index.md"] = "# Python API\n" + "".join(
        f"\n## {name}\n\n::: {path}\n    options:\n      heading_level: 3\n"
        for name, path in PUBLIC.items()
    )
    for package, modules in _modules().items():
        for file in modules:
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            pages[f"api/{package}/{file.stem}.md"] = f"# {package}.{file.stem}\n\n::: {module}\n"
    for page, content in pages.items():
        files.append(File.generated(config, page, content=content))
    return files


def _linked(text: str) -> str:
    """Turn links between files of the repository into links between pages.

    Raises
    ------
    ValueError
        If a link leads to a file that is no page.
    """

    def page(match: re.Match[str]) -> str:
        target, anchor = match[1].removeprefix("../"), match[2] or ""
        if target in PAGES:
            return f"]({PAGES[target]}{anchor})"
        if (ROOT / target).is_dir():
            return "](api/index.md)"
        if target == "LICENSE":
            return "](https://www.apache.org/licenses/LICENSE-2.0)"
        raise ValueError(f"a link to {target}, which is no page of the documentation")

    return re.sub(r"\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)", page, text)
