"""The report's pictures as inline SVG: progress, search tree, roofline. Colours come from the page's CSS."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape

from ke_gym.search.tree import Node, Tree

WIDTH = 860


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    body = "\n".join(parts)
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img"'
        f' aria-label="{escape(label)}">\n{body}\n</svg>'
    )


def _text(x: float, y: float, text: str, kind: str = "tick", anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _dot(x: float, y: float, radius: float, kind: str, title: str, style: str = "") -> str:
    return (
        f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"{style}>'
        f"<title>{escape(title)}</title></circle>"
    )


def describe(node: Node) -> str:
    """One node in a tooltip's words."""
    what = f"{node.speedup:.2f}x" if node.correct else node.evaluation.outcome
    if node.correct and node.evaluation.speedup_ci:
        low, high = node.evaluation.speedup_ci
        what += f" [{low:.2f}, {high:.2f}]"
    parent = f" on #{node.parent}" if node.parent is not None else ""
    return f"#{node.number} {node.strategy}{parent}: {what}"


def _nice_steps(low: float, high: float, count: int = 5) -> list[float]:
    """Round values that cover [low, high]."""
    raw = max(high - low, 1e-9) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [step * k for k in range(first, math.floor(high / step + 1e-9) + 1)]


def progress(tree: Tree) -> str:
    """Speedup of every candidate and of the best so far, over evaluations."""
    height, left, right, top, bottom = 300.0, 56.0, 16.0, 14.0, 58.0
    nodes = list(tree)
    speedups = [node.speedup for node in nodes if node.correct]
    peak = max([1.0, *speedups])
    y_max = 1.08 * peak
    plot_w, plot_h = WIDTH - left - right, height - top - bottom

    def x(index: float) -> float:
        return left + plot_w * (index + 0.5) / max(len(nodes), 1)

    def y(speedup: float) -> float:
        return top + plot_h * (1 - speedup / y_max)

    parts = []
    for value in _nice_steps(0, y_max):
        parts += [_line(left, y(value), WIDTH - right, y(value), "grid")]
        parts += [_text(left - 8, y(value) + 4, f"{value:g}x", anchor="end")]
    parts.append(_line(left, y(1), WIDTH - right, y(1), "baseline"))
    parts.append(_text(WIDTH - right, y(1) - 6, "baseline", "note", "end"))
    order = {node.number: index for index, node in enumerate(nodes)}
    if tree.leaders:
        points, band_low, band_high = [], [], []
        # A winner crowned after the search may be an early candidate: its reign begins at the end.
        starts = list(itertools.accumulate((order[leader.number] for leader in tree.leaders), max))
        for leader, start, end in zip(tree.leaders, starts, [*starts[1:], len(nodes) - 0.5]):
            low, high = leader.evaluation.speedup_ci or (leader.speedup, leader.speedup)
            for index in (start, end):
                points.append(f"{x(index):.1f},{y(leader.speedup):.1f}")
                band_low.append(f"{x(index):.1f},{y(low):.1f}")
                band_high.append(f"{x(index):.1f},{y(min(high, y_max)):.1f}")
        parts.append(f'<polygon class="band" points="{" ".join(band_high + band_low[::-1])}"/>')
        parts.append(f'<polyline class="best" points="{" ".join(points)}"/>')
    rug = height - bottom + 13
    for index, node in enumerate(nodes):
        if node.correct:
            kind = "leader" if node in tree.leaders else "correct"
            parts.append(
                _dot(x(index), y(node.speedup), 4.5 if kind == "leader" else 3, kind, describe(node))
            )
        else:
            parts.append(_dot(x(index), rug, 2.6, "failed", describe(node)))
    if any(not node.correct for node in nodes):
        parts.append(_text(left - 8, rug + 4, "failed", anchor="end"))
    every = max(1, 5 * math.ceil(len(nodes) / 60)) if len(nodes) > 10 else 1
    parts += [
        _text(x(i), height - bottom + 33, str(i + 1)) for i in range(len(nodes)) if (i + 1) % every == 0
    ]
    parts.append(_text(left + plot_w / 2, height - 6, "evaluations", "axis"))
    return _svg(WIDTH, height, parts, "speedup of the best candidate over evaluations")


