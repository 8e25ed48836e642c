"""Device time of a worker: seconds during which its engines generate, and the idle time between batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class DeviceTimer:
    """Timer of one device. One thread at a time uses the device; others may read `generating_seconds` meanwhile.

    Args:
        device: Name of the device, for the metrics.
        count: Function that adds to a counter of `metrics.METRICS`: name, number, tags by keyword.
    """

    def __init__(self, device: str, count: Callable[..., None]) -> None:
        self._device, self._count = device, count
        self._idle_since = time.monotonic()
        self._state: tuple[float, float | None] = 0.0, None
        """Seconds of finished batches, and the start of the current one. One value, because another thread reads it."""

    @property
    def generating_seconds(self) -> float:
        """Seconds of generation so far, including the batch that is on the device."""
        finished, since = self._state
        return finished if since is None else finished + time.monotonic() - since

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Count the enclosed work as busy time of the device, and the time since the last one as idle."""
        started = time.monotonic()
        self._count("pia_batch_device_seconds_total", started - self._idle_since, state="idle", device=self._device)
        before = self.generating_seconds
        self._state = before, started
        try:
            yield
        finally:
            self._idle_since = time.monotonic()
            busy = self._idle_since - started
            self._state = before + busy, None
            self._count("pia_batch_device_seconds_total", busy, state="busy", device=self._device)
            self._count("pia_batch_stage_seconds_total", busy, stage="generate")
