"""Random histories of whole runs: workers and drivers die, freeze and come back, the store fails, requests are poison.

A history is the real plan, stages, commit, journal, lease and publication over a simulated cluster and store, started
again until nothing is left to do; then `witness` checks the output. `make torture RUNS=1000 SEED=1` runs this.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from histories import history


def main(arguments: Sequence[str] | None = None) -> int:
    """Return exit code 1 if anything was violated; its `--seed` with `--runs 1` or `--stack 1` shows it again."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="number of histories in this process")
    parser.add_argument("--stack", type=int, default=0, help="number of schedules over processes, Ray and S3")
    parser.add_argument("--seed", type=int, default=1, help="seed of the first history and of the first schedule")
    options = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    num_bad = 0
    for work, count in ((_histories, options.runs), (_schedules, options.stack)):
        with tempfile.TemporaryDirectory() as folder:
            num_bad += work(options.seed, count, Path(folder)) if count else 0
    return 1 if num_bad else 0


def _histories(first: int, count: int, folder: Path) -> int:
    """Run and print them; return the number of those with violations."""
    pa.set_cpu_count(1)
    started, tallies, num_bad = time.monotonic(), Counter[str](), 0
    for seed in range(first, first + count):
        report = history(seed, folder)
        tallies += report.tallies
        num_bad += bool(report.problems)
        if report.problems:
            print(f"seed {seed}:", *report.problems, sep="\n  ", flush=True)  # noqa: T201 - a program
    counted = ", ".join(f"{tallies[name]} {name}" for name in ("deaths", "zombies", "store faults", "starts"))
    seconds = time.monotonic() - started
    print(f"{count} histories, {num_bad} with violations: {counted}, {seconds:.0f} s", flush=True)  # noqa: T201
    return num_bad


def _schedules(first: int, count: int, folder: Path) -> int:
    """Run and print them; return the number of those with violations."""
    import faults  # noqa: PLC0415 - starts Ray, which histories need not
    import schedules  # noqa: PLC0415

    started, tallies, num_bad = time.monotonic(), Counter[str](), 0
    with faults.stack(folder) as stack:
        cases: dict[int, faults.Case] = {}
        for seed in range(first, first + count):
            report = schedules.run(seed, stack, cases)
            tallies += report.tallies
            num_bad += bool(report.problems)
            counts = ", ".join(f"{count} {name}" for name, count in report.tallies.items())
            state = "violated" if report.problems else "passed"
            print(f"schedule {seed}: {state}: {counts}", *report.problems, sep="\n  ", flush=True)  # noqa: T201
    counted = ", ".join(f"{number} {name}" for name, number in sorted(tallies.items()))
    seconds = time.monotonic() - started
    print(f"{count} schedules, {num_bad} with violations: {counted}, {seconds:.0f} s", flush=True)  # noqa: T201
    return num_bad


if __name__ == "__main__":
    sys.exit(main())
