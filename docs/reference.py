"""Writes the tables of the documentation that come from the code: `make docs`.

Each stands in its page between `<!-- generated: NAME -->` and `<!-- end -->`; what is around it is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
from pydantic import BaseModel

from pia_batch import config
from pia_batch.cli import EXIT_CODES
from pia_batch.config import Defaults, RunConfig
from pia_batch.manifest import validation
from pia_batch.pipeline.metrics import METRICS
from pia_batch.report.facts import REMEDIES
from pia_batch.schema.columns import REQUEST, RESULT, SETTINGS
from pia_batch.schema.run_record import ProgressSnapshot, RunRecord
from pia_batch.storage import schemes

HERE = Path(__file__).parent

ALLOWED = {
    "request_id": f"1 to {validation.MAX_ID_BYTES} bytes, no control characters",
    "image": f"URI, or a path relative to the manifest's folder; up to {validation.MAX_URI_BYTES:,} bytes",
    "image_bytes": "an encoded image",
    "image_sha256": "64 hexadecimal digits",
    "prompt": f"1 to {validation.MAX_PROMPT_BYTES:,} bytes",
    "negative_prompt": f"up to {validation.MAX_PROMPT_BYTES:,} bytes",
    "seed": "0 to 2^63-1",
    "motion_curve": "1 to `num_frames` numbers from 0 to 1",
    "cond_frame": "0 to `num_frames` - 1",
    "loop": "with a `motion_scale` of 0 to 5",
    "style": "with `motion`, or a `motion_scale` of 0-2 or 6-8",
    "model": "`model.name`, or a name of the config's `models`",
    "ip_adapter_image": "URI, as `image`",
}
"""Of the columns whose range is not that of `config.Defaults`."""

CHOICES = {
    "motion": config.MOTIONS,
    "size": config.SIZES,
    "free_init_method": config.FREE_INIT_METHODS,
    "format": config.FORMATS,
}

ASKED = {
    "request_id": "required; the same id with other content is refused",
    "image": "required, unless `image_bytes` is given",
    "image_bytes": "instead of `image`",
    "image_sha256": "checked against what was fetched; makes the key independent of the URI",
    "prompt": "required",
    "negative_prompt": "what to steer away from",
    "seed": "null: derived from `request_id`",
    "motion": "how much moves; a word for a `motion_scale` of 0, 1 or 2",
    "style": "restyles the image",
    "motion_scale": "the number that diffusers knows: 0-2 more motion, 3-5 loops of 16 frames, 6-8 restyles",
    "motion_curve": "likeness to the image by distance in frames, the last one repeated; overrides `motion`, "
    "`motion_scale`, `loop` and `style`",
    "num_frames": "frames, no more than the model's motion modules know; PIA was trained on 16",
    "size": "fixed: `width` x `height`; auto: the image's own shape, in multiples of 64 up to `long_side`",
    "long_side": "pixels of the longer side where `size` is auto; nothing is enlarged",
    "width": "pixels; the image is fitted by `images.fit`",
    "height": "pixels; as `width`",
    "fps": "frames per second",
    "format": "png_zip: the frames as PNG files in a zip",
    "model": "which of the config's models draws it",
    "ip_adapter_image": "the image prompt, where the model has an `ip_adapter`; null: the image itself",
    "ip_adapter_scale": "weight of the image prompt",
    "free_init_iters": "FreeInit: passes, each a whole denoising; 0: off. Not with `strength` below 1",
}
"""Meanings of a request's columns where `config.Defaults` does not have them, or says less."""

ANSWERED = {
    "request_id": "from the manifest",
    "key": "32 hex digits over everything that decides the animation",
    "status": "`succeeded` or `failed`",
    "error_kind": "why it failed: a kind from the table below; null where it succeeded",
    "error": "the same in words: the column, the value and what is allowed",
    "attempts": "how often it was begun in the run that finished it; 0 for rejected rows",
    "animation_uri": "the animation's object",
    "image": "from the manifest; credentials and signatures are taken out of URIs",
    "prompt": "from the manifest",
    "model": "which of the config's models it asked for",
    "ip_adapter_image": "from the manifest, as `image`",
    "duration_s": "seconds of the stored animation",
    "num_bytes": "of the stored object",
    "sha256": "of the stored object",
    "prompt_tokens": "tokens of the prompt, markers included",
    "prompt_truncated": "whether the text encoder saw only the first of them",
    "frame_mean": "mean of all pixels, 0-255",
    "frame_std": "deviation of all pixels, 0-255",
    "motion": "mean difference of neighbouring frames, 0-255",
    "first_frame_psnr_db": "first frame (or `cond_frame`) against the fitted image, dB; null: identical",
    "image_sha256": "of the bytes that were fetched",
    "gpu_seconds": "this request's share of the device",
    "fetch_seconds": "its image: read, checked, fitted",
    "encode_seconds": "its file: encoded and decoded as a check",
    "device": "where it was drawn, such as `cuda:0`",
    "engine_id": "by which weights, scheduler, dtype and engine version",
    "run_id": "which run finished it",
    "finished_at": "when, UTC",
}
"""Meanings of a result's columns, but for the settings."""


def config_keys() -> list[str]:
    """Every key of a config with its default and its meaning."""
    return _table(["key", "default", "meaning"], _keys(RunConfig, ""))


