"""What `dab` records of runs, in MLflow: parameters, status, metrics, files, and how runs are found again.

A run is written by explicit run id, never by MLflow's global state, so any process may do it. This module is the one
door to MLflow: the server of this machine and the follower of metrics files are reached through it too.
"""

import json
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from dabnn.data.manifest import MANIFEST_NAME
from dabnn.errors import InvalidInputError
from orchestrator.metric_follower import MetricFollower, has_unsent
from orchestrator.mlflow_client import check_tracking, connected, is_refusal
from orchestrator.tracking_server import TrackingStatus, ensure_tracking, tracking_down, tracking_status

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

__all__ = [
    "DataInput",
    "MetricFollower",
    "RunRecord",
    "Status",
    "TrackingStatus",
    "check_tracking",
    "create_run",
    "ensure_tracking",
    "find_run",
    "find_runs",
    "has_unsent",
    "log_file",
    "log_inputs",
    "log_json",
    "log_metrics",
    "set_status",
    "set_tags",
    "tracking_down",
    "tracking_status",
]

Status = Literal["queued", "running", "finished", "failed", "stopped"]

_TO_MLFLOW: dict[Status, str] = {
    "queued": "SCHEDULED",
    "running": "RUNNING",
    "finished": "FINISHED",
    "failed": "FAILED",
    "stopped": "KILLED",
}
_FROM_MLFLOW = {theirs: ours for ours, theirs in _TO_MLFLOW.items()}
_ENDED = ("finished", "failed", "stopped")
_PARENT = "mlflow.parentRunId"
_KEY = "dab.key"
_CREATE_ATTEMPTS = 3
# MLflow refuses more (mlflow.utils.validation).
_MAX_PARAM_CHARS = 6000
_MAX_TAG_CHARS = 8000
_MAX_PARAMS_PER_CALL = 100
_MAX_METRICS_PER_CALL = 1000
_MAX_DIGEST_CHARS = 36
_DATA_SCHEMA = json.dumps(
    {
        "mlflow_colspec": [
            {"type": "binary", "name": "image", "required": True},
            {"type": "long", "name": "label", "required": True},
        ]
    }
)
_ACTIVE_ONLY = 1  # mlflow.entities.ViewType, which takes seconds to import
_PAGE_SIZE = 1000


@dataclass(frozen=True)
class DataInput:
    """Data that a run reads.

    Attributes:
        path: Folder or URL of the dataset.
        context: The split that is read, `train` or `val`.
        digest: SHA-256 of the manifest; MLflow shows its first 36 characters, the profile holds all.
        num_samples: Images of the split.
        num_bytes: Bytes of its shards.
        num_classes: Classes of the dataset.
    """

    path: str
    context: str
    digest: str
    num_samples: int
    num_bytes: int
    num_classes: int

    @property
    def name(self) -> str:
        """Name of the dataset and the split: MLflow keeps one record for a name and a digest."""
        return f"{self.path.rstrip('/').rpartition('/')[2] or 'data'}/{self.context}"

    @property
    def profile(self) -> dict[str, int | str]:
        """What MLflow shows of it."""
        return {
            "num_rows": self.num_samples,
            "num_classes": self.num_classes,
            "num_bytes": self.num_bytes,
            "manifest_sha256": self.digest,
        }


@dataclass(frozen=True)
class RunRecord:
    """A run as MLflow has it.

    Attributes:
        run_id: 32 hexadecimal digits.
        name: Run name.
        status: Where it stands.
        experiment: Name of its experiment.
        parent: Run id of the sweep that it belongs to.
        params: Parameters, flattened, as text.
        tags: Tags, MLflow's own included.
        metrics: Last value of each.
        start_time: Seconds since 1970.
        end_time: The same; None while it has not ended.
        artifact_uri: Where its files lie.
    """

    run_id: str
    name: str
    status: Status
    experiment: str
    parent: str | None
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    start_time: float
    end_time: float | None
    artifact_uri: str


def create_run(
    uri: str,
    experiment: str,
    name: str,
    *,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    inputs: Sequence[DataInput] = (),
    parent: str | None = None,
    key: str | None = None,
) -> str:
    """Create a queued run and return its id.

    Args:
        uri: Address of the MLflow server.
        experiment: Experiment name, created if missing.
        name: Run name.
        params: Parameters; nested mappings become dotted names. A value beyond 6000 characters is cut and says so.
        tags: Tags; cut in the same way, beyond 8000.
        inputs: The data that it reads.
        parent: Run id of the sweep that it belongs to.
        key: Names the run for as long as it is tried to create it: a call that failed half way is gone on with.
    """
    from mlflow.entities import Param

    all_tags = {key: _cut(value, _MAX_TAG_CHARS) for key, value in tags.items()}
    if parent is not None:
        all_tags[_PARENT] = parent
    entities = [Param(key, _cut(_text(value), _MAX_PARAM_CHARS)) for key, value in _flat(params)]
    with connected(uri) as client:
        run = _create(client, _experiment_id(client, experiment), name, all_tags, key)
        run_id = str(run.info.run_id)
        client.update_run(run_id, status=_TO_MLFLOW["queued"])
        for begin in range(0, len(entities), _MAX_PARAMS_PER_CALL):
            client.log_batch(run_id, params=entities[begin : begin + _MAX_PARAMS_PER_CALL])
        if inputs:
            _log_inputs(client, run_id, inputs)
    return run_id


