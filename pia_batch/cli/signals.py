"""The first SIGINT or SIGTERM as an event, for commands that end what they do before they leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def first_signal(told: Callable[[int], None] = lambda _: None) -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second one ends this process at once.

    Args:
        told: called with the first one's number.
    """
    event = threading.Event()
    asked = False

    def ask(number: int, _: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        told(number)
        event.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
