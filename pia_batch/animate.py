"""The last stage: requests with their images to committed animations. Knows nothing of Ray, and imports no torch.

A request that raises, kills its worker, hangs, or eats the memory fails alone. Whoever was in a batch when that ended
badly is drawn again by itself, and the run's `ledger.Ledger` keeps count across dead workers.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from pia_batch import images, video
from pia_batch.config import ModelConfig, RunConfig
from pia_batch.errors import (
    ConfigError,
    DegenerateError,
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
from pia_batch.journal import Journal, animation_name
from pia_batch.ledger import Turn
from pia_batch.records import FAILED, FETCHED, REQUEST, SETTINGS, SUCCEEDED, Row, results_table
from pia_batch.storage import Store

log = logging.getLogger(__name__)

INTERRUPTED = "interrupted"
"""The status of a request that was not begun because the run is stopping. It never reaches the journal."""

OUTCOME = pa.schema(
    [
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_kind", pa.string()),
        ("error", pa.string()),
    ]
)
"""What `Animate` hands back, after the commit: a few bytes a request."""


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

    def check(self) -> None:
        """Draw a known request, or raise BrokenDeviceError."""

    def animate(self, shots: Sequence[Any]) -> Sequence[Any]:
        """One clip for each shot, in order; a clip that could not be drawn bears its error."""


class Engines(Protocol):
    """What `Animate` needs of `pia_batch.engine.shelf.ModelShelf`."""

    def engine(self, name: str) -> Engine:
        """The engine of a model, loaded if it is not at hand. It may put away another one for that."""


class Control(Protocol):
    """The run's word on each batch: the methods of `ledger.Ledger` that a worker calls, from wherever it is."""

    def begin(self, keys: list[str]) -> list[int] | None:
        """The number of the attempt that starts now for each key, or None if the run is stopping."""

    def begin_alone(self, key: str) -> Turn | None:
        """Whether one of a batch that ended badly may be drawn by itself; None if the run is stopping."""

    def hang(self, keys: list[str]) -> None:
        """The worker is past the deadline of these, and about to end itself."""

    def end(self, outcomes: list[Row]) -> None:
        """These outcomes are committed."""


@dataclass(frozen=True)
class EngineLoader:
    """Makes the shelf of models, on the worker that calls it: the driver never imports torch."""

    models: Mapping[str, ModelConfig]
    device: str
    max_models: int | None

    def __call__(self) -> Engines:
        """The shelf, empty: an engine is loaded when it is asked for."""
        from pia_batch.engine.shelf import ModelShelf

        return ModelShelf(self.models, self.device, max_models=self.max_models)


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
        die: ends this process, as Ray then gives its batch to another.
    """

    def __init__(
        self,
        load_engines: Callable[[], Engines],
        engine_ids: Mapping[str, str],
        config: RunConfig,
        run_id: str,
        control: Control,
        die: Callable[[], None] = lambda: os._exit(1),
    ) -> None:
        self._engines, self._engine_ids = load_engines(), engine_ids
        self._checked: dict[str, weakref.ref[Engine]] = {}
        self._place = self._engine(next(iter(engine_ids))).device
        self._config, self._run_id, self._control, self._die = config, run_id, control, die
        self._store = Store(config.output)
        self._journal = Journal(self._store)
        self._device, self._encoder = threading.Lock(), threading.Lock()

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

    def _blamed(self, turn: Turn, row: Row) -> RequestError | None:
        """Why a request is not drawn again: it was alone when its worker died, as often as the config allows."""
        if turn.died_of is None:
            return None
        alone = f"{turn.attempt - 2} attempts to draw it alone"
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
        with self._watched(rows):
            results = [
                self._commit(row, clip) | {"attempts": attempt}
                for row, clip, attempt in zip(rows, clips, attempts, strict=True)
            ]
            self._journal.append(self._table(requests, results))
        outcomes = [{name: result.get(name) for name in OUTCOME.names} for result in results]
        self._control.end(outcomes)
        return outcomes

    def _deadline_s(self, rows: list[Row]) -> float:
        """How long these rows may take, together."""
        shares = (_work(row) / _REFERENCE_WORK for row in rows if row["width"] is not None)
        return self._config.limits.timeout_s * max(1.0, sum(shares))

    def _give_up(self, keys: list[str]) -> None:
        log.error("deadline_exceeded keys=%s", ",".join(keys))
        try:
            self._control.hang(keys)
        finally:
            self._die()

    @contextmanager
    def _watched(self, rows: list[Row]) -> Iterator[None]:
        """End this worker when the rows' deadline is over: nothing else stops a call that hangs."""
        watchdog = threading.Timer(self._deadline_s(rows), self._give_up, [[row["key"] for row in rows]])
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()

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
            with self._watched([rows[index] for index in chosen]):
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
            result |= measures(clip.frames, np.asarray(_condition(row)), row["cond_frame"])
            self._refuse_degenerate(result, row)
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

    def _refuse_degenerate(self, result: Row, row: Row) -> None:
        """Refuse a clip that shows nothing, or in which nothing happens, past the config's limits."""
        limits = self._config.limits
        for name, least, what in (("frame_std", limits.min_frame_std, "flat"), ("motion", limits.min_motion, "frozen")):
            measured = not (name == "motion" and row["num_frames"] == 1)
            if measured and least is not None and result[name] < least:
                msg = (
                    f"the clip is {what}: its {name} is {result[name]:.3g}, below limits.min_{name} {least:g}; change "
                    "the prompt, the seed or the image, or lower the limit"
                )
                raise DegenerateError(msg)

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


def measures(
    frames: npt.NDArray[np.uint8], condition: npt.NDArray[np.uint8], cond_frame: int = 0
) -> dict[str, float | None]:
    """What can be told of a clip by numbers alone.

    Args:
        frames: uint8, (F, H, W, 3), 0-255.
        condition: the fitted condition image, uint8, (H, W, 3), 0-255.
        cond_frame: the frame that should be that image.

    Returns:
        `frame_mean` and `frame_std` over all pixels; `motion`, the mean absolute difference of neighbouring frames;
        all three in 0-255. `first_frame_psnr_db` of the condition frame against the condition image in dB, None where
        they are identical.
    """
    pixels = frames.astype(np.float32)
    motion = float(np.abs(np.diff(pixels, axis=0)).mean()) if len(frames) > 1 else 0.0
    error = float(np.square(pixels[cond_frame] - condition).mean())
    return {
        "frame_mean": float(pixels.mean()),
        "frame_std": float(pixels.std()),
        "motion": motion,
        "first_frame_psnr_db": None if error == 0 else 10 * float(np.log10(255**2 / error)),
    }


_INTERNAL = frozenset({"key", *FETCHED.names})
_NEEDED = frozenset({"request_id", "prompt", "model", *SETTINGS.names, *_INTERNAL})
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
