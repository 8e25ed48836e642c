"""Module, not a program: whole runs through Ray for `benchmark_gpu.py`, from a manifest to MP4 files and results."""

from __future__ import annotations

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
import torch
from PIL import Image

from pia_batch.journal.layout import LATEST_RESULTS, results_folder


def measured_run(
    manifest: str, base: str, speed: str, work: Path, batch_size: int, requests: int, *, tiny: bool
) -> dict[str, Any]:
    """Run a manifest once with one engine; return the settings, measurements of the results, and the summary.

    Args:
        manifest: Path of the manifest.
        base: Checkpoint, as in `ModelConfig.base`.
        speed: Speed preset.
        work: Folder for the run's output, which is deleted at the end.
        batch_size: Requests in a batch.
        requests: Requests in the manifest.
        tiny: True for clips of 32 px, 4 frames and 2 steps instead of 512 px, 16 frames and 25 steps.

    Raises:
        SystemExit: The run failed; the message has the end of its output.
    """
    frames, steps, side = (4, 2, 32) if tiny else (16, 25, 512)
    settings = {
        "model.base": base,
        "model.speed": speed,
        "placement.num_gpus": int(torch.cuda.is_available()),
        "placement.batch_size": batch_size,
        "limits.max_failed": requests,
        "defaults.num_inference_steps": steps,
        "defaults.num_frames": frames,
        "defaults.width": side,
        "defaults.height": side,
    }
    written = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    with tempfile.TemporaryDirectory(dir=work) as output:
        command = [sys.executable, "-W", "ignore", "-m", "pia_batch.cli", "run", "--manifest", manifest]
        command += ["--output", output, *written, "--json"]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)  # noqa: S603 - ourselves
        if done.returncode:
            raise SystemExit(f"`pia-batch run` ended with {done.returncode}: {done.stdout.strip()[-500:]}")
        newest = json.loads((Path(output) / LATEST_RESULTS).read_text(encoding="utf-8"))["run_id"]
        rows = ds.dataset(f"{output}/{results_folder(newest)}").to_table().sort_by("finished_at")
    return {"settings": settings, **steady(rows, batch_size), "summary": json.loads(done.stdout)}


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


def write_manifest(work: Path, count: int) -> str:
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
