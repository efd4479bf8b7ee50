"""Schedule -> CUDA C++ kernel module text: one source with the kernels, and a ``forward`` that launches them.

Matrix products and attention stay calls of the library, and so do convolutions that are none of ``windows``.
"""

from __future__ import annotations

import textwrap
from functools import partial
from typing import Any

from ke_gym.codegen import cuda_tensor_cores as cores
from ke_gym.codegen import emit_cuda_pairs, emit_cuda_windows, module
from ke_gym.codegen.cuda_layout import layout
from ke_gym.codegen.cuda_text import TYPES, helpers
from ke_gym.codegen.emit_cuda import print_tiles
from ke_gym.codegen.emit_cuda_lines import pointers
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.graph import Graph
from ke_gym.codegen.module_gpu import Printed, functions
from ke_gym.codegen.pairs import Pairs
from ke_gym.codegen.schedule import Schedule
from ke_gym.codegen.tiles import Tiles
from ke_gym.codegen.windows import Windowed

_HEADERS = {"__half": "cuda_fp16.h", "__nv_bfloat16": "cuda_bf16.h"}


def emit(name: str, graphs: tuple[Graph, ...], schedule: Schedule) -> str:
    """The whole module as text."""
    used: set[str] = set()
    kernels, called = functions(graphs, schedule, partial(_printed, used=used))
    imports, data = module.held(graphs)
    parts = [f'"""{name}, generated from its reference."""\n\n{imports}']
    if kernels:
        parts[0] += "\n\nfrom ke_gym import lang"
        parts.append(library(kernels, used))
    parts += data
    return "\n\n".join(parts) + "\n\n\n" + called + "\n"


def library(kernels: list[str], used: set[str]) -> str:
    """The statement that makes the kernels, with the helpers that they have ``used``."""
    includes = [f"#include <{h}>" for kind, h in _HEADERS.items() if any(kind in k for k in kernels)]
    head = "\n".join(includes) + "\n" if includes else ""
    source = "\n".join([head, *helpers(used), *cores.helpers(used), "\n\n".join(kernels)])
    return f"kernels = lang.cuda(\n    r'''\n{source.strip()}\n'''\n)"


def _printed(nest: Any, suffix: str, ready: frozenset[str], used: set[str]) -> Printed:
    text, launch = kernel(nest, suffix, used)
    return Printed(text, [launch])


def kernel(nest: Any, suffix: str, used: set[str]) -> tuple[str, str]:
    """The kernel's text, and the line that launches it."""
    if isinstance(nest, Windowed):
        return _windowed(nest, suffix, used)
    if isinstance(nest, Pairs):
        return _pairs(nest, suffix, used)
    if not isinstance(nest, Tiles):
        raise Illegal("in CUDA C++, products are the library's")
    name, shape, names = f"compute_{nest.name}{suffix}", layout(nest), pointers(nest)
    written = {b.name for b in nest.writes}
    reads = {b.name: b for b in nest.reads if b.name not in written}
    parameters = [f"const {TYPES[b.dtype]}* __restrict__ {names[b.name]}" for b in reads.values()]
    parameters += [f"{TYPES[b.dtype]}* __restrict__ {names[b.name]}" for b in nest.writes]
    signature = _signature(name, str(shape.threads), parameters)
    body = textwrap.indent("\n".join(print_tiles(nest, used)), "  ")
    arguments = ", ".join([*reads, *(b.name for b in nest.writes)])
    block = module._tuple(shape.block) if len(shape.block) > 1 else str(shape.block[0])
    launch = f"kernels.{name}[{shape.grid(nest)}, {block}]({arguments})"
    return f"// {module.computes(nest)}\n{signature}\n{body}\n}}", launch


def _signature(name: str, bounds: str, parameters: list[str]) -> str:
    head = f'extern "C" __global__ void __launch_bounds__({bounds}) {name}('
    signature = f"{head}{', '.join(parameters)}) {{"
    return signature if len(signature) <= 110 else head + "\n    " + ",\n    ".join(parameters) + ") {"


def _windowed(work: Windowed, suffix: str, used: set[str]) -> tuple[str, str]:
    printer, name = emit_cuda_windows.Printer(work, used), f"compute_{work.name}{suffix}"
    used |= printer.helpers()
    kinds = {b.name: b.dtype for b in (*work.reads, *work.writes)}
    written = {b.name for b in work.writes}
    parameters, arguments = [], []
    for tiles, tensor, shape, box in printer.maps:
        writes = ", writes=True" if tiles == "output_tiles" else ""
        parameters.append(f"const __grid_constant__ CUtensorMap {tiles}")
        view = f"{tensor}.view({module._tuple(shape)})"
        arguments.append(f"lang.tensor_map({view}, {module._tuple(box)}{writes})")
    for buffer in printer.pointers:
        constant = "" if buffer in written else "const "
        parameters.append(f"{constant}{TYPES[kinds[buffer]]}* __restrict__ {printer.names[buffer]}")
        arguments.append(buffer)
    along, across = min(work.blocks.persistent, work.tiles[1] * work.shape.batch), work.tiles[0]
    grid = f"({along}, {across})" if across > 1 else str(along)
    body = textwrap.indent("\n".join(printer.body()), "  ")
    given = ",\n    ".join(arguments)
    launch = f"kernels.{name}[{grid}, {work.threads}, {work.shared}](\n    {given},\n)"
    return (
        f"// {module.computes(work)}\n{_signature(name, f'{work.threads}, 1', parameters)}\n{body}\n}}",
        launch,
    )


def _pairs(work: Pairs, suffix: str, used: set[str]) -> tuple[str, str]:
    printer, name = emit_cuda_pairs.Printer(work, used), f"compute_{work.name}{suffix}"
    names, results = printer.names, {b.name for b in work.writes}
    kinds = {b.name: b.dtype for b in (*work.reads, *work.writes)}
    parameters = [
        f"{'' if buffer in results else 'const '}{TYPES[kinds[buffer]]}* __restrict__ {names[buffer]}"
        for buffer in kinds
    ]
    blocks = min(work.blocks.persistent, -(-work.shape.batch // work.blocks.warps))
    body = textwrap.indent("\n".join(printer.body()), "  ")
    launch = f"kernels.{name}[{blocks}, {printer.threads}]({', '.join(kinds)})"
    return (
        f"// {module.computes(work)}\n{_signature(name, str(printer.threads), parameters)}\n{body}\n}}",
        launch,
    )
