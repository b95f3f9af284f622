"""Tables of images in Parquet files, and WebDataset shards that are there already."""

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from source_files import image_file, tar_bytes, write_files

from dabnn.data.build_plan import Listing, plan_build
from dabnn.data.sources import Record, Source, key_of, open_source
from dabnn.data.sources import records as records_module
from dabnn.errors import DabError, InvalidInputError

NAMES = ("ant", "bee", "cat")
IMAGES = [image_file(number) for number in range(40)]
LABELS = [number % 3 for number in range(40)]


def write_table(
    path: Path,
    rows: range,
    *,
    names: Sequence[str] | None = NAMES,
    image: str = "image",
    label: str = "label",
    labels: Sequence[Any] = LABELS,
    paths: Sequence[str | None] | None = None,
    row_group_size: int = 7,
) -> None:
    """Writes rows of `IMAGES` as the Hugging Face library does: an image is a struct of its bytes and its path."""
    images = [{"bytes": IMAGES[row], "path": None if paths is None else paths[row]} for row in rows]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image: pa.array(images, struct), label: [labels[row] for row in rows]})
    features: dict[str, Any] = {image: {"_type": "Image"}}
    features[label] = {"_type": "ClassLabel", "names": list(names)} if names else {"_type": "Value", "dtype": "int64"}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)


def images_of(source: Source, split: str) -> list[tuple[str, bytes]]:
    return [(source.classes[record.label], source.read(record)) for record in source.splits[split]]


def expected(rows: range) -> list[tuple[str, bytes]]:
    return [(NAMES[LABELS[row]], IMAGES[row]) for row in rows]


@pytest.mark.parametrize("folder", ["", "data/", "plain_text/"])
@pytest.mark.parametrize("val", ["test", "validation", "val"])
def test_a_table_gives_each_image_its_class(tmp_path: Path, folder: str, val: str) -> None:
    write_table(tmp_path / f"{folder}train-00000-of-00002.parquet", range(20))
    write_table(tmp_path / f"{folder}train-00001-of-00002.parquet", range(20, 30))
    write_table(tmp_path / f"{folder}{val}-00000-of-00001.parquet", range(30, 40))
    source = open_source(str(tmp_path))
    assert (source.format, source.classes) == ("parquet", NAMES)
    assert images_of(source, "train") == expected(range(30))
    assert images_of(source, "val") == expected(range(30, 40))
    record = source.splits["train"][25]
    assert (record.name, record.extension) == (f"{folder}train-00001-of-00002/00000005.png", "png")
    assert pickle.loads(pickle.dumps(source.read))(record) == IMAGES[25]


def test_validation_is_taken_before_test_and_that_is_told(tmp_path: Path) -> None:
    for name, rows in (("train", range(20)), ("validation", range(20, 30)), ("test", range(30, 40))):
        write_table(tmp_path / f"{name}-00000.parquet", rows)
    source = open_source(str(tmp_path))
    assert images_of(source, "val") == expected(range(20, 30))
    assert "test was not read: validation became val" in source.notes


def test_other_column_names_and_labels_without_names_are_read(tmp_path: Path) -> None:
    for split, rows in (("train", range(20)), ("test", range(20, 30))):
        write_table(tmp_path / "numbers" / f"{split}.parquet", rows, image="img", label="fine_label", names=None)
        texts = [NAMES[label] for label in LABELS]
        write_table(tmp_path / "texts" / f"{split}.parquet", rows, names=None, labels=texts)
    numbers, texts_source = open_source(str(tmp_path / "numbers")), open_source(str(tmp_path / "texts"))
    assert numbers.classes == ("0", "1", "2")
    assert texts_source.classes == NAMES
    assert [data for _, data in images_of(numbers, "val")] == IMAGES[20:30]
    assert images_of(texts_source, "val") == expected(range(20, 30))


def test_the_extension_is_that_of_the_path_where_there_is_one(tmp_path: Path) -> None:
    paths = ["a/b.JPG" if row % 2 else None for row in range(40)]
    write_table(tmp_path / "train.parquet", range(8), paths=paths)
    write_table(tmp_path / "test.parquet", range(8, 12), paths=paths)
    assert [record.extension for record in open_source(str(tmp_path)).splits["train"]] == ["png", "jpg"] * 4


