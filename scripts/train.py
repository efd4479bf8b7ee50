"""Train a search policy, on recorded searches in a minute or live over one pool.

    python scripts/train.py --policy maskable_ppo --steps 500000
    python scripts/train.py --policy linucb --tasks norm pointwise --out my_linucb.json
    python scripts/train.py --policy ppo --env live --tasks softmax --steps 400

Writes the best policy by validation to --out, as a file that optimize.py, compare.py and `ke_gym.policies.load`
take; checkpoints and the log lie in the folder of that name. Exit code 2 for bad input, 130 after Ctrl-C (then
--resume goes on).
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ke_gym import policies, tasks
from ke_gym.envs import catalog
from ke_gym.errors import UserError
from ke_gym.job import check_out, check_seed
from ke_gym.policies.learning import NETWORKS, Plan, State, Trainer
from ke_gym.policies.tracking import Mode, Tracker


@dataclass(frozen=True)
class Args:
    """Train a search policy."""

    policy: str = "maskable_ppo"
    """Which policy: maskable_ppo, ppo and dqn are networks; any other learns by playing searches."""
    env: Literal["replay", "live"] = "replay"
    """Recorded searches, or kernels built and raced on this machine."""
    tasks: tuple[str, ...] = ()
    """What to learn from. Replay: tables (names, families, splits, files, folders; default: the split "train").
    Live: tasks."""
    validation: tuple[str, ...] = ("validation",)
    """Tables on which the best policy is chosen; they are never learned from."""
    steps: int | None = None
    """Environment steps in all; by default 3,000,000 for networks and 60,000 for others."""
    horizon: tuple[int, ...] = ()
    """Steps of one search. By default 20, 50 and 100 in replay, all lengths alike, and 20 live."""
    reward: Literal["auto", "best", "parent", "dense", "milestone"] = "auto"
    """What a step pays; auto is what the policy prefers."""
    seed: int = 0
    """Of the policy and the environments."""
    n_envs: int | None = None
    """Searches side by side, for networks: 256 in replay, 4 live."""
    every: int | None = None
    """Steps between two validations; by default 20 in all, and as before with --resume."""
    out: Path | None = None
    """The policy's file (*.json), by default runs/POLICY.json."""
    resume: bool = False
    """Go on with the training that --out belongs to."""
    wandb: Mode = "disabled"
    """Log to Weights & Biases."""
    group: str = "train"
    """The experiment that this run belongs to, in Weights & Biases."""
    tensorboard: Path | None = None
    """Write stable-baselines3's TensorBoard logs to this folder."""


def plan(args: Args) -> Plan:
    """The training that the arguments describe; ``UserError`` where they don't fit."""
    check_seed(args.seed)
    kind = policies.find(args.policy)
    chosen = args.tasks or (("train",) if args.env == "replay" else ())
    if args.env == "live":
        if not chosen:
            raise UserError("live training needs --tasks, for example softmax")
        chosen = tuple(task.path or task.name for spec in chosen for task in tasks.resolve(spec))
    steps = args.steps if args.steps is not None else 3_000_000 if args.policy in NETWORKS else 60_000
    every = args.every
    if every is None and args.resume:
        every = State.load(out_of(args).with_suffix("")).plan.get("every")
    return Plan(
        policy=args.policy,
        env=args.env,
        tasks=chosen,
        validation=args.validation,
        steps=steps,
        horizon=args.horizon or ((20, 50, 100) if args.env == "replay" else (20,)),
        reward=kind.reward if args.reward == "auto" else args.reward,  # type: ignore[arg-type]
        seed=args.seed,
        n_envs=args.n_envs if args.n_envs is not None else 256 if args.env == "replay" else 4,
        every=every if every is not None else max(steps // 20, 1),
    )


def out_of(args: Args) -> Path:
    """The policy's file; ``UserError`` for one that is no ``*.json``, by which policies are known."""
    out = args.out or Path("runs") / f"{args.policy}.json"
    if out.suffix != ".json" or out.is_dir():
        raise UserError(
            f"--out {out} is no file that a policy can be written to; name one that ends in .json"
        )
    return out


def main(args: Args) -> int:
    out = out_of(args)
    made = plan(args)
    check_out(out.parent)
    held = {table.task for table in catalog.load(made.validation)} if made.validation else set()
    if made.env == "replay":
        learned = [table.task for table in catalog.load(made.tasks)]
    else:
        learned = [task.name for spec in made.tasks for task in tasks.resolve(spec)]
    both = [task for task in learned if task in held]
    if both:
        raise UserError(
            f"{', '.join(both)}: both to learn from and to validate on; name others with --validation"
        )
    trainer = Trainer(made, out.with_suffix(""), resume=args.resume, tensorboard=args.tensorboard)
    tracker = Tracker(
        args.wandb, kind="train", name=f"{made.policy}-{made.seed}", group=args.group,
        config={**asdict(made), "tables": trainer.state.tables}, folder=trainer.folder, run_id=trainer.state.wandb,
    )  # fmt: skip
    trainer.state.wandb = tracker.run_id
    console = Console()
    if not console.is_terminal:
        console.width = 120
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"),
        TimeRemainingColumn(), console=console, transient=True,
    )  # fmt: skip
    with bar:
        progress = bar.add_task(made.policy, total=made.steps, completed=trainer.state.steps)

        def watch(record: dict[str, Any]) -> None:
            bar.update(progress, completed=record["steps"])
            console.print(line(record), highlight=False)
            tracker.log({key: value for key, value in record.items() if key != "steps"}, step=record["steps"])

        ended = trainer.run(watch)
    if trainer.best.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(trainer.best, out)
        tracker.artifact(made.policy, "policy", out)
        console.print(f"policy: {out}", highlight=False, soft_wrap=True)
    tracker.finish()
    if ended == "interrupted":
        console.print("interrupted; the same command with --resume goes on", highlight=False)
        return 130
    return 0


def line(record: dict[str, Any]) -> str:
    """One validation, in one line."""
    rate = record["steps"] / max(record["seconds"], 1e-9)
    text = f"{record['steps']:>9} steps, {rate:,.0f} a second: reward {record['reward']:.3f}"
    if "validation_auc" in record:
        text += f", validation AUC {record['validation_auc']:.3f}, speedup e^{record['validation_log_speedup']:.3f}"
    return text + (" *" if record["best"] else "")


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before the training
        print("interrupted before the training began; start it again", file=sys.stderr)
        sys.exit(130)
