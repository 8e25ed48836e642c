"""Safety guard: what a safety checker says of images and clips, and what the config's policy makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pia_batch.config import SafetyConfig
from pia_batch.errors import UnsafeError
from pia_batch.pipeline.request_rows import NSFW_INPUT, condition_image
from pia_batch.schema.columns import Row

_REMEDY = "change the image, the prompt or the seed, or set safety.policy: flag"


class Checker(Protocol):
    """The part of `pia_batch.engine.safety_checker.SafetyChecker` that the last stage uses."""

    def scores(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float64]:
        """Return the score of each image, above 0 where it is flagged."""


LoadChecker = Callable[[SafetyConfig, str], Checker | None]
"""Function that gives a worker its safety checker on a device; None if the config names none."""


def load_checker(safety: SafetyConfig, device: str) -> Checker | None:
    """Return the safety checker that the config names, on the device of the engines; None if it names none."""
    if safety.checker is None:
        return None
    from pia_batch.engine.safety_checker import SafetyChecker

    return SafetyChecker.load(safety, device)


class SafetyGuard:
    """Safety checks of one worker. Without a checker, none is made.

    Args:
        config: Section `safety` of the config.
        checker: Safety checker, or None.
    """

    def __init__(self, config: SafetyConfig, checker: Checker | None) -> None:
        self._config, self._checker = config, checker

    def check_inputs(self, rows: list[Row]) -> None:
        """Check the condition images of rows without an error, if the config asks for it.

        Each of them gets the column NSFW_INPUT. Under the policy `fail`, flagged rows get an error, in place.
        """
        if self._checker is None or not self._config.inputs:
            return
        checked = [row for row in rows if row["error_kind"] is None]
        scores = self._checker.scores([np.asarray(condition_image(row)) for row in checked])
        for row, score in zip(checked, scores, strict=True):
            row[NSFW_INPUT] = bool(score > 0)
            if row[NSFW_INPUT] and self._config.policy == "fail":
                message = f"the safety checker flags the image (score {score:.3f}, flagged above 0); {_REMEDY}"
                row |= {"error_kind": UnsafeError.kind, "error": message}

    def measures(self, frames: npt.NDArray[np.uint8]) -> Row:
        """Return the columns `nsfw_frames` and `nsfw_score` of a clip; empty without a checker.

        Args:
            frames: Pixels of the clip, uint8, shape (F, H, W, 3), 0-255.
        """
        if self._checker is None:
            return {}
        scores = self._checker.scores([frames[index] for index in self.frames_checked(len(frames))])
        return {"nsfw_frames": int((scores > 0).sum()), "nsfw_score": float(scores.max())}

    def frames_checked(self, num_frames: int) -> list[int]:
        """Return the numbers of the frames that are checked, rising; the first and the last are among two or more."""
        number = min(num_frames, self._config.frames or num_frames)
        return [round(index) for index in np.linspace(0, num_frames - 1, number)]

    def refuse_unsafe(self, result: Row) -> None:
        """Refuse a clip with flagged frames under the policy `fail`.

        Args:
            result: Result with the `measures`.

        Raises:
            UnsafeError: A frame is flagged.
        """
        flagged = result.get("nsfw_frames")
        if flagged and self._config.policy == "fail":
            score = result["nsfw_score"]
            msg = f"the safety checker flags {flagged} frames (score {score:.3f}, flagged above 0); {_REMEDY}"
            raise UnsafeError(msg)
