"""Prompt travel against single calls of the pipeline whose UNet gets another text for every frame, row by row."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from diffusers import PIAPipeline
from long_clips import by_brute_force, by_chain, by_whole_free_noise
from pipelines import assert_same, build, picture, shot, single_call, stock_engine
from travelling import embeddings, text_per_frame, truth_of, worst

from pia_batch.engine import PiaEngine, attention
from pia_batch.engine.prompt_travel import Mix, mixes
from pia_batch.errors import UnsupportedSettingError
from pia_batch.schema.key_prompts import KeyPrompt

TRAVELS = {0: "a red circle moving left", 3: "a blue square", 5: "two green stars on a hill"}

MIXED = [
    shot(1, prompt=None, prompts=TRAVELS, num_frames=8),
    shot(2, num_frames=8, prompt="a blue square"),
    shot(3, prompt=None, prompts=TRAVELS, num_frames=8, prompt_interpolation="slerp", prompt_hold=0.4, clip_skip=1),
    shot(4, num_frames=8, negative_prompts={0: "green", 4: "", 7: "blurred"}, guidance_scale=4.0, clip_skip=2),
    shot(5, prompt=None, prompts={0: "a", 7: "b"}, num_frames=8, prompt_interpolation="hold", guidance_scale=1.0),
    shot(6, prompt=None, prompts=TRAVELS, num_frames=8, loop=True, motion_scale=2, cond_frame=1, prompt_hold=1.0),
    shot(7, num_frames=8, guidance_scale=1.0, num_inference_steps=5),
    shot(8, prompt=None, prompts=[(0, "x"), (1, "y")], negative_prompts={0: "y", 6: "x"}, num_frames=8, strength=0.7),
]
"""Rows with and without travel, in everything that it depends on."""


@pytest.fixture(scope="module")
def pipe() -> PIAPipeline:
    return build()


@pytest.fixture(scope="module")
def engine(pipe: PIAPipeline) -> PiaEngine:
    return PiaEngine.from_pipeline(pipe)


@pytest.fixture(scope="module")
def truths(pipe: PIAPipeline) -> list[Any]:
    return [truth_of(pipe, row) for row in MIXED]


@pytest.mark.parametrize("order", [range(8), (3, 1, 0), (7, 6, 5, 4), (0, 5), (2,), (1, 6)], ids=str)
def test_every_row_of_a_mixed_batch_equals_the_stock_unet_with_a_text_for_every_frame(engine, truths, order):
    clips = engine.animate([MIXED[index] for index in order], keep_latents=True)

    for index, clip in zip(order, clips, strict=True):
        assert worst(clip, truths[index]) <= 1e-5


def test_rows_equal_it_where_the_unet_is_called_as_the_pipeline_calls_it(pipe, truths):
    clips = stock_engine(pipe).animate(MIXED, keep_latents=True)

    for clip, truth in zip(clips, truths, strict=True):
        assert worst(clip, truth) <= 1e-5


def test_a_single_key_prompt_is_that_prompt(pipe, engine):
    row = shot(11, prompt=None, prompts={0: "a blue square"}, num_frames=4)

    assert_same(
        engine.animate([row], keep_latents=True)[0],
        single_call(pipe, shot(11, prompt="a blue square", num_frames=4)),
    )


def test_keys_and_values_of_each_key_prompt_are_projected_once_and_rows_without_travel_have_no_mixture(pipe, engine):
    unet = pipe.unet
    projection = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k
    seen: list[int] = []
    hook = projection.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    try:
        texts = [torch.randn(1, 77, 16) for _ in range(3)]
        still = attention.text_states(unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2, texts[:1] * 4)
        assert seen == [1]
        assert still[1] is None
        assert attention.travelling(texts[:1] * 4) is None
    finally:
        hook.remove()
    moving = engine._prompts.encode_keys([KeyPrompt(0, "a"), KeyPrompt(3, "b")], 4).embedding
    states, keys = attention.text_states(unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2, [moving] * 5)
    assert keys is not None
    assert len(keys.keys) == 2
    assert len(states.keys) == 5


def test_it_is_exact_in_float64():
    pipe = build().to(torch.float64)
    engine = PiaEngine.from_pipeline(pipe)
    rows = [MIXED[0], MIXED[2], shot(9, num_frames=8)]

    for row, clip in zip(rows, engine.animate(rows, keep_latents=True), strict=True):
        truth = truth_of(pipe, row) if row.prompts else single_call(pipe, row)
        assert worst(clip, truth) <= 1e-10


def test_tokens_are_those_of_the_longest_prompt_and_any_may_be_truncated(engine):
    row = shot(1, prompt=None, prompts={0: "short", 2: "two yellow stars " * 40}, num_frames=4)

    clip = engine.animate([row])[0]

    assert clip.prompt_tokens == engine.animate([shot(1, prompt="two yellow stars " * 40)])[0].prompt_tokens
    assert clip.prompt_truncated


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": {1: "a"}}, "the first frame must be 0"),
        ({"prompts": {0: "a", 8: "b"}}, "frame 8 is not below num_frames 8"),
        ({"prompts": [(0, "a"), (0, "b")]}, "each frame may have one text"),
        ({"prompts": [(0, "a"), (4, "b"), (2, "c")]}, "the frames must rise"),
        ({"prompts": {0: "a", -1: "b"}}, "the first frame must be 0"),
        ({"prompts": {}}, "the first frame must be 0"),
        ({"prompts": "text"}, "frames with their texts"),
        ({"prompts": {0: 5}}, "frames with their texts"),
        ({"prompt": "a", "prompts": {0: "a", 1: "b"}}, "either prompt or prompts"),
        ({}, "either prompt or prompts"),
        ({"prompt": "a", "negative_prompts": {3: ""}}, "negative_prompts: the first frame must be 0"),
        ({"prompts": {0: "a", 2: "b"}, "prompt_hold": 1.5}, "prompt_hold 1.5 is not between 0 and 1"),
        ({"prompts": {0: "a", 2: "b"}, "prompt_interpolation": "cubic"}, "is none of linear, slerp, hold"),
    ],
    ids=str,
)
def test_key_prompts_that_cannot_be_are_an_error_of_their_row(engine, changed, message):
    good, bad = engine.animate([shot(1), shot(2, **({"prompt": None, "num_frames": 8} | changed))])

    assert good.error is None
    assert isinstance(bad.error, UnsupportedSettingError)
    assert message in str(bad.error)


def test_the_text_of_each_frame_follows_the_formulas():
    plain = {"interpolation": "linear", "hold": 0.0, "wraps": False, "cosine": lambda *_: 0.5}
    shares = [mix.share_after for mix in mixes([0, 4], 7, **plain)]
    assert shares == [0.0, 0.25, 0.5, 0.75, 0.0, 0.0, 0.0]
    assert mixes([0, 4], 7, **plain)[5] == Mix(1, 1, 1.0, 0.0)
    # round half to even, as Python does: 0 + round(4 x 0.625) = 2
    assert [mix.share_after for mix in mixes([0, 4], 5, **plain | {"hold": 0.625})] == [0, 0, 0, 0.5, 0]
    assert [mix.before for mix in mixes([0, 4], 5, **plain | {"hold": 1.0})] == [0, 0, 0, 0, 1]
    assert [mix.before for mix in mixes([0, 4], 6, **plain | {"interpolation": "hold"})] == [0, 0, 0, 0, 1, 1]
    assert [mix[:2] for mix in mixes([0, 2], 4, **plain | {"wraps": True})] == [(0, 0), (0, 1), (1, 1), (1, 0)]
    turned = mixes([0, 4], 5, **plain | {"interpolation": "slerp"})[2]
    assert turned.share_before == pytest.approx(turned.share_after)
    assert turned.share_before == pytest.approx(3**-0.5)  # sin 30 / sin 60 degrees
    near = plain | {"interpolation": "slerp", "cosine": lambda *_: 0.9996}
    assert mixes([0, 4], 5, **near) == mixes([0, 4], 5, **plain)


def test_a_window_has_the_text_of_its_frames(engine):
    travel = engine._prompts.encode_keys([KeyPrompt(0, "a"), KeyPrompt(3, "b")], 6).embedding

    part = travel.part([4, 5, 0, 1, 9])

    assert torch.equal(part.embeddings(), travel.embeddings()[[4, 5, 0, 1, 5]])
    assert part.texts is travel.texts


LONG = {0: "a red circle", 5: "a blue square", 19: "two green stars on a hill"}
WINDOWS: dict[str, Any] = {"num_frames": 20, "context": "windows", "context_length": 8, "context_overlap": 3}


@torch.no_grad()
def texts_of(pipe: PIAPipeline, row: Any) -> tuple[torch.Tensor, torch.Tensor]:
    positive = embeddings(pipe, row, list(row.prompt_keys), row.clip_skip)
    return positive, embeddings(pipe, row, list(row.negative_keys), None)


def plain(row: Any) -> Any:
    return dataclasses.replace(row, prompt="", prompts=None, negative_prompts=None)


@pytest.mark.long
def test_every_window_of_a_long_clip_has_the_texts_of_its_frames(pipe, engine):
    rows = [
        shot(1, prompt=None, prompts=LONG, **WINDOWS),
        shot(2, num_frames=8, context_length=8),
        shot(3, prompt=None, prompts=LONG, loop=True, prompt_interpolation="slerp", **WINDOWS),
        shot(
            4,
            negative_prompts={0: "green", 11: "red"},
            prompt="a star",
            prompt_hold=0.5,
            **WINDOWS | {"num_frames": 13},
        ),
    ]

    clips = engine.animate(rows, keep_latents=True)

    for row, clip in zip(rows, clips, strict=True):
        if row.num_frames == 8:
            assert worst(clip, single_call(pipe, row)) <= 1e-5
        else:
            assert worst(clip, by_brute_force(pipe, plain(row), texts_of(pipe, row))) <= 1e-5
    stock = stock_engine(pipe).animate(rows[:1], keep_latents=True)[0]
    assert worst(stock, by_brute_force(pipe, plain(rows[0]), texts_of(pipe, rows[0]))) <= 1e-5


def test_free_noise_has_the_texts_of_every_frame(pipe, engine):
    row = shot(5, prompt=None, prompts={0: "a", 9: "b"}, context="freenoise", num_frames=12, context_length=6)

    positive, negative = texts_of(pipe, row)
    stock = build()
    with text_per_frame(stock.unet, torch.cat([negative, positive])):
        truth = by_whole_free_noise(stock, plain(row))

    assert worst(engine.animate([row], keep_latents=True)[0], truth) <= 1e-5


def test_the_pieces_of_a_chain_have_the_texts_of_their_frames(pipe, engine):
    row = shot(6, prompt=None, prompts={0: "a", 9: "b"}, context="chain", num_frames=14, context_length=6)
    positive, negative = texts_of(pipe, row)

    def of_piece(frames: range) -> Any:
        chosen = [min(frame, 13) for frame in frames]
        return text_per_frame(pipe.unet, torch.cat([negative[chosen], positive[chosen]]))

    truth = by_chain(pipe, plain(row), of_piece)

    assert worst(engine.animate([row], keep_latents=True)[0], truth) <= 1e-5


def test_the_image_of_a_row_that_travels_changes_with_its_texts(engine):
    """Without this, every other test would hold for texts that nothing reads."""
    row = MIXED[0]
    other = dataclasses.replace(row, prompts={**dict(row.prompts), 5: "a"})
    one, two = engine.animate([row, other], keep_latents=True)

    assert float((one.latents - two.latents).abs().max()) > 1e-3
    assert copy.copy(row).prompts == tuple(KeyPrompt(*pair) for pair in TRAVELS.items())
    assert picture(1).size == row.image.size
