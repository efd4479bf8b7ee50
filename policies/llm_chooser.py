"""An LLM chooses the strategy, through any OpenAI-compatible endpoint.

The control that KernelBand's ablation asks for (arXiv 2511.18868): is a bandit better at choosing than the
model that writes the code? ``OPENAI_BASE_URL``, ``OPENAI_API_KEY`` and ``OPENAI_MODEL`` name the endpoint, which is
asked as by the proposer: retried, censored, given up when it is lost.
"""

from __future__ import annotations

import logging
import os
import re
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_gym.errors import UserError
from ke_gym.policies.base import Observation, Policy, transformations
from ke_gym.policies.features import part, pressures
from ke_gym.proposers import prices
from ke_gym.proposers.endpoint import Endpoint, Failure
from ke_gym.proposers.llm import LLM
from ke_gym.search.run import Transition
from ke_gym.strategies import ACTIONS

logger = logging.getLogger(__name__)

REMEMBERED = 12  # latest steps told to the model
ANSWER = 4000  # tokens, thoughts included
_NAMES = re.compile("|".join(rf"\b{a.name}\b" for a in ACTIONS))
_SYSTEM = (
    "You steer the optimization of one compute kernel. Choose the one strategy whose measured gain will"
    ' most likely be largest now. Answer with JSON only: {"strategy": "<name>"}.'
)


class LLMChooser(Policy):
    """Shows the model the legal strategies with their prompt text, the profile and what happened so far.

    Where the endpoint fails or names no legal strategy, a legal action is drawn at random: logged as a
    warning, and kept in ``fallbacks`` (one sentence each), which the saved policy carries. One that is lost (it
    can't be reached, refuses the key, or fails again and again) raises ``UserError``. ``dollars`` is what the
    choices have cost, as far as the price of the model is known.
    """

    name = "llm_chooser"
    learned = ("history", "fallbacks", "dollars")

    def __init__(
        self,
        seed: int = 0,
        url: str = "",
        model: str = "",
        language: str = "cpp",
        timeout: float = 60.0,
        retries: int = 4,
    ) -> None:
        super().__init__(seed)
        self.model = model or os.environ.get("OPENAI_MODEL", "")
        self.language = language
        self.fallbacks: list[str] = []
        self.dollars = 0.0
        self._settings = LLM((self.model,), url, max_tokens=ANSWER, timeout=timeout, retries=retries)
        self._endpoint: Endpoint | None = None
        self.begin()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_endpoint": None}  # a copy opens its own

    def begin(self) -> None:
        self.history: list[str] = []

    def choose(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> int:
        if not self.model:
            raise UserError(
                "the policy llm_chooser needs a model: set OPENAI_MODEL (and OPENAI_BASE_URL and OPENAI_API_KEY),"
                " or use another policy"
            )
        legal = transformations(mask)
        if len(legal) == 1:
            return int(legal[0])
        try:
            return parse(self._ask(self.prompt(observation, legal)), legal)
        except ValueError as error:
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
        """The answer; ``ValueError`` says why there is none."""
        if self._endpoint is None:
            self._endpoint = Endpoint(self._settings)
            weakref.finalize(self, self._endpoint.close)
        request = {
            "model": self.model,
            "messages": [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": prompt}],
            "max_tokens": ANSWER,
            "temperature": 0.0,
        }
        price = prices.find(prices.load(), self.model, self._endpoint.url) or prices.FREE
        reply = self._endpoint.complete(str(len(self.history)), request, price)
        self.dollars += reply.dollars
        if isinstance(reply.result, Failure):
            raise ValueError(reply.result.reason)
        return reply.result.text


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
