"""A run behind a URL: what the mirror sends and fetches, in which order, and what it does when the store is away."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from s3_server import S3Server
from training import kill, small_spec, start_torchrun, torchrun

from dabnn.checkpoints import CheckpointWriter, Moment, best_checkpoint, list_checkpoints, load_state, restore_point
from dabnn.distributed import World
from dabnn.errors import DabError, InvalidInputError
from dabnn.observer import Unwatched
from dabnn.run_copy import local_name
from dabnn.run_folder import RunFolder
from dabnn.run_mirror import RunMirror
from dabnn.run_store import RunStore, StoreAwayError, StoreError
from dabnn.spec import CheckpointPolicy, TrainSpec
from dabnn.train import train

URL = "s3://bucket/runs/7f3a"
POLL_S = 0.05


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with S3Server(tmp_path / "s3") as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("DAB_HOME", str(tmp_path / "home"))
        yield found


@pytest.fixture
def mirrors(tmp_path: Path) -> Iterator[Callable[..., RunMirror]]:
    """Makes mirrors of a run, each with a local folder of its own as if on a machine of its own."""
    made: list[RunMirror] = []

    def make(node: str = "a", *, retry_s: float = 30.0, poll_s: float = POLL_S, probe_bytes: int = 0) -> RunMirror:
        made.append(RunMirror(URL, tmp_path / node / "work", retry_s=retry_s, poll_s=poll_s))
        made[-1].begin(probe_bytes)
        return made[-1]

    yield make
    for mirror in made:
        abandon(mirror)


def abandon(mirror: RunMirror) -> None:
    """End a mirror as a kill does: nothing more is sent, and its folder stays."""
    mirror._closing.set()
    for thread in mirror._threads:
        thread.join()
    mirror._unlock()


def save(folder: RunFolder, *steps: int, keep_last: int = 2, **content: torch.Tensor) -> None:
    writer = CheckpointWriter(folder.checkpoints, CheckpointPolicy(keep_last=keep_last, keep_best=0))
    for step in steps:
        state = {"net": {"value": torch.full((64,), float(step)), **content}, "model": {}}
        writer.save(state, Moment(step, step), {"val_top1": float(step)})
    writer.wait()


def wait_until(condition: Callable[[], object], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def sent(server: S3Server) -> list[str]:
    """The names of what was put into the run's folder, in order, without what is put again and again."""
    paths = [path for _, method, path, status in server.requests() if method == "PUT" and status == 200]
    return [path.partition("/7f3a/")[2] for path in paths]


def steps_in(server: S3Server) -> list[str]:
    return sorted(Path(name).stem for name in server.names("runs/7f3a/checkpoints") if name.endswith(".json"))


def test_a_checkpoint_is_sent_as_data_then_metrics_then_commit(
    server: S3Server, mirrors: Callable[..., RunMirror]
) -> None:
    mirror = mirrors()
    with mirror._checkpoint_lock, mirror._small_lock:  # nothing is sent before both are there
        mirror.folder.append_metrics(1, {"val_top1": 50.0})
        save(mirror.folder, 1)
    wait_until(lambda: steps_in(server))
    names = sent(server)
    data, commit = names.index("checkpoints/step-00000001.pt"), names.index("checkpoints/step-00000001.json")
    assert names.index("metrics.jsonl") < commit
    assert data < commit


def test_the_store_keeps_what_retention_keeps(server: S3Server, mirrors: Callable[..., RunMirror]) -> None:
    mirror = mirrors()
    for step in range(1, 6):
        save(mirror.folder, step)
        mirror.settle()
    assert steps_in(server) == ["step-00000004", "step-00000005"]
    mirror.close()
    assert sorted(server.names("runs/7f3a/checkpoints")) == [
        "step-00000004.json", "step-00000004.pt", "step-00000005.json", "step-00000005.pt",
    ]  # fmt: skip
    assert not mirror.folder.root.exists()


