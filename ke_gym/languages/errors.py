"""Why a kernel module could not be built."""

from __future__ import annotations


class BuildError(Exception):
    """``outcome`` is an evaluation's word ("compile", "constraints", "correctness"); ``log`` says why."""

    def __init__(self, outcome: str, log: str) -> None:
        super().__init__(log)
        self.outcome = outcome
        self.log = log

    def __reduce__(self) -> tuple[type[BuildError], tuple[str, str]]:
        return BuildError, (self.outcome, self.log)
