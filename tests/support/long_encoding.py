"""Memory of a long clip outside of the networks: decodes, measures, encodes and checks it, and prints the peak.

A program, because the peak of a process never falls: python long_encoding.py FORMAT FRAMES SIDE. It prints the bytes of
the frames, and the peak above what the process took before them.
"""

from __future__ import annotations

import resource
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from pia_batch.config import EncodingConfig
from pia_batch.engine.decoding import FrameDecoder
from pia_batch.media import codecs, quality


class EnlargingVae:
    """A decoder that enlarges latents eightfold, as a VAE does, and computes nothing else."""

    config = SimpleNamespace(scaling_factor=1.0, block_out_channels=(8, 8, 8, 8))
    dtype = torch.float32

    def decode(self, latents: torch.Tensor) -> Any:
        return SimpleNamespace(sample=torch.nn.functional.interpolate(latents[:, :3], scale_factor=8, mode="bilinear"))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(fmt: Any, num_frames: int, side: int) -> None:
    small = codecs.encode(np.zeros((2, side, side, 3), np.uint8), fmt, 8, EncodingConfig())
    codecs.probe(small, fmt)  # libraries are loaded, and work with frames of this size
    latents = torch.randn(1, 4, num_frames, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    before = peak_bytes()

    (frames,) = FrameDecoder(EnlargingVae()).decode([latents])
    condition = np.asarray(Image.new("RGB", (side, side)))
    quality.measures(frames, condition)
    data = codecs.encode(frames, fmt, 8, EncodingConfig(gif_dither=True))
    quality.check_animation(data, {"format": fmt, "width": side, "height": side, "num_frames": num_frames})

    sys.stdout.write(f"{frames.nbytes} {len(data)} {peak_bytes() - before}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
