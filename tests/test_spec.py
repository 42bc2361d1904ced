import ast
import doctest
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import lorap_reference as ref
from lorap.ops import importance, lowrank, pruning, statistics
from parity_tests import traceability

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "SPEC.md").read_text(encoding="utf-8")

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CLAIM = re.compile(r"`([^`\n]+)` \(= ((?:[^()]|\([^()]*\))+)\)")


def line_of(position: int) -> int:
    return TEXT.count("\n", 0, position) + 1


BLOCKS = {f"line-{line_of(m.start())}": m.group(1) for m in BLOCK.finditer(TEXT)}
PREAMBLE = next(iter(BLOCKS.values()))
CLAIMS = [
    pytest.param(m.group(1), m.group(2), id=f"line-{line_of(m.start())}")
    for m in CLAIM.finditer(BLOCK.sub(lambda m: "\n" * m.group().count("\n"), TEXT))
]


def run_block(source: str, names: dict[str, Any]) -> list[str]:
    """Run a block in doctest style in `names`; return what doctest has to complain of."""
    test = doctest.DocTestParser().get_doctest(source, names, "SPEC.md", "SPEC.md", 0)
    assert test.examples
    complaints: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=complaints.append, clear_globs=False)
    names.update(test.globs)
    return complaints


def names_of_examples() -> dict[str, Any]:
    names: dict[str, Any] = {}
    assert run_block(PREAMBLE, names) == []
    assert {"ref", "np", "torch", "budget", "lowrank"} <= set(names)
    return names


# --- SPEC.md itself -----------------------------------------------------------------------------


def test_spec_code_tests_and_table_agree() -> None:
    assert traceability.check(TEXT, traceability.read_sources(ROOT)) == []


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_example(block: str) -> None:
    assert run_block(block, names_of_examples()) == []


@pytest.mark.parametrize(("expression", "value"), CLAIMS)
def test_claim(expression: str, value: str) -> None:
    assert eval(expression, names_of_examples()) == ast.literal_eval(value)


def test_examples_and_claims_are_found() -> None:
    assert len(BLOCKS) == TEXT.count("```python") > 25
    assert len(CLAIMS) == TEXT.count(" (= ") > 6


def test_wrong_example_fails() -> None:
    assert run_block(">>> 1 + 1\n2\n", {}) == []
    assert "Expected:\n    3" in "".join(run_block(">>> 1 + 1\n3\n", {}))


def test_rules_that_can_have_an_example_have_one() -> None:
    # An oracle shown elsewhere, what needs a whole model, and what needs a configuration.
    without = {
        "awsvd.solution",
        "budget.channels",
        "budget.overrides",
        "algorithm.mha",
        "algorithm.ffn",
    }
    found = set()
    for part in re.split(r"^### ", TEXT, flags=re.MULTILINE)[1:]:
        name = part.split("\n")[0].strip("`")
        if "```python" in part.split("\n## ")[0]:
            found.add(name)
    rules = set(traceability.parse_spec(TEXT).rules)
    assert rules - found == without


# --- the check, on a small spec -----------------------------------------------------------------

SMALL = """# Small
## Rules: a
### `a.both`

Level: MUST; Side: both; Source: Eq. (1), E-001; Tolerance: exact

```python
### `a.not-a-heading`
```
### `a.oracle`

Level: MUST; Side: reference; Source: Eq. (2), D-001; Tolerance: sum

### `a.torch-only`

Level: MUST; Side: torch; Source: D-001; Tolerance: sum

### `a.free`

Level: MAY; Side: both; Source: Eq. (3); Tolerance: sum

## Errata
### E-001: wrong sign

- Pinned by: `tests/test_a.py::test_pin`

## Decisions
### D-001: silent

Why.

## Traceability
<!-- traceability:begin -->
<!-- traceability:end -->
"""

