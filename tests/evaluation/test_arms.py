from __future__ import annotations

import functools
import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from ke_gym.evaluation.arms import Arm, ArmDied, open_arm
from ke_gym.evaluation.shared import POISON, Layout, SharedBuffer
from ke_gym.evaluation.zygote import Zygote
from ke_gym.languages import cpp
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.base import Signature
from ke_gym.languages.plan import Alloc, Launch, Plan, PlanInput, Ref, TensorSpec

PATIENCE = 300.0
SPEC = TensorSpec((64, 32), (32, 1), "float32")
SIGNATURE = Signature(
    "t", {"cpu": (SPEC, 3)}, {"cpu": (SPEC,)}, {"cpu": {"w": SPEC}}, {"cpu": {"w": ""}}, {"cpu": ()}
)
SOURCE = r"""
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <ctime>
#include <stdexcept>
#include <thread>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>
using f = float;
static std::atomic<int64_t> counter{0};
extern "C" {
void twice(const f* x, f* t, f* out) { for (int i = 0; i < 2048; i++) { t[i] = x[i]; out[i] = 2 * t[i]; } }
void crash(const f* x, f* t, f* out) { static int* volatile nowhere; *nowhere = 1; }
void write_input(const f* x, f* t, f* out) { ((volatile f*)x)[5] = 1; }
void divide(const f* x, f* t, f* out) { volatile int zero = 0, seven = 7; out[0] = seven / zero; }
void give_up(const f* x, f* t, f* out) { abort(); }
void throws(const f* x, f* t, f* out) { throw std::runtime_error("thrown in a kernel"); }
void hang(const f* x, f* t, f* out) { for (;;) asm volatile(""); }
void past_output(const f* x, f* t, f* out) { twice(x, t, out); out[2048] = 1; }
void before_output(const f* x, f* t, f* out) { twice(x, t, out); out[-1] = 1; }
void past_intermediate(const f* x, f* t, f* out) { twice(x, t, out); t[2049] = 1; }
void leave(const f* x, f* t, f* out) { _exit(0); }
void fork_attempt(const f* x, f* t, f* out) { twice(x, t, out); out[0] = fork() == -1 && errno == EPERM; }
void exec_attempt(const f* x, f* t, f* out) { twice(x, t, out); out[0] = execl("/bin/true", "", nullptr) == -1; }
void connect_attempt(const f* x, f* t, f* out) { twice(x, t, out); out[0] = socket(AF_INET, SOCK_STREAM, 0) < 0; }
void count_behind(const f* x, f* t, f* out) {
  twice(x, t, out);
  static bool started = (std::thread([] { for (;;) counter++; }).detach(), true);
  (void)started;
  timespec soon{0, 2000000};
  nanosleep(&soon, nullptr);
  ((int64_t*)out)[0] = counter.load();
}
}
"""


@functools.cache
def binary() -> bytes:
    return cpp.compile_unit(cpp.Unit(SOURCE)).binary


def artifact(kernel: str) -> Artifact:
    """One launch on the input, an intermediate and the output."""
    steps = (
        Alloc(1, SPEC),
        Alloc(2, SPEC),
        Launch("b", kernel, (Ref(0), Ref(1), Ref(2)), ("const float*", "float*", "float*")),
    )
    plan = Plan((PlanInput("input", "0", SPEC),), steps, (2,), (SPEC,))
    return Artifact("cpp", "plan", SOURCE, {"b": binary()}, {"cpu": plan})


def host(source: str) -> Artifact:
    unit = cpp.Unit('extern "C" void one(float* out) { out[0] = 1; }')
    return Artifact("cpp", "host", source, {unit.name: cpp.compile_unit(unit).binary})


@contextmanager
def opened(zygote: Zygote, built: Artifact) -> Iterator[tuple[Arm, torch.Tensor, torch.Tensor]]:
    layout = Layout.plan([SPEC], {"w": SPEC})
    with SharedBuffer(layout.bytes) as buffer:
        inputs, state = layout.split(buffer)
        inputs[0].normal_()
        state["w"].normal_()
        with open_arm(zygote, built, "cpu", buffer, layout, SIGNATURE.to_bytes()) as arm:
            yield arm, inputs[0], state["w"]


