"""Decoding: the same pixels on a sheet as alone, and refusal before a large image is decoded."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from dabnn.data.images import MAX_PIXELS, Sheet, convert_channels, decode_image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(mode: str, width: int = 21, height: int = 13) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height)).convert(mode)


FILES = {
    "jpeg": encoded(noise("RGB"), "JPEG"),
    "jpeg, gray": encoded(noise("L"), "JPEG"),
    "jpeg, progressive": encoded(noise("RGB"), "JPEG", progressive=True, quality=50),
    "jpeg, not subsampled": encoded(noise("RGB"), "JPEG", subsampling=0),
    "jpeg, with metadata": encoded(
        noise("RGB"), "JPEG", comment=b"c" * 300, dpi=(72, 72), exif=b"Exif\0\0" + b"x" * 50
    ),
    "jpeg, restarts": encoded(noise("RGB", 64, 64), "JPEG", restart_marker_blocks=2),
    "jpeg, cmyk": encoded(noise("CMYK"), "JPEG"),
    "png": encoded(noise("RGB"), "PNG"),
    "png, gray": encoded(noise("L"), "PNG"),
    "png, two chunks": encoded(noise("RGB", 300, 300), "PNG", compress_level=0),
    "png, one bit": encoded(noise("1"), "PNG"),
    "png, palette": encoded(noise("P"), "PNG"),
    "png, alpha": encoded(noise("RGBA"), "PNG"),
    "png, transparent gray": encoded(noise("L"), "PNG", transparency=7),
    "bmp": encoded(noise("RGB"), "BMP"),
    "ppm": encoded(noise("RGB"), "PPM"),
    "webp": encoded(noise("RGB"), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_decoded_as_pillow_opens_it(name: str) -> None:
    expected = Image.open(io.BytesIO(FILES[name]))
    found = decode_image(FILES[name])
    assert (found.mode, found.format) == (expected.mode, expected.format)
    assert np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_holds_the_pixels_that_pillow_decodes(name: str, channels: int) -> None:
    image = convert_channels(decode_image(FILES[name]), channels)
    sheet = Sheet(3, image.size, channels)
    taken = [sheet.decode(position, FILES[name]) for position in (0, 2)]
    pixels = sheet.pixels()
    assert pixels.shape == (3, image.height, image.width, channels)
    assert not pixels[1].any()
    is_plain = name.split(",")[0] in ("jpeg", "png") and decode_image(FILES[name]).mode == image.mode
    assert taken == [is_plain] * 2 or name == "png, transparent gray"
    if taken[0]:
        assert np.array_equal(pixels[0], np.asarray(image).reshape(pixels[0].shape))
        assert np.array_equal(pixels[2], pixels[0])
    sheet.paste(1, image)
    assert np.array_equal(sheet.pixels()[1], np.asarray(image).reshape(pixels[1].shape))


def test_a_sheet_takes_no_image_of_another_size() -> None:
    assert not Sheet(1, (13, 21), 3).decode(0, FILES["jpeg"])
    assert not Sheet(1, (13, 21), 3).decode(0, FILES["png"])


@pytest.mark.parametrize("name", [name for name, data in FILES.items() if Sheet(1, (21, 13), 3).decode(0, data)])
def test_a_sheet_takes_no_damaged_image_that_pillow_refuses(name: str) -> None:
    data = FILES[name]
    generator = np.random.default_rng(3)
    for _ in range(150):
        damaged = bytearray(data[: generator.integers(0, len(data))]) if generator.random() < 0.5 else bytearray(data)
        for place in generator.integers(0, max(len(damaged), 1), 3).tolist():
            if damaged:
                damaged[place] = int(generator.integers(0, 256))
        sheet = Sheet(1, (21, 13), 3)
        if not sheet.decode(0, bytes(damaged)):
            continue
        expected = decode_image(bytes(damaged))
        assert np.array_equal(sheet.pixels()[0], np.asarray(expected))


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims to be of this size and holds no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_header(width: int, height: int) -> bytes:
    small = encoded(noise("RGB", 16, 16), "JPEG")
    frame = small.index(b"\xff\xc0")
    return small[: frame + 5] + struct.pack(">HH", height, width) + small[frame + 9 :]


def bmp_header(width: int, height: int) -> bytes:
    small = encoded(noise("RGB", 16, 16), "BMP")
    return small[:18] + struct.pack("<ii", width, height) + small[26:]


@pytest.mark.parametrize(
    "data",
    [png_header(50_000, 50_000), jpeg_header(50_000, 50_000), bmp_header(50_000, 50_000), b"P6 50000 50000 255\n"],
    ids=["png", "jpeg", "bmp", "ppm"],
)
def test_an_image_of_50000_by_50000_pixels_is_refused_before_it_is_decoded(data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=f"50000 x 50000 pixels; at most {MAX_PIXELS} are read"):
            decode_image(data)


def test_the_largest_image_is_as_large_as_pillow_reads_without_a_warning() -> None:
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    # Large enough for a warning, too small for Pillow's own error.
    with pytest.raises(ValueError, match="12000 x 10000 pixels; at most"):
        decode_image(png_header(12_000, 10_000))


@pytest.mark.parametrize("data", [b"", b"text", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF1234WEBP", b"BM", b"P6"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        decode_image(data)
