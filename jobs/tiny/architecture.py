"""Architecture of the embedded model: networks with random weights, saved as a diffusers folder.

`python jobs/tiny/architecture.py OUT` writes the untrained checkpoint; `jobs/tiny/train.py` trains it. The folder
has the layout of Stable Diffusion 1.5 with PIA's motion adapter inside, every weight in float16.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import tokenizers
import torch
import world
from diffusers import AutoencoderKL, DDIMScheduler, MotionAdapter, UNet2DConditionModel, UNetMotionModel
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable

CHANNELS = (32, 64, 112)
"""Channels of the denoiser at 16 x 16, 8 x 8 and 4 x 4 latents."""

LATENT_CHANNELS = 4
TEXT_TOKENS = 20
"""Number of tokens of a prompt, start and end markers included; longer prompts are truncated."""

TEXT_CHANNELS = 64
SHRINK = 4
"""Pixels per latent on each side."""

_NORM_GROUPS = 8
_HEADS = (1, 2, 4)
_START, _END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Networks:
    """All parts of a checkpoint."""

    unet: UNet2DConditionModel
    motion_adapter: MotionAdapter
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler

    def save(self, folder: Path) -> None:
        """Write a folder that `PIAPipeline.from_pretrained(folder, motion_adapter=...)` loads, weights in float16."""
        parts = {
            "unet": self.unet,
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "motion_adapter": self.motion_adapter,
        }
        for name, part in parts.items():
            part.half().save_pretrained(folder / name, safe_serialization=True)
            part.float()
            _tidy(folder / name / "config.json")
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()  # otherwise the settings of the last call would be saved, too
        backend.no_truncation()
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.scheduler.save_pretrained(folder / "scheduler")
        (folder / "model_index.json").write_text(json.dumps(_MODEL_INDEX, indent=2) + "\n", encoding="utf-8")


_MODEL_INDEX: dict[str, Any] = {
    # The class is Stable Diffusion's and not PIA's, as in every folder that PIAPipeline loads: the loading pipeline
    # class decides, and creates a UNetMotionModel from the plain UNet.
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def build(seed: int = 0) -> Networks:
    """Return all networks with random weights; equal seeds give equal weights."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(captions(seed, 20_000))
    unet = UNet2DConditionModel(
        sample_size=world.SIDE // SHRINK,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=CHANNELS,
        # A direction is one word for the whole image, but only at 8 x 8 can two shapes be distinguished.
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_CHANNELS,
        attention_head_dim=_HEADS,
        norm_num_groups=_NORM_GROUPS,
    )
    adapter = MotionAdapter(
        block_out_channels=CHANNELS,
        motion_layers_per_block=1,
        # No attention over frames at 16 x 16: 8 x 8 and 4 x 4 decide the motion, and it would cost a third more.
        motion_transformer_layers_per_block=(0, 1, 1),
        motion_num_attention_heads=_HEADS,
        motion_norm_num_groups=_NORM_GROUPS,
        motion_max_seq_length=32,
        use_motion_mid_block=True,
        conv_in_channels=2 * LATENT_CHANNELS + 1,
    )
    _start_small(unet, adapter)
    return Networks(unet, adapter, build_vae(), build_text_encoder(tokenizer), tokenizer, build_scheduler())


def build_vae() -> AutoencoderKL:
    """Return a VAE: 64 x 64 pixels to 16 x 16 latents of 4 channels, near mean 0 and variance 1 without scaling."""
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=0,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=_NORM_GROUPS,
        sample_size=world.SIDE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    narrow_posterior(vae)
    return vae


def narrow_posterior(vae: AutoencoderKL) -> None:
    """Make the encoding deterministic: the pipeline samples it, and a log-variance of -12 makes all samples equal."""
    with torch.no_grad():
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0
        vae.quant_conv.bias[LATENT_CHANNELS:] = -12


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return CLIP's text tower with two layers of 64 channels."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_CHANNELS,
        intermediate_size=4 * TEXT_CHANNELS,
        projection_dim=TEXT_CHANNELS,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    encoder = CLIPTextModel(config)
    # CLIP initialises its embeddings with values so small that all words begin with almost the same vector.
    nn.init.normal_(encoder.get_input_embeddings().weight, std=0.5)
    return encoder


