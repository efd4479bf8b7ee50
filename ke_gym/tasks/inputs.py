"""Drawing task inputs: fresh contents at memory speed, and adversarial distributions.

`get_inputs()` of a task file runs unchanged while its random factories (`torch.randn`, `rand`, `randint`,
their `_like` forms, `normal_`, `uniform_`) are served from here. Whatever the file builds out of them with
further torch code (sorted boundaries, offsets, masks, scales) keeps its structure.

The evaluation needs new contents before every timed call, and generating normal variates costs more than many
kernels. So values come from a pool that is generated once per process (16 MiB each for normal and uniform):
every block of 2**18 values is a slice of it at an offset, and with a reflection, that the seed determines.
A candidate that remembers one call's contents knows nothing useful of the next.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

POOL = 1 << 22
BLOCK = 1 << 18
_ONE_BELOW_ONE = 1.0 - 2.0**-24


_secret = 0x6B65


def keep_secret() -> None:
    """From now on draw from a pool that no other process knows.

    A judge calls this first: with the usual pool, a kernel could recognize its inputs and answer from a table.
    """
    global _secret
    _secret = secrets.randbits(63)
    _pool.cache_clear()


@functools.cache
def _pool(kind: str) -> Tensor:
    """`POOL` float32 values, "normal" or "uniform" on [0, 1): the same in every process without a secret."""
    generator = torch.Generator().manual_seed(_secret)
    fill = torch.randn if kind == "normal" else torch.rand
    with torch._C.DisableTorchFunction():
        return fill(POOL, generator=generator)


def _laplace(draw: Drawing, values: Tensor) -> None:
    draw.uniform(values).sub_(0.5)
    sign = values.sign()
    values.abs_().mul_(-2).log1p_().mul_(sign).mul_(-math.sqrt(0.5))


def _sparse(draw: Drawing, values: Tensor) -> None:
    keep = draw.uniform(torch.empty_like(values)) < 0.1
    draw.normal(values).mul_(keep)


def _magnitudes(low: float, high: float) -> Callable[[Drawing, Tensor], None]:
    """Values ± 10**e with e uniform on [low, high)."""

    def fill(draw: Drawing, values: Tensor) -> None:
        exponent = draw.uniform(torch.empty_like(values, dtype=torch.float64)).mul_(high - low).add_(low)
        values.copy_(torch.copysign(10.0**exponent, draw.normal(torch.empty_like(values))))

    return fill


def _special(draw: Drawing, values: Tensor) -> None:
    flat = draw.normal(values).view(-1)
    for index in range(min(9, flat.numel())):
        flat[draw.random.randrange(flat.numel())] = (math.nan, math.inf, -math.inf)[index % 3]


# What `randn` gives under each distribution; scaled and shifted afterwards by whatever the task file does.
def _levels(draw: Drawing, values: Tensor) -> Tensor:
    """A handful of values, none of which half precision holds: its rounding errors can't average out."""
    step, shift = draw.random.uniform(0.5, 0.8), draw.random.uniform(0.1, 0.3)
    return draw.normal(values).mul_(2).round_().clamp_(-3, 3).mul_(step).add_(shift)


_NORMAL_BECOMES: dict[str, Callable[[Drawing, Tensor], Any]] = {
    "task": lambda draw, values: draw.normal(values),
    "uniform": lambda draw, values: draw.uniform(values).sub_(0.5).mul_(math.sqrt(12)),
    "laplace": _laplace,
    "exponential": lambda draw, values: draw.uniform(values).neg_().log1p_().neg_(),
    "lognormal": lambda draw, values: draw.normal(values).exp_(),
    # Ten standard deviations off zero: E[x²] - E[x]² loses two digits, an honest two-pass variance none.
    "offset": lambda draw, values: draw.normal(values).add_(10),
    "sparse": _sparse,
    "ties": lambda draw, values: _levels(draw, values),
    "tiny": _magnitudes(-39, -30),
    "large": _magnitudes(3, 4),
    "zeros": lambda draw, values: draw.normal(values).mul_(0),
    "special": _special,
}


def _plain_uniform(draw: Drawing, values: Tensor) -> Tensor:
    return draw.uniform(values)


# What `rand` gives: always within [0, 1), because files turn it into indices, probabilities and masks.
_UNIFORM_BECOMES: dict[str, Callable[[Drawing, Tensor], Any]] = {
    "sparse": lambda draw, values: draw.uniform(values).sub_(0.9).clamp_(min=0).mul_(9.99),
    "ties": lambda draw, values: draw.uniform(values).mul_(8).floor_().div_(8),
    "tiny": lambda draw, values: draw.uniform(values).mul_(1e-38),
    "zeros": lambda draw, values: values.zero_(),
}

