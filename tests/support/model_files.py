"""Table of model files in the layouts of trainers and loaders: whole models of a config, with what `plan` says of each.

The files are those of the small pipeline. A case writes its own files into a folder next to copies of the base
(`small`), its motion adapter (`adapter`) and returns the settings of `model`, whose places are relative to that folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ip_adapters
import layouts
import pipelines
import torch
from layouts import TEXT, UNET, VAE, Tensors
from safetensors.torch import load_file

WEIGHTS = "diffusion_pytorch_model.safetensors"
PLACES = ("base", "config", "vae", "motion_adapter", "source", "image_encoder")
"""Keys whose values are places of files."""

Settings = dict[str, Any]
Make = Callable[[Path, Tensors], Settings]
"""Function that writes the files of a case into a folder. The second argument is the checkpoint in one file."""


@dataclass(frozen=True)
class ModelFiles:
    """One model.

    Attributes:
        make: Function that writes its files.
        refused: Pattern of the message with which `plan` refuses it; None if it loads.
    """

    make: Make
    refused: str | None = None


def placed(settings: Any, place: Callable[[str], str]) -> Any:
    """Return settings with each place replaced by `place` of it."""
    if isinstance(settings, list):
        return [placed(each, place) for each in settings]
    if not isinstance(settings, dict):
        return settings
    return {
        key: place(value) if key in PLACES and isinstance(value, str) else placed(value, place)
        for key, value in settings.items()
    }


def prepare(kept: Path, folder: Path) -> None:
    """Copy the base and its motion adapter."""
    shutil.copytree(kept, folder / "small")
    shutil.copytree(kept / "motion_adapter", folder / "adapter")


# --- bases ----------------------------------------------------------------------------------------------------------


def _file(change: Callable[[Tensors], Mapping[str, torch.Tensor]], folder: Path, tensors: Tensors) -> Settings:
    layouts.write(change(tensors), folder / "files" / "base.safetensors")
    return {"base": "files/base.safetensors", "config": "small", "motion_adapter": "adapter"}


def file(change: Callable[[Tensors], Mapping[str, torch.Tensor]]) -> Make:
    return partial(_file, change)


def header(shapes: Mapping[str, tuple[int, ...]], key: str = "base", name: str = "other.safetensors") -> Make:
    """A file that has names and shapes only."""

    def make(folder: Path, tensors: Tensors) -> Settings:
        del tensors
        layouts.hollow(shapes, folder / "files" / name, "F16")
        own = {"base": "small", "motion_adapter": "adapter"}
        return own | ({"loras": [{"source": f"files/{name}"}]} if key == "loras" else {key: f"files/{name}"})

    return make


def base(*changes: Callable[[Path], object], **settings: Any) -> Make:
    """The base as a folder, with changes of its files."""

    def make(folder: Path, tensors: Tensors) -> Settings:
        del tensors
        for change in changes:
            change(folder / "small")
        return {"base": "small"} | settings

    return make


def edited(file: str, **changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / file
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | changes))

    return edit


def stored(part: str, change: Callable[[Tensors], Tensors]) -> Callable[[Path], object]:
    """Change the tensors of a network in a folder."""

    def write(folder: Path) -> None:
        path = next((folder / part).glob("*.safetensors"))
        layouts.write(change(load_file(path)), path)

    return write


def sharded(part: str) -> Callable[[Path], object]:
    """Write the tensors of a network in two files with an index, as `save_pretrained` does."""

    def write(folder: Path) -> None:
        path = next((folder / part).glob("*.safetensors"))
        stem, tensors = path.name.removesuffix(".safetensors"), load_file(path)
        names = sorted(tensors)
        index = {}
        for number, chosen in enumerate((names[::2], names[1::2]), 1):
            shard = f"{stem}-{number:05d}-of-00002.safetensors"
            layouts.write({name: tensors[name] for name in chosen}, path.with_name(shard))
            index |= dict.fromkeys(chosen, shard)
        path.unlink()
        content = {"metadata": {"total_size": 1}, "weight_map": index}
        path.with_name(f"{stem}.safetensors.index.json").write_text(json.dumps(content))

    return write


def renamed(part: str, suffix: str) -> Callable[[Path], object]:
    """Give the weights of a network another suffix, such as `.fp16.safetensors` or `.bin`."""

    def rename(folder: Path) -> None:
        path = next((folder / part).glob("*.safetensors"))
        path.rename(path.with_name(path.name.replace(".safetensors", suffix)))

    return rename


def beside(part: str, suffix: str) -> Callable[[Path], object]:
    """Add a file next to the weights of a network that is none of its weights."""

    def write(folder: Path) -> None:
        path = next((folder / part).glob("*.safetensors"))
        path.with_name(path.name.replace(".safetensors", suffix)).write_bytes(b"not read")

    return write


def with_motion(folder: Path) -> None:
    """Replace the UNet by that of a saved PIAPipeline, which has the motion modules."""
    shutil.rmtree(folder / "unet")
    shutil.rmtree(folder / "motion_adapter")
    pipelines.build().unet.save_pretrained(folder / "unet")


def cast(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        name: each.to(dtype) if each.is_floating_point() else each for name, each in tensors.items()
    }


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: each for name, each in tensors.items()}


def more(**shapes: tuple[int, ...]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.ones(shape) for name, shape in shapes.items()}


def channels(count: int) -> Callable[[Tensors], Tensors]:
    """The first layer of the UNet with another number of input channels."""

    def change(tensors: Tensors) -> Tensors:
        name = next(each for each in (f"{UNET}input_blocks.0.0.weight", "conv_in.weight") if each in tensors)
        return tensors | {name: torch.ones(len(tensors[name]), count, 3, 3)}

    return change


def moved(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        new + name.removeprefix(old) if name.startswith(old) else name: each for name, each in tensors.items()
    }


def without(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: each for name, each in tensors.items() if not name.startswith(prefix)}


_READS = f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
_INPUT = f"{UNET}input_blocks.0.0.weight"
_TURBO = {_INPUT: (320, 4, 3, 3), "conditioner.embedders.0.model.ln_final.weight": (1024,), _READS: (640, 1024)}
_XL = {
    _INPUT: (320, 4, 3, 3),
    _READS: (640, 2048),
    f"{UNET}label_emb.0.0.weight": (1280, 2816),
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
    "conditioner.embedders.1.model.ln_final.weight": (1280,),
}
_VIDEO = {
    _INPUT: (320, 8, 3, 3),
    f"{UNET}input_blocks.1.1.time_stack.0.norm1.weight": (320,),
    "conditioner.embedders.0.open_clip.model.visual.proj": (1280, 1024),
}
_INDEX = "model_index.json"
_PRETRAINED = {"tokenizer": ["transformers", "CLIPTokenizer"]}


def index(name: str) -> Callable[[Path], object]:
    return edited(_INDEX, _class_name=name, unet=["diffusers", "UNet2DConditionModel"], **_PRETRAINED)


V = {"prediction_type": "v_prediction"}
ZERO = {"rescale_betas_zero_snr": True}

BASES: dict[str, ModelFiles] = {
    "file": ModelFiles(file(dict)),
    "file, float16": ModelFiles(file(cast(torch.float16))),
    "file, bfloat16": ModelFiles(file(cast(torch.bfloat16))),
    "file, float8": ModelFiles(file(cast(torch.float8_e4m3fn))),
    "file, int8": ModelFiles(file(cast(torch.int8)), "has dtype I8; quantized weights are not supported"),
    "file, EMA too": ModelFiles(file(more(**{"model_ema.diffusion_modelinput_blocks00weight": (2, 2)}))),
    "file, EMA only": ModelFiles(
        file(lambda tensors: {name.replace(UNET, "model_ema.diffusion_model"): each for name, each in tensors.items()}),
        "checkpoint with averaged weights only; use the checkpoint whose UNet is in model.diffusion_model",
    ),
    "file, of a trainer": ModelFiles(file(prefixed("state_dict.module."))),
    "file, inpainting": ModelFiles(file(channels(9)), r"files/base|wrong kind: inpainting checkpoint"),
    "file, InstructPix2Pix": ModelFiles(file(channels(8)), "wrong kind: InstructPix2Pix checkpoint"),
    "file, SD 2": ModelFiles(
        file(moved("cond_stage_model.transformer.text_model.", "cond_stage_model.model.")),
        "wrong kind: Stable Diffusion 2 checkpoint",
    ),
    "file, SD Turbo": ModelFiles(header(_TURBO), "wrong kind: Stable Diffusion 2 checkpoint"),
    "file, SDXL": ModelFiles(header(_XL), "wrong kind: Stable Diffusion XL checkpoint"),
    "file, SDXL refiner": ModelFiles(
        header({
            _INPUT: (384, 4, 3, 3),
            f"{UNET}label_emb.0.0.weight": (1536, 2560),
            "conditioner.embedders.0.model.ln_final.weight": (1280,),
        }),
        "wrong kind: Stable Diffusion XL checkpoint",
    ),
    "file, video": ModelFiles(header(_VIDEO), "wrong kind: checkpoint of another family"),
    "file, SD 3": ModelFiles(
        header({f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (8, 8), "first_stage_model.x": (1,)}),
        "checkpoint of another family than Stable Diffusion 1.5",
    ),
    "file, FLUX": ModelFiles(
        header({"double_blocks.0.img_attn.qkv.weight": (8, 8), "b.weight": (1,)}),
        "checkpoint of another family than Stable Diffusion 1.5",
    ),
    "file, LCM": ModelFiles(
        file(more(**{f"{UNET}time_embed.cond_proj.weight": (8, 256)})), "LCM-distilled UNet .*LCM LoRA"
    ),
    "file, ControlNet": ModelFiles(
        header({"control_model.input_hint_block.0.weight": (16, 3, 3, 3), "b": (1,)}), "ControlNet; .*leave it out"
    ),
    "file, T2I-Adapter": ModelFiles(
        header({"conv_in.weight": (320, 192, 3, 3), "body.0.block1.weight": (320, 320, 3, 3)}),
        "wrong kind: T2I-Adapter; PIA uses no T2I-Adapter; leave it out",
    ),
    "file, T2I-Adapter of diffusers": ModelFiles(
        header({"adapter.conv_in.weight": (3, 3), "adapter.body.0.resnets.0.block1.weight": (3, 3, 3, 3)}),
        "wrong kind: T2I-Adapter",
    ),
    "file, UNet only": ModelFiles(
        file(lambda tensors: {name: each for name, each in tensors.items() if name.startswith(UNET)}),
        "has no text encoder .*use a complete checkpoint",
    ),
    "file, no VAE": ModelFiles(file(without(VAE)), r"has no VAE .*set model\.vae"),
    "file, no text encoder": ModelFiles(file(without(TEXT)), "has no text encoder"),
    "file, ComfyUI's names": ModelFiles(
        file(lambda tensors: moved(VAE, "vae.")(moved(TEXT, "text_encoders.clip_l.transformer.text_model.")(tensors)))
    ),
    "file, ComfyUI's scaled float8": ModelFiles(
        file(more(**{f"{UNET}middle_block.1.proj_in.scale_weight": (1,)})), "scale_weight belongs to quantized weights"
    ),
    "folder": ModelFiles(base()),
    "folder, other files too": ModelFiles(
        base(beside("unet", ".non_ema.safetensors"), beside("unet", ".bin"), beside("vae", ".fp16.safetensors"))
    ),
    "folder, saved pipeline": ModelFiles(base(with_motion)),
    "folder, saved pipeline in shards": ModelFiles(base(with_motion, sharded("unet"))),
    "folder, saved pipeline and an adapter": ModelFiles(
        base(with_motion, motion_adapter="adapter"), "already contains motion modules; leave model.motion_adapter out"
    ),
    "folder, GGUF": ModelFiles(base(renamed("unet", ".gguf")), "only diffusion_pytorch_model.gguf; fetch .*"),
    "folder, shards without an index": ModelFiles(
        base(sharded("unet"), lambda folder: next((folder / "unet").glob("*.index.json")).unlink()),
        r"has shards of weights .*but no index \(diffusion_pytorch_model\.safetensors\.index\.json\); fetch that file",
    ),
    "folder, shards": ModelFiles(base(*(sharded(part) for part in ("unet", "vae", "text_encoder", "motion_adapter")))),
    "folder, float16": ModelFiles(base(stored("unet", cast(torch.float16)))),
    "folder, float8": ModelFiles(base(stored("unet", cast(torch.float8_e5m2)))),
    "folder, int8": ModelFiles(base(stored("unet", cast(torch.int8))), "has dtype I8; quantized"),
    "folder, of a trainer": ModelFiles(base(stored("unet", prefixed("_fsdp_wrapped_module.")))),
    "folder, variant": ModelFiles(base(renamed("unet", ".fp16.safetensors"), variant="fp16")),
    "folder, unasked variant": ModelFiles(
        base(renamed("unet", ".fp16.safetensors")),
        r"but diffusion_pytorch_model\.fp16\.safetensors; set or leave out the variant",
    ),
    "folder, pickled": ModelFiles(
        base(renamed("unet", ".bin")), r"only diffusion_pytorch_model\.bin; pickled weights are refused.*Convert them"
    ),
    "folder, inpainting": ModelFiles(
        base(edited("unet/config.json", in_channels=9), stored("unet", channels(9))),
        "has 9 input channels: it is an inpainting model",
    ),
    "folder, InstructPix2Pix": ModelFiles(
        base(edited("unet/config.json", in_channels=8), stored("unet", channels(8))),
        r"is the UNet of InstructPix2Pix \(8 input channels\)",
    ),
    "folder, depth": ModelFiles(
        base(edited("unet/config.json", in_channels=5), stored("unet", channels(5))),
        r"is the UNet of a depth model \(5 input channels\)",
    ),
    "folder, named InstructPix2Pix": ModelFiles(
        base(index("StableDiffusionInstructPix2PixPipeline")), "its UNet edits images"
    ),
    "folder, SD 2": ModelFiles(base(edited("unet/config.json", cross_attention_dim=1024)), "of Stable Diffusion 2"),
    "folder, SDXL": ModelFiles(base(index("StableDiffusionXLPipeline")), "of another family"),
    "folder, SD 3": ModelFiles(base(index("StableDiffusion3Pipeline")), "of another family"),
    "folder, FLUX": ModelFiles(base(index("FluxPipeline")), "of another family"),
    "folder, LCM": ModelFiles(base(edited("unet/config.json", time_cond_proj_dim=256)), "LCM-distilled"),
    "folder, v-prediction": ModelFiles(base(edited("scheduler/scheduler_config.json", **V))),
    "folder, zero SNR": ModelFiles(base(edited("scheduler/scheduler_config.json", **V, **ZERO))),
    "folder, zero SNR that is not used": ModelFiles(
        base(edited("scheduler/scheduler_config.json", **V, **ZERO), scheduler={"name": "pndm"})
    ),
    "folder, zero SNR that the original leaves out": ModelFiles(
        base(edited("scheduler/scheduler_config.json", **V, **ZERO), arithmetic="original")
    ),
    "folder, zero SNR with the original": ModelFiles(
        base(
            edited("scheduler/scheduler_config.json", **V, **ZERO),
            arithmetic="original",
            scheduler={"settings": ZERO},
        )
    ),
}  # fmt: skip


# --- VAEs and motion adapters ---------------------------------------------------------------------------------------


def vae(change: Callable[[Tensors], Tensors], name: str = "vae.safetensors") -> Make:
    """A VAE in a file, with its config next to it."""

    def make(folder: Path, tensors: Tensors) -> Settings:
        bare = {each.removeprefix(VAE): tensor for each, tensor in tensors.items() if each.startswith(VAE)}
        layouts.write(change(bare), folder / "vaes" / name)
        shutil.copy(folder / "small" / "vae" / "config.json", folder / "vaes")
        return {"base": "small", "vae": f"vaes/{name}"}

    return make


def vae_folder(*changes: Callable[[Path], object]) -> Make:
    def make(folder: Path, tensors: Tensors) -> Settings:
        del tensors
        shutil.copytree(folder / "small" / "vae", folder / "vaes")
        for change in changes:
            change(folder)
        return {"base": "small", "vae": "vaes"}

    return make


def motion(change: Callable[[Tensors, Tensors], Tensors], name: str = "pia.safetensors") -> Make:
    """A motion adapter in a file, from that of PIA in original names and the UNet's tensors."""

    def make(folder: Path, tensors: Tensors) -> Settings:
        del tensors
        small = folder / "small"
        own = layouts.original_adapter(load_file(small / "motion_adapter" / WEIGHTS))
        layouts.write(change(own, load_file(small / "unet" / WEIGHTS)), folder / "motion" / name)
        shutil.copy(small / "motion_adapter" / "config.json", folder / "motion")
        return {"base": "small", "motion_adapter": f"motion/{name}"}

    return make


