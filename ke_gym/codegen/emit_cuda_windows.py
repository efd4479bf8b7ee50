"""Convolutions along one axis -> CUDA C++ on Hopper's tensor cores. What is computed is in ``windows``.

One warpgroup transposes the tiles that bulk copies bring; the others multiply, a warpgroup for each 64 output channels,
and hand the results to bulk copies. Shared memory holds matrices without swizzle, eight channels of a position in 16
bytes, positions one after the other, so that a window may begin at any position.
"""

from __future__ import annotations

from ke_gym.codegen import emit_cuda_products
from ke_gym.codegen.emit_cuda_products import Along, Travelling, indented
from ke_gym.codegen.expr import Expr, Load, walk
from ke_gym.codegen.windows import STAGED, Windowed

GROUP = 128  # threads of a warpgroup


class Printer(emit_cuda_products.Printer[Windowed]):
    """Prints the kernel of one convolution."""

    def __init__(self, windowed: Windowed, used: set[str]) -> None:
        super().__init__(windowed, used)
        self.bulk = windowed.blocks.loads == "descriptors"
        self.groups = windowed.blocks.m // 64

    @property
    def pointers(self) -> list[str]:
        """The tensors that the kernel reads or writes element by element."""
        roots = [self.work.weight, *(store.expr for store in self.work.stores)]
        if not self.bulk:
            roots.append(self.work.input)
        read = {n.buffer for n in walk(*roots) if isinstance(n, Load) and n.index}
        return [b.name for b in self.work.reads if b.name in read] + (
            [] if self.work.sent else [b.name for b in self.work.writes]
        )

    @property
    def maps(self) -> list[Travelling]:
        """The input if it is fetched, and the result if it is sent."""
        work = self.work
        found: list[Travelling] = []
        if self.bulk and work.source is not None:
            tensor = f"{work.source.buffer}.view({work.source.shape})"
            found.append(Travelling("input_tiles", tensor, (1, work.depth, work.width)))
        if work.sent:
            tensor = f"{work.writes[0].name}.view({(work.shape.batch, work.shape.m, work.shape.n)})"
            found.append(Travelling("output_tiles", tensor, (1, 16, work.blocks.n)))
        return found

    def helpers(self) -> set[str]:
        """What ``cuda_tensor_cores.helpers`` is to print."""
        needed = {"tensor_cores", f"multiply {self.work.blocks.n} {self.work.shape.dtype}"}
        if self.bulk or self.work.sent:
            needed.add("bulk")
        if self.work.sent:
            needed.add(f"pack {self.work.stores[0].buffer.dtype}")
        return needed

    def body(self) -> list[str]:
        """The kernel's statements, line by line."""
        work, call = self.work, self.work.call
        weights, copied, staged, results = work.sections
        stages = work.blocks.stages if self.bulk else 0
        barriers = weights + stages * copied + STAGED * staged + results
        along = work.tiles[1]
        lines = [
            f"constexpr int TAPS = {call.window.taps}, DEPTH = {work.depth}, ROWS = {work.height + 1};",
            f"constexpr int POSITIONS = {work.blocks.n}, SPAN = {work.span}, ALONG = {along};",
            f"constexpr int TILES = {along * work.shape.batch}, TILE_BYTES = {staged};",
            "extern __shared__ __align__(1024) unsigned char memory[];",
            f"const unsigned weights = in_shared(memory), staged = weights + {weights + stages * copied};",
            f"const unsigned full = weights + {barriers}, empty = full + {8 * STAGED};",
            "const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;",
            f"const int first = blockIdx.y * {work.blocks.m};"
            if work.tiles[0] > 1
            else "constexpr int first = 0;",
        ]
        if self.bulk:
            lines += [
                f"constexpr int WIDTH = {work.width}, COPIED = {copied}, STAGES = {stages};",
                f"const unsigned copies = weights + {weights}, there = empty + {8 * STAGED};",
            ]
        lines += [
            f"if (threadIdx.x == {GROUP * self.groups}) {{",
            f"  for (int t = 0; t < {STAGED}; ++t) {{",
            f"    begin(full + 8 * t, {GROUP});",
            f"    begin(empty + 8 * t, {4 * self.groups});",
            "  }",
        ]
        if self.bulk:
            lines += [
                "  for (int s = 0; s < STAGES; ++s) begin(there + 8 * s, 1);",
                "  publish();",
                "  for (int s = 0; s < STAGES; ++s) {",
                "    const int tile = blockIdx.x + s * gridDim.x;",
                "    if (tile < TILES) {",
                *indented(self._fetch("tile"), 3),
                "    }",
                "  }",
            ]
        lines += ["}", *self._weights(), "publish();", "__syncthreads();"]
        lines += [f"if (threadIdx.x >= {GROUP * self.groups}) {{", *indented(self._produce())]
        return [*lines, "} else {", *indented(self._consume()), "}"]

    # ------------------------------------------------------------------------------------------ operands

    def _fetch(self, tile: str) -> list[str]:
        x = f"{tile} % ALONG * POSITIONS - {self.work.call.padding[0] + self.work.lead}"
        return [
            "expect(there + 8 * s, COPIED);",
            f"fetch(copies + s * COPIED, input_tiles, there + 8 * s, {x}, 0, {tile} / ALONG);",
        ]

    def _eight(self, expr: Expr, guard: str, to: str) -> list[str]:
        """Eight channels from ``base`` on, as one store."""
        text = self.text()
        channels = self.work.call.window.channels
        guards = [
            g for g in (guard, f"c < {channels}" if channels % 8 or channels < self.work.depth else "") if g
        ]
        value = (
            text.expr(expr)
            if not guards
            else f"{' && '.join(guards)} ? {text.expr(expr)} : {self.kind}(0.0f)"
        )
        return [
            f"alignas(16) {self.kind} eight[8];",
            "#pragma unroll",
            "for (int j = 0; j < 8; ++j) {",
            "  const int c = base + j;",
            f"  eight[j] = {value};",
            "}",
            f"*reinterpret_cast<uint4*>(memory + {to}) = *reinterpret_cast<const uint4*>(eight);",
        ]

    def _weights(self) -> list[str]:
        """All threads bring the weights, those of neighbouring channels side by side."""
        ragged = self.work.shape.m % self.work.blocks.m != 0
        inner = self._eight(
            self.work.weight, f"m < {self.work.shape.m}" if ragged else "", "(k * ROWS + m - first) * 16"
        )
        return [
            f"for (int item = threadIdx.x; item < TAPS * DEPTH / 8 * (ROWS - 1); item += {self.work.threads}) {{",
            "  const int k = item % (TAPS * DEPTH / 8), m = first + item / (TAPS * DEPTH / 8);",
            "  const int tap = k / (DEPTH / 8), base = k % (DEPTH / 8) * 8;",
            *indented(inner),
            "}",
        ]

    def _produce(self) -> list[str]:
        lines = [
            f"const int thread = threadIdx.x - {GROUP * self.groups};",
            "for (int i = 0, tile = blockIdx.x; tile < TILES; tile += gridDim.x, ++i) {",
            f"  const int t = i % {STAGED};",
        ]
        if self.bulk:
            lines += [
                "  const int s = i % STAGES;",
                "  await(there + 8 * s, i / STAGES);",
                f"  await(empty + 8 * t, i / {STAGED} + 1);",
                "  constexpr int MATRICES = DEPTH / 8 * (SPAN / 8);",
                "  for (int next = thread / 32 * 4; next < MATRICES; next += 64) {",
                "    unsigned four[4][4];",
                "    unsigned to[4];",
                "    #pragma unroll",
                "    for (int q = 0; q < 4; ++q) {",
                "      const int which = min(next + 16 * q + lane / 8, MATRICES - 1);",
                "      const int c = which / (SPAN / 8), p = which % (SPAN / 8);",
                "      take(four[q], copies + s * COPIED + (c * 8 + lane % 8) * WIDTH * 2 + p * 16);",
                "      to[q] = staged + t * TILE_BYTES + (c * SPAN + p * 8 + lane % 8) * 16;",
                "    }",
                "    #pragma unroll",
                "    for (int q = 0; q < 4; ++q) put(to[q], four[q]);",
                "  }",
                "  publish();",
                "  arrive(full + 8 * t);",
                f"  meet<1, {GROUP}>();",
                "  const int later = tile + STAGES * gridDim.x;",
                "  if (thread == 0 && later < TILES) {",
                *indented(self._fetch("later"), 2),
                "  }",
            ]
        else:
            length = self.work.call.x.shape[2]
            inner = self._eight(self.work.input, f"p >= 0 && p < {length}", "offset + item * 16")
            lines += [
                f"  await(empty + 8 * t, i / {STAGED} + 1);",
                f"  const {self.int} batch = tile / ALONG;",
                "  const int offset = staged - weights + t * TILE_BYTES;",
                "  #pragma unroll 2",
                f"  for (int item = thread; item < DEPTH / 8 * SPAN; item += {GROUP}) {{",
                "    const int base = item / SPAN * 8;",
                f"    const int p = tile % ALONG * POSITIONS - {self.work.call.padding[0]} + item % SPAN;",
                *indented(inner, 2),
                "  }",
                "  publish();",
                "  arrive(full + 8 * t);",
            ]
        return [*lines, "}"]

    # ------------------------------------------------------------------------------------------- results

    def _consume(self) -> list[str]:
        work, dilation = self.work, self.work.call.dilation[0]
        shift = "tap" if dilation == 1 else f"tap * {dilation}"
        shift += f" + {work.lead}" if work.lead else ""
        steps = work.call.window.taps * work.depth // 16
        unrolled = "#pragma unroll" if steps <= 64 else "#pragma unroll 1"
        freed = ["if (lane == 0) arrive(empty + 8 * t);"]
        if work.sent and work.blocks.apart:
            freed += ["if (lane == 0) await_sent();", "__syncwarp();"]
        elif work.sent:
            freed = [
                f"meet<2, {GROUP * self.groups}>();  // nobody reads the tile any more: the results take its place"
            ]
        lines = [
            "for (int i = 0, tile = blockIdx.x; tile < TILES; tile += gridDim.x, ++i) {",
            f"  const int t = i % {STAGED};",
            "  const unsigned at = staged + t * TILE_BYTES;",
            f"  await(full + 8 * t, i / {STAGED});",
            "  float sums[POSITIONS / 2];",
            "  open_products();",
            f"  {unrolled}",
            "  for (int tap = 0; tap < TAPS; ++tap) {",
            "    #pragma unroll",
            "    for (int c = 0; c < DEPTH / 8; c += 2) {",
            "      const unsigned left = weights + ((tap * (DEPTH / 8) + c) * ROWS + warp / 4 * 64) * 16;",
            f"      const unsigned right = at + (c * SPAN + {shift}) * 16;",
            f"      multiply_{work.shape.dtype}(sums, matrix(left, ROWS * 16), matrix(right, SPAN * 16), tap + c > 0);",
            "    }",
            "  }",
            "  close_products();",
        ]
        if work.sent and not work.blocks.apart:
            lines += [
                "  if (i > 0 && lane == 0) {",
                "    await_sent();",
                "    arrive(empty + 8 * (t ^ 1));",
                "  }",
            ]
        lines += ["  await_products(sums);", *indented(freed), *indented(self._epilogue()), "}"]
        return [*lines, "if (lane == 0) await_sent();"] if work.sent else lines

    def _epilogue(self) -> list[str]:
        work, shape = self.work, self.work.shape
        ragged_m, ragged_n = shape.m % work.blocks.m != 0, shape.n % work.blocks.n != 0
        m = "first + warp * 16 + lane / 4 + e / 2 * 8"
        n = "start + j * 8 + lane % 4 * 2 + e % 2"
        along = (Along("m", m, shape.m, ragged_m), Along("n", n, shape.n, ragged_n))
        lines = [
            f"const {self.int} batch = tile / ALONG;",
            "const int start = tile % ALONG * POSITIONS;",
        ]
        if work.sent:
            place = f"staged + {STAGED} * TILE_BYTES" if work.blocks.apart else "at"
            lines.append(f"const unsigned own = {place} + warp * 16 * POSITIONS * 2;")
        lines += [
            "#pragma unroll",
            "for (int j = 0; j < POSITIONS / 8; ++j) {",
            "  #pragma unroll",
            "  for (int e = 0; e < 4; ++e) {",
            *indented(self.element("sums[4 * j + e]", along, work.sent), 2),
            "  }",
        ]
        if work.sent:
            pack = f"pack_{work.stores[0].buffer.dtype}"
            upper, lower = (f"{pack}(sums[4 * j + {k}], sums[4 * j + {k + 1}])" for k in (0, 2))
            lines.append(f"  put(own + lane % 16 * POSITIONS * 2 + j * 16, {upper}, {lower});")
        lines.append("}")
        if work.sent:
            lines += [
                "publish();",
                "__syncwarp();",
                "if (lane == 0) send(output_tiles, own, start, first + warp * 16, batch);",
            ]
        if ragged_m:
            lines = [f"if (first + warp * 16 < {shape.m}) {{", *indented(lines), "}"]
        return lines
