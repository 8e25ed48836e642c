"""Benchmark of the engine against the documented, the resident and the compiled pipeline, in one run on one device.

    python jobs/benchmark.py --to bench.json                # full size, random weights: needs a GPU to end in minutes
    python jobs/benchmark.py --size tiny --rounds 1 --batches 1,2 --no-compile   # the embedded model: a minute, CPU

The same as `pia-batch bench`; docs/benchmark.md explains its columns.
"""

from __future__ import annotations

import sys

from pia_batch.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
