"""What ImageNet's validation images show, from any of the files in which that was published."""

import csv
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dabnn.data.sources.records import read_lines
from dabnn.errors import InvalidInputError

DEVKIT = "ILSVRC2012_devkit_t12"
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_SYNSETS = ("synsets.txt", "synset_words.txt")
_KAGGLE = "LOC_val_solution.csv"
_MAX_FILE_BYTES = 2**28


def read_val_wnids(folders: Sequence[Path]) -> tuple[Mapping[str, str], str]:
    """Finds the labels of the validation images.

    The devkit numbers the classes in an order of its own, which only its `meta.mat` tells; a list of classes that is
    sorted, such as `synset_words.txt`, belongs to `val.txt` and is not taken for it.

    Args:
        folders: Where to look: there, in the devkit's folder there, and in the devkit's archive.

    Returns:
        The WordNet id of each image, by its name without extension (`ILSVRC2012_val_00000001`); and where it is from.

    Raises:
        InvalidInputError: There are no labels, or they are damaged.
    """
    places = [folder / below for folder in folders for below in ("", DEVKIT, f"{DEVKIT}/data", "devkit/data", "devkit")]
    for place in places:
        if (place / _TRUTH).is_file() and (place / _META).is_file():
            truth, meta = (place / _TRUTH).read_bytes(), (place / _META).read_bytes()
            return _from_devkit(place / _META, truth, meta), str(place / _TRUTH)
    for folder in folders:
        path = folder / f"{DEVKIT}.tar.gz"
        if path.is_file():
            files = _devkit_files(path)
            return _from_devkit(path, files[_TRUTH], files[_META]), str(path)
    for place in places:
        synsets = [place / name for name in _SYNSETS if (place / name).is_file()]
        if (place / "val.txt").is_file() and synsets:
            return _from_list(place / "val.txt", synsets[0]), str(place / "val.txt")
        if (place / _KAGGLE).is_file():
            return _from_kaggle(place / _KAGGLE), str(place / _KAGGLE)
    raise InvalidInputError(
        f"{folders[0]}: the validation images lie flat, and there are no labels for them; looked for {_TRUTH} with "
        f"{_META} (in {DEVKIT}/data too), {DEVKIT}.tar.gz, val.txt with {' or '.join(_SYNSETS)}, and {_KAGGLE}. Put "
        "one of them there, or the images into folders val/WNID"
    )


def _devkit_files(path: Path) -> dict[str, bytes]:
    files = {}
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                stream = archive.extractfile(member) if name in (_TRUTH, _META) and member.isreg() else None
                if stream is not None and member.size <= _MAX_FILE_BYTES:
                    files[name] = stream.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InvalidInputError(f"{path}: damaged or truncated ({error}); get it again") from error
    missing = {_TRUTH, _META} - files.keys()
    if missing:
        raise InvalidInputError(f"{path}: no {' and no '.join(sorted(missing))} in it; get it again")
    return files


def _from_devkit(path: Path, truth: bytes, meta: bytes) -> dict[str, str]:
    wnids = _meta_wnids(path, meta)
    labels = {}
    for number, line in enumerate(truth.split(), 1):
        if not line.isdigit() or int(line) not in wnids:
            raise InvalidInputError(
                f"{path.with_name(_TRUTH)}: line {number} is {line.decode('latin1')!r}, none of the "
                f"{len(wnids):,} class numbers of {_META}; both must be from one devkit"
            )
        labels[f"ILSVRC2012_val_{number:08d}"] = wnids[int(line)]
    return labels


def _meta_wnids(path: Path, data: bytes) -> dict[int, str]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        synsets = np.atleast_1d(loadmat(io.BytesIO(data), squeeze_me=True)["synsets"])
        names = synsets.dtype.names or ()
        leaves = [row for row in synsets if "num_children" not in names or int(row["num_children"]) == 0]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
    except (MatReadError, ValueError, TypeError, KeyError, IndexError, NotImplementedError, OSError) as error:
        raise InvalidInputError(
            f"{path}: {_META} has no table `synsets` with ILSVRC2012_ID and WNID ({error}); get the devkit again"
        ) from error


def _from_list(path: Path, synsets_path: Path) -> dict[str, str]:
    synsets = [line.split()[0] for line in read_lines(synsets_path, "it names one class a line")]
    labels = {}
    for number, line in enumerate(read_lines(path, "it names an image and its class a line"), 1):
        name, _, label = line.rpartition(" ")
        if not label.isdigit() or int(label) >= len(synsets):
            raise InvalidInputError(
                f"{path}: line {number} is {line!r}, not a file name and a number from 0 to {len(synsets) - 1}, a line "
                f"of {synsets_path}"
            )
        labels[name.strip().rpartition("/")[2].partition(".")[0]] = synsets[int(label)]
    return labels


def _from_kaggle(path: Path) -> dict[str, str]:
    labels = {}
    for row in csv.DictReader(read_lines(path, "it has a line an image")):
        name, prediction = row.get("ImageId"), row.get("PredictionString")
        if not name or not prediction or not prediction.split():
            raise InvalidInputError(f"{path}: no columns ImageId and PredictionString with a WordNet id first")
        labels[name] = prediction.split()[0]
    return labels
