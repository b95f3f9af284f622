r"""RandAugment (Cubuk et al., arXiv 1909.13719): N operations drawn with replacement, all at one strength M of 0 to 30.

Fourteen operations, as in torchvision's `RandAugment` with its 31 strengths, on Pillow images; m = M / 30:

| operation | parameter | operation | parameter |
| --- | --- | --- | --- |
| identity | | brightness, colour, contrast, sharpness | factor 1 +- 0.9 m |
| shear along x, y | +- 0.3 m | posterize | keeps round(8 - 4 m) bits |
| translate along x, y | +- floor(150 / 331 size m) pixels | solarize | inverts from 255 (1 - m) on |
| rotate | +- 30 m degrees | autocontrast, equalize | |

Signs are even chances. Moved pixels are the nearest ones; what is uncovered gets the value of the paper.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

NUMBERS_PER_OP = 2
MAX_MAGNITUDE = 30
_LARGEST_SHIFT = 150 / 331

Operation = Callable[["Image", float, float, int], "Image"]


def randaugment(
    pixels: NDArray[np.uint8], num_ops: int, magnitude: int, numbers: Sequence[float], paper: int
) -> NDArray[np.uint8]:
    """Applies random operations to an image.

    Args:
        pixels: (height, width, 1 or 3).
        num_ops: How many, one after the other.
        magnitude: Their strength, 0 to 30.
        numbers: For each the operation floor(14 u) and, below 1/2, the minus sign; in [0, 1).
        paper: Value of what is uncovered.

    Returns:
        Of the same shape.
    """
    from PIL import Image

    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    for number in range(num_ops):
        which, sign = numbers[NUMBERS_PER_OP * number : NUMBERS_PER_OP * (number + 1)]
        operation = tuple(OPERATIONS.values())[int(which * len(OPERATIONS))]
        image = operation(image, magnitude / MAX_MAGNITUDE, -1.0 if sign < 0.5 else 1.0, paper)
    return np.asarray(image).reshape(pixels.shape)


def _identity(image: "Image", _strength: float, _sign: float, _paper: int) -> "Image":
    return image


def _shear_x(image: "Image", strength: float, sign: float, paper: int) -> "Image":
    return _affine(image, (1.0, sign * 0.3 * strength, 0.0, 0.0, 1.0, 0.0), paper)


def _shear_y(image: "Image", strength: float, sign: float, paper: int) -> "Image":
    return _affine(image, (1.0, 0.0, 0.0, sign * 0.3 * strength, 1.0, 0.0), paper)


def _translate_x(image: "Image", strength: float, sign: float, paper: int) -> "Image":
    pixels = sign * math.floor(_LARGEST_SHIFT * image.width * strength)
    return _affine(image, (1.0, 0.0, -pixels, 0.0, 1.0, 0.0), paper)


def _translate_y(image: "Image", strength: float, sign: float, paper: int) -> "Image":
    pixels = sign * math.floor(_LARGEST_SHIFT * image.height * strength)
    return _affine(image, (1.0, 0.0, 0.0, 0.0, 1.0, -pixels), paper)


def _rotate(image: "Image", strength: float, sign: float, paper: int) -> "Image":
    return image.rotate(sign * 30.0 * strength, fillcolor=_colour(image, paper))


def _affine(image: "Image", matrix: tuple[float, ...], paper: int) -> "Image":
    """Moves pixels: the point (x, y) of the result is (a x + b y + c, d x + e y + f) of the image."""
    from PIL.Image import Resampling, Transform

    return image.transform(image.size, Transform.AFFINE, matrix, Resampling.NEAREST, fillcolor=_colour(image, paper))


def _colour(image: "Image", paper: int) -> int | tuple[int, ...]:
    return paper if image.mode == "L" else (paper, paper, paper)


def _brightness(image: "Image", strength: float, sign: float, _paper: int) -> "Image":
    from PIL import ImageEnhance

    return ImageEnhance.Brightness(image).enhance(1.0 + sign * 0.9 * strength)


def _saturation(image: "Image", strength: float, sign: float, _paper: int) -> "Image":
    from PIL import ImageEnhance

    return ImageEnhance.Color(image).enhance(1.0 + sign * 0.9 * strength)


def _contrast(image: "Image", strength: float, sign: float, _paper: int) -> "Image":
    from PIL import ImageEnhance

    return ImageEnhance.Contrast(image).enhance(1.0 + sign * 0.9 * strength)


def _sharpness(image: "Image", strength: float, sign: float, _paper: int) -> "Image":
    from PIL import ImageEnhance

    return ImageEnhance.Sharpness(image).enhance(1.0 + sign * 0.9 * strength)


def _posterize(image: "Image", strength: float, _sign: float, _paper: int) -> "Image":
    from PIL import ImageOps

    return ImageOps.posterize(image, round(8 - 4 * strength))


def _solarize(image: "Image", strength: float, _sign: float, _paper: int) -> "Image":
    from PIL import ImageOps

    return ImageOps.solarize(image, math.ceil(255 * (1 - strength)))


def _autocontrast(image: "Image", _strength: float, _sign: float, _paper: int) -> "Image":
    from PIL import ImageOps

    return ImageOps.autocontrast(image)


def _equalize(image: "Image", _strength: float, _sign: float, _paper: int) -> "Image":
    from PIL import ImageOps

    return ImageOps.equalize(image)


# The order is that of torchvision's table, and part of every trained figure.
OPERATIONS: dict[str, Operation] = {
    "identity": _identity,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
    "brightness": _brightness,
    "colour": _saturation,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
