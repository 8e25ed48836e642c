"""The judgement of manifest rows: effective requests with their keys, or the reason why not.

Everything here works on whole Arrow columns; the one loop per row is the hash of its key. A request that cannot be
animated is not an exception but a row of `Checked.rejected`, with a kind, the column, the value and what is allowed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import FORMATS, FREE_INIT_METHODS, MAX_FPS, MOTIONS, SIZES, Defaults, RunConfig
from pia_batch.manifest.casting import MAX_SEED, Columns, Range, Rejections
from pia_batch.schema.columns import EFFECTIVE, SETTINGS, carried_columns
from pia_batch.schema.keys import Keys, digest, json_digest, keys_to_hex, text_bytes

MAX_ID_BYTES = 512
MAX_PROMPT_BYTES = 8192
MAX_URI_BYTES = 4096


@dataclass(frozen=True)
class Checked:
    """What `check` found in a table."""

    requests: pa.Table
    """The good rows: EFFECTIVE with every default filled in, then `key`, then the carried columns."""
    rows: npt.NDArray[np.int64]
    """Their row numbers in the table."""
    keys: Keys
    id_hashes: npt.NDArray[np.uint64]
    """`hashes_of` their request ids."""
    rejected: pa.Table
    """`row` (int64), `error_kind`, `error`: one line for every bad row."""


def check(table: pa.Table, config: RunConfig, engine_ids: Mapping[str, str]) -> Checked:
    """Split rows into effective requests and rejected ones, without a Python loop per row.

    Args:
        table: rows of a manifest, of any types that `manifest.Manifest.batches` gives.
        config: gives the defaults, and what else decides an animation.
        engine_ids: the identity of the engine of each model, by the name of `config.all_models`.
    """
    table = table.combine_chunks()
    rejections = Rejections(len(table))
    columns = _Columns(table, rejections)
    columns.check_identity()
    columns.check_image()
    columns.check_settings(config.defaults)
    columns.check_choices(config)
    columns.check_motion(config.defaults)
    columns.check_together(config)
    good = np.flatnonzero(~rejections.bad)
    carried = carried_columns(table)
    if len(good) < len(table):
        carried = carried.take(good)
        columns.take(good)
    constants = columns.fill(config)
    effective = {name: columns.typed[name] for name in EFFECTIVE.names}
    keys = _content_keys(effective | constants, config, engine_ids)
    requests = pa.table(effective | {"key": keys_to_hex(keys)})
    for name in carried.column_names:
        requests = requests.append_column(carried.schema.field(name), carried[name])
    return Checked(requests, good, keys, columns.id_hashes, rejections.table())


def hashes_of(request_ids: pa.Array) -> npt.NDArray[np.uint64]:
    """64 bits of each id's hash: equal ids have equal hashes; shape (n,)."""
    return np.frombuffer(digest(request_ids).tobytes(), dtype=">u8")[::2].astype(np.uint64)


