"""Convolution of real inputs with two-valued filters held as bits: one bit a weight in memory, too.

For inputs x and a filter alpha * e + beta * (1 - e) with e in {0, 1},

    conv(x, alpha * e + beta * (1 - e)) = (alpha - beta) * conv(x, e) + beta * conv(x, 1),

where conv(x, e) is a sum without products and conv(x, 1) is the same for all filters. Padded taps add nothing.

Rounding: with n taps of a filter, u = 2**-24, g(n) = n u / (1 - n u), and M = conv(|x|, |weight|) + |bias| of an
output, every version lies within 3 g(n + 5) M of the exact value, a dense convolution within g(n + 1) M. For let h be
the one of alpha and beta of larger magnitude, l the other, and S_h, S_l the sums of |x| at their taps. Every version
computes (h - l) * conv(x, e_h) + l * conv(x, 1); the first errs by at most g(n + 4) |h - l| S_h <= 2 g(n + 4) |h| S_h,
the second, whose sum is taken in float64 or in an order of its own, by g(n + 4) |l| (S_h + S_l) <= g(n + 4) M. The sum
over magnitudes, not the order of addition, makes the bound. The versions for GPUs add up inside tensor cores, whose
sums round coarser than float32's: there u = 2**-22. Outputs of a narrower type are rounded once, at the end.

Where an input is infinite the result may be NaN, also where a dense convolution gives infinity.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.cpu_path import cpu_path
from kernels.packing import has_numba, is_plain_cpu, num_words, unpack_signs

# Filters of a group from where on it pays that a vector holds 16 of them.
_MIN_FILTERS = 8
# Windows up to which sums in registers are the fastest on every processor: a dense weight is read for little work.
_FEW_WINDOWS = 2
# Weights that are made dense at a time where sums in registers are slower.
_DENSE_WEIGHTS = 2**20


def packed_weight_conv2d(
    x: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolves real inputs with packed two-valued filters; equals conv2d(x, alpha * e + beta * (1 - e)) + bias.

    No gradient. CUDA tensors go to Triton, CPU tensors to Numba, all others, and float64, to the reference, which
    makes the weight dense.

    Args:
        x: (N, C, H, W), or (N, C) for a linear layer, a floating type.
        weight_bits: (F, kh, kw, ceil(C / groups / 32)) int32, bit 1 where the filter's value is alpha, packed as by
            `pack_signs`. Bits beyond the last channel are ignored. For a linear layer kh = kw = 1.
        alpha: (F,) float32.
        beta: (F,) float32.
        bias: (F,) float32, or None.
        stride: step of the window, one number or (vertical, horizontal).
        padding: rows and columns of zeros at each side, one number or (vertical, horizontal).
        dilation: distance of the taps, one number or (vertical, horizontal).
        groups: as in `torch.nn.functional.conv2d`.

    Returns:
        (N, F, H', W'), or (N, F), in the type of x, within the bound of this module.

    Raises:
        TypeError: a tensor has another type than stated above.
        ValueError: shapes, devices, stride, padding, dilation or groups do not fit together.
    """
    _check_tensors(x, weight_bits, alpha, beta, bias)
    images = x.detach()[..., None, None] if x.dim() == 2 else x.detach()
    steps = (_pair(stride), _pair(padding), _pair(dilation))
    _check_geometry(images, weight_bits, steps, groups)
    scalars = (_constant(alpha), _constant(beta), None if bias is None else _constant(bias))
    if is_plain_cpu(x):
        out = _cpu(images, weight_bits, *scalars, *steps, groups)
    else:
        out = torch.ops.dab.packed_weight_conv2d(images, weight_bits, *scalars, *steps, groups)
    return out.flatten(1) if x.dim() == 2 else out


