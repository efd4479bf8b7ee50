"""The search tree: evaluated candidates, and which of them is best.

The reference is the root (number None); a node's parent is the node its candidate was made from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ke_gym.candidate import Candidate
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.proposers.base import NOTHING, Usage


@dataclass(frozen=True)
class Node:
    """One evaluated candidate: the ``number``-th ask of its session, made from ``parent`` by ``strategy``."""

    number: int
    parent: int | None
    strategy: str
    draw: int
    candidate: Candidate
    evaluation: Evaluation
    dollars: float = 0.0
    usage: Usage = NOTHING

    @property
    def correct(self) -> bool:
        return self.evaluation.correct

    @property
    def speedup(self) -> float:
        """Baseline time over candidate time; 0 for a candidate that failed."""
        return self.evaluation.speedup or 0.0 if self.correct else 0.0


class Tree:
    """Nodes by number, in the order told. ``best`` is the verified best: the incumbent of the next race."""

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.best: Node | None = None
        self.leaders: list[Node] = []
        self._children: dict[int | None, list[Node]] = {}

    def __len__(self) -> int:
        return len(self.nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def add(self, node: Node, rival: Node | None) -> bool:
        """Add a node that raced ``rival`` (None: the baseline); returns whether it is the new best.

        Against the present best, the race itself decides. A result from an older race (the best changed while
        it ran) or from an earlier session counts only if its whole interval lies above the present best.
        """
        self.nodes[node.number] = node
        self._children.setdefault(node.parent, []).append(node)
        if not node.correct:
            return False
        if self.best is None:
            better = True
        elif rival is not None and rival.number == self.best.number and node.evaluation.gain is not None:
            better = node.evaluation.improved
        else:
            low, _ = node.evaluation.speedup_ci or (0.0, 0.0)
            better = low > self.best.speedup
        if better:
            self.best = node
            self.leaders.append(node)
        return better

    def crown(self, node: Node) -> None:
        """Make ``node`` the best, with the evaluation it carries now (a measurement after the search)."""
        self._revise(node)
        self.leaders.append(node)
        self.best = node

    def depose(self, node: Node) -> None:
        """``node`` did not stand up to a measurement after the search, whose outcome it carries now: nothing is best
        until another node is crowned."""
        self._revise(node)
        self.best = None

    def _revise(self, node: Node) -> None:
        """Put ``node`` in the place of the one with its number."""
        self.nodes[node.number] = node
        siblings = self._children[node.parent]
        siblings[[n.number for n in siblings].index(node.number)] = node
        self.leaders = [leader for leader in self.leaders if leader.number != node.number]

    def children(self, number: int | None) -> list[Node]:
        return self._children.get(number, [])

    def correct(self) -> list[Node]:
        return [node for node in self if node.correct]

    def path(self, node: Node) -> list[Node]:
        """The nodes from a draft to ``node``, both included."""
        path = [node]
        while path[-1].parent is not None:
            path.append(self.nodes[path[-1].parent])
        return path[::-1]

    def depth(self, node: Node | None) -> int:
        """Edges from the reference: 0 for the reference itself, 1 for a draft."""
        return 0 if node is None else len(self.path(node))

    def broken(self, number: int | None) -> Node | None:
        """The latest failed candidate below ``number`` that is worth a repair (at most two in a row are)."""
        for child in reversed(self.children(number)):
            failed = child
            for _ in range(2):
                if failed.correct:
                    break
                repairs = [node for node in self.children(failed.number) if node.strategy == "FIX"]
                if not repairs:
                    return failed
                failed = repairs[-1]
        return None
