"""Products -> Triton text: one kernel, or two if programs share tiles. What is computed is in ``products``."""

from __future__ import annotations

from dataclasses import dataclass, field

from ke_gym.codegen import emit_triton_thin as thin_text
from ke_gym.codegen import emit_triton_words as words
from ke_gym.codegen.emit_triton_totals import COMBINE
from ke_gym.codegen.expr import Expr, Load, Rewriter, Var, of, walk
from ke_gym.codegen.operands import Described, Shape, variables
from ke_gym.codegen.products import Product, Store
from ke_gym.codegen.tiles import depends, identity, power_above
from ke_gym.codegen.triton_names import parts_of, pointers
from ke_gym.codegen.triton_text import (
    TYPES,
    Axis,
    Text,
    bare_text,
    enclosed,
    literal,
    padded,
    tf32_parts,
    uses_in,
)

NAMES_OF_THE_RIGHT = 100
"""The first number in names of the right operand's values: the left one's are in the same scope."""
_POINTERS = {"left": "a", "right": "b"}
_AXES = {"left": "mk", "right": "kn"}


def tiled(product: Product) -> dict[str, Described]:
    """The operands whose tiles are fetched by descriptors."""
    if product.blocks.loads == "pointers":
        return {}
    return {side: found for side, found in zip(_AXES, product.described) if found is not None}


def loaded(product: Product) -> list[str]:
    """The tensors that the product's kernel reads through pointers."""
    described = tiled(product)
    roots = [operand for side, operand in zip(_AXES, product.taken) if side not in described]
    roots += product.thin.operands if product.thin is not None else ()
    if product.blocks.split == 1:
        roots += [store.expr for store in product.stores]
    read = dict.fromkeys(node.buffer for node in walk(*roots) if isinstance(node, Load) and node.index)
    return [
        *(b.name for b in product.reads if b.name in read),
        *(product.copy(side) for side in product.packed),
    ]


