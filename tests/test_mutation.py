"""The tool behind ``make mutants``: which changes it makes, and what it makes of the tests."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from parity_tests.mutation import generate, mutants, results
from parity_tests.mutation.generate import Mutant
from parity_tests.mutation.project import LORAP
from parity_tests.mutation.runner import Baseline, Result, marked

NOTES = LORAP.root / LORAP.notes


def changed(source: str, kind: str) -> list[str]:
    """Return the changed lines of the mutants of one kind."""
    return [m.now for m in generate.mutants("m", source) if m.name.split(":")[2] == kind]


def body(line: str) -> str:
    return f"def f(a, b, x, r):\n    {line}\n"


# --- what is changed ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "kind", "expected"),
    [
        ("return a + b", "add-to-sub", ["return a - b"]),
        ("return a * b", "mult-to-div", ["return a / b"]),
        ("return a ** 2", "pow-to-mult", ["return a * 2"]),
        ("return a ** 2", "drop-right", ["return a"]),
        ("return a - b", "swap-operands", ["return b - a"]),
        ("return a @ b", "swap-operands", ["return b @ a"]),
        ("return a + b", "swap-operands", []),
        ("return a * b", "drop-left", ["return b"]),
        ("a += b", "add-to-sub", ["a -= b"]),
        ("a += b", "assign", ["a = b"]),
        ("a += b", "drop-statement", ["pass"]),
        ("a[0] = b", "drop-statement", ["pass"]),
        ("a = b", "drop-statement", ["pass"]),
        ("c = b", "drop-statement", []),
        ("raise ValueError(f'{a} ' + 'is wrong')", "drop-statement", ["pass"]),
        ("return a < b", "lt-to-lte", ["return a <= b"]),
        ("return a < b", "lt-to-gte", ["return a >= b"]),
        ("return a == b", "eq-to-noteq", ["return a != b"]),
        ("return a in b", "in-to-notin", ["return a not in b"]),
        ("return a and b", "and-to-or", ["return a or b"]),
        ("return a and b", "drop-operand", ["return b", "return a"]),
        ("return not a", "drop-sign", ["return a"]),
        ("return -a", "drop-sign", ["return a"]),
        ("return a if x else b", "condition-true", ["return a"]),
        ("return a if x else b", "condition-false", ["return b"]),
        ("if x: return a", "condition-true", ["if True: return a"]),
        ("while x: a()", "condition-false", ["while False: a()"]),
        ("return [y for y in a if y]", "condition-false", ["return [y for y in a if False]"]),
        ("for y in a: b(y)", "no-pass", ["for y in []: b(y)"]),
        ("for y in a: b(y)", "one-pass", ["for y in list(a)[:1]: b(y)"]),
        ("return a[3]", "plus-one", ["return a[4]"]),
        ("return a[3]", "minus-one", ["return a[2]"]),
        ("return 0.5 * a", "number", ["return 1.0 * a"]),
        ("return 0.0", "number", ["return 1.0"]),
        ("return f(True)", "not", ["return f(False)"]),
        ("return a['k']", "string", ["return a['k~']"]),
        ("return f'{a}.k'", "string", ["return f'{a}.k~'"]),
        ("return np.sum(a, axis=0)", "axis", ["return np.sum(a, axis=1)"]),
        ("return np.sum(a, axis=-1)", "drop-keyword", ["return np.sum(a)"]),
        ("return a.sum(dim=1)", "axis", ["return a.sum(dim=0)"]),
        ("return a.sum()", "sum-to-mean", ["return a.mean()"]),
        ("return np.max(a)", "max-to-min", ["return np.min(a)"]),
        ("return max(a, b)", "max-to-min", ["return min(a, b)"]),
        ("return max(a, b)", "drop-argument", ["return b", "return a"]),
        ("return int(a)", "int-to-round", ["return round(a)"]),
        ("return int(a)", "int-to-ceil", ["return int(-(-a // 1))"]),
        ("return int((a > b).sum())", "int-to-round", []),
        ("return int(np.sum(a > b))", "int-to-ceil", []),
        ("return ceil(a)", "ceil-to-floor", ["return int(a)"]),
        ("return np.sqrt(a)", "drop-call", ["return a"]),
        ("return np.asarray(a)", "drop-call", []),
        ("return np.asarray(a, dtype=b)", "drop-call", ["return a"]),
        ("return a.square()", "drop-method", ["return a"]),
        ("return np.square(a)", "drop-method", []),
        ("return f(a, b)", "swap-arguments", ["return f(b, a)"]),
        ("return f(*a, b)", "swap-arguments", []),
        ("return max(a, b)", "swap-arguments", []),
        ("return np.argsort(a, kind='stable')", "descending",
         ["return np.argsort(-a, kind='stable')"]),
        ("return np.argsort(a, kind='stable')", "string",
         ["return np.argsort(a, kind='quicksort')"]),
        ("return a.sort()", "descending", ["return (-a).sort()"]),
        ("return np.linalg.norm(a)", "spectral-norm", ["return np.linalg.norm(a, 2)"]),
        ("return np.linalg.norm(a, 1)", "spectral-norm", []),
        ("return a.T", "drop-transpose", ["return a"]),
        ("return np.float64", "float64-to-float32", ["return np.float32"]),
        ("return a[:, r]", "swap-axes", ["return a[r, :]"]),
        ("return a[:r]", "other-part", ["return a[r:]"]),
        ("return a[:r]", "bound-plus-one", ["return a[:r + 1]"]),
        ("return a[:r]", "bound-minus-one", ["return a[:r - 1]"]),
        ("return a[x:r]", "drop-bound", ["return a[:r]", "return a[x:]"]),
        ("return a, b", "swap-returned", ["return (b, a)"]),
    ],
)  # fmt: skip
def test_changes(line: str, kind: str, expected: list[str]) -> None:
    assert changed(body(line), kind) == expected


def test_names_that_belong_together_are_taken_for_each_other() -> None:
    by_type = "def f(up: A, gate: A, d: int):\n    return g(up, gate, d)\n"
    assert changed(by_type, "twin-name") == ["return g(gate, gate, d)", "return g(up, up, d)"]
    unpacked = "def f(p):\n    low, high = p\n    return p[low:high]\n"
    assert changed(unpacked, "twin-name") == ["return p[high:high]", "return p[low:low]"]
    literal = 'K = Literal["l1", "l2"]\ndef f(a, k: K = "l2"):\n    return a if k == "l1" else 0\n'
    assert changed(literal, "string") == [
        "def f(a, k: K = 'l1'):",
        "return a if k == 'l2' else 0",
    ]


def test_fields_of_one_type_are_taken_for_each_other() -> None:
    first = "@dataclass\nclass A:\n    x: int\n    y: int\n    z: float\n"
    second = "@dataclass\nclass B:\n    x: int\n    w: int\nclass C:\n    x: int\n    v: int\n"
    twins = generate.twin_fields([first, second])
    assert twins == {"x": ["y", "w"], "y": ["x"], "w": ["x"]}
    found = generate.mutants("m", "def f(a):\n    return a.x\n", twins)
    assert [m.now for m in found] == ["return a.y", "return a.w"]


def test_parentheses_keep_the_meaning() -> None:
    source = body("return a ** 2 * (b - x)")
    for mutant in generate.mutants("m", source):
        assert mutant.now.count("(") == mutant.now.count(")")
    assert changed(source, "sub-to-add") == ["return a ** 2 * (b + x)"]
    assert changed(source, "swap-operands") == [
        "return 2 ** a * (b - x)",
        "return a ** 2 * (x - b)",
    ]
    assert changed(body("return (a + b) * x"), "mult-to-div") == ["return (a + b) / x"]
    assert changed(body("return a * -b ** 2"), "drop-sign") == ["return a * b ** 2"]
    assert changed(body("return -(a + b) * x"), "drop-sign") == ["return (a + b) * x"]


def test_what_is_no_code_is_left_alone() -> None:
    source = '''
        """A module: 1 + 1."""
        from a import b
        Weights = Mapping[str, Array]
        Kind = Literal["x", "y"]
        def f(a: tuple[int, 1]) -> Array[2]:
            """Return 1 + 1."""
            assert a > 0, "not 1"
            c: Array[3] = a
            return c
    '''
    assert generate.mutants("m", textwrap.dedent(source)) == []


def test_constants_of_the_module_and_defaults_of_a_class_are_changed() -> None:
    source = "SIZE = 3 << 4\nclass A:\n    x: float = 3.0\n"
    names = [mutant.name for mutant in generate.mutants("m", source)]
    assert "m:-:lshift-to-rshift:1" in names
    assert "m:A:number:1" in names


def test_names_do_not_depend_on_lines_and_count_within_a_function() -> None:
    source = "def f(a):\n    return a + 1\n"
    source += "def g(a):\n    def h(b):\n        return b + 1\n    return h\n"
    plain = [(m.name, m.change) for m in generate.mutants("m", source)]
    spaced = source.replace("def g", "# A comment.\n\n\ndef g").replace(
        "    return a + 1", '    """A docstring."""\n\n    return a + 1'
    )
    assert [(m.name, m.change) for m in generate.mutants("m", spaced)] == plain
    assert [name for name, _ in plain if "add-to-sub" in name] == [
        "m:f:add-to-sub:1",
        "m:g.h:add-to-sub:1",
    ]
    twice = generate.mutants("m", "def f(a):\n    return a + 1 + 2\n")
    assert [m.name for m in twice if "add-to-sub" in m.name] == [
        "m:f:add-to-sub:1",
        "m:f:add-to-sub:2",
    ]


def test_letters_outside_ascii_do_not_shift_the_change() -> None:
    source = 'def f(a):\n    """Größe."""\n    b = "µ" + a\n    return b - 1  # für später\n'
    assert changed(source, "sub-to-add") == ["return b + 1  # für später"]


def test_difference_joins_the_lines_that_differ() -> None:
    assert generate.difference("a\nb\n  c\nd\n", "a\n  x\nd\n") == ("b c", "x")
    assert generate.difference("a\na\n", "a\na\na\n") == ("", "a")


# --- of this project ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours() -> list[Mutant]:
    written = mutants.read_written((NOTES / "written.toml").read_text(encoding="utf-8"))
    return mutants.all_mutants(LORAP, written)


def test_every_module_of_the_math_is_mutated(ours: list[Mutant]) -> None:
    modules = {mutant.module for mutant in ours}
    for folder in ("reference", "lorap/ops"):
        for path in (LORAP.root / folder).glob("*.py"):
            assert LORAP.name(path) in modules or path.stem == "__init__"
    assert LORAP.imported_as("reference.budget") == "lorap_reference.budget"
    assert LORAP.imported_as("lorap.ops.budget") == "lorap.ops.budget"
    assert LORAP.imported_as("lorap.pipeline") == "lorap.pipeline"


def test_no_mutant_is_there_twice(ours: list[Mutant]) -> None:
    """Nor is a written one made from the syntax tree as well."""
    assert len({(mutant.module, mutant.source) for mutant in ours}) == len(ours)
    assert len({mutant.name for mutant in ours}) == len(ours)


def test_every_explanation_is_of_a_mutant_and_has_a_reason(ours: list[Mutant]) -> None:
    explained = mutants.read_equivalents((NOTES / "equivalent.toml").read_text(encoding="utf-8"))
    assert mutants.stale(ours, explained) == []
    assert all(entry.why.endswith(".") for entry in explained.values())


# --- written ones and explanations --------------------------------------------------------------

SOURCE = "def f(a):\n    return a + 1\n\ndef g(a):\n    return a + 1\n"


def test_a_written_bug_stands_in_its_function() -> None:
    (bug,) = mutants.read_written(
        '[[mutant]]\nmodule = "m"\nfunction = "g"\ntitle = "less"\nbug = "wrong sign"\n'
        'old = "a + 1"\nnew = "a - 1"\n'
    )
    mutant = bug.mutant(SOURCE)
    assert mutant.name == "m:g:less"
    assert (mutant.was, mutant.now) == ("return a + 1", "return a - 1")
    assert mutant.source == SOURCE.removesuffix("a + 1\n") + "a - 1\n"


@pytest.mark.parametrize(
    ("function", "old", "message"),
    [
        ("f", "a + 2", "m:f:t: 0 times in f, expected once: a [+] 2"),
        ("f", "a", "m:f:t: 2 times in f"),
        ("h", "a + 1", "there is no function h"),
    ],
)
def test_a_written_bug_that_does_not_fit_is_refused(function: str, old: str, message: str) -> None:
    bug = mutants.Written("m", function, "t", "wrong", old, "0")
    with pytest.raises(ValueError, match=message):
        bug.mutant(SOURCE)


def test_explanations_that_have_become_untrue_are_named() -> None:
    found = generate.mutants("m", SOURCE)
    explained = mutants.read_equivalents(
        '["m:f:add-to-sub:1"]\nwas = "return a + 1"\nnow = "return a - 1"\nwhy = "No."\n'
        '["m:f:add-to-sub:2"]\nwas = "return a + 1"\nnow = "return a - 1"\nwhy = "No."\n'
        '["m:g:add-to-sub:1"]\nwas = "return a + 2"\nnow = "return a - 2"\nwhy = "No."\n'
    )
    assert mutants.stale(found, explained) == [
        "m:f:add-to-sub:2: there is no such mutant",
        "m:g:add-to-sub:1: it is now 'return a + 1' -> 'return a - 1'",
    ]


# --- results ------------------------------------------------------------------------------------


def mutant(name: str) -> Mutant:
    module, function = name.split(":")[:2]
    return Mutant(name, module, function, "", "it's", "its")


def result(name: str, status: str) -> Result:
    return Result(name, mutant(name).change, status)


def test_the_table_counts_per_module() -> None:
    names = ["a:f:k:1", "a:f:k:2", "a:f:k:3", "b:f:k:1", "b:f:k:2"]
    of = dict(zip(names, ("killed", "survived", "hung", "survived", "killed"), strict=True))
    explained = {"a:f:k:2": mutants.Equivalent("", "", "")}
    rows = results.table(
        [mutant(name) for name in names], {n: result(n, s) for n, s in of.items()}, explained
    )
    assert rows.splitlines() == [
        "| module | mutants | killed | equivalent | survivors | rate |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| `a` | 3 | 2 | 1 | 0 | 100.0% |",
        "| `b` | 2 | 1 | 0 | 1 | 50.0% |",
        "| all | 5 | 3 | 1 | 1 | 75.0% |",
    ]


def test_results_are_read_back_but_for_a_line_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "results.jsonl"
    run = results.Results("digest", Baseline({"t": 1.0}, {"a:f": ["t"]}))
    results.start(path, run)
    results.append(path, result("a:f:k:1", "survived"))
    results.append(path, result("a:f:k:1", "killed"))
    results.append(path, result("a:f:k:2", "killed"))
    path.write_text(path.read_text() + '{"mutant": "a:f')
    read = results.read(path)
    assert (read.digest, read.baseline) == ("digest", run.baseline)
    assert {name: r.status for name, r in read.of.items()} == {
        "a:f:k:1": "killed",
        "a:f:k:2": "killed",
    }
    assert results.read(tmp_path / "none").of == {}


def test_a_survivor_is_printed_as_an_explanation_without_a_reason() -> None:
    (name, entry), *_ = mutants.read_equivalents(results.entry(mutant("a:f:k:1"))).items()
    assert (name, entry.was, entry.now, entry.why) == ("a:f:k:1", "it's", "its", "")


def test_the_tests_of_a_mutant_are_those_that_reach_it_the_quick_ones_first() -> None:
    baseline = Baseline(
        {"x::slow": 2.0, "x::quick": 1.0, "y::other": 0.5, "y::none": 3.0, "z::far": 0.1},
        {"a:f": ["x::slow", "x::quick"], "a:g": ["y::other"], "a:h": [], "ab:f": ["z::far"]},
    )
    assert baseline.tests_of(mutant("a:f:k:1")) == ["x::quick", "x::slow"]
    assert baseline.tests_of(mutant("a:h:k:1")) == []
    # Of what is no function, all tests of the files that reach any of the module's.
    everywhere = ["y::other", "x::quick", "x::slow", "y::none"]
    assert baseline.tests_of(mutant("a:-:k:1")) == everywhere
    assert baseline.tests_of(mutant("a:C:k:1")) == everywhere


def test_a_mark_at_the_head_of_each_function() -> None:
    source = """
