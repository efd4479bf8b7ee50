"""Schedule -> kernel module text: the C++ kernels, and a ``forward`` that allocates and launches."""

from __future__ import annotations

import base64
import math
import re
import textwrap
import zlib
from typing import Any

import torch

from ke_gym.codegen.contract import Contraction
from ke_gym.codegen.cpp_words import HELPERS, TYPES
from ke_gym.codegen.emit_cpp import print_nest
from ke_gym.codegen.emit_cpp_products import print_contraction
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.fusion import cached_nest, nests, order_steps, visible_in
from ke_gym.codegen.graph import Buffer, Extern, Graph, View, contiguous_stride
from ke_gym.codegen.nest import Nest
from ke_gym.codegen.schedule import Plan, Schedule
from ke_gym.languages.artifact import span_bytes

_TORCH = {
    "f32": "torch.float32", "f64": "torch.float64", "bf16": "torch.bfloat16", "f16": "torch.float16",
    "bool": "torch.bool", "u8": "torch.uint8", "i8": "torch.int8", "i16": "torch.int16", "i32": "torch.int32",
    "i64": "torch.int64",
}  # fmt: skip


def emit(name: str, graphs: tuple[Graph, ...], schedule: Schedule) -> str:
    """The whole module as text."""
    used: set[str] = set()
    kernels: list[str] = []
    bodies = []
    for number, (graph, plan) in enumerate(zip(graphs, schedule.plans)):
        suffix = f"_{number}" if len(graphs) > 1 else ""
        sources, lines = _shape_set(graph, plan, schedule, suffix, used)
        kernels.extend(sources)
        bodies.append((graph, lines))
    imports, data = held(graphs)
    parts = [f'"""{name}, generated from its reference."""\n\n{imports}\n']
    if kernels:
        parts.append("\nfrom ke_gym import lang\n")
        text = _prelude(kernels, used) + "\n" + "\n\n".join(kernels)
        options = [f"flags={' '.join(schedule.flags)!r}"] if schedule.flags else []
        if schedule.compiler != "g++":
            options.append(f"compiler={schedule.compiler!r}")
        tail = "".join(f", {o}" for o in options)
        parts.append(f"\nkernels = lang.cpp(\n    r'''\n{text}\n'''{tail}\n)\n")
    parts += [f"\n{statement}\n" for statement in data]
    parts.append("\n\n" + _forward(bodies))
    return "".join(parts)


def _prelude(kernels: list[str], used: set[str]) -> str:
    body = "\n".join(kernels)
    lines = ["#include <algorithm>", "#include <cstdint>"]
    if "std::" in body or "remainder" in used:
        lines.append("#include <cmath>")
    if "std::vector" in body:
        lines.append("#include <vector>")
    if "omp_" in body:
        lines.append("#include <omp.h>")
    lines.append("#include <ke/math.h>")
    if "ke::bf16" in body or "ke::half" in body:
        lines.append("#include <ke/types.h>")
    lines.extend(f"#include <{header}>" for header in sorted(h for h in used if h.endswith(".h")))
    helpers = [HELPERS[h] for h in sorted(used) if h in HELPERS]
    return "\n".join(lines) + "\n" + ("\n" + "\n".join(helpers) if helpers else "")


def _shape_set(
    graph: Graph, plan: Plan, schedule: Schedule, suffix: str, used: set[str]
) -> tuple[list[str], list[str]]:
    nests(graph, plan)
    listed = [g.nodes for g in plan.groups]
    sources: list[str] = []
    lines: list[str] = []
    allocated = set(graph.inputs)
    batch: list[Nest | Contraction] = []

    def flush() -> None:
        if batch:
            sources.append(_kernel(batch, suffix, used))
            outside = _parameters(batch)
            for buffer in outside[1]:
                if buffer.name not in allocated:
                    lines.append(f"{buffer.name} = {_empty(graph, buffer)}")
                    allocated.add(buffer.name)
            arguments = ", ".join(b.name for b in (*outside[0], *outside[1]))
            lines.append(f"kernels.{_kernel_name(batch, suffix)}({arguments})")
            batch.clear()

    for unit in order_steps(graph, plan):
        if isinstance(unit, Extern):
            flush()
            lines.extend(_call(graph, unit))
            allocated.update(b.name for b in unit.outputs)
        else:
            visible = visible_in(graph, unit.nodes, listed)
            if not schedule.merged:
                flush()
            batch.append(cached_nest(graph, unit, visible))
    flush()
    lines.append(_return(graph))
    return sources, [*constants(graph, suffix)[1], *lines]


LITERAL = 64  # elements of a constant that are spelled out


