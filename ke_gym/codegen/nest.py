"""A loop nest: what one kernel computes, in loops. Language-independent: emitters only print it."""

from __future__ import annotations

from dataclasses import dataclass

from ke_gym.codegen.expr import Expr, Index, Var
from ke_gym.codegen.graph import Buffer, Node
from ke_gym.codegen.schedule import Group

ROW_BYTES = 1 << 19  # of thread-local buffers, well inside any thread's stack
COSTLY = frozenset(
    [
        "exp",
        "exp2",
        "expm1",
        "log",
        "log2",
        "log10",
        "log1p",
        "tanh",
        "erf",
        "erfc",
        "gelu",
        "gelu_tanh",
        "silu",
        "sigmoid",
        "sin",
        "cos",
        "tan",
        "pow",
        "sqrt",
        "rsqrt",
        "div",
        "atan2",
        "fmod",
        "remainder",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "asinh",
        "acosh",
        "atanh",
        "lgamma",
        "floordiv",
        "intdiv",
    ]
)  # operations that take many cycles


@dataclass(frozen=True)
class Loop:
    """``var`` over ``[0, var.size)``, cut off at ``limit`` where the last tile is partial."""

    var: Var
    limit: Index | None = None


@dataclass(frozen=True)
class Target:
    """Where a result goes: "scalar" local, "row" buffer local, "private" per-thread buffer, "global" tensor."""

    kind: str
    name: str
    index: Index
    dtype: str


@dataclass(frozen=True)
class Item:
    """One result in a stage's loops. With ``op``: a reduction over the loops in ``reduced``; with ``scan``: a scan.

    The reduction ``one_pass.SUM_EXP`` stands next to the "max" of the same values in a stage of their own.
    """

    node: Node
    expr: Expr
    target: Target
    op: str | None
    reduced: frozenset[Var]
    scan: Var | None = None


@dataclass(frozen=True)
class Stage:
    """One inner loop nest of an outer iteration."""

    loops: tuple[Loop, ...]
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Local:
    """A buffer of ``size`` elements, one per outer iteration ("row") or per thread ("private", with its op)."""

    name: str
    dtype: str
    size: int
    op: str | None = None


@dataclass(frozen=True)
class Nest:
    """What one kernel does."""

    name: str
    outer: tuple[Loop, ...]
    stages: tuple[Stage, ...]
    rows: tuple[Local, ...]
    private: tuple[Local, ...]
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    work: int
    bytes: int
    group: Group
    origins: tuple[str, ...]

    @property
    def parallel(self) -> bool:
        return self.work >= 2 * self.group.grain