def test_shards_of_a_table_take_few_row_groups_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(tmp_path / "train.parquet", range(40), row_group_size=4)
    write_table(tmp_path / "test.parquet", range(4))
    source = open_source(str(tmp_path))
    assert source.blocks is not None
    blocks = source.blocks["train"]
    assert blocks == tuple(range(start, start + 4) for start in range(0, 40, 4))
    assert sorted(record.name for record in source.shuffled("train")) == [r.name for r in source.splits["train"]]
    assert source.shuffled("train") != source.splits["train"]
    monkeypatch.setattr(records_module, "WINDOW_BYTES", 8 * source.splits["train"][0].num_bytes)
    rows = [record.place[1] for record in source.shuffled("train") if record.place is not None]
    groups = [{row // 4 for row in rows[start : start + 8]} for start in range(0, 40, 8)]
    assert [len(of_window) for of_window in groups] == [2] * 5
    assert sorted(rows) == list(range(40))


@pytest.mark.parametrize(
    ("write", "complaint"),
    [
        pytest.param(
            lambda path: write_table(path, range(5), labels=[0, 1, -1, 2, 0]),
            r"train\.parquet: row 2 has the label -1, neither a number from 0 nor a text",
            id="a hidden label",
        ),
        pytest.param(
            lambda path: write_table(path, range(5), labels=[0, 1, None, 2, 0]),
            r"train\.parquet: row 2 has the label None",
            id="no label",
        ),
        pytest.param(
            lambda path: write_table(path, range(5), labels=[0, 1, 2, 3, 0]),
            r"train\.parquet: row 3 has the label 3; there are 3 classes",
            id="a label without a name",
        ),
        pytest.param(
            lambda path: write_table(path, range(5), image="picture", label="kind", names=None),
            r"train\.parquet: no column of images .* the columns are picture, kind",
            id="no labels",
        ),
        pytest.param(
            lambda path: pq.write_table(pa.table({"image": [b"x"], "label": [0]}), path),
            r"train\.parquet: no column of images",
            id="images that are no struct",
        ),
        pytest.param(lambda path: path.write_bytes(b"PAR1 but no table"), "no Parquet file, or damaged", id="damage"),
    ],
)
def test_a_table_that_is_not_laid_out_so_is_named(
    tmp_path: Path, write: Callable[[Path], None], complaint: str
) -> None:
    write_table(tmp_path / "test.parquet", range(5))
    write(tmp_path / "train.parquet")
    with pytest.raises(InvalidInputError, match=complaint):
        open_source(str(tmp_path))


def test_numbers_and_texts_as_labels_of_one_table_are_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "train.parquet", range(9), names=None)
    write_table(tmp_path / "val.parquet", range(9, 12), names=None, labels=[str(label) for label in LABELS])
    with pytest.raises(InvalidInputError, match=r"some labels are numbers \(0\) and some texts \('0'\)"):
        open_source(str(tmp_path))


def test_a_text_that_the_schema_does_not_name_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path / "train.parquet", range(3), labels=["ant", "dog", "bee"])
    write_table(tmp_path / "val.parquet", range(3), labels=["ant", "ant", "bee"])
    with pytest.raises(InvalidInputError, match=r"train\.parquet: row 1 has the label 'dog'; there are 3 classes"):
        open_source(str(tmp_path))


def plan(folder: Path) -> Source:
    return plan_build(Listing(str(folder)), 2**20, None).source


def test_a_class_that_only_val_has_is_refused_where_no_list_names_it(tmp_path: Path) -> None:
    complaint = "val has the class {}, of which train has no image"
    texts = ["cat", "dog", "cat", "ant"]
    write_table(tmp_path / "texts" / "train.parquet", range(3), names=None, labels=texts)
    write_table(tmp_path / "texts" / "val.parquet", range(1, 4), names=None, labels=texts)
    with pytest.raises(InvalidInputError, match=complaint.format("ant")):
        plan(tmp_path / "texts")
    shards = {
        f"{split}-0.tar": tar_bytes({"a.png": IMAGES[0], "a.cls": label})
        for split, label in {"train": b"0", "val": b"1"}.items()
    }
    write_files(tmp_path / "shards", shards)
    with pytest.raises(InvalidInputError, match=complaint.format("1")):
        plan(tmp_path / "shards")
    images = write_files(tmp_path / "images", {"ant/0.png": IMAGES[0], "bee/0.png": IMAGES[1]})
    lists = write_files(tmp_path / "lists", {"train.txt": b"ant/0.png", "val.txt": b"bee/0.png"})
    with pytest.raises(InvalidInputError, match=complaint.format("bee")):
        plan_build(Listing(str(images), split_lists=lists), 2**20, None)


