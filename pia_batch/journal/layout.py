"""Layout of an output: the name of every object below it, and the patterns by which this package recognizes its own.

    animations/<key[:2]>/<key>.<extension>     one object per animation
    animations/<key[:2]>/<key>.jpg             its poster, if it has one
    results/<run_id>/part-<number>.parquet     one row per request of that run's manifest
    results/<run_id>/_SUCCESS.json             written last: the results of the run are complete
    results/LATEST.json                        points at the newest complete results
    metadata.parquet, README.md                the newest complete results as a Hugging Face dataset
    evaluations/<id>/part-<number>.parquet     one row per request of the evaluated results
    evaluations/<id>/_SUCCESS.json             written last: the evaluation is complete; summary.json is next to it
    evaluations/<id>/_evaluation.json          what is measured, and of which results
    evaluations/<id>/_pieces/<number>.parquet  rows that are measured so far; the parts repeat them
    _journal/<hash>.parquet                    the fragments of the commit log
    _journal/index/                            packs of fragments, see `pack_index`
    _journal/create-only                       probe: the store creates an object only where none exists
    _withdrawn/<hash>.parquet                  tombstones: rows of fragments that no longer count
    _scans/<identity>/                         packs of scanned manifest files, see `planning.scan_cache`
    _locations/<hash>.json                     versions of manifest files, where ids are locations: see `row_locations`
    _runs/<run_id>/run.json, report.html       the record and the page of a run
    _runs/doctor.json                          probe of `pia-batch doctor`, deleted again
    _lease/<generation>.json                   the lease of the output

Names are relative to the output's URI. Readers such as Spark, DuckDB and pyarrow skip names that begin with `_`.
"""

from __future__ import annotations

import re

ANIMATIONS = "animations/"
RESULTS = "results/"
LATEST_RESULTS = f"{RESULTS}LATEST.json"
DATASET_TABLE = "metadata.parquet"
DATASET_CARD = "README.md"
EVALUATIONS = "evaluations/"
FRAGMENTS = "_journal/"
FRAGMENT_INDEX = f"{FRAGMENTS}index/"
CREATE_ONLY_PROBE = f"{FRAGMENTS}create-only"
TOMBSTONES = "_withdrawn/"
SCAN_CACHES = "_scans/"
ROW_LOCATIONS = "_locations/"
RUNS = "_runs/"
DOCTOR_PROBE = f"{RUNS}doctor.json"
LEASES = "_lease/"

PREFIXES = (
    ANIMATIONS,
    RESULTS,
    EVALUATIONS,
    FRAGMENTS,
    TOMBSTONES,
    LEASES,
    SCAN_CACHES,
    ROW_LOCATIONS,
    RUNS,
    DATASET_TABLE,
    DATASET_CARD,
)
"""Every prefix to which this package writes, and its two files outside of them: together all that it stores."""

RUN_PREFIXES = (FRAGMENTS, RUNS, LEASES)
"""The prefixes that hold objects as soon as any run has begun."""

RUN_ID = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""Pattern of a run id: the name of a folder on every store."""

_ANIMATION = re.compile(rf"{ANIMATIONS}([0-9a-f]{{2}})/(\1[0-9a-f]{{30}})\.[a-z0-9]+")
_EVALUATION = re.compile(rf"{EVALUATIONS}({RUN_ID})/(?:_pieces/)?[^/]+")
_EVALUATION_PIECE = re.compile(rf"{EVALUATIONS}{RUN_ID}/_pieces/([0-9]+)\.parquet")
_FRAGMENT = re.compile(rf"{FRAGMENTS}[^/]+\.parquet")
_LEASE = re.compile(rf"{LEASES}([0-9]{{12}})\.json")
_RESULT = re.compile(rf"{RESULTS}({RUN_ID})/[^/]+")
_RUN_RECORD = re.compile(rf"{RUNS}[^/]+/run\.json")
_SCAN_CACHE = re.compile(rf"{SCAN_CACHES}([0-9a-f]{{32}})/[^/]+\.(?:json|parquet)")


def animation_name(key: str, extension: str) -> str:
    """Return the name of the animation of a key; the key is hexadecimal, so no manifest can choose a path."""
    return f"{ANIMATIONS}{key[:2]}/{key}.{extension}"


def poster_name(key: str) -> str:
    """Return the name of the poster of a key's animation."""
    return animation_name(key, "jpg")


def is_poster(name: str) -> bool:
    """Return whether an object of an animation's name is its poster."""
    return name.endswith(".jpg")


def animation_name_in(animation_uri: str) -> str:
    """Return the name part of an `animation_uri` or a `poster_uri`.

    Its output may have been moved as a whole since it was written.
    """
    return ANIMATIONS + "/".join(animation_uri.rsplit("/", 2)[-2:])


