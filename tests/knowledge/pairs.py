"""Situations as they arise in a search, and the document each should bring up.

Written before the ranking was adjusted to anything. ``TUNED`` may be looked at when weights are chosen;
``HELD_OUT`` may not: a change that helps one and hurts the other is no improvement.
"""

from __future__ import annotations

from ke_gym.knowledge import Situation

Pair = tuple[Situation, str]


def _cpp(strategy: str, limiter: str, text: str, phase: str = "improve") -> Situation:
    return Situation("cpu", "cpp", strategy, limiter, phase, text)


def _triton(
    strategy: str, limiter: str, text: str, phase: str = "improve", target: str = "cuda"
) -> Situation:
    return Situation(target, "triton", strategy, limiter, phase, text)


TUNED: list[Pair] = [
    (
        _cpp("vectorize", "instructions", "softmax over the last dimension, rows of 2048 floats"),
        "languages/cpp/simd",
    ),
    (_cpp("RESTART", "", "Softmax over the last dimension; x.softmax(-1)", "draft"), "guidance/softmax"),
    (
        _cpp("algorithm_swap", "dram", "torch.logsumexp(x, dim=-1) and its square (z-loss)"),
        "guidance/softmax",
    ),
    (
        _cpp("RESTART", "", "RMSNorm over the last dimension with a learned weight", "draft"),
        "guidance/normalization",
    ),
    (
        _cpp(
            "algorithm_swap", "instructions", "x.var(dim=-1, unbiased=True), mean removed, standardized rows"
        ),
        "guidance/normalization",
    ),
    (
        _cpp(
            "split_reduce",
            "dram",
            "LayerNorm forward and backward: gradients of weight and bias summed over rows",
        ),
        "guidance/normalization-backward",
    ),
    (
        _cpp("loop_order", "instructions", "mean and mean square of each column: x.mean(dim=0)"),
        "guidance/reductions-columns",
    ),
    (
        _cpp("split_reduce", "instructions", "mean squared error over two whole tensors"),
        "guidance/reductions-rows",
    ),
    (_cpp("unroll_ilp", "instructions", "row sum of squares; one accumulator"), "languages/cpp/accumulators"),
    (
        _cpp("RESTART", "", "index of the largest value of each row: x.argmax(-1); ties", "draft"),
        "guidance/argmax",
    ),
    (_cpp("algorithm_swap", "instructions", "cumulative sum along each row, torch.cumsum"), "guidance/scans"),
    (
        _cpp("matrix_unit", "compute", "linear layer x @ w.T + b, 384x512x1024, float32"),
        "languages/cpp/gemm-header",
    ),
    (
        _cpp("fuse", "compute", "linear layer followed by tanh-approximated GELU; F.gelu(F.linear(x, w, b))"),
        "guidance/matmul-epilogues",
    ),
    (
        _cpp("RESTART", "", "a few rows through a large linear layer: 4x2048x2048, decoding", "draft"),
        "guidance/skinny-matmul",
    ),
    (
        _cpp(
            "FIX", "", "error: 'expf' was not declared; kernel.cpp:12:9: error: no matching function", "fix"
        ),
        "languages/cpp/compile-errors",
    ),
    (
        _cpp(
            "FIX",
            "",
            "outcome: correctness; largest error at the last columns of each row, the rest is right",
            "fix",
        ),
        "guidance/debugging-wrong-results",
    ),
    (
        _cpp("FIX", "", "outcome: runtime; the kernel died by signal 11 (SIGSEGV)", "fix"),
        "guidance/debugging-crashes",
    ),
    (
        _cpp("cache_hint", "dram", "residual connection with scale, output of 64 MB written once"),
        "hardware/cpu/streaming-stores",
    ),
    (
        _cpp("sync_launch", "latency", "small tensors, the whole call takes 12 microseconds"),
        "guidance/latency",
    ),
    (
        _cpp("work_partition", "instructions", "threads idle; omp parallel for over 8 rows, uneven shares"),
        "hardware/cpu/openmp",
    ),
    (
        _triton(
            "param_tune", "compute", "matmul: choose BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages", "tune"
        ),
        "languages/triton/tuning",
    ),
    (
        _triton("matrix_unit", "compute", "tl.dot of bfloat16 tiles, linear layer with GELU"),
        "languages/triton/matmul",
    ),
    (
        Situation(
            "cuda", "cuda", "split_reduce", "latency", "improve", "block reduction of a row, warp shuffles"
        ),
        "languages/cuda/warp-reductions",
    ),
    (
        Situation(
            "hip", "hip", "matrix_unit", "compute", "improve", "bf16 GEMM on MI300X with MFMA instructions"
        ),
        "hardware/amd/matrix-cores",
    ),
    (
        Situation(
            "mtia", "triton", "stage_local", "dram", "improve", "embedding and MLP on the second generation"
        ),
        "hardware/mtia/v2i",
    ),
]

