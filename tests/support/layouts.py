"""Networks in the layouts of files outside diffusers, made by the inverse of a loader's conversion."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from pia_batch.weights.networks import shapes_of

Tensors = dict[str, torch.Tensor]

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_NAMES = (
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    (".downsamplers.0.", ".downsample."),
    (".upsamplers.0.", ".upsample."),
    ("mid_block.attentions.0", "mid.attn_1"),
    (".group_norm.", ".norm."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".proj_out."),
)
_ANIMATEDIFF = (
    (".transformer_blocks", ".temporal_transformer.transformer_blocks"),
    (".attn1.", ".attention_blocks.0."),
    (".attn2.", ".attention_blocks.1."),
    (".norm1.", ".norms.0."),
    (".norm2.", ".norms.1."),
    (".norm3.", ".ff_norm."),
)


def checkpoint(folder: Path) -> Tensors:
    """The networks of a diffusers folder, as a checkpoint of Stable Diffusion 1.5 in one file has them."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True)
    vae = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True)
    text = load_file(folder / "text_encoder" / "model.safetensors")
    return {
        **{UNET + name: tensor for name, tensor in original_unet(unet).items()},
        **{VAE + name: tensor for name, tensor in original_vae(vae).items()},
        **{TEXT + name.removeprefix("text_model."): tensor for name, tensor in text.items()},
        # Tensors that such files also have and no network uses.
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "betas": torch.linspace(0.00085, 0.012, 1000),
        "model_ema.decay": torch.tensor(0.9999),
    }


def original_unet(unet: UNet2DConditionModel) -> Tensors:
    """The tensors of a UNet by their names in CompVis/stable-diffusion, without prefix."""
    layers = unet.config.layers_per_block
    attends = [block.startswith("CrossAttn") for block in unet.config.up_block_types]
    return {_unet_name(name, layers, attends): tensor for name, tensor in unet.state_dict().items()}


def _unet_name(name: str, layers: int, attends: list[bool]) -> str:
    for old, new in (
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("conv_in", "input_blocks.0.0"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
    ):
        if name.startswith(f"{old}."):
            return name.replace(old, new, 1)
    if name.startswith("mid_block"):
        _, kind, index, rest = name.split(".", 3)
        return f"middle_block.{2 * int(index) if kind == 'resnets' else 1}.{_inner(kind, rest)}"
    side, block, kind, index, rest = name.split(".", 4)
    place = int(block) * (layers + 1)
    if side == "down_blocks":
        place += 1
        if kind == "downsamplers":
            return f"input_blocks.{place + layers}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{place + int(index)}.{0 if kind == 'resnets' else 1}.{_inner(kind, rest)}"
    if kind == "upsamplers":
        return f"output_blocks.{place + layers}.{2 if attends[int(block)] else 1}.{rest}"
    return f"output_blocks.{place + int(index)}.{0 if kind == 'resnets' else 1}.{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    if kind != "resnets":
        return rest
    head, _, tail = rest.partition(".")
    return f"{_RESNET[head]}.{tail}"


def original_vae(vae: AutoencoderKL) -> Tensors:
    """The tensors of a VAE by their names in CompVis/stable-diffusion, without prefix; attention is convolution."""
    last = len(vae.config.up_block_types) - 1
    found = {}
    for name, tensor in vae.state_dict().items():
        renamed = _vae_name(name, last)
        flat = "attn_1" in renamed and tensor.ndim == 2
        found[renamed] = tensor[:, :, None, None] if flat else tensor
    return found


def _vae_name(name: str, last: int) -> str:
    renamed = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    renamed = re.sub(r"down_blocks\.(\d+)", r"down.\1", renamed)
    renamed = re.sub(r"up_blocks\.(\d+)\.resnets", lambda match: f"up.{last - int(match[1])}.block", renamed)
    renamed = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", renamed)
    renamed = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", renamed)
    for old, new in _VAE_NAMES:
        renamed = renamed.replace(old, new)
    return renamed


def hollow_checkpoint(path: Path, configs: Path, without: str = "-") -> Path:
    """Write a checkpoint of the original layout that has a header only: its weights are a hole in the file."""
    read = {name: json.loads((configs / name / "config.json").read_text()) for name in ("unet", "vae", "text_encoder")}
    attends = [block.startswith("CrossAttn") for block in read["unet"]["up_block_types"]]
    last = len(read["vae"]["up_block_types"]) - 1
    unet, vae, text = (shapes_of(name, config) for name, config in read.items())
    shapes = {UNET + _unet_name(name, read["unet"]["layers_per_block"], attends): shape for name, shape in unet.items()}
    shapes |= {VAE + _vae_name(name, last): shape for name, shape in vae.items()}
    shapes |= {TEXT + name: shape for name, shape in text.items()}
    return hollow({name: shape for name, shape in shapes.items() if not name.startswith(without)}, path)


def hollow(
    shapes: Mapping[str, tuple[int, ...]], path: Path, dtype: str = "F8_E4M3", metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a safetensors file whose weights are a hole, which takes no space on a disk and reads as zeros."""
    size = {"F8_E4M3": 1, "I8": 1, "F16": 2}[dtype]
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def original_adapter(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors of a motion adapter by their names in AnimateDiff and PIA."""
    found = {}
    for name, tensor in tensors.items():
        renamed = re.sub(r"(motion_modules\.\d+)\.(?!transformer_blocks)", r"\1.temporal_transformer.", name)
        for old, new in _ANIMATEDIFF:
            renamed = renamed.replace(old, new)
        if renamed.endswith("pos_embed.pe"):
            for number in (0, 1):
                found[renamed.replace("pos_embed", f"attention_blocks.{number}.pos_encoder")] = tensor
        else:
            found[renamed] = tensor
    return found


def configs(folder: Path, target: Path) -> Path:
    """Write the files of the diffusers folder that a checkpoint in one file lacks: all but the weights."""
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            copy = target / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return target


def write(tensors: Mapping[str, torch.Tensor], path: Path) -> Path:
    """Write a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}, path)
    return path
