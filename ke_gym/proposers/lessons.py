"""Lessons in a model's words: sentences that generalize what was measured, and nothing that was not.

The model gets what the rule distilled (``knowledge.learned.distill``) as numbered facts and is asked once for a few
sentences. Its answer is parsed strictly, and a sentence stays only if the facts it names show what it claims. The
evidence of a lesson is the measured one in any case.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from ke_gym.errors import UserError
from ke_gym.knowledge.document import injection
from ke_gym.knowledge.learned import ENOUGH, Claim, Lesson, Sentence
from ke_gym.proposers import prices, prompt, transcript
from ke_gym.proposers.base import Usage
from ke_gym.proposers.endpoint import Endpoint, Failure
from ke_gym.proposers.llm import LLM
from ke_gym.proposers.prices import Account, Purse
from ke_gym.strategies import STRATEGIES

logger = logging.getLogger(__name__)

MOST = 5
"""Sentences of one session."""
LONGEST = 240  # characters of a sentence
SHORTEST = 20
ANSWER = 4000  # tokens, thoughts included
PATIENCE = 60.0
"""Seconds that one call for lessons may take; a failed one is repeated once."""
_FACTS = 30
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?")
_FENCED = re.compile(r"\A```(?:json)?\n(.*)\n```\Z", re.DOTALL)
_MARKUP = re.compile(r"[\n\r|#`<>\[\]{}]")
_NAMES = re.compile("|".join(rf"\b{strategy.name}\b" for strategy in STRATEGIES), re.IGNORECASE)


@dataclass(frozen=True)
class Said:
    """One sentence of an answer: the lessons (by place) that it rests on, its claim, its words."""

    facts: tuple[int, ...]
    claim: Claim
    text: str


def facts(lessons: Sequence[Lesson]) -> list[tuple[str, str]]:
    """What a model is told of the lessons: name and figures of each."""
    return [(f"F{number}", lesson.fact()) for number, lesson in enumerate(lessons, 1)]


def generalize(
    lessons: Sequence[Lesson],
    task: str,
    settings: LLM,
    purse: Purse,
    book: Callable[[float, Usage], None],
    transcripts: Path,
) -> list[Lesson]:
    """The lessons of one session with a model's sentences added; as they are, with a warning in the log, where none
    can be had.

    Asks the first model of ``settings`` once, pays from ``purse``, and tells ``book`` the dollars and usage, whatever
    comes of it.
    """
    known = sorted(lessons, key=lambda lesson: -lesson.tries)
    told = [lesson for lesson in known if lesson.tries >= ENOUGH][:_FACTS]
    if not told:
        return list(lessons)
    try:
        answer = _ask(told, task, settings, purse, book, transcripts)
        said, dropped = parse(answer, told)
    except (UserError, ValueError) as error:
        logger.warning("the lessons of this search are the rule's alone: %s", error)
        return list(lessons)
    for reason in dropped:
        logger.warning("a lesson that the model wrote was dropped: %s", reason)
    more: dict[str, list[Sentence]] = {}
    for sentence in said:
        for place in sentence.facts:
            more.setdefault(told[place].path, []).append(Sentence(sentence.claim, sentence.text))
    return [replace(lesson, sentences=tuple(more.get(lesson.path, ()))) for lesson in lessons]


def _ask(
    told: Sequence[Lesson],
    task: str,
    settings: LLM,
    purse: Purse,
    book: Callable[[float, Usage], None],
    transcripts: Path,
) -> str:
    """The answer; ``ValueError`` says why there is none."""
    first = told[0]
    part = prompt.render(
        "lessons", "lessons.jinja", f"{len(told)} facts of this search",
        task=task, family=first.family, language=first.language, target=first.target, facts=facts(told),
        most=MOST, longest=LONGEST,
    )  # fmt: skip
    asked = prompt.Prompt((part,), "rewrite", ())
    messages = [{"role": "user", "content": part.text}]
    model, account, start = settings.models[0], Account(purse), time.monotonic()
    used = Usage(model)
    endpoint = Endpoint(
        replace(settings, timeout=min(settings.timeout, PATIENCE), retries=min(settings.retries, 1))
    )
    try:
        used = Usage(model, 1)  # until the answer is there
        price = prices.find(prices.load(settings.prices), model, endpoint.url) or prices.FREE
        request: dict[str, Any] = {
            "model": model,
            "messages": messages,
            "max_tokens": min(settings.max_tokens, ANSWER),
        }
        got = endpoint.complete("lessons", request, price, account).result
        if isinstance(got, Failure):
            used = Usage(model, int(got.kind != "dollars"))
            raise ValueError(got.reason)
        used = Usage(model, 1, got.prompt_tokens, got.completion_tokens)
        messages.append({"role": "assistant", "content": got.text or got.declined})
        if got.finish == "length":
            raise ValueError(f"the model's answer was cut off after {got.completion_tokens} tokens")
        return got.text
    finally:
        used = replace(used, seconds=time.monotonic() - start, unconfirmed=account.unconfirmed)
        book(account.paid, used)
        endpoint.close()
        transcript.write(transcripts, "lessons", {"step": "lessons"}, asked, messages, used, account.paid)


def parse(answer: str, told: Sequence[Lesson]) -> tuple[list[Said], list[str]]:
    """The sentences of an answer that ``told`` supports, and one reason for each that was dropped.

    ``ValueError`` for an answer that is not of the form asked for.
    """
    fenced = _FENCED.match(answer.strip())
    try:
        data = json.loads(fenced[1] if fenced else answer)
    except ValueError as error:
        raise ValueError(f"the model's answer is not the JSON that was asked for ({error})") from None
    entries = data.get("lessons") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("the model's answer is no JSON object with a list of lessons")
    if len(entries) > MOST:
        raise ValueError(f"the model's answer has {len(entries)} lessons instead of at most {MOST}")
    said, dropped = [], []
    for entry in entries:
        try:
            said.append(_checked(entry, told))
        except ValueError as error:
            dropped.append(str(error))
    return said, dropped


def _checked(entry: dict[str, Any], told: Sequence[Lesson]) -> Said:
    """One entry of an answer; ``ValueError`` says what is wrong with it."""
    if entry.keys() != {"facts", "claim", "lesson"}:
        raise ValueError(
            f"it has the fields {', '.join(sorted(map(str, entry)))} instead of facts, claim and lesson"
        )
    named, claim, text = entry["facts"], entry["claim"], entry["lesson"]
    names = {name: place for place, (name, _) in enumerate(facts(told))}
    if not isinstance(named, list) or not named or not all(isinstance(n, str) and n in names for n in named):
        raise ValueError(f"it names {named!r}, which are no facts")
    if claim not in get_args(Claim):
        raise ValueError(f"its claim is {claim!r}")
    if (
        not isinstance(text, str)
        or not SHORTEST <= len(text) <= LONGEST
        or not text.isprintable()
        or _MARKUP.search(text)
        or injection(text)
    ):
        raise ValueError(f"it is not one plain sentence of at most {LONGEST} characters")
    cited = [told[names[name]] for name in named]
    if contrary := next((lesson for lesson in cited if not lesson.supports(claim)), None):
        raise ValueError(f'it claims "{claim}", and the measured fact is: {contrary.fact()}')
    others = {name.lower() for name in _NAMES.findall(text)} - {lesson.strategy for lesson in cited}
    if others:
        raise ValueError(f"it speaks of {', '.join(sorted(others))} and names no fact of that")
    measured = {float(n) for lesson in cited for n in _NUMBER.findall(lesson.fact())}
    figures = {n for n in _NUMBER.findall(text) if float(n) not in measured}
    if figures:
        raise ValueError(f"its figures {', '.join(sorted(figures))} were not measured")
    return Said(tuple(dict.fromkeys(names[name] for name in named)), claim, text)
