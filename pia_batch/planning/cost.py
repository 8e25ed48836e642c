"""Estimates of the device hours, cost and bytes of a run before it begins.

The work of a request is counted, operator by operator. The speed of a device is measured if this output already has
finished requests; otherwise it is an estimate from published figures. Every figure states which of the two it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import EMBEDDED, ModelConfig, RunConfig
from pia_batch.config.finishing import generated_frames
from pia_batch.config.speed_presets import work_share
from pia_batch.journal.log import Journal
from pia_batch.media.codecs import CODECS
from pia_batch.planning.statistics import Statistics, work_of
from pia_batch.schema.columns import SUCCEEDED, Row

_UNET_TFLOP, _ATTENTION_TFLOP, _VAE_TFLOP = 35.354, 3.920, 41.347
"""TFLOP for 16 frames at 512 x 512 pixels: one guided evaluation of the UNet; the part of it that is spatial
self-attention, which grows with the square of the pixels; encoding and decoding by the VAE.

Counted on Stable Diffusion 1.5 with PIA's motion modules, diffusers 0.42.1."""

_REFERENCE_PIXELS, _REFERENCE_FRAMES = 512 * 512, 16

_EVALUATIONS = {"heun": 2}
"""Evaluations of the UNet per step, for schedulers that need more than one."""

_SAMPLED_FRAGMENTS, _SAMPLED_ROWS = 16, 100


@dataclass(frozen=True)
class Device:
    """Throughput of a GPU model in TFLOP/s, from a low to a high estimate."""

    name: str
    low: float
    high: float
    source: str


DEVICES = (
    Device("H100", 259, 314, "26-32 % of its peak: the roofline of float16 kernels without compilation"),
    Device("H200", 276, 334, "1.065 x H100, as in MLPerf Inference v4.1, Stable Diffusion XL, Offline"),
    Device("A100", 81, 125, "26 % of its peak, as H100, to 40 %, as in diffusers' tutorial fast_diffusion, bfloat16"),
    Device("RTX 4090", 62, 77, "reports of AnimateDiff: guoyww/AnimateDiff #25, ComfyUI-AnimateDiff-Evolved #146"),
)
"""Devices with estimates from published figures and counted operations. This project measured none of them."""


@dataclass(frozen=True)
class Measurement:
    """Speed and size of the finished requests of an output."""

    num_clips: int
    device: str
    """Device that generated most of them."""
    tflops: float
    """Throughput of the device, in TFLOP/s."""
    bytes_per_pixel: dict[str, float]
    """Bytes per pixel of every frame, by format."""


@dataclass(frozen=True)
class Cost:
    """Hours of one device, from a low to a high estimate; a measurement is the same number twice."""

    device: str
    hours: tuple[float, float]
    source: str


