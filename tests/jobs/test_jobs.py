"""One cluster and one tracker; runs that do not disturb each other go side by side.

All runs have the same configuration but for their names, so all of them, disturbed or not, must end with the same
weights.
"""

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from program import ROOT, Dab, Done, finish, has_checkpoint, kill, processes_of, wait_until
from test_failures import find_nothing

from dabnn.run_folder import RunFolder
from orchestrator import tracking
from orchestrator.mlflow_client import unchecked_client
from orchestrator.processes import members, recorded

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

CONFIG = ROOT / "examples" / "digits.yaml"
EPOCHS, STEPS = 3, 45
QUOTED = '$(touch PWNED); "x" `touch PWNED` $HOME ${PATH} & | > PWNED #'
METRICS = {"train_loss", "train_top1", "train_top5", "val_loss", "val_top1", "val_top5", "learning_rate"}


def narrow(digits: Path, name: str, *changes: str) -> list[str]:
    """Return the arguments of `dab submit` for a narrow network on the digits."""
    values = [
        f"name={json.dumps(name)}",
        f"data.train={digits}",
        "data.batch_size=32",
        "model.width=0.0625",
        f"train.epochs={EPOCHS}",
        "train.checkpoint.every_steps=10",
        *changes,
    ]
    return ["submit", str(CONFIG), *(part for value in values for part in ("--set", value))]


def detached(dab: Dab, arguments: list[str]) -> str:
    """Submit without waiting and return the run's id."""
    data = dab.ok(*arguments, "--detach")
    assert data["status"] in ("queued", "running")
    return str(data["run_id"])


def ended(dab: Dab, run_id: str, timeout_s: float = 240) -> dict[str, Any]:
    """Wait until a run has ended and return its status."""
    wait_until(lambda: dab.folder(run_id).result(), timeout_s)
    states = ("finished", "failed", "stopped")
    return dict(wait_until(lambda: (data := dab.ok("status", run_id))["status"] in states and data, 60))


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """Return every recorded point of a metric."""
    return [(point.step, point.value) for point in unchecked_client(uri).get_metric_history(run_id, key)]


def artifact(dab: Dab, uri: str, run_id: str, name: str) -> Any:
    """Return a JSON file that is kept with a run."""
    place = tracking.find_run(uri, run_id).artifact_uri.removeprefix("mlflow-artifacts:/")
    return json.loads((dab.home / "artifacts" / place / name).read_text())


def hold(dab: Dab, run_ids: list[str], num_workers: int) -> dict[str, list[psutil.Process]]:
    """Halt the workers of each run once it has a checkpoint, so that it stays in mid-epoch; return them."""
    held: dict[str, list[psutil.Process]] = {}

    def is_held(run_id: str) -> bool:
        if run_id not in held and has_checkpoint(dab.folder(run_id), 1):
            workers = processes_of(run_id, "ray::RayTrainWorker")
            assert len(workers) == num_workers
            for worker in workers:
                worker.suspend()
            held[run_id] = workers
        return run_id in held

    wait_until(lambda: sum(map(is_held, run_ids)) == len(run_ids))
    return held


def wait_for_attempt(dab: Dab, run_id: str, number: int) -> None:
    """Wait until the training loop has begun for the `number`-th time."""
    wait_until(lambda: len(dab.folder(run_id).attempts()) >= number)


def wait_for_end_of_job(dab: Dab, run_id: str) -> None:
    """Wait until a run has left its result and its job is gone."""
    wait_until(lambda: dab.folder(run_id).result() and not processes_of(run_id, "-m jobs.train"))


def go_on(workers: list[psutil.Process]) -> None:
    """Let halted workers go on."""
    for worker in workers:
        worker.resume()


@dataclass(frozen=True)
class Ended:
    """A run that is over: what the command that followed it returned, and its status."""

    done: Done
    status: dict[str, Any]

    @property
    def run_id(self) -> str:
        return str(self.status["run_id"])

    @property
    def uri(self) -> str:
        return str(self.status["tracking_uri"])


