"""Kinds of model files, from names and shapes of tensors that only files of one kind have."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from pia_batch.errors import ConfigError
from pia_batch.weights.safetensors import SafetensorsHeader, second_side

FileKind = Literal[
    "Stable Diffusion 1.5 checkpoint",
    "inpainting checkpoint",
    "InstructPix2Pix checkpoint",
    "Stable Diffusion 2 checkpoint",
    "Stable Diffusion XL checkpoint",
    "checkpoint of another family than Stable Diffusion 1.5",
    "ControlNet",
    "T2I-Adapter",
    "LoRA",
    "LoRA of numbered layers (cloneofsimo/lora)",
    "file of HCP-Diffusion",
    "textual inversion",
    "textual inversions of several words",
    "checkpoint with averaged weights only",
    "Stable Diffusion XL textual inversion",
    "textual inversion of another family than Stable Diffusion 1.5",
    "IP-Adapter",
    "motion adapter",
    "motion modules of HotShot-XL",
    "VAE",
    "UNet of Stable Diffusion XL",
    "UNet of a diffusers folder",
    "UNet without VAE and text encoder",
    "text encoder",
    "image encoder",
    "file of unknown layout",
]


def expect(header: SafetensorsHeader, key: str, *kinds: FileKind) -> FileKind:
    """Return the kind of the file, which must be one of `kinds`.

    Raises:
        ConfigError: The file is of another kind; the message names the config key for that kind.
    """
    found = kind(header)
    if found not in kinds:
        remedy = _BELONGS.get(found, "PIA supports Stable Diffusion 1.5 and add-ons for it")
        raise ConfigError(f"{key}: {header.path.name} is of the wrong kind: {found}; {remedy}")
    return found


_BELONGS: dict[FileKind, str] = {
    "Stable Diffusion 1.5 checkpoint": "it belongs in model.base",
    "LoRA": "it belongs in model.loras",
    "textual inversion": "it belongs in model.textual_inversions",
    "textual inversions of several words": "write a file for each word, with its tensor only, and list all of them",
    "LoRA of numbered layers (cloneofsimo/lora)": "its layers have no names: merge it into its base "
    "with the program that made it, and set model.base to the result",
    "file of HCP-Diffusion": "convert it with the program that made it (hcpdiff.tools.lora_convert --to_webui)",
    "checkpoint with averaged weights only": "use the checkpoint whose UNet is in model.diffusion_model.*",
    "IP-Adapter": "it belongs in model.ip_adapter",
    "motion adapter": "it belongs in model.motion_adapter",
    "VAE": "it belongs in model.vae",
    "ControlNet": "PIA uses no ControlNet and no SparseCtrl; leave it out",
    "T2I-Adapter": "PIA uses no T2I-Adapter; leave it out",
    "motion modules of HotShot-XL": "they are made for Stable Diffusion XL; set model.motion_adapter to one of PIA",
    "UNet of Stable Diffusion XL": "PIA animates only Stable Diffusion 1.5",
    "UNet of a diffusers folder": "set model.base to the folder that has it, a text encoder, a VAE and a tokenizer",
    "UNet without VAE and text encoder": "set model.base to the complete checkpoint",
    "text encoder": "set model.base to the complete checkpoint",
    "image encoder": "it belongs in model.ip_adapter.image_encoder",
    "file of unknown layout": "its tensor names match no supported kind of file",
}


def kind(header: SafetensorsHeader) -> FileKind:
    """Return the kind of a file, from tensor names and shapes that only files of this kind have."""
    return next(name for name, holds in _KINDS if holds(header))


def _any(header: SafetensorsHeader, *parts: str) -> bool:
    return any(part in name for name in header.shapes for part in parts)


def _ends(header: SafetensorsHeader, *endings: str) -> bool:
    return any(name.endswith(endings) for name in header.shapes)


def _unet_input(header: SafetensorsHeader) -> int | None:
    """Return the number of input channels of the UNet in a checkpoint of the original layout, or None."""
    return second_side(header.shapes.get("model.diffusion_model.input_blocks.0.0.weight"))


INVERSION_SPARE = (
    "step", "sd_checkpoint", "sd_checkpoint_name", "name", "num_vectors", "optimizer_state_dict", "hash",
    "string_to_token", "string_to_token.*",
)  # fmt: skip
"""Names of training state that some tools save next to the vectors of a textual inversion."""


def _is_inversion(header: SafetensorsHeader, num_words: int = 1) -> bool:
    """Return True for vectors of one word; with `num_words` 2, for vectors of several words of one text encoder."""
    held = [shape for name, shape in header.shapes.items() if name not in INVERSION_SPARE]
    if "emb_params" in header.shapes:
        return num_words == 1
    if not all(0 < len(shape) <= 2 for shape in held):  # noqa: PLR2004 - tokens, features
        return False
    if any(map(_IN_NETWORK.search, header.shapes)):
        return False
    if num_words == 1:
        return len(held) == 1
    return len(held) > 1 and len({shape[-1] for shape in held}) == 1 and not any("." in name for name in header.shapes)


_IN_NETWORK = re.compile(
    r"\.(weight|bias)$|^(module|base_model|model|unet|transformer|text_model|text_encoder|conditioner|cond_stage_model)\."
    r"|^((down|up|mid|input|output|middle|double|single|joint|transformer|single_transformer)_)?blocks?\."
    r"|^(encoder|decoder)\."
)
"""Names of tensors of networks, which are no words."""

_OTHER_ENCODERS = {"clip_g", "clip_h", "t5", "t5xxl", "t5_xxl", "text_encoders_1", "text_encoders_2", "gemma", "llama"}
"""Names of text encoders that Stable Diffusion 1.5 does not have, as tensors of a textual inversion."""

_IMAGE_PROMPTS = re.compile(
    r"((state_dict|module|_orig_mod|_fsdp_wrapped_module)\.)*(ip_adapter|image_proj|image_proj_model|adapter_modules)\."
)

_OF_HCP = re.compile(r"\.___\.|\.lora_block(_\d+)?\.|^(lora|base|base_ema|plugin|plugin_ema)(:|$)")
"""Names of HCP-Diffusion's files. Source: IrisRainbowNeko/HCP-Diffusion `ckpt_manager`, `tools/lora_convert.py`."""

