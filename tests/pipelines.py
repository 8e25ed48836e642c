"""A PIAPipeline small enough for hundreds of calls, and what a single call of it draws: the truth about the engine."""

from __future__ import annotations

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
from pia_batch.engine import Shot


def picture(seed: int = 0, width: int = 32, height: int = 32) -> Image.Image:
    """RGB noise."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def shot(seed: int = 0, **settings: Any) -> Shot:
    """A shot that the small pipeline draws in a tenth of a second."""
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
    """A pipeline with random weights: 12 frames at most, 3 layers of text encoder, 4 pixels to a latent.

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
    """Write the folder that `pipe` could have been loaded from: a plain UNet, and the adapter beside it."""
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
    """What the pipeline draws of one shot."""

    latents: torch.Tensor
    frames: NDArray[np.uint8]


@torch.no_grad()
def single_call(pipe: PIAPipeline, shot: Shot) -> Truth:
    """One call of the pipeline for one shot. Works around what the call cannot do by itself, and nothing else."""
    # The pipeline looks for the final norm where transformers 4 kept it. A plain attribute, lest torch see a loop.
    object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    coefficients = pipeline_pia.prepare_mask_coef_by_statistics
    if shot.motion_curve is not None:
        curve = list(shot.motion_curve)
        padded = [*curve, *[curve[-1]] * shot.num_frames]

        def coefficients(num_frames: int, *_: Any) -> list[float]:
            return padded[:num_frames]

    with mock.patch.object(pipeline_pia, "prepare_mask_coef_by_statistics", coefficients):
        latents = pipe(
            image=shot.image,
            prompt=shot.prompt,
            negative_prompt=shot.negative_prompt,
            generator=torch.Generator("cpu").manual_seed(shot.seed),
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
        ).frames
    video = pipe.video_processor.postprocess_video(pipe.decode_latents(latents), output_type="pil")[0]
    return Truth(latents[0], np.stack([np.asarray(frame) for frame in video]))


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
