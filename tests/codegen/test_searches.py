"""Searches that begin in shared memory: thread by thread on a CPU, and compiled for sm_90 as candidates are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ke_gym.codegen import Program, fusion, rewrites, searches
from ke_gym.codegen.legality import nests_of
from ke_gym.codegen.schedule import Plan, Schedule
from ke_gym.codegen.searches import Searched
from ke_gym.languages import nvrtc
from ke_gym.languages.base import Signature
from ke_gym.tasks import Task
from tests.codegen.cuda_on_host import ran
from tests.codegen.interpret import FOLDER, SMALL, program
from tests.languages.gpu_modules import built

CUDA = ("language", "cuda")
CASES: list[tuple[str, Any]] = [
    ("columns", ()),
    ("columns", (("columns", 64), ("warps", 4), ("unroll", 4))),
    ("columns", (("persistent", 132), ("unroll", 1))),
    ("halves", (("warps", 4),)),
    ("tree", ()),
    ("tree", (("levels", 6), ("unroll", 2), ("warps", 4))),
    ("tree", (("levels", 7), ("persistent", 132), ("warps", 8))),
    ("shared_row", (("warps", 4),)),
]


def path_of(name: str) -> str:
    return str(FOLDER / "searched" / f"{name}.py")


def staged(made: Program, launch: Any = ()) -> Schedule:
    """The first draft with its searches in shared memory, and these knobs."""
    (graph,) = made.graphs
    plan = fusion.in_shared_memory(graph, made.seeds()[0].plans[0])
    groups = tuple(
        replace(g, launch=tuple(sorted((*launch, CUDA)))) if CUDA in g.launch else g for g in plan.groups
    )
    return Schedule((Plan(groups),))


def searched(made: Program, schedule: Schedule) -> Searched:
    (nest,) = nests_of(made.graphs[0], schedule.plans[0])
    assert isinstance(nest, Searched)
    return nest


@pytest.mark.parametrize("name, launch", CASES)
def test_what_is_found_is_what_torch_finds(name: str, launch: Any, tmp_path: Path) -> None:
    task = Task.load(path_of(name))
    made = program(path_of(name))
    schedule = staged(made, launch)
    assert made.legal(schedule)
    source = made.emit(schedule)
    assert "__shared__" in source and "triton" not in source
    reference = task.reference(SMALL)
    for seed, distribution in enumerate(("task", "special", "ties")):
        folder = tmp_path / distribution
        folder.mkdir()
        inputs = task.inputs(SMALL, seed, distribution)
        (wanted,) = reference(*inputs)
        assert torch.equal(ran(source, folder, tuple(inputs), {}), wanted)


@pytest.mark.parametrize("name", ["columns", "tree"])
def test_rows_in_disorder_are_probed_as_torch_does(name: str, tmp_path: Path) -> None:
    task = Task.load(path_of(name))
    made = program(path_of(name))
    values, table = task.inputs(SMALL, 0)
    mixed = table.flip(-1).roll(table.shape[-1] // 3, -1)
    (wanted,) = task.reference(SMALL)(values, mixed)
    assert torch.equal(ran(made.emit(staged(made)), tmp_path, (values, mixed), {}), wanted)


def test_each_kind_of_table_takes_what_shared_memory_there_is() -> None:
    columns, tree = (program(path_of(name)) for name in ("columns", "tree"))
    by_column, at_once = searched(columns, staged(columns)), searched(tree, staged(tree))
    assert by_column.by_column and by_column.across == 2 and by_column.pitch == 51
    assert by_column.shared == (32 * 51 + 1) * 4
    assert not at_once.by_column and at_once.blocks.levels == 9 and at_once.shared == 511 * 8
    vocabulary = Program.for_language(Task.load("map_id"), "triton")
    large = searched(vocabulary, staged(vocabulary))
    assert (large.blocks.levels, large.shared, large.resident) == (14, 16383 * 8, 1)
    before = vocabulary.on("sm_80")
    assert max(searched(before, staged(before)).knobs()["levels"]) == 13  # 99 KiB
    buckets = Program.for_language(Task.load("bucketize"), "triton")
    assert searched(buckets, staged(buckets)).resident * searched(buckets, staged(buckets)).threads == 2048


def test_searches_are_staged_in_a_draft_and_by_a_rewrite() -> None:
    made = program(path_of("tree"))
    plain, draft = made.seeds()[:2]
    assert "search(" in made.emit(plain) and "descend<1000, 9, false>" in made.emit(draft)
    moved = rewrites.apply(made, plain, "stage_local", 0)
    assert moved is not None and made.emit(moved) == made.emit(draft)
    fewer = rewrites.apply(made, draft, "stage_local", 0)
    assert fewer is not None and "descend<1000, 8, false>" in made.emit(fewer)
    back = [rewrites.apply(made, draft, "stage_local", draw) for draw in range(4)]
    assert made.emit(plain) in [made.emit(schedule) for schedule in back if schedule is not None]
    assert {"0.0.levels", "0.0.warps", "0.0.unroll"} <= set(rewrites.knobs(made, draft))


# Rows of dense_to_jagged share a search, which lanes that each made their own would repeat.
@pytest.mark.parametrize("name", ["softmax", "batch_event_truncate", "dense_to_jagged"])
def test_what_has_no_such_search_has_no_such_draft(name: str) -> None:
    made = program(name)
    plan = made.seeds()[0].plans[0]
    assert fusion.in_shared_memory(made.graphs[0], plan) == plan


@pytest.mark.parametrize("name", ["padded", "joined"])
def test_a_search_that_is_made_for_some_columns_only_is_not_copied_for_all(name: str) -> None:
    made = program(str(FOLDER / "unsearched" / f"{name}.py"))
    for seed in made.seeds():
        staged_too = fusion.in_shared_memory(made.graphs[0], seed.plans[0])
        assert "__shared__" not in made.emit(Schedule((staged_too,)))


def test_columns_beyond_the_last_are_not_copied_and_blocks_side_by_side_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = program(path_of("columns"))
    source = made.emit(staged(made))
    assert "if (of < 40) table[" in source and "col < 40" in source
    assert searched(made, staged(made)).knobs()["columns"] == [32, 64]
    monkeypatch.setattr(searches, "SIDE_BY_SIDE", 1)
    assert searched(made, staged(made)).knobs()["columns"] == [64]


@pytest.mark.parametrize("name", ["map_id", "bucketize"])
def test_they_compile_without_a_gpu_to_kernels_that_fill_one(name: str) -> None:
    if not nvrtc.tools():
        pytest.skip("needs NVRTC or nvcc")
    task = Task.load(name)
    made = Program.for_language(task, "triton")
    signature = Signature.of(task, ["gpu"])
    schedule = staged(made)
    artifact = built(
        made.emit(schedule),
        inputs=signature.inputs["gpu"],
        outputs=signature.outputs["gpu"],
        state=dict(signature.state["gpu"]),
    )
    (kernel,) = artifact.report["kernels"]
    assert kernel["stack"] == 0
    assert kernel["occupancy"] == searched(made, schedule).resident / 2  # of 1024 threads each
