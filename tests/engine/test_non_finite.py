"""NaN and infinity from any source: the row fails alone, and the other rows of its batch are not affected."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ip_adapters
import pytest
import torch
from diffusers import PIAPipeline
from pipelines import build, picture, shot

from pia_batch.engine import Clip, PiaEngine, Shot, loading
from pia_batch.engine.loading import Components
from pia_batch.errors import NonFiniteError

_MARK = 0.123
"""In a row's motion curve, by which a UNet tells its samples from others."""

_SIZES = 4


@pytest.fixture(scope="module")
def pipe(tmp_path_factory) -> PIAPipeline:
    """With an IP-Adapter, and a token that has no finite embedding."""
    pipe = build()
    ip_adapters.load(pipe, ip_adapters.write(tmp_path_factory.mktemp("adapter")))
    token = pipe.tokenizer("7").input_ids[1]
    pipe.text_encoder.get_input_embeddings().weight.data[token] = torch.nan
    return pipe


class Fake:
    """A network in place of another."""

    def __init__(self, network: Any) -> None:
        self.network = network

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return type(self)(copy.deepcopy(self.network, memo))


class BlindVae(Fake):
    """Knows no latents of dark images."""

    def encode(self, images: torch.Tensor) -> Any:
        latents = self.network.encode(images).latent_dist
        if images.max() < 0:
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=latents.mean, std=latents.std * torch.inf))
        return SimpleNamespace(latent_dist=latents)


class BlindEncoder(Fake):
    """Knows no embedding of dark images."""

    def __call__(self, pixels: torch.Tensor, **options: Any) -> Any:
        embeds = self.network(pixels, **options).image_embeds
        return SimpleNamespace(image_embeds=embeds * torch.nan if pixels.max() < 0 else embeds)


class FaultyUnet(Fake):
    """Predicts one NaN in the first sample of the marked row, in its first step only."""

    def __init__(self, network: Any) -> None:
        super().__init__(network)
        self.saw: list[int] = []

    def __call__(self, samples: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        predicted = self.network(samples, *args, **kwargs)
        marked = (samples[:, 4, 0, 0, 0] - _MARK).abs().lt(1e-3).nonzero().flatten().tolist()
        self.saw.append(int(samples.isnan().flatten(1).any(dim=1).sum()))
        if marked and len(self.saw) == 1:
            predicted.sample[marked[0], 0, 0, 0, 0] = torch.nan
        return predicted


DARK = picture().point(lambda value: value // 9)

SOURCES: dict[str, tuple[dict[str, Any], Callable[[Components], dict[str, Any]], str]] = {
    "prompt": ({"prompt": "a 7"}, lambda _: {}, "text encoder's embedding"),
    "negative prompt": ({"negative_prompt": "a 7"}, lambda _: {}, "text encoder's embedding"),
    "image": ({"image": DARK}, lambda parts: {"vae": BlindVae(parts.vae)}, "VAE's latents of the image"),
    "image prompt": (
        {"ip_adapter_image": DARK},
        lambda parts: {"image_encoder": BlindEncoder(parts.image_encoder)},
        "embedding of the image prompt",
    ),
    "guided noise": ({"motion_curve": (_MARK,)}, lambda parts: {"unet": FaultyUnet(parts.unet)}, "denoised latents"),
    "noise": (
        {"motion_curve": (_MARK,), "guidance_scale": 1.0},
        lambda parts: {"unet": FaultyUnet(parts.unet)},
        "denoised latents",
    ),
}
"""Sources of NaN: the unusual setting of the bad row, the networks that cause NaN, and the error message."""


def good(seed: int) -> Shot:
    return shot(seed, guidance_scale=1.0 if seed % 2 else 3.0, num_inference_steps=2 + seed % 2)


def draw(engine: PiaEngine, shots: list[Shot]) -> list[Clip]:
    return engine.animate(shots, keep_latents=True)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("position", range(_SIZES))
def test_a_row_of_nan_fails_alone_at_every_position_of_a_batch(pipe, source, position):
    odd, fakes, message = SOURCES[source]
    parts = loading.adopt(pipe)
    engine = PiaEngine(dataclasses.replace(parts, **fakes(parts)), lambda: "faulty")
    rows = [good(seed) for seed in range(_SIZES)]
    bad = dataclasses.replace(shot(9), **odd)
    without = draw(engine, rows[:position] + rows[position + 1 :])
    if isinstance(engine._parts.unet, FaultyUnet):
        engine._parts.unet.saw.clear()

    clips = draw(engine, [*rows[:position], bad, *rows[position + 1 :]])

    failed = clips.pop(position)
    assert isinstance(failed.error, NonFiniteError)
    with pytest.raises(NonFiniteError, match=message):
        _ = failed.frames
    for clip, alone in zip(clips, without, strict=True):
        assert clip.error is None
        assert torch.allclose(clip.latents, alone.latents, rtol=0, atol=1e-5)


def test_nan_in_a_sample_of_a_unet_call_stays_in_that_sample(pipe):
    parts = loading.adopt(pipe)
    unet = FaultyUnet(parts.unet)
    engine = PiaEngine(dataclasses.replace(parts, unet=unet), lambda: "faulty")
    rows = [good(0), shot(9, motion_curve=(_MARK,)), good(2)]

    clips = draw(engine, rows)

    assert unet.saw == [0, 2, 2]  # both samples of the guided row, from its second step on, beside sound ones
    assert [clip.error is None for clip in clips] == [True, False, True]


def test_a_failed_row_still_says_how_much_of_its_prompt_was_read(pipe):
    clip = PiaEngine.from_pipeline(pipe).animate([shot(1, prompt="a 7")])[0]

    assert clip.prompt_tokens == 4


class OverflowingVae(Fake):
    """Encodes to infinity in half precision."""

    def encode(self, images: torch.Tensor) -> Any:
        latents = self.network.encode(images).latent_dist
        overflows = torch.inf if images.dtype == torch.float16 else 1.0
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=latents.mean * overflows, std=latents.std))

    def float(self) -> OverflowingVae:
        self.network.float()
        return self


def test_an_image_that_overflows_half_precision_is_encoded_again_in_float32():
    parts = loading.adopt(build().to(torch.float16))
    engine = PiaEngine(dataclasses.replace(parts, vae=OverflowingVae(parts.vae)), lambda: "overflowing")
    sound = PiaEngine(parts, lambda: "sound")

    clip, expected = (draw(each, [shot(1)])[0] for each in (engine, sound))

    assert clip.error is None
    assert (clip.latents - expected.latents).abs().max() < 0.05
    assert parts.vae.dtype == torch.float16  # the copy was cast, not the network
