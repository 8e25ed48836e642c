"""Output of Ray's start: passes standard error on, less one line that no option hides. Does not import Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_LEVEL_LINE = "Set ray log level from environment variable RAY_BACKEND_LOG_LEVEL"

_PASSED_ON_S = 2.0
"""Seconds to wait for the rest of the output, which a process that Ray started may keep open."""


@contextmanager
def without_level_line() -> Iterator[None]:
    """Hide the line by which Ray's C++ code reports its log level, in all that this process writes to stderr meanwhile.

    A process of its own filters, so that the last words of a Ray that ends this process arrive, too. Nothing is hidden
    where it cannot be started.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # closed
        yield
        return
    read_end, write_end = os.pipe()
    try:
        kept = _start_filter(read_end, stderr)
    finally:
        os.close(read_end)
    if kept is None:
        os.close(write_end)
        os.close(stderr)
        yield
        return
    try:
        _flush()
        os.dup2(write_end, 2)
        os.close(write_end)
        yield
    finally:
        _flush()
        os.dup2(stderr, 2)
        os.close(stderr)
        try:
            kept.wait(_PASSED_ON_S)
        except subprocess.TimeoutExpired:
            kept.kill()
            kept.wait()


def _start_filter(source: int, destination: int) -> subprocess.Popen[bytes] | None:
    """Start the process that passes lines on from one file descriptor to another, or return None."""
    command = ["grep", "-avF", "--line-buffered", _LEVEL_LINE]
    try:
        # A session of its own: Ctrl-C must not end it before this process.
        return subprocess.Popen(command, stdin=source, stdout=destination, start_new_session=True)  # noqa: S603 - constant
    except OSError:
        return None


def _flush() -> None:
    if sys.stderr is not None:
        sys.stderr.flush()
