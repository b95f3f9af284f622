"""Reports of runs and sweeps: real runs of the real loop on digits, and sweeps written as folders."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_sweep import ROOT, write_sweep

import cli
from dabnn.answers import answers
from dabnn.data import Batch
from dabnn.distributed import World
from dabnn.errors import InvalidInputError
from dabnn.filters import layer_histograms
from dabnn.run_folder import RunFolder
from dabnn.train import train
from orchestrator import report as reports
from orchestrator.config import load_config, to_dict
from orchestrator.deliver import trained_of
from orchestrator.job import Job
from orchestrator.report_charts import Figure, short
from orchestrator.report_compare import compare_page, differences, read_runs
from orchestrator.report_page import Cell, Grid, Page, Tiles, render, write
from orchestrator.report_run import run_page
from orchestrator.report_sweep import sweep_page, words
from orchestrator.resolve import resolve, train_spec
from orchestrator.sweep_record import SweepRecord
from orchestrator.tracking import RunRecord

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TRACKER = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def runs(small_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    """Two runs of a narrow network for two epochs, which differ in their learning rate."""
    return [real_run(small_digits, tmp_path_factory.mktemp("runs") / f"run-{rate:g}", rate) for rate in (2e-3, 2e-2)]


def real_run(data: Path, root: Path, rate: float) -> RunFolder:
    changes = [f"data.train={data}", f"data.val={data}", "train.epochs=2", "model.width=0.0625", f"optim.max_lr={rate}"]
    config = resolve(load_config(ROOT / "examples" / "digits.yaml", [*changes, "cluster.num_workers=1"]))
    root.mkdir()
    Job("train", f"{int(1e4 * rate):032x}", root.name, str(root), "", "dab", 1, to_dict(config)).save()
    assert train(train_spec(config), RunFolder(root), world=World.current()).status == "finished"
    return RunFolder(root)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return write_sweep(tmp_path_factory.mktemp("sweeps") / "digits", 30, epochs=8)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the tracker know folders by their names, without a server."""

    def tell(*folders: RunFolder, kind: str = "train") -> None:
        records = {folder.root.name: record_of(folder, kind) for folder in folders}
        monkeypatch.setattr(reports.tracking, "find_run", lambda uri, reference: records[reference])

    return tell


def record_of(folder: RunFolder, kind: str) -> RunRecord:
    tags = {"dab.folder": str(folder.root), "dab.kind": kind}
    return RunRecord("5" * 32, folder.root.name, "finished", "dab", None, {}, tags, {}, 0, None, "")


def dab(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    capsys.readouterr()
    code = cli.run([*map(str, arguments), "--tracking-uri", TRACKER, "--json"])
    return code, json.loads(capsys.readouterr().out)


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_the_report_of_a_run_counts_as_evaluation_does(runs: list[RunFolder]) -> None:
    trained = trained_of(runs[1])
    page = run_page(runs[1])
    confusion = next(table for table in page.tables if table.name == "confusion")
    total = sum(row[2] for row in confusion.rows)
    right = sum(row[2] for row in confusion.rows if row[0] == row[1])
    best = max(line["metrics"]["val_top1"] for line in runs[1].metrics())
    assert total == 60
    assert 100 * right / total == pytest.approx(best)
    names = [part.name for part in page.parts]
    assert names == ["curves", "confusion", "confused_pairs", "mistakes", "instruments", "layer-weights", "filters"]
    tiles = next(part for part in page.parts if isinstance(part, Tiles)).tiles
    assert len(tiles) == min(24, total - right)
    assert all(picture.startswith(b"\x89PNG") for picture, _ in tiles)
    assert len(layer_histograms(trained.net)) == 6


def test_a_run_without_a_checkpoint_has_curves_and_says_why_nothing_else(runs: list[RunFolder], tmp_path: Path) -> None:
    shutil.copytree(runs[0].root, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "checkpoints")
    page = run_page(RunFolder(tmp_path / "bare"))
    assert "no checkpoint" in page.summary
    assert [part.name for part in page.parts] == ["curves", "instruments"]


def test_the_worst_mistakes_are_those_with_the_greatest_losses() -> None:
    logits = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 4.0]])
    images = torch.stack([torch.full((1, 2, 2), value) for value in (-0.5, 0.0, 0.5)])
    batch = Batch(images, torch.tensor([0, 0, 0]), torch.tensor([7, 8, 9]), 3)
    found = answers(lambda _: logits, [batch], 2, mean=[0.5], std=[1.0], num_worst=5)
    assert found.confusion.tolist() == [[1, 2], [0, 0]]
    assert found.top1 == pytest.approx(100 / 3)
    assert [one.index for one in found.worst] == [9, 8]
    assert [int(one.image[0, 0, 0]) for one in found.worst] == [255, 128]
    assert found.worst[0].loss == pytest.approx(4 + torch.log1p(torch.tensor(-4.0).exp()).item())


def test_every_filter_stands_with_alpha_at_one(runs: list[RunFolder]) -> None:
    for layer in layer_histograms(trained_of(runs[0]).net):
        assert sum(layer.shares) == pytest.approx(1)
        assert layer.edges[0] == -layer.edges[-1]
        errors = [one.error for one in layer.filters]
        assert errors == sorted(errors)
        assert all(one.beta < one.threshold < one.alpha for one in layer.filters)


