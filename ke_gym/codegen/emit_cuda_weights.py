"""Attention -> CUDA C++: how scores, in a thread's registers, become weights (online softmax in powers of two)."""

from __future__ import annotations

import math
from dataclasses import replace

from ke_gym.codegen.attentions import Attention
from ke_gym.codegen.cuda_text import TYPES, Text
from ke_gym.codegen.emit_cuda_products import indented
from ke_gym.codegen.expr import Const, Expr, Load, Op, walk
from ke_gym.codegen.flash import variables
from ke_gym.codegen.tiles import depends
from ke_gym.codegen.triton_text import bare_text

LOG2E = math.log2(math.e)  # powers of two are what the hardware has


class Weights:
    """Prints the function that makes weights of the scores of one ``work``."""

    def __init__(self, work: Attention, suffix: str, used: set[str]) -> None:
        if work.visible is not None:
            work = replace(work, reads=(*work.reads, work.flags))
        self.work, self.used = work, used
        buffers = (*work.reads, *work.writes)
        self.kinds = {b.name: b.dtype for b in buffers}
        self.names = {b.name: f"{b.name}_ptr" for b in buffers}
        self.sizes = {b.name: b.extent for b in buffers}
        self.int = "long long" if max(self.sizes.values()) >= 1 << 31 else "int"
        self.causal = work.visible is not None
        self.masked = self.causal or work.ragged
        self.value, self.factor = scaled(work.open)
        self.function = f"weigh_{work.name}{suffix}"
        used.add("inf")

    @property
    def _read(self) -> list[str]:
        """The tensors that masks and biases of the scores are in."""
        found = {n.buffer for n in walk(self.value) if isinstance(n, Load) and n.index}
        return [b.name for b in self.work.reads if b.name in found]

    @property
    def _batched(self) -> bool:
        """Whether scores are changed in another way in each product of the batch."""
        return depends(self.value, variables(self.work.shape)["batch"])

    def call(self, block: str) -> str:
        """The statement that makes weights of the scores of a block of keys."""
        arguments = ["scores", "top", "total", "rescale", "row", f"({block}) * N"]
        arguments += [f"{block} >= whole"] if self.masked else []
        arguments += ["batch"] if self._batched else []
        return f"{self.function}({', '.join([*arguments, *(self.names[name] for name in self._read)])});"

    def _text(self) -> Text:
        return Text(self.used, self.sizes, self.names)

    def weigh(self) -> str:
        """The function that makes weights of scores."""
        work, blocks = self.work, self.work.blocks
        mask = ", bool masked" if self.masked else ""
        given = [f"{self.int} batch"] if self._batched else []
        given += [f"const {TYPES[self.kinds[name]]}* __restrict__ {self.names[name]}" for name in self._read]
        more = "".join(f", {parameter}" for parameter in given)
        lines = [
            "// Weights in place of the scores of two rows, and by how much what was summed up before is too large.",
            f"__device__ __forceinline__ void {self.function}(",
            f"    float (&scores)[{blocks.n // 2}], float (&top)[2], float (&total)[2], float (&rescale)[2], int row,",
            f"    int start{mask}{more}) {{",
            f"  constexpr int N = {blocks.n};",
            f"  constexpr float SCALE = {self.factor!r}f;  // times what makes it a power of two",
        ]
        if not (isinstance(self.value, Load) and self.value is work.score):
            text = self._text()
            text.names[work.score] = "score"
            place = [*self._places(clipped=True), "const float score = scores[4 * j + e];"]
            place += [*text.bind([self.value]), f"scores[4 * j + e] = {bare_text(text.expr(self.value))};"]
            lines += indented(self._each(place))
        tests = [f"n - m >= {work.visible}"] if self.causal else []
        tests += [f"n >= {work.shape.keys}"] if work.ragged else []
        if tests:
            place = [*self._places(clipped=False), f"if ({' || '.join(tests)}) scores[4 * j + e] = -inf();"]
            lines += ["  if (masked) {", *indented(self._each(place), 2), "  }"]
        lines += [
            "  #pragma unroll",
            "  for (int r = 0; r < 2; ++r) {",
            "    float even = scores[2 * r], odd = scores[2 * r + 1];",
            "    #pragma unroll",
            "    for (int j = 1; j < N / 8; ++j) {",
            "      even = highest(even, scores[4 * j + 2 * r]);",
            "      odd = highest(odd, scores[4 * j + 2 * r + 1]);",
            "    }",
            "    float high = highest(even, odd);",
            "    high = highest(high, __shfl_xor_sync(0xffffffff, high, 1));",
            "    high = highest(high, __shfl_xor_sync(0xffffffff, high, 2));",
            "    const float before = top[r];",
            "    top[r] = highest(before, high * SCALE);",
            "    const float shift = top[r] == -inf() ? 0.0f : top[r];",
            "    rescale[r] = power_of_two(before - shift);",
            "    even = odd = 0.0f;",
            "    #pragma unroll",
            "    for (int j = 0; j < N / 8; ++j) {",
            "      even += scores[4 * j + 2 * r] = power_of_two(fmaf(scores[4 * j + 2 * r], SCALE, -shift));",
            "      odd += scores[4 * j + 2 * r + 1] = power_of_two(fmaf(scores[4 * j + 2 * r + 1], SCALE, -shift));",
            "    }",
            "    total[r] = total[r] * rescale[r] + (even + odd);",
            "  }",
            "}",
        ]
        return "\n".join(lines)

    def _each(self, inner: list[str]) -> list[str]:
        """``inner`` for each of a thread's scores."""
        return [
            "#pragma unroll",
            "for (int j = 0; j < N / 8; ++j) {",
            "  #pragma unroll",
            "  for (int e = 0; e < 4; ++e) {",
            *indented(inner, 2),
            "  }",
            "}",
        ]

    def _places(self, clipped: bool) -> list[str]:
        """Query and key of a score; ``clipped`` to those that there are."""
        work, shape = self.work, self.work.shape
        m, n = "row + e / 2 * 8", "start + j * 8 + threadIdx.x % 4 * 2 + e % 2"
        m = f"min({m}, {shape.queries - 1})" if clipped and shape.queries % work.blocks.m else m
        n = f"min(int({n}), {shape.keys - 1})" if clipped and work.ragged else n
        return [f"const int m = {m}, n = {n};"]


def scaled(scores: Expr) -> tuple[Expr, float]:
    """An expression that the scores are a positive multiple of, and how much of it, in powers of two."""
    if isinstance(scores, Op) and scores.name == "mul":
        for value, factor in (scores.args, scores.args[::-1]):
            if isinstance(factor, Const) and 0 < factor.value < math.inf:
                return value, float(factor.value) * LOG2E
    return scores, LOG2E
