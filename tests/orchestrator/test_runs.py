from pathlib import Path
from types import SimpleNamespace

import pytest

from dabnn.errors import InvalidInputError
from dabnn.run_folder import RunFolder
from orchestrator import runs
from orchestrator.runs import RunStatus, decide_status
from orchestrator.tracking import Status

RESUME = "`dab resume` continues from the last checkpoint"


@pytest.mark.parametrize("tracked", ["finished", "failed", "stopped"])
@pytest.mark.parametrize("job", [None, "RUNNING", "FAILED", "SUCCEEDED"])
def test_an_end_that_the_tracker_knows_is_believed(tracked: Status, job: str | None) -> None:
    assert decide_status(tracked, job, None) == (tracked, "")


@pytest.mark.parametrize("tracked", ["queued", "running"])
@pytest.mark.parametrize("job", ["PENDING", "RUNNING"])
def test_a_run_whose_job_lives_goes_on_whatever_its_folder_says(tracked: Status, job: str) -> None:
    assert decide_status(tracked, job, None) == (tracked, "")
    assert decide_status(tracked, job, "finished") == (tracked, "")


@pytest.mark.parametrize("job", [None, "SUCCEEDED", "FAILED", "STOPPED"])
@pytest.mark.parametrize("left", ["finished", "failed", "stopped"])
def test_an_end_that_never_reached_the_tracker_is_read_from_the_folder(job: str | None, left: Status) -> None:
    assert decide_status("running", job, left) == (left, "")
    assert decide_status("queued", job, left) == (left, "")


@pytest.mark.parametrize("tracked", ["queued", "running"])
@pytest.mark.parametrize(
    ("job", "expected"),
    [
        (None, ("failed", f"its cluster is gone; {RESUME}")),
        ("FAILED", ("failed", f"its driver died; {RESUME}")),
        ("SUCCEEDED", ("failed", f"its driver died; {RESUME}")),
        ("STOPPED", ("stopped", f"its job was stopped; {RESUME}")),
    ],
)
def test_a_run_lost_without_a_word_says_why_and_how_to_go_on(
    tracked: Status, job: str | None, expected: tuple[Status, str]
) -> None:
    assert decide_status(tracked, job, None) == expected


def run_status(folder: Path, status: Status, kind: str = "train") -> RunStatus:
    return RunStatus("7f3a91c2", "name", kind, status, "", 1, 0, 0, {}, [], {}, str(folder), "", "uri", [], [])


def test_a_run_that_failed_by_itself_while_it_was_stopped_stays_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)

    def end_job(*_: object) -> None:
        folder.write_result({"status": "failed", "message": "no room"})

    monkeypatch.setattr(runs, "status", lambda *_: run_status(tmp_path, folder.result().get("status", "running")))
    monkeypatch.setattr(runs.tracking, "find_run", lambda *_: SimpleNamespace(tags={"dab.job_id": "j"}, run_id="7f3a"))
    monkeypatch.setattr(runs, "target_of", lambda _: SimpleNamespace(jobs_url="http://there"))
    monkeypatch.setattr(runs, "_job_status", lambda _: "RUNNING")
    monkeypatch.setattr(runs, "stop_job", end_job)
    monkeypatch.setattr(runs, "_record_late", lambda *_: pytest.fail("how it ended was overwritten"))
    assert runs.stop("uri", "name", now=True).status == "failed"


def test_a_second_stop_of_a_trial_gives_no_advice_that_is_refused(tmp_path: Path) -> None:
    RunFolder(tmp_path).request_stop()
    with pytest.raises(InvalidInputError, match="being stopped already") as raised:
        runs._refuse_second_stop(run_status(tmp_path, "running", "trial"), now=False, is_trial=True)
    assert "--now" not in str(raised.value)
