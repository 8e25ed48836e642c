"""A program that is killed at a chosen moment, with every process that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable


def was_killed(command: list[str], is_ready: Callable[[], bool], delay_s: float) -> bool:
    """Start a command, and kill it `delay_s` seconds after it is ready; False if it ended before."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not is_ready() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(delay_s)
    has_ended = process.poll() is not None
    if not has_ended:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return not has_ended
