"""A group's kernels in Triton and the lines of ``forward`` that launch them: most take one, products up to four."""

from __future__ import annotations

import math
import textwrap
from typing import Any

from ke_gym.codegen import module
from ke_gym.codegen.bags import Bag
from ke_gym.codegen.emit_triton import print_tiles
from ke_gym.codegen.emit_triton_bags import print_bag
from ke_gym.codegen.emit_triton_flash import print_beyond, print_flash
from ke_gym.codegen.emit_triton_products import Printer, loaded, pack_blocks, sum_blocks, tiled
from ke_gym.codegen.emit_triton_totals import SIZES, Total, print_totals
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import Expr, Load, walk
from ke_gym.codegen.flash import Flash
from ke_gym.codegen.module_gpu import Printed
from ke_gym.codegen.operands import Described, variables
from ke_gym.codegen.products import Product
from ke_gym.codegen.tiles import Tiles, column_var, depends
from ke_gym.codegen.triton_names import parts_of, pointers
from ke_gym.codegen.triton_text import Axis, Text


def printed(nest: Any, suffix: str, ready: frozenset[str], used: set[str]) -> Printed:
    """``ready`` are tensors of which copies are made in the preparation. Raises ``Illegal`` for what no kernel does."""
    if isinstance(nest, Tiles):
        return _tiles(nest, suffix, used)
    if isinstance(nest, Product):
        return _product(nest, suffix, ready, used)
    if isinstance(nest, Bag):
        return _bag(nest, suffix)
    if isinstance(nest, Flash):
        return _flash(nest, suffix, used)
    raise Illegal("no kernel of a GPU")


class Launches:
    """Collects the kernels of one group, in the order in which they run."""

    def __init__(self, work: Tiles | Product | Flash | Bag, suffix: str) -> None:
        self.work, self.suffix = work, suffix
        self.names = pointers(work)
        self.kernels: list[str] = []
        self.lines: list[str] = []
        self.before: list[str] = []
        self.copies: list[str] = []

    def tensors(self, *names: str) -> dict[str, str]:
        """What the kernel calls these tensors -> what ``forward`` does."""
        return {self.names.get(name, name): name for name in names}

    def read(self, *roots: Expr) -> dict[str, str]:
        """The tensors that these expressions read."""
        found = {n.buffer for n in walk(*roots) if isinstance(n, Load) and n.index}
        return self.tensors(*(b.name for b in self.work.reads if b.name in found))

    @property
    def results(self) -> dict[str, str]:
        """The tensors that the group writes."""
        return self.tensors(*(b.name for b in self.work.writes))

    def room(self, name: str, size: tuple[int, ...], dtype: str, beside: str = "") -> None:
        """Memory for what one kernel hands to the next; ``beside``: on this tensor's device, in the preparation."""
        device = f"{beside or self.work.writes[0].name}.device"
        lines = self.before if beside else self.lines
        lines.append(f"{name} = torch.empty({module._tuple(size)}, dtype={dtype}, device={device})")
        if beside:
            self.copies.append(name)

    def add(
        self,
        ending: str,
        body: list[str],
        grid: tuple[int, ...],
        tensors: dict[str, str],
        sizes: dict[str, int],
        options: dict[str, int],
        before: bool = False,
    ) -> None:
        """One kernel; ``ending`` tells it from the others of its group. ``before``: launched in the preparation."""
        name = f"compute_{self.work.name}{ending}{self.suffix}"
        parameters = ", ".join([*tensors, *(f"{size}: tl.constexpr" for size in sizes)])
        listed = [*tensors.values(), *(f"{k}={v}" for k, v in (sizes | options).items())]
        head = f"def {name}({parameters}):"
        if len(head) > 110:
            head = f"def {name}(\n    {parameters}\n):"
        comment = f"# {module.computes(self.work)}"
        self.kernels.append(
            "\n".join([comment, "@triton.jit", head, textwrap.indent("\n".join(body), "    ")])
        )
        given = ", ".join(listed)
        launch = f"{name}[{module._tuple(grid)}]({given})"
        if len(launch) > 106:
            described = any(value.startswith("TensorDescriptor") for value in listed)
            given = ",\n    ".join(listed) + "," if described else given
            launch = f"{name}[{module._tuple(grid)}](\n    {given}\n)"
        (self.before if before else self.lines).append(launch)

    def total(self, name: str, op: str, dtype: str, stored: str, place: str = "col") -> Total:
        """How the parts of the result of that name are put together."""
        return Total(self.names.get(name, name), parts_of(name), op, dtype, stored, place)

    def put_together(self, totals: list[Total], count: int, columns: int, used: set[str]) -> None:
        """The kernel that puts together what ``count`` programs have reduced, each its part."""
        tensors = {total.parts: total.parts for total in totals}
        tensors |= {total.result: self.results[total.result] for total in totals}
        ending = (
            "_total" if f"compute_{self.work.name}_total" not in "".join(self.kernels) else f"_total{columns}"
        )
        grid = (math.ceil(columns / SIZES["BLOCK"]),)
        self.add(ending, print_totals(totals, count, columns, used), grid, tensors, SIZES, {"num_warps": 4})

    @property
    def text(self) -> Printed:
        """All that was collected."""
        return Printed("\n\n\n".join(self.kernels), self.lines, self.before, self.copies)


