"""The proposer behind any OpenAI-compatible endpoint: a prompt in, a kernel module out.

One operator for every transformation (the argument of Toledo et al. that KernelEvolve follows: the operator is the
bottleneck, not the search). The prompt says what is known: task, machine, language, the parent with its judgement,
the search so far, notes from the knowledge base, and the strategy that the policy chose. The answer is checked
before it costs an evaluation; what can be mended, the model is asked once to mend.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ke_gym.candidate import Candidate
from ke_gym.errors import UserError
from ke_gym.knowledge import Document, Knowledge, Situation
from ke_gym.proposers import answers, prefilter, prices, prompt, transcript
from ke_gym.proposers.answers import Flaw
from ke_gym.proposers.base import (
    Context,
    EditMode,
    Kind,
    Proposal,
    Proposer,
    ProposerLost,
    Refusal,
    Usage,
)
from ke_gym.proposers.brief import Brief
from ke_gym.proposers.endpoint import Completion, Endpoint, Failure
from ke_gym.proposers.llm import LLM, writable
from ke_gym.proposers.prices import Account, Price, Purse
from ke_gym.proposers.prompt import Prompt
from ke_gym.proposers.schedules import without
from ke_gym.proposers.tiers import Tiers
from ke_gym.strategies import FIX, STRATEGIES, Strategy, get

MENDABLE: tuple[Kind, ...] = ("edit", "syntax", "contract")
"""Flaws that a model can mend when it is told of them; all others end the proposal."""
_EXPECTED_ANSWER = 3000  # tokens, as long as no answer has come
# Strategies that change most of a module: an edit would quote all of it.
_WHOLESALE = ("algorithm_swap", "fission", "matrix_unit")


def check(settings: LLM, dollars: float | None = None) -> None:
    """``UserError`` unless the settings name a model, a key, an endpoint that answers, and readable files, and
    ``dollars`` pay for an answer."""
    table = prices.load(settings.prices)
    Knowledge(settings.knowledge)
    if settings.record:
        writable(settings.record)
    endpoint = Endpoint(replace(settings, record=""))
    try:
        models = named(settings, endpoint)
        affordable(settings, {m: prices.find(table, m, endpoint.url) for m in models}, dollars)
        endpoint.greet()
    finally:
        endpoint.close()


def affordable(settings: LLM, known: dict[str, Price | None], dollars: float | None) -> None:
    """``UserError`` if a limit in dollars is set for a model without a price, or pays for no answer of one."""
    if dollars is None or settings.replay:
        return
    for model, price in known.items():
        if price is None:
            raise UserError(
                f"--max-dollars needs a price for {model!r}, which is not in the table: give one with"
                f' --prices FILE, as {{"{model}": [dollars per million prompt tokens, per million answer'
                " tokens]}"
            )
        least = price.of(0, settings.max_tokens)
        if least > dollars:
            raise UserError(
                f"one answer of {model} may cost ${least:.4f} ({settings.max_tokens} tokens), more than the"
                f" ${max(dollars, 0):.4f} that are left; raise --max-dollars or lower --max-tokens"
            )


def named(settings: LLM, endpoint: Endpoint) -> tuple[str, ...]:
    """The models to ask: those of the settings, or the recorded one."""
    recorded = endpoint.cassette.model if endpoint.cassette and settings.replay else ""
    names = settings.models or ((recorded,) if recorded else ())
    if not names:
        raise UserError(
            "the proposer openai needs a model: name one with --model, for example --model gpt-5-mini"
        )
    return names


class OpenAI(Proposer):
    """Candidates for one task from a language model.

    ``brief`` is what prompts say of task and machine; conversations are kept in ``transcripts`` if it is given.
    Raises ``UserError`` for settings that can't work.
    """

    name = "openai"
    stochastic = True

    def __init__(
        self,
        brief: Brief,
        language: str = "cpp",
        settings: LLM | None = None,
        transcripts: Path | None = None,
    ) -> None:
        self.brief, self.language = brief, language
        self.settings = settings or LLM()
        prompt.contract(language)
        self.endpoint = Endpoint(self.settings)
        self.models = named(self.settings, self.endpoint)
        self.transcripts = transcripts
        self.purse = Purse()
        table = prices.load(self.settings.prices)
        self.prices = {model: prices.find(table, model, self.endpoint.url) for model in self.models}
        self.tiers = Tiers(self.models)
        for model, price in self.prices.items():
            if price is not None:
                self.tiers.expect(model, price.of(5000, _EXPECTED_ANSWER))
        self.knowledge = (
            Knowledge(self.settings.knowledge, self.settings.learned or None)
            if self.settings.use_knowledge
            else None
        )

    @property
    def in_flight(self) -> int:
        return self.settings.in_flight

    @property
    def ordered(self) -> bool:
        return self.endpoint.cassette is not None

    def mask(self, parent: Candidate) -> NDArray[np.bool_]:
        """All, but lower precision only where the task permits it: a model would take it anywhere."""
        mask = np.ones(len(STRATEGIES), dtype=np.bool_)
        task = self.brief.task
        mask[get("precision_math").id] = task.tolerance is not None or task.precision != "strict"
        return mask

    def fund(self, purse: Purse) -> None:
        affordable(self.settings, self.prices, purse.left)
        self.purse = purse

    def assign(self) -> str:
        return self.tiers.choose()

    def release(self, model: str) -> None:
        self.tiers.release(model)

    def learn(self, gain: float, dollars: float, usage: Usage) -> None:
        self.tiers.learn(usage.model, gain, dollars)

    def close(self) -> None:
        self.purse.close()
        self.endpoint.close()

    # One proposal -----------------------------------------------------------------------------------------

    def propose(
        self, parent: Candidate | None, strategy: Strategy, draw: int, context: Context
    ) -> Proposal | Refusal:
        asked = prompt.build(
            self.brief,
            self.language,
            parent,
            strategy,
            context,
            edit=context.edit or self.edit_mode(parent, strategy),
            memory=self.settings.memory,
            documents=self.documents(strategy, context),
        )
        talk = _Conversation(self, context.model or self.models[0], f"{context.number:04d}-{draw}", asked)
        made = talk.candidate(parent, strategy)
        if self.transcripts is not None:
            outcome = (
                f"refused, {made.kind}: {made.reason}" if isinstance(made, Refusal) else made.candidate.id
            )
            facts = {
                "step": context.number,
                "strategy": strategy.name,
                "parent": parent.id if parent else "none",
                "answer": asked.edit,
                "outcome": outcome,
            }
            transcript.write(
                self.transcripts, talk.step, facts, asked, talk.messages, made.usage, made.dollars
            )
        return made

    def edit_mode(self, parent: Candidate | None, strategy: Strategy) -> EditMode:
        """Edits where most of the parent will stay."""
        if parent is None:
            return "rewrite"
        if self.settings.edit_mode != "auto":
            return self.settings.edit_mode
        return "rewrite" if strategy.name in _WHOLESALE else "edit"

    def documents(self, strategy: Strategy, context: Context) -> Sequence[Document]:
        """What the knowledge base has for this situation."""
        if self.knowledge is None:
            return ()
        judged = context.evaluation
        phase = {"FIX": "fix", "RESTART": "draft", "param_tune": "tune"}.get(strategy.name, "improve")
        log = judged.log[:2000] if judged and strategy is FIX else ""
        task = self.brief.task
        text = f"{task.name} {task.family} {task.description}\n{self.brief.source}\n{log}"
        situation = Situation(
            self.brief.target, self.language, strategy.name, judged.limiter if judged else "", phase, text,
            "\n".join(self.brief.machine),
        )  # fmt: skip
        room = prompt.BUDGETS["knowledge"] - 100
        found = self.knowledge.retrieve(situation, prompt.KNOWLEDGE_DOCUMENTS + 1, room)
        # What the contract says already.
        known = f"languages/{self.language}/kernel-module"
        return [document for document in found if document.id != known][: prompt.KNOWLEDGE_DOCUMENTS]


class _Conversation:
    """One prompt, its answer, and the one more exchange that may mend it."""

    def __init__(self, proposer: OpenAI, model: str, step: str, asked: Prompt) -> None:
        self.proposer, self.model, self.step, self.asked = proposer, model, step, asked
        self.messages: list[dict[str, str]] = asked.messages
        self.usage = Usage(model, documents=asked.documents)
        self.account = Account(proposer.purse)

    @property
    def dollars(self) -> float:
        return self.account.paid

    def candidate(self, parent: Candidate | None, strategy: Strategy) -> Proposal | Refusal:
        """Ask, read, and if need be ask once to mend it."""
        completion = self._ask(self.step)
        made = completion if isinstance(completion, Refusal) else self._read(completion, parent)
        if isinstance(made, Flaw) and made.kind in MENDABLE:
            self.messages.append({"role": "user", "content": prompt.repair(self.asked, made.reason)})
            completion = self._ask(f"{self.step}-repair")
            made = completion if isinstance(completion, Refusal) else self._read(completion, parent)
        if isinstance(made, Refusal):
            return made
        if isinstance(made, Flaw):
            return self._refusal(made.kind, made.reason)
        origin = parent.id if parent else None
        kernel = Candidate(made, self.proposer.language, origin, strategy.name, self.proposer.name)
        return Proposal(kernel, self.dollars, self.usage)

    def _ask(self, step: str) -> Completion | Refusal:
        settings = self.proposer.settings
        request: dict[str, Any] = {
            "model": self.model, "messages": list(self.messages), "max_tokens": settings.max_tokens
        }  # fmt: skip
        if settings.temperature is not None:
            request["temperature"] = settings.temperature
        price = self.proposer.prices[self.model] or prices.FREE
        start = time.monotonic()
        before = self.account.unconfirmed
        try:
            reply = self.proposer.endpoint.complete(step, request, price, self.account)
        except ProposerLost as error:
            self.usage = self.usage.plus(
                Usage(
                    self.model,
                    1,
                    seconds=time.monotonic() - start,
                    unconfirmed=self.account.unconfirmed - before,
                )
            )
            error.dollars, error.usage = self.dollars, self.usage
            raise
        seconds, got = time.monotonic() - start, reply.result
        if isinstance(got, Failure):
            called = int(got.kind != "dollars")
            self.usage = self.usage.plus(
                Usage(self.model, called, seconds=seconds, unconfirmed=reply.unconfirmed)
            )
            return self._refusal(got.kind, got.reason)
        counted = Usage(
            self.model, 1, got.prompt_tokens, got.completion_tokens, seconds, unconfirmed=reply.unconfirmed
        )
        self.usage = self.usage.plus(counted)
        self.messages.append({"role": "assistant", "content": got.text or got.declined})
        return got

    def _refusal(self, kind: Kind, reason: str) -> Refusal:
        return Refusal(reason, self.dollars, kind, self.usage)

    def _read(self, completion: Completion, parent: Candidate | None) -> str | Flaw:
        """The module that the answer makes, or its flaw."""
        if completion.declined or completion.finish == "content_filter":
            return Flaw(
                "declined", f"the model declined: {completion.declined[:200] or 'its answer was withheld'}"
            )
        cut = completion.finish == "length"
        answer = answers.parse(completion.text, cut)
        if cut and (isinstance(answer, Flaw) or answer.edits):
            return Flaw("truncated", f"the answer was cut off after {completion.completion_tokens} tokens")
        if isinstance(answer, Flaw):
            return answer
        source: str | Flaw = answer.source
        if answer.edits:
            if parent is None:
                return Flaw("edit", "there is no source to edit; answer with a whole module")
            source = answers.apply(answer.edits, without(parent.source))
        if isinstance(source, Flaw):
            return source
        names = [argument.name for argument in self.proposer.brief.state]
        flaw = prefilter.check(source, self.proposer.language, len(self.proposer.brief.inputs), names)
        return flaw or source.strip("\n") + "\n"
