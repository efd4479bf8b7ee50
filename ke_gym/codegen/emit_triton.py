"""Tiles -> Triton text: rows by program, columns at once or in passes. What is computed is in ``tiles``."""

from __future__ import annotations

from ke_gym.codegen.emit_triton_cache import settled
from ke_gym.codegen.emit_triton_passes import Passes
from ke_gym.codegen.tiles import (
    Tiles,
    Work,
    column_var,
    online,
    power_above,
    variance,
)
from ke_gym.codegen.triton_names import parts_of
from ke_gym.codegen.triton_text import TYPES, Axis, bare_text, literal


class TilesPrinter(Passes):
    """Prints one tile kernel: rows by program, columns at once or in passes."""

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
            lines.append(
                f"tl.store({parts_of(work.node.name)} + program * {work.columns} + {col}, {value}{mask})"
            )
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
        self.lines += self.stores

    def _level(self, works: list[Work], columns: int) -> None:
        if columns == 1:
            self.text.axes = [self.row]
            for work in works:
                value = self._typed(work, self.text.value(work.expr))
                self._finish(work, value)
            return
        axis = Axis(column_var(columns), self._column_name(columns))
        self.text.axes = [self.row, axis]
        if self.tiles.at_once(columns):
            self._single(works, axis)
        else:
            self._passes(works, axis)

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


def print_tiles(tiles: Tiles, used: set[str]) -> list[str]:
    """The body of the kernel, line by line."""
    lines = TilesPrinter(tiles, used).print()
    return lines if tiles.blocks.cache == "plain" else settled(tiles, lines)
