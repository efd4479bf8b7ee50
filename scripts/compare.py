"""Compare search policies at equal cost.

    python scripts/compare.py --policies maskable_ppo linucb ucb1 --budget 50
    python scripts/compare.py --policies runs/my.json --tasks test --seeds 20 --wandb offline
    python scripts/compare.py --policies maskable_ppo --env live --tasks map_id attention_vanilla --budget 20
    python scripts/compare.py --pool runs/one-machine runs/another

Masked random and best-of-N always take part: a policy that does not beat both has shown nothing. All runs share
their random numbers. Prints a table; writes compare.json, figures and index.html. Exit code 2 for bad input.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ke_gym import policies, tasks
from ke_gym.envs import LIVE, catalog, make
from ke_gym.errors import UserError
from ke_gym.job import check_out
from ke_gym.policies import Policy, plots
from ke_gym.policies.comparison import BASELINES, CHANCE, Comparison
from ke_gym.policies.playing import Episode, play, replay_runs, settled
from ke_gym.policies.pooling import pooled
from ke_gym.policies.tracking import Mode, Tracker

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("policies"))


@dataclass(frozen=True)
class Args:
    """Compare search policies at equal cost."""

    policies: tuple[str, ...] = ()
    """Names (with options: ucb1:c=0.2) or files of trained ones."""
    tasks: tuple[str, ...] = ("test",)
    """Replay: tables (names, families, splits, files, folders). Live: tasks, families, files."""
    budget: int = 50
    """Evaluations of one search."""
    seeds: int = 10
    """Searches per policy and task."""
    env: Literal["replay", "live"] = "replay"
    """Recorded searches, or kernels built and raced on this machine."""
    threads: int | None = None
    """Live: CPU threads of every kernel and of the reference; all cores by default."""
    pool: tuple[Path, ...] = ()
    """Compare nothing anew: pool finished comparisons (their --out folders), each of other tasks."""
    workload: str = ""
    """A name for this comparison in figures and logs."""
    out: Path = Path("runs/compare")
    """The folder for compare.json, figures and the page."""
    wandb: Mode = "disabled"
    """Log to Weights & Biases."""
    group: str = "compare"
    """The experiment that this run belongs to, in Weights & Biases."""


def main(args: Args) -> int:
    if args.seeds < 1 or args.budget < 1:
        raise UserError("--seeds and --budget have to be positive")
    console = Console()
    if not console.is_terminal:
        console.width = 240
    if args.pool:
        if args.out.resolve() in {folder.resolve() for folder in args.pool}:
            raise UserError(f"--out {args.out} is one of the comparisons to pool; choose another folder")
        comparison = pooled(args.pool)
        check_out(args.out)
        title = args.workload or f"{len(comparison.tasks)} tasks, {comparison.budget} evaluations"
        show(console, comparison, title, args.out, {"seen_in_training": comparison.seen})
        return 0
    if not args.policies:
        raise UserError("name the --policies to compare, or finished comparisons to --pool")
    names = list(dict.fromkeys((*args.policies, *BASELINES)))
    called = labels(names)
    seen = seen_in_training(args, {called[name]: policies.make(name) for name in names})
    few = scarce(args)
    check_out(args.out)
    title = args.workload or f"{args.env}: {' '.join(args.tasks)}, {args.budget} evaluations"
    tracker = Tracker(
        args.wandb, kind="compare", name=title, group=args.group, config=asdict(args) | {"out": str(args.out)},
        folder=args.out,
    )  # fmt: skip
    episodes, best = (replayed if args.env == "replay" else measured)(args, names, console)
    comparison = Comparison({called[name]: runs for name, runs in episodes.items()}, best, seen)
    for task, drafts in few.items():
        console.print(f"{task} holds {drafts} drafts only: best-of-N has no more of them", highlight=False)
    show(console, comparison, title, args.out, {"seen_in_training": seen, "fewer_drafts_than_budget": few})
    log(tracker, comparison, episodes, called, args.out)
    return 0


def show(console: Console, comparison: Comparison, title: str, out: Path, more: dict[str, Any]) -> None:
    """Print the table and the verdict, and write compare.json, figures and the page."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.json").write_text(json.dumps(comparison.to_dict() | more))
    if not comparison.telling:
        raise UserError(
            "masked random reaches the best known at once on all these tasks: they separate no policies"
        )
    table = Table(*plots.HEADER, title=title, title_justify="left")
    for row in plots.rows(comparison):
        table.add_row(*row)
    console.print(table)
    for name, overlap in comparison.seen.items():
        console.print(f"{name} was trained on {', '.join(overlap)}", highlight=False)
    console.print(comparison.verdict(), highlight=False)
    page = plots.write(comparison, out, title)
    console.print(f"figures: {page}", highlight=False, soft_wrap=True)


def labels(names: Sequence[str]) -> dict[str, str]:
    """What each policy is called in tables and figures: a file by its stem, unless another is called so too."""
    stems = {name: Path(name).stem if name.endswith(".json") else name for name in names}
    counts = Counter(stems.values())
    return {name: stem if counts[stem] == 1 else name for name, stem in stems.items()}


def seen_in_training(args: Args, compared: dict[str, Policy]) -> dict[str, list[str]]:
    """Policy to the tasks of this comparison that it was trained or chosen on."""
    if args.env == "replay":
        here = [table.task for table in catalog.load(args.tasks)]
    else:
        here = [task.name for task in live_tasks(args)]
    found = {}
    for name, policy in compared.items():
        # Files of before named the tasks of live training by their paths.
        known = {*policy.trained_on.get("tables", {})}
        if policy.trained_on.get("env") == "live":
            known |= {Path(task).stem for task in policy.trained_on.get("tasks", ())}
        known |= {*policy.trained_on.get("validated_on", ())}
        overlap = sorted(known & {*here})
        if overlap:
            found[name] = overlap
    return found


