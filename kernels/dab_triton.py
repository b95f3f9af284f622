"""Triton version of `kernels.dab`: branch and bound over the splits of each filter, without a sort.

With the weights of a filter in descending order, m their mean and D(k) the sum of the first k less k m, the exact
optimum is arg max of D(k)**2 / (k (n - k)) (`kernels.dab`). D is concave. So between two known splits k1 < k2, where
v is the largest weight below the first and u the smallest above the second,

    D(k) <= D(k1) + (k - k1) (v - m)    and    D(k) <= D(k2) + (k2 - k) (m - u).

(c + d k)**2 / (k (n - k)) has at most a minimum inside, so under the two lines the gain is largest at k1, at k2 or
where they meet. A range whose bound at that point lies below the best split found holds no better one; any other is
halved at its own mean. Every split costs one pass over the filter, which lies in the cache: about 8 of them for 64
Gaussian weights, 18 for 4608, 41 for heavy tails (Student, 2 degrees of freedom), where sorting 4608 weights takes 91
rounds of comparisons. No size is refused and none needs another algorithm.

Exactness: sums, the bound and the decision are float64, and an allowance for rounding keeps the bound above every split
whose gain could compare equal. So thresholds and masks are those of the other versions, and scalars equal theirs to the
rounding of float64 sums taken in another order; where these are exact (weights on a grid), every bit agrees. Splits
whose gains differ by less than that rounding are equally good, and either may win. Nothing depends on timing: equal
inputs give equal bits.
"""

# Triton compiles its kernels itself; their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import functools
import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Weights that a lane loads at once: 16 bytes of float32.
LANE_WEIGHTS = 4
# Ends of ranges kept for later.
NUM_SLOTS = tl.constexpr(32)


def num_warps_for(size: int) -> int:
    """Returns how many warps share a filter of `size` weights."""
    return 1 if size <= 1280 else 2 if size <= 2560 else 4 if size <= 32768 else 8


def launch(weight: Tensor, threshold: Tensor, alpha: Tensor, beta: Tensor, *, num_warps: int | None = None) -> None:
    """Writes each filter's optimum.

    Args:
        weight: (F, n) contiguous, float32 or float64.
        threshold: (F,), overwritten: the smallest weight of the upper group.
        alpha: (F,), overwritten; alpha or beta is not finite where a weight of the filter is not.
        beta: (F,), overwritten.
        num_warps: how many warps share a filter; by its size if None.
    """
    num_filters, size = weight.shape
    if num_filters == 0:
        return
    with on_device_of(weight):
        _threshold_kernel[(num_filters,)](weight, threshold, alpha, beta, size, **launch_options(size, num_warps))


def launch_many(weights: Sequence[Tensor], mask: Tensor, threshold: Tensor, alpha: Tensor, beta: Tensor) -> None:
    """Writes the optimum of every filter of several weights, in one launch for each width of program that they need.

    The weights' addresses travel in an asynchronous copy, kept for later calls, so nothing waits for the device.

    Args:
        weights: (F_i, n_i) each, contiguous, all float32 or all float64, on one device.
        mask: (sum of F_i n_i,) bool, overwritten: the weights at or above their threshold, in the order of `weights`.
        threshold: (sum of F_i,), overwritten, as are alpha and beta; see `launch`.
        alpha: (sum of F_i,).
        beta: (sum of F_i,).
    """
    groups: dict[tuple[int, bool], list[tuple[int, ...]]] = {}
    first_filter = first_mask = 0
    for weight in weights:
        num_filters, size = weight.shape
        is_aligned = size % 4 == 0 and weight.data_ptr() % 16 == 0
        entry = (weight.data_ptr(), size, num_filters, first_filter, first_mask)
        groups.setdefault((num_warps_for(size), is_aligned), []).append(entry)
        first_filter += num_filters
        first_mask += num_filters * size
    with on_device_of(mask):
        for (_, is_aligned), entries in sorted(groups.items(), reverse=True):
            _launch_group(entries, is_aligned, mask, threshold, alpha, beta)


def _launch_group(
    entries: list[tuple[int, ...]], is_aligned: bool, mask: Tensor, threshold: Tensor, alpha: Tensor, beta: Tensor
) -> None:
    # The longest filters start first, so that none is left over at the end.
    by_size = sorted(entries, key=lambda entry: -entry[1])
    ends = list(itertools.accumulate(entry[2] for entry in by_size))
    if ends[-1] == 0:
        return
    lines = tuple((*entry, end) for entry, end in zip(by_size, ends, strict=True))
    _many_kernel[(ends[-1],)](
        _table(lines, mask.device)[0],
        len(by_size),
        mask,
        threshold,
        alpha,
        beta,
        IS_ALIGNED=is_aligned,
        MAX_WEIGHTS=triton.next_power_of_2(len(by_size)),
        **launch_options(by_size[0][1]),
    )


