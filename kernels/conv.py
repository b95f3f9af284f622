"""Convolution of packed signs with two-valued filters.

For an input sign x in {-1, +1} and a filter alpha * e + beta * (1 - e) with e in {0, 1},

    conv(x, alpha * e + beta * (1 - e)) = (alpha - beta) * E + beta * S,   E = sum of x * e,   S = sum of x,

both sums over the taps of the window that lie inside the image (zero padding: a padded tap adds nothing). With b = (x
+ 1) / 2 and n_v valid taps, in bits: E = 2 * popc(b & e) - popc(e on valid taps) and S = 2 * popc(b) - n_v. S is the
same for all filters.

Exactness: E and S are exact integers below 2**24 in magnitude, so each is exact in float32 as well. The epilogue is
float32, rounded after every operation, in this order: `(alpha - beta) * E`, `+ beta * S`, `+ bias`. It therefore
equals, bit for bit, the same expression of `torch.conv2d` in float32 wherever that convolution adds up its integers
exactly (any direct or matrix-product algorithm; not Winograd).

Followed by a threshold for each filter, the convolution gives the packed signs of the next layer without ever writing
its values (`packed_conv2d_signs`): a scale, a shift and a ReLU between the two are monotone, so one threshold holds
all of them.

Left out: groups and dilation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.cpu_path import cpu_path
from kernels.derived import derived
from kernels.packing import has_numba, is_plain_cpu, num_words, pack_signs, unpack_signs

# Beyond this many taps a sum of signs need not be exact in float32.
MAX_TAPS = 2**24 - 1

# What values may be rounded to.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Alpha, beta and bias; for signs also the thresholds and which of them fall.
_Scalars = tuple[Tensor, Tensor, Tensor | None] | tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]


def packed_conv2d(
    bits: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None = None,
    *,
    in_channels: int,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Convolves packed signs with packed two-valued filters; equals conv2d(sign(x), alpha * e + beta * (1 - e)) + bias.

    No gradient. CUDA tensors go to Triton (`kernels.gpu_path` says which way), CPU tensors to Numba, all others to the
    reference.

    Args:
        bits: (N, H, W, ceil(C / 32)) int32 from `pack_signs`. Bits beyond the last channel are ignored.
        weight_bits: (F, kh, kw, ceil(C / 32)) int32, bit 1 where the filter's value is alpha; same packing.
        alpha: (F,) float32.
        beta: (F,) float32.
        bias: (F,) float32, or None.
        in_channels: number of input channels C.
        stride: step of the window, one number or (vertical, horizontal).
        padding: rows and columns of zeros at each side, one number or (vertical, horizontal).
        dtype: type of the result: float32, bfloat16 or float16.

    Returns:
        (N, F, H', W') of that type, exact integers with the rounded epilogue of this module, rounded once more to the
        type; channels-last in memory on the CPU and on GPUs.

    Raises:
        TypeError: a tensor has another type than stated above, or dtype is another one.
        ValueError: shapes, devices, stride or padding do not fit together, or the window has more than 2**24 - 1 taps.
    """
    steps, borders = _pair(stride), _pair(padding)
    scalars = (_constant(alpha), _constant(beta), None if bias is None else _constant(bias))
    _check(bits, weight_bits, scalars, in_channels, steps, borders)
    if dtype not in DTYPES:
        raise TypeError(f"dtype: {dtype}; values come as one of {', '.join(map(str, DTYPES))}")
    if is_plain_cpu(bits):
        return _packed_conv2d_cpu(bits, weight_bits, *scalars, in_channels, steps, borders, dtype)
    out: Tensor = torch.ops.dab.packed_conv2d(bits, weight_bits, *scalars, in_channels, steps, borders, dtype)
    return out