_CONTROLS = ("control_model.", "controlnet_", "lora_controlnet", "lllite_", "input_hint_block.")

_OTHER_EMBEDDER = re.compile(r"conditioner\.embedders\.(?!0\.transformer\.)")
"""Names of text encoders of generative-models that Stable Diffusion 1.5 does not have."""

_OF_T2I_ADAPTER = re.compile(r"(adapter\.)?body\.\d+\.(.+\.)?(block1|in_conv)\.weight$")
"""Names of T2I-Adapters. Sources: TencentARC/T2I-Adapter `ldm/modules/encoders/adapter.py`; diffusers `T2IAdapter`."""

# The first match wins: add-ons, which name tensors of networks, come before these networks.
_KINDS: tuple[tuple[FileKind, Callable[[SafetensorsHeader], bool]], ...] = (
    (
        "file of HCP-Diffusion",
        lambda header: any(map(_OF_HCP.search, header.shapes)),
    ),
    (
        "IP-Adapter",
        lambda header: any(map(_IMAGE_PROMPTS.match, header.shapes)) or _any(header, ".to_k_ip."),
    ),
    (
        "LoRA",  # and its relatives: LoHa, LoKr, full differences, norms, bundled textual inversions
        lambda header: (
            _any(header, ".lora_", "_lora.", ".lora.", ".hada_w", ".lokr_w", ".w_norm", ".b_norm")
            or _ends(header, ".diff", ".diff_b")
            or bool(header.starting("bundle_emb."))
        ),
    ),
    (
        "LoRA of numbered layers (cloneofsimo/lora)",
        lambda header: any(re.fullmatch(r"(unet|text_encoder):\d+:(up|down)", name) for name in header.shapes),
    ),
    ("Stable Diffusion XL textual inversion", lambda header: set(header.shapes) == {"clip_l", "clip_g"}),
    (
        "textual inversion of another family than Stable Diffusion 1.5",
        lambda header: bool(_OTHER_ENCODERS & set(header.shapes)),
    ),
    ("textual inversion", _is_inversion),
    ("textual inversions of several words", lambda header: _is_inversion(header, num_words=2)),
    (
        "checkpoint of another family than Stable Diffusion 1.5",  # of videos, such as Stable Video Diffusion
        lambda header: (
            _unet_input(header) is not None and _any(header, ".time_stack.", ".time_mixer.", ".temopral_conv.")
        ),
    ),
    (
        "Stable Diffusion 2 checkpoint",  # Turbo models of 2.1 have the names of XL, but no embedding of sizes
        lambda header: (
            bool(header.starting("cond_stage_model.model."))
            or (bool(header.starting("conditioner.embedders.0.model.")) and not _any(header, ".label_emb."))
        ),
    ),
    (
        "Stable Diffusion XL checkpoint",  # whose first text encoder is that of 1.5
        lambda header: (
            bool(header.starting("conditioner.embedders."))
            and (_any(header, ".label_emb.") or any(map(_OTHER_EMBEDDER.match, header.shapes)))
        ),
    ),
    ("inpainting checkpoint", lambda header: _unet_input(header) == 9),  # noqa: PLR2004 - latents, mask, masked latents
    ("InstructPix2Pix checkpoint", lambda header: _unet_input(header) == 8),  # noqa: PLR2004 - latents of two images
    ("ControlNet", lambda header: bool(header.starting(*_CONTROLS))),
    ("T2I-Adapter", lambda header: any(map(_OF_T2I_ADAPTER.match, header.shapes))),
    ("Stable Diffusion 1.5 checkpoint", lambda header: _unet_input(header) == 4),  # noqa: PLR2004 - latent channels
    (
        "checkpoint with averaged weights only",
        lambda header: bool(header.starting("model_ema.diffusion_model")) and _unet_input(header) is None,
    ),
    # A training of PIA writes UNet and motion modules into one file.
    ("motion adapter", lambda header: _any(header, "motion_modules.")),
    (
        "checkpoint of another family than Stable Diffusion 1.5",
        lambda header: bool(
            header.starting(
                "model.diffusion_model.",
                "double_blocks.",
                "joint_blocks.",
                "transformer_blocks.",
                "single_transformer_blocks.",
                "blocks.",
            )
        ),
    ),
    ("motion modules of HotShot-XL", lambda header: _any(header, ".temporal_attentions.")),
    ("UNet of Stable Diffusion XL", lambda header: _any(header, "add_embedding.", "label_emb.0.0.")),
    ("UNet of a diffusers folder", lambda header: _any(header, "down_blocks.0.resnets.") and _any(header, "time_emb")),
    (
        "UNet without VAE and text encoder",
        lambda header: bool(header.starting("input_blocks.")) and bool(header.starting("time_embed.")),
    ),
    ("text encoder", lambda header: _any(header, "token_embedding.weight")),
    ("image encoder", lambda header: _ends(header, "embeddings.class_embedding", "visual.class_embedding")),
    (
        "VAE",  # also under names that no loader knows, which are named when its tensors are looked for
        lambda header: (
            bool(header.starting("first_stage_model.", "vae.encoder.", "vae.decoder.", "encoder.", "decoder."))
            or _ends(header, ".encoder.conv_in.weight", ".decoder.conv_in.weight")
        ),
    ),
    ("file of unknown layout", lambda _: True),
)