def test_a_class_that_only_val_has_is_told_where_a_list_names_it(tmp_path: Path) -> None:
    write_table(tmp_path / "table" / "train.parquet", range(2))
    write_table(tmp_path / "table" / "val.parquet", range(3))
    note = "1 of 3 classes have images in val and none in train, so no network learns them: cat"
    assert note in plan(tmp_path / "table").notes
    shards = {
        f"{split}-0.tar": tar_bytes({"a.png": IMAGES[0], "a.cls": label})
        for split, label in {"train": b"0", "val": b"2"}.items()
    }
    write_files(tmp_path / "shards", shards | {"classes.txt": b"ant\nbee\ncat\n"})
    assert note in plan(tmp_path / "shards").notes


def test_a_row_without_bytes_is_named_when_it_is_read(tmp_path: Path) -> None:
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for split in ("train", "test"):
        rows = [{"bytes": IMAGES[0], "path": "a.png"}, {"bytes": None, "path": "b.png"}, None]
        pq.write_table(pa.table({"image": pa.array(rows, struct), "label": [0, 1, 1]}), tmp_path / f"{split}.parquet")
    source = open_source(str(tmp_path))
    for record in source.splits["train"][1:]:
        with pytest.raises(DabError, match=r"train\.parquet: row [12] has no image bytes"):
            source.read(record)


def write_shards(root: Path, names: Sequence[str] = ("train-{}.tar", "val-{}.tar"), per_shard: int = 10) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for shard, start in enumerate(range(0, len(IMAGES), per_shard)):
        path = root / names[shard == 3].format(shard)
        path.parent.mkdir(exist_ok=True)
        with webdataset.TarWriter(str(path), encoder=False) as writer:
            for row in range(start, start + per_shard):
                extra = {"json": b"{}"} if row % 5 == 0 else {}
                label = str(LABELS[row]).encode()
                writer.write({"__key__": f"sample{row:04d}", "png": IMAGES[row], "cls": label, **extra})
    return root


@pytest.mark.parametrize("names", [("train-{}.tar", "val-{}.tar"), ("train/s{}.tar", "test/s{}.tar")])
def test_existing_shards_are_listed_where_they_lie(tmp_path: Path, names: tuple[str, str]) -> None:
    source = open_source(str(write_shards(tmp_path, names)))
    assert (source.format, source.classes) == ("webdataset", ("0", "1", "2"))
    assert source.shards == {
        "train": tuple(tmp_path / names[0].format(shard) for shard in range(3)),
        "val": (tmp_path / names[1].format(3),),
    }
    assert [data for _, data in images_of(source, "train")] == IMAGES[:30]
    assert [record.label for record in source.splits["val"]] == LABELS[30:]
    assert [key_of(record) for record in source.splits["val"]] == [f"sample{row:04d}" for row in range(30, 40)]
    assert any(note.startswith("8 members were passed over") for note in source.notes)
    for record in source.splits["train"]:
        assert record.place is not None
        with (tmp_path / record.place[0]).open("rb") as file:
            file.seek(record.place[1])
            assert file.read(record.num_bytes) == source.read(record)