def adapter_folder(*changes: Callable[[Path], object], **settings: Any) -> Make:
    def make(folder: Path, tensors: Tensors) -> Settings:
        del tensors
        for change in changes:
            change(folder)
        return {"base": "small", "motion_adapter": "adapter"} | settings

    return make


def with_positions(second: int, other: str = "up_blocks") -> Callable[[Tensors, Tensors], Tensors]:
    """Positions of another length in some modules."""
    return lambda own, _: {
        name: torch.ones(1, second, each.shape[2]) if name.endswith(".pe") and name.startswith(other) else each
        for name, each in own.items()
    }


_MODULE = "motion_modules.0.temporal_transformer.norm.weight"

PARTS: dict[str, ModelFiles] = {
    "VAE": ModelFiles(vae(dict)),
    "VAE, float16": ModelFiles(vae(cast(torch.float16))),
    "VAE, checkpoint's names": ModelFiles(vae(prefixed("first_stage_model."))),
    "VAE, ComfyUI's names": ModelFiles(vae(prefixed("vae."))),
    "VAE, trainer's names": ModelFiles(vae(prefixed("state_dict.module."))),
    "VAE, odd names": ModelFiles(
        vae(prefixed("autoencoder.")), r"vae\.safetensors: the names of its tensors have 'autoencoder\.' before"
    ),
    "VAE, odd names of a checkpoint": ModelFiles(
        vae(prefixed("model.first_stage_model.")), r"have 'model\.first_stage_model\.' before those of the Autoencoder"
    ),
    "VAE, decoder only": ModelFiles(vae(without("encoder.")), "has no encoder; use a complete VAE"),
    "VAE, encoder only": ModelFiles(vae(without("decoder.")), "has no decoder; use a complete VAE"),
    "VAE, int8": ModelFiles(vae(cast(torch.int8)), "has dtype I8; quantized"),
    "VAE, whole checkpoint": ModelFiles(
        lambda folder, tensors: file(dict)(folder, tensors) | {"vae": "files/base.safetensors"}
    ),
    "VAE folder": ModelFiles(vae_folder()),
    "VAE folder, shards": ModelFiles(vae_folder(sharded("vaes"))),
    "VAE folder, only variant": ModelFiles(vae_folder(renamed("vaes", ".fp16.safetensors"))),
    "VAE folder, pickled": ModelFiles(vae_folder(renamed("vaes", ".bin")), "pickled weights are refused"),
    "VAE folder, SDXL": ModelFiles(
        vae_folder(edited("vaes/config.json", scaling_factor=0.13025)), "VAE of Stable Diffusion XL"
    ),
    "VAE folder, TAESD": ModelFiles(
        vae_folder(edited("vaes/config.json", _class_name="AutoencoderTiny")), "is a AutoencoderTiny"
    ),
    "adapter": ModelFiles(motion(lambda own, _: own)),
    "adapter, trainer's names": ModelFiles(motion(lambda own, _: prefixed("module.")(own))),
    "adapter, training": ModelFiles(motion(lambda own, unet: prefixed("state_dict.module.")(unet | own))),
    "adapter, float16": ModelFiles(motion(lambda own, _: cast(torch.float16)(own))),
    "adapter, int8": ModelFiles(motion(lambda own, _: cast(torch.int8)(own)), "has dtype I8; quantized"),
    "adapter folder": ModelFiles(lambda *_: {"base": "small", "motion_adapter": "adapter"}),
    "adapter folder, shards": ModelFiles(adapter_folder(sharded("adapter"))),
    "adapter folder, variant": ModelFiles(
        adapter_folder(renamed("adapter", ".fp16.safetensors"), motion_adapter_variant="fp16")
    ),
    "adapter folder, unasked variant": ModelFiles(
        adapter_folder(renamed("adapter", ".fp16.safetensors")),
        r"but .*\.fp16\.safetensors; set or leave out the variant",
    ),
    "adapter folder, pickled": ModelFiles(adapter_folder(renamed("adapter", ".ckpt")), "pickled weights are refused"),
    "adapter, training in one UNet": ModelFiles(motion(lambda own, unet: prefixed("module.unet.")(unet | own))),
    "adapter, positions of two lengths": ModelFiles(
        motion(with_positions(24)), "modules of 12 and of 24 frame positions"
    ),
    "adapter, no positions": ModelFiles(
        motion(lambda own, _: {name: each for name, each in own.items() if not name.endswith(".pe")})
    ),
    "adapter, AnimateDiff": ModelFiles(
        motion(lambda own, _: without("conv_in")(own), "mm_sd_v15_v2.safetensors"),
        r"mm_sd_v15_v2\.safetensors is not a PIA motion adapter: .*an AnimateDiff adapter does not read the image",
    ),
    "adapter, AnimateDiff SDXL": ModelFiles(
        header({f"down_blocks.{each}.{_MODULE}": (320,) for each in range(3)}, "motion_adapter", "mm_sdxl.safetensors"),
        r"mm_sdxl\.safetensors is not .*AnimateDiff adapter for Stable Diffusion XL",
    ),
    "adapter, HotShot-XL": ModelFiles(
        header({"down_blocks.1.temporal_attentions.0.norm.weight": (8,), "b": (1,)}, "motion_adapter"),
        "motion modules of HotShot-XL",
    ),
    "adapter, checkpoint": ModelFiles(
        lambda folder, tensors: file(dict)(folder, tensors) | {"motion_adapter": "files/base.safetensors"},
        r"wrong kind: Stable Diffusion 1\.5 checkpoint; it belongs in model\.base",
    ),
}


