"""Checks that the networks of a model are those of Stable Diffusion 1.5 and PIA, by their configs and headers."""

from __future__ import annotations

import re
from typing import Any

from pia_batch.config import ModelConfig
from pia_batch.errors import ConfigError
from pia_batch.weights import components, config_values, quantized_names, safetensors, tensor_map
from pia_batch.weights.components import CONFIG, Component

_PIA_CHANNELS = 9
_LATENT_CHANNELS = 4
_SDXL_SCALING = 0.13025
"""`scaling_factor` of the VAE of Stable Diffusion XL. Names and shapes of its tensors are the same as in 1.5."""


def check_class(name: str, part: Component) -> None:
    """Check that a network's config is of the class that its place needs.

    Raises:
        ConfigError: It is of another class.
    """
    config = part.folder if part.config is None else part.config.folder
    wanted, settings = _CLASSES[name], part.settings
    if name == "text_encoder":
        named = settings.get("architectures")
        if not isinstance(named, list) or not named:
            named = [_TEXT_TYPES.get(str(settings.get("model_type")), settings.get("model_type"))]
        named = [each for each in named if each is not None]
    else:
        named = [settings["_class_name"]] if "_class_name" in settings else []
    wrong = [str(each) for each in named if each not in wanted]
    if wrong:
        raise ConfigError(
            f"{config / CONFIG}: this is a {wrong[0]}, but the {name.replace('_', ' ')} must be a "
            f"{' or '.join(wanted)}; use one of Stable Diffusion 1.5"
        )
    config_values.check(name, settings, config / CONFIG)


_CLASSES = {
    "unet": ("UNet2DConditionModel", "UNetMotionModel"),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"),
    "motion_adapter": ("MotionAdapter",),
}
_TEXT_TYPES = {"clip": "CLIPModel", "clip_text_model": "CLIPTextModel"}


def check_vae(vae: Component) -> None:
    """Check that a VAE has the latents of Stable Diffusion 1.5.

    Raises:
        ConfigError: It is of another family.
    """
    header = components.header(vae)
    channels = safetensors.second_side(header.shape_of("decoder.conv_in.weight"))
    if channels not in (None, _LATENT_CHANNELS):
        raise ConfigError(
            f"model.vae: wrong latent channels (got {channels}, expected 4); use a VAE of Stable Diffusion 1.5"
        )
    if vae.settings.get("scaling_factor") == _SDXL_SCALING or _says_other_family(header, vae):
        raise ConfigError(
            f"model.vae: {header.path} is the VAE of Stable Diffusion XL or another family, whose latents do not fit; "
            "use one of Stable Diffusion 1.5"
        )


def _says_other_family(header: safetensors.SafetensorsHeader, vae: Component) -> bool:
    """Return True if the metadata of a VAE's own file name a family with other latents.

    Names and shapes are the same in all families of four latent channels. Stable Diffusion 1 and 2 share their latents.
    """
    if vae.layout != "single_file" or header.starting(tensor_map.UNET_PREFIX):
        return False
    for key, value in header.metadata.items():
        if key.endswith("scaling_factor"):
            try:
                if abs(float(value) - _SDXL_SCALING) < _SCALING_TOLERANCE:
                    return True
            except ValueError:
                continue
        if key in _FAMILY_KEYS and _OTHER_LATENTS.search(value.lower()):
            return True
    return False


_SCALING_TOLERANCE = 1e-4
_FAMILY_KEYS = ("modelspec.architecture", "ss_base_model_version", "architecture", "base_model", "model_type")
_OTHER_LATENTS = re.compile(
    r"xl|stable-?diffusion-?v?3|sd3|flux|stable-?cascade|stable-?video|svd|pixart|playground|wan"
)
"""Families in metadata. Source: Stability-AI/ModelSpec, for instance `stable-diffusion-xl-v1-base/vae`."""


