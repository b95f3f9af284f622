"""Triton versions of `kernels.dab_step`: one program a filter, which it reads from the cache after the first time.

Sums are float64, so a mean is rounded once; torch's, in float32, differs in the last places.
"""

# Triton compiles its kernels itself; their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from kernels.dab_triton import launch_options, on_device_of, search


@dataclass(frozen=True)
class Window:
    """Where and how the gradient passes; see `kernels.dab_step.dab_step_backward`."""

    width: float
    is_about_threshold: bool
    has_means: bool


def launch(
    weight: Tensor, center: str, dense: Tensor, real: Tensor, threshold: Tensor, alpha: Tensor, beta: Tensor
) -> None:
    """Writes the five results of `kernels.dab_step.dab_step`.

    Args:
        weight: (F, C, ...), float32 or float64, contiguous or channels-last.
        center: "none", "filter" or "tap".
        dense: Shape, type and strides of `weight`, overwritten, as all the others.
        real: The same; untouched with "none".
        threshold: (F,).
        alpha: (F,).
        beta: (F,).
    """
    if weight.numel() == 0:
        return
    size = weight.shape[1:].numel()
    tensors = (weight, real, dense, threshold, alpha, beta)
    with on_device_of(weight):
        _step_kernel[(len(weight),)](
            *tensors, size, *_taps(weight, center), IS_CENTERED=center != "none", **launch_options(size)
        )


def launch_backward(
    grad: Tensor,
    real: Tensor,
    threshold: Tensor,
    alpha: Tensor,
    beta: Tensor,
    to_weight: Tensor,
    center: str,
    window: Window,
) -> None:
    """Writes the result of `kernels.dab_step.dab_step_backward`.

    Args:
        grad: Shape, type and strides of `real`.
        real: (F, C, ...), float32 or float64, contiguous or channels-last.
        threshold: (F,).
        alpha: (F,).
        beta: (F,).
        to_weight: Shape, type and strides of `real`, overwritten.
        center: "none", "filter" or "tap".
        window: Where and how the gradient passes.
    """
    if real.numel() == 0:
        return
    size = real.shape[1:].numel()
    tensors = (grad, real, threshold, alpha, beta, to_weight)
    with on_device_of(real):
        _backward_kernel[(len(real),)](
            *tensors,
            size,
            *_taps(real, center),
            window.width,
            IS_CENTERED=center != "none",
            IS_ABOUT_THRESHOLD=window.is_about_threshold,
            HAS_MEANS=window.has_means,
            **launch_options(size),
        )


def _taps(weight: Tensor, center: str) -> tuple[int, int, int, int]:
    """Return over how many weights a mean goes, how many means there are, and the steps in memory along both."""
    size, channels = weight.shape[1:].numel(), weight.shape[1]
    if center != "tap":
        return size, 1, 1, 1
    if weight.is_contiguous():
        return channels, size // channels, size // channels, 1
    return channels, size // channels, 1, channels


@triton.jit
def _step_kernel(
    weight_ptr,
    real_ptr,
    dense_ptr,
    threshold_ptr,
    alpha_ptr,
    beta_ptr,
    size,
    channels,
    taps,
    channel_step,
    tap_step,
    IS_CENTERED: tl.constexpr,  # noqa: N803  (constants of a Triton kernel are upper case)
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0)
    first = row.to(tl.int64) * size
    row_ptr = weight_ptr + first
    lane = tl.arange(0, BLOCK)
    if IS_CENTERED:
        for tap in range(taps):
            total = tl.zeros((BLOCK,), tl.float64)
            for start in range(0, channels, BLOCK):
                offset = (start + lane) * channel_step + tap * tap_step
                total += tl.load(row_ptr + offset, mask=start + lane < channels, other=0.0)
            mean = (tl.sum(total, 0) / channels).to(real_ptr.dtype.element_ty)
            for start in range(0, channels, BLOCK):
                offset = (start + lane) * channel_step + tap * tap_step
                weight = tl.load(row_ptr + offset, mask=start + lane < channels)
                tl.store(real_ptr + first + offset, weight - mean, mask=start + lane < channels)
        # Other threads of the program read what these have written.
        tl.debug_barrier()
        row_ptr = real_ptr + first
    threshold, alpha, beta = search(row_ptr, size, BLOCK)
    for start in range(0, size, BLOCK):
        real = tl.load(row_ptr + start + lane, mask=start + lane < size)
        dense = tl.where(real >= threshold, alpha, beta)
        tl.store(dense_ptr + first + start + lane, dense, mask=start + lane < size)
    tl.store(threshold_ptr + row, threshold)
    tl.store(alpha_ptr + row, alpha)
    tl.store(beta_ptr + row, beta)


