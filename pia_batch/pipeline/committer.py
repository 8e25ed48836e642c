"""Committer: encodes clips, stores the animations and appends their results to the commit log."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pia_batch.config import RunConfig
from pia_batch.errors import (
    EncodingError,
    EngineError,
    ObjectExistsError,
    PiaBatchError,
    RequestError,
    message_of,
)
from pia_batch.journal.layout import animation_name, poster_name
from pia_batch.media import codecs, posters, provenance, quality
from pia_batch.pipeline import worker_errors
from pia_batch.pipeline.finishing import finish
from pia_batch.pipeline.request_rows import INTERNAL, NSFW_INPUT, condition_image, is_rejected
from pia_batch.pipeline.safety_guard import SafetyGuard
from pia_batch.pipeline.upscaler_loader import Upscaler
from pia_batch.schema.columns import FAILED, REQUEST, SUCCEEDED, Row, results_table
from pia_batch.schema.settings import VideoCodec

log = logging.getLogger(__name__)


class Objects(Protocol):
    """Object store for animations: the part of `storage.object_store.Store` that the last stage uses."""

    def create(self, name: str, data: bytes) -> None:
        """Store `data`, or raise ObjectExistsError."""

    def read(self, name: str) -> bytes:
        """Return the stored bytes."""

    def uri_of(self, name: str) -> str:
        """Return the URI under which others find the object."""


class Commits(Protocol):
    """Commit log for results: the part of `journal.log.Journal` that the last stage uses."""

    def append(self, results: pa.Table) -> object:
        """Commit these rows."""


class Committer:
    """Turns clips into stored animations and committed results.

    Args:
        objects: Object store for the animations.
        commits: Commit log for the results.
        config: Config of the run.
        engine_ids: Identity of each model's engine.
        safety: Safety checks of clips.
        upscaler: Network that enlarges frames; None: no request asks for it.
        device: Name of the worker's device, recorded in every result.
        run_id: Run id recorded in every result, or None.
        count: Function that adds to a counter of `metrics.METRICS`.
    """

    def __init__(  # noqa: PLR0913 - what a worker has, each given by its owner
        self,
        objects: Objects,
        commits: Commits,
        config: RunConfig,
        engine_ids: Mapping[str, str],
        safety: SafetyGuard,
        *,
        upscaler: Upscaler | None = None,
        device: str,
        run_id: str | None,
        count: Callable[..., None],
    ) -> None:
        self._objects, self._commits = objects, commits
        self._config, self._engine_ids, self._safety = config, engine_ids, safety
        self._upscaler = upscaler
        self._device, self._run_id, self._count = device, run_id, count

    def commit(self, requests: pa.Table, rows: list[Row], clips: list[Any], attempts: list[int]) -> list[Row]:
        """Encode and store the clips, commit the results and return them.

        Args:
            requests: Requests as `stages.FetchImages` gives them, with their carried columns.
            rows: The same requests as dictionaries.
            clips: For each row a clip, an error raised for it, or None where the row has an error already.
            attempts: Number of the attempt of each row.
        """
        started = time.monotonic()
        results = [
            self._result(row, clip) | {"attempts": 0 if is_rejected(row) else attempt}
            for row, clip, attempt in zip(rows, clips, attempts, strict=True)
        ]
        self._commits.append(results_of(requests, results))
        self._count_results(results, time.monotonic() - started)
        return results

    def _result(self, row: Row, clip: Any) -> Row:
        """Return the result of one request; its animation is stored when this returns."""
        result: Row = {"key": row["key"], "status": FAILED, "run_id": self._run_id}
        if not is_rejected(row):
            result |= {
                "image_sha256": row["fetched_sha256"],
                "fetch_seconds": row["fetch_seconds"],
                "device": self._device,
                "engine_id": self._engine_ids[row["model"]],
                NSFW_INPUT: row.get(NSFW_INPUT),
            }
        if row["error_kind"] is not None:
            result |= {"error_kind": row["error_kind"], "error": row["error"]}
        elif isinstance(clip, RequestError):
            result |= _failure(clip, row)
        else:
            result |= self._stored(row, clip)
        return result | {"finished_at": datetime.now(UTC)}

    def _stored(self, row: Row, clip: Any) -> Row:
        """Measure, encode and store a clip; return its part of the result, or the error that prevented it."""
        result: Row = {}
        try:
            result |= {
                "prompt_tokens": clip.prompt_tokens,
                "prompt_truncated": clip.prompt_truncated,
                "gpu_seconds": clip.device_seconds,
            }
            result |= quality.measures(clip.frames, np.asarray(condition_image(row)), row["cond_frame"])
            result |= self._safety.measures(clip.frames)
            quality.refuse_degenerate(result, row, self._config.limits)
            self._safety.refuse_unsafe(result)
            result |= self._save(row, clip.frames) | {"status": SUCCEEDED}
        except RequestError as err:
            result |= _failure(err, row)
        except PiaBatchError:
            raise
        except Exception as err:
            if lack := worker_errors.memory_error(err):
                return result | _failure(lack, row)
            log.exception("commit_failed request_id=%s", row["request_id"])
            result |= _failure(EngineError(f"the worker raised {type(err).__name__}: {message_of(err)}"), row)
        return result

    def _save(self, row: Row, frames: npt.NDArray[np.uint8]) -> Row:
        """Finish, encode, decode as a check, store unless the object exists, and describe the stored object."""
        started = time.monotonic()
        metadata = provenance.metadata_of(row, self._config, self._engine_ids[row["model"]])
        loop_count, finished = row["loop_count"] or 0, finish(row, frames, self._upscaler)
        stored = row | asdict(finished.size)
        codec: VideoCodec = row["codec"] or "h264"
        encoding = self._config.encoding
        data = codecs.encode(
            finished.frames,
            row["format"],
            stored["fps"],
            encoding,
            metadata,
            loop_count=loop_count,
            video_codec=codec,
        )
        file = _File(stored)
        file.check(data)
        name = animation_name(row["key"], codecs.CODECS[row["format"]].extension)
        encode_seconds = time.monotonic() - started - (finished.seconds or 0.0)
        data = self._create(name, data, file.check)
        result = asdict(finished.size) | {
            "animation_uri": self._objects.uri_of(name),
            "duration_s": file.duration_s,
            "num_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "encode_seconds": encode_seconds,
            "finish_seconds": finished.seconds,
        }
        return result | (self._save_poster(stored, file) if row["poster"] else {})

    def _save_poster(self, stored: Row, file: _File) -> Row:
        """Store the first frame of a stored animation, unless its poster exists, and describe the stored object.

        The frame is that of the file that the store has, so that every attempt makes the same poster.
        """
        name = poster_name(stored["key"])
        data = self._create(
            name, posters.make_poster(file.first_frame), lambda data: posters.check_poster(data, stored)
        )
        return {
            "poster_uri": self._objects.uri_of(name),
            "poster_num_bytes": len(data),
            "poster_sha256": hashlib.sha256(data).hexdigest(),
        }

    def _create(self, name: str, data: bytes, check: Callable[[bytes], None]) -> bytes:
        """Store an object unless it exists, and return the bytes that the store has.

        Raises:
            EncodingError: It exists, and `check` refuses it.
        """
        try:
            self._objects.create(name, data)
        except ObjectExistsError:
            # Our own earlier attempt, or one that was killed before its commit: the first writer wins.
            data = self._objects.read(name)
            try:
                check(data)
            except EncodingError as err:
                uri = self._objects.uri_of(name)
                msg = f"{uri} exists already and is damaged: {err}; delete it, then run with --retry-failed"
                raise EncodingError(msg) from err
        return data

    def _count_results(self, results: list[Row], seconds: float) -> None:
        """Count the results, and the `seconds` that encoding and committing took."""
        for result in results:
            kind = result.get("error_kind") or ""
            self._count("pia_batch_requests_total", 1, status=result["status"], error_kind=kind)
        stages = {
            stage: sum(result.get(f"{stage}_seconds") or 0.0 for result in results)
            for stage in ("fetch", "finish", "encode")
        }
        for stage, spent in (stages | {"commit": seconds - stages["encode"] - stages["finish"]}).items():
            self._count("pia_batch_stage_seconds_total", spent, stage=stage)


class _File:
    """Duration and first frame of an animation, found by decoding it as a check.

    Args:
        row: Request with the size of its file.
    """

    def __init__(self, row: Row) -> None:
        self._row = row
        self._frames: list[npt.NDArray[np.uint8]] = []
        self.duration_s = 0.0

    @property
    def first_frame(self) -> npt.NDArray[np.uint8]:
        """First frame of the file that was checked last, uint8, shape (H, W, 3), RGB, 0-255."""
        return self._frames[0]

    def check(self, data: bytes) -> None:
        """Decode an animation, and keep its duration and its first frame.

        Raises:
            EncodingError: It does not decode, or is another one.
        """
        self._frames.clear()
        self.duration_s = quality.check_animation(data, self._row, self._keep_first).duration_s

    def _keep_first(self, frame: npt.NDArray[np.uint8]) -> None:
        if not self._frames:
            self._frames.append(frame.copy())


def results_of(requests: pa.Table, results: list[Row]) -> pa.Table:
    """Return a table of results in the order of `requests`, with their settings and carried columns.

    A setting that a result has, such as the size of its file, replaces that of the request.
    """
    columns = {name: requests[name] for name in requests.column_names if name in REQUEST.names}
    for name in set().union(*results):
        given = columns[name].to_pylist() if name in columns else [None] * len(results)
        columns[name] = pa.array([result.get(name, default) for result, default in zip(results, given, strict=True)])
    carried = [name for name in requests.column_names if name not in REQUEST.names and name not in INTERNAL]
    return results_table(columns, requests.select(carried), len(requests))


def _failure(err: RequestError, row: Row) -> Row:
    log.warning("request_failed request_id=%s error_kind=%s", row["request_id"], err.kind)
    return {"error_kind": err.kind, "error": str(err)}
