"""Train the embedded model from scratch: image codec, text encoder and denoiser, with one command and without data.

    python jobs/tiny/train.py --work outputs/tiny --out pia_batch/tiny/checkpoint

`jobs/tiny/world.py` renders every image on demand, from the seed and the number of the step: equal seeds give equal
training, and a restarted run continues from its last state in `--work`. Losses (CSV) and sample sheets (PNG) are
written there, too. Runs on a CPU or a GPU.

1. **Codec.** The encoder regresses to latents with a formula (`latents_of`), and the decoder learns its inverse. So the
   denoiser trains on latents that cost almost nothing, without running an encoder.
2. **Text encoder.** Learns to identify motion, colour and shape from the prompt, and is then frozen: trained together
   with the denoiser, it loses the difference between "left" and "right" before the denoiser can use it.
3. **Denoiser.** UNet and motion adapter together, v-prediction, with PIA's conditioning: the first frame's latents at
   every frame, and the coefficients of the sample's motion scale.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import architecture
import numpy as np
import torch
import world
from diffusers import AutoencoderKL, PIAPipeline, UNetMotionModel
from diffusers.pipelines.deprecated.pia.pipeline_pia import prepare_mask_coef_by_statistics
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import CLIPTextModel, CLIPTokenizer

Tensor = torch.Tensor

# Mean and standard deviation of the four latents over the world's images; normalised latents have mean 0, variance 1.
_LATENT_MEAN = (0.55, 0.0, 0.0, 0.01)
_LATENT_DEVIATION = (0.33, 0.25, 0.25, 0.08)
# Share of steps in which the denoiser sees only long travel in strong noise: with the whole world from the start, it
# learned to copy and to blur, and ignored the prompt for a thousand steps. Clips of 16 frames follow after _MIDDLE.
_OPENING, _MIDDLE = 0.3, 0.6
_CLEAR_PX = 10.0
_MOTION_SHARES = {
    "left": 0.12, "right": 0.12, "up": 0.13, "down": 0.12,
    "growing": 0.06, "shrinking": 0.07, "spinning": 0.16, "bouncing": 0.08, "still": 0.14,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Training settings of all parts."""

    seed: int
    work: Path
    device: torch.device
    codec_steps: int
    text_steps: int
    denoiser_steps: int
    clips: int
    learning_rate: float
    compiled: bool


def latents_of(frames: Tensor) -> Tensor:
    """Return the latents that the encoder learns.

    Args:
        frames: Frames, (n, 3, 64, 64), RGB, 0 to 1.

    Returns:
        Latents, (n, 4, 16, 16), near mean 0 and variance 1: brightness, red against green, blue against both, each
        averaged over 4 x 4 pixels, and the spread of the colours in these pixels.
    """
    mean = functional.avg_pool2d(frames, architecture.SHRINK)
    spread = (functional.avg_pool2d(frames**2, architecture.SHRINK) - mean**2).clamp_min(0).mean(1).sqrt()
    red, green, blue = mean.unbind(1)
    stacked = torch.stack(((red + green + blue) / 3, red - green, blue - (red + green) / 2, spread), 1)
    centre = stacked.new_tensor(_LATENT_MEAN).view(1, -1, 1, 1)
    return (stacked - centre) / stacked.new_tensor(_LATENT_DEVIATION).view(1, -1, 1, 1)


def main() -> None:
    """Train the three parts in order, and write the checkpoint."""
    plan, out = _parse()
    plan.work.mkdir(parents=True, exist_ok=True)
    networks = architecture.build(plan.seed)
    train_codec(networks.vae, plan)
    train_text_encoder(networks.text_encoder, networks.tokenizer, plan)
    denoiser = train_denoiser(networks, plan)
    networks = architecture.with_denoiser(networks, denoiser)
    networks.save(out)
    print(f"checkpoint written to {out}")


