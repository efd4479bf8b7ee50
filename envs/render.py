"""What a person sees of an episode: the tree and the best kernel as text, the speedup curve as a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_gym.search.tree import Node, Tree


def ansi(tree: Tree, task: str, steps: int, horizon: int) -> str:
    """The search tree, one candidate a line, then the source of the best kernel."""
    lines = [f"{task}: step {steps} of {horizon}, {len(tree)} evaluated"]
    lines += _branch(tree, None, 1)
    if tree.best is None:
        lines.append("nothing correct yet")
    else:
        lines += [f"best: #{tree.best.number}, {tree.best.speedup:.2f}x", "", tree.best.candidate.source]
    return "\n".join(lines)


def _branch(tree: Tree, number: int | None, depth: int) -> list[str]:
    lines = []
    for node in tree.children(number):
        mark = "*" if node is tree.best else " "
        lines.append(f"{mark}{'  ' * depth}#{node.number} {node.strategy}: {_verdict(node)}")
        lines += _branch(tree, node.number, depth + 1)
    return lines


def _verdict(node: Node) -> str:
    return f"{node.speedup:.2f}x" if node.correct else node.evaluation.outcome


def rgb_array(tree: Tree, task: str, horizon: int) -> NDArray[np.uint8]:
    """Every candidate's speedup and the best so far, shape (480, 640, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), dpi=100, layout="tight")
    canvas: Any = FigureCanvasAgg(figure)  # matplotlib's is untyped
    axes = figure.add_subplot()
    best, curve = 1.0, [1.0]
    leaders = {node.number for node in tree.leaders}
    for node in tree:
        best = node.speedup if node.number in leaders else best
        curve.append(best)
    points = [(i, node.speedup) for i, node in enumerate(tree, 1) if node.correct]
    failed = [i for i, node in enumerate(tree, 1) if not node.correct]
    axes.step(range(len(curve)), curve, where="post", label="best verified")
    axes.plot(*(zip(*points, strict=True) if points else ((), ())), "o", label="correct")
    axes.plot(failed, [1.0] * len(failed), "x", label="failed")
    axes.set(xlim=(0, horizon), xlabel="evaluations", ylabel="speedup", title=task, yscale="log")
    axes.legend(loc="upper left")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba(), dtype=np.uint8)[..., :3].copy()
