"""Folders that tests and the processes that they start need to know."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""

SUPPORT = Path(__file__).parent

PYTHONPATH = os.pathsep.join(map(str, (ROOT, SUPPORT)))
"""Where a process of its own, such as a worker of Ray, finds `pia_batch`, the tests and their support."""
