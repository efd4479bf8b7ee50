"""Expressions -> C++ text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ke_gym.codegen.cpp_words import TYPES, bare_text, literal
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
    is_float,
    walk,
)

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "intdiv": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=",
    "gt": ">", "ge": ">=", "and": "&&", "or": "||", "bitand": "&", "bitor": "|", "bitxor": "^", "shl": "<<",
    "shr": ">>",
}  # fmt: skip
_KE = frozenset(
    [
        "exp",
        "exp2",
        "expm1",
        "log",
        "log2",
        "log10",
        "log1p",
        "tanh",
        "erf",
        "sqrt",
        "rsqrt",
        "sin",
        "cos",
        "pow",
        "sigmoid",
        "silu",
        "gelu",
        "gelu_tanh",
        "max",
        "min",
        "copysign",
    ]
)
_STD = frozenset(
    [
        "erfc",
        "lgamma",
        "tan",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "asinh",
        "acosh",
        "atanh",
        "atan2",
        "fmod",
        "hypot",
        "floor",
        "ceil",
        "trunc",
    ]
)
_FAULTING = frozenset(("intdiv", "floordiv", "remainder", "shl", "shr"))


_F64_STD = frozenset(("exp2", "log2", "log10"))
LONG = 4  # terms of a sum or maximum from which on each gets a line


class Text:
    """Prints expressions; values used more than once become named constants, guarded loads stay guarded."""

    def __init__(self, used: set[str], sizes: Mapping[str, int] | None = None) -> None:
        self.used = used
        self.sizes = sizes or {}
        self.names: dict[Interned, str] = {}
        self.prefix = "v"
        self.count = 0

    def _harmless(self, node: Interned) -> bool:
        """Whether a load may be made without its guard: its index is in bounds either way."""
        if isinstance(node, Load) and node.index and node.buffer in self.sizes:
            low, high = bounds(node.index[0])
            direct = not any(isinstance(n, Indirect) for n in walk(node.index[0]))
            return direct and low >= 0 and high < self.sizes[node.buffer]
        return isinstance(node, Load) and not node.index

    def _guards(self, where: Op) -> bool:
        inside = walk(*where.args[1:])
        return any(isinstance(n, (Load, Search)) and not self._harmless(n) for n in inside)

    def index(self, index: Index) -> str:
        parts = []
        for atom, coefficient in index.terms:
            text = self._atom(atom)
            sign = "-" if coefficient < 0 else "+"
            size = abs(coefficient)
            parts.append((sign, text if size == 1 else f"{text} * {size}"))
        if index.const or not parts:
            parts.append(("-" if index.const < 0 else "+", str(abs(index.const))))
        text = " ".join(f"{sign} {part}" for sign, part in parts)
        return text[2:] if text.startswith("+ ") else text.replace("- ", "-", 1)

    def _atom(self, atom: Interned) -> str:
        if isinstance(atom, Var):
            return atom.name
        if isinstance(atom, Remainder):
            return f"({self._inner(atom.index)} % {atom.divisor})"
        if isinstance(atom, Quotient):
            return f"({self._inner(atom.index)} / {atom.divisor})"
        assert isinstance(atom, Indirect)
        text = self.expr(atom.value)
        return text if atom.value.dtype == "i64" else f"(int64_t)({text})"

    def _inner(self, index: Index) -> str:
        text = self.index(index)
        return text if text.isidentifier() else f"({text})"

    def expr(self, expr: Expr) -> str:
        name = self.names.get(expr)
        return name if name is not None else self._print(expr)

    def _print(self, expr: Expr) -> str:
        if isinstance(expr, Const):
            return literal(expr.value, expr.dtype)
        if isinstance(expr, Load):
            if not expr.index:
                return expr.buffer
            element = f"{expr.buffer}[{self.index(expr.index[0])}]"
            return f"ke::flag({element})" if expr.dtype == "bool" else element
        if isinstance(expr, Position):
            return f"({TYPES[expr.dtype]})({self.index(expr.index)})"
        if isinstance(expr, InRange):
            return self._in_range(expr)
        if isinstance(expr, Search):
            self.used.add("search")
            flag = "true" if expr.right else "false"
            start = self.index(expr.start[0])
            row = expr.buffer if start == "0" else f"{expr.buffer} + {start}"
            return f"search<{expr.size}, {flag}>({row}, {bare_text(self.expr(expr.value))})"
        assert isinstance(expr, Op)
        return self._op(expr)

    def _in_range(self, expr: InRange) -> str:
        low, high = bounds(expr.index)
        tests = []
        index = self.index(expr.index)
        if low < expr.low:
            tests.append(f"{index} >= {expr.low}")
        if high >= expr.high:
            tests.append(f"{index} < {expr.high}")
        return f"({' && '.join(tests)})" if tests else "true"

    def _op(self, expr: Op) -> str:
        name = expr.name
        args = [self.expr(a) for a in expr.args]
        bare = ", ".join(bare_text(a) for a in args)
        kind = TYPES[expr.dtype]
        source = expr.args[0].dtype
        if name == "cast":
            if expr.dtype == "bool":
                return f"({args[0]} != 0)"
            return f"({kind}){args[0]}" if _simple(args[0]) else f"({kind})({args[0]})"
        if name == "where":
            return f"({args[0]} ? {args[1]} : {args[2]})"
        if name in ("max", "min") and expr.dtype == "bool":
            return f"({args[0]} {'||' if name == 'max' else '&&'} {args[1]})"
        if expr.dtype == "bool" and name in ("add", "mul"):
            return f"({args[0]} {'||' if name == 'add' else '&&'} {args[1]})"
        if name in _INFIX:
            if expr.dtype in ("i8", "i16", "u8") and name in ("add", "sub", "mul", "shl"):
                return f"({kind})({args[0]} {_INFIX[name]} {args[1]})"
            return f"({args[0]} {_INFIX[name]} {args[1]})"
        if name == "fmod" and not is_float(expr.dtype):
            return f"({kind})({args[0]} % {args[1]})"
        if name == "neg":
            negated = f"-({args[0]})" if args[0].startswith("-") else f"-{args[0]}"
            return f"({kind})({negated})" if expr.dtype in ("i8", "i16", "u8") else f"({negated})"
        if name == "not":
            return f"(!{args[0]})"
        if name == "bitnot":
            return f"({kind})(~{args[0]})"
        if name == "abs":
            return (
                f"ke::abs({bare})"
                if is_float(expr.dtype)
                else f"({kind})({args[0]} < 0 ? -{args[0]} : {args[0]})"
            )
        if name == "sign":
            return f"({kind})(({args[0]} > 0) - ({args[0]} < 0))"
        if name == "round":
            return (
                f"__builtin_rint{'f' if expr.dtype == 'f32' else ''}({bare})" if is_float(source) else args[0]
            )
        if name in ("floor", "ceil", "trunc"):
            return (
                f"__builtin_{name}{'f' if expr.dtype == 'f32' else ''}({bare})"
                if is_float(source)
                else args[0]
            )
        if name in ("floordiv", "remainder") or (name == "pow" and not is_float(expr.dtype)):
            helper = "power" if name == "pow" else name
            self.used.add(helper)
            return f"{helper}<{kind}>({bare})"
        if name in _KE and not (expr.dtype == "f64" and name in _F64_STD):
            bound = expr.args[-1]
            plain = isinstance(bound, Const) and bound.value == bound.value
            if name in ("max", "min") and plain and is_float(expr.dtype):
                return f"ke::{name}_of({bare})"
            if name in ("max", "min"):
                return f"ke::{name}<{kind}>({bare})"
            return f"ke::{name}({bare})"
        if name in _STD or name in _F64_STD:
            return f"std::{name}({bare})"
        raise AssertionError(f"no spelling of {name}")

    def safe(self, roots: Sequence[Expr]) -> tuple[set[Interned], set[Interned]]:
        """What may be computed always, guards or not; and the loads among it that guards hide."""
        safe: set[Interned] = set()
        chosen: set[Interned] = set()

        def reach(node: Interned) -> None:
            if node in safe:
                return
            safe.add(node)
            if isinstance(node, Op) and node.name == "where" and self._guards(node):
                reach(node.args[0])
            else:
                if isinstance(node, Op) and node.name == "where":
                    # Compilers vectorize unconditional loads better than masked ones.
                    chosen.update(n for n in walk(*node.args[1:]) if isinstance(n, Load) and n.index)
                for child in operands_of(node):
                    reach(child)

        for root in roots:
            reach(root)
        return safe, chosen

    def invariants(self, roots: Sequence[Expr], loop: Var) -> list[str]:
        """Declarations of what ``loop`` reads or searches, but does not change.

        Compilers leave such loads in loops that store, as a store might change what they read.
        """
        safe, _ = self.safe(roots)
        wanted: list[Interned] = []
        for node in walk(*roots):
            operands = operands_of(node)
            harmless = isinstance(node, Op) and node.name not in _FAULTING
            if harmless and all(child in safe or isinstance(child, Const) for child in operands):
                safe.add(node)
            if not isinstance(node, (Op, Load, Search)) or node not in safe or _moves_with(node, loop):
                continue
            if any(isinstance(n, Search) or (isinstance(n, Load) and n.index) for n in walk(node)):
                wanted.append(node)
        below = {n for w in wanted for n in walk(w) if n is not w}
        top = [w for w in dict.fromkeys(wanted) if w not in below and isinstance(w, Expr)]
        lines = self.bind(top)
        for node in top:
            if node not in self.names and not (isinstance(node, Load) and not node.index):
                text, name = self._print(node), self._fresh()
                lines.append(f"const {TYPES[node.dtype]} {name} = {bare_text(text)};")
                self.names[node] = name
        return lines

    def _fresh(self) -> str:
        self.count += 1
        return f"{self.prefix}{self.count - 1}"

    def _accumulated(self, node: Op) -> list[str]:
        """A long chain as one statement per term."""
        name = self._fresh()
        symbol = "<" if node.name in ("max", "min") else _INFIX[node.name]
        first, *rest = chain_of(node)
        lines = [f"{TYPES[node.dtype]} {name} = {bare_text(self.expr(first))};"]
        for term in rest:
            text = self.expr(term)
            if symbol == "<":
                lines.append(f"{name} = ke::{node.name}<{TYPES[node.dtype]}>({name}, {bare_text(text)});")
            else:
                lines.append(f"{name} {symbol}= {bare_text(text)};")
        self.names[node] = name
        return lines

    def bind(self, roots: Sequence[Expr], called: Mapping[Expr, str] | None = None) -> list[str]:
        """Declarations for subexpressions that several places use and that are safe to compute always.

        ``called``: the names of those that have one.
        """
        called = called or {}
        uses: dict[Interned, int] = {}
        for root in roots:
            uses[root] = uses.get(root, 0) + 1
        for node in walk(*roots):
            for child in operands_of(node):
                uses[child] = uses.get(child, 0) + 1
        safe, chosen = self.safe(roots)
        lines = []
        chained = {n for root in roots for n in chains_in(root) if n in safe}
        for node in walk(*roots):
            if node in chained and node not in self.names:
                assert isinstance(node, Op)
                lines.extend(self._accumulated(node))
                continue
            named = uses.get(node, 0) > 1 or node in chosen
            if node in safe and named and isinstance(node, (Op, Load, Search)) and node not in self.names:
                if isinstance(node, Load) and not node.index:
                    continue
                if all(isinstance(n, (Op, Const)) for n in walk(node)):
                    continue
                text = self._print(node)
                name = called.get(node) or self._fresh()
                kind = TYPES[node.dtype]
                lines.append(f"const {kind} {name} = {text};")
                self.names[node] = name
        return lines


def _moves_with(root: Interned, var: Var) -> bool:
    return any(n is var for n in walk(root))


def chain_of(node: Interned) -> list[Expr]:
    """The terms of a sum, product, maximum or minimum built from left to right."""
    if not isinstance(node, Op) or node.name not in ("add", "mul", "max", "min") or node.dtype == "bool":
        return []
    terms: list[Expr] = []
    here: Expr = node
    while isinstance(here, Op) and (here.name, here.dtype) == (node.name, node.dtype):
        terms.append(here.args[1])
        here = here.args[0]
    return [here, *reversed(terms)]


def chains_in(root: Interned) -> list[Interned]:
    """The outermost operations that combine ``LONG`` terms or more."""
    found: list[Interned] = []
    covered: set[Interned] = set()
    for node in reversed(walk(root)):
        terms = [] if node in covered else chain_of(node)
        if len(terms) >= LONG:
            found.append(node)
            while isinstance(node, Op) and node.args[0] is not terms[0]:
                node = node.args[0]
                covered.add(node)
    return found


def operands_of(node: Interned) -> list[Interned]:
    """Value operands, looking through indices."""
    found: list[Interned] = []
    if isinstance(node, Op):
        found.extend(node.args)
    elif isinstance(node, Search):
        found.append(node.value)
        indices: tuple[Index, ...] = node.start
        found.extend(v for i in indices for v in _indirects(i))
    elif isinstance(node, Load):
        found.extend(v for i in node.index for v in _indirects(i))
    elif isinstance(node, (Position, InRange)):
        found.extend(_indirects(node.index))
    return found


def _indirects(index: Index) -> list[Interned]:
    found: list[Interned] = []
    for atom, _ in index.terms:
        if isinstance(atom, Indirect):
            found.append(atom.value)
        elif isinstance(atom, Quotient):
            found.extend(_indirects(atom.index))
    return found


def _simple(text: str) -> bool:
    return text.isidentifier() or (
        text.endswith("]") and text.count("[") == 1 and " " not in text.split("[")[0]
    )
