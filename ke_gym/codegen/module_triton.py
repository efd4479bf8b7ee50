"""Schedule -> Triton kernel module text: the kernels, and a ``forward`` that allocates and launches."""

from __future__ import annotations

import math
import textwrap
from functools import partial
from typing import Any

from ke_gym.codegen import module
from ke_gym.codegen.emit_triton import pointers, print_tiles
from ke_gym.codegen.emit_triton_flash import print_flash
from ke_gym.codegen.emit_triton_products import Printer, loaded, sum_blocks, tiled
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import Load, walk
from ke_gym.codegen.flash import Flash
from ke_gym.codegen.graph import Graph
from ke_gym.codegen.module_gpu import shape_set
from ke_gym.codegen.products import Described, Product
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
        if "TensorDescriptor" in used:
            imports.append("from triton.tools.tensor_descriptor import TensorDescriptor")
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
    grid = (math.ceil(tiles.rows / blocks.rows),)
    return _kernel(tiles, suffix, body, grid, _tensors(tiles), sizes, options)


def _product(product: Product, suffix: str, used: set[str]) -> tuple[str, str]:
    shape, blocks = product.shape, product.blocks
    rows, columns = product.tiles
    grid = (rows * columns, *((shape.batch,) if shape.batch > 1 else ()))
    if blocks.persistent:
        grid = (min(rows * columns * shape.batch, blocks.persistent),)
    elif blocks.split > 1:
        grid = (rows * columns, shape.batch, blocks.split)
    sizes = {"M": blocks.m, "N": blocks.n, "K": blocks.k}
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    names = pointers(product)
    described = tiled(product)
    given = {f"{side}_tiles": _descriptor(view, sizes) for side, view in described.items()}
    given |= {names[name]: name for name in loaded(product)}
    if described:
        used.add("TensorDescriptor")
    if blocks.split == 1:
        given |= {names[b.name]: b.name for b in product.writes}
        return _kernel(product, suffix, Printer(product, used).main(), grid, given, sizes, options)
    parts = f"{product.name}_parts"
    text, launch = _kernel(
        product, f"{suffix}_parts", Printer(product, used).main(), grid, given | {"partial": parts}, sizes, options
    )  # fmt: skip
    read = {n.buffer for store in product.stores for n in walk(store.expr) if isinstance(n, Load) and n.index}
    outside = {names[b.name]: b.name for b in product.reads if b.name in read}
    m, n = sum_blocks(product)
    tiles = math.ceil(shape.m / m) * math.ceil(shape.n / n)
    total, adding = _kernel(
        product,
        suffix,
        Printer(product, used).total(),
        (tiles, shape.batch) if shape.batch > 1 else (tiles,),
        {"partial": parts} | outside | {names[b.name]: b.name for b in product.writes},
        {"M": m, "N": n},
        {"num_warps": 4},
    )
    size = module._tuple((blocks.split, shape.batch, shape.m, shape.n))
    room = f"{parts} = torch.empty({size}, dtype=torch.float32, device={product.writes[0].name}.device)"
    return f"{text}\n\n\n{total}", f"{room}\n{launch}\n{adding}"


def _descriptor(view: Described, sizes: dict[str, int]) -> str:
    block = [*([1] if view.batched else []), *(sizes[axis.upper()] for axis in view.axes)]
    return f"TensorDescriptor({view.buffer}, {list(view.shape)}, {list(view.stride)}, {block})"


def _flash(flash: Flash, suffix: str, used: set[str]) -> tuple[str, str]:
    shape, blocks = flash.shape, flash.blocks
    grid = (math.ceil(shape.queries / blocks.m), shape.batch)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    sizes = {"M": blocks.m, "N": blocks.n}
    return _kernel(flash, suffix, print_flash(flash, used), grid, _tensors(flash), sizes, options)


def _tensors(work: Tiles | Flash) -> dict[str, str]:
    """A kernel's tensors: what it calls them, and what ``forward`` does."""
    names = pointers(work)
    return {names[b.name]: b.name for b in (*work.reads, *work.writes)}


def _kernel(
    work: Tiles | Product | Flash,
    suffix: str,
    body: list[str],
    grid: tuple[int, ...],
    tensors: dict[str, str],
    sizes: dict[str, int],
    options: dict[str, int],
) -> tuple[str, str]:
    name = f"compute_{work.name}{suffix}"
    parameters = ", ".join([*tensors, *(f"{size}: tl.constexpr" for size in sizes)])
    listed = [*tensors.values(), *(f"{k}={v}" for k, v in (sizes | options).items())]
    given = ", ".join(listed)
    head = f"def {name}({parameters}):"
    if len(head) > 110:
        head = f"def {name}(\n    {parameters}\n):"
    text = "\n".join(
        [f"# {module.computes(work)}", "@triton.jit", head, textwrap.indent("\n".join(body), "    ")]
    )
    launch = f"{name}[{module._tuple(grid)}]({given})"
    if len(launch) > 106:
        descriptors = any(value.startswith("TensorDescriptor") for value in listed)
        given = ",\n    ".join(listed) + "," if descriptors else given
        launch = f"{name}[{module._tuple(grid)}](\n    {given}\n)"
    return text, launch
