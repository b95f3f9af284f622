"""Max pooling against torch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kernels import max_pool2d, max_pool_numba
from kernels.numba_threads import torch_threads


def values(channels, height, width, batch=2, seed=0):
    x = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))
    x[0, 0, height // 2, width // 2], x[-1, -1, 0, 0], x[-1, 0, -1, 0] = torch.nan, -torch.inf, torch.inf
    return x


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found.stride() == expected.stride()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_largest_values_are_torchs(data):
    channels, height, width = (data.draw(st.integers(1, top)) for top in (70, 12, 12))
    ceil_mode = data.draw(st.booleans())
    stride = data.draw(st.integers(1, 4))
    # Rounding up, a window may reach beyond the image by less than a stride.
    kernel = data.draw(st.integers(1, min(min(height, width) + (stride - 1 if ceil_mode else 0), 5)))
    padding = data.draw(st.integers(0, kernel // 2))
    x = values(channels, height, width, seed=data.draw(st.integers(0, 2**31))).to(memory_format=torch.channels_last)
    window = ((kernel, kernel), (stride, stride), (padding, padding))
    torch.testing.assert_close(
        max_pool2d(x, *window, ceil_mode=ceil_mode),
        F.max_pool2d(x, *window, ceil_mode=ceil_mode),
        rtol=0,
        atol=0,
        equal_nan=True,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_other_types_and_strides_are_torchs(dtype, memory_format):
    x = values(33, 7, 6).to(dtype).to(memory_format=memory_format)
    assert_same(max_pool2d(x, (3, 2), (2, 1), (1, 0)), F.max_pool2d(x, (3, 2), (2, 1), (1, 0)))


def test_threads_and_an_empty_batch_give_the_same():
    x = values(33, 9, 8, batch=3).permute(0, 2, 3, 1).contiguous()
    alone, together = (torch.full((3, 4, 3, 33), 7.0) for _ in range(2))
    max_pool_numba._pool(x.numpy(), (3, 3, 2, 2, 0, 0), alone.numpy())
    with torch_threads():
        max_pool_numba._pool_in_threads(x.numpy(), (3, 3, 2, 2, 0, 0), together.numpy())
    torch.testing.assert_close(alone, together, rtol=0, atol=0, equal_nan=True)
    empty = torch.empty(0, 3, 4, 4).to(memory_format=torch.channels_last)
    assert max_pool2d(empty, (2, 2), (2, 2)).shape == (0, 3, 2, 2)


def test_gradients_are_torchs():
    x = torch.randn(1, 2, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    max_pool2d(x, (2, 2), (2, 2)).sum().backward()
    assert x.grad is not None
    assert float(x.grad.sum()) == 8


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        ((2, 2), (1, 1), (3, 3)),
        ((0, 0), (1, 1), (0, 0)),
        ((2, 2), (0, 1), (0, 0)),
        ((2, 2), (1, 1), (-1, -1)),
        ((9, 9), (1, 1), (0, 0)),
    ],
)
def test_windows_that_torch_refuses_are_refused(kernel, stride, padding):
    x = torch.zeros(1, 8, 4, 4).to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError):
        F.max_pool2d(x, kernel, stride, padding)
    with pytest.raises(ValueError, match=r"kernel|padding"):
        max_pool2d(x, kernel, stride, padding)
