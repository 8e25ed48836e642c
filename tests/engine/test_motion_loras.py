"""LoRAs of motion modules, as AnimateDiff publishes them, against the stock pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import MotionAdapter, PIAPipeline
from lora_files import matrices
from pipelines import assert_equals_single_calls, build, save, shot
from safetensors.torch import save_file
from torch import nn

from pia_batch.config import LoraConfig, ModelConfig, SchedulerConfig
from pia_batch.engine import PiaEngine
from pia_batch.errors import ConfigError
from pia_batch.weights.resolve import resolve

BLOCK = "transformer_blocks.0"
SHOTS = [shot(1), shot(2, guidance_scale=1.0, num_frames=5)]


def with_middle() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Matrices for the attention of every motion module, one in the middle block included."""
    adapter = MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=12,
        use_motion_mid_block=True,
    )
    return matrices(adapter, lambda name: name.endswith(("to_q", "to_k", "to_v", "to_out.0")))


LAYOUTS = {
    "diffusers": ("unet.", ".", False),
    "original": ("", ".temporal_transformer.", True),
    "original under module": ("module.", ".temporal_transformer.", True),
    "original under state_dict": ("state_dict.module.", ".temporal_transformer.", True),
    "original, flat": ("lora_unet_", ".temporal_transformer.", True),
    "diffusers without prefix": ("", ".", False),
}


def write(path: Path, layout: str, chosen: Any = lambda _: True) -> Path:
    prefix, inner, original = LAYOUTS[layout]
    tensors = {}
    for name, (down, up) in with_middle().items():
        if not chosen(name):
            continue
        spelled = name.replace(f".{BLOCK}", f"{inner}{BLOCK}")
        for number in (1, 2) if original else ():
            spelled = spelled.replace(f"attn{number}", f"attention_blocks.{number - 1}")
        spelled = f"{spelled.removesuffix('.0').replace('.to_', '.processor.to_')}_lora"
        spelled = prefix + (spelled.replace(".", "_") if "flat" in layout else spelled)
        tensors |= {f"{spelled}.down.weight": down, f"{spelled}.up.weight": up}
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save(build(), folder)
    return folder


def stock(scale: float) -> PIAPipeline:
    """The stock pipeline, its weights changed by `scale` x up x down where it has the layer."""
    pipe = build()
    layers = dict(pipe.unet.named_modules())
    for name, (down, up) in with_middle().items():
        if name in layers:
            layer = layers[name]
            assert isinstance(layer, nn.Linear)
            layer.weight.data += scale * up @ down
    return pipe


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_changes_the_motion_modules_that_there_are(base, tmp_path, layout):
    file = write(tmp_path / "zoom.safetensors", layout)
    model = ModelConfig(
        base=str(base),
        scheduler=SchedulerConfig(name="checkpoint"),
        loras=(LoraConfig(source=str(file), scale=0.7),),
    )

    assert_equals_single_calls(stock(0.7), PiaEngine.load(model, "cpu"), SHOTS)


def test_what_has_no_place_is_counted_in_one_notice(base, tmp_path):
    file = write(tmp_path / "zoom.safetensors", "original")
    found = resolve(ModelConfig(base=str(base), loras=(LoraConfig(source=str(file)),)))

    (notice,) = found.notices
    assert notice.startswith("model.loras[0]: zoom.safetensors: left out 16 tensors for a motion module in the middle")


def test_the_embedded_model_has_the_middle_block_so_other_sizes_there_are_refused(tmp_path):
    file = write(tmp_path / "zoom.safetensors", "diffusers", lambda name: name.startswith("mid_block"))

    with pytest.raises(ConfigError, match=r"invalid shapes"):
        resolve(ModelConfig(loras=(LoraConfig(source=str(file)),)))


def test_a_lora_of_the_middle_block_alone_is_refused(base, tmp_path):
    file = write(tmp_path / "zoom.safetensors", "original", lambda name: name.startswith("mid_block"))

    with pytest.raises(ConfigError, match=r"changes only the motion module of the middle block.*leave it out"):
        resolve(ModelConfig(base=str(base), loras=(LoraConfig(source=str(file)),)))
