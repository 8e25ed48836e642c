"""LoRAs, textual inversions and FreeU against the stock pipeline with the same adapters, and files that do not fit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import ip_adapters
import numpy as np
import peft
import pytest
import torch
from diffusers import PIAPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_files import matrices, of_style, stock_with, write_lora
from pipelines import build, save, shot, single_call, stock_engine
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from pia_batch.config import (
    FreeUConfig,
    IpAdapterConfig,
    LoraConfig,
    ModelConfig,
    SchedulerConfig,
    TextualInversionConfig,
)
from pia_batch.engine import PiaEngine, adapters
from pia_batch.errors import ConfigError
from pia_batch.weights import lora_files
from pia_batch.weights.components import Component

ROWS = [
    shot(1, num_inference_steps=2),
    shot(2, num_inference_steps=3, strength=0.7, clip_skip=1, motion_scale=4, negative_prompt="green"),
]


def component(path: Path) -> Component:
    return Component(path.parent, None, (path.name,), None, "single_file")


def personalised(
    loras: list[tuple[Path, float]] | None = None,
    inversions: list[tuple[Path, str | None]] | None = None,
    freeu: FreeUConfig | None = None,
    fuse: bool = False,
    pipe: PIAPipeline | None = None,
) -> PIAPipeline:
    """The pipeline of `build`, with adapters applied by the code under test."""
    loras, inversions = loras or [], inversions or []
    model = ModelConfig(
        loras=tuple(LoraConfig(source=str(path), scale=scale) for path, scale in loras),
        fuse_loras=fuse,
        textual_inversions=tuple(TextualInversionConfig(source=str(path), token=word) for path, word in inversions),
        freeu=freeu,
    )
    found = adapters.read(model, [component(path) for path, _ in loras], [component(path) for path, _ in inversions])
    pipe = pipe or build()
    found.apply_to_tokenizer(pipe.tokenizer)
    found.apply_to_text_encoder(pipe.text_encoder, pipe.tokenizer)
    found.apply_to_unet(pipe.unet)
    return pipe


def assert_draws_as(stock: PIAPipeline, ours: PIAPipeline, rows: list[Any] = ROWS) -> None:
    """Equal to the last bit by the UNet's own call, within 1e-5 in a mixed batch; and different from no adapters."""
    engine, called = PiaEngine.from_pipeline(ours), stock_engine(ours)
    together = engine.animate(rows, keep_latents=True)
    for row, clip in zip(rows, together, strict=True):
        truth = single_call(stock, row)
        alone = called.animate([row], keep_latents=True)[0]
        assert torch.equal(alone.latents, truth.latents)
        assert np.array_equal(alone.frames, truth.frames)
        assert float((clip.latents - truth.latents).abs().max()) <= 1e-5
    without = PiaEngine.from_pipeline(build()).animate(rows[:1], keep_latents=True)[0]
    assert not torch.allclose(together[0].latents, without.latents, atol=1e-3)


# --- LoRAs -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("layout", ["kohya", "peft", "diffusers"])
@pytest.mark.parametrize("fuse", [False, True])
def test_a_lora_of_any_layout_draws_as_in_the_stock_pipeline(tmp_path, layout, fuse):
    lora = write_lora(tmp_path / "style.safetensors", layout, alpha=lambda _: 1.0)

    assert_draws_as(stock_with((lora, 0.8), fuse=fuse), personalised([(lora, 0.8)], fuse=fuse))


@pytest.mark.parametrize("fuse", [False, True])
def test_several_loras_are_weighed_each_by_its_scale(tmp_path, fuse):
    one = write_lora(tmp_path / "one.safetensors", "kohya", text=lambda _: False, alpha=lambda _: 4.0)
    two = write_lora(tmp_path / "two.safetensors", "peft", unet=lambda name: of_style(name) and "down" in name, rank=3)
    loras = [(one, 0.5), (two, -1.5)]

    assert_draws_as(stock_with(*loras, fuse=fuse), personalised(loras, fuse=fuse))


def test_a_lora_of_convolutions_draws_as_in_the_stock_pipeline(tmp_path):
    lora = write_lora(
        tmp_path / "conv.safetensors", "kohya", lambda name: "resnets" in name and "conv" in name, lambda _: False
    )

    assert_draws_as(stock_with((lora, 1.0)), personalised([(lora, 1.0)]))


