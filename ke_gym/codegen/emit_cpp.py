"""Loop nests -> C++ text. Only spelling lives in these files; what is computed and in which order is in ``nest``."""

from __future__ import annotations

import math

from ke_gym.codegen.cpp_text import Text
from ke_gym.codegen.cpp_words import TYPES, accumulate, identity, offset_from, store_text
from ke_gym.codegen.emit_cpp_loops import CACHED, DISTANCE, FAR, Loops
from ke_gym.codegen.emit_cpp_scans import Scans
from ke_gym.codegen.expr import Load, Rewriter, Var, linear, of, walk
from ke_gym.codegen.nest import Local, Nest, Stage
from ke_gym.codegen.one_pass import SUM_EXP
from ke_gym.codegen.stages import NEAR, collapsed, trailing


class Printer(Loops, Scans):
    """Prints one nest."""

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
                kind, start = _held(local.dtype), identity(local.op or "sum", local.dtype)
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
            kind, start = _held(local.dtype), identity(local.op or "sum", local.dtype)
            self.line(f"std::vector<{kind}> {local.name}_sum(threads * (int64_t){_padded(local)}, {start});")
        self.line("#pragma omp parallel num_threads(threads)")
        self.line("{")
        self.depth += 1
        for local in self.nest.private:
            self.line(
                f"{_held(local.dtype)}* const {local.name}_part = "
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
                found[offset_from(load.buffer, Text(self.used).index(later.index(place)))] = None
        return list(found)

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


def _held(dtype: str) -> str:
    """What private copies of an accumulator are made of: a vector of bool has no data."""
    return "uint8_t" if dtype == "bool" else TYPES[dtype]


def _padded(local: Local) -> int:
    """Elements per thread: whole cache lines, so that threads do not share one."""
    return -(-local.size // 16) * 16


def print_nest(nest: Nest, used: set[str]) -> str:
    printer = Printer(nest, used)
    return "\n".join(printer.body())
