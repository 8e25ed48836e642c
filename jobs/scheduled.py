"""Run of one date, for schedulers that submit to a Ray cluster: the last complete day, or a given one.

    ray job submit --working-dir . -- python jobs/scheduled.py
    ray job submit --working-dir . -- python jobs/scheduled.py --run-date 2026-11-22

It runs `jobs/animate.py` with `jobs/configs/nightly.yaml`, whose manifest and output contain `{date}`. A finished date
exits with 0 at once; a date that received late rows generates only these. Two schedulers may run at a time: the later
one exits with 75, or waits with `--wait`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the submitted copy of pia_batch, not an installed one

from pia_batch.cli import main

CONFIG = Path(__file__).with_name("configs") / "nightly.yaml"

if __name__ == "__main__":
    main(["run", str(CONFIG), *sys.argv[1:]])
