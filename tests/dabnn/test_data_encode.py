"""Images that are made smaller, or written in another format, before they are stored."""

import io
from pathlib import Path

import numpy as np
import pytest
from image_tree import write_tree
from PIL import Image

from dabnn.data import build_dataset, check_dataset, load_manifest
from dabnn.data.archive import ArchivedSample, read_archive
from dabnn.data.encode import make_encoding
from dabnn.errors import InvalidInputError


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_the_longer_shorter_side_is_resized_and_the_aspect_kept() -> None:
    encoding = make_encoding(resize=10)
    assert encoding is not None
    data, extension, image = encoding.apply(file_of(noise(40, 20)), "png")
    assert (image.size, extension) == ((20, 10), "png")
    assert Image.open(io.BytesIO(data)).size == (20, 10)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(image))


@pytest.mark.parametrize(("width", "height"), [(10, 40), (9, 9)])
def test_an_image_that_is_small_enough_keeps_its_file(width: int, height: int) -> None:
    encoding = make_encoding(resize=10)
    assert encoding is not None
    whole = file_of(noise(width, height), "BMP")
    assert encoding.apply(whole, "bmp")[:2] == (whole, "bmp")


@pytest.mark.parametrize(
    ("kind", "extension", "expected"),
    [("JPEG", "jpeg", "jpg"), ("WEBP", "webp", "webp"), ("PNG", "png", "png"), ("PPM", "ppm", "png")],
)
def test_a_resized_image_keeps_its_format_where_that_can_be(kind: str, extension: str, expected: str) -> None:
    encoding = make_encoding(resize=8)
    assert encoding is not None
    data, found, _ = encoding.apply(file_of(noise(20, 20), kind), extension)
    assert (found, Image.open(io.BytesIO(data)).format) == (expected, {"jpg": "JPEG"}.get(expected, expected.upper()))


def test_an_image_in_the_wanted_format_keeps_its_file() -> None:
    encoding = make_encoding(encoding="jpeg", quality=50)
    assert encoding is not None
    whole = file_of(noise(8, 8), "JPEG")
    assert encoding.apply(whole, "jpeg")[:2] == (whole, "jpeg")


def test_png_loses_nothing_and_quality_makes_files_larger() -> None:
    lossless, coarse, fine = (make_encoding(None, *options) for options in (("png", None), ("webp", 5), ("webp", 95)))
    assert lossless is not None
    assert coarse is not None
    assert fine is not None
    image = noise(16, 16)
    assert np.array_equal(np.asarray(lossless.apply(file_of(image, "BMP"), "bmp")[2]), np.asarray(image))
    sizes = [len(encoding.apply(file_of(image), "png")[0]) for encoding in (coarse, fine)]
    assert sizes[0] < sizes[1]


def test_palettes_and_gray_survive_as_what_a_network_sees() -> None:
    encoding = make_encoding(encoding="jpeg", resize=4)
    assert encoding is not None
    assert encoding.apply(file_of(noise(8, 8).convert("P")), "png")[2].mode == "RGB"
    assert encoding.apply(file_of(noise(8, 8).convert("LA")), "png")[2].mode == "L"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"encoding": "jpg"}, "Did you mean 'jpeg'"),
        ({"resize": 0}, "resize: 0 pixels"),
        ({"encoding": "jpeg", "quality": 101}, "quality: 101 is not between"),
        ({"encoding": "png", "quality": 90}, "png loses nothing"),
        ({"quality": 90}, "stored as they came"),
    ],
)
def test_options_that_cannot_be_or_do_nothing_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        make_encoding(**options)  # type: ignore[arg-type]


def test_the_manifest_says_what_was_done_and_describes_what_is_stored(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images", size=(12, 20))
    encoding = make_encoding(resize=6, encoding="jpeg", quality=80)
    manifest = build_dataset(str(source), tmp_path / "data", encoding=encoding)
    assert load_manifest(tmp_path / "data") == manifest
    assert manifest.stored == {"resize": 6, "encoding": "jpeg", "quality": 80}
    assert (manifest.image.height, manifest.image.width) == (6, 10)
    assert (manifest.image.min_width, manifest.image.max_width) == (10, 10)
    stored = [
        np.asarray(Image.open(io.BytesIO(sample.images[0])))
        for shard in manifest.splits["train"].shards
        for sample in read_archive(tmp_path / "data" / shard.name)
        if isinstance(sample, ArchivedSample)
    ]
    np.testing.assert_allclose(manifest.image.mean, np.stack(stored).mean((0, 1, 2)) / 255, rtol=1e-12)
    assert check_dataset(tmp_path / "data") == []
    assert build_dataset(str(source), tmp_path / "as-it-came").stored is None


def test_shards_are_planned_for_what_is_stored(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images", size=(64, 64), num_train=20)
    whole = build_dataset(str(source), tmp_path / "whole", shard_bytes=50_000)
    small = build_dataset(str(source), tmp_path / "small", shard_bytes=50_000, encoding=make_encoding(resize=8))
    assert len(whole.splits["train"].shards) > 10
    assert len(small.splits["train"].shards) == 8


def test_an_image_too_large_for_the_format_is_named(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images")
    Image.new("L", (16_384, 1)).save(source / "train" / "ant" / "0.png")
    with pytest.raises(InvalidInputError, match=r"train/ant/0\.png \(cannot be written as webp"):
        build_dataset(str(source), tmp_path / "data", encoding=make_encoding(encoding="webp"))
