"""Submit a run or a sweep: check what can be checked here, create the MLflow run, hand the job to the cluster."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dabnn.data.remote import is_url
from dabnn.errors import DabError, InvalidInputError
from orchestrator import queue, tracking
from orchestrator.capacity import Needs, shortage
from orchestrator.config import Config, alone, flatten, resolve_paths, to_dict, to_yaml, with_overrides
from orchestrator.config_search import Search
from orchestrator.config_sections import Cluster as ClusterSection
from orchestrator.found_runs import checkpoint_of, folder_of
from orchestrator.home import home_folder
from orchestrator.job import Job
from orchestrator.jobs_api import LIVING_JOBS, job_status, stop_job
from orchestrator.probe import check_nodes
from orchestrator.provenance import provenance
from orchestrator.queue import Waiting
from orchestrator.reach import Reached, reach
from orchestrator.record_tags import record_of
from orchestrator.resolve import check_room, manifest_of, model_table, resolve
from orchestrator.search import check_trials
from orchestrator.send import Parcel, hand_over, preview, send
from orchestrator.sent_runs import being_sent, remember, sent_run
from orchestrator.target import Target, ensure_target, resolve_target
from orchestrator.tracking_server import ensure_tracking, tracking_status


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
            "search: missing, so there is nothing to sweep over. Add a section `search:` with `space:`, "
            "which `dab config schema` describes, or take a ready one with --set search.preset=quick."
        )
    config = resolved(config, may_start=may_start)
    if sweep:
        check_trials(config)
    storage = config.storage or str(home_folder("storage"))
    check_room(config, storage)
    table = model_table(config)
    cpus = Needs.of(config.cluster).total["CPU"]
    num_binary_layers = sum(layer.binary_weights for layer in table.layers)
    digest = manifest_of(config).digest
    return Plan(config, storage, table.float_bytes, table.packed_bytes, digest, cpus, num_binary_layers)


def resolved(config: Config, *, may_start: bool = True) -> Config:
    """Return what `orchestrator.resolve` makes of `config` as the user wrote it; runs are looked up on its tracker.

    Args:
        config: As the user wrote it.
        may_start: Whether this machine's tracker may be started to be asked.

    Raises:
        InvalidInputError: Something in `config` cannot run, or a run that it names does not exist.
    """

    def tracker() -> str:
        uri = config.tracking.uri or (ensure_tracking() if may_start else tracking_status().uri)
        if uri is None:
            raise InvalidInputError(
                "the experiment tracker, which knows the runs, is not running, and a dry run starts nothing. Start it "
                "with `dab ui`, or submit without --dry-run."
            )
        return uri

    def find(name: str) -> str:
        return checkpoint_of(tracker(), name)

    config = resolve(resolve_paths(config), find)
    name = config.search and config.search.start_from
    if not name or config.search is None or is_url(name) or Path(name).is_absolute():
        return config
    from orchestrator.start_points import start_points  # it knows of sensitivities, which this module submits

    start = folder_of(tracking.find_run(tracker(), name))
    start_points(start, config.search)  # refuses what holds no run
    return with_overrides(config, {"search.start_from": start.location})


def submit(
    config: Config,
    *,
    sweep: bool = False,
    address: str | None = None,
    on_note: Callable[[str], None] = lambda _: None,
    on_wait: Callable[[str], None] | None = None,
) -> tuple[Job, Target]:
    """Submit a run or a sweep; this machine's cluster and tracker are started where they are needed and do not run.

    Args:
        config: As the user wrote it.
        sweep: Search over `config.search` instead of training once.
        address: Cluster, as `orchestrator.target.resolve_target` takes it; wins over `cluster.address`.
        on_note: Told what the user should know about the run.
        on_wait: Told what is being waited for.

    Returns:
        The job and the cluster it went to.

    Raises:
        InvalidInputError: Something in `config` cannot run, or not on this cluster; nothing was created.
        DabError: Cluster or tracker could not be reached.
    """
    target = resolve_target(address or config.cluster.address)
    reached = None if target.is_embedded else reach(target)
    ready = plan(placed(config, target), sweep=sweep)
    if not ready.num_binary_layers and not sweep:
        on_note(
            f"no layer of {ready.config.model.name} has binary weights, so the packed model will not be smaller; set "
            "binarize.bin_start and binarize.bin_end, or take a wbin or fbin variant"
        )
    target, uri = ensure_services(ready.config.tracking.uri, on_wait, target=target)
    reached = reached or reach(target)
    check_size(ready.config.cluster, target, reached)
    if not target.is_embedded:
        _check_elsewhere(ready, target, reached, uri, on_note=on_note, on_wait=on_wait)
    job = _create_run(ready, uri, "sweep" if sweep else "train", target)
    submit_job(job, target, reached, on_note)
    remember(sent_run(job, ready.config.tracking.uri))
    return job, target


def placed(config: Config, target: Target) -> Config:
    """Return `config` with the defaults of the cluster that it is sent to: where runs are recorded and stored.

    Raises:
        InvalidInputError: It is a cluster elsewhere, and neither of both says where.
    """
    if target.is_embedded:
        return config
    uri, storage = config.tracking.uri or target.tracking_uri, config.storage or target.storage
    if uri is None:
        raise InvalidInputError(
            f"tracking.uri: null, the MLflow server of this machine, cannot be reached by {target}. Name one that both "
            "reach: --set tracking.uri=http://..., or tracking in clusters.toml."
        )
    if storage is None:
        raise InvalidInputError(
            f"storage: null, a folder of this machine, is not seen by {target}. Name a folder that it and this machine "
            "share, or a URL: --set storage=..., or storage in clusters.toml."
        )
    return with_overrides(config, {"tracking.uri": uri, "storage": storage})


def check_size(wanted: ClusterSection, target: Target, reached: Reached) -> None:
    """Refuse a run that the cluster could not hold even if nothing else ran there.

    Args:
        wanted: The section `cluster` of its configuration.
        target: The cluster.
        reached: What it says of itself.

    Raises:
        InvalidInputError: Says what is missing.
    """
    needs = Needs.of(wanted)
    needed, num_cpus = needs.total["CPU"], reached.total.get("CPU", 0)
    if target.is_embedded and needed > num_cpus:
        raise InvalidInputError(
            f"cluster.num_workers: {wanted.num_workers} workers x {wanted.cpus_per_worker:g} CPU need {needed:g} "
            f"CPUs, the embedded cluster has {num_cpus:g}. Ask for fewer workers, or `dab cluster down` and "
            f"`dab cluster up --num-cpus {math.ceil(needed)}`."
        )
    short = shortage(needs, reached.nodes, str(target))
    if short and (target.is_embedded or not wanted.wait):
        more = "" if target.is_embedded else ", or --set cluster.wait=true to queue until there are"
        raise InvalidInputError(f"{short} Ask for fewer workers, add nodes{more}.")


def _check_elsewhere(
    ready: Plan,
    target: Target,
    reached: Reached,
    uri: str,
    *,
    on_note: Callable[[str], None],
    on_wait: Callable[[str], None] | None,
) -> None:
    """Refuse what the nodes of a cluster elsewhere do not have or see; say what is unsafe."""
    if target.token is not None and target.token.is_exposed():
        on_note(
            f"{target.token} may be read by other users of this machine, who could run programs as you: chmod 600 it"
        )
    if target.is_unencrypted:
        on_note(
            f"{target.jobs_url}: the token travels there unencrypted; use https or an SSH tunnel (docs/clusters.md)"
        )
    data = ready.config.data
    check_nodes(
        target,
        reached.session,
        places=[data.train, data.val or data.train],
        storage=ready.storage,
        tracking_uri=uri,
        start=lambda job_id, text: hand_over(
            target, "jobs.probe", job_id=job_id, description=text, run_id="", kind="probe"
        ),
        on_wait=on_wait,
    )


def ensure_services(
    uri: str | None, on_wait: Callable[[str], None] | None = None, *, target: Target | None = None
) -> tuple[Target, str]:
    """Return the cluster and the tracking URI, both answering; this machine's are started side by side where needed.

    Args:
        uri: Tracking server of the user's, or None for ours.
        on_wait: Told what is being waited for.
        target: The cluster; None for the embedded one.

    Raises:
        InvalidInputError: `uri` is not the address of a server; nothing was started.
        DabError: The user's tracker does not answer (nothing was started), or cluster or tracker do not start.
    """
    if uri:
        tracking.check_tracking(uri)
    with ThreadPoolExecutor(2) as pool:
        cluster = pool.submit(ensure_target, target or resolve_target(None), on_wait)
        own = None if uri else pool.submit(ensure_tracking, on_wait=on_wait)
        return cluster.result(), str(uri) if own is None else own.result()


def submit_job(
    job: Job, target: Target, reached: Reached | None = None, on_note: Callable[[str], None] = lambda _: None
) -> None:
    """Hand `job` to the Jobs API of a cluster, where it starts or waits for its turn.

    Args:
        job: The run.
        target: The cluster.
        reached: What it says of itself, if that was asked for already.
        on_note: Told when the run has to wait.

    Raises:
        InvalidInputError: Somebody else has submitted this attempt, which goes on.
        DabError: The cluster or the tracker did not take it; the run is marked as failed.
    """
    with _failing(job.tracking_uri, job.run_id):
        parcel, reason = parcel_of(job, target, reached or reach(target))
        if reason:
            on_note(f"queued on {target}: {reason}")
        job.save()
        # First the tag, then the job: whoever asks for the status in between finds a job that is not known yet.
        tags = {"dab.job_id": job.job_id, "dab.attempt": str(job.attempt), **job.whereabouts, **being_sent()}
        tracking.set_tags(job.tracking_uri, job.run_id, tags)
        try:
            send(target, parcel)
        except BaseException as error:
            if not _is_taken(target, job, error):
                raise


def _is_taken(target: Target, job: Job, error: BaseException) -> bool:
    """Return whether a cluster has taken a job all the same, as when only its answer was lost; Ctrl-C ends the job.

    Raises:
        TakenError: It is the job of another submission of the same attempt.
    """
    if "already exists" in str(error):
        raise TakenError(f"{job.name}: attempt {job.attempt} was submitted by somebody else at the same time.")
    try:
        if job_status(target, job.job_id) not in LIVING_JOBS:
            return False
        if isinstance(error, DabError):
            return True
        stop_job(target, job.job_id)
    except DabError:
        pass  # it is not known; should the job run, it will mark the run as running
    return False


class TakenError(InvalidInputError):
    """The attempt was submitted before; nothing is wrong with the run."""


@contextmanager
def _failing(uri: str, run_id: str) -> Iterator[None]:
    """Within the block what goes wrong marks the run as failed: without a job it would stay queued for ever."""
    try:
        yield
    except TakenError:
        raise
    except BaseException as error:
        reason = str(error) or type(error).__name__
        tracking.set_tags(uri, run_id, {"dab.message": f"the job could not be submitted: {reason}"})
        tracking.set_status(uri, run_id, "failed")
        raise


def parcel_of(job: Job, target: Target, reached: Reached | None) -> tuple[Parcel, str]:
    """Return what is handed over for a run, and why it has to wait for its turn, or an empty text.

    Args:
        job: The run.
        target: The cluster.
        reached: What it says of itself; None where it is not asked, as for one that does not run.
    """
    config = job.parsed_config()
    section, needs = config.cluster, Needs.of(config.cluster)
    claim = claim_of_sweep(needs, config.search) if job.kind == "sweep" and config.search else needs
    carried = queue.metadata(job.name, section.priority, claim, target.max_running)
    parcel = Parcel("jobs.supervise", job.job_id, job.to_json(), job.run_id, job.kind, carried)
    if reached is None:
        return parcel, ""
    short = shortage(needs, reached.nodes, str(target)) if section.wait else None
    reason = short or queue.turn_at_submission(target, reached, carried).reason
    # Where others submit too, two may find room at the same moment: whose it is, is decided where all are known.
    is_queued = bool(reason) or not target.is_embedded
    waiting = Waiting(job.job_id, needs, may_outgrow=section.wait) if is_queued else None
    return replace(parcel, waiting=waiting), reason


def claim_of_sweep(needs: Needs, search: Search) -> Needs:
    """Return what a sweep takes: it starts with room for one trial, and fills the cluster with as many as it may.

    Args:
        needs: What one trial needs.
        search: The sweep.
    """
    num_trials = min(search.num_trials, search.max_concurrent or search.num_trials)
    return Needs(
        num_trials * max(1, needs.num_workers),
        max(1, needs.least),
        needs.each,
        needs.placement if num_trials == 1 else "pack",
        needs.labels,
    )


def preview_of(ready: Plan, target: Target, reached: Reached | None, *, sweep: bool) -> dict[str, Any]:
    """Return the job that a submission would hand over, and why it would have to wait, for `dab submit --dry-run`."""
    job = _job("sweep" if sweep else "train", "0" * 32, ready, ready.config.tracking.uri or "", target)
    parcel, reason = parcel_of(job, target, reached)
    return preview(target, parcel, Needs.of(ready.config.cluster)) | {"queued": reason}


def _job(kind: str, run_id: str, ready: Plan, uri: str, target: Target) -> Job:
    config = ready.config
    folder = f"{ready.storage.rstrip('/')}/{run_id}"
    return Job(
        kind,
        run_id,
        config.name,
        folder,
        uri,
        config.tracking.experiment,
        1,
        to_dict(config),
        target.name,
        target.jobs_url,
    )


def _create_run(ready: Plan, uri: str, kind: str, target: Target) -> Job:
    config = ready.config
    shown = config if kind == "sweep" else config.model_copy(update={"search": None})
    record = record_of(config)
    tags = provenance() | record.tags | {"dab.kind": kind, **being_sent()}
    run_id = tracking.create_run(
        uri, config.tracking.experiment, config.name, params=flatten(shown), tags=tags, inputs=record.inputs
    )
    job = _job(kind, run_id, ready, uri, target)
    with _failing(uri, run_id):
        tracking.set_tags(uri, run_id, {"dab.folder": job.folder})
        tracking.log_json(uri, run_id, "config.json", to_dict(config))
        job.save()
        job.run_folder.leave("config.yaml", to_yaml(config if kind == "sweep" else alone(config)))
    return job
