"""Signs of a tensor as bits, 32 channels to a word.

Bit order: bit i of word j of a pixel is channel 32 * j + i, so the least significant bit is the lowest channel. A bit
is 1 where x >= 0; -0.0 counts as >= 0, NaN does not (its bit is 0). Bits beyond the last channel are 0. Every version
is exact. Left out: packing of several pixels to a word for fewer than 32 channels.
"""

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

WORD_BITS = 32


def num_words(channels: int) -> int:
    """Returns how many 32-bit words hold one bit for each of `channels` channels."""
    return -(-channels // WORD_BITS)


@lru_cache(maxsize=1)
def has_numba() -> bool:
    """Returns whether the Numba kernels can be imported; without Numba the CPU runs the reference."""
    return importlib.util.find_spec("numba") is not None


_PLAIN = (Tensor, torch.nn.Parameter)


def pack_signs(x: Tensor) -> Tensor:
    """Packs the signs of an image tensor: bit 1 where x >= 0.

    No gradient. CUDA tensors go to Triton, CPU tensors to Numba, all others to the reference.

    Args:
        x: (N, C, H, W), a floating type.

    Returns:
        (N, H, W, ceil(C / 32)) int32 in the bit order of this module.

    Raises:
        TypeError: x is not of a floating type.
        ValueError: x has not four dimensions.
    """
    if not x.is_floating_point():
        raise TypeError(f"x: {x.dtype} has no signed zero to define the sign of; give a floating type, e.g. x.float()")
    if x.dim() != 4:
        raise ValueError(f"x: shape {tuple(x.shape)} has {x.dim()} dimensions; pack_signs takes (N, C, H, W)")
    if is_plain_cpu(x):
        return _pack_signs_cpu(x.detach())
    bits: Tensor = torch.ops.dab.pack_signs(x.detach())
    return bits


def pack_reached(x: Tensor, threshold: Tensor, falls: Tensor) -> Tensor:
    """Packs one bit of each value: (x >= threshold) xor falls, each of them by channel.

    That is the sign of a batch normalisation of x, without ever writing it. No gradient. CUDA tensors go to
    Triton, CPU tensors to Numba, all others to the reference.

    Args:
        x: (N, C, H, W), a floating type.
        threshold: (C,) of the same type; -inf for always, inf for never.
        falls: (C,) bool.

    Returns:
        (N, H, W, ceil(C / 32)) int32 in the bit order of this module; NaN reaches no threshold.

    Raises:
        TypeError: a tensor has another type than stated.
        ValueError: x has not four dimensions, or threshold or falls have not one value a channel.
    """
    if not x.is_floating_point() or threshold.dtype != x.dtype or falls.dtype != torch.bool:
        raise TypeError(
            f"x: {x.dtype} with a threshold of {threshold.dtype} and falls of {falls.dtype}; give x and threshold in "
            "one floating type, falls in bool"
        )
    if x.dim() != 4 or threshold.shape != (x.shape[1],) or falls.shape != (x.shape[1],):
        raise ValueError(
            f"x: shape {tuple(x.shape)} with thresholds {tuple(threshold.shape)} and falls {tuple(falls.shape)}; "
            "pack_reached takes (N, C, H, W), (C,) and (C,)"
        )
    if is_plain_cpu(x):
        return _pack_reached_cpu(x.detach(), threshold, falls)
    bits: Tensor = torch.ops.dab.pack_reached(x.detach(), threshold, falls)
    return bits


def pack_reached_reference(x: Tensor, threshold: Tensor, falls: Tensor) -> Tensor:
    """Plain-torch `pack_reached`, on any device that has `pack_signs`."""
    is_upper = (x >= threshold.view(-1, 1, 1)) ^ falls.view(-1, 1, 1)
    bits: Tensor = torch.ops.dab.pack_signs(torch.where(is_upper, 1.0, -1.0))
    return bits


def is_plain_cpu(x: Tensor) -> bool:
    """Returns whether a CPU kernel may be called without torch's dispatcher, which costs as much as a small layer.

    A compiler, and tensors that only pretend to hold values, need the operator.
    """
    return x.device.type == "cpu" and type(x) in _PLAIN and not torch.compiler.is_compiling()


def unpack_signs(bits: Tensor, channels: int) -> Tensor:
    """Inverse of `pack_signs`: +1 where the bit is 1, else -1.

    Args:
        bits: (N, H, W, ceil(channels / 32)) int32.
        channels: number of channels C that were packed.

    Returns:
        (N, C, H, W) float32 of +1 and -1.

    Raises:
        TypeError: bits are not int32.
        ValueError: the number of words does not hold `channels` channels.
    """
    if bits.dtype != torch.int32:
        raise TypeError(f"bits: {bits.dtype}; packed signs are int32")
    if bits.dim() != 4 or bits.shape[3] != num_words(channels):
        raise ValueError(
            f"bits: shape {tuple(bits.shape)} for {channels} channels; expected (N, H, W, {num_words(channels)})"
        )
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=bits.device)
    planes = (bits.unsqueeze(-1) >> shifts) & 1
    signs = planes.flatten(3)[..., :channels].permute(0, 3, 1, 2)
    return (2 * signs - 1).to(torch.float32, memory_format=torch.contiguous_format)


