from __future__ import annotations

import pytest

from ke_gym.proposers.base import Context, Proposal
from ke_gym.proposers.prefilter import check
from ke_gym.proposers.rewriter import Rewriter
from ke_gym.strategies import RESTART
from ke_gym.tasks import Task

STATE = ("linear_weight", "linear_bias")
GOOD = """
import torch
from ke_gym import lang
kernels = lang.cpp(r'''extern "C" void f(const float* x, float* y) {}''')
def forward(x, linear_weight, *, linear_bias=None, scale=2.0):
    y = torch.empty_like(x)
    kernels.f(x, y)
    return y
"""


def test_good_modules_pass() -> None:
    assert check(GOOD, "cpp", 1, STATE) is None
    assert check("class ModelNew: pass", "cpp", 1, STATE) is None
    assert check("def forward(*inputs): return inputs", "cpp", 3, STATE) is None
    for name in ("softmax", "matmul_bias_gelu"):
        task = Task.load(name)
        made = Rewriter(task).propose(None, RESTART, 0, Context())
        assert isinstance(made, Proposal)
        assert check(made.candidate.source, "cpp", 1, tuple(task.reference("cpu").state)) is None


@pytest.mark.parametrize(
    ("source", "kind", "word"),
    [
        ("def forward(x:\n  pass", "syntax", "line 1"),
        ("def forward(x):\n\treturn '\0'", "syntax", "no Python"),
        ("import torch", "contract", "neither forward"),
        ("def forward(): pass", "contract", "1 inputs"),
        ("def forward(x, weight): pass", "contract", "linear_weight"),
        ("def forward(x, *, weight): pass", "contract", "'weight'"),
        ("import os\ndef forward(x): return x", "contract", "os"),
        ("from subprocess import run\ndef forward(x): return x", "contract", "subprocess"),
        ("from . import lang\ndef forward(x): return x", "contract", "import"),
        ("from ke_gym.evaluation import judge\ndef forward(x): return x", "contract", "lang only"),
        ("def forward(x):\n    return eval('x')", "contract", "eval"),
        ("def forward(x):\n    open('/etc/passwd')\n    return x", "contract", "open"),
        ("import triton\ndef forward(x): return x", "contract", "triton"),
    ],
)
def test_what_breaks_the_contract_is_named(source: str, kind: str, word: str) -> None:
    flaw = check(source, "cpp", 1, STATE)
    assert flaw is not None and flaw.kind == kind and word in flaw.reason


def test_another_language_than_the_one_asked_for_is_a_flaw() -> None:
    flaw = check(GOOD, "triton", 1, STATE)
    assert flaw is not None and flaw.kind == "contract" and "cpp" in flaw.reason and "triton" in flaw.reason


def test_code_that_python_cannot_parse_for_its_depth_is_refused() -> None:
    flaw = check(f"x = {'-' * 200_000}1", "cpp", 1, STATE)
    assert flaw is not None and flaw.kind == "syntax"
