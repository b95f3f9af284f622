"""Numba version of `kernels.conv`: 7 windows by 32 filters at a time, counts in vector registers (`vector_ir`).

The input is copied once into an image with a border of zero words, in which a padded tap counts nothing. What a filter
has to subtract there, its ones on the taps inside the image, is read from a table of the few kinds of border. The sum
of signs of each window, the same for all filters, is a box sum of the pixels' counts. Filters lie side by side, so
there is no sum across a vector. No fast-math: each float32 operation rounds on its own.

Measured at batch 1 on one thread of an AMD EPYC with AVX-512, see benchmarks/results/packed_conv_cpu.json. A processor
without VPOPCNTDQ runs the same code; LLVM then counts ones with byte shuffles, or with scalar instructions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types
from numpy.typing import NDArray
from torch import Tensor

from kernels.derived import derived
from kernels.packing import WORD_BITS
from kernels.team import next_task, runtime_address, team_of, team_size, worker_address
from kernels.vector_ir import TILE_FILTERS, TILE_PIXELS, convolve_tile, count_ones

_WORD_BYTES = 4
# Tasks a thread, so that the last one is not waited for.
_TASKS_PER_THREAD = 4
# Words of input and weight that meet, from where on a team is worth calling (2 cores, AMD EPYC).
_TEAM_WORDS = 2**20
# Rows of scalars for values; signs have two more.
_VALUE_ROWS = 3
# As a bias it adds nothing, not even to a negative zero.
_NO_BIAS = np.float32(-0.0)


_Scalars = tuple[Tensor, Tensor, Tensor | None] | tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]
_Filters = tuple[NDArray[np.uint32], NDArray[np.float32], NDArray[np.int32]]
_Places = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
_Numbers = tuple[int, np.uint32, int, int, int, int, int, int]


def launch(
    bits: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    in_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    out: Tensor,
) -> None:
    """Writes the convolution into out.

    Args:
        bits: as in `kernels.conv.packed_conv2d`, and likewise all up to `padding`.
        weight_bits: see there.
        alpha: see there.
        beta: see there.
        bias: see there.
        in_channels: see there.
        stride: (vertical, horizontal).
        padding: (vertical, horizontal).
        out: (N, F, H', W') float32, overwritten; written without a copy where it is channels-last.
    """
    rows = out.permute(0, 2, 3, 1)
    target = rows if rows.is_contiguous() else rows.contiguous()
    launch_rows(bits, weight_bits, alpha, beta, bias, in_channels, stride, padding, target)
    if target is not rows:
        rows.copy_(target)


def launch_rows(
    bits: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    in_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    rows: Tensor,
) -> None:
    """Writes the convolution into rows (N, H', W', F) float32, contiguous; all else as in `launch`."""
    _launch(bits, weight_bits, (alpha, beta, bias), in_channels, _steps(stride, padding), rows.numpy())


def launch_signs(
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
    out: Tensor,
) -> None:
    """Writes the packed signs of the convolution into out.

    Args:
        bits: as in `kernels.conv.packed_conv2d_signs`, and likewise all up to `padding`.
        weight_bits: see there.
        alpha: see there.
        beta: see there.
        bias: see there.
        threshold: see there.
        falls: see there.
        in_channels: see there.
        stride: (vertical, horizontal).
        padding: (vertical, horizontal).
        out: (N, H', W', ceil(F / 32)) int32, contiguous, overwritten.
    """
    scalars = (alpha, beta, bias, threshold, falls)
    _launch(bits, weight_bits, scalars, in_channels, _steps(stride, padding), out.numpy().view(np.uint32))


@dataclass(frozen=True)
class _Geometry:
    """Where the windows of an image lie; pixels are filled up to whole tiles with the last one.

    Attributes:
        starts: int64, bytes from the beginning of the padded image to each window.
        kinds: int64, number of the kind of border of each window.
        places: int64, number of each window in the image.
        valid: for each kind, the taps inside the image: (first row, end row, first column, end column).
        rows: int64 (H',), taps of a column inside the image.
        columns: int64 (W',), taps of a row inside the image.
    """

    starts: NDArray[np.int64]
    kinds: NDArray[np.int64]
    places: NDArray[np.int64]
    valid: NDArray[np.int64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]


def _arrange(weight_bits: Tensor, scalars: _Scalars, in_channels: int, valid: NDArray[np.int64]) -> _Filters:
    """Returns the filters as the tiles read them.

    Returns:
        (ceil(F / 32), kh, kw * words, 32) uint32, 0 beyond the last filter and channel; their scalars; and for each
        kind of border (kinds, ceil(F / 32) * 32) int32, the ones of every filter at the taps inside the image.
    """
    words = weight_bits.detach().contiguous().numpy().view(np.uint32).copy()
    words[..., -1] &= _tail(in_channels)
    filters, height, width, depth = words.shape
    missing = -filters % TILE_FILTERS
    blocks = np.pad(words.reshape(filters, height, width * depth), ((0, missing), (0, 0), (0, 0)))
    blocks = blocks.reshape(-1, TILE_FILTERS, height, width * depth).transpose(0, 2, 3, 1)
    before = np.zeros((filters, height + 1, width + 1), np.int32)  # ones at the taps above and left of each corner
    before[:, 1:, 1:] = np.unpackbits(words.view(np.uint8), axis=-1).sum(-1, dtype=np.int32).cumsum(1).cumsum(2)
    top, bottom, left, right = valid.T
    inside = before[:, bottom, right] - before[:, top, right] - before[:, bottom, left] + before[:, top, left]
    ones = np.pad(inside.T, ((0, 0), (0, missing)))
    return np.ascontiguousarray(blocks), _scalar_rows(scalars, len(blocks)), np.ascontiguousarray(ones)


def _steps(stride: Sequence[int], padding: Sequence[int]) -> tuple[int, int, int, int]:
    return stride[0], stride[1], padding[0], padding[1]


def _tail(in_channels: int) -> np.uint32:
    """Returns the bits of the last word that are channels."""
    return np.uint32(0xFFFFFFFF >> (-in_channels % WORD_BITS))


def _scalar_rows(scalars: _Scalars, num_blocks: int) -> NDArray[np.float32]:
    """Returns (blocks, rows, 32) float32: scale, beta and bias, with a threshold also that and the bits of `falls`."""
    alpha, beta, bias, *signs = scalars
    filters = len(alpha)
    table = np.zeros((_VALUE_ROWS + len(signs), num_blocks * TILE_FILTERS), np.float32)
    table[0, :filters] = (alpha - beta).numpy()
    table[1, :filters] = beta.numpy()
    table[2, :filters] = _NO_BIAS if bias is None else bias.numpy()
    if signs:
        threshold, falls = signs
        table[3] = np.inf  # no bit is set beyond the last filter
        table[3, :filters] = threshold.numpy()
        flags = np.zeros((num_blocks, TILE_FILTERS), np.uint64)
        flags.reshape(-1)[:filters] = falls.numpy()
        words = (flags << np.arange(TILE_FILTERS, dtype=np.uint64)).sum(1).astype(np.uint32)
        table[4, ::TILE_FILTERS] = words.view(np.float32)
    return np.ascontiguousarray(table.reshape(len(table), num_blocks, TILE_FILTERS).transpose(1, 0, 2))


@lru_cache(maxsize=256)
def _geometry(shape: tuple[int, int, int], kernel: tuple[int, int], steps: tuple[int, int, int, int]) -> _Geometry:
    """Lays out the windows of an image of shape (height, width, words), steps being stride and padding."""
    height, width, words = shape
    row_kinds, row_of, rows = _borders(height, kernel[0], steps[0], steps[2])
    column_kinds, column_of, columns = _borders(width, kernel[1], steps[1], steps[3])
    count = len(row_of) * len(column_of)
    places = np.minimum(np.arange(-(-count // TILE_PIXELS) * TILE_PIXELS), count - 1)
    y, x = places // len(column_of), places % len(column_of)
    starts = (y * steps[0] * (width + 2 * steps[3]) + x * steps[1]) * words * _WORD_BYTES
    valid = np.array([(*row, *column) for row in row_kinds for column in column_kinds], np.int64)
    return _Geometry(starts, row_of[y] * len(column_kinds) + column_of[x], places, valid, rows, columns)


def _borders(
    size: int, kernel: int, stride: int, padding: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Returns the different (first tap, end tap) inside the image, which of them each output has, and how many taps."""
    start = np.arange((size + 2 * padding - kernel) // stride + 1) * stride - padding
    first = np.clip(-start, 0, kernel)
    end = np.maximum(first, np.minimum(kernel, size - start))
    kinds, which = np.unique(np.stack([first, end], 1), axis=0, return_inverse=True)
    return kinds, which.reshape(-1).astype(np.int64), (end - first).astype(np.int64)


class _Plan(NamedTuple):
    """What a convolution needs beside its input: the filters as the tiles read them, and where the windows lie."""

    filters: _Filters
    places: _Places
    numbers: _Numbers


def _plan(
    weight_bits: Tensor,
    scalars: _Scalars,
    in_channels: int,
    shape: tuple[int, int, int],
    steps: tuple[int, int, int, int],
) -> _Plan:
    kernel = (weight_bits.shape[1], weight_bits.shape[2])
    place = _geometry(shape, kernel, steps)
    filters = _arrange(weight_bits, scalars, in_channels, place.valid)
    places = (place.starts, place.kinds, place.places, place.rows, place.columns)
    return _Plan(filters, places, (in_channels, _tail(in_channels), *kernel, *steps))


def _launch(
    bits: Tensor,
    weight_bits: Tensor,
    scalars: _Scalars,
    in_channels: int,
    steps: tuple[int, int, int, int],
    out: NDArray[np.float32] | NDArray[np.uint32],
) -> None:
    if not out.size:
        return
    shape = (bits.shape[1], bits.shape[2], bits.shape[3])
    tensors = [weight_bits, *(tensor for tensor in scalars if tensor is not None)]
    key = (in_channels, shape, steps, scalars[2] is None)
    plan = derived("conv_numba", tensors, key, lambda: _plan(weight_bits, scalars, in_channels, shape, steps))
    words = bits.contiguous().numpy()
    num_threads = team_size()
    if num_threads == 1 or out.size // out.shape[3] * plan.filters[0].size < _TEAM_WORDS:
        _convolve(words, *plan, out)
        return
    chunks = -(-num_threads * _TASKS_PER_THREAD // (len(words) * len(plan.filters[0])))
    worker = worker_address(_work_on_values if out.dtype == np.float32 else _work_on_signs)
    _convolve_in_team(words, *plan, chunks, out, (runtime_address(), worker, num_threads))


@numba.njit(nogil=True, cache=True)
def _pad(bits: NDArray[np.uint32], tail: np.uint32, pad_h: int, pad_w: int, padded: NDArray[np.uint32]) -> None:
    """Copies an image into the middle of a larger one of zeros, without the bits beyond the last channel."""
    height, width, words = bits.shape
    source, target = bits.reshape(-1), padded.reshape(-1)
    row, gap = width * words, 2 * pad_w * words
    place = (pad_h * padded.shape[1] + pad_w) * words
    target[:place] = 0
    for y in range(height):
        for index in range(row):
            target[place + index] = source[y * row + index]
        for index in range(place + words - 1, place + row, words):
            target[index] &= tail
        place += row
        target[place : place + gap] = 0
        place += gap
    target[place:] = 0


@numba.njit(nogil=True, cache=True)
def _count_pixels(padded: NDArray[np.uint32], ones: NDArray[np.int32]) -> None:
    """Writes the ones of each pixel; whole arrays at a time, which the compiler turns into vector code."""
    words, source, target = padded.shape[2], padded.reshape(-1), ones.reshape(-1)
    counts = np.empty(len(source), np.int32)
    for index in range(len(source)):
        counts[index] = count_ones(source[index])
    if words == 1:
        target[:] = counts
    elif words == 2:  # by far the most pixels have so few
        for pixel in range(len(target)):
            target[pixel] = counts[2 * pixel] + counts[2 * pixel + 1]
    else:
        for pixel in range(len(target)):
            total = np.int32(0)
            for word in range(words):
                total += counts[pixel * words + word]
            target[pixel] = total


@numba.njit(nogil=True, cache=True)
def _add_columns(line: NDArray[np.int32], taps: int, stride: int, total: NDArray[np.int32]) -> None:
    """Writes the sum of the `taps` columns of each window."""
    if stride == 1:  # with a step of one the loop is vector code
        for x in range(len(total)):
            total[x] = line[x]
        for tap in range(1, taps):
            for x in range(len(total)):
                total[x] += line[x + tap]
        return
    total[:] = 0
    for tap in range(taps):
        for x in range(len(total)):
            total[x] += line[x * stride + tap]


@numba.njit(nogil=True, cache=True)
def _sum_signs(
    padded: NDArray[np.uint32],
    in_channels: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    sums: NDArray[np.float32],
) -> None:
    """Writes the sum of signs of each window: twice the ones, less the taps inside the image."""
    height, width, _ = padded.shape
    ones = np.empty((height, width), np.int32)
    _count_pixels(padded, ones)
    line, total = np.empty(width, np.int32), np.empty(len(columns), np.int32)
    taps = np.empty(len(columns), np.int32)
    taps[:] = columns
    for y in range(len(rows)):
        line[:] = ones[y * stride[0]]
        for tap in range(1, kernel[0]):
            line += ones[y * stride[0] + tap]
        _add_columns(line, kernel[1], stride[1], total)
        inside = np.int32(in_channels * rows[y])
        first = y * len(columns)
        for x in range(len(columns)):
            # Whole numbers below 2**25: exact in int32 and, the difference below 2**24, in float32.
            sums[first + x] = np.float32(2 * total[x] - inside * taps[x])
    sums[len(rows) * len(columns) :] = sums[len(rows) * len(columns) - 1]


@numba.njit(nogil=True, cache=True)
def _prepare(
    bits: NDArray[np.uint32], places: _Places, numbers: _Numbers, padded: NDArray[np.uint32], sums: NDArray[np.float32]
) -> None:
    _pad(bits, numbers[1], numbers[6], numbers[7], padded)
    kernel, stride = (numbers[2], numbers[3]), (numbers[4], numbers[5])
    _sum_signs(padded, numbers[0], kernel, stride, places[3], places[4], sums)


@numba.njit(nogil=True, cache=True)
def _seven(values: NDArray[np.float32], first: int) -> tuple[np.float32, ...]:
    return (
        values[first],
        values[first + 1],
        values[first + 2],
        values[first + 3],
        values[first + 4],
        values[first + 5],
        values[first + 6],
    )


@numba.njit(nogil=True, cache=True)
def _addresses(base: int, values: NDArray[np.int64], first: int, scale: int) -> tuple[int, ...]:
    return (
        base + values[first] * scale,
        base + values[first + 1] * scale,
        base + values[first + 2] * scale,
        base + values[first + 3] * scale,
        base + values[first + 4] * scale,
        base + values[first + 5] * scale,
        base + values[first + 6] * scale,
    )


@numba.njit(nogil=True, cache=True)
def _address(values: NDArray[Any]) -> int:
    return np.int64(values.ctypes.data)  # type: ignore[return-value] # Numba's integers are these


@numba.njit(nogil=True, cache=True)
def _run_task(
    task: int,
    images: tuple[NDArray[np.uint32], NDArray[np.float32]],
    filters: _Filters,
    places: _Places,
    num_chunks: int,
    out: NDArray[Any],
) -> None:
    """Convolves a range of tiles of one image with one block of filters, into out (N, windows, filters or words)."""
    (padded, sums), (blocks, scalars, ones) = images, filters
    chunk, block, image = task % num_chunks, task // num_chunks % len(blocks), task // num_chunks // len(blocks)
    num_tiles = len(places[0]) // TILE_PIXELS
    # Columns that a block writes: a value for each of its filters, or one word.
    columns = TILE_FILTERS if scalars.shape[1] == _VALUE_ROWS else 1
    first = block * columns
    width = min(columns, out.shape[2] - first)
    row = np.empty((TILE_PIXELS, TILE_FILTERS), out.dtype)
    rows = np.arange(TILE_PIXELS) * TILE_FILTERS
    window = (padded.shape[2] * padded.shape[3] * 4, blocks.shape[1], blocks.shape[2])
    for tile in range(num_tiles * chunk // num_chunks, num_tiles * (chunk + 1) // num_chunks):
        pixel = tile * TILE_PIXELS
        targets = _addresses(_address(out[image]) + first * 4, places[2], pixel, out.shape[2] * 4)
        if width < columns:
            targets = _addresses(_address(row), rows, 0, 4)
        convolve_tile(
            _addresses(_address(padded[image]), places[0], pixel, 1),
            window,
            _address(blocks[block]),
            _address(scalars[block]),
            _addresses(_address(ones) + block * TILE_FILTERS * 4, places[1], pixel, ones.shape[1] * 4),
            _seven(sums[image], pixel),
            targets,
            out,
        )
        if width < columns:
            for index in range(TILE_PIXELS):
                for column in range(width):
                    out[image, places[2][pixel + index], first + column] = row[index, column]


@numba.njit(nogil=True, cache=True)
def _empty_images(
    bits: NDArray[np.uint32], places: _Places, numbers: _Numbers
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Returns room for the padded images and for the sums of their windows."""
    batch, height, width, words = bits.shape
    padded = np.empty((batch, height + 2 * numbers[6], width + 2 * numbers[7], words), np.uint32)
    return padded, np.empty((batch, len(places[0])), np.float32)


@numba.njit(nogil=True, cache=True)
def _convolve(
    words: NDArray[np.int32],
    filters: _Filters,
    places: _Places,
    numbers: _Numbers,
    out: NDArray[Any],
) -> None:
    bits, rows = words.view(np.uint32), out.reshape(len(words), -1, out.shape[3])
    images = _empty_images(bits, places, numbers)
    for image in range(len(bits)):
        _prepare(bits[image], places, numbers, images[0][image], images[1][image])
    for task in range(len(bits) * len(filters[0])):
        _run_task(task, images, filters, places, 1, rows)


def _array(dtype: Any, num_dims: int) -> Any:
    return types.Array(dtype, num_dims, "C")


def _team_arguments(out: Any) -> list[Any]:
    """Returns the Numba types of what a thread of a team works on, in the order of `_work`."""
    of: Any = types.Tuple
    whole = _array(types.int64, 1)
    images = of([_array(types.uint32, 4), _array(types.float32, 2)])
    filters = of([_array(types.uint32, 4), _array(types.float32, 3), _array(types.int32, 2)])
    numbers = of([types.int64, types.uint32, *[types.int64] * 6])
    return [whole, _array(types.uint32, 4), images, filters, of([whole] * 5), numbers, types.int64, _array(out, 3)]


_run_team, _value_arguments, _sign_arguments = team_of(_team_arguments(types.float32), _team_arguments(types.uint32))


@numba.njit(nogil=True, cache=True)
def _work(arguments: Any) -> None:
    """Prepares images, or without chunks convolves them, as long as there are any left."""
    counter, bits, images, filters, places, numbers, num_chunks, out = arguments
    num_tasks = len(bits) * (len(filters[0]) * num_chunks if num_chunks else 1)
    while True:
        task = next_task(_address(counter))
        if task >= num_tasks:
            return
        if num_chunks:
            _run_task(task, images, filters, places, num_chunks, out)
        else:
            _prepare(bits[task], places, numbers, images[0][task], images[1][task])


def _work_on_values(data: Any) -> None:
    _work(_value_arguments(data))


def _work_on_signs(data: Any) -> None:
    _work(_sign_arguments(data))


@numba.njit(nogil=True, cache=True)
def _convolve_in_team(
    words: NDArray[np.int32],
    filters: _Filters,
    places: _Places,
    numbers: _Numbers,
    num_chunks: int,
    out: NDArray[Any],
    team: tuple[int, int, int],
) -> None:
    bits, rows = words.view(np.uint32), out.reshape(len(words), -1, out.shape[3])
    images = _empty_images(bits, places, numbers)
    runtime, worker, num_threads = team
    if len(bits) == 1:
        _prepare(bits[0], places, numbers, images[0][0], images[1][0])
    else:
        _run_team(
            runtime, worker, num_threads, (np.zeros(1, np.int64), bits, images, filters, places, numbers, 0, rows)
        )
    counter = np.zeros(1, np.int64)
    _run_team(runtime, worker, num_threads, (counter, bits, images, filters, places, numbers, num_chunks, rows))
