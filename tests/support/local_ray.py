"""Ray on this machine, in the process of the tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from places import PYTHONPATH


def start(**options: Any) -> None:
    """Start Ray without a dashboard; its workers find the support modules. `options` are those of `ray.init`.

    It needs no token: a process whose Ray had one cannot connect to a cluster without one later, and all tests of a
    process share its C++ settings.
    """
    import ray  # noqa: PLC0415 - slow, and conftest.py imports this module

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": PYTHONPATH}},
            **options,
        )


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
