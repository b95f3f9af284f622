"""The DAB kernels on a real device, through the public functions; needs torch, triton and pytest."""

import pytest
import torch

from kernels import dab_threshold, dab_threshold_warm, quantize_dab, quantize_dab_many
from kernels.dab_step import dab_step, dab_step_backward, dab_step_backward_reference, dab_step_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [(1, 1), (64, 3, 7, 7), (33, 64, 3, 3), (16, 512, 3, 3), (5, 70000), (3, 4, 5), (4, 100, 1, 1)]


def random_weight(shape, dtype=torch.float32):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]), dtype=dtype)
    weight[2:3] = 3.3
    return weight


def on_grid(shape):
    """Weights whose float64 sums are exact, so that no order of addition can tip a near tie."""
    return torch.randint(-1000, 1000, shape, generator=torch.Generator().manual_seed(shape[0])).float()


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_on_a_grid_are_quantized_bit_for_bit_like_on_the_processor(shape):
    weight = on_grid(shape)
    for on_device, on_cpu in zip(quantize_dab(weight.cuda()), quantize_dab(weight), strict=True):
        assert torch.equal(on_device.cpu(), on_cpu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_random_weights_get_the_thresholds_of_the_processor(shape, dtype):
    weight = random_weight(shape).to(dtype)
    (threshold, *values), (expected, *references) = dab_threshold(weight.cuda()), dab_threshold(weight)
    assert torch.equal(threshold.cpu(), expected)
    for on_device, on_cpu in zip(values, references, strict=True):
        torch.testing.assert_close(on_device.cpu(), on_cpu, rtol=1e-6 if dtype != torch.float64 else 1e-12, atol=0)


def test_the_order_of_weights_in_memory_does_not_matter():
    weight = random_weight((32, 64, 3, 3)).cuda()
    for layout in (weight.to(memory_format=torch.channels_last), torch.stack([weight, weight], -1)[..., 0]):
        for parts in zip(quantize_dab(layout), quantize_dab(weight), strict=True):
            torch.testing.assert_close(*parts, rtol=1e-6, atol=0)


def test_many_weights_together_are_quantized_as_each_alone_also_in_a_graph():
    weights = [on_grid(shape).cuda() for shape in [*SHAPES, (512, 512, 3, 3), (64, 64, 3, 3), (128, 64, 1, 1)]]
    weights.append(on_grid((1, 6401)).cuda()[:, 1:].view(64, 100))  # an odd address
    for weight, parts in zip(weights, quantize_dab_many(weights), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(parts, quantize_dab(weight), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask, _, alpha, beta = torch.ops.dab.dab_many(weights)
    for weight in weights:
        weight.mul_(2)
    graph.replay()
    expected = quantize_dab_many(weights)
    assert torch.equal(mask, torch.cat([parts[0].flatten() for parts in expected]))
    assert torch.equal(alpha, torch.cat([parts[1] for parts in expected]))
    assert torch.equal(beta, torch.cat([parts[2] for parts in expected]))


def test_equal_weights_give_equal_bits_every_time():
    weight = random_weight((64, 256, 3, 3)).cuda()
    first = quantize_dab(weight)
    assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, quantize_dab(weight), strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_on_the_device(bad):
    weight = random_weight((3, 50))
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="weight: holds NaN or infinite"):
        quantize_dab(weight.cuda())
    with pytest.raises(ValueError, match="weights: holds NaN or infinite"):
        quantize_dab_many([weight.cuda(), weight.cuda()])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_warm_search_splits_on_the_device_as_on_the_processor(shape):
    weight = random_weight(shape)
    start = 0.1 * torch.randn(shape[0], generator=torch.Generator().manual_seed(0))
    for on_device, on_cpu in zip(
        dab_threshold_warm(weight.cuda(), start.cuda()), dab_threshold_warm(weight, start), strict=True
    ):
        torch.testing.assert_close(on_device.cpu(), on_cpu, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("center", ["none", "filter", "tap"])
@pytest.mark.parametrize("shape", [(4, 2, 1, 1), (33, 7, 5, 3), (64, 256, 3, 3), (16, 512, 3, 3)])
def test_a_training_step_on_the_device_is_that_of_the_reference(shape, center, memory_format):
    generator = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(shape, generator=generator).to(memory_format=memory_format) for _ in range(2))
    # The reference runs in float64: its own float32 sums would need the wider bound.
    _, real, *_ = dab_step_reference(weight.double(), center)
    dense, ours, threshold, alpha, beta = dab_step(weight.cuda(), center)
    assert dense.stride() == weight.stride()
    centered = weight if center == "none" else real.float()
    torch.testing.assert_close(ours.cpu(), centered, rtol=0, atol=1e-6)
    for part, expected in zip((threshold, alpha, beta), dab_threshold(ours.cpu()), strict=True):
        torch.testing.assert_close(part.cpu(), expected, rtol=1e-6, atol=0)
    rows = (-1, 1, 1, 1)
    assert torch.equal(dense, torch.where(ours >= threshold.view(rows), alpha.view(rows), beta.view(rows)))
    for width, is_about_threshold, has_means in [(0.7, False, False), (0.7, True, True), (float("inf"), False, True)]:
        options = {"width": width, "is_about_threshold": is_about_threshold, "has_means": has_means}
        saved = (ours, threshold, alpha, beta)
        found = dab_step_backward(grad.cuda(), *saved, center=center, **options)
        expected = dab_step_backward_reference(grad.cuda(), *saved, center, *options.values())
        assert found.stride() == weight.stride()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
