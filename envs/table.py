"""Replay tables: the recorded searches of one task, as arrays in one compressed file.

Nodes are versions of the kernel, edges (parent, action, draw) lead to children, and every node keeps the raw times
of all its races. What was never recorded is not in a table and is never guessed. A table belongs to one machine,
one baseline, one version of the harness and one of the observation.

Sources: NAS-Bench-101 (a query draws one recorded repeat and charges the recorded time), Kernel Tuner's cache files
(all raw times; another device's are refused), the T4 schema (outcomes).
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import COMPARABLE, HARNESS_VERSION, OUTCOMES
from ke_gym.files import write_whole
from ke_gym.search.observation import CODE, HARDWARE, PROFILE, SPACES_VERSION, TASK, Surroundings
from ke_gym.strategies import ACTIONS, RESTART, STRATEGIES

FORMAT = 1
REFERENCE = -1
"""As a parent: the reference. As a rival: nothing but the baseline was raced."""
REFUSED, REPEATED = -1, -2
"""As a child: the strategy did not apply; it only repeated candidates already tried."""
NO_RACE = -2
"""As a rival: no race of its own (it failed, or shares its binary with another version)."""

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Table:
    """Recorded searches of one task: ``n`` versions, ``d`` of them drafts, ``e`` edges, ``r`` repeats.

    Speedups are natural logs of baseline time over candidate time. A repeat is a block of paired rounds of a race.
    """

    task: str
    task_id: str
    family: str
    target: str
    baseline: str
    machine: str
    threads: int
    surroundings: Surroundings
    candidates: tuple[str, ...]
    sources: tuple[str, ...]
    languages: tuple[str, ...]
    outcomes: NDArray[np.int8]
    """Index into ``OUTCOMES``, shape (n,)."""
    log_speedup: Doubles
    """The verdict, shape (n,); 0 where nothing was measured."""
    log_interval: Doubles
    """Its 95 % interval, shape (n, 2)."""
    rivals: Integers
    """The node that each raced when it was judged, shape (n,); ``REFERENCE`` or ``NO_RACE`` where there is none."""
    improved: NDArray[np.bool_]
    """Whether it was confirmed faster than its rival, shape (n,)."""
    costs: Floats
    """Seconds to compile, check and race, shape (n, 3)."""
    code: Floats
    """The observation's ``code`` part, shape (n, 14), as of a draft: its distance to the root is in ``distances``."""
    drafts: Integers
    """The nodes made from the reference, shape (d,)."""
    distances: Floats
    """From every node to every draft, shape (n, d)."""
    profile: Floats
    """The observation's ``profile`` part, shape (n, 12)."""
    edges: Integers
    """(parent, action, draw, child), shape (e, 4), sorted; a refusal is the last of its parent and action."""
    dollars: Floats
    """What each edge's proposal cost, shape (e,)."""
    repeats: Integers
    """(node, rounds) of each repeat, shape (r, 2), sorted by node."""
    noise: Floats
    """The log-speedup of each repeat over the mean of its node's repeats, shape (r,)."""
    times: NDArray[np.int64]
    """Nanoseconds of candidate and baseline in each round, shape (rounds, 2), repeat after repeat."""
    harness: int = HARNESS_VERSION
    """The version of the harness that measured it."""

    def __len__(self) -> int:
        return len(self.candidates)

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        return np.asarray(self.outcomes == OUTCOMES.index("correct"))

    @property
    def median(self) -> float:
        """The speedup of the median correct version; 1 if there is none."""
        return math.exp(float(np.median(self.log_speedup[self.correct]))) if self.correct.any() else 1.0

    @cached_property
    def champion(self) -> int:
        """The best version known: the one whose interval ends highest at its lower end; -1 if none is correct."""
        low = np.where(self.correct, self.log_interval[:, 0], -np.inf)
        return int(low.argmax()) if self.correct.any() else -1

    @property
    def optimum(self) -> float:
        """The speedup of the champion; at least 1, the reference's own."""
        return max(math.exp(float(self.log_speedup[self.champion])), 1.0) if self.champion >= 0 else 1.0

    @cached_property
    def depths(self) -> Integers:
        """Fewest edges from the reference, shape (n,)."""
        depths = np.full(len(self), np.iinfo(np.int32).max, dtype=np.int32)
        frontier, depth = {REFERENCE}, 0
        kept = self.edges[self.edges[:, 3] >= 0]
        while frontier:
            depth += 1
            children = kept[np.isin(kept[:, 0], list(frontier)), 3]
            frontier = {int(child) for child in children if depths[child] > depth}
            depths[list(frontier)] = depth
        return depths

    def coverage(self) -> list[float]:
        """For each depth from 1: the mean share of the 22 strategies recorded on its correct versions."""
        tried = np.zeros((len(self), len(STRATEGIES)), dtype=np.bool_)
        plain = self.edges[(self.edges[:, 0] >= 0) & (self.edges[:, 1] < len(STRATEGIES))]
        tried[plain[:, 0], plain[:, 1]] = True
        depths = self.depths[self.correct]
        share = tried[self.correct].mean(axis=1)
        return [float(share[depths == d].mean()) for d in sorted(set(depths.tolist()))]

    @cached_property
    def hash(self) -> str:
        """Of all it holds: policies name the tables they were trained on by it."""
        digest = hashlib.sha256()
        for name, value in sorted(self._content().items()):
            digest.update(name.encode())
            digest.update(
                str((value.dtype.str, value.shape)).encode() if isinstance(value, np.ndarray) else b""
            )
            digest.update(value.tobytes() if isinstance(value, np.ndarray) else value)
        return digest.hexdigest()[:16]

    def _content(self) -> dict[str, NDArray[Any] | bytes]:
        head = {
            "format": FORMAT, "harness": self.harness, "spaces": SPACES_VERSION,
            **{name: getattr(self, name) for name in _TEXTS}, "threads": self.threads,
            "actions": [action.name for action in ACTIONS], "candidates": self.candidates,
            "languages": self.languages,
        }  # fmt: skip
        return {
            "head": json.dumps(head, sort_keys=True).encode(),
            "sources": json.dumps(self.sources).encode(),
            "task_features": self.surroundings.task,
            "hardware_features": self.surroundings.hardware,
            **{name: getattr(self, name) for name in _ARRAYS},
        }

    # Files ------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the table, whole or not at all; ``UserError`` if it cannot be written."""
        content = self._content()
        content["hash"] = self.hash.encode()
        # All versions of a kernel are alike, and only lzma's window is large enough to see it.
        content["sources"] = lzma.compress(bytes(content["sources"]), preset=6)
        arrays = {
            name: np.frombuffer(value, dtype=np.uint8) if isinstance(value, bytes) else value
            for name, value in content.items()
        }
        path = Path(path)
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, packed.getvalue())
        except OSError as error:
            raise UserError(f"the table {path} cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> Table:
        """The table at ``path``, verified; ``UserError`` for one that is damaged or of another version."""
        content = _read(path)
        try:
            return cls._from_content(content, str(path))
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, lzma.LZMAError) as error:
            raise UserError(f"the table {path} is damaged ({error}); record it again") from error

    @staticmethod
    def family_of(path: str | Path) -> str:
        """The operator family of the table at ``path``, of which only the head is read; ``UserError`` as for ``load``."""
        content = _read(path, ("head",))
        try:
            return str(json.loads(content["head"].tobytes())["family"])
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"the table {path} is damaged ({error}); record it again") from error

    @classmethod
    def _from_content(cls, content: Mapping[str, NDArray[Any]], path: str) -> Table:
        head = json.loads(content["head"].tobytes())
        _check_versions(head, path)
        arrays: dict[str, Any] = {name: content[name] for name in _ARRAYS}
        made = cls(
            **{name: head[name] for name in _TEXTS},
            threads=int(head["threads"]),
            harness=int(head["harness"]),
            surroundings=Surroundings(content["task_features"], content["hardware_features"]),
            candidates=tuple(head["candidates"]),
            languages=tuple(head["languages"]),
            sources=tuple(json.loads(lzma.decompress(content["sources"].tobytes()))),
            **arrays,
        )
        made.check()
        if made.hash != content["hash"].tobytes().decode():
            raise ValueError("its content does not fit its hash")
        return made

    def check(self) -> None:
        """``ValueError`` unless everything fits together."""
        n, d, e, r = len(self), len(self.drafts), len(self.edges), len(self.repeats)
        shapes = {
            "outcomes": (n,), "log_speedup": (n,), "log_interval": (n, 2), "rivals": (n,), "improved": (n,),
            "costs": (n, 3), "code": (n, len(CODE)), "drafts": (d,), "distances": (n, d),
            "profile": (n, len(PROFILE)), "edges": (e, 4), "dollars": (e,), "repeats": (r, 2), "noise": (r,),
            "times": (int(self.repeats[:, 1].sum()), 2),
        }  # fmt: skip
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value.shape != shape or value.dtype != _ARRAYS[name]:
                raise ValueError(f"{name} is {value.dtype} of shape {value.shape}")
        if self.surroundings.task.shape != (len(TASK),) or self.surroundings.hardware.shape != (
            len(HARDWARE),
        ):
            raise ValueError("the surroundings have another shape")
        if not len(self.sources) == len(self.languages) == n:
            raise ValueError("there is not one source for each version")
        parents, actions, _, children = self.edges.T
        _within(parents, REFERENCE, n, "an edge's parent")
        _within(children, REPEATED, n, "an edge's child")
        _within(actions, 0, len(ACTIONS) - 1, "an edge's action")
        _within(self.outcomes, 0, len(OUTCOMES), "an outcome")
        _within(self.rivals, NO_RACE, n, "a rival")
        _within(self.repeats[:, 0], 0, n, "a repeat's version")
        if np.any((parents == REFERENCE) != (actions == RESTART.id)):
            raise ValueError("drafts, and only drafts, are made from the reference")
        made = np.unique(children[(parents == REFERENCE) & (children >= 0)])
        if not np.array_equal(made, np.sort(self.drafts)):
            raise ValueError("the drafts are not the children of the reference")
        order = np.lexsort((children < 0, actions, parents))
        if not np.array_equal(order, np.arange(e)) or np.any(np.diff(self.repeats[:, 0]) < 0):
            raise ValueError("its rows are not in order")
        for name in ("log_speedup", "costs", "code", "distances", "profile", "dollars", "noise"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} holds what is no number")


