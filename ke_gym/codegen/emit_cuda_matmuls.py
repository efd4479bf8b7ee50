"""Products of matrices -> CUDA C++ on Hopper's tensor cores. What is computed is in ``matmuls``.

Of each stage in shared memory a barrier says that its tiles have come (``full``), another that they have been multiplied
(``empty``). A warpgroup holds the sums of its rows in registers, one group of products ahead of the tiles it frees.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ke_gym.codegen import emit_cuda_products
from ke_gym.codegen.cuda_text import TYPES, cast
from ke_gym.codegen.emit_cuda_products import Along, Travelling, indented
from ke_gym.codegen.expr import BYTES, Interned, Load, walk
from ke_gym.codegen.matmuls import ROW, SIDES, Matmul
from ke_gym.codegen.operands import Described, variables
from ke_gym.codegen.triton_text import bare_text, enclosed

BRINGING = 128  # threads that compute an operand


class Printer(emit_cuda_products.Printer[Matmul]):
    """Prints the kernel of one product, or of one part of its sums."""

    def __init__(self, matmul: Matmul, used: set[str]) -> None:
        super().__init__(matmul, used)
        self.groups = matmul.blocks.warps // 4
        self.fetched = {side: tile for side, tile in zip(SIDES, matmul.tiles) if tile is not None}

    @property
    def pointers(self) -> list[str]:
        """The tensors that the kernel reads or writes element by element."""
        roots = [store.expr for store in self.work.stores]
        roots += [operand for operand, tile in zip(self.work.operands, self.work.tiles) if tile is None]
        read = {n.buffer for n in walk(*roots) if isinstance(n, Load) and n.index}
        return [b.name for b in self.work.reads if b.name in read] + (
            [] if self.work.sent else [b.name for b in self.work.writes]
        )

    @property
    def maps(self) -> list[Travelling]:
        """The operands that are fetched, and the result if it is sent."""
        work, row = self.work, ROW // self.work.size
        found: list[Travelling] = []
        for side, tile in self.fetched.items():
            rows = {"m": work.blocks.m, "n": work.blocks.n, "k": work.blocks.k}[tile.axes[0]]
            begin = f".as_strided({tile.shape}, {tile.stride}, {tile.offset})" if tile.offset else ""
            found.append(
                Travelling(f"{side}_tiles", tile.buffer + begin, (1, rows, row), ROW, tile.shape, tile.stride)
            )
        if work.sent:
            shape = (work.shape.batch, work.shape.m, work.shape.n)
            found.append(Travelling("output_tiles", work.writes[0].name, (1, 16, 64), ROW, shape))
        return found

    def helpers(self) -> set[str]:
        """What ``cuda_tensor_cores.helpers`` is to print."""
        work = self.work
        needed = {
            "tensor_cores",
            "bulk",
            "swizzled",
            " ".join(["multiply", str(work.blocks.n), self._kind, *work.turned]),
        }
        return needed | ({f"pack {work.stores[0].buffer.dtype}"} if work.sent else set())

    @property
    def _kind(self) -> str:
        return {"f32": "tf32"}.get(self.work.shape.dtype, self.work.shape.dtype)

    def body(self) -> list[str]:
        """The kernel's statements, line by line."""
        work, blocks = self.work, self.work.blocks
        left, right, results = work.sections
        barriers = blocks.stages * (left + right) + results
        return [
            f"constexpr int STAGES = {blocks.stages}, LEFT = {left}, RIGHT = {right}, STAGE = LEFT + RIGHT;",
            f"constexpr int COLUMNS = {work.grid[1]};",
            "extern __shared__ __align__(1024) unsigned char memory[];",
            f"const unsigned stages = in_shared(memory), full = stages + {barriers}, empty = full + 8 * STAGES;",
            "const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;",
            f"if (threadIdx.x == {32 * blocks.warps}) {{",
            "  for (int s = 0; s < STAGES; ++s) {",
            f"    begin(full + 8 * s, {1 if len(self.fetched) == 2 else BRINGING + 1});",
            f"    begin(empty + 8 * s, {blocks.warps});",
            "  }",
            "  publish();",
            "}",
            "__syncthreads();",
            f"if (warp >= {blocks.warps}) {{",
            *indented(self._produce()),
            "} else {",
            *indented(self._consume()),
            "}",
        ]

    # ---------------------------------------------------------------------------------------------- tiles

    def _walked(self, inner: list[str]) -> list[str]:
        """``inner`` for each of the block's tiles."""
        work, rows, tiles = self.work, self.work.grid[0], math.prod(self.work.grid)
        lines = []
        tile = "number"
        if work.shape.batch > 1 or work.blocks.split > 1:
            tile = "tile"
            lines.append(f"const int tile = number % {tiles};")
        if work.blocks.split > 1:
            lines.append(f"const {self.int} part = number / {tiles}{self._batches('/')};")
            last = f"min({work.share}, {work.steps} - int(part) * {work.share})"
            lines.append(f"const int steps = {work.share if not work.steps % work.share else last};")
        else:
            lines.append(f"constexpr int steps = {work.steps};")
        if work.shape.batch > 1:
            number = f"number / {tiles}{self._batches('%') if work.blocks.split > 1 else ''}"
            lines.append(f"const {self.int} batch = {number};")
        group = min(work.blocks.group, rows)
        lines += [
            f"const int above = {tile} / ({group} * COLUMNS) * {group};",
            f"const int rows = min({group}, {rows} - above), inside = {tile} % ({group} * COLUMNS);" if rows % group
            else f"const int rows = {group}, inside = {tile} % ({group} * COLUMNS);",
            f"const int top = (above + inside % rows) * {work.blocks.m}, start = inside / rows * {work.blocks.n};",
        ]  # fmt: skip
        if work.blocks.persistent:
            head = f"for (int number = blockIdx.x; number < {work.count}; number += gridDim.x) {{"
            return [head, *indented([*lines, *inner]), "}"]
        return ["const int number = blockIdx.x;", *lines, *inner]

    def _batches(self, operator: str) -> str:
        return f" {operator} {self.work.shape.batch}" if self.work.shape.batch > 1 else ""

    def _produce(self) -> list[str]:
        """One thread asks for the tiles, as soon as there is room; of what is computed, a warpgroup brings its part."""
        work, alone = self.work, len(self.fetched) == 2
        first = f"(part * {work.share} + step)" if work.blocks.split > 1 else "step"
        bytes_ = "STAGE" if alone else "LEFT" if "left" in self.fetched else "RIGHT"
        asked = [f"expect(full + 8 * s, {bytes_});"]
        for side, tile in self.fetched.items():
            asked += self._fetch(side, tile)
        loop = [
            "for (int step = 0; step < steps; ++step) {",
            f"  const int depth = {first} * {work.blocks.k};",
            "  await(empty + 8 * s, phase ^ 1);",
            *indented(asked if alone else ["if (thread == 0) {", *indented(asked), "}", *self._brought()]),
            "  if (++s == STAGES) s = 0, phase ^= 1;",
            "}",
        ]
        if alone:
            return ["if (lane == 0) {", "  int s = 0, phase = 0;", *indented(self._walked(loop)), "}"]
        thread = f"const int thread = threadIdx.x - {32 * work.blocks.warps};"
        return [thread, "int s = 0, phase = 0;", *self._walked(loop)]

    def _brought(self) -> list[str]:
        """All threads compute the operand that is not fetched, 16 bytes along ``k`` at a time."""
        work, blocks = self.work, self.work.blocks
        side = "left" if "right" in self.fetched else "right"
        operand, outer = work.operands[SIDES.index(side)], "m" if side == "left" else "n"
        rows, few = getattr(blocks, outer), 16 // work.size
        chunks, k = blocks.k // few, variables(work.shape)[3]
        along = any(n.index[0].coefficient(k) == 1 for n in walk(operand) if isinstance(n, Load) and n.index)
        places = (f"item / {chunks}", f"item % {chunks}") if along else (f"item % {rows}", f"item / {rows}")
        size, ragged = getattr(work.shape, outer), getattr(work.shape, outer) % rows != 0
        dimensions = (
            Along(outer, f"{'top' if outer == 'm' else 'start'} + row", size, ragged),
            Along("k", f"depth + chunk * {few} + j", work.shape.k, work.shape.k % blocks.k != 0),
        )
        text = self.text()
        bound = text.bind([operand])
        value = text.expr(operand)
        value = cast(work.shape.dtype, value) if operand.dtype != work.shape.dtype else bare_text(value)
        if dimensions[1].ragged:
            value = f"{dimensions[1].at} < {work.shape.k} ? {value} : {self.kind}(0.0f)"
        to = f"s * STAGE{' + LEFT' if side == 'right' else ''} + chunk / 8 * {rows * ROW} + row * {ROW}"
        return [
            f"for (int item = thread; item < {rows * chunks}; item += {BRINGING}) {{",
            f"  const int row = {places[0]}, chunk = {places[1]};",
            f"  alignas(16) {self.kind} few[{few}];",
            "  #pragma unroll",
            f"  for (int j = 0; j < {few}; ++j) {{",
            *indented(
                [*(dimension.line(self.int) for dimension in dimensions), *bound, f"few[j] = {value};"], 2
            ),
            "  }",
            f"  const int to = {to} + (chunk % 8 ^ row % 8) * 16;",
            "  *reinterpret_cast<uint4*>(memory + to) = *reinterpret_cast<const uint4*>(few);",
            "}",
            "publish();",
            "arrive(full + 8 * s);",
        ]

    def _fetch(self, side: str, tile: Described) -> list[str]:
        """The copies of one operand's tile: 128 bytes wide each."""
        work, row = self.work, ROW // self.work.size
        where = {"m": "top", "n": "start", "k": "depth"}
        sizes = {"m": work.blocks.m, "n": max(work.blocks.n, row), "k": work.blocks.k}
        outer, inner = tile.axes[0], tile.axes[1]
        rows = getattr(work.blocks, outer)
        to = "stages + s * STAGE" + (" + LEFT" if side == "right" else "")
        batch = "int(batch)" if tile.shape[0] > 1 else "0"
        count = sizes[inner] // row
        return [
            f"fetch({to}{f' + {j * rows * ROW}' if j else ''}, {side}_tiles, full + 8 * s, "
            f"{where[inner]}{f' + {j * row}' if j else ''}, {where[outer]}, {batch});"
            for j in range(count)
        ]

    # ------------------------------------------------------------------------------------------- products

    def _matrix(self, side: str, first: str, step: str) -> str:
        """The descriptor of an operand's part: its rows or columns from ``first`` on, and 32 bytes of ``k``."""
        work = self.work
        base = "left" if side == "left" else "right"
        if side in work.turned:
            slab = work.blocks.k * ROW
            at = f"{base} + {first} * {slab}" if first else base
            return f"swizzled({at} + {step} * {32 // work.size * ROW}, {slab})"
        at = f"{base} + {first} * {64 * ROW}" if first else base
        wide = work.blocks.k * work.size > ROW
        rows = work.blocks.m if side == "left" else work.blocks.n
        return (
            f"swizzled({at} + {f'{step} / 4 * {rows * ROW} + {step} % 4 * 32' if wide else f'{step} * 32'})"
        )

    def _consume(self) -> list[str]:
        work, blocks = self.work, self.work.blocks
        multiply = "_".join(["multiply", self._kind, *work.turned])
        first = "(warp / 4)" if self.groups > 1 else ""
        if work.heights > 1:
            first = f"(warp / 4 * {work.heights} + h)"
        product = f"{multiply}(sums[h], {self._matrix('left', first, 'c')}, {self._matrix('right', '', 'c')}, step + c > 0);"
        inner = [
            f"float sums[{work.heights}][{blocks.n // 2}];",
            "for (int step = 0; step < steps; ++step) {",
            "  const unsigned left = stages + s * STAGE, right = left + LEFT;",
            "  await(full + 8 * s, phase);",
            "  open_products();",
            "  #pragma unroll",
            f"  for (int c = 0; c < {blocks.k * work.size // 32}; ++c) {{",
            "    #pragma unroll",
            f"    for (int h = 0; h < {work.heights}; ++h)",
            f"      {product}",
            "  }",
            "  close_products();",
            "  leave_products<1>();",
            "  if (step > 0 && lane == 0) arrive(empty + 8 * (s == 0 ? STAGES - 1 : s - 1));",
            "  if (++s == STAGES) s = 0, phase ^= 1;",
            "}",
            "#pragma unroll",
            f"for (int h = 0; h < {work.heights}; ++h) await_products(sums[h]);",
            "if (lane == 0) arrive(empty + 8 * (s == 0 ? STAGES - 1 : s - 1));",
            *self._epilogue(),
        ]
        sent = ["if (lane == 0) await_sent();"] if work.sent else []
        return ["int s = 0, phase = 0;", *self._walked(inner), *sent]

    # ------------------------------------------------------------------------------------------- results

    def _epilogue(self) -> list[str]:
        work, shape, blocks = self.work, self.work.shape, self.work.blocks
        ragged_m, ragged_n = shape.m % blocks.m != 0, shape.n % blocks.n != 0
        row = "warp * 16" if work.heights == 1 else f"warp / 4 * {64 * work.heights} + h * 64 + warp % 4 * 16"
        along = (
            Along("m", "row + lane / 4 + e / 2 * 8", shape.m, ragged_m),
            Along("n", "start + j * 8 + lane % 4 * 2 + e % 2", shape.n, ragged_n),
        )
        loads, loaded = self._neighbours(along)
        lines = [
            "#pragma unroll",
            f"for (int j = 0; j < {blocks.n // 8}; ++j) {{",
            *indented(loads),
            "  #pragma unroll",
            "  for (int e = 0; e < 4; ++e) {",
            *indented(self.element("sums[h][4 * j + e]", along, work.sent or work.paired, loaded), 2),
            "  }",
            *indented([] if work.sent or not work.paired else self._pairs(along)),
            "}",
        ]
        if work.sent:
            lines += self._send()
        if ragged_m:
            lines = [f"if (row < {shape.m}) {{", *indented(lines), "}"]
        before = []
        if work.sent and not blocks.persistent:
            before = [
                f"meet<1, {32 * blocks.warps}>();  // nobody reads the tiles any more: the results take their place"
            ]
        elif work.sent:
            before = ["if (lane == 0) await_sent();", "__syncwarp();"]
        return [
            *before,
            "#pragma unroll",
            f"for (int h = 0; h < {work.heights}; ++h) {{",
            f"  const int row = top + {row};",
            *indented(lines),
            "}",
        ]

    def _neighbours(self, along: tuple[Along, ...]) -> tuple[list[str], dict[Interned, str]]:
        """Statements that load what the results need, two neighbours at once where that can be; what they are called."""
        text, roots = self.text(), [store.expr for store in self.work.stores]
        safe, _ = text.safe(roots)
        kinds = {b.name: b.dtype for b in self.work.reads}
        found = [
            load
            for load in text.pending(roots)
            if isinstance(load, Load) and load.index and load in safe and BYTES[kinds[load.buffer]] in (2, 4)
            and self.work.neighbours(load.index[0])
        ]  # fmt: skip
        if not found:
            return [], {}
        self.used.add("vector")
        m, n = (
            dimension.line(self.int) for dimension in (along[0], replace(along[1], size=along[1].size - 1))
        )
        places = [enclosed(text.index(load.index[0])) for load in found]
        return [
            *(f"Vector<{TYPES[kinds[load.buffer]]}, 2> pairs{k}[2];" for k, load in enumerate(found)),
            "#pragma unroll",
            "for (int e = 0; e < 4; e += 2) {",
            f"  {m}",
            f"  {n}",
            *(
                f"  pairs{k}[e / 2] = load<2>({self.names[load.buffer]}, {place} / 2);"
                for k, (load, place) in enumerate(zip(found, places))
            ),
            "}",
        ], {load: f"pairs{k}[e / 2].at[e % 2]" for k, load in enumerate(found)}

    def _pairs(self, along: tuple[Along, ...]) -> list[str]:
        """Two neighbours are stored at once."""
        (store,) = self.work.stores
        kind, name = TYPES[store.buffer.dtype], self.names[store.buffer.name]
        self.used.add("vector")
        guards = [f"{dimension.name} < {dimension.size}" for dimension in along if dimension.ragged]
        guard = f"if ({' && '.join(guards)}) " if guards else ""
        values = ", ".join(f"{kind}(sums[h][4 * j + {at}])" for at in ("e", "e + 1"))
        place = enclosed(self.text().index(store.place))
        return [
            "#pragma unroll",
            "for (int e = 0; e < 4; e += 2) {",
            *(f"  const {self.int} {dimension.name} = {dimension.at};" for dimension in along),
            f"  {guard}store({name}, {place} / 2, Vector<{kind}, 2>{{{{{values}}}}});",
            "}",
        ]

    def _send(self) -> list[str]:
        """A warp's 16 rows go through shared memory, swizzled, 64 columns at a time."""
        work, blocks = self.work, self.work.blocks
        pack = f"pack_{work.stores[0].buffer.dtype}"
        place = f"stages + {blocks.stages * sum(work.sections[:2])}" if blocks.persistent else "stages"
        words = ", ".join(
            f"{pack}(sums[h][{at}], sums[h][{at} + 1])"
            for at in ("4 * j", "4 * j + 2", "4 * j + 4", "4 * j + 6")
        )
        batch = "int(batch)" if work.shape.batch > 1 else "0"
        return [
            f"const unsigned own = {place} + (row - top) * {2 * blocks.n};",
            "#pragma unroll",
            f"for (int j = 0; j < {blocks.n // 8}; j += 2) {{",
            f"  const unsigned four[4] = {{{words}}};",
            f"  put(own + j / 8 * {16 * ROW} + lane % 16 * {ROW} + ((j % 8 + lane / 16) ^ lane % 8) * 16, four);",
            "}",
            "publish();",
            "__syncwarp();",
            "if (lane == 0) {",
            "  #pragma unroll",
            f"  for (int j = 0; j < {blocks.n // 64}; ++j)",
            f"    send(output_tiles, own + j * {16 * ROW}, start + j * 64, row, {batch});",
            "}",
        ]
