"""ImageNet 2012, unpacked and as the original archives, with labels from each file in which they were published."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat
from source_files import contents, image_file, tar_bytes, write_files

from dabnn.data.sources import open_source
from dabnn.errors import InvalidInputError

# The devkit numbers its classes otherwise than they are sorted: 1 is the last here.
WNIDS = ("n02119789", "n01440764", "n01443537")
CLASSES = tuple(sorted(WNIDS))
TRUTH = (2, 1, 3, 1, 2)
TRAIN = {wnid: {f"{wnid}_{i}.JPEG": image_file(w * 10 + i, "JPEG") for i in range(3)} for w, wnid in enumerate(WNIDS)}
VAL = {f"ILSVRC2012_val_{i:08d}.JPEG": image_file(100 + i, "JPEG") for i in range(1, len(TRUTH) + 1)}
EXPECTED_VAL = {
    wnid: sorted(data for data, truth in zip(VAL.values(), TRUTH, strict=True) if WNIDS[truth - 1] == wnid)
    for wnid in WNIDS
}
TRUTH_NAME = "ILSVRC2012_validation_ground_truth.txt"


def meta() -> bytes:
    """Returns a `meta.mat` of the devkit's form: a struct array, of which the inner nodes come after the classes."""
    fields: list[Any] = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(number, wnid, "some words", "a gloss", 0) for number, wnid in enumerate(WNIDS, 1)]
    synsets = np.array([*rows, (4, "n00001740", "entity", "all", 3)], dtype=fields).reshape(-1, 1)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    return buffer.getvalue()


def truth() -> bytes:
    return "".join(f"{number}\n" for number in TRUTH).encode()


def train_folders() -> dict[str, bytes]:
    return {f"train/{wnid}/{name}": data for wnid, files in TRAIN.items() for name, data in files.items()}


def train_tar() -> dict[str, bytes]:
    return {"ILSVRC2012_img_train.tar": tar_bytes({f"{wnid}.tar": tar_bytes(files) for wnid, files in TRAIN.items()})}


def val_folders() -> dict[str, bytes]:
    return {f"val/{WNIDS[number - 1]}/{name}": data for (name, data), number in zip(VAL.items(), TRUTH, strict=True)}


