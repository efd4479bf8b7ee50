"""What a search may spend: evaluations, seconds, dollars."""

from __future__ import annotations

from dataclasses import dataclass

from ke_gym.errors import UserError


@dataclass(frozen=True)
class Spent:
    """What a search has spent: evaluations told, wall-clock seconds, dollars paid to a proposer."""

    evaluations: int = 0
    seconds: float = 0.0
    dollars: float = 0.0


@dataclass(frozen=True)
class Budget:
    """Limits of one search; None means no limit of that kind, but at least one is needed.

    Every told evaluation counts, inner evaluations of ``param_tune`` and failures included.
    """

    evaluations: int | None = 60
    seconds: float | None = None
    dollars: float | None = None

    def __post_init__(self) -> None:
        limits = {"evaluations": self.evaluations, "seconds": self.seconds, "dollars": self.dollars}
        if all(limit is None for limit in limits.values()):
            raise UserError("a search needs a budget: evaluations, seconds or dollars")
        for name, limit in limits.items():
            if limit is not None and not limit > 0:
                raise UserError(f"a budget of {limit} {name} buys nothing; give a positive number")

    @classmethod
    def asked(
        cls,
        evaluations: int | None,
        seconds: float | None,
        dollars: float | None,
        before: Budget | None = None,
    ) -> Budget:
        """The limits that are given; in the place of those left out (None) what a search that is resumed had ``before``,
        and of a new one 60 evaluations."""
        usual = before or cls()
        return cls(
            usual.evaluations if evaluations is None else evaluations,
            usual.seconds if seconds is None else seconds,
            usual.dollars if dollars is None else dollars,
        )

    def _shares(self, spent: Spent) -> dict[str, float]:
        pairs = {
            "evaluations": (spent.evaluations, self.evaluations),
            "seconds": (spent.seconds, self.seconds),
            "dollars": (spent.dollars, self.dollars),
        }
        return {name: used / limit for name, (used, limit) in pairs.items() if limit is not None}

    def left(self, spent: Spent) -> float:
        """The share of the scarcest limit that is left, in [0, 1]."""
        return max(0.0, 1.0 - max(self._shares(spent).values()))

    def exhausted(self, spent: Spent) -> str | None:
        """The name of a limit that is reached, or None."""
        return next((name for name, share in self._shares(spent).items() if share >= 1.0), None)
