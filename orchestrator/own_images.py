"""`dab init` and `dab submit --images`: from a folder of images to a configuration, and to a data set, built once.

Data sets lie in `datasets/` under DAB_HOME, and for a cluster elsewhere beside the runs, in storage that it shares.
Each is named by the files that it was built from, so that a folder that has changed makes another one.
"""

import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from dabnn.data.manifest import MANIFEST_NAME
from dabnn.data.remote import is_url, shown
from dabnn.errors import DabError, InvalidInputError
from orchestrator.config import Config, load_config, with_overrides
from orchestrator.datasets import BuildOptions
from orchestrator.first_config import choose, to_text
from orchestrator.home import home
from orchestrator.image_folder import Found, look
from orchestrator.output import Progress, View
from orchestrator.reach import reach
from orchestrator.submit import placed
from orchestrator.target import Target, resolve_target

Say = Callable[[str], None]
_FOLDER = "datasets"
_NAME_DIGITS = 12
_STORED_SIDE, _INPUT_SIZE = 256, 224


@dataclass(frozen=True)
class Images:
    """Images of the user's own to train on.

    Attributes:
        source: A folder, an archive, or `builtin:digits`.
        val_fraction: Share of each class that becomes `val`; None: as `orchestrator.image_folder.look`.
        progress: Shows how far a build is, given what is done and the unit.
    """

    source: str
    val_fraction: float | None
    progress: Callable[[str, str], AbstractContextManager[Progress]]


def init(source: str, file: Path, *, val_fraction: float | None, address: str | None, force: bool) -> View:
    """Write a configuration for a folder of images and return what was found and chosen.

    Args:
        source: A folder, an archive, or `builtin:digits`.
        file: The file to write.
        val_fraction: Share of each class that becomes `val`; None: as `orchestrator.image_folder.look`.
        address: The cluster that it is for; None: this machine's.
        force: Whether a file that is there is replaced.

    Raises:
        InvalidInputError: The file is there, or as `orchestrator.image_folder.look`.
        DabError: The file cannot be written.
    """
    _refuse_file(file, force=force)
    found = look(source, val_fraction)
    choices = choose(found, count_gpus(resolve_target(address)))
    text = to_text(found, choices, shlex.quote(source), shlex.quote(str(file)))
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DabError(f"{file}: cannot be written: {error.strerror}; name another file with -o.") from error
    data = {"file": str(file), "found": asdict(found), "choices": [asdict(each) for each in choices]}
    return data, "\n".join([str(found), *found.notes, f"{file}: written, {_in_short(load_config(file))}"])


def _refuse_file(file: Path, *, force: bool) -> None:
    if file.is_dir():
        raise InvalidInputError(f"{file}: a folder; name the file to write with -o.")
    if file.exists() and not force:
        raise InvalidInputError(f"{file}: exists and is not overwritten; name another file with -o, or give --force.")


def wanted_config(
    config: Path | None,
    overrides: list[str],
    images: Images | None,
    *,
    address: str | None,
    say: Say,
    may_build: bool = True,
) -> Config:
    """Return the configuration that a submission asks for, with the data set of `images` where they are given.

    Args:
        config: The user's file; None: what is chosen for the images, or the defaults alone.
        overrides: `key=value` texts, which win.
        images: Images in place of the configuration's own data set.
        address: The cluster it is sent to, unless the configuration names it.
        say: Told what was found, and where the data set is.
        may_build: Whether a data set that was not built yet may be.

    Raises:
        InvalidInputError: As for `load_config` and `orchestrator.image_folder.look`, or the cluster does not see what
            is built here.
    """
    if images is None:
        if config is not None and config.is_dir():
            raise InvalidInputError(
                f"{config}: a folder, not a configuration; `dab submit --images {shlex.quote(str(config))}` trains on "
                "the images in it."
            )
        return load_config(config, overrides)
    for text in overrides:
        if text.partition("=")[0].strip() in ("data.train", "data.val"):
            raise InvalidInputError(f"--images: the data set is {images.source}, and --set {text} names another.")
    found = look(images.source, images.val_fraction)
    for line in (*str(found).splitlines(), *found.notes):
        say(line)

    def loaded(num_gpus: int) -> Config:
        chosen = [] if config else [choice.override for choice in choose(found, num_gpus)]
        return load_config(config, [*chosen, *overrides, "data.train=.", "data.val=null"])

    wanted = loaded(0)
    target = resolve_target(address or wanted.cluster.address)
    if config is None:
        wanted = loaded(count_gpus(target))
        say(f"chosen: {_in_short(wanted)}; `dab init {shlex.quote(images.source)}` writes it into a file, with reasons")
    folder = datasets_folder(wanted, target, images.source)
    dest = _built(found, wanted, folder, images, say=say, may_build=may_build)
    return with_overrides(wanted, {"data.train": str(dest)})


def datasets_folder(config: Config, target: Target, source: str) -> Path:
    """Return where data sets lie that a cluster sees: under DAB_HOME, or in the storage that it shares.

    Raises:
        InvalidInputError: The cluster shares no folder with this machine.
    """
    if target.is_embedded:
        return home() / _FOLDER
    storage = str(placed(config, target).storage)
    if is_url(storage):
        raise InvalidInputError(
            f"--images: {target} keeps its runs at {shown(storage)} and sees no folder of this machine. Build the data "
            f"set with `dab data build {shlex.quote(source)} FOLDER`, put the folder where the cluster sees it, such "
            "as beside the runs, and submit what `dab init` writes with --set data.train=URL."
        )
    return Path(storage.removeprefix("file://")).expanduser().absolute() / _FOLDER


def count_gpus(target: Target) -> int:
    """Return how many GPUs a cluster has; of one on this machine, how many torch sees."""
    if target.is_embedded:
        from dabnn.machine import devices

        return len(devices().found)
    return int(reach(target).total.get("GPU", 0))


def stored_side(found: Found, config: Config) -> int | None:
    """Return what the shorter side of stored images becomes, pixels; None where it stays.

    Photographs of many megapixels would be decoded as a whole in every epoch; 256 pixels suffice for an input of 224.
    """
    from dabnn.data.transforms import resized_side

    side = max(_STORED_SIDE, resized_side(config.model.input_size or _INPUT_SIZE))
    return side if found.max_side > side else None


def _built(found: Found, config: Config, folder: Path, images: Images, *, say: Say, may_build: bool) -> Path:
    """Return the folder of the data set, built if it is not there."""
    side = stored_side(found, config)
    options = BuildOptions(found.source, "", val_fraction=found.val_fraction, resize=side)
    dest = folder / f"{found.name}-{options.digest()[:_NAME_DIGITS]}"
    if (dest / MANIFEST_NAME).exists():
        say(f"its data set was built before: {dest}")
        return dest
    if not may_build:
        raise InvalidInputError(
            f"--dry-run: the data set of {images.source} is not built yet, and a dry run builds nothing. Submit "
            f"without it, or `dab init {shlex.quote(images.source)}` to see what would be chosen."
        )
    say(f"building its data set: {dest}" + (f", images {side} pixels on the shorter side" if side else ""))
    folder.mkdir(parents=True, exist_ok=True)
    with images.progress(f"build {dest.name}", "images") as bar:
        options.to(dest).build(say=lambda _: None, on_progress=bar.update)
    return dest


def _in_short(config: Config) -> str:
    model = config.model
    return (
        f"{model.name} at {model.width:g} of its width, {model.input_size} x {model.input_size} pixels, "
        f"{config.train.epochs} epochs with batches of {config.data.batch_size}"
    )
