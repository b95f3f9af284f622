"""Packed networks in MLflow's model registry: a version of a model for each run, under the names that people ask for.

A version holds an MLflow model that `mlflow models serve` takes (`orchestrator.model_folder`). The same file of the
same run is registered once: whatever a call that broke off has made is found again. Leaves out which runs of a sweep
are worth it.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from dabnn.errors import DabError, InvalidInputError
from dabnn.run_folder import RunFolder
from orchestrator import tracking
from orchestrator.config_search import Objective
from orchestrator.deliver import Exported, export_best
from orchestrator.found_runs import best_run, folder_of
from orchestrator.mlflow_client import connected, is_refusal
from orchestrator.model_folder import write_model
from orchestrator.package import package

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

_T = TypeVar("_T")
Say = Callable[[str], None]

BEST = "best"
FRONT = "front"
_FILE = "model.safetensors"
_CREATE_ATTEMPTS = 3
_MAX_NAME_CHARS = 200
_ALIAS = re.compile(r"(?!latest$|v\d+$)[\w-]{1,255}", re.IGNORECASE | re.ASCII)
_ALIASES = {
    ("val_top1", "max"): "most-accurate",
    ("packed_bytes", "min"): "smallest",
    ("latency_ms", "min"): "fastest",
    ("bit_ops", "min"): "fewest-operations",
}


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Attributes:
        name: The model.
        version: Number of the version, from 1.
        uri: How MLflow calls it: models:/NAME/VERSION.
        aliases: The aliases that were set.
        tags: Its tags.
        is_new: Whether this call made it.
    """

    name: str
    version: str
    uri: str
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    is_new: bool = True


@dataclass(frozen=True)
class Entry:
    """A trial of a sweep that is to be registered.

    Attributes:
        run_id: Its MLflow run; empty where it has none, and then it cannot be.
        folder: Its folder.
        metrics: What it reached, at least the objectives.
        name: For messages.
    """

    run_id: str
    folder: RunFolder
    metrics: Mapping[str, float]
    name: str = ""


def register_run(uri: str, reference: str, *, model: str | None, aliases: Sequence[str], say: Say) -> Version:
    """Register the packed network of a run, or of a sweep's best trial, which gets the alias `best` if no other.

    Args:
        uri: The MLflow server.
        reference: The run or sweep.
        model: Name of the registered model; None: that of the run or sweep.
        aliases: Names that this version gets, and another loses.
        say: Told what is done.

    Raises:
        InvalidInputError: No such run, one that has not finished, or a name that MLflow does not take.
        DabError: The packed network disagrees with the trained one, or the tracker is away.
    """
    check_names(model, aliases)
    named, best = tracking.find_run(uri, reference), best_run(uri, reference)
    tags, is_sweep = {}, named.run_id != best.run_id
    if is_sweep:
        tags = {"sweep": named.run_id}
    return register(
        uri,
        best.run_id,
        folder_of(best),
        model=model or model_name(named.name),
        aliases=aliases or ([BEST] if is_sweep else []),
        tags=tags,
        say=say,
    )


def register(
    uri: str,
    run_id: str,
    folder: RunFolder,
    *,
    model: str,
    aliases: Sequence[str] = (),
    tags: Mapping[str, str] | None = None,
    say: Say = lambda _: None,
) -> Version:
    """Register the packed network of a finished run's best checkpoint as a version of a model.

    Args:
        uri: The MLflow server.
        run_id: The run.
        folder: Its folder.
        model: Name of the registered model, made if there is none.
        aliases: Names that this version gets, and another loses.
        tags: Further tags of the version; its own win.
        say: Told what is done.

    Returns:
        The version; that of an earlier call where the file is the same.

    Raises:
        InvalidInputError: The run has not finished, or a name is none that MLflow takes.
        DabError: The packed network disagrees with the trained one, or the tracker is away.
    """
    check_names(model, aliases)
    check_finished(folder)
    with connected(uri) as client:
        run = client.get_run(run_id)
    with TemporaryDirectory() as temporary:
        file = Path(temporary) / _FILE
        say(f"packing {run.info.run_name} and comparing it with the trained network on the validation images")
        exported = export_best(folder, file, run_id=run_id, tags=run.data.tags)
        all_tags = {**(tags or {}), **_tags(run, exported, hashlib.sha256(file.read_bytes()).hexdigest())}
        with connected(uri) as client:
            version, is_new = _version(client, run, model, all_tags, file, exported.packed.spec.input_size)
            if not is_new:
                for key in all_tags.keys() - version.tags.keys():
                    client.set_model_version_tag(model, version.version, key, all_tags[key])
            for alias in aliases:
                client.set_registered_model_alias(model, alias, version.version)
    number = str(version.version)
    made = Version(model, number, f"models:/{model}/{number}", tuple(aliases), all_tags, is_new)
    say(f"{'registered' if is_new else 'known already'}: {run.info.run_name} as {made.uri}{_named(aliases)}")
    return made


