"""Submit a run or a sweep: check what can be checked here, create the MLflow run, hand the job to the cluster."""

import logging
import math
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dabnn.errors import DabError, InvalidInputError
from orchestrator import tracking
from orchestrator.cluster import Cluster, client_env, ensure_cluster, job_client
from orchestrator.config import Config, alone, flatten, resolve_paths, to_dict, to_yaml
from orchestrator.found_runs import checkpoint_of
from orchestrator.home import home_folder
from orchestrator.job import VARIABLE, Job
from orchestrator.package import snapshot
from orchestrator.provenance import provenance
from orchestrator.resolve import check_room, manifest_of, model_table, resolve
from orchestrator.search import check_trials
from orchestrator.tracking_server import ensure_tracking, tracking_status

STOP_GRACE_S = 60


@dataclass(frozen=True)
class Plan:
    """What a submission would do; `dab submit --dry-run` shows it.

    Attributes:
        config: The resolved configuration.
        storage: Folder under which the run's folder will lie.
        float_bytes: Size of the float model.
        packed_bytes: Size of the packed model.
        digest: Digest of the training data's manifest.
        cpus: CPUs that the workers need at once.
        num_binary_layers: Layers with binary weights.
    """

    config: Config
    storage: str
    float_bytes: int
    packed_bytes: int
    digest: str
    cpus: float
    num_binary_layers: int


def plan(config: Config, *, sweep: bool, may_start: bool = True) -> Plan:
    """Resolve `config` and refuse what cannot run; the tracker is asked only for runs whose weights are wanted.

    Args:
        config: As the user wrote it.
        sweep: Search over `config.search` instead of training once.
        may_start: Whether this machine's tracker may be started to be asked.

    Raises:
        InvalidInputError: Data, model, layer range, classes, disk space, a sweep without a search space, or one with
            points whose networks cannot be.
    """
    if sweep and config.search is None:
        raise InvalidInputError(
            "search: missing, so there is nothing to sweep over. Add a section `search:` with `space:`; "
            "`dab config schema` describes it."
        )
    config = resolved(config, may_start=may_start)
    if sweep:
        check_trials(config)
    storage = Path(config.storage) if config.storage else home_folder("storage")
    check_room(config, storage)
    table = model_table(config)
    cpus = config.cluster.num_workers * config.cluster.cpus_per_worker
    num_binary_layers = sum(layer.binary_weights for layer in table.layers)
    digest = manifest_of(config).digest
    return Plan(config, str(storage), table.float_bytes, table.packed_bytes, digest, cpus, num_binary_layers)


def resolved(config: Config, *, may_start: bool = True) -> Config:
    """Return what `orchestrator.resolve` makes of `config` as the user wrote it; runs are looked up on its tracker.

    Args:
        config: As the user wrote it.
        may_start: Whether this machine's tracker may be started to be asked.

    Raises:
        InvalidInputError: Something in `config` cannot run, or a run that it names does not exist.
    """

    def find(name: str) -> str:
        uri = config.tracking.uri or (ensure_tracking() if may_start else tracking_status().uri)
        if uri is None:
            raise InvalidInputError(
                "the experiment tracker, which knows the runs, is not running, and a dry run starts nothing. Start it "
                "with `dab ui`, or submit without --dry-run."
            )
        return checkpoint_of(uri, name)

    return resolve(resolve_paths(config), find)


def submit(
    config: Config,
    *,
    sweep: bool = False,
    on_note: Callable[[str], None] = lambda _: None,
    on_wait: Callable[[str], None] | None = None,
) -> tuple[Job, Cluster]:
    """Submit a run or a sweep to the embedded cluster; cluster and tracker are started if they are not running.

    Args:
        config: As the user wrote it.
        sweep: Search over `config.search` instead of training once.
        on_note: Told what the user should know about the run.
        on_wait: Told what is being waited for.

    Returns:
        The job and the cluster it went to.

    Raises:
        InvalidInputError: Something in `config` cannot run; nothing was created.
        DabError: Cluster or tracker could not be reached.
    """
    ready = plan(config, sweep=sweep)
    if not ready.num_binary_layers and not sweep:
        on_note(
            f"no layer of {ready.config.model.name} has binary weights, so the packed model will not be smaller; set "
            "binarize.bin_start and binarize.bin_end, or take a wbin or fbin variant"
        )
    cluster, uri = ensure_services(ready.config.tracking.uri, on_wait)
    wanted = ready.config.cluster
    if ready.cpus > cluster.num_cpus:
        raise InvalidInputError(
            f"cluster.num_workers: {wanted.num_workers} workers x {wanted.cpus_per_worker:g} CPU need {ready.cpus:g} "
            f"CPUs, the embedded cluster has {cluster.num_cpus}. Ask for fewer workers, or `dab cluster down` and "
            f"`dab cluster up --num-cpus {math.ceil(ready.cpus)}`."
        )
    job = _create_run(ready, uri, "sweep" if sweep else "train")
    submit_job(job, cluster)
    return job, cluster