def _shade(speedup: float, best: float) -> str:
    """From grey (half the baseline) over pale to full colour (the best), as an inline style."""
    low, high = math.log(0.5), math.log(max(best, 1.1))
    share = min(max((math.log(max(speedup, 0.5)) - low) / (high - low), 0.0), 1.0)
    return f' style="fill-opacity:{0.12 + 0.88 * share**2:.2f}"'


def search_tree(tree: Tree) -> str:
    """The tree from the reference (left) outwards; colour is speedup, the winning path is drawn bold."""
    row, left, top = 17.0, 96.0, 36.0
    rows: dict[int, float] = {}
    depth: dict[int, int] = {}
    next_row = 0.0

    def place(number: int, level: int) -> float:
        nonlocal next_row
        depth[number] = level
        below = [place(child.number, level + 1) for child in tree.children(number)]
        if below:
            rows[number] = (below[0] + below[-1]) / 2
        else:
            rows[number] = next_row
            next_row += 1
        return rows[number]

    roots = [place(child.number, 1) for child in tree.children(None)]
    levels = max(depth.values(), default=1)
    column = min(150.0, (WIDTH - left - 150) / levels)
    height = top + row * max(next_row, 1) + 16
    root_y = top + row * (sum(roots) / len(roots) if roots else 0)
    winning = {node.number for node in tree.path(tree.best)} if tree.best else set()

    def at(number: int) -> tuple[float, float]:
        return left + column * depth[number], top + row * rows[number]

    edges, dots, labels = [], [], []
    best = tree.best.speedup if tree.best else 1.0
    for node in tree:
        x1, y1 = (left, root_y) if node.parent is None else at(node.parent)
        x2, y2 = at(node.number)
        bold = node.number in winning
        middle = (x1 + x2) / 2
        edges.append(
            f'<path class="{"edge winning" if bold else "edge"}" d="M{x1:.1f},{y1:.1f} C{middle:.1f},{y1:.1f}'
            f' {middle:.1f},{y2:.1f} {x2:.1f},{y2:.1f}"/>'
        )
        if node.correct:
            ring = "node ring" if bold else "node"
            dots.append(_dot(x2, y2, 6.5 if bold else 5, ring, describe(node), _shade(node.speedup, best)))
        else:
            dots.append(_dot(x2, y2, 3.2, "failed", describe(node)))
        speed = f"{node.speedup:.2f}x" if node.correct else ""
        if bold:
            labels.append(_text(x2, y2 - 22, node.strategy, "label strong"))
            labels.append(_text(x2, y2 - 10, speed, "label strong"))
        elif not tree.children(node.number):
            labels.append(_text(x2 + 10, y2 + 3.5, f"{node.strategy} {speed}", "label", "start"))
    dots.append(_dot(left, root_y, 6.5, "reference", "the reference"))
    labels.append(_text(left - 12, root_y + 4, "reference", "label strong", "end"))
    return _svg(WIDTH, height, edges + dots + labels, "search tree")


