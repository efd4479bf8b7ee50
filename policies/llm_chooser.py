"""An LLM chooses the strategy, through any OpenAI-compatible endpoint.

The control that KernelBand's ablation asks for (arXiv 2511.18868): is a bandit better at choosing than the
model that writes the code? ``OPENAI_BASE_URL``, ``OPENAI_API_KEY`` and ``OPENAI_MODEL`` name the endpoint.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import urllib.request
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_gym.errors import UserError
from ke_gym.policies.base import Observation, Policy, transformations
from ke_gym.policies.features import part, pressures
from ke_gym.search.run import Transition
from ke_gym.strategies import ACTIONS

logger = logging.getLogger(__name__)

REMEMBERED = 12  # latest steps told to the model
_NAMES = re.compile("|".join(rf"\b{a.name}\b" for a in ACTIONS))
_SYSTEM = (
    "You steer the optimization of one compute kernel. Choose the one strategy whose measured gain will"
    ' most likely be largest now. Answer with JSON only: {"strategy": "<name>"}.'
)


class LLMChooser(Policy):
    """Shows the model the legal strategies with their prompt text, the profile and what happened so far.

    Where the endpoint fails or names no legal strategy, a legal action is drawn at random: logged as a
    warning, and kept in ``fallbacks`` (one sentence each), which the saved policy carries.
    """

    name = "llm_chooser"
    learned = ("history", "fallbacks")

    def __init__(
        self,
        seed: int = 0,
        url: str = "",
        model: str = "",
        language: str = "cpp",
        timeout: float = 60.0,
    ) -> None:
        super().__init__(seed)
        self.url = (url or os.environ.get("OPENAI_BASE_URL", "")).rstrip("/")
        self.model = model or os.environ.get("OPENAI_MODEL", "")
        self.language, self.timeout = language, timeout
        self.fallbacks: list[str] = []
        self.begin()

    def begin(self) -> None:
        self.history: list[str] = []

    def choose(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> int:
        if not self.url or not self.model:
            raise UserError(
                "the policy llm_chooser needs an endpoint: set OPENAI_BASE_URL and OPENAI_MODEL (and"
                " OPENAI_API_KEY), or use another policy"
            )
        legal = transformations(mask)
        if len(legal) == 1:
            return int(legal[0])
        try:
            return parse(self._ask(self.prompt(observation, legal)), legal)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = f"step {len(self.history) + 1}: {error}"
            self.fallbacks.append(reason)
            logger.warning("the model did not choose, a random strategy was taken: %s", reason)
            return int(legal[0] if deterministic else self.rng.choice(legal))

    def update(self, transition: Transition) -> None:
        outcome = transition.info.get("outcome") or transition.info.get("refusal", "done")
        name = ACTIONS[transition.action].name
        self.history.append(f"{name}: {outcome}, gain {transition.reward:+.3f} (log)")

    def prompt(self, observation: Observation, legal: NDArray[np.int64]) -> str:
        """The user message: legal strategies, limits of the parent, recent steps."""
        lines = ["Strategies you may choose:"]
        for action in legal.tolist():
            strategy = ACTIONS[action]
            lines.append(
                f"- {strategy.name} (when: {strategy.precondition}) {strategy.prompt(self.language)}"
            )
        busy = pressures(observation)
        if busy is not None:
            lines.append(
                "Utilization of the present kernel: " + ", ".join(f"{k} {v:.0%}" for k, v in busy.items())
            )
        lines.append(f"Budget left: {float(part(observation, 'history')[0]):.0%}.")
        lines.append("Steps so far, latest last:" if self.history else "Nothing has been tried yet.")
        lines += self.history[-REMEMBERED:]
        return "\n".join(lines)

    def _ask(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": prompt}],
            "temperature": 0.0,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.url}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            data: Any = json.loads(response.read(1 << 20))
        try:
            return str(data["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"the endpoint's answer holds no message: {str(data)[:200]}") from error


def parse(answer: str, legal: NDArray[np.int64]) -> int:
    """The legal action an answer names: by its JSON, or as the only one mentioned; else ``ValueError``."""
    by_name = {ACTIONS[action].name: int(action) for action in legal}
    found = re.search(r'"strategy"\s*:\s*"([^"]*)"', answer)
    named = {found.group(1)} if found else {*_NAMES.findall(answer)}
    if len(named) != 1:
        raise ValueError(f"the answer names {len(named)} strategies instead of one: {answer[:120]!r}")
    (name,) = named
    if name not in by_name:
        raise ValueError(f"the answer names {name!r}, which is not legal here")
    return by_name[name]
