"""Clips of more frames than the motion modules process together, against brute force over the stock UNet."""

from __future__ import annotations

import copy
import dataclasses
import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import PIAPipeline
from hypothesis import given
from hypothesis import strategies as st
from long_clips import by_brute_force, by_chain, by_stock_free_noise, by_whole_free_noise, shuffled_noise, starts
from pipelines import Truth, assert_same, build, picture, shot, single_call, stock_engine
from schedulers import scheduled

from pia_batch.config import contexts
from pia_batch.engine import PiaEngine, loading
from pia_batch.engine.windows import Fusion, Windows, shuffled, windows_of
from pia_batch.errors import NonFiniteError, UnsupportedSettingError

# diffusers' sigma schedulers hand numpy a tensor in a way that numpy 2 wants changed.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

WINDOWED = {"context": "windows", "context_length": 6, "context_overlap": 2}

LONG = [
    shot(1, num_frames=13, **WINDOWED),
    shot(2, num_frames=10, guidance_scale=1.0, prompt="a blue square", num_inference_steps=5, **WINDOWED),
    shot(3, num_frames=9, context="windows", context_length=6, context_overlap=5, negative_prompt="green"),
    shot(4, num_frames=20, strength=0.5, num_inference_steps=6, motion_scale=4, **WINDOWED),
    shot(5, num_frames=14, loop=True, motion_scale=2, cond_frame=3, **WINDOWED),
    shot(6, num_frames=7, eta=0.7, guidance_scale=2.5, motion_curve=(1.0, 0.3), cond_frame=6, **WINDOWED),
    shot(7, num_frames=25, image=picture(7, 44, 28), clip_skip=1, motion_scale=7, **WINDOWED),
    shot(8, num_frames=12, context="windows", context_length=6, context_overlap=0, loop=True),
]
"""Rows of one size and one length of windows that differ in everything else."""


@pytest.fixture(scope="module")
def pipe() -> PIAPipeline:
    """Motion modules that know 12 frames, where rounding cannot hide the effects of a batch."""
    return build().to(torch.float64)


@pytest.fixture(scope="module")
def engine(pipe: PIAPipeline) -> PiaEngine:
    return PiaEngine.from_pipeline(pipe)


@pytest.fixture(scope="module")
def truths(pipe: PIAPipeline) -> list[Truth]:
    return [by_brute_force(pipe, row) for row in LONG]


@pytest.mark.long
@pytest.mark.parametrize("order", range(3))
def test_long_rows_of_any_mixture_equal_brute_force(engine, truths, order):
    indices = random.Random(order).sample(range(len(LONG)), k=[8, 5, 3][order])

    clips = engine.animate([LONG[index] for index in indices], keep_latents=True)

    for index, clip in zip(indices, clips, strict=True):
        assert_same(clip, truths[index], tolerance=1e-10)


@pytest.mark.long
def test_long_rows_share_calls_with_rows_of_a_windows_length_and_change_nothing_in_them(pipe, engine, truths):
    short = shot(9, num_frames=6)
    clips = engine.animate([LONG[0], short, LONG[4]], keep_latents=True)

    assert_same(clips[0], truths[0], tolerance=1e-10)
    assert_same(clips[1], single_call(pipe, short), tolerance=1e-10)
    assert_same(clips[2], truths[4], tolerance=1e-10)


@pytest.mark.long
@pytest.mark.parametrize("name", ["euler_ancestral", "heun", "unipc"])
def test_solvers_with_a_history_or_noise_of_their_own_equal_brute_force(pipe, name):
    own = scheduled(pipe, name)

    clips = PiaEngine.from_pipeline(own).animate(LONG[:2], keep_latents=True)

    for row, clip in zip(LONG, clips, strict=False):
        assert_same(clip, by_brute_force(own, row), tolerance=1e-10)


