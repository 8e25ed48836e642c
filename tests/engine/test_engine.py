"""`PiaEngine` against single calls of `diffusers.PIAPipeline`, row by row, and rows that fail."""

from __future__ import annotations

import copy
import dataclasses
import gc
import random
import time
import weakref
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import MotionAdapter, PIAPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pipelines import (
    Counting,
    Truth,
    assert_equals_single_calls,
    assert_same,
    build,
    named,
    picture,
    save,
    shot,
    single_call,
    stock_engine,
)

from pia_batch import tiny
from pia_batch.config import ModelConfig, SchedulerConfig, SchedulerName
from pia_batch.engine import Clip, PiaEngine, conditioning, loading
from pia_batch.engine.batch_limit import PATIENCE
from pia_batch.engine.decoding import FrameDecoder
from pia_batch.errors import (
    ConfigError,
    DeviceMemoryError,
    ImageUnreadableError,
    NonFiniteError,
    RequestError,
    UnsupportedSettingError,
)
from pia_batch.weights.identity import engine_id
from pia_batch.weights.resolve import resolve

# diffusers' sigma schedulers hand numpy a tensor in a way that numpy 2 wants changed.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULERS: tuple[SchedulerName, ...] = get_args(SchedulerName)

MIXED = [
    shot(1),
    shot(2, guidance_scale=1.0, prompt="a blue square", num_inference_steps=5),
    shot(3, strength=0.5, num_inference_steps=6, motion_scale=4),
    shot(4, num_frames=5, negative_prompt="green", guidance_scale=4.0),
    shot(5, image=picture(5, 44, 28), clip_skip=1, prompt="a green star jumping"),
    shot(6, eta=0.7, guidance_scale=2.5, motion_curve=(1.0, 0.3)),
    shot(7, width=40, height=24, strength=0.9, num_inference_steps=4),
    shot(8, num_inference_steps=1, motion_scale=8, clip_skip=3),
    shot(9, loop=True, motion_scale=2, cond_frame=1, guidance_scale=3.0),
    shot(10, free_init_iters=3, free_init_fast=True, free_init_method="gaussian", num_inference_steps=4),
]
"""Rows that differ in every setting of a request."""


@pytest.fixture(scope="module")
def pipe() -> PIAPipeline:
    return build()


@pytest.fixture(scope="module")
def engine(pipe: PIAPipeline) -> PiaEngine:
    return PiaEngine.from_pipeline(pipe)


@pytest.fixture(scope="module")
def exact() -> PIAPipeline:
    """The same pipeline in float64, where rounding cannot hide the effects of a batch."""
    return build().to(torch.float64)


@pytest.fixture(scope="module")
def exact_engine(exact: PIAPipeline) -> PiaEngine:
    return PiaEngine.from_pipeline(exact)


@pytest.fixture(scope="module")
def mixed_truths(pipe: PIAPipeline) -> list[Truth]:
    return [single_call(pipe, row) for row in MIXED]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 10])
def test_every_row_of_a_mixed_batch_equals_its_single_call(engine, mixed_truths, size):
    clips = engine.animate(MIXED[:size], keep_latents=True)

    for clip, truth in zip(clips, mixed_truths, strict=False):
        assert_same(clip, truth)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_rows_below_full_strength_start_from_their_own_image_in_any_batch(exact, exact_engine, size):
    rows = [shot(seed, strength=0.7) for seed in range(size)]

    assert_equals_single_calls(exact, exact_engine, rows)


def test_a_row_alone_equals_its_single_call_to_the_last_bit_where_the_unet_is_called_as_the_pipeline_calls_it(
    pipe, engine, mixed_truths
):
    stock = stock_engine(pipe)

    for row, truth in zip(MIXED, mixed_truths, strict=True):
        assert_same(stock.animate([row], keep_latents=True)[0], truth, tolerance=0.0)
        assert_same(engine.animate([row], keep_latents=True)[0], truth)


