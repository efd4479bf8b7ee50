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
from ke_gym.codegen.expr import Const, Expr, Index, Load, Op, constant, in_range, of
from ke_gym.codegen.graph import Extern, View, contiguous_stride
from ke_gym.codegen.operands import Shape, position, variables
from ke_gym.codegen.tiles import joined

Element = Callable[[View, tuple[Index, ...]], Expr]


@dataclass(frozen=True)
class Window:
    """How the summed dimension is made up: ``taps`` times ``channels``. ``pairs``: the call, if it fits words."""

    channels: int
    taps: int
    pairs: Convolution | None = None


@dataclass(frozen=True)
class Laid:
    """A convolution's input, copied with its channels innermost: a matrix of ``pixels`` by ``channels`` per image.

    ``source`` is its element, by the variables of ``shape``: image, pixel (``n``) and channel (``k``). ``copy`` names a
    tensor that another kernel has stored so; "" if the copy is still to be made.
    """

    call: Convolution
    shape: Shape
    source: Expr
    copy: str = ""

    def read(self, copy: str, n: Index, k: Index) -> Expr:
        """What position ``n`` of all images sees at ``k``, of the copy of that name."""
        pixels, channels = self.shape.n, self.shape.k

        def at(view: View, index: tuple[Index, ...]) -> Expr:
            image, channel, *place = index
            pixel = position(tuple(place), contiguous_stride(view.shape[2:]))
            return Load(copy, (joined((image * pixels + pixel) * channels + channel),), self.shape.dtype)

        return self.call.input(at, n // self.call.positions, n, k)


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
        """What position ``n`` sees at ``k``, channels innermost: zero outside the input."""
        channels = self.w.shape[1]
        return self.seen(element, batch, n, k % channels, k // channels)

    def seen(self, element: Element, batch: Index, n: Index, channel: Index, tap: Index) -> Expr:
        """What position ``n`` sees of a channel at a tap: zero outside the input."""
        index, tests = [batch, channel], []
        for d, (size, step) in enumerate(zip(self.x.shape[2:], self._taps(tap))):
            at = (n // math.prod(self.out[3 + d :])) % self.out[2 + d]
            index.append(at * self.stride[d] + step * self.dilation[d] - self.padding[d])
            tests.append(in_range(index[-1], 0, size))
        value = element(self.x, tuple(index))
        for test in tests:
            if not (isinstance(test, Const) and test.value):
                value = Op("where", (test, value, Const(0.0, value.dtype)), value.dtype)
        return value

    def laid(self, element: Element, dtype: str) -> Laid:
        """The input with its channels innermost."""
        sizes = self.x.shape[2:]
        shape = Shape(self.x.shape[0], self.w.shape[0], math.prod(sizes), self.w.shape[1], dtype)
        image, _, pixel, channel = (of(v) if v.size != 1 else constant(0) for v in variables(shape))
        place = [(pixel // math.prod(sizes[d + 1 :])) % size for d, size in enumerate(sizes)]
        return Laid(self, shape, element(self.x, (image, channel, *place)))

    def weight(self, element: Element, m: Index, k: Index) -> Expr:
        """The weight of output channel ``m`` at ``k``."""
        channels = self.w.shape[1]
        return element(self.w, (m, k % channels, *self._taps(k // channels)))

    @property
    def even(self) -> bool:
        """Whether words of two elements cover the input and the output, and steps between positions are single."""
        words = (self.x.shape[-1], self.out[-1], self.x.offset, *self.x.stride[:-1])
        return self.x.stride[-1] == 1 and self.stride[-1] == 1 and not any(size % 2 for size in words)

    def word(self, words: str, batch: Index, j: Index, c: Index, tap: int, phase: int) -> tuple[Expr, bool]:
        """The word of the input in which position ``2 * j + phase`` finds channel ``c`` at ``tap``; if it is in the
        word's upper half. ``words`` names the input's memory as words."""
        sizes = self.w.shape[2:]
        place = batch * (self.x.stride[0] // 2) + c * (self.x.stride[1] // 2) + self.x.offset // 2
        tests, high = [], False
        out = (*self.out[2:-1], self.out[-1] // 2)
        for d, size in enumerate(self.x.shape[2:]):
            moved = tap // math.prod(sizes[d + 1 :]) % sizes[d] * self.dilation[d] - self.padding[d]
            at = (j // math.prod(out[d + 1 :])) % out[d]
            if d == len(sizes) - 1:
                step, size = 1, size // 2
                at, high = at + (phase + moved) // 2, (phase + moved) % 2 == 1
            else:
                step, at = self.x.stride[2 + d] // 2, at * self.stride[d] + moved
            place = place + at * step
            tests.append(in_range(at, 0, size))
        value: Expr = Load(words, (place,), "i32")
        for test in tests:
            if not (isinstance(test, Const) and test.value):
                value = Op("where", (test, value, Const(0, "i32")), "i32")
        return value, high

    def _taps(self, tap: Index) -> list[Index]:
        """A tap's place in each spatial dimension."""
        sizes = self.w.shape[2:]
        return [(tap // math.prod(sizes[d + 1 :])) % size for d, size in enumerate(sizes)]
