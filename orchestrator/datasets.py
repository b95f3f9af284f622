"""`dab data`: builds, checks and shows datasets, and says what it found as JSON and as text."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dabnn.data import Manifest, Problem, build_dataset, check_dataset, load_manifest
from dabnn.data.build_plan import Listing, plan_build
from dabnn.data.encode import make_encoding
from dabnn.data.processes import RunTasks
from dabnn.data.show import class_counts, contact_sheet
from dabnn.errors import DabError, InvalidInputError
from orchestrator.output import Table, View

OnProgress = Callable[[int, int], None]
Say = Callable[[str], None]
_BYTES_PER_MB = 2**20
_BAR_CHARACTERS = 40
# Of more classes than twice as many, only the largest and the smallest are printed; JSON has them all.
_MAX_PRINTED = 20


@dataclass(frozen=True)
class BuildOptions:
    """What `dab data build` was asked for; also what travels to the cluster, as JSON.

    Attributes:
        source: Folder, archive, or `builtin:NAME`.
        dest: Folder for shards and manifest.
        layout: How the source is laid out, or `auto`.
        shard_mb: About how large a shard becomes, MiB.
        val_fraction: Share of each class that becomes `val`, where the source has none.
        seed: Of that draw.
        split_lists: Folder with `train.txt` and `val.txt`.
        resize: What the shorter side becomes, where it is longer.
        encode: File format of the stored images.
        quality: Of JPEG and WebP.
    """

    source: str
    dest: str
    layout: str = "auto"
    shard_mb: int = 64
    val_fraction: float | None = None
    seed: int = 0
    split_lists: str | None = None
    resize: int | None = None
    encode: str | None = None
    quality: int | None = None

    def digest(self) -> str:
        """Return what tells the data set from others: its images' names, sizes and times, and the other options.

        Raises:
            InvalidInputError: As `dabnn.data.build_dataset`.
        """
        lists = None if self.split_lists is None else Path(self.split_lists)
        listing = Listing(self.source, self.layout, self.val_fraction, self.seed, lists)
        encoding = make_encoding(self.resize, self.encode, self.quality)
        return plan_build(listing, self.shard_mb * _BYTES_PER_MB, encoding).digest()

    def to(self, dest: Path) -> "BuildOptions":
        """Return the same build in another folder."""
        return replace(self, dest=str(dest))

    def build(
        self,
        *,
        say: Say,
        on_progress: OnProgress,
        num_processes: int | None = None,
        run_tasks: RunTasks | None = None,
    ) -> Manifest:
        """Build it; raises what `dabnn.data.build_dataset` does."""
        return build_dataset(
            self.source,
            Path(self.dest),
            format=self.layout,
            val_fraction=self.val_fraction,
            seed=self.seed,
            split_lists=None if self.split_lists is None else Path(self.split_lists),
            shard_bytes=self.shard_mb * _BYTES_PER_MB,
            encoding=make_encoding(self.resize, self.encode, self.quality),
            num_processes=num_processes,
            run_tasks=run_tasks,
            on_progress=on_progress,
            say=say,
        )


def build(options: BuildOptions, *, num_processes: int | None, say: Say, on_progress: OnProgress) -> View:
    """Build a dataset in processes of this machine and return its splits and classes.

    Args:
        options: What to build.
        num_processes: How many; None: as many as are useful.
        say: Told what was found at the source.
        on_progress: Called as `on_progress(done, total)` with counts of images.

    Raises:
        DabError: As `dabnn.data.build_dataset`.
    """
    return dataset_view(options.build(say=say, on_progress=on_progress, num_processes=num_processes))


def check(dest: str, *, source: str | None, num_processes: int | None, on_progress: OnProgress) -> tuple[bool, View]:
    """Return whether a dataset is what was built, and what is wrong with it.

    Args:
        dest: Folder or URL of the dataset.
        source: What it was built from, to compare; None: not looked at.
        num_processes: Processes of this machine; None: as many as are useful.
        on_progress: Called as `on_progress(done, total)` with counts of images.

    Raises:
        DabError: As `dabnn.data.check_dataset`.
    """
    problems = check_dataset(dest, source=source, num_processes=num_processes, on_progress=on_progress)
    return not problems, _problems_view(dest, problems)


def show(dest: str, *, split: str, transform: str, input_size: int | None, seed: int, file: Path | None) -> View:
    """Return the samples of each class, and write a contact sheet.

    Args:
        dest: Folder or URL of the dataset.
        split: `train` or `val`.
        transform: Whose output is drawn.
        input_size: Height and width of it; None: that of the images, at most 224.
        seed: Another one shows other samples.
        file: The PNG file to write, or None.

    Raises:
        DabError: The dataset cannot be read, or the file not be written.
    """
    if input_size is not None and file is None:
        raise InvalidInputError("--input-size: has no effect without a picture; name one with -o FILE.png")
    manifest = load_manifest(dest)
    counts = class_counts(dest, split)
    data: dict[str, Any] = {
        "split": split,
        "num_samples": manifest.split(split).num_samples,
        "classes": [{"name": n, "num_samples": c} for n, c in zip(manifest.classes, counts, strict=True)],
        "image": asdict(manifest.image),
        "stored": manifest.stored,
        "file": None,
    }
    text = _histogram(manifest, split, counts)
    if file is None:
        return data, text
    sheet = contact_sheet(dest, split, transform=transform, input_size=input_size, seed=seed)
    try:
        sheet.image.save(file, "PNG")
    except OSError as error:
        raise DabError(f"{file}: cannot be written: {error.strerror}; name another file") from error
    data |= {"file": file, "input_size": sheet.input_size, "num_shown": len(sheet.labels), "bad": sheet.bad}
    bad = "".join(f"\nnot shown: {trouble}" for trouble in sheet.bad)
    return data, f"{text}\n{len(sheet.labels)} samples of {sheet.input_size} x {sheet.input_size} in {file}{bad}"


def dataset_view(manifest: Manifest) -> View:
    """Return the splits and classes of a dataset."""
    splits = {
        name: {"num_samples": split.num_samples, "num_shards": len(split.shards), "num_bytes": split.num_bytes}
        for name, split in manifest.splits.items()
    }
    records = [{"split": name, **sizes} for name, sizes in splits.items()]
    table = Table.of(records, ["split", "num_samples", "num_shards", "num_bytes"])
    data = {"splits": splits, "classes": list(manifest.classes), "digest": manifest.digest, "stored": manifest.stored}
    return data, f"{table}\n{len(manifest.classes)} classes"


def _problems_view(dest: str, problems: Sequence[Problem]) -> View:
    records = [asdict(problem) for problem in problems]
    human = str(Table.of(records, ["shard", "kind", "detail"])) if records else f"{dest}: no problems"
    return {"ok": not records, "problems": records}, human


def _histogram(manifest: Manifest, split: str, counts: Sequence[int]) -> str:
    most = max(*counts, 1)
    rows: list[list[Any]] = [
        [name, count, "#" * round(_BAR_CHARACTERS * count / most)]
        for name, count in zip(manifest.classes, counts, strict=True)
    ]
    if len(rows) > 2 * _MAX_PRINTED:
        rows.sort(key=lambda row: -row[1])
        more = f"... {len(rows) - 2 * _MAX_PRINTED:,} more ..."
        rows = [*rows[:_MAX_PRINTED], [more, "", ""], *rows[-_MAX_PRINTED:]]
    image = manifest.image
    size = f"{image.width} x {image.height} (median)"
    if image.max_width:
        size += f", {image.min_width} to {image.max_width} wide and {image.min_height} to {image.max_height} high"
    total = f"{split}: {sum(counts):,} samples of {len(counts):,} classes, {min(counts):,} to {max(counts):,} a class"
    return f"{Table(['class', 'samples', ''], rows)}\n{total}\nimages: {size}, {image.channels} channels"
