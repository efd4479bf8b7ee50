"""What every kernel in CUDA C++ is printed from: lines, scopes, names, and accesses to memory."""

from __future__ import annotations

import re

from ke_gym.codegen.cuda_layout import inner, layout, together
from ke_gym.codegen.cuda_text import HELPERS, TYPES, Text, cast
from ke_gym.codegen.expr import (
    Expr,
    Index,
    Interned,
    Load,
    bounds,
    walk,
)
from ke_gym.codegen.tiles import (
    Tiles,
    Work,
    depends,
)
from ke_gym.codegen.triton_text import bare_text

INT = (1 << 31) - (1 << 16)  # 32 bits hold an index below this, the overshoot of a last block included
Vectors = dict[str, tuple[str, str, Index]]
"""By node, what is stored as vectors: the tensor, the vector's name, and which of the tensor's vectors it is."""
_TAKEN = re.compile(
    r"v\d+|\w+_(acc|row|kept|vec)\d*|min|max|float|at|row|col|lane|k|j|memory|table|next|of|top|shift|scanned|total|inf|load|store|Vector|\w*f|log2|log10"
    r"|int|long|short|char|bool|double|signed|unsigned|const|new|this|class|struct|union|enum|register|default|switch"
    r"|case|delete|operator|private|public|protected|template|typename|namespace|using|auto|static|extern|inline"
    r"|virtual|friend|throw|catch|goto|volatile|sizeof|void|true|false|and|or|not|xor|exp|exp2|expm1|log|log1p|tanh"
    r"|erf|erfc|sqrt|rsqrt|sin|cos|tan|asin|acos|atan|sinh|cosh|asinh|acosh|atanh|atan2|fmod|hypot|pow|floor|ceil"
    r"|trunc|copysign|lgamma|rint|fabs|not_a_number|Sum|Product|Largest|Smallest"
)


def pointers(tiles: Tiles) -> dict[str, str]:
    """What the kernel calls its tensors: their names, unless C++ or the kernel has something else of that name."""
    names = dict.fromkeys(b.name for b in (*tiles.reads, *tiles.writes))
    return {name: f"{name}_ptr" if _TAKEN.fullmatch(name) or name in HELPERS else name for name in names}


def _farthest(tiles: Tiles, sizes: dict[str, int]) -> int:
    """The greatest index that is computed, also on the way to another one."""
    roots = [r for work in tiles.works for r in (work.expr, work.place) if r is not None]
    reached = (abs(b) for n in walk(*roots) if isinstance(n, Index) for b in bounds(n))
    return max([*sizes.values(), *reached], default=0)


class Lines:
    """The body of one kernel, as far as it is printed; its scopes, and what has which name there."""

    def __init__(self, tiles: Tiles, used: set[str]) -> None:
        self.tiles = tiles
        self.used = used
        self.layout = layout(tiles)
        self.names = pointers(tiles)
        sizes = {b.name: b.extent for b in (*tiles.reads, *tiles.writes)}
        self.text = Text(used, sizes, self.names)
        self.int = "long long" if _farthest(tiles, sizes) >= INT else "int"
        self.first = "blockIdx.x" if self.int == "int" else "(long long)blockIdx.x"
        self.lines: list[str] = []
        self.depth = 0
        self.kept: dict[Expr, str] = {}
        self.filled: set[Expr] = set()
        self.scope: dict[Interned, str] | None = None

    def line(self, text: str) -> None:
        self.lines.append("  " * self.depth + text)

    def open(self, text: str) -> dict[Interned, str]:
        """Begin a scope; what is named inside is forgotten by ``close``."""
        self.line(f"{text} {{".lstrip())
        self.depth += 1
        return dict(self.text.names)

    def close(self, names: dict[Interned, str]) -> None:
        self.depth -= 1
        self.line("}")
        self.text.names = names

    def bind(self, *roots: Expr) -> None:
        for text in self.text.bind(roots):
            self.line(text)

    def _kind(self, work: Work) -> str:
        """What is accumulated in: flags as integers."""
        return "i32" if work.expr.dtype == "bool" else work.expr.dtype

    @staticmethod
    def _is_flag(work: Work) -> bool:
        return work.op in ("any", "all") or (work.op is not None and work.expr.dtype == "bool")

    def _name_row(self, work: Work, value: str) -> str:
        """Name a row's value for later levels."""
        name = f"{work.node.name}_row"
        kind = "bool" if self._is_flag(work) else work.expr.dtype
        self.line(f"const {TYPES[kind]} {name} = {bare_text(value)};")
        for dtype in {work.expr.dtype, work.node.dtype, "f32"}:
            self.text.names[Load(work.node.name, (), dtype)] = name
        return name

    def _store(self, work: Work, place: Index, value: str, stored: Vectors) -> None:
        kind = work.node.dtype
        text = cast(kind, value) if work.expr.dtype != kind else bare_text(value)
        if work.node.name in stored:
            self.line(f"{stored[work.node.name][1]}.at[j] = {text};")
        else:
            self.line(f"{self.text.element(work.buffer, place)} = {text};")

    def _open_vector(self, exprs: list[Expr], places: list[tuple[Work, Index | None]]) -> Vectors:
        """Load the vectors that the expressions read and open the loop over their elements.

        Returns the vectors to store.
        """
        vector = self.layout.vector
        if vector == 1:
            return {}
        self.used.add("vector")
        outside = dict(self.text.names)
        safe, _ = self.text.safe(exprs)
        loaded: dict[Interned, str] = {}
        for node in self.text.pending(exprs):
            if not isinstance(node, Load) or node not in safe or not depends(node, inner(vector)):
                continue
            which = together(node.index[0], vector)
            if which is None:
                continue
            name = f"{self.names[node.buffer]}_vec"
            if f"{name}.at[j]" in loaded.values():
                name = f"{name}{len(loaded)}"
            self.line(
                f"const auto {name} = load<{vector}>({self.names[node.buffer]}, {bare_text(self.text.index(which))});"
            )
            loaded[node] = f"{name}.at[j]"
        stored: Vectors = {}
        for work, place in places:
            which = together(place, vector) if place is not None and work.op is None else None
            if which is not None:
                name = f"{self.names[work.buffer]}_vec"
                if any(buffer == work.buffer for buffer, _, _ in stored.values()):
                    name = f"{name}{len(stored)}"
                self.line(f"Vector<{TYPES[work.node.dtype]}, {vector}> {name};")
                stored[work.node.name] = work.buffer, name, which
        self.line("#pragma unroll")
        self.open(f"for (int j = 0; j < {vector}; ++j)")
        self.scope = outside
        self.text.names.update(loaded)
        return stored

    def _close_vector(self, stored: Vectors) -> None:
        if self.scope is None:
            return
        self.close(self.scope)
        self.scope = None
        for buffer, values, which in stored.values():
            self.line(f"store({self.names[buffer]}, {bare_text(self.text.index(which))}, {values});")