@pytest.fixture(scope="module")
def pair(dab: Dab, digits: Path) -> tuple[Ended, Ended]:
    """Two runs side by side.

    The first is undisturbed. The second has a hostile name, its `dab submit` is interrupted with Ctrl-C, and then one
    of its workers is killed in mid-epoch.
    """
    before = dab.run_ids()
    following = dab.start(*narrow(digits, QUOTED))
    (run_id,) = wait_until(lambda: dab.run_ids() - before)
    whole = dab.start(*narrow(digits, "whole", "tracking.system_metrics_s=0.2"))
    folder = dab.folder(run_id)
    wait_until(lambda: has_checkpoint(folder, 10))
    kill(processes_of(run_id, "ray::RayTrainWorker")[-1])
    following.send_signal(signal.SIGINT)
    interrupted = finish(following)
    done = finish(whole)
    killed = ended(dab, run_id)
    return Ended(done, dab.ok("status", done.data["run_id"])), Ended(interrupted, killed)


@pytest.fixture(scope="module")
def whole(pair: tuple[Ended, Ended]) -> Ended:
    """An undisturbed run."""
    return pair[0]


@pytest.fixture(scope="module")
def disturbed(pair: tuple[Ended, Ended]) -> Ended:
    """A run with a hostile name, one killed worker, and nobody who follows it."""
    return pair[1]


@pytest.fixture(scope="module")
def resumed(dab: Dab, digits: Path, whole: Ended) -> dict[str, Any]:
    """Two runs that end in mid-epoch, one by `dab stop`, one because its driver is killed, both resumed.

    While they go on, the tracker is killed.
    """
    stopped = detached(dab, narrow(digits, "stopped"))
    lost = detached(dab, narrow(digits, "lost", "cluster.max_failures=0"))
    held = hold(dab, [stopped, lost], num_workers=2)
    seen: dict[str, Any] = {"stopped": stopped, "lost": lost}
    (driver,) = processes_of(lost, "-m jobs.train")
    kill(driver)
    go_on(held[lost])
    stopping = dab.start("stop", stopped)
    wait_until(dab.folder(stopped).is_stop_requested)
    go_on(held[stopped])
    seen["stop"] = finish(stopping)
    seen["stop again"] = dab("stop", stopped)
    seen["lost in list"] = next(run for run in dab.ok("runs")["runs"] if run["run_id"] == lost)
    seen["lost status"] = dab.ok("status", lost)
    seen["resume"] = [dab("resume", run_id, "--detach") for run_id in (stopped, lost)]
    for run_id in (stopped, lost):
        wait_for_attempt(dab, run_id, 2)
    server = recorded(dab.home / "tracking.json")
    assert server is not None
    for process in members(server):
        process.kill()
    for run_id in (stopped, lost):
        wait_for_end_of_job(dab, run_id)
    seen["tracker"] = dab.ok("cluster", "status")["tracking"]["state"]
    seen["status"] = {run_id: dab.ok("status", run_id) for run_id in (stopped, lost)}
    return seen


@dataclass(frozen=True)
class Sweep:
    """A sweep that is over and its trials, the oldest first."""

    status: dict[str, Any]
    trials: list[tracking.RunRecord]


