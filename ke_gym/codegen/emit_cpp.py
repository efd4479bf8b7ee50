"""Loop nests -> C++ text. Only spelling lives here; what is computed and in which order is in ``nest``."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence

from ke_gym.codegen import contraction as templates
from ke_gym.codegen.contract import Contraction, Store
from ke_gym.codegen.expr import (
    BYTES,
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
    Rewriter,
    Search,
    Var,
    bounds,
    compute_dtype,
    is_float,
    linear,
    of,
    walk,
)
from ke_gym.codegen.graph import Buffer
from ke_gym.codegen.nest import ROW_BYTES, Item, Local, Loop, Nest, Stage, Target
from ke_gym.codegen.one_pass import SUM_EXP

TYPES = {
    "f32": "float", "f64": "double", "bf16": "ke::bf16", "f16": "ke::half", "bool": "bool", "u8": "uint8_t",
    "i8": "int8_t", "i16": "int16_t", "i32": "int32_t", "i64": "int64_t",
}  # fmt: skip

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

_IDENTITY = {"sum": 0, "prod": 1, "any": False, "all": True}
_COMBINE = {"sum": "+", "prod": "*", "any": "||", "all": "&&", "max": "max", "min": "min"}
_LOWEST = {"i8": -128, "i16": -(2**15), "i32": -(2**31), "i64": -(2**63), "u8": 0, "bool": 0}
_GREATEST = {"i8": 127, "i16": 2**15 - 1, "i32": 2**31 - 1, "i64": 2**63 - 1, "u8": 255, "bool": 1}

# In elements: what is asked for at once, how far ahead, the rows short enough to fetch the next one instead, the
# rows too short to fetch anything, and the tensors small enough to stay in the cache.
FETCHED, DISTANCE, FAR, NEAR, CACHED = 512, 1024, 4096, 64, 1 << 16
STREAMED = 1 << 23  # bytes of a result that leaves past the caches
STREAM_BYTES = 1 << 20  # least result that a schedule may send there
CHUNK = 4096  # elements it sends there at a time
LONG = 4  # terms of a sum or maximum from which on each gets a line
VECTOR = 16  # elements of a vector of float
SHORT = 256  # iterations up to which what is left after whole vectors counts
ONLINE = 1024  # elements whose maximum is taken before their exponentials: they stay in the nearest cache
JAM = 8  # rows summed per pass over a buffer of column sums

HELPERS = {
    "search": """\
// How many of the ascending row[0..left) are below value (or at most, if RIGHT). As many probes for every value
// and no branch, so that the compiler lets a vector of searches run at once; they probe where torch does, so that
// NaN among the boundaries or as value gives what torch gives.
template <int64_t MOST, bool RIGHT, typename Row, typename T>
static inline __attribute__((always_inline)) int64_t search(
    const Row* row, T value, int64_t first = 0, int64_t left = MOST) {
  if constexpr (MOST == 0) {
    return first;
  } else {
    const bool some = MOST > 1 || left > 0;  // only the last probe may find nothing left
    const int64_t half = left >> 1;
    const Row probed = row[some ? first + half : 0];
    const int64_t beyond = some & (RIGHT ? !(probed > value) : !(probed >= value)) ? 1 : 0;
    return search<MOST / 2, RIGHT>(row, value, first + (-beyond & (half + 1)), half - (beyond & ~left & 1));
  }
}
""",
    "floordiv": """\
template <typename T>
static inline T floordiv(T a, T b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
""",
    "remainder": """\
// As torch.remainder: the sign of the divisor.
template <typename T>
static inline T remainder(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    const T r = std::fmod(a, b);
    return r != 0 && (r < 0) != (b < 0) ? r + b : r;
  } else {
    const T r = a % b;
    return r != 0 && (r < 0) != (b < 0) ? r + b : r;
  }
}
""",
    "power": """\
