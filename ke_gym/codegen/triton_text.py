"""Expressions -> Triton text: what every kernel's printer needs. Only spelling lives here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field

from ke_gym.codegen.emit_triton_cache import marked
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import (
    Const,
    Expr,
    Index,
    Indirect,
    InRange,
    Interned,
    Load,
    Op,
    Position,
    Quotient,
    Remainder,
    Search,
    Var,
    bounds,
    children,
    is_float,
    of,
    walk,
)

TYPES = {
    "f32": "tl.float32", "f64": "tl.float64", "bf16": "tl.bfloat16", "f16": "tl.float16", "bool": "tl.int1",
    "u8": "tl.uint8", "i8": "tl.int8", "i16": "tl.int16", "i32": "tl.int32", "i64": "tl.int64",
}  # fmt: skip
_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "intdiv": "//", "eq": "==", "ne": "!=", "lt": "<", "le": "<=",
    "gt": ">", "ge": ">=", "and": "&", "or": "|", "bitand": "&", "bitor": "|", "bitxor": "^", "shl": "<<",
    "shr": ">>",
}  # fmt: skip
_TL = frozenset(("exp", "exp2", "log", "log2", "sin", "cos", "floor", "ceil", "sigmoid", "rsqrt", "erf"))
_LIBDEVICE = {
    **{name: name for name in (
        "expm1", "log10", "log1p", "tanh", "erfc", "lgamma", "tan", "asin", "acos", "atan", "sinh", "cosh",
        "asinh", "acosh", "atanh", "atan2", "fmod", "hypot", "trunc", "pow", "copysign",
    )},
    "round": "rint",
}  # fmt: skip

HELPERS = {
    "max_nan": """\
@triton.jit
def max_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
""",
    "min_nan": """\
@triton.jit
def min_nan(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
""",
    "added": """\
@triton.jit
def added(a, b):
    return a + b
""",
    "multiplied": """\
@triton.jit
def multiplied(a, b):
    return a * b
""",
    "floordiv": """\
@triton.jit
def floordiv(a, b):
    quotient = a // b
    return quotient - ((a % b != 0) & ((a < 0) != (b < 0))).to(quotient.dtype)
""",
    "remainder": """\
@triton.jit
def remainder(a, b):
    # As torch.remainder: the sign of the divisor.
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)
""",
    "search": """\
@triton.jit
def search(row, value, valid, SIZE: tl.constexpr, RIGHT: tl.constexpr, STEPS: tl.constexpr):
    # How many of the ascending row[0:SIZE] are below value (or at most, if RIGHT), probed where torch does.
    first = tl.zeros_like(value).to(tl.int32)
    last = first + SIZE
    for _ in range(STEPS):
        middle = first + ((last - first) >> 1)
        open = valid & (first < last)
        probe = tl.load(row + middle, mask=open, other=0).to(value.dtype)
        if RIGHT:
            beyond = (probe > value) == 0
        else:
            beyond = (probe >= value) == 0
        first = tl.where(open & beyond, middle + 1, first)
        last = tl.where(open & (beyond == 0), middle, last)
    return first
""",
    "power": """\
@triton.jit
def power(base, exponent):
    result = base * 0 + 1
    negative = exponent < 0
    odd = (exponent % 2) != 0
    left = tl.where(negative, 0, exponent)
    square = base
    for _ in range(64):
        result = tl.where((left & 1) != 0, result * square, result)
        square = square * square
        left = left >> 1
    inverse = tl.where(base == 1, 1, tl.where(base == -1, tl.where(odd, -1, 1), 0))
    return tl.where(negative, inverse.to(result.dtype), result)