def pack_signs_reference(x: Tensor) -> Tensor:
    """Plain-torch `pack_signs`, on any device; the other versions are compared with it."""
    batch, channels, height, width = x.shape
    words = num_words(channels)
    planes = x.new_zeros((batch, height, width, words * WORD_BITS), dtype=torch.int64)
    planes[..., :channels] = (x >= 0).permute(0, 2, 3, 1)
    weights = torch.ones(WORD_BITS, dtype=torch.int64, device=x.device) << torch.arange(WORD_BITS, device=x.device)
    unsigned = (planes.view(batch, height, width, words, WORD_BITS) * weights).sum(-1)
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)


def _empty_bits(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.new_empty((batch, height, width, num_words(channels)), dtype=torch.int32)


def _pack_signs_cpu(x: Tensor) -> Tensor:
    if not has_numba():
        return pack_signs_reference(x)
    from kernels import packing_numba

    bits = _empty_bits(x)
    packing_numba.launch(x, bits)
    return bits


def _pack_reached_cpu(x: Tensor, threshold: Tensor, falls: Tensor) -> Tensor:
    if not has_numba():
        return pack_reached_reference(x, threshold, falls)
    from kernels import packing_numba

    bits = _empty_bits(x)
    packing_numba.launch_reached(x, threshold, falls, bits)
    return bits


def _empty_reached(x: Tensor, threshold: Tensor, falls: Tensor) -> Tensor:  # noqa: ARG001  (as the operator's)
    return _empty_bits(x)


def _pack_signs_cuda(x: Tensor) -> Tensor:
    from kernels import packing_triton

    bits = _empty_bits(x)
    with torch.cuda.device(x.device):
        packing_triton.launch(x, bits)
    return bits


def _pack_reached_cuda(x: Tensor, threshold: Tensor, falls: Tensor) -> Tensor:
    from kernels import packing_triton

    bits = _empty_bits(x)
    with torch.cuda.device(x.device):
        packing_triton.launch_reached(x, threshold, falls, bits)
    return bits


# `torch.library.custom_op` would do the same, but its first call imports torch._dynamo: seconds for one prediction.
torch.library.define("dab::pack_signs", "(Tensor x) -> Tensor")
torch.library.impl("dab::pack_signs", "CompositeExplicitAutograd", pack_signs_reference)
torch.library.impl("dab::pack_signs", "CPU", _pack_signs_cpu)
torch.library.impl("dab::pack_signs", "CUDA", _pack_signs_cuda)
torch.library.register_fake("dab::pack_signs", _empty_bits)
torch.library.define("dab::pack_reached", "(Tensor x, Tensor threshold, Tensor falls) -> Tensor")
torch.library.impl("dab::pack_reached", "CompositeExplicitAutograd", pack_reached_reference)
torch.library.impl("dab::pack_reached", "CPU", _pack_reached_cpu)
torch.library.impl("dab::pack_reached", "CUDA", _pack_reached_cuda)
torch.library.register_fake("dab::pack_reached", _empty_reached)