def packed_conv2d_signs(
    bits: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    falls: Tensor,
    *,
    in_channels: int,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 1,
) -> Tensor:
    """Convolves as `packed_conv2d` and keeps one bit of each value y of filter f: (y >= threshold[f]) xor falls[f].

    Args:
        bits: as in `packed_conv2d`, and likewise all up to `bias`.
        weight_bits: see there.
        alpha: see there.
        beta: see there.
        bias: see there.
        threshold: (F,) float32; -inf for always, inf for never.
        falls: (F,) bool.
        in_channels: see `packed_conv2d`.
        stride: see there.
        padding: see there.

    Returns:
        (N, H', W', ceil(F / 32)) int32, packed as by `pack_signs`; bits beyond the last filter are 0.

    Raises:
        TypeError: a tensor has another type than stated.
        ValueError: as `packed_conv2d`, or threshold or falls have not one value a filter.
    """
    steps, borders = _pair(stride), _pair(padding)
    values = (_constant(alpha), _constant(beta), None if bias is None else _constant(bias))
    scalars = (*values, _constant(threshold), falls)
    _check(bits, weight_bits, scalars, in_channels, steps, borders)
    if is_plain_cpu(bits):
        return _packed_conv2d_signs_cpu(bits, weight_bits, *scalars, in_channels, steps, borders)
    out: Tensor = torch.ops.dab.packed_conv2d_signs(bits, weight_bits, *scalars, in_channels, steps, borders)
    return out