DISTRIBUTIONS: tuple[str, ...] = tuple(_NORMAL_BECOMES)
"""What `Task.inputs` takes: "task" is the file's own; "special" sprinkles NaN and infinities."""


class Drawing(TorchFunctionMode):
    """While active, torch's random factories are served from the pool, a function of (seed, distribution)."""

    def __init__(self, seed: int, distribution: str = "task") -> None:
        super().__init__()
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"unknown distribution {distribution!r}; one of {', '.join(DISTRIBUTIONS)}")
        self.distribution = distribution
        self.random = random.Random(f"{seed}/{distribution}")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        # A generator the file made and seeded itself would freeze the contents: it is ignored.
        options = {name: value for name, value in (kwargs or {}).items() if name != "generator"}
        with torch.no_grad():
            return handler(self, *args, **options)

    def normal(self, values: Tensor) -> Tensor:
        """Fill a contiguous CPU tensor with standard normal values."""
        return self._blocks(values, _pool("normal"), 0.0)

    def uniform(self, values: Tensor) -> Tensor:
        """Fill a contiguous CPU tensor with uniform values on [0, 1), exact in 24 bits."""
        return self._blocks(values, _pool("uniform"), _ONE_BELOW_ONE)

    def _blocks(self, values: Tensor, pool: Tensor, reflect: float) -> Tensor:
        flat = values.view(-1)
        for start in range(0, flat.numel(), BLOCK):
            block = flat[start : start + BLOCK]
            offset = self.random.randrange(POOL - block.numel() + 1)
            piece = pool[offset : offset + block.numel()]
            if self.random.getrandbits(1):
                block.copy_(piece)
            elif block.dtype == piece.dtype:
                torch.sub(reflect, piece, out=block) if reflect else torch.neg(piece, out=block)
            else:
                block.copy_(reflect - piece)
        return values

    def fill(self, target: Tensor, how: Callable[[Drawing, Tensor], Any]) -> Tensor:
        """Fill any real floating tensor, whatever its dtype, layout and device."""
        if target.device.type == "meta":
            return target
        if target.dtype == torch.float32 and target.device.type == "cpu" and target.is_contiguous():
            how(self, target)
        else:
            scratch = torch.empty(target.shape, dtype=torch.float32, device="cpu")
            how(self, scratch)
            target.copy_(scratch)
        return target

    def like_randn(self, target: Tensor) -> Tensor:
        """Fill with what `torch.randn` stands for under this distribution."""
        if target.is_complex():
            self.like_randn(torch.view_as_real(target)).mul_(math.sqrt(0.5))
            return target
        return self.fill(target, _NORMAL_BECOMES[self.distribution])

    def like_rand(self, target: Tensor) -> Tensor:
        """Fill with what `torch.rand` stands for: always within [0, 1)."""
        if target.is_complex():
            self.like_rand(torch.view_as_real(target))
            return target
        how = _UNIFORM_BECOMES.get(self.distribution, _plain_uniform)
        bits = {torch.bfloat16: 8, torch.float16: 11}.get(target.dtype)
        if bits is None:
            return self.fill(target, how)

        def rounded_down(draw: Drawing, values: Tensor) -> None:  # rounding to nearest could reach 1.0
            how(draw, values)
            values.mul_(2.0**bits).floor_().div_(2.0**bits)

        return self.fill(target, rounded_down)

    def like_randint(self, target: Tensor, low: int, high: int) -> Tensor:
        """Fill with integers uniform on [low, high)."""
        if target.device.type == "meta":
            return target
        if 0 < high - low <= 1 << 20:  # the pool's 24 bits are plenty
            scratch = self.uniform(torch.empty(target.shape, dtype=torch.float32, device="cpu"))
            return target.copy_(scratch.mul_(high - low).floor_()).add_(low)
        generator = torch.Generator().manual_seed(self.random.getrandbits(63))
        with torch._C.DisableTorchFunction():
            drawn = torch.randint(low, high, target.shape, generator=generator, device="cpu")
        return target.copy_(drawn)


