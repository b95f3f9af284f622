import json
import tempfile
from pathlib import Path

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dabnn.errors import InvalidInputError
from orchestrator.config import (
    Config,
    config_schema,
    flatten,
    load_config,
    resolve_paths,
    to_dict,
    to_yaml,
    with_overrides,
)
from orchestrator.config_errors import known_keys

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("**/*.yaml"))
SMALL = ["name=run", "model.name=bincifar", "data.train=shards"]
SEARCH = [*SMALL, "search.space.binarize.bin_start={int: [2, 4]}"]


def refusal(*overrides: str, base: list[str] = SMALL) -> str:
    with pytest.raises(InvalidInputError) as caught:
        load_config(None, [*base, *overrides])
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_three_values_make_a_configuration():
    config = load_config(None, SMALL)
    assert (config.model.name, config.data.train, config.search) == ("bincifar", "shards", None)


def test_defaults_are_those_of_the_contract():
    flat = flatten(load_config(None, SMALL))
    contract = {
        "seed": 1, "model.width": 1.0, "binarize.weights": "dab", "binarize.inputs": "model", "data.batch_size": 256,
        "data.eval_batch_size": 64, "data.num_loaders": 2, "data.remainder": "keep", "optim.name": "adam",
        "optim.max_lr": 5e-4, "optim.min_lr": 1e-5, "optim.weight_decay": 0.0, "optim.momentum": 0.9,
        "optim.nesterov": False, "schedule.name": "decay", "schedule.interval": 50, "schedule.level": 2.0,
        "train.precision": "fp32", "train.init_from": None, "train.checkpoint.every_epochs": 1,
        "train.checkpoint.every_steps": None, "train.checkpoint.keep_last": 2, "train.checkpoint.keep_best": 1,
        "cluster.num_workers": 2, "cluster.gpus_per_worker": 0.0, "cluster.cpus_per_worker": 1.0,
        "cluster.min_workers": None, "cluster.placement": "pack", "cluster.interface": None, "cluster.hang_s": 600.0,
        "cluster.priority": 0, "cluster.wait": False, "cluster.max_failures": 3, "storage": None, "tracking.uri": None,
        "tracking.experiment": "dab",
    }  # fmt: skip
    assert {key: flat[key] for key in contract} == contract


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_loads(path):
    assert load_config(path).name


def test_every_key_has_a_description():
    assert all(field.description for field in known_keys(Config).values())


def test_a_configuration_cannot_be_changed():
    config = load_config(None, SMALL)
    with pytest.raises(ValidationError):
        config.train.epochs = 3


def test_a_later_override_wins_over_an_earlier_one_and_over_the_file(tmp_path):
    path = write(tmp_path, "name: a\nmodel: {name: bincifar}\ndata: {train: d}\ntrain: {epochs: 5}\n")
    assert load_config(path).train.epochs == 5
    assert load_config(path, ["train.epochs=6", "train.epochs=7"]).train.epochs == 7


def test_an_override_of_a_section_replaces_all_of_it():
    config = load_config(None, [*SMALL, "optim.max_lr=1.0", "optim={name: sgd, momentum: 0.5}"])
    assert (config.optim.name, config.optim.momentum, config.optim.max_lr) == ("sgd", 0.5, 5e-4)


def test_the_value_of_an_override_may_hold_an_equals_sign():
    assert load_config(None, [*SMALL, "name=a=b"]).name == "a=b"


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1E-3", 1e-3), ("0.001", 1e-3), ("1.0e-3", 1e-3), (".5", 0.5), ("1_0", 10)]
)
def test_numbers_are_read_as_people_write_them(text, value):
    assert load_config(None, [*SMALL, f"optim.max_lr={text}"]).optim.max_lr == value


