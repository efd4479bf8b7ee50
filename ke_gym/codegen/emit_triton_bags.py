"""Bags of embedding rows -> Triton text: blocks of ids, the rows that they name, their sum."""

from __future__ import annotations

from collections.abc import Mapping

from ke_gym.codegen.bags import Bag


def print_bag(bag: Bag, pointers: Mapping[str, str]) -> list[str]:
    """The body of the kernel, line by line."""
    problem, blocks = bag.problem, bag.blocks
    table, ids, offsets, *weights = (
        f"{pointers[view.buffer]} + {view.offset}" if view.offset else pointers[view.buffer]
        for view in bag.operands
    )
    lines = ["bag = tl.program_id(0).to(tl.int64)", f"first = tl.load({offsets} + bag)"]
    if problem.closed:
        lines.append(f"last = tl.load({offsets} + bag + 1)")
    else:
        end = f"bag + 1 < {problem.bags}"
        lines.append(f"last = tl.load({offsets} + bag + 1, mask={end}, other={problem.total})")
    ragged = problem.dim % blocks.columns != 0
    start = "tl.program_id(1) * COLUMNS + " if blocks.columns < problem.dim else ""
    lines.append(f"col = {start}tl.arange(0, COLUMNS)[None, :]")
    if ragged:
        lines.append(f"col_ok = col < {problem.dim}")
    lines.append("total = tl.zeros([ROWS, COLUMNS], tl.float32)")
    body = [
        "at = start + tl.arange(0, ROWS)[:, None]",
        "ok = at < last",
        f"id = tl.load({ids} + at, mask=ok, other=0)",
    ]
    counted = problem.mode == "mean" and problem.padding >= 0
    if problem.padding >= 0:
        body.append(f"ok = ok & (id != {problem.padding})")
    if counted:
        lines.append("count = tl.zeros([ROWS, 1], tl.float32)")
        body.append("count += ok.to(tl.float32)")
    mask = "ok & col_ok" if ragged else "ok"
    body.append(
        f"value = tl.load({table} + id.to(tl.int64) * {problem.row_stride} + col, mask={mask}, other=0.0)"
    )
    if weights:
        body.append(f"value = value * tl.load({weights[0]} + at, mask=ok, other=0.0)")
    body.append("total += value")
    lines += ["for start in range(first, last, ROWS):", *(f"    {line}" for line in body)]
    lines.append("result = tl.sum(total, axis=0, keep_dims=True)")
    if problem.mode == "mean":
        count = "tl.sum(count, axis=0, keep_dims=True)" if counted else "(last - first).to(tl.float32)"
        lines.append(f"result = result / tl.maximum({count}, 1.0)")
    tail = ", mask=col_ok" if ragged else ""
    lines.append(f"tl.store({pointers[bag.name]} + bag * {problem.dim} + col, result{tail})")
    return lines
