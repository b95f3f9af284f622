"""What a run began with, compared with what it would go on with."""

from dataclasses import replace
from pathlib import Path

import pytest

from dabnn.errors import InvalidInputError
from dabnn.run_folder import RunFolder
from orchestrator.config import Config, load_config, to_yaml
from orchestrator.origin import Origin, begin, check, check_written, expect, load, origin_of

MODEL = ["name=run", "model={name: bincifarfbin, in_channels: 1, num_classes: 10}"]


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("DAB_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def config(digits: Path) -> Config:
    return load_config(None, [*MODEL, f"data.train={digits}"])


@pytest.fixture
def origin(config: Config) -> Origin:
    return origin_of(config)


def test_a_run_goes_on_with_what_it_began_with(origin: Origin, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    begin(folder, origin)
    assert load(folder) == origin
    begin(folder, origin)


def test_where_a_run_goes_on_may_change(config: Config, origin: Origin, digits: Path) -> None:
    moved = [f"data.train={digits}", "cluster.num_workers=1", "train.checkpoint.keep_last=5"]
    check(origin, origin_of(load_config(None, [*MODEL, *moved])))


def test_other_code_or_another_environment_is_told_and_may_be_accepted(
    config: Config, origin: Origin, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    old = replace(origin, code="0123456789abcdef", environment=origin.environment | {"torch": "1.0"})
    begin(folder, old)
    with pytest.raises(InvalidInputError) as refused:
        begin(folder, origin)
    said = str(refused.value)
    assert said.startswith(
        f"code: the program's sources are other ones ({origin.code}, the run began with 0123456789abc"
    )
    assert f"environment: torch is {origin.environment['torch']}, the run began with 1.0" in said
    assert "`dab resume --force`" in said
    with pytest.raises(InvalidInputError, match=r"^code: "):
        expect(folder, config, is_here=True, is_forced=False)
    expect(folder, config, is_here=True, is_forced=True)
    begin(folder, origin)
    assert load(folder) == origin


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"seed": 9}, r"^seed: 1, the run began with 9\. With that it would be another run"),
        ({"data": {"train": "0" * 64, "val": "0" * 64}}, r"^data\.train: has other samples .* it was 000000000000\)"),
        ({"config": {"optim.max_lr": 7.0}}, r"optim\.max_lr: .*, the run began with 7\.0"),
    ],
)
def test_another_seed_other_data_or_another_configuration_is_another_run(
    values: dict[str, object], expected: str, origin: Origin, config: Config, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    begin(folder, replace(origin, **values))  # type: ignore[arg-type]
    for is_forced in (False, True):
        with pytest.raises(InvalidInputError, match=expected):
            expect(folder, config, is_here=True, is_forced=is_forced)


def test_a_configuration_that_somebody_edited_is_refused_by_its_keys(config: Config, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    check_written(folder, config)
    folder.leave("config.yaml", "# a comment\n" + to_yaml(config))
    check_written(folder, config)
    folder.leave("config.yaml", to_yaml(config).replace(" epochs: 100", " epochs: 1"))
    with pytest.raises(InvalidInputError, match=r"config\.yaml: was changed since the run began \(train\.epochs: 1"):
        check_written(folder, config)
    folder.leave("config.yaml", "a: [")
    with pytest.raises(InvalidInputError, match="is no YAML any more"):
        check_written(folder, config)


def test_a_run_that_has_not_begun_has_nothing_to_compare(config: Config, tmp_path: Path) -> None:
    expect(RunFolder(tmp_path), config, is_here=True, is_forced=False)
    assert list(tmp_path.glob("*.json")) == []
