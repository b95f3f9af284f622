"""Straight-through estimators, each restated in NumPy."""

import numpy as np
import pytest
import torch

from dabnn.gradients import Estimator, sign, sign_ste, two_valued_reference, two_valued_ste

EDGE = [-np.inf, -1.5, -1.0, -0.999, -1e-30, -0.0, 0.0, 1e-30, 0.3, 1.0, 1.0000001, 7.0]


def test_sign_is_never_zero() -> None:
    x = torch.tensor(EDGE)
    assert sign(x).tolist() == np.where(np.asarray(EDGE) >= 0, 1.0, -1.0).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_sign_keeps_the_dtype(dtype: torch.dtype) -> None:
    assert sign(torch.randn(3).to(dtype)).dtype is dtype


def test_sign_passes_the_gradient_within_one() -> None:
    x = torch.tensor(EDGE, requires_grad=True)
    upstream = torch.arange(1.0, len(EDGE) + 1)
    y = sign_ste(x)
    y.backward(upstream)
    values = x.detach().numpy()
    np.testing.assert_array_equal(y.detach().numpy(), np.where(values >= 0, 1, -1))
    np.testing.assert_array_equal(x.grad.numpy(), np.where(np.abs(values) <= 1, upstream.numpy(), 0))


def factor(name: str, u: np.ndarray, progress: float = 0.0) -> np.ndarray:
    """F of the module's docstring, in NumPy."""
    steepness = 10 ** (2 * progress - 1)
    return {
        "clipped": np.where(np.abs(u) <= 1, 1.0, 0.0),
        "polynomial": np.maximum(2 - 2 * np.abs(u), 0),
        "ede": max(1 / steepness, 1) * steepness * (1 - np.tanh(steepness * u) ** 2),
        "identity": np.ones_like(u),
    }[name]


@pytest.mark.parametrize("width", [0.25, 1.0, 1.5])
@pytest.mark.parametrize("name", ["clipped", "polynomial", "ede", "identity"])
@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_every_estimator_multiplies_by_its_factor(name: str, width: float, progress: float) -> None:
    x = torch.tensor([*EDGE[1:], width, -width], requires_grad=True)
    upstream = torch.linspace(-2, 3, len(x))
    sign_ste(x, Estimator(name, width, progress)).backward(upstream)
    expected = upstream.numpy() * factor(name, x.detach().numpy() / np.float32(width), progress)
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("width", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_passes_at_the_boundary_and_not_beyond(width: float, dtype: torch.dtype) -> None:
    edge = torch.tensor([width, -width]).to(dtype)
    beyond = torch.nextafter(edge, edge * 2)
    inside = torch.cat([torch.nextafter(edge, edge * 0), beyond]).requires_grad_()
    sign_ste(inside, Estimator("clipped", width)).backward(torch.ones_like(inside))
    assert inside.grad.tolist()[:2] == [1, 1]
    assert inside.grad.tolist()[2:] == [float(abs(value) <= width) for value in beyond.tolist()]


def test_ede_ends_close_to_the_step() -> None:
    x = np.linspace(-20, 20, 400_001)
    for progress in (0.5, 0.75, 1.0):
        assert np.trapezoid(factor("ede", x, progress), x) == pytest.approx(2.0, rel=1e-3)
    assert factor("ede", np.array([0.5]), 1.0) < 1e-2 < factor("ede", np.array([0.0]), 1.0) / 100


def rows(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """A weight of three filters, thresholds, alpha and beta, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    real, upstream = (torch.randn(3, 4, 2, 2, generator=generator) for _ in range(2))
    scalars = (torch.tensor(values) for values in ([0.2, -0.1, 9.0], [0.9, 0.7, 2.0], [-0.4, -1.1, 0.3]))
    return real, *scalars, upstream


def upper(real: torch.Tensor, threshold: torch.Tensor) -> np.ndarray:
    return real.detach().numpy() >= threshold.numpy()[:, None, None, None]


@pytest.mark.parametrize("center", ["zero", "threshold"])
@pytest.mark.parametrize("name", ["clipped", "polynomial", "ede", "identity"])
def test_two_values_pass_gradients_to_weight_and_values(name: str, center: str) -> None:
    real, threshold, alpha, beta, upstream = rows()
    for tensor in (real, alpha, beta):
        tensor.requires_grad_()
    middle = (alpha + beta) / 2 if center == "threshold" else None
    y = two_valued_ste(real, threshold, alpha, beta, Estimator(name, 0.7), middle)
    y.backward(upstream)

    e, grad = upper(real, threshold), upstream.numpy()
    a, b = (values.detach().numpy()[:, None, None, None] for values in (alpha, beta))
    np.testing.assert_array_equal(y.detach().numpy(), np.where(e, a, b))
    shift = (a + b) / 2 if center == "threshold" else 0
    expected = grad * factor(name, (real.detach().numpy() - shift) / np.float32(0.7))
    np.testing.assert_allclose(real.grad.numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(alpha.grad.numpy(), (grad * e).sum((1, 2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(beta.grad.numpy(), (grad * ~e).sum((1, 2, 3)), rtol=1e-5, atol=1e-6)


def test_the_reference_rule_is_its_factor() -> None:
    real, threshold, alpha, beta, upstream = rows()
    weight = (real * 1.3).requires_grad_()
    two_valued_reference(weight, real, threshold, alpha, beta).backward(upstream)

    e = upper(real, threshold)
    ones = e.sum((1, 2, 3), keepdims=True)
    q = np.abs(real.numpy()) < 1
    a, b = (np.abs(values.numpy())[:, None, None, None] for values in (alpha, beta))
    with np.errstate(divide="ignore"):
        expected = upstream.numpy() * (1 - 1 / 4) * np.where(e, a * q + 1 / ones, b * q + 1 / (16 - ones))
    np.testing.assert_allclose(weight.grad.numpy(), expected, rtol=1e-5)
