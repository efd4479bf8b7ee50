"""Do trained policies beat chance on operator families they never saw, and what of them matters."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table as Grid

from benchmarks.figures import Figure, Figures, console
from ke_gym import policies
from ke_gym.envs import catalog
from ke_gym.envs.table import Table
from ke_gym.policies import Policy, plots
from ke_gym.policies.base import Observation
from ke_gym.policies.comparison import BASELINES, Comparison
from ke_gym.policies.learning import Plan, Trainer
from ke_gym.policies.network import NetworkPolicy
from ke_gym.policies.playing import replay_runs
from ke_gym.search.observation import LAYOUT

TRAINED = ("maskable_ppo", "ppo_guided", "linucb")
UNTRAINED = ("epsilon_greedy", "ucb1", "thompson", "hill_climb", "round_robin", "linucb:untrained", "uct")
HORIZONS = (20, 50, 100)
Makers = dict[str, Callable[[int], Policy]]


@dataclass
class Policies:
    """Shipped policies against the baselines on held-out families, and ablations."""

    tables: tuple[str, ...] = ("test",)
    """Held-out replay tables."""
    train: tuple[str, ...] = ("train",)
    """Tables that the ablations are trained on."""
    budgets: tuple[int, ...] = (20, 50, 100)
    """Evaluations of a search."""
    seeds: int = 20
    """Searches per policy and task."""
    steps: int = 300_000
    """Training steps of each ablation."""
    ablations: bool = True
    """Train and compare the ablations too (at the first budget)."""
    _figures: Figures = field(default_factory=lambda: Figures("policies"), init=False)

    def run(self) -> None:
        held = catalog.load(self.tables)
        console.print(f"{len(held)} tables: {', '.join(table.task for table in held)}", highlight=False)
        names = (*TRAINED, *UNTRAINED, *BASELINES)
        makers: Makers = {name: partial(policies.make, name) for name in names}
        for budget in self.budgets:
            comparison = compared(makers, held, budget, self.seeds, f"{budget} evaluations")
            for name in TRAINED:
                self._held(comparison, name, budget)
        if self.ablations:
            compared(
                self._ablated(),
                held,
                self.budgets[0],
                self.seeds,
                f"ablations, {self.budgets[0]} evaluations",
            )
        self._figures.print()

    def _held(self, comparison: Comparison, name: str, budget: int) -> None:
        (score,) = (score for score in comparison.scores if score.policy == name)
        for baseline, gap in score.over.items():
            measure = f"{name} over {baseline}, {budget} evaluations (AUC)"
            self._figures.add(Figure(measure, str(gap), "interval above 0", gap.low > 0))

    def _ablated(self) -> Makers:
        """MaskablePPO with one thing changed at a time."""
        with tempfile.TemporaryDirectory() as folder:
            trained = {
                name: self._trained(Path(folder) / name, kind, reward)
                for name, kind, reward in (
                    ("hard mask, reward best", "maskable_ppo", "best"),
                    ("no mask in training", "ppo", "best"),
                    ("reward parent", "maskable_ppo", "parent"),
                    ("reward milestone", "maskable_ppo", "milestone"),
                )
            }
        makers: Makers = {name: partial(_like, policy) for name, policy in trained.items()}
        whole = trained["hard mask, reward best"]
        makers["soft mask too"] = partial(_like, whole, soft_mask=2.0)
        makers["context off"] = partial(_blind, whole)
        makers["prior of a tree search"] = partial(_guided, whole)
        makers["tree search, prior off"] = partial(policies.make, "uct")
        return makers | {name: partial(policies.make, name) for name in BASELINES}

    def _trained(self, folder: Path, kind: str, reward: Any) -> NetworkPolicy:
        plan = Plan(
            kind,
            "replay",
            self.train,
            ("validation",),
            self.steps,
            HORIZONS,
            reward,
            0,
            256,
            self.steps // 10,
        )
        trainer = Trainer(plan, folder)
        trainer.run()
        console.print(
            f"trained {kind}, reward {reward}: validation AUC {trainer.state.best:.3f}", highlight=False
        )
        made = policies.load(trainer.best)
        assert isinstance(made, NetworkPolicy)
        return made


def _like(policy: NetworkPolicy, seed: int, soft_mask: float = 0.0) -> Policy:
    made = type(policy)(seed, soft_mask=soft_mask)
    made.layers, made.activation = policy.layers, policy.activation
    return made


def _blind(policy: NetworkPolicy, seed: int) -> Policy:
    """The same network, shown nothing but zeros: what is left is a fixed preference among strategies."""
    made = _like(policy, seed)
    assert isinstance(made, NetworkPolicy)
    nothing: Observation = {name: np.zeros(size, np.float32) for name, size in LAYOUT.items()}
    logits = made.outputs(nothing)
    made.outputs = lambda observation: logits  # type: ignore[method-assign]
    return made


def _guided(policy: NetworkPolicy, seed: int) -> Policy:
    made: Any = policies.make("ppo_guided:untrained", seed)
    made.network.layers, made.network.activation = policy.layers, policy.activation
    return made  # type: ignore[no-any-return]


def compared(makers: Makers, held: Sequence[Table], budget: int, seeds: int, title: str) -> Comparison:
    """Run and print one comparison."""
    runs = replay_runs(makers, held, budget, seeds)
    comparison = Comparison(runs, {table.task: table.optimum for table in held})
    grid = Grid(*plots.HEADER, title=title, title_justify="left")
    for row in plots.rows(comparison):
        grid.add_row(*row)
    console.print(grid)
    console.print(comparison.verdict(), highlight=False)
    return comparison
