from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ke_gym import proposers, strategies
from ke_gym.candidate import Candidate
from ke_gym.codegen import Group, Schedule
from ke_gym.codegen.schedule import Plan
from ke_gym.errors import UserError
from ke_gym.proposers import Context, Proposal, Refusal, Trial, text
from ke_gym.proposers.rewriter import Rewriter, present, simpler, tuned_from
from ke_gym.proposers.schedules import attach, recover, without
from ke_gym.strategies import FIX, RESTART, STRATEGIES
from ke_gym.tasks import Task
from tests.search.fakes import evaluation

TASK = """
import torch
import torch.nn as nn


class Model(nn.Module):
    def forward(self, x):
        return torch.softmax(x * 2.0, dim=-1) + 1.0


def get_inputs():
    return [torch.randn(64, 96)]


def get_init_inputs():
    return []
"""

FOREIGN = '''
import torch
from ke_gym import lang

kernels = lang.cpp(r"""
constexpr int64_t TILE = 64;
#define UNROLL 4
extern "C" void twice(const float* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = 2 * x[i];
}
""", flags="-O2")


def forward(x):
    out = torch.empty_like(x)
    kernels.twice(x, out, x.numel())
    return out
'''


@pytest.fixture(scope="module")
def rewriter(tmp_path_factory: pytest.TempPathFactory) -> Rewriter:
    path = tmp_path_factory.mktemp("task") / "scaled_softmax.py"
    path.write_text(TASK)
    return Rewriter(Task.load(path))


@pytest.fixture(scope="module")
def draft(rewriter: Rewriter) -> Candidate:
    return made(rewriter.propose(None, RESTART, 0, Context()))


def made(answer: Proposal | Refusal) -> Candidate:
    assert isinstance(answer, Proposal), answer
    return answer.candidate


def test_the_schedule_is_recovered_from_the_text_alone(rewriter: Rewriter, draft: Candidate) -> None:
    assert recover(draft.source) == rewriter.seeds[0]
    assert draft.source.splitlines()[-1].startswith("# schedule ")
    assert Candidate(without(draft.source)).id == draft.id


def test_comments_keep_the_schedule_and_edits_lose_it(rewriter: Rewriter, draft: Candidate) -> None:
    assert recover("# a remark\n" + draft.source) == rewriter.seeds[0]
    assert recover(draft.source.replace("def forward(x):", "def forward(x):\n    x = x + 0")) is None
    assert recover(without(draft.source)) is None
    damaged = attach("x = 1", rewriter.seeds[0]).replace('"plans"', '"plan"')
    assert recover(damaged) is None


def test_the_mask_says_exactly_what_can_be_applied(rewriter: Rewriter, draft: Candidate) -> None:
    mask = rewriter.mask(draft)
    assert mask.shape == (22,) and mask.any() and not mask.all()
    for strategy in STRATEGIES:
        answer = rewriter.propose(draft, strategy, 0, Context())
        assert isinstance(answer, Proposal) == mask[strategy.id], strategy.name
        if isinstance(answer, Proposal):
            child = answer.candidate
            assert child.id != draft.id
            assert (child.parent, child.strategy, child.proposer) == (draft.id, strategy.name, "rewriter")
            assert recover(child.source) is not None


@pytest.mark.parametrize("strategy", [RESTART, *STRATEGIES], ids=lambda s: s.name)
def test_equal_questions_get_equal_answers(
    rewriter: Rewriter, draft: Candidate, strategy: strategies.Strategy
) -> None:
    parent = None if strategy is RESTART else draft
    for draw in (0, 3):
        first, second = (rewriter.propose(parent, strategy, draw, Context(seed=5)) for _ in range(2))
        assert first == second


def test_drafts_beyond_the_seeds_differ_by_seed(rewriter: Rewriter) -> None:
    draws = range(len(rewriter.seeds), len(rewriter.seeds) + 6)
    one = [made(rewriter.propose(None, RESTART, draw, Context(seed=1))).id for draw in draws]
    two = [made(rewriter.propose(None, RESTART, draw, Context(seed=2))).id for draw in draws]
    assert one != two and len(set(one)) > 1


