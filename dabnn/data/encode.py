"""What may be done to an image before it is stored: made smaller, and written in another file format.

Without either, images are stored as they came. What was done is in the manifest (`Manifest.stored`).
"""

import io
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dabnn.choices import unknown_choice
from dabnn.data.images import GRAY_MODES, convert_channels, decode_image
from dabnn.errors import InvalidInputError

if TYPE_CHECKING:
    from PIL.Image import Image

ENCODINGS = ("png", "jpeg", "webp")
DEFAULT_QUALITY = 90
_EXTENSIONS = {"png": "png", "jpeg": "jpg", "webp": "webp"}
# An image that only becomes smaller keeps its file format, where that is one of ours.
_ENCODING_OF = {"jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
_LOSSLESS = ("png",)


@dataclass(frozen=True)
class Encoding:
    """How images are changed before they are stored; `make_encoding` makes one.

    Attributes:
        resize: What the shorter side becomes, in pixels, where it is longer: Pillow's bicubic filter, which averages
            over the pixels that become one. None: nothing is resized.
        encoding: One of `ENCODINGS`; None keeps an image's own, or PNG where that is another one (BMP, PPM).
        quality: Of JPEG and WebP, 1 to 100.
    """

    resize: int | None
    encoding: str | None
    quality: int

    def stored(self) -> dict[str, Any]:
        """Returns what the manifest says of it."""
        return asdict(self)

    def apply(self, data: bytes, extension: str) -> tuple[bytes, str, "Image"]:
        """Changes an image file.

        Args:
            data: The file.
            extension: Its extension.

        Returns:
            The file to store, its extension, and the image that it decodes to. An image that is not resized keeps its
            file where it has the wanted format already.

        Raises:
            ValueError: The file does not decode, or the image is too large for the format (WebP: 16,383 pixels).
        """
        image = decode_image(data)
        wanted = self.encoding or _ENCODING_OF.get(extension, "png")
        is_resized = self.resize is not None and min(image.size) > self.resize
        if not is_resized and (self.encoding is None or _ENCODING_OF.get(extension, extension) == wanted):
            return data, extension, image
        image = convert_channels(image, 1 if image.mode in GRAY_MODES else 3)
        if is_resized:
            image = _resized(image, int(self.resize or 0))
        stored = self._file(image, wanted)
        return stored, _EXTENSIONS[wanted], image if wanted in _LOSSLESS else decode_image(stored)

    def _file(self, image: "Image", wanted: str) -> bytes:
        buffer = io.BytesIO()
        options: dict[str, Any] = {} if wanted in _LOSSLESS else {"quality": self.quality}
        try:
            image.save(buffer, wanted.upper(), **options)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot be written as {wanted}: {error}") from error
        return buffer.getvalue()


def make_encoding(
    resize: int | None = None, encoding: str | None = None, quality: int | None = None
) -> Encoding | None:
    """Returns how images are changed before they are stored, or None where they are not.

    Args:
        resize: What the shorter side becomes, in pixels, where it is longer.
        encoding: One of `ENCODINGS`.
        quality: Of JPEG and WebP, 1 to 100; default 90.

    Raises:
        InvalidInputError: The format is unknown, or a number is out of its range, or is not used.
    """
    if encoding is not None and encoding not in ENCODINGS:
        raise unknown_choice("encoding", encoding, ENCODINGS)
    if resize is not None and resize < 1:
        raise InvalidInputError(f"resize: {resize} pixels; the shorter side needs at least 1")
    if quality is not None and not 1 <= quality <= 100:
        raise InvalidInputError(f"quality: {quality} is not between 1 and 100; {DEFAULT_QUALITY} is the default")
    if quality is not None and (encoding in _LOSSLESS or (resize is None and encoding is None)):
        how = f"{encoding} loses nothing" if encoding else "images are stored as they came"
        raise InvalidInputError(
            f"quality: {quality} has no effect, since {how}; give it with jpeg or webp, or leave it out"
        )
    if resize is None and encoding is None:
        return None
    return Encoding(resize, encoding, quality or DEFAULT_QUALITY)


def _resized(image: "Image", shorter_side: int) -> "Image":
    from PIL.Image import Resampling

    shorter = min(image.size)
    size = (shorter_side * image.width // shorter, shorter_side * image.height // shorter)
    return image.resize(size, Resampling.BICUBIC)
