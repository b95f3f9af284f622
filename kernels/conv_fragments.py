"""What the tensor-core convolution derives from a layer before it runs: its sizes, its tiles, its weights in order.

The instruction m16n8k256 multiplies 16 filters x 256 bits by 256 bits x 8 pixels. Each of the 32 lanes of a warp holds
some words of both factors in registers, at places that the instruction fixes. As the sum does not depend on the order
of the bits, nor the result on the order of the filters, both are chosen so that every lane finds its words side by
side in memory: the words of pixels as `kernels.packing` leaves them, the weights in the order made here. Nothing goes
through shared memory.

Lane 4 * g + t reads words 2 * t and 2 * t + 1 of each 8 words (256 bits) of depth, of pixels g, g + 8, ...; it owns
the results of filters 2 * size * g + r for r below 2 * size, and of pixels 2 * t and 2 * t + 1 of each 8. Depth runs
over the taps of a window, row by row, and over the words of a pixel within a tap. Left out: the kernel
(`kernels.conv_gluon`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernels.conv_layer import Geometry

Words = npt.NDArray[np.int32]

# Words of one instruction: 256 bits.
STEP_WORDS = 8
# Steps of depth that are written out one after the other; longer sums loop over as many.
MAX_UNROLLED = 9


@dataclass(frozen=True)
class Tile:
    """What one thread block computes.

    Attributes:
        size: 2 or 4: a warp multiplies `size` times 16 filters by `size` times 8 pixels at once.
        steps: How many such groups of pixels a warp holds the sums of.
        pixel_warps: Warps side by side along the pixels.
        depth_warps: Warps that share the depth of the same results and add up at the end.
    """

    size: int
    steps: int
    pixel_warps: int
    depth_warps: int

    @property
    def filters(self) -> int:
        """Filters of a block."""
        return 16 * self.size

    @property
    def warp_pixels(self) -> int:
        """Pixels of a warp."""
        return 8 * self.size * self.steps

    @property
    def pixels(self) -> int:
        """Pixels of a block."""
        return self.warp_pixels * self.pixel_warps

    @property
    def num_warps(self) -> int:
        """Warps of a block."""
        return self.pixel_warps * self.depth_warps

    def unrolled(self, depth: int) -> int:
        """Returns how many steps of `depth` words a warp writes out one after the other."""
        steps = -(-depth // (STEP_WORDS * self.depth_warps))
        if steps <= MAX_UNROLLED:
            return steps
        return min(range(MAX_UNROLLED, MAX_UNROLLED // 2, -1), key=lambda count: -(-steps // count) * count)

    def depth_steps(self, depth: int) -> int:
        """Returns how many steps each warp takes for `depth` words: a multiple of `unrolled`, the last ones empty."""
        steps, unrolled = -(-depth // (STEP_WORDS * self.depth_warps)), self.unrolled(depth)
        return -(-steps // unrolled) * unrolled


def choose_tile(geometry: Geometry, num_pixels: int, num_processors: int) -> Tile:
    """Returns the largest tile that still gives every multiprocessor a block, else one that shares the depth.

    Args:
        geometry: The layer.
        num_pixels: Output pixels of the whole batch.
        num_processors: Multiprocessors of the device.

    Returns:
        The tile. The rule is derived from the sizes, not measured.
    """
    steps = -(-geometry.depth // STEP_WORDS)
    few_filters = geometry.filters <= Tile(2, 1, 1, 1).filters
    tiles = [Tile(2, 2, 4, 1)] if few_filters else [Tile(4, 1, 4, 1), Tile(4, 1, 1, 4)]
    for tile in tiles:
        blocks = -(-num_pixels // tile.pixels) * -(-geometry.filters // tile.filters)
        if blocks >= num_processors and steps >= 2 * tile.depth_warps - 1:
            return tile
    depth_warps = 4 if steps > 4 else 2 if steps > 1 else 1
    return Tile(2, 1, 4 // depth_warps, depth_warps)


def fragment_places(size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns which weight each lane holds for one step of depth of one block of filters.

    Register i of row block m of lane 4 * g + t is row g (i even) or g + 8 (i odd) of the instruction's first factor,
    and its word t (i below 2) or t + 4; these stand for filter 2 * size * g + 2 * m + i % 2 and word 2 * t + i // 2.

    Returns:
        (size, 32, 4) filter within the block, the same of the word within the step; in the order of memory.
    """
    m, lane, i = np.ogrid[:size, :32, :4]
    g, t = lane // 4, lane % 4
    filters, words = 2 * size * g + 2 * m + i % 2, 2 * t + i // 2 + 0 * m
    return np.broadcast_to(filters, (size, 32, 4)), np.broadcast_to(words, (size, 32, 4))


def arrange_weights(weight_bits: Words, geometry: Geometry, tile: Tile) -> Words:
    """Returns weights in the order in which warps read them, filled up with zeros.

    Args:
        weight_bits: (F, kh, kw, words) int32; bits beyond the last channel are dropped.
        geometry: The layer.
        tile: The tile.

    Returns:
        (blocks of filters, steps of all warps, size, 32, 4) int32.
    """
    steps = tile.depth_steps(geometry.depth) * tile.depth_warps
    blocks = -(-geometry.filters // tile.filters)
    padded = np.zeros((blocks * tile.filters, steps * STEP_WORDS), np.int32)
    padded[: geometry.filters, : geometry.depth] = _clean(weight_bits, geometry).reshape(geometry.filters, -1)
    filters, words = fragment_places(tile.size)
    by_step = padded.reshape(blocks, tile.filters, steps, STEP_WORDS)
    return np.ascontiguousarray(by_step.transpose(0, 2, 1, 3)[:, :, filters, words])


def count_ones(weight_bits: Words, geometry: Geometry) -> tuple[Words, Words]:
    """Returns the ones of each filter on the taps inside the image, for each kind of place that a window can have.

    Windows are of one kind when the same taps lie inside; in rows and in columns alike, so a kind is a pair.

    Args:
        weight_bits: (F, kh, kw, words) int32.
        geometry: The layer.

    Returns:
        (kinds + 1, F) int32, the first line over all taps; and (H' + W',) int32: the kind of row y plus the kind of
        column x is the line.
    """
    ones = np.bitwise_count(_clean(weight_bits, geometry).view(np.uint32)).sum(3, dtype=np.int32)
    g = geometry
    rows, row_kinds = _inside(g.out_height, g.kernel_h, g.height, g.stride_h, g.pad_h)
    columns, column_kinds = _inside(g.out_width, g.kernel_w, g.width, g.stride_w, g.pad_w)
    table = np.einsum("fhw,ah,bw->abf", ones, rows, columns).reshape(-1, g.filters)
    lines = np.concatenate([ones.sum((1, 2))[None], table]).astype(np.int32)
    return lines, np.concatenate([1 + row_kinds * len(columns), column_kinds]).astype(np.int32)


def _clean(weight_bits: Words, geometry: Geometry) -> Words:
    clean = weight_bits.copy()
    clean[..., -1] &= np.int32(geometry.tail)
    return clean


def _inside(out_size: int, kernel: int, size: int, stride: int, padding: int) -> Sequence[npt.NDArray[np.int64]]:
    """Return which taps lie inside (kinds, kernel) and the kind of each place (out_size,), along one side."""
    position = np.arange(out_size)[:, None] * stride - padding + np.arange(kernel)
    kinds, kind = np.unique((position >= 0) & (position < size), axis=0, return_inverse=True)
    return kinds.astype(np.int64), kind.reshape(-1)