def train_codec(vae: AutoencoderKL, plan: Plan) -> None:
    """Fit the encoder to `latents_of`, and the decoder to its inverse under a little noise."""
    vae.to(plan.device, memory_format=torch.channels_last).train()
    decode = nn.Sequential(vae.post_quant_conv, vae.decoder)
    trainer = _Trainer("codec", vae, plan, steps=plan.codec_steps, learning_rate=2e-3, average=0.995)
    run = torch.compile(decode) if plan.compiled else decode
    for step in trainer.steps_left():
        rng = np.random.default_rng((plan.seed, 1, step))
        images = [_random_case(rng).frames([int(rng.integers(12))])[0] for _ in range(16)]
        frames = _to_channels(np.stack(images), plan.device)
        target = latents_of(frames)
        torch.manual_seed(plan.seed + step)
        noisy = target + torch.randn_like(target) * torch.rand(len(target), 1, 1, 1, device=plan.device) * 0.12
        with _autocast(plan.device):
            guess = vae.quant_conv(vae.encoder((frames * 2 - 1).contiguous(memory_format=torch.channels_last)))
            picture = run(noisy.contiguous(memory_format=torch.channels_last))
        difference = picture.float() - (frames * 2 - 1)
        encoder_loss = functional.mse_loss(guess.float()[:, : architecture.LATENT_CHANNELS], target)
        loss = 5 * difference.square().mean() + difference.abs().mean() + encoder_loss
        trainer.update(
            step, loss, psnr=-10 * math.log10(difference.square().mean().item() / 4), encoder=encoder_loss.item()
        )
    trainer.use_average()
    architecture.narrow_posterior(vae)


def train_text_encoder(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, plan: Plan) -> None:
    """Train the tokens from the prompt's end on to identify motion, colour and shape of the moving shape."""
    questions = (("none", *world.MOTIONS), ("none", *world.COLOURS), ("none", *world.KINDS))
    torch.manual_seed(plan.seed)
    heads = nn.ModuleList(nn.Linear(architecture.TEXT_CHANNELS, len(answers)) for answers in questions)
    encoder.to(plan.device).train()
    both = nn.ModuleList((encoder, heads)).to(plan.device)
    trainer = _Trainer("text", both, plan, steps=plan.text_steps, learning_rate=2e-3, average=0.99)
    for step in trainer.steps_left():
        rng = np.random.default_rng((plan.seed, 2, step))
        cases = [_random_case(rng) for _ in range(96)]
        prompts = [case.prompt for case in cases] + [""] * 4
        tokens = _tokens(tokenizer, prompts, plan.device)
        hidden = encoder(tokens).last_hidden_state
        ended = (tokens == tokenizer.eos_token_id).cumsum(1) > 0
        loss, right = hidden.new_zeros(()), torch.ones(len(prompts), dtype=torch.bool, device=plan.device)
        for head, answers, labels in zip(heads, questions, zip(*map(_labels, cases), strict=True), strict=True):
            truth = torch.tensor([answers.index(word) for word in labels] + [0] * 4, device=plan.device)
            logits = head(hidden)
            loss = loss + functional.cross_entropy(logits[ended], truth[:, None].expand_as(tokens)[ended])
            right &= logits[:, -1].argmax(1) == truth
        trainer.update(step, loss, right=right.float().mean().item())
    trainer.use_average()


