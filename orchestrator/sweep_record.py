"""What a sweep left behind, read from its run folder: its trials, what each measured, and which of them nothing beats.

The folder is all that is needed: neither the tracker nor the cluster is asked. Values come from a trial's `trial.json`;
where there is none, from its `config.yaml` at the keys of the sweep's space. Leaves out how it looks (`report_sweep`).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from dabnn.errors import InvalidInputError
from dabnn.run_folder import RunFolder, headline

TrialState = Literal["finished", "stopped early", "failed", "stopped", "running"]
Goal = Literal["max", "min"]
_CONSTRAINT = re.compile(r"\s*([\w./-]+)\s*(<=|>=)\s*(\S+)\s*")


@dataclass(frozen=True)
class Aim:
    """One objective: a measure, and whether more (`max`) or less (`min`) of it is better."""

    metric: str
    mode: Goal

    @property
    def sign(self) -> float:
        """Factor that makes less of it better."""
        return -1.0 if self.mode == "max" else 1.0


@dataclass(frozen=True)
class Limit:
    """One constraint, such as packed_bytes <= 300000."""

    metric: str
    is_upper: bool
    bound: float

    @classmethod
    def parse(cls, text: str) -> "Limit":
        """Read `METRIC <= NUMBER` or `METRIC >= NUMBER`.

        Raises:
            InvalidInputError: It is none of both.
        """
        found = _CONSTRAINT.fullmatch(text)
        try:
            bound = float(found[3]) if found else math.nan
        except ValueError:
            bound = math.nan
        if found is None or math.isnan(bound):
            raise InvalidInputError(
                f"search.constraints: {text!r} is no limit. Write one such as packed_bytes <= 300000."
            )
        return cls(found[1], found[2] == "<=", bound)

    def holds(self, measures: Mapping[str, float]) -> bool:
        """Whether a trial keeps it; one that did not measure it does not."""
        value = measures.get(self.metric, math.nan)
        return value <= self.bound if self.is_upper else value >= self.bound

    def __str__(self) -> str:
        return f"{self.metric} {'<=' if self.is_upper else '>='} {self.bound:g}"


@dataclass(frozen=True)
class TrialRecord:
    """One trial.

    Attributes:
        number: Counted from 0.
        name: As the tracker has it.
        run_id: MLflow run, or None where the tracker never had it.
        folder: Its run folder.
        state: Where it stands.
        message: Why it failed, or empty.
        values: Dotted configuration key -> what was tried.
        measures: Metrics of its last epoch, and what is known without training: packed_bytes, bit_ops, latency_ms.
        curve: (epoch, metrics of the run as a whole) of each finished epoch.
        config: Its configuration as plain values; empty where it never had one.
    """

    number: int
    name: str
    run_id: str | None
    folder: RunFolder
    state: TrialState
    message: str
    values: dict[str, Any]
    measures: dict[str, float]
    curve: tuple[tuple[int, dict[str, float]], ...] = ()
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepRecord:
    """A sweep.

    Attributes:
        name: Its name.
        run_id: MLflow run.
        state: As its folder has it: finished, stopped, failed, or running.
        aims: The objectives, the first one foremost.
        limits: The constraints.
        space: Dotted key -> {int | float | log | choice: values}, as configured; empty where it has none.
        keys: The keys that trials differ in by design, in the order of the configuration.
        config: The sweep's configuration as plain values.
        trials: In the order of their numbers.
    """

    name: str
    run_id: str
    state: str
    aims: tuple[Aim, ...]
    limits: tuple[Limit, ...]
    space: dict[str, dict[str, list[Any]]]
    keys: tuple[str, ...]
    config: dict[str, Any]
    trials: tuple[TrialRecord, ...]

    @classmethod
    def read(cls, folder: RunFolder) -> "SweepRecord":
        """Return the sweep in a run folder.

        Raises:
            InvalidInputError: The folder holds no sweep.
        """
        job = folder.load_json("job.json")
        config = job.get("config") or {}
        search = config.get("search")
        if not search:
            raise InvalidInputError(f"{folder.location}: holds no sweep: its job.json has no search.")
        space = {key: domain for key, domain in (search.get("space") or {}).items() if isinstance(domain, dict)}
        places = folder.children("trials")
        trials = tuple(
            sorted((_trial(place, index, space) for index, place in enumerate(places)), key=lambda one: one.number)
        )
        known = dict.fromkeys([*space, *(key for trial in trials for key in trial.values)])
        aims = [
            Aim(aim["metric"], aim.get("mode", "max")) for aim in search.get("objectives") or [{"metric": "val_top1"}]
        ]
        return cls(
            name=str(job.get("name", folder.root.name)),
            run_id=str(job.get("run_id", "")),
            state=str(folder.result().get("status", "running")),
            aims=tuple(aims),
            limits=tuple(Limit.parse(text) for text in search.get("constraints") or ()),
            space=space,
            keys=tuple(known),
            config=config,
            trials=trials,
        )

    def finished(self) -> list[TrialRecord]:
        """Return the trials that came to their end with a finite value of each objective."""
        return [trial for trial in self.trials if trial.state == "finished" and has_all(trial, self.aims)]

    def allowed(self) -> list[TrialRecord]:
        """Return the finished trials that keep the constraints."""
        return [trial for trial in self.finished() if all(limit.holds(trial.measures) for limit in self.limits)]

    def front(self) -> list[TrialRecord]:
        """Return the best trial, or with several objectives the Pareto front, best in the first objective first."""
        return pareto(self.allowed(), self.aims)

    def require_trials(self) -> None:
        """Refuse a sweep that has nothing to report yet.

        Raises:
            InvalidInputError: No trial has finished; the message says what the trials do instead.
        """
        if self.finished():
            return
        counts = ", ".join(f"{number} {state}" for state, number in self.counts().items()) or "none has begun"
        failed = next((trial for trial in self.trials if trial.state == "failed"), None)
        why = f" The first failure, {failed.name}: {failed.message.rstrip('.')}." if failed else ""
        raise InvalidInputError(
            f"{self.name}: no trial has finished, so there is nothing to report ({counts}).{why} "
            f"`dab status {self.run_id[:8] or self.name}` shows how far it is."
        )

    def counts(self) -> dict[str, int]:
        """Return how many trials are in each state, none left out that there is."""
        states = [trial.state for trial in self.trials]
        return {state: states.count(state) for state in dict.fromkeys(states)}


def has_all(trial: TrialRecord, aims: Sequence[Aim]) -> bool:
    """Whether a trial has a finite value of each objective."""
    return all(math.isfinite(trial.measures.get(aim.metric, math.nan)) for aim in aims)


def pareto(trials: Sequence[TrialRecord], aims: Sequence[Aim]) -> list[TrialRecord]:
    """Return the trials that no other one beats: as good in every objective and better in one.

    Of trials that are equal in every objective the first counts. With one objective it is the best trial.

    Args:
        trials: With a finite value of each objective.
        aims: The objectives.

    Returns:
        The best in the first objective first.
    """
    points = {trial.number: tuple(aim.sign * trial.measures[aim.metric] for aim in aims) for trial in trials}
    ordered = sorted(trials, key=lambda trial: (points[trial.number], trial.number))
    front: list[TrialRecord] = []
    for trial in ordered:  # whatever beats it stands before it
        own = points[trial.number]
        if not any(all(a <= b for a, b in zip(points[other.number], own, strict=True)) for other in front):
            front.append(trial)
    return front


def _trial(folder: RunFolder, index: int, space: Mapping[str, Any]) -> TrialRecord:
    told, job, result = folder.load_json("trial.json"), folder.load_json("job.json"), folder.result()
    config = job.get("config") or _config(folder)
    values = told.get("values")
    if values is None:
        values = {key: _leaf(config, key) for key in space if config}
    curve = tuple((int(line["step"]), headline(line["metrics"])) for line in folder.metrics())
    static = {key: float(value) for key, value in (told.get("static") or {}).items() if value is not None}
    state, message = _state(result)
    return TrialRecord(
        number=int(told.get("number", index)),
        name=str(told.get("name") or job.get("name") or folder.root.name),
        run_id=told.get("run_id") or job.get("run_id"),
        folder=folder,
        state=state,
        message=message,
        values=dict(values),
        measures=(curve[-1][1] if curve else {}) | static,
        curve=curve,
        config=config,
    )


def _state(result: Mapping[str, Any]) -> tuple[TrialState, str]:
    status, message = result.get("status"), str(result.get("message") or "")
    if status == "finished":
        return ("stopped early", "") if message == "stopped early" else ("finished", message)
    if status == "failed":
        return "failed", message
    return ("stopped", message) if status == "stopped" else ("running", "")


def _leaf(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _config(folder: RunFolder) -> dict[str, Any]:
    text = folder.load_text("config.yaml")
    found = yaml.safe_load(text) if text else None
    return found if isinstance(found, dict) else {}
