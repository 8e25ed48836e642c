"""FreeInit and the schedulers, row by row against single calls of `diffusers.PIAPipeline`."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import PIAPipeline
from diffusers.pipelines.free_init_utils import FreeInitMixin
from hypothesis import given
from hypothesis import strategies as st
from pipelines import Truth, assert_same, build, shot, single_call, stock_engine
from schedulers import SCHEDULERS, scheduled

from pia_batch.config import FREE_INIT_METHODS
from pia_batch.engine import PiaEngine, Shot, loading, sampling
from pia_batch.engine.free_init import low_pass
from pia_batch.errors import ConfigError, UnsupportedSettingError

# diffusers' sigma schedulers hand numpy a tensor in a way that numpy 2 wants changed.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


PASSES = [
    shot(1, guidance_scale=3.0, num_inference_steps=3),
    shot(2, guidance_scale=1.0, num_inference_steps=2, free_init_iters=3),
    shot(
        3, guidance_scale=2.0, num_inference_steps=5, free_init_iters=2, free_init_fast=True, free_init_method="ideal"
    ),
    shot(4, guidance_scale=3.0, num_inference_steps=3, free_init_iters=1, motion_scale=7),
    shot(5, guidance_scale=3.0, num_inference_steps=6, strength=0.5, eta=0.6),
    shot(
        6,
        guidance_scale=2.5,
        num_inference_steps=3,
        free_init_iters=2,
        free_init_method="ideal",
        free_init_spatial_stop=0.6,
        free_init_temporal_stop=0.4,
        eta=1.0,
    ),
]
"""Rows whose passes differ in number, length and filter, together with rows without FreeInit."""


@pytest.fixture(scope="module")
def pipe() -> PIAPipeline:
    return build()


@pytest.fixture(scope="module")
def exact() -> PIAPipeline:
    """The same pipeline in float64, where rounding cannot hide the effects of a batch."""
    return build().to(torch.float64)


@pytest.fixture(scope="module")
def truths(pipe: PIAPipeline) -> list[Truth]:
    return [single_call(pipe, row) for row in PASSES]


class CountingUnet:
    """A UNet that records the number of samples of each call."""

    def __init__(self, unet: Any) -> None:
        self._unet = unet
        self.asked: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)

    def __call__(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.asked.append(len(sample))
        return self._unet(sample, *args, **kwargs)


def counting(pipe: PIAPipeline) -> tuple[PiaEngine, CountingUnet]:
    parts = loading.adopt(pipe)
    unet = CountingUnet(parts.unet)
    return PiaEngine(dataclasses.replace(parts, unet=unet), lambda: "counted"), unet


@pytest.mark.long
@pytest.mark.parametrize(("name", "settings"), SCHEDULERS, ids=str)
def test_a_row_alone_equals_its_single_call_to_the_last_bit_with_any_scheduler_and_passes(pipe, name, settings):
    own = scheduled(pipe, name, **settings)
    engine = stock_engine(own)

    for row in PASSES:
        assert_same(engine.animate([row], keep_latents=True)[0], single_call(own, row), tolerance=0.0)


@pytest.mark.long
@pytest.mark.parametrize(("name", "settings"), SCHEDULERS, ids=str)
def test_rows_at_different_passes_equal_their_single_calls_in_any_order(exact, name, settings):
    own = scheduled(exact, name, **settings)
    engine = PiaEngine.from_pipeline(own)

    together = engine.animate(PASSES, keep_latents=True)
    swapped = engine.animate(PASSES[::-1], keep_latents=True)[::-1]

    for row, one, other in zip(PASSES, together, swapped, strict=True):
        truth = single_call(own, row)
        assert_same(one, truth, tolerance=1e-10)
        assert_same(other, truth, tolerance=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ddim", "unipc"])
def test_half_precision_mixes_frequencies_in_full_precision_as_the_single_call_does(dtype, name):
    own = scheduled(build().to(dtype), name)
    engine = PiaEngine.from_pipeline(own)

    for row in PASSES[1:3]:
        assert_same(engine.animate([row], keep_latents=True)[0], single_call(own, row), tolerance=0.0)


@pytest.mark.long
@pytest.mark.parametrize(
    "setting",
    [
        {"free_init_method": method, "free_init_spatial_stop": spatial, "free_init_temporal_stop": temporal}
        for method in FREE_INIT_METHODS
        for spatial, temporal in [(0.25, 0.25), (1.0, 1.0), (0.0, 0.5), (0.5, 0.0), (0.1, 0.9)]
    ]
    + [{"free_init_order": order} for order in (1, 32)]
    + [{"free_init_fast": True, "num_inference_steps": 7}, {"num_frames": 1}, {"num_frames": 4, "width": 24}],
    ids=str,
)
def test_each_setting_of_free_init_alone_equals_its_single_call_beside_an_ordinary_row(pipe, truths, setting):
    row = shot(**({"seed": 7, "num_inference_steps": 2, "free_init_iters": 2, "guidance_scale": 3.0} | setting))

    clip, other = PiaEngine.from_pipeline(pipe).animate([row, PASSES[0]], keep_latents=True)

    assert_same(clip, single_call(pipe, row))
    assert_same(other, truths[0])


def test_rows_at_different_passes_share_their_unet_calls(pipe):
    engine, unet = counting(pipe)

    engine.animate(
        [
            shot(1, num_inference_steps=2, free_init_iters=3),
            shot(2, num_inference_steps=4, free_init_iters=2, free_init_fast=True, guidance_scale=1.0),
            shot(3, num_inference_steps=1),
        ]
    )

    assert unet.asked == [5, 3, 3, 3, 3, 3]


def test_every_pass_counts_in_the_share_of_the_time(pipe):
    engine = PiaEngine.from_pipeline(scheduled(pipe, "heun"))

    plain, twice, fast, alone = engine.animate(
        [
            shot(1, num_inference_steps=4, guidance_scale=1.0),
            shot(2, num_inference_steps=4, free_init_iters=2, guidance_scale=1.0),
            shot(3, num_inference_steps=4, free_init_iters=2, free_init_fast=True),
            shot(4, num_inference_steps=1, guidance_scale=1.0),
        ]
    )

    assert twice.device_seconds == pytest.approx(2 * plain.device_seconds)
    assert fast.device_seconds == pytest.approx(2 * (3 + 7) / 7 * plain.device_seconds)
    assert alone.device_seconds == pytest.approx(plain.device_seconds / 7)  # Heun's n steps are 2n - 1 calls


@pytest.mark.parametrize("name", ["ddim", "unipc"])
def test_a_row_whose_image_is_nan_leaves_its_neighbours_as_they_are(exact, name):
    own = scheduled(exact, name)
    engine = PiaEngine.from_pipeline(own)
    rows = [started(engine, row) for row in PASSES]
    broken = started(engine, shot(9, num_inference_steps=6, free_init_iters=2), nan=True)

    sampling.denoise(engine._parts.unet, [*rows[:3], broken, *rows[3:]])

    assert broken.latents.isnan().all()
    for row, settings in zip(rows, PASSES, strict=True):
        assert float((row.latents[0] - single_call(own, settings).latents).abs().max()) <= 1e-10


def started(engine: PiaEngine, row: Shot, *, nan: bool = False) -> sampling.Row:
    posterior = engine._images.encode(row.image)
    if nan:
        posterior = dataclasses.replace(posterior, mean=torch.full_like(posterior.mean, torch.nan))
    negative = engine._prompts.encode(row.negative_prompt) if row.guided else None
    return sampling.start(row, engine._parts, posterior, engine._prompts.encode(row.prompt), negative, None)


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12)),
    method=st.sampled_from(FREE_INIT_METHODS),
    order=st.integers(1, 8),
    spatial=st.just(0.0) | st.floats(0.01, 1),
    temporal=st.just(0.0) | st.floats(0.01, 1),
)
def test_the_filter_is_the_pipelines(shape, method, order, spatial, temporal):
    stock = FreeInitMixin()._get_free_init_freq_filter((1, 4, *shape), "cpu", method, order, spatial, temporal)

    own = low_pass(shape, method, order, spatial, temporal)

    assert torch.equal(torch.fft.fftshift(own), stock[0, 0])


@given(
    st.sampled_from(FREE_INIT_METHODS),
    st.integers(1, 32),
    st.floats(1e-6, 1),
    st.floats(1e-6, 1),
)
def test_a_filter_keeps_the_average_whole_and_no_frequency_more_than_whole(method, order, spatial, temporal):
    kept = low_pass((4, 6, 8), method, order, spatial, temporal)

    assert kept[0, 0, 0] == 1
    assert ((kept >= 0) & (kept <= 1)).all()


def test_a_filter_is_made_once_and_not_too_many_are_kept():
    low_pass.cache_clear()

    first = low_pass((2, 3, 4), "ideal", 4, 0.5, 0.5)
    for order in range(1, 33):
        low_pass((1, 2, 2), "butterworth", order, 0.5, 0.5)

    assert low_pass((1, 2, 2), "butterworth", 32, 0.5, 0.5) is low_pass((1, 2, 2), "butterworth", 32, 0.5, 0.5)
    assert low_pass((2, 3, 4), "ideal", 4, 0.5, 0.5) is not first
    assert low_pass.cache_info().currsize <= 32


class StepCounter(FreeInitMixin):
    """The pipeline's FreeInit with a scheduler that only records the number of steps of each pass."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.scheduler = SimpleNamespace(
            config=SimpleNamespace(num_train_timesteps=1000),
            add_noise=lambda original_samples, **_: original_samples,
            set_timesteps=lambda steps, **_: self.asked.append(steps),
            timesteps=(),
        )


