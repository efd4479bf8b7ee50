from __future__ import annotations

from ke_gym.candidate import Candidate
from ke_gym.search.tree import Node, Tree
from tests.search.fakes import evaluation


def node(
    number: int, parent: int | None, speedup: float | None, rival: float = 1.0, strategy: str = "fuse"
) -> Node:
    candidate = Candidate(f"GENES = [{number}]")
    outcome = "correct" if speedup else "compile"
    return Node(number, parent, strategy, 0, candidate, evaluation(candidate, speedup, outcome, rival))


def test_the_first_correct_candidate_leads_even_below_the_baseline() -> None:
    tree = Tree()
    assert not tree.add(node(0, None, None), None)
    assert tree.best is None
    assert tree.add(node(1, None, 0.7), None)
    assert tree.best is not None and tree.best.number == 1


def test_a_race_against_the_present_best_decides() -> None:
    tree = Tree()
    tree.add(node(0, None, 1.5), None)
    first = tree.best
    assert not tree.add(node(1, 0, 1.51, rival=1.5), first)
    assert tree.add(node(2, 0, 1.8, rival=1.5), first)
    assert [leader.number for leader in tree.leaders] == [0, 2]


def test_a_win_over_an_outdated_rival_counts_only_above_the_present_best() -> None:
    tree = Tree()
    tree.add(node(0, None, 1.0), None)
    old = tree.best
    tree.add(node(1, 0, 2.0, rival=1.0), old)
    assert not tree.add(node(2, 0, 1.9, rival=1.0), old)
    assert tree.add(node(3, 0, 2.5, rival=1.0), old)


def test_paths_and_depths_count_from_the_reference() -> None:
    tree = Tree()
    for number, parent in [(0, None), (1, 0), (2, 1)]:
        tree.add(node(number, parent, 1.0 + number), tree.best)
    assert [n.number for n in tree.path(tree.nodes[2])] == [0, 1, 2]
    assert [tree.depth(None), tree.depth(tree.nodes[0]), tree.depth(tree.nodes[2])] == [0, 1, 3]


def test_a_failed_child_is_repaired_at_most_twice_and_not_after_success() -> None:
    tree = Tree()
    tree.add(node(0, None, 1.0), None)
    assert tree.broken(0) is None
    tree.add(node(1, 0, None), tree.best)
    assert tree.broken(0) is tree.nodes[1]
    tree.add(node(2, 1, None, strategy="FIX"), tree.best)
    assert tree.broken(0) is tree.nodes[2]
    tree.add(node(3, 2, None, strategy="FIX"), tree.best)
    assert tree.broken(0) is None
    tree.add(node(4, 0, None), tree.best)
    tree.add(node(5, 4, 1.1, strategy="FIX"), tree.best)
    assert tree.broken(0) is None
