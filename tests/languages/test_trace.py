from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ke_gym import lang
from ke_gym.languages.artifact import Artifact
from ke_gym.languages.base import BuildError
from ke_gym.languages.device import get_arch
from ke_gym.languages.plan import Alloc, Call, Launch, Plan, PlanInput, Ref, TensorSpec
from ke_gym.languages.pretend import pretending
from ke_gym.languages.trace import CONSTANT_BYTES, NotTraceable, trace
from ke_gym.targets.executor import PlanRunner

kernels = lang.cpp('extern "C" void twice(const float* x, float* out, int64_t n) { }')
X = TensorSpec((4, 6), (6, 1), "float32")
WEIGHT = torch.ones(3, 6)


def _plan(function: Any, *inputs: Any, **state: TensorSpec) -> Plan:
    plan = trace(function, inputs or (X,), state).plan
    assert Plan.from_json(plan.to_json()) == plan
    return plan


def _steps(function: Any, *inputs: Any) -> list[str]:
    steps = _plan(function, *inputs).steps
    return [
        s.target if isinstance(s, Call) else s.kernel if isinstance(s, Launch) else "alloc" for s in steps
    ]


def test_allocations_launches_calls_and_returns() -> None:
    def forward(x: torch.Tensor, linear_weight: torch.Tensor) -> dict[str, Any]:
        out = torch.empty_like(x)
        kernels.twice(x, out, x.numel())
        return {"a": out, "b": [out @ linear_weight.t(), None]}

    plan = _plan(forward, X, linear_weight=X)
    unit = kernels.unit.name
    assert plan.inputs == (PlanInput("input", "0", X), PlanInput("state", "linear_weight", X))
    assert plan.steps == (
        Alloc(2, X),
        Launch(unit, "twice", (Ref(0), Ref(2), 24), ("const float*", "float*", "int64_t")),
        Call("aten.t.default", (Ref(1),), {}, (3,)),
        Call("aten.mm.default", (Ref(2), Ref(3)), {}, (4,)),
    )
    assert plan.returns == (2, 4)
    assert plan.return_specs == (X, TensorSpec((4, 4), (4, 1), "float32"))


def test_plain_inputs_are_baked_in() -> None:
    plan = _plan(lambda x, by, y: x * by + y, X, 3.5, X)
    assert [i.name for i in plan.inputs] == ["0", "1"]
    assert plan.steps[0] == Call("aten.mul.Tensor", (Ref(0), 3.5), {}, (2,))


def test_what_does_nothing_leaves_no_step() -> None:
    assert _steps(lambda x: (x.detach().view(4, 6).contiguous() + 1).expand(4, 6)) == ["aten.add.Tensor"]

    def unused(x: torch.Tensor) -> torch.Tensor:
        torch.empty_like(x)
        (x + 1).mul_(3)
        return x * 2

    assert _steps(unused) == ["aten.mul.Tensor"]


def test_writes_to_what_is_returned_are_kept() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(4, 6)
        out[:2].copy_(x[:2])
        out[2:] = 1
        return out

    steps = _steps(forward)
    assert [s for s in steps if "slice" not in s] == ["alloc", "aten.copy_.default", "aten.fill_.Tensor"]


def test_random_numbers_are_drawn_even_if_unused() -> None:
    assert _steps(lambda x: (torch.rand(3), x + 1)[1]) == ["aten.rand.default", "aten.add.Tensor"]


def test_tensors_made_outside_become_constants() -> None:
    traced = trace(lambda x: x @ WEIGHT.t() + torch.tensor([1.0, 2.0, 3.0]), (X,), {})
    sources = [i.source for i in traced.plan.inputs]
    assert sources == ["input", "constant", "constant"]
    held = [traced.constants[i.name] for i in traced.plan.inputs[1:]]
    assert [t.tolist() for t in held] == [WEIGHT.tolist(), [1.0, 2.0, 3.0]]


