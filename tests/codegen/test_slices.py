"""Concatenations, drawn ones too, whose pieces are stored by the kernel that computes them: in Triton and CUDA C++."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ke_gym.codegen.expr import Expr, Index, Load, Op, Rewriter, Var, constant, in_range, of
from ke_gym.codegen.graph import Node, contiguous_stride
from ke_gym.codegen.slices import MAX_SLICES, slices
from tests.codegen import cuda_on_host, interpret

TASK = '''\
"""{body}"""

import torch
import torch.nn as nn

COLUMNS = 64
shapes = {{"ragged": {{"COLUMNS": 45}}}}


class Model(nn.Module):
    def forward(self, x, y):
        {body}


def get_inputs():
    return [torch.randn(4, 6, COLUMNS), torch.randn(4, 6)]


def get_init_inputs():
    return []
'''
# Kernels of the first draft in Triton, and in CUDA C++.
CASES = {
    "pooled": ("return torch.cat([x.mean(-1), x.amax(-1)], 1)", 1, 1),
    "first": ("return torch.cat([x.mean(-1), x.amax(-1), x.amin(-1)], 0)", 1, 1),
    "stacked": ("return torch.stack([x.mean(-1), x.amax(-1), x.amin(-1)], -1)", 1, 1),
    "rows": ("return torch.cat([x.softmax(-1), x.sigmoid(), x.log_softmax(-1)], 0)", 1, 1),
    "nested": ("return torch.cat([torch.stack([x.sum(-1), x.amax(-1)], 2), x.amin(-1, keepdim=True)], 2)", 1, 1),
    "behind": ("return torch.cat([x.mean(-1), x.amax(-1)], 1).relu() + 1", 1, 1),
    "apart": ("return torch.cat([x.mean(-1), y.sigmoid()], 1)", 1, 1),
    "promoted": ("return torch.cat([(x > 0).sum(-1), x.amax(-1), x.amin(-1).double()], 1)", 1, 1),
    "returned": ("m = x.mean(-1)\n        return m, torch.cat([m, x.amax(-1)], 1), m * y", 1, 1),
    "twice": ("m = x.mean(-1)\n        return torch.cat([m, x.amax(-1)], 0), torch.cat([m, m * 2], 1)", 1, 1),
    "pointwise": ("a = x.sigmoid()\n        return a, torch.cat([a, x.exp()], 0)", 1, 1),
    "running": ("return torch.cat([x.cumsum(-1), x * 2], 0)", 1, 2),
    "given": ("return torch.cat([x.mean(-1), y], 1)", 2, 2),
    "parts": ("return torch.cat([x.mean(-1)[:, 1:], x.amax(-1)], 1)", 2, 2),
    "whole": ("return torch.cat([x.softmax(-1), x], -1)", 1, 1),
}  # fmt: skip
# What is stored in passes over the columns, by blocks of rows.
IN_PASSES = {"rows": (("columns", 16), ("rows", 4)), "first": (("columns", 16), ("rows", 2))}
REDUCED = [
    "x.mean(-1)",
    "x.amax(-1)",
    "(x > 0).sum(-1)",
    "x.amin(-1).double()",
    "x.amax(-1) * y",
    "y.sigmoid()",
    "y",
]
ROWS = ["x.softmax(-1)", "x.sigmoid()", "x - x.amax(-1, keepdim=True)", "x.cumsum(-1)", "x"]
DRAWN = 12


def drawn(seed: int) -> str:
    """A concatenation that ``seed`` chooses."""
    chosen = random.Random(seed)
    pieces = REDUCED if chosen.random() < 0.7 else ROWS
    listed = ", ".join(chosen.choice(pieces) for _ in range(chosen.randint(2, 4)))
    whole = f"torch.{chosen.choice(['cat', 'stack'])}([{listed}], {chosen.choice([0, 1, -1])})"
    ending = chosen.choice(["", "", ".float() + 1"])
    more = chosen.choice(["", f", {chosen.choice(pieces)} + 1"])
    return f"return {whole}{ending}{more}"


def written(folder: Path) -> dict[str, str]:
    """The tasks' files, by name."""
    bodies = {name: body for name, (body, _, _) in CASES.items()}
    bodies |= {f"drawn{seed}": drawn(seed) for seed in range(DRAWN)}
    for name, body in bodies.items():
        (folder / f"{name}.py").write_text(TASK.format(body=body))
    return {name: str(folder / f"{name}.py") for name in bodies}


