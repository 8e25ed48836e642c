"""The arithmetic of open-mmlab/PIA by hooks on the stock pipeline: norms over other axes, and the styles reversed."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from diffusers import PIAPipeline, UNetMotionModel
from pipelines import Truth, single_call
from torch import nn
from torch.nn import functional

from pia_batch.engine import Shot

TOGETHER = re.compile(r"(.+\.)?(resnets\.\d+\.norm[12]|conv_norm_out)")
ALONE = re.compile(r"(.+\.)?motion_modules\.\d+\.norm")


def hook(network: UNetMotionModel) -> UNetMotionModel:
    """Give the network's own call the norms of the original, and return it. The clip's frames come from its input."""
    frames: list[int] = []
    network.register_forward_pre_hook(lambda _, given: frames.append(given[0].shape[2]))

    def over_the_clip(norm: nn.GroupNorm, given: Any, _: Any) -> torch.Tensor:
        (image,) = given
        clips = torch.stack([clip.movedim(0, 1) for clip in image.split(frames[-1])])  # b c f h w
        normed = functional.group_norm(clips, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return torch.cat([clip.movedim(1, 0) for clip in normed])

    def frame_by_frame(norm: nn.GroupNorm, given: Any, _: Any) -> torch.Tensor:
        (clips,) = given
        each = [
            functional.group_norm(clips[:, :, frame], norm.num_groups, norm.weight, norm.bias, norm.eps)
            for frame in range(clips.shape[2])
        ]
        return torch.stack(each, dim=2)

    count = 0
    for name, module in network.named_modules():
        if TOGETHER.fullmatch(name):
            module.register_forward_hook(over_the_clip)
            count += 1
        elif ALONE.fullmatch(name):
            module.register_forward_hook(frame_by_frame)
            count += 1
    assert count == sum(isinstance(each, nn.GroupNorm) for each in network.modules()) - sum(
        ".attentions." in name and isinstance(each, nn.GroupNorm) for name, each in network.named_modules()
    )
    return network


def original_call(pipe: PIAPipeline, shot: Shot) -> Truth:
    """Call a hooked pipeline once, with the preset that the original has under this number."""
    swapped = {6: 8, 8: 6}.get(shot.motion_scale, shot.motion_scale)
    return single_call(pipe, dataclasses.replace(shot, motion_scale=swapped))
