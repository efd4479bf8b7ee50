"""Blocks of a tile kernel -> Triton text: their values, reductions and scans, and where they are stored."""

from __future__ import annotations

from ke_gym.codegen.emit_triton_cache import stored
from ke_gym.codegen.emit_triton_totals import COMBINE
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import (
    Const,
    Expr,
    Load,
    Op,
    is_float,
)
from ke_gym.codegen.tiles import (
    Tiles,
    Work,
    identity,
    row_var,
)
from ke_gym.codegen.triton_names import pointers
from ke_gym.codegen.triton_text import TYPES, Axis, Text, bare_text, enclosed, literal, uses_in


class Lines:
    """Prints the statements of one tile kernel."""

    def __init__(self, tiles: Tiles, used: set[str]) -> None:
        self.tiles = tiles
        self.used = used
        self.lines: list[str] = []
        sizes = {b.name: b.extent for b in (*tiles.reads, *tiles.writes)}
        uses = uses_in([work.expr for work in tiles.works])
        self.text = Text(
            used, sizes, outer=self.lines, lines=self.lines, uses=uses, pointers=pointers(tiles),
            marks=tiles.blocks.cache != "plain",
        )  # fmt: skip
        self.high = tiles.blocks.rows > 1
        self.flat = tiles.columns == 1
        self.row = Axis(row_var(tiles.rows), "row")
        self.head = self.lines
        """What comes before the loop over rows, if there is one."""
        self.stores: list[str] = []
        """What is stored where all is read that the rows, or a loop's block of columns, need: a compiler does not move reads
        before writes, which may be to the same memory for all that it knows."""
        self.outside: list[str] = []
        """``stores`` of the rows, while a loop over their columns is printed."""
        self.passes = 0
        self.step = "start"
        self.wide = max((b.extent for b in (*tiles.reads, *tiles.writes)), default=0) >= 1 << 31

    def _column_name(self, columns: int) -> str:
        return "col" if columns == self.tiles.columns else f"col{columns}"

    def _width(self, columns: int) -> str:
        block = self.tiles.blocks.columns
        width = min(1 << (columns - 1).bit_length(), block)
        return "BLOCK" if width == block else str(width)

    @property
    def axis_number(self) -> int:
        """Which axis of a block the columns are."""
        return 1 if self.high else 0

    def _shape(self, columns: int) -> str:
        return f"[ROWS, {self._width(columns)}]" if self.high else f"[{self._width(columns)}]"

    def _kind(self, work: Work) -> str:
        """What is accumulated in: flags as integers, those that are counted as short ones."""
        return "i32" if work.expr.dtype == "bool" or _counted(work) is not None else work.expr.dtype

    def _typed(self, work: Work, text: str) -> str:
        if isinstance(work.expr, Const):
            return f"tl.full([], {text}, {TYPES[work.expr.dtype]})"
        return text

    def _block(self, work: Work, axis: Axis) -> str:
        """The work's value over a block of columns; for reductions, what does not count is neutral."""
        flags = _counted(work)
        text = self._typed(work, self.text.value(work.expr if flags is None else flags))
        if work.op is None:
            return text
        if work.expr.dtype == "bool" or flags is not None:
            text = f"{enclosed(text)}.to(tl.int32)"
        neutral = literal(identity(work.op, self._kind(work)).value, self._kind(work))
        shape = self._shape(axis.var.size)
        if axis.mask:
            text = f"tl.where({axis.mask}, {bare_text(text)}, {neutral})"
            if not axis.moves(work.expr) and self.high:
                text = f"tl.broadcast_to({text}, {shape})"
            return text
        return text if axis.moves(work.expr) else f"tl.broadcast_to({text}, {shape})"

    def _reduce(self, work: Work, value: str, keep: bool = False) -> str:
        op, axis = work.op or "sum", self.axis_number
        tail = ", keep_dims=True" if self.high or keep else ""
        if op == "sum":
            return f"tl.sum({bare_text(value)}, axis={axis}{tail})"
        if op in ("any", "all"):
            return f"tl.{'max' if op == 'any' else 'min'}({bare_text(value)}, axis={axis}{tail})"
        if op in ("max", "min") and not is_float(self._kind(work)):
            return f"tl.{op}({bare_text(value)}, axis={axis}{tail})"
        self.used.add(COMBINE[op])
        return f"tl.reduce({bare_text(value)}, {axis}, {COMBINE[op]}{tail})"

    def _scan(self, work: Work, value: str) -> str:
        op, reverse = work.op or "sum", ", reverse=True" if work.reverse else ""
        if op == "sum":
            return f"tl.cumsum({bare_text(value)}, axis={self.axis_number}{reverse})"
        if op not in COMBINE:
            raise Illegal(f"a running {op}")
        self.used.add(COMBINE[op])
        return f"tl.associative_scan({bare_text(value)}, {self.axis_number}, {COMBINE[op]}{reverse})"

    def _scanned(self, work: Work, value: str) -> None:
        """Name a block's running values for what is computed from them, and store them if they are asked for."""
        name = f"{work.node.name}_run"
        self.text.lines.append(f"{name} = {bare_text(value)}")
        self._known_as(work, name, moves=True)
        self._store(work, name)

    def _known_as(self, work: Work, name: str, moves: bool) -> None:
        """What reads a work's result reads ``name``; ``moves``: in the loop that is printed, and not before it."""
        for dtype in {work.expr.dtype, work.node.dtype, "f32"}:
            load = Load(work.node.name, (), dtype)
            self.text.names[load, ""] = name
            if moves:
                self.text.inner.add(load)

    def _combined(self, op: str, a: str, b: str) -> str:
        if op == "sum":
            return f"{a} + {b}"
        if op == "prod":
            return f"{a} * {b}"
        if op in ("any", "all"):
            return f"tl.{'max' if op == 'any' else 'min'}imum({a}, {bare_text(b)})"
        self.used.add(f"{op}_nan")
        return f"{op}_nan({a}, {bare_text(b)})"

    def _finish(self, work: Work, value: str) -> None:
        """Name a row's value for later levels, and store it if it is asked for."""
        name = f"{work.node.name}_row"
        self.lines.append(f"{name} = {bare_text(value)}")
        if work.op in ("any", "all") or (work.op is not None and work.expr.dtype == "bool"):
            self.lines.append(f"{name} = {name} != 0")
        elif self._kind(work) != work.expr.dtype:
            self.lines.append(f"{name} = {name}.to({TYPES[work.expr.dtype]})")
        self._known_as(work, name, moves=bool(self.tiles.across))
        if work.place is not None:
            self._put(work, name)

    def _store(self, work: Work, value: str) -> None:
        if work.place is not None:
            self._put(work, value)

    def _put(self, work: Work, value: str) -> None:
        place = work.place
        assert place is not None
        text = self.text.index(place, "")
        mask = self.text.mask(place)
        buffer = self.text.pointers[work.buffer]
        where = buffer if text == "0" else f"{buffer} + {text}"
        kind = f".to({TYPES[work.node.dtype]})" if work.expr.dtype != work.node.dtype else ""
        given = f"{enclosed(value)}{kind}" if kind else bare_text(value)
        tail = (f", mask={mask}" if mask else "") + stored(self.tiles.blocks.cache)
        self.stores.append(f"tl.store({where}, {given}{tail})")


def _counted(work: Work) -> Expr | None:
    """The flags whose number the work is, if it is one of a row: there are fewer than fit in four bytes."""
    expr = work.expr
    if work.op != "sum" or work.scan or work.across or not isinstance(expr, Op) or expr.name != "cast":
        return None
    flags = expr.args[0]
    return flags if flags.dtype == "bool" and expr.dtype == "i64" and not isinstance(flags, Const) else None
