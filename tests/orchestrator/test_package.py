import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dabnn.errors import DabError
from orchestrator.package import ROOMS, package, snapshot, sources
from orchestrator.provenance import PROGRAM_ROOT


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dab-") as folder:
        monkeypatch.setenv("DAB_HOME", folder)
        yield Path(folder)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a tracked source, a new one, an ignored one, and data."""
    for name in ("dabnn/loop.py", "dabnn/new.py", "jobs/ignored_scratch.py", "kernels/weights.bin", "dabnn/.env"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".gitignore").write_text("ignored_*\n")
    for command in (["init", "-q"], ["add", "dabnn/loop.py"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    return tmp_path


def test_a_snapshot_holds_the_sources_of_the_program_and_nothing_else() -> None:
    made = snapshot()
    files = {path.relative_to(made.folder) for path in made.folder.rglob("*") if path.is_file()}
    assert files == {path.relative_to(PROGRAM_ROOT) for path in sources()}
    assert {path.parts[0] for path in files} == set(ROOMS)
    assert {path.suffix for path in files} == {".py"}
    assert (made.folder / "jobs" / "train.py").read_bytes() == (PROGRAM_ROOT / "jobs" / "train.py").read_bytes()
    assert (made.num_files, made.num_bytes) == (
        len(files),
        sum(path.stat().st_size for path in made.folder.rglob("*.py")),
    )


def test_equal_sources_give_one_snapshot_also_when_several_ask_at_once(own_home: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(lambda _: snapshot(), range(8)))
    assert len(made) == 1
    assert list((own_home / "packages").iterdir()) == [each.folder for each in made]


def test_what_git_ignores_and_what_is_no_source_stays_at_home(checkout: Path) -> None:
    assert [str(path.relative_to(checkout)) for path in sources(checkout)] == ["dabnn/loop.py", "dabnn/new.py"]


def test_other_sources_give_another_digest_and_equal_ones_the_same(checkout: Path) -> None:
    first = package(checkout)
    (checkout / "kernels" / "weights.bin").write_text("other data")
    assert package(checkout) == first
    (checkout / "dabnn" / "loop.py").write_text("changed")
    assert package(checkout).digest != first.digest


def test_a_snapshot_is_named_by_what_was_copied_when_a_source_is_saved_meanwhile(
    checkout: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile

    def save_first(source: Path, target: Path) -> None:
        source.write_text("saved meanwhile")
        copy(source, target)

    monkeypatch.setattr("orchestrator.package.shutil.copyfile", save_first)
    made = snapshot(checkout)
    assert (made.folder / "dabnn" / "new.py").read_text() == "saved meanwhile"
    assert made == package(checkout)
    assert list((own_home / "packages").iterdir()) == [made.folder]


def test_sources_that_are_too_large_are_refused_by_name(checkout: Path) -> None:
    (checkout / "dabnn" / "loop.py").write_text("x" * 1000)
    with pytest.raises(DabError, match=r"^package: .* 1,012 bytes, and 1,000 at most .* dabnn/loop.py \(1,000 bytes\)"):
        package(checkout, max_bytes=1000)
