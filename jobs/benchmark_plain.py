"""Compare a run with the plain script of plain_ray_data.py, both with an engine of the same known speed.

    python jobs/benchmark_plain.py
    python jobs/benchmark_plain.py --only events

First both animate the same manifest, from the image to the file. A batch takes as long as its rows one by one, so that
batching gains nothing. Then both handle a row without an image, a driver that is killed half way and restarted, and a
restart after everything is done. Each run has its own process and its own Ray.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import plain_ray_data
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from benchmark_chain import ENGINE_CPUS, FETCH_CPUS, start_ray
from PIL import Image
from simulated_engine import SimulatedEngine, SimulatedLoader, batch_records, write_manifest

from pia_batch.config import RunConfig
from pia_batch.driver.run import run
from pia_batch.errors import PiaBatchError
from pia_batch.planning.plan import make_plan


@dataclass(frozen=True)
class Job:
    """One start of one of the two programs.

    Attributes:
        side: `plain` or `run`.
        folder: Folder of the manifest, the output and the engine's records.
        row_seconds: Duration of a row, in seconds.
        size: Width and height, in pixels.
        frames: Number of frames of an animation.
        format: Format of the files of `run`; the plain script writes GIF.
        batch_size: Number of requests in a batch of `run`.
    """

    side: str
    folder: str
    row_seconds: float
    size: int
    frames: int
    format: str = "gif"
    batch_size: int = 4

    @property
    def notes(self) -> Path:
        """Folder of the engines' records."""
        return Path(self.folder) / "batches"

    @property
    def output(self) -> Path:
        """Folder of the animations."""
        return Path(self.folder) / "out"


@dataclass(frozen=True)
class SimulatedPipeline:
    """Pipeline for the plain script: returns frames after the given seconds, and records the time."""

    engine: SimulatedEngine
    num_frames: int

    def __call__(self, image: Image.Image, prompt: str, num_inference_steps: int) -> SimpleNamespace:
        """Return frames as `PIAPipeline` does: a list of images for each row."""
        del prompt, num_inference_steps
        (clip,) = self.engine.animate([SimpleNamespace(image=image.convert("RGB"), num_frames=self.num_frames)])
        return SimpleNamespace(frames=[[Image.fromarray(frame) for frame in clip.frames]])


