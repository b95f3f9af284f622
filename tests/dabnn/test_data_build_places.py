"""Where datasets are built: shards of others that are only indexed, folders that cannot be written, killed builds."""

import errno
import fcntl
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from image_tree import write_tree
from PIL import Image

from dabnn.data import build_dataset, check_dataset, load_manifest
from dabnn.data.encode import make_encoding
from dabnn.data.reader import SampleReader
from dabnn.data.shard_task import ShardResult, ShardTask
from dabnn.data.staging import STAGING_NAME, staging_folder
from dabnn.errors import DabError, InvalidInputError

ROOT = Path(__file__).parents[2]
NOBODY = 65534


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (5, 4 + value % 3), value).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards_of_others(folder: Path) -> Path:
    """Two shards a split with keys in folders, labels with a line end, and members that are neither image nor label."""
    folder.mkdir()
    value = 0
    for split in ("train", "val"):
        for number in range(2):
            with tarfile.open(folder / f"{split}-{number}.tar", "w") as archive:
                for sample in range(3):
                    value += 1
                    members = {"png": png(value), "cls": b"%d\n" % (sample % 2), "json": b"{}"}
                    for extension, data in members.items():
                        info = tarfile.TarInfo(f"part/{sample}.{extension}")
                        info.size = len(data)
                        archive.addfile(info, io.BytesIO(data))
    return folder


def test_shards_of_others_are_indexed_where_they_lie(tmp_path: Path) -> None:
    source = write_shards_of_others(tmp_path / "theirs")
    before = {path: path.read_bytes() for path in source.iterdir()}
    manifest = build_dataset(str(source), tmp_path / "data")
    assert {path: path.read_bytes() for path in source.iterdir()} == before
    assert not list((tmp_path / "data").glob("*.tar"))
    assert manifest.stored is None
    assert [split.class_counts for split in manifest.splits.values()] == [(4, 2), (4, 2)]
    assert (manifest.image.min_height, manifest.image.max_height, manifest.image.min_width) == (4, 6, 5)
    assert [shard.url for shard in manifest.splits["train"].shards] == [str(source / f"train-{n}.tar") for n in (0, 1)]
    assert check_dataset(tmp_path / "data") == []
    reader = SampleReader(tmp_path / "data", manifest.splits["val"], 2)
    assert [reader.read(index) for index in range(6)] == [(png(7 + index), index % 3 % 2) for index in range(6)]
    assert "sample part/1 " in reader.describe(1)
    reader.close()
    build_dataset(str(source), tmp_path / "data")
    assert {path: path.read_bytes() for path in source.iterdir()} == before


def test_shards_that_tar_made_of_a_folder_are_sound(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "raw").mkdir(exist_ok=True)
        for sample in range(4):
            (tmp_path / "raw" / f"{sample}.png").write_bytes(png(sample))
            (tmp_path / "raw" / f"{sample}.cls").write_text(str(sample % 2))
        (tmp_path / "theirs").mkdir(exist_ok=True)
        archive = str(tmp_path / "theirs" / f"{split}-0.tar")
        subprocess.run(["tar", "--sort=name", "-C", str(tmp_path / "raw"), "-cf", archive, "."], check=True)
    build_dataset(str(tmp_path / "theirs"), tmp_path / "data")
    assert check_dataset(tmp_path / "data") == []


def test_an_altered_shard_of_others_is_found(tmp_path: Path) -> None:
    source = write_shards_of_others(tmp_path / "theirs")
    build_dataset(str(source), tmp_path / "data")
    (source / "val-1.tar").write_bytes((source / "val-0.tar").read_bytes())
    (source / "train-0.tar").unlink()
    found = [(problem.shard, problem.kind) for problem in check_dataset(tmp_path / "data")]
    assert found == [("train-000000.tar", "missing"), ("val-000001.tar", "checksum")]


def test_shards_of_others_are_written_anew_when_images_change(tmp_path: Path) -> None:
    source = write_shards_of_others(tmp_path / "theirs")
    manifest = build_dataset(str(source), tmp_path / "data", encoding=make_encoding(encoding="webp"))
    assert all(shard.url is None for split in manifest.splits.values() for shard in split.shards)
    assert check_dataset(tmp_path / "data") == []


