"""Tiles -> Triton text: rows by program, columns at once or in passes. What is computed is in ``tiles``."""

from __future__ import annotations

import re

from ke_gym.codegen.bags import Bag
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import (
    Const,
    Load,
    is_float,
)
from ke_gym.codegen.flash import Flash
from ke_gym.codegen.products import Product
from ke_gym.codegen.tiles import (
    Tiles,
    Work,
    column_var,
    identity,
    online,
    power_above,
    row_var,
    variance,
)
from ke_gym.codegen.triton_text import TYPES, Axis, Text, bare_text, enclosed, literal, uses_in

_COMBINE = {"sum": "added", "prod": "multiplied", "max": "max_nan", "min": "min_nan"}
LOCALS = {
    Tiles: {
        "row", "col", "start", "back", "top", "shift", "program", "number", "part", "first", "total", "steps", "before",
        "after", "value",
    },
    Product: {
        "tile", "number", "batch", "group", "height", "tile_m", "tile_n", "m", "n", "k", "a", "b", "acc", "start",
        "left", "right", "left_tiles", "right_tiles", "part", "first", "tap", "c", "j", "words", "even", "odd",
    },
    Bag: {"bag", "first", "last", "col", "total", "count", "start", "at", "ok", "id", "value", "result", "COLUMNS"},
    Flash: {
        "tile", "batch", "m", "n", "d", "e", "d_down", "n_down", "query", "keys", "values", "score", "top", "total",
        "acc", "start", "whole", "end", "x", "high", "shift", "weights", "rescale", "block", "blocks", "gone",
    },
}  # fmt: skip
_LOCAL = re.compile(
    r"v\d+|col\d+|\w+_(row|acc|ok)|ROWS|BLOCK|[MNK]|tl|triton|libdevice|min|max_nan|min_nan|search"
)


def pointers(work: Tiles | Product | Flash | Bag) -> dict[str, str]:
    """What the kernel calls its tensors: their names, unless it has something else of that name."""
    found: dict[str, str] = {}
    for buffer in (*work.reads, *work.writes):
        taken = buffer.name in LOCALS[type(work)] or _LOCAL.fullmatch(buffer.name)
        found[buffer.name] = f"{buffer.name}_ptr" if taken else buffer.name
    return found


