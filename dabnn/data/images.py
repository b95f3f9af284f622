"""Decoding of stored image bytes: which formats are read, and how a damaged image shows itself.

`decode_image` reads any of them. `Sheet` decodes a whole batch of images of one size side by side: what Pillow spends
on a file object, on metadata and on handing over pixels is half of the time of an image of 32 x 32. The decoders and
thus the pixels are the same. Resizing and augmentation are in `transforms`.
"""

import io
import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = frozenset({"jpg", "jpeg", "png", "ppm", "bmp", "webp"})
GRAY_MODES = frozenset({"1", "L", "LA"})
# Pillow warns above this: 256 MiB of RGB, or 9459 x 9459 pixels.
MAX_PIXELS = 2**28 // 3
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "WEBP")
_EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_PNG_CHUNK = struct.Struct(">I4s")
_PNG_HEADER = struct.Struct(">I4sIIBBBBBI")
_JPEG_FRAME = struct.Struct(">BHHB")
_START_OF_FRAME = frozenset({0xC0, 0xC1, 0xC2})
_WITHOUT_LENGTH = frozenset({0x00, 0x01, *range(0xD0, 0xDB), 0xFF})


def decode_image(data: bytes) -> "Image":
    """Decodes an image file that was read into memory.

    Args:
        data: The bytes of a JPEG, PNG, PPM, BMP or WebP file.

    Returns:
        The image, fully decoded, in the mode in which it was stored.

    Raises:
        ValueError: The bytes are no such image, are damaged, hold more than `MAX_PIXELS` pixels, which is told before
            any is decoded, or have more than 8 bits a channel, which a conversion would clip without a word.
    """
    from PIL.Image import DecompressionBombError

    try:
        image = _open(data)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} are read, so that one file cannot take "
                "all memory; make it smaller before building"
            )
        image.load()
    except (
        OSError,
        SyntaxError,
        EOFError,
        ValueError,
        struct.error,
        zlib.error,
        DecompressionBombError,
    ) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if image.mode not in _EIGHT_BIT_MODES:
        raise ValueError(f"pixels of mode {image.mode}; only 8 bits a channel are read, so convert the file first")
    return image


def _open(data: bytes) -> "Image":
    """Reads an image's header as `PIL.Image.open` does, without its warning about large images."""
    file = io.BytesIO(data)
    if data.startswith(_JPEG):
        from PIL.JpegImagePlugin import JpegImageFile

        return JpegImageFile(file)
    if data.startswith(_PNG):
        from PIL.PngImagePlugin import PngImageFile

        return PngImageFile(file)
    if data.startswith(b"BM"):
        from PIL.BmpImagePlugin import BmpImageFile

        return BmpImageFile(file)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        from PIL.WebPImagePlugin import WebPImageFile

        return WebPImageFile(file)
    if data[:1] == b"P" and data[1:2] in b"123456fy":
        from PIL.PpmImagePlugin import PpmImageFile

        return PpmImageFile(file)
    raise ValueError(f"not a readable {', '.join(_FORMATS)} image ({len(data)} bytes)")


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


class Sheet:
    """Room for `num` images of one size, one below the other, that become one array.

    Args:
        num: Images.
        size: Width and height of each.
        channels: 1 for gray, 3 for RGB.
    """

    def __init__(self, num: int, size: tuple[int, int], channels: int) -> None:
        from PIL import Image, _imaging

        self._size, self._channels = size, channels
        self._image = Image.new("L" if channels == 1 else "RGB", (size[0], size[1] * num))
        self._decoders = {"jpeg": _imaging.jpeg_decoder, "zip": _imaging.zip_decoder}

    def decode(self, position: int, data: bytes) -> bool:
        """Decodes an image straight into its place, where it has the size and the channels of the sheet.

        Args:
            position: The place, from 0.
            data: The bytes of an image file.

        Returns:
            Whether that was done. If not, `decode_image` tells what the image is, or what is wrong with it.
        """
        found = _plain(data)
        if found is None or found.size != self._size or found.mode != self._image.mode:
            return False
        decoder = self._decoders[found.codec](found.mode, found.mode, *found.arguments)
        try:
            decoder.setimage(self._image.im, self._box(position))
            num_used, error = decoder.decode(found.data)
        finally:
            decoder.cleanup()
        # Negative: the image is complete.
        return bool(num_used < 0 and error == 0)

    def paste(self, position: int, image: "Image") -> None:
        """Puts an image that has the size and the mode of the sheet into its place."""
        self._image.paste(image, self._box(position))

    def pixels(self) -> NDArray[np.uint8]:
        """Returns the images, uint8 (num, height, width, channels); what nothing was put into is black or undefined."""
        width, height = self._size
        return np.array(self._image).reshape(-1, height, width, self._channels)

    def _box(self, position: int) -> tuple[int, int, int, int]:
        width, height = self._size
        return (0, height * position, width, height * (position + 1))


class _Plain(NamedTuple):
    """An image whose bytes one decoder of Pillow turns into gray or RGB without further ado."""

    codec: str
    arguments: tuple[str, ...]
    mode: str
    size: tuple[int, int]
    data: bytes


def _plain(data: bytes) -> _Plain | None:
    try:
        if data.startswith(_JPEG):
            return _plain_jpeg(data)
        return _plain_png(data) if data.startswith(_PNG) else None
    except (struct.error, IndexError):
        return None


def _plain_jpeg(data: bytes) -> _Plain | None:
    """Finds the frame header (ITU-T T.81, B.2) of a JPEG in gray or YCbCr."""
    position = 2
    while data[position] == 0xFF and data[position + 1] not in _WITHOUT_LENGTH:
        if data[position + 1] in _START_OF_FRAME:
            bits, height, width, components = _JPEG_FRAME.unpack_from(data, position + 4)
            mode = {1: "L", 3: "RGB"}.get(components)
            return _Plain("jpeg", ("",), mode, (width, height), data) if mode and bits == 8 else None
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
    return None


def _plain_png(data: bytes) -> _Plain | None:
    """Finds the compressed pixels of a PNG (ISO/IEC 15948) of 8 bits, gray or RGB, with nothing before them."""
    _, _, width, height, bits, colour, *methods, checksum = _PNG_HEADER.unpack_from(data, len(_PNG))
    mode = {0: "L", 2: "RGB"}.get(colour)
    if mode is None or bits != 8 or any(methods) or zlib.crc32(data[12:29]) != checksum:
        return None
    position, parts = 33, list[bytes]()
    while True:
        num_bytes, kind = _PNG_CHUNK.unpack_from(data, position)
        if kind != b"IDAT":
            return _Plain("zip", (), mode, (width, height), b"".join(parts)) if parts else None
        parts.append(data[position + 8 : position + 8 + num_bytes])
        position += 12 + num_bytes
