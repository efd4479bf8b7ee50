from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from rich.console import Console

from ke_gym import policies
from ke_gym.report import svg, words
from ke_gym.report.live import LiveView, PlainView
from ke_gym.search.budget import Budget
from ke_gym.search.run import run
from ke_gym.search.session import Session
from ke_gym.search.store import Store
from ke_gym.search.tree import Tree
from tests.search.fakes import SETTING, FakeProposer, Judge


def search(tmp_path: Path, budget: int, view: PlainView | LiveView | None = None) -> Session:
    policy = policies.make("epsilon_greedy", 1)
    session = Session(
        Store(tmp_path / "store.db"), "s", SETTING, FakeProposer(), budget=Budget(evaluations=budget),
        parent_rule=policy.parent_rule,
    )  # fmt: skip
    run(session, policy, Judge(), watch=view)
    return session


def circles(picture: str) -> list[str]:
    root = ElementTree.fromstring(picture)
    return [element.attrib["class"] for element in root.iter("circle")]


def test_progress_shows_every_evaluation_and_marks_new_bests(tmp_path: Path) -> None:
    tree = search(tmp_path, 60).tree
    drawn = circles(svg.progress(tree))
    assert len(drawn) == 60
    assert drawn.count("leader") == len(tree.leaders) > 1
    assert drawn.count("failed") == sum(not node.correct for node in tree) > 0


def test_the_tree_shows_every_candidate_and_the_winning_path(tmp_path: Path) -> None:
    tree = search(tmp_path, 60).tree
    picture = svg.search_tree(tree)
    assert len(circles(picture)) == 61
    assert tree.best is not None
    assert picture.count("edge winning") == len(tree.path(tree.best))


def test_a_search_without_success_can_be_drawn() -> None:
    ElementTree.fromstring(svg.progress(Tree()))
    ElementTree.fromstring(svg.search_tree(Tree()))
    assert words.why(Tree()) == []


@pytest.mark.parametrize("flops", [0.0, 1e6, 5e9])
def test_the_roofline_names_every_point(flops: float) -> None:
    picture = svg.roofline(flops, 1e7, 2e11, 1e10, [("eager", "reference", 2e-2), ("best", "leader", 4e-3)])
    text = " ".join(ElementTree.fromstring(picture).itertext())
    assert "eager" in text and "best" in text and "measured" in text


def test_the_winning_path_multiplies_to_the_speedup(tmp_path: Path) -> None:
    tree = search(tmp_path, 40).tree
    product = 1.0
    for _, gain in words.steps(tree):
        product *= gain or 1.0
    assert tree.best is not None and product == pytest.approx(tree.best.speedup)


def test_plain_progress_is_one_line_per_evaluation(tmp_path: Path) -> None:
    out = io.StringIO()
    search(tmp_path, 12, PlainView(Console(file=out, width=60), "softmax"))
    lines = out.getvalue().splitlines()
    assert len(lines) == 12
    assert lines[-1].startswith("softmax 12/12 ") and "best" in lines[-1] and "left" in lines[-1]


def test_the_live_view_shows_best_pace_and_time_left(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True)
    with LiveView(console, "softmax") as view:
        session = search(tmp_path, 12, view)
        console.print(view._render())
    best = session.tree.best
    assert best is not None and f"{best.speedup:.2f}x" in out.getvalue()
    assert "evaluations/min" in out.getvalue() and "12/12" in out.getvalue()
