"""Variants of the benchmark: the baselines (a) to (c) and the engine (d) and (e), each from shots to frames and files.

- (a) the documented use of `PIAPipeline`: CPU offload, VAE slicing, GIF, one row at a time; (a') the same with MP4;
- (b) the pipeline resident on the device;
- (c) the same, compiled as an experienced user would;
- (d) the engine, exact, one batch at a time;
- (e) the engine with each lossy preset of `model.speed`, in its largest batch.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from diffusers.utils import export_to_gif
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pia_batch import tiny
from pia_batch.config.speed_presets import PRESETS, Speed, whole_evaluations
from pia_batch.engine.benchmark.profiling import counting
from pia_batch.engine.compiling import Call, Compiler, Mode, directly
from pia_batch.engine.engine import PiaEngine
from pia_batch.engine.image_prompts import ImagePromptAttention
from pia_batch.engine.prediction import predictor
from pia_batch.engine.shots import Shot
from pia_batch.weights import sd15

Size = Literal["full", "tiny"]
Frames = NDArray[np.uint8]
Encode = Callable[[Frames], bytes]

GUIDANCE = {"full": 7.5, "tiny": 1.5}
"""Guidance scale of the shots, by size."""


@dataclass(frozen=True, slots=True)
class UnetCall:
    """One kind of UNet call that a variant makes.

    Attributes:
        share: Number of such calls for one step of one row.
        call: Function that makes one call.
        directly: Function that makes one call without compiled graphs.
    """

    share: float
    call: Callable[[], Any]
    directly: Callable[[], Any]


@dataclass(slots=True)
class Variant:
    """One way to generate clips, measured by the benchmark.

    Attributes:
        pipe: Pipeline with the networks.
        rows: Number of rows in a batch.
        generate: Function from shots to the frames of each.
        encode: Function from frames to a file's bytes.
        unet_calls: Function that returns the kinds of UNet calls.
        compiler: Compiler of the variant; None: it is compiled as a whole, or not at all.
        compiled: True if any part is compiled.
    """

    pipe: Any
    rows: int
    generate: Callable[[Sequence[Shot]], list[Frames]]
    encode: Encode
    unet_calls: Callable[[], list[UnetCall]]
    compiler: Compiler | None = None
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class VariantEntry:
    """Variant that is not created yet: its networks may not fit on the device."""

    name: str
    make: Callable[[], Variant]


@dataclass(slots=True)
class Variants:
    """Factory of all variants.

    Attributes:
        pipe: Pipeline, resident on the device, in the stock memory layout.
        shots: Shots of one turn.
        batches: Batch sizes of the engine.
        encode_mp4: Function from frames to the bytes of an MP4 file.
        compiles: True to include (c), and to compile in (d) and (e).
        mode: Mode of Inductor, for all variants that compile.
        backend: Backend of `torch.compile`.
    """

    pipe: Any
    shots: Sequence[Shot]
    batches: Sequence[int]
    encode_mp4: Encode
    compiles: bool = True
    mode: Mode = "default"
    backend: str | Call = "inductor"
    _made: dict[str, Any] = field(default_factory=dict)

    def entries(self) -> Iterator[VariantEntry]:
        """Yield the variants in their order."""
        mp4 = self.encode_mp4
        yield VariantEntry("a: documented", lambda: self._one_by_one(self._once("offloaded", self._offloaded), _gif))
        yield VariantEntry(
            "a': documented, MP4", lambda: self._one_by_one(self._once("offloaded", self._offloaded), mp4)
        )
        yield VariantEntry("b: pipeline", lambda: self._one_by_one(self.pipe, mp4))
        if self.compiles:
            yield VariantEntry("c: compiled", self._compiled)
        for size in self.batches:
            yield VariantEntry(f"d: engine, {_rows(size)}", functools.partial(self._engine, size, "exact"))
        for speed in PRESETS:
            if speed != "exact":
                size = max(self.batches)
                yield VariantEntry(f"e: {speed}, {_rows(size)}", functools.partial(self._engine, size, speed))

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a part that several variants share; create it on first use."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def _one_by_one(self, pipe: Any, encode: Encode) -> Variant:
        resident = self.pipe if pipe is self._made.get("offloaded") else pipe  # the same network, on the device
        call = stock_unet_call(resident, self.shots[0])
        return Variant(
            pipe,
            rows=1,
            generate=lambda shots: [single_call(pipe, shot) for shot in shots],
            encode=encode,
            unet_calls=lambda: [UnetCall(1.0, call, call)],
        )

    def _offloaded(self) -> Any:
        """Return the pipeline as in the documentation of diffusers on PIA. On a CPU there is nothing to offload."""
        if self.pipe.device.type != "cuda":
            vae = copy.deepcopy(self.pipe.vae)
            vae.enable_slicing()
            return _with(self.pipe, vae=vae)
        pipe = _with(self.pipe, **{name: copy.deepcopy(network).to("cpu") for name, network in networks(self.pipe)})
        pipe.vae.enable_slicing()
        pipe.enable_model_cpu_offload(device=self.pipe.device)
        return pipe

    def _compiled(self) -> Variant:
        """Return (c), as the documentation of diffusers on speed has it: fused QKV, channels last, full graphs."""
        unet, vae = (
            copy.deepcopy(network).to(memory_format=torch.channels_last) for network in (self.pipe.unet, self.pipe.vae)
        )
        unet.fuse_qkv_projections()
        options: dict[str, Any] = {"backend": self.backend, "fullgraph": True}
        if self.backend == "inductor":
            options["mode"] = self.mode
        vae.decode = torch.compile(vae.decode, **options)
        made = self._one_by_one(_with(self.pipe, unet=torch.compile(unet, **options), vae=vae), self.encode_mp4)
        whole = stock_unet_call(_with(self.pipe, unet=unet), self.shots[0])
        calls = made.unet_calls
        made.unet_calls = lambda: [UnetCall(1.0, each.call, whole) for each in calls()]
        made.compiled = True
        return made

    def _engine(self, size: int, speed: Speed) -> Variant:
        pipe = self._once("engine", self._engine_networks)
        compiler = None
        if self.compiles:
            compiler = self._once("compiler", lambda: Compiler(self.backend, usual_calls=0, mode=self.mode))

        def generate(shots: Sequence[Shot]) -> list[Frames]:
            # A new engine for each turn, so that only compiled graphs are left from earlier turns.
            engine = PiaEngine.from_pipeline(pipe, speed, compiler)
            batches = [shots[start : start + size] for start in range(0, len(shots), size)]
            clips = [clip for batch in batches for clip in engine.animate(batch)]
            for clip in clips:
                if clip.error is not None:
                    raise clip.error
            return [clip.frames for clip in clips]

        return Variant(
            pipe,
            rows=size,
            generate=generate,
            encode=self.encode_mp4,
            unet_calls=lambda: engine_unet_calls(pipe, self.shots[:size], speed, compiler),
            compiler=compiler,
            compiled=compiler is not None,
        )

    def _engine_networks(self) -> Any:
        """Return the networks in the memory layout of the engine: channels last on a GPU."""
        if self.pipe.device.type != "cuda":
            return self.pipe
        converted = {name: copy.deepcopy(network) for name, network in networks(self.pipe) if name in {"unet", "vae"}}
        return _with(
            self.pipe, **{name: network.to(memory_format=torch.channels_last) for name, network in converted.items()}
        )


def pipeline(size: Size) -> Any:
    """Return a float32 `PIAPipeline` on the CPU: the embedded model, or a full-size one with random weights."""
    parts = {"local_files_only": True, "dtype": torch.float32}
    if size == "tiny":
        adapter = diffusers.MotionAdapter.from_pretrained(tiny.PATH / "motion_adapter", **parts)
        pipe = diffusers.PIAPipeline.from_pretrained(tiny.PATH, motion_adapter=adapter, **parts)
    else:
        pipe = _full()
    pipe.set_progress_bar_config(disable=True)
    for _, network in networks(pipe):
        network.eval().requires_grad_(requires_grad=False)
    return pipe


def _full() -> Any:
    """Return Stable Diffusion 1.5 with PIA's motion modules, without ever holding a second copy of the weights."""

    def config(kind: Any, name: str) -> Any:
        return kind.from_config(kind.load_config(sd15.PATH / name))

    with torch.device("meta"):  # only to merge the two configs, as the pipeline does
        still = config(diffusers.UNet2DConditionModel, "unet")
        adapter = config(diffusers.MotionAdapter, "motion_adapter")
        together = diffusers.UNetMotionModel.from_unet2d(still, adapter, load_weights=False).config
    torch.manual_seed(0)
    return diffusers.PIAPipeline(
        vae=config(diffusers.AutoencoderKL, "vae"),
        text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(sd15.PATH / "text_encoder", local_files_only=True)),
        tokenizer=CLIPTokenizer.from_pretrained(sd15.PATH / "tokenizer", local_files_only=True),
        unet=diffusers.UNetMotionModel.from_config(together),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False, steps_offset=1
        ),
    )


