import pytest

from orchestrator.runs import decide_status
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
