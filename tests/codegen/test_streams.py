"""Drafts for kernels that memory limits: in which order they read and write, and what caches are told, at GPU sizes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton")

from ke_gym.codegen import Program
from ke_gym.codegen.schedule import Schedule
from ke_gym.tasks import Task
from tests.codegen.interpret import program


@cache
def drafts(name: str) -> list[str]:
    """The text of a task's first drafts in Triton."""
    made = Program.for_language(Task.load(name), "triton")
    return [made.emit(seed) for seed in made.seeds()]


def lines(text: str, what: str) -> list[str]:
    return [line for line in text.splitlines() if what in line]


@pytest.mark.parametrize("name", ["batch_event_truncate", "jagged_to_dense", "rms_norm_backward"])
def test_all_that_rows_need_is_read_before_anything_is_written(name: str) -> None:
    text = program(name).emit(program(name).seeds()[0])
    kernels = [part for part in text.split("@triton.jit\n") if part.startswith("def compute_")]
    assert kernels
    for body in (kernel.split("\n\n")[0] for kernel in kernels):
        assert "tl.store(" in body
        assert "tl.load(" not in body[body.find("tl.store(") :]


def test_what_two_large_tensors_make_goes_past_the_caches_by_a_word_a_thread() -> None:
    text = drafts("residual_scale")[0]
    assert "ROWS=1024, num_warps=8" in text
    assert [line.count('cache_modifier=".cs"') for line in lines(text, "tl.store(")] == [1]
    told = {line.split("tl.load(")[1].split()[0]: "evict_last" in line for line in lines(text, "tl.load(")}
    assert told == {"residual": False, "branch": False, "scale": True, "bias": True}
    assert (
        "ROWS=1024, num_warps=4" in drafts("residual_scale")[1] and ".cs" not in drafts("residual_scale")[1]
    )


def test_what_one_large_tensor_makes_goes_past_the_caches_in_the_second_draft() -> None:
    first, second = drafts("bias_gelu")[:2]
    assert ".cs" not in first and "evict" not in first
    assert "evict_first" not in second
    assert lines(second, "tl.store(")[0].endswith('cache_modifier=".cs")')
    assert "num_warps=4" in first and "num_warps=4" in second


def test_halves_windows_and_rows_from_their_end_begin_with_the_blocks_that_were_fastest() -> None:
    assert "ROWS=2048, num_warps=4" in drafts("bias_gelu_bf16")[0]
    assert "ROWS=128, num_warps=4" in drafts("max_pool")[0]
    assert "BLOCK=512, num_warps=4" in drafts("reverse_cumsum")[0]
    assert "BLOCK=16384, num_warps=8" in drafts("cumsum")[0]


def test_gathered_elements_stay_and_so_does_what_is_read_once_a_row() -> None:
    made = Program.for_language(Task.load("batch_event_truncate"), "triton")
    (text,) = [
        made.emit(seed)
        for seed in made.seeds()
        if seed.plans[0].groups[0].launch == (("cache", "kept"), ("rows", 1), ("warps", 2))
    ]
    assert all('eviction_policy="evict_last"' in line for line in lines(text, "tl.load("))
    assert all('eviction_policy="evict_last"' in line for line in lines(text, "tl.store("))


def test_pieces_of_a_row_are_read_again_and_leave_then_as_the_results_do() -> None:
    (text,) = [text for text in drafts("instance_norm") if "BLOCK=2048" in text]
    assert ["evict_first" in line for line in lines(text, "tl.load(x ")] == [False, True]
    assert lines(text, "tl.store(")[0].endswith('eviction_policy="evict_first")')


def test_flags_are_counted_in_four_bytes() -> None:
    text = drafts("batch_event_truncate")[0]
    assert ".to(tl.int32), 0), axis=1" in text
    assert "sum_1_row = sum_1_row.to(tl.int64)" in text


def test_large_kernels_have_drafts_that_tell_the_caches() -> None:
    # Four rows of 16 KiB stay in an L1 until they are read again, of 32 KiB two.
    for name, warps in (("variance", 16), ("rms_norm_bf16", 16), ("rms_norm", 32)):
        made = Program.for_language(Task.load(name), "triton")
        told = [dict(seed.plans[0].groups[0].launch) for seed in made.seeds()[:4]]
        assert told == [
            {},
            {"cache": "reads"},
            {"cache": "streamed", "columns": 2048, "rows": 1, "warps": warps},
            {"cache": "again", "rows": 1, "warps": 16},
        ]
    assert not any(dict(seed.plans[0].groups[0].launch) for seed in program("rms_norm").seeds())


