"""Convolutions on words of two halves -> Triton text.

A tap moves its window by single elements, so that halves would be loaded one at a time. Words of two are loaded
instead, moved by whole words: positions 2 j and 2 j + 1 see the halves of three neighbouring words at most. They are
summed up apart, and interleaved at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ke_gym.codegen.convolutions import Convolution
from ke_gym.codegen.expr import Var, constant, of
from ke_gym.codegen.operands import variables
from ke_gym.codegen.triton_text import TYPES, Axis, Text, enclosed

if TYPE_CHECKING:
    from ke_gym.codegen.emit_triton_products import Printer


def loop(printer: Printer, call: Convolution) -> list[str]:
    """The loop over channels with all taps in it; defines ``acc``."""
    product, shape = printer.product, printer.product.shape
    words, positions = printer.pointers[call.x.buffer], shape.n // 2
    j = Var("j", positions)
    ragged = positions % (product.blocks.n // 2) != 0
    lines = [
        f"words = {words}.to(tl.pointer_type(tl.int32), bitcast=True)",
        "j = tile_n * (N // 2) + tl.arange(0, N // 2)",
        *([f"j_ok = j < {positions}"] if ragged else []),
        "even = tl.zeros([M, N // 2], tl.float32)",
        "odd = tl.zeros([M, N // 2], tl.float32)",
    ]
    depth, written = product.blocks.k, product.blocks.unroll
    c = Var("c", depth if written else call.w.shape[1])
    body = [f"c = {'' if written else 'start + '}tl.arange(0, K)"]
    text = Text(printer.used, {}, outer=lines, lines=lines, pointers={"words": "words"})
    text.axes = [
        Axis(variables(shape)[0], "batch"), Axis(j, "j[None, :]", "j_ok[None, :]" if ragged else ""),
        Axis(c, "c[:, None]"),
    ]  # fmt: skip
    text.enter(body, {c})
    batch = of(variables(shape)[0]) if shape.batch > 1 else constant(0)
    products = []
    for first in range(0, call.w.shape[1], depth) if written else (0,):
        for tap in range(call.window.taps):
            places = [call.word("words", batch, of(j), of(c) + first, tap, phase) for phase in (0, 1)]
            # Written out, all loads come before the first product, so that all are under way at once.
            values = [(enclosed(text.value(expr)), high) for expr, high in places] if written else []
            products.append((tap * call.w.shape[1] + first, places, values))
    for first, places, values in products:
        body.append(f"left = {_weights(printer, first)}")
        for total, (expr, high) in zip(("even", "odd"), places):
            word = values[0][0] if values else enclosed(text.value(expr))
            values = values[1:]
            half = f"({word} >> 16)" if high else word
            body.append(
                f"{total} = tl.dot(left, {half}.to(tl.int16).to({TYPES[shape.dtype]}, bitcast=True), {total})"
            )
    text.leave()
    if not written:
        if "left" not in printer.described:
            body.append("a += K")
        body = [f"for start in range(0, {c.size}, K):", *(f"    {line}" for line in body)]
    return [*lines, *body, "acc = tl.interleave(even, odd)"]


def _weights(printer: Printer, first: int) -> str:
    """The weights of one tap, whose channels begin at ``first``."""
    place = f"{first} + start" if first else "start"
    if "left" in printer.described:
        place = str(first) if printer.product.blocks.unroll else place
        return f"left_tiles.load([tile_m * M, {place}])"
    pointer = f"a + {first}" if first else "a"
    mask = ", mask=m_ok[:, None], other=0.0" if printer.ragged["m"] else ""
    return f"tl.load({pointer}{mask})"
