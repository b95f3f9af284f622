"""Each schedule against its closed form, written again here."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dabnn.errors import InvalidInputError
from dabnn.schedules import Schedule, learning_rate

EPOCHS = np.linspace(0, 100, 401)
NAMES = ["decay", "cosine", "linear", "constant", "one_cycle"]


def rates(schedule: Schedule) -> np.ndarray:
    return np.array([learning_rate(schedule, epoch) for epoch in EPOCHS])


def make(name: str, **options: Any) -> Schedule:
    return Schedule(name, **{"max_lr": 0.5, "min_lr": 0.01, "epochs": 100} | options)


def test_decay_divides_at_each_interval_and_stops_at_the_lowest_rate() -> None:
    expected = np.maximum(0.5 / 2.0 ** np.floor(EPOCHS / 15), 0.01)
    np.testing.assert_allclose(rates(make("decay", interval=15, level=2)), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("epoch", "rate"), [(0, 5e-4), (49, 5e-4), (50, 2.5e-4), (100, 1.25e-4), (299, 1.5625e-5), (300, 1e-5), (599, 1e-5)]
)
def test_decay_gives_the_rates_of_the_reference_runs(epoch: int, rate: float) -> None:
    schedule = Schedule("decay", max_lr=5e-4, min_lr=1e-5, epochs=600, interval=50, level=2)
    assert learning_rate(schedule, epoch) == pytest.approx(rate, rel=1e-12)


def test_decay_far_beyond_the_smallest_number_is_the_lowest_rate() -> None:
    assert learning_rate(make("decay", interval=0.01), 100) == 0.01


def test_step_divides_at_each_milestone_counted_with_warm_up_and_stops_at_the_lowest_rate() -> None:
    expected = np.maximum(0.5 / 5.0 ** np.searchsorted([30, 60.5, 90], EPOCHS, side="right"), 0.01)
    np.testing.assert_allclose(rates(make("step", milestones=(30, 60.5, 90), level=5)), expected, rtol=1e-12)
    warm = rates(make("step", milestones=(30, 60.5, 90), level=5, warmup_epochs=10))
    np.testing.assert_allclose(warm, np.where(EPOCHS < 10, 0.5 * EPOCHS / 10, expected), rtol=1e-12)


def test_milestones_that_do_not_rise_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"^schedule\.milestones: "):
        make("step", milestones=(60, 30))


def test_cosine_falls_from_highest_to_lowest() -> None:
    expected = 0.01 + 0.5 * 0.49 * (1 + np.cos(np.pi * EPOCHS / 100))
    np.testing.assert_allclose(rates(make("cosine")), expected, rtol=1e-12)


def test_linear_falls_from_highest_to_lowest() -> None:
    np.testing.assert_allclose(rates(make("linear")), np.interp(EPOCHS, [0, 100], [0.5, 0.01]), rtol=1e-12)


def test_constant_stays() -> None:
    assert set(rates(make("constant"))) == {0.5}


def test_one_cycle_rises_for_three_tenths_and_falls() -> None:
    rise = 0.255 - 0.245 * np.cos(np.pi * EPOCHS / 30)
    fall = 0.255 + 0.245 * np.cos(np.pi * (EPOCHS - 30) / 70)
    np.testing.assert_allclose(rates(make("one_cycle")), np.where(EPOCHS < 30, rise, fall), rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_rises_from_zero_to_where_the_schedule_starts(name: str) -> None:
    warm, cold = make(name, warmup_epochs=8), make(name, epochs=92)
    start = learning_rate(cold, 0)
    assert learning_rate(warm, 0) == 0
    assert learning_rate(warm, 2) == pytest.approx(start / 4)
    assert learning_rate(warm, 7.999) == pytest.approx(start, rel=1e-3)
    for epoch in (8, 30.5, 99):
        assert learning_rate(warm, epoch) == learning_rate(cold, epoch - 8)


@pytest.mark.parametrize("name", ["cosine", "linear", "one_cycle"])
def test_the_run_ends_at_the_lowest_rate_and_stays_there(name: str) -> None:
    for epoch in (100, 130):
        assert learning_rate(make(name), epoch) == pytest.approx(0.01)


@given(
    st.sampled_from(NAMES), st.floats(0, 150), st.floats(0, 99), st.floats(0.01, 99, allow_nan=False), st.floats(1, 100)
)
def test_after_warm_up_the_rate_stays_between_its_bounds(
    name: str, epoch: float, warmup: float, interval: float, level: float
) -> None:
    schedule = make(name, warmup_epochs=warmup, interval=interval, level=level)
    rate = learning_rate(schedule, epoch)
    assert rate <= 0.5 * (1 + 1e-12)
    assert rate >= (0 if epoch < warmup else 0.01 * (1 - 1e-12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cosin"}, r"^schedule\.name: 'cosin' .*Did you mean 'cosine'"),
        ({"max_lr": 0.0}, r"^optim\.max_lr: 0\.0"),
        ({"max_lr": math.nan}, r"^optim\.max_lr: nan"),
        ({"min_lr": 0.6}, r"^optim\.min_lr: 0\.6 must lie in 0 \.\. 0\.5"),
        ({"epochs": 0}, r"^train\.epochs: 0"),
        ({"interval": 0}, r"^schedule\.interval: 0"),
        ({"level": 0.5}, r"^schedule\.level: 0\.5"),
        ({"warmup_epochs": 100}, r"^schedule\.warmup_epochs: 100 must lie below the 100 epochs"),
    ],
)
def test_values_that_give_no_schedule_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Schedule(**{"name": "decay", "max_lr": 0.5, "min_lr": 0.01, "epochs": 100} | options)
