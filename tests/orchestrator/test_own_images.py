"""`dab init` and `dab submit --images`: what is found, what is refused, and that a data set is built once."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cli
from dabnn.data import load_manifest
from dabnn.errors import InvalidInputError
from orchestrator import commands
from orchestrator.config import Config, load_config
from orchestrator.image_folder import look, run_name, structure_problem
from orchestrator.own_images import Images, wanted_config
from orchestrator.submit import plan


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dab-") as folder:
        monkeypatch.setenv("DAB_HOME", folder)
        yield Path(folder)


def write_images(folder: Path, num: int = 10, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Path:
    """Write so many images of random pixels into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(num)
    for position in range(num):
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{position}.png")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 10 images of each of two classes."""
    for name in ("ant", "bee"):
        write_images(tmp_path / "photos" / name)
    return tmp_path / "photos"


class Shown:
    """Remembers how far a build said it was."""

    def __init__(self) -> None:
        self.last: tuple[float, float | None] | None = None
        self.num_builds = 0

    def update(self, done: float, total: float | None = None, text: str = "") -> None:
        self.last = (done, total)

    def begin(self, _description: str, _unit: str) -> Any:
        self.num_builds += 1
        return nullcontext(self)


def submitted(source: Path, *overrides: str, file: Path | None = None, **options: Any) -> tuple[Config, Shown]:
    shown = Shown()
    images = Images(str(source), None, shown.begin)
    wanted = wanted_config(file, list(overrides), images, address=None, say=lambda _: None, **options)
    return wanted, shown


def test_classes_sizes_and_channels_of_a_folder_are_found(photos: Path) -> None:
    found = look(str(photos))
    assert (found.classes, found.class_counts) == (("ant", "bee"), (8, 8))
    assert (found.num_train, found.num_val, found.val_fraction) == (16, 4, 0.2)
    assert (found.width, found.height, found.max_side, found.channels) == (24, 20, 20, 3)
    assert look(str(photos), 0.5).num_val == 10


def test_splits_of_its_own_are_taken_and_grey_is_one_channel(tmp_path: Path) -> None:
    for split, num in (("train", 6), ("val", 3)):
        for name in ("a", "b"):
            write_images(tmp_path / split / name, num, mode="L")
    write_images(tmp_path / "test" / "a", 2)
    found = look(str(tmp_path))
    assert (found.num_train, found.num_val, found.val_fraction, found.channels) == (12, 6, None, 1)
    assert any("test was left out" in note for note in found.notes)


def test_the_built_in_digits_are_images_too() -> None:
    found = look("builtin:digits")
    assert (found.name, len(found.classes), found.channels, found.side) == ("digits", 10, 1, 8)


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ([], "not laid out as anything that is known"),
        (["."], "10 images and no folder, so no class is known.*/CLASS/IMAGE"),
        (["one"], "one class, one, and a network tells two or more apart"),
        (["photos/ant", "photos/bee"], "all images lie below one folder, photos.*name .*/photos instead"),
        (
            ["training/ant", "training/bee", "validation/ant", "validation/bee"],
            "training and validation look like splits, not classes. Call them train and val",
        ),
        (["train/ant", "train/bee", "valid/ant", "valid/bee"], "a folder train and a folder valid. Call the second"),
        (["insects/ant", "birds/owl"], "the class may be birds or owl. Move the images to CLASS/IMAGE"),
        (["val/ant", "val/bee"], "no folder train in it"),
    ],
)
def test_folders_without_clear_classes_are_refused_with_what_to_do(
    folders: list[str], expected: str, tmp_path: Path
) -> None:
    for folder in folders:
        write_images(tmp_path / folder)
    with pytest.raises(InvalidInputError, match=expected):
        look(str(tmp_path))


def test_images_that_do_not_decode_are_counted_and_one_is_named(photos: Path) -> None:
    (photos / "ant" / "0.png").write_bytes(b"no image")
    (photos / "bee" / "0.png").write_bytes(b"no image")
    with pytest.raises(InvalidInputError, match=r"of 16 images that were tried do not decode.*/0\.png"):
        look(str(photos))


def test_a_class_of_one_image_each_leaves_nothing_to_validate_on(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / name, 1)
    with pytest.raises(InvalidInputError, match="no image to validate on"):
        look(str(tmp_path))


def test_deeper_folders_beside_images_are_of_their_class() -> None:
    assert structure_problem("/p", ["a", "b"], ["a/1.png", "b/more/2.png"]) is None
    assert structure_problem("/p", ["a", "b"], ["train/a/1.png", "train/b/2.png"]) is None


@pytest.mark.parametrize(
    ("file", "expected"),
    [("photos", "photos"), ("my photos.tar.gz", "my photos"), ("", "images"), ("a/b\n", "a-b"), ("v1.2", "v1.2")],
)
def test_a_run_is_called_as_its_folder(file: str, expected: str) -> None:
    assert run_name(file) == expected


