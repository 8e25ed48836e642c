"""Stable Diffusion 1.5 without weights: the configs and the tokenizer that single-file checkpoints lack."""

from pathlib import Path

PATH: Path = Path(__file__).resolve().parent
"""Diffusers folder of configs: scheduler, tokenizer, text_encoder, unet, vae, and PIA's motion_adapter."""
