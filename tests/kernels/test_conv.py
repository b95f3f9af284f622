from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kernels import conv_numba, conv_triton, pack_signs, packed_conv2d, packed_conv2d_signs
from kernels.conv import packed_conv2d_reference

SIZES = [1, 31, 32, 33, 63, 100]
# kernel, stride, padding, image: square and not, steps that skip pixels, windows that lie wholly in the padding.
GEOMETRIES = [
    ((3, 3), (1, 1), (1, 1), (5, 6)),
    ((1, 1), (1, 1), (0, 0), (4, 3)),
    ((3, 2), (2, 1), (1, 2), (7, 4)),
    ((5, 5), (2, 2), (2, 2), (6, 5)),
    ((2, 3), (3, 2), (4, 3), (3, 3)),
]


def conv_by_reference(device, bits, weight_bits, alpha, beta, bias, channels, stride, padding):
    return packed_conv2d_reference(bits, weight_bits, alpha, beta, bias, channels, stride, padding)


def poisoned_output(bits, weight_bits, stride, padding, device):
    height = (bits.shape[1] + 2 * padding[0] - weight_bits.shape[1]) // stride[0] + 1
    width = (bits.shape[2] + 2 * padding[1] - weight_bits.shape[2]) // stride[1] + 1
    return torch.full((bits.shape[0], weight_bits.shape[0], height, width), float("nan"), device=device)


def conv_by_numba(device, bits, weight_bits, alpha, beta, bias, channels, stride, padding):
    out = poisoned_output(bits, weight_bits, stride, padding, "cpu")
    conv_numba.launch(bits, weight_bits, alpha, beta, bias, channels, stride, padding, out)
    return out


def conv_by_triton(device, bits, weight_bits, alpha, beta, bias, channels, stride, padding):
    out = poisoned_output(bits, weight_bits, stride, padding, device)
    tensors = [None if t is None else t.to(device) for t in (bits, weight_bits, alpha, beta, bias)]
    conv_triton.launch(*tensors, channels, stride, padding, out)
    return out.cpu()


VERSIONS = [conv_by_reference, conv_by_numba, conv_by_triton]


def random_case(channels, filters, kernel, image, seed=0):
    generator = torch.Generator().manual_seed(1000 * channels + seed)
    x = torch.randn(2, channels, *image, generator=generator)
    mask = torch.rand(filters, channels, *kernel, generator=generator) < 0.3
    alpha, beta, bias = torch.randn(3, filters, generator=generator)
    return torch.where(x >= 0, 1.0, -1.0), mask, alpha, beta, bias


def packed_case(signs, mask):
    return pack_signs(signs), pack_signs(torch.where(mask, 1.0, -1.0))


def float_path(signs, mask, alpha, beta, bias, stride, padding):
    """What a layer computes in evaluation: whole-number convolutions, then one float32 operation after the other."""
    selected = F.conv2d(signs, mask.float(), stride=stride, padding=padding)
    total = F.conv2d(signs, torch.ones_like(mask[:1], dtype=torch.float32), stride=stride, padding=padding)
    out = (alpha - beta).view(-1, 1, 1) * selected + beta.view(-1, 1, 1) * total
    return out if bias is None else out + bias.view(-1, 1, 1)


