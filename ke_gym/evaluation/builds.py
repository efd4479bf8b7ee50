"""Builds beside races: who holds which cores, and the artifacts of the last candidates."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ke_gym.candidate import Candidate
from ke_gym.languages.artifact import Artifact

KEPT_ARTIFACTS = 64


class Cores:
    """The machine's cores: builds take one each, a race takes them all. Knows how long anything held one."""

    def __init__(self, cores: int) -> None:
        self._condition = threading.Condition()
        self._cores = cores
        self._builds = 0
        self._racing = False
        self._since = 0.0
        self.busy_s = 0.0

    @contextmanager
    def one(self) -> Iterator[None]:
        with self._counted(lambda: not self._racing and self._builds < self._cores):
            yield

    @contextmanager
    def _counted(self, free: Callable[[], bool]) -> Iterator[None]:
        """One core less for builds, as soon as it is ``free``."""
        with self._condition:
            self._condition.wait_for(free)
            self._start()
            self._builds += 1
        try:
            yield
        finally:
            with self._condition:
                self._builds -= 1
                self._stop()

    @contextmanager
    def all(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._racing and not self._builds)
            self._start()
            self._racing = True
        try:
            yield
        finally:
            with self._condition:
                self._racing = False
                self._stop()

    def _start(self) -> None:
        if not self._builds:
            self._since = time.perf_counter()

    def _stop(self) -> None:
        if not self._builds:
            self.busy_s += time.perf_counter() - self._since
        self._condition.notify_all()


class Builds:
    """The artifacts of the candidates last built, and what the building took, which is told once."""

    def __init__(self, cores: Cores) -> None:
        self._cores = cores
        self._lock = threading.Lock()
        self._artifacts: OrderedDict[str, Artifact] = OrderedDict()
        self._seconds: dict[str, float] = {}

    def build(
        self,
        candidate: Candidate,
        make: Callable[[Candidate], Artifact],
        adopt: Callable[[Candidate, Artifact], None],
    ) -> Artifact:
        """The candidate's artifact, unless it is kept ``make``'s, on one core, which ``adopt`` has to keep.

        Raises whatever they raise.
        """
        with self._lock:
            known = self._artifacts.get(candidate.id)
            if known is not None and known.source == candidate.source:
                self._artifacts.move_to_end(candidate.id)
                return known
        with self._cores.one():
            start = time.perf_counter()
            artifact = make(candidate)
            spent = time.perf_counter() - start
        adopt(candidate, artifact)
        with self._lock:
            self._seconds[candidate.id] = spent
        return artifact

    def keep(self, candidate: Candidate, artifact: Artifact) -> None:
        with self._lock:
            self._artifacts[candidate.id] = artifact
            while len(self._artifacts) > KEPT_ARTIFACTS:
                self._artifacts.popitem(last=False)

    def artifact(self, candidate_id: str) -> Artifact | None:
        """The artifact of a candidate, if it is still kept."""
        with self._lock:
            return self._artifacts.get(candidate_id)

    def seconds(self, candidate_id: str) -> float:
        """What building a candidate took; 0 if it was not built since this was last asked."""
        with self._lock:
            return self._seconds.pop(candidate_id, 0.0)
