"""All that is measured on a machine with a GPU, in one JSON file: the benchmark, then a whole run through Ray.

    python jobs/benchmark_gpu.py --to gpu.json                              # full size, random weights: some 20 minutes
    python jobs/benchmark_gpu.py --size tiny --requests 8 --to cpu.json     # a rehearsal on two CPU cores

Each part is a process of its own, so that the GPU is free for the next. The run draws from a checkpoint that is written
first, so that it loads as any other: manifest to MP4 files and results, one engine, and each preset of speed asked for.
docs/performance.md says what the numbers mean.
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

SAVE = "import sys; from pia_batch.engine import benchmark; benchmark.pipeline('full').save_pretrained(sys.argv[1])"


def main() -> None:
    """Measure, and write what was found after each part."""
    arguments = _parse()
    told: dict[str, Any] = {"runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        _pia_batch("bench", "--size", arguments.size, *arguments.bench.split(), "--to", str(work / "bench.json"))
        told["benchmark"] = json.loads((work / "bench.json").read_text(encoding="utf-8"))
        base = "embedded"
        if arguments.size == "full":
            base = str(work / "checkpoint")
            _python("-c", SAVE, base)
        manifest = _write_manifest(work, arguments.requests)
        for speed in arguments.speeds.split(","):
            told["runs"][speed] = _measured_run(arguments, manifest, base, speed, str(work / f"out-{speed}"))
            arguments.to.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(told["runs"], indent=2))


def _measured_run(arguments: argparse.Namespace, manifest: str, base: str, speed: str, output: str) -> dict[str, Any]:
    """One run, and what its results tell of it.

    `busy` is the share of the time from the end of the first batch to that of the last that the engine drew in.
    Files are finished while the next batch is drawn, so that of a few batches it may be a little above 1.
    """
    full = arguments.size == "full"
    size = arguments.batch_size
    settings = {
        "model.base": base,
        "model.speed": speed,
        "placement.num_gpus": int(full),
        "placement.batch_size": size,
        "limits.max_failed": arguments.requests,
        "defaults.num_inference_steps": 25 if full else 8,
    }
    written = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    summary = json.loads(_pia_batch("run", "--manifest", manifest, "--output", output, *written, "--json"))
    newest = json.loads((Path(output) / "results" / "LATEST.json").read_text(encoding="utf-8"))["run_id"]
    rows = ds.dataset(f"{output}/results/{newest}").to_table()
    rows = rows.sort_by("finished_at")
    ends, drawn = rows["finished_at"].to_pylist(), rows["gpu_seconds"].to_pylist()
    window = (ends[-1] - ends[size - 1]).total_seconds()
    return {
        "requests": len(rows),
        "succeeded": rows["status"].to_pylist().count("succeeded"),
        "device": rows["device"][0].as_py(),
        "busy": sum(drawn[size:]) / window if window else None,
        "clips_per_s_steady": (len(rows) - size) / window if window else None,
        "gpu_seconds_per_clip": sum(drawn[size:]) / max(1, len(drawn[size:])),
        "mp4_bytes": sum(rows["num_bytes"].to_pylist()),
        "summary": summary,
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
    """What a Python of its own prints; it must succeed."""
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603 - ourselves


def _parse() -> Any:
    parser = argparse.ArgumentParser(description="Everything that is measured on a machine with a GPU.")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--bench", default="", help="further options of `pia-batch bench`, in one string")
    parser.add_argument("--requests", type=int, default=64, help="of each run")
    parser.add_argument("--batch-size", type=int, default=4, help="requests that are drawn together")
    parser.add_argument("--speeds", default="exact,balanced,fast", help="presets to run, separated by commas")
    parser.add_argument("--to", type=Path, required=True, help="JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