@pytest.mark.parametrize("conv", VERSIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("channels", SIZES)
def test_both_integer_sums_are_exact(conv, geometry, channels, triton_device):
    kernel, stride, padding, image = geometry
    signs, mask, *_ = random_case(channels, 5, kernel, image)
    bits, weight_bits = packed_case(signs, mask)
    one, zero = torch.ones(5), torch.zeros(5)
    selected = conv(triton_device, bits, weight_bits, one, zero, None, channels, stride, padding)
    total = conv(triton_device, bits, weight_bits, one, one, None, channels, stride, padding)
    assert torch.equal(selected.double(), F.conv2d(signs.double(), mask.double(), stride=stride, padding=padding))
    ones = torch.ones_like(mask, dtype=torch.float64)
    assert torch.equal(total.double(), F.conv2d(signs.double(), ones, stride=stride, padding=padding))


@pytest.mark.parametrize("conv", VERSIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_result_equals_the_float_path_bit_for_bit(conv, geometry, has_bias, triton_device):
    kernel, stride, padding, image = geometry
    signs, mask, alpha, beta, bias = random_case(45, 37, kernel, image)
    bias = bias if has_bias else None
    packed = conv(triton_device, *packed_case(signs, mask), alpha, beta, bias, 45, stride, padding)
    assert torch.equal(packed, float_path(signs, mask, alpha, beta, bias, stride, padding))


@pytest.mark.parametrize("conv", VERSIONS)
@pytest.mark.parametrize("filters", SIZES)
def test_any_number_of_filters_and_pixels_is_covered(conv, filters, triton_device):
    signs, mask, alpha, beta, bias = random_case(33, filters, (3, 3), (1, filters))
    packed = conv(triton_device, *packed_case(signs, mask), alpha, beta, bias, 33, (1, 1), (1, 1))
    assert torch.equal(packed, float_path(signs, mask, alpha, beta, bias, 1, 1))


@pytest.mark.parametrize("conv", VERSIONS)
@pytest.mark.parametrize("channels", [1, 31, 33])
def test_bits_beyond_the_last_channel_do_not_count(conv, channels, triton_device):
    signs, mask, alpha, beta, _ = random_case(channels, 3, (3, 3), (4, 4))
    bits, weight_bits = packed_case(signs, mask)
    garbage = torch.full((1,), -1, dtype=torch.int32) << (channels % 32)
    dirty_bits, dirty_weights = bits.clone(), weight_bits.clone()
    dirty_bits[..., -1] |= garbage
    dirty_weights[..., -1] |= garbage
    clean = conv(triton_device, bits, weight_bits, alpha, beta, None, channels, (1, 1), (1, 1))
    dirty = conv(triton_device, dirty_bits, dirty_weights, alpha, beta, None, channels, (1, 1), (1, 1))
    assert torch.equal(clean, dirty)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_geometry_matches_the_float_path(data):
    kernel = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    padding = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    stride = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    image = tuple(data.draw(st.integers(max(1, k - 2 * p), 9)) for k, p in zip(kernel, padding, strict=True))
    channels, filters = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 6))
    signs, mask, alpha, beta, bias = random_case(channels, filters, kernel, image)
    packed = packed_conv2d(
        *packed_case(signs, mask), alpha, beta, bias, in_channels=channels, stride=stride, padding=padding
    )
    assert torch.equal(packed, float_path(signs, mask, alpha, beta, bias, stride, padding))


def test_stride_and_padding_may_be_single_numbers():
    signs, mask, alpha, beta, bias = random_case(20, 4, (3, 3), (8, 8))
    packed = packed_conv2d(*packed_case(signs, mask), alpha, beta, bias, in_channels=20, stride=2, padding=1)
    assert torch.equal(packed, float_path(signs, mask, alpha, beta, bias, 2, 1))


def test_an_empty_batch_gives_an_empty_result():
    signs, mask, alpha, beta, bias = random_case(20, 4, (3, 3), (8, 8))
    bits, weight_bits = packed_case(signs, mask)
    assert packed_conv2d(bits[:0], weight_bits, alpha, beta, bias, in_channels=20).shape == (0, 4, 8, 8)


def test_python_threads_may_call_at_once():
    signs, mask, alpha, beta, bias = random_case(64, 16, (3, 3), (12, 12))
    bits, weight_bits = packed_case(signs, mask)
    with ThreadPoolExecutor(4) as pool:
        results = list(
            pool.map(lambda _: packed_conv2d(bits, weight_bits, alpha, beta, bias, in_channels=64), range(32))
        )
    expected = float_path(signs, mask, alpha, beta, bias, 1, 1)
    assert all(torch.equal(result, expected) for result in results)


