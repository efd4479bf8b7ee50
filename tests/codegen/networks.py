"""Random small networks, and whether what is generated for them computes what they do, forward and backward.

``python -m tests.codegen.networks LANGUAGE FIRST COUNT`` looks at networks FIRST, FIRST + 1, …: the first draft of each,
and one that random rewrites made of it; in C++ as it runs on this machine, in CUDA C++ as ``cuda_on_host`` runs it, in Triton
as its interpreter does. It prints a JSON object: the number of each network -> what is wrong, "" if nothing is.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

if TYPE_CHECKING:
    from ke_gym.codegen import Program
    from ke_gym.codegen.schedule import Schedule
    from ke_gym.tasks import Task

Run = Callable[[list[torch.Tensor], dict[str, torch.Tensor]], Sequence[torch.Tensor]]
"""What computes outputs of inputs and state."""
DISTRIBUTIONS = ("task", "ties")
ACTIVATIONS = (
    "F.relu", "F.gelu", "F.silu", "F.elu", "torch.tanh", "torch.sigmoid", "F.softplus", "F.hardswish", "torch.sin",
)  # fmt: skip
# A layer as lines of forward; what stands in <> is a module or parameter of its own. {act}: an activation, {res}: perhaps
# a residual, {bias}: perhaps one. B, T, C: batch, positions, channels; H, W: height and width.
HEADS = "q, k, v = (part.reshape({B}, {T}, 2, {C} // 2).transpose(1, 2) for part in <nn.Linear({C}, 3 * {C})>({of}).chunk(3, -1))"
MERGED = "x = {res}<nn.Linear({C}, {C}, bias={bias})>(y.transpose(1, 2).reshape({B}, {T}, {C}))"
TOKENS = (
    (HEADS, "y = F.scaled_dot_product_attention(q, k, v, is_causal={bias})", MERGED),
    (HEADS, "y = torch.softmax(q @ k.transpose(-1, -2) * 0.3, -1) @ v", MERGED),
    (HEADS, "hidden = torch.ones({T}, {T}, dtype=torch.bool, device=x.device).triu(1)",
     "y = (q @ k.transpose(-1, -2) * 0.3).masked_fill(hidden, float('-inf')).softmax(-1) @ v", MERGED),
    ("x = {res}<nn.Linear(2 * {C}, {C}, bias={bias})>({act}(<nn.Linear({C}, 2 * {C}, bias={bias})>(x)))",),
    ("x = <nn.LayerNorm({C})>(x)",),
    ("x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * <nn.Parameter(torch.rand({C}) + 0.5)>",),
    ("a, b = <nn.Linear({C}, 2 * {C})>(x).chunk(2, -1)", "x = a * torch.sigmoid(b)"),
    ("x = {res}<nn.Linear({T}, {T})>(x.transpose(1, 2)).transpose(1, 2)",),
    ("x = <nn.BatchNorm1d({C})>(x.transpose(1, 2)).transpose(1, 2)",),
    ("x = x + <nn.Conv1d({C}, {C}, 3, padding=1)>(x.transpose(1, 2)).transpose(1, 2)",),
    ("x = {act}(x)",),
    ("x = torch.softmax(x, 1)",), ("x = torch.softmax(x, -1)",),
    ("x = x - x.mean(1, keepdim=True)",), ("x = x - x.mean((0, 1), keepdim=True)",),
    ("x = x * <nn.Parameter(torch.rand({T}, 1))> + x.amax(-1, keepdim=True)",),
    ("x = torch.cumsum(x, 1) * 0.1",), ("x = torch.cumsum(x, -1) * 0.1",),
    ("x = x + torch.roll(x, 1, 2)",), ("x = x.flip(1) + x",), ("x = x.flip(2) + x",),
    ("x = torch.cat([x[:, :4] * 2, x[:, 4:]], 1)",),
    ("x = x.reshape({B}, {T}, {C} // 4, 4).sum(-1).repeat_interleave(4, -1) + x",),
)  # fmt: skip
IMAGES = (
    ("x = {res}{act}(<nn.Conv2d({C}, {C}, 3, padding=1, bias={bias})>(x))",),
    ("x = {res}{act}(<nn.BatchNorm2d({C})>(<nn.Conv2d({C}, {C}, 3, padding=1, bias={bias})>(x)))",),
    ("x = <nn.BatchNorm2d({C})>(<nn.Conv2d({C}, {C}, 1, bias={bias})>(x))",),
    ("x = {res}<nn.Conv2d({C}, {C}, 3, padding=1, groups={C})>(x)",),
    ("x = <nn.BatchNorm2d({C})>(x)",), ("x = <nn.GroupNorm(2, {C})>(x)",), ("x = <nn.InstanceNorm2d({C}, affine=True)>(x)",),
    ("x = F.max_pool2d(x, 3, stride=1, padding=1)",), ("x = F.avg_pool2d(x, 3, stride=1, padding=1)",),
    ("x = x * torch.sigmoid(<nn.Linear({C}, {C})>(x.mean((2, 3))))[:, :, None, None]",),
    ("x = <nn.LayerNorm({C})>(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)",),
    ("x = x.reshape({B}, 2, {C} // 2, {H}, {W}).transpose(1, 2).reshape({B}, {C}, {H}, {W})",),
    ("x = F.avg_pool2d(F.interpolate(x, scale_factor=2, mode='bilinear'), 2)",),
    ("x = F.pad(x, (1, 0, 0, 1))[:, :, 1:, :-1]",),
    ("x = {act}(x)",), ("x = torch.softmax(x, 1)",),
    ("x = x - x.mean((2, 3), keepdim=True) + x.amax(1, keepdim=True)",),
)  # fmt: skip
VECTORS = (
    ("x = {res}{act}(<nn.Linear({C}, {C}, bias={bias})>(x))",),
    ("x = {act}(<nn.BatchNorm1d({C})>(<nn.Linear({C}, {C}, bias={bias})>(x)))",),
    ("x = <nn.LayerNorm({C})>(x)",), ("x = {act}(x)",), ("x = F.normalize(x, dim=1)",),
    ("x = (x[:, :, None] * x[:, None, :]).mean(1) + x",), ("x = torch.softmax(x, 0) * x",),
    ("x = x.tanh() * <nn.Linear({C}, {C})>(x) + x",), ("x = F.glu(<nn.Linear({C}, 2 * {C})>(x), -1)",),
    ("x = torch.einsum('be,bc,ecd->bd', <nn.Linear({C}, 4)>(x).softmax(-1), x, <nn.Parameter(torch.randn(4, {C}, {C}) * 0.1)>)",),
    ("x = 0.05 * x * (x.sum(1, keepdim=True).square() - x.square().sum(1, keepdim=True))",),
)  # fmt: skip
KINDS: tuple[tuple[str, Sequence[Sequence[str]], tuple[tuple[int, ...], ...]], ...] = (
    ("BTC", TOKENS, ((2, 16, 32), (3, 8, 48), (1, 24, 16), (2, 7, 20))),
    ("BCHW", IMAGES, ((2, 8, 8, 8), (3, 4, 12, 10), (4, 6, 7, 10))),
    ("BC", VECTORS, ((33, 16), (64, 24))),
)
ENDS = (
    "x", "x", "x", "(x, x.mean(-1))", "x.mean(1)", "x.flatten(1).sum(-1)", "F.log_softmax(x, -1)", "x.square().mean()",
    "x.amax(-1)",
)  # fmt: skip
TASK = """\
import torch
import torch.nn as nn
import torch.nn.functional as F