def live_tasks(args: Args) -> list[tasks.Task]:
    """The tasks to compare on, each once; ``UserError`` for two of one name, which tables could not tell apart."""
    chosen = {task.id: task for spec in args.tasks for task in tasks.resolve(spec)}
    counts = Counter(task.name for task in chosen.values())
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UserError(f"there are different tasks called {', '.join(twice)}; name one of each in --tasks")
    return list(chosen.values())


def scarce(args: Args) -> dict[str, int]:
    """Task to its number of recorded drafts where that is below the budget; live, drafts never run out."""
    if args.env == "live":
        return {}
    return {t.task: len(t.drafts) for t in catalog.load(args.tasks) if len(t.drafts) < args.budget}


def replayed(
    args: Args, names: list[str], console: Console
) -> tuple[dict[str, list[list[Episode]]], dict[str, float]]:
    """Runs over tables: policy to runs, each with an episode per table; and the best known speedups."""
    tables = catalog.load(args.tasks)
    makers = {name: partial(policies.make, name) for name in names}
    with Progress(*COLUMNS, console=console, transient=True) as bar:
        done = bar.add_task("comparing", total=len(names))
        found = replay_runs(makers, tables, args.budget, args.seeds, lambda name: bar.advance(done))
    return found, {table.task: table.optimum for table in tables}


def measured(
    args: Args, names: list[str], console: Console
) -> tuple[dict[str, list[list[Episode]]], dict[str, float]]:
    """Runs live. Every policy remembers its own earlier runs, and no other's.

    A kernel that is measured races the best so far; one that is remembered is compared by numbers of two occasions,
    which favours whoever comes later. Ctrl-C ends it with the runs that are complete, if there are any; what is
    remembered makes another start quick.
    """
    chosen = live_tasks(args)
    stores = {name: args.out / f"{i} {Path(name).stem}.db" for i, name in enumerate(names)}
    found: dict[str, list[list[Episode]]] = {name: [] for name in names}
    running: dict[str, Any] = {}
    try:
        for seed in range(args.seeds):
            run: dict[str, list[Episode]] = {name: [] for name in names}
            for number, task in enumerate(chosen):
                # In turn, so that a drift of the machine meets all alike; each is the first as often as the others.
                first = (seed + number) % len(names)
                for name in (*names[first:], *names[:first]):
                    policy = policies.make(name, seed)
                    env = running.pop(name, None) or make(
                        LIVE, tasks=task, horizon=args.budget, parent_rule=policy.parent_rule, reward=policy.reward,
                        threads=args.threads, store=stores[name],
                    )  # fmt: skip
                    running[name] = env
                    run[name].append(play(policy, env, seed=seed, keep=True))
                    if len(chosen) > 1:
                        running.pop(name).close()
                    reached = math.exp(run[name][-1].curve[-1])
                    console.print(f"{task.name} seed {seed} {name}: {reached:.2f}x", highlight=False)
            for name in names:
                found[name].append(run[name])
    except KeyboardInterrupt:
        if not found[CHANCE]:
            raise
        console.print(f"stopped after {len(found[CHANCE])} of {args.seeds} runs of all tasks")
    finally:
        for env in running.values():
            env.close()
    flat = settled([episode for runs in found.values() for run in runs for episode in run])
    told = iter(flat)
    found = {name: [[next(told) for _ in run] for run in runs] for name, runs in found.items()}
    best: dict[str, float] = {}
    for episode in flat:
        best[episode.task] = max(best.get(episode.task, 1.0), math.exp(episode.curve.max()))
    return found, best


def best_kernels(episodes: dict[str, list[list[Episode]]], out: Path) -> list[Path]:
    """The fastest correct kernel of each task, as files; only live runs have any."""
    fastest: dict[str, dict[str, Any]] = {}
    for runs in episodes.values():
        for episode in (episode for run in runs for episode in run):
            for made in episode.candidates:
                if made["speedup"] > fastest.get(episode.task, {"speedup": 0.0})["speedup"]:
                    fastest[episode.task] = made
    paths = []
    for task, made in fastest.items():
        path = out / "kernels" / f"{task}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(made["source"])
        paths.append(path)
    return paths


def log(
    tracker: Tracker,
    comparison: Comparison,
    episodes: dict[str, list[list[Episode]]],
    called: dict[str, str],
    out: Path,
) -> None:
    """The same to Weights & Biases: curves, scores, figures, and every candidate of live runs."""
    for step in range(comparison.budget):
        means = {name: float(curves[:, :, step].mean()) for name, curves in comparison.curves.items()}
        tracker.log({f"log_speedup/{name}": value for name, value in means.items()}, step=step + 1)
    tracker.table("scores", list(plots.HEADER), [list(row) for row in plots.rows(comparison)])
    candidates: list[list[Any]] = [
        [name, episode.task, made["candidate"], made["outcome"], made["speedup"], made["source"]]
        for name, runs in episodes.items()
        for run in runs
        for episode in run
        for made in episode.candidates
    ]
    if candidates:
        tracker.table(
            "candidates", ["policy", "task", "candidate", "outcome", "speedup", "source"], candidates
        )
    for path in best_kernels(episodes, out):
        tracker.artifact(f"kernel-{path.stem}", "kernel", path)
    for name in plots.FIGURES:
        tracker.image(name, out / f"{name}.png")
    tracker.summary({f"auc/{score.policy}": score.auc.value for score in comparison.scores})
    tracker.artifact("comparison", "comparison", out / "compare.json")
    for spec in episodes:
        if spec.endswith(".json"):
            tracker.artifact(called[spec].replace("/", "-"), "policy", Path(spec))
    tracker.finish()


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
