"""Several models in one process: shared parts, parts that must not be shared, and memory after an eviction."""

from __future__ import annotations

import gc
import random
import shutil
import weakref
from pathlib import Path
from typing import Any

import ip_adapters
import numpy as np
import pytest
import torch
from pipelines import build, save, shot
from safetensors.torch import save_file
from torch import nn

from pia_batch.config import (
    FreeUConfig,
    IpAdapterConfig,
    LoraConfig,
    ModelConfig,
    SchedulerConfig,
    TextualInversionConfig,
)
from pia_batch.engine import Clip, PiaEngine
from pia_batch.engine.model_cache import ModelCache, budget
from pia_batch.engine.shared_weights import SharedParts
from pia_batch.errors import ConfigError
from pia_batch.weights.identity import engine_id, resolved_dtype
from pia_batch.weights.resolve import resolve

ROWS = [shot(1, num_inference_steps=1), shot(2, num_inference_steps=2, prompt="a <cat> jumping", guidance_scale=1.0)]


def lora(path: Path, part: str) -> LoraConfig:
    """A LoRA that changes one layer, whose name holds `part`."""
    pipe = build()
    network, name = part.split(":")
    found = next(
        (full, layer)
        for full, layer in getattr(pipe, network).named_modules()
        if isinstance(layer, nn.Linear) and name in full
    )
    down, up = torch.ones(1, found[1].in_features), torch.ones(found[1].out_features, 1) * 0.2
    save_file({f"{network}.{found[0]}.lora_A.weight": down, f"{network}.{found[0]}.lora_B.weight": up}, path)
    return LoraConfig(source=str(path))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    """`base`, and models that each differ from it in one thing."""
    root = tmp_path_factory.mktemp("models")
    save(build(0), root / "base")
    save(build(1), root / "stranger")
    shutil.copytree(root / "base", root / "sibling")  # its own UNet, all else as in the base
    shutil.rmtree(root / "sibling" / "unet")
    shutil.copytree(root / "stranger" / "unet", root / "sibling" / "unet")
    save_file({"<cat>": torch.ones(2, 16)}, root / "cat.safetensors")

    def model(base: str = "base", **settings: Any) -> ModelConfig:
        return ModelConfig(base=str(root / base), **({"scheduler": SchedulerConfig(name="checkpoint")} | settings))

    return {
        "base": model(),
        "twin": model(),
        "stranger": model("stranger"),
        "sibling": model("sibling"),
        "noisier": model(scheduler=SchedulerConfig(name="ddim", settings={"beta_end": 0.003})),
        "half": model(dtype="bfloat16"),
        "low": model(memory="low"),
        "freeu": model(freeu=FreeUConfig()),
        "image": model(ip_adapter=IpAdapterConfig(source=str(ip_adapters.write(root)))),
        "style": model(loras=(lora(root / "style.safetensors", "unet:attentions.0.transformer_blocks.0.attn1.to_q"),)),
        "motion": model(
            loras=(lora(root / "motion.safetensors", "unet:motion_modules.0.transformer_blocks.0.attn1.to_q"),)
        ),
        "voice": model(loras=(lora(root / "voice.safetensors", "text_encoder:q_proj"),)),
        "cat": model(textual_inversions=(TextualInversionConfig(source=str(root / "cat.safetensors")),)),
        "dog": model(textual_inversions=(TextualInversionConfig(source=str(root / "cat.safetensors"), token="<dog>"),)),  # noqa: S106 - a word
        "fused": model(
            fuse_loras=True, loras=(lora(root / "fused.safetensors", "unet:attentions.0.transformer_blocks.0.attn1"),)
        ),
    }


@pytest.fixture(scope="module")
def truths(models) -> dict[str, list[Clip]]:
    """The clips of every model alone."""
    return {name: PiaEngine.load(model, "cpu").animate(ROWS, keep_latents=True) for name, model in models.items()}


def assert_generates(engine: PiaEngine, truth: list[Clip]) -> None:
    for clip, expected in zip(engine.animate(ROWS, keep_latents=True), truth, strict=True):
        assert clip.error is None
        assert torch.equal(clip.latents, expected.latents)
        assert np.array_equal(clip.frames, expected.frames)


def addresses(network: Any, containing: str = "", lacking: str = "nothing") -> set[int]:
    return {
        tensor.data_ptr() for name, tensor in network.named_parameters() if containing in name and lacking not in name
    }