backward = {backward}


class Model(nn.Module):
    def __init__(self):
{modules}

    def forward(self, x):
{lines}
        return {end}


def get_inputs():
    return [torch.randn({shape})]
"""


def network(seed: int) -> str:
    """A task file's text."""
    rng = random.Random(seed)
    axes, layers, shapes = rng.choice(KINDS)
    shape = rng.choice(shapes)
    modules, lines = ["super().__init__()"], []

    def filled(text: str) -> str:
        sizes = dict(zip(axes, shape))
        while (name := re.search(r"{(act|res|bias|of)}", text)) is not None:
            words = {
                "act": ACTIVATIONS,
                "res": ("", "x + "),
                "bias": ("True", "False"),
                "of": ("x", "<nn.LayerNorm({C})>(x)"),
            }
            text = text[: name.start()] + rng.choice(words[name[1]]) + text[name.end() :]
        text = text.format(**sizes)
        while (module := re.search(r"<([^<>]+)>", text)) is not None:
            modules.append(f"self.m{len(modules)} = {module[1]}")
            text = f"{text[: module.start()]}self.m{len(modules) - 1}{text[module.end() :]}"
        return text

    for _ in range(rng.randrange(2, 6)):
        lines += [filled(line) for line in rng.choice(layers)]
    return TASK.format(
        backward=rng.random() < 0.65, end=rng.choice(ENDS), shape=", ".join(map(str, shape)),
        modules="\n".join(f"        {each}" for each in modules), lines="\n".join(f"        {each}" for each in lines),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- checks


def drafts(program: Program, rng: random.Random) -> dict[str, Schedule]:
    """The first draft, and what three random rewrites make of it."""
    from ke_gym.codegen import rewrites

    first = schedule = program.seeds()[0]
    names = []
    for _ in range(3):
        strategy, draw = rng.choice(list(rewrites.STRATEGIES)), rng.randrange(4)
        changed = rewrites.apply(program, schedule, strategy, draw)
        if changed is not None and changed != schedule:
            schedule = changed
            names.append(f"{strategy}/{draw}")
    return {"draft": first, " ".join(names): schedule} if names else {"draft": first}


def wrong(task: Task, run: Run) -> str:
    """Why the judge would refuse what ``run`` computes of inputs and state; "" if it would not."""
    from ke_gym.evaluation import work
    from ke_gym.evaluation.acceptance import DRAWINGS, Expected, compare

    shape = task.contract("cpu")
    reference = task.reference(shape)
    length = work.count(reference, task.inputs(shape, 0)).reduction_length

    def drawn(seed: int, distribution: str) -> tuple[list[torch.Tensor], list[Expected]]:
        inputs = task.inputs(shape, seed, distribution)
        computed = [each.clone() for each in run(inputs, reference.state)]
        expected = zip(reference(*inputs), reference.double()(*inputs), strict=True)
        return computed, [Expected(a, b, task.precision, task.tolerance, length) for a, b in expected]

    reference.randomize(5)
    for distribution in DISTRIBUTIONS:
        verdict, pool = compare(*drawn(0, distribution))
        if pool is not None:
            for seed in range(1, DRAWINGS):
                pool.add(*drawn(seed, distribution))
            verdict = pool.verdict()
        if not verdict.ok:
            return f"{distribution}: {verdict.reason}; {verdict.pattern}"
    return ""


def program_of(task: Task, language: str) -> Program:
    """The task's program in a language, at its sizes for a CPU."""
    from ke_gym.codegen import Program
    from ke_gym.codegen.capture import capture
    from ke_gym.codegen.lower import lower
    from ke_gym.codegen.split_reductions import for_gpu

    if language == "cpp":
        return Program.from_task(task)
    graph = for_gpu(lower(capture(task, task.contract("cpu")), task.precision))
    return Program(task.name, (replace(graph, language=language),))


def compiled(task: Task, source: str) -> Run:
    """A module in C++, as it runs on this machine."""
    from ke_gym.languages.base import Signature, build
    from ke_gym.targets.executor import PlanRunner

    artifact = build(source, Signature.of(task))
    return lambda inputs, state: PlanRunner(artifact, task.contract("cpu"), inputs, state).run()


def emulated(source: str, folder: Path) -> Run:
    """A module for a GPU, as a CPU runs its kernels."""
    from ke_gym import lang
    from tests.codegen.cuda_on_host import HostKernels, HostTiles
    from tests.codegen.interpret import imported

    with patch.object(lang, "cuda", lambda text: HostKernels(text, folder)):
        module = imported(source, folder)

    def run(inputs: list[torch.Tensor], state: dict[str, torch.Tensor]) -> Sequence[torch.Tensor]:
        given = {key.replace(".", "_"): value.detach() for key, value in state.items()}
        with patch.object(lang, "tensor_map", HostTiles.of):
            if hasattr(module, "prepare"):
                given |= module.prepare(**{key: given[key] for key in signature(module.prepare).parameters})
            names = list(signature(module.forward).parameters)[len(inputs) :]
            got: Any = module.forward(*inputs, **{key: given[key] for key in names})
        return [got] if isinstance(got, torch.Tensor) else list(got)

    return run


def look(seed: int, language: str, folder: Path) -> str:
    """What is wrong with what is generated for a network; "" if nothing is."""
    from ke_gym.tasks import Task

    path = folder / f"network_{seed}.py"
    path.write_text(network(seed))
    task = Task.from_file(path)
    program = program_of(task, language)
    for number, (name, schedule) in enumerate(drafts(program, random.Random(seed)).items()):
        source = program.emit(schedule)
        if "libdevice." in source:  # which Triton's interpreter does not know
            continue
        here = folder / str(number)
        here.mkdir()
        if found := wrong(task, compiled(task, source) if language == "cpp" else emulated(source, here)):
            return f"[{name}] {found}"
    return ""


def main(language: str, first: int, count: int) -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # asked when Triton is imported
    torch.set_num_threads(1)
    found = {}
    for seed in range(first, first + count):
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[seed] = look(seed, language, Path(folder))
            except Exception as error:
                found[seed] = f"{type(error).__name__}: {error}"
        if found[seed]:
            print(f"{seed}: {found[seed]}", file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
