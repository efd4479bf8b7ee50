"""Products and attention -> Triton text. What is computed is in ``products`` and ``flash``."""

from __future__ import annotations

from collections.abc import Mapping

from ke_gym.codegen.emit_triton import pointers
from ke_gym.codegen.expr import (
    Expr,
    Load,
    walk,
)
from ke_gym.codegen.flash import Flash
from ke_gym.codegen.flash import variables as flash_variables
from ke_gym.codegen.products import Product, variables
from ke_gym.codegen.tiles import depends
from ke_gym.codegen.triton_text import TYPES, Axis, Text, bare_text, enclosed, padded, uses_in


def print_product(product: Product, used: set[str]) -> list[str]:
    """The body of a matrix product's kernel, line by line."""
    shape, blocks = product.shape, product.blocks
    tiles_m, tiles_n = -(-shape.m // blocks.m), -(-shape.n // blocks.n)
    wide = max(b.extent for b in (*product.reads, *product.writes)) >= 1 << 31
    lines = ["tile = tl.program_id(0)"]
    if shape.batch > 1:
        lines.append(f"batch = tl.program_id(1){'.to(tl.int64)' if wide else ''}")
    if tiles_m == 1:
        lines += ["tile_m = 0", "tile_n = tile"]
    elif tiles_n == 1 or blocks.group == 1:
        lines += [f"tile_m = tile % {tiles_m}", f"tile_n = tile // {tiles_m}"]
    else:  # rows of tiles in groups, so that neighbours share what they read
        lines += [
            f"group = tile // {blocks.group * tiles_n}",
            f"height = min({tiles_m} - group * {blocks.group}, {blocks.group})",
            f"tile_m = group * {blocks.group} + tile % {blocks.group * tiles_n} % height",
            f"tile_n = tile % {blocks.group * tiles_n} // height",
        ]
    cast = ".to(tl.int64)" if wide else ""
    for axis in "mn":
        where = f"tile_{axis} * {axis.upper()} + tl.arange(0, {axis.upper()})"
        lines.append(f"{axis} = ({where}){cast}" if cast else f"{axis} = {where}")
    ragged = {"m": shape.m % blocks.m, "n": shape.n % blocks.n, "k": shape.k % blocks.k}
    lines += [f"{axis}_ok = {axis} < {getattr(shape, axis)}" for axis in "mn" if ragged[axis]]
    lines.append("acc = tl.zeros([M, N], tl.float32)")
    fast = [_stepped(operand, product) for operand in product.operands]
    body: list[str] = []
    if ragged["k"] or not all(fast):
        body.append("k = start + tl.arange(0, K)")
    if ragged["k"]:
        body.append(f"k_ok = k < {shape.k}")
    for name, operand, axes in zip(("left", "right"), product.operands, ("mk", "kn")):
        _print_operand(name, operand, axes, product, ragged, used, lines, body)
    precise = (
        f', input_precision="{blocks.precision}"'
        if blocks.precision != "bf16" and shape.dtype == "f32"
        else ""
    )
    body.append(f"acc = tl.dot(left, right, acc{precise})")
    for name, step in zip("ab", fast):
        if step:
            body.append(f"{name} += {step}")
    lines.append(f"for start in range(0, {shape.k}, K):")
    lines += [f"    {line}" for line in body]
    return lines + _epilogue(product, used, {axis: bool(ragged[axis]) for axis in "mn"})


def _stepped(operand: Expr, product: Product) -> int:
    """How far a pointer moves from one block of ``k`` to the next; 0 if the index is not linear in ``k``."""
    k = variables(product.shape)[3]
    if not isinstance(operand, Load) or any(a is not k and depends(a, k) for a, _ in operand.index[0].terms):
        return 0
    return operand.index[0].coefficient(k) * product.blocks.k


def _print_operand(
    name: str,
    operand: Expr,
    axes: str,
    product: Product,
    ragged: Mapping[str, int],
    used: set[str],
    lines: list[str],
    body: list[str],
) -> None:
    """The statements that load one operand's tile: by a pointer that moves, or by its index anew each time."""
    shape = product.shape
    batch, *rest = variables(shape)
    along = {"m": rest[0], "n": rest[1], "k": rest[2]}
    shaped = {axis: f"{axis}{around}" for axis, around in zip(axes, ("[:, None]", "[None, :]"))}
    masks = {
        axis: f"{axis}_ok{around}" if ragged[axis] else ""
        for axis, around in zip(axes, ("[:, None]", "[None, :]"))
    }
    sizes = {b.name: b.extent for b in product.reads}
    text = Text(used, sizes, outer=lines, lines=lines, uses=uses_in([operand]), pointers=pointers(product))
    text.axes = [Axis(batch, "batch")]
    text.axes += [Axis(along[axis], shaped[axis], masks[axis]) for axis in axes]
    narrow = product.blocks.precision == "bf16" and shape.dtype == "f32"
    if _stepped(operand, product):
        assert isinstance(operand, Load)
        pointer = {"left": "a", "right": "b"}[name]
        index = text.index(operand.index[0], "").replace("k[", "tl.arange(0, K)[")
        for axis in axes:  # a tile all the same
            if not depends(operand, along[axis]):
                index = f"{index} + {shaped[axis]}"
        lines.append(f"{pointer} = {text.pointers[operand.buffer]} + {index}")
        mask = " & ".join(masks[axis] for axis in axes if masks[axis])
        loaded = f"tl.load({pointer}, mask={mask}, other=0.0)" if mask else f"tl.load({pointer})"
        body.append(f"{name} = {loaded}{'.to(tl.bfloat16)' if narrow else ''}")
        return
    text.enter(body, {along["k"]})
    pure = isinstance(operand, Load) or padded(operand) is not None
    text.widen = not pure
    value = text.value(operand)
    kept = [axis for axis in axes if depends(operand, along[axis])]
    wanted = " & ".join(masks[axis] for axis in axes if masks[axis])
    kind = TYPES["bf16" if narrow else shape.dtype]
    if wanted and not (pure and len(kept) == 2):
        value = f"tl.where({wanted}, {bare_text(value)}, 0.0)"
    if len(kept) < 2:
        value = f"tl.broadcast_to({value}, [{axes[0].upper()}, {axes[1].upper()}])"
    same = kind == TYPES["f32"] or (pure and not narrow)
    body.append(f"{name} = {value if same else f'{enclosed(value)}.to({kind})'}")
    text.leave()


def _epilogue(product: Product, used: set[str], ragged: Mapping[str, bool]) -> list[str]:
    batch, m, n, _ = variables(product.shape)
    sizes = {b.name: b.extent for b in (*product.reads, *product.writes)}
    lines = ["m = m[:, None]", "n = n[None, :]"]
    lines += [f"{axis}_ok = {axis} < {getattr(product.shape, axis)}" for axis in "mn" if ragged[axis]]
    text = Text(
        used,
        sizes,
        outer=lines,
        lines=lines,
        uses=uses_in([s.expr for s in product.stores]),
        pointers=pointers(product),
    )
    text.axes = [
        Axis(batch, "batch"), Axis(m, "m", "m_ok" if ragged["m"] else ""), Axis(n, "n", "n_ok" if ragged["n"] else ""),
    ]  # fmt: skip
    for load in (x for s in product.stores for x in walk(s.expr) if isinstance(x, Load) and not x.index):
        text.names[load, ""] = "acc"
    for store in product.stores:
        value = text.value(store.expr)
        place, mask = text.index(store.place, ""), text.mask(store.place)
        for axis in (a for a in "mn" if getattr(product.shape, a) == 1):  # a tile all the same
            place, mask = f"{place} + {axis}", f"{mask} & {axis}_ok" if mask else f"{axis}_ok"
        kind = f".to({TYPES[store.buffer.dtype]})" if store.expr.dtype != store.buffer.dtype else ""
        stored = f"{enclosed(value)}{kind}" if kind else bare_text(value)
        buffer = text.pointers[store.buffer.name]
        lines.append(f"tl.store({buffer} + {place}, {stored}{f', mask={mask}' if mask else ''})")
    return lines


# -------------------------------------------------------------------------------------------------- flash


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
