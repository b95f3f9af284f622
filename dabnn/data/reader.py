"""Random access to the samples of a split: one `pread` a sample, with few files open at a time.

Shards on this machine are read where they lie. Those behind a URL are read from a `ShardCache`, which fetches whole
shards; `prefetch` says which ones come next. Takes sizes and indexes on trust of the manifest's numbers: the content
of a local shard is verified by `check`, that of a fetched one when it arrives.
"""

import hashlib
import os
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dabnn.data.location import Location
from dabnn.data.manifest import Shard, Split
from dabnn.data.prefetch import Prefetcher, Wanted
from dabnn.data.remote import is_url, shown
from dabnn.data.shard_cache import ShardCache, default_folder
from dabnn.data.shards import ShardIndex, index_path, load_index, parse_index
from dabnn.errors import DabError, InvalidInputError

_MAX_OPEN_FILES = 128
# A shard that the cache drops takes room until it is closed; opening one anew costs microseconds.
_MAX_OPEN_CACHED = 8


def verify_files(root: Location | Path | str, split: Split) -> str:
    """Compares the sizes of a split's files on this machine with the manifest, and the times of those indexed there.

    What lies behind a URL is verified when it is fetched.

    Args:
        root: Where the dataset lies.
        split: One of its splits.

    Returns:
        The state of the files on this machine: another one when any of them was written to since.

    Raises:
        InvalidInputError: A shard or its index is missing, a shard is not as long as it was written, or one that is
            not the dataset's own was written to since it was indexed.
    """
    root = Location.of(root)
    state = hashlib.sha256()
    for shard in split.shards:
        try:
            if root.is_local:
                index_path(root.path / shard.name).stat()
            place = shard_place(root, shard)
            if is_url(place):
                continue
            found = Path(place).stat()
        except FileNotFoundError as error:
            raise InvalidInputError(f"{error.filename}: missing; {_advice(root)}") from None
        if found.st_size != shard.num_bytes:
            raise InvalidInputError(
                f"{place}: {found.st_size} bytes, the manifest says {shard.num_bytes}, so it was truncated or altered; "
                f"{_advice(root)}"
            )
        if shard.mtime_ns not in (None, found.st_mtime_ns):
            raise InvalidInputError(
                f"{place}: the source changed since it was indexed; run `dab data build` again, so that labels and "
                "places of the images are those of now"
            )
        state.update(f"{found.st_size} {found.st_mtime_ns}\n".encode())
    return state.hexdigest()


def shard_place(root: Location, shard: Shard) -> str:
    """Returns the path or URL of a shard's tar file.

    Raises:
        InvalidInputError: A manifest behind a URL names a file of this machine.
    """
    place = root.child(shard.url or shard.name)
    target = Location.of(place)
    if target.is_local and not root.is_local:
        raise InvalidInputError(
            f"{root}: the manifest names {place} as the place of {shard.name}, a file of the machine that reads it; "
            "only URLs and names beside the manifest are read. Build the index again with such ones"
        )
    return target.place


def _advice(root: Location) -> str:
    return f"see what else is with `dab data check {root}`, then build again with `dab data build`"


