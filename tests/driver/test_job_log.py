"""A job's log over connections that break: every character once, in order."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from hypothesis import given, settings
from hypothesis import strategies as st

from pia_batch.driver import job_log
from pia_batch.driver.job_log import FollowedLog


class Client:
    """Client whose connection breaks after so many characters, once for each of `breaks`, and then no more."""

    def __init__(self, log: str, breaks: list[int], piece: int) -> None:
        self._log, self._breaks, self._piece = log, breaks, piece

    async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
        end = self._breaks.pop() if self._breaks else None
        sent = self._log[:end]
        for start in range(0, len(sent), self._piece):
            yield sent[start : start + self._piece]
        if end is not None:
            msg = "the connection is gone"
            raise ConnectionResetError(msg)

    def get_job_logs(self, _: str) -> str:
        return self._log


@contextmanager
def at_once() -> Iterator[None]:
    """Let broken connections be opened again without a wait."""
    before, job_log.RECONNECT_S = job_log.RECONNECT_S, 0.0
    try:
        yield
    finally:
        job_log.RECONNECT_S = before


@settings(deadline=None, max_examples=40)
@given(st.text(max_size=40), st.lists(st.integers(0, 50), max_size=4), st.integers(1, 7))
def test_every_character_is_shown_once_whatever_breaks(log: str, breaks: list[int], piece: int) -> None:
    shown: list[str] = []

    with at_once():
        FollowedLog(Client(log, breaks, piece), "job", shown.append).finish()

    assert "".join(shown) == log


def test_a_log_that_can_no_longer_be_read_is_no_error() -> None:
    class Gone(Client):
        def get_job_logs(self, _: str) -> str:
            msg = "Request failed with status code 500"
            raise RuntimeError(msg)

    shown: list[str] = []

    FollowedLog(Gone("all of it", [], 4), "job", shown.append).finish()

    assert "".join(shown) == "all of it"
