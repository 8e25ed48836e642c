"""Upscalers of every supported architecture, small and with random weights, as safetensors files."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pia_batch.engine.upscaling import _spandrel


def _esrgan(**options: Any) -> Any:
    from spandrel.architectures.ESRGAN import ESRGAN  # noqa: PLC0415 - after `_spandrel`, as all of these

    return ESRGAN(num_filters=8, num_blocks=1, **options)


def _compact(**options: Any) -> Any:
    from spandrel.architectures.Compact import Compact  # noqa: PLC0415

    return Compact(num_feat=8, num_conv=2, **options)


def _span(**options: Any) -> Any:
    from spandrel.architectures.SPAN import SPAN  # noqa: PLC0415

    return SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, **options)


def _swinir(**options: Any) -> Any:
    from spandrel.architectures.SwinIR import SwinIR  # noqa: PLC0415

    return SwinIR(img_size=16, window_size=4, embed_dim=12, depths=[2], num_heads=[2], **options)


def _dat(**options: Any) -> Any:
    from spandrel.architectures.DAT import DAT  # noqa: PLC0415

    sizes: dict[str, Any] = {"img_size": 16, "embed_dim": 32, "split_size": [2, 4], "depth": [2], "num_heads": [2]}
    return DAT(expansion_factor=2.0, **sizes, **options)


NETWORKS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "ESRGAN x2": (_esrgan, {"scale": 2}),
    "ESRGAN x4": (_esrgan, {"scale": 4}),
    "ESRGAN x2, shuffled": (_esrgan, {"in_nc": 12, "scale": 4, "shuffle_factor": 2}),
    "Compact x2": (_compact, {"upscale": 2}),
    "Compact x4": (_compact, {"upscale": 4}),
    "SPAN x2": (_span, {"upscale": 2}),
    "SwinIR x2": (_swinir, {"upscale": 2, "upsampler": "pixelshuffle"}),
    "SwinIR x3, direct": (_swinir, {"upscale": 3, "upsampler": "pixelshuffledirect"}),
    "SwinIR x4, nearest": (_swinir, {"upscale": 4, "upsampler": "nearest+conv"}),
    "DAT x2": (_dat, {"upscale": 2}),
    "DAT x3, direct": (_dat, {"upscale": 3, "upsampler": "pixelshuffledirect"}),
}
"""Networks by name, of which the last number of the first word is the factor."""

NO_UPSCALERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "scale is 1": (_compact, {"upscale": 1}),
    "1 and 1 channels, not RGB": (_compact, {"num_in_ch": 1, "num_out_ch": 1, "upscale": 2}),
}
"""Networks that cannot be used, by a part of the reason."""


def network(name: str) -> Any:
    """A network with the same random weights each time."""
    _spandrel()
    make, options = (NETWORKS | NO_UPSCALERS)[name]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the constructors of SwinIR and DAT
        torch.manual_seed(0)
        return make(**options).eval()


def save(path: Path, name: str, change: Callable[[dict[str, Any]], None] = lambda _: None) -> Path:
    tensors = {key: tensor.contiguous().clone() for key, tensor in network(name).state_dict().items()}
    change(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path