def constants(graph: Graph, suffix: str, device: str = "") -> tuple[list[str], list[str]]:
    """Statements of the module, and of ``forward``, that make the tensors the model holds by itself.

    Small ones are literals; the bytes of larger ones are text of the module.
    """
    outside, inside = [], []
    for name, value in graph.constants.items():
        if value.numel() <= LITERAL:
            literal = re.sub(r"\b(inf|nan)\b", r'float("\1")', repr(value.tolist()))
            on = f", device={device}" if device else ""
            inside.append(f"{name} = torch.tensor({literal}, dtype={value.dtype}{on})")
            continue
        data = f"{name}{suffix}".upper()
        text = graph.memo.get(("packed", name))
        if text is None:
            text = base64.b64encode(zlib.compress(span_bytes(value))).decode()
            graph.memo["packed", name] = text
        outside.append(
            f"{data} = torch.frombuffer(  # {' x '.join(map(str, value.shape))} values\n"
            f'    bytearray(zlib.decompress(base64.b64decode("{text}"))), dtype={value.dtype}\n'
            f").view({_tuple(value.shape)})"
        )
        inside.append(f"{name} = {data}.to({device})" if device else f"{name} = {data}")
    return outside, inside


def held(graphs: tuple[Graph, ...], device: str = "") -> tuple[str, list[str]]:
    """The module's imports, and its statements that make large constants."""
    made = []
    for number, graph in enumerate(graphs):
        made += constants(graph, f"_{number}" if len(graphs) > 1 else "", device)[0]
    return ("import base64\nimport zlib\n\nimport torch" if made else "import torch"), made


# ---------------------------------------------------------------------------------------------- kernels


def _kernel_name(batch: list[Nest | Contraction], suffix: str) -> str:
    return f"compute_{batch[-1].name}{suffix}"


def _parameters(batch: list[Nest | Contraction]) -> tuple[list[Buffer], list[Buffer]]:
    writes = {b.name: b for n in batch for b in n.writes}
    reads = {b.name: b for n in batch for b in n.reads if b.name not in writes}
    return list(reads.values()), list(writes.values())


def _kernel(batch: list[Nest | Contraction], suffix: str, used: set[str]) -> str:
    reads, writes = _parameters(batch)
    parameters = [f"const {TYPES[b.dtype]}* __restrict {b.name}" for b in reads]
    parameters += [f"{TYPES[b.dtype]}* __restrict {b.name}" for b in writes]
    body = []
    for nest in batch:
        comment = _comment(nest)
        if isinstance(nest, Contraction):
            inner = print_contraction(nest, used)
        else:
            inner = print_nest(nest, used)
        if len(batch) > 1:
            body.append(f"  // {comment}\n  {{\n{textwrap.indent(inner, '  ')}\n  }}")
        else:
            body.append(inner)
    head = "" if len(batch) > 1 else f"// {_comment(batch[0])}\n"
    signature = f'extern "C" void {_kernel_name(batch, suffix)}({", ".join(parameters)}) {{'
    if len(signature) > 110:
        signature = f'extern "C" void {_kernel_name(batch, suffix)}(\n    {", ".join(parameters)}) {{'
    return head + signature + "\n" + "\n".join(body) + "\n}"


def computes(nest: Any) -> str:
    """What a nest or tiles make, and of which operations of the reference: for the comment above a kernel."""
    made = ", ".join(f"{b.name} [{' x '.join(map(str, b.shape)) or 'scalar'}]" for b in nest.writes)
    steps = " -> ".join(nest.origins[:6]) + (" -> ..." if len(nest.origins) > 6 else "")
    return f"{made}: {steps}"


def _comment(nest: Nest | Contraction) -> str:
    if isinstance(nest, Contraction):
        return computes(nest)
    loops = " x ".join(str(o.var.size) for o in nest.outer)
    passes = (
        f"; {loops} outer iterations of {len(nest.stages)} stages" if len(nest.stages) > 1 and loops else ""
    )
    online = "; statistics in one pass" if nest.group.one_pass else ""
    return f"{computes(nest)}{passes}{online}"


# ----------------------------------------------------------------------------------------------- forward


def _empty(graph: Graph, buffer: Buffer) -> str:
    shape = graph.shapes.get(buffer.name, buffer.shape)
    return f"torch.empty({_tuple(shape)}, dtype={_TORCH[buffer.dtype]})"


def _tuple(values: Any) -> str:
    values = tuple(values)
    return f"({values[0]},)" if len(values) == 1 else f"({', '.join(map(str, values))})"