def test_a_lora_of_the_motion_modules_draws_as_in_the_stock_pipeline(tmp_path):
    lora = write_lora(
        tmp_path / "zoom.safetensors",
        "peft",
        lambda name: "motion_modules" in name and name.endswith(("to_q", "to_v")),
        lambda _: False,
    )

    assert_draws_as(stock_with((lora, 1.0)), personalised([(lora, 1.0)]))


def test_what_diffusers_cannot_call_unless_it_is_merged_is_merged(tmp_path):
    def projections(name: str) -> bool:
        return "motion_modules" in name and "proj_out" in name

    peft_file, kohya_file = (write_lora(tmp_path / layout, layout, projections) for layout in ("peft", "kohya"))
    stock = stock_with((peft_file, 1.0), fuse=True)
    stock.unload_lora_weights()

    for path in (peft_file, kohya_file):
        merged = personalised([(path, 1.0)], fuse=True)
        assert_draws_as(stock, merged)
        wanted = merged.unet.state_dict()
        for name, tensor in personalised([(path, 1.0)], fuse=False).unet.state_dict().items():
            assert torch.allclose(tensor, wanted[name], rtol=0, atol=1e-6)


def test_a_style_leaves_the_motion_modules_as_they_are(tmp_path):
    lora = write_lora(tmp_path / "style.safetensors", "kohya")
    before = build().unet.state_dict()

    after = personalised([(lora, 1.0)], fuse=True).unet.state_dict()

    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    assert not [name for name in changed if "motion_modules" in name]
    assert after.keys() == before.keys()


def test_every_layer_counts_by_its_own_alpha_and_rank(tmp_path):
    """Alphas as kohya defines them. The stock loader gives the most frequent alpha to layers that have others."""
    path = write_lora(tmp_path / "alphas.safetensors", "kohya", alpha=lambda index: 0.5 + index % 5)
    by_hand = build()
    index = 0
    for network, chosen, seed in ((by_hand.unet, of_style, 0), (by_hand.text_encoder, lambda _: True, 1)):
        for name, (down, up) in matrices(network, chosen, seed=seed).items():
            weight = network.get_submodule(name).weight
            weight += ((0.5 + index % 5) / 2 * up.flatten(1) @ down.flatten(1)).view_as(weight)
            index += 1

    for fuse in (False, True):
        engine = PiaEngine.from_pipeline(personalised([(path, 1.0)], fuse=fuse))
        for row, clip in zip(ROWS, engine.animate(ROWS, keep_latents=True), strict=True):
            assert torch.allclose(clip.latents, single_call(by_hand, row).latents, rtol=0, atol=2e-5)


def test_a_lora_of_half_precision_is_applied_in_the_precision_of_the_networks(tmp_path):
    lora = write_lora(tmp_path / "style.safetensors", "peft")
    half = {name: tensor.half() for name, tensor in load_file(lora).items()}
    save_file(half, tmp_path / "half.safetensors")
    stock = stock_with((tmp_path / "half.safetensors", 1.0))
    stock.unet.to(torch.float32)

    assert_draws_as(stock, personalised([(tmp_path / "half.safetensors", 1.0)]))


_PROJ_IN = "lora_unet_mid_block_attentions_0_proj_in."


def test_a_lora_with_peft_s_own_record_draws_as_in_the_stock_pipeline(tmp_path):
    trained = build()
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_k", "to_v"], init_lora_weights=False)
    torch.manual_seed(3)
    trained.unet.add_adapter(config)
    PIAPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(trained.unet),
        unet_lora_adapter_metadata=config.to_dict(),
    )
    lora = tmp_path / "pytorch_lora_weights.safetensors"

    ours = personalised([(lora, 1.0)])

    assert {layer.scaling["lora0"] for layer in ours.unet.modules() if hasattr(layer, "scaling")} == {3.0}
    assert_draws_as(stock_with((lora, 1.0)), ours)


