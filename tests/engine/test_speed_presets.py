"""Presets of speed: which evaluations leave something out, what that is, and that a row's clip stays its own.

What an evaluation of the outermost layers must be is told by diffusers' own network, run whole, with the features of
another evaluation put in the place of its deep part's. Compared in float64, where rounding hides nothing.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import ip_adapters
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, MotionAdapter, PIAPipeline, UNet2DConditionModel, UNetMotionModel
from hypothesis import given
from hypothesis import strategies as st
from pipelines import Counting, build, picture, shot
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pia_batch.config import ModelConfig, SchedulerConfig, speed_presets
from pia_batch.config.speed_presets import EXACT, OUTERMOST_SHARE, PRESETS, SpeedPreset, work_share
from pia_batch.engine import Clip, PiaEngine, Shot, compiling, loading, unet
from pia_batch.engine.loading import build_scheduler
from pia_batch.weights import sd15
from pia_batch.weights.identity import engine_id
from pia_batch.weights.resolve import resolve

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FRAMES = 3
LOSSY = [speed for speed in PRESETS if speed != "exact"]


@st.composite
def schedules(draw: st.DrawFn) -> list[float]:
    """As Heun's: falling, some of them asked for twice."""
    times = draw(st.lists(st.floats(0, 1000), min_size=1, max_size=40))
    return sorted(times + draw(st.lists(st.sampled_from(times), max_size=20)), reverse=True)


@given(schedules(), st.floats(0, 1), st.sampled_from([1, 2]))
def test_no_feature_is_older_than_its_reach_and_both_ends_are_whole(times, reach, layers):
    whole = speed_presets.whole_evaluations(SpeedPreset(reach, layers), times, 1000)

    assert len(whole) == len(times)
    assert whole[0]
    assert whole[-1]
    made = times[0]
    for time, is_whole in zip(times, whole, strict=True):
        made = time if is_whole else made
        assert made - time <= reach * 1000


@given(schedules())
def test_exact_leaves_out_nothing(times):
    assert all(speed_presets.whole_evaluations(EXACT, times, 1000))


@pytest.mark.parametrize(
    ("speed", "steps", "whole"),
    [
        ("balanced", 25, [*range(0, 25, 2)]),
        ("balanced", 20, [*range(0, 20, 2), 19]),
        ("balanced", 50, [*range(0, 50, 3), 49]),
        ("balanced", 10, [*range(10)]),
        ("fast", 25, [*range(0, 25, 4)]),
        ("fast", 50, [*range(0, 50, 7)]),
        ("fast", 10, [0, 2, 4, 6, 8, 9]),
        ("fast", 7, [*range(7)]),
        ("fast", 1, [0]),
    ],
)
def test_the_whole_network_runs_at_these_steps(speed, steps, whole):
    scheduler = DDIMScheduler(steps_offset=1)
    scheduler.set_timesteps(steps)

    found = speed_presets.whole_evaluations(PRESETS[speed], [float(time) for time in scheduler.timesteps], 1000)

    assert [index for index, each in enumerate(found) if each] == whole


def test_a_second_order_step_reuses_what_its_first_half_made() -> None:
    times = [float(time) for time in (900, 860, 860, 820, 820, 780)]

    assert speed_presets.whole_evaluations(PRESETS["balanced"], times, 1000) == [True, False, False, True, False, True]


def test_the_presets_save_what_the_documentation_promises() -> None:
    assert work_share("exact", 25) == 1
    assert 1 / work_share("balanced", 25) == pytest.approx(1.62, abs=0.01)
    assert 1 / work_share("fast", 25) == pytest.approx(2.99, abs=0.01)
    assert work_share("fast", 4) == 1


def full_network() -> Any:
    with torch.device("meta"):
        plain = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(sd15.PATH / "unet"))
        adapter = MotionAdapter.from_config(MotionAdapter.load_config(sd15.PATH / "motion_adapter"))
        return UNetMotionModel.from_unet2d(plain, adapter, load_weights=False).eval()


@torch.no_grad()
def test_the_shares_are_those_of_the_operations_of_stable_diffusion() -> None:
    network, frames = full_network(), 16
    texts = [torch.zeros(1, 77, 768, device="meta") for _ in range(2)]
    sample, time = torch.zeros(1, frames, 64, 64, 9, device="meta"), torch.zeros(1, device="meta")
    conditions = unet.prepare(network, [0, 0], 1, texts)

    def operations(layers: int, deep: torch.Tensor | None = None) -> tuple[int, torch.Tensor]:
        with FlopCounterMode(display=False) as counter:
            if deep is None:
                deep = unet.run_and_keep(network, sample, time, conditions, layers)[1]
            else:
                unet.run_outermost(network, sample, time, conditions, layers, deep)
        return counter.get_total_flops(), deep

    for layers, share in OUTERMOST_SHARE.items():
        whole, deep = operations(layers)
        assert operations(layers, deep)[0] / whole == pytest.approx(share, abs=1e-4)


