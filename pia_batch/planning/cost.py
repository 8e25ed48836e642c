"""Device hours, cost and bytes of a run that has not begun.

The work of a request is counted, operator by operator. How fast a device does it is measured where this output has
finished requests already; else it is an estimate from published figures. Every figure says which of the two it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import EMBEDDED, ModelConfig, RunConfig
from pia_batch.config.speed_presets import work_share
from pia_batch.journal.log import Journal
from pia_batch.media.codecs import CODECS
from pia_batch.planning.statistics import Survey
from pia_batch.planning.work_classes import work_of
from pia_batch.schema.columns import SUCCEEDED, Row

_UNET_TFLOP, _ATTENTION_TFLOP, _VAE_TFLOP = 35.354, 3.920, 41.347
"""Of 16 frames at 512 x 512: one guided evaluation of the UNet; the part of that which is spatial self-attention, and
grows with the square of the pixels; the VAE there and back.

Counted on Stable Diffusion 1.5 with PIA's motion modules, diffusers 0.42.1."""

_REFERENCE_PIXELS, _REFERENCE_FRAMES = 512 * 512, 16

_EVALUATIONS = {"heun": 2}
"""How often a scheduler asks the UNet for each step, where that is not once."""

_SAMPLED_FRAGMENTS, _SAMPLED_ROWS = 16, 100


@dataclass(frozen=True)
class Device:
    """What a kind of GPU gets done, in TFLOP/s, from a cautious figure to a hopeful one."""

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
"""From published figures and counted operations. None was measured by this project."""


@dataclass(frozen=True)
class Measured:
    """What finished requests of an output took."""

    num_clips: int
    device: str
    """Where most of them were drawn."""
    tflops: float
    """TFLOP per second of the device."""
    bytes_per_pixel: dict[str, float]
    """By format, of every frame."""


@dataclass(frozen=True)
class Cost:
    """Hours of one device, from few to many; the same number twice where they were measured."""

    device: str
    hours: tuple[float, float]
    source: str


def measured(
    journal: Journal, fragments: Sequence[str], config: RunConfig, engine_ids: Mapping[str, str]
) -> Measured | None:
    """What a sample of the finished requests took that these engines drew; None where there are none.

    Args:
        journal: of the config's output.
        fragments: the names of its fragments.
        config: names the schedulers and the presets of speed.
        engine_ids: the identity of each model's engine, by the model's name.

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
        for row, work in zip(rows.to_pylist(), work_of(rows).to_pylist(), strict=True):
            tflop += _tflop(work | {"width": row["width"], "height": row["height"]}, models[row["engine_id"]])
            seconds += row["gpu_seconds"]
            devices[row["device"]] += 1
            pixels[row["format"]] += row["width"] * row["height"] * row["num_frames"]
            num_bytes[row["format"]] += row["num_bytes"]
    if not devices:
        return None
    rates = {name: num_bytes[name] / pixels[name] for name in pixels}
    return Measured(devices.total(), devices.most_common(1)[0][0], tflop / seconds, rates)


def costs(survey: Survey, num_requests: int, config: RunConfig, found: Measured | None) -> list[Cost]:
    """Hours of each kind of device; what was measured comes first. Nobody has measured the embedded model on a GPU.

    Args:
        survey: has seen the manifest.
        num_requests: how many of its pending requests are drawn.
        config: names the models, their schedulers and their presets of speed.
        found: what finished requests took.
    """
    if not survey.num_pending:
        return []
    rows, models = survey.work.to_pylist(), config.all_models
    tflop = sum(row["num_rows"] * _tflop(row, models[row["model"]]) for row in rows)
    seconds = tflop * num_requests / survey.num_pending
    known = []
    if found is not None:
        hours = seconds / found.tflops / 3600
        known.append(Cost(found.device, (hours, hours), f"measured: {found.num_clips} finished clips of this output"))
    if any(models[row["model"]].base == EMBEDDED for row in rows):
        return known
    guessed = [
        Cost(each.name, (seconds / each.high / 3600, seconds / each.low / 3600), f"estimate: {each.source}")
        for each in DEVICES
    ]
    return known + guessed


def num_bytes(survey: Survey, num_requests: int, found: Measured | None) -> tuple[int, int]:
    """Bytes of the animations that are drawn, from few to many. Arguments as for `costs`."""
    low = high = 0.0
    for row in survey.work.to_pylist():
        width, height = _sides(row)
        pixels = row["num_rows"] * row["num_frames"] * width * height
        rate = found.bytes_per_pixel.get(row["format"]) if found else None
        least, most = (rate, rate) if rate else CODECS[row["format"]].bytes_per_pixel
        low, high = low + pixels * least, high + pixels * most
    share = num_requests / max(1, survey.num_pending)
    return int(low * share), int(high * share)


def _tflop(work: Row, model: ModelConfig) -> float:
    """The operations of one request, as if its model were Stable Diffusion 1.5."""
    width, height = _sides(work)
    area, frames = width * height / _REFERENCE_PIXELS, work["num_frames"] / _REFERENCE_FRAMES
    evaluation = (_UNET_TFLOP - _ATTENTION_TFLOP) * area + _ATTENTION_TFLOP * area**2
    evaluations = work["steps"] * _EVALUATIONS.get(model.scheduler.name, 1) * (1.0 if work["guided"] else 0.5)
    evaluations *= work_share(model.speed, work["num_inference_steps"])
    tflop: float = frames * (evaluations * evaluation + _VAE_TFLOP * area)
    return tflop


def _sides(work: Row) -> tuple[int, int]:
    """Width and height; where they come from the image, the largest that they can be."""
    if work["width"] is None:
        return work["long_side"], work["long_side"]
    return work["width"], work["height"]
