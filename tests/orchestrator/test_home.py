from pathlib import Path

import pytest

from dabnn.errors import InvalidInputError
from orchestrator.home import home, home_folder, read_record, write_private


def test_home_is_created_for_its_owner_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DAB_HOME", str(tmp_path / "a" / "b"))
    assert home() == tmp_path / "a" / "b"
    assert home().stat().st_mode & 0o777 == 0o700
    assert home_folder("logs").is_dir()


def test_a_folder_that_was_made_before_is_closed_to_others_unless_it_holds_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def mode_of(folder: Path, before: int) -> int:
        folder.mkdir(exist_ok=True)
        folder.chmod(before)
        monkeypatch.setenv("DAB_HOME", str(folder))
        return home().stat().st_mode & 0o7777

    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    assert mode_of(tmp_path / "dab", 0o755) == 0o700
    assert mode_of(tmp_path / "tmp", 0o1777) == 0o1777
    assert mode_of(tmp_path / "user", 0o755) == 0o755
    assert mode_of(tmp_path, 0o755) == 0o755


def test_home_defaults_to_a_folder_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DAB_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".dab"


def test_a_home_that_cannot_be_a_folder_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DAB_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(InvalidInputError, match=r"^DAB_HOME: .*file/home cannot be created"):
        home()


def test_a_private_file_is_replaced_as_a_whole_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_private(path, '{"a": 1}')
    write_private(path, '{"a": 2}')
    assert read_record(path) == {"a": 2}
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_damaged_record_counts_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "record.json").write_text(text)
    assert read_record(tmp_path / "record.json") is None
    assert read_record(tmp_path / "missing.json") is None
