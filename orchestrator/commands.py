"""What the commands about runs do and show: each function is one command and returns its JSON document and its text."""

import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dabnn.errors import DabError, InvalidInputError
from dabnn.planner import Budget
from dabnn.run_folder import headline
from orchestrator import cluster_view, deliver, registry, runs
from orchestrator import sensitivity as sensitivities
from orchestrator.cluster import cluster_down, cluster_status, ensure_cluster
from orchestrator.config import load_config, to_dict
from orchestrator.demo import DemoResult, run_demo
from orchestrator.found_runs import check_no_file
from orchestrator.job import Job
from orchestrator.jobs_api import follow_job
from orchestrator.output import Table, View, duration_text, one_line
from orchestrator.own_images import Images, wanted_config
from orchestrator.reach import reach
from orchestrator.resolve import train_spec
from orchestrator.runs import RunStatus
from orchestrator.sensitivity_text import sensitivity_text
from orchestrator.sent_runs import tracker_at, tracker_of
from orchestrator.submit import check_size, placed, plan, preview_of, resolved, submit
from orchestrator.sweep_table import watch
from orchestrator.target import Target, resolve_target
from orchestrator.tracking import RunRecord
from orchestrator.tracking_server import ensure_tracking, tracking_down, tracking_status

Say = Callable[[str], None]
_WAIT_LINE_S = 3.0
_SHORT_ID = 8


