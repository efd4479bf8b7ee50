from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ke_gym import strategies
from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import Evaluation, Profile
from ke_gym.knowledge import Document
from ke_gym.proposers import prompt
from ke_gym.proposers.base import Context, EditMode, Trial
from ke_gym.proposers.brief import input_names, published
from ke_gym.proposers.llm import LLM, Memory
from ke_gym.proposers.openai import OpenAI
from ke_gym.proposers.prices import tokens
from ke_gym.proposers.prompt import BUDGETS, Prompt, build, docstring, line, shortened
from ke_gym.strategies import FIX, RESTART, Strategy, get
from ke_gym.tasks import Task, resolve
from ke_gym.testing.prompts import sample
from tests.proposers.llm import brief

VECTORIZE = get("vectorize")
PARENT = Candidate(
    '"""Two passes."""\nimport torch\n\n\ndef forward(x):\n    return torch.softmax(x, -1)\n', strategy="fuse"
)


def judged(
    candidate: Candidate, speedup: float | None = 1.5, outcome: str = "correct", log: str = ""
) -> Evaluation:
    return Evaluation(
        "softmax", "cpu", "cpp", candidate.id, outcome, log=log, speedup=speedup,  # type: ignore[arg-type]
        speedup_ci=(1.4, 1.6) if speedup else None, time_ms=1.0 if speedup else None,
        reference_ms=1.5 if speedup else None, limiter="dram" if speedup else "", profile=Profile(bytes=1.0),
    )  # fmt: skip


def trial(text: str, strategy: str, speedup: float | None = 1.1, **more: str) -> Trial:
    made = Candidate(f'"""{text}"""\nX = {text!r}\n', strategy=strategy)
    return Trial(made, judged(made, speedup, **more))  # type: ignore[arg-type]


def made(
    parent: Candidate | None = PARENT,
    strategy: Strategy = VECTORIZE,
    context: Context | None = None,
    edit: EditMode = "edit",
    memory: Memory = "auto",
    task: str = "softmax",
) -> Prompt:
    context = context or Context(evaluation=judged(parent) if parent else None)
    return build(brief(task), "cpp", parent, strategy, context, edit=edit, memory=memory)


def test_a_prompt_holds_everything_that_is_known_and_says_where_it_is_from() -> None:
    asked = made(task="matmul_bias_gelu")
    assert [part.name for part in asked.parts] == [
        "system",
        "contract",
        "answer",
        "task",
        "target",
        "parent",
        "strategy",
    ]
    assert "lang.cpp" in asked.system and ">>>>>>> REPLACE" in asked.system
    user = asked.user
    assert "F.gelu(self.linear(x), approximate=" in user and "linear_weight: float32 [1024, 512]" in user
    assert "- x: float32 [384, 512]" in user and "Returns: float32 [384, 1024]" in user
    assert "no TF32" in user and "vectors of 512 bits" in user
    assert PARENT.source.strip() in user and "speedup: 1.50x over eager" in user and "limiter: dram" in user
    assert get("vectorize").prompt("cpp") in user
    assert (
        user.index("# Task")
        < user.index("# Machine")
        < user.index("# The present kernel")
        < user.index("# What to do")
    )
    for part in asked.parts:
        assert part.version >= 1 and part.origin and not part.cut and part.text in asked.system + asked.user
    assert asked.messages == [{"role": "system", "content": asked.system}, {"role": "user", "content": user}]


def test_the_times_of_several_steps_are_told() -> None:
    evaluation = judged(PARENT).replace(profile=Profile(steps=(("pack", 1e-4), ("multiply", 2e-3))))
    assert (
        "time per step: multiply 2.000 ms, pack 0.100 ms" in made(context=Context(evaluation=evaluation)).user
    )


def test_secrets_of_the_judge_are_not_in_it() -> None:
    for name in ("softmax", "softmax_fp16", "embedding_bag", "layer_norm_backward"):
        task = Task.load(name)
        text = made(None, RESTART, edit="rewrite", task=name).user
        assert "ragged" not in text and "tolerance" not in text and "shapes =" not in text
        assert "class Model" in text and task.name in text


def test_backward_and_many_parameters_are_explained() -> None:
    assert "backward pass too" in made(None, RESTART, task="layer_norm_backward", edit="rewrite").user


