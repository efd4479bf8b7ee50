from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ke_gym.candidate import Candidate
from ke_gym.codegen import Program
from ke_gym.errors import UserError
from ke_gym.evaluation import evaluator as evaluator_module
from ke_gym.evaluation.arms import Arm, open_arm
from ke_gym.evaluation.contest import RUNOFF
from ke_gym.evaluation.evaluation import Evaluation
from ke_gym.evaluation.evaluator import Evaluator
from ke_gym.evaluation.profile import FEEDBACK_LINES, feedback
from ke_gym.evaluation.race import Race
from ke_gym.evaluation.record import FEW, MachineRecord
from ke_gym.evaluation.zygote import Zygote
from ke_gym.languages.artifact import Artifact
from ke_gym.targets.cpu import Peaks
from ke_gym.tasks.task import Task
from tests.machine import PYTHON_HEADERS

LIBRARY = Candidate("def forward(x):\n    return x.softmax(-1)\n")
EXAMPLE = (Path(__file__).parents[2] / "examples" / "softmax.py").read_text()
HELD_OUT = Path(__file__).parents[1] / "codegen" / "heldout"


pytestmark = pytest.mark.usefixtures("brief_races")


def variant(old: str, new: str) -> Candidate:
    assert old in EXAMPLE
    return Candidate(EXAMPLE.replace(old, new))


def test_an_honest_kernel_is_correct_and_measured(evaluator: Evaluator) -> None:
    evaluation = evaluator.evaluate(Candidate(EXAMPLE))
    assert evaluation.outcome == "correct", evaluation.log
    assert evaluation.trust == "plan"
    assert evaluation.kernel_coverage == 1.0
    assert evaluation.time_ms and evaluation.reference_ms and evaluation.speedup
    assert evaluation.error is not None and evaluation.error.rel_l2 < 1e-5
    assert evaluation.profile.bytes > 0
    assert evaluation.rounds >= 1 and len(evaluation.times_ms) >= 1
    assert sum(evaluation.races) == len(evaluation.times_ms) == len(evaluation.reference_times_ms)
    assert Evaluation.from_json(evaluation.to_json()) == evaluation


@pytest.mark.parametrize(
    ("old", "new", "outcome", "words"),
    [
        ("1 / sum", "1.001f / sum", "correctness", "element"),
        ("i < rows", "i < rows - 1", "correctness", "of dimension 0"),
        ("ke::exp(a[j] - top)", "ke::exp(a[j])", "correctness", "inputs"),
        ("float sum = 0;", "float sum = ;", "compile", "error"),
        ("*x.shape)", "x.shape[0])", "compile", "argument"),
        ("kernels.softmax", "kernels.sofmax", "compile", "softmax"),
        ("y[j] *= scale;", "y[j + (1LL << 45)] *= scale;", "runtime", "fault"),
        ("y[j] *= scale;", "y[j] *= scale; y[n] = 0;", "correctness", "outside"),
        ("y[j] *= scale;", "y[j] *= scale; const_cast<float*>(a)[0] = 1;", "runtime", "fault"),
    ],
)
def test_what_is_wrong_is_said(evaluator: Evaluator, old: str, new: str, outcome: str, words: str) -> None:
    evaluation = evaluator.evaluate(variant(old, new))
    assert evaluation.outcome == outcome, evaluation.log
    assert words in evaluation.log
    assert evaluation.speedup is None
    if outcome == "correctness" and words != "outside":
        assert evaluation.error is not None and evaluation.error.ratio > 2
    assert feedback(evaluation).splitlines()[-1].startswith("hint: ")
    assert len(feedback(evaluation).splitlines()) <= FEEDBACK_LINES


def test_nothing_is_asked_where_the_reference_raises_and_that_is_said(
    choosy: tuple[Task, str], tmp_path: Path
) -> None:
    task, source = choosy
    with Evaluator(task, threads=1, folder=tmp_path) as judge:
        right, wrong = (judge.evaluate(Candidate(source.format(more))) for more in ("", " * 1.001"))
        proof = judge.prove()
    assert right.correct and wrong.outcome == "correctness"
    for evaluation in (right, wrong):
        assert "nothing is checked on special inputs, on which the reference itself fails" in evaluation.log
        assert "all elements of" in evaluation.log
    assert proof is not None and proof.ok


