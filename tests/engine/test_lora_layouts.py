"""Table of LoRA layouts: each is accepted by `plan` and applied exactly, or refused by `plan` by name.

The files hold random numbers. The expected weights come from the published formulas, written out here in float64, not
from the code under test.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import peft
import pytest
import torch
from lora_files import stock_with, write_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from pipelines import build, save
from safetensors.torch import load_file, save_file

from pia_batch.config import LoraConfig, ModelConfig
from pia_batch.engine import adapters
from pia_batch.errors import ConfigError
from pia_batch.weights import network_layers
from pia_batch.weights.resolve import resolve

Tensors = dict[str, torch.Tensor]

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
OUT = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
FEED = "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj"
PROJECTION = "mid_block.attentions.0.proj_in"
RESNET = "down_blocks.0.resnets.0.conv1"
TIME = "up_blocks.0.resnets.1.time_emb_proj"
SAMPLER = "down_blocks.0.downsamplers.0.conv"
MOTION = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q"
TEXT = "encoder.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save(build(), folder)
    return folder


@functools.cache
def networks() -> dict[str, Any]:
    pipe = build()
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}


def network_of(layer: str) -> str:
    return "text_encoder" if layer.startswith(("encoder.", "embeddings.")) else "unet"


def parameter(network: torch.nn.Module, layer: str, name: str = "weight") -> torch.Tensor:
    """The effective value of a layer's weight, with the deltas of LoRAs that are not merged."""
    module = network.get_submodule(layer)
    if not isinstance(module, BaseTunerLayer):
        return getattr(module, name).data.double()
    value = getattr(module.base_layer, name).data.double()
    if name == "weight":
        for adapter in module.active_adapters:
            down, up = module.lora_A[adapter].weight.double(), module.lora_B[adapter].weight.double()
            delta = (up.flatten(1) @ down.flatten(1)).reshape(value.shape)
            value = value + delta * module.scaling[adapter]
    return value


def weight_of(layer: str, name: str = "weight") -> torch.Tensor:
    return getattr(networks()[network_of(layer)].get_submodule(layer), name).data.double()


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    random = np.random.default_rng([seed, *shape])
    return torch.from_numpy(random.standard_normal(shape)).float() / 4


def load(base: Path, *files: tuple[Path, float], fuse: bool = True, **more: Any) -> dict[str, Any]:
    """Resolve as `plan` does, read and apply as the engine does; return the networks."""
    model = ModelConfig(
        base=str(base),
        loras=tuple(LoraConfig(source=str(path), scale=scale) for path, scale in files),
        fuse_loras=fuse,
        **more,
    )
    weights = resolve(model)
    found = adapters.read(model, weights.loras, weights.textual_inversions)
    pipe = build()
    found.apply_to_tokenizer(pipe.tokenizer)
    found.apply_to_text_encoder(pipe.text_encoder, pipe.tokenizer)
    found.apply_to_unet(pipe.unet)
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer}


def assert_weights(found: dict[str, Any], expected: dict[str, torch.Tensor], name: str = "weight") -> None:
    """Assert that the layers have the expected weights, within 1e-6 relative, and that all others are untouched."""
    for layer, wanted in expected.items():
        value = parameter(found[network_of(layer)], layer, name)
        assert (value - wanted).norm() <= 1e-6 * wanted.norm(), layer
        assert (wanted - weight_of(layer, name)).norm() > 1e-3 * wanted.norm(), "the file changes nothing"
    for network, before in networks().items():
        for layer, module in before.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and layer not in expected:
                assert torch.equal(parameter(found[network], layer), module.weight.data.double()), layer


# --- names ------------------------------------------------------------------------------------------------------------


def kohya(layer: str) -> str:
    if network_of(layer) == "text_encoder":
        return f"lora_te_text_model_{layer.replace('.', '_')}"
    return f"lora_unet_{layer.replace('.', '_')}"


def original(layer: str) -> str:
    """The name of a UNet's layer in CompVis/stable-diffusion."""
    attends = [block.startswith("CrossAttn") for block in networks()["unet"].config.up_block_types]
    per_block = networks()["unet"].config.layers_per_block
    return layouts._unet_name(f"{layer}.weight", per_block, attends).removesuffix(".weight")


def processor(layer: str) -> str:
    """The name in diffusers before 0.22."""
    outer, _, last = layer.removesuffix(".0").rpartition(".")
    return f"{outer}.processor.{last}_lora"


UNET_LAYERS = (ATTENTION, OUT, FEED, PROJECTION, RESNET, TIME, SAMPLER)
ALL = (*UNET_LAYERS, TEXT)
A, B = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")

SPELLINGS: dict[str, tuple[Callable[[str], str], tuple[str, str], tuple[str, ...]]] = {
    "kohya": (kohya, B, ALL),
    "kohya, te1": (lambda layer: kohya(layer).replace("lora_te_", "lora_te1_"), B, ALL),
    "lycoris": (lambda layer: f"lycoris_{layer.replace('.', '_')}", B, ALL),
    "lycoris, text_model": (lambda layer: f"lycoris_text_model_{layer.replace('.', '_')}", B, (TEXT,)),
    "kohya, original names": (lambda layer: f"lora_unet_{original(layer).replace('.', '_')}", B, UNET_LAYERS),
    "peft of diffusers": (lambda layer: f"{network_of(layer)}.{layer}", A, ALL),
    "peft without prefix": (lambda layer: layer, A, ALL),
    "peft in a state dict": (lambda layer: layer, ("lora_A.default.weight", "lora_B.default.weight"), ALL),
    "diffusers, lora": (lambda layer: f"unet.{layer}", ("lora.down.weight", "lora.up.weight"), UNET_LAYERS),
    "diffusers, processors": (lambda layer: f"unet.{processor(layer)}", ("down.weight", "up.weight"), (ATTENTION, OUT)),
    "processors without prefix": (processor, ("down.weight", "up.weight"), (ATTENTION, OUT, MOTION)),
    "peft, adapter's own name": (lambda layer: layer, ("lora_A.style.weight", "lora_B.style.weight"), ALL),
    "diffusers, lora_layer": (
        lambda layer: f"{network_of(layer)}.{layer}",
        ("lora_layer.down.weight", "lora_layer.up.weight"),
        ALL,
    ),
    "kohya, compiled": (
        lambda layer: (
            kohya(layer).replace("lora_unet_", "lora_unet__orig_mod_").replace("lora_te_", "lora_te__orig_mod_")
        ),
        B,
        ALL,
    ),
    "OneTrainer, dots": (
        lambda layer: f"lora_te.text_model.{layer}" if layer == TEXT else f"lora_unet.{layer}",
        B,
        ALL,
    ),
    "module": (lambda layer: f"module.{layer}", A, ALL),
    "module, processors": (lambda layer: f"module.{processor(layer)}", ("down.weight", "up.weight"), (ATTENTION, OUT)),
    "diffusion_model": (lambda layer: f"diffusion_model.{original(layer)}", A, UNET_LAYERS),
    "diffusion_model, kohya": (lambda layer: f"diffusion_model.{original(layer)}", B, UNET_LAYERS),
    "model.diffusion_model": (lambda layer: f"model.diffusion_model.{original(layer)}", A, UNET_LAYERS),
    "original text encoder": (lambda layer: f"cond_stage_model.transformer.text_model.{layer}", A, (TEXT,)),
    "comfy text encoder": (lambda layer: f"text_encoders.clip_l.transformer.text_model.{layer}", B, (TEXT,)),
    "animatediff": (
        lambda layer: (
            processor(layer)
            .replace("motion_modules.0.", "motion_modules.0.temporal_transformer.")
            .replace("attn1", "attention_blocks.0")
        ),
        ("down.weight", "up.weight"),
        (MOTION,),
    ),
}