@pytest.mark.parametrize("record", ["{", "[1]", '{"unet.r": 2, "unet.warp": 9}'])
def test_a_broken_record_of_peft_is_a_config_error(tmp_path, record):
    path = write_lora(tmp_path / "style.safetensors", "peft")
    save_file(load_file(path), path, {"lora_adapter_metadata": record})

    with pytest.raises(ConfigError, match=r"style\.safetensors"):
        personalised([(path, 1.0)])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no LoRA"),
        ({"weight": (2, 2)}, "not belong to a network of Stable Diffusion 1.5"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (2, 16)}, "SDXL"),
        ({"transformer.blocks.0.to_q.lora_A.weight": (2, 16)}, "another family"),
        ({"mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": (2, 32)}, "one of the two"),
        ({"unet.mid_block.attentions.9.proj_in.lora_A.weight": (2, 32)}, "mid_block.attentions.9.proj_in.*not a layer"),
        ({"lora_unet_input_blocks_90_1_proj_in.lora_down.weight": (2, 32)}, "input_blocks_90_1_proj_in.*not a layer"),
        (
            {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (2, 32, 1, 1)},
            "one of the two matrices is missing",
        ),
        ({"lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": (2, 2)}, "matrix of its LoHa is missing"),
        ({"lora_unet_mid_block_attentions_0_proj_in.oft_blocks": (2, 2, 2)}, "OFT"),
        ({"unet.mid_block.attentions.0.proj_in.dora_scale": (2, 2)}, "DoRA"),
        (
            {
                "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (2, 640, 1, 1),
                "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": (640, 2, 1, 1),
            },
            r"\(2, 640, 1, 1\) .*expected \(2, 32, 1, 1\)",
        ),
        ({_PROJ_IN + "lora_down.weight": (), _PROJ_IN + "lora_up.weight": ()}, r"got \(\) and \(\)"),
        ({_PROJ_IN + "lora_down.weight": (0, 32, 1, 1), _PROJ_IN + "lora_up.weight": (32, 0, 1, 1)}, "its rank is 0"),
        (
            {
                _PROJ_IN + "lora_down.weight": (2, 32, 1, 1),
                _PROJ_IN + "lora_up.weight": (32, 2, 1, 1),
                _PROJ_IN + "alpha": (2,),
            },
            "alpha must be one number",
        ),
    ],
    ids=str,
)
def test_a_lora_that_does_not_fit_is_a_config_error_that_names_the_file(tmp_path, tensors, message):
    path = tmp_path / "strange.safetensors"
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, path)

    with pytest.raises(ConfigError, match=message) as raised:
        personalised([(path, 1.0)])
    assert str(path) in str(raised.value)


PIECES = (
    *("unet.", "lora_unet_", "lora_te_", "text_encoder.", "lora_te2_", "proj_in", ".processor.to_q_lora"),
    *(".lora_linear_layer", ".lora_A", ".lora_down", ".down", ".alpha", ".weight", ".hada_w1_a", "."),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(key=st.text(max_size=12) | st.lists(st.sampled_from(PIECES), max_size=7).map("".join))
def test_every_key_is_understood_or_refused_by_its_name(key):
    try:
        content = lora_files.contents({key: (2, 2)}, "some.safetensors")
    except ConfigError as err:
        assert repr(key) in str(err) or "holds no LoRA" in str(err)  # noqa: PT017 - either outcome is right
    else:
        (network,) = content.layers
        ((layer, roles),) = content.layers[network].items()
        assert network in ("unet", "text_encoder")
        assert list(roles.values()) == [key]
        assert len(layer) <= len(key)


@pytest.mark.parametrize("network", ["lora_unet", "lora_te"])
def test_one_strange_key_among_good_ones_is_not_dropped(tmp_path, network):
    path = write_lora(tmp_path / "style.safetensors", "kohya")
    save_file(load_file(path) | {f"{network}_nowhere.lora_down.weight": torch.ones(2, 2)}, path)

    with pytest.raises(ConfigError, match="'nowhere'"):
        personalised([(path, 1.0)])


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x80\x04."])
def test_a_file_that_is_no_safetensors_is_a_config_error(tmp_path, content):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=r"cannot read .*broken\.safetensors"):
        personalised([(path, 1.0)])
    with pytest.raises(ConfigError, match=r"cannot read .*broken\.safetensors"):
        personalised(inversions=[(path, "<cat>")])


