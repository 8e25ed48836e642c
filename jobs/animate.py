"""The main job, for `ray job submit`: the same arguments, output and exit codes as `pia-batch run`.

    ray job submit --working-dir . -- python jobs/animate.py jobs/configs/cluster.yaml \
        --manifest s3://bucket/manifest/ --output s3://bucket/out

That command turns every failure into exit code 1. `pia-batch submit`, which takes the same arguments, has the driver's
own, and refuses doubles: docs/clusters.md. On every node the pinned packages of constraints.txt must be installed; this
package travels in the working directory.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the submitted copy of pia_batch, not an installed one

from pia_batch.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
