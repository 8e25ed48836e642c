"""Ray on this machine: in the process of the tests, or in one of its own for the commands that a test starts."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from places import PYTHONPATH


def start(**options: Any) -> None:
    """Start Ray without a dashboard; its workers find the support modules. `options` are those of `ray.init`.

    It needs no token: a process whose Ray had one cannot connect to a cluster without one later, and all tests of a
    process share its C++ settings.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        _init(runtime_env={"env_vars": {"PYTHONPATH": PYTHONPATH}}, **options)


def _init(**options: Any) -> None:
    """Start Ray as a run does: without the processes of Ray that neither runs nor tests use."""
    import ray  # noqa: PLC0415 - slow, and conftest.py imports this module

    from pia_batch.driver import own_ray_node  # noqa: PLC0415

    with own_ray_node.started_by_init():
        ray.init(address="local", include_dashboard=False, log_to_driver=False, **options)


def is_running() -> bool:
    """Return whether this process has a Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def stop() -> None:
    """Stop the Ray of this process, if there is one."""
    import ray  # noqa: PLC0415

    ray.shutdown()


@contextmanager
def started(**options: Any) -> Iterator[None]:
    """Run a block with a Ray of its own."""
    start(**options)
    try:
        yield
    finally:
        stop()


@contextmanager
def elsewhere(environment: Mapping[str, str] = os.environ) -> Iterator[dict[str, str]]:
    """Run a block with a Ray in a process of its own; yield the variables by which commands use it.

    Commands that each start a Ray take some seconds more for it than those that share one. Workers have `environment`.
    """
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with tempfile.TemporaryDirectory(prefix="pb", dir="/tmp", ignore_cleanup_errors=True) as sessions:  # a short path
        others = {name: value for name, value in environment.items() if not name.startswith("RAY_")}
        variables = others | token | {"RAY_TMPDIR": sessions, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": PYTHONPATH}
        command = [sys.executable, __file__]
        with subprocess.Popen(
            command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address, "Ray did not start"
            yield token | {"RAY_ADDRESS": address}
            process.stdin.close()  # it ends then


def _serve() -> None:
    """Start Ray, print its address, and end it once standard input is closed."""
    import ray  # noqa: PLC0415

    _init(num_cpus=2, object_store_memory=200 * 2**20, logging_level="ERROR")
    print(ray.get_runtime_context().gcs_address, flush=True)  # noqa: T201 - for the process that started this one
    sys.stdin.read()
    stop()


if __name__ == "__main__":
    _serve()
