"""Laws of the quantizers, against brute force in float64."""

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dabnn.errors import InvalidInputError
from dabnn.quantizers import binarize, subtract_center

# Multiples of 1/64 are exact in float32, also after the shifts and scales below, so that ties stay ties.
GRID = st.integers(-256, 256).map(lambda k: k / 64)
FILTERS = st.integers(2, 40).flatmap(lambda n: arrays(np.float32, (2, n), elements=GRID))


def filters(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.copy())


def best_error_of_any_threshold(filter_: np.ndarray) -> float:
    ordered = np.sort(filter_.astype(np.float64))
    errors = [((ordered - ordered.mean()) ** 2).sum()]
    for k in range(1, len(ordered)):
        groups = ordered[:k], ordered[k:]
        errors.append(sum(((group - group.mean()) ** 2).sum() for group in groups))
    return float(min(errors))


@settings(deadline=None, max_examples=60)
@given(FILTERS)
def test_dab_error_is_the_least_of_all_thresholds(values: np.ndarray) -> None:
    code = binarize(filters(values), "dab")
    for row, mask, alpha, beta, error in zip(values, code.mask, code.alpha, code.beta, code.error, strict=True):
        dense = np.where(mask.numpy(), float(alpha), float(beta))
        found = ((row.astype(np.float64) - dense) ** 2).sum()
        best = best_error_of_any_threshold(row)
        # alpha and beta are rounded to float32: 2**-24 relative on values below 4, on each of n weights.
        rounding = len(row) * (4 * 2**-24) ** 2
        assert found <= best * (1 + 1e-6) + rounding
        assert float(error) == pytest.approx(found, rel=1e-5, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(FILTERS, st.sampled_from(["dab", "xnor", "sign"]), st.randoms(use_true_random=False))
def test_the_order_of_the_weights_does_not_matter(values: np.ndarray, method: str, random: Random) -> None:
    order = list(range(values.shape[1]))
    random.shuffle(order)
    code, shuffled = binarize(filters(values), method), binarize(filters(values[:, order]), method)
    assert torch.equal(shuffled.mask, code.mask[:, order])
    torch.testing.assert_close(shuffled.alpha, code.alpha, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shuffled.beta, code.beta, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(FILTERS, st.sampled_from([0.25, 2.0, 8.0]), st.sampled_from([-2.0, 0.0, 0.5]))
def test_dab_follows_scale_and_shift(values: np.ndarray, scale: float, shift: float) -> None:
    code, moved = binarize(filters(values), "dab"), binarize(filters(values * scale + shift), "dab")
    torch.testing.assert_close(moved.error, code.error * scale**2, rtol=1e-4, atol=1e-6 * scale**2)
    if np.array_equal(code.mask.numpy(), moved.mask.numpy()):  # two splits can be equally good
        torch.testing.assert_close(moved.alpha, code.alpha * scale + shift, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moved.beta, code.beta * scale + shift, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(FILTERS, st.sampled_from([0.25, 2.0, 8.0]))
def test_xnor_follows_scale(values: np.ndarray, scale: float) -> None:
    code, scaled = binarize(filters(values), "xnor"), binarize(filters(values * scale), "xnor")
    assert torch.equal(scaled.mask, code.mask)
    assert torch.equal(scaled.alpha, code.alpha * scale)


def test_threshold_is_found_where_two_peaks_are_unequal() -> None:
    weight = torch.tensor([[1.0, 1.2, 0.8, -0.1, 0.0, 0.1, 0.05, -0.05]])
    code = binarize(weight, "dab")
    assert code.mask.tolist() == [[True, True, True, False, False, False, False, False]]
    assert code.alpha.item() == pytest.approx(1.0)
    assert code.beta.item() == pytest.approx(0.0, abs=1e-7)


def test_xnor_and_sign_count_zero_as_upper() -> None:
    weight = torch.tensor([[0.0, -0.0, -1.0, 3.0]])
    for method, magnitude in (("xnor", 1.0), ("sign", 1.0)):
        code = binarize(weight, method)
        assert code.mask.tolist() == [[True, True, False, True]]
        assert code.dense().tolist() == [[magnitude, magnitude, -magnitude, magnitude]]
        assert code.error.item() == pytest.approx(1 + 1 + 0 + 4)


def test_a_constant_filter_is_its_own_code() -> None:
    code = binarize(torch.full((3, 4, 1, 1), 0.25), "dab")
    assert code.mask.all()
    assert torch.equal(code.dense(), torch.full((3, 4, 1, 1), 0.25))
    assert torch.equal(code.error, torch.zeros(3))


@pytest.mark.parametrize("center", ["filter", "tap"])
@pytest.mark.parametrize("method", ["dab", "xnor", "sign"])
def test_code_and_error_refer_to_the_centred_weight(method: str, center: str) -> None:
    weight = torch.randn(5, 7, 3, 3, generator=torch.Generator().manual_seed(0)) + 2
    dims = (1, 2, 3) if center == "filter" else (1,)
    centered = weight.numpy() - weight.numpy().mean(dims, keepdims=True)
    code = binarize(weight, method, center)
    expected = binarize(torch.from_numpy(centered), method)
    assert torch.equal(code.mask, expected.mask)
    error = ((centered - code.dense().numpy()) ** 2).sum((1, 2, 3))
    np.testing.assert_allclose(code.error.numpy(), error, rtol=1e-5)


def test_centred_weights_have_mean_zero_at_each_tap() -> None:
    weight = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1
    assert subtract_center(weight, "tap").mean(1).abs().max() < 1e-15
    assert subtract_center(weight, "none") is weight


@pytest.mark.parametrize("method", ["dab", "xnor", "sign"])
def test_narrow_weights_get_float32_scalars(method: str) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    code = binarize(weight, method)
    assert code.alpha.dtype == code.beta.dtype == torch.float32
    assert torch.equal(code.alpha, binarize(weight.float(), method).alpha)


def test_a_code_carries_no_gradient() -> None:
    weight = torch.randn(2, 8, requires_grad=True)
    assert not binarize(weight, "dab", "filter").dense().requires_grad


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(InvalidInputError, match=r"^binarize\.weights: 'xnorr' .*Did you mean 'xnor'"):
        binarize(torch.randn(2, 4), "xnorr")


def test_unknown_center_names_the_nearest() -> None:
    with pytest.raises(InvalidInputError, match=r"^binarize\.center: 'taps' .*Did you mean 'tap'"):
        binarize(torch.randn(2, 4), "dab", "taps")


@pytest.mark.parametrize(("center", "shape"), [("tap", (4, 1, 3, 3)), ("filter", (4, 1, 1, 1))])
def test_a_center_that_leaves_nothing_is_refused(center: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match="every weight would become zero"):
        binarize(torch.randn(shape), "dab", center)


@pytest.mark.parametrize("method", ["dab", "xnor", "sign"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_without_a_value_are_refused(method: str, bad: float) -> None:
    weight = torch.randn(2, 8)
    weight[1, 3] = bad
    with pytest.raises(InvalidInputError, match=r"^weight: 1 of 16 values"):
        binarize(weight, method)


@pytest.mark.parametrize("weight", [torch.zeros(4), torch.zeros(0, 3), torch.zeros(2, 3, dtype=torch.int64)])
def test_what_is_no_weight_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(InvalidInputError, match=r"^weight: "):
        binarize(weight, "dab")
