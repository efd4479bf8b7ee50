"""Figures of a comparison: PNG files, and one HTML page that holds them and the table."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ke_gym.policies.comparison import BASELINES, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _figure(width: float = 6.4, height: float = 4.4) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def curves(comparison: Comparison) -> Figure:
    """The mean normalized gap that each policy has closed, evaluation by evaluation."""
    figure, axes = _figure()
    steps = np.arange(1, comparison.budget + 1)
    best = comparison.best[comparison.telling][:, None]
    for score in comparison.scores:
        runs = comparison.curves[score.policy][:, comparison.telling]
        share = (runs / np.maximum(best, 1e-9)).mean(axis=0)
        middle, spread = share.mean(axis=0), share.std(axis=0) / max(len(share), 1) ** 0.5
        dashed = score.policy in BASELINES
        (drawn,) = axes.plot(steps, middle, "--" if dashed else "-", label=score.policy)
        axes.fill_between(steps, middle - spread, middle + spread, color=drawn.get_color(), alpha=0.12, lw=0)
    axes.set(
        xlabel="evaluations", ylabel="log-speedup / best known", xlim=(1, comparison.budget), ylim=(0, None)
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def scores(comparison: Comparison) -> Figure:
    """Normalized AUC with 95 % intervals; 0 is masked random's median."""
    ranked = comparison.scores[::-1]
    figure, axes = _figure(6.4, 1.0 + 0.32 * len(ranked))
    middle = np.array([score.auc.value for score in ranked])
    ends = np.array(
        [[score.auc.value - score.auc.low, score.auc.high - score.auc.value] for score in ranked]
    ).T
    axes.errorbar(middle, range(len(ranked)), xerr=np.maximum(ends, 0), fmt="o", capsize=3)
    axes.set_yticks(range(len(ranked)), [score.policy for score in ranked])
    axes.axvline(0, color="gray", lw=0.8)
    axes.set(xlabel="normalized AUC (IQM, 95 %)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def profiles(comparison: Comparison) -> Figure:
    """The share of runs whose normalized AUC exceeds a threshold."""
    figure, axes = _figure()
    thresholds = np.linspace(-0.5, 1.0, 151)
    for score in comparison.scores:
        dashed = "--" if score.policy in BASELINES else "-"
        axes.plot(thresholds, comparison.profile(score.policy, thresholds), dashed, label=score.policy)
    axes.set(xlabel="normalized AUC", ylabel="share of runs above", xlim=(-0.5, 1.0), ylim=(0, 1))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


FIGURES = {
    "curves": (curves, "How much of the best known log-speedup is reached, on average over tasks."),
    "scores": (scores, "Area under the curve between chance (0) and the best known (1)."),
    "profiles": (profiles, "Performance profile: the share of runs above each score."),
}


def write(comparison: Comparison, folder: Path, title: str) -> Path:
    """Write all figures and ``index.html`` to ``folder``; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(comparison.verdict())}</p>",
        _table(comparison),
    ]
    for name, (draw, caption) in FIGURES.items():
        path = folder / f"{name}.png"
        draw(comparison).savefig(path)
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(
            f'<figure><img alt="{name}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    page = folder / "index.html"
    page.write_text(_PAGE.format(title=html.escape(title), body="\n".join(parts)))
    return page


HEADER = (
    "policy", "AUC [95 %]", "log-speedup", "speedup", ">1x", ">1.2x", ">2x", "valid", "to 90 %",
    "over random", "over best-of-N", "x random", "x best-of-N", "P(> random)",
)  # fmt: skip


def rows(comparison: Comparison) -> list[list[str]]:
    """The table's cells, a row per policy, the best first."""
    made = []
    for score in comparison.scores:
        made.append(
            [
                score.policy,
                str(score.auc),
                str(score.final),
                f"{score.speedup:.2f}x",
                *(f"{share:.2f}" for share in score.fast.values()),
                f"{score.validity:.2f}",
                "-" if score.to_near is None else f"{score.to_near:.0f}",
                *(str(score.over[name]) if name in score.over else "-" for name in BASELINES),
                *(str(score.faster[name]) if name in score.faster else "-" for name in BASELINES),
                f"{score.chances[BASELINES[0]]:.2f}" if BASELINES[0] in score.chances else "-",
            ]
        )
    return made


def _table(comparison: Comparison) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in HEADER)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows(comparison)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }}
th, td {{ padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
figure {{ margin: 2rem 0; }} img {{ max-width: 100%; }} figcaption {{ color: #666; }}
</style></head><body>
{body}
</body></html>
"""
