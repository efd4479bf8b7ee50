"""What kernels on tensor cores in CUDA C++ have in common, whichever product they compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ke_gym.codegen import products
from ke_gym.codegen.expr import BYTES, Expr
from ke_gym.codegen.graph import Buffer, Extern
from ke_gym.codegen.operands import Shape
from ke_gym.codegen.schedule import Group


@dataclass(frozen=True)
class Kernel:
    """A product of this ``shape`` and what becomes of its elements, as one kernel of a ``group`` of nodes.

    ``name``: its last result's; ``bytes``: of all that it reads and writes; ``origins``: the operators it comes from.
    """

    name: str
    shape: Shape
    stores: tuple[products.Store, ...]
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    bytes: int
    group: Group
    origins: tuple[str, ...]


def around(
    builder: products.Builder, steps: Sequence[Extern], shape: Shape, stores: Sequence[products.Store],
    operands: tuple[Expr, Expr], first: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """The fields of the ``Kernel`` of these library products; of what it reads, the buffers named in ``first`` come so."""
    more = [b for b in builder._reads(list(stores), operands) if b.name not in first]
    reads = (*(builder.graph.buffers[name] for name in first), *more)
    writes = tuple(store.buffer for store in stores)
    made = (*(s.target.split(".")[1] for s in steps), *(n.origin for n in builder.nodes.values()))
    return {
        "name": writes[-1].name,
        "shape": shape,
        "stores": tuple(stores),
        "reads": reads,
        "writes": writes,
        "bytes": sum(b.numel * BYTES[b.dtype] for b in (*reads, *writes)),
        "group": builder.group,
        "origins": tuple(dict.fromkeys(made)),
    }
