"""Schedule -> CUDA C++ kernel module text: one source with the kernels, and a ``forward`` that launches them.

Calls of the library stay products that are none of ``matmuls`` or ``pairs``, convolutions that are none of ``matmuls`` or
``windows``, attention that is none of ``attentions``, and bags that are none of ``bags``.
"""

from __future__ import annotations

import textwrap
from functools import partial
from typing import Any

from ke_gym.codegen import cuda_tensor_cores as cores
from ke_gym.codegen import (
    emit_cuda_bags,
    emit_cuda_flash,
    emit_cuda_matmuls,
    emit_cuda_pairs,
    emit_cuda_pairs_bulk,
    emit_cuda_parts,
    emit_cuda_searches,
    emit_cuda_windows,
    module,
)
from ke_gym.codegen.attentions import Attention
from ke_gym.codegen.bags import Bag
from ke_gym.codegen.cuda_layout import layout
from ke_gym.codegen.cuda_text import TYPES, helpers
from ke_gym.codegen.emit_cuda import print_tiles
from ke_gym.codegen.emit_cuda_lines import pointers
from ke_gym.codegen.emit_cuda_products import Travelling
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.graph import Graph
from ke_gym.codegen.matmuls import Matmul
from ke_gym.codegen.module_gpu import Printed, functions
from ke_gym.codegen.pairs import Pairs
from ke_gym.codegen.schedule import Schedule
from ke_gym.codegen.searches import Searched
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
    return kernel(nest, suffix, used)


def kernel(nest: Any, suffix: str, used: set[str]) -> Printed:
    """The nest's kernels, and the lines that launch them."""
    if isinstance(nest, Windowed):
        return _windowed(nest, suffix, used)
    if isinstance(nest, Matmul):
        return _matmul(nest, suffix, used)
    if isinstance(nest, Pairs):
        return _pairs(nest, suffix, used)
    if isinstance(nest, Attention):
        return _attention(nest, suffix, used)
    if isinstance(nest, Bag):
        bags = emit_cuda_bags.Printer(nest, used)
        return _shared(bags, f"compute_{nest.name}{suffix}", _grid(*bags.grid), [], bags.pointers)
    if isinstance(nest, Searched):
        searches = emit_cuda_searches.Printer(nest, used)
        grid = _grid(nest.along, nest.across)
        return _shared(searches, f"compute_{nest.name}{suffix}", grid, [], searches.pointers)
    if not isinstance(nest, Tiles):
        raise Illegal("no kernel in CUDA C++")
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
    return Printed(f"// {module.computes(nest)}\n{signature}\n{body}\n}}", [launch])


def _grid(along: int, across: int) -> str:
    return f"({along}, {across})" if across > 1 else str(along)


def _signature(name: str, bounds: str, parameters: list[str]) -> str:
    head = f'extern "C" __global__ void __launch_bounds__({bounds}) {name}('
    signature = f"{head}{', '.join(parameters)}) {{"
    return signature if len(signature) <= 110 else head + "\n    " + ",\n    ".join(parameters) + ") {"


def _windowed(work: Windowed, suffix: str, used: set[str]) -> Printed:
    printer = emit_cuda_windows.Printer(work, used)
    used |= printer.helpers()
    along, across = min(work.blocks.persistent, work.tiles[1] * work.shape.batch), work.tiles[0]
    grid = _grid(along, across)
    return _shared(printer, f"compute_{work.name}{suffix}", grid, printer.maps, printer.pointers)


def _shared(printer: Any, name: str, grid: object, maps: list[Travelling], listed: list[str]) -> Printed:
    """A kernel whose blocks work together; ``maps`` are the tensors that travel as tiles, ``listed`` those that it reads or
    writes element by element."""
    work = printer.work
    kinds, written = {b.name: b.dtype for b in (*work.reads, *work.writes)}, {b.name for b in work.writes}
    parameters = [f"const __grid_constant__ CUtensorMap {tiles.name}" for tiles in maps]
    arguments = [tiles.text for tiles in maps]
    for buffer in listed:
        constant = "" if buffer in written else "const "
        parameters.append(f"{constant}{TYPES[kinds[buffer]]}* __restrict__ {printer.names[buffer]}")
        arguments.append(buffer)
    body = textwrap.indent("\n".join(printer.body()), "  ")
    given = ",\n    ".join(arguments)
    shared = getattr(work, "shared", 0)
    sizes = f"{grid}, {work.threads}, {shared}" if shared else f"{grid}, {work.threads}"
    launch = f"kernels.{name}[{sizes}](\n    {given},\n)"
    resident = getattr(work, "resident", 1 if shared else 0)
    signature = _signature(name, f"{work.threads}, {resident}" if resident else str(work.threads), parameters)
    return Printed(f"// {module.computes(work)}\n{signature}\n{body}\n}}", [launch])


