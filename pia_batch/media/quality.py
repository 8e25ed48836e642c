"""Checks of clips and of stored animations: measures, limits on them, and a comparison with the request."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pia_batch.config import LimitsConfig
from pia_batch.errors import DegenerateError, EncodingError
from pia_batch.media import codecs
from pia_batch.schema.columns import Row


def check_animation(
    data: bytes, row: Row, on_frame: Callable[[npt.NDArray[np.uint8]], object] = lambda _: None
) -> codecs.MediaInfo:
    """Decode a whole animation and compare it with `width`, `height` and `num_frames` of its request or result.

    Args:
        data: The animation.
        row: Its request or result.
        on_frame: Function to call with each frame, uint8, shape (H, W, 3), RGB, 0-255.

    Raises:
        EncodingError: The animation does not decode, or is another one.
    """
    info = codecs.probe(data, row["format"], on_frame)
    found, wanted = (info.width, info.height, info.num_frames), (row["width"], row["height"], row["num_frames"])
    if found != wanted:
        msg = f"another {row['format']} was found: width, height, frames (got {found}, expected {wanted})"
        raise EncodingError(msg)
    return info


def measures(
    frames: npt.NDArray[np.uint8], condition: npt.NDArray[np.uint8], cond_frame: int = 0
) -> dict[str, float | None]:
    """Return the measures of a clip.

    Args:
        frames: Pixels of the clip, uint8, shape (F, H, W, 3), 0-255.
        condition: Fitted condition image, uint8, shape (H, W, 3), 0-255.
        cond_frame: Number of the frame that should equal the condition image.

    Returns:
        `frame_mean` and `frame_std` over all pixels, and `motion`, the mean absolute difference of neighbouring frames,
        all three in 0-255; `first_frame_psnr_db`, the PSNR of the condition frame against the condition image in dB,
        None if they are identical.
    """
    total = squares = moved = 0
    before: npt.NDArray[np.int32] | None = None
    for frame in frames:  # one at a time, and in whole numbers, so that a long clip needs little memory and is exact
        pixels = frame.astype(np.int32)
        total += int(pixels.sum(dtype=np.int64))
        squares += int(np.square(pixels).sum(dtype=np.int64))
        moved += 0 if before is None else int(np.abs(pixels - before).sum(dtype=np.int64))
        before = pixels
    error = float(np.square(frames[cond_frame].astype(np.int32) - condition).mean())
    mean, count = total / frames.size, frames.size
    return {
        "frame_mean": mean,
        "frame_std": math.sqrt((count * squares - total * total) / count**2),
        "motion": moved / (count - frames[0].size) if len(frames) > 1 else 0.0,
        "first_frame_psnr_db": None if error == 0 else 10 * float(np.log10(255**2 / error)),
    }


def refuse_degenerate(result: Row, row: Row, limits: LimitsConfig) -> None:
    """Refuse a clip that is flat or frozen beyond the config's limits.

    Args:
        result: Result with the `measures`.
        row: Request.
        limits: Limits of the config.

    Raises:
        DegenerateError: A measure is below its limit; the message names both.
    """
    for name, least, word in (("frame_std", limits.min_frame_std, "flat"), ("motion", limits.min_motion, "frozen")):
        measured = not (name == "motion" and row["num_frames"] == 1)
        if measured and least is not None and result[name] < least:
            msg = (
                f"the clip is {word}: its {name} is {result[name]:.3g}, below limits.min_{name} {least:g}; change "
                "the prompt, the seed or the image, or lower the limit"
            )
            raise DegenerateError(msg)
