"""CUDA C++ on tensor cores, run on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ke_gym.languages.base import Signature
from tests.codegen.interpret import scheduled
from tests.codegen.tensor_core_cases import CONVOLUTIONS, MATMULS, PAIRS, WALKED_PAIRS, WINDOWS, program, task
from tests.languages.gpu_modules import built

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

LAUNCHES = ((), (("loads", "pointers"),), (("m", 64),), (("stages", 1),))


CASES = [
    *((name, launch) for name in CONVOLUTIONS for launch in LAUNCHES),
    *((name, (("apart", True), ("stages", 1))) for name in ("whole", "odd_input")),
    *((name, launch) for name in PAIRS for launch in ((), (("loads", "pointers"),))),
    *((name, launch) for name, (_, launch) in WALKED_PAIRS.items()),
    *((name, ()) for name in WALKED_PAIRS),
    *((name, launch) for name, (_, launch) in (MATMULS | WINDOWS).items()),
]


@pytest.mark.parametrize("name, launch", CASES, ids=str)
def test_plans_compute_the_reference(name: str, launch: Any) -> None:
    from ke_gym.targets.cuda_driver import Driver
    from ke_gym.targets.cuda_executor import CudaRunner

    given, made = task(name), program(name)
    schedule = scheduled(made, launch) if launch else made.seeds()[0]
    signature = Signature.of(given, ["gpu"])
    artifact = built(
        made.emit(schedule), "cuda", inputs=signature.inputs["gpu"], outputs=signature.outputs["gpu"],
        state=dict(signature.state["gpu"]),
    )  # fmt: skip
    device = torch.device("cuda", 0)
    reference = given.reference("gpu")
    inputs = given.inputs("gpu", 3)
    wanted = reference(*inputs)
    state = {key: tensor.detach().to(device) for key, tensor in reference.state.items()}
    runner = CudaRunner(
        artifact, "default", [x.to(device) for x in inputs], state, driver=Driver(), device=device
    )
    got = [tensor.cpu() for tensor in runner.run()]
    torch.cuda.synchronize()
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
