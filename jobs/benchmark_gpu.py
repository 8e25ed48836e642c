"""All that is measured on a machine with a GPU, in one folder: the benchmark, then whole runs through Ray.

    python jobs/benchmark_gpu.py --to gpu                                   # full size, random weights
    python jobs/benchmark_gpu.py --to gpu --parts runs --speeds exact --work /tmp/runs      # one piece of it
    python jobs/benchmark_gpu.py --to cpu --size tiny --requests 8 --bench "--rounds 1 --no-compile"  # a rehearsal, CPU

`benchmark.json` and `runs.json` are written as numbers come, and a later command adds to what is there: where a machine
is lent for minutes, ask for one piece after the other. Each part is a process of its own, so that the GPU is free for
the next. The runs draw from a checkpoint that is written first, so that it loads as any other: manifest to MP4 files
and results, one engine, and each preset of speed asked for. docs/performance.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from PIL import Image

from pia_batch.engine.benchmark.runner import BenchmarkOptions
from pia_batch.journal.layout import LATEST_RESULTS, results_folder

_WRITE_CHECKPOINT = str(Path(__file__).with_name("write_full_checkpoint.py"))


class CommandFailedError(Exception):
    """A command that this program started did not succeed; the end of what it said."""


def main() -> int:
    """Measure part by part; 1 if one of them failed, which the others do not mind."""
    arguments = _parse()
    arguments.to.mkdir(parents=True, exist_ok=True)
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        if "bench" in arguments.parts.split(","):
            failures += _bench(arguments)
        if "runs" in arguments.parts.split(","):
            failures += _runs(arguments, work)
    for failure in failures:
        print(failure, file=sys.stderr)
    return int(bool(failures))


def _bench(arguments: argparse.Namespace) -> list[str]:
    """`pia-batch bench`, which writes its numbers itself; why it failed, if it did."""
    file = str(arguments.to / "benchmark.json")
    try:
        print(_pia_batch("bench", "--size", arguments.size, *arguments.bench.split(), "--to", file), flush=True)
    except CommandFailedError as err:
        return [f"benchmark: {err}"]
    return []


def _runs(arguments: argparse.Namespace, work: Path) -> list[str]:
    """A run of each preset of speed; why some failed."""
    file = arguments.to / "runs.json"
    told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    base = "embedded"
    if arguments.size == "full":
        base = str(work / "checkpoint")
        if not (work / "checkpoint" / "model_index.json").exists():  # written last
            _python(_WRITE_CHECKPOINT, base)
    manifest = _write_manifest(work, arguments.requests)
    failures = []
    for speed in arguments.speeds.split(","):
        with tempfile.TemporaryDirectory(dir=work) as output:
            try:
                told[speed] = _measured_run(arguments, manifest, base, speed, output)
            except CommandFailedError as err:
                failures.append(f"run with {speed}: {err}")
                continue
        file.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        print(speed, json.dumps(told[speed], indent=2), flush=True)
    return failures


def _measured_run(arguments: argparse.Namespace, manifest: str, base: str, speed: str, output: str) -> dict[str, Any]:
    """One run, and what its results tell of it."""
    asked = {"side_px": arguments.side, "frames": arguments.frames, "steps": arguments.steps}
    shape = BenchmarkOptions(arguments.size, **asked).shape
    settings = {
        "model.base": base,
        "model.speed": speed,
        "placement.num_gpus": int(arguments.size == "full" and not arguments.cpu),
        "placement.batch_size": arguments.batch_size,
        "limits.max_failed": arguments.requests,
        "defaults.num_inference_steps": shape["steps"],
        "defaults.num_frames": shape["frames"],
        "defaults.width": shape["side_px"],
        "defaults.height": shape["side_px"],
    }
    written = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    summary = json.loads(_pia_batch("run", "--manifest", manifest, "--output", output, *written, "--json"))
    newest = json.loads((Path(output) / LATEST_RESULTS).read_text(encoding="utf-8"))["run_id"]
    rows = ds.dataset(f"{output}/{results_folder(newest)}").to_table().sort_by("finished_at")
    return {"settings": settings, **steady(rows, arguments.batch_size), "summary": summary}


def steady(rows: pa.Table, batch_size: int) -> dict[str, Any]:
    """What results, sorted by when they were finished, tell of a run once all is compiled.

    The first quarter of the batches, or one, is left out: shapes are compiled when they have come 20 times. `busy` is
    the share of the time from there to the end of the last batch in which the engine drew. Files are finished while
    the next batch is drawn, so that of a few batches it may be a little above 1.
    """
    batches = -(-len(rows) // batch_size)
    begun = batch_size * max(1, batches // 4)
    ends, drawn = rows["finished_at"].to_pylist(), rows["gpu_seconds"].to_pylist()
    window = (ends[-1] - ends[begun - 1]).total_seconds() if begun < len(rows) else 0.0
    return {
        "requests": len(rows),
        "succeeded": rows["status"].to_pylist().count("succeeded"),
        "device": rows["device"][0].as_py(),
        "left_out": begun,
        "busy": sum(drawn[begun:]) / window if window else None,
        "clips_per_s_steady": (len(rows) - begun) / window if window else None,
        "gpu_seconds_per_clip": sum(drawn[begun:]) / (len(rows) - begun) if begun < len(rows) else None,
        "mp4_bytes": sum(rows["num_bytes"].to_pylist()),
    }


def _write_manifest(work: Path, count: int) -> str:
    """So many requests, each with a picture of its own beside the manifest."""
    rng = np.random.default_rng(0)
    for index in range(count):
        picture = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        picture.resize((512, 512)).save(work / f"{index}.png")
    prompts = [f"a red circle moving {('left', 'right', 'up', 'down')[index % 4]}" for index in range(count)]
    ids = [f"clip-{index}" for index in range(count)]
    images = [f"{index}.png" for index in range(count)]
    pq.write_table(pa.table({"request_id": ids, "image": images, "prompt": prompts}), work / "requests.parquet")
    return str(work / "requests.parquet")


def _pia_batch(*arguments: str) -> str:
    """What a command prints."""
    return _python("-m", "pia_batch.cli", *arguments)


def _python(*arguments: str) -> str:
    """What a Python of its own prints; what it says beside is shown as it comes.

    Raises:
        CommandFailedError: it did not end with 0.
    """
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)  # noqa: S603 - ourselves
    if done.returncode:
        words = " ".join(arguments[:4])
        raise CommandFailedError(f"`python {words} …` ended with {done.returncode}: {done.stdout.strip()[-500:]}")
    return done.stdout


def _parse() -> Any:
    parser = argparse.ArgumentParser(description="Everything that is measured on a machine with a GPU.")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--parts", default="bench,runs", help="what to measure, separated by commas")
    parser.add_argument("--bench", default="", help="further options of `pia-batch bench`, in one string")
    parser.add_argument("--requests", type=int, default=64, help="of each run")
    parser.add_argument("--batch-size", type=int, default=4, help="requests that are drawn together")
    parser.add_argument("--speeds", default="exact,balanced,fast", help="presets to run, separated by commas")
    parser.add_argument("--side", type=int, help="width and height of the runs' clips; by default 512, tiny 64")
    parser.add_argument("--frames", type=int, help="of the runs' clips; by default 16, tiny 8")
    parser.add_argument("--steps", type=int, help="of the runs' clips; by default 25, tiny 8")
    parser.add_argument("--cpu", action="store_true", help="runs without a GPU, also at full size")
    parser.add_argument("--work", type=Path, help="where to keep the checkpoint for the next command")
    parser.add_argument("--to", type=Path, required=True, help="folder for benchmark.json and runs.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
