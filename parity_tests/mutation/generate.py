"""Mutants from the syntax tree: every small slip that leaves a module importable.

Pure: source text in, mutants out. A mutant changes one expression or statement; its name says where
and how, and does not depend on line numbers.
"""

import ast
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType

MODULE = "-"
"""Stands for the function's name in mutants of what is outside all functions."""


@dataclass(frozen=True)
class Mutant:
    """A module with one change.

    Attributes
    ----------
    name : str
        ``module:function:kind:ordinal``, the ordinal counting the changes of one kind in one
        function; ``module:function:title`` for a written one.
    module : str
        Path of the module with dots, without ``.py``.
    function : str
        Qualified name within the module, ``MODULE`` outside of functions.
    source : str
        Text of the changed module.
    was, now : str
        The lines that differ, joined and stripped.
    """

    name: str
    module: str
    function: str
    source: str
    was: str
    now: str

    @property
    def change(self) -> str:
        """A fingerprint of the change alone, the same wherever it stands."""
        return hashlib.sha256(f"{self.was}\n{self.now}".encode()).hexdigest()[:16]


Node = ast.expr | ast.stmt
Change = tuple[str, Node, ast.AST]
"""Kind, node, and what comes in its place."""

BINARY: Mapping[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}

COMMUTATIVE = (ast.Add, ast.Mult, ast.BitOr, ast.BitAnd)

COMPARISONS: Mapping[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "sum": ("mean",),
    "mean": ("sum",),
    "max": ("min",),
    "min": ("max",),
    "amax": ("amin",),
    "amin": ("amax",),
    "argmax": ("argmin",),
    "argmin": ("argmax",),
    "maximum": ("minimum",),
    "minimum": ("maximum",),
    "any": ("all",),
    "all": ("any",),
    "ceil": ("floor",),
    "floor": ("ceil", "round"),
    "round": ("floor",),
    "sqrt": ("square",),
    "square": ("abs",),
    "exp": ("expm1",),
    "log": ("log1p",),
    "log1p": ("log",),
    "std": ("var",),
    "var": ("std",),
    "cos": ("sin",),
    "sin": ("cos",),
    "triu": ("tril",),
    "tril": ("triu",),
    "ones": ("zeros",),
    "zeros": ("ones",),
    "double": ("float",),
    "float64": ("float32",),
    "float32": ("float64",),
    "startswith": ("endswith",),
    "removeprefix": ("removesuffix",),
}
"""Twins by attribute, of modules and of arrays."""

BUILTINS: Mapping[str, tuple[str, ...]] = {
    "max": ("min",),
    "min": ("max",),
    "sum": ("max",),
    "any": ("all",),
    "all": ("any",),
    "round": ("int",),
}

ROUNDINGS: Mapping[str, Mapping[str, str]] = {
    "int": {"round": "round({})", "ceil": "int(-(-({}) // 1))"},
    "ceil": {"floor": "int({})"},
    "floor": {"ceil": "int(-(-({}) // 1))", "round": "round({})"},
}
"""What a rounding can be taken for; ``int`` is the floor of what is not negative."""

STRINGS: Mapping[str, str] = {"stable": "quicksort", "complete": "reduced"}
"""Twins of strings that choose between algorithms; those of a ``Literal`` are its other values."""

AXES = ("axis", "dim")
COMMUTATIVE_CALLS = ("max", "min")
PLAIN_CALLS = ("dict", "enumerate", "isinstance", "len", "list", "range", "set", "tuple", "zip")
"""What they are called with cannot stand in their place."""


