"""Input and output of the engine: `Shot` and `Clip`, and the limits of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pia_batch.config import contexts
from pia_batch.errors import ImageUnreadableError, RequestError, UnsupportedSettingError
from pia_batch.schema import key_prompts as prompts_by_frame
from pia_batch.schema.key_prompts import KeyPrompt, key_prompts
from pia_batch.schema.lora_scales import lora_scales, problem_of
from pia_batch.schema.settings import (
    BY_NAME,
    CONTEXTS,
    FREE_INIT_METHODS,
    INTERPOLATIONS,
    MAX_FRAMES,
    MAX_SEED,
    EngineSettings,
)

_FIRST_STYLE = 6
"""Smallest motion_scale that restyles; smaller ones move, and support loops."""

_LOOPS = range(3, 6)
"""Values of motion_scale whose clips return to the image after 16 frames."""

_LOOP_FRAMES = 16

_MAX_FREE_INIT_ITERS = BY_NAME["free_init_iters"].limits["le"]
_MAX_FREE_INIT_ORDER = BY_NAME["free_init_order"].limits["le"]

_MIN_FREE_INIT_STOP = 1e-6
"""Smallest stop frequency except zero; with smaller ones, powers in the filter exceed the floating-point range."""


@dataclass(frozen=True, slots=True)
class Shot(EngineSettings):
    """Request for one clip: an image, a prompt and every setting, so that rows do not depend on each other.

    The settings are keyword arguments, those of `schema.settings.EngineSettings`, each with a default;
    `schema.settings` declares their meaning, type, range and unit.

    Attributes:
        image: Input image, RGB, of any size: it is encoded at its own size, and its latents are resampled (nearest) to
            the clip's size.
        prompt: Description of the clip; text beyond the tokenizer's limit (77 tokens in CLIP) is not read. None if
            `prompts` is given.
        prompts: Descriptions by frame, between which the clip changes; a mapping such as `{0: "spring", 8: "winter"}`,
            or a sequence of pairs, becomes a tuple of `KeyPrompt`. So does `negative_prompts`. None if `prompt` is
            given.
        seed: Seed of the row's own CPU generator, 0 to 2**63 - 1.
        ip_adapter_image: Image prompt, RGB; None: `image` itself. Unused without an IP-Adapter.
    """

    image: Image.Image
    prompt: str | None = None
    seed: int = 0
    ip_adapter_image: Image.Image | None = None
    prompts: tuple[KeyPrompt, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("prompts", "negative_prompts"):
            object.__setattr__(self, name, key_prompts(getattr(self, name)))

    @property
    def prompt_keys(self) -> tuple[KeyPrompt, ...]:
        """Texts by frame; a single one, of frame 0, unless `prompts` is given."""
        return self.prompts or (KeyPrompt(0, self.prompt or ""),)

    @property
    def negative_keys(self) -> tuple[KeyPrompt, ...]:
        """Texts to steer away from by frame; a single one unless `negative_prompts` is given."""
        return self.negative_prompts or (KeyPrompt(0, self.negative_prompt),)

    @property
    def returns(self) -> bool:
        """True if the last frame returns to the image, so that the last text is followed by the first one."""
        preset = self.motion_curve is None and self.motion_scale in _LOOPS and self.num_frames == _LOOP_FRAMES
        return self.is_loop or preset

    @property
    def guided(self) -> bool:
        """True if classifier-free guidance is on, which doubles the work of a step."""
        return self.guidance_scale > 1

    @property
    def is_loop(self) -> bool:
        """True if the last frame returns to the image; a motion curve of its own overrides `loop`."""
        return self.loop and self.motion_curve is None

    @property
    def num_steps(self) -> int:
        """Number of steps after `strength`. As in the pipeline, the float product is rounded down."""
        return min(int(self.num_inference_steps * self.strength), self.num_inference_steps)

    @property
    def pass_steps(self) -> tuple[int, ...]:
        """Numbers of steps of each pass; one pass without FreeInit. Float products are rounded as in the pipeline."""
        passes = max(1, self.free_init_iters)
        if not self.free_init_fast:
            return (self.num_steps,) * passes
        return tuple(max(1, int(self.num_steps / passes * (index + 1))) for index in range(passes))


class Clip:
    """One generated clip, or the error that prevented it.

    Attributes:
        latents: Tensor (4, F, h, w) on the CPU, in the engine's dtype, without the VAE's scaling factor; None unless
            requested.
        prompt_tokens: Number of tokens of the prompt before truncation, start and end markers included.
        prompt_truncated: True if the text encoder did not read the whole prompt.
        device_seconds: This clip's share of its batch's time, in seconds.
        error: Reason for missing frames; None if there are frames.
    """

    __slots__ = ("_frames", "device_seconds", "error", "latents", "prompt_tokens", "prompt_truncated")

    def __init__(
        self,
        frames: NDArray[np.uint8] | None = None,
        *,
        latents: torch.Tensor | None = None,
        prompt_tokens: int = 0,
        prompt_truncated: bool = False,
        device_seconds: float = 0.0,
        error: RequestError | None = None,
    ) -> None:
        if (frames is None) == (error is None):
            raise ValueError("a clip has either frames or an error")
        self._frames = frames
        self.latents = latents
        self.prompt_tokens = prompt_tokens
        self.prompt_truncated = prompt_truncated
        self.device_seconds = device_seconds
        self.error = error

    @property
    def frames(self) -> NDArray[np.uint8]:
        """Frames: uint8, shape (F, H, W, 3), RGB, 0-255.

        Raises:
            RequestError: The clip has an `error`; that error is raised.
        """
        if self._frames is None:
            raise self.error or RequestError("the clip has no frames")
        return self._frames


@dataclass(frozen=True, slots=True)
class Limits:
    """Range of settings that one model supports.

    Attributes:
        max_frames: Number of frame positions of the motion modules.
        max_clip_skip: Number of layers of the text encoder.
        max_steps: Number of timesteps on which the scheduler was trained.
        latent_stride: Pixels per latent on each side, 8 in Stable Diffusion.
        takes_image_prompts: True if the model has an IP-Adapter.
        loras: Names of the model's LoRAs.
        fixed_loras: Names of those whose scales rows cannot change.
    """

    max_frames: int
    max_clip_skip: int
    max_steps: int
    latent_stride: int
    takes_image_prompts: bool
    loras: tuple[str, ...] = ()
    fixed_loras: frozenset[str] = frozenset()

    def check(self, shot: Shot) -> None:
        """Return if this model supports the shot.

        Raises:
            UnsupportedSettingError: A setting is out of the model's range. The message names the setting and the range.
            ImageUnreadableError: The image's pixels cannot be decoded.
        """
        self._check_image(shot.image)
        self._check_image_prompt(shot)
        self._check_size(shot)
        _require(0 <= shot.seed <= MAX_SEED, f"seed {shot.seed} is not between 0 and 2**63 - 1")
        skip = shot.clip_skip or 0
        _require(
            0 <= skip <= self.max_clip_skip,
            f"clip_skip {skip} is not between 0 and the text encoder's {self.max_clip_skip} layers",
        )
        self._check_motion(shot)
        self._check_loras(shot)
        _require(
            math.isfinite(shot.guidance_scale) and math.isfinite(shot.eta),
            f"guidance_scale {shot.guidance_scale} and eta {shot.eta} must be finite",
        )
        self._check_steps(shot)
        self._check_free_init(shot)
        self._check_prompts(shot)

    def _check_prompts(self, shot: Shot) -> None:
        one = (shot.prompt is None) != (shot.prompts is None)
        _require(one, "give either prompt or prompts, which are texts by frame")
        for name, keys in (("prompts", shot.prompts), ("negative_prompts", shot.negative_prompts)):
            if keys is None:
                continue
            form = 'frames with their texts, such as {0: "spring", 8: "winter"}'
            _require(isinstance(keys, tuple) and all(map(_is_key_prompt, keys)), f"{name} needs {form}")
            problem = prompts_by_frame.problem_of(keys)
            _require(problem is None, f"{name}: {problem}")
            _require(
                keys[-1].frame < shot.num_frames,
                f"{name}: frame {keys[-1].frame} is not below num_frames {shot.num_frames}; leave it out",
            )
        _require(0 <= shot.prompt_hold <= 1, f"prompt_hold {shot.prompt_hold} is not between 0 and 1")
        _require(
            shot.prompt_interpolation in INTERPOLATIONS,
            f"prompt_interpolation {shot.prompt_interpolation!r} is none of {', '.join(INTERPOLATIONS)}",
        )
        for _, text in (*shot.prompt_keys, *shot.negative_keys):
            _require(_is_unicode(text), "the prompt holds a lone surrogate, which is no text")

    def _check_image(self, image: Image.Image) -> None:
        side = min(image.size)
        _require(side >= self.latent_stride, f"the image's side of {side} px is below {self.latent_stride} px")
        _check_pixels(image, "the image")

    def _check_image_prompt(self, shot: Shot) -> None:
        scale = shot.ip_adapter_scale
        _require(math.isfinite(scale), f"ip_adapter_scale {scale} is not finite")
        if shot.ip_adapter_image is not None:
            _require(
                self.takes_image_prompts,
                "ip_adapter_image: this model has no IP-Adapter; set model.ip_adapter, or clear the column",
            )
            _check_pixels(shot.ip_adapter_image, "ip_adapter_image")

    def _check_size(self, shot: Shot) -> None:
        _require(1 <= shot.num_frames <= MAX_FRAMES, f"num_frames {shot.num_frames} is not between 1 and {MAX_FRAMES}")
        self._check_context(shot)
        step = math.lcm(8, self.latent_stride)
        for name, value in (("width", shot.width), ("height", shot.height)):
            _require(value > 0 and value % step == 0, f"{name} {value} is not a positive multiple of {step}")

    def _check_context(self, shot: Shot) -> None:
        _require(shot.context in (None, *CONTEXTS), f"context {shot.context!r} is none of {', '.join(CONTEXTS)}")
        length = shot.context_length
        method = contexts.method(shot.context, shot.num_frames, length, self.max_frames)
        if method is None:
            return
        _require(
            1 <= length <= self.max_frames,
            f"context_length {length} is not between 1 and the motion modules' {self.max_frames}",
        )
        if method == "windows":
            overlap = shot.context_overlap
            _require(0 <= overlap < length, f"context_overlap {overlap} is not between 0 and {length - 1}")
        if method == "chain":
            _require(length > 1, "context chain needs a context_length of 2 or more")
            _require(not shot.is_loop, "loop does not go with context chain, which never returns to the image")
            _require(shot.cond_frame == 0, f"cond_frame {shot.cond_frame} does not go with context chain; set it to 0")
        if method == "freenoise":
            stride = shot.context_stride
            _require(1 <= stride <= length, f"context_stride {stride} is not between 1 and {length}")

    def _check_motion(self, shot: Shot) -> None:
        curve = shot.motion_curve
        if curve is None:
            _require(shot.motion_scale in range(9), f"motion_scale {shot.motion_scale} is not between 0 and 8")
            _require(
                not shot.loop or shot.motion_scale < _FIRST_STYLE,
                f"loop does not go with motion_scale {shot.motion_scale}, which restyles and has no loop; "
                "take a motion_scale of 0 to 5, or no loop",
            )
        else:
            _require(len(curve) > 0 and all(map(math.isfinite, curve)), "motion_curve needs finite numbers")
        _require(
            0 <= shot.cond_frame < shot.num_frames,
            f"cond_frame {shot.cond_frame} is not between 0 and {shot.num_frames - 1}, the last of num_frames "
            f"{shot.num_frames}",
        )

    def _check_loras(self, shot: Shot) -> None:
        if not shot.lora_scales:
            return
        scales = lora_scales(shot.lora_scales)
        problem = problem_of(scales)
        _require(problem is None, f"lora_scales {shot.lora_scales} is not allowed; allowed: {problem}")
        for name, _ in scales:
            _require(
                self.loras.count(name) == 1,
                f"lora_scales: {name!r} is not the name of one LoRA of this model, which has "
                f"{', '.join(self.loras) or 'none'}; set `name` in model.loras",
            )
            _require(
                name not in self.fixed_loras,
                f"lora_scales: {name!r} is merged into the weights (fuse_loras, or a kind other than plain LoRA), so "
                "that rows cannot change its scale; set it in model.loras",
            )

    def _check_steps(self, shot: Shot) -> None:
        _require(0 < shot.strength <= 1, f"strength {shot.strength} is not in (0, 1]")
        _require(
            1 <= shot.num_inference_steps <= self.max_steps,
            f"num_inference_steps {shot.num_inference_steps} is not between 1 and {self.max_steps}",
        )
        _require(
            shot.num_steps >= 1,
            f"strength {shot.strength} leaves none of {shot.num_inference_steps} steps; "
            "their product must be at least 1",
        )

    def _check_free_init(self, shot: Shot) -> None:
        _require(
            0 <= shot.free_init_iters <= _MAX_FREE_INIT_ITERS,
            f"free_init_iters {shot.free_init_iters} is not between 0 and {_MAX_FREE_INIT_ITERS}",
        )
        if shot.free_init_iters == 0:
            return
        _require(
            shot.strength == 1,
            f"free_init_iters {shot.free_init_iters} does not go with strength {shot.strength:g}: every pass of "
            "FreeInit denoises from pure noise; set strength to 1, or free_init_iters to 0",
        )
        _require(
            shot.free_init_method in FREE_INIT_METHODS,
            f"free_init_method {shot.free_init_method!r} is none of {', '.join(FREE_INIT_METHODS)}",
        )
        order = shot.free_init_order
        _require(
            1 <= order <= _MAX_FREE_INIT_ORDER, f"free_init_order {order} is not between 1 and {_MAX_FREE_INIT_ORDER}"
        )
        for name in ("free_init_spatial_stop", "free_init_temporal_stop"):
            stop = getattr(shot, name)
            _require(
                stop == 0 or _MIN_FREE_INIT_STOP <= stop <= 1,
                f"{name} {stop} is neither 0 nor between {_MIN_FREE_INIT_STOP:g} and 1",
            )


def _check_pixels(image: Image.Image, name: str) -> None:
    _require(image.mode == "RGB", f"{name} is {image.mode}, not RGB")
    try:
        image.load()
    except OSError as err:
        raise ImageUnreadableError(f"{name} cannot be decoded: {err}") from err


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise UnsupportedSettingError(otherwise)


def _is_key_prompt(key: object) -> bool:
    return isinstance(key, KeyPrompt) and type(key.frame) is int and isinstance(key.prompt, str)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
