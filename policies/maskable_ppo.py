"""MaskablePPO (Huang and Ontanon, arXiv 2006.14171), trained by sb3-contrib: the main learned policy."""

from __future__ import annotations

from ke_gym.policies.network import ActorPolicy


class MaskablePPO(ActorPolicy):
    """Trained with masks, so that probabilities are over legal actions from the first step.

    It learns on the fastest version (batched replay knows no other rule), and searches by ``weighted``: on the
    validation tables that does better than staying with the fastest.
    """

    name = "maskable_ppo"
    parent_rule = "weighted"
    pretrained = "maskable_ppo"
