"""Small archives for the tests of the sources, each written by the tool that users would take."""

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from dabnn.data.sources import Source


def image_file(number: int, kind: str = "PNG", side: int = 5) -> bytes:
    """Returns an image that differs from that of every other number."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def class_files(num: Mapping[str, int], parent: str = "") -> dict[str, bytes]:
    """Returns so many images of each class, by the name `PARENT/CLASS/N.png`."""
    prefix = f"{parent}/" if parent else ""
    names = [f"{prefix}{name}/{position}.png" for name, count in num.items() for position in range(count)]
    return {name: image_file(hash_of(name)) for name in names}


def hash_of(name: str) -> int:
    """Returns a number of a name that is the same in each process."""
    return int.from_bytes(name.encode()[-8:], "little")


def write_files(root: Path, files: Mapping[str, bytes]) -> Path:
    """Writes files below a folder."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def tar_bytes(files: Mapping[str, bytes], mode: str = "w", layout: int = tarfile.GNU_FORMAT) -> bytes:
    """Returns a tar archive of files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=layout) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def write_zip(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    """Writes a zip archive of files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def contents(source: Source, split: str) -> dict[str, list[bytes]]:
    """Returns the images of each class of a split, sorted."""
    found: dict[str, list[bytes]] = {}
    for record in source.splits[split]:
        found.setdefault(source.classes[record.label], []).append(source.read(record))
    return {name: sorted(images) for name, images in found.items()}