@pytest.mark.parametrize("text", ["no", "on", "2026-01-01", "12:30:00", "007", "1.2.3"])
def test_words_that_only_old_yaml_takes_for_something_else_are_text(text):
    assert load_config(None, [*SMALL, f"name={text}"]).name == text


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.epoch=3", "train.epochs"),
        ("epochs=3", "train.epochs"),
        ("lr=3", "optim.max_lr"),
        ("binarise.bin_start=2", "binarize.bin_start"),
        ("train.checkpoint.keep=2", "train.checkpoint.keep_last"),
        ("train.epochs.x=3", "train.epochs"),
        ("search.space.binarize.bin_strat={int: [2, 3]}", "binarize.bin_start"),
        ("model={name: a, widht: 2}", "model.width"),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_one_named(override, nearest):
    key = "model.widht" if override.startswith("model=") else override.partition("=")[0]
    message = refusal(override)
    assert message.startswith(f"{key}: unknown key; did you mean {nearest}?")


def test_an_unknown_key_in_a_file_is_refused_with_its_full_path(tmp_path):
    path = write(tmp_path, "name: a\nmodel: {name: bincifar}\ndata: {train: d}\ntrain: {epoch: 5}\n")
    with pytest.raises(InvalidInputError, match=r"^train\.epoch: unknown key; did you mean train\.epochs\?"):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs=ten", 'train.epochs: "ten" must be a whole number'),
        ("train.epochs=1.5", "train.epochs: 1.5 must be a whole number"),
        ("train.epochs='5'", 'train.epochs: "5" must be a whole number'),
        ("train.epochs=true", "train.epochs: true must be a whole number"),
        ("train.epochs=0", "train.epochs: 0 must be at least 1"),
        ("optim.max_lr='1e-3'", 'optim.max_lr: "1e-3" must be a number'),
        ("optim.max_lr=.nan", "optim.max_lr: NaN must be a finite number"),
        ("optim.nesterov=1", "optim.nesterov: 1 must be true or false"),
        ("model.name=7", "model.name: 7 must be text"),
        ("model.num_classes=many", 'model.num_classes: "many" must be a whole number, or null'),
        ("train=3", "train: 3 must be a mapping of keys"),
        ("binarize.weights=dba", "binarize.weights: \"dba\" must be 'dab', 'dab_warm', 'dab_learned', 'xnor'"),
        ("train.precision=fp16", "train.precision: \"fp16\" must be 'fp32' or 'bf16'"),
        ("cluster.min_workers=0", "cluster.min_workers: 0 must be at least 1, or null"),
        ("cluster.interface='eth 0'", 'cluster.interface: "eth 0" is no name of a network interface'),
        ("cluster.labels={pool: 3}", "cluster.labels.pool: 3 must be text"),
        ("binarize.plan=3", "binarize.plan: 3 must be the name of a file, or {weights: [2, 3]"),
        ("binarize.plan=''", 'binarize.plan: "" names no file'),
        (
            "binarize.plan={wights: [2]}",
            'binarize.plan: {"wights": [2]} has the unknown key wights; did you mean weights?',
        ),
        (
            "binarize.plan={weights: [0]}",
            'binarize.plan: {"weights": [0]} under weights holds 0, and layer numbers start',
        ),
        ("binarize.layers=[2, 3.5]", "binarize.layers: [2, 3.5] holds 3.5, which names no layer; write numbers"),
        ("binarize.layers=[true]", "binarize.layers: [true] holds true, which names no layer; write numbers"),
        ("binarize.layers=['']", 'binarize.layers: [""] holds "", which names no layer; write numbers'),
        ("binarize.layers=[2, 2]", "binarize.layers: [2, 2] names a layer twice"),
        ("schedule.milestones=[5, 3]", "schedule.milestones: [5, 3] must rise"),
        ("train.ema_decay=1", "train.ema_decay: 1 must be less than 1.0, or null"),
        ("train.kurtosis={target: 1}", "train.kurtosis.weight: missing"),
        ("train.stages=[]", "train.stages: [] must be given"),
        ("binarize.inputs=[0]", "binarize.inputs: [0] holds 0, and layer numbers start at 1"),
        ("binarize.inputs=all", 'binarize.inputs: "all" must be model, none or a list of layer numbers'),
        ("binarize.inputs=[2, 2]", "binarize.inputs: [2, 2] names a layer twice"),
        ("binarize.inputs=[]", "binarize.inputs: [] is empty"),
    ],
)
def test_a_wrong_value_is_refused_with_key_value_and_what_is_wanted(override, expected):
    assert refusal(override).startswith(expected)


