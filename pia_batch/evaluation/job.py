"""`pia_batch.evaluate`: measures the animations of a run by a Ray Data job, and publishes one row for each request.

    parts of the results → pieces of a few rows → EvaluateActor (which commits each piece)

Each piece is one object that is created once, so a job that was killed at any moment continues where it was.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data

from pia_batch import __version__
from pia_batch.config.execution import PlacementConfig
from pia_batch.driver import ray_cluster
from pia_batch.driver.job_batches import batches_of
from pia_batch.errors import ConfigError
from pia_batch.evaluation import network_files, publication, work
from pia_batch.evaluation.actor import MEASURED, PIECE, EvaluateActor, piece_row
from pia_batch.evaluation.clips import ClipReader
from pia_batch.evaluation.evaluator import threads_for
from pia_batch.evaluation.flow import require_opencv
from pia_batch.evaluation.measures import EvaluationRequest
from pia_batch.evaluation.network_files import NetworkFiles, NetworkSource
from pia_batch.evaluation.publication import Evaluation
from pia_batch.evaluation.work import Piece, RunResults
from pia_batch.journal import layout
from pia_batch.pipeline import ray_data
from pia_batch.pipeline.attempts_actor import RemoteAttemptControl, start_attempt_tracker
from pia_batch.storage.object_store import Store

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""Largest number of attempts at a clip whose worker dies: the first one in its piece, the others alone."""

CLIP_TIMEOUT_S = 300.0
"""Time limit for each clip by default, in seconds. Nothing else ends a decoder or a read that hangs."""

TASKS_IN_FLIGHT = 2
"""Pieces at or queued before one worker, so that it never waits for the next one."""


@dataclass(frozen=True)
class EvaluationProgress:
    """Progress of an evaluation.

    Attributes:
        requests: Number of requests.
        done: Number of them that are measured, earlier starts included.
        errors: Number of rows with an error in this start.
        frames_per_second: Frames that were measured in this start, by its seconds so far, the start of Ray included.
    """

    requests: int
    done: int
    errors: int = 0
    frames_per_second: float = 0.0


def evaluate(  # noqa: PLR0913 - one for each choice of the caller, by keyword
    output: str,
    *,
    run_id: str | None = None,
    evaluation_id: str | None = None,
    clip: str | None = None,
    clip_revision: str | None = None,
    dino: str | None = None,
    dino_revision: str | None = None,
    flow: bool = True,
    clip_timeout_s: float = CLIP_TIMEOUT_S,
    placement: PlacementConfig | None = None,
    on_progress: Callable[[EvaluationProgress], None] = lambda _: None,
) -> Evaluation:
    """Measure every animation of a run, and publish `evaluations/<id>/`. Do nothing if that is complete.

    Args:
        output: URI of the output.
        run_id: Run with complete results; None: the newest.
        evaluation_id: Name of the evaluation; None: one made from the measures, the networks and the results.
        clip: CLIPModel to measure with: a folder, `owner/name` on the hub, or the URI of an object store; None: none.
        clip_revision: Hub commit, tag or branch of it.
        dino: ViT to measure with, as `clip`.
        dino_revision: Hub commit, tag or branch of it.
        flow: Measure what needs optical flow; needs OpenCV.
        clip_timeout_s: Time limit for each clip, in seconds. A clip that exceeds it three times is a row with the kind
            `timeout`; a clip of 1,024 frames of 512 x 512 needs about a minute of a CPU for its optical flow.
        placement: Number of workers, and the resources of each; None: one worker on the CPU.
        on_progress: Called whenever a piece is committed.

    Raises:
        ConfigError: There are no such results, a network is unsuitable, or OpenCV is missing; raised before Ray starts.
        StorageError: The store refused or did not answer, or results are damaged.
        InterruptedRunError: Ray has ended or lost workers for good, or the store went away; start again to continue.
        AccountingError: The evaluation does not have one row for each request.
    """
    if not 0 < clip_timeout_s < math.inf:
        msg = f"--clip-timeout: invalid value (got {clip_timeout_s:g}, expected seconds above 0)"
        raise ConfigError(msg)
    place, store = placement or PlacementConfig(), Store(output)
    if flow:
        require_opencv()
    results = RunResults.open(store, run_id)
    sources = [NetworkSource("clip", clip, clip_revision)] if clip is not None else []
    sources += [NetworkSource("dino", dino, dino_revision)] if dino is not None else []
    networks = {source.role: network_files.find(source) for source in sources}
    identities = {str(role): files.identity() for role, files in networks.items()}
    request = EvaluationRequest(results.run_id, results.digest, flow, identities)
    evaluation_id = _checked(evaluation_id) or request.default_id()
    piece_rows = work.begin(store, evaluation_id, request, results.num_rows, place.max_engines)
    complete = publication.read(store, evaluation_id)
    if complete is not None:
        return complete
    pieces = list(results.pieces(piece_rows))
    finished = work.finished_pieces(store, evaluation_id)
    pending = [piece for piece in pieces if piece.number not in finished]
    counted = _Counter(results.num_rows, sum(piece.num_rows for piece in pieces) - sum(p.num_rows for p in pending))
    on_progress(counted.progress())
    if pending:
        arguments = {
            "store": store,
            "evaluation_id": evaluation_id,
            "reader": ClipReader(store, results.folder, results.images),
            "timeout_s": clip_timeout_s,
            "names": request.names,
            "networks": {role: (files.pinned(), files.identity()) for role, files in networks.items()},
        }
        with ray_cluster.connect(place):
            _measure(results, pending, place, arguments, lambda done: on_progress(counted.add(done)))
    about = {
        "seconds": round(counted.seconds, 1),
        "frames": counted.frames,
        "sources": {role: _named(files) for role, files in networks.items()},
    }
    return publication.publish(results, evaluation_id, request, pieces, about)


