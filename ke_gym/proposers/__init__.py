"""Proposers: from (parent, strategy, draw) to new source."""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points

from ke_gym.errors import UserError
from ke_gym.proposers.base import Context, Proposal, Proposer, Refusal, Trial
from ke_gym.tasks import Task

__all__ = ["Context", "Proposal", "Proposer", "Refusal", "Trial", "check", "make", "names"]


def names() -> list[str]:
    """The known proposers: built in, and registered under the entry point group ``ke_gym.proposers``."""
    return ["rewriter", *sorted(point.name for point in entry_points(group="ke_gym.proposers"))]


def check(name: str) -> None:
    """``UserError``, which suggests the nearest, unless there is a proposer of this name."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.0)
        raise UserError(f"unknown proposer {name!r}; did you mean {near[0]!r}?")


def make(name: str, task: Task, language: str = "cpp") -> Proposer:
    """The proposer of this name for one task; ``UserError`` for an unknown one."""
    check(name)
    if name == "rewriter":
        from ke_gym.proposers.rewriter import Rewriter

        return Rewriter(task, language)
    (point,) = entry_points(group="ke_gym.proposers", name=name)
    proposer: Proposer = point.load()(task, language)
    return proposer
