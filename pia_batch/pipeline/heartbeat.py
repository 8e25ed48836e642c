"""The sign of life of an engine's worker: the ledger counts from it how long engines have lived and drawn."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from typing import Protocol

from pia_batch.pipeline.attempts import PULSE_S


class Signs(Protocol):
    """What a Pulse needs of the ledger, from wherever that is."""

    def alive(self, engine: str, seconds: float, drawn_seconds: float | None) -> None:
        """As `ledger.Ledger.alive`."""


class Pulse:
    """Tells the ledger, for as long as this process lives, that its engine is alive, since when, and how busy.

    Args:
        signs: the ledger.
        drawn_seconds: how long the engine has drawn by now; None: it still loads.
        wait: for so many seconds.
    """

    def __init__(
        self,
        signs: Signs,
        drawn_seconds: Callable[[], float | None] = lambda: None,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        self._signs, self._drawn_seconds, self._wait = signs, drawn_seconds, wait
        self._engine, self._began = uuid.uuid4().hex, time.monotonic()
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def _beat(self) -> None:
        while True:
            try:
                self._signs.alive(self._engine, time.monotonic() - self._began, self._drawn_seconds())
            except Exception:  # noqa: BLE001 - the ledger ends with the run, and its loss is told by `begin`
                return
            self._wait(PULSE_S)