# --- textual inversions ----------------------------------------------------------------------------------------------


def write_inversion(path: Path, key: str = "<cat>", vectors: int | None = None, size: int = 16) -> Path:
    shape = (size,) if vectors is None else (vectors, size)
    save_file({key: torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))}, path)
    return path


def stock_with_words(*inversions: tuple[Path, str | None]) -> PIAPipeline:
    pipe = build()
    for path, word in inversions:
        pipe.load_textual_inversion(str(path), token=word)
    return pipe


CAT_ROWS = [
    shot(1, prompt="a <cat> jumping", num_inference_steps=2),
    shot(2, prompt="a red circle", negative_prompt="<cat>, green", num_inference_steps=1),
    shot(3, prompt="<cat>" * 40, clip_skip=1, num_inference_steps=1),
]


@pytest.mark.parametrize(
    ("key", "vectors", "word"),
    [("<cat>", None, None), ("<cat>", 1, None), ("<cat>", 3, None), ("<dog>", 2, "<cat>"), ("emb_params", 4, "<cat>")],
)
def test_a_textual_inversion_draws_as_in_the_stock_pipeline(tmp_path, key, vectors, word):
    path = write_inversion(tmp_path / "cat.safetensors", key, vectors)

    assert_draws_as(stock_with_words((path, word)), personalised(inversions=[(path, word)]), CAT_ROWS)


def test_several_textual_inversions_and_a_lora_draw_as_in_the_stock_pipeline(tmp_path):
    cat = write_inversion(tmp_path / "cat.safetensors", vectors=2)
    dog = write_inversion(tmp_path / "dog.safetensors", "emb_params")
    lora = write_lora(tmp_path / "style.safetensors", "kohya", alpha=lambda _: 1.0)
    stock = stock_with_words((cat, None), (dog, "spot"))
    stock.load_lora_weights(str(lora), adapter_name="style")
    ours = personalised([(lora, 1.0)], [(cat, None), (dog, "spot")])

    assert_draws_as(
        stock, ours, [shot(1, prompt="a <cat> and a spot"), shot(2, prompt="spot", negative_prompt="<cat>")]
    )


def test_a_word_of_several_vectors_is_found_whatever_its_case(tmp_path):
    """The stock pipeline reads its first vector alone where the tokenizer lower-cases the word."""
    path = write_inversion(tmp_path / "cat.safetensors", vectors=3)
    lower, upper = (PiaEngine.from_pipeline(personalised(inversions=[(path, word)])) for word in ("<cat>", "BadCat"))

    one = lower.animate([shot(1, prompt="a <cat> jumping")], keep_latents=True)[0]
    two = upper.animate([shot(1, prompt="a BadCat jumping")], keep_latents=True)[0]

    assert one.prompt_tokens == two.prompt_tokens == 7
    assert torch.equal(one.latents, two.latents)


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize(("word", "written"), [("badcat", "BadCat"), ("BadCat", "badcat"), ("BadCat", "BADCAT")])
def test_a_word_is_found_in_a_prompt_of_another_case(tmp_path, vectors, word, written):
    path = write_inversion(tmp_path / "cat.safetensors", vectors=vectors)
    engine = PiaEngine.from_pipeline(personalised(inversions=[(path, word)]))

    for text in ("a {} jumping", "{}, red", "({})"):
        same, other = (
            engine.animate([shot(1, prompt=text.format(each))], keep_latents=True)[0] for each in (word, written)
        )
        plain = engine.animate([shot(1, prompt=text.format("bad cats"))], keep_latents=True)[0]
        assert same.prompt_tokens == other.prompt_tokens
        assert torch.equal(same.latents, other.latents)
        assert not torch.equal(same.latents, plain.latents)


def test_two_words_that_differ_in_case_alone_keep_their_own_vectors(tmp_path):
    one, two = (write_inversion(tmp_path / f"{k}.safetensors", vectors=k) for k in (2, 3))
    engine = PiaEngine.from_pipeline(personalised(inversions=[(one, "BadCat"), (two, "badcat")]))

    counts = [engine.animate([shot(1, prompt=each)])[0].prompt_tokens for each in ("BadCat", "badcat")]

    assert counts == [4, 5]