template <typename T>
static inline T power(T base, T exponent) {
  if (exponent < 0) return base == 1 ? 1 : base == -1 ? (exponent % 2 ? -1 : 1) : 0;
  T result = 1;
  for (; exponent; exponent >>= 1, base *= base) result *= exponent & 1 ? base : 1;
  return result;
}
""",
}


def literal(value: float | int | bool, dtype: str) -> str:
    if dtype == "bool":
        return "true" if value else "false"
    if not is_float(dtype):
        if value == -(2**63):
            return "INT64_MIN"  # minus a literal would be minus one that is too large
        return str(int(value)) if abs(int(value)) < 2**31 else f"INT64_C({int(value)})"
    value = float(value)
    if math.isnan(value):
        return "ke::nan" if dtype == "f32" else "(double)ke::nan"
    if math.isinf(value):
        text = "ke::inf" if dtype == "f32" else "(double)ke::inf"
        return text if value > 0 else f"-{text}"
    text = repr(value)
    if dtype == "f32":
        import numpy

        text = str(numpy.float32(value))
        text = text if any(c in text for c in ".en") else f"{text}.0"
        return f"{text}f"
    return text


def identity(op: str, dtype: str) -> str:
    if op in ("max", "min"):
        if is_float(dtype):
            return literal(-math.inf if op == "max" else math.inf, dtype)
        return literal((_LOWEST if op == "max" else _GREATEST)[dtype], dtype)
    return literal(_IDENTITY[op], dtype)


def combine(op: str, a: str, b: str) -> str:
    symbol = _COMBINE[op]
    return f"ke::{symbol}({a}, {b})" if symbol in ("max", "min") else f"{a} {symbol} {b}"


def accumulate(op: str, target: str, value: str) -> str:
    symbol = _COMBINE[op]
    if symbol in ("+", "*"):
        return f"{target} {symbol}= {value};"
    return f"{target} = {combine(op, target, value)};"


def notes_nan(op: str | None, dtype: str) -> bool:
    """Whether a reduction in a register keeps NaN in a flag of its own: the extreme itself is one instruction."""
    return op in ("max", "min") and is_float(dtype)


def accumulate_extreme(op: str, target: str, flag: str, value: str) -> str:
    """Takes ``value`` into the running extreme ``target`` and notes in ``flag`` if it is NaN."""
    return f"ke::take_{op}({target}, {flag}, {value});"


def extreme(flag: str, value: str, dtype: str) -> str:
    return f"{flag} ? {literal(math.nan, dtype)} : {value}"


# ------------------------------------------------------------------------------------------ expressions


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
            return f"search<{expr.size}, {flag}>({row}, {_bare(self.expr(expr.value))})"
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
        bare = ", ".join(_bare(a) for a in args)
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
            return f"({kind})(-{args[0]})" if expr.dtype in ("i8", "i16", "u8") else f"(-{args[0]})"
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

    def _safe(self, roots: Sequence[Expr]) -> tuple[set[Interned], set[Interned]]:
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
                for child in _operands(node):
                    reach(child)

        for root in roots:
            reach(root)
        return safe, chosen

    def invariants(self, roots: Sequence[Expr], loop: Var) -> list[str]:
        """Declarations of what ``loop`` reads or searches, but does not change.

        Compilers leave such loads in loops that store, as a store might change what they read.
        """
        safe, _ = self._safe(roots)
        wanted: list[Interned] = []
        for node in walk(*roots):
            operands = _operands(node)
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
                lines.append(f"const {TYPES[node.dtype]} {name} = {_bare(text)};")
                self.names[node] = name
        return lines

    def _fresh(self) -> str:
        self.count += 1
        return f"{self.prefix}{self.count - 1}"

    def _accumulated(self, node: Op) -> list[str]:
        """A long chain as one statement per term."""
        name = self._fresh()
        symbol = "<" if node.name in ("max", "min") else _INFIX[node.name]
        first, *rest = _chain(node)
        lines = [f"{TYPES[node.dtype]} {name} = {_bare(self.expr(first))};"]
        for term in rest:
            text = self.expr(term)
            if symbol == "<":
                lines.append(f"{name} = ke::{node.name}<{TYPES[node.dtype]}>({name}, {_bare(text)});")
            else:
                lines.append(f"{name} {symbol}= {_bare(text)};")
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
            for child in _operands(node):
                uses[child] = uses.get(child, 0) + 1
        safe, chosen = self._safe(roots)
        lines = []
        chained = {n for root in roots for n in _chains(root) if n in safe}
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


def _chain(node: Interned) -> list[Expr]:
    """The terms of a sum, product, maximum or minimum built from left to right."""
    if not isinstance(node, Op) or node.name not in ("add", "mul", "max", "min") or node.dtype == "bool":
        return []
    terms: list[Expr] = []
    here: Expr = node
    while isinstance(here, Op) and (here.name, here.dtype) == (node.name, node.dtype):
        terms.append(here.args[1])
        here = here.args[0]
    return [here, *reversed(terms)]


def _chains(root: Interned) -> list[Interned]:
    """The outermost operations that combine ``LONG`` terms or more."""
    found: list[Interned] = []
    covered: set[Interned] = set()
    for node in reversed(walk(root)):
        terms = [] if node in covered else _chain(node)
        if len(terms) >= LONG:
            found.append(node)
            while isinstance(node, Op) and node.args[0] is not terms[0]:
                node = node.args[0]
                covered.add(node)
    return found


def _operands(node: Interned) -> list[Interned]:
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


def streamable(nest: Nest, stage: Stage) -> bool:
    """Whether a stage's one result is large, written in memory order, and not read again by this nest."""
    if len(stage.items) != 1 or not stage.loops or stage.loops[-1].limit is not None:
        return False
    (item,) = stage.items
    target, var = item.target, stage.loops[-1].var
    read = {n.buffer for s in nest.stages for i in s.items for n in walk(i.expr) if isinstance(n, Load)}
    return (
        target.kind == "global" and item.op is None and item.scan is None and target.name not in read
        and target.index.coefficient(var) == 1 and var.size * BYTES[target.dtype] >= 1024
        and STREAM_BYTES <= item.node.numel * BYTES[target.dtype] < STREAMED  # larger ones always leave so
    )  # fmt: skip


def store_text(text: str, dtype: str, value_dtype: str) -> str:
    return text if compute_dtype(dtype) == value_dtype else f"({TYPES[dtype]})({text})"


# ------------------------------------------------------------------------------------------------ nests