def test_tuning_never_repeats_a_setting_and_learns_from_its_siblings(
    rewriter: Rewriter, draft: Candidate
) -> None:
    tune, trials = strategies.get("param_tune"), []
    for draw in range(12):
        context = Context(0, evaluation(draft, 1.0), tuple(trials))
        child = made(rewriter.propose(draft, tune, draw, context))
        judged = evaluation(child, None, "compile") if draw == 2 else evaluation(child, 1.0 + draw / 10)
        trials.append(Trial(child, None if draw == 5 else judged))
    settings = [
        present(rewriter.program, schedule) for t in trials if (schedule := recover(t.candidate.source))
    ]
    assert len({repr(sorted(setting.items())) for setting in settings}) == 12


def test_tuning_goes_on_where_the_tuning_of_its_parent_stood(rewriter: Rewriter, draft: Candidate) -> None:
    tune = strategies.get("param_tune")
    child = made(rewriter.propose(draft, tune, 0, Context(0, evaluation(draft, 1.0))))
    judged = evaluation(child, 1.2)
    ancestors = (Trial(draft, evaluation(draft, 1.0)),)
    for draw in range(12):  # never back to where the draft stood
        again = rewriter.propose(child, tune, draw, Context(0, judged, ancestors=ancestors))
        assert made(again).id not in (draft.id, child.id)
    assert tuned_from(child, ancestors) == list(ancestors)
    assert tuned_from(replace(child, strategy="fuse"), ancestors) == []


def test_tuning_of_text_turns_compiler_flags_too(rewriter: Rewriter) -> None:
    foreign = Candidate(FOREIGN.replace("constexpr", "").replace("#define UNROLL 4\n", ""))
    assert text.flags(foreign.source) == ("-O2",)
    tune, trials = strategies.get("param_tune"), []
    while isinstance(
        child := rewriter.propose(foreign, tune, len(trials), Context(0, None, tuple(trials))), Proposal
    ):
        trials.append(Trial(child.candidate, evaluation(child.candidate, 1.0)))
    seen = {text.flags(trial.candidate.source) for trial in trials}
    legal = {
        ("-O3",), ("-O2", "-funroll-loops"), ("-O2", "-mprefer-vector-width=256"),
        ("-O2", "-mprefer-vector-width=512"),
    }  # fmt: skip
    assert seen == legal  # each once; fast math only where the task allows it


def test_repairs_simplify_and_run_out(rewriter: Rewriter, draft: Candidate) -> None:
    broken = made(rewriter.propose(draft, strategies.get("vectorize"), 0, Context()))
    schedule = recover(broken.source)
    assert schedule is not None and list(simpler(schedule))
    assert made(rewriter.propose(broken, FIX, 0, Context())).id != broken.id
    assert isinstance(rewriter.propose(broken, FIX, 99, Context()), Refusal)


def test_foreign_source_is_rewritten_as_text(rewriter: Rewriter) -> None:
    foreign = Candidate(FOREIGN)
    mask = rewriter.mask(foreign)
    names = {strategy.name for strategy in STRATEGIES if mask[strategy.id]}
    assert names == {"tile_block", "unroll_ilp", "vectorize", "param_tune"}
    tiled = made(rewriter.propose(foreign, strategies.get("tile_block"), 0, Context()))
    assert "TILE = 128;" in tiled.source
    wide = made(rewriter.propose(foreign, strategies.get("vectorize"), 0, Context()))
    assert "-O2 -mprefer-vector-width=512" in wide.source
    tuned = made(rewriter.propose(foreign, strategies.get("param_tune"), 0, Context()))
    assert tuned.id != foreign.id
    fixed = made(rewriter.propose(foreign, FIX, 0, Context()))
    assert "flags" not in fixed.source


def test_a_schedule_that_does_not_fit_the_task_is_not_believed(rewriter: Rewriter, draft: Candidate) -> None:
    other = attach("x = 1", Schedule((Plan((Group(("nothing",)),)),)))
    assert recover(other) is not None
    assert not rewriter.mask(Candidate(other)).any()


def test_a_strategy_without_a_parent_is_refused(rewriter: Rewriter) -> None:
    assert isinstance(rewriter.propose(None, strategies.get("fuse"), 0, Context()), Refusal)


def test_unknown_proposers_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rewriter"):
        proposers.check("rewritter")
