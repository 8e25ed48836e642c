"""Long clips and prompts that change, together with everything else that a model or a row may have, by brute force."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import adapted
from diffusers import PIAPipeline
from long_clips import by_brute_force
from lora_files import stock_with, write_lora
from original import hook
from pipelines import assert_same, build, picture, shot
from travelling import embeddings

from pia_batch.engine import PiaEngine, Shot

WINDOWS: dict[str, Any] = {"context": "windows", "context_length": 6, "context_overlap": 2, "num_inference_steps": 2}

LONG = shot(1, num_frames=10, **WINDOWS)
TRAVELLING = shot(
    2,
    prompt=None,
    prompts={0: "a hat", 4: "a blue square", 8: "a hat"},
    negative_prompts={0: "green", 7: ""},
    num_frames=9,
    loop=True,
    motion_scale=1,
    **WINDOWS,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model as the stock pipeline has it.

    Attributes:
        pipe: The pipeline.
        options: Arguments of `PiaEngine.from_pipeline`.
        changed: Settings of both rows.
        truth: The pipeline for the truth, if it needs another one.
    """

    pipe: PIAPipeline
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    changed: dict[str, Any] = dataclasses.field(default_factory=dict)
    truth: PIAPipeline | None = None


def _freeu(_: Path) -> Case:
    pipe = build()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    return Case(pipe)


def _ip_adapter(folder: Path) -> Case:
    return Case(adapted(folder).pipe, changed={"ip_adapter_scale": 0.6, "ip_adapter_image": picture(9)})


def _lora(folder: Path) -> Case:
    return Case(stock_with((write_lora(folder / "style.safetensors", "peft", rank=1), 0.8)))


def _words(_: Path) -> Case:
    pipe = build()
    pipe.load_textual_inversion({"hat": torch.randn(1, 16)}, token="hat")  # noqa: S106 - a word
    pipe.text_encoder.eval().requires_grad_(requires_grad=False)
    return Case(pipe)


def _original(_: Path) -> Case:
    truth = build().to(torch.float64)
    hook(truth.unet)
    return Case(build(), {"arithmetic": "original"}, truth=truth)


def _speed(_: Path) -> Case:  # the whole network runs at steps 0, 2, 4 and 5
    return Case(build(), {"speed": "fast"}, {"num_inference_steps": 10, "strength": 0.6})


def _free_init(_: Path) -> Case:
    return Case(build(), changed={"free_init_iters": 2, "free_init_temporal_stop": 0.4})


@pytest.mark.long
@pytest.mark.parametrize(
    "case", [_freeu, _ip_adapter, _lora, _words, _original, _speed, _free_init], ids=lambda case: case.__name__[1:]
)
def test_a_long_clip_and_one_whose_prompt_changes_equal_brute_force_with(case: Callable[[Path], Case], tmp_path: Path):
    torch.manual_seed(0)
    made = case(tmp_path)
    pipe = made.pipe.to(torch.float64)
    pipe.unet.eval()
    rows = [dataclasses.replace(row, **made.changed) for row in (LONG, TRAVELLING)]

    clips = PiaEngine.from_pipeline(copy.deepcopy(pipe), **made.options).animate(rows, keep_latents=True)

    speed, truth = made.options.get("speed", "exact"), made.truth or pipe
    assert_same(clips[0], by_brute_force(truth, rows[0], None, speed), tolerance=1e-9)
    assert_same(clips[1], by_brute_force(truth, _plain(rows[1]), _texts(truth, rows[1]), speed), tolerance=1e-9)
    bare, row = (pipe, rows[1]) if made.options else (build().to(torch.float64), TRAVELLING)
    without = PiaEngine.from_pipeline(bare).animate([row], keep_latents=True)[0]
    assert float((without.latents - clips[1].latents).abs().max()) > 1e-3, "the feature does nothing"


@torch.no_grad()
def _texts(pipe: PIAPipeline, row: Shot) -> tuple[torch.Tensor, torch.Tensor]:
    positive = embeddings(pipe, row, list(row.prompt_keys), row.clip_skip)
    return positive, embeddings(pipe, row, list(row.negative_keys), None)


def _plain(row: Shot) -> Shot:
    return dataclasses.replace(row, prompt="", prompts=None, negative_prompts=None)
