"""CUDA C++ modules traced and compiled for sm_90a on a machine without a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from ke_gym import lang
from ke_gym.errors import UserError
from ke_gym.languages import nvrtc
from ke_gym.languages.base import BuildError
from ke_gym.languages.cubin import resources
from ke_gym.languages.cuda import parse_kernels
from ke_gym.languages.device import arch_of, get_arch
from ke_gym.languages.launch import KernelError
from ke_gym.languages.plan import Geometry, Ref, TensorMap, TensorSpec
from tests.languages.gpu_modules import VECTOR, built, launches

compiler = pytest.mark.skipif(not nvrtc.tools(), reason="neither NVRTC nor nvcc is installed")

MODULE = """
import torch
from ke_gym import lang

kernels = lang.cuda(r'''
extern "C" __global__ void __launch_bounds__(256, 2) scale(
    const float* __restrict__ x, float* __restrict__ out, int n, float factor) {
  __shared__ float tile[256];
  extern __shared__ float more[];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  tile[threadIdx.x] = more[threadIdx.x] = i < n ? x[i] : 0;
  __syncthreads();
  if (i < n) out[i] = tile[threadIdx.x ^ 1] * factor + more[threadIdx.x];
}
'''{options})

def forward(x, y):
    out = torch.empty_like(x)
    {body}
    return out
"""
LAUNCH = "kernels.scale[16, 256, 1024](x, out, x.numel(), 2.0)"


def module(body: str = LAUNCH, options: str = "") -> str:
    return MODULE.replace("{body}", body).replace("{options}", options)


@compiler
def test_a_launch_becomes_a_cubin_and_a_plan() -> None:
    artifact = built(module(), "cuda")
    (launch,) = launches(artifact)
    assert launch.args == (Ref(0), Ref(2), 4096, 2.0)
    assert launch.ctypes == ("const float*", "float*", "int32_t", "float")
    assert launch.geometry == Geometry((16, 1, 1), (256, 1, 1), shared=1024)
    (used,) = artifact.report["kernels"]
    assert used["shared"] == 2048, "static and dynamic, not what the system takes"
    kernel = resources(artifact.binaries[launch.binary])["scale"]
    assert kernel.parameters == ((0, 8), (8, 8), (16, 4), (20, 4))
    assert kernel.threads == 256


@compiler
def test_launch_attributes() -> None:
    body = "kernels.scale.launched((8, 2), 256, 1024, cluster=2, programmatic=True)(x, out, 4096, 2.0)"
    (launch,) = launches(built(module(body), "cuda"))
    assert launch.geometry == Geometry((8, 2, 1), (256, 1, 1), (2, 1, 1), 1024, programmatic=True)


@compiler
@pytest.mark.parametrize("tool", nvrtc.TOOLS)
def test_every_compiler_that_is_there(tool: str) -> None:
    if tool not in nvrtc.tools():
        pytest.skip(f"{tool} is not installed")
    artifact = built(module(options=f", flags='-DN=4 -use_fast_math', compiler='{tool}'"), "cuda")
    assert artifact.report["units"][0]["compiler"] == tool


HALVES = r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>
extern "C" __global__ void mixed(const __half* a, const __nv_bfloat16* b, float* out) {
  out[threadIdx.x] = __half2float(a[threadIdx.x]) + __bfloat162float(b[threadIdx.x]);
}
"""


@compiler
def test_half_precision_headers() -> None:
    cubin, _ = nvrtc.compile_cubin(HALVES, (), "sm_90a")
    assert resources(cubin)["mixed"].parameters == ((0, 8), (8, 8), (16, 8))
    assert [p.ctype for p in parse_kernels(HALVES)["mixed"].parameters] == [
        "const half*",
        "const bf16*",
        "float*",
    ]


TMA = r"""
import torch
from ke_gym import lang

kernels = lang.cuda(r'''
struct alignas(64) CUtensorMap { unsigned long long opaque[16]; };
extern "C" __global__ void copy(const __grid_constant__ CUtensorMap map, float* out) {
  out[threadIdx.x] = (float)map.opaque[0];
}
''')

def forward(x, y):
    out = torch.empty_like(y)
    kernels.copy[1, 32](lang.tensor_map(x, (64, 32), swizzle=128), out)
    return out
"""


@compiler
def test_tensor_maps_are_plan_data() -> None:
    matrix = TensorSpec((512, 512), (512, 1), "float32")
    (launch,) = launches(built(TMA, "cuda", inputs=(matrix, VECTOR)))
    tile = launch.args[0]
    assert isinstance(tile, TensorMap)
    assert (tile.value, tile.box, tile.swizzle) == (0, (64, 32), 128)
    assert launch.ctypes == ("CUtensorMap", "float*")


