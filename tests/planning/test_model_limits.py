"""Limits of models, read from headers: those that the loaded engine has."""

from __future__ import annotations

from pathlib import Path

import torch
from lora_files import write_lora
from pipelines import build, save
from safetensors.torch import save_file

from pia_batch.config import RunConfig
from pia_batch.config.model_limits import ModelLimits
from pia_batch.engine import PiaEngine
from pia_batch.planning.model_limits import limits_of


def moving(name: str) -> bool:
    return "motion_modules" in name


def write_loha(path: Path) -> Path:
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{layer}.hada_w{k}_{side}": torch.ones(16, 16) for k in "12" for side in "ab"}, path)
    return path


def test_the_headers_have_the_limits_of_the_loaded_engine(tmp_path: Path) -> None:
    save(build(), tmp_path / "base")  # its motion modules know 12 frames
    files = {
        "plain": write_lora(tmp_path / "plain.safetensors", "kohya", unet=lambda name: "attn1" in name),
        "loha": write_loha(tmp_path / "loha.safetensors"),
        "moving": write_lora(tmp_path / "moving.safetensors", "kohya", unet=moving, text=lambda _: False),
    }
    loras = [{"source": str(path), "name": name} for name, path in files.items()]
    paths = {"manifest": "m", "output": "o"}
    config = RunConfig.load(None, paths | {"model.base": str(tmp_path / "base"), "model.loras": loras})

    limits = limits_of(config)["default"]

    assert limits == ModelLimits(12, frozenset({"loha", "moving"}))  # one has proj_in, which PEFT does not wrap
    loaded = PiaEngine.load(config.model, "cpu").limits
    assert (loaded.max_frames, loaded.fixed_loras) == (limits.positions, limits.fixed_loras)
    assert limits_of(RunConfig.load(None, paths))["default"] == ModelLimits(32)  # the embedded model
