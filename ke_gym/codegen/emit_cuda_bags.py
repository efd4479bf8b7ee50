"""Bags of embedding rows -> CUDA C++ text: lanes across a row's columns, several rows at a time. See ``bags``."""

from __future__ import annotations

from functools import cached_property

from ke_gym.codegen.bags import Bag
from ke_gym.codegen.emit_cuda_products import indented

VECTOR = 4  # floats that a thread brings at once, where rows begin at multiples of 16 bytes


class Printer:
    """Prints the kernel of one ``work``: a block takes a bag, or the part of its columns that ``blockIdx.y`` names."""

    def __init__(self, work: Bag, used: set[str]) -> None:
        self.work = work
        self.names = {b.name: f"{b.name}_ptr" for b in (*work.reads, *work.writes)}
        if self.vector > 1:
            used.add("vector")

    @cached_property
    def vector(self) -> int:
        """Neighbouring columns of a thread."""
        problem, table = self.work.problem, self.work.operands[0]
        whole = all(count % VECTOR == 0 for count in (problem.dim, problem.row_stride, table.offset))
        return VECTOR if whole else 1

    @cached_property
    def across(self) -> int:
        """Threads that share a row."""
        return min(self.work.blocks.columns // self.vector, self.work.threads)

    @property
    def pieces(self) -> int:
        """How many times its vector a thread takes of a row."""
        return self.work.blocks.columns // (self.across * self.vector)

    @property
    def down(self) -> int:
        """Rows that are brought side by side."""
        return self.work.threads // self.across

    @property
    def each(self) -> int:
        """Rows of a thread whose reads are under way together."""
        return max(1, self.work.blocks.rows // self.down)

    @property
    def pointers(self) -> list[str]:
        """The tensors that the kernel reads or writes."""
        return [*dict.fromkeys(b.name for b in (*self.work.reads, *self.work.writes))]

    @property
    def grid(self) -> tuple[int, int]:
        """Bags, and the parts that the columns are in."""
        return self.work.problem.bags, -(-self.work.problem.dim // self.work.blocks.columns)

    def body(self) -> list[str]:
        """The kernel's statements, line by line."""
        problem, columns = self.work.problem, self.work.blocks.columns
        _, _, offsets, *_ = self._operands()
        last = f"{offsets}[bag + 1]"
        if not problem.closed:
            last = f"bag + 1 < {problem.bags} ? (long long){last} : {problem.total}"
        part = f"blockIdx.y * {columns} + " if self.grid[1] > 1 else ""
        return [
            "const long long bag = blockIdx.x;",
            f"const long long first = {offsets}[bag], last = {last};",
            f"const int lane = threadIdx.x % {self.across}, down = threadIdx.x / {self.across};",
            f"const int col = {part}lane * {self.vector};",
            f"float total[{self.pieces}][{self.vector}] = {{}};",
            *(["float count = 0.0f;"] if self._counts else []),
            f"for (long long start = first + down; start < last; start += {self.down * self.each}) {{",
            *indented(self._rows()),
            "}",
            *(self._together() if self.down > 1 else []),
            *self._results(),
        ]

    @property
    def _counts(self) -> bool:
        """Whether ids have to be counted: those that are left out count for nothing."""
        return self.work.problem.mode == "mean" and self.work.problem.padding >= 0

    def _operands(self) -> list[str]:
        return [
            f"({self.names[view.buffer]} + {view.offset})" if view.offset else self.names[view.buffer]
            for view in self.work.operands
        ]

    def _rows(self) -> list[str]:
        """What is added up of the rows that one turn names."""
        problem = self.work.problem
        table, ids, _, *weights = self._operands()
        wanted = f"at < last && id != {problem.padding}" if problem.padding >= 0 else "at < last"
        inside = [
            *(["count += 1.0f;"] if self._counts else []),
            *([f"const float weight = {weights[0]}[at];"] if weights else []),
            "#pragma unroll",
            f"for (int p = 0; p < {self.pieces}; ++p) {{",
            *indented(self._piece(table, " * weight" if weights else "")),
            "}",
        ]
        row = [
            f"const long long at = start + e * {self.down};",
            f"const long long id = at < last ? (long long){ids}[at] : 0;",
            f"if ({wanted}) {{",
            *indented(inside),
            "}",
        ]
        return ["#pragma unroll", f"for (int e = 0; e < {self.each}; ++e) {{", *indented(row), "}"]

    def _piece(self, table: str, weighed: str) -> list[str]:
        stride, across = self.work.problem.row_stride, self.across * self.vector
        lines = [f"const int c = col + p * {across};"]
        if self._ragged:
            lines.append(f"if (c >= {self.work.problem.dim}) break;")
        if self.vector == 1:
            return [*lines, f"total[p][0] += {table}[id * {stride} + c]{weighed};"]
        return [
            *lines,
            f"const auto value = load<{self.vector}>({table}, (id * {stride} + c) / {self.vector});",
            "#pragma unroll",
            f"for (int v = 0; v < {self.vector}; ++v) total[p][v] += value.at[v]{weighed};",
        ]

    def _together(self) -> list[str]:
        """Add up what was brought side by side, always in the same order."""
        columns = self.work.blocks.columns
        flat = f"lane * {self.vector} + p * {self.across * self.vector} + v"
        every = f"for (int p = 0; p < {self.pieces}; ++p) for (int v = 0; v < {self.vector}; ++v)"
        lines = [
            f"__shared__ float part[{self.down}][{columns}];",
            f"{every} part[down][{flat}] = total[p][v];",
        ]
        if self._counts:
            lines += [
                f"__shared__ float counted[{self.down}];",
                "if (lane == 0) counted[down] = count;",
            ]
        lines += ["__syncthreads();", "if (down > 0) return;"]
        lines += [
            f"for (int other = 1; other < {self.down}; ++other) {{",
            f"  {every} total[p][v] += part[other][{flat}];",
            *(["  count += counted[other];"] if self._counts else []),
            "}",
        ]
        return lines

    def _results(self) -> list[str]:
        problem, out = self.work.problem, self.names[self.work.name]
        count = "count" if self._counts else "float(last - first)"
        mean = [f"const float many = fmaxf({count}, 1.0f);"] if problem.mode == "mean" else []
        many = " / many" if mean else ""
        store = [f"{out}[bag * {problem.dim} + c] = total[p][0]{many};"]
        if self.vector > 1:
            store = [
                f"Vector<float, {self.vector}> result;",
                "#pragma unroll",
                f"for (int v = 0; v < {self.vector}; ++v) result.at[v] = total[p][v]{many};",
                f"store<{self.vector}>({out}, (bag * {problem.dim} + c) / {self.vector}, result);",
            ]
        guard = [f"if (c >= {problem.dim}) break;"] if self._ragged else []
        place = f"const int c = col + p * {self.across * self.vector};"
        return [
            *mean,
            "#pragma unroll",
            f"for (int p = 0; p < {self.pieces}; ++p) {{",
            *indented([place, *guard, *store]),
            "}",
        ]

    @property
    def _ragged(self) -> bool:
        return self.work.problem.dim % self.work.blocks.columns != 0
