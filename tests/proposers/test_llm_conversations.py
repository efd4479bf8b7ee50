"""Conversations that a person answered from the prompts alone, kept as cassettes.

Replayed through the real path (prompts, cassette, parser, edits, checks), they make the kernels they made when
they were recorded; the kernels compute what their tasks' references compute.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ke_gym.languages.module import load
from ke_gym.proposers.brief import Argument, Brief
from ke_gym.proposers.llm import LLM
from ke_gym.proposers.openai import OpenAI
from ke_gym.proposers.prompt import docstring
from ke_gym.search.budget import Budget
from ke_gym.search.session import Ask, Session
from ke_gym.search.store import Store
from ke_gym.search.tree import Node
from ke_gym.strategies import get
from ke_gym.tasks import Task
from tests.proposers.llm import brief
from tests.search.fakes import SETTING, evaluation

pytestmark = pytest.mark.filterwarnings("ignore:at step .* the search asks otherwise")  # as machines differ
CASSETTES = Path(__file__).parent / "cassettes"
ROWS, INNER, COLS = 8192, 4096, 16384
GPU = Brief(
    Task.load("matmul_bias_gelu"), "cuda", "eager", "gpu",
    {
        "gpu": (
            (Argument("x", f"float32 [{ROWS}, {INNER}]"),),
            (Argument("linear_weight", f"float32 [{COLS}, {INNER}]"), Argument("linear_bias", f"float32 [{COLS}]")),
            (f"float32 [{ROWS}, {COLS}]",),
        )
    },
    0.0, 0.0, 0.0, (),
)  # fmt: skip
"""What the answer in Triton was asked with."""
ON_CPU = sorted(path.stem for path in CASSETTES.glob("*.jsonl") if not path.stem.endswith("_triton"))


def strategies(name: str) -> list[str]:
    """What each recorded prompt asked for."""
    lines = (CASSETTES / f"{name}.jsonl").read_text().rstrip("\n").split("\n")[1:]
    prompts = [json.loads(json.loads(text)["request"])["messages"][1]["content"] for text in lines]
    found = [re.search(r"^# What to do now: (\w+)$", prompt, re.MULTILINE) for prompt in prompts]
    return [match[1] for match in found if match]


def stable(request: str) -> tuple[dict[str, Any], list[str]]:
    """A request without what differs from machine to machine and from run to run: the machine and what its peaks
    make of the work, notes, times."""
    data = json.loads(request)
    text = "\n\n".join(message["content"] for message in data.pop("messages"))
    text = re.sub(r"^Least work: .*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^How it was judged:\n(.+\n?)*", "", text, flags=re.MULTILINE)
    parts = re.split(r"^(?=# )", text, flags=re.MULTILINE)
    return data, [part for part in parts if not part.startswith(("# Machine", "# Notes that may help"))]


def replayed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Node]:
    """The nodes of a search that takes the recorded actions, each on the kernel before.

    The prompts have to be the recorded ones, but for what varies.
    """
    task = name.removesuffix("_triton")
    language = "triton" if name.endswith("_triton") else "cpp"
    made = OpenAI(
        GPU if language == "triton" else brief(task), language, LLM(replay=str(CASSETTES / f"{name}.jsonl"))
    )
    cassette = made.endpoint.cassette
    assert cassette is not None
    recorded = {exchange.step: exchange.request for exchange in cassette.left}
    asked: dict[str, str] = {}
    answer = cassette.answer
    monkeypatch.setattr(cassette, "answer", lambda step, body: answer(step, asked.setdefault(step, body)))
    with Store(tmp_path / "store.db") as store:
        session = Session(store, name, SETTING, made, budget=Budget(50))
        nodes: list[Node] = []
        for action in strategies(name):
            ask = session.ask(get(action).id, nodes[-1] if nodes else None)
            assert isinstance(ask, Ask), ask
            nodes.append(session.tell(ask, evaluation(ask.candidate, 1.0 + len(nodes))))
    made.close()
    assert {step: stable(body) for step, body in asked.items()} == {
        step: stable(body) for step, body in recorded.items()
    }
    return nodes


@pytest.mark.parametrize("name", ON_CPU)
def test_kernels_answered_by_hand_are_right(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = replayed(name, tmp_path, monkeypatch)
    assert len(nodes) == len(strategies(name)) >= 1
    torch.manual_seed(0)
    task = brief(name).task
    shape_set = task.contract("cpu")
    reference, inputs = task.reference(shape_set), task.inputs(shape_set, seed=1)
    expected = reference(*inputs)
    for node in nodes[-1:]:
        forward = load(node.candidate.source).forward
        names = forward.__code__.co_varnames[len(inputs) : forward.__code__.co_argcount]
        got = forward(*inputs, **{n: reference.state[n] for n in names})
        for have, want in zip([got] if isinstance(got, torch.Tensor) else got, expected):
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


def test_a_kernel_in_triton_was_answered_by_hand_too(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (node,) = replayed("matmul_bias_gelu_triton", tmp_path, monkeypatch)
    assert node.candidate.language == "triton" and "@triton.jit" in node.candidate.source
    assert docstring(node.candidate.source).startswith("Grouped 128x128 tiles")
