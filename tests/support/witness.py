"""Independent checks of an output by pyarrow, Pillow and PyAV alone.

Nothing of pia_batch is imported: an error there cannot hide itself here.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from PIL import Image, ImageSequence

Row = dict[str, Any]

IMMUTABLE = ("animations", "_journal", "_lease")
"""Folders whose objects are created once and never change."""


def fetch(path: str, folder: Path, filesystem: pyarrow.fs.FileSystem) -> Path:
    """Copy the output at `path` of a store into `folder`, for the other functions to read, and return `folder`.

    Args:
        path: Bucket and prefix.
        folder: New folder.
        filesystem: File system of the store.
    """
    folder.mkdir(parents=True)
    pyarrow.fs.copy_files(path, str(folder), source_filesystem=filesystem)
    return folder


def results(output: Path) -> tuple[list[Row], list[str]]:
    """Return the rows that `results/LATEST.json` leads to, and the problems on the way there."""
    try:
        run_id = json.loads((output / "results" / "LATEST.json").read_text())["run_id"]
        folder = output / "results" / run_id
        success = json.loads((folder / "_SUCCESS.json").read_text())
    except FileNotFoundError as err:
        return [], [f"no published results: {err.filename} is missing"]
    tables = [pq.read_table(pa.BufferReader((folder / part["name"]).read_bytes())) for part in success["parts"]]
    rows = [row for table in tables for row in table.to_pylist()]
    counted = Counter(row["status"] for row in rows)
    problems = []
    if [len(table) for table in tables] != [part["rows"] for part in success["parts"]]:
        problems.append("_SUCCESS.json counts other rows than its parts have")
    if (len(rows), counted["succeeded"], counted["failed"]) != (
        success["requests"],
        success["succeeded"],
        success["failed"],
    ):
        problems.append(f"_SUCCESS.json has {success['succeeded']} + {success['failed']} and its parts have {counted}")
    return rows, problems


def missing_or_doubled(rows: list[Row], request_ids: Mapping[str, int]) -> list[str]:
    """List request ids and keys whose number of results is wrong; `request_ids` has the expected numbers."""
    found = Counter(row["request_id"] for row in rows)
    problems = [
        f"request {name} has {found[name]} results instead of {request_ids.get(name, 0)}"
        for name in sorted({*found, *request_ids})
        if found[name] != request_ids.get(name, 0)
    ]
    keys = Counter(row["key"] for row in rows)
    return problems + [f"key {key} has {count} results" for key, count in keys.items() if count > 1]


def false_successes(rows: list[Row], output: Path) -> list[str]:
    """List succeeded results whose animation is missing or differs from the result."""
    problems = []
    for row in rows:
        if row["status"] != "succeeded":
            continue
        path = output / "animations" / row["key"][:2] / row["animation_uri"].rpartition("/")[2]
        if not path.is_file():
            problems.append(f"{row['request_id']} succeeded and {path.name} is missing")
            continue
        data = path.read_bytes()
        if (len(data), hashlib.sha256(data).hexdigest()) != (row["num_bytes"], row["sha256"]):
            problems.append(f"{row['request_id']} succeeded and {path.name} has another size or sha256")
            continue
        wanted = [(row["width"], row["height"])] * row["num_frames"]
        try:
            sizes = frame_sizes(data, row["format"])
        except Exception as err:  # noqa: BLE001 - decoders raise almost anything
            sizes = [(type(err).__name__, str(err))]
        if sizes != wanted:
            problems.append(f"{row['request_id']} succeeded and {path.name} has frames {sizes} instead of {wanted}")
    return problems


def frame_sizes(data: bytes, file_format: str) -> list[tuple[Any, Any]]:
    """Decode every frame and return its width and height."""
    if file_format == "mp4":
        with av.open(io.BytesIO(data)) as container:
            return [(frame.width, frame.height) for frame in container.decode(video=0)]
    if file_format == "png_zip":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = [archive.read(name) for name in archive.namelist() if name.endswith(".png")]
        return [size for file in files for size in _sizes(file)]
    return _sizes(data)


def _sizes(file: bytes) -> list[tuple[Any, Any]]:
    with Image.open(io.BytesIO(file)) as picture:
        return [frame.convert("RGB").size for frame in ImageSequence.Iterator(picture)]


def outcomes(output: Path) -> set[tuple[str, str, str, str | None]]:
    """Return request id, key, status and error kind of every published result."""
    return {(row["request_id"], row["key"], row["status"], row["error_kind"]) for row in results(output)[0]}


def orphans(output: Path) -> list[str]:
    """List animations that no succeeded result has."""
    succeeded = {row["key"] for row in results(output)[0] if row["status"] == "succeeded"}
    return [f"orphan {key}" for key in sorted(animated_keys(output) - succeeded)]


def objects(output: Path) -> dict[str, str]:
    """Return the sha256 of every object that must never change, by its name."""
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in IMMUTABLE
        for path in (output / folder).rglob("*")
        if path.is_file()
    }


def animated_keys(output: Path) -> set[str]:
    """Return the keys of all animations, with or without a result."""
    return {path.stem for path in (output / "animations").rglob("*") if path.is_file()}
