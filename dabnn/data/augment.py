"""Random changes of training images, given random numbers: shifted crops, mirror images, erased rectangles.

Batches are uint8 (n, height, width, channels), numbers are uniform in [0, 1) and come from `draws`; nothing here is
random by itself. RandAugment is in `randaugment`, rotation in `rotation`, parts of any size in `crops`, mixing of two
images in `mixing`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from dabnn.data.crops import NUM_ATTEMPTS, NUMBERS_PER_ATTEMPT, random_part
from dabnn.data.draws import Draws, Purpose
from dabnn.data.randaugment import NUMBERS_PER_OP, randaugment
from dabnn.data.rotation import rotate
from dabnn.spec import AugmentSpec

# Width / height; the paper's is height / width between 0.3 and 1 / 0.3, which torchvision takes for 3.3.
_ERASED_SHARE = (0.02, 0.33)
_ERASED_ASPECT = (1 / 3.3, 1 / 0.3)
_NUM_ATTEMPT_NUMBERS = NUM_ATTEMPTS * NUMBERS_PER_ATTEMPT


@dataclass(frozen=True)
class Augmentation:
    """What is done at random to the training images of one transform.

    Attributes:
        has_part: Whether any part of an image is taken instead of the whole, see `crops.any_part`.
        padding: Pixels of black around an image, out of which one of the original size is cut.
        is_mirrored: Whether every other image is mirrored.
        max_angle: Degrees by which images are rotated at most, either way.
        paper: Value of what a rotation uncovers.
        spec: What a run adds to the transform.
    """

    has_part: bool = False
    padding: int = 0
    is_mirrored: bool = False
    max_angle: float = 0.0
    paper: int = 0
    spec: AugmentSpec = field(default_factory=AugmentSpec)

    def apply(self, pixels: NDArray[np.uint8], draws: Draws) -> NDArray[np.uint8]:
        """Shifts, mirrors, rotates and runs RandAugment, in this order.

        Args:
            pixels: uint8 (n, size, size, channels), of the samples of `draws`; may be overwritten.
            draws: Whose random numbers are used.

        Returns:
            Of the same shape.
        """
        if self.padding:
            pixels = shift(pixels, self.padding, draws.uniform(Purpose.SHIFT, 2))
        if self.is_mirrored:
            mirror(pixels, draws.uniform(Purpose.MIRROR, 1)[:, 0])
        if self.max_angle:
            for position, number in enumerate(draws.uniform(Purpose.ROTATION, 1)[:, 0].tolist()):
                pixels[position] = rotate(pixels[position], (2 * number - 1) * self.max_angle, self.paper)
        num_ops = self.spec.randaugment_ops
        if num_ops:
            for position, numbers in enumerate(draws.uniform(Purpose.RANDAUGMENT, num_ops * NUMBERS_PER_OP).tolist()):
                pixels[position] = randaugment(
                    pixels[position], num_ops, self.spec.randaugment_magnitude, numbers, self.paper
                )
        return pixels

    def erase(self, pixels: NDArray[np.uint8], draws: Draws, colour: Sequence[int]) -> None:
        """Erases a rectangle of some images; after inversion, since `colour` is the mean that the network gets."""
        if self.spec.erasing:
            numbers = draws.uniform(Purpose.ERASING, 1 + _NUM_ATTEMPT_NUMBERS)
            erase(pixels, self.spec.erasing, colour, numbers)


def shift(pixels: NDArray[np.uint8], padding: int, numbers: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Cuts images of the original size out of padded ones: torchvision's `RandomCrop(size, padding=padding)`.

    Args:
        pixels: uint8 (n, height, width, channels).
        padding: Black pixels on each side.
        numbers: (n, 2): each crop begins at row floor(u_0 (2 padding + 1)) of the padded image, and a column likewise.

    Returns:
        Of the same shape, new.
    """
    num, height, width, channels = pixels.shape
    padded = np.zeros((num, height + 2 * padding, width + 2 * padding, channels), dtype=np.uint8)
    padded[:, padding : padding + height, padding : padding + width] = pixels
    top, left = (numbers * (2 * padding + 1)).astype(np.int64).T
    # Rows as they lie in memory, channels included, so that they are copied whole.
    windows = sliding_window_view(
        padded.reshape(num, height + 2 * padding, (width + 2 * padding) * channels), (height, width * channels), (1, 2)
    )
    shifted: NDArray[np.uint8] = windows[np.arange(num), top, left * channels]
    return shifted.reshape(pixels.shape)


def mirror(pixels: NDArray[np.uint8], numbers: NDArray[np.float64]) -> None:
    """Mirrors the images whose number is below 1/2, left to right, in place."""
    images, chosen = torch.from_numpy(pixels), torch.from_numpy(np.flatnonzero(numbers < 0.5))
    # torch reverses a line of colours twice as fast as NumPy.
    images[chosen] = images[chosen].flip(2)


def erase(pixels: NDArray[np.uint8], probability: float, colour: Sequence[int], numbers: NDArray[np.float64]) -> None:
    r"""Fills a random rectangle of some images with one colour, in place (Random Erasing, arXiv 1708.04896).

    Area ~ U(0.02, 0.33) of the image, aspect height / width = exp(U(log 0.3, log 3.3)), position uniform among those
    that fit; ten attempts, then the image is left as it is. With the mean as the colour this is the paper's RE-M.

    Args:
        pixels: uint8 (n, height, width, channels).
        probability: Of an image to be changed.
        colour: Value of each channel.
        numbers: (n, 41): whether, and what `crops.random_part` takes.
    """
    _, height, width, _ = pixels.shape
    for position in np.flatnonzero(numbers[:, 0] < probability).tolist():
        box = random_part((width, height), _ERASED_SHARE, _ERASED_ASPECT, numbers[position, 1:].tolist())
        if box is not None:
            left, top, right, bottom = box
            pixels[position, top:bottom, left:right] = colour
