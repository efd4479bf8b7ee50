"""The one prompt of all transformations, put together from parts.

What never changes within a search comes first, so that endpoints can cache it. Each part has a template, a version
and a token budget; a part that does not fit loses lines in its middle, and says how many.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from ke_gym import syntax
from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation import profile
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.knowledge import Document
from ke_gym.proposers.base import Context, EditMode, Trial
from ke_gym.proposers.brief import PRECISION, Argument, Brief, size_text
from ke_gym.proposers.llm import Memory
from ke_gym.proposers.prices import CHARACTERS_PER_TOKEN, tokens
from ke_gym.proposers.schedules import without
from ke_gym.strategies import Strategy

TEMPLATES = Path(__file__).parent / "prompts"

BUDGETS = {
    "system": 600, "contract": 1800, "answer": 350, "task": 1600, "target": 300, "knowledge": 1500, "memory": 1800,
    "parent": 6000, "strategy": 400, "lessons": 3000,
}  # fmt: skip
"""Tokens per part, by the estimate of ``prices.tokens``."""
KNOWLEDGE_DOCUMENTS = 3
_TRIED = 12  # earlier attempts that are listed
_NAMED = 12  # entries of the state that are listed
_STEPS = 8  # steps of a plan whose times are told
_CONTRAST = 500  # tokens of each kernel shown for comparison


@dataclass(frozen=True)
class Part:
    """One part of a prompt: which template (and its version) made it from what, and how many lines were left
    out."""

    name: str
    template: str
    version: int
    origin: str
    text: str
    cut: int

    @property
    def tokens(self) -> int:
        return tokens(self.text)


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: a system and a user message, the parts they consist of, and whether it should
    answer with edits."""

    parts: tuple[Part, ...]
    edit: EditMode
    documents: tuple[str, ...]

    @property
    def system(self) -> str:
        return "\n\n".join(part.text for part in self.parts if part.name in _SYSTEM)

    @property
    def user(self) -> str:
        return "\n\n".join(part.text for part in self.parts if part.name not in _SYSTEM)

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.user}]


_SYSTEM = ("system", "contract", "answer")


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=False, undefined=jinja2.StrictUndefined,
        keep_trailing_newline=False,
    )  # fmt: skip


@functools.cache
def _version(template: str) -> int:
    found = re.match(r"\{#- version: (\d+) -#\}", (TEMPLATES / template).read_text())
    assert found is not None, template
    return int(found[1])


def render(name: str, template: str, origin: str, **values: Any) -> Part:
    """The part ``name`` within its budget."""
    text = _environment().get_template(template).render(**values).strip()
    text, cut = shortened(_tidy(text), BUDGETS.get(name, 1000))
    return Part(name, template, _version(template), origin, text, cut)


def _tidy(text: str) -> str:
    """At most one empty line in a row, but code as it is: edits have to quote it exactly."""
    pieces = text.split("```")
    return "```".join(p if i % 2 else re.sub(r"\n{3,}", "\n\n", p) for i, p in enumerate(pieces))


def shortened(text: str, budget: int) -> tuple[str, int]:
    """``text`` in at most ``budget`` tokens (and a line): lines leave its middle, where a note says how many."""
    if tokens(text) <= budget:
        return text, 0
    lines = text.splitlines()
    room = int(budget * CHARACTERS_PER_TOKEN)
    head: list[str] = []
    tail: list[str] = []
    # Two thirds from the start, a third from the end.
    while lines and sum(len(line) + 1 for line in head) + len(lines[0]) + 1 <= 2 * room // 3:
        head.append(lines.pop(0))
    while lines and sum(len(line) + 1 for line in tail) + len(lines[-1]) + 1 <= room // 3:
        tail.insert(0, lines.pop())
    return "\n".join([*head, f"[... {len(lines)} lines left out here ...]", *tail]), len(lines)


def contract(language: str) -> str:
    """The template of a language's contract; ``UserError`` where there is none."""
    name = f"contract_{language}.jinja"
    if not (TEMPLATES / name).exists():
        known = sorted(path.stem.removeprefix("contract_") for path in TEMPLATES.glob("contract_*.jinja"))
        raise UserError(
            f"there are no prompts for the language {language!r}; there are some for {', '.join(known)}"
        )
    return name


def build(
    brief: Brief,
    language: str,
    parent: Candidate | None,
    strategy: Strategy,
    context: Context,
    *,
    edit: EditMode,
    memory: Memory,
    documents: Sequence[Document] = (),
) -> Prompt:
    """The prompt for a candidate made from ``parent`` (None: a draft) by ``strategy``."""
    draft = parent is None
    parts = [
        render("system", "system.jinja", "fixed"),
        render("contract", contract(language), f"language {language}"),
        render("answer", f"answer_{edit}.jinja", f"edit mode {edit}"),
        _task(brief),
        render("target", "target.jinja", f"facts and peaks of {brief.target}", brief=brief),
    ]
    if documents:
        names = ", ".join(d.id for d in documents)
        parts.append(render("knowledge", "knowledge.jinja", names, documents=documents))
    told = _memory(parent, context, memory)
    if told is not None:
        parts.append(told)
    if parent is not None:
        judged = context.evaluation
        parts.append(
            render(
                "parent", "parent.jinja", f"candidate {parent.id} and its evaluation",
                source=without(parent.source).strip(), failed=judged is not None and not judged.correct,
                feedback=profile.feedback(judged) if judged else "not judged yet", steps=_steps(judged),
            )
        )  # fmt: skip
    first = draft and told is None
    paragraph = "Write a first kernel for the reference." if first else strategy.prompt(language)
    parts.append(
        render(
            "strategy", "strategy.jinja", f"strategy {strategy.name}",
            strategy=strategy, paragraph=paragraph, draft=draft, language=language,
        )
    )  # fmt: skip
    return Prompt(tuple(parts), edit, tuple(d.id for d in documents))


