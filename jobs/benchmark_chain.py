"""Measure the chain from manifest to journal around engines of known speed: real Ray, images and files, but no model.

    python jobs/benchmark_chain.py                                      # two engines, 1 s a batch: half a minute
    python jobs/benchmark_chain.py --actors 1 2 4 8 16 64 --batch-seconds 6 1 --json chain.json
    python jobs/benchmark_chain.py --actors 1 2 4 8 --rows 256          # strong scaling: total rows
    python jobs/benchmark_chain.py --batch-seconds 0 --rows 1000 10000 50000        # the driver's cost and memory

Each line is a separate run in a separate process: `driver.run` as a command starts it, with its lease, fetching,
encoding, checks, commits and publishing. Only the engines are simulated: each takes the given seconds for a batch, and
records when. docs/performance.md explains the columns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import ray
from simulated_engine import SimulatedLoader, batch_records, write_manifest

from pia_batch.config import RunConfig
from pia_batch.driver import own_ray_node
from pia_batch.driver.progress import Progress
from pia_batch.driver.run import run
from pia_batch.planning.plan import make_plan

ENGINE_CPUS, FETCH_CPUS, OTHER_CPUS = 0.5, 0.4, 2.0
"""CPUs that Ray is started with: enough for every engine, and for a few tasks of the other stages at a time."""


@dataclass(frozen=True)
class Case:
    """One run to measure.

    Attributes:
        actors: Number of engines, each in its own process.
        batch_seconds: Duration of a batch, in seconds.
        batch_size: Number of requests in a batch.
        rows: Number of rows in the manifest.
        side_px: Width and height of the animations, in pixels.
        num_frames: Number of frames of each animation.
        format: Format of the files.
    """

    actors: int
    batch_seconds: float
    batch_size: int
    rows: int
    side_px: int = 64
    num_frames: int = 4
    format: str = "mp4"


def main() -> None:
    """Measure every requested case, print a line for each, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, nargs="+", default=[2], help="numbers of engines (default: %(default)s)")
    parser.add_argument(
        "--batch-seconds", type=float, nargs="+", default=[1.0], help="seconds for a batch (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="requests in a batch (default: %(default)s)")
    parser.add_argument(
        "--batches", type=int, default=20, help="batches of each engine: weak scaling (default: %(default)s)"
    )
    parser.add_argument("--rows", type=int, nargs="+", help="total rows for any number of engines: strong scaling")
    parser.add_argument("--side", type=int, default=64, help="width and height in pixels (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=4, help="frames of an animation (default: %(default)s)")
    parser.add_argument("--format", default="mp4", help="format of the files (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="JSON file for the figures")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case is not None:
        print(json.dumps(_measure_here(Case(**json.loads(given.case)))))
        return
    picture = {"side_px": given.side, "num_frames": given.frames, "format": given.format}
    figures = []
    print(_HEAD)
    for seconds, actors in itertools.product(given.batch_seconds, given.actors):
        for rows in given.rows or [actors * given.batches * given.batch_size]:
            figures.append(measure(Case(actors, seconds, given.batch_size, rows, **picture)))
            print(_line(figures[-1]), flush=True)
    if given.json:
        about = {"python": platform.python_version(), "ray": ray.__version__, "cpus": os.cpu_count()}
        given.json.write_text(json.dumps(about | {"runs": figures}, indent=2) + "\n", encoding="utf-8")


def measure(case: Case) -> dict[str, Any]:
    """Run a case in a separate process.

    Returns:
        The case, and

        - `busy`: share of the time between its first and its last batch in which an engine works, mean of all engines.
          A batch counts as `batch_seconds`, so that waking up late does not count as work. `busy_least`: share of the
          least busy engine. `busy_steady`: mean share while all engines have work.
        - `gap_ms_median`, `gap_ms_p95`: time between two batches of an engine.
        - `start_s`: time from the start of the chain to the first batch; `start_all_s`: to the last engine's first.
        - `rows_per_s`: rows per second while all engines have work; `seconds`: duration of the whole run.
        - `driver_ms_per_row`: CPU time of the driver between the first and the last commit, per row; `driver_share`:
          the same as a share of a core. `cpu_ms_per_row`: CPU time of all processes of the run, by kind.
        - `driver_mb`: peak memory of the driver up to the last commit; `driver_mb_before`: up to the start of the
          chain; `driver_mb_published`: up to the end, with results and report written.

    Raises:
        subprocess.CalledProcessError: The run failed; its messages are on standard error.
    """
    return measured_in_own_process(__file__, asdict(case))


def measured_in_own_process(program: str, case: dict[str, Any]) -> dict[str, Any]:
    """Return the figures that `program --case JSON` prints as its last line.

    Raises:
        subprocess.CalledProcessError: The program failed; its messages are on standard error.
    """
    command = [sys.executable, program, "--case", json.dumps(case)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE)  # noqa: S603 - a program of this folder
    figures: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return figures


# --- a run, in its own process --------------------------------------------------------------------------------------


def _measure_here(case: Case) -> dict[str, Any]:
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="pia-batch-chain-") as name:
        folder = Path(name)
        config = _config(folder, case)
        engine_id = make_plan(config).engine_ids["default"]
        (folder / "batches").mkdir()
        start_ray(case.actors)
        try:
            watch = _Observer()
            began = time.monotonic()
            summary = run(
                config,
                on_progress=watch.see,
                load_engines=SimulatedLoader(engine_id, case.batch_seconds, folder / "batches", case.actors),
            )
            seconds = time.monotonic() - began
        finally:
            ray.shutdown()
        if summary.succeeded != case.rows:
            msg = f"{summary.succeeded} of {case.rows} rows succeeded: {summary.failures}"
            raise RuntimeError(msg)
        batches = batch_records(folder / "batches")
    figures = asdict(case) | {"seconds": round(seconds, 2)}
    return figures | engine_figures(case, batches, watch.began) | watch.figures()


def start_ray(actors: int) -> None:
    """Start Ray on this machine as a run does, with enough CPUs for the engines."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with own_ray_node.started_by_init():
        ray.init(
            address="local",
            num_cpus=math.ceil(OTHER_CPUS + ENGINE_CPUS * actors),
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=500 * 2**20,
            logging_level=logging.ERROR,
        )


def _config(folder: Path, case: Case) -> RunConfig:
    return RunConfig.load(
        None,
        {
            "manifest": write_manifest(folder / "manifest", case.rows, case.side_px),
            "output": str(folder / "out"),
            "placement.batch_size": case.batch_size,
            "placement.num_cpus": ENGINE_CPUS,
            "placement.fetch_num_cpus": FETCH_CPUS,
            "placement.min_engines": case.actors,
            "placement.max_engines": case.actors,
            "defaults.width": case.side_px,
            "defaults.height": case.side_px,
            "defaults.num_frames": case.num_frames,
            "defaults.format": case.format,
        },
    )


# --- the figures ----------------------------------------------------------------------------------------------------


def engine_figures(case: Case, records: list[npt.NDArray[np.float64]], began: float) -> dict[str, Any]:
    """Return the figures of the engines. `records`: as from `batch_records`; every engine has at least one batch."""
    first = np.array([each[0, 0] for each in records])
    last = np.array([each[-1, 1] for each in records])
    busy = np.array([len(each) for each in records]) * case.batch_seconds / (last - first)
    gaps = np.concatenate([each[1:, 0] - each[:-1, 1] for each in records])
    all_of_them = np.concatenate(records)
    opens, closes = first.max(), last.min()
    inside = np.clip(np.minimum(all_of_them[:, 1], closes) - np.maximum(all_of_them[:, 0], opens), 0, None)
    batches = float((inside / (all_of_them[:, 1] - all_of_them[:, 0])).sum())  # batches at either end count in part
    steady = closes - opens if closes > opens else np.nan
    return {
        "engines": len(records),
        "busy": _rounded(busy.mean(), 4),
        "busy_least": _rounded(busy.min(), 4),
        "busy_steady": _rounded(batches * case.batch_seconds / (len(records) * steady), 4),
        "gap_ms_median": _rounded(np.median(gaps) * 1e3, 1) if len(gaps) else None,
        "gap_ms_p95": _rounded(np.quantile(gaps, 0.95) * 1e3, 1) if len(gaps) else None,
        "start_s": _rounded(first.min() - began, 2),
        "start_all_s": _rounded(first.max() - began, 2),
        "rows_per_s": _rounded(batches * case.batch_size / steady, 2),
    }


def _rounded(value: float, digits: int) -> float | None:
    return None if np.isnan(value) else round(float(value), digits)


@dataclass(frozen=True)
class _Sample:
    """State of the run: committed rows, clock, CPU seconds by kind of process, peak memory of the driver."""

    rows: int
    at: float
    cpu: dict[str, float]
    mb: float


class _Observer:
    """Observer that samples the run's processes after the first and after the last commit."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self._mb_before = 0.0
        self._total = 0
        self._samples: list[_Sample] = []

    def see(self, progress: Progress) -> None:
        """Receive the progress of a run."""
        if not self._mb_before:
            self.began, self._mb_before = time.monotonic(), _peak_mb()
        if (progress.computed and not self._samples) or progress.computed == progress.total > self._total:
            self._samples.append(_Sample(progress.computed, time.monotonic(), _cpu_seconds(), _peak_mb()))
            self._total = progress.total if progress.computed == progress.total else 0

    def figures(self) -> dict[str, Any]:
        """Return the driver's figures of `measure`."""
        first, last = self._samples[0], self._samples[-1]
        rows, seconds = last.rows - first.rows, last.at - first.at
        spent = {kind: cpu - first.cpu.get(kind, 0.0) for kind, cpu in last.cpu.items()}
        steps = {"driver_mb_before": self._mb_before, "driver_mb": last.mb, "driver_mb_published": _peak_mb()}
        mb = {name: round(value) for name, value in steps.items()}
        if not rows:
            return mb | {"driver_ms_per_row": None, "driver_share": None, "cpu_ms_per_row": {}}
        return mb | {
            "driver_ms_per_row": round(spent["driver"] / rows * 1e3, 2),
            "driver_share": round(spent["driver"] / seconds, 3),
            "cpu_ms_per_row": {kind: round(cpu / rows * 1e3, 2) for kind, cpu in sorted(spent.items()) if cpu > 0},
        }


def _cpu_seconds() -> dict[str, float]:
    """Return CPU seconds of this process and its children, by kind; ended ones count for the process that waited."""
    totals = {"driver": time.process_time()}
    for process in psutil.Process().children(recursive=True):
        try:
            times, command = process.cpu_times(), " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        kind = next((kind for word, kind in _KINDS.items() if word in command), "other")
        totals[kind] = totals.get(kind, 0.0) + times.user + times.system + times.children_user + times.children_system
    return totals


_KINDS = {
    "ray::MapWorker(MapBatches(AnimateActor))": "engines",
    "ray::AttemptTracker": "attempt tracker",
    "ray::": "tasks",
    "raylet": "raylet",
    "gcs_server": "gcs",
}
"""Kinds of processes by a part of the command line; the first match counts."""


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


_HEAD = (
    f"{'engines':>7}{'batch s':>8}{'rows':>7}{'busy %':>8}{'least':>7}{'steady':>7}{'gap ms':>7}{'p95':>7}"
    f"{'start s':>8}{'rows/s':>8}{'driver ms/row':>14}{'share %':>8}{'all ms/row':>11}{'MB':>6}"
)


def _line(one: dict[str, Any]) -> str:
    percent = [_shown(one[name], 100) for name in ("busy", "busy_least", "busy_steady")]
    every = sum(one["cpu_ms_per_row"].values())
    return (
        f"{one['actors']:>7}{one['batch_seconds']:>8g}{one['rows']:>7}{percent[0]:>8}{percent[1]:>7}{percent[2]:>7}"
        f"{_shown(one['gap_ms_median']):>7}{_shown(one['gap_ms_p95']):>7}{_shown(one['start_all_s']):>8}"
        f"{_shown(one['rows_per_s']):>8}{_shown(one['driver_ms_per_row']):>14}{_shown(one['driver_share'], 100):>8}"
        f"{_shown(every):>11}{one['driver_mb']:>6}"
    )


def _shown(value: float | None, times: float = 1.0) -> str:
    return "-" if value is None else f"{value * times:.4g}"


if __name__ == "__main__":
    main()
