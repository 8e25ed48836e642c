"""Plain script without this package, for comparison: `PIAPipeline` in a Ray Data pool. Costs: docs/performance.md.

    python jobs/plain_ray_data.py requests.parquet clips                  # Stable Diffusion 1.5 and PIA, on one GPU
    python jobs/plain_ray_data.py requests.parquet clips --base pia_batch/tiny/checkpoint --device cpu --size 64

The manifest has the columns `request_id`, `image` and `prompt`; the folder `clips` gets a GIF of each row, and Parquet
files with the results.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray


class Animate:
    """Actor that holds a pipeline and animates one row per call."""

    def __init__(self, load: Callable[[], Any], output: Path, size: int, steps: int) -> None:
        self.pipe, self.output, self.size, self.steps = load(), output, size, steps

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Return the row, a batch of one, with the path of its GIF."""
        from diffusers.utils import export_to_gif, load_image  # noqa: PLC0415 - on the worker only

        image = load_image(str(rows["image"][0])).resize((self.size, self.size))
        result = self.pipe(image=image, prompt=str(rows["prompt"][0]), num_inference_steps=self.steps)
        path = export_to_gif(result.frames[0], f"{self.output}/{rows['request_id'][0]}.gif")
        return rows | {"animation": [path]}


def run(
    manifest: str, output: Path, load: Callable[[], Any], num_gpus: float, size: int = 512, steps: int = 25
) -> None:
    """Animate every row of a Parquet manifest on one actor."""
    output.mkdir(parents=True, exist_ok=True)
    (
        ray.data.read_parquet(manifest)
        .map_batches(
            Animate,
            fn_constructor_args=(load, output.resolve(), size, steps),
            batch_size=1,
            num_gpus=num_gpus,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        .write_parquet(str(output / "results"))
    )


def pipeline(base: str, adapter: str, device: str) -> Any:
    """Load the checkpoint as the documentation of diffusers does."""
    import torch  # noqa: PLC0415 - on the worker only
    from diffusers import MotionAdapter, PIAPipeline  # noqa: PLC0415

    dtype = torch.float16 if device == "cuda" else torch.float32
    motion = MotionAdapter.from_pretrained(adapter, torch_dtype=dtype)
    return PIAPipeline.from_pretrained(base, motion_adapter=motion, torch_dtype=dtype).to(device)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", help="Parquet manifest to animate")
    parser.add_argument("output", type=Path, help="folder for the GIF files and results")
    parser.add_argument(
        "--base", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="hub id or folder (default: %(default)s)"
    )
    parser.add_argument("--adapter", help="hub id or folder (default: the base's own, else PIA's)")
    parser.add_argument("--device", default="cuda", help="cuda or cpu (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="width and height in pixels (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps (default: %(default)s)")
    given = parser.parse_args()
    bundled = Path(given.base).resolve() / "motion_adapter"
    base = str(bundled.parent) if bundled.exists() else given.base
    adapter = given.adapter or (str(bundled) if bundled.exists() else "openmmlab/PIA-condition-adapter")
    num_gpus = float(given.device == "cuda")
    run(given.manifest, given.output, lambda: pipeline(base, adapter, given.device), num_gpus, given.size, given.steps)


if __name__ == "__main__":
    main()