def test_a_comparison_names_what_differs(runs: list[RunFolder]) -> None:
    found = read_runs(runs)
    assert [row[0] for row in differences(found).rows] == ["optim.max_lr"]
    best = max(found, key=lambda run: run.best_top1 or 0)
    assert compare_page(found).summary.startswith(f"{best.name} has the best validation top-1")
    with pytest.raises(InvalidInputError, match="needs two runs"):
        read_runs([runs[0], runs[0]])


def test_the_commands_write_files_and_say_where(
    runs: list[RunFolder], sweep: RunFolder, known: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known(sweep, kind="sweep")
    code, told = dab(capsys, "report", "digits", "-o", tmp_path / "s")
    assert (code, told["kind"], told["num_trials"]) == (0, "sweep", 30)
    table = rows_of(tmp_path / "s" / "trials.csv")
    assert len(table) == 30
    on_front = [int(row["trial"]) for row in table if row["state"] == "on the front"]
    assert on_front == [one["number"] for one in told["front"]]
    assert {"front.png", "parallel.png", "importance.png", "curves.png", "layers.png"} <= {
        Path(file).name for file in told["png"]
    }
    known(*runs)
    names = [run.root.name for run in runs]
    code, told = dab(capsys, "compare", *names, "-o", tmp_path / "c")
    assert code == 0
    assert told["differences"] == [{"key": "optim.max_lr", names[0]: 0.002, names[1]: 0.02}]
    assert Path(told["html"]).exists()
    code, told = dab(capsys, "compare", names[0], "-o", tmp_path / "c")
    assert (code, told["error"]["exit_code"]) == (2, 2)


def test_a_sweep_in_which_nothing_finished_is_refused_with_what_its_trials_do(
    known: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_sweep(tmp_path / "early", 2)
    for trial in folder.children("trials"):
        trial.forget_result()
    known(folder, kind="sweep")
    code, told = dab(capsys, "report", "early", "-o", tmp_path / "out")
    assert code == 2
    assert "no trial has finished, so there is nothing to report (2 running)" in told["error"]["message"]
    assert not (tmp_path / "out").exists()


def test_a_page_links_to_runs_and_asks_nobody_else(sweep: RunFolder) -> None:
    html = render(sweep_page(SweepRecord.read(sweep), TRACKER))
    assert f'href="{TRACKER}/#/runs/{0:032x}"' in html
    own = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="(?!data:)', own)


def test_what_comes_out_of_files_cannot_leave_its_place(tmp_path: Path) -> None:
    bad = "</script><script>alert(1)</script>"
    grid = Grid("t", bad, bad, [bad], [[Cell(bad, bad)]])
    figure = Figure("f", bad, bad, {"mark": "point", "data": {"values": [{"x": bad}]}})
    assert "<script>alert" not in render(Page(bad, bad, {bad: bad}, [grid, figure, Tiles("p", bad, bad, [(b"", bad)])]))
    write(Page("t", "", {}, [grid]), tmp_path)
    assert rows_of(tmp_path / "t.csv") == [{bad: bad}]


def test_one_objective_is_shown_against_size(sweep: RunFolder) -> None:
    record = SweepRecord.read(sweep)
    single = replace(record, aims=record.aims[:1])
    names = [part.name for part in sweep_page(single).parts]
    assert names == ["front", "history", "parallel", "importance", "slices", "curves", "layers", "trials"]
    assert words(single).startswith("The best of ")
    assert "front" not in words(single)


def test_a_sweep_that_no_trial_satisfies_says_so(tmp_path: Path) -> None:
    record = SweepRecord.read(write_sweep(tmp_path / "tight", 9, constraints=("packed_bytes <= 10",)))
    page = sweep_page(record)
    assert "None of the" in page.summary
    assert page.parts[0].name == "front"


def test_sizes_that_a_trial_did_not_note_come_from_its_configuration(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "old", 4)
    for trial in folder.children("trials"):
        (trial.root / "trial.json").unlink()
    page = sweep_page(SweepRecord.read(folder))
    table = next(part for part in page.parts if isinstance(part, Grid))
    assert all(row[list(table.columns).index("packed size (bytes)")] > 1000 for row in table.rows)
    assert reports._of_sweep(folder, TRACKER)[1]["front"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00012345, "1.23e-4"), (12345.0, "12,345"), (0.25, "0.25"), (True, "yes"), (None, "-"), (7, "7")],
)
def test_values_are_short(value: object, text: str) -> None:
    assert short(value) == text


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_page_of_500_trials_is_small_and_opens_in_a_browser_without_errors(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    folder = write_sweep(tmp_path / "large", 500, epochs=40)
    file = tmp_path / "report.html"
    file.write_text(render(sweep_page(SweepRecord.read(folder), TRACKER)))
    assert file.stat().st_size < 5_000_000
    seen: list[str] = []
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda message: seen.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda request: seen.append(request.url) if request.url.startswith("http") else None)
        page.goto(file.as_uri())
        page.wait_for_function("document.querySelectorAll('.chart canvas').length === 7", timeout=120_000)
        page.locator("th", has_text="trial").first.click()
        assert page.locator("tbody tr td").first.inner_text() == "0"
        browser.close()
    assert seen == []
