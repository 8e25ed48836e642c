"""What looks wrong about a run before it starts: allowed, and perhaps not what was meant. Each says what to do."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from fractions import Fraction

from pia_batch import tiny
from pia_batch.config import EMBEDDED, Defaults, ModelConfig, PlacementConfig, RunConfig
from pia_batch.manifest.tokens import MAX_TOKENS
from pia_batch.planning.capacity import Node, cpus_here, shortage
from pia_batch.planning.statistics import Survey
from pia_batch.weights.resolve import resolve

SIDES_PX = (384, 768)
"""Between these sides Stable Diffusion 1.5, which was trained at 512 x 512, draws what one expects."""

_TINY_PX = 64
"""What the embedded model was trained at."""

_MAX_UNEVEN = 0.1
"""How much of a GIF frame's delay its unit of 10 ms may be where that does not divide it."""


def warnings(config: RunConfig, survey: Survey) -> list[str]:
    """What to look at before this run; empty is good.

    Args:
        config: the run's config.
        survey: has seen the manifest.
    """
    models = {name: config.all_models[name] for name in dict.fromkeys(survey.work["model"].to_pylist())}
    return [
        *_about_seeds(survey),
        *_about_sizes(survey, models),
        *_about_prompts(survey),
        *(told for name, model in models.items() for told in _about_scheduler(name, model)),
        *_about_gifs(survey),
        *_about_defaults(config, survey),
        *_about_room(config.placement),
    ]


def _about_seeds(survey: Survey) -> Iterator[str]:
    if survey.only_seed is not None and survey.num_pending > 1:
        yield (
            f"all {survey.num_pending} pending requests have the seed {survey.only_seed}: they start from the same "
            "noise, and what is wrong with one is wrong with many; leave column 'seed' empty, and each has its own"
        )


def _about_sizes(survey: Survey, models: dict[str, ModelConfig]) -> Iterator[str]:
    odd, unusual, shrunk = 0, 0, 0
    for row in survey.work.to_pylist():
        sides = [row["long_side"]] if row["width"] is None else [row["width"], row["height"]]
        if models[row["model"]].base == EMBEDDED:
            shrunk += row["num_rows"] * (set(sides) != {_TINY_PX})
            continue
        odd += row["num_rows"] * any(side % 64 for side in sides)
        unusual += row["num_rows"] * (min(sides) < SIDES_PX[0] or max(sides) > SIDES_PX[1])
    if odd:
        yield (
            f"{odd} requests have a side that is no multiple of 64: the VAE and the UNet halve a picture six times in "
            "all, and other sides are rounded on the way; use multiples of 64, as `size: auto` does"
        )
    if unusual:
        yield (
            f"{unusual} requests have a side outside of {SIDES_PX[0]} to {SIDES_PX[1]} px: Stable Diffusion 1.5 was "
            "trained at 512 x 512, draws less well below and repeats things above; draw near 512, and scale afterwards"
        )
    if shrunk:
        yield (
            f"{shrunk} requests are not {_TINY_PX} x {_TINY_PX}, the only size that the embedded model knows; set "
            f"defaults.width and defaults.height to {_TINY_PX}, or model.base to a real model"
        )


def _about_prompts(survey: Survey) -> Iterator[str]:
    if survey.num_truncated:
        yield (
            f"at least {survey.num_truncated} prompts have more than {MAX_TOKENS} tokens, and their end is lost: put "
            "what matters first (results tell of each by `prompt_truncated`)"
        )


def _about_scheduler(name: str, model: ModelConfig) -> Iterator[str]:
    if model.base == EMBEDDED:
        return
    schedule = model.scheduler.settings.get("beta_schedule", "linear")
    if model.scheduler.name == "checkpoint" and "beta_schedule" not in model.scheduler.settings:
        part = resolve(model).components["scheduler"]
        shipped = json.loads((part.folder / "scheduler_config.json").read_text(encoding="utf-8"))
        schedule = shipped.get("beta_schedule", "linear")
    if schedule != "linear":
        yield (
            f"model {name!r} draws with beta_schedule {schedule!r}: PIA was trained on 'linear', and others flicker; "
            "leave model.scheduler.settings.beta_schedule out, and name a scheduler other than `checkpoint`"
        )


def _about_gifs(survey: Survey) -> Iterator[str]:
    for fps, count in sorted(survey.gif_fps.items()):
        delay = Fraction(100) / Fraction(fps).limit_denominator(1001)
        if delay.denominator > 1 and 1 / delay > _MAX_UNEVEN:
            shorter = 10 * math.floor(delay)
            yield (
                f"{count} GIFs have {fps:g} fps, which GIF cannot hold: its delays are multiples of 10 ms, so frames "
                f"show for {shorter} or {shorter + 10} ms; 10, 12.5, 20, 25 and 50 fps are even"
            )


def _about_defaults(config: RunConfig, survey: Survey) -> Iterator[str]:
    for name in sorted(config.defaults.model_fields_set & Defaults.model_fields.keys()):
        value = getattr(config.defaults, name)
        shipped = config.model.base == EMBEDDED and tiny.defaults()["defaults"].get(name) == value
        if survey.num_rows and survey.num_given[name] == survey.num_rows and not shipped:
            yield f"defaults.{name} decides nothing: every row has its own value in column '{name}'; leave one out"


def _about_room(place: PlacementConfig) -> Iterator[str]:
    if place.num_gpus or place.address != "local":  # `doctor` asks torch, or that cluster
        return
    short = shortage(place, [Node(cpus_here())])
    if short is not None:
        yield f"a Ray on this machine has {cpus_here()} CPUs: {short}"
