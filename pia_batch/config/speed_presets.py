"""Speed presets: approximations that run only a part of the UNet at some evaluations.

The deep part of the network gives similar features at neighbouring evaluations. It therefore runs at some of them only;
in between, the outermost layers use its last features. This is DeepCache (arXiv 2312.00858), by time instead of by a
number of steps, and with the whole network at the last evaluation. docs/engine-design.md has the savings of each preset
and the distance of its clips from exact ones. Does not import torch, because the driver estimates costs with it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Speed = Literal["exact", "balanced", "fast"]


@dataclass(frozen=True, slots=True)
class SpeedPreset:
    """Work that one preset leaves out.

    Attributes:
        reach: Largest age of deep features, as a share of training timesteps; 0: none is used twice. It is a time
            and not a number of steps, so that schedules of few, distant steps are not approximated.
        layers: Number of last layers of the network that run at every evaluation; those before them are its deep part.
    """

    reach: float = 0.0
    layers: int = 0


EXACT = SpeedPreset()
"""Preset that leaves nothing out."""

PRESETS: dict[Speed, SpeedPreset] = {
    "exact": EXACT,
    "balanced": SpeedPreset(reach=0.055, layers=2),
    "fast": SpeedPreset(reach=0.13, layers=1),
}
"""With 25 steps the whole network runs at every second one in `balanced`, at every fourth in `fast`."""

OUTERMOST_SHARE = {1: 0.0757, 2: 0.1992}
"""Operations of an evaluation by number of outermost layers, as a share of the whole network's, of a guided row.

Counted by torch's FlopCounterMode on Stable Diffusion 1.5 with PIA's motion modules, 16 frames of 512 x 512.
"""


def whole_evaluations(preset: SpeedPreset, timesteps: Sequence[float], horizon: int) -> list[bool]:
    """Return for each evaluation of a pass if the whole network runs. It does at the first and at the last.

    Args:
        preset: Work to leave out.
        timesteps: Timesteps of the evaluations, in their order, 0 to `horizon`.
        horizon: Number of timesteps of training.
    """
    made, stride = math.inf, 0.0
    whole = []
    for before, timestep in itertools.pairwise([math.inf, *timesteps]):
        if timestep != before:  # where a solver asks twice at one time, the latents have moved by its last step
            stride = abs(before - timestep)
        age = max(abs(made - timestep), stride)
        whole.append(preset.reach == 0 or age > preset.reach * horizon)
        made = timestep if whole[-1] else made
    whole[-1:] = [True] * len(whole[-1:])
    return whole


def work_share(speed: Speed, num_steps: int) -> float:
    """Return the UNet's operations in `num_steps` evenly spaced steps as a share of those of `exact`, in (0, 1]."""
    preset = PRESETS[speed]
    if preset == EXACT:
        return 1.0
    whole = whole_evaluations(preset, [1 - step / num_steps for step in range(num_steps)], 1)
    return sum(1.0 if each else OUTERMOST_SHARE[preset.layers] for each in whole) / num_steps
