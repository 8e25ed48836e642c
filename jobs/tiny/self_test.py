"""Store the clip that the self-test expects of the embedded model, in `pia_batch/tiny/self_test.json`.

    python jobs/tiny/self_test.py

Generates the clip on this machine's CPU in float32. Run it after the model was trained again, or after
`pia_batch.weights.identity.ENGINE_VERSION` was raised, and commit the file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pia_batch.config import ModelConfig
from pia_batch.engine import PiaEngine, self_test


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Store the clip that the self-test expects of the embedded model.")
    parser.add_argument("--to", type=Path, default=self_test.EXPECTED, help="file to write (default: the package's)")
    engine = PiaEngine.load(ModelConfig(dtype="float32"), device="cpu")
    self_test.write_expected(engine.with_scheduler(self_test.scheduler(None, embedded=True)), parser.parse_args().to)


if __name__ == "__main__":
    main()
