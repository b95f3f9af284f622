"""What a user may choose: every configuration key with its meaning, unit, limits and default.

`load_config` reads YAML and `--set` overrides into a frozen `Config`. Every value either works or is refused here: a
key that this version does not implement is not a key. Combinations of keys are judged in `orchestrator.config_rules`,
messages are worded in `orchestrator.config_errors`, text is read in `orchestrator.config_source`. Whether a model of
that name exists and has that many layers is the business of `dabnn.models.build`. Rank, device and handles are never
here.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, model_validator

from dabnn.data.location import Location
from dabnn.errors import InvalidInputError
from orchestrator.config_errors import invalid_config, leaf_keys
from orchestrator.config_rules import STAGE_TEACHER, check_config, check_name, check_written, unused
from orchestrator.config_search import Scalar, Search
from orchestrator.config_sections import (
    Binarize,
    Cluster,
    Data,
    Model,
    Optim,
    Schedule,
    Section,
    Stage,
    Tracking,
    Train,
)
from orchestrator.config_source import assign, parse_override, read_mapping, yaml_text
from orchestrator.config_stages import overlaid, place
from orchestrator.space_presets import expanded


class Config(Section):
    """One run, or one search, as the user asked for it."""

    name: Annotated[str, AfterValidator(check_name)] = Field(
        description="name of the run: printable text without slashes"
    )
    seed: int = Field(default=1, ge=0, lt=2**32, description="decides first weights, sample order and augmentation")
    model: Model = Field(description="which network")
    binarize: Binarize = Field(default=Binarize(), description="which layers are binary, and how")
    data: Data = Field(description="samples and batches")
    optim: Optim = Field(default=Optim(), description="the optimizer")
    schedule: Schedule = Field(default=Schedule(), description="the learning rate over time")
    train: Train = Field(default=Train(), description="the training loop")
    cluster: Cluster = Field(default=Cluster(), description="what the run takes from the cluster")
    storage: str | None = Field(
        default=None, min_length=1, description="folder, network path or URL for checkpoints; null: under DAB_HOME"
    )
    tracking: Tracking = Field(default=Tracking(), description="where runs are recorded")
    search: Search | None = Field(default=None, description="what `dab submit --sweep` tries; null: nothing to search")

    @model_validator(mode="after")
    def _check(self) -> "Config":
        check_config(self)
        for position, stage in enumerate(self.train.stages or ()):
            try:
                stage_config(self, stage)
            except InvalidInputError as error:
                where = place(position, stage)
                raise ValueError("\n".join(where + line for line in str(error).splitlines())) from None
        return self


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Return the validated configuration.

    Args:
        path: YAML file, or None to start from the defaults alone.
        overrides: `key=value` texts, `key` dotted and `value` YAML. Each is an assignment: it replaces what stood at
            that key, a whole section too, and a later one wins.

    Raises:
        InvalidInputError: The file is missing or no YAML mapping, a key is unknown, a value is of the wrong type or out
            of its limits, or values contradict each other.
    """
    raw = {} if path is None else read_mapping(path)
    for text in overrides:
        key, value = parse_override(text)
        assign(Config, raw, key, value)
    config = _validate(raw)
    try:
        check_written(config, [part for _, part in parts(config)])
    except ValueError as error:
        raise InvalidInputError(str(error)) from None
    return config


def with_overrides(config: Config, values: Mapping[str, Any]) -> Config:
    """Return `config` with the dotted keys of `values` replaced, validated again.

    Raises:
        InvalidInputError: As for `load_config`.
    """
    raw = to_dict(config)
    for key, value in values.items():
        assign(Config, raw, key, value)
    return _validate(raw)


def stage_config(config: Config, stage: Stage) -> Config:
    """Return what `stage` runs: `config` with the keys that the stage writes in place of its own, and no stages.

    Raises:
        InvalidInputError: The two together break a rule.
    """
    return _validate(to_dict(overlaid(config, stage)))


def parts(config: Config) -> tuple[tuple[str, Config], ...]:
    """Return (name, configuration without stages) of each part of the run, in order; one without stages has no name."""
    if config.train.stages is None:
        return (("", config),)
    return tuple((stage.name, stage_config(config, stage)) for stage in config.train.stages)