def _tiles(tiles: Tiles, suffix: str, used: set[str]) -> Printed:
    blocks, body = tiles.blocks, print_tiles(tiles, used)
    sizes = {"ROWS": blocks.rows} if blocks.rows > 1 else {}
    if any("BLOCK" in line for line in body):
        sizes["BLOCK"] = blocks.columns
    options = {"num_warps": blocks.warps}
    launches = Launches(tiles, suffix)
    summed = {work.node.name for work in tiles.across}
    stored = launches.tensors(*(b.name for b in tiles.writes if b.name not in summed))
    tensors = launches.tensors(*(b.name for b in tiles.reads)) | stored
    if not tiles.across:
        launches.add("", body, (math.ceil(tiles.rows / blocks.rows),), tensors, sizes, options)
        return launches.text
    for work in tiles.across:
        name = parts_of(work.node.name)
        launches.room(name, (blocks.programs, work.columns), module._TORCH[work.expr.dtype])
        tensors[name] = name
    launches.add("", body, (blocks.programs,), tensors, sizes, options)
    for columns in dict.fromkeys(work.columns for work in tiles.across):
        text, works = (
            Text(set(), {}, axes=[Axis(column_var(columns), "col")]),
            [w for w in tiles.across if w.columns == columns],
        )
        places = [text.index(work.place, "") for work in works if work.place is not None]
        totals = [
            launches.total(w.node.name, "sum", w.expr.dtype, w.node.dtype, place)
            for w, place in zip(works, places)
        ]
        launches.put_together(totals, blocks.programs, columns, used)
    return launches.text


def _bag(bag: Bag, suffix: str) -> Printed:
    launches, blocks, problem = Launches(bag, suffix), bag.blocks, bag.problem
    parts = math.ceil(problem.dim / blocks.columns)
    grid = (problem.bags, parts) if parts > 1 else (problem.bags,)
    tensors = launches.tensors(*dict.fromkeys(b.name for b in bag.reads)) | launches.results
    sizes = {"ROWS": blocks.rows, "COLUMNS": blocks.columns}
    launches.add("", print_bag(bag, launches.names), grid, tensors, sizes, {"num_warps": blocks.warps})
    return launches.text


def _flash(flash: Flash, suffix: str, used: set[str]) -> Printed:
    shape, blocks = flash.shape, flash.blocks
    launches = Launches(flash, suffix)
    grid = (math.ceil(shape.queries / blocks.m), shape.batch)
    tensors = launches.tensors(*(b.name for b in flash.reads)) | launches.results
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    if flash.visible is not None:
        count, beyond = math.ceil(shape.keys / blocks.n), {flash.beyond: flash.beyond}
        launches.room(flash.beyond, (shape.batch, count, shape.dv), "torch.float32")
        body, read = print_beyond(flash, used), launches.read(flash.operands[2])
        launches.add("_beyond", body, (count, shape.batch), read | beyond, {"N": blocks.n}, {"num_warps": 4})
        tensors = beyond | tensors
    launches.add("", print_flash(flash, used), grid, tensors, {"M": blocks.m, "N": blocks.n}, options)
    return launches.text


