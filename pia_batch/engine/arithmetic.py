"""Arithmetic of open-mmlab/PIA: a UNet whose group norms have other axes than in diffusers, from the same weights.

The original normalises the layers of ResNets and the output over all frames of a clip, and the input of a motion module
frame by frame; diffusers does the opposite. Both keep the norms of attention and of the VAE frame by frame.

Source: open-mmlab/PIA `animatediff/models/resnet.py`, `unet.py` and `motion_module.py`.
"""

from __future__ import annotations

import copy
from typing import Any, NoReturn

from diffusers import UNetMotionModel


class OriginalUNet(UNetMotionModel):  # type: ignore[misc] # diffusers is untyped
    """`UNetMotionModel` that `unet.run` calls with the norms of the original. It has no call of its own."""

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse the call of diffusers, whose norms are others.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("this network has the norms of open-mmlab/PIA; call it by unet.run")


def as_original(unet: UNetMotionModel) -> OriginalUNet:
    """Return a network with the same layers and weights, and the norms of the original; leave `unet` unchanged."""
    network: OriginalUNet = copy.copy(unet)
    network.__class__ = OriginalUNet
    return network


def norms_over_frames(unet: Any) -> bool:
    """Return True if the norms of ResNets and of the output cover all frames, and those of motion modules only one."""
    return isinstance(unet, OriginalUNet)