@pytest.mark.parametrize("order", range(3))
def test_order_and_batch_mates_change_no_row(engine, mixed_truths, order):
    indices = random.Random(order).sample(range(len(MIXED)), k=5)

    clips = engine.animate([MIXED[index] for index in indices], keep_latents=True)

    for index, clip in zip(indices, clips, strict=True):
        assert_same(clip, mixed_truths[index])


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("precision", ["pipe", "exact"])
def test_every_scheduler_equals_single_calls_with_steps_strength_and_eta_per_row(request, precision, name):
    own = copy.copy(request.getfixturevalue(precision))
    own.scheduler = loading.build_scheduler(SchedulerConfig(name=name), own.scheduler)
    engine = PiaEngine.from_pipeline(own)
    rows = [
        shot(1, num_inference_steps=4, guidance_scale=3.0),
        shot(2, num_inference_steps=6, guidance_scale=2.0, strength=0.5),
        shot(3, num_inference_steps=5, guidance_scale=1.0, eta=1.0),
        shot(4, num_inference_steps=9, strength=0.35, guidance_scale=3.0, eta=0.4),
    ]

    assert_equals_single_calls(own, engine, rows)


def test_a_schedule_that_visits_a_timestep_twice_equals_its_single_call(exact):
    own = copy.copy(exact)
    karras = SchedulerConfig(name="dpmpp_2m", settings={"use_karras_sigmas": True})
    own.scheduler = loading.build_scheduler(karras, exact.scheduler)
    engine = PiaEngine.from_pipeline(own)
    size: dict[str, Any] = {"width": 8, "height": 8, "num_frames": 1, "num_inference_steps": 60}

    assert_equals_single_calls(own, engine, [shot(1, strength=0.1, **size), shot(2, strength=0.05, **size)])


@pytest.mark.parametrize(
    "setting",
    [
        {"prompt": "two yellow stars " * 30},
        {"prompt": ""},
        {"negative_prompt": "blurred, dark"},
        {"guidance_scale": 0.0},
        {"guidance_scale": 12.0},
        {"clip_skip": 0},
        {"clip_skip": 3},
        {"num_frames": 1},
        {"num_frames": 12},
        {"width": 8, "height": 64},
        {"image": picture(9, 8, 70)},
        {"strength": 0.34},
        {"eta": 1.0},
        {"motion_curve": (0.2,)},
        {"motion_curve": tuple(k / 20 for k in range(20))},
        {"motion_curve": (1.0, 0.3), "loop": True, "motion_scale": 7, "cond_frame": 2},
        {"cond_frame": 2},
        {"loop": True, "motion_scale": 5, "num_frames": 6, "cond_frame": 4},
        {"free_init_iters": 2},
    ],
    ids=named,
)
def test_each_setting_alone_equals_its_single_call_beside_an_ordinary_row(exact, exact_engine, setting):
    assert_equals_single_calls(exact, exact_engine, [shot(11, **setting), shot(12)])


def test_every_motion_scale_equals_its_single_call(exact, exact_engine):
    assert_equals_single_calls(
        exact, exact_engine, [shot(k, motion_scale=k, num_frames=8, num_inference_steps=1) for k in range(9)]
    )


SHOTS = st.builds(
    lambda seed, size, motion, passes, **rest: shot(
        seed, image=picture(seed % 3, 32 + seed % 5, 32), **size, **motion, **passes, **rest
    ),
    seed=st.integers(0, 2**63 - 1),
    size=st.sampled_from([{}, {"width": 24}, {"num_frames": 2}]),
    prompt=st.text(max_size=12),
    negative_prompt=st.sampled_from(["", "green"]),
    motion=st.fixed_dictionaries({"motion_scale": st.integers(0, 8), "cond_frame": st.integers(0, 1)})
    | st.fixed_dictionaries({"motion_scale": st.integers(0, 5), "loop": st.just(True)}),
    guidance_scale=st.floats(0, 8),
    passes=st.fixed_dictionaries({"strength": st.floats(0.5, 1)})
    | st.fixed_dictionaries({"free_init_iters": st.integers(1, 3), "free_init_fast": st.booleans()}),
    num_inference_steps=st.integers(2, 4),
    clip_skip=st.none() | st.integers(0, 3),
    eta=st.floats(0, 1),
)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(SHOTS, min_size=1, max_size=4))
def test_any_batch_of_any_settings_equals_single_calls(exact, exact_engine, rows):
    assert_equals_single_calls(exact, exact_engine, rows)


