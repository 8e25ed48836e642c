"""Page of a comparison: one self-contained HTML file with its figures, and pairs that play side by side in step.

The two clips of a pair are encoded as one video, A on the left and B on the right, so that no player can lose step.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from pia_batch.config import EncodingConfig
from pia_batch.errors import RequestError
from pia_batch.evaluation.comparison import Comparison
from pia_batch.evaluation.measures import BY_NAME
from pia_batch.evaluation.pixels import Frames
from pia_batch.evaluation.work import RunResults
from pia_batch.journal import layout
from pia_batch.media import codecs
from pia_batch.report.page import for_script, hash_of
from pia_batch.schema import python_values
from pia_batch.schema.columns import Row

MAX_PAIRS = 60
"""Number of pairs on a page by default: about 0.3 MB each at 512 x 512 and 16 frames."""

MAX_SIDE_PX = 512
"""Longest side of a clip on the page, in pixels; larger ones are made smaller."""

_THREADS = 4
_LOADER = jinja2.PackageLoader("pia_batch.evaluation")
_ENVIRONMENT = jinja2.Environment(
    loader=_LOADER, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def render(comparison: Comparison, title: tuple[str, str], max_pairs: int = MAX_PAIRS) -> str:
    """Return the page.

    Args:
        comparison: Comparison.
        title: Names of A and B.
        max_pairs: Largest number of pairs on the page: those with the largest changes, in units of a measure's spread.
    """
    chosen = _largest(comparison, max_pairs)
    rows_a, rows_b = (python_values.of_rows(rows.take(chosen)) for rows in (comparison.rows_a, comparison.rows_b))
    pairs = [
        {
            "key": ", ".join(str(a[name]) for name in comparison.pair_by),
            "prompt": a["prompt"],
            "other_prompt": b["prompt"] if b["prompt"] != a["prompt"] else None,
            "a": [_number(a[name]) for name in comparison.measures],
            "b": [_number(b[name]) for name in comparison.measures],
        }
        for a, b in zip(rows_a, rows_b, strict=True)
    ]
    pairs = [pair | media for pair, media in zip(pairs, _videos(comparison, rows_a, rows_b), strict=True)]
    record = comparison.record()
    data = record | {"names": title, "measures": [_about(name) for name in comparison.measures], "shown": pairs}
    style, script = (_LOADER.get_source(_ENVIRONMENT, name)[0].strip() for name in ("compare.css", "compare.js"))
    policy = {
        "default-src": "'none'",
        "script-src": hash_of(script),
        "style-src": hash_of(style),
        "media-src": "data: blob:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return _ENVIRONMENT.get_template("compare.html").render(
        names=title,
        record=record,
        policy="; ".join(f"{name} {value}" for name, value in policy.items()),
        style=style,
        script=script,
        data=for_script(data),
    )


def _largest(comparison: Comparison, max_pairs: int) -> list[int]:
    """Return the pairs with the largest change of any measure, in units of that measure's spread over all pairs."""
    changes = np.zeros(len(comparison.rows_a))
    for name in comparison.measures:
        a, b = (
            np.array([np.nan if value is None else value for value in rows[name].to_pylist()], dtype=np.float64)
            for rows in (comparison.rows_a, comparison.rows_b)
        )
        spread = np.nanstd(np.concatenate([a, b])) if np.isfinite(a).any() else 0.0
        if spread > 0:
            changes = np.fmax(changes, np.nan_to_num(np.abs(b - a) / spread))
    order: list[int] = np.argsort(-changes, kind="stable")[:max_pairs].tolist()
    return order


def _videos(comparison: Comparison, rows_a: list[Row], rows_b: list[Row]) -> Iterator[dict[str, Any]]:
    pairs = zip(rows_a, rows_b, strict=True)
    yield from comparison.a.results.store.each(lambda pair: _video(comparison, *pair), pairs, _THREADS)


def _video(comparison: Comparison, a: Row, b: Row) -> dict[str, Any]:
    """Return one video of both clips as a data URI, with its frames and rate; or the reason why there is none."""
    try:
        left, right = _frames(comparison.a.results, a), _frames(comparison.b.results, b)
    except (RequestError, FileNotFoundError) as err:
        return {"video": None, "problem": str(err)}
    fps = max(a["fps"], b["fps"])
    num_frames = max(round(len(left) / a["fps"] * fps), round(len(right) / b["fps"] * fps))
    height = min(MAX_SIDE_PX, max(left.shape[1], right.shape[1]))
    sides = [_scaled(clip, row["fps"] / fps, num_frames, height) for clip, row in ((left, a), (right, b))]
    width = max(side.shape[2] for side in sides)
    both = np.concatenate([_padded(side, width) for side in sides], axis=2)
    data = codecs.encode(both, "mp4", fps, EncodingConfig(mp4_crf=16))
    video = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    return {"video": video, "frames": num_frames, "fps": fps, "width": both.shape[2], "height": both.shape[1]}


def _frames(results: RunResults, row: Row) -> Frames:
    name = layout.animation_name(row["key"], codecs.CODECS[row["format"]].extension)
    return codecs.decode(results.store.read(name), row["format"])


def _scaled(clip: Frames, pace: float, num_frames: int, height: int) -> Frames:
    """Return a clip at another height, with frames repeated to a faster rate; its last frame is held to the end."""
    height -= height % 2
    width = max(2, round(clip.shape[2] * height / clip.shape[1] / 2) * 2)
    at = np.minimum((np.arange(num_frames) * pace + 1e-9).astype(int), len(clip) - 1)
    if clip.shape[1:3] != (height, width):
        method = Image.Resampling.LANCZOS
        clip = np.stack([np.asarray(Image.fromarray(frame).resize((width, height), method)) for frame in clip])
    held: Frames = clip[at]
    return held


def _padded(clip: Frames, width: int) -> Frames:
    """Return a clip in the middle of a wider, black one."""
    padded: Frames = np.zeros((*clip.shape[:2], width, 3), dtype=np.uint8)
    left = (width - clip.shape[2]) // 2
    padded[:, :, left : left + clip.shape[2]] = clip
    return padded


def _number(value: Any) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.6g}")


def _about(name: str) -> dict[str, str]:
    known = BY_NAME.get(name)
    return {"name": name, "unit": known.unit if known else "", "better": known.better if known else "neither"}
