"""A stream over HTTP or S3 is the stream of the folder that the server has, whatever the server does meanwhile."""

import logging
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from image_tree import write_tree
from range_server import KEY_ID, RangeServer

from dabnn.data import Batch, build_dataset, load_manifest, open_stream
from dabnn.data.manifest import MANIFEST_NAME, write_manifest
from dabnn.data.reader import SampleReader
from dabnn.data.remote import Patience, StoppedError
from dabnn.data.shard_cache import ShardCache
from dabnn.errors import DabError, InvalidInputError

SHARD = "train-000002.tar"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    build_dataset(str(write_tree(folder / "images", num_train=35)), folder / "data", shard_bytes=20_000)
    assert len(load_manifest(folder / "data").splits["train"].shards) > 5
    return folder / "data"


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", retry_s=20.0)


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert [batch.indices.tolist() for batch in found] == [batch.indices.tolist() for batch in expected]
    assert all(torch.equal(a.images, b.images) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(found, expected, strict=True))


def local(data: Path) -> list[Batch]:
    return list(open_stream(data, "train", batch_size=12, seed=3).epoch(1))


@pytest.mark.parametrize("num_loaders", [0, 2])
def test_a_stream_over_http_is_that_of_the_folder(
    data: Path, tmp_path: Path, cache: ShardCache, num_loaders: int
) -> None:
    with (
        RangeServer(data, tmp_path) as server,
        open_stream(server.url, "train", batch_size=12, seed=3, cache=cache, num_loaders=num_loaders) as stream,
    ):
        assert_same(list(stream.epoch(1)), local(data))
        assert_same(list(stream.epoch(1)), local(data))
        fetched = server.requests(".tar")
    assert sorted(fetched) == sorted({(shard.name, 0) for shard in load_manifest(data).splits["train"].shards})


def test_a_stream_of_a_file_url_needs_no_cache(data: Path, tmp_path: Path) -> None:
    with open_stream(data.as_uri(), "train", batch_size=12, seed=3, cache=ShardCache(tmp_path / "cache")) as stream:
        assert_same(list(stream.epoch(1)), local(data))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("num_loaders", [0, 1])
def test_shards_whose_images_are_all_kept_decoded_are_not_fetched(
    tmp_path: Path, cache: ShardCache, num_loaders: int
) -> None:
    tree = write_tree(tmp_path / "images", num_train=35, size=(24, 24))
    build_dataset(str(tree), tmp_path / "data", shard_bytes=20_000)
    shards = load_manifest(tmp_path / "data").splits["train"].shards
    with RangeServer(tmp_path / "data", tmp_path) as server:

        def read() -> list[Batch]:
            with open_stream(
                server.url, "train", batch_size=12, cache=cache, decoded_bytes=10**9, num_loaders=num_loaders
            ) as stream:
                return list(stream.epoch(0))

        first = read()
        fetched = server.requests(".tar")
        assert sorted(fetched) == [(shard.name, 0) for shard in shards]
        shutil.rmtree(cache.folder)
        assert_same(read(), first)
        assert server.requests(".tar") == fetched


def test_the_manifest_behind_a_url_is_the_same(data: Path, tmp_path: Path) -> None:
    with RangeServer(data, tmp_path) as server:
        assert load_manifest(server.url + "/").digest == load_manifest(data).digest


def test_labels_are_read_without_the_shards(data: Path, tmp_path: Path, cache: ShardCache) -> None:
    split = load_manifest(data).splits["train"]
    wanted = torch.randperm(split.num_samples).numpy()
    expected = [SampleReader(data, split, 3).read(index)[1] for index in wanted.tolist()]
    with RangeServer(data, tmp_path) as server:
        assert SampleReader(server.url, split, 3, cache).labels(wanted).tolist() == expected
        assert server.requests(".tar") == []


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_fetch_that_broke_off_goes_on_where_it_was(
    data: Path, tmp_path: Path, cache: ShardCache, has_ranges: bool
) -> None:
    actions = {SHARD: ["cut 5000", "cut 6000" if has_ranges else "cut 11000"]}
    with (
        RangeServer(data, tmp_path, actions, has_ranges=has_ranges) as server,
        open_stream(server.url, "train", batch_size=12, seed=3, cache=cache) as stream,
    ):
        assert_same(list(stream.epoch(1)), local(data))
        assert server.requests(SHARD) == [(SHARD, 0), (SHARD, 5000), (SHARD, 11000)]