def patiently(say: Say) -> Say:
    """Return a `say` for what is waited for, which passes on a line every few seconds at most."""
    last = time.monotonic()

    def on_wait(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _WAIT_LINE_S:
            last = time.monotonic()
            say(text)

    return on_wait


def tracking_uri(uri: str | None, say: Say, reference: str = "", address: str | None = None) -> str:
    """Return the address of the tracker to ask.

    Args:
        uri: As the user named it; it wins.
        say: Told what is done.
        reference: A run; one that was sent elsewhere from here is asked for where it is recorded.
        address: A cluster, whose tracker is meant.

    Returns:
        One of these, or else this machine's own server, started if it does not run.
    """
    say("asking the experiment tracker")
    if uri is None and address is not None:
        target = resolve_target(address)
        uri = None if target.is_embedded else tracker_at(target)
    return uri or tracker_of(reference) or ensure_tracking(on_wait=patiently(say))


def dry_run(
    config: Path | None,
    overrides: list[str],
    *,
    sweep: bool,
    say: Say,
    address: str | None = None,
    images: Images | None = None,
) -> View:
    """Return what a submission would do; nothing is started or created, but a cluster that runs is asked."""
    wanted = wanted_config(config, overrides, images, address=address, say=say, may_build=False)
    target = resolve_target(address or wanted.cluster.address)
    reached = reach(target) if target.jobs_url else None
    ready = plan(placed(wanted, target), sweep=sweep, may_start=False)
    if reached is not None:
        check_size(ready.config.cluster, target, reached)
    job = preview_of(ready, target, reached, sweep=sweep)
    data = asdict(ready) | {"config": to_dict(ready.config), "job": job}
    lines = {
        "run": ready.config.name,
        "workers": f"{ready.config.cluster.num_workers} ({ready.cpus:g} CPUs)",
        "model": f"{ready.config.model.name}, {ready.num_binary_layers} layers with binary weights",
        "float model": f"{ready.float_bytes:,} bytes",
        "packed model": f"{ready.packed_bytes:,} bytes",
        "data": f"{ready.config.data.train} (manifest {ready.digest[:12]})",
        "storage": ready.storage,
        "cluster": f"{job['target']} {job['jobs_url'] or '(not running)'}",
        "entrypoint": job["entrypoint"],
        "package": f"{job['package']['digest']}, {job['package']['num_bytes']:,} bytes",
        "placement": job["placement"],
        "environment": ", ".join(job["environment"]),
        "queue": job["queued"] or "its turn at once",
    }
    return data, "\n".join(f"{key}: {value}" for key, value in lines.items())


def show_spec(config: Path, overrides: list[str]) -> View:
    """Return the specification that `python -m dabnn.train` reads, for training without Ray."""
    spec = train_spec(resolved(load_config(config, overrides))).to_dict()
    return spec, json.dumps(spec, indent=2)


def submit_run(
    config: Path | None,
    overrides: list[str],
    *,
    sweep: bool,
    detach: bool,
    say: Say,
    address: str | None = None,
    images: Images | None = None,
) -> View:
    """Submit a run or a sweep, with a data set made of `images` if given, and follow it to its end unless `detach`.

    Interrupted while it follows, it says that the job goes on.
    """
    wanted = wanted_config(config, overrides, images, address=address, say=say)
    say("checking data, model and configuration")
    job, target = submit(wanted, sweep=sweep, address=address, on_note=say, on_wait=patiently(say))
    say(f"submitted {job.name} as run {job.run_id[:_SHORT_ID]}, recorded on {job.tracking_uri}")
    return _follow_to_end(job, target, detach=detach, say=say)


def resume_run(
    uri: str | None,
    reference: str,
    *,
    detach: bool,
    say: Say,
    address: str | None = None,
    is_forced: bool = False,
    changes: Sequence[str] = (),
) -> View:
    """Resume a stopped or failed run, on the cluster it was on or another, and follow it to its end unless `detach`."""
    tracker = tracking_uri(uri, say, reference)
    wait = patiently(say)
    job, target = runs.resume(tracker, reference, wait, address=address, is_forced=is_forced, changes=changes)
    say(f"resumed {job.name} as attempt {job.attempt}")
    return _follow_to_end(job, target, detach=detach, say=say)


def list_runs(uri: str | None, *, experiment: str | None, say: Say, address: str | None = None) -> View:
    """Return all runs of a tracker, newest first, trials below their sweep."""
    tracker = tracking_uri(uri, say, address=address)
    records = runs.list_runs(tracker, experiment=experiment)
    table = Table.of(
        [_run_row(record) for record in _with_trials(records)], ["run", "name", "status", "top-1", "started"]
    )
    data = [asdict(record) for record in records]
    return {"runs": data, "tracking_uri": tracker}, str(table) if records else "no runs yet"


def show_status(uri: str | None, reference: str, say: Say, address: str | None = None) -> View:
    """Return the status of one run."""
    return _status_view(runs.status(tracking_uri(uri, say, reference, address), reference))


def stop_run(
    uri: str | None, reference: str, *, now: bool, grace_s: float, say: Say, address: str | None = None
) -> View:
    """Stop a run, with a checkpoint unless `now`."""
    tracker = tracking_uri(uri, say, reference, address)
    return _status_view(runs.stop(tracker, reference, now=now, grace_s=grace_s, on_wait=patiently(say)))


def logs(uri: str | None, reference: str, *, follow: bool, say: Say, address: str | None = None) -> Iterator[str]:
    """Yield the log of a run as it grows."""
    tracker = tracking_uri(uri, say, reference, address)
    return runs.read_logs(tracker, reference, follow=follow, on_note=say)


def export(uri: str | None, reference: str, file: Path, *, half: bool, form: str | None, say: Say) -> View:
    """Export a run as a packed file, or in the form that the file's name asks for."""
    deliver.form_of(file, form)  # refuses names that say something else, before the tracker is started
    say("comparing the packed network with the trained one on the validation images")
    data = deliver.export_run(tracking_uri(uri, say, reference), reference, file, half=half, form=form)
    again = data.get("comparison")
    compared = f"\nthe {again['form']} file: same class on {100 * again['same_argmax']:.2f} %" if again else ""
    kept = "; float16 only after the last sign, more changed too many classes" if data["rounded"] == "head" else ""
    return data, (
        f"{file}: {data['file_bytes']:,} bytes, {data['ratio']:.1f}x smaller than float32{kept}\n"
        f"same class on {100 * data['same_argmax']:.2f} % of {data['num_samples']} images, "
        f"top-1 {data['top1_float_path']:.2f} % trained, {data['top1_packed']:.2f} % packed{compared}"
    )


def register(uri: str | None, reference: str, *, model: str | None, aliases: list[str], say: Say) -> tuple[View, str]:
    """Register a run's packed model; return the version, and the command that serves it."""
    registry.check_names(model, aliases)
    tracker = tracking_uri(uri, say, reference)
    made = registry.register_run(tracker, reference, model=model, aliases=aliases, say=say)
    known = "" if made.is_new else " (known already)"
    named = "".join(f", {made.name}@{alias}" for alias in made.aliases)
    text = f"{made.uri}{known}{named}: {int(made.tags['packed_bytes']):,} bytes, top-1 {made.tags['packed_top1']} %"
    place = "" if shutil.which("mlflow") else f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH "
    serve = f"{place}MLFLOW_TRACKING_URI={tracker} mlflow models serve -m {shlex.quote(made.uri)} --env-manager local"
    return (asdict(made) | {"tracking_uri": tracker}, text), serve


def evaluate(
    uri: str | None,
    target: str,
    data: str | None,
    *,
    ten_crop: bool | None = None,
    on_batch: deliver.OnBatch,
    say: Say,
) -> View:
    """Evaluate a packed file or a run, on ten crops of each image if `ten_crop`; None is as a run was configured.

    Raises:
        InvalidInputError: A file without `--data`.
    """
    file = Path(target)
    if not file.is_file():
        check_no_file(target, "a run, or a file that `dab export` wrote")
        found = deliver.evaluate_run(tracking_uri(uri, say, target), target, data, on_batch, ten_crop=ten_crop)
    elif data is not None:
        found = deliver.evaluate_file(file, data, on_batch, ten_crop=bool(ten_crop))
    else:
        raise InvalidInputError(f"--data: {target} is a packed model; name the dataset to evaluate it on.")
    return found, (
        f"top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %, loss {found['loss']:.4f} "
        f"on {found['num_samples']:,} images, {found['images_per_s']:,.0f} images/s"
    )


def predict(file: Path, images: list[Path]) -> tuple[list[str], View]:
    """Return what is wrong with images that cannot be read, and what a packed model sees in the others."""
    seen, problems = deliver.predict_files(file, images)
    lines = []
    for entry in seen:
        classes = ", ".join(f"{one_line(best['class'])} {100 * best['probability']:.1f} %" for best in entry["classes"])
        lines.append(f"{one_line(entry['image'])}: {classes}")
    return [problem["message"] for problem in problems], (
        {"predictions": seen, "problems": problems},
        "\n".join(lines),
    )


def sensitivity(
    uri: str | None,
    reference: str,
    *,
    twin: str | None,
    num_images: int,
    budget_ops: float | None,
    budget_bytes: int | None,
    file: Path | None,
    say: Say,
) -> View:
    """Measure what each layer of a run costs, and propose a layer plan, written to `file` if one is given.

    Raises:
        InvalidInputError: Two budgets, or one that is no number of operations.
    """
    budget = _budget(budget_ops, budget_bytes)
    address = tracking_uri(uri, say, reference)
    found = sensitivities.measure(address, reference, twin=twin, num_images=num_images, say=say, on_wait=patiently(say))
    plan = sensitivities.proposal(found, budget)
    if file is not None:
        sensitivities.save_plan(file, found, plan)
    data = found | {"plan": asdict(plan), "file": None if file is None else str(file)}
    return data, sensitivity_text(data)


def after_sensitivity(data: dict[str, Any]) -> list[str]:
    """Return the command that trains with the plan that was written, or that writes it."""
    if data["file"] is None:
        return ["dab", "sensitivity", data["run_id"][:_SHORT_ID], "-o", "plan.yaml"]
    changes = sensitivities.changes_for_plan(data, data["file"])
    return ["dab", "submit", data["config"], *(part for change in changes for part in ("--set", change))]


def bring_cluster_up(num_cpus: int | None, port: int | None, dashboard_port: int | None, say: Say) -> View:
    """Start the embedded cluster, or find it running."""
    on_wait = patiently(say)
    cluster = ensure_cluster(num_cpus=num_cpus, port=port, dashboard_port=dashboard_port, on_wait=on_wait)
    data = asdict(cluster) | {"token_path": str(cluster.token_path), "session_folder": str(cluster.session_folder)}
    return data, f"cluster: {cluster.address}\ndashboard: {cluster.dashboard_url}\nCPUs: {cluster.num_cpus}"


def bring_cluster_down(say: Say) -> View:
    """End the embedded cluster and this machine's tracking server; what they recorded stays."""
    say("ending the cluster with its jobs, and the experiment tracker")
    on_wait = patiently(say)
    ended = {"cluster": cluster_down(on_wait=on_wait), "tracking": tracking_down(on_wait=on_wait)}
    return {"stopped": ended}, "\n".join(
        f"{name}: {'ended' if did else 'was not running'}" for name, did in ended.items()
    )


def show_cluster(address: str | None = None) -> View:
    """Return whether the embedded cluster and the tracking server run, or how a cluster elsewhere is."""
    target = resolve_target(address)
    if not target.is_embedded:
        return cluster_view.status_of(target)
    cluster, tracker = cluster_status(), tracking_status()
    data = {
        "cluster": {"state": cluster.state, "pids": list(cluster.pids)},
        "tracking": {"state": tracker.state, "uri": tracker.uri, "pids": list(tracker.pids)},
    }
    where = cluster.cluster.dashboard_url if cluster.cluster else ""
    return (
        data,
        f"cluster: {cluster.state} {where}".rstrip() + f"\ntracking: {tracker.state} {tracker.uri or ''}".rstrip(),
    )


def demo(say: Say) -> View:
    """Run the demo and return its table."""
    started = time.monotonic()
    result = run_demo(say, patiently(say))
    return asdict(result) | {"duration_s": time.monotonic() - started}, _demo_text(result, time.monotonic() - started)


def after_demo(data: dict[str, Any]) -> list[list[str]]:
    """Return commands to try after the demo, with its own names."""
    return [
        ["dab", "ui"],
        ["dab", "runs"],
        ["dab", "status", data["best_run_id"][:_SHORT_ID]],
        ["dab", "models", "show", "bincifarfbin", "--width", "0.25"],
        ["dab", "cluster", "down"],
    ]


def _budget(operations: float | None, num_bytes: int | None) -> Budget | None:
    if operations is not None and num_bytes is not None:
        raise InvalidInputError("--budget-bytes: --budget-ops already limits the plan. Give one of them.")
    if operations is not None and not math.isfinite(operations):
        raise InvalidInputError(f"--budget-ops: {operations} is no number of operations. Use a number such as 2e6.")
    if operations is not None:
        return Budget("operations", operations)
    return None if num_bytes is None else Budget("packed_bytes", num_bytes)


def _follow_to_end(job: Job, target: Target, *, detach: bool, say: Say) -> View:
    if not detach:
        _follow(job, target, say)
    current = runs.status(job.tracking_uri, job.run_id)
    data = {
        "run_id": job.run_id,
        "job_id": job.job_id,
        "status": current.status,
        "metrics": current.metrics,
        "tracking_uri": job.tracking_uri,
    }
    if current.status == "failed":
        log = f"`dab logs {job.run_id[:_SHORT_ID]}` shows its log."
        raise DabError(f"{current.name}: failed: {current.message.rstrip('.')}. {log}", data)
    return data, f"{job.name} ({job.run_id[:_SHORT_ID]}): {_ending(current)}"


def _follow(job: Job, target: Target, say: Say) -> None:
    short = job.run_id[:_SHORT_ID]
    try:
        chunks = follow_job(target, job.job_id, say)
        if job.kind == "sweep" and sys.stderr.isatty():
            watch(job, chunks)
            return
        for text in chunks:
            for line in text.splitlines():
                say(line)
    except KeyboardInterrupt:
        say(f"run {short} goes on: `dab logs {short} --follow` follows it again, `dab stop {short}` ends it")
        raise


def _ending(current: RunStatus) -> str:
    if current.kind == "sweep" and current.message:
        return f"{current.status}, {current.message}"
    top1 = current.metrics.get("val_top1")
    return current.status + ("" if top1 is None else f", val top-1 {top1:.2f} %")


def _status_view(current: RunStatus) -> View:
    progress, is_sweep = current.progress, current.kind == "sweep"
    lines: dict[str, Any] = {
        "run": f"{current.name} ({current.run_id})",
        "status": current.status,
        "message": current.message,
        "attempts": current.attempts,
        "epoch": f"{current.epoch}/{progress['epochs']}" if progress and not is_sweep else "",
        "step": "" if is_sweep else current.step,
        "trials ended": f"{progress['step']} of {progress['num_trials']}" if progress and is_sweep else "",
        "rate": f"{progress['images_per_s']:.0f} images/s" if progress and not is_sweep else "",
        "left": duration_text(progress["eta_s"]) if progress.get("eta_s") and current.status == "running" else "",
        "metrics": ", ".join(f"{key} {value:.4g}" for key, value in headline(current.metrics).items()),
        "checkpoints": ", ".join(Path(checkpoint["path"]).name for checkpoint in current.checkpoints),
        "folder": current.folder,
    }
    text = "\n".join(f"{key}: {value}" for key, value in lines.items() if value not in ("", None))
    return asdict(current), "\n  ".join([f"{text}\nstory:", *current.story]) if current.story else text


def _with_trials(records: list[RunRecord]) -> list[RunRecord]:
    """Return the runs with the trials of each sweep right below it, oldest trial first."""
    known = {record.run_id for record in records}
    ordered = []
    for record in records:
        if record.parent not in known:
            ordered.append(record)
            ordered += [trial for trial in reversed(records) if trial.parent == record.run_id]
    return ordered


def _run_row(record: RunRecord) -> dict[str, Any]:
    top1 = record.metrics.get("val_top1")
    return {
        "run": record.run_id[:_SHORT_ID],
        "name": ("  " if record.parent else "") + record.name,
        "status": record.status,
        "top-1": "" if top1 is None else f"{top1:.2f}",
        "started": time.strftime("%Y-%m-%d %H:%M", time.localtime(record.start_time)),
    }


def _demo_text(result: DemoResult, duration_s: float) -> str:
    rows = [
        {
            "trial": row.trial,
            "binary layers": row.layers,
            "schedule": row.schedule,
            "top-1": f"{row.top1:.2f}",
            "packed bytes": row.packed_bytes,
        }
        for row in result.rows
    ]
    export = result.export
    checked = (
        f"checked: same class on {100 * export['same_argmax']:.2f} % of {export['num_samples']} held-out digits, "
        f"top-1 {export['top1_float_path']:.2f} % trained and {export['top1_packed']:.2f} % packed"
    )
    lines = [
        str(Table.of(rows, ["trial", "binary layers", "schedule", "top-1", "packed bytes"])),
        "",
        f"exported: {result.best}, {export['file_bytes']:,} bytes, {export['ratio']:.1f}x smaller than float32",
        checked,
        f"evaluated from the file: top-1 {result.evaluation['top1']:.2f} %",
        f"file: {result.file}",
        f"experiments: {result.tracking_uri}",
        f"took: {duration_text(duration_s)}",
    ]
    return "\n".join(lines)