def test_a_step_that_is_saved_again_is_whole_in_the_store_at_any_time(
    server: S3Server, mirrors: Callable[..., RunMirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = mirrors(poll_s=60.0)
    save(mirror.folder, 1)
    mirror.settle()
    save(mirror.folder, 1, other=torch.ones(3))
    send = RunStore.send

    def load() -> list[str]:
        return sorted(load_state(best_checkpoint(RunFolder.of(URL)).path)["net"])

    with monkeypatch.context() as broken:
        broken.setattr(RunMirror, "_send_small", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mirror.settle()
    assert load() == ["value"]
    monkeypatch.setattr(RunStore, "send", lambda *a: (send(*a), save(mirror.folder, 1, third=torch.ones(5))))
    mirror.settle()
    assert load() == ["other", "value"]
    monkeypatch.setattr(RunStore, "send", send)
    mirror.close()
    assert load() == ["third", "value"]
    assert len(server.names("runs/7f3a/checkpoints")) == 2


def test_another_machine_goes_on_from_the_newest_checkpoint_and_its_metrics(
    server: S3Server, mirrors: Callable[..., RunMirror]
) -> None:
    first = mirrors("a")
    first.folder.begin_attempt(0, 1)
    first.folder.append_metrics(1, {"val_top1": 50.0})
    save(first.folder, 3, 7)
    first.settle()
    abandon(first)
    second = mirrors("b")
    found = restore_point(second.folder.checkpoints)
    assert found is not None
    assert load_state(found.path)["net"]["value"].tolist() == [7.0] * 64
    assert [checkpoint.step for checkpoint in list_checkpoints(second.folder)] == [3, 7]
    assert [line["step"] for line in second.folder.metrics()] == [1]
    assert second.folder.begin_attempt(7, 1) == 2
    save(second.folder, 9)
    second.close()
    assert steps_in(server) == ["step-00000007", "step-00000009"]


def test_what_was_not_sent_before_a_kill_is_used_on_the_same_machine(
    server: S3Server, mirrors: Callable[..., RunMirror]
) -> None:
    first = mirrors()
    save(first.folder, 1)
    first.settle()
    abandon(first)
    save(first.folder, 2)
    second = mirrors(poll_s=60.0)
    found = restore_point(second.folder.checkpoints)
    assert found is not None
    assert found.step == 2
    assert steps_in(server) == ["step-00000001", "step-00000002"]  # where the other ranks load it from
    assert load_state(f"{URL}/checkpoints/step-00000002.pt")["net"]["value"][0] == 2


def test_what_another_machine_went_beyond_is_not_used(server: S3Server, mirrors: Callable[..., RunMirror]) -> None:
    first = mirrors("a")
    save(first.folder, 1)
    first.settle()
    abandon(first)
    save(first.folder, 2)  # never sent
    second = mirrors("b")
    second.folder.append_metrics(1, {"val_top1": 1.0})
    save(second.folder, 3)
    second.close()
    third = mirrors("a")
    assert [checkpoint.step for checkpoint in list_checkpoints(third.folder)] == [1, 3]
    assert [line["step"] for line in third.folder.metrics()] == [1]


def test_data_without_commit_is_never_chosen_and_goes(server: S3Server, mirrors: Callable[..., RunMirror]) -> None:
    first = mirrors("a")
    save(first.folder, 1)
    first.close()
    (server.objects / "runs/7f3a/checkpoints/step-00000002.pt").write_bytes(b"half of it")
    second = mirrors("b")
    found = restore_point(second.folder.checkpoints)
    assert found is not None
    assert found.step == 1
    save(second.folder, 3)
    second.close()
    assert not [name for name in server.names("runs/7f3a/checkpoints") if "00000002" in name]


def test_damaged_data_is_passed_over_for_the_checkpoint_before(
    server: S3Server, mirrors: Callable[..., RunMirror], caplog: pytest.LogCaptureFixture
) -> None:
    first = mirrors("a")
    save(first.folder, 1, 2)
    first.close()
    file = server.objects / "runs/7f3a/checkpoints/step-00000002.pt"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    second = mirrors("b")
    found = restore_point(second.folder.checkpoints)
    assert found is not None
    assert found.step == 1
    assert "damaged checkpoint" in caplog.text
    with pytest.raises(DabError, match=r"step-00000002\.pt: damaged"):
        load_state(f"{URL}/checkpoints/step-00000002.pt")


def test_a_store_that_is_away_is_waited_for_while_checkpoints_go_on_and_come_in_order(
    server: S3Server, mirrors: Callable[..., RunMirror], caplog: pytest.LogCaptureFixture
) -> None:
    mirror = mirrors()
    save(mirror.folder, 1, keep_last=9)
    mirror.settle()
    server.stop()
    for step in (2, 3, 4):
        save(mirror.folder, step, keep_last=9)
        time.sleep(0.2)
    assert mirror.problem is None
    wait_until(lambda: "does not answer" in caplog.text)
    server.start()
    mirror.close()
    names = [name for name in sent(server) if name.endswith((".pt", ".json")) and name.startswith("checkpoints")]
    assert names == [f"checkpoints/step-{step:08d}{end}" for step in (1, 2, 3, 4) for end in (".pt", ".json")]


def test_a_store_that_stays_away_is_a_problem_after_its_time(
    server: S3Server, mirrors: Callable[..., RunMirror]
) -> None:
    mirror = mirrors(retry_s=0.5)
    server.stop()
    wait_until(lambda: mirror.problem is not None)
    assert "more than train.checkpoint.retry_s allows" in str(mirror.problem)
    with pytest.raises(StoreError, match=r"What is not in the store yet is in .*/a/work"):
        mirror.close()
    assert mirror.folder.root.exists()


def test_a_store_that_is_full_in_mid_checkpoint_is_told_and_earlier_checkpoints_stay(
    server: S3Server, mirrors: Callable[..., RunMirror]
) -> None:
    mirror = mirrors()
    save(mirror.folder, 1)
    mirror.settle()
    server.set_quota(20_000)
    save(mirror.folder, 2, large=torch.zeros(100_000))
    wait_until(lambda: mirror.problem is not None)
    assert "no room in s3://bucket/runs/7f3a (QuotaExceeded" in str(mirror.problem)
    assert steps_in(server) == ["step-00000001"]
    load_state(f"{URL}/checkpoints/step-00000001.pt")


def test_a_store_without_room_for_one_checkpoint_is_found_before_training(
    server: S3Server, mirrors: Callable[..., RunMirror]
) -> None:
    server.set_quota(20_000)
    with pytest.raises(StoreError, match="no room in s3://bucket/runs/7f3a"):
        mirrors(probe_bytes=100_000)
    assert mirrors(probe_bytes=10_000).problem is None
    assert server.names("runs/7f3a") == ["owner.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "the store refuses .*SignatureDoesNotMatch.*AWS_ACCESS_KEY_ID"),
        ({"AWS_ACCESS_KEY_ID": "wrong"}, "the store refuses .*InvalidAccessKeyId"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "s3://bucket/runs/7f3a does not answer .*AWS_ENDPOINT_URL"),
    ],
)
def test_credentials_and_addresses_that_are_wrong_are_found_before_training(
    server: S3Server,
    mirrors: Callable[..., RunMirror],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
    message: str,
) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match=message):
        mirrors(retry_s=1.0)


def test_an_attempt_that_was_taken_over_sends_and_removes_nothing_more(
    server: S3Server, mirrors: Callable[..., RunMirror]
) -> None:
    first = mirrors("a")
    save(first.folder, 1)
    first.settle()
    second = mirrors("b")
    wait_until(lambda: first.problem is not None)
    assert "has taken over" in str(first.problem)
    save(first.folder, 2, 3, 4)
    with pytest.raises(StoreError, match="taken over"):
        first.close()
    second.close()
    assert steps_in(server) == ["step-00000001"]


def test_an_attempt_that_was_taken_over_leaves_the_data_of_its_successor_whole(
    server: S3Server, mirrors: Callable[..., RunMirror]
) -> None:
    first, second = mirrors("a", poll_s=60.0), mirrors("b")
    save(second.folder, 2)
    second.settle()
    save(first.folder, 2, other=torch.ones(9))
    with pytest.raises(StoreError, match="taken over"):
        first._send_checkpoints()
    assert "other" not in load_state(f"{URL}/checkpoints/step-00000002.pt")["net"]


def test_a_store_without_the_owner_is_asked_again(server: S3Server, mirrors: Callable[..., RunMirror]) -> None:
    mirror = mirrors(poll_s=60.0)
    (server.objects / "runs/7f3a/owner.json").unlink()
    with pytest.raises(StoreAwayError, match=r"owner\.json is not there"):
        mirror._send_small()


def test_nothing_looks_at_the_local_folder_when_it_is_removed(
    server: S3Server, mirrors: Callable[..., RunMirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = mirrors()
    save(mirror.folder, 1)
    alive: list[bool] = []

    def look(*_: object, **__: object) -> None:
        alive.extend(thread.is_alive() for thread in mirror._threads)

    monkeypatch.setattr("dabnn.run_mirror.shutil.rmtree", look)
    mirror.close()
    assert alive == [False, False]
    assert steps_in(server) == ["step-00000001"]


def test_an_upload_that_is_answered_with_not_found_did_not_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise FileNotFoundError("NoSuchUpload")

    monkeypatch.setattr(RunStore, "_files", lambda _: SimpleNamespace(put_file=lost, pipe_file=lost))
    store, path = RunStore(URL), tmp_path / "x"
    path.touch()
    with pytest.raises(StoreAwayError, match="not found"):
        store.send(path, "x")
    with pytest.raises(StoreAwayError, match="not found"):
        store.write("x", b"")
    monkeypatch.setattr(RunStore, "_files", lambda _: SimpleNamespace(put_file=lambda *_: (path.unlink(), lost())))
    with pytest.raises(FileNotFoundError, match=r"/x$"):
        store.send(path, "x")


def test_a_file_that_is_not_in_the_store_is_called_missing_and_not_damaged(server: S3Server) -> None:
    with pytest.raises(InvalidInputError, match="there is no such file"):
        load_state(f"{URL}/checkpoints/step-00000002.pt")


def test_two_processes_of_a_machine_do_not_share_a_folder(
    server: S3Server, mirrors: Callable[..., RunMirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrors()
    monkeypatch.setattr("dabnn.run_mirror._LOCK_LIMIT_S", 0.3)
    with pytest.raises(DabError, match="another process of this machine works on s3://bucket/runs/7f3a"):
        mirrors()


def test_a_stop_that_is_asked_for_in_the_store_reaches_the_loop_and_can_be_withdrawn(
    server: S3Server, mirrors: Callable[..., RunMirror]
) -> None:
    mirror, outside = mirrors(), RunFolder.of(URL)
    outside.request_stop()
    wait_until(mirror.folder.is_stop_requested)
    outside.clear_stop()
    wait_until(lambda: not mirror.folder.is_stop_requested())


def test_who_looks_from_outside_sees_what_the_loop_wrote(server: S3Server, mirrors: Callable[..., RunMirror]) -> None:
    mirror = mirrors()
    mirror.folder.begin_attempt(0, 2)
    mirror.folder.append_metrics(1, {"val_top1": 61.0})
    mirror.folder.append_event({"what": "slow", "time": 2.0})
    mirror.folder.leave("inspect/rank-0.txt", "stack")
    save(mirror.folder, 4)
    mirror.close()
    outside = RunFolder.of(URL)
    outside.leave_json("job.json", {"kind": "train"})
    outside.append_event({"what": "lost", "time": 1.0})
    outside.write_result({"status": "finished"})
    assert outside.fresh().result() == {"status": "finished"}
    assert [event["what"] for event in outside.events()] == ["lost", "slow"]
    assert outside.load_json("job.json") == {"kind": "train"}
    assert outside.load_json("none.json") == {}
    assert len(outside.attempts()) == 1
    assert outside.metrics()[0]["metrics"] == {"val_top1": 61.0}
    best = best_checkpoint(outside)
    assert best.path == f"{URL}/checkpoints/step-00000004.pt"
    assert load_state(best.path)["net"]["value"][0] == 4
    assert "inspect/rank-0.txt" in server.names("runs/7f3a")
    outside.forget_result()
    assert outside.fresh().result() == {}


def test_who_looks_from_outside_is_told_what_was_seen_last_when_the_store_is_away(
    server: S3Server, mirrors: Callable[..., RunMirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = mirrors()
    mirror.folder.append_metrics(1, {"val_top1": 61.0})
    mirror.close()
    outside = RunFolder.of(URL).fresh()
    server.stop()
    monkeypatch.setattr("dabnn.run_copy._FRESH_S", 0.0)
    monkeypatch.setattr("dabnn.run_copy._LIMIT_S", 0.2)
    assert [line["step"] for line in outside.metrics()] == [1]
    with pytest.raises(StoreError, match="does not answer"):
        outside.fresh()
    with pytest.raises(StoreError, match="does not answer"):
        outside.request_stop()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://host/runs", "^storage: http://host/runs: http:// takes no files"),
        ("memory://runs", "memory:// is the memory of one process"),
        ("s3:///runs", "names no bucket"),
        ("s3://me:hidden@bucket/runs", "holds a user name"),
        ("s3://bucket/runs?sig=hidden", "something after the path"),
        ("nonsense://bucket/runs", "nonsense:// cannot be used here"),
    ],
)
def test_urls_that_keep_no_runs_are_refused_without_their_secret(url: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        RunStore(url)
    assert "hidden" not in str(caught.value)


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    assert RunFolder.of(tmp_path.as_uri()) == RunFolder(tmp_path)


def start_and_kill(server: S3Server, spec: TrainSpec, folder: Path, num_workers: int) -> None:
    """Train with the run's folder in the store, and kill all once a checkpoint taken in mid-epoch is there."""
    process = start_torchrun(spec, folder, num_workers, URL)
    wait_until(lambda: process.poll() is not None or steps_in(server), 240)
    assert process.poll() is None, process.communicate()[0][-3000:]
    kill(process)
    assert "result.json" not in server.names("runs/7f3a")


def assert_went_on_in_the_middle(epochs: int) -> None:
    folder = RunFolder.of(URL).fresh()
    first, last = folder.attempts()
    assert first["start_step"] == 0
    assert last["start_step"] % 15 > 0
    assert [line["step"] for line in folder.metrics()] == list(range(1, epochs + 1))


# Checkpoints are committed a few steps after an epoch's start, then none for the rest of it.
POLICY = CheckpointPolicy(every_steps=7, every_epochs=99, keep_last=99)


def test_killed_in_mid_epoch_it_resumes_on_an_empty_machine_to_bit_identical_weights(
    server: S3Server, digits: Path, tmp_path: Path
) -> None:
    spec = small_spec(digits, checkpoint=POLICY, epochs=3)
    whole = train(spec, RunFolder(tmp_path / "plain"), world=World.current())
    start_and_kill(server, spec, tmp_path / "spec", 1)
    shutil.rmtree(tmp_path / "home")
    again = train(spec, RunFolder.of(URL), world=World.current())
    assert (again.status, again.weights_sha256) == ("finished", whole.weights_sha256)
    assert_went_on_in_the_middle(spec.epochs)
    assert RunFolder.of(URL).fresh().result() == asdict(again)
    assert not (tmp_path / "home" / "storage-cache" / local_name(URL) / "work").exists()


@pytest.mark.slow
def test_ranks_that_were_killed_resume_from_the_store_to_bit_identical_weights(
    server: S3Server, digits: Path, tmp_path: Path
) -> None:
    spec = small_spec(digits, checkpoint=POLICY, epochs=3, num_workers=2)
    whole = torchrun(spec, tmp_path / "plain", 2)
    start_and_kill(server, spec, tmp_path / "spec", 2)
    shutil.rmtree(tmp_path / "home")
    again = torchrun(spec, tmp_path / "spec", 2, URL)
    assert again["weights_sha256"] == whole["weights_sha256"]
    assert_went_on_in_the_middle(spec.epochs)


def test_a_store_that_is_full_in_mid_training_ends_the_run_with_the_reason(
    server: S3Server, digits: Path, tmp_path: Path
) -> None:
    spec = small_spec(digits, checkpoint=CheckpointPolicy(every_steps=2, keep_last=99), epochs=40)
    watch = threading.Thread(target=lambda: (wait_until(lambda: steps_in(server), 60), server.set_quota(0)))
    watch.start()
    with pytest.raises(StoreError, match="no room in s3://bucket/runs/7f3a"):
        train(spec, RunFolder.of(URL), world=World.current())
    watch.join()
    server.set_quota(None)
    found = list_checkpoints(RunFolder.of(URL).fresh())
    assert found
    load_state(found[-1].path)


class Breaking(Unwatched):
    """A watch that breaks the loop while the checkpoint of the third step is written."""

    def alive(self, step: int) -> None:
        if step == 4:
            raise ZeroDivisionError


def test_the_checkpoint_that_is_written_when_the_loop_breaks_is_brought_into_the_store(
    server: S3Server, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = CheckpointWriter._write
    monkeypatch.setattr(CheckpointWriter, "_write", lambda *arguments: (time.sleep(1), write(*arguments)))
    spec = small_spec(digits, checkpoint=CheckpointPolicy(every_steps=3))
    with pytest.raises(ZeroDivisionError):
        train(spec, RunFolder.of(URL), world=World.current(), watch=Breaking())
    assert steps_in(server) == ["step-00000003"]


def test_wrong_credentials_end_a_run_before_its_first_step(
    server: S3Server, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="the store refuses"):
        train(small_spec(digits), RunFolder.of(URL), world=World.current())
    assert server.names() == []
