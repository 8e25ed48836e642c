"""Layouts in which bases, VAEs and motion adapters are published: each loads exactly, or `plan` refuses it by name.

A case changes the files of a small model with random weights. The expected weights are those that the files were made
from; what a layout does to a tensor is written here again, and not taken from the loader.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layouts
import pipelines
import pytest
import torch
from layouts import TEXT, UNET, VAE, Tensors
from safetensors.torch import load_file

from pia_batch.config import ModelConfig, RunConfig, SchedulerConfig
from pia_batch.driver.preflight.storage import check_weights
from pia_batch.engine import loading
from pia_batch.errors import ConfigError
from pia_batch.planning.plan import engine_ids_of
from pia_batch.weights.resolve import resolve

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kept")
    pipelines.save(pipelines.build(), path)
    return path


@pytest.fixture(scope="module")
def tensors(kept: Path) -> Tensors:
    return layouts.checkpoint(kept)


@pytest.fixture(scope="module")
def truth(kept: Path) -> loading.Components:
    return load(base=str(kept))


@pytest.fixture
def folder(kept: Path, tmp_path: Path) -> Path:
    return shutil.copytree(kept, tmp_path / "folder")


def load(dtype: torch.dtype = torch.float32, **settings: Any) -> loading.Components:
    model = ModelConfig(**settings, scheduler=SchedulerConfig(name="checkpoint"))
    return loading.load(model, resolve(model), CPU, dtype)


def assert_same(found: loading.Components, wanted: loading.Components) -> None:
    for name in ("text_encoder", "vae", "unet"):
        ours, theirs = getattr(found, name).state_dict(), getattr(wanted, name).state_dict()
        assert set(ours) == set(theirs)
        for each, tensor in theirs.items():
            assert torch.equal(ours[each], tensor), each


def assert_refused(message: str, **settings: Any) -> None:
    """`plan` and `doctor` refuse the model in one line, without reading a tensor."""
    model = ModelConfig(**settings)
    with pytest.raises(ConfigError, match=message) as caught:
        engine_ids_of(RunConfig(manifest="m.parquet", output="out", model=model))
    assert "\n" not in str(caught.value)
    (finding,) = check_weights({"default": model})
    assert finding.state == "fail"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_prefix(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def with_more(**shapes: tuple[int, ...]) -> Callable[[Tensors], Tensors]:
    more = {name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()}
    return lambda tensors: tensors | more


def renamed_prefixes(*pairs: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        found = tensors
        for old, new in pairs:
            found = {
                new + name.removeprefix(old) if name.startswith(old) else name: each for name, each in found.items()
            }
        return found

    return change


def renamed(*pairs: tuple[str, str], flat: bool = False) -> Callable[[Tensors], Tensors]:
    """Rename the VAE's attention; `flat` also stores its layers as matrices."""

    def change(tensors: Tensors) -> Tensors:
        found = {}
        for name, tensor in tensors.items():
            new = name
            if ".attn_1." in name:
                for old, other in pairs:
                    new = new.replace(f".{old}.", f".{other}.")
                if flat:
                    tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor  # noqa: PLW2901
            found[new] = tensor
        return found

    return change


PUBLISHED = (("q", "query"), ("k", "key"), ("v", "value"), ("proj_out", "proj_attn"))
CONVERTED = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))


