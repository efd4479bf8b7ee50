"""Candidates compiled on one machine and raced on another: a batch is one file, and its results are one file.

A bundle holds the tasks' sources and the candidates' artifacts, as data: the machine that races them needs no
compiler, and treats artifacts as it treats those of its own compile sandbox. Reading a bundle runs nothing; racing
one runs its tasks' references, which are as trusted as the person who made it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.evaluation import gpu_signature
from ke_gym.evaluation.builder import BUILD_SECONDS, Builder
from ke_gym.evaluation.contest import left_out
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.evaluation.record import home
from ke_gym.evaluation.zygote import Zygote
from ke_gym.files import write_whole
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.base import BuildError
from ke_gym.languages.device import get_arch
from ke_gym.tasks.task import Task

VERSION = 3
_PLAIN = 2
"""The version that had its tasks' shapes as plain JSON; still read."""
_MAGIC = b"KEBUNDLE\0"
_TASK = ("name", "source", "path", "family", "description", "precision", "tolerance", "backward", "shapes")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


@dataclass(frozen=True)
class Packed:
    """One candidate for one task: its artifact, or why it has none. ``label`` is the caller's own name for it.

    ``rival`` is the incumbent to race it against, with its artifact; ``final``: it is a search's winner
    (``Evaluator.final``).
    """

    label: str
    task: int
    candidate: Candidate
    artifact: Artifact | None = None
    outcome: str = "correct"
    log: str = ""
    rival: tuple[Candidate, Artifact] | None = None
    final: bool = False


@dataclass(frozen=True)
class Bundle:
    """Tasks, and candidates compiled for GPUs of one architecture; ``baseline`` is what they want to be raced against."""

    arch: str
    tasks: tuple[Task, ...]
    packed: tuple[Packed, ...] = ()
    baseline: str = "eager"

    def to_bytes(self) -> bytes:
        """A JSON header and the artifacts. Raises ``UserError`` for a task that can't travel."""
        blobs = [
            [p.artifact.to_bytes() if p.artifact else b"", p.rival[1].to_bytes() if p.rival else b""]
            for p in self.packed
        ]
        header = {
            "version": VERSION,
            "arch": self.arch,
            "baseline": self.baseline,
            "tasks": [_described(task) for task in self.tasks],
            "packed": [
                {
                    "label": p.label,
                    "task": p.task,
                    "candidate": asdict(p.candidate),
                    "outcome": p.outcome,
                    "log": p.log,
                    "rival": asdict(p.rival[0]) if p.rival else None,
                    "final": p.final,
                    "bytes": [len(blob) for blob in pair],
                }
                for p, pair in zip(self.packed, blobs)
            ],
        }
        text = json.dumps(header).encode()
        flat = [blob for pair in blobs for blob in pair]
        return b"".join([_MAGIC, len(text).to_bytes(8, "little"), text, *flat])

    @classmethod
    def from_bytes(cls, data: bytes) -> Bundle:
        """The inverse of ``to_bytes``. Raises ``ValueError`` for anything else."""
        start = len(_MAGIC) + 8
        if data[: len(_MAGIC)] != _MAGIC or len(data) < start:
            raise ValueError("it does not begin like one")
        end = start + int.from_bytes(data[len(_MAGIC) : start], "little")
        try:
            header = json.loads(data[start:end])
            if header["version"] not in (_PLAIN, VERSION):
                raise ValueError(f"it is of version {header['version']!r}, this is version {VERSION}")
            tasks = tuple(_task(entry, header["version"] == _PLAIN) for entry in header["tasks"])
            packed = []
            for entry in header["packed"]:
                artifacts: list[Artifact | None] = []
                for size in entry["bytes"]:
                    blob = data[end : end + size]
                    end += size
                    artifacts.append(Artifact.from_bytes(blob) if blob else None)
                packed.append(_unpacked(entry, tasks, *artifacts))
            arch, baseline = str(header["arch"]), str(header["baseline"])
        except (LookupError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"it is damaged: {error!r}") from error
        if end != len(data):
            raise ValueError("it is cut off")
        return cls(arch, tasks, tuple(packed), baseline)

    def write(self, path: Path) -> None:
        """Write the file in one step. Raises ``UserError`` if it can't be written."""
        write_file(path, self.to_bytes())

    @classmethod
    def read(cls, path: Path) -> Bundle:
        """Raises ``UserError`` for a file that is no bundle."""
        try:
            return cls.from_bytes(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} is no bundle ({error}); make one with --bundle FILE --compile-only"
            ) from error


