"""`dab data build --cluster`: the same build with its shards made by tasks of the cluster, as a job (`jobs.build`).

All machines of the cluster have to see the source and the destination under the same paths.
"""

import json
import os
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dabnn.data import load_manifest
from dabnn.data.encode import make_encoding
from dabnn.data.sources import BUILTIN_PREFIX
from dabnn.errors import DabError, InvalidInputError
from dabnn.run_folder import read_json
from orchestrator.cluster import ensure_cluster
from orchestrator.datasets import BuildOptions, dataset_view
from orchestrator.home import home_folder
from orchestrator.job import VARIABLE
from orchestrator.jobs_api import follow_job, job_client
from orchestrator.output import View
from orchestrator.send import hand_over
from orchestrator.target import Target, embedded


@dataclass(frozen=True)
class Request:
    """The description that travels to the job, as JSON in an environment variable.

    Attributes:
        job_id: Name of the Ray job.
        file: Where the job writes how it ended.
        options: What to build, with absolute paths.
    """

    job_id: str
    file: str
    options: BuildOptions

    def to_json(self) -> str:
        """Return the text that `from_environment` reads; Ray replaces `$NAME` in variables, so it holds no dollar."""
        return json.dumps(asdict(self)).replace("$", "\\u0024")

    @classmethod
    def from_environment(cls) -> "Request":
        """Read the description of the job that this process is.

        Raises:
            DabError: The variable is not set: the program was not started by `dab data build`.
        """
        text = os.environ.get(VARIABLE)
        if text is None:
            raise DabError(f"{VARIABLE} is not set. This program is started by `dab data build --cluster`.")
        values = json.loads(text)
        return cls(**values | {"options": BuildOptions(**values["options"])})


def build_on_cluster(options: BuildOptions, *, num_processes: int | None, say: Callable[[str], None]) -> View:
    """Build a dataset on the embedded cluster, which is started if it does not run, and return splits and classes.

    Args:
        options: What to build.
        num_processes: Refused: the cluster decides.
        say: Told how far the job is.

    Raises:
        InvalidInputError: As `dabnn.data.build_dataset`.
        DabError: The job failed; what is finished of the dataset stays, and the same command goes on with it.
    """
    if num_processes is not None:
        raise InvalidInputError(
            f"--processes: {num_processes} has no effect with --cluster, which makes a shard a CPU. Leave one out."
        )
    make_encoding(options.resize, options.encode, options.quality)  # refused before anything starts
    job_id = f"dab-data-{uuid.uuid4().hex[:16]}"
    file = home_folder("logs") / f"{job_id}.json"
    request = Request(job_id, str(file), _with_absolute_paths(options))
    target = embedded(ensure_cluster(on_wait=say))
    try:
        _run_job(request, target, say)
        found = read_json(file)
    finally:
        file.unlink(missing_ok=True)
    if found.get("job_id") != job_id:
        raise DabError(f"{options.dest}: the job {job_id} ended without a dataset; its log is above.")
    if "error" in found:
        raise (InvalidInputError if found["exit_code"] == InvalidInputError.exit_code else DabError)(found["error"])
    return dataset_view(load_manifest(request.options.dest))


def _with_absolute_paths(options: BuildOptions) -> BuildOptions:
    is_path = not options.source.startswith(BUILTIN_PREFIX)
    return replace(
        options,
        source=str(Path(options.source).absolute()) if is_path else options.source,
        dest=str(Path(options.dest).absolute()),
        split_lists=None if options.split_lists is None else str(Path(options.split_lists).absolute()),
    )


def _run_job(request: Request, target: Target, say: Callable[[str], None]) -> None:
    hand_over(target, "jobs.build", job_id=request.job_id, description=request.to_json(), run_id="", kind="data")
    try:
        for text in follow_job(target, request.job_id):
            for line in text.splitlines():
                say(line)
    except KeyboardInterrupt:
        job_client(target).stop_job(request.job_id)
        raise
