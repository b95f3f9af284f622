"""Hand a program of ours to the Jobs API: entrypoint, environment, package, and what a job carries.

An entrypoint is a shell line that holds nothing a user chose; what they chose travels as JSON in environment variables,
without secrets: what a job needs of those, its nodes have.
"""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dabnn.errors import DabError
from orchestrator import queue
from orchestrator.capacity import Needs
from orchestrator.cluster import client_env
from orchestrator.job import VARIABLE
from orchestrator.jobs_api import STOP_GRACE_S, asking, job_client
from orchestrator.package import Package, package, snapshot
from orchestrator.queue import Waiting
from orchestrator.target import Target

_PYTHON = "DAB_PYTHON"


@dataclass(frozen=True)
class Parcel:
    """What is handed over.

    Attributes:
        program: Module that the job runs.
        job_id: Name of the job, never used before.
        description: What the program reads from the variable `DAB_JOB`; without a dollar sign, which Ray replaces.
        run_id: MLflow run that it is about, or empty.
        kind: Shown with the job.
        carried: What else others see of it, see `orchestrator.queue`.
        waiting: Given when it is not its turn yet.
    """

    program: str
    job_id: str
    description: str
    run_id: str
    kind: str
    carried: Mapping[str, str] = field(default_factory=dict)
    waiting: Waiting | None = None

    @property
    def entrypoint(self) -> str:
        """The shell line that starts the program, or the process that waits for its turn."""
        queued = "" if self.waiting is None else "jobs.queued "
        return f'exec "${{{_PYTHON}:-python}}" -m {queued}{self.program}'

    def variables(self, target: Target) -> dict[str, str]:
        """Return the environment of the job on a cluster."""
        return {
            **_reaching(target),
            VARIABLE: self.description,
            **({} if self.waiting is None else {queue.VARIABLE: self.waiting.to_json()}),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "RAY_AIR_NEW_OUTPUT": "0",  # the other form prints its tables whatever the verbosity
            "RAY_COLOR_PREFIX": "0",
            "RAY_DEDUP_LOGS": "0",
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S),
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        }

    @property
    def metadata(self) -> dict[str, str]:
        """What every user of the cluster sees of the job."""
        queued = {} if self.waiting is None else {queue.QUEUED: "1"}
        return {"dab_run_id": self.run_id, "kind": self.kind, **self.carried, **queued}


def send(target: Target, parcel: Parcel) -> None:
    """Start a program of ours as a Ray job.

    Raises:
        DabError: The cluster did not take it.
    """
    client = job_client(target)
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with asking(target):
            client.submit_job(
                entrypoint=parcel.entrypoint,
                submission_id=parcel.job_id,
                runtime_env={"working_dir": str(snapshot().folder), "env_vars": parcel.variables(target)},
                metadata=parcel.metadata,
            )
    except DabError as error:
        raise DabError(f"{target}: it did not take the job ({error}).") from error


def hand_over(target: Target, program: str, *, job_id: str, description: str, run_id: str, kind: str) -> None:
    """Start a program of ours that does not queue as a Ray job; the arguments are those of `Parcel`.

    Raises:
        DabError: The cluster did not take it.
    """
    send(target, Parcel(program, job_id, description, run_id, kind))


def preview(target: Target, parcel: Parcel, needs: Needs) -> dict[str, Any]:
    """Return what `send` would send, as `dab submit --dry-run` shows it: names of variables, not their values."""
    code: Package = package()
    return {
        "target": target.name,
        "jobs_url": target.jobs_url or None,
        "entrypoint": parcel.entrypoint,
        "environment": sorted(parcel.variables(target)),
        "metadata": parcel.metadata,
        "package": {"digest": code.digest, "num_files": code.num_files, "num_bytes": code.num_bytes},
        "workers": needs.num_workers,
        "resources_per_worker": dict(needs.each),
        "placement": needs.placement,
        "labels": dict(needs.labels),
    }


def _reaching(target: Target) -> dict[str, str]:
    """Return the variables by which the job finds its Ray; on a cluster elsewhere Ray sets them itself."""
    if target.is_embedded and target.address and target.token and target.token.file:
        env = client_env(target.address, target.jobs_url, target.token.file)
        return env | {_PYTHON: sys.executable}
    return {"RAY_USAGE_STATS_ENABLED": "0"} | ({_PYTHON: target.python} if target.python else {})