def test_calls_compute_and_take_time(zygote: Zygote) -> None:
    with opened(zygote, artifact("twice")) as (arm, x, _):
        for _ in range(5):
            x.normal_()
            assert 0 < arm.call(PATIENCE) < PATIENCE
            assert torch.equal(arm.outputs[0], 2 * x)
        (step,) = arm.profile(3)
        assert step[:2] == ("kernel", "twice") and step[2] > 0


@pytest.mark.parametrize("pattern", [0, 1])
def test_a_clean_kernel_passes_the_check_and_overwrites_all_poison(zygote: Zygote, pattern: int) -> None:
    with opened(zygote, artifact("twice")) as (arm, x, _):
        arm.check_mode(pattern)
        arm.call(PATIENCE)
        assert arm.damage() == "" and torch.equal(arm.outputs[0], 2 * x)
        arm.check_mode(None)
        arm.call(PATIENCE)
        assert torch.equal(arm.outputs[0], 2 * x)


def test_an_output_that_is_not_written_is_poison(zygote: Zygote) -> None:
    with opened(zygote, artifact("connect_attempt")) as (arm, _, _):
        arm.check_mode(0)
        arm.call(PATIENCE)
        assert arm.outputs[0][0, 0] == 1
    idle = artifact("twice")
    plan = idle.plans["cpu"]
    with opened(zygote, replace(idle, plans={"cpu": replace(plan, steps=plan.steps[:2])})) as (arm, _, _):
        for pattern, byte in enumerate(POISON):
            arm.check_mode(pattern)
            arm.call(PATIENCE)
            assert bool((arm.outputs[0].view(torch.uint8) == byte).all())


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("past_output", "outside of its outputs: 0 bytes past the end of output 0"),
        ("before_output", "outside of its outputs: 4 bytes before output 0"),
        ("past_intermediate", "outside of its intermediates: 4 bytes past the end of intermediate 0"),
    ],
)
def test_stray_writes_are_found(zygote: Zygote, kernel: str, message: str) -> None:
    with opened(zygote, artifact(kernel)) as (arm, _, _):
        arm.check_mode(0)
        arm.call(PATIENCE)
        assert message in arm.damage()


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("crash", "segmentation fault"),
        ("write_input", "a write to an input"),
        ("divide", "division by zero"),
        ("give_up", "abort"),
        ("throws", "thrown in a kernel"),
        ("leave", "exit code 0"),
    ],
)
def test_deaths_are_told_with_their_place(zygote: Zygote, kernel: str, message: str) -> None:
    with opened(zygote, artifact(kernel)) as (arm, _, _):
        arm.check_mode(0)
        with pytest.raises(ArmDied) as died:
            arm.call(PATIENCE)
        assert died.value.outcome == "runtime"
        assert message in died.value.log and f"in {kernel}" in died.value.log
        with pytest.raises(ArmDied):
            arm.call(PATIENCE)


def test_a_hang_is_killed_in_time(zygote: Zygote) -> None:
    with opened(zygote, artifact("hang")) as (arm, _, _):
        with pytest.raises(ArmDied) as died:
            arm.call(0.2)
        assert died.value.outcome == "timeout"
        assert arm.worker.wait(PATIENCE).signal == 9


@pytest.mark.parametrize("kernel", ["fork_attempt", "exec_attempt", "connect_attempt"])
def test_kernels_start_nothing_and_reach_nobody(zygote: Zygote, kernel: str) -> None:
    with opened(zygote, artifact(kernel)) as (arm, _, _):
        arm.call(PATIENCE)
        assert arm.outputs[0][0, 0] == 1


def test_a_background_thread_stands_still_between_calls(zygote: Zygote) -> None:
    """A thread that counts for ever: what it gained while nobody called is nothing beside a call."""
    with opened(zygote, artifact("count_behind")) as (arm, _, _):

        def count() -> int:
            arm.call(PATIENCE)
            return int(arm.outputs[0].view(torch.int64)[0, 0])

        count()
        before, stat = count(), f"/proc/{arm.worker.pid}/stat"

        def ticks() -> list[str]:
            return open(stat).read().rpartition(")")[2].split()[11:13]

        spent = ticks()
        time.sleep(0.3)
        assert ticks() == spent
        assert any(count() > before for _ in range(1000))  # each call lets it run for microseconds


