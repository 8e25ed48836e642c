"""Warnings about a run before it starts: allowed settings that may not be intended. Each warning names a remedy."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from fractions import Fraction

from pia_batch.config import EMBEDDED, Defaults, ModelConfig, PlacementConfig, RunConfig
from pia_batch.config.layers import embedded
from pia_batch.errors import ConfigError, StorageError
from pia_batch.manifest.tokens import MAX_TOKENS
from pia_batch.planning.capacity import Node, find_shortage, local_cpus
from pia_batch.planning.statistics import Statistics
from pia_batch.planning.words import key_of
from pia_batch.weights.resolve import resolve

SIDES_PX = (384, 768)
"""Side lengths between which Stable Diffusion 1.5, trained at 512 x 512 pixels, gives the expected quality."""

_TINY_PX = 64
"""Side length at which the embedded model was trained."""

HELD_BYTES = 2 * 2**30
"""Bytes of the frames of one batch in an engine's host memory, above which the plan warns."""

_MAX_UNEVEN = 0.1
"""Largest ratio of GIF's time unit, 10 ms, to a frame delay that is not a multiple of it, without a warning."""


def warnings_of(config: RunConfig, statistics: Statistics) -> list[str]:
    """Return the warnings about this run; empty if there are none.

    Args:
        config: The run's config.
        statistics: Statistics of the manifest.
    """
    models = {name: config.all_models[name] for name in dict.fromkeys(statistics.work["model"].to_pylist())}
    return [
        *_about_seeds(statistics),
        *_about_sizes(statistics, models),
        *_about_prompts(statistics),
        *(text for name, model in models.items() for text in _about_scheduler(name, model)),
        *(text for name, model in models.items() for text in _about_weights(name, model, statistics)),
        *_about_gifs(statistics),
        *_about_defaults(config, statistics),
        *_about_capacity(config.placement),
        *_about_memory(config.placement, statistics),
        *_about_upscaling(statistics),
    ]


def _about_seeds(statistics: Statistics) -> Iterator[str]:
    is_given = statistics.num_given["seed"] > 0  # else they are copies of one request, whose id decides the seed
    if is_given and statistics.only_seed is not None and statistics.num_pending > 1:
        yield (
            f"all {statistics.num_pending} pending requests have the seed {statistics.only_seed}: they start from the "
            "same noise, so an artefact of one may appear in many; leave column 'seed' empty to give each its own seed"
        )


def _about_sizes(statistics: Statistics, models: dict[str, ModelConfig]) -> Iterator[str]:
    odd, unusual, shrunk = 0, 0, 0
    for row in statistics.work.to_pylist():
        sides = [row["long_side"]] if row["width"] is None else [row["width"], row["height"]]
        if models[row["model"]].base == EMBEDDED:
            shrunk += row["num_rows"] * (set(sides) != {_TINY_PX})
            continue
        odd += row["num_rows"] * any(side % 64 for side in sides)
        unusual += row["num_rows"] * (min(sides) < SIDES_PX[0] or max(sides) > SIDES_PX[1])
    if odd:
        yield (
            f"{odd} requests have a side that is not a multiple of 64: the VAE and the UNet halve an image six times "
            "in all, and round other sides; use multiples of 64, as `size: auto` does"
        )
    if unusual:
        yield (
            f"{unusual} requests have a side outside of {SIDES_PX[0]} to {SIDES_PX[1]} px: Stable Diffusion 1.5 was "
            "trained at 512 x 512; quality drops below this range, and objects repeat above it; generate near 512 px "
            "and scale afterwards"
        )
    if shrunk:
        yield (
            f"{shrunk} requests are not {_TINY_PX} x {_TINY_PX}, the only size of the embedded model; set "
            f"defaults.width and defaults.height to {_TINY_PX}, or model.base to a real model"
        )


def _about_prompts(statistics: Statistics) -> Iterator[str]:
    if statistics.num_truncated:
        yield (
            f"at least {statistics.num_truncated} prompts have more than {MAX_TOKENS} tokens, and the model ignores "
            "their end: put what matters first (`prompt_truncated` marks these results)"
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
            f"model {name!r} uses beta_schedule {schedule!r}: PIA was trained with 'linear', and others flicker; "
            "remove model.scheduler.settings.beta_schedule, and use a scheduler other than `checkpoint`"
        )


def _about_weights(name: str, model: ModelConfig, statistics: Statistics) -> Iterator[str]:
    if model == ModelConfig(name=model.name):
        return
    with contextlib.suppress(ConfigError, StorageError):  # the plan itself reports what cannot be found
        found = resolve(model)
        yield from found.notices
        for word in found.words:
            if not statistics.num_using[key_of(name, word)]:
                yield (
                    f"the textual inversion {word!r} of model {name!r} has no effect: no prompt and no negative prompt "
                    "of the manifest has this word; write it there or in defaults.negative_prompt, or remove it"
                )


def _about_gifs(statistics: Statistics) -> Iterator[str]:
    for fps, count in sorted(statistics.gif_fps.items()):
        delay = Fraction(100) / Fraction(fps).limit_denominator(1001)
        if delay.denominator > 1 and 1 / delay > _MAX_UNEVEN:
            shorter = 10 * math.floor(delay)
            yield (
                f"{count} GIFs have {fps:g} fps, which GIF cannot store: its delays are multiples of 10 ms, so frames "
                f"are shown for {shorter} or {shorter + 10} ms; use 10, 12.5, 20, 25 or 50 fps for equal delays"
            )


def _about_defaults(config: RunConfig, statistics: Statistics) -> Iterator[str]:
    for name in sorted(config.defaults.model_fields_set & Defaults.model_fields.keys()):
        value = getattr(config.defaults, name)
        shipped = config.model.base == EMBEDDED and embedded()["defaults"].get(name) == value
        if statistics.num_rows and statistics.num_given[name] == statistics.num_rows and not shipped:
            yield f"defaults.{name} has no effect: every row has its own value in column '{name}'; remove one of them"


def _about_memory(place: PlacementConfig, statistics: Statistics) -> Iterator[str]:
    """Warn if a batch of the longest clips holds many bytes of frames."""
    sizes = []
    for row in statistics.work.to_pylist():
        area = row["long_side"] ** 2 if row["width"] is None else row["width"] * row["height"]
        sizes += [3 * row["num_frames"] * area] * min(place.batch_size, row["num_rows"])
    held = sum(sorted(sizes)[-place.batch_size :])
    if place.batch_size > 1 and held > HELD_BYTES:
        yield (
            f"a batch of the longest clips holds {held / 2**30:.1f} GiB of frames in host memory (width x height x "
            f"num_frames x 3 bytes, placement.batch_size {place.batch_size}); set placement.batch_size to "
            f"{max(1, HELD_BYTES // max(sizes))}"
        )


def _about_upscaling(statistics: Statistics) -> Iterator[str]:
    enlarged = sum(row["num_rows"] for row in statistics.work.to_pylist() if row["upscale"] > 1)
    if enlarged:
        yield (
            f"{enlarged} requests are enlarged by upscale.model, whose time is not in the estimates: generate a few of "
            "them with budget.limit, and compare finish_seconds with gpu_seconds in their results"
        )


def _about_capacity(place: PlacementConfig) -> Iterator[str]:
    if place.num_gpus or place.address != "local":  # `doctor` asks torch, or that cluster, instead
        return
    short = find_shortage(place, [Node(local_cpus())])
    if short is not None:
        yield f"Ray on this machine has {local_cpus()} CPUs: {short}"