# --- add-ons --------------------------------------------------------------------------------------------------------

_LAYER = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
_WIDTH, _TEXT_WIDTH = 16, 16


def lora(tensors: Mapping[str, torch.Tensor], metadata: str | None = None, **more: Any) -> Make:
    def make(folder: Path, _: Tensors) -> Settings:
        layouts.write(tensors, folder / "lora" / "style.safetensors")
        if metadata is not None:
            (folder / "lora" / "adapter_config.json").write_text(metadata)
        return {"base": "small", "loras": [{"source": "lora/style.safetensors"} | more]}

    return make


def pair(prefix: str, down: str = "lora_down.weight", up: str = "lora_up.weight") -> Tensors:
    torch.manual_seed(3)
    return {f"{prefix}.{down}": torch.randn(2, _TEXT_WIDTH) / 4, f"{prefix}.{up}": torch.randn(_WIDTH, 2) / 4}


def two_loras(suffix: str = ".safetensors", **more: str) -> Make:
    def make(folder: Path, _: Tensors) -> Settings:
        for name in "ab":
            layouts.write(pair(_KOHYA), folder / "lora" / f"{name}{suffix}")
        return {"base": "small", "loras": [{"source": "lora"} | more]}

    return make


_DOTTED = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
_KOHYA = f"lora_unet_{_LAYER}"
_PEFT = pair(f"base_model.model.{_DOTTED}", "lora_A.weight", "lora_B.weight")


