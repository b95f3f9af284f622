"""How long the experiment browser takes to show an experiment of many runs, in a headless Chromium.

    PYTHONPATH=. python benchmarks/browser_runs.py [--runs 2000] [--turns 5]

Each run has about 60 parameters, 15 metrics of 20 steps, a few tags; one in 50 is a sweep and the runs after it are its
trials. They are written through the server's own store. Measured is the time from asking for an address that `dab ui`
prints until rows are visible, in a fresh profile of the web browser (nothing cached), and once more in that profile:

- `newest`: the experiment, newest first, trials nested below their sweeps;
- `best`: all runs in the order of val_top1;
- `sweep`: the trials of one sweep;
- `charts`: the curves of the 20 best runs;
- `plain`: the page as MLflow opens it without a view.

`search_s` is what the server takes to answer the search behind the table. The pages whose addresses `dab ui` prints
(newest, sweep, charts) must open within 3 s (median, fresh profile), else the benchmark fails.
"""

import argparse
import os
import random
import sys
import tempfile
import time
import uuid
from pathlib import Path
from statistics import median
from typing import Any

import requests
from packed_conv import record

from orchestrator import tracking
from orchestrator.browser import start_browser

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from screenshots import chromium, new_page

LIMIT_S = 3.0
PRINTED = ("newest", "sweep", "charts")
NUM_STEPS, NUM_TRIALS = 20, 49
METRICS = ("val_top1", "val_top5", "val_loss", "train_loss", "lr", "packed_bytes", "bit_ops", "latency_ms")
SCHEDULES = ("decay", "cosine", "one_cycle")
EXPERIMENT = "dab"


def main() -> None:
    """Prints the table and writes `browser_runs.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dab-") as folder:
        os.environ["DAB_HOME"] = folder
        uri = tracking.ensure_tracking()
        try:
            tracking.create_run(uri, EXPERIMENT, "first", params={}, tags={})
            sweep = fill(f"sqlite:///{folder}/mlflow.db", options.runs - 1)
            rows = measure(uri, sweep, options.turns)
        finally:
            tracking.tracking_down()
    record("browser_runs", rows, runs=options.runs, limit_s=LIMIT_S)
    slow = {row["page"]: row["fresh_s"] for row in rows if row["page"] in PRINTED and row["fresh_s"] > LIMIT_S}
    sys.exit(f"over {LIMIT_S} s: {slow}" if slow else 0)


def fill(database: str, num_runs: int) -> str:
    """Writes the runs into the server's database and returns the id of the last sweep."""
    import sqlalchemy as sa
    from mlflow.store.tracking.dbmodels import models

    draw, now_ms = random.Random(1), round(time.time() * 1000)
    tables: dict[Any, list[dict[str, Any]]] = {
        models.SqlRun: [], models.SqlParam: [], models.SqlTag: [], models.SqlMetric: [], models.SqlLatestMetric: []
    }  # fmt: skip
    parent = ""
    for number in range(num_runs):
        run_id = uuid.UUID(int=draw.getrandbits(128)).hex
        is_sweep = number % (NUM_TRIALS + 1) == 0
        parent = run_id if is_sweep else parent
        start = now_ms - 60_000 * (num_runs - number)
        tags = {"dab.kind": "sweep" if is_sweep else "trial", "mlflow.runName": f"run-{number:04d}"}
        tags |= {} if is_sweep else {"mlflow.parentRunId": parent}
        tables[models.SqlRun].append(run_row(run_id, number, start))
        tables[models.SqlParam] += [{"run_uuid": run_id, "key": k, "value": v} for k, v in params_of(draw).items()]
        tables[models.SqlTag] += [{"run_uuid": run_id, "key": k, "value": v} for k, v in tags.items()]
        curve, last = metrics_of(run_id, start, draw)
        tables[models.SqlMetric] += curve
        tables[models.SqlLatestMetric] += last
    engine = sa.create_engine(database)
    with engine.begin() as connection:
        for model, rows in tables.items():
            connection.execute(sa.insert(model), rows)
    engine.dispose()
    return parent


