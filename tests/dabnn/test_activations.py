"""Activations and binary inputs, each restated in NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from dabnn.activations import RPReLU, binary_input, input_code
from dabnn.gradients import Estimator

SHAPE = (3, 5, 4, 4)


def draw(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def per_channel(values: torch.Tensor) -> np.ndarray:
    return values.detach().numpy()[:, None, None]


def test_rprelu_is_a_shifted_prelu() -> None:
    layer = RPReLU(5)
    for seed, parameter in enumerate(layer.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    x, upstream = draw(3).requires_grad_(), draw(4)
    y = layer(x)
    y.backward(upstream)
    u = x.detach().numpy() - per_channel(layer.shift_in)
    slope, grad = per_channel(layer.slope), upstream.numpy()
    expected = np.where(u > 0, u, slope * u) + per_channel(layer.shift_out)
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    to_x = grad * np.where(u > 0, 1, slope)
    np.testing.assert_allclose(x.grad.numpy(), to_x, rtol=1e-5, atol=1e-6)
    sums = {"shift_in": -to_x, "shift_out": grad, "slope": grad * np.minimum(u, 0)}
    for name, terms in sums.items():
        found = getattr(layer, name).grad.numpy()
        np.testing.assert_allclose(found, terms.sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


def test_rprelu_starts_as_prelu_and_works_in_autocast() -> None:
    layer = RPReLU(5)
    assert torch.equal(layer(draw(0)), nn.PReLU(5)(draw(0)))
    assert layer(draw(0).bfloat16()).dtype is torch.bfloat16


def test_sign_inputs_are_signs() -> None:
    x = draw(0)
    code = input_code(x, "sign")
    assert code.real is x
    assert code.scale is None
    assert code.offset is None
    assert torch.equal(binary_input(x, "sign", None, Estimator()), torch.where(x >= 0, 1.0, -1.0))


def test_rsign_learns_its_shift() -> None:
    x, shift, upstream = draw(0).requires_grad_(), draw(1, (5,)).requires_grad_(), draw(2)
    y = binary_input(x, "rsign", shift, Estimator("clipped", 0.8))
    y.backward(upstream)
    u = x.detach().numpy() - per_channel(shift)
    expected = np.where(np.abs(u) <= np.float32(0.8), upstream.numpy(), 0)
    np.testing.assert_array_equal(y.detach().numpy(), np.where(u >= 0, 1, -1))
    np.testing.assert_array_equal(x.grad.numpy(), expected)
    np.testing.assert_allclose(shift.grad.numpy(), -expected.sum((0, 2, 3)), rtol=1e-5, atol=1e-5)
    assert torch.equal(input_code(x, "rsign", shift).real, (x - shift.view(-1, 1, 1)).detach())


def two_valued(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """u, its mask, and alpha and beta of each sample, in NumPy."""
    u = x - x.mean(1, keepdims=True)
    e = u >= 0
    alpha = np.stack([sample[mask].mean() for sample, mask in zip(u, e, strict=True)])
    beta = np.stack([sample[~mask].mean() for sample, mask in zip(u, e, strict=True)])
    return u, e, alpha[:, None, None, None], beta[:, None, None, None]


def test_two_valued_inputs_have_two_signed_means_a_sample() -> None:
    x = draw(0) + 0.7
    u, e, alpha, beta = two_valued(x.numpy())
    y = binary_input(x, "two_valued", None, Estimator())
    np.testing.assert_allclose(y.numpy(), np.where(e, alpha, beta), rtol=1e-5)
    code = input_code(x, "two_valued")
    np.testing.assert_allclose(code.real.numpy(), u, rtol=1e-4, atol=1e-6)
    rebuilt = code.offset + code.scale * torch.where(code.real >= 0, 1.0, -1.0)
    torch.testing.assert_close(rebuilt, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [0.5, 2.0])
def test_two_valued_inputs_pass_the_gradient_of_their_means_as_well(width: float) -> None:
    x, upstream = draw(0).requires_grad_(), draw(1)
    binary_input(x, "two_valued", None, Estimator("clipped", width)).backward(upstream)
    u, e, _, _ = two_valued(x.detach().numpy())
    grad = upstream.numpy()
    to_u = np.where(np.abs(u) <= width, grad, 0)
    for sample in range(len(u)):
        for group in (e[sample], ~e[sample]):
            to_u[sample][group] += grad[sample][group].mean()
    expected = to_u - to_u.mean(1, keepdims=True)
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_blank_input_has_two_values_of_zero() -> None:
    x = torch.zeros(SHAPE, requires_grad=True)
    y = binary_input(x, "two_valued", None, Estimator())
    y.sum().backward()
    assert not y.any()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("quantizer", ["sign", "rsign", "two_valued"])
def test_narrow_inputs_keep_their_dtype(quantizer: str) -> None:
    x = draw(0).bfloat16().requires_grad_()
    y = binary_input(x, quantizer, torch.zeros(5), Estimator("polynomial"))
    y.sum().backward()
    assert y.dtype is x.grad.dtype is torch.bfloat16