class SampleReader:
    """Reads single samples by their index in the split.

    Open files are bounded; the numbers of every index that was needed stay, at 24 bytes a sample. A copy that was
    pickled to another process, or came there by fork, opens its own files. Not for use by several threads at once.

    Args:
        root: Where the dataset lies.
        split: The split to read.
        num_classes: Labels must be below this.
        cache: Keeps what was fetched from a server; by default one under DAB_HOME. Not used for local data.
    """

    def __init__(
        self, root: Location | Path | str, split: Split, num_classes: int, cache: ShardCache | None = None
    ) -> None:
        self._root = Location.of(root)
        self._shards = split.shards
        self._num_classes = num_classes
        self._starts = np.concatenate(([0], np.cumsum([shard.num_samples for shard in split.shards], dtype=np.int64)))
        self._bounds: list[int] = self._starts.tolist()
        self._cache = cache or ShardCache(default_folder())
        self._prefetcher = Prefetcher(self._cache)
        self._indexes: dict[int, ShardIndex] = {}
        self._places: dict[int, str] = {}
        self._files: OrderedDict[int, int] = OrderedDict()
        self._cached_files: OrderedDict[int, int] = OrderedDict()

    def read(self, index: int) -> tuple[bytes, int]:
        """Reads one sample.

        Args:
            index: Position in the split, counted through its shards.

        Returns:
            The image file's bytes, and the label.

        Raises:
            DabError: The shard, or its index, is damaged or gone, or holds a label outside the classes.
        """
        number = bisect_right(self._bounds, index) - 1
        position = index - self._bounds[number]
        shard_index = self._index(number)
        size = shard_index.sizes[position]
        try:
            data = os.pread(self._file(number), size, shard_index.offsets[position])
        except OSError as error:
            raise DabError(f"{self.describe(index)}: cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise DabError(f"{self.describe(index)}: the file ends before it; {_advice(self._root)}")
        return data, shard_index.labels[position]

    def labels(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the labels of samples; reads indexes only."""
        numbers = self._numbers(indices)
        labels = np.empty(len(indices), dtype=np.int64)
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            stored = np.frombuffer(self._index(number).labels, dtype=np.int64)
            labels[chosen] = stored[indices[chosen] - self._starts[number]]
        return labels

    def prefetch(self, indices: NDArray[np.int64]) -> None:
        """Begins to fetch the shards of coming samples in the background; does nothing for data on this machine.

        Args:
            indices: The samples, those needed first at the beginning. They take the place of those named before.
        """
        numbers, first = np.unique(self._numbers(indices), return_index=True)
        wanted = [number for number in numbers[np.argsort(first)].tolist() if self._is_remote(number)]
        if wanted:
            self._prefetcher.want([self._wanted(number) for number in wanted])

    def require_room(self, window: int) -> None:
        """Raises `InvalidInputError` if shards are fetched and the cache does not hold those of a window of samples."""
        fetched = [shard for number, shard in enumerate(self._shards) if self._is_remote(number)]
        self._cache.require_room(fetched, window)

    def describe(self, index: int) -> str:
        """Returns a sample's shard, key, and file name at the source, for messages."""
        number = bisect_right(self._bounds, index) - 1
        position = index - self._bounds[number]
        full = self._full_index(number)
        return f"{self._shown(number)}: sample {full.keys[position]} ({full.names[position]})"

    def close(self) -> None:
        """Closes the open files and ends fetching; reading again opens them again."""
        for files in (self._files, self._cached_files):
            while files:
                os.close(files.popitem()[1])
        self._prefetcher.close()

    def _numbers(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._starts, indices, side="right") - 1

    def _place(self, number: int) -> str:
        place = self._places.get(number)
        if place is None:
            place = self._places[number] = shard_place(self._root, self._shards[number])
        return place

    def _index_place(self, number: int) -> str:
        return self._root.child(index_path(Path(self._shards[number].name)).name)

    def _is_remote(self, number: int) -> bool:
        # The URL of a file on this machine has become its path.
        return not self._root.is_local or (self._shards[number].url is not None and is_url(self._place(number)))

    def _shown(self, number: int) -> str:
        return shown(self._place(number))

    def _index(self, number: int) -> ShardIndex:
        return self._indexes.get(number) or self._load_index(number)

    def _full_index(self, number: int) -> ShardIndex:
        shard = self._shards[number]
        if self._root.is_local:
            return load_index(self._root.path, shard)
        place = self._index_place(number)
        return parse_index(self._cache.index(place, shard), shard, shown(place))

    def _load_index(self, number: int) -> ShardIndex:
        full = self._full_index(number)
        for position, label in enumerate(full.labels):
            if not 0 <= label < self._num_classes:
                raise DabError(
                    f"{self._shown(number)}: sample {full.keys[position]} ({full.names[position]}): label "
                    f"{label} is outside the {self._num_classes} classes; {_advice(self._root)}"
                )
        # Strings are for messages only, and many times the size of the numbers.
        self._indexes[number] = ShardIndex((), (), full.offsets, full.sizes, full.labels)
        return self._indexes[number]

    def _file(self, number: int) -> int:
        is_remote = self._is_remote(number)
        files, most = (self._cached_files, _MAX_OPEN_CACHED) if is_remote else (self._files, _MAX_OPEN_FILES)
        file = files.get(number)
        if file is not None:
            files.move_to_end(number)
            return file
        if len(files) >= most:
            os.close(files.popitem(last=False)[1])
        place = self._place(number)
        file = self._cache.open(place, self._shards[number]) if is_remote else os.open(place, os.O_RDONLY)
        files[number] = file
        return file

    def _wanted(self, number: int) -> Wanted:
        return Wanted(
            self._shards[number], self._place(number), None if self._root.is_local else self._index_place(number)
        )

    def __getstate__(self) -> dict[str, object]:
        prefetcher = Prefetcher(self._cache)
        return {
            **self.__dict__,
            "_files": OrderedDict(),
            "_cached_files": OrderedDict(),
            "_indexes": {},
            "_prefetcher": prefetcher,
        }

    def __del__(self) -> None:
        self.close()