@pytest.fixture(scope="module")
def side_by_side(dab: Dab, digits: Path) -> tuple[Sweep, Sweep, dict[str, Any]]:
    """A search by TPE, a grid one of whose points diverges, and a long run that is stopped at once."""
    drawn = {
        "num_trials": 3, "epochs": 1, "max_concurrent": 2,
        "space": {
            "binarize.bin_start": {"int": [2, 4]}, "binarize.bin_end": {"int": [2, 7]},
            "optim.max_lr": {"log": [1e-3, 1e-2]}, "schedule.name": {"choice": ["decay", "cosine"]},
        },
    }  # fmt: skip
    grid = {"num_trials": 2, "epochs": 1, "algorithm": "grid", "space": {"optim.max_lr": {"choice": [1e30, 2e-3]}}}
    alone = "cluster.num_workers=1"
    long = detached(dab, narrow(digits, "long", alone, "train.epochs=10000"))
    sweeps = [
        detached(dab, [*narrow(digits, name, alone, *changes, f"search={json.dumps(search)}"), "--sweep"])
        for name, search, changes in (("drawn", drawn, []), ("grid", grid, ["schedule={name: constant}"]))
    ]
    wait_until(lambda: has_checkpoint(dab.folder(long), 1))
    stop = dab("stop", long, "--now")
    left = {"stop": stop, "run_id": long, "drivers": processes_of(long, "-m jobs.train")}
    over = []
    for run_id in sweeps:
        status = ended(dab, run_id)
        trials = tracking.find_runs(status["tracking_uri"], parent=run_id)
        over.append(Sweep(status, sorted(trials, key=lambda trial: trial.name)))
    return over[0], over[1], left


def test_a_followed_run_prints_its_epochs_and_ends_with_one_json_document(whole: Ended) -> None:
    assert whole.done.code == 0
    assert whole.done.data["status"] == "finished"
    assert set(whole.done.data) == {"run_id", "job_id", "status", "metrics", "tracking_uri"}
    assert set(whole.done.data["metrics"]) >= METRICS | {"images_per_s"}
    for epoch in range(1, EPOCHS + 1):
        assert f"epoch {epoch}: train loss " in whole.done.stderr
    assert "images/s" in whole.done.stderr


def test_status_tells_what_scripts_rely_on(whole: Ended) -> None:
    status = whole.status
    assert {key: status[key] for key in ("name", "status", "attempts", "epoch", "step")} == {
        "name": "whole", "status": "finished", "attempts": 1, "epoch": EPOCHS, "step": EPOCHS * STEPS,
    }  # fmt: skip
    assert [checkpoint["epoch"] for checkpoint in status["checkpoints"]][-1] == EPOCHS
    assert status["metrics"] == whole.done.data["metrics"]


def test_the_tracker_holds_all_of_a_run(dab: Dab, digits: Path, whole: Ended) -> None:
    record = tracking.find_run(whole.uri, "whole")
    assert (record.run_id, record.status, record.experiment) == (whole.run_id, "finished", "dab")
    assert record.params | {"model.width": "0.0625", "train.epochs": "3", "model.num_classes": "10"} == record.params
    manifest = json.loads((digits / "manifest.json").read_text())
    assert manifest["classes"] == [str(digit) for digit in range(10)]
    assert len(record.tags["dab.data_digest"]) == 64
    assert record.tags["dab.weights_sha256"] == whole.status["weights_sha256"]
    assert set(record.tags) >= {"dab.git_commit", "dab.python", "dab.version.torch", "dab.version.ray", "dab.job_id"}
    assert set(record.tags) >= {"dab.model_digest", "dab.plan_digest", "dab.packed_bytes"}
    assert record.metrics["system/system_memory_usage_megabytes"] > 0
    assert [step for step, _ in history(whole.uri, whole.run_id, "val_top1")] == [1, 2, 3]
    assert record.metrics["val_top1"] == whole.status["metrics"]["val_top1"]
    inputs = unchecked_client(whole.uri).get_run(whole.run_id).inputs
    assert inputs is not None
    assert {one.dataset.digest for one in inputs.dataset_inputs} == {record.tags["dab.data_digest"][:36]}
    assert {one.tags[0].value for one in inputs.dataset_inputs} == {"train", "val"}
    assert artifact(dab, whole.uri, whole.run_id, "config.json")["model"]["width"] == 0.0625
    assert artifact(dab, whole.uri, whole.run_id, "checkpoints.json") == whole.status["checkpoints"]


