"""LCM-LoRA with the scheduler `lcm` at 4 to 8 steps, end to end: the config's model against the stock pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import LCMScheduler
from lora_files import stock_with, write_lora
from pipelines import assert_equals_single_calls, build, save, shot

from pia_batch.config import LoraConfig, ModelConfig, SchedulerConfig
from pia_batch.engine import PiaEngine

ROWS = [
    shot(1, num_inference_steps=4, guidance_scale=1.0),
    shot(2, num_inference_steps=8, guidance_scale=1.5, motion_scale=2),
    shot(3, num_inference_steps=6, guidance_scale=2.0, strength=0.5, num_frames=5),
    shot(4, num_inference_steps=4, guidance_scale=1.0, loop=True),
]


@pytest.mark.parametrize("fuse", [False, True], ids=["layers", "fused"])
def test_lcm_lora_at_4_to_8_steps_equals_the_stock_pipeline_row_by_row(tmp_path: Path, fuse: bool) -> None:
    """A file as `lcm-lora-sdv1-5` is: convolutions and linear layers of the UNet, in kohya's names, with alphas."""
    save(build(), tmp_path / "base")
    file = write_lora(
        tmp_path / "lcm.safetensors",
        "kohya",
        unet=lambda name: "motion_modules" not in name,
        text=lambda _: False,
        alpha=lambda _: 1.0,
    )
    schedule = {"beta_schedule": "linear", "clip_sample": False, "beta_end": 0.002}
    model = ModelConfig(
        base=str(tmp_path / "base"),
        loras=(LoraConfig(source=str(file)),),
        fuse_loras=fuse,
        scheduler=SchedulerConfig(name="lcm"),
    )
    stock = stock_with((file, 1.0), fuse=fuse)
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config, **schedule)

    assert_equals_single_calls(stock, PiaEngine.load(model, "cpu"), ROWS)