def f():
    '''Doc.'''
    return 1

class A:
    def g(self):
        return 2
"""
    tree, keys = marked("m", source)
    assert keys == ["m:f", "m:A.g"]
    reached: set[str] = set()
    names: dict[str, Any] = {"__reached__": reached}
    exec(compile(tree, "m", "exec"), names)
    assert names["f"].__doc__ == "Doc."
    assert reached == set()
    assert (names["f"](), names["A"]().g()) == (1, 2)
    assert reached == set(keys)


# --- on a small project -------------------------------------------------------------------------

MATHS = """
def area(width, height):
    return width * height

def countdown(n):
    while n > 0:
        n = n - 1
    return n

def unused(x):
    return -x
"""

TESTS = """
from renamed.maths import area, countdown

def test_area():
    assert area(2, 3) == 6

def test_countdown():
    assert countdown(3) == 0
"""

SCRIPT = """
import sys
from pathlib import Path
from parity_tests.mutation import runner
from parity_tests.mutation.__main__ import main
from parity_tests.mutation.project import Project

runner.PATIENCE = 0.5
project = Project(Path("."), {"source": "renamed"}, ["tests"], "notes")
sys.exit(main(sys.argv[1:], project))
"""


class Small:
    """A project of one module, which is imported under another name than its folder's."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, text in {
            "source/__init__.py": "",
            "source/maths.py": MATHS,
            "tests/test_maths.py": TESTS,
            "notes/written.toml": "",
            "notes/equivalent.toml": "",
            "run.py": SCRIPT,
        }.items():
            self.write(name, text)
        (root / "path").mkdir()
        (root / "path" / "renamed").symlink_to(root / "source")

    def write(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text, encoding="utf-8")

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        path = os.pathsep.join([str(self.root / "path"), str(LORAP.root)])
        return subprocess.run(
            [sys.executable, "run.py", *arguments],
            cwd=self.root,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def results(self) -> dict[str, Result]:
        return results.read(self.root / "build" / "mutants.jsonl").of


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return Small(tmp_path)


def test_a_run_and_another_one(small: Small) -> None:
    small.write(
        "notes/written.toml",
        '[[mutant]]\nmodule = "source.maths"\nfunction = "area"\ntitle = "half"\nbug = "triangle"\n'
        'old = "width * height"\nnew = "width * height / 2"\n',
    )
    run = small.run("--jobs", "3")
    assert run.returncode == 1, run.stderr
    of = small.results()
    assert of["source.maths:area:mult-to-div:1"].status == "killed"
    assert of["source.maths:area:mult-to-div:1"].test == "tests/test_maths.py::test_area"
    assert of["source.maths:area:half"].message == "AssertionError"
    assert of["source.maths:countdown:gt-to-gte:1"].status == "killed"
    assert of["source.maths:countdown:sub-to-add:1"].status == "hung"
    assert of["source.maths:countdown:sub-to-add:1"].test == "tests/test_maths.py::test_countdown"
    survivors = [name for name, r in of.items() if r.status == "survived"]
    assert survivors == ["source.maths:unused:drop-sign:1"]
    assert of[survivors[0]].message == "no test reaches it"
    assert "| 0 | 1 |" in run.stdout.splitlines()[-1]
    assert "[\"source.maths:unused:drop-sign:1\"]\nwas = 'return -x'" in run.stdout

    # Nothing has changed, so nothing is run again.
    again = small.run()
    assert again.returncode == 1
    assert "tests pass on the unchanged code" not in again.stdout
    assert again.stdout.splitlines()[-1] == run.stdout.splitlines()[-1]

    # An explanation is not part of what results depend on.
    small.write(
        "notes/equivalent.toml",
        "['source.maths:unused:drop-sign:1']\nwas = 'return -x'\nnow = 'return x'\nwhy = 'No.'\n"
        "['source.maths:area:mult-to-div:1']\n"
        "was = 'return width * height'\nnow = 'return width / height'\nwhy = 'No.'\n",
    )
    explained = small.run()
    assert explained.returncode == 1
    assert "source.maths:area:mult-to-div:1: killed by tests/test_maths.py" in explained.stderr
    assert "| 1 | 0 | 100.0% |" in explained.stdout.splitlines()[-1]

    # With a test more, what was killed counts and what survived is run again.
    small.write("tests/test_more.py", "from renamed.maths import unused\ndef test_unused():\n"
                "    assert unused(1) == -1\n")  # fmt: skip
    more = small.run("--keep-killed")
    assert "1 of 1, 0 survive" in more.stdout
    assert small.results()["source.maths:unused:drop-sign:1"].status == "killed"


def test_one_mutant_and_a_list(small: Small) -> None:
    run = small.run("--mutant", "source.maths:area:mult-to-div:1")
    assert run.returncode == 0, run.stderr
    assert "-    return width * height\n+    return width / height\n" in run.stdout
    assert "1 failed" in run.stdout
    unreached = small.run("--mutant", "source.maths:unused:drop-sign:1")
    assert unreached.stdout.splitlines()[-1] == "no test reaches it"
    assert "there is no mutant m:f" in small.run("--mutant", "m:f").stderr
    listed = small.run("--list", "--module", "source").stdout
    assert "source.maths:area:mult-to-div:1\n    return width * height\n" in listed
    assert "no mutants in sour" in small.run("--module", "sour").stderr


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tests/test_more.py", "def test_x():\n    assert False\n", "tests do not pass"),
        ("tests/test_more.py", "import nothing\n", "No module named 'nothing'"),
        ("source/more.py", "def f(x):\n    return -x\n", "no test imports renamed.more"),
        ("path/sitecustomize.py", "import renamed\n", "loaded before the first fork: renamed"),
        ("tests/conftest.py", "import sys\nsys.path.insert(0, 'other')\n", "is imported from"),
    ],
)
def test_what_would_make_all_mutants_look_killed_ends_the_run(
    file: str, text: str, message: str, small: Small
) -> None:
    small.write("other/renamed/__init__.py", "")
    small.write(file, text)
    run = small.run()
    assert run.returncode == 1
    assert message in run.stderr
    assert not (small.root / "build").exists()


def test_the_command_line_of_this_project() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "parity_tests.mutation", "--list", "--module", "lorap.ops.pruning"],
        cwd=LORAP.root,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "lorap.ops.pruning:kept_channels:topk" in run.stdout
    assert run.stderr == ""