def test_what_waiting_mends_is_waited_for(data: Path, tmp_path: Path, cache: ShardCache) -> None:
    actions = {SHARD: ["503", "429", "garbage"], MANIFEST_NAME: ["500"], f"{SHARD}.index.json": ["502"]}
    with (
        RangeServer(data, tmp_path, actions) as server,
        open_stream(server.url, "train", batch_size=12, seed=3, cache=cache) as stream,
    ):
        assert_same(list(stream.epoch(1)), local(data))
        assert len(server.requests(SHARD)) == 4


def test_a_server_that_is_down_in_mid_epoch_is_waited_for(data: Path, tmp_path: Path, cache: ShardCache) -> None:
    arguments = {"batch_size": 12, "seed": 3, "window": 20}
    expected = list(open_stream(data, "train", **arguments).epoch(0))
    shards = load_manifest(data).splits["train"].shards
    ends = np.cumsum([shard.num_samples for shard in shards])
    first = {shards[number].name for number in np.searchsorted(ends, expected[0].indices.numpy(), side="right")}
    # Until it is stopped, the server has the shards of the first batch only.
    busy = {shard.name: ["503*"] for shard in shards if shard.name not in first}
    assert busy
    with (
        RangeServer(data, tmp_path, busy) as server,
        open_stream(server.url, "train", cache=cache, **arguments) as stream,
    ):
        batches = stream.epoch(0)
        found = [next(batches)]
        server.stop()
        server.actions.clear()
        back = threading.Timer(2.0, server.start)
        back.start()
        found += list(batches)
        back.join()
        assert_same(found, expected)


def test_a_wait_is_told_once_for_all_that_wait_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    one, other = (Patience(f"http://host/{name}", 60.0, tell_every_s=0.01) for name in ("a", "b"))
    for patience in (one, other, one, other):
        patience.pause("a reason of this test", at_most=0.02)
    one.progress()
    other.progress()
    told = [record.getMessage() for record in caplog.records]
    assert told[0].startswith("waiting for http://host/")
    assert any(line.endswith("s without progress, gives up after 60") for line in told)
    assert told[-1].partition(": ")[2].startswith("goes on after")


def test_a_wait_ends_when_it_is_wanted_no_more() -> None:
    stop = threading.Event()
    patience = Patience("http://host/a", 60.0, stop)
    stop.set()
    with pytest.raises(StoppedError):
        patience.pause("a reason")
    with pytest.raises(StoppedError):
        patience.progress()


def test_a_server_that_stays_away_is_given_up_with_a_reason(data: Path, tmp_path: Path) -> None:
    server = RangeServer(data, tmp_path)
    split = load_manifest(data).splits["train"]
    reader = SampleReader(server.url, split, 3, ShardCache(tmp_path / "cache", retry_s=0.5))
    with pytest.raises(DabError, match=r"^http://127.*: Connection refused; given up after \d+ s.*data\.retry_s"):
        reader.read(0)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("404*", r"train-000002\.tar: status 404 Not Found \(Told\): there is no such file"),
        ("403*", r"train-000002\.tar: status 403 Forbidden \(Told\): the credentials of this process may not read it"),
        ("401*", r"train-000002\.tar: status 401 Unauthorized \(Told\): the server wants credentials"),
        ("garbage*", r"train-000002\.tar: sha256 \w+, the manifest says \w+, in each of 3 tries"),
    ],
)
def test_what_waiting_does_not_mend_names_the_shard_at_once(
    data: Path, tmp_path: Path, cache: ShardCache, action: str, message: str
) -> None:
    with (
        RangeServer(data, tmp_path, {SHARD: [action]}) as server,
        open_stream(server.url, "train", batch_size=12, seed=3, cache=cache) as stream,
        pytest.raises(DabError, match=message),
    ):
        list(stream)


def test_a_shard_of_another_size_is_named(data: Path, tmp_path: Path, cache: ShardCache) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    with (copy / SHARD).open("ab") as file:
        file.write(bytes(512))
    with (
        RangeServer(copy, tmp_path) as server,
        open_stream(server.url, "train", batch_size=12, cache=cache) as stream,
        pytest.raises(DabError, match=rf"{SHARD}: \d+ bytes, the manifest says \d+, so it was truncated or altered"),
    ):
        list(stream)


