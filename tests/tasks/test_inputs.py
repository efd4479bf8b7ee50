"""Drawing inputs: determinism, freshness, ranges, and structure under every distribution."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ke_gym.tasks import DISTRIBUTIONS
from ke_gym.tasks.inputs import BLOCK, drawing

seeds = st.integers(0, 2**63 - 1)
shapes = st.lists(st.integers(0, 40), max_size=4).map(tuple)
floats = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])


@settings(max_examples=60, deadline=None)
@given(seed=seeds, shape=shapes, dtype=floats, distribution=st.sampled_from(DISTRIBUTIONS))
def test_draws_are_a_function_of_seed_and_distribution(seed, shape, dtype, distribution):
    def draw():
        with drawing(seed, distribution):
            x = torch.randn(shape, dtype=dtype)
            return [
                x,
                torch.rand_like(x),
                torch.randint(3, 9, shape),
                torch.randperm(7),
                torch.randn(2, *shape),
            ]

    first, second = draw(), draw()
    assert [t.shape for t in first] == [shape, shape, shape, (7,), (2, *shape)]
    assert first[0].dtype == first[1].dtype == dtype
    for a, b in zip(first, second, strict=True):
        assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


@settings(max_examples=60, deadline=None)
@given(seed=seeds, dtype=floats, distribution=st.sampled_from(DISTRIBUTIONS))
def test_rand_stays_below_one(seed, dtype, distribution):
    with drawing(seed, distribution):
        values = torch.rand(5000, dtype=dtype)
        inside = torch.empty(1000, dtype=dtype).uniform_(2, 3)
    assert values.min() >= 0 and values.max() < 1
    assert inside.min() >= 2 and inside.max() <= 3


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    low=st.integers(-(2**40), 2**40),
    span=st.one_of(st.integers(1, 2**20), st.integers(2**20, 2**45)),
)
def test_randint_stays_in_range(seed, low, span):
    with drawing(seed):
        values = torch.randint(low, low + span, (3000,))
    assert values.dtype == torch.int64
    assert values.min() >= low and values.max() < low + span


def test_every_form_of_randint():
    with drawing(1):
        forms = [
            torch.randint(5, (100,)),
            torch.randint(2, 5, (100,)),
            torch.randint(2, 5, size=(100,), dtype=torch.int32),
            torch.randint(low=2, high=5, size=[100]),
            torch.randint(2, high=5, size=(100,)),
            torch.randint(high=5, size=(100,)),
            torch.randint_like(torch.empty(100), 2, 5),
            torch.randint_like(torch.empty(100, dtype=torch.int32), 5),
        ]
    for values in forms:
        assert values.shape == (100,) and values.min() >= 0 and values.max() == 4
    assert [str(f.dtype) for f in forms[:3]] == ["torch.int64", "torch.int64", "torch.int32"]


def test_layout_dtype_and_gradient_requests_are_honoured():
    with drawing(3):
        transposed = torch.randn_like(torch.empty(6, 4).t())
        leaf = torch.randn(3, requires_grad=True)
        given = torch.empty(2, 5)
        torch.randn(2, 5, out=given)
        strided = torch.zeros(4, 6)[:, ::2].normal_(mean=100, std=1e-3)
        pairs = torch.randn(200_000, dtype=torch.complex64)
    assert transposed.shape == (4, 6) and transposed.stride() == (1, 4)
    assert leaf.requires_grad and leaf.is_leaf
    assert given.abs().sum() > 0
    assert (strided - 100).abs().max() < 0.01
    assert pairs.abs().square().mean() == pytest.approx(1, abs=0.02)


def test_moments_are_those_of_the_names():
    def draw(distribution):
        with drawing(11, distribution):
            return torch.randn(2 * BLOCK + 17).double()

    for name in ("task", "uniform", "laplace"):
        assert draw(name).mean() == pytest.approx(0, abs=0.01)
        assert draw(name).std() == pytest.approx(1, abs=0.01)
    assert draw("exponential").mean() == pytest.approx(1, abs=0.01)
    assert draw("lognormal").log().std() == pytest.approx(1, abs=0.01)
    assert draw("offset").mean() == pytest.approx(10, abs=0.01)
    assert (draw("sparse") == 0).double().mean() == pytest.approx(0.9, abs=0.01)
    assert draw("ties").unique().numel() < 30
    magnitudes = draw("tiny").abs()
    assert (
        magnitudes.max() < 1e-30 and 0 < (magnitudes < torch.finfo(torch.float32).tiny).double().mean() < 0.5
    )
    assert draw("large").abs().min() >= 1e3 and draw("large").abs().max() <= 1e4
    assert draw("zeros").abs().max() == 0 and 0.4 < draw("zeros").signbit().double().mean() < 0.6
    special = draw("special")
    assert 1 <= special.isnan().sum() <= 3 and special.isinf().any() and special.isfinite().sum() > BLOCK


def test_small_tensors_get_special_values_too():
    with drawing(0, "special"):
        assert not torch.randn(1).isfinite().any()
        assert torch.randn(0).numel() == 0


@pytest.mark.parametrize("factory", ["randn", "rand"])
def test_other_seeds_give_other_contents_everywhere(factory):
    def draw(seed):
        with drawing(seed):
            return getattr(torch, factory)(3 * BLOCK)

    first = draw(1)
    for seed in (2, 3, 2**40):
        assert (first == draw(seed)).double().mean() < 1e-4


def test_a_seed_set_by_the_file_does_not_freeze_the_contents():
    def draw(seed):
        with drawing(seed):
            torch.manual_seed(0)
            generator = torch.Generator().manual_seed(0)
            return torch.cat(
                [torch.randn(50), torch.rand(50, generator=generator), torch.randint(9999, (50,))]
            )

    assert (draw(1) == draw(2)).double().mean() < 0.05


def test_default_generators_are_left_as_they_were():
    def state():
        return torch.get_rng_state().sum(), np.random.get_state()[1].sum(), random.getstate()

    before = state()
    with drawing(5):
        torch.randperm(10), np.random.rand(3), random.random()
    assert state() == before


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_structure_made_by_further_code_survives(distribution):
    with drawing(4, distribution):
        boundaries = torch.randn(100).sort().values
        cuts = torch.cat([torch.tensor([0]), torch.randint(0, 51, (9,)).sort().values, torch.tensor([50])])
        indices = (torch.rand(1000) * 8).long()
        probabilities = torch.softmax(torch.randn(10, 10).nan_to_num(posinf=1, neginf=0), dim=1)
        order = torch.randperm(20)
    known = boundaries[~boundaries.isnan()]
    assert (known[1:] >= known[:-1]).all()
    assert (cuts[1:] >= cuts[:-1]).all() and cuts[-1] == 50
    assert indices.min() >= 0 and indices.max() < 8
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(10))
    assert sorted(order.tolist()) == list(range(20))


def test_an_unknown_distribution_is_refused():
    with (
        pytest.raises(ValueError, match="unknown distribution 'gamma'; one of task, uniform"),
        drawing(0, "gamma"),
    ):
        pass


def test_offset_spares_an_honest_variance_and_not_a_careless_one():
    with drawing(9, "offset"):
        x = torch.randn(64, 4096)
    exact = x.double().var(dim=1)
    honest = (x - x.mean(dim=1, keepdim=True)).square().sum(dim=1) / 4095
    careless = (x.square().mean(dim=1) - x.mean(dim=1).square()) * (4096 / 4095)

    def error(found):
        return ((found - exact) / exact).abs().max().item()

    assert error(honest) < 1e-5 and error(careless) > 5 * error(honest)
    assert math.isfinite(error(careless))
