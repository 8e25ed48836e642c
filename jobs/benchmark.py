"""The engine against the documented pipeline, the resident one and the compiled one, in one run on one device.

    python jobs/benchmark.py --to bench.json                # full size, random weights: needs a GPU to end in minutes
    python jobs/benchmark.py --size tiny --no-compile       # the embedded model, about a minute on two CPU cores

The same as `pia-batch bench`; docs/performance.md says what its columns mean.
"""

from __future__ import annotations

import sys

from pia_batch.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
