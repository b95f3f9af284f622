"""Rotation of drawings by Pillow's bicubic filter, of which no more is computed than must be.

Where all pixels near a point are equal the filter returns their value, exactly. On a drawing that is so almost
everywhere, and there the nearest pixel will do; the rest is computed here by Pillow's own arithmetic in its own order
(`src/libImaging/Geometry.c`, `bicubic_filter8`), in float64: the same pixels as `Image.rotate`, in less than half the
time (benchmarks/data.py). Photographs, and images in colour, are left to Pillow.
"""

import math

import numpy as np
from numpy.typing import NDArray

Matrix = tuple[float, float, float, float, float, float]

# The filter's reach from the pixel that a point lies in.
_REACH = 2
_TAPS = 4
# Above this share of pixels to compute, Pillow is faster.
_MAX_BUSY = 0.3


def rotate(pixels: NDArray[np.uint8], angle: float, fill: int) -> NDArray[np.uint8]:
    """Rotates an image about its centre, keeping its size.

    Args:
        pixels: (height, width, channels).
        angle: In degrees, counter-clockwise.
        fill: Value of what is uncovered.

    Returns:
        What `PIL.Image.Image.rotate` gives with bicubic resampling, of the same shape.
    """
    rotated = _rotate_drawing(pixels[:, :, 0], angle, fill) if pixels.shape[2] == 1 and angle % 90 else None
    return (_rotate_any(pixels, angle, fill) if rotated is None else rotated).reshape(pixels.shape)


def _rotate_any(pixels: NDArray[np.uint8], angle: float, fill: int) -> NDArray[np.uint8]:
    from PIL import Image

    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    colour = fill if pixels.shape[2] == 1 else (fill,) * pixels.shape[2]
    return np.asarray(image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=colour))


def _rotate_drawing(pixels: NDArray[np.uint8], angle: float, fill: int) -> NDArray[np.uint8] | None:
    """Returns the rotated drawing, or None where it is too busy for this to be the fast way."""
    edged = np.pad(pixels, _REACH, mode="edge")
    busy = _busy(edged)
    if np.count_nonzero(busy) > _MAX_BUSY * busy.size:
        return None
    rotated = _nearest(edged, angle, fill)
    places = np.flatnonzero(np.ascontiguousarray(_nearest(busy, angle, 0)).view(np.bool_))
    rows, columns = np.divmod(places, pixels.shape[1])
    rotated[rows, columns] = _bicubic(edged, _matrix(pixels.shape, angle), rows, columns, fill)
    return rotated


def _nearest(edged: NDArray[np.uint8], angle: float, fill: int) -> NDArray[np.uint8]:
    from PIL import Image

    inside = slice(_REACH, -_REACH)
    return np.array(Image.fromarray(edged).rotate(angle, fillcolor=fill))[inside, inside]


def _busy(edged: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns 1 where the filter may reach pixels that are not all equal, and on the margin; else 0.

    A point in one pixel is filtered from 4 x 4 within the 5 x 5 around it. The margin tells the points that lie just
    outside of the image from those just inside, which the nearest pixel need not.
    """
    busy = np.ones(edged.shape, dtype=np.uint8)
    across = edged[:, 1:] != edged[:, :-1]
    across = across[:, :-3] | across[:, 1:-2] | across[:, 2:-1] | across[:, 3:]
    across = across[:-4] | across[1:-3] | across[2:-2] | across[3:-1] | across[4:]
    down = edged[1:, _REACH:-_REACH] != edged[:-1, _REACH:-_REACH]
    down = down[:-3] | down[1:-2] | down[2:-1] | down[3:]
    busy[_REACH:-_REACH, _REACH:-_REACH] = across | down
    return busy


def _matrix(shape: tuple[int, ...], angle: float) -> Matrix:
    """Returns the affine map from a point of the result to its source, rounded as Pillow rounds it."""
    angle = -math.radians(angle % 360.0)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = shape[1] / 2, shape[0] / 2
    return (cos, sin, cos * -x + sin * -y + 0.0 + x, -sin, cos, -sin * -x + cos * -y + 0.0 + y)


def _bicubic(
    edged: NDArray[np.uint8], matrix: Matrix, rows: NDArray[np.int64], columns: NDArray[np.int64], fill: int
) -> NDArray[np.uint8]:
    """Returns the values of the result at some places."""
    a, b, c, d, e, f = matrix
    across, down = columns + 0.5, rows + 0.5
    x, y = a * across + b * down + c, d * across + e * down + f
    height, width = (length - 2 * _REACH for length in edged.shape)
    is_inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = np.where(is_inside, x, 0.5) - 0.5, np.where(is_inside, y, 0.5) - 0.5
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    dx, dy = x - left, y - top
    starts = (top + (_REACH - 1)) * edged.shape[1] + (left + (_REACH - 1))
    pixels, lines = edged.ravel(), []
    for line in range(_TAPS):
        first, second, third, fourth = (
            pixels.take(starts + (line * edged.shape[1] + tap)).astype(np.float64) for tap in range(_TAPS)
        )
        lines.append(_cubic(first, second, third, fourth, dx))
    found = _cubic(lines[0], lines[1], lines[2], lines[3], dy)
    # Cut off, not rounded, as Pillow does.
    return np.where(is_inside, np.clip(found, 0.0, 255.0).astype(np.uint8), np.uint8(fill))


def _cubic(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    third: NDArray[np.float64],
    fourth: NDArray[np.float64],
    at: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Returns Pillow's cubic through four values, at a distance from the second; in place, new memory would cost."""
    square, cube = first - second, second - first
    square *= 2
    square += third
    square -= fourth
    cube -= third
    cube += fourth
    for term in (square, third - first, second):
        cube *= at
        cube += term
    return cube