def mutants(
    module: str, source: str, fields: Mapping[str, Sequence[str]] | None = None
) -> list[Mutant]:
    """Return all mutants of a module, in the order of the source.

    Parameters
    ----------
    module : str
        Path of the module with dots.
    source : str
    fields : mapping, optional
        Twins of attributes, from ``twin_fields`` of all modules.
    """
    tree = ast.parse(source)
    walk = _Walk(fields or {}, _literals(tree))
    walk.block(tree.body, _Scope(MODULE), is_module=True)
    text, found = _Text(source, tree), list[Mutant]()
    seen = text.meanings()
    ordinals: dict[tuple[str, str], int] = defaultdict(int)
    for function, (kind, node, new) in sorted(walk.found, key=_place):
        changed, meaning = text.replaced(node, new)
        assert meaning[1] is not None, f"{kind} of {ast.unparse(node)}"
        if meaning in seen:
            continue
        seen.add(meaning)
        ordinals[function, kind] += 1
        name = f"{module}:{function}:{kind}:{ordinals[function, kind]}"
        found.append(Mutant(name, module, function, changed, *difference(source, changed)))
    return found


def twin_fields(sources: Sequence[str]) -> dict[str, list[str]]:
    """Return, for every field of a dataclass, the next one of the same type in each that has it.

    Parameters
    ----------
    sources : sequence of str
        Of the modules that define the dataclasses.
    """
    twins: dict[str, list[str]] = defaultdict(list)
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.ClassDef) and node.decorator_list:
            by_type: dict[str, list[str]] = defaultdict(list)
            for statement in node.body:
                if isinstance(statement, ast.AnnAssign):
                    name = ast.unparse(statement.target)
                    by_type[ast.unparse(statement.annotation)].append(name)
            for names in by_type.values():
                for name, twin in _next_of(names).items():
                    twins[name].append(twin)
    return twins


def span(source: str, name: str) -> tuple[int, int]:
    """Return where a function or class begins and ends in its source.

    Parameters
    ----------
    source : str
    name : str
        Qualified, or ``MODULE`` for the whole.

    Raises
    ------
    ValueError
        If there is none.
    """
    if name == MODULE:
        return 0, len(source)
    body: Sequence[ast.stmt] = ast.parse(source).body
    for part in name.split("."):
        named = (
            n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == part
        )
        node = next(named, None)
        if node is None:
            raise ValueError(f"there is no function {name}")
        body = node.body
    lines = source.splitlines(keepends=True)
    assert node is not None
    assert node.end_lineno is not None
    return sum(map(len, lines[: node.lineno - 1])), sum(map(len, lines[: node.end_lineno]))


def difference(old: str, new: str) -> tuple[str, str]:
    """Return the lines that differ between two texts, each side joined by spaces."""
    a, b = old.splitlines(), new.splitlines()
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), 0)
    end = 0
    while end < min(len(a), len(b)) - start and a[-1 - end] == b[-1 - end]:
        end += 1
    sides = (lines[start : len(lines) - end] for lines in (a, b))
    was, now = (" ".join(line.strip() for line in side) for side in sides)
    return was, now


@dataclass
class _Scope:
    """A function: its name, and the twins of the names in it."""

    name: str
    twins: dict[str, str] = field(default_factory=dict)
    bound: set[str] = field(default_factory=set)

    def inner(self, name: str) -> "_Scope":
        """Return the scope of a function or class defined in this one."""
        qualified = name if self.name == MODULE else f"{self.name}.{name}"
        return _Scope(qualified, dict(self.twins), set(self.bound))