def test_ctrl_c_leaves_the_run_going_and_says_how_to_follow_and_stop_it(disturbed: Ended) -> None:
    short = disturbed.run_id[:8]
    assert disturbed.done.code == 130
    assert f"run {short} goes on" in disturbed.done.stderr
    assert f"dab logs {short} --follow" in disturbed.done.stderr
    assert f"dab stop {short}" in disturbed.done.stderr
    assert disturbed.done.data["error"]["exit_code"] == 130
    assert disturbed.status["status"] == "finished"


def test_a_run_whose_worker_was_killed_ends_with_the_weights_of_an_undisturbed_one(
    dab: Dab, whole: Ended, disturbed: Ended
) -> None:
    attempts = dab.folder(disturbed.run_id).attempts()
    assert disturbed.status["attempts"] == len(attempts) == 2
    assert attempts[1]["start_step"] >= 10
    assert attempts[1]["start_step"] % STEPS
    assert disturbed.status["weights_sha256"] == whole.status["weights_sha256"]
    assert len(whole.status["weights_sha256"]) == 64


def test_an_epoch_that_was_replayed_stands_once_in_the_tracker(whole: Ended, disturbed: Ended) -> None:
    for key in ("train_loss", "val_top1"):
        assert history(disturbed.uri, disturbed.run_id, key) == history(whole.uri, whole.run_id, key)


def test_a_name_that_looks_like_a_shell_command_is_only_a_name(dab: Dab, disturbed: Ended) -> None:
    assert disturbed.status["name"] == QUOTED
    assert tracking.find_run(disturbed.uri, disturbed.run_id).name == QUOTED
    assert QUOTED in dab.ok("logs", disturbed.run_id)["text"]
    assert not [path for top in (dab.home, dab.cwd, ROOT) for path in top.rglob("PWNED") if ".venv" not in path.parts]


def test_runs_lists_them_all_newest_first(dab: Dab, whole: Ended, disturbed: Ended) -> None:
    runs = dab.ok("runs")["runs"]
    ids = [run["run_id"] for run in runs]
    assert {whole.run_id, disturbed.run_id} <= set(ids)
    assert [run["start_time"] for run in runs] == sorted((run["start_time"] for run in runs), reverse=True)


def test_stop_takes_a_checkpoint_in_mid_epoch(dab: Dab, resumed: dict[str, Any]) -> None:
    done = resumed["stop"]
    assert (done.code, done.data["status"]) == (0, "stopped"), done.stderr
    first, second = dab.folder(resumed["stopped"]).attempts()
    assert first["start_step"] == 0
    assert second["start_step"] == done.data["checkpoints"][-1]["step"] == done.data["step"]
    assert done.data["step"] % STEPS


def test_a_run_that_has_ended_cannot_be_stopped(resumed: dict[str, Any]) -> None:
    again = resumed["stop again"]
    assert again.code == 2
    assert again.message == "stopped: already stopped; there is nothing to stop."


def test_a_run_whose_driver_was_killed_is_failed_and_says_how_to_go_on(resumed: dict[str, Any]) -> None:
    status = resumed["lost status"]
    assert status["status"] == resumed["lost in list"]["status"] == "failed"
    assert status["message"] == (
        "its driver died (SIGKILL); cluster.max_failures=0 allows no restart. `dab resume` continues from the last "
        "checkpoint."
    )


def test_resumed_runs_end_with_the_weights_of_an_undisturbed_one(whole: Ended, resumed: dict[str, Any]) -> None:
    for done in resumed["resume"]:
        assert done.code == 0, done.stderr
    for status in resumed["status"].values():
        assert (status["status"], status["attempts"]) == ("finished", 2), status
        assert status["weights_sha256"] == whole.status["weights_sha256"]


def test_runs_outlive_their_tracker_which_gets_everything_later(
    dab: Dab, whole: Ended, resumed: dict[str, Any]
) -> None:
    assert resumed["tracker"] == "stopped"
    for run_id, status in resumed["status"].items():
        uri = status["tracking_uri"]
        record = tracking.find_run(uri, run_id)
        assert record.status == "finished"
        assert history(uri, run_id, "val_top1") == history(whole.uri, whole.run_id, "val_top1")
        assert record.tags["dab.weights_sha256"] == status["weights_sha256"]
        assert artifact(dab, uri, run_id, "checkpoints.json") == status["checkpoints"]