def packed_conv2d_signs_reference(
    bits: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    falls: Tensor,
    in_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """`packed_conv2d_signs` by way of the values, on any device that has `packed_conv2d`; arguments as there."""
    y = torch.ops.dab.packed_conv2d(bits, weight_bits, alpha, beta, bias, in_channels, stride, padding)
    is_upper = (y >= threshold.view(-1, 1, 1)) ^ falls.view(-1, 1, 1)
    return pack_signs(torch.where(is_upper, 1.0, -1.0))


def packed_conv2d_reference(
    bits: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    in_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Plain-torch `packed_conv2d` on any device, arguments as there; sums in float64, where no algorithm rounds."""
    signs = unpack_signs(bits, in_channels).double()
    mask = (unpack_signs(weight_bits, in_channels) > 0).double()
    selected = F.conv2d(signs, mask, stride=tuple(stride), padding=tuple(padding)).float()
    total = F.conv2d(signs, torch.ones_like(mask[:1]), stride=tuple(stride), padding=tuple(padding)).float()
    out = (alpha - beta).view(1, -1, 1, 1) * selected + beta.view(1, -1, 1, 1) * total
    return (out if bias is None else out + bias.view(1, -1, 1, 1)).to(dtype or torch.float32)


def _empty_rows(bits: Tensor, weight_bits: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Returns room for the output with its filters side by side, (N, H', W', F)."""
    height = output_size(bits.shape[1], weight_bits.shape[1], stride[0], padding[0])
    width = output_size(bits.shape[2], weight_bits.shape[2], stride[1], padding[1])
    return bits.new_empty((bits.shape[0], height, width, weight_bits.shape[0]), dtype=torch.float32)


def _empty_output(bits: Tensor, weight_bits: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    out = _empty_rows(bits, weight_bits, stride, padding).permute(0, 3, 1, 2)
    if bits.device.type in ("cpu", "cuda"):
        return out
    return torch.empty_like(out, memory_format=torch.contiguous_format)


def _packed_conv2d_fake(
    bits: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,  # noqa: ARG001  (a fake has the operator's arguments)
    beta: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    in_channels: int,  # noqa: ARG001
    stride: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Tensor:
    return _empty_output(bits, weight_bits, stride, padding).to(dtype or torch.float32)


def _packed_conv2d_cpu(
    bits: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    in_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Tensor:
    if not has_numba():
        cpu_path()  # says so, once
        out = _empty_output(bits, weight_bits, stride, padding)
        out.copy_(packed_conv2d_reference(bits, weight_bits, alpha, beta, bias, in_channels, stride, padding))
        return out.to(dtype or torch.float32)
    from kernels import conv_numba

    rows = _empty_rows(bits, weight_bits, stride, padding)
    conv_numba.launch_rows(bits, weight_bits, alpha, beta, bias, in_channels, stride, padding, rows)
    return rows.permute(0, 3, 1, 2).to(dtype or torch.float32)


def _packed_conv2d_cuda(
    bits: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    in_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Tensor:
    from kernels.conv_cuda import convolve
    from kernels.conv_layer import Filters

    filters = Filters(weight_bits, alpha, beta, bias)
    return convolve(bits, filters, in_channels, stride, padding, dtype or torch.float32)


def _packed_conv2d_signs_cuda(
    bits: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    falls: Tensor,
    in_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    from kernels.conv_cuda import convolve
    from kernels.conv_layer import Filters

    filters = Filters(weight_bits, alpha, beta, bias, threshold, falls)
    return convolve(bits, filters, in_channels, stride, padding, torch.float32)


def _empty_signs(bits: Tensor, weight_bits: Tensor, stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    height = output_size(bits.shape[1], weight_bits.shape[1], stride[0], padding[0])
    width = output_size(bits.shape[2], weight_bits.shape[2], stride[1], padding[1])
    return bits.new_empty((bits.shape[0], height, width, num_words(weight_bits.shape[0])))


def _packed_conv2d_signs_fake(
    bits: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,  # noqa: ARG001  (a fake has the operator's arguments)
    beta: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    threshold: Tensor,  # noqa: ARG001
    falls: Tensor,  # noqa: ARG001
    in_channels: int,  # noqa: ARG001
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    return _empty_signs(bits, weight_bits, stride, padding)


def _packed_conv2d_signs_cpu(
    bits: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    falls: Tensor,
    in_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    scalars = (alpha, beta, bias, threshold, falls)
    if not has_numba():
        cpu_path()  # says so, once
        return packed_conv2d_signs_reference(bits, weight_bits, *scalars, in_channels, stride, padding)
    from kernels import conv_numba

    out = _empty_signs(bits, weight_bits, stride, padding)
    conv_numba.launch_signs(bits, weight_bits, *scalars, in_channels, stride, padding, out)
    return out


def output_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Returns how many windows of `kernel` taps fit along a side of `size` pixels."""
    return (size + 2 * padding - kernel) // stride + 1


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    vertical, horizontal = value
    return vertical, horizontal


def _constant(tensor: Tensor) -> Tensor:
    """Returns the tensor without gradient: the very same object if it has none, by which `derived` knows it."""
    return tensor.detach() if tensor.requires_grad else tensor


def _check(
    bits: Tensor,
    weight_bits: Tensor,
    scalars: _Scalars,
    in_channels: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> None:
    """Checks what does not fit together: once for filters and inputs of a shape, since it takes as long as a layer."""
    tensors = [tensor for tensor in (weight_bits, *scalars) if tensor is not None]
    key = (bits.dtype, bits.device, bits.shape, in_channels, stride, padding, scalars[2] is None)

    def check() -> None:
        alpha, beta, bias, *signs = scalars
        _check_tensors(bits, weight_bits, alpha, beta, bias)
        _check_geometry(bits, weight_bits, in_channels, stride, padding)
        if signs:
            _check_threshold(weight_bits, signs[0], signs[1])

    if torch.compiler.is_compiling():  # sizes may be symbols, which are no keys
        check()
    else:
        derived("conv_checked", tensors, key, check)


def _check_tensors(bits: Tensor, weight_bits: Tensor, alpha: Tensor, beta: Tensor, bias: Tensor | None) -> None:
    for name, words in (("bits", bits), ("weight_bits", weight_bits)):
        if words.dtype != torch.int32:
            raise TypeError(f"{name}: {words.dtype}; packed signs are int32 (see pack_signs)")
        if words.dim() != 4:
            raise ValueError(f"{name}: shape {tuple(words.shape)}; packed signs have four dimensions (see pack_signs)")
    for name, scalars in (("alpha", alpha), ("beta", beta), ("bias", bias)):
        if scalars is None:
            continue
        if scalars.dtype != torch.float32:
            raise TypeError(f"{name}: {scalars.dtype}; the epilogue is float32, convert it first")
        if scalars.shape != weight_bits.shape[:1]:
            raise ValueError(
                f"{name}: shape {tuple(scalars.shape)} for {weight_bits.shape[0]} filters; one value a filter"
            )
        if scalars.device != bits.device:
            raise ValueError(f"{name}: on {scalars.device}, bits on {bits.device}; move them to one device")
    if weight_bits.device != bits.device:
        raise ValueError(f"weight_bits: on {weight_bits.device}, bits on {bits.device}; move them to one device")


def _check_threshold(weight_bits: Tensor, threshold: Tensor, falls: Tensor) -> None:
    for name, tensor, dtype in (("threshold", threshold, torch.float32), ("falls", falls, torch.bool)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: {tensor.dtype}; must be {dtype}")
        if tensor.shape != weight_bits.shape[:1]:
            raise ValueError(
                f"{name}: shape {tuple(tensor.shape)} for {weight_bits.shape[0]} filters; one value a filter"
            )
        if tensor.device != weight_bits.device:
            raise ValueError(
                f"{name}: on {tensor.device}, weight_bits on {weight_bits.device}; move them to one device"
            )


def _check_geometry(
    bits: Tensor, weight_bits: Tensor, in_channels: int, stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    words = num_words(in_channels)
    if in_channels < 1 or bits.shape[3] != words or weight_bits.shape[3] != words:
        raise ValueError(
            f"in_channels: {in_channels} channels are {words} words a pixel; "
            f"bits have {bits.shape[3]}, weight_bits {weight_bits.shape[3]}"
        )
    if min(stride) < 1 or min(padding) < 0:
        raise ValueError(f"stride: {stride} with padding {padding}; a stride is at least 1 and a padding at least 0")
    _, kernel_h, kernel_w, _ = weight_bits.shape
    if in_channels * kernel_h * kernel_w > MAX_TAPS:
        raise ValueError(
            f"weight_bits: {in_channels * kernel_h * kernel_w} taps; above {MAX_TAPS} float32 sums are not exact"
        )
    sizes = [output_size(bits.shape[1 + i], weight_bits.shape[1 + i], stride[i], padding[i]) for i in (0, 1)]
    if min(sizes) < 1 or min(kernel_h, kernel_w) < 1:
        raise ValueError(
            f"weight_bits: a {kernel_h}x{kernel_w} window does not fit into "
            f"{bits.shape[1]}x{bits.shape[2]} pixels with padding {padding}"
        )


torch.library.define(
    "dab::packed_conv2d",
    "(Tensor bits, Tensor weight_bits, Tensor alpha, Tensor beta, Tensor? bias, int in_channels, int[2] stride, "
    "int[2] padding, ScalarType? dtype=None) -> Tensor",
)
torch.library.impl("dab::packed_conv2d", "CompositeExplicitAutograd", packed_conv2d_reference)
torch.library.impl("dab::packed_conv2d", "CPU", _packed_conv2d_cpu)
torch.library.impl("dab::packed_conv2d", "CUDA", _packed_conv2d_cuda)
torch.library.register_fake("dab::packed_conv2d", _packed_conv2d_fake)

torch.library.define(
    "dab::packed_conv2d_signs",
    "(Tensor bits, Tensor weight_bits, Tensor alpha, Tensor beta, Tensor? bias, Tensor threshold, Tensor falls, "
    "int in_channels, int[2] stride, int[2] padding) -> Tensor",
)
torch.library.impl("dab::packed_conv2d_signs", "CompositeExplicitAutograd", packed_conv2d_signs_reference)
torch.library.impl("dab::packed_conv2d_signs", "CPU", _packed_conv2d_signs_cpu)
torch.library.impl("dab::packed_conv2d_signs", "CUDA", _packed_conv2d_signs_cuda)
torch.library.register_fake("dab::packed_conv2d_signs", _packed_conv2d_signs_fake)