ART = [("art", 2), ("artist", 3), ("Art_x", 4), ("artistic", 1), ("<a>", 2), ("<a_1>", 3)]
"""Words with their numbers of vectors; some are inside others."""


@pytest.mark.long
def test_a_word_inside_another_one_leaves_it_whole(tmp_path):
    """diffusers replaces the words of a prompt in an order that changes from process to process."""
    paths = [write_inversion(tmp_path / f"{k}.safetensors", vectors=n) for k, (_, n) in enumerate(ART)]
    files = [(path, word) for path, (word, _) in zip(paths, ART, strict=True)]
    every, reverse = (PiaEngine.from_pipeline(personalised(inversions=each)) for each in (files, files[::-1]))

    for (path, word), (_, count) in zip(files, ART, strict=True):
        alone = PiaEngine.from_pipeline(personalised(inversions=[(path, word)]))
        for written in (word, word.upper()):
            clips = [each.animate([shot(1, prompt=written)], keep_latents=True)[0] for each in (alone, every, reverse)]
            assert [clip.prompt_tokens for clip in clips] == [count + 2] * 3
            assert torch.equal(clips[0].latents, clips[1].latents)
            assert torch.equal(clips[0].latents, clips[2].latents)
    for prompt, count in {
        "art, artist": 6,
        "artist art ARTIST": 8,
        "artistic artist": 4,
        "<a><a_1>": 5,
        "artart": 4,
    }.items():
        assert {each.animate([shot(1, prompt=prompt)])[0].prompt_tokens for each in (every, reverse)} == {count + 2}


def test_words_that_a_stock_pipeline_loaded_draw_as_there(tmp_path):
    files = [(write_inversion(tmp_path / f"{k}.safetensors", vectors=k), f"<{k}cat>") for k in (1, 2, 3)]

    rows = [shot(1, prompt="a <2cat> and <3cat>, <1cat>", num_inference_steps=1), shot(2, prompt="<3CAT>")]
    assert_draws_as(stock_with_words(*files), stock_with_words(*files), rows)


def test_the_word_of_a_file_that_names_none_must_be_set(tmp_path):
    path = write_inversion(tmp_path / "easy.safetensors", "emb_params")

    with pytest.raises(ConfigError, match=r"easy\.safetensors does not name its word.*`token`"):
        personalised(inversions=[(path, None)])


@pytest.mark.parametrize("word", ["red</w>", "<|endoftext|>"])
def test_a_word_of_the_vocabulary_cannot_be_taken(tmp_path, word):
    path = write_inversion(tmp_path / "cat.safetensors")

    with pytest.raises(ConfigError, match=r"cat\.safetensors: .*already in the tokenizer's vocabulary"):
        personalised(inversions=[(path, word)])


def test_two_textual_inversions_cannot_share_a_word_or_its_vectors(tmp_path):
    many = write_inversion(tmp_path / "many.safetensors", vectors=3)
    one = write_inversion(tmp_path / "one.safetensors", vectors=1)

    for word in ("<cat>", "<cat>_2"):
        with pytest.raises(ConfigError, match=r"one\.safetensors: .*vocabulary"):
            personalised(inversions=[(many, None), (one, word)])
        with pytest.raises(ConfigError, match=r"many\.safetensors: .*vocabulary"):
            personalised(inversions=[(one, word), (many, None)])


def test_vectors_for_another_text_encoder_are_a_config_error(tmp_path):
    path = write_inversion(tmp_path / "large.safetensors", size=24)

    with pytest.raises(
        ConfigError, match=r"large\.safetensors: its vectors have 24 dimensions, those of the text encoder 16"
    ):
        personalised(inversions=[(path, None)])


@pytest.mark.parametrize("shape", [(2, 3, 16), (0, 16), ()])
def test_a_tensor_that_is_no_list_of_vectors_is_a_config_error(tmp_path, shape):
    save_file({"<cat>": torch.ones(shape)}, tmp_path / "odd.safetensors")

    with pytest.raises(ConfigError, match=r"odd\.safetensors: invalid shape"):
        personalised(inversions=[(tmp_path / "odd.safetensors", None)])


