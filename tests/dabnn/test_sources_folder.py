"""Image folders, split by themselves, by a share, or by lists; and what is refused."""

import pickle
from pathlib import Path

import pytest
from image_tree import write_tree
from source_files import class_files, contents, write_files

from dabnn.data.sources import Source, open_source
from dabnn.errors import InvalidInputError


@pytest.fixture
def unsplit(tmp_path: Path) -> Path:
    return write_files(tmp_path / "images", class_files({"ant": 20, "bee": 10, "cat": 1}))


def names(source: Source, split: str) -> list[str]:
    return [record.name for record in source.splits[split]]


def test_a_folder_without_val_is_split_per_class(unsplit: Path) -> None:
    source = open_source(str(unsplit), val_fraction=0.2)
    assert source.classes == ("ant", "bee", "cat")
    assert [sum(r.label == label for r in source.splits["val"]) for label in range(3)] == [4, 2, 0]
    assert [sum(r.label == label for r in source.splits["train"]) for label in range(3)] == [16, 8, 1]
    assert not set(names(source, "train")) & set(names(source, "val"))


def test_the_split_depends_on_the_seed_alone(unsplit: Path) -> None:
    splits = [open_source(str(unsplit), val_fraction=0.3, seed=seed).splits for seed in (3, 3, 4)]
    assert splits[0] == splits[1]
    assert splits[0] != splits[2]


def test_another_class_does_not_change_the_split_of_the_others(unsplit: Path) -> None:
    before = names(open_source(str(unsplit), val_fraction=0.3), "val")
    write_files(unsplit, class_files({"dog": 10}))
    after = names(open_source(str(unsplit), val_fraction=0.3), "val")
    assert [name for name in after if not name.startswith("dog")] == before


def test_each_class_keeps_an_image_on_either_side_where_it_has_two(tmp_path: Path) -> None:
    folder = write_files(tmp_path, class_files({"ant": 2, "bee": 2}))
    for fraction in (0.01, 0.99):
        source = open_source(str(folder), val_fraction=fraction)
        assert [len(records) for records in source.splits.values()] == [2, 2]


def test_a_folder_with_train_alone_has_val_drawn_from_it(tmp_path: Path) -> None:
    folder = write_files(tmp_path, class_files({"ant": 10}, "train"))
    source = open_source(str(folder), val_fraction=0.2)
    assert [len(records) for records in source.splits.values()] == [8, 2]
    assert contents(source, "val")["ant"]


def test_a_folder_that_is_split_keeps_its_split_and_says_so(tmp_path: Path) -> None:
    source = open_source(str(write_tree(tmp_path, num_train=4, num_val=2)), val_fraction=0.5)
    assert [len(records) for records in source.splits.values()] == [12, 6]
    assert any("has train and val of its own" in note for note in source.notes)


def test_a_folder_without_splits_says_how_to_have_one_drawn(unsplit: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"no folder train and no folder val in it.*set val_fraction"):
        open_source(str(unsplit))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_a_share_that_is_no_share_is_refused(unsplit: Path, fraction: float) -> None:
    with pytest.raises(InvalidInputError, match=r"val_fraction: .* is not between 0 and 1"):
        open_source(str(unsplit), val_fraction=fraction)


def test_lists_say_which_image_is_in_which_split(unsplit: Path, tmp_path: Path) -> None:
    lists = write_files(tmp_path / "lists", {"train.txt": b"ant/0.png\nbee/3.png\n", "val.txt": b"./ant/7.png\r\n\n"})
    source = open_source(str(unsplit), split_lists=lists)
    assert names(source, "train") == ["ant/0.png", "bee/3.png"]
    assert names(source, "val") == ["ant/7.png"]
    assert any("28 images are in neither list" in note for note in source.notes)


@pytest.mark.parametrize(
    ("train", "val", "complaint"),
    [
        (b"ant/0.png\n", b"ant/0.png\n", r"val\.txt: line 1 names 'ant/0\.png', which train\.txt has already"),
        (b"ant/0.png\nant/99.png\n", b"", r"train\.txt: line 2 names 'ant/99\.png', which is no image of"),
        (b"ant/0.png\n", None, r"val\.txt: cannot be read .*split_lists is a folder with train\.txt and val\.txt"),
    ],
)
def test_lists_that_do_not_fit_are_refused(
    unsplit: Path, tmp_path: Path, train: bytes, val: bytes | None, complaint: str
) -> None:
    lists = write_files(tmp_path / "lists", {"train.txt": train} | ({} if val is None else {"val.txt": val}))
    with pytest.raises(InvalidInputError, match=complaint):
        open_source(str(unsplit), split_lists=lists)


