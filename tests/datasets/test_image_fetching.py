"""Images that a source names by URI: relative ones, fetched ones, probed ones, and why some become no request."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers
from inputs import png

from pia_batch import prepare
from pia_batch.config import ImagesConfig, RunConfig
from pia_batch.datasets import image_reader, request_table
from pia_batch.datasets.kinds import KINDS, kind_of
from pia_batch.datasets.part_files import SUCCESS
from pia_batch.datasets.prepare_options import PrepareOptions
from pia_batch.datasets.request_columns import RequestOptions
from pia_batch.datasets.request_table import Requests, RequestTable
from pia_batch.datasets.sources import Place, ReadOptions, Rows
from pia_batch.datasets.templates import Template
from pia_batch.errors import ConfigError
from pia_batch.planning.plan import make_plan
from pia_batch.storage.http_client import HttpReader


class Quiet(SimpleHTTPRequestHandler):
    """Server of a folder without a log."""

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with images, one of them larger than 64 KiB, and files that are none."""
    place = tmp_path / "my photos"
    (place / "Ünter").mkdir(parents=True)
    for k in range(4):
        (place / "Ünter" / f"{k}.png").write_bytes(png(k, 64 + 8 * k, 64))
    (place / "empty.png").write_bytes(b"")
    (place / "page.png").write_bytes(b"<html>not found</html>")
    return place


