"""`weights.wrapped_names`: names of tensors without the wrappers of trainers, and what names say of quantization."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from pia_batch import tiny
from pia_batch.config import ModelConfig
from pia_batch.errors import ConfigError
from pia_batch.weights import image_prompt_files, lora_files, quantized_names
from pia_batch.weights.resolve import resolve
from pia_batch.weights.wrapped_names import unwrapped

OWN = "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.weight"
WRAPPED = {
    "plain": OWN,
    "Lightning": f"state_dict.{OWN}",
    "data parallel": f"module.{OWN}",
    "compiled": f"_orig_mod.{OWN}",
    "compiled, then parallel": f"module._orig_mod.{OWN}",
    "all at once": f"state_dict.module.state_dict._orig_mod.{OWN}",
    "compiled by blocks": OWN.replace("transformer_blocks.0", "transformer_blocks.0._orig_mod"),
    "FSDP": "_fsdp_wrapped_module." + OWN.replace("attentions.1", "attentions.1._fsdp_wrapped_module"),
    "activation checkpoints": OWN.replace("attn1", "attn1._checkpoint_wrapped_module"),
    "parallel inside": OWN.replace("down_blocks.0", "down_blocks.0.module"),
}


@pytest.mark.parametrize("name", WRAPPED.values(), ids=WRAPPED)
def test_the_name_inside_of_all_wrappers_is_the_networks_own(name):
    assert unwrapped(name) == OWN


@pytest.mark.parametrize("name", WRAPPED.values(), ids=WRAPPED)
def test_loras_and_adapters_have_names_without_wrappers_too(name):
    lora = lora_files.parse(name.replace(".weight", ".lora_A.weight"))

    assert lora is not None
    assert (lora.network, f"{lora.layer}.weight") == ("unet", OWN)
    proj = name.replace(OWN, "image_proj.proj.weight") if name.endswith(OWN) else "module.image_proj.proj.weight"
    assert image_prompt_files.adapter_tensors([proj]) == {"image_proj.proj.weight": proj}


@pytest.mark.parametrize("name", ["motion_modules.0.norm.weight", "adapter_modules.1.weight", "model.conv.weight"])
def test_names_that_only_look_like_wrappers_stay(name):
    assert unwrapped(name) == name


def renamed(folder: Path, part: str, change) -> str:
    """Return a copy of the embedded model, with the names of one part's tensors changed."""
    shutil.copytree(tiny.PATH, folder)
    (path,) = (folder / part).glob("*.safetensors")
    save_file({change(name): held for name, held in load_file(path).items()}, path)
    return str(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "motion_adapter"])
def test_a_wrapped_network_is_found_and_one_under_another_name_is_refused_with_that_name(tmp_path, part):
    wrapped = renamed(tmp_path / "wrapped", part, lambda name: f"_fsdp_wrapped_module.{name}")
    other = renamed(tmp_path / "other", part, lambda name: f"params_ema.net.{name}")

    assert part in resolve(ModelConfig(base=wrapped)).components
    with pytest.raises(ConfigError, match=r"the names of its tensors have 'params_ema\.net\.' before those of the "):
        resolve(ModelConfig(base=other))


LAYER = "mid_block.attentions.0.proj_in"
QUANTIZED = {
    "bitsandbytes, 4 bits": [".weight.absmax", ".weight.quant_map", ".weight.quant_state.bitsandbytes__nf4"],
    "bitsandbytes, nested": [".weight.nested_absmax", ".weight.nested_quant_map"],
    "bitsandbytes, 8 bits": [".SCB", ".weight_format"],
    "optimum-quanto": [".weight._data", ".weight._scale", ".weight._shift", ".weight._data._data", ".input_scale"],
    "torchao": ["._weight_qdata", "._weight_scale", "._weight_zero_point"],
    "AWQ and GPTQ": [".qweight", ".qzeros", ".scales", ".g_idx"],
    "compressed-tensors": [".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape_scale"],
    "nunchaku": [".wscales", ".smooth", ".smooth_orig"],
    "SDNQ": [".scale", ".zero_point", ".svd_up", ".svd_down"],
    "ComfyUI": [".scale_weight", ".scale_input", ".comfy_quant", ".weight_scale_2", ".weight_scale_inv"],
}


@pytest.mark.parametrize(("kind", "ending"), [(kind, ending) for kind, all_ in QUANTIZED.items() for ending in all_])
def test_what_quantized_weights_need_is_refused_by_name(kind, ending):
    del kind
    with pytest.raises(ConfigError, match=r"tensor mid_block\S+ belongs to quantized weights"):
        quantized_names.refuse(["conv_in.weight", LAYER + ending], Path("unet"))


def test_no_tensor_of_a_network_is_called_quantized():
    for part in ("unet", "vae", "text_encoder", "motion_adapter"):
        (path,) = (tiny.PATH / part).glob("*.safetensors")
        quantized_names.refuse(load_file(path), path)
    names = ["first_stage_model.quant_conv.weight", "first_stage_model.post_quant_conv.bias", "scale_factor"]
    quantized_names.refuse([*names, "model.logit_scale", "conditioner.logit_scale"], Path("unet"))


def test_four_bit_weights_are_named_before_their_shapes_are_taken_for_another_familys(tmp_path):
    base = renamed(tmp_path / "base", "unet", lambda name: name)
    path = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    held = load_file(path)
    for name in [name for name in held if name.endswith("attn2.to_k.weight")]:
        held[name] = held[name].reshape(-1, 1)[::4].copy().astype("uint8")
        held[f"{name}.absmax"] = held[name][:1].astype("float32").copy()
    save_file(held, path)

    with pytest.raises(ConfigError, match=r"absmax belongs to quantized weights, which are not supported"):
        resolve(ModelConfig(base=base))
