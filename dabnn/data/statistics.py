"""Size, colour and channel statistics of a set of images, from integer histograms: exact, and in any order the same."""

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dabnn.data.images import GRAY_MODES, convert_channels
from dabnn.data.manifest import ImageInfo

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageStatistics:
    """Counts pixel values and sizes, image by image."""

    def __init__(self) -> None:
        self._counts = np.zeros((4, 256), dtype=np.int64)
        self._heights: Counter[int] = Counter()
        self._widths: Counter[int] = Counter()
        self._is_gray = True

    def add_colour(self, image: "Image") -> None:
        """Takes note of whether an image is in colour; one of them makes the dataset one of three channels."""
        self._is_gray = self._is_gray and image.mode in GRAY_MODES

    def add(self, image: "Image") -> None:
        """Counts an image's pixels and size: red, green, blue, and gray."""
        self.add_colour(image)
        gray = np.array(convert_channels(image, 1).histogram())
        self._counts[3] += gray
        if image.mode in GRAY_MODES:
            self._counts[:3] += gray
        else:
            self._counts[:3] += np.array(convert_channels(image, 3).histogram()).reshape(3, 256)
        self._heights[image.height] += 1
        self._widths[image.width] += 1

    def summary(self) -> ImageInfo:
        """Returns what was counted; at least one image must have been."""
        channels = 1 if self._is_gray else 3
        means, stds = zip(*(_mean_and_std(counts) for counts in self._counts), strict=True)
        return ImageInfo(
            channels=channels,
            height=_median(self._heights),
            width=_median(self._widths),
            mean=means[:channels],
            std=stds[:channels],
            gray_mean=means[3],
            gray_std=stds[3],
        )


def _mean_and_std(counts: NDArray[np.int64]) -> tuple[float, float]:
    # Python integers: the sum of squares of a large dataset leaves 64 bits.
    total = int(counts.sum())
    first = sum(level * count for level, count in enumerate(counts.tolist()))
    second = sum(level * level * count for level, count in enumerate(counts.tolist()))
    variance = (second * total - first * first) / (total * total)
    return first / total / 255, variance**0.5 / 255


def _median(counts: Counter[int]) -> int:
    remaining = (counts.total() + 1) // 2
    for value in sorted(counts):
        remaining -= counts[value]
        if remaining <= 0:
            return value
    raise ValueError("no image was counted")