def _product(product: Product, suffix: str, ready: frozenset[str], used: set[str]) -> Printed:
    """Copies of operands, the product, and the sum of its parts, as far as they are asked for."""
    shape, blocks = product.shape, product.blocks
    launches = Launches(product, suffix)
    for side, operand in product.packed.items():
        size = product.copied(side)
        row = size.m if side == "left" else size.n
        copies = size.batch if depends(operand, variables(size)[0]) else 1
        name, sizes = product.copy(side), pack_blocks(product, side)
        beside = operand.buffer if side in product.standing(ready) and isinstance(operand, Load) else ""
        room = (2 if side == product.parted else copies, row, size.k)
        launches.room(name, room, module._TORCH[product.kind(side)], beside)
        tiles = math.prod(math.ceil(a / b) for a, b in zip((row, size.k), sizes.values()))
        tensors = launches.read(operand) | {name: name}
        body, where = Printer(product, used).packing(side), (tiles, copies) if copies > 1 else (tiles,)
        launches.add(f"_{side}", body, where, tensors, sizes, {"num_warps": 4}, before=beside != "")
    down, along = product.tiles
    grid: tuple[int, ...] = (down * along, shape.batch) if shape.batch > 1 else (down * along,)
    if blocks.persistent:
        grid = (min(down * along * shape.batch, blocks.persistent),)
    elif blocks.split > 1:
        grid = (down * along, shape.batch, blocks.split)
    sizes = {"M": blocks.m, "N": blocks.n, "K": blocks.k}
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    tensors = {f"{side}_tiles": _descriptor(view, sizes) for side, view in tiled(product).items()}
    if tensors:
        used.add("TensorDescriptor")
    tensors |= launches.tensors(*loaded(product))
    body = Printer(product, used).main()
    if blocks.split == 1:
        _finished(launches, product, body, grid, tensors, sizes, options, used)
        return launches.text
    parts = product.parts
    launches.room(parts, (blocks.split, shape.batch, shape.m, shape.n), "torch.float32")
    launches.add("_parts", body, grid, tensors | {parts: parts}, sizes, options)
    m, n = sum_blocks(product)
    tiles = math.ceil(shape.m / m) * math.ceil(shape.n / n)
    tensors = {parts: parts} | launches.read(*(s.expr for s in product.stores)) | launches.results
    grid = (tiles, shape.batch) if shape.batch > 1 else (tiles,)
    launches.add("", Printer(product, used).total(), grid, tensors, {"M": m, "N": n}, {"num_warps": 4})
    return launches.text


def _finished(
    launches: Launches, product: Product, body: list[str], grid: tuple[int, ...], tensors: dict[str, str],
    sizes: dict[str, int], options: dict[str, int], used: set[str],
) -> None:  # fmt: skip
    """The kernel whose tiles are finished; what these give to rows of the product is put together by others."""
    stored = launches.tensors(*(store.buffer.name for store in product.stores if not store.op))
    rows = {parts_of(store.buffer.name): store for store in product.stores if store.op}
    count = {name: product.tiles["mn".index(store.axis)] for name, store in rows.items()}
    for name, store in rows.items():
        launches.room(name, (count[name], store.buffer.numel), module._TORCH[store.expr.dtype])
    launches.add("", body, grid, tensors | stored | {name: name for name in rows}, sizes, options)
    for name, store in rows.items():
        total = launches.total(store.buffer.name, store.op, store.expr.dtype, store.buffer.dtype)
        launches.put_together([total], count[name], store.buffer.numel, used)


def _descriptor(view: Described, sizes: dict[str, int]) -> str:
    block = [*([1] if view.batch == "apart" else []), *(sizes[axis.upper()] for axis in view.axes)]
    return f"TensorDescriptor({view.buffer}, {list(view.shape)}, {list(view.stride)}, {block})"
