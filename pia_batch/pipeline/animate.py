"""The last stage: requests with their images to committed animations. Knows nothing of Ray, and imports no torch.

A request that raises, kills its worker, hangs, or eats the memory fails alone. Whoever was in a batch when that ended
badly is drawn again by itself, and the run's `attempts.AttemptTracker` keeps count across dead workers.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from pia_batch.config import RunConfig
from pia_batch.errors import (
    BrokenDeviceError,
    ConfigError,
    DeviceMemoryError,
    EncodingError,
    EngineError,
    ObjectExistsError,
    PiaBatchError,
    RequestError,
    RequestTimeoutError,
    WorkerCrashError,
    message_of,
)
from pia_batch.journal.layout import animation_name
from pia_batch.journal.log import Journal
from pia_batch.media import codecs, images, provenance, quality
from pia_batch.pipeline.attempts import AttemptControl, SoloAttempt
from pia_batch.pipeline.engine_loader import Engine, Engines
from pia_batch.pipeline.watchdog import Watchdog, own_bytes
from pia_batch.schema.columns import EFFECTIVE, FAILED, FETCHED, REQUEST, SETTINGS, SUCCEEDED, Row, results_table
from pia_batch.storage.object_store import Store

log = logging.getLogger(__name__)

INTERRUPTED = "interrupted"
"""The status of a request that was not begun because the run is stopping. It never reaches the journal."""

MAX_STARTS = 3
"""How often one worker's process may be begun before its engine has been ready."""

OUTCOME = pa.schema(
    [
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_kind", pa.string()),
        ("error", pa.string()),
        ("animation_uri", pa.string()),
    ]
)
"""What `Animate` hands back, after the commit: a few bytes a request."""


class Objects(Protocol):
    """Where animations go: what the last stage needs of `storage.Store`."""

    def create(self, name: str, data: bytes) -> None:
        """Store `data`, or raise ObjectExistsError."""

    def read(self, name: str) -> bytes:
        """What is there."""

    def uri_of(self, name: str) -> str | None:
        """Where others find it."""


class Commits(Protocol):
    """Where results go: what the last stage needs of `journal.Journal`."""

    def append(self, results: pa.Table) -> object:
        """Commit these rows."""