def animation_key(name: str) -> str | None:
    """Return the key in the name of an animation or a poster, or None for any other object."""
    match = _ANIMATION.fullmatch(name)
    return match[2] if match else None


def results_folder(run_id: str) -> str:
    """Return the name of the folder of a run's results, without a final slash."""
    return f"{RESULTS}{run_id}"


def results_part(run_id: str, number: int) -> str:
    """Return the name of one Parquet file of a run's results."""
    return f"{results_folder(run_id)}/part-{number:05d}.parquet"


def success_marker(run_id: str) -> str:
    """Return the name of the object that marks the results of a run as complete."""
    return f"{results_folder(run_id)}/_SUCCESS.json"


def results_run_id(name: str) -> str | None:
    """Return the run id in the name of an object of a results folder, or None for any other object."""
    match = _RESULT.fullmatch(name)
    return match[1] if match else None


def evaluation_folder(evaluation_id: str) -> str:
    """Return the name of the folder of an evaluation, without a final slash."""
    return f"{EVALUATIONS}{evaluation_id}"


def evaluation_part(evaluation_id: str, number: int) -> str:
    """Return the name of one Parquet file of an evaluation."""
    return f"{evaluation_folder(evaluation_id)}/part-{number:05d}.parquet"


def evaluation_success(evaluation_id: str) -> str:
    """Return the name of the object that marks an evaluation as complete."""
    return f"{evaluation_folder(evaluation_id)}/_SUCCESS.json"


def evaluation_summary(evaluation_id: str) -> str:
    """Return the name of the summary of an evaluation."""
    return f"{evaluation_folder(evaluation_id)}/summary.json"


def evaluation_record(evaluation_id: str) -> str:
    """Return the name of the object that says what an evaluation measures."""
    return f"{evaluation_folder(evaluation_id)}/_evaluation.json"


def evaluation_pieces(evaluation_id: str) -> str:
    """Return the prefix of the pieces of an evaluation, with its final slash."""
    return f"{evaluation_folder(evaluation_id)}/_pieces/"


def evaluation_piece(evaluation_id: str, number: int) -> str:
    """Return the name of one piece of an evaluation."""
    return f"{evaluation_pieces(evaluation_id)}{number:08d}.parquet"


def evaluation_piece_number(name: str) -> int | None:
    """Return the number in the name of a piece of an evaluation, or None for any other object."""
    match = _EVALUATION_PIECE.fullmatch(name)
    return int(match[1]) if match else None


def evaluation_id(name: str) -> str | None:
    """Return the id of the evaluation that an object belongs to, or None for any other object."""
    match = _EVALUATION.fullmatch(name)
    return match[1] if match else None


def fragment_name(digest: str) -> str:
    """Return the name of the fragment with this content hash, in hexadecimal."""
    return f"{FRAGMENTS}{digest}.parquet"


def is_fragment(name: str) -> bool:
    """Return whether an object is a fragment of the commit log."""
    return _FRAGMENT.fullmatch(name) is not None


def tombstone_name(digest: str) -> str:
    """Return the name of the tombstone with this content hash, in hexadecimal."""
    return f"{TOMBSTONES}{digest}.parquet"


def scan_cache_folder(identity: str) -> str:
    """Return the prefix of the scan cache with this identity (32 hexadecimal digits), with its final slash."""
    return f"{SCAN_CACHES}{identity}/"


def scan_cache_identity(name: str) -> str | None:
    """Return the identity of the scan cache that an object belongs to, or None for any other object."""
    match = _SCAN_CACHE.fullmatch(name)
    return match[1] if match else None


def row_locations_name(digest: str) -> str:
    """Return the name of the record of manifest files with this content hash, in hexadecimal."""
    return f"{ROW_LOCATIONS}{digest}.json"


def run_record_name(run_id: str) -> str:
    """Return the name of a run's record."""
    return f"{RUNS}{run_id}/run.json"


def is_run_record(name: str) -> bool:
    """Return whether an object is the record of a run."""
    return _RUN_RECORD.fullmatch(name) is not None


def report_name(run_id: str, selection: str = "") -> str:
    """Return the name of a run's page, or of the page of a selection of its requests, named by a hash."""
    return f"{RUNS}{run_id}/report{selection and '-'}{selection}.html"


def lease_name(generation: int) -> str:
    """Return the name of a generation of the lease."""
    return f"{LEASES}{generation:012d}.json"


def lease_generation(name: str) -> int | None:
    """Return the generation in the name of a lease, or None for any other object."""
    match = _LEASE.fullmatch(name)
    return int(match[1]) if match else None
