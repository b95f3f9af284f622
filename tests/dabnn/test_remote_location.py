"""Which places are read, and what messages show of them."""

from pathlib import Path

import pytest

from dabnn.data.location import Location
from dabnn.data.remote import shown
from dabnn.errors import InvalidInputError


@pytest.mark.parametrize(
    ("place", "path"),
    [("data/digits", "data/digits"), ("/data/x y", "/data/x y"), ("file:///data/x%20y/", "/data/x y/")],
)
def test_a_path_or_a_file_url_is_a_folder_of_this_machine(place: str, path: str) -> None:
    location = Location.of(place)
    assert location.is_local
    assert location.path == Path(path)
    assert location.child("manifest.json") == str(Path(path) / "manifest.json")


@pytest.mark.parametrize(
    ("place", "child"),
    [
        ("http://host:80/data/", "http://host:80/data/a%20b.tar"),
        ("https://host", "https://host/a%20b.tar"),
        ("s3://bucket/data", "s3://bucket/data/a b.tar"),
        ("https://host/data?sig=abc", "https://host/data/a%20b.tar?sig=abc"),
    ],
)
def test_a_file_behind_a_url_lies_below_it(place: str, child: str) -> None:
    location = Location.of(place)
    assert not location.is_local
    assert location.child("a b.tar") == child
    assert location.child("https://other/b.tar") == "https://other/b.tar"
    assert Location.of(location) is location
    with pytest.raises(ValueError, match="is not a folder on this machine"):
        _ = location.path


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("ftp://host/x", r"^ftp://host/x: ftp:// is not read; use one of file, http, https, s3"),
        ("gs://bucket/x", r"^gs://bucket/x: gs:// is not read"),
        ("https://me:hidden@host/x", r"^https://host/x: holds a user name or password"),
        ("s3://KEY:hidden@bucket/x", r"^s3://bucket/x: holds a user name or password"),
        ("http:///x", r"^http:///x: names no host"),
        ("s3:///x", r"^s3:///x: names no bucket"),
        ("file://other/x", r"^file://other/x: names a machine"),
        ("http://host/a b", r"holds a space or control character"),
        ("http://host/a\r\nHost: x", r"holds a space or control character"),
    ],
)
def test_a_url_that_cannot_be_read_is_refused_without_its_secret(place: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        Location.of(place)
    assert "hidden" not in str(caught.value)


def test_messages_show_neither_password_nor_signature() -> None:
    assert shown("https://me:hidden@host:1/a/b.tar?X-Amz-Signature=hidden#x") == "https://host:1/a/b.tar?***"
    assert str(Location.of("https://host/a?sig=hidden")) == "https://host/a?***"
    assert shown("/folder/a?b") == "/folder/a?b"


def test_a_missing_file_of_this_machine_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Location.of(tmp_path).read_bytes("manifest.json")
