"""Prompts as a search would send them, without one: what they hold and how long they are can be looked at cheaply."""

from __future__ import annotations

from collections.abc import Sequence

from ke_gym.candidate import Candidate
from ke_gym.evaluation.evaluation import Evaluation, Profile
from ke_gym.proposers import prompt
from ke_gym.proposers.base import Context, Proposal, Trial
from ke_gym.proposers.brief import Brief
from ke_gym.proposers.llm import LLM
from ke_gym.proposers.openai import OpenAI
from ke_gym.proposers.prompt import Prompt
from ke_gym.proposers.rewriter import Rewriter
from ke_gym.strategies import RESTART, STRATEGIES, Strategy

SOME: tuple[Strategy, ...] = (RESTART, *STRATEGIES[::4])
"""A draft, and transformations of different kinds."""


def sample(brief: Brief, strategies: Sequence[Strategy] = SOME) -> list[Prompt]:
    """The prompts for ``strategies`` in the midst of a search for ``brief.task`` in C++.

    Parent, ancestors, children and leaders are the rewriter's first two drafts, judged correct and somewhat faster
    than the baseline; a task that the rewriter cannot draft has only a draft's prompt, with nothing to remember.
    """
    proposer = OpenAI(brief, "cpp", LLM(models=("none",), base_url="http://localhost:1/v1"))
    rewriter = Rewriter(brief.task)
    drafts = [rewriter.propose(None, RESTART, draw, Context()) for draw in range(2)]
    trials = [Trial(d.candidate, _judged(brief, d.candidate)) for d in drafts if isinstance(d, Proposal)]
    prompts = []
    for strategy in strategies if trials else (RESTART,):
        first = None if strategy is RESTART else trials[0]
        parent = first.candidate if first else None
        context = Context(
            evaluation=first.evaluation if first else None, children=tuple(4 * trials), leaders=tuple(trials),
            ancestors=tuple(trials) if first else (),
        )  # fmt: skip
        documents = proposer.documents(strategy, context)
        edit = proposer.edit_mode(parent, strategy)
        prompts.append(
            prompt.build(
                brief, "cpp", parent, strategy, context, edit=edit, memory="auto", documents=documents
            )
        )
    proposer.close()
    return prompts


def _judged(brief: Brief, candidate: Candidate) -> Evaluation:
    return Evaluation(
        brief.task.name, brief.target, "cpp", candidate.id, "correct", speedup=1.2, speedup_ci=(1.1, 1.3), time_ms=1.0,
        reference_ms=1.2, limiter="dram", profile=Profile(bytes=1e7),
    )  # fmt: skip
