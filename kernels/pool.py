"""Max pooling of packed signs: what max pooling does to values, behind a threshold.

A threshold and max pooling change places: max(x) >= t holds where any x >= t, so the bit of the largest value is the OR
of the bits. Where the bit stands for "below the threshold" (the channel falls), it is their AND. Both are one loop:
with m = 1 in the channels that fall, out = m xor OR(m xor bits). A padded tap counts for nothing, as the -inf of
`torch.nn.functional.max_pool2d` does. Every version is exact.

Left out: dilation, and the places of the largest values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.packing import has_numba, is_plain_cpu


def pool_bits(
    bits: Tensor,
    is_and_bits: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    *,
    ceil_mode: bool = False,
) -> Tensor:
    """Pools packed signs over windows: OR of the bits, AND in the channels that `is_and_bits` names.

    With bits of (x >= threshold) xor falls, and the bits of falls, this is the same bit of max_pool2d(x, kernel,
    stride, padding, ceil_mode=ceil_mode). No gradient. CUDA tensors go to Triton, CPU tensors to Numba, all others to
    the reference.

    Args:
        bits: (N, H, W, words) int32 in the bit order of `kernels.packing`.
        is_and_bits: (words,) int32 in the same order; 0 beyond the last channel.
        kernel: height and width of the window.
        stride: its steps, (vertical, horizontal).
        padding: rows and columns at each side that count for nothing, at most half the window.
        ceil_mode: whether a window may reach beyond the last row or column.

    Returns:
        (N, H', W', words) int32 with the sizes of `torch.nn.functional.max_pool2d`.

    Raises:
        TypeError: a tensor is not int32.
        ValueError: shapes, devices, kernel, stride or padding do not fit together.
    """
    _check(bits, is_and_bits, kernel, stride, padding, ceil_mode)
    if is_plain_cpu(bits):
        return _pool_bits_cpu(bits, is_and_bits, kernel, stride, padding, ceil_mode)
    out: Tensor = torch.ops.dab.pool_bits(bits, is_and_bits, kernel, stride, padding, ceil_mode)
    return out


def pool_bits_reference(
    bits: Tensor,
    is_and_bits: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """Plain-torch `pool_bits` on any device, arguments as there; the other versions are compared with it."""
    sizes = _sizes(bits, kernel, stride, padding, ceil_mode)
    # As many rows and columns as the windows reach; those beyond the image are 0, which adds nothing to an OR.
    reach = [(size - 1) * step + taps for size, step, taps in zip(sizes, stride, kernel, strict=True)]
    below, right = (reach[i] - bits.shape[1 + i] - padding[i] for i in (0, 1))
    inverted = F.pad(bits ^ is_and_bits, (0, 0, padding[1], right, padding[0], below))
    out = bits.new_zeros(bits.shape[0], *sizes, bits.shape[3])
    for y in range(kernel[0]):
        for x in range(kernel[1]):
            rows = inverted[:, y : y + (sizes[0] - 1) * stride[0] + 1 : stride[0]]
            out |= rows[:, :, x : x + (sizes[1] - 1) * stride[1] + 1 : stride[1]]
    return out ^ is_and_bits


def pooled_size(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """Returns how many windows `torch.nn.functional.max_pool2d` lays along a side of `size` pixels."""
    room = size + 2 * padding - kernel + (stride - 1 if ceil_mode else 0)
    count = room // stride + 1
    # With ceil_mode the last window must begin inside the image or the padding before it.
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count


def _sizes(
    bits: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool
) -> tuple[int, int]:
    height, width = (pooled_size(bits.shape[1 + i], kernel[i], stride[i], padding[i], ceil_mode) for i in (0, 1))
    return height, width


def _empty_output(
    bits: Tensor,
    is_and_bits: Tensor,  # noqa: ARG001  (a fake has the operator's arguments)
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    return bits.new_empty(bits.shape[0], *_sizes(bits, kernel, stride, padding, ceil_mode), bits.shape[3])


def _pool_bits_cpu(
    bits: Tensor,
    is_and_bits: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    if not has_numba():
        return pool_bits_reference(bits, is_and_bits, kernel, stride, padding, ceil_mode)
    from kernels import pool_numba

    out = _empty_output(bits, is_and_bits, kernel, stride, padding, ceil_mode)
    pool_numba.launch(bits, is_and_bits, kernel, stride, padding, out)
    return out


def _pool_bits_cuda(
    bits: Tensor,
    is_and_bits: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    from kernels import pool_triton

    out = _empty_output(bits, is_and_bits, kernel, stride, padding, ceil_mode)
    pool_triton.launch(bits, is_and_bits, kernel, stride, padding, out)
    return out


def _check(
    bits: Tensor,
    is_and_bits: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    ceil_mode: bool,
) -> None:
    for name, words in (("bits", bits), ("is_and_bits", is_and_bits)):
        if words.dtype != torch.int32:
            raise TypeError(f"{name}: {words.dtype}; packed signs are int32 (see pack_signs)")
    if bits.dim() != 4 or is_and_bits.shape != bits.shape[3:]:
        raise ValueError(
            f"bits: shape {tuple(bits.shape)} with is_and_bits {tuple(is_and_bits.shape)}; "
            "pool_bits takes (N, H, W, words) and (words,)"
        )
    if is_and_bits.device != bits.device:
        raise ValueError(f"is_and_bits: on {is_and_bits.device}, bits on {bits.device}; move them to one device")
    check_windows(bits.shape[1:3], kernel, stride, padding, ceil_mode)


def check_windows(
    pixels: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
) -> None:
    """Refuses windows of a pooling that torch refuses, too, for an image of (height, width) pixels.

    Raises:
        ValueError: kernel or stride below 1, a padding beyond half the window, or no window fits.
    """
    if min(kernel) < 1 or min(stride) < 1:
        raise ValueError(f"kernel: {kernel} with stride {stride}; both are at least 1")
    if min(padding) < 0 or any(2 * padding[i] > kernel[i] for i in (0, 1)):
        raise ValueError(
            f"padding: {padding} for a window of {kernel}; 0 to half the window, or one would hold nothing"
        )
    if min(pooled_size(pixels[i], kernel[i], stride[i], padding[i], ceil_mode) for i in (0, 1)) < 1:
        raise ValueError(f"kernel: {kernel} does not fit into {tuple(pixels)} pixels with padding {padding}")


torch.library.define(
    "dab::pool_bits",
    "(Tensor bits, Tensor is_and_bits, int[2] kernel, int[2] stride, int[2] padding, bool ceil_mode) -> Tensor",
)
torch.library.impl("dab::pool_bits", "CompositeExplicitAutograd", pool_bits_reference)
torch.library.impl("dab::pool_bits", "CPU", _pool_bits_cpu)
torch.library.impl("dab::pool_bits", "CUDA", _pool_bits_cuda)
torch.library.register_fake("dab::pool_bits", _empty_output)