def inversion(tensors: Mapping[str, tuple[int, ...]], token: str | None = None, name: str = "word.safetensors") -> Make:
    def make(folder: Path, _: Tensors) -> Settings:
        held = {each: torch.ones(shape) for each, shape in tensors.items()}
        if name.endswith(".safetensors"):
            layouts.write(held, folder / "words" / name)
        else:
            (folder / "words").mkdir()
            torch.save({"string_to_param": held}, folder / "words" / name)
        return {"base": "small", "textual_inversions": [{"source": f"words/{name}", "token": token}]}

    return make


def image_prompt(layout: ip_adapters.Layout, change: Callable[[Path], object] | None = None, **shapes: Any) -> Make:
    def make(folder: Path, _: Tensors) -> Settings:
        changed = {name: torch.ones(shape) for name, shape in shapes.items()}
        (folder / "ip").mkdir()
        path = ip_adapters.write(folder / "ip", layout, **changed)
        if change is not None:
            change(folder / "ip")
        return {"base": "small", "ip_adapter": {"source": "ip", "weight_name": path.name}}

    return make


def ip_file(tensors: Tensors) -> Make:
    """An adapter of any content, with a whole image encoder next to it."""

    def make(folder: Path, _: Tensors) -> Settings:
        (folder / "ip").mkdir()
        path = ip_adapters.write(folder / "ip")
        layouts.write(tensors, path)
        return {"base": "small", "ip_adapter": {"source": f"ip/{path.name}"}}

    return make


