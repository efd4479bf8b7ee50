"""Attention in CUDA C++: what is taken on, computed thread by thread on a CPU, and compiled for sm_90a."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ke_gym.codegen import Program, cuda_tensor_cores, rewrites
from ke_gym.codegen.attentions import GROUP, REGISTERS, WORKING, Attention
from ke_gym.codegen.flash import Flash
from ke_gym.codegen.schedule import Schedule
from ke_gym.codegen.variants import nest_of
from ke_gym.codegen.windows import SHARED
from ke_gym.languages import nvrtc
from ke_gym.languages.base import Signature
from ke_gym.tasks import Task
from tests.codegen.attention_cases import CASES, program, schedule, task
from tests.codegen.cuda_on_host import ran
from tests.codegen.interpret import scheduled
from tests.languages.gpu_modules import built, launches

MASKED = """
import torch
import torch.nn as nn
shapes = {"cpu": {}, "gpu": {}}
class Model(nn.Module):
    def forward(self, query, key, value):
        scores = query @ key.transpose(-1, -2) / 8.0
        at = torch.arange(80, device=query.device)
        return torch.softmax(MASK, dim=-1) @ value
def get_inputs():
    return [torch.randn(1, 2, 80, 64).half() for _ in range(3)]
"""


def kernel(made: Program, plan: Schedule) -> Attention:
    found: object = nest_of(made, plan, 0, 0)
    assert isinstance(found, Attention)
    return found


@pytest.mark.parametrize("name", CASES)
def test_modules_compute_the_reference(name: str, tmp_path: Path) -> None:
    made, plan = program(name), schedule(name)
    assert len(plan.plans[0].groups) == 1
    work = kernel(made, plan)
    assert work.shared <= SHARED and work.visible == {"causal": 1, "three_groups": 1, "later": 231}.get(name)
    with patch.object(cuda_tensor_cores, "helpers", lambda used: []):  # the header has its own
        text = made.emit(plan)
    reference = task(name).reference("gpu")
    inputs = task(name).inputs("gpu", 3)
    (wanted,) = reference(*inputs)
    assert wanted.isnan().any() == (name == "causal")
    got = ran(text, tmp_path, inputs, reference.state)
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2, equal_nan=True)


@pytest.mark.parametrize("name", ["causal", "biased"])
def test_modules_compile_without_a_gpu(name: str) -> None:
    if not nvrtc.tools():
        pytest.skip("needs NVRTC or nvcc")
    signature = Signature.of(task(name), ["gpu"])
    artifact = built(
        program(name).emit(schedule(name)), "cuda", inputs=signature.inputs["gpu"],
        outputs=signature.outputs["gpu"], state=dict(signature.state["gpu"]),
    )  # fmt: skip
    *_, launch = launches(artifact)
    assert launch.ctypes.count("CUtensorMap") == 3
    assert len(launches(artifact)) == (2 if name == "causal" else 1)
    assert all(report["stack"] == 0 and report["occupancy"] > 0 for report in artifact.report["kernels"])


def test_heads_are_read_where_they_lie() -> None:
    """Neither transposed nor repeated: of a key, batch and head are dimensions of its tensor map."""
    work = kernel(program("causal", BATCH=2), schedule("causal", BATCH=2))
    query, key, _ = work.tiles
    assert query.shape == (2, 2, 160, 64) and query.stride == (160 * 128, 64, 128, 1)
    assert key.shape == (2, 160, 64) and key.stride == (160 * 64, 64, 1)


def test_knobs_lead_to_other_kernels() -> None:
    made = program("causal", ROWS=512, KEYS=512)
    seed = made.seeds()[0]
    for launch in ((("m", 64),), (("m", 192),), (("n", 96),), (("stages", 3),), (("turns", False),)):
        changed = scheduled(made, launch)
        assert made.legal(changed) and made.emit(changed) != made.emit(seed)
    for strategy in ("tile_block", "prefetch_pipeline", "sync_launch", "fission"):
        assert rewrites.apply(made, seed, strategy, 0) is not None


def test_blocks_fit_registers_and_shared_memory() -> None:
    made = program("causal", ROWS=512, KEYS=512, DIM=256, VALUES=256)
    knobs = kernel(made, made.seeds()[0]).knobs()
    fitting = []
    for m in knobs["m"]:
        for n in knobs["n"]:
            changed = scheduled(made, (("m", m), ("n", n)))
            if made.legal(changed):
                fitting.append((m, n))
                assert 3 * n // 4 + 128 + WORKING[m // GROUP] <= REGISTERS[m // GROUP][1]
    assert {m for m, _ in fitting} == {64, 128} and max(n for _, n in fitting) < 112


@pytest.mark.parametrize(
    "sizes",
    [{"DTYPE": torch.float32}, {"DIM": 320}, {"VALUES": 20}, {"DIM": 36}, {"KEYS": 8, "ROWS": 8}],
    ids=str,
)
def test_the_rest_stays_with_the_library(sizes: dict[str, Any]) -> None:
    made = program("causal", SPOILT=False, **sizes)
    seed = made.seeds()[0]
    found = [nest_of(made, seed, 0, g) for g in range(len(seed.plans[0].groups))]
    assert not any(isinstance(nest, Attention) for nest in found)


def test_other_architectures_have_no_such_products() -> None:
    made = program("causal").on("sm_90")
    assert not made.legal(schedule("causal"))


def test_among_triton_kernels_attention_is_one_in_cuda_first() -> None:
    made = program("causal", "triton")
    first = made.seeds()[0]
    kernel(made, first)
    assert "lang.cuda(" in made.emit(first) and "@triton.jit" not in made.emit(first)
    other = rewrites.apply(made, first, "matrix_unit", 0)
    assert other in made.seeds()
    work: object = nest_of(made, other, 0, 0)
    assert isinstance(work, Flash) and not isinstance(work, Attention)
    assert first in (rewrites.apply(made, other, "matrix_unit", draw) for draw in range(3))
    elsewhere = made.on("sm_90").seeds()[0]
    assert "@triton.jit" in made.emit(elsewhere)


MASKS = {
    "scores.masked_fill(~torch.ones(80, 80, dtype=torch.bool).tril(), -torch.inf)": 1,
    "scores.masked_fill(torch.tril(torch.ones(80, 80)) == 0, -torch.inf)": 1,
    "torch.where(at[:, None] >= at, scores, -torch.inf)": 1,
    "torch.where((at[:, None] >= at) & (at[:, None] - at < 17), scores, -torch.inf)": 1,
    "scores.masked_fill(~((at[:, None] + 3 >= at) & (at[:, None] - at < 17)), -torch.inf)": 4,
    "scores.masked_fill((at[:, None] < at) | (at > 70), -torch.inf)": 1,
    "scores + torch.full((80, 80), -torch.inf, dtype=scores.dtype).triu(1)": None,  # an infinite score is NaN then
    "scores.masked_fill(at[:, None] < at, -1e4)": None,
}


@pytest.mark.parametrize("mask", MASKS)
def test_causal_masks_are_known_however_they_are_written(mask: str, tmp_path: Path) -> None:
    file = tmp_path / "masked.py"
    file.write_text(MASKED.replace("MASK", mask))
    given = Task.from_file(file)
    made = Program.from_task(given, "cuda", "cuda")
    plan = made.seeds()[0]
    assert kernel(made, plan).visible == MASKS[mask]
    with patch.object(cuda_tensor_cores, "helpers", lambda used: []):
        text = made.emit(plan)
    inputs = given.inputs("gpu", 3)
    (wanted,) = given.reference("gpu")(*inputs)
    torch.testing.assert_close(ran(text, tmp_path, inputs, {}), wanted, rtol=2e-2, atol=2e-2)
