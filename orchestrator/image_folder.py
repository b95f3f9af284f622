"""What lies in a folder of images: classes, images a class, sizes and channels, looked at without building anything.

Layouts and splits are those of `dab data build`. Leaves out what is chosen from it (`orchestrator.first_config`).
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from statistics import median_low

from dabnn.data.images import EXTENSIONS, GRAY_MODES, decode_image
from dabnn.data.sources import BUILTIN_PREFIX, SPLITS, Record, Source, open_source
from dabnn.data.sources.folder import MissingSplitError
from dabnn.errors import InvalidInputError
from orchestrator.output import one_line

VAL_FRACTION = 0.2
_NUM_DECODED = 64
_NUM_NAMED = 12
_OF_VAL = ("valid", "validation", "dev")
_OF_SPLITS = ("training", *_OF_VAL, "test", "testing", "eval")
_NO_NAME = re.compile(r"[^\w.+ -]+")


@dataclass(frozen=True)
class Found:
    """What lies in a folder of images.

    Attributes:
        source: The folder, absolute, or the archive or `builtin:NAME`.
        name: What a run on it may be called, which is also a file name.
        format: Its layout, as `dab data build` calls it.
        classes: Names, in the order of the labels.
        class_counts: Training images of each class.
        num_train: Training images.
        num_val: Validation images.
        val_fraction: Share of each class that was drawn into `val`; None where the layout has its own.
        channels: 1 where all images that were decoded are grey, else 3.
        width: Median, pixels.
        height: Median, pixels.
        max_side: Longest shorter side, pixels.
        notes: What a person should know.
    """

    source: str
    name: str
    format: str
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    num_train: int
    num_val: int
    val_fraction: float | None
    channels: int
    width: int
    height: int
    max_side: int
    notes: tuple[str, ...] = ()

    @property
    def side(self) -> int:
        """The shorter side of the median image, pixels."""
        return min(self.width, self.height)

    def __str__(self) -> str:
        counts = [f"{one_line(name)} {count:,}" for name, count in zip(self.classes, self.class_counts, strict=True)]
        named = ", ".join(counts[:_NUM_NAMED])
        more = f", and {len(counts) - _NUM_NAMED:,} more" if len(counts) > _NUM_NAMED else ""
        colour = "grey" if self.channels == 1 else "colour"
        return (
            f"{one_line(self.source)}: {len(counts):,} classes, {self.num_train:,} images to train on "
            f"({min(self.class_counts):,} to {max(self.class_counts):,} a class) and {self.num_val:,} to validate"
            f"\nclasses: {named}{more}\nimages: {self.width} x {self.height} (median), {colour}"
        )


def look(source: str, val_fraction: float | None = None) -> Found:
    """Return what lies in a folder of images; some of them are decoded, so that it takes seconds at most.

    Args:
        source: A folder, an archive, or `builtin:digits`.
        val_fraction: Share of each class that becomes `val`; None: 0.2 where the layout has no `val`.

    Raises:
        InvalidInputError: There are no images or only one class, some do not decode, or what is a class is not clear.
    """
    is_builtin = source.startswith(BUILTIN_PREFIX)
    path = Path(source).expanduser().resolve()
    if not is_builtin:
        _refuse_loose(path)
    listed, drawn = _listed(source if is_builtin else str(path), val_fraction)
    if listed.format == "folder":
        problem = structure_problem(str(path), listed.classes, [r.name for r in listed.splits["train"]])
        if problem:
            raise InvalidInputError(problem)
    if len(listed.classes) < 2:
        raise InvalidInputError(
            f"{source}: one class, {listed.classes[0]}, and a network tells two or more apart. Put the images of each "
            f"class into a folder of its own: {source}/CLASS/IMAGE, or {source}/{{train,val}}/CLASS/IMAGE."
        )
    if not listed.splits.get("val"):
        raise InvalidInputError(
            f"{source}: no image to validate on. Add images to its val, or, where it has none, at least a second image "
            "to a class."
        )
    width, height, max_side, channels = _sizes(source, listed)
    counts = Counter(record.label for record in listed.splits["train"])
    return Found(
        source=source if is_builtin else str(path),
        name=run_name(source.removeprefix(BUILTIN_PREFIX) if is_builtin else path.name),
        format=listed.format,
        classes=listed.classes,
        class_counts=tuple(counts[label] for label in range(len(listed.classes))),
        num_train=len(listed.splits["train"]),
        num_val=len(listed.splits["val"]),
        val_fraction=drawn,
        channels=channels,
        width=width,
        height=height,
        max_side=max_side,
        notes=(*listed.notes, *_other_splits(path)),
    )


def run_name(file: str) -> str:
    """Return what a run on a folder or archive of this name may be called."""
    for ending in (".tar.gz", ".tgz", ".tar", ".zip"):
        file = file.removesuffix(ending)
    return _NO_NAME.sub("-", file).strip(" .-")[:60] or "images"


def structure_problem(root: str, classes: Sequence[str], names: Iterable[str]) -> str | None:
    """Return why it is not clear which folders are classes, and what to do; None where it is.

    Args:
        root: The folder, for the message.
        classes: Names of its class folders.
        names: Those of its training images, relative to the root or to its `train`.
    """
    paths = [PurePosixPath(name) for name in names]
    is_split = all(path.parts[0] in SPLITS for path in paths) and not set(classes) & set(SPLITS)
    inner = [path.parts[1 if is_split else 0 :] for path in paths]
    if any(len(parts) <= 2 for parts in inner):
        return None
    words = [name for name in classes if name.lower() in _OF_SPLITS]
    if words:
        return (
            f"{root}: its folders {' and '.join(words)} look like splits, not classes. Call them train and val: "
            f"{root}/{{train,val}}/CLASS/IMAGE."
        )
    if len(classes) == 1 and not is_split:
        return (
            f"{root}: all images lie below one folder, {classes[0]}, so that there would be one class. If its folders "
            f"are the classes, name {root}/{classes[0]} instead."
        )
    return (
        f"{root}: no image lies directly in a class folder; the first is {'/'.join(inner[0])}, so the class may be "
        f"{inner[0][0]} or {inner[0][-2]}. Move the images to CLASS/IMAGE; or, if the outer folders are the classes, "
        f"build the data set with `dab data build` and name it with --set data.train=..."
    )


def _listed(source: str, val_fraction: float | None) -> tuple[Source, float | None]:
    """Return the source, and the share that was drawn from it, if one was."""
    try:
        listed = open_source(source, val_fraction=val_fraction)
    except MissingSplitError:
        if val_fraction is not None or _named_otherwise(Path(source)):
            raise
        val_fraction = VAL_FRACTION
        listed = open_source(source, val_fraction=val_fraction)
    return listed, val_fraction


def _named_otherwise(root: Path) -> bool:
    """Return whether there is a `train` beside something like a `val`; raises with its name.

    Raises:
        InvalidInputError: There is.
    """
    names = [name for name in _OF_VAL if (root / "train").is_dir() and (root / name).is_dir()]
    if names:
        raise InvalidInputError(
            f"{root}: a folder train and a folder {names[0]}. Call the second one val, or give --val-fraction 0.2 to "
            "have val drawn from train instead."
        )
    return False


def _refuse_loose(path: Path) -> None:
    if not path.is_dir():
        return
    entries = list(path.iterdir())
    num_images = sum(entry.suffix.lower().removeprefix(".") in EXTENSIONS for entry in entries)
    if num_images and not any(entry.is_dir() and not entry.name.startswith(".") for entry in entries):
        raise InvalidInputError(
            f"{path}: {num_images:,} images and no folder, so no class is known. Put the images of each class into a "
            f"folder of its own: {path}/CLASS/IMAGE."
        )


def _other_splits(path: Path) -> tuple[str, ...]:
    if (path / "train").is_dir() and (path / "test").is_dir():
        return (f"{path / 'test'} was left out: train and val alone are used",)
    return ()


def _sizes(source: str, listed: Source) -> tuple[int, int, int, int]:
    """Return the medians of width and height, the longest shorter side, and the channels of some images."""
    sizes: list[tuple[int, int]] = []
    modes: set[str] = set()
    tried: Sequence[Record] = listed.shuffled("train")[:_NUM_DECODED]
    broken = []
    for record in tried:
        try:
            image = decode_image(listed.read(record))
        except (OSError, ValueError) as error:
            broken.append(f"{record.name}: {error}")
            continue
        sizes.append(image.size)
        modes.add(image.mode)
    if broken:
        raise InvalidInputError(
            f"{source}: {len(broken)} of {len(tried)} images that were tried do not decode. The first is {broken[0]}. "
            "Repair or remove such images, then try again."
        )
    widths, heights = zip(*sizes, strict=True)
    max_side = max(min(size) for size in sizes)
    return median_low(widths), median_low(heights), max_side, 1 if modes <= GRAY_MODES else 3
