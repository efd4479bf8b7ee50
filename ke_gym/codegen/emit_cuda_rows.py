"""Rows in CUDA C++: lanes that share one walk over its columns, and gather or run along it."""

from __future__ import annotations

from ke_gym.codegen.cpp_text import operands_of
from ke_gym.codegen.cuda_layout import in_vectors
from ke_gym.codegen.cuda_text import TYPES, cast, constant
from ke_gym.codegen.emit_cuda_lines import Lines, Vectors
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
    walk,
)
from ke_gym.codegen.tiles import (
    Work,
    column_var,
    depends,
    identity,
)
from ke_gym.codegen.triton_text import bare_text

_COMBINE = {
    "sum": "Sum",
    "prod": "Product",
    "max": "Largest",
    "min": "Smallest",
    "any": "Largest",
    "all": "Smallest",
}


class Rows(Lines):
    """Prints what is done with the columns of a row; a row that is read again stays in registers."""

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
        return in_vectors(column_var(columns), vector) if vector > 1 else Rewriter()

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
    ) -> tuple[list[dict[Interned, str]], Vectors]:
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

    def _close_columns(self, scopes: list[dict[Interned, str]], stored: Vectors) -> None:
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