def _create(
    client: "MlflowClient", experiment_id: str, name: str, tags: dict[str, str], key: str | None = None
) -> "Run":
    """Create a run once: where the answer is lost, the run is looked for by its key before it is asked for again."""
    from mlflow.exceptions import MlflowException

    if key is not None and (found := _search(client, [experiment_id], f"tags.`{_KEY}` = '{key}'")):
        return found[0]
    key = key or secrets.token_hex(8)
    for _ in range(_CREATE_ATTEMPTS - 1):
        try:
            return client.create_run(experiment_id, run_name=name, tags=tags | {_KEY: key})
        except MlflowException as error:
            if is_refusal(error):
                raise
            if found := _search(client, [experiment_id], f"tags.`{_KEY}` = '{key}'"):
                return found[0]
    return client.create_run(experiment_id, run_name=name, tags=tags | {_KEY: key})


def set_status(uri: str, run_id: str, status: Status) -> None:
    """Set where a run stands; `finished`, `failed` and `stopped` also set its end time."""
    if status not in _TO_MLFLOW:
        raise InvalidInputError(f"status: {status!r} is unknown; known are {', '.join(get_args(Status))}.")
    with connected(uri) as client:
        if status in _ENDED:
            client.set_terminated(run_id, _TO_MLFLOW[status])
        else:
            client.update_run(run_id, status=_TO_MLFLOW[status])


def log_metrics(uri: str, run_id: str, metrics: Mapping[str, float], step: int) -> None:
    """Record values of one step, timed now."""
    from mlflow.entities import Metric

    now_ms = round(time.time() * 1000)
    entities = [Metric(key, float(value), now_ms, step) for key, value in metrics.items()]
    with connected(uri) as client:
        for begin in range(0, len(entities), _MAX_METRICS_PER_CALL):
            client.log_batch(run_id, metrics=entities[begin : begin + _MAX_METRICS_PER_CALL])


