"""What a safetensors file holds, told from its header: no tensor is read, and nothing that could run code is opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from pia_batch.errors import ConfigError

SUFFIX = ".safetensors"

MAX_HEADER_BYTES = 100_000_000
"""Source: huggingface/safetensors, `MAX_HEADER_SIZE`."""

Kind = Literal[
    "Stable Diffusion 1.5 checkpoint",
    "inpainting checkpoint",
    "InstructPix2Pix checkpoint",
    "Stable Diffusion 2 checkpoint",
    "Stable Diffusion XL checkpoint",
    "checkpoint of another family than Stable Diffusion 1.5",
    "ControlNet",
    "LoRA",
    "LyCORIS adapter (LoHa or LoKr)",
    "textual inversion",
    "Stable Diffusion XL textual inversion",
    "IP-Adapter",
    "motion adapter",
    "VAE",
    "UNet of a diffusers folder",
    "text encoder",
    "file of unknown layout",
]

PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
"""Endings of files whose opening can run code."""


@dataclass(frozen=True)
class Header:
    """The names and shapes of all tensors of a file.

    Attributes:
        path: the file.
        shapes: by name, in the file's order.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def starting(self, *prefixes: str) -> list[str]:
        """The names that begin with one of `prefixes`."""
        return [name for name in self.shapes if name.startswith(prefixes)]

    def shape_of(self, ending: str) -> tuple[int, ...] | None:
        """The shape of the first tensor whose name ends so; None: there is none."""
        return next((shape for name, shape in self.shapes.items() if name.endswith(ending)), None)


def refuse_pickle(name: str, key: str) -> None:
    """Stop at a file name that means pickled weights, or anything else than safetensors.

    Args:
        name: a path, URI or file name.
        key: of the config, for the message.

    Raises:
        ConfigError: it does not end in `.safetensors`.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in PICKLED:
        raise ConfigError(
            f"{key}: {name} is a pickle, which is refused, as opening it runs its code. "
            "Convert it to safetensors, or name a file that is"
        )
    if suffix != SUFFIX:
        raise ConfigError(f"{key}: {name} is no {SUFFIX} file, the only kind of weights that is opened")


def read(path: Path) -> Header:
    """The header of a safetensors file, checked against the file's size.

    Raises:
        ConfigError: a pickle or zip under a wrong name, cut short, or not safetensors at all.
    """
    try:
        with path.open("rb") as file:
            num_bytes = file.seek(0, 2)
            file.seek(0)
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if not 0 < length <= min(num_bytes - 8, MAX_HEADER_BYTES):
                raise ConfigError(_what_it_is_instead(path, start, num_bytes))
            text = file.read(length)
    except OSError as err:
        raise ConfigError(f"cannot read {path}: {err}") from err
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        shapes = {name: tuple(int(side) for side in tensor["shape"]) for name, tensor in header.items()}
        end = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as err:
        raise ConfigError(f"{path} is no safetensors file: its header cannot be read ({err})") from err
    if 8 + length + end != num_bytes:
        raise ConfigError(
            f"{path} has {num_bytes} bytes, but its header tells of {8 + length + end}: "
            "it was not copied in full, or it is damaged; fetch it again"
        )
    return Header(path, shapes)


def _what_it_is_instead(path: Path, start: bytes, num_bytes: int) -> str:
    if start[:1] == b"\x80" or start[:4] == b"PK\x03\x04":
        return (
            f"{path} is named as safetensors, but it is a pickle inside, which is refused, as opening it runs its "
            "code. Convert it to safetensors, or name a file that is"
        )
    return f"{path} is no safetensors file, or it was cut short: it has {num_bytes} bytes"


def kind(header: Header) -> Kind:
    """What the file is, by the names and shapes that only such files have."""
    return next(name for name, holds in _KINDS if holds(header))


def _any(header: Header, *parts: str) -> bool:
    return any(part in name for name in header.shapes for part in parts)


def _unet_input(header: Header) -> int | None:
    """Channels that the UNet of a checkpoint in the original layout takes."""
    shape = header.shapes.get("model.diffusion_model.input_blocks.0.0.weight")
    return shape[1] if shape is not None and len(shape) > 1 else None


def _is_inversion(header: Header) -> bool:
    if "emb_params" in header.shapes:
        return True
    return len(header.shapes) == 1 and all(0 < len(shape) <= 2 for shape in header.shapes.values())  # noqa: PLR2004


# The first that holds wins: files that name the networks they belong to come before those networks.
_KINDS: tuple[tuple[Kind, Callable[[Header], bool]], ...] = (
    ("IP-Adapter", lambda header: bool(header.starting("ip_adapter.", "image_proj."))),
    ("LyCORIS adapter (LoHa or LoKr)", lambda header: _any(header, "hada_w", "lokr_w")),
    ("LoRA", lambda header: _any(header, ".lora_", "_lora.", ".lora.")),
    ("Stable Diffusion XL textual inversion", lambda header: set(header.shapes) == {"clip_l", "clip_g"}),
    ("textual inversion", _is_inversion),
    ("Stable Diffusion XL checkpoint", lambda header: bool(header.starting("conditioner.embedders."))),
    ("Stable Diffusion 2 checkpoint", lambda header: bool(header.starting("cond_stage_model.model."))),
    ("inpainting checkpoint", lambda header: _unet_input(header) == 9),  # noqa: PLR2004 - latents, mask, masked latents
    ("InstructPix2Pix checkpoint", lambda header: _unet_input(header) == 8),  # noqa: PLR2004 - latents of two images
    ("ControlNet", lambda header: bool(header.starting("control_model.", "controlnet_"))),
    ("Stable Diffusion 1.5 checkpoint", lambda header: _unet_input(header) == 4),  # noqa: PLR2004 - latent channels
    (
        "checkpoint of another family than Stable Diffusion 1.5",
        lambda header: bool(header.starting("model.diffusion_model.", "double_blocks.", "joint_blocks.")),
    ),
    ("UNet of a diffusers folder", lambda header: _any(header, "down_blocks.0.resnets.") and _any(header, "time_emb")),
    ("motion adapter", lambda header: _any(header, "motion_modules.")),
    ("text encoder", lambda header: _any(header, "token_embedding.weight")),
    (
        "VAE",
        lambda header: bool(header.starting("first_stage_model.") or header.starting("encoder.", "decoder.")),
    ),
    ("file of unknown layout", lambda _: True),
)
