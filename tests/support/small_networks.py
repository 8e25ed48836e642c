"""Networks that a compiler finishes in half a minute."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNetMotionModel

from pia_batch.engine import unet


def small() -> tuple[Any, ...]:
    """Return arguments of `unet.run` for a network that compiles in half a minute."""
    torch.manual_seed(0)
    network = UNetMotionModel(
        in_channels=9,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlockMotion",),
        up_block_types=("CrossAttnUpBlockMotion",),
        layers_per_block=1,
        cross_attention_dim=8,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        norm_num_groups=4,
        use_motion_mid_block=False,
    ).eval()
    texts = [torch.randn(1, 4, 8) for _ in range(2)]
    with torch.no_grad():
        conditions = unet.prepare(network, [0, 0], 1, texts)
    return network, torch.randn(1, 2, 4, 4, 9), torch.tensor([500]), conditions
