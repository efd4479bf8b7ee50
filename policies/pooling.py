"""One comparison from several: of other tasks, on other machines, or with another training for each family."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ke_gym.errors import UserError
from ke_gym.policies.comparison import BASELINES, Comparison
from ke_gym.policies.playing import Episode


def pooled(folders: Sequence[Path]) -> Comparison:
    """The comparison over all tasks of those that lie in ``folders`` (their ``compare.json``).

    Of every task as many runs as the shortest comparison has. ``UserError`` unless all have the same policies and
    budget, and no task occurs twice.
    """
    data = [_read(folder) for folder in folders]
    first = data[0]
    for folder, one in zip(folders, data):
        if one["budget"] != first["budget"]:
            raise UserError(
                f"{folder} has another budget ({one['budget']}) than {folders[0]} ({first['budget']})"
            )
        if odd := {*one["episodes"]} ^ {*first["episodes"]}:
            raise UserError(f"{', '.join(sorted(odd))} took part in only one of {folders[0]} and {folder}")
    tasks = [task for one in data for task in one["tasks"]]
    if twice := sorted({task for task in tasks if tasks.count(task) > 1}):
        raise UserError(
            f"{', '.join(twice)} occurs in more than one of these comparisons; pool each task once"
        )
    episodes = {
        name: [
            [episode for one in data for episode in one["episodes"][name][run]]
            for run in range(min(one["runs"] for one in data))
        ]
        for name in first["episodes"]
    }
    best = {task: value for one in data for task, value in zip(one["tasks"], one["best_known"])}
    seen: dict[str, list[str]] = {}
    for one in data:
        for name, known in one["seen_in_training"].items():
            seen.setdefault(name, []).extend(known)
    return Comparison(episodes, best, seen)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "compare.json"
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no finished comparison ({error})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} is no comparison; compare again, or leave it out of --pool")
    if missing := {"budget", "runs", "tasks", "best_known", "episodes", "seen_in_training"} - {*data}:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}: compare again with this version")
    try:
        data["episodes"] = {
            name: [[_episode(episode) for episode in run] for run in runs]
            for name, runs in data["episodes"].items()
        }
        _check(data)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); compare again, or leave it out of --pool") from error
    return data


def _episode(data: dict[str, Any]) -> Episode:
    return Episode(**{**data, "curve": np.array(data["curve"], dtype=np.float64)})


def _check(data: dict[str, Any]) -> None:
    """``ValueError`` unless every policy has one search of the whole budget for each task and run."""
    if lacking := {*BASELINES} - {*data["episodes"]}:
        raise ValueError(f"{', '.join(sorted(lacking))} took no part")
    if len(data["best_known"]) != len(data["tasks"]) or not all(value > 0 for value in data["best_known"]):
        raise ValueError("best_known is not one speedup for each task")
    for name, runs in data["episodes"].items():
        if len(runs) != data["runs"] or any([e.task for e in run] != data["tasks"] for run in runs):
            raise ValueError(f"{name} has not one search for each task and run")
        curves = [episode.curve for run in runs for episode in run]
        if not all(c.shape == (data["budget"],) and np.isfinite(c).all() for c in curves):
            raise ValueError(f"a curve of {name} has not one number for each evaluation")
    for known in data["seen_in_training"].values():
        list(known)
