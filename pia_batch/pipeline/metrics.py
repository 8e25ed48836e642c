"""What a run tells Prometheus, through Ray: each node of a cluster exports it beside Ray's own metrics.

Ray puts `ray_` before every name. Seconds and requests are counters, so that a rate over any time is exact; Ray's
histograms know their sum by the middle of a bucket only, and are not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ray.util import metrics


@dataclass(frozen=True)
class Metric:
    """One metric, as documented in docs/monitoring.md."""

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
"""Every metric of ours by its name, without Ray's prefix."""


class RayMeter:
    """`worker.Meter` in the process that first uses it: it may be sent to a worker before."""

    def __init__(self) -> None:
        self._made: dict[str, metrics.Counter | metrics.Gauge] = {}

    def count(self, name: str, value: float, **tags: str) -> None:
        """Add to a counter of METRICS; `tags` are all of its tags."""
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