def test_a_module_that_does_not_compute_in_plan_is_in_the_host_lane(evaluator: Evaluator) -> None:
    source = "def forward(x):\n    return x.softmax(-1) if float(x.sum()) != 1.5 else x\n"
    evaluation = evaluator.evaluate(Candidate(source))
    assert (evaluation.outcome, evaluation.trust) == ("correct", "host")


INLINE = """
import torch
from torch.utils.cpp_extension import load_inline

SOURCE = "at::Tensor rows(at::Tensor x) { return x.softmax(-1); }"
extension = load_inline(name="rows_of_its_own", cpp_sources=[SOURCE], functions=["rows"], verbose=True)

class ModelNew(torch.nn.Module):
    def forward(self, x):
        return extension.rows(x)
"""


@PYTHON_HEADERS
def test_a_module_that_builds_itself_with_load_inline_is_in_the_host_lane(evaluator: Evaluator) -> None:
    """The one build against torch's headers: half a minute."""
    evaluation = evaluator.evaluate(Candidate(INLINE))
    assert (evaluation.outcome, evaluation.trust) == ("correct", "host"), evaluation.log


def test_what_was_not_raced_is_not_deployed(evaluator: Evaluator) -> None:
    """A hostile build may add plans for shapes that nobody judged."""
    candidate = Candidate(EXAMPLE + "\nmore = True\n")
    built = evaluator.build(candidate)
    plan = next(iter(built.plans.values()))
    evaluator.adopt(candidate, replace(built, plans={**built.plans, "elsewhere": plan}))
    assert "elsewhere" in evaluator.build(candidate).plans
    assert set(evaluator.settled(candidate).plans) == set(evaluator.shape_sets)


INDICES = """
import torch
from ke_gym import lang
kernels = lang.cpp(r'''
#include <cstdint>
extern "C" void count(int64_t* to, int64_t rows, int64_t n) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < n; ++j) to[i * n + j] = j;
}
''')
def forward(x):
    where = torch.empty(x.shape, dtype=torch.int64)
    kernels.count(where, *x.shape)
    return torch.gather(torch.softmax(x, -1), 1, where)
"""


def test_calls_that_need_what_kernels_make_are_not_run_without_them(evaluator: Evaluator) -> None:
    """Without the kernel there would be no indices."""
    evaluation = evaluator.evaluate(Candidate(INDICES))
    assert evaluation.outcome == "correct", evaluation.log
    assert evaluation.kernel_coverage is None


def test_aten_calls_are_allowed_and_reported(evaluator: Evaluator) -> None:
    evaluation = evaluator.evaluate(LIBRARY)
    assert evaluation.outcome == "correct"
    assert evaluation.kernel_coverage == 0.0


def test_a_clearly_slower_candidate_never_counts_as_a_gain(evaluator: Evaluator) -> None:
    slow = variant(
        "float top = a[0];", "for (int k = 0; k < 40; ++k) ke::slow(y, n);\n        float top = a[0];"
    )
    slow = Candidate(
        slow.source.replace(
            'extern "C" void softmax',
            "namespace ke { inline void slow(float* y, int64_t n) "
            "{ for (int64_t j = 0; j < n; ++j) { y[j] = j; asm volatile(\"\" ::: \"memory\"); } } }\n"
            'extern "C" void softmax',
        )
    )  # fmt: skip
    evaluation = evaluator.evaluate(slow, incumbent=Candidate(EXAMPLE))
    assert evaluation.outcome == "correct", evaluation.log
    assert not evaluation.improved


@pytest.mark.parametrize(
    ("leads", "ahead"),
    [
        (
            [0.004, 0.006, 0.005, 0.006, 0.004, 0.005] * 4,
            True,
        ),  # less than a gain's margin, more than equals differ
        ([0.0004, 0.0006, 0.0005, 0.0006] * 6, False),  # as equals differ
        ([0.02, -0.02, 0.03, -0.01, 0.02, -0.03] * 4, False),  # no telling
    ],
)
def test_a_version_is_ahead_by_more_than_equals_differ(
    evaluator: Evaluator, folder: Path, monkeypatch: pytest.MonkeyPatch, leads: list[float], ahead: bool
) -> None:
    record = MachineRecord("quiet", folder)
    for _ in range(FEW):
        record.add("softmax", 1, 1e-3, 0.001, 48, False)
    won = Race({"candidate": [1e-3] * len(leads), "incumbent": [1e-3] * len(leads)})
    for lead in leads:
        won.test.add(lead)
    monkeypatch.setattr(evaluator, "record", record)
    monkeypatch.setattr(evaluator, "_duel", lambda *_: won)
    assert evaluator.ahead(Candidate(EXAMPLE), LIBRARY) == ahead
    won.test.values = won.test.values[:5]  # too few to tell
    assert not evaluator.ahead(Candidate(EXAMPLE), LIBRARY)


