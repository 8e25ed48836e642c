"""Measure what a run costs its driver alone: the chain around engines that only wait. No image, no file, no store.

    python jobs/benchmark_driver.py                                                  # 3,000 and 30,000 rows
    python jobs/benchmark_driver.py --rows 300000                                    # memory: some minutes
    python jobs/benchmark_driver.py --actors 64 --batch-seconds 1 --rows 7680        # are the engines busy?

Reading, validation, tasks, attempts and the driver's monitor are those of a run. Fetching, encoding and committing are
left out, so that hundreds of thousands of rows, or many engines, fit on a small machine. Each line is a run in a
separate process. `benchmark_chain.py` measures the same with images, files and commits.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import ray
from benchmark_chain import ENGINE_CPUS, FETCH_CPUS, measured_in_own_process, start_ray
from simulated_engine import batch_records, wait_for_crew, write_manifest

from pia_batch.config import RunConfig
from pia_batch.driver import monitor
from pia_batch.driver.budget import Budget
from pia_batch.driver.monitor import RunControls
from pia_batch.driver.progress import Progress
from pia_batch.pipeline import batching
from pia_batch.pipeline.attempts_actor import RemoteAttemptControl, start_attempt_tracker
from pia_batch.pipeline.chain import fetched_and_animated, pending_requests
from pia_batch.pipeline.heartbeat import Heartbeat
from pia_batch.pipeline.outcomes import outcome_of, outcomes_table
from pia_batch.planning.plan import make_plan

MARKS = 20
"""Number of moments of a run at which the driver's memory is measured."""