def train_denoiser(networks: architecture.Networks, plan: Plan) -> UNetMotionModel:
    """Train UNet and motion adapter together; return the averaged network."""
    scheduler = networks.scheduler
    signal = scheduler.alphas_cumprod.to(plan.device)
    encoder = networks.text_encoder.to(plan.device).eval().requires_grad_(requires_grad=False)
    model = UNetMotionModel.from_unet2d(networks.unet, networks.motion_adapter)
    model.set_attn_processor(PlainAttention())
    model.to(plan.device, memory_format=torch.channels_last).train()
    trainer = _Trainer("denoiser", model, plan, plan.denoiser_steps, plan.learning_rate, average=0.998)
    run = torch.compile(model, dynamic=False) if plan.compiled else model
    for step in trainer.steps_left():
        rng = np.random.default_rng((plan.seed, 3, step))
        done = step / plan.denoiser_steps
        opening = done < _OPENING
        num_frames = 16 if rng.random() < (0.0 if done < _MIDDLE else 0.15) else 8
        clips = plan.clips * 8 // num_frames
        loops = 0.5 if num_frames == 16 else 0.04  # noqa: PLR2004 - PIA's loops have 16 frames
        cases = [_opening_case(rng) if opening else _random_case(rng, loops) for _ in range(clips)]
        clean = latents_of(_to_channels(np.concatenate([case.clip(num_frames) for case in cases]), plan.device))
        clean = clean.view(clips, num_frames, *clean.shape[1:]).transpose(1, 2)  # (clips, 4, frames, 16, 16)
        prompts = ["" if rng.random() < 0.1 else case.prompt for case in cases]  # noqa: PLR2004
        with torch.no_grad():
            text = encoder(_tokens(networks.tokenizer, prompts, plan.device)).last_hidden_state
        curves = [prepare_mask_coef_by_statistics(num_frames, 0, case.motion_scale) for case in cases]
        mask = clean.new_tensor(curves).view(clips, 1, num_frames, 1, 1).expand(-1, -1, -1, *clean.shape[-2:])
        torch.manual_seed(plan.seed + step)
        times = torch.from_numpy(rng.integers(400 if opening else 0, 1000, clips)).to(plan.device)
        noise = torch.randn_like(clean)
        kept = signal[times].view(-1, 1, 1, 1, 1)
        noised = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * clean
        given = clean[:, :, :1].expand_as(clean)
        with _autocast(plan.device):
            guess = run(torch.cat((noised, mask, given), 1), times, text.repeat_interleave(num_frames, 0)).sample
        empty = latents_of(_to_channels(np.stack([case.backdrop() for case in cases]), plan.device))[:, :, None]
        differs = torch.maximum((clean - given).abs(), (clean - empty).abs()).amax(1, keepdim=True)
        matters = (differs > 0.1).float()  # noqa: PLR2004
        error = (guess.float() - velocity).square()
        loss = (error * (1 + 3 * matters)).mean()
        shapes = (error * matters).sum() / matters.expand_as(error).sum().clamp_min(1)
        trainer.update(step, loss, error=error.mean().item(), shapes=shapes.item())
        if (step + 1) % 500 == 0:
            _sheet(trainer.average, networks, plan, step + 1)
    trainer.use_average()
    return model


class PlainAttention:
    """Attention as two matrix products: for short sequences the fused kernel's backward pass is slower on a CPU."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        """Apply attention as a diffusers processor: (batch, tokens, channels) in and out."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for projected in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        mixed = ((query @ key.transpose(-1, -2)) * attn.scale).softmax(-1) @ value
        result: Tensor = attn.to_out[0](mixed.transpose(1, 2).flatten(2))
        return result


class _Trainer:
    """Training state of one network: optimiser, schedule, running average, state on disk, progress bar."""

    def __init__(
        self, name: str, model: nn.Module, plan: Plan, steps: int, learning_rate: float, average: float
    ) -> None:
        self.model, self.total, self.decay, self.base_rate = model, steps, average, learning_rate
        self.average = copy.deepcopy(model).requires_grad_(requires_grad=False)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.name, self.state_path, self.log_path = name, plan.work / f"{name}.pt", plan.work / f"{name}.csv"
        self.first = 0
        self.recent: list[dict[str, float]] = []
        if self.state_path.exists():
            state = torch.load(self.state_path, map_location=plan.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.first = state["step"]

    def steps_left(self) -> Iterator[int]:
        """Yield the numbers of the remaining steps, with a progress bar."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            self.progress, self.task = progress, progress.add_task(self.name, total=self.total, completed=self.first)
            yield from range(self.first, self.total)
        self.save(self.total)

    def update(self, step: int, loss: Tensor, **measures: float) -> None:
        """Take one optimiser step; the learning rate warms up over 100 steps and falls as a cosine after 55 %."""
        late = max(0.0, (step / self.total - 0.55) / 0.45)
        rate = self.base_rate * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * late)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(self.decay, (step + 1) / (step + 10))
        with torch.no_grad():
            averages: list[Tensor] = list(self.average.parameters())
            currents: list[Tensor] = list(self.model.parameters())
            torch._foreach_lerp_(averages, currents, 1 - decay)
        self.recent.append({"loss": loss.item(), **measures})
        self.progress.update(self.task, advance=1, description=f"{self.name} loss {self.recent[-1]['loss']:.4f}")
        if (step + 1) % 50 == 0:
            means = {key: float(np.mean([entry[key] for entry in self.recent])) for key in self.recent[0]}
            self.recent.clear()
            with self.log_path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow([step + 1, *(f"{key}={value:.5f}" for key, value in means.items())])
        if (step + 1) % 250 == 0:
            self.save(step + 1)

    def save(self, step: int) -> None:
        """Replace the state on disk atomically, so that a stop at any moment leaves the old or the new state."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": step,
        }
        torch.save(state, self.state_path.with_suffix(".tmp"))
        self.state_path.with_suffix(".tmp").replace(self.state_path)

    def use_average(self) -> None:
        """Replace the network's weights by their running average."""
        self.model.load_state_dict(self.average.state_dict())
        self.model.eval()


