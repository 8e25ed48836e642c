"""Users of this machine as whom a test starts a command."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

_RIGHTS = ("--inh-caps=+dac_override,+dac_read_search", "--ambient-caps=+dac_override,+dac_read_search")


def without_processes(home: Path) -> list[str]:
    """Return the beginning of a command of a user with no other processes, who may read and write what this one may.

    Limits of processes do not hold for root. Anybody else starts the command themselves, with the processes they have.
    """
    if os.geteuid():
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv")
    user = 2**16 + os.getpid()
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *_RIGHTS, "env", f"HOME={home}"]
