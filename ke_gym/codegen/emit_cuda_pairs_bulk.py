"""Products of a few rows with each other -> CUDA C++, a warp a sample that bulk copies bring. See ``emit_cuda_pairs``.

Each warp has slots in shared memory, with a barrier that says that a sample is there. Once it has multiplied a sample's
rows, it asks for the next one in its place: that is under way while the sums are multiplied again and stored, and while
other warps multiply. Rows are swizzled, so that eight of them are read without bank conflicts.
"""

from __future__ import annotations

from ke_gym.codegen import emit_cuda_pairs
from ke_gym.codegen.emit_cuda_products import Travelling, indented
from ke_gym.codegen.expr import Load, walk
from ke_gym.codegen.pairs import PART, Pairs, eights

ROW = 2 * PART  # bytes of a swizzled row


class Printer(emit_cuda_pairs.Printer):
    """Prints the kernel of one ``Pairs``."""

    def __init__(self, pairs: Pairs, used: set[str]) -> None:
        super().__init__(pairs, used)
        used |= {"tensor_cores", "bulk", "read"}
        self.operands = {"left": pairs.left} if pairs.same else {"left": pairs.left, "right": pairs.right}
        self.parts = -(-pairs.shape.k // PART)
        left, right = pairs.tiles
        # Where in a slot an operand is, and the bytes of 64 of its columns; bytes that are copied for a sample.
        self.places = {"left": (0, left), "right": (self.parts * left, right)}
        self.copied = self.parts * ROW * sum(view.shape[1] for view in self.operands.values())

    @property
    def maps(self) -> list[Travelling]:
        """The operands that bulk copies bring."""
        found = []
        for side, view in self.operands.items():
            begin = f".as_strided({view.shape}, {view.stride}, {view.offset})" if view.offset else ""
            box = (1, view.shape[1], PART)
            found.append(Travelling(f"{side}_tiles", view.buffer + begin, box, ROW, view.shape, view.stride))
        return found

    @property
    def pointers(self) -> list[str]:
        """The tensors that the kernel reads or writes element by element."""
        roots = [store.expr for store in self.work.stores]
        roots += [self.work.matrix] if self.work.matrix is not None else []
        read = {n.buffer for n in walk(*roots) if isinstance(n, Load) and n.index}
        return [b.name for b in self.work.reads if b.name in read] + [b.name for b in self.work.writes]

    def body(self) -> list[str]:
        """The kernel's statements, line by line."""
        work, shape, blocks = self.work, self.work.shape, self.work.blocks
        slots = blocks.warps * blocks.stages * work.slot
        return [
            f"constexpr int STEPS = {shape.k // 16}, ROWS = {eights(shape.m)}, COLUMNS = {eights(shape.n)};",
            f"constexpr int RESULTS = {eights(work.columns)}, BATCH = {shape.batch}, HEIGHT = {work.height};",
            f"constexpr int STAGES = {blocks.stages}, SLOT = {work.slot};",
            "extern __shared__ __align__(1024) unsigned char memory[];",
            "const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, part = lane % 4;",
            "const unsigned slots = in_shared(memory) + warp * (STAGES * SLOT);",
            f"const unsigned there = in_shared(memory) + {slots} + warp * (STAGES * 8);",
            f"const int first = blockIdx.x * {blocks.warps} + warp, step = gridDim.x * {blocks.warps};",
            "if (lane == 0) {",
            "  for (int s = 0; s < STAGES; ++s) begin(there + 8 * s, 1);",
            "  publish();",
            "  for (int s = 0; s < STAGES; ++s) {",
            "    const int next = first + s * step;",
            *indented(self._fetch("next < BATCH"), 2),
            "  }",
            "}",
            "__syncwarp();",
            *self._matrix(),
            *self._lanes(),
            "int s = 0, phase = 0;",
            "for (int sample = first; sample < BATCH; sample += step) {",
            f"  const {self.int} batch = sample;",
            "  const unsigned slot = slots + s * SLOT;",
            "  await(there + 8 * s, phase);",
            *indented(self._multiply()),
            "  if (++s == STAGES) s = 0, phase ^= 1;",
            "}",
        ]

    def _fetch(self, guard: str, before: str = "") -> list[str]:
        """Bring the sample ``next`` into slot ``s``, 64 columns at a time."""
        lines = [*([before] if before else []), f"expect(there + 8 * s, {self.copied});"]
        for side in self.operands:
            begin, size = self.places[side]
            for part in range(self.parts):
                place = f"slots + s * SLOT + {begin + part * size}"
                lines.append(f"fetch({place}, {side}_tiles, there + 8 * s, {part * PART}, 0, next);")
        return [f"if ({guard}) {{", *indented(lines), "}"]

    def _lanes(self) -> list[str]:
        """Where a lane reads: 8 halves of one of 16 rows; of the last rows of an operand, those that there are."""
        lines = [f"const unsigned whole = lane % 16 * {ROW} + (lane / 16 ^ lane % 8) * 16;"]
        for side, view in self.operands.items():
            rest = view.shape[1] % 16
            if rest:
                lines += [
                    f"const int {side}_row = min(lane % 16, {rest - 1});",
                    f"const unsigned {side}_last = {side}_row * {ROW} + (lane / 16 ^ {side}_row % 8) * 16;",
                ]
        return lines

    def _read(self, to: str, side: str, which: str) -> str:
        """Read 16 columns, the ``k``-th, of 16 rows."""
        rows, (begin, size) = self.operands[side].shape[1], self.places[side]
        lane = f"({which} < {rows // 16} ? whole : {side}_last)" if rows % 16 else "whole"
        place = f"k / 4 * {size} + {which} * {16 * ROW}" + (f" + {begin}" if begin else "")
        return f"read({to}, ((slot + {lane}) ^ (k % 4 * 32)) + {place});"

    def _multiply(self) -> list[str]:
        """Both products and the results: as many rows at a time as there are registers for their sums."""
        free = [
            "__syncwarp();  // all lanes have read the sample: another one takes its place",
            "const int next = sample + STAGES * step;",
            *self._fetch("lane == 0 && next < BATCH", "publish();"),
        ]
        if not self.work.once:
            free = ["if (top + 2 * HEIGHT >= ROWS) {", *indented(free), "}"]
        lines = [
            *self._first(),
            *free,
            "#pragma unroll",
            "for (int t = 0; t < HEIGHT; ++t) {",
            f"  const int i = {'2 * t' if self.work.once else 'top + 2 * t'};",
            "  float (&sums)[COLUMNS][4] = products[t];",
            *indented(self._again()),
            *indented(self._results()),
            "}",
        ]
        if self.work.once:
            return lines
        head = ["#pragma unroll 1", "for (int top = 0; top < ROWS; top += 2 * HEIGHT) {"]
        return [*head, *indented(lines), "}"]

    def _first(self) -> list[str]:
        """The first product; rows that have been read as columns are not read again."""
        kind, same = self.work.shape.dtype, self.work.same
        rows = ["const unsigned (&rows)[4] = columns[t];"]
        if not (same and self.work.once):
            rows = [
                "unsigned rows[4];",
                self._read("rows", "left", "t" if self.work.once else "(top / 2 + t)"),
            ]
        return [
            "float products[HEIGHT][COLUMNS][4] = {};",
            "#pragma unroll",
            "for (int k = 0; k < STEPS; ++k) {",
            "  unsigned columns[(COLUMNS + 1) / 2][4];",
            "  #pragma unroll",
            "  for (int j = 0; j < (COLUMNS + 1) / 2; ++j)",
            f"    {self._read('columns[j]', 'left' if same else 'right', 'j')}",
            "  #pragma unroll",
            "  for (int t = 0; t < HEIGHT; ++t) {",
            *indented(rows, 2),
            "    #pragma unroll",
            "    for (int j = 0; j < COLUMNS; ++j)",
            f"      product_{kind}(products[t][j], rows[0], rows[1], rows[2], rows[3],",
            f"              {' ' * len(kind)} columns[j / 2][j % 2], columns[j / 2][j % 2 + 2]);",
            "  }",
            "}",
        ]
