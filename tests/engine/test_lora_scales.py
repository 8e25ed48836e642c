"""`lora_scales` per row, against the stock pipeline with `set_adapters` for each row."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PIAPipeline
from lora_files import stock_with, write_lora
from pipelines import Truth, assert_same, build, save, shot, single_call
from torch.utils.flop_counter import FlopCounterMode
from travelling import truth_of, worst

from pia_batch.config import LoraConfig, ModelConfig, SchedulerConfig
from pia_batch.engine import PiaEngine, Shot, lora_scales
from pia_batch.engine.compiling import Compiler
from pia_batch.errors import UnsupportedSettingError

CONFIGURED = {"style": 1.0, "zoom": 0.7}

ROUNDING = 3e-5
"""A LoRA of every layer at scale 2 makes rounding larger than elsewhere; how much depends on the processor."""

ROWS = [
    shot(1, lora_scales=(("style", 0.25), ("zoom", 0.0))),
    shot(2),
    shot(3, lora_scales=(("zoom", -1.5),), guidance_scale=1.0, num_inference_steps=5),
    shot(4, lora_scales=(("style", 2.0),), strength=0.5, num_inference_steps=6, clip_skip=1),
    shot(5, lora_scales=(("style", 0.25), ("zoom", 0.0)), negative_prompt="green"),
    shot(6, num_frames=15, lora_scales=(("style", 0.0),), context_length=6, context_overlap=2),
]


def everything(name: str) -> bool:
    return "motion_modules" not in name


def moving(name: str) -> bool:
    return "motion_modules" in name and name.endswith(("to_q", "to_k", "to_v", "to_out.0"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA of every layer but those of motion, the text encoder's too, and one of the motion modules."""
    folder = tmp_path_factory.mktemp("loras")
    save(build(), folder / "base")
    return {
        "base": folder / "base",
        "style": write_lora(folder / "style.safetensors", "kohya", unet=everything, alpha=lambda _: 1.0),
        "zoom": write_lora(folder / "zoom.safetensors", "peft", unet=moving, text=lambda _: False, seed=7),
    }


def model(files: dict[str, Path], **settings: Any) -> ModelConfig:
    loras = tuple(LoraConfig(source=str(files[name]), scale=scale) for name, scale in CONFIGURED.items())
    return ModelConfig(base=str(files["base"]), scheduler=SchedulerConfig(name="checkpoint"), loras=loras, **settings)


def truth(pipe: PIAPipeline, row: Shot) -> Truth:
    scales = CONFIGURED | dict(row.lora_scales or ())
    pipe.set_adapters(["stock0", "stock1"], list(scales.values()))
    return single_call(pipe, dataclasses.replace(row, lora_scales=None))


@pytest.mark.long
def test_rows_that_differ_share_a_batch_and_each_equals_set_adapters(files):
    pipe = stock_with(*((files[name], scale) for name, scale in CONFIGURED.items()))
    engine = PiaEngine.load(model(files), "cpu")
    short = ROWS[:5]

    clips = engine.animate(ROWS, keep_latents=True)

    for row, clip in zip(short, clips, strict=False):
        assert_same(clip, truth(pipe, row), ROUNDING)
    alone = engine.animate(ROWS[5:], keep_latents=True)[0]
    assert torch.allclose(alone.latents, clips[5].latents, rtol=0, atol=ROUNDING)
    # The scales of the config are back.
    assert_same(engine.animate([ROWS[1]], keep_latents=True)[0], truth(pipe, ROWS[1]), ROUNDING)


TRAVELS = [
    shot(1, prompt=None, prompts={0: "a", 2: "b", 4: "a"}, num_frames=6, lora_scales=(("style", 0.25), ("zoom", -1.0))),
    shot(2, prompt=None, prompts={0: "a", 2: "b", 4: "a"}, num_frames=6),
    shot(3, num_frames=6, lora_scales=(("style", 2.0),), guidance_scale=1.0),
    shot(4, num_frames=6, negative_prompts={0: "a", 5: "b"}, lora_scales=(("style", 0.5),), num_inference_steps=2),
]
"""The first two have the same texts, which a LoRA of the text encoder and of `to_k` makes different ones."""


