"""Which rule of SPEC.md is carried out where, and checked by which test.

``python -m parity_tests.traceability`` checks SPEC.md against the code; with ``--write`` it first
writes the table at the end of SPEC.md. Sources are parsed, never imported: docstrings name rules
after ``SPEC:``, tests with ``@pytest.mark.spec(...)``.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LEVELS = ("MUST", "SHOULD", "MAY")
SIDES = ("both", "reference", "torch")
TOLERANCES = (
    "exact",
    "elementwise",
    "sum",
    "inner",
    "spectral",
    "eigen",
    "product",
    "forward",
    "contract",
    "refit",
    "divergence",
)

BEGIN, END = "<!-- traceability:begin -->", "<!-- traceability:end -->"
TESTS_PER_CELL = 2
FOLDERS = ("reference", "lorap", "tests", "parity_tests")

_RULE = re.compile(r"### `([a-z0-9]+(?:-[a-z0-9]+)*(?:\.[a-z0-9]+(?:-[a-z0-9]+)*)+)`")
_ENTRY = re.compile(r"### ([ED]-\d{3}): \S.*")
_FIELDS = re.compile(r"Level: ([^;]+); Side: ([^;]+); Source: ([^;]+); Tolerance: ([^;]+)")
_PIN = re.compile(r"^- Pinned by: (.+)$", re.MULTILINE)
_NAMED = re.compile(r"SPEC:\s*((?:``[^`]+``(?:\s*,\s*and\s+|\s*,\s*|\s+and\s+)?)*)")


@dataclass(frozen=True)
class Rule:
    """A rule of SPEC.md: its name and its fields."""

    name: str
    level: str
    side: str
    source: str
    tolerance: str


@dataclass
class Spec:
    """What SPEC.md says, and what is wrong with its form.

    Attributes
    ----------
    rules : dict
        By name, in order.
    pins : dict
        Pinning tests (``path::test``) by erratum.
    decisions : list of str
    problems : list of str
    """

    rules: dict[str, Rule] = field(default_factory=dict)
    pins: dict[str, list[str]] = field(default_factory=dict)
    decisions: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, order=True)
class Site:
    """A module, function or test that names rules."""

    path: str
    name: str

    @property
    def short(self) -> str:
        """``file.function``, or ``file::test``."""
        stem = Path(self.path).stem
        if stem.startswith("test_"):
            return f"{stem}::{self.name}"
        return f"{stem}.{self.name}" if self.name else stem


@dataclass
class Trace:
    """Who names which rule.

    Attributes
    ----------
    reference, torch, unit, parity : dict
        Sites by rule: functions of both sides, tests of ``tests/`` and of ``parity_tests/``.
    tests : set of str
        ``path::test`` of every test.
    problems : list of str
    """

    reference: dict[str, list[Site]] = field(default_factory=dict)
    torch: dict[str, list[Site]] = field(default_factory=dict)
    unit: dict[str, list[Site]] = field(default_factory=dict)
    parity: dict[str, list[Site]] = field(default_factory=dict)
    tests: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def parse_spec(text: str) -> Spec:
    """Read the rules, errata and decisions of a text of SPEC.md."""
    spec = Spec()
    for section, heading, body in _items(text):
        if section.startswith("Rules"):
            _parse_rule(spec, heading, body)
        elif section in ("Errata", "Decisions"):
            _parse_entry(spec, section[0], heading, body)
        elif _RULE.match(heading) or _ENTRY.match(heading):
            spec.problems.append(f"{heading!r} stands in section {section!r}")
    for kind, entries in (("E", list(spec.pins)), ("D", spec.decisions)):
        if entries != [f"{kind}-{number:03d}" for number in range(1, len(entries) + 1)]:
            spec.problems.append(f"{kind}-nnn are not numbered from 001 in steps of 1: {entries}")
    for entry in sorted(set(re.findall(r"\b[ED]-\d{3}\b", text))):
        if entry not in spec.pins and entry not in spec.decisions:
            spec.problems.append(f"{entry} is referred to and does not exist")
    return spec


def _items(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield section, heading and body of everything under a ``###``; fenced blocks are left out."""
    section, heading, body = "", "", list[str]()
    fenced = False
    for line in [*text.splitlines(), "## "]:
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and re.match(r"##?#? |###", line):
            if heading:
                yield section, heading, "\n".join(body)
            if line.startswith("###"):
                heading, body = line, []
            else:
                section, heading = line.lstrip("# "), ""
        elif not fenced:
            body.append(line)