def test_an_index_that_is_not_the_shards_own_is_named(data: Path, tmp_path: Path, cache: ShardCache) -> None:
    with (
        RangeServer(data, tmp_path, {f"{SHARD}.index.json": ["garbage*"]}) as server,
        open_stream(server.url, "train", batch_size=12, cache=cache) as stream,
        pytest.raises(DabError, match=rf"{SHARD}\.index\.json: not the index that was written with {SHARD}"),
    ):
        list(stream)


def test_a_url_without_a_manifest_says_what_to_upload(tmp_path: Path) -> None:
    with (
        RangeServer(tmp_path, tmp_path) as server,
        pytest.raises(InvalidInputError, match=rf"^{server.url}/x: no manifest\.json.* and upload the whole folder"),
    ):
        load_manifest(f"{server.url}/x")


def with_urls(data: Path, dest: Path, prefix: str, ending: str = "") -> Path:
    """Write the index of a dataset whose shards lie elsewhere."""
    manifest = load_manifest(data)
    dest.mkdir()
    for split in manifest.splits.values():
        for shard in split.shards:
            shutil.copy(data / f"{shard.name}.index.json", dest)
    splits = {
        name: type(split).of(
            tuple(shard._replace(url=f"{prefix}{shard.name}{ending}") for shard in split.shards), split.class_counts
        )
        for name, split in manifest.splits.items()
    }
    write_manifest(dest, type(manifest)(manifest.source, manifest.classes, manifest.image, splits))
    return dest


def test_shards_may_lie_elsewhere_than_their_index(data: Path, tmp_path: Path, cache: ShardCache) -> None:
    beside = with_urls(data, tmp_path / "beside", f"{data}/")
    with open_stream(beside, "train", batch_size=12, seed=3) as stream:
        assert_same(list(stream.epoch(1)), local(data))
    by_url = with_urls(data, tmp_path / "by_url", f"{data.as_uri()}/")
    with open_stream(by_url, "train", batch_size=12, seed=3, cache=ShardCache(tmp_path / "none", 1)) as stream:
        assert_same(list(stream.epoch(1)), local(data))
    assert not (tmp_path / "none").exists()
    with RangeServer(data, tmp_path) as server:
        index = with_urls(data, tmp_path / "index", f"{server.url}/", "?sig=hidden")
        with open_stream(index, "train", batch_size=12, seed=3, cache=cache) as stream:
            assert_same(list(stream.epoch(1)), local(data))


def test_a_signature_appears_in_no_message(
    data: Path, tmp_path: Path, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    with RangeServer(data, tmp_path, {SHARD: ["503", "403*"]}) as server, caplog.at_level(logging.DEBUG):
        index = with_urls(data, tmp_path / "index", f"{server.url}/", "?sig=hidden")
        with (
            open_stream(index, "train", batch_size=12, cache=cache) as stream,
            pytest.raises(DabError, match=rf"{SHARD}\?\*\*\*: status 403") as caught,
        ):
            list(stream)
    assert "hidden" not in str(caught.value) + caplog.text


def test_a_manifest_from_a_server_may_not_name_files_of_this_machine(
    data: Path, tmp_path: Path, cache: ShardCache
) -> None:
    index = with_urls(data, tmp_path / "index", f"{data.as_uri()}/")
    with (
        RangeServer(index, tmp_path) as server,
        pytest.raises(InvalidInputError, match=r"the manifest names .* a file of the machine that reads it"),
    ):
        open_stream(server.url, "train", batch_size=12, cache=cache)


def test_a_stream_over_s3_is_signed_with_the_credentials_of_the_environment(
    data: Path, tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = tmp_path / "root" / "bucket" / "some_data"
    shutil.copytree(data, bucket)
    with RangeServer(tmp_path / "root", tmp_path, {SHARD: ["cut 5000"]}, secret="test-secret") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
        with open_stream("s3://bucket/some_data", "train", batch_size=12, seed=3, cache=cache) as stream:
            assert_same(list(stream.epoch(1)), local(data))
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
        with pytest.raises(
            DabError, match=r"^s3://bucket/some_data/manifest\.json: status 403 .*SignatureDoesNotMatch"
        ):
            load_manifest("s3://bucket/some_data")