def reshaped(tensors: Tensors) -> Tensors:
    """The UNet's linear layers as 1 x 1 convolutions, and its 1 x 1 convolutions as matrices."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if name.startswith(UNET) and "transformer_blocks" in name and tensor.ndim == 2:
            found[name] = tensor[:, :, None, None]
        elif name.startswith(UNET) and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            found[name] = tensor[:, :, 0, 0]
    return found


CHECKPOINTS: dict[str, Callable[[Tensors], Tensors]] = {
    "as published": lambda tensors: tensors,
    "state_dict.": lambda tensors: (
        with_prefix("state_dict.")(tensors)
        | {"epoch": torch.ones(1), "global_step": torch.ones(1), "optimizer_states.0.x": torch.ones(2)}
    ),
    "module.": with_prefix("module."),
    "state_dict.module.": with_prefix("state_dict.module."),
    "compiled": with_prefix("_orig_mod."),
    "averaged weights": with_more(model_ema__diffusion_modelinput_blocks00weight=(2, 2)),
    "image tower": with_more(
        **{f"{TEXT.removesuffix('text_model.')}vision_model.encoder.layers.0.layer_norm1.weight": (4,)},
        cond_stage_model__transformer__visual_projection__weight=(4, 4),
        cond_stage_model__logit_scale=(1,),
    ),
    "ComfyUI's": renamed_prefixes(
        ("cond_stage_model.transformer.", "text_encoders.clip_l.transformer."), ("first_stage_model.", "vae.")
    ),
    "ComfyUI's text encoder": renamed_prefixes(
        ("cond_stage_model.transformer.", "cond_stage_model.clip_l.transformer.")
    ),
    "generative-models'": renamed_prefixes(("cond_stage_model.", "conditioner.embedders.0.")),
    "noise levels": with_more(sigmas=(1000,), log_sigmas=(1000,), denoiser__sigmas=(1000,)),
    "image tower outside": with_more(vision_model__post_layernorm__weight=(4,)),
    "matrices and convolutions": reshaped,
    "query": renamed(*PUBLISHED),
    "query as matrix": renamed(*PUBLISHED, flat=True),
    "to_q": renamed(*CONVERTED, flat=True),
    "to_q as convolution": renamed(*CONVERTED),
    "float64": lambda tensors: {name: tensor.double() for name, tensor in tensors.items()},
    "old text encoder": lambda tensors: {
        name.replace(".text_model.", ".") if name.startswith(TEXT) else name: tensor for name, tensor in tensors.items()
    },
    "without positions": lambda tensors: {
        name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")
    },
}


@pytest.mark.parametrize("layout", CHECKPOINTS)
def test_a_checkpoint_loads_exactly(kept, tensors, truth, tmp_path, layout):
    base = layouts.write(CHECKPOINTS[layout](tensors), tmp_path / "base.safetensors")

    found = load(
        base=str(base),
        config=str(layouts.configs(kept, tmp_path / "configs")),
        motion_adapter=str(kept / "motion_adapter"),
    )

    assert_same(found, truth)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_short_floats_load_as_the_numbers_that_they_are(kept, tensors, tmp_path, dtype):
    short = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    base = layouts.write(short, tmp_path / "base.safetensors")

    found = load(base=str(base), config=str(kept), motion_adapter=str(kept / "motion_adapter"))

    stored = short[f"{UNET}middle_block.1.proj_in.weight"]
    assert torch.equal(found.unet.state_dict()["mid_block.attentions.0.proj_in.weight"], stored.float())


VAES: dict[str, Callable[[Tensors], Tensors]] = {
    "query": renamed(*PUBLISHED, flat=True),
    "query in a checkpoint's names": lambda tensors: with_prefix("first_stage_model.")(renamed(*PUBLISHED)(tensors)),
    "to_q": renamed(*CONVERTED, flat=True),
    "vae.": with_prefix("vae."),
    "module.": with_prefix("module."),
    "state_dict.": lambda tensors: with_prefix("state_dict.")(with_more(loss__logvar=(1,))(tensors)),
    "averaged weights": with_more(model_ema__decoderconv_inweight=(2,)),
}


@pytest.mark.parametrize("layout", VAES)
def test_a_vae_in_a_file_loads_exactly(kept, tensors, truth, tmp_path, layout):
    bare = {name.removeprefix(VAE): tensor for name, tensor in tensors.items() if name.startswith(VAE)}
    file = layouts.write(VAES[layout](bare), tmp_path / "vae.safetensors")
    shutil.copy(kept / "vae" / "config.json", tmp_path / "config.json")

    assert_same(load(base=str(kept), vae=str(file)), truth)


ADAPTERS: dict[str, Callable[[Tensors, Tensors], Tensors]] = {
    "module.": lambda motion, _: with_prefix("module.")(motion),
    "state_dict.module.": lambda motion, _: with_prefix("state_dict.module.")(motion) | {"epoch": torch.ones(1)},
    "unet.": lambda motion, _: with_prefix("unet.")(motion),
    "PIA's training": lambda motion, unet: unet | motion,
    "PIA's training in parallel": lambda motion, unet: with_prefix("state_dict.module.")(unet | motion),
}


@pytest.mark.parametrize("layout", ADAPTERS)
def test_a_motion_adapter_in_a_file_loads_exactly(kept, truth, tmp_path, layout):
    motion = layouts.original_adapter(load_file(kept / "motion_adapter" / WEIGHTS))
    held = ADAPTERS[layout](motion, load_file(kept / "unet" / WEIGHTS))
    file = layouts.write(held, tmp_path / "pia.safetensors")
    shutil.copy(kept / "motion_adapter" / "config.json", tmp_path / "config.json")
    settings = {"base": str(kept), "motion_adapter": str(file)}

    assert_same(load(**settings), truth)
    notices = " ".join(resolve(ModelConfig(**settings)).notices)
    assert ("UNet without motion modules" in notices) == ("training" in layout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_motion_adapter_in_short_floats_has_the_numbers_of_its_file(kept, tmp_path, dtype):
    motion = load_file(kept / "motion_adapter" / WEIGHTS)
    stored = {name: each.to(dtype) for name, each in motion.items() if not name.endswith(".pe")}
    file = layouts.write(layouts.original_adapter(stored), tmp_path / "pia.safetensors")
    shutil.copy(kept / "motion_adapter" / "config.json", tmp_path / "config.json")

    found = load(base=str(kept), motion_adapter=str(file)).unet.state_dict()

    moved = {name: each for name, each in stored.items() if "motion_modules" in name}
    assert moved
    for name, each in moved.items():
        assert torch.equal(found[name], each.to(torch.float32)), name
    assert torch.equal(found["conv_in.weight"][:, 4:], stored["conv_in.weight"][:, 4:].to(torch.float32))


def test_a_whole_clip_model_as_text_encoder_loads_exactly(folder, truth):
    text = folder / "text_encoder"
    held = {
        f"text_model.{name.removeprefix('text_model.')}": each
        for name, each in load_file(text / "model.safetensors").items()
    }
    held |= {"vision_model.embeddings.class_embedding": torch.ones(4), "visual_projection.weight": torch.ones(4, 4)}
    held |= {"logit_scale": torch.ones(1), "text_projection.weight": torch.ones(4, 4)}
    layouts.write(held, text / "model.safetensors")
    inner = json.loads((text / "config.json").read_text())
    whole = {"architectures": ["CLIPModel"], "model_type": "clip", "text_config": inner}
    (text / "config.json").write_text(json.dumps(whole))

    assert_same(load(base=str(folder)), truth)
    (notice,) = resolve(ModelConfig(base=str(folder))).notices
    assert "left out 2 tensors that PIA does not use: 2 image tower of CLIP" in notice


def test_what_is_left_out_is_counted_by_reason_and_reported(kept, tensors, tmp_path):
    more = with_more(model_ema__a=(1,), model_ema__b=(1,), epoch=(1,), safety_checker__x=(1,))
    base = layouts.write(more(tensors), tmp_path / "base.safetensors")
    model = ModelConfig(base=str(base), config=str(kept), motion_adapter=str(kept / "motion_adapter"))

    (notice,) = resolve(model).notices
    (finding,) = check_weights({"default": model})

    assert notice.endswith(
        "left out 4 tensors that PIA does not use: 2 averaged weights, 1 safety checker, 1 state of a training"
    )
    assert notice in finding.message


# --- refused --------------------------------------------------------------------------------------------------------

FOLDERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "SD 2.1": (
        "unet/config.json",
        {"cross_attention_dim": 1024, "use_linear_projection": True},
        r"the UNet of Stable Diffusion 2 \(cross_attention_dim 1024\)",
    ),
    "linear projections": ("unet/config.json", {"use_linear_projection": True}, "the UNet of Stable Diffusion 2"),
    "LCM": (
        "unet/config.json",
        {"time_cond_proj_dim": 256},
        r"LCM-distilled UNet \(time_cond_proj_dim 256\).*LCM LoRA",
    ),
    "SDXL": ("unet/config.json", {"addition_embed_type": "text_time"}, "is the UNet of Stable Diffusion XL"),
    "class labels": ("unet/config.json", {"num_class_embeds": 1000}, "num_class_embeds 1000"),
    "IP-Adapter": ("unet/config.json", {"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type"),
    "GLIGEN": ("unet/config.json", {"attention_type": "gated"}, "attention_type 'gated'"),
    "no middle block": ("unet/config.json", {"mid_block_type": None}, "distilled UNet without middle block"),
    "no attention in the middle": ("unet/config.json", {"mid_block_type": "UNetMidBlock2D"}, "mid_block_type"),
    "other blocks": ("unet/config.json", {"down_block_types": ["KDownBlock2D"] * 2}, "its block KDownBlock2D"),
    "ControlNet": ("unet/config.json", {"_class_name": "ControlNetModel"}, "is a ControlNetModel, but the unet must"),
    "transformer": ("unet/config.json", {"_class_name": "SD3Transformer2DModel"}, "is a SD3Transformer2DModel"),
    "asymmetric VAE": ("vae/config.json", {"_class_name": "AsymmetricAutoencoderKL"}, "is a AsymmetricAutoencoderKL"),
    "TAESD": ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "is a AutoencoderTiny, but the vae must be"),
    "VQ": ("vae/config.json", {"_class_name": "VQModel"}, "is a VQModel"),
    "video VAE": ("vae/config.json", {"_class_name": "AutoencoderKLTemporalDecoder"}, "TemporalDecoder"),
    "SDXL VAE": ("vae/config.json", {"scaling_factor": 0.13025}, "VAE of Stable Diffusion XL"),
    "T5": ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}, "is a T5EncoderModel"),
    "SparseControl": ("motion_adapter/config.json", {"_class_name": "SparseControlNetModel"}, "SparseControlNetModel"),
    "flow": (
        "scheduler/scheduler_config.json",
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        "is not a scheduler",
    ),
    "invalid": ("unet/config.json", {"block_out_channels": "many"}, "config.json"),
    "other channels": ("motion_adapter/config.json", {"block_out_channels": [8, 16]}, "does not fit the base"),
    "other layers": ("motion_adapter/config.json", {"motion_layers_per_block": 3}, "does not fit the base"),
}


@pytest.mark.parametrize("layout", FOLDERS)
def test_a_folder_of_another_kind_is_refused_by_name(folder, layout):
    file, changes, message = FOLDERS[layout]
    edit(folder / file, **changes)

    assert_refused(message, base=str(folder))


@pytest.mark.parametrize("part", ["vae", "motion_adapter"])
def test_a_part_of_its_own_is_checked_in_the_same_way(folder, part):
    edit(folder / part / "config.json", _class_name="AutoencoderTiny")

    assert_refused("is a AutoencoderTiny, but the", base=str(folder), **{part: str(folder / part)})


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae", "motion_adapter"])
@pytest.mark.parametrize("fault", ["more", "less", "shape", "dtype"])
def test_a_folder_that_does_not_hold_its_network_is_refused(folder, part, fault):
    path = next((folder / part).glob("*.safetensors"))
    held = load_file(path)
    name = next(each for each in sorted(held) if each.endswith(".bias"))
    if fault == "more":
        held["extra.weight"] = torch.ones(2)
    elif fault == "less":
        del held[name]
    elif fault == "shape":
        held[name] = torch.ones(3)
    else:
        held[name] = torch.ones(held[name].shape, dtype=torch.int8)
    layouts.write(held, path)
    message = {
        "more": r"unexpected tensors for a .*extra\.weight",
        "less": f"missing tensors of the .*{name}",
        "shape": rf"other shapes than in the .*{name} \(3 instead of",
        "dtype": f"tensor {name} has dtype I8; quantized",
    }[fault]

    assert_refused(message, base=str(folder))


FILES: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "unknown key": ("base", with_more(surprise__weight=(1,)), "belong to no network of .*surprise.weight"),
    "unknown key in the UNet": ("base", with_more(**{f"{UNET}surprise.weight": (1,)}), "unexpected tensors.*surprise"),
    "LCM": ("base", with_more(**{f"{UNET}time_embed.cond_proj.weight": (8, 256)}), "LCM-distilled UNet"),
    "GLIGEN": ("base", with_more(**{f"{UNET}middle_block.1.fuser.linear.weight": (8, 8)}), "GLIGEN"),
    "quantized": ("base", with_more(**{f"{UNET}middle_block.1.proj_in.weight.absmax": (8,)}), "quantized weights"),
    "asymmetric VAE": ("vae", with_more(decoder__condition_encoder__layers__0__weight=(8,)), "AsymmetricAutoencoderKL"),
    "TAESD": (
        "vae",
        lambda _: {"encoder.layers.0.weight": torch.ones(8), "decoder.layers.1.weight": torch.ones(8)},
        "TAESD",
    ),
    "twice": ("vae", with_more(module__quant_conv__bias=(8,)), "have the same place; keep one of them"),
}  # fmt: skip


@pytest.mark.parametrize("layout", FILES)
def test_a_file_of_another_kind_is_refused_by_name(kept, tensors, tmp_path, layout):
    key, change, message = FILES[layout]
    held = (
        tensors
        if key == "base"
        else {name.removeprefix(VAE): tensor for name, tensor in tensors.items() if name.startswith(VAE)}
    )
    file = layouts.write(change(held), tmp_path / "odd.safetensors")
    settings = {"base": str(kept), key: str(file), "motion_adapter": str(kept / "motion_adapter"), "config": str(kept)}

    assert_refused(message, **settings)


@pytest.mark.parametrize(
    "metadata",
    [
        {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"},
        {"modelspec.architecture": "stable-diffusion-xl-v1-base"},
        {"scaling_factor": "0.13025"},
        {"modelspec.architecture": "Flux.1-dev"},
    ],
)
def test_the_vae_of_another_family_is_refused_by_its_metadata(kept, tensors, tmp_path, metadata):
    shapes = {name.removeprefix(VAE): tuple(each.shape) for name, each in tensors.items() if name.startswith(VAE)}
    settings = {"base": str(kept), "config": str(kept), "vae": str(tmp_path / "vae.safetensors")}
    layouts.hollow(shapes, tmp_path / "vae.safetensors", metadata=metadata)
    assert_refused("VAE of Stable Diffusion XL or another family, whose latents do not fit", **settings)

    for own in ("stable-diffusion-v1", "stable-diffusion-v1/vae", "stable-diffusion-v2-512"):
        layouts.hollow(shapes, tmp_path / "vae.safetensors", metadata={"modelspec.architecture": own})
        assert resolve(ModelConfig(**settings)).components["vae"].path == tmp_path / "vae.safetensors"


@pytest.mark.parametrize("name", ["modelspec.prediction_type", "modelspec.predict_key"])
@pytest.mark.parametrize(("trained", "other"), [("v", "epsilon"), ("epsilon", "v_prediction")])
def test_a_prediction_type_in_the_metadata_must_be_that_of_the_scheduler(kept, tensors, tmp_path, trained, other, name):
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    base = layouts.hollow(shapes, tmp_path / "base.safetensors", metadata={name: trained})
    settings = {"base": str(base), "config": str(kept), "motion_adapter": str(kept / "motion_adapter")}
    own = "v_prediction" if trained == "v" else "epsilon"

    assert_refused(
        f"trained with prediction_type: {own} .by its metadata.*set model.scheduler.settings to .*_type: {own}",
        **settings,
        scheduler=SchedulerConfig(settings={"prediction_type": other}),
    )
    model = ModelConfig(**settings, scheduler=SchedulerConfig(settings={"prediction_type": own}))
    assert resolve(model).components["unet"].path == base


MARKED: dict[str, tuple[Tensors, dict[str, Any]]] = {
    "v_pred": ({"v_pred": torch.ones(0)}, {"prediction_type": "v_prediction"}),
    "ztsnr": ({"ztsnr": torch.ones(0)}, {"rescale_betas_zero_snr": True}),
    "both": (
        {"v_pred": torch.ones(0), "ztsnr": torch.ones(0), "denoiser.sigmas": torch.ones(1000)},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ),
}


@pytest.mark.parametrize("case", MARKED)
def test_a_mark_of_a_checkpoint_must_agree_with_the_scheduler(kept, tensors, tmp_path, case):
    marks, settings = MARKED[case]
    base = layouts.write(tensors | marks, tmp_path / "base.safetensors")
    model = {"base": str(base), "config": str(kept), "motion_adapter": str(kept / "motion_adapter")}
    remedy = ", ".join(f"{key}: {str(value).lower()}" for key, value in settings.items())

    assert_refused(f"was trained with .* set model.scheduler.settings to {{{remedy}}}", **model)
    found = resolve(ModelConfig(**model, scheduler=SchedulerConfig(settings=settings)))
    assert found.notices == ()
    scheduler = loading.build_scheduler(SchedulerConfig(settings=settings), loading._shipped_scheduler(found))
    assert {key: scheduler.config[key] for key in settings} == settings
    if "ztsnr" in marks:
        assert_refused(
            "PNDMScheduler does not have; set model.scheduler.name to ddim",
            **model,
            scheduler=SchedulerConfig(name="pndm", settings=settings),
        )


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"edm_mean": (4,), "edm_std": (4,)}, r"has the mark edm_mean: .*continuous noise levels \(EDM\)"),
        ({"edm_vpred.sigma_max": (1,)}, "has the mark edm_vpred.sigma_max"),
        ({"denoiser.sigmas": (700,)}, r"other noise levels .*got shape \(700,\), expected \(1000,\)"),
    ],
    ids=["mean", "largest", "levels"],
)
def test_a_checkpoint_of_other_noise_is_refused(kept, tensors, tmp_path, marks, message):
    more = {name: torch.ones(shape) for name, shape in marks.items()}
    base = layouts.write(tensors | more, tmp_path / "base.safetensors")

    assert_refused(message, base=str(base), config=str(kept), motion_adapter=str(kept / "motion_adapter"))


def test_an_unet_of_stable_diffusion_xl_is_called_that(tmp_path):
    shapes = {"down_blocks.0.resnets.0.conv1.weight": (4, 4), "time_embedding.linear_1.weight": (4, 4)}
    file = layouts.hollow(shapes | {"add_embedding.linear_1.weight": (4, 4)}, tmp_path / "xl.safetensors")

    assert_refused("UNet of Stable Diffusion XL; PIA animates only Stable Diffusion 1.5", base=str(file))


def test_an_animatediff_adapter_is_named_by_its_file(kept, folder, tmp_path):
    motion = layouts.original_adapter(load_file(kept / "motion_adapter" / WEIGHTS))
    plain = {name: tensor for name, tensor in motion.items() if not name.startswith("conv_in")}
    file = layouts.write(plain, tmp_path / "mm_sd_v15_v2.safetensors")
    assert_refused(r"mm_sd_v15_v2\.safetensors is not a PIA motion adapter", base=str(kept), motion_adapter=str(file))

    edit(folder / "motion_adapter" / "config.json", conv_in_channels=None)
    assert_refused(rf"{WEIGHTS} is not a PIA motion adapter", base=str(folder))


# --- numbers that are none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae", "motion_adapter"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_finite_number_is_named(folder, part, value):
    path = next((folder / part).glob("*.safetensors"))
    held = load_file(path)
    name = next(each for each in sorted(held) if each.endswith("weight") and held[each].ndim == 2)
    held[name][0, -1] = value
    layouts.write(held, path)

    with pytest.raises(ConfigError, match=rf"{part}: .*{path.name}: tensor {name} has values that are NaN or infinite"):
        load(base=str(folder))


def test_a_weight_that_is_too_large_for_the_dtype_says_so(folder):
    path = folder / "unet" / WEIGHTS
    held = load_file(path)
    held["conv_out.bias"][0] = 1e6
    layouts.write(held, path)

    load(base=str(folder))
    with pytest.raises(ConfigError, match=r"weight conv_out\.bias is too large for torch\.float16; set model\.dtype"):
        load(torch.float16, base=str(folder))