def build_scheduler() -> DDIMScheduler:
    """Return a scheduler with pure noise at its end, from which v-prediction with trailing steps can sample.

    At the clean end, betas are far larger than Stable Diffusion's. The conditions alone decide a clip of this world, so
    steps that only refine details would be wasted: with eight steps, each still shapes the clip.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.004,
        beta_end=0.008,
        beta_schedule="linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
    )


def build_tokenizer(texts: Iterable[str]) -> CLIPTokenizer:
    """Return CLIP's byte-level BPE, trained on `texts`; any other text is split into smaller pieces, never dropped."""
    bpe = tokenizers.Tokenizer(models.BPE(unk_token=_END, continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                tokenizers.Regex(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""),
                behavior="removed",
                invert=True,
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1024, min_frequency=2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        bpe.save(f"{folder}/tokenizer.json")
        trained = json.loads(Path(folder, "tokenizer.json").read_text(encoding="utf-8"))["model"]
    # CLIP's order: bytes, bytes that end a word, merges, start and end markers. All bytes are kept.
    merges = [tuple(pair) for pair in trained["merges"]]
    words = [*alphabet, *(f"{byte}</w>" for byte in alphabet)]
    words += [word for word in dict.fromkeys("".join(pair) for pair in merges) if word not in set(words)]
    vocabulary = {word: index for index, word in enumerate([*words, _START, _END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_TOKENS, pad_token=_END)


def with_denoiser(networks: Networks, denoiser: UNetMotionModel) -> Networks:
    """Return the networks with the weights of a motion UNet, split into image UNet and motion adapter."""
    assert networks.motion_adapter.conv_in is not None  # noqa: S101 - for the type checker
    weights = denoiser.state_dict()
    networks.motion_adapter.conv_in.load_state_dict(
        {"weight": weights["conv_in.weight"], "bias": weights["conv_in.bias"]}
    )
    weights["conv_in.weight"] = weights["conv_in.weight"][:, :LATENT_CHANNELS]
    for part in (networks.unet, networks.motion_adapter):
        own = {name: weights[name] for name in part.state_dict() if name in weights and not name.startswith("conv_in.")}
        part.load_state_dict(own, strict=False)
    networks.unet.conv_in.load_state_dict({"weight": weights["conv_in.weight"], "bias": weights["conv_in.bias"]})
    return networks


def captions(seed: int, count: int) -> list[str]:
    """Return `count` prompts of the world."""
    rng = np.random.default_rng(seed)
    return [world.random_case(rng).prompt for _ in range(count)]


def _start_small(unet: UNet2DConditionModel, adapter: MotionAdapter) -> None:
    """Initialise the networks as an image model that depends on the motion scale.

    Motion modules start as identity, as in AnimateDiff. The mask coefficients of the presets differ by a few hundredths
    only. So their input weights start ten times larger, at the kernel's centre only, around the coefficients' mean.
    """
    assert adapter.conv_in is not None  # noqa: S101 - for the type checker
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "proj_out" in name:
                parameter.zero_()
        mask = adapter.conv_in.weight[:, LATENT_CHANNELS]
        mask.zero_()
        mask[:, 1, 1] = torch.randn(len(mask)) * 4
        adapter.conv_in.bias -= 0.8 * mask[:, 1, 1]
        # The pipeline takes these weights from the UNet and the other weights of its first layer from the adapter.
        unet.conv_in.weight.copy_(adapter.conv_in.weight[:, :LATENT_CHANNELS])
        unet.conv_in.bias.copy_(adapter.conv_in.bias)


def _tidy(path: Path) -> None:
    """Remove paths of the current machine from a config."""
    config = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _main() -> None:
    parser = argparse.ArgumentParser(description="Write the checkpoint with random weights.")
    parser.add_argument("out", type=Path, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: %(default)s)")
    arguments = parser.parse_args()
    build(arguments.seed).save(arguments.out)


if __name__ == "__main__":
    _main()
