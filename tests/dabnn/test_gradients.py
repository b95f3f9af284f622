"""Straight-through estimators, each restated in NumPy."""

import numpy as np
import pytest
import torch

from dabnn.gradients import clipped_ste, sign, sign_ste

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


@pytest.mark.parametrize("clip", [0.5, 1.0, float("inf")])
def test_weights_pass_the_gradient_within_the_clip(clip: float) -> None:
    real = torch.tensor(EDGE[1:], requires_grad=True)
    quantized = torch.linspace(-1, 1, len(EDGE) - 1)
    upstream = torch.arange(1.0, len(EDGE))
    y = clipped_ste(real, quantized, clip)
    y.backward(upstream)
    assert torch.equal(y, quantized)
    expected = np.where(np.abs(real.detach().numpy()) <= clip, upstream.numpy(), 0)
    np.testing.assert_array_equal(real.grad.numpy(), expected)
