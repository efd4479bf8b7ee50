"""Attention -> Triton text. What is computed is in ``flash``."""

from __future__ import annotations

from ke_gym.codegen.emit_triton import pointers
from ke_gym.codegen.expr import Expr, Load
from ke_gym.codegen.flash import Flash
from ke_gym.codegen.flash import variables as flash_variables
from ke_gym.codegen.triton_text import TYPES, Axis, Text, bare_text, enclosed, uses_in


def print_flash(flash: Flash, used: set[str]) -> list[str]:
    """The body of an attention kernel, line by line."""
    used.add("max_nan")
    shape, blocks = flash.shape, flash.blocks
    names = flash_variables(shape)
    sizes = {b.name: b.extent for b in (*flash.reads, *flash.writes)}
    wide = max(sizes.values()) >= 1 << 31
    powers = {axis: 1 << (getattr(shape, of_) - 1).bit_length() for axis, of_ in (("d", "d"), ("e", "dv"))}
    masks = {
        "m": shape.queries % blocks.m, "n": shape.keys % blocks.n, "d": powers["d"] - shape.d,
        "e": powers["e"] - shape.dv,
    }  # fmt: skip
    lines = [
        "tile = tl.program_id(0)",
        f"batch = tl.program_id(1){'.to(tl.int64)' if wide else ''}",
    ]
    text = Text(
        used,
        sizes,
        outer=lines,
        lines=lines,
        uses=uses_in([flash.scores, *flash.operands]),
        pointers=pointers(flash),
    )

    def axis(name: str, declared: str, limit: int, body: list[str]) -> Axis:
        body.append(f"{name} = {declared}")
        if masks[name[0]]:
            body.append(f"{name}_ok = {name} < {limit}")
        return Axis(names[name[0]], name, f"{name}_ok" if masks[name[0]] else "")

    batch = Axis(names["batch"], "batch")
    m = axis("m", "tile * M + tl.arange(0, M)[:, None]", shape.queries, lines)
    d = axis("d", f"tl.arange(0, {powers['d']})[None, :]", shape.d, lines)
    text.axes = [batch, m, d]
    half = shape.dtype != "f32"
    kind = TYPES["bf16" if blocks.precision == "bf16" else shape.dtype]
    narrow = half or blocks.precision == "bf16"

    def operand(expr: Expr) -> str:
        text.widen = not isinstance(expr, Load)
        value = text.value(expr)
        loaded, text.widen = not text.widen, True
        return value if not narrow or (half and loaded) else f"{enclosed(value)}.to({kind})"

    query = operand(flash.operands[0])
    lines.append(
        f"query = tl.broadcast_to({query}, [M, {powers['d']}])" if shape.queries == 1 else f"query = {query}"
    )
    down = axis("d_down", f"tl.arange(0, {powers['d']})[:, None]", shape.d, lines)
    e = axis("e", f"tl.arange(0, {powers['e']})[None, :]", shape.dv, lines)
    lines += [
        'top = tl.full([M, 1], float("-inf"), tl.float32)',
        "total = tl.zeros([M, 1], tl.float32)",
        f"acc = tl.zeros([M, {powers['e']}], tl.float32)",
    ]
    precise = "" if narrow else f', input_precision="{blocks.precision}"'
    body: list[str] = []
    n = axis("n", "start + tl.arange(0, N)[None, :]", shape.keys, body)
    text.enter(body, {names["n"]})
    text.names.clear()  # from here on elements lie along the other axis
    text.axes = [batch, down, n]
    body.append(f"keys = {operand(flash.operands[1])}")
    body.append(f"score = tl.dot(query, keys{precise})")
    text.names.clear()
    text.axes = [batch, m, n]
    text.names[flash.score, ""] = "score"
    scores = text.value(flash.scores)
    masked = f'tl.where(n_ok, {bare_text(scores)}, float("-inf"))' if n.mask else bare_text(scores)
    body += [
        f"x = {masked}",
        "high = max_nan(top, tl.reduce(x, 1, max_nan, keep_dims=True))",
        'shift = tl.where(high == float("-inf"), 0.0, high)',
        "weights = tl.exp(x - shift)",
        "rescale = tl.exp(top - shift)",
        "total = total * rescale + tl.sum(weights, axis=1, keep_dims=True)",
        "top = high",
    ]
    down_n = axis("n_down", "start + tl.arange(0, N)[:, None]", shape.keys, body)
    text.names.clear()
    text.axes = [batch, down_n, e]
    body.append(f"values = {operand(flash.operands[2])}")
    cast = f".to({kind})" if narrow else ""
    body.append(f"acc = tl.dot(weights{cast}, values, acc * rescale{precise})")
    text.leave()
    end = str(shape.keys)
    if flash.visible is not None:
        ahead = flash.visible - 1
        shift = f" + {ahead}" if ahead > 0 else f" - {-ahead}" if ahead < 0 else ""
        lines.append(f"end = tl.cdiv(min(tile * M + M{shift}, {shape.keys}), N) * N")
        end = "end"
    lines.append(f"for start in range(0, {end}, N):")
    lines += [f"    {line}" for line in body]
    if flash.visible is not None:
        tail: list[str] = []
        down_n = axis("n_down", "start + tl.arange(0, N)[:, None]", shape.keys, tail)
        text.enter(tail, {names["n"]})
        text.names.clear()
        text.axes = [batch, down_n, e]
        value = operand(flash.operands[2])
        tail.append(f"acc += tl.sum({enclosed(value)}.to(tl.float32) * 0.0, axis=0, keep_dims=True)")
        text.leave()
        lines.append(f"for start in range(end, {shape.keys}, N):  # weights of zero, but NaN stays NaN")
        lines += [f"    {line}" for line in tail]
    text.axes = [batch, m, e]
    place, mask = text.index(flash.place, ""), " & ".join(a.mask for a in (m, e) if a.mask)
    if shape.queries == 1:
        place = f"{place} + m"
    out = flash.writes[0]
    stored = "acc / total" if out.dtype == "f32" else f"(acc / total).to({TYPES[out.dtype]})"
    lines.append(f"tl.store({text.pointers[out.name]} + {place}, {stored}{f', mask={mask}' if mask else ''})")
    return lines