def test_class_names_are_the_lines_of_a_file(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\nno images yet\n")
    assert open_source(str(tmp_path)).classes == (*NAMES, "no images yet")
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(InvalidInputError, match=r"classes\.txt: names 2 classes, and train-0\.tar/.* has the label 2"):
        open_source(str(tmp_path))


def test_keys_with_folders_and_dots_are_those_of_webdataset(tmp_path: Path) -> None:
    members = {"a.b/c.png": IMAGES[0], "a.b/c.cls": b"0", "d.input.png": IMAGES[1], "d.cls": b" 1\n"}
    source = open_source(
        str(write_files(tmp_path, {"train-0.tar": tar_bytes(members), "val-0.tar": tar_bytes(members)}))
    )
    assert [key_of(record) for record in source.splits["train"]] == ["a.b/c", "d"]
    assert [data for _, data in images_of(source, "train")] == IMAGES[:2]
    assert key_of(Record("x/y.png", 0, "png", 1)) == "x/y"


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"a.png": IMAGES[0]}, r"sample 'a' has 1 images and 0 labels"),
        ({"a.cls": b"0"}, r"sample 'a' has 0 images and 1 labels"),
        ({"a.png": IMAGES[0], "a.seg.png": IMAGES[1], "a.cls": b"0"}, r"sample 'a' has 2 images and 1 labels"),
        ({"a.png": IMAGES[0], "a.cls": b"cat"}, r"sample 'a' has the label 'cat', not the number of a class"),
        ({"a.png": IMAGES[0], "a.cls": b"-1"}, r"sample 'a' has the label '-1'"),
        ({"a.png": IMAGES[0], "a.cls": b"9" * 19}, r"a\.png: has the label 9+; labels number the classes from 0"),
        ({"a.png": IMAGES[0], "a.cls": b"9" * 40}, r"sample 'a' has the label '9+'"),
        (
            {"a.png": IMAGES[0], "a.cls": b"0", "b.jpg": b"", "b.cls": b"0", "a.jpg": IMAGES[1], "a.txt": b"0"},
            r"sample 'a' has 1 images and 0 labels",
        ),
        ({"a.png": IMAGES[0], "a.json": b"{}"}, r"sample 'a' has 1 images and 0 labels"),
        ({"a.png": IMAGES[0], "a.json": b'{"label": true}'}, r"sample 'a' has 1 images and 0 labels"),
        ({"a.png": IMAGES[0], "a.json": b'{"label": -1}'}, r"sample 'a' has 1 images and 0 labels"),
        ({"a.png": IMAGES[0], "a.json": b'{"label": "1"}'}, r"sample 'a' has 1 images and 0 labels"),
        ({"a.png": IMAGES[0], "a.json": b'{"label": 1, "cls": 2}'}, r"sample 'a' has 1 images and 0 labels"),
        ({"a.png": IMAGES[0], "a.json": b"[" * 50_000}, r"sample 'a' has 1 images and 0 labels"),
        ({"a.png": IMAGES[0], "a.json": b'{"label": ' + b"9" * 9000 + b"}"}, r"sample 'a' has 1 images and 0 labels"),
        ({"a.json": b'{"label": 1}'}, r"no sample in it"),
        ({"../a.png": IMAGES[0], "../a.cls": b"0"}, r"leads out of the folder"),
        ({"readme.md": b"hello"}, r"no sample in it; samples are KEY\.jpg"),
    ],
)
def test_a_bad_sample_names_its_shard_and_key(tmp_path: Path, members: dict[str, bytes], complaint: str) -> None:
    good = {"z.png": IMAGES[5], "z.cls": b"0"}
    write_files(tmp_path, {"train-000.tar": tar_bytes(members), "val-000.tar": tar_bytes(good)})
    with pytest.raises(InvalidInputError, match=rf"train-000\.tar.*{complaint}"):
        open_source(str(tmp_path))


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    members = {
        "a.png": IMAGES[0],
        "a.cls": b"0",
        "b.png": IMAGES[1],
        "b.cls": b"0",
        "./a.jpg": IMAGES[2],
        "./a.cls": b"1",
    }
    write_files(tmp_path, {"train-000.tar": tar_bytes(members), "val-000.tar": tar_bytes(members)})
    with pytest.raises(InvalidInputError, match=r"train-000\.tar: has two members named 'a\.cls'"):
        open_source(str(tmp_path))


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    path = tmp_path / "train-1.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InvalidInputError, match=r"train-1\.tar: no tar archive, or damaged, or truncated"):
        open_source(str(tmp_path))


def test_shards_without_a_val_split_say_what_was_looked_for(tmp_path: Path) -> None:
    write_shards(tmp_path, ("train-{}.tar", "train-{}.tar"))
    with pytest.raises(InvalidInputError, match=r"looked for train-\*\.tar and one of validation-\*\.tar.*found train"):
        open_source(str(tmp_path))
