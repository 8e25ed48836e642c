"""Windows over the frames of long clips: their starts, weights and number, for each method of `context`.

Does not import torch, because the driver estimates costs with it.

Source: ComfyUI-AnimateDiff-Evolved "standard static" windows, with the overlap spread evenly; FreeNoise, arXiv
2310.15169.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pia_batch.schema.settings import Context

POSITIONS = 32
"""Number of frames that PIA's motion modules know: the length of their positional encoding."""

NOISE_STRIDE = 4
"""Number of frames that are shuffled together where the noise of later windows is that of earlier ones."""

TEMPORAL_SHARE = 0.1
"""Operations of the attention over frames, as a share of the UNet's: what FreeNoise computes once per window.

Counted on Stable Diffusion 1.5 with PIA's motion modules, 48 and 128 frames of 512 x 512.
"""


DEEP_SHARE = 1 / 16
"""Device memory of the deep features that a speed preset keeps of a frame, as a share of that of a frame in a call.

Counted on Stable Diffusion 1.5 in half precision with guidance, and rounded up: 320 channels at the size of the
latents, 5 MiB for a frame of 512 x 512, against activations of 127 MiB.
"""


def method(context: Context | None, num_frames: int, length: int, positions: int = POSITIONS) -> Context | None:
    """Return the method that generates a clip; None: one call for all frames.

    Args:
        context: Setting of the request.
        num_frames: Number of frames of the clip.
        length: `context_length` of the request.
        positions: Number of frames that the model's motion modules know.
    """
    if num_frames <= (positions if context is None else length):
        return None
    return context or "windows"


def window_starts(num_frames: int, length: int, overlap: int, *, circular: bool = False) -> tuple[int, ...]:
    """Return the first frame of each window of `context: windows`, in order; the last window ends at the last frame.

    Args:
        num_frames: Number of frames of the clip, more than `length`.
        length: Number of frames of a window.
        overlap: Smallest number of frames that neighbouring windows share, below `length`.
        circular: True for loops: windows continue at the first frame, and neighbours share exactly `overlap` frames,
            the last and the first ones perhaps more.
    """
    step = length - overlap
    if circular:
        return tuple(range(0, num_frames, step))
    rest, gaps = num_frames - length, -(-(num_frames - length) // step)
    return tuple((2 * index * rest + gaps) // (2 * gaps) for index in range(gaps + 1))  # rounds halves up


def sliding_starts(num_frames: int, length: int, stride: int, *, circular: bool = False) -> tuple[int, ...]:
    """Return the first frame of each window of `context: freenoise`; the last one ends at the last frame.

    Arguments as in `window_starts`; `stride` is the distance of neighbouring windows, at most `length`.
    """
    if circular:
        return tuple(range(0, num_frames, stride))
    last = num_frames - length
    return tuple(sorted({*range(0, last + 1, stride), last}))


def pyramid(length: int) -> tuple[int, ...]:
    """Return the weight of each frame of a window, largest in its middle, such as 1, 2, 2, 1."""
    return tuple(min(index + 1, length - index) for index in range(length))


def num_pieces(num_frames: int, length: int) -> int:
    """Return the number of pieces of `context: chain`: each begins with the last frame of the one before."""
    return 1 + -(-(num_frames - length) // (length - 1))


def computed_frames(row: Mapping[str, Any]) -> float:
    """Return the frames that one evaluation of the UNet computes for a request, as frames of a single call.

    Args:
        row: Effective settings, at least `num_frames`, `context` and its options, and `loop`.
    """
    num_frames, length = row["num_frames"], row["context_length"]
    match row["context"]:
        case "windows":
            starts = window_starts(num_frames, length, row["context_overlap"], circular=row["loop"])
            return float(len(starts) * length)
        case "chain":
            return float(num_pieces(num_frames, length) * length)
        case "freenoise":
            starts = sliding_starts(num_frames, length, row["context_stride"], circular=row["loop"])
            return float(num_frames + TEMPORAL_SHARE * (len(starts) * length - num_frames))
    return float(num_frames)
