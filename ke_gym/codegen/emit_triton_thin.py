"""A thin product that is added to a product's tiles -> Triton text: its operands in registers, one more step at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ke_gym.codegen.expr import Load
from ke_gym.codegen.operands import variables
from ke_gym.codegen.tiles import power_above
from ke_gym.codegen.triton_text import Axis, Text, tf32_parts

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
    around = {
        "left": ((m, "m[:, None]"), (k, "thin[None, :]")),
        "right": ((k, "thin[:, None]"), (n, "n[None, :]")),
    }
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


def product(printer: Printer) -> list[str]:
    """The step that adds it; in fp32 as exact as the products of few columns are by themselves.

    Three products of TF32 parts, in the tile's own registers if these hold sums of TF32, else apart: tensor cores cut off
    what they add to. Of infinities nothing remains, and they stay out of what is multiplied by what remains.
    """
    if printer.product.shape.dtype != "f32":
        return ["acc = tl.dot(thin_left, thin_right, acc)"]
    if printer.product.blocks.precision == "ieee":
        return ['acc = tl.dot(thin_left, thin_right, acc, input_precision="ieee")']
    lines = []
    for side in ("thin_left", "thin_right"):
        high, low, finite = f"{side}_high", f"{side}_low", f"{side}_finite"
        lines += tf32_parts(side)
        lines += [
            f"{low} = tl.where({low} == {low}, {low}, 0.0)",
            f'{finite} = tl.where(tl.abs({high}) < float("inf"), {high}, 0.0)',
        ]
    own = printer.product.blocks.precision == "tf32x3"
    total = "thin_sum" if own else "acc"
    if own:
        lines.append("thin_sum = tl.zeros([M, N], tl.float32)")
    for left, right in (("low", "finite"), ("finite", "low"), ("high", "high")):
        operands = f"thin_left_{left}, thin_right_{right}, {total}"
        lines.append(f'{total} = tl.dot({operands}, input_precision="tf32")')
    return [*lines, "acc += thin_sum"] if own else lines
