"""The embedded model: a PIA checkpoint small enough to live in a package, and a manifest that shows it off.

It knows a world of coloured shapes (`world.py`) in 64 x 64 pixels. Nothing here imports torch but `architecture.py`.
"""

from pathlib import Path
from typing import Any

import yaml

_HERE = Path(__file__).resolve().parent

PATH: Path = _HERE / "checkpoint"
"""A diffusers folder with its motion adapter in `motion_adapter/`."""

SAMPLE: Path = _HERE / "sample"
"""The folder of the sample manifest, `requests.parquet`, and the images it names by relative path."""


def defaults() -> dict[str, Any]:
    """The keys of a run's config that suit this model, in the nesting of `RunConfig`; fresh at every call."""
    content: dict[str, Any] = yaml.safe_load((_HERE / "defaults.yaml").read_text(encoding="utf-8"))
    return content