def main() -> None:
    """Measure every requested case, print a line for each, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[3000, 30_000], help="numbers of rows, a run each (default: %(default)s)"
    )
    parser.add_argument("--actors", type=int, default=2, help="number of engines (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="requests in a batch (default: %(default)s)")
    parser.add_argument("--batch-seconds", type=float, default=0, help="seconds for a batch (default: %(default)s)")
    parser.add_argument("--batches-per-task", type=int, help="batches in each task (default: as many as a run gives)")
    parser.add_argument("--json", type=Path, help="JSON file for the figures")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case is not None:
        print(json.dumps(_measure_here(**json.loads(given.case))))
        return
    figures = []
    for rows in given.rows:
        figures.append(measure(rows, given.actors, given.batch_size, given.batch_seconds, given.batches_per_task))
        shown = {name: value for name, value in figures[-1].items() if name != "mb_by_rows"}
        print("  ".join(f"{name} {value}" for name, value in shown.items()), flush=True)
    if given.json:
        given.json.write_text(json.dumps({"cpus": os.cpu_count(), "runs": figures}, indent=2) + "\n", encoding="utf-8")


def measure(
    rows: int, actors: int = 2, batch_size: int = 4, batch_seconds: float = 0.0, batches: int | None = None
) -> dict[str, Any]:
    """Run a case in a separate process.

    Args:
        rows: Number of rows of the manifest.
        actors: Number of engines.
        batch_size: Number of requests in a batch.
        batch_seconds: Duration of a batch, in seconds.
        batches: Number of batches in each task; None: as many as a run gives an engine at a time.

    Returns:
        The case, and

        - `batches_per_task`: number of batches that an engine is given at a time.
        - `engines_loaded`: number of engines that became ready in the whole run.
        - `driver_ms_per_row`: CPU time of the driver, from the first rows that ended to the last, per row.
        - `mb_by_rows`: pairs of rows that have ended and the driver's memory then, in MB, up to MARKS of them.
        - `grown_mb`: growth of that memory from a tenth of the rows to their end.
        - `busy`: as that of `benchmark_chain.measure`; None where a batch takes no time.

    Raises:
        subprocess.CalledProcessError: The run failed; its messages are on standard error.
    """
    case: dict[str, Any] = {"rows": rows, "actors": actors, "batch_size": batch_size, "batch_seconds": batch_seconds}
    case["batches"] = batches
    return measured_in_own_process(__file__, case)


# --- a run, in its own process --------------------------------------------------------------------------------------


def _measure_here(rows: int, actors: int, batch_size: int, batch_seconds: float, batches: int | None) -> dict[str, Any]:
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="pia-batch-driver-") as name:
        notes = Path(name) / "batches"
        notes.mkdir()
        settings = {
            "manifest": write_manifest(Path(name) / "manifest", rows, 64),
            "output": f"{name}/out",
            "placement.batch_size": batch_size,
            "placement.num_cpus": ENGINE_CPUS,
            "placement.fetch_num_cpus": FETCH_CPUS,
            "placement.min_engines": actors,
            "placement.max_engines": actors,
            "defaults.width": 64,
            "defaults.height": 64,
        }
        plan = make_plan(RunConfig.load(None, settings))
        start_ray(actors)
        try:
            tracker = start_attempt_tracker(plan.config.limits.max_attempts)
            may_grow = rows if batches is None else None
            batches = batches or batching.batches_per_task(plan.config, rows)
            arguments = {"control": tracker, "seconds": batch_seconds, "notes": str(notes), "crew": actors}
            dataset = fetched_and_animated(
                pending_requests(plan), plan.config, _without_images, IdleActor, arguments, batches, may_grow
            )
            watch = _Watch(rows)
            outcomes = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
            monitor.consume(outcomes, tracker, ray.cluster_resources, watch.controls(plan.config))
            engines = tracker.engine_summary()["count"]
        finally:
            ray.shutdown()
        busy = None
        if batch_seconds:
            spans = [(len(each), each[-1, 1] - each[0, 0]) for each in batch_records(notes)]
            busy = round(float(np.mean([number * batch_seconds / span for number, span in spans])), 4)
    case = {"rows": rows, "actors": actors, "batch_size": batch_size, "batch_seconds": batch_seconds}
    return case | {"batches_per_task": batches, "engines_loaded": engines, "busy": busy} | watch.figures()


def _without_images(requests: pa.Table) -> pa.Table:
    """Return what an idle engine reads, in the place of `FetchImages`."""
    return requests.select(["request_id", "key"])


class IdleActor:
    """Engine that waits, in the place of `AnimateActor`: it asks for permission and reports the end of each batch.

    Args:
        driver_version: Not used.
        control: Attempt tracker of the run.
        seconds: Duration of a batch, in seconds.
        notes: Folder in which it records the beginning and the end of its batches.
        crew: Number of engines that wait for each other before the first batch.
    """

    def __init__(self, *, driver_version: str, control: RemoteAttemptControl, seconds: float, notes: str, crew: int):
        del driver_version
        self._control, self._seconds, self._notes = control, seconds, Path(notes)
        self._device = threading.Lock()
        Heartbeat(control, lambda: 0.0)
        worker = ray.get_runtime_context().get_actor_id()
        control.start(worker)
        wait_for_crew(self._notes, crew)
        control.ready(worker, 0.0)

    def __call__(self, requests: pa.Table) -> pa.Table:
        """Wait for as long as a device would work, and return an outcome for each request."""
        keys = requests["key"].to_pylist()
        if keys:
            with self._device:
                self._control.begin(keys)
                began = time.monotonic()
                if self._seconds:
                    time.sleep(self._seconds)
                    with (self._notes / str(os.getpid())).open("ab") as sink:
                        sink.write(np.array([began, time.monotonic(), len(keys)]).tobytes())
        outcomes = [outcome_of(key, {"status": "succeeded", "animation_uri": f"{key}.mp4"}) for key in keys]
        self._control.end(outcomes)
        return outcomes_table(outcomes)


class _Watch:
    """Memory and CPU time of the driver by the number of rows that have ended."""

    def __init__(self, rows: int) -> None:
        self._rows, self._process = rows, psutil.Process()
        self._marks: list[tuple[int, float, float]] = []

    def controls(self, config: RunConfig) -> RunControls:
        """Return controls of a run that nothing stops."""
        progress = Progress(config, "benchmark", total=self._rows, done_before=0)
        lease: Any = SimpleNamespace(lost=threading.Event())
        return RunControls(config, progress, self._see, threading.Event(), lease, Budget(config), failed_before=0)

    def _see(self, progress: Progress) -> None:
        done = progress.computed
        before = self._marks[-1][0] if self._marks else 0
        if done > before and (not before or done == self._rows or done - before >= self._rows / MARKS):
            self._marks.append((done, self._process.memory_info().rss / 2**20, time.process_time()))

    def figures(self) -> dict[str, Any]:
        """Return the driver's figures of `measure`."""
        first, last = self._marks[0], self._marks[-1]
        tenth = next(mark for mark in self._marks if mark[0] >= self._rows / 10)
        spent = (last[2] - first[2]) / (last[0] - first[0]) if last[0] > first[0] else None
        return {
            "driver_ms_per_row": None if spent is None else round(spent * 1e3, 3),
            "driver_mb": round(last[1]),
            "grown_mb": round(last[1] - tenth[1], 1),
            "mb_by_rows": [(rows, round(mb, 1)) for rows, mb, _ in self._marks],
        }


if __name__ == "__main__":
    main()
