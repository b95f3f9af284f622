"""A run whose store is away between two attempts waits for it, as it would while it trains."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import S3Server

from dabnn import run_copy
from dabnn.run_folder import RunFolder
from dabnn.run_store import StoreError
from jobs.growth import forget_wish
from jobs.preflight import wait_for_store

URL = "s3://bucket/waiting"


@pytest.fixture
def away(store: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunFolder]:
    """A run behind a store that does not answer."""
    monkeypatch.setenv("DAB_HOME", str(tmp_path))
    store.stop()
    yield RunFolder.of(URL)
    store.stop()
    store.start()


def test_a_store_that_is_away_before_an_attempt_is_waited_for(store: S3Server, away: RunFolder) -> None:
    told = list[str]()
    back = threading.Timer(1.0, store.start)
    back.start()
    assert wait_for_store(away, 60, told.append)
    back.join()
    assert [line.partition(" (")[0] for line in told] == [f"waiting for {URL}"]
    assert not wait_for_store(away, 60, told.append)
    assert len(told) == 1
    assert store.names("waiting") == []


def test_a_store_that_stays_away_ends_the_waiting_and_a_folder_needs_none(
    store: S3Server, away: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="does not answer"):
        wait_for_store(away, 0.5, lambda _: None)
    monkeypatch.setattr(run_copy, "_LIMIT_S", 0.5)
    forget_wish(away)  # at the end of an attempt, where an error would hide how that ended
    store.start()
    assert not wait_for_store(RunFolder(tmp_path / "run"), 0, lambda _: None)
