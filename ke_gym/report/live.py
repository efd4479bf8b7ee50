"""Progress of a search while it runs: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ke_gym.evaluation.selfcheck import Proof
from ke_gym.proposers.base import Refusal
from ke_gym.search.run import Watch
from ke_gym.search.session import Ask, Request, Session
from ke_gym.search.tree import Node
from ke_gym.tasks import Task


class Pace:
    """Evaluations per minute over the last minute, and the time left at that pace."""

    def __init__(self) -> None:
        self._told: deque[float] = deque(maxlen=200)
        self._start = time.monotonic()

    def told(self) -> None:
        self._told.append(time.monotonic())

    @property
    def per_minute(self) -> float:
        now = time.monotonic()
        recent = sum(1 for moment in self._told if now - moment < 60)
        return 60 * recent / min(max(now - self._start, 1e-3), 60)

    def seconds_left(self, session: Session) -> float | None:
        spent, budget, times = session.spent, session.budget, []
        if budget.seconds is not None:
            times.append(budget.seconds - spent.seconds)
        if budget.evaluations is not None and self._told and self.per_minute > 0:
            times.append(60 * (budget.evaluations - spent.evaluations) / self.per_minute)
        return max(min(times), 0.0) if times else None


def describe_best(session: Session) -> str:
    """The best so far in a few words."""
    best = session.tree.best
    if best is None:
        return "nothing correct yet"
    if best.evaluation.speedup_ci is None:  # it left its race after a call or two
        return f"about {best.speedup:.2f}x"
    low, high = best.evaluation.speedup_ci
    return f"{best.speedup:.2f}x [{low:.2f}, {high:.2f}]"


def clock(seconds: float | None) -> str:
    """``m:ss``, or a dash where nothing is known yet."""
    return "-" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def cost(session: Session) -> str:
    """What models have cost, where any was asked."""
    used = session.usage
    if not used.calls:
        return ""
    return f" | {used.prompt_tokens + used.completion_tokens:,} tokens, ${session.spent.dollars:.4f}"


def proof_line(title: str, proof: Proof) -> str:
    """What the check of a user's own task found."""
    return f"{title} task check: {'' if proof.ok else 'WARNING: '}{proof}"


class PlainView(Watch):
    """One line per evaluation, for logs and pipes."""

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title, self.pace = console, title, Pace()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def proved(self, task: Task, proof: Proof) -> None:
        self.console.print(Text(proof_line(self.title, proof)), soft_wrap=True)

    def refused(self, session: Session, request: Request, refusal: Refusal) -> None:
        if refusal.attempt:
            what = f"no candidate, {refusal.kind}: {refusal.reason}"
            self.console.print(Text(f"{self.title} {request.strategy.name}: {what}"), soft_wrap=True)

    def told(self, session: Session, node: Node, improved: bool) -> None:
        self.pace.told()
        limit = session.budget.evaluations
        count = f"{len(session.tree)}/{limit}" if limit else f"{len(session.tree)}"
        what = f"{node.speedup:.2f}x" if node.correct else node.evaluation.outcome
        mark = " *" if improved else ""
        line = (
            f"{self.title} {count} {node.strategy}: {what}{mark} | best {describe_best(session)} |"
            f" {self.pace.per_minute:.0f}/min | {clock(self.pace.seconds_left(session))} left{cost(session)}"
        )
        self.console.print(Text(line), soft_wrap=True)

    def confirming(self, session: Session, node: Node) -> None:
        self.console.print(Text(f"{self.title} measuring finalist #{node.number} again"))


class LiveView(Watch):
    """A panel that redraws itself; use as a context manager around the search."""

    def __init__(self, console: Console, title: str) -> None:
        self.title, self.pace = title, Pace()
        self._trying: dict[int, str] = {}
        self._recent: deque[tuple[str, str, bool]] = deque(maxlen=6)
        self._session: Session | None = None
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def proved(self, task: Task, proof: Proof) -> None:
        self._live.console.print(Text(proof_line(self.title, proof)), soft_wrap=True)

    def asked(self, session: Session, ask: Ask) -> None:
        self._session = session
        parent = f" on #{ask.parent.number}" if ask.parent else ""
        self._trying[ask.number] = f"#{ask.number} {ask.strategy.name}{parent}"

    def refused(self, session: Session, request: Request, refusal: Refusal) -> None:
        self._session = session
        if refusal.attempt:
            self._recent.append((request.strategy.name, f"no candidate, {refusal.kind}", False))

    def told(self, session: Session, node: Node, improved: bool) -> None:
        self._session = session
        self._trying.pop(node.number, None)
        self.pace.told()
        what = f"{node.speedup:.2f}x" if node.correct else node.evaluation.outcome
        self._recent.append((f"#{node.number} {node.strategy}", what, improved))

    def confirming(self, session: Session, node: Node) -> None:
        self._trying = {node.number: f"finalist #{node.number}, measured again"}

    def _render(self) -> RenderableType:
        session = self._session
        if session is None:
            return Panel(Text("preparing the reference and the first drafts …"), title=Text(self.title))
        spent, limit = session.spent, session.budget.evaluations
        facts = Table.grid(padding=(0, 2))
        facts.add_row("best", Text(describe_best(session), style="bold green"))
        facts.add_row("trying", Text(", ".join(self._trying.values()) or "-", style="cyan"))
        facts.add_row(
            "pace",
            f"{self.pace.per_minute:.0f} evaluations/min, {clock(spent.seconds)} spent,"
            f" {clock(self.pace.seconds_left(session))} left{cost(session)}",
        )
        recent = Table.grid(padding=(0, 2))
        for name, what, improved in self._recent:
            recent.add_row(Text(name, style="dim"), Text(what, style="bold green" if improved else ""))
        done = 1.0 - session.budget.left(spent)
        bar = Table.grid(expand=True, padding=(0, 2))
        bar.add_column(ratio=1)
        bar.add_column(justify="right")
        count = f"{spent.evaluations}/{limit}" if limit else f"{spent.evaluations}"
        bar.add_row(ProgressBar(total=1.0, completed=done), count)
        return Panel(Group(bar, facts, recent), title=Text(self.title), title_align="left")