def _parse_rule(spec: Spec, heading: str, body: str) -> None:
    form = _RULE.fullmatch(heading)
    if form is None:
        spec.problems.append(f"{heading!r}: expected '### `group.name`' in a section of rules")
        return
    name = form.group(1)
    first = next(iter(body.strip().splitlines()), "")
    fields = _FIELDS.fullmatch(first)
    if fields is None:
        spec.problems.append(
            f"rule {name}: expected 'Level: ...; Side: ...; Source: ...; Tolerance: ...' "
            f"under the heading, got {first!r}"
        )
        return
    rule = Rule(name, *(value.strip() for value in fields.groups()))
    for what, value, allowed in (
        ("Level", rule.level, LEVELS),
        ("Side", rule.side, SIDES),
        ("Tolerance", rule.tolerance, TOLERANCES),
    ):
        if value not in allowed:
            spec.problems.append(
                f"rule {name}: {what} is {value!r}, expected one of {', '.join(allowed)}"
            )
    if name in spec.rules:
        spec.problems.append(f"rule {name} is there twice")
    spec.rules[name] = rule


def _parse_entry(spec: Spec, kind: str, heading: str, body: str) -> None:
    form = _ENTRY.fullmatch(heading)
    if form is None or not form.group(1).startswith(kind):
        spec.problems.append(f"{heading!r}: expected '### {kind}-nnn: title'")
        return
    entry = form.group(1)
    if entry in spec.pins or entry in spec.decisions:
        spec.problems.append(f"{entry} is there twice")
    if kind == "D":
        spec.decisions.append(entry)
        return
    pin = _PIN.search(body)
    spec.pins[entry] = re.findall(r"`([^`]+)`", pin.group(1)) if pin else []
    if not spec.pins[entry]:
        spec.problems.append(f"{entry} has no '- Pinned by: `path::test`'")


def read_sources(root: Path) -> dict[str, str]:
    """Return the Python sources of the project, by path relative to `root`."""
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for folder in FOLDERS
        for path in sorted((root / folder).rglob("*.py"))
    }


def trace(sources: Mapping[str, str]) -> Trace:
    """Find the rules that docstrings and test markers name.

    Parameters
    ----------
    sources : mapping
        Python source by path, in ``reference/``, ``lorap/``, ``tests/`` or ``parity_tests/``.
    """
    found = Trace()
    for path, source in sources.items():
        tree = ast.parse(source, path)
        folder = path.split("/")[0]
        if folder in ("reference", "lorap"):
            sites = found.reference if folder == "reference" else found.torch
            for site, rule in _docstring_rules(tree, path, found.problems):
                _add(sites, rule, site)
        elif Path(path).name.startswith("test_"):
            sites = found.unit if folder == "tests" else found.parity
            for site, rules in _tests(tree, path, found.problems):
                found.tests.add(f"{path}::{site.name}")
                for rule in rules:
                    _add(sites, rule, site)
    return found


def _add(sites: dict[str, list[Site]], rule: str, site: Site) -> None:
    known = sites.setdefault(rule, [])
    if site not in known:
        known.append(site)
        known.sort()


def _docstring_rules(
    tree: ast.Module, path: str, problems: list[str]
) -> Iterator[tuple[Site, str]]:
    def visit(
        node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
    ) -> Iterator[tuple[Site, str]]:
        site = Site(path, name)
        for named in _NAMED.findall(ast.get_docstring(node) or ""):
            rules = re.findall(r"``([^`]+)``", named)
            if not rules:
                problems.append(f"{path}: {name or 'module'}: no ``rule`` after SPEC:")
            for rule in rules:
                yield site, rule
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from visit(child, f"{name}.{child.name}" if name else child.name)

    yield from visit(tree, "")


