"""Errors in the start of an actor, without Ray."""

import pytest
from fakes import FakeControl

from pia_batch.errors import ConfigError
from pia_batch.pipeline.actor import AnimateActor


def test_an_error_of_the_start_is_raised_whole_by_every_call() -> None:
    actor = AnimateActor("99.0", FakeControl())

    for _ in range(2):
        with pytest.raises(ConfigError, match=r"and the driver 99\.0; install one version"):
            actor(None)
    assert actor._generating_seconds() is None
