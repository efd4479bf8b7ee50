"""The action vocabulary: 22 named transformations and three controls.

Actions, prompts, reports and statistics all use these names. The order is fixed: a strategy's ``id`` is its
action number for policies, so recorded searches and trained policies stay readable. Families follow
KernelBand (arXiv 2511.18868), so that its two-level choice (family, then strategy) can be reproduced.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Literal

from ke_gym.errors import UserError

Family = Literal["tiling", "vectorization", "fusion", "pipeline", "reordering", "access_layout", "control"]
FAMILIES: tuple[Family, ...] = (
    "tiling",
    "vectorization",
    "fusion",
    "pipeline",
    "reordering",
    "access_layout",
)

# Which paragraph a language's proposer is shown.
LANGUAGE_FAMILY = {
    "cpp": "cpp",
    "triton": "triton",
    "cuda": "cuda",
    "hip": "cuda",
    "cute": "cuda",
    "flydsl": "cuda",
}


@dataclass(frozen=True)
class Strategy:
    """One named transformation.

    ``resource`` is what it relieves (``dram``, ``l2``, ``l1``, ``compute``, ``registers``, ``latency``,
    ``occupancy``, ``parallelism`` or ``all``): a policy may prefer strategies whose resource limits the
    parent. ``precondition`` says in words when it makes sense; whether the rewriter *can* apply it to a given
    parent is found by applying it. ``prompts`` maps a language family (``triton``, ``cuda``, ``cpp``) to the
    paragraph an LLM is given.
    """

    id: int
    name: str
    family: Family
    resource: str
    precondition: str
    prompts: dict[str, str] = field(repr=False, hash=False, compare=False)

    @property
    def control(self) -> bool:
        """Whether it steers the search (FIX, RESTART, STOP) rather than transforming a kernel."""
        return self.family == "control"

    @property
    def rewrite(self) -> bool:
        """Whether the built-in rewriter has a schedule rewrite of this name."""
        from ke_gym.codegen import rewrites

        return self.name in rewrites.STRATEGIES

    def prompt(self, language: str) -> str:
        """The paragraph for ``language`` (``cpp``, ``triton``, ``cuda``, ``hip``, …)."""
        return self.prompts[LANGUAGE_FAMILY.get(language, "cuda")]


def _strategy(
    id: int, name: str, family: Family, resource: str, precondition: str, *, triton: str, cuda: str, cpp: str
) -> Strategy:
    return Strategy(id, name, family, resource, precondition, {"triton": triton, "cuda": cuda, "cpp": cpp})


STRATEGIES: tuple[Strategy, ...] = (
    _strategy(
        0,
        "tile_block",
        "tiling",
        "l2",
        "A loop nest touches the same data more than once, or its working set overflows a cache level.",
        triton="Re-choose BLOCK_M, BLOCK_N and BLOCK_K so that each program's operands are read from DRAM"
        " once and reused from registers and L2. Balance the reuse of a larger tile against registers"
        " and against having enough programs to fill the device; keep powers of two and mask the"
        " ragged edge.",
        cuda="Give every thread block a two-level tile: a block tile sized to shared memory and L2, and a"
        " thread tile kept in registers. Count bytes loaded per FLOP before and after, and stop"
        " enlarging when registers or shared memory cost more occupancy than the reuse returns.",
        cpp="Block the loops so that the inner working set stays in L1 (the innermost operand) and L2 (the"
        " panel it is reused with). Derive the tile from the cache sizes and element width instead of"
        " guessing, make it a named constant, and handle the remainder outside the hot loop.",
    ),
    _strategy(
        1,
        "stage_local",
        "access_layout",
        "l1",
        "The same operand is fetched repeatedly by one block or thread, or is read with a stride.",
        triton="Load an operand that every iteration needs once, before the loop, and keep the tensor live"
        " across it; a row that fits in one block should never be read twice. Check that the longer"
        " live range does not spill.",
        cuda="Copy the reused tile into __shared__ memory cooperatively, synchronise once, and compute from"
        " there. Pad or swizzle the tile so that the access pattern of the compute phase is free of"
        " bank conflicts.",
        cpp="Pack the strided or reused operand into a small contiguous, aligned buffer owned by the"
        " thread, in exactly the order in which the inner loop consumes it. Packing pays when each"
        " packed element is used several times; keep the buffer inside L1 or L2.",
    ),
    _strategy(
        2,
        "layout_coalesce",
        "access_layout",
        "dram",
        "Neighbouring lanes or iterations touch addresses that are not neighbours.",
        triton="Arrange the index arithmetic so that the fastest-varying block axis walks the unit-stride"
        " dimension of every large tensor. Where two tensors disagree, load along the contiguous axis"
        " and transpose in registers with tl.trans rather than issuing strided loads.",
        cuda="Map threadIdx.x to the unit-stride dimension so that a warp's loads fall into whole 128-byte"
        " lines. For an unavoidable transpose, stage a padded tile in shared memory so that both the"
        " global read and the global write are coalesced.",
        cpp="Make the innermost loop run over the unit-stride dimension of the tensors that dominate"
        " traffic, turning interleaved fields into separate arrays where they are produced inside the"
        " kernel. Strided gathers in an inner loop waste most of each cache line and block"
        " vectorization.",
    ),
    _strategy(
        3,
        "vectorize",
        "vectorization",
        "dram",
        "The inner loop is scalar, or narrower than the hardware's vectors.",
        triton="Help the compiler emit 128-bit accesses: contiguous offsets, tl.multiple_of and"
        " tl.max_contiguous on pointers, block sizes that give each thread at least 16 bytes, and an"
        " aligned fast path. Masks that vary inside a vector defeat this, so keep them block-aligned.",
        cuda="Read and write with float4 (or 16-byte) accesses after checking alignment and divisibility,"
        " and let each thread handle the four neighbouring elements in registers. Provide a scalar"
        " tail; never cast a pointer whose alignment has not been established.",
        cpp="Turn the innermost loop into full-width SIMD: unit stride, no calls, no aliasing (__restrict),"
        " `#pragma omp simd` with a reduction clause where needed, and the project's vector math headers"
        " instead of libm. Confirm in the vectorization report that the loop was taken at the preferred"
        " width.",
    ),
    _strategy(
        4,
        "loop_order",
        "reordering",
        "l2",
        "Two or more loops of a nest can be interchanged without breaking a dependence.",
        triton="Exchange which axis is mapped to programs and which is looped over inside one, so that the"
        " operand with the larger footprint is streamed once and the smaller one is reused from"
        " cache.",
        cuda="Permute the loops inside a thread, or swap which grid axis walks which dimension, so that the"
        " operand with the most reuse stays in registers or L1 across the innermost loop.",
        cpp="Interchange loops so that the innermost one is unit-stride and the reuse-carrying one sits"
        " just outside it. For reductions over a leading dimension this means accumulating a whole row"
        " of partial results instead of walking down columns.",
    ),
    _strategy(
        5,
        "traversal_swizzle",
        "reordering",
        "l2",
        "Several tiles share operands and are visited in plain row-major order.",
        triton="Group program ids (the GROUP_M pattern) so that programs resident at the same time share"
        " rows of A and columns of B in L2. Tune the group size to the L2 capacity divided by the"
        " size of a panel.",
        cuda="Remap blockIdx so that concurrently resident blocks cover a compact square of the output"
        " rather than a long stripe; a column-group or Morton order over tiles is enough. Correctness"
        " must not depend on the order in which blocks run.",
        cpp="Visit tiles in an order that keeps the shared panel hot: group tiles that reuse the same"
        " operand, and give each thread a compact patch rather than a stripe. On several memory nodes,"
        " let the thread that first touched the data process it.",
    ),
    _strategy(
        6,
        "cache_hint",
        "access_layout",
        "l2",
        "Some data is touched once and evicts other data that is reused.",
        triton="Mark streamed loads with eviction_policy='evict_first' and reused ones with 'evict_last',"
        " and use cache_modifier='.cg' or '.cs' for stores nobody reads again. Only worthwhile when"
        " the reused set nearly fits L2.",
        cuda="Send read-only streams through __ldg or ld.global.nc with an evict-first policy and write"
        " results with __stcs, so that L2 keeps the operand that is reused.",
        cpp="Write large outputs that are not read again with non-temporal (streaming) stores, which saves"
        " the read-for-ownership of every line. It pays only above the last-level cache size and for"
        " full, aligned lines; end with a store fence.",
    ),
    _strategy(
        7,
        "prefetch_pipeline",
        "pipeline",
        "latency",
        "A loop alternates loads and arithmetic, and the loads are waited for.",
        triton="Raise num_stages so that the loads of iteration i+1 are in flight while iteration i"
        " computes, and write the loop in the form the pipeliner recognises (pointer increments, no"
        " data-dependent exits). Every stage costs a tile of shared memory.",
        cuda="Double-buffer the shared tile with cp.async (or TMA with an mbarrier): issue the copy for the"
        " next tile, compute the present one, then wait. Keep exactly as many stages as hide the"
        " latency.",
        cpp="Load the operands of the next iteration before using the present ones, and add software"
        " prefetches a few hundred cycles ahead where the access pattern defeats the hardware prefetcher"
        " (gathers, short rows, large strides).",
    ),
    _strategy(
        8,
        "fuse",
        "fusion",
        "dram",
        "One loop nest writes a tensor that the next one reads over a compatible iteration space.",
        triton="Compute the producer inside the consumer's kernel, or apply the epilogue (bias, activation,"
        " residual, scale) to the accumulator before it is stored, so that the intermediate never"
        " reaches DRAM. Fused reductions need the whole reduced axis in one program or an online"
        " formulation.",
        cuda="Merge neighbouring kernels: keep the intermediate in registers or shared memory, and apply"
        " pointwise work to the accumulator before its only store. Recompute cheap producers rather"
        " than synchronising across blocks.",
        cpp="Merge adjacent loop nests over the same outer loop, so that each element or row is processed"
        " while it is in registers or L1 and the intermediate tensor disappears or shrinks to a row. The"
        " saving is the bytes no longer written and read back.",
    ),
    _strategy(
        9,
        "fission",
        "fusion",
        "registers",
        "One loop carries so many live values or streams that it spills, or stops vectorizing.",
        triton="Split a kernel that spills or whose occupancy has collapsed into two kernels along a small"
        " intermediate. Worth it only if the intermediate is much smaller than the inputs.",
        cuda="Split the kernel where the fewest bytes cross, so that each half fits in registers without"
        " spilling and can choose its own launch shape.",
        cpp="Split a loop into two where one part vectorizes and the other does not, or where too many"
        " streams exhaust registers and prefetchers. Block first, so that the intermediate stays in L1.",
    ),
    _strategy(
        10,
        "recompute",
        "fusion",
        "dram",
        "A stored intermediate is cheaper to compute again than to write and read.",
        triton="Drop the stored intermediate and compute it again from operands already loaded;"
        " exponentials, masks, indices and normalised values are typical. Trade FLOP, which are idle"
        " in a memory-bound kernel, for bytes.",
        cuda="Recompute cheap values in every consumer thread instead of passing them through global or"
        " shared memory, removing a buffer and often a barrier with it.",
        cpp="Inline the cheap producer at each point of use instead of materialising it. In a second pass"
        " over a row, recompute from the input that is still in cache rather than storing a temporary"
        " row.",
    ),
    _strategy(
        11,
        "unroll_ilp",
        "pipeline",
        "compute",
        "A dependence chain (often one accumulator) limits instruction throughput.",
        triton="Let each program carry several independent rows or accumulators, and unroll short constant"
        " loops with tl.static_range, so that arithmetic latency overlaps.",
        cuda="Give each thread several independent accumulators and unroll with #pragma unroll, so that the"
        " scheduler always finds an instruction whose operands are ready; watch the register count.",
        cpp="Break the dependence through one accumulator by keeping four or more independent vector"
        " accumulators (latency times throughput of the FMA unit), combining them once at the end. Unroll"
        " just as far as registers allow.",
    ),
    _strategy(
        12,
        "matrix_unit",
        "vectorization",
        "compute",
        "The kernel holds a contraction whose shapes suit the matrix hardware.",
        triton="Express the contraction as tl.dot on tiles of at least 16 in each dimension, with operands"
        " in a type the tensor cores take and a float32 accumulator. Respect the task's precision:"
        " float32 inputs need input_precision='ieee' unless TF32 is permitted.",
        cuda="Move the inner product onto tensor cores (mma.sync, WMMA or wgmma) with float32 accumulation,"
        " loading fragments with ldmatrix from a swizzled shared tile. Only the types the task's"
        " precision policy permits.",
        cpp="Write the contraction as a register-blocked micro-kernel: a small tile of accumulators held"
        " entirely in vector registers, one broadcast and a few FMAs per step, fed from packed panels."
        " Use AMX or bf16 dot products only where the precision policy permits.",
    ),
    _strategy(
        13,
        "precision_math",
        "vectorization",
        "compute",
        "The task's tolerance or precision policy permits cheaper arithmetic.",
        triton="Within the task's tolerance, use bf16 or TF32 operands for tl.dot with float32"
        " accumulation, and exp2 with a folded scale instead of exp. Never lower the accumulation"
        " type of a long reduction.",
        cuda="Within the task's tolerance, use the fast intrinsics (__expf, __frcp_rn, rsqrtf) and"
        " permitted low-precision operands with float32 accumulators; leave range-critical steps exact.",
        cpp="Within the task's tolerance, allow contraction and reassociation (-ffast-math or its narrow"
        " parts), replace divisions by a reciprocal computed once, and use lower-degree vector"
        " polynomials. Do not assume away NaN or infinity where inputs may hold them.",
    ),
    _strategy(
        14,
        "algebra_hoist",
        "reordering",
        "compute",
        "The same value is computed in every iteration, or an expression simplifies.",
        triton="Hoist loop-invariant work out of the loop, fold constants into one scale, turn divisions"
        " into multiplications, and share common subexpressions. State why the simplification is"
        " exact or within tolerance.",
        cuda="Move invariant index arithmetic and scalars out of the loop or onto the host, replace div/mod"
        " by strength-reduced counters, and factor common terms.",
        cpp="Hoist invariant expressions and addresses out of inner loops, replace division by"
        " multiplication with a reciprocal, and merge chains of scale and shift into one FMA. Compilers"
        " may not do this for floating point on their own.",
    ),
    _strategy(
        15,
        "algorithm_swap",
        "reordering",
        "all",
        "A formulation with fewer passes, fewer operations or less traffic is known.",
        triton="Replace the algorithm rather than its code: online softmax instead of three passes, Welford"
        " instead of two-pass variance, flash-style attention instead of materialised scores, a"
        " parallel scan instead of a serial one.",
        cuda="Change the algorithm: one-pass statistics, online softmax, decoupled look-back scan,"
        " sort-free selection, or a blocked formulation with better arithmetic intensity.",
        cpp="Change the algorithm: one-pass statistics, online softmax, blocked or two-level scans, binary"
        " search without branches, direct instead of im2col convolution or the reverse. Say what the old"
        " one paid for that the new one does not.",
    ),
    _strategy(
        16,
        "predicate_peel",
        "vectorization",
        "compute",
        "Bounds checks or masks are evaluated for data that is almost always inside.",
        triton="Split the loop into full blocks, loaded and stored without masks, and one masked tail. For"
        " causal structure, skip blocks that are entirely masked and drop the mask in those that are"
        " entirely visible.",
        cuda="Remove divergent branches from the hot path: peel the boundary into its own small loop, or"
        " turn the condition into arithmetic selection.",
        cpp="Peel the ragged edge into a separate loop so that the main one has a constant, vector-aligned"
        " trip count, and turn remaining branches into selects the vectorizer understands.",
    ),
    _strategy(
        17,
        "work_partition",
        "tiling",
        "occupancy",
        "Execution units idle: too few or too many threads, uneven shares, or a poor launch shape.",
        triton="Re-choose num_warps and the amount of work per program so that the grid is a few full waves"
        " of the device. Small rows: several per program. Long rows: more warps or a split.",
        cuda="Re-choose block size, elements per thread and grid so that occupancy hides latency and the"
        " last wave is full. Consider one warp per row for short rows and one block per row for long"
        " ones.",
        cpp="Re-choose which loop is parallel, the grain per thread and the schedule, so that every core"
        " gets equal work of at least tens of microseconds. Collapse outer loops that are too short, and"
        " run small problems on one thread.",
    ),
    _strategy(
        18,
        "split_reduce",
        "tiling",
        "parallelism",
        "A long reduction has too few independent outputs to fill the machine.",
        triton="Split the reduced axis over several programs (split-K), writing partial results to a small"
        " workspace that a second, short kernel combines in a fixed order; atomics only if the task"
        " allows run-to-run differences.",
        cuda="Reduce within a warp by shuffles, across warps through shared memory, and across blocks by a"
        " second kernel or a last-block-done scheme, so that the whole device works on one reduction.",
        cpp="Split the reduced range over threads, each with a private, cache-line-padded accumulator, and"
        " combine the partial results in a fixed order after the parallel loop.",
    ),
    _strategy(
        19,
        "sync_launch",
        "pipeline",
        "latency",
        "Launches, barriers or thread-team start-up are a visible share of the time.",
        triton="Merge small kernels into one, or make the kernel persistent: launch one program per"
        " multiprocessor and loop over tiles inside it.",
        cuda="Reduce launches, barriers and atomics: a persistent kernel with a tile loop, warp-level"
        " instead of block-level synchronisation, one atomic per block instead of per thread.",
        cpp="Use one parallel region for the whole kernel instead of one per loop, drop barriers that no"
        " dependence needs (nowait), and allocate scratch once per thread.",
    ),
    _strategy(
        20,
        "specialize",
        "vectorization",
        "compute",
        "Sizes, strides or flags are known when the kernel is built but passed at run time.",
        triton="Make sizes and strides tl.constexpr so that masks, divisions and short loops fold away;"
        " keep one general path if the module claims general shapes.",
        cuda="Turn run-time sizes and flags into template parameters or compile-time constants, so that"
        " loops unroll fully and index arithmetic folds.",
        cpp="Bake sizes and strides in as constexpr values, so that trip counts are known, remainders"
        " vanish and the compiler picks the right vector code. If the module claims general shapes, keep"
        " a general version and dispatch in forward.",
    ),
    _strategy(
        21,
        "param_tune",
        "tiling",
        "all",
        "The kernel exposes numeric knobs whose best values depend on the machine.",
        triton="Leave the algorithm alone and choose better values for the exposed constants: block sizes,"
        " num_warps, num_stages. Change a few at a time and say what you expect.",
        cuda="Leave the algorithm alone and choose better values for block sizes, elements per thread,"
        " stages, and launch bounds.",
        cpp="Leave the algorithm alone and choose better values for tiles, unroll factors, grain, vector"
        " width and compiler flags.",
    ),
)

_SAME_FOR_ALL = ("triton", "cuda", "cpp")


def _control(id: int, name: str, precondition: str, prompt: str) -> Strategy:
    return Strategy(id, name, "control", "all", precondition, dict.fromkeys(_SAME_FOR_ALL, prompt))


FIX = _control(
    22,
    "FIX",
    "The last attempt on this kernel failed.",
    "The kernel below failed. Find the cause in the log and repair it with the smallest change that keeps"
    " the optimization it attempted; if the idea itself is at fault, undo just that part.",
)
RESTART = _control(
    23,
    "RESTART",
    "Always.",
    "Write a fresh kernel for the reference, taking a different approach from the attempts listed. Do not"
    " start from their source.",
)
STOP = _control(
    24,
    "STOP",
    "Always.",
    "End the search: the expected gain of another attempt is not worth its cost.",
)

CONTROLS: tuple[Strategy, ...] = (FIX, RESTART, STOP)
ACTIONS: tuple[Strategy, ...] = STRATEGIES + CONTROLS
_BY_NAME = {strategy.name: strategy for strategy in ACTIONS}


def get(name: str) -> Strategy:
    """The strategy or control of this name; ``UserError`` names the nearest for an unknown one."""
    if found := _BY_NAME.get(name):
        return found
    near = difflib.get_close_matches(name, _BY_NAME, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(_BY_NAME)}."
    raise UserError(f"unknown strategy {name!r}; {hint}")
