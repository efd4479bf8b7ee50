"""Do trained policies beat chance on operator families they never saw, and what of them matters."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as Grid

from benchmarks.figures import Figure, Figures, console, machine
from benchmarks.folds import Effort, Entry, Fold, Found, Training, distinct, folds, grouped, play
from ke_gym import policies
from ke_gym.envs import catalog
from ke_gym.errors import UserError
from ke_gym.job import check_out
from ke_gym.policies import plots, statistics
from ke_gym.policies.comparison import BASELINES, CHANCE, Comparison

TRAINED = (
    "puct", "ucb1", "discounted_ucb", "thompson", "beta_thompson", "linucb", "lints", "boosted_trees", "rotting",
    "maskable_ppo", "ppo_guided",
)  # fmt: skip
UNTRAINED = (
    "epsilon_greedy", "ucb1", "thompson", "auc_bandit", "hill_climb", "round_robin", "linucb:untrained", "uct",
    "puct:untrained", "kernelband", "islands_map_elites",
)  # fmt: skip
CHOSEN = "chosen by the other families"
"""In every family, the trained policy that is best in all others: what the best of many is worth without luck."""
HARD = 1e9  # logits: never, while the mask lasts
COLUMNS = (BarColumn(), MofNCompleteColumn(), TextColumn("trainings and tests"), TimeRemainingColumn())


def ablations() -> list[Entry]:
    """One thing changed at a time."""
    network, tree = Training("maskable_ppo"), Training("puct")
    return [
        Entry("maskable_ppo as it is", training=network),
        Entry("maskable_ppo, mask of the bottleneck soft", training=network, options=(("soft_mask", 2.0),)),
        Entry("maskable_ppo, mask of the bottleneck hard", training=network, options=(("soft_mask", HARD),)),
        Entry("maskable_ppo, mask of legal actions off in training", training=Training("ppo")),
        Entry("maskable_ppo, context off", training=Training("maskable_ppo", blind=True)),
        *(
            Entry(f"maskable_ppo, reward {kind}", training=Training("maskable_ppo", kind))
            for kind in ("best", "parent", "milestone")
        ),
        Entry("maskable_ppo, paid for gains alone", training=Training("maskable_ppo", "best", penalties=False)),
        Entry("puct as it is", training=tree),
        Entry("puct, mask of the bottleneck off", training=tree, options=(("soft_mask", 0.0),)),
        Entry("puct, mask of the bottleneck hard", training=tree, options=(("soft_mask", HARD),)),
        Entry("puct, prior off", "uct:c=0.5"),
        *(Entry(f"puct, reward {kind}", training=Training("puct", kind)) for kind in ("best", "dense")),
        *(Entry(f"kernelband, c = {c:g}", f"kernelband:c={c}") for c in (0.05, 0.2, 0.5, 1.0, 2.0)),
    ]  # fmt: skip


@dataclass
class Policies:
    """Leave-one-family-out: policies trained on all other operator families against the baselines, and ablations."""

    tables: tuple[str, ...] = ("all",)
    """Replay tables (names, families, splits, files, folders) of at least two families."""
    trained: tuple[str, ...] = TRAINED
    """Policies that are trained in every fold."""
    untrained: tuple[str, ...] = UNTRAINED
    """Policies that are not."""
    budgets: tuple[int, ...] = (20, 50, 100)
    """Evaluations of a search."""
    seeds: int = 10
    """Searches per policy and task."""
    steps: int = 300_000
    """Training steps of a network in each fold."""
    bandit_steps: int = 20_000
    """Training steps of any other policy in each fold."""
    ablations: bool = True
    """Train and compare the ablations too."""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Processes; each trains or tests one policy in one fold."""
    out: Path = Path("runs/policies")
    """The folder for folds.json, and for figures and a page of each budget."""

    def run(self) -> None:
        if min(self.seeds, self.steps, self.bandit_steps, self.workers, *self.budgets) < 1:
            raise UserError("--seeds, --steps, --bandit-steps, --workers and --budgets have to be positive")
        if not console.is_terminal:
            console.width = 240
        made, effort = folds(self.tables), Effort(self.budgets, self.seeds, self.steps, self.bandit_steps)
        for fold in made:
            console.print(
                f"{fold.family}: {', '.join(Path(path).stem for path in fold.held)}", highlight=False
            )
        changed = ablations() if self.ablations else []
        entries = [*self.entries(), *changed]
        distinct(entries)
        check_out(self.out)
        total = len(grouped(entries)) * len(made)
        with Progress(*COLUMNS, console=console, transient=True) as bar:
            task = bar.add_task("", total=total)
            found = play(entries, made, effort, self.workers, lambda: bar.advance(task))
        self.report(made, found, [entry.name for entry in changed])

    def entries(self) -> list[Entry]:
        """The policies that are compared, baselines included."""
        for name in (*self.trained, *(spec.partition(":")[0] for spec in self.untrained)):
            policies.find(name)
        return [
            *(
                Entry("ppo_guided, trained", training=Training("maskable_ppo"), guided=True)
                if name == "ppo_guided"
                else Entry(f"{name}, trained", training=Training(name))
                for name in self.trained
            ),
            *(
                Entry(spec.removesuffix(":untrained"), untrained(spec))
                for spec in (*self.untrained, *(name for name in BASELINES if name not in self.untrained))
            ),
        ]

    def report(self, made: Sequence[Fold], found: Found, changed: Sequence[str]) -> None:
        """Print tables and figures, and write everything to ``out``."""
        loaded = {table.task: table for fold in made for table in catalog.load(fold.held)}
        families = {task: table.family for task, table in loaded.items()}
        best = {task: table.optimum for task, table in loaded.items()}
        figures = Figures("policies")
        data: list[dict[str, Any]] = []
        for budget in self.budgets:
            runs = {name: by_budget[budget] for name, by_budget in found.items()}
            main = {name: episodes for name, episodes in runs.items() if name not in changed}
            learned = [name for name in main if name.endswith(", trained")]
            if learned:
                main[CHOSEN] = chosen(Comparison(main, best), learned, families)
            title = f"leave one family out: {len(made)} families, {len(loaded)} tasks, {budget} evaluations"
            comparison = Comparison(main, best)
            scarce = [task for task, table in loaded.items() if len(table.drafts) < budget]
            told = self._told(comparison, families, title, self.out / str(budget))
            data.append(told | {"fewer_drafts_than_budget": scarce})
            console.print(
                f"{len(scarce)} of {len(loaded)} tables hold fewer than {budget} drafts: there best-of-N runs out of them",
                highlight=False,
            )
            for name in (*learned, *((CHOSEN,) if learned else ())):
                figures.extend(held(comparison, name, families))
            if changed:
                ablated = Comparison({n: runs[n] for n in (*changed, *BASELINES)}, best)
                folder = self.out / f"{budget}-ablations"
                data.append(self._told(ablated, families, f"ablations, {budget} evaluations", folder))
        figures.print()
        everything = {
            "machine": machine(), "seeds": self.seeds, "steps": self.steps, "bandit_steps": self.bandit_steps,
            "folds": {fold.family: [Path(path).stem for path in fold.held] for fold in made},
            "tables": {task: table.hash for task, table in loaded.items()},
            "figures": [vars(figure) for figure in figures.figures], "comparisons": data,
        }  # fmt: skip
        (self.out / "folds.json").write_text(json.dumps(everything, indent=1))
        console.print(f"written to {self.out}", highlight=False, soft_wrap=True)

    def _told(
        self, comparison: Comparison, families: dict[str, str], title: str, folder: Path
    ) -> dict[str, Any]:
        if not comparison.telling:
            raise UserError("masked random reaches the best known at once: these tables separate no policies")
        grid = Grid(*plots.HEADER, title=title, title_justify="left")
        for row in plots.rows(comparison):
            grid.add_row(*row)
        console.print(grid)
        plots.write(comparison, folder, title)
        over = {
            name: {base: vars(over_families(comparison, name, base, families)) for base in BASELINES if base != name}
            for name in comparison.policies
        }  # fmt: skip
        return {"title": title, **comparison.to_dict(), "over_redrawing_families": over}


