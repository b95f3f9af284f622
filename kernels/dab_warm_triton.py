"""Triton version of `kernels.dab_warm.dab_threshold_warm`: one program a filter, which stays in the cache."""

# Triton compiles its kernels itself; their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from kernels.dab_triton import launch_options, on_device_of, split_at, weight_total
from kernels.dab_warm import NUM_PASSES


def launch(weight: Tensor, start: Tensor, threshold: Tensor, alpha: Tensor, beta: Tensor) -> None:
    """Writes each filter's split.

    Args:
        weight: (F, n) contiguous, float32 or float64.
        start: (F,) thresholds, same type, contiguous.
        threshold: (F,), overwritten, as are alpha and beta.
        alpha: (F,), mean of the upper group.
        beta: (F,), mean of the lower group.
    """
    num_filters, size = weight.shape
    if num_filters == 0:
        return
    with on_device_of(weight):
        _warm_kernel[(num_filters,)](
            weight, start, threshold, alpha, beta, size, NUM_PASSES=NUM_PASSES, **launch_options(size)
        )


@triton.jit
def _warm_kernel(
    weight_ptr,
    start_ptr,
    threshold_ptr,
    alpha_ptr,
    beta_ptr,
    size,
    NUM_PASSES: tl.constexpr,  # noqa: N803  (constants of a Triton kernel are upper case)
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0)
    row_ptr = weight_ptr + row.to(tl.int64) * size
    total, _, _ = weight_total(row_ptr, size, BLOCK)
    num = tl.cast(size, tl.float64)
    mean = total / num
    middle = tl.load(start_ptr + row)
    threshold, alpha, beta = middle, mean, mean
    for _ in range(NUM_PASSES):
        ones, upper, _, _ = split_at(row_ptr, size, middle, BLOCK)
        if (ones == 0.0) | (ones == num):
            middle = mean.to(middle.dtype)
            ones, upper, _, _ = split_at(row_ptr, size, middle, BLOCK)
        is_split = (ones > 0.0) & (ones < num)
        threshold = tl.where(is_split, middle, float("-inf"))
        alpha = tl.where(is_split, upper / tl.maximum(ones, 1.0), mean)
        beta = tl.where(is_split, (total - upper) / tl.maximum(num - ones, 1.0), mean)
        middle = ((alpha + beta) / 2.0).to(middle.dtype)
    tl.store(threshold_ptr + row, threshold)
    tl.store(alpha_ptr + row, alpha.to(middle.dtype))
    tl.store(beta_ptr + row, beta.to(middle.dtype))
