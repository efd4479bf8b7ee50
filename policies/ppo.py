"""PPO (Schulman et al., arXiv 1707.06347), trained by stable-baselines3."""

from __future__ import annotations

from ke_gym.policies.network import ActorPolicy


class PPO(ActorPolicy):
    """Trained without masks: it learns what is illegal from penalties. Here illegal logits are dropped."""

    name = "ppo"
    pretrained = "ppo"