def test_everything_that_is_missing_or_wrong_is_said_at_once():
    with pytest.raises(InvalidInputError) as caught:
        load_config(None, ["train.epochs=x"])
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["name", "model.name", "data.train", "train.epochs"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["binarize.bin_start=5", "binarize.bin_end=3"], "binarize.bin_end: 3 comes before binarize.bin_start=5"),
        (["data.batch_size=33"], "data.batch_size: 33 is not a multiple of cluster.num_workers=2"),
        (["data.batch_size=2"], "data.batch_size: 2 over 2 workers is one sample each"),
        (["optim.min_lr=1"], "optim.min_lr: 1.0 is above optim.max_lr=0.0005"),
        (["optim.nesterov=true"], "optim.nesterov: has no effect with optim.name=adam"),
        (["optim={name: sgd, nesterov: true, momentum: 0}"], "optim.nesterov: true needs momentum"),
        (["schedule={name: cosine, interval: 9}"], "schedule.interval: has no effect with schedule.name=cosine"),
        (["schedule.warmup_epochs=100"], "schedule.warmup_epochs: 100.0 is all of train.epochs=100"),
        (["cluster.gpus_per_worker=0.5"], "cluster.gpus_per_worker: 0.5 with 2 workers"),
        (["cluster.gpus_per_worker=1.5"], "cluster.gpus_per_worker: 1.5 is neither"),
        (["cluster={num_workers: 0, gpus_per_worker: 1}"], "cluster.num_workers: 0 trains in the job's own process"),
        (["cluster={num_workers: 0, placement: spread}"], "cluster.placement: has no effect with cluster.num_workers"),
        (["cluster.min_workers=3"], "cluster.min_workers: 3 is more than cluster.num_workers=2"),
        (["cluster={num_workers: 0, min_workers: 1}"], "cluster.min_workers: 1 is more than cluster.num_workers=0"),
        (["binarize={gradient: reference, ste: ede}"], "binarize.ste: has no effect with binarize.gradient=reference"),
        (["binarize={gradient: reference, ste_width: 2}"], "binarize.ste_width: has no effect with binarize.gradient"),
        (["binarize={inputs: none, input_ste_width: 2}"], "binarize.input_ste_width: has no effect with binarize.inp"),
        (["binarize={inputs: none, input_quantizer: rsign}"], "binarize.input_quantizer: has no effect with binarize."),
        (["binarize={layers: [], ste_width: 2}"], "binarize.ste_width: has no effect with binarize.layers=[]. Remove"),
    ],
)
def test_values_that_contradict_each_other_are_refused(overrides, expected):
    assert refusal(*overrides).startswith(expected)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_the_batch_sizes_that_a_refusal_proposes_are_accepted(workers):
    for size in range(2, 40):
        try:
            load_config(None, [*SMALL, f"cluster.num_workers={workers}", f"data.batch_size={size}"])
        except InvalidInputError as error:
            proposed = [int(word.rstrip(".")) for word in str(error).rpartition("Use")[2].split() if word[0].isdigit()]
            for better in proposed:
                load_config(None, [*SMALL, f"cluster.num_workers={workers}", f"data.batch_size={better}"])


@pytest.mark.parametrize("name", ["$(touch x)", "a b", "`id`; rm -rf", "наименование", "--name", "x" * 100])
def test_a_run_name_may_be_any_printable_text(name):
    assert load_config(None, [*SMALL, f"name={json.dumps(name)}"]).name == name