""",
}


def literal(value: float | int | bool, dtype: str) -> str:
    if dtype == "bool":
        return "True" if value else "False"
    if not is_float(dtype):
        return str(int(value))
    value = float(value)
    if math.isnan(value):
        return 'float("nan")'
    if math.isinf(value):
        return 'float("inf")' if value > 0 else 'float("-inf")'
    return repr(value)


@dataclass
class Axis:
    """A variable of the tile: its name in the text, and the mask that says which of its values count ("": all).

    ``first``: the name of its first value, from which ``block`` values follow, if it begins at multiples of these.
    """

    var: Var
    name: str
    mask: str = ""
    first: str = ""
    block: int = 1

    def fixed(self, node: Interned) -> bool:
        """Whether the tile stays within one value of a quotient."""
        whole = type(node) is Quotient and node.index == of(self.var) and node.divisor % self.block == 0
        return bool(self.first) and whole

    def moves(self, node: Interned) -> bool:
        """Whether a value differs along the axis."""
        pending, seen = [node], set[Interned]()
        while pending:
            here = pending.pop()
            if here is self.var:
                return True
            if here not in seen and not self.fixed(here):
                pending.extend(children(here))
            seen.add(here)
        return False


@dataclass
class Text:
    """Prints expressions, once each, as named values. ``outer`` takes what no inner axis moves.

    ``axes``: the tile's variables; those in ``inner`` belong to the innermost scope.
    """

    used: set[str]
    sizes: Mapping[str, int]
    axes: list[Axis] = field(default_factory=list)
    outer: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    inner: set[Interned] = field(default_factory=set)
    names: dict[tuple[Interned, str], str] = field(default_factory=dict)
    local: list[tuple[Interned, str]] = field(default_factory=list)
    uses: Mapping[Interned, int] = field(default_factory=dict)
    pointers: Mapping[str, str] = field(default_factory=dict)
    widen: bool = True
    """Whether what is loaded in half precision is computed with in fp32."""
    marks: bool = False
    """Whether loads are marked, for what caches are told of them (``emit_triton_cache``)."""
    scope: int = 0
    """Which loop is printed, or what is between two."""
    count: int = 0
    tests: dict[str, tuple[Expr, ...]] = field(default_factory=dict)
    """What guards are made of."""

    def enter(self, lines: list[str], inner: Set[Interned]) -> None:
        """Print into ``lines`` from now on; values that ``inner`` moves are known there only."""
        self.leave()
        self.lines, self.inner = lines, set(inner)

    def leave(self) -> None:
        for key in self.local:
            self.names.pop(key, None)
        self.local = []
        self.scope += 1
        self.lines, self.inner = self.outer, set()

    # -- indices ---------------------------------------------------------------------------------------

    def index(self, index: Index, guard: str) -> str:
        parts = []
        for atom, coefficient in index.terms:
            text = self._atom(atom, guard)
            size = abs(coefficient)
            parts.append(("-" if coefficient < 0 else "+", text if size == 1 else f"{text} * {size}"))
        if index.const or not parts:
            parts.append(("-" if index.const < 0 else "+", str(abs(index.const))))
        text = " ".join(f"{sign} {part}" for sign, part in parts)
        return text[2:] if text.startswith("+ ") else text.replace("- ", "-", 1)

    def _atom(self, atom: Interned, guard: str) -> str:
        if isinstance(atom, Var):
            return next(axis.name for axis in self.axes if axis.var is atom)
        if isinstance(atom, (Quotient, Remainder)):
            axis = next((axis for axis in self.axes if axis.fixed(atom)), None)
            if axis is not None:
                return f"({axis.first} // {atom.divisor})"
            symbol = "%" if isinstance(atom, Remainder) else "//"
            return f"({enclosed(self.index(atom.index, guard))} {symbol} {atom.divisor})"
        assert isinstance(atom, Indirect)
        text = self.value(atom.value, guard)
        return text if atom.value.dtype == "i64" else f"{enclosed(text)}.to(tl.int64)"

    # -- values ----------------------------------------------------------------------------------------

    def value(self, expr: Expr, guard: str = "") -> str:
        """The expression's value as a name or a literal; statements it takes are printed."""
        if isinstance(expr, Const):
            return literal(expr.value, expr.dtype)
        if isinstance(expr, Load) and not expr.index:
            return self.names[expr, ""]
        if not self._guarded(expr):
            guard = ""
        found = self.names.get((expr, guard))
        if found is not None:
            return found
        text = self._text(expr, guard)
        once = self.uses.get(expr, 0) <= 1 or len(text) <= 12
        if once and len(text) <= 60 and not isinstance(expr, (Load, Search)) and text.count("(") <= 3:
            self._remember(expr, guard, f"({text})" if " " in text and not _whole(text) else text)
            return self.names[expr, guard]
        name = f"v{self.count}"
        self.count += 1
        target = self.lines if guard or self._moves(expr) else self.outer
        target.append(f"{name} = {bare_text(text)}")
        self._remember(expr, guard, name)
        return name

    def _remember(self, expr: Expr, guard: str, text: str) -> None:
        self.names[expr, guard] = text
        if self.lines is not self.outer:
            self.local.append((expr, guard))

    def _moves(self, expr: Interned) -> bool:
        return self.lines is self.outer or any(n in self.inner for n in walk(expr))

    def _guarded(self, expr: Interned) -> bool:
        return any(isinstance(n, (Load, Search)) and not self._harmless(n) for n in walk(expr))

    def _harmless(self, node: Interned) -> bool:
        """Whether a load may be made without its guard: its index is in bounds either way."""
        if isinstance(node, Load) and node.index:
            low, high = bounds(node.index[0])
            direct = not any(isinstance(n, Indirect) for n in walk(node.index[0]))
            return direct and low >= 0 and high < self.sizes.get(node.buffer, 0)
        if isinstance(node, Search):
            low, high = bounds(node.start[0])
            return low >= 0 and high + node.size <= self.sizes.get(node.buffer, 0)
        return isinstance(node, Load)

    def mask(self, node: Interned, guard: str = "") -> str:
        """Which elements of what ``node`` moves over exist; with ``guard``, of those that are wanted."""
        moved = [axis.mask for axis in self.axes if axis.mask and axis.moves(node)]
        return " & ".join([*moved, guard] if guard else moved)

    def _text(self, expr: Expr, guard: str) -> str:
        if isinstance(expr, Load):
            return self._load(expr, guard, "" if self._harmless(expr) else guard)
        if isinstance(expr, Position):
            text = self.index(expr.index, guard)
            if not expr.index.terms:
                return literal(expr.index.const, expr.dtype)
            return f"({text}).to({TYPES[expr.dtype]})"
        if isinstance(expr, InRange):
            return self._in_range(expr, guard)
        if isinstance(expr, Search):
            return self._search(expr, guard)
        assert isinstance(expr, Op)
        return self._op(expr, guard)

    def _load(self, load: Load, guard: str, own: str) -> str:
        """A load of what exists, and of that what ``own`` lets through; 0 else."""
        text = self.index(load.index[0], guard)
        mask = self.mask(load, own)
        for axis in self.axes:  # a mask is no larger than what it masks
            if not axis.moves(load) and any(axis.moves(test) for test in self.tests.get(own, ())):
                text = f"{text} + {axis.name} * 0"
        buffer = self.pointers.get(load.buffer, load.buffer)
        place = buffer if text == "0" else f"{buffer} + {text}"
        told = marked(load.buffer, self.scope) if self.marks else ""
        loaded = f"tl.load({place}, mask={mask}, other=0{told})" if mask else f"tl.load({place}{told})"
        return f"{loaded}.to(tl.float32)" if self.widen and load.dtype in ("bf16", "f16") else loaded

    def _in_range(self, expr: InRange, guard: str) -> str:
        low, high = bounds(expr.index)
        index = enclosed(self.index(expr.index, guard))
        tests = [f"({index} >= {expr.low})"] if low < expr.low else []
        if high >= expr.high:
            tests.append(f"({index} < {expr.high})")
        return " & ".join(tests) if tests else "True"

    def _search(self, expr: Search, guard: str) -> str:
        self.used.add("search")
        start = self.index(expr.start[0], guard)
        buffer = self.pointers.get(expr.buffer, expr.buffer)
        row = buffer if start == "0" else f"{buffer} + {start}"
        valid = self.mask(expr, guard) or "True"
        value, steps = self.value(expr.value, guard), expr.size.bit_length()
        return f"search({row}, {value}, {valid}, {expr.size}, {expr.right}, {steps})"

    def _op(self, expr: Op, guard: str) -> str:
        name, kind, source = expr.name, TYPES[expr.dtype], expr.args[0].dtype
        if name == "where":
            return self._where(expr, guard)
        args = [self.value(a, guard) for a in expr.args]
        bare = ", ".join(bare_text(a) for a in args)
        constant = all(isinstance(a, Const) for a in expr.args)
        if constant and name != "cast":
            args[0] = f"tl.full([], {args[0]}, {TYPES[expr.args[0].dtype]})"
            bare = ", ".join(args)
        if name == "cast":
            if isinstance(expr.args[0], Const):
                return literal(expr.args[0].value, expr.dtype)
            if expr.dtype == "f32" and source in ("bf16", "f16"):
                return args[0]  # halves are computed in fp32
            return f"{args[0]} != 0" if expr.dtype == "bool" else f"{enclosed(args[0])}.to({kind})"
        if name in ("max", "min") and is_float(expr.dtype):
            self.used.add(f"{name}_nan")
            return f"{name}_nan({bare})"
        if name in ("max", "min", "add", "mul") and expr.dtype == "bool":
            return f"{args[0]} {'|' if name in ('max', 'add') else '&'} {args[1]}"
        if name in ("max", "min"):
            return f"tl.{name}imum({bare})"
        if name in _INFIX:
            return f"{args[0]} {_INFIX[name]} {args[1]}"
        if name == "neg":
            return f"-{args[0]}"
        if name == "not":
            return f"{args[0]} == 0"
        if name == "bitnot":
            return f"~{args[0]}"
        if name == "abs":
            return f"tl.abs({bare})"
        if name == "sign":
            return f"({args[0]} > 0).to({kind}) - ({args[0]} < 0).to({kind})"
        return self._function(name, expr, args, bare)

    def _function(self, name: str, expr: Op, args: list[str], bare: str) -> str:
        source = expr.args[0].dtype
        if name in ("floor", "ceil", "trunc", "round") and not is_float(source):
            return args[0]
        if name in ("silu", "gelu", "gelu_tanh", "remainder") and is_float(source):
            args = [self._named(arg, node) for arg, node in zip(args, expr.args)]
            bare = ", ".join(args)
        if name == "silu":
            return f"{args[0]} * tl.sigmoid({bare})"
        if name == "gelu":
            return f"0.5 * {args[0]} * (1.0 + tl.erf({args[0]} * 0.7071067811865476))"
        if name == "gelu_tanh":  # 0.5 (1 + tanh(u)) = sigmoid(2 u)
            cube = f"{args[0]} * {args[0]} * {args[0]}"
            return f"{args[0]} * tl.sigmoid(1.5957691216057308 * ({args[0]} + 0.044715 * {cube}))"
        if name == "sqrt":
            return f"tl.sqrt_rn({bare})" if expr.dtype == "f32" else f"tl.sqrt({bare})"
        if name == "floordiv" and is_float(expr.dtype):
            return f"tl.floor({args[0]} / {args[1]})"
        if name == "remainder" and is_float(expr.dtype):
            return f"{args[0]} - tl.floor({args[0]} / {args[1]}) * {args[1]}"
        if name in ("floordiv", "remainder") or (name == "pow" and not is_float(expr.dtype)):
            helper = "power" if name == "pow" else name
            self.used.add(helper)
            return f"{helper}({bare})"
        if name in _TL:
            return f"tl.{name}({bare})"
        if name == "fmod" and not is_float(expr.dtype):
            return f"{args[0]} % {args[1]}"
        if name in _LIBDEVICE:
            self.used.add("libdevice")
            if expr.dtype == "f64":  # numbers as they are written would be single ones
                given = zip(args, expr.args)
                wide = (f"tl.full((), {a}, tl.float64)" if isinstance(n, Const) else a for a, n in given)
                bare = ", ".join(map(bare_text, wide))
            return f"libdevice.{_LIBDEVICE[name]}({bare})"
        raise Illegal(f"{name} has no spelling in Triton")

    def _named(self, text: str, expr: Expr) -> str:
        """A name for a value that its user needs several times."""
        if text.isidentifier() or isinstance(expr, Const):
            return text
        name = f"v{self.count}"
        self.count += 1
        (self.lines if self._moves(expr) else self.outer).append(f"{name} = {bare_text(text)}")
        return name

    def _where(self, expr: Op, guard: str) -> str:
        masked = padded(expr)
        # What a tensor holds may differ from one element to the next: masked so, vectors would be loaded singly.
        scattered = (
            masked is not None and self._harmless(masked[0]) and any(_reads(test) for test in masked[1])
        )
        if masked is not None and not scattered:
            tests = [self.value(test, guard) for test in masked[1]]
            own = " & ".join([guard, *tests] if guard else tests)
            self.tests[own] = (*self.tests.get(guard, ()), *masked[1])
            return self._load(masked[0], own, own)
        condition = self.value(expr.args[0], guard)
        guards = [f"{guard} & {condition}" if guard else condition]
        guards.append(f"{guard} & ({condition} == 0)" if guard else f"({condition} == 0)")
        for own in guards:
            self.tests[own] = (*self.tests.get(guard, ()), expr.args[0])
        chosen = [
            self.value(arg, own if self._guarded(arg) else guard) for arg, own in zip(expr.args[1:], guards)
        ]
        if all(isinstance(arg, Const) for arg in expr.args[1:]):
            chosen[0] = f"tl.full([], {chosen[0]}, {TYPES[expr.dtype]})"
        return f"tl.where({bare_text(condition)}, {bare_text(chosen[0])}, {bare_text(chosen[1])})"


