"""Scans -> C++ text; maxima with sums of exponentials in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable

from ke_gym.codegen.cpp_text import Text
from ke_gym.codegen.cpp_words import (
    TYPES,
    accumulate,
    accumulate_extreme,
    bare_text,
    extreme,
    identity,
    literal,
    offset_from,
    store_text,
)
from ke_gym.codegen.emit_cpp_lines import Lines
from ke_gym.codegen.expr import BYTES, Expr, Load, Op, Rewriter, linear, of, walk
from ke_gym.codegen.nest import ROW_BYTES, Item, Loop, Stage
from ke_gym.codegen.one_pass import SUM_EXP
from ke_gym.codegen.stages import acc_dtype

ONLINE = 1024  # elements whose maximum is taken before their exponentials: they stay in the nearest cache


class Scans(Lines):
    """Prints stages that carry a value along a loop."""

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
        self.line(accumulate(item.op, carry, bare_text(text.expr(item.expr))))
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
            row = offset_from(value.buffer, text.index(first.index(value.index[0])))
        else:
            row = f"{item.node.name}_values"
            self.line(f"alignas(64) float {row}[{var.size}];")
            self.line("#pragma omp simd")
            self.open(self._for(loops[-1]))
            for line in text.bind([value]):
                self.line(line)
            self.line(f"{row}[{var.name}] = {bare_text(text.expr(value))};")
            self.close()
        self.used.add("ke/scan.h")
        sums = offset_from(item.target.name, Text(self.used).index(first.index(item.target.index)))
        self.line(f"ke::prefix_sum{'<true>' if flipped else ''}({sums}, {row}, {var.size});")
        for _ in loops[:-1]:
            self.close()

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
            self.line(update(bare_text(text.expr(expr))))
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
