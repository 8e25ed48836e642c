"""`pia_batch.weights.networks`: names and shapes are those of the networks that diffusers and transformers build."""

from __future__ import annotations

import json
from typing import Any

import diffusers
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from pia_batch import tiny
from pia_batch.weights import sd15
from pia_batch.weights.networks import shapes_of

KINDS: dict[str, Any] = {
    "unet": diffusers.UNet2DConditionModel,
    "motion unet": diffusers.UNetMotionModel,
    "vae": diffusers.AutoencoderKL,
    "motion_adapter": diffusers.MotionAdapter,
}


def built(name: str, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The state of the network that the library builds, without memory."""
    with torch.device("meta"):
        if name == "text_encoder":
            network = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
        else:
            network = KINDS[name].from_config(config)
    return {each.removeprefix("text_model."): tuple(tensor.shape) for each, tensor in network.state_dict().items()}


@pytest.mark.parametrize("folder", [sd15.PATH, tiny.PATH])
@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "motion_adapter"])
def test_the_packaged_configs_have_the_tensors_of_the_libraries_networks(folder, name):
    config = json.loads((folder / name / "config.json").read_text())

    assert shapes_of(name, config) == built(name, config)


channels = st.sampled_from([8, 16, 24])
count = st.integers(0, 2)
heads = st.sampled_from([1, 2, 4])


@st.composite
def unets(draw: st.DrawFn, ending: str) -> dict[str, Any]:
    blocks = draw(st.integers(1, 3))
    each = {"min_size": blocks, "max_size": blocks}
    found: dict[str, Any] = {
        "block_out_channels": draw(st.lists(channels, **each)),
        "down_block_types": draw(
            st.lists(st.sampled_from([f"CrossAttnDownBlock{ending}", f"DownBlock{ending}"]), **each)
        ),
        "up_block_types": draw(st.lists(st.sampled_from([f"CrossAttnUpBlock{ending}", f"UpBlock{ending}"]), **each)),
        "layers_per_block": draw(st.integers(1, 2) | st.lists(st.integers(1, 2), **each)),
        "transformer_layers_per_block": draw(st.integers(1, 2) | st.lists(st.integers(1, 2), **each)),
        "cross_attention_dim": draw(channels),
        "use_linear_projection": draw(st.booleans()),
        "norm_num_groups": 4,
        "in_channels": draw(st.sampled_from([4, 9])),
    }
    if ending == "2D":
        return found | {"attention_head_dim": draw(heads | st.lists(heads, **each))}
    return found | {
        "_class_name": "UNetMotionModel",
        "num_attention_heads": draw(heads | st.lists(heads, **each)),
        "motion_num_attention_heads": draw(heads | st.lists(heads, **each)),
        "motion_max_seq_length": draw(st.integers(1, 5)),
        "use_motion_mid_block": draw(st.booleans()),
        "temporal_transformer_layers_per_block": draw(count | st.lists(count, **each)),
        "temporal_transformer_layers_per_mid_block": draw(count),
    }


@settings(max_examples=40, deadline=None)
@given(unets("2D"))
def test_any_unet_has_the_tensors_of_diffusers(config):
    assert shapes_of("unet", config) == built("unet", config)


@pytest.mark.long
@settings(max_examples=40, deadline=None)
@given(unets("Motion"))
def test_any_unet_with_motion_modules_has_the_tensors_of_diffusers(config):
    assert shapes_of("unet", config) == built("motion unet", config)


@st.composite
def adapters(draw: st.DrawFn) -> dict[str, Any]:
    blocks, mid = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    each = {"min_size": blocks, "max_size": blocks}
    return {
        "block_out_channels": draw(st.lists(channels, **each)),
        "motion_layers_per_block": draw(st.integers(1, 2) | st.lists(st.integers(1, 2), **each)),
        "motion_transformer_layers_per_block": draw(count | st.lists(count, **each)),
        "motion_mid_block_layers_per_block": mid,
        "motion_transformer_layers_per_mid_block": draw(count | st.lists(count, min_size=mid, max_size=mid)),
        "motion_num_attention_heads": draw(heads | st.lists(heads, **each)),
        "motion_norm_num_groups": 4,
        "motion_max_seq_length": draw(st.integers(1, 5)),
        "use_motion_mid_block": draw(st.booleans()),
        "conv_in_channels": draw(st.sampled_from([None, 9])),
    }


@settings(max_examples=40, deadline=None)
@given(adapters())
def test_any_motion_adapter_has_the_tensors_of_diffusers(config):
    assert shapes_of("motion_adapter", config) == built("motion_adapter", config)


@st.composite
def vaes(draw: st.DrawFn) -> dict[str, Any]:
    blocks, layers = draw(st.integers(1, 4)), draw(st.integers(0, 2))
    each = {"min_size": blocks, "max_size": blocks}
    same = draw(channels)
    return {
        # Without layers, no block can change the number of channels.
        "block_out_channels": draw(st.lists(channels, **each)) if layers else [same] * blocks,
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "layers_per_block": layers,
        "latent_channels": draw(st.sampled_from([4, 16])),
        "norm_num_groups": 4,
        "mid_block_add_attention": draw(st.booleans()),
        "use_quant_conv": draw(st.booleans()),
        "use_post_quant_conv": draw(st.booleans()),
    }


@settings(max_examples=40, deadline=None)
@given(vaes())
def test_any_vae_has_the_tensors_of_diffusers(config):
    assert shapes_of("vae", config) == built("vae", config)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("unet", {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 4}),
        ("unet", {"up_block_types": ["UpBlock2D"]}),
        ("unet", {"layers_per_block": [1, 2]}),
        ("vae", {"block_out_channels": [8], "down_block_types": ["AttnDownEncoderBlock2D"]}),
    ],
)
def test_a_config_of_unknown_blocks_is_an_error(name, config):
    with pytest.raises(ValueError, match="block"):
        shapes_of(name, config)