def untrained(spec: str) -> str:
    """The policy without the training that ships, which knows the families left out; ``UserError`` for one with
    options that would be made from that."""
    policies.make(spec if ":" in spec else f"{spec}:untrained")
    name, _, options = spec.partition(":")
    shipped = policies.find(name).pretrained or (policies.PRETRAINED / f"{name}.json").exists()
    if options not in ("", "untrained") and shipped:
        raise UserError(
            f"{spec} is made from the trained {name} that ships; name {name}:untrained, or --trained {name}"
        )
    return f"{name}:untrained" if shipped else spec


def held(comparison: Comparison, name: str, families: dict[str, str]) -> Iterable[Figure]:
    """How far a policy is beyond each baseline, by two intervals: tasks redrawn, and whole families."""
    (score,) = (score for score in comparison.scores if score.policy == name)
    for baseline, gap in score.over.items():
        wide = over_families(comparison, name, baseline, families)
        value = f"{gap}; families redrawn [{wide.low:.3f}, {wide.high:.3f}]"
        measure = f"{name} over {baseline}, {comparison.budget} evaluations (AUC)"
        yield Figure(measure, value, "interval above 0", gap.low > 0)


def over_families(
    comparison: Comparison, name: str, baseline: str, families: dict[str, str]
) -> statistics.Interval:
    """The mean difference of AUC, with an interval from redrawing families: it speaks of families not tried."""
    clusters = [families[comparison.tasks[t]] for t in comparison.telling]
    return statistics.clustered_difference(comparison.auc(name), comparison.auc(baseline), clusters)


def chosen(comparison: Comparison, names: Sequence[str], families: dict[str, str]) -> list[list[Any]]:
    """Runs of, in every family, the policy with the highest mean AUC over the tasks of all other families."""
    told = np.array([families[comparison.tasks[t]] for t in comparison.telling])
    scores = {name: comparison.auc(name).mean(axis=0) for name in names}
    picks = {
        family: max(names, key=lambda name: float(scores[name][told != family].mean()))
        for family in dict.fromkeys(families.values())
        if (told != family).any()
    }
    return [
        [
            comparison.episodes[picks.get(families[task], CHANCE)][run][t]
            for t, task in enumerate(comparison.tasks)
        ]
        for run in range(len(comparison.episodes[CHANCE]))
    ]
