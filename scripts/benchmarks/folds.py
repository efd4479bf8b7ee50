"""Leave-one-family-out: policies trained on the tables of all other operator families, tested on those of one.

A fold is a family. Every fold trains anew, so that each table is met by a policy that has seen nothing of its family;
the searches of all folds together then speak of all tables. Folds run in processes of their own, one core each.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from ke_gym import policies
from ke_gym.envs import catalog
from ke_gym.errors import UserError
from ke_gym.policies import Policy
from ke_gym.policies.base import Observation
from ke_gym.policies.learning import NETWORKS, Plan, Trainer
from ke_gym.policies.network import NetworkPolicy
from ke_gym.policies.playing import Episode, replay_runs
from ke_gym.search.observation import LAYOUT
from ke_gym.search.reward import Kind

HORIZONS = (20, 50, 100)
Runs = list[list[Episode]]
Found = dict[str, dict[int, Runs]]
"""Policy and budget to runs, each with an episode per table."""


@dataclass(frozen=True)
class Training:
    """How a fold's policy is trained."""

    policy: str
    reward: Kind | None = None
    """None: the policy's own."""
    blind: bool = False
    """Show a network nothing: it learns which strategies to prefer, whatever the kernel."""
    penalties: bool = True
    """Let a network pay for failures."""


@dataclass(frozen=True)
class Entry:
    """One row of a comparison: a policy as it is made (``spec``), or as it was trained."""

    name: str
    spec: str = ""
    training: Training | None = None
    guided: bool = False
    """The trained network as the prior of a tree search."""
    options: tuple[tuple[str, float], ...] = ()
    """Set after the training."""


@dataclass(frozen=True)
class Fold:
    """A family, and the tables (files) of it and of all others."""

    family: str
    held: tuple[str, ...]
    others: tuple[str, ...]


@dataclass(frozen=True)
class Effort:
    """What a fold costs."""

    budgets: tuple[int, ...]
    seeds: int
    network_steps: int
    bandit_steps: int


def folds(specs: Sequence[str | Path]) -> list[Fold]:
    """One fold for every operator family among the tables; ``UserError`` if there is only one."""
    families: dict[str, list[str]] = {}
    for path in dict.fromkeys(catalog.files(specs)):
        (table,) = catalog.load(path)
        families.setdefault(table.family, []).append(str(path))
    if len(families) < 2:
        raise UserError(
            f"all tables are of the family {', '.join(families)}: leaving it out leaves nothing to learn from"
        )
    return [
        Fold(family, tuple(held), tuple(p for f, paths in families.items() if f != family for p in paths))
        for family, held in families.items()
    ]


def play(
    entries: Sequence[Entry],
    made: Sequence[Fold],
    effort: Effort,
    workers: int,
    watch: Callable[[], None] = lambda: None,
) -> Found:
    """All entries in all folds, tables in the order of the folds; ``watch`` is called after each group and fold.

    One worker works in this process.
    """
    distinct(entries)
    jobs = [(group, fold) for group in grouped(entries) for fold in made]
    found: dict[tuple[str, str], dict[int, Runs]] = {}
    for family, by_name in _done(jobs, effort, workers):
        found |= {(name, family): runs for name, runs in by_name.items()}
        watch()
    return {
        entry.name: {
            budget: [
                [episode for fold in made for episode in found[entry.name, fold.family][budget][run]]
                for run in range(effort.seeds)
            ]
            for budget in effort.budgets
        }
        for entry in entries
    }


def distinct(entries: Sequence[Entry]) -> None:
    """``UserError`` for two entries of one name, of which a comparison would show one only."""
    counts = Counter(entry.name for entry in entries)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"{', '.join(twice)} takes part twice; name it once")


def _done(
    jobs: Sequence[tuple[list[Entry], Fold]], effort: Effort, workers: int
) -> Iterator[tuple[str, Found]]:
    """Family and results of every job, as they are completed."""
    if workers == 1:
        for group, fold in jobs:
            yield fold.family, _played(group, fold, effort)
        return
    # One thread each: there are as many processes as cores, and the networks are small.
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        futures = {pool.submit(_played, group, fold, effort): fold.family for group, fold in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()


def grouped(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries that share a training; those without one are alone. The longest jobs come first."""
    groups: dict[Any, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.training or entry.name, []).append(entry)
    return sorted(groups.values(), key=lambda group: group[0].training is None)


def _played(group: Sequence[Entry], fold: Fold, effort: Effort) -> Found:
    """Train once, and let every entry of the group search the fold's tables. Runs in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        training = group[0].training
        trained = _trained(training, fold, effort, Path(folder) / "run") if training is not None else None
        makers = {entry.name: partial(_fresh, _player(entry, trained)) for entry in group}
    tables = catalog.load(fold.held)
    found: Found = {entry.name: {} for entry in group}
    for budget in effort.budgets:
        for name, runs in replay_runs(makers, tables, budget, effort.seeds).items():
            found[name][budget] = runs
    return found


class BlindTrainer(Trainer):
    """Trains a masked network that is shown zeros."""

    def envs(self) -> Any:
        made: Any = super().envs()
        made.hide, made.hidden = 1.0, slice(None)
        return made


class GainsTrainer(Trainer):
    """Trains a masked network that is paid for gains and fined for nothing."""

    def envs(self) -> Any:
        made: Any = super().envs()
        made.penalties = False
        return made


def _trained(training: Training, fold: Fold, effort: Effort, folder: Path) -> Path:
    """The file of the fold's policy: the last one, since validation would cost another family."""
    steps = effort.network_steps if training.policy in NETWORKS else effort.bandit_steps
    reward = training.reward or policies.find(training.policy).reward
    plan = Plan(training.policy, "replay", fold.others, (), steps, HORIZONS, reward, 0, 256, steps)  # type: ignore[arg-type]
    kind = BlindTrainer if training.blind else Trainer if training.penalties else GainsTrainer
    trainer = kind(plan, folder)
    trainer.run()
    return trainer.best


def _player(entry: Entry, trained: Path | None) -> Policy:
    if trained is None:
        policy = policies.make(entry.spec)
    elif entry.guided:
        policy = policies.make(f"ppo_guided:weights={trained}")
    else:
        policy = policies.load(trained)
    for name, value in entry.options:
        setattr(policy, name, value)
    if entry.training is not None and entry.training.blind:
        assert isinstance(policy, NetworkPolicy)
        nothing: Observation = {name: np.zeros(size, np.float32) for name, size in LAYOUT.items()}
        logits = policy.outputs(nothing)
        policy.outputs = lambda observation: logits  # type: ignore[method-assign]
    return policy


def _fresh(policy: Policy, seed: int) -> Policy:
    made = copy.deepcopy(policy)
    made.training = False
    made.reseed(seed)
    return made