def _steps(judged: Evaluation | None) -> str:
    """Where the time of a module with several steps goes, the longest first."""
    steps = judged.profile.steps if judged else ()
    if len(steps) < 2:
        return ""
    longest = sorted(steps, key=lambda step: -step[1])[:_STEPS]
    return ", ".join(f"{name} {1e3 * seconds:.3f} ms" for name, seconds in longest)


def repair(prompt: Prompt, reason: str) -> str:
    """What a model is told of an answer that can't be used."""
    return render("repair", "repair.jinja", "", reason=reason.rstrip("."), edits=prompt.edit == "edit").text


def _task(brief: Brief) -> Part:
    shapes = {name: (i, _listed(s), o) for name, (i, s, o) in brief.shapes.items()}
    return render(
        "task", "task.jinja", f"task {brief.task.name} ({brief.task.id})",
        brief=brief, shapes=shapes, reference=brief.source, precision=PRECISION[brief.task.precision],
        moved=size_text(brief.bytes_moved),
    )  # fmt: skip


def _listed(state: tuple[Argument, ...]) -> tuple[Argument, ...]:
    """At most ``_NAMED`` entries; the rest in one line that names them."""
    if len(state) <= _NAMED:
        return state
    rest = ", ".join(argument.name for argument in state[_NAMED - 1 :])
    return (*state[: _NAMED - 1], Argument(f"{len(state) - _NAMED + 1} more", rest))


# Memory ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A kernel for comparison."""

    said: str
    source: str


def _memory(parent: Candidate | None, context: Context, memory: Memory) -> Part | None:
    """The part on the search so far, or None if there is nothing to tell."""
    path: list[str] = []
    tried: list[str] = []
    pair: list[Shown] = []
    if memory in ("auto", "ancestors") and context.ancestors:
        here = () if parent is None else (Trial(parent, context.evaluation),)
        path = [line(trial) for trial in (*context.ancestors, *here)]
    if memory in ("auto", "siblings"):
        # Those in flight are known only to the siblings, which know nothing of other strategies.
        judged = {trial.candidate.id for trial in context.children}
        flying = [trial for trial in context.siblings if trial.candidate.id not in judged]
        tried = [line(trial) for trial in (*context.children, *flying)][-_TRIED:]
    if memory == "contrast" or (memory == "auto" and parent is None):
        pair = _pair(parent, context)
    best = ""
    if memory == "auto" and parent is not None and context.leaders:
        leader = context.leaders[-1]
        best = line(leader) if leader.candidate.id != parent.id else ""
    if not (path or tried or pair or best):
        return None
    origin = f"memory {memory}: {len(path)} on the path, {len(tried)} tried, {len(pair)} compared"
    return render(
        "memory", "memory.jinja", origin, path=path, tried=tried, pair=pair, best=best, draft=parent is None
    )


def _pair(parent: Candidate | None, context: Context) -> list[Shown]:
    """The best kernel, and the best before it that was clearly slower; not the parent, which is shown anyway."""
    if not context.leaders:
        return []
    best = context.leaders[-1]
    fast = best.evaluation.speedup or 1.0 if best.evaluation else 1.0
    slower = [t for t in context.leaders[:-1] if t.evaluation and (t.evaluation.speedup or 1.0) < 0.9 * fast]
    chosen = [best, *slower[-1:]]
    return [
        Shown(line(trial), shortened(without(trial.candidate.source).strip(), _CONTRAST)[0])
        for trial in chosen
        if parent is None or trial.candidate.id != parent.id
    ]


def line(trial: Trial) -> str:
    """One attempt in one line: strategy, outcome, and what it says of itself or why it failed."""
    judged, what = trial.evaluation, trial.candidate.strategy or "given"
    if judged is None:
        outcome, why = "being judged", ""
    elif judged.correct:
        limit = f", limited by {judged.limiter}" if judged.limiter else ""
        outcome, why = f"{judged.speedup:.2f}x{limit}" if judged.speedup else "correct", ""
    else:
        first = next((text for text in reversed(judged.log.splitlines()) if "error" in text.lower()), "")
        outcome, why = judged.outcome, (first or judged.log.partition("\n")[0]).strip()[:160]
    idea = why or docstring(trial.candidate.source)
    return f"{what}: {outcome}" + (f" ({idea})" if idea else "")


def docstring(source: str) -> str:
    """The first line of a module's docstring, at most 160 characters."""
    try:
        text = ast.get_docstring(syntax.parse(source)) or ""
    except (SyntaxError, ValueError, RecursionError):
        return ""
    return text.strip().partition("\n")[0][:160]
