"""What a sweep's folder says: trials of both layouts, the front, the limits, and what a report is refused for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_sweep import write_sweep

from dabnn.errors import InvalidInputError
from dabnn.run_folder import RunFolder
from orchestrator.sweep_importance import importances
from orchestrator.sweep_record import Aim, Limit, SweepRecord, TrialRecord, pareto

UP, DOWN = Aim("a", "max"), Aim("b", "min")


def trial(number: int, **measures: float) -> TrialRecord:
    return TrialRecord(number, f"t{number}", None, RunFolder(Path("nowhere")), "finished", "", {}, measures)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> SweepRecord:
    return SweepRecord.read(write_sweep(tmp_path_factory.mktemp("sweep") / "digits", 45, epochs=8))


def test_trials_are_read_with_values_measures_and_state(record: SweepRecord) -> None:
    assert [one.number for one in record.trials] == list(range(45))
    assert record.counts() == {"stopped early": 8, "finished": 36, "failed": 1}
    first = record.finished()[0]
    assert set(first.values) == set(record.keys) == set(record.space)
    assert first.measures["packed_bytes"] > 0
    assert "layers/02/gap" not in first.measures
    assert record.trials[40].message == "the loss is not finite (epoch 2, step 7)"


def test_a_trial_without_its_file_gets_its_values_from_its_configuration(tmp_path: Path, record: SweepRecord) -> None:
    folder = write_sweep(tmp_path / "old", 3, epochs=8)
    for number, place in enumerate(sorted((tmp_path / "old" / "trials").iterdir())):
        (place / "trial.json").unlink()
        if number == 0:
            config = json.loads((place / "job.json").read_text())["config"]
            (place / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
            (place / "job.json").unlink()
        place.rename(place.with_name(f"ab12_{number:05d}"))
    old = SweepRecord.read(folder)
    assert [one.number for one in old.trials] == [0, 1, 2]
    assert [one.values for one in old.trials] == [pytest.approx(one.values) for one in record.trials[:3]]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=20))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    trials = [trial(number, a=a, b=b) for number, (a, b) in enumerate(points)]

    def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return one[0] >= other[0] and one[1] <= other[1] and one != other

    expected = {point for point in points if not any(beats(other, point) for other in points)}
    front = pareto(trials, [UP, DOWN])
    assert {(one.measures["a"], one.measures["b"]) for one in front} == expected
    assert len(front) == len(expected)


def test_the_front_of_one_objective_is_the_best_trial() -> None:
    assert [one.number for one in pareto([trial(0, a=1), trial(1, a=3), trial(2, a=3)], [UP])] == [1]


def test_a_trial_that_breaks_a_limit_or_measured_nothing_is_not_on_the_front(record: SweepRecord) -> None:
    limited = replace(record, limits=(Limit.parse("packed_bytes <= 26_000"),))
    assert limited.front()
    assert all(one.measures["packed_bytes"] <= 26_000 for one in limited.front())
    nothing = replace(record.trials[1], measures={"val_top1": float("nan"), "packed_bytes": 1.0})
    assert nothing not in replace(record, trials=(*record.trials, nothing)).front()


@pytest.mark.parametrize("text", ["packed_bytes < 3", "packed_bytes <= many", "<= 3", "packed_bytes <= nan"])
def test_a_limit_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match=r"^search\.constraints: .* is no limit"):
        Limit.parse(text)


def test_a_sweep_without_a_finished_trial_says_what_its_trials_do(record: SweepRecord) -> None:
    failed = [replace(one, state="failed", message="disk full.") for one in record.trials[:2]]
    with pytest.raises(
        InvalidInputError, match=r"no trial has finished.*\(2 failed, 1 running\).*digits-t00: disk full\."
    ):
        replace(record, trials=(*failed, replace(record.trials[2], state="running"))).require_trials()
    with pytest.raises(InvalidInputError, match=r"\(none has begun\)"):
        replace(record, trials=()).require_trials()


def test_a_folder_without_a_search_is_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="holds no sweep"):
        SweepRecord.read(RunFolder(tmp_path))


def test_importances_find_what_decides(record: SweepRecord) -> None:
    shares = importances(record)
    assert next(iter(shares)) == "optim.max_lr"
    assert sum(shares.values()) == pytest.approx(1)
    assert importances(replace(record, trials=record.trials[:5])) == {}