SOURCES = {
    "reference/a.py": (
        'def f():\n    """F.\n\n    SPEC: ``a.both``, and ``a.oracle``. As ``f``.\n    """\n'
    ),
    "lorap/ops/a.py": (
        '"""Module (SPEC: ``a.torch-only``)."""\n'
        'class C:\n    def f(self):\n        """F. SPEC: ``a.both``: so."""\n'
    ),
    "tests/test_a.py": (
        "import pytest\n"
        "@pytest.mark.spec('a.oracle')\ndef test_pin(): ...\n"
        "@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.spec('a.torch-only'))])\n"
        "def test_torch(x): ...\n"
    ),
    "parity_tests/test_a.py": (
        "import pytest\n"
        "@pytest.mark.spec('a.both')\nclass TestBoth:\n    def test_it(self): ...\n"
        "    def test_more(self): ...\n    def test_most(self): ...\n"
        "def test_unmarked(): ...\n"
    ),
    "parity_tests/strategies.py": "def test_like_name(): ...\n",
}


def problems_of(text: str, sources: Mapping[str, str]) -> list[str]:
    """Check a spec whose table is fresh."""
    rows = traceability.table(traceability.parse_spec(text), traceability.trace(sources))
    return traceability.check(traceability.with_table(text, rows), sources)


def test_small_spec_is_right() -> None:
    assert problems_of(SMALL, SOURCES) == []


def test_table_of_small_spec() -> None:
    rows = traceability.table(traceability.parse_spec(SMALL), traceability.trace(SOURCES))
    assert rows.splitlines()[2:] == [
        "| `a.both` | Eq. (1), E-001 | `a.f` | `a.C.f` | - | "
        "`test_a::TestBoth::test_it`, `test_a::TestBoth::test_more` +1 |",
        "| `a.oracle` | Eq. (2), D-001 | `a.f` | - | `test_a::test_pin` | - |",
        "| `a.torch-only` | D-001 | - | `a` | `test_a::test_torch` | - |",
        "| `a.free` | Eq. (3) | - | - | - | - |",
    ]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("`a.free`", "`a.both`", "rule a.both is there twice"),
        ("`a.free`", "a.free", "'### a.free': expected '### `group.name`' in a section of rules"),
        ("`a.free`", "`free`", "'### `free`': expected '### `group.name`' in a section of rules"),
        ("`a.free`", "`A.Free`", "'### `A.Free`': expected '### `group.name`'"),
        ("Level: MAY; Side: both", "Side: both", "rule a.free: expected 'Level: ...; Side: ..."),
        ("Level: MAY", "Level: CAN", "rule a.free: Level is 'CAN', expected one of MUST"),
        ("Side: torch", "Side: left", "rule a.torch-only: Side is 'left', expected one of both"),
        ("Tolerance: exact", "Tolerance: 1e-3", "rule a.both: Tolerance is '1e-3'"),
        ("### `a.oracle`", "### `a.new`", "reference: a.f: there is no rule a.oracle"),
        ("Side: reference", "Side: torch", "reference: a.f: rule a.oracle is of side torch"),
        ("Side: torch", "Side: reference", "lorap: a: rule a.torch-only is of side reference"),
        ("Level: MAY", "Level: MUST", "rule a.free has no reference function"),
        ("Level: MAY", "Level: MUST", "rule a.free has no torch function"),
        ("Level: MAY", "Level: MUST", "rule a.free has no parity test"),
        ("E-001: wrong sign", "E-002: wrong sign", "E-nnn are not numbered from 001"),
        ("E-001: wrong sign", "E-1: wrong sign", "'### E-1: wrong sign': expected '### E-nnn"),
        ("E-001: wrong sign", "D-002: wrong sign", "'### D-002: wrong sign': expected '### E-nnn"),
        ("### D-001: silent", "### D-001: silent\n### D-001: silent", "D-001 is there twice"),
        ("Why.", "As D-007.", "D-007 is referred to and does not exist"),
        ("::test_pin", "::test_pain", "E-001: there is no test tests/test_a.py::test_pain"),
        ("- Pinned by: ", "See ", "E-001 has no '- Pinned by: `path::test`'"),
        ("# Small\n", "# Small\n### `a.early`\n", "'### `a.early`' stands in section 'Small'"),
    ],
)
def test_wrong_spec_is_seen(old: str, new: str, problem: str) -> None:
    assert SMALL.count(old) == 1
    problems = problems_of(SMALL.replace(old, new), SOURCES)
    assert any(problem in found for found in problems), problems


