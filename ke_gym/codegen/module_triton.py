"""Schedule -> Triton kernel module text: the kernels, and a ``forward`` that allocates and launches."""

from __future__ import annotations

import math
import textwrap
from functools import partial
from typing import Any

from ke_gym.codegen import module
from ke_gym.codegen.emit_triton import pointers, print_tiles
from ke_gym.codegen.emit_triton_products import print_flash, print_product
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.flash import Flash
from ke_gym.codegen.graph import Graph
from ke_gym.codegen.module_gpu import shape_set
from ke_gym.codegen.products import Product
from ke_gym.codegen.schedule import Schedule
from ke_gym.codegen.tiles import Tiles
from ke_gym.codegen.triton_text import HELPERS


def emit(name: str, graphs: tuple[Graph, ...], schedule: Schedule) -> str:
    """The whole module as text."""
    used: set[str] = set()
    kernels: list[str] = []
    bodies = []
    for number, (graph, plan) in enumerate(zip(graphs, schedule.plans)):
        suffix = f"_{number}" if len(graphs) > 1 else ""
        sources, lines = shape_set(graph, plan, suffix, partial(_printed, suffix=suffix, used=used))
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


def _printed(nest: Any, suffix: str, used: set[str]) -> tuple[str, str]:
    """The kernel's text, and the line that launches it."""
    if isinstance(nest, Tiles):
        return _tiles(nest, suffix, used)
    if isinstance(nest, Product):
        return _product(nest, suffix, used)
    if isinstance(nest, Flash):
        return _flash(nest, suffix, used)
    raise Illegal("no kernel of a GPU")


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
    text = "\n".join(
        [f"# {module.computes(work)}", "@triton.jit", head, textwrap.indent("\n".join(body), "    ")]
    )
    launch = f"{name}[{module._tuple(grid)}]({given})"
    if len(launch) > 106:
        launch = f"{name}[{module._tuple(grid)}](\n    {given}\n)"
    return text, launch
