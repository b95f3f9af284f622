"""What `dab runs gc` takes for waste, and what it leaves alone."""

import json
import time
from pathlib import Path

import pytest
from s3_server import S3Server

from dabnn.run_folder import RunFolder
from dabnn.run_mirror import RunMirror
from orchestrator.retention import COPY, DAMAGED, DELETED, PACKAGE, PARTIAL, RAY, Waste, find_waste, free
from orchestrator.tracking import RunRecord, Status

LATER_S = 7200.0
RUN_ID = "0" * 31 + "1"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DAB_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def record(
    folder: Path | str, status: Status = "finished", run_id: str = RUN_ID, parent: str | None = None, **params: str
) -> RunRecord:
    RunFolder.of(str(folder)).leave_json("job.json", {"run_id": run_id, "tracking_uri": "http://127.0.0.1:5"})
    tags = {"dab.folder": str(folder)}
    return RunRecord(run_id, "digits", status, "dab", parent, params, tags, {}, 0.0, None, "")


def find(*records: RunRecord, deleted: tuple[RunRecord, ...] = (), after_s: float = LATER_S) -> list[tuple[str, str]]:
    """Return (kind, name) of what would be freed some time from now."""
    found = find_waste(list(records), list(deleted), now=time.time() + after_s)
    return [(waste.kind, Path(waste.place).name) for waste in found]


def write(path: Path, text: str = "12345") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def fill(folder: Path) -> None:
    """A run's folder with a checkpoint, with what a kill leaves, and with what somebody else put there."""
    for name in (
        "checkpoints/step-00000004.pt", "checkpoints/step-00000004.json", "metrics.jsonl", "notes.txt",
        "checkpoints/step-00000005.pt", "checkpoints/step-00000006.tmp", ".progress.json.4711", "ray/state",
        "checkpoints/step-00000002.pt.damaged", "trials/a/.progress.json.12", "checkpoints/step-00000004-0123abcd.pt",
        "checkpoints/step-00000003-0123abcd.pt",
    ):  # fmt: skip
        write(folder / name)


def test_what_a_kill_left_in_the_folder_of_an_ended_run_is_freed_and_the_rest_stays(home: Path) -> None:
    fill(home / "run")
    done = record(home / "run")
    found = find_waste([done], [], now=time.time() + LATER_S)
    assert sorted((waste.kind, Path(waste.place).name) for waste in found) == sorted(
        [
            (PARTIAL, "step-00000003-0123abcd.pt"),
            (PARTIAL, "step-00000005.pt"),
            (PARTIAL, "step-00000006.tmp"),
            (PARTIAL, ".progress.json.4711"),
            (DAMAGED, "step-00000002.pt.damaged"),
            (RAY, "ray"),
        ]
    )
    assert {waste.num_bytes for waste in found} == {5}
    free(found)
    left = sorted(path.name for path in (home / "run").rglob("*") if path.is_file())
    assert left == sorted(
        [
            "step-00000004.pt", "step-00000004-0123abcd.pt", "step-00000004.json", "metrics.jsonl", "notes.txt",
            "job.json", ".progress.json.12",
        ]
    )  # fmt: skip


def test_what_may_still_be_written_is_left_alone(home: Path) -> None:
    fill(home / "run")
    assert find(record(home / "run"), after_s=60) == []


@pytest.mark.parametrize("status", ["queued", "running"])
def test_a_living_run_is_never_touched(home: Path, status: Status) -> None:
    fill(home / "run")
    assert find(record(home / "run", status)) == []
    assert find(record(home / "run"), deleted=(record(home / "run", status),)) == find(record(home / "run"))


def test_a_run_that_still_writes_its_progress_is_not_touched_whatever_the_tracker_says(home: Path) -> None:
    fill(home / "run")
    RunFolder(home / "run").write_progress({"time": time.time() + LATER_S})
    assert find(record(home / "run")) == []
    assert find(deleted=(record(home / "run"),)) == []


def test_trials_of_a_living_sweep_are_not_touched(home: Path) -> None:
    fill(home / "sweep/trials/b")
    sweep, trial = record(home / "sweep", "running", "a"), record(home / "sweep/trials/b", "finished", "b", "a")
    assert find(sweep, trial) == []
    assert find(sweep, deleted=(trial,)) == []