def test_a_row_that_turns_nan_fails_alone():
    pipe = build()
    token = pipe.tokenizer("7").input_ids[1]
    pipe.text_encoder.get_input_embeddings().weight.data[token] = torch.nan
    engine = PiaEngine.from_pipeline(pipe)

    good, bad, other = engine.animate([MIXED[0], shot(2, prompt="7"), MIXED[2]], keep_latents=True)

    assert isinstance(bad.error, NonFiniteError)
    with pytest.raises(NonFiniteError, match="embedding of the prompt"):
        _ = bad.frames
    assert_same(good, single_call(pipe, MIXED[0]))
    assert_same(other, single_call(pipe, MIXED[2]))


def test_frames_that_overflow_half_precision_are_decoded_again_in_float32():
    pipe = build()
    for layer in (pipe.vae.post_quant_conv, pipe.vae.decoder.conv_in):
        layer.weight.mul_(3000)
    half = PiaEngine.from_pipeline(copy.copy(pipe).to(torch.float16))
    assert not torch.isfinite(pipe.decode_latents(torch.ones(1, 4, 1, 8, 8, dtype=torch.float16))).all()

    clip = half.animate([shot(1)], keep_latents=True)[0]

    assert clip.latents is not None
    expected = pipe.vae.float().decode(clip.latents.float().transpose(0, 1) / 0.5).sample
    expected = ((expected / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(clip.frames - expected).max() <= 1


class BrightnessVae:
    """Decodes each latent to a pixel, and to NaN where it is above 9, in any precision."""

    config = SimpleNamespace(scaling_factor=1.0, block_out_channels=(8,))
    dtype = torch.float32

    def decode(self, latents: torch.Tensor) -> Any:
        return SimpleNamespace(sample=torch.where(latents > 9, torch.nan, latents)[:, :3])

    def float(self) -> BrightnessVae:
        return self


def test_frames_that_stay_broken_fail_their_row_and_no_other():
    rows = [torch.zeros(1, 4, 2, 3, 5), torch.full((1, 4, 2, 3, 5), 10.0), torch.ones(1, 4, 2, 3, 5)]
    rows[1][:, :, 0] = 0  # one sound frame does not make a clip

    dark, broken, bright = FrameDecoder(BrightnessVae()).decode(rows)

    assert isinstance(broken, NonFiniteError)
    assert (np.unique(dark).tolist(), np.unique(bright).tolist()) == ([128], [255])
    assert bright.shape == (2, 3, 5, 3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_frames": 13}, "motion modules' 12"),
        ({"num_frames": 0}, "num_frames 0"),
        ({"clip_skip": 4}, "text encoder's 3 layers"),
        ({"clip_skip": -1}, "clip_skip"),
        ({"num_inference_steps": 3, "strength": 0.3}, "leaves none of 3 steps"),
        ({"strength": 0.0}, "strength 0.0"),
        ({"strength": 1.5}, "strength 1.5"),
        ({"num_inference_steps": 1001}, "between 1 and 1000"),
        ({"width": 36}, "width 36 is not a positive multiple of 8"),
        ({"height": 0}, "height 0"),
        ({"motion_scale": 9}, "motion_scale 9"),
        ({"motion_scale": -1}, "motion_scale -1"),
        ({"motion_scale": 7, "loop": True}, "loop does not go with motion_scale 7"),
        ({"cond_frame": 3}, "cond_frame 3 is not between 0 and 2, .* num_frames 3"),
        ({"cond_frame": -1, "motion_curve": (1.0,)}, "cond_frame -1"),
        ({"free_init_iters": 11}, "free_init_iters 11 is not between 0 and 10"),
        ({"free_init_iters": -1}, "free_init_iters -1"),
        ({"free_init_iters": 2, "strength": 0.7}, "free_init_iters 2 does not go with strength 0.7"),
        ({"free_init_iters": 2, "free_init_method": "box"}, "'box' is none of butterworth, ideal, gaussian"),
        ({"free_init_iters": 2, "free_init_order": 0}, "free_init_order 0"),
        ({"free_init_iters": 2, "free_init_spatial_stop": 1e-9}, "free_init_spatial_stop 1e-09 is neither 0"),
        ({"free_init_iters": 2, "free_init_temporal_stop": float("nan")}, "free_init_temporal_stop nan"),
        ({"motion_curve": ()}, "motion_curve"),
        ({"motion_curve": (1.0, float("nan"))}, "motion_curve"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan"),
        ({"seed": -1}, "seed -1"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"image": picture().convert("RGBA")}, "RGBA, not RGB"),
        ({"image": picture(0, 2, 2)}, "below 4 px"),
    ],
    ids=named,
)
def test_what_the_model_cannot_draw_fails_its_row_alone(engine, mixed_truths, setting, message):
    bad, good = engine.animate([shot(**({"seed": 1} | setting)), MIXED[0]], keep_latents=True)

    assert isinstance(bad.error, UnsupportedSettingError)
    with pytest.raises(UnsupportedSettingError, match=message):
        _ = bad.frames
    assert_same(good, mixed_truths[0])


def test_a_schedule_that_the_scheduler_cannot_make_fails_its_row_alone(pipe):
    own = copy.copy(pipe)
    own.scheduler = loading.build_scheduler(SchedulerConfig(name="pndm"), pipe.scheduler)

    short, enough = PiaEngine.from_pipeline(own).animate(
        [shot(1, num_inference_steps=2), shot(2, num_inference_steps=4)]
    )

    assert isinstance(short.error, UnsupportedSettingError)
    assert enough.error is None


def test_an_image_that_breaks_when_it_is_read_fails_its_row_alone(engine, tmp_path):
    path = tmp_path / "cut.png"
    picture(0, 64, 64).save(path)
    path.write_bytes(path.read_bytes()[:2000])

    bad, good = engine.animate([shot(1, image=Image.open(path)), shot(2)])

    assert isinstance(bad.error, ImageUnreadableError)
    assert good.error is None


class CrampedUnet:
    """A UNet on a device with memory for a limited number of samples. Records the requested numbers.

    Attributes:
        most: samples that fit.
        relief: after so many failures everything fits; None: never.
        error: what it raises.
        remember: whether to follow what failed attempts leave behind.
        asked: samples of each call.
        alive_of_failed: at each call, how many inputs of failed calls are still in memory.
    """

    def __init__(self, unet: Any, most: int) -> None:
        self._unet = unet
        self.most = most
        self.relief: int | None = None
        self.error: Exception = torch.OutOfMemoryError("tried to allocate 20 GiB")
        self.remember = False
        self.config = unet.config
        self.asked: list[int] = []
        self.alive_of_failed: list[int] = []
        self._failed: list[weakref.ref[Any]] = []

    def __call__(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.asked.append(len(sample))
        self.alive_of_failed.append(sum(tensor() is not None for tensor in self._failed))
        if len(sample) > self.most and self.relief != 0:
            self.relief = None if self.relief is None else self.relief - 1
            if self.remember:
                self._failed += [weakref.ref(sample), weakref.ref(kwargs["encoder_hidden_states"])]
            raise type(self.error)(*self.error.args)  # a new one: an exception keeps its traceback, and that the rows
        return self._unet(sample, *args, **kwargs)


def cramped(pipe: PIAPipeline, most: int) -> tuple[PiaEngine, CrampedUnet]:
    parts = loading.adopt(pipe)
    unet = CrampedUnet(parts.unet, most)
    return PiaEngine(dataclasses.replace(parts, unet=unet), lambda: "cramped"), unet


def test_a_batch_too_large_for_the_device_is_halved_and_what_fits_is_remembered(pipe):
    engine, unet = cramped(pipe, most=4)
    rows = [shot(seed, num_inference_steps=1) for seed in range(5)]

    clips = engine.animate(rows, keep_latents=True)

    for row, clip in zip(rows, clips, strict=True):
        assert_same(clip, single_call(pipe, row))
    assert unet.asked == [10, 6, 4, 4, 2]
    unet.asked.clear()
    engine.animate(rows)
    assert unet.asked == [4, 4, 2]


def test_a_row_without_guidance_takes_half_the_room(pipe):
    engine, unet = cramped(pipe, most=4)

    engine.animate([shot(seed, num_inference_steps=1, guidance_scale=1.0) for seed in range(4)])
    engine.animate([shot(seed, num_inference_steps=1) for seed in range(4)])

    assert unet.asked == [4, 8, 4, 4]


def test_batches_grow_again_when_the_device_has_room_again(pipe):
    engine, unet = cramped(pipe, most=4)
    rows = [shot(seed, num_inference_steps=1, num_frames=1, width=8, height=8) for seed in range(4)]
    engine.animate(rows)
    unet.most = 8

    for _ in range(PATIENCE):
        engine.animate(rows)

    assert unet.asked[:3] == [8, 4, 4]
    assert unet.asked[-1] == 8


def test_a_row_too_large_by_itself_fails_alone(pipe):
    engine, unet = cramped(pipe, most=1)

    guided, plain = engine.animate([shot(1), shot(2, guidance_scale=1.0)])

    assert isinstance(guided.error, DeviceMemoryError)
    with pytest.raises(DeviceMemoryError, match=r"cpu has too little memory for this request.*model\.memory.*20 GiB"):
        _ = guided.frames
    assert plain.error is None
    assert unet.asked[:3] == [3, 2, 2]  # together, alone, and alone once more


def test_a_row_alone_is_drawn_after_all_if_memory_was_short_for_a_moment(pipe):
    engine, unet = cramped(pipe, most=1)
    unet.relief = 1

    clip = engine.animate([shot(1, num_inference_steps=1)])[0]

    assert clip.error is None
    assert unet.asked == [2, 2]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 GiB for an array"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9000 bytes"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
    ],
    ids=["numpy", "cpu", "driver", "cublas", "cudnn"],
)
def test_memory_that_runs_out_elsewhere_is_no_bug_either(pipe, error):
    engine, unet = cramped(pipe, most=4)
    unet.error = error

    clips = engine.animate([shot(seed, num_inference_steps=1) for seed in range(3)])

    assert [clip.error for clip in clips] == [None] * 3
    assert unet.asked == [6, 4, 2]


