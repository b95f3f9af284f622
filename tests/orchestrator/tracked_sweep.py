"""A sweep on a real tracking server, recorded as real ones are, without any training: for the experiment browser."""

from pathlib import Path

from synthetic_sweep import write_sweep

from dabnn.run_folder import RunFolder
from orchestrator import tracking
from orchestrator.provenance import provenance
from orchestrator.report import log_report
from orchestrator.sweep_record import SweepRecord, TrialRecord


def track_sweep(uri: str, root: Path, num_trials: int, experiment: str = "dab", epochs: int = 12) -> str:
    """Record a made-up sweep of trials with their curves, and its report; return its run id."""
    folder = write_sweep(root, num_trials, epochs)
    job = folder.load_json("job.json")
    tags = provenance() | {"dab.kind": "sweep", "dab.folder": str(root)}
    sweep_id = tracking.create_run(uri, experiment, root.name, params=job["config"], tags=tags)
    tracking.set_status(uri, sweep_id, "running")
    folder.leave_json("job.json", job | {"run_id": sweep_id})
    follower = tracking.MetricFollower(uri)
    trials = SweepRecord.read(folder).trials
    for trial in trials:
        _track_trial(uri, experiment, sweep_id, trial, follower)
    assert follower.close(timeout_s=60) == 0
    for trial in trials:
        _end_trial(uri, trial)
    best = SweepRecord.read(folder.fresh()).front()[0]
    tracking.set_tags(uri, sweep_id, {"dab.best_run": str(best.run_id), "dab.message": f"best trial {best.name}"})
    tracking.log_metrics(uri, sweep_id, best.measures, step=num_trials)
    log_report(uri, sweep_id, folder)
    tracking.set_status(uri, sweep_id, "finished")
    return sweep_id


def _track_trial(
    uri: str, experiment: str, sweep_id: str, trial: TrialRecord, follower: tracking.MetricFollower
) -> None:
    tags = {"dab.kind": "trial", "dab.folder": trial.folder.location}
    run_id = tracking.create_run(uri, experiment, trial.name, params=trial.config, tags=tags, parent=sweep_id)
    for name in ("trial.json", "job.json"):
        trial.folder.leave_json(name, trial.folder.load_json(name) | {"run_id": run_id})
    tracking.set_status(uri, run_id, "running")
    follower.follow(RunFolder(trial.folder.root), run_id)


def _end_trial(uri: str, trial: TrialRecord) -> None:
    run_id, result = trial.folder.load_json("trial.json")["run_id"], trial.folder.result()
    static = {key: value for key, value in trial.measures.items() if key in ("packed_bytes", "bit_ops")}
    tracking.log_metrics(uri, run_id, static, step=len(trial.curve))
    if result["message"]:
        tracking.set_tags(uri, run_id, {"dab.message": result["message"]})
    tracking.set_status(uri, run_id, result["status"])
