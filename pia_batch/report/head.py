"""Head of a page: facts and figures of a run, in words and round numbers. Shows only what the data contains."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pia_batch.config import EMBEDDED, RunConfig, yaml_text
from pia_batch.report.results import ResultCounts
from pia_batch.schema.run_record import RunRecord
from pia_batch.storage import uris

REMEDIES = {
    "missing_value": "fill the column",
    "invalid_type": "give the column the type that the message names",
    "not_finite": "replace NaN or infinity",
    "out_of_range": "choose a value in the range that the message names",
    "invalid_value": "choose one of the values that the message names",
    "invalid_id": "1 to 512 bytes without control characters",
    "duplicate_id": "give different requests different ids",
    "unsupported": "clear the column, or configure the feature that the message names",
    "blocked_prompt": "the prompt holds a word of `safety.blocklist` or `safety.blocked_words`; change one of them",
    "image_not_allowed": "the image is outside of the manifest's own store; allow its place with `images.allow`",
    "image_unavailable": "the image is missing, may not be read, is too large or did not arrive in time; fix the "
    "cause, then use `--retry-failed`",
    "image_unreadable": "not an image of an accepted format, corrupt, or more pixels than `images.max_pixels`",
    "image_mismatch": "the image is not the one of `image_sha256`",
    "unsupported_setting": "the model does not support the setting, such as more frames than its motion modules allow",
    "non_finite": "the network overflowed; try `model.dtype: float32` or another seed",
    "degenerate": "the clip is flat or frozen: below `limits.min_frame_std` or `limits.min_motion`",
    "unsafe": "`safety.checker` flags the image or the clip; change them, or set `safety.policy: flag`",
    "engine_error": "the engine raised an exception for this request, and generates others; see the worker's log",
    "worker_crash": "the worker died at every attempt; check the image, the settings and the worker's log",
    "timeout": "the request took more than its share of `limits.timeout_s`; raise the limit, or request less work",
    "encoding_failed": "the frames could not be encoded, or the stored file does not decode; see `pia-batch verify`",
    "out_of_memory": "one request alone is too large for the device, or for its worker",
}
"""Remedy for each error kind, as in docs/results.md."""


@dataclass(frozen=True)
class Tile:
    """One figure of the page's head."""

    label: str
    value: str
    note: str


class PageHead:
    """Contents of the page's head."""

    def __init__(
        self,
        output: str,
        record: RunRecord | None,
        counts: ResultCounts,
        config: dict[str, Any],
        price: float | None,
        reload_s: float | None = None,
        evaluation_id: str | None = None,
        comparisons: Sequence[tuple[str, str]] = (),
    ) -> None:
        """Collect the contents.

        Args:
            output: Current URI of the output.
            record: Contents of run.json, or None if that is gone.
            counts: Counts over all results.
            config: Config of the run, without secrets.
            price: Price of one device-hour, in any currency; None: not known.
            reload_s: Interval at which a browser reloads the page, in seconds; None: the run is over.
            evaluation_id: Evaluation whose measures the page shows; None: none.
            comparisons: Pages of comparisons to link to: title and reference of each.
        """
        self.run_id = counts.run_id
        self.manifest = record.manifest if record else ""
        self.output = output
        self.started_at = _moment(record.started_at) if record else ""
        self.version = record.version if record else ""
        self.engine_ids = record.engine_ids if record else {}
        further = [(name, model.get("base")) for name, model in (config.get("models") or {}).items()]
        first = (config.get("model") or {}).get("base") or ""
        self.model = ", ".join([first, *(f"{name}: {base or first}" for name, base in further)])
        self.requests, self.succeeded = counts.requests, counts.succeeded
        self.reload_s = reload_s
        self.evaluation_id = evaluation_id
        self.comparisons = [{"title": title, "reference": reference} for title, reference in comparisons]
        pending = (record.pending if record else None) or 0
        self.total = self.requests if reload_s is None else max(self.requests, pending)
        self.failed = counts.failed
        self.device = "GPU" if any(name.startswith("cuda") for name in counts.devices) else "Device"
        self.tiles = list(self._tiles(record, counts, price))
        self.failures = [
            {"kind": kind, "count": count, "remedy": REMEDIES.get(kind, ""), "examples": counts.failures[kind]}
            for kind, count in counts.kinds.most_common()
        ]
        uris_by_flag = {"manifest": self.manifest, "output": output}
        flags = [f"--{name} {shlex.quote(uri)}" for name, uri in uris_by_flag.items() if uri]
        self.command = " ".join(["pia-batch run CONFIG", *flags])
        self.config = yaml_text.dump(config) if config else ""

    def _tiles(self, record: RunRecord | None, counts: ResultCounts, price: float | None) -> Iterator[Tile]:
        summary, progress = (record.summary, record.progress) if record else (None, None)
        seconds = (summary.seconds if summary else 0.0) or (progress.seconds if progress else 0.0)
        if seconds and counts.generated:
            note = f"{duration(seconds)} in all, start-up included"
            yield Tile("Clips per second", f"{counts.generated / seconds:.3g}", note)
        if progress and progress.seconds_left and self.reload_s is not None:
            yield Tile("Time left", duration(progress.seconds_left), "at the current rate")
        if counts.device_seconds:
            names = ", ".join(sorted(counts.devices))
            mean = duration(counts.device_seconds / max(counts.generated, 1))
            yield Tile(f"{self.device} time", duration(counts.device_seconds), f"{mean} a clip, on {names}")
        if progress and progress.busy is not None:
            yield Tile("Engines busy", f"{progress.busy:.0%}", "of their uptime, start-up included")
        hours = (summary.gpu_hours if summary else 0.0) or (progress.gpu_hours if progress else None)
        if hours and price is not None:
            unit = progress.unit if progress else "GPU hours"
            note = f"{hours:.3g} {unit} at {price:,.2f}, start-up and idle time included"
            yield Tile("Cost", f"{hours * price:,.2f}", note)
        if counts.reused:
            note = f"from earlier runs: {duration(counts.reused_device_seconds)} saved"
            yield Tile("Reused", f"{counts.reused:,}", note)
        if summary and summary.duplicates:
            yield Tile("Repeated rows", f"{summary.duplicates:,}", "of the manifest; they share a result")
        if counts.num_bytes and counts.succeeded:
            note = f"{size(counts.num_bytes / counts.succeeded)} a clip"
            yield Tile("Stored", size(counts.num_bytes), note)