def test_any_other_error_of_torch_is_a_bug(pipe):
    engine, unet = cramped(pipe, most=1)
    unet.error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        engine.animate([shot(1)])


def test_nothing_of_an_attempt_that_failed_is_in_memory_at_the_next(pipe):
    engine, unet = cramped(pipe, most=4)
    unet.remember = True

    engine.animate([shot(seed, num_inference_steps=2) for seed in range(8)])

    assert len(unet.asked) > 4
    assert unet.alive_of_failed == [0] * len(unet.asked)


def test_no_shots_make_no_clips(engine):
    assert engine.animate([]) == []


def test_latents_are_kept_on_request_only(engine):
    assert engine.animate([shot(1)])[0].latents is None


def test_a_clip_says_how_much_of_the_prompt_was_read(engine, caplog):
    short, long = engine.animate([shot(1, prompt="red"), shot(2, prompt="red " * 50)])

    assert (short.prompt_tokens, short.prompt_truncated) == (3, False)
    assert (long.prompt_tokens, long.prompt_truncated) == (52, True)
    assert not caplog.records


def test_clips_share_the_time_by_their_steps_and_guidance(engine):
    began = time.perf_counter()
    guided, plain, short = engine.animate(
        [
            shot(1, num_inference_steps=4),
            shot(2, num_inference_steps=4, guidance_scale=1.0),
            shot(3, num_inference_steps=2),
        ]
    )
    elapsed = time.perf_counter() - began

    assert guided.device_seconds == pytest.approx(2 * plain.device_seconds)
    assert short.device_seconds == pytest.approx(plain.device_seconds)
    assert 0 < sum(clip.device_seconds for clip in (guided, plain, short)) <= elapsed


