"""Arithmetic of PIA: the two published implementations, and the defaults in which they differ. No torch."""

from __future__ import annotations

from typing import Literal

Arithmetic = Literal["diffusers", "original"]

NEGATIVE_PROMPT: dict[Arithmetic, str] = {
    "diffusers": "",
    "original": (
        "wrong white balance, dark, sketches,worst quality,low quality, deformed, distorted, disfigured, bad eyes, "
        "wrong lips,weird mouth, bad teeth, mutated hands and fingers, bad anatomy,wrong anatomy, amputation, "
        "extra limb, missing limb, floating,limbs, disconnected limbs, mutation, ugly, disgusting, bad_pictures, "
        "negative_hand-neg"
    ),
}
"""Negative prompt where neither the row nor the config gives one.

Source: diffusers 0.42.1 `PIAPipeline`; open-mmlab/PIA `animatediff/pipelines/i2v_pipeline.py` `DEFAULT_N_PROMPT`, as
it is spelled there.
"""
