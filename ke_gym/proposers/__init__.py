"""Proposers: from (parent, strategy, draw) to new source."""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from ke_gym.errors import UserError
from ke_gym.proposers.base import Context, Proposal, Proposer, Refusal, Trial, Usage
from ke_gym.proposers.llm import LLM
from ke_gym.tasks import Task

if TYPE_CHECKING:
    from ke_gym.evaluation.evaluator import Evaluator

__all__ = ["LLM", "Context", "Proposal", "Proposer", "Refusal", "Trial", "Usage", "check", "make", "names"]

BUILT_IN = ("rewriter", "openai")


def names() -> list[str]:
    """The known proposers: built in, and registered under the entry point group ``ke_gym.proposers``."""
    return [*BUILT_IN, *sorted(point.name for point in entry_points(group="ke_gym.proposers"))]


def members(name: str) -> list[str]:
    """The proposers of a comma-separated list."""
    return [part.strip() for part in name.split(",")]


def check(name: str, llm: LLM | None = None, dollars: float | None = None) -> None:
    """``UserError``, which suggests the nearest, unless every name in the list is a proposer's, each once.

    With ``llm`` also unless models can be asked like that: there is a key, an endpoint that answers, and the
    ``dollars`` (None: any sum) pay for an answer.
    """
    parts = members(name)
    for part in parts:
        if part not in names():
            near = difflib.get_close_matches(part, names(), n=1, cutoff=0.0)
            raise UserError(f"unknown proposer {part!r}; did you mean {near[0]!r}?")
    if len(set(parts)) != len(parts):
        raise UserError(f"the proposers {name!r} name one twice")
    if llm is not None and "openai" in parts:
        from ke_gym.proposers import openai

        openai.check(llm, dollars)


def make(
    name: str,
    task: Task,
    language: str = "cpp",
    *,
    evaluator: Evaluator | None = None,
    llm: LLM | None = None,
    transcripts: Path | None = None,
) -> Proposer:
    """The proposer of this name for one task, or several mixed: ``"rewriter,openai"``.

    ``openai`` needs an open ``evaluator`` (its prompts tell what is known of task and machine), settings, and
    a folder if its conversations are to be kept. ``UserError`` for an unknown name.
    """
    check(name)
    made = [_make(part, task, language, evaluator, llm, transcripts) for part in members(name)]
    if len(made) == 1:
        return made[0]
    from ke_gym.proposers.mixed import Mixed

    return Mixed(made)


def _make(
    name: str,
    task: Task,
    language: str,
    evaluator: Evaluator | None,
    llm: LLM | None,
    transcripts: Path | None,
) -> Proposer:
    if name == "rewriter":
        from ke_gym.evaluation.gpu_setting import arch_of
        from ke_gym.proposers.rewriter import Rewriter
        from ke_gym.targets import cuda

        if evaluator is not None and isinstance(evaluator.facts, cuda.Facts):
            return Rewriter(task, language, arch_of(evaluator.facts))
        return Rewriter(task, language)
    if name == "openai":
        from ke_gym.proposers.brief import Brief
        from ke_gym.proposers.openai import OpenAI

        if evaluator is None:
            raise UserError("the proposer openai needs the evaluator of its task, to describe the machine")
        return OpenAI(Brief.of(evaluator), language, llm, transcripts)
    (point,) = entry_points(group="ke_gym.proposers", name=name)
    proposer: Proposer = point.load()(task, language)
    return proposer