def test_reductions_of_what_an_l2_holds_have_them_beside_library_products_too() -> None:
    task = Task.load("pooled_ffn")

    def told(batch: int) -> list[bool]:
        """Of each draft that tells caches of reads: whether its products are the library's."""
        sized = replace(task, name=f"of_{batch}", shapes={"gpu": {**task.shapes["gpu"], "BATCH": batch}})
        made = Program.for_language(sized, "triton")
        chosen = [s for s in made.seeds() if ("cache", "reads") in s.plans[0].groups[1].launch]
        return ["aten.mm.default" in made.emit(seed) for seed in chosen]

    assert told(64) == [False, True]  # 32 MiB
    assert told(8) == []


@pytest.mark.parametrize(
    "name, fits, not_these",
    [
        # Elements of a thread: 256; those of a norm's backward pass, whose walk fetches two tensors of a row ahead.
        ("softmax", {"columns": 32768, "warps": 4, "rows": 1}, {"columns": 32768, "warps": 2, "rows": 1}),
        ("rms_norm_backward", {"stages": 3, "rows": 2}, {"stages": 3, "rows": 4}),
        ("cumsum", {"columns": 4096, "rows": 4, "stages": 3}, {"columns": 4096, "rows": 8, "stages": 3}),
    ],
)
def test_what_would_spill_or_not_fit_is_not_offered(
    name: str, fits: dict[str, int], not_these: dict[str, int]
) -> None:
    made = Program.for_language(Task.load(name), "triton")
    plan = made.seeds()[0].plans[0]
    large = max(plan.groups, key=lambda group: len(group.nodes))

    def legal(knobs: dict[str, int]) -> bool:
        launch = tuple(sorted((dict(large.launch) | knobs).items()))
        return made.legal(
            Schedule(
                (
                    replace(
                        plan,
                        groups=tuple(replace(g, launch=launch) if g is large else g for g in plan.groups),
                    ),
                )
            )
        )

    assert legal(fits) and not legal(not_these)


def test_what_is_gathered_again_has_a_draft_that_finds_it_in_the_cache() -> None:
    made = Program.for_language(Task.load("gather_rows"), "triton")
    launches = [dict(seed.plans[0].groups[0].launch) for seed in made.seeds()]
    slabs = {"columns": 64, "rows": 256, "stages": 2, "warps": 8}  # 128256 x 64 of a table are 33 MB
    assert slabs in launches
    assert not any("rows" in launch for launch in launches if launch.get("columns") != 64)
    assert not any(dict(seed.plans[0].groups[0].launch) for seed in program("gather_rows").seeds())


@pytest.mark.parametrize(("entries", "columns", "stages"), [(1 << 19, 16, 2), (1 << 17, 64, 1)])
def test_slabs_are_fetched_ahead_where_shared_memory_holds_two(
    tmp_path: Path, entries: int, columns: int, stages: int
) -> None:
    path = tmp_path / "many.py"
    path.write_text(
        "import torch, torch.nn as nn\nIDS, DIM = 1 << 20, 1024\nshapes = {'gpu': {'IDS': IDS}}\n"
        "class Model(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"        self.table = nn.Embedding({entries}, DIM)\n"
        "    def forward(self, ids):\n        return torch.relu(self.table(ids))\n"
        f"def get_inputs():\n    return [torch.randint(0, {entries}, (IDS,))]\n"
    )
    made = Program.for_language(Task.from_file(path), "triton")
    launches = [dict(seed.plans[0].groups[0].launch) for seed in made.seeds()]
    assert {"columns": columns, "rows": 1024, "stages": stages, "warps": 8} in launches


def test_rows_that_are_read_from_little_have_drafts_too(tmp_path: Path) -> None:
    path = tmp_path / "outer.py"
    path.write_text(
        "import torch\nR, C = 8192, 4096\nshapes = {'gpu': {'R': R}}\nclass Model(torch.nn.Module):\n"
        "    def forward(self, b):\n"
        "        return torch.softmax(b[None, :] * torch.arange(R, device=b.device)[:, None], -1)\n"
        "def get_inputs():\n    return [torch.randn(C)]\n"
    )
    made = Program.from_task(Task.from_file(path), "cuda")
    assert {"columns": 2048, "rows": 1} in [
        {k: v for k, v in seed.plans[0].groups[0].launch if k in ("columns", "rows")} for seed in made.seeds()
    ]