def seeds_of(id_hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """The seed of each request that has none of its own, by the hash of its id; shape (n,)."""
    return (id_hashes & np.uint64(MAX_SEED)).astype(np.int64)


class _Columns(Columns):
    """The checks of each column and of several together, and the defaults."""

    id_hashes: npt.NDArray[np.uint64]
    """`hashes_of` the request ids; `fill` makes them."""

    def check_identity(self) -> None:
        """`request_id` and `prompt`: there, printable, not too long."""
        ids, prompts = self.typed["request_id"], self.typed["prompt"]
        self.require("request_id", pc.is_null(ids), f"a string of 1 to {MAX_ID_BYTES} bytes")
        length = pc.binary_length(ids)
        bad = pc.or_kleene(pc.less(length, 1), pc.greater(length, MAX_ID_BYTES))
        self.reject("request_id", bad, "invalid_id", f"1 to {MAX_ID_BYTES} bytes of UTF-8")
        text = text_bytes(ids)
        if ((text < ord(" ")) | (text > ord("~"))).any():  # to ask each value is slow, and most ids are plain
            control = pc.match_substring_regex(ids, r"\p{Cc}")
            self.reject("request_id", control, "invalid_id", "a string without control characters")
        blank = pc.or_kleene(pc.is_null(prompts), pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(prompts)), 0))
        self.require("prompt", blank, "a text that is not empty")
        for name in ("prompt", "negative_prompt"):
            long = pc.greater(pc.binary_length(self.typed[name]), MAX_PROMPT_BYTES)
            self.reject(name, long, "out_of_range", f"at most {MAX_PROMPT_BYTES} bytes")

    def check_image(self) -> None:
        """One source of the image, and a sha256 that can be one."""
        uris, data, sha256 = (self.typed[name] for name in ("image", "image_bytes", "image_sha256"))
        no_uri = pc.or_kleene(pc.is_null(uris), pc.equal(pc.binary_length(uris), 0))
        no_data = pc.or_kleene(pc.is_null(data), pc.equal(pc.binary_length(data), 0))
        self.require("image", pc.and_(no_uri, no_data), "a URI, or `image_bytes` with the encoded image")
        both = pc.and_(pc.invert(no_uri), pc.invert(no_data))
        self.reject("image", both, "invalid_value", "either `image` or `image_bytes`, not both")
        long = pc.greater(pc.binary_length(uris), MAX_URI_BYTES)
        self.reject("image", long, "out_of_range", f"a URI of at most {MAX_URI_BYTES} bytes")
        not_hex = pc.invert(pc.match_substring_regex(sha256, "^[0-9a-fA-F]{64}$"))
        self.reject("image_sha256", not_hex, "invalid_value", "64 hexadecimal digits, or null")
        prompts = self.typed["ip_adapter_image"]
        bad = pc.or_kleene(pc.less(pc.binary_length(prompts), 1), pc.greater(pc.binary_length(prompts), MAX_URI_BYTES))
        self.reject("ip_adapter_image", bad, "out_of_range", f"a URI of at most {MAX_URI_BYTES} bytes, or null")

    def check_settings(self, defaults: Defaults) -> None:
        """Every number inside its range."""
        for name in SETTINGS.names:
            if pa.types.is_integer(SETTINGS.field(name).type) or pa.types.is_floating(SETTINGS.field(name).type):
                self._check_range(name)
        self._check_curves(defaults)

    def _check_curves(self, defaults: Defaults) -> None:
        curves = self.typed["motion_curve"]
        if curves.null_count == self.num_rows:
            return
        length = pc.list_value_length(curves)
        frames = pc.fill_null(self.typed["num_frames"], defaults.num_frames)
        bad = pc.or_kleene(pc.less(length, 1), pc.greater(length, frames))
        self.reject("motion_curve", bad, "out_of_range", "1 to num_frames numbers, or null")
        # NaN compares false, so what is asked is whether a value is inside.
        values = pc.list_flatten(curves)
        inside = pc.fill_null(pc.and_kleene(pc.greater_equal(values, 0), pc.less_equal(values, 1)), False)
        rows = np.repeat(np.arange(self.num_rows), pc.fill_null(length, 0))
        outside = np.zeros(self.num_rows, dtype=bool)
        outside[rows[~inside.to_numpy(zero_copy_only=False)]] = True
        self.reject("motion_curve", pa.array(outside), "out_of_range", "numbers from 0 to 1")

    def check_choices(self, config: RunConfig) -> None:
        """Names out of a list."""
        choices: dict[str, tuple[str, ...]] = {
            "motion": MOTIONS,
            "size": SIZES,
            "free_init_method": FREE_INIT_METHODS,
            "format": FORMATS,
            "model": tuple(config.all_models),
        }
        for name, allowed in choices.items():
            if self.typed[name].null_count == self.num_rows:
                continue
            unknown = pc.invert(pc.is_in(self.typed[name], value_set=pa.array(allowed), skip_nulls=False))
            wrong = pc.and_(unknown, pc.is_valid(self.typed[name]))
            self.reject(name, wrong, "invalid_value", ", ".join(allowed) + ", or null for the default")
        adapted = pa.array([name for name, model in config.all_models.items() if model.ip_adapter], pa.string())
        without = pc.invert(pc.is_in(pc.fill_null(self.typed["model"], config.model.name), value_set=adapted))
        unsupported = pc.and_(without, pc.is_valid(self.typed["ip_adapter_image"]))
        self.reject("ip_adapter_image", unsupported, "unsupported", "null; the model has no `ip_adapter` in the config")

    def check_motion(self, defaults: Defaults) -> None:
        """The words for motion: not two for one row, and none that the other forbids."""
        word, scale = self.typed["motion"], self.typed["motion_scale"]
        twice = pc.and_(pc.is_valid(word), pc.is_valid(scale))
        self.reject("motion", twice, "invalid_value", "either `motion` or `motion_scale`, not both")
        scale, loop, style = self._motion(defaults)
        self.reject("style", pc.and_(loop, style), "invalid_value", "either `loop` or `style`, not both")
        restyled_loop = pc.and_(style, pc.is_in(scale, value_set=pa.array([3, 4, 5])))
        self.reject("style", restyled_loop, "invalid_value", "true only with a motion_scale of 0-2 or 6-8")
        looped_style = pc.and_(loop, pc.greater(scale, 5))
        self.reject("loop", looped_style, "invalid_value", "true only with a motion_scale of 0-5")

    def _motion(self, defaults: Defaults) -> tuple[pa.Array, pa.Array, pa.Array]:
        """`motion_scale` as a number, before `loop` and `style` change it, and these two, with their defaults."""
        size = defaults.motion_scale if defaults.motion is None else MOTIONS.index(defaults.motion)
        scale = pc.coalesce(pc.index_in(self.typed["motion"], pa.array(MOTIONS)), self.typed["motion_scale"])
        scale = pc.fill_null(scale, size)
        return (
            scale,
            pc.fill_null(self.typed["loop"], defaults.loop),
            pc.fill_null(self.typed["style"], defaults.style),
        )

    def _is_auto(self, defaults: Defaults) -> pa.Array:
        """Which rows take their size from the image: those that say so, or by default those that give no size."""
        own = pc.or_(pc.is_valid(self.typed["width"]), pc.is_valid(self.typed["height"]))
        by_default = pc.invert(own) if defaults.size == "auto" else pa.repeat(False, self.num_rows)
        return pc.coalesce(pc.equal(self.typed["size"], "auto"), by_default)

    def check_together(self, config: RunConfig) -> None:
        """Settings that are fine alone but not with each other."""
        defaults = config.defaults
        auto = self._is_auto(defaults)
        for name in ("width", "height"):
            both = pc.and_(auto, pc.is_valid(self.typed[name]))
            self.reject(name, both, "invalid_value", "null where `size` is auto")
        get = {name: pc.fill_null(self.typed[name], getattr(defaults, name)) for name in _FILLED}
        drawn = pc.floor(pc.multiply(get["strength"], pc.cast(get["num_inference_steps"], pa.float64(), safe=False)))
        self.reject("strength", pc.less(drawn, 1), "out_of_range", "num_inference_steps x strength of at least 1")
        for fmt, max_fps in MAX_FPS.items():
            too_fast = pc.and_(pc.equal(get["format"], fmt), pc.greater(get["fps"], max_fps))
            self.reject("fps", too_fast, "out_of_range", f"at most {max_fps} where `format` is {fmt}")
        self.reject(
            "cond_frame", pc.greater_equal(get["cond_frame"], get["num_frames"]), "out_of_range", "below num_frames"
        )
        partial = pc.and_(pc.greater(get["free_init_iters"], 0), pc.less(get["strength"], 1))
        self.reject("free_init_iters", partial, "invalid_value", "0 where strength is below 1")
        width, height = (pc.if_else(auto, get["long_side"], get[name]) for name in ("width", "height"))
        area = pc.multiply(pc.multiply(width, height), get["num_frames"])
        cap = config.limits.max_frame_pixels
        large = pc.greater(area, cap)
        self.reject("width", large, "out_of_range", f"width x height x num_frames up to {cap} (limits)")

    def fill(self, config: RunConfig) -> dict[str, pa.Scalar]:
        """Make every setting effective; returns those that are the same for all rows, for the sake of speed.

        What decides nothing for a row is null there, so that to change it makes no finished request due: `long_side`
        without `size: auto`, FreeInit's filter without FreeInit, the scale of an IP-Adapter that the model has not.
        """
        defaults = config.defaults
        self.num_rows = len(self.typed["request_id"])
        self.id_hashes = hashes_of(self.typed["request_id"])
        given = {name for name in self.typed if self.typed[name].null_count < self.num_rows}
        scale, loop, style = self._motion(defaults)
        auto = self._is_auto(defaults)
        words = pc.and_(pc.is_null(self.typed["motion"]), pc.is_null(self.typed["motion_scale"]))

        for name in SETTINGS.names:
            default = getattr(defaults, name, None)
            if default is not None and name != "motion_curve":
                self.typed[name] = pc.fill_null(self.typed[name], default)
        if defaults.motion_curve is not None:  # a row's own motion, in whatever words, beats the curve of the config
            curve = pa.array([list(defaults.motion_curve)] * self.num_rows, SETTINGS.field("motion_curve").type)
            self.typed["motion_curve"] = pc.coalesce(self.typed["motion_curve"], pc.if_else(words, curve, None))
        if self.typed["seed"].null_count:
            self.typed["seed"] = pc.coalesce(self.typed["seed"], pa.array(seeds_of(self.id_hashes)))
        self.typed["image_sha256"] = pc.utf8_lower(self.typed["image_sha256"])
        self.typed["model"] = pc.fill_null(self.typed["model"], config.model.name)

        size = _modulo_3(scale)
        self.typed["loop"] = pc.and_(loop, pc.is_null(self.typed["motion_curve"]))
        restyled = pc.if_else(style, pc.add(size, 6), scale)
        self.typed["motion_scale"] = pc.if_else(self.typed["loop"], pc.add(size, 3), restyled)
        self.typed["size"] = pc.if_else(auto, "auto", "fixed")
        self._keep("long_side", auto)
        self._keep("width", pc.invert(auto))
        self._keep("height", pc.invert(auto))
        repeated = pc.greater(self.typed["free_init_iters"], 0)
        for name in ("method", "order", "spatial_stop", "temporal_stop", "fast"):
            self._keep(f"free_init_{name}", repeated)
        adapted = [name for name, model in config.all_models.items() if model.ip_adapter is not None]
        self._keep("ip_adapter_scale", pc.is_in(self.typed["model"], value_set=pa.array(adapted, pa.string())))
        return self._constants(given)

    def _keep(self, name: str, where: pa.Array) -> None:
        self.typed[name] = pc.if_else(where, self.typed[name], None)

    def _constants(self, given: set[str]) -> dict[str, pa.Scalar]:
        """What all rows have in common because none of the columns that decide it is given."""
        decided_by = dict.fromkeys(SETTINGS.names, frozenset[str]()) | {
            "motion_scale": frozenset({"motion", "style", "loop", "motion_curve"}),
            "loop": frozenset({"motion_curve"}),
            "motion_curve": frozenset({"motion", "motion_scale"}),
            "size": frozenset({"width", "height"}),
            "long_side": frozenset({"size", "width", "height"}),
            "width": frozenset({"size", "height"}),
            "height": frozenset({"size", "width"}),
            "ip_adapter_scale": frozenset({"model"}),
        }
        decided_by |= {name: frozenset({"free_init_iters"}) for name in SETTINGS.names if name.startswith("free_init_")}
        common = {name for name, others in decided_by.items() if name != "seed" and not given & {name, *others}}
        return {name: self.typed[name][0] for name in common} if self.num_rows else {}

    def _check_range(self, name: str) -> None:
        values = self.typed[name]
        if values.null_count == len(values):
            return
        allowed = Range.of(name)
        if pa.types.is_floating(values.type):
            self.reject(name, pc.invert(pc.is_finite(values)), "not_finite", str(allowed))
        bad = pc.greater(values, allowed.maximum)
        below = pc.less_equal if allowed.open_below else pc.less
        bad = pc.or_kleene(bad, below(values, allowed.minimum))
        if allowed.multiple_of > 1:
            multiple = pc.multiply(pc.divide(values, allowed.multiple_of), allowed.multiple_of)
            bad = pc.or_kleene(bad, pc.not_equal(multiple, values))
        self.reject(name, bad, "out_of_range", str(allowed))


