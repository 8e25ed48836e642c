"""What one would write without this package: `PIAPipeline` in a pool of Ray Data. docs/performance.md has its costs.

    python jobs/plain_ray_data.py requests.parquet clips                  # Stable Diffusion 1.5 and PIA, on one GPU
    python jobs/plain_ray_data.py requests.parquet clips --base pia_batch/tiny/checkpoint --device cpu --size 64

The manifest has the columns `request_id`, `image` and `prompt`; `clips` gets a GIF of each row, and Parquet files.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray


class Animate:
    """Holds a pipeline, and draws a row a call."""

    def __init__(self, load: Callable[[], Any], output: Path, size: int, steps: int) -> None:
        self.pipe, self.output, self.size, self.steps = load(), output, size, steps

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """The row, a batch of one, with the path of its GIF."""
        from diffusers.utils import export_to_gif, load_image  # noqa: PLC0415 - on the worker only

        image = load_image(str(rows["image"][0])).resize((self.size, self.size))
        drawn = self.pipe(image=image, prompt=str(rows["prompt"][0]), num_inference_steps=self.steps)
        path = export_to_gif(drawn.frames[0], f"{self.output}/{rows['request_id'][0]}.gif")
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
    """The checkpoint as it is documented to be loaded."""
    import torch  # noqa: PLC0415 - on the worker only
    from diffusers import MotionAdapter, PIAPipeline  # noqa: PLC0415

    dtype = torch.float16 if device == "cuda" else torch.float32
    motion = MotionAdapter.from_pretrained(adapter, torch_dtype=dtype)
    return PIAPipeline.from_pretrained(base, motion_adapter=motion, torch_dtype=dtype).to(device)


def main() -> None:
    """Read the command line, and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest")
    parser.add_argument("output", type=Path)
    parser.add_argument("--base", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
    parser.add_argument("--adapter", help="default: the one in the base's folder, else openmmlab/PIA-condition-adapter")
    parser.add_argument("--device", default="cuda", help="cuda or cpu; default: cuda")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=25)
    given = parser.parse_args()
    beside = Path(given.base).resolve() / "motion_adapter"
    base = str(beside.parent) if beside.exists() else given.base
    adapter = given.adapter or (str(beside) if beside.exists() else "openmmlab/PIA-condition-adapter")
    num_gpus = float(given.device == "cuda")
    run(given.manifest, given.output, lambda: pipeline(base, adapter, given.device), num_gpus, given.size, given.steps)


if __name__ == "__main__":
    main()
