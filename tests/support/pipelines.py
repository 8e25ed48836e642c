"""A PIAPipeline small enough for hundreds of calls, and the result of single calls: the reference of the engine."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, MotionAdapter, PIAPipeline, UNet2DConditionModel
from diffusers.pipelines.deprecated.pia import pipeline_pia
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pia_batch import tiny
from pia_batch.engine import Clip, PiaEngine, Shot, loading


def named(value: object) -> str:
    """Return a parameter's part of a test's name, which is the same in every process that shares the tests."""
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", str(value))


def picture(seed: int = 0, width: int = 32, height: int = 32) -> Image.Image:
    """Return RGB noise."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def shot(seed: int = 0, **settings: Any) -> Shot:
    """Return a shot that the small pipeline generates in a tenth of a second."""
    small: dict[str, Any] = {
        "image": picture(abs(seed)),
        "prompt": "a red circle moving left",
        "seed": seed,
        "num_inference_steps": 3,
        "num_frames": 3,
        "width": 32,
        "height": 32,
    }
    return Shot(**(small | settings))


def build(seed: int = 0) -> PIAPipeline:
    """Build a pipeline with random weights: 12 frames at most, 3 layers of text encoder, 4 pixels to a latent.

    Its noise schedule ends early. Untrained networks predict nothing, so that latents grow by what the schedule takes
    away; a full schedule would leave them near 50, where float32 has no digits left for an absolute 1e-5.
    """
    torch.manual_seed(seed)
    pipe = PIAPipeline(
        vae=_vae(),
        unet=_unet(),
        motion_adapter=_adapter(),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.002, clip_sample=False, steps_offset=1),
        **_text(),
    )
    for part in (pipe.vae, pipe.unet, pipe.text_encoder):
        part.eval().requires_grad_(requires_grad=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(pipe: PIAPipeline, folder: Any) -> None:
    """Write the folder that `pipe` could have been loaded from: a plain UNet, and the adapter next to it."""
    unet = _unet()
    weights = pipe.unet.state_dict()
    weights["conv_in.weight"] = weights["conv_in.weight"][:, :4]
    unet.load_state_dict({name: weights[name] for name in unet.state_dict()})
    parts = {
        "unet": unet,
        "vae": pipe.vae,
        "text_encoder": pipe.text_encoder,
        "motion_adapter": pipe.motion_adapter,
    }
    for name, part in (parts | {"tokenizer": pipe.tokenizer, "scheduler": pipe.scheduler}).items():
        part.save_pretrained(folder / name)


@dataclass(frozen=True)
class Truth:
    """Result of the pipeline for one shot."""

    latents: torch.Tensor
    frames: NDArray[np.uint8]


@torch.no_grad()
def single_call(pipe: PIAPipeline, shot: Shot, generator: torch.Generator | None = None) -> Truth:
    """Call the pipeline once for one shot, working around only what the call cannot do by itself.

    Args:
        pipe: The pipeline.
        shot: The shot.
        generator: Generator of an earlier call, to be continued; None: one with the shot's seed.
    """
    # The pipeline looks for the final norm where transformers 4 kept it. A plain attribute, or torch would see a loop.
    object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    image_prompt: dict[str, Any] = {}
    if pipe.unet.encoder_hid_proj is not None:
        pipe.set_ip_adapter_scale(shot.ip_adapter_scale)
        image_prompt = {"ip_adapter_image": shot.image if shot.ip_adapter_image is None else shot.ip_adapter_image}
    likeness = mock.patch.object(pipeline_pia, "prepare_mask_coef_by_statistics", return_value=coefficients(shot))
    with free_init(pipe, shot), likeness:
        latents = pipe(
            image=shot.image,
            prompt=shot.prompt,
            negative_prompt=shot.negative_prompt,
            generator=generator or torch.Generator("cpu").manual_seed(shot.seed),
            motion_scale=shot.motion_scale,
            guidance_scale=shot.guidance_scale,
            strength=shot.strength,
            num_inference_steps=shot.num_inference_steps,
            num_frames=shot.num_frames,
            width=shot.width,
            height=shot.height,
            clip_skip=shot.clip_skip,
            eta=shot.eta,
            output_type="latent",
            **image_prompt,
        ).frames
    video = pipe.video_processor.postprocess_video(pipe.decode_latents(latents), output_type="pil")[0]
    return Truth(latents[0], np.stack([np.asarray(frame) for frame in video]))


def assert_same(clip: Clip, truth: Truth, tolerance: float = 1e-5) -> None:
    assert clip.error is None
    assert clip.latents is not None
    assert clip.latents.shape == truth.latents.shape
    assert float((clip.latents - truth.latents).abs().max()) <= tolerance
    assert clip.frames.dtype == np.uint8
    assert clip.frames.shape == truth.frames.shape
    assert int(np.abs(clip.frames.astype(int) - truth.frames.astype(int)).max()) <= 1


def assert_equals_single_calls(pipe: PIAPipeline, engine: PiaEngine, shots: list[Shot]) -> None:
    """Assert equality within 1e-5 in float32, and within 1e-10 in float64."""
    clips = engine.animate(shots, keep_latents=True)
    tolerance = 1e-5 if engine.dtype == "float32" else 1e-10
    for row, clip in zip(shots, clips, strict=True):
        assert_same(clip, single_call(pipe, row), tolerance)


def coefficients(shot: Shot) -> list[float]:
    """Return the pipeline's own coefficients for any conditioned frame; numpy makes those that it has no name for."""
    if shot.motion_curve is not None:
        curve = [*shot.motion_curve, *shot.motion_curve[-1:] * shot.num_frames]
        return [curve[abs(frame - shot.cond_frame)] for frame in range(shot.num_frames)]
    if shot.loop:
        turn = max(1, shot.num_frames - 1)
        phases = (np.arange(shot.num_frames) - shot.cond_frame) % turn / turn
        preset = pipeline_pia.RANGE_list[3 + shot.motion_scale % 3]
        values: list[float] = np.interp(phases, np.linspace(0, 1, len(preset)), preset).tolist()
        return values
    stock: list[float] = pipeline_pia.prepare_mask_coef_by_statistics(
        shot.num_frames, shot.cond_frame, shot.motion_scale
    )
    return stock


@contextlib.contextmanager
def free_init(pipe: PIAPipeline, shot: Shot) -> Iterator[None]:
    """Give the pipeline the shot's FreeInit inside a block, and take it away afterwards."""
    if shot.free_init_iters:
        pipe.enable_free_init(
            num_iters=shot.free_init_iters,
            use_fast_sampling=shot.free_init_fast,
            method=shot.free_init_method,
            order=shot.free_init_order,
            spatial_stop_frequency=shot.free_init_spatial_stop,
            temporal_stop_frequency=shot.free_init_temporal_stop,
        )
    try:
        yield
    finally:
        pipe.disable_free_init()


class Counting:
    """A network that counts its calls."""

    def __init__(self, network: Any) -> None:
        self._network = network
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self._network(*args, **kwargs)


def stock_engine(pipe: PIAPipeline) -> PiaEngine:
    """Return the pipeline's engine with the UNet's own call: everything else in it changes no bit of a row."""
    parts = loading.adopt(pipe)
    return PiaEngine(dataclasses.replace(parts, unet=Counting(parts.unet)), lambda: "stock")


def _text() -> dict[str, Any]:
    tokenizer = CLIPTokenizer.from_pretrained(tiny.PATH / "tokenizer", local_files_only=True)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(config)}


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
    )


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def _adapter() -> MotionAdapter:
    return MotionAdapter(
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        motion_max_seq_length=12,
        use_motion_mid_block=False,
        conv_in_channels=9,
    )