class _Walk:
    """Collects the changes of a module; ``found`` holds pairs of function and change."""

    def __init__(self, fields: Mapping[str, Sequence[str]], literals: Mapping[str, str]) -> None:
        self.fields, self.literals = fields, literals
        self.found: list[tuple[str, Change]] = []

    def block(self, body: Sequence[ast.stmt], scope: _Scope, is_module: bool = False) -> None:
        for node in body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            alias = is_module and isinstance(node, ast.Assign) and _is_type(node.value)
            if not docstring and not alias:
                self.statement(node, scope)
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.For):
                scope.bound |= _names(node)

    def statement(self, node: ast.stmt, scope: _Scope) -> None:
        match node:
            case ast.FunctionDef():
                self.function(node, scope.inner(node.name))
            case ast.ClassDef():
                self.block(node.body, scope.inner(node.name))
            case ast.Import() | ast.ImportFrom() | ast.Assert() | ast.Pass():
                pass
            case ast.Raise():
                self.add(scope, [("drop-statement", node, ast.Pass())])
            case _:
                self.add(scope, _statement_changes(node, scope))
                annotation = node.annotation if isinstance(node, ast.AnnAssign) else None
                for child in ast.iter_child_nodes(node):
                    if not isinstance(child, ast.stmt) and child is not annotation:
                        self.expression(child, node, scope)
                for name in ("body", "orelse", "finalbody"):
                    self.block(getattr(node, name, []), scope)

    def function(self, node: ast.FunctionDef, scope: _Scope) -> None:
        parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        by_type: dict[str, list[str]] = defaultdict(list)
        for parameter in parameters:
            if parameter.annotation is not None:
                by_type[ast.unparse(parameter.annotation)].append(parameter.arg)
        groups = [*by_type.values(), *_unpacked(node)]
        for group in groups:
            scope.twins |= _next_of(group)
        scope.bound |= {parameter.arg for parameter in parameters}
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.expression(default, node, scope)
        self.block(node.body, scope)

    def expression(self, node: ast.AST, parent: ast.AST, scope: _Scope) -> None:
        if isinstance(node, ast.expr):
            if _is_literal_type(node):
                return
            self.add(scope, self.expression_changes(node, parent, scope))
            if isinstance(node, ast.JoinedStr):
                return
        for child in ast.iter_child_nodes(node):
            self.expression(child, node, scope)

    def expression_changes(
        self, node: ast.expr, parent: ast.AST, scope: _Scope
    ) -> Iterator[Change]:
        match node:
            case ast.BinOp():
                yield from _arithmetic(node)
            case ast.BoolOp():
                yield from _boolean(node)
            case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
                yield "drop-sign", node, node.operand
            case ast.Compare():
                yield from _comparison(node)
            case ast.IfExp():
                yield "condition-true", node, node.body
                yield "condition-false", node, node.orelse
            case ast.Constant():
                yield from self.constant(node, parent)
            case ast.JoinedStr():
                yield "string", node, ast.JoinedStr([*node.values, ast.Constant("~")])
            case ast.Call():
                yield from _call(node, parent)
            case ast.Attribute(ctx=ast.Load()):
                yield from self.attribute(node)
            case ast.Subscript():
                yield from _subscript(node)
            case ast.Name(ctx=ast.Load()):
                if node.id in scope.twins:
                    yield "twin-name", node, ast.Name(scope.twins[node.id], ast.Load())
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                yield from _comprehension(node)

    def attribute(self, node: ast.Attribute) -> Iterator[Change]:
        if node.attr == "T":
            yield "drop-transpose", node, node.value
        for twin in ATTRIBUTES.get(node.attr, ()):
            yield f"{node.attr}-to-{twin}", node, ast.Attribute(node.value, twin, ast.Load())
        for twin in self.fields.get(node.attr, ()):
            yield "twin-field", node, ast.Attribute(node.value, twin, ast.Load())

    def constant(self, node: ast.Constant, parent: ast.AST) -> Iterator[Change]:
        value = node.value
        axis = isinstance(parent, ast.keyword) and parent.arg in AXES
        if isinstance(value, bool):
            yield "not", node, ast.Constant(not value)
        elif isinstance(value, int) and axis:
            yield "axis", node, ast.Constant(1 - value if value < 2 else value - 1)
        elif isinstance(value, int):
            yield "plus-one", node, ast.Constant(value + 1)
            yield "minus-one", node, ast.Constant(value - 1)
        elif isinstance(value, float):
            yield "number", node, ast.Constant(2 * value if value else 1.0)
        elif isinstance(value, str):
            twin = STRINGS.get(value) or self.literals.get(value) or f"{value}~"
            yield "string", node, ast.Constant(twin)

    def add(self, scope: _Scope, changes: Iterable[Change]) -> None:
        self.found += [(scope.name, change) for change in changes]


