"""Heartbeat of an engine's worker, from which the attempt tracker sums up uptime and generating time of engines."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from typing import Protocol

from pia_batch.pipeline.attempts import HEARTBEAT_S


class HeartbeatReceiver(Protocol):
    """The part of the attempt tracker that receives heartbeats, locally or remotely."""

    def heartbeat(self, engine: str, seconds: float, generating_seconds: float | None) -> None:
        """Record a heartbeat, as `attempts.AttemptTracker.heartbeat` does."""


class Heartbeat:
    """Thread that reports uptime and generating time of this process to the tracker for as long as the process lives.

    Args:
        receiver: Attempt tracker that receives the heartbeats.
        generating_seconds: Function that returns the seconds of generation so far, or None while the engine loads.
        wait: Function that sleeps for a number of seconds.
    """

    def __init__(
        self,
        receiver: HeartbeatReceiver,
        generating_seconds: Callable[[], float | None] = lambda: None,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        self._receiver, self._generating_seconds, self._wait = receiver, generating_seconds, wait
        self._engine, self._began = uuid.uuid4().hex, time.monotonic()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def send(self) -> bool:
        """Send a heartbeat now; return False if the tracker is gone.

        The worker calls it at the end of each task: a run may be over before the thread sends its next one.
        """
        try:
            self._receiver.heartbeat(self._engine, time.monotonic() - self._began, self._generating_seconds())
        except Exception:  # noqa: BLE001 - the tracker ends with the run; `begin` reports its loss otherwise
            return False
        return True

    def _beat(self) -> None:
        while self.send():
            self._wait(HEARTBEAT_S)