LABELS = {
    "the devkit's files": {TRUTH_NAME: truth(), "meta.mat": meta()},
    "the devkit's folder": {
        f"ILSVRC2012_devkit_t12/data/{TRUTH_NAME}": truth(),
        "ILSVRC2012_devkit_t12/data/meta.mat": meta(),
    },
    "the devkit's archive": {
        "ILSVRC2012_devkit_t12.tar.gz": tar_bytes(
            {
                f"ILSVRC2012_devkit_t12/data/{TRUTH_NAME}": truth(),
                "ILSVRC2012_devkit_t12/data/meta.mat": meta(),
                "ILSVRC2012_devkit_t12/readme.txt": b"hello",
            },
            "w:gz",
        )
    },
    "val.txt and synset words": {
        "val.txt": "".join(f"{n} {CLASSES.index(WNIDS[t - 1])}\n" for n, t in zip(VAL, TRUTH, strict=True)).encode(),
        "synset_words.txt": "".join(f"{wnid} some, words\n" for wnid in CLASSES).encode(),
    },
    "Kaggle's table": {
        "LOC_val_solution.csv": b"ImageId,PredictionString\n"
        + "".join(
            f"{name.removesuffix('.JPEG')},{WNIDS[t - 1]} 1 2 3 4 {WNIDS[t - 1]} 5 6 7 8\n"
            for name, t in zip(reversed(VAL), reversed(TRUTH), strict=True)
        ).encode()
    },
}
TRAIN_LAYOUTS = {"folders": train_folders(), "archive": train_tar()}
VAL_LAYOUTS = {
    "flat": {f"val/{name}": data for name, data in VAL.items()},
    "archive": {"ILSVRC2012_img_val.tar": tar_bytes(VAL)},
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("val", VAL_LAYOUTS)
@pytest.mark.parametrize("train", TRAIN_LAYOUTS)
def test_each_layout_gives_each_image_its_class(tmp_path: Path, train: str, val: str, labels: str) -> None:
    source = open_source(str(write_files(tmp_path, TRAIN_LAYOUTS[train] | VAL_LAYOUTS[val] | LABELS[labels])))
    assert (source.format, source.classes) == ("imagenet12", CLASSES)
    assert contents(source, "train") == {wnid: sorted(files.values()) for wnid, files in TRAIN.items()}
    assert contents(source, "val") == EXPECTED_VAL
    record = source.splits["train"][0]
    assert (record.extension, pickle.loads(pickle.dumps(source.read))(record)) == ("jpeg", source.read(record))


@pytest.mark.parametrize("train", TRAIN_LAYOUTS)
def test_val_in_folders_needs_no_labels(tmp_path: Path, train: str) -> None:
    source = open_source(str(write_files(tmp_path, TRAIN_LAYOUTS[train] | val_folders())))
    assert contents(source, "train") == {wnid: sorted(files.values()) for wnid, files in TRAIN.items()}
    assert contents(source, "val") == EXPECTED_VAL


@pytest.mark.parametrize("labels", [{}, LABELS["Kaggle's table"]])
def test_images_beside_the_class_folders_are_counted_and_told(tmp_path: Path, labels: dict[str, bytes]) -> None:
    val = VAL_LAYOUTS["flat"] if labels else val_folders()
    notes = open_source(str(write_files(tmp_path, train_folders() | val | labels | {"train/loose.JPEG": b"x"}))).notes
    assert "1 images lie in no class folder and were left out, the first of them is train/loose.JPEG" in notes


def test_the_archives_give_the_same_records_as_the_folders(tmp_path: Path) -> None:
    folders = open_source(str(write_files(tmp_path / "a", train_folders() | val_folders())))
    archive = open_source(str(write_files(tmp_path / "b", train_tar() | val_folders())))
    assert folders.digest == archive.digest


def test_the_layout_of_kaggle_is_read(tmp_path: Path) -> None:
    images = train_folders() | VAL_LAYOUTS["flat"]
    files = {f"ILSVRC/Data/CLS-LOC/{name}": data for name, data in images.items()}
    source = open_source(str(write_files(tmp_path, files | LABELS["Kaggle's table"])))
    assert contents(source, "val") == EXPECTED_VAL


def test_validation_images_of_classes_without_training_images_are_left_out_and_counted(tmp_path: Path) -> None:
    train = {name: data for name, data in train_folders().items() if WNIDS[0] not in name}
    source = open_source(str(write_files(tmp_path, train | VAL_LAYOUTS["flat"] | LABELS["the devkit's files"])))
    assert contents(source, "val") == {wnid: EXPECTED_VAL[wnid] for wnid in CLASSES if wnid != WNIDS[0]}
    assert any(note.startswith("2 images of val were left out") for note in source.notes)


def test_flat_images_without_labels_say_what_was_looked_for(tmp_path: Path) -> None:
    files = train_folders() | VAL_LAYOUTS["flat"]
    with pytest.raises(InvalidInputError, match=rf"lie flat, and there are no labels.*looked for {TRUTH_NAME} with"):
        open_source(str(write_files(tmp_path, files)))


def test_a_sorted_list_of_classes_is_not_taken_for_the_numbers_of_the_devkit(tmp_path: Path) -> None:
    files = train_folders() | VAL_LAYOUTS["flat"] | {TRUTH_NAME: truth()}
    files["synset_words.txt"] = LABELS["val.txt and synset words"]["synset_words.txt"]
    with pytest.raises(InvalidInputError, match="there are no labels for them"):
        open_source(str(write_files(tmp_path, files)))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({TRUTH_NAME: b"2\n1\n4\n"}, r"ground_truth\.txt: line 3 is '4', none of the 3 class numbers"),
        ({TRUTH_NAME: b"2\n1\nx\n"}, r"ground_truth\.txt: line 3 is 'x'"),
        ({TRUTH_NAME: b"2\n1\n"}, r"ILSVRC2012_val_00000003\.JPEG: .* has no label for it"),
        ({"meta.mat": b"not a MATLAB file at all" * 20}, r"meta\.mat: meta\.mat has no table `synsets`"),
        ({"meta.mat": b""}, r"meta\.mat: meta\.mat has no table `synsets`"),
    ],
)
def test_labels_that_do_not_fit_are_named(tmp_path: Path, change: dict[str, bytes], complaint: str) -> None:
    files = train_folders() | VAL_LAYOUTS["flat"] | LABELS["the devkit's files"] | change
    with pytest.raises(InvalidInputError, match=complaint):
        open_source(str(write_files(tmp_path, files)))


def test_missing_parts_say_what_was_looked_for(tmp_path: Path) -> None:
    write_files(tmp_path / "train", train_folders())
    with pytest.raises(InvalidInputError, match=r"no validation images of imagenet12; looked for val/WNID"):
        open_source(str(tmp_path / "train"))
    with pytest.raises(InvalidInputError, match=r"no training images of imagenet12; looked for train/WNID"):
        open_source(str(write_files(tmp_path / "val", val_folders())), "imagenet12")


def test_an_archive_of_archives_is_checked_within(tmp_path: Path) -> None:
    whole = {f"{wnid}.tar": tar_bytes(files) for wnid, files in TRAIN.items()}
    cut = whole | {f"{WNIDS[1]}.tar": whole[f"{WNIDS[1]}.tar"][:1500]}
    evil = whole | {f"{WNIDS[1]}.tar": tar_bytes({"../../evil.JPEG": b"x"})}
    foreign = whole | {"readme.txt": b"hello"}
    expected = {
        "cut": (cut, rf"in {WNIDS[1]}\.tar: .*without the mark of an end"),
        "evil": (evil, "leads out"),
        "foreign": (foreign, "readme.txt"),
    }
    for name, (members, complaint) in expected.items():
        files = {"ILSVRC2012_img_train.tar": tar_bytes(members)} | val_folders()
        with pytest.raises(InvalidInputError, match=complaint):
            open_source(str(write_files(tmp_path / name, files)))
