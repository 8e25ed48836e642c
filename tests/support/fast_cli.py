"""The real command line over a fake engine: `python tests/support/fast_cli.py SECONDS FOLDER run --manifest …`.

SECONDS is the time of each batch; every worker that loads the engine leaves a file named by its pid in FOLDER.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fakes import FakeShelf, RestlessEngine

from pia_batch import cli
from pia_batch.config import RunConfig
from pia_batch.driver import run as driver_run
from pia_batch.schema.run_record import RunSummary
from pia_batch.weights.identity import engine_id, resolved_dtype
from pia_batch.weights.resolve import resolve


@dataclass(frozen=True)
class FastLoader:
    """The loader of a fake engine under the identity of the config's model."""

    engine_id: str
    seconds: float
    folder: Path

    @classmethod
    def of(cls, config: RunConfig, seconds: float, folder: Path) -> FastLoader:
        model = config.model
        identity = engine_id(model, resolve(model), resolved_dtype(model, on_gpu=False))
        return cls(identity, seconds, folder)

    def __call__(self) -> FakeShelf:
        (self.folder / str(os.getpid())).touch()
        return FakeShelf(RestlessEngine(engine_id=self.engine_id, seconds=self.seconds))


def main(seconds: float, folder: Path, arguments: list[str]) -> int:
    """Run the command and return its exit code. Signals are handled in the main thread only."""
    real = driver_run.run

    @functools.wraps(real)
    def run(config: RunConfig, **options: Any) -> RunSummary:
        return real(config, load_engines=FastLoader.of(config, seconds, folder), **options)

    driver_run.run = run
    try:
        cli.main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    except Exception:  # noqa: BLE001 - as Python itself ends a program
        traceback.print_exc()
        return 1
    finally:
        driver_run.run = real
    return 0


if __name__ == "__main__":
    import fast_cli  # workers find its classes under this name

    sys.exit(fast_cli.main(float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
