"""Generated CUDA C++ modules built to plans and run by the executor on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ke_gym.languages.base import Signature
from ke_gym.tasks import Task
from tests.codegen.cuda_on_host import IN_BAGS, IN_PASSES, IN_VECTORS, VECTORS, program
from tests.codegen.interpret import SMALL, with_launch
from tests.languages.gpu_modules import built

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

NAMES = (
    "softmax", "layer_norm", "column_mean", "cross_entropy", "argmax", "cumsum", "max_pool", "map_id", "bucketize",
    "matmul_bias_gelu", "rotary_embedding", "rms_norm_backward", "rms_norm_bf16", "global_pool",
)  # fmt: skip
CASES = [
    *((name, ()) for name in NAMES),
    *IN_PASSES.items(),
    *((str(VECTORS / f"{name}.py"), launch) for name, launch, _ in IN_VECTORS),
    *IN_BAGS,
]


@pytest.mark.parametrize("name, launch", CASES)
@pytest.mark.parametrize("distribution", ["task", "special"])
def test_plans_compute_the_reference(name: str, launch: Any, distribution: str) -> None:
    from ke_gym.targets.cuda_driver import Driver
    from ke_gym.targets.cuda_executor import CudaRunner

    task, made = Task.load(name), program(name)
    signature = Signature.of(task, [SMALL])
    artifact = built(
        made.emit(with_launch(made.seeds()[0], launch) if launch else made.seeds()[0]),
        "cuda",
        inputs=signature.inputs[SMALL],
        outputs=signature.outputs[SMALL],
        state=dict(signature.state[SMALL]),
    )
    device = torch.device("cuda", 0)
    reference = task.reference(SMALL)
    inputs = task.inputs(SMALL, 3, distribution)
    wanted = reference(*inputs)
    given = [value.to(device) if isinstance(value, torch.Tensor) else value for value in inputs]
    state = {key: tensor.detach().to(device) for key, tensor in reference.state.items()}
    runner = CudaRunner(artifact, "default", given, state, driver=Driver(), device=device)
    got = [tensor.cpu() for tensor in runner.run()]
    torch.cuda.synchronize()
    for a, b in zip(got, wanted, strict=True):
        close = 2e-2 if b.dtype in (torch.bfloat16, torch.float16) else 2e-4
        torch.testing.assert_close(a, b, rtol=close, atol=close, equal_nan=True)
