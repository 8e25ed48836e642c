"""Effective requests: every null of a column of settings replaced by the config's default.

A setting that decides nothing in a row becomes null there, so that changing it changes no content key.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import MOTIONS, Defaults, RunConfig, contexts
from pia_batch.config.arithmetic import NEGATIVE_PROMPT
from pia_batch.config.model_limits import Limits, ModelLimits
from pia_batch.manifest import key_prompts, lora_scales
from pia_batch.manifest.casting import Columns
from pia_batch.schema.columns import SETTINGS
from pia_batch.schema.declaration import Setting
from pia_batch.schema.keys import digest
from pia_batch.schema.settings import BY_NAME, MAX_SEED, ROW_SETTINGS


def hashes_of(request_ids: pa.Array) -> npt.NDArray[np.uint64]:
    """Return 64 bits of each id's hash: equal ids have equal hashes; shape (n,)."""
    return np.frombuffer(digest(request_ids).tobytes(), dtype=">u8")[::2].astype(np.uint64)


def seeds_of(id_hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return the seed of each request that has none of its own, by the hash of its id; shape (n,)."""
    return (id_hashes & np.uint64(MAX_SEED)).astype(np.int64)


def motion(columns: Columns, defaults: Defaults) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Return `motion_scale` as a number, before `loop` and `style` change it, then these two, with their defaults."""
    size = defaults.motion_scale if defaults.motion is None else MOTIONS.index(defaults.motion)
    scale = pc.coalesce(pc.index_in(columns.typed["motion"], pa.array(MOTIONS)), columns.typed["motion_scale"])
    return (
        pc.fill_null(scale, size),
        pc.fill_null(columns.typed["loop"], defaults.loop),
        pc.fill_null(columns.typed["style"], defaults.style),
    )


def negative_prompts(columns: Columns, defaults: Defaults) -> pa.Array:
    """Return `negative_prompts` with their default, which holds in rows without any negative prompt of their own."""
    own = columns.typed["negative_prompts"]
    if defaults.negative_prompts is None:
        return own
    by_default = pa.scalar([key._asdict() for key in defaults.negative_prompts], own.type)
    return pc.coalesce(own, pc.if_else(pc.is_null(columns.typed["negative_prompt"]), by_default, None))


def is_auto(columns: Columns, defaults: Defaults) -> pa.Array:
    """Return the rows that take their size from the image: by their own `size`, or by default if they give no size."""
    own = pc.or_(pc.is_valid(columns.typed["width"]), pc.is_valid(columns.typed["height"]))
    by_default = pc.invert(own) if defaults.size == "auto" else pa.repeat(False, columns.num_rows)
    return pc.coalesce(pc.equal(columns.typed["size"], "auto"), by_default)


def is_original(columns: Columns, config: RunConfig) -> pa.Array:
    """Return the rows whose model has the arithmetic of PIA's authors."""
    names = sorted(config.original_models)
    model = pc.fill_null(columns.typed["model"], config.model.name)
    return pc.is_in(model, value_set=pa.array(names, pa.string()))


def positions(columns: Columns, config: RunConfig, limits: Limits) -> pa.Array | pa.Scalar:
    """Return the number of frames that the motion modules of each row's model know; a scalar if all know as many."""
    names = list(config.all_models)
    known = pa.array([limits.get(name, ModelLimits()).positions for name in names], pa.int64())
    if len(known.unique()) == 1:
        return known[0]
    model = pc.fill_null(columns.typed["model"], config.model.name)
    return pc.fill_null(known.take(pc.index_in(model, pa.array(names))), contexts.POSITIONS)


def context(columns: Columns, config: RunConfig, limits: Limits) -> tuple[pa.Array, pa.Array]:
    """Return the method that generates each clip, null for a single call, and its `context_length`."""
    defaults = config.defaults
    frames, length = (
        pc.fill_null(columns.typed[name], getattr(defaults, name)) for name in ("num_frames", "context_length")
    )
    asked = columns.typed["context"]
    if defaults.context is not None:
        asked = pc.fill_null(asked, defaults.context)
    longest = pc.if_else(pc.is_null(asked), positions(columns, config, limits), length)
    return pc.if_else(pc.greater(frames, longest), pc.fill_null(asked, "windows"), None), length


def fill(
    columns: Columns, config: RunConfig, id_hashes: npt.NDArray[np.uint64], limits: Limits
) -> dict[str, pa.Scalar]:
    """Make every setting effective, in place.

    Args:
        columns: Valid rows.
        config: Source of the defaults.
        id_hashes: `hashes_of` the rows' ids.
        limits: Limits of the models, by their names.

    Returns:
        Settings that are the same in all rows because no column that decides them is given, by name. They make the
        content keys of large manifests cheap.
    """
    defaults, typed = config.defaults, columns.typed
    given = {name for name, column in typed.items() if column.null_count < columns.num_rows}
    scale, loop, style = motion(columns, defaults)
    auto = is_auto(columns, defaults)
    method, _ = context(columns, config, limits)
    no_motion = pc.and_(pc.is_null(typed["motion"]), pc.is_null(typed["motion_scale"]))

    typed["negative_prompts"] = negative_prompts(columns, defaults)
    for name in SETTINGS.names:
        default = getattr(defaults, name, None)
        if default is not None and name not in ("motion_curve", "negative_prompts", lora_scales.NAME):
            typed[name] = pc.fill_null(typed[name], default)
    if defaults.motion_curve is not None:  # a row's own motion, in whatever form, overrides the curve of the config
        curve = pa.array([list(defaults.motion_curve)] * columns.num_rows, SETTINGS.field("motion_curve").type)
        typed["motion_curve"] = pc.coalesce(typed["motion_curve"], pc.if_else(no_motion, curve, None))
    if typed["seed"].null_count:
        typed["seed"] = pc.coalesce(typed["seed"], pa.array(seeds_of(id_hashes)))
    typed["image_sha256"] = pc.utf8_lower(typed["image_sha256"])
    typed["model"] = pc.fill_null(typed["model"], config.model.name)
    typed[lora_scales.NAME] = lora_scales.fill(typed[lora_scales.NAME], typed["model"], config)
    original = is_original(columns, config)
    typed["upscale"] = pc.fill_null(typed["upscale"], config.upscale.scale or 1)
    if defaults.negative_prompt is None:
        by_model = pc.if_else(original, NEGATIVE_PROMPT["original"], NEGATIVE_PROMPT["diffusers"])
        typed["negative_prompt"] = pc.coalesce(typed["negative_prompt"], by_model)

    _split_prompts(columns)
    size = _modulo_3(scale)
    typed["loop"] = pc.and_(loop, pc.is_null(typed["motion_curve"]))
    # The styles 6 to 8 are large to small in the original, small to large in diffusers; a word has one meaning.
    named = pc.if_else(pc.and_(original, pc.less(scale, 6)), pc.subtract(8, size), pc.add(size, 6))
    restyled = pc.if_else(style, named, scale)
    typed["motion_scale"] = pc.if_else(typed["loop"], pc.add(size, 3), restyled)
    typed["size"] = pc.if_else(auto, "auto", "fixed")
    _clear(columns, "width", pc.invert(auto))
    _clear(columns, "height", pc.invert(auto))
    typed["context"] = method
    _clear(columns, "context_length", pc.is_valid(method))
    _clear(columns, "context_overlap", pc.fill_null(pc.equal(method, "windows"), False))
    _clear(columns, "context_stride", pc.fill_null(pc.equal(method, "freenoise"), False))
    adapted = [name for name, model in config.all_models.items() if model.ip_adapter is not None]
    _clear(columns, "ip_adapter_scale", pc.is_in(typed["model"], value_set=pa.array(adapted, pa.string())))
    for setting in ROW_SETTINGS:
        if setting.needs:
            _clear(columns, setting.name, _is_used(columns, BY_NAME[setting.needs]))
        if setting.formats:
            _clear(columns, setting.name, pc.is_in(typed["format"], value_set=pa.array(setting.formats)))
    return {name: typed[name][0] for name in _common(given)} if columns.num_rows else {}


def _split_prompts(columns: Columns) -> None:
    """Leave in each row either one text or key prompts; a single key prompt is that text, and has its content key."""
    typed = columns.typed
    for text, keys in (("prompt", "prompts"), ("negative_prompt", "negative_prompts")):
        if typed[keys].null_count < columns.num_rows:
            single, travelling = key_prompts.split_single(typed[keys])
            typed[text] = pc.if_else(pc.is_null(typed[keys]), typed[text], single)
            typed[keys] = travelling
    travels = pc.or_(pc.is_valid(typed["prompts"]), pc.is_valid(typed["negative_prompts"]))
    _clear(columns, "prompt_interpolation", travels)
    _clear(
        columns, "prompt_hold", pc.and_(travels, pc.not_equal(pc.fill_null(typed["prompt_interpolation"], ""), "hold"))
    )


def _clear(columns: Columns, name: str, used: pa.Array) -> None:
    """Set a column to null except in the rows of `used`."""
    columns.typed[name] = pc.if_else(used, columns.typed[name], None)


def _is_used(columns: Columns, setting: Setting) -> pa.Array:
    """Return the rows in which a setting has a value other than its neutral one."""
    return pc.not_equal(columns.typed[setting.name], pa.scalar(setting.neutral, setting.data_type))


def _common(given: set[str]) -> set[str]:
    """Return the settings whose value cannot differ between rows if only the columns `given` have values."""
    found = set()
    for setting in ROW_SETTINGS:
        deciding = {setting.name} | _DECIDED_BY.get(setting.name, frozenset())
        if setting.needs:
            deciding |= {setting.needs} | _DECIDED_BY.get(setting.needs, frozenset())
        if setting.formats:
            deciding.add("format")
        if setting.name != "seed" and not given & deciding:
            found.add(setting.name)
    return found


_DECIDED_BY: dict[str, frozenset[str]] = {
    "lora_scales": frozenset({"model"}),
    "negative_prompt": frozenset({"negative_prompts", "model"}),
    "negative_prompts": frozenset({"negative_prompt"}),
    "prompt_interpolation": frozenset({"prompts", "negative_prompt", "negative_prompts"}),
    "prompt_hold": frozenset({"prompts", "negative_prompt", "negative_prompts", "prompt_interpolation"}),
    "motion_scale": frozenset({"motion", "style", "loop", "motion_curve", "model"}),
    "loop": frozenset({"motion_curve"}),
    "motion_curve": frozenset({"motion", "motion_scale"}),
    "size": frozenset({"width", "height"}),
    "width": frozenset({"size", "height"}),
    "height": frozenset({"size", "width"}),
    "ip_adapter_scale": frozenset({"model"}),
    "context": frozenset({"num_frames", "context_length", "model"}),
    "context_length": frozenset({"num_frames", "context", "model"}),
    "context_overlap": frozenset({"num_frames", "context", "context_length", "model"}),
    "context_stride": frozenset({"num_frames", "context", "context_length", "model"}),
}
"""Other columns that a setting's effective value depends on, beyond what its declaration says."""


def _modulo_3(scale: pa.Array) -> pa.Array:
    """Return 0, 1 or 2 for small, medium or large motion, from a motion scale of any kind."""
    return pc.subtract(scale, pc.multiply(pc.divide(scale, 3), 3))
