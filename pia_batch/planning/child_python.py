"""Child processes of this Python: they search for modules where this process does, and in the same order."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def module_command(name: str, *arguments: str) -> list[str]:
    """Return the command that runs a module in a process of its own; use it with `child_environment`.

    Without -P, Python would look into the working folder first, where `queue.py` or `torch.py` may be a user's script.
    """
    return [sys.executable, "-P", "-m", name, *arguments]


def child_environment(**more: str) -> dict[str, str]:
    """Return this process's environment, with its search path for modules as PYTHONPATH, and `more`."""
    searched = [path or str(Path.cwd()) for path in sys.path]
    return os.environ | more | {"PYTHONPATH": os.pathsep.join(searched)}