@triton.jit
def _backward_kernel(
    grad_ptr,
    real_ptr,
    threshold_ptr,
    alpha_ptr,
    beta_ptr,
    out_ptr,
    size,
    channels,
    taps,
    channel_step,
    tap_step,
    width,
    IS_CENTERED: tl.constexpr,  # noqa: N803
    IS_ABOUT_THRESHOLD: tl.constexpr,  # noqa: N803
    HAS_MEANS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0)
    first = row.to(tl.int64) * size
    grad_ptr, real_ptr, out_ptr = grad_ptr + first, real_ptr + first, out_ptr + first
    threshold, middle = tl.load(threshold_ptr + row), 0.0
    if IS_ABOUT_THRESHOLD:
        middle = (tl.load(alpha_ptr + row) + tl.load(beta_ptr + row)) / 2.0
    upper, lower = 0.0, 0.0
    if HAS_MEANS:
        upper, lower = _group_means(grad_ptr, real_ptr, threshold, size, BLOCK)
    lane = tl.arange(0, BLOCK)
    # Without centring there is one tap, of all weights.
    for tap in range(taps):
        mean = 0.0
        if IS_CENTERED:
            total = tl.zeros((BLOCK,), tl.float64)
            for start in range(0, channels, BLOCK):
                offset = (start + lane) * channel_step + tap * tap_step
                is_weight = start + lane < channels
                total += _passed(
                    grad_ptr, real_ptr, offset, is_weight, threshold, middle, width, upper, lower, HAS_MEANS
                )
            mean = (tl.sum(total, 0) / channels).to(out_ptr.dtype.element_ty)
        for start in range(0, channels, BLOCK):
            offset = (start + lane) * channel_step + tap * tap_step
            is_weight = start + lane < channels
            passed = _passed(grad_ptr, real_ptr, offset, is_weight, threshold, middle, width, upper, lower, HAS_MEANS)
            tl.store(out_ptr + offset, passed - mean, mask=is_weight)


@triton.jit
def _passed(
    grad_ptr,
    real_ptr,
    offset,
    is_weight,
    threshold,
    middle,
    width,
    upper,
    lower,
    HAS_MEANS: tl.constexpr,  # noqa: N803
):
    """The gradient by the centred weights at these places, 0 beyond the last."""
    grad = tl.load(grad_ptr + offset, mask=is_weight, other=0.0)
    real = tl.load(real_ptr + offset, mask=is_weight, other=0.0)
    passed = tl.where(tl.abs(real - middle) <= width, grad, 0.0)
    if HAS_MEANS:
        passed += tl.where(real >= threshold, upper, lower)
    return tl.where(is_weight, passed, 0.0)


@triton.jit
def _group_means(grad_ptr, real_ptr, threshold, size, BLOCK: tl.constexpr):  # noqa: N803
    """Means of the gradient over the weights at or above the threshold, and over the others; 0 where there are none."""
    lane = tl.arange(0, BLOCK)
    ones = tl.zeros((BLOCK,), tl.int32)
    upper = tl.zeros((BLOCK,), tl.float64)
    lower = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        is_weight = start + lane < size
        grad = tl.load(grad_ptr + start + lane, mask=is_weight, other=0.0)
        is_upper = tl.load(real_ptr + start + lane, mask=is_weight, other=float("-inf")) >= threshold
        ones += is_upper.to(tl.int32)
        upper += tl.where(is_upper, grad, 0.0)
        lower += tl.where(is_upper, 0.0, grad)
    num = tl.sum(ones, 0)
    upper_mean = tl.sum(upper, 0) / tl.maximum(num, 1)
    lower_mean = tl.sum(lower, 0) / tl.maximum(size - num, 1)
    return upper_mean.to(threshold.dtype), lower_mean.to(threshold.dtype)
