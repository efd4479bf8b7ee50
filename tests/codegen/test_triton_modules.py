"""Generated Triton modules: computed by Triton's interpreter on a CPU, and compiled for sm_90."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from ke_gym import tasks
from ke_gym.codegen import CodegenError, Program, rewrites
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.legality import changes
from ke_gym.codegen.schedule import Schedule
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.base import Signature
from ke_gym.languages.plan import Launch
from ke_gym.tasks import Task
from tests.codegen.interpret import (
    DRAFTED,
    FOLDER,
    HALF,
    PASSES,
    PRODUCTS,
    SMALL,
    THIN,
    case,
    case_ids,
    first,
    program,
    scheduled,
)
from tests.languages.gpu_modules import built, launches

NAMES = [task.name for task in tasks.resolve("suite") if SMALL in task.shapes]
# One of each kind, and cheap to interpret: every program of the grid is a walk through Python.
INTERPRETED = (
    "softmax", "layer_norm", "column_mean", "argmax", "reverse_cumsum", "max_pool", "cross_entropy", "bucketize",
    "map_id", "rotary_embedding", "matmul_bias_gelu", "attention_gqa_decode", "dense_to_jagged", "embedding_bag",
    "matmul_row_max", *(str(FOLDER / "attention" / f"{name}.py") for name in ("library", "thresholded")),
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_task_has_modules(name: str) -> None:
    made = program(name)
    for seed in made.seeds():
        compile(made.emit(seed), name, "exec")


def test_skinny_products_of_a_tf32_task_are_more_precise() -> None:
    """Two truncated products in a row err by more than one may; the short ones wait for memory anyway."""
    made = program("matmul_low_rank")
    precisions = [
        line.split("input_precision=")[1].split(")")[0].strip('"')
        for line in made.emit(made.seeds()[0]).splitlines()
        if "input_precision=" in line
    ]
    assert precisions == ["tf32", "tf32x3", "tf32x3"]


REWRITTEN = (
    "softmax",
    "layer_norm_backward",
    "group_norm",
    "matmul_bias_gelu",
    "attention_causal",
    "pooled_ffn",
)


@pytest.mark.parametrize("name", REWRITTEN)
def test_rewrites_give_other_modules(name: str) -> None:
    made = program(name)
    seed = made.seeds()[0]
    assert Schedule.from_json(seed.to_json()) == seed
    applied = 0
    for strategy in rewrites.STRATEGIES:
        changed = rewrites.apply(made, seed, strategy, draw=1)
        if changed is not None:
            applied += 1
            assert made.legal(changed)
            assert made.emit(changed) != made.emit(seed), strategy
    assert applied >= 4


IN_PASSES = {
    "softmax": (("columns", 64), ("rows", 4)),
    "log_softmax": (("columns", 64),),
    "cumsum": (("columns", 64), ("rows", 8)),
    "column_mean": (("rows", 16),),
    "layer_norm": (("columns", 16), ("rows", 2)),
    "variance": (("columns", 16), ("rows", 4)),
    "group_norm": (("columns", 256), ("stages", 3)),
    "reverse_cumsum": (("columns", 64), ("rows", 4)),
    "layer_norm_backward": (("rows", 4), ("stages", 2)),
    "rms_norm_backward": (("programs", 264),),
    "max_pool": (("inner", 2),),
    "rms_norm": (("cache", "reads"), ("columns", 64)),
    "dense_to_jagged": (("cache", "kept"),),
    "instance_norm": (("cache", "again"), ("rows", 2)),
    "cross_entropy": (("cache", "again"),),
    "rms_norm_bf16": (("cache", "again"), ("rows", 4)),
    "matmul_row_max": (("ready", True), ("turned", True)),
    "matmul_low_rank": (("seed", 1),),
    **dict.fromkeys(THIN, (("seed", 1),)),
    **dict.fromkeys(PASSES, (("columns", 64), ("rows", 2))),
}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What a process whose Triton interprets says of each module: "" if it computes what the reference does."""
    wanted = [(name, ()) for name in (*INTERPRETED, *DRAFTED, *HALF)] + [*IN_PASSES.items(), *PRODUCTS]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.codegen.interpret"],
        input=json.dumps(wanted), capture_output=True, text=True, env=environment, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", [*INTERPRETED, *DRAFTED, *HALF], ids=lambda name: Path(name).stem)