class Animate:
    """Holds the engines of a worker; draws, encodes, stores and commits a batch, and returns OUTCOME rows.

    Two threads may call it at once: while one batch is on the device, the one before is encoded and committed. A call
    returns only when its batch is in the journal, so what Ray takes for done is done. An exception that is no
    PiaBatchError is taken for the fault of a request, unless the engine fails its own check too.

    Args:
        load_engines: gives the engines; called here, on the worker.
        engine_ids: by model, what the keys were made with; another engine is refused. The first one is loaded at once.
        config: the run's config.
        run_id: recorded in every result.
        control: the run's word on each batch.
        worker: names this worker, and the one that takes its place if it dies.
        die: ends this process, as Ray then gives its batch to another.
        count: adds to a counter of `metrics.METRICS`: its name, a number, its tags by keyword.

    Raises:
        ConfigError: the engine is another one than the driver's, or takes all of `placement.memory_mb` as it is.
        BrokenDeviceError: the engine draws other pixels than it should, or ended its process whenever it was loaded.
    """

    _drawn: tuple[float, float | None] | None = None
    """Seconds of batches that were drawn, and since when another one is; one value, as another thread reads it."""

    def __init__(
        self,
        load_engines: Callable[[], Engines],
        engine_ids: Mapping[str, str],
        config: RunConfig,
        run_id: str,
        control: AttemptControl,
        worker: str = "",
        die: Callable[[], None] = lambda: os._exit(1),
        count: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        started = time.monotonic()
        self._config, self._run_id, self._control, self._die = config, run_id, control, die
        _refuse_to_die_again(control.start(worker))
        self._engines, self._engine_ids = load_engines(), engine_ids
        self._checked: dict[str, weakref.ref[Engine]] = {}
        self._place = self._engine(next(iter(engine_ids))).device
        self._watchdog = Watchdog(control.give_up, die, self._max_bytes())
        store = Store(config.output)
        self._store: Objects = store
        self._journal: Commits = Journal(store)
        self._device, self._encoder = threading.Lock(), threading.Lock()
        self._count, self._idle_since = count, time.monotonic()
        self._drawn = 0.0, None
        seconds = self._idle_since - started
        log.info("engine_ready device=%s seconds=%.1f own_bytes=%d", self._place, seconds, own_bytes())
        control.ready(worker, seconds)

    @property
    def generating_seconds(self) -> float | None:
        """How long its engines have drawn by now, a batch that is on the device included; None: they still load."""
        if self._drawn is None:
            return None
        whole, since = self._drawn
        return whole if since is None else whole + time.monotonic() - since

    def __call__(self, requests: pa.Table) -> pa.Table:
        """One OUTCOME row for each of `requests`; they are committed, or `interrupted` if the run is stopping."""
        if not len(requests):
            return OUTCOME.empty_table()
        keys = requests["key"].to_pylist()
        rows = requests.select([n for n in requests.column_names if n in _NEEDED]).to_pylist()
        with self._device:
            attempts = self._control.begin(keys)
            if attempts is None:
                return _outcomes([_interrupted(key) for key in keys])
            self._count("pia_batch_slots_total", len(rows), state="filled")
            self._count("pia_batch_slots_total", self._config.placement.batch_size - len(rows), state="empty")
            clips = self._draw_together(rows) if max(attempts) == 1 else None
        if clips is None:
            return _outcomes(self._one_by_one(requests, rows))
        with self._encoder:
            return _outcomes(self._finish(requests, rows, clips, attempts))

    def _draw_together(self, rows: list[Row]) -> list[Any] | None:
        """A clip for each row; None where one of them, nobody knows which, makes the engine fail."""
        try:
            return self._draw(rows)
        except PiaBatchError:
            raise
        except Exception:
            log.exception("batch_failed keys=%s", ",".join(row["key"] for row in rows))
        self._leave_if_broken(rows)
        return None

    def _one_by_one(self, requests: pa.Table, rows: list[Row]) -> list[Row]:
        """The outcomes of requests among which one may be poison. Nothing else goes on in this worker meanwhile."""
        outcomes = []
        with self._device, self._encoder:
            for index, row in enumerate(rows):
                turn = self._control.begin_alone(row["key"])
                if turn is None:
                    outcomes.append(_interrupted(row["key"]))
                elif turn.outcome is not None:
                    outcomes.append(turn.outcome)  # committed by a worker that died later in this batch
                else:
                    clips = [self._blamed(turn, row) or self._draw_alone(row)]
                    outcomes += self._finish(requests.slice(index, 1), [row], clips, [turn.attempt])
        return outcomes

    def _blamed(self, turn: SoloAttempt, row: Row) -> RequestError | None:
        """Why a request is not drawn again: it was alone when its worker died, as often as the config allows."""
        if turn.died_of is None:
            return None
        alone = f"{turn.attempt - 2} attempts to draw it alone"
        if turn.died_of == "out_of_memory":
            limit = f"{self._config.placement.memory_mb} MiB of its worker's memory (placement.memory_mb)"
            return DeviceMemoryError(f"took more than {limit}, in the last of {alone}")
        if turn.died_of == "timeout":
            deadline = f"{self._deadline_s([row]):.0f} s, its share of limits.timeout_s"
            return RequestTimeoutError(f"took more than {deadline}, in the last of {alone}")
        return WorkerCrashError(f"its worker died in each of {alone}")

    def _draw_alone(self, row: Row) -> Any:  # a clip, the error of a request, or None without an image
        try:
            return self._draw([row])[0]
        except PiaBatchError:
            raise
        except MemoryError as err:
            return DeviceMemoryError(f"the worker ran out of memory: {message_of(err)}")
        except Exception as err:
            log.exception("request_raised request_id=%s", row["request_id"])
            self._leave_if_broken([row])
            return EngineError(f"the engine raised {type(err).__name__}: {message_of(err)}")

    def _leave_if_broken(self, rows: list[Row]) -> None:
        """End this worker if its device no longer draws what it should: then it is not the request that is to blame."""
        for model in dict.fromkeys(row["model"] for row in rows):
            try:
                self._engine(model).check()
            except Exception:
                log.exception("device_broken device=%s", self._place)
                self._die()

    def _finish(self, requests: pa.Table, rows: list[Row], clips: list[Any], attempts: list[int]) -> list[Row]:
        """Encode, store and commit what was drawn; its results."""
        started = time.monotonic()
        with self._watchdog.over([row["key"] for row in rows], self._deadline_s(rows)):
            results = [
                self._commit(row, clip) | {"attempts": attempt}
                for row, clip, attempt in zip(rows, clips, attempts, strict=True)
            ]
            self._journal.append(self._table(requests, results))
        outcomes = [{name: result.get(name) for name in OUTCOME.names} for result in results]
        self._control.end(outcomes)
        self._count_results(results, time.monotonic() - started)
        return outcomes

    def _count_results(self, results: list[Row], seconds: float) -> None:
        """Count what was committed, and the `seconds` that encoding and committing took."""
        for result in results:
            kind = result.get("error_kind") or ""
            self._count("pia_batch_requests_total", 1, status=result["status"], error_kind=kind)
        stages = {
            stage: sum(result.get(f"{stage}_seconds") or 0.0 for result in results) for stage in ("fetch", "encode")
        }
        for stage, spent in (stages | {"commit": seconds - stages["encode"]}).items():
            self._count("pia_batch_stage_seconds_total", spent, stage=stage)

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Count what the device is busy with, and how long it waited before."""
        started = time.monotonic()
        self._count("pia_batch_device_seconds_total", started - self._idle_since, state="idle", device=self._place)
        before = self.generating_seconds or 0.0
        self._drawn = before, started
        try:
            yield
        finally:
            self._idle_since = time.monotonic()
            busy = self._idle_since - started
            self._drawn = before + busy, None
            self._count("pia_batch_device_seconds_total", busy, state="busy", device=self._place)
            self._count("pia_batch_stage_seconds_total", busy, stage="draw")

    def _deadline_s(self, rows: list[Row]) -> float:
        """How long these rows may take, together."""
        shares = (_work(row) / _REFERENCE_WORK for row in rows if row["width"] is not None)
        return self._config.limits.timeout_s * max(1.0, sum(shares))

    def _max_bytes(self) -> int | None:
        """What this process may take, now that the first engine is loaded: more than it takes already."""
        limit = self._config.placement.memory_mb
        if limit is None:
            return None
        taken = own_bytes()
        if taken >= limit * 2**20:
            msg = (
                f"placement.memory_mb is {limit}, and an engine on {socket.gethostname()} takes {taken // 2**20} MiB "
                "before it draws anything; give it several GiB more than that, or null for no limit"
            )
            raise ConfigError(msg)
        return limit * 2**20

    def _engine(self, model: str) -> Engine:
        """The model's engine. One that was just loaded has to be the expected one, and to draw as it should."""
        engine = self._engines.engine(model)
        known = self._checked.get(model)
        if known is None or known() is not engine:
            if engine.engine_id != self._engine_ids[model]:
                msg = (
                    f"the weights of model {model!r} on this node are others than the driver's: engine "
                    f"{engine.engine_id} instead of {self._engine_ids[model]}; give every node the same weights, or "
                    "pin a hub commit by `revision`"
                )
                raise ConfigError(msg)
            engine.check()
            self._checked[model] = weakref.ref(engine)
        return engine

    def _draw(self, rows: list[Row]) -> list[Any]:
        """A clip for each row, or None where there is no image to draw from."""
        clips: list[Any] = [None] * len(rows)
        drawable = [index for index, row in enumerate(rows) if row["pixels"] is not None]
        for model in dict.fromkeys(rows[index]["model"] for index in drawable):
            engine = self._engine(model)
            chosen = [index for index in drawable if rows[index]["model"] == model]
            shots = [self._shot(engine, rows[index]) for index in chosen]
            mine = [rows[index] for index in chosen]
            with self._watchdog.over([row["key"] for row in mine], self._deadline_s(mine)), self._on_device():
                drawn = engine.animate(shots)
            for index, clip in zip(chosen, drawn, strict=True):
                clips[index] = clip
        return clips

    def _shot(self, engine: Engine, row: Row) -> Any:  # the engine's own class
        settings = {name: row[name] for name in SETTINGS.names if name not in _NOT_DRAWN and row[name] is not None}
        if "motion_curve" in settings:
            settings["motion_curve"] = tuple(settings["motion_curve"])
        if row["ip_adapter_bytes"] is not None:
            limits = self._config.images
            settings["ip_adapter_image"] = images.decode(
                row["ip_adapter_bytes"], max_pixels=limits.max_pixels, background=limits.background
            )
        return engine.shot(image=_condition(row), prompt=row["prompt"], **settings)

    def _commit(self, row: Row, clip: Any) -> Row:
        """The result of one request; its animation is stored when this returns."""
        result: Row = {
            "key": row["key"],
            "status": FAILED,
            "image_sha256": row["fetched_sha256"],
            "fetch_seconds": row["fetch_seconds"],
            "device": self._place,
            "engine_id": self._engine_ids[row["model"]],
            "run_id": self._run_id,
        }
        if clip is None:
            failure = {"error_kind": row["fetch_error_kind"], "error": row["fetch_error"]}
            return result | failure | {"finished_at": datetime.now(UTC)}
        if isinstance(clip, RequestError):
            return result | _failure(clip, row) | {"finished_at": datetime.now(UTC)}
        try:
            result |= {
                "prompt_tokens": clip.prompt_tokens,
                "prompt_truncated": clip.prompt_truncated,
                "gpu_seconds": clip.device_seconds,
            }
            result |= quality.measures(clip.frames, np.asarray(_condition(row)), row["cond_frame"])
            quality.refuse_degenerate(result, row, self._config.limits)
            result |= self._save(row, clip.frames) | {"status": SUCCEEDED}
        except RequestError as err:
            result |= _failure(err, row)
        except PiaBatchError:
            raise
        except MemoryError as err:
            result |= _failure(DeviceMemoryError(f"the worker ran out of memory: {message_of(err)}"), row)
        except Exception as err:
            log.exception("commit_raised request_id=%s", row["request_id"])
            result |= _failure(EngineError(f"the worker raised {type(err).__name__}: {message_of(err)}"), row)
        return result | {"finished_at": datetime.now(UTC)}

    def _save(self, row: Row, frames: npt.NDArray[np.uint8]) -> Row:
        """Encode, decode as a check, store unless it is there already, and tell what is there now."""
        started = time.monotonic()
        metadata = provenance.metadata_of(row, self._config, self._engine_ids[row["model"]])
        data = codecs.encode(frames, row["format"], row["fps"], self._config.encoding, metadata)
        info = quality.check_animation(data, row)
        name = animation_name(row["key"], codecs.CODECS[row["format"]].extension)
        encode_seconds = time.monotonic() - started
        try:
            self._store.create(name, data)
        except ObjectExistsError:
            # Our own earlier attempt, or one that was killed before its commit: first writer wins.
            data = self._store.read(name)
            try:
                info = quality.check_animation(data, row)
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


def _refuse_to_die_again(starts: int) -> None:
    """Say that the engine cannot be loaded here, where loading it has ended this worker's process every time."""
    if starts > MAX_STARTS:
        msg = (
            f"an engine's process has died {starts - 1} times in a row while it started, the last time on "
            f"{socket.gethostname()} or the node before it: too little host memory, or a driver that crashes. Look for "
            "an out-of-memory kill in the system's log, at Ray's worker logs, and try `pia-batch demo` there"
        )
        raise BrokenDeviceError(msg)


_INTERNAL = frozenset({"key", *FETCHED.names})
_NEEDED = frozenset(EFFECTIVE.names) | _INTERNAL
_NOT_DRAWN = frozenset({"fps", "format", "size", "long_side"})


_REFERENCE_WORK = 25 * 16 * 512 * 512
"""Steps x frames x pixels of the request that `limits.timeout_s` is meant for."""


def _work(row: Row) -> int:
    """What a request costs, in the unit of _REFERENCE_WORK."""
    passes = max(1, row["free_init_iters"])
    work: int = row["num_inference_steps"] * passes * row["num_frames"] * row["width"] * row["height"]
    return work


def _failure(err: RequestError, row: Row) -> Row:
    log.warning("request_failed request_id=%s error_kind=%s", row["request_id"], err.kind)
    return {"error_kind": err.kind, "error": str(err)}


def _interrupted(key: str) -> Row:
    return {"key": key, "status": INTERRUPTED}


def _condition(row: Row) -> Image.Image:
    return Image.frombytes("RGB", (row["width"], row["height"]), row["pixels"])


def _outcomes(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist(rows, OUTCOME)