@pytest.mark.parametrize(
    ("part", "before", "after", "problem"),
    [
        ("reference", "``a.both``", "``a.boht``", "reference: a.f: there is no rule a.boht"),
        ("reference", "``a.both``", "``a.boht``", "rule a.both has no reference function"),
        ("reference", "``a.oracle``", "``a.both``", "rule a.oracle has no reference function"),
        ("reference", "``a.both``, and ``a.oracle``", "a.both", "a.py: f: no ``rule`` after SPEC:"),
        ("lorap", "``a.both``", "``a.free``", "rule a.both has no torch function"),
        ("lorap", "``a.torch-only``", "``a.both``", "rule a.torch-only has no torch function"),
        ("lorap", "``a.both``", "``Nonsense``", "lorap: a.C.f: there is no rule Nonsense"),
        ("tests", "'a.oracle'", "'a.nought'", "tests: test_a::test_pin: there is no rule a.nought"),
        ("tests", "'a.oracle'", "'a.nought'", "rule a.oracle has no test"),
        ("tests", "'a.torch-only'", "'a.free'", "rule a.torch-only has no test"),
        ("tests", "'a.oracle'", "ORACLE", "takes names of rules as literals, got ORACLE"),
        ("tests", "test_pin", "pin", "E-001: there is no test tests/test_a.py::test_pin"),
        ("parity_tests/test", "'a.both'", "'a.free'", "rule a.both has no parity test"),
        ("parity_tests/test", "'a.both'", "'x.y'", "there is no rule x.y"),
        ("parity_tests/test", "TestBoth", "Both", "rule a.both has no parity test"),
    ],
)
def test_wrong_sources_are_seen(part: str, before: str, after: str, problem: str) -> None:
    (path,) = (path for path in SOURCES if path.startswith(part))
    assert before in SOURCES[path]
    problems = problems_of(SMALL, SOURCES | {path: SOURCES[path].replace(before, after)})
    assert any(problem in found for found in problems), problems


def test_stale_table_is_seen() -> None:
    stale = ["the table is stale: run python -m parity_tests.traceability --write"]
    assert traceability.check(SMALL, SOURCES) == stale
    rows = traceability.table(traceability.parse_spec(SMALL), traceability.trace(SOURCES))
    fresh = traceability.with_table(SMALL, rows)
    assert traceability.check(fresh, SOURCES) == []
    renamed = SOURCES | {
        "lorap/ops/a.py": SOURCES["lorap/ops/a.py"].replace("def f", "def g"),
    }
    assert traceability.check(fresh, renamed) == stale


@pytest.mark.parametrize("marker", [traceability.BEGIN, traceability.END])
def test_lost_marker_is_seen(marker: str) -> None:
    problems = traceability.check(SMALL.replace(marker, ""), SOURCES)
    assert problems == [f"expected one {traceability.BEGIN} and then one {traceability.END}"]


def test_markers_of_modules_count() -> None:
    source = "import pytest\npytestmark = [pytest.mark.spec('a.b')]\ndef test_x(): ...\n"
    found = traceability.trace({"tests/test_b.py": source})
    assert found.unit == {"a.b": [traceability.Site("tests/test_b.py", "test_x")]}


def test_command_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, source in (SOURCES | {"SPEC.md": SMALL}).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source, encoding="utf-8")
    assert traceability.main([], tmp_path) == 1
    assert "stale" in capsys.readouterr().err
    assert (tmp_path / "SPEC.md").read_text(encoding="utf-8") == SMALL
    assert traceability.main(["--write"], tmp_path) == 0
    assert traceability.main([], tmp_path) == 0
    assert capsys.readouterr().err == ""
    assert "| `a.both` |" in (tmp_path / "SPEC.md").read_text(encoding="utf-8")