def test_a_submission_builds_the_data_set_once_and_again_when_the_folder_changed(photos: Path, own_home: Path) -> None:
    first, shown = submitted(photos)
    assert shown.last == (20, 20)
    place = Path(first.data.train)
    assert place.parent == own_home / "datasets"
    assert place.name.startswith("photos-")
    again, shown = submitted(photos, "train.epochs=3")
    assert (again.data.train, again.train.epochs, shown.num_builds) == (first.data.train, 3, 0)
    write_images(photos / "bee", 11)
    changed, shown = submitted(photos)
    assert (shown.num_builds, shown.last) == (1, (21, 21))
    assert changed.data.train != first.data.train
    assert load_manifest(changed.data.train).split("train").num_samples == 17


def test_what_is_submitted_can_run_alone_and_as_a_sweep(photos: Path) -> None:
    config, _ = submitted(photos)
    assert plan(config, sweep=False).num_binary_layers > 0
    assert plan(config, sweep=True).config.model.num_classes == 2


def test_the_images_replace_the_data_set_of_a_configuration_and_nothing_else(photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("name: own\nmodel: {name: bincifar, input_size: 32}\ndata: {train: a, val: b, batch_size: 10}\n")
    config, _ = submitted(photos, file=file)
    before = load_config(file)
    assert (config.name, config.model, config.data.batch_size) == (before.name, before.model, 10)
    assert (Path(config.data.train).name.startswith("photos-"), config.data.val) == (True, None)
    with pytest.raises(InvalidInputError, match=r"--images: the data set is .* --set data.val=c names another"):
        submitted(photos, "data.val=c", file=file)


def test_large_photographs_are_stored_at_the_size_that_is_needed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / name, 3, size=(400, 320))
    config, _ = submitted(tmp_path)
    image = load_manifest(config.data.train).image
    assert (image.width, image.height) == (320, 256)


def test_a_dry_run_builds_nothing(photos: Path, own_home: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"--dry-run: the data set of .* is not built yet"):
        submitted(photos, may_build=False)
    assert not (own_home / "datasets").exists()
    submitted(photos)
    images = Images(str(photos), None, Shown().begin)
    data, _ = commands.dry_run(None, [], sweep=True, say=lambda _: None, images=images)
    assert data["config"]["name"] == "photos"


def cluster_elsewhere(own_home: Path, storage: str) -> None:
    (own_home / "clusters.toml").write_text(
        f'[lab]\naddress = "http://127.0.0.1:1"\ntracking = "http://127.0.0.1:2"\nstorage = "{storage}"\n'
    )


def test_a_cluster_elsewhere_gets_the_data_set_beside_its_runs(photos: Path, own_home: Path, tmp_path: Path) -> None:
    cluster_elsewhere(own_home, str(tmp_path / "shared"))
    file = tmp_path / "own.yaml"
    file.write_text("name: own\nmodel: {name: bincifar}\ndata: {train: a}\ncluster: {address: lab}\n")
    config, _ = submitted(photos, file=file)
    assert Path(config.data.train).parent == tmp_path / "shared" / "datasets"


def test_a_cluster_that_shares_no_folder_is_refused_before_anything_is_built(
    photos: Path, own_home: Path, tmp_path: Path
) -> None:
    cluster_elsewhere(own_home, "s3://runs")
    file = tmp_path / "own.yaml"
    file.write_text("name: own\nmodel: {name: bincifar}\ndata: {train: a}\ncluster: {address: lab}\n")
    with pytest.raises(InvalidInputError, match=r"--images: the cluster lab keeps its runs at s3://runs .* data build"):
        submitted(photos, file=file)
    assert not (own_home / "datasets").exists()


def test_init_writes_a_file_that_trains_and_keeps_one_that_is_there(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "dab.yaml"
    assert cli.run(["init", str(photos), "-o", str(file), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["found"]["classes"] == ["ant", "bee"]
    assert written["file"] == str(file)
    text = file.read_text()
    config, _ = submitted(photos, file=file)
    assert plan(config, sweep=True).num_binary_layers > 0

    file.write_text("mine")
    assert cli.run(["init", str(photos), "-o", str(file)]) == 2
    assert "exists and is not overwritten; name another file with -o, or give --force" in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert cli.run(["init", str(photos), "-o", str(file), "--force"]) == 0
    shown = capsys.readouterr()
    assert file.read_text() == text
    assert "2 classes, 16 images to train on (8 to 8 a class) and 4 to validate" in shown.out
    assert shown.err.splitlines()[-1] == f"next: dab submit {file} --images {photos}"
    assert cli.run(["init", str(photos), "-o", str(tmp_path)]) == 2


def test_names_that_would_break_a_line_of_the_file_are_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "my\nseed: 2"
    for name in ("a\nseed: 3", "b\udcff"):
        write_images(folder / name, 4)
    file = tmp_path / "dab.yaml"
    assert cli.run(["init", str(folder), "-o", str(file)]) == 0
    config, _ = submitted(folder, file=file)
    assert (config.seed, config.name) == (1, "my-seed- 2")


def test_a_folder_in_place_of_a_configuration_is_answered_with_the_option(photos: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"photos: a folder, not a configuration; `dab submit --images "):
        wanted_config(photos, [], None, address=None, say=lambda _: None)


def test_a_share_to_validate_on_needs_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["submit", "--val-fraction", "0.2"]) == 2
    assert "--val-fraction" in capsys.readouterr().err
