"""`dab data build --cluster`: the shards that tasks of a cluster make are those of any other build."""

import sys
from pathlib import Path

import pytest
from program import Dab

sys.path.insert(0, str(Path(__file__).parents[1] / "dabnn"))
from image_tree import write_tree

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_a_cluster_builds_the_same_bytes(dab: Dab, tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images")
    here = dab.ok("data", "build", source, tmp_path / "here", "--encode", "webp", "--resize", 5)
    done = dab("data", "build", source, tmp_path / "there", "--encode", "webp", "--resize", 5, "--cluster")
    assert (done.code, done.data) == (0, here)
    assert "48/48 images" in done.stderr
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("here", "there")]
    assert files[0] == files[1]
    assert not list((dab.home / "logs").glob("dab-data-*"))


def test_what_the_cluster_refuses_is_told_here(dab: Dab, tmp_path: Path) -> None:
    source = write_tree(tmp_path / "images")
    (source / "train" / "ant" / "0.png").write_text("not an image")
    done = dab("data", "build", source, tmp_path / "data", "--cluster")
    assert done.code == 2, done.stderr
    assert (done.code, "train/ant/0.png (" in done.message) == (2, True)
    assert "1 of 48 images do not decode" in done.message
    assert list((tmp_path / "data").iterdir()) == []


def test_options_that_cannot_be_are_refused_before_anything_starts(dab: Dab, tmp_path: Path) -> None:
    both = dab("data", "build", "builtin:digits", tmp_path / "data", "--cluster", "--processes", 2)
    assert (both.code, both.message.startswith("--processes: 2 has no effect with --cluster")) == (2, True)
    none = dab("data", "build", "builtin:digits", tmp_path / "data", "--cluster", "--encode", "gif")
    assert (none.code, none.message.startswith("encoding: ")) == (2, True)