NAMES = [*CASES, *(f"drawn{seed}" for seed in range(DRAWN))]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return written(tmp_path_factory.mktemp("slices"))


@pytest.fixture(scope="module")
def interpreted(files: dict[str, str]) -> dict[str, str]:
    """What a process whose Triton interprets says of each module: "" if it computes what the reference does."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    wanted = [(files[name], launch) for name, launch in [*((name, ()) for name in NAMES), *IN_PASSES.items()]]
    done = subprocess.run(
        [sys.executable, "-m", "tests.codegen.interpret"], input=json.dumps(wanted),
        capture_output=True, text=True, env=environment, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_triton_computes_the_reference(name: str, interpreted: dict[str, str]) -> None:
    assert interpreted[name] == ""


@pytest.mark.parametrize("name", IN_PASSES)
def test_passes_compute_the_reference(name: str, interpreted: dict[str, str]) -> None:
    assert interpreted[interpret.case(name, IN_PASSES[name])] == ""


@pytest.mark.parametrize("name", NAMES)
def test_cuda_computes_the_reference(name: str, files: dict[str, str], tmp_path: Path) -> None:
    cuda_on_host.check(files[name], cuda_on_host.program(files[name]).seeds()[0], tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_pieces_of_ours_need_no_kernel_that_puts_them_together(name: str, files: dict[str, str]) -> None:
    _, *wanted = CASES[name]
    made = interpret.program(files[name]), cuda_on_host.program(files[name])
    texts = [program.emit(program.seeds()[0]) for program in made]
    assert [texts[0].count("\ndef compute_"), texts[1].count("__global__")] == wanted


def test_global_pool_is_one_kernel() -> None:
    made = interpret.program("global_pool"), cuda_on_host.program("global_pool")
    assert [len(program.seeds()[0].plans[0].groups) for program in made] == [1, 1]
    assert made[0].emit(made[0].seeds()[0]).count("torch.empty(") == 1, "pieces have no tensors of their own"


def joined(sizes: list[int], shape: tuple[int, ...], dim: int) -> Node:
    """A node that chooses between tensors of these sizes along ``dim``."""
    whole = (*shape[:dim], sum(sizes), *shape[dim + 1 :])
    variables = tuple(Var(f"d{k}", n) for k, n in enumerate(whole))
    index = tuple(of(v) if v.size != 1 else constant(0) for v in variables)

    def piece(k: int) -> Expr:
        start = sum(sizes[:k])
        here = Load(f"piece{k}", (*index[:dim], index[dim] - start, *index[dim + 1 :]), "f32")
        if k == len(sizes) - 1:
            return here
        return Op("where", (in_range(index[dim], 0, start + sizes[k]), here, piece(k + 1)), "f32")

    return Node("cat", whole, "f32", variables, piece(0), "cat")


def elements(node: Node) -> Iterator[tuple[tuple[int, ...], Load]]:
    """Every index of a node, and what is read there."""
    for index in itertools.product(*(range(v.size) for v in node.vars)):
        values: dict[Var, Index] = {v: constant(i) for v, i in zip(node.vars, index)}
        load = Rewriter(values).expr(node.expr)
        assert isinstance(load, Load)
        yield index, load


@pytest.mark.parametrize("seed", range(20))
def test_slices_are_the_pieces(seed: int) -> None:
    chosen = random.Random(seed)
    sizes = [chosen.randint(1, 4) for _ in range(chosen.randint(2, 5))]
    shape, dim = tuple(chosen.randint(1, 3) for _ in range(3)), chosen.randrange(3)
    whole = joined(sizes, shape, dim)
    stride = contiguous_stride(whole.shape)
    wanted = {sum(i * s for i, s in zip(index, stride)): load for index, load in elements(whole)}
    parts = slices(whole, whole.expr)
    found: dict[int, Load] = {}
    for part in parts:
        assert not any(v.size != n for v, n in zip(part.node.vars, part.node.shape))
        for index, load in elements(part.node):
            place = part.start + sum(i * s for i, s in zip(index, stride))
            assert place not in found
            found[place] = load
    assert found == wanted
    assert [part.node.shape[dim] for part in parts] == sizes
    assert len({part.node.name for part in parts}) == len(sizes) <= MAX_SLICES
