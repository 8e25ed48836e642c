"""Costs at ten million requests, checked at a fraction of that: each function is a check for `check_speed`.

A check gives one number, the more the better. It takes some seconds, compares CPU seconds (those of the processes that
it starts included) or memory of both sides in one program, and needs no network.

    python tests/perf/check_scale.py                            # all of them
    python tests/perf/check_scale.py finalised_mb FOLDER ROWS   # what one of them starts
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "jobs"))

import benchmark_scale  # noqa: E402 - it lies in jobs/

from pia_batch.planning.plan import make_plan  # noqa: E402
from pia_batch.planning.statistics import Statistics  # noqa: E402

PLANNED_ROWS = 200_000
LOOPED_ROWS = 20_000
FINALISED_ROWS = (100_000, 300_000)
FRAGMENT_ROWS = 1000


def main() -> None:
    """Print each check's number and the least it must be."""
    if sys.argv[1:2] == ["finalised_mb"]:
        print(_finalised_mb(Path(sys.argv[2]), int(sys.argv[3])))  # noqa: T201
        return
    for least, check in CHECKS:
        print(f"{check():7.2f}  at least {least:5.2f}  {check.__doc__}", flush=True)  # noqa: T201


def first_plan() -> float:
    """First plan, each row read, validated and hashed: times as cheap as a loop that writes and hashes its JSON."""
    with tempfile.TemporaryDirectory() as name:
        config = _manifest(Path(name), PLANNED_ROWS)
        make_plan(config.model_copy(update={"manifest": f"{config.manifest}/part-1.parquet"}))
        rows = pq.read_table(Path(name) / "manifest").slice(0, LOOPED_ROWS).to_pylist()
        defaults = config.defaults.model_dump(mode="json")
        looped = min(_cpu_seconds(lambda: [_looped_key(defaults | row) for row in rows]) for _ in range(2))
        planned = min(_cpu_seconds(lambda: make_plan(config)) for _ in range(2))
        return (looped / LOOPED_ROWS) / (planned / PLANNED_ROWS)


def _looped_key(request: dict[str, Any]) -> str:
    said = json.dumps(request, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()


def known_plan() -> float:
    """Plan and statistics of 200,000 rows that were scanned before, 70 % finished: times as cheap as the first."""
    with tempfile.TemporaryDirectory() as name:
        config = _manifest(Path(name), PLANNED_ROWS)
        first = _cpu_seconds(lambda: make_plan(config, statistics=Statistics()).save_scan())
        benchmark_scale._finish(0.7)(config, FRAGMENT_ROWS)
        benchmark_scale._compact(config, FRAGMENT_ROWS)
        return first / min(_cpu_seconds(lambda: make_plan(config, statistics=Statistics())) for _ in range(3))


def finalise_memory() -> float:
    """Memory that finalising adds: that of 100,000 rows as a share of that of 300,000."""
    with tempfile.TemporaryDirectory() as name:
        small, large = (_in_own_process(Path(name) / str(rows), rows) for rows in FINALISED_ROWS)
        return small / large


def export_speed() -> float:
    """Export of 10,000 animations of 20 kB as Parquet: times as fast as a bare Ray Data script with the same bytes."""
    return float(_exported("--rows", "10000", "--bytes", "20000")["ratio"])


def export_memory() -> float:
    """Memory of a worker that exports 100 MB: as a share of that for 400 MB."""
    small, large = (_exported("--rows", "2000", "--bytes", size, "--rounds", "1") for size in ("50000", "200000"))
    return float(small["turns"]["export"][0]["peak_mb"] / large["turns"]["export"][0]["peak_mb"])


def _exported(*options: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "figures.json"
        command = [sys.executable, str(ROOT / "jobs" / "benchmark_export.py"), *options, "--json", str(path)]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
        return dict(json.loads(path.read_text()))


CHECKS: tuple[tuple[float, Callable[[], float]], ...] = (
    (1.8, first_plan),
    (4.0, known_plan),
    (0.5, finalise_memory),
    (0.8, export_speed),
    (0.5, export_memory),
)
"""The least that each must be."""


def _manifest(folder: Path, rows: int) -> Any:
    for number in range(2):
        path = folder / "manifest" / f"part-{number}.parquet"
        benchmark_scale._write_file(path, number * rows // 2, (number + 1) * rows // 2)
        os.utime(path, (1_700_000_000 + number, 1_700_000_000 + number))  # a file of just now is read again
    return benchmark_scale._config(folder)


def _in_own_process(folder: Path, rows: int) -> float:
    command = [sys.executable, __file__, "finalised_mb", str(folder), str(rows)]
    return float(subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout)


def _finalised_mb(folder: Path, rows: int) -> float:
    config = _manifest(folder, rows)
    make_plan(config).save_scan()
    benchmark_scale._finish(1.0)(config, FRAGMENT_ROWS)
    return float(benchmark_scale._finalise(config, FRAGMENT_ROWS)["grown_mb"])


def _cpu_seconds(call: Callable[[], Any]) -> float:
    before = os.times()
    call()
    return sum(os.times()[:4]) - sum(before[:4])


if __name__ == "__main__":
    main()