def ensure_services(uri: str | None, on_wait: Callable[[str], None] | None = None) -> tuple[Cluster, str]:
    """Return the embedded cluster and the tracking URI, both answering; started side by side where they do not run.

    Args:
        uri: Tracking server of the user's, or None for ours.
        on_wait: Told what is being waited for.

    Raises:
        InvalidInputError: `uri` is not the address of a server; nothing was started.
        DabError: The user's tracker does not answer (nothing was started), or cluster or tracker do not start.
    """
    if uri:
        tracking.check_tracking(uri)
    with ThreadPoolExecutor(2) as pool:
        cluster = pool.submit(ensure_cluster, on_wait=on_wait)
        own = None if uri else pool.submit(ensure_tracking, on_wait=on_wait)
        return cluster.result(), str(uri) if own is None else own.result()


def submit_job(job: Job, cluster: Cluster) -> None:
    """Hand `job` to the Jobs API of `cluster`. The entrypoint holds nothing that a user chose: it is a shell line.

    Raises:
        DabError: The cluster or the tracker did not take it; the run is marked as failed.
    """
    uri, run_id = job.tracking_uri, job.run_id
    try:
        job.save()
        # First the tag, then the job: whoever asks for the status in between finds a job that is not known yet.
        tracking.set_tags(uri, run_id, {"dab.job_id": job.job_id, "dab.attempt": str(job.attempt)})
        program = "jobs.sweep" if job.kind == "sweep" else "jobs.train"
        hand_over(cluster, program, job_id=job.job_id, description=job.to_json(), run_id=run_id, kind=job.kind)
    except BaseException as error:  # an interruption, too: a run without a job would stay queued for ever
        reason = str(error) or type(error).__name__
        tracking.set_tags(uri, run_id, {"dab.message": f"the job could not be submitted: {reason}"})
        tracking.set_status(uri, run_id, "failed")
        raise


def hand_over(cluster: Cluster, program: str, *, job_id: str, description: str, run_id: str, kind: str) -> None:
    """Start a program of ours as a Ray job.

    Args:
        cluster: Where.
        program: Module that the job runs.
        job_id: Name of the job, never used before.
        description: What the program reads from the variable `DAB_JOB`; without a dollar sign, which Ray replaces.
        run_id: MLflow run that it is about.
        kind: Shown with the job.

    Raises:
        DabError: The cluster did not take it.
    """
    variables = client_env(cluster) | {
        VARIABLE: description,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "RAY_AIR_NEW_OUTPUT": "0",  # the other form prints its tables whatever the verbosity
        "RAY_COLOR_PREFIX": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    }
    client = job_client(cluster)
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        client.submit_job(
            entrypoint=f"exec {shlex.quote(sys.executable)} -m {program}",
            submission_id=job_id,
            runtime_env={"working_dir": str(snapshot()), "env_vars": variables},
            metadata={"dab_run_id": run_id, "kind": kind},
        )
    except (OSError, RuntimeError) as error:  # requests' errors are OSErrors, refusals of the Jobs API RuntimeErrors
        raise DabError(f"the Ray cluster: it did not take the job ({error}).") from error


def _create_run(ready: Plan, uri: str, kind: str) -> Job:
    config = ready.config
    shown = config if kind == "sweep" else config.model_copy(update={"search": None})
    tags = provenance() | {
        "dab.kind": kind,
        "dab.data_digest": ready.digest,
        "dab.packed_bytes": str(ready.packed_bytes),
    }
    run_id = tracking.create_run(uri, config.tracking.experiment, config.name, params=flatten(shown), tags=tags)
    folder = str(Path(ready.storage) / run_id)
    tracking.set_tags(uri, run_id, {"dab.folder": folder})
    tracking.log_json(uri, run_id, "config.json", to_dict(config))
    tracking.log_dataset(uri, run_id, digest=ready.digest, path=config.data.train, context="train")
    values: dict[str, Any] = to_dict(config)
    job = Job(kind, run_id, config.name, folder, uri, config.tracking.experiment, 1, values)
    job.save()
    (Path(folder) / "config.yaml").write_text(to_yaml(config if kind == "sweep" else alone(config)))
    return job
