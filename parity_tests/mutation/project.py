"""Where the math is, under which names the tests import it, and what a result depends on."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Project:
    """A tree of sources and tests.

    Attributes
    ----------
    root : Path
    packages : mapping
        Folders whose modules are all mutated, and the packages that they are imported as.
    tests : sequence of str
        Folders of tests.
    marker : str
        Expression of pytest that selects the tests that count.
    plugins : sequence of str
        Plugins of pytest that the tests need.
    notes : str
        Folder of ``written.toml`` and ``equivalent.toml``.
    preloaded : sequence of str
        Modules of others that the tests import: loaded once, before the first fork.
    """

    root: Path
    packages: Mapping[str, str]
    tests: Sequence[str]
    notes: str
    marker: str = ""
    plugins: Sequence[str] = ()
    preloaded: Sequence[str] = ()

    def modules(self) -> list[str]:
        """Return the modules to be mutated, by path with dots; new ones are found by themselves."""
        return sorted(
            self.name(path)
            for folder in self.packages
            for path in (self.root / folder).glob("*.py")
            if path.stem != "__init__"
        )

    def name(self, path: Path) -> str:
        """Return the path of a module with dots, ``lorap.ops.budget``."""
        return ".".join(path.relative_to(self.root).with_suffix("").parts)

    def path(self, module: str) -> Path:
        """Return the file of a module."""
        return self.root.joinpath(*module.split(".")).with_suffix(".py")

    def source(self, module: str) -> str:
        """Return the text of a module."""
        return self.path(module).read_text(encoding="utf-8")

    def imported_as(self, module: str) -> str:
        """Return the name that a module is imported under."""
        for folder, package in self.packages.items():
            prefix = folder.replace("/", ".") + "."
            if module.startswith(prefix):
                return f"{package}.{module.removeprefix(prefix)}"
        return module

    def digest(self) -> str:
        """Return a fingerprint of every source and test, on which results depend."""
        top = {Path(folder).parts[0] for folder in (*self.packages, *self.tests)}
        files = {path for folder in top for path in (self.root / folder).rglob("*.py")}
        state = hashlib.sha256()
        for path in sorted(files - set((self.root / self.notes).glob("*.py"))):
            state.update(path.relative_to(self.root).as_posix().encode())
            state.update(hashlib.sha256(path.read_bytes()).digest())
        return state.hexdigest()


LORAP = Project(
    root=Path(__file__).resolve().parents[2],
    packages={"reference": "lorap_reference", "lorap/ops": "lorap.ops"},
    tests=("tests", "parity_tests"),
    notes="parity_tests/mutation",
    marker="spec and not slow and not processes",
    plugins=("_hypothesis_pytestplugin",),
    preloaded=(
        "pytest",
        "scipy.linalg",
        "torch",
        "hypothesis.extra.numpy",
        "transformers.models.auto.modeling_auto",
        # Of all families, which lorap makes classes of as soon as it is imported.
        *(
            f"transformers.models.{name}.modeling_{name}"
            for name in (
                "gemma2",
                "gemma3",
                "llama",
                "llava",
                "mistral",
                "olmo2",
                "phi3",
                "qwen2",
                "qwen3",
                "smollm3",
            )
        ),
    ),
)