@compiler
@pytest.mark.parametrize(
    "described", ["(512, 512), stride=(516, 1)", "(513, 512)", "(512, 512), stride=(1,)"]
)
def test_tensor_maps_stay_within_their_tensors(described: str) -> None:
    matrix = TensorSpec((512, 512), (512, 1), "float32")
    source = TMA.replace("swizzle=128", f"swizzle=128, shape={described}")
    with pytest.raises(BuildError, match="reaches beyond the tensor's memory"):
        built(source, "cuda", inputs=(matrix, VECTOR))


@compiler
@pytest.mark.parametrize(
    ("body", "outcome", "message"),
    [
        ("kernels.scale[16, 256](out, x, 1, 2.0)", "constraints", "writes to input 0"),
        ("kernels.scale[16, 512](x, out, 1, 2.0)", "constraints", "compiled for 256 threads"),
        ("kernels.scale[16, 256, 240000](x, out, 1, 2.0)", "constraints", "sm_90a has 232448"),
        ("kernels.scale[0, 256](x, out, 1, 2.0)", "compile", "is no grid"),
        ("kernels.scale[16](x, out, 1, 2.0)", "compile", r"give \[grid, block\]"),
        ("kernels.scale[16, 256](x, out, 1)", "compile", "takes 4 arguments"),
        ("kernels.scale[16, 256](x, out, 1.5, 2.0)", "compile", "int32_t expected"),
        ("kernels.scale[16, 256](x.double(), out, 1, 2.0)", "compile", "takes float32"),
        ("kernels.skale[16, 256](x, out, 1, 2.0)", "compile", "did you mean 'scale'"),
    ],
)
def test_what_is_refused(body: str, outcome: str, message: str) -> None:
    with pytest.raises(BuildError, match=message) as caught:
        built(module(body), "cuda")
    assert caught.value.outcome == outcome


@compiler
def test_compiler_errors_are_shown() -> None:
    with pytest.raises(BuildError, match=r'kernel.cu\(\d+\): error: identifier "facto" is undefined'):
        built(module().replace("* factor +", "* facto +"), "cuda")


def test_an_architecture_that_the_compiler_does_not_know_is_told_with_what_to_do() -> None:
    if "nvrtc" not in nvrtc.tools():
        pytest.skip("there is no NVRTC")
    with pytest.raises(KernelError, match=r"NVRTC .* does not know sm_999a .* newer CUDA"):
        nvrtc.compile_cubin('extern "C" __global__ void k() {}', (), "sm_999a", "nvrtc")


@pytest.mark.parametrize("flags", ["-I/etc", "--options-file=x", "-o", "-ptx"])
def test_flags_that_are_not_about_code(flags: str) -> None:
    with pytest.raises(lang.KernelError, match="is not accepted"):
        lang.cuda("", flags)


def test_outside_of_a_trace_nothing_is_launched() -> None:
    kernels = lang.cuda('extern "C" __global__ void f(float* x) {}')
    with pytest.raises(lang.KernelError, match="outside of a trace"):
        kernels.f[1, 1](None)


def test_which_functions_are_kernels() -> None:
    source = """
    // extern "C" __global__ void no(float* x) {}
    extern "C" {
    __device__ float helper(float x) { return x; }
    __global__ void __launch_bounds__(128) one(float* x, unsigned n) {}
    __global__ __launch_bounds__(32) __cluster_dims__(2, 1, 1) void two(const long long* __restrict__ i) {}
    }
    __global__ void mangled(float* x) {}
    """
    found = parse_kernels(source)
    assert {name: [p.ctype for p in k.parameters] for name, k in found.items()} == {
        "one": ["float*", "uint32_t"],
        "two": ["const int64_t*"],
    }


@pytest.mark.parametrize(("threads", "registers", "shared", "expected"), [
    (256, 32, 0, 1.0), (256, 64, 0, 0.5), (1024, 64, 0, 0.5), (256, 32, 100_000, 0.25), (128, 255, 0, 0.125),
    (256, 32, 227 << 10, 0.125), (256, 32, 228 << 10, 0.0), (2048, 32, 0, 0.0),
])  # fmt: skip
def test_occupancy(threads: int, registers: int, shared: int, expected: float) -> None:
    assert get_arch("sm_90a").occupancy(threads, registers, shared) == expected


def test_architectures() -> None:
    assert arch_of((9, 0)).name == "sm_90a"
    with pytest.raises(UserError, match=r"7\.5, which kernels are not built for"):
        arch_of((7, 5))


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"\x7fELF\x02\x01" + bytes(60), b"x" * 100])
def test_what_is_no_cubin(data: Any) -> None:
    with pytest.raises(ValueError, match="not a cubin"):
        resources(data)
