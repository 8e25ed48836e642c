"""Real mounts that only one process sees: a full disk, a read-only one, a user without rights."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

_OWN_MOUNTS = ("unshare", "--mount", "--map-root-user")


@functools.cache
def are_possible() -> bool:
    """True if this machine lets a test mount a disk of its own."""
    if shutil.which("unshare") is None:
        return False
    done = subprocess.run([*_OWN_MOUNTS, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    return done.returncode == 0


def run_on(
    folder: Path,
    options: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    before: str = ":",
    kind: str = "tmpfs",
) -> subprocess.CompletedProcess[str]:
    """Run a command that sees a disk with these options of `mount` at `folder`; `before` is shell run in it first."""
    script = f'mount -t {kind} -o "$1" none "$2" && cd "$2" && {before} && cd / && shift 2 && exec "$@"'
    return subprocess.run(
        [*_OWN_MOUNTS, "sh", "-c", script, "sh", options, str(folder), *command],
        env=dict(environment),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