def encoder_file(change: Callable[[Tensors], Tensors] = dict) -> Make:
    """An image encoder in one file with its config next to it."""

    def make(folder: Path, tensors: Tensors) -> Settings:
        settings = ip_file(ip_adapters.weights("plain"))(folder, tensors)
        held = load_file(folder / "ip" / "image_encoder" / "model.safetensors")
        layouts.write(change(held), folder / "encoder" / "clip_vision.safetensors")
        shutil.copy(folder / "ip" / "image_encoder" / "config.json", folder / "encoder")
        shutil.rmtree(folder / "ip" / "image_encoder")
        settings["ip_adapter"]["image_encoder"] = "encoder/clip_vision.safetensors"
        return settings

    return make


def quantized(tensors: Tensors) -> Tensors:
    """Weights of an image encoder as bitsandbytes writes them: flat bytes, with tables beside them."""
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    flat = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)
    return tensors | {name: flat, f"{name}.absmax": torch.ones(2), f"{name}.quant_map": torch.ones(16)}


ADD_ONS: dict[str, ModelFiles] = {
    "LoRA": ModelFiles(lora(pair(_KOHYA))),
    "LoRA, float8": ModelFiles(lora(cast(torch.float8_e4m3fn)(pair(_KOHYA)))),
    "LoRA, peft": ModelFiles(lora(_PEFT, json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))),
    "LoRA, peft without its record": ModelFiles(lora(_PEFT), r"scale is in adapter_config\.json, but there is none"),
    "LoRA, DoRA of a difference": ModelFiles(
        lora(
            pair(_KOHYA)
            | {f"{_KOHYA}.dora_scale": torch.ones(_WIDTH, 1), f"{_KOHYA}.wd_for_diff": torch.ones(1, dtype=torch.bool)}
        ),
        r"kind DoRA of the difference \(LyCORIS: wd_for_diff\)",
    ),
    "LoRA, DoRA": ModelFiles(lora(pair(_KOHYA) | {f"{_KOHYA}.dora_scale": torch.ones(1, _TEXT_WIDTH)}, scale=0.5)),
    "LoRA, text encoder": ModelFiles(
        lora(pair("text_encoder.text_model.encoder.layers.1.self_attn.q_proj", "lora_A.weight", "lora_B.weight"))
    ),
    "LoRA, LoHa": ModelFiles(
        lora(
            {
                f"{_KOHYA}.hada_w{each}": torch.full((2, 16) if each.endswith("b") else (16, 2), 0.3)
                for each in ("1_a", "1_b", "2_a", "2_b")
            }
        )
    ),
    "LoRA, LoKr": ModelFiles(
        lora({f"{_KOHYA}.lokr_w1": torch.full((4, 4), 0.3), f"{_KOHYA}.lokr_w2": torch.full((4, 4), 0.3)})
    ),
    "LoRA, one of several": ModelFiles(two_loras(), r"has several files; set model\.loras\[0\]\.weight_name to one of"),
    "LoRA, one of several by name": ModelFiles(two_loras(weight_name="b.safetensors")),
    "LoRA, pickles only": ModelFiles(
        two_loras(".bin"), r"has no \.safetensors file, only a\.bin, b\.bin; pickled weights are refused.*Convert them"
    ),
    "LoRA, IA3": ModelFiles(lora({f"{_KOHYA}.on_input": torch.ones(1), f"{_KOHYA}.weight": torch.ones(2)}), "IA3"),
    "LoRA, SDXL": ModelFiles(
        lora(pair(_KOHYA) | pair("lora_te2_text_model_encoder_layers_0_mlp_fc1")), "another family"
    ),
    "LoRA, motion": ModelFiles(
        lora(
            pair(
                "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor"
                ".to_q_lora",
                "down.weight",
                "up.weight",
            )
        )
    ),
    "textual inversion": ModelFiles(inversion({"<cat>": (_TEXT_WIDTH,)})),
    "textual inversion, several vectors": ModelFiles(inversion({"emb_params": (3, _TEXT_WIDTH)}, "easynegative")),
    "textual inversion, trained with others": ModelFiles(inversion({"clip_l": (2, _TEXT_WIDTH)}, "mine")),
    "textual inversion without a word": ModelFiles(
        inversion({"emb_params": (3, _TEXT_WIDTH)}),
        r"does not name its word; set model\.textual_inversions\[0\]\.token",
    ),
    "textual inversion, several words": ModelFiles(
        inversion({"<cat>": (1, _TEXT_WIDTH), "<dog>": (1, _TEXT_WIDTH)}), "several words; write a file for each word"
    ),
    "textual inversion, SDXL": ModelFiles(
        inversion({"clip_l": (1, 768), "clip_g": (1, 1280)}, "mine"), "Stable Diffusion XL textual inversion"
    ),
    "textual inversion, pickled": ModelFiles(
        inversion({"*": (1, _TEXT_WIDTH)}, "mine", "word.pt"), r"word\.pt is a pickle.*Convert it to safetensors"
    ),
    **{f"IP-Adapter, {each}": ModelFiles(image_prompt(each)) for each in ip_adapters.LAYOUTS},
    "IP-Adapter, FaceID": ModelFiles(
        image_prompt("plain", **{"ip_adapter.0.to_q_lora.down.weight": (4, 16)}), "FaceID adapter"
    ),
    "IP-Adapter, FaceID Portrait": ModelFiles(
        ip_file(
            {
                "image_proj.proj.0.weight": torch.ones(24, 12),
                "image_proj.proj.2.weight": torch.ones(16, 24),
                "image_proj.norm.weight": torch.ones(16),
                "ip_adapter.1.to_k_ip.weight": torch.ones(16, 16),
            }
        ),
        "FaceID adapter",
    ),
    "IP-Adapter, FaceID Plus": ModelFiles(
        ip_file(
            {
                "image_proj.perceiver_resampler.proj_in.weight": torch.ones(8, 24),
                "ip_adapter.1.to_k_ip.weight": torch.ones(16, 16),
            }
        ),
        "FaceID adapter",
    ),
    "IP-Adapter, SDXL": ModelFiles(
        ip_file(ip_adapters.weights("plain") | {"ip_adapter.1.to_k_ip.weight": torch.ones(16, 2048)}),
        "for another family of models than the base; use one for `sd15`",
    ),
    "IP-Adapter, quantized": ModelFiles(
        ip_file(ip_adapters.weights("plain") | {"image_proj.proj.weight.absmax": torch.ones(4)}),
        "absmax belongs to quantized weights",
    ),
    "IP-Adapter, encoder in a file": ModelFiles(encoder_file()),
    "IP-Adapter, encoder in a trainer's file": ModelFiles(encoder_file(prefixed("module."))),
    "IP-Adapter, another encoder": ModelFiles(
        image_prompt("plain", **{"image_proj.proj.weight": (4 * _TEXT_WIDTH, 20)}),
        r"takes image embeddings of 20 dimensions.*set model\.ip_adapter\.image_encoder",
    ),
    "IP-Adapter, quantized encoder": ModelFiles(
        image_prompt("plain", stored("image_encoder", quantized)), "belongs to quantized weights"
    ),
    "IP-Adapter, int8 encoder": ModelFiles(
        image_prompt("plain", stored("image_encoder", cast(torch.int8))), "dtype I8; quantized weights"
    ),
}