def run_row(run_id: str, number: int, start: int) -> dict[str, Any]:
    """Returns a finished run as the store keeps it."""
    return {
        "run_uuid": run_id, "name": f"run-{number:04d}", "experiment_id": 1, "user_id": "dab", "status": "FINISHED",
        "start_time": start, "end_time": start + 50_000, "lifecycle_stage": "active", "source_type": "UNKNOWN",
        "source_name": "", "entry_point_name": "", "source_version": "",
        "artifact_uri": f"mlflow-artifacts:/1/{run_id}",
    }  # fmt: skip


def params_of(draw: random.Random) -> dict[str, str]:
    """Returns 60 parameters, four of them those that runs differ in."""
    tried = {
        "optim.max_lr": f"{10 ** draw.uniform(-4, -1)}",
        "binarize.bin_start": f"{draw.randint(2, 4)}",
        "binarize.bin_end": f"{draw.randint(5, 7)}",
        "schedule.name": draw.choice(SCHEDULES),
    }
    return tried | {f"section_{number % 8}.key_{number:02d}": "1.0" for number in range(56)}


def metrics_of(run_id: str, start: int, draw: random.Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns 15 curves and their last points."""
    curve, last = [], []
    for key in (*METRICS, *(f"layers/{layer:02d}/gap" for layer in range(2, 9))):
        best = draw.uniform(50, 95)
        for step in range(1, NUM_STEPS + 1):
            value = best * (1 - 0.8**step)
            point = {"run_uuid": run_id, "key": key, "value": value, "step": step, "is_nan": False}
            curve.append(point | {"timestamp": start + 2000 * step})
        last.append(curve[-1])
    return curve, last


def measure(uri: str, sweep: str, turns: int) -> list[dict[str, Any]]:
    """Returns a row for each page."""
    whole, _ = start_browser(None, uri, None, opens=False, say=print)
    one, _ = start_browser(sweep, uri, None, opens=False, say=print)
    best = whole["charts_url"].replace("&compareRunsMode=CHART", "")
    plain = f"{uri}/#/experiments/1/runs"
    pages = {"newest": whole["url"], "best": best, "sweep": one["url"], "charts": whole["charts_url"], "plain": plain}
    return [
        {"page": name} | time_page(url, turns, has_charts=name == "charts") | {"search_s": search_s(uri, name, turns)}
        for name, url in pages.items()
    ]


def time_page(url: str, turns: int, *, has_charts: bool) -> dict[str, float]:
    """Returns the seconds until rows, or curves, are visible: median and slowest of fresh profiles, and again."""
    fresh, again = [], []
    awaited = "path.js-line" if has_charts else ".ag-pinned-left-cols-container .ag-row a"
    with chromium() as browser:
        for _ in range(turns):
            page = new_page(browser, [])
            for found in (fresh, again):
                page.goto("about:blank")
                began = time.monotonic()
                page.goto(url)
                page.locator(awaited).first.wait_for(state="attached" if has_charts else "visible")
                found.append(time.monotonic() - began)
            page.context.close()
    return {"fresh_s": median(fresh), "slowest_s": max(fresh), "again_s": median(again)}


def search_s(uri: str, name: str, turns: int) -> float:
    """Returns the seconds that the server takes to answer the search behind a page."""
    order = "metrics.`val_top1` DESC" if name in ("best", "sweep", "charts") else "attributes.start_time DESC"
    body = {"experiment_ids": ["1"], "max_results": 100, "order_by": [order]}
    times = []
    for _ in range(turns):
        began = time.monotonic()
        requests.post(f"{uri}/ajax-api/2.0/mlflow/runs/search", json=body, timeout=60).raise_for_status()
        times.append(time.monotonic() - began)
    return median(times)


if __name__ == "__main__":
    main()
