"""Triton modules traced and compiled for sm_90 on a machine without a GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from ke_gym.languages.base import BuildError
from ke_gym.languages.cubin import resources
from ke_gym.languages.plan import Geometry, Ref, Scratch, TensorMap, TensorSpec
from tests.languages.gpu_modules import VECTOR, built, launches

ADD = """
import torch, triton, triton.language as tl

@triton.jit
def add(x, y, out, n, scale, one, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    tl.store(out + i, tl.load(x + i, mask=m) * scale + tl.load(y + i, mask=m) * one, mask=m)

def forward(x, y):
    out = torch.empty_like(x)
    n = x.numel()
    add[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](x, {y}, out, n, {scale}, {one}, BLOCK=1024, num_warps=8)
    return out
"""


def add(y: str = "y", scale: str = "2.0", one: str = "1") -> str:
    return ADD.replace("{y}", y).replace("{scale}", scale).replace("{one}", one)


def test_a_launch_becomes_a_cubin_and_a_plan() -> None:
    artifact = built(add())
    (launch,) = launches(artifact)
    assert artifact.arch == "sm_90a"
    assert artifact.plans["default"].device == "cuda"
    assert launch.geometry == Geometry((4, 1, 1), (256, 1, 1))
    assert launch.args[:5] == (Ref(0), Ref(1), Ref(2), 4096, 2.0), "a value of 1 is no argument any more"
    assert launch.ctypes[:5] == ("const float*", "const float*", "float*", "int32_t", "float")
    assert set(launch.args[5:]) <= {None}, "scratch that nobody uses"
    (used,) = artifact.report["kernels"]
    assert used["registers"] > 0
    assert used["threads"] == 256
    assert 0 < used["occupancy"] <= 1
    assert "add" in resources(artifact.binaries[launch.binary])


def test_specialization_follows_values_and_alignment() -> None:
    def binary(**changes: str) -> bytes:
        artifact = built(add(**changes))
        return artifact.binaries[launches(artifact)[0].binary]

    usual = binary()
    assert binary(scale="3.0") == usual, "floats are passed, not compiled in"
    assert binary(one="2") != usual
    assert binary(y="y[1:]") != usual, "an address that 16 does not divide"
    assert binary(y="y[4:]") == usual


AUTOTUNED = """
import torch, triton, triton.language as tl

@triton.autotune([triton.Config({"BLOCK": b}, num_warps=w, num_stages=s) for b, w, s in {configs}], key=["n"])
@triton.heuristics({"EVEN": lambda args: args["n"] % args["BLOCK"] == 0})
@triton.jit
def product(x, y, out, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * n + i[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, n, BLOCK):
        acc = tl.dot(tl.load(x + at + k), tl.load(y + at + k * n), acc)
    tl.store(out + at, acc)

def forward(x, y):
    out = torch.empty_like(x)
    product[lambda meta: (meta["BLOCK"] // meta["BLOCK"],)](x, y, out, 1024)
    return out
"""
SQUARE = TensorSpec((1024, 1024), (1024, 1), "float32")


def test_autotune_configurations_become_alternatives() -> None:
    source = AUTOTUNED.replace("{configs}", "((16, 1, 2), (32, 4, 2), (128, 4, 4))")
    artifact = built(source, inputs=(SQUARE, SQUARE), outputs=(SQUARE,))
    (launch,) = launches(artifact)
    labels = [launch.label, *(other.label for other in launch.alternatives)]
    assert [label.split(",")[0] for label in labels] == ["BLOCK=16", "BLOCK=32"], "the third needs 512 KiB"
    assert artifact.plans["default"].choices == {1: 2}
    assert len(artifact.binaries) == 2
    assert len(artifact.report["kernels"]) == 2


def test_no_configuration_fits_the_device() -> None:
    source = AUTOTUNED.replace("{configs}", "((128, 4, 4), (128, 8, 4))")
    with pytest.raises(BuildError, match=r"no configuration of product.*bytes of shared memory") as caught:
        built(source, inputs=(SQUARE, SQUARE), outputs=(SQUARE,))
    assert caught.value.outcome == "constraints"


def test_a_smaller_device_has_other_limits() -> None:
    source = AUTOTUNED.replace("{configs}", "((64, 4, 6),)")
    assert built(source, inputs=(SQUARE, SQUARE), outputs=(SQUARE,)).arch == "sm_90a"
    with pytest.raises(BuildError, match="sm_86 has 101376"):
        built(source, inputs=(SQUARE, SQUARE), outputs=(SQUARE,), arch="sm_86")
    with pytest.raises(BuildError, match=r"unknown GPU architecture 'sm_91'"):
        built(source, inputs=(SQUARE, SQUARE), outputs=(SQUARE,), arch="sm_91")


DESCRIPTOR = """
import torch, triton, triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

@triton.jit
def copy(source, out, n, BLOCK: tl.constexpr):
    target = tl.make_tensor_descriptor(out, [n, n], [n, 1], [BLOCK, BLOCK])
    target.store([0, 0], source.load([0, 0]))

def forward(x, y):
    out = torch.empty_like(x)
    copy[(1,)](TensorDescriptor.from_tensor(x, [64, 64]), out, 1024, BLOCK=64)
    return out
"""


def test_tensor_descriptors_are_plan_data() -> None:
    half = TensorSpec((1024, 1024), (1024, 1), "float16")
    artifact = built(DESCRIPTOR, inputs=(half, half), outputs=(half,))
    (launch,) = launches(artifact)
    tile = launch.args[0]
    assert isinstance(tile, TensorMap)
    assert (tile.value, tile.shape, tile.box, tile.swizzle) == (0, (1024, 1024), (64, 64), 128)
    assert launch.ctypes[0] == "CUtensorMap"
    assert any(isinstance(a, Scratch) and a.size >= 128 for a in launch.args), (
        "for the one made on the device"
    )


@pytest.mark.parametrize(
    ("body", "outcome", "message"),
    [
        ("add[(4,)](x, y, x, 4096, 1.0, 1, BLOCK=1024); return x", "constraints", "writes to input 0"),
        ("return torch.empty_like(x)", "correctness", "never written"),
        ("add[(0,)](x, y, x, 4096, 1.0, 1, BLOCK=1024); return x", "compile", "is no grid"),
        ("add[(4,)](x, y, 4096, 1.0, 1, BLOCK=1024); return x", "compile", "missing a required argument"),
        ("add[(4,)](x, y, x, 4096, 1.0, 1, BLOCK=1000); return x", "compile", "power of 2"),
        ("return torch.zeros(4096) + x", "constraints", "give device=x.device"),
        ("add.warmup(x, y, x, 1, 1.0, 1, BLOCK=16, grid=(1,)); return x", "compile", "no place in a module"),
        ("return x.cpu()", "constraints", "gives a tensor on cpu"),
    ],
)
def test_what_is_refused(body: str, outcome: str, message: str) -> None:
    source = add().split("def forward")[0] + f"def forward(x, y):\n    {body}\n"
    with pytest.raises(BuildError, match=message) as caught:
        built(source)
    assert caught.value.outcome == outcome


def test_questions_about_the_device_are_answered() -> None:
    source = add().replace(
        "n = x.numel()",
        """n = x.numel()
    assert x.is_cuda and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    out = torch.empty(torch.cuda.get_device_properties(x.device).multi_processor_count, device="cuda")
    utils = triton.runtime.driver.active.utils
    assert utils.get_device_properties(0)["multiprocessor_count"] == out.numel()
    out = torch.empty(4096, device=x.device)""",
    )
    assert launches(built(source, multiprocessors=78))


CARRIED = """
import torch, triton, triton.language as tl

@triton.jit
def helper(target, value):
    tl.atomic_add(target, value)

@triton.jit
def walk(x, y, out, n, STEPS: tl.constexpr):
    i = tl.arange(0, 128)
    source, other, target = x + i, y + i, out + i
    for _ in range(STEPS):
        if n > 5:
            chosen = source
        else:
            chosen = other
        value = tl.load(chosen)
        helper(target, value)
        source += 128
        target += 128

def forward(x, y):
    out = torch.zeros_like(x)
    walk[(1,)](x, y, out, 4096, STEPS=32)
    return out
"""


def test_pointers_are_followed_through_loops_branches_and_calls() -> None:
    (launch,) = launches(built(CARRIED))
    assert launch.ctypes[:3] == ("const float*", "const float*", "float*")


def test_a_module_without_kernels_is_a_plan_of_calls() -> None:
    artifact = built("import torch\ndef forward(x, y):\n    return torch.relu(x[::2]).sum() + y\n")
    assert artifact.lane == "plan"
    assert not artifact.binaries
    assert artifact.plans["default"].return_specs == (VECTOR,)


def test_python_that_depends_on_data_goes_to_the_host_lane() -> None:
    artifact = built("def forward(x, y):\n    return x if x.sum() > 0 else y\n")
    assert artifact.lane == "host"
    assert "depends on the contents" in artifact.report["host_reason"]