ALL = BASES | PARTS | ADD_ONS


# --- files in the place of others -----------------------------------------------------------------------------------


def write_kinds(folder: Path, tensors: Tensors) -> dict[str, str]:
    """Write a file or folder of each kind, and return its place by its kind."""
    ip_adapters.write(folder / "ip")
    small = folder / "small"
    unet = load_file(small / "unet" / WEIGHTS)
    held = {
        "checkpoint": tensors,
        "VAE": load_file(small / "vae" / WEIGHTS),
        "motion adapter": layouts.original_adapter(load_file(small / "motion_adapter" / WEIGHTS)),
        "UNet": unet,
        "original UNet": {name.removeprefix(UNET): each for name, each in tensors.items() if name.startswith(UNET)},
        "text encoder": load_file(small / "text_encoder" / "model.safetensors"),
        "image encoder": load_file(folder / "ip" / "image_encoder" / "model.safetensors"),
        "IP-Adapter": ip_adapters.weights("plain"),
        "LoRA": pair(_KOHYA),
        "textual inversion": {"<cat>": torch.ones(_TEXT_WIDTH)},
        "ControlNet": unet | {"controlnet_cond_embedding.conv_in.weight": torch.ones(4, 3, 3, 3)},
        "FLUX": {"double_blocks.0.img_attn.qkv.weight": torch.ones(2, 2), "img_in.weight": torch.ones(2, 2)},
        "another network": {"layers.0.weight": torch.ones(2, 2), "layers.1.weight": torch.ones(2, 2)},
    }
    configs = {
        "VAE": small / "vae",
        "motion adapter": small / "motion_adapter",
        "image encoder": folder / "ip" / "image_encoder",
    }
    places = {kind: f"kinds/{number}/{kind}.safetensors" for number, kind in enumerate(held)}
    for kind, place in places.items():
        layouts.write(held[kind], folder / place)
        if kind in configs:
            shutil.copy(configs[kind] / "config.json", (folder / place).parent)
    parts = {
        f"folder {part}": f"small/{part}" for part in ("unet", "vae", "text_encoder", "motion_adapter", "tokenizer")
    }
    return (
        places
        | parts
        | {"folder": "small", "folder of an IP-Adapter": "ip", "folder image_encoder": "ip/image_encoder"}
    )


def _as_base(place: str) -> Settings:
    single = {"config": "small", "motion_adapter": "adapter"}
    return {"base": place} | (single if place.endswith(".safetensors") else {})


KEYS: dict[str, tuple[Callable[[str], Settings], set[str]]] = {
    "base": (_as_base, {"checkpoint", "folder"}),
    "vae": (lambda place: {"vae": place}, {"VAE", "folder vae"}),
    "motion_adapter": (lambda place: {"motion_adapter": place}, {"motion adapter", "folder motion_adapter"}),
    "loras": (lambda place: {"loras": [{"source": place}]}, {"LoRA"}),
    "textual_inversions": (lambda place: {"textual_inversions": [{"source": place}]}, {"textual inversion"}),
    "ip_adapter": (
        lambda place: {"ip_adapter": {"source": place, "image_encoder": "ip/image_encoder"}},
        {"IP-Adapter", "folder of an IP-Adapter"},
    ),
    "image_encoder": (
        lambda place: {"ip_adapter": {"source": "ip/ip-adapter_plain.safetensors", "image_encoder": place}},
        {"image encoder", "folder image_encoder"},
    ),
}
"""Settings that name a place under each key, and the kinds that fit there."""
