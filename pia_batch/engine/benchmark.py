"""The engine and what one would use without it, side by side on one device, in one run, over the same shots.

Contestants, each from image and prompt to an encoded file:
(a) the documented use of `PIAPipeline`: CPU offload, VAE slices, GIF, a row at a time; (a') the same with MP4;
(b) the pipeline resident on the device; (c) the same with channels-last weights and `torch.compile`;
(d) the engine, exact, a batch at a time; (e) the engine under each lossy preset of `model.speed`, in its largest batch.
They take turns, so that what else happens on the machine happens to all of them.
"""

from __future__ import annotations

import copy
import datetime as dt
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from diffusers.utils import export_to_gif
from numpy.typing import NDArray
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pia_batch import sd15, tiny
from pia_batch.engine import PiaEngine, Shot
from pia_batch.engine.calibration import Calibration, calibrate, device_name, seconds, synchronize
from pia_batch.engine.compiling import Compiler, directly
from pia_batch.engine.image_prompts import Attention
from pia_batch.engine.prediction import predictor
from pia_batch.shortcuts import PRESETS, Speed, whole_evaluations

Size = Literal["full", "tiny"]
Frames = NDArray[np.uint8]
Encode = Callable[[Frames], bytes]

IDENTICAL_DB = 120.0
"""What stands for the PSNR of identical frames, which is infinite."""


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure.

    Attributes:
        size: `full`: Stable Diffusion 1.5 and PIA's motion modules with random weights, 512 x 512, 16 frames, 25 steps;
            `tiny`: the embedded model, 64 x 64, 8 frames, 8 steps.
        rounds: how often every contestant takes its turn.
        batches: batch sizes of the engine. Every contestant draws as many rows a turn as the largest has.
        device: such as `cuda:0`; None: a GPU if there is one.
        compiles: whether (c) runs, and (d) and (e) compile; compiling the full network takes minutes.
    """

    size: Size = "full"
    rounds: int = 3
    batches: tuple[int, ...] = (1, 2, 4)
    device: str | None = None
    compiles: bool = True


@dataclass(slots=True)
class _Contestant:
    name: str
    draw: Callable[[Sequence[Shot]], list[Frames]]
    encode: Encode
    unet_calls: list[tuple[float, Callable[[], Any]]]
    """Of each kind of call of the network, its share of one step of one row."""
    compiled: bool = False


def run(options: Options, encode_mp4: Encode) -> dict[str, Any]:
    """Measure all contestants.

    Args:
        options: what to measure.
        encode_mp4: how every contestant but (a) makes its file, from uint8 (F, H, W, 3).

    Returns:
        JSON: the device, versions, calibration, operations of a clip, and of every contestant clips a second (median,
        least, most), UNet milliseconds for one step of one guided row, shares of the peaks, bytes of memory, seconds of
        the first turn, and the PSNR of its first clip against float32; the weights at full size are random, and so
        say nothing of a preset's. What cannot be measured here is null.
    """
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    shots = _shots(options)
    exact = pipeline(options.size)
    reference = single_call(exact.to(device), shots[0])
    pipe = exact if dtype == torch.float32 else copy.deepcopy(exact.to("cpu")).to(device, dtype)
    flops = flops_per_clip(pipe, shots[0])
    calibration = calibrate(device, dtype)
    turns: dict[str, dict[str, Any]] = {}
    contestants = list(_contestants(options, pipe, device, encode_mp4))
    for each in contestants:
        turns[each.name] = _first_turn(each, shots, device, reference)
    for _ in range(options.rounds):
        for each in contestants:
            turns[each.name]["seconds"].append(_turn(each, shots, device))
    for each in contestants:
        turns[each.name] |= _summary(turns[each.name], each, device, len(shots), flops, calibration)
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "size": options.size,
        "dtype": str(dtype).removeprefix("torch."),
        "tflop_per_clip": flops / 1e12,
        "calibration": calibration.as_dict(),
        "contestants": turns,
    }


def pipeline(size: Size) -> Any:
    """The network as a float32 `PIAPipeline` on the CPU: the embedded one, or a full one with random weights."""
    parts = {"local_files_only": True, "dtype": torch.float32}
    if size == "tiny":
        adapter = diffusers.MotionAdapter.from_pretrained(tiny.PATH / "motion_adapter", **parts)
        pipe = diffusers.PIAPipeline.from_pretrained(tiny.PATH, motion_adapter=adapter, **parts)
    else:
        pipe = _full()
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(requires_grad=False)
    return pipe


def _full() -> Any:
    torch.manual_seed(0)

    def config(kind: Any, name: str) -> Any:
        return kind.from_config(kind.load_config(sd15.PATH / name))

    tokenizer = CLIPTokenizer.from_pretrained(sd15.PATH / "tokenizer", local_files_only=True)
    text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(sd15.PATH / "text_encoder", local_files_only=True))
    unet = config(diffusers.UNet2DConditionModel, "unet")
    adapter = config(diffusers.MotionAdapter, "motion_adapter")
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False, steps_offset=1
    )
    return diffusers.PIAPipeline(
        vae=config(diffusers.AutoencoderKL, "vae"),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        motion_adapter=adapter,
        scheduler=scheduler,
    )


def flops_per_clip(pipe: Any, shot: Shot) -> int:
    """Multiplications and additions of one pipeline call's networks: what every contestant's work is counted as."""
    one = Shot(**{name: getattr(shot, name) for name in Shot.__slots__} | {"num_inference_steps": 1})
    with FlopCounterMode(display=False) as whole:
        single_call(pipe, one)
    call = _stock_unet_call(pipe, one)
    with FlopCounterMode(display=False) as step:
        call()
    return int(whole.get_total_flops() + (shot.num_steps - 1) * step.get_total_flops())


def _shots(options: Options) -> list[Shot]:
    full = options.size == "full"
    side = 512 if full else 64
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8) for _ in range(max(options.batches))]
    return [
        Shot(
            image=Image.fromarray(picture).resize((side, side)),
            prompt=f"a red circle moving {direction}",
            seed=seed,
            motion_scale=seed % 3,
            guidance_scale=7.5 if full else 1.5,
            num_inference_steps=25 if full else 8,
            num_frames=16 if full else 8,
            width=side,
            height=side,
        )
        for seed, (picture, direction) in enumerate(
            zip(pictures, ["left", "right", "up", "down"] * len(pictures), strict=False)
        )
    ]


def _contestants(options: Options, pipe: Any, device: torch.device, mp4: Encode) -> Iterator[_Contestant]:
    shot = _shots(options)[0]
    stock = _stock_unet_call(pipe, shot)

    def one_by_one(own: Any) -> Callable[[Sequence[Shot]], list[Frames]]:
        return lambda shots: [single_call(own, each) for each in shots]

    documented = copy.copy(pipe)
    documented.vae = copy.deepcopy(pipe.vae)
    documented.vae.enable_slicing()
    if device.type == "cuda":
        documented = copy.deepcopy(pipe).to("cpu")
        documented.vae.enable_slicing()
        documented.enable_model_cpu_offload()
    yield _Contestant("a: documented", one_by_one(documented), _gif, [(1.0, stock)])
    yield _Contestant("a': documented, MP4", one_by_one(documented), mp4, [(1.0, stock)])
    yield _Contestant("b: pipeline", one_by_one(pipe), mp4, [(1.0, stock)])
    if options.compiles:
        compiled = copy.copy(pipe)
        compiled.unet = torch.compile(copy.deepcopy(pipe.unet).to(memory_format=torch.channels_last))
        compiled.vae = copy.deepcopy(pipe.vae).to(memory_format=torch.channels_last)
        compiled.vae.decode = torch.compile(compiled.vae.decode)
        call = _stock_unet_call(compiled, shot)
        yield _Contestant("c: pipeline, compiled", one_by_one(compiled), mp4, [(1.0, call)], compiled=True)
    compiler = Compiler(usual_calls=0) if options.compiles else None
    for size in options.batches:
        yield _engine_contestant(f"d: engine, batches of {size}", options, pipe, size, mp4, "exact", compiler)
    for speed in PRESETS:
        if speed != "exact":
            size = max(options.batches)
            yield _engine_contestant(f"e: {speed}, batches of {size}", options, pipe, size, mp4, speed, compiler)


def _engine_contestant(
    name: str, options: Options, pipe: Any, size: int, mp4: Encode, speed: Speed, compiler: Compiler | None
) -> _Contestant:
    shots = _shots(options)[:size]
    calls = _engine_unet_calls(pipe, shots, speed, compiler)
    return _Contestant(name, _in_batches(pipe, size, speed, compiler), mp4, calls, compiler is not None)


def _in_batches(
    pipe: Any, size: int, speed: Speed, compiler: Compiler | None
) -> Callable[[Sequence[Shot]], list[Frames]]:
    def draw(shots: Sequence[Shot]) -> list[Frames]:
        # A new one each turn: nothing cached comes from an earlier turn but what was compiled.
        engine = PiaEngine.from_pipeline(pipe, speed, compiler)
        batches = [shots[start : start + size] for start in range(0, len(shots), size)]
        return [clip.frames for batch in batches for clip in engine.animate(batch)]

    return draw


def single_call(pipe: Any, shot: Shot) -> Frames:
    """One clip by a single call of the pipeline."""
    drawn = pipe(
        image=shot.image,
        prompt=shot.prompt,
        negative_prompt=shot.negative_prompt,
        generator=torch.Generator("cpu").manual_seed(shot.seed),
        motion_scale=shot.motion_scale,
        guidance_scale=shot.guidance_scale,
        num_inference_steps=shot.num_inference_steps,
        num_frames=shot.num_frames,
        width=shot.width,
        height=shot.height,
        output_type="pil",
    ).frames[0]
    return np.stack([np.asarray(frame) for frame in drawn])


def _gif(frames: Frames) -> bytes:
    """By diffusers' own function, as its documentation has it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "animation.gif"
        export_to_gif([Image.fromarray(frame) for frame in frames], str(path))
        return path.read_bytes()