def shared_parts(one: PiaEngine, two: PiaEngine) -> set[str]:
    """Which parts of two engines are the same memory; asserts that a part is shared in whole or not at all."""
    found = {"tokenizer"} if one._parts.tokenizer is two._parts.tokenizer else set()
    for name, network, selection in (
        ("text_encoder", "text_encoder", {}),
        ("vae", "vae", {}),
        ("unet", "unet", {"lacking": "motion_modules"}),
        ("motion", "unet", {"containing": "motion_modules"}),
    ):
        mine, other = (addresses(getattr(engine._parts, network), **selection) for engine in (one, two))
        common = mine & other
        assert common in (set(), mine)
        if common:
            assert mine == other
            found.add(name)
    return found


ALL = {"tokenizer", "text_encoder", "vae", "unet", "motion"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ("twin", ALL),
        ("noisier", ALL),
        ("stranger", {"tokenizer"}),
        ("sibling", ALL - {"unet"}),
        ("half", set()),
        ("low", ALL - {"vae"}),
        ("freeu", ALL - {"unet"}),
        ("image", ALL - {"unet"}),
        ("style", ALL - {"unet"}),
        ("fused", ALL - {"unet"}),
        ("motion", ALL - {"unet", "motion"}),
        ("voice", ALL - {"text_encoder"}),
        ("cat", ALL - {"text_encoder", "tokenizer"}),
    ],
)
def test_models_share_the_memory_of_what_they_have_in_common(models, other, expected):
    cache = ModelCache(models, "cpu")

    assert shared_parts(cache.engine("base"), cache.engine(other)) == expected


def test_the_same_file_for_another_word_is_another_text_encoder_but_no_other_unet(models):
    cache = ModelCache(models, "cpu")

    assert shared_parts(cache.engine("cat"), cache.engine("dog")) == {"vae", "unet", "motion"}


def test_engines_loaded_without_a_shelf_share_nothing(models):
    one, two = (PiaEngine.load(models["base"], "cpu") for _ in range(2))

    assert shared_parts(one, two) == set()


@pytest.mark.long
@pytest.mark.parametrize("max_models", [None, 1, 2, 3])
def test_a_model_draws_what_it_draws_alone_in_any_order_of_loads_and_evictions(models, truths, max_models):
    cache = ModelCache(models, "cpu", max_models=max_models)
    order = random.Random(max_models).choices(sorted(models), k=10)

    for name in order:
        assert_generates(cache.engine(name), truths[name])


@pytest.mark.long
@pytest.mark.parametrize("other", ["sibling", "style", "motion", "fused", "voice", "cat", "freeu", "image", "low"])
def test_loading_a_model_changes_no_weight_of_another(models, truths, other):
    cache = ModelCache(models, "cpu")
    parts = cache.engine("base")._parts
    before = {
        (network, name): tensor.clone()
        for network in ("text_encoder", "vae", "unet")
        for name, tensor in getattr(parts, network).state_dict().items()
    }

    cache.engine(other).animate(ROWS)

    for (network, name), tensor in before.items():
        assert torch.equal(getattr(parts, network).state_dict()[name], tensor)
    assert "<cat>" not in parts.tokenizer.get_vocab()
    assert_generates(cache.engine("base"), truths["base"])


@pytest.mark.long
def test_what_is_shared_stays_when_one_of_its_models_is_put_away(models, truths):
    cache = ModelCache({name: models[name] for name in ("base", "sibling", "style")}, "cpu", max_models=2)
    cache.engine("base")
    sibling = addresses(cache.engine("sibling")._parts.unet, "motion_modules")

    style = addresses(cache.engine("style")._parts.unet, "motion_modules")

    assert cache.loaded == ("sibling", "style")
    assert sibling == style
    assert_generates(cache.engine("sibling"), truths["sibling"])


def test_the_memory_of_a_model_comes_back_when_it_is_put_away(models):
    cache = ModelCache(models, "cpu", max_models=1)
    parts = cache.engine("style")._parts
    cache.engine("style").animate(ROWS)
    gone = [weakref.ref(part) for part in (parts.unet, parts.vae, parts.text_encoder, parts.tokenizer)]
    gone += [weakref.ref(tensor) for tensor in parts.unet.parameters()]
    del parts

    cache.engine("stranger")

    assert {ref() for ref in gone} == {None}


def test_a_model_that_is_used_goes_to_the_end_of_the_queue(models):
    cache = ModelCache(models, "cpu", max_models=3)
    for name in ("base", "sibling", "style", "base", "voice"):
        cache.engine(name)

    assert cache.loaded == ("style", "base", "voice")