@pytest.mark.parametrize(
    "strategy", [s for s in strategies.ACTIONS if s.name not in ("STOP", "RESTART")], ids=lambda s: s.name
)
def test_every_strategy_makes_a_prompt(strategy: Strategy) -> None:
    asked = made(strategy=strategy)
    assert f"# What to do now: {strategy.name}\n" in asked.user and "{{" not in asked.user + asked.system


def test_a_repair_shows_the_failure() -> None:
    broken = judged(PARENT, None, "compile", "k.cpp:3: error: 'foo' was not declared")
    text = made(PARENT, FIX, Context(evaluation=broken)).user
    assert (
        "# The kernel that failed" in text and "'foo' was not declared" in text and "smallest change" in text
    )


def test_the_memory_that_was_chosen_is_told_and_no_other() -> None:
    ancestors = (trial("naive", "RESTART", 0.5), trial("fused", "fuse", 1.2))
    children = (
        trial("wide", "vectorize", 1.4),
        trial("bad", "tile_block", None, outcome="compile", log="x\nk.cpp:1: error: no"),
    )
    leaders = (trial("slow one", "RESTART", 0.6), trial("quick one", "fuse", 1.9))
    flying = Trial(Candidate("F = 1", strategy="vectorize"), None)
    context = Context(
        evaluation=judged(PARENT), ancestors=ancestors, children=children, leaders=leaders, siblings=(flying,)
    )
    marks = {
        "path": "RESTART: 0.50x",
        "tried": "tile_block: compile (k.cpp:1: error: no)",
        "pair": "X = 'quick one'",
    }
    expected: dict[Memory, set[str]] = {
        "auto": {"path", "tried"}, "ancestors": {"path"}, "siblings": {"tried"}, "contrast": {"pair"}, "none": set(),
    }  # fmt: skip
    for memory, wanted in expected.items():
        text = made(context=context, memory=memory).user
        assert {name for name, mark in marks.items() if mark in text} == wanted, memory
    assert "vectorize: being judged" in made(context=context).user
    assert "The best kernel so far is another one: fuse: 1.90x" in made(context=context).user
    draft = made(None, RESTART, Context(leaders=leaders, children=leaders), edit="rewrite").user
    assert "each from scratch" in draft and "different approach" in draft
    assert "first kernel" in made(None, RESTART, Context(), edit="rewrite").user
    assert "X = 'quick one'" in draft and "X = 'slow one'" in draft


def test_one_line_says_what_an_attempt_was() -> None:
    assert line(trial("row in L1", "fuse")) == "fuse: 1.10x, limited by dram (row in L1)"
    assert docstring("not python (") == "" and docstring("'''One.\n\nTwo.'''") == "One."


@given(st.text(max_size=3000), st.integers(20, 300))
def test_shortening_is_honest(text: str, budget: int) -> None:
    short, cut = shortened(text, budget)
    if tokens(text) <= budget:
        assert (short, cut) == (text, 0)
        return
    assert f"[... {cut} lines left out here ...]" in short
    kept = short.splitlines()
    kept.remove(f"[... {cut} lines left out here ...]")
    assert len(kept) + cut == len(text.splitlines()) and tokens(short) <= budget + 14


def test_no_part_exceeds_its_budget_and_code_stays_as_it_is() -> None:
    long = Candidate("\n\n\n".join(f"value_{i} = {i}" for i in range(5000)))
    asked = made(long)
    (part,) = [part for part in asked.parts if part.name == "parent"]
    assert part.cut > 1000 and part.tokens <= BUDGETS["parent"] + 20 and "lines left out" in part.text
    assert "value_0 = 0\n\n\nvalue_1 = 1" in part.text


def test_documents_are_named_and_quoted() -> None:
    made_by = OpenAI(brief(), "cpp", LLM(models=("m",), base_url="http://localhost:1/v1"))
    documents = made_by.documents(get("vectorize"), Context(evaluation=judged(PARENT)))
    made_by.close()
    assert all(isinstance(document, Document) for document in documents)
    asked = build(
        brief(), "cpp", PARENT, get("vectorize"), Context(), edit="edit", memory="none", documents=documents
    )
    assert asked.documents == tuple(d.id for d in documents) and 0 < len(documents) <= 3
    for document in documents:
        assert f"[{document.id}]" in asked.user
    (part,) = [part for part in asked.parts if part.name == "knowledge"]
    assert part.origin == ", ".join(asked.documents) and not part.cut


