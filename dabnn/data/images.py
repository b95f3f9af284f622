"""Decoding of stored image bytes: which formats are read, and how a damaged image shows itself.

Resizing and augmentation are in `transforms`.
"""

import io
import struct
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = frozenset({"jpg", "jpeg", "png", "ppm", "bmp", "webp"})
GRAY_MODES = frozenset({"1", "L", "LA"})
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "WEBP")
_EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})


def decode_image(data: bytes) -> "Image":
    """Decodes an image file that was read into memory.

    Args:
        data: The bytes of a JPEG, PNG, PPM, BMP or WebP file.

    Returns:
        The image, fully decoded, in the mode in which it was stored.

    Raises:
        ValueError: The bytes are no such image, are damaged, hold more pixels than Pillow's decompression-bomb
            limit, or have more than 8 bits a channel, which a conversion would clip without a word.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        image.load()
    except UnidentifiedImageError as error:
        raise ValueError(f"not a readable {', '.join(_FORMATS)} image ({len(data)} bytes)") from error
    except (
        OSError,
        SyntaxError,
        EOFError,
        ValueError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if image.mode not in _EIGHT_BIT_MODES:
        raise ValueError(f"pixels of mode {image.mode}; only 8 bits a channel are read, so convert the file first")
    return image


def convert_channels(image: "Image", channels: int) -> "Image":
    """Converts an image to gray (ITU-R 601 luma, as Pillow's and torchvision's) or to RGB; transparency is dropped.

    Args:
        image: An image as `decode_image` returns it.
        channels: 1 for gray, 3 for RGB.

    Returns:
        The image in mode `L` or `RGB`.
    """
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode:
        return image
    # Pillow warns when it converts a palette with transparency; nothing after this reads the transparency.
    image.info.pop("transparency", None)
    return image.convert(mode)
