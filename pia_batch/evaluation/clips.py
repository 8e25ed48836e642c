"""Clips to measure: reads an animation and its condition image, and compares them with their result."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pia_batch.config import ImagesConfig
from pia_batch.errors import ImageUnavailableError, RequestError
from pia_batch.evaluation.pixels import Frames
from pia_batch.journal import layout
from pia_batch.journal.verify import PROBLEMS
from pia_batch.media import codecs, fetch, images
from pia_batch.schema.columns import Row
from pia_batch.storage.object_store import Store

READ = (
    *("request_id", "key", "status", "format", "width", "height", "num_frames", "fps", "cond_frame", "interpolate"),
    *("num_bytes", "sha256", "animation_uri", "image", "prompt", "prompts"),
)
"""Columns of a result that are read, as far as it has them."""

NOT_ANIMATED, FAILED_MEASURE = "not_animated", "measure_failed"

KINDS = {
    NOT_ANIMATED: "the request failed, so there is no clip",
    **PROBLEMS,
    "image_not_allowed, image_unavailable, image_unreadable": "the condition image, as for a run; measures that do not "
    "need it are there",
    FAILED_MEASURE: "a measure raised an exception for this clip",
    "timeout": "the clip took longer than `--clip-timeout` every time it was measured alone",
    "worker_crash": "the worker died every time it measured this clip alone",
}
"""Error kinds of an evaluation, with their meaning."""


class ClipError(Exception):
    """Clip that cannot be measured: its kind, of KINDS, and the reason."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class ClipReader:
    """Reader of the clips of one run.

    Attributes:
        store: Output.
        folder: URI of the folder of the run's manifest, which relative images start from; empty: not known.
        images: Section `images` of the run's config.
    """

    store: Store
    folder: str
    images: ImagesConfig

    def frames(self, row: Row) -> Frames:
        """Return the frames of a result's animation, uint8, shape (F, H, W, 3).

        Raises:
            ClipError: The animation is missing, is another one than was committed, or does not decode.
            StorageError: The store refused or did not answer.
        """
        if row["status"] != "succeeded":
            raise ClipError(NOT_ANIMATED, KINDS[NOT_ANIMATED])
        name = layout.animation_name_in(row["animation_uri"])
        try:
            data = self.store.read(name)
        except FileNotFoundError:
            raise ClipError("missing", f"{name} does not exist") from None
        if len(data) != row["num_bytes"]:
            raise ClipError("size", f"{name} has {len(data)} bytes, its result states {row['num_bytes']}")
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise ClipError("content", f"the bytes of {name} are not those that were committed")
        try:
            frames = codecs.decode(data, row["format"])
        except RequestError as err:
            raise ClipError("undecodable", str(err)) from None
        found, wanted = frames.shape[:3], (row["num_frames"], row["height"], row["width"])
        if found != wanted:
            raise ClipError("undecodable", f"{name} has another shape (got {found}, expected {wanted})")
        return frames

    def image(self, row: Row) -> Frames:
        """Return the condition image, fitted as for the run: uint8, shape (1, H, W, 3).

        Raises:
            ClipError: The image cannot be read, or is not accepted.
        """
        try:
            if not row["image"]:
                msg = "the manifest gave `image_bytes`, which results do not keep"
                raise ImageUnavailableError(msg)
            data = fetch.read_image(row["image"], self.folder, self.images)
            image = images.decode(data, max_pixels=self.images.max_pixels, background=self.images.background)
        except RequestError as err:
            raise ClipError(err.kind, str(err)) from None
        fitted = images.fit(image, row["width"], row["height"], self.images.fit, self.images.background)
        return np.asarray(fitted)[None]


def prompt_keys(row: Row) -> list[tuple[int, str]]:
    """Return the prompts of a result with the frames of its file from which they hold, rising."""
    keys: list[dict[str, Any]] = row.get("prompts") or []
    times = row.get("interpolate") or 1
    return sorted((key["frame"] * times, key["prompt"]) for key in keys) or [(0, row["prompt"])]


def cond_frame(row: Row) -> int:
    """Return the index of the frame of a result's file that equals the image."""
    return int(row.get("cond_frame") or 0) * int(row.get("interpolate") or 1)


def rows_of(table: pa.Table) -> list[Row]:
    """Return the rows of a table of results with all columns READ; None for a column that an older result lacks."""
    return [dict.fromkeys(READ) | row for row in table.select([n for n in READ if n in table.column_names]).to_pylist()]