@pytest.mark.parametrize(
    ("first", "second", "ahead"), [(0.02, 0.004, True), (0.02, -0.015, False), (0.003, -0.0005, False)]
)
def test_a_version_is_ahead_on_all_shape_sets_together_and_behind_on_none(
    evaluator: Evaluator,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: float,
    second: float,
    ahead: bool,
) -> None:
    record = MachineRecord("quiet too", folder)
    for _ in range(FEW):
        record.add("softmax", 1, 1e-3, 0.002, 48, False)

    def duel(name: str, *_: Any) -> Race:
        won = Race({"candidate": [1e-3] * 24, "incumbent": [1e-3] * 24})
        for _ in range(24):
            won.test.add(first if name == "ragged" else second)
        return won

    monkeypatch.setattr(evaluator, "record", record)
    monkeypatch.setattr(evaluator, "shape_sets", ["ragged", "other"])
    monkeypatch.setattr(evaluator, "_duel", duel)
    assert evaluator.ahead(Candidate(EXAMPLE), LIBRARY) == ahead


def test_what_is_wrong_in_such_a_race_is_not_ahead(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy = later("{ out[0] = 7; return; }")
    assert not evaluator.ahead(lazy, Candidate(EXAMPLE))


def test_outputs_that_are_nothing_but_rounding_are_raced_like_others(tmp_path: Path) -> None:
    """A convolution's bias before a norm: no two implementations agree on its gradient, which is zero."""
    task = Task.from_file(HELD_OUT / "convolution_then_norm.py")
    program = Program.from_task(task)
    with Evaluator(task, threads=1, folder=tmp_path) as evaluator:
        seeds = program.seeds()
        evaluations = [evaluator.evaluate(Candidate(program.emit(seed))) for seed in seeds]
        assert [e.outcome for e in evaluations] == ["correct"] * len(seeds), [e.log for e in evaluations]


def test_who_is_raced_alone_is_ahead_or_not(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a machine that others load, two seconds may be a handful of rounds, which decide nothing.
    monkeypatch.setattr("ke_gym.evaluation.evaluator.RUNOFF", replace(RUNOFF, max_seconds=60.0))
    slow = variant(
        "float top = a[0];", "for (volatile int k = 0; k < 100000; k = k + 1) {}\n        float top = a[0];"
    )
    assert evaluator.ahead(Candidate(EXAMPLE), slow)
    assert not evaluator.ahead(slow, Candidate(EXAMPLE))
    assert not evaluator.ahead(later("abort()"), slow)
    assert not evaluator.ahead(Candidate(EXAMPLE), later("abort()"))
    assert not evaluator.ahead(variant("float sum = 0;", "float sum = ;"), slow)


def later(what: str) -> Candidate:
    """The example, which does ``what`` in every call after the first."""
    head = 'extern "C" void softmax(const float* x, float* out, int64_t rows, int64_t n) {'
    assert head in EXAMPLE
    changed = f"#include <unistd.h>\nstatic int calls;\n{head}\n    if (++calls > 1) {what};"
    return Candidate(EXAMPLE.replace("#include", "#include <cstdlib>\n#include", 1).replace(head, changed))


@pytest.mark.parametrize(
    ("what", "words"),
    [("abort()", "abort"), ("sleep(99)", "no answer"), ("{ out[0] = 7; return; }", "wrong")],
)
def test_an_incumbent_that_fails_is_left_out(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch, what: str, words: str
) -> None:
    def hasty(zygote: Zygote, artifact: Artifact, *rest: Any) -> Arm:
        """Little patience with who will hang."""
        arm = open_arm(zygote, artifact, *rest)
        if what == "sleep(99)" and what in artifact.source:
            monkeypatch.setattr(arm, "call", lambda timeout, call=arm.call: call(2.0))
        return arm

    monkeypatch.setattr(evaluator_module, "open_arm", hasty)
    evaluation = evaluator.evaluate(LIBRARY, incumbent=later(what))
    assert evaluation.outcome == "correct", evaluation.log
    said = evaluation.log.splitlines()[0]
    assert "incumbent failed" in said and words in said and "baseline alone" in said
    assert evaluation.speedup is not None and evaluation.gain is None and not evaluation.improved
    assert evaluation.rival == ""


def test_an_incumbent_that_does_not_build_is_left_out(evaluator: Evaluator) -> None:
    evaluation = evaluator.evaluate(LIBRARY, incumbent=variant("float sum = 0;", "float sum = ;"))
    assert evaluation.outcome == "correct", evaluation.log
    assert "incumbent failed" in evaluation.log
    assert evaluation.speedup is not None and evaluation.gain is None


def test_an_earlier_winner_that_dies_in_its_own_race_costs_nobody_a_verdict(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "_steady", evaluator.build(later("abort()")))
    monkeypatch.setattr(evaluator, "_evaluated", 0)
    races = len(evaluator.record.races)
    evaluation = evaluator.evaluate(variant("1 / sum", "1.01f / sum"))
    assert evaluation.outcome == "correctness" and "element" in evaluation.log
    assert len(evaluator.record.races) == races and evaluator._steady is None


def test_what_is_faster_than_the_machine_is_not_believed(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Peaks(evaluator.threads, ((1 << 18, 1e3), (1 << 29, 1e3)), 1e12, 1e12)
    monkeypatch.setattr(evaluator, "peaks", tiny)
    monkeypatch.setattr(evaluator.record, "peaks", lambda *_: tiny)
    evaluation = evaluator.evaluate(Candidate(EXAMPLE))
    assert evaluation.outcome == "constraints"
    assert "faster than this machine" in evaluation.log and evaluation.speedup is None


def test_several_threads_share_one_evaluator(evaluator: Evaluator) -> None:
    candidates = [variant("1 / sum", f"{1 + i % 2 * 1e-2}f / sum /* {i} */") for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        outcomes = [e.outcome for e in pool.map(evaluator.evaluate, candidates)]
    assert outcomes == ["correct", "correctness"] * 4


def test_a_general_module_is_tried_on_hidden_shapes(folder: Path) -> None:
    with Evaluator(Task.load("row_sum"), folder=folder, call_timeout=300) as opened:
        narrow = """
import torch
from ke_gym import lang
kernels = lang.cpp(r'''
#include <cstdint>
extern "C" void row_sum(const float* x, float* out, int64_t rows, int64_t n) {
    #pragma omp parallel for
    for (int64_t i = 0; i < rows; ++i) {
        double sum[16] = {};
        for (int64_t j = 0; j + 16 <= n; j += 16)
            for (int k = 0; k < 16; ++k) sum[k] += double(x[i * n + j + k]) * x[i * n + j + k];
        for (int k = 1; k < 16; ++k) sum[0] += sum[k];
        out[i] = sum[0];
    }
}''')
def forward(x):
    out = x.new_empty(x.shape[0])
    kernels.row_sum(x, out, *x.shape)
    return out
"""
        specific, general = Candidate(narrow), Candidate(narrow + "general = True\n")
        reference = opened.task.reference(opened.contract)(*opened.task.inputs(opened.contract, 0))
        assert reference[0].dim() >= 1
        assert opened.evaluate(specific).outcome == "correct"
        evaluation = opened.evaluate(general)
        assert evaluation.outcome == "correctness"
        assert "claims" in evaluation.log


def test_backward_tasks_are_judged_on_every_gradient(folder: Path) -> None:
    with Evaluator(
        Task.load("layer_norm_backward"), folder=folder, shape_sets=["ragged"], call_timeout=300
    ) as opened:
        shapes = opened.judge.shapes["ragged"]
        names = ", ".join(shapes.state)
        inputs = ", ".join(f"x{i}" for i in range(len(shapes.inputs)))
        zeros = ", ".join(f"torch.zeros({list(s.shape)})" for s in shapes.outputs)
        source = f"import torch\ndef forward({inputs}, {names}):\n    return ({zeros},)\n"
        assert opened.evaluate(Candidate(source)).outcome == "correctness"
        assert len(shapes.outputs) > 1


def test_bad_arguments_are_one_sentence(folder: Path) -> None:
    task = Task.load("softmax")
    for arguments in ({"target": "tpu"}, {"baseline": "jit"}, {"threads": 1000}):
        with pytest.raises(UserError):
            Evaluator(task, folder=folder, **arguments)  # type: ignore[arg-type]


def test_a_broken_reference_is_named(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import torch\nclass Model(torch.nn.Module):\n    def forward(self, x):\n        return x @ x\n"
        "def get_inputs():\n    return [torch.randn(2, 3)]\n"
    )
    with pytest.raises(UserError, match="broken"):
        Evaluator(Task.load(str(broken)), folder=folder)