@functools.lru_cache(maxsize=256)
def _table(lines: tuple[tuple[int, ...], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the lines as int64 on the device, and what they were copied from.

    Both are kept: a later call copies nothing, and a CUDA graph that holds the copy finds its source where it was.
    """
    source = torch.tensor(lines, pin_memory=device.type == "cuda")
    return source.to(device, non_blocking=True), source


def launch_options(size: int, num_warps: int | None = None) -> dict[str, Any]:
    """Returns what every kernel that calls `search` is launched with, for filters of `size` weights."""
    num_warps = num_warps or num_warps_for(size)
    # Products that round on their own make the gains those of the other versions.
    return {"BLOCK": LANE_WEIGHTS * 32 * num_warps, "num_warps": num_warps, "enable_fp_fusion": False}


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Returns a context in which Triton launches on the tensor's device; the interpreter needs none."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def _threshold_kernel(
    weight_ptr,
    threshold_ptr,
    alpha_ptr,
    beta_ptr,
    size,
    BLOCK: tl.constexpr,  # noqa: N803  (constants of a Triton kernel are upper case)
):
    row = tl.program_id(0)
    threshold, alpha, beta = search(weight_ptr + row.to(tl.int64) * size, size, BLOCK)
    tl.store(threshold_ptr + row, threshold)
    tl.store(alpha_ptr + row, alpha)
    tl.store(beta_ptr + row, beta)


@triton.jit
def _many_kernel(
    table_ptr,
    num_weights,
    mask_ptr,
    threshold_ptr,
    alpha_ptr,
    beta_ptr,
    IS_ALIGNED: tl.constexpr,  # noqa: N803
    MAX_WEIGHTS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    # A line of the table: address, size, number of filters, first filter, first of the mask, end of its programs.
    line = tl.arange(0, MAX_WEIGHTS)
    ends = tl.load(table_ptr + line * 6 + 5, mask=line < num_weights, other=2**62)
    program = tl.program_id(0)
    entry_ptr = table_ptr + tl.sum((ends <= program).to(tl.int32), 0) * 6
    size = tl.load(entry_ptr + 1).to(tl.int32)
    row = program - (tl.load(entry_ptr + 5) - tl.load(entry_ptr + 2))
    if IS_ALIGNED:
        # The compiler takes the multiple of four from this product, and loads four weights at once.
        size = size // 4 * 4
    row_ptr = tl.load(entry_ptr).to(tl.pointer_type(threshold_ptr.dtype.element_ty), bitcast=True) + row * size
    if IS_ALIGNED:
        row_ptr = tl.multiple_of(row_ptr, 16)
    threshold, alpha, beta = search(row_ptr, size, BLOCK)
    out = tl.load(entry_ptr + 3) + row
    tl.store(threshold_ptr + out, threshold)
    tl.store(alpha_ptr + out, alpha)
    tl.store(beta_ptr + out, beta)
    out_ptr = mask_ptr + tl.load(entry_ptr + 4) + row * size
    offset = tl.arange(0, BLOCK)
    for start in range(0, size, BLOCK):
        is_weight = start + offset < size
        weight = tl.load(row_ptr + start + offset, mask=is_weight, other=0.0)
        tl.store(out_ptr + start + offset, weight >= threshold, mask=is_weight)


@triton.jit
def search(row_ptr: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:  # noqa: N803
    """Threshold, alpha and beta of one filter of `size` weights at `row_ptr`; scalars, in the weights' type."""
    total, low, high = weight_total(row_ptr, size, BLOCK)
    num = tl.cast(size, tl.float64)
    ones, upper, threshold = num, total, low
    # Of a filter with a weight that is not finite, no split is looked for.
    if total - total == 0.0:
        largest = tl.maximum(tl.abs(low), tl.abs(high)).to(tl.float64)
        # Of sums of up to `size` weights, each lane adding size / BLOCK of them in turn: 2^-52 for each addition.
        rounding = num * largest * tl.cast(tl.cdiv(size, BLOCK) + 16, tl.float64) * 2.220446049250313e-16
        ones, upper, threshold = _best_split(row_ptr, size, total, low, high, rounding, BLOCK)
    alpha = upper / ones
    beta = tl.where(ones < num, (total - upper) / tl.maximum(num - ones, 1.0), alpha)
    return threshold, alpha.to(low.dtype), beta.to(low.dtype)


@triton.jit
def _best_split(row_ptr, size, total, low, high, rounding, BLOCK: tl.constexpr):  # noqa: N803
    """Size, sum and least weight of the best upper group; of all weights, where they are equal."""
    num = tl.cast(size, tl.float64)
    mean = total / num
    best_gain = tl.full((), -1.0, tl.float64)
    best_ones, best_upper, best_low = num, total, low
    # The range: splits with more than ones1 and fewer than ones2 ones, whose edges lie between low2 and high1.
    ones1, upper1, high1 = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64), high
    ones2, upper2, low2, high2 = num, total, low, high
    # A stack of the ends of ranges left for later, each the next one's start.
    slot = tl.arange(0, NUM_SLOTS)
    slot_ones, slot_upper = tl.zeros((NUM_SLOTS,), tl.float64), tl.zeros((NUM_SLOTS,), tl.float64)
    slot_low, slot_high = tl.zeros((NUM_SLOTS,), low.dtype), tl.zeros((NUM_SLOTS,), low.dtype)
    depth = tl.full((), 0, tl.int32)
    is_open = high > low
    while is_open:
        if _may_hold_better(ones1, upper1, high1, ones2, upper2, low2, num, mean, rounding, best_gain):
            # On a full stack, the last end gives way: the range that follows then reaches further.
            is_slot = slot == tl.minimum(depth, NUM_SLOTS - 1)
            slot_ones, slot_upper = tl.where(is_slot, ones2, slot_ones), tl.where(is_slot, upper2, slot_upper)
            slot_low, slot_high = tl.where(is_slot, low2, slot_low), tl.where(is_slot, high2, slot_high)
            depth = tl.minimum(depth + 1, NUM_SLOTS)
            middle = _inside(((upper2 - upper1) / (ones2 - ones1)).to(low.dtype), low2, high1)
            ones2, upper2, low2, high2 = split_at(row_ptr, size, middle, BLOCK)
            between = upper2 - ones2 * mean
            gain = between * between / (ones2 * (num - ones2))
            if (gain > best_gain) | ((gain == best_gain) & (ones2 < best_ones)):
                best_gain, best_ones, best_upper, best_low = gain, ones2, upper2, low2
        else:
            ones1, upper1, high1 = ones2, upper2, high2
            is_open = ones2 < num
            depth -= 1
            is_slot = slot == depth
            ones2, upper2 = _chosen(is_slot, slot_ones), _chosen(is_slot, slot_upper)
            low2, high2 = _chosen(is_slot, slot_low), _chosen(is_slot, slot_high)
            if depth < 0:
                depth = tl.full((), 0, tl.int32)
                ones2, upper2, low2, high2 = num, total, low, high
    return best_ones, best_upper, best_low


@triton.jit
def _chosen(is_slot, values):
    return tl.sum(tl.where(is_slot, values, 0.0), 0)


@triton.jit
def _may_hold_better(ones1, upper1, high1, ones2, upper2, low2, num, mean, rounding, best_gain):
    """Whether a split strictly inside the range could be better than `best_gain`, or as good."""
    above = high1.to(tl.float64) - mean
    below = mean - low2.to(tl.float64)
    between1 = upper1 - ones1 * mean
    between2 = upper2 - ones2 * mean
    gap = tl.where(high1 > low2, above + below, 1.0)
    meet = (between2 + ones2 * below - between1 + ones1 * above) / gap
    bound = between1 + (meet - ones1) * above + rounding
    return (high1 > low2) & (bound * bound >= best_gain * (1.0 - 1e-12) * meet * (num - meet))


@triton.jit
def _inside(guess, low, high):
    """A threshold above `low` and not above `high`: the guess where it is one, else about half way."""
    half = low * 0.5 + high * 0.5
    half = tl.where((low < half) & (half <= high), half, high)
    return tl.where((low < guess) & (guess <= high), guess, half)


@triton.jit
def split_at(row_ptr: tl.tensor, size: tl.tensor, threshold: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:  # noqa: N803
    """Number and float64 sum of the weights from `threshold` up, the least of them and the largest of the others."""
    offset = tl.arange(0, BLOCK)
    ones = tl.zeros((BLOCK,), tl.float32)
    upper = tl.zeros((BLOCK,), tl.float64)
    low = tl.full((BLOCK,), float("inf"), threshold.dtype)
    high = tl.full((BLOCK,), float("-inf"), threshold.dtype)
    for start in range(0, size, BLOCK):
        weight = tl.load(row_ptr + start + offset, mask=start + offset < size, other=float("-inf"))
        is_upper = weight >= threshold
        ones += tl.where(is_upper, 1.0, 0.0)
        upper += tl.where(is_upper, weight, 0.0).to(tl.float64)
        low = tl.where(is_upper, tl.minimum(low, weight), low)
        high = tl.where(is_upper, high, tl.maximum(high, weight))
    # Two values a lane share each exchange between the lanes.
    ones_sum, upper_sum = tl.split(tl.sum(tl.join(ones.to(tl.float64), upper), 0))
    high_max, low_max = tl.split(tl.max(tl.join(high, -low), 0))
    return ones_sum, upper_sum, -low_max, high_max


@triton.jit
def weight_total(row_ptr: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:  # noqa: N803
    """Sum of all weights in float64, not finite where one is not, the least and the largest weight."""
    offset = tl.arange(0, BLOCK)
    first = tl.load(row_ptr)
    total = tl.zeros((BLOCK,), tl.float64)
    low = tl.full((BLOCK,), float("inf"), first.dtype)
    high = tl.full((BLOCK,), float("-inf"), first.dtype)
    for start in range(0, size, BLOCK):
        is_weight = start + offset < size
        weight = tl.load(row_ptr + start + offset, mask=is_weight, other=0.0)
        total += weight.to(tl.float64)
        low = tl.minimum(low, tl.where(is_weight, weight, float("inf")))
        high = tl.maximum(high, tl.where(is_weight, weight, float("-inf")))
    high_max, low_max = tl.split(tl.max(tl.join(high, -low), 0))
    return tl.sum(total, 0), -low_max, high_max
