from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ke_gym.evaluation.acceptance import (
    DRAWINGS,
    Expected,
    blocks_agree,
    compare,
    error_pattern,
    judge_output,
)

X = torch.randn(257, 129, generator=torch.Generator().manual_seed(0))


def softmax(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, -1)


def verdict(output: torch.Tensor, **settings_: object) -> bool:
    return judge_output(
        output, Expected(softmax(X), softmax(X.double()), reduction_length=129, **settings_)
    ).ok  # type: ignore[arg-type]


def test_the_reference_and_another_honest_order_are_accepted() -> None:
    assert verdict(softmax(X))
    exps = torch.exp(X)  # no maximum subtracted: another rounding, as honest for these inputs
    assert verdict(exps / exps.cumsum(-1)[:, -1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lower_precision_fails_unless_the_policy_permits_it(dtype: torch.dtype) -> None:
    lowered = softmax(X.to(dtype).float())
    assert not verdict(lowered)
    assert verdict(lowered, precision="bf16")


@pytest.mark.parametrize(("dtype", "accepted"), [(torch.float32, True), (torch.float16, False)])
def test_rounding_is_no_error_where_a_norm_amplifies_it(dtype: torch.dtype, accepted: bool) -> None:
    """Equal rows: their mean, summed in turn, is not quite what they are, and the norm divides the rest by next to nothing."""
    for seed in range(300):
        torch.manual_seed(seed)
        row = torch.randn(33) * torch.randn(33)
        rows = row.expand(24, 33).contiguous()
        reference, oracle = (
            torch.nn.functional.batch_norm(x, None, None, training=True) for x in (rows, rows.double())
        )
        total, square = torch.zeros(33, dtype=dtype), torch.zeros(33)
        for each in rows.to(dtype):
            total += each
        each_part = torch.tensor(1 / 24)  # which is rounded, too
        rest = row - total.float() * each_part
        for _ in rows:
            square += rest * rest
        output = (rest * torch.rsqrt(square * each_part + 1e-5)).expand(24, 33)
        verdict = judge_output(output, Expected(reference, oracle, reduction_length=24.0, scale=1.0))
        assert verdict.ok == accepted, (seed, verdict.reason)


def bias_gradient(x: torch.Tensor, gradient: torch.Tensor, forget: float = 0.0) -> torch.Tensor:
    """Of a bias that is added to ``x`` before a batch norm; ``forget``: what share of the mean is left out."""
    rows = x.shape[0]
    apart = x - x.cumsum(0)[-1] / rows
    scale = torch.rsqrt((apart * apart).cumsum(0)[-1] / rows + 1e-5)
    normal = apart * scale
    mean, along = gradient.cumsum(0)[-1] / rows, (gradient * normal).cumsum(0)[-1] / rows
    return (scale * (gradient - (1 - forget) * mean - normal * along)).cumsum(0)[-1]


def test_what_is_zero_but_for_rounding_is_measured_against_it() -> None:
    for seed in range(60):
        torch.manual_seed(seed)
        x, gradient = torch.randn(512, 24), torch.randn(512, 24)
        reference, oracle = (
            torch.autograd.grad(torch.nn.functional.batch_norm(y, None, None, training=True), z, grad)[0]
            for z, y, grad in biased(x, gradient)
        )
        expected = Expected(reference, oracle, reduction_length=512.0)
        assert 1e-7 < expected.rounding < 1e-4
        zeros = torch.zeros_like(reference)
        for right in (reference, bias_gradient(x, gradient), zeros):
            verdict = judge_output(right, expected)
            assert verdict.ok, (seed, verdict.reason)
            assert blocks_agree(right, reference, 24, random.Random(0).randrange, expected.rounding)
        for wrong in (
            bias_gradient(x.bfloat16().float(), gradient, 0.01),
            bias_gradient(x.half(), gradient.half()).float(),
            gradient.sum(0),
        ):
            assert not judge_output(wrong, expected).ok, seed
        assert not blocks_agree(gradient.sum(0), reference, 24, random.Random(0).randrange, expected.rounding)


def test_what_was_rounding_on_other_inputs_is_looked_at_as_ever_where_it_is_more() -> None:
    right = softmax(X)
    noise = float(right.square().mean().sqrt()) / 2
    expected = Expected(right, softmax(X.double()), reduction_length=129, noise=noise)
    assert not expected.rounding and judge_output(right, expected).ok
    assert not judge_output(softmax(X.half().float()), expected).ok
    zeros = torch.zeros(64)
    assert Expected(zeros, zeros.double(), noise=1e-8).rounding == 1e-8
    assert judge_output(zeros + 3e-8, Expected(zeros, zeros.double(), noise=1e-8)).ok
    assert not judge_output(zeros + 1e-5, Expected(zeros, zeros.double(), noise=1e-8)).ok
    assert not judge_output(zeros + 3e-8, Expected(zeros, zeros.double())).ok
    assert judge_output(zeros + 3e-8, Expected(zeros - 1e-8, zeros.double())).ok
    assert not judge_output(zeros + 1e-5, Expected(zeros - 1e-8, zeros.double())).ok


def biased(
    x: torch.Tensor, gradient: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A bias, ``x`` with it, and the gradient, as they are and in fp64."""
    for dtype in (x.dtype, torch.float64):
        bias = torch.zeros(x.shape[1], dtype=dtype, requires_grad=True)
        yield bias, x.to(dtype) + bias, gradient.to(dtype)


def test_a_close_call_is_settled_by_more_contents_as_if_they_were_one_output() -> None:
    """Single sums, which nearly cancel: how wrong they are is luck, a lower precision is far worse."""

    def drawn(seed: int) -> tuple[torch.Tensor, Expected]:
        x = torch.randn(4096, generator=torch.Generator().manual_seed(seed))
        return x, Expected(x.sum(), x.double().sum(), reduction_length=4096.0)

    def settled(seed: int, total: Callable[[torch.Tensor], torch.Tensor]) -> tuple[bool, bool]:
        x, expected = drawn(seed)
        verdict, pool = compare([total(x)], [expected])
        if pool is None:
            return verdict.ok, verdict.ok
        for drawing in range(1, DRAWINGS):
            x, expected = drawn(1000 * drawing + seed)
            pool.add([total(x)], [expected])
        return False, pool.verdict().ok

    def in_turn(x: torch.Tensor) -> torch.Tensor:
        return x.view(32, 128).cumsum(0)[-1].sum()

    def halved(x: torch.Tensor) -> torch.Tensor:
        return x.half().float().sum()

    honest = [settled(seed, in_turn) for seed in range(2000)]
    assert sum(not alone for alone, _ in honest) >= 3  # luck
    assert all(together for _, together in honest)
    lowered = [settled(seed, halved) for seed in range(60)]
    assert sum(not alone for alone, _ in lowered) > 40 and not any(t and not a for a, t in lowered)


def test_only_close_calls_of_few_elements_are_asked_about_again() -> None:
    x = torch.randn(1024, 64, generator=torch.Generator().manual_seed(3))
    expected = Expected(x.sum(0), x.double().sum(0), reduction_length=1024.0)
    right = x.cumsum(0)[-1]
    slightly = right + 3e-4 * right.abs().max()
    for outputs, close in (
        ([right], False),
        ([slightly], True),
        ([right * 2], False),
        ([slightly, 2 * x], False),
    ):
        pool = compare(outputs, [expected, Expected(x, x.double())][: len(outputs)])[1]
        assert (pool is not None) == close
    many = torch.randn(1 << 21, generator=torch.Generator().manual_seed(4))
    verdict, pool = compare([many * (1 + 2e-5)], [Expected(many, many.double())])
    assert not verdict.ok and pool is None


def test_complex_numbers_are_compared_as_pairs_of_real_ones() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    reference, oracle = torch.fft.fft(x), torch.fft.fft(x.double())
    expected = Expected(reference, oracle)
    assert judge_output(torch.fft.fft(x.clone()), expected).ok
    assert judge_output(reference.conj().conj(), expected).ok
    swapped = torch.complex(reference.imag, reference.real)
    for wrong in (torch.zeros_like(reference), reference.conj(), swapped, reference * (1 + 1e-3)):
        assert not judge_output(wrong, expected).ok
        assert not blocks_agree(wrong, reference, 32, random.Random(0).randrange)
    assert blocks_agree(reference, reference, 32, random.Random(0).randrange)
    assert not judge_output(torch.view_as_real(reference), expected).ok


def test_wrong_outputs_fail() -> None:
    right = softmax(X)
    skipped = right.clone()
    skipped[-1] = 0
    one = right.clone()
    one[3, 5] += 1e-3
    for wrong in (torch.zeros_like(right), X, skipped, one, right * 1.001, torch.full_like(right, math.nan)):
        assert not verdict(wrong)


def test_shape_and_dtype_must_match() -> None:
    right = softmax(X)
    assert not verdict(right.double())
    assert not verdict(right.T.contiguous())


def test_nonfinite_values_match_by_position() -> None:
    x = X.clone()
    x[4, 7] = math.nan
    x[9, 3] = math.inf
    reference, oracle = torch.exp(x), torch.exp(x.double())
    assert judge_output(reference.clone(), Expected(reference, oracle)).ok
    for position, value in (((4, 7), 0.0), ((9, 3), 1e30), ((0, 0), math.nan), ((9, 3), -math.inf)):
        output = reference.clone()
        output[position] = value
        assert not judge_output(output, Expected(reference, oracle)).ok


def test_integers_are_exact_except_where_the_reference_itself_is_ambiguous() -> None:
    oracle = torch.tensor([3, 1, 2, 0])
    reference = torch.tensor([3, 1, 2, 1])
    assert judge_output(oracle.clone(), Expected(reference, oracle)).ok
    assert judge_output(reference.clone(), Expected(reference, oracle)).ok
    assert not judge_output(torch.tensor([0, 0, 0, 0]), Expected(reference, oracle)).ok
    assert not judge_output(torch.tensor([3, 1, 0, 0]), Expected(oracle, oracle)).ok


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda m: m[:, 0], "index 0 of dimension 1"),
        (lambda m: m[:, 96:], "last partial tile (of 32) of dimension 1"),
        (lambda m: m[10:13], "indices 10…12 of dimension 0"),
        (lambda m: m[1::2], "one index in 2 from 1 of dimension 0"),
        (lambda m: m, "every element"),
    ],
)
def test_patterns_name_what_a_person_would_look_for(wrong: object, words: str) -> None:
    mask = torch.zeros(20, 100, dtype=torch.bool)
    wrong(mask)[...] = True  # type: ignore[operator]
    assert words in error_pattern(mask)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400), st.integers(1, 64), st.integers(0, 2**31))
def test_blocked_sums_pass_and_half_precision_sums_do_not(n: int, rows: int, seed: int) -> None:
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    oracle, reference = x.double().sum(1), x.sum(1)
    plain = torch.zeros(rows)
    for column in range(n):
        plain += x[:, column]
    expected = Expected(reference, oracle, reduction_length=n)
    assert judge_output(plain, expected).ok
    if rows >= 8:
        assert not judge_output(x.bfloat16().float().sum(1), expected).ok


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_finite_is_looked_at_wherever_it_lies(dtype: torch.dtype) -> None:
    """A few huge values hide that all others are wrong from the norm; every other place is -inf."""
    values = torch.randn(1 << 17, generator=torch.Generator().manual_seed(1))
    values[torch.rand(1 << 17, generator=torch.Generator().manual_seed(2)) < 0.2] = -6e4
    reference = torch.stack((torch.full_like(values, -torch.inf), values), dim=1).to(dtype)
    lazy = reference.where(reference < -1e4, 0.0)
    expected = Expected(reference, reference.double(), precision="bf16")
    assert judge_output(reference.clone(), expected).ok
    assert "typical error" in judge_output(lazy, expected).reason


def test_double_precision_outputs_are_left_as_they_are() -> None:
    reference = torch.randn(50, dtype=torch.float64)
    kept = reference.clone()
    assert judge_output(reference, Expected(reference, reference + 1e-16)).ok
    assert torch.equal(reference, kept)


@pytest.mark.parametrize("size", [0, 1, 127, 200, 100_000])
def test_random_blocks_agree_but_for_rounding(size: int) -> None:
    def agree(output: torch.Tensor, expected: torch.Tensor) -> bool:
        return blocks_agree(output, expected, 24, random.Random(size).randrange)

    right = torch.randn(size, generator=torch.Generator().manual_seed(0))
    lost = torch.full_like(right, math.nan)
    whole = torch.arange(size)
    for honest, expected in (
        (right * (1 + 1e-6), right),
        (lost, lost),
        (right.half(), right.half()),
        (whole, whole),
    ):
        assert agree(honest, expected)
    if size:
        for wrong, expected in ((right + 0.1, right), (lost, right), (right, lost), (whole + 1, whole)):
            assert not agree(wrong, expected)
