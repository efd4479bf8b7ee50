"""Parent rules: from which node the next candidate is made.

A rule maps (tree, children in flight, rng) to a node, or to None for the reference: a fresh draft. Rules are
part of the search's state machine; a policy names the one it was designed with.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

import numpy as np

from ke_gym import strategies
from ke_gym.errors import UserError
from ke_gym.search.tree import Node, Tree

ParentRule = Callable[[Tree, Mapping[int | None, int], np.random.Generator], Node | None]

EPSILON = 0.3  # STARK's best range is 0.3-0.4
ROOT_CAP = 4  # drafts before the tree only deepens
PATIENCE = 4  # fruitless children after which a branch is dead
WIDENING = 1.5  # children per square root of visits
UCT_EXPLORATION = 0.3  # in log-speedup


def best(tree: Tree, flying: Mapping[int | None, int], rng: np.random.Generator) -> Node | None:
    """The verified best."""
    return tree.best


def root(tree: Tree, flying: Mapping[int | None, int], rng: np.random.Generator) -> Node | None:
    """Always the reference: independent drafts."""
    return None


def weighted(tree: Tree, flying: Mapping[int | None, int], rng: np.random.Generator) -> Node | None:
    """A correct node with probability ~ sigmoid(10 (f - median) / MAD) / (1 + children), f its log-speedup.

    Source: ShinkaEvolve (arXiv 2509.19349).
    """
    nodes = tree.correct()
    if not nodes:
        return None
    fitness = np.log([node.speedup for node in nodes])
    spread = np.median(np.abs(fitness - np.median(fitness))) or 1.0
    weights = 1.0 / (1.0 + np.exp(np.clip(-10.0 * (fitness - np.median(fitness)) / spread, -50, 50)))
    weights /= [1 + len(tree.children(n.number)) + flying.get(n.number, 0) for n in nodes]
    return nodes[int(rng.choice(len(nodes), p=weights / weights.sum()))]


def epsilon_greedy(tree: Tree, flying: Mapping[int | None, int], rng: np.random.Generator) -> Node | None:
    """The best node; with probability epsilon another living one, or a draft while the root has room.

    A node is dead when ``PATIENCE`` children brought no progress. Source: STARK (arXiv 2510.16996).
    """
    if tree.best is None:
        return None
    if rng.random() >= EPSILON and not _dead(tree, tree.best, flying):
        return tree.best
    living: list[Node | None] = [node for node in tree.correct() if not _dead(tree, node, flying)]
    if len(tree.children(None)) + flying.get(None, 0) < ROOT_CAP:
        living.append(None)
    if not living:
        return tree.best
    # Half of the explorations stay among the three fastest, where a small step most likely makes a new best.
    living.sort(key=lambda node: node.speedup if node else 0.0, reverse=True)
    pool = living[:3] if rng.random() < 0.5 else living
    return pool[int(rng.integers(len(pool)))]


def _dead(tree: Tree, node: Node, flying: Mapping[int | None, int]) -> bool:
    children = tree.children(node.number)
    if any(child.speedup > 1.01 * node.speedup for child in children):
        # Its progress lives on in a child; the present best is still worth direct attempts.
        return tree.best is not node and len(children) >= PATIENCE
    patience = 6 * PATIENCE if node is tree.best else PATIENCE
    return len(children) + flying.get(node.number, 0) >= patience


def uct(tree: Tree, flying: Mapping[int | None, int], rng: np.random.Generator) -> Node | None:
    """Descends by upper confidence bounds on the best kernel below a node; widens nodes as visits grow.

    A node is expanded while it has fewer than ``WIDENING sqrt(visits)`` children; the reference never is once
    something is correct, since a draft is an action of its own (RESTART). Max backup, since a search
    is worth its best kernel. Sources: Reasoning Compiler (arXiv 2506.01374), Couetoux et al. (2011).
    """
    visits: dict[int | None, int] = {None: 1}
    value: dict[int, float] = {}
    for node in reversed(list(tree)):
        # Children are told after their parents, so every subtree is complete when its root comes.
        visits[node.number] = 1 + sum(visits[child.number] for child in tree.children(node.number))
        below = [value[child.number] for child in tree.children(node.number)]
        value[node.number] = max([np.log(node.speedup) if node.correct else -np.inf, *below])
    visits[None] += len(tree)
    at: Node | None = None
    while True:
        number = at.number if at else None
        children = [child for child in tree.children(number) if np.isfinite(value[child.number])]
        # A failed candidate takes part only through a repair below it.
        count = len(tree.children(number)) + flying.get(number, 0)
        if not children or (at is not None and count < WIDENING * np.sqrt(visits[number])):
            return at if at is not None and at.correct else tree.best
        bonus = UCT_EXPLORATION * np.sqrt(np.log(visits[number]))
        at = max(children, key=lambda n: value[n.number] + bonus / np.sqrt(visits[n.number]))


def elites(tree: Tree, flying: Mapping[int | None, int], rng: np.random.Generator) -> Node | None:
    """One of the cells' best nodes, uniformly: cells are families of strategies and doublings of code size.

    Source: MAP-Elites (arXiv 1504.04909).
    """
    cells: dict[tuple[str, int], Node] = {}
    for node in tree.correct():
        lines = node.candidate.source.count("\n") + 1
        cell = (strategies.get(node.strategy).family, lines.bit_length())
        if cell not in cells or node.speedup > cells[cell].speedup:
            cells[cell] = node
    return list(cells.values())[int(rng.integers(len(cells)))] if cells else None


RULES: dict[str, ParentRule] = {
    "best": best,
    "weighted": weighted,
    "root": root,
    "epsilon_greedy": epsilon_greedy,
    "uct": uct,
    "elites": elites,
}


def get(name: str) -> ParentRule:
    """The rule of this name; ``UserError`` names the nearest for an unknown one."""
    if name not in RULES:
        near = difflib.get_close_matches(name, RULES, n=1, cutoff=0.0)
        raise UserError(f"unknown parent rule {name!r}; did you mean {near[0]!r}?")
    return RULES[name]
