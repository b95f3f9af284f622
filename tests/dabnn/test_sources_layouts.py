"""TU-Berlin, Sketchy, Omniglot, and the recognition of layouts."""

import zipfile
from pathlib import Path

import pytest
from image_tree import write_tree
from source_files import class_files, contents, image_file, tar_bytes, write_files, write_zip

from dabnn.data.sources import FORMATS, open_source
from dabnn.errors import InvalidInputError

ALPHABETS = {"images_background": ["Greek", "Latin"], "images_evaluation": ["Tengwar"]}


def omniglot_files(part: str) -> dict[str, bytes]:
    names = [
        f"{part}/{alphabet}/character{character:02d}/{number:02d}{character:02d}_{drawer:02d}.png"
        for number, alphabet in enumerate(ALPHABETS[part])
        for character in (1, 2)
        for drawer in range(1, 21)
    ]
    return {name: image_file(position) for position, name in enumerate(names)}


def write_omniglot(folder: Path) -> Path:
    for part in ALPHABETS:
        write_zip(folder / f"{part}.zip", omniglot_files(part))
    return folder


def write_tuberlin(root: Path, num_classes: int = 250) -> Path:
    data = image_file(0)
    return write_files(root, {f"class {c:03d}/{c * 80 + i}.png": data for c in range(num_classes) for i in range(80)})


def test_tuberlin_is_split_54_to_26_per_class(tmp_path: Path) -> None:
    source = open_source(str(write_tuberlin(tmp_path, 3)), "tuberlin")
    assert [len(records) for records in source.splits.values()] == [3 * 54, 3 * 26]
    assert [sum(record.label == label for record in source.splits["val"]) for label in range(3)] == [26] * 3
    again, other = (open_source(str(tmp_path), "tuberlin", seed=seed) for seed in (0, 1))
    assert (again.splits == source.splits, other.splits == source.splits) == (True, False)


def test_tuberlin_with_fewer_sketches_is_split_in_proportion(tmp_path: Path) -> None:
    source = open_source(str(write_files(tmp_path, class_files({"ant": 40, "bee": 10}))), "tuberlin")
    assert [sum(record.label == label for record in source.splits["val"]) for label in range(2)] == [13, 3]


def test_tuberlin_is_read_from_its_zip_and_from_the_folder_png(tmp_path: Path) -> None:
    files = class_files({"alarm clock": 8, "bee": 8})
    folder = open_source(str(write_files(tmp_path / "flat", files)), "tuberlin")
    write_files(tmp_path / "deep" / "png", files | {"filelist.txt": b"alarm clock/0.png\n"})
    deep = open_source(str(tmp_path / "deep"), "tuberlin")
    zipped = write_zip(tmp_path / "sketches_png.zip", {f"png/{name}": data for name, data in files.items()})
    packed = open_source(str(zipped), "tuberlin")
    assert folder.digest == deep.digest == packed.digest
    assert contents(folder, "val") == contents(deep, "val") == contents(packed, "val")


def test_tuberlin_takes_given_lists_and_a_split_of_its_own(tmp_path: Path) -> None:
    sketches = write_files(tmp_path / "sketches", class_files({"alarm clock": 3}))
    lists = {"train.txt": b"alarm clock/1.png\n", "val.txt": b"alarm clock/0.png\nalarm clock/2.png\n"}
    source = open_source(str(sketches), "tuberlin", split_lists=write_files(tmp_path / "lists", lists))
    assert [len(records) for records in source.splits.values()] == [1, 2]
    own = open_source(str(write_tree(tmp_path / "own", num_train=5, num_val=4)), "tuberlin")
    assert [len(records) for records in own.splits.values()] == [15, 12]


def test_tuberlin_without_images_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"looked for CLASS/\*\.png, png/CLASS/\*\.png"):
        open_source(str(tmp_path), "tuberlin")


def test_sketchy_is_its_folder_or_the_folder_that_it_lies_in(tmp_path: Path) -> None:
    write_tree(tmp_path / "sketchy_recognition", num_train=3, num_val=2)
    outside, inside = (
        open_source(str(tmp_path)),
        open_source(str(tmp_path / "sketchy_recognition"), "sketchyrecognition"),
    )
    assert (outside.format, outside.digest) == ("sketchyrecognition", inside.digest)
    assert contents(outside, "val") == contents(inside, "val")
    with pytest.raises(InvalidInputError, match=r"looked for sketchy_recognition/\{train,val\}/CLASS/IMAGE"):
        open_source(str(tmp_path / "sketchy_recognition" / "train"), "sketchyrecognition")


def test_omniglot_is_read_from_both_zip_files_and_split_by_who_drew(tmp_path: Path) -> None:
    source = open_source(str(write_omniglot(tmp_path)))
    characters = [f"{name}/character{c:02d}" for name in ("Greek", "Latin", "Tengwar") for c in (1, 2)]
    assert (source.format, source.classes) == ("omniglot", tuple(characters))
    assert [len(records) for records in source.splits.values()] == [6 * 15, 6 * 5]
    for split, drawers in (("train", range(1, 16)), ("val", range(16, 21))):
        assert {int(record.name[-6:-4]) for record in source.splits[split]} == set(drawers)
    files = {name.partition("/")[2]: data for part in ALPHABETS for name, data in omniglot_files(part).items()}
    assert all(source.read(record) == files[record.name] for records in source.splits.values() for record in records)


