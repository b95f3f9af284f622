"""The kernels compiled for a real device, through the public functions; needs torch, triton and pytest."""

import itertools

import pytest
import torch

from kernels import (
    conv_cuda,
    conv_dense_triton,
    conv_gluon,
    conv_triton,
    pack_reached,
    pack_signs,
    packed_conv2d,
    packed_conv2d_signs,
    quantize_dab,
    unpack_signs,
)
from kernels.conv import packed_conv2d_reference
from kernels.conv_fragments import Tile
from kernels.conv_layer import Filters, geometry_of
from kernels.gpu_path import gpu_path
from kernels.packing import pack_signs_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
SIZES = [1, 31, 32, 33, 63, 100]
CHANNELS = [1, 3, 31, 32, 33, 63, 64, 100, 512]
KERNELS = [1, 3, 4, 5, 6, 7, 11]
TILES = [Tile(4, 1, 4, 1), Tile(4, 2, 4, 1), Tile(4, 1, 1, 4), Tile(2, 1, 1, 4), Tile(2, 1, 2, 2), Tile(2, 2, 4, 1)]


def needs_tensor_core():
    if gpu_path(DEVICE).name != "tensor_core":
        pytest.skip(gpu_path(DEVICE).reason)


def random_layer(batch, channels, filters, image, kernel, stride, padding, *, has_bias=True):
    """Packed inputs and filters with garbage beyond the last channel, and what the reference makes of them."""
    generator = torch.Generator().manual_seed(1000 * channels + filters)
    bits = pack_signs_reference(torch.randn(batch, channels, *image, generator=generator))
    weight_bits = pack_signs_reference(torch.randn(filters, channels, *kernel, generator=generator))
    for words in (bits, weight_bits):
        words[..., -1] |= -1 << (channels % 32) if channels % 32 else 0
    alpha, beta, bias = torch.randn(3, filters, generator=generator)
    filters = Filters(weight_bits, alpha, beta, bias if has_bias else None)
    return bits, filters, reference(bits, filters, channels, stride, padding)


def reference(bits, filters, channels, stride, padding):
    tensors = (filters.weight_bits, filters.alpha, filters.beta, filters.bias)
    return packed_conv2d_reference(bits, *tensors, channels, stride, padding)


def on_device(filters):
    return Filters(*(None if tensor is None else tensor.to(DEVICE) for tensor in vars(filters).values()))


def convolve(bits, filters, channels, stride=(1, 1), padding=(1, 1), **options):
    f = on_device(filters)
    tensors = (bits.to(DEVICE), f.weight_bits, f.alpha, f.beta, f.bias)
    return packed_conv2d(*tensors, in_channels=channels, stride=stride, padding=padding, **options)


def thresholds(values):
    """A threshold that occurs, so that equality is tried, always and never; and which ones fall."""
    threshold = values.flatten(2).median(2).values[0]
    threshold[::7], threshold[3::7] = torch.inf, -torch.inf
    return threshold, torch.arange(len(threshold)) % 3 == 0


def signs_of(values, threshold, falls):
    upper = (values >= threshold.view(-1, 1, 1)) ^ falls.view(-1, 1, 1)
    return pack_signs_reference(torch.where(upper, 1.0, -1.0))


