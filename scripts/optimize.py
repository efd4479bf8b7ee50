"""Make PyTorch code faster: search for a kernel, prove it, race it, report it.

    python scripts/optimize.py softmax
    python scripts/optimize.py my_problem.py --budget 100 --baseline compile
    python scripts/optimize.py suite --seconds 120 --out results

Exit code 0 when every search reached a verdict, 2 for bad input (one sentence says what; of several tasks, the
others are still optimized), 130 after Ctrl-C (what was found until then is reported and kept).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from ke_gym import policies, proposers, tasks
from ke_gym.errors import UserError
from ke_gym.job import check_out, optimize, read_run
from ke_gym.proposers import warm
from ke_gym.proposers.llm import LLM, Memory, models
from ke_gym.report.live import LiveView, PlainView
from ke_gym.report.table import summary
from ke_gym.search.budget import Budget
from ke_gym.search.result import Result

# Why searches end; anything else is a sentence.
STOPS = ("evaluations", "seconds", "dollars", "STOP", "interrupted", "nothing left to try")


@dataclass(frozen=True)
class Args:
    """Search for faster kernels for one or more tasks."""

    tasks: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Suite tasks, "suite", a family, KernelBench-format files or folders of them."""
    target: str = "cpu"
    """The device to optimize for."""
    policy: str = "epsilon_greedy"
    """Which search policy chooses the transformations: a name, or the file of a saved one."""
    proposer: str = "rewriter"
    """What writes the candidates: rewriter, openai (a language model), or both: rewriter,openai."""
    model: str = ""
    """For openai: the model, or several, as "small,large", of which a bandit chooses. The endpoint and its key are
    taken from OPENAI_BASE_URL and OPENAI_API_KEY."""
    max_dollars: float | None = None
    """For openai: what the search may cost, never more."""
    prices: str = ""
    """For openai: a JSON file of prices, {"model": [dollars per million prompt tokens, per million answer tokens]}."""
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
    learned: bool = True
    """Keep what this search teaches as lessons beside the store, and tell models of those kept before."""
    warm_start: float = 0.0
    """How often a draft is the best recorded kernel of this or a similar task, from 0 to 1. It saves time, and narrows
    the search."""
    record: str = ""
    """For openai: keep the conversation in this file, a cassette."""
    replay: str = ""
    """For openai: answer from this cassette instead of asking anyone."""
    budget: int = 60
    """Evaluations per task, failures included."""
    seconds: float | None = None
    """Seconds per task; the first limit that is reached ends the search."""
    seed: int = 0
    """Seed of the search's choices."""
    baseline: str = "eager"
    """What speedups are against: eager, compile (torch.compile) or max-autotune (its mode of that name)."""
    threads: int | None = None
    """CPU threads for kernels and reference alike; all cores by default."""
    exchange: Path | None = None
    """For a GPU on another machine: a folder that both see, served there by evaluate.py --serve."""
    out: Path = Path("runs")
    """The folder that gets a folder per run."""
    resume: Path | None = None
    """The folder of an earlier run: continue that search (give a larger --budget to extend it)."""
    json: bool = False
    """Print one JSON list of results instead of progress and a table."""


def main(args: Args) -> int:
    limits = Budget(args.budget, args.seconds, args.max_dollars)
    warm.check(args.warm_start)
    policies.make(args.policy)
    proposers.check(args.proposer)
    llm = LLM(
        models=models(args.model),
        edit_mode=args.edit_mode,
        memory=args.memory,
        max_tokens=args.max_tokens,
        timeout=args.timeout,
        in_flight=args.in_flight,
        prices=args.prices,
        knowledge=args.knowledge,
        record=args.record,
        replay=args.replay,
    )
    specs = args.tasks
    if args.resume is not None:
        _, recorded = read_run(args.resume)
        specs = specs or (recorded.spec,)
    elif not specs:
        raise UserError("name at least one task, for example softmax (scripts/tasks.py list shows them all)")
    chosen = [task for spec in specs for task in tasks.resolve(spec)]
    if args.resume is not None and len(chosen) != 1:
        raise UserError(f"--resume continues one run, but {len(chosen)} tasks were named")
    if (args.record or args.replay) and len(chosen) != 1:
        raise UserError(
            f"a cassette holds the conversation of one search, but {len(chosen)} tasks were named"
        )
    if args.resume is None:
        check_out(args.out)

    console = Console(stderr=args.json)
    if not console.is_terminal:
        console.width = 120
    results: list[Result] = []
    refused = 0
    for number, task in enumerate(chosen, 1):
        title = task.name if len(chosen) == 1 else f"{task.name} ({number} of {len(chosen)})"
        view = LiveView(console, title) if console.is_terminal else PlainView(console, title)
        try:
            with view:
                result = optimize(
                    task,
                    budget=limits.evaluations,
                    seconds=limits.seconds,
                    dollars=limits.dollars,
                    target=args.target,
                    baseline=args.baseline,
                    policy=args.policy,
                    proposer=args.proposer,
                    seed=args.seed,
                    threads=args.threads,
                    llm=llm,
                    exchange=args.exchange,
                    learned=args.learned,
                    warm_start=args.warm_start,
                    out=args.out,
                    resume=args.resume,
                    watch=view,
                )
        except UserError as error:
            # One task that is refused costs the others nothing.
            if len(chosen) == 1:
                raise
            print(f"error: {error}", file=sys.stderr)
            refused += 1
            continue
        results.append(result)
        console.print(result.verdict(), highlight=False, soft_wrap=True)
        if result.stopped not in STOPS:
            console.print(
                f"{task.name}: the search ended early: {result.stopped}", highlight=False, soft_wrap=True
            )
        if result.stopped == "interrupted":
            break

    if args.json:
        print(json.dumps([result.to_dict() for result in results], indent=1))
    elif results:
        console.print(summary(results))
        for result in results:
            console.print(f"report: {result.report()}", highlight=False, soft_wrap=True)
    if results and results[-1].stopped == "interrupted":
        return 130
    return 2 if refused else 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