def roofline(
    flops: float,
    moved_bytes: float,
    peak_flops: float,
    peak_bytes: float,
    points: Sequence[tuple[str, str, float]],
) -> str:
    """Attained GFLOP/s over FLOP per byte, under the measured roof.

    ``points`` are (label, CSS class, seconds); all share the task's intensity. Without FLOPs (pure data
    movement) the axis is bandwidth alone, drawn as bars.
    """
    if flops <= 0:
        return _bandwidth_bars(moved_bytes, peak_bytes, points)
    height, left, right, top, bottom = 330.0, 66.0, 20.0, 16.0, 46.0
    plot_w, plot_h = WIDTH - left - right, height - top - bottom
    intensity, ridge = flops / moved_bytes, peak_flops / peak_bytes
    x_low = math.floor(math.log2(min(intensity, ridge)) - 1.5)
    x_high = math.ceil(math.log2(max(intensity, ridge)) + 1.5)
    rates = [flops / seconds for _, _, seconds in points]
    y_high = math.log10(peak_flops * 1.8)
    y_low = math.log10(min([*rates, peak_bytes * 2.0**x_low]) / 1.6)

    def x(value: float) -> float:
        return left + plot_w * (math.log2(value) - x_low) / (x_high - x_low)

    def y(rate: float) -> float:
        return top + plot_h * (y_high - math.log10(rate)) / (y_high - y_low)

    parts = []
    step = max(1, (x_high - x_low) // 10)
    for power in range(x_low, x_high + 1, step):
        parts.append(_line(x(2.0**power), top, x(2.0**power), height - bottom, "grid"))
        name = f"{2**power}" if power >= 0 else f"1/{2**-power}"
        parts.append(_text(x(2.0**power), height - bottom + 18, name))
    for power in range(math.ceil(y_low), math.floor(y_high) + 1):
        parts.append(_line(left, y(10.0**power), WIDTH - right, y(10.0**power), "grid"))
        parts.append(_text(left - 8, y(10.0**power) + 4, f"{10.0 ** (power - 9):g}", anchor="end"))
    start, end = 2.0**x_low, 2.0**x_high
    roof = [(start, peak_bytes * start), (ridge, peak_flops), (end, peak_flops)]
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in roof)
    parts.append(f'<polyline class="roof" points="{path}"/>')
    parts.append(_text(x(end), y(peak_flops) - 8, f"{peak_flops / 1e9:.0f} GFLOP/s measured", "note", "end"))
    parts.append(
        _text(
            x(start) + 6, y(peak_bytes * start) - 12, f"{peak_bytes / 1e9:.1f} GB/s measured", "note", "start"
        )
    )
    ceiling = min(peak_flops, peak_bytes * intensity)
    parts.append(_line(x(intensity), y(ceiling), x(intensity), height - bottom, "drop"))
    for (label, kind, seconds), rate in zip(points, rates):
        share = 100 * rate / ceiling
        title = f"{label}: {rate / 1e9:.2f} GFLOP/s, {1e3 * seconds:.3f} ms"
        parts.append(_dot(x(intensity), y(rate), 6.5, kind, title))
        side, anchor = (12, "start") if x(intensity) < WIDTH - 260 else (-12, "end")
        parts.append(
            _text(
                x(intensity) + side,
                y(rate) + 4,
                f"{label}: {share:.0f} % of the roof",
                "label strong",
                anchor,
            )
        )
    parts.append(_text(left + plot_w / 2, height - 6, "FLOP per byte", "axis"))
    parts.append(_text(left - 8, top - 3, "GFLOP/s", "axis", "end"))
    return _svg(WIDTH, height, parts, "roofline")


def _bandwidth_bars(moved_bytes: float, peak_bytes: float, points: Sequence[tuple[str, str, float]]) -> str:
    left, row = 170.0, 34.0
    bars = [(label, kind, moved_bytes / seconds) for label, kind, seconds in points]
    bars.append(("measured peak", "roofbar", peak_bytes))
    top_rate = max(rate for *_, rate in bars)
    parts = []
    for index, (label, kind, rate) in enumerate(bars):
        y = 10 + row * index
        width = (WIDTH - left - 150) * rate / top_rate
        parts.append(_text(left - 10, y + 15, label, "label strong", "end"))
        parts.append(f'<rect class="{kind}" x="{left}" y="{y:.1f}" width="{width:.1f}" height="20" rx="3"/>')
        parts.append(_text(left + width + 8, y + 15, f"{rate / 1e9:.2f} GB/s", "label", "start"))
    return _svg(WIDTH, 16 + row * len(bars), parts, "bandwidth")
