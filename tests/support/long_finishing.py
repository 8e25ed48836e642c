"""Memory of finishing: matches, sharpens, interpolates and encodes a long clip, and prints the peak.

A program, because the peak of a process never falls: python long_finishing.py FORMAT FRAMES SIDE. It prints the bytes
of the generated frames, and the peak above what the process took with them and with finishing a short clip.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

import numpy as np

from pia_batch.config import EncodingConfig
from pia_batch.media import codecs
from pia_batch.pipeline.finishing import finish


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(fmt: Any, num_frames: int, side: int) -> None:
    rng = np.random.default_rng(0)
    wide = np.repeat(rng.integers(0, 256, (side, side // 8 + num_frames, 3), np.uint8), 8, axis=1)
    frames = np.stack([wide[:, 4 * number : 4 * number + side] for number in range(num_frames)])

    def encode(part: Any) -> bytes:
        row = {"width": side, "height": side, "num_frames": len(part), "fps": 8.0, "loop": False, "motion_scale": 0}
        row |= {"motion_curve": None, "color_match": True, "sharpen": 0.5, "interpolate": 2, "upscale": 1}
        finished = finish(row | {"pixels": part[0].tobytes()}, part)
        data = codecs.encode(finished.frames, fmt, finished.size.fps, EncodingConfig())
        assert codecs.probe(data, fmt).num_frames == 2 * len(part) - 1
        return data

    encode(frames[:40])
    before = peak_bytes()
    encode(frames)
    sys.stdout.write(f"{frames.nbytes} {peak_bytes() - before}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