def _place(found: tuple[str, Change]) -> tuple[int, int, int, int]:
    node = found[1][1]
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


def _next_of(names: Sequence[str]) -> dict[str, str]:
    """Return a mapping of each name to the next, around; none to itself."""
    return dict(zip(names, [*names[1:], *names[:1]], strict=True)) if len(names) > 1 else {}


def _names(node: ast.AST) -> set[str]:
    return {
        name.id
        for name in ast.walk(node)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
    }


def _unpacked(function: ast.FunctionDef) -> Iterator[list[str]]:
    """Yield the names that are unpacked together."""
    for node in ast.walk(function):
        if isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Store):
            names = [e.id for e in node.elts if isinstance(e, ast.Name) and e.id != "_"]
            if len(names) == len(set(names)) > 1:
                yield names


def _literals(tree: ast.Module) -> dict[str, str]:
    """Return, for every string of a ``Literal`` of the module, the next one."""
    twins: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and _is_literal_type(node):
            values = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            twins |= _next_of([str(ast.literal_eval(value)) for value in values])
    return twins


def _is_literal_type(node: ast.expr) -> bool:
    return isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal"


def _is_type(node: ast.expr) -> bool:
    """Tell whether the right side of a module's assignment is an alias of a type."""
    return isinstance(node, ast.Subscript) or (
        isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)
    )


def _statement_changes(node: ast.stmt, scope: _Scope) -> Iterator[Change]:
    match node:
        case ast.AugAssign():
            yield "drop-statement", node, ast.Pass()
            plain = ast.Assign([node.target], node.value, lineno=node.lineno)
            yield "assign", node, plain
            if type(node.op) in BINARY:
                op = BINARY[type(node.op)]
                yield _to(node.op, op), node, ast.AugAssign(node.target, op(), node.value)
        case ast.Assign(targets=[target]):
            again = isinstance(target, ast.Name) and target.id in scope.bound
            if again or isinstance(target, ast.Subscript | ast.Attribute):
                yield "drop-statement", node, ast.Pass()
        case ast.Expr(value=ast.Call()) | ast.Delete() | ast.Break() | ast.Continue():
            yield "drop-statement", node, ast.Pass()
        case ast.If():
            yield "condition-true", node.test, ast.Constant(True)
            yield "condition-false", node.test, ast.Constant(False)
        case ast.While():
            yield "condition-false", node.test, ast.Constant(False)
        case ast.For():
            for kind, text in (("no-pass", "[]"), ("one-pass", "list({})[:1]")):
                new = ast.parse(text.format(ast.unparse(node.iter)), mode="eval").body
                yield kind, node.iter, new
        case ast.Return(value=ast.Tuple() as values):
            yield from _swaps("swap-returned", values, values.elts, _tuple)


def _tuple(elements: list[ast.expr]) -> ast.expr:
    return ast.Tuple(elements, ast.Load())


def _to(old: ast.AST, new: type[ast.AST]) -> str:
    return f"{type(old).__name__.lower()}-to-{new.__name__.lower()}"


def _arithmetic(node: ast.BinOp) -> Iterator[Change]:
    if type(node.op) in BINARY:
        op = BINARY[type(node.op)]
        yield _to(node.op, op), node, ast.BinOp(node.left, op(), node.right)
    if not isinstance(node.op, COMMUTATIVE):
        yield "swap-operands", node, ast.BinOp(node.right, node.op, node.left)
    yield "drop-right", node, node.left
    if not isinstance(node.op, ast.Pow):
        yield "drop-left", node, node.right


def _boolean(node: ast.BoolOp) -> Iterator[Change]:
    other: ast.boolop = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    yield _to(node.op, type(other)), node, ast.BoolOp(other, node.values)
    for at in range(len(node.values)):
        rest = node.values[:at] + node.values[at + 1 :]
        yield "drop-operand", node, rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)


