"""Named approximations that make a clip cheaper: which evaluations of the UNet run only a part of it.

Neighbouring evaluations differ little in what the deep part of the network makes of them. So that part runs at some of
them only, and in between the outermost layers run over what it made last: DeepCache (arXiv 2312.00858), by time in
place of a number of steps, and with the whole network at the last evaluation. docs/performance.md tells what each
preset saves and how far its clips are from exact ones. Imports no torch, as the driver reckons with it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Speed = Literal["exact", "balanced", "fast"]


@dataclass(frozen=True, slots=True)
class Shortcuts:
    """What one preset leaves out.

    Attributes:
        reach: how old deep features may be, as a share of the timesteps of training; 0: none is used twice. In time
            and not in steps, so that a schedule of few, far steps is left whole.
        layers: at the end of the network, how many run at every evaluation; what is before them is its deep part.
    """

    reach: float = 0.0
    layers: int = 0


EXACT = Shortcuts()
"""Leaves out nothing."""

PRESETS: dict[Speed, Shortcuts] = {
    "exact": EXACT,
    "balanced": Shortcuts(reach=0.055, layers=2),
    "fast": Shortcuts(reach=0.13, layers=1),
}
"""With 25 steps the whole network runs at every second one in `balanced`, at every fourth in `fast`."""

OUTERMOST_SHARE = {1: 0.0757, 2: 0.1992}
"""Operations of an evaluation of so many outermost layers, as a share of the whole network's, of a guided row.

Counted by torch's FlopCounterMode on Stable Diffusion 1.5 with PIA's motion modules, 16 frames of 512 x 512.
"""


def whole_evaluations(shortcuts: Shortcuts, timesteps: Sequence[float], horizon: int) -> list[bool]:
    """Of each evaluation of a pass, whether the whole network runs. It does at the first and at the last.

    Args:
        shortcuts: of the preset.
        timesteps: of the evaluations, in their order, 0 to `horizon`.
        horizon: timesteps of training.
    """
    made, stride = math.inf, 0.0
    whole = []
    for before, timestep in itertools.pairwise([math.inf, *timesteps]):
        if timestep != before:  # where a solver asks twice at one time, the latents have moved by its last step
            stride = abs(before - timestep)
        age = max(abs(made - timestep), stride)
        whole.append(shortcuts.reach == 0 or age > shortcuts.reach * horizon)
        made = timestep if whole[-1] else made
    whole[-1:] = [True] * len(whole[-1:])
    return whole


def work_share(speed: Speed, num_steps: int) -> float:
    """Operations of the UNet in so many evenly spaced steps, as a share of those of `exact`; above 0, at most 1."""
    shortcuts = PRESETS[speed]
    if shortcuts == EXACT:
        return 1.0
    whole = whole_evaluations(shortcuts, [1 - step / num_steps for step in range(num_steps)], 1)
    return sum(1.0 if each else OUTERMOST_SHARE[shortcuts.layers] for each in whole) / num_steps
