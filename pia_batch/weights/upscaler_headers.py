"""Upscalers: architecture, scale and channels of a network, from names and shapes of its tensors. No torch.

The rules are those by which spandrel 0.4.2 recognises the same files, so that what a plan accepts, a worker loads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of tensors by name."""

_PREFIXES = ("module.", "netG.")
"""Prefixes that all names of a file may have."""

_RGB = 3


@dataclass(frozen=True)
class UpscalerNetwork:
    """An upscaler.

    Attributes:
        architecture: Its name, as spandrel calls it.
        scale: Factor of width and height.
        channels: Numbers of channels of its input and its output.
        parameters: Number of its parameters.
    """

    architecture: str
    scale: int
    channels: tuple[int, int]
    parameters: int


class UnknownUpscalerError(ValueError):
    """Tensors that are no upscaler which is supported; the message says what is wrong, without the file."""


def recognise(shapes: Shapes) -> UpscalerNetwork:
    """Return the network whose tensors these are.

    Args:
        shapes: Shapes of all tensors of a file.

    Raises:
        UnknownUpscalerError: The architecture is another one, or the network does not enlarge RGB pictures.
    """
    for prefix in _PREFIXES:
        if shapes and all(name.startswith(prefix) for name in shapes):
            shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    found = next((each for each in _ARCHITECTURES if any(has.issubset(shapes) for has in each.tensors)), None)
    if found is None:
        known = ", ".join(each.name for each in _ARCHITECTURES)
        raise UnknownUpscalerError(f"its tensor names are those of no supported upscaler ({known})")
    try:
        scale, *channels = found.measure(shapes)
    except (KeyError, IndexError, ZeroDivisionError, ValueError) as err:
        raise UnknownUpscalerError(f"its tensors are not those of a complete {found.name} ({err})") from None
    if channels != [_RGB, _RGB]:
        raise UnknownUpscalerError(f"this {found.name} has {channels[0]} and {channels[1]} channels, not RGB")
    if scale == 1:
        raise UnknownUpscalerError(f"this {found.name} restores pictures and does not enlarge them: its scale is 1")
    return UpscalerNetwork(found.name, scale, (_RGB, _RGB), sum(math.prod(shape) for shape in shapes.values()))


@dataclass(frozen=True)
class _Architecture:
    """One architecture: its name, tensors of which all exist in one layout or another, and scale and channels."""

    name: str
    tensors: tuple[frozenset[str], ...]
    measure: Callable[[Shapes], tuple[int, int, int]]


def _length(shapes: Shapes, prefix: str) -> int:
    """Return the number of parts of a sequence, such as 3 for `body.0.weight` and `body.2.weight`."""
    numbers = [int(match[1]) for name in shapes if (match := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))]
    return max(numbers) + 1


def _one_step(size: int, channels: int) -> tuple[int, int]:
    """Return scale and output channels of a pixel shuffle of `size` channels."""
    for wanted in (channels, 3, 4, 1):
        scale = math.isqrt(size // wanted)
        if scale and scale**2 * wanted == size:
            return scale, wanted
    raise ValueError(f"{size} channels make no picture")


def _steps(shapes: Shapes) -> int:
    """Return the scale of alternating convolutions and pixel shuffles, in `upsample`."""
    scale = 1
    for number in range(0, 10, 2):
        shape = shapes.get(f"upsample.{number}.weight")
        if shape is None:
            break
        scale *= math.isqrt(shape[0] // shape[1])
    return scale


def _esrgan(shapes: Shapes) -> tuple[int, int, int]:
    if "conv_first.weight" in shapes:
        first, last = shapes["conv_first.weight"][1], shapes["conv_last.weight"][0]
        ups = sum(re.fullmatch(r"(conv_up|upconv)\d\.weight", name) is not None for name in shapes)
    else:
        length = _length(shapes, "model")
        first, last = shapes["model.0.weight"][1], shapes[f"model.{length - 1}.weight"][0]
        ups = (length - 5) // 3
    shuffle = math.isqrt(first // last) if first in (4 * last, 16 * last) else 1
    return 2**ups // shuffle, first // shuffle**2, last


def _compact(shapes: Shapes) -> tuple[int, int, int]:
    first = shapes["body.0.weight"][1]
    return _swapped(first, _one_step(shapes[f"body.{_length(shapes, 'body') - 1}.bias"][0], first))


def _span(shapes: Shapes) -> tuple[int, int, int]:
    first = shapes["conv_1.sk.weight"][1]
    return _swapped(first, _one_step(shapes["upsampler.0.weight"][0], first))


def _swapped(first: int, found: tuple[int, int]) -> tuple[int, int, int]:
    return found[0], first, found[1]


def _swinir(shapes: Shapes) -> tuple[int, int, int]:
    inner = shapes["conv_first.1.weight" if "conv_first.1.weight" in shapes else "conv_first.weight"][1]
    shuffle = round(math.sqrt(inner // _RGB)) if "conv_first.1.weight" in shapes else 1
    last = shapes["conv_last.weight"][0] if "conv_last.weight" in shapes else inner
    scale = 1
    if "conv_before_upsample.0.weight" in shapes:
        if "conv_up1.weight" in shapes:
            scale = 2 ** sum("conv_up" in name and "bias" not in name for name in shapes)
        else:
            scale = _steps(shapes)
    elif "upsample.0.weight" in shapes:
        scale = math.isqrt(shapes["upsample.0.bias"][0] // last)
    return scale // shuffle, inner // shuffle**2, last


def _dat(shapes: Shapes) -> tuple[int, int, int]:
    first = shapes["conv_first.weight"][1]
    if "conv_last.weight" in shapes:
        return _steps(shapes), first, shapes["conv_last.weight"][0]
    return math.isqrt(shapes["upsample.0.weight"][0] // first), first, first


_ARCHITECTURES = (
    _Architecture(
        "DAT",
        (frozenset({"conv_first.weight", "before_RG.1.weight", "layers.0.blocks.0.attn.attns.0.rpe_biases"}),),
        _dat,
    ),
    _Architecture(
        "SwinIR",
        tuple(
            frozenset(
                {
                    first,
                    "layers.0.residual_group.blocks.0.norm1.weight",
                    "layers.0.residual_group.blocks.0.mlp.fc1.bias",
                    "layers.0.residual_group.blocks.0.attn.relative_position_index",
                }
            )
            for first in ("conv_first.weight", "conv_first.1.weight")
        ),
        _swinir,
    ),
    _Architecture(
        "ESRGAN",
        (
            frozenset({"model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"}),
            frozenset({"model.0.weight", "model.1.sub.0.RDB1.conv1x1.weight"}),
            frozenset({"conv_first.weight", "body.0.rdb1.conv1.weight", "conv_body.weight", "conv_last.weight"}),
            frozenset({"conv_first.weight", "RRDB_trunk.0.RDB1.conv1.weight", "trunk_conv.weight", "conv_last.weight"}),
        ),
        _esrgan,
    ),
    _Architecture(
        "SPAN",
        (frozenset({"conv_1.sk.weight", "block_1.c1_r.sk.weight", "conv_cat.weight", "upsampler.0.weight"}),),
        _span,
    ),
    _Architecture("Compact", (frozenset({"body.0.weight", "body.1.weight"}),), _compact),
)