def test_files_that_are_no_images_are_counted(tmp_path: Path) -> None:
    source = write_tree(tmp_path, num_train=2, num_val=2)
    write_files(source / "train" / "ant", {"notes.txt": b"x", "._0.png": b"x", "deep/Thumbs.db": b"x"})
    notes = open_source(str(source)).notes
    assert any(note.startswith("3 files were passed over") for note in notes)


def test_classes_that_val_lacks_are_named(tmp_path: Path) -> None:
    files = class_files({"ant": 2, "bee": 2, "cat": 2}, "train") | class_files({"bee": 1}, "val")
    notes = open_source(str(write_files(tmp_path, files))).notes
    assert "2 of 3 classes have no image in val, so nothing measures them: ant, cat" in notes


def test_linked_images_and_class_folders_are_read(tmp_path: Path) -> None:
    store = write_files(tmp_path / "store", class_files({"ant": 3}))
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        (tmp_path / "images" / split / "ant").symlink_to(store / "ant")
        (tmp_path / "images" / split / "bee").mkdir()
        (tmp_path / "images" / split / "bee" / "0.png").symlink_to(store / "ant" / "0.png")
    source = open_source(str(tmp_path / "images"))
    assert {name: len(images) for name, images in contents(source, "val").items()} == {"ant": 3, "bee": 1}


def test_linked_folders_below_a_class_are_not_entered(tmp_path: Path) -> None:
    unsplit = write_files(tmp_path / "unsplit", class_files({"ant": 4, "bee": 4}))
    (unsplit / "ant" / "again").symlink_to(unsplit / "ant")
    (unsplit / "bee" / "round").symlink_to("..")
    source = open_source(str(unsplit), val_fraction=0.5)
    assert [len(records) for records in source.splits.values()] == [4, 4]
    assert any(note.startswith("2 files were passed over") for note in source.notes)
    split = write_files(tmp_path / "split", class_files({"ant": 4}, "train") | class_files({"ant": 4}, "val"))
    (split / "val" / "ant" / "again").symlink_to(split / "train" / "ant")
    assert [len(records) for records in open_source(str(split)).splits.values()] == [4, 4]


def test_images_beside_the_class_folders_are_counted_and_told(tmp_path: Path) -> None:
    split = write_tree(tmp_path / "split", num_train=2, num_val=2)
    write_files(split, {"train/loose.png": b"x", "val/loose.png": b"x", "beside.png": b"x"})
    note = "2 images lie in no class folder and were left out, the first of them is {}"
    assert note.format("train/loose.png") in open_source(str(split)).notes
    unsplit = write_files(tmp_path / "unsplit", class_files({"ant": 4}) | {"loose.png": b"x", "beside.jpg": b"x"})
    assert note.format("beside.jpg") in open_source(str(unsplit), val_fraction=0.5).notes
    one = write_files(tmp_path / "one", class_files({"ant": 4}, "train") | {"train/a.png": b"x", "train/b.png": b"x"})
    assert note.format("train/a.png") in open_source(str(one), val_fraction=0.5).notes
    assert not any("class folder" in note for note in open_source(str(write_tree(tmp_path / "tidy"))).notes)


def test_a_link_to_nowhere_is_named(tmp_path: Path) -> None:
    source = write_tree(tmp_path, num_train=1, num_val=1)
    (source / "train" / "ant" / "lost.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(InvalidInputError, match=r"lost\.png: cannot be read: No such file"):
        open_source(str(source))


def test_the_reader_can_be_sent_to_another_process(unsplit: Path) -> None:
    source = open_source(str(unsplit), val_fraction=0.2)
    read = pickle.loads(pickle.dumps(source.read))
    record = source.splits["val"][0]
    assert read(record) == (unsplit / record.name).read_bytes()
    digits = open_source("builtin:digits")
    record = digits.splits["train"][0]
    assert pickle.loads(pickle.dumps(digits.read))(record) == digits.read(record)


def test_the_digest_tells_what_there_is_and_the_stamp_when_it_was_written(unsplit: Path) -> None:
    first = open_source(str(unsplit), val_fraction=0.2)
    (unsplit / "ant" / "0.png").touch()
    second = open_source(str(unsplit), val_fraction=0.2)
    assert (first.digest, first.stamp != second.stamp) == (second.digest, True)
    assert open_source(str(unsplit), val_fraction=0.3).digest != first.digest
    (unsplit / "ant" / "0.png").write_bytes(b"a file of another size")
    assert open_source(str(unsplit), val_fraction=0.2).digest != first.digest


def test_shards_hold_records_in_mixed_order(unsplit: Path) -> None:
    source = open_source(str(unsplit), val_fraction=0.2)
    shuffled = source.shuffled("train")
    assert sorted(shuffled, key=lambda record: record.name) == sorted(
        source.splits["train"], key=lambda record: record.name
    )
    assert shuffled != source.splits["train"]
