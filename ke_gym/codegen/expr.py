"""Integer index expressions and scalar value expressions: what a loop body computes.

Both are immutable DAGs with *interned* nodes: equal expressions are the same object, so that equality and
hashing cost nothing, common subexpressions need no search, and every traversal can be memoised by node.

An ``Index`` is a linear form ``const + sum(coefficient * atom)``; atoms are loop variables, quotients and
remainders of an ``Index`` by a constant, and run-time integers (indirect accesses). Views of tensors are only
changes of index, so most quotients cancel: ``8 * (i // 8) + i % 8`` is ``i`` by construction.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self

DTYPES = ("f32", "f64", "bf16", "f16", "i8", "i16", "i32", "i64", "u8", "bool")
BYTES = {"f32": 4, "f64": 8, "bf16": 2, "f16": 2, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "u8": 1, "bool": 1}


def is_float(dtype: str) -> bool:
    return dtype in ("f32", "f64", "bf16", "f16")


def compute_dtype(dtype: str) -> str:
    """Values of half precision are computed in fp32 and rounded only where they are stored."""
    return "f32" if dtype in ("bf16", "f16") else dtype


class Interned:
    """Base of immutable nodes: constructing the same fields twice gives the same object."""

    __slots__ = ("__weakref__", "fields", "key", "order")
    fields: tuple[Any, ...]
    key: tuple[Any, ...]
    order: str
    _pool: ClassVar[weakref.WeakValueDictionary[tuple[Any, ...], Interned]] = weakref.WeakValueDictionary()

    def __new__(cls, *fields: Any) -> Self:
        # True == 1 == 1.0 and 0.0 == -0.0 in Python, so the pool is keyed by type and text as well.
        key = (cls, *((type(f), repr(f)) if isinstance(f, (bool, int, float)) else f for f in fields))
        found = Interned._pool.get(key)
        if found is None:
            found = object.__new__(cls)
            found.fields = fields
            found.key = key
            Interned._pool[key] = found
        return found  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.fields!r}"

    def __reduce__(self) -> Any:
        return type(self), self.fields


# --------------------------------------------------------------------------------------------- indices


class Var(Interned):
    """A loop variable ``name`` running over ``[0, size)``."""

    __slots__ = ()

    @property
    def name(self) -> str:
        return self.fields[0]  # type: ignore[no-any-return]

    @property
    def size(self) -> int:
        return self.fields[1]  # type: ignore[no-any-return]


class Quotient(Interned):
    """``index // divisor``, both known not to be negative."""

    __slots__ = ()

    @property
    def index(self) -> Index:
        return self.fields[0]  # type: ignore[no-any-return]

    @property
    def divisor(self) -> int:
        return self.fields[1]  # type: ignore[no-any-return]


class Remainder(Quotient):
    """``index % divisor``."""

    __slots__ = ()


class Indirect(Interned):
    """An integer computed at run time, used as an index in ``[0, size)``."""

    __slots__ = ()

    @property
    def value(self) -> Expr:
        return self.fields[0]  # type: ignore[no-any-return]

    @property
    def size(self) -> int:
        return self.fields[1]  # type: ignore[no-any-return]


Atom = Var | Quotient | Remainder | Indirect