def build_as_nobody(source: Path, dest: Path, locked: Path) -> str:
    """Takes a file's permissions away and builds as a user without rights, root's being too many; returns the message.

    The first build, with root's rights, imports what the second one may not be allowed to read.
    """
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom dabnn.data import build_dataset\n"
        "from dabnn.errors import DabError\n"
        "source, dest, locked = sys.argv[1:]\n"
        "build_dataset(source, Path(dest + '-first'))\n"
        "os.chmod(locked, 0)\n"
        f"os.setgid({NOBODY})\nos.setuid({NOBODY})\n"
        "try:\n    build_dataset(source, Path(dest))\nexcept DabError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(source), str(dest), str(locked)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def open_folder(tmp_path: Path) -> Path:
    """A folder that every user reaches."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    return tmp_path


def test_a_destination_without_permission_is_named(open_folder: Path) -> None:
    source = write_tree(open_folder / "images")
    (open_folder / "unused").touch()
    message = build_as_nobody(source, open_folder / "data", open_folder / "unused")
    assert message.startswith(f"{open_folder / 'data'}: cannot be written: ")
    assert "Permission denied" in message
    assert "Name a folder that you may write to" in message


def test_an_image_without_permission_is_named(open_folder: Path) -> None:
    source = write_tree(open_folder / "images")
    (open_folder / "data").mkdir()
    os.chown(open_folder / "data", NOBODY, NOBODY)
    message = build_as_nobody(source, open_folder / "data", source / "train" / "bee" / "3.png")
    assert message == "train/bee/3.png: cannot be read: Permission denied\n"
    assert list((open_folder / "data").iterdir()) == []


def test_a_full_disk_is_told_with_what_is_needed_and_leaves_nothing(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images", size=(64, 64))
    (tmp_path / "small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path / "small")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs rights that this user lacks")
    try:
        with pytest.raises(DabError, match=r"no room .* needs about 0\.7 MiB, 0\.3 MiB are free"):
            build_dataset(str(source), tmp_path / "small" / "data")
        assert list((tmp_path / "small" / "data").iterdir()) == []
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)


def test_two_builds_of_one_folder_at_once_are_refused(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images")

    def second(done: int, _total: int) -> None:
        if done == 20:
            with pytest.raises(DabError, match="another build is writing there"):
                build_dataset(str(source), tmp_path / "data")

    build_dataset(str(source), tmp_path / "data", on_progress=second)
    assert check_dataset(tmp_path / "data") == []


@pytest.mark.parametrize("change", ["other bytes", "same size", "gone", "new"])
def test_a_source_that_changes_during_the_build_is_refused(tmp_path: Path, change: str) -> None:
    source = write_tree(tmp_path / "images")

    def alter(done: int, _total: int) -> None:
        path = source / "val" / "cat" / "0.png"
        if done != 20:
            return
        if change == "other bytes":
            path.write_bytes(path.read_bytes() + b"\0")
        elif change == "same size":
            path.write_bytes(path.read_bytes())
        elif change == "gone":
            path.unlink()
        else:
            Image.new("L", (3, 3)).save(path.with_name("new.png"))

    messages = {"other bytes": "when the build began", "gone": "is gone, or"}
    match = messages.get(change, "changed while the dataset was built")
    with pytest.raises(InvalidInputError, match=match):
        build_dataset(str(source), tmp_path / "data", on_progress=alter)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_process_that_dies_is_told_and_the_build_can_go_on(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images")

    def kill_children(done: int, _total: int) -> None:
        if done >= 12:
            for process in multiprocessing.active_children():
                process.kill()

    with pytest.raises(DabError, match=r"a process of this command died \(exit code -9"):
        build_dataset(str(source), tmp_path / "data", num_processes=2, on_progress=kill_children)
    notes: list[str] = []
    build_dataset(str(source), tmp_path / "data", say=notes.append)
    assert any("going on with" in note for note in notes)
    assert check_dataset(tmp_path / "data") == []


@pytest.mark.parametrize("error", [None, InvalidInputError("a bad source"), OSError(errno.ENOSPC, "full"), OSError()])
def test_the_folder_of_a_build_is_removed_before_another_may_enter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    remove = shutil.rmtree
    num_removed = 0

    def enter_and_remove(path: Path, ignore_errors: bool) -> None:
        nonlocal num_removed
        with pytest.raises(DabError, match="another build is writing there"), staging_folder(tmp_path, "other"):
            pass
        remove(path, ignore_errors)
        num_removed += 1

    monkeypatch.setattr(shutil, "rmtree", enter_and_remove)
    with suppress(InvalidInputError, OSError), staging_folder(tmp_path, "plan"):
        if error is not None:
            raise error
    assert (num_removed, list(tmp_path.iterdir())) == (1, [])


def test_a_folder_that_was_removed_while_a_build_waited_is_not_built_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock

    def lock_late(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        shutil.rmtree(tmp_path / STAGING_NAME)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with pytest.raises(DabError, match="another build is writing there"), staging_folder(tmp_path, "plan"):
        pass


def test_a_build_killed_at_once_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images", size=(200, 200))
    program = f"from dabnn.data import build_dataset\nbuild_dataset({str(source)!r}, {str(tmp_path / 'data')!r})\n"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    staging = tmp_path / "data" / STAGING_NAME
    while len(list(staging.glob("*.finished.json"))) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    notes: list[str] = []
    build_dataset(str(source), tmp_path / "data", say=notes.append)
    assert any("from a build that was cut off" in note for note in notes)
    build_dataset(str(source), tmp_path / "whole")
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("data", "whole")]
    assert files[0] == files[1]


def test_tasks_may_run_anywhere_and_end_in_any_order(tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images")

    def backwards(function, tasks: list[ShardTask], tell) -> list[ShardResult]:  # type: ignore[no-untyped-def]
        return [function(task, tell) for task in reversed(tasks)]

    reversed_ = build_dataset(str(source), tmp_path / "backwards", run_tasks=backwards)
    assert reversed_ == build_dataset(str(source), tmp_path / "forwards")


def test_images_of_many_sizes_and_kinds_count_as_one_by_one(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    pixels = []
    for split in ("train", "val"):
        (tmp_path / "images" / split / "one").mkdir(parents=True)
        for number in range(150):
            size = (4, 4) if number < 100 else (3 + number % 5, 7)
            image = Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))
            image = image.convert("L") if number % 7 == 0 else image
            image.save(tmp_path / "images" / split / "one" / f"{number:03d}.png")
            pixels += [np.asarray(image.convert("RGB")).reshape(-1, 3)] if split == "train" else []
    info = build_dataset(str(tmp_path / "images"), tmp_path / "data").image
    np.testing.assert_allclose(info.mean, np.concatenate(pixels).mean(0) / 255, rtol=1e-12)
    np.testing.assert_allclose(info.std, np.concatenate(pixels).std(0) / 255, rtol=1e-12)
    assert (info.min_height, info.max_height, info.min_width, info.max_width) == (3, 7, 4, 7)
    assert load_manifest(tmp_path / "data").image == info