@pytest.mark.parametrize("name", ["", "  ", "a/b", "a\\b", "a\nb", "a\tb", "a\x1b[0m", "..", "x" * 101])
def test_a_run_name_that_would_break_a_path_or_a_table_is_refused(name):
    assert refusal(f"name={json.dumps(name)}").startswith("name: ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "holds a list"),
        ("just words", "holds a str"),
        ("name: [1, 2\n", "not valid YAML, line 2, column 1"),
        ("name: a\nname: b\n", "line 1, column 1: the key 'name' stands here twice"),
        ("!!python/object:os.system x", "not valid YAML"),
    ],
)
def test_a_file_that_holds_no_configuration_is_refused_by_name(tmp_path, text, expected):
    path = write(tmp_path, text)
    with pytest.raises(InvalidInputError) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)


def test_a_missing_file_a_folder_and_bytes_are_refused_by_name(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00name")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "bytes"):
        with pytest.raises(InvalidInputError, match=str(path)):
            load_config(path)


@pytest.mark.parametrize("text", ["train.epochs", "=3", " = 3"])
def test_an_override_without_key_or_value_is_refused(text):
    assert refusal(text).startswith(f"--set {text}: needs a key and a value")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("search.space={}", "search.space: {} must be given"),
        ("search.space.optim.max_lr={log: [0, 1]}", "must start above 0"),
        ("search.space.optim.max_lr={log: [1, 0.1]}", "lowest below highest"),
        ("search.space.optim.max_lr={lgo: [1, 2]}", "must be one of {int: [2, 4]}"),
        ("search.space.optim.max_lr={log: [1, 2], int: [1, 2]}", "must be one of {int: [2, 4]}"),
        ("search.space.optim.max_lr={float: [1]}", "must be one of {int: [2, 4]}"),
        ("search.space.optim.max_lr=0.1", "must be one of {int: [2, 4]}"),
        ("search.space.schedule.name={choice: []}", "must offer one value at least"),
        ("search.space.schedule.name={choice: [decay, cosin]}", '"cosin" must be \'decay\''),
        ("search.space.train.epochs={float: [1, 4]}", "search.space.train.epochs: 1.0 must be a whole number"),
        ("search.space.binarize.bin_end={int: [0, 4]}", "search.space.binarize.bin_end: 0 must be at least 1"),
        ("search.space.optim={choice: [1]}", "search.space.optim: unknown key"),
        ("search.space.data.train={choice: [a, b]}", "cannot differ between the trials"),
        ("search.space.cluster.num_workers={int: [1, 2]}", "cannot differ between the trials"),
        ("search.space.data.batch_size={int: [32, 64]}", "a trial could get data.batch_size=33"),
        ("search.space.optim.min_lr={log: [1e-5, 1e-2]}", "a trial could get optim.min_lr=0.01"),
        ("search.space.optim.momentum={float: [0.1, 0.9]}", "optim.momentum: has no effect with optim.name=adam"),
        ("search.objectives=[{metric: val_loss, mode: max}]", "would look for the worst val_loss"),
        ("search.objectives=[{metric: packed_bytes, mode: max}]", "would look for the worst packed_bytes"),
        ("search.objectives=[]", "search.objectives: [] must be given"),
        ("search.objectives=[{metric: val_topp1}]", "no trial logs val_topp1; did you mean val_top1?"),
        ("search.objectives=[{metric: conv2/flips}]", "search.objectives[0].mode: missing"),
        ("search.objectives=[{metric: val_top1}, {metric: val_top1}]", "val_top1 stands there twice"),
        ("search.objectives=[{metric: packed_bytes}]", "search.early_stop: asha judges trials epoch by epoch"),
        ("search.constraints=[packed_bytes < 3]", "must be a metric, <= or >=, and a number"),
        ("search.constraints=[packedbytes <= 3]", "no trial logs packedbytes; did you mean packed_bytes?"),
        ("search.algorithm=nsga3", "'random', 'grid', 'nsga2', 'gp' or 'cmaes'"),
        ("search.algorithm=cmaes", "cmaes needs two keys at least"),
        ("search={algorithm: cmaes, space: {seed: {int: [2, 3]}, schedule.name: {choice: [decay, cosine]}}}",
         "search.space.schedule.name: cmaes draws numbers from ranges, and a choice has none"),
        ("search={algorithm: cmaes, objectives: [{metric: val_top1},{metric: val_loss}], space: {seed: {int: [2, 3]}}}",
         "improves one objective"),
        ("search.early_stop=pbt", "search.early_stop: \"pbt\" must be 'asha' or 'median', or null"),
        ("search={early_stop: none, grace_epochs: 3, space: {binarize.bin_start: {int: [2, 3]}}}",
         "search.grace_epochs: has no effect"),
        ("search.max_gpu_hours=1", "with cluster.gpus_per_worker=0 trials use no GPU"),
        ("search.preset=refrence", "search.preset: \"refrence\" must be 'reference' or 'quick', or null"),
        ("search={space: {schedule.name: {choice: [cosine, linear]}, schedule.interval: {int: [2, 9]}}}",
         "search.space.schedule.interval: has no effect with any schedule.name of the space (\"cosine\", \"linear\")"),
        ("search.space.schedule.name={choice: [step, cosine]}", "schedule.milestones: missing"),
        ("search.space.schedule.milestones={choice: [[3, 2]]}", "must rise from each to the next"),
        ("search.space.binarize.layers={subset: [2, 2]}", "none of them twice"),
        ("search.space.binarize.layers={subset: [2, 3]}", "already chose the layers"),
        ("search.space.binarize.plan={choice: [{weight: [2]}]}", "has the unknown key weight"),
        ("search.space.optim.max_lr={subset: [2, 3]}", "search.space.optim.max_lr: [2, 3] must be a number"),
    ],
)  # fmt: skip
def test_a_search_that_cannot_be_run_is_refused_before_its_first_trial(override, expected):
    assert expected in refusal(override, base=SEARCH)


