"""scripts/tasks.py: what it lists, what it checks, how it exits."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from ke_gym.evaluation import selfcheck
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


def test_a_task_that_breaks_costs_the_others_nothing(script, tmp_path, capsys, monkeypatch):
    text = """
import torch
class Model(torch.nn.Module):
    def forward(self, x):
        return BODY
def get_inputs():
    return [torch.randn(100, 10)]
"""
    for name, body in (("a[b]", "x * 2"), ("none", "None"), ("z", "x + 1")):
        (tmp_path / f"{name}.py").write_text(text.replace("BODY", body))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(selfcheck, "NOISE", 9.0)  # such small references race anyhow
    assert script.main(script.Check(tasks=(str(tmp_path),))) == 2
    printed = capsys.readouterr().out
    rows = {
        name: next(row for row in printed.splitlines() if f" {name} " in row)
        for name in ("a[b]", "none", "z")
    }
    assert "FAILED" in rows["none"] and f"{tmp_path / 'none.py'}: the forward returns no tensor" in printed
    assert "FAILED" not in rows["a[b]"] + rows["z"]
    assert "2 of 3 tasks can be trusted" in printed


def test_what_a_task_says_of_itself_is_listed_as_it_is(script, capsys, tmp_path):
    (tmp_path / "rows.py").write_text(
        '"y[i] = x[i] [/x] :x:"'
        + """
import torch
class Model(torch.nn.Module):
    def forward(self, x):
        return x
def get_inputs():
    return [torch.randn(3)]
"""
    )
    script.main(script.List(tasks=(str(tmp_path),)))
    assert "y[i] = x[i] [/x] :x:" in capsys.readouterr().out
