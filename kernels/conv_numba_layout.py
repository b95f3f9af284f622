"""How the filters and windows of a packed convolution lie for the tiles of `vector_tile`, in either of its forms.

Everything here depends on shapes and filters, not on the input, and is made once.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels.packing import WORD_BITS
from kernels.vector_tile import TILE_FILTERS, TileForm

WORD_BYTES = 4
# Rows of scalars for values; signs have two more.
VALUE_ROWS = 3
# As a bias it adds nothing, not even to a negative zero.
_NO_BIAS = np.float32(-0.0)

Scalars = tuple[Tensor, Tensor, Tensor | None] | tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]
# Weights as the form reads them, scalars, and ones of every filter for each kind of border.
Filters = tuple[NDArray[np.uint32], NDArray[np.float32], NDArray[np.int32]]


@dataclass(frozen=True)
class Geometry:
    """Where the windows of an image lie, tile by tile; the last tile is filled up with the last window or pair.

    Attributes:
        starts: int64 (tiles, starts of a tile), bytes from the beginning of the padded image, or of its image of
            pairs, to each window or pair.
        kinds: int64 (tiles, windows of a tile), number of the kind of border of each window.
        places: int64 (tiles, windows of a tile), number of each window in the image.
        rows: int64 (H',), taps of a column inside the image.
        columns: int64 (W',), taps of a row inside the image.
        valid: for each kind, the taps inside the image: (first row, end row, first column, end column).
        pair_step: pixels of the padded image from the first window of a pair to the second; -1 without pairs.
    """

    starts: NDArray[np.int64]
    kinds: NDArray[np.int64]
    places: NDArray[np.int64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    valid: NDArray[np.int64]
    pair_step: int


@lru_cache(maxsize=256)
def lay_out(
    shape: tuple[int, int, int], kernel: tuple[int, int], steps: tuple[int, int, int, int], form: TileForm
) -> Geometry:
    """Lays out the windows of an image of shape (height, width, words), steps being stride and padding."""
    height, width, words = shape
    row_kinds, row_of, rows = _borders(height, kernel[0], steps[0], steps[2])
    column_kinds, column_of, columns = _borders(width, kernel[1], steps[1], steps[3])
    padded_width = width + 2 * steps[3]
    pair_step = -1
    groups = np.arange(len(rows) * len(columns)).reshape(-1, 1)
    if form.is_paired:
        groups, is_vertical = _pairs(len(rows), len(columns))
        pair_step = padded_width * steps[0] if is_vertical else steps[1]
        pair_step *= int(groups[0, 1] > groups[0, 0])  # a single window is the second of its pair as well
    num_starts = form.windows // groups.shape[1]
    chosen = np.minimum(np.arange(-(-len(groups) // num_starts) * num_starts), len(groups) - 1)
    places = groups[chosen].reshape(-1, form.windows)
    y, x = places // len(columns), places % len(columns)
    starts = (y * steps[0] * padded_width + x * steps[1]) * words * WORD_BYTES
    if form.is_paired:
        starts = np.ascontiguousarray(2 * starts[:, ::2])
    valid = np.array([(*row, *column) for row in row_kinds for column in column_kinds], np.int64)
    return Geometry(starts, row_of[y] * len(column_kinds) + column_of[x], places, rows, columns, valid, pair_step)


def _pairs(height: int, width: int) -> tuple[NDArray[np.int64], bool]:
    """Pairs the windows of an image with their neighbours, in rows or in columns, where fewer are done twice.

    Returns:
        (pairs, 2) numbers of windows, and whether they are paired in columns. In a line of an odd number the last pair
        repeats a window, unless it is the only one.
    """
    windows = np.arange(height * width).reshape(height, width)
    is_vertical = width * -(-height // 2) < height * -(-width // 2)
    lines = windows.T if is_vertical else windows
    length = lines.shape[1]
    first = np.minimum(np.arange(0, length, 2), max(length - 2, 0))
    second = np.minimum(first + 1, length - 1)
    return np.stack([lines[:, first], lines[:, second]], -1).reshape(-1, 2), is_vertical


def _borders(
    size: int, kernel: int, stride: int, padding: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Returns the different (first tap, end tap) inside the image, which of them each output has, and how many taps."""
    start = np.arange((size + 2 * padding - kernel) // stride + 1) * stride - padding
    first = np.clip(-start, 0, kernel)
    end = np.maximum(first, np.minimum(kernel, size - start))
    kinds, which = np.unique(np.stack([first, end], 1), axis=0, return_inverse=True)
    return kinds, which.reshape(-1).astype(np.int64), (end - first).astype(np.int64)


def arrange(
    weight_bits: Tensor, scalars: Scalars, in_channels: int, valid: NDArray[np.int64], form: TileForm
) -> Filters:
    """Returns the filters as the tiles read them.

    Returns:
        (ceil(F / 32), kh, kw * words, 32) uint32, 0 beyond the last filter and channel, for pairs twice as many (see
        `_nibbles`); their scalars; and for each kind of border (kinds, ceil(F / 32) * 32) int32, the ones of every
        filter at the taps inside the image.
    """
    words = weight_bits.detach().contiguous().numpy().view(np.uint32).copy()
    words[..., -1] &= last_word(in_channels)
    filters, height, width, depth = words.shape
    missing = -filters % TILE_FILTERS
    blocks = np.pad(words.reshape(filters, height, width * depth), ((0, missing), (0, 0), (0, 0)))
    blocks = blocks.reshape(-1, TILE_FILTERS, height, width * depth).transpose(0, 2, 3, 1)
    before = np.zeros((filters, height + 1, width + 1), np.int32)  # ones at the taps above and left of each corner
    before[:, 1:, 1:] = np.unpackbits(words.view(np.uint8), axis=-1).sum(-1, dtype=np.int32).cumsum(1).cumsum(2)
    top, bottom, left, right = valid.T
    inside = before[:, bottom, right] - before[:, top, right] - before[:, bottom, left] + before[:, top, left]
    ones = np.ascontiguousarray(np.pad(inside.T, ((0, 0), (0, missing))))
    blocks = _nibbles(blocks) if form.is_paired else np.ascontiguousarray(blocks)
    return blocks, _scalar_rows(scalars, len(blocks)), ones


def _nibbles(blocks: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Splits each word into 8 times four bits: (..., words, 32) uint32 to (..., words, 8, 32) uint8, seen as uint32.

    The lower halves of the word's four bytes come first, then the higher ones, as in the image of pairs.
    """
    parts = np.ascontiguousarray(blocks).view(np.uint8).reshape(*blocks.shape, WORD_BYTES)
    halves = np.stack([parts & 15, parts >> 4], -3)  # (..., words, 2, 32, 4)
    nibbles = np.ascontiguousarray(halves.swapaxes(-1, -2))
    return nibbles.view(np.uint32).reshape(*blocks.shape[:-2], 2 * blocks.shape[-2], TILE_FILTERS)


def last_word(in_channels: int) -> np.uint32:
    """Returns the bits of a pixel's last word that are channels."""
    return np.uint32(0xFFFFFFFF >> (-in_channels % WORD_BITS))


def _scalar_rows(scalars: Scalars, num_blocks: int) -> NDArray[np.float32]:
    """Returns (blocks, rows, 32) float32: scale, beta and bias, with a threshold also that and the bits of `falls`."""
    alpha, beta, bias, *signs = scalars
    filters = len(alpha)
    table = np.zeros((VALUE_ROWS + len(signs), num_blocks * TILE_FILTERS), np.float32)
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
