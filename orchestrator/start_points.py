"""The points that a search tries first: the best of an earlier sweep, or a run and its plan of `dab sensitivity`."""

from collections.abc import Iterable
from typing import Any

from dabnn.run_folder import RunFolder
from orchestrator.config import Config, to_dict
from orchestrator.config_search import Search
from orchestrator.config_space import END, START
from orchestrator.job import Job
from orchestrator.resolve import model_table
from orchestrator.sensitivity import FILE as SENSITIVITY
from orchestrator.sensitivity import proposal
from orchestrator.study import FILE, Study, StudyTrial

NUM_POINTS = 5  # of a sweep; more would leave a small search little of its own


def start_points(folder: RunFolder, search: Search) -> list[dict[str, Any]]:
    """Return the points to try first, given the folder of what `search.start_from` names; empty when it has none.

    Keys that the earlier search or run does not say are drawn.

    Args:
        folder: Of a sweep or of a run.
        search: The search that will try them.

    Raises:
        InvalidInputError: The folder holds no run.
    """
    folder = folder.fresh()
    if (folder.root / FILE).is_file():
        return best_points(Study.read(folder.root / FILE))
    config = Job.load(folder.root).parsed_config()
    points = [_of_run(config, search)]
    found = folder.load_json(SENSITIVITY)
    if found and "error" not in found:
        paths = proposal(found, None).binary_weights
        numbers = [layer["index"] for layer in found["layers"] if layer["path"] in paths]
        points.append(points[0] | _layers(numbers, paths, search))
    return points


def best_points(study: Study) -> list[dict[str, Any]]:
    """Return the points of the front of a study, then its others from the best of the first objective on."""
    front = set(study.front())
    objective = study.search.objectives[0]
    sign = -1.0 if objective.mode == "max" else 1.0

    def rank(trial: StudyTrial) -> tuple[bool, float]:
        return trial.number not in front, sign * trial.metrics[objective.metric]

    finished = sorted((trial for trial in study.trials() if trial.state == "finished"), key=rank)
    return [trial.values for trial in finished[:NUM_POINTS]]


def _of_run(config: Config, search: Search) -> dict[str, Any]:
    raw = to_dict(config)
    values = {key: _at(raw, key) for key in search.space}
    binary = [layer for layer in model_table(config).layers if layer.binary_weights]
    layers = _layers([layer.index for layer in binary], [layer.path for layer in binary], search)
    return {key: value for key, value in values.items() if value is not None} | layers


def _layers(numbers: list[int], paths: Iterable[str], search: Search) -> dict[str, Any]:
    """Return the choice of layers as the keys of the space say it: as a range that holds them, or as a subset."""
    subset = search.space.get("binarize.layers")
    values: dict[str, Any] = {}
    if numbers:
        values = {START: min(numbers), END: max(numbers)}
    if subset is not None and subset.kind == "subset":
        names = {*numbers, *paths}
        values["binarize.layers"] = [entry for entry in subset.values if entry in names]
    return {key: value for key, value in values.items() if key in search.space}


def _at(raw: dict[str, Any], key: str) -> Any:
    value: Any = raw
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