def check_unet(unet: Component, model: ModelConfig) -> bool:
    """Check the UNet; return True if it already contains PIA's motion modules, as in a saved PIAPipeline.

    Raises:
        ConfigError: It is of another family, or has what PIA does not use.
    """
    config, named = unet.settings, unet.folder if unet.config is None else unet.path
    channels, width = config.get("in_channels", _LATENT_CHANNELS), config.get("cross_attention_dim")
    quantized_names.refuse(components.header(unet).shapes, named)
    holds_motion = config.get("_class_name") == "UNetMotionModel"
    if holds_motion and channels != _PIA_CHANNELS:
        raise ConfigError(
            f"{named} has motion modules but {channels} input channels (expected {_PIA_CHANNELS}); use a UNet of PIA"
        )
    if holds_motion and model.motion_adapter is not None:
        raise ConfigError(
            f"{named} already contains motion modules; leave model.motion_adapter out, or use a base without them"
        )
    if channels == _PIA_CHANNELS and not holds_motion:
        raise ConfigError(
            f"{named} has 9 input channels: it is an inpainting model, which PIA cannot use; "
            "set model.base to the ordinary checkpoint of the same family"
        )
    family = _other_family(config, width)
    if family is not None:
        raise ConfigError(f"{named} is {family}; PIA animates only Stable Diffusion 1.5")
    if channels not in (_LATENT_CHANNELS, _PIA_CHANNELS) or not isinstance(width, int):
        raise ConfigError(f"{named} is not the UNet of Stable Diffusion 1.5, the only family that PIA animates")
    for key, neutral in _NEUTRAL.items():
        value = config.get(key)
        values = value if isinstance(value, list) else [value]
        if value == [] or any(each is not None and each not in neutral for each in values):
            raise ConfigError(
                f"{named} is not an ordinary UNet of Stable Diffusion 1.5: its config has {key} {value!r}, which PIA "
                "does not use; set model.base to an ordinary checkpoint"
            )
    if "mid_block_type" in config and config["mid_block_type"] is None:
        raise ConfigError(
            f"{named} is a distilled UNet without middle block (mid_block_type null), which PIA cannot use; set "
            "model.base to an ordinary checkpoint"
        )
    takes = _text_width(components.header(unet))
    if takes not in (None, width):
        other = _FAMILY_OF_WIDTH.get(takes)
        remedy = (
            f"it is {other}; PIA animates only Stable Diffusion 1.5"
            if other
            else "set model.config to the matching folder, or correct the config"
        )
        raise ConfigError(f"{named} takes text embeddings of {takes} dimensions, but its config says {width}; {remedy}")
    return holds_motion


_OTHER_INPUTS = {5: "the UNet of a depth model", 7: "the UNet of an upscaler", 8: "the UNet of InstructPix2Pix"}
"""Models of other tasks by their input channels. Source: configs of stabilityai and timbrooks on the hub."""

_FAMILY_OF_WIDTH = {
    1024: "the UNet of Stable Diffusion 2",
    1280: "the UNet of Stable Diffusion XL's refiner",
    2048: "the UNet of Stable Diffusion XL",
}


def _other_family(config: dict[str, Any], width: Any) -> str | None:
    """Return the family of a UNet that is not of Stable Diffusion 1.5, or None."""
    if config.get("time_cond_proj_dim") is not None:
        return (
            f"an LCM-distilled UNet (time_cond_proj_dim {config['time_cond_proj_dim']}), whose guidance embedding PIA "
            f"does not use: {tensor_map.LCM_REMEDY}"
        )
    if config.get("in_channels") in _OTHER_INPUTS:
        return f"{_OTHER_INPUTS[config['in_channels']]} ({config['in_channels']} input channels)"
    if config.get("addition_embed_type") == "text_time":
        return "the UNet of Stable Diffusion XL"
    if isinstance(width, int) and width in _FAMILY_OF_WIDTH:
        return f"{_FAMILY_OF_WIDTH[width]} (cross_attention_dim {width})"
    if config.get("use_linear_projection"):
        return "the UNet of Stable Diffusion 2 (use_linear_projection)"
    return None


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "addition_embed_type": (),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (),
    "encoder_hid_dim_type": (),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (False,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (),
    "time_embedding_dim": (),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (),
}
"""Settings that `UNetMotionModel` does not have, with the values that change nothing. Null changes nothing either."""


def _text_width(header: safetensors.SafetensorsHeader) -> int | None:
    """Return the width of text embeddings that a UNet's cross-attention takes, or None.

    Motion modules have layers of that name, too; these do not read text.
    """
    for name, shape in header.shapes.items():
        if name.endswith("attn2.to_k.weight") and "motion_modules" not in name:
            return safetensors.second_side(shape)
    return None
