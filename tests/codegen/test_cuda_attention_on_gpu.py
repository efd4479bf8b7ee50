"""Attention in CUDA C++, run on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ke_gym.languages.base import Signature
from tests.codegen.attention_cases import CASES, program, schedule, task
from tests.codegen.interpret import scheduled
from tests.languages.gpu_modules import built

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

LAUNCHES = [(name, CASES[name][1]) for name in CASES] + [
    ("causal", launch) for launch in ((("m", 64),), (("turns", False),), (("n", 32), ("stages", 4)))
]


@pytest.mark.parametrize("name, launch", LAUNCHES, ids=str)
def test_plans_compute_the_reference(name: str, launch: Any) -> None:
    from ke_gym.targets.cuda_driver import Driver
    from ke_gym.targets.cuda_executor import CudaRunner

    given, made = task(name), program(name)
    signature = Signature.of(given, ["gpu"])
    artifact = built(
        made.emit(scheduled(made, launch) if launch else schedule(name)), "cuda",
        inputs=signature.inputs["gpu"], outputs=signature.outputs["gpu"], state=dict(signature.state["gpu"]),
    )  # fmt: skip
    device = torch.device("cuda", 0)
    inputs = given.inputs("gpu", 3)
    (wanted,) = given.reference("gpu")(*inputs)
    runner = CudaRunner(
        artifact, "default", [x.to(device) for x in inputs], {}, driver=Driver(), device=device
    )
    (got,) = [tensor.cpu() for tensor in runner.run()]
    torch.cuda.synchronize()
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2, equal_nan=True)
