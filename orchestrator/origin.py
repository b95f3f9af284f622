"""What a run began with: code, environment, seed, data, configuration. A resume compares, and says what differs.

The driver leaves `origin.json` in the run's folder when the run begins, and compares at every later start. `dab resume`
compares what it can see before it submits. Other code or another environment may be wanted, to go on after a repair or
an upgrade; `--force` accepts them, and the weights are then not those of an undisturbed run. Other data, another seed
or another configuration would make it another run.
"""

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from dabnn.data import load_manifest
from dabnn.errors import InvalidInputError
from dabnn.run_folder import RunFolder
from orchestrator.config import Config, alone, flatten, to_dict
from orchestrator.package import package

FILE = "origin.json"
# What decides the bits of a run's weights.
_PACKAGES = ("torch", "torchvision", "numpy", "pillow", "numba", "triton")
# Where a run goes on may change: it has nothing to do with what it computes.
_FREE = ("name", "cluster.", "tracking.", "storage", "search", "train.checkpoint.", "data.num_loaders", "data.cache_",
         "data.retry_s", "data.decoded_cache_gb")  # fmt: skip
_SHOWN = 12
_SHORT = 12


@dataclass(frozen=True)
class Origin:
    """What a run began with.

    Attributes:
        code: Digest of the program's sources; empty where other code was accepted.
        environment: Python and the packages that decide the bits, by name; empty where another one was accepted.
        seed: The run's.
        data: Digests of the manifests, of `train` and `val`.
        config: What decides what is computed, as dotted keys.
    """

    code: str
    environment: dict[str, str]
    seed: int
    data: dict[str, str]
    config: dict[str, Any]


def origin_of(config: Config) -> Origin:
    """Return what a run with `config` would begin with here and now; reads the manifests of its data."""
    places = {"train": config.data.train, "val": config.data.val or config.data.train}
    data = {split: load_manifest(place).digest for split, place in places.items()}
    return Origin(package().digest, environment(), config.seed, data, _computed(config))


def environment() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that decide the bits of a run's weights."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def begin(folder: RunFolder, now: Origin) -> None:
    """Compare with what the run began with, or leave it where the run begins; what was accepted is filled in.

    Raises:
        InvalidInputError: It differs.
    """
    before = load(folder)
    if before is None:
        folder.leave_json(FILE, asdict(now))
        return
    check(before, now)
    if not before.code or not before.environment:
        folder.leave_json(FILE, asdict(now))


def load(folder: RunFolder) -> Origin | None:
    """Return what the run in `folder` began with, or None where it has not begun."""
    values = folder.load_json(FILE)
    return Origin(**values) if values else None


def expect(folder: RunFolder, config: Config, *, is_here: bool, is_forced: bool, is_sweep: bool = False) -> None:
    """Refuse to resume a run that would not be the same any more, before anything is submitted.

    Args:
        folder: The run's folder.
        config: The run.
        is_here: Whether it goes on with this machine's packages and files; otherwise its job compares those, on the
            cluster.
        is_forced: Accept other code and another environment.
        is_sweep: Whether it is a sweep, whose search is written with the rest.

    Raises:
        InvalidInputError: Says what differs.
    """
    check_written(folder, config if is_sweep else alone(config))
    before = load(folder)
    if before is None:
        return
    if is_forced:
        before = replace(before, code="", environment={})
    elsewhere = replace(before, code=package().digest, config=_computed(config))
    check(before, origin_of(config) if is_here else elsewhere)
    if is_forced:
        folder.leave_json(FILE, asdict(before))


def check(before: Origin, now: Origin) -> None:
    """Refuse to go on with a run where something differs from what it began with.

    Raises:
        InvalidInputError: Says all that differs, and whether `--force` accepts it.
    """
    changed = _fixed_differences(before, now)
    if changed:
        raise InvalidInputError(
            f"{'; '.join(changed)}. With that it would be another run. Restore what it began with, or submit a new run "
            "that starts from its weights: train.init_from."
        )
    if accepted := _differences(before, now):
        raise InvalidInputError(
            f"{'; '.join(accepted)}. The weights would not be those of an undisturbed run, bit for bit. Restore what "
            "it began with, or accept it: `dab resume --force`."
        )


def _differences(before: Origin, now: Origin) -> list[str]:
    """Return what differs of code and environment, in words."""
    found = []
    if before.code and before.code != now.code:
        found.append(f"code: the program's sources are other ones ({now.code}, the run began with {before.code})")
    if before.environment:
        for name in sorted({*before.environment, *now.environment}):
            was, is_now = before.environment.get(name, "missing"), now.environment.get(name, "missing")
            if was != is_now:
                found.append(f"environment: {name} is {is_now}, the run began with {was}")
    return found


def _fixed_differences(before: Origin, now: Origin) -> list[str]:
    """Return what differs of seed, data and configuration, in words."""
    found = [f"seed: {now.seed}, the run began with {before.seed}"] if before.seed != now.seed else []
    for split, digest in before.data.items():
        if now.data[split] != digest:
            found.append(
                f"data.{split}: has other samples than the run began with (manifest {now.data[split][:_SHORT]}, it was "
                f"{digest[:_SHORT]})"
            )
    return found + _changed_values(before.config, now.config)


def _changed_values(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return which values of the configuration differ, in words."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    found = [f"{key}: {now.get(key)!r}, the run began with {before.get(key)!r}" for key in keys]
    return found[:_SHOWN] + ([f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else [])


def check_written(folder: RunFolder, config: Config) -> None:
    """Refuse to resume a run whose `config.yaml` somebody has changed, which nothing would look at.

    Args:
        folder: The run's folder.
        config: What was written there.

    Raises:
        InvalidInputError: Names what differs.
    """
    folder.refresh()
    path = folder.root / "config.yaml"
    if not path.exists():
        return
    try:
        written = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InvalidInputError(f"{folder.place_of('config.yaml')}: is no YAML any more ({error}).") from error
    changed = _changed_values(_flat(to_dict(config)), _flat(written or {}))
    if changed:
        raise InvalidInputError(
            f"{folder.place_of('config.yaml')}: was changed since the run began ({'; '.join(changed)}). A run keeps "
            "its configuration. Restore the file, or submit it as a new run; train.init_from takes over the weights."
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _computed(config: Config) -> dict[str, Any]:
    return {key: value for key, value in flatten(config).items() if not key.startswith(_FREE)}
