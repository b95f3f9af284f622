"""The memory of a sweep: which points were proposed and what came of them; proposes the next one.

It lies in one file of JSON lines, an Optuna journal, of which this module is the only reader and writer. A point is in
the file as a whole or not at all, and so is its end: a driver that dies at any moment leaves nothing half done. Each
point is drawn by a fresh sampler seeded by (seed, number) that is shown the points before, so the same history gives
the same point, whether or not the sweep was resumed in between.

Left out: running trials, measuring, stopping early.
"""

import fcntl
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial

from dabnn.errors import DabError, InvalidInputError
from orchestrator.config_errors import show
from orchestrator.config_search import Search
from orchestrator.points import draw, grid, parameters

FILE = "study.jsonl"
_NAME = "sweep"
# A point that was tried or breaks a constraint of its network is drawn again: by the sampler, then evenly.
_SAMPLER_DRAWS, _EVEN_DRAWS = 8, 500
_POPULATION = 20  # of NSGA-II; Optuna's 50 would be one generation of a small sweep
_DIRECTIONS = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
_STATES = {
    TrialState.RUNNING: "running", TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """What a trial tries.

    Attributes:
        number: Of the trial, counted from 0.
        values: Dotted configuration key -> value.
    """

    number: int
    values: dict[str, Any]


@dataclass(frozen=True)
class StudyTrial:
    """What the study knows of a trial.

    Attributes:
        number: Counted from 0.
        values: Dotted configuration key -> value.
        metrics: All that was told, with what is known of the network.
        state: How far it is; `pruned`: ended early.
        reason: Why it failed, or "".
    """

    number: int
    values: dict[str, Any]
    metrics: dict[str, float]
    state: Literal["running", "finished", "pruned", "failed"]
    reason: str = ""


class Study:
    """The points of one sweep, in a file; one process at a time may write.

    Use `open` in the driver of the sweep, `read` elsewhere.
    """

    def __init__(self, storage: JournalStorage, static: Callable[[dict[str, Any]], Mapping[str, float]]) -> None:
        self._storage, self._static = storage, static
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._journal = optuna.load_study(
                study_name=_NAME, storage=storage, sampler=optuna.samplers.RandomSampler()
            )
        attributes = self._journal.user_attrs
        self._search, self._seed = Search.model_validate_json(json.dumps(attributes["search"])), attributes["seed"]
        self._start: list[dict[str, Any]] = attributes["start"]
        self._optimizer: dict[str, Any] = {}

    @classmethod
    def open(
        cls,
        path: Path,
        search: Search,
        seed: int,
        *,
        start: Sequence[Mapping[str, Any]] = (),
        static: Callable[[dict[str, Any]], Mapping[str, float]] = lambda _: {},
    ) -> "Study":
        """Create the study in a file, or continue the one that is there.

        Args:
            path: The file; its folder exists.
            search: The section of the configuration. A study goes on with other numbers of trials, limits and budgets.
            seed: Of the configuration.
            start: Points that are tried first, whole or in part; what the space does not hold is drawn. Only looked at
                when the study is created.
            static: Returns what is known of the network of a point without training it, such as packed_bytes.

        Raises:
            InvalidInputError: The study is of another space, algorithm, seed or other objectives; says what changed.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        _cut_torn_line(path)
        storage = _storage(path)
        directions = [_DIRECTIONS[objective.mode] for objective in search.objectives]
        journal = optuna.create_study(study_name=_NAME, storage=storage, directions=directions, load_if_exists=True)
        found, given = journal.user_attrs, {"search": search.model_dump(mode="json"), "seed": seed}
        if "search" in found:
            _check_same(found, given)
        if "start" not in found:  # written first: a study that has a search is whole
            journal.set_user_attr("start", [parameters_of(search, point) for point in start])
        if found.get("search") != given["search"] or "seed" not in found:
            journal.set_user_attr("seed", seed)
            journal.set_user_attr("search", given["search"])
        return cls(storage, static)

    @classmethod
    def read(cls, path: Path) -> "Study":
        """Return the study in a file, to look at; its driver may be writing.

        Raises:
            InvalidInputError: There is none.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        if not path.is_file() or not path.stat().st_size:
            raise InvalidInputError(f"{path}: no such study. A sweep writes it when it starts.")
        return cls(_storage(path), lambda _: {})

    @property
    def search(self) -> Search:
        """The section of the configuration that the study is of."""
        return self._search

    def ask(self) -> Point | None:
        """Return the next point to try; None when `num_trials` were asked for, or every point of the space was.

        Raises:
            DabError: No point of the space meets the constraints on the network.
        """
        trials = self._journal.get_trials(deepcopy=False)
        if len(trials) >= self._search.num_trials:
            return None
        known = {_text(trial.user_attrs["values"]) for trial in trials}
        refused: list[str] = []
        for proposed in self._proposals(trials):
            if _text(proposed.values) in known:
                continue
            static = dict(self._static(proposed.values))
            broken = [text for text, excess in self._excesses(static).items() if excess is not None and excess > 0]
            if broken:
                refused.append(f"{broken[0]} (it has {static})")
                continue
            self._journal.add_trial(
                create_trial(
                    state=TrialState.RUNNING,
                    params=proposed.params,
                    distributions=proposed.distributions,
                    user_attrs={"values": proposed.values, "static": static},
                    system_attrs=proposed.attributes,
                )
            )
            return Point(len(trials), proposed.values)
        if refused and not trials:
            raise DabError(
                f"search.constraints: none of {len(refused)} points drawn from the space meets them, the last one not "
                f"{refused[-1]}. Widen the space, or loosen the limit."
            )
        return None

    def again(self) -> list[Point]:
        """Return the points that were asked for and whose end was never told, as the driver died."""
        return [Point(trial.number, trial.values) for trial in self.trials() if trial.state == "running"]

    def tell(self, number: int, metrics: Mapping[str, float] | None, is_pruned: bool = False, reason: str = "") -> None:
        """Keep how a trial ended; a trial whose end is known already is left as it is.

        Args:
            number: Of the trial.
            metrics: Of its last epoch, and what was measured of its network; None when it failed.
            is_pruned: Whether it was ended early.
            reason: Why it failed.

        Raises:
            DabError: No such trial was asked for.
        """
        trials = self._journal.get_trials(deepcopy=False)
        if not 0 <= number < len(trials):
            raise DabError(f"trial {number}: never asked for; the study has {len(trials)} trials.")
        trial = trials[number]
        if trial.state.is_finished():
            return
        told = trial.user_attrs["static"] | dict(metrics or {})
        problem = (reason or "failed") if metrics is None else "" if is_pruned else self._problem(told)
        attributes: dict[str, Any] = {"metrics": told} | ({"reason": problem} if problem else {})
        identity = self._storage.get_trial_id_from_study_id_trial_number(
            self._storage.get_study_id_from_name(_NAME), number
        )
        for key, value in attributes.items():
            self._storage.set_trial_user_attr(identity, key, value)
        if problem or is_pruned:
            state, values = TrialState.FAIL if problem else TrialState.PRUNED, None
        else:
            state, values = TrialState.COMPLETE, self._objectives(told)
        self._storage.set_trial_state_values(identity, state, values)

    def trials(self) -> list[StudyTrial]:
        """Return every trial that was asked for, in order."""
        return [_seen(trial) for trial in self._journal.get_trials(deepcopy=False)]

    def front(self) -> list[int]:
        """Return the numbers of the best trials that finished and meet the constraints.

        With one objective that is one trial, the first of equals; with several, those that no other one is at least as
        good as in each and better in one.
        """
        scores = {}
        for trial in self.trials():
            excesses = self._excesses(trial.metrics).values()
            if trial.state == "finished" and all(excess is not None and excess <= 0 for excess in excesses):
                scores[trial.number] = self._scores(trial.metrics)
        if len(self._search.objectives) == 1:
            return [max(scores, key=lambda number: scores[number])] if scores else []
        return [number for number, own in scores.items() if not any(_dominates(o, own) for o in scores.values())]

    def _proposals(self, trials: Sequence[FrozenTrial]) -> Iterator["_Proposal"]:
        space, number = self._search.space, len(trials)
        if number < len(self._start):
            yield self._drawn(self._scratch(trials, self._sampler(number)), self._start[number])
        if self._search.algorithm == "grid":
            for values in grid(space):
                trial = FixedTrial(parameters(space, values))
                draw(trial, space)
                yield _Proposal(values, trial.params, trial.distributions)
            return
        if self._search.algorithm == "cmaes":
            self._advance(trials)
        scratch = self._scratch(trials, self._sampler(number))
        for _ in range(_SAMPLER_DRAWS):
            yield self._drawn(scratch)
        scratch.sampler = optuna.samplers.RandomSampler(seed=_seed(self._seed, number))
        for _ in range(_EVEN_DRAWS):
            yield self._drawn(scratch)

    def _drawn(self, scratch: optuna.Study, fixed: Mapping[str, Any] | None = None) -> "_Proposal":
        """Draw one point in a study in memory, where it counts as failed, so that samplers pass it by."""
        if fixed is not None:
            scratch.enqueue_trial(dict(fixed))
        trial = scratch.ask()
        values = draw(trial, self._search.space)
        frozen = scratch.get_trials(deepcopy=False)[-1]
        kept = {key: value for key, value in frozen.system_attrs.items() if key.endswith("generation")}
        optimizer = {key: value for key, value in frozen.system_attrs.items() if key.startswith("cma:optimizer")}
        scratch.tell(trial, state=TrialState.FAIL)
        return _Proposal(values, dict(frozen.params), dict(frozen.distributions), kept, optimizer)

    def _scratch(self, trials: Sequence[FrozenTrial], sampler: BaseSampler) -> optuna.Study:
        """Return the study in memory, for a sampler to look at and to draw from; nothing of that is kept by itself."""
        scratch = optuna.create_study(directions=self._journal.directions, sampler=sampler)
        finished = [trial.number for trial in trials if trial.state == TrialState.COMPLETE]
        for trial in trials:
            scratch.add_trial(self._shown(trial, self._optimizer if trial.number == max(finished, default=-1) else {}))
        return scratch

    def _shown(self, trial: FrozenTrial, attributes: Mapping[str, Any]) -> FrozenTrial:
        """Return a trial as a sampler sees it: with its constraints, and where it was ended early."""
        state, metrics = trial.state, trial.user_attrs.get("metrics", {})
        values = trial.values if state == TrialState.COMPLETE else None
        steps: dict[int, float] = {}
        if state == TrialState.PRUNED:
            objective = self._search.objectives[0].metric
            if len(self._search.objectives) == 1 and math.isfinite(metrics.get(objective, math.nan)):
                steps = {int(metrics.get("epoch", 0)): float(metrics[objective])}
            else:
                state = TrialState.FAIL
        excesses = self._excesses(metrics) if state in (TrialState.COMPLETE, TrialState.PRUNED) else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return create_trial(
                state=state,
                values=values,
                params=trial.params,
                distributions=trial.distributions,
                system_attrs=trial.system_attrs | dict(attributes),
                intermediate_values=steps,
                constraints={text: 0.0 if excess is None else excess for text, excess in excesses.items()},
            )

    def _sampler(self, number: int) -> BaseSampler:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return make_sampler(self._search, _seed(self._seed, number))

    def _advance(self, trials: Sequence[FrozenTrial]) -> None:
        """Bring the optimizer of CMA-ES up to the last whole generation.

        Optuna keeps it as a pickle in the study; here it is computed from the trials and stays in memory, since a file
        that others may write to must not hold pickles.
        """
        while True:
            proposal = self._drawn(self._scratch(trials, self._sampler(len(trials))))
            if not proposal.optimizer:
                return
            self._optimizer = proposal.optimizer

    def _objectives(self, metrics: Mapping[str, float]) -> list[float]:
        return [float(metrics[objective.metric]) for objective in self._search.objectives]

    def _scores(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """Return the objectives, more is better."""
        signs = [1.0 if objective.mode == "max" else -1.0 for objective in self._search.objectives]
        return tuple(sign * value for sign, value in zip(signs, self._objectives(metrics), strict=True))

    def _excesses(self, metrics: Mapping[str, float]) -> dict[str, float | None]:
        """Return constraint -> by how much it is broken, 0 or less when it is not, None where its metric is unknown."""
        limits = zip(self._search.constraints, self._search.limits, strict=True)
        return {
            text: limit.excess(metrics[limit.metric]) if limit.metric in metrics else None for text, limit in limits
        }

    def _problem(self, metrics: Mapping[str, float]) -> str:
        """Return why the metrics of a trial say nothing, or ""."""
        wanted = [("objective", objective.metric) for objective in self._search.objectives]
        wanted += [("constraint", limit.metric) for limit in self._search.limits]
        for what, metric in wanted:
            if metric not in metrics:
                return f"{metric}: the trial did not log this {what}, only {', '.join(sorted(metrics)) or 'nothing'}."
            if not math.isfinite(metrics[metric]):
                return f"{metric}: {metrics[metric]} is no finite number."
        return ""


@dataclass(frozen=True)
class _Proposal:
    values: dict[str, Any]
    params: dict[str, Any]
    distributions: dict[str, BaseDistribution]
    attributes: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


def make_sampler(search: Search, seed: int) -> BaseSampler:
    """Return Optuna's sampler for a search, other than over a grid."""
    if search.algorithm == "tpe":
        startup = max(3, min(10, search.num_trials // 3))
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)
    if search.algorithm == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=_POPULATION)
    if search.algorithm == "gp":
        return optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False)
    if search.algorithm == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    return optuna.samplers.RandomSampler(seed=seed)


def parameters_of(search: Search, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a point that the space of a search holds, as parameters of an Optuna trial."""
    return parameters(search.space, values)


def _check_same(found: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    old, new = found["search"], given["search"]
    changed = [f"seed: was {found['seed']}, is {given['seed']}"] if found["seed"] != given["seed"] else []
    for key in ("objectives", "algorithm"):
        if old[key] != new[key]:
            changed.append(f"search.{key}: was {show(old[key])}, is {show(new[key])}")
    for key in sorted(old["space"].keys() | new["space"].keys()):
        before, after = old["space"].get(key), new["space"].get(key)
        if before != after:
            was, now = (show(domain) if domain else "not searched" for domain in (before, after))
            changed.append(f"search.space.{key}: was {was}, is {now}")
    if changed:
        lines = "\n".join(changed)
        raise InvalidInputError(
            f"{lines}\nThe trials so far were of the search as it was. Change it back, or start a new sweep with "
            "search.start_from naming this one."
        )


class _FileLock:
    """A lock that ends with its process; Optuna's own stays behind when the process is killed."""

    def __init__(self, path: Path) -> None:
        self._path, self._descriptor = path, -1

    def acquire(self) -> bool:
        self._descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        os.close(self._descriptor)


def _storage(path: Path) -> JournalStorage:
    lock: Any = _FileLock(path.with_name(f".{path.name}.lock"))  # Optuna exports no base class for locks
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _cut_torn_line(path: Path) -> None:
    """Take away the end of a line that a killed writer left; what it said was never acted on."""
    if path.is_file() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


def _seen(trial: FrozenTrial) -> StudyTrial:
    attributes = trial.user_attrs
    metrics = attributes.get("metrics", attributes["static"])
    state: Any = _STATES[trial.state]
    return StudyTrial(trial.number, attributes["values"], metrics, state, attributes.get("reason", ""))


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4])
