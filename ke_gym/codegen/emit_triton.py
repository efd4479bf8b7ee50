"""Tiles -> Triton text: rows by program, columns at once or in passes. What is computed is in ``tiles``."""

from __future__ import annotations

import re

from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import (
    Const,
    Load,
    is_float,
)
from ke_gym.codegen.flash import Flash
from ke_gym.codegen.products import Product
from ke_gym.codegen.tiles import Tiles, Work, column_var, depends, identity, online, row_var
from ke_gym.codegen.triton_text import TYPES, Axis, Text, bare_text, enclosed, literal, uses_in

_COMBINE = {"sum": "added", "prod": "multiplied", "max": "max_nan", "min": "min_nan"}
LOCALS = {
    Tiles: {"row", "col", "start", "top", "shift"},
    Product: {
        "tile", "number", "batch", "group", "height", "tile_m", "tile_n", "m", "n", "k", "a", "b", "acc", "start",
        "left", "right", "left_tiles", "right_tiles", "part", "first", "tap", "c", "j", "words", "even", "odd",
    },
    Flash: {
        "tile", "batch", "m", "n", "d", "e", "d_down", "n_down", "query", "keys", "values", "score", "top", "total",
        "acc", "start", "whole", "end", "x", "high", "shift", "weights", "rescale", "block", "blocks", "gone",
    },
}  # fmt: skip
_LOCAL = re.compile(
    r"v\d+|col\d+|\w+_(row|acc|ok)|ROWS|BLOCK|[MNK]|tl|triton|libdevice|min|max_nan|min_nan|search"
)


def pointers(work: Tiles | Product | Flash) -> dict[str, str]:
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

    def print(self) -> list[str]:
        tiles, blocks = self.tiles, self.tiles.blocks
        wide = max((b.extent for b in (*tiles.reads, *tiles.writes)), default=0) >= 1 << 31
        program = "tl.program_id(0).to(tl.int64)" if wide else "tl.program_id(0)"
        along = "" if self.flat else "[:, None]"
        if self.high:
            self.lines.append(f"row = {program} * ROWS + tl.arange(0, ROWS){along}")
            if tiles.rows % blocks.rows:
                self.lines.append(f"row_ok = row < {tiles.rows}")
                self.row.mask = "row_ok"
        else:
            self.lines.append(f"row = {program}")
        self.text.axes = [self.row]
        done: set[str] = set()
        for level in sorted({work.level for work in tiles.works}):
            works = [w for w in tiles.works if w.level == level and w.node.name not in done]
            for work in works:
                if (pair := online(tiles, work)) is not None:
                    self._online_passes(work, pair)
                    done |= {work.node.name, pair.node.name}
            works = [w for w in works if w.node.name not in done]
            for columns in dict.fromkeys(work.columns for work in works):
                self._level([work for work in works if work.columns == columns], columns)
        return self.lines

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
        if declared not in self.lines:
            self.lines.append(declared)
            if not exact:
                self.lines.append(f"{axis.name}_ok = {axis.name} < {columns}")
        axis.mask = "" if exact else f"{axis.name}_ok"
        for work in works:
            value = self._block(work, axis)
            if work.op is None:
                self._store(work, value)
            elif work.scan:
                self._store(work, self._scan(work.op, value))
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
        body = self._open(axis)
        for work in works:
            value = self._block(work, axis)
            accumulator = f"{work.node.name}_acc"
            if work.op is None:
                self._store(work, value)
            elif work.scan:
                scanned = self._combined(work.op, accumulator, self._scan(work.op, value))
                self._store(work, scanned)
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

    def _open(self, axis: Axis) -> list[str]:
        """The body of a loop over blocks of columns."""
        columns, block = axis.var.size, self.tiles.blocks.columns
        around = "[None, :]" if self.high else ""
        axis.mask = "" if columns % block == 0 else f"{axis.name}_ok"
        body = [f"{axis.name} = start + tl.arange(0, BLOCK){around}"]
        if axis.mask:
            body.append(f"{axis.mask} = {axis.name} < {columns}")
        self.text.enter(body, {axis.var})
        return body

    def _close(self, axis: Axis, body: list[str]) -> None:
        self.text.leave()
        self.lines.append(f"for start in range(0, {axis.var.size}, BLOCK):")
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
            if not depends(work.expr, axis.var) and self.high:
                text = f"tl.broadcast_to({text}, {shape})"
            return text
        return text if depends(work.expr, axis.var) else f"tl.broadcast_to({text}, {shape})"

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

    def _scan(self, op: str, value: str) -> str:
        if op == "sum":
            return f"tl.cumsum({bare_text(value)}, axis={self.axis_number})"
        if op not in _COMBINE:
            raise Illegal(f"a running {op}")
        self.used.add(_COMBINE[op])
        return f"tl.associative_scan({bare_text(value)}, {self.axis_number}, {_COMBINE[op]})"

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
            self.text.names[Load(work.node.name, (), dtype), ""] = name
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


def print_tiles(tiles: Tiles, used: set[str]) -> list[str]:
    """The body of the kernel, line by line."""
    return TilesPrinter(tiles, used).print()