class Index(Interned):
    """``const + sum(coefficient * atom)``, in canonical order."""

    __slots__ = ()

    @property
    def const(self) -> int:
        return self.fields[0]  # type: ignore[no-any-return]

    @property
    def terms(self) -> tuple[tuple[Atom, int], ...]:
        return self.fields[1]  # type: ignore[no-any-return]

    def __add__(self, other: Index | int) -> Index:
        if isinstance(other, int):
            return Index(self.const + other, self.terms)
        return linear(self.const + other.const, [*self.terms, *other.terms])

    def __sub__(self, other: Index | int) -> Index:
        return self + (-other if isinstance(other, int) else other * -1)

    def __mul__(self, factor: int) -> Index:
        return linear(self.const * factor, [(a, c * factor) for a, c in self.terms])

    def __floordiv__(self, divisor: int) -> Index:
        whole, rest = self._split(divisor)
        low, high = bounds(rest)
        if low >= 0 and high < divisor:
            return whole
        if (parts := rest._digits(divisor)) is not None:
            return whole + parts[0] // (divisor // parts[2])
        if not rest.terms:
            return whole + rest.const // divisor
        if len(rest.terms) == 1 and rest.const == 0 and rest.terms[0][1] == 1:
            atom = rest.terms[0][0]
            if type(atom) is Quotient:
                return whole + atom.index // (atom.divisor * divisor)
            if type(atom) is Remainder and atom.divisor % divisor == 0:
                return whole + (atom.index // divisor) % (atom.divisor // divisor)
        return whole + of(Quotient(rest, divisor))

    def __mod__(self, divisor: int) -> Index:
        _, rest = self._split(divisor)
        low, high = bounds(rest)
        if low >= 0 and high < divisor:
            return rest
        if (parts := rest._digits(divisor)) is not None:
            upper, lower, unit = parts
            return upper % (divisor // unit) * unit + lower
        if not rest.terms:
            return constant(rest.const % divisor)
        if len(rest.terms) == 1 and rest.const == 0 and rest.terms[0][1] == 1:
            atom = rest.terms[0][0]
            if type(atom) is Remainder and atom.divisor % divisor == 0:
                return atom.index % divisor
        return of(Remainder(rest, divisor))

    def _split(self, divisor: int) -> tuple[Index, Index]:
        """``(whole, rest)`` with ``self == divisor * whole + rest``; ``rest`` is not negative, which C++ would round up."""
        whole = [(a, c // divisor) for a, c in self.terms if c % divisor == 0]
        rest = linear(self.const % divisor, [(a, c) for a, c in self.terms if c % divisor])
        below = min(0, bounds(rest)[0] // divisor)
        return linear(self.const // divisor + below, whole), rest - below * divisor

    def _digits(self, divisor: int) -> tuple[Index, Index, int] | None:
        """``(upper, lower, unit)`` with ``self == unit * upper + lower``, ``0 <= lower < unit``, ``unit | divisor``."""
        for unit in sorted({abs(c) for _, c in self.terms}, reverse=True):
            if unit == 1 or divisor % unit:
                continue
            upper, lower = self._split(unit)
            low, high = bounds(lower)
            if low >= 0 and high < unit:
                return upper, lower, unit
        return None

    def coefficient(self, var: Var) -> int:
        return next((c for a, c in self.terms if a is var), 0)


def linear(const: int, terms: Iterable[tuple[Atom, int]]) -> Index:
    """The canonical linear form; rejoins ``k * (e // k) + e % k`` into ``e``."""
    total: dict[Atom, int] = {}
    for atom, coefficient in terms:
        total[atom] = total.get(atom, 0) + coefficient
    for atom in [a for a in total if type(a) is Remainder]:
        factor = total[atom]
        twin = Quotient(*atom.fields)
        if factor and total.get(twin) == factor * atom.divisor:
            del total[atom], total[twin]
            joined = atom.index
            return linear(
                const + factor * joined.const,
                [*total.items(), *((a, c * factor) for a, c in joined.terms)],
            )
    kept = [(a, c) for a, c in total.items() if c]
    return Index(const, tuple(sorted(kept, key=lambda t: (-abs(t[1]), _text(t[0])))))


def _text(node: Any) -> str:
    """A stable sort key (interned nodes have no order of their own); cached on the node."""
    if not isinstance(node, Interned):
        return repr(node)
    try:
        return node.order
    except AttributeError:
        parts: list[str] = []
        for field in node.fields:
            inner = field if isinstance(field, tuple) else (field,)
            for item in inner:
                parts.extend(_text(x) for x in item) if isinstance(item, tuple) else parts.append(_text(item))
        text = f"{type(node).__name__}({','.join(parts)})"
        node.order = text if len(text) < 200 else f"{text[:150]}#{_digest(text)}"
        return node.order


def _digest(text: str) -> str:
    import hashlib

    return hashlib.sha1(text.encode()).hexdigest()[:16]


def constant(value: int) -> Index:
    return Index(value, ())


def of(atom: Atom) -> Index:
    return Index(0, ((atom, 1),))


def bounds(index: Index) -> tuple[int, int]:
    """The least and greatest value, inclusive, over all loop variables."""
    low = high = index.const
    for atom, coefficient in index.terms:
        if type(atom) is Var or type(atom) is Indirect:
            first, last = 0, atom.size - 1
        elif type(atom) is Remainder:
            first, last = 0, atom.divisor - 1
        else:
            first, last = (b // atom.divisor for b in bounds(atom.index))  # type: ignore[union-attr]
        low += min(first * coefficient, last * coefficient)
        high += max(first * coefficient, last * coefficient)
    return low, high


# ---------------------------------------------------------------------------------------------- values


class Expr(Interned):
    """A scalar value; ``dtype`` is its last field."""

    __slots__ = ()

    @property
    def dtype(self) -> str:
        return self.fields[-1]  # type: ignore[no-any-return]


class Const(Expr):
    """A literal."""

    __slots__ = ()

    @property
    def value(self) -> float | int | bool:
        return self.fields[0]  # type: ignore[no-any-return]


class Load(Expr):
    """The element of ``buffer`` at ``index`` (one ``Index`` per dimension)."""

    __slots__ = ()

    @property
    def buffer(self) -> str:
        return self.fields[0]  # type: ignore[no-any-return]

    @property
    def index(self) -> tuple[Index, ...]:
        return self.fields[1]  # type: ignore[no-any-return]


class Position(Expr):
    """An index as an integer value."""

    __slots__ = ()

    @property
    def index(self) -> Index:
        return self.fields[0]  # type: ignore[no-any-return]


class InRange(Expr):
    """Whether ``low <= index < high``."""

    __slots__ = ()

    @property
    def index(self) -> Index:
        return self.fields[0]  # type: ignore[no-any-return]

    @property
    def low(self) -> int:
        return self.fields[1]  # type: ignore[no-any-return]

    @property
    def high(self) -> int:
        return self.fields[2]  # type: ignore[no-any-return]


class Op(Expr):
    """``name(args)``. ``where`` evaluates (and loads) only the chosen branch."""

    __slots__ = ()

    @property
    def name(self) -> str:
        return self.fields[0]  # type: ignore[no-any-return]

    @property
    def args(self) -> tuple[Expr, ...]:
        return self.fields[1]  # type: ignore[no-any-return]


class Search(Expr):
    """How many of the ascending ``buffer[start : start + size]`` are below (or, if ``right``, at most) ``value``."""

    __slots__ = ()

    @property
    def buffer(self) -> str:
        return self.fields[0]  # type: ignore[no-any-return]

    @property
    def start(self) -> tuple[Index, ...]:
        return self.fields[1]  # type: ignore[no-any-return]

    @property
    def size(self) -> int:
        return self.fields[2]  # type: ignore[no-any-return]

    @property
    def value(self) -> Expr:
        return self.fields[3]  # type: ignore[no-any-return]

    @property
    def right(self) -> bool:
        return self.fields[4]  # type: ignore[no-any-return]


def in_range(index: Index, low: int, high: int) -> Expr:
    first, last = bounds(index)
    if low <= first and last < high:
        return Const(True, "bool")
    if last < low or first >= high:
        return Const(False, "bool")
    return InRange(index, low, high, "bool")


def children(node: Interned) -> Iterable[Interned]:
    for field in node.fields:
        if isinstance(field, Interned):
            yield field
        elif isinstance(field, tuple):
            for item in field:
                if isinstance(item, Interned):
                    yield item
                elif isinstance(item, tuple):
                    yield from (x for x in item if isinstance(x, Interned))


def walk(*roots: Interned) -> list[Interned]:
    """Every node below ``roots`` once, children before parents."""
    seen: dict[Interned, None] = {}

    def visit(node: Interned) -> None:
        if node not in seen:
            for child in children(node):
                visit(child)
            seen[node] = None

    for root in roots:
        visit(root)
    return list(seen)


def rebuilt(expr: Expr, change: Callable[[Expr], Expr]) -> Expr:
    """``expr`` with ``change`` made of its parts, innermost first: an operation is given with its operands changed.

    Indices, and what is searched for, stay as they are.
    """
    memo: dict[Expr, Expr] = {}

    def visit(node: Expr) -> Expr:
        if node not in memo:
            args = tuple(visit(arg) for arg in node.args) if isinstance(node, Op) else ()
            memo[node] = change(Op(node.name, args, node.dtype) if isinstance(node, Op) else node)
        return memo[node]

    return visit(expr)


def loads(*roots: Interned) -> list[Load]:
    return [n for n in walk(*roots) if isinstance(n, Load)]


# Arguments that leave the other one as it is (of a zero, up to its sign); padding makes them.
_NEUTRAL = {"add": 0, "max": -math.inf, "min": math.inf}


class Rewriter:
    """Rebuilds expressions bottom-up: variables by ``variables``, loads by ``load``; memoised per instance."""

    def __init__(
        self,
        variables: Mapping[Var, Index] | None = None,
        load: Callable[[Load], Expr] | None = None,
    ) -> None:
        self.variables = variables or {}
        self.load = load
        self.memo: dict[Interned, Any] = {}

    def index(self, index: Index) -> Index:
        found = self.memo.get(index)
        if found is None:
            found = constant(index.const)
            for atom, coefficient in index.terms:
                found = found + self._atom(atom) * coefficient
            self.memo[index] = found
        return found

    def _atom(self, atom: Atom) -> Index:
        if type(atom) is Var:
            return self.variables.get(atom, of(atom))
        if type(atom) is Remainder:
            return self.index(atom.index) % atom.divisor
        if type(atom) is Quotient:
            return self.index(atom.index) // atom.divisor
        assert isinstance(atom, Indirect)
        value = self.expr(atom.value)
        return value.index if isinstance(value, Position) else of(Indirect(value, atom.size))

    def indices(self, indices: tuple[Index, ...]) -> tuple[Index, ...]:
        return tuple(self.index(i) for i in indices)

    def expr(self, expr: Expr) -> Expr:
        found = self.memo.get(expr)
        if found is None:
            found = self.memo[expr] = self._expr(expr)
        return found

    def _expr(self, expr: Expr) -> Expr:
        if isinstance(expr, Load):
            load = Load(expr.buffer, self.indices(expr.index), expr.dtype)
            return self.load(load) if self.load else load
        if isinstance(expr, Position):
            return Position(self.index(expr.index), expr.dtype)
        if isinstance(expr, InRange):
            return in_range(self.index(expr.index), expr.low, expr.high)
        if isinstance(expr, Op):
            args = tuple(self.expr(a) for a in expr.args)
            if expr.name == "cast" and args[0].dtype == expr.dtype:
                return args[0]
            if expr.name == "where" and isinstance(args[0], Const):
                return args[1] if args[0].value else args[2]
            if expr.name == "and" and any(isinstance(a, Const) for a in args):
                if any(isinstance(a, Const) and not a.value for a in args):
                    return Const(False, "bool")
                return next((a for a in args if not isinstance(a, Const)), args[0])
            neutral = _NEUTRAL.get(expr.name)
            if neutral is not None and is_float(expr.dtype):
                for k, arg in enumerate(args):
                    if isinstance(arg, Const) and arg.value == neutral:
                        return args[1 - k]
            return Op(expr.name, args, expr.dtype)
        if isinstance(expr, Search):
            start = self.indices(expr.start)
            if self.load and isinstance(row := self.load(Load(expr.buffer, start, expr.dtype)), Load):
                start = row.index
            return Search(expr.buffer, start, expr.size, self.expr(expr.value), expr.right, expr.dtype)
        return expr


def cast(expr: Expr, dtype: str) -> Expr:
    """``expr`` as a ``dtype`` to compute with (halves stay fp32)."""
    target = compute_dtype(dtype)
    if expr.dtype == target:
        return expr
    if isinstance(expr, Const):
        value = expr.value
        if target == "bool":
            return Const(bool(value), target)
        if is_float(target):
            return Const(float(value), target)
        if not isinstance(value, float) or (value == value and abs(value) < 2**62):
            return Const(int(value) % 256 if target == "u8" else int(value), target)
    if target == "u8" and is_float(expr.dtype):
        expr = Op("cast", (expr,), "i64")  # torch takes this way, by which what is negative is defined
    return Op("cast", (expr,), target)
