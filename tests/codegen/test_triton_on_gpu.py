"""Generated Triton modules built to plans and run by the executor on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ke_gym.codegen import Program
from ke_gym.languages.base import Signature
from ke_gym.tasks import Task
from tests.codegen.interpret import HALF, PRODUCTS, SEARCHED, SMALL, THIN, case_ids, program, scheduled
from tests.languages.gpu_modules import built

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

NAMES = (
    "softmax", "layer_norm", "column_mean", "cross_entropy", "argmax", "cumsum", "max_pool", "map_id", "bucketize",
    "matmul_bias_gelu", "matmul_batched", "attention_causal", "attention_gqa_decode", "rms_norm_backward",
    "matmul_low_rank", "matmul_skinny", "layer_norm_backward", "group_norm", "dense_to_jagged", "embedding_bag",
    "batch_event_truncate", "reverse_cumsum", "global_pool", *HALF,
)  # fmt: skip
CLOSE = {"strict": 2e-4, "tf32": 5e-3, "bf16": 2e-2}
FORMS: list[tuple[str, Any]] = [
    ("rms_norm", (("cache", "reads"), ("columns", 64))),
    ("rotary_embedding", (("cache", "kept"),)),
    ("dense_to_jagged", (("cache", "streamed"),)),
    *((name, (("cache", "again"), ("rows", 2))) for name in ("layer_norm", "log_softmax", "cross_entropy")),
    *((name, (("seed", 1),)) for name in ("matmul_low_rank", *THIN)),
    *(
        (name, (("language", "cuda"), *more))
        for name in SEARCHED
        for more in ((), (("unroll", 4), ("warps", 4)))
    ),
]
CASES = [*((name, ()) for name in NAMES), *PRODUCTS, *FORMS]


@pytest.mark.parametrize("name, launch", CASES, ids=case_ids)
@pytest.mark.parametrize("distribution", ["task", "special"])
def test_plans_compute_the_reference(name: str, launch: Any, distribution: str) -> None:
    from ke_gym.targets.cuda_driver import Driver
    from ke_gym.targets.cuda_executor import CudaRunner

    task = Task.load(name)
    made: Program = program(name)
    signature = Signature.of(task, [SMALL])
    artifact = built(
        made.emit(scheduled(made, launch) if launch else made.seeds()[0]),
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
    runner.prepare()
    got = [tensor.cpu() for tensor in runner.run()]
    torch.cuda.synchronize()
    for a, b in zip(got, wanted, strict=True):
        close = 2e-2 if b.dtype in (torch.bfloat16, torch.float16) else CLOSE[task.precision]
        torch.testing.assert_close(a, b, rtol=close, atol=close, equal_nan=True)