@pytest.mark.long
def test_prompts_that_change_take_scales_too(files):
    pipe = stock_with(*((files[name], scale) for name, scale in CONFIGURED.items()))
    engine = PiaEngine.load(model(files), "cpu")

    clips = engine.animate(TRAVELS, keep_latents=True)
    windows = [dataclasses.replace(row, num_frames=15, context_length=6, context_overlap=2) for row in TRAVELS[:2]]
    together = engine.animate(windows, keep_latents=True)

    for row, clip in zip(TRAVELS, clips, strict=True):
        pipe.set_adapters(["stock0", "stock1"], list((CONFIGURED | dict(row.lora_scales or ())).values()))
        assert worst(clip, truth_of(pipe, dataclasses.replace(row, lora_scales=None))) <= 3e-5
    for row, clip in zip(windows, together, strict=True):
        alone = engine.animate([row], keep_latents=True)[0]
        assert torch.allclose(alone.latents, clip.latents, rtol=0, atol=ROUNDING)


@pytest.mark.long
@pytest.mark.parametrize("speed", ["balanced", "fast"])
def test_with_presets_of_speed_a_row_is_the_same_alone(files, speed):
    engine = PiaEngine.load(model(files, speed=speed), "cpu")
    rows = [dataclasses.replace(row, num_inference_steps=12, strength=1.0) for row in ROWS[:3]]
    together = engine.animate(rows, keep_latents=True)

    for row, clip in zip(rows, together, strict=True):
        assert torch.allclose(engine.animate([row], keep_latents=True)[0].latents, clip.latents, rtol=0, atol=1e-4)


def test_the_originals_arithmetic_takes_scales_too(files):
    engine = PiaEngine.load(model(files, arithmetic="original"), "cpu")
    fixed = dict.fromkeys(CONFIGURED, 0.3)
    loras = tuple(LoraConfig(source=str(files[name]), scale=scale) for name, scale in fixed.items())
    other = PiaEngine.load(model(files, arithmetic="original").model_copy(update={"loras": loras}), "cpu")

    clip = engine.animate([shot(1, lora_scales=tuple(fixed.items())), shot(2)], keep_latents=True)[0]

    assert torch.allclose(other.animate([shot(1)], keep_latents=True)[0].latents, clip.latents, rtol=0, atol=ROUNDING)


def test_rows_without_scales_pay_nothing(files):
    """The same operations as before, and no layer's scale is touched."""
    engine = PiaEngine.load(model(files), "cpu")
    network = engine._parts.unet
    before = [dict(layer.scaling) for _, layer, _, _ in lora_scales._adapters(network)]
    engine.animate([shot(1)])  # caches the prompt and the image
    counts = []
    for scales in (None, tuple(CONFIGURED.items())):  # the config's own scales, named
        with FlopCounterMode(display=False) as counter:
            engine.animate([shot(1, lora_scales=scales)])
        counts.append(counter.get_total_flops())

    assert counts[0] == counts[1]
    assert [dict(layer.scaling) for _, layer, _, _ in lora_scales._adapters(network)] == before


@pytest.mark.long
def test_a_graph_serves_any_scales(files):
    """A LoRA of the motion modules alone: a graph of one in every layer takes a minute to trace."""
    one = LoraConfig(source=str(files["zoom"]), scale=0.7)
    engine = PiaEngine.load(model(files).model_copy(update={"loras": (one,)}), "cpu")
    compiler = Compiler("eager", usual_calls=0)
    compiled = PiaEngine(dataclasses.replace(engine._parts, call=compiler), lambda: "compiled")

    for row in (shot(1, lora_scales=(("zoom", 0.25),)), shot(1), shot(1, lora_scales=(("zoom", -2.0),))):
        clip, plain = (each.animate([row], keep_latents=True)[0] for each in (compiled, engine))
        assert torch.allclose(clip.latents, plain.latents, rtol=0, atol=ROUNDING)
    assert compiler.failures == {}
    assert sum(1 for _ in compiler._graphs[next(iter(compiler._graphs))]) == 2  # with scales of samples, and without


@pytest.mark.parametrize(
    ("scales", "settings", "message"),
    [
        ({"pan": 1.0}, {}, "'pan' is not the name of one LoRA of this model, which has style, zoom"),
        ({"zoom": 11.0}, {}, "allowed: scales from -10 to 10"),
        ({"zoom": 0.5}, {"fuse_loras": True}, "'zoom' is merged into the weights"),
    ],
)
def test_what_cannot_be_scaled_fails_its_row_alone(files, scales, settings, message):
    engine = PiaEngine.load(model(files, **settings), "cpu")
    clips = engine.animate([shot(1, lora_scales=scales), shot(2)])

    assert isinstance(clips[0].error, UnsupportedSettingError)
    assert message in str(clips[0].error)
    assert clips[1].error is None
