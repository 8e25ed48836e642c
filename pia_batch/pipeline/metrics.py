"""Prometheus metrics of a run, through Ray: each node of a cluster exports them next to Ray's own metrics.

Ray prefixes every name with `ray_`. Seconds and requests are counters, so that a rate over any period is exact. Ray's
histograms compute their sum from the middle of a bucket, and are not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ray.util import metrics


@dataclass(frozen=True)
class Metric:
    """One metric, as documented in docs/monitoring.md.

    Attributes:
        kind: Prometheus type of the metric.
        tags: Names of all of its tags.
        meaning: Description, unit included.
    """

    kind: Literal["counter", "gauge"]
    tags: tuple[str, ...]
    meaning: str


METRICS = {
    "pia_batch_requests_total": Metric(
        "counter", ("status", "error_kind"), "requests committed: `succeeded`, or `failed` with the kind of error"
    ),
    "pia_batch_stage_seconds_total": Metric(
        "counter",
        ("stage",),
        "seconds of work: `fetch` (images, several at a time), `generate` (the device), `encode`, `commit`",
    ),
    "pia_batch_device_seconds_total": Metric(
        "counter", ("state", "device"), "seconds of each device: `busy` generating, or `idle` between two batches"
    ),
    "pia_batch_slots_total": Metric(
        "counter", ("state",), "places in batches: `filled` by a request, or `empty`; their ratio is the batch fill"
    ),
    "pia_batch_requests": Metric(
        "gauge", ("state",), "requests of the manifest: `done`, and `left`, those in flight included"
    ),
}
"""All metrics of this package by name, without Ray's prefix."""


class RayMeter:
    """Writer of METRICS through Ray. It may be pickled until its first use, which creates them in that process."""

    def __init__(self) -> None:
        self._made: dict[str, metrics.Counter | metrics.Gauge] = {}

    def count(self, name: str, value: float, **tags: str) -> None:
        """Add a number to a counter of METRICS; `tags` are all of its tags."""
        if value > 0:  # Ray refuses to add nothing
            self._get(name).inc(value, tags)

    def set(self, name: str, value: float, **tags: str) -> None:
        """Set a gauge of METRICS; `tags` are all of its tags."""
        self._get(name).set(value, tags)

    def _get(self, name: str) -> metrics.Counter | metrics.Gauge:
        if name not in self._made:
            metric = METRICS[name]
            sort = metrics.Counter if metric.kind == "counter" else metrics.Gauge
            self._made[name] = sort(name, description=metric.meaning, tag_keys=metric.tags)
        return self._made[name]
