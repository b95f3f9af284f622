import subprocess
import sys

import numba
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels
from kernels import numba_threads, pack_reached, pack_signs, packing_numba, packing_triton, unpack_signs
from kernels.packing import pack_signs_reference

SIZES = [1, 31, 32, 33, 63, 100]
POISON = 0x5A5A5A5A


def packed_by_reference(x, device):
    return pack_signs_reference(x)


def packed_by_numba(x, device):
    bits = torch.full((x.shape[0], *x.shape[2:], -(-x.shape[1] // 32)), POISON, dtype=torch.int32)
    packing_numba.launch(x, bits)
    return bits


def packed_by_triton(x, device):
    bits = torch.full((x.shape[0], *x.shape[2:], -(-x.shape[1] // 32)), POISON, dtype=torch.int32, device=device)
    packing_triton.launch(x.to(device), bits)
    return bits.cpu()


VERSIONS = [packed_by_reference, packed_by_numba, packed_by_triton]


def packed_by_numpy(x):
    """An independent packing: numpy's little-endian packbits over the channels, four bytes to a word."""
    positive = np.moveaxis(x.double().numpy() >= 0, 1, 3)
    padded = np.pad(positive, ((0, 0), (0, 0), (0, 0), (0, -positive.shape[3] % 32)))
    return torch.from_numpy(np.packbits(padded, axis=3, bitorder="little").view("<i4"))


@pytest.mark.parametrize("pack", VERSIONS)
@pytest.mark.parametrize("channels", SIZES)
def test_every_version_packs_the_same_bits(pack, channels, triton_device):
    x = torch.randn(2, channels, 3, 5, generator=torch.Generator().manual_seed(channels))
    assert torch.equal(pack(x, triton_device), packed_by_numpy(x))


@pytest.mark.parametrize("pack", VERSIONS)
def test_the_lowest_channel_is_the_least_significant_bit(pack, triton_device):
    x = torch.full((1, 34, 1, 1), -1.0)
    x[0, [0, 3, 31, 33]] = 1.0
    words = pack(x, triton_device).flatten().tolist()
    assert words == [1 + 8 - 2**31, 2]


@pytest.mark.parametrize("pack", VERSIONS)
def test_both_zeros_count_as_positive_and_nan_does_not(pack, triton_device):
    x = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf")]).view(1, 5, 1, 1)
    assert pack(x, triton_device).item() == 0b01011


@pytest.mark.parametrize("pack", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_keep_their_signs(pack, dtype, triton_device):
    x = torch.randn(1, 33, 2, 2, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0, 0] = -torch.finfo(dtype).tiny
    assert torch.equal(pack(x, triton_device), packed_by_numpy(x))


@pytest.mark.parametrize("pack", VERSIONS)
def test_strided_inputs_are_read_by_their_strides(pack, triton_device):
    x = torch.randn(2, 40, 4, 6, generator=torch.Generator().manual_seed(2))
    expected = packed_by_numpy(x)
    assert torch.equal(pack(x.to(memory_format=torch.channels_last), triton_device), expected)
    assert torch.equal(pack(x.flip(3).contiguous().flip(3), triton_device), expected)
    assert torch.equal(pack(x[:, :, ::2, 1:], triton_device), packed_by_numpy(x[:, :, ::2, 1:].contiguous()))


@pytest.mark.parametrize("pack", VERSIONS)
def test_an_empty_batch_packs_to_nothing(pack, triton_device):
    assert pack(torch.empty(0, 33, 2, 2), triton_device).shape == (0, 2, 2, 2)


@given(channels=st.integers(1, 100), seed=st.integers(0, 2**31))
def test_unpacking_returns_the_signs(channels, seed):
    x = torch.randn(1, channels, 2, 3, generator=torch.Generator().manual_seed(seed))
    signs = torch.where(x >= 0, 1.0, -1.0)
    assert torch.equal(unpack_signs(pack_signs(x), channels), signs)


def test_packing_refuses_what_it_cannot_pack():
    with pytest.raises(TypeError, match=r"x: torch\.int64"):
        pack_signs(torch.ones(1, 1, 1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="x: shape"):
        pack_signs(torch.ones(3, 3))


def test_unpacking_refuses_what_was_not_packed():
    with pytest.raises(TypeError, match=r"bits: torch\.float32"):
        unpack_signs(torch.zeros(1, 1, 1, 1), 1)
    with pytest.raises(ValueError, match="for 33 channels"):
        unpack_signs(torch.zeros(1, 1, 1, 1, dtype=torch.int32), 33)


def test_the_operator_has_a_faithful_fake():
    x = torch.randn(2, 33, 3, 3)
    torch.library.opcheck(torch.ops.dab.pack_signs.default, (x,), test_utils=("test_schema", "test_faketensor"))


def test_a_meta_tensor_gives_a_shape_without_computing():
    assert pack_signs(torch.empty(2, 33, 5, 7, device="meta")).shape == (2, 5, 7, 2)


def test_importing_kernels_imports_neither_compiler():
    code = "import sys, kernels; print([m for m in ('numba', 'triton', 'torch._dynamo') if m in sys.modules])"
    root = kernels.__path__[0] + "/.."
    loaded = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_numba_uses_torchs_number_of_threads_and_restores_its_own():
    before, torch_before = numba.get_num_threads(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with numba_threads.torch_threads():
            assert numba.get_num_threads() == 1
        assert numba.get_num_threads() == before
    finally:
        torch.set_num_threads(torch_before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels", SIZES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_reached_thresholds_are_packed_by_channel(channels, dtype, memory_format):
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(2, channels, 5, 7, generator=generator, dtype=dtype).to(memory_format=memory_format)
    threshold = x[0, :, 2, 3].clone()  # a value that occurs, so that equality is tried
    threshold[::5], threshold[2::5] = torch.inf, -torch.inf
    x[1, :, 0, 0] = torch.nan
    falls = torch.arange(channels) % 3 == 0
    upper = (x >= threshold.view(-1, 1, 1)) ^ falls.view(-1, 1, 1)
    expected = pack_signs(torch.where(upper, 1.0, -1.0))
    assert torch.equal(pack_reached(x, threshold, falls), expected)
    assert torch.equal(torch.ops.dab.pack_reached(x, threshold, falls), expected)


def test_thresholds_that_do_not_fit_the_channels_are_refused():
    x, falls = torch.zeros(1, 3, 2, 2), torch.zeros(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="x: shape"):
        pack_reached(x, torch.zeros(4), falls)
    with pytest.raises(TypeError, match="floating type"):
        pack_reached(x, torch.zeros(3, dtype=torch.float64), falls)
