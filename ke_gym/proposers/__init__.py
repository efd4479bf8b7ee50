"""Proposers: from (parent, strategy, draw) to new source."""

from __future__ import annotations

import difflib

from ke_gym.errors import UserError
from ke_gym.proposers.base import Context, Proposal, Proposer, Refusal, Trial
from ke_gym.tasks import Task

__all__ = ["Context", "Proposal", "Proposer", "Refusal", "Trial", "make", "names"]


def names() -> list[str]:
    """The known proposers: built in, and registered under the entry point group ``ke_gym.proposers``."""
    from importlib.metadata import entry_points

    return ["rewriter", *sorted(point.name for point in entry_points(group="ke_gym.proposers"))]


def make(name: str, task: Task, language: str = "cpp") -> Proposer:
    """The proposer of this name for one task; ``UserError`` names the nearest for an unknown one."""
    if name == "rewriter":
        from ke_gym.proposers.rewriter import Rewriter

        return Rewriter(task, language)
    from importlib.metadata import entry_points

    for point in entry_points(group="ke_gym.proposers"):
        if point.name == name:
            proposer: Proposer = point.load()(task, language)
            return proposer
    near = difflib.get_close_matches(name, names(), n=1, cutoff=0.0)
    raise UserError(f"unknown proposer {name!r}; did you mean {near[0]!r}?")