def test_a_textual_inversion_for_sdxl_is_a_config_error(tmp_path):
    save_file({"clip_g": torch.ones(1, 32), "clip_l": torch.ones(1, 16)}, tmp_path / "xl.safetensors")

    with pytest.raises(ConfigError, match=r"xl\.safetensors holds clip_g, clip_l.*SDXL"):
        personalised(inversions=[(tmp_path / "xl.safetensors", "<cat>")])


# --- FreeU -----------------------------------------------------------------------------------------------------------


def test_freeu_draws_as_in_the_stock_pipeline():
    settings = FreeUConfig(s1=0.7, s2=0.3, b1=1.2, b2=1.4)
    stock = build()
    stock.enable_freeu(**settings.model_dump())

    assert_draws_as(stock, personalised(freeu=settings))


def test_a_zero_which_would_switch_freeu_off_in_silence_is_refused():
    for name in ("s1", "s2", "b1", "b2"):
        with pytest.raises(ValidationError, match=name):
            FreeUConfig(**{name: 0})


def test_all_adapters_together_draw_as_in_the_stock_pipeline(tmp_path):
    cat = write_inversion(tmp_path / "cat.safetensors", vectors=2)
    lora = write_lora(tmp_path / "style.safetensors", "kohya", alpha=lambda _: 1.0)
    settings = FreeUConfig()
    stock = stock_with_words((cat, None))
    stock.load_lora_weights(str(lora), adapter_name="style")
    stock.set_adapters(["style"], [0.6])
    stock.fuse_lora()
    stock.enable_freeu(**settings.model_dump())

    assert_draws_as(stock, personalised([(lora, 0.6)], [(cat, None)], settings, fuse=True), CAT_ROWS)


@pytest.mark.parametrize("fuse", [False, True])
def test_an_engine_loads_all_adapters_of_its_config_and_says_nothing(tmp_path, capfd, caplog, fuse):
    stock = build()
    save(stock, tmp_path / "base")
    image_prompts = ip_adapters.write(tmp_path)
    ip_adapters.load(stock, image_prompts)
    cat = write_inversion(tmp_path / "cat.safetensors", vectors=2)
    loras = [write_lora(tmp_path / f"{k}.safetensors", "kohya", seed=k, alpha=lambda _: 1.0) for k in range(2)]
    stock.load_textual_inversion(str(cat))
    with warnings.catch_warnings(action="ignore"):
        for index, path in enumerate(loras):
            stock.load_lora_weights(str(path), adapter_name=f"stock{index}")
    stock.set_adapters(["stock0", "stock1"], [0.6, -0.3])
    if fuse:
        stock.fuse_lora()
    stock.enable_freeu(**FreeUConfig().model_dump())
    model = ModelConfig(
        base=str(tmp_path / "base"),
        scheduler=SchedulerConfig(name="checkpoint"),
        loras=tuple(LoraConfig(source=str(path), scale=scale) for path, scale in zip(loras, (0.6, -0.3), strict=True)),
        fuse_loras=fuse,
        textual_inversions=(TextualInversionConfig(source=str(cat)),),
        ip_adapter=IpAdapterConfig(source=str(image_prompts)),
        freeu=FreeUConfig(),
    )
    capfd.readouterr()
    caplog.clear()

    engine = PiaEngine.load(model, "cpu")

    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    for row in CAT_ROWS:
        clip = engine.animate([row], keep_latents=True)[0]
        assert float((clip.latents - single_call(stock, row).latents).abs().max()) <= 1e-5


def test_the_id_of_a_pipeline_tells_what_adapters_do_to_it(tmp_path):
    lora = write_lora(tmp_path / "style.safetensors", "peft")
    pipes = [
        build(),
        personalised(freeu=FreeUConfig()),
        personalised(freeu=FreeUConfig(s1=0.5)),
        *(personalised([(lora, scale)]) for scale in (0.5, 0.75)),
        personalised([(lora, 0.5)], fuse=True),
    ]
    pipes.append(build())
    pipes[-1].vae.enable_tiling()

    ids = [PiaEngine.from_pipeline(pipe).engine_id for pipe in pipes]

    assert len(set(ids)) == len(ids)
    assert ids[3] == PiaEngine.from_pipeline(personalised([(lora, 0.5)])).engine_id
