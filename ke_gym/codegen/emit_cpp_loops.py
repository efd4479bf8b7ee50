"""The loops of one stage -> C++ text: reductions in registers, pieces, streaming stores."""

from __future__ import annotations

from ke_gym.codegen.cpp_text import Text
from ke_gym.codegen.cpp_words import (
    COMBINE,
    TYPES,
    accumulate,
    bare_text,
    combine,
    extreme,
    identity,
    notes_nan,
    offset_from,
    store_text,
)
from ke_gym.codegen.emit_cpp_lines import Lines
from ke_gym.codegen.expr import BYTES, Rewriter, Var, compute_dtype, is_float, linear, of
from ke_gym.codegen.nest import Item, Loop, Stage
from ke_gym.codegen.stages import VECTOR, acc_dtype, overlaps, scattered, streamed

# In elements: what is asked for at once, how far ahead, the rows short enough to fetch the next one instead, and
# the tensors small enough to stay in the cache.
FETCHED, DISTANCE, FAR, CACHED = 512, 1024, 4096, 1 << 16
JAM = 8  # rows summed per pass over a buffer of column sums


class Loops(Lines):
    """Prints stages of pointwise work and reductions."""

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

    def _loop(self, stage: Stage, starts: dict[int, int | None], depth: int, parallel: bool) -> None:
        loops = stage.loops
        if not loops:
            self.bound = self._statements(stage.items, Rewriter(), "", starts, self.bound)
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
            self.line(accumulate("sum", self._place(item.target, text, Rewriter()), bare_text(parts[0])))
        self.close()
        self.close()
        if whole < rows.var.size:
            self.open(f"for (int64_t {name} = {whole}; {name} < {rows.var.size}; ++{name})")
            self._simd([], [""], False)
            self.open(self._for(columns))
            self._statements(stage.items, Rewriter(), "", starts)
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
            self._statements(stage.items, Rewriter(), "", starts)
            self.close()
            return
        name = loop.var.name
        self.open(f"for (int64_t {name} = 0; {name} < {part}; ++{name})")
        for u in range(streams):
            shift = Rewriter({loop.var: of(Var(loop.var.name, part)) + u * part})
            self._statements(stage.items, shift, str(u), starts)
        self.close()
        if part * streams < length:
            self._simd(reducing, ["0"], False)
            self.open(f"for (int64_t {name} = {part * streams}; {name} < {length}; ++{name})")
            self._statements(stage.items, Rewriter(), "0", starts)
            self.close()

    def _streamed(self, stage: Stage) -> dict[str, str]:
        """Results that leave past the caches: name -> the first element the innermost loop stores."""
        if not self.nest.group.stream:
            return {}
        start = Rewriter({stage.loops[-1].var: linear(0, [])})
        leaving = [item.target for item in streamed(self.nest, stage, self.nest.group.stream << 20)]
        return {t.name: offset_from(t.name, Text(self.used).index(start.index(t.index))) for t in leaving}

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
        short = length < 2 * FETCHED and not parallel  # threads share the loop over pieces
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
        self._statements(stage.items, Rewriter(), "", starts)
        self.close()
        for target, first in self.streamed.items():
            self.line(f"ke::stream_out({first}{at}, {target}_part, {count});")
        if not short:
            self.close()

    def _overlapping(self, stage: Stage, loop: Loop, starts: dict[int, int | None]) -> None:
        """Whole vectors only: the last one begins early enough, and does some elements again."""
        name, last = loop.var.name, loop.var.size - VECTOR
        self.open(f"for (int64_t part = 0; part < {loop.var.size}; part += {VECTOR})")
        self.line(f"const int64_t start = std::min<int64_t>(part, {last});")
        self._simd([], [""], False)
        self.open(f"for (int64_t {name} = start; {name} < start + {VECTOR}; ++{name})")
        self._statements(stage.items, Rewriter(), "", starts)
        self.close()
        self.close()

    def _finish(self, item: Item, outside: tuple[Loop, ...], streams: int) -> None:
        """Store a finished register accumulator, or add it to what earlier reduced loops left."""
        op = item.op or "sum"
        names = (
            [f"{item.node.name}_acc{u}" for u in range(streams)] if streams > 1 else [f"{item.node.name}_acc"]
        )
        while len(names) > 1:
            names = [
                (f"({combine(op, a, b)})" if COMBINE[op] not in ("max", "min") else combine(op, a, b))
                for a, b in zip(names[::2], names[1::2])
            ] + (names[-1:] if len(names) % 2 else [])
        value = bare_text(names[0])
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
