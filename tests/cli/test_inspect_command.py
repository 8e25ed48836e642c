"""`pia-batch inspect`, as an operator and a scheduler see it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inputs import requests_table

from pia_batch import cli
from pia_batch.config import FORMATS, Format, RunConfig
from pia_batch.manifest.validation import check
from pia_batch.media import codecs, provenance
from pia_batch.planning.plan import make_plan
from pia_batch.schema.keys import KeySet
from pia_batch.storage.object_store import Store

MakeConfig = Callable[..., RunConfig]


def pia_batch(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    return int(left.value.code or 0)


def animation(config: RunConfig, fmt: Format, **columns: Any) -> bytes:
    """Return the animation file of the first request of a manifest."""
    engines = make_plan(config).engine_ids
    (row,) = check(requests_table(1, format=[fmt], **columns), config, engines).requests.to_pylist()
    row["fetched_sha256"] = "ab" * 32
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    return codecs.encode(frames, fmt, 8, config.encoding, provenance.metadata_of(row, config, engines["default"]))


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_row_that_it_prints_is_the_same_request_to_plan(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], fmt: Format
) -> None:
    columns = {"seed": [5], "prompt": ["línes\nand :smile: [bold]\x1b"], "motion": ["large"]}
    config = make_config(requests_table(1, format=[fmt], **columns))
    (tmp_path / "clip").write_bytes(animation(config, fmt, **columns))

    assert pia_batch("inspect", str(tmp_path / "clip"), "--manifest-row") == 0
    (tmp_path / "again.jsonl").write_text(capsys.readouterr().out)

    again = make_plan(config.model_copy(update={"manifest": str(tmp_path / "again.jsonl")}))
    first = make_plan(config)
    assert (again.num_pending, again.num_rejected) == (1, 0)
    assert same(first.wanted, again.wanted)


def same(one: KeySet, other: KeySet) -> bool:
    return bool(np.array_equal(one.high, other.high) and np.array_equal(one.low, other.low))


def test_it_shows_everything_to_people_and_to_programs(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "clip.mp4").write_bytes(animation(make_config(), "mp4", seed=[5]))

    assert pia_batch("inspect", str(tmp_path / "clip.mp4")) == 0
    printed = capsys.readouterr().out
    assert pia_batch("inspect", (tmp_path / "clip.mp4").as_uri(), "--json") == 0
    payload = json.loads(capsys.readouterr().out)

    assert "prompt               a red circle moving left, number 0\n" in printed
    assert "seed                 5\n" in printed
    assert "trainedAlgorithmicMedia" in printed
    assert payload["provenance"]["prompt"] == payload["manifest_row"]["prompt"] == "a red circle moving left, number 0"
    assert payload["provenance"]["schema_version"] == 1


def test_it_reads_from_the_output_of_a_run_by_uri(
    store: Store, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    store.create("animations/ab/abc.gif", animation(make_config(), "gif"))

    assert pia_batch("inspect", store.uri_of("animations/ab/abc.gif"), "--manifest-row") == 0
    assert json.loads(capsys.readouterr().out)["request_id"] == "r000"


@pytest.mark.s3
def test_it_reads_from_object_storage(s3: str, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    Store(s3).create("animations/ab/abc.webp", animation(make_config(), "webp"))

    assert pia_batch("inspect", f"{s3}/animations/ab/abc.webp") == 0
    assert "request_id           r000" in capsys.readouterr().out
    assert pia_batch("inspect", f"{s3}/animations/ab/none.webp") == 2
    assert "does not exist" in capsys.readouterr().err


def test_it_warns_of_what_the_row_lacks(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = animation(make_config(), "gif", image=["https://host/cat.png?X-Amz-Signature=hunter2"])
    (tmp_path / "clip.gif").write_bytes(data)

    assert pia_batch("inspect", str(tmp_path / "clip.gif"), "--manifest-row") == 0

    printed = capsys.readouterr()
    assert json.loads(printed.out)["image"] == "https://host/cat.png"
    assert "the credentials in column 'image' are not in the file" in printed.err
    assert "hunter2" not in printed.out + printed.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        (b"", "not a GIF, an MP4, a WebM, a WebP, a PNG or a zip"),
        (b"%PDF-1.7", "not a GIF, an MP4, a WebM, a WebP, a PNG or a zip"),
        (b"GIF89a", "too damaged to be read"),
        ("silent", "no provenance in the file"),
        ("later", "in a form that this version does not support: schema_version"),
    ],
)
def test_a_file_without_usable_provenance_is_an_error_with_a_reason(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | str | None, words: str
) -> None:
    if content == "silent":
        content = animation(make_config(encoding__provenance=False), "gif")
    if content == "later":
        content = animation(make_config(), "webp").replace(b'"schema_version":1', b'"schema_version":2')
    if isinstance(content, bytes):
        (tmp_path / "file").write_bytes(content)

    assert pia_batch("inspect", str(tmp_path / "file")) == 2

    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.out == ""