def _stock_unet_call(pipe: Any, shot: Shot) -> Callable[[], Any]:
    """One step's call of the network for one guided row, as the pipeline makes it."""
    unet, stride = pipe.unet, pipe.vae_scale_factor
    size = (shot.num_frames, shot.height // stride, shot.width // stride)
    options = {"device": pipe.vae.device, "dtype": unet.dtype}
    sample = torch.zeros(2, unet.config.in_channels, *size, **options)
    tokens = pipe.tokenizer.model_max_length
    texts = torch.zeros(2 * shot.num_frames, tokens, pipe.text_encoder.config.hidden_size, **options)
    step = torch.tensor(500, device=options["device"])
    return torch.inference_mode()(lambda: unet(sample, step, encoder_hidden_states=texts))


def _engine_unet_calls(
    pipe: Any, shots: Sequence[Shot], speed: Speed, compiler: Compiler | None
) -> list[tuple[float, Callable[[], Any]]]:
    """The engine's calls of the network for a batch of guided rows: of all of it, and of its outermost layers."""
    unet, stride, shot, preset = pipe.unet, pipe.vae_scale_factor, shots[0], PRESETS[speed]
    size = (shot.num_frames, shot.height // stride, shot.width // stride)
    options = {"device": unet.device, "dtype": unet.dtype}
    latents = torch.zeros(len(shots), unet.config.out_channels, *size, **options)
    conditions = torch.zeros(len(shots), unet.config.in_channels - unet.config.out_channels, *size, **options)
    tokens, features = pipe.tokenizer.model_max_length, pipe.text_encoder.config.hidden_size
    texts = [torch.zeros(1, tokens, features, **options)] * len(shots)
    texts += [torch.zeros(1, tokens, features, **options) for _ in shots]
    rows = [*range(len(shots))] * 2
    images = Attention(unet, [], [1.0] * len(rows), shot.num_frames)
    times = torch.full((len(shots),), 500, device=unet.device)
    with torch.inference_mode():
        predict = predictor(unet, rows, conditions, texts, images, compiler or directly)
        deep = () if speed == "exact" else predict.reusing(latents, times, preset.layers, ())[1]
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(shot.num_steps)
    visited = [float(time) for time in scheduler.timesteps]
    whole = statistics.mean(whole_evaluations(preset, visited, scheduler.config.num_train_timesteps))
    calls: list[tuple[float, Callable[[], Any]]] = [(whole, lambda: predict(latents, times))]
    if whole < 1:
        calls.append((1 - whole, lambda: predict.reusing(latents, times, preset.layers, deep)))
    return [(share / len(shots), torch.inference_mode()(call)) for share, call in calls]


def _first_turn(each: _Contestant, shots: Sequence[Shot], device: torch.device, reference: Frames) -> dict[str, Any]:
    """The turn that warms up, and compiles: its time is told apart, and its first clip looked at."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    began = time.perf_counter()
    clips = each.draw(shots)
    synchronize(device)
    return {
        "first_turn_s": time.perf_counter() - began,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "psnr_db": psnr_db(clips[0], reference),
        "seconds": [],
    }


def _turn(each: _Contestant, shots: Sequence[Shot], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    for frames in each.draw(shots):
        each.encode(frames)
    synchronize(device)
    return time.perf_counter() - began


def _summary(
    turns: dict[str, Any],
    each: _Contestant,
    device: torch.device,
    num_shots: int,
    flops: int,
    calibration: Calibration,
) -> dict[str, Any]:
    taken = turns.pop("seconds")
    rate = num_shots / statistics.median(taken)
    sheet = calibration.datasheet_tflops
    return {
        "clips_per_s": rate,
        "clips_per_s_range": [num_shots / max(taken), num_shots / min(taken)],
        "unet_ms": 1000 * sum(share * seconds(device, call, repeats=3) for share, call in each.unet_calls),
        "share_of_measured_matmul": rate * flops / 1e12 / calibration.matmul_tflops,
        "share_of_datasheet": None if sheet is None else rate * flops / 1e12 / sheet,
        "compile_s": max(0.0, turns["first_turn_s"] - statistics.median(taken)) if each.compiled else None,
    }


def psnr_db(frames: Frames, reference: Frames) -> float:
    """Of uint8 frames against others of their shape, in dB; `IDENTICAL_DB` where no pixel differs."""
    error = float(np.mean((frames.astype(np.float64) - reference) ** 2))
    return IDENTICAL_DB if error == 0 else float(10 * np.log10(255**2 / error))