@dataclass
class Printer:
    """Prints the kernels of one product.

    ``outer``: statements before the loop over ``k``; ``body``: those of the loop.
    """

    product: Product
    used: set[str]
    outer: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape, blocks = self.product.shape, self.product.blocks
        self.parts = self.product.parts
        self.described = tiled(self.product)
        self.ragged = {axis: getattr(shape, axis) % getattr(blocks, axis) != 0 for axis in "mnk"}
        self.wide = max(b.extent for b in (*self.product.reads, *self.product.writes)) >= 1 << 31
        self.pointers = pointers(self.product)
        self.pointers = self.pointers | {name: name for name in map(self.product.copy, self.product.packed)}
        window = self.product.window
        self.moving = window if window is not None and window.channels % blocks.k == 0 else None

    # ------------------------------------------------------------------------------------------- kernels

    def main(self) -> list[str]:
        """The kernel that multiplies; it stores the results, or its part of every sum."""
        blocks, batch = self.product.blocks, self.product.shape.batch
        rows, columns = self.product.tiles
        if not blocks.persistent:
            return [*self._programs(), *self._tile()]
        name = "number" if batch > 1 else "tile"
        steps = f"tl.program_id(0), {rows * columns * batch}, tl.num_programs(0)"
        steps = f"tl.range({steps}, warp_specialize=True)" if blocks.specialized else f"range({steps})"
        lines = [f"for {name} in {steps}:"]
        inner = []
        if batch > 1:
            quotient = f"number // {rows * columns}"
            inner.append(f"batch = ({quotient}).to(tl.int64)" if self.wide else f"batch = {quotient}")
            inner.append(f"tile = number % {rows * columns}")
        return lines + _indented([*inner, *self._tile()])

    def packing(self, side: str) -> list[str]:
        """The kernel that copies an operand, so that what is summed over is contiguous."""
        shape, row = self.product.copied(side), _AXES[side].replace("k", "")
        size, blocks = getattr(shape, row), pack_blocks(self.product, side)
        operand = self.product.packed[side]
        tiles = -(-size // blocks[row.upper()])
        lines = self.outer = ["tile = tl.program_id(0)"]
        place = f"{row}{_ACROSS[side][row]} * {shape.k} + k{_ACROSS[side]['k']}"
        cast = ".to(tl.int64)" if self.wide else ""
        if depends(operand, variables(shape)[0]):
            lines.append(f"batch = tl.program_id(1){cast}")
            place = f"batch * {size * shape.k} + {place}"
        self.ragged = dict.fromkeys("mnk", False)
        for axis, number in ((row, f"tile % {tiles}"), ("k", f"tile // {tiles}")):
            where = f"{number} * {axis.upper()} + tl.arange(0, {axis.upper()})"
            lines.append(f"{axis} = ({where}){cast}" if cast else f"{axis} = {where}")
            self.ragged[axis] = getattr(shape, axis) % blocks[axis.upper()] != 0
            if self.ragged[axis]:
                lines.append(f"{axis}_ok = {axis} < {getattr(shape, axis)}")
        text, _, masks = self._text(side, operand, shape)
        text.widen = False
        value, mask = text.value(operand), " & ".join(mask for mask in masks.values() if mask)
        tail, copy = f", mask={mask}" if mask else "", self.product.copy(side)
        if self.product.kind(side) != shape.dtype:
            value = f"{enclosed(value)}.to({TYPES[self.product.kind(side)]})"
        if side != self.product.parted:
            return [*lines, f"tl.store({copy} + {place}, {value}{tail})"]
        return [
            *lines, f"value = {value}", *tf32_parts("value"),
            f"tl.store({copy} + {place}, value_high{tail})",
            f"tl.store({copy} + {size * shape.k} + {place}, value_low{tail})",
        ]  # fmt: skip

    def total(self) -> list[str]:
        """The kernel that adds up the parts' sums and stores the results."""
        shape, split = self.product.shape, self.product.blocks.split
        m, n = sum_blocks(self.product)
        lines = [*self._programs(), *_place(-(-shape.m // m), -(-shape.n // n), 1)]
        self.ragged = {"m": shape.m % m != 0, "n": shape.n % n != 0}
        lines += self._positions()
        at, mask = (
            self._partial(),
            " & ".join(f"{a}_ok{_ACROSS['result'][a]}" for a in "mn" if self.ragged[a]),
        )
        loaded_ = (
            f"tl.load({self.parts} + {at}, mask={mask}, other=0.0)"
            if mask
            else f"tl.load({self.parts} + {at})"
        )
        lines += [
            "acc = tl.zeros([M, N], tl.float32)",
            f"for part in range({split}):",
            f"    acc += {loaded_}",
        ]
        return lines + self._epilogue()

    def _programs(self) -> list[str]:
        lines = ["tile = tl.program_id(0)"]
        if self.product.shape.batch > 1:
            lines.append(f"batch = tl.program_id(1){'.to(tl.int64)' if self.wide else ''}")
        return lines

    def _tile(self) -> list[str]:
        """One tile of the product."""
        shape, blocks, sides = self.product.shape, self.product.blocks, list(_AXES)
        lines = self.outer = _place(*self.product.tiles, blocks.group)
        if blocks.split > 1:
            share = self.product.share
            lines += ["part = tl.program_id(2)", f"first = part * {share}"]
        lines += self._positions()
        window = self.product.window
        if blocks.words and window is not None and window.pairs is not None:
            if "left" not in self.described:
                self._follow("left", self.product.taken[0])
            return [*lines, *words.loop(self, window.pairs), *self._epilogue()]
        lines.append("acc = tl.zeros([M, N], tl.float32)")
        if self.product.parted:
            lines.append("rest = tl.zeros([M, N], tl.float32)")
        if blocks.sums > 1:
            lines.append("large = tl.zeros([M, N], tl.float32)")
        operands = dict(zip(sides, self.product.taken))
        steps = {side: self._step(operands[side]) for side in sides if side not in self.described}
        if self.unrolled:
            self.body.append("c = start + tl.arange(0, K)")
        elif self.moving is not None:
            self.body.append(f"tap = start // {self.moving.channels}")
            c = f"start % {self.moving.channels}"
            if self.product.laid is not None:  # or nobody knows that whole vectors can be read
                c = f"tl.multiple_of({c}, K)"
            self.body.append(f"c = {c} + tl.arange(0, K)")
        elif any(self.ragged["k"] or not step for step in steps.values()):
            self.body.append("k = start + tl.arange(0, K)")
        if self.ragged["k"] and steps:
            self.body.append(f"k_ok = k < {shape.k}")
        for side in sides:
            if side in self.described:
                self._fetch(side)
            elif steps[side]:
                self._follow(side, operands[side])
            else:
                self._compute(side, operands[side])
        exact = blocks.precision == "bf16" or shape.dtype != "f32"
        precise = "" if exact else f', input_precision="{blocks.precision}"'
        if self.product.parted:
            self._parts()
        else:
            self.body.append(f"acc = tl.dot(left, right, acc{precise})")
        self.body += [f"{_POINTERS[side]} += {step}" for side, step in steps.items() if step]
        thin = self.product.thin
        if thin is not None:
            lines += thin_text.loads(self, thin)
        lines += self._loop()
        if thin is not None:
            lines += thin_text.product(self)
        if blocks.sums > 1:
            lines.append("acc += large")
        if self.product.parted:  # of infinities, nothing remains
            lines.append("acc += tl.where(rest == rest, rest, 0.0)")
        return lines + (self._epilogue() if blocks.split == 1 else self._keep())

    def _loop(self) -> list[str]:
        """The loop over ``k``; tap by tap if they are unrolled, so that it is known which of them reads whole vectors."""
        k, split, share = self.product.shape.k, self.product.blocks.split, self.product.share
        if self.unrolled and self.moving is not None:
            inner = [f"for start in range(0, {self.moving.channels}, K):", *_indented(self.body)]
            return [f"for tap in tl.static_range({self.moving.taps}):", *_indented(inner)]
        bounds = f"0, {k}"
        if split > 1:
            last = f"first + {share}"
            bounds = f"first, {last if share * split == k else f'min({last}, {k})'}"
        return [f"for start in range({bounds}, K):", *_indented(self.body)]

    @property
    def unrolled(self) -> bool:
        return self.moving is not None and self.product.blocks.unroll

    def _positions(self) -> list[str]:
        cast = ".to(tl.int64)" if self.wide else ""
        lines = []
        for axis in "mn":
            where = f"tile_{axis} * {axis.upper()} + tl.arange(0, {axis.upper()})"
            lines.append(f"{axis} = ({where}){cast}" if cast else f"{axis} = {where}")
        return lines + [f"{a}_ok = {a} < {getattr(self.product.shape, a)}" for a in "mn" if self.ragged[a]]

    def _parts(self) -> None:
        """Three products of TF32 parts; one operand's were made before (``packing``).

        Tensor cores cut off what they add up. So a block's sum of the large parts begins at zero, and is added in fp32:
        that it is not one long chain after all, an argument says that matters to 8-bit operands only.
        """
        parted = self.product.parted
        other = next(side for side in _AXES if side != parted)
        high = {parted: parted, other: f"{other}_high"}
        self.body += tf32_parts(other)
        for left, right in (("left_low", high["right"]), (high["left"], "right_low")):
            self.body.append(f'rest = tl.dot({left}, {right}, rest, input_precision="tf32")')
        sums, large = self.product.blocks.sums, f"{high['left']}, {high['right']}"
        if sums == 1:
            self.body.append(f'acc += tl.dot({large}, input_precision="tf32", max_num_imprecise_acc=K)')
            return
        start = "(start - first)" if self.product.blocks.split > 1 else "start"
        if self.unrolled and self.moving is not None:
            start = f"(tap * {self.moving.channels} + start)"
        self.body += [
            f'large = tl.dot({large}, large, input_precision="tf32")',
            f"if {start} % ({sums} * K) == {sums - 1} * K:",
            "    acc += large",
            "    large = tl.zeros([M, N], tl.float32)",
        ]

    # ------------------------------------------------------------------------------------------ operands

    def _step(self, operand: Expr) -> int:
        """How far a pointer moves from one block of ``k`` to the next; 0 if the index is not linear in ``k``."""
        k = variables(self.product.shape)[3]
        if not isinstance(operand, Load) or any(
            a is not k and depends(a, k) for a, _ in operand.index[0].terms
        ):
            return 0
        return operand.index[0].coefficient(k) * self.product.blocks.k

    def narrow(self, side: str) -> str:
        """What makes of an fp32 operand what is multiplied."""
        if side in self.product.ready:
            return ""
        halved = self.product.blocks.precision == "bf16" and self.product.shape.dtype == "f32"
        return ".to(tl.bfloat16)" if halved else ""

    def _fetch(self, side: str) -> None:
        """An operand's tile, by its descriptor."""
        view = self.described[side]
        start = "start"
        if self.unrolled and self.moving is not None:
            start = f"tap * {self.moving.channels} + start"
        where = {"m": "tile_m * M", "n": "tile_n * N", "k": start}
        place = [where[axis] for axis in view.axes]
        tile = f"{side}_tiles.load([{', '.join(place)}])"
        batch = "batch.to(tl.int32)" if self.wide else "batch"
        if view.batch == "apart":
            sizes = ", ".join(axis.upper() for axis in view.axes)
            tile = f"{side}_tiles.load([{batch}, {', '.join(place)}]).reshape({sizes})"
        elif view.batch:
            rows = view.shape[0] // self.product.shape.batch
            tile = f"{side}_tiles.load([{batch} * {rows} + {place[0]}, {place[1]}])"
        turned = "" if view.axes == _AXES[side] else ".T"
        self.body.append(f"{side} = {tile}{turned}{self.narrow(side)}")
        if side == self.product.parted:
            tile = f"{side}_tiles.load([{view.shape[0] // 2} + {place[0]}, {place[1]}])"
            self.body.append(f"{side}_low = {tile}{turned}")

    def _text(
        self, side: str, operand: Expr, shape: Shape | None = None
    ) -> tuple[Text, dict[str, str], dict[str, str]]:
        """What prints an operand's expression; the axes' names in the tile, and their masks."""
        batch, m, n, k = variables(shape or self.product.shape)
        along = {"m": m, "n": n, "k": k}
        around = _ACROSS[side]
        shaped = {axis: f"{axis}{around[axis]}" for axis in around}
        masks = {axis: f"{axis}_ok{around[axis]}" if self.ragged[axis] else "" for axis in around}
        sizes = {b.name: b.extent for b in self.product.reads}
        text = Text(
            self.used, sizes, outer=self.outer, lines=self.outer, uses=uses_in([operand]), pointers=self.pointers,
            count=NAMES_OF_THE_RIGHT if side == "right" else 0,
        )  # fmt: skip
        text.axes = [Axis(batch, "batch"), *(Axis(along[a], shaped[a], masks[a]) for a in around)]
        return text, shaped, masks

    def _follow(self, side: str, operand: Expr) -> None:
        """An operand's tile, by pointers that move along ``k``."""
        assert isinstance(operand, Load)
        text, shaped, masks = self._text(side, operand)
        along = dict(zip("mnk", variables(self.product.shape)[1:]))
        first = "(first + tl.arange(0, K))[" if self.product.blocks.split > 1 else "tl.arange(0, K)["
        index = text.index(operand.index[0], "").replace("k[", first)
        for axis, name in shaped.items():  # a tile all the same
            if not depends(operand, along[axis]):
                index = f"{index} + {name}"
        pointer = _POINTERS[side]
        self.outer.append(f"{pointer} = {text.pointers[operand.buffer]} + {index}")
        mask = " & ".join(mask for mask in masks.values() if mask)
        tail = f", mask={mask}, other=0.0" if mask else ""
        self.body.append(f"{side} = tl.load({pointer}{tail}){self.narrow(side)}")
        if side == self.product.parted:
            size = getattr(self.product.shape, _AXES[side].replace("k", "")) * self.product.shape.k
            self.body.append(f"{side}_low = tl.load({pointer} + {size}{tail})")

    def _compute(self, side: str, operand: Expr) -> None:
        """An operand's tile, each element by its index or computed."""
        text, shaped, masks = self._text(side, operand)
        along = dict(zip("mnk", variables(self.product.shape)[1:]))
        inner = {along["k"]}
        if self.moving is not None:  # blocks of k that stay within a tap
            tap, c = Var("tap", self.moving.taps), Var("c", self.moving.channels)
            operand = Rewriter({along["k"]: of(tap) * c.size + of(c)}).expr(operand)
            text.axes += [Axis(tap, "tap"), Axis(c, shaped["k"].replace("k", "c"))]
            along["k"], inner = c, {tap, c}
        text.enter(self.body, inner)
        pure = isinstance(operand, Load) or padded(operand) is not None
        text.widen = not pure
        value = text.value(operand)
        kept = [axis for axis in shaped if depends(operand, along[axis])]
        wanted = " & ".join(mask for mask in masks.values() if mask)
        narrow = self.narrow(side)
        kind = TYPES["bf16" if narrow else self.product.shape.dtype]
        if wanted and not (pure and len(kept) == 2):
            value = f"tl.where({wanted}, {bare_text(value)}, 0.0)"
        if len(kept) < 2:
            value = f"tl.broadcast_to({value}, [{', '.join(_AXES[side].upper())}])"
        same = kind == TYPES["f32"] or (pure and not narrow)
        self.body.append(f"{side} = {value if same else f'{enclosed(value)}.to({kind})'}")
        text.leave()

    # ------------------------------------------------------------------------------------------- results

    def _partial(self) -> str:
        """Where a part's sum of a tile's element lies."""
        shape = self.product.shape
        size = shape.batch * shape.m * shape.n
        part = "part.to(tl.int64)" if size * self.product.blocks.split >= 1 << 31 else "part"
        batch = f" + batch * {shape.m * shape.n}" if shape.batch > 1 else ""
        return f"{part} * {size}{batch} + m[:, None] * {shape.n} + n[None, :]"

    def _keep(self) -> list[str]:
        mask = " & ".join(f"{a}_ok{_ACROSS['result'][a]}" for a in "mn" if self.ragged[a])
        return [f"tl.store({self.parts} + {self._partial()}, acc{f', mask={mask}' if mask else ''})"]

    def _row_part(self, store: Store, value: str, text: Text) -> str:
        """What a tile gives to a value of its rows."""
        shape, axis = self.product.shape, store.axis
        if self.ragged[axis]:
            neutral = literal(identity(store.op, store.expr.dtype).value, store.expr.dtype)
            value = f"tl.where({axis}_ok, {bare_text(value)}, {neutral})"
        self.used.add(COMBINE[store.op])
        value = f"tl.reduce({bare_text(value)}, {'mn'.index(axis)}, {COMBINE[store.op]}, keep_dims=True)"
        other = "m" if axis == "n" else "n"
        place = f"tile_{axis}{'.to(tl.int64)' if self.wide else ''} * {store.buffer.numel} + {text.index(store.place, '')}"
        if getattr(shape, other) == 1:  # a tile all the same
            place = f"{place} + {other}"
        mask = f", mask={other}_ok" if self.ragged[other] else ""
        return f"tl.store({parts_of(store.buffer.name)} + {place}, {value}{mask})"

    def _epilogue(self) -> list[str]:
        product, shape = self.product, self.product.shape
        batch, m, n, _ = variables(shape)
        sizes = {b.name: b.extent for b in (*product.reads, *product.writes)}
        lines = ["m = m[:, None]", "n = n[None, :]"]
        lines += [f"{axis}_ok = {axis} < {getattr(shape, axis)}" for axis in "mn" if self.ragged[axis]]
        uses = uses_in([s.expr for s in product.stores])
        text = Text(self.used, sizes, outer=lines, lines=lines, uses=uses, pointers=self.pointers)
        masks = {axis: f"{axis}_ok" if self.ragged[axis] else "" for axis in "mn"}
        text.axes = [Axis(batch, "batch"), Axis(m, "m", masks["m"]), Axis(n, "n", masks["n"])]
        for load in (x for s in product.stores for x in walk(s.expr) if isinstance(x, Load) and not x.index):
            text.names[load, ""] = "acc"
        for store in product.stores:
            value = text.value(store.expr)
            if store.op:
                lines.append(self._row_part(store, value, text))
                continue
            place, mask = text.index(store.place, ""), text.mask(store.place)
            for axis in (a for a in "mn" if getattr(shape, a) == 1):  # a tile all the same
                place, mask = f"{place} + {axis}", f"{mask} & {axis}_ok" if mask else f"{axis}_ok"
            kind = f".to({TYPES[store.buffer.dtype]})" if store.expr.dtype != store.buffer.dtype else ""
            stored = f"{enclosed(value)}{kind}" if kind else bare_text(value)
            buffer = text.pointers[store.buffer.name]
            lines.append(f"tl.store({buffer} + {place}, {stored}{f', mask={mask}' if mask else ''})")
        return lines


_ACROSS = {
    "left": {"m": "[:, None]", "k": "[None, :]"},
    "right": {"k": "[:, None]", "n": "[None, :]"},
    "result": {"m": "[:, None]", "n": "[None, :]"},
}


def pack_blocks(product: Product, side: str) -> dict[str, int]:
    """Rows and elements of each that one program copies."""
    row, shape = _AXES[side].replace("k", ""), product.copied(side)
    return {row.upper(): min(power_above(getattr(shape, row)), 64), "K": min(power_above(shape.k), 64)}


def sum_blocks(product: Product) -> tuple[int, int]:
    """Rows and columns of results that one program adds up."""
    n = min(power_above(product.shape.n), 128)
    return min(power_above(product.shape.m), max(512 // n, 1)), n


def _place(rows: int, columns: int, group: int) -> list[str]:
    """Which tile a program's number is."""
    if rows == 1:
        return ["tile_m = 0", "tile_n = tile"]
    if columns == 1 or group == 1:
        return [f"tile_m = tile % {rows}", f"tile_n = tile // {rows}"]
    return [  # rows of tiles in groups, so that neighbours share what they read
        f"group = tile // {group * columns}",
        f"height = min({rows} - group * {group}, {group})",
        f"tile_m = group * {group} + tile % {group * columns} % height",
        f"tile_n = tile % {group * columns} // height",
    ]


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]
