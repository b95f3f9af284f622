import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dabnn.run_folder import RunFolder
from jobs.system_metrics import pause_s, sampling


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lines(folder: RunFolder) -> list[dict[str, object]]:
    return [json.loads(line) for line in folder.system_file.read_text().splitlines()]


def test_the_load_is_sampled_from_the_first_attempt_to_the_end_of_the_block(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with sampling(folder, 0.02):
        time.sleep(0.2)
        assert not folder.system_file.exists()
        folder.begin_attempt(0, 1)
        wait_until(lambda: folder.system_file.exists() and len(lines(folder)) >= 3)
    time.sleep(0.1)
    num_lines = len(lines(folder))
    time.sleep(0.2)
    assert len(lines(folder)) == num_lines
    assert lines(folder)[0]["step"] == 0
    assert "system/cpu_utilization_percentage" in str(lines(folder)[0]["metrics"])


def test_no_interval_is_no_sample(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.begin_attempt(0, 1)
    with sampling(folder, 0.0):
        time.sleep(0.1)
    assert not folder.system_file.exists()


def test_what_goes_wrong_with_a_sample_is_said_once_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    folder.begin_attempt(0, 1)
    started = folder.attempts()
    monkeypatch.setattr(RunFolder, "attempts", lambda _: started)
    shutil.rmtree(folder.root)
    with caplog.at_level(logging.WARNING), sampling(folder, 0.02):
        wait_until(lambda: bool(caplog.records))
        time.sleep(0.1)
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        f"{folder.root}: the load of the machine is recorded no more"
    ]
    assert not folder.root.exists()


@pytest.mark.parametrize(("age_s", "expected"), [(0, 10), (3600, 10), (7200, 20), (7 * 86400, 1680)])
def test_long_runs_are_sampled_less_often(age_s: float, expected: float) -> None:
    assert pause_s(10, age_s) == expected