# --- the tests that pin the errata --------------------------------------------------------------


def products(W: NDArray[np.float64], scale: NDArray[np.float64], r: int) -> list[Any]:
    L, R, _ = ref.lowrank.awsvd(W, scale, r)
    left, right, _ = lowrank.awsvd(torch.tensor(W), torch.tensor(scale), r)
    return [L @ R, (left @ right).numpy()]


@pytest.mark.spec("awsvd.scale", "awsvd.objective")
def test_equations_6_and_7_have_different_minimisers() -> None:
    W, x = np.diag([3.0, 1.0]), np.array([1.0, 4.0])
    eq7, eq6 = ref.lowrank.column_scale(x), ref.lowrank.column_scale(x, "eq6")
    for weighting, scale in (("eq7", eq7), ("eq6", eq6)):
        twin = lowrank.column_scale(torch.tensor(x), weighting)  # type: ignore[arg-type]
        assert twin.tolist() == scale.tolist()
    for by_7, by_6 in zip(products(W, eq7, 1), products(W, eq6, 1), strict=True):
        np.testing.assert_allclose(by_7, np.diag([0.0, 1.0]), atol=1e-12)
        np.testing.assert_allclose(by_6, np.diag([3.0, 0.0]), atol=1e-12)

        def as_printed_in_6(W_hat: NDArray[np.float64]) -> float:
            return float(np.sum((W - W_hat) ** 2 * x))

        assert as_printed_in_6(by_6) == pytest.approx(4)
        assert as_printed_in_6(by_7) == pytest.approx(9)
        assert ref.lowrank.weighted_error(W, by_7, eq7) == pytest.approx(9)
        assert ref.lowrank.weighted_error(W, by_6, eq7) == pytest.approx(16)
        assert ref.lowrank.weighted_error(W, by_6, eq6) == pytest.approx(as_printed_in_6(by_6))


@pytest.mark.spec("awsvd.objective", "awsvd.product")
def test_frobenius_norm_is_minimised() -> None:
    A = np.diag([3.0, 1.0, 0.5])
    other = np.diag([3.5, 0.0, 0.0])
    for product in products(A, np.ones(3), 1):
        assert np.linalg.norm(A - product, 2) == pytest.approx(np.linalg.norm(A - other, 2))
        assert ref.lowrank.weighted_error(A, product, np.ones(3)) == pytest.approx(1.25)
        assert ref.lowrank.weighted_error(A, other, np.ones(3)) == pytest.approx(1.5)

    rng = np.random.default_rng(0)
    W, scale = rng.standard_normal((5, 4)), np.array([0.1, 1.0, 2.0, 5.0])
    tail = float(np.sum(np.linalg.svd(W * scale, compute_uv=False)[2:] ** 2))
    for product in products(W, scale, 2):
        assert ref.lowrank.weighted_error(W, product, scale) == pytest.approx(tail)
    for _ in range(100):
        # The best R for a random L, so that the candidates are good ones.
        Q = np.linalg.qr(rng.standard_normal((5, 2)))[0]
        assert ref.lowrank.weighted_error(W, Q @ (Q.T @ W), scale) > tail


@pytest.mark.spec("lowrank.svd")
def test_singular_values_and_not_eigenvalues_are_kept() -> None:
    W = np.diag([-3.0, 1.0])
    assert np.max(np.linalg.eigvals(W)) == 1
    L, R, S = ref.lowrank.svd_low_rank(W, 1)
    left, right, _ = lowrank.svd_low_rank(torch.tensor(W), 1)
    np.testing.assert_allclose(S, [3.0, 1.0], atol=1e-12)
    for product in (L @ R, (left @ right).numpy()):
        np.testing.assert_allclose(product, np.diag([-3.0, 0.0]), atol=1e-12)


