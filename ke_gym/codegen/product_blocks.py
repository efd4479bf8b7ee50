"""How a product is cut up and launched: the knobs' values, and the first choice, by what was measured on an H200."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ke_gym.codegen.products import Product

FILL = 132  # programs that keep every multiprocessor busy
# A product with a side this short waits for memory: tf32x3 costs it nothing, and TF32's errors (the hardware
# truncates) no longer add up along a chain of such products.
SKINNY = 32
SPLITS = (1, 2, 4, 8, 16, 32)
SHARE = 128  # least of the summed dimension that a program of its own may get
LARGE = 1 << 32  # multiplications from which on it is worth a launch to cut an operand into its TF32 parts
DEEP = 1024  # and what it is worth having one for
UNROLLED = 9  # most taps that are written out
# What Triton 3.6 and 3.7 specialize warps for on sm_90: tiles of 64 rows and up to 128 columns that bulk copies bring whole,
# four warps that multiply, a loop over tiles. Beyond that they refuse to compile, or do as they are not told.
SPECIAL = {"m": 64, "n": 128, "warps": 4, "split": 1, "persistent": FILL, "loads": "descriptors"}


@dataclass(frozen=True)
class Blocks:
    """Tiles of ``m`` x ``n``, ``k`` at a time; ``group`` rows of tiles walked together, so that they share operands.

    ``precision`` is what fp32 operands are multiplied in: "ieee", "tf32x3" (three products that add up to nearly
    fp32), "tf32", or "bf16". ``split``: programs that share a tile, each with its part of ``k``; a second kernel adds
    their sums up, always in the same order. ``persistent``: programs that walk over all tiles (0: a program a tile).
    ``loads``: "pointers", or "descriptors" where bulk copies fetch tiles of an operand (TMA). ``packed``: operands in
    which ``k`` is not contiguous are copied first, so that it is: TF32's matrix instructions read nothing else.
    ``unroll``: a convolution's taps are written out one after the other, or with ``words`` its blocks of channels.
    ``words``: its input is read two at a time. ``ready``: an operand, a weight if there is one, is first copied into
    what is multiplied: bf16, or both TF32 parts of it ("tf32x3"). ``channels_last``: a convolution's input is copied
    first, its channels innermost. ``turned``: the transposed product, its operands exchanged: the left one may come
    from registers, the right one from shared memory only. ``sums``: of how many blocks of ``k`` tensor cores add up the
    large TF32 parts before fp32 does (they cut off what they add up: the fewer, the more exact). ``specialized``: warps
    of their own fetch tiles while others multiply (Triton's warp specialization).
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    precision: str = "ieee"
    split: int = 1
    persistent: int = 0
    loads: str = "pointers"
    packed: bool = False
    unroll: bool = False
    words: bool = False
    ready: bool = False
    channels_last: bool = False
    turned: bool = False
    sums: int = 1
    specialized: bool = False


def precisions(policy: str) -> list[str]:
    """What products of fp32 operands may be computed in, by the task's precision policy."""
    allowed = {"strict": ["ieee", "tf32x3"], "tf32": ["tf32", "tf32x3", "ieee"]}
    return allowed.get(policy, ["bf16", "tf32", "tf32x3", "ieee"])


SMALLEST = Blocks(16, 32, 128, 4, 4)
WORDS = Blocks(128, 128, 32, 4, 1)
LAID = Blocks(128, 128, 64, 4, 3)
HALF = (
    Blocks(128, 256, 64, 8, 3), Blocks(128, 128, 64, 8, 3), Blocks(128, 64, 64, 4, 3), Blocks(64, 64, 64, 4, 4),
    Blocks(32, 64, 64, 4, 4), SMALLEST,
)  # fmt: skip
TRUNCATED = (Blocks(128, 256, 32, 8, 3), Blocks(128, 128, 32, 8, 3))
SINGLE = (
    Blocks(128, 64, 32, 4, 3), Blocks(64, 64, 32, 4, 4), Blocks(32, 64, 64, 4, 4), Blocks(16, 64, 64, 4, 4),
    Blocks(64, 16, 64, 4, 4), Blocks(16, 32, 64, 4, 4),
)  # fmt: skip
DRAFTS = {"ieee": SINGLE, "tf32x3": SINGLE, "tf32": (*TRUNCATED, *SINGLE), "bf16": HALF}


def heuristic(product: Product) -> Blocks:
    """Large tiles where there are enough of them to fill the device, else smaller ones, or parts of ``k``."""
    shape, policy = product.shape, product.policy
    half = shape.dtype != "f32"
    precision = "ieee" if half else {"strict": "tf32x3", "tf32": "tf32", "bf16": "bf16"}[policy]
    if precision == "tf32" and min(shape.m, shape.n, shape.k) <= SKINNY:
        precision = "tf32x3"
    drafts = HALF if half else DRAFTS[precision]
    laid = product.laid is not None
    few = product.window is not None and product.window.taps <= 5 and not laid
    if laid:
        drafts = (LAID if half else Blocks(128, 128, 32, 8, 3), *drafts[1:])
    if product.window is not None and not laid:  # few taps: on words, which do not go through bulk copies
        drafts = (WORDS if few else Blocks(128, 128, 64, 4, 2), replace(WORDS, m=64), *HALF[3:])
    fitting = [b for b in drafts if b.m < 2 * max(shape.m, 9) and b.n < 2 * max(shape.n, 17)] or drafts[-1:]
    most = max([s for s in SPLITS if shape.k >= DEEP * s and product.thin is None], default=1)
    for blocks in fitting:
        programs = shape.batch * -(-shape.m // blocks.m) * -(-shape.n // blocks.n)
        if programs * most >= FILL:
            break
    split = next((s for s in SPLITS if programs * s >= FILL), most)
    if min(shape.m, shape.n) <= SKINNY and programs < 4 * FILL:
        split = max(split, 2)  # many short streams fill the memory's pipes better
    blocks = replace(
        blocks, precision=precision, split=min(split, most), channels_last=laid,
        k=max(b for b in product.depths if b <= max(blocks.k, product.depths[0])),
    )  # fmt: skip
    # The copy is read and written once; what it saves grows with the other operand.
    copied = precision.startswith("tf32") and min(shape.m, shape.n) >= 512 and shape.k >= SHARE
    copied = copied or product.window is not None
    parts = precision == "tf32x3"
    if copied and parts and product.shared[1] and shape.batch * shape.m * shape.n * shape.k >= LARGE:
        if shape.k >= DEEP and min(shape.m, shape.n) >= 128:
            blocks = replace(blocks, m=128, n=128, warps=8)
        blocks = replace(blocks, ready=True, stages=3)
    if copied and (product.packable[1] or (any(product.packable) and not parts)):
        blocks = replace(blocks, packed=True, words="words" in product.knobs() and few)
    views = replace(product, blocks=blocks).described
    if min(blocks.m, blocks.n) >= 64 and all(view is not None and view.batch != "apart" for view in views):
        blocks = replace(blocks, loads="descriptors")
    return blocks
