"""Validation of manifest rows: effective requests with their content keys, or the reason why a row is rejected.

Everything works on whole Arrow columns; the one loop per row is the hash of its key. A request that cannot be animated
raises nothing: it becomes a row of `Checked.rejected`, with an error kind, the column, the value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.config import Defaults, RunConfig
from pia_batch.config.model_limits import NO_LIMITS, Limits, ModelLimits
from pia_batch.manifest import key_prompts, long_clips, lora_scales
from pia_batch.manifest.blocklist import blocked
from pia_batch.manifest.casting import Columns, Range, Rejections
from pia_batch.manifest.column_map import ColumnMap
from pia_batch.manifest.content_keys import content_keys, image_identity
from pia_batch.manifest.effective import fill, hashes_of, is_auto, motion, negative_prompts
from pia_batch.manifest.inline_images import NOT_INLINE, PATTERN
from pia_batch.manifest.request_ids import content_ids
from pia_batch.schema.columns import EFFECTIVE, MAX_ID_BYTES, MAX_URI_BYTES, SETTINGS, carried_columns
from pia_batch.schema.keys import Keys, keys_to_hex, text_bytes
from pia_batch.schema.settings import BY_NAME, MAX_FPS, MAX_PROMPT_BYTES


@dataclass(frozen=True)
class Checked:
    """Result of `check`."""

    requests: pa.Table
    """Valid rows: EFFECTIVE with every default filled in, then `key`, then the carried columns."""
    rows: npt.NDArray[np.int64]
    """Row numbers of `requests` in the table that was checked."""
    keys: Keys
    """Content keys of `requests`."""
    id_hashes: npt.NDArray[np.uint64]
    """`hashes_of` the request ids of `requests`."""
    rejected: pa.Table
    """`row` (int64), `error_kind`, `error`: one line for every invalid row."""


def check(table: pa.Table, config: RunConfig, engine_ids: Mapping[str, str], limits: Limits = NO_LIMITS) -> Checked:
    """Split rows into effective requests and rejected ones, without a Python loop per row.

    Args:
        table: Rows of a manifest under our names, of any types that `manifest.Manifest.batches` yields.
        config: Source of the defaults, and of everything else that decides an animation.
        engine_ids: Identity of the engine of each model, by the name in `config.all_models`.
        limits: Limits of models that their files decide, by the same names.
    """
    table = table.combine_chunks()
    rejections = Rejections(len(table))
    columns = _Columns(table, rejections, ColumnMap.of(config).label)
    if config.request_id_from != "content":
        columns.check_ids()
    columns.check_prompts(config.defaults)
    columns.check_image()
    columns.check_nul()
    columns.check_settings(config.defaults)
    columns.check_choices(config, limits)
    columns.check_motion(config.defaults)
    columns.check_together(config, limits)
    columns.check_words(config.safety.blocked_words)
    valid = np.flatnonzero(~rejections.bad)
    carried = carried_columns(table)
    if len(valid) < len(table):
        carried = carried.take(valid)
        columns.take(valid)
    images = image_identity(columns.typed)
    if config.request_id_from == "content":
        columns.typed["request_id"] = content_ids(columns.typed, images)
    id_hashes = hashes_of(columns.typed["request_id"])
    constants = fill(columns, config, id_hashes, limits)
    effective = {name: columns.typed[name] for name in EFFECTIVE.names}
    keys = content_keys(effective | constants, images, config, engine_ids)
    requests = pa.table(effective | {"key": keys_to_hex(keys)})
    for name in carried.column_names:
        requests = requests.append_column(carried.schema.field(name), carried[name])
    return Checked(requests, valid, keys, id_hashes, rejections.table())


class _Columns(Columns):
    """Checks of each column, and of several together."""

    def check_ids(self) -> None:
        """Check that `request_id` is present, printable and not too long."""
        ids = self.typed["request_id"]
        self.require("request_id", pc.is_null(ids), f"a string of 1 to {MAX_ID_BYTES} bytes")
        length = pc.binary_length(ids)
        bad = pc.or_kleene(pc.less(length, 1), pc.greater(length, MAX_ID_BYTES))
        self.reject("request_id", bad, "invalid_id", f"1 to {MAX_ID_BYTES} bytes of UTF-8")
        text = text_bytes(ids)
        if ((text < ord(" ")) | (text > ord("~"))).any():  # a regex per value is slow, and most ids are plain
            control = pc.match_substring_regex(ids, r"\p{Cc}")
            self.reject("request_id", control, "invalid_id", "a string without control characters")

    def check_prompts(self, defaults: Defaults) -> None:
        """Check that each row has one source of prompts, that they are texts, and that their frames are in order."""
        text, keys = self.typed["prompt"], self.typed["prompts"]
        blank = pc.or_kleene(pc.is_null(text), pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(text)), 0))
        without = pc.is_null(keys)
        self.require("prompt", pc.and_(blank, without), "a text that is not empty, or `prompts`")
        both = pc.invert(pc.or_(blank, without))
        self.reject("prompts", both, "invalid_value", "either `prompt` or `prompts`, not both")
        text, keys = self.typed["negative_prompt"], self.typed["negative_prompts"]
        both = pc.and_(pc.greater(pc.binary_length(text), 0), pc.is_valid(keys))
        wanted = "either `negative_prompt` or `negative_prompts`, not both"
        self.reject("negative_prompts", both, "invalid_value", wanted)
        num_frames = pc.fill_null(self.typed["num_frames"], defaults.num_frames)
        for name in key_prompts.NAMES:
            column = self.typed[name] if name == "prompts" else negative_prompts(self, defaults)
            key_prompts.check(name, column, num_frames, partial(self.reject, name))
        for name in ("prompt", "negative_prompt"):
            long = pc.greater(pc.binary_length(self.typed[name]), MAX_PROMPT_BYTES)
            self.reject(name, long, "out_of_range", f"at most {MAX_PROMPT_BYTES} bytes")

    def check_image(self) -> None:
        """Check that there is one source of the image, and that a sha256 is well-formed."""
        uris, data, sha256 = (self.typed[name] for name in ("image", "image_bytes", "image_sha256"))
        no_uri = pc.or_kleene(pc.is_null(uris), pc.equal(pc.binary_length(uris), 0))
        no_data = pc.or_kleene(pc.is_null(data), pc.equal(pc.binary_length(data), 0))
        self.require("image", pc.and_(no_uri, no_data), "a URI, or `image_bytes` with the encoded image")
        both = pc.and_(pc.invert(no_uri), pc.invert(no_data))
        self.reject("image", both, "invalid_value", "either `image` or `image_bytes`, not both")
        for name in ("image", "ip_adapter_image"):
            inline = pc.match_substring_regex(self.typed[name], PATTERN)
            self.reject(name, inline, "invalid_value", NOT_INLINE[name])
        long = pc.greater(pc.binary_length(uris), MAX_URI_BYTES)
        self.reject("image", long, "out_of_range", f"a URI of at most {MAX_URI_BYTES} bytes")
        not_hex = pc.invert(pc.match_substring_regex(sha256, "^[0-9a-fA-F]{64}$"))
        self.reject("image_sha256", not_hex, "invalid_value", "64 hexadecimal digits, or null")
        prompts = self.typed["ip_adapter_image"]
        bad = pc.or_kleene(pc.less(pc.binary_length(prompts), 1), pc.greater(pc.binary_length(prompts), MAX_URI_BYTES))
        self.reject("ip_adapter_image", bad, "out_of_range", f"a URI of at most {MAX_URI_BYTES} bytes, or null")

    def check_nul(self) -> None:
        """Check that URIs have no NUL, which no path can hold. Prompts may: the tokenizer takes any text."""
        for name in ("image", "ip_adapter_image"):
            nul = pc.match_substring(self.typed[name], "\0")
            self.reject(name, nul, "invalid_value", "a URI without NUL characters (U+0000); remove them")

    def check_settings(self, defaults: Defaults) -> None:
        """Check that every number is in its range."""
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
        # NaN compares false, so test for values inside the range.
        values = pc.list_flatten(curves)
        inside = pc.fill_null(pc.and_kleene(pc.greater_equal(values, 0), pc.less_equal(values, 1)), False)
        rows = np.repeat(np.arange(self.num_rows), pc.fill_null(length, 0))
        outside = np.zeros(self.num_rows, dtype=bool)
        outside[rows[~inside.to_numpy(zero_copy_only=False)]] = True
        self.reject("motion_curve", pa.array(outside), "out_of_range", "numbers from 0 to 1")

    def check_choices(self, config: RunConfig, limits: Limits) -> None:
        """Check that texts with a fixed set of values have one of them."""
        choices = {setting.name: setting.choices for setting in BY_NAME.values() if setting.choices}
        choices["model"] = tuple(config.all_models)
        for name, allowed in choices.items():
            if self.typed[name].null_count == self.num_rows:
                continue
            unknown = pc.invert(pc.is_in(self.typed[name], value_set=pa.array(allowed), skip_nulls=False))
            wrong = pc.and_(unknown, pc.is_valid(self.typed[name]))
            self.reject(name, wrong, "invalid_value", ", ".join(allowed) + ", or null for the default")
        if self.typed[lora_scales.NAME].null_count < self.num_rows:
            models = pc.fill_null(self.typed["model"], config.model.name)
            for known, rows in lora_scales.rejected(self.typed[lora_scales.NAME], models, config, limits).items():
                self.reject(lora_scales.NAME, rows, "invalid_value", known)
        adapted = pa.array([name for name, model in config.all_models.items() if model.ip_adapter], pa.string())
        without = pc.invert(pc.is_in(pc.fill_null(self.typed["model"], config.model.name), value_set=adapted))
        unsupported = pc.and_(without, pc.is_valid(self.typed["ip_adapter_image"]))
        self.reject("ip_adapter_image", unsupported, "unsupported", "null; the model has no `ip_adapter` in the config")

    def check_motion(self, defaults: Defaults) -> None:
        """Check that the settings of motion do not contradict each other."""
        word, scale = self.typed["motion"], self.typed["motion_scale"]
        twice = pc.and_(pc.is_valid(word), pc.is_valid(scale))
        self.reject("motion", twice, "invalid_value", "either `motion` or `motion_scale`, not both")
        scale, loop, style = motion(self, defaults)
        self.reject("style", pc.and_(loop, style), "invalid_value", "either `loop` or `style`, not both")
        restyled_loop = pc.and_(style, pc.is_in(scale, value_set=pa.array([3, 4, 5])))
        self.reject("style", restyled_loop, "invalid_value", "true only with a motion_scale of 0-2 or 6-8")
        looped_style = pc.and_(loop, pc.greater(scale, 5))
        self.reject("loop", looped_style, "invalid_value", "true only with a motion_scale of 0-5")

    def check_together(self, config: RunConfig, limits: Limits) -> None:
        """Check settings that are valid alone but not together."""
        defaults = config.defaults
        auto = is_auto(self, defaults)
        upscale = self._check_upscale(config, limits)
        for name in ("width", "height"):
            both = pc.and_(auto, pc.is_valid(self.typed[name]))
            self.reject(name, both, "invalid_value", "null where `size` is auto")
        get = {name: pc.fill_null(self.typed[name], getattr(defaults, name)) for name in _FILLED}
        num_steps = pc.floor(
            pc.multiply(get["strength"], pc.cast(get["num_inference_steps"], pa.float64(), safe=False))
        )
        self.reject("strength", pc.less(num_steps, 1), "out_of_range", "num_inference_steps x strength of at least 1")
        for fmt, max_fps in MAX_FPS.items():
            too_fast = pc.and_(pc.equal(get["format"], fmt), pc.greater(get["fps"], max_fps))
            self.reject("fps", too_fast, "out_of_range", f"at most {max_fps} where `format` is {fmt}")
            played = pc.multiply(get["fps"], pc.cast(get["interpolate"], pa.float64(), safe=False))
            too_fast = pc.and_(pc.equal(get["format"], fmt), pc.greater(played, max_fps))
            product = f"fps x interpolate of at most {max_fps} where `format` is {fmt}"
            self.reject("interpolate", too_fast, "out_of_range", product)
        self.reject(
            "cond_frame", pc.greater_equal(get["cond_frame"], get["num_frames"]), "out_of_range", "below num_frames"
        )
        partial = pc.and_(pc.greater(get["free_init_iters"], 0), pc.less(get["strength"], 1))
        self.reject("free_init_iters", partial, "invalid_value", "0 where strength is below 1")
        width, height = (pc.if_else(auto, get["long_side"], get[name]) for name in ("width", "height"))
        area = pc.multiply(width, height)
        cap = config.limits.max_frame_pixels
        product = f"width x height x num_frames up to {cap} (limits.max_frame_pixels)"
        pixels = pc.multiply(area, get["num_frames"])
        self.reject("width", pc.greater(pixels, cap), "out_of_range", product)
        longest = pc.multiply(pc.max_element_wise(width, height), upscale)
        too_long = pc.and_(pc.greater(upscale, 1), pc.greater(longest, _LONGEST_SIDE))
        product = f"width x upscale and height x upscale up to {_LONGEST_SIDE}"
        self.reject("upscale", too_long, "out_of_range", product)
        enlarged = pc.multiply(pixels, pc.multiply(upscale, upscale))
        product = f"width x height x num_frames x upscale^2 up to {cap} (limits.max_frame_pixels)"
        self.reject("upscale", pc.greater(enlarged, cap), "out_of_range", product)
        stored = pc.multiply(enlarged, get["interpolate"])
        power = "" if config.upscale.model is None else " x upscale^2"
        product = f"width x height x num_frames{power} x interpolate up to {cap} (limits.max_frame_pixels)"
        self.reject("interpolate", pc.greater(stored, cap), "out_of_range", product)
        long_clips.check(self, config, limits, get, area)

    def _check_upscale(self, config: RunConfig, limits: Limits) -> pa.Array:
        """Check that the upscaler of the config has the factors of rows; return each row's factor."""
        factors = pc.fill_null(self.typed["upscale"], config.upscale.scale or 1)
        if config.upscale.model is None:
            allowed = "1, or null; the config has no `upscale.model`"
            self.reject("upscale", pc.greater(factors, 1), "unsupported", allowed)
        else:
            most = limits.get(config.model.name, ModelLimits()).upscale
            allowed = f"1 to {most}, the factor of `upscale.model`"
            self.reject("upscale", pc.greater(factors, most), "out_of_range", allowed)
        return factors

    def check_words(self, blocked_words: tuple[str, ...]) -> None:
        """Check that no prompt holds a word of the blocklist. A negative prompt may: it names what is unwanted."""
        self._refuse_words("prompt", blocked(self.typed["prompt"], blocked_words))
        keys = self.typed["prompts"]
        if keys.null_count < len(keys):
            self._refuse_words("prompts", key_prompts.first_of_each(keys, lambda texts: blocked(texts, blocked_words)))

    def _refuse_words(self, name: str, words: pa.Array) -> None:
        text = f"column '{name}': the config's safety section refuses the word '"
        self._rejections.reject(
            pc.is_valid(words),
            "blocked_prompt",
            lambda rows: pc.binary_join_element_wise(text, words.take(pa.array(rows)), "'; change the prompt", ""),
        )

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


_LONGEST_SIDE = BY_NAME["width"].limits["le"]
"""Longest side of a stored frame in pixels: what encoders and memory are sized for."""

_FILLED = (
    "strength", "num_inference_steps", "format", "fps", "width", "height", "long_side", "num_frames", "cond_frame",
    "free_init_iters", "context_overlap", "context_stride", "interpolate",
)  # fmt: skip
