"""First layer of PIA's UNet: the base or the motion adapter gives its channels of latents. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from pia_batch.config import ModelConfig
from pia_batch.errors import ConfigError
from pia_batch.weights.components import Component


def is_from_adapter(model: ModelConfig, parts: Mapping[str, Component]) -> bool:
    """Return True if the motion adapter gives the whole first layer, and False if it gives channels 4 to 8 only.

    diffusers always keeps the base's first four channels and its bias. The original keeps them only where a DreamBooth
    checkpoint (a single file) replaces the weights of the base; else it loads all that `pia.ckpt` has.

    Args:
        model: Config of the model.
        parts: Parts of the model by name.

    Raises:
        ConfigError: `conv_in` is `adapter`, but the motion modules are part of the UNet, which has one first layer.

    Source: open-mmlab/PIA `animatediff/pipelines/i2v_pipeline.py` `build_pipeline`; diffusers 0.42.1 `from_unet2d`.
    """
    adapter = parts.get("motion_adapter")
    if model.conv_in == "adapter" and adapter is None:
        raise ConfigError(
            "model.conv_in: adapter needs a motion adapter of its own, but the motion modules are part of the UNet; "
            "set it to auto"
        )
    if model.conv_in != "auto" or adapter is None:
        return model.conv_in == "adapter"
    is_original_layout = adapter.layout == "single_file" and parts["unet"].layout == "diffusers"
    return model.arithmetic == "original" and is_original_layout
