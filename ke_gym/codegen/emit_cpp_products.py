"""Products, convolutions, attention and bags -> calls of C++ templates with their lambdas."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from ke_gym.codegen import contraction as templates
from ke_gym.codegen.contract import Contraction, Store
from ke_gym.codegen.cpp_text import Text
from ke_gym.codegen.cpp_words import (
    COMBINE,
    TYPES,
    accumulate,
    accumulate_extreme,
    bare_text,
    combine,
    extreme,
    identity,
    notes_nan,
    store_text,
)
from ke_gym.codegen.expr import BYTES, Interned, Var, walk

# What the templates call the position of a strip's first element; attention delivers whole rows.
_STRIPS = {"gemm": "col", "conv": "pos", "attention": "0", "bag": "col"}


def print_contraction(c: Contraction, used: set[str]) -> str:
    """The template call with its lambdas."""
    used.add(templates.HEADERS[c.kind])
    sizes = {b.name: b.extent for b in c.reads} | {"acc": 1 << 50}
    stores = [s for s in c.epilogue if s.op is None]
    epilogue = _strip(stores, _STRIPS[c.kind], used, sizes)
    for store in c.epilogue:
        if store.op is not None:
            epilogue += _row_reduction(store, used)
    pointers = [_pointer(v.buffer, v.offset) for v in c.operands]
    if isinstance(c.problem, templates.AttentionProblem):
        assert isinstance(c.choices, templates.AttentionSchedule) and c.score is not None
        printer = Text(used)
        lines = printer.bind([c.score])
        score = _loop_text("first_key", c.score, [*lines, f"acc[j] = {bare_text(printer.expr(c.score))};"])
        q, k, v = pointers
        text = templates.emit_attention(
            c.problem, c.choices, q, k, v, "\n".join(epilogue), score="\n".join(score)
        )
        return textwrap.indent(text, "  ")
    if isinstance(c.problem, templates.BagProblem):
        assert isinstance(c.choices, templates.BagSchedule)
        text = templates.emit_bag(c.problem, c.choices, pointers, "\n".join(epilogue))
        return textwrap.indent(text, "  ")
    left, right = pointers
    if isinstance(c.problem, templates.ConvProblem):
        assert isinstance(c.choices, templates.ConvSchedule)
        text = templates.emit_conv(c.problem, c.choices, left, right, "\n".join(epilogue))
    else:
        assert isinstance(c.choices, templates.GemmSchedule)
        prologue = None
        if c.prologue is not None:
            printer = Text(used)
            lines = printer.bind([c.prologue])
            prologue = "\n".join(
                _loop_text("k", c.prologue, [*lines, f"out[j] = {bare_text(printer.expr(c.prologue))};"])
            )
        text = templates.emit_gemm(
            c.problem, c.choices, left, right, "\n".join(epilogue), prologue, c.vector_bytes
        )
    return textwrap.indent(text, "  ")


def _pointer(buffer: str, offset: int) -> str:
    return f"{buffer} + {offset}" if offset else buffer


def _loop_text(start: str, what: Interned, body: list[str]) -> list[str]:
    at = [f"  const int64_t at = {start} + j;"] if _mentions(what, "at") else []
    return [
        "#pragma omp simd",
        "for (int64_t j = 0; j < count; ++j) {",
        *at,
        *(f"  {line}" for line in body),
        "}",
    ]


def _mentions(root: Interned, name: str) -> bool:
    return any(isinstance(n, Var) and n.name == name for n in walk(root))


def _strip(stores: list[Store], start: str, used: set[str], sizes: Mapping[str, int]) -> list[str]:
    if not stores:
        return []
    printer = Text(used, sizes)
    lines = printer.bind([s.expr for s in stores])
    for s in stores:
        value = store_text(bare_text(printer.expr(s.expr)), s.dtype, s.expr.dtype)
        lines.append(f"{s.buffer}[{printer.index(s.index)}] = {value};")
    return [
        "#pragma omp simd",
        "for (int64_t j = 0; j < count; ++j) {",
        "  const int64_t at = j;" if start == "0" else f"  const int64_t at = {start} + j;",
        *(f"  {line}" for line in lines),
        "}",
    ]


def _row_reduction(store: Store, used: set[str]) -> list[str]:
    """One strip's share of a reduction along the row, whose strips come in ascending order."""
    op, kind = store.op or "sum", store.expr.dtype
    printer = Text(used)
    lines = printer.bind([store.expr])
    place = f"{store.buffer}[{printer.index(store.index)}]"
    found, flag = f"{store.buffer}_strip", f"{store.buffer}_nan"
    at = ["  const int64_t at = col + j;"] if _mentions(store.expr, "at") else []
    value = bare_text(printer.expr(store.expr))
    head = [f"{TYPES[kind]} {found} = {identity(op, kind)};"]
    clauses = f"reduction({COMBINE[op]} : {found})"
    body, tail = [accumulate(op, found, value)], []
    if notes_nan(op, kind):
        head.append(f"int{8 * BYTES[kind]}_t {flag} = 0;")
        clauses += f" reduction(| : {flag})"
        body = [accumulate_extreme(op, found, flag, value)]
        tail = [f"{found} = {extreme(flag, found, kind)};"]
    return [
        *head,
        f"#pragma omp simd {clauses}",
        "for (int64_t j = 0; j < count; ++j) {",
        *at,
        *(f"  {line}" for line in (*lines, *body)),
        "}",
        *tail,
        f"{place} = col == 0 ? {found} : {combine(op, place, found)};",
    ]