@pytest.fixture(scope="module")
def precise() -> PIAPipeline:
    return build().to(torch.float64)


def conditioned(seed: int, size: tuple[int, int] = (8, 8)) -> dict[str, torch.Tensor]:
    """What two rows see, the first of which is guided."""
    random = torch.Generator().manual_seed(seed)
    sample = torch.randn(2, FRAMES, *size, 9, generator=random, dtype=torch.float64)
    return {"sample": sample, "timesteps": torch.tensor([700 - seed, 31 + seed])}


def texts() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(9)
    return [torch.randn(1, 20, 16, generator=random, dtype=torch.float64) for _ in range(3)]


def stock_outermost(network: Any, layers: int, made_of: dict[str, Any], asked: dict[str, Any]) -> torch.Tensor:
    """diffusers' own network asked twice, the second time with the first one's features before its last layers."""
    block = network.up_blocks[-1]
    layer = block.resnets[len(block.resnets) - layers]
    features: list[torch.Tensor] = []

    def keep(_: Any, __: Any, named: dict[str, Any]) -> None:
        features.append(named["input_tensor"])

    def replace(_: Any, __: Any, named: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        skipped = network.conv_in.out_channels
        states = torch.cat([features[0][:, :-skipped], named["input_tensor"][:, -skipped:]], dim=1)
        return (), named | {"input_tensor": states}

    def call(sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        rows = [0, 0, 1]
        states = torch.cat(texts()).repeat_interleave(FRAMES, dim=0)
        noise: torch.Tensor = network(sample.movedim(-1, 1)[rows], timesteps[rows], encoder_hidden_states=states).sample
        return noise

    for hook, inputs in ((keep, made_of), (replace, asked)):
        handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
        noise = call(**inputs)
        handle.remove()
    return noise


@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
@pytest.mark.parametrize("freeu", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_the_outermost_layers_draw_over_features_of_another_step(precise, layers, freeu, size):
    network = copy.deepcopy(precise.unet)
    if freeu:
        network.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    made_of, asked = conditioned(0, size), conditioned(1, size)
    conditions = unet.prepare(network, [0, 0, 1], 2, texts())

    deep = unet.run_and_keep(network, **made_of, conditions=conditions, layers=layers)[1]
    drawn = unet.run_outermost(network, **asked, conditions=conditions, layers=layers, deep=deep)

    assert float((drawn - stock_outermost(network, layers, made_of, asked)).abs().max()) <= 1e-11
    assert float((drawn - unet.run(network, **asked, conditions=conditions)).abs().max()) > 1e-4


@pytest.mark.parametrize("layers", [1, 2, 3, 9])
@torch.no_grad()
def test_features_of_the_same_step_change_nothing(precise, layers):
    asked = conditioned(0)
    conditions = unet.prepare(precise.unet, [0, 0, 1], 2, texts())

    whole, deep = unet.run_and_keep(precise.unet, **asked, conditions=conditions, layers=layers)

    assert torch.equal(whole, unet.run(precise.unet, **asked, conditions=conditions))
    assert torch.equal(
        whole, unet.run_outermost(precise.unet, **asked, conditions=conditions, layers=layers, deep=deep)
    )


class Noting(nn.Module):
    """A layer that records the number of samples of each call."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.asked: list[int] = []
        self.eval()

    def forward(self, states: torch.Tensor) -> Any:
        self.asked.append(len(states) // FRAMES)
        return self.layer(states)


def watched(pipe: PIAPipeline, speed: speed_presets.Speed) -> tuple[PiaEngine, list[int], list[int]]:
    """An engine, and of the calls of its network's deep part, and of all of it, how many samples each has."""
    own = copy.deepcopy(pipe)
    inner, outer = Noting(own.unet.mid_block.resnets[0].conv1), Noting(own.unet.conv_out)
    own.unet.mid_block.resnets[0].conv1, own.unet.conv_out = inner, outer
    return PiaEngine.from_pipeline(own, speed), inner.asked, outer.asked


@pytest.mark.parametrize(("speed", "whole"), [("exact", 25), ("balanced", 13), ("fast", 7)])
def test_the_deep_part_runs_as_seldom_as_the_preset_says(precise, speed, whole):
    engine, inner, outer = watched(precise, speed)

    engine.animate([shot(1, num_inference_steps=25), shot(2, num_inference_steps=25, guidance_scale=1.0)])

    assert outer == [3] * 25
    assert inner == [3] * whole


def test_every_pass_of_free_init_begins_with_the_whole_network(precise):
    engine, inner, outer = watched(precise, "fast")

    engine.animate([shot(1, num_inference_steps=10, free_init_iters=2)])

    assert (len(inner), len(outer)) == (2 * 6, 20)


MIXED = [
    shot(1, num_inference_steps=12, num_frames=2),
    shot(2, num_inference_steps=19, num_frames=2, guidance_scale=1.0, strength=0.5),
    shot(3, num_inference_steps=20, num_frames=2, guidance_scale=3.0, strength=0.6),
    shot(4, num_inference_steps=9, num_frames=2, free_init_iters=2, free_init_fast=True),
    shot(5, num_inference_steps=3, num_frames=2),
]
"""Schedules that take their shortcuts at different steps, begin late, begin again, or take none."""


def distance(one: Clip, other: Clip) -> float:
    assert one.latents is not None
    assert other.latents is not None
    return float((one.latents - other.latents).abs().max())


def assert_rows_are_their_own(pipe: PIAPipeline, speed: speed_presets.Speed, rows: list[Shot]) -> None:
    """Each row alone equals its row of the batch, and differs from the exact one where the preset says so."""
    engine = PiaEngine.from_pipeline(pipe, speed)
    alone = [engine.animate([row], keep_latents=True)[0] for row in rows]
    together = engine.animate(rows[::-1], keep_latents=True)[::-1]
    exact = PiaEngine.from_pipeline(pipe).animate(rows, keep_latents=True)

    for row, clip, other, whole in zip(rows, alone, together, exact, strict=True):
        assert distance(clip, other) <= 1e-11
        assert (distance(clip, whole) > 1e-6) is (work_share(speed, row.num_inference_steps) < 1)


@pytest.mark.parametrize(
    ("speed", "name"),
    [("balanced", "dpmpp_2m"), ("fast", "ddim"), pytest.param("fast", "heun", marks=pytest.mark.slow)],
)
def test_a_row_does_not_depend_on_its_neighbours(precise, speed, name):
    own = copy.copy(precise)
    own.scheduler = build_scheduler(SchedulerConfig(name=name), precise.scheduler)

    assert_rows_are_their_own(own, speed, MIXED)


@pytest.mark.slow
def test_rows_with_image_prompts_do_not_depend_on_their_neighbours(tmp_path: Path) -> None:
    pipe = build()
    ip_adapters.load(pipe, ip_adapters.write(tmp_path))
    pipe.unet.eval()
    rows = [
        shot(1, num_inference_steps=12, num_frames=2, ip_adapter_scale=0.5),
        shot(2, num_inference_steps=16, num_frames=2, ip_adapter_image=picture(9), guidance_scale=1.0, strength=0.5),
        shot(3, num_inference_steps=12, num_frames=2, ip_adapter_image=picture(8), strength=0.5),
    ]

    assert_rows_are_their_own(pipe.to(torch.float64), "fast", rows)


@pytest.mark.long
def test_a_preset_can_be_compiled() -> None:
    pipe, compiler = build(), compiling.Compiler("eager", usual_calls=0)
    row = shot(1, num_inference_steps=8, num_frames=2)

    own = PiaEngine.from_pipeline(pipe, "fast").animate([row], keep_latents=True)[0]
    compiled = PiaEngine.from_pipeline(pipe, "fast", compiler).animate([row], keep_latents=True)[0]

    assert distance(own, compiled) <= 1e-5
    assert compiler.num_graphs() >= 2


@pytest.mark.parametrize("speed", LOSSY)
def test_few_steps_are_drawn_exactly(speed):
    pipe, row = build(), shot(1, num_inference_steps=4)

    lossy, exact = (PiaEngine.from_pipeline(pipe, each).animate([row])[0] for each in (speed, "exact"))

    assert np.array_equal(lossy.frames, exact.frames)


def test_a_network_that_nobody_has_laid_out_is_run_whole() -> None:
    pipe, row = build(), shot(1, num_inference_steps=12)
    pipe.unet = Counting(pipe.unet)

    lossy, exact = (PiaEngine.from_pipeline(pipe, each).animate([row])[0] for each in ("fast", "exact"))

    assert np.array_equal(lossy.frames, exact.frames)
    assert pipe.unet.calls == 24


def test_a_preset_is_part_of_the_identity_of_what_it_draws() -> None:
    found = resolve(ModelConfig())
    loaded = [engine_id(ModelConfig(speed=speed), found, "float32") for speed in PRESETS]
    adopted = [PiaEngine.from_pipeline(build(), speed).engine_id for speed in PRESETS]

    assert loaded[0] == engine_id(ModelConfig(), found, "float32")
    assert adopted[0] == loading.adopted_id(loading.adopt(build()))
    assert all(one != other for ids in (loaded, adopted) for one, other in itertools.combinations(ids, 2))


def test_the_embedded_model_under_a_preset_passes_the_check_of_its_device() -> None:
    PiaEngine.load(ModelConfig(speed="fast"), "cpu").check()