def test_no_constant_is_made_on_a_gpu_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], device=x.device)

    with pretending(get_arch()):
        expected = trace(forward, [X], {}, device="cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # torch would set up a context
        traced = trace(forward, [X], {}, device="cuda")
    assert traced.plan == expected.plan
    assert [tensor.device.type for tensor in traced.constants.values()] == ["cpu"]


def test_a_gpu_decides_itself_how_the_library_computes_attention() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        heads = x.view(2, 16, 4, 8).transpose(1, 2)
        made = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return made.transpose(1, 2).reshape(2, 16, 32)

    given = TensorSpec((2, 16, 32), (512, 32, 1), "float16")
    with pretending(get_arch()):
        plan = trace(forward, [given], {}, device="cuda").plan
    calls = [step.target for step in plan.steps if isinstance(step, Call)]
    assert calls == [
        "aten.view.default",
        "aten.transpose.int",
        "aten.scaled_dot_product_attention.default",
        *("aten.permute.default", "aten.contiguous.default", "aten.permute.default"),  # whatever kernel it is
        "aten.transpose.int",
        "aten.view.default",
    ]
    assert plan.return_specs == (given,)


def test_the_value_of_a_constant_may_be_read() -> None:
    half = torch.tensor(0.5)
    plan = _plan(lambda x: x * torch.tensor(2.0).item() + half.item())
    assert plan.steps[0] == Call("aten.mul.Tensor", (Ref(0), 2.0), {}, (1,))
    assert plan.steps[1] == Call("aten.add.Tensor", (Ref(1), 0.5), {}, (2,))


def test_buffers_written_by_aten_are_copied_first() -> None:
    norm = torch.nn.BatchNorm1d(6)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    plan = trace(norm, (X,), {}).plan
    steps = [s.target for s in plan.steps if isinstance(s, Call)]
    assert steps == ["aten.clone.default", "aten.clone.default", "aten.native_batch_norm.default"]
    assert all(torch.equal(before[name], tensor) for name, tensor in norm.state_dict().items())


CACHE: list[torch.Tensor] = []


def _cached(x: torch.Tensor) -> torch.Tensor:
    CACHE.append(x + 1)
    return CACHE[0] + x


def _swallowed(x: torch.Tensor) -> torch.Tensor:
    with contextlib.suppress(lang.KernelError):
        kernels.twice(x, x)
    return x + 1


def _launched(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    kernels.twice(x, out, 24)
    return out


@pytest.mark.parametrize(
    ("function", "outcome", "message"),
    [
        (
            lambda x: x.add_(1),
            "constraints",
            r"operator aten\.add_\.Tensor writes to input 0, which is read-only",
        ),
        (lambda x: x.t()[1:].zero_(), "constraints", r"aten\.zero_\.default writes to input 0"),
        (
            lambda x: _launched(x, x),
            "constraints",
            r"kernel 'twice', argument 2 \('out'\), writes to input 0",
        ),
        (
            lambda x: _launched(x, WEIGHT),
            "constraints",
            r"argument 2 .* writes to a tensor made outside forward",
        ),
        (lambda x: torch.empty_like(x), "correctness", "output 0 is allocated but never written"),
        (
            lambda x: (x + 1, torch.empty_like(x).t()),
            "correctness",
            "output 1 is allocated but never written",
        ),
        (lambda x: (x + 1, 3), "correctness", "output 1 is no tensor but of type int"),
        (_swallowed, "compile", "kernel 'twice' takes 3 arguments"),
        (lambda x: x.to("meta"), "constraints", "the target is a CPU"),
        (lambda x: torch.zeros(3, device="cuda"), "constraints", "gives a tensor on cuda"),
        (lambda x: x.to_sparse(), "constraints", "a plan holds dense ones"),
        (lambda x: torch.empty(3, dtype=torch.uint16), "constraints", "cannot allocate uint16"),
        (lambda x: torch.ops.aten.set_(x), "constraints", r"aten\.set_\.default is not allowed"),
        (lambda x: torch.rand(3, generator=torch.Generator()), "constraints", "a plan cannot hold"),
    ],
)
def test_what_a_plan_must_not_do(function: Any, outcome: str, message: str) -> None:
    with pytest.raises(BuildError, match=message) as caught:
        trace(function, (X,), {})
    assert caught.value.outcome == outcome


def test_tensors_kept_from_an_earlier_trace_are_refused() -> None:
    CACHE.clear()
    trace(_cached, (X,), {})
    with pytest.raises(BuildError, match="a tensor from an earlier call is used"):
        trace(_cached, (X,), {})


def test_constants_have_a_size_limit() -> None:
    big = torch.zeros(CONSTANT_BYTES // 4 + 1)
    with pytest.raises(BuildError, match="tensors made outside forward take"):
        trace(lambda x: x[0, 0] + big, (X,), {})


def test_reading_unwritten_memory_is_remarked_on() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        kernels.twice(torch.empty_like(x), out, 24)
        return out

    assert trace(forward, (X,), {}).warnings == (
        "kernel 'twice', argument 1 ('x'), is read before anything wrote it",
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * float(x[0, 0]),
        lambda x: x[: int(x.max())],
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: torch.tensor(x.tolist()),
        lambda x: torch.from_numpy(x.numpy()),
        lambda x: x + x.data_ptr(),
        lambda x: x + torch.equal(x, x),
    ],
)
def test_data_dependent_python_is_not_traceable(function: Any) -> None:
    with pytest.raises(NotTraceable, match=r"forward (depends on|reads)"):
        trace(function, (X,), {})


UNARY = [
    lambda t: t + 1,
    lambda t: t.t(),
    lambda t: t.unsqueeze(0).expand(3, *t.shape)[1],
    lambda t: t[::2],
    lambda t: t.sum(0, keepdim=True),
    lambda t: torch.cat([t, t], -1),
    lambda t: t.reshape(-1, t.shape[0]),
    lambda t: t.to(torch.float64).mul_(float("inf")).to(torch.float32),
    lambda t: torch.softmax(t, -1, dtype=torch.float32),
    lambda t: t.split(1, 0)[-1],
    lambda t: torch.where(t > 0, t, -t),
    lambda t: torch.empty_like(t).copy_(t),
    lambda t: torch.zeros(t.shape).add_(t),
    lambda t: t.max(-1, keepdim=True).values,
    lambda t: t @ t.t(),
]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, len(UNARY) - 1), min_size=1, max_size=7),
    st.integers(0, 5),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 2),
)
def test_any_chain_of_calls_gives_what_eager_gives(
    chain: list[int], rows: int, columns: int, transposed: bool, padding: int
) -> None:
    """The plan survives JSON, and running it equals running the Python, whatever shapes and strides."""

    def forward(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        value = x
        for step in chain:
            value = UNARY[step](value) if value.shape[0] else value
        return value, w + 1, value

    base = (
        torch.randn(columns + padding, rows + padding) if transposed else torch.randn(rows, columns + padding)
    )
    x = base[:columns, :rows].t() if transposed else base[:, :columns]
    w = torch.arange(3)
    traced = trace(forward, (TensorSpec.of(x), TensorSpec.of(w)), {})
    assert Plan.from_json(traced.plan.to_json()) == traced.plan
    artifact = Artifact("cpp", "plan", "", plans={"s": traced.plan}, constants=traced.constants)
    again = Artifact.from_bytes(artifact.to_bytes())
    assert again.plans == artifact.plans
    got, want = PlanRunner(again, "s", [x, w], {}).run(), forward(x, w)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
        assert a.stride() == b.stride() or a.numel() <= 1 or 1 in a.shape