@given(steps=st.integers(1, 1000), iters=st.integers(1, 10), fast=st.booleans())
def test_passes_take_as_many_steps_as_the_pipelines(steps, iters, fast):
    stock = StepCounter()
    stock.enable_free_init(num_iters=iters, use_fast_sampling=fast)
    for index in range(iters):
        stock._apply_free_init(torch.zeros(1, 1, 1, 1, 1), index, steps, "cpu", torch.float32, None)

    row = shot(num_inference_steps=steps, free_init_iters=iters, free_init_fast=fast)

    assert list(row.pass_steps) == stock.asked


def test_without_free_init_there_is_one_pass_of_the_steps_that_strength_leaves():
    assert shot(num_inference_steps=10, strength=0.35, free_init_fast=True).pass_steps == (3,)


@pytest.mark.long
@pytest.mark.parametrize("name", ["pndm", "lms", "euler", "euler_ancestral", "heun", "dpmpp_2m", "unipc", "lcm"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_free_init_is_refused_where_a_single_call_fails_and_nowhere_else(pipe, name, spacing):
    own = scheduled(pipe, name, timestep_spacing=spacing)
    engine, unet = counting(own)
    small: dict[str, Any] = {"width": 8, "height": 8, "num_frames": 1, "guidance_scale": 1.0}
    for steps, iters, fast in [(1, 1, False), (1, 2, False), (2, 1, False), (5, 2, False), (5, 3, True), (8, 2, True)]:
        row = shot(num_inference_steps=steps, free_init_iters=iters, free_init_fast=fast, **small)
        unet.asked.clear()
        clip = engine.animate([row], keep_latents=True)[0]
        try:
            truth = single_call(own, row)
        except (IndexError, ValueError):
            assert isinstance(clip.error, UnsupportedSettingError)
            assert unet.asked == []  # found before any work
        else:
            assert_same(clip, truth, tolerance=0.0)


@pytest.mark.parametrize(
    ("name", "spacing", "setting", "message"),
    [
        (
            "euler",
            "leading",
            {"num_inference_steps": 4},
            "4-step schedule of EulerDiscreteScheduler does not visit timestep 999, .* timestep_spacing to trailing",
        ),
        (
            "heun",
            "linspace",
            {"num_inference_steps": 3, "free_init_fast": True},
            "1-step schedule of HeunDisc.* trailing .*, or raise num_inference_steps or clear free_init_fast$",
        ),
        (
            "lms",
            "linspace",
            {"num_inference_steps": 1},
            "1-step schedule of LMSDiscreteScheduler .* trailing .*, or raise num_inference_steps$",
        ),
        (
            "pndm",
            "leading",
            {"num_inference_steps": 7, "free_init_fast": True},
            "shortens num_inference_steps 7 to 3 .* no 3-step schedule .*; change .* or clear free_init_fast$",
        ),
    ],
)
def test_a_pass_that_the_scheduler_cannot_take_fails_its_row_alone_with_the_remedy(
    pipe, name, spacing, setting, message
):
    own = scheduled(pipe, name, timestep_spacing=spacing)

    rows = [shot(1, free_init_iters=2, **setting), shot(2, num_inference_steps=4, guidance_scale=2.0)]
    bad, good = PiaEngine.from_pipeline(own).animate(rows, keep_latents=True)

    with pytest.raises(UnsupportedSettingError, match=message):
        _ = bad.frames
    assert_same(good, single_call(own, rows[1]))


@pytest.mark.long
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize(
    ("steps", "strength"), [(1, 1.0), (2, 1.0), (3, 1.0), (2, 0.5), (5, 0.5), (6, 0.5), (7, 0.9), (4, 0.25)]
)
def test_heun_equals_single_calls_at_odd_and_even_steps_from_any_start(pipe, exact, guidance_scale, steps, strength):
    row = shot(3, num_inference_steps=steps, strength=strength, guidance_scale=guidance_scale)
    own, precise = scheduled(pipe, "heun"), scheduled(exact, "heun")

    alone = stock_engine(own).animate([row], keep_latents=True)[0]
    beside = PiaEngine.from_pipeline(precise).animate([row, PASSES[0]], keep_latents=True)[0]

    assert_same(alone, single_call(own, row), tolerance=0.0)
    assert_same(beside, single_call(precise, row), tolerance=1e-10)


def test_lcm_has_no_more_steps_than_it_was_distilled_for(exact):
    own = scheduled(exact, "lcm", original_inference_steps=4)
    rows = [shot(steps, num_inference_steps=steps, guidance_scale=2.0) for steps in (4, 5, 3)]

    four, five, three = PiaEngine.from_pipeline(own).animate(rows, keep_latents=True)

    assert_same(four, single_call(own, rows[0]), tolerance=1e-10)
    assert_same(three, single_call(own, rows[2]), tolerance=1e-10)
    message = "num_inference_steps 5: LCMScheduler supports at most 4 steps; .* or raise original_inference_steps"
    with pytest.raises(UnsupportedSettingError, match=message):
        _ = five.frames


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_lcm_settings_that_leave_no_schedule_are_a_config_error(pipe, steps):
    with pytest.raises(ConfigError, match="LCMScheduler refuses these settings"):
        scheduled(pipe, "lcm", original_inference_steps=steps)
