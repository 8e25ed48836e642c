"""Evaluator of a worker: measures clips, several at a time. It does not use Ray.

Clips are read, decoded and measured by threads, while the networks embed the frames of earlier ones: decoding, optical
flow and a GPU work at the same time. At most a few clips are in memory.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pia_batch.errors import ConfigError, StorageError, message_of
from pia_batch.evaluation import network_files, similarity
from pia_batch.evaluation.clips import FAILED_MEASURE, ClipError, ClipReader, cond_frame, prompt_keys, rows_of
from pia_batch.evaluation.flow import FlowMeasures
from pia_batch.evaluation.measures import row_schema
from pia_batch.evaluation.network_files import NetworkSource
from pia_batch.evaluation.pixels import pixel_measures
from pia_batch.schema.columns import Row
from pia_batch.storage.concurrency import map_in_threads

log = logging.getLogger(__name__)


@dataclass
class LoadedClip:
    """Clip on its way to the networks: what is measured so far, and what they take.

    Attributes:
        row: Result of the clip.
        measured: Columns of its row of the evaluation.
        pixels: Prepared frames of each network, by role.
        image: Prepared condition image of each network, by role; missing where there is none.
    """

    row: Row
    measured: Row
    pixels: dict[str, Any] = field(default_factory=dict)
    image: dict[str, Any] = field(default_factory=dict)


class Evaluator:
    """Measures of clips, on one device.

    Args:
        reader: Reader of the clips.
        names: Measures, in the order of their columns.
        networks: Networks in use, at their commits, with the identity that the driver found, by role.
        device: Device of the networks, `cuda` or `cpu`.
        threads: Number of clips that are read, decoded and measured at a time.
        batch_size: Number of clips whose frames are embedded together.

    Raises:
        ConfigError: A network cannot be loaded, or is another one than the driver's.
    """

    def __init__(
        self,
        reader: ClipReader,
        names: Sequence[str],
        networks: Mapping[str, tuple[NetworkSource, Mapping[str, Any]]],
        device: str,
        threads: int,
        batch_size: int,
    ) -> None:
        self._reader, self._names = reader, list(names)
        self._has_flow = "warp_error" in names
        self._threads, self._batch_size = threads, batch_size
        self._networks = _loaded(networks, device)
        self._flow = threading.local()
        self._device = threading.Lock()

    def __call__(self, results: pa.Table) -> pa.Table:
        """Return one row of `measures.row_schema` for each row of `results`, in order."""
        clips = map_in_threads(self._load, rows_of(results), self._threads)
        rows = [clip.measured for batch in _batches(clips, self._batch_size) for clip in self._embedded(batch)]
        return pa.Table.from_pylist(rows, schema=row_schema(self._names))

    def failed(self, results: pa.Table, kind: str, error: str) -> pa.Table:
        """Return rows without measures for `results`."""
        rows = [row | {"error_kind": kind, "error": error} for row in results.select(["request_id", "key"]).to_pylist()]
        return pa.Table.from_pylist(rows, schema=row_schema(self._names))

    def _load(self, row: Row) -> LoadedClip:
        """Read and measure a clip, and prepare it for the networks; an error is a column of it."""
        clip = LoadedClip(row, {"request_id": row["request_id"], "key": row["key"]})
        try:
            frames = self._reader.frames(row)
            clip.measured |= pixel_measures(frames)
            if self._has_flow:
                if not hasattr(self._flow, "measures"):
                    self._flow.measures = FlowMeasures()
                clip.measured |= self._flow.measures(frames, row["fps"])
            clip.pixels = {role: network.prepare(frames) for role, network in self._networks.items()}
            if self._networks:
                image = self._reader.image(row)
                clip.image = {role: network.prepare(image) for role, network in self._networks.items()}
        except ClipError as err:
            clip.measured |= {"error_kind": err.kind, "error": str(err)}
        except StorageError:
            raise
        except Exception as err:
            log.exception("measure_failed key=%s", row["key"])
            clip.measured |= {"error_kind": FAILED_MEASURE, "error": f"{type(err).__name__}: {message_of(err)}"}
        return clip

    def _embedded(self, clips: list[LoadedClip]) -> list[LoadedClip]:
        """Add what the networks measure."""
        for role, network in self._networks.items():
            with_frames = [clip for clip in clips if role in clip.pixels]
            if not with_frames:
                continue
            parts = [part for clip in with_frames for part in (clip.pixels[role], *_given(clip.image, role))]
            with self._device:
                vectors = network.embed(parts)
            starts = itertools.accumulate((len(part) for part in parts), initial=0)
            pieces = iter([vectors[start : start + len(part)] for start, part in zip(starts, parts, strict=False)])
            for clip in with_frames:
                frames = next(pieces)
                image = next(pieces) if role in clip.image else None
                clip.measured |= self._likeness(role, clip.row, frames, image)
        return clips

    def _likeness(
        self, role: str, row: Row, frames: similarity.Vectors, image: similarity.Vectors | None
    ) -> dict[str, float | None]:
        if role == "dino":
            found = None if image is None else similarity.image_to_video(image, frames)
            return {"dino_subject_consistency": similarity.consistency(frames), "dino_i2v": found}
        keys = prompt_keys(row)
        nearest = similarity.nearest_prompts([start for start, _ in keys], len(frames))
        with self._device:
            prompts = self._networks[role].embed_prompts([prompt for _, prompt in keys])
        alike = {} if image is None else similarity.likeness_to_image(image, frames, cond_frame(row))
        return alike | {
            "clip_t": similarity.likeness_to_prompts(prompts, frames, nearest),
            "subject_consistency": similarity.consistency(frames),
        }


def threads_for(num_cpus: float) -> int:
    """Return the number of clips that a worker with these CPUs measures at a time: one waits for the store."""
    return math.ceil(num_cpus) + 1


def _loaded(networks: Mapping[str, tuple[NetworkSource, Mapping[str, Any]]], device: str) -> dict[str, Any]:
    """Load the networks, if there are any: without one, torch is not imported."""
    if not networks:
        return {}
    from pia_batch.evaluation import networks as torch_networks  # noqa: PLC0415 - see above

    loaded = {}
    makers: dict[str, Callable[..., Any]] = {"clip": torch_networks.ClipNetwork, "dino": torch_networks.ImageNetwork}
    for role, (source, identity) in networks.items():
        files = network_files.find(source)
        if files.identity() != identity:
            msg = (
                f"--{role}: {source.name} has other files on this node than where the evaluation was started; copy them"
            )
            raise ConfigError(msg)
        loaded[role] = makers[role](files, device)
    return loaded


def _batches(clips: Iterable[LoadedClip], size: int) -> Iterator[list[LoadedClip]]:
    iterator = iter(clips)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _given(images: Mapping[str, Any], role: str) -> list[Any]:
    return [images[role]] if role in images else []
