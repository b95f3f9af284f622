"""What a sweep costs beside the training, what early stopping saves, and whether a killed driver loses anything.

    PYTHONPATH=. python benchmarks/sweeps.py cost [--trials 500]
    PYTHONPATH=. python benchmarks/sweeps.py early [--seeds 3]
    PYTHONPATH=. python benchmarks/sweeps.py kills [--kills 10]

- `cost`: trials that only report a number, 2 at a time, each with a folder, an MLflow run, a result and a place in the
  study: seconds a trial, and the memory of the driver.
- `early`: 40 trials on the digits by TPE with ASHA, beside 40 random ones that all finish: after which share of the
  random trials' steps the first reached the best result of the second. Median of the seeds; above a half fails.
- `kills`: the driver of a sweep of 30 trials is ended by SIGKILL at random moments, and the sweep resumed each time.
  Its trials must be those of an undisturbed sweep, with equal weights, each recorded once.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from packed_conv import record

from dabnn.data import build_dataset
from dabnn.run_folder import RunFolder
from jobs.connect import connect
from jobs.sweep import Train, run_sweep, train_trial
from orchestrator import runs, tracking
from orchestrator.cluster import client_env, cluster_down, ensure_cluster
from orchestrator.config import Config, load_config, to_dict
from orchestrator.job import Job
from orchestrator.submit import resolved, submit
from orchestrator.tracking import find_runs

CONFIG = Path(__file__).parents[1] / "examples" / "digits.yaml"
SPACE = {
    "binarize.bin_start": {"int": [2, 4]},
    "binarize.bin_end": {"int": [4, 7]},
    "optim.max_lr": {"log": [1e-4, 3e-2]},
    "schedule.name": {"choice": ["cosine", "linear", "constant"]},
}
LIMIT_S = 300.0


def main() -> None:
    """Prints a table and writes `sweep_PART.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["cost", "early", "kills"])
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--beside", nargs=2, metavar=("FOLDER", "URI"), help="services that run; internal")
    options = parser.parse_args()
    if options.beside is None:
        with services() as found:
            raise SystemExit(subprocess.run([sys.executable, *sys.argv, "--beside", *found], check=False).returncode)
    folder, uri = Path(options.beside[0]), str(options.beside[1])
    if options.part == "cost":
        cost(folder, uri, options.trials)
    elif options.part == "early":
        early(folder, uri, options.seeds)
    else:
        kills(folder, uri, options.kills)


@contextmanager
def services() -> Iterator[tuple[str, str]]:
    """A cluster of two CPUs, a tracker and the digits; yields the folder and the tracker's address.

    Ray reads how it is reached when it is imported, so what uses it is another process.
    """
    with tempfile.TemporaryDirectory(prefix="dab-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        os.environ |= {"DAB_HOME": f"{folder}/home", "OMP_NUM_THREADS": "1", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
                       "RAY_AIR_NEW_OUTPUT": "0"}  # fmt: skip
        build_dataset("builtin:digits", folder / "digits")
        try:
            cluster = ensure_cluster(num_cpus=2)
            uri = tracking.ensure_tracking()
            os.environ |= client_env(cluster.address, cluster.dashboard_url, cluster.token_path)
            yield name, uri
        finally:
            cluster_down()
            tracking.tracking_down()


def config_of(folder: Path, name: str, seed: int, epochs: int, **search: Any) -> Config:
    """Returns a sweep on the digits with trials of one worker."""
    changes = [
        f"name={name}", f"seed={seed}", f"data.train={folder / 'digits'}", "model.width=0.125",
        "model.name=bincifarfbin", f"train.epochs={epochs}", "cluster.num_workers=1", "schedule={name: cosine}",
        f"search={json.dumps({'space': SPACE, **search})}",
    ]  # fmt: skip
    return load_config(CONFIG, changes)


def here(config: Config, folder: Path, uri: str, train: Train = train_trial) -> tuple[Path, float]:
    """Runs a sweep with this process as its driver; returns its folder and how many seconds it took."""
    config = resolved(config)
    run_id = tracking.create_run(uri, "dab", config.name, params={}, tags={})
    job = Job("sweep", run_id, config.name, str(folder / run_id), uri, "dab", 1, to_dict(config))
    (folder / run_id).mkdir()
    job.save()
    began = time.monotonic()
    result = run_sweep(job, config, train)
    if result["status"] != "finished":
        raise SystemExit(f"{config.name}: {result}")
    return folder / run_id, time.monotonic() - began


def cost(folder: Path, uri: str, num_trials: int) -> None:
    """Measures what a trial costs beside its training."""

    def score(config: Config, place: RunFolder, observer: Any) -> None:
        metrics = {"val_top1": 90 - abs(config.optim.max_lr - 3e-3) * 1e3}
        place.append_metrics(1, metrics)
        observer.epoch_finished(1, metrics)
        place.write_result({"status": "finished", "message": "", "weights_sha256": ""})

    connect()
    config = config_of(folder, "cost", 1, 1, num_trials=num_trials, max_concurrent=2)
    samples: list[tuple[int, float]] = []
    stop = watch_memory(psutil.Process(), samples, folder)
    place, seconds = here(config, folder, uri, score)
    stop()
    count = len(list((place / "trials").iterdir()))
    known = find_runs(uri, "dab")
    ended = sum(run.status == "finished" for run in known if run.parent)
    half = [sample for sample in samples if num_trials / 2 < sample[0] < num_trials]  # then the report is made
    growth = statistics.linear_regression(*zip(*half, strict=True)).slope * 100 if len(half) > 1 else 0.0
    rows = [{"trials": number, "driver_mb": size} for number, size in samples[:: max(1, len(samples) // 10)]]
    record(
        "sweep_cost", rows, trials=count, in_mlflow=ended, at_a_time=2, seconds=seconds, s_a_trial=seconds / count,
        driver_growth_mb_per_100_trials_in_second_half=growth,
    )  # fmt: skip
    if seconds / count > 1.5 or ended != num_trials:
        raise SystemExit(f"{seconds / count:.2f} s a trial, {ended} of {num_trials} in MLflow")


def watch_memory(process: psutil.Process, samples: list[tuple[int, float]], folder: Path) -> Callable[[], None]:
    """Samples the memory of a process and how many trials there are every few seconds; returns what ends that."""
    over = threading.Event()

    def sample() -> None:
        while not over.wait(3):
            count = sum(1 for _ in folder.glob("*/trials/*/result.json"))
            samples.append((count, process.memory_info().rss / 1e6))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()

    def stop() -> None:
        over.set()
        thread.join()

    return stop


def early(folder: Path, uri: str, num_seeds: int) -> None:
    """Compares TPE with ASHA to random trials that all finish."""
    connect()
    rows = []
    for seed in range(1, num_seeds + 1):
        random_one = config_of(folder, f"random-{seed}", seed, 8, num_trials=40, algorithm="random", early_stop=None)
        stopping = config_of(folder, f"asha-{seed}", seed, 8, num_trials=40)
        whole, whole_s = here(random_one, folder, uri)
        halved, halved_s = here(stopping, folder, uri)
        best = max(value for _, value in curve(whole))
        total = len(curve(whole))
        reached = next((count for count, (_, value) in enumerate(curve(halved), 1) if value >= best), 0)
        rows.append({
            "seed": seed, "best of random": best, "best with asha": max(value for _, value in curve(halved)),
            "epochs of random": total, "epochs with asha": len(curve(halved)),
            "epochs to reach it": reached or None, "share": reached / total if reached else None,
            "s random": whole_s, "s asha": halved_s,
        })  # fmt: skip
    shares = [row["share"] if row["share"] is not None else float("inf") for row in rows]
    record("sweep_early", rows, median_share=statistics.median(shares))
    if statistics.median(shares) > 0.5:
        raise SystemExit(f"the best of random search was reached after {statistics.median(shares):.2f} of its steps")


def curve(folder: Path) -> list[tuple[float, float]]:
    """Returns (time, val_top1) of every epoch of every trial, in the order of time."""
    places = [RunFolder(place) for place in (folder / "trials").iterdir()]
    return sorted((line["wall_time"], line["metrics"]["val_top1"]) for place in places for line in place.metrics())


def kills(folder: Path, uri: str, num_kills: int) -> None:
    """Kills the driver of a sweep again and again, and compares its trials with those of an undisturbed one."""
    search: dict[str, Any] = {"num_trials": 30, "max_concurrent": 1}
    whole = submitted(config_of(folder, "whole", 7, 4, **search), uri)
    wait(whole)
    killed = submitted(config_of(folder, "killed", 7, 4, **search), uri)
    chance, rows = random.Random(1), list[dict[str, Any]]()
    while len(rows) < num_kills and RunFolder.of(killed.folder).result().get("status") != "finished":
        driver = wait_for_driver(killed)
        after_s = chance.uniform(3.0, 24.0)
        time.sleep(after_s)
        driver.kill()
        places = list(Path(killed.folder).glob("trials/*"))
        rows.append({
            "kill": len(rows) + 1, "s after its start": after_s,
            "trials that had ended": sum((place / "result.json").exists() for place in places),
            "epochs": sum(len(RunFolder(place).metrics()) for place in places),
        })  # fmt: skip
        wait(killed)
        killed = runs.resume(uri, killed.run_id)[0]
    wait(killed)
    same = trials_of(whole) == trials_of(killed)
    known = [run.name for run in find_runs(uri, parent=killed.run_id) if run.status == "finished"]
    record(
        "sweep_kills", rows, kills=len(rows), trials=len(trials_of(whole)), trials_equal=same,
        trials_in_mlflow=len(known), different_in_mlflow=len(set(known)),
    )  # fmt: skip
    if not same or len(known) != len(set(known)) or len(known) != len(trials_of(whole)) or len(rows) < num_kills:
        raise SystemExit(f"{trials_of(whole)}\n{trials_of(killed)}\n{sorted(known)}")


def submitted(config: Config, uri: str) -> Job:
    """Submits a sweep whose driver is not started again by itself."""
    changed = config.cluster.model_copy(update={"max_failures": 0})
    tracker = config.tracking.model_copy(update={"uri": uri})
    return submit(config.model_copy(update={"cluster": changed, "tracking": tracker}), sweep=True)[0]


def wait(job: Job) -> None:
    """Waits until a sweep has ended, whatever became of it."""
    deadline = time.monotonic() + LIMIT_S
    while runs.status(job.tracking_uri, job.run_id).status not in runs.ENDED:
        if time.monotonic() > deadline:
            raise SystemExit(f"{job.name} did not end")
        time.sleep(0.5)


def wait_for_driver(job: Job) -> psutil.Process:
    """Returns the program that drives a sweep, as soon as it has begun."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        for process in psutil.process_iter():
            try:
                is_driver = process.cmdline()[1:] == ["-m", "jobs.sweep"]
                if is_driver and job.run_id in process.environ().get("DAB_JOB", "") and has_begun(job):
                    return process
            except psutil.Error:
                continue
        time.sleep(0.2)
    raise SystemExit(f"{job.name} has no driver")


def has_begun(job: Job) -> bool:
    """Says whether the driver of this attempt has opened the book."""
    return len(RunFolder.of(job.folder).attempts()) >= job.attempt


def trials_of(job: Job) -> list[tuple[Any, ...]]:
    """Returns number, values, end, epochs and weights of each trial."""
    found = []
    for place in sorted(Path(job.folder).glob("trials/*")):
        folder = RunFolder(place)
        told, result = folder.load_json("trial.json"), folder.result()
        values = [line["metrics"]["val_loss"] for line in folder.metrics()]
        end = (result.get("status"), result.get("message"), result.get("weights_sha256", ""))
        found.append((told["number"], told["values"], end, values))
    return found


if __name__ == "__main__":
    main()