def main() -> None:
    """Compare both, print the figures, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24, help="rows of the manifest (default: %(default)s)")
    parser.add_argument("--row-seconds", type=float, default=1.5, help="seconds for a row (default: %(default)s)")
    parser.add_argument("--side", type=int, default=512, help="width and height in pixels (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip (default: %(default)s)")
    parser.add_argument("--only", choices=["speed", "events"], help="run only this half")
    parser.add_argument("--json", type=Path, help="JSON file for the figures")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job is not None:
        sys.exit(_start(Job(**json.loads(given.job))))
    figures = {}
    if given.only != "events":
        figures["speed"] = _compare_speed(given)
    if given.only != "speed":
        figures["events"] = _compare_events()
    if given.json:
        given.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _compare_speed(given: argparse.Namespace) -> list[dict[str, Any]]:
    figures = []
    print(f"{'':22}{'busy %':>8}{'rows/s':>8}{'seconds':>9}")
    for name, side, kind in (("plain, GIF", "plain", "gif"), ("run, GIF", "run", "gif"), ("run, MP4", "run", "mp4")):
        cost = _speed(Job(side, "", given.row_seconds, given.side, given.frames, kind), given.rows)
        figures.append({"what": name} | cost)
        print(f"{name:22}{cost['busy'] * 100:>8.1f}{cost['rows_per_s']:>8.2f}{cost['seconds']:>9.1f}", flush=True)
    return figures


def _compare_events() -> list[dict[str, Any]]:
    figures = []
    print(f"{'':34}{'exit code':>10}{'results':>9}{'of rows':>9}{'clips':>7}")
    for event, happens in EVENTS.items():
        for side in ("plain", "run"):
            outcome = happens(Job(side, "", 0.2, 64, 4), 24)
            figures.append({"what": event, "side": side} | outcome)
            print(
                f"{event + ': ' + side:34}{outcome['exit_code']:>10}{outcome['results']:>9}{outcome['rows']:>9}"
                f"{outcome['generated']:>7}",
                flush=True,
            )
    return figures


# --- in the process of a job ----------------------------------------------------------------------------------------


def _start(job: Job) -> int:
    logging.disable(logging.WARNING)
    start_ray(1)
    try:
        return _plain(job) if job.side == "plain" else _run(job)
    finally:
        ray.shutdown()


def _plain(job: Job) -> int:
    ray.data.DataContext.get_current().enable_progress_bars = False
    engine = SimulatedEngine("", job.row_seconds, job.notes)
    manifest = f"{job.folder}/manifest/requests.parquet"
    plain_ray_data.run(manifest, job.output, lambda: SimulatedPipeline(engine, job.frames), 0, job.size, 25)
    return 0


def _run(job: Job) -> int:
    config = RunConfig.load(
        None,
        {
            "manifest": f"{job.folder}/manifest/requests.parquet",
            "output": str(job.output),
            "placement.batch_size": job.batch_size,
            "placement.num_cpus": ENGINE_CPUS,
            "placement.fetch_num_cpus": FETCH_CPUS,
            "defaults.width": job.size,
            "defaults.height": job.size,
            "defaults.num_frames": job.frames,
            "defaults.format": job.format,
            "limits.lease_ttl_s": 5,
            "limits.lease_wait_s": 30,
        },
    )
    engine_id = make_plan(config).engine_ids["default"]
    loader = SimulatedLoader(engine_id, job.row_seconds * job.batch_size, job.notes)
    try:
        return run(config, load_engines=loader).exit_code
    except PiaBatchError as err:
        print(err, file=sys.stderr)
        return err.exit_code


# --- what is done with them -----------------------------------------------------------------------------------------


def _prepared(job: Job, folder: str, rows: int, missing: int | None = None) -> Job:
    """Return the job in this folder, with its manifest; the image of row number `missing` does not exist."""
    path = Path(write_manifest(Path(folder) / "manifest", rows, job.size)) / "requests.parquet"
    table = pq.read_table(path)
    images = [f"{path.parent}/{name}" for name in table["image"].to_pylist()]
    if missing is not None:
        images[missing] = f"{path.parent}/images/gone.png"
    pq.write_table(table.set_column(1, "image", pa.array(images)), path)
    prepared = replace(job, folder=folder)
    prepared.notes.mkdir()
    return prepared


def _begin(job: Job) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--job", json.dumps(asdict(job))]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603 - this program


def _speed(job: Job, rows: int) -> dict[str, float]:
    """Return the engine's busy share from the first to the last row, its rows per second, and the duration."""
    with tempfile.TemporaryDirectory(prefix="pia-batch-plain-") as folder:
        job = _prepared(job, folder, rows)
        began = time.monotonic()
        if _begin(job).wait():
            msg = f"{job} failed"
            raise RuntimeError(msg)
        seconds = time.monotonic() - began
        (batches,) = batch_records(job.notes)
    begun = batches[-1, 0] - batches[0, 0]  # from call to call, so that work between two calls counts
    pace = float(batches[:-1, 2].sum() / begun)
    return {"busy": round(pace * job.row_seconds, 4), "rows_per_s": round(pace, 3), "seconds": round(seconds, 1)}


def _outcome(job: Job, exit_code: int, rows: int, before: int = 0) -> dict[str, int]:
    """Return the outcome for a user; `generated` counts the rows generated after the first `before`."""
    return {"exit_code": exit_code, "results": _results(job), "rows": rows, "generated": _generated(job) - before}


def _generated(job: Job) -> int:
    """Return the number of rows that engines have generated so far."""
    return int(sum(each[:, 2].sum() for each in batch_records(job.notes)))


def _results(job: Job) -> int:
    """Return the number of result rows that a reader of the folder gets."""
    folder = job.output / "results"
    if job.side == "run" and (folder / "LATEST.json").exists():
        folder /= json.loads((folder / "LATEST.json").read_text())["run_id"]
    return sum(pq.read_metadata(path).num_rows for path in folder.rglob("*.parquet"))


def _no_image(job: Job, rows: int) -> dict[str, int]:
    with tempfile.TemporaryDirectory(prefix="pia-batch-plain-") as folder:
        job = _prepared(job, folder, rows, missing=rows // 2)
        return _outcome(job, _begin(job).wait(), rows)


def _killed(job: Job, rows: int) -> dict[str, int]:
    with tempfile.TemporaryDirectory(prefix="pia-batch-plain-") as folder:
        job = _prepared(job, folder, rows)
        process = _begin(job)
        while _generated(job) < rows // 2 and process.poll() is None:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        before = _settled(job)
        return _outcome(job, _begin(job).wait(), rows, before)


def _again(job: Job, rows: int) -> dict[str, int]:
    with tempfile.TemporaryDirectory(prefix="pia-batch-plain-") as folder:
        job = _prepared(job, folder, rows)
        _begin(job).wait()
        before = _generated(job)
        return _outcome(job, _begin(job).wait(), rows, before)


def _settled(job: Job) -> int:
    """Return the number of generated rows, once the killed driver's engine has ended, too."""
    before = -1
    while before != (before := _generated(job)):
        time.sleep(job.row_seconds * job.batch_size + 2)
    return before


EVENTS: dict[str, Callable[[Job, int], dict[str, int]]] = {
    "a row without an image": _no_image,
    "killed half way, started again": _killed,
    "started again when all is done": _again,
}

if __name__ == "__main__":
    main()
