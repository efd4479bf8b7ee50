"""Retrieval: that the right documents are found, and nothing that does not apply."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ke_gym.knowledge import Document, Knowledge, Situation, retrieve
from ke_gym.knowledge.document import ANY, LANGUAGES, LIMITERS, PHASES, TARGETS
from ke_gym.strategies import ACTIONS, CONTROLS
from ke_gym.tasks import Task
from tests.knowledge.pairs import HELD_OUT, TOPICS, TUNED, Pair

KNOWLEDGE = Knowledge()
AMPLE = 1 << 20
SITUATIONS = st.builds(
    Situation,
    st.sampled_from(("", *TARGETS)),
    st.sampled_from(("", *LANGUAGES)),
    st.sampled_from(("", *(s.name for s in ACTIONS))),
    st.sampled_from(("", *LIMITERS)),
    st.sampled_from(("", *PHASES)),
    st.text(),
)


def recall_at_5(pairs: Iterable[Pair]) -> float:
    found = [wanted in [d.id for d in KNOWLEDGE.retrieve(s, 5, AMPLE)] for s, wanted in pairs]
    return sum(found) / len(found)


def test_the_right_document_is_among_the_first_five() -> None:
    assert len(TUNED) + len(HELD_OUT) >= 40
    assert recall_at_5(TUNED) >= 0.9
    assert recall_at_5(HELD_OUT) >= 0.9


def test_every_wanted_document_exists() -> None:
    for wanted in [*(id for _, id in TUNED + HELD_OUT), *TOPICS.values()]:
        assert KNOWLEDGE.get(wanted).id == wanted


def test_references_bring_up_the_document_on_their_topic() -> None:
    pairs = []
    for name, wanted in TOPICS.items():
        task = Task.load(name)
        text = f"{task.name} {task.family} {task.description}\n{task.source}"
        pairs.append((Situation("cpu", "cpp", "RESTART", "", "draft", text), wanted))
    assert recall_at_5(pairs) >= 0.9


@given(SITUATIONS, st.integers(0, 8), st.integers(0, 4000))
def test_what_is_retrieved_applies_and_fits(situation: Situation, limit: int, budget: int) -> None:
    found = retrieve(situation, limit, budget)
    assert len(found) <= limit and sum(d.tokens for d in found) <= budget
    assert len({d.id for d in found}) == len(found)
    for document in found:
        for field in ("target", "language", "limiter", "phase"):
            wanted = getattr(situation, field)
            assert not wanted or wanted in document.front_matter(field) or ANY in document.front_matter(field)
        if situation.strategy and situation.strategy not in {s.name for s in CONTROLS}:
            assert situation.strategy in document.strategy or ANY in document.strategy
    assert found == retrieve(situation, limit, budget), "the same situation gets the same documents"


@pytest.mark.parametrize(
    "text", ['"', "a AND (b OR", "NEAR(x y)", "title:x*", "-- ; DROP TABLE pages", "\0", "ß∑"]
)
def test_any_text_is_a_query(text: str) -> None:
    assert retrieve(Situation("cpu", "cpp", "fuse", "dram", "improve", text), 3, AMPLE)


def test_every_situation_of_the_cpu_has_advice() -> None:
    for strategy in ACTIONS[:-1]:
        for limiter in ("", "latency", "compute", "dram", "l3", "l2", "instructions"):
            assert retrieve(Situation("cpu", "cpp", strategy.name, limiter, "improve", "rows"), 3, 3000)


def test_documents_on_another_device_are_left_out() -> None:
    def devices(device: str) -> set[str]:
        found = KNOWLEDGE.search(Situation("cpu", "cpp", device=device))
        return {document.id for document, _ in found if document.device}

    assert devices("AMD EPYC 9575F") == {"hardware/cpu/zen5"}
    assert devices("Intel(R) Xeon(R) Platinum 8480C") == {"hardware/cpu/amx", "hardware/cpu/sapphire-rapids"}
    assert devices("Neoverse-V2") == {"hardware/cpu/arm-neoverse"}
    assert devices("some other processor") == set()
    assert len(devices("")) == 4


def test_a_reranker_has_the_last_word_among_the_best() -> None:
    asked = []

    def contrary(query: str, documents: Sequence[Document]) -> Sequence[float]:
        asked.append(query)
        return [float(d.id == "guidance/argmax") for d in documents]

    situation = Situation(
        "cpu", "cpp", "vectorize", "instructions", "improve", "softmax over rows, a maximum"
    )
    ranked = [d.id for d, _ in Knowledge(reranker=contrary).search(situation)]
    plain = [d.id for d, _ in KNOWLEDGE.search(situation)]
    assert ranked.index("guidance/argmax") < plain.index("guidance/argmax")
    assert sorted(ranked) == sorted(plain)
    assert "softmax over rows" in asked[0]


def test_threads_may_ask_at_the_same_time() -> None:
    situations = [situation for situation, _ in HELD_OUT]
    expected = [retrieve(s, 5, AMPLE) for s in situations]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda s: retrieve(s, 5, AMPLE), situations)) == expected
