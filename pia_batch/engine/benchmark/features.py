"""Agreement of the engine's usual precision with float32, feature by feature: settings, samplers and add-ons.

Every feature is one clip, generated twice by the exact engine on the same device: with the precision that the device
is used with (float16 on a GPU), and in float32 with the whole mantissa.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image

from pia_batch.config import IpAdapterConfig, LoraConfig, ModelConfig, SchedulerConfig
from pia_batch.config.models import FreeUConfig, SchedulerName
from pia_batch.engine.benchmark.addon_files import write_ip_adapter, write_lora, write_motion_lora
from pia_batch.engine.benchmark.baselines import GUIDANCE, Size, pipeline
from pia_batch.engine.benchmark.runner import full_mantissa, psnr_db
from pia_batch.engine.compiling import reason_of
from pia_batch.engine.engine import PiaEngine
from pia_batch.engine.loading import quiet
from pia_batch.engine.shots import Shot

Record = dict[str, Any]
Load = Callable[[ModelConfig], PiaEngine]

_SHAPES: dict[Size, dict[str, int]] = {
    "full": {"width": 256, "height": 256, "num_frames": 16, "num_inference_steps": 8},
    "tiny": {"width": 32, "height": 32, "num_frames": 4, "num_inference_steps": 2},
}
"""Shape of the clips by size. They are small, because float32 is slow on a GPU and there are many features."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature: the settings that a clip has, and the model that it needs.

    Attributes:
        name: Name in the results.
        settings: Arguments of the `Shot`.
        model: Arguments of the `ModelConfig`.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


def features(size: Size, folder: Path) -> Iterator[Feature]:
    """Yield every feature, those that share a model next to each other; write the add-ons that they need.

    Args:
        size: `full` or `tiny`, as in the benchmark.
        folder: Existing folder for the files of the add-ons.
    """
    shape = _SHAPES[size]
    frames, last = shape["num_frames"], shape["num_frames"] - 1
    yield from (
        Feature("guided"),
        Feature("not guided", {"guidance_scale": 1.0}),
        Feature("negative prompt", {"negative_prompt": "blurry, grey"}),
        Feature("prompt travel", {"prompt": None, "prompts": {0: "a red circle", last: "a blue square"}}),
        Feature("motion_scale 2", {"motion_scale": 2}),
        Feature("loop, motion_scale 4", {"motion_scale": 4}),
        Feature("loop", {"loop": True}),
        Feature("style, motion_scale 7", {"motion_scale": 7}),
        Feature("motion_curve", {"motion_curve": (1.0, 0.9, 0.8)}),
        Feature("cond_frame", {"cond_frame": last}),
        Feature("strength", {"strength": 0.5}),
        Feature("eta", {"eta": 0.7}),
        Feature("clip_skip", {"clip_skip": 1}),
        Feature("FreeInit", {"free_init_iters": 2}),
        Feature("not square", {"width": 2 * shape["width"]}),
        *(Feature(f"context {name}", _context(name, frames)) for name in ("windows", "freenoise", "chain")),
    )
    yield Feature("VAE frame by frame", model={"vae_decode": "per_frame"})
    yield Feature("FreeU", model={"freeu": FreeUConfig()})
    for name in get_args(SchedulerName):
        if name not in {"ddim", "checkpoint"}:
            settings = {"skip_prk_steps": True} if name == "pndm" else {}
            yield Feature(f"scheduler {name}", model={"scheduler": SchedulerConfig(name=name, settings=settings)})
    yield Feature("original arithmetic", model={"arithmetic": "original"})
    yield from _with_addons(size, folder)


def _context(name: str, frames: int) -> dict[str, Any]:
    """Return the settings of a clip of three halves of a window."""
    settings: dict[str, Any] = {"context": name, "num_frames": frames + frames // 2, "context_length": frames}
    if name == "windows":
        settings["context_overlap"] = frames // 2
    if name == "freenoise":
        settings["context_stride"] = frames // 2
    return settings


def _with_addons(size: Size, folder: Path) -> Iterator[Feature]:
    with torch.device("meta" if size == "full" else "cpu"):  # only for the shapes of its weights
        unet = pipeline(size).unet
    lora = write_lora(unet, folder / "lora.safetensors")
    moving = write_motion_lora(unet, folder / "motion_lora.safetensors")
    image_prompts = write_ip_adapter(unet, folder / "ip-adapter.safetensors")
    named = LoraConfig(source=str(lora), name="style", scale=0.8)
    yield Feature("LoRA", model={"loras": (named,)})
    yield Feature("LoRA, scale of the row", {"lora_scales": {"style": 0.3}}, {"loras": (named,)})
    yield Feature("LoRA, fused", model={"loras": (named,), "fuse_loras": True})
    yield Feature("motion LoRA", model={"loras": (LoraConfig(source=str(moving), name="zoom"),)})
    yield Feature("IP-Adapter", model={"ip_adapter": IpAdapterConfig(source=str(image_prompts))})


def measure(
    size: Size,
    base: str,
    folder: Path,
    report: Callable[[Record], None],
    known: Record | None = None,
    load: Load = PiaEngine.load,
) -> Record:
    """Generate a clip of every feature in both precisions, and compare them.

    Args:
        size: `full` or `tiny`; the shape of the clips follows from it.
        base: Checkpoint, as in `ModelConfig.base`.
        folder: Existing folder for the files of the add-ons.
        report: Callback that receives all results so far, after each feature.
        known: Results of an earlier call that was stopped; features in it without an `error` are not measured again.
        load: Function that returns the engine of a model.

    Returns:
        By feature: `psnr_db` (dB, 120 for identical frames), `mean_difference` and `largest_difference` (of the
        frames, 0 to 255), or an `error` with the reason.
    """
    record: Record = {name: one for name, one in (known or {}).items() if "error" not in one}
    engines: dict[str, PiaEngine] = {}
    loaded: dict[str, Any] | None = None
    with quiet(), full_mantissa():
        for feature in features(size, folder):
            if feature.name in record:
                continue
            if feature.model != loaded:
                if engines:
                    engines.clear()
                    gc.collect()
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                loaded = feature.model
            try:
                record[feature.name] = _compared(feature, size, base, engines, load)
            except Exception as err:  # noqa: BLE001 - a failure of one feature must not stop the others
                record[feature.name] = {"error": reason_of(err)}
            report(record)
    return record


def _compared(feature: Feature, size: Size, base: str, engines: dict[str, PiaEngine], load: Load) -> Record:
    clips = []
    for dtype in ("auto", "float32"):
        if dtype not in engines:
            engines[dtype] = load(ModelConfig(base=base, dtype=dtype, compile=False, **feature.model))
        (clip,) = engines[dtype].animate([_shot(size, feature)])
        clips.append(clip.frames)
    differences = np.abs(clips[0].astype(int) - clips[1].astype(int))
    return {
        "psnr_db": psnr_db(clips[0], clips[1]),
        "mean_difference": float(differences.mean()),
        "largest_difference": int(differences.max()),
    }


def _shot(size: Size, feature: Feature) -> Shot:
    """Return the shot of a feature, with an image and a seed that all have in common."""
    shape = _SHAPES[size]
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(picture).resize((shape["width"], shape["height"]))
    usual: dict[str, Any] = {"image": image, "prompt": "a red circle moving left", "seed": 1, "motion_scale": 1}
    return Shot(**(usual | {"guidance_scale": GUIDANCE[size]} | shape | feature.settings))