def padded(expr: Expr) -> tuple[Load, list[Expr]] | None:
    """``(load, tests)`` if the expression is a load where all tests hold and 0 elsewhere: one masked load."""
    tests: list[Expr] = []
    while isinstance(expr, Op) and expr.name == "where":
        test, chosen, other = expr.args
        if not (isinstance(other, Const) and other.value == 0):
            return None
        tests.append(test)
        expr = chosen
    return (expr, tests) if isinstance(expr, Load) and expr.index and tests else None


def _reads(expr: Expr) -> bool:
    return any(isinstance(n, Load) and n.index for n in walk(expr))


def uses_in(roots: Iterable[Interned]) -> dict[Interned, int]:
    """How many places read each value below ``roots``."""
    found: dict[Interned, int] = {}
    for node in walk(*roots):
        for child in children(node):
            found[child] = found.get(child, 0) + 1
    for root in roots:
        found[root] = found.get(root, 0) + 1
    return found


def enclosed(text: str) -> str:
    return text if re.fullmatch(r"\w+(\[[^\[\]]*\])?", text) or _whole(text) else f"({text})"


def _whole(text: str) -> bool:
    """Whether the text is one pair of brackets around everything."""
    if not text.startswith("("):
        return False
    depth = 0
    for k, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return k == len(text) - 1
    return False


def bare_text(text: str) -> str:
    return text[1:-1] if _whole(text) and "," not in text else text


def tf32_parts(name: str) -> list[str]:
    """What TF32 keeps of a tile, as its matrix instructions cut it off, and what is left of it."""
    bits = f"({name}.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)"
    return [f"{name}_high = {bits}", f"{name}_low = {name} - {name}_high"]
