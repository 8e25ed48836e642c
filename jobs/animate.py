"""Main job for `ray job submit`: the same arguments and output as `pia-batch run`.

    ray job submit --working-dir . -- python jobs/animate.py jobs/configs/cluster.yaml \
        --manifest s3://bucket/manifest/ --output s3://bucket/out

`ray job submit` turns every failure into exit code 1. `pia-batch submit` takes the same arguments, returns the exit
code of the driver and refuses a second job for the same output: see docs/clusters.md. The pinned packages of
constraints.txt must be installed on every node; this package is uploaded with the working directory.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the submitted copy of pia_batch, not an installed one

from pia_batch.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
