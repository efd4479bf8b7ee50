"""MaskablePPO (Huang and Ontanon, arXiv 2006.14171), trained by sb3-contrib: the main learned policy."""

from __future__ import annotations

from ke_gym.policies.network import ActorPolicy


class MaskablePPO(ActorPolicy):
    """Trained with masks, so that probabilities are over legal actions from the first step, by what is gained over the
    best alone: nothing is paid for staying safe.
    """

    name = "maskable_ppo"
    pretrained = "maskable_ppo"
