"""Warm starts: which recorded kernels are offered, how often, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ke_gym.candidate import Candidate
from ke_gym.codegen.capture import capture
from ke_gym.codegen.features import Features
from ke_gym.errors import UserError
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.proposers.base import Context, Proposal
from ke_gym.proposers.warm import ALIKE, MOST, Profile, Record, WarmStart, choose, similarity
from ke_gym.search.store import Setting, Store
from ke_gym.strategies import RESTART, get
from ke_gym.tasks import Task, resolve
from tests.search.fakes import FakeProposer

SUITE = {task.name: task for task in resolve("suite")}


def profile(name: str) -> Profile:
    return Profile.of_text(SUITE[name].source, "cpu")


NORM = """
import torch
from torch import nn


class {model}(nn.Module):
    def __init__(self, {size}):
        super().__init__()
        self.{weight} = nn.Parameter(torch.ones({size}))

    def forward(self, {x}):
        {body}


Model = {model}
N, D = {rows}, 2048


def get_inputs():
    return [torch.randn(N, D)]


def get_init_inputs():
    return [D]
"""
BY_HAND = (
    "{s} = {x}.pow(2).mean(-1, keepdim=True)\n        return {x} * torch.rsqrt({s} + 1e-6) * self.{weight}"
)
BY_NAME = "return nn.functional.rms_norm({x}, ({x}.shape[-1],), self.{weight}, 1e-6)"


def norm(body: str, rows: int, **names: str) -> str:
    return NORM.format(body=body.format(**names), rows=rows, **names)


def graph(task: Task) -> Features:
    return Features.of(capture(task, task.contract("cpu")))


@pytest.fixture(scope="module")
def graphs() -> dict[str, Features]:
    chosen = ("rms_norm", "rms_norm_bf16", "layer_norm", "group_norm", "residual_scale", "bias_gelu",
              "activation_chain", "swiglu", "softmax", "conv1d", "matmul_bias_gelu", "matmul_skinny")  # fmt: skip
    return {name: graph(SUITE[name]) for name in chosen}


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Task]]:
    """A norm; the same one under other names; the same one spelled otherwise; the same one for other sizes."""
    folder = tmp_path_factory.mktemp("norms")
    plain = {"model": "Model", "size": "size", "weight": "weight", "x": "x", "s": "s"}
    renamed = {"model": "Squash", "size": "wide", "weight": "alpha", "x": "values", "s": "energy"}
    sources = {
        "norm": norm(BY_HAND, 1500, **plain),
        "renamed": norm(BY_HAND, 1500, **renamed),
        "spelled": norm(BY_NAME, 1500, **plain),
        "smaller": norm(BY_HAND, 512, **plain),
    }
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    yield {name: Task.load(folder / f"{name}.py") for name in sources}


def nearest(one: Features, others: dict[str, Features]) -> list[str]:
    mine = Profile.of_graph(one)
    return sorted(others, key=lambda name: -similarity(mine, Profile.of_graph(others[name])))


def test_a_renamed_copy_is_nearest_by_its_graph_which_its_text_does_not_show(
    graphs: dict[str, Features], variants: dict[str, Task]
) -> None:
    found = {name: graph(task) for name, task in variants.items()}
    others = {**graphs, **{name: known for name, known in found.items() if name != "norm"}}
    assert nearest(found["norm"], others)[0] == "renamed" and found["renamed"] == found["norm"]
    assert set(nearest(found["norm"], others)[:4]) >= {"renamed", "spelled", "rms_norm"}
    # Calls in the text are other ones where F.rms_norm is called.
    texts = [Profile.of_text(variants[name].source, "cpu") for name in ("norm", "spelled")]
    assert (
        similarity(*texts) < ALIKE <= similarity(*(Profile.of_graph(found[n]) for n in ("norm", "spelled")))
    )


def test_a_norm_is_nearer_to_norms_than_to_what_is_pointwise(graphs: dict[str, Features]) -> None:
    order = nearest(graphs["rms_norm"], graphs)
    assert order[:2] == ["rms_norm", "rms_norm_bf16"]
    first_pointwise = min(
        order.index(n) for n in ("residual_scale", "bias_gelu", "activation_chain", "swiglu")
    )
    assert max(order.index(n) for n in ("layer_norm", "group_norm")) < first_pointwise
    assert graphs["rms_norm"].structure == {"reduces:last": 1} and graphs["rms_norm"].sizes["reduced"] == 2048
    assert nearest(graphs["matmul_bias_gelu"], graphs)[1] == "matmul_skinny"
    assert graphs["matmul_bias_gelu"].structure == {"contracts:product": 1}
    assert graphs["matmul_bias_gelu"].sizes["contracted"] == 512


def test_features_survive_the_store_and_choose_the_kernels(
    tmp_path: Path, graphs: dict[str, Features], variants: dict[str, Task]
) -> None:
    with Store(tmp_path / "store.db") as store:
        for number, name in enumerate(("renamed", "smaller")):
            task, candidate = variants[name], Candidate(f"x = {number}")
            store.add_task(task)
            store.add_features(task.id, "cpu", graph(task))
            store.add_candidate(candidate)
            verdict = Evaluation(task.name, "cpu", "cpp", candidate.id, "correct", speedup=2.0)
            store.add_evaluation(Setting(task.id, "cpu", "a", "eager", 2), verdict)
        task = variants["norm"]
        assert store.features(task.id, "cpu") is None
        store.add_features(task.id, "cpu", graph(task))
        mine = store.features(task.id, "cpu")
        assert mine == graph(task)
        # The other sizes' kernel does not claim to be general.
        assert [c.source for c in choose(task, "cpu", store.leaders("cpu"), mine)] == ["x = 0"]
    assert Features.from_json(graph(task).to_json().replace('"format": 1', '"format": 0')) is None


def record(task: Task, number: int, speedup: float, head: str = "", task_id: str = "") -> Record:
    return Record(task_id or task.id, task.source, Candidate(f"{head}\nx = {number}"), speedup)


def test_the_profile_is_of_operators_and_of_the_sizes_on_the_target() -> None:
    found = profile("softmax")
    assert found.operators == {"softmax": 1}
    assert found.sizes == {"ROWS": 2048, "COLS": 2048}
    assert Profile.of_text(SUITE["softmax"].source, "cuda").sizes == {"ROWS": 16384, "COLS": 32768}
    assert Profile.of_text("not python (", "cpu") == Profile.of_text("", "cpu")


def test_similar_tasks_are_told_from_others() -> None:
    for one, other in (("bias_gelu", "bias_gelu_bf16"), ("layer_norm", "layer_norm_backward")):
        assert similarity(profile(one), profile(other)) >= ALIKE
    assert (
        similarity(profile("softmax"), profile("conv1d"))
        == similarity(profile("residual_scale"), profile("rms_norm"))
        == 0
    )
    for name in SUITE:
        if profile(name).operators:
            assert similarity(profile(name), profile(name)) == pytest.approx(1)
    small = replace(profile("softmax"), sizes={"ROWS": 1024, "COLS": 1024})
    assert similarity(profile("softmax"), small) == pytest.approx(0.8)


@given(st.sampled_from(sorted(SUITE)), st.sampled_from(sorted(SUITE)))
def test_similarity_is_symmetric_and_bounded(one: str, other: str) -> None:
    forth, back = similarity(profile(one), profile(other)), similarity(profile(other), profile(one))
    assert forth == pytest.approx(back) and 0 <= forth <= 1 + 1e-9


def test_its_own_kernels_come_first_and_strangers_only_if_they_fit() -> None:
    task = SUITE["softmax"]
    resized = task.source.replace('"ROWS": 2048', '"ROWS": 2000')
    assert resized != task.source
    kernels = [
        Record("other", resized, Candidate("x = 1"), 9.0),  # other sizes, and not general
        Record("other", resized, Candidate("general = True\nx = 2"), 8.0),
        record(task, 3, 1.5),
        record(task, 4, 2.5),
        record(SUITE["conv1d"], 5, 9.0, "general = True"),
    ]
    chosen = choose(task, "cpu", kernels)
    assert [c.source.strip()[-1] for c in chosen] == ["4", "3", "2"]
    assert {c.proposer for c in chosen} == {"warm"}
    assert len(choose(task, "cpu", [record(task, n, 1.0 + n) for n in range(20)])) == MOST


def test_the_store_knows_the_leaders(tmp_path: Path) -> None:
    task = SUITE["softmax"]
    with Store(tmp_path / "store.db") as store:
        store.add_task(task)
        for number, (speedup, target) in enumerate(
            [(1.5, "cpu"), (3.0, "cpu"), (2.0, "cpu"), (9.0, "cuda"), (0.5, "cpu")]
        ):
            candidate = Candidate(f"x = {number}")
            store.add_candidate(candidate)
            for machine in "ab":
                verdict = Evaluation(task.name, target, "cpp", candidate.id, "correct", speedup=speedup)
                store.add_evaluation(Setting(task.id, target, machine, "eager", 2), verdict)
        found = store.leaders("cpu")
        assert [(r.task, r.candidate.source, r.speedup) for r in found] == [
            (task.id, "x = 1", 3.0), (task.id, "x = 2", 2.0),
        ]  # fmt: skip
        assert [r.speedup for r in store.leaders("cpu", per_task=9)] == [3.0, 2.0, 1.5]
        assert store.leaders("hip") == []


KERNELS = [Candidate(f"warm = {n}", proposer="warm") for n in range(3)]


@given(st.integers(0, 1000), st.sampled_from((0.0, 0.1, 0.5, 1.0)))
def test_kernels_are_offered_once_each_at_the_rate_and_the_rest_is_as_without(seed: int, rate: float) -> None:
    inner, context = FakeProposer(), Context(seed)
    proposer = WarmStart(inner, KERNELS, rate)
    made = [proposer.propose(None, RESTART, draw, context) for draw in range(40)]
    sources = [m.candidate.source for m in made if isinstance(m, Proposal)]
    warm = [s for s in sources if s.startswith("warm")]
    assert warm == [k.source for k in KERNELS][: len(warm)]
    assert len(warm) == {0.0: 0, 1.0: 3}.get(rate, len(warm))
    others = [s for s in sources if not s.startswith("warm")]
    plain = [inner.propose(None, RESTART, draw, context) for draw in range(40)]
    assert others == [m.candidate.source for m in plain if isinstance(m, Proposal)][: len(others)]
    assert made == [proposer.propose(None, RESTART, draw, context) for draw in range(40)], (
        "a resumed search repeats"
    )


def test_transformations_are_the_inner_proposers() -> None:
    inner = FakeProposer()
    proposer = WarmStart(inner, KERNELS, 1.0)
    parent = Candidate("x = 1")
    fuse = get("fuse")
    assert proposer.propose(parent, fuse, 0, Context()) == inner.propose(parent, fuse, 0, Context())
    assert (proposer.mask(parent) == inner.mask(parent)).all()
    assert proposer.name == inner.name and proposer.in_flight == inner.in_flight


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_a_rate_is_a_probability(rate: float) -> None:
    with pytest.raises(UserError, match="from 0"):
        WarmStart(FakeProposer(), [], rate)
