"""An LLM chooses the strategy, through any OpenAI-compatible endpoint.

The control that KernelBand's ablation asks for (arXiv 2511.18868): is a bandit better at choosing than the
model that writes the code? ``OPENAI_BASE_URL``, ``OPENAI_API_KEY`` and ``OPENAI_MODEL`` name the endpoint, which is
asked as by the proposer: retried, censored, given up when it is lost.
"""

from __future__ import annotations

import logging
import os
import re
import time
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_gym.errors import UserError
from ke_gym.policies.base import Observation, Policy, transformations
from ke_gym.policies.features import part, pressures
from ke_gym.proposers import prices
from ke_gym.proposers.base import NOTHING, OutOfDollars, Usage
from ke_gym.proposers.endpoint import Endpoint, Failure
from ke_gym.proposers.llm import LLM
from ke_gym.proposers.prices import Account, Price, Purse
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
    choices have cost, as far as the price of the model is known; in a search they count toward its budget, and
    ``OutOfDollars`` says that no further choice can be paid.
    """

    name = "llm_chooser"
    learned = ("history", "fallbacks", "dollars")
    positive = ("timeout",)
    unsigned = ("retries",)

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
        self._purse = Purse()
        self._prices = ""
        self._bill: tuple[float, Usage] = (0.0, NOTHING)
        self.begin()

    def __getstate__(self) -> dict[str, Any]:
        # A copy opens its own, and has no money that is not its own.
        return self.__dict__ | {"_endpoint": None, "_purse": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_purse": Purse()})

    def fund(self, purse: Purse, prices: str = "") -> None:
        """Pay for choices from ``purse``, by the price table that the file ``prices`` overrules; ``UserError``
        where there is a limit, and the model has no known price or one answer may cost more than is left."""
        self._purse, self._prices = purse, prices
        self._check_model()
        self._open()
        price = self._price()
        if purse.left is None:
            return
        if price is None:
            raise UserError(
                f"--max-dollars needs a price for {self.model!r}, which chooses the strategies (OPENAI_MODEL) and"
                " is not in the table: give one with --prices FILE"
            )
        least = price.of(0, ANSWER)
        if least > purse.left:
            raise UserError(
                f"one choice by {self.model} may cost ${least:.4f}, more than the ${max(purse.left, 0):.4f} that are"
                " left; raise --max-dollars or use another policy"
            )

    def bill(self) -> tuple[float, Usage]:
        """Dollars and usage since the last bill."""
        owed, self._bill = self._bill, (0.0, NOTHING)
        return owed

    def begin(self) -> None:
        self.history: list[str] = []

    def choose(self, observation: Observation, mask: NDArray[np.bool_], deterministic: bool) -> int:
        self._check_model()
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

    def _check_model(self) -> None:
        if not self.model:
            raise UserError(
                "the policy llm_chooser needs a model: set OPENAI_MODEL (and OPENAI_BASE_URL and OPENAI_API_KEY),"
                " or use another policy"
            )

    def _open(self) -> Endpoint:
        if self._endpoint is None:
            self._endpoint = Endpoint(self._settings)
            weakref.finalize(self, self._endpoint.close)
        return self._endpoint

    def _price(self) -> Price | None:
        return prices.find(prices.load(self._prices), self.model, self._open().url)

    def _ask(self, prompt: str) -> str:
        """The answer; ``ValueError`` says why there is none."""
        request = {
            "model": self.model,
            "messages": [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": prompt}],
            "max_tokens": ANSWER,
            "temperature": 0.0,
        }
        account, start, asked, tokens = Account(self._purse), time.monotonic(), 1, (0, 0)
        try:
            got = (
                self._open()
                .complete(str(len(self.history)), request, self._price() or prices.FREE, account)
                .result
            )
            if isinstance(got, Failure):
                asked = int(got.kind != "dollars")
            else:
                tokens = got.prompt_tokens, got.completion_tokens
        finally:  # Ctrl-C may come while the model thinks, which costs nevertheless
            seconds = time.monotonic() - start
            used = Usage(self.model, asked, *tokens, seconds, unconfirmed=account.unconfirmed)
            self.dollars += account.paid
            self._bill = (self._bill[0] + account.paid, self._bill[1].plus(used))
        if isinstance(got, Failure):
            if got.kind == "dollars":
                raise OutOfDollars
            raise ValueError(got.reason)
        return got.text


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