def _measure(
    results: RunResults,
    pending: Sequence[Piece],
    place: PlacementConfig,
    arguments: Mapping[str, Any],
    on_measured: Callable[[pa.Table], None],
) -> None:
    """Measure and commit these pieces.

    Raises:
        InterruptedRunError: Ray has ended or lost workers for good, or the store went away.
    """
    control = start_attempt_tracker(MAX_ATTEMPTS, returns_outcomes=False)
    dataset = _chain(results, pending, place, dict(arguments), control)
    for measured in batches_of(dataset):
        on_measured(measured)


def _chain(
    results: RunResults,
    pending: Sequence[Piece],
    place: PlacementConfig,
    arguments: dict[str, Any],
    control: RemoteAttemptControl,
) -> ray.data.Dataset:
    """Return the whole job as a lazy Dataset of rows of `actor.MEASURED`, one for each piece."""
    ray_data.configure()
    by_part: dict[str, list[Piece]] = {}
    for piece in pending:
        by_part.setdefault(piece.part, []).append(piece)
    reader = _PieceReader(results, by_part)
    parts = ray.data.from_items([{"part": part} for part in by_part], override_num_blocks=len(by_part))
    pieces = parts.map_batches(reader, batch_size=1, batch_format="pyarrow", num_cpus=ray_data.READ_CPUS)
    pieces = pieces.repartition(target_num_rows_per_block=1, strict=True)
    arguments |= {
        "driver_version": __version__,
        "control": control,
        "device": "cuda" if place.num_gpus else "cpu",
        "threads": threads_for(place.num_cpus),
        "batch_size": place.batch_size,
    }
    return pieces.map_batches(
        EvaluateActor,
        fn_constructor_kwargs=arguments,
        batch_size=1,
        batch_format="pyarrow",
        num_gpus=place.num_gpus,
        num_cpus=place.num_cpus,
        memory=None if place.memory_mb is None else place.memory_mb * 2**20,
        compute=ray.data.ActorPoolStrategy(
            min_size=place.min_engines, max_size=place.max_engines, max_tasks_in_flight_per_actor=TASKS_IN_FLIGHT
        ),
    )


class _PieceReader:
    """Stage that reads the pieces of the parts in a batch. The pieces of a worker's own part are all that it needs."""

    def __init__(self, results: RunResults, pieces: Mapping[str, Sequence[Piece]]) -> None:
        self._results, self._pieces = results, pieces

    def __call__(self, parts: pa.Table) -> Iterator[pa.Table]:
        """Yield one row of `actor.PIECE` for each piece."""
        for part in parts["part"].to_pylist():
            for piece, table in work.tables_of(self._results, part, self._pieces[part]):
                yield pa.Table.from_pylist([piece_row(piece.number, table)], schema=PIECE)


class _Counter:
    """Counter of what is measured, and of the time since it was made."""

    def __init__(self, requests: int, done_before: int) -> None:
        self._requests, self._done, self._errors = requests, done_before, 0
        self.frames = 0
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def add(self, measured: pa.Table) -> EvaluationProgress:
        """Add rows of `actor.MEASURED`."""
        rows, frames, errors = (sum(measured[name].to_pylist()) for name in MEASURED.names[1:])
        self._done, self.frames, self._errors = self._done + rows, self.frames + frames, self._errors + errors
        return self.progress()

    def progress(self) -> EvaluationProgress:
        """Return the progress so far."""
        return EvaluationProgress(self._requests, self._done, self._errors, self.frames / max(self.seconds, 1e-9))


def _checked(evaluation_id: str | None) -> str | None:
    if evaluation_id is not None and not re.fullmatch(rf"(?=.{{1,128}}\Z){layout.RUN_ID}", evaluation_id):
        msg = (
            f"--id: invalid value (got {evaluation_id!r}, expected up to 128 letters, digits, '.', '_' and '-', the "
            "first a letter or a digit)"
        )
        raise ConfigError(msg)
    return evaluation_id


def _named(files: NetworkFiles) -> dict[str, str | None]:
    pinned = files.pinned()
    return {"name": pinned.name, "revision": pinned.revision}