def _random_case(rng: np.random.Generator, loops: float = 0.0) -> world.Case:
    motion = world.MOTIONS[rng.choice(len(world.MOTIONS), p=[_MOTION_SHARES[name] for name in world.MOTIONS])]
    scale = int(rng.integers(3)) + (3 if rng.random() < loops else 0)
    return world.random_case(rng, motion=motion, motion_scale=scale, both=0.35)


def _opening_case(rng: np.random.Generator) -> world.Case:
    """Return a case with one shape that travels far in a direction, where the prompt matters most."""
    while True:
        motion = world.MOTIONS[rng.integers(4)]
        case = world.random_case(rng, motion=motion, motion_scale=2 if rng.integers(5) else 1, both=0.0)
        ends = world.moved(case.shapes[0], motion, 1, 7)
        if abs(ends.x - case.shapes[0].x) + abs(ends.y - case.shapes[0].y) > _CLEAR_PX:
            return case


def _labels(case: world.Case) -> tuple[str, str, str]:
    """Return motion, colour and shape of the moving shape, as far as the prompt names them."""
    shape = case.shapes[0]
    own_words = case.prompt.replace(",", "").split(" beside ")[0].split(" near ")[0].split(" and the ")[0].split()
    return (
        case.motion,
        shape.colour if shape.colour in own_words else "none",
        shape.kind if shape.kind in own_words else "none",
    )


def _tokens(tokenizer: CLIPTokenizer, prompts: list[str], device: torch.device) -> Tensor:
    encoded = tokenizer(
        prompts, padding="max_length", max_length=architecture.TEXT_TOKENS, truncation=True, return_tensors="pt"
    )
    tokens: Tensor = encoded.input_ids
    return tokens.to(device)


def _to_channels(frames: np.ndarray[Any, np.dtype[np.float32]], device: torch.device) -> Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2).to(device)


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


def _sheet(model: UNetMotionModel, networks: architecture.Networks, plan: Plan, step: int) -> None:
    """Write a sheet with the clip of one case for every motion, each under the true clip."""
    pipeline = PIAPipeline(networks.vae, networks.text_encoder, networks.tokenizer, model, networks.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng((plan.seed, 4))
    rows = []
    for index, motion in enumerate(world.MOTIONS):
        case = world.random_case(rng, motion=motion, motion_scale=2 - index % 3)
        clip = pipeline(
            image=Image.fromarray(case.image()),
            prompt=case.prompt,
            motion_scale=case.motion_scale,
            num_frames=8,
            height=world.SIDE,
            width=world.SIDE,
            num_inference_steps=4,
            guidance_scale=1.5,
            generator=torch.Generator("cpu").manual_seed(index),
            output_type="np",
        ).frames[0]
        rows += [np.concatenate(list(frames), 1) for frames in (case.clip(), clip)]
    Image.fromarray(world.to_uint8(np.concatenate(rows))).save(plan.work / f"sheet-{step:06d}.png")


def _parse() -> tuple[Plan, Path]:
    parser = argparse.ArgumentParser(description="Train the embedded model from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished checkpoint")
    parser.add_argument("--work", type=Path, required=True, help="folder for states, losses and sample sheets")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--codec-steps", type=int, default=1600, help="steps of the codec (default: %(default)s)")
    parser.add_argument("--text-steps", type=int, default=600, help="steps of the text encoder (default: %(default)s)")
    parser.add_argument(
        "--denoiser-steps", type=int, default=15_000, help="steps of the denoiser (default: %(default)s)"
    )
    parser.add_argument(
        "--clips", type=int, default=6, help="clips of 8 frames in a step of the denoiser (default: %(default)s)"
    )
    parser.add_argument(
        "--learning-rate", type=float, default=1.2e-3, help="learning rate of the denoiser (default: %(default)s)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the networks: takes minutes, makes steps faster"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    plan = Plan(
        given.seed, given.work, torch.device(given.device), given.codec_steps, given.text_steps,
        given.denoiser_steps, given.clips, given.learning_rate, given.compile,
    )  # fmt: skip
    return plan, given.out


if __name__ == "__main__":
    main()
