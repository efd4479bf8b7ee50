"""CUDA C++ on tensor cores: what is taken on, computed thread by thread on a CPU, and compiled for sm_90a."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import pytest
import torch

from ke_gym.codegen import Group, Plan, Program, cuda_tensor_cores, rewrites
from ke_gym.codegen.legality import nests_of
from ke_gym.codegen.matmuls import Matmul
from ke_gym.codegen.pairs import Pairs
from ke_gym.codegen.variants import nest_of
from ke_gym.codegen.windows import SHARED, Windowed, odd
from ke_gym.languages import nvrtc
from ke_gym.languages.base import Signature
from tests.codegen.cuda_on_host import ran
from tests.codegen.interpret import scheduled
from tests.codegen.tensor_core_cases import CONVOLUTIONS as CASES
from tests.codegen.tensor_core_cases import PAIRS, program, task
from tests.languages.gpu_modules import built, launches

TRAVEL = {
    "whole": (True, True),
    "residual": (True, True),
    "several_tiles": (True, True),
    "dilated": (True, True),
    "odd": (False, False),
    "odd_input": (False, True),
    "odd_output": (True, False),
    "interactions": (True,),
    "odd_rows": (True,),
    "two_operands": (True, True),
    "without_matrix": (True,),
}


@pytest.mark.parametrize("name", [*CASES, *PAIRS])
def test_modules_compute_the_reference(name: str, tmp_path: Path) -> None:
    made, given = program(name), task(name)
    with patch.object(cuda_tensor_cores, "helpers", lambda used: []):  # the header has its own
        text = made.emit(made.seeds()[0])
    reference = given.reference("gpu")
    inputs = given.inputs("gpu", 3)
    (wanted,) = reference(*inputs)
    torch.testing.assert_close(ran(text, tmp_path, inputs, reference.state), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100a"])
@pytest.mark.parametrize("language", ["cuda", "triton"])
def test_other_architectures_have_no_warpgroup_products(
    arch: str, language: Literal["cuda", "triton"]
) -> None:
    for name, kind in (("residual", Windowed), ("interactions", Pairs)):
        made = Program.from_task(task(name), "cuda", language)
        assert made.on("sm_90a") is made
        other = made.on(arch)
        kernels = nests_of(other.graphs[0], other.seeds()[0].plans[0])
        assert any(isinstance(kernel, Pairs) for kernel in kernels) == (kind is Pairs)
        assert not any(isinstance(kernel, (Windowed, Matmul)) for kernel in kernels)
        for first in made.seeds():
            assert other.legal(first) != any(
                isinstance(k, (Windowed, Matmul)) for k in nests_of(made.graphs[0], first.plans[0])
            )


def test_among_triton_kernels_two_products_may_be_one_in_cuda() -> None:
    made = Program.from_task(task("interactions"), "cuda", "triton")
    first, second = made.seeds()[:2]
    assert isinstance(nest_of(made, first, 0, 0), Pairs)
    assert "lang.cuda(" not in made.emit(second)
    offered = [rewrites.apply(made, second, "matrix_unit", draw) for draw in range(3)]
    assert first in offered


@pytest.mark.parametrize("name", [*CASES, *PAIRS])
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
    made = program("several_tiles", BATCH=60)
    seed = made.seeds()[0]
    for launch in (
        (("m", 64),),
        (("n", 104),),
        (("stages", 1),),
        (("loads", "pointers"),),
        (("persistent", 264),),
        (("apart", True), ("stages", 1)),
    ):
        changed = scheduled(made, launch)
        assert made.legal(changed) and made.emit(changed) != made.emit(seed)
    for strategy in ("tile_block", "prefetch_pipeline", "sync_launch", "fission"):
        assert rewrites.apply(made, seed, strategy, 0) is not None


@pytest.mark.parametrize(
    "sizes", [{"INPUTS": 8}, {"INPUTS": 272}, {"TAPS": 64, "PADDING": 32, "INPUTS": 96}], ids=str
)
def test_the_rest_are_products_of_matrices(sizes: dict[str, int]) -> None:
    made = program("whole", **sizes)
    assert isinstance(nest_of(made, made.seeds()[0], 0, 0), Matmul)


@pytest.mark.parametrize("name", ["whole", "without_matrix"])
def test_sums_along_rows_are_a_kernel_of_their_own(name: str) -> None:
    made = program(name, SUMMED=True)
    first, *rest = made.seeds()[0].plans[0].groups
    assert isinstance(nest_of(made, made.seeds()[0], 0, 0), (Pairs, Windowed))
    assert len(first.nodes) == 1 and len(rest) == 1
    together = Plan((replace(first, nodes=(*first.nodes, *rest[0].nodes)),))
    assert not made.legal(replace(made.seeds()[0], plans=(together,)))


def test_products_read_no_further_than_shared_memory() -> None:
    made = program("whole", INPUTS=16, OUTPUTS=16, LENGTH=8, TAPS=1, PADDING=0)
    work: object = nest_of(made, made.seeds()[0], 0, 0)
    assert isinstance(work, Windowed)
    assert work.shared >= ((work.depth // 8 - 1) * (work.height + 1) + work.blocks.m) * 16


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
