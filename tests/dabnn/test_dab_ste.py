from itertools import product

import pytest
import torch

from dabnn.gradients import Estimator, dab_ste, has_dab_ste, two_valued_ste
from dabnn.quantizers import split, subtract_center, with_gradient


@pytest.mark.parametrize("shape", [(5, 7, 3, 3), (3, 2), (4, 2, 1, 5)])
@pytest.mark.parametrize("center", ["none", "filter", "tap"])
@pytest.mark.parametrize("name", ["clipped", "identity"])
def test_one_operator_each_way_gives_the_values_and_gradients_of_its_parts(name, center, shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(shape, generator=generator, dtype=torch.float64)
    estimator = Estimator(name, 0.6)
    for is_about_threshold, has_means in product((False, True), repeat=2):
        options = {"is_about_threshold": is_about_threshold, "has_means": has_means}
        fused = dab_ste(weight, center, estimator, **options)
        (gradient,) = torch.autograd.grad(fused, weight, upstream)
        centered = subtract_center(weight, center)
        parts = split(centered, "dab")
        middle = (parts[1] + parts[2]) / 2 if is_about_threshold else None
        parts = with_gradient(centered, "dab", parts) if has_means else parts
        composed = two_valued_ste(centered, *parts, estimator, middle)
        (expected,) = torch.autograd.grad(composed, weight, upstream)
        assert torch.equal(fused, composed)
        torch.testing.assert_close(gradient, expected)


def test_the_processor_keeps_the_parts():
    assert not has_dab_ste(torch.randn(2, 3), Estimator(), "straight_through")
