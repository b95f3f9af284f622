"""The data sets of `data.py`: the same images as an image folder, as our shards, and in the peers' own formats.

CIFAR-10 comes as an image folder of JPEG files, 32 x 32. Sketches are made from Omniglot's drawings: 105 x 105 strokes,
turned, scaled and shifted a little with a fixed seed, drawn at 224 x 224 in gray and stored as PNG. Shards are those of
`dab data build`; plain webdataset reads the same files. The peers' formats hold the very bytes of the image files, in a
mixed order, as their manuals advise.
"""

import io
import random
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_contender import Task

from dabnn.data import build_dataset

SKETCH_SIZE = 224
NUM_SKETCHES = 10_000
_SHARDS, _MDS, _LITDATA = "shards", "mds", "litdata"
_CIFAR_BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def cifar_task(folder: Path) -> Task:
    """Returns the task on an image folder of CIFAR-10."""
    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
    return Task("crop_flip", 32, 3, mean, std, len(_images(folder)), "jpg")


def sketch_task(folder: Path) -> Task:
    """Returns the task on an image folder of sketches."""
    return Task("sketch", SKETCH_SIZE, 1, (0.06,), (0.93,), len(_images(folder)), "png")


def prepare(folder: Path, work: Path, num_shards: int | None = None) -> Path:
    """Writes a data set in all formats, each unless it is there.

    Args:
        folder: Image folder with `train` and `val`.
        work: Where to.
        num_shards: About how many shards; None: as each format's manual has it.

    Returns:
        `work`, which holds `folder`, `shards`, `mds` and `litdata`.
    """
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "folder").exists():
        (work / "folder").symlink_to(folder.resolve())
    images = _images(folder)
    random.Random(0).shuffle(images)
    for name, write in ((_SHARDS, _write_shards), (_MDS, _write_mds), (_LITDATA, _write_litdata)):
        if not (work / name).exists():
            print(f"writing {work / name}")
            shutil.rmtree(work / f"{name}.partial", ignore_errors=True)
            write(folder, work / f"{name}.partial", images, num_shards)
            (work / f"{name}.partial").rename(work / name)
    return work


def _images(folder: Path) -> list[tuple[Path, int]]:
    classes = sorted(path for path in (folder / "train").iterdir() if path.is_dir())
    return [(path, label) for label, place in enumerate(classes) for path in sorted(place.iterdir())]


