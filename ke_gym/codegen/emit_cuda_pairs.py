"""Products of a few rows with each other -> CUDA C++, a warp a sample. What is computed is in ``pairs``."""

from __future__ import annotations

from ke_gym.codegen import emit_cuda_products
from ke_gym.codegen.emit_cuda_products import Along, Travelling, indented
from ke_gym.codegen.graph import View
from ke_gym.codegen.pairs import STEP, Pairs, eights


class Printer(emit_cuda_products.Printer[Pairs]):
    """Prints the kernel of one ``Pairs``."""

    def __init__(self, pairs: Pairs, used: set[str]) -> None:
        super().__init__(pairs, used)
        self.wide = pairs.ordered and pairs.columns % STEP == 0 and pairs.after is not None
        used |= {f"product {pairs.shape.dtype}", f"pack {pairs.shape.dtype}"}
        if self.wide:
            used.add(f"pack {pairs.stores[0].buffer.dtype}")

    @property
    def maps(self) -> list[Travelling]:
        """The operands that bulk copies bring."""
        return []

    @property
    def pointers(self) -> list[str]:
        """The tensors that the kernel reads or writes element by element."""
        return [b.name for b in (*self.work.reads, *self.work.writes)]

    def body(self) -> list[str]:
        """The kernel's statements, line by line."""
        work, shape = self.work, self.work.shape
        lines = [
            f"constexpr int STEPS = {shape.k // STEP}, ROWS = {eights(shape.m)}, COLUMNS = {eights(shape.n)};",
            f"constexpr int RESULTS = {eights(work.columns)}, BATCH = {shape.batch};",
            "const int lane = threadIdx.x % 32, quad = lane / 4, part = lane % 4;",
            *self._matrix(),
            f"const int first = blockIdx.x * {work.blocks.warps} + threadIdx.x / 32;",
            f"for (int sample = first; sample < BATCH; sample += gridDim.x * {work.blocks.warps}) {{",
            f"  const {self.int} batch = sample;",
            *indented(self._rows("left", work.left, "ROWS", shape.m)),
        ]
        if not work.same:
            lines += indented(self._rows("right", work.right, "COLUMNS", shape.n))
        right = "left" if work.same else "right"
        odd = eights(shape.m) % 2 == 1
        lower = "i + 1 < ROWS ? left[i + 1][s] : uint4{}" if odd else "left[i + 1][s]"
        lines += [
            "  #pragma unroll",
            "  for (int i = 0; i < ROWS; i += 2) {  // 16 rows",
            "    float sums[COLUMNS][4] = {};",
            "    #pragma unroll",
            "    for (int s = 0; s < STEPS; ++s) {",
            f"      const uint4 upper = left[i][s], lower = {lower};",
            "      #pragma unroll",
            "      for (int j = 0; j < COLUMNS; ++j) {",
            f"        product_{shape.dtype}(sums[j], upper.x, lower.x, upper.y, lower.y, {right}[j][s].x, {right}[j][s].y);",
            f"        product_{shape.dtype}(sums[j], upper.z, lower.z, upper.w, lower.w, {right}[j][s].z, {right}[j][s].w);",
            "      }",
            "    }",
            *indented(self._again(), 2),
            *indented(self._results(), 2),
            "  }",
            "}",
        ]
        return lines

    def _rows(self, name: str, view: View, count: str, size: int) -> list[str]:
        """An operand: of each row the elements that are this thread's."""
        place = f"batch * {view.stride[0]} + (i * 8 + quad) * {view.stride[1]} + s * {STEP} + part * 8"
        place += f" + {view.offset}" if view.offset else ""
        vector = f"*reinterpret_cast<const uint4*>({self.names[view.buffer]} + {place})"
        if size % 8:
            vector = f"i * 8 + quad < {size} ? {vector} : uint4{{}}"
        return [
            f"uint4 {name}[{count}][STEPS];",
            "#pragma unroll",
            f"for (int i = 0; i < {count}; ++i) {{",
            "  #pragma unroll",
            f"  for (int s = 0; s < STEPS; ++s) {name}[i][s] = {vector};",
            "}",
        ]

    def _column(self, tile: str, inner: str) -> str:
        """Which column of the result is a tile's ``inner``-th; so that a thread has neighbours, if they are stored."""
        if self.wide:
            return f"{tile} / 4 * 32 + {inner} / 2 * 8 + {tile} % 4 * 2 + {inner} % 2"
        return f"{tile} * 8 + {inner}"

    def _matrix(self) -> list[str]:
        """This thread's part of the matrix that all samples share."""
        work = self.work
        if work.matrix is None:
            return []
        guards = [f"n < {work.shape.n}"] if work.shape.n % 16 else []
        guards += [f"c < {work.columns}"] if work.columns % 8 else []
        value = f"float({self.text().expr(work.matrix)})"
        if guards:
            value = f"{' && '.join(guards)} ? {value} : 0.0f"
        return [
            "unsigned shared[RESULTS][(COLUMNS + 1) / 2][2];",
            "#pragma unroll",
            "for (int r = 0; r < RESULTS; ++r) {",
            "  #pragma unroll",
            "  for (int q = 0; q < (COLUMNS + 1) / 2 * 2; ++q) {",
            "    float pair[2];",
            "    #pragma unroll",
            "    for (int e = 0; e < 2; ++e) {",
            f"      const int n = q * 8 + part * 2 + e, c = {self._column('r', 'quad')};",
            f"      pair[e] = {value};",
            "    }",
            f"    shared[r][q / 2][q % 2] = pack_{work.shape.dtype}(pair[0], pair[1]);",
            "  }",
            "}",
        ]

    def _again(self) -> list[str]:
        """The second product; its left operand is the first one's result, where it is."""
        work = self.work
        if work.after is None:
            return ["float (&values)[RESULTS][4] = sums;"]
        lines = []
        if work.shape.n % 8:  # zeros by infinities are no zeros
            lines += [
                "#pragma unroll",
                "for (int e = 0; e < 4; ++e)",
                f"  if ((COLUMNS - 1) * 8 + part * 2 + e % 2 >= {work.shape.n}) sums[COLUMNS - 1][e] = 0.0f;",
            ]
        pack = f"pack_{work.shape.dtype}"
        beyond = "q * 2 + 1 < COLUMNS ? " if eights(work.shape.n) % 2 else ""
        rest = " : 0" if beyond else ""
        return [
            *lines,
            "float values[RESULTS][4] = {};",
            "#pragma unroll",
            "for (int q = 0; q < (COLUMNS + 1) / 2; ++q) {",
            f"  const unsigned a = {pack}(sums[q * 2][0], sums[q * 2][1]), b = {pack}(sums[q * 2][2], sums[q * 2][3]);",
            f"  const unsigned c = {beyond}{pack}(sums[q * 2 + 1][0], sums[q * 2 + 1][1]){rest};",
            f"  const unsigned d = {beyond}{pack}(sums[q * 2 + 1][2], sums[q * 2 + 1][3]){rest};",
            "  #pragma unroll",
            "  for (int r = 0; r < RESULTS; ++r)",
            f"    product_{work.shape.dtype}(values[r], a, b, c, d, shared[r][q][0], shared[r][q][1]);",
            "}",
        ]

    def _results(self) -> list[str]:
        work, shape = self.work, self.work.shape
        row, column = "i * 8 + quad + e / 2 * 8", self._column("r", "(part * 2 + e % 2)")
        ragged_m, ragged_c = shape.m % 16 != 0, work.columns % 8 != 0
        along = (Along("m", row, shape.m, ragged_m), Along("c", column, work.columns, ragged_c))
        lines = [
            "#pragma unroll",
            "for (int r = 0; r < RESULTS; ++r) {",
            "  #pragma unroll",
            "  for (int e = 0; e < 4; ++e) {",
            *indented(self.element("values[r][e]", along, self.wide), 2),
            "  }",
            "}",
        ]
        if not self.wide:
            return lines
        pack, out = f"pack_{work.stores[0].buffer.dtype}", self.names[work.stores[0].buffer.name]
        words = ", ".join(f"{pack}(values[r + {j}][h], values[r + {j}][h + 1])" for j in range(4))
        guard = f"if (m < {shape.m}) " if ragged_m else ""
        return [
            *lines,
            "#pragma unroll",
            "for (int h = 0; h < 4; h += 2) {",
            "  const int m = i * 8 + quad + h / 2 * 8;",
            "  #pragma unroll",
            "  for (int r = 0; r < RESULTS; r += 4)",
            f"    {guard}*reinterpret_cast<uint4*>({out} + (batch * {shape.m} + m) * {work.columns} + r * 8 + part * 8) =",
            f"        uint4{{{words}}};",
            "}",
        ]
