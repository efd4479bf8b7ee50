"""Record searches as tables that the replay environment plays back.

    python scripts/record.py softmax rms_norm --budget 100
    python scripts/record.py --from runs/store.db --out tables
    python scripts/record.py --from other/softmax.npz --out tables
    python scripts/record.py --verify tables

The first form searches live, breadth-first: every strategy on the fastest versions of each depth. Everything
measured is kept in a store (raw times, outcomes, costs); a recording that was stopped goes on where it was, and
one of greater breadth adds to the table, whose verdicts are taken as known. The second form makes tables of
searches that are already in a store, from whatever policy, or joins tables of the same machine. Exit code 2 for
bad input, 130 after Ctrl-C (what was recorded by then is kept).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table as Grid

from ke_gym import proposers, tasks
from ke_gym.candidate import Candidate
from ke_gym.envs import catalog, compiling
from ke_gym.envs.recording import Breadth, record, repeated
from ke_gym.envs.table import Table
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.job import check_out, check_seed, remembering
from ke_gym.proposers.base import Context, Proposal, Proposer
from ke_gym.report.live import LiveView, PlainView
from ke_gym.search.budget import Budget
from ke_gym.search.observation import Surroundings
from ke_gym.search.session import Session, new_session_id
from ke_gym.search.store import Setting, Store
from ke_gym.strategies import Strategy
from ke_gym.tasks import Task


@dataclass(frozen=True)
class Args:
    """Record searches as replay tables."""

    tasks: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Which tasks: names, families, "suite", files. With --from all tasks of the stores; with --verify files."""
    sources: Annotated[tuple[Path, ...], tyro.conf.arg(name="from")] = ()
    """Make tables of the searches in these stores (*.db) and tables (*.npz) instead of searching."""
    verify: bool = False
    """Check the tables named (files or folders) and list them."""
    out: Path = Path("tables")
    """The folder of the tables, one file per task."""
    store: Path | None = None
    """Where a live recording is kept; by default store.db beside the tables."""
    breadth: Breadth = dataclass_field(default_factory=Breadth)
    """How widely a live recording searches."""
    budget: int = 200
    """Most evaluations of a live recording per task."""
    seed: int = 0
    """Of the proposer."""
    proposer: str = "rewriter"
    """What writes the candidates."""
    threads: int | None = None
    """CPU threads of every kernel and of the reference; all cores by default."""


def main(args: Args) -> int:
    console = Console()
    if not console.is_terminal:
        console.width = 140
    if args.verify:
        files = catalog.files(args.tasks or (args.out,))
        show(console, [Table.load(path) for path in files])
        return 0
    if args.sources:
        made = compiling.from_files(args.sources, args.tasks, args.out)
        show(console, made)
        return 0
    if not args.tasks:
        raise UserError("name at least one task, or a store with --from")
    check_seed(args.seed)
    proposers.check(args.proposer)
    check_out(args.out)
    chosen = [task for spec in args.tasks for task in tasks.resolve(spec)]
    made: list[Table] = []
    ended = "complete"
    for number, task in enumerate(chosen, 1):
        title = task.name if len(chosen) == 1 else f"{task.name} ({number} of {len(chosen)})"
        proposer = proposers.make(args.proposer, task)
        try:
            ended = search(args, task, proposer, console, title)
        except KeyboardInterrupt:  # before or after the recording, which ends by itself
            ended = "interrupted"
        try:
            (table,) = compiling.from_files([store_of(args)], (task.name,), args.out)
        except UserError:
            if ended != "interrupted":
                raise
            console.print(
                f"interrupted before anything of {task.name} was recorded; the same command starts it anew",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
            break
        if not proposer.stochastic:
            table = compiling.closed(table, alternatives(proposer), proposer.draws)
            table.save(args.out / f"{task.name}.npz")
        made.append(table)
        if ended == "interrupted":
            break
    if made:
        show(console, made)
    return 130 if ended == "interrupted" else 0


def store_of(args: Args) -> Path:
    return args.store or args.out / "store.db"


def alternatives(proposer: Proposer) -> compiling.Alternative:
    """What the proposer makes of a parent whenever it is asked; nothing of ``param_tune``, which depends on what was tried."""

    def made(parent: Candidate, strategy: Strategy, draw: int) -> Candidate | None:
        if strategy.name == "param_tune":
            return None
        proposal = proposer.propose(parent, strategy, draw, Context())
        return proposal.candidate if isinstance(proposal, Proposal) else None

    return made


def search(args: Args, task: Task, proposer: Proposer, console: Console, title: str) -> str:
    """Record one task into the store; returns why it ended."""
    view = LiveView(console, title) if console.is_terminal else PlainView(console, title)
    with Store(store_of(args)) as store, Evaluator(task, threads=args.threads) as evaluator, view:
        setting = Setting(task.id, evaluator.target, evaluator.facts.fingerprint, evaluator.baseline,
                          evaluator.threads)  # fmt: skip
        session = Session(
            store,
            new_session_id("record 2", setting, args.breadth, args.seed, args.proposer),
            setting,
            proposer,
            budget=Budget(args.budget),
            seed=args.seed,
            settings={"policy": "breadth"},
            surroundings=Surroundings.of(evaluator),
        )
        store.add_task(task)
        if (known := args.out / f"{task.name}.npz").exists():
            compiling.remember(store, setting, Table.load(known))
        remembered = remembering(store, setting, evaluator)
        evaluate = repeated(remembered, evaluator.evaluate, args.breadth.repeats)
        return record(session, evaluate, args.breadth, watch=view)


def show(console: Console, tables: list[Table]) -> None:
    """A row per table: what it holds, how well it covers each depth, and what there is to gain."""
    grid = Grid(
        "task",
        "split",
        "versions",
        "correct",
        "edges",
        "repeats",
        "coverage by depth",
        "median",
        "best",
        "hash",
    )
    for table in tables:
        covered = " ".join(f"{share:.2f}" for share in table.coverage())
        grid.add_row(
            table.task, catalog.split_of(table.family), str(len(table)), f"{table.correct.mean():.2f}",
            str(len(table.edges)), str(len(table.repeats)), covered, f"{table.median:.2f}x",
            f"{table.optimum:.2f}x", table.hash,
        )  # fmt: skip
    console.print(grid)


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before the first search
        print("interrupted; the same command goes on with what is in the store", file=sys.stderr)
        sys.exit(130)
