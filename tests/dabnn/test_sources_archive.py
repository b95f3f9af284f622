"""Archives that are read without unpacking, and the members that no honest archive has."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
from source_files import class_files, contents, image_file, tar_bytes, write_files, write_zip

from dabnn.data.sources import open_source
from dabnn.data.sources.tar import scan_tar
from dabnn.errors import DabError, InvalidInputError

FILES = class_files({"ant": 4, "bee": 3}, "train") | class_files({"ant": 2, "bee": 1}, "val")


@pytest.mark.parametrize("top", ["", "./", "images/", "./images/"])
@pytest.mark.parametrize("kind", ["tar", "stored.zip", "deflated.zip"])
def test_an_archive_is_read_as_the_folder_that_it_unpacks_to(tmp_path: Path, top: str, kind: str) -> None:
    folder = open_source(str(write_files(tmp_path / "images", FILES)))
    files = {f"{top}{name}": data for name, data in FILES.items()}
    path = tmp_path / f"images.{kind}"
    if kind == "tar":
        path.write_bytes(tar_bytes(files))
    else:
        write_zip(path, files, zipfile.ZIP_STORED if kind == "stored.zip" else zipfile.ZIP_DEFLATED)
    source = open_source(str(path))
    assert source.digest == folder.digest
    assert [contents(source, split) for split in ("train", "val")] == [contents(folder, s) for s in ("train", "val")]
    record = source.splits["train"][0]
    assert pickle.loads(pickle.dumps(source.read))(record) == FILES[record.name]


@pytest.mark.parametrize("layout", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names_are_read_from_each_kind_of_tar(tmp_path: Path, layout: int) -> None:
    name = "ant" if layout == tarfile.USTAR_FORMAT else "ä" * 60
    long = f"{name}/{'deep/' * 20}{'x' * 90}.png"
    files = {long: image_file(1), "bee/1.png": image_file(2), "bee/2.png": image_file(3)}
    path = tmp_path / "images.tar"
    path.write_bytes(tar_bytes(files, layout=layout))
    assert {member.name for member in scan_tar(path)} == files.keys()
    source = open_source(str(path), val_fraction=0.5)
    assert sorted(source.read(r) for records in source.splits.values() for r in records) == sorted(files.values())


def test_folders_and_leftovers_of_a_file_manager_are_no_samples(tmp_path: Path) -> None:
    files = FILES | {"__MACOSX/train/ant/._0.png": b"x", "train/.DS_Store": b"x", "read.me": b"x", "train/": b""}
    source = open_source(str(write_zip(tmp_path / "images.zip", files)))
    assert source.classes == ("ant", "bee")
    assert any(note.startswith("3 files were passed over") for note in source.notes)


@pytest.mark.parametrize(
    "name", ["../evil.png", "/etc/evil.png", "train/../../evil.png", "..\\evil.png", "C:\\evil.png"]
)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_name_that_leads_outside_is_refused_and_nothing_is_written(tmp_path: Path, name: str, kind: str) -> None:
    files = FILES | {name: image_file(1)}
    path = tmp_path / "box" / f"images.{kind}"
    path.parent.mkdir()
    if kind == "tar":
        path.write_bytes(tar_bytes(files))
    else:
        write_zip(path, files)
    with pytest.raises(InvalidInputError, match=r"images\.\w+: has a member named .*evil.*absolute or leads out"):
        open_source(str(path))
    assert [p.name for p in tmp_path.rglob("*")] == ["box", path.name]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_a_link_or_device_in_a_tar_is_refused(tmp_path: Path, kind: bytes) -> None:
    buffer = io.BytesIO(tar_bytes(FILES))
    with tarfile.open(fileobj=buffer, mode="a") as archive:
        member = tarfile.TarInfo("train/ant/link.png")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    (tmp_path / "images.tar").write_bytes(buffer.getvalue())
    with pytest.raises(InvalidInputError, match=r"member 'train/ant/link\.png' is a link, a device"):
        open_source(str(tmp_path / "images.tar"))


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "images.zip", FILES)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("train/ant/link.png")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(InvalidInputError, match=r"member 'train/ant/link\.png' is a link"):
        open_source(str(path))


def test_a_method_that_is_not_read_is_told(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "images.zip", FILES, zipfile.ZIP_LZMA)
    with pytest.raises(InvalidInputError, match="another method than deflate"):
        open_source(str(path))


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_one_name_twice_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"images.{kind}"
    if kind == "tar":
        twice = io.BytesIO(tar_bytes(FILES))
        with tarfile.open(fileobj=twice, mode="a") as archive:
            archive.addfile(tarfile.TarInfo("val/ant/0.png"))
        path.write_bytes(twice.getvalue())
    else:
        write_zip(path, FILES)
        with zipfile.ZipFile(path, "a") as zipped:
            zipped.writestr("val/ant/0.png", b"another")
    with pytest.raises(InvalidInputError, match=r"two members named 'val/ant/0\.png'"):
        open_source(str(path))


def test_a_tar_is_never_taken_as_complete_when_it_is_cut_off(tmp_path: Path) -> None:
    whole = tar_bytes(FILES)
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    path = tmp_path / "images.tar"
    for size in [1, 100, 512, 513, 1024, end // 2, end - 512, end - 1, end, end + 511]:
        path.write_bytes(whole[:size])
        with pytest.raises(InvalidInputError, match="no tar archive, or damaged, or truncated"):
            open_source(str(path))
    path.write_bytes(whole[: end + 512])
    assert open_source(str(path)).classes == ("ant", "bee")


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    whole = bytearray(tar_bytes(FILES))
    third = list(FILES)[2].encode()
    whole[whole.index(third)] ^= 1
    (tmp_path / "images.tar").write_bytes(whole)
    with pytest.raises(InvalidInputError, match="has a wrong checksum"):
        open_source(str(tmp_path / "images.tar"))


def test_a_negative_size_does_not_send_the_reader_back(tmp_path: Path) -> None:
    header = bytearray(tar_bytes({"a/b.png": b"x"})[:512])
    header[124:136] = b"-00000002000"
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    (tmp_path / "images.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(InvalidInputError, match="no tar archive, or damaged"):
        open_source(str(tmp_path / "images.tar"))


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    whole = {"tar": tar_bytes(FILES, layout=tarfile.PAX_FORMAT)}
    whole["zip"] = write_zip(tmp_path / "images.zip", FILES).read_bytes()
    for kind, data in whole.items():
        path = tmp_path / f"images.{kind}"
        for seed in range(60):
            noise = seed * 2654435761 % 2**24
            damaged = bytearray(data)
            damaged[noise % len(data)] ^= noise % 255 + 1
            path.write_bytes(damaged)
            try:
                source = open_source(str(path))
                for records in source.splits.values():
                    for record in records:
                        source.read(record)
            except DabError:
                pass


def test_a_compressed_tar_is_told_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "images.tar.gz").write_bytes(tar_bytes(FILES, "w:gz"))
    with pytest.raises(InvalidInputError, match=r"compressed as a whole.*`gunzip --keep images\.tar\.gz`"):
        open_source(str(tmp_path / "images.tar.gz"))


def test_an_archive_that_was_changed_after_listing_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "images.tar"
    path.write_bytes(tar_bytes(FILES))
    source = open_source(str(path))
    path.write_bytes(b"")
    with pytest.raises(DabError, match="changed after it was listed"):
        source.read(source.splits["train"][0])
    zipped = write_zip(tmp_path / "images.zip", FILES)
    source = open_source(str(zipped))
    zipped.write_bytes(b"")
    with pytest.raises(DabError, match="is not where the archive's table says"):
        source.read(source.splits["train"][0])
