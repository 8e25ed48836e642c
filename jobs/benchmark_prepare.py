"""Speed of `prepare` next to a bare Ray Data read and write of the same bytes, in turns, in one run.

    python jobs/benchmark_prepare.py --rows 100000

The source is Parquet with images of `--image-bytes` random bytes and captions. Each line is one measurement; the last
one is the ratio of the medians: above 1, `prepare` is faster. Peak memory is that of Ray's workers, all together.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from peak_memory import PeakMemory, of_children

from pia_batch import prepare

ROWS_PER_FILE = 5000
"""Rows of one file of the source."""


def write_source(folder: Path, rows: int, image_bytes: int) -> None:
    """Write a Parquet source: ids, images that cannot be compressed, captions and a number."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for start in range(0, rows, ROWS_PER_FILE):
        count = min(ROWS_PER_FILE, rows - start)
        images = pa.array([rng.bytes(image_bytes) for _ in range(count)], pa.binary())
        table = pa.table(
            {
                "id": [f"row-{start + k}" for k in range(count)],
                "image": pa.StructArray.from_arrays([images, pa.nulls(count, pa.string())], ["bytes", "path"]),
                "caption": [f"a lighthouse in the evening, number {start + k}" for k in range(count)],
                "aesthetic": rng.random(count) * 10,
            }
        )
        pq.write_table(table, folder / f"{start:09d}.parquet", row_group_size=1000)


def bare(source: Path, to: Path) -> None:
    """Read and write the source by Ray Data alone."""
    ray.data.read_parquet(str(source)).write_parquet(str(to))


def prepared(source: Path, to: Path) -> None:
    """Make a manifest of the source."""
    prepare(source, to, prompt="{caption}, cinematic", columns={"request_id": "id"})


def workers_memory() -> int:
    """Return the private memory of all of Ray's workers together, in bytes."""

    def private(process: psutil.Process) -> int:
        title = "".join(process.cmdline()[:1])
        return int(process.memory_full_info().uss) if title.startswith("ray::") else 0

    return sum(of_children(private))


def measure(rows: int, image_bytes: int, rounds: int, folder: Path) -> float:
    """Measure both sides in turns, print every measurement, and return how many times as fast `prepare` is."""
    source = folder / "source"
    write_source(source, rows, image_bytes)
    sides: dict[str, Callable[[Path, Path], None]] = {"bare": bare, "prepare": prepared}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            to = folder / f"{name}-{number}"
            with PeakMemory(workers_memory) as peak:
                begun = time.perf_counter()
                side(source, to)
                elapsed = time.perf_counter() - begun
            seconds[name].append(elapsed)
            shutil.rmtree(to)
            line = {"side": name, "rows": rows, "seconds": round(elapsed, 2), "peak_mb": round(peak.num_bytes / 1e6)}
            print(json.dumps(line), flush=True)
    ratio = statistics.median(seconds["bare"]) / statistics.median(seconds["prepare"])
    print(json.dumps({"times_as_fast_as_bare": round(ratio, 2)}), flush=True)
    return ratio


def main() -> None:
    """Measure with a Ray of its own on this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the source")
    parser.add_argument("--image-bytes", type=int, default=20_000, help="bytes of each image")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side")
    parser.add_argument("--folder", type=Path, help="folder for the files, about three times the source's size")
    given = parser.parse_args()
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        measure(given.rows, given.image_bytes, given.rounds, Path(folder))
    ray.shutdown()


if __name__ == "__main__":
    main()
