"""Every built-in task: loads, builds, is right in float64, exports, and stands every distribution."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ke_gym.tasks import DISTRIBUTIONS, library, resolve

FAMILIES = {
    "pointwise", "reduction", "softmax", "norm", "scan", "matmul", "attention", "conv", "pooling", "gather",
    "ranking",
}  # fmt: skip
# What rounding to the outputs' own dtype costs, in relative L2.
ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}

every_task = pytest.mark.parametrize("task", library().values(), ids=lambda task: task.name)


def test_the_suite_covers_its_families():
    assert len(library()) >= 36
    assert {task.family for task in resolve("suite")} == FAMILIES
    assert all({"cpu", "gpu", "ragged"} <= set(task.shapes) for task in resolve("suite"))
    assert all(task.description for task in resolve("suite"))
    assert len({task.id for task in resolve("suite")}) == len(library())


@every_task
@pytest.mark.parametrize("shape_set", ["cpu", "ragged"])
def test_float32_agrees_with_float64(task, shape_set):
    reference = task.reference(shape_set)
    reference.randomize(5)
    arguments = task.inputs(shape_set, seed=7)
    outputs, exact = reference(*arguments), reference.double()(*arguments)
    assert len(outputs) == len(exact) > 0
    for output, oracle in zip(outputs, exact, strict=True):
        assert output.shape == oracle.shape
        if output.is_floating_point():
            assert output.isfinite().all() and oracle.dtype == torch.float64
            assert (output - oracle).norm() <= ROUNDING[output.dtype] * oracle.norm()
            assert oracle.norm() > 0
        else:
            assert torch.equal(output, oracle)


@every_task
def test_calls_are_repeatable_and_leave_inputs_alone(task):
    reference = task.reference("ragged")
    arguments = task.inputs("ragged", seed=1)
    kept = [value.clone() for value in arguments]
    first, second = reference(*arguments), reference(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(arguments, kept, strict=True))


@every_task
def test_contents_are_fresh(task):
    first, second = task.inputs("ragged", seed=1), task.inputs("ragged", seed=2)
    assert [t.shape for t in first] == [t.shape for t in second]
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for a, b in zip(first, second, strict=True):
        if (
            a.is_floating_point()
            and a.dtype == torch.float32
            and a.numel() > 100
            and task.name != "rotary_embedding"
        ):
            assert (a == b).double().mean() < 0.01


@every_task
def test_every_distribution_is_valid_input(task):
    reference = task.reference("ragged")
    shapes = [output.shape for output in reference(*task.inputs("ragged", seed=3))]
    for distribution in DISTRIBUTIONS:
        outputs = reference(*task.inputs("ragged", seed=3, distribution=distribution))
        assert [output.shape for output in outputs] == shapes


@every_task
def test_exports_with_static_shapes(task):
    if task.backward:
        assert len(task.inputs("ragged")) == 2  # x and one grad_output; autograd is not exported
        return
    reference, arguments = task.reference("ragged"), task.inputs("ragged")
    program = torch.export.export(reference.module, tuple(arguments)).run_decompositions()
    expected = reference(*arguments)
    with torch.no_grad():
        result = program.module()(*arguments)
    outputs = result if isinstance(result, tuple) else (result,)
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=2e-2, atol=1e-3)


@every_task
def test_gpu_sizes_fit_together(task):
    with torch.device("meta"):
        reference, arguments = task.reference("gpu"), task.inputs("gpu")
        outputs = reference(*arguments)
    tensors = [*arguments, *reference.state.values(), *outputs]
    assert all(tensor.is_meta for tensor in tensors)
    gibibytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**30
    assert 0.01 < gibibytes < 32


def test_structure_of_the_ranking_inputs():
    values, offsets = resolve("jagged_to_dense")[0].inputs("cpu", seed=9)
    assert offsets[0] == 0 and offsets[-1] == len(values) and (offsets[1:] >= offsets[:-1]).all()
    ids, vocabulary = resolve("map_id")[0].inputs("cpu", seed=9)
    assert (vocabulary[1:] > vocabulary[:-1]).all()
    mapped = resolve("map_id")[0].reference("cpu")(ids, vocabulary)[0]
    assert 0.2 < (mapped == 0).double().mean() < 0.8


def test_jagged_round_trip():
    pack, pad = resolve("dense_to_jagged")[0].reference("ragged"), resolve("jagged_to_dense")[0]
    dense, offsets = resolve("dense_to_jagged")[0].inputs("ragged", seed=4)
    (values,) = pack(dense, offsets)
    module = type(pad.reference("ragged").module)(dense.shape[1])
    restored = module(values, offsets)
    lengths = (offsets[1:] - offsets[:-1]).clamp(max=dense.shape[1])
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(restored[row, :length], dense[row, :length])
        assert not restored[row, length:].any()


def test_contents_do_not_depend_on_the_process():
    program = (
        "import sys, torch; from ke_gym.tasks import Task; t = Task.load('cumsum')\n"
        "x = t.inputs('ragged', 5, 'laplace')[0]; y = t.reference('ragged')(x)[0]\n"
        "print(x.double().sum().item(), y.double().sum().item(), t.id)"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    task = resolve("cumsum")[0]
    (x,) = task.inputs("ragged", 5, "laplace")
    y = task.reference("ragged")(x)[0]
    assert told.split() == [str(x.double().sum().item()), str(y.double().sum().item()), task.id]