def test_a_users_own_document_reaches_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "guidance").mkdir()
    (tmp_path / "guidance" / "secret-unit.md").write_text(
        "---\ntarget: cpu\nlanguage: cpp\nstrategy: vectorize\nlimiter: any\nphase: any\n---\n"
        "# The softmax unit\n\nThis machine has a softmax unit; vectorize with it.\n"
    )
    made_by = OpenAI(
        brief(), "cpp", LLM(models=("m",), base_url="http://localhost:1/v1", knowledge=(str(tmp_path),))
    )
    found = made_by.documents(get("vectorize"), Context())
    made_by.close()
    assert "guidance/secret-unit" in [document.id for document in found]


def test_edits_are_asked_for_where_most_of_the_parent_stays() -> None:
    made_by = OpenAI(brief(), "cpp", LLM(models=("m",), base_url="http://localhost:1/v1"))
    assert made_by.edit_mode(None, RESTART) == "rewrite"
    assert made_by.edit_mode(PARENT, get("vectorize")) == "edit"
    assert made_by.edit_mode(PARENT, get("algorithm_swap")) == "rewrite"
    made_by.close()
    always = OpenAI(brief(), "cpp", LLM(models=("m",), base_url="http://localhost:1/v1", edit_mode="rewrite"))
    assert always.edit_mode(PARENT, get("vectorize")) == "rewrite"
    always.close()


def test_languages_without_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="cpp"):
        prompt.contract("fortran")


def test_names_of_inputs_come_from_the_reference() -> None:
    assert input_names("class Model:\n  def forward(self, x, mask=None): pass") == ("x", "mask")
    assert input_names(
        "class A:\n  def forward(self, z): pass\nclass Model:\n  def forward(self, x): pass"
    ) == ("x",)
    assert input_names("class Net:\n  def forward(self, q): pass\nclass Part: pass") == ("q",)
    assert input_names("not python (") == () and published("not python (") == "not python ("


@pytest.mark.parametrize(
    ("source", "left"),
    [
        ('shapes = {"a": 1}  # 77\nshapes["ragged"] = {"M": 77}\nM = 5  # kept', "M = 5  # kept"),
        ("shapes.update(x=77)\nshapes |= {77: 77}\ndel shapes\nM   = 5", "M   = 5"),
        ('tolerance, family = 77, "x"\nM = 5', "M = 5"),
        ("tolerance, M = 77, 5  # 77", "M = 5"),
        ("M = tolerance = 5", "M = 5"),
        ('precision = "strict"; M = 5', "M = 5"),
        ("é = 'é'; shapes = {77: 'é'}; M = 5", "é = 'é'; M = 5"),
        ("M = 5; precision = 77  # 77", "M = 5"),
        ('a = "x\u2028y"\nshapes = {\n  "a": 77,  # 77\n}\nM = 5', 'a = "x\u2028y"\nM = 5'),
        ("for n in (77, 78):\n    shapes[n] = n\nM = 5", "M = 5"),
        ("if True:\n    M = 5\n    shapes = 77", "if True:\n    M = 5"),
        ("HIDDEN = {77: 77}\nshapes = {**HIDDEN}\nM = 5", "M = 5"),
        ("def more():\n    shapes[77] = 77\n\n\nM = 5", "M = 5"),
        ("def forward(shapes):\n    shapes[0] = 1", "def forward(shapes):\n    shapes[0] = 1"),
        ("M = 5\nclass Model:\n    family = M", "M = 5\nclass Model:\n    family = M"),
    ],
)
def test_what_is_kept_back_is_left_out_and_nothing_else(source: str, left: str) -> None:
    assert published(source) == left


def test_prompts_for_the_suite_are_as_short_as_promised() -> None:
    """Every sixth task, to be quick; ``scripts/benchmark.py llm`` takes them all."""
    asked = [p for task in resolve("suite")[::6] for p in sample(brief(task.name), (RESTART, VECTORIZE))]
    sizes = [p.tokens for p in asked]
    assert len(sizes) > 12 and median(sizes) <= 6000
    assert all(part.template and part.version and part.origin for p in asked for part in p.parts)