def _described(task: Task) -> dict[str, Any]:
    """The inverse of ``_task``. Raises ``UserError``."""
    if task.payload:
        raise UserError(f"task {task.name} is a live module; only task files travel in a bundle")
    shapes: dict[str, dict[str, Any]] = {}
    for name, overrides in task.shapes.items():
        shapes[name] = {}
        for key, value in overrides.items():
            try:
                shapes[name][key] = _encoded(value)
            except TypeError as error:
                raise UserError(
                    f"task {task.name}: shape set {name!r} sets {key} to {value!r}, which can't travel in a bundle "
                    f"({error}); use numbers, strings, dtypes, and tuples, lists or dicts of them"
                ) from error
    return {key: getattr(task, key) for key in _TASK} | {"shapes": shapes}


def _task(entry: dict[str, Any], plain: bool) -> Task:
    known = {key: entry[key] for key in _TASK}
    if not plain:
        known["shapes"] = {
            name: {key: _decoded(value) for key, value in overrides.items()}
            for name, overrides in known["shapes"].items()
        }
    return Task(**known)


def _encoded(value: Any) -> Any:
    """A global of a task file as JSON, which tells no tuple from a list and has no dtypes. Raises ``TypeError``."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if type(value) in (list, tuple):
        held = [_encoded(each) for each in value]
        return held if type(value) is list else {"tuple": held}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _encoded(each) for key, each in value.items()}}
    raise TypeError(f"a {type(value).__name__}")


def _decoded(value: Any) -> Any:
    """The inverse of ``_encoded``. Raises ``ValueError``."""
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    if not isinstance(value, dict):
        return value
    match list(value.items()):
        case [("tuple", list(held))]:
            return tuple(_decoded(each) for each in held)
        case [("dict", dict(named))]:
            return {key: _decoded(each) for key, each in named.items()}
        case [("dtype", str(name))] if name in _DTYPES:
            return _DTYPES[name]
    raise ValueError("a shape set has a value of an unknown kind")


def _unpacked(
    entry: dict[str, Any], tasks: Sequence[Task], artifact: Artifact | None, rival: Artifact | None
) -> Packed:
    if not 0 <= entry["task"] < len(tasks):
        raise ValueError("a candidate is for a task that is not there")
    against = (Candidate(**entry["rival"]), rival) if entry["rival"] and rival is not None else None
    return Packed(
        str(entry["label"]), entry["task"], Candidate(**entry["candidate"]), artifact,
        str(entry["outcome"]), str(entry["log"]), against, bool(entry["final"]),
    )  # fmt: skip


def compile_bundle(
    work: Sequence[tuple[str, Task, Candidate]],
    arch: str = "",
    folder: Path | None = None,
    build_timeout: float = BUILD_SECONDS,
    multiprocessors: int = 0,
) -> Bundle:
    """Build (label, task, candidate) each, as many side by side as there are cores; no GPU is needed."""
    known = get_arch(arch)
    tasks = tuple({task.id: task for _, task, _ in work}.values())
    numbers = {task.id: number for number, task in enumerate(tasks)}
    cores = len(os.sched_getaffinity(0))
    with Zygote(1) as zygote, ThreadPoolExecutor(cores) as pool:
        builder = Builder(zygote, (folder or home()) / "builds")

        def signature(task: Task) -> bytes:
            return gpu_signature.found(zygote, task, [*task.public_shapes("cuda"), *task.hidden_shapes()])

        signatures = dict(zip((task.id for task in tasks), pool.map(signature, tasks)))

        def build(one: tuple[str, Task, Candidate]) -> Packed:
            label, task, candidate = one
            try:
                artifact = builder.build(
                    candidate.source, signatures[task.id], candidate.language, "cuda", build_timeout, known.name,
                    multiprocessors,
                )  # fmt: skip
            except BuildError as error:
                return Packed(label, numbers[task.id], candidate, None, error.outcome, error.log)
            return Packed(label, numbers[task.id], candidate, artifact)

        return Bundle(known.name, tasks, tuple(pool.map(build, work)))


@dataclass(frozen=True)
class Judged:
    """The evaluation of one packed candidate."""

    label: str
    evaluation: Evaluation


def run_bundle(
    bundle: Bundle,
    open_evaluator: Callable[[Task], Evaluator],
    tell: Callable[[Judged], None] = lambda judged: None,
) -> list[Judged]:
    """Race every candidate of a bundle, task by task, on all GPUs at once; ``tell`` hears of each in turn.

    Raises ``UserError`` if the bundle was made for another architecture than this device's.
    """
    judged: list[Judged] = []
    for number, task in enumerate(bundle.tasks):
        waiting = [p for p in bundle.packed if p.task == number]
        with open_evaluator(task) as evaluator, ThreadPoolExecutor(evaluator.devices) as pool:
            for one in pool.map(partial(judge, evaluator, bundle), waiting):
                judged.append(one)
                tell(one)
    return judged


def judge(evaluator: Evaluator, bundle: Bundle, packed: Packed) -> Judged:
    """Race one candidate of a bundle; see ``run_bundle``."""
    _fits(bundle.arch, getattr(evaluator.facts, "arch", ""))
    return Judged(packed.label, _judge(evaluator, packed))


def _judge(evaluator: Evaluator, packed: Packed) -> Evaluation:
    if packed.artifact is not None:
        try:
            evaluator.adopt(packed.candidate, packed.artifact)
            if packed.final:
                return evaluator.final(packed.candidate)
            if packed.rival is None:
                return evaluator.evaluate(packed.candidate)
            try:
                evaluator.adopt(*packed.rival)
            except BuildError as failure:
                return left_out(evaluator.evaluate(packed.candidate), failure.log)
            return evaluator.evaluate(packed.candidate, packed.rival[0])
        except BuildError as error:
            packed = Packed(packed.label, packed.task, packed.candidate, None, error.outcome, error.log)
    return Evaluation(
        evaluator.task.name, evaluator.target, packed.candidate.language, packed.candidate.id,
        packed.outcome, log=packed.log,  # type: ignore[arg-type]
    )  # fmt: skip


def _fits(made_for: str, here: str) -> None:
    plain = made_for.rstrip("a")
    if plain != here:
        raise UserError(
            f"the bundle was compiled for {made_for}, this device is {here or 'no GPU'}; compile it with --arch "
            f"{here or 'ARCH'}"
        )


def results(judged: Iterable[Judged], machine: dict[str, Any]) -> str:
    """The results' file: one JSON object."""
    found = [{"label": j.label, "evaluation": json.loads(j.evaluation.to_json())} for j in judged]
    return json.dumps({"version": VERSION, "machine": machine, "results": found}, indent=1)


def read_results(text: str) -> list[Judged]:
    """The inverse of ``results``. Raises ``ValueError``."""
    try:
        data = json.loads(text)
        return [
            Judged(entry["label"], Evaluation.from_json(json.dumps(entry["evaluation"])))
            for entry in data["results"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"no results of a bundle: {error!r}") from error


def write_file(path: Path, data: bytes) -> None:
    """Write a file in one step: who waits for it never sees half of it. Raises ``UserError``."""
    try:
        write_whole(path, data)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from error