def call(**changes):
    arguments = {
        "bits": torch.zeros(1, 4, 4, 2, dtype=torch.int32),
        "weight_bits": torch.zeros(3, 3, 3, 2, dtype=torch.int32),
        "alpha": torch.ones(3),
        "beta": torch.ones(3),
        "in_channels": 40,
    }
    return packed_conv2d(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bits": torch.zeros(1, 4, 4, 2)}, TypeError, "bits: torch.float32"),
        ({"bits": torch.zeros(4, 4, 2, dtype=torch.int32)}, ValueError, "bits: shape"),
        (
            {"weight_bits": torch.zeros(3, 3, 3, 1, dtype=torch.int32)},
            ValueError,
            "in_channels: 40 channels are 2 words",
        ),
        ({"weight_bits": torch.zeros(3, 9, 3, 2, dtype=torch.int32)}, ValueError, "does not fit"),
        (
            {"weight_bits": torch.zeros(3, 3, 3, 2, dtype=torch.int32, device="meta")},
            ValueError,
            "weight_bits: on meta",
        ),
        ({"in_channels": 0}, ValueError, "in_channels: 0"),
        ({"alpha": torch.ones(2)}, ValueError, r"alpha: shape \(2,\) for 3 filters"),
        ({"beta": torch.ones(3, dtype=torch.float64)}, TypeError, "beta: torch.float64"),
        ({"bias": torch.ones(3, device="meta")}, ValueError, "bias: on meta"),
        ({"stride": 0}, ValueError, "stride:"),
        ({"padding": (1, -1)}, ValueError, "padding"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_sums_that_float32_cannot_hold_are_refused():
    words = 2**19
    bits = torch.zeros(1, 1, 1, words, dtype=torch.int32)
    with pytest.raises(ValueError, match="16777216 taps"):
        call(bits=bits, weight_bits=bits, alpha=torch.ones(1), beta=torch.ones(1), in_channels=32 * words, padding=0)


def test_the_operator_has_a_faithful_fake():
    signs, mask, alpha, beta, bias = random_case(40, 4, (3, 2), (8, 7))
    arguments = (*packed_case(signs, mask), alpha, beta, bias, 40, (2, 1), (1, 0))
    operator = torch.ops.dab.packed_conv2d.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("filters", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_signs_of_a_convolution_are_those_of_its_values(geometry, filters, has_bias):
    kernel, stride, padding, image = geometry
    signs, mask, alpha, beta, bias = random_case(40, filters, kernel, image)
    bits, weight_bits = packed_case(signs, mask)
    taken = bias if has_bias else None
    y = packed_conv2d(bits, weight_bits, alpha, beta, taken, in_channels=40, stride=stride, padding=padding)
    threshold = y.flatten(2).median(2).values[0]  # a value that occurs, so that equality is tried
    threshold[::7], threshold[3::7] = torch.inf, -torch.inf
    falls = torch.arange(filters) % 3 == 0
    found = packed_conv2d_signs(
        bits, weight_bits, alpha, beta, taken, threshold, falls, in_channels=40, stride=stride, padding=padding
    )
    upper = (y >= threshold.view(-1, 1, 1)) ^ falls.view(-1, 1, 1)
    assert torch.equal(found, pack_signs(torch.where(upper, 1.0, -1.0)))


@pytest.mark.parametrize(
    ("threshold", "falls", "message"),
    [
        (torch.zeros(3), torch.zeros(4, dtype=torch.bool), "threshold: shape"),
        (torch.zeros(4), torch.zeros(4), "falls: torch.float32"),
        (torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.bool), "threshold: torch.float64"),
    ],
)
def test_thresholds_that_do_not_fit_are_refused(threshold, falls, message):
    signs, mask, alpha, beta, _ = random_case(8, 4, (3, 3), (5, 5))
    with pytest.raises((TypeError, ValueError), match=message):
        packed_conv2d_signs(*packed_case(signs, mask), alpha, beta, None, threshold, falls, in_channels=8)


def test_changed_weights_are_seen_at_once():
    signs, mask, alpha, beta, _ = random_case(8, 4, (3, 3), (5, 5))
    bits, weight_bits = packed_case(signs, mask)
    before = packed_conv2d(bits, weight_bits, alpha, beta, in_channels=8)
    alpha.mul_(2)
    weight_bits.zero_()
    after = packed_conv2d(bits, weight_bits, alpha, beta, in_channels=8)
    total = F.conv2d(signs, torch.ones_like(mask[:1], dtype=torch.float32), padding=1)
    assert torch.equal(after, beta.view(-1, 1, 1) * total)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_give_the_same_bits(threads):
    signs, mask, alpha, beta, bias = random_case(128, 64, (3, 3), (40, 41))
    bits, weight_bits = packed_case(signs, mask)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = packed_conv2d(bits, weight_bits, alpha, beta, bias, in_channels=128)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, float_path(signs, mask, alpha, beta, bias, (1, 1), (1, 1)))


def test_lists_are_strides_and_paddings_too():
    bits, weight_bits = pack_signs(torch.randn(1, 40, 6, 6)), pack_signs(torch.randn(8, 40, 3, 3))
    alpha, beta = torch.randn(2, 8)
    expected = packed_conv2d(bits, weight_bits, alpha, beta, in_channels=40, stride=(2, 1), padding=(1, 0))
    assert torch.equal(
        packed_conv2d(bits, weight_bits, alpha, beta, in_channels=40, stride=[2, 1], padding=[1, 0]), expected
    )
