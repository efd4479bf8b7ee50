"""Lines of C++: what every kind of stage is printed with."""

from __future__ import annotations

from collections.abc import Sequence

from ke_gym.codegen.cpp_text import Text
from ke_gym.codegen.cpp_words import (
    COMBINE,
    TYPES,
    accumulate,
    accumulate_extreme,
    bare_text,
    combine,
    notes_nan,
    store_text,
)
from ke_gym.codegen.expr import Expr, Interned, Rewriter, compute_dtype
from ke_gym.codegen.nest import Item, Loop, Nest, Target
from ke_gym.codegen.stages import acc_dtype


class Lines:
    """The lines of one nest's function so far, and what its stages share."""

    def __init__(self, nest: Nest, used: set[str]) -> None:
        self.nest = nest
        self.used = used
        self.sizes = {b.name: b.extent for b in (*nest.reads, *nest.writes)}
        self.sizes.update((r.name, r.size) for r in nest.rows)
        self.lines: list[str] = []
        self.depth = 1
        self.fetched: list[str] = []
        self.streamed: dict[str, str] = {}
        self.offset = ""
        self.hoisted = 0
        self.bound = 0  # values that have names in an iteration, outside of its inner loops
        self.known: dict[Interned, str] = {}  # names of values made before the innermost loop

    def line(self, text: str) -> None:
        self.lines.append("  " * self.depth + text if text else "")

    def open(self, text: str) -> None:
        self.line(text + " {")
        self.depth += 1

    def close(self) -> None:
        self.depth -= 1
        self.line("}")

    def _for(self, loop: Loop) -> str:
        name = loop.var.name
        if loop.limit is None:
            return f"for (int64_t {name} = 0; {name} < {loop.var.size}; ++{name})"
        limit = Text(self.used).index(loop.limit)
        return f"for (int64_t {name} = 0; {name} < std::min<int64_t>({loop.var.size}, {limit}); ++{name})"

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
            clauses.append(f"reduction({COMBINE[op]} : {', '.join(names)})")
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
        items: tuple[Item, ...],
        shift: Rewriter,
        stream: str,
        starts: dict[int, int | None],
        first: int = 0,
    ) -> int:
        """Print what is computed; values get names from number ``first`` on. The number after the last of them."""
        text = Text(self.used, self.sizes)
        text.count = first + int(stream or 0) * 100
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
                    self.line(accumulate_extreme(item.op, accumulator, flag, bare_text(value)))
                else:
                    self.line(accumulate(item.op, accumulator, bare_text(value)))
            elif item.op:
                place = self._place(target, text, shift)
                self._update(item.op, place, target, value)
            elif target.kind == "scalar":
                self.line(f"const {TYPES[target.dtype]} {target.name} = {bare_text(value)};")
                text.names[expr] = target.name
            else:
                self.line(
                    f"{self._place(target, text, shift)} = {store_text(bare_text(value), target.dtype, expr.dtype)};"
                )
        return text.count

    def _update(self, op: str, place: str, target: Target, value: str) -> None:
        inner = compute_dtype(target.dtype)
        if target.kind == "private" or inner == target.dtype:
            self.line(accumulate(op, place, bare_text(value)))
        else:
            self.line(
                f"{place} = {store_text(combine(op, f'({TYPES[inner]}){place}', value), target.dtype, inner)};"
            )

    def _place(self, target: Target, text: Text, shift: Rewriter) -> str:
        if target.name in self.streamed:
            return f"{target.name}_part[{self.offset}]"
        suffix = "_part" if target.kind == "private" else ""
        return f"{target.name}{suffix}[{text.index(shift.index(target.index))}]"