def _keys(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else f"`{_shown(field.get_default(call_default_factory=True))}`"
            yield f"`{prefix}{name}`", default, str(field.description)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return str(list(value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def request_columns() -> list[str]:
    """Every column of a manifest that means something."""
    rows = (
        (f"`{field.name}`", _type(field.type), _allowed(field.name), ASKED.get(field.name) or _described(field.name))
        for field in REQUEST
    )
    return _table(["column", "type", "allowed", "meaning"], rows)


def result_columns() -> list[str]:
    """Every column of a result, the settings in one row."""
    rows = [
        (f"`{field.name}`", _type(field.type), ANSWERED[field.name])
        for field in RESULT
        if field.name not in SETTINGS.names
    ]
    settings = ", ".join(f"`{name}`" for name in SETTINGS.names)
    drawn = "the settings it was drawn with, defaults filled in; null for rejected rows, and where one decides nothing"
    return _table(["column", "type", "meaning"], [*rows, (settings, "as in a manifest", drawn)])


def _described(name: str) -> str:
    return str(Defaults.model_fields[name].description)


def _allowed(name: str) -> str:
    """What a column may be, out of `config.Defaults` where that has it."""
    if name in ALLOWED:
        return ALLOWED[name]
    if name in CHOICES:
        return ", ".join(f"`{choice}`" for choice in CHOICES[name])
    limits = {
        key: getattr(rule, key) for rule in Defaults.model_fields[name].metadata for key in _RULES if hasattr(rule, key)
    }
    if not limits:
        return ""
    low = f"above {limits['gt']:g} up" if "gt" in limits else f"{limits['ge']:g}"
    multiples = f", multiples of {limits['multiple_of']}" if "multiple_of" in limits else ""
    gif = f"; a GIF to {config.MAX_FPS['gif']}" if name == "fps" else ""
    return f"{low} to {limits['le']:g}{multiples}{gif}"


_RULES = ("gt", "ge", "le", "multiple_of")


def _type(data_type: pa.DataType) -> str:
    if pa.types.is_list(data_type):
        return f"list of {_type(data_type.value_type)}s"
    words = {"int64": "int", "double": "float", "large_binary": "binary", "timestamp[us, tz=UTC]": "timestamp"}
    return words.get(str(data_type), str(data_type))


def error_kinds() -> list[str]:
    """Every error kind with its remedy."""
    return _table(["error kind", "what to do"], ((f"`{kind}`", remedy) for kind, remedy in REMEDIES.items()))


def exit_codes() -> list[str]:
    """What a command leaves with."""
    return _table(["exit code", "meaning"], ((str(code), meaning) for code, meaning in EXIT_CODES.items()))


def metrics() -> list[str]:
    """What Prometheus is told."""
    rows = (
        (f"`{name}`", metric.kind, ", ".join(f"`{tag}`" for tag in metric.tags), metric.meaning)
        for name, metric in METRICS.items()
    )
    return _table(["metric", "kind", "tags", "meaning"], rows)


def progress_fields() -> list[str]:
    """What programs are told of a run that goes on."""
    rows = ((f"`{name}`", str(field.description)) for name, field in ProgressSnapshot.model_fields.items())
    return _table(["field", "meaning"], rows)


def run_record_fields() -> list[str]:
    """Return every field of run.json with its meaning; those of an object are named after it."""
    return _table(["field", "meaning"], _record_fields(RunRecord, ""))


def _record_fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        parts = [part for part in (field.annotation, *get_args(field.annotation)) if isinstance(part, type)]
        inner = [part for part in parts if issubclass(part, BaseModel) and part is not ProgressSnapshot]
        yield f"`{prefix}{name}`", str(field.description)
        for part in inner:
            yield from _record_fields(part, f"{prefix}{name}.")


def url_schemes() -> list[str]:
    """Return every URL scheme, and what it can be used for."""
    purposes: tuple[schemes.Purpose, ...] = ("manifest", "image", "images.allow", "weights", "output")
    rows = (
        (
            f"`{scheme.name}://`",
            *("yes" if scheme.serves(purpose) else "no" for purpose in purposes),
            f"`{scheme.package}`" if scheme.package else "",
        )
        for scheme in schemes.SCHEMES.values()
    )
    return _table(["scheme", *purposes, "package needed to read manifests and images"], rows)


def _table(head: list[str], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


TABLES: dict[str, Callable[[], list[str]]] = {
    "config keys": config_keys,
    "columns of a request": request_columns,
    "columns of a result": result_columns,
    "error kinds": error_kinds,
    "exit codes": exit_codes,
    "metrics": metrics,
    "progress fields": progress_fields,
    "run record fields": run_record_fields,
    "url schemes": url_schemes,
}
"""By the name that stands in the page."""

_PLACE = re.compile(r"(<!-- generated: ([\w ]+) -->\n\n).*?\n(\n<!-- end -->)", re.DOTALL)


def written(page: str) -> str:
    """A page's text with every table as the code has it now."""
    return _PLACE.sub(lambda place: f"{place[1]}{chr(10).join(TABLES[place[2]]())}\n{place[3]}", page)


def main() -> None:
    """Rewrite the pages beside this file."""
    for path in sorted(HERE.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        if written(page) != page:
            path.write_text(written(page), encoding="utf-8")


if __name__ == "__main__":
    main()