def _tests(
    tree: ast.Module, path: str, problems: list[str]
) -> Iterator[tuple[Site, Sequence[str]]]:
    def marked(nodes: Sequence[ast.expr]) -> list[str]:
        rules = []
        for node in (inner for outer in nodes for inner in ast.walk(outer)):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) != "pytest.mark.spec":
                continue
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    rules.append(argument.value)
                else:
                    problems.append(
                        f"{path}:{node.lineno}: pytest.mark.spec takes names of rules as "
                        f"literals, got {ast.unparse(argument)}"
                    )
        return rules

    def visit(
        body: Sequence[ast.stmt], prefix: str, inherited: list[str]
    ) -> Iterator[tuple[Site, Sequence[str]]]:
        own = [
            statement.value
            for statement in body
            if isinstance(statement, ast.Assign)
            and any(ast.unparse(target) == "pytestmark" for target in statement.targets)
        ]
        inherited = inherited + marked(own)
        for node in body:
            if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                rules = inherited + marked(node.decorator_list)
                yield from visit(node.body, f"{prefix}{node.name}::", rules)
            elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield Site(path, prefix + node.name), inherited + marked(node.decorator_list)

    yield from visit(tree.body, "", [])


def table(spec: Spec, found: Trace) -> str:
    """Return the traceability table in Markdown."""
    lines = [
        "| rule | source | reference | torch | unit tests | parity tests |",
        "|---|---|---|---|---|---|",
    ]
    for name, rule in spec.rules.items():
        cells = [
            ", ".join(f"`{site.short}`" for site in sites.get(name, []))
            for sites in (found.reference, found.torch)
        ]
        cells += [_test_cell(sites.get(name, [])) for sites in (found.unit, found.parity)]
        lines.append(f"| `{name}` | {rule.source} | " + " | ".join(c or "-" for c in cells) + " |")
    return "\n".join(lines)


def _test_cell(sites: Sequence[Site]) -> str:
    shown = [f"`{site.short}`" for site in sites[:TESTS_PER_CELL]]
    more = len(sites) - len(shown)
    return ", ".join(shown) + (f" +{more}" if more else "")


def with_table(text: str, new: str) -> str:
    """Return a text of SPEC.md with its table replaced.

    Raises
    ------
    ValueError
        If the markers are not there once each, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected one {BEGIN} and then one {END}")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


def check(text: str, sources: Mapping[str, str]) -> list[str]:
    """Return what is wrong between a text of SPEC.md and the sources; empty if nothing is.

    Parameters
    ----------
    text : str
        Of SPEC.md.
    sources : mapping
        As for ``trace``.
    """
    spec, found = parse_spec(text), trace(sources)
    problems = spec.problems + found.problems
    for where, sites, side in (
        ("reference", found.reference, "reference"),
        ("lorap", found.torch, "torch"),
        ("tests", found.unit, None),
        ("parity_tests", found.parity, None),
    ):
        for name in sorted(sites):
            by = ", ".join(site.short for site in sites[name])
            if name not in spec.rules:
                problems.append(f"{where}: {by}: there is no rule {name}")
            elif side and spec.rules[name].side not in ("both", side):
                problems.append(f"{where}: {by}: rule {name} is of side {spec.rules[name].side}")
    for name, rule in spec.rules.items():
        if rule.level == "MUST":
            problems += [f"rule {name} has no {what}" for what in _missing(rule, found)]
    for entry, pins in spec.pins.items():
        problems += [f"{entry}: there is no test {pin}" for pin in pins if pin not in found.tests]
    try:
        if with_table(text, table(spec, found)) != text:
            problems.append("the table is stale: run python -m parity_tests.traceability --write")
    except ValueError as error:
        problems.append(str(error))
    return problems


def _missing(rule: Rule, found: Trace) -> Iterator[str]:
    if rule.side != "torch" and rule.name not in found.reference:
        yield "reference function"
    if rule.side != "reference" and rule.name not in found.torch:
        yield "torch function"
    if rule.side == "both" and rule.name not in found.parity:
        yield "parity test"
    if rule.name not in found.unit and rule.name not in found.parity:
        yield "test"


def main(argv: Sequence[str] | None = None, root: Path | None = None) -> int:
    """Check SPEC.md; return the exit status, 1 where something is wrong.

    Parameters
    ----------
    argv : sequence of str, optional
        Of the command line.
    root : Path, optional
        Folder of SPEC.md; the project's by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m parity_tests.traceability", description=__doc__
    )
    parser.add_argument("--write", action="store_true", help="write the table into SPEC.md first")
    arguments = parser.parse_args(argv)
    root = root or Path(__file__).resolve().parents[1]
    path, sources = root / "SPEC.md", read_sources(root)
    text = path.read_text(encoding="utf-8")
    if arguments.write:
        text = with_table(text, table(parse_spec(text), trace(sources)))
        path.write_text(text, encoding="utf-8")
    problems = check(text, sources)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
