"""The run of a date, for schedulers that submit to a Ray cluster: the last day that is over, or the one that is given.

    ray job submit --working-dir . -- python jobs/scheduled.py
    ray job submit --working-dir . -- python jobs/scheduled.py --run-date 2026-11-22

It is `jobs/animate.py` with `jobs/configs/nightly.yaml`, where manifest and output have their `{date}`. A date that is
finished ends with 0 at once, and one that got late rows draws these. Two schedulers do no harm: the later one ends
with 75, or queues with `--wait`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the submitted copy of pia_batch, not an installed one

from pia_batch.cli import main

CONFIG = Path(__file__).with_name("configs") / "nightly.yaml"

if __name__ == "__main__":
    main(["run", str(CONFIG), *sys.argv[1:]])
