"""The tensor-core kernel on numpy, register by register, and what compiling it for a GPU gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gluon_numpy
import numpy as np
import pytest
import torch

import kernels
from kernels import pack_signs, packed_conv2d
from kernels.conv_fragments import Tile, arrange_weights, choose_tile, count_ones, fragment_places
from kernels.conv_layer import geometry_of

ROOT = Path(kernels.__path__[0])
ON_NUMPY = gluon_numpy.load_kernels(ROOT / "conv_gluon.py")
LARGE, WIDE, SHARED = Tile(4, 1, 4, 1), Tile(4, 2, 1, 1), Tile(4, 1, 1, 4)
TILES = [LARGE, WIDE, SHARED, Tile(2, 1, 1, 4), Tile(2, 1, 2, 2), Tile(2, 2, 4, 1)]
POISON = 0x5A5A5A5A


class Layer:
    """Random packed inputs with garbage beyond the last channel, and what the CPU makes of them."""

    def __init__(self, batch, channels, filters, image, kernel, stride, padding, *, has_bias):
        generator = torch.Generator().manual_seed(channels + filters)
        self.bits = pack_signs(torch.randn(batch, channels, *image, generator=generator))
        self.weight_bits = pack_signs(torch.randn(filters, channels, *kernel, generator=generator))
        for words in (self.bits, self.weight_bits):
            words[..., -1] |= -1 << (channels % 32) if channels % 32 else 0
        self.alpha, self.beta, bias = torch.randn(3, filters, generator=generator)
        self.bias = bias if has_bias else None
        self.values = packed_conv2d(
            self.bits,
            self.weight_bits,
            self.alpha,
            self.beta,
            self.bias,
            in_channels=channels,
            stride=stride,
            padding=padding,
        )
        self.threshold = self.values.flatten(2).median(2).values[0]  # a value that occurs, so that equality is tried
        self.threshold[::7], self.threshold[3::7] = torch.inf, -torch.inf
        self.falls = torch.arange(filters) % 3 == 0
        self.geometry = geometry_of(self.bits.shape, self.weight_bits.shape, channels, stride, padding)

    def run(self, tile, memory, *, is_packed):
        """Run the kernel on numpy for every block of the grid that `conv_gluon.launch` asks for."""
        weights = arrange_weights(self.weight_bits.numpy(), self.geometry, tile)
        counts = count_ones(self.weight_bits.numpy(), self.geometry)
        bias = self.alpha if self.bias is None else self.bias
        scalars = [tensor.numpy() for tensor in (self.alpha, self.beta, bias)]
        signs = [self.threshold.numpy(), self.falls.numpy().view(np.uint8)]
        arrays = [self.bits.numpy(), weights, *scalars, *counts, *signs, memory]
        num_pixels = self.values[:, 0].numel()
        grid = (-(-num_pixels // tile.pixels), -(-self.geometry.filters // tile.filters))
        constants = {"HAS_BIAS": self.bias is not None, "IS_PACKED": is_packed}
        arguments = (*(array.reshape(-1) for array in arrays), num_pixels, self.geometry, tile)
        gluon_numpy.run(ON_NUMPY, "_product_kernel", grid, *arguments, **constants)

    def found_values(self, tile):
        memory = np.full(self.values.numel(), np.nan, np.float32)
        self.run(tile, memory, is_packed=False)
        return torch.from_numpy(memory).view(self.values.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)

    def found_signs(self, tile):
        batch, _, height, width = self.values.shape
        words = np.full(batch * height * width * self.geometry.out_words, POISON, np.int32)
        self.run(tile, words.view(np.uint8) if tile.size == 4 else words, is_packed=True)
        return torch.from_numpy(words).view(batch, height, width, -1)

    def signs(self):
        upper = (self.values >= self.threshold.view(-1, 1, 1)) ^ self.falls.view(-1, 1, 1)
        return pack_signs(torch.where(upper, 1.0, -1.0))


# batch, channels, filters, image, kernel, stride, padding
LAYERS = [
    (2, 256, 70, (5, 6), (3, 3), (1, 1), (1, 1)),
    (1, 64, 64, (7, 7), (3, 3), (2, 2), (1, 1)),
    (2, 33, 45, (9, 8), (5, 4), (2, 1), (2, 3)),
    (1, 3, 10, (9, 9), (1, 1), (1, 1), (0, 0)),
    (1, 512, 33, (6, 5), (2, 3), (3, 2), (4, 3)),
]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_tile_gives_the_values_of_the_cpu_bit_for_bit(layer, tile, has_bias):
    case = Layer(*layer, has_bias=has_bias)
    assert torch.equal(case.found_values(tile), case.values)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_tile_gives_the_signs_of_the_cpu_bit_for_bit(layer, tile):
    case = Layer(*layer, has_bias=True)
    assert torch.equal(case.found_signs(tile), case.signs())


@pytest.mark.parametrize("kernel", [1, 3, 4, 5, 6, 7, 11])
@pytest.mark.parametrize("channels", [1, 31, 32, 33, 63, 64, 100, 512])
def test_every_kernel_size_and_channel_count_is_exact(channels, kernel):
    stride, padding = 1 + kernel % 4, kernel % 6
    case = Layer(1, channels, 5, (8, 7), (kernel, kernel), (stride, 1), (padding, 5), has_bias=True)
    tile = TILES[(channels + kernel) % len(TILES)]
    assert torch.equal(case.found_values(tile), case.values)


@pytest.mark.parametrize("size", [2, 4])
def test_a_fragment_holds_every_weight_once(size):
    filters, words = fragment_places(size)
    assert len(set(zip(filters.ravel(), words.ravel(), strict=True))) == 16 * size * 8


@pytest.mark.parametrize("depth", [1, 8, 72, 73, 144, 200, 968, 1936])
@pytest.mark.parametrize("tile", TILES)
def test_unrolled_steps_cover_the_depth_with_few_empty_ones(depth, tile):
    steps, unrolled = tile.depth_steps(depth), tile.unrolled(depth)
    needed = -(-depth // (8 * tile.depth_warps))
    assert steps % unrolled == 0
    assert needed <= steps <= needed + needed / 5


def test_large_batches_take_large_tiles_and_single_images_share_the_depth():
    bits, weights = (128, 14, 14, 8), (256, 3, 3, 8)
    geometry = geometry_of(bits, weights, 256, (1, 1), (1, 1))
    assert choose_tile(geometry, 128 * 196, 132) == LARGE
    assert choose_tile(geometry, 8 * 196, 132) == SHARED
    assert choose_tile(geometry, 196, 132).depth_warps == 4
    pointwise = geometry_of(bits, (20, 1, 1, 8), 256, (1, 1), (0, 0))
    assert choose_tile(pointwise, 128 * 196, 132).size == 2


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What every kernel of packed convolutions compiles to for compute capability 9.0, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent), "TRITON_INTERPRET": "0"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
    command = [sys.executable, Path(__file__).with_name("compile_only.py")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def test_machine_code_holds_the_native_1_bit_product_and_no_fused_rounding(compiled):
    products = [each for each in compiled if each["name"] == "_product_kernel"]
    assert [each["bit_products"] for each in products] == [144, 12, 144, 12, 112, 16]
    assert all(each["calls"] == 0 for each in products)  # as the emulated products would be
    assert all(each["fused_multiply_adds"] == 0 for each in compiled)


def test_three_blocks_of_warps_fit_into_the_registers_of_a_multiprocessor(compiled):
    for each in compiled:
        assert each["registers"] <= (200 if each["name"] == "_conv_kernel" else 168)
        assert each["stack_bytes"] <= 64  # a dozen registers wait in memory, outside the sums


def test_the_portable_kernel_counts_in_hardware(compiled):
    (portable,) = [each for each in compiled if each["name"] == "_conv_kernel"]
    assert portable["population_counts"] >= 16
