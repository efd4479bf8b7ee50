"""Warm starts: the best kernels of earlier searches, offered as drafts.

A draft is, at a set rate, the best recorded kernel of the same task (perhaps from another machine or baseline), or of a
similar one that it can stand in for. Similar means: the captured graphs consist of the same operations, reductions and
products, on sizes of the same magnitude. Where a module cannot be captured, the calls and sizes in its text stand for
them. Kernels for other sizes are offered only if they claim to be general.

Reuse is a trade: in the one published ablation it brought a first gain ten times sooner, and a worse best kernel in
the end, since searches that start alike stay alike (arXiv 2606.29823). Hence a rate, and off by default.
"""

from __future__ import annotations

import ast
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.proposers.base import Context, Proposal, Proposer, Refusal, Usage
from ke_gym.proposers.prices import Purse
from ke_gym.strategies import RESTART, Strategy
from ke_gym.tasks import Task

if TYPE_CHECKING:
    from ke_gym.codegen.features import Features

ALIKE = 0.8
"""The least similarity of two tasks whose kernels may stand in for each other."""
OTHER_DTYPES = 0.9
"""What is left of the similarity of two tasks that differ in the types of what goes in and comes out."""
MOST = 4
"""How many kernels are offered in one search."""
_GENERAL = re.compile(r"^general\s*=\s*True\b", re.MULTILINE)
# Sums and products are in every reference, so they tell nothing; nor do the names of what parameters are made of.
_SCAFFOLD = {
    "super", "__init__", "range", "len", "Parameter", "Tensor", "randn", "rand", "ones", "zeros", "empty",
}  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """What two references are compared by: operators with their weights, sizes by name, the exact shapes, and dtypes
    where they are known."""

    operators: Mapping[str, float]
    sizes: Mapping[str, int]
    shapes: tuple[str, ...] = ()
    dtypes: frozenset[str] = frozenset()

    @classmethod
    def of_graph(cls, graph: Features) -> Profile:
        """The profile of a captured graph."""
        return cls(graph.weighted(), graph.sizes, (*graph.inputs, "->", *graph.outputs), graph.dtypes)

    @classmethod
    def of_text(cls, source: str, target: str) -> Profile:
        """The profile of a task file on ``target``; nothing for text that is not Python."""
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return cls({}, {})
        model = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Model"), None)
        operators: Counter[str] = Counter()
        for node in ast.walk(model) if model else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
                operators[name.lower()] += name not in _SCAFFOLD
            elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
                operators["matmul"] += 1
        sizes = _sizes(tree, target)
        return cls(+operators, sizes, tuple(f"{name}={sizes[name]}" for name in sorted(sizes)))


def _sizes(tree: ast.Module, target: str) -> dict[str, int]:
    """Module-level integers, as the shape set for ``target`` overrides them."""
    sizes: dict[str, int] = {}
    overrides: dict[str, dict[str, int]] = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        try:
            value = ast.literal_eval(node.value)
        except ValueError:
            continue
        for name in node.targets:
            if isinstance(name, ast.Name) and name.id == "shapes" and isinstance(value, dict):
                overrides = value
            pairs: Iterable[tuple[ast.expr, Any]] = [(name, value)]
            if isinstance(name, ast.Tuple) and isinstance(value, tuple):
                pairs = zip(name.elts, value)
            sizes.update((n.id, v) for n, v in pairs if isinstance(n, ast.Name) and type(v) is int and v > 0)
    chosen = overrides.get(target if target == "cpu" else "gpu", {})
    sizes.update((name, v) for name, v in chosen.items() if type(v) is int and v > 0)
    return sizes


def similarity(one: Profile, other: Profile) -> float:
    """From 0 to 1: the cosine between the operators, times how close the sizes of the same name are (a factor of two
    apart in all of them: 0.8), times ``OTHER_DTYPES`` if the types differ."""
    norms = [math.sqrt(sum(n * n for n in p.operators.values())) for p in (one, other)]
    if not all(norms):
        return 0.0
    dot = sum(weight * other.operators.get(name, 0.0) for name, weight in one.operators.items())
    shared = one.sizes.keys() & other.sizes.keys()
    apart = [abs(math.log2(one.sizes[name] / other.sizes[name])) for name in shared]
    distance = sum(apart) / len(apart) if apart else 0.0
    types = 1.0 if one.dtypes == other.dtypes else OTHER_DTYPES
    return dot / (norms[0] * norms[1]) * math.pow(0.8, distance) * types