class TilesPrinter:
    """Prints one tile kernel: rows by program, columns at once or in passes."""

    def __init__(self, tiles: Tiles, used: set[str]) -> None:
        self.tiles = tiles
        self.used = used
        self.lines: list[str] = []
        sizes = {b.name: b.extent for b in (*tiles.reads, *tiles.writes)}
        uses = uses_in([work.expr for work in tiles.works])
        self.text = Text(used, sizes, outer=self.lines, lines=self.lines, uses=uses, pointers=pointers(tiles))
        self.high = tiles.blocks.rows > 1
        self.flat = tiles.columns == 1
        self.row = Axis(row_var(tiles.rows), "row")
        self.head = self.lines
        """What comes before the loop over rows, if there is one."""
        self.passes = 0
        self.step = "start"
        self.wide = max((b.extent for b in (*tiles.reads, *tiles.writes)), default=0) >= 1 << 31

    def print(self) -> list[str]:
        if not self.tiles.across:
            self._row("tl.program_id(0).to(tl.int64)" if self.wide else "tl.program_id(0)")
            self._works()
            return self.lines
        body: list[str] = []
        self.lines = body
        self.text.enter(body, {self.row.var})
        self._row("number.to(tl.int64)" if self.wide else "number")
        self._works()
        self.text.leave()
        return self._walk(body)

    def _row(self, number: str) -> None:
        tiles, blocks = self.tiles, self.tiles.blocks
        along = "" if self.flat else "[:, None]"
        if self.high:
            self.lines.append(f"first = {number} * ROWS")
            self.lines.append(f"row = first + tl.arange(0, ROWS){along}")
            self.row.first, self.row.block = "first", blocks.rows
            if tiles.rows % blocks.rows:
                self.lines.append(f"row_ok = row < {tiles.rows}")
                self.row.mask = "row_ok"
        else:
            self.lines.append(f"row = {number}")

    def _walk(self, body: list[str]) -> list[str]:
        """The loop of a program over its rows, and what it has summed up over them."""
        tiles, blocks = self.tiles, self.tiles.blocks
        last = -(-tiles.rows // blocks.rows)
        step = f"program, {last}, {blocks.programs}" + (
            f", num_stages={blocks.stages}" if blocks.stages > 1 else ""
        )
        for work in tiles.across:
            start = literal(0, work.expr.dtype)
            self.head.append(
                f"{work.node.name}_acc = tl.full({self._shape(work.columns)}, {start}, {TYPES[work.expr.dtype]})"
            )
        lines = ["program = tl.program_id(0)", *self.head, f"for number in tl.range({step}):"]
        lines += [f"    {line}" for line in body]
        for work in tiles.across:
            name, col = f"{work.node.name}_acc", self._column_name(work.columns)
            value = f"tl.sum({name}, axis=0, keep_dims=True)" if self.high else name
            mask = "" if work.columns == power_above(work.columns) else f", mask={col}_ok"
            lines.append(f"tl.store({parts_of(work)} + program * {work.columns} + {col}, {value}{mask})")
        return lines

    def _add(self, work: Work) -> None:
        """A row's share of a sum over rows."""
        value, name = self._typed(work, self.text.value(work.expr)), f"{work.node.name}_acc"
        if self.row.mask:
            value = f"tl.where({self.row.mask}, {bare_text(value)}, {literal(0, work.expr.dtype)})"
        self.lines.append(f"{name} = {name} + {value}")

    def _works(self) -> None:
        tiles = self.tiles
        self.text.axes = [self.row]
        done: set[str] = set()
        for level in sorted({work.level for work in tiles.works}):
            works = [w for w in tiles.works if w.level == level and w.node.name not in done]
            for work in works:
                for find, both in ((online, self._online_passes), (variance, self._variance_passes)):
                    if (pair := find(tiles, work)) is not None:
                        both(work, pair)
                        done |= {work.node.name, pair.node.name}
            works = [w for w in works if w.node.name not in done]
            for columns in dict.fromkeys(work.columns for work in works):
                self._level([work for work in works if work.columns == columns], columns)

    def _level(self, works: list[Work], columns: int) -> None:
        if columns == 1:
            self.text.axes = [self.row]
            for work in works:
                value = self._typed(work, self.text.value(work.expr))
                self._finish(work, value)
            return
        block = self.tiles.blocks.columns
        axis = Axis(column_var(columns), self._column_name(columns))
        self.text.axes = [self.row, axis]
        if columns <= block:
            self._single(works, axis)
        else:
            self._passes(works, axis)

    def _column_name(self, columns: int) -> str:
        return "col" if columns == self.tiles.columns else f"col{columns}"

    def _width(self, columns: int) -> str:
        block = self.tiles.blocks.columns
        width = min(1 << (columns - 1).bit_length(), block)
        return "BLOCK" if width == block else str(width)

    @property
    def axis_number(self) -> int:
        return 1 if self.high else 0

    def _shape(self, columns: int) -> str:
        return f"[ROWS, {self._width(columns)}]" if self.high else f"[{self._width(columns)}]"

    def _single(self, works: list[Work], axis: Axis) -> None:
        columns = axis.var.size
        around = "[None, :]" if self.high else ""
        declared = f"{axis.name} = tl.arange(0, {self._width(columns)}){around}"
        exact = columns & (columns - 1) == 0
        if declared not in self.head:
            self.head.append(declared)
            if not exact:
                self.head.append(f"{axis.name}_ok = {axis.name} < {columns}")
        axis.mask = "" if exact else f"{axis.name}_ok"
        for work in works:
            if work.across:
                self._add(work)
                continue
            value = self._block(work, axis)
            if work.op is None:
                self._store(work, value)
            elif work.scan:
                self._scanned(work, self._scan(work, value))
            else:
                self._finish(work, self._reduce(work, value))

    def _passes(self, works: list[Work], axis: Axis) -> None:
        shape = self._shape(axis.var.size)
        for work in works:
            if work.op is not None:
                start = literal(identity(work.op, self._kind(work)).value, self._kind(work))
                small = "[ROWS, 1]" if self.high else "[1]"
                size = small if work.scan else shape
                self.lines.append(
                    f"{work.node.name}_acc = tl.full({size}, {start}, {TYPES[self._kind(work)]})"
                )
        scans = [work.reverse for work in works if work.scan]
        body = self._open(axis, scans[0] if scans else None)
        for work in works:
            value = self._block(work, axis)
            accumulator = f"{work.node.name}_acc"
            if work.op is None:
                self._store(work, value)
            elif work.scan:
                self._scanned(work, self._combined(work.op, accumulator, self._scan(work, value)))
                total = self._reduce(work, value, keep=True)
                body.append(f"{accumulator} = {self._combined(work.op, accumulator, total)}")
            else:
                body.append(f"{accumulator} = {self._combined(work.op, accumulator, value)}")
        self._close(axis, body)
        for work in works:
            if work.op is not None and not work.scan:
                self._finish(work, self._reduce(work, f"{work.node.name}_acc"))

    def _online_passes(self, work: Work, total: Work) -> None:
        """Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; each lane on its own."""
        self.used.add("max_nan")
        columns = work.columns
        axis = Axis(column_var(columns), self._column_name(columns))
        self.text.axes = [self.row, axis]
        top, acc = f"{work.node.name}_acc", f"{total.node.name}_acc"
        kind, shape = TYPES[work.expr.dtype], self._shape(columns)
        self.lines.append(f'{top} = tl.full({shape}, float("-inf"), {kind})')
        self.lines.append(f"{acc} = tl.zeros({shape}, {kind})")
        body = self._open(axis)
        value = self._block(work, axis)
        body.append(f"top = max_nan({top}, {bare_text(value)})")
        body.append('shift = tl.where(top == float("-inf"), 0.0, top)')
        body.append(f"{acc} = {acc} * tl.exp({top} - shift) + tl.exp({value} - shift)")
        body.append(f"{top} = top")
        self._close(axis, body)
        self._finish(work, self._reduce(work, top))
        self._finish(total, self._reduce(total, f"{acc} * tl.exp({top} - {work.node.name}_row)"))

    def _variance_passes(self, work: Work, squares: Work) -> None:
        """Welford, "Note on a method for calculating corrected sums of squares", 1962; each lane on its own.

        The lanes' sums come together as in Chan, Golub, LeVeque, "Updating formulae", 1979.
        """
        columns, block = work.columns, self.tiles.blocks.columns
        axis = Axis(column_var(columns), self._column_name(columns))
        self.text.axes = [self.row, axis]
        acc, apart = f"{work.node.name}_acc", f"{squares.node.name}_acc"
        kind, shape = TYPES[work.expr.dtype], self._shape(columns)
        self.lines += [f"{name} = tl.zeros({shape}, {kind})" for name in (acc, apart, "before")]
        body = self._open(axis)
        value = self._block(work, axis)
        if not value.isidentifier():
            body.append(f"value = {bare_text(value)}")
            value = "value"
        body.append(f"{acc} = {acc} + {value}")
        body.append(f"after = {acc} * (1.0 / ({self.step} // BLOCK + 1))")
        product = f"({value} - before) * ({value} - after)"
        body.append(
            f"{apart} = {apart} + {f'tl.where({axis.mask}, {product}, 0.0)' if axis.mask else product}"
        )
        body.append("before = after")
        self._close(axis, body)
        self._finish(work, self._reduce(work, acc))
        whole, rest = divmod(columns, block)
        steps = f"{whole}.0"
        if rest:  # lanes that the last block leaves out have seen one value less
            lane = f"tl.arange(0, BLOCK){'[None, :]' if self.high else ''}"
            self.lines.append(f"steps = tl.where({lane} < {rest}, {whole + 1}.0, {whole}.0)")
            steps = "steps"
        self.lines.append(f"before = {acc} / {steps} - {work.node.name}_row / {columns}.0")
        self._finish(squares, self._reduce(squares, f"{apart} + {steps} * before * before"))

    def _open(self, axis: Axis, backward: bool | None = None) -> list[str]:
        """The body of a loop over blocks of columns. Directions alternate: what was read last is still near."""
        columns, block = axis.var.size, self.tiles.blocks.columns
        around = "[None, :]" if self.high else ""
        axis.mask = "" if columns % block == 0 else f"{axis.name}_ok"
        axis.first, axis.block = "start", block
        if backward is None:
            backward = self.passes % 2 == 1
        self.passes += 1
        self.step = "back" if backward else "start"
        body = [f"start = {(columns - 1) // block * block} - back"] if backward else []
        body.append(f"{axis.name} = start + tl.arange(0, BLOCK){around}")
        if axis.mask:
            body.append(f"{axis.mask} = {axis.name} < {columns}")
        self.text.enter(body, {axis.var})
        return body

    def _close(self, axis: Axis, body: list[str]) -> None:
        self.text.leave()
        stages = self.tiles.blocks.stages
        steps = f"range(0, {axis.var.size}, BLOCK)"
        if stages > 1:
            steps = f"tl.range(0, {axis.var.size}, BLOCK, num_stages={stages})"
        self.lines.append(f"for {self.step} in {steps}:")
        self.lines.extend(f"    {line}" for line in body)

    def _kind(self, work: Work) -> str:
        """What is accumulated in: flags as integers."""
        return "i32" if work.expr.dtype == "bool" else work.expr.dtype

    def _typed(self, work: Work, text: str) -> str:
        if isinstance(work.expr, Const):
            return f"tl.full([], {text}, {TYPES[work.expr.dtype]})"
        return text

    def _block(self, work: Work, axis: Axis) -> str:
        """The work's value over a block of columns; for reductions, what does not count is neutral."""
        text = self._typed(work, self.text.value(work.expr))
        if work.op is None:
            return text
        if work.expr.dtype == "bool":
            text = f"{enclosed(text)}.to(tl.int32)"
        neutral = literal(identity(work.op, self._kind(work)).value, self._kind(work))
        shape = self._shape(axis.var.size)
        if axis.mask:
            text = f"tl.where({axis.mask}, {bare_text(text)}, {neutral})"
            if not axis.moves(work.expr) and self.high:
                text = f"tl.broadcast_to({text}, {shape})"
            return text
        return text if axis.moves(work.expr) else f"tl.broadcast_to({text}, {shape})"

    def _reduce(self, work: Work, value: str, keep: bool = False) -> str:
        op, axis = work.op or "sum", self.axis_number
        tail = ", keep_dims=True" if self.high or keep else ""
        if op == "sum":
            return f"tl.sum({bare_text(value)}, axis={axis}{tail})"
        if op in ("any", "all"):
            return f"tl.{'max' if op == 'any' else 'min'}({bare_text(value)}, axis={axis}{tail})"
        if op in ("max", "min") and not is_float(self._kind(work)):
            return f"tl.{op}({bare_text(value)}, axis={axis}{tail})"
        self.used.add(_COMBINE[op])
        return f"tl.reduce({bare_text(value)}, {axis}, {_COMBINE[op]}{tail})"

    def _scan(self, work: Work, value: str) -> str:
        op, reverse = work.op or "sum", ", reverse=True" if work.reverse else ""
        if op == "sum":
            return f"tl.cumsum({bare_text(value)}, axis={self.axis_number}{reverse})"
        if op not in _COMBINE:
            raise Illegal(f"a running {op}")
        self.used.add(_COMBINE[op])
        return f"tl.associative_scan({bare_text(value)}, {self.axis_number}, {_COMBINE[op]}{reverse})"

    def _scanned(self, work: Work, value: str) -> None:
        """Name a block's running values for what is computed from them, and store them if they are asked for."""
        name = f"{work.node.name}_run"
        self.text.lines.append(f"{name} = {bare_text(value)}")
        for dtype in {work.expr.dtype, work.node.dtype, "f32"}:
            self.text.names[Load(work.node.name, (), dtype), ""] = name
        self._store(work, name)

    def _combined(self, op: str, a: str, b: str) -> str:
        if op == "sum":
            return f"{a} + {b}"
        if op == "prod":
            return f"{a} * {b}"
        if op in ("any", "all"):
            return f"tl.{'max' if op == 'any' else 'min'}imum({a}, {bare_text(b)})"
        self.used.add(f"{op}_nan")
        return f"{op}_nan({a}, {bare_text(b)})"

    def _finish(self, work: Work, value: str) -> None:
        """Name a row's value for later levels, and store it if it is asked for."""
        name = f"{work.node.name}_row"
        self.lines.append(f"{name} = {bare_text(value)}")
        if work.op in ("any", "all") or (work.op is not None and work.expr.dtype == "bool"):
            self.lines.append(f"{name} = {name} != 0")
        for dtype in {work.expr.dtype, work.node.dtype, "f32"}:
            load = Load(work.node.name, (), dtype)
            self.text.names[load, ""] = name
            if self.tiles.across:
                self.text.inner.add(load)
        if work.place is not None:
            self._put(work, name)

    def _store(self, work: Work, value: str) -> None:
        if work.place is not None:
            self._put(work, value)

    def _put(self, work: Work, value: str) -> None:
        place = work.place
        assert place is not None
        text = self.text.index(place, "")
        mask = self.text.mask(place)
        buffer = self.text.pointers[work.node.name]
        where = buffer if text == "0" else f"{buffer} + {text}"
        kind = f".to({TYPES[work.node.dtype]})" if work.expr.dtype != work.node.dtype else ""
        stored = f"{enclosed(value)}{kind}" if kind else bare_text(value)
        tail = f", mask={mask}" if mask else ""
        self.text.lines.append(f"tl.store({where}, {stored}{tail})")


TOTAL = {"PARTS": 64, "BLOCK": 32}
"""Programs' sums that are added up at a time, and columns a program does so for."""


def parts_of(work: Work) -> str:
    """Where programs leave their sums."""
    return f"{work.node.name}_parts"


def print_totals(tiles: Tiles, columns: int) -> list[str]:
    """The kernel that adds up, for each of ``columns``, what programs have summed over their rows."""
    programs, works = tiles.blocks.programs, [w for w in tiles.across if w.columns == columns]
    ok = f"col < {columns}" if columns % TOTAL["BLOCK"] else ""
    loaded = " & ".join(
        [*([ok] if ok else []), *([f"(first + part < {programs})"] if programs % TOTAL["PARTS"] else [])]
    )
    lines = [
        "part = tl.arange(0, PARTS)[:, None]",
        "col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]",
    ]
    lines += [
        f"{w.node.name}_acc = tl.full([PARTS, BLOCK], {literal(0, w.expr.dtype)}, {TYPES[w.expr.dtype]})"
        for w in works
    ]
    lines.append(f"for first in range(0, {programs}, PARTS):")
    for work in works:
        mask = f", mask={loaded}, other=0" if loaded else ""
        value = f"tl.load({parts_of(work)} + (first + part) * {columns} + col{mask})"
        lines.append(f"    {work.node.name}_acc = {work.node.name}_acc + {value}")
    text = Text(set(), {}, axes=[Axis(column_var(columns), "col")])
    for work in works:
        assert work.place is not None
        value = f"tl.sum({work.node.name}_acc, axis=0, keep_dims=True)"
        kind = f".to({TYPES[work.node.dtype]})" if work.expr.dtype != work.node.dtype else ""
        place = f"{pointers(tiles)[work.node.name]} + {text.index(work.place, '')}"
        lines.append(f"tl.store({place}, {value}{kind}{f', mask={ok}' if ok else ''})")
    return lines


def print_tiles(tiles: Tiles, used: set[str]) -> list[str]:
    """The body of the kernel, line by line."""
    return TilesPrinter(tiles, used).print()
