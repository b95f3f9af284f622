"""Numba version of `kernels.weight_only`: 7 windows by 64 filters at a time, sums in vector registers.

The bits become masks of additions in registers (`kernels.weight_only_ir`), so that the dense weight is never written.
A filter's bits are turned over where |alpha| < |beta|, which exchanges the two: then the value of smaller magnitude is
the one that the sum over all inputs is multiplied with, and rounding stays within three times that of a dense
convolution (`kernels.weight_only`).

Without AVX-512 a convolution of many windows is slower this way than torch's with dense weights; there the filters are
made dense a few megabytes at a time.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray
from torch import Tensor

from kernels.compiled import compiled
from kernels.derived import derived
from kernels.packing import WORD_BITS
from kernels.team import next_task, runtime_address, team_of, team_size, worker_address
from kernels.weight_only_ir import LANES, SCALAR_ROWS, convolve_real_tile, sum_of_16s

TILE_WINDOWS = 7
TILE_WORDS = 4
# Windows left over that are convolved one by one; more of them are filled up to 7 with the last.
_SINGLES = 2
_FLOAT_BYTES = 4
_WORD_BYTES = 2
# Tasks a thread, so that the last one is not waited for.
_TASKS_PER_THREAD = 4
# Multiply-adds from where on threads gain more than they cost to wake.
_PARALLEL_MACS = 2**23
# As a bias it adds nothing, not even to a negative zero.
_NO_BIAS = np.float32(-0.0)

_Filters = tuple[NDArray[np.uint16], NDArray[np.float32]]
# Images (N, H, W, C), a pixel of zeros, sums of inputs (groups, windows).
_Images = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
# Output height and width, kernel height and width, stride, padding, dilation (two each), groups, filters of a group.
_Numbers = tuple[int, ...]


def launch(
    x: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    steps: Sequence[int],
    groups: int,
    out: Tensor,
) -> None:
    """Writes the convolution into out.

    Args:
        x: (N, C, H, W) float32 on the CPU; read without a copy where it is channels-last.
        weight_bits: as in `kernels.weight_only.packed_weight_conv2d`, and likewise all up to `bias`.
        alpha: see there.
        beta: see there.
        bias: see there.
        steps: stride, padding and dilation, (vertical, horizontal) each.
        groups: see there.
        out: (N, H', W', F) float32, contiguous, overwritten.
    """
    if not out.numel():
        return
    channels = x.shape[1] // groups
    tensors = [tensor for tensor in (weight_bits, alpha, beta, bias) if tensor is not None]
    key = (channels, groups, bias is None)
    filters = derived("weight_only", tensors, key, lambda: _arrange(weight_bits, alpha, beta, bias, channels, groups))
    rows = x.permute(0, 2, 3, 1).contiguous().numpy()
    numbers = (*out.shape[1:3], *weight_bits.shape[1:3], *steps, groups, out.shape[3] // groups)
    flat = out.view(-1, out.shape[3]).numpy()
    num_threads = team_size()
    if num_threads == 1 or flat.size * filters[0].shape[2] < _PARALLEL_MACS:
        _convolve(rows, filters, numbers, flat)
        return
    num_tiles, num_blocks = -(-len(flat) // TILE_WINDOWS), -(-filters[0].shape[1] // TILE_WORDS)
    wanted = num_threads * _TASKS_PER_THREAD
    window_chunks = min(num_tiles, wanted)
    block_chunks = min(num_blocks, -(-wanted // (window_chunks * groups)))
    team = (runtime_address(), worker_address(_work), num_threads)
    _convolve_in_team(rows, team, filters, numbers, (window_chunks, block_chunks), flat)


def _arrange(
    weight_bits: Tensor, alpha: Tensor, beta: Tensor, bias: Tensor | None, channels: int, groups: int
) -> _Filters:
    """Returns the filters as the tiles read them.

    Returns:
        (groups, ceil(F / groups / 16), taps * channels) uint16, bit i that of filter i of the 16; and their scalars
        (groups, ceil(F / groups / 16), 4, 16) float32: scale, base, bias, one.
    """
    filters = len(weight_bits)
    num_words = -(-(filters // groups) // LANES)
    is_turned = (alpha.abs() < beta.abs()).numpy()
    words = weight_bits.detach().contiguous().numpy().view(np.uint32).reshape(filters, -1, weight_bits.shape[3])
    bits = np.zeros((groups, num_words, words.shape[1] * channels), np.uint16)
    _gather(words, is_turned, channels, bits)
    high, low = np.where(is_turned, (beta.numpy(), alpha.numpy()), (alpha.numpy(), beta.numpy()))
    table = np.zeros((SCALAR_ROWS, groups, num_words * LANES), np.float32)
    values = (high - low, low, np.full(filters, _NO_BIAS) if bias is None else bias.numpy())
    for row, value in zip(table, values, strict=False):
        row[:, : filters // groups] = value.reshape(groups, -1)
    table[3] = 1
    scalars = table.reshape(SCALAR_ROWS, groups, num_words, LANES).transpose(1, 2, 0, 3)
    return bits, np.ascontiguousarray(scalars)


@compiled
def _gather(words: NDArray[np.uint32], is_turned: NDArray[np.bool_], channels: int, bits: NDArray[np.uint16]) -> None:
    """Turns words of 32 channels of a filter into words of 16 filters at a channel."""
    filters, taps, _ = words.shape
    of_group = filters // len(bits)
    for index in range(filters):
        group, place = index // of_group, index % of_group
        line, shift = bits[group, place // LANES], np.uint32(place % LANES)
        turn = np.uint32(is_turned[index])
        for tap in range(taps):
            for channel in range(channels):
                bit = (words[index, tap, channel >> 5] >> np.uint32(channel & 31)) & np.uint32(1) ^ turn
                line[tap * channels + channel] |= np.uint16(bit << shift)


@compiled
def _address(values: NDArray[Any]) -> int:
    return np.int64(values.ctypes.data)  # type: ignore[return-value] # Numba's integers are these


@compiled
def _sum_pixels(pixels: NDArray[np.float32], first: int, channels: int, sums: NDArray[np.float64]) -> None:
    """Writes the sum over some channels of each pixel (pixels, all channels)."""
    whole = channels // LANES
    start = _address(pixels) + first * _FLOAT_BYTES
    for index in range(len(pixels)):
        total = 0.0
        if whole:
            total = sum_of_16s(start + index * pixels.shape[1] * _FLOAT_BYTES, whole)
        for channel in range(first + whole * LANES, first + channels):
            total += np.float64(pixels[index, channel])
        sums[index] = total


@compiled
def _sum_windows(
    pixels: NDArray[np.float64], numbers: _Numbers, line: NDArray[np.float64], totals: NDArray[np.float32]
) -> None:
    """Adds the sums of the pixels (H, W) of each window up; line is room for W values."""
    out_height, out_width, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w = numbers[:10]
    height, width = pixels.shape
    for out_y in range(out_height):
        line[:] = 0
        for tap in range(kernel_h):
            y = out_y * stride_h - pad_h + tap * dilation_h
            if 0 <= y < height:
                for x in range(width):
                    line[x] += pixels[y, x]
        for out_x in range(out_width):
            total = 0.0
            for tap in range(kernel_w):
                x = out_x * stride_w - pad_w + tap * dilation_w
                if 0 <= x < width:
                    total += line[x]
            totals[out_y * out_width + out_x] = np.float32(total)


@compiled
def _sum_image(task: int, images: _Images, numbers: _Numbers) -> None:
    """Writes the sum of the inputs of a group in each window of an image."""
    x, _, totals = images
    image, group = task // numbers[10], task % numbers[10]
    _, height, width, depth = x.shape
    channels = depth // numbers[10]
    pixels = np.empty((height, width), np.float64)
    _sum_pixels(x[image].reshape(height * width, depth), group * channels, channels, pixels.reshape(-1))
    windows = numbers[0] * numbers[1]
    _sum_windows(pixels, numbers, np.empty(width), totals[group, image * windows : (image + 1) * windows])


@compiled
def _lay_out(
    image: tuple[int, int, int, int, int],
    numbers: _Numbers,
    windows: tuple[int, int],
    table: NDArray[np.int64],
) -> None:
    """Writes the address of every tap of the windows from the first on; beyond the last one they repeat it."""
    out_height, out_width, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w = numbers[:10]
    base, outside, height, width, pixel_bytes = image
    first, count = windows
    for index in range(table.shape[1]):
        window = min(first + index, count - 1)
        row, out_x = window // out_width, window % out_width
        top, left = row % out_height * stride_h - pad_h, out_x * stride_w - pad_w
        for tap_h in range(kernel_h):
            y = top + tap_h * dilation_h
            is_row = 0 <= y < height
            line = base + (row // out_height * height + y) * width * pixel_bytes
            for tap_w in range(kernel_w):
                x = left + tap_w * dilation_w
                inside = line + x * pixel_bytes
                table[tap_h * kernel_w + tap_w, index] = inside if is_row and 0 <= x < width else outside


@compiled
def _four(base: int, first: int, last: int, size: int) -> tuple[int, int, int, int]:
    return (
        base + first * size,
        base + min(first + 1, last) * size,
        base + min(first + 2, last) * size,
        base + min(first + 3, last) * size,
    )


@compiled
def _seven(base: int, size: int) -> tuple[int, ...]:
    return base, base + size, base + 2 * size, base + 3 * size, base + 4 * size, base + 5 * size, base + 6 * size


@compiled
def _convolve_block(
    table: int,
    window: tuple[int, int],
    totals: NDArray[np.float32],
    words: tuple[int, ...],
    scalars: tuple[int, ...],
    target: tuple[int, int],
) -> None:
    """Convolves 7 windows, or one, with a block of filters; target is an address and the bytes of a row."""
    if len(totals) == 1:
        convolve_real_tile(table, window, words, scalars, (totals[0],), (target[0],))
        return
    sums = (totals[0], totals[1], totals[2], totals[3], totals[4], totals[5], totals[6])
    outputs = _seven(target[0], target[1])
    if words[2] == words[1]:
        convolve_real_tile(table, window, words[:2], scalars[:2], sums, outputs)
    else:
        convolve_real_tile(table, window, words, scalars, sums, outputs)


@compiled
def _convolve_tile(
    first_window: int,
    table: NDArray[np.int64],
    totals: NDArray[np.float32],
    channels: int,
    filters: tuple[int, int, int, int],
    blocks: tuple[int, int],
    scratch: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """Convolves the windows of a table with blocks of filters of a group.

    Args:
        first_window: Row of out that the first window goes to.
        table: (taps, windows) addresses.
        totals: (windows,) sums of inputs.
        channels: Channels of the group.
        filters: Address of the group's bits, of its scalars, its filters, its first column of out.
        blocks: First and end block, 64 filters each.
        scratch: (windows, 64), for tiles that reach beyond the last window or filter.
        out: (all windows, all filters).
    """
    bits, scalars, num_filters, first_column = filters
    taps, num_windows = table.shape
    present = min(num_windows, len(out) - first_window)
    last_word = -(-num_filters // LANES) - 1
    for block in range(blocks[0], blocks[1]):
        first = block * TILE_WORDS
        words = _four(bits, first, last_word, taps * channels * _WORD_BYTES)
        values = _four(scalars, first, last_word, SCALAR_ROWS * LANES * _FLOAT_BYTES)
        column, width = first_column + first * LANES, min(TILE_WORDS * LANES, num_filters - first * LANES)
        # The vectors of a tile are written whole, so they must not reach into the next row.
        is_whole = width == (TILE_WORDS if num_windows == 1 or last_word - first > 1 else 2) * LANES
        target = (_address(scratch), scratch.shape[1] * _FLOAT_BYTES)
        if is_whole and present == num_windows:
            target = (
                _address(out) + (first_window * out.shape[1] + column) * _FLOAT_BYTES,
                out.shape[1] * _FLOAT_BYTES,
            )
        _convolve_block(_address(table), (taps, channels), totals, words, values, target)
        if not is_whole or present < num_windows:
            for index in range(present):
                for offset in range(width):
                    out[first_window + index, column + offset] = scratch[index, offset]


@compiled
def _run_task(
    task: int,
    images: _Images,
    filters: _Filters,
    numbers: _Numbers,
    chunks: tuple[int, int],
    out: NDArray[np.float32],
) -> None:
    """Convolves one chunk of windows with one chunk of the filters of a group."""
    (x, zeros, sums), (bits, scalars) = images, filters
    window_chunk, block_chunk = task % chunks[0], task // chunks[0] % chunks[1]
    group, num_filters = task // chunks[0] // chunks[1], numbers[11]
    channels = x.shape[3] // numbers[10]
    num_blocks = -(-bits.shape[1] // TILE_WORDS)
    blocks = (num_blocks * block_chunk // chunks[1], num_blocks * (block_chunk + 1) // chunks[1])
    own = (_address(bits[group]), _address(scalars[group]), num_filters, group * num_filters)
    image = (
        _address(x) + group * channels * _FLOAT_BYTES,
        _address(zeros),
        x.shape[1],
        x.shape[2],
        x.shape[3] * _FLOAT_BYTES,
    )
    table = np.empty((numbers[2] * numbers[3], TILE_WINDOWS), np.int64)
    one = np.empty((numbers[2] * numbers[3], 1), np.int64)
    totals, single = np.empty(TILE_WINDOWS, np.float32), np.empty(1, np.float32)
    scratch = np.empty((TILE_WINDOWS, TILE_WORDS * LANES), np.float32)
    num_tiles = -(-len(out) // TILE_WINDOWS)
    for tile in range(num_tiles * window_chunk // chunks[0], num_tiles * (window_chunk + 1) // chunks[0]):
        first = tile * TILE_WINDOWS
        if len(out) - first > _SINGLES:
            _lay_out(image, numbers, (first, len(out)), table)
            for index in range(TILE_WINDOWS):
                totals[index] = sums[group, min(first + index, len(out) - 1)]
            _convolve_tile(first, table, totals, channels, own, blocks, scratch, out)
            continue
        for window in range(first, len(out)):
            _lay_out(image, numbers, (window, len(out)), one)
            single[0] = sums[group, window]
            _convolve_tile(window, one, single, channels, own, blocks, scratch, out)


@compiled
def _images(x: NDArray[np.float32], groups: int, windows: int) -> _Images:
    """Returns the images, a pixel of zeros, and room for the sum of inputs of each group in each window."""
    return x, np.zeros(x.shape[3], np.float32), np.empty((groups, windows), np.float32)


@compiled
def _convolve(x: NDArray[np.float32], filters: _Filters, numbers: _Numbers, out: NDArray[np.float32]) -> None:
    groups = numbers[10]
    images = _images(x, groups, len(out))
    for task in range(len(x) * groups):
        _sum_image(task, images, numbers)
    for task in range(groups):
        _run_task(task, images, filters, numbers, (1, 1), out)


def _array(dtype: Any, num_dims: int) -> Any:
    return types.Array(dtype, num_dims, "C")


def _team_arguments() -> list[Any]:
    """Returns the Numba types of what a thread of a team works on, in the order of `_work`."""
    of: Any = types.Tuple
    images = of([_array(types.float32, 4), _array(types.float32, 1), _array(types.float32, 2)])
    filters = of([_array(types.uint16, 3), _array(types.float32, 4)])
    numbers, chunks = of([types.int64] * 12), of([types.int64] * 2)
    return [_array(types.int64, 1), images, filters, numbers, chunks, _array(types.float32, 2)]


_run_team, _arguments = team_of(_team_arguments())


def _work(data: Any) -> None:
    """Sums images, or with chunks convolves them, as long as there are any left."""
    counter, images, filters, numbers, chunks, out = _arguments(data)
    num_tasks = numbers[10] * (chunks[0] * chunks[1] if chunks[0] else len(images[0]))
    while True:
        task = next_task(_address(counter))
        if task >= num_tasks:
            return
        if chunks[0]:
            _run_task(task, images, filters, numbers, chunks, out)
        else:
            _sum_image(task, images, numbers)


@compiled
def _convolve_in_team(
    x: NDArray[np.float32],
    team: tuple[int, int, int],
    filters: _Filters,
    numbers: _Numbers,
    chunks: tuple[int, int],
    out: NDArray[np.float32],
) -> None:
    runtime, worker, num_threads = team
    images = _images(x, numbers[10], len(out))
    _run_team(runtime, worker, num_threads, (np.zeros(1, np.int64), images, filters, numbers, (0, 0), out))
    _run_team(runtime, worker, num_threads, (np.zeros(1, np.int64), images, filters, numbers, chunks, out))


def expand(weight_bits: Tensor, alpha: Tensor, beta: Tensor, channels: int, dense: Tensor) -> None:
    """Writes filters as float32.

    Args:
        weight_bits: (F, kh, kw, ceil(channels / 32)) int32 on the CPU.
        alpha: (F,) float32.
        beta: (F,) float32.
        channels: Of a filter.
        dense: (F, kh, kw, channels) float32, contiguous, overwritten.
    """
    words = weight_bits.contiguous().numpy().view(np.uint32)
    _expand(words.reshape(-1, words.shape[3]), alpha.numpy(), beta.numpy(), dense.view(-1, channels).numpy())


@compiled
def _expand(
    words: NDArray[np.uint32],
    alpha: NDArray[np.float32],
    beta: NDArray[np.float32],
    dense: NDArray[np.float32],
) -> None:
    """Writes one filter's values at one tap a row."""
    taps = len(words) // len(alpha)
    channels = dense.shape[1]
    for row in range(len(words)):
        high, low = alpha[row // taps], beta[row // taps]
        for word in range(words.shape[1]):
            bits, first = words[row, word], word * WORD_BITS
            for bit in range(min(WORD_BITS, channels - first)):
                is_high = (bits >> np.uint32(bit)) & np.uint32(1)
                dense[row, first + bit] = high if is_high else low
