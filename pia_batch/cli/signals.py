"""Signals: turns the first SIGINT or SIGTERM into an event, for commands that finish their work before they exit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def first_signal(on_signal: Callable[[int], None] = lambda _: None) -> Iterator[threading.Event]:
    """Yield an event that the first SIGINT or SIGTERM sets; the second one ends this process at once.

    Args:
        on_signal: Called with the number of the first signal.
    """
    event = threading.Event()
    received = False

    def handle(number: int, _: object) -> None:
        nonlocal received
        if received:
            raise KeyboardInterrupt
        received = True
        on_signal(number)
        event.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