def test_a_grid_is_refused_over_a_continuous_range_or_with_more_points_than_trials():
    grid = [*SEARCH, "search.algorithm=grid"]
    assert "a grid visits each" in refusal("search.space.optim.max_lr={log: [1e-4, 1e-2]}", base=grid)
    assert "the 3 points of the grid" in refusal("search.num_trials=2", base=grid)
    pairs = ["search.space.binarize.bin_end={int: [3, 5]}", "search.num_trials=8"]
    assert load_config(None, [*grid, *pairs]).search.num_trials == 8, "of 9 pairs, (4, 3) leaves no layer"


def test_overlapping_layer_ranges_are_fine_while_each_start_leaves_an_end():
    ranges = ["search.space.binarize.bin_start={int: [2, 6]}"]
    assert load_config(None, [*SMALL, *ranges, "search.space.binarize.bin_end={int: [4, 6]}"]).search
    assert "bin_start=6" in refusal(*ranges, "search.space.binarize.bin_end={int: [4, 5]}")
    assert "bin_start=5" in refusal(*ranges, "search.space.binarize.bin_end={choice: [4, 6]}")


def test_a_searched_schedule_may_carry_the_values_of_one_of_its_choices():
    overrides = ["schedule={name: cosine, interval: 5}", "search.space.schedule.name={choice: [decay, cosine]}"]
    config = load_config(None, [*SMALL, *overrides])
    trial = with_overrides(config.model_copy(update={"search": None}), {"schedule.name": "cosine"})
    assert (trial.schedule.name, trial.schedule.interval) == ("cosine", 5)


def test_a_domain_says_its_kind_and_values():
    config = load_config(None, [*SEARCH, "search.space.optim.max_lr={log: [1e-4, 1]}"])
    space = config.search.space
    assert (space["binarize.bin_start"].kind, space["binarize.bin_start"].values) == ("int", (2, 4))
    assert (space["optim.max_lr"].kind, space["optim.max_lr"].values) == ("log", (1e-4, 1.0))


