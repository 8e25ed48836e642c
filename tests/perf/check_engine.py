"""Speed of the engine on a CPU for every kind of mixture: eight rows in one call against eight pipeline calls.

    python tests/perf/check_engine.py            # every mixture, one and two threads
    python tests/perf/check_engine.py --steps 5  # those of 5 steps

Both sides take turns in one process, so that other work on the machine affects both. Each line has the ratio of CPU
seconds and that of the wall; one below its minimum makes the exit code 1. docs/engine-design.md has the profile that
says why the minimum is not higher.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

LEAST_CPU = 1.1
"""Least ratio of CPU seconds, of any mixture. The lowest that was measured is 1.16 (docs/engine-design.md)."""

LEAST_WALL = 1.0
"""Least ratio of wall seconds: a batch is never slower than single calls. Other work disturbs it more."""

ROWS = 8
ROUNDS = 3
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "white", "black")


@dataclass(frozen=True, slots=True)
class Mixture:
    """Eight rows.

    Attributes:
        guided: Rows with guidance: all, none, or every second one.
        equal_prompts: True if the rows have one prompt, False if each has its own.
        steps: Number of denoising steps.
        threads: Number of threads of torch.
    """

    guided: Literal["all", "none", "mixed"]
    equal_prompts: bool
    steps: int
    threads: int

    def __str__(self) -> str:
        prompts = "equal" if self.equal_prompts else "different"
        return f"guided: {self.guided}, {prompts} prompts, {self.steps} steps, {self.threads} threads"

    def scale(self, row: int) -> float:
        """Return the guidance scale of a row."""
        guided = {"all": True, "none": False, "mixed": row % 2 == 0}[self.guided]
        return 3.0 + row if guided else 1.0


def mixtures(steps: tuple[int, ...] = (4, 5, 8), threads: tuple[int, ...] = (1, 2)) -> list[Mixture]:
    """Return every mixture of these steps and threads."""
    kinds: tuple[Literal["all", "none", "mixed"], ...] = ("all", "none", "mixed")
    return list(itertools.starmap(Mixture, itertools.product(kinds, (True, False), steps, threads)))


def measure(mixture: Mixture) -> tuple[float, float]:
    """Return how many times as fast one call of the engine is as single calls: by CPU seconds, by the wall."""
    import torch  # noqa: PLC0415 - the other checks of `make bench-check` need none of it

    from pia_batch.engine import PiaEngine, Shot  # noqa: PLC0415
    from pia_batch.engine.benchmark import baselines  # noqa: PLC0415

    kept = torch.get_num_threads()
    torch.set_num_threads(mixture.threads)
    pipe = baselines.pipeline("tiny")
    pictures = np.random.default_rng(0).integers(0, 256, (ROWS, 8, 8, 3), dtype=np.uint8)
    shots = [
        Shot(
            image=Image.fromarray(picture).resize((64, 64)),
            prompt=f"a {COLOURS[0 if mixture.equal_prompts else row]} circle moving left",
            seed=row,
            motion_scale=row % 3,
            guidance_scale=mixture.scale(row),
            num_inference_steps=mixture.steps,
            num_frames=8,
            width=64,
            height=64,
        )
        for row, picture in enumerate(pictures)
    ]
    baselines.single_call(pipe, shots[0])
    PiaEngine.from_pipeline(pipe).animate(shots[:1])
    pairs = []
    for _ in range(ROUNDS):
        single = _seconds(lambda: [baselines.single_call(pipe, shot) for shot in shots])
        together = _seconds(lambda: PiaEngine.from_pipeline(pipe).animate(shots))  # with empty caches
        pairs.append((single[0] / together[0], single[1] / together[1]))
    torch.set_num_threads(kept)
    return statistics.median(cpu for cpu, _ in pairs), statistics.median(wall for _, wall in pairs)


def check(chosen: list[Mixture]) -> int:
    """Print a line for each mixture; return the number of those that are too slow."""
    missed = 0
    for mixture in chosen:
        cpu, wall = measure(mixture)
        slow = cpu < LEAST_CPU or wall < LEAST_WALL
        missed += slow
        line = f"{cpu:7.2f} CPU, at least {LEAST_CPU:.2f}, {wall:5.2f} wall, at least {LEAST_WALL:.2f}  {mixture}"
        print(f"{'SLOW' if slow else 'ok  '} {line}", flush=True)  # noqa: T201
    return missed


def _seconds(call: Callable[[], Any]) -> tuple[float, float]:
    """Return the CPU seconds of this process, and those of the wall."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> int:
    """Check the mixtures that the command line names; return 1 if one is too slow."""
    parser = argparse.ArgumentParser(description="Check the speed of every kind of mixture on a CPU.")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 5, 8], help="denoising steps (default: 4 5 8)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads of torch (default: 1 2)")
    chosen = parser.parse_args()
    return int(check(mixtures(tuple(chosen.steps), tuple(chosen.threads))) > 0)


if __name__ == "__main__":
    sys.exit(main())
