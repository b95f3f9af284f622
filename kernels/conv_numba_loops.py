"""The compiled loops of `conv_numba`: pad an image, sum its signs, and go through its tiles.

The input is copied once into an image with a border of zero words, in which a padded tap counts nothing. Where the
tiles read pairs, a second image holds each pixel beside the one that is `pair_step` pixels further. The sum of signs
of each window, the same for all filters, is a box sum of the pixels' counts.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.compiled import compiled
from kernels.conv_numba_layout import VALUE_ROWS, Filters
from kernels.vector_ir import count_ones
from kernels.vector_tile import TILE_FILTERS, convolve_tile

# Starts, kinds and places of the tiles, taps of columns and rows inside the image (see `conv_numba_layout.Geometry`).
Places = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]
# in_channels, bits of the last word, kernel, stride, padding (each vertical, horizontal), pair_step.
Numbers = tuple[int, np.uint32, int, int, int, int, int, int, int]
# The padded images, what the tiles read of them (without pairs the same), and the sums of signs by window.
Images = tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.float32]]


@compiled
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


@compiled
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


@compiled
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


@compiled
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


@compiled
def _pair(padded: NDArray[np.uint32], step: int, pairs: NDArray[np.uint32]) -> None:
    """Writes for each word w, with v the same word `step` pixels further, the four bits that meet one filter's index.

    That is two words: lower halves of the bytes of w beside lower halves of those of v, then the higher halves.
    """
    words, source, target = padded.shape[2], padded.reshape(-1), pairs.reshape(-1)
    low, high, four = np.uint32(0x0F0F0F0F), np.uint32(0xF0F0F0F0), np.uint32(4)
    distance = step * words
    inside = len(source) - distance
    for index in range(inside):
        first, second = source[index], source[index + distance]
        target[2 * index] = first & low | (second & low) << four
        target[2 * index + 1] = first >> four & low | second & high
    for index in range(inside, len(source)):  # these begin no pair
        target[2 * index] = source[index] & low
        target[2 * index + 1] = source[index] >> four & low


@compiled
def prepare(image: int, bits: NDArray[np.uint32], images: Images, places: Places, numbers: Numbers) -> None:
    """Writes what the tiles read of one image of `bits` (N, H, W, words)."""
    padded, inputs, sums = images[0][image], images[1][image], images[2][image]
    _pad(bits[image], numbers[1], numbers[6], numbers[7], padded)
    kernel, stride = (numbers[2], numbers[3]), (numbers[4], numbers[5])
    _sum_signs(padded, numbers[0], kernel, stride, places[3], places[4], sums)
    if numbers[8] >= 0:
        _pair(padded, numbers[8], inputs)


@compiled
def address(values: NDArray[Any]) -> int:
    """Returns the address of the first element."""
    return np.int64(values.ctypes.data)  # type: ignore[return-value] # Numba's integers are these


@compiled
def run_task(task: int, images: Images, filters: Filters, places: Places, num_chunks: int, out: NDArray[Any]) -> None:
    """Convolves a range of tiles of one image with one block of filters, into out (N, windows, filters or words)."""
    (_, inputs, sums), (blocks, scalars, ones), (starts, kinds, outputs) = images, filters, places[:3]
    chunk, block, image = task % num_chunks, task // num_chunks % len(blocks), task // num_chunks // len(blocks)
    num_tiles, windows = kinds.shape
    # Columns that a block writes: a value for each of its filters, or one word.
    columns = TILE_FILTERS if scalars.shape[1] == VALUE_ROWS else 1
    first = block * columns
    width = min(columns, out.shape[2] - first)
    row, order = np.empty((windows, TILE_FILTERS), out.dtype), np.arange(windows)
    window = (inputs.shape[2] * inputs.shape[3] * 4, blocks.shape[1], blocks.shape[2])
    read = (address(inputs[image]), address(sums[image]))
    block_ones = address(ones) + block * TILE_FILTERS * 4
    weights = (address(blocks[block]), address(scalars[block]), block_ones, ones.shape[1] * 4)
    target = (address(out[image]) + first * 4, out.shape[2] * 4)
    if width < columns:
        target = (address(row), TILE_FILTERS * 4)
    for tile in range(num_tiles * chunk // num_chunks, num_tiles * (chunk + 1) // num_chunks):
        place = address(outputs) + tile * windows * 8
        where = (
            address(starts) + tile * starts.shape[1] * 8,
            address(kinds) + tile * windows * 8,
            place,
            place if width == columns else address(order),
        )
        convolve_tile(where, read, window, weights, target, out)
        if width < columns:
            for index in range(windows):
                for column in range(width):
                    out[image, outputs[tile, index], first + column] = row[index, column]


@compiled
def empty_images(bits: NDArray[np.uint32], places: Places, numbers: Numbers) -> Images:
    """Returns room for the images."""
    batch, height, width, words = bits.shape
    padded = np.empty((batch, height + 2 * numbers[6], width + 2 * numbers[7], words), np.uint32)
    inputs = padded
    if numbers[8] >= 0:
        inputs = np.empty((batch, padded.shape[1], padded.shape[2], 2 * words), np.uint32)
    return padded, inputs, np.empty((batch, len(places[3]) * len(places[4])), np.float32)
