"""Against what the reference program of arXiv 1804.02941 computed, and where we differ, by exactly that difference.

The arrays in `golden` come from its own functions, in float32 on a CPU. In each test, P is its upper group: the weights
strictly above its threshold, where ours holds those at or above it.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dabnn.activations import binary_input
from dabnn.gradients import Estimator, sign_ste, two_valued_reference
from dabnn.layers import BinaryConv2d, LayerOptions
from dabnn.quantizers import binarize

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = ["gauss_4x3x3x3", "gauss_8x16x1x1", "ties_4x4x3x3", "tiny_6x2x1x1"]
# As the program binarizes them, centred and clamped, and as they were drawn.
FORMS = [("", "clamped"), ("raw_", "W")]
LEARNING_RATE = 0.1
each_weight = pytest.mark.parametrize("case", WEIGHTS)
each_form = pytest.mark.parametrize(("prefix", "weight_key"), FORMS)


def load(case: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"reference_{case}.npz") as arrays:
        return dict(arrays)


def per_filter(values: np.ndarray) -> np.ndarray:
    return values[:, None, None, None]


def squared_error(weight: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """Of each filter, in float64."""
    return ((weight.astype(np.float64) - dense) ** 2).sum((1, 2, 3))


def test_the_sign_of_an_input_is_that_of_the_program_except_at_zero() -> None:
    golden = load("activation")
    x = golden["x"]
    assert (x == 0).sum() == 2  # +0 and -0: there the program gives 0, and we give +1
    expected = np.where(x == 0, 1, golden["forward"])
    np.testing.assert_array_equal(sign_ste(torch.from_numpy(x)).numpy(), expected)
    np.testing.assert_array_equal(binary_input(torch.from_numpy(x), "sign", None, Estimator()).numpy(), expected)
    assert not golden["forward"][x == 0].any()


def test_the_gradient_of_the_sign_is_that_of_the_program_except_at_the_ends_of_the_window() -> None:
    golden = load("activation")
    is_end = np.abs(golden["x"]) == 1
    assert is_end.sum() == 2  # there the program stops the gradient, and we pass it
    assert not golden["grad_in"][is_end].any()
    x = torch.from_numpy(golden["x"]).requires_grad_()
    sign_ste(x).backward(torch.from_numpy(golden["grad_out"]))
    np.testing.assert_array_equal(x.grad.numpy(), np.where(is_end, golden["grad_out"], golden["grad_in"]))


def test_the_window_of_the_program_is_ours_with_the_next_smaller_width() -> None:
    golden = load("activation")
    x = torch.from_numpy(golden["x"]).requires_grad_()
    width = float(np.nextafter(np.float32(1), np.float32(0)))
    sign_ste(x, Estimator("clipped", width)).backward(torch.from_numpy(golden["grad_out"]))
    np.testing.assert_array_equal(x.grad.numpy(), golden["grad_in"])


@each_form
@each_weight
def test_xnor_is_that_of_the_program_except_at_zero(case: str, prefix: str, weight_key: str) -> None:
    golden = load(case)
    weight, theirs = golden[weight_key], golden[prefix + "xnor"]
    is_zero = weight == 0
    assert is_zero.any() == (case == "ties_4x4x3x3")
    assert (theirs[is_zero] < 0).all()  # the program counts zeros as negative, we as positive
    ours = binarize(torch.from_numpy(weight), "xnor").dense().numpy()
    np.testing.assert_allclose(ours, np.where(is_zero, -theirs, theirs), rtol=1e-6)


@each_weight
def test_the_signs_of_weights_are_those_of_the_program_except_at_zero(case: str) -> None:
    golden = load(case)
    ours = binarize(torch.from_numpy(golden["clamped"]), "sign").dense().numpy()
    np.testing.assert_array_equal(ours, np.where(golden["clamped"] == 0, -golden["bnn"], golden["bnn"]))


@each_form
@each_weight
def test_no_filter_is_approximated_worse_than_by_the_program(case: str, prefix: str, weight_key: str) -> None:
    golden = load(case)
    weight = golden[weight_key]
    ours = squared_error(weight, binarize(torch.from_numpy(weight), "dab").dense().numpy())
    theirs = squared_error(weight, golden[prefix + "dual"])
    assert (ours <= theirs + 1e-12).all()  # what rounding alpha and beta to float32 can cost
    assert ours.sum() < 0.99 * theirs.sum()


@each_form
def test_a_filter_of_two_weights_keeps_both_where_the_program_leaves_it_one(prefix: str, weight_key: str) -> None:
    golden = load("tiny_6x2x1x1")
    theirs = golden[prefix + "dual"]
    is_constant = theirs.max((1, 2, 3)) == theirs.min((1, 2, 3))
    assert is_constant.any()
    ours = binarize(torch.from_numpy(golden[weight_key]), "dab").dense().numpy()
    np.testing.assert_array_equal(ours, golden[weight_key])


@each_form
@each_weight
def test_the_reference_rule_is_that_of_the_program_but_for_zeros_in_the_upper_group(
    case: str, prefix: str, weight_key: str
) -> None:
    """On the factors that the program computed, at its own thresholds and values."""
    golden = load(case)
    w, dual = golden[weight_key], golden[prefix + "dual"]
    weight = torch.from_numpy(w).requires_grad_()
    threshold = torch.from_numpy(np.nextafter(golden[prefix + "thresh"], np.float32(np.inf)))
    alpha, beta = (torch.from_numpy(values) for values in (dual.max((1, 2, 3)), dual.min((1, 2, 3))))
    y = two_valued_reference(weight, weight, threshold, alpha, beta)
    y.backward(torch.ones_like(y))
    np.testing.assert_array_equal(y.detach().numpy(), dual)

    is_upper = w > per_filter(golden[prefix + "thresh"])
    ones = is_upper.sum((1, 2, 3), keepdims=True)
    # The program leaves zeros out of K and counts them into n - K.
    counted = (is_upper & (w != 0)).sum((1, 2, 3), keepdims=True)
    upper, lower = (
        1 / np.maximum(ours, 1) - 1 / np.maximum(theirs, 1)
        for ours, theirs in ((ones, counted), (w[0].size - ones, w[0].size - counted))
    )
    difference = (1 - 1 / w.shape[1]) * np.where(is_upper, upper, lower)
    assert difference.any() == (case == "ties_4x4x3x3")
    np.testing.assert_allclose(weight.grad.numpy(), golden[prefix + "dual_grad_factor"] + difference, rtol=1e-5)


def test_a_step_at_the_values_of_the_program_leads_to_its_weights() -> None:
    golden = load("one_step")
    real, bias = (torch.from_numpy(golden[key]).requires_grad_() for key in ("real", "bias"))
    values = golden["binarized"]
    alpha, beta = values.max((1, 2, 3)), values.min((1, 2, 3))
    threshold = np.where(values == per_filter(alpha), golden["real"], np.inf).min((1, 2, 3))
    parts = (torch.from_numpy(part) for part in (threshold, alpha, beta))
    dense = two_valued_reference(real, real, *parts)
    np.testing.assert_array_equal(dense.detach().numpy(), values)

    y = F.conv2d(torch.from_numpy(golden["x"]), dense, bias, padding=1)
    np.testing.assert_allclose(y.detach().numpy(), golden["output"], rtol=1e-5, atol=1e-5)
    y.backward(torch.from_numpy(golden["upstream"]))
    np.testing.assert_allclose(real.grad.numpy(), golden["grad_scaled"], rtol=1e-5, atol=1e-5)
    torch.optim.SGD([real, bias], LEARNING_RATE).step()
    np.testing.assert_allclose(real.detach().numpy(), golden["W_after"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(bias.detach().numpy(), golden["bias_after"], rtol=1e-5, atol=1e-6)


def stepped_layer(golden: dict[str, np.ndarray]) -> tuple[BinaryConv2d, np.ndarray]:
    """A layer of the golden weights after its step, and what it put out before."""
    options = LayerOptions(gradient="reference")
    layer = BinaryConv2d(4, 5, 3, padding=1, weight_quantizer="dab", center="tap", options=options)
    layer.load_state_dict({"weight": torch.from_numpy(golden["W"]), "bias": torch.from_numpy(golden["bias"])})
    y = layer(torch.from_numpy(golden["x"]))
    y.backward(torch.from_numpy(golden["upstream"]))
    torch.optim.SGD(layer.parameters(), LEARNING_RATE).step()
    return layer, y.detach().numpy()


def test_a_layer_takes_the_step_of_the_program_where_both_choose_the_same_values() -> None:
    """Ours are the optimum; the program's threshold and means are beside it in four of the five filters."""
    golden = load("one_step")
    code = binarize(torch.from_numpy(golden["W"]), "dab", "tap")
    is_same = np.isclose(code.dense().numpy(), golden["binarized"], rtol=1e-5).all((1, 2, 3))
    assert is_same.tolist() == [False, False, False, True, False]

    layer, y = stepped_layer(golden)
    np.testing.assert_allclose(y[:, is_same], golden["output"][:, is_same], rtol=1e-5, atol=1e-5)
    # The program leaves the weight centred; ours is changed by the optimizer alone.
    step, expected = layer.weight.detach().numpy() - golden["W"], golden["W_after"] - golden["real"]
    np.testing.assert_allclose(step[is_same], expected[is_same], rtol=1e-5, atol=1e-6)
    assert (np.abs(step - expected)[~is_same].max((1, 2, 3)) > 1e-4).all()
    np.testing.assert_allclose(layer.bias.detach().numpy(), golden["bias_after"], rtol=1e-5, atol=1e-6)


def test_elsewhere_a_layer_takes_the_step_of_the_same_rule_at_its_own_values() -> None:
    golden = load("one_step")
    code = binarize(torch.from_numpy(golden["W"]), "dab", "tap")
    mask, dense = code.mask.numpy(), code.dense().numpy()
    ours, theirs = (squared_error(golden["real"], values) for values in (dense, golden["binarized"]))
    assert (ours <= theirs * (1 + 1e-6)).all()

    ones = mask.sum((1, 2, 3), keepdims=True)
    assert (np.abs(golden["real"]) < 1).all()
    factor = (1 - 1 / 4) * (np.abs(dense) + np.where(mask, 1 / ones, 1 / (36 - ones)))
    # This gradient does not depend on the values: the loss is linear in them.
    expected = golden["W"] - LEARNING_RATE * factor * golden["grad_wrt_binarized"]
    layer, _ = stepped_layer(golden)
    np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
