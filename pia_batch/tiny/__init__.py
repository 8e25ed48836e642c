"""Embedded model: a PIA checkpoint small enough to be part of a package, and a sample manifest for it.

It animates coloured shapes in 64 x 64 pixels. Its config is `pia_batch/config/embedded.yaml`; the programs in
jobs/tiny/ train it.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

PATH: Path = _HERE / "checkpoint"
"""Diffusers folder with its motion adapter in `motion_adapter/`."""

SAMPLE: Path = _HERE / "sample"
"""Folder of the sample manifest, `requests.parquet`, and of the images that it names by relative path."""
