"""``report.html``: one self-contained page per run, without scripts or network."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import CppLexer, PythonLexer

from ke_gym import strategies
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.files import write_whole
from ke_gym.proposers.schedules import without
from ke_gym.report import svg, words
from ke_gym.report.models import asked
from ke_gym.search.result import Result
from ke_gym.search.session import Session
from ke_gym.search.tree import Node, Tree

TEMPLATES = Path(__file__).parent / "templates"
BASELINE_NAMES = {
    "eager": "PyTorch eager",
    "compile": "torch.compile",
    "max-autotune": 'torch.compile(mode="max-autotune")',
}


@dataclass(frozen=True)
class Step:
    """One edge of the winning path, as the page shows it."""

    node: Node
    gain: float
    diff: Markup
    added: int
    removed: int


@dataclass(frozen=True)
class Tally:
    """How one strategy did over the whole search."""

    name: str
    tries: int
    valid: int
    improved: int
    best_gain: float


def write_report(result: Result, session: Session, evaluator: Evaluator) -> Path:
    """Render the report of a finished search into its run's folder; returns the page's path."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    page = environment.get_template("report.html.jinja").render(_context(result, session, evaluator))
    path = result.report()
    write_whole(path, page.encode())
    return path


def _context(result: Result, session: Session, evaluator: Evaluator) -> dict[str, Any]:
    tree = session.tree
    return {
        "result": result,
        "best": result.evaluation,
        "baseline": BASELINE_NAMES[result.baseline],
        "tree": tree,
        "nodes": list(tree),
        "progress": Markup(svg.progress(tree)) if len(tree) else "",
        "tree_picture": Markup(svg.search_tree(tree)) if len(tree) else "",
        "roofline": Markup(_roofline(result, evaluator)),
        "why": words.why(tree) if result.faster else [],
        "source": _highlighted(result.source),
        "reference_source": _highlighted(result.task.source),
        "steps": list(_steps(tree)),
        "tallies": _tallies(tree),
        "asked": asked(session),
        "session": session,
        "facts": evaluator.facts,
        "peaks": evaluator.peaks,
        "work": evaluator.judge.shapes[evaluator.contract].work,
        "record": evaluator.record,
        "call_s": (result.best_ms or result.floor_ms) / 1e3,
        "sandbox": evaluator.sandbox,
        "threads": evaluator.threads,
        "torch_version": torch.__version__,
        "strategies": strategies,
        "highlight_css": Markup(_css()),
        "size": words.size,
    }


def _roofline(result: Result, evaluator: Evaluator) -> str:
    best = result.evaluation
    if best is None or not best.time_ms or not best.reference_ms or best.profile.bytes <= 0:
        return ""
    moved, peaks = best.profile.bytes, evaluator.peaks
    points = [
        (result.baseline, "reference", best.reference_ms / 1e3),
        ("best", "leader", best.time_ms / 1e3),
    ]
    return svg.roofline(best.profile.flops, moved, peaks.flops, peaks.bytes_per_s(moved), points)


def _highlighted(source: str) -> Markup:
    """Python, with the C++ in its literals highlighted as C++; a schedule's line is left out."""
    formatter = HtmlFormatter(nowrap=True)
    quotes = Markup("<span class=\"s\">'''</span>")
    parts = []
    for index, part in enumerate(without(source).split("'''")):
        lexer = CppLexer if index % 2 else PythonLexer
        parts.append(Markup(highlight(part, lexer(stripnl=False, ensurenl=False), formatter)))
    return quotes.join(parts)


def _css() -> str:
    light = str(HtmlFormatter(style="friendly").get_style_defs(".code"))  # type: ignore[no-untyped-call]
    dark = str(HtmlFormatter(style="github-dark").get_style_defs(".code"))  # type: ignore[no-untyped-call]
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"


def _steps(tree: Tree) -> Iterator[Step]:
    before = ""
    for node, gain in words.steps(tree):
        after = node.candidate.source
        lines = [] if not before else _difference(before, after)
        added = sum(kind == "add" for kind, _ in lines)
        removed = sum(kind == "del" for kind, _ in lines)
        body = Markup("").join(Markup('<span class="{}">{}</span>').format(*line) for line in lines)
        yield Step(node, gain, body, added, removed)
        before = after


def _difference(before: str, after: str) -> list[tuple[str, str]]:
    """Unified diff as (CSS class, line), without file names; a schedule's comment line is left out."""
    old, new = (without(text).splitlines() for text in (before, after))
    kinds = {"+": "add", "-": "del", "@": "hunk", " ": "same"}
    diff = difflib.unified_diff(old, new, lineterm="", n=2)
    return [(kinds[line[0]], line) for line in list(diff)[2:]]


def _tallies(tree: Tree) -> list[Tally]:
    by_name: dict[str, list[Node]] = {}
    for node in tree:
        by_name.setdefault(node.strategy, []).append(node)
    tallies = []
    for name, nodes in by_name.items():
        gains = [
            node.speedup / (tree.nodes[node.parent].speedup if node.parent is not None else 1.0)
            for node in nodes
            if node.correct and (node.parent is None or tree.nodes[node.parent].correct)
        ]
        improved = sum(node in tree.leaders for node in nodes)
        valid = sum(node.correct for node in nodes)
        tallies.append(Tally(name, len(nodes), valid, improved, max(gains, default=0.0)))
    return sorted(tallies, key=lambda tally: (-tally.improved, -tally.best_gain))
