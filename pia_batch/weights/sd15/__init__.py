"""Stable Diffusion 1.5 without its weights: the configs and the tokenizer that a checkpoint in a single file lacks."""

from pathlib import Path

PATH: Path = Path(__file__).resolve().parent
"""A diffusers folder of configs: scheduler, tokenizer, text_encoder, unet, vae; and PIA's motion_adapter."""