def networks(pipe: Any) -> list[tuple[str, Any]]:
    """Return the networks of a pipeline, by name."""
    return [(name, getattr(pipe, name)) for name in ("text_encoder", "unet", "vae")]


def _with(pipe: Any, **parts: Any) -> Any:
    """Return a pipeline with some parts replaced."""
    own = {name: getattr(pipe, name) for name in ("text_encoder", "tokenizer", "unet", "vae", "scheduler")}
    made = diffusers.PIAPipeline(**own | parts)
    made.set_progress_bar_config(disable=True)
    return made


def single_call(pipe: Any, shot: Shot) -> Frames:
    """Return one clip, uint8 (F, H, W, 3), from a single call of the pipeline."""
    images = pipe(
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
    return np.stack([np.asarray(frame) for frame in images])


def _gif(frames: Frames) -> bytes:
    """Encode with diffusers' own function, as in its documentation."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "animation.gif"
        export_to_gif([Image.fromarray(frame) for frame in frames], str(path))
        return path.read_bytes()


def stock_unet_call(pipe: Any, shot: Shot) -> Callable[[], Any]:
    """Return a call of the network for one step of one guided row.

    It has exactly the arguments that the pipeline passes; otherwise a graph would be compiled again.
    """
    unet, stride = pipe.unet, pipe.vae_scale_factor
    size = (shot.num_frames, shot.height // stride, shot.width // stride)
    options = {"device": pipe.vae.device, "dtype": pipe.vae.dtype}
    sample = torch.randn(2, unet.config.in_channels, *size, **options)
    tokens = pipe.tokenizer.model_max_length
    texts = torch.randn(2 * shot.num_frames, tokens, pipe.text_encoder.config.hidden_size, **options)
    step = torch.tensor(500, device=options["device"])
    return torch.no_grad()(
        lambda: (
            unet(sample, step, encoder_hidden_states=texts, cross_attention_kwargs=None, added_cond_kwargs=None).sample
        )
    )


def flops_per_clip(pipe: Any, shot: Shot) -> int:
    """Return the multiplications and additions of one pipeline call's networks, the work of a clip in all variants."""
    one = dataclasses.replace(shot, num_inference_steps=1)
    with counting() as whole:
        single_call(pipe, one)
    call = stock_unet_call(pipe, one)
    with counting() as step:
        call()
    return int(whole.get_total_flops() + (shot.num_steps - 1) * step.get_total_flops())


@torch.inference_mode()  # as in the engine; other tensors would make the first call compile again
def engine_unet_calls(pipe: Any, shots: Sequence[Shot], speed: Speed, compiler: Compiler | None) -> list[UnetCall]:
    """Return the engine's UNet calls for a batch of guided rows: of the whole network and of its outermost layers."""
    unet, stride, shot, preset = pipe.unet, pipe.vae_scale_factor, shots[0], PRESETS[speed]
    size = (shot.num_frames, shot.height // stride, shot.width // stride)
    options = {"device": unet.device, "dtype": unet.dtype}
    latents = torch.randn(len(shots), unet.config.out_channels, *size, **options)
    conditions = torch.randn(len(shots), unet.config.in_channels - unet.config.out_channels, *size, **options)
    tokens, features = pipe.tokenizer.model_max_length, pipe.text_encoder.config.hidden_size
    texts = [torch.randn(1, tokens, features, **options)] * len(shots)
    texts += [torch.randn(1, tokens, features, **options) for _ in shots]
    rows = [*range(len(shots))] * 2
    images = ImagePromptAttention(unet, [], [1.0] * len(rows), shot.num_frames)
    times = torch.full((len(shots),), 500, device=unet.device)
    predicts = [predictor(unet, rows, conditions, texts, images, call) for call in (compiler or directly, directly)]
    deep = () if speed == "exact" else predicts[1].reusing(latents, times, preset.layers, ())[1]
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(shot.num_steps)
    visited = [float(time) for time in scheduler.timesteps]
    whole = statistics.mean(whole_evaluations(preset, visited, scheduler.config.num_train_timesteps))

    def inferred(call: Callable[..., Any], *given: Any) -> Callable[[], Any]:
        return torch.inference_mode()(functools.partial(call, *given))

    calls = [UnetCall(whole / len(shots), *(inferred(each, latents, times) for each in predicts))]
    if speed != "exact":
        keeping, reusing = ((latents, times, preset.layers, known) for known in ((), deep))
        calls = [UnetCall(whole / len(shots), *(inferred(each.reusing, *keeping) for each in predicts))]
        if whole < 1:
            calls.append(UnetCall((1 - whole) / len(shots), *(inferred(each.reusing, *reusing) for each in predicts)))
    return calls


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count > 1)}"
