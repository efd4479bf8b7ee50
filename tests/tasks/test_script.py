"""scripts/tasks.py: what it lists, what it checks, how it exits."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from tests.scripts.command import here

SCRIPT = Path(__file__).parents[2] / "scripts" / "tasks.py"
KERNELBENCH = Path(__file__).parent / "kernelbench"


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("scripts_tasks", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    sys.modules["scripts_tasks"] = module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["scripts_tasks"]


def test_list_as_json(script, capsys):
    assert script.main(script.List(tasks=("matmul", str(KERNELBENCH)), json=True)) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["matmul_low_rank"]["precision"] == "tf32"
    assert rows["matmul_low_rank"]["shapes"]["ragged"] == {"ROWS": 61, "INNER": 97, "COLS": 113}
    assert rows["1_square_matmul"]["family"] == "user" and rows["1_square_matmul"]["shapes"] == {}


def test_list_as_table(script, capsys):
    assert script.main(script.List(tasks=("gather", "rms_norm_bf16"))) == 0
    printed = capsys.readouterr().out
    assert "3 tasks" in printed and "embedding_bag" in printed
    assert "float32, int64" in printed and "bfloat16" in printed


def test_check_refuses_a_task_on_which_nothing_can_be_judged(script, tmp_path, capsys):
    path = tmp_path / "always_zero.py"
    path.write_text("""
import torch
class Model(torch.nn.Module):
    def forward(self, x):
        return torch.zeros(len(x))
def get_inputs():
    return [torch.randn(1000, 10)]
""")
    assert script.main(script.Check(tasks=(str(path),), json=True)) == 1
    (result,) = json.loads(capsys.readouterr().out)
    assert result["task"] == "always_zero" and not result["ok"]
    assert "survive" in result["reason"] and "zeros" in " ".join(result["survivors"])


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import torch\nclass Model(:\n")
    for spec, said in (
        ("sofmax", "did you mean softmax or log_softmax or"),
        (str(broken), f"{broken}:2: invalid syntax"),
    ):
        result = here("tasks", "list", spec, home=tmp_path)
        assert result.returncode == 2 and said in result.stderr and "Traceback" not in result.stderr
