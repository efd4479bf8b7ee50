"""What kernels on tensor cores in CUDA C++ have in common: names, and what becomes of each sum of a product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from ke_gym.codegen.cuda_text import TYPES, Text, cast
from ke_gym.codegen.expr import Interned, Load, walk
from ke_gym.codegen.graph import contiguous_stride
from ke_gym.codegen.tensor_cores import Kernel
from ke_gym.codegen.triton_text import bare_text

WorkT = TypeVar("WorkT", bound=Kernel)


@dataclass(frozen=True)
class Along:
    """Where along one dimension of the result a sum lies: ``at`` in the kernel's words, ``name`` in the stores' places.

    ``ragged``: it may lie beyond ``size``, and is not stored then.
    """

    name: str
    at: str
    size: int
    ragged: bool

    def line(self, kind: str) -> str:
        """Its declaration as a ``kind`` of integer, kept within ``size``."""
        return f"const {kind} {self.name} = {f'min({self.at}, {self.size - 1})' if self.ragged else self.at};"


@dataclass(frozen=True)
class Travelling:
    """A tensor that travels as tiles: the kernel's parameter, the ``tensor`` in the module's words, a tile's size.

    ``swizzle``: over how many bytes. ``shape`` and ``stride``: as what the tensor is described, if not as itself.
    """

    name: str
    tensor: str
    box: tuple[int, ...]
    swizzle: int = 0
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """The argument."""
        more = f", swizzle={self.swizzle}" if self.swizzle else ""
        more += ", writes=True" if self.name == "output_tiles" else ""
        more += f", shape={self.shape}" if self.shape else ""
        plain = self.stride in ((), contiguous_stride(self.shape))
        return f"lang.tensor_map({self.tensor}, {self.box}{more}{'' if plain else f', stride={self.stride}'})"


class Printer(Generic[WorkT]):
    """Prints the kernel of one ``work``."""

    def __init__(self, work: WorkT, used: set[str]) -> None:
        self.work, self.used = work, used
        self.names = {b.name: f"{b.name}_ptr" for b in (*work.reads, *work.writes)}
        self.sizes = {b.name: b.extent for b in (*work.reads, *work.writes)}
        self.int = "long long" if max(self.sizes.values()) >= 1 << 31 else "int"
        self.kind = TYPES[work.shape.dtype]

    def text(self) -> Text:
        """Expressions in the kernel's words."""
        return Text(self.used, self.sizes, self.names)

    def element(
        self, total: str, along: tuple[Along, ...], kept: bool, loaded: Mapping[Interned, str] | None = None
    ) -> list[str]:
        """What becomes of the sum ``total``: the stores, or, if it is ``kept``, the first store's value in its place.

        ``loaded``: what of memory has a name already.
        """
        lines = [*(dimension.line(self.int) for dimension in along), f"const float sum = {total};"]
        text, stores = self.text(), self.work.stores
        for load in (x for s in stores for x in walk(s.expr) if isinstance(x, Load) and not x.index):
            text.names[load] = "sum"
        text.names.update(loaded or {})
        lines += text.bind([store.expr for store in stores])
        if kept:
            return [*lines, f"{total} = {bare_text(text.expr(stores[0].expr))};"]
        masks = [f"{dimension.at} < {dimension.size}" for dimension in along if dimension.ragged]
        guard = f"if ({' && '.join(masks)}) " if masks else ""
        for store in stores:
            kind, value = store.buffer.dtype, text.expr(store.expr)
            value = cast(kind, value) if store.expr.dtype != kind else bare_text(value)
            lines.append(f"{guard}{text.element(store.buffer.name, store.place)} = {value};")
        return lines


def indented(lines: list[str], depth: int = 1) -> list[str]:
    """``lines`` further right, two blanks for each ``depth``."""
    return ["  " * depth + line for line in lines]
