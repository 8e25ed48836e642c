"""Time from `pia-batch run` to the first batch on the device, by part, with the embedded model or another config.

    python jobs/benchmark_startup.py                       # three runs of one row
    python jobs/benchmark_startup.py --rounds 5 --json startup.json

Each round is a run of its own with a Ray of its own, as a user starts it. The parts are taken from what a run says of
itself: run.json and the results.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq

from pia_batch import tiny

PARTS = ("process_s", "plan_s", "ray_s", "engine_s")


def main() -> None:
    """Measure the rounds, print the median of each part, and write the figures as JSON if asked for."""
    parser = argparse.ArgumentParser(description="Measure the time from `pia-batch run` to the first batch, by part.")
    parser.add_argument("--rounds", type=int, default=3, help="number of runs (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    rounds = [_measure() for _ in range(arguments.rounds)]
    figures = {name: round(statistics.median(each[name] for each in rounds), 2) for name in (*PARTS, "first_batch_s")}
    for name, seconds in figures.items():
        print(f"{name:16}{seconds:>8.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"median": figures, "rounds": rounds}, indent=2) + "\n", encoding="utf-8")


def _measure() -> dict[str, float]:
    """Run one row of the sample; return the seconds of each part."""
    with tempfile.TemporaryDirectory() as folder:
        manifest, output = f"{folder}/requests.parquet", f"{folder}/out"
        shutil.copytree(tiny.SAMPLE / "images", f"{folder}/images")
        pq.write_table(pq.read_table(tiny.SAMPLE / "requests.parquet").slice(0, 1), manifest)
        command = [sys.executable, "-m", "pia_batch.cli", "run", "--manifest", manifest, "--output", output]
        started_at = time.time()
        done = subprocess.run(  # noqa: S603 - the program's own command
            [*command, "--json"],
            check=False,
            capture_output=True,
            env=os.environ | {"RAY_ADDRESS": "local"},  # without an address, Ray looks for the last one of `ray start`
        )
        if done.returncode:
            sys.exit(done.stderr.decode()[-2000:])
        record = json.loads(done.stdout)
        (result,) = ds.dataset(record["summary"]["results_uri"].removeprefix("file://")).to_table().to_pylist()
    return parts(started_at, record, result)


def parts(started_at: float, record: dict[str, Any], result: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of each part.

    Args:
        started_at: Unix time at which the process was started, in seconds.
        record: Run record, as `pia-batch run --json` prints it.
        result: Result of the only row.

    Returns:
        `process_s`: interpreter, imports and config. `plan_s`: plan and lease. `ray_s`: Ray's start, the worker's
        process and its imports. `engine_s`: load and self-test of the engine. `first_batch_s`: all of it, until the
        first batch is on the device.
    """
    begun = result["finished_at"].timestamp() - result["gpu_seconds"] - result["encode_seconds"]
    process_s = datetime.fromisoformat(record["started_at"]).timestamp() - started_at
    plan_s = record["timings"]["planning_s"] + record["timings"]["waiting_s"]
    engine_s = record["engines"]["startup_seconds"]["max"]
    whole_s = begun - started_at
    ray_s = whole_s - process_s - plan_s - engine_s
    return {"process_s": process_s, "plan_s": plan_s, "ray_s": ray_s, "engine_s": engine_s, "first_batch_s": whole_s}


if __name__ == "__main__":
    main()
