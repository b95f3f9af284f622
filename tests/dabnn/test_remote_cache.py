"""The cache of shards: bounded, shared by processes, and right after any of them was killed."""

import errno
import hashlib
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from image_tree import write_tree
from range_server import RangeServer

from dabnn.data import build_dataset, load_manifest, open_stream
from dabnn.data.manifest import Shard, Split
from dabnn.data.reader import SampleReader
from dabnn.data.shard_cache import ShardCache
from dabnn.errors import DabError, InvalidInputError

ROOT = Path(__file__).parents[2]
NOBODY = 65534
FETCH = """
import os, sys
from pathlib import Path
from dabnn.data.manifest import load_manifest
from dabnn.data.shard_cache import ShardCache
root, url, folder, max_bytes, *numbers = sys.argv[1:]
shards = load_manifest(root).splits["train"].shards
cache = ShardCache(Path(folder), int(max_bytes), retry_s=20.0)
for number in map(int, numbers):
    file = cache.open(f"{url}/{shards[number].name}", shards[number])
    assert os.fstat(file).st_size == shards[number].num_bytes
    os.close(file)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    build_dataset(str(write_tree(folder / "images", num_train=35)), folder / "data", shard_bytes=20_000)
    return folder / "data"


@pytest.fixture
def split(data: Path) -> Split:
    return load_manifest(data).splits["train"]


def url_of(server: RangeServer, shard: Shard) -> str:
    return f"{server.url}/{shard.name}"


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def fetcher(data: Path, server: RangeServer, folder: Path, *numbers: int, max_bytes: int = 10**9) -> list[str]:
    """Return the command of a process that fetches shards."""
    return [sys.executable, "-c", FETCH, str(data), server.url, str(folder), str(max_bytes), *map(str, numbers)]


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_limit_holds_and_the_least_recently_used_go_first(data: Path, split: Split, tmp_path: Path) -> None:
    largest = max(shard.num_bytes for shard in split.shards)
    cache = ShardCache(tmp_path / "cache", max_bytes=3 * largest)
    first, *others = split.shards
    with RangeServer(data, tmp_path) as server:
        for age, shard in enumerate(others):
            cache.path(url_of(server, first), first)
            os.utime(cache.path(url_of(server, shard), shard), (0, age))
            assert stored_bytes(cache.folder) <= cache.max_bytes
        assert server.requests(first.name) == [(first.name, 0)]
        assert cache.holds(others[-1])
        assert not cache.holds(others[0])


def test_a_stream_gets_by_with_a_cache_of_a_few_shards(data: Path, split: Split, tmp_path: Path) -> None:
    largest = max(shard.num_bytes for shard in split.shards)
    cache = ShardCache(tmp_path / "cache", max_bytes=4 * largest)
    with (
        RangeServer(data, tmp_path) as server,
        open_stream(server.url, "train", batch_size=12, window=10, cache=cache) as stream,
    ):
        found = sorted(index for batch in stream for index in batch.indices.tolist())
        assert found == list(range(split.num_samples))
        assert stored_bytes(cache.folder) <= cache.max_bytes


def test_a_cache_that_does_not_hold_a_window_is_refused(data: Path, split: Split, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", max_bytes=split.num_bytes - 1)
    with RangeServer(data, tmp_path) as server:
        with pytest.raises(InvalidInputError, match=r"^data\.cache_gb: .* \(data\.window\) lie in .* use at least"):
            open_stream(server.url, "train", batch_size=12, cache=cache)
        open_stream(data, "train", batch_size=12, cache=cache).close()


def test_a_shard_above_the_limit_is_refused(data: Path, split: Split, tmp_path: Path) -> None:
    shard = split.shards[0]
    cache = ShardCache(tmp_path / "cache", max_bytes=shard.num_bytes - 1)
    with pytest.raises(InvalidInputError, match=r"^data\.cache_gb: .* is less than one shard, http://host/x of"):
        cache.path("http://host/x", shard)


def test_processes_that_want_the_same_shards_fetch_each_once(data: Path, split: Split, tmp_path: Path) -> None:
    numbers = range(len(split.shards))
    with RangeServer(data, tmp_path) as server:
        orders = (numbers, reversed(numbers), numbers)
        commands = [fetcher(data, server, tmp_path / "cache", *order) for order in orders]
        processes = [subprocess.Popen(command) for command in commands]
        assert [process.wait() for process in processes] == [0, 0, 0]
        assert sorted(server.requests()) == [(shard.name, 0) for shard in split.shards]
    for shard in split.shards:
        found = (tmp_path / "cache" / f"{shard.sha256}.tar").read_bytes()
        assert hashlib.sha256(found).hexdigest() == shard.sha256


def test_processes_share_a_cache_with_room_for_one_shard(data: Path, split: Split, tmp_path: Path) -> None:
    room = max(shard.num_bytes for shard in split.shards)
    with RangeServer(data, tmp_path) as server:
        commands = [fetcher(data, server, tmp_path / "cache", *order, max_bytes=room) for order in ([0, 1], [1, 0])]
        processes = [subprocess.Popen(command) for command in commands]
        assert [process.wait() for process in processes] == [0, 0]
    assert stored_bytes(tmp_path / "cache") <= room


def test_a_fetch_whose_process_was_killed_is_gone_on_with(data: Path, split: Split, tmp_path: Path) -> None:
    shard, cache = split.shards[1], ShardCache(tmp_path / "cache")
    part = cache.folder / f"{shard.sha256}.{shard.num_bytes}.part"
    with RangeServer(data, tmp_path, {shard.name: ["slow 8192"]}) as server:
        process = subprocess.Popen(fetcher(data, server, cache.folder, 1))
        wait_for(lambda: part.exists() and part.stat().st_size == 8192)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = cache.path(url_of(server, shard), shard)
        assert server.requests() == [(shard.name, 0), (shard.name, 8192)]
    assert hashlib.sha256(found.read_bytes()).hexdigest() == shard.sha256
    assert not part.exists()


def test_a_part_that_is_wrong_is_fetched_anew(data: Path, split: Split, tmp_path: Path) -> None:
    shard, cache = split.shards[1], ShardCache(tmp_path / "cache")
    cache.folder.mkdir()
    (cache.folder / f"{shard.sha256}.{shard.num_bytes}.part").write_bytes(bytes(4096))
    with RangeServer(data, tmp_path) as server:
        found = cache.path(url_of(server, shard), shard)
        assert server.requests() == [(shard.name, 4096), (shard.name, 0)]
    assert hashlib.sha256(found.read_bytes()).hexdigest() == shard.sha256


def test_a_shard_that_is_not_there_leaves_nothing_behind(data: Path, split: Split, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache")
    with RangeServer(data, tmp_path) as server, pytest.raises(DabError, match="status 404"):
        cache.path(f"{server.url}/other.tar", split.shards[0])
    assert list(cache.folder.glob("*.part")) == []


def test_a_part_that_nobody_fetches_makes_room(data: Path, split: Split, tmp_path: Path) -> None:
    dead, shard = split.shards[:2]
    cache = ShardCache(tmp_path / "cache", max_bytes=shard.num_bytes + dead.num_bytes - 1)
    cache.folder.mkdir()
    part = cache.folder / f"{dead.sha256}.{dead.num_bytes}.part"
    part.write_bytes(b"begun")
    with RangeServer(data, tmp_path) as server:
        cache.path(url_of(server, shard), shard)
    assert not part.exists()


def test_a_shard_or_index_that_was_damaged_in_the_cache_is_fetched_again(
    data: Path, split: Split, tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache")
    expected = SampleReader(data, split, 3).read(0)
    with RangeServer(data, tmp_path) as server:
        assert SampleReader(server.url, split, 3, cache).read(0) == expected
        for path in cache.folder.iterdir():
            os.truncate(path, 100) if path.suffix != ".lock" else None
        assert SampleReader(server.url, split, 3, cache).read(0) == expected
        assert len(server.requests()) == 4


def test_a_shard_that_was_dropped_is_fetched_again(data: Path, split: Split, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache")
    with RangeServer(data, tmp_path) as server:
        reader = SampleReader(server.url, split, 3, cache)
        first = reader.read(0)
        shutil.rmtree(cache.folder)
        assert reader.read(0) == first, "an open file stays readable"
        reader.close()
        assert reader.read(0) == first


def test_shards_come_in_the_background(data: Path, split: Split, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache")
    with RangeServer(data, tmp_path) as server:
        reader = SampleReader(server.url, split, 3, cache)
        reader.prefetch(np.arange(split.num_samples))
        wait_for(lambda: all(cache.holds(shard) for shard in split.shards))
        reader.prefetch(np.arange(split.num_samples))
        assert sorted(server.requests(".tar")) == [(shard.name, 0) for shard in split.shards]
        reader.close()
    wait_for(lambda: not any(thread.name == "dab-prefetch" for thread in threading.enumerate()))


def read_all(reader: SampleReader, num_samples: int, answers: "multiprocessing.Queue[str]") -> None:
    reader.prefetch(np.arange(num_samples))
    answers.put(hashlib.sha256(b"".join(reader.read(index)[0] for index in range(num_samples))).hexdigest())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_reader_goes_to_another_process_in_the_middle_of_fetching(
    data: Path, split: Split, tmp_path: Path, method: str
) -> None:
    local = SampleReader(data, split, 3)
    expected = b"".join(local.read(index)[0] for index in range(split.num_samples))
    with RangeServer(data, tmp_path, {split.shards[0].name: ["slow 8192"]}) as server:
        reader = SampleReader(server.url, split, 3, ShardCache(tmp_path / "cache", retry_s=20.0))
        reader.prefetch(np.arange(split.num_samples))
        wait_for(lambda: len(server.requests()) > 0)
        context = multiprocessing.get_context(method)
        answers = context.Queue()
        child = context.Process(target=read_all, args=(reader, split.num_samples, answers))
        child.start()
        assert answers.get(timeout=200) == hashlib.sha256(expected).hexdigest()
        child.join()
        assert child.exitcode == 0
        assert b"".join(reader.read(index)[0] for index in range(split.num_samples)) == expected
        reader.close()


def test_a_pickled_cache_is_the_same(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 10**6, 5.0)
    assert pickle.loads(pickle.dumps(cache)) == cache


def test_a_folder_that_cannot_be_made_is_named(data: Path, split: Split, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = ShardCache(tmp_path / "file" / "cache")
    with pytest.raises(InvalidInputError, match=r"^data\.cache_folder: .*: cannot be written to \(Not a directory\)"):
        cache.path("http://127.0.0.1:9/x", split.shards[0])
    with (
        RangeServer(data, tmp_path) as server,
        pytest.raises(InvalidInputError, match=r"^data\.cache_folder: .*: cannot be written to \(Not a directory\)"),
    ):
        cache.index(f"{url_of(server, split.shards[0])}.index.json", split.shards[0])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_makes_room_in_the_cache_first(data: Path, split: Split, tmp_path: Path, small_disk: Path) -> None:
    cache = ShardCache(small_disk / "cache")
    assert split.num_bytes > 64 * 1024
    with RangeServer(data, tmp_path) as server:
        for shard in split.shards:
            found = cache.path(url_of(server, shard), shard)
            assert hashlib.sha256(found.read_bytes()).hexdigest() == shard.sha256


def test_a_disk_filled_by_others_is_told(data: Path, split: Split, tmp_path: Path, small_disk: Path) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        (small_disk / "other").write_bytes(bytes(65 * 1024))
    shard = split.shards[0]
    with (
        RangeServer(data, tmp_path) as server,
        pytest.raises(DabError, match=r"^data\.cache_folder: .*: the disk is full: .* name a folder on another disk"),
    ):
        ShardCache(small_disk / "cache").path(url_of(server, shard), shard)


def test_a_read_only_cache_serves_what_it_has(data: Path, split: Split, tmp_path: Path, small_disk: Path) -> None:
    shard, other = split.shards[:2]
    cache = ShardCache(small_disk / "cache")
    with RangeServer(data, tmp_path) as server:
        cache.path(url_of(server, shard), shard)
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        assert cache.path(url_of(server, shard), shard).exists()
        with pytest.raises(InvalidInputError, match=r"cannot be written to \(\w+\.\d+\.part: Read-only file system\)"):
            cache.path(url_of(server, other), other)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder that every user reaches and may write to."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == os.geteuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    return tmp_path / "shared"


def fetch_as_nobody(url: str, shard: Shard, folder: Path) -> str:
    """Fetches a shard as a user without rights, root's being too many; returns what became of it."""
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom dabnn.data.manifest import Shard\n"
        "from dabnn.data.shard_cache import ShardCache\nfrom dabnn.errors import DabError\n"
        "import encodings.idna, dabnn.data.remote\n"
        "url, folder, num_bytes, sha256, index_sha256 = sys.argv[1:]\n"
        "shard = Shard('', 1, int(num_bytes), sha256, index_sha256)\n"
        f"os.umask(0o022)\nos.setgid({NOBODY})\nos.setuid({NOBODY})\n"
        "try:\n"
        "    cache = ShardCache(Path(folder), retry_s=5.0)\n"
        "    os.close(cache.open(url, shard))\n"
        "    cache.index(url + '.index.json', shard)\n"
        "    print('fetched')\n"
        "except DabError as error:\n    print(error)\n"
    )
    arguments = [url, str(folder), str(shard.num_bytes), shard.sha256, shard.index_sha256]
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_users_who_may_all_write_to_the_folder_share_it(data: Path, split: Split, tmp_path: Path, shared: Path) -> None:
    first, second, third = split.shards[:3]
    before = os.umask(0o022)
    try:
        with RangeServer(data, tmp_path, {second.name: ["cut 4096", "403*"]}) as server:
            cache = ShardCache(shared)
            cache.path(url_of(server, first), first)
            with pytest.raises(DabError, match="status 403"):
                cache.path(url_of(server, second), second)
        (part,) = shared.glob("*.part")
        assert part.stat().st_mode & 0o777 == 0o666
        with RangeServer(data, tmp_path) as server:
            assert fetch_as_nobody(url_of(server, second), second, shared) == "fetched"
            assert fetch_as_nobody(url_of(server, third), third, shared) == "fetched"
            assert fetch_as_nobody(url_of(server, first), first, shared) == "fetched"
            assert server.requests(first.name) == [(first.name, 0)]
    finally:
        os.umask(before)