class Printer:
    """Prints one nest."""

    def __init__(self, nest: Nest, used: set[str]) -> None:
        self.nest = nest
        self.used = used
        self.sizes = {b.name: extent(b) for b in (*nest.reads, *nest.writes)}
        self.sizes.update((r.name, r.size) for r in nest.rows)
        self.lines: list[str] = []
        self.depth = 1
        self.fetched: list[str] = []
        self.streamed: dict[str, str] = {}
        self.offset = ""
        self.hoisted = 0
        self.known: dict[Interned, str] = {}  # names of values made before the innermost loop

    def line(self, text: str) -> None:
        self.lines.append("  " * self.depth + text if text else "")

    def open(self, text: str) -> None:
        self.line(text + " {")
        self.depth += 1

    def close(self) -> None:
        self.depth -= 1
        self.line("}")

    def body(self) -> list[str]:
        nest = self.nest
        if not nest.outer and not nest.private:
            if not any(i.op for stage in nest.stages for i in stage.items):
                for stage in nest.stages:
                    share = math.prod(loop.var.size for loop in stage.loops)
                    whole = sum(math.prod(loop.var.size for loop in s.loops) for s in nest.stages)
                    parallel = nest.work * share // max(whole, 1) >= 2 * nest.group.grain
                    loops = collapsed(stage).loops
                    self.fetched = []
                    if parallel and loops and loops[-1].limit is None:
                        around = loops[-2].var if len(loops) > 1 else None
                        self.fetched = self._ahead(collapsed(stage), around, loops[-1].var.size)
                    self._stage(stage, parallel)
            else:
                self._iteration()
            return self.lines
        team = nest.private and nest.parallel
        if team:
            self._private_parallel()
        elif nest.private:
            for local in nest.private:
                kind, start = TYPES[local.dtype], identity(local.op or "sum", local.dtype)
                self.line(f"std::vector<{kind}> {local.name}_sum({local.size}, {start});")
                self.line(f"{kind}* const {local.name}_part = {local.name}_sum.data();")
            self._outer_loops(parallel=False, inside_region=False)
            self._finish_private("1")
        else:
            self._outer_loops(parallel=nest.parallel, inside_region=False)
        return self.lines

    def _private_parallel(self) -> None:
        self.line("const int threads = omp_get_max_threads();")
        for local in self.nest.private:
            kind, start = TYPES[local.dtype], identity(local.op or "sum", local.dtype)
            self.line(f"std::vector<{kind}> {local.name}_sum(threads * (int64_t){_padded(local)}, {start});")
        self.line("#pragma omp parallel num_threads(threads)")
        self.line("{")
        self.depth += 1
        for local in self.nest.private:
            self.line(
                f"{TYPES[local.dtype]}* const {local.name}_part = "
                f"{local.name}_sum.data() + omp_get_thread_num() * (int64_t){_padded(local)};"
            )
        self._outer_loops(parallel=True, inside_region=True)
        self.close()
        self._finish_private("threads")

    def _finish_private(self, threads: str) -> None:
        for local in self.nest.private:
            out = next(b for b in self.nest.writes if b.name == local.name)
            op = local.op or "sum"
            kind = TYPES[local.dtype]
            if threads != "1":
                self.open(f"for (int64_t i = 0; i < {local.size}; ++i)")
                self.line(f"{kind} total = {local.name}_sum[i];")
                self.line(
                    "for (int t = 1; t < threads; ++t) "
                    + accumulate(op, "total", f"{local.name}_sum[t * (int64_t){_padded(local)} + i]")
                )
                self.line(f"{out.name}[i] = {store_text('total', out.dtype, local.dtype)};")
                self.close()
            else:
                value = store_text(f"{local.name}_sum[i]", out.dtype, local.dtype)
                self.line(f"for (int64_t i = 0; i < {local.size}; ++i) {out.name}[i] = {value};")

    def _outer_loops(self, parallel: bool, inside_region: bool) -> None:
        loops = [loop for loop in self.nest.outer if loop.var.size > 1]
        if parallel and loops:
            work = "for" if inside_region else "parallel for"
            nested = f" collapse({len(loops)})" if len(loops) > 1 else ""
            schedule = "dynamic" if self.nest.group.dynamic and not self.nest.private else "static"
            self.line(f"#pragma omp {work}{nested} schedule({schedule})")
        for loop in loops:
            self.open(
                f"for (int64_t {loop.var.name} = 0; {loop.var.name} < {loop.var.size}; ++{loop.var.name})"
            )
        for loop in self.nest.outer:
            if loop.var.size == 1:
                self.line(f"constexpr int64_t {loop.var.name} = 0;")
        self._iteration()
        for _ in loops:
            self.close()

    def _iteration(self) -> None:
        for row in self.nest.rows:
            self.line(f"alignas(64) {TYPES[row.dtype]} {row.name}[{row.size}];")
        stages = [collapsed(stage) for stage in self.nest.stages]
        # What a later iteration reads first is fetched while this one works on what is in the cache already.
        able = [k for k, stage in enumerate(stages) if self._fetches(stage)]
        fetching = next((k for k in able if k), 0 if able else None)
        for k, stage in enumerate(stages):
            self.fetched = []
            if k == fetching and self.nest.outer:
                length = stages[0].loops[-1].var.size if stages[0].loops else 0
                self.fetched = self._ahead(stages[0], self.nest.outer[-1].var, length)
            self._stage(stage, parallel=False)

    def _fetches(self, stage: Stage) -> bool:
        """Whether a stage is one loop, in the course of which something can be fetched."""
        plain = all(item.scan is None and item.op != SUM_EXP for item in stage.items)
        return plain and len(stage.loops) == 1 and stage.loops[0].limit is None

    def _ahead(self, stage: Stage, var: Var | None, length: int) -> list[str]:
        """Where ``stage`` reads so much later: iterations of the loop around it, or elements along its own.

        Beyond the end of a tensor a fetch does nothing.
        """
        ahead = self.nest.group.prefetch
        if not ahead or length < NEAR:
            return []
        inner = stage.loops[-1].var
        around = any(loop.var is var for loop in stage.loops)  # else none of the stage's loops is open yet
        start = {loop.var: linear(0, []) for loop in stage.loops if not around or loop.var is inner}
        if var is not None and length <= FAR:
            if var.size <= ahead:
                return []
            start[var] = of(var) + ahead * max(1, DISTANCE // length)
        else:
            start[inner] = linear(ahead * DISTANCE, [])
        later = Rewriter(start)
        found: dict[str, None] = {}
        for load in (n for i in stage.items for n in walk(i.expr) if isinstance(n, Load) and n.index):
            place = load.index[0]
            streams = place.coefficient(inner) == 1 and (var is None or any(n is var for n in walk(place)))
            if streams and self.sizes.get(load.buffer, 0) >= CACHED:
                found[_offset(load.buffer, Text(self.used).index(later.index(place)))] = None
        return list(found)

    # ---------------------------------------------------------------------------------------- stages

    def _stage(self, stage: Stage, parallel: bool) -> None:
        self.known = {}
        stage = collapsed(stage)
        if any(item.scan is not None for item in stage.items):
            self._scan(stage)
            return
        if any(item.op == SUM_EXP for item in stage.items):
            self._online(stage)
            return
        loops = stage.loops
        starts = {id(item): trailing(item, loops) for item in stage.items}
        for item in stage.items:
            outside = loops[: starts[id(item)] or 0]
            folds = starts[id(item)] is None or any(loop.var in item.reduced for loop in outside)
            if item.op and folds and item.target.kind in ("row", "global"):
                self._initialise(item, loops)
        self._loop(stage, starts, 0, parallel)

    def _initialise(self, item: Item, loops: tuple[Loop, ...]) -> None:
        kept = [loop for loop in loops if loop.var not in item.reduced]
        for loop in kept[:-1]:
            self.open(self._for(loop))
        text = Text(self.used)
        start = identity(item.op or "sum", compute_dtype(item.target.dtype))
        value = store_text(start, item.target.dtype, compute_dtype(item.target.dtype))
        place = f"{item.target.name}[{text.index(item.target.index)}]"
        if kept:
            self.line(f"{self._for(kept[-1])} {place} = {value};")
        else:
            self.line(f"{place} = {value};")
        for _ in kept[:-1]:
            self.close()

    def _for(self, loop: Loop) -> str:
        name = loop.var.name
        if loop.limit is None:
            return f"for (int64_t {name} = 0; {name} < {loop.var.size}; ++{name})"
        limit = Text(self.used).index(loop.limit)
        return f"for (int64_t {name} = 0; {name} < std::min<int64_t>({loop.var.size}, {limit}); ++{name})"

    def _loop(self, stage: Stage, starts: dict[int, int | None], depth: int, parallel: bool) -> None:
        loops = stage.loops
        if not loops:
            self._statements(stage, stage.items, Rewriter(), "", starts)
            return
        begun = [item for item in stage.items if item.op and starts[id(item)] == depth]
        innermost = depth == len(loops) - 1
        streams = self._streams(stage, starts)
        for item in begun:
            kind, start = TYPES[acc_dtype(item)], identity(item.op or "sum", acc_dtype(item))
            names = (
                [f"{item.node.name}_acc{u}" for u in range(streams)]
                if streams > 1
                else [f"{item.node.name}_acc"]
            )
            self.line(f"{kind} " + ", ".join(f"{n} = {start}" for n in names) + ";")
            if notes_nan(item.op, acc_dtype(item)):
                self.line(f"int{8 * BYTES[acc_dtype(item)]}_t {item.node.name}_nan = 0;")
        if innermost:
            self._innermost(stage, starts, streams, parallel)
        else:
            if parallel and depth == 0:
                nested = len(loops) - 1
                self.line(
                    "#pragma omp parallel for"
                    + (f" collapse({nested})" if nested > 1 else "")
                    + " schedule(static)"
                )
            if depth == len(loops) - 2 and self._jam(stage, starts):
                self._jammed(stage, starts)
            else:
                self.open(self._for(loops[depth]))
                self._loop(stage, starts, depth + 1, parallel)
                self.close()
        for item in begun:
            self._finish(item, loops[:depth], streams)

    def _jam(self, stage: Stage, starts: dict[int, int | None]) -> bool:
        """Whether the two innermost loops sum rows into a buffer: then several rows are summed per pass over it."""
        rows = stage.loops[-2]
        return rows.limit is None and rows.var.size >= JAM and all(
            item.op == "sum" and rows.var in item.reduced and starts[id(item)] is None
            and is_float(item.target.dtype) and compute_dtype(item.target.dtype) == item.target.dtype
            for item in stage.items
        )  # fmt: skip

    def _jammed(self, stage: Stage, starts: dict[int, int | None]) -> None:
        rows, columns = stage.loops[-2:]
        name, whole = rows.var.name, rows.var.size // JAM * JAM
        self.open(f"for (int64_t {name} = 0; {name} < {whole}; {name} += {JAM})")
        first = of(Var(rows.var.name, rows.var.size - JAM + 1))
        summands = [
            [Rewriter({rows.var: first + u}).expr(item.expr) for u in range(JAM)] for item in stage.items
        ]
        known = self._hoist([v for values in summands for v in values], columns)
        self._simd([], [""], False)
        self.open(self._for(columns))
        for number, (item, values) in enumerate(zip(stage.items, summands)):
            text = Text(self.used, self.sizes)
            text.count = 100 * number
            text.names.update(known)
            for line in text.bind(values):
                self.line(line)
            parts = [text.expr(v) for v in values]
            while len(parts) > 1:
                parts = [f"({a} + {b})" for a, b in zip(parts[::2], parts[1::2])]
            self.line(accumulate("sum", self._place(item.target, text, Rewriter()), _bare(parts[0])))
        self.close()
        self.close()
        if whole < rows.var.size:
            self.open(f"for (int64_t {name} = {whole}; {name} < {rows.var.size}; ++{name})")
            self._simd([], [""], False)
            self.open(self._for(columns))
            self._statements(stage, stage.items, Rewriter(), "", starts)
            self.close()
            self.close()

    def _streams(self, stage: Stage, starts: dict[int, int | None]) -> int:
        last = stage.loops[-1]
        reducing = [item for item in stage.items if item.op and starts[id(item)] is not None]
        if not reducing or last.limit is not None:
            return 1
        stores = any(item.target.kind != "scalar" for item in stage.items if item not in reducing)
        streams = 1 if stores or self.fetched else self.nest.group.accumulators
        while streams > 1 and last.var.size < streams * 32:
            streams //= 2
        return max(streams, 1)

    def _innermost(self, stage: Stage, starts: dict[int, int | None], streams: int, parallel: bool) -> None:
        loop = stage.loops[-1]
        if self.nest.group.stream and streamable(self.nest, stage):
            self._stream_out(stage, parallel and len(stage.loops) == 1)
            return
        reducing = [item for item in stage.items if item.op and starts[id(item)] is not None]
        length = loop.var.size
        part = length // streams // 16 * 16 if streams > 1 else length
        names = [str(u) for u in range(streams)] if streams > 1 else [""]
        alone = parallel and len(stage.loops) == 1
        self.known = {} if alone else self._hoist([item.expr for item in stage.items], loop)
        self.streamed = self._streamed(stage)
        if self.fetched or self.streamed:
            self._in_pieces(stage, loop, reducing, starts, alone)
            self.streamed = {}
            return
        if not alone and overlaps(stage):
            self._overlapping(stage, loop, starts)
            return
        if alone or not scattered(stage):
            self._simd(reducing, names, alone)
        if streams == 1:
            self.open(self._for(loop))
            self._statements(stage, stage.items, Rewriter(), "", starts)
            self.close()
            return
        name = loop.var.name
        self.open(f"for (int64_t {name} = 0; {name} < {part}; ++{name})")
        for u in range(streams):
            shift = Rewriter({loop.var: of(Var(loop.var.name, part)) + u * part})
            self._statements(stage, stage.items, shift, str(u), starts)
        self.close()
        if part * streams < length:
            self._simd(reducing, ["0"], False)
            self.open(f"for (int64_t {name} = {part * streams}; {name} < {length}; ++{name})")
            self._statements(stage, stage.items, Rewriter(), "0", starts)
            self.close()

    def _streamed(self, stage: Stage) -> dict[str, str]:
        """Large results stored along the innermost loop and read nowhere in the nest: name -> its first element."""
        loop = stage.loops[-1]
        if loop.limit is not None or loop.var.size < NEAR:
            return {}
        read = {
            n.buffer for s in self.nest.stages for i in s.items for n in walk(i.expr) if isinstance(n, Load)
        }
        start = Rewriter({loop.var: linear(0, [])})
        found: dict[str, str] = {}
        for item in stage.items:
            name, index = item.target.name, item.target.index
            large = self.sizes.get(name, 0) * BYTES[item.target.dtype] >= STREAMED
            stored = item.op is None and item.target.kind == "global" and index.coefficient(loop.var) == 1
            if stored and large and name not in read:
                found[name] = _offset(name, Text(self.used).index(start.index(index)))
        return found

    def _in_pieces(
        self,
        stage: Stage,
        loop: Loop,
        reducing: list[Item],
        starts: dict[int, int | None],
        parallel: bool,
    ) -> None:
        """The loop in pieces: what comes later is asked for before each, large results leave after it."""
        self.used.add("ke/memory.h")
        name, length = loop.var.name, loop.var.size
        short = length < 2 * FETCHED
        piece, at = (length, "") if short else (FETCHED, " + part")
        count = str(piece) if length % piece == 0 else f"std::min<int64_t>({FETCHED}, {length} - part)"
        if parallel:
            self.line("#pragma omp parallel for schedule(static)")
        if not short:
            self.open(f"for (int64_t part = 0; part < {length}; part += {FETCHED})")
        for pointer in self.fetched:
            self.line(f"ke::prefetch({pointer}{at}, {piece});")
        for item in stage.items:
            if item.target.name in self.streamed:
                kind = TYPES[item.target.dtype]
                self.line(f"alignas(64) {kind} {item.target.name}_part[{piece}];")
        self._simd(reducing, [""], False)
        end = "" if short else f"part + {FETCHED}" if length % FETCHED == 0 else f"part + {count}"
        self.open(self._for(loop) if short else f"for (int64_t {name} = part; {name} < {end}; ++{name})")
        self.offset = name if short else f"{name} - part"
        self._statements(stage, stage.items, Rewriter(), "", starts)
        self.close()
        for target, first in self.streamed.items():
            self.line(f"ke::stream_out({first}{at}, {target}_part, {count});")
        if not short:
            self.close()

    def _stream_out(self, stage: Stage, parallel: bool) -> None:
        """Results go into a small buffer, and from there to memory past the caches."""
        (item,) = stage.items
        loop, target = stage.loops[-1], item.target
        name, size, line = loop.var.name, loop.var.size, f"{target.name}_line"
        chunk = min(CHUNK, size)
        self.used.add("ke/streaming.h")
        if parallel:
            self.line("#pragma omp parallel for schedule(static)")
        self.open(f"for (int64_t first = 0; first < {size}; first += {chunk})")
        self.line(f"alignas(64) {TYPES[target.dtype]} {line}[{chunk}];")
        self.line(f"const int64_t end = std::min<int64_t>(first + {chunk}, {size});")
        self._simd([], [""], False)
        self.open(f"for (int64_t {name} = first; {name} < end; ++{name})")
        text = Text(self.used, self.sizes)
        for declared in text.bind([item.expr]):
            self.line(declared)
        value = store_text(_bare(text.expr(item.expr)), target.dtype, item.expr.dtype)
        self.line(f"{line}[{name} - first] = {value};")
        self.close()
        start = Rewriter({loop.var: of(Var("first", size))}).index(target.index)
        self.line(
            f"ke::write_past_caches({target.name} + {Text(self.used).index(start)}, {line}, end - first);"
        )
        self.close()

    def _overlapping(self, stage: Stage, loop: Loop, starts: dict[int, int | None]) -> None:
        """Whole vectors only: the last one begins early enough, and does some elements again."""
        name, last = loop.var.name, loop.var.size - VECTOR
        self.open(f"for (int64_t part = 0; part < {loop.var.size}; part += {VECTOR})")
        self.line(f"const int64_t start = std::min<int64_t>(part, {last});")
        self._simd([], [""], False)
        self.open(f"for (int64_t {name} = start; {name} < start + {VECTOR}; ++{name})")
        self._statements(stage, stage.items, Rewriter(), "", starts)
        self.close()
        self.close()

    def _hoist(self, roots: Sequence[Expr], loop: Loop) -> dict[Interned, str]:
        """Print what the innermost loop need not look up again for each element."""
        text = Text(self.used, self.sizes)
        text.prefix, text.count = "h", self.hoisted
        for line in text.invariants(roots, loop.var):
            self.line(line)
        self.hoisted = text.count
        return text.names

    def _simd(self, reducing: list[Item], streams: list[str], parallel: bool) -> None:
        clauses = []
        by_op: dict[str, list[str]] = {}
        for item in reducing:
            names = [f"{item.node.name}_acc{u}" for u in streams]
            by_op.setdefault(item.op or "sum", []).extend(names)
        for op, names in by_op.items():
            clauses.append(f"reduction({_COMBINE[op]} : {', '.join(names)})")
        flags = [f"{item.node.name}_nan" for item in reducing if notes_nan(item.op, acc_dtype(item))]
        if flags:
            clauses.append(f"reduction(| : {', '.join(flags)})")
        lanes = self.nest.group.simd
        if lanes:
            clauses.append(f"simdlen({lanes})")
        head = "#pragma omp parallel for simd schedule(static)" if parallel else "#pragma omp simd"
        self.line(" ".join([head, *clauses]))

    def _statements(
        self,
        stage: Stage,
        items: tuple[Item, ...],
        shift: Rewriter,
        stream: str,
        starts: dict[int, int | None],
    ) -> None:
        text = Text(self.used, self.sizes)
        text.count = int(stream or 0) * 100
        text.names.update(self.known)
        exprs = [shift.expr(item.expr) for item in items]
        called = {
            expr: item.target.name
            for item, expr in zip(items, exprs)
            if item.op is None and item.target.kind == "scalar" and item.target.dtype == expr.dtype
        }
        for line in text.bind(exprs, called):
            self.line(line)
        for item, expr in zip(items, exprs):
            value = text.expr(expr)
            target = item.target
            if value == target.name:
                continue
            if item.op and starts[id(item)] is not None:
                accumulator = f"{item.node.name}_acc{stream}"
                if notes_nan(item.op, acc_dtype(item)):
                    flag = f"{item.node.name}_nan"
                    self.line(accumulate_extreme(item.op, accumulator, flag, _bare(value)))
                else:
                    self.line(accumulate(item.op, accumulator, _bare(value)))
            elif item.op:
                place = self._place(target, text, shift)
                self._update(item.op, place, target, value)
            elif target.kind == "scalar":
                self.line(f"const {TYPES[target.dtype]} {target.name} = {_bare(value)};")
                text.names[expr] = target.name
            else:
                self.line(
                    f"{self._place(target, text, shift)} = {store_text(_bare(value), target.dtype, expr.dtype)};"
                )

    def _update(self, op: str, place: str, target: Target, value: str) -> None:
        inner = compute_dtype(target.dtype)
        if target.kind == "private" or inner == target.dtype:
            self.line(accumulate(op, place, _bare(value)))
        else:
            self.line(
                f"{place} = {store_text(combine(op, f'({TYPES[inner]}){place}', value), target.dtype, inner)};"
            )

    def _place(self, target: Target, text: Text, shift: Rewriter) -> str:
        if target.name in self.streamed:
            return f"{target.name}_part[{self.offset}]"
        suffix = "_part" if target.kind == "private" else ""
        return f"{target.name}{suffix}[{text.index(shift.index(target.index))}]"

    def _finish(self, item: Item, outside: tuple[Loop, ...], streams: int) -> None:
        """Store a finished register accumulator, or add it to what earlier reduced loops left."""
        op = item.op or "sum"
        names = (
            [f"{item.node.name}_acc{u}" for u in range(streams)] if streams > 1 else [f"{item.node.name}_acc"]
        )
        while len(names) > 1:
            names = [
                (f"({combine(op, a, b)})" if _COMBINE[op] not in ("max", "min") else combine(op, a, b))
                for a, b in zip(names[::2], names[1::2])
            ] + (names[-1:] if len(names) % 2 else [])
        value = _bare(names[0])
        if notes_nan(op, acc_dtype(item)):
            value = extreme(f"{item.node.name}_nan", value, acc_dtype(item))
        target = item.target
        text = Text(self.used)
        if target.kind == "scalar":
            self.line(f"const {TYPES[target.dtype]} {target.name} = {value};")
            return
        place = self._place(target, text, Rewriter())
        if target.kind == "private" or any(loop.var in item.reduced for loop in outside):
            self._update(op, place, target, value)
        else:
            self.line(f"{place} = {store_text(value, target.dtype, acc_dtype(item))};")

    # ------------------------------------------------------------------------------ online exponentials

    def _online(self, stage: Stage) -> None:
        """A maximum and its sum of exponentials, by blocks that stay in the nearest cache for the second look."""
        top, total = sorted(stage.items, key=lambda item: item.op == SUM_EXP)
        *around, loop = stage.loops
        kind, size = acc_dtype(top), loop.var.size
        c, lowest, infinity = TYPES[kind], identity("max", kind), literal(math.inf, kind)
        high, summed = top.node.name, total.node.name
        self.line(f"{c} {high}_acc = {lowest}, {summed}_acc = 0;")
        for outside in around:
            self.open(self._for(outside))
        self.open(f"for (int64_t part = 0; part < {size}; part += {ONLINE})")
        end = f"part + {ONLINE}" if size % ONLINE == 0 else f"std::min<int64_t>(part + {ONLINE}, {size})"
        self.line(f"const int64_t end = {end};")
        known = self._hoist([top.expr], loop)
        self.line(f"{c} {high}_block = {lowest}, {summed}_block = 0;")
        self.line(f"int{8 * BYTES[kind]}_t {high}_nan = 0;")

        def over_block(reductions: str, expr: Expr, update: Callable[[str], str]) -> None:
            self.line(f"#pragma omp simd {reductions}")
            self.open(f"for (int64_t {loop.var.name} = part; {loop.var.name} < end; ++{loop.var.name})")
            text = Text(self.used, self.sizes)
            text.names.update(known)
            for line in text.bind([expr]):
                self.line(line)
            self.line(update(_bare(text.expr(expr))))
            self.close()

        over_block(
            f"reduction(max : {high}_block) reduction(| : {high}_nan)",
            top.expr,
            lambda value: accumulate_extreme("max", f"{high}_block", f"{high}_nan", value),
        )
        block = extreme(f"{high}_nan", f"{high}_block", kind)
        self.line(f"const {c} {high}_next = ke::max<{c}>({high}_acc, {block});")
        self.line(f"const {c} {high}_shift = ke::abs({high}_next) == {infinity} ? 0 : {high}_next;")
        power = Op("exp", (Op("sub", (top.expr, Load(f"{high}_shift", (), kind)), kind),), kind)
        over_block(
            f"reduction(+ : {summed}_block)",
            power,
            lambda value: accumulate("sum", f"{summed}_block", value),
        )
        self.line(f"{summed}_acc = {summed}_acc * ke::exp({high}_acc - {high}_shift) + {summed}_block;")
        self.line(f"{high}_acc = {high}_next;")
        for _ in stage.loops:
            self.close()
        for item in (top, total):
            name, target = f"{item.node.name}_acc", item.target
            if target.kind == "scalar":
                self.line(f"const {TYPES[target.dtype]} {target.name} = {name};")
            else:
                place = self._place(target, Text(self.used), Rewriter())
                self.line(f"{place} = {store_text(name, target.dtype, kind)};")

    # ----------------------------------------------------------------------------------------- scans

    def _scan(self, stage: Stage) -> None:
        (item,) = stage.items
        assert item.scan is not None and item.op is not None
        loops = stage.loops
        depth = next(k for k, loop in enumerate(loops) if loop.var is item.scan)
        if self._in_vectors(item, loops, depth):
            self._scan_in_vectors(item, loops)
            return
        kind = "double" if item.expr.dtype == "f32" else TYPES[item.expr.dtype]
        start = identity(item.op, "f64" if kind == "double" else item.expr.dtype)
        deeper = loops[depth + 1 :]
        carry, size = f"{item.node.name}_carry", 1
        place = linear(0, [])
        for loop in reversed(deeper):
            place = place + of(loop.var) * size
            size *= loop.var.size
        for loop in loops[:depth]:
            self.open(self._for(loop))
        if deeper:
            self.line(f"alignas(64) {kind} {carry}[{size}];")
            self.line(f"for (int64_t c = 0; c < {size}; ++c) {carry}[c] = {start};")
            carry = f"{carry}[{Text(self.used).index(place)}]"
        else:
            self.line(f"{kind} {carry} = {start};")
        for k, loop in enumerate(loops[depth:]):
            if deeper and k == len(deeper):
                self.line("#pragma omp simd")
            self.open(self._for(loop))
        text = Text(self.used)
        for line in text.bind([item.expr]):
            self.line(line)
        self.line(accumulate(item.op, carry, _bare(text.expr(item.expr))))
        target = self._place(item.target, text, Rewriter())
        self.line(f"{target} = ({TYPES[item.target.dtype]}){carry};")
        for _ in loops:
            self.close()

    def _in_vectors(self, item: Item, loops: tuple[Loop, ...], depth: int) -> bool:
        """Whether a scan is a sum of floats along memory, for which there is ``ke::prefix_sum``."""
        along = item.target.index.coefficient(loops[depth].var) == 1
        floats = item.target.dtype == item.expr.dtype == "f32"
        fits = isinstance(item.expr, Load) or 4 * loops[depth].var.size <= ROW_BYTES
        whole = depth == len(loops) - 1 and loops[depth].limit is None
        return item.op == "sum" and floats and along and fits and whole

    def _scan_in_vectors(self, item: Item, loops: tuple[Loop, ...]) -> None:
        """Sum what is in memory as it is; anything else is computed into a row first."""
        var = loops[-1].var
        for loop in loops[:-1]:
            self.open(self._for(loop))
        first = Rewriter({var: linear(0, [])})
        steps = [n.index[0].coefficient(var) for n in walk(item.expr) if isinstance(n, Load) and n.index]
        flipped = steps.count(-1) > steps.count(1)  # then read forwards: compilers do not flip every load
        turn = Rewriter({var: of(var) * -1 + (var.size - 1)} if flipped else {})
        value = turn.expr(item.expr)
        text = Text(self.used, self.sizes)
        if isinstance(value, Load) and value.index and value.index[0].coefficient(var) == 1:
            row = _offset(value.buffer, text.index(first.index(value.index[0])))
        else:
            row = f"{item.node.name}_values"
            self.line(f"alignas(64) float {row}[{var.size}];")
            self.line("#pragma omp simd")
            self.open(self._for(loops[-1]))
            for line in text.bind([value]):
                self.line(line)
            self.line(f"{row}[{var.name}] = {_bare(text.expr(value))};")
            self.close()
        self.used.add("ke/scan.h")
        sums = _offset(item.target.name, Text(self.used).index(first.index(item.target.index)))
        self.line(f"ke::prefix_sum{'<true>' if flipped else ''}({sums}, {row}, {var.size});")
        for _ in loops[:-1]:
            self.close()


def _offset(pointer: str, index: str) -> str:
    return pointer if index == "0" else f"{pointer} + {index}"


def scattered(stage: Stage) -> bool:
    """Whether the innermost loop walks across memory in all it touches: vectors would be put together singly."""
    var = stage.loops[-1].var
    loads = [n for item in stage.items for n in walk(item.expr) if isinstance(n, Load) and n.index]
    if any(item.op is not None or item.target.kind != "global" for item in stage.items) or not loads:
        return False
    steps = {item.target.index.coefficient(var) for item in stage.items}
    steps |= {load.index[0].coefficient(var) for load in loads}
    return 1 not in steps and not any(isinstance(n, Search) for item in stage.items for n in walk(item.expr))


def overlaps(stage: Stage) -> bool:
    """Whether the innermost loop is short, leaves a rest that fills no vector, and may do elements twice."""
    loop = stage.loops[-1]
    size = loop.var.size
    if loop.limit is not None or not VECTOR < size <= SHORT or size % (VECTOR // 2) == 0:
        return False
    made = {item.target.name for item in stage.items}
    reads = {n.buffer for item in stage.items for n in walk(item.expr) if isinstance(n, Load) and n.index}
    plain = all(item.op is None and item.target.kind in ("global", "row") for item in stage.items)
    return plain and not made & reads


def extent(buffer: Buffer) -> int:
    """Elements from the first to just past the last one."""
    if 0 in buffer.shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(buffer.shape, buffer.stride))


def _bare(text: str) -> str:
    """Without the outer parentheses, where a whole right-hand side stands."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for k, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0 and k < len(text) - 1:
            return text
    return text[1:-1]


def acc_dtype(item: Item) -> str:
    return compute_dtype(item.expr.dtype)


def _padded(local: Local) -> int:
    """Elements per thread: whole cache lines, so that threads do not share one."""
    return -(-local.size // 16) * 16


def trailing(item: Item, loops: tuple[Loop, ...]) -> int | None:
    """Depth of the first of the reduced loops that are innermost; None if the innermost is not reduced."""
    start = len(loops)
    while start and loops[start - 1].var in item.reduced:
        start -= 1
    return start if item.op and start < len(loops) else None


def collapsed(stage: Stage) -> Stage:
    """Adjacent loops joined where every access moves through both as through one."""
    loops = list(stage.loops)
    items = list(stage.items)
    k = len(loops) - 2
    while k >= 0:
        a, b = loops[k], loops[k + 1]
        joined = Var(a.var.name, a.var.size * b.var.size)
        change = Rewriter({a.var: of(joined) // b.var.size, b.var: of(joined) % b.var.size})
        if a.limit is None and b.limit is None and all(_joinable(i, a.var, b.var) for i in items):
            changed = []
            for item in items:
                expr = change.expr(item.expr)
                index = change.index(item.target.index)
                reduced = frozenset(joined if r is a.var else r for r in item.reduced if r is not b.var)
                changed.append(
                    Item(item.node, expr, Target(item.target.kind, item.target.name, index, item.target.dtype),
                         item.op, reduced, item.scan)
                )  # fmt: skip
            if not any(_divides(i, joined) for i in changed):
                items = changed
                loops[k : k + 2] = [Loop(joined)]
        k -= 1
    return Stage(tuple(loops), tuple(items))


def _joinable(item: Item, a: Var, b: Var) -> bool:
    if item.scan is not None and (item.scan is a or item.scan is b):
        return False
    return (a in item.reduced) == (b in item.reduced)


def _divides(item: Item, var: Var) -> bool:
    for node in walk(item.expr, item.target.index):
        if isinstance(node, Quotient) and any(n is var for n in walk(node.index)):
            return True
    return False


def print_nest(nest: Nest, used: set[str]) -> str:
    printer = Printer(nest, used)
    return "\n".join(printer.body())


# ------------------------------------------------------------------------------------------ contractions

# What the templates call the position of a strip's first element; attention delivers whole rows.
_STRIPS = {"gemm": "col", "conv": "pos", "attention": "0", "bag": "col"}


def print_contraction(c: Contraction, used: set[str]) -> str:
    """The template call with its lambdas."""
    used.add(templates.HEADERS[c.kind])
    sizes = {b.name: extent(b) for b in c.reads} | {"acc": 1 << 50}
    stores = [s for s in c.epilogue if s.op is None]
    epilogue = _strip(stores, _STRIPS[c.kind], used, sizes)
    for store in c.epilogue:
        if store.op is not None:
            epilogue += _row_reduction(store, used)
    pointers = [_pointer(v.buffer, v.offset) for v in c.operands]
    if isinstance(c.problem, templates.AttentionProblem):
        assert isinstance(c.choices, templates.AttentionSchedule) and c.score is not None
        printer = Text(used)
        lines = printer.bind([c.score])
        score = _loop_text("first_key", c.score, [*lines, f"acc[j] = {_bare(printer.expr(c.score))};"])
        q, k, v = pointers
        text = templates.emit_attention(
            c.problem, c.choices, q, k, v, "\n".join(epilogue), score="\n".join(score)
        )
        return textwrap.indent(text, "  ")
    if isinstance(c.problem, templates.BagProblem):
        assert isinstance(c.choices, templates.BagSchedule)
        text = templates.emit_bag(c.problem, c.choices, pointers, "\n".join(epilogue))
        return textwrap.indent(text, "  ")
    left, right = pointers
    if isinstance(c.problem, templates.ConvProblem):
        assert isinstance(c.choices, templates.ConvSchedule)
        text = templates.emit_conv(c.problem, c.choices, left, right, "\n".join(epilogue))
    else:
        assert isinstance(c.choices, templates.GemmSchedule)
        prologue = None
        if c.prologue is not None:
            printer = Text(used)
            lines = printer.bind([c.prologue])
            prologue = "\n".join(
                _loop_text("k", c.prologue, [*lines, f"out[j] = {_bare(printer.expr(c.prologue))};"])
            )
        text = templates.emit_gemm(
            c.problem, c.choices, left, right, "\n".join(epilogue), prologue, c.vector_bytes
        )
    return textwrap.indent(text, "  ")


def _pointer(buffer: str, offset: int) -> str:
    return f"{buffer} + {offset}" if offset else buffer


def _loop_text(start: str, what: Interned, body: list[str]) -> list[str]:
    at = [f"  const int64_t at = {start} + j;"] if _mentions(what, "at") else []
    return [
        "#pragma omp simd",
        "for (int64_t j = 0; j < count; ++j) {",
        *at,
        *(f"  {line}" for line in body),
        "}",
    ]


def _mentions(root: Interned, name: str) -> bool:
    return any(isinstance(n, Var) and n.name == name for n in walk(root))


def _strip(stores: list[Store], start: str, used: set[str], sizes: Mapping[str, int]) -> list[str]:
    if not stores:
        return []
    printer = Text(used, sizes)
    lines = printer.bind([s.expr for s in stores])
    for s in stores:
        value = store_text(_bare(printer.expr(s.expr)), s.dtype, s.expr.dtype)
        lines.append(f"{s.buffer}[{printer.index(s.index)}] = {value};")
    return [
        "#pragma omp simd",
        "for (int64_t j = 0; j < count; ++j) {",
        "  const int64_t at = j;" if start == "0" else f"  const int64_t at = {start} + j;",
        *(f"  {line}" for line in lines),
        "}",
    ]


def _row_reduction(store: Store, used: set[str]) -> list[str]:
    """One strip's share of a reduction along the row, whose strips come in ascending order."""
    op, kind = store.op or "sum", store.expr.dtype
    printer = Text(used)
    lines = printer.bind([store.expr])
    place = f"{store.buffer}[{printer.index(store.index)}]"
    found, flag = f"{store.buffer}_strip", f"{store.buffer}_nan"
    at = ["  const int64_t at = col + j;"] if _mentions(store.expr, "at") else []
    value = _bare(printer.expr(store.expr))
    head = [f"{TYPES[kind]} {found} = {identity(op, kind)};"]
    clauses = f"reduction({_COMBINE[op]} : {found})"
    body, tail = [accumulate(op, found, value)], []
    if notes_nan(op, kind):
        head.append(f"int{8 * BYTES[kind]}_t {flag} = 0;")
        clauses += f" reduction(| : {flag})"
        body = [accumulate_extreme(op, found, flag, value)]
        tail = [f"{found} = {extreme(flag, found, kind)};"]
    return [
        *head,
        f"#pragma omp simd {clauses}",
        "for (int64_t j = 0; j < count; ++j) {",
        *at,
        *(f"  {line}" for line in (*lines, *body)),
        "}",
        *tail,
        f"{place} = col == 0 ? {found} : {combine(op, place, found)};",
    ]
