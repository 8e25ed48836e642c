"""WebDataset: tar files in which each animation is next to its columns (`.json`), prompt (`.txt`), poster (`.jpg`)."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from typing import Any

from pia_batch.datasets.export_formats import ExportFormat, ShardTarget
from pia_batch.datasets.export_rows import Batch
from pia_batch.schema import plain_values, python_values


def write(batches: Iterator[Batch], target: ShardTarget) -> int:
    """Write one tar file. Members carry no time and no user, so that the same rows give the same bytes."""
    path = target.folder / "shard.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for batch in batches:
            for row, prompt, clip in zip(python_values.of_rows(batch.rows), batch.prompts, batch.clips, strict=True):
                _add(tar, clip.name, clip.data)
                if clip.poster is not None:
                    _add(tar, f"{clip.key}.jpg", clip.poster)
                _add(tar, f"{clip.key}.json", to_json(row))
                _add(tar, f"{clip.key}.txt", prompt.encode())
    return target.put(path)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # mtime 0, uid 0
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def to_json(row: dict[str, Any]) -> bytes:
    """Return a row as one line of JSON; times in ISO 8601, NaN and infinity as null, bytes in hexadecimal."""
    return json.dumps(plain_values.of_any(row), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


WEBDATASET: ExportFormat = ExportFormat(
    "webdataset",
    "tar files `part-00000.tar` with the members KEY.mp4, KEY.json, KEY.txt and, of a poster, KEY.jpg",
    write,
    "part-{:05d}.tar".format,
    one_media=False,
    posters=True,
)
