"""The GPU judge prepares anew for every call, before anything of it is drawn; on a GPU that is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ke_gym.evaluation.gpu_judge import GpuJudge
from ke_gym.evaluation.race import Rules
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.plan import Alloc, Geometry, Launch, Plan, PlanInput, Ref, TensorSpec
from ke_gym.tasks.task import Task
from ke_gym.testing.fake_gpu import FakeClocks, floats, integer, kernel, stand_in

ROWS, COLS = 6, 40
X, BIAS = TensorSpec((ROWS, COLS), (COLS, 1), "float32"), TensorSpec((COLS,), (1,), "float32")
TASK = f"""
import torch
import torch.nn as nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.ones({COLS}))

    def forward(self, x):
        return x + 2 * self.bias

def get_inputs():
    return [torch.randn({ROWS}, {COLS})]
"""
CASES = [(11, "task", 0), (12, "task", 5), (13, "ties", 0)]
SEEN: dict[str, Any] = {}


@kernel
def twice(bias: int, out: int, n: int) -> None:
    SEEN["prepared"] = SEEN.get("prepared", 0) + 1
    floats(out, integer(n)).copy_(2 * floats(bias, integer(n)))


@kernel
def twice_at_first(bias: int, out: int, n: int) -> None:
    SEEN.setdefault("first", 2 * floats(bias, integer(n)).clone())
    floats(out, integer(n)).copy_(SEEN["first"])


@kernel
def twice_and_beyond(bias: int, out: int, n: int) -> None:
    floats(out, integer(n) + 1).fill_(0)
    twice(bias, out, n)


@kernel
def twice_through(bias: int, between: int, out: int, n: int) -> None:
    floats(between, integer(n)).copy_(floats(bias, integer(n)))
    floats(out, integer(n)).copy_(2 * floats(between, integer(n)))


@kernel
def twice_beyond_its_own(bias: int, between: int, out: int, n: int) -> None:
    floats(between, integer(n) + 1).fill_(0)
    twice_through(bias, between, out, n)


@kernel
def shifted(x: int, shift: int, out: int, n: int) -> None:
    given = floats(x, integer(n)).reshape(ROWS, COLS)
    floats(out, integer(n)).copy_((given + floats(shift, COLS)).flatten())


@kernel
def shifted_and_kept(x: int, shift: int, out: int, n: int) -> None:
    shifted(x, shift, out, n)
    floats(shift, COLS).fill_(0)


def _artifact(preparing: str, running: str) -> Artifact:
    geometry = Geometry((1, 1, 1), (32, 1, 1))
    types = ("float*", "float*", "int64_t")
    first = Launch("p", preparing, (Ref(0), Ref(1), COLS), types, geometry)
    steps: tuple[Any, ...] = (Alloc(1, BIAS), first)
    if preparing in ("twice_through", "twice_beyond_its_own"):
        first = Launch("p", preparing, (Ref(0), Ref(2), Ref(1), COLS), ("float*", *types), geometry)
        steps = (Alloc(1, BIAS), Alloc(2, BIAS), first)
    made = Plan((PlanInput("state", "bias", BIAS),), steps, (1,), (BIAS,), "cuda")
    then = Launch("k", running, (Ref(0), Ref(1), Ref(2), ROWS * COLS), ("float*", *types), geometry)
    inputs = (PlanInput("input", "0", X), PlanInput("prepared", "0", BIAS))
    plan = Plan(inputs, (Alloc(2, X), then), (2,), (X,), "cuda", preparation=made)
    binaries = {"p": preparing.encode(), "k": running.encode()}
    return Artifact("cuda", "plan", "", binaries, {"default": plan}, arch="sm_90a")


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> GpuJudge:
    stand_in(monkeypatch)
    monkeypatch.setattr(FakeClocks, "now", 1000)
    SEEN.clear()
    path = tmp_path / "task.py"
    path.write_text(TASK)
    made = GpuJudge(Task.from_file(path), "eager", torch.device("cpu"))
    made.describe(["default"])
    return made


def _load(judge: GpuJudge, preparing: str, running: str) -> int:
    return int(judge.load("default", _artifact(preparing, running).to_bytes())["arm"])


def test_weights_are_prepared_for_every_case_and_call(judge: GpuJudge) -> None:
    through = judge.check(_load(judge, "twice_through", "shifted"), CASES, 99, True, 5.0)
    assert "reason" not in through, through
    arm = _load(judge, "twice", "shifted")
    answer = judge.check(arm, CASES, 99, True, 5.0)
    assert "reason" not in answer, answer
    assert SEEN["prepared"] == len(CASES) + 2
    limits = vars(Rules(min_rounds=6, max_rounds=8, hopeless=1e9, slow=1e9))
    judge.warm("default", arm, None, True)
    result = judge.race("default", arm, None, True, limits, 0.01, 5.0)
    assert not result["suspects"]
    assert SEEN["prepared"] >= len(CASES) + 2 + len(result["seconds"]["candidate"])
    assert judge.soak(arm, 5.0)["ok"]
    assert judge.profile(arm, 5.0)["preparation"] > 0


@pytest.mark.parametrize(
    ("preparing", "running", "problem"),
    [
        ("twice_at_first", "shifted", "error"),
        ("twice_and_beyond", "shifted", "outside of its prepared tensors"),
        ("twice", "shifted_and_kept", "wrote to prepared tensor 0"),
        (
            "twice_beyond_its_own",
            "shifted",
            "of its preparation's intermediates: 0 bytes past the end of preparation's",
        ),
    ],
)
def test_what_is_prepared_wrongly_is_seen(
    judge: GpuJudge, preparing: str, running: str, problem: str
) -> None:
    assert problem in judge.check(_load(judge, preparing, running), CASES, 99, True, 5.0)["reason"]
