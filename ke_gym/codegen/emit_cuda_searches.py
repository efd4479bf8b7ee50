"""Searches in shared memory -> CUDA C++. What is computed is in ``searches``."""

from __future__ import annotations

from collections.abc import Mapping

from ke_gym.codegen.cuda_text import TYPES, Text
from ke_gym.codegen.emit_cuda import TilesPrinter
from ke_gym.codegen.emit_cuda_lines import INT
from ke_gym.codegen.expr import Rewriter, Search, Var, of
from ke_gym.codegen.searches import Searched
from ke_gym.codegen.tiles import column_var


class _Text(Text):
    """Expressions whose searches begin in shared memory."""

    def __init__(
        self, used: set[str], sizes: Mapping[str, int], pointers: Mapping[str, str], searched: Searched
    ) -> None:
        super().__init__(used, sizes, pointers)
        self.searched = searched

    def found(self, search: Search, right: str, value: str) -> str:
        if self.searched.by_column:
            self.used.add("search_here")
            return f"search_here<{search.size}, {right}>(table + lane * {self.searched.pitch}, {value})"
        self.used.add("descend")
        levels = self.searched.blocks.levels
        return f"descend<{search.size}, {levels}, {right}>(table, {self.row(search)}, {value})"


class Printer(TilesPrinter):
    """Prints the kernel of one ``Searched``."""

    def __init__(self, searched: Searched, used: set[str]) -> None:
        super().__init__(searched.tiles, used)
        self.work = searched
        self.text = _Text(used, self.text.sizes, self.names, searched)

    @property
    def beside(self) -> str:
        """Which of the blocks along the columns this one is."""
        return "int(blockIdx.y)" if self.int == "int" else "(long long)blockIdx.y"

    @property
    def pointers(self) -> list[str]:
        """The tensors that the kernel reads or writes element by element."""
        written = {b.name for b in self.work.writes}
        return [*(b.name for b in self.work.reads if b.name not in written), *written]

    def body(self) -> list[str]:
        """The kernel's statements, line by line."""
        work, tiles, kind = self.work, self.work.tiles, TYPES[self.work.table.dtype]
        self.line("extern __shared__ __align__(1024) unsigned char memory[];")
        self.line(f"{kind}* const table = reinterpret_cast<{kind}*>(memory);")
        first = "threadIdx.x"
        if work.by_column:
            self._rows()
            first = f"threadIdx.x / {work.blocks.columns}"
        else:
            self._tree()
        self.line("__syncthreads();")
        unroll, step = work.blocks.unroll, work.along * work.height
        start = f"{self.first} * {work.height} + {first}" if work.height > 1 else self.first
        count = "int" if self.int == "int" and tiles.rows + step * unroll < INT else "long long"
        outer = self.open(f"for ({count} next = {start}; next < {tiles.rows}; next += {step * unroll})")
        if unroll > 1:
            self.line("#pragma unroll")
        inner = self.open(f"for (int k = 0; k < {unroll}; ++k)") if unroll > 1 else None
        self.line(f"const {count} row = next{f' + k * {step}' if unroll > 1 else ''};")
        guards = [f"row < {tiles.rows}"] if unroll > 1 else []
        guards += [f"col < {tiles.columns}"] if tiles.columns % work.blocks.columns else []
        guarded = self.open(f"if ({' && '.join(guards)})") if guards else None
        self._elements(list(tiles.works), Rewriter())
        for names in (guarded, inner, outer):
            if names is not None:
                self.close(names)
        return self.lines

    def _rows(self) -> None:
        """Copy the rows that this block's columns are searched for in."""
        work, columns, size = self.work, self.work.blocks.columns, self.work.search.size
        col = column_var(work.tiles.columns)
        self.line(f"const int lane = threadIdx.x % {columns};")
        self.line(f"const {self.int} col = {self.beside} * {columns} + lane;")
        copied = self.open(f"for (int at = threadIdx.x; at < {columns * size}; at += {work.threads})")
        self.line(f"const {self.int} of = {self.beside} * {columns} + at / {size};")
        place = self.text.index(
            Rewriter({col: of(Var("of", work.tiles.columns))}).index(work.search.start[0])
        )
        value = f"{self.names[work.table.name]}[{place} + at % {size}]"
        guard = f"if (of < {work.tiles.columns}) " if work.tiles.columns % columns else ""
        self.line(f"{guard}table[at / {size} * {work.pitch} + at % {size}] = {value};")
        self.close(copied)

    def _tree(self) -> None:
        """Copy the top of the tree: the place of a node is what its number's bits say, the way down to it."""
        work, size = self.work, self.work.search.size
        copied = self.open(
            f"for (int at = threadIdx.x; at < {(1 << work.blocks.levels) - 1}; at += {work.threads})"
        )
        self.used.add("probed")
        self.line(f"table[at] = ({self.text.row(work.search)})[probed<{size}>(at)];")
        self.close(copied)
