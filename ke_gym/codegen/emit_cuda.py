"""Tiles -> CUDA C++ text: a thread per vector of elements, or lanes that share a row. What is computed is in ``tiles``.

Rows that a block may hold whole stay in registers between their passes; neighbours along the innermost axis
travel as vectors of up to 16 bytes.
"""

from __future__ import annotations

from ke_gym.codegen.cuda_layout import in_vectors
from ke_gym.codegen.emit_cuda_rows import Rows
from ke_gym.codegen.expr import (
    Load,
    Rewriter,
    walk,
)
from ke_gym.codegen.tiles import (
    Tiles,
    Work,
    online,
    row_var,
)


class TilesPrinter(Rows):
    """Prints the body of one kernel."""

    def print(self) -> list[str]:
        if self.tiles.columns == 1:
            self._flat()
            return self.lines
        self._threads()
        done: set[str] = set()
        works = self.tiles.works
        self._keep()
        for level in sorted({work.level for work in works}):
            for work in (w for w in works if w.level == level and w.node.name not in done):
                total = online(self.tiles, work)
                if total is not None:
                    self._online(work, total)
                    done |= {work.node.name, total.node.name}
            here = [w for w in works if w.level == level and w.node.name not in done]
            for columns in dict.fromkeys(work.columns for work in here):
                plain = [w for w in here if w.columns == columns and not w.scan]
                if plain and columns == 1:
                    self._row_values(plain)
                elif plain:
                    self._pass(plain, columns)
            for work in here:
                if work.scan:
                    self._scan(work)
        return self.lines

    def _flat(self) -> None:
        """Every thread takes vectors of elements."""
        shape, rows = self.layout, self.tiles.rows
        scopes = []
        vector = shape.vector
        name, count = ("row", rows) if vector == 1 else ("at", rows // vector)
        block = self.first
        if shape.steps > 1:
            self.line("#pragma unroll")
            scopes.append(self.open(f"for (int k = 0; k < {shape.steps}; ++k)"))
            block = f"({self.first} * {shape.steps} + k)"
        self.line(f"const {self.int} {name} = {block} * {shape.threads} + threadIdx.x;")
        if count % (shape.threads * shape.steps):
            scopes.append(self.open(f"if ({name} < {count})"))
        split = in_vectors(row_var(rows), vector) if vector > 1 else Rewriter()
        self._elements(list(self.tiles.works), split)
        for names in reversed(scopes):
            self.close(names)

    def _elements(self, works: list[Work], split: Rewriter) -> None:
        """The works' values at one place, or of one vector; results are stored."""
        exprs = [split.expr(work.expr) for work in works]
        places = [split.index(work.place) if work.place is not None else None for work in works]
        stored = self._open_vector(exprs, list(zip(works, places)))
        for work, expr, place in zip(works, exprs, places):
            self.bind(expr)
            value = self.text.expr(expr)
            if self._is_flag(work):
                value = f"({value} != 0)"
            if any(self._reads(other, work) for other in works):
                value = self._name_row(work, value)
            if place is not None:
                self._store(work, place, value, stored)
        self._close_vector(stored)

    def _reads(self, other: Work, work: Work) -> bool:
        return any(
            isinstance(n, Load) and not n.index and n.buffer == work.node.name for n in walk(other.expr)
        )


def print_tiles(tiles: Tiles, used: set[str]) -> list[str]:
    """The body of the kernel, line by line."""
    return TilesPrinter(tiles, used).print()
