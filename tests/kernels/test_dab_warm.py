import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kernels import dab_threshold, dab_threshold_warm
from kernels.dab_warm import dab_threshold_warm_reference

VERSIONS = [dab_threshold_warm, dab_threshold_warm_reference]
SIZES = st.integers(1, 40)
ROW_PAIRS = SIZES.flatmap(
    lambda n: arrays(np.float64, (2, 2, n), elements=st.integers(-256, 256).map(lambda k: k / 64))
)


def squared_error(weight, parts):
    threshold, alpha, beta = (part.view(-1, 1) for part in parts)
    return (weight - torch.where(weight >= threshold, alpha, beta)).square().sum(1)


def middle_of(parts):
    return (parts[1] + parts[2]) / 2


@pytest.mark.parametrize("quantize", VERSIONS)
@settings(max_examples=80, deadline=None)
@given(pair=ROW_PAIRS, scale=st.sampled_from([0.001, 0.1, 1.0]))
def test_the_error_stays_within_the_stated_bound(quantize, pair, scale):
    before = torch.from_numpy(pair[0].copy())
    weight = before + scale * torch.from_numpy(pair[1].copy())
    found = squared_error(weight, quantize(weight, middle_of(dab_threshold(before))))
    exact = squared_error(weight, dab_threshold(weight))
    assert (found >= exact * (1 - 1e-12) - 1e-12).all()
    assert (found.sqrt() <= exact.sqrt() + 2 * (weight - before).norm(dim=1) + 1e-6).all()


@pytest.mark.parametrize("quantize", VERSIONS)
@settings(max_examples=60, deadline=None)
@given(pair=ROW_PAIRS, start=st.floats(-4, 4))
def test_no_pass_makes_the_start_worse(quantize, pair, start):
    weight = torch.from_numpy(pair[0].copy())
    is_upper = weight >= start
    split = (is_upper.any(1)) & ~is_upper.all(1)
    ones = is_upper.sum(1).clamp_min(1)
    others = (~is_upper).sum(1).clamp_min(1)
    alpha = torch.where(is_upper, weight, 0).sum(1) / ones
    beta = torch.where(is_upper, 0, weight).sum(1) / others
    at_start = squared_error(weight, (torch.full((2,), start).double(), alpha, beta))
    found = squared_error(weight, quantize(weight, torch.full((2,), start).double()))
    assert (found[split] <= at_start[split] * (1 + 1e-12) + 1e-12).all()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (31, 3, 3, 3), (33, 63, 1, 1), (8, 100, 5, 5), (4, 7)])
def test_both_versions_split_alike(shape):
    generator = torch.Generator().manual_seed(shape[0])
    weight, start = torch.randn(shape, generator=generator), 0.1 * torch.randn(shape[0], generator=generator)
    for ours, reference in zip(
        dab_threshold_warm(weight, start), dab_threshold_warm_reference(weight, start), strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-7)


def test_hundreds_of_steps_stay_close_to_the_optimum():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 576, generator=generator)
    start = middle_of(dab_threshold(weight))
    excess = []
    for _ in range(300):
        weight += 0.02 * torch.randn(weight.shape, generator=generator)
        parts = dab_threshold_warm(weight, start)
        start = middle_of(parts)
        excess.append((squared_error(weight, parts) / squared_error(weight, dab_threshold(weight)) - 1).max())
    assert max(excess) < 0.01


@pytest.mark.parametrize("quantize", VERSIONS)
@pytest.mark.parametrize("start", [-100.0, 100.0, float("nan"), float("inf")])
def test_a_start_that_splits_nothing_gives_way_to_the_mean(quantize, start):
    weight = torch.tensor([[0.0, 1.0, 10.0, 11.0]])
    threshold, alpha, beta = quantize(weight, torch.tensor([start]))
    assert (weight >= threshold).tolist() == [[False, False, True, True]]
    assert (alpha.item(), beta.item()) == (10.5, 0.5)


@pytest.mark.parametrize("quantize", VERSIONS)
@pytest.mark.parametrize("size", [1, 2, 33])
@pytest.mark.parametrize("value", [0.0, -0.1, 3.3])
def test_a_constant_filter_is_in_the_upper_group_with_its_mean(quantize, size, value):
    weight = torch.full((2, size), value)
    threshold, alpha, beta = quantize(weight, torch.tensor([value, 9.0]))
    assert (weight >= threshold.view(-1, 1)).all()
    assert alpha.tolist() == beta.tolist() == [torch.tensor(value).item()] * 2


@pytest.mark.parametrize("quantize", VERSIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_show_in_the_values(quantize, bad):
    weight = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    weight[1, 2] = bad
    _, alpha, beta = quantize(weight, torch.zeros(2))
    assert (torch.isfinite(alpha) & torch.isfinite(beta)).tolist() == [True, False]


def test_the_operator_has_a_faithful_fake():
    operator = torch.ops.dab.dab_threshold_warm.default
    arguments = (torch.randn(3, 4, 3, 3), torch.zeros(3))
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
