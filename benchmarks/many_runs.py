"""Many runs of one step, in a row and several at a time, on one cluster: is anything lost, and does memory stay flat?

    PYTHONPATH=. python benchmarks/many_runs.py [--runs 200] [--at-a-time 4]

Each run trains in its job's own process (`cluster.num_workers: 0`), takes one step on the digits, validates and writes
a checkpoint. At the end each must be finished in the tracker with every point of its metrics once, a checkpoint and a
file that went through the server, and its Ray job must have succeeded; anything else is counted as lost or doubled.
Memory is that of all processes of the head (jobs left out) and of the tracking server (proportional set size), sampled
after every tenth run; growth is the slope of a line through the samples of the second half.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import psutil
from packed_conv import record

from dabnn.data import build_dataset
from dabnn.run_folder import RunFolder
from orchestrator import tracking
from orchestrator.cluster import cluster_down, ensure_cluster
from orchestrator.config import Config, load_config
from orchestrator.job import Job
from orchestrator.jobs_api import job_client
from orchestrator.mlflow_client import unchecked_client
from orchestrator.processes import members, recorded
from orchestrator.submit import submit
from orchestrator.target import Target, resolve_target

CONFIG = Path(__file__).parents[1] / "examples" / "digits.yaml"
LIMIT_S = 1200.0
OF_JOBS = ("-m jobs.", "JobSupervisor", "ray::IDLE")


def main() -> None:
    """Prints the table and writes `many_runs.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--at-a-time", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dab-") as folder:
        os.environ |= {"DAB_HOME": f"{folder}/home", "OMP_NUM_THREADS": "1"}
        build_dataset("builtin:digits", Path(folder) / "digits")
        try:
            ensure_cluster(num_cpus=4)
            uri = tracking.ensure_tracking()
            began = time.monotonic()
            jobs, samples = run_all(Path(folder) / "digits", options.runs, options.at_a_time)
            seconds = time.monotonic() - began
            faults = [fault for job in jobs for fault in faults_of(job, uri, resolve_target(None))]
        finally:
            cluster_down()
            tracking.tracking_down()
    growth = {part: growth_of(samples, part) for part in ("head_mb", "tracker_mb", "num_processes")}
    rows = [{key: sample[key] for key in ("runs", "head_mb", "tracker_mb", "num_processes")} for sample in samples]
    record(
        "many_runs", rows, runs=len(jobs), at_a_time=options.at_a_time, seconds=seconds, faults=faults,
        growth_of_second_half_per_100_runs=growth, median_s_of_a_run=seconds * options.at_a_time / len(jobs),
    )  # fmt: skip
    if faults:
        raise SystemExit(f"{len(faults)} faults: {faults[:5]}")


def run_all(data: Path, num_runs: int, at_a_time: int) -> tuple[list[Job], list[dict[str, float]]]:
    """Submits the runs, so many at a time; returns their jobs and what memory was in use after every tenth."""
    jobs: list[Job] = []
    going: list[Job] = []
    samples: list[dict[str, float]] = []
    while len(jobs) < num_runs or going:
        if len(jobs) < num_runs and len(going) < at_a_time:
            going.append(submit(one_step(data, len(jobs)))[0])
            jobs.append(going[-1])
            continue
        ended = wait_for_one(going)
        going.remove(ended)
        num_ended = len(jobs) - len(going)
        if num_ended % 10 == 0 or num_ended == num_runs:
            samples.append({"runs": float(num_ended), **memory()})
            print(json.dumps(samples[-1]), flush=True)
    return jobs, samples


def one_step(data: Path, number: int) -> Config:
    """Returns the configuration of a run that takes one step."""
    values = [
        f"name=one-step-{number:03d}", f"seed={number}", f"data.train={data}", "data.batch_size=1438", "train.epochs=1",
        "cluster.num_workers=0", "model.width=0.0625",
    ]  # fmt: skip
    return load_config(CONFIG, values)


def wait_for_one(going: list[Job]) -> Job:
    """Waits until the process of one of the jobs is gone; returns that job."""
    client = job_client(resolve_target(None))
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        for job in going:
            if client.get_job_status(job.job_id).is_terminal():
                return job
        time.sleep(0.3)
    raise TimeoutError(f"{[job.name for job in going]} did not end within {LIMIT_S:.0f} s")


def faults_of(job: Job, uri: str, target: Target) -> list[str]:
    """Returns what is wrong with a run: lost, doubled, or not ended as it should have."""
    client = unchecked_client(uri)
    found, folder = tracking.find_run(uri, job.run_id), RunFolder.of(job.folder)
    written = folder.metrics()
    faults = []
    if found.status != "finished":
        faults.append(f"{job.name}: {found.status} in the tracker")
    if str(job_client(target).get_job_status(job.job_id)) != "SUCCEEDED":
        faults.append(f"{job.name}: its Ray job did not succeed")
    if len(written) != 1 or folder.progress().get("step") != 1:
        faults.append(f"{job.name}: {len(written)} lines of metrics, step {folder.progress().get('step')}")
    for key, value in written[0]["metrics"].items() if written else ():
        points = [(point.step, point.value) for point in client.get_metric_history(job.run_id, key)]
        if points != [(1, value)] and value == value:
            faults.append(f"{job.name}: {key} is {points} in the tracker, [(1, {value})] in the file")
    files = {file.path for file in client.list_artifacts(job.run_id)}
    if not {"config.json", "checkpoints.json"} <= files or not found.artifact_uri.startswith("mlflow-artifacts:/"):
        faults.append(f"{job.name}: files {sorted(files)} at {found.artifact_uri}")
    return faults


def memory() -> dict[str, float]:
    """Returns the memory of the head without its jobs, that of the tracker, and the number of processes of both."""
    parts: dict[str, list[psutil.Process]] = {}
    for part, name in (("head_mb", "cluster"), ("tracker_mb", "tracking")):
        server = recorded(Path(os.environ["DAB_HOME"]) / f"{name}.json")
        parts[part] = [] if server is None else [each for each in members(server) if not is_of_job(each)]
    sizes = {part: sum(map(size_mb, processes)) for part, processes in parts.items()}
    return sizes | {"num_processes": float(sum(map(len, parts.values())))}


def is_of_job(process: psutil.Process) -> bool:
    """Whether a process belongs to a job, or waits to serve one."""
    try:
        return any(part in " ".join(process.cmdline()) for part in OF_JOBS)
    except psutil.Error:
        return True


def size_mb(process: psutil.Process) -> float:
    """Returns the proportional set size of a process; 0 for one that is gone."""
    try:
        return float(process.memory_full_info().pss) / 1e6
    except psutil.Error:
        return 0.0


def growth_of(samples: list[dict[str, float]], part: str) -> dict[str, Any]:
    """Returns the level of the second half of the samples and its slope per 100 runs."""
    late = samples[len(samples) // 2 :]
    slope = (
        linear_regression([each["runs"] for each in late], [each[part] for each in late]).slope if len(late) > 1 else 0
    )
    return {"median": median(each[part] for each in late), "per_100_runs": 100 * slope}


if __name__ == "__main__":
    main()