def test_a_finished_run_is_not_resumed(dab: Dab, whole: Ended) -> None:
    done = dab("resume", whole.run_id)
    assert done.code == 2
    assert done.message.startswith("whole: is finished; only a stopped or failed run can be resumed.")


def test_export_evaluate_and_predict_agree(dab: Dab, digits: Path, whole: Ended, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "model.safetensors"
    exported = dab.ok("export", "whole", "-o", file)
    assert exported["same_argmax"] == 1.0
    assert exported["layers_equal"]
    assert exported["problems"] == []
    assert exported["file_bytes"] == file.stat().st_size < exported["float_bytes"]
    assert set(exported) >= {"ratio", "flipped_signs", "max_abs_logit_diff", "top1_float_path", "top1_packed"}
    assert artifact(dab, whole.uri, whole.run_id, "packed/verification.json")["file_bytes"] == exported["file_bytes"]

    of_run, of_file = dab.ok("evaluate", "whole"), dab.ok("evaluate", file, "--data", digits)
    assert set(of_run) == {"top1", "top5", "loss", "num_samples", "images_per_s"}
    assert of_run["num_samples"] == exported["num_samples"] == 359
    assert of_run["top1"] == of_file["top1"] == exported["top1_packed"]
    assert of_run["loss"] == pytest.approx(of_file["loss"], rel=1e-6)

    image = write_digit(tmp_path / "digit.png")
    (seen,) = dab.ok("predict", file, image)["predictions"]
    probabilities = [entry["probability"] for entry in seen["classes"]]
    assert len(probabilities) == 5
    assert probabilities == sorted(probabilities, reverse=True)
    assert 0 < sum(probabilities) <= 1 + 1e-6
    assert {entry["class"] for entry in seen["classes"]} < {str(digit) for digit in range(10)}

    onnx = tmp_path / "model.onnx"
    again = dab.ok("export", "whole", "-o", onnx, "--format", "onnx")
    assert again["comparison"]["same_argmax"] >= 0.995
    assert again["file_bytes"] == again["comparison"]["file_bytes"] == onnx.stat().st_size
    assert {key: again[key] for key in ("top1_packed", "format")} == {"top1_packed": of_run["top1"], "format": "onnx"}

    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(file.read_bytes()[:-100])
    done = dab("predict", damaged, image)
    assert done.code == 2
    assert done.message.startswith(f"{damaged}: ")


def write_digit(path: Path) -> Path:
    """Write an image of a handwritten digit."""
    from PIL import Image
    from sklearn.datasets import load_digits

    Image.fromarray((load_digits().images[0] * 15).astype("uint8")).save(path)
    return path


def test_a_search_is_one_run_with_a_child_for_each_trial(side_by_side: tuple[Sweep, Sweep, dict[str, Any]]) -> None:
    sweep, _, _ = side_by_side
    assert sweep.status["status"] == "finished"
    assert [trial.name for trial in sweep.trials] == ["drawn-t01", "drawn-t02", "drawn-t03"]
    for trial in sweep.trials:
        assert trial.tags["mlflow.parentRunId"] == trial.parent == sweep.status["run_id"]
        assert (trial.status, trial.params["train.epochs"]) == ("finished", "1")
        assert 2 <= int(trial.params["binarize.bin_start"]) <= int(trial.params["binarize.bin_end"]) <= 7
    assert len({trial.params["optim.max_lr"] for trial in sweep.trials}) == 3
    best = max(sweep.trials, key=lambda trial: trial.metrics["val_top1"])
    parent = tracking.find_run(sweep.status["tracking_uri"], "drawn")
    winner = next(trial for trial in sweep.trials if trial.run_id == parent.tags["dab.best_run"])
    assert winner.metrics["val_top1"] == best.metrics["val_top1"] == parent.metrics["val_top1"]


def test_the_model_of_a_search_is_that_of_its_best_trial(
    dab: Dab, side_by_side: tuple[Sweep, Sweep, dict[str, Any]], tmp_path: Path
) -> None:
    sweep, _, _ = side_by_side
    best = tracking.find_run(sweep.status["tracking_uri"], "drawn").tags["dab.best_run"]
    exported = dab.ok("export", "drawn", "-o", tmp_path / "best.safetensors")
    assert exported["run_id"] == best
    (trial,) = (trial for trial in sweep.trials if trial.run_id == best)
    assert exported["top1_packed"] == pytest.approx(trial.metrics["val_top1"])


def test_a_trial_that_fails_does_not_end_its_search(side_by_side: tuple[Sweep, Sweep, dict[str, Any]]) -> None:
    _, sweep, _ = side_by_side
    assert sweep.status["status"] == "finished"
    by_rate = {float(trial.params["optim.max_lr"]): trial for trial in sweep.trials}
    assert {rate: trial.status for rate, trial in by_rate.items()} == {1e30: "failed", 2e-3: "finished"}
    assert "is not finite" in by_rate[1e30].tags["dab.message"]
    parent = tracking.find_run(sweep.status["tracking_uri"], "grid")
    assert parent.tags["dab.best_run"] == by_rate[2e-3].run_id


def test_a_finished_search_is_not_resumed_and_a_run_without_checkpoint_is_not_exported(
    dab: Dab, side_by_side: tuple[Sweep, Sweep, dict[str, Any]], tmp_path: Path
) -> None:
    _, sweep, _ = side_by_side
    failed = next(trial for trial in sweep.trials if trial.status == "failed")
    done = dab("export", failed.run_id, "-o", tmp_path / "none.safetensors")
    assert done.code == 2
    assert "no checkpoint yet" in done.message
    assert list(tmp_path.iterdir()) == []
    done = dab("resume", "grid")
    assert done.code == 2
    assert "--set search.num_trials=+20" in done.message
    done = dab("resume", "grid", "--set", "search.algorithm=tpe")
    assert done.code == 2
    assert 'search.algorithm: was "grid", is "tpe"' in done.message


def test_a_search_is_extended_and_goes_on_after_its_driver_was_killed_without_repeating_a_trial(
    dab: Dab, side_by_side: tuple[Sweep, Sweep, dict[str, Any]]
) -> None:
    sweep, _, _ = side_by_side
    run_id = dab.ok("resume", "drawn", "--set", "search.num_trials=+2", "--detach")["run_id"]
    trials = dab.folder(run_id).root / "trials"
    (driver,) = wait_until(lambda: (trials / "0003").is_dir() and processes_of(run_id, "-m jobs.sweep"))
    kill(driver)
    status = ended(dab, run_id)
    assert status["status"] == "finished"
    assert any("its driver died (SIGKILL)" in line for line in status["story"])
    runs = tracking.find_runs(status["tracking_uri"], parent=run_id)
    assert {run.name: run.status for run in runs} == {f"drawn-t{number:02d}": "finished" for number in range(1, 6)}
    assert {run.run_id for run in sweep.trials} < {run.run_id for run in runs}
    assert [len(RunFolder(folder).metrics()) for folder in sorted(trials.iterdir())] == [1] * 5


def test_searches_that_are_over_hold_no_place_and_no_process(
    dab: Dab, side_by_side: tuple[Sweep, Sweep, dict[str, Any]]
) -> None:
    for sweep in side_by_side[:2]:
        find_nothing(dab, sweep.status["run_id"])


def test_sweeps_leave_no_pickle_in_the_storage_that_machines_share(
    dab: Dab, side_by_side: tuple[Sweep, Sweep, dict[str, Any]]
) -> None:
    """Not even that of a failed trial's error, which Tune would load again."""
    _, sweep, _ = side_by_side
    assert any(trial.status == "failed" for trial in sweep.trials)
    left = [path for path in (dab.home / "storage").rglob("*") if path.is_file()]
    assert [path for path in left if path.suffix in (".pkl", ".pickle") or path.read_bytes()[:2] == b"\x80\x05"] == []


def test_a_stopped_search_has_a_checkpoint_of_every_trial_and_starts_no_other(dab: Dab, digits: Path) -> None:
    changes = ["cluster.num_workers=1", "search.epochs=500", "search.num_trials=5", "search.max_concurrent=2"]
    run_id = detached(dab, [*narrow(digits, "endless", *changes), "--sweep"])
    wait_until(lambda: len(list(dab.folder(run_id).root.glob("trials/*/metrics.jsonl"))) == 2)
    stopped = dab.ok("stop", run_id)
    assert stopped["status"] == "stopped"
    assert stopped["message"] == "stopped before a trial came to its end; `dab resume` goes on with them"
    trials = tracking.find_runs(stopped["tracking_uri"], parent=run_id)
    assert [trial.status for trial in trials] == ["stopped", "stopped"]
    for trial in trials:
        status = dab.ok("status", trial.run_id)
        assert status["checkpoints"][-1]["step"] == status["step"] > 0


def test_a_run_stopped_at_once_is_gone_when_the_command_returns(
    dab: Dab, side_by_side: tuple[Sweep, Sweep, dict[str, Any]]
) -> None:
    _, _, left = side_by_side
    assert left["stop"].code == 0, left["stop"].stderr
    assert left["stop"].data["status"] == "stopped"
    assert left["stop"].data["message"] == "stopped without a last checkpoint"
    assert left["drivers"] == []
    assert left["stop"].data["checkpoints"]


def test_more_workers_than_the_cluster_has_are_refused_with_the_numbers(dab: Dab, digits: Path) -> None:
    before = dab.run_ids()
    done = dab(*narrow(digits, "big", "cluster.num_workers=16", "data.batch_size=64"))
    assert done.code == 2
    assert done.message.startswith(
        "cluster.num_workers: 16 workers x 1 CPU need 16 CPUs, the embedded cluster has 4. Ask for fewer workers, or "
        "`dab cluster down` and `dab cluster up --num-cpus 16`."
    )
    assert dab.run_ids() == before
    assert "big" not in {run["name"] for run in dab.ok("runs")["runs"]}


def test_an_unreachable_tracker_is_named_and_no_run_is_left_half_made(dab: Dab, digits: Path) -> None:
    before = dab.run_ids()
    done = dab(*narrow(digits, "nobody", "tracking.uri=http://127.0.0.1:1"), timeout_s=60)
    assert done.code == 1
    assert done.message.startswith("MLflow: no answer from http://127.0.0.1:1; runs are recorded there.")
    assert dab.run_ids() == before


def test_no_process_is_left_when_the_cluster_ends_below_a_run_that_is_followed(
    dab: Dab, side_by_side: tuple[Sweep, Sweep, dict[str, Any]]
) -> None:
    run_id = side_by_side[2]["run_id"]
    assert dab("resume", run_id, "--detach").code == 0
    wait_for_attempt(dab, run_id, 2)
    following = dab.start("logs", run_id, "--follow")
    servers = [server for name in ("cluster", "tracking") if (server := recorded(dab.home / f"{name}.json"))]
    ours = [process for server in servers for process in members(server)]
    assert set(processes_of(run_id, "ray::RayTrainWorker")) <= set(ours)
    assert dab.ok("cluster", "down") == {"stopped": {"cluster": True, "tracking": True}}
    assert not [process for process in ours if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not processes_of(run_id, "")
    done = finish(following, timeout_s=60)
    # Either the job was seen to end, killed by the end of the cluster, or cluster or tracker were gone first.
    assert done.code in (0, 1)
    assert done.data["text"] if done.code == 0 else done.message
    assert "Traceback" not in done.stderr
    status = dab.ok("status", run_id)
    assert status["status"] == "failed"
    assert status["message"] == "its cluster is gone; `dab resume` continues from the last checkpoint"
