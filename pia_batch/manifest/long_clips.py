"""Checks of long clips: the method, its windows, and the memory that they need."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import RunConfig
from pia_batch.config.contexts import DEEP_SHARE
from pia_batch.config.model_limits import Limits, ModelLimits
from pia_batch.manifest.casting import Columns
from pia_batch.manifest.effective import context, motion, positions
from pia_batch.schema.settings import CONTEXTS


def check(columns: Columns, config: RunConfig, limits: Limits, get: Mapping[str, pa.Array], area: pa.Array) -> None:
    """Reject the rows whose `context` and its options cannot work, or need more memory than the limits allow.

    Args:
        columns: Rows; rejected ones are added to theirs.
        config: Source of the defaults and the limits.
        limits: Limits of the models, by their names.
        get: Numbers of the rows with their defaults, by setting.
        area: Number of pixels of a frame.
    """
    method, length = context(columns, config, limits)
    windows, freenoise, chain = (pc.fill_null(pc.equal(method, name), False) for name in CONTEXTS)
    frames = pc.if_else(pc.or_(windows, chain), length, get["num_frames"])
    kept = _kept_frames(columns, config, get, windows, length)
    cap = config.limits.max_call_pixels
    product = f"width x height x the frames of one UNet call up to {cap} (limits.max_call_pixels)"
    columns.reject("width", pc.greater(pc.multiply(area, frames), cap), "out_of_range", product)
    if kept is not None:
        product = (
            f"with model.speed, width x height x (context_length + all windows' frames / {round(1 / DEEP_SHARE)}) up "
            f"to {cap} (limits.max_call_pixels), as deep features of every window are kept; set model.speed to exact"
        )
        columns.reject("num_frames", pc.greater(pc.multiply(area, pc.add(frames, kept)), cap), "out_of_range", product)
    if not pc.any(pc.is_valid(method)).as_py():
        return
    for known in {limits.get(name, ModelLimits()).positions for name in config.all_models}:
        own = pc.equal(positions(columns, config, limits), known)
        long = pc.and_(pc.and_(pc.is_valid(method), own), pc.greater(length, known))
        allowed = f"1 to {known}, the frames that the motion modules know"
        columns.reject("context_length", long, "out_of_range", allowed)
    for name, bad, allowed in (
        ("context_overlap", pc.and_(windows, pc.greater_equal(get["context_overlap"], length)), "below"),
        ("context_stride", pc.and_(freenoise, pc.greater(get["context_stride"], length)), "at most"),
    ):
        columns.reject(name, bad, "out_of_range", f"{allowed} context_length")
    _, loop, _ = motion(columns, config.defaults)
    columns.reject("loop", pc.and_(chain, loop), "invalid_value", "false where `context` is chain")
    late = pc.and_(chain, pc.greater(get["cond_frame"], 0))
    columns.reject("cond_frame", late, "invalid_value", "0 where `context` is chain")
    columns.reject("context_length", pc.and_(chain, pc.less(length, 2)), "out_of_range", "2 to 32 in a chain")


def _kept_frames(
    columns: Columns, config: RunConfig, get: Mapping[str, pa.Array], windows: pa.Array, length: pa.Array
) -> pa.Array | None:
    """Return the frames of a call that need as much memory as each row's deep features; None if none are kept."""
    fast = [name for name, model in config.all_models.items() if model.speed != "exact"]
    if not fast or not pc.any(windows).as_py():
        return None
    _, loop, _ = motion(columns, config.defaults)
    keeps = pc.and_(windows, pc.is_in(pc.fill_null(columns.typed["model"], config.model.name), pa.array(fast)))
    step = pc.max_element_wise(pc.subtract(length, get["context_overlap"]), 1)
    further = pc.add(pc.if_else(loop, get["num_frames"], pc.subtract(get["num_frames"], length)), pc.subtract(step, 1))
    number = pc.add(pc.divide(further, step), pc.if_else(loop, 0, 1))
    kept = pc.multiply(pc.cast(pc.multiply(number, length), pa.float64()), DEEP_SHARE)
    return pc.if_else(keeps, kept, 0.0)