def _view(graph: Graph, view: View) -> str:
    """A strided view in words: the tensor itself, its transpose, a reshape, or whatever it takes."""
    buffer = graph.buffers[view.buffer]
    shape = graph.shapes.get(view.buffer, buffer.shape) if view.buffer in graph.producer else buffer.shape
    stride = buffer.stride if shape == buffer.shape else contiguous_stride(shape)
    if not view.offset:
        live = [k for k, n in enumerate(shape) if n != 1]
        if view.shape == shape and all(view.stride[k] == stride[k] for k in live):
            return view.buffer
        if len(shape) == 2 and view.shape == shape[::-1] and view.stride == stride[::-1]:
            return f"{view.buffer}.t()"
        whole = buffer.numel == math.prod(view.shape)
        if whole and stride == contiguous_stride(shape) and view.stride == contiguous_stride(view.shape):
            return f"{view.buffer}.view({_tuple(view.shape)})"
        if len(shape) == len(view.shape):
            order = _permutation(shape, stride, view)
            if order:
                return f"{view.buffer}.permute({_tuple(order)})"
    return f"torch.as_strided({view.buffer}, {_tuple(view.shape)}, {_tuple(view.stride)}, {view.offset})"


def _permutation(shape: tuple[int, ...], stride: tuple[int, ...], view: View) -> list[int] | None:
    order: list[int] = []
    for n, s in zip(view.shape, view.stride):
        match = next(
            (k for k in range(len(shape)) if k not in order and (shape[k], stride[k]) == (n, s)), None
        )
        if match is None:
            return None
        order.append(match)
    return order


def _argument(graph: Graph, arg: Any) -> str:
    if isinstance(arg, View):
        return _view(graph, arg)
    if isinstance(arg, tuple):
        inner = ", ".join(_argument(graph, a) for a in arg)
        return f"[{inner}]"
    if isinstance(arg, float) and arg in (float("inf"), float("-inf")):
        return f'float("{arg}")'
    if isinstance(arg, torch.device):
        return f'torch.device("{arg}")'
    return str(arg) if isinstance(arg, (torch.dtype, torch.layout, torch.memory_format)) else repr(arg)


def _call(graph: Graph, step: Extern) -> list[str]:
    args = [_argument(graph, a) for a in step.args]
    args += [f"{k}={_argument(graph, v)}" for k, v in step.kwargs]
    names = ", ".join(b.name for b in step.outputs)
    names += "," if len(step.outputs) == 1 and _returns_tuple(step) else ""
    return [f"{names} = torch.ops.{step.target}({', '.join(args)})"]


def _returns_tuple(step: Extern) -> bool:
    namespace, name, overload = step.target.split(".")
    operation = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    return len(operation._schema.returns) > 1 or str(operation._schema.returns[0].type).startswith("List")


def _return(graph: Graph) -> str:
    values = []
    for name in graph.outputs:
        shape = graph.shapes.get(name)
        buffer = graph.buffers[name]
        made_by_call = name in graph.producer and isinstance(graph.steps[graph.producer[name]], Extern)
        values.append(f"{name}.view({_tuple(shape)})" if made_by_call and shape != buffer.shape else name)
    return f"return {', '.join(values)}"


def _forward(bodies: list[tuple[Graph, list[str]]], prepared: tuple[str, ...] = ()) -> str:
    arguments = [*bodies[0][0].arguments, *prepared]
    if any(graph.arguments != bodies[0][0].arguments for graph, _ in bodies):
        raise Illegal("the shape sets take different arguments")
    bodies = [
        (graph, [*(f"{inner} = {name}" for name, inner in graph.renamed.items()), *lines])
        for graph, lines in bodies
    ]
    if len(bodies) == 1:
        return (
            f"def forward({', '.join(arguments)}):\n{textwrap.indent(chr(10).join(bodies[0][1]), '    ')}\n"
        )
    text = [f"def forward({', '.join(arguments)}):"]
    functions = []
    for number, (graph, lines) in enumerate(bodies):
        body = textwrap.indent("\n".join(lines), "    ")
        functions.append(f"def forward_{number}({', '.join(arguments)}):\n{body}\n")
        given = ((a, graph.inputs.get(graph.renamed.get(a, a))) for a in arguments)
        tests = [f"{a}.shape == {_tuple(buffer.shape)}" for a, buffer in given if buffer is not None]
        condition = " and ".join(tests)
        text.append(f"    if {condition}:\n        return forward_{number}({', '.join(arguments)})")
    text.append('    raise ValueError("no kernel was generated for these shapes")')
    return "\n\n".join(functions) + "\n\n" + "\n".join(text) + "\n"
