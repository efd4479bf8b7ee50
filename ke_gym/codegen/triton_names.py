"""What kernels in Triton call their tensors."""

from __future__ import annotations

import re

from ke_gym.codegen.bags import Bag
from ke_gym.codegen.flash import Flash
from ke_gym.codegen.products import Product
from ke_gym.codegen.tiles import Tiles

LOCALS = {
    Tiles: {
        "row", "col", "start", "back", "top", "shift", "program", "number", "part", "first", "total", "steps", "before",
        "after", "value",
    },
    Product: {
        "tile", "number", "batch", "group", "height", "tile_m", "tile_n", "m", "n", "k", "a", "b", "acc", "start",
        "left", "right", "left_tiles", "right_tiles", "part", "first", "tap", "c", "j", "words", "even", "odd",
        "large", "rest", "thin", "thin_sum", "thin_left", "thin_left_high", "thin_left_low", "thin_left_finite",
        "thin_right", "thin_right_high", "thin_right_low", "thin_right_finite",
    },
    Bag: {"bag", "first", "last", "col", "total", "count", "start", "at", "ok", "id", "value", "result", "COLUMNS"},
    Flash: {
        "tile", "batch", "m", "n", "d", "e", "d_down", "n_down", "query", "keys", "values", "score", "top", "total",
        "acc", "start", "whole", "end", "x", "high", "shift", "weights", "rescale", "block", "blocks", "gone",
    },
}  # fmt: skip
_LOCAL = re.compile(
    r"v\d+|col\d+|\w+_(row|acc|ok)|ROWS|BLOCK|[MNK]|tl|triton|libdevice|min|max_nan|min_nan|search"
)


def pointers(work: Tiles | Product | Flash | Bag) -> dict[str, str]:
    """What the kernel calls its tensors: their names, unless it has something else of that name."""
    found: dict[str, str] = {}
    for buffer in (*work.reads, *work.writes):
        taken = buffer.name in LOCALS[type(work)] or _LOCAL.fullmatch(buffer.name)
        found[buffer.name] = f"{buffer.name}_ptr" if taken else buffer.name
    return found


def parts_of(name: str) -> str:
    """Where programs leave what each has reduced of a tensor."""
    return f"{name}_parts"
