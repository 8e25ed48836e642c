"""Motion adapters: what makes one PIA's, the names of others, and checks that it fits a base. No torch."""

from __future__ import annotations

import re
from typing import Any

from pia_batch.errors import ConfigError
from pia_batch.weights import components, networks, safetensors
from pia_batch.weights.components import CONFIG, Component

_PIA_CHANNELS = 9


def check(adapter: Component, unet: Component) -> None:
    """Check that the adapter is PIA's: its first layer takes latents, mask and the image's latents.

    Args:
        adapter: The motion adapter.
        unet: UNet of the base, whose blocks it must fit.

    Raises:
        ConfigError: It is of another family, or made for another base.
    """
    header, settings = components.header(adapter), adapter.settings
    channels = [settings.get("conv_in_channels"), safetensors.second_side(header.shape_of("conv_in.weight"))]
    wrong = sorted({str(each) for each in channels if each != _PIA_CHANNELS})
    if wrong:
        raise ConfigError(
            f"{header.path} is not a PIA motion adapter: the conv_in channels of its config and file must both "
            f"be {_PIA_CHANNELS} (got {', '.join(wrong)}); {_other_adapter(header)} does not read the image. "
            "Set model.motion_adapter to one of PIA"
        )
    lengths = sorted({shape[1] for name, shape in header.shapes.items() if _is_positions(name, shape)})
    if len(lengths) > 1:
        raise ConfigError(
            f"{header.path} has modules of {' and of '.join(map(str, lengths))} frame positions: two files are "
            "mixed in it; use one whose modules all have the same number"
        )
    found = positions(header)
    if found is not None and found != settings.get("motion_max_seq_length"):
        raise ConfigError(
            f"{header.path} has {found} frame positions, but its config says "
            f"{settings.get('motion_max_seq_length')}; correct motion_max_seq_length in a {CONFIG} next to it"
        )
    sizes = {
        name: _sizes(part.settings, layers)
        for name, part, layers in (("adapter", adapter, "motion_layers_per_block"), ("base", unet, "layers_per_block"))
    }
    if sizes["adapter"] != sizes["base"]:
        raise ConfigError(
            f"{header.path} does not fit the base: its blocks have {sizes['adapter']} channels and layers, those of "
            f"the UNet {sizes['base']}; set model.motion_adapter to one that was made for this base"
        )


def positions(header: safetensors.SafetensorsHeader) -> int | None:
    """Return the number of frame positions in a file; None if it leaves them to the config."""
    return safetensors.second_side(next(filter(None, map(header.shape_of, networks.POSITIONS)), None))


def _is_positions(name: str, shape: networks.Shape) -> bool:
    return name.endswith(networks.POSITIONS) and len(shape) > 1


def _other_adapter(header: safetensors.SafetensorsHeader) -> str:
    """Return the family of a motion adapter that is not PIA's. That for Stable Diffusion XL has three blocks."""
    blocks = {match[1] for name in header.shapes if (match := re.search(r"down_blocks\.(\d+)\.motion_modules", name))}
    widths = {
        shape[0] for name, shape in header.shapes.items() if re.search(r"down_blocks\.0\..+\.norm\.weight$", name)
    }
    is_large = blocks == {"0", "1", "2"} and widths == {_FIRST_WIDTH}
    return "an AnimateDiff adapter for Stable Diffusion XL" if is_large else "an AnimateDiff adapter"


_FIRST_WIDTH = 320
"""Channels of the first block of Stable Diffusion, of 1.5 and of XL."""


def _sizes(settings: dict[str, Any], layers: str) -> list[tuple[Any, Any]]:
    """Return channels and layers of each block, as diffusers compares them when it joins adapter and UNet."""
    channels = settings.get("block_out_channels") or [320, 640, 1280, 1280]
    if not isinstance(channels, list):
        raise ConfigError(f"block_out_channels in a {CONFIG}: must be a list (got {channels!r}); correct it")
    try:
        return list(zip(channels, networks.per_block(settings.get(layers, 2), len(channels)), strict=True))
    except ValueError as err:
        raise ConfigError(f"{layers} in a {CONFIG}: {err}; correct it") from err
