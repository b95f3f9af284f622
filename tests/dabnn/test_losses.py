"""Each loss against its formula, written again in NumPy."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dabnn.losses import (
    distillation,
    kurtosis_penalty,
    latent_weights,
    mixed_cross_entropy,
    smoothed_cross_entropy,
)
from dabnn.models import build


def softmax(values: np.ndarray) -> np.ndarray:
    raised = np.exp(values - values.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_mixes_the_label_with_all_classes(smoothing: float, logits: Tensor) -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    targets = (1 - smoothing) * np.eye(5)[labels.numpy()] + smoothing / 5
    expected = -(targets * np.log(softmax(logits.numpy()))).sum(axis=1)
    np.testing.assert_allclose(smoothed_cross_entropy(logits, labels, smoothing), expected, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_mixed_sample_has_the_cross_entropy_of_the_mixed_targets(smoothing: float, logits: Tensor) -> None:
    num, classes = logits.shape
    labels, partners = torch.arange(num) % classes, (torch.arange(num) + 1) % classes
    weights = torch.linspace(0, 1, num)
    targets = weights[:, None] * F.one_hot(labels, classes) + (1 - weights[:, None]) * F.one_hot(partners, classes)
    expected = F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(mixed_cross_entropy(logits, labels, smoothing, partners, weights), expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_distillation_is_the_divergence_of_softened_answers_times_the_squared_temperature(
    temperature: float, logits: Tensor
) -> None:
    teacher = logits.flip(0) * 2
    p, q = softmax(teacher.numpy() / temperature), softmax(logits.numpy() / temperature)
    expected = temperature**2 * (p * (np.log(p) - np.log(q))).sum(axis=1)
    np.testing.assert_allclose(distillation(logits, teacher, temperature), expected, rtol=1e-5, atol=1e-6)


def test_distillation_pulls_the_student_only(logits: Tensor) -> None:
    student, teacher = logits.float().requires_grad_(), logits.flip(0).float().requires_grad_()
    distillation(student, teacher, 4.0).sum().backward()
    expected = 4.0 * (softmax(student.detach().numpy() / 4) - softmax(teacher.detach().numpy() / 4))
    np.testing.assert_allclose(student.grad, expected, atol=1e-6)
    assert teacher.grad is None


def kurtosis(weight: np.ndarray) -> float:
    centered = weight - weight.mean()
    return float((centered**4).mean() / (centered**2).mean() ** 2)


def test_the_kurtosis_penalty_is_the_mean_squared_distance_over_the_layers() -> None:
    generator = np.random.default_rng(2)
    layers = [generator.normal(size=(4, 3, 3, 3)), generator.uniform(size=(7, 2, 1, 1)), generator.laplace(size=40)]
    expected = np.mean([(kurtosis(layer) - 1.8) ** 2 for layer in layers])
    found = kurtosis_penalty([torch.from_numpy(layer) for layer in layers], 1.8)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_the_gradient_of_the_kurtosis_penalty_is_that_of_its_formula() -> None:
    weight = np.random.default_rng(3).laplace(size=30)
    # d Kurt / d w = 4 / (n s^4) (c^3 - mean(c^3) - Kurt s^2 c), with c the centred weights and s their deviation.
    centered, kurt = weight - weight.mean(), kurtosis(weight)
    variance = (centered**2).mean()
    slope = 4 / (weight.size * variance**2) * (centered**3 - (centered**3).mean() - kurt * variance * centered)
    latent = torch.from_numpy(weight).float().requires_grad_()
    kurtosis_penalty([latent], 1.0).backward()
    np.testing.assert_allclose(latent.grad, 2 * (kurt - 1.0) * slope, rtol=1e-3, atol=1e-4)


def test_two_equal_peaks_have_the_least_kurtosis_and_equal_weights_none() -> None:
    peaks = torch.tensor([-2.0, 2.0]).repeat(8)
    assert kurtosis_penalty([peaks], 1.0).item() == pytest.approx(0, abs=1e-10)
    constant = torch.full((8,), 0.3, requires_grad=True)
    assert kurtosis_penalty([constant, peaks], 1.0).item() == pytest.approx(0, abs=1e-10)


def test_only_layers_with_binary_weights_are_shaped() -> None:
    net = build("bincifar", num_classes=3, in_channels=1, input_size=16, width=0.0625, bin_start=3, bin_end=5)
    expected = [net.get_parameter(f"conv{index}.weight") for index in (3, 4, 5)]
    assert [id(weight) for weight in latent_weights(net)] == [id(weight) for weight in expected]
