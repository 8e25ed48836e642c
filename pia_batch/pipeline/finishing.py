"""Finishing of clips: what the settings of a request do to generated frames before they are encoded, frame by frame.

The order is: colour match, upscaling, sharpening, interpolation. It happens while the device generates the next batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from pia_batch.config.finishing import StoredSize, closes, stored_size
from pia_batch.media.codecs import Frames, FrameStream
from pia_batch.media.finishing.color_match import ColorMatch
from pia_batch.media.finishing.interpolation import interpolated
from pia_batch.media.finishing.sharpening import sharpen
from pia_batch.pipeline.request_rows import condition_image
from pia_batch.pipeline.upscaler_loader import Upscaler
from pia_batch.schema.columns import Row


@dataclass
class Finished:
    """Frames of one clip as they are stored.

    Attributes:
        frames: Frames for `codecs.encode`. A stream makes each frame when it is asked for.
        size: Their size, number and rate.
        seconds: Time that the stream has taken so far, in seconds; None if nothing is finished.
    """

    frames: Frames | FrameStream
    size: StoredSize
    seconds: float | None = field(default=None)


def finish(row: Row, frames: Frames, upscaler: Upscaler | None = None) -> Finished:
    """Return a clip as its request wants it stored.

    Args:
        row: Fetched request, with all settings.
        frames: Generated frames, uint8, shape (F, H, W, 3), RGB, 0-255.
        upscaler: Network that enlarges frames; needed where `upscale` is more than 1.
    """
    size = stored_size(row)
    if not (row["color_match"] or row["sharpen"] or (row["interpolate"] or 1) > 1 or (row["upscale"] or 1) > 1):
        return Finished(frames, size)

    def start() -> Iterator[Frames]:
        single = _single_frames(row, frames, upscaler)
        stream = interpolated(single, row["interpolate"] or 1, closing=closes(row))
        while True:
            started = time.monotonic()
            frame = next(stream, None)
            finished.seconds = (finished.seconds or 0.0) + time.monotonic() - started
            if frame is None:
                return
            yield frame

    finished = Finished(FrameStream((size.num_frames, size.height, size.width, 3), start), size, 0.0)
    return finished


def _single_frames(row: Row, frames: Frames, upscaler: Upscaler | None) -> Iterator[Frames]:
    """Yield the generated frames, each changed by itself."""
    factor = row["upscale"] or 1
    match = ColorMatch(np.asarray(condition_image(row))) if row["color_match"] else None
    for generated in frames:
        frame = generated if match is None else match(generated)
        if factor > 1:
            frame = _required(upscaler)(frame, factor)
        yield sharpen(frame, row["sharpen"]) if row["sharpen"] else frame


def _required(upscaler: Upscaler | None) -> Upscaler:
    if upscaler is None:
        msg = "the request asks for `upscale`, and this worker has no upscaler"
        raise AssertionError(msg)
    return upscaler