@dataclass(frozen=True)
class Record:
    """A recorded kernel: the task it was made for (id, source, and its graph if it could be captured), and its
    speedup there."""

    task: str
    source: str
    candidate: Candidate
    speedup: float
    graph: Features | None = None


def profiles(task: Task, target: str, graph: Features | None, record: Record) -> tuple[Profile, Profile]:
    """The task's and the record's, by their graphs, or by their text where one of them has none."""
    if graph is not None and record.graph is not None:
        return Profile.of_graph(graph), Profile.of_graph(record.graph)
    return Profile.of_text(task.source, target), Profile.of_text(record.source, target)


def choose(
    task: Task, target: str, records: Iterable[Record], graph: Features | None = None
) -> list[Candidate]:
    """The recorded kernels worth offering for ``task`` (``graph``: its own, if it could be captured), best first:
    its own by speedup, then those of tasks at least ``ALIKE``, by similarity."""
    ranked = []
    for record in records:
        mine, theirs = profiles(task, target, graph, record)
        own = record.task == task.id
        alike = 1.0 if own else similarity(mine, theirs)
        same_sizes = own or (theirs.shapes == mine.shapes and bool(mine.shapes))
        if alike >= ALIKE and (same_sizes or _GENERAL.search(record.candidate.source)):
            ranked.append((not own, -alike, -record.speedup, record.candidate))
    ranked.sort(key=lambda item: item[:3])
    unique = {candidate.id: candidate for *_, candidate in ranked}
    return [replace(c, parent=None, strategy=RESTART.name, proposer="warm") for c in unique.values()][:MOST]


def check(rate: float) -> None:
    """``UserError`` unless ``rate`` is a probability."""
    if not 0 <= rate <= 1:
        raise UserError(
            f"the rate of warm starts is {rate:g}; give a number from 0 (none) to 1 (all there are)"
        )


class WarmStart(Proposer):
    """``inner``, except that drafts are taken from ``kernels``, each once, with probability ``rate``.

    Which draws those are depends on the session's seed alone, so that a resumed search goes on as it began.
    """

    def __init__(self, inner: Proposer, kernels: Sequence[Candidate], rate: float) -> None:
        check(rate)
        self.inner, self.kernels, self.rate = inner, tuple(kernels), rate
        self.name, self.stochastic = inner.name, inner.stochastic
        self.draws = inner.draws + len(self.kernels)  # a draft may repeat a kernel, and the other way round

    def propose(
        self, parent: Candidate | None, strategy: Strategy, draw: int, context: Context
    ) -> Proposal | Refusal:
        if strategy is not RESTART:
            return self.inner.propose(parent, strategy, draw, context)
        warm = self._warm(context.seed, draw + 1)
        if warm[draw]:
            return Proposal(self.kernels[sum(warm[:draw])])
        return self.inner.propose(parent, strategy, draw - sum(warm[:draw]), context)

    def _warm(self, seed: int, draws: int) -> list[bool]:
        """Which of the first ``draws`` drafts are recorded kernels."""
        hits = np.random.default_rng((seed, 0x5EED)).random(draws) < self.rate
        return [bool(hit) and int(hits[:n].sum()) < len(self.kernels) for n, hit in enumerate(hits)]

    def mask(self, parent: Candidate) -> NDArray[np.bool_]:
        return self.inner.mask(parent)

    @property
    def features(self) -> Features | None:
        return self.inner.features

    @property
    def in_flight(self) -> int:
        return self.inner.in_flight

    @property
    def ordered(self) -> bool:
        return self.inner.ordered

    def fund(self, purse: Purse) -> None:
        self.inner.fund(purse)

    def assign(self) -> str:
        return self.inner.assign()

    def release(self, model: str) -> None:
        self.inner.release(model)

    def learn(self, gain: float, dollars: float, usage: Usage) -> None:
        self.inner.learn(gain, dollars, usage)

    def close(self) -> None:
        self.inner.close()