def pair(layer: str, rank: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    shape = weight_of(layer).shape
    return numbers(rank, *shape[1:], seed=1), numbers(shape[0], rank, *(1 for _ in shape[2:]), seed=2)


def product(down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (up.double().flatten(1) @ down.double().flatten(1)).reshape(len(up), *down.shape[1:])


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("fuse", [False, True])
def test_every_spelling_of_names_is_applied_exactly(base, tmp_path, spelling, fuse):
    spell, (down_name, up_name), chosen = SPELLINGS[spelling]
    tensors, expected = {}, {}
    for layer in chosen:
        down, up = pair(layer)
        tensors |= {f"{spell(layer)}.{down_name}": down, f"{spell(layer)}.{up_name}": up}
        expected[layer] = weight_of(layer) + 0.7 * product(down, up)
    save_file(tensors, tmp_path / "a.safetensors")

    assert_weights(load(base, (tmp_path / "a.safetensors", 0.7), fuse=fuse), expected)


@pytest.mark.parametrize("fuse", [False, True])
def test_matrices_of_linear_layers_may_be_convolutions_and_the_reverse(base, tmp_path, fuse):
    tensors, expected = {}, {}
    for layer in (ATTENTION, FEED, PROJECTION, TEXT):
        down, up = pair(layer)
        expected[layer] = weight_of(layer) + product(down, up).reshape(weight_of(layer).shape)
        if down.ndim == 2:
            down, up = down[:, :, None, None], up[:, :, None, None]
        else:
            down, up = down[:, :, 0, 0], up[:, :, 0, 0]
        tensors |= {f"{kohya(layer)}.lora_down.weight": down, f"{kohya(layer)}.lora_up.weight": up}
    save_file(tensors, tmp_path / "a.safetensors")

    assert_weights(load(base, (tmp_path / "a.safetensors", 1.0), fuse=fuse), expected)


def test_original_names_of_a_unet_are_the_inverse_of_those_of_diffusers():
    unet = networks()["unet"]
    names = [name.removesuffix(".weight") for name in unet.state_dict() if name.endswith(".weight")]
    for name in (name for name in names if "motion_modules" not in name):
        for spelled in (original(name), original(name).replace(".", "_")):
            found = network_layers.from_original(spelled, unet.config.layers_per_block)
            assert found is not None
            assert found.replace(".", "_") == name.replace(".", "_")


# --- kinds ------------------------------------------------------------------------------------------------------------

Made = tuple[Tensors, torch.Tensor]
"""Tensors by suffix, and the delta for scale 1, without alpha."""


def tucker(core: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """sum over i, j of core[i, j] * left[i, out] * right[j, in]."""
    return sum(
        core[i, j].double() * left[i].double()[:, None, None, None] * right[j].double()[None, :, None, None]
        for i in range(core.shape[0])
        for j in range(core.shape[1])
    )


def lora(shape: torch.Size, rank: int) -> Made:
    down, up = numbers(rank, *shape[1:], seed=1), numbers(shape[0], rank, *(1 for _ in shape[2:]), seed=2)
    return {"lora_down.weight": down, "lora_up.weight": up}, product(down, up)


def locon_tucker(shape: torch.Size, rank: int) -> Made:
    down, up = numbers(rank, shape[1], 1, 1, seed=1), numbers(shape[0], rank, 1, 1, seed=2)
    mid = numbers(rank, rank, *shape[2:], seed=3)
    delta = tucker(mid, up[:, :, 0, 0].T, down[:, :, 0, 0])
    return {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": mid}, delta


def loha(shape: torch.Size, rank: int) -> Made:
    columns = math.prod(shape[1:])
    tensors = {
        "hada_w1_a": numbers(shape[0], rank, seed=1),
        "hada_w1_b": numbers(rank, columns, seed=2),
        "hada_w2_a": numbers(shape[0], rank, seed=3),
        "hada_w2_b": numbers(rank, columns, seed=4),
    }
    one, two, three, four = (tensor.double() for tensor in tensors.values())
    return tensors, ((one @ two) * (three @ four)).reshape(shape)


def loha_tucker(shape: torch.Size, rank: int) -> Made:
    tensors = {
        "hada_t1": numbers(rank, rank, *shape[2:], seed=1),
        "hada_w1_a": numbers(rank, shape[0], seed=2),
        "hada_w1_b": numbers(rank, shape[1], seed=3),
        "hada_t2": numbers(rank, rank, *shape[2:], seed=4),
        "hada_w2_a": numbers(rank, shape[0], seed=5),
        "hada_w2_b": numbers(rank, shape[1], seed=6),
    }
    made = list(tensors.values())
    return tensors, tucker(*made[:3]) * tucker(*made[3:])


def kron(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """Kronecker product over the first two axes: [a * k + b, c * n + d] = one[a, c] * two[b, d]."""
    product = torch.einsum("ac,bd...->abcd...", one.double(), two.double())
    return product.reshape(one.shape[0] * two.shape[0], one.shape[1] * two.shape[1], *two.shape[2:])


def lokr(split_one: bool, split_two: bool, core: bool = False) -> Callable[[torch.Size, int], Made]:
    def make(shape: torch.Size, rank: int) -> Made:
        tensors: Tensors = {}
        k, n, kernel = shape[0] // 4, shape[1] // 2, shape[2:]
        if split_one:
            tensors |= {"lokr_w1_a": numbers(4, rank, seed=1), "lokr_w1_b": numbers(rank, 2, seed=2)}
            one = tensors["lokr_w1_a"].double() @ tensors["lokr_w1_b"].double()
        else:
            one = tensors["lokr_w1"] = numbers(4, 2, seed=1)
        if core:
            tensors |= {
                "lokr_t2": numbers(rank, rank, *kernel, seed=3),
                "lokr_w2_a": numbers(rank, k, seed=4),
                "lokr_w2_b": numbers(rank, n, seed=5),
            }
            two = tucker(tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"])
        elif split_two:
            left, right = numbers(k, rank, seed=4), numbers(rank, n * math.prod(kernel), seed=5)
            tensors |= {"lokr_w2_a": left, "lokr_w2_b": right}
            two = (left.double() @ right.double()).reshape(k, n, *kernel)
        else:
            two = tensors["lokr_w2"] = numbers(k, n, *kernel, seed=3)
        return tensors, kron(one, two)

    return make


def full(shape: torch.Size, rank: int) -> Made:
    del rank
    diff = numbers(*shape, seed=1)
    return {"diff": diff}, diff.double()


KINDS: dict[str, tuple[Callable[[torch.Size, int], Made], tuple[str, ...]]] = {
    "lora": (lora, ALL),
    "tucker": (locon_tucker, (RESNET, SAMPLER)),
    "loha": (loha, ALL),
    "loha, tucker": (loha_tucker, (RESNET, SAMPLER)),
    "lokr, whole": (lokr(split_one=False, split_two=False), ALL),
    "lokr, second split": (lokr(split_one=False, split_two=True), ALL),
    "lokr, first split": (lokr(split_one=True, split_two=False), ALL),
    "lokr, both split": (lokr(split_one=True, split_two=True), ALL),
    "lokr, tucker": (lokr(split_one=False, split_two=True, core=True), (RESNET,)),
    "full": (full, ALL),
}
UNSCALED = ("full", "lokr, whole")
"""Kinds without a rank, which alpha does not scale."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


def rounded(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [None, torch.tensor(1.5), torch.tensor(2), torch.tensor([5.0]), "per layer"], ids=str)
def test_every_kind_is_applied_by_its_formula(base, tmp_path, kind, alpha):
    make, chosen = KINDS[kind]
    tensors, expected, rank = {}, {}, 3
    for number, layer in enumerate(chosen):
        made, delta = make(weight_of(layer).shape, rank)
        tensors |= {f"{kohya(layer)}.{name}": tensor for name, tensor in made.items()}
        factor = 1.0
        if alpha is not None:
            value = torch.tensor(0.5 + number) if alpha == "per layer" else alpha
            tensors[f"{kohya(layer)}.alpha"] = value.clone()
            factor = 1.0 if kind in UNSCALED else float(value) / rank
        expected[layer] = weight_of(layer) + 0.8 * factor * delta
    save_file(tensors, tmp_path / "a.safetensors")

    for fuse in (False, True):
        assert_weights(load(base, (tmp_path / "a.safetensors", 0.8), fuse=fuse), expected)


def test_the_alpha_of_each_layer_counts_where_diffusers_takes_the_most_frequent_one_for_attention(tmp_path):
    """Its names for the alphas of attention, `attn1.processor.to_k_lora.down.weight`, match no layer of PEFT's."""
    path = write_lora(
        tmp_path / "a.safetensors",
        "kohya",
        unet=lambda name: "attn1.to_" in name,
        text=lambda _: False,
        alpha=lambda index: 3.0 if index % 4 == 0 else 1.0,
    )
    layers = {name: each for name, each in stock_with((path, 1.0)).unet.named_modules() if hasattr(each, "scaling")}
    alphas = {name.removesuffix(".alpha"): float(each) for name, each in load_file(path).items() if "alpha" in name}

    stock = [each.scaling["stock0"] for name, each in layers.items()]
    assert {alphas[kohya(name)] / 2 for name in layers} == {0.5, 1.5}
    assert set(stock) == {0.5}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_kind_is_read_in_every_dtype(base, tmp_path, kind, dtype):
    make, chosen = KINDS[kind]
    layer = chosen[0]
    made, _ = make(weight_of(layer).shape, 3)
    exact = {name: tensor.to(dtype).float() for name, tensor in made.items()}
    save_file({f"{kohya(layer)}.{name}": tensor.to(dtype) for name, tensor in made.items()}, tmp_path / "a.safetensors")
    save_file({f"{kohya(layer)}.{name}": tensor for name, tensor in exact.items()}, tmp_path / "b.safetensors")

    one, two = (load(base, (tmp_path / f"{name}.safetensors", 1.0)) for name in "ab")

    network = network_of(layer)
    assert torch.equal(parameter(one[network], layer), parameter(two[network], layer))
    assert not torch.equal(parameter(one[network], layer), weight_of(layer))


def with_norm(changed: torch.Tensor, magnitude: torch.Tensor, axis: int) -> torch.Tensor:
    """magnitude * W / |W|, with the norm of each output (axis 0) or input (axis 1)."""
    others = [each for each in range(changed.ndim) if each != axis]
    sides = [-1 if each == axis else 1 for each in range(changed.ndim)]
    return magnitude.double().reshape(sides) / changed.pow(2).sum(others, keepdim=True).sqrt()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr, both split", "lokr, whole", "full"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_dora_of_lycoris_takes_the_norm_of_the_changed_base(base, tmp_path, kind, axis, scale, alpha):
    tensors, expected = {}, {}
    for layer in (ATTENTION, RESNET, PROJECTION, TEXT, FEED):
        weight = weight_of(layer)
        made, delta = KINDS[kind][0](weight.shape, 3)
        if alpha is not None:
            made["alpha"] = torch.tensor(alpha)
            delta = delta if kind in UNSCALED else delta * alpha / 3
        magnitude = 1 + numbers(weight.shape[axis], seed=9).abs()
        sides = [weight.shape[axis] if each == axis else 1 for each in range(weight.ndim)]
        tensors |= {f"{kohya(layer)}.{name}": tensor for name, tensor in made.items()}
        flat = layer == FEED  # a vector, which only the side of its length can have
        tensors[f"{kohya(layer)}.dora_scale"] = magnitude if flat else magnitude.reshape(sides)
        changed = weight + delta  # get_merged_weight of LyCORIS 3.1.1: its multiplier acts on the factor only
        expected[layer] = changed * (1 + scale * (with_norm(changed, magnitude, axis) - 1))
    save_file(tensors, tmp_path / "a.safetensors")

    for fuse in (False, True):
        assert_weights(load(base, (tmp_path / "a.safetensors", scale), fuse=fuse), expected)
    assert_weights(load(base, (tmp_path / "a.safetensors", 0.0)), {})


@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("ending", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_dora_of_peft_takes_the_norm_of_the_changed_base(base, tmp_path, scale, ending):
    tensors, expected = {}, {}
    for layer in (ATTENTION, RESNET, TEXT):
        weight = weight_of(layer)
        down, up = pair(layer)
        magnitude = 1 + numbers(len(weight), seed=9).abs()
        name = f"{network_of(layer)}.{layer}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        tensors[f"{name}.{ending}"] = magnitude if weight.ndim == 2 else magnitude[None, :, None, None]
        changed = weight + scale * product(down, up)
        expected[layer] = changed * with_norm(changed, magnitude, 0)
    save_file(tensors, tmp_path / "a.safetensors")

    assert_weights(load(base, (tmp_path / "a.safetensors", scale)), expected)


def test_a_record_in_the_file_s_metadata_scales_dora(base, tmp_path):
    down, up = pair(ATTENTION)
    magnitude = 1 + numbers(len(up), seed=9).abs()
    tensors = {f"unet.{ATTENTION}.lora_A.weight": down, f"unet.{ATTENTION}.lora_B.weight": up}
    tensors[f"unet.{ATTENTION}.lora_magnitude_vector"] = magnitude
    record = {"unet.r": 3, "unet.lora_alpha": 6, "unet.use_dora": True}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(record)})
    changed = weight_of(ATTENTION) + 2 * product(down, up)

    found = load(base, (tmp_path / "a.safetensors", 1.0))

    assert_weights(found, {ATTENTION: changed * with_norm(changed, magnitude, 0)})


def test_biases_and_norms_are_added_with_the_scale(base, tmp_path):
    norm, group, conv = ("mid_block.attentions.0.transformer_blocks.0.norm1", "mid_block.resnets.0.norm1", RESNET)
    tensors, weights, biases = {}, {}, {}
    for layer, (weight_name, bias_name) in {
        norm: ("w_norm", "b_norm"),
        group: ("w_norm", "b_norm"),
        conv: ("diff", "diff_b"),
        TEXT: ("diff", "diff_b"),
        "encoder.layers.0.layer_norm1": ("w_norm", "b_norm"),
    }.items():
        weight, bias = (numbers(*weight_of(layer, name).shape, seed=5) for name in ("weight", "bias"))
        tensors |= {f"{kohya(layer)}.{weight_name}": weight, f"{kohya(layer)}.{bias_name}": bias}
        weights[layer] = weight_of(layer) - 0.5 * weight.double()
        biases[layer] = weight_of(layer, "bias") - 0.5 * bias.double()
    down, up = pair(PROJECTION)
    tensors |= {f"{kohya(PROJECTION)}.lora_down.weight": down, f"{kohya(PROJECTION)}.lora_up.weight": up}
    tensors[f"{kohya(PROJECTION)}.diff_b"] = numbers(len(up), seed=6)
    weights[PROJECTION] = weight_of(PROJECTION) - 0.5 * product(down, up)
    biases[PROJECTION] = weight_of(PROJECTION, "bias") - 0.5 * numbers(len(up), seed=6).double()
    save_file(tensors, tmp_path / "a.safetensors")

    found = load(base, (tmp_path / "a.safetensors", -0.5), fuse=False)

    assert_weights(found, weights)
    for layer, wanted in biases.items():
        value = parameter(found[network_of(layer)], layer, "bias")
        assert (value - wanted).norm() <= 1e-6 * wanted.norm(), layer


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr, second split", "full", "tucker"])
@pytest.mark.parametrize("num_channels", [4, 9])
@pytest.mark.parametrize("spelled", ["lora_unet_conv_in", "lora_unet_input_blocks_0_0", "unet.conv_in"])
def test_four_input_channels_are_the_first_of_pia_s_nine(base, tmp_path, kind, num_channels, spelled):
    weight = weight_of("conv_in")
    assert weight.shape[1] == 9
    shape = torch.Size([weight.shape[0], num_channels, 3, 3])
    if kind.startswith("lokr") and num_channels == 9:
        pytest.skip("nine channels have no factor of two")
    made, delta = KINDS[kind][0](shape, 2)
    save_file({f"{spelled}.{name}": tensor for name, tensor in made.items()}, tmp_path / "a.safetensors")
    expected = weight.clone()
    expected[:, :num_channels] += 0.5 * delta

    for fuse in (False, True):
        assert_weights(load(base, (tmp_path / "a.safetensors", 0.5), fuse=fuse), {"conv_in": expected})


def test_several_loras_of_several_kinds_add_up_from_the_base_s_own_weights(base, tmp_path):
    weight = weight_of(ATTENTION)
    files, expected = [], weight.clone()
    for number, (kind, scale) in enumerate({"lora": 0.5, "loha": -1.0, "lokr, whole": 2.0, "full": 0.3}.items()):
        made, delta = KINDS[kind][0](weight.shape, 2 + number)
        path = tmp_path / f"{number}.safetensors"
        save_file({f"{kohya(ATTENTION)}.{name}": tensor for name, tensor in made.items()}, path)
        files.append((path, scale))
        expected += scale * delta

    for fuse in (False, True):
        for order in (files, files[::-1]):
            assert_weights(load(base, *order, fuse=fuse), {ATTENTION: expected})


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("bundled", [False, True])
def test_tables_of_tokens_and_positions_are_merged(base, tmp_path, fuse, bundled):
    tokens, positions = "embeddings.token_embedding", "embeddings.position_embedding"
    prefix = "text_encoders.clip_l.transformer.text_model"
    down, up = (numbers(*shape, seed=3) for shape in ((2, weight_of(tokens).shape[1]), (len(weight_of(tokens)), 2)))
    diff = numbers(*weight_of(positions).shape, seed=4)
    held = {f"{prefix}.{tokens}.lora_down.weight": down, f"{prefix}.{tokens}.lora_up.weight": up}
    held[f"lora_te_text_model_{positions.replace('.', '_')}.diff"] = diff
    if bundled:
        held["bundle_emb.my cat.emb_params"] = numbers(2, 16, seed=7)
    save_file(held, tmp_path / "a.safetensors")

    found = load(base, (tmp_path / "a.safetensors", 0.5), fuse=fuse)["text_encoder"]

    for layer, delta in ((tokens, product(down, up)), (positions, diff.double())):
        wanted = weight_of(layer) + 0.5 * delta
        assert (parameter(found, layer)[: len(wanted)] - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_a_trained_scalar_multiplies_the_delta(base, tmp_path, alpha, fuse):
    """LyCORIS before 2.0 stored the factor of `use_scalar` next to the matrices."""
    tensors, expected = {}, {}
    for layer in (ATTENTION, RESNET, TEXT):
        down, up = pair(layer)
        tensors |= {f"{kohya(layer)}.lora_down.weight": down, f"{kohya(layer)}.lora_up.weight": up}
        tensors[f"{kohya(layer)}.scalar"] = torch.tensor(-0.5)
        if alpha is not None:
            tensors[f"{kohya(layer)}.alpha"] = torch.tensor(alpha)
        expected[layer] = weight_of(layer) - 0.5 * (1.0 if alpha is None else alpha / 3) * product(down, up)
    save_file(tensors, tmp_path / "a.safetensors")

    assert_weights(load(base, (tmp_path / "a.safetensors", 1.0), fuse=fuse), expected)


# --- peft's record ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "factors"),
    [
        ({"r": 3, "lora_alpha": 6}, (2.0, 2.0)),
        ({"r": 3, "lora_alpha": 6, "use_rslora": True}, (6 / math.sqrt(3),) * 2),
        ({"r": 8, "lora_alpha": 3, "rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_k": 12}}, (4.0, 1.0)),
        ({"r": 3, "lora_alpha": 3, "alpha_pattern": {r"mid_block\..*": 9}}, (1.0, 3.0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("fuse", [False, True])
def test_a_record_of_peft_scales_each_layer(base, tmp_path, record, factors, fuse):
    tensors, expected = {}, {}
    for layer, factor in zip((ATTENTION, OUT), factors, strict=True):
        down, up = pair(layer)
        name = f"base_model.model.{layer}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        expected[layer] = weight_of(layer) + 0.5 * factor * product(down, up)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    whole = {"peft_type": "LORA", "target_modules": ["to_k", "to_out.0"]} | record
    (tmp_path / "adapter_config.json").write_text(json.dumps(whole))

    assert_weights(load(base, (tmp_path / "adapter_model.safetensors", 0.5), fuse=fuse), expected)


RECORDS: dict[str, tuple[dict[str, Any], float]] = {
    "alpha": ({"r": 3, "lora_alpha": 6}, 2.0),
    "rsLoRA": ({"r": 3, "lora_alpha": 6, "use_rslora": True}, 6 / math.sqrt(3)),
    "patterns": ({"r": 8, "lora_alpha": 8, "rank_pattern": {".*": 3}, "alpha_pattern": {".*": 12}}, 4.0),
    "with text_model": ({"r": 3, "lora_alpha": 3, "alpha_pattern": {f"text_model.{TEXT}": 9}}, 3.0),
    "anchored": ({"r": 3, "lora_alpha": 3, "alpha_pattern": {f"^text_model.{TEXT}": 9}}, 3.0),
}


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("in_header", [False, True])
def test_a_record_scales_the_text_encoder_wherever_it_is(base, tmp_path, record, in_header, fuse):
    """Names in patterns have `text_model.`, as CLIP's layers have. A header need not list the layers."""
    settings, factor = RECORDS[record]
    down, up = pair(TEXT)
    name = f"{'text_encoder' if in_header else 'base_model.model'}.text_model.{TEXT}"
    metadata = {f"text_encoder.{key}": value for key, value in settings.items()}
    save_file(
        {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up},
        tmp_path / "adapter_model.safetensors",
        {"lora_adapter_metadata": json.dumps(metadata)} if in_header else None,
    )
    if not in_header:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | settings))

    found = load(base, (tmp_path / "adapter_model.safetensors", 1.0), fuse=fuse)

    assert_weights(found, {TEXT: weight_of(TEXT) + factor * product(down, up)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({"init_lora_weights": each}, f"init_lora_weights '{each}', with which peft also changed")
          for each in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")),
        *(({key: value}, f"has {key}, a variant of LoRA")
          for key, value in {"use_qalora": True, "alora_invocation_tokens": [1], "use_bdlora": {"nblocks": 2},
                             "layer_replication": [[0, 2]], "arrow_config": {"top_k": 3}}.items()),
        ({"peft_type": "IA3"}, "peft type IA3"),
        ({"lora_alpha": "x"}, "not a valid record of peft"),
        ({"alpha_pattern": ["to_k"]}, "not a valid record of peft"),
        ({"alpha_pattern": {"to_k(": 2}}, "not a valid record of peft"),
        ({"alpha_pattern": {"to_k": None}}, "not a valid record of peft"),
        ({"rank_pattern": {"to_k": 0}}, "not a valid record of peft: a rank is 0"),
        ({"r": -1}, "not a valid record of peft: a rank is -1"),
        ({"lora_alpha": math.nan}, "not a valid record of peft: an alpha is nan"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("in_header", [False, True])
def test_a_record_of_another_formula_is_refused_before_a_run(base, tmp_path, settings, message, in_header):
    down, up = pair(ATTENTION)
    name = f"{'unet' if in_header else 'base_model.model'}.{ATTENTION}"
    whole = {"r": 3, "lora_alpha": 3} | settings
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in whole.items()})}
    path = tmp_path / "a.safetensors"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path, metadata if in_header else None)
    if not in_header:
        (tmp_path / "adapter_config.json").write_text(json.dumps(whole))

    with pytest.raises(ConfigError, match=message):
        resolve(ModelConfig(base=str(base), loras=(LoraConfig(source=str(path)),)))


@pytest.mark.parametrize("text", ["{", "[]", "3", "null"])
def test_a_record_in_a_header_that_is_no_object_is_refused_before_a_run(base, tmp_path, text):
    down, up = pair(ATTENTION)
    held = {f"unet.{ATTENTION}.lora_A.weight": down, f"unet.{ATTENTION}.lora_B.weight": up}
    save_file(held, tmp_path / "a.safetensors", {"lora_adapter_metadata": text})

    with pytest.raises(ConfigError, match="lora_adapter_metadata in its header is no JSON object"):
        resolve(ModelConfig(base=str(base), loras=(LoraConfig(source=str(tmp_path / "a.safetensors")),)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
def test_a_quantized_lora_is_refused_before_a_run(base, tmp_path, dtype):
    down, up = (tensor.to(dtype) for tensor in pair(ATTENTION))
    save_file({f"{_NAME}.lora_down.weight": down, f"{_NAME}.lora_up.weight": up}, tmp_path / "a.safetensors")

    with pytest.raises(ConfigError, match=r"lora_(down|up).weight has dtype .*quantized weights are not supported"):
        resolve(ModelConfig(base=str(base), loras=(LoraConfig(source=str(tmp_path / "a.safetensors")),)))


def test_a_bias_for_a_layer_without_one_is_refused_by_that_cause(base, tmp_path):
    down, up = pair(ATTENTION)
    held = {f"{_NAME}.lora_down.weight": down, f"{_NAME}.lora_up.weight": up, f"{_NAME}.lora_up.bias": up[:, 0]}
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, tmp_path / "a.safetensors")

    with pytest.raises(ConfigError, match=r"it changes a bias .*, but the layer has none"):
        resolve(ModelConfig(base=str(base), loras=(LoraConfig(source=str(tmp_path / "a.safetensors")),)))


def test_a_record_of_peft_is_part_of_the_identity_and_must_be_there(base, tmp_path):
    down, up = pair(ATTENTION)
    path = tmp_path / "adapter_model.safetensors"
    name = f"base_model.model.{ATTENTION}"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)
    model = ModelConfig(base=str(base), loras=(LoraConfig(source=str(path)),))

    with pytest.raises(ConfigError, match=r"saved by peft, whose scale is in adapter_config\.json"):
        resolve(model)
    identities = []
    for alpha in (3, 6):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": alpha}))
        identities.append(resolve(model).loras[0].identity())
    assert identities[0] != identities[1]
    for record, message in (
        ({"peft_type": "IA3"}, "peft type IA3, which is not supported"),
        ({"peft_type": "LORA", "r": 0, "lora_alpha": "x"}, "not a valid record of peft"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(record))
        with pytest.raises(ConfigError, match=message):
            resolve(model)


@pytest.mark.parametrize("in_header", [False, True])
@pytest.mark.parametrize("kind", ["LOHA", "LOKR"])
def test_loha_and_lokr_of_peft_are_scaled_by_their_record(base, tmp_path, kind, in_header):
    weight = weight_of(ATTENTION)
    made, delta = KINDS["loha" if kind == "LOHA" else "lokr, whole"][0](weight.shape, 4)
    path = tmp_path / "adapter_model.safetensors"
    config = {"LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig}[kind](r=4, alpha=2, rank_dropout=0.1)
    record = {key: sorted(each) if isinstance(each, set) else each for key, each in config.to_dict().items()}
    prefix, metadata = f"base_model.model.{ATTENTION}", None
    if in_header:
        prefix = f"unet.{ATTENTION}"
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": each for key, each in record.items()})}
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps(record))
    save_file({f"{prefix}.{name}": tensor for name, tensor in made.items()}, path, metadata)

    assert_weights(load(base, (path, 1.0)), {ATTENTION: weight + 0.5 * delta})


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    "spelled", ["text_encoder.encoder.layers.1.mlp.{}", "lora_te_text_model_encoder_layers_1_mlp_{}"]
)
def test_a_lora_for_the_text_encoder_s_feed_forward_alone_is_applied(base, tmp_path, spelled, fuse):
    tensors, expected = {}, {}
    for number, name in enumerate(("fc1", "fc2"), 1):
        layer = f"encoder.layers.1.mlp.{name}"
        down, up = pair(layer, number)
        tensors |= {f"{spelled.format(name)}.lora_{each}.weight": m for each, m in (("down", down), ("up", up))}
        expected[layer] = weight_of(layer) + 0.5 * product(down, up)
    save_file(tensors, tmp_path / "a.safetensors")

    assert_weights(load(base, (tmp_path / "a.safetensors", 0.5), fuse=fuse), expected)


# --- bundled textual inversions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["string_to_param.*", "emb_params", "clip_l"])
def test_bundled_embeddings_are_textual_inversions(base, tmp_path, ending):
    down, up = pair(ATTENTION)
    vectors = numbers(2, 16, seed=7)
    save_file(
        {
            f"{kohya(ATTENTION)}.lora_down.weight": down,
            f"{kohya(ATTENTION)}.lora_up.weight": up,
            f"bundle_emb.my cat.{ending}": vectors,
        },
        tmp_path / "a.safetensors",
    )

    found = load(base, (tmp_path / "a.safetensors", 1.0))

    numbers_of = found["tokenizer"].convert_tokens_to_ids(["my cat", "my cat_1"])
    table = found["text_encoder"].get_input_embeddings().weight.data
    assert torch.equal(table[numbers_of], vectors)


# --- refused by name --------------------------------------------------------------------------------------------------

_NAME = kohya(ATTENTION)

NORM = "lora_unet_mid_block_resnets_0_norm1"
REFUSED = {
    "IA3": ({f"{_NAME}.weight": (16,), f"{_NAME}.on_input": ()}, "kind IA3"),
    "IA3 of peft": ({f"base_model.model.{ATTENTION}.ia3_l": (16, 1)}, "kind IA3"),
    "OFT": ({f"{_NAME}.oft_blocks": (4, 4, 4), f"{_NAME}.alpha": ()}, "kind OFT"),
    "OFT of peft": ({f"base_model.model.{ATTENTION}.oft_r": (4, 4, 4)}, "kind OFT"),
    "OFT of peft, R": ({f"base_model.model.{ATTENTION}.oft_R.weight": (4, 6)}, "kind OFT"),
    "BOFT": ({f"{_NAME}.oft_blocks": (2, 4, 4, 4), f"{_NAME}.alpha": ()}, "kind BOFT"),
    "BOFT of peft": ({f"base_model.model.{ATTENTION}.boft_R": (2, 4, 4, 4)}, "kind BOFT"),
    "GLoRA": ({f"{_NAME}.{part}.weight": (4, 4) for part in ("a1", "a2", "b1", "b2")}, "kind GLoRA"),
    "OFT of kohya": ({f"{_NAME}.oft_diag": (16,)}, "kind OFT"),
    "GLoKr": ({f"{_NAME}.glokr_w1": (4, 4), f"{_NAME}.glokr_w2": (4, 4)}, "kind GLoKr"),
    "GLoRA of LyCORIS": ({f"{_NAME}.glora_a1": (4, 4)}, "kind GLoRA"),
    "VeRA": ({f"base_model.model.{ATTENTION}.vera_lambda_{each}": (4,) for each in "bd"}, "kind VeRA"),
    "AdaLoRA": (
        {f"base_model.model.{ATTENTION}.lora_{each}": (4, 16) for each in "ABE"},
        "kind AdaLoRA",
    ),
    "HRA": ({f"base_model.model.{ATTENTION}.hra_u": (16, 4)}, "kind HRA"),
    "FourierFT": ({f"base_model.model.{ATTENTION}.fourierft_spectrum": (100,)}, "kind FourierFT"),
    "VB-LoRA": ({f"base_model.model.{ATTENTION}.vblora_logits_A": (4, 2, 9)}, "kind VB-LoRA"),
    "embeddings of peft": ({"base_model.model.text_model.embeddings.lora_embedding_A": (4, 9)}, "kind embedding LoRA"),
    "bundled for SDXL": ({f"{_NAME}.diff": (16, 16), "bundle_emb.cat.clip_g": (2, 1280)}, "bundle_emb.cat.clip_g"),
    "bundled, other width": ({"bundle_emb.cat.emb_params": (2, 768)}, "its textual inversion 'cat' is made for"),
    "another layer": ({"lora_unet_mid_block_attentions_9_proj_in.diff": (16, 16)}, "is not a layer of this model"),
    "another network": ({"lora_prior_proj.diff": (16, 16), f"{_NAME}.diff": (16, 16)}, "not belong to a network"),
    "no layer": (
        {"lora_unet_nowhere.diff": (16, 16), f"{_NAME}.diff": (16, 16)},
        "'nowhere' of the unet is not a layer",
    ),
    "Flux": ({"transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight": (4, 8)}, "another family"),
    "SDXL": ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 8)}, "another family"),
    "another shape": ({f"{_NAME}.diff": (640, 16)}, r"invalid shapes \(got \(640, 16\), expected"),
    "half of a LoHa": (
        {f"{_NAME}.hada_w1_a": (16, 2), f"{_NAME}.hada_w1_b": (2, 16)},
        "a matrix of its LoHa is missing",
    ),
    "half of a LoKr": ({f"{_NAME}.lokr_w1": (2, 2)}, "a factor of its LoKr is missing"),
    "a magnitude alone": ({f"{_NAME}.dora_scale": (16, 1), f"{_NAME}.diff_b": (16,)}, "DoRA magnitude but no matrices"),
    "an unknown tensor": ({f"{_NAME}.diff": (16, 16), f"{_NAME}.diff_q": (3,)}, "diff_q.*unsupported kind"),
    **{
        f"{kind} of peft": (
            {f"base_model.model.{ATTENTION}.{name}": (4, 4), "base_model.model.b": (1,)},
            f"kind {kind}",
        )
        for kind, name in {
            "SHiRA": "shira_weight",
            "RandLoRA": "randlora_lambda",
            "MiSS": "miss_block",
            "C3A": "c3a_kernel",
            "LN tuning": "ln_tuning_layers.weight",
            "Poly": "poly_lora_A",
            "HiRA": "hira_A",
            "RoAd": "road_theta",
            "DeLoRA": "delora_A",
            "WaveFT": "waveft_spectrum",
            "Bone": "bone_block",
        }.items()
    },
    "whole modules": (
        {
            f"base_model.model.{ATTENTION}.lora_A.weight": (2, 16),
            "base_model.model.conv_out.modules_to_save.weight": (4,),
        },
        r"modules that were trained whole \(peft: modules_to_save\)",
    ),
    "whole modules, as peft names them in a file": (
        {
            f"base_model.model.{ATTENTION}.lora_A.weight": (2, 16),
            f"base_model.model.{ATTENTION}.lora_B.weight": (16, 2),
            "base_model.model.conv_out.weight": (4,),
        },
        "is the whole weight of a layer, as peft saves modules_to_save",
    ),
    **{
        f"a trained bias, {name}": (
            {f"{_NAME}.diff": (16, 16), f"{name}": (16,)},
            "is a trained bias of the base, as peft saves it with the setting `bias`",
        )
        for name in (f"base_model.model.{ATTENTION}.bias", f"unet.{ATTENTION}.base_layer.bias")
    },
    "base layers": (
        {f"base_model.model.{ATTENTION}.base_layer.weight": (16, 16), "b": (1,)},
        r"LoRA together with the weights of its base \(peft: base_layer\)",
    ),
    **{
        f"rank 0, {kind}": ({f"{_NAME}.{name}": shape for name, shape in shapes.items()}, "its rank is 0")
        for kind, shapes in {
            "LoRA": {"lora_down.weight": (0, 16), "lora_up.weight": (16, 0)},
            "LoHa": {f"hada_w{one}_{two}": (16, 0) if two == "a" else (0, 16) for one in "12" for two in "ab"},
            "LoKr": {"lokr_w1": (1, 1), "lokr_w2_a": (16, 0), "lokr_w2_b": (0, 16)},
        }.items()
    },
    **{
        f"names in {prefix}": (
            {f"{prefix}{ATTENTION}.lora_A.weight": (2, 16), f"{prefix}{ATTENTION}.lora_B.weight": (16, 2)},
            "is of a network that Stable Diffusion 1.5 does not have",
        )
        for prefix in ("transformer.", "base_model.model.transformer.", "lora_transformer_")
    },
    "ComfyUI's patch of a whole weight": ({f"unet.{ATTENTION}.set_weight": (16, 16), "b": (1,)}, "ComfyUI: set_weight"),
    "ComfyUI's reshaped layer": ({f"{_NAME}.diff": (16, 16), f"{_NAME}.reshape_weight": (2,)}, "reshape_weight"),
    **{
        f"HCP-Diffusion, {name}": ({f"{name}.{each}": (2, 2) for each in ("a", "b")}, "file of HCP-Diffusion")
        for name in (
            f"lora:{ATTENTION}.___.layer",
            f"{ATTENTION}.___.layer",
            f"{ATTENTION}.lora_block_0.layer",
            f"base:{ATTENTION}",
            f"plugin:{ATTENTION}",
        )
    },
    "trained tokens": (
        {"base_model.model.embeddings.token_embedding.trainable_tokens_delta": (1, 16), "b": (1,)},
        "trainable tokens of peft",
    ),
    "a vector as matrix": (
        {f"{_NAME}.lora_down.weight": (1, 16), f"{_NAME}.lora_up.weight": (16,)},
        r"invalid shapes \(got \(1, \d+\) and \(16,\), expected \(1, \d+\) and \(\d+, 1\)\)",
    ),
    "a norm with matrices": (
        {f"{NORM}.lora_down.weight": (2,), f"{NORM}.lora_up.weight": (32, 2)},
        "a norm, whose weight is a vector, cannot have down",
    ),
    "a norm with a LoHa": (
        {f"{NORM}.hada_w{one}_{two}": (32, 1) if two == "a" else (1, 1) for one in "12" for two in "ab"},
        "a norm, whose weight is a vector, cannot have hada_w1_a",
    ),
    "T-LoRA": ({f"lora_unet_{ATTENTION}.q_layer.weight": (4, 4), "lora_unet_x.lambda_layer": (1, 4)}, "kind T-LoRA"),
    "ABBA": ({f"unet.{ATTENTION}.abba_a1": (4, 4)}, "kind ABBA"),
    "SVDiff": ({f"unet.{ATTENTION}.spectral_shifts": (4,), "b": (1,)}, "kind SVDiff"),
    "Custom Diffusion": (
        {f"{ATTENTION.rpartition('.')[0]}.processor.to_k_custom_diffusion.weight": (4, 4), "b": (1,)},
        "kind Custom Diffusion",
    ),
    "twice": ({f"{_NAME}.diff": (16, 16), f"unet.{ATTENTION}.diff": (16, 16)}, "are the same layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_engine_applies_is_refused_before_a_run(base, tmp_path, case):
    shapes, message = REFUSED[case]
    width = weight_of(ATTENTION).shape
    fitted = {name: (width if shape == (16, 16) else shape) for name, shape in shapes.items()}
    save_file({name: torch.zeros(shape) for name, shape in fitted.items()}, tmp_path / "a.safetensors")

    with pytest.raises(ConfigError, match=message) as raised:
        resolve(ModelConfig(base=str(base), loras=(LoraConfig(source=str(tmp_path / "a.safetensors")),)))
    assert re.search(r"model\.loras\[0\]: .*a\.safetensors", str(raised.value))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("case", ["loha", "lokr, whole"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_number_of_any_kind_that_is_not_finite_is_refused_with_its_tensor(base, tmp_path, case, dtype):
    made, _ = KINDS[case][0](weight_of(ATTENTION).shape, 4)
    for bad in sorted(made):
        held = {f"{_NAME}.{name}": tensor.to(dtype, copy=True) for name, tensor in made.items()}
        held[f"{_NAME}.{bad}"].view(-1)[-1] = math.inf
        save_file(held, tmp_path / "a.safetensors")
        with pytest.raises(ConfigError, match=rf"'{_NAME}\.{bad}' holds NaN or infinity"):
            load(base, (tmp_path / "a.safetensors", 1.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused_with_its_tensor(base, tmp_path, bad):
    down, up = pair(ATTENTION)
    up[0, 0] = bad
    save_file({f"{_NAME}.lora_down.weight": down, f"{_NAME}.lora_up.weight": up}, tmp_path / "a.safetensors")

    with pytest.raises(ConfigError, match=rf"a\.safetensors: '{_NAME}\.lora_up\.weight' holds NaN or infinity"):
        load(base, (tmp_path / "a.safetensors", 1.0))


LORA = ("lora", "lokr, whole", "loha", "full")


def numbered(path: Path, kind: str, role: str, *values: torch.Tensor, **more: torch.Tensor) -> Path:
    """A file with one layer for each value, which is its alpha or scalar."""
    tensors = dict(more)
    for layer, value in zip(UNET_LAYERS, values, strict=False):
        made, _ = KINDS[kind][0](weight_of(layer).shape, 3)
        tensors |= {f"{kohya(layer)}.{name}": tensor for name, tensor in made.items()}
        tensors[f"{kohya(layer)}.{role}"] = value.clone()
    save_file(tensors, path)
    return path


def of_type(value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("kind", LORA)
@pytest.mark.parametrize("role", ["alpha", "scalar"])
@pytest.mark.parametrize(
    "bad",
    [
        *(of_type(math.nan, each) for each in (torch.float64, *DTYPES, torch.float8_e5m2)),
        *(of_type(math.inf, each) for each in (torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2)),
        of_type(-math.inf, torch.float32)[None],
        of_type(1e300, torch.float64),
    ],
    ids=str,
)
def test_a_factor_that_is_no_finite_number_is_refused_before_a_run_by_file_and_tensor(base, tmp_path, kind, role, bad):
    path = numbered(tmp_path / "a.safetensors", kind, role, torch.tensor(1.0), bad)

    message = (
        rf"a\.safetensors: tensor {kohya(UNET_LAYERS[1])}\.{role} is (nan|-?inf|1e\+300), expected a finite number"
    )
    with pytest.raises(ConfigError, match=message):
        resolve(ModelConfig(base=str(base), loras=(LoraConfig(source=str(path)),)))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e8m0fnu])
def test_a_factor_of_a_dtype_without_numbers_is_refused_before_a_run(base, tmp_path, dtype):
    path = numbered(tmp_path / "a.safetensors", "lora", "alpha", torch.ones((), dtype=dtype))

    with pytest.raises(
        ConfigError, match=r"a\.safetensors: tensor .*\.alpha has dtype \w+, expected a number; save it"
    ):
        resolve(ModelConfig(base=str(base), loras=(LoraConfig(source=str(path)),)))


@pytest.mark.parametrize("zero", [torch.tensor(0.0), torch.tensor([0]), torch.tensor(-0.0).half()], ids=str)
@pytest.mark.parametrize(
    ("kind", "role"), [("lora", "alpha"), ("loha", "alpha"), ("lora", "scalar"), ("full", "scalar")]
)
def test_layers_with_the_factor_zero_are_counted_and_a_file_of_no_others_is_refused(base, tmp_path, kind, role, zero):
    some = numbered(tmp_path / "some.safetensors", kind, role, zero, torch.tensor(3.0), zero)
    every = numbered(tmp_path / "every.safetensors", kind, role, zero, zero)

    (notice,) = resolve(ModelConfig(base=str(base), loras=(LoraConfig(source=str(some)),))).notices
    assert re.search(
        rf"some\.safetensors: layers without effect, .* is 0: 2, such as .*{kohya(UNET_LAYERS[0])}", notice
    )
    with pytest.raises(
        ConfigError, match=r"every\.safetensors changes nothing: .* every layer is 0.*leave the LoRA out"
    ):
        resolve(ModelConfig(base=str(base), loras=(LoraConfig(source=str(every)),)))


@pytest.mark.parametrize("kind", UNSCALED)
def test_an_alpha_of_zero_does_not_count_in_a_layer_without_a_rank(base, tmp_path, kind):
    path = numbered(tmp_path / "a.safetensors", kind, "alpha", torch.tensor(0.0))

    assert resolve(ModelConfig(base=str(base), loras=(LoraConfig(source=str(path)),))).notices == ()


@pytest.mark.parametrize("extra", ["dora_scale", "diff_b"])
def test_a_layer_that_changes_besides_its_product_is_no_layer_of_zero(base, tmp_path, extra):
    layer = UNET_LAYERS[0] if extra == "dora_scale" else RESNET
    down, up = pair(layer)
    value = torch.ones(len(up), 1) if extra == "dora_scale" else torch.ones(len(up))
    held = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(0.0), extra: value}
    save_file({f"{kohya(layer)}.{name}": tensor for name, tensor in held.items()}, tmp_path / "a.safetensors")

    assert (
        resolve(ModelConfig(base=str(base), loras=(LoraConfig(source=str(tmp_path / "a.safetensors")),))).notices == ()
    )


@pytest.mark.parametrize("in_header", [False, True])
def test_a_record_of_peft_with_the_alpha_zero_is_refused_unless_a_pattern_has_another(base, tmp_path, in_header):
    down, up = pair(ATTENTION)
    name = f"{'unet' if in_header else 'base_model.model'}.{ATTENTION}"
    path = tmp_path / "a.safetensors"
    for patterns in ({}, {"to_k": 3}):
        whole = {"r": 3, "lora_alpha": 0, "alpha_pattern": patterns}
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in whole.items()})}
        save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path, metadata if in_header else None)
        (tmp_path / "adapter_config.json").write_text(json.dumps(whole))
        expected = (
            nullcontext() if patterns else pytest.raises(ConfigError, match=r"a\.safetensors changes nothing: the")
        )
        with expected:
            resolve(ModelConfig(base=str(base), loras=(LoraConfig(source=str(path)),)))


def test_a_number_that_is_left_out_may_be_anything(base, tmp_path):
    path = numbered(
        tmp_path / "a.safetensors",
        "lora",
        "alpha",
        torch.tensor(1.0),
        **{f"{kohya(TEXT)}.alpha": torch.tensor(math.nan)},
    )

    load(base, (path, 1.0))


def test_constants_that_change_nothing_are_left_out_and_counted(base, tmp_path, caplog):
    down, up = pair(ATTENTION)
    save_file(
        {
            f"{_NAME}.lora_down.weight": down,
            f"{_NAME}.lora_up.weight": up,
            f"{kohya(OUT)}.alpha": torch.tensor(1.0),
            "text_encoder.text_model.embeddings.position_ids": torch.arange(77)[None],
        },
        tmp_path / "a.safetensors",
    )
    with caplog.at_level("INFO"):
        found = load(base, (tmp_path / "a.safetensors", 1.0))

    assert_weights(found, {ATTENTION: weight_of(ATTENTION) + product(down, up)})
    assert [record.getMessage() for record in caplog.records if "left_out" in record.getMessage()] == [
        "tensors_left_out key=model.loras[0] file=a.safetensors num_tensors=2"
    ]


SPARE = {
    **dict.fromkeys(("epoch", "global_step", "step", "iteration", "logit_scale", "v_pred", "ztsnr"), ()),
    "state_dict.global_step": (),
    "optimizer_states.0": (3,),
    "text_projection": (4, 4),
    "text_projection.weight": (4, 4),
    "text_encoder.text_projection.weight": (4, 4),
    "lora_te_text_projection.lora_down.weight": (4, 4),
    "text_encoder.text_projection.lora_A.weight": (2, 4),
    "cond_stage_model.transformer.text_projection.weight": (4, 4),
    "text_encoder.logit_scale": (),
    "text_encoder.text_model.embeddings.position_ids": (1, 77),
    "edm_mean": (),
}


@pytest.mark.parametrize("name", SPARE)
def test_what_belongs_to_no_layer_is_left_out_and_counted_in_a_notice(base, tmp_path, name):
    down, up = pair(ATTENTION)
    held = {f"{_NAME}.lora_down.weight": down, f"{_NAME}.lora_up.weight": up, name: torch.ones(SPARE[name])}
    save_file(held, tmp_path / "a.safetensors")

    notices = resolve(ModelConfig(base=str(base), loras=(LoraConfig(source=str(tmp_path / "a.safetensors")),))).notices
    wanted = "model.loras[0]: a.safetensors: left out tensors that change no weight of this model (1, such as " + name
    assert notices[0] == wanted + ")"
    found = load(base, (tmp_path / "a.safetensors", 1.0))
    assert_weights(found, {ATTENTION: weight_of(ATTENTION) + product(down, up)})


@pytest.mark.parametrize("name", ["network_args", "epochs", "lora_unet_step", "text_projector.weight", "v_pred2"])
def test_a_name_that_only_resembles_a_leftover_is_refused(base, tmp_path, name):
    down, up = pair(ATTENTION)
    held = {f"{_NAME}.lora_down.weight": down, f"{_NAME}.lora_up.weight": up, name: torch.ones(4)}
    save_file(held, tmp_path / "a.safetensors")

    with pytest.raises(ConfigError, match=name):
        resolve(ModelConfig(base=str(base), loras=(LoraConfig(source=str(tmp_path / "a.safetensors")),)))


@pytest.mark.parametrize("motion", [False, True])
def test_a_lora_fits_a_base_and_an_adapter_in_single_files(base, tmp_path, motion):
    """Names and shapes of the layers come from headers with original names."""
    checkpoint = layouts.write(layouts.checkpoint(base), tmp_path / "base.safetensors")
    configs = layouts.configs(base, tmp_path / "configs")
    layer = MOTION if motion else RESNET
    down, up = pair(layer)
    path = tmp_path / "a.safetensors"
    model = ModelConfig(
        base=str(checkpoint),
        config=str(configs),
        motion_adapter=str(base / "motion_adapter"),
        loras=(LoraConfig(source=str(path)),),
    )
    save_file({f"{kohya(layer)}.lora_down.weight": down, f"{kohya(layer)}.lora_up.weight": up}, path)
    assert len(resolve(model).loras) == 1

    save_file({f"{kohya(layer)}.lora_down.weight": down, f"{kohya(layer)}.lora_up.weight": up[1:]}, path)
    with pytest.raises(ConfigError, match="invalid shapes"):
        resolve(model)
