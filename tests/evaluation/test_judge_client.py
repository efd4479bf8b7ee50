from __future__ import annotations

from pathlib import Path

import pytest

from ke_gym.errors import UserError
from ke_gym.evaluation import judge_client
from ke_gym.evaluation.judge_client import JudgeClient
from ke_gym.evaluation.zygote import Zygote
from ke_gym.tasks.task import Task

TASK = """
import os, time
import torch
class Model(torch.nn.Module):
    def forward(self, x):
        if os.path.exists({hang!r}):
            time.sleep(600)
        if os.path.exists({crash!r}):
            os._exit(3)
        return x + 1
def get_inputs():
    return [torch.randn(8, 8)]
"""


@pytest.mark.parametrize(("end", "words"), [("hang", "hangs"), ("crash", "crashed")])
def test_a_reference_that_ends_badly_while_it_is_timed_is_named(
    zygote: Zygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, words: str
) -> None:
    path = tmp_path / "moody.py"
    path.write_text(TASK.format(hang=str(tmp_path / "hang"), crash=str(tmp_path / "crash")))
    judge = JudgeClient(zygote, Task.load(str(path)), ["default"], "eager", 1)
    try:
        assert judge.call_baseline("default") > 0
        (tmp_path / end).touch()
        if end == "hang":
            monkeypatch.setattr(judge_client, "REQUEST_TIMEOUT", 1.0)
        with pytest.raises(UserError, match=f"task moody: its reference {words}"):
            judge.call_baseline("default")
    finally:
        judge.close()


def test_a_judge_that_is_gone_is_named_whatever_it_is_asked(
    zygote: Zygote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "calm.py"
    path.write_text(TASK.format(hang=str(tmp_path / "hang"), crash=str(tmp_path / "crash")))
    judge = JudgeClient(zygote, Task.load(str(path)), ["default"], "eager", 1)

    def die() -> None:
        judge.worker.kill()
        judge.worker.wait(300)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(judge.worker, "freeze", die)  # between its "ready" and the start of the clock
            with pytest.raises(UserError, match=r"task calm: its reference crashed \(while it was timed"):
                judge.call_baseline("default")
        with pytest.raises(UserError, match=r"task calm: its reference crashed \(draw\)"):
            judge.draw("default", 1)
        with pytest.raises(UserError, match=r"task calm: its reference crashed \(baseline_ready\)"):
            judge.call_baseline("default")
    finally:
        judge.close()