@pytest.fixture
def web(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve the folder, and yield its address."""
    monkeypatch.setattr(image_reader, "HTTP", HttpReader(is_public=lambda _: True))  # this machine has no internet
    with servers.serving(functools.partial(Quiet, directory=str(folder))) as address:
        yield address


def parts_of(uris: list[str | None], base: str, limit: int | None = None, **options: Any) -> list[Requests]:
    table = pa.table({"image": pa.array(uris, pa.string()), "caption": [f"cat {k}" for k in range(len(uris))]})
    options = {"kind": KINDS["jsonl"], "prompt": Template("{caption}", "--prompt")} | options
    places = pa.array([f"a:{k}" for k in range(len(uris))], pa.string())
    return list(RequestTable(RequestOptions(**options), table.schema, base).parts(Rows(table, places), limit))


def made(uris: list[str | None], base: str, **options: Any) -> Requests:
    (requests,) = parts_of(uris, base, **options)
    return requests


def reasons_of(requests: Requests) -> dict[str, str]:
    return dict(zip(requests.rejects["place"].to_pylist(), requests.rejects["reason"].to_pylist(), strict=True))


@pytest.mark.parametrize(
    ("uri", "base", "expected"),
    [
        ("a b.png", "file:///data/my%20photos", "/data/my photos/a b.png"),
        ("../x/a.png", "s3://b/m/n", "s3://b/m/x/a.png"),
        ("a b#1.png", "s3://b/m", "s3://b/m/a b#1.png"),
        ("/data/a.png", "s3://b/m", "/data/a.png"),
        ("https://h/a.png?x=1", "file:///data", "https://h/a.png?x=1"),
    ],
)
def test_relative_uris_become_full_ones_as_the_manifest_is_elsewhere(uri: str, base: str, expected: str) -> None:
    assert made([uri], base).table["image"].to_pylist() == [expected]


def test_names_in_the_metadata_of_an_image_folder_start_from_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\n1.png,a cat\n")
    place = Place.of(str(tmp_path))
    kind = kind_of(place, None)
    source = kind.open(place, ReadOptions())
    (rows,) = source.read(source.pieces[0])
    options = RequestOptions(kind=kind, prompt=Template("{text}", "--prompt"))
    (requests,) = RequestTable(options, rows.table.schema, place.folder_uri).parts(rows)
    assert requests.table["image"].to_pylist() == [str(tmp_path / "train" / "1.png")]


def test_relative_uris_that_lead_nowhere_are_rejected_by_name() -> None:
    assert "is not allowed" in reasons_of(made(["s3://b/m/a.png", "../../../a.png"], "s3://b/m"))["a:1"]
    assert "a.png is relative" in reasons_of(made(["a.png", "s3://b/1.png"], ""))["a:0"]


def test_images_are_fetched_with_their_uris_carried_and_failures_rejected(folder: Path, web: str) -> None:
    base = folder.as_uri()
    uris = ["Ünter/1.png", f"{web}/%C3%9Cnter/2.png", "none.png", "empty.png", f"{web}/none.png", None, "/etc/hosts"]
    fetching = ImagesConfig(allow=(f"{web}/",), timeout_s=20)
    requests = made(uris, base, images="bytes", fetching=fetching)
    assert requests.table["image_bytes"].to_pylist() == [png(1, 72, 64), png(2, 80, 64)]
    assert requests.table["source_image"].to_pylist() == [str(folder / "Ünter/1.png"), uris[1]]
    assert "image" not in requests.table.column_names
    reasons = reasons_of(requests)
    assert "does not exist" in reasons["a:2"]
    assert "is empty" in reasons["a:3"]
    assert "404" in reasons["a:4"]
    assert reasons["a:5"] == "the image is null"
    assert "allow more with --allow" in reasons["a:6"]
    assert requests.counts["rejected"] == 5


def test_ids_from_content_are_those_of_the_fetched_images(folder: Path, web: str) -> None:
    fetching = ImagesConfig(allow=(f"{web}/",))
    one = made(["Ünter/1.png"], folder.as_uri(), images="bytes").table["request_id"].to_pylist()
    other = made([f"{web}/%C3%9Cnter/1.png"], "", images="bytes", fetching=fetching).table["request_id"].to_pylist()
    assert one == other != made(["Ünter/2.png"], folder.as_uri(), images="bytes").table["request_id"].to_pylist()


def test_an_image_above_the_limit_is_rejected(folder: Path) -> None:
    fetching = ImagesConfig(max_bytes=100)
    assert (
        "more than 100 bytes"
        in reasons_of(made(["Ünter/1.png"], folder.as_uri(), images="bytes", fetching=fetching))["a:0"]
    )


def test_images_as_text_are_decoded_or_refused_with_the_remedy() -> None:
    text = base64.b64encode(png()).decode()
    uris = [f"data:image/png;base64,{text}", text, "data:image/svg+xml,%3Csvg/%3E", "data:image/png;base64,a"]
    requests = made(uris, "", images="bytes")
    assert requests.table["image_bytes"].to_pylist() == [png(), png()]
    assert requests.table["source_image"].to_pylist() == [None, None]
    assert "is not base64" in reasons_of(requests)["a:2"]
    assert "is no base64" in reasons_of(requests)["a:3"]
    assert all("--images bytes decodes it" in reason for reason in reasons_of(made(uris, "")).values())


def test_probing_reads_sizes_of_images_that_are_named_by_uri(folder: Path, web: str) -> None:
    uris = ["Ünter/1.png", "page.png", f"{web}/none.png", f"{web}/%C3%9Cnter/3.png"]
    requests = made(uris, folder.as_uri(), probe=True, fetching=ImagesConfig(allow=(f"{web}/",)))
    assert requests.table.select(["image_width", "image_height"]).to_pylist() == [
        {"image_width": 72, "image_height": 64},
        {"image_width": 88, "image_height": 64},
    ]
    assert requests.table["image"].to_pylist() == [str(folder / "Ünter/1.png"), uris[3]]
    assert "not a readable" in reasons_of(requests)["a:1"]
    assert "404" in reasons_of(requests)["a:2"]


def test_fetched_images_are_cut_into_parts_by_their_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_table, "PART_BYTES", 2 * len(png(1, 72, 64)))
    uris: list[str | None] = ["Ünter/1.png"] * 7
    parts = parts_of(uris, folder.as_uri(), images="bytes", ids_from="location")
    assert [len(part.table) for part in parts] == [2, 2, 2, 1]
    assert [name for part in parts for name in part.table["request_id"].to_pylist()] == [f"a:{k}" for k in range(7)]
    assert sum((part.counts["read"] for part in parts), 0) == 7


def test_images_beyond_a_limit_are_not_fetched(folder: Path) -> None:
    (folder / "later.png").write_bytes(png())
    uris = [None, "Ünter/1.png", "none.png", "later.png"]
    requests = made(uris, folder.as_uri(), images="bytes", limit=2)
    assert len(requests.table) == 1
    assert +requests.counts == {"read": 4, "beyond_limit": 1, "rejected": 2, "requests": 1}


def test_options_that_cannot_be_together_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--images bytes: .* prepare that manifest with --shuffle"):
        made(["Ünter/1.png"], folder.as_uri(), images="bytes", shuffle=1)
    with pytest.raises(ConfigError, match=r"--probe: .* prepare that manifest with --shuffle"):
        made(["Ünter/1.png"], folder.as_uri(), probe=True, shuffle=1)
    with pytest.raises(ConfigError, match=r"--images uris: the source has the images themselves"):
        RequestTable(
            RequestOptions(kind=KINDS["parquet"], images="uris"),
            pa.schema([("image", pa.binary()), ("prompt", "string")]),
        )
    with pytest.raises(ConfigError, match=r"--allow: 'photos/\*' is not a URI"):
        PrepareOptions(allow=("photos/*",))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_list_of_uris_becomes_a_manifest_that_runs_and_is_finished_though_images_come_and_go(
    folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "rows"
    source.mkdir()
    for part in range(3):
        rows = [{"url": f"../my photos/Ünter/{k}.png", "text": f"a boat {part}-{k}"} for k in range(5)]
        (source / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"prompt": "{text}", "images": "bytes", "probe": True, "allow": [str(folder)]}
    dest = tmp_path / "manifest"
    first = prepare(source, dest, **options)
    assert (first.requests, first.counts["rejected"]) == (12, 3)
    plan = make_plan(RunConfig.load(None, {"manifest": first.manifest, "output": str(tmp_path / "output")}))
    assert (plan.num_pending, plan.num_rejected) == (12, 0)
    rejects = pq.read_table(dest / "_prepare" / "rejects.parquet").to_pylist()
    assert [row["place"] for row in rejects] == [f"{part}.jsonl:4" for part in range(3)]
    # killed before the record of one piece; an image that was there is gone, and one that was absent is there
    for name in ("_prepare/pieces/000001.json", "_prepare/rejects.parquet", SUCCESS):
        (dest / name).unlink()
    (folder / "Ünter" / "0.png").unlink()
    (folder / "Ünter" / "4.png").write_bytes(png(4))
    again = prepare(source, dest, **options)
    assert (again.requests, again.counts["rejected"]) == (12, 3)
    recorded = {file["name"] for file in json.loads((dest / SUCCESS).read_text())["files"]}
    assert {path.name for path in dest.glob("*.parquet")} == recorded
    urls = pa.concat_tables([pq.read_table(dest / name) for name in sorted(recorded)])["url"].to_pylist()
    assert sorted(url[-5] for url in urls) == sorted("0123" * 2 + "1234")
