"""Verification of an output: checks every animation against its result, on the cluster and so close to the store.

    ray job submit --working-dir . -- python jobs/verify.py s3://bucket/out
    ray job submit --working-dir . -- python jobs/verify.py s3://bucket/out --repair

The same arguments and exit codes as `pia-batch verify`: 0 no problem, 3 a problem was found.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the submitted copy of pia_batch, not an installed one

from pia_batch.cli import main

if __name__ == "__main__":
    main(["verify", *sys.argv[1:]])