class CountingEncoder(Counting):
    """A text encoder or a VAE that counts its calls."""

    def encode(self, *args: Any) -> Any:
        self.calls += 1
        return self._network.encode(*args)


def test_what_rows_share_is_computed_once_and_kept(pipe):
    parts = loading.adopt(pipe)
    text, vae = CountingEncoder(parts.text_encoder), CountingEncoder(parts.vae)
    engine = PiaEngine(dataclasses.replace(parts, text_encoder=text, vae=vae), lambda: "counted")
    rows = [shot(seed, image=picture(0), num_inference_steps=1) for seed in range(3)]

    engine.animate([*rows, shot(4, image=picture(1), clip_skip=1, num_inference_steps=1)])
    engine.animate(rows)

    assert text.calls == 3  # the prompt, the prompt at another layer, and the empty negative prompt
    assert vae.calls == 2


def test_caches_forget_what_was_not_used_for_longest():
    recent: conditioning.LruCache[str, int] = conditioning.LruCache(2)
    for key in ("a", "b", "a", "c"):
        recent.get(key, lambda: 1)

    assert len(recent) == 2
    assert recent.get("a", lambda: 2) == 1
    assert recent.get("b", lambda: 3) == 3


def test_a_pipeline_stays_as_it_is(pipe):
    row = shot(1, strength=0.7)
    before = single_call(pipe, row)
    state = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    timesteps = pipe.scheduler.timesteps.clone()

    PiaEngine.from_pipeline(pipe).animate(MIXED)

    assert torch.equal(pipe.scheduler.timesteps, timesteps)
    assert all(torch.equal(tensor, state[name]) for name, tensor in pipe.unet.state_dict().items())
    assert torch.equal(single_call(pipe, row).latents, before.latents)


