"""Tiles -> CUDA C++ text: a thread per vector of elements, or lanes that share a row. What is computed is in ``tiles``.

Rows that a block may hold whole stay in registers between their passes; neighbours along the innermost axis
travel as vectors of up to 16 bytes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ke_gym.codegen.cpp_text import operands_of
from ke_gym.codegen.cuda_text import HELPERS, TYPES, Text, cast, constant
from ke_gym.codegen.errors import Illegal
from ke_gym.codegen.expr import (
    BYTES,
    Expr,
    Index,
    Interned,
    Load,
    Op,
    Rewriter,
    Search,
    Var,
    bounds,
    linear,
    of,
    walk,
)
from ke_gym.codegen.tiles import (
    Tiles,
    Work,
    along_columns,
    column_var,
    depends,
    identity,
    online,
    power_above,
    row_var,
)
from ke_gym.codegen.triton_text import bare_text, extent

VECTOR_BYTES = 16
KEPT = 64  # words of a row that a thread keeps in registers: at most, and half of those there are
REGISTERS = 65536  # of a multiprocessor
INT = (1 << 31) - (1 << 16)  # 32 bits hold an index below this, the overshoot of a last block included
_COMBINE = {
    "sum": "Sum",
    "prod": "Product",
    "max": "Largest",
    "min": "Smallest",
    "any": "Largest",
    "all": "Smallest",
}
_TAKEN = re.compile(
    r"v\d+|\w+_(acc|row|kept|vec)\d*|min|max|float|at|row|col|lane|k|j|top|shift|scanned|total|inf|load|store|Vector|\w*f|log2|log10"
    r"|int|long|short|char|bool|double|signed|unsigned|const|new|this|class|struct|union|enum|register|default|switch"
    r"|case|delete|operator|private|public|protected|template|typename|namespace|using|auto|static|extern|inline"
    r"|virtual|friend|throw|catch|goto|volatile|sizeof|void|true|false|and|or|not|xor|exp|exp2|expm1|log|log1p|tanh"
    r"|erf|erfc|sqrt|rsqrt|sin|cos|tan|asin|acos|atan|sinh|cosh|asinh|acosh|atanh|atan2|fmod|hypot|pow|floor|ceil"
    r"|trunc|copysign|lgamma|rint|fabs|not_a_number|Sum|Product|Largest|Smallest"
)


def pointers(tiles: Tiles) -> dict[str, str]:
    """What the kernel calls its tensors: their names, unless C++ or the kernel has something else of that name."""
    names = dict.fromkeys(b.name for b in (*tiles.reads, *tiles.writes))
    return {name: f"{name}_ptr" if _TAKEN.fullmatch(name) or name in HELPERS else name for name in names}


@dataclass(frozen=True)
class Layout:
    """A block's threads: ``rows`` rows with ``lanes`` threads each, which take ``vector`` elements at once.

    ``down``: neighbouring threads have neighbouring rows. ``steps``: how often a thread of a kernel without
    columns takes a vector.
    """

    rows: int
    lanes: int
    vector: int
    steps: int
    down: bool

    @property
    def threads(self) -> int:
        return self.rows * self.lanes

    @property
    def kept(self) -> int:
        """How many words of a row a thread may keep."""
        return min(KEPT, REGISTERS // 2 // self.threads)

    @property
    def block(self) -> tuple[int, ...]:
        """As it is launched."""
        if self.lanes == 1:
            return (self.rows,)
        if self.rows == 1 and not self.down:
            return (self.lanes,)
        return (self.rows, self.lanes) if self.down else (self.lanes, self.rows)

    def grid(self, tiles: Tiles) -> int:
        """How many blocks are launched."""
        return math.ceil(
            tiles.rows / (self.rows * self.vector * self.steps if tiles.columns == 1 else self.rows)
        )


def layout(tiles: Tiles) -> Layout:
    """The blocks of the schedule as threads."""
    blocks, threads = tiles.blocks, 32 * tiles.blocks.warps
    if tiles.columns == 1:
        threads = min(threads, max(32, blocks.rows))
        each = max(1, blocks.rows // threads)
        vector = _vector(tiles, row_var(tiles.rows), each)
        return Layout(threads, 1, vector, each // vector, down=True)
    scans = any(work.scan for work in tiles.works)
    down = not along_columns(tiles) and not scans
    rows = min(blocks.rows, threads)
    col = column_var(tiles.columns)
    widths = {work.columns for work in tiles.works if work.columns > 1}
    plain = len(widths) == 1 and not down and not scans
    vector = _vector(tiles, col, power_above(tiles.columns)) if plain else 1
    lanes = min(threads // rows, power_above(-(-tiles.columns // vector)))
    rows = max(rows, 32 // lanes)
    return Layout(rows, lanes, vector, 1, down)


def _vector(tiles: Tiles, var: Var, most: int) -> int:
    """How many neighbours along ``var`` every access can take at once."""
    kinds = {b.name: b.dtype for b in (*tiles.reads, *tiles.writes)}
    for vector in (16, 8, 4, 2):
        if vector > most or var.size % vector:
            continue
        split = _split(var, vector)
        moved = []
        for work in tiles.works:
            if work.columns == 1 and tiles.columns > 1:
                continue
            if any(isinstance(n, Search) for n in walk(work.expr)):
                break
            places = [
                (n.buffer, split.index(n.index[0]))
                for n in walk(work.expr)
                if isinstance(n, Load) and n.index
            ]
            if work.place is not None and (work.op is None):
                places.append((work.node.name, split.index(work.place)))
            moved += [
                (kinds[name], together(index, vector))
                for name, index in places
                if depends(index, _inner(vector))
            ]
        else:
            fits = all(which is not None and BYTES[kind] * vector <= VECTOR_BYTES for kind, which in moved)
            if moved and fits:
                return vector
    return 1


def _inner(vector: int) -> Var:
    return Var("j", vector)


def _split(var: Var, vector: int) -> Rewriter:
    """``var`` as the ``j``-th element of the ``at``-th vector."""
    return Rewriter({var: of(Var("at", var.size // vector)) * vector + of(_inner(vector))})


def together(index: Index, vector: int) -> Index | None:
    """Which vector the index goes through as ``j`` does; None if it is no whole one."""
    j = _inner(vector)
    rest = [(atom, c) for atom, c in index.terms if atom is not j]
    if index.coefficient(j) != 1 or index.const % vector:
        return None
    if any(c % vector or depends(atom, j) for atom, c in rest):
        return None
    return linear(index.const // vector, [(atom, c // vector) for atom, c in rest])


def _farthest(tiles: Tiles, sizes: dict[str, int]) -> int:
    """The greatest index that is computed, also on the way to another one."""
    roots = [r for work in tiles.works for r in (work.expr, work.place) if r is not None]
    reached = (abs(b) for n in walk(*roots) if isinstance(n, Index) for b in bounds(n))
    return max([*sizes.values(), *reached], default=0)


class TilesPrinter:
    """Prints the body of one kernel."""

    def __init__(self, tiles: Tiles, used: set[str]) -> None:
        self.tiles = tiles
        self.used = used
        self.layout = layout(tiles)
        self.names = pointers(tiles)
        sizes = {b.name: extent(b) for b in (*tiles.reads, *tiles.writes)}
        self.text = Text(used, sizes, self.names)
        self.int = "long long" if _farthest(tiles, sizes) >= INT else "int"
        self.first = "blockIdx.x" if self.int == "int" else "(long long)blockIdx.x"
        self.lines: list[str] = []
        self.depth = 0
        self.kept: dict[Expr, str] = {}
        self.filled: set[Expr] = set()
        self.scope: dict[Interned, str] | None = None

    def print(self) -> list[str]:
        if self.tiles.columns == 1:
            self._flat()
            return self.lines
        self._threads()
        done: set[str] = set()
        works = self.tiles.works
        self._keep()
        for level in sorted({work.level for work in works}):
            for work in (w for w in works if w.level == level and w.node.name not in done):
                total = online(self.tiles, work)
                if total is not None:
                    self._online(work, total)
                    done |= {work.node.name, total.node.name}
            here = [w for w in works if w.level == level and w.node.name not in done]
            for columns in dict.fromkeys(work.columns for work in here):
                plain = [w for w in here if w.columns == columns and not w.scan]
                if plain and columns == 1:
                    self._row_values(plain)
                elif plain:
                    self._pass(plain, columns)
            for work in here:
                if work.scan:
                    self._scan(work)
        return self.lines

    # -- lines and scopes ------------------------------------------------------------------------------

    def line(self, text: str) -> None:
        self.lines.append("  " * self.depth + text)

    def open(self, text: str) -> dict[Interned, str]:
        """Begin a scope; what is named inside is forgotten by ``close``."""
        self.line(f"{text} {{".lstrip())
        self.depth += 1
        return dict(self.text.names)

    def close(self, names: dict[Interned, str]) -> None:
        self.depth -= 1
        self.line("}")
        self.text.names = names

    def bind(self, *roots: Expr) -> None:
        for text in self.text.bind(roots):
            self.line(text)

    # -- elements --------------------------------------------------------------------------------------

    def _flat(self) -> None:
        """Every thread takes vectors of elements."""
        shape, rows = self.layout, self.tiles.rows
        scopes = []
        vector = shape.vector
        name, count = ("row", rows) if vector == 1 else ("at", rows // vector)
        block = self.first
        if shape.steps > 1:
            self.line("#pragma unroll")
            scopes.append(self.open(f"for (int k = 0; k < {shape.steps}; ++k)"))
            block = f"({self.first} * {shape.steps} + k)"
        self.line(f"const {self.int} {name} = {block} * {shape.threads} + threadIdx.x;")
        if count % (shape.threads * shape.steps):
            scopes.append(self.open(f"if ({name} < {count})"))
        split = _split(row_var(rows), vector) if vector > 1 else Rewriter()
        self._elements(list(self.tiles.works), split)
        for names in reversed(scopes):
            self.close(names)

    def _elements(self, works: list[Work], split: Rewriter) -> None:
        """The works' values at one place, or of one vector; results are stored."""
        exprs = [split.expr(work.expr) for work in works]
        places = [split.index(work.place) if work.place is not None else None for work in works]
        stored = self._open_vector(exprs, list(zip(works, places)))
        for work, expr, place in zip(works, exprs, places):
            self.bind(expr)
            value = self.text.expr(expr)
            if self._is_flag(work):
                value = f"({value} != 0)"
            if any(self._reads(other, work) for other in works):
                value = self._name_row(work, value)
            if place is not None:
                self._store(work, place, value, stored)
        self._close_vector(stored)

    def _reads(self, other: Work, work: Work) -> bool:
        return any(
            isinstance(n, Load) and not n.index and n.buffer == work.node.name for n in walk(other.expr)
        )

    def _name_row(self, work: Work, value: str) -> str:
        """Name a row's value for later levels."""
        name = f"{work.node.name}_row"
        kind = "bool" if self._is_flag(work) else work.expr.dtype
        self.line(f"const {TYPES[kind]} {name} = {bare_text(value)};")
        for dtype in {work.expr.dtype, work.node.dtype, "f32"}:
            self.text.names[Load(work.node.name, (), dtype)] = name
        return name

    def _store(self, work: Work, place: Index, value: str, stored: dict[str, tuple[str, Index]]) -> None:
        kind = work.node.dtype
        text = cast(kind, value) if work.expr.dtype != kind else bare_text(value)
        if work.node.name in stored:
            self.line(f"{stored[work.node.name][0]}.at[j] = {text};")
        else:
            self.line(f"{self.text.element(work.node.name, place)} = {text};")

    # -- vectors ---------------------------------------------------------------------------------------

    def _open_vector(
        self, exprs: list[Expr], places: list[tuple[Work, Index | None]]
    ) -> dict[str, tuple[str, Index]]:
        """Load the vectors that the expressions read and open the loop over their elements.

        Returns the vectors to store, by buffer, with where they belong.
        """
        vector = self.layout.vector
        if vector == 1:
            return {}
        self.used.add("vector")
        outside = dict(self.text.names)
        safe, _ = self.text.safe(exprs)
        loaded: dict[Interned, str] = {}
        for node in self.text.pending(exprs):
            if not isinstance(node, Load) or node not in safe or not depends(node, _inner(vector)):
                continue
            which = together(node.index[0], vector)
            if which is None:
                continue
            name = f"{self.names[node.buffer]}_vec"
            if f"{name}.at[j]" in loaded.values():
                name = f"{name}{len(loaded)}"
            self.line(
                f"const auto {name} = load<{vector}>({self.names[node.buffer]}, {bare_text(self.text.index(which))});"
            )
            loaded[node] = f"{name}.at[j]"
        stored: dict[str, tuple[str, Index]] = {}
        for work, place in places:
            which = together(place, vector) if place is not None and work.op is None else None
            if which is not None:
                name = f"{self.names[work.node.name]}_vec"
                self.line(f"Vector<{TYPES[work.node.dtype]}, {vector}> {name};")
                stored[work.node.name] = name, which
        self.line("#pragma unroll")
        self.open(f"for (int j = 0; j < {vector}; ++j)")
        self.scope = outside
        self.text.names.update(loaded)
        return stored

    def _close_vector(self, stored: dict[str, tuple[str, Index]]) -> None:
        if self.scope is None:
            return
        self.close(self.scope)
        self.scope = None
        for name, (values, which) in stored.items():
            self.line(f"store({self.names[name]}, {bare_text(self.text.index(which))}, {values});")

    # -- rows ------------------------------------------------------------------------------------------

    def _threads(self) -> None:
        """Which row and which of its lanes a thread is."""
        shape, rows = self.layout, self.tiles.rows
        across, down = ("threadIdx.y", "threadIdx.x") if shape.down else ("threadIdx.x", "threadIdx.y")
        if shape.lanes == 1:
            down = "threadIdx.x"
        row = self.first if shape.rows == 1 else f"{self.first} * {shape.rows} + {down}"
        if rows % shape.rows:  # all threads take part in reductions: the last ones repeat the last row
            row = f"min({self.int}({row}), {rows - 1})" if self.int == "int" else f"min({row}, {rows - 1}LL)"
            self.line("// The threads after the last row repeat it: reductions need them.")
        self.line(f"const {self.int} row = {row};")
        if shape.lanes > 1:
            self.line(f"const int lane = {across};")

    def _count(self, columns: int) -> tuple[str, int]:
        """What the loop over columns counts: its name and how many there are."""
        vector = self.layout.vector
        return ("col", columns) if vector == 1 else ("at", columns // vector)

    def _split_columns(self, columns: int) -> Rewriter:
        vector = self.layout.vector
        return _split(column_var(columns), vector) if vector > 1 else Rewriter()

    def _held(self, columns: int) -> int:
        """How many elements of a row a thread keeps; 0 if rows are read anew in every pass."""
        shape = self.layout
        _, count = self._count(columns)
        held = -(-count // shape.lanes) * shape.vector
        scans = any(work.scan for work in self.tiles.works)
        return held if columns <= self.tiles.blocks.columns and held <= shape.kept and not scans else 0

    def _keep(self) -> None:
        """Choose what several passes read of a row, to be kept in registers, and declare it."""
        left = self.layout.kept
        for columns in dict.fromkeys(w.columns for w in self.tiles.works if w.columns > 1):
            held = self._held(columns)
            if not held:
                continue
            split = self._split_columns(columns)
            passes: dict[int, list[Expr]] = {}
            for work in self.tiles.works:
                if work.columns == columns:
                    passes.setdefault(work.level, []).append(split.expr(work.expr))
            for expr in self._shared(list(passes.values()), columns):
                words = held * max(1, BYTES[expr.dtype] // 4)
                if words > left:
                    break
                left -= words
                source = next(n.buffer for n in walk(expr) if isinstance(n, (Load, Search)))
                name = f"{self.names[source]}_kept{len(self.kept) or ''}"
                vector = self.layout.vector
                place = "k" if vector == 1 else "j" if held == vector else f"k * {vector} + j"
                self.line(f"{TYPES[expr.dtype]} {name}{f'[{held}]' if held > 1 else ''};")
                self.kept[expr] = f"{name}[{place}]" if held > 1 else name

    def _shared(self, passes: list[list[Expr]], columns: int) -> list[Expr]:
        """The largest expressions that move along the columns and are wanted in more than one pass."""
        name, count = self._count(columns)
        var = Var(name, count)
        seen: dict[Interned, int] = {}
        for exprs in passes:
            safe, _ = self.text.safe(exprs)
            for node in safe:
                seen[node] = seen.get(node, 0) + 1

        def worth(node: Interned) -> bool:
            inside = walk(node)
            reads = any(isinstance(n, (Load, Search)) for n in inside)
            rows = any(isinstance(n, Load) and not n.index for n in inside)
            return seen.get(node, 0) > 1 and isinstance(node, (Op, Load, Search)) and reads and not rows

        chosen: dict[Expr, None] = {}
        visited: set[Interned] = set()
        stack: list[Interned] = [expr for exprs in passes for expr in exprs]
        while stack:
            node = stack.pop()
            if node in visited:
                continue
            visited.add(node)
            if worth(node) and depends(node, var) and isinstance(node, Expr):
                chosen[node] = None
            else:
                stack.extend(n for n in operands_of(node) if not constant(n))
        return list(chosen)

    def _pass(self, works: list[Work], columns: int) -> None:
        """One walk of a row's lanes over its columns: what is pointwise is stored, the rest gathered."""
        for work in works:
            if work.op is not None:
                self._start(work)
        split = self._split_columns(columns)
        exprs = [split.expr(work.expr) for work in works]
        places = [split.index(w.place) if w.place is not None and w.op is None else None for w in works]
        scopes, stored = self._open_columns(columns, exprs, list(zip(works, places)))
        for work, expr, place in zip(works, exprs, places):
            self.bind(expr)
            value = self.text.expr(expr)
            if work.op is not None:
                self._gather(work, value)
            elif place is not None:
                self._store(work, place, value, stored)
        self._close_columns(scopes, stored)
        for work in works:
            if work.op is not None:
                self._finish(work, self._across(work, f"{work.node.name}_acc"))

    def _open_columns(
        self, columns: int, exprs: list[Expr], places: list[tuple[Work, Index | None]]
    ) -> tuple[list[dict[Interned, str]], dict[str, tuple[str, Index]]]:
        """Open the loops over a row's columns; see ``_open_vector``. What is to be kept is kept."""
        name, count = self._count(columns)
        lanes = self.layout.lanes
        steps = -(-count // lanes)
        scopes = []
        if not self._held(columns):
            start = "lane" if lanes > 1 else "0"
            step = f"{name} += {lanes}" if lanes > 1 else f"++{name}"
            scopes.append(self.open(f"for ({self.int} {name} = {start}; {name} < {count}; {step})"))
        else:
            position = "lane" if lanes > 1 else "0"
            if steps > 1:
                self.line("#pragma unroll")
                scopes.append(self.open(f"for (int k = 0; k < {steps}; ++k)"))
                position = f"k * {lanes} + lane" if lanes > 1 else "k"
            else:
                scopes.append(self.open(""))
            self.line(f"const {self.int} {name} = {position};")
            if count % lanes:
                scopes.append(self.open(f"if ({name} < {count})"))
        self.text.names.update((e, text) for e, text in self.kept.items() if e in self.filled)
        stored = self._open_vector(exprs, places)
        safe, _ = self.text.safe(exprs)
        for expr, place in self.kept.items():
            if expr in safe and expr not in self.filled:
                self.bind(expr)
                self.line(f"{place} = {bare_text(self.text.expr(expr))};")
                self.text.names.setdefault(expr, place)
                self.filled.add(expr)
        return scopes, stored

    def _close_columns(self, scopes: list[dict[Interned, str]], stored: dict[str, tuple[str, Index]]) -> None:
        self._close_vector(stored)
        for names in reversed(scopes):
            self.close(names)

    def _online(self, work: Work, total: Work) -> None:
        """Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; each lane on its own."""
        self.used |= {"larger", "inf"}
        kind = TYPES[work.expr.dtype]
        exp = "expf" if work.expr.dtype == "f32" else "exp"
        top, acc = f"{work.node.name}_acc", f"{total.node.name}_acc"
        self._start(work)
        self._start(total)
        expr = self._split_columns(work.columns).expr(work.expr)
        scopes, stored = self._open_columns(work.columns, [expr], [])
        self.bind(expr)
        value = self.text.expr(expr)
        self.line(f"const {kind} top = larger<{kind}>({top}, {bare_text(value)});")
        self.line(f"const {kind} shift = top == -inf() ? {kind}(0) : top;")
        self.line(f"{acc} = {acc} * {exp}({top} - shift) + {exp}({value} - shift);")
        self.line(f"{top} = top;")
        self._close_columns(scopes, stored)
        self._finish(work, self._across(work, top))
        self._finish(total, self._across(total, f"{acc} * {exp}({top} - {work.node.name}_row)"))

    def _scan(self, work: Work) -> None:
        """A running result: of the lanes together, behind what came before."""
        if work.op not in ("sum", "prod", "max", "min"):
            raise Illegal(f"a running {work.op}")
        self.used |= {"scan_lanes", _COMBINE[work.op]}
        shape, columns, kind = self.layout, work.columns, TYPES[self._kind(work)]
        accumulator, exact = f"{work.node.name}_acc", columns % shape.lanes == 0
        start = self.text.literal(identity(work.op, self._kind(work)).value, self._kind(work))
        self._start(work)
        scope = self.open(f"for (int k = 0; k < {-(-columns // shape.lanes)}; ++k)")
        self.line(f"const {self.int} col = {f'k * {shape.lanes} + lane' if shape.lanes > 1 else 'k'};")
        self.line(f"{kind} scanned = {start};")
        inside = self.open("" if exact else f"if (col < {columns})")
        self.bind(work.expr)
        self.line(f"scanned = {bare_text(self.text.expr(work.expr))};")
        self.close(inside)
        self.line(f"{kind} total;")
        sizes = f"{shape.lanes}, {shape.rows}"
        identity_ = cast(self._kind(work), start)
        self.line(f"scanned = scan_lanes<{sizes}>(scanned, {identity_}, {_COMBINE[work.op]}(), total);")
        self.line(f"scanned = {self._combined(work, accumulator, 'scanned')};")
        if work.place is not None:
            inside = self.open("" if exact else f"if (col < {columns})")
            self._store(work, work.place, "scanned", {})
            self.close(inside)
        self._gather(work, "total")
        self.close(scope)

    def _row_values(self, works: list[Work]) -> None:
        """What there is one of per row: every lane computes it, the first one stores it."""
        for work in works:
            self.bind(work.expr)
            value = self.text.expr(work.expr)
            self._finish(work, value)

    # -- reductions ------------------------------------------------------------------------------------

    def _kind(self, work: Work) -> str:
        """What is accumulated in: flags as integers."""
        return "i32" if work.expr.dtype == "bool" else work.expr.dtype

    @staticmethod
    def _is_flag(work: Work) -> bool:
        return work.op in ("any", "all") or (work.op is not None and work.expr.dtype == "bool")

    def _start(self, work: Work) -> None:
        kind = self._kind(work)
        start = self.text.literal(identity(work.op or "sum", kind).value, kind)
        self.line(f"{TYPES[kind]} {work.node.name}_acc = {bare_text(start)};")

    def _gather(self, work: Work, value: str) -> None:
        """Take a value into what the thread has gathered."""
        accumulator = f"{work.node.name}_acc"
        if work.op in ("sum", "prod"):
            self.line(f"{accumulator} {'+' if work.op == 'sum' else '*'}= {bare_text(value)};")
        else:
            self.line(f"{accumulator} = {self._combined(work, accumulator, value)};")

    def _combined(self, work: Work, a: str, b: str) -> str:
        if work.op in ("sum", "prod"):
            return f"{a} {'+' if work.op == 'sum' else '*'} {b}"
        helper = "larger" if _COMBINE[work.op or ""] == "Largest" else "smaller"
        self.used.add(helper)
        return f"{helper}<{TYPES[self._kind(work)]}>({a}, {bare_text(b)})"

    def _across(self, work: Work, value: str) -> str:
        """The lanes' values together."""
        shape = self.layout
        if shape.lanes == 1:
            return value
        function, combine = "down_lanes" if shape.down else "across_lanes", _COMBINE[work.op or ""]
        self.used |= {function, combine}
        return f"{function}<{shape.lanes}, {shape.rows}>({value}, {combine}())"

    def _finish(self, work: Work, value: str) -> None:
        """Name a row's value for later levels, and store it if it is asked for."""
        name = self._name_row(work, f"({value}) != 0" if self._is_flag(work) else value)
        if work.place is not None:
            scope = self.open("if (lane == 0)") if self.layout.lanes > 1 else None
            self._store(work, work.place, name, {})
            if scope is not None:
                self.close(scope)


def print_tiles(tiles: Tiles, used: set[str]) -> list[str]:
    """The body of the kernel, line by line."""
    return TilesPrinter(tiles, used).print()