def register_front(
    uri: str, sweep: str, entries: Sequence[Entry], objectives: Sequence[Objective], *, model: str, say: Say
) -> list[Version]:
    """Register what a sweep found: its best trial as alias `best`, or each trial of its front.

    Versions of a front have the tag `front`, and the best by each objective an alias: `most-accurate` (val_top1),
    `smallest` (packed_bytes), `fastest` (latency_ms), `fewest-operations` (bit_ops), `best-METRIC`. Versions that an
    earlier call registered for this sweep and that are beaten by now lose the tag, and stay.

    Args:
        uri: The MLflow server.
        sweep: Run id of the sweep.
        entries: Its best trial, or its front.
        objectives: What was searched for.
        model: Name of the registered model, as from `model_name`.
        say: Told what is done, and of a trial that cannot be registered; the others are.

    Returns:
        A version for each entry that could be registered.

    Raises:
        DabError: The tracker is away, or no entry could be registered.
    """
    aliases = front_aliases(entries, objectives)
    made: list[Version] = []
    reasons: list[str] = []
    for position, entry in enumerate(entries):
        tags = {"sweep": sweep} | ({FRONT: sweep} if len(objectives) > 1 else {})
        tags |= {key: f"{entry.metrics[key]:.10g}" for goal in objectives if (key := goal.metric) in entry.metrics}
        try:
            if not entry.run_id:
                raise InvalidInputError("it has no run in MLflow, which was away.")
            made.append(
                register(uri, entry.run_id, entry.folder, model=model, aliases=aliases[position], tags=tags, say=say)
            )
        except DabError as error:
            tracking.check_tracking(uri)  # what is wrong with one trial is not wrong with the next
            reasons.append(f"{entry.name or entry.run_id} was not registered: {error}")
            say(reasons[-1])
    if reasons and not made:
        raise DabError(reasons[0])
    if len(objectives) > 1:
        _leave_front(uri, model, sweep, {version.version for version in made})
    return made


def front_aliases(entries: Sequence[Entry], objectives: Sequence[Objective]) -> list[list[str]]:
    """Return the aliases of each entry: of equally good ones the first has them."""
    found: list[list[str]] = [[] for _ in entries]
    for goal in objectives:
        known = [place for place, entry in enumerate(entries) if goal.metric in entry.metrics]
        if known:
            sign = -1.0 if goal.mode == "max" else 1.0
            best = min(known, key=lambda place: sign * entries[place].metrics[goal.metric])
            found[best].append(BEST if len(objectives) == 1 else _alias(goal))
    return found


def model_name(text: str) -> str:
    """Return a name for a registered model that reads like `text`: MLflow takes no slash and no colon."""
    return re.sub(r"[^\w .+-]+", "-", text).strip("-. ")[:_MAX_NAME_CHARS] or "model"


def check_names(model: str | None, aliases: Sequence[str]) -> None:
    """Refuse names that MLflow would not take, before anything is packed.

    Raises:
        InvalidInputError: Says which, and what would do.
    """
    if model is not None and model_name(model) != model:
        raise InvalidInputError(
            f"--model: {model!r} is no name of a registered model; use letters, digits, dots and dashes, such as "
            f"{model_name(model)}."
        )
    for alias in aliases:
        if not _ALIAS.fullmatch(alias):
            raise InvalidInputError(
                f"--alias: {alias!r} is no alias; use letters, digits and dashes. `latest` and numbers such as v1 are "
                "MLflow's own."
            )


