"""A convolution as a batch of products: output channels by positions, summed over taps and channels.

Implicit GEMM (Chetlur et al., "cuDNN", 2014). Channels are the rows, so that results are written, and inputs read,
along the positions, which are contiguous in memory. What is summed over runs over the channels of one tap after the
other: a block of it is one window of the input, moved by one tap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import Const, Expr, Index, Op, in_range
from ke_gym.codegen.graph import Extern, View

Element = Callable[[View, tuple[Index, ...]], Expr]


@dataclass(frozen=True)
class Window:
    """How the summed dimension is made up: ``taps`` times ``channels``."""

    channels: int
    taps: int


@dataclass(frozen=True)
class Convolution:
    """A call of ATen's convolution."""

    x: View
    w: View
    out: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, step: Extern) -> Convolution:
        """Raises ``Illegal`` for transposed and grouped convolutions."""
        x, w, _, stride, padding, dilation, transposed, _, groups = step.args
        if transposed or groups != 1:
            raise Illegal("this kind of convolution")
        rank = len(x.shape) - 2
        spread = [tuple(v) * rank if len(v) == 1 else tuple(v) for v in (stride, padding, dilation)]
        return cls(x, w, step.outputs[0].shape, *spread)

    @property
    def positions(self) -> int:
        return math.prod(self.out[2:])

    @property
    def window(self) -> Window:
        return Window(self.w.shape[1], math.prod(self.w.shape[2:]))

    def input(self, element: Element, batch: Index, n: Index, k: Index) -> Expr:
        """What position ``n`` sees at ``k``: zero outside the input."""
        channels = self.w.shape[1]
        index, tests = [batch, k % channels], []
        for d, (size, tap) in enumerate(zip(self.x.shape[2:], self._taps(k // channels))):
            at = (n // math.prod(self.out[3 + d :])) % self.out[2 + d]
            index.append(at * self.stride[d] + tap * self.dilation[d] - self.padding[d])
            tests.append(in_range(index[-1], 0, size))
        value = element(self.x, tuple(index))
        for test in tests:
            if not (isinstance(test, Const) and test.value):
                value = Op("where", (test, value, Const(0.0, value.dtype)), value.dtype)
        return value

    def weight(self, element: Element, m: Index, k: Index) -> Expr:
        """The weight of output channel ``m`` at ``k``."""
        channels = self.w.shape[1]
        return element(self.w, (m, k % channels, *self._taps(k // channels)))

    def _taps(self, tap: Index) -> list[Index]:
        """A tap's place in each spatial dimension."""
        sizes = self.w.shape[2:]
        return [(tap // math.prod(sizes[d + 1 :])) % size for d, size in enumerate(sizes)]
