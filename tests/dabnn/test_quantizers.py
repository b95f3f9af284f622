"""Laws of the quantizers, against brute force in float64."""

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dabnn.errors import InvalidInputError
from dabnn.quantizers import QUANTIZERS, binarize, split, split_learned, subtract_center, with_gradient

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


def formula(method: str, w: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Mask, alpha and beta of the closed forms, in float64."""
    m = w.mean()
    spread = np.abs(w - m).mean()
    return {
        "xnor": (w >= 0, np.abs(w).mean(), -np.abs(w).mean()),
        "xnor_centered": (w >= m, spread, -spread),
        "lsbq": (w >= m, m + spread, m - spread),
        "adabin": (w >= m, m + w.std(), m - w.std()),
        "sign": (w >= 0, 1.0, -1.0),
    }[method]


@settings(deadline=None, max_examples=40)
@given(FILTERS, st.sampled_from(["xnor", "xnor_centered", "lsbq", "adabin", "sign"]))
def test_closed_forms_are_their_formulas_and_never_better_than_dab(values: np.ndarray, method: str) -> None:
    code, best = binarize(filters(values), method), binarize(filters(values), "dab")
    for row, mask, alpha, beta, error, least in zip(
        values.astype(np.float64), code.mask, code.alpha, code.beta, code.error, best.error, strict=True
    ):
        expected, upper, lower = formula(method, row)
        # Means are rounded to float32, so a weight that equals its mean may fall on either side of it.
        is_clear = np.abs(row - row.mean()) > 1e-5 if method not in ("xnor", "sign") else np.full(len(row), True)
        assert np.array_equal(mask.numpy()[is_clear], expected[is_clear])
        assert (float(alpha), float(beta)) == pytest.approx((upper, lower), rel=1e-5, abs=1e-5)
        assert float(least) <= float(error) * (1 + 1e-5) + 1e-9


@settings(deadline=None, max_examples=40)
@given(FILTERS, st.sampled_from(QUANTIZERS), st.randoms(use_true_random=False))
def test_the_order_of_the_weights_does_not_matter(values: np.ndarray, method: str, random: Random) -> None:
    order = list(range(values.shape[1]))
    random.shuffle(order)
    code, shuffled = binarize(filters(values), method), binarize(filters(values[:, order]), method)
    # A mean of float32 numbers depends on their order in its last bit.
    is_clear = np.abs(values[:, order] - values.mean(1, dtype=np.float64, keepdims=True)) > 1e-5
    is_exact = method in ("dab", "dab_warm", "dab_learned", "xnor", "sign")
    compared = torch.from_numpy(is_clear | is_exact)
    assert torch.equal(shuffled.mask[compared], code.mask[:, order][compared])
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
@given(FILTERS, st.sampled_from(["xnor", "xnor_centered", "lsbq", "adabin"]), st.sampled_from([0.25, 2.0, 8.0]))
def test_closed_forms_follow_scale(values: np.ndarray, method: str, scale: float) -> None:
    code, scaled = binarize(filters(values), method), binarize(filters(values * scale), method)
    # Powers of two: every rounding is the same.
    assert torch.equal(scaled.mask, code.mask)
    torch.testing.assert_close(scaled.alpha, code.alpha * scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.beta, code.beta * scale, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=30)
@given(FILTERS, st.sampled_from(["lsbq", "adabin"]), st.sampled_from([-2.0, 0.5]))
def test_thresholds_at_the_mean_follow_a_shift(values: np.ndarray, method: str, shift: float) -> None:
    code, moved = binarize(filters(values), method), binarize(filters(values + shift), method)
    torch.testing.assert_close(moved.alpha, code.alpha + shift, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved.beta, code.beta + shift, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    ("method", "value"),
    [*((name, -0.25) for name in ("dab", "dab_warm", "dab_learned", "lsbq", "adabin", "xnor")), ("xnor_centered", 0.0)],
)
def test_a_constant_filter_has_one_value(method: str, value: float, size: int) -> None:
    weight = torch.full((3, size, 1, 1), -0.25)
    code = binarize(weight, method)
    assert code.mask.all() or method == "xnor"
    assert torch.equal(code.dense(), torch.full_like(weight, value))
    assert torch.equal(code.error, torch.full((3,), size * (value + 0.25) ** 2))


@pytest.mark.parametrize("center", ["filter", "tap"])
@pytest.mark.parametrize("method", QUANTIZERS)
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


@pytest.mark.parametrize("method", QUANTIZERS)
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


@pytest.mark.parametrize("method", QUANTIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_without_a_value_are_refused(method: str, bad: float) -> None:
    weight = torch.randn(2, 8)
    weight[1, 3] = bad
    with pytest.raises(InvalidInputError, match=r"^weight: 1 of 16 values"):
        binarize(weight, method)
    if method != "sign":  # its alpha and beta do not depend on the weight
        with pytest.raises(InvalidInputError, match=r"^weight: holds NaN"):
            split(weight, method)
    with pytest.raises(InvalidInputError, match=r"^weight: holds NaN"):
        split_learned(weight, torch.ones(2), -torch.ones(2))


def test_learned_values_give_each_weight_the_nearer_one() -> None:
    weight = torch.tensor([[0.0, 0.4, 0.6, 2.0]])
    threshold, alpha, beta = split_learned(weight, torch.tensor([1.0], requires_grad=True), torch.tensor([0.0]))
    assert threshold.item() == 0.5
    assert alpha.requires_grad
    assert not beta.requires_grad


@pytest.mark.parametrize("method", QUANTIZERS)
def test_the_gradient_of_alpha_and_beta_is_that_of_their_formula(method: str) -> None:
    """Against finite differences with the mask held fixed, which small steps do."""
    weight = torch.randn(3, 9, generator=torch.Generator().manual_seed(4), dtype=torch.float64).requires_grad_()
    parts = split(weight, method)

    def values(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            at_w = split(w, method)
        return with_gradient(w, method, at_w)[1:]

    assert all(torch.equal(found, given) for found, given in zip(values(weight), parts[1:], strict=True))
    if method != "sign":
        assert torch.autograd.gradcheck(values, (weight,))


def test_the_gradient_of_dab_is_one_over_the_size_of_the_group() -> None:
    weight = torch.tensor([[1.0, 1.2, -0.1, 0.0, 0.1]], requires_grad=True)
    _, alpha, beta = with_gradient(weight, "dab", split(weight, "dab"))
    (3 * alpha + 6 * beta).sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor([[1.5, 1.5, 2.0, 2.0, 2.0]]))


@pytest.mark.parametrize("weight", [torch.zeros(4), torch.zeros(0, 3), torch.zeros(2, 3, dtype=torch.int64)])
def test_what_is_no_weight_is_refused(weight: torch.Tensor) -> None:
    with pytest.raises(InvalidInputError, match=r"^weight: "):
        binarize(weight, "dab")