def duration(seconds: float) -> str:
    """Return seconds as text, with no-break spaces: `0.48 s`, `34.2 s`, `12 min 05 s`, `3 h 20 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        text = f"{hours:,} h {minutes:02d} min"
    elif minutes:
        text = f"{minutes} min {rest:02d} s"
    else:
        text = f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.1f} s"  # noqa: PLR2004 - which would be 10
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def size(num_bytes: float) -> str:
    """Return bytes as text, in powers of 1000: `12 kB`, `1.3 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 1000 or unit == "TB":  # noqa: PLR2004 - the next unit
            break
        num_bytes /= 1000
    return f"{num_bytes:.3g} {unit}"


def _moment(time: datetime) -> str:
    """Return a time as text, in UTC."""
    return f"{time.astimezone(UTC):%d %B %Y, %H:%M} UTC"


def reproduction_config(config: dict[str, Any], folder: str) -> str:
    """Return the config that makes a clip of this run again from a manifest elsewhere, as YAML.

    It has the keys that decide a clip and are neither in its result row nor at their default, and allows its image.

    Args:
        config: Config of the run, as run.json has it.
        folder: URI of the folder of the run's manifest; empty: not known.
    """
    base = str((config.get("model") or {}).get("base", EMBEDDED))
    plain = RunConfig.load(None, {"manifest": "-", "output": "-", "model.base": base}).model_dump(mode="json")
    del plain["model"]["base"]  # always written
    deciding = {name: config.get(name) or {} for name in ("model", "models", "images", "encoding")}
    deciding["placement"] = {"num_gpus": (config.get("placement") or {}).get("num_gpus", 0.0)}
    kept = _difference(deciding, plain)
    if folder:
        place = uris.parse(folder)
        own = folder if place.scheme == "file" else f"{place.scheme}://{place.authority}"  # the whole bucket is allowed
        allow = [*(deciding["images"].get("allow") or ()), own]
        kept["images"] = kept.get("images", {}) | {"allow": allow}
    return yaml_text.dump(kept, ascii_only=True)


def _difference(these: dict[str, Any], those: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in these.items():
        other = those.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            value = _difference(value, other)  # noqa: PLW2901 - the part of it that differs
            if value:
                kept[name] = value
        elif name not in those or value != other:
            kept[name] = value
    return kept
