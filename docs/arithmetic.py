"""Picture of both arithmetics on the embedded model, docs/arithmetic.png: `python docs/arithmetic.py`.

Two requests of the sample manifest, with the same seeds; the frames of `diffusers` are above those of `original`. It
prints the mean distance of the clips, in steps of 255.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from pia_batch import ModelConfig, PiaEngine, Shot, tiny
from pia_batch.config import RunConfig

PICTURE = Path(__file__).with_name("arithmetic.png")
NUM_REQUESTS, SEEDS = 2, (1, 2, 3)
SIDE, MARGIN = 96, 86


def main() -> None:
    """Generate the clips and write the picture."""
    config = RunConfig.load(None, {"manifest": "unused", "output": "unused"})
    settings = {
        name: getattr(config.defaults, name)
        for name in ("width", "height", "num_frames", "num_inference_steps", "guidance_scale", "motion_scale")
    }
    rows = pq.read_table(tiny.SAMPLE / "requests.parquet").to_pylist()[:NUM_REQUESTS]
    shots = [
        Shot(image=Image.open(tiny.SAMPLE / row["image"]).convert("RGB"), prompt=row["prompt"], seed=seed, **settings)
        for row in rows
        for seed in SEEDS
    ]
    clips = {}
    for arithmetic in ("diffusers", "original"):
        model = ModelConfig(scheduler=config.model.scheduler, arithmetic=arithmetic)
        clips[arithmetic] = [clip.frames for clip in PiaEngine.load(model).animate(shots)]
    pairs = list(zip(*clips.values(), strict=True))
    distances = [float(np.abs(one.astype(float) - other).mean()) for one, other in pairs]
    print(f"mean distance of {len(pairs)} clips: {min(distances):.1f} to {max(distances):.1f} of 255")
    sheet = Image.new("RGB", (MARGIN + settings["num_frames"] * SIDE, 2 * NUM_REQUESTS * SIDE), "white")
    for index in range(NUM_REQUESTS):
        for line, (arithmetic, made) in enumerate(clips.items()):
            top = (2 * index + line) * SIDE
            ImageDraw.Draw(sheet).text((6, top + SIDE // 2 - 6), arithmetic, fill="black")
            for number, frame in enumerate(made[index * len(SEEDS)]):
                tile = Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                sheet.paste(tile, (MARGIN + number * SIDE, top))
    sheet.quantize(128).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
