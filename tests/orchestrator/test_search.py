import json
from typing import Any

from orchestrator.config import Config, Search, load_config
from orchestrator.config_space import END, START
from orchestrator.search import grace_epochs, judged_metric, network_metrics, trial_config, wants_latency

BASE = ["name=run", "model.name=bincifar", "model.num_classes=10", "data.train=shards", "train.epochs=40"]
SPACE: dict[str, Any] = {
    "optim.max_lr": {"log": [1e-4, 1e-2]},
    END: {"int": [2, 7]},
    START: {"int": [2, 7]},
    "schedule.name": {"choice": ["decay", "cosine"]},
    "optim.weight_decay": {"float": [0.0, 0.1]},
}


def config(space: dict[str, Any], **search: Any) -> Config:
    values = {"space": space, "num_trials": 100, **search}
    return load_config(None, [*BASE, f"search={json.dumps(values)}"])


def search_of(space: dict[str, Any], **values: Any) -> Search:
    search = config(space, **values).search
    assert search is not None
    return search


def test_a_trial_has_no_search_and_its_own_number_of_epochs() -> None:
    space = {START: {"int": [2, 3]}}
    assert trial_config(config(space, epochs=6)).train.epochs == 6
    assert trial_config(config(space)).train.epochs == 40
    assert trial_config(config(space)).search is None


def test_the_cost_of_a_network_is_known_without_training() -> None:
    few, many = (network_metrics(config(SPACE), {START: 2, END: end}) for end in (2, 6))
    assert many["packed_bytes"] < few["packed_bytes"]
    assert (
        network_metrics(config(SPACE), {START: 2, END: 6, "binarize.inputs": [2, 3]})["bit_ops"] > few["bit_ops"] == 0
    )
    assert network_metrics(config(SPACE), {START: 99}) == {}


def test_no_trial_is_judged_in_its_first_quarter_nor_before_the_third_epoch() -> None:
    space = {START: {"int": [2, 3]}}
    assert [grace_epochs(search_of(space), epochs) for epochs in (40, 6)] == [10, 3]
    assert grace_epochs(search_of(space, grace_epochs=4), 40) == 4


def test_trials_are_judged_by_the_first_objective_that_is_logged_each_epoch() -> None:
    space, sizes = {START: {"int": [2, 3]}}, [{"metric": "packed_bytes"}, {"metric": "bit_ops"}]
    assert judged_metric(search_of(space, objectives=[*sizes, {"metric": "val_loss"}])) == ("val_loss", "min")
    assert judged_metric(search_of(space, objectives=sizes, early_stop=None)) is None


def test_latency_is_measured_where_something_asks_for_it() -> None:
    space = {START: {"int": [2, 3]}}
    assert not wants_latency(search_of(space))
    assert wants_latency(search_of(space, objectives=[{"metric": "latency_ms"}, {"metric": "val_top1"}]))
    assert wants_latency(search_of(space, constraints=["latency_ms <= 2"]))
