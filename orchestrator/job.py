"""The description that travels from `dab submit` to the program on the cluster: JSON in an environment variable.

Job entrypoints are shell lines, so nothing that a user chose is ever part of one. The same text lies in the run's
folder as `job.json`, from which `dab resume` submits the next attempt.
"""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dabnn.errors import DabError, InvalidInputError
from dabnn.run_folder import RunFolder
from orchestrator.clusters_file import EMBEDDED
from orchestrator.config import Config

VARIABLE = "DAB_JOB"


def is_job_of(job_id: str, run_id: str) -> bool:
    """Whether a Ray job was submitted for this run, not for the sweep that it is a trial of."""
    return job_id.startswith(_job_prefix(run_id))


def _job_prefix(run_id: str) -> str:
    return f"dab-{run_id[:16]}-a"


@dataclass(frozen=True)
class Job:
    """One attempt of a run or a sweep.

    Attributes:
        kind: "train" or "sweep".
        run_id: MLflow run.
        name: Name of the run.
        folder: Run folder, the same path on every node.
        tracking_uri: MLflow server.
        experiment: MLflow experiment, where the runs of trials go too.
        attempt: Number of this submission, from 1.
        config: Resolved configuration as plain values.
        target: Cluster that it was sent to: "embedded", a name of `clusters.toml`, or host:port.
        jobs_url: URL of that cluster's Jobs API.
    """

    kind: str
    run_id: str
    name: str
    folder: str
    tracking_uri: str
    experiment: str
    attempt: int
    config: dict[str, Any]
    target: str = EMBEDDED
    jobs_url: str = ""

    @property
    def job_id(self) -> str:
        """Name of the Ray job, unique per attempt."""
        return f"{_job_prefix(self.run_id)}{self.attempt}"

    @property
    def run_folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder.of(self.folder)

    @property
    def whereabouts(self) -> dict[str, str]:
        """Tags that say which cluster the run is on; the embedded one is found by its record, wherever it listens."""
        return {"dab.target": self.target, "dab.jobs_url": "" if self.target == EMBEDDED else self.jobs_url}

    def parsed_config(self) -> Config:
        """Return the configuration, validated again."""
        return Config.model_validate_json(json.dumps(self.config))

    def to_json(self) -> str:
        """Return the text that `from_environment` reads; Ray replaces `$NAME` in variables, so it holds no dollar."""
        return json.dumps(asdict(self)).replace("$", "\\u0024")

    def save(self) -> None:
        """Write `job.json` into the run's folder."""
        self.run_folder.leave_json("job.json", asdict(self))

    def next_attempt(self) -> "Job":
        """Return the description of the following attempt."""
        return replace(self, attempt=self.attempt + 1)

    @classmethod
    def load(cls, place: Path | RunFolder) -> "Job":
        """Read `job.json` of a run's folder.

        Raises:
            InvalidInputError: The folder holds none.
        """
        folder = place if isinstance(place, RunFolder) else RunFolder(place)
        values = folder.load_json("job.json")
        if not values:
            raise InvalidInputError(f"{folder.location}: no run was submitted with this folder: it has no job.json.")
        return cls(**values)

    @classmethod
    def from_environment(cls) -> "Job":
        """Read the description of the job that this process is.

        Raises:
            DabError: The variable is not set: the program was not started by `dab submit`.
        """
        text = os.environ.get(VARIABLE)
        if text is None:
            raise DabError(
                f"{VARIABLE} is not set. This program is started by `dab submit`; `dab submit --help` says how."
            )
        return cls(**json.loads(text))
