"""What happens to a block of requests, step by step: plain classes over Arrow tables that know nothing of Ray.

Validate → DropFinished → FetchImages → Animate. No stage raises for a bad request: it becomes a failed result with a
kind, and its neighbours go on. Any other exception is a bug, and ends the run.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from pia_batch import images, storage, validation, video
from pia_batch.config import ImagesConfig, ModelConfig, RunConfig
from pia_batch.errors import ConfigError, EncodingError, ImageMismatchError, ObjectExistsError, RequestError
from pia_batch.journal import Journal, animation_name
from pia_batch.manifest import conform
from pia_batch.records import (
    FAILED,
    FETCHED,
    REQUEST,
    SETTINGS,
    SUCCEEDED,
    KeySet,
    keys_from_hex,
    results_table,
)
from pia_batch.storage import Store

log = logging.getLogger(__name__)

INTERRUPTED = "interrupted"
"""The status of a request that was not begun because the run is stopping. It never reaches the journal."""

OUTCOME = pa.schema(
    [("key", pa.string()), ("status", pa.string()), ("error_kind", pa.string()), ("gpu_seconds", pa.float64())]
)
"""What `Animate` hands back, after the commit: a few bytes a request."""

Row = dict[str, Any]


class Engine(Protocol):
    """What `Animate` needs of `pia_batch.engine.PiaEngine`."""

    @property
    def engine_id(self) -> str:
        """Identity of weights, scheduler, dtype and engine version."""

    @property
    def device(self) -> str:
        """Where it draws, such as `cuda:0`."""

    @property
    def shot(self) -> Callable[..., Any]:
        """Makes one request for `animate` of image, prompt and every setting, by keyword."""

    def animate(self, shots: Sequence[Any]) -> Sequence[Any]:
        """One clip for each shot, in order; a clip that could not be drawn bears its error."""


class Control(Protocol):
    """The run's word on each batch: may it start, and how often was it tried."""

    def begin(self, keys: list[str]) -> list[int] | None:
        """The number of the attempt that starts now for each key, or None if the run is stopping."""

    def end(self, keys: list[str]) -> None:
        """These keys are committed."""


@dataclass(frozen=True)
class EngineLoader:
    """Loads `PiaEngine`, on the worker that calls it: the driver never imports torch."""

    model: ModelConfig
    device: str

    def __call__(self) -> Engine:
        """The engine, ready."""
        from pia_batch.engine import PiaEngine

        return PiaEngine.load(self.model, self.device)