def _comparison(node: ast.Compare) -> Iterator[Change]:
    for at, old in enumerate(node.ops):
        for new in COMPARISONS[type(old)]:
            ops = [*node.ops[:at], new(), *node.ops[at + 1 :]]
            yield _to(old, new), node, ast.Compare(node.left, ops, node.comparators)


def _call(node: ast.Call, parent: ast.AST) -> Iterator[Change]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
    unpacked = isinstance(parent, ast.Assign) and isinstance(parent.targets[0], ast.Tuple)
    starred = any(isinstance(argument, ast.Starred) for argument in node.args)
    if isinstance(node.func, ast.Name) and not starred:
        yield from _builtin(node, name)
    if not unpacked and not starred and name not in PLAIN_CALLS:
        if len(node.args) == 1 and not (name == "asarray" and not node.keywords):
            yield "drop-call", node, node.args[0]
        if isinstance(node.func, ast.Attribute) and not _is_module(node.func.value):
            yield "drop-method", node, node.func.value
    if name in ("sort", "argsort", "sorted"):
        yield from _descending(node)
    if name == "norm" and len(node.args) == 1 and not node.keywords:
        yield "spectral-norm", node, ast.Call(node.func, [node.args[0], ast.Constant(2)], [])
    if not starred and name not in COMMUTATIVE_CALLS:
        yield from _swaps("swap-arguments", node, node.args, lambda new: _with(node, args=new))
    for at, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            rest = node.keywords[:at] + node.keywords[at + 1 :]
            yield "drop-keyword", node, _with(node, keywords=rest)


def _with(
    node: ast.Call,
    func: ast.expr | None = None,
    args: list[ast.expr] | None = None,
    keywords: list[ast.keyword] | None = None,
) -> ast.Call:
    """Return the call with some of its parts replaced."""
    return ast.Call(
        node.func if func is None else func,
        node.args if args is None else args,
        node.keywords if keywords is None else keywords,
    )


def _builtin(node: ast.Call, name: str) -> Iterator[Change]:
    for twin in BUILTINS.get(name, ()):
        yield f"{name}-to-{twin}", node, _with(node, func=ast.Name(twin, ast.Load()))
    if name in ("max", "min") and len(node.args) == 2:
        yield "drop-argument", node, node.args[1]
        yield "drop-argument", node, node.args[0]
    if len(node.args) == 1 and not _is_count(node.args[0]):
        argument = ast.unparse(node.args[0])
        for twin, text in ROUNDINGS.get(name, {}).items():
            yield f"{name}-to-{twin}", node, _expression(text.format(argument))


