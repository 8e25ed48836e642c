"""Measure the code around the engines at scale: planning, resuming and finalising many requests. No model runs.

    python jobs/benchmark_scale.py --rows 1000000                 # some minutes, about 1 GB in --folder
    python jobs/benchmark_scale.py --rows 10000000 --fragment-rows 1000 --json scale.json

Creates a manifest of Parquet files and the journal that a run would leave, and measures each step in a separate
process: seconds, CPU seconds, and the peak memory of the process and its children. All steps call `pia_batch` as a run
does; only the listing of the animations is simulated from their keys, so that no animation files are needed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from peak_memory import PeakMemory, of_children

from pia_batch.config import RunConfig
from pia_batch.journal.layout import ANIMATIONS, animation_name
from pia_batch.journal.log import Journal
from pia_batch.journal.results import publish
from pia_batch.manifest.reader import Manifest
from pia_batch.planning.plan import Plan, find_published_run, make_plan
from pia_batch.planning.scan import scan_manifest
from pia_batch.planning.scan_cache import ScanCache
from pia_batch.planning.statistics import Statistics
from pia_batch.schema.columns import results_table
from pia_batch.schema.keys import Keys, KeySet, keys_to_hex
from pia_batch.storage.object_store import ObjectInfo, Store

PROMPTS = ("a lighthouse in a storm, cinematic", "a fox in the snow, watercolour", "waves at dusk", "a red kite, windy")
CLIP_BYTES = 400_000


def main() -> None:
    """Create the data, then run each step in a separate process and print its cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the manifest (default: %(default)s)")
    parser.add_argument("--files", type=int, default=10, help="files of the manifest (default: %(default)s)")
    parser.add_argument("--fragment-rows", type=int, default=64, help="rows in a commit (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="folder for the data (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="JSON file for the figures")
    parser.add_argument("--step", choices=sorted(STEPS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step is not None:
        print(json.dumps(STEPS[given.step](_config(given.folder), given.fragment_rows)))
        return
    folder = Path(tempfile.mkdtemp(prefix="pia-batch-scale-", dir=given.folder))
    try:
        figures = _measure(folder, given.rows, given.files, given.fragment_rows)
    finally:
        shutil.rmtree(folder)
    record = {"rows": given.rows, "files": given.files, "fragment_rows": given.fragment_rows, "steps": figures}
    record |= {"python": platform.python_version(), "pyarrow": pa.__version__, "numpy": np.__version__}
    if given.json:
        given.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _measure(folder: Path, rows: int, files: int, fragment_rows: int) -> dict[str, dict[str, Any]]:
    bounds = np.linspace(0, rows, files + 1).astype(int).tolist()
    for number, (start, end) in enumerate(itertools.pairwise(bounds)):
        _write_file(folder / "manifest" / f"part-{number:05d}.parquet", start, end)
    figures = {}
    print(f"{'step':24}{'seconds':>10}{'CPU s':>10}{'peak MB':>10}{'grown MB':>10}  result")
    for step in STEPS:
        if step == "plan_grown":
            _write_file(folder / "manifest" / "part-99999.parquet", rows, rows + rows // 100)
        arguments = ["--step", step, "--folder", str(folder), "--fragment-rows", str(fragment_rows)]
        answer = subprocess.run(  # noqa: S603 - this program, in a separate process
            [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE
        )
        step_figures = json.loads(answer.stdout.splitlines()[-1])
        if step_figures is not None:
            figures[step] = step_figures
            found = ", ".join(f"{name} {value}" for name, value in step_figures.items() if name not in _COSTS)
            costs = "{seconds:>10.2f}{cpu_seconds:>10.2f}{peak_mb:>10}{grown_mb:>10}".format_map(step_figures)
            print(f"{step:24}{costs}  {found}")
    return figures


def _config(folder: Path) -> RunConfig:
    return RunConfig.load(None, {"manifest": str(folder / "manifest"), "output": str(folder / "out")})


def _write_file(path: Path, start: int, end: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = np.arange(start, end)
    text = pa.array(numbers).cast(pa.string())
    join = pc.binary_join_element_wise
    table = {
        "request_id": join("request-", text, ""),
        "image": join("s3://photographs/2026/", pa.array(numbers % 1_000_003).cast(pa.string()), ".jpg", ""),
        "prompt": join(pa.array(PROMPTS).take(pa.array(numbers % len(PROMPTS))), ", number ", text, ""),
    }
    pq.write_table(pa.table(table), path, compression="zstd", row_group_size=100_000)


# --- the steps ------------------------------------------------------------------------------------------------------


def _costs(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the cost of a function, its child processes included, and the function's own figures."""
    wall, cpu, before = time.monotonic(), _cpu_seconds(), psutil.Process().memory_info().rss
    with PeakMemory(_family_memory, 0.02) as peak:
        found = function()
    costs = {"seconds": round(time.monotonic() - wall, 2), "cpu_seconds": round(_cpu_seconds() - cpu, 2)}
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # exact, where samples may miss the peak
    grown = max(0, peak.num_bytes - before)
    return costs | {"peak_mb": round(max(own, peak.num_bytes) / 2**20), "grown_mb": round(grown / 2**20)} | found


def _cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _family_memory() -> int:
    """Return the memory of this process and its children, in bytes. Memory that they share counts once for each."""
    return psutil.Process().memory_info().rss + sum(of_children(lambda child: child.memory_info().rss))


_COSTS = ("seconds", "cpu_seconds", "peak_mb", "grown_mb")


def _found(plan: Plan) -> dict[str, Any]:
    return {
        "requests": len(plan.wanted),
        "pending": plan.num_pending,
        "files_read": len({c.file for c in plan.new_chunks}),
    }


def _plan(config: RunConfig, _: int) -> dict[str, Any]:
    return _costs(lambda: _found(make_plan(config)))


def _plan_with_statistics(config: RunConfig, _: int) -> dict[str, Any]:
    """Plan as `pia-batch plan` does, which also collects statistics of the pending requests."""
    return _costs(lambda: _found(make_plan(config, statistics=Statistics())))


def _plan_and_keep(config: RunConfig, _: int) -> dict[str, Any]:
    plan: list[Plan] = []

    def make() -> dict[str, Any]:
        plan.append(make_plan(config))
        return _found(plan[0])

    costs = _costs(make)
    start = time.monotonic()
    plan[0].save_scan()
    return costs | {"keeping_seconds": round(time.monotonic() - start, 2)}


def _no_op(config: RunConfig, _: int) -> dict[str, Any]:
    def look() -> dict[str, Any]:
        plan = make_plan(config)
        return _found(plan) | {"published": find_published_run(plan) is not None}

    return _costs(look)


def _finish(share: float) -> Callable[[RunConfig, int], None]:
    """Return a step that commits fragments until this share of the manifest's rows is finished."""

    def finish(config: RunConfig, fragment_rows: int) -> None:
        journal = Journal(Store(config.output))
        keys = _keys(config)
        done = len(journal.outcomes().keys)
        wanted = int(len(keys) * share)
        starts = range(done, wanted, fragment_rows)
        with ThreadPoolExecutor(4) as pool:
            for _ in pool.map(
                lambda at: journal.append(_results(config, keys, at, min(at + fragment_rows, wanted))), starts
            ):
                pass

    return finish


def _keys(config: RunConfig) -> Keys:
    """Return the keys of all rows, in the manifest's order."""
    plan = make_plan(config)
    cache = ScanCache(Store(config.output), config, plan.engine_ids)
    return scan_manifest(Manifest.open(config.manifest, cache.contents), config, plan.engine_ids, cache).keys


def _results(config: RunConfig, keys: Keys, start: int, end: int) -> pa.Table:
    texts = keys_to_hex(keys[start:end])
    store = Store(config.output)
    uris = [store.uri_of(animation_name(key, "mp4")) for key in texts.to_pylist()]
    number = end - start
    columns = {
        "request_id": pa.array([f"request-{row}" for row in range(start, end)]),
        "key": texts,
        "status": pa.scalar("succeeded"),
        "attempts": pa.scalar(1),
        "animation_uri": pa.array(uris),
        "prompt": pa.array([f"{PROMPTS[row % len(PROMPTS)]}, number {row}" for row in range(start, end)]),
        "num_bytes": pa.scalar(CLIP_BYTES),
        "sha256": pa.array([f"{key}{key}" for key in texts.to_pylist()]),
        "motion": pa.array(np.random.default_rng(start).random(number)),
        "gpu_seconds": pa.array(np.random.default_rng(end).random(number)),
        "run_id": pa.scalar("benchmark"),
    }
    return results_table(columns, pa.table({}), number)


def _compact(config: RunConfig, _: int) -> dict[str, Any]:
    return _costs(lambda: {"fragments": Journal(Store(config.output)).compact()})


def _outcomes(config: RunConfig, _: int) -> dict[str, Any]:
    return _costs(lambda: {"keys": len(Journal(Store(config.output)).outcomes().keys)})


class _Listed(Store):
    """Store that lists an animation for every key, although there are no files."""

    def __init__(self, uri: str, keys: KeySet) -> None:
        super().__init__(uri)
        self._keys = keys

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        if not prefix.startswith(ANIMATIONS):
            yield from super().list(prefix)
            return
        folder = int(prefix.removeprefix(ANIMATIONS).rstrip("/"), 16)
        start, end = (bisect_left(self._keys.high, side << 56) for side in (folder, folder + 1))
        pairs = zip(self._keys.high[start:end].tolist(), self._keys.low[start:end].tolist(), strict=True)
        for high, low in pairs:
            yield ObjectInfo(animation_name(f"{high:016x}{low:016x}", "mp4"), CLIP_BYTES)


def _finalise(config: RunConfig, _: int) -> dict[str, Any]:
    plan = make_plan(config)
    plan.save_scan()
    journal = Journal(_Listed(config.output, plan.wanted))
    outcomes = journal.outcomes().of(plan.wanted)

    def published() -> dict[str, Any]:
        made = publish(journal, outcomes, plan.wanted, plan.carried, "benchmark", {})
        return {"results": made.num_requests}

    return _costs(published)


STEPS: dict[str, Callable[[RunConfig, int], dict[str, Any] | None]] = {
    "plan_first": _plan_and_keep,
    "plan_known": _plan,
    "finish_70_percent": _finish(0.7),
    "journal_by_fragments": _outcomes,
    "compact": _compact,
    "journal_by_index": _outcomes,
    "resume": _plan,
    "plan_command": _plan_with_statistics,
    "plan_grown": _plan,
    "finish_the_rest": _finish(1.0),
    "compact_again": _compact,
    "finalise": _finalise,
    "no_op": _no_op,
}
"""Steps in their order; steps that return None only prepare data for the following ones."""

if __name__ == "__main__":
    main()
