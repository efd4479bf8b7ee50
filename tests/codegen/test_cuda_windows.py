"""Convolutions on tensor cores in CUDA C++: what is taken on, and that it compiles for sm_90a without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ke_gym.codegen import Group, Plan, Program, rewrites
from ke_gym.codegen.variants import nest_of
from ke_gym.codegen.windows import SHARED, Windowed, odd
from ke_gym.languages import nvrtc
from ke_gym.languages.base import Signature
from tests.codegen.interpret import with_launch
from tests.codegen.windows_cases import CASES, program, task
from tests.languages.gpu_modules import built, launches

TRAVEL = {
    "whole": (True, True),
    "residual": (True, True),
    "several_tiles": (True, True),
    "dilated": (True, True),
    "odd": (False, False),
    "odd_input": (False, True),
    "odd_output": (True, False),
}


@pytest.mark.parametrize("name", CASES)
def test_modules_compile_without_a_gpu(name: str) -> None:
    if not nvrtc.tools():
        pytest.skip("needs NVRTC or nvcc")
    made = program(name)
    text = made.emit(made.seeds()[0])
    signature = Signature.of(task(name), ["gpu"])
    artifact = built(
        text, "cuda", inputs=signature.inputs["gpu"], outputs=signature.outputs["gpu"],
        state=dict(signature.state["gpu"]),
    )  # fmt: skip
    (launch,) = launches(artifact)
    assert launch.ctypes.count("CUtensorMap") == sum(TRAVEL[name])
    (kernel,) = artifact.report["kernels"]
    assert kernel["stack"] == 0 and kernel["occupancy"] > 0


@pytest.mark.parametrize("name", CASES)
def test_what_fits_is_taken_on(name: str) -> None:
    made = program(name)
    seed = made.seeds()[0]
    work: object = nest_of(made, seed, 0, 0)
    assert isinstance(work, Windowed)
    assert (work.blocks.loads == "descriptors", work.sent) == TRAVEL[name]
    assert work.shared <= SHARED and work.blocks.n % 16 == 8
    # Neighbouring rows of shared memory begin in different banks.
    assert {row * work.width * 2 // 16 % 8 for row in range(8)} == set(range(8))
    assert {row * (work.height + 1) % 8 for row in range(8)} == set(range(8))
    assert work.span >= work.blocks.n + work.halo and work.width >= work.span
    offsets = (work.sections[0], work.sections[1], work.sections[2], work.blocks.n * 32)
    assert all(size % 128 == 0 for size in offsets), "bulk copies begin at multiples of 128 bytes"


def test_knobs_lead_to_other_kernels() -> None:
    made = program("several_tiles")
    seed = made.seeds()[0]
    for launch in (
        (("m", 64),),
        (("n", 104),),
        (("stages", 1),),
        (("loads", "pointers"),),
        (("persistent", 264),),
    ):
        changed = with_launch(seed, launch)
        assert made.legal(changed) and made.emit(changed) != made.emit(seed)
    for strategy in ("tile_block", "prefetch_pipeline", "sync_launch", "fission"):
        assert rewrites.apply(made, seed, strategy, 0) is not None


@pytest.mark.parametrize(
    "sizes", [{"INPUTS": 8}, {"INPUTS": 272}, {"TAPS": 64, "PADDING": 32, "INPUTS": 96}], ids=str
)
def test_the_rest_stays_with_the_library(sizes: dict[str, int]) -> None:
    made = Program.from_task(replace(task("whole"), shapes={"cpu": sizes, "gpu": sizes}), "cuda", "cuda")
    assert "torch.ops.aten.convolution" in made.emit(made.seeds()[0])


def test_odd_numbers_of_eights() -> None:
    assert [odd(size) for size in (1, 8, 9, 24, 200, 202)] == [8, 8, 24, 24, 200, 216]


def test_among_triton_kernels_a_convolution_may_be_one_in_cuda() -> None:
    made = Program.from_task(task("residual"), "cuda", "triton")
    first, second = made.seeds()[:2]
    assert isinstance(nest_of(made, first, 0, 0), Windowed)
    assert "lang.cuda(" in made.emit(first) and "@triton.jit" not in made.emit(first)
    assert "@triton.jit" in made.emit(second) and "lang.cuda(" not in made.emit(second)
    assert rewrites.apply(made, first, "matrix_unit", 0) == second
    assert rewrites.apply(made, second, "matrix_unit", 0) == first


def test_modules_of_two_languages_compile() -> None:
    if not nvrtc.tools():
        pytest.skip("needs NVRTC or nvcc")
    made = Program.from_task(task("residual"), "cuda", "triton")
    seeds = made.seeds()
    apart = next(seed for seed in seeds if "aten.convolution" in made.emit(seed))
    mixed = replace(
        apart,
        plans=tuple(
            Plan(
                tuple(
                    sorted((*plan.groups, Group(("convolution",), launch=(("language", "cuda"),))), key=str)
                )
            )
            for plan in apart.plans
        ),
    )
    assert made.legal(mixed)
    signature = Signature.of(task("residual"), ["gpu"])
    artifact = built(
        made.emit(mixed), "triton", inputs=signature.inputs["gpu"], outputs=signature.outputs["gpu"],
        state=dict(signature.state["gpu"]),
    )  # fmt: skip
    binaries = {launch.binary.partition("_")[0] for launch in launches(artifact)}
    assert binaries == {"cuda", "triton"}