def test_a_file_that_belongs_to_another_user_is_named(data: Path, split: Split, tmp_path: Path, shared: Path) -> None:
    shard = split.shards[0]
    (shared / ".lock").touch(mode=0o600)
    with RangeServer(data, tmp_path) as server:
        message = fetch_as_nobody(url_of(server, shard), shard, shared)
    assert message.startswith(f"data.cache_folder: {shared}: cannot be written to (.lock: Permission denied); ")


def test_a_file_that_cannot_be_used_does_not_end_the_threads_that_fetch(
    data: Path, split: Split, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "dabnn.data.prefetch")
    cache = ShardCache(tmp_path / "cache")
    (cache.folder / ".lock").mkdir(parents=True)
    with RangeServer(data, tmp_path) as server:
        reader = SampleReader(server.url, split, 2, cache)
        reader.prefetch(np.arange(split.num_samples))
        wait_for(lambda: caplog.text.count("cannot be written to (.lock: Is a directory)") == len(split.shards))
        (cache.folder / ".lock").rmdir()
        reader.prefetch(np.arange(split.num_samples))
        wait_for(lambda: all(cache.holds(shard) for shard in split.shards))
        reader.close()


def test_a_checksum_that_is_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DabError, match="is no sha256"):
        ShardCache(tmp_path).path("http://host/x", Shard("x.tar", 1, 1, "../../x", ""))