def _matmul(work: Matmul, suffix: str, used: set[str]) -> Printed:
    name, blocks = f"compute_{work.name}", work.blocks
    grid = min(work.count, blocks.persistent or work.count)
    if blocks.split == 1:
        printer = emit_cuda_matmuls.Printer(work, used)
        used |= printer.helpers()
        return _shared(printer, name + suffix, grid, printer.maps, printer.pointers)
    part = emit_cuda_parts.partial(work)
    first = emit_cuda_matmuls.Printer(part, used)
    used |= first.helpers()
    made = _shared(first, f"{name}_parts{suffix}", grid, first.maps, first.pointers)
    (parts,), total = part.writes, emit_cuda_parts.Total(work, used)
    kinds, results = {b.name: b.dtype for b in (*work.reads, *work.writes)}, {b.name for b in work.writes}
    parameters = [f"const float* __restrict__ {parts.name}"]
    parameters += [
        f"{'' if buffer in results else 'const '}{TYPES[kinds[buffer]]}* __restrict__ {total.names[buffer]}"
        for buffer in total.pointers
    ]
    body = textwrap.indent("\n".join(total.body()), "  ")
    signature = _signature(name + suffix, str(emit_cuda_parts.SUMMING), parameters)
    text = f"// {module.computes(work)}\n{signature}\n{body}\n}}"
    room = (
        f"{parts.name} = torch.empty({parts.shape}, dtype=torch.float32, device={work.writes[0].name}.device)"
    )
    arguments = ", ".join([parts.name, *total.pointers])
    launch = f"kernels.{name}{suffix}[{total.blocks}, {emit_cuda_parts.SUMMING}]({arguments})"
    return Printed(f"{made.text}\n\n{text}", [room, *made.lines, launch])


def _pairs(work: Pairs, suffix: str, used: set[str]) -> Printed:
    printer = (emit_cuda_pairs_bulk if work.bulk else emit_cuda_pairs).Printer(work, used)
    blocks = min(work.blocks.persistent, -(-work.shape.batch // work.blocks.warps))
    return _shared(printer, f"compute_{work.name}{suffix}", blocks, printer.maps, printer.pointers)


def _attention(work: Attention, suffix: str, used: set[str]) -> Printed:
    """The kernel, and where keys are skipped the one before it that looks for NaN among their values."""
    printer, shape = emit_cuda_flash.Printer(work, suffix, used), work.shape
    grid = (-(-shape.queries // work.blocks.m), shape.batch)
    made = _shared(printer, f"compute_{work.name}{suffix}", grid, printer.maps, printer.pointers)
    text, lines = f"{printer.weigh()}\n\n{made.text}", made.lines
    if work.visible is not None:
        value, flags, threads = work.tiles[2].buffer, work.flags, emit_cuda_flash.THREADS
        given = [f"const {TYPES[shape.dtype]}* __restrict__ {printer.names[value]}"]
        given.append(f"int* __restrict__ {printer.names[flags.name]}")
        signature = _signature(f"compute_{flags.name}{suffix}", str(threads), given)
        body = textwrap.indent("\n".join(printer.unseen()), "  ")
        text = f"// Which values are not finite: {value}\n{signature}\n{body}\n}}\n\n{text}"
        room = f"{flags.name} = torch.empty({flags.shape}, dtype=torch.int32, device={work.name}.device)"
        where = f"({work.count}, {shape.batch}), {threads}"
        lines = [room, f"kernels.compute_{flags.name}{suffix}[{where}]({value}, {flags.name})", *lines]
    return Printed(text, lines)