HELD_OUT: list[Pair] = [
    (
        _cpp("RESTART", "", "mean cross-entropy of logits against class labels, written out", "draft"),
        "guidance/softmax",
    ),
    (
        _cpp("fuse", "dram", "LayerNorm over the last dimension, after a residual addition"),
        "guidance/normalization",
    ),
    (
        _cpp("tile_block", "compute", "causal self-attention: scores, mask, softmax, weighted sum"),
        "guidance/attention",
    ),
    (
        _cpp(
            "RESTART",
            "",
            "one decoding step of grouped-query attention over a padded key-value cache",
            "draft",
        ),
        "guidance/attention-decode",
    ),
    (
        _cpp("RESTART", "", "convolution over time, kernel 3, 96 channels: nn.Conv1d", "draft"),
        "guidance/convolution",
    ),
    (
        _cpp(
            "vectorize",
            "instructions",
            "depthwise 3x3 convolution with bias and ReLU6, groups=channels (MobileNet)",
        ),
        "guidance/depthwise-convolution",
    ),
    (
        _cpp("algorithm_swap", "instructions", "ReLU and overlapping 3x3 max pooling with stride 2"),
        "guidance/pooling",
    ),
    (
        _cpp(
            "prefetch_pipeline",
            "latency",
            "weighted sums over bags of embedding rows, random rows of a large table",
        ),
        "guidance/gathers",
    ),
    (
        _cpp("RESTART", "", "jagged sequences padded to a dense tensor, offsets, longer ones cut", "draft"),
        "guidance/jagged",
    ),
    (
        _cpp("predicate_peel", "instructions", "torch.bucketize: every feature by its own sorted boundaries"),
        "guidance/binary-search",
    ),
    (
        _cpp(
            "matrix_unit",
            "compute",
            "many small matrix products with bias and ReLU: torch.bmm, 192x64x96x128",
        ),
        "guidance/batched-matmul",
    ),
    (
        _cpp("algorithm_swap", "compute", "linear layer with a low-rank adapter (LoRA): x @ w + (x @ a) @ b"),
        "guidance/factorization",
    ),
    (
        _cpp("fuse", "instructions", "a dozen pointwise operations in a row: exp, clamp, where, tanh, log1p"),
        "guidance/pointwise-chains",
    ),
    (
        _cpp("precision_math", "instructions", "exact GELU of bias plus input: erf is slow"),
        "languages/cpp/math-header",
    ),
    (
        _cpp("RESTART", "", "rotary position embedding: halves rotated by angles, cos and sin", "draft"),
        "guidance/rotary",
    ),
    (
        _cpp("RESTART", "", "RMSNorm of bfloat16 rows computed in float32", "draft"),
        "guidance/low-precision-storage",
    ),
    (
        _cpp("param_tune", "compute", "tiles MR, NR, KC and compiler flags of a gemm", "tune"),
        "guidance/parameter-tuning",
    ),
    (
        _cpp("precision_math", "compute", "flags -ffast-math, -mprefer-vector-width=512, clang++ or g++"),
        "languages/cpp/compiler-flags",
    ),
    (_cpp("tile_block", "l3", "working set overflows L2; block the loops for the caches"), "guidance/tiling"),
    (
        _cpp(
            "FIX",
            "",
            "outcome: constraints; kernel module cannot be traced: data-dependent .item() in forward",
            "fix",
        ),
        "constraints/forward-tracing",
    ),
    (
        _cpp(
            "FIX",
            "",
            "outcome: correctness; error too large in bfloat16 products where float32 is required",
            "fix",
        ),
        "constraints/precision",
    ),
    (
        _triton(
            "algorithm_swap", "dram", "softmax of rows that do not fit one block: tl.max, tl.sum, online"
        ),
        "languages/triton/reductions",
    ),
    (
        _triton("layout_coalesce", "dram", "strided loads; masks; tl.load with other=0; multiple_of"),
        "languages/triton/memory-access",
    ),
    (
        _triton(
            "param_tune", "compute", "waves_per_eu, matrix_instr_nonkdim, kpack on MI300X", "tune", "hip"
        ),
        "languages/triton/amd",
    ),
    (
        _triton("FIX", "", "CompilationError: arange's range must be a power of 2", "fix"),
        "languages/triton/pitfalls",
    ),
    (
        Situation(
            "cuda", "cuda", "stage_local", "l1", "improve", "transpose tile in shared memory, bank conflicts"
        ),
        "hardware/nvidia/shared-memory",
    ),
    (
        Situation(
            "cuda",
            "cuda",
            "prefetch_pipeline",
            "latency",
            "improve",
            "TMA loads, mbarrier, cp.async double buffer",
        ),
        "hardware/nvidia/async-copy",
    ),
    (
        Situation(
            "cuda",
            "cuda",
            "work_partition",
            "occupancy",
            "improve",
            "registers per thread spill, few active warps",
        ),
        "hardware/nvidia/occupancy",
    ),
    (
        Situation(
            "hip", "hip", "traversal_swizzle", "l2", "improve", "GEMM tiles across the XCDs of an MI300X"
        ),
        "hardware/amd/chiplets",
    ),
    (
        Situation(
            "hip", "hip", "RESTART", "", "draft", "port a CUDA kernel: warp size, __shfl_sync, launch bounds"
        ),
        "languages/hip/from-cuda",
    ),
    (
        Situation(
            "cuda",
            "cute",
            "RESTART",
            "",
            "draft",
            "elementwise add with cute.jit and cute.kernel, zipped_divide",
        ),
        "languages/cute/kernel-module",
    ),
    (
        Situation("hip", "flydsl", "RESTART", "", "draft", "vector add with flyc.kernel and buffer loads"),
        "languages/flydsl/kernel-module",
    ),
]

