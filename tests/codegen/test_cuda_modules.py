"""Generated CUDA C++ modules: computed thread by thread on a CPU, and compiled for sm_90 as candidates are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ke_gym import tasks
from ke_gym.codegen import CodegenError, rewrites
from ke_gym.codegen.bags import Bag
from ke_gym.codegen.cuda_layout import layout, together
from ke_gym.codegen.expr import Var, constant, of
from ke_gym.codegen.variants import groups, nest_of
from ke_gym.languages import nvrtc
from ke_gym.languages.cuda import parse_kernels
from ke_gym.languages.plan import TensorSpec
from ke_gym.tasks import Task
from tests.codegen.cuda_on_host import IN_BAGS, IN_PASSES, IN_VECTORS, VECTORS, check, program
from tests.codegen.interpret import SMALL, case_ids, with_launch
from tests.languages.gpu_modules import built, launches

NAMES = [task.name for task in tasks.resolve("suite") if SMALL in task.shapes]
# One of each kind: reductions of rows and columns, scans, windows, searches, gathers, masks, views.
ON_HOST = (
    "softmax", "layer_norm", "column_mean", "argmax", "reverse_cumsum", "max_pool", "cross_entropy", "bucketize",
    "map_id", "rotary_embedding",
)  # fmt: skip
COMPILED = (
    "softmax",
    "max_pool",
    "argmax",
    "cumsum",
    "matmul_bias_gelu",
    "bucketize",
    "rms_norm_backward",
    "rms_norm_bf16",
    "global_pool",
    "embedding_bag",
)
EXAMPLES = settings(max_examples=60, deadline=None)


def source_of(text: str) -> str:
    """The CUDA C++ of a module."""
    return text.split("r'''\n", 1)[1].split("'''", 1)[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_task_has_modules(name: str) -> None:
    made = program(name)
    for seed in made.seeds():
        text = made.emit(seed)
        compile(text, name, "exec")
        assert "lang.cuda(" not in text or all(
            k.startswith("compute_") for k in parse_kernels(source_of(text))
        )


@pytest.mark.parametrize("name", ON_HOST)
def test_first_drafts_compute_the_reference(name: str, tmp_path: Path) -> None:
    check(name, program(name).seeds()[0], tmp_path)


@pytest.mark.parametrize("name", IN_PASSES)
def test_rows_in_passes_compute_the_reference(name: str, tmp_path: Path) -> None:
    made = program(name)
    schedule = with_launch(made.seeds()[0], IN_PASSES[name])
    assert made.legal(schedule)
    check(name, schedule, tmp_path)


@pytest.mark.parametrize("name, launch, loaded", IN_VECTORS)
def test_vectors_compute_the_reference(name: str, launch: Any, loaded: str, tmp_path: Path) -> None:
    path = str(VECTORS / f"{name}.py")
    made = program(path)
    schedule = with_launch(made.seeds()[0], launch)
    assert made.legal(schedule)
    assert loaded in made.emit(schedule)
    check(path, schedule, tmp_path)


@pytest.mark.parametrize("name, launch", IN_BAGS, ids=case_ids)
def test_bags_compute_the_reference(name: str, launch: Any, tmp_path: Path) -> None:
    made = program(name)
    schedule = with_launch(made.seeds()[0], launch)
    assert made.legal(schedule)
    text = made.emit(schedule)
    assert "torch.ops.aten" not in text and ("load<4>" in text) == ("wide" not in name)
    check(name, schedule, tmp_path)


@pytest.mark.parametrize("name", COMPILED)
def test_first_drafts_compile_without_a_gpu(name: str) -> None:
    if not nvrtc.tools():
        pytest.skip("needs NVRTC or nvcc")
    task, made = Task.load(name), program(name)
    inputs = tuple(TensorSpec.of(v) if isinstance(v, torch.Tensor) else v for v in task.inputs(SMALL, 0))
    reference = task.reference(SMALL)
    outputs = tuple(TensorSpec.of(tensor) for tensor in reference(*task.inputs(SMALL, 0)))
    state = {key: TensorSpec.of(tensor) for key, tensor in reference.state.items()}
    text = made.emit(made.seeds()[0])
    artifact = built(text, "cuda", inputs=inputs, outputs=outputs, state=state)
    assert len(launches(artifact)) == text.count("__global__")
    assert all(kernel["stack"] == 0 for kernel in artifact.report["kernels"]), "nothing spills at these sizes"


def test_products_stay_library_calls() -> None:
    made = program("matmul_bias_gelu")
    text = made.emit(made.seeds()[0])
    assert "torch.ops.aten.mm.default(" in text
    assert "gelu_tanh(" in text
    assert list(parse_kernels(source_of(text))) == ["compute_gelu"]


def test_softmax_reads_its_input_once_or_twice() -> None:
    made = program("softmax")
    whole = made.emit(made.seeds()[0])
    assert source_of(whole).count("= x[") + source_of(whole).count("(x, ") == 1
    assert "x_kept" in whole
    passes = made.emit(with_launch(made.seeds()[0], (("columns", 64),)))
    assert source_of(passes).count("= x[") + source_of(passes).count("(x, ") == 2
    assert "x_kept" not in passes


@pytest.mark.parametrize("name", ["softmax", "layer_norm_backward", "column_mean"])
def test_rewrites_give_other_modules(name: str) -> None:
    made = program(name)
    seed = made.seeds()[0]
    applied = 0
    for strategy in rewrites.STRATEGIES:
        changed = rewrites.apply(made, seed, strategy, draw=1)
        if changed is not None:
            applied += 1
            assert made.legal(changed)
            assert made.emit(changed) != made.emit(seed), strategy
    assert applied >= 3


def test_threads_of_a_block_are_whole_warps() -> None:
    for name in NAMES:
        made = program(name)
        seed = made.seeds()[0]
        for p, g, _ in groups(seed):
            nest: Any = nest_of(made, seed, p, g)
            if isinstance(nest, Bag):
                assert nest.blocks.warps <= 32
                continue
            shape = layout(nest)
            assert shape.threads % 32 == 0
            assert shape.threads <= 1024
            assert shape.lanes & (shape.lanes - 1) == 0


def test_what_is_refused() -> None:
    made = program("softmax")
    seed = made.seeds()[0]
    with pytest.raises(CodegenError, match="was lowered for cuda; cpp is for cpu"):
        made.emit(seed, "cpp")
    assert made.language == "cuda"
    assert made.emit(seed) == made.emit(seed, "cuda")
    assert "@triton.jit" in made.emit(seed, "triton")
    assert "0.0.stages" not in rewrites.knobs(made, with_launch(seed, (("columns", 64),)))


@EXAMPLES
@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 24), st.integers(1, 40))
def test_vectors_go_through_neighbours(power: int, factor: int, offset: int, size: int) -> None:
    """An index that is a whole vector visits N neighbours from a multiple of N on, and any other is none."""
    vector = 1 << power
    at, j = Var("at", size), Var("j", vector)
    index = of(at) * (factor * 4) + of(j) + offset
    which = together(index, vector)
    starts = [place * factor * 4 + offset for place in range(size)]
    assert (which is not None) == (offset % vector == 0 and factor * 4 % vector == 0)
    if which is not None:
        assert all(start % vector == 0 for start in starts)
        assert which.coefficient(at) * vector == factor * 4
    assert together(of(j) * 2 + constant(0), vector) is None