def test_a_loaded_model_is_not_loaded_again(models):
    cache = ModelCache(models, "cpu")

    assert cache.engine("base") is cache.engine("base")


def num_bytes(*engines: PiaEngine) -> int:
    tensors = {
        tensor.data_ptr(): tensor.nbytes
        for engine in engines
        for network in (engine._parts.unet, engine._parts.vae, engine._parts.text_encoder)
        for tensor in (*network.parameters(), *network.buffers())
    }
    return sum(tensors.values())


@pytest.mark.long
def test_models_are_kept_for_as_long_as_their_weights_fit_the_budget(models):
    base, sibling, stranger = (PiaEngine.load(models[name], "cpu") for name in ("base", "sibling", "stranger"))
    together = ModelCache(models, "cpu")
    pair = num_bytes(together.engine("base"), together.engine("sibling"))
    assert max(num_bytes(base), num_bytes(stranger)) < pair < num_bytes(base) + num_bytes(sibling)
    cache = ModelCache(models, "cpu", budget=lambda _: pair)

    loaded = []
    for name in ("base", "sibling", "stranger", "base", "sibling"):
        cache.engine(name)
        loaded.append(cache.loaded)

    # What two models share is counted once; two that share nothing are too much.
    assert loaded == [("base",), ("base", "sibling"), ("stranger",), ("base",), ("base", "sibling")]


def test_the_model_in_use_is_kept_though_it_alone_exceeds_the_budget(models, truths):
    cache = ModelCache(models, "cpu", budget=lambda _: 1)

    for name in ("base", "twin", "base"):
        assert_generates(cache.engine(name), truths[name])
        assert cache.loaded == (name,)


def test_the_weights_in_use_are_counted_once(models):
    shared = SharedParts()
    one, two = (PiaEngine.load(models[name], "cpu", shared) for name in ("base", "sibling"))

    assert shared.num_bytes() == {torch.device("cpu"): num_bytes(one, two)}
    del two
    gc.collect()
    assert shared.num_bytes() == {torch.device("cpu"): num_bytes(one)}


def test_the_budget_is_a_share_of_this_machine():
    assert 2**27 < budget(torch.device("cpu")) < 2**50


class Cramped:
    """A loader on a device with memory for `most` engines; a partly loaded one takes memory, too."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.loads = 0

    def __call__(self, model: ModelConfig, device: str | None, shared: SharedParts) -> PiaEngine:
        self.loads += 1
        engine = PiaEngine.load(model, device, shared)
        self._alive.add(engine)
        if len(self._alive) > self._most:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return engine


def test_a_model_that_does_not_fit_beside_the_others_is_loaded_in_their_place(models, truths):
    load = Cramped(most=2)
    cache = ModelCache(models, "cpu", load=load)
    for name in ("base", "sibling"):
        cache.engine(name)

    engine = cache.engine("style")

    assert cache.loaded == ("style",)
    assert load.loads == 4
    assert_generates(engine, truths["style"])


def test_a_model_that_does_not_fit_alone_is_a_config_error(models):
    load = Cramped(most=0)
    cache = ModelCache(models, "cpu", load=load)

    with pytest.raises(ConfigError, match=r"'base' alone is too large.*`low`"):
        cache.engine("base")
    assert cache.loaded == ()
    assert load.loads == 1


def test_a_model_that_cannot_be_loaded_leaves_the_others_as_they_are(models, truths, tmp_path):
    cache = ModelCache({"base": models["base"], "lost": ModelConfig(base=str(tmp_path))}, "cpu")
    cache.engine("base")

    with pytest.raises(ConfigError):
        cache.engine("lost")
    assert cache.loaded == ("base",)
    assert_generates(cache.engine("base"), truths["base"])


def test_an_unknown_name_is_a_config_error_that_lists_the_models(models):
    with pytest.raises(ConfigError, match=r"no model 'nope'; the config has .*base.*twin"):
        ModelCache(models, "cpu").engine("nope")


@pytest.mark.long
def test_the_ids_of_engines_are_those_of_the_driver(models):
    cache = ModelCache(models, "cpu", max_models=2)
    names = ("base", "twin", "half", "low", "freeu", "style", "cat")

    ids = {name: cache.engine(name).engine_id for name in names}

    resolved = {name: (models[name], resolve(models[name])) for name in names}
    assert ids == {
        name: engine_id(model, found, resolved_dtype(model, on_gpu=False)) for name, (model, found) in resolved.items()
    }
    assert ids["base"] == ids["twin"]
    assert len(set(ids.values())) == len(names) - 1