def resolve_paths(config: Config, base: Path | None = None) -> Config:
    """Return `config` with absolute folders and `data.val` filled in; URLs stay as they are.

    Args:
        config: The configuration as read.
        base: Folder that relative paths start from; None is the current directory.
    """
    start = Path.cwd() if base is None else base.absolute()
    train = _absolute(config.data.train, start)
    val = train if config.data.val is None else _absolute(config.data.val, start)
    storage = None if config.storage is None else _absolute(_without_scheme(config.storage), start)
    cache = None if config.data.cache_folder is None else _absolute(config.data.cache_folder, start)
    paths = {"data.train": train, "data.val": val, "data.cache_folder": cache, "storage": storage}

    def absolute_file(_field: str, name: str) -> str:
        """A name that is no file stays: it may be that of a run, or is refused when it is looked for."""
        return _absolute(name, start) if (start / Path(name).expanduser()).is_file() else name

    return with_files(with_overrides(config, paths), absolute_file, absolute_file)


def with_files(
    config: Config, weights: Callable[[str, str], str], plan: Callable[[str, str], str | dict[str, Any]]
) -> Config:
    """Return `config` with every name of a file or run replaced, in the stages too.

    Args:
        config: The configuration.
        weights: Given a key and what it names, replaces what `train.init_from` and the teachers name; "stage:NAME" is
            left alone.
        plan: The same for what `binarize.plan` names, unless it is written out.
    """
    raw = to_dict(config)
    train = raw["train"]
    if train["init_from"] is not None:
        train["init_from"] = weights("train.init_from", train["init_from"])
    stages = [(f"train.stages[{position}].", stage) for position, stage in enumerate(train["stages"] or ())]
    for prefix, part in (("train.", train), *stages):
        distill = part.get("distill")
        if distill and not distill["teacher"].startswith(STAGE_TEACHER):
            distill["teacher"] = weights(f"{prefix}distill.teacher", distill["teacher"])
    for prefix, part in (("", raw), *stages):
        binarize = part.get("binarize") or {}
        if isinstance(binarize.get("plan"), str):
            binarize["plan"] = plan(f"{prefix}binarize.plan", binarize["plan"])
    searched = (raw["search"] or {"space": {}})["space"].get("binarize.plan", {})
    for position, choice in enumerate(searched.get("choice", ())):
        if isinstance(choice, str):
            searched["choice"][position] = plan("search.space.binarize.plan", choice)
    return _validate(raw)


def alone(config: Config) -> Config:
    """Return what one run with `config` is, as a person may write it: no search, and no values that nothing looks at.

    A run may carry those, as what the trials of a search share.
    """
    single = config.model_copy(update={"search": None})
    fields = leaf_keys(Config)
    return with_overrides(single, {key: fields[key].default for key in unused(single, [p for _, p in parts(single)])})


def flatten(config: Config) -> dict[str, Scalar]:
    """Return dotted key -> value with one entry for each leaf, lists as JSON text, for a tracker's parameters."""
    flat: dict[str, Scalar] = {}
    _flatten_into(flat, "", to_dict(config))
    return flat


def to_dict(config: Config) -> dict[str, Any]:
    """Return `config` as plain JSON-able values; `Config.model_validate_json` of its JSON text is the inverse."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    """Return `config` as YAML text that `load_config` reads back to an equal configuration."""
    return yaml_text(to_dict(config))


def config_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration file, for editors and other programs."""
    return Config.model_json_schema()


def _validate(raw: Mapping[str, Any]) -> Config:
    raw = expanded(raw)
    try:
        # As JSON, because pydantic's strict rules for JSON are what a person means: a list where a tuple is declared
        # and 1 where 1.0 is, but never text where a number is.
        return Config.model_validate_json(json.dumps(raw, default=str))
    except ValidationError as error:
        raise invalid_config(Config, error) from None


def _without_scheme(storage: str) -> str:
    """Return the folder that a `file://` URL is; other places as they are."""
    return Location.of(storage).place if storage.startswith("file://") else storage


def _absolute(location: str, start: Path) -> str:
    return location if "://" in location else str((start / Path(location).expanduser()).resolve())


def _flatten_into(flat: dict[str, Scalar], prefix: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _flatten_into(flat, f"{prefix}{key}.", value)
        else:
            flat[prefix + key] = json.dumps(value) if isinstance(value, list) else value
