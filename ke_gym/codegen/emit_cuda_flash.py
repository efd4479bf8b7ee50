"""Attention -> CUDA C++ on Hopper's tensor cores. What is computed is in ``attentions``.

One warp has bulk copies bring tiles of keys and values; of each there are several, with a barrier that says that it is
there and one that says that it has been used. The other warpgroups have 64 queries each, in shared memory; their scores,
weights and sums stay in registers, where weights are the left operand of the second product. The scores of a block of
keys are computed while the values of the block before are summed up. Blocks that masks touch come first.
"""

from __future__ import annotations

from ke_gym.codegen.attentions import GROUP, REGISTERS, ROW, Attention
from ke_gym.codegen.emit_cuda_products import Travelling, indented
from ke_gym.codegen.emit_cuda_weights import Weights
from ke_gym.codegen.expr import Load
from ke_gym.codegen.triton_text import bare_text

NAMES = ("queries", "keys", "values")
THREADS = 128  # of a block that looks for NaN


class Printer(Weights):
    """Prints the kernels of one ``work``."""

    def __init__(self, work: Attention, suffix: str, used: set[str]) -> None:
        super().__init__(work, suffix, used)
        used |= {"tensor_cores", "bulk", "swizzled", "online", f"pack {work.writes[0].dtype}"}
        kind = work.shape.dtype
        used |= {f"multiply {work.blocks.n} {kind}", f"held {work.wide[1]} {kind}", f"pack {kind}"}
        used |= {f"fetch {len(tile.shape)}" for tile in work.tiles if len(tile.shape) != 3}
        if self.causal:
            used.add("nan")

    @property
    def maps(self) -> list[Travelling]:
        """The operands, as they travel."""
        rows = (self.work.blocks.m, self.work.blocks.n, self.work.blocks.n)
        found = []
        for name, tile, count in zip(NAMES, self.work.tiles, rows):
            begin = f".as_strided({tile.shape}, {tile.stride}, {tile.offset})" if tile.offset else ""
            box = (*[1] * len(tile.at), count, ROW)
            found.append(
                Travelling(f"{name}_tiles", tile.buffer + begin, box, 2 * ROW, tile.shape, tile.stride)
            )
        return found

    @property
    def pointers(self) -> list[str]:
        """The tensors that the kernel reads or writes element by element."""
        return [*self._read, *([self.work.flags.name] if self.causal else []), self.work.writes[0].name]

    # -------------------------------------------------------------------------------------------- kernel

    def body(self) -> list[str]:
        """The kernel's statements, line by line."""
        work, shape, blocks = self.work, self.work.shape, self.work.blocks
        queries, keys, values = work.sections
        barriers = queries + blocks.stages * (keys + values)
        threads = work.groups * 128
        lines = [
            f"constexpr int M = {blocks.m}, N = {blocks.n}, STAGES = {blocks.stages}, KEYS = {shape.keys};",
            f"constexpr int KEY_BYTES = {keys}, VALUE_BYTES = {values};",
            "extern __shared__ __align__(1024) unsigned char memory[];",
            f"const unsigned queries = in_shared(memory), keys = queries + {queries};",
            "const unsigned values = keys + STAGES * KEY_BYTES;",
            f"const unsigned there = queries + {barriers};",
            "const unsigned keys_full = there + 8, keys_empty = keys_full + 8 * STAGES;",
            "const unsigned values_full = keys_empty + 8 * STAGES, values_empty = values_full + 8 * STAGES;",
            "const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;",
            f"const {self.int} batch = blockIdx.y;",
        ]
        if self.causal:
            visible = work.visible or 0
            lines += [
                "const int first = (gridDim.x - 1 - blockIdx.x) * M;  // the longest rows first",
                f"const int count = max((min({_plus('first + M', visible - 1)}, KEYS) + N - 1) / N, 1);",
                f"const int whole = max(min({_plus('first', visible)}, KEYS), 0) / N;  // blocks without a mask",
            ]
        else:
            lines += ["const int first = blockIdx.x * M;", f"constexpr int count = {work.count};"]
            lines += ["constexpr int whole = KEYS / N;"] if work.ragged else []
        lines += [
            f"if (threadIdx.x == {threads}) {{",
            "  begin(there, 1);",
            "  for (int s = 0; s < STAGES; ++s) {",
            "    begin(keys_full + 8 * s, 1);",
            f"    begin(keys_empty + 8 * s, {4 * work.groups});",
            "    begin(values_full + 8 * s, 1);",
            f"    begin(values_empty + 8 * s, {4 * work.groups});",
            "  }",
            "  publish();",
            "}",
            "__syncthreads();",
            f"if (threadIdx.x >= {threads}) {{",
            *indented(self._bring()),
            "} else {",
            *indented(self._multiply()),
            "}",
        ]
        return lines

    def _bring(self) -> list[str]:
        few, _ = REGISTERS[self.work.groups]
        return [
            *([f"leave_registers<{few}>();"] if few else []),
            f"if (threadIdx.x == {self.work.groups * 128}) {{",
            f"  expect(there, {self.work.sections[0]});",
            *indented(self._fetch(0, "queries", "there", "first")),
            "  #pragma unroll 1",
            "  for (int i = 0; i < count; ++i) {",
            "    const int s = i % STAGES, start = (count - 1 - i) * N;",
            "    await(keys_empty + 8 * s, i / STAGES + 1);",
            "    expect(keys_full + 8 * s, KEY_BYTES);",
            *indented(self._fetch(1, "keys + s * KEY_BYTES", "keys_full + 8 * s", "start"), 2),
            "    await(values_empty + 8 * s, i / STAGES + 1);",
            "    expect(values_full + 8 * s, VALUE_BYTES);",
            *indented(self._fetch(2, "values + s * VALUE_BYTES", "values_full + 8 * s", "start"), 2),
            "  }",
            "}",
        ]

    def _fetch(self, which: int, to: str, barrier: str, row: str) -> list[str]:
        """Bring a tile of queries (0), keys or values from ``row`` on: 64 columns at a time."""
        text, tile, rows = self._text(), self.work.tiles[which], "M" if which == 0 else "N"
        outer = "".join(f", {bare_text(text.index(index))}" for index in reversed(tile.at))
        lines = []
        for part in range(-(-tile.shape[-1] // ROW)):
            place = f"{to} + {part} * {rows} * {2 * ROW}" if part else to
            lines.append(f"fetch({place}, {NAMES[which]}_tiles, {barrier}, {part * ROW}, {row}{outer});")
        return lines

    def _multiply(self) -> list[str]:
        work, blocks = self.work, self.work.blocks
        turn = blocks.turns and work.groups > 1
        _, many = REGISTERS[work.groups]
        group = ["const int group = warp / 4;"] if work.groups > 1 else []
        own = f"queries + group * {GROUP * 2 * ROW}" if group else "queries"
        lines = [
            *([f"take_registers<{many}>();"] if many < 255 else []),
            *group,
            "const int row = first + warp * 16 + lane / 4;",
            f"const unsigned own = {own};",
            f"float scores[N / 2], sums[{work.wide[1] // 2}] = {{}};",
            "float top[2] = {-inf(), -inf()}, total[2] = {}, rescale[2];",
            "unsigned weights[N / 4];",
        ]
        if turn:
            lines.append(f"if (group == {work.groups - 1}) give_turn(1);")
        lines += [
            "await(there, 0);",
            "await(keys_full, 0);",
            "open_products();",
            *self._scores("0"),
            "close_products();",
            "await_products(scores);",
            "if (lane == 0) arrive(keys_empty);",
            self.call("count - 1"),
            *self._pack(),
            "#pragma unroll 1",
            "for (int i = 1; i < count; ++i) {",
            "  const int s = i % STAGES, t = (i - 1) % STAGES;",
            "  await(keys_full + 8 * s, i / STAGES);",
            *(["  await_turn(1 + group);"] if turn else []),
            "  open_products();",
            *indented(self._scores("s")),
            "  close_products();",
            "  await(values_full + 8 * t, (i - 1) / STAGES);",
            "  settle(sums);",
            "  settle(weights);",
            "  open_products();",
            *indented(self._sums("t")),
            "  close_products();",
            *([f"  give_turn(1 + (group + 1) % {work.groups});"] if turn else []),
            "  leave_products<1>();",
            "  settle(scores);",
            "  if (lane == 0) arrive(keys_empty + 8 * s);",
            f"  {self.call('count - 1 - i')}",
            "  await_products(sums);",
            "  if (lane == 0) arrive(values_empty + 8 * t);",
            "  #pragma unroll",
            f"  for (int k = 0; k < {work.wide[1] // 2}; ++k) sums[k] *= rescale[k / 2 % 2];",
            *indented(self._pack()),
            "}",
            "const int t = (count - 1) % STAGES;",
            "await(values_full + 8 * t, (count - 1) / STAGES);",
            "settle(sums);",
            "settle(weights);",
            "open_products();",
            *self._sums("t"),
            "close_products();",
            "await_products(sums);",
        ]
        return [*lines, *(self._unseen() if self.causal else []), *self._store()]

    def _scores(self, stage: str) -> list[str]:
        """Queries by keys; what is summed over is contiguous in both."""
        kind, row = self.work.shape.dtype, 2 * ROW
        return [
            "#pragma unroll",
            f"for (int k = 0; k < {-(-self.work.shape.d // 16)}; ++k)",
            f"  multiply_{kind}(scores, swizzled(own + k / 4 * (M * {row}) + k % 4 * 32),",
            f"                {' ' * len(kind)}swizzled(keys + {stage} * KEY_BYTES + k / 4 * (N * {row}) + k % 4 * 32), k > 0);",
        ]

    def _sums(self, stage: str) -> list[str]:
        """Weights by values, whose rows are what is summed over."""
        kind, row = self.work.shape.dtype, 2 * ROW
        four = ", ".join(f"weights[4 * k + {q}]" if q else "weights[4 * k]" for q in range(4))
        return [
            "#pragma unroll",
            "for (int k = 0; k < N / 16; ++k)",
            f"  multiply_held_{kind}(sums, {four},",
            f"                {' ' * len(kind)}     swizzled(values + {stage} * VALUE_BYTES + k * {16 * row}, N * {row}));",
        ]

    def _pack(self) -> list[str]:
        """Weights as halves: a thread's sums of a product are where the next one wants its left operand."""
        return [
            "#pragma unroll",
            f"for (int k = 0; k < N / 4; ++k) weights[k] = pack_{self.work.shape.dtype}(scores[2 * k], scores[2 * k + 1]);",
        ]

    # ------------------------------------------------------------------------------------------- results

    def _unseen(self) -> list[str]:
        work = self.work
        flags = self.names[work.flags.name]
        return [
            "// Keys that no query here sees have weights of zero, but NaN stays NaN.",
            "int unseen = 0;",
            f"for (int k = count * {work.words} + lane; k < {work.count * work.words}; k += 32)",
            f"  unseen |= {flags}[batch * {work.count * work.words} + k];",
            "#pragma unroll",
            f"for (int step = {work.words}; step < 32; step *= 2) unseen |= __shfl_xor_sync(0xffffffff, unseen, step);",
            "#pragma unroll",
            f"for (int w = 0; w < {-(-work.shape.dv // 32)}; ++w) {{",
            "  const unsigned word = unsigned(__shfl_sync(0xffffffff, unseen, w)) >> lane % 4 * 2;",
            "  #pragma unroll",
            "  for (int e = 0; e < 16; ++e)",
            "    if (word >> (e / 4 * 8 + e % 2) & 1) sums[16 * w + e] = not_a_number();",
            "}",
        ]

    def _store(self) -> list[str]:
        work, shape = self.work, self.work.shape
        out = work.writes[0]
        place = self._text().element(out.name, work.place)
        return [
            "#pragma unroll",
            "for (int r = 0; r < 2; ++r) {",
            "  total[r] += __shfl_xor_sync(0xffffffff, total[r], 1);",
            "  total[r] += __shfl_xor_sync(0xffffffff, total[r], 2);",
            "  const float share = 1.0f / total[r];",
            "  const int m = row + r * 8;",
            f"  if (m < {shape.queries}) {{",
            "    #pragma unroll",
            f"    for (int j = 0; j < {shape.dv // 8}; ++j) {{",
            "      const int e = j * 8 + lane % 4 * 2;",
            f"      *reinterpret_cast<unsigned*>(&{place}) =",
            f"          pack_{out.dtype}(sums[4 * j + 2 * r] * share, sums[4 * j + 2 * r + 1] * share);",
            "    }",
            "  }",
            "}",
        ]

    def unseen(self) -> list[str]:
        """The body of the kernel that finds which elements of each block of values are not all finite."""
        work, shape = self.work, self.work.shape
        value = work.operands[2]
        assert isinstance(value, Load)
        place = self._text().element(value.buffer, value.index[0])
        exponent = {"f16": "0x7c00", "bf16": "0x7f80"}[shape.dtype]
        return [
            f"constexpr int N = {work.blocks.n}, EIGHTS = {shape.dv // 8}, WORDS = {work.words};",
            f"const {self.int} batch = blockIdx.y;",
            "__shared__ int found[WORDS];",
            "if (threadIdx.x < WORDS) found[threadIdx.x] = 0;",
            "__syncthreads();",
            f"for (int item = threadIdx.x; item < N * EIGHTS; item += {THREADS}) {{",
            "  const int n = blockIdx.x * N + item / EIGHTS, e = item % EIGHTS * 8;",
            f"  if (n >= {shape.keys}) break;",
            f"  const uint4 eight = *reinterpret_cast<const uint4*>(&{place});",
            "  const unsigned pairs[4] = {eight.x, eight.y, eight.z, eight.w};",
            "  int bits = 0;",
            "  #pragma unroll",
            "  for (int k = 0; k < 8; ++k)",
            f"    if ((pairs[k / 2] >> k % 2 * 16 & {exponent}) == {exponent}) bits |= 1 << k;",
            "  if (bits) atomicOr(&found[e / 32], bits << e % 32);",
            "}",
            "__syncthreads();",
            "if (threadIdx.x < WORDS)",
            f"  {self.names[work.flags.name]}[(batch * {work.count} + blockIdx.x) * WORDS + threadIdx.x] = found[threadIdx.x];",
        ]


def _plus(text: str, number: int) -> str:
    return f"{text} + {number}" if number > 0 else f"{text} - {-number}" if number < 0 else text
