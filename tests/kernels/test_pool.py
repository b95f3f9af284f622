"""Pooled bits against max pooling of the values that they are the bits of."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kernels import pack_reached, pack_signs, pool_bits, pool_numba, pool_triton
from kernels.numba_threads import torch_threads
from kernels.pool import pool_bits_reference, pooled_size

POISON = 0x5A5A5A5A
# kernel, stride, padding, ceil_mode
WINDOWS = [
    ((3, 3), (2, 2), (0, 0), False),
    ((3, 3), (2, 2), (1, 1), False),
    ((3, 3), (2, 2), (0, 0), True),
    ((3, 3), (1, 1), (1, 1), False),
    ((2, 2), (2, 2), (0, 0), False),
    ((2, 3), (3, 1), (1, 0), True),
    ((1, 1), (2, 2), (0, 0), True),
]


def pooled_by_reference(bits, flips, kernel, stride, padding, ceil_mode, device):
    return pool_bits_reference(bits, flips, kernel, stride, padding, ceil_mode)


def launched(launch):
    def pooled(bits, flips, kernel, stride, padding, ceil_mode, device):
        sizes = [pooled_size(bits.shape[1 + i], kernel[i], stride[i], padding[i], ceil_mode) for i in (0, 1)]
        out = torch.full((bits.shape[0], *sizes, bits.shape[3]), POISON, dtype=torch.int32, device=device)
        launch(bits.to(device), flips.to(device), kernel, stride, padding, out)
        return out.cpu()

    return pooled


def pooled_in_threads(bits, flips, kernel, stride, padding, out):
    words = [tensor.numpy().view("uint32") for tensor in (bits, flips, out)]
    with torch_threads():
        pool_numba._pool_in_threads(*words[:2], (*kernel, *stride, *padding), words[2])


VERSIONS = {
    "reference": pooled_by_reference,
    "numba": launched(pool_numba.launch),
    "numba in threads": launched(pooled_in_threads),
    "triton": launched(pool_triton.launch),
}


def example(channels, height, width, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width, generator=generator)
    threshold = torch.randn(channels, generator=generator) * 2
    threshold[::7], threshold[3::7] = -torch.inf, torch.inf
    falls = torch.rand(channels, generator=generator) < 0.5
    return x, threshold, falls


def flags(falls):
    return pack_signs(torch.where(falls, 1.0, -1.0).view(1, -1, 1, 1)).view(-1)


@pytest.mark.parametrize("version", VERSIONS.values(), ids=VERSIONS.keys())
@pytest.mark.parametrize("channels", [1, 31, 32, 33, 63, 100])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_every_version_gives_the_bits_of_the_largest_values(version, channels, window, triton_device):
    x, threshold, falls = example(channels, 7, 6)
    kernel, stride, padding, ceil_mode = window
    expected = pack_reached(F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode), threshold, falls)
    bits = pack_reached(x, threshold, falls)
    assert torch.equal(version(bits, flags(falls), *window, triton_device), expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pooling_and_a_threshold_change_places(data):
    channels, height, width = (data.draw(st.integers(1, top)) for top in (70, 12, 12))
    ceil_mode = data.draw(st.booleans())
    stride = data.draw(st.integers(1, 4))
    # Rounding up, a window may reach beyond the image by less than a stride.
    kernel = data.draw(st.integers(1, min(min(height, width) + (stride - 1 if ceil_mode else 0), 5)))
    padding = data.draw(st.integers(0, kernel // 2))
    x, threshold, falls = example(channels, height, width, seed=data.draw(st.integers(0, 2**31)))
    pooled = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode)
    found = pool_bits(
        pack_reached(x, threshold, falls),
        flags(falls),
        (kernel, kernel),
        (stride, stride),
        (padding, padding),
        ceil_mode=ceil_mode,
    )
    assert torch.equal(found, pack_reached(pooled, threshold, falls))


def test_bits_are_read_by_their_strides_and_an_empty_batch_gives_nothing():
    x, threshold, falls = example(40, 6, 8)
    bits = pack_reached(x, threshold, falls)
    window = (flags(falls), (3, 3), (2, 2), (1, 1))
    turned = bits.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(pool_bits(turned, *window), pool_bits(bits, *window))
    assert pool_bits(bits[:0], *window).shape == (0, 3, 4, 2)


def test_the_operator_has_a_faithful_fake():
    bits = pack_reached(*example(33, 7, 6))
    arguments = (bits, torch.tensor([5, 1], dtype=torch.int32), [3, 3], [2, 2], [1, 1], True)
    torch.library.opcheck(torch.ops.dab.pool_bits.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": torch.zeros(1, 4, 4, 1)}, TypeError, r"bits: torch\.float32"),
        ({"is_and_bits": torch.zeros(1)}, TypeError, r"is_and_bits: torch\.float32"),
        ({"is_and_bits": torch.zeros(2, dtype=torch.int32)}, ValueError, r"bits: shape .* with is_and_bits \(2,\)"),
        ({"is_and_bits": torch.zeros(1, dtype=torch.int32, device="meta")}, ValueError, "is_and_bits: on meta"),
        ({"kernel": (0, 2)}, ValueError, r"kernel: \(0, 2\)"),
        ({"stride": (1, 0)}, ValueError, r"stride \(1, 0\)"),
        ({"padding": (2, 0)}, ValueError, r"padding: \(2, 0\) for a window of \(2, 2\)"),
        ({"kernel": (5, 2)}, ValueError, r"kernel: \(5, 2\) does not fit into \(4, 4\) pixels"),
    ],
)
def test_what_cannot_be_pooled_is_refused(change, error, message):
    given_ = {
        "bits": torch.zeros(1, 4, 4, 1, dtype=torch.int32),
        "is_and_bits": torch.zeros(1, dtype=torch.int32),
        "kernel": (2, 2),
        "stride": (2, 2),
    }
    with pytest.raises(error, match=message):
        pool_bits(**given_ | change)