def test_none_is_another_word_for_no_early_stop():
    assert load_config(None, [*SEARCH, "search.early_stop=none"]).search.early_stop is None
    assert load_config(None, [*SEARCH, "search.early_stop=null"]).search.early_stop is None


def test_several_objectives_let_each_trial_finish_unless_it_is_written():
    both = "objectives: [{metric: val_top1}, {metric: packed_bytes}]"
    space = "space: {seed: {int: [1, 9]}}"
    search = load_config(None, [*SMALL, f"search={{{both}, {space}}}"]).search
    assert (search.early_stop, [goal.mode for goal in search.objectives]) == (None, ["max", "min"])
    assert load_config(None, [*SMALL, f"search={{{both}, {space}, early_stop: asha}}"]).search.early_stop == "asha"


def test_a_constraint_says_metric_side_and_limit():
    search = load_config(None, [*SEARCH, "search.constraints=['packed_bytes <= 300_000', 'val_top1>=9.5e1']"]).search
    smaller, better = search.limits
    assert (smaller.metric, smaller.excess(300_000), smaller.excess(330_000)) == ("packed_bytes", 0.0, 0.1)
    assert (better.limit, better.excess(90.0) > 0, better.excess(96.0) < 0) == (95.0, True, True)


def test_new_values_are_validated_against_the_rest():
    config = load_config(None, SMALL)
    assert with_overrides(config, {"train.epochs": 3, "binarize.inputs": [2, 3]}).binarize.inputs == (2, 3)
    with pytest.raises(InvalidInputError, match="comes before"):
        with_overrides(config, {"binarize.bin_start": 5, "binarize.bin_end": 2})
    with pytest.raises(InvalidInputError, match="unknown key"):
        with_overrides(config, {"train.epoch": 3})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_yaml_and_json_of_a_configuration_read_back_as_the_same(path, tmp_path):
    config = load_config(path)
    assert load_config(write(tmp_path, to_yaml(config))) == config
    assert Config.model_validate_json(json.dumps(to_dict(config))) == config


PRINTABLE = st.text(st.characters(categories=("L", "N", "P", "S"), exclude_characters="/\\"), min_size=1, max_size=100)


@given(
    st.floats(min_value=1e-300, max_value=1e300), st.integers(1, 2**31), PRINTABLE.filter(lambda text: text[0] != ".")
)
@example(1.0, 1, "0E0")
@settings(deadline=None)
def test_any_accepted_value_survives_yaml(rate, epochs, name):
    config = with_overrides(load_config(None, SMALL), {"optim.max_lr": rate, "optim.min_lr": 0, "name": name})
    config = with_overrides(config, {"train.epochs": epochs})
    with tempfile.TemporaryDirectory() as folder:
        assert load_config(write(Path(folder), to_yaml(config))) == config


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_schema_describes_every_example(path):
    jsonschema.validate(to_dict(load_config(path)), config_schema())


def test_flatten_has_one_plain_value_for_each_leaf():
    flat = flatten(load_config(None, [*SEARCH, "binarize.inputs=[2, 3]"]))
    assert flat["binarize.inputs"] == "[2, 3]"
    assert flat["search.space.binarize.bin_start.int"] == "[2, 4]"
    assert all(value is None or isinstance(value, str | int | float | bool) for value in flat.values())


def test_relative_folders_become_absolute_and_val_is_train_unless_given(tmp_path):
    config = resolve_paths(load_config(None, [*SMALL, "storage=runs"]), tmp_path)
    assert (config.data.train, config.data.val) == (str(tmp_path / "shards"), str(tmp_path / "shards"))
    assert config.storage == str(tmp_path / "runs")
    other = resolve_paths(load_config(None, [*SMALL, "data.val=../v", "storage=s3://bucket/runs"]), tmp_path / "x")
    assert (other.data.val, other.storage) == (str(tmp_path / "v"), "s3://bucket/runs")
