"""Every scheduler that an engine offers, and the small pipeline with another scheduler."""

from __future__ import annotations

import copy
from typing import Any

from diffusers import PIAPipeline

from pia_batch.config import SchedulerConfig
from pia_batch.engine import loading

SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    ("ddim", {}),
    ("ddpm", {}),
    ("pndm", {"skip_prk_steps": True}),
    ("lms", {}),
    ("euler", {}),
    ("euler", {"timestep_spacing": "trailing"}),
    ("euler_ancestral", {}),
    ("heun", {}),
    ("heun", {"use_karras_sigmas": True}),
    ("dpmpp_2m", {}),
    ("dpmpp_2m", {"timestep_spacing": "leading"}),
    ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    ("unipc", {}),
    ("unipc", {"timestep_spacing": "trailing", "solver_order": 3}),
    ("lcm", {}),
]


def scheduled(pipe: PIAPipeline, name: Any, **settings: Any) -> PIAPipeline:
    """The pipeline with another scheduler."""
    own = copy.copy(pipe)
    own.scheduler = loading.build_scheduler(SchedulerConfig(name=name, settings=settings), pipe.scheduler)
    return own
