"""Shard files: the bytes that webdataset's own writer writes, and an index that fits them."""

import io
from pathlib import Path

import numpy as np
import pytest

from dabnn.data.shards import StoredSample, load_index, write_shard


def some_samples(num: int) -> list[StoredSample]:
    generator = np.random.default_rng(0)
    sizes = [0, 1, 511, 512, 513, 3000]
    extensions = ["bmp", "jpg", "png", "webp"]  # before and after "cls", by which members are sorted
    return [
        StoredSample(f"{n:08d}", f"train/{n}", extensions[n % 4], generator.bytes(sizes[n % 6]), n * 37 % 1000)
        for n in range(num)
    ]


@pytest.mark.parametrize("num", [0, 1, 9, 100])
def test_the_bytes_are_those_of_webdatasets_writer(tmp_path: Path, num: int) -> None:
    from webdataset import TarWriter

    samples, expected = some_samples(num), io.BytesIO()
    with TarWriter(expected, encoder=False, user="dab", group="dab", mtime=0) as tar:
        for sample in samples:
            tar.write({"__key__": sample.key, sample.extension: sample.data, "cls": str(sample.label).encode()})
    shard = write_shard(tmp_path / "a.tar", samples)
    assert (tmp_path / "a.tar").read_bytes() == expected.getvalue()
    assert (shard.num_samples, shard.num_bytes) == (num, len(expected.getvalue()))


def test_the_index_says_where_each_image_lies(tmp_path: Path) -> None:
    samples = some_samples(100)
    index = load_index(tmp_path, write_shard(tmp_path / "a.tar", samples))
    content = (tmp_path / "a.tar").read_bytes()
    found = [content[offset : offset + size] for offset, size in zip(index.offsets, index.sizes, strict=True)]
    assert found == [sample.data for sample in samples]
    assert list(index.keys) == [sample.key for sample in samples]
    assert list(index.labels) == [sample.label for sample in samples]


def test_a_name_that_the_archive_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at most 100 bytes"):
        write_shard(tmp_path / "a.tar", [StoredSample("k" * 98, "x", "png", b"", 0)])