@pytest.mark.parametrize("channels", SIZES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_device_packs_the_same_bits_as_the_reference(channels, dtype, memory_format):
    x = torch.randn(3, channels, 9, 7, generator=torch.Generator().manual_seed(channels)).to(dtype)
    x[0, 0, 0, :2] = torch.tensor([-0.0, float("nan")])
    bits = pack_signs(x.to(DEVICE, memory_format=memory_format))
    assert torch.equal(bits.cpu(), pack_signs_reference(x))
    assert torch.equal(unpack_signs(bits, channels).cpu(), torch.where(x >= 0, 1.0, -1.0))


@pytest.mark.parametrize("channels", SIZES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_device_packs_reached_thresholds(channels, dtype, memory_format):
    x = torch.randn(3, channels, 9, 7, generator=torch.Generator().manual_seed(channels)).to(dtype)
    threshold, falls = thresholds(x)
    x[0, 0, 0, 0] = float("nan")
    given = (x.to(DEVICE, memory_format=memory_format), threshold.to(DEVICE), falls.to(DEVICE))
    assert torch.equal(pack_reached(*given).cpu(), signs_of(x, threshold, falls))
    every_other = given[0][:, :, :, ::2]
    assert torch.equal(pack_reached(every_other, *given[1:]).cpu(), signs_of(x[:, :, :, ::2], threshold, falls))


@pytest.mark.parametrize(("channels", "kernel"), list(itertools.product(CHANNELS, KERNELS)))
def test_every_channel_count_and_kernel_size_is_exact_on_the_device(channels, kernel):
    turn = CHANNELS.index(channels) + KERNELS.index(kernel)
    stride, padding = (1 + turn % 4, 1 + turn // 4 % 4), (turn % 6, (turn + kernel) % 6)
    image, batch = (11 + turn % 2, 12 - turn % 2), (1, 2, 17)[turn % 3]
    layer = random_layer(batch, channels, 37, image, (kernel, kernel), stride, padding, has_bias=turn % 2 == 0)
    bits, filters, expected = layer
    found = convolve(bits, filters, channels, stride, padding)
    assert torch.equal(found.cpu(), expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("filters", [1, 31, 32, 33, 70, 250])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [((3, 3), (1, 1), (1, 1)), ((5, 4), (2, 1), (2, 3)), ((1, 1), (1, 1), (0, 0))]
)
def test_signs_of_any_number_of_filters_are_exact_on_the_device(filters, kernel, stride, padding):
    bits, layer, values = random_layer(2, 100, filters, (11, 9), kernel, stride, padding)
    threshold, falls = thresholds(values)
    f = on_device(Filters(layer.weight_bits, layer.alpha, layer.beta, layer.bias, threshold, falls))
    found = packed_conv2d_signs(bits.to(DEVICE), *vars(f).values(), in_channels=100, stride=stride, padding=padding)
    assert torch.equal(found.cpu(), signs_of(values, threshold, falls))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("filters", [37, 64])
def test_values_are_rounded_once_to_their_type_on_the_device(dtype, filters):
    bits, layer, expected = random_layer(2, 100, filters, (9, 7), (3, 3), (1, 1), (1, 1))
    assert torch.equal(convolve(bits, layer, 100, dtype=dtype).cpu(), expected.to(dtype))


@pytest.mark.parametrize("batch", [1, 8, 128])
@pytest.mark.parametrize(("channels", "size"), [(64, 56), (128, 28), (256, 14), (512, 7)])
def test_layers_of_resnet_are_exact_on_the_device(channels, size, batch):
    bits, layer, _ = random_layer(1, channels, channels, (size, size), (3, 3), (1, 1), (1, 1), has_bias=False)
    bits = torch.cat([bits.roll(image, 1) for image in range(batch)])
    found = convolve(bits, layer, channels)
    for image in {0, batch // 2, batch - 1}:
        assert torch.equal(found[image : image + 1].cpu(), reference(bits[image : image + 1], layer, channels, *ONES))
    threshold, falls = (tensor.to(DEVICE) for tensor in thresholds(found.cpu()))
    f = on_device(layer)
    packed = packed_conv2d_signs(bits.to(DEVICE), *list(vars(f).values())[:4], threshold, falls, in_channels=channels)
    upper = (found >= threshold.view(-1, 1, 1)) ^ falls.view(-1, 1, 1)
    assert torch.equal(packed, pack_signs(torch.where(upper, 1.0, -1.0)))


ONES = ((1, 1), (1, 1))


@pytest.mark.parametrize("masks", ["all ones", "all zeros", "alpha equals beta"])
def test_filters_of_one_value_are_exact_on_the_device(masks):
    bits, layer, _ = random_layer(2, 64, 40, (7, 6), (3, 3), *ONES)
    if masks == "alpha equals beta":
        layer = Filters(layer.weight_bits, layer.alpha, layer.alpha.clone(), layer.bias)
    else:
        words = torch.full_like(layer.weight_bits, -1 if masks == "all ones" else 0)
        layer = Filters(words, layer.alpha, layer.beta, layer.bias)
    assert torch.equal(convolve(bits, layer, 64).cpu(), reference(bits, layer, 64, *ONES))


def test_inputs_that_are_not_contiguous_are_read_by_their_strides_on_the_device():
    bits, layer, expected = random_layer(4, 100, 37, (9, 8), (3, 3), *ONES)
    spread = torch.stack([bits, bits + 1], dim=3).to(DEVICE)[:, :, :, 0]
    f = on_device(layer)
    turned = f.weight_bits.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    assert torch.equal(packed_conv2d(spread, turned, f.alpha, f.beta, f.bias, in_channels=100).cpu(), expected)


@pytest.mark.parametrize("way", ["tensor_core", "popcount", "dense"])
@pytest.mark.parametrize("channels", [33, 64, 512])
def test_every_way_writes_every_value_and_sign_on_the_device(way, channels):
    bits, layer, expected = random_layer(2, channels, 45, (9, 8), (3, 3), (2, 1), (1, 1))
    threshold, falls = thresholds(expected)
    geometry = geometry_of(bits.shape, layer.weight_bits.shape, channels, (2, 1), (1, 1))
    signs = Filters(layer.weight_bits, layer.alpha, layer.beta, layer.bias, threshold, falls)
    rows = torch.full(expected.permute(0, 2, 3, 1).shape, torch.nan, device=DEVICE)
    words = torch.full((*rows.shape[:3], geometry.out_words), 0x5A5A5A5A, dtype=torch.int32, device=DEVICE)
    for filters, out in ((on_device(layer), rows), (on_device(signs), words)):
        if way == "popcount":
            conv_triton.launch_layer(bits.to(DEVICE), filters, geometry, out)
        elif way == "dense":
            masks = conv_dense_triton.masks(filters.weight_bits, geometry)
            conv_dense_triton.launch(bits.to(DEVICE), masks, filters, geometry, out)
        else:
            needs_tensor_core()
            conv_cuda.write(bits.to(DEVICE), filters, geometry, out)
    assert torch.equal(rows.cpu().permute(0, 3, 1, 2), expected)
    assert torch.equal(words.cpu(), signs_of(expected, threshold, falls))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("channels", "kernel"), [(256, 3), (64, 3), (100, 5), (31, 1)])
def test_every_tile_is_exact_on_the_device(tile, channels, kernel):
    needs_tensor_core()
    bits, layer, expected = random_layer(3, channels, 70, (14, 13), (kernel, kernel), *ONES)
    geometry = geometry_of(bits.shape, layer.weight_bits.shape, channels, *ONES)
    f = on_device(layer)
    weights, *counts = conv_cuda.arrange(f.weight_bits, geometry, tile)
    rows = torch.full(expected.permute(0, 2, 3, 1).shape, torch.nan, device=DEVICE)
    conv_gluon.launch(bits.to(DEVICE), weights, tuple(counts), f, geometry, tile, rows)
    assert torch.equal(rows.cpu().permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("batch", [1, 64])
def test_a_cuda_graph_replays_packing_and_convolution_on_new_inputs(batch):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, batch, 64, 14, 14, generator=generator).to(DEVICE)
    _, layer, values = random_layer(2, 64, 64, (14, 14), (3, 3), *ONES)
    f = on_device(Filters(layer.weight_bits, layer.alpha, layer.beta, layer.bias, *thresholds(values)))
    filters = list(vars(f).values())
    x = inputs[0].clone()

    def run():
        packed = packed_conv2d_signs(pack_signs(x), *filters, in_channels=64)
        return packed_conv2d(packed, *filters[:4], in_channels=64, dtype=torch.bfloat16)

    expected = []
    for each in inputs:
        x.copy_(each)
        expected.append(run())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for each, wanted in zip(inputs, expected, strict=True):
        x.copy_(each)
        graph.replay()
        assert torch.equal(out, wanted)


def test_a_device_other_than_the_current_one_is_used():
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    bits, layer, expected = random_layer(2, 64, 40, (7, 6), (3, 3), *ONES)
    tensors = [tensor.to("cuda:1") for tensor in (bits, layer.weight_bits, layer.alpha, layer.beta, layer.bias)]
    assert torch.equal(packed_conv2d(*tensors, in_channels=64).cpu(), expected)


def test_the_device_quantizes_like_the_processor():
    # Weights on a coarse grid have exact float64 sums, so that no order of addition can tip a near tie.
    weight = torch.randint(-1000, 1000, (64, 100, 3, 3), generator=torch.Generator().manual_seed(0)).float()
    for found, expected in zip(quantize_dab(weight.to(DEVICE)), quantize_dab(weight), strict=True):
        assert torch.equal(found.cpu(), expected)
