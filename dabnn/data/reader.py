"""Random access to the samples of a split: one `pread` a sample from local shards, with few files open at a time.

Takes sizes and indexes on trust of the manifest's numbers, not of the content's checksum: that is `check`.
"""

import os
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path

from dabnn.data.manifest import Split
from dabnn.data.shards import ShardIndex, index_path, load_index
from dabnn.errors import DabError, InvalidInputError

_MAX_OPEN_FILES = 128


def verify_sizes(folder: Path, split: Split) -> None:
    """Compares the sizes of a split's files with the manifest.

    Args:
        folder: The dataset's folder.
        split: One of its splits.

    Raises:
        InvalidInputError: A shard or its index is missing, or a shard is not as long as it was written.
    """
    for shard in split.shards:
        path = folder / shard.name
        try:
            found = path.stat().st_size
            index_path(path).stat()
        except FileNotFoundError as error:
            raise InvalidInputError(f"{error.filename}: missing; {_advice(folder)}") from None
        if found != shard.num_bytes:
            raise InvalidInputError(
                f"{path}: {found} bytes, the manifest says {shard.num_bytes}, so it was truncated or altered; "
                f"{_advice(folder)}"
            )


def _advice(folder: Path) -> str:
    return f"see what else is with `dab data check {folder}`, then build again with `dab data build`"


class SampleReader:
    """Reads single samples by their index in the split.

    Open files are bounded; the numbers of every index that was needed stay, at 24 bytes a sample. A copy that was
    pickled to another process opens its own files. Not for use by several threads at once.

    Args:
        folder: The dataset's folder.
        split: The split to read.
        num_classes: Labels must be below this.
    """

    def __init__(self, folder: Path, split: Split, num_classes: int) -> None:
        self._folder = folder
        self._shards = split.shards
        self._num_classes = num_classes
        self._starts = [0]
        for shard in split.shards:
            self._starts.append(self._starts[-1] + shard.num_samples)
        self._indexes: dict[int, ShardIndex] = {}
        self._files: OrderedDict[int, int] = OrderedDict()

    def read(self, index: int) -> tuple[bytes, int]:
        """Reads one sample.

        Args:
            index: Position in the split, counted through its shards.

        Returns:
            The image file's bytes, and the label.

        Raises:
            DabError: The shard, or its index, is damaged or gone, or holds a label outside the classes.
        """
        number = bisect_right(self._starts, index) - 1
        position = index - self._starts[number]
        shard_index = self._indexes.get(number) or self._load_index(number)
        size = shard_index.sizes[position]
        try:
            data = os.pread(self._file(number), size, shard_index.offsets[position])
        except OSError as error:
            raise DabError(f"{self.describe(index)}: cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise DabError(f"{self.describe(index)}: the file ends before it; {_advice(self._folder)}")
        return data, shard_index.labels[position]

    def describe(self, index: int) -> str:
        """Returns a sample's shard, key, and file name at the source, for messages."""
        number = bisect_right(self._starts, index) - 1
        shard = self._shards[number]
        position = index - self._starts[number]
        full = load_index(self._folder, shard)
        return f"{self._folder / shard.name}: sample {full.keys[position]} ({full.names[position]})"

    def close(self) -> None:
        """Closes the open files; reading again opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _load_index(self, number: int) -> ShardIndex:
        shard = self._shards[number]
        full = load_index(self._folder, shard)
        for position, label in enumerate(full.labels):
            if not 0 <= label < self._num_classes:
                raise DabError(
                    f"{self._folder / shard.name}: sample {full.keys[position]} ({full.names[position]}): label "
                    f"{label} is outside the {self._num_classes} classes; {_advice(self._folder)}"
                )
        # Strings are for messages only, and many times the size of the numbers.
        self._indexes[number] = ShardIndex((), (), full.offsets, full.sizes, full.labels)
        return self._indexes[number]

    def _file(self, number: int) -> int:
        file = self._files.get(number)
        if file is None:
            if len(self._files) >= _MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            file = self._files[number] = os.open(self._folder / self._shards[number].name, os.O_RDONLY)
        else:
            self._files.move_to_end(number)
        return file

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict(), "_indexes": {}}

    def __del__(self) -> None:
        self.close()
