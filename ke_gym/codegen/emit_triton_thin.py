"""A thin product that is added to a product's tiles -> Triton text: its operands in registers, one more step at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ke_gym.codegen.expr import Load
from ke_gym.codegen.operands import variables
from ke_gym.codegen.tiles import power_above
from ke_gym.codegen.triton_text import Axis, Text

if TYPE_CHECKING:
    from ke_gym.codegen.emit_triton_products import Printer
    from ke_gym.codegen.thin_products import Thin

LEAST = 16  # what a matrix instruction sums over, at least


def loads(printer: Printer, thin: Thin) -> list[str]:
    """Both operands, before the loop over ``k``: they are there when it ends."""
    batch, m, n, k = variables(thin.shape)
    depth = max(power_above(thin.shape.k), LEAST)
    ragged = depth != thin.shape.k
    lines = [f"thin = tl.arange(0, {depth})"]
    if ragged:
        lines.append(f"thin_ok = thin < {thin.shape.k}")
    around = {"left": ((m, "m[:, None]"), (k, "thin[None, :]")), "right": ((k, "thin[:, None]"), (n, "n[None, :]"))}
    for side, operand in zip(around, thin.operands):
        text = Text(printer.used, {}, outer=lines, lines=lines, pointers=printer.pointers)
        text.axes = [Axis(batch, "0")]
        for var, name in around[side]:
            masked = ragged if var is k else printer.ragged[var.name]
            axis, _, shape = name.partition("[")
            text.axes.append(Axis(var, name, f"{axis}_ok[{shape}" if masked else ""))
        assert isinstance(operand, Load)
        place, mask = text.index(operand.index[0], ""), text.mask(operand)
        tail = f", mask={mask}, other=0.0" if mask else ""
        scaled = f" * {thin.scale!r}" if side == "left" and thin.scale != 1 else ""
        lines.append(f"thin_{side} = tl.load({text.pointers[operand.buffer]} + {place}{tail}){scaled}")
    return lines


def product(printer: Printer) -> str:
    """The step that adds it; in fp32 as exact as the products of few columns are by themselves."""
    shape, precision = printer.product.shape, printer.product.blocks.precision
    exact = "ieee" if precision == "ieee" else "tf32x3"
    precise = "" if shape.dtype != "f32" else f', input_precision="{exact}"'
    return f"acc = tl.dot(thin_left, thin_right, acc{precise})"