@pytest.mark.parametrize(
    ("unet", "free_init", "message"),
    [
        ({}, True, r"FreeInit.*disable_free_init\(\), then set free_init_iters per row"),
        ({"_hf_hook": object()}, False, "offloads"),
    ],
)
def test_a_pipeline_with_what_rows_cannot_have_each_for_itself_is_refused(unet, free_init, message):
    pipe: Any = SimpleNamespace(unet=SimpleNamespace(**unet), free_init_enabled=free_init)

    with pytest.raises(ConfigError, match=message):
        PiaEngine.from_pipeline(pipe)


def test_the_id_of_a_pipeline_is_that_of_its_weights():
    pipe, twin, other = build(0), build(0), build(1)

    ids = [PiaEngine.from_pipeline(each).engine_id for each in (pipe, twin, other)]

    assert ids[0] == ids[1] != ids[2]
    assert len(ids[0]) == 32


def test_an_engine_loaded_from_a_folder_draws_what_the_pipeline_draws(pipe, tmp_path, capfd):
    save(pipe, tmp_path)
    model = ModelConfig(base=str(tmp_path), scheduler=SchedulerConfig(name="checkpoint"))
    capfd.readouterr()

    engine = PiaEngine.load(model, device="cpu")

    assert capfd.readouterr() == ("", "")
    assert (engine.device, engine.dtype) == ("cpu", "float32")
    assert engine.engine_id == engine_id(model, resolve(model), "float32")
    assert_equals_single_calls(pipe, engine, MIXED[:3])


def test_a_saved_pia_pipeline_is_a_base_with_its_motion_modules_inside(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)

    engine = PiaEngine.load(ModelConfig(base=str(tmp_path), scheduler=SchedulerConfig(name="checkpoint")), device="cpu")

    assert_equals_single_calls(pipe, engine, MIXED[:1])


def test_two_engines_of_one_folder_do_not_share_what_either_changes(pipe, tmp_path):
    save(pipe, tmp_path)
    model = ModelConfig(base=str(tmp_path), scheduler=SchedulerConfig(name="checkpoint"))
    first, second = (PiaEngine.load(model, device="cpu") for _ in range(2))

    first._parts.unet.conv_in.weight.zero_()

    assert_equals_single_calls(pipe, second, MIXED[:1])