def test_in_float32_every_frame_is_within_one_of_255_of_brute_force():
    pipe = build()

    clips = PiaEngine.from_pipeline(pipe).animate(LONG[3:6], keep_latents=True)

    for row, clip in zip(LONG[3:6], clips, strict=True):
        assert_same(clip, by_brute_force(pipe, row))


@pytest.mark.long
def test_the_networks_own_call_predicts_the_same_windows(pipe, truths):
    clips = stock_engine(pipe).animate(LONG[:3], keep_latents=True)

    for clip, truth in zip(clips, truths, strict=False):
        assert_same(clip, truth, tolerance=1e-10)


def test_without_a_context_windows_begin_beyond_what_the_motion_modules_know(pipe, engine):
    at, beyond = (shot(1, num_frames=count, context_length=8, context_overlap=3) for count in (12, 13))

    clips = engine.animate([at, beyond], keep_latents=True)

    assert_same(clips[0], single_call(pipe, at), tolerance=1e-10)
    assert_same(clips[1], by_brute_force(pipe, dataclasses.replace(beyond, context="windows")), tolerance=1e-10)


@pytest.mark.parametrize("context", ["windows", "freenoise", "chain"])
def test_a_clip_no_longer_than_a_window_is_a_single_call(pipe, engine, context):
    row = shot(1, num_frames=8, context=context, context_length=8, loop=True)

    assert_same(engine.animate([row], keep_latents=True)[0], single_call(pipe, row), tolerance=1e-10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_frames": 1025}, "num_frames 1025 is not between 1 and 1024"),
        ({"num_frames": 13}, "context_length 16 is not between 1 and the motion modules' 12"),
        ({"num_frames": 13, "context_length": 0}, "context_length 0"),
        ({"num_frames": 13, "context_length": 8, "context_overlap": 8}, "context_overlap 8 is not between 0 and 7"),
        ({"num_frames": 13, "context_length": 8, "context_overlap": -1}, "context_overlap -1"),
        ({"num_frames": 9, "context_length": 8, "context_stride": 0, "context": "freenoise"}, "context_stride 0"),
        ({"num_frames": 9, "context_length": 8, "context_stride": 9, "context": "freenoise"}, "between 1 and 8"),
        ({"num_frames": 9, "context_length": 1, "context": "chain"}, "context chain needs a context_length of 2"),
        ({"num_frames": 9, "context_length": 8, "context": "chain", "loop": True}, "loop does not go with context"),
        ({"num_frames": 9, "context_length": 8, "context": "chain", "cond_frame": 1}, "cond_frame 1 does not go"),
        ({"context": "tiles"}, "context 'tiles' is none of windows, freenoise, chain"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_by_name(engine, settings, message):
    clip = engine.animate([shot(1, **settings)])[0]

    assert isinstance(clip.error, UnsupportedSettingError)
    assert message in str(clip.error)


@given(length=st.integers(1, 32), overlap=st.integers(0, 31), more=st.integers(1, 300))
def test_windows_cover_every_frame_and_share_at_least_the_overlap(length, overlap, more):
    overlap, num_frames = min(overlap, length - 1), length + more
    found = contexts.window_starts(num_frames, length, overlap)

    assert list(found) == starts(shot(num_frames=num_frames, context_length=length, context_overlap=overlap))
    assert (found[0], found[-1]) == (0, num_frames - length)
    assert all(1 <= later - earlier <= length - overlap for earlier, later in pairwise(found))


@given(length=st.integers(1, 32), overlap=st.integers(0, 31), more=st.integers(1, 300))
def test_windows_of_a_loop_cover_every_frame_and_the_seam(length, overlap, more):
    overlap, num_frames = min(overlap, length - 1), length + more
    row = shot(num_frames=num_frames, context_length=length, context_overlap=overlap, context="windows", loop=True)
    windows = windows_of(row, 32)

    seen = [windows.frames(start) for start in windows.starts]
    assert {frame for frames in seen for frame in frames} == set(range(num_frames))
    assert all(len(set(frames)) == length for frames in seen)
    if overlap:
        assert any({0, num_frames - 1} <= set(frames) for frames in seen)


@given(num_frames=st.integers(1, 60), length=st.integers(1, 32), stride=st.integers(1, 8), seed=st.integers(0, 99))
def test_noise_is_shuffled_as_diffusers_shuffles_it(num_frames, length, stride, seed):
    stride = min(stride, length)
    ours, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
    noise = torch.randn(1, 4, num_frames, 2, 3, generator=ours)

    expected = shuffled_noise((1, 4, num_frames, 2, 3), length, stride, theirs, torch.float32)

    assert torch.equal(shuffled(noise, length, stride, ours), expected)
    assert torch.equal(torch.rand(3, generator=ours), torch.rand(3, generator=theirs)), "the next number is the same"


def test_no_call_has_more_samples_than_the_rows_first_windows(pipe):
    """Memory does not grow with the number of frames, and the shapes are those of a window's length."""
    engine, unet = counting(pipe)

    engine.animate([shot(1, num_frames=30, num_inference_steps=1, **WINDOWED)])
    engine.animate(
        [
            shot(1, num_frames=10, num_inference_steps=1, **WINDOWED),
            shot(2, num_frames=14, num_inference_steps=1, guidance_scale=1.0, **WINDOWED),
        ]
    )

    assert unet.asked == [(2, 6)] * 7 + [(2, 6), (3, 6), (2, 6)]


def counting(pipe: PIAPipeline) -> tuple[PiaEngine, CountingUnet]:
    parts = loading.adopt(pipe)
    unet = CountingUnet(parts.unet)
    return PiaEngine(dataclasses.replace(parts, unet=unet), lambda: "counted"), unet


class CountingUnet:
    """A UNet that records the samples and frames of each call."""

    def __init__(self, unet: Any) -> None:
        self._unet = unet
        self.asked: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)

    def __call__(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.asked.append((len(sample), sample.shape[2]))
        return self._unet(sample, *args, **kwargs)


FREE = {"context": "freenoise", "context_length": 6, "context_stride": 2}

FREE_NOISE = [
    shot(1, num_frames=14, **FREE),
    shot(2, num_frames=14, guidance_scale=1.0, num_inference_steps=5, motion_scale=4, **FREE),
    shot(3, num_frames=14, strength=0.6, num_inference_steps=6, negative_prompt="green", eta=0.5, **FREE),
    shot(4, num_frames=14, free_init_iters=2, cond_frame=13, **FREE),
    shot(5, num_frames=12, context="freenoise", context_length=9, context_stride=3, clip_skip=1),
    shot(6, num_frames=8, context="freenoise", context_length=5, context_stride=1, motion_curve=(1.0, 0.4)),
    shot(7, num_frames=10, context="freenoise", context_length=4, context_stride=2, image=picture(7, 44, 28)),
]


@pytest.mark.long
def test_free_noise_equals_the_stock_mixin_where_the_last_window_is_whole(pipe, engine):
    clips = engine.animate([*FREE_NOISE, LONG[0]], keep_latents=True)

    for row, clip in zip(FREE_NOISE, clips, strict=False):
        assert_same(clip, by_stock_free_noise(pipe, row), tolerance=1e-10)
    assert_same(clips[-1], by_brute_force(pipe, LONG[0]), tolerance=1e-10)


@pytest.mark.parametrize(
    "row",
    [
        shot(1, num_frames=13, **FREE),
        shot(2, num_frames=11, context="freenoise", context_length=6, context_stride=4, guidance_scale=1.0),
        shot(3, num_frames=9, loop=True, motion_scale=1, **FREE),
        shot(4, num_frames=7, loop=True, motion_scale=2, context="freenoise", context_length=6, context_stride=5),
    ],
    ids=range(4),
)
def test_free_noise_counts_every_frame_of_its_last_window_and_of_a_loops_seam(pipe, engine, row):
    clips = engine.animate([row, shot(9, num_frames=row.num_frames)], keep_latents=True)

    assert_same(clips[0], by_whole_free_noise(pipe, row), tolerance=1e-10)


def test_free_noise_works_in_half_precision_on_a_cpu_and_is_refused_by_a_network_with_hooks(pipe):
    row = FREE_NOISE[0]
    half = PiaEngine.from_pipeline(build().to(torch.bfloat16)).animate([row])[0]
    hooked = copy.deepcopy(pipe)
    hooked.unet.conv_in.register_forward_hook(lambda *_: None)
    refused = PiaEngine.from_pipeline(hooked).animate([row])[0]

    assert half.frames.shape == (14, 32, 32, 3)
    assert isinstance(refused.error, UnsupportedSettingError)
    assert "set context to windows" in str(refused.error)


@given(num_frames=st.integers(2, 80), length=st.integers(1, 32), stride=st.integers(1, 32), circular=st.booleans())
def test_windows_that_change_nothing_are_fused_to_what_they_were(num_frames, length, stride, circular):
    length = min(length, num_frames - 1)
    starts_at = contexts.sliding_starts(num_frames, length, min(stride, length), circular=circular)
    windows = Windows(num_frames, length, starts_at)
    clip = torch.randn(1, 2, num_frames, 1, 3, dtype=torch.float64)

    fusion = Fusion(windows)
    for start in windows.starts:
        fusion.add(start, windows.part(clip, start))

    assert float((fusion.mean(torch.float64) - clip).abs().max()) <= 1e-12


CHAIN = {"context": "chain", "context_length": 5}

CHAINS = [
    shot(1, num_frames=13, **CHAIN),
    shot(2, num_frames=6, guidance_scale=1.0, motion_scale=4, num_inference_steps=2, **CHAIN),
    shot(3, num_frames=11, strength=0.7, num_inference_steps=4, eta=0.6, negative_prompt="green", **CHAIN),
    shot(4, num_frames=9, free_init_iters=2, num_inference_steps=2, image=picture(4, 44, 28), **CHAIN),
    shot(5, num_frames=2 * 5, motion_curve=(1.0, 0.4), clip_skip=1, **CHAIN),
]


@pytest.mark.long
def test_chains_equal_one_call_after_the_other_with_one_generator(pipe, engine):
    short = shot(9, num_frames=5)

    clips = engine.animate([*CHAINS, short], keep_latents=True)

    for row, clip in zip(CHAINS, clips, strict=False):
        assert_same(clip, by_chain(pipe, row), tolerance=1e-8)  # a frame in between is rounded to whole numbers
    assert_same(clips[-1], single_call(pipe, short), tolerance=1e-10)


def test_a_chain_that_breaks_in_a_later_piece_fails_alone(pipe):
    """Its first piece works: the image of the second one is not finite."""
    engine = PiaEngine.from_pipeline(pipe)
    encode = engine._images.encode
    known = {CHAINS[0].image.tobytes(), CHAINS[1].image.tobytes()}

    def breaks(image: Any) -> Any:
        if image.tobytes() not in known and len(known) == 2:
            known.add(image.tobytes())
            raise NonFiniteError("the VAE's latents of the image hold NaN")
        return encode(image)

    engine._images.encode = breaks
    first, second = engine.animate(CHAINS[:2], keep_latents=True)

    assert isinstance(first.error, NonFiniteError)
    assert first.latents is None
    assert_same(second, by_chain(pipe, CHAINS[1]), tolerance=1e-8)


def test_costs_count_every_window_and_every_piece(pipe):
    engine = stock_engine(pipe)
    plain, windows, chain = engine.animate(
        [
            shot(1, num_frames=6),
            shot(1, num_frames=14, **WINDOWED),
            shot(1, num_frames=11, context="chain", context_length=6),
        ]
    )

    assert windows.device_seconds == pytest.approx(3 * plain.device_seconds)
    assert chain.device_seconds == pytest.approx(2 * plain.device_seconds)
