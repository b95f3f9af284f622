"""The ways of a packed convolution on GPUs, as far as Triton's interpreter and plain functions show them."""

import pytest
import torch

from kernels import (
    conv_dense_triton,
    conv_triton,
    pack_reached,
    pack_signs,
    packed_conv2d,
    packed_conv2d_signs,
    packing_triton,
)
from kernels.conv import DTYPES
from kernels.conv_layer import Filters, geometry_of
from kernels.gpu_path import DENSE_MACS, MAX_ELEMENTS, choose_gpu_path

POISON = 0x5A5A5A5A


@pytest.mark.parametrize(
    ("capability", "triton_version", "num_macs", "image_elements", "name", "reason"),
    [
        ((9, 0), (3, 6), 1, 1, "tensor_core", "9.0 has the 1-bit product"),
        ((8, 0), (3, 7), DENSE_MACS, 1, "tensor_core", "8.0"),
        ((8, 9), (4, 0), DENSE_MACS, MAX_ELEMENTS, "tensor_core", "8.9"),
        ((9, 0), (3, 5), DENSE_MACS, 1, "popcount", "Triton 3.5 cannot reach it: update it"),
        ((9, 0), (3, 6), DENSE_MACS, MAX_ELEMENTS + 1, "popcount", "one image has 2147483648 elements"),
        ((7, 5), (3, 6), DENSE_MACS, 1, "popcount", "begins with 8.0"),
        ((10, 0), (3, 6), DENSE_MACS, 1, "dense", "emulates the 1-bit product"),
        ((12, 0), (3, 6), DENSE_MACS - 1, 1, "popcount", "are few"),
        ((12, 0), (3, 6), DENSE_MACS, MAX_ELEMENTS + 1, "popcount", "emulates"),
        (None, (3, 6), DENSE_MACS, 1, "popcount", "not NVIDIA's"),
    ],
)
def test_the_way_follows_the_chip_and_the_layer(capability, triton_version, num_macs, image_elements, name, reason):
    path = choose_gpu_path(capability, triton_version, num_macs, image_elements)
    assert path.name == name
    assert reason in path.reason


# channels, filters, kernel, stride, padding, image
LAYERS = [
    (33, 45, (3, 3), (1, 1), (1, 1), (5, 4)),
    (64, 31, (2, 3), (3, 2), (4, 3), (3, 3)),
    (300, 5, (3, 3), (2, 1), (1, 1), (3, 3)),  # 2,700 taps are too many for float16
]


def random_layer(channels, filters, kernel, stride, padding, image):
    generator = torch.Generator().manual_seed(channels)
    bits = pack_signs(torch.randn(2, channels, *image, generator=generator))
    weight_bits = pack_signs(torch.randn(filters, channels, *kernel, generator=generator))
    for words in (bits, weight_bits):
        words[..., -1] |= -1 << (channels % 32) if channels % 32 else 0
    alpha, beta, bias = torch.randn(3, filters, generator=generator)
    options = {"in_channels": channels, "stride": stride, "padding": padding}
    values = packed_conv2d(bits, weight_bits, alpha, beta, bias, **options)
    threshold = values.flatten(2).median(2).values[0]
    threshold[::7], threshold[3::7] = torch.inf, -torch.inf
    falls = torch.arange(filters) % 3 == 0
    signs = packed_conv2d_signs(bits, weight_bits, alpha, beta, bias, threshold, falls, **options)
    geometry = geometry_of(bits.shape, weight_bits.shape, channels, stride, padding)
    return bits, Filters(weight_bits, alpha, beta, bias, threshold, falls), geometry, values, signs


def run_dense(bits, filters, geometry, out):
    conv_dense_triton.launch(bits, conv_dense_triton.masks(filters.weight_bits, geometry), filters, geometry, out)


@pytest.mark.parametrize(
    ("launch", "layer"),
    [(conv_triton.launch_layer, layer) for layer in LAYERS[:2]] + [(run_dense, layer) for layer in LAYERS],
)
def test_both_portable_ways_give_values_and_signs_bit_for_bit(launch, layer, triton_device):
    bits, filters, geometry, values, signs = random_layer(*layer)
    on_device = [None if t is None else t.to(triton_device) for t in vars(filters).values()]
    shape = (bits.shape[0], geometry.out_height, geometry.out_width)
    rows = torch.full((*shape, geometry.filters), torch.nan, device=triton_device)
    launch(bits.to(triton_device), Filters(*on_device[:4]), geometry, rows)
    assert torch.equal(rows.cpu().permute(0, 3, 1, 2), values)
    words = torch.full((*shape, geometry.out_words), POISON, dtype=torch.int32, device=triton_device)
    launch(bits.to(triton_device), Filters(*on_device), geometry, words)
    assert torch.equal(words.cpu(), signs)


@pytest.mark.parametrize("launch", [conv_triton.launch_layer, run_dense])
def test_values_are_rounded_once_to_their_type(launch, triton_device):
    dtype = torch.float16  # Triton's interpreter cuts bfloat16 off instead of rounding it
    bits, filters, geometry, values, _ = random_layer(*LAYERS[0])
    on_device = [t.to(triton_device) for t in list(vars(filters).values())[:4]]
    rows = torch.full(values.permute(0, 2, 3, 1).shape, torch.nan, dtype=dtype, device=triton_device)
    launch(bits.to(triton_device), Filters(*on_device), geometry, rows)
    assert torch.equal(rows.cpu().permute(0, 3, 1, 2), values.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator_rounds_to_its_type_and_its_fake_says_so(dtype):
    bits, filters, _, values, _ = random_layer(*LAYERS[0])
    found = packed_conv2d(bits, *list(vars(filters).values())[:4], in_channels=33, dtype=dtype)
    assert torch.equal(found, values.to(dtype))
    assert found.is_contiguous(memory_format=torch.channels_last)
    arguments = (bits, *list(vars(filters).values())[:4], 33, (1, 1), (1, 1), dtype)
    operator = torch.ops.dab.packed_conv2d.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_other_types_of_values_are_refused():
    bits, filters, *_ = random_layer(*LAYERS[0])
    with pytest.raises(TypeError, match=r"dtype: torch\.float64"):
        packed_conv2d(bits, *list(vars(filters).values())[:4], in_channels=33, dtype=torch.float64)


@pytest.mark.parametrize("channels", [1, 33, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["planes", "rows", "every other column"])
def test_reached_thresholds_are_packed_from_any_layout(channels, dtype, layout, triton_device):
    x = torch.randn(2, channels, 5, 6, generator=torch.Generator().manual_seed(channels)).to(dtype)
    x[1, :, 0, 0] = torch.nan
    x = x if layout == "planes" else x.to(memory_format=torch.channels_last)
    x = x[:, :, :, ::2] if layout == "every other column" else x
    threshold = x[0, :, 2, 2].clone()
    threshold[::5] = torch.inf
    falls = torch.arange(channels) % 3 == 0
    bits = torch.full((2, 5, x.shape[3], -(-channels // 32)), POISON, dtype=torch.int32, device=triton_device)
    packing_triton.launch_reached(*(t.to(triton_device) for t in (x, threshold, falls)), bits)
    assert torch.equal(bits.cpu(), pack_reached(x, threshold, falls))
