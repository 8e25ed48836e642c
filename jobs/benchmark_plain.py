"""A run beside the plain script of plain_ray_data.py: what each costs with an engine of the same known speed.

    python jobs/benchmark_plain.py
    python jobs/benchmark_plain.py --only events

First both animate the same manifest, from the image to the file; a batch takes the engine as long as its rows would one
after the other, so that nothing is won by drawing several at once. Then both meet a row without an image, a driver that
is killed half way and started again, and a second start of what is done. Each run has a process and a Ray of its own.
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
from simulated_engine import SimulatedEngine, SimulatedLoader, drawings, write_manifest

from pia_batch.config import RunConfig
from pia_batch.driver.run import run
from pia_batch.errors import PiaBatchError
from pia_batch.planning.plan import make_plan


@dataclass(frozen=True)
class Job:
    """One start of one of the two.

    Attributes:
        side: `plain` or `run`.
        folder: of the manifest, the outputs and the notes of the engine.
        row_seconds: that the engine needs for a row.
        size: width and height, pixels.
        frames: of an animation.
        format: of the files of `run`; the plain script writes GIF.
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
        """Where the engines leave theirs."""
        return Path(self.folder) / "drawn"

    @property
    def output(self) -> Path:
        """Where the animations go."""
        return Path(self.folder) / "out"


@dataclass(frozen=True)
class SimulatedPipeline:
    """What the plain script calls: a frame list after so many seconds, and a note of when."""

    engine: SimulatedEngine
    num_frames: int

    def __call__(self, image: Image.Image, prompt: str, num_inference_steps: int) -> SimpleNamespace:
        """As `PIAPipeline`: `frames` has a list of pictures for each row."""
        del prompt, num_inference_steps
        (clip,) = self.engine.animate([SimpleNamespace(image=image.convert("RGB"), num_frames=self.num_frames)])
        return SimpleNamespace(frames=[[Image.fromarray(frame) for frame in clip.frames]])


def main() -> None:
    """Compare both, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--row-seconds", type=float, default=1.5, help="of the engine; default: 1.5")
    parser.add_argument("--side", type=int, default=512, help="pixels; default: 512")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--only", choices=["speed", "events"], help="one half of it")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job is not None:
        sys.exit(_start(Job(**json.loads(given.job))))
    told = {}
    if given.only != "events":
        told["speed"] = _compare_speed(given)
    if given.only != "speed":
        told["events"] = _compare_events()
    if given.json:
        given.json.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _compare_speed(given: argparse.Namespace) -> list[dict[str, Any]]:
    told = []
    print(f"{'':22}{'busy %':>8}{'rows/s':>8}{'seconds':>9}")
    for name, side, kind in (("plain, GIF", "plain", "gif"), ("run, GIF", "run", "gif"), ("run, MP4", "run", "mp4")):
        cost = _speed(Job(side, "", given.row_seconds, given.side, given.frames, kind), given.rows)
        told.append({"what": name} | cost)
        print(f"{name:22}{cost['busy'] * 100:>8.1f}{cost['rows_per_s']:>8.2f}{cost['seconds']:>9.1f}", flush=True)
    return told


def _compare_events() -> list[dict[str, Any]]:
    told = []
    print(f"{'':34}{'exit code':>10}{'results':>9}{'of rows':>9}{'drawn':>7}")
    for event, happens in EVENTS.items():
        for side in ("plain", "run"):
            outcome = happens(Job(side, "", 0.2, 64, 4), 24)
            told.append({"what": event, "side": side} | outcome)
            print(
                f"{event + ': ' + side:34}{outcome['exit_code']:>10}{outcome['results']:>9}{outcome['rows']:>9}"
                f"{outcome['drawn']:>7}",
                flush=True,
            )
    return told


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
    """The job in this folder, with its manifest; the image of row number `missing` is not there."""
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
    """How busy its engine is from the first row to the last, and how many rows it makes a second."""
    with tempfile.TemporaryDirectory(prefix="pia-batch-plain-") as folder:
        job = _prepared(job, folder, rows)
        began = time.monotonic()
        if _begin(job).wait():
            msg = f"{job} failed"
            raise RuntimeError(msg)
        seconds = time.monotonic() - began
        (drawn,) = drawings(job.notes)
    begun = drawn[-1, 0] - drawn[0, 0]  # from call to call, so that what one leaves to be done before the next counts
    pace = float(drawn[:-1, 2].sum() / begun)
    return {"busy": round(pace * job.row_seconds, 4), "rows_per_s": round(pace, 3), "seconds": round(seconds, 1)}


def _outcome(job: Job, exit_code: int, rows: int, before: int = 0) -> dict[str, int]:
    """What a user finds afterwards; `drawn` counts rows since there were `before`."""
    return {"exit_code": exit_code, "results": _results(job), "rows": rows, "drawn": _drawn(job) - before}


def _drawn(job: Job) -> int:
    """Rows that engines have drawn so far."""
    return int(sum(each[:, 2].sum() for each in drawings(job.notes)))


def _results(job: Job) -> int:
    """Rows of the results as a reader of that folder gets them."""
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
        while _drawn(job) < rows // 2 and process.poll() is None:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        before = _settled(job)
        return _outcome(job, _begin(job).wait(), rows, before)


def _again(job: Job, rows: int) -> dict[str, int]:
    with tempfile.TemporaryDirectory(prefix="pia-batch-plain-") as folder:
        job = _prepared(job, folder, rows)
        _begin(job).wait()
        before = _drawn(job)
        return _outcome(job, _begin(job).wait(), rows, before)


def _settled(job: Job) -> int:
    """Rows drawn, once the killed driver's engine is gone too."""
    before = -1
    while before != (before := _drawn(job)):
        time.sleep(job.row_seconds * job.batch_size + 2)
    return before


EVENTS: dict[str, Callable[[Job, int], dict[str, int]]] = {
    "a row without an image": _no_image,
    "killed half way, started again": _killed,
    "started again when all is done": _again,
}

if __name__ == "__main__":
    main()