def test_the_folder_of_a_deleted_run_is_freed_with_consent_only(home: Path) -> None:
    fill(home / "run")
    found = find_waste([], [record(home / "run")])
    assert [(waste.kind, waste.place, waste.needs_consent) for waste in found] == [(DELETED, str(home / "run"), True)]
    assert not Waste(PARTIAL, "x", 1).needs_consent
    free(found)
    assert not (home / "run").exists()


def test_the_folder_of_a_deleted_run_stays_while_another_needs_it(home: Path) -> None:
    fill(home / "run")
    gone = record(home / "run")
    heir = record(home / "heir", run_id="c", **{"train.distill.teacher": f"{home}/run/checkpoints/step-00000004.pt"})
    assert find(heir, deleted=(gone,)) == []
    assert find(record(home / "run/trials/a", run_id="d"), deleted=(gone,)) == [(PARTIAL, ".progress.json.12")]


def test_a_folder_that_is_not_that_of_the_deleted_run_stays(home: Path) -> None:
    other = record(home / "run", run_id="c")
    assert find(deleted=(RunRecord(**{**vars(other), "run_id": RUN_ID}),)) == []


def test_the_folder_of_a_run_that_the_tracker_does_not_know_stays(home: Path) -> None:
    """It may be recorded in another database: the tracker's store, and what listens on an address, can change."""
    fill(home / "storage" / RUN_ID)
    record(home / "storage" / RUN_ID)
    known = record(home / "storage" / ("f" * 32), run_id="f" * 32)
    assert find(known) == []


def test_code_that_no_run_began_with_is_freed(home: Path) -> None:
    write(home / "packages/aaaa/dabnn/x.py")
    write(home / "packages/bbbb/dabnn/x.py")
    write(home / "packages/.partial-xyz/x.py")
    done = record(home / "run")
    RunFolder(home / "run").leave_json("origin.json", {"code": "aaaa"})
    assert find(done) == [(PARTIAL, ".partial-xyz"), (PACKAGE, "bbbb")]
    queued = record(home / "other", "queued", "c")
    assert find(done, queued) == [(PARTIAL, ".partial-xyz")]


def test_runs_in_a_store_are_freed_and_copies_of_them_too(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Server(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        done, gone = record("s3://bucket/done"), record("s3://bucket/gone", run_id="c")
        write(server.objects / "done/checkpoints/step-00000005.pt")
        RunFolder.of("s3://bucket/done").fresh()
        assert find(done, after_s=60) == []
        found = find_waste([done], [gone], now=time.time() + LATER_S)
        assert [(waste.kind, waste.place) for waste in found[:2]] == [
            (DELETED, "s3://bucket/gone"),
            (PARTIAL, "s3://bucket/done/checkpoints/step-00000005.pt"),
        ]
        assert [(waste.kind, Path(waste.place).name[:4]) for waste in found[2:]] == [(COPY, "done"), (COPY, "gone")]
        free(found)
        assert server.names() == ["done/job.json"]
        assert list((home / "storage-cache").iterdir()) == []


def test_a_copy_in_use_or_with_what_is_not_in_the_store_is_kept(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Server(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        done = record("s3://bucket/done")
        cache = next((home / "storage-cache").iterdir())
        mirror = RunMirror("s3://bucket/done", cache / "work", retry_s=1, poll_s=60)
        mirror.begin()
        assert find(done) == []
        commit = {"path": "step-00000005.pt", "step": 5, "epoch": 1, "metrics": {}, "sha256": "", "num_bytes": 5}
        write(cache / "work/checkpoints/step-00000005.pt")
        write(cache / "work/checkpoints/step-00000005.json", json.dumps(commit))
        mirror._closing.set()
        mirror._unlock()
        for thread in mirror._threads:
            thread.join()
        assert find(done) == []
        write(server.objects / "done/checkpoints/step-00000005.pt")  # the upload of its commit broke off
        assert [kind for kind, _ in find(done)] == [PARTIAL]
        write(server.objects / "done/checkpoints/step-00000005.json")
        assert [kind for kind, _ in find(done)] == [COPY]
