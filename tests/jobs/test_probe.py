"""What a node finds of the storage, and what is refused before a run is made; whole probes are in `test_remote.py`."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from s3_server import S3Server

from dabnn.errors import InvalidInputError
from jobs.probe import look
from orchestrator import probe
from orchestrator.probe import Request


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="dab-") as folder:
        monkeypatch.setenv("DAB_HOME", folder)
        yield


@pytest.mark.parametrize("kind", ["folder", "url"])
def test_storage_is_written_to_and_read_back_wherever_it_lies(kind: str, store: S3Server, tmp_path: Path) -> None:
    storage = str(tmp_path / "runs") if kind == "folder" else "s3://bucket/probed"
    with probe._marker(storage) as (marker, text):
        request = Request((), storage, marker, text, "http://127.0.0.1:1")
        assert look(request, "here").storage == ""
        assert look(replace(request, text="other"), "here").storage == "it does not hold what was written here"
        assert look(replace(request, storage="s3://none/runs"), "here").storage
    assert not [path for root in (tmp_path, store.root) for path in root.rglob("*probe-*") if path.is_file()]


@pytest.mark.parametrize("storage", ["s3://none/runs", "/proc/none"])
def test_storage_that_takes_nothing_is_refused(storage: str, store: S3Server) -> None:
    with (
        pytest.raises(InvalidInputError, match=rf"^storage: {storage} cannot be written to from here"),
        probe._marker(storage),
    ):
        pass