def _is_count(node: ast.expr) -> bool:
    """Tell whether a value is the number of true entries: there is nothing to round."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    return node.func.attr == "sum" and isinstance([node.func.value, *node.args][-1], ast.Compare)


def _is_module(node: ast.expr) -> bool:
    """Tell whether what a function is an attribute of can only be a module."""
    root = node
    while isinstance(root, ast.Attribute):
        root = root.value
    return isinstance(root, ast.Name) and root.id in ("np", "torch", "linalg", "math")


def _descending(node: ast.Call) -> Iterator[Change]:
    if node.args:
        first = ast.UnaryOp(ast.USub(), node.args[0])
        yield "descending", node, _with(node, args=[first, *node.args[1:]])
    elif isinstance(node.func, ast.Attribute):
        negated = ast.UnaryOp(ast.USub(), node.func.value)
        method = ast.Attribute(negated, node.func.attr, ast.Load())
        yield "descending", node, _with(node, func=method)


def _swaps(
    kind: str,
    node: ast.expr,
    elements: Sequence[ast.expr],
    rebuilt: Callable[[list[ast.expr]], ast.expr],
) -> Iterator[Change]:
    for at in range(len(elements) - 1):
        one, two = elements[at : at + 2]
        yield kind, node, rebuilt([*elements[:at], two, one, *elements[at + 2 :]])


def _subscript(node: ast.Subscript) -> Iterator[Change]:
    def indexed(index: ast.expr) -> ast.Subscript:
        return ast.Subscript(node.value, index, node.ctx)

    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if isinstance(node.slice, ast.Tuple):
        yield from _swaps("swap-axes", node, parts, lambda elements: indexed(_tuple(elements)))
    for at, part in enumerate(parts):
        if isinstance(part, ast.Slice):
            for kind, new in _slice(part):
                whole = [*parts[:at], new, *parts[at + 1 :]]
                yield kind, node, indexed(_tuple(whole) if len(whole) > 1 else whole[0])


def _slice(node: ast.Slice) -> Iterator[tuple[str, ast.Slice]]:
    lower, upper, step = node.lower, node.upper, node.step
    if (lower is None) != (upper is None):
        yield "other-part", ast.Slice(upper, lower, step)
    elif lower is not None:
        yield "drop-bound", ast.Slice(None, upper, step)
        yield "drop-bound", ast.Slice(lower, None, step)
    one = ast.Constant(1)
    for kind, op in (("bound-plus-one", ast.Add()), ("bound-minus-one", ast.Sub())):
        if lower is not None and not isinstance(lower, ast.Constant):
            yield kind, ast.Slice(ast.BinOp(lower, op, one), upper, step)
        if upper is not None and not isinstance(upper, ast.Constant):
            yield kind, ast.Slice(lower, ast.BinOp(upper, op, one), step)


def _comprehension(
    node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp,
) -> Iterator[Change]:
    for generator in node.generators:
        for test in generator.ifs:
            yield "condition-true", test, ast.Constant(True)
            yield "condition-false", test, ast.Constant(False)


def _expression(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


class _Text:
    """A source whose nodes can be replaced, top-level statement by top-level statement."""

    def __init__(self, source: str, tree: ast.Module) -> None:
        self.lines = source.encode().splitlines(keepends=True)
        self.parts: dict[int, tuple[int, int]] = {}
        for part in tree.body:
            decorators = getattr(part, "decorator_list", [])
            start = min([part.lineno, *(decorator.lineno for decorator in decorators)])
            assert part.end_lineno is not None
            for line in range(start, part.end_lineno + 1):
                self.parts[line] = start, part.end_lineno

    def meanings(self) -> set[tuple[int, object]]:
        """Return where each statement begins, and what it is compiled to."""
        return {
            (start, _meaning(b"".join(self.lines[start - 1 : end])))
            for start, end in self.parts.values()
        }

    def replaced(self, node: Node, new: ast.AST) -> tuple[str, tuple[int, object]]:
        """Return the text with the node replaced, and the meaning of the changed statement.

        Parentheses stand only where they are needed.
        """
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start, end = self.parts[node.lineno]
        before = b"".join(self.lines[start - 1 : node.lineno - 1])
        before += self.lines[node.lineno - 1][: node.col_offset]
        after = self.lines[node.end_lineno - 1][node.end_col_offset :]
        after += b"".join(self.lines[node.end_lineno : end])
        text = ast.unparse(ast.fix_missing_locations(new)).encode()
        chosen, meaning = before + text + after, None
        if isinstance(node, ast.expr):
            safe = before + b"(" + text + b")" + after
            meaning = _meaning(safe)
            if _meaning(chosen) != meaning:
                chosen = safe
        rest = b"".join(self.lines[: start - 1]), b"".join(self.lines[end:])
        whole = (rest[0] + chosen + rest[1]).decode()
        return whole, (start, meaning or _meaning(chosen))


def _meaning(source: bytes) -> object:
    """Return what a source is compiled to, without the places in it; None if it is no source."""

    def of(code: CodeType) -> tuple[object, ...]:
        constants = [of(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        return code.co_code, *names, *constants

    try:
        return of(compile(source, "", "exec", dont_inherit=True))
    except SyntaxError:
        return None
