"""A machine's permanent record: its measured peaks, and every A/A race it ever ran.

An A/A race pits the incumbent against its own copy. Its spread is the machine's noise floor, which widens the
margin a gain must clear, and its false-positive rate says whether the machine's verdicts can be believed.
(ARCHITECTURE.md, "How a verdict is reached".)
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ke_gym.evaluation.evaluation import HARNESS_VERSION
from ke_gym.files import write_whole
from ke_gym.targets.cpu import Peaks

MIN_MARGIN = 0.01
RECENT = 200
FEW = 10
ALIKE = 4.0  # calls up to this many times shorter or longer are as noisy
UNKNOWN_FLOOR = 0.01
CONFIRMATIONS = 5


def home() -> Path:
    """Where records, caches and the store live: ``$KE_GYM_HOME``, else the user's cache folder."""
    chosen = os.environ.get("KE_GYM_HOME")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ke_gym"


@dataclass(frozen=True)
class AARace:
    """One race of equals: seconds of a call, the median log-ratio it showed, and whether it was called a gain."""

    when: float
    task: str
    threads: int
    seconds: float
    log_ratio: float
    rounds: int
    false_positive: bool
    harness: int = HARNESS_VERSION


class MachineRecord:
    """Append-only files under ``home()/machines/<fingerprint>``; safe to share between processes."""

    def __init__(self, fingerprint: str, folder: Path | None = None) -> None:
        self.fingerprint = fingerprint
        self.folder = (folder or home()) / "machines" / fingerprint
        self.folder.mkdir(parents=True, exist_ok=True)
        self._races = self._read()

    def peaks(self, threads: int, measure: Callable[[int], Peaks], again: bool = False) -> Peaks:
        """The kept peaks for this many threads, measured now if there are none.

        ``again`` measures once more and keeps the better of both: a busy machine measures low.
        """
        path = self.folder / f"peaks-{threads}.json"
        kept = Peaks.from_json(path.read_text()) if path.exists() else None
        if kept is not None and not again:
            return kept
        peaks = measure(threads)
        if kept is not None:
            rates = tuple((s, max(r, dict(kept.bandwidth).get(s, 0.0))) for s, r in peaks.bandwidth)
            peaks = Peaks(threads, rates, max(kept.fp32, peaks.fp32), max(kept.fp64, peaks.fp64))
        write_whole(path, peaks.to_json().encode())
        return peaks

    def add(
        self, task: str, threads: int, seconds: float, log_ratio: float, rounds: int, false_positive: bool
    ) -> None:
        race = AARace(time.time(), task, threads, seconds, log_ratio, rounds, false_positive)
        self._races.append(race)
        # One write, on a line of its own even where a crash cut the last one short.
        with (self.folder / "aa.jsonl").open("ab", buffering=0) as file:
            file.write(f"\n{json.dumps(asdict(race))}\n".encode())

    @property
    def races(self) -> list[AARace]:
        return self._races[-RECENT:]

    def spread(self, seconds: float) -> float:
        """95th percentile of |log-ratio| between equals in one race.

        From races whose calls took about as many ``seconds``: ten microseconds of noise are much to a short
        call and nothing to a long one.
        """
        alike = self._alike(seconds)
        if len(alike) < FEW:
            return UNKNOWN_FLOOR * math.sqrt(CONFIRMATIONS)
        return float(np.quantile([abs(r.log_ratio) for r in alike], 0.95))

    def floor(self, seconds: float) -> float:
        """``spread`` of a mean over ``CONFIRMATIONS`` processes."""
        return self.spread(seconds) / math.sqrt(CONFIRMATIONS)

    def knows(self, seconds: float) -> bool:
        """Whether there are enough races of such calls to tell their floor."""
        return len(self._alike(seconds)) >= FEW

    def _alike(self, seconds: float) -> list[AARace]:
        return [r for r in self._races if seconds / ALIKE <= r.seconds <= seconds * ALIKE][-RECENT:]

    def margin(self, seconds: float) -> float:
        """What a gain's interval must clear, as a log-ratio: max(1 %, 2 x the A/A floor of such calls)."""
        return max(MIN_MARGIN, 2 * self.floor(seconds))

    @property
    def false_positives(self) -> tuple[int, int]:
        """(false positives, races) of the recent record."""
        return sum(r.false_positive for r in self.races), len(self.races)

    def sentence(self, seconds: float) -> str:
        """The record in words, for a report of such calls; says so when the machine can't be believed."""
        wrong, total = self.false_positives
        if total == 0:
            return "no A/A race on this machine yet"
        text = f"{wrong} of {total} A/A races called a gain; noise floor {100 * self.floor(seconds):.2g} %"
        if total >= FEW and wrong > max(1, 0.03 * total):
            text += " — MORE than an honest machine should: treat small gains here as noise"
        return text

    def _read(self) -> list[AARace]:
        path = self.folder / "aa.jsonl"
        races = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                race = AARace(**json.loads(line))
            except (ValueError, TypeError):
                continue  # an empty line, or one cut short by a crash
            if race.harness == HARNESS_VERSION:
                races.append(race)
        return races
