"""Real inputs with one-bit weights on a real device, through the public function; needs torch, triton and pytest."""

import pytest
import torch
from torch.nn import functional as F

from kernels import packed_weight_conv2d
from kernels.packing import pack_signs_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Of a sum in tensor cores, see kernels.weight_only.
UNIT = 2.0**-22
# kernel, stride, padding, dilation, groups, image.
GEOMETRIES = [
    ((3, 3), 1, 1, 1, 1, (11, 9)),
    ((1, 1), 1, 0, 1, 1, (7, 7)),
    ((3, 2), (2, 1), (1, 2), (1, 2), 2, (9, 8)),
    ((6, 6), 1, 0, 1, 1, (6, 6)),
]


def check(channels, filters, geometry, dtype, batch=2):
    kernel, stride, padding, dilation, groups, image = geometry
    generator = torch.Generator().manual_seed(1000 * channels + filters)
    x = torch.randn(batch, channels * groups, *image, generator=generator).to(dtype)
    mask = torch.rand(filters * groups, channels, *kernel, generator=generator) < 0.4
    alpha, beta, bias = torch.randn(3, filters * groups, generator=generator)
    bits = pack_signs_reference(torch.where(mask, 1.0, -1.0))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    tensors = [tensor.cuda() for tensor in (x.to(memory_format=torch.channels_last), bits, alpha, beta, bias)]
    found = packed_weight_conv2d(*tensors, **options)
    weight = torch.where(mask, alpha.view(-1, 1, 1, 1), beta.view(-1, 1, 1, 1)).double()
    exact = F.conv2d(x.double(), weight, bias.double(), **options)
    magnitude = F.conv2d(x.double().abs(), weight.abs(), bias.double().abs(), **options)
    error = (mask[0].numel() + 5) * UNIT
    bound = 3 * error / (1 - error) * magnitude
    rounding = torch.finfo(dtype).eps / 2
    assert found.dtype == dtype
    assert found.permute(0, 2, 3, 1).is_contiguous()
    assert bool(((found.cpu().double() - exact).abs() <= bound + rounding * (exact.abs() + bound)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("channels", [1, 31, 33, 100])
def test_the_device_convolves_within_the_bound(channels, geometry, dtype):
    check(channels, 45, geometry, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("filters", [1, 16, 17, 64, 130])
def test_any_number_of_filters_is_covered_on_the_device(filters, dtype):
    check(64, filters, GEOMETRIES[0], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_largest_blocks_stay_within_the_bound(dtype):
    check(96, 192, ((3, 3), 1, 1, 1, 1, (56, 56)), dtype, batch=6)


def test_float64_goes_to_the_reference_on_the_device():
    check(33, 20, GEOMETRIES[0], torch.float64)
