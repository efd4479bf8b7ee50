"""What a tile kernel tells the caches in Triton: which reads leave first, which stay, and whether results do.

Loads are printed with a mark that names their tensor; once all of the kernel is printed, what neither another row nor
a later loop reads again leaves first, and the rest stays. On NVIDIA GPUs either is a policy of the L2 too
(``createpolicy.fractional.L2``), so that what is read once does not push out results on their way to memory.
"""

from __future__ import annotations

import re

from ke_gym.codegen.expr import Load, walk
from ke_gym.codegen.tiles import Tiles, column_var, depends

_MARK = re.compile(r"<evict (\w+) (\d+)>")
_STORES = {"kept": "evict_last", "streamed": "evict_first"}


def marked(buffer: str, scope: int) -> str:
    """The argument of a load whose policy is settled later; ``scope`` tells loops from each other."""
    return f', eviction_policy="<evict {buffer} {scope}>"'


def stored(cache: str) -> str:
    """The argument of a store under this value of the knob ``cache``."""
    return f', eviction_policy="{_STORES[cache]}"' if cache in _STORES else ""


def settled(tiles: Tiles, lines: list[str]) -> list[str]:
    """The kernel's lines with a policy in the place of every mark."""
    stays = shared(tiles)
    last = {name: scope for line in lines for name, scope in _MARK.findall(line)}

    def policy(mark: re.Match[str]) -> str:
        name, scope = mark.groups()
        return "evict_last" if name in stays or last[name] != scope else "evict_first"

    return [_MARK.sub(policy, line) for line in lines]


def shared(tiles: Tiles) -> set[str]:
    """The tensors of which an element is read by two rows or more, on average."""
    sizes = {buffer.name: buffer.numel for buffer in tiles.reads}
    found = set()
    for work in tiles.works:
        col = column_var(work.columns)
        for load in walk(work.expr):
            if isinstance(load, Load) and load.index and load.buffer in sizes:
                reads = tiles.rows * (work.columns if depends(load, col) else 1)
                if 2 * sizes[load.buffer] <= reads:
                    found.add(load.buffer)
    return found
