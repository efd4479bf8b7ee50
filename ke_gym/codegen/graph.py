"""The graph a schedule is applied to: stored tensors, computed nodes, library calls. Language-independent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from ke_gym.codegen.expr import Expr, Index, Load, Var

Precision = Literal["strict", "tf32", "bf16"]


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


@dataclass(frozen=True)
class Buffer:
    """A stored tensor; ``stride`` in elements, ``dtype`` one of ``expr.DTYPES``, or "c64" or "c128".

    What is complex is only handed from one library call to the next.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def extent(self) -> int:
        """Elements from the first to just past the last one."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride)) if self.numel else 0


@dataclass(frozen=True)
class Node:
    """``name[vars] = reduction over rvars of expr``; without ``rvars`` simply ``name[vars] = expr``.

    With ``scan``, ``expr`` is the summand and the node the inclusive scan (``reduction``) along ``vars[scan]``.
    ``origin`` is the operation in the reference this was lowered from, for comments.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    vars: tuple[Var, ...]
    expr: Expr
    origin: str
    reduction: str | None = None
    rvars: tuple[Var, ...] = ()
    scan: int | None = None

    @property
    def pointwise(self) -> bool:
        return self.reduction is None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(buffers_read(self.expr)))


@dataclass(frozen=True)
class View:
    """A strided view of a stored tensor, as an argument of a library call."""

    buffer: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Extern:
    """A call of an ATen overload (``"aten.mm.default"``). Arguments are ``View``, scalars, tuples, or None."""

    name: str
    target: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    outputs: tuple[Buffer, ...]

    @cached_property
    def reads(self) -> tuple[str, ...]:
        found: dict[str, None] = {}

        def visit(arg: Any) -> None:
            if isinstance(arg, View):
                found[arg.buffer] = None
            elif isinstance(arg, tuple):
                for item in arg:
                    visit(item)

        visit(self.args)
        visit(tuple(v for _, v in self.kwargs))
        return tuple(found)


HOPPER = "sm_90a"  # that has warpgroup products


@dataclass
class Graph:
    """One shape set of a reference: named inputs, steps in topological order, outputs by name.

    ``weights`` are the inputs that stay the same from call to call. ``precision`` is the task's policy for products:
    "strict", "tf32" or "bf16". ``device`` and ``language``: what kernels are for and, where nothing else is asked for,
    printed in; ``arch``: the GPU's architecture.
    """

    inputs: dict[str, Buffer]
    arguments: tuple[str, ...]
    """What ``forward`` takes; ``renamed`` are those whose tensor has another name inside, since printers use theirs."""
    constants: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Node | Extern] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(
        default_factory=dict
    )  # of outputs: a buffer may be returned reshaped
    renamed: dict[str, str] = field(default_factory=dict)
    weights: frozenset[str] = frozenset()
    precision: Precision = "strict"
    device: Literal["cpu", "cuda"] = "cpu"
    language: Literal["cpp", "triton", "cuda"] = "cpp"
    arch: str = HOPPER

    def __post_init__(self) -> None:
        self.memo: dict[Any, Any] = {}

    @property
    def buffers(self) -> dict[str, Buffer]:
        found = self.memo.get("buffers")
        if found is None:
            found = dict(self.inputs)
            for step in self.steps.values():
                if isinstance(step, Node):
                    found[step.name] = Buffer(
                        step.name, step.shape, contiguous_stride(step.shape), step.dtype
                    )
                else:
                    found.update((b.name, b) for b in step.outputs)
            self.memo["buffers"] = found
        return found

    @property
    def producer(self) -> dict[str, str]:
        """Buffer name -> name of the step that computes it (inputs absent)."""
        found = self.memo.get("producer")
        if found is None:
            found = {}
            for name, step in self.steps.items():
                for buffer in [name] if isinstance(step, Node) else [b.name for b in step.outputs]:
                    found[buffer] = name
            self.memo["producer"] = found
        return found

    @property
    def users(self) -> dict[str, tuple[str, ...]]:
        """Step name -> names of the steps that read what it computes."""
        found = self.memo.get("users")
        if found is None:
            lists: dict[str, dict[str, None]] = {name: {} for name in self.steps}
            for name, step in self.steps.items():
                for read in step.reads:
                    if read in self.producer:
                        lists[self.producer[read]][name] = None
            found = {name: tuple(users) for name, users in lists.items()}
            self.memo["users"] = found
        return found

    def prune(self) -> None:
        """Drop steps that no output needs."""
        needed = set(self.outputs)
        for name, step in reversed(list(self.steps.items())):
            made = {name} if isinstance(step, Node) else {b.name for b in step.outputs}
            if made & needed:
                needed.update(step.reads)
            else:
                del self.steps[name]
        self.memo.clear()


def buffers_read(*roots: Expr | Index) -> list[str]:
    from ke_gym.codegen.expr import Search, walk

    return [n.buffer for n in walk(*roots) if isinstance(n, (Load, Search))]


@dataclass(frozen=True)
class Tensor:
    """A tensor during lowering: its element at an index, as an expression. Views only change ``at``."""

    shape: tuple[int, ...]
    dtype: str
    at: Callable[[tuple[Index, ...]], Expr]
