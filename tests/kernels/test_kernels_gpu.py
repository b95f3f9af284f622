"""The Triton kernels compiled for a real device, through the public functions; needs torch, triton and pytest."""

import pytest
import torch

from kernels import pack_signs, packed_conv2d, quantize_dab, unpack_signs
from kernels.conv import packed_conv2d_reference
from kernels.packing import pack_signs_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = [1, 31, 32, 33, 63, 100]


@pytest.mark.parametrize("channels", SIZES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_device_packs_the_same_bits_as_the_reference(channels, dtype):
    x = torch.randn(3, channels, 9, 7, generator=torch.Generator().manual_seed(channels)).to(dtype)
    x[0, 0, 0, :2] = torch.tensor([-0.0, float("nan")])
    bits = pack_signs(x.cuda())
    assert torch.equal(bits.cpu(), pack_signs_reference(x))
    assert torch.equal(unpack_signs(bits, channels).cpu(), torch.where(x >= 0, 1.0, -1.0))


@pytest.mark.parametrize("channels", SIZES)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((3, 3), (1, 1), (1, 1)), ((1, 1), (1, 1), (0, 0)), ((5, 4), (2, 1), (2, 3)), ((2, 3), (3, 2), (4, 3))],
)
def test_the_device_convolves_bit_for_bit_like_the_reference(channels, kernel, stride, padding):
    generator = torch.Generator().manual_seed(channels)
    bits = pack_signs_reference(torch.randn(2, channels, 11, 9, generator=generator))
    weight_bits = pack_signs_reference(torch.randn(45, channels, *kernel, generator=generator))
    alpha, beta, bias = torch.randn(3, 45, generator=generator)
    on_device = [tensor.cuda() for tensor in (bits, weight_bits, alpha, beta, bias)]
    out = packed_conv2d(*on_device, in_channels=channels, stride=stride, padding=padding)
    expected = packed_conv2d_reference(bits, weight_bits, alpha, beta, bias, channels, stride, padding)
    assert torch.equal(out.cpu(), expected)


def test_a_layer_of_resnet_is_exact_on_the_device():
    generator = torch.Generator().manual_seed(0)
    bits = pack_signs_reference(torch.randn(8, 256, 14, 14, generator=generator))
    weight_bits = pack_signs_reference(torch.randn(256, 256, 3, 3, generator=generator))
    alpha, beta = torch.randn(2, 256, generator=generator)
    out = packed_conv2d(*(tensor.cuda() for tensor in (bits, weight_bits, alpha, beta)), in_channels=256)
    assert torch.equal(out.cpu(), packed_conv2d_reference(bits, weight_bits, alpha, beta, None, 256, (1, 1), (1, 1)))


def test_the_device_quantizes_like_the_processor():
    # Weights on a coarse grid have exact float64 sums, so that no order of addition can tip a near tie.
    weight = torch.randint(-1000, 1000, (64, 100, 3, 3), generator=torch.Generator().manual_seed(0)).float()
    for on_device, on_cpu in zip(quantize_dab(weight.cuda()), quantize_dab(weight), strict=True):
        assert torch.equal(on_device.cpu(), on_cpu)