def test_first_drafts_compute_the_reference(name: str, interpreted: dict[str, str]) -> None:
    assert interpreted[case(name, ())] == ""


@pytest.mark.parametrize("name, launch", [*IN_PASSES.items(), *PRODUCTS], ids=case_ids)
def test_other_schedules_compute_the_reference(name: str, launch: Any, interpreted: dict[str, str]) -> None:
    assert interpreted[case(name, launch)] == ""


@pytest.mark.parametrize("name", HALF, ids=lambda name: Path(name).stem)
def test_half_precision_is_one_kernel_of_its_own(name: str) -> None:
    text = program(name).emit(first(program(name)))
    copies = text.count("_left(")  # of weights
    assert text.count("@triton.jit\ndef compute_") - copies == 1
    assert "tl.dot" in text
    assert "torch.ops" not in text


def test_the_library_keeps_attention_in_half_precision() -> None:
    task = Task.load(str(FOLDER / "attention" / "library.py"))
    made = {language: Program.from_task(task, "cuda", language) for language in ("triton", "cuda")}
    text = {language: one.emit(one.seeds()[0]) for language, one in made.items()}
    assert "tl.dot" in text["triton"] and "scaled_dot_product_attention" not in text["triton"]
    assert "aten.scaled_dot_product_attention" in text["cuda"]  # which has attention in half precision alone


def test_what_is_summed_over_rows_is_read_once() -> None:
    text = program("layer_norm_backward").emit(program("layer_norm_backward").seeds()[0])
    assert text.count("tl.load(x ") == 1
    assert text.count("tl.load(grad ") == 1
    assert text.count("\ndef compute_") == 2


# How often a draft's text says what: kernels, passes, sums that are taken twice, divisions of every element.
SAID = {
    "variance": {"tl.sum(": 2, "def compute_": 1},
    "softmax_fp16": {" / 0.7": 0},
    "reverse_cumsum": {"reverse=True": 1, "def compute_": 1},
    "batch_event_truncate": {"def compute_": 1},
    "embedding_bag": {"torch.ops": 0},
}


@pytest.mark.parametrize("name", SAID)
def test_drafts_do_nothing_twice(name: str) -> None:
    text = program(name).emit(program(name).seeds()[0])
    assert {words: text.count(words) for words in SAID[name]} == SAID[name]


def test_rows_of_a_product_are_reduced_where_it_is_made() -> None:
    text = program("matmul_row_max").emit(program("matmul_row_max").seeds()[0])
    assert "relu" not in text.split("def forward")[1]


def test_a_variance_takes_one_pass() -> None:
    made = program("group_norm")
    assert made.emit(scheduled(made, (("columns", 256),))).count("tl.load(x ") == 2


def test_softmax_in_passes_reads_its_input_twice() -> None:
    made = program("softmax")
    assert made.emit(scheduled(made, (("columns", 64),))).count("tl.load(x ") == 2


