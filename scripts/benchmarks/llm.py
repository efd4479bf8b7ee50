"""Language models as proposers: length of prompts, a busy pool, what faults cost, and retrieval."""

from __future__ import annotations

import importlib.util
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.progress import track

from benchmarks.figures import Figure, Figures, console
from ke_gym import Result, optimize, policies, tasks
from ke_gym.candidate import Candidate
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.knowledge import Knowledge
from ke_gym.proposers.brief import Brief, machine
from ke_gym.proposers.llm import LLM
from ke_gym.proposers.openai import OpenAI
from ke_gym.proposers.prompt import BUDGETS
from ke_gym.search.budget import Budget
from ke_gym.search.run import run
from ke_gym.search.session import Session
from ke_gym.search.store import Setting, Store
from ke_gym.targets import cpu
from ke_gym.tasks.task import Task
from ke_gym.testing.prompts import sample
from ke_gym.testing.rewriter_endpoint import FAULTS, MODEL, RewriterEndpoint

PAIRS = Path(__file__).parents[2] / "tests" / "knowledge" / "pairs.py"
CORES = 2  # evaluations side by side


@dataclass
class Llm:
    """Prompts, a busy pool, a search through faults, retrieval."""

    prompts: bool = True
    """Measure the prompts of the whole suite."""
    in_flight: int = 32
    """Proposals written at once while the pool is watched; 0 leaves that out."""
    latency: float = 5.0
    """Seconds that each of these takes."""
    evaluations: int = 240
    """Evaluations of the watched pool: each waits 0.4 to 1.2 s instead of measuring anything."""
    budget: int = 60
    """Evaluations of each search with and without faults; 0 leaves both out. Leave the machine alone meanwhile."""
    share: float = 0.03
    """The share of the calls that each of the kinds of fault gets."""
    task: str = "softmax"
    """What these searches are for."""
    retrieval: bool = True
    """Ask the knowledge base for what the situations of the tests call for."""
    out: Path = Path("runs/llm")
    """The folder of the searches' runs."""
    json: Path | None = None
    """Also write the figures here."""

    def run(self) -> None:
        figures = Figures("llm", self.json)
        if self.prompts:
            figures.extend(lengths())
        if self.retrieval:
            figures.extend(retrieval())
        if self.in_flight:
            figures.extend(busy(self.in_flight, self.latency, self.evaluations))
        if self.budget:
            figures.extend(self.faults())
        figures.print()

    def faults(self) -> Iterator[Figure]:
        """A search through the served rewriter, with every fault there is, against the rewriter alone."""
        alone = self._search(proposer="rewriter")
        shares = dict.fromkeys(FAULTS, self.share)
        with RewriterEndpoint(faults=shares, stall=60.0) as server:
            llm = LLM(models=(MODEL,), base_url=server.url, timeout=10.0)
            served = self._search(proposer="openai", llm=llm)
            injected, calls = dict(server.injected), server.calls
        what = f"{self.task}, {self.budget} evaluations"
        console.print(f"the rewriter alone: {alone.verdict()}", highlight=False)
        console.print(f"served, with faults: {served.verdict()}", highlight=False)
        met = f"{len(injected)} of {len(FAULTS)} kinds, {sum(injected.values())} of {calls} calls"
        yield Figure(f"faults injected ({what})", met, "all kinds", len(injected) == len(FAULTS))
        yield Figure(
            "the search through faults ended by",
            served.stopped,
            "evaluations",
            served.stopped == "evaluations",
        )
        ratio = served.speedup / alone.speedup
        yield Figure(f"its speedup over the rewriter's ({what})", f"{ratio:.2f}", "≥ 0.95", ratio >= 0.95)

    def _search(self, **options: Any) -> Result:
        return optimize(self.task, budget=self.budget, learned=False, out=self.out, **options)


def lengths() -> Iterator[Figure]:
    """Tokens of prompts in the midst of searches for every built-in task."""
    facts = cpu.facts()
    lines = machine(facts, cpu.measure(facts.cores))
    chosen = tasks.resolve("suite")
    sizes = {
        task.name: [prompt.tokens for prompt in sample(Brief.unmeasured(task, lines))]
        for task in track(chosen, "prompts", console=console)
    }
    every = [size for found in sizes.values() for size in found]
    longest = max(sizes, key=lambda name: max(sizes[name]))
    middle = median(every)
    what = f"{len(every)} prompts, {len(sizes)} tasks"
    yield Figure(f"tokens of a prompt, median ({what})", f"{middle:,.0f}", "≤ 6,000", middle <= 6000)
    most, allowed = max(every), sum(BUDGETS.values())
    yield Figure("tokens of a prompt, most", f"{most:,} ({longest})", f"≤ {allowed:,}", most <= allowed)


def retrieval() -> Iterator[Figure]:
    """Whether the document that a situation calls for is among the first five, and how long asking takes."""
    spec = importlib.util.spec_from_file_location("pairs", PAIRS)
    assert spec is not None and spec.loader is not None
    pairs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pairs)
    knowledge, chosen = Knowledge(), pairs.TUNED + pairs.HELD_OUT
    found, spent = 0, []
    for situation, wanted in chosen:
        start = time.perf_counter()
        documents = knowledge.retrieve(situation, 5, 1 << 20)
        spent.append(1e3 * (time.perf_counter() - start))
        found += wanted in [document.id for document in documents]
    recall = found / len(chosen)
    yield Figure("retrieval, recall@5", f"{found} of {len(chosen)}", "≥ 90 %", recall >= 0.9)
    slowest = max(spent)
    yield Figure("a query", f"{median(spent):.1f} ms (slowest {slowest:.1f} ms)", "< 5 ms", slowest < 5.0)


def busy(in_flight: int, latency: float, evaluations: int) -> Iterator[Figure]:
    """The share of the time from the first evaluation to the last in which the pool of two evaluates."""
    spans: list[tuple[float, float]] = []
    lock = threading.Lock()

    def evaluate(candidate: Candidate, rival: Candidate | None) -> Evaluation:
        start, chance = time.monotonic(), int(candidate.id[:4], 16) / 65536
        time.sleep(0.4 + 0.8 * chance)
        with lock:
            spans.append((start, time.monotonic()))
        speedup = 1.0 + chance
        return Evaluation(
            "softmax", "cpu", "cpp", candidate.id, "correct", time_ms=1 / speedup, reference_ms=1.0, speedup=speedup,
            speedup_ci=(0.99 * speedup, 1.01 * speedup),
        )  # fmt: skip

    task = Task.load("softmax")
    with tempfile.TemporaryDirectory() as folder, RewriterEndpoint(latency=latency) as server:
        llm = LLM(models=(MODEL,), base_url=server.url, in_flight=in_flight)
        proposer = OpenAI(Brief.unmeasured(task, ()), "cpp", llm)
        policy = policies.make("epsilon_greedy", 0)
        setting = Setting(task.id, "cpu", "none", "eager", CORES)
        with Store(Path(folder) / "store.db") as store:
            session = Session(
                store, "busy", setting, proposer, budget=Budget(evaluations), parent_rule=policy.parent_rule
            )
            stopped = run(session, policy, evaluate, workers=CORES)
        proposer.close()
    begin, end = min(start for start, _ in spans), max(end for _, end in spans)
    share = sum(end - start for start, end in spans) / (CORES * (end - begin))
    what = f"{in_flight} in flight, {latency:g} s each, {len(spans)} evaluations"
    yield Figure(
        f"pool busy ({what})", f"{100 * share:.0f} %", "≥ 90 %", share >= 0.9 and stopped == "evaluations"
    )
