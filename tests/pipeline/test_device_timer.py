"""Device time: each second is either busy or idle, and can be read while it passes."""

import time

import pytest

from pia_batch.pipeline.device_timer import DeviceTimer


def test_seconds_are_busy_or_idle_and_count_while_they_pass() -> None:
    counted: dict[tuple[str, ...], float] = {}

    def count(name: str, value: float, **tags: str) -> None:
        key = (name, *tags.values())
        counted[key] = counted.get(key, 0.0) + value

    began = time.monotonic()
    timer = DeviceTimer("cuda:0", count)
    assert timer.generating_seconds == 0
    time.sleep(0.02)
    for _ in range(2):
        with timer.generating():
            time.sleep(0.02)
            during = timer.generating_seconds
            time.sleep(0.01)
    lived = time.monotonic() - began

    busy, idle = (counted["pia_batch_device_seconds_total", state, "cuda:0"] for state in ("busy", "idle"))
    assert 0.02 <= during < timer.generating_seconds
    assert timer.generating_seconds == busy == counted["pia_batch_stage_seconds_total", "generate"]
    assert busy >= 0.06
    assert idle >= 0.02
    assert busy + idle == pytest.approx(lived, abs=0.01)


def test_a_batch_that_raises_counts_too() -> None:
    timer = DeviceTimer("cpu", lambda *_, **__: None)

    def fail() -> None:
        with timer.generating():
            time.sleep(0.01)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()

    seconds = timer.generating_seconds
    assert seconds >= 0.01
    assert timer.generating_seconds == seconds  # the device is idle again
