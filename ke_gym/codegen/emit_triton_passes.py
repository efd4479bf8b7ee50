"""Rows that take several blocks of columns -> Triton text: loops over these, statistics in one pass where they can be."""

from __future__ import annotations

from ke_gym.codegen.emit_triton_lines import Lines
from ke_gym.codegen.tiles import (
    Work,
    column_var,
    identity,
)
from ke_gym.codegen.triton_text import TYPES, Axis, bare_text, literal


class Passes(Lines):
    """Prints the passes over the columns of a tile's rows."""

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
        # The block that leaves lanes out comes last: until then, all lanes have seen as many values.
        body = self._open(axis, False if columns % block else None)
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
            backward = self.passes % 2 == 1 and columns > block
        self.passes += 1
        self.step = "back" if backward else "start"
        body = [f"start = {(columns - 1) // block * block} - back"] if backward else []
        body.append(f"{axis.name} = start + tl.arange(0, BLOCK){around}")
        if axis.mask:
            body.append(f"{axis.mask} = {axis.name} < {columns}")
        self.text.enter(body, {axis.var})
        self.outside, self.stores = self.stores, []
        return body

    def _close(self, axis: Axis, body: list[str]) -> None:
        self.text.leave()
        body += self.stores
        self.stores = self.outside
        stages = self.tiles.blocks.stages
        steps = f"range(0, {axis.var.size}, BLOCK)"
        if stages > 1:
            steps = f"tl.range(0, {axis.var.size}, BLOCK, num_stages={stages})"
        self.lines.append(f"for {self.step} in {steps}:")
        self.lines.extend(f"    {line}" for line in body)
