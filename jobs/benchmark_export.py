"""Measure `export` next to a bare Ray Data script that reads and writes the same bytes, in turns, in one run.

    python jobs/benchmark_export.py --rows 100000                # some minutes, about 6 GB in --folder
    python jobs/benchmark_export.py --rows 10000 --format webdataset --json export.json

Creates an output whose animations are random bytes of one size. The bare script is `read_binary_files` and
`write_parquet`: it has no columns but the path, checks nothing, and cannot be continued. Both run on one Ray.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the submitted copy of pia_batch, not an installed one

import ray
import ray.data
from peak_memory import PeakMemory, of_children

from pia_batch import export
from pia_batch.driver import own_ray_node
from pia_batch.journal.layout import animation_name
from pia_batch.journal.log import Journal
from pia_batch.journal.results import publish
from pia_batch.schema.columns import results_table
from pia_batch.schema.keys import KeySet, keys_from_hex
from pia_batch.storage.object_store import Store

FRAGMENT_ROWS = 1000


def main() -> None:
    """Create the output, then run both sides in turns and print their speed and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="animations (default: %(default)s)")
    parser.add_argument("--bytes", type=int, default=20_000, help="size of each, in bytes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side (default: %(default)s)")
    parser.add_argument("--format", default="parquet", help="format of the export (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="folder for the data (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pia-batch-benchmark-", dir=options.folder) as name:
        figures = measure(Path(name), options.rows, options.bytes, options.rounds, options.format)
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def measure(folder: Path, rows: int, num_bytes: int, rounds: int, file_format: str) -> dict[str, Any]:
    """Return seconds, rows a second and peak memory of both sides, the best turn of each, and their ratio.

    Args:
        folder: Empty folder.
        rows: Number of animations.
        num_bytes: Size of each, in bytes.
        rounds: Turns of each side.
        file_format: Format of the export.
    """
    output = folder / "out"
    make_output(Store(str(output)), rows, num_bytes)
    with own_ray_node.started_by_init():
        ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", object_store_memory=500 * 2**20)
    ray.data.DataContext.get_current().enable_progress_bars = False
    sides: dict[str, Callable[[Path], Any]] = {
        "bare": lambda to: bare(output, to),
        "export": lambda to: export(str(output), str(to), file_format),
    }
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in sides.items():
            to = folder / f"{name}-{number}"
            with PeakMemory(_largest_private_memory, 0.1) as memory:
                begun = time.perf_counter()
                side(to)
                seconds = time.perf_counter() - begun
            turns[name].append({"seconds": round(seconds, 2), "peak_mb": round(memory.num_bytes / 1e6)})
            shutil.rmtree(to)
    ray.shutdown()
    best = {name: min(each["seconds"] for each in all_turns) for name, all_turns in turns.items()}
    return {
        "rows": rows,
        "bytes": num_bytes,
        "format": file_format,
        "turns": turns,
        "rows_per_second": {name: round(rows / seconds) for name, seconds in best.items()},
        "ratio": round(best["bare"] / best["export"], 3),
    }


def bare(output: Path, to: Path) -> None:
    """Read every animation and write them as Parquet, by Ray Data alone."""
    ray.data.read_binary_files(str(output / "animations"), include_paths=True).write_parquet(str(to))


def make_output(store: Store, rows: int, num_bytes: int) -> None:
    """Publish results whose animations are random bytes."""
    random, record = np.random.default_rng(0), Journal(store)
    wanted = []
    for start in range(0, rows, FRAGMENT_ROWS):
        numbers = range(start, min(start + FRAGMENT_ROWS, rows))
        data = [random.bytes(num_bytes) for _ in numbers]
        keys = [hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest() for number in numbers]
        names = [animation_name(key, "mp4") for key in keys]
        for _ in store.each(lambda item: store.replace(*item), zip(names, data, strict=True)):
            pass
        columns = {
            "request_id": pa.array([f"request-{number:08d}" for number in numbers]),
            "key": pa.array(keys),
            "status": pa.repeat("succeeded", len(data)),
            "animation_uri": pa.array([store.uri_of(name) for name in names]),
            "prompt": pa.array([f"a fox in the snow, number {number}" for number in numbers]),
            "model": pa.repeat("default", len(data)),
            "format": pa.repeat("mp4", len(data)),
            "num_bytes": pa.array([len(each) for each in data]),
            "sha256": pa.array([hashlib.sha256(each).hexdigest() for each in data]),
            "motion": pa.array(random.random(len(data))),
            "seed": pa.array(numbers),
        }
        record.append(results_table(columns, pa.table({}), len(data)))
        wanted += keys
    publish(record, record.outcomes(), KeySet.of(keys_from_hex(pa.array(wanted))), pa.schema([]), "run-1", {})


def _largest_private_memory() -> int:
    """Return the private memory of the largest process below this one, in bytes."""

    def private(process: psutil.Process) -> int:
        memory = process.memory_info()
        return int(memory.rss - memory.shared)

    return max(of_children(private), default=0)


if __name__ == "__main__":
    main()
