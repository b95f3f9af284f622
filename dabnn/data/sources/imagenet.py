"""ImageNet 2012 (Russakovsky et al. 2015), unpacked or as the original archives, which are read without unpacking.

Classes are WordNet ids (`n01440764`), sorted. The training images lie in a folder each class, or in the archive of
archives `ILSVRC2012_img_train.tar`. The validation images lie in such folders too, or flat, as published; then
`imagenet_labels` says what they show.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from dabnn.data.images import EXTENSIONS
from dabnn.data.sources.archive import list_archive
from dabnn.data.sources.folder import class_records, loose_notes, own_splits, to_record
from dabnn.data.sources.imagenet_labels import read_val_wnids
from dabnn.data.sources.members import Member
from dabnn.data.sources.records import FileRead, Record, Source, split_notes
from dabnn.data.sources.tar import scan_tar
from dabnn.data.sources.tree import Found, Tree, extension_of, list_folder
from dabnn.errors import InvalidInputError

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
# The folder of the images in the archive that Kaggle offers.
_KAGGLE_FOLDER = Path("ILSVRC", "Data", "CLS-LOC")
_WNID = re.compile(r"^n\d{8}$")


def imagenet12(path: Path) -> Source:
    """Lists ImageNet 2012.

    Args:
        path: A folder with `train/WNID/*.JPEG` or `ILSVRC2012_img_train.tar`; and with `val/WNID/*.JPEG`, or
            `val/*.JPEG` or `ILSVRC2012_img_val.tar` and labels for them.

    Returns:
        The source.

    Raises:
        InvalidInputError: The source is not laid out like this, or the labels do not fit the images.
    """
    root = _root(path)
    train, val = _train_tree(path, root), _val_tree(path, root)
    notes = [*train.notes(), *val.notes()]
    if any(name.startswith("val/") for name in val.folders):
        both = Tree(root, train.files + val.files, train.folders | val.folders, 0, "", train.read)
        classes, splits = own_splits(both)
        notes += loose_notes(both, ["train", "val"])
        val_how = "folders of classes"
    else:
        classes, records = class_records(train, "train")
        labelled, val_how, left_out = _flat_val(path, root, val, classes)
        splits = {"train": [record for listed in records for record in listed], "val": labelled}
        notes += [*left_out, *loose_notes(train, ["train"])]
    read_as = f"read as imagenet12: {len(classes):,} classes; train from {_place(train)}, val from {_place(val)}"
    return Source(
        name=str(path.resolve()),
        classes=classes,
        splits={split: tuple(listed) for split, listed in splits.items()},
        read=FileRead(root),
        format="imagenet12",
        notes=(f"{read_as}, its labels from {val_how}", *notes, *split_notes(classes, splits)),
        stamp=f"{train.stamp} {val.stamp}",
    )


def is_imagenet12(path: Path) -> bool:
    """Tells whether a folder holds ImageNet: its archive of training images, or `train` with WordNet ids alone."""
    root = _root(path)
    if (root / TRAIN_TAR).is_file():
        return True
    if not (root / "train").is_dir():
        return False
    names = [entry.name for entry in (root / "train").iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return bool(names) and all(_WNID.match(name) for name in names)


def _root(path: Path) -> Path:
    return path / _KAGGLE_FOLDER if (path / _KAGGLE_FOLDER).is_dir() else path


def _place(tree: Tree) -> str:
    place = tree.files[0].place
    return "its folder" if place is None else place[0]


def _train_tree(path: Path, root: Path) -> Tree:
    if (root / "train").is_dir():
        return list_folder(root, ("train",))
    if (root / TRAIN_TAR).is_file():
        return _list_nested(root)
    raise InvalidInputError(
        f"{path}: no training images of imagenet12; looked for train/WNID/*.JPEG and {TRAIN_TAR}, also in "
        f"{_KAGGLE_FOLDER}"
    )


def _list_nested(root: Path) -> Tree:
    path = root / TRAIN_TAR
    files: list[Found] = []
    folders = {"train"}
    num_passed_over = 0
    for outer in scan_tar(path):
        wnid = outer.name.removesuffix(".tar")
        if not _WNID.match(wnid) or not outer.name.endswith(".tar"):
            raise InvalidInputError(f"{path}: has a member {outer.name!r}; it should hold one WNID.tar a class alone")
        folders.add(f"train/{wnid}")
        for inner in _members_of(path, outer):
            if extension_of(inner.name) in EXTENSIONS:
                files.append(Found(f"train/{wnid}/{inner.name}", inner.num_bytes, (TRAIN_TAR, inner.offset)))
            else:
                num_passed_over += not inner.name.endswith("/")
    status = path.stat()
    stamp = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode()).hexdigest()
    return Tree(root, tuple(sorted(files)), frozenset(folders), num_passed_over, stamp, FileRead(root))


def _members_of(path: Path, outer: Member) -> list[Member]:
    try:
        return list(scan_tar(path, outer.offset, outer.offset + outer.num_bytes))
    except InvalidInputError as error:
        raise InvalidInputError(f"{path}: in {outer.name}: {str(error).removeprefix(f'{path}: ')}") from error


def _val_tree(path: Path, root: Path) -> Tree:
    if (root / "val").is_dir():
        tree = list_folder(root, ("val",))
    elif (root / VAL_TAR).is_file():
        tree = list_archive(root / VAL_TAR, VAL_TAR)
    else:
        raise InvalidInputError(
            f"{path}: no validation images of imagenet12; looked for val/WNID/*.JPEG, val/*.JPEG and {VAL_TAR}. To "
            "have them drawn from train, give format folder and val_fraction"
        )
    if not tree.files:
        raise InvalidInputError(f"{tree.root / 'val'}: no validation image in it")
    return tree


def _flat_val(path: Path, root: Path, tree: Tree, classes: Sequence[str]) -> tuple[list[Record], str, tuple[str, ...]]:
    wnids, how = read_val_wnids([root] if root == path else [path, root])
    labels = {wnid: label for label, wnid in enumerate(classes)}
    records = []
    for found in tree.files:
        wnid = wnids.get(found.name.rpartition("/")[2].partition(".")[0])
        if wnid is None:
            raise InvalidInputError(
                f"{tree.root / found.name}: {how} has no label for it; give the labels that belong to these images"
            )
        if wnid in labels:
            records.append(to_record(found, labels[wnid]))
    num_left_out = len(tree.files) - len(records)
    if not num_left_out:
        return records, how, ()
    return records, how, (f"{num_left_out:,} images of val were left out: train has no images of their classes",)