def _write_shards(folder: Path, dest: Path, images: list[tuple[Path, int]], num_shards: int | None) -> None:
    if num_shards is None:
        build_dataset(str(folder), dest, num_processes=2)
        return
    # A member of a tar file takes whole blocks of 512 bytes, with one before it; a label is a member, too.
    num_bytes = sum(1024 + 512 + -(-path.stat().st_size // 512) * 512 for path, _ in images)
    build_dataset(str(folder), dest, num_processes=2, shard_bytes=num_bytes // num_shards)


def _write_mds(_: Path, dest: Path, images: list[tuple[Path, int]], num_shards: int | None) -> None:
    from streaming import MDSWriter

    num_bytes = sum(path.stat().st_size + 32 for path, _ in images)
    limits = {} if num_shards is None else {"size_limit": num_bytes // num_shards}
    with MDSWriter(out=str(dest), columns={"image": "bytes", "label": "int"}, progress_bar=False, **limits) as writer:
        for path, label in images:
            writer.write({"image": path.read_bytes(), "label": label})


def _write_litdata(_: Path, dest: Path, images: list[tuple[Path, int]], num_shards: int | None) -> None:
    import litdata

    sizes: dict[str, Any] = {"chunk_bytes": "64MB"} if num_shards is None else {"chunk_size": len(images) // num_shards}
    stored = as_litdata_image if images[0][0].suffix == ".jpg" else as_litdata_bytes
    litdata.optimize(
        stored,
        [(str(path), label) for path, label in images],
        output_dir=str(dest),
        num_workers=2,
        start_method="spawn",
        **sizes,
    )


def as_litdata_image(item: tuple[str, int]) -> dict[str, Any]:
    """Returns an image that litdata decodes itself, to a tensor in RGB."""
    import litdata

    return {"image": litdata.Image(path=item[0]), "label": item[1]}


def as_litdata_bytes(item: tuple[str, int]) -> dict[str, Any]:
    """Returns the bytes of an image file, to be decoded in gray by Pillow."""
    return {"image": Path(item[0]).read_bytes(), "label": item[1]}


def make_sketches(omniglot: Path, dest: Path, num_images: int) -> Path:
    """Makes an image folder of sketches, unless it is there.

    Args:
        omniglot: Image folder of drawings, dark on light, one class a character.
        dest: Where to.
        num_images: Training images; in addition there is one of each class for `val`.

    Returns:
        `dest`.
    """
    if dest.exists():
        return dest
    print(f"making {dest}")
    drawings = sorted(omniglot.glob("*/*/*.png"))
    random.Random(0).shuffle(drawings)
    classes = {path.parent.name: path for path in drawings[:num_images]}
    partial = dest.with_name(f"{dest.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    jobs = [("train", drawings[number % len(drawings)], number) for number in range(num_images)]
    jobs += [("val", path, num_images + number) for number, path in enumerate(classes.values())]
    for split, drawing, number in jobs:
        target = partial / split / drawing.parent.name / f"{drawing.stem}_{number:05d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(_sketch(drawing, number))
    partial.rename(dest)
    return dest


def _sketch(drawing: Path, seed: int) -> bytes:
    """Draws strokes at the size of sketches: turned by up to 15 degrees, scaled by 0.8 to 1, shifted."""
    from PIL import Image

    draw = random.Random(seed)
    with Image.open(drawing) as stored:
        strokes = stored.convert("L").resize((SKETCH_SIZE, SKETCH_SIZE), Image.Resampling.BICUBIC)
    strokes = strokes.rotate(draw.uniform(-15, 15), Image.Resampling.BICUBIC, fillcolor=255)
    side = round(SKETCH_SIZE * draw.uniform(0.8, 1))
    paper = Image.new("L", (SKETCH_SIZE, SKETCH_SIZE), 255)
    corner = tuple(draw.randint(0, SKETCH_SIZE - side) for _ in range(2))
    paper.paste(strokes.resize((side, side), Image.Resampling.BICUBIC), corner)
    buffer = io.BytesIO()
    paper.save(buffer, "PNG")
    return buffer.getvalue()


def make_cifar_archive(folder: Path, dest: Path) -> Path:
    """Packs an image folder of CIFAR-10 as `cifar-10-python.tar.gz`, in the published layout, unless it is there.

    Args:
        folder: Image folder with `train` and `val`.
        dest: Folder of the archive.

    Returns:
        The archive.
    """
    archive = dest / "cifar-10-python.tar.gz"
    if archive.exists():
        return archive
    print(f"making {archive}")
    dest.mkdir(parents=True, exist_ok=True)
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w:gz", compresslevel=6) as tar:
        for name, data in _cifar_files(folder):
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    partial.rename(archive)
    return archive


def _cifar_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    import numpy as np
    from PIL import Image

    classes = sorted(path.name for path in (folder / "train").iterdir())
    yield "batches.meta", _pickle_of_python_2({"label_names": classes})
    draw = random.Random(0)
    images = {}
    for split in ("train", "val"):
        images[split] = [(path, classes.index(path.parent.name)) for path in sorted(folder.glob(f"{split}/*/*.jpg"))]
        draw.shuffle(images[split])
    fifth = len(images["train"]) // 5
    parts = [images["train"][start : start + fifth] for start in range(0, 5 * fifth, fifth)] + [images["val"]]
    for name, part in zip(_CIFAR_BATCHES, parts, strict=True):
        rows = [np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1).reshape(-1) for path, _ in part]
        labels = [label for _, label in part]
        table = {"batch_label": name, "labels": labels, "data": np.stack(rows), "filenames": [p.name for p, _ in part]}
        yield name, _pickle_of_python_2(table)


def _pickle_of_python_2(table: dict[str, Any]) -> bytes:
    """Pickles as the published archive is: protocol 2, with the strings of Python 2."""
    body = b"}(" + b"".join(_old_value(key) + _old_value(value) for key, value in table.items()) + b"u"
    return b"\x80\x02" + body + b"."


def _old_string(data: bytes) -> bytes:
    return b"T" + len(data).to_bytes(4, "little") + data


def _old_value(item: Any) -> bytes:
    if isinstance(item, str):
        return _old_string(item.encode())
    if isinstance(item, list):
        return b"](" + b"".join(_old_value(entry) for entry in item) + b"e"
    if isinstance(item, int):
        return b"K" + bytes([item])
    shape = b"".join(b"M" + size.to_bytes(2, "little") for size in item.shape)
    dtype = b"cnumpy\ndtype\n" + _old_string(b"u1") + b"K\x00K\x01\x87R(K\x03" + _old_string(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + _old_string(b"b") + b"\x87R"
    return made + b"(K\x01" + shape + b"\x86" + dtype + b"\x89" + _old_string(item.tobytes()) + b"tb"