def test_omniglot_unpacked_and_half_unpacked_gives_the_same_images(tmp_path: Path) -> None:
    zipped = open_source(str(write_omniglot(tmp_path / "zipped")))
    write_files(tmp_path / "open", omniglot_files("images_background"))
    write_zip(tmp_path / "open" / "images_evaluation.zip", omniglot_files("images_evaluation"))
    mixed = open_source(str(tmp_path / "open"))
    assert mixed.classes == zipped.classes
    assert contents(mixed, "val") == contents(zipped, "val")
    one = open_source(str(tmp_path / "zipped" / "images_evaluation.zip"))
    assert (one.format, len(one.classes)) == ("omniglot", 2)
    assert contents(one, "val") == {name: contents(zipped, "val")[name] for name in one.classes}


def test_omniglot_may_have_other_people_drawn_into_val(tmp_path: Path) -> None:
    write_omniglot(tmp_path)
    source = open_source(str(tmp_path), val_fraction=0.1, seed=5)
    drawers = {}
    for split, records in source.splits.items():
        for record in records:
            alphabet = source.classes[record.label].partition("/")[0]
            drawers.setdefault(alphabet, {}).setdefault(split, set()).add(int(record.name[-6:-4]))
    for of_alphabet in drawers.values():
        assert (len(of_alphabet["train"]), len(of_alphabet["val"])) == (18, 2)
        assert not of_alphabet["train"] & of_alphabet["val"]
    assert open_source(str(tmp_path), val_fraction=0.1, seed=6).splits != source.splits


def test_omniglot_with_a_foreign_file_is_refused(tmp_path: Path) -> None:
    write_zip(
        tmp_path / "images_background.zip", omniglot_files("images_background") | {"images_background/x.png": b"x"}
    )
    with pytest.raises(InvalidInputError, match=r"x\.png is not named ALPHABET/characterNN/NNNN_NN\.png"):
        open_source(str(tmp_path))


def test_auto_recognises_each_layout_and_says_so(tmp_path: Path) -> None:
    write_tree(tmp_path / "folder", num_train=2, num_val=1)
    write_tree(tmp_path / "wordnet", num_train=2, num_val=1, classes=("n01440764", "n01443537"))
    write_tuberlin(tmp_path / "sketches")
    write_omniglot(tmp_path / "strokes")
    expected = {"folder": "folder", "wordnet": "imagenet12", "sketches": "tuberlin", "strokes": "omniglot"}
    sources = {name: open_source(str(tmp_path / name)) for name in expected}
    assert {name: source.format for name, source in sources.items()} == expected
    assert sources["sketches"].notes[0] == "read as tuberlin: 250 classes"
    assert sources["wordnet"].notes[0].startswith("read as imagenet12: 2 classes; train from its folder")
    assert open_source("builtin:digits").format == "digits"


def test_an_unknown_layout_lists_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(
        InvalidInputError, match=r"not laid out as anything that is known; looked for train/CLASS/IMAGE"
    ):
        open_source(str(tmp_path))
    with pytest.raises(InvalidInputError, match=r"readme\.txt: not laid out as anything that is known"):
        open_source(str(tmp_path / "readme.txt"))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "digits"])
def test_a_missing_source_and_an_empty_folder_are_refused_in_each_format(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInputError, match="no such folder or archive"):
        open_source(str(tmp_path / "nowhere"), name)
    with pytest.raises(InvalidInputError, match=r"looked for|no folder train"):
        open_source(str(tmp_path), name)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "digits"])
def test_a_file_that_is_nothing_is_refused_in_each_format(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.bin").write_bytes(b"nothing at all" * 100)
    with pytest.raises(InvalidInputError, match=r"x\.bin"):
        open_source(str(tmp_path / "x.bin"), name)


def test_a_path_that_the_system_refuses_is_an_error_of_the_input() -> None:
    with pytest.raises(InvalidInputError, match="cannot be read: File name too long"):
        open_source("x" * 5000)


def test_options_that_a_layout_has_no_use_for_are_told(tmp_path: Path) -> None:
    write_tree(tmp_path / "sketchy_recognition", num_train=2, num_val=1)
    source = open_source(str(tmp_path), val_fraction=0.5)
    assert source.notes[-1] == "val_fraction not used: sketchyrecognition has a split of its own"
    assert "val_fraction not used" in open_source("builtin:digits", val_fraction=0.5).notes[-1]


def test_archives_of_folders_are_recognised_by_their_ending(tmp_path: Path) -> None:
    files = class_files({"ant": 2}, "train") | class_files({"ant": 1}, "val")
    write_zip(tmp_path / "a.zip", files, zipfile.ZIP_STORED)
    (tmp_path / "a.tar").write_bytes(tar_bytes(files))
    assert open_source(str(tmp_path / "a.zip")).digest == open_source(str(tmp_path / "a.tar")).digest
