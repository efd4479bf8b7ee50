"""Products of a few rows in CUDA C++, brought by bulk copies or in registers: on a CPU, and compiled for sm_90a."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from ke_gym.codegen import Program, cuda_tensor_cores, rewrites
from ke_gym.codegen.knobs import knobs
from ke_gym.codegen.matmuls import Matmul
from ke_gym.codegen.pairs import Blocks, Pairs
from ke_gym.codegen.product_blocks import FILL
from ke_gym.codegen.schedule import Schedule
from ke_gym.codegen.variants import nest_of
from ke_gym.codegen.windows import SHARED
from ke_gym.languages import nvrtc
from ke_gym.languages.base import Signature
from tests.codegen.cuda_on_host import ran
from tests.codegen.interpret import scheduled
from tests.codegen.tensor_core_cases import PAIRS, WALKED_PAIRS, program, task
from tests.languages.gpu_modules import built, launches

IN_REGISTERS = (("loads", "pointers"),)


def pairs_of(made: Program, schedule: Schedule) -> Pairs:
    work: object = nest_of(made, schedule, 0, 0)
    assert isinstance(work, Pairs)
    return work


def emitted(made: Program, schedule: Schedule) -> str:
    """For this CPU, whose header has its own helpers."""
    with patch.object(cuda_tensor_cores, "helpers", lambda used: []):
        return made.emit(schedule)


@pytest.mark.parametrize(
    "name, launch",
    [*((name, launch) for name, (_, launch) in WALKED_PAIRS.items()), *((n, IN_REGISTERS) for n in PAIRS)],
    ids=str,
)
def test_warps_walk_over_samples(name: str, launch: tuple[tuple[str, object], ...], tmp_path: Path) -> None:
    made, given = program(name), task(name)
    schedule = scheduled(made, launch)
    assert made.legal(schedule)
    inputs = given.inputs("gpu", 3)
    reference = given.reference("gpu")
    (wanted,) = reference(*inputs)
    got = ran(emitted(made, schedule), tmp_path, inputs, reference.state)
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("launch", [(), IN_REGISTERS], ids=str)
def test_infinities_stay_in_their_rows(launch: tuple[tuple[str, object], ...], tmp_path: Path) -> None:
    made, given = program("odd_rows"), task("odd_rows")
    (x,) = given.inputs("gpu", 3)
    x[0, -1, 5], x[2, 0, 0] = float("inf"), float("nan")
    reference = given.reference("gpu")
    text = emitted(made, scheduled(made, launch) if launch else made.seeds()[0])
    got = ran(text, tmp_path, (x,), reference.state)
    torch.testing.assert_close(got, reference(x)[0], rtol=2e-2, atol=2e-2, equal_nan=True)


@pytest.mark.parametrize("name", PAIRS)
def test_bulk_copies_come_first(name: str) -> None:
    made = program(name)
    seed = made.seeds()[0]
    work = pairs_of(made, seed)
    assert work.bulk and work.same == ("OTHERS" not in PAIRS[name])
    assert (work.after is None) == (name == "without_matrix")
    offered = rewrites.apply(made, seed, "prefetch_pipeline", 0)
    assert offered is not None and made.legal(offered)
    assert {"0.0.loads", "0.0.stages"} <= knobs(made, seed).keys()


@pytest.mark.parametrize("name", PAIRS)
def test_registers_remain_a_choice(name: str) -> None:
    made = program(name)
    schedule = scheduled(made, IN_REGISTERS)
    assert made.legal(schedule) and pairs_of(made, schedule).shared == 0
    assert "0.0.stages" not in knobs(made, schedule)
    assert "tensor_map" not in made.emit(schedule)
    for launch in ((("warps", 2),), (("persistent", 132),)):
        assert made.legal(scheduled(program(name, BATCH=6000), (*IN_REGISTERS, *launch)))
    assert not made.legal(scheduled(made, (*IN_REGISTERS, ("stages", 2))))
    assert not made.legal(scheduled(made, (*IN_REGISTERS, ("warps", 16))))


@pytest.mark.parametrize(
    "sizes, blocks",
    [
        ({"ROWS": 24}, Blocks(16, FILL, 2, "descriptors")),
        ({"ROWS": 40}, Blocks(16, FILL, 1, "descriptors")),
        ({"ROWS": 48}, Blocks(16, FILL, 1, "descriptors")),
        ({"ROWS": 64}, Blocks(8, FILL, 1, "descriptors")),
        ({"ROWS": 24, "BATCH": 600}, Blocks(4, FILL, 2, "descriptors")),
    ],
    ids=str,
)
def test_shared_memory_holds_as_many_samples_as_go_in(sizes: dict[str, int], blocks: Blocks) -> None:
    made = program("interactions", **{"DIM": 128, "BATCH": 8192} | sizes)
    work = pairs_of(made, made.seeds()[0])
    assert work.blocks == blocks
    assert work.slot == sizes["ROWS"] * 256 and work.shared <= SHARED
    more = (("warps", 16), ("stages", 4), ("persistent", FILL))
    assert not made.legal(scheduled(made, more))
    assert not made.legal(scheduled(made, (("persistent", 8 * FILL), ("warps", 8))))


@pytest.mark.parametrize(
    "arch, bulk", [("sm_80", False), ("sm_90", True), ("sm_100a", True), ("sm_120a", False)]
)
def test_other_gpus_have_what_they_have_instructions_for(arch: str, bulk: bool) -> None:
    made = program("interactions").on(arch)
    assert pairs_of(made, made.seeds()[0]).bulk == bulk
    assert made.legal(scheduled(made, (("loads", "descriptors"),))) == bulk


@pytest.mark.parametrize(
    "sizes", [{"ROWS": 65}, {"DIM": 72}, {"ROWS": 64, "OTHERS": 64, "DIM": 256}], ids=str
)
def test_rows_that_registers_do_not_hold_are_tiles_or_stay_with_the_library(sizes: dict[str, int]) -> None:
    made = program("interactions", **sizes)
    assert isinstance(nest_of(made, made.seeds()[0], 0, 0), Matmul)
    for arch in ("sm_80", "sm_90", "sm_100a"):
        other = made.on(arch)
        assert "torch.ops.aten.bmm" in other.emit(other.seeds()[0])


@pytest.mark.parametrize("launch", [(), IN_REGISTERS], ids=str)
@pytest.mark.parametrize("sizes", [{"ROWS": 24}, {"ROWS": 40}, {"ROWS": 48}, {"ROWS": 56}], ids=str)
def test_registers_and_shared_memory_hold_it_all(
    sizes: dict[str, int], launch: tuple[tuple[str, object], ...]
) -> None:
    if not nvrtc.tools():
        pytest.skip("needs NVRTC or nvcc")
    sizes = {"DIM": 128, "BATCH": 8192} | sizes
    made, given = program("interactions", **sizes), task("interactions", **sizes)
    schedule = scheduled(made, launch) if launch else made.seeds()[0]
    work, signature = pairs_of(made, schedule), Signature.of(given, ["gpu"])
    artifact = built(
        made.emit(schedule), "cuda", inputs=signature.inputs["gpu"], outputs=signature.outputs["gpu"],
        state=dict(signature.state["gpu"]),
    )  # fmt: skip
    (kernel,), (launched,) = artifact.report["kernels"], launches(artifact)
    assert kernel["stack"] == 0 and kernel["shared"] == work.shared
    assert kernel["registers"] * work.threads <= 65536
    assert launched.ctypes.count("CUtensorMap") == int(work.bulk)