def test_parts_that_do_not_fit_each_other_are_a_config_error(pipe, tmp_path):
    save(pipe, tmp_path)
    MotionAdapter(
        block_out_channels=(16,), motion_norm_num_groups=4, motion_num_attention_heads=2, conv_in_channels=9
    ).save_pretrained(tmp_path / "motion_adapter")

    with pytest.raises(ConfigError, match="does not fit the base"):
        PiaEngine.load(ModelConfig(base=str(tmp_path)), device="cpu")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_named_schedulers_run_on_the_noise_schedule_that_pia_was_trained_on(name):
    shipped = build().scheduler

    scheduler = loading.build_scheduler(SchedulerConfig(name=name, settings={"beta_end": 0.01}), shipped)

    assert scheduler.config.beta_end == 0.01
    assert scheduler.config.steps_offset == 1
    assert scheduler.config.beta_schedule == "linear"
    assert scheduler.config.get("clip_sample", False) is False


def test_a_stable_diffusion_schedule_is_replaced_unless_the_checkpoint_is_to_decide():
    shipped = build().scheduler
    shipped = type(shipped).from_config(shipped.config, beta_schedule="scaled_linear", clip_sample=True)

    named = loading.build_scheduler(SchedulerConfig(name="ddim"), shipped)
    kept = loading.build_scheduler(SchedulerConfig(name="checkpoint"), shipped)

    assert (named.config.beta_schedule, named.config.clip_sample) == ("linear", False)
    assert (kept.config.beta_schedule, kept.config.clip_sample) == ("scaled_linear", True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spacing": "trailing"}, "no spacing; it has .*timestep_spacing"),
        ({"beta_schedule": "cubic"}, "refuses these settings: cubic"),
        ({"timestep_spacing": "sideways"}, "sideways"),
    ],
)
def test_a_wrong_scheduler_setting_is_a_config_error_that_names_it(settings, message):
    with pytest.raises(ConfigError, match=message):
        loading.build_scheduler(SchedulerConfig(name="ddim", settings=settings), build().scheduler)


def test_a_clip_has_either_frames_or_an_error():
    with pytest.raises(ValueError, match="either"):
        Clip()
    with pytest.raises(ValueError, match="either"):
        Clip(np.zeros((1, 8, 8, 3), np.uint8), error=RequestError("no"))


def test_the_embedded_checkpoint_draws_what_its_pipeline_draws():
    adapter = MotionAdapter.from_pretrained(tiny.PATH / "motion_adapter", dtype=torch.float32, local_files_only=True)
    pipe = PIAPipeline.from_pretrained(tiny.PATH, motion_adapter=adapter, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    engine = PiaEngine.load(ModelConfig(scheduler=SchedulerConfig(name="checkpoint")), device="cpu")
    size: dict[str, Any] = {"width": 64, "height": 64, "num_frames": 4, "num_inference_steps": 2}
    rows = [
        shot(1, **size, guidance_scale=2.0),
        shot(2, **size, prompt="a blue square", guidance_scale=1.0, motion_scale=2),
        shot(3, **(size | {"num_inference_steps": 4}), strength=0.6, guidance_scale=2.0, clip_skip=1),
    ]

    assert_equals_single_calls(pipe, engine, rows)


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_an_engine_keeps_nothing_of_a_batch_but_what_it_caches(engine):
    row = shot(1, num_inference_steps=1)
    engine.animate([row])
    before = live_tensors()

    for seed in range(5):
        engine.animate([dataclasses.replace(row, seed=seed), shot(2, image=row.image, num_frames=99)])

    assert live_tensors() == before


def test_a_textual_inversion_of_several_vectors_is_read_in_full():
    pipe = build()
    pipe.tokenizer.add_tokens(["<cat>", "<cat>_1"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    engine = PiaEngine.from_pipeline(pipe)
    row = shot(1, prompt="a <cat> jumping")

    assert_equals_single_calls(pipe, engine, [row])
    assert engine.animate([row])[0].prompt_tokens == 6