def packed_weight_conv2d_reference(
    x: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Plain-torch `packed_weight_conv2d` on any device, arguments as there: a dense weight, in float32 at least."""
    kind = torch.promote_types(x.dtype, torch.float32)
    mask = unpack_signs(weight_bits, x.shape[1] // groups) > 0
    dense = torch.where(mask, alpha.view(-1, 1, 1, 1), beta.view(-1, 1, 1, 1)).to(kind)
    constant = None if bias is None else bias.to(kind)
    y = F.conv2d(x.to(kind), dense, constant, tuple(stride), tuple(padding), tuple(dilation), groups)
    return y.to(x.dtype).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _empty_rows(x: Tensor, weight_bits: Tensor, steps: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    """Returns room for the output with its filters side by side, (N, H', W', F)."""
    stride, padding, dilation = steps
    sizes = [_output_size(x.shape[2 + i], weight_bits.shape[1 + i], stride[i], padding[i], dilation[i]) for i in (0, 1)]
    return x.new_empty((x.shape[0], *sizes, weight_bits.shape[0]), dtype=dtype)


def _fake(
    x: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,  # noqa: ARG001  (a fake has the operator's arguments)
    beta: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,  # noqa: ARG001
) -> Tensor:
    return _empty_rows(x, weight_bits, (stride, padding, dilation), x.dtype).permute(0, 3, 1, 2)


def _cpu(
    x: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    steps = (stride, padding, dilation)
    if x.dtype == torch.float64 or not has_numba():
        return packed_weight_conv2d_reference(x, weight_bits, alpha, beta, bias, *steps, groups)
    out = _empty_rows(x, weight_bits, steps, torch.float32)
    num_windows, num_filters = out.numel() // len(weight_bits), len(weight_bits) // groups
    if sums_in_registers(cpu_path().name, num_windows, num_filters):
        from kernels import weight_only_numba

        numbers = (*stride, *padding, *dilation)
        weight_only_numba.launch(x.float(), weight_bits, alpha, beta, bias, numbers, groups, out)
    else:
        _dense_cpu(x.float(), weight_bits, (alpha, beta, bias), steps, groups, out)
    return out.permute(0, 3, 1, 2).to(x.dtype)


def sums_in_registers(path: str, num_windows: int, num_filters: int) -> bool:
    """Returns whether bits become masks in registers, rather than dense weights for torch, a part at a time.

    Measured on one core of an AMD EPYC (Zen 5): with AVX-512 the former is 1.2 to 4 times as fast as torch's
    convolution with a weight that is dense already, with AVX2 0.8 times; for one window 7 to 100 times in both.

    Args:
        path: Name of a `kernels.cpu_path.CpuPath`.
        num_windows: Windows of all images.
        num_filters: Filters of a group.
    """
    return num_filters >= _MIN_FILTERS and (path == "avx512" or num_windows <= _FEW_WINDOWS)


def _dense_cpu(
    x: Tensor,
    weight_bits: Tensor,
    scalars: tuple[Tensor, Tensor, Tensor | None],
    steps: Sequence[Sequence[int]],
    groups: int,
    out: Tensor,
) -> None:
    """Writes the convolution into out (N, H', W', F) by dense filters, not all of them at once."""
    from kernels import weight_only_numba

    channels = x.shape[1] // groups
    filters, height, width, _ = weight_bits.shape
    # Groups convolve all their filters in one call.
    share = filters if groups > 1 else max(1, _DENSE_WEIGHTS // (height * width * channels))
    alpha, beta, bias = scalars
    stride, padding, dilation = map(tuple, steps)
    # One window, the whole image: torch's convolution takes 25 times as long as its matrix product.
    is_matrix = (height, width) == x.shape[2:] and groups == 1 and max(padding) == 0 and max(dilation) == 1
    for first in range(0, filters, share):
        part = slice(first, first + share)
        dense = x.new_empty((len(weight_bits[part]), height, width, channels))
        weight_only_numba.expand(weight_bits[part], alpha[part], beta[part], channels, dense)
        constant = None if bias is None else bias[part]
        if is_matrix:
            out[:, 0, 0, part] = F.linear(x.permute(0, 2, 3, 1).flatten(1), dense.flatten(1), constant)
            continue
        y = F.conv2d(x, dense.permute(0, 3, 1, 2), constant, stride, padding, dilation, groups)
        out[..., part] = y.permute(0, 2, 3, 1)


def _cuda(
    x: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    steps = (stride, padding, dilation)
    if x.dtype == torch.float64:
        return packed_weight_conv2d_reference(x, weight_bits, alpha, beta, bias, *steps, groups)
    from kernels import weight_only_triton

    out = _empty_rows(x, weight_bits, steps, x.dtype)
    weight_only_triton.launch(x, weight_bits, alpha, beta, bias, (*stride, *padding, *dilation), groups, out)
    return out.permute(0, 3, 1, 2)


def _output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _constant(tensor: Tensor) -> Tensor:
    """Returns the tensor without gradient: the very same object if it has none, by which `derived` knows it."""
    return tensor.detach() if tensor.requires_grad else tensor


def _check_tensors(x: Tensor, weight_bits: Tensor, alpha: Tensor, beta: Tensor, bias: Tensor | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x: {x.dtype}; real inputs are of a floating type (packed signs go to packed_conv2d)")
    if x.dim() not in (2, 4):
        raise ValueError(f"x: shape {tuple(x.shape)}; give (N, C, H, W), or (N, C) for a linear layer")
    if weight_bits.dtype != torch.int32:
        raise TypeError(f"weight_bits: {weight_bits.dtype}; packed signs are int32 (see pack_signs)")
    if weight_bits.dim() != 4:
        raise ValueError(f"weight_bits: shape {tuple(weight_bits.shape)}; packed filters have four dimensions")
    for name, scalars in (("alpha", alpha), ("beta", beta), ("bias", bias)):
        if scalars is None:
            continue
        if scalars.dtype != torch.float32:
            raise TypeError(f"{name}: {scalars.dtype}; the scalars are float32, convert them first")
        if scalars.shape != weight_bits.shape[:1]:
            raise ValueError(
                f"{name}: shape {tuple(scalars.shape)} for {weight_bits.shape[0]} filters; one value a filter"
            )
    for name, tensor in (("weight_bits", weight_bits), ("alpha", alpha), ("beta", beta), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, x on {x.device}; move them to one device")


def _check_geometry(x: Tensor, weight_bits: Tensor, steps: Sequence[tuple[int, int]], groups: int) -> None:
    filters, kernel_h, kernel_w, words = weight_bits.shape
    channels = x.shape[1]
    if groups < 1 or min(channels, filters) < groups or channels % groups or filters % groups:
        raise ValueError(f"groups: {groups} for {channels} channels and {filters} filters; it must divide both")
    if words != num_words(channels // groups):
        raise ValueError(
            f"weight_bits: {words} words a tap for x of {channels} channels in {groups} groups; "
            f"{channels // groups} channels are {num_words(channels // groups)} words"
        )
    stride, padding, dilation = steps
    if min(stride) < 1 or min(padding) < 0 or min(dilation) < 1:
        raise ValueError(
            f"stride: {stride} with padding {padding} and dilation {dilation}; a stride and a dilation are at least 1, "
            "a padding at least 0"
        )
    sizes = [_output_size(x.shape[2 + i], weight_bits.shape[1 + i], stride[i], padding[i], dilation[i]) for i in (0, 1)]
    if min(sizes) < 1 or min(kernel_h, kernel_w) < 1:
        raise ValueError(
            f"weight_bits: a {kernel_h}x{kernel_w} window of dilation {dilation} does not fit into "
            f"{x.shape[2]}x{x.shape[3]} pixels with padding {padding}"
        )


torch.library.define(
    "dab::packed_weight_conv2d",
    "(Tensor x, Tensor weight_bits, Tensor alpha, Tensor beta, Tensor? bias, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups) -> Tensor",
)
torch.library.impl("dab::packed_weight_conv2d", "CompositeExplicitAutograd", packed_weight_conv2d_reference)
torch.library.impl("dab::packed_weight_conv2d", "CPU", _cpu)
torch.library.impl("dab::packed_weight_conv2d", "CUDA", _cuda)
torch.library.register_fake("dab::packed_weight_conv2d", _fake)
