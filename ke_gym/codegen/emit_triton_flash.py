"""Attention -> Triton text. What is computed is in ``flash``."""

from __future__ import annotations

from ke_gym.codegen.expr import Expr, Load
from ke_gym.codegen.flash import Flash, variables
from ke_gym.codegen.tiles import power_above
from ke_gym.codegen.triton_names import pointers
from ke_gym.codegen.triton_text import TYPES, Axis, Text, bare_text, enclosed, uses_in

LOG2E = "1.4426950408889634"  # exp2 is what the hardware has


TOGETHER = 32  # blocks of keys whose sums are added up at once


def print_flash(flash: Flash, used: set[str]) -> list[str]:
    """The body of an attention kernel, line by line."""
    return Printer(flash, used).print()


def print_beyond(flash: Flash, used: set[str]) -> list[str]:
    """The body of the kernel that finds the NaN and infinities among the values of every block of keys.

    Weights of zero make NaN of them, for queries too that see none of these keys.
    """
    return Printer(flash, used).beyond()


class Printer:
    """Prints one attention kernel: a program's queries pass over the keys, those that no mask touches first."""

    def __init__(self, flash: Flash, used: set[str]) -> None:
        used.add("max_nan")
        self.flash, shape, blocks = flash, flash.shape, flash.blocks
        self.vars = variables(shape)
        self.lines: list[str] = []
        sizes = {b.name: b.extent for b in (*flash.reads, *flash.writes)}
        self.wide = max(sizes.values()) >= 1 << 31
        uses = uses_in([flash.scores, *flash.operands])
        self.text = Text(
            used, sizes, outer=self.lines, lines=self.lines, uses=uses, pointers=pointers(flash)
        )  # fmt: skip
        self.d, self.e = power_above(shape.d), power_above(shape.dv)
        self.limits = {"m": shape.queries, "n": shape.keys, "d": shape.d, "e": shape.dv}
        self.ragged = {
            "m": shape.queries % blocks.m != 0, "n": shape.keys % blocks.n != 0, "d": self.d != shape.d,
            "e": self.e != shape.dv,
        }  # fmt: skip
        self.half = shape.dtype != "f32"
        self.narrow = self.half or blocks.precision == "bf16"
        self.kind = TYPES["bf16" if blocks.precision == "bf16" else shape.dtype]
        self.precise = "" if self.narrow else f', input_precision="{blocks.precision}"'

    def print(self) -> list[str]:
        flash, shape, lines = self.flash, self.flash.shape, self.lines
        causal = flash.visible is not None
        last = "tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first"
        lines.append(f"tile = {last}" if causal else "tile = tl.program_id(0)")
        lines.append(f"batch = tl.program_id(1){'.to(tl.int64)' if self.wide else ''}")
        self.batch = Axis(self.vars["batch"], "batch")
        self.m = self._axis("m", "tile * M + tl.arange(0, M)[:, None]", lines)
        self.text.axes = [self.batch, self.m, self._axis("d", f"tl.arange(0, {self.d})[None, :]", lines)]
        query = self._operand(flash.operands[0])
        whole = f"tl.broadcast_to({query}, [M, {self.d}])"
        lines.append(f"query = {whole if shape.queries == 1 else query}")
        self.down = self._axis("d_down", f"tl.arange(0, {self.d})[:, None]", lines)
        self.across = self._axis("e", f"tl.arange(0, {self.e})[None, :]", lines)
        lines += [
            'top = tl.full([M, 1], float("-inf"), tl.float32)',
            "total = tl.zeros([M, 1], tl.float32)",
            f"acc = tl.zeros([M, {self.e}], tl.float32)",
        ]
        if not causal:
            self._loop(f"0, {shape.keys}", flash.scores, self.ragged["n"])
        else:
            self._causal()
        self._store()
        return lines

    def _causal(self) -> None:
        flash, keys = self.flash, self.flash.shape.keys
        visible = flash.visible or 0
        seen = f"min({_plus('tile * M', visible)}, {keys}) // N * N"
        self.lines.append(f"whole = {seen if visible >= 0 else f'max({seen}, 0)'}")
        last = f"min({_plus('tile * M + M', visible - 1)}, {keys})"
        self.lines.append(f"end = tl.cdiv({last if visible > 0 else f'max({last}, 0)'}, N) * N")
        self._loop("0, whole", flash.open, False)
        self._loop("whole, end", flash.scores, self.ragged["n"])
        count = -(-keys // flash.blocks.n)
        mask = " & ".join([f"(blocks < {count})", *([self.across.mask] if self.across.mask else [])])
        place = f"(batch * {count} + blocks) * {flash.shape.dv} + e"
        self.lines += [
            f"for block in range(end // N, {count}, {TOGETHER}):  # weights of zero, but NaN stays NaN",
            f"    blocks = block + tl.arange(0, {TOGETHER})[:, None]",
            f"    gone = tl.load({flash.beyond} + {place}, mask={mask}, other=0.0)",
            "    acc += tl.sum(gone, axis=0, keep_dims=True)",
        ]

    def beyond(self) -> list[str]:
        """One block of keys: zero times their values, summed up."""
        flash, lines = self.flash, self.lines
        lines.append("block = tl.program_id(0)")
        lines.append(f"batch = tl.program_id(1){'.to(tl.int64)' if self.wide else ''}")
        self.batch = Axis(self.vars["batch"], "batch")
        rows = self._axis("n_down", "block * N + tl.arange(0, N)[:, None]", lines)
        self.across = self._axis("e", f"tl.arange(0, {self.e})[None, :]", lines)
        self.text.axes = [self.batch, rows, self.across]
        value = enclosed(self._operand(flash.operands[2]))
        lines.append(f"gone = tl.sum({value}.to(tl.float32) * 0.0, axis=0, keep_dims=True)")
        count = -(-flash.shape.keys // flash.blocks.n)
        mask = f", mask={self.across.mask}" if self.across.mask else ""
        lines.append(
            f"tl.store({flash.beyond} + (batch * {count} + block) * {flash.shape.dv} + e, gone{mask})"
        )
        return lines

    def _loop(self, bounds: str, scores: Expr, ragged: bool) -> None:
        """The online softmax over a range of keys, in powers of two."""
        flash, text = self.flash, self.text
        body: list[str] = []
        n = self._axis("n", "start + tl.arange(0, N)[None, :]", body, ragged)
        self._enter(body, self.down, n)
        body.append(f"keys = {self._operand(flash.operands[1])}")
        body.append(f"score = tl.dot(query, keys{self.precise})")
        self._enter(body, self.m, n)
        text.names[flash.score, ""] = "score"
        x = bare_text(text.value(scores))
        body += [
            f"x = {x}" if not ragged else f'x = tl.where(n_ok, {x}, float("-inf"))',
            f"high = max_nan(top, tl.reduce(x, 1, max_nan, keep_dims=True) * {LOG2E})",
            'shift = tl.where(high == float("-inf"), 0.0, high)',
            f"weights = tl.exp2(x * {LOG2E} - shift)",
            "rescale = tl.exp2(top - shift)",
            "total = total * rescale + tl.sum(weights, axis=1, keep_dims=True)",
            "top = high",
        ]
        rows = self._axis("n_down", "start + tl.arange(0, N)[:, None]", body, ragged)
        self._enter(body, rows, self.across)
        body.append(f"values = {self._operand(flash.operands[2])}")
        cast = f".to({self.kind})" if self.narrow else ""
        body.append(f"acc = tl.dot(weights{cast}, values, acc * rescale{self.precise})")
        text.leave()
        self.lines.append(f"for start in range({bounds}, N):")
        self.lines += [f"    {line}" for line in body]

    def _axis(self, name: str, declared: str, body: list[str], ragged: bool | None = None) -> Axis:
        """An axis of a tile; its name begins with that of its variable."""
        body.append(f"{name} = {declared}")
        ragged = self.ragged[name[0]] if ragged is None else ragged
        if ragged:
            body.append(f"{name}_ok = {name} < {self.limits[name[0]]}")
        return Axis(self.vars[name[0]], name, f"{name}_ok" if ragged else "")

    def _enter(self, body: list[str], *axes: Axis) -> None:
        """Print into the loop over keys, where elements lie along these axes."""
        self.text.enter(body, {self.vars["n"], self.flash.score})  # another score for every key
        self.text.names.clear()
        self.text.axes = [self.batch, *axes]

    def _operand(self, expr: Expr) -> str:
        self.text.widen = not isinstance(expr, Load)
        value = self.text.value(expr)
        loaded, self.text.widen = not self.text.widen, True
        return value if not self.narrow or (self.half and loaded) else f"{enclosed(value)}.to({self.kind})"

    def _store(self) -> None:
        flash, text = self.flash, self.text
        text.axes = [self.batch, self.m, self.across]
        place = text.index(flash.place, "")
        if flash.shape.queries == 1:
            place = f"{place} + m"
        mask = " & ".join(a.mask for a in (self.m, self.across) if a.mask)
        out = flash.writes[0]
        value = "acc / total" if out.dtype == "f32" else f"(acc / total).to({TYPES[out.dtype]})"
        tail = f", mask={mask}" if mask else ""
        self.lines.append(f"tl.store({text.pointers[out.name]} + {place}, {value}{tail})")


def _plus(text: str, number: int) -> str:
    return f"{text} + {number}" if number > 0 else f"{text} - {-number}" if number < 0 else text