# What the references of the built-in tasks, as a proposer shows them, should bring up in a first draft.
TOPICS: dict[str, str] = {
    "activation_chain": "guidance/pointwise-chains",
    "argmax": "guidance/argmax",
    "attention_causal": "guidance/attention",
    "attention_gqa_decode": "guidance/attention-decode",
    "attention_vanilla": "guidance/attention",
    "batch_event_truncate": "guidance/jagged",
    "batch_norm_inference": "guidance/normalization",
    "bias_gelu": "guidance/activations",
    "bucketize": "guidance/binary-search",
    "column_mean": "guidance/reductions-columns",
    "conv1d": "guidance/convolution",
    "conv_depthwise": "guidance/depthwise-convolution",
    "conv_pointwise": "guidance/convolution",
    "cross_entropy": "guidance/softmax",
    "cumsum": "guidance/scans",
    "dense_to_jagged": "guidance/jagged",
    "embedding_bag": "guidance/gathers",
    "factorization_machine": "guidance/factorization",
    "gather_rows": "guidance/gathers",
    "global_pool": "guidance/pooling",
    "group_norm": "guidance/normalization",
    "layer_norm_backward": "guidance/normalization-backward",
    "map_id": "guidance/binary-search",
    "matmul_batched": "guidance/batched-matmul",
    "matmul_bias_gelu": "guidance/matmul-epilogues",
    "matmul_low_rank": "guidance/factorization",
    "matmul_skinny": "guidance/skinny-matmul",
    "max_pool": "guidance/pooling",
    "mean_squared_error": "guidance/reductions-rows",
    "reverse_cumsum": "guidance/scans",
    "rms_norm_bf16": "guidance/low-precision-storage",
    "rotary_embedding": "guidance/rotary",
    "softmax": "guidance/softmax",
    "swiglu": "guidance/activations",
    "variance": "guidance/normalization",
}
