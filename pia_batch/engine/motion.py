"""Motion: similarity of each frame to the input image, computed from the settings of a shot.

Does not use tensors or networks.
"""

from __future__ import annotations

from pia_batch.config.arithmetic import Arithmetic
from pia_batch.engine.shots import Shot

_PRESETS: tuple[tuple[float, ...], ...] = (
    (1.0, 0.9, 0.85, 0.85, 0.85, 0.8),
    (1.0, 0.8, 0.8, 0.8, 0.79, 0.78, 0.75),
    (1.0, 0.8, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.5),
    (1.0, 0.9, 0.85, 0.85, 0.85, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.85, 0.85, 0.9, 1.0),
    (1.0, 0.8, 0.8, 0.8, 0.79, 0.78, 0.75, 0.75, 0.75, 0.75, 0.75, 0.78, 0.79, 0.8, 0.8, 1.0),
    (1.0, 0.8, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5, 0.5, 0.6, 0.7, 0.7, 0.7, 0.7, 0.8, 1.0),
    (0.5, 0.4, 0.4, 0.4, 0.35, 0.3),
    (0.5, 0.4, 0.4, 0.4, 0.35, 0.35, 0.3, 0.25, 0.2),
    (0.5, 0.2),
)
"""Similarity to the image by distance from the conditioning frame, for each motion_scale. 3 to 5 loop after 16 frames.

Source: open-mmlab/PIA `animatediff/utils/util.py`, in the order of diffusers: the original has 6 and 8 swapped.
"""


_FIRST_STYLE = 6


def motion_coefficients(shot: Shot, arithmetic: Arithmetic = "diffusers") -> tuple[float, ...]:
    """Return one coefficient for each frame: its similarity to the image, 0 to 1 for the presets.

    A curve is indexed by the distance to `cond_frame`; beyond its end it keeps its last value. In a loop, the last
    frame has the coefficient of the first, at any number of frames and any `cond_frame`.

    Source: `prepare_mask_coef_by_statistics` of open-mmlab/PIA; loops of other lengths than 16 are resampled from it.
    """
    frames = range(shot.num_frames)
    if shot.is_loop:
        loop = _resampled(_PRESETS[3 + shot.motion_scale % 3], shot.num_frames)
        # The last frame repeats the phase of the first, so one turn is a frame shorter than the clip.
        turn = max(1, shot.num_frames - 1)
        return tuple(loop[(frame - shot.cond_frame) % turn] for frame in frames)
    curve = _preset(shot.motion_scale, arithmetic) if shot.motion_curve is None else shot.motion_curve
    return tuple(curve[min(abs(frame - shot.cond_frame), len(curve) - 1)] for frame in frames)


def _preset(motion_scale: int, arithmetic: Arithmetic) -> tuple[float, ...]:
    """Return the preset of a motion_scale; the original has the styles 6 to 8 in the reverse order."""
    if arithmetic == "original" and motion_scale >= _FIRST_STYLE:
        motion_scale = _FIRST_STYLE + len(_PRESETS) - 1 - motion_scale
    return _PRESETS[motion_scale]


def _resampled(curve: tuple[float, ...], count: int) -> tuple[float, ...]:
    """Return the curve at `count` equidistant positions from its first to its last value, linearly interpolated."""
    last = len(curve) - 1
    values = []
    for index in range(count):
        position = index * last / max(1, count - 1)
        left = int(position)
        values.append(curve[left] + (position - left) * (curve[min(left + 1, last)] - curve[left]))
    return tuple(values)
