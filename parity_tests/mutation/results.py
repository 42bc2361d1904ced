"""Results on disk, one JSON object per line as they come, and the table made of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from parity_tests.mutation.generate import Mutant
from parity_tests.mutation.mutants import Equivalent
from parity_tests.mutation.runner import Baseline, Result


@dataclass
class Results:
    """A run, possibly not finished.

    Attributes
    ----------
    digest : str
        Of the sources and tests that it is about.
    baseline : Baseline or None
    of : dict
        Results by mutant.
    """

    digest: str
    baseline: Baseline | None = None
    of: dict[str, Result] = field(default_factory=dict)


def read(path: Path) -> Results:
    """Read what an earlier run has left; a last line that is cut off does not count."""
    results = Results("")
    if not path.exists():
        return results
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if "digest" in entry:
            results.digest = entry["digest"]
            results.baseline = Baseline(**entry["baseline"])
        else:
            result = Result(**entry)
            results.of[result.mutant] = result
    return results


def start(path: Path, results: Results) -> None:
    """Write a file with what is known already."""
    assert results.baseline is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    first = {"digest": results.digest, "baseline": asdict(results.baseline)}
    lines = [json.dumps(first), *(json.dumps(asdict(r)) for r in results.of.values())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def append(path: Path, result: Result) -> None:
    """Add a result; a later one of the same mutant counts."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def table(
    mutants: Sequence[Mutant], of: Mapping[str, Result], equivalents: Mapping[str, Equivalent]
) -> str:
    """Return the numbers per module in Markdown; the rate is of those not explained."""
    header = ("module", "mutants", "killed", "equivalent", "survivors", "rate")
    rows: list[tuple[str, ...]] = [header, ("---",) + ("---:",) * 5]
    modules = sorted({mutant.module for mutant in mutants})
    for module in (*modules, None):
        chosen = [m for m in mutants if module in (None, m.module) and m.name in of]
        killed = sum(of[m.name].status != "survived" for m in chosen)
        explained = sum(of[m.name].status == "survived" and m.name in equivalents for m in chosen)
        rest = len(chosen) - killed - explained
        rate = f"{killed / (killed + rest):.1%}" if killed + rest else "-"
        numbers = (len(chosen), killed, explained, rest)
        rows.append((f"`{module}`" if module else "all", *map(str, numbers), rate))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def entry(mutant: Mutant) -> str:
    """Return a survivor in the form of ``equivalent.toml``, the reason left out."""
    return "\n".join(
        [
            f"[{json.dumps(mutant.name)}]",
            f"was = {_quoted(mutant.was)}",
            f"now = {_quoted(mutant.now)}",
            'why = ""',
        ]
    )


def _quoted(text: str) -> str:
    return f"'{text}'" if "'" not in text else json.dumps(text)