def measure_finished(
    journal: Journal, fragments: Sequence[str], config: RunConfig, engine_ids: Mapping[str, str]
) -> Measurement | None:
    """Measure a sample of the finished requests that these engines generated; return None if there are none.

    Args:
        journal: Journal of the config's output.
        fragments: Names of its fragments.
        config: Config with the schedulers and the speed presets of the models.
        engine_ids: Identity of each model's engine, by the model's name.

    Raises:
        StorageError: the store did not answer, or a fragment is damaged.
    """
    models = {engine_id: config.all_models[name] for name, engine_id in engine_ids.items()}
    step = -(-len(fragments) // _SAMPLED_FRAGMENTS) or 1
    tflop, seconds, devices = 0.0, 0.0, Counter[str]()
    pixels, num_bytes = Counter[str](), Counter[str]()
    for table in journal.read(list(fragments[::step])):
        ours = pc.and_(pc.equal(table["status"], SUCCEEDED), pc.is_in(table["engine_id"], pa.array(list(models))))
        rows = table.filter(pc.and_(ours, pc.greater(table["gpu_seconds"], 0.0))).slice(0, _SAMPLED_ROWS)
        for row, work in zip(rows.to_pylist(), work_of(_as_generated(rows)).to_pylist(), strict=True):
            sides = {name: row[name] // work["upscale"] for name in ("width", "height")}
            tflop += _tflop(work | sides, models[row["engine_id"]])
            seconds += row["gpu_seconds"]
            devices[row["device"]] += 1
            pixels[row["format"]] += row["width"] * row["height"] * row["num_frames"]
            num_bytes[row["format"]] += row["num_bytes"]
    if not devices:
        return None
    rates = {name: num_bytes[name] / pixels[name] for name in pixels}
    return Measurement(devices.total(), devices.most_common(1)[0][0], tflop / seconds, rates)


def estimate_costs(
    statistics: Statistics, num_requests: int, config: RunConfig, found: Measurement | None
) -> list[Cost]:
    """Return the hours of each kind of device, measured ones first; none of a GPU for the embedded model.

    Args:
        statistics: Statistics of the manifest.
        num_requests: Number of its pending requests that are animated.
        config: Config with the models, their schedulers and their speed presets.
        found: Measurement of finished requests.
    """
    if not statistics.num_pending:
        return []
    rows, models = statistics.work.to_pylist(), config.all_models
    tflop = sum(row["num_rows"] * _tflop(row, models[row["model"]]) for row in rows)
    seconds = tflop * num_requests / statistics.num_pending
    known = []
    if found is not None:
        hours = seconds / found.tflops / 3600
        known.append(Cost(found.device, (hours, hours), f"measured: {found.num_clips} finished clips of this output"))
    if any(models[row["model"]].base == EMBEDDED for row in rows):
        return known
    estimated = [
        Cost(each.name, (seconds / each.high / 3600, seconds / each.low / 3600), f"estimate: {each.source}")
        for each in DEVICES
    ]
    return known + estimated


def estimate_bytes(statistics: Statistics, num_requests: int, found: Measurement | None) -> tuple[int, int]:
    """Return the total bytes of the animations, from a low to a high estimate. Arguments as for `estimate_costs`."""
    low = high = 0.0
    for row in statistics.work.to_pylist():
        width, height = _sides(row)
        pixels = row["num_rows"] * row["num_frames"] * (row["interpolate"] or 1) * width * height * row["upscale"] ** 2
        rate = found.bytes_per_pixel.get(row["format"]) if found else None
        least, most = (rate, rate) if rate else CODECS[row["format"]].bytes_per_pixel
        low, high = low + pixels * least, high + pixels * most
    share = num_requests / max(1, statistics.num_pending)
    return int(low * share), int(high * share)


def estimate_finishing(statistics: Statistics, num_requests: int) -> float:
    """Return the hours of one core that finishing takes, next to the device's work. Arguments as for `estimate_costs`.

    It is an estimate from measurements of one CPU; see `config.finishing`.
    """
    seconds = 0.0
    for row in statistics.work.to_pylist():
        width, height = _sides(row)
        seconds += row["num_rows"] * row["num_frames"] * width * height * row["finish_ns"] / 1e9
    return seconds * num_requests / max(1, statistics.num_pending) / 3600


def _as_generated(results: pa.Table) -> pa.Table:
    """Return results with the number of frames that were generated, instead of those in the file."""
    if "interpolate" not in results.column_names:
        return results
    pairs = zip(results["num_frames"].to_pylist(), results["interpolate"].to_pylist(), strict=True)
    frames = pa.array([generated_frames(*pair) for pair in pairs], pa.int64())
    return results.set_column(results.column_names.index("num_frames"), "num_frames", frames)


def _tflop(work: Row, model: ModelConfig) -> float:
    """Return the TFLOP of one request, as if its model were Stable Diffusion 1.5."""
    width, height = _sides(work)
    area = width * height / _REFERENCE_PIXELS
    evaluation = (_UNET_TFLOP - _ATTENTION_TFLOP) * area + _ATTENTION_TFLOP * area**2
    evaluations = work["steps"] * _EVALUATIONS.get(model.scheduler.name, 1) * (1.0 if work["guided"] else 0.5)
    evaluations *= work_share(model.speed, work["num_inference_steps"])
    tflop: float = work["computed_frames"] * evaluations * evaluation + work["num_frames"] * _VAE_TFLOP * area
    return tflop / _REFERENCE_FRAMES


def _sides(work: Row) -> tuple[int, int]:
    """Return width and height in pixels; if they come from the image, the largest that they can be."""
    if work["width"] is None:
        return work["long_side"], work["long_side"]
    return work["width"], work["height"]