_TEXTS = ("task", "task_id", "family", "target", "baseline", "machine")
_ARRAYS: dict[str, Any] = {
    "outcomes": np.int8, "log_speedup": np.float64, "log_interval": np.float64, "rivals": np.int32,
    "improved": np.bool_, "costs": np.float32, "code": np.float32, "drafts": np.int32, "distances": np.float32,
    "profile": np.float32, "edges": np.int32, "dollars": np.float32, "repeats": np.int32, "noise": np.float32,
    "times": np.int64,
}  # fmt: skip
assert {*_TEXTS, *_ARRAYS} <= {field.name for field in fields(Table)}


def _read(path: str | Path, names: tuple[str, ...] | None = None) -> dict[str, NDArray[Any]]:
    """The arrays of these names (None: all) in the file of a table."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names or file.files}
    except FileNotFoundError:
        raise UserError(f"there is no table {path}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, RuntimeError) as error:
        # zipfile raises NotImplementedError, a RuntimeError, for methods that it does not know.
        raise UserError(f"the table {path} cannot be read ({error}); record it again") from error


def _check_versions(head: Mapping[str, Any], path: str) -> None:
    if head["format"] != FORMAT:
        raise UserError(
            f"the table {path} has format {head['format']}, this program reads {FORMAT}: record it again"
        )
    if not COMPARABLE <= head["harness"] <= HARNESS_VERSION:
        raise UserError(
            f"the table {path} was measured by harness version {head['harness']}, this is {HARNESS_VERSION}: verdicts"
            " and times of different versions do not compare, so record it again"
        )
    if head["spaces"] != SPACES_VERSION:
        raise UserError(
            f"the table {path} has observations of version {head['spaces']}, this is {SPACES_VERSION}: make it again"
            " from its store (scripts/record.py --from)"
        )
    if head["actions"] != [action.name for action in ACTIONS]:
        raise UserError(f"the table {path} was recorded with other actions: record it again")


def _within(values: NDArray[Any], low: int, high: int, what: str) -> None:
    if values.size and not (low <= values.min() and values.max() < high):
        raise ValueError(f"{what} is out of range")