class Validate:
    """Turns manifest rows into effective requests with keys. Rejected rows are dropped: the plan has reported them."""

    def __init__(self, config: RunConfig, engine_id: str, schema: pa.Schema) -> None:
        self._config, self._engine_id, self._schema = config, engine_id, schema

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Manifest rows, any columns and types, to `validation.Checked.requests`."""
        return validation.check(conform(rows, self._schema), self._config, self._engine_id).requests


class DropFinished:
    """Passes on the requests whose key is not in `finished`."""

    def __init__(self, finished: KeySet) -> None:
        self._finished = finished

    def __call__(self, requests: pa.Table) -> pa.Table:
        """The unfinished ones of `requests`, in order."""
        return requests.filter(pa.array(~self._finished.contains(keys_from_hex(requests["key"]))))


class FetchImages:
    """Reads, checks, decodes and fits the condition images of a block, several at a time.

    Replaces `image_bytes` by the columns FETCHED: `pixels` is RGB, uint8, height x width x 3 bytes; or null, and then
    `fetch_error_kind` and `fetch_error` say why.
    """

    def __init__(self, config: ImagesConfig, base_uri: str) -> None:
        self._config, self._base_uri = config, base_uri

    def __call__(self, requests: pa.Table) -> pa.Table:
        """`requests`, every one of them, with the columns FETCHED."""
        needed = requests.select(["image", "image_bytes", "image_sha256", "width", "height"]).to_pylist()
        with ThreadPoolExecutor(self._config.threads) as pool:
            fetched = list(pool.map(self._fetch, needed))
        table = requests.drop_columns(["image_bytes"])
        for field in FETCHED:
            table = table.append_column(field, pa.array([row[field.name] for row in fetched], field.type))
        return table

    def _fetch(self, row: Row) -> Row:
        started = time.monotonic()
        fetched: Row = dict.fromkeys(FETCHED.names)
        try:
            data = row["image_bytes"] or self._read(row["image"])
            fetched["fetched_sha256"] = hashlib.sha256(data).hexdigest()
            if row["image_sha256"] not in (None, fetched["fetched_sha256"]):
                msg = (
                    f"column 'image_sha256': the image has {fetched['fetched_sha256']}, the manifest says "
                    f"{row['image_sha256']}; correct the column, or restore the image"
                )
                raise ImageMismatchError(msg)
            image = images.decode(data, max_pixels=self._config.max_pixels, background=self._config.background)
            fitted = images.fit(image, row["width"], row["height"], self._config.fit, self._config.background)
            fetched["pixels"] = fitted.tobytes()
        except RequestError as err:
            fetched["fetch_error_kind"], fetched["fetch_error"] = err.kind, str(err)
        fetched["fetch_seconds"] = time.monotonic() - started
        return fetched

    def _read(self, uri: str) -> bytes:
        return storage.read_image(
            uri,
            self._base_uri,
            schemes=self._config.schemes,
            max_bytes=self._config.max_bytes,
            timeout_s=self._config.timeout_s,
        )


class Animate:
    """Holds one engine; draws, encodes, stores and commits a batch, and returns OUTCOME rows.

    Two threads may call it at once: while one batch is on the device, the one before is encoded and committed. A call
    returns only when its batch is in the journal, so what Ray takes for done is done.

    Args:
        load_engine: gives the engine; called here, on the worker.
        engine_id: what the keys were made with; another engine is refused.
        config: the run's config.
        run_id: recorded in every result.
        control: the run's word on each batch.
    """

    def __init__(
        self, load_engine: Callable[[], Engine], engine_id: str, config: RunConfig, run_id: str, control: Control
    ) -> None:
        self._engine = load_engine()
        if self._engine.engine_id != engine_id:
            msg = (
                f"the weights on this node are others than the driver's: engine {self._engine.engine_id} instead of "
                f"{engine_id}; give every node the same model.base, or pin a hub commit by model.revision"
            )
            raise ConfigError(msg)
        self._config, self._run_id, self._control = config, run_id, control
        self._store = Store(config.output)
        self._journal = Journal(self._store)
        self._device = threading.Lock()

    def __call__(self, requests: pa.Table) -> pa.Table:
        """One OUTCOME row for each of `requests`; they are committed, or `interrupted` if the run is stopping."""
        if not len(requests):
            return OUTCOME.empty_table()
        keys = requests["key"].to_pylist()
        attempts = self._control.begin(keys)
        if attempts is None:
            return _outcomes([{"key": key, "status": INTERRUPTED} for key in keys])
        rows = requests.select([n for n in requests.column_names if n in _NEEDED]).to_pylist()
        with self._device:
            clips = self._draw(rows)
        results = [
            self._commit(row, clip) | {"attempts": attempt}
            for row, clip, attempt in zip(rows, clips, attempts, strict=True)
        ]
        self._journal.append(self._table(requests, results))
        self._control.end(keys)
        return _outcomes(results)

    def _draw(self, rows: list[Row]) -> list[Any]:
        """A clip for each row, or None where there is no image to draw from."""
        drawable = [index for index, row in enumerate(rows) if row["pixels"] is not None]
        drawn = self._engine.animate([self._shot(rows[index]) for index in drawable]) if drawable else []
        clips = dict(zip(drawable, drawn, strict=True))
        return [clips.get(index) for index in range(len(rows))]

    def _shot(self, row: Row) -> Any:  # the engine's own class
        settings = {name: row[name] for name in SETTINGS.names if name not in ("fps", "format")}
        if settings["motion_curve"] is not None:
            settings["motion_curve"] = tuple(settings["motion_curve"])
        return self._engine.shot(image=_condition(row), prompt=row["prompt"], **settings)

    def _commit(self, row: Row, clip: Any) -> Row:
        """The result of one request; its animation is stored when this returns."""
        result: Row = {
            "key": row["key"],
            "status": FAILED,
            "image_sha256": row["fetched_sha256"],
            "fetch_seconds": row["fetch_seconds"],
            "device": self._engine.device,
            "engine_id": self._engine.engine_id,
            "run_id": self._run_id,
        }
        try:
            if clip is None:
                return result | {
                    "error_kind": row["fetch_error_kind"],
                    "error": row["fetch_error"],
                    "finished_at": datetime.now(UTC),
                }
            result |= {
                "prompt_tokens": clip.prompt_tokens,
                "prompt_truncated": clip.prompt_truncated,
                "gpu_seconds": clip.device_seconds,
            }
            result |= measures(clip.frames, np.asarray(_condition(row)))
            result |= self._save(row, clip.frames) | {"status": SUCCEEDED}
        except RequestError as err:
            result |= {"error_kind": err.kind, "error": str(err)}
            log.warning("request_failed request_id=%s error_kind=%s", row["request_id"], err.kind)
        return result | {"finished_at": datetime.now(UTC)}

    def _save(self, row: Row, frames: npt.NDArray[np.uint8]) -> Row:
        """Encode, decode as a check, store unless it is there already, and tell what is there now."""
        started = time.monotonic()
        data = video.encode(frames, row["format"], row["fps"], self._config.encoding)
        info = check_animation(data, row)
        name = animation_name(row["key"], video.EXTENSIONS[row["format"]])
        encode_seconds = time.monotonic() - started
        try:
            self._store.create(name, data)
        except ObjectExistsError:
            # Our own earlier attempt, or one that was killed before its commit: first writer wins.
            data = self._store.read(name)
            try:
                info = check_animation(data, row)
            except EncodingError as err:
                uri = self._store.uri_of(name)
                msg = f"{uri} is there already and is damaged: {err}; delete it, then run with --retry-failed"
                raise EncodingError(msg) from err
        return {
            "animation_uri": self._store.uri_of(name),
            "duration_s": info.duration_s,
            "num_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "encode_seconds": encode_seconds,
        }

    def _table(self, requests: pa.Table, results: list[Row]) -> pa.Table:
        columns = {name: requests[name] for name in requests.column_names if name in REQUEST.names}
        for name in set().union(*results):
            columns[name] = pa.array([result.get(name) for result in results])
        carried = [n for n in requests.column_names if n not in REQUEST.names and n not in _INTERNAL]
        return results_table(columns, requests.select(carried), len(requests))


def check_animation(data: bytes, row: Row) -> video.MediaInfo:
    """Decode an animation wholly and compare it with `width`, `height` and `num_frames` of its request or result.

    Raises:
        EncodingError: it does not decode, or is another animation.
    """
    info = video.probe(data, row["format"])
    found, wanted = (info.width, info.height, info.num_frames), (row["width"], row["height"], row["num_frames"])
    if found != wanted:
        msg = f"the {row['format']} has width, height, frames {found} and not {wanted}"
        raise EncodingError(msg)
    return info


def measures(frames: npt.NDArray[np.uint8], condition: npt.NDArray[np.uint8]) -> dict[str, float | None]:
    """What can be told of a clip by numbers alone.

    Args:
        frames: uint8, (F, H, W, 3), 0-255.
        condition: the fitted condition image, uint8, (H, W, 3), 0-255.

    Returns:
        `frame_mean` and `frame_std` over all pixels; `motion`, the mean absolute difference of neighbouring frames;
        all three in 0-255. `first_frame_psnr_db` against the condition image in dB, None where they are identical.
    """
    pixels = frames.astype(np.float32)
    motion = float(np.abs(np.diff(pixels, axis=0)).mean()) if len(frames) > 1 else 0.0
    error = float(np.square(pixels[0] - condition).mean())
    return {
        "frame_mean": float(pixels.mean()),
        "frame_std": float(pixels.std()),
        "motion": motion,
        "first_frame_psnr_db": None if error == 0 else 10 * float(np.log10(255**2 / error)),
    }


_INTERNAL = frozenset({"key", *FETCHED.names})
_NEEDED = frozenset({"request_id", "prompt", *SETTINGS.names, *_INTERNAL})


def _condition(row: Row) -> Image.Image:
    return Image.frombytes("RGB", (row["width"], row["height"]), row["pixels"])


def _outcomes(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist([{name: row.get(name) for name in OUTCOME.names} for row in rows], OUTCOME)
