import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrator.package import ROOMS, snapshot
from orchestrator.provenance import PROGRAM_ROOT


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dab-") as folder:
        monkeypatch.setenv("DAB_HOME", folder)
        yield Path(folder)


def test_a_snapshot_holds_the_sources_of_the_program_and_nothing_else() -> None:
    copy = snapshot()
    files = {path.relative_to(copy) for path in copy.rglob("*") if path.is_file()}
    sources = {path.relative_to(PROGRAM_ROOT) for room in ROOMS for path in (PROGRAM_ROOT / room).rglob("*.py")}
    assert files == sources
    assert Path("jobs/train.py") in files
    assert (copy / "jobs" / "train.py").read_bytes() == (PROGRAM_ROOT / "jobs" / "train.py").read_bytes()


def test_equal_sources_give_one_snapshot_also_when_several_ask_at_once(own_home: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: snapshot(), range(8)))
    assert len(folders) == 1
    assert list((own_home / "packages").iterdir()) == list(folders)
