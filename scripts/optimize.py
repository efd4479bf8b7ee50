"""Make PyTorch code faster: search for a kernel, prove it, race it, report it.

    python scripts/optimize.py softmax
    python scripts/optimize.py my_problem.py --budget 100 --baseline compile
    python scripts/optimize.py suite --seconds 120 --out results

Exit code 0 when every search reached a verdict, 2 for bad input (one sentence says what; of several tasks, the
others are still optimized), 130 after Ctrl-C (what was found until then is reported and kept).
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.text import Text

from ke_gym import policies, proposers, tasks
from ke_gym.errors import UserError
from ke_gym.evaluation.opening import kernel_language
from ke_gym.evaluation.selfcheck import Proof
from ke_gym.job import RunSettings, check_out, check_seed, optimize, read_run, recorded_task
from ke_gym.policies.tracking import Mode, Tracker
from ke_gym.proposers import Refusal, warm
from ke_gym.proposers.llm import LLM, Memory, models
from ke_gym.report.live import LiveView, PlainView
from ke_gym.report.table import summary
from ke_gym.search.budget import Budget
from ke_gym.search.result import Result
from ke_gym.search.run import Watch
from ke_gym.search.session import Ask, Request, Session
from ke_gym.search.tree import Node
from ke_gym.tasks import Task

# Why searches end; anything else is a sentence.
STOPS = ("evaluations", "seconds", "dollars", "STOP", "interrupted", "nothing left to try")
# What makes a search what it is, unless the arguments or the run to be resumed say otherwise.
DEFAULTS = {
    "target": "cpu", "language": "", "baseline": "eager", "policy": "epsilon_greedy", "proposer": "rewriter", "seed": 0,
    "threads": None,
}  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Search for faster kernels for one or more tasks."""

    tasks: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Suite tasks, "suite", a family ("family:softmax" where a task has that name), KernelBench-format files or folders."""
    target: str | None = None
    """The device to optimize for; cpu by default."""
    language: str | None = None
    """What kernels for a GPU are generated in: triton (the default) or cuda, which is CUDA C++."""
    policy: str | None = None
    """Which search policy chooses the transformations: a name (epsilon_greedy by default), or the file of a saved
    one."""
    proposer: str | None = None
    """What writes the candidates: rewriter (the default), openai (a language model), or both: rewriter,openai."""
    model: str = ""
    """For openai: the model, or several, as "small,large", of which a bandit chooses. The endpoint and its key are
    taken from OPENAI_BASE_URL and OPENAI_API_KEY."""
    max_dollars: float | None = None
    """What models may cost in a search, never more: proposals, choices of the policy llm_chooser, lessons."""
    prices: str = ""
    """A JSON file of models' prices, {"model": [dollars per million prompt tokens, per million answer tokens]}."""
    edit_mode: Literal["auto", "edit", "rewrite"] = "auto"
    """For openai: answers as edits of the parent or as whole modules."""
    memory: Memory = "auto"
    """For openai: what prompts tell of the search so far."""
    in_flight: int = 8
    """For openai: how many answers are waited for at once."""
    max_tokens: int = 16_000
    """For openai: the most tokens of one answer, thoughts included."""
    timeout: float = 300.0
    """For openai: seconds one call may take."""
    knowledge: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """For openai: a folder of your own documents, which overlay the built-in ones. May be given several times."""
    use_knowledge: bool = True
    """For openai: quote documents of the knowledge base in prompts."""
    learned: bool = True
    """Keep what this search teaches as lessons beside the store (with openai, the model puts them in words), and tell
    models of those kept before."""
    warm_start: float = 0.0
    """How often a draft is the best recorded kernel of this or a similar task, from 0 to 1. It saves time, and narrows
    the search."""
    record: str = ""
    """For openai: keep the conversation in this file, a cassette."""
    replay: str = ""
    """For openai: answer from this cassette instead of asking anyone."""
    budget: int | None = None
    """Evaluations per task, failures included; 60 by default."""
    seconds: float | None = None
    """Seconds per task; the first limit that is reached ends the search."""
    seed: int | None = None
    """Seed of the search's choices; 0 by default."""
    baseline: str | None = None
    """What speedups are against: eager (the default), compile (torch.compile) or max-autotune (its mode of that
    name)."""
    threads: int | None = None
    """CPU threads for kernels and reference alike; all cores by default."""
    exchange: Path | None = None
    """For a GPU on another machine: a folder that both see, served there by evaluate.py --serve."""
    out: Path = Path("runs")
    """The folder that gets a folder per run."""
    resume: Path | None = None
    """The folder of an earlier run: continue that search as it was, to its own limits (give a larger --budget to extend
    it)."""
    wandb: Mode = "disabled"
    """Report every search to Weights & Biases, as a run of its own: online, offline, or disabled."""
    json: bool = False
    """Print one JSON list of results instead of progress and a table."""


