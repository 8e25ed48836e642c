"""All measurements on a machine with a GPU, in one folder: the benchmark, then whole runs through Ray.

    python jobs/benchmark_gpu.py --to gpu                                   # full size, random weights
    python jobs/benchmark_gpu.py --to gpu --parts runs --speeds exact --work /tmp/runs      # one part of it
    python jobs/benchmark_gpu.py --to cpu --size tiny --requests 8 --bench "--rounds 1 --no-compile"  # trial, CPU

`benchmark.json` and `runs.json` are updated after each measurement, and a later command adds to them: on a machine with
limited time, run one part after the other. Each part is a process of its own, so that the GPU's memory is free for the
next. The runs load a checkpoint that is written first, like any other checkpoint. They go from the manifest to MP4
files and results, with one engine, for each requested speed preset. docs/benchmark.md explains the numbers.
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
    """Failure of a command that this program started; the message has the end of its output."""


def main() -> int:
    """Run all parts; return 1 if one of them failed. A failure does not stop the other parts."""
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
    """Run `pia-batch bench`, which writes its numbers itself; return the reasons of failures."""
    file = str(arguments.to / "benchmark.json")
    try:
        print(_pia_batch("bench", "--size", arguments.size, *arguments.bench.split(), "--to", file), flush=True)
    except CommandFailedError as err:
        return [f"benchmark: {err}"]
    return []


def _runs(arguments: argparse.Namespace, work: Path) -> list[str]:
    """Run each speed preset; return the reasons of failures."""
    file = arguments.to / "runs.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
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
                results[speed] = _measured_run(arguments, manifest, base, speed, output)
            except CommandFailedError as err:
                failures.append(f"run with {speed}: {err}")
                continue
        file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(speed, json.dumps(results[speed], indent=2), flush=True)
    return failures


def _measured_run(arguments: argparse.Namespace, manifest: str, base: str, speed: str, output: str) -> dict[str, Any]:
    """Run once; return the settings, measurements of the results, and the summary."""
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
    """Return the steady-state measurements of a run, from its results in the order of `finished_at`.

    The first quarter of the batches, at least one, is left out, because shapes are compiled after 20 calls. `busy` is
    the share of the remaining time in which the engine generated clips. Files are encoded while the next batch is
    generated, so that with few batches `busy` may be slightly above 1.
    """
    batches = -(-len(rows) // batch_size)
    begun = batch_size * max(1, batches // 4)
    ends, device_s = rows["finished_at"].to_pylist(), rows["gpu_seconds"].to_pylist()
    window = (ends[-1] - ends[begun - 1]).total_seconds() if begun < len(rows) else 0.0
    return {
        "requests": len(rows),
        "succeeded": rows["status"].to_pylist().count("succeeded"),
        "device": rows["device"][0].as_py(),
        "left_out": begun,
        "busy": sum(device_s[begun:]) / window if window else None,
        "clips_per_s_steady": (len(rows) - begun) / window if window else None,
        "gpu_seconds_per_clip": sum(device_s[begun:]) / (len(rows) - begun) if begun < len(rows) else None,
        "mp4_bytes": sum(rows["num_bytes"].to_pylist()),
    }


def _write_manifest(work: Path, count: int) -> str:
    """Write a manifest of `count` requests, each with its own image; return its path."""
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
    """Run a `pia-batch` command; return its standard output."""
    return _python("-m", "pia_batch.cli", *arguments)


def _python(*arguments: str) -> str:
    """Run a Python process; return its standard output. Its standard error is passed through.

    Raises:
        CommandFailedError: The exit code is not 0.
    """
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)  # noqa: S603 - ourselves
    if done.returncode:
        words = " ".join(arguments[:4])
        raise CommandFailedError(f"`python {words} …` ended with {done.returncode}: {done.stdout.strip()[-500:]}")
    return done.stdout


def _parse() -> Any:
    parser = argparse.ArgumentParser(description="Run all measurements on a machine with a GPU.")
    parser.add_argument(
        "--size", choices=("full", "tiny"), default="full", help="full: random weights; tiny: the embedded model"
    )
    parser.add_argument(
        "--parts", default="bench,runs", help="parts to run, separated by commas (default: %(default)s)"
    )
    parser.add_argument("--bench", default="", help="further options of `pia-batch bench`, in one string")
    parser.add_argument("--requests", type=int, default=64, help="requests of each run (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="requests in a batch (default: %(default)s)")
    parser.add_argument(
        "--speeds",
        default="exact,balanced,fast",
        help="speed presets to run, separated by commas (default: %(default)s)",
    )
    parser.add_argument(
        "--side", type=int, help="width and height of the runs' clips, in pixels (default: 512, tiny: 64)"
    )
    parser.add_argument("--frames", type=int, help="frames of the runs' clips (default: 16, tiny: 8)")
    parser.add_argument("--steps", type=int, help="steps of the runs' clips (default: 25, tiny: 8)")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, also at full size")
    parser.add_argument("--work", type=Path, help="folder that keeps the checkpoint for the next command")
    parser.add_argument("--to", type=Path, required=True, help="folder for benchmark.json and runs.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
