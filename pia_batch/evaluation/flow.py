"""Measures by optical flow: smoothness, dynamic degree and warp error. The only module that uses OpenCV.

The flow is that of DIS (Kroeger et al., ECCV 2016) at its medium preset, from grey values, in pixels.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
import numpy.typing as npt

from pia_batch.errors import ConfigError
from pia_batch.evaluation.pixels import WHITE, Frames

MIN_SIDE_PX = 12
"""Smallest width and height that the flow can be found at; a smaller clip has null for its measures."""

DYNAMIC_FPS = 8
"""Frames per second at which the dynamic degree takes frames, as VBench does."""

_LONGEST = 0.05
"""Share of the flow vectors of a pair, the longest ones, whose mean is the flow of the pair."""

Flow = npt.NDArray[np.float32]
"""(H, W, 2): movement of each pixel to the right and down, in pixels."""


def require_opencv() -> None:
    """Check that OpenCV is installed.

    Raises:
        ConfigError: It is not.
    """
    if importlib.util.find_spec("cv2") is None:
        msg = (
            "smoothness, dynamic_degree, warp_error: they need OpenCV, which is not installed; install "
            "`pia-batch[evaluate]` here and on every node, or leave them out with --no-flow"
        )
        raise ConfigError(msg)


class FlowMeasures:
    """Measures of clips by optical flow. One object serves one thread."""

    def __init__(self) -> None:
        cv2: Any = importlib.import_module("cv2")  # an extra: only who measures flow needs it

        cv2.setNumThreads(1)  # clips are measured side by side instead; and the result does not depend on the machine
        self._cv2 = cv2
        self._dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self._places = np.empty((0, 0, 2), dtype=np.float32)

    def __call__(self, frames: Frames, fps: float) -> dict[str, float | None]:
        """Return `smoothness`, `dynamic_degree` and `warp_error`; None where a clip is too short or too small.

        Args:
            frames: Clip, uint8, shape (F, H, W, 3), 0-255.
            fps: Rate of the clip, in frames per second.
        """
        num_frames, height, width, _ = frames.shape
        if num_frames < 2 or min(height, width) < MIN_SIDE_PX:  # noqa: PLR2004 - a pair
            return dict.fromkeys(("smoothness", "dynamic_degree", "warp_error"))
        if self._places.shape[:2] != (height, width):
            columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
            self._places = np.stack([columns, rows], axis=-1)
        grey = [self._cv2.cvtColor(frame, self._cv2.COLOR_RGB2GRAY) for frame in frames]
        interval = max(1, round(fps / DYNAMIC_FPS))
        errors, moved = [], {}
        for t in range(num_frames - 1):
            flow = self.flow(grey[t], grey[t + 1])
            errors.append(self._warp_error(frames[t], frames[t + 1], flow))
            if interval == 1:
                moved[t] = _longest(flow)
        if interval > 1:
            starts = range(0, num_frames - interval, interval)
            moved = {t: _longest(self.flow(grey[t], grey[t + interval])) for t in starts}
        missed = [self._missed(frames, t, self.flow(grey[t - 1], grey[t + 1])) for t in range(1, num_frames - 1, 2)]
        known = [error for error in errors if error is not None]
        return {
            "smoothness": 1 - float(np.mean(missed)) / WHITE if missed else None,
            "dynamic_degree": float(_is_dynamic(list(moved.values()), len(grey[::interval]), min(height, width), fps)),
            "warp_error": float(np.mean(known)) if known else None,
        }

    def flow(self, start: npt.NDArray[np.uint8], end: npt.NDArray[np.uint8]) -> Flow:
        """Return the flow between two grey frames, uint8, shape (H, W)."""
        found: Flow = self._dis.calc(start, end, None)
        return found

    def _warp_error(self, frame: Frames, following: Frames, flow: Flow) -> float | None:
        """Return the warp error of one pair, or None if all of it moves out of the frame."""
        height, width = flow.shape[:2]
        ends = self._places + flow
        inside = (ends >= 0).all(axis=-1) & (ends[..., 0] <= width - 1) & (ends[..., 1] <= height - 1)
        if not inside.any():
            return None
        return float(np.abs(self._moved(following, ends) - frame.astype(np.float32))[inside].mean())

    def _missed(self, frames: Frames, t: int, flow: Flow) -> float:
        """Return the difference of frame t from what `flow`, between its neighbours, puts there: grey levels."""
        half = flow * np.float32(0.5)
        before = self._moved(frames[t - 1], self._places - half)
        after = self._moved(frames[t + 1], self._places + half)
        return float(np.abs((before + after) / 2 - frames[t].astype(np.float32)).mean())

    def _moved(self, frame: Frames, places: Flow) -> npt.NDArray[np.float32]:
        """Return the frame's colours at these places, between pixels by bilinear interpolation."""
        cv2 = self._cv2
        found: npt.NDArray[np.float32] = cv2.remap(
            frame.astype(np.float32), places, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        return found


def _longest(flow: Flow) -> float:
    """Return the mean length of the longest 5 % of the vectors, in pixels."""
    lengths = np.sqrt(np.square(flow).sum(axis=-1)).ravel()
    count = max(1, int(lengths.size * _LONGEST))
    return float(np.partition(lengths, lengths.size - count)[-count:].mean())


def _is_dynamic(moved: list[float], num_frames: int, side: int, fps: float) -> bool:
    """Return True if enough pairs move far enough.

    Args:
        moved: Flow of each pair, in pixels.
        num_frames: Number of frames between which these pairs are.
        side: Shorter side of the clip, in pixels.
        fps: Rate of the clip, in frames per second.
    """
    least = max(1.0, DYNAMIC_FPS / fps) * 6.0 * side / 256.0
    return sum(each > least for each in moved) >= max(1, round(4 * num_frames / 16))
