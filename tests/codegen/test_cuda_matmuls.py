"""Products of matrices in CUDA C++: legality, arithmetic on a CPU thread by thread, compilation for sm_90a."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ke_gym import proposers
from ke_gym.codegen import Program, cuda_tensor_cores, rewrites
from ke_gym.codegen.matmuls import Matmul
from ke_gym.codegen.schedule import Schedule
from ke_gym.codegen.variants import nest_of
from ke_gym.codegen.windows import SHARED
from ke_gym.languages import nvrtc
from ke_gym.languages.base import Signature
from ke_gym.testing import fake_gpu
from tests.codegen.cuda_on_host import ran
from tests.codegen.interpret import scheduled
from tests.codegen.tensor_core_cases import MATMULS, WINDOWS, program, task
from tests.languages.gpu_modules import built, launches

ALL = MATMULS | WINDOWS


def kernel(made: Program, schedule: Schedule) -> Matmul:
    found: object = nest_of(made, schedule, 0, 0)
    assert isinstance(found, Matmul)
    return found


def check(name: str, schedule: Schedule, folder: Path, **sizes: Any) -> None:
    """Whether the module computes the reference, its kernels run on this CPU."""
    made, given_ = program(name, **sizes), task(name, **sizes)
    kernel(made, schedule)
    with patch.object(cuda_tensor_cores, "helpers", lambda used: []):  # the header has its own
        text = made.emit(schedule)
    reference = given_.reference("gpu")
    inputs = given_.inputs("gpu", 3)
    wanted = reference(*inputs)
    got = ran(text, folder, inputs, reference.state)
    for one, other in zip([got] if isinstance(got, torch.Tensor) else got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ALL)
def test_modules_compute_the_reference(name: str, tmp_path: Path) -> None:
    check(name, scheduled(program(name), ALL[name][1]), tmp_path)


@pytest.mark.parametrize(
    "sizes", [{"LEFT": True, "ROWS": 72}, {"DEPTH": 104, "ROWS": 77, "DTYPE": torch.bfloat16}], ids=str
)
def test_an_operand_may_be_computed_as_it_is_read(sizes: dict[str, Any], tmp_path: Path) -> None:
    made = program("plain", BEFORE=True, **sizes)
    seed = made.seeds()[0]
    assert len(seed.plans[0].groups) == 2
    drafts = (rewrites.apply(made, seed, "fuse", draw) for draw in range(8))
    fused = next(s for s in drafts if s is not None and len(s.plans[0].groups) == 1)
    assert kernel(made, fused).tiles[0] is None
    check("plain", fused, tmp_path, BEFORE=True, **sizes)


SIZES = st.fixed_dictionaries(
    {
        "ROWS": st.integers(9, 18).map(lambda n: 8 * n),
        "COLUMNS": st.integers(17, 24).map(lambda n: 8 * n),
        "DEPTH": st.integers(2, 25).map(lambda n: 8 * n),
        "BATCH": st.sampled_from([0, 2]),
        "LEFT": st.booleans(),
        "RIGHT": st.booleans(),
        "DTYPE": st.sampled_from([torch.float16, torch.bfloat16]),
        "AFTER": st.sampled_from(["", "residual", "two"]),
    }
)
WIDTHS = st.sampled_from([16, 32, 64, 128])
REST = {
    "k": st.sampled_from([64, 128]), "stages": st.sampled_from([2, 3]), "group": st.sampled_from([1, 4]),
    "turned": st.booleans(),
}  # fmt: skip
TILES = st.sampled_from([(64, 4), (128, 4), (128, 8)]).flatmap(
    lambda tile: st.fixed_dictionaries(
        {"m": st.just(tile[0]), "warps": st.just(tile[1]), "n": WIDTHS, **REST}
    )
)
LAUNCHES = st.fixed_dictionaries(
    {},
    optional={
        "m": st.sampled_from([64, 128, 256]), "n": st.one_of(WIDTHS, st.just(256)), "warps": st.sampled_from([4, 8]),
        "split": st.sampled_from([1, 2, 4]), "persistent": st.sampled_from([0, 132]), **REST,
    },
)  # fmt: skip


def listed(launch: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(launch.items()))


@settings(max_examples=2, deadline=None)
@given(SIZES, TILES)
def test_any_sizes_layouts_and_blocks(sizes: dict[str, Any], launch: dict[str, Any]) -> None:
    made = program("plain", **sizes)
    schedule = scheduled(made, listed(launch))
    assert made.legal(schedule)
    with TemporaryDirectory() as folder:
        check("plain", schedule, Path(folder), **sizes)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(ALL)), LAUNCHES)
def test_what_is_legal_fits(name: str, launch: dict[str, Any]) -> None:
    made = program(name)
    schedule = scheduled(made, listed(launch))
    if not made.legal(schedule):
        return
    found = kernel(made, schedule)
    assert found.shared <= SHARED and not any(size % 1024 for size in found.sections)
    assert found.heights * 64 * (found.blocks.warps // 4) == found.blocks.m
    assert found.resident * found.threads * (found.heights * found.blocks.n // 2 + 32) <= 65536
    for tile in filter(None, found.tiles):
        assert len(tile.shape) == 3 and not any(stride * found.size % 16 for stride in tile.stride[:2])
    assert not found.sent or (found.shape.n % 8 == 0 and found.blocks.n % 64 == 0)


@pytest.mark.parametrize(
    "name", ["large", "across", "split", "single", "points", "image", "volume", "image_tf32"]
)
def test_modules_compile_without_a_gpu(name: str) -> None:
    if not nvrtc.tools():
        pytest.skip("needs NVRTC or nvcc")
    made = program(name)
    signature = Signature.of(task(name), ["gpu"])
    artifact = built(
        made.emit(scheduled(made, ALL[name][1])), "cuda", inputs=signature.inputs["gpu"],
        outputs=signature.outputs["gpu"], state=dict(signature.state["gpu"]),
    )  # fmt: skip
    # Two blocks share the registers: a word or two of an epilogue may be spilled.
    assert all(k["stack"] <= 16 and k["occupancy"] > 0 for k in artifact.report["kernels"])
    first, *rest = launches(artifact)
    one = name in ("single", "image", "volume", "image_tf32")  # an operand is computed, or lies across
    assert first.ctypes.count("CUtensorMap") >= (1 if one else 2) and len(rest) == (name == "split")


@pytest.mark.parametrize(
    "sizes",
    [{"DEPTH": 100}, {"COLUMNS": 165, "RIGHT": False}, {"DTYPE": torch.float32}, {"DEPTH": 8}],
    ids=str,
)
def test_the_rest_stays_with_the_library(sizes: dict[str, Any]) -> None:
    made = program("plain", **sizes)
    assert "torch.ops.aten.mm" in made.emit(made.seeds()[0])


def test_convolutions_that_cannot_be_fetched_stay_with_the_library() -> None:
    made = program("image", INPUTS=3)  # rows of weights begin at no multiple of 16 bytes
    assert "torch.ops.aten.convolution" in made.emit(made.seeds()[0])


def test_other_architectures_leave_products_to_the_library() -> None:
    made = program("large")
    for arch in ("sm_80", "sm_90", "sm_100a"):
        other = made.on(arch)
        assert not other.legal(made.seeds()[0]) and "torch.ops.aten" in other.emit(other.seeds()[0])


@pytest.mark.parametrize("arch, built_for", [("sm_80", "sm_80"), ("sm_90", "sm_90a"), ("sm_100", "sm_100a")])
def test_drafts_are_for_the_gpu_that_is_searched_on(arch: str, built_for: str) -> None:
    evaluator: Any = SimpleNamespace(facts=replace(fake_gpu.FACTS, arch=arch))
    made: Any = proposers.make("rewriter", task("large"), "cuda", evaluator=evaluator)
    assert {graph.arch for graph in made.program.graphs} == {built_for}
    assert ("multiply_f16" in made.program.emit(made.seeds[0])) == (arch == "sm_90")


def test_strategies_lead_to_other_kernels() -> None:
    made = program("plain", ROWS=4096, COLUMNS=4096, DEPTH=4096)
    seed = made.seeds()[0]
    assert kernel(made, seed).blocks.persistent
    for strategy in (
        "tile_block", "prefetch_pipeline", "traversal_swizzle", "sync_launch",
        "layout_coalesce", "fission", "param_tune",
    ):  # fmt: skip
        changed = rewrites.apply(made, seed, strategy, 0)
        assert changed is not None and made.emit(changed) != made.emit(seed), strategy


def test_among_triton_kernels_a_product_may_be_one_in_cuda() -> None:
    made = Program.from_task(task("large"), "cuda", "triton")
    seed = made.seeds()[0]
    assert "lang.cuda(" not in made.emit(seed)
    offered = [rewrites.apply(made, seed, "matrix_unit", draw) for draw in range(4)]
    (other,) = {s for s in offered if s is not None and isinstance(nest_of(made, s, 0, 0), Matmul)}
    assert "lang.cuda(" in made.emit(other)
    assert rewrites.apply(made, other, "matrix_unit", 0) == seed
    assert rewrites.apply(made.on("sm_80"), seed, "matrix_unit", 0) is None


def test_several_shape_sets_choose_blocks_each() -> None:
    made = task("plain")
    both = replace(made, shapes={"cpu": {}, "gpu": {}, "more": {"ROWS": 4096, "COLUMNS": 4096}})
    graphs = Program.from_task(both, "cuda", "cuda")
    first, second = (nest_of(graphs, graphs.seeds()[0], p, 0) for p in range(2))
    assert isinstance(first, Matmul) and isinstance(second, Matmul) and first.blocks != second.blocks
