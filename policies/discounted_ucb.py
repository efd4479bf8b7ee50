"""Discounted UCB, for strategies that stop paying (Garivier and Moulines, arXiv 0805.3415)."""

from __future__ import annotations

from ke_gym.policies.ucb1 import UCB1

DISCOUNT = 0.95


class DiscountedUCB(UCB1):
    """UCB1 over statistics that fade by ``DISCOUNT`` a step: a strategy used up on one kernel may pay on the
    next."""

    name = "discounted_ucb"

    def observe(self, action: int, value: float) -> None:
        self.counts *= DISCOUNT
        self.squares *= DISCOUNT
        super().observe(action, value)
