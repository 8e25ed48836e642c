"""Folders that tests and the processes that they start use."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""

SUPPORT = Path(__file__).parent

PYTHONPATH = os.pathsep.join(map(str, (ROOT, SUPPORT)))
"""Path by which other processes, such as workers of Ray, import `pia_batch` and these support modules."""
