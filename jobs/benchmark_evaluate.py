"""Compare `pia-batch evaluate` with a bare loop over the same files, in one run: frames per second, and memory.

    python jobs/benchmark_evaluate.py                              # 128 clips of 16 frames at 256 x 256: about a minute
    python jobs/benchmark_evaluate.py --clips 512 --side 512 --json evaluate.json

The bare loop reads each file of a local folder, decodes it and computes the same measures, in one thread. The
evaluation has one worker of one CPU, and is counted from its first to its last committed piece, as Ray needs some
seconds to start whatever the number of clips.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa

from pia_batch.config import EncodingConfig, PlacementConfig
from pia_batch.evaluation.flow import FlowMeasures
from pia_batch.evaluation.job import EvaluationProgress, evaluate
from pia_batch.evaluation.pixels import pixel_measures
from pia_batch.journal.layout import animation_name
from pia_batch.journal.log import Journal
from pia_batch.journal.results import publish
from pia_batch.media import codecs
from pia_batch.schema.columns import results_table
from pia_batch.schema.keys import KeySet, keys_from_hex
from pia_batch.storage.object_store import Store

FPS = 8.0


def main() -> None:
    """Write an output, measure it in both ways, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=128, help="number of clips")
    parser.add_argument("--frames", type=int, default=16, help="frames of a clip")
    parser.add_argument("--side", type=int, default=256, help="width and height in pixels")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(str(Path(folder, "out")))
        names = write_output(store, options.clips, options.frames, options.side)
        bare = bare_loop(Path(folder, "out"), names)
        figures = {"bare_frames_per_s": round(bare, 1)} | evaluation(store, options.frames)
    figures["ratio"] = round(figures["frames_per_s"] / figures["bare_frames_per_s"], 3)
    print(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def write_output(store: Store, num_clips: int, num_frames: int, side: int) -> list[str]:
    """Write an output of moving textures as a run leaves it; return the names of the animations."""
    rows, names = [], []
    for number in range(num_clips):
        data = codecs.encode(_clip(number, num_frames, side), "mp4", FPS, EncodingConfig())
        key = hashlib.blake2b(str(number).encode(), digest_size=16).hexdigest()
        names.append(animation_name(key, "mp4"))
        store.replace(names[-1], data)
        row: dict[str, Any] = {"request_id": f"r{number:06d}", "key": key, "status": "succeeded", "format": "mp4"}
        row |= {"animation_uri": store.uri_of(names[-1]), "num_bytes": len(data), "fps": FPS, "prompt": "a texture"}
        row |= {"sha256": hashlib.sha256(data).hexdigest(), "width": side, "height": side, "num_frames": num_frames}
        rows.append(row)
    columns = {name: pa.array([row[name] for row in rows]) for name in rows[0]}
    journal = Journal(store)
    journal.append(results_table(columns, pa.table({}), len(rows)))
    wanted = KeySet.of(keys_from_hex(columns["key"]))
    publish(journal, journal.outcomes(), wanted, pa.schema([]), "benchmark", {})
    return names


def bare_loop(folder: Path, names: list[str]) -> float:
    """Return the frames per second of one thread that reads, decodes and measures."""
    flow, frames, began = FlowMeasures(), 0, time.perf_counter()
    for name in names:
        clip = codecs.decode((folder / name).read_bytes(), "mp4")
        pixel_measures(clip)
        flow(clip, FPS)
        frames += len(clip)
    return frames / (time.perf_counter() - began)


def evaluation(store: Store, num_frames: int) -> dict[str, Any]:
    """Return frames per second between the first and the last piece, and the worker's memory at both in MB."""
    seen: list[tuple[float, int, float]] = []

    def see(progress: EvaluationProgress) -> None:
        seen.append((time.perf_counter(), progress.done, _worker_mb()))

    began = time.perf_counter()
    evaluate(store.uri, placement=PlacementConfig(), on_progress=see)
    (first_s, first, first_mb), (last_s, last, last_mb) = seen[1], seen[-1]
    return {
        "frames_per_s": round((last - first) * num_frames / (last_s - first_s), 1),
        "seconds_in_all": round(time.perf_counter() - began, 1),
        "worker_mb_first": round(first_mb),
        "worker_mb_last": round(last_mb),
    }


def _worker_mb() -> float:
    """Return the memory of the worker without what it shares with others, in MB; 0 if there is none."""
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            if "EvaluateActor" in " ".join(process.cmdline()):
                memory = process.memory_info()
                return float(memory.rss - memory.shared) / 1e6
        except psutil.NoSuchProcess:
            continue
    return 0.0


def _clip(seed: int, num_frames: int, side: int) -> npt.NDArray[np.uint8]:
    """Return a smooth random picture that moves by two pixels a frame."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (side // 8 + 16, side // 8 + 16, 3)).astype(np.float32)
    wide = np.kron(coarse, np.ones((8, 8, 1), dtype=np.float32))
    for axis in (0, 1):
        wide = np.mean([np.roll(wide, shift, axis) for shift in range(-4, 4)], axis=0)
    picture = wide.astype(np.uint8)
    return np.stack([picture[32:, 2 * k :][:side, :side] for k in range(num_frames)])


if __name__ == "__main__":
    main()
