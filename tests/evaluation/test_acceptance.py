from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ke_gym.evaluation.acceptance import Expected, blocks_agree, error_pattern, judge_output

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
