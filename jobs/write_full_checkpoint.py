"""Write a full-size PIA checkpoint with random weights: Stable Diffusion 1.5 and PIA's motion modules, in float16.

    python jobs/write_full_checkpoint.py FOLDER

`benchmark_gpu.py` starts this program in a process of its own, so that the memory of the networks is free again when
the runs begin.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pia_batch.engine.benchmark import baselines


def main() -> None:
    """Write the checkpoint into the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Write a full-size PIA checkpoint with random weights.")
    parser.add_argument("folder", type=Path, help="folder to write, in the layout of diffusers")
    baselines.pipeline("full").to(dtype=torch.float16).save_pretrained(parser.parse_args().folder)


if __name__ == "__main__":
    main()