def settings(args: Args) -> dict[str, Any]:
    """What of a search is not to change when it is resumed, as ``optimize`` takes it."""
    given = {name: getattr(args, name) for name in DEFAULTS}
    return {name: DEFAULTS[name] if value is None else value for name, value in given.items()}


def check_unchanged(args: Args, folder: Path, recorded: RunSettings) -> None:
    """``UserError`` for an argument that differs from what the run to be resumed was made with."""
    for name in DEFAULTS:
        given, before = getattr(args, name), getattr(recorded, name)
        if given is not None and given != before:
            raise UserError(
                f"{folder} was made with --{name} {before}, and a search is resumed as it was: leave out"
                f" --{name} {given}, or start a new run"
            )


def tasks_of(args: Args) -> list[Task]:
    """The tasks to optimize, after checks that need none of them."""
    if args.resume is not None:
        folder, recorded = read_run(args.resume)
        check_unchanged(args, folder, recorded)
        if not args.tasks:
            return [recorded_task(folder, recorded)]
    elif not args.tasks:
        raise UserError("name at least one task, for example softmax (scripts/tasks.py list shows them all)")
    chosen = [task for spec in args.tasks for task in tasks.resolve(spec)]
    if len(chosen) != 1 and args.resume is not None:
        raise UserError(f"--resume continues one run, but {len(chosen)} tasks were named")
    if len(chosen) != 1 and (args.record or args.replay):
        raise UserError(
            f"a cassette holds the conversation of one search, but {len(chosen)} tasks were named"
        )
    return chosen


class Tracked(Watch):
    """Passes on what it watches, and reports every candidate to a W&B run."""

    columns = ("number", "parent", "strategy", "outcome", "speedup", "improved", "candidate", "source")

    def __init__(self, view: Watch, tracker: Tracker) -> None:
        self.view, self.tracker = view, tracker
        self.rows: list[list[Any]] = []

    def proved(self, task: Task, proof: Proof) -> None:
        self.view.proved(task, proof)

    def asked(self, session: Session, ask: Ask) -> None:
        self.view.asked(session, ask)

    def refused(self, session: Session, request: Request, refusal: Refusal) -> None:
        self.view.refused(session, request, refusal)

    def confirming(self, session: Session, node: Node) -> None:
        self.view.confirming(session, node)

    def tick(self, session: Session) -> None:
        self.view.tick(session)

    def told(self, session: Session, node: Node, improved: bool) -> None:
        best = session.tree.best
        figures = {"speedup": node.speedup, "best speedup": best.speedup if best else 0.0}
        self.tracker.log(figures | {"dollars": session.spent.dollars}, step=len(session.tree))
        self.rows.append(
            [node.number, node.parent, node.strategy, node.evaluation.outcome, node.speedup, improved,
             node.candidate.id, node.candidate.source]
        )  # fmt: skip
        self.view.told(session, node, improved)

    def finish(self, result: Result) -> None:
        """The table of candidates, the outcome, and the best kernel."""
        self.tracker.table("candidates", self.columns, self.rows)
        self.tracker.summary(result.to_dict())
        if result.best is not None:
            name = re.sub(r"[^\w.-]", "-", result.task.name)
            self.tracker.artifact(f"{name}-kernel", "kernel", result.run_dir / "best.py")


