import pytest
import torch

from kernels.dab_step import dab_step, dab_step_backward


def weight_of(shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("center", ["none", "filter", "tap"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_the_results_have_the_layout_of_a_weight_whose_filters_are_blocks(layout, center):
    weight = weight_of((4, 6, 3, 3))
    if layout == "channels_last":
        weight = weight.to(memory_format=torch.channels_last)
    if layout == "strided":
        weight = torch.stack([weight, weight], dim=-1)[..., 0]
    dense, real, *scalars = dab_step(weight, center)
    expected = weight.contiguous() if layout == "strided" else weight
    assert dense.stride() == real.stride() == expected.stride()
    assert dense.unique().tolist() == torch.stack(scalars[1:]).unique().tolist()


def test_without_centring_nothing_is_copied():
    weight = weight_of((4, 6, 3, 3))
    assert dab_step(weight, "none")[1].data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("center", ["none", "filter", "tap"])
@pytest.mark.parametrize("has_means", [False, True])
@pytest.mark.parametrize("is_about_threshold", [False, True])
def test_the_gradient_is_the_stated_sum(center, has_means, is_about_threshold):
    weight, grad = weight_of((3, 4, 2, 2)), weight_of((3, 4, 2, 2)).flip(0)
    _, real, threshold, alpha, beta = dab_step(weight, center)
    options = {"center": center, "width": 0.8, "is_about_threshold": is_about_threshold, "has_means": has_means}
    found = dab_step_backward(grad, real, threshold, alpha, beta, **options)
    for index in range(len(weight)):
        c, g = real[index], grad[index]
        middle = (alpha[index] + beta[index]) / 2 if is_about_threshold else 0.0
        h = g * ((c - middle).abs() <= torch.tensor(0.8)).double()
        if has_means:
            e = c >= threshold[index]
            h = h + torch.where(e, g[e].mean(), g[~e].mean())
        if center == "filter":
            h = h - h.mean()
        if center == "tap":
            h = h - h.mean(0, keepdim=True)
        torch.testing.assert_close(found[index], h)


def test_a_gradient_of_another_layout_is_taken():
    weight, grad = weight_of((3, 4, 2, 2)), weight_of((3, 4, 2, 2)).flip(0)
    options = {"center": "tap", "width": 1.0, "is_about_threshold": False, "has_means": False}
    saved = dab_step(weight, "tap")[1:]
    found = dab_step_backward(grad.to(memory_format=torch.channels_last), *saved, **options)
    assert torch.equal(found, dab_step_backward(grad, *saved, **options))


@pytest.mark.parametrize("center", ["none", "tap"])
def test_the_operators_have_faithful_fakes(center):
    tests = ("test_schema", "test_faketensor")
    weight = weight_of((3, 4, 2, 2)).to(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.dab.dab_step.default, (weight, center), test_utils=tests)
    _, *saved = dab_step(weight, center)
    arguments = (weight, *saved, center, 1.0, False, True)
    torch.library.opcheck(torch.ops.dab.dab_step_backward.default, arguments, test_utils=tests)