@pytest.mark.spec("budget.layer-ratio", "budget.ranks", "budget.overflow")
def test_example_of_appendix_c1() -> None:
    d, compressible, total = 4096, 4 * 4096**2 + 3 * 4096 * 11008, 6_738_415_616
    square = dict.fromkeys("qkvo", (d, d))

    def kept_by_q(layer_ratio: float) -> float:
        ranks = ref.budget.ranks(square, layer_ratio, 3, nested=False)
        assert ranks == ref.budget.ranks(square, layer_ratio, 3, nested=True)
        assert ranks["v"] is ranks["o"] is None
        assert ranks["q"] is not None
        return ranks["q"] * 2 * d / d**2

    assert kept_by_q(0.2) == pytest.approx(0.60, abs=2 / d)
    layer_ratio = ref.budget.layer_ratio(total, 32, compressible, 0.2)
    assert layer_ratio == pytest.approx(0.2081, abs=5e-5)
    assert kept_by_q(layer_ratio) == pytest.approx(0.5835, abs=5e-5)
    assert layer_ratio / 0.2 == pytest.approx(1.04052, abs=5e-6)


@pytest.mark.spec("prune.slice", "algorithm.ffn")
def test_removed_channels_equal_zeroed_ones() -> None:
    rng = np.random.default_rng(1)
    up, gate, down = (rng.standard_normal(shape) for shape in ((6, 3), (6, 3), (3, 6)))
    b_up, b_gate, b_down = (rng.standard_normal(n) for n in (6, 6, 3))
    x = rng.standard_normal((10, 3))

    def ffn(
        up: Any, gate: Any, down: Any, b_up: Any = b_up, b_gate: Any = b_gate
    ) -> NDArray[np.float64]:
        channels = ref.llama.silu(x @ gate.T + b_gate) * (x @ up.T + b_up)
        y: NDArray[np.float64] = channels @ down.T + b_down
        return y

    kept = np.array([0, 2, 5])
    zeroed = np.ones(6)
    zeroed[[1, 3, 4]] = 0
    as_printed = ffn(up * zeroed[:, None], gate * zeroed[:, None], down * zeroed[None, :])
    removed = ffn(*ref.pruning.prune_ffn(up, gate, down, kept), b_up[kept], b_gate[kept])
    np.testing.assert_allclose(removed, as_printed, rtol=1e-13, atol=1e-14)
    twin = pruning.prune_ffn(*map(torch.tensor, (up, gate, down)), torch.tensor(kept))
    for ours, theirs in zip(twin, ref.pruning.prune_ffn(up, gate, down, kept), strict=True):
        assert ours.numpy().tolist() == theirs.tolist()


@pytest.mark.spec("stats.norm", "stats.sum-of-squares")
def test_norm_is_over_all_tokens() -> None:
    X_j = np.eye(2)  # one feature, N = 2 samples of L = 2 tokens
    assert np.linalg.norm(X_j, 2) == 1
    X = X_j.reshape(4, 1)
    assert ref.statistics.feature_norms(X).tolist() == [np.sqrt(2)]
    squares = statistics.sum_of_squares(torch.tensor(X_j)[..., None])
    assert statistics.feature_norms(squares).tolist() == [np.sqrt(2)]


@pytest.mark.spec("importance.group", "importance.channel")
def test_columns_of_down_are_scored_by_their_own_channel() -> None:
    none, down = np.zeros((2, 3)), np.array([[3.0, 1.0], [4.0, 2.0], [0.0, 2.0]])
    x_ffn, x_down = np.array([7.0, 7.0, 7.0]), np.array([10.0, 1.0])
    expected = [50.0, 3.0]
    assert ref.importance.group_importance(none, none, down, x_ffn, x_down).tolist() == expected
    tensors = [torch.tensor(value) for value in (none, none, down, x_ffn, x_down)]
    assert importance.group_importance(*tensors).tolist() == expected
