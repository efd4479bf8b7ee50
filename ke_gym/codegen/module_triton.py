"""Schedule -> Triton kernel module text: the kernels, and a ``forward`` that allocates and launches."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from ke_gym.codegen import module
from ke_gym.codegen.emit_triton import pointers, print_tiles
from ke_gym.codegen.emit_triton_products import print_flash, print_product
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.flash import Flash
from ke_gym.codegen.fusion import cached_nest, nests, order_steps, visible_in
from ke_gym.codegen.graph import Buffer, Extern, Graph
from ke_gym.codegen.products import Product
from ke_gym.codegen.schedule import Plan, Schedule
from ke_gym.codegen.tiles import Tiles
from ke_gym.codegen.triton_text import HELPERS

_ON_CPU = {
    "aten._scaled_dot_product_flash_attention_for_cpu.default": "aten.scaled_dot_product_attention.default"
}


def emit(name: str, graphs: tuple[Graph, ...], schedule: Schedule) -> str:
    """The whole module as text."""
    used: set[str] = set()
    kernels: list[str] = []
    bodies = []
    for number, (graph, plan) in enumerate(zip(graphs, schedule.plans)):
        suffix = f"_{number}" if len(graphs) > 1 else ""
        sources, lines = _shape_set(graph, plan, suffix, used)
        kernels.extend(sources)
        bodies.append((graph, lines))
    needed, data = module.held(graphs)
    imports = [needed]
    if kernels:
        imports += ["import triton", "import triton.language as tl"]
        if "libdevice" in used:
            imports.append("from triton.language.extra import libdevice")
    helpers = [HELPERS[h] for h in sorted(used) if h in HELPERS]
    parts = [f'"""{name}, generated from its reference."""\n\n' + "\n".join(imports)]
    parts += data
    parts += [helper.rstrip() for helper in helpers]
    parts += kernels
    parts.append(module._forward(bodies).rstrip())
    return "\n\n\n".join(parts) + "\n"


def _shape_set(graph: Graph, plan: Plan, suffix: str, used: set[str]) -> tuple[list[str], list[str]]:
    nests(graph, plan)
    listed = [g.nodes for g in plan.groups]
    sources: list[str] = []
    lines: list[str] = []
    allocated = set(graph.inputs)
    device = _device(graph)
    for unit in order_steps(graph, plan):
        if isinstance(unit, Extern):
            lines.extend(_call(graph, unit, device))
            allocated.update(b.name for b in unit.outputs)
            continue
        nest: Any = cached_nest(graph, unit, visible_in(graph, unit.nodes, listed))
        if isinstance(nest, Tiles):
            source, launch = _tiles(nest, suffix, used)
        elif isinstance(nest, Product):
            source, launch = _product(nest, suffix, used)
        elif isinstance(nest, Flash):
            source, launch = _flash(nest, suffix, used)
        else:
            raise Illegal("no kernel of a GPU")
        sources.append(source)
        for buffer in nest.writes:
            if buffer.name not in allocated:
                lines.append(f"{buffer.name} = {_empty(graph, buffer, device)}")
                allocated.add(buffer.name)
        lines.append(launch)
    lines.append(module._return(graph))
    return sources, [*module.constants(graph, suffix, device)[1], *lines]


def _device(graph: Graph) -> str:
    """The device of the first tensor that the module is given, as text."""
    given = next((a for a in graph.arguments if a in graph.inputs and a not in graph.constants), None)
    return f"{given}.device" if given is not None else '"cuda"'


def _empty(graph: Graph, buffer: Buffer, device: str) -> str:
    return module._empty(graph, buffer).removesuffix(")") + f", device={device})"


def _call(graph: Graph, step: Extern, device: str) -> list[str]:
    target = _ON_CPU.get(step.target, step.target)
    if target != step.target:
        raise Illegal(f"{step.target} is for the CPU")
    (line,) = module._call(graph, step)
    return [line.replace('torch.device("cpu")', device)]


def _tiles(tiles: Tiles, suffix: str, used: set[str]) -> tuple[str, str]:
    """The kernel's text, and the line that launches it."""
    blocks = tiles.blocks
    body = print_tiles(tiles, used)
    sizes = {"ROWS": blocks.rows} if blocks.rows > 1 else {}
    if any("BLOCK" in line for line in body):
        sizes["BLOCK"] = blocks.columns
    options = {"num_warps": blocks.warps}
    if tiles.passes:
        options["num_stages"] = blocks.stages
    return _kernel(tiles, suffix, body, (math.ceil(tiles.rows / blocks.rows),), sizes, options)


def _product(product: Product, suffix: str, used: set[str]) -> tuple[str, str]:
    shape, blocks = product.shape, product.blocks
    tiles = math.ceil(shape.m / blocks.m) * math.ceil(shape.n / blocks.n)
    grid = (tiles, shape.batch) if shape.batch > 1 else (tiles,)
    sizes = {"M": blocks.m, "N": blocks.n, "K": blocks.k}
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return _kernel(product, suffix, print_product(product, used), grid, sizes, options)


def _flash(flash: Flash, suffix: str, used: set[str]) -> tuple[str, str]:
    shape, blocks = flash.shape, flash.blocks
    grid = (math.ceil(shape.queries / blocks.m), shape.batch)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return _kernel(flash, suffix, print_flash(flash, used), grid, {"M": blocks.m, "N": blocks.n}, options)


def _kernel(
    work: Tiles | Product | Flash,
    suffix: str,
    body: list[str],
    grid: tuple[int, ...],
    sizes: dict[str, int],
    options: dict[str, int],
) -> tuple[str, str]:
    name = f"compute_{work.name}{suffix}"
    outside = list(dict.fromkeys(b.name for b in (*work.reads, *work.writes)))
    names = pointers(work)
    parameters = ", ".join([*(names[name] for name in outside), *(f"{size}: tl.constexpr" for size in sizes)])
    given = ", ".join([*outside, *(f"{k}={v}" for k, v in (sizes | options).items())])
    head = f"def {name}({parameters}):"
    if len(head) > 110:
        head = f"def {name}(\n    {parameters}\n):"
    made = ", ".join(f"{b.name} [{' x '.join(map(str, b.shape)) or 'scalar'}]" for b in work.writes)
    origins = " -> ".join(work.origins[:6]) + (" -> ..." if len(work.origins) > 6 else "")
    text = "\n".join([f"# {made}: {origins}", "@triton.jit", head, textwrap.indent("\n".join(body), "    ")])
    launch = f"{name}[{module._tuple(grid)}]({given})"
    if len(launch) > 106:
        launch = f"{name}[{module._tuple(grid)}](\n    {given}\n)"
    return text, launch