def test_caches_are_told_which_reads_are_the_last() -> None:
    made = program("rms_norm")
    held = made.emit(scheduled(made, (("cache", "reads"),)))
    assert [held.count(f'eviction_policy="evict_{which}"') for which in ("first", "last")] == [1, 1]
    looped = made.emit(scheduled(made, (("cache", "reads"), ("columns", 64))))
    reads = [line for line in looped.splitlines() if "tl.load(" in line]
    kinds = [
        (line.split("tl.load(")[1].split(" ")[0], line.split("evict_")[1].split('"')[0]) for line in reads
    ]
    assert kinds == [("x", "last"), ("x", "first"), ("weight", "last")]
    kept = made.emit(scheduled(made, (("cache", "kept"),)))
    (store,) = [line for line in kept.splitlines() if "tl.store(" in line]
    assert store.endswith('eviction_policy="evict_last")')
    draws = [rewrites.apply(made, made.seeds()[0], "cache_hint", draw) for draw in range(4)]
    told = [dict(s.plans[0].groups[0].launch) if s else None for s in draws]
    assert told == [{"cache": name} for name in ("reads", "kept", "streamed", "results")]
    again = made.emit(scheduled(made, (("cache", "again"),)))
    reads = [line for line in again.splitlines() if "tl.load(x" in line]
    assert ["evict_first" in line for line in reads] == [False, True]
    assert again.count("for start in range(0, ") == 2 and "back" not in again


def test_what_changes_nothing_is_not_offered() -> None:
    made = program("matmul_bias_gelu")
    seed = made.seeds()[0]
    single = rewrites.with_knobs(made, seed, {"0.0.precision": "ieee"})
    assert {"0.0.ready", "0.0.sums"} & set(rewrites.knobs(made, single)) == set()
    ready = rewrites.with_knobs(made, seed, {"0.0.ready": True})
    assert rewrites.knobs(made, ready)["0.0.sums"] == [1, 2, 4]
    assert not changes(made, single, rewrites.with_knobs(made, single, {"0.0.ready": True}))


def test_sums_of_several_blocks_go_on_from_tap_to_tap() -> None:
    made = Program.for_language(Task.load(str(FOLDER / "products" / "conv2d_taps.py")), "triton")
    knobs = {"ready": True, "sums": 2, "k": 32, "unroll": True}
    seed = next(
        s for s in made.seeds() if any(dict(g.launch).get("channels_last") for g in s.plans[0].groups)
    )
    text = made.emit(rewrites.with_knobs(made, seed, {f"0.0.{name}": value for name, value in knobs.items()}))
    assert "if (tap * 32 + start) % (2 * K) == 1 * K:" in text


def test_a_thin_product_is_a_step_of_the_one_it_is_added_to() -> None:
    made = program("matmul_low_rank")
    apart, inside = made.seeds()[:2]
    joined = rewrites.apply(made, apart, "fuse")
    assert joined is not None
    assert [group.nodes for group in joined.plans[0].groups] == [g.nodes for g in inside.plans[0].groups]
    assert made.emit(apart).count("tl.dot(") == 3
    last = made.emit(inside).split("def compute_add")[1]
    assert last.count("tl.dot(") == 4, "one of TF32, and three of the thin product's parts"
    assert last.count("tl.store(") == 1
    assert "* 2.0" in last.split("for start")[0], "the scale is the thin operand's"


COMPILED = ("softmax", "max_pool", "matmul_bias_gelu", "attention_causal", "global_pool")


def compiled(name: str, launch: Any = ()) -> Artifact:
    made, signature = program(name), Signature.of(Task.load(name), [SMALL])
    schedule = scheduled(made, launch) if launch else made.seeds()[0]
    return built(
        made.emit(schedule), inputs=signature.inputs[SMALL], outputs=signature.outputs[SMALL],
        state=dict(signature.state[SMALL]),
    )  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_first_drafts_compile_without_a_gpu(name: str) -> None:
    artifact = compiled(name)
    assert len(launches(artifact)) >= 1
    assert all(kernel["stack"] == 0 for kernel in artifact.report["kernels"]), "nothing spills at these sizes"


REWRITTEN = [case for case in PRODUCTS if {"prepared", "channels_last", "ready"} & set(dict(case[1]))]


