"""Backfill: the runs of many dates, one after the other, in order; a finished date costs only its planning.

    ray job submit --working-dir . -- python jobs/backfill.py 2026-11-16..2026-11-22

It runs `jobs/scheduled.py` for all dates from the first to the last, both included. It can be stopped and restarted at
any time.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the submitted copy of pia_batch, not an installed one

from pia_batch.cli import main

CONFIG = Path(__file__).with_name("configs") / "nightly.yaml"

if __name__ == "__main__":
    if len(sys.argv) < 2 or ".." not in sys.argv[1]:  # noqa: PLR2004 - the program and its dates
        sys.exit("usage: python jobs/backfill.py FROM..TO [options of pia-batch run]")
    main(["run", str(CONFIG), "--backfill", *sys.argv[1:]])