class DeviceDrawing(Drawing):
    """The same on another device, where generating values costs no more than moving them.

    Values come from the device's counter-based generator: a function of the seed alone, with no pool in device
    memory that a kernel could read or change. Fake tensors keep what they have: nothing.
    """

    def __init__(self, seed: int, distribution: str, device: str) -> None:
        super().__init__(seed, distribution)
        self._place = torch.device(device)
        self._generator = torch.Generator(device).manual_seed(self.random.getrandbits(63))

    def normal(self, values: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return values.normal_(generator=self._generator)

    def uniform(self, values: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            values.uniform_(generator=self._generator)
            return values.mul_(2.0**24).floor_().div_(2.0**24).clamp_(max=_ONE_BELOW_ONE)

    def fill(self, target: Tensor, how: Callable[[Drawing, Tensor], Any]) -> Tensor:
        if target.device.type == "meta":
            return target
        if (
            target.dtype == torch.float32
            and target.device.type == self._place.type
            and target.is_contiguous()
        ):
            how(self, target)
        else:
            scratch = torch.empty(target.shape, dtype=torch.float32, device=self._place)
            how(self, scratch)
            target.copy_(scratch)
        return target

    def like_randint(self, target: Tensor, low: int, high: int) -> Tensor:
        if target.device.type == "meta":
            return target
        with torch._C.DisableTorchFunction():
            if target.device.type == self._place.type:
                return target.random_(low, high, generator=self._generator)
            drawn = torch.empty(target.shape, dtype=torch.int64, device=self._place)
            return target.copy_(drawn.random_(low, high, generator=self._generator))


class Undrawn(Drawing):
    """Leaves every tensor as it was allocated: for fake tensors, of which only the shape is asked."""

    def fill(self, target: Tensor, how: Callable[[Drawing, Tensor], Any]) -> Tensor:
        return target

    def like_randint(self, target: Tensor, low: int, high: int) -> Tensor:
        return target


def _randint(draw: Drawing, *args: Any, **options: Any) -> Tensor:
    low, high, size = _bounds(args, options)
    options.setdefault("dtype", torch.int64)
    return draw.like_randint(torch.empty(size, **options), low, high)


def _randint_like(draw: Drawing, source: Tensor, *args: Any, **options: Any) -> Tensor:
    low, high, _ = _bounds((*args, source.shape), options)
    return draw.like_randint(torch.empty_like(source, **options), low, high)


def _bounds(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[int, int, Any]:
    """(low, high, size) of randint's `([low], high, size)`, positional or named."""
    sizes = [value for value in args if isinstance(value, tuple | list)]
    size = options.pop("size") if "size" in options else sizes[0]
    numbers = [value for value in args if not isinstance(value, tuple | list)]
    high = options.pop("high") if "high" in options else numbers.pop()
    low = options.pop("low") if "low" in options else (numbers.pop() if numbers else 0)
    return int(low), int(high), size


def _normal_(draw: Drawing, target: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return draw.like_randn(target).mul_(std).add_(mean)


def _uniform_(draw: Drawing, target: Tensor, low: float = 0.0, high: float = 1.0, **named: float) -> Tensor:
    low, high = named.get("from", low), named.get("to", high)
    return draw.like_rand(target).mul_(high - low).add_(low)


# torch.empty understands every way of giving size, dtype, device, layout, out and requires_grad.
_HANDLERS: dict[Any, Callable[..., Tensor]] = {
    torch.randn: lambda draw, *size, **options: draw.like_randn(torch.empty(*size, **options)),
    torch.rand: lambda draw, *size, **options: draw.like_rand(torch.empty(*size, **options)),
    torch.randn_like: lambda draw, source, **options: draw.like_randn(torch.empty_like(source, **options)),
    torch.rand_like: lambda draw, source, **options: draw.like_rand(torch.empty_like(source, **options)),
    torch.randint: _randint,
    torch.randint_like: _randint_like,
    Tensor.normal_: _normal_,
    Tensor.uniform_: _uniform_,
}


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The default generators of torch, numpy and `random` start from `seed`, and are put back afterwards."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


@contextlib.contextmanager
def drawing(seed: int, distribution: str = "task", device: str = "cpu") -> Iterator[Drawing]:
    """Everything random inside is a function of (seed, distribution); pooled where torch allows it.

    On another ``device`` tensors are made there by default. ``"fake"`` is for use under a ``FakeTensorMode``.
    """
    if device == "cpu":
        with seeded(seed), Drawing(seed, distribution) as draw:
            yield draw
    elif device == "fake":
        with Undrawn(seed, distribution) as draw:
            yield draw
    else:
        with seeded(seed), torch.device(device), DeviceDrawing(seed, distribution, device) as draw:
            yield draw


def touch(tensors: Iterable[Tensor], seed: int) -> None:
    """Change one element of every floating tensor, and nothing else.

    A kernel that looks at a few values to learn whether it has seen the rest before does not notice. The
    element takes its neighbour's value, so that what is sorted, positive or a probability stays so.
    """
    chance = random.Random(seed)
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dim() and tensor.shape[-1] > 1 and tensor.numel():
            *outer, last = (chance.randrange(size) for size in tensor.shape)
            tensor[(*outer, last)] = tensor[(*outer, last - 1 if last else 1)]


def separate(values: Sequence[Any]) -> list[Any]:
    """The values, no two tensors of which share memory: that two are one in a call is so in no other."""
    seen: set[int] = set()
    apart = []
    for value in values:
        if isinstance(value, Tensor):
            memory = value.untyped_storage()._cdata
            value = value.clone() if memory in seen else value
            seen.add(memory)
        apart.append(value)
    return apart