_FILLED = (
    "strength", "num_inference_steps", "format", "fps", "width", "height", "long_side", "num_frames", "cond_frame",
    "free_init_iters",
)  # fmt: skip


def _content_keys(effective: dict[str, pa.Array | pa.Scalar], config: RunConfig, engine_ids: Mapping[str, str]) -> Keys:
    uris, data, sha256 = effective["image"], effective["image_bytes"], effective["image_sha256"]
    if data.null_count < len(data):
        sha256 = pc.coalesce(sha256, _sha256_hex(data))
    by_hash = pc.binary_join_element_wise("sha256:", sha256, "")
    by_uri = pc.binary_join_element_wise("uri:", uris, "")
    file_format = effective["format"]
    if isinstance(file_format, pa.Scalar):
        encoder = pa.scalar(config.encoding.identity(file_format.as_py()))
    else:
        identities = pa.array([config.encoding.identity(name) for name in FORMATS])
        encoder = identities.take(pc.index_in(file_format, value_set=pa.array(FORMATS)))
    described: dict[str, pa.Array | pa.Scalar] = {name: effective[name] for name in SETTINGS.names}
    described |= {
        "request_id": effective["request_id"],
        "prompt": effective["prompt"],
        "image": pc.coalesce(by_hash, by_uri),
        "fit": pa.scalar(f"{config.images.fit} {config.images.background.lower()}"),
        "encoder": encoder,
        "ip_adapter_image": effective["ip_adapter_image"],
        "engine_id": _by_name(effective["model"], engine_ids),
    }
    return json_digest(described)


def _by_name(names: pa.Array, values: Mapping[str, str]) -> pa.Array | pa.Scalar:
    """The value of each name; one scalar where there is only one."""
    if len(values) == 1:
        return pa.scalar(next(iter(values.values())))
    return pa.array(list(values.values())).take(pc.index_in(names, value_set=pa.array(list(values))))


def _modulo_3(scale: pa.Array) -> pa.Array:
    """Small, medium or large: what a motion scale of any kind has in common with 0, 1 or 2."""
    return pc.subtract(scale, pc.multiply(pc.divide(scale, 3), 3))


def _sha256_hex(data: pa.Array) -> pa.Array:
    return pa.array([hashlib.sha256(value).hexdigest() if value else None for value in data.to_pylist()], pa.string())
