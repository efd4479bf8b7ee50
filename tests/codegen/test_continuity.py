"""Which graphs forgive differences in rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ke_gym.codegen import Program
from ke_gym.codegen.continuity import continuous
from ke_gym.tasks import Task


@pytest.mark.parametrize("places", [False, True])
def test_the_places_of_the_largest_do_not(places: bool) -> None:
    task = Task.from_file(Path(__file__).parent / "choices" / "best.py")
    sizes = {"PLACES": places}
    (graph,) = Program.from_task(replace(task, shapes={"cpu": sizes, "gpu": sizes}), "cuda").graphs
    assert continuous(graph) is not places


@pytest.mark.parametrize("name, forgives", [("softmax", True), ("argmax", False), ("bucketize", False)])
def test_comparisons_and_searches_do_not(name: str, forgives: bool) -> None:
    (graph,) = Program.from_task(Task.load(name)).graphs
    assert continuous(graph) is forgives
