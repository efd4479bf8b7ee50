"""A schedule travels inside the kernel module it was printed to, as one trailing comment line.

The line holds a hash of the rest: whoever edits the code makes it source without a schedule, which nobody
then mistakes for what the schedule says. Comments and formatting may change freely.
"""

from __future__ import annotations

import re

from ke_gym.candidate import Candidate
from ke_gym.codegen import Schedule

_LINE = re.compile(r"^# schedule ([0-9a-f]{16}) (\{.*\})$")


def attach(source: str, schedule: Schedule) -> str:
    """``source`` with the schedule's line at its end."""
    text = source.rstrip("\n")
    return f"{text}\n\n# schedule {Candidate(text).id} {schedule.to_json()}\n"


def recover(source: str) -> Schedule | None:
    """The schedule that ``attach`` wrote, or None if there is none or the code has been edited since."""
    text, _, last = source.rstrip("\n").rpartition("\n")
    found = _LINE.match(last)
    if found is None or Candidate(text).id != found[1]:
        return None
    try:
        return Schedule.from_json(found[2])
    except ValueError:
        return None


def without(source: str) -> str:
    """``source`` without a schedule's line."""
    text, _, last = source.rstrip("\n").rpartition("\n")
    return text.rstrip("\n") + "\n" if _LINE.match(last) else source
