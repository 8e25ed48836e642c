"""Prompt travel: texts that change from frame to frame, as mixtures of the embeddings of key prompts."""

from __future__ import annotations

import copy
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from pia_batch.schema.settings import Interpolation

PARALLEL = 0.9995
"""Cosine of two embeddings above which slerp is linear: the angle between them is then too small to divide by."""


class Mix(NamedTuple):
    """Text of one frame: the sum of two texts, each times its share.

    Attributes:
        before: Index of the earlier text.
        after: Index of the later text; equal to `before` where only one text counts.
        share_before: Factor of the earlier text.
        share_after: Factor of the later text.
    """

    before: int
    after: int
    share_before: float
    share_after: float


@dataclass(frozen=True, slots=True, eq=False)
class Travel:
    """Text of a sample that changes from frame to frame.

    Attributes:
        texts: Embeddings of the key prompts, (1, tokens, features) each.
        mixes: Text of each frame, in terms of `texts`.
    """

    texts: tuple[torch.Tensor, ...]
    mixes: tuple[Mix, ...]

    def part(self, frames: Sequence[int]) -> Travel:
        """Return the text of these frames, such as those of a window; frames beyond the last have its text."""
        last = len(self.mixes) - 1
        return Travel(self.texts, tuple(self.mixes[min(frame, last)] for frame in frames))

    def copied(self) -> Travel:
        """Return the same text with embedding objects of its own; one that stands for several keys stays one."""
        copies = {id(text): copy.copy(text) for text in self.texts}
        return Travel(tuple(copies[id(text)] for text in self.texts), self.mixes)

    def embeddings(self) -> torch.Tensor:
        """Return the embedding of each frame, (frames, tokens, features)."""
        return torch.cat([mixed(self.texts[mix.before], self.texts[mix.after], *mix[2:]) for mix in self.mixes])


Text = torch.Tensor | Travel
"""Text of a sample: an embedding (1, tokens, features) for all frames, or one that changes."""


def part_of(text: Text, frames: Sequence[int]) -> Text:
    """Return the text of these frames of a sample."""
    return text.part(frames) if isinstance(text, Travel) else text


def mixed(
    before: torch.Tensor, after: torch.Tensor, share_before: torch.Tensor | float, share_after: torch.Tensor | float
) -> torch.Tensor:
    """Return the sum of two texts, or of what is linear in them, times their shares; half precision sums in float32."""
    exact = torch.promote_types(before.dtype, torch.float32)
    return (before.to(exact) * share_before + after.to(exact) * share_after).to(before.dtype)


def mixes(
    frames: Sequence[int],
    num_frames: int,
    *,
    interpolation: Interpolation,
    hold: float,
    wraps: bool,
    cosine: Callable[[int, int], float],
) -> tuple[Mix, ...]:
    """Return the text of each frame in terms of the key prompts.

    Args:
        frames: Frame of each key prompt, rising from 0.
        num_frames: Number of frames of the clip.
        interpolation: Mixture between two key prompts: linear, slerp, or hold for the earlier one alone.
        hold: Share of the frames after a key prompt, 0 to 1, that keep it before the mixture begins.
        wraps: True for loops: the last key prompt is followed by the first one, at frame `num_frames`.
        cosine: Function that returns the cosine of the embeddings of two key prompts, as vectors of all their numbers.

    Source: linear as in diffusers 0.42.1 `free_noise_utils.py`; slerp and hold as in
    s9roll7/animatediff-cli-prompt-travel, `util.py` and `generate.py`.
    """
    stops = list(enumerate(frames))
    if wraps:
        stops.append((0, num_frames))
    places = []
    for (text, frame), (_, following) in pairwise(stops):
        places.append((frame, text))
        held = min(frame + round((following - frame) * hold), following - 1)
        if held > frame:
            places.append((held, text))
    places.append((stops[-1][1], stops[-1][0]))
    starts = [frame for frame, _ in places]
    found = []
    for frame in range(num_frames):
        index = bisect_right(starts, frame) - 1
        start, before = places[index]
        end, after = places[min(index + 1, len(places) - 1)]
        if interpolation == "hold" or frame == start or after == before:
            found.append(Mix(before, before, 1.0, 0.0))
            continue
        share = (frame - start) / (end - start)
        angle = cosine(before, after) if interpolation == "slerp" else 1.0
        found.append(Mix(before, after, *_shares(share, angle)))
    return tuple(found)


def _shares(share: float, cosine: float) -> tuple[float, float]:
    """Return the factors of two texts of this cosine, for a share of the later one; a cosine of 1 is linear."""
    if abs(cosine) > PARALLEL:
        return 1.0 - share, share
    angle = math.acos(cosine)
    return math.sin((1 - share) * angle) / math.sin(angle), math.sin(share * angle) / math.sin(angle)


def cosine_of(texts: Sequence[torch.Tensor]) -> Callable[[int, int], float]:
    """Return a function that returns the cosine of two of these embeddings, by their indices."""

    def cosine(one: int, other: int) -> float:
        a, b = (texts[index].flatten().double() for index in (one, other))
        return float(torch.dot(a, b) / (a.norm() * b.norm()))

    return cosine
