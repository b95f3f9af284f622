"""Parts of an image: its centre, the ten crops whose answers `dabnn.evaluate` averages, and any part of it at random.

The positions are those of torchvision's `CenterCrop`, `TenCrop` and `RandomResizedCrop`. Pixels are cut out as they
are: the reference program (arXiv 1804.02941) went through floating point on the way, which lowered 159 of the 256 gray
levels by one.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

Box = tuple[int, int, int, int]
NUM_CROPS = 10
NUM_ATTEMPTS = 10
NUMBERS_PER_ATTEMPT = 4
_FLOAT32_BITS = 24


def centre_box(size: tuple[int, int], length: int) -> Box:
    """Returns the middle square of an image, as (left, top, right, bottom); half pixels go to the even side.

    Args:
        size: Width and height of the image, at least `length`.
        length: Side of the square.
    """
    left, top = (round((total - length) / 2) for total in size)
    return (left, top, left + length, top + length)


def ten_crops(image: "Image", length: int) -> "Image":
    """Cuts out the four corners and the centre of an image, and the same five of its mirror image.

    Args:
        image: At least `length` wide and high.
        length: Side of a crop.

    Returns:
        An image of `length` x 10 `length`, one crop below the other: top left, top right, bottom left, bottom right,
        centre, then those of the mirror image.
    """
    from PIL import Image

    crops = Image.new(image.mode, (length, NUM_CROPS * length))
    boxes = _five_boxes(image.size, length)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for number, (source, box) in enumerate([(side, box) for side in (image, mirrored) for box in boxes]):
        crops.paste(source.crop(box), (0, number * length))
    return crops


def _five_boxes(size: tuple[int, int], length: int) -> list[Box]:
    right, bottom = (total - length for total in size)
    corners = [(left, top, left + length, top + length) for top in (0, bottom) for left in (0, right)]
    return [*corners, centre_box(size, length)]


def random_part(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], numbers: Sequence[float]
) -> Box | None:
    """Returns a rectangle of random area, aspect and position, where one of ten attempts fits into the image.

    area ~ U(scale) * width * height, aspect = width / height ~ exp(U(log ratio)), position uniform.

    Args:
        size: Width and height of the image.
        scale: Least and largest area, as a share.
        ratio: Least and largest aspect.
        numbers: 10 x 4 numbers in [0, 1): area, aspect, top and left of each attempt.

    Returns:
        (left, top, right, bottom), or None.
    """
    image_width, image_height = size
    shortest, widest = math.log(ratio[0]), math.log(ratio[1])
    for start in range(0, NUM_ATTEMPTS * NUMBERS_PER_ATTEMPT, NUMBERS_PER_ATTEMPT):
        share, aspect, down, across = numbers[start : start + NUMBERS_PER_ATTEMPT]
        area = image_width * image_height * (scale[0] + share * (scale[1] - scale[0]))
        aspect = math.exp(shortest + aspect * (widest - shortest))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= image_width and 0 < height <= image_height:
            top, left = int(down * (image_height - height + 1)), int(across * (image_width - width + 1))
            return (left, top, left + width, top + height)
    return None


def any_part(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], numbers: Sequence[float]
) -> Box:
    """Returns what `random_part` does; without a fit, the largest centred part with an aspect within `ratio`."""
    found = random_part(size, scale, ratio, numbers)
    if found is not None:
        return found
    width, height = size
    if width < min(ratio) * height:
        height = round(width / min(ratio))
    elif width > max(ratio) * height:
        width = round(height * max(ratio))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return (left, top, left + width, top + height)


def part_of_resized(image: "Image", size: tuple[int, int], box: Box) -> "Image":
    """Returns `image.resize(size).crop(box)`, bilinear and antialiased, computing no more of it than it must.

    Pillow resizes across, then down, each from coefficients of the edges, which it takes in float32. Of a square image
    those of a part are the same where edges and scale are exact, as they are for drawings whose side becomes 256. Of
    others newer versions of Pillow choose the direction that comes first by the size of the part.

    Args:
        image: The image.
        size: Width and height that it is resized to.
        box: The part of that, as (left, top, right, bottom).
    """
    from PIL.Image import Resampling

    if image.size == size:
        return image.crop(box)
    is_square = image.width == image.height and size[0] == size[1]
    if not (is_square and _is_exact(image.width, size[0])):
        return image.resize(size, Resampling.BILINEAR).crop(box)
    scale = image.width / size[0]
    left, top, right, bottom = (edge * scale for edge in box)
    reach = math.ceil(max(scale, 1.0)) + 1
    first, last = max(math.floor(top) - reach, 0), min(math.ceil(bottom) + reach, image.height)
    width, height = box[2] - box[0], box[3] - box[1]
    rows = image.crop((0, first, image.width, last))
    across = rows.resize((width, last - first), Resampling.BILINEAR, box=(left, 0, right, last - first))
    return across.resize((width, height), Resampling.BILINEAR, box=(0, top - first, width, bottom - first))


def _is_exact(source: int, target: int) -> bool:
    denominator = target // math.gcd(source, target)
    is_power_of_two = denominator & (denominator - 1) == 0
    return is_power_of_two and (source * denominator).bit_length() <= _FLOAT32_BITS