def set_tags(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags, replacing those of the same name; a value of more than 8000 characters is cut and says so."""
    from mlflow.entities import RunTag

    entities = [RunTag(key, _cut(value, _MAX_TAG_CHARS)) for key, value in tags.items()]
    with connected(uri) as client:
        for begin in range(0, len(entities), _MAX_PARAMS_PER_CALL):
            client.log_batch(run_id, tags=entities[begin : begin + _MAX_PARAMS_PER_CALL])


def log_json(uri: str, run_id: str, name: str, obj: Any) -> None:
    """Keep a JSON value as the run's file `name`, replacing an earlier one."""
    text = json.dumps(obj, indent=2)
    with connected(uri) as client:
        client.log_text(run_id, text, name)


def log_file(uri: str, run_id: str, path: Path, folder: str | None = None) -> None:
    """Keep a copy of a local file with the run, below `folder` of its files."""
    if not path.is_file():
        raise InvalidInputError(f"{path}: no such file; it cannot be kept with run {run_id}.")
    with connected(uri) as client:
        client.log_artifact(run_id, str(path), folder)


def log_inputs(uri: str, run_id: str, inputs: Sequence[DataInput]) -> None:
    """Record which data a run reads; MLflow shows it beside the run's parameters."""
    with connected(uri) as client:
        _log_inputs(client, run_id, inputs)


def _log_inputs(client: "MlflowClient", run_id: str, inputs: Sequence[DataInput]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    datasets = [
        Dataset(
            each.name,
            each.digest[:_MAX_DIGEST_CHARS],
            source_type=each.path.partition("://")[0] if "://" in each.path else "local",
            source=json.dumps({"uri": f"{each.path.rstrip('/')}/{MANIFEST_NAME}"}),
            schema=_DATA_SCHEMA,
            profile=json.dumps(each.profile),
        )
        for each in inputs
    ]
    tags = [[InputTag("mlflow.data.context", each.context)] for each in inputs]
    client.log_inputs(run_id, [DatasetInput(dataset, tag) for dataset, tag in zip(datasets, tags, strict=True)])


def find_runs(
    uri: str, experiment: str | None = None, *, parent: str | None = None, max_results: int | None = None
) -> list[RunRecord]:
    """Return runs, newest first.

    Args:
        uri: Address of the MLflow server.
        experiment: Only runs of this experiment. Default: all experiments.
        parent: Only the trials of this sweep.
        max_results: At most so many.

    Raises:
        InvalidInputError: No such experiment; the message names the nearest.
    """
    with connected(uri) as client:
        names = _experiment_names(client)
        if experiment is not None and experiment not in names.values():
            raise InvalidInputError(
                f"experiment: there is none named {experiment!r} on {uri}.{_nearest(experiment, names.values())}"
            )
        wanted = {key: name for key, name in names.items() if experiment in (None, name)}
        condition = f"tags.`{_PARENT}` = '{parent}'" if parent is not None else ""
        return [_record(run, wanted) for run in _search(client, wanted, condition, max_results)]


def find_deleted_runs(uri: str) -> list[RunRecord]:
    """Return the runs that were deleted and not purged yet, newest first.

    Raises:
        DabError: The tracker does not answer.
    """
    from mlflow.entities import ViewType

    with connected(uri) as client:
        names = _experiment_names(client, ViewType.ALL)
        return [_record(run, names) for run in _search(client, names, view=ViewType.DELETED_ONLY)]


def find_run(uri: str, ref: str) -> RunRecord:
    """Return the run that `ref` names: a run id, a run name, or the beginning of a run id.

    Raises:
        InvalidInputError: It names none or several; the message names the nearest, or all of them.
    """
    with connected(uri) as client:
        names = _experiment_names(client)
        runs = _search(client, names, f"attributes.run_name = {_quoted(ref)}")
        if ref and set(ref) <= set("0123456789abcdef"):
            runs = runs or _search(client, names, f"attributes.run_id LIKE '{ref}%'")
        if not runs:
            known = [run.info.run_name for run in _search(client, names, max_results=_PAGE_SIZE)]
            raise InvalidInputError(
                f"run: none on {uri} has the name or id {ref!r}.{_nearest(ref, known)} `dab runs` lists all."
            )
        if len(runs) > 1:
            raise InvalidInputError(f"run: {ref!r} fits {len(runs)} runs: {_listed(runs)}. Use the id of one of them.")
        return _record(runs[0], names)


def _experiment_id(client: "MlflowClient", name: str) -> str:
    """Return the id of an experiment, created on demand; two programs may do so at once."""
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            # Without this tag the browser opens in its mode for language models.
            return str(client.create_experiment(name, tags={"mlflow.experimentKind": "custom_model_development"}))
        except MlflowException:
            # Of two programs at once the later hears that it exists, or of a constraint of the server's database.
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment is None or experiment.lifecycle_stage != "active":
        raise InvalidInputError(
            f"tracking.experiment: {name!r} was deleted in MLflow; restore it there or use another."
        )
    return str(experiment.experiment_id)


def _experiment_names(client: "MlflowClient", view: int = _ACTIVE_ONLY) -> dict[str, str]:
    """Return the name of each experiment by its id."""
    names: dict[str, str] = {}
    token: str | None = None
    while True:
        page = client.search_experiments(view, max_results=_PAGE_SIZE, page_token=token)
        names |= {str(experiment.experiment_id): experiment.name for experiment in page}
        token = page.token
        if not token:
            return names


def _search(
    client: "MlflowClient",
    experiments: Iterable[str],
    condition: str = "",
    max_results: int | None = None,
    view: int = _ACTIVE_ONLY,
) -> list["Run"]:
    runs: list[Run] = []
    token: str | None = None
    while max_results is None or len(runs) < max_results:
        size = _PAGE_SIZE if max_results is None else min(_PAGE_SIZE, max_results - len(runs))
        page = client.search_runs(
            list(experiments), condition, view, size, order_by=["attributes.start_time DESC"], page_token=token
        )
        runs += page
        token = page.token
        if not token:
            break
    return runs


def _record(run: "Run", experiment_names: Mapping[str, str]) -> RunRecord:
    status = _FROM_MLFLOW[run.info.status]
    return RunRecord(
        run_id=run.info.run_id,
        name=run.info.run_name,
        status=status,
        experiment=experiment_names[run.info.experiment_id],
        parent=run.data.tags.get(_PARENT),
        params=dict(run.data.params),
        tags=dict(run.data.tags),
        metrics=dict(run.data.metrics),
        start_time=run.info.start_time / 1000,
        end_time=run.info.end_time / 1000 if status in _ENDED and run.info.end_time else None,
        artifact_uri=run.info.artifact_uri,
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    note = f" ... cut by dab from {len(text)} characters"
    return text[: limit - len(note)] + note


def _quoted(text: str) -> str:
    """Return text as a literal of MLflow's filters, which know no escapes: text with both kinds of quotes has none."""
    if '"' not in text:
        return f'"{text}"'
    if "'" not in text:
        return f"'{text}'"
    raise InvalidInputError(
        f"run: {text!r} holds both kinds of quotes, which MLflow cannot search for; use the run's id."
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, sorted(set(known)), n=3)
    return f" Nearest: {', '.join(close)}." if close else ""


def _listed(runs: list["Run"], limit: int = 5) -> str:
    shown = [f"{run.info.run_id} ({run.info.run_name}, {_FROM_MLFLOW[run.info.status]})" for run in runs[:limit]]
    return ", ".join([*shown, "..."] if len(runs) > limit else shown)