HOST = """
import torch
from ke_gym import lang
kernels = lang.cpp('extern "C" void one(float* out) { out[0] = 1; }')
def forward(x, n, w):
    out = x * n + w if float(x.sum()) == float(x.sum()) else x
    kernels.one(out)
    return out
"""
MODEL = """
import torch
class ModelNew(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(64, 32))
    def forward(self, x, n):
        return x * n + self.w
"""


def test_the_host_lane_runs_the_module_for_real(zygote: Zygote) -> None:
    with opened(zygote, host(HOST)) as (arm, x, w):
        arm.check_mode(1)
        arm.call(PATIENCE)
        want = x * 3 + w
        want[0, 0] = 1
        assert arm.damage() == "" and torch.equal(arm.outputs[0], want)
        names = [(kind, name) for kind, name, _ in arm.profile(3)]
        assert names == [("kernel", "one"), ("host", "forward")]


def test_a_model_of_the_host_lane_gets_the_references_state(zygote: Zygote) -> None:
    with opened(zygote, host(MODEL)) as (arm, x, w):
        for _ in range(2):
            w.normal_()
            arm.call(PATIENCE)
            assert torch.equal(arm.outputs[0], x * 3 + w)


def body(text: str) -> str:
    return f"import torch, os\ndef forward(x, n, w):\n    {text}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise ValueError('by the module')", "ValueError: by the module"),
        ("return x[:3]", "expected float32 (64, 32)"),
        ("return x.double()", "expected float32 (64, 32)"),
        ("return x, x", "2 tensors, the reference returns 1"),
        ("return type('Lazy', (torch.Tensor,), {})(x)", "is a Lazy, not a torch.Tensor"),
        ("x += 1; return x", "segmentation fault"),
        ("os._exit(0)", "exit code 0"),
        ("return torch.empty(1 << 40)[:64]", "memory"),
    ],
)
def test_modules_of_the_host_lane_fail_with_their_own_words(zygote: Zygote, text: str, message: str) -> None:
    with opened(zygote, host(body(text))) as (arm, _, _):
        with pytest.raises(ArmDied) as died:
            arm.call(PATIENCE)
        assert died.value.outcome == "runtime" and message in died.value.log


def test_an_answer_out_of_turn_leaves_no_result(zygote: Zygote) -> None:
    """The module writes "done" to every descriptor before it has computed anything, then takes its time."""
    forged = body(
        """
    import contextlib, time
    for fd in range(3, 64):
        with contextlib.suppress(OSError): os.write(fd, b"d")
    time.sleep(600)
    return x"""
    )
    with opened(zygote, host(forged)) as (arm, _, _):
        arm.check_mode(0)
        arm.call(PATIENCE)
        assert arm.outputs[0].isnan().all()


def test_a_module_that_does_not_load_is_said_at_once(zygote: Zygote) -> None:
    with pytest.raises(ArmDied, match="ZeroDivisionError"), opened(zygote, host("x = 1 / 0")):
        pass
    other = 'from ke_gym import lang\nk = lang.cpp("extern \\"C\\" void f() {}")\ndef forward(x, n, w):\n    k.f()'
    with (
        opened(zygote, host(other)) as (arm, _, _),
        pytest.raises(ArmDied, match="not there when the module"),
    ):
        arm.call(PATIENCE)


def test_arms_leave_nothing_open(zygote: Zygote) -> None:
    def held(use: Callable[[], None]) -> int:
        use()
        return len(os.listdir("/proc/self/fd"))

    def use() -> None:
        with opened(zygote, artifact("twice")) as (arm, _, _):
            arm.call(PATIENCE)

    gc.collect()
    first, *_, last = (held(use) for _ in range(5))
    assert last <= first  # what others left may be closed meanwhile