def search(args: Args, task: Task, limits: Budget, llm: LLM, view: LiveView | PlainView) -> Result:
    """Optimize one task."""
    config = settings(args) | {"task": task.name, "family": task.family, **asdict(limits)}
    tracker = Tracker(
        args.wandb, kind="search", name=task.name, group="optimize", config=config, folder=args.out
    )
    tracked = Tracked(view, tracker)
    with ExitStack() as stack:
        stack.callback(tracker.finish)
        stack.enter_context(view)
        result = optimize(
            task,
            budget=limits.evaluations,
            seconds=limits.seconds,
            dollars=limits.dollars,
            **settings(args),
            llm=llm,
            exchange=args.exchange,
            learned=args.learned,
            warm_start=args.warm_start,
            out=args.out,
            resume=args.resume,
            watch=tracked if args.wandb != "disabled" else view,
        )
        tracked.finish(result)
    return result


def sentence(task: Task, error: Exception) -> str:
    """What ended a task's search, in a line."""
    if isinstance(error, UserError):
        return str(error)
    reason = " ".join(str(error).split()) or "no message"
    return (
        f"{task.name}: the search failed with {type(error).__name__}: {reason};"
        " optimize it alone for the traceback"
    )


def main(args: Args) -> int:
    before = None if args.resume is None else read_run(args.resume)[1].budget
    limits = Budget.asked(args.budget, args.seconds, args.max_dollars, before)
    warm.check(args.warm_start)
    check_seed(settings(args)["seed"])
    if args.resume is None:
        kernel_language(settings(args)["target"], settings(args)["language"])
    policies.make(settings(args)["policy"])
    proposers.check(settings(args)["proposer"])
    llm = LLM(
        models=models(args.model),
        edit_mode=args.edit_mode,
        memory=args.memory,
        max_tokens=args.max_tokens,
        timeout=args.timeout,
        in_flight=args.in_flight,
        prices=args.prices,
        knowledge=args.knowledge,
        use_knowledge=args.use_knowledge,
        record=args.record,
        replay=args.replay,
    )
    chosen = tasks_of(args)
    if args.resume is None:
        check_out(args.out)

    console = Console(stderr=args.json)
    if not console.is_terminal:
        console.width = 120
    if args.exchange is not None:
        there = f"scripts/evaluate.py --serve {args.exchange}"
        console.print(Text(f"judged by whoever runs {there}"), soft_wrap=True)
    results: list[Result] = []
    refused, interrupted = 0, False
    try:
        for number, task in enumerate(chosen, 1):
            title = task.name if len(chosen) == 1 else f"{task.name} ({number} of {len(chosen)})"
            view = LiveView(console, title) if console.is_terminal else PlainView(console, title)
            try:
                result = search(args, task, limits, llm, view)
            except Exception as error:
                # One task that is refused, or that breaks the search, costs the others nothing.
                if len(chosen) == 1:
                    raise
                print(f"error: {sentence(task, error)}", file=sys.stderr)
                refused += 1
                continue
            results.append(result)
            console.print(Text(result.verdict()), soft_wrap=True)
            interrupted = result.stopped == "interrupted"
            if interrupted:
                break
            if result.stopped not in STOPS:
                console.print(Text(f"{task.name}: the search ended early: {result.stopped}"), soft_wrap=True)
    except KeyboardInterrupt:  # before or after a search; one that runs ends by itself
        interrupted = True

    if args.json:
        print(json.dumps([result.to_dict() for result in results], indent=1))
    elif results:
        console.print(summary(results))
        for result in results:
            console.print(Text(f"report: {result.report()}"), soft_wrap=True)
    if interrupted:
        return 130
    return 2 if refused else 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before the first search
        sys.exit(130)