def check_finished(folder: RunFolder) -> None:
    """Refuse a run whose network is not the one that was asked for.

    Raises:
        InvalidInputError: It has not finished.
    """
    result = folder.result()
    status = result.get("status")
    if status == "finished":
        return
    if status is None:
        raise InvalidInputError(f"{folder.location}: the run has not finished, so there is nothing to register yet.")
    reason = f" ({result['message']})" if result.get("message") else ""
    raise InvalidInputError(
        f"{folder.location}: the run ended as {status}{reason}, and only what has finished is registered. `dab resume` "
        "continues it; `dab export` packs the checkpoint that there is."
    )


def _tags(run: "Run", exported: Exported, sha256: str) -> dict[str, str]:
    metrics, known = exported.checkpoint.metrics, run.data.tags
    tags = {
        "val_top1": f"{metrics['val_top1']:.6g}" if "val_top1" in metrics else "",
        "packed_top1": f"{exported.verification.top1_packed:.6g}",
        "packed_bytes": str(exported.file_bytes),
        "sha256": sha256,
        "data_digest": known.get("dab.data_digest", ""),
        "run_id": run.info.run_id,
        "run_name": str(run.info.run_name),
        "git_commit": known.get("dab.git_commit", ""),
        "package": package().digest,
    }
    return {key: value for key, value in tags.items() if value}


def _version(
    client: "MlflowClient", run: "Run", model: str, tags: dict[str, str], file: Path, input_size: int
) -> tuple["ModelVersion", bool]:
    """Return the version of a file of a run, and whether it was made now."""

    def find() -> "ModelVersion | None":
        known = client.search_model_versions(f"name = '{model}' and run_id = '{run.info.run_id}'")
        return next((each for each in known if each.tags.get("sha256") == tags["sha256"]), None)

    if found := find():
        return found, False
    logged = _logged_model(client, run, tags, file, input_size)
    _make_model(client, model)
    source = f"models:/{logged.model_id}"
    return _once(
        find,
        lambda: client.create_model_version(
            model,
            source,
            run.info.run_id,
            tags=tags,
            description=_description(tags),
            await_creation_for=0,
            model_id=logged.model_id,
        ),
    ), True


def _logged_model(
    client: "MlflowClient", run: "Run", tags: dict[str, str], file: Path, input_size: int
) -> "LoggedModel":
    """Return MLflow's record of a file of a run, with all that serves it; one that was begun before is gone on with."""
    experiment_id, run_id = run.info.experiment_id, run.info.run_id

    def find() -> "LoggedModel | None":
        condition = f"source_run_id = '{run_id}' AND tags.sha256 = '{tags['sha256']}'"
        return next(iter(client.search_logged_models([experiment_id], condition)), None)

    logged = find() or _once(
        find,
        lambda: client.create_logged_model(
            experiment_id, "packed", run_id, {**tags}, {"packed_bytes": tags["packed_bytes"]}, "image-classifier"
        ),
    )
    if logged.status == "READY":
        return logged
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_model(folder, file, input_size, run_id=run_id, model_id=logged.model_id, metadata={**tags})
        client.log_model_artifacts(logged.model_id, str(folder))
    return client.finalize_logged_model(logged.model_id, "READY")


def _once(find: Callable[[], _T | None], create: Callable[[], _T]) -> _T:
    """Create what there must be one of: where the answer is lost, it is looked for before it is asked for again."""
    from mlflow.exceptions import MlflowException

    for _ in range(_CREATE_ATTEMPTS - 1):
        try:
            return create()
        except MlflowException as error:
            if is_refusal(error):
                raise
            if (found := find()) is not None:
                return found
    return create()


def _make_model(client: "MlflowClient", model: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _leave_front(uri: str, model: str, sweep: str, front: set[str]) -> None:
    """Take the tag from versions that were of the front of a sweep and are not any more; aliases have moved on."""
    with connected(uri) as client:
        for version in client.search_model_versions(f"name = '{model}' and tags.{FRONT} = '{sweep}'"):
            if str(version.version) not in front:
                client.delete_model_version_tag(model, version.version, FRONT)


def _alias(goal: Objective) -> str:
    return _ALIASES.get((goal.metric, goal.mode), f"best-{re.sub(r'[^A-Za-z0-9]+', '-', goal.metric)}")


def _named(aliases: Sequence[str]) -> str:
    return f" ({', '.join(aliases)})" if aliases else ""


def _description(tags: Mapping[str, str]) -> str:
    top1: Any = tags.get("val_top1", tags["packed_top1"])
    return f"Packed network of run {tags['run_name']}: {top1} % top-1, {int(tags['packed_bytes']):,} bytes."
