"""Speed checks, as ratios of two sides measured in turns by one program: `make bench-check`.

    python tests/perf/check_speed.py

CPU seconds are compared, not those on the wall, so that other work on the machine disturbs little. Each line shows a
measurement and its minimum; one below its minimum makes the exit code 1.
"""

from __future__ import annotations

import io
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import check_engine
import check_scale
import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "jobs"))
ROUNDS = 2

HELP = "import sys; from pia_batch.cli import main; main(['--help'])"
TYPER = "import typer, rich.console, rich.table"
PLAN = "import sys, pia_batch.planning.plan, pia_batch.cli.plan_commands; sys.exit('torch' in sys.modules)"
ENGINE = (
    "from pia_batch.config import ModelConfig; from pia_batch.engine import PiaEngine;"
    "PiaEngine.load(ModelConfig(), 'cpu')"
)
PIPELINE = "from diffusers import PIAPipeline, MotionAdapter; from transformers import CLIPTextModel, CLIPTokenizer"


def main() -> int:
    """Measure and print all ratios; return 1 if one is below its minimum."""
    checks: list[tuple[float, str, Callable[[], float]]] = [
        (
            1 / 1.3,
            "engine load: import of diffusers' pipeline alone, as a share of it",
            lambda: started(PIPELINE, ENGINE),
        ),
        (0.25, "--help: import of typer and rich alone, as a share of it", lambda: started(TYPER, HELP)),
        (1.0, "plan without torch: 1 if so", lambda: float(run(PLAN).returncode == 0)),
        (20.0, "GIF: times as fast as Pillow's own", gif_gain),
        (1.0, "MP4 of 16 x 512 x 512: 100 ms of a core, as a share of it", mp4_gain),
        (0.9, "chain: share of their time in which two engines generate batches of one second", chain_busy),
        (0.25, "chain: 1 ms of the driver, as a share of what a row costs it in batches of 16", chain_driver),
        (
            0.7,
            "chain: 0.5 ms of the driver, as a share of what each of 3,000 rows costs it in batches of 4",
            chain_small,
        ),
        (0.8, "prepare: 30,000 images of 20 kB, times as fast as Ray Data's bare read and write", prepare_gain),
        *((least, str(check.__doc__), check) for least, check in check_scale.CHECKS),
    ]
    missed = check_engine.check(check_engine.mixtures())
    for least, name, measure in checks:
        value = measure()
        missed += value < least
        print(f"{'ok  ' if value >= least else 'SLOW'} {value:7.2f}  at least {least:5.2f}  {name}", flush=True)  # noqa: T201
    return int(missed > 0)


def gif_gain() -> float:
    """Pillow's default encoder, as diffusers calls it, against ours."""
    from pia_batch.config import EncodingConfig  # noqa: PLC0415
    from pia_batch.media.codecs import encode  # noqa: PLC0415

    frames = clip()
    images = [Image.fromarray(frame) for frame in frames]
    pillow = {"format": "GIF", "save_all": True, "append_images": images[1:], "optimize": False, "duration": 120}
    return ratio(lambda: images[0].save(io.BytesIO(), **pillow), lambda: encode(frames, "gif", 8, EncodingConfig()))


def mp4_gain() -> float:
    """Return the number of MP4s that fit in 100 ms of a core."""
    from pia_batch.config import EncodingConfig  # noqa: PLC0415
    from pia_batch.media.codecs import encode  # noqa: PLC0415

    frames = clip()
    return 0.1 / min(seconds(lambda: encode(frames, "mp4", 8, EncodingConfig())) for _ in range(ROUNDS + 1))


def chain_busy() -> float:
    """A run of two engines, from the manifest to the results."""
    import benchmark_chain  # noqa: PLC0415 - starts Ray

    return float(benchmark_chain.measure(benchmark_chain.Case(2, 1.0, 4, 64))["busy"])


def chain_small() -> float:
    """Driver's CPU for each of 3,000 rows in batches of four, around engines that only wait: 0.5 ms as its share."""
    import benchmark_driver  # noqa: PLC0415 - starts Ray

    return 0.5 / float(benchmark_driver.measure(3000)["driver_ms_per_row"])


def chain_driver() -> float:
    """A run of engines that take no time."""
    import benchmark_chain  # noqa: PLC0415 - starts Ray

    case = benchmark_chain.Case(2, 0.0, 16, 800, side_px=32, num_frames=1)
    return 1 / float(benchmark_chain.measure(case)["driver_ms_per_row"])


def clip() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """16 frames of 512 x 512: 1/f noise, as photographs have it, that drifts."""
    rng = np.random.default_rng(0)
    octaves = [(side, rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for side in (8, 16, 32, 64, 128)]
    grown = [np.asarray(Image.fromarray(noise).resize((512, 512)), np.float64) / side for side, noise in octaves]
    still = sum(grown) / sum(1 / side for side, _ in octaves)
    return np.stack([np.roll(still, 3 * frame, axis=1).astype(np.uint8) for frame in range(16)])


def ratio(slow: Callable[[], Any], fast: Callable[[], Any]) -> float:
    """CPU seconds of one over those of the other, the median of several pairs after one that is not counted."""
    pairs = [seconds(slow) / seconds(fast) for _ in range(ROUNDS + 1)]
    return statistics.median(pairs[1:])


def seconds(call: Callable[[], Any]) -> float:
    """Of this process's CPU time."""
    began = time.process_time()
    call()
    return time.process_time() - began


def prepare_gain() -> float:
    """Return how many times as fast `prepare` is as a bare Ray Data read and write of the same bytes, by the clock."""
    program = [sys.executable, str(ROOT / "jobs" / "benchmark_prepare.py"), "--rows", "30000", "--rounds", "3"]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["times_as_fast_as_bare"])


def started(less: str, more: str) -> float:
    """CPU seconds of one program over those of another, the median of several pairs after one that is not counted."""
    pairs = [_child_seconds(less) / _child_seconds(more) for _ in range(ROUNDS + 1)]
    return statistics.median(pairs[1:])


def _child_seconds(program: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(program)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def run(program: str) -> subprocess.CompletedProcess[bytes]:
    """A Python of its own."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        check=False,
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )


if __name__ == "__main__":
    sys.exit(main())