@pytest.mark.parametrize("name, launch", [c for c in PRODUCTS if c not in REWRITTEN], ids=case_ids)
def test_products_compile_without_a_gpu(name: str, launch: Any) -> None:
    knobs, steps = dict(launch), launches(compiled(name, launch))
    copies = [step for step in steps if step.kernel.endswith(("_left", "_right"))]
    main, *sums = [step for step in steps if step not in copies]
    assert bool(copies) == knobs.get("packed", "conv" in name)
    assert len(sums) == (knobs.get("split", 1) > 1)
    assert ("CUtensorMap" in main.ctypes) == bool({"loads", "specialized"} & set(knobs))
    assert main.geometry is not None
    # Four warps multiply; of those that bring tiles and store them Triton says in the binary.
    assert main.geometry.block[0] > 128 or not knobs.get("specialized")
    if "persistent" in knobs:
        assert main.geometry.grid[0] == knobs["persistent"]


def test_warps_are_specialized_where_triton_can_and_nowhere_else() -> None:
    asked = ("specialized", True)
    many, few = (program(str(FOLDER / "products" / f"{name}.py")) for name in ("many_tiles", "linear_half"))
    for launch in ((), (("n", 64),), (("stages", 4),)):
        assert "warp_specialize=True" in many.emit(scheduled(many, (asked, *launch)))
    for other in (("m", 128), ("n", 256), ("warps", 8), ("loads", "pointers"), ("stages", 1), ("split", 2)):
        assert not many.legal(scheduled(many, (asked, other))), other
    assert not many.legal(scheduled(many, (asked, ("persistent", 264)))), "it has 144 tiles"
    assert not few.legal(scheduled(few, (asked,)))


def test_specialized_warps_take_a_product_that_would_be_split(tmp_path: Path) -> None:
    text = (FOLDER / "products" / "many_tiles.py").read_text().replace("ROWS = 64", "ROWS = 2048")
    (tmp_path / "long_rows.py").write_text(text.replace("72", "8192").replace("1480", "2048"))
    product = program(str(tmp_path / "long_rows.py"))
    plain = product.emit(scheduled(product, ()))
    walked = product.emit(scheduled(product, (("specialized", True),)))
    assert "_parts" in plain and "_parts" not in walked and "warp_specialize=True" in walked


@pytest.mark.parametrize("name, launch", [REWRITTEN[3], REWRITTEN[5], REWRITTEN[-1]], ids=case_ids)
def test_weights_are_copied_in_a_preparation(name: str, launch: Any) -> None:
    artifact = compiled(name, launch)
    (plan,) = artifact.plans.values()
    kernels = [step.kernel for step in launches(artifact)]
    prepared = plan.preparation is not None
    assert prepared == dict(launch).get("prepared", False)
    made = plan.preparation.steps if plan.preparation is not None else ()
    assert all(step.kernel.endswith(("_left", "_right")) for step in made if isinstance(step, Launch))
    assert any(kernel.endswith("_left") for kernel in kernels) == (not prepared)
    assert any(kernel.endswith("_right") for kernel in kernels) == ("channels_last" in dict(launch))


def test_what_is_refused() -> None:
    made = program("softmax")
    with pytest.raises(CodegenError, match="triton, cuda, not in 'fortran'"):
        made.emit(made.seeds()[0], "fortran")
    with pytest.raises(CodegenError, match="was lowered for cuda; cpp is for cpu"):
        made.emit(made.seeds()[0], "cpp")
    schedule = scheduled(made, (("rows", 3),))
    assert not made.legal(schedule)
    with pytest.raises(CodegenError, match="rows=3 is no choice here"):
        made.emit(schedule)
    with pytest.raises(Illegal):
        rewrites.with_knobs(made, made.seeds()[0], {"0.0.warps": 3})


def test_knobs_are_where_the_schedule_stands() -> None:
    made = program("matmul_bias_gelu")
    seed = made.seeds()[0]
    space = rewrites.knobs(made, seed)
    assert {"0.0.m", "0.0.n", "0.0.k", "0.0.warps", "0.0.stages", "0.0.precision"} <= set(space)
    changed = rewrites.with_knobs(made, seed, {"0.0.warps": 2})
    assert "num_warps=2" in made.emit(changed)
