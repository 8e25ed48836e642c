"""Examination: all preflight checks, in the order in which a run needs what they check."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from pia_batch.config import ModelConfig, PlacementConfig, RunConfig
from pia_batch.driver.preflight import cluster, devices, machine, storage
from pia_batch.driver.preflight.finding import Finding
from pia_batch.errors import environment_error, printable
from pia_batch.storage.object_store import Store


def examine(
    config: RunConfig | None,
    torch_facts: Callable[[], dict[str, Any]] | None = None,
    connection: Callable[[PlacementConfig], str | None] | None = None,
) -> Iterator[Finding]:
    """Check everything that a run needs, and yield one finding after the other.

    Writes two small objects to the output, and removes one of them. Fetches weights that are not on this machine. It
    starts a Ray of its own and ends it, or connects to the cluster, as a run does.

    Args:
        config: Config of the run; None: check this machine and the embedded model only.
        torch_facts: Function that returns torch's version and devices; None: `devices.torch_facts`.
        connection: Function that connects to Ray, and returns what kept it from that; None: `cluster.find_obstacle`.
    """
    place = PlacementConfig() if config is None else config.placement
    with _early(place, connection or cluster.find_obstacle) as connect:
        yield from _examine(config, place, torch_facts or devices.torch_facts, connect)


@contextmanager
def _early(
    place: PlacementConfig, connection: Callable[[PlacementConfig], str | None]
) -> Iterator[Callable[[PlacementConfig], str | None]]:
    """Start a Ray on this machine next to the other checks, as it takes the longest; connect to a cluster when asked.

    A cluster is asked for its token before anything connects to it.
    """
    if place.address != "local":
        yield connection
        return
    with ThreadPoolExecutor(1) as background:
        found = background.submit(connection, place)
        yield lambda _: found.result()


def _examine(
    config: RunConfig | None,
    place: PlacementConfig,
    torch_facts: Callable[[], dict[str, Any]],
    connection: Callable[[PlacementConfig], str | None],
) -> Iterator[Finding]:
    models = {"default": ModelConfig()} if config is None else config.all_models
    yield from machine.check_packages()
    yield from machine.check_codecs()
    yield from machine.check_process()
    facts: dict[str, Any] = {"devices": []}
    try:
        facts = torch_facts()
    except (OSError, ValueError, subprocess.SubprocessError) as err:
        message = f"torch cannot be used: {printable(str(err))}"
        yield Finding("fail", "devices", message, "install the torch that fits this machine: https://pytorch.org")
    else:
        yield from devices.check_devices(facts, place, models)
    yield from guarded("disk", machine.check_disks(models))
    yield from guarded("weights", storage.check_weights(models))
    if config is not None:
        yield from guarded("upscaler", storage.check_upscaler(config.upscale))
        yield from guarded("manifest", storage.check_manifest(config))
        yield from guarded("images", storage.check_images(config.images))
        yield from guarded("store", storage.check_store(Store(config.output)))
    is_reached = True
    for finding in cluster.check_ray(place, connection):
        is_reached = is_reached and finding.state != "fail"
        yield finding
    if is_reached or place.address == "local":  # Ray takes a minute to give up on a cluster that does not answer
        yield from cluster.check_capacity(place, len(facts["devices"]))


def guarded(subject: str, findings: Iterable[Finding]) -> Iterator[Finding]:
    """Yield the findings of a check; a fault of the operator's environment that ends it becomes a failure."""
    try:
        yield from findings
    except Exception as err:
        explained = environment_error(err)
        if explained is None:
            raise
        problem, _, remedy = str(explained).partition("; ")
        yield Finding("fail", subject, problem, remedy)
