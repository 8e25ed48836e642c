"""Retries of one call to a remote store, with growing pauses.

Not stamina: its hooks are set for the whole process, and by default they log the text of every exception, in which
clients repeat credentials and signed URLs. Nor can it give each attempt what is left of a deadline.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

_JITTER = 0.25
"""Part of a pause by which it may be shorter or longer, so that workers that fail together do not return together."""


def retry(
    call: Callable[[], T],
    *,
    is_transient: Callable[[Exception], bool],
    pauses_s: Iterable[float],
    deadline: float | None = None,
    on_retry: Callable[[int, Exception], None] | None = None,
    hurry: threading.Event | None = None,
) -> T:
    """Return what `call` returns, after as many attempts as there are pauses and one more.

    Args:
        call: The attempt. An attempt that timed out may have had its effect.
        is_transient: Returns True for an exception after which another attempt may succeed.
        pauses_s: Pauses between the attempts, in seconds, before jitter.
        deadline: Time on the monotonic clock, in seconds, after which no attempt begins; None: no limit.
        on_retry: Called before each pause with the number of failed attempts and the last exception.
        hurry: Event that ends a pause when it is set.

    Raises:
        Exception: The exception of the last attempt.
    """
    for attempt, pause_s in enumerate(pauses_s, start=1):
        try:
            return call()
        except Exception as err:
            wait_s = pause_s * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - no secret depends on it
            if not is_transient(err) or (deadline is not None and time.monotonic() + wait_s > deadline):
                raise
            if on_retry is not None:
                on_retry(attempt, err)
        if hurry is None:
            time.sleep(wait_s)
        else:
            hurry.wait(wait_s)
    return call()
