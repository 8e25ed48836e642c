"""The report: what stands in the page, and what a person meets who opens it in Chromium."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from html import unescape
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urljoin, urlsplit

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browsers import until
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import png, requests_table
from PIL import Image, ImageSequence
from playwright.sync_api import Browser, Page
from servers import serving

from pia_batch import cli, report
from pia_batch.config import EncodingConfig, RunConfig
from pia_batch.errors import ConfigError, StorageError
from pia_batch.journal import layout, log
from pia_batch.manifest import validation
from pia_batch.media import codecs, fetch
from pia_batch.planning.plan import make_plan
from pia_batch.report import head, page
from pia_batch.report.embedded import with_embedded
from pia_batch.report.links import MediaLinks
from pia_batch.schema.columns import RESULT, SETTINGS
from pia_batch.schema.run_record import RunSummary
from pia_batch.storage.object_store import Store

RUN = "20261123T010203Z-0a1b"
BEGAN = datetime(2026, 11, 23, 1, 2, 3, tzinfo=UTC)


def key_of(request_id: str) -> str:
    return hashlib.blake2b(request_id.encode(), digest_size=16).hexdigest()


def frames(seed: int = 0, num_frames: int = 8, side: int = 64) -> npt.NDArray[np.uint8]:
    """A square that wanders over a plain ground; every frame is another one."""
    rng = np.random.default_rng(seed)
    clip = np.full((num_frames, side, side, 3), rng.integers(160, 250, 3), dtype=np.uint8)
    colour = rng.integers(0, 120, 3)
    for k in range(num_frames):
        left = 4 + k * (side // 2) // num_frames
        clip[k, side // 3 : 2 * side // 3, left : left + side // 3] = colour
    return clip


def result(index: int, **columns: Any) -> dict[str, Any]:
    """One succeeded row, with measures that vary with `index`; `columns` replace."""
    rng = np.random.default_rng(index)
    scale = index % 6
    row = {
        "request_id": f"r{index:05d}",
        "status": "succeeded",
        "attempts": 1,
        "image": f"images/{index % 5}.png",
        "prompt": f"{('a red circle', 'a boat on the sea', 'an old cat')[index % 3]} moving {index}",
        "negative_prompt": "",
        "seed": int(rng.integers(0, 2**62)),
        "motion_scale": scale,
        "guidance_scale": 7.5,
        "strength": 1.0,
        "num_inference_steps": 25,
        "num_frames": 8,
        "width": 64,
        "height": 64,
        "eta": 0.0,
        "fps": 8.0,
        "format": "mp4",
        "model": "default",
        "duration_s": 1.0,
        "num_bytes": 2048,
        "prompt_tokens": 9,
        "prompt_truncated": False,
        "frame_mean": float(rng.normal(128, 20)),
        "frame_std": float(rng.normal(50, 8)),
        "motion": float(rng.gamma(2.0, 1.5) + scale % 3 * 3),
        "first_frame_psnr_db": float(rng.normal(30 - scale % 3 * 2, 2)),
        "image_sha256": hashlib.sha256(bytes([index % 5])).hexdigest(),
        "gpu_seconds": float(rng.gamma(40, 0.05)),
        "fetch_seconds": float(rng.gamma(2, 0.02)),
        "encode_seconds": float(rng.gamma(9, 0.01)),
        "device": "cuda:0",
        "engine_id": "e" * 32,
        "run_id": RUN,
        "finished_at": BEGAN + timedelta(seconds=20 + index * 0.8 + float(rng.normal(0, 2))),
    } | columns
    row.setdefault("key", key_of(row["request_id"]))
    return row


def failure(index: int, kind: str, error: str, **columns: Any) -> dict[str, Any]:
    """One failed row; where there were no attempts, without settings."""
    measured = ("duration_s", "num_bytes", "frame_mean", "frame_std", "motion", "first_frame_psnr_db", "encode_seconds")
    row = result(index) | dict.fromkeys(measured) | {"status": "failed", "error_kind": kind, "error": error} | columns
    return (
        row
        if row["attempts"]
        else row | dict.fromkeys((*SETTINGS.names, "model", "prompt_tokens", "gpu_seconds", "device"))
    )


def summary_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the summary of a run with these results."""
    failed = sum(row["status"] == "failed" for row in rows)
    return RunSummary(
        run_id=RUN,
        requests=len(rows),
        succeeded=len(rows) - failed,
        failed=failed,
        failures={},
        rejected=0,
        duplicates=0,
        computed=len(rows),
        left=0,
        seconds=20 + 0.8 * len(rows),
        gpu_hours=0.5,
        cost=None,
        results_uri=None,
        reason=None,
        message=None,
        exit_code=0,
    ).model_dump()


def publish(store: Store, rows: list[dict[str, Any]], part_rows: int = 100_000, **config: Any) -> Store:
    """What a run leaves behind: result parts, `_SUCCESS.json`, LATEST.json and run.json, but no animations."""
    folder = f"{layout.RESULTS}{RUN}/"
    parts = []
    for start in range(0, len(rows), part_rows):
        part = pa.Table.from_pylist(rows[start : start + part_rows], RESULT)
        parts.append({"name": f"part-{start // part_rows:05d}.parquet", "rows": len(part)})
        store.replace(folder + parts[-1]["name"], log.to_parquet(part))
    settings = {"manifest": "requests.parquet", "output": store.uri} | config
    loaded = RunConfig.load(None, settings).model_dump(mode="json")
    manifest = store.uri.rsplit("/", 1)[0] + "/manifest"
    about = {
        "run_id": RUN,
        "started_at": BEGAN.isoformat(),
        "version": "0.1.0",
        "engine_ids": {"default": "e" * 32},
        "manifest": manifest,
        "folder": manifest,
        "config": loaded,
        "output": store.uri,
        "state": "finished",
        "summary": summary_of(rows),
        "progress": {"at": BEGAN.isoformat(), "busy": 0.625, "gpu_hours": 0.5, "unit": "GPU hours"},
    }
    store.replace(f"{folder}_SUCCESS.json", log.to_json({"run_id": RUN, "parts": parts, "requests": len(rows)}))
    store.replace(layout.LATEST_RESULTS, log.to_json({"run_id": RUN, "digest": ""}))
    store.replace(f"_runs/{RUN}/run.json", log.to_json(about))
    return store


# --- what stands in the page ----------------------------------------------------------------------------------------


def page_of(store: Store, **options: Any) -> str:
    made = report.write(store, options=report.ReportOptions(**options))
    assert made.uri == store.uri_of(f"_runs/{RUN}/report.html")
    text = store.read(f"_runs/{RUN}/report.html").decode()
    assert made.num_bytes == len(text.encode())
    return text


def data_in(html: str) -> dict[str, Any]:
    return dict(json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.DOTALL)[1]))


def values_of(data: dict[str, Any], name: str) -> list[Any]:
    """A column of the page's data, spelled out again."""
    column = data["columns"][name]
    if "all" in column:
        return [column["all"]] * data["rows"]
    return column["values"] if "values" in column else [column["words"][at] for at in column["at"]]


def visible(html: str) -> str:
    """The text of the markup, without style, script and data."""
    text = re.sub(r"<(style|script)\b.*?</\1>", "", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", text)).split()).replace("\N{NO-BREAK SPACE}", " ")


def test_the_head_counts_every_result_and_tells_only_what_the_data_has(store: Store) -> None:
    rows = [result(k) for k in range(8)]
    rows += [failure(8, "non_finite", "the latents of this request are not finite")]
    rows += [result(9, run_id="an-earlier-run", gpu_seconds=90.0)]
    seconds = sum(row["gpu_seconds"] for row in rows[:9])
    publish(store, rows)

    text = visible(page_of(store))

    assert "9 animations , 1 failure " in text
    assert f"Clips per second {8 / 28:.3g} 28.0 s in all, start-up included" in text
    assert f"GPU time {seconds:.1f} s" in text
    assert "Reused 1 from earlier runs: 1 min 30 s saved" in text
    assert "Engines busy 62% of their uptime" in text
    assert "Cost" not in text
    assert "Cost 1.25 0.5 GPU hours at 2.50, start-up and idle time included" in visible(
        page_of(store, price_per_hour=2.5)
    )


def test_a_page_without_run_json_tells_what_the_results_have(store: Store) -> None:
    publish(store, [result(0)])
    store.delete(f"_runs/{RUN}/run.json")

    text = visible(page_of(store))

    assert "1 animation , no failure" in text
    assert "Clips per second" not in text
    assert "Configuration" not in text


def test_failures_are_grouped_by_kind_with_examples_a_remedy_and_the_command(store: Store) -> None:
    rows = [failure(k, "image_unavailable", f"column 'image': {k}.png does not exist") for k in range(7)]
    rows += [failure(7, "out_of_range", "row 7: column 'motion_scale': 9", attempts=0), result(8)]
    publish(store, rows)

    text = visible(page_of(store))

    assert re.search(r"7 image_unavailable the image is missing, .* r00000 column 'image': 0.png does not exist", text)
    assert "r00004" in text
    assert "r00005" not in text  # five examples of each kind
    assert re.search(r"1 out_of_range choose a value .* row 7: column 'motion_scale': 9", text)
    assert text.index("7 image_unavailable") < text.index("1 out_of_range")
    manifest = store.uri.rsplit("/", 1)[0] + "/manifest"
    assert f"pia-batch run CONFIG --manifest {manifest} --output {store.uri} --retry-failed" in text


def test_every_remedy_is_that_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    rows = [f"| `{kind}` | {remedy} |" for kind, remedy in head.REMEDIES.items()]
    table = "\n".join(["| error kind | what to do |", "| --- | --- |", *rows, ""])
    assert table in page, f"docs/results.md wants this table:\n{table}"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.004, "0.004 s"), (0.48, "0.48 s"), (9.94, "9.9 s"), (9.96, "10.0 s"), (59.4, "59.4 s"), (59.96, "1 min 00 s"),
     (725, "12 min 05 s"), (12_000, "3 h 20 min"), (360_000_000, "100,000 h 00 min")],
)  # fmt: skip
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert head.duration(seconds).replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (12_345, "12.3 kB"), (1.5e9, "1.5 GB"), (2e18, "2e+06 TB")]
)
def test_sizes_are_for_people(num_bytes: float, text: str) -> None:
    assert head.size(num_bytes) == text


def test_parts_are_read_one_by_one_and_older_ones_may_lack_columns(store: Store) -> None:
    publish(store, [result(k) for k in range(25)], part_rows=10)
    name = f"{layout.RESULTS}{RUN}/part-00001.parquet"
    part = pq.read_table(pa.BufferReader(store.read(name)))
    store.replace(name, log.to_parquet(part.drop_columns(["eta", "motion"])))

    data = data_in(page_of(store))

    assert values_of(data, "request_id") == [f"r{k:05d}" for k in range(25)]
    assert [value is None for value in values_of(data, "motion")] == [10 <= k < 20 for k in range(25)]


def test_a_large_run_is_shown_by_all_its_failures_and_a_fair_sample(store: Store) -> None:
    rows = [result(k) if k % 10 else failure(k, "non_finite", "not finite") for k in range(300)]
    data = data_in(html := page_of(publish(store, rows, part_rows=37), max_results=100))

    statuses = Counter(values_of(data, "status"))
    assert statuses == {"succeeded": 70, "failed": 30}
    assert data["weights"] == {"succeeded": 270 / 70, "failed": 1.0}
    chosen = {
        key
        for key, status in zip(values_of(data, "key"), values_of(data, "status"), strict=True)
        if status == "succeeded"
    }
    assert chosen == set(sorted(row["key"] for row in rows if row["status"] == "succeeded")[:70])
    assert "270 animations , 30 failures" in visible(html)
    assert "This page has 100 of 300 results" in visible(html)


def test_failures_leave_half_of_the_page_to_animations(store: Store) -> None:
    rows = [result(k) if k % 10 == 0 else failure(k, "non_finite", "not finite") for k in range(300)]
    assert Counter(values_of(data_in(page_of(publish(store, rows), max_results=40)), "status")) == {
        "succeeded": 20,
        "failed": 20,
    }


def test_there_is_no_page_before_there_are_results(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="has no results yet; `pia-batch run` publishes them"):
        report.write(store)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["report", store.uri])
    assert "has no results yet" in capsys.readouterr().err

    publish(store, [result(0)])
    with pytest.raises(ConfigError, match=f"run 'other' has no published results .* published runs: {RUN}"):
        report.write(store, "other")


def test_damaged_results_are_named(store: Store) -> None:
    publish(store, [result(0)])
    store.replace(f"_runs/{RUN}/run.json", b"{")
    with pytest.raises(StorageError, match=r"run\.json is damaged"):
        report.write(store)
    store.replace(f"{layout.RESULTS}{RUN}/part-00000.parquet", b"PAR1 and no more")
    with pytest.raises(StorageError, match=r"part-00000\.parquet are damaged"):
        report.write(store)


def commit(store: Store, rows: list[dict[str, Any]]) -> None:
    """What a worker of a run leaves behind: animations, then a fragment of the journal."""
    for row in rows:
        if row["status"] == "succeeded":
            store_clip(store, row, 0)
    log.Journal(store).append(pa.Table.from_pylist(rows, RESULT))


def begin(store: Store, pending: int) -> None:
    """What a run leaves behind as it begins."""
    seen = {
        "at": BEGAN.isoformat(),
        "seconds": 50.0,
        "seconds_left": 200.0,
        "busy": 0.9,
        "gpu_hours": 0.25,
        "unit": "GPU hours",
    }
    about = {"run_id": RUN, "started_at": BEGAN.isoformat(), "pending": pending, "rejected": 0, "manifest": "m"}
    about |= {"output": store.uri, "version": "0.1.0", "progress": seen, "config": {"budget": {"price_per_hour": 8.0}}}
    store.replace(f"_runs/{RUN}/run.json", log.to_json(about))


def test_the_page_of_a_run_that_goes_on_shows_what_it_has_committed_so_far(store: Store) -> None:
    begin(store, 3)
    commit(store, [result(9, run_id="yesterday")])
    pages = report.follow(store, RUN, every_s=20)

    assert next(pages).num_results == 0
    commit(store, [result(0), failure(1, "non_finite", "not finite")])
    assert next(pages).num_results == 2
    commit(store, [result(2), result(0)])  # a worker that was taken for dead commits its request once more
    made = next(pages)
    assert (made.num_results, made.num_shown) == (3, 3)
    text = store.read(f"_runs/{RUN}/report.html").decode()
    assert '<meta http-equiv="refresh" content="20">' in text
    assert "3 of 3 requests finished" in text
    for figure in ("Clips per second 0.04", "Time left 3 min 20 s", "Engines busy 90%", "Cost 2.00"):
        assert figure in visible(text)

    publish(store, [result(0), failure(1, "non_finite", "not finite"), result(2)])
    assert next(pages).num_results == 3
    assert 'http-equiv="refresh"' not in store.read(f"_runs/{RUN}/report.html").decode()
    assert list(pages) == []


def test_the_command_follows_a_run_until_nobody_works_there(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["report", store.uri, "--live"])
    assert "no run has ever written" in capsys.readouterr().err
    begin(store, 3)
    commit(store, [result(0)])

    with pytest.raises(SystemExit, match="0"):
        cli.main(["report", store.uri, "--live"])

    told = capsys.readouterr().out
    assert "1 results" in told
    assert "the run has ended without publishing" in told


def test_the_command_says_where_the_page_is(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish(store, [result(k) for k in range(3)])

    with pytest.raises(SystemExit, match="0"):
        cli.main(["report", store.uri, "--max-results", "2", "--out", str(tmp_path / "pages" / "run.html")])

    printed = capsys.readouterr().out
    assert "3 results, 2 of them shown" in printed
    assert f"report: {(tmp_path / 'pages' / 'run.html').as_uri()}" in printed
    data = data_in((tmp_path / "pages" / "run.html").read_text(encoding="utf-8"))
    assert values_of(data, "media")[0].startswith("../out/animations/")


@settings(deadline=None)  # a shared machine
@given(st.recursive(st.none() | st.booleans() | st.text() | st.floats(allow_nan=False, allow_infinity=False), st.lists))
def test_data_for_the_script_is_json_that_means_nothing_in_html(value: object) -> None:
    text = page.for_script(value)
    assert not set("<>&\u2028\u2029").intersection(text)
    assert json.loads(text) == value


@settings(deadline=None)  # a shared machine
@given(st.lists(st.none() | st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, 1, 7]), min_size=1))
def test_a_column_of_integers_survives_javascript(items: list[int | None]) -> None:
    column = page.column("seed", pa.chunked_array([pa.array(items, pa.int64())]))
    told = values_of({"rows": len(items), "columns": {"seed": json.loads(json.dumps(column))}}, "seed")
    assert [None if item is None else int(item) for item in told] == items
    assert all(abs(item) <= 2**53 for item in told if isinstance(item, int))


def test_settings_keep_every_digit_and_measures_six() -> None:
    column = pa.chunked_array([pa.array([1 / 3, float("inf")])])
    assert page.column("strength", column) == {"values": [1 / 3, None]}
    assert page.column("motion", column) == {"values": [0.333333, None]}


def test_secrets_of_a_config_do_not_reach_the_page(store: Store) -> None:
    secret = "https://user:CANARY@host/weights.safetensors?X-Amz-Signature=CANARY"  # noqa: S105 - none
    publish(store, [result(0)], **{"model.base": secret, "images.allow": ["s3://photos"]})
    about = json.loads(store.read(f"_runs/{RUN}/run.json"))
    assert "CANARY" in json.dumps(about)

    html = page_of(store)

    assert "CANARY" not in html
    assert "https://host/weights.safetensors" in html


# --- references -----------------------------------------------------------------------------------------------------


def places(**changes: Any) -> MediaLinks:
    standard = {"output": "s3://bucket/out", "page": f"s3://bucket/out/_runs/{RUN}/report.html"}
    standard |= {"folder": "s3://bucket/sets/a", "media_url": None, "images_config": {}}
    return MediaLinks(**standard | changes)


LOCAL = {"output": "file:///d/my%20out", "page": "file:///d/my%20out/_runs/r/report.html", "folder": "file:///d/in"}


@pytest.mark.parametrize(
    ("image", "reference", "where"),
    [
        ("cat.png", "../../../sets/a/cat.png", {}),
        ("s3://bucket/photos/a b#c?d%25:.png", "../../../photos/a%20b%23c%3Fd%2525%3A.png", {}),
        ("s3a://bucket/out/x.png", "../../x.png", {}),
        ("s3://elsewhere/cat.png", None, {}),
        ("s3://elsewhere/cat.png", None, {"images_config": {"allow": ["s3://elsewhere"]}}),
        ("file:///etc/passwd", None, {}),
        ("https://images.example.com/cat.png", None, {}),
        ("https://images.example.com/cat.png", "https://images.example.com/cat.png",
         {"images_config": {"allow": ["https://images.example.com/"]}}),
        ("javascript:alert(1)", "../../../sets/a/javascript%3Aalert%281%29", {}),
        ("data:text/html,x", "../../../sets/a/data%3Atext/html%2Cx", {}),
        ("a&b\"'<>.png", "../../../in/a%26b%22%27%3C%3E.png", LOCAL),
        ("/d/in/cat.png", "../../../in/cat.png", LOCAL),
        ("file:///d/in/c%20t.png", "../../../in/c%20t.png", LOCAL),
        ("cat.png", None, {"folder": ""}),
        (None, None, {}),
    ],
)  # fmt: skip
def test_a_condition_image_is_named_as_the_page_can_reach_it(
    image: str | None, reference: str | None, where: dict[str, Any]
) -> None:
    assert places(**where).image(image) == reference


SEGMENT = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1).filter(
    lambda text: text not in (".", "..")
)


@settings(deadline=None)  # a shared machine
@given(st.lists(SEGMENT, min_size=1, max_size=4), st.lists(SEGMENT, min_size=1, max_size=3))
def test_a_browser_resolves_a_reference_to_the_very_file(folder: list[str], name: list[str]) -> None:
    root, output = Path("/", *folder), Path("/", *folder[:-1], "out")
    page_uri = (output / "_runs" / "r" / "report.html").as_uri()
    local = MediaLinks(output.as_uri(), page_uri, root.as_uri(), None, {})

    reference = local.image("/".join(name))

    assert reference is not None
    assert unquote(urlsplit(urljoin(page_uri, reference)).path) == str(root.joinpath(*name))
    assert urljoin(page_uri, local.animation("ab" * 16, "mp4")) == output.as_uri() + f"/animations/ab/{'ab' * 16}.mp4"


def test_a_page_elsewhere_needs_the_address_of_its_media(tmp_path: Path) -> None:
    page_uri = (tmp_path / "run.html").as_uri()
    with pytest.raises(ConfigError, match="leave out --out to store it there, or give the http address"):
        places(page=page_uri)
    with pytest.raises(ConfigError, match=r"invalid URL \(got ftp://host/out, expected the http or https address"):
        places(media_url="ftp://host/out")

    named = places(
        page=page_uri, media_url="https://site.example.com/out/", images_config={"allow": ["https://i.example.com/a/"]}
    )

    assert named.animation("ab" * 16, "gif") == f"https://site.example.com/out/animations/ab/{'ab' * 16}.gif"
    assert named.sources == {
        "img-src": "'self' data: https://site.example.com:443 https://i.example.com:443",
        "media-src": "'self' https://site.example.com:443",
    }


# --- what a small run embeds ----------------------------------------------------------------------------------------


def store_clip(store: Store, row: dict[str, Any], seed: int = 0) -> None:
    data = codecs.encode(
        frames(seed), row["format"], row["fps"], EncodingConfig(), video_codec=row.get("codec") or "h264"
    )
    store.replace(layout.animation_name(row["key"], codecs.CODECS[row["format"]].extension), data)


def picture_in(data_uri: str) -> Image.Image:
    kind, _, encoded = data_uri.partition(",")
    assert kind == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_a_small_run_embeds_what_a_browser_cannot_get_by_itself(store: Store, tmp_path: Path) -> None:
    rows = [result(k, format=form) for k, form in enumerate(["mp4", "gif", "webp", "png_zip"])]
    for row in rows:
        store_clip(store, row)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes(png(1, 320, 160))
    table = pa.Table.from_pylist(rows, RESULT)
    table = table.append_column("image_ref", pa.array(["at/0.png", None, None, "at/3.png"]))  # the third is missing

    local = MediaLinks(store.uri, store.uri_of("report.html"), tmp_path.as_uri(), None, {})
    embedded = with_embedded(table, store, local)

    thumbnails, strips = embedded["thumbnail"].to_pylist(), embedded["strip"].to_pylist()
    assert [thumbnail is None for thumbnail in thumbnails] == [True, False, True, True]
    assert picture_in(thumbnails[1]).size == (160, 80)
    assert strips[0] is None  # a browser seeks in MP4
    assert [picture_in(strip).size for strip in strips[1:]] == [(8 * 72, 72)] * 3
    shown = np.asarray(picture_in(strips[3]).convert("RGB"), dtype=int)[36, 36::72]
    assert np.abs(shown - frames(0)[:, 32, 32]).max() < 24  # the frames, in order, but for what WebP loses


def test_a_page_embeds_as_it_is_asked(store: Store) -> None:
    rows = [result(0, format="gif")]
    publish(store, rows)
    store_clip(store, rows[0])
    assert values_of(data_in(page_of(store)), "strip") != [None]
    assert "strip" not in data_in(page_of(store, embed=False))["columns"]


def test_a_larger_run_embeds_nothing_unless_asked(store: Store) -> None:
    publish(store, [result(k, format="gif") for k in range(report.EMBED_UP_TO + 1)])
    assert "strip" not in data_in(page_of(store))["columns"]
    assert values_of(data_in(page_of(store, embed=True)), "strip") == [None] * (report.EMBED_UP_TO + 1)  # none is there


# --- the same clip again --------------------------------------------------------------------------------------------


def test_the_config_of_a_clip_has_what_is_not_in_its_row(tmp_path: Path) -> None:
    settings = {
        "manifest": "m", "output": "o", "model.base": "/weights", "model.dtype": "float32", "images.fit": "contain",
        "images.allow": ["https://i.example.com/"], "encoding.mp4_crf": 20, "defaults.num_frames": 12,
        "placement.num_gpus": 1.0, "placement.max_engines": 4, "models": {"second": {"base": "/others"}},
    }  # fmt: skip
    config = RunConfig.load(None, settings)

    text = head.reproduction_config(config.model_dump(mode="json"), "s3://bucket/sets/a")

    (tmp_path / "again.yaml").write_text(text, encoding="utf-8")
    again = RunConfig.load(tmp_path / "again.yaml", {"manifest": "m", "output": "o"})
    for section in ("model", "models", "encoding"):
        assert getattr(again, section) == getattr(config, section)
    assert again.images == config.images.model_copy(update={"allow": ("https://i.example.com/", "s3://bucket")})
    assert again.placement.num_gpus == 1.0
    assert "num_frames" not in text
    assert "max_engines" not in text
    plain = RunConfig.load(None, {"manifest": "m", "output": "o"}).model_dump(mode="json")
    assert (
        head.reproduction_config(plain, "file:///d/in")
        == "model:\n  base: embedded\nimages:\n  allow:\n  - file:///d/in\n"
    )
    assert head.reproduction_config({}, "") == "{}\n"


@pytest.mark.s3
def test_an_object_store_serves_the_page_and_its_media_as_what_they_are(s3: str) -> None:
    store = Store(f"{s3}/out")
    rows = [result(k, format=form) for k, form in enumerate(["mp4", "gif", "webp", "png_zip"])]
    publish(store, rows)
    for row in rows:
        store_clip(store, row)

    made = report.write(store)

    assert made.uri == f"{s3}/out/_runs/{RUN}/report.html"
    data = data_in(store.read(f"_runs/{RUN}/report.html").decode())
    assert values_of(data, "image_ref")[1] == "../../../manifest/images/1.png"
    names = [f"_runs/{RUN}/report.html", *(media.removeprefix("../../") for media in values_of(data, "media"))]
    served = [fsspec.filesystem("s3").info(f"{s3}/out/{name}") for name in names]
    assert [info["ContentType"] for info in served] == [
        "text/html; charset=utf-8", "video/mp4", "image/gif", "image/webp", "application/zip",
    ]  # fmt: skip


# --- in Chromium ----------------------------------------------------------------------------------------------------

DRAWN = "[...document.querySelectorAll('.strip canvas')].every((canvas) => canvas.height < 100)"  # 150 at first
EVIL = "</script><script>window.hurt = 1</script><img src=x onerror='window.hurt = 1'>"


@dataclass
class Visit:
    """One person before one page. `told` is what the console said, `asked` every URL that the page fetched."""

    page: Page
    missing: bool = False
    """Whether media may be missing, of which the console tells too."""
    told: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def hear(self, text: str, uri: str) -> None:
        if not (uri.endswith("/gone.png") or (self.missing and "ERR_FILE_NOT_FOUND" in text)):
            self.told.append(text)

    def open(self, uri: str) -> Page:
        self.page.goto(uri)
        self.page.wait_for_selector("#grid li .pictures > *")
        return self.page

    def ids(self) -> list[str]:
        """The request ids of the cards, in reading order."""
        return self.page.locator("#grid .id").all_inner_texts()


@pytest.fixture
def visit(chromium: Browser) -> Iterator[Callable[..., Visit]]:
    """Opens browser windows; in the end none of them may have complained."""
    visits: list[Visit] = []

    def start(width: int = 1280, height: int = 900, *, missing: bool = False, **options: Any) -> Visit:
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        context.set_default_timeout(20_000)
        made = Visit(context.new_page(), missing)
        made.page.on("console", lambda message: made.hear(message.text, message.location["url"]))
        made.page.on("pageerror", lambda error: made.told.append(str(error)))
        made.page.on("request", lambda request: made.asked.append(request.url))
        visits.append(made)
        return made

    yield start
    for made in visits:
        made.page.context.close()
    assert [made.told for made in visits if made.told] == []


@dataclass(frozen=True)
class Site:
    """A published run with its media, and its page."""

    folder: Path
    rows: list[dict[str, Any]]

    @property
    def uri(self) -> str:
        return (self.folder / "out" / "_runs" / RUN / "report.html").as_uri()


def build(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Site:
    store = publish(Store(str(folder / "out")), rows)
    (folder / "manifest" / "images").mkdir(parents=True)
    for k in range(5):
        (folder / "manifest" / "images" / f"{k}.png").write_bytes(png(k))
    for k, row in enumerate(rows):
        if row["status"] == "succeeded":
            store_clip(store, row, k)
    report.write(store, options=report.ReportOptions(**options))
    return Site(folder, rows)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Eighteen results: MP4 but for one of each other format, two models, three kinds of failure."""
    formats = dict(enumerate(("gif", "webp", "png_zip"), start=1))
    rows = [result(k, format=formats.get(k, "mp4"), model=("default", "second")[k == 7]) for k in range(14)]
    rows[3] |= {"first_frame_psnr_db": None, "motion": 99.0}
    rows[4] |= {"motion_scale": 1, "motion_curve": [1.0, 0.5, 0.25]}
    rows[5] |= {"size": "auto", "long_side": 64}
    rows += [failure(k, "non_finite", "the latents of this request are not finite") for k in (14, 15)]
    rows += [
        failure(16, "image_unavailable", "column 'image': images/gone.png does not exist", image="images/gone.png")
    ]
    rows += [failure(17, "out_of_range", "requests.parquet row 17: column 'motion_scale': 9", attempts=0)]
    return build(tmp_path_factory.mktemp("site"), rows)


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Ten thousand results, of which one image and two animations are there."""
    rows = [result(k) if k % 50 else failure(k, "non_finite", "not finite") for k in range(10_000)]
    folder = tmp_path_factory.mktemp("large")
    store = publish(Store(str(folder / "out")), rows)
    for k in (1, 9_999):
        store_clip(store, rows[k])
    report.write(store)
    return Site(folder, rows)


def test_the_page_shows_animations_beside_their_images(site: Site, visit: Callable[..., Visit]) -> None:
    window = visit()
    page = window.open(site.uri)

    assert page.locator("h1").inner_text() == "14 animations, 4 failures"
    assert page.locator("#count").inner_text() == "18 results"
    card = page.locator("#grid li").first
    assert "a red circle moving 0" in card.inner_text()
    assert "scale 0 · 8 frames · 64\N{MULTIPLICATION SIGN}64 · 25 steps" in card.inner_text()
    card.scroll_into_view_if_needed()
    until(page, "document.querySelector('#grid video').currentTime > 0.2")
    until(
        page, "[...document.querySelectorAll('#grid .condition img')].filter((image) => image.naturalWidth).length >= 4"
    )
    moving = page.locator("#grid li").nth(1).locator(".animation img")
    assert moving.evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 64
    assert page.locator("#grid .badge").inner_text() == "zip"
    assert page.locator(".chart").count() == 4
    below = site.folder.as_uri()
    assert all(uri.startswith((below, "data:image/webp;base64,")) for uri in window.asked)


def test_a_live_page_renews_itself(store: Store, visit: Callable[..., Visit]) -> None:
    begin(store, 2)
    commit(store, [result(0, format="gif", image="gone.png")])
    pages = report.follow(store, RUN, every_s=1)
    window = visit()
    page = window.open(next(pages).uri)
    assert window.ids() == ["r00000"]
    assert "Run in progress: 1 of 2 requests finished" in page.locator(".live").inner_text()

    commit(store, [result(1, format="gif", image="gone.png")])
    next(pages)

    page.wait_for_selector("#grid li:nth-child(2)")
    assert window.ids() == ["r00000", "r00001"]


def test_filters_search_and_order_are_in_the_address(site: Site, visit: Callable[..., Visit]) -> None:
    window = visit(1280, 2400)  # all cards at once
    page = window.open(site.uri)

    page.get_by_label("Status").select_option("failed")
    assert window.ids() == ["r00014", "r00015", "r00016", "r00017"]
    page.get_by_label("Error kind").select_option("non_finite")
    assert page.locator("#count").inner_text() == "2 of 18 results"
    assert page.get_by_label("Error kind").locator("option").all_inner_texts() == [
        "any", "image_unavailable (1)", "non_finite (2)", "out_of_range (1)",
    ]  # fmt: skip
    page.get_by_label("Status").select_option("succeeded")
    assert page.locator("#nothing").is_visible()
    page.locator("#clear").click()
    assert page.locator("#count").inner_text() == "18 results"

    page.locator("select[name=motion]").select_option("own curve")
    assert window.ids() == ["r00004"]
    page.locator("select[name=motion]").select_option("scale 3, loop")
    assert window.ids() == ["r00003", "r00009", "r00015"]
    page.locator("select[name=motion]").select_option("")
    page.get_by_label("Model").select_option("second")
    assert window.ids() == ["r00007"]
    page.get_by_label("Model").select_option("")

    page.get_by_label("Search").fill("Boat moving")
    until(page, "document.getElementById('count').textContent.startsWith('6 of')")
    page.get_by_label("Sort by").select_option("motion")
    boats = sorted(site.rows[1::3], key=lambda row: (row["motion"] is None, -(row["motion"] or 0)))
    assert window.ids() == [row["request_id"] for row in boats]
    assert page.locator("#grid .sorted").first.inner_text() == f"{boats[0]['motion']:.3g}"
    page.get_by_label("Descending").click()
    assert window.ids()[-1] == "r00016"  # without a measure: last either way

    page.get_by_label("Search").fill(site.rows[8]["key"][:8].upper())
    until(page, "document.getElementById('count').textContent === '1 of 18 results'")
    assert window.ids() == ["r00008"]
    page.get_by_label("Search").fill("Boat moving")
    until(page, "document.getElementById('count').textContent.startsWith('6 of')")

    told = dict(parse_qsl(urlsplit(page.url).fragment))
    assert told == {"q": "Boat moving", "sort": "motion"}
    before = window.ids()
    page.reload()
    page.wait_for_selector("#grid li")
    assert window.ids() == before
    assert page.get_by_label("Search").input_value() == "Boat moving"


def test_identical_first_frames_are_the_most_alike(site: Site, visit: Callable[..., Visit]) -> None:
    window = visit()
    page = window.open(f"{site.uri}#sort=first_frame_psnr_db&order=down")
    assert window.ids()[0] == "r00003"
    assert page.locator("#grid .sorted").first.inner_text() == "identical"


def test_everything_can_be_done_by_keyboard(site: Site, visit: Callable[..., Visit]) -> None:
    window = visit()
    page = window.open(site.uri)
    focused = "document.activeElement.querySelector('.id')?.textContent ?? document.activeElement.id"
    page.locator("#grid button").first.focus()

    for key, request_id in [
        ("ArrowRight", "r00001"), ("ArrowDown", "r00005"), ("ArrowLeft", "r00004"), ("ArrowUp", "r00000"),
        ("End", "r00017"), ("ArrowRight", "r00017"), ("Home", "r00000"),
    ]:  # fmt: skip
        page.keyboard.press(key)
        assert page.evaluate(focused) == request_id, key
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    title = page.locator("#detail-title")
    assert title.inner_text() == "r00001"
    page.keyboard.press("ArrowRight")
    assert title.inner_text() == "r00002"
    assert page.locator("#detail .position").inner_text() == "3 of 18"
    page.get_by_label("Next result").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")  # the button keeps the focus
    assert title.inner_text() == "r00004"
    page.keyboard.press("Escape")
    assert not page.locator("#detail").is_visible()
    until(page, f"({focused}) === 'r00004'")  # where one had got to; the dialog's closing is told a moment later
    page.keyboard.press("/")
    page.keyboard.type("circle r00009")
    until(page, "document.getElementById('count').textContent === '1 of 18 results'")
    page.keyboard.press("Escape")


def test_a_result_has_an_address_of_its_own(site: Site, visit: Callable[..., Visit]) -> None:
    page = visit().open(f"{site.uri}#id=r00016")
    detail = page.locator("#detail")
    assert detail.locator("h2").inner_text() == "r00016"
    assert "column 'image': images/gone.png does not exist" in detail.inner_text()
    assert "the image is missing" in detail.inner_text()
    page.get_by_role("button", name="Close").click()
    page.locator("#failures a", has_text="r00014").click()
    assert detail.locator("h2").inner_text() == "r00014"
    page.evaluate("location.hash = 'id=r00003'")
    until(page, "document.getElementById('detail-title').textContent === 'r00003'")
    page.evaluate("location.hash = 'id=unknown'")
    page.locator("#nothing").wait_for(state="attached")
    until(page, "!document.getElementById('nothing').hidden")


def test_the_detail_shows_every_frame_and_stops_at_one(site: Site, visit: Callable[..., Visit]) -> None:
    page = visit().open(f"{site.uri}#id=r00000")

    until(page, DRAWN)
    cropped = page.evaluate("""[...document.querySelectorAll('#detail .picture > *')].filter((element) => {
      const [inner, outer] = [element.getBoundingClientRect(), element.parentElement.getBoundingClientRect()];
      return inner.height > outer.height + 1 || inner.width > outer.width + 1;
    }).length""")
    assert cropped == 0
    assert page.locator(".strip canvas").count() == 8
    shots = {page.locator(".strip canvas").nth(k).screenshot() for k in range(8)}
    assert len(shots) == 8
    page.get_by_label("Frame 3 of 8: stop there").click()
    stopped = page.locator("#detail video").evaluate("(video) => [video.paused, video.currentTime]")
    assert stopped == [True, 2.5 / 8]
    settings = page.locator("#detail .settings").first.inner_text()
    assert f"seed\n{site.rows[0]['seed']}" in settings
    assert page.locator("#detail a", has_text="download").get_attribute("href").endswith(f"{site.rows[0]['key']}.mp4")


@pytest.mark.parametrize(("position", "frames_shown"), [(1, 8), (2, 8), (3, 8)])
def test_other_formats_bring_their_strip_along(
    site: Site, visit: Callable[..., Visit], position: int, frames_shown: int
) -> None:
    page = visit().open(f"{site.uri}#id=r{position:05d}")
    until(page, DRAWN)
    assert len({page.locator(".strip canvas").nth(k).screenshot() for k in range(frames_shown)}) == frames_shown


@pytest.mark.parametrize("index", [0, 4, 5])
def test_the_copied_commands_ask_for_the_same_clip(
    site: Site, visit: Callable[..., Visit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    page = visit(permissions=["clipboard-read", "clipboard-write"]).open(f"{site.uri}#id=r{index:05d}")

    page.locator(".again").get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()

    commands = page.evaluate("navigator.clipboard.readText()")
    assert commands == page.locator("#again").inner_text()
    files, _, run = commands.rpartition("\n")
    subprocess.run(["bash", "-euo", "pipefail", "-c", files], cwd=tmp_path, check=True)
    assert run == "pia-batch run again.yaml --manifest again.jsonl --output again"
    monkeypatch.chdir(tmp_path)
    config = RunConfig.load(Path("again.yaml"), {"manifest": "again.jsonl", "output": "again"})
    made = make_plan(config)
    assert (made.num_pending, made.num_rejected) == (1, 0)
    table = next(iter(made.manifest.batches())).table
    request = validation.check(table, config, made.engine_ids).requests.to_pylist()[0]
    wanted = site.rows[index] | ({"width": None, "height": None} if index == 5 else {})  # they come from the image
    for name in ("request_id", "prompt", "image_sha256", *SETTINGS.names):
        assert request[name] == wanted.get(name, request[name]), name
    image = fetch.read_image(request["image"], made.manifest.folder, config.images)
    assert image == (site.folder / "manifest" / "images" / f"{index % 5}.png").read_bytes()


def test_hostile_text_is_shown_and_never_obeyed(visit: Callable[..., Visit], tmp_path: Path) -> None:
    texts = [
        EVIL,
        "'; touch hurt; '",
        "END-OF-REQUEST\ntouch hurt",
        "\u202eevil\u2066\u200b",
        "{{ 7 * 7 }} ${hurt} %0a",
    ]
    rows = [result(k, request_id=f"id-{k} {text[:60]}".replace("\n", " "), prompt=text) for k, text in enumerate(texts)]
    rows += [failure(7, "non_finite", EVIL, prompt=EVIL, request_id=EVIL)]
    rows += [
        result(8, image="javascript:window.hurt=1"),
        result(9, image='x" onerror="window.hurt=1'),
        result(10, model=EVIL),
    ]
    prompts = [row["prompt"] for row in sorted(rows, key=lambda row: row["request_id"])]
    window = visit(1280, 3000, missing=True)  # two images are none
    page = window.open(build(tmp_path / "it's (mine)", rows).uri)

    assert page.locator("#grid .prompt bdi").all_text_contents() == prompts
    assert page.locator(".examples bdi").first.text_content() == EVIL
    for k, prompt in enumerate(prompts):
        page.locator("#grid button").nth(k).click()
        assert page.locator("#detail .prompt bdi").text_content() == prompt
        files = page.locator("#again").text_content().rpartition("\n")[0]
        assert not re.search("[\u200b\u202e\u2066]", files)
        subprocess.run(["bash", "-euc", files], cwd=tmp_path, check=True)
        assert json.loads((tmp_path / "again.jsonl").read_text())["prompt"] == prompt
        if page.locator("#inspect").count():
            assert inspected(page).is_file()
        page.keyboard.press("Escape")
    assert not (tmp_path / "hurt").exists()
    assert page.evaluate("window.hurt") is None


def inspected(page: Page) -> Path:
    """The file that the copyable command would inspect."""
    *command, uri = shlex.split(page.locator("#inspect").text_content() or "")
    assert command == ["pia-batch", "inspect"]
    return Path(unquote(urlsplit(uri).path))


@pytest.mark.parametrize("index", [0, 3])
def test_the_file_of_a_result_can_be_inspected(site: Site, visit: Callable[..., Visit], index: int) -> None:
    row = site.rows[index]
    name = layout.animation_name(row["key"], codecs.CODECS[row["format"]].extension)
    assert inspected(visit().open(f"{site.uri}#id={row['request_id']}")) == site.folder / "out" / name


def test_where_files_tell_nothing_the_page_offers_no_inspection(store: Store) -> None:
    publish(store, [result(0)])
    assert data_in(page_of(store))["inspect"] == store.uri
    publish(store, [result(0)], **{"encoding.provenance": False})
    assert data_in(page_of(store))["inspect"] is None


def test_the_policy_lets_no_other_script_or_markup_in(site: Site, visit: Callable[..., Visit]) -> None:
    window = visit()
    page = window.open(site.uri)
    attempt = """(code) => new Promise((done) => {
      addEventListener('securitypolicyviolation', (event) => done(event.effectiveDirective), { once: true });
      const element = (tag, settings) => document.body.appendChild(
        Object.assign(document.createElement(tag), settings));
      const attempts = {
        text: () => element('script', { text: 'window.hurt = 1' }),
        handler: () => document.body.setAttribute('onclick', 'window.hurt = 1'),
        markup: () => (document.body.innerHTML = '<b>hurt</b>'),
        link: () => element('a', { href: 'javascript:window.hurt = 1' }).click(),
        image: () => element('img', { src: 'https://example.com/x.png' }),
        film: () => element('video', { src: 'https://example.com/x.mp4' }),
        frame: () => element('iframe', { src: 'https://example.com/' }),
        form: () => element('form', { action: 'https://example.com/' }).submit(),
        style: () => document.body.setAttribute('style', 'color: red'),
        request: () => fetch('https://example.com/').catch(() => {}),
      };
      try { attempts[code](); } catch { /* told as a violation too */ }
    })"""
    directives = {
        **dict.fromkeys(("text", "handler", "markup"), "require-trusted-types-for"),
        "link": "script-src-elem", "image": "img-src", "film": "media-src", "frame": "frame-src", "form": "form-action",
        "style": "style-src-attr", "request": "connect-src",
    }  # fmt: skip
    assert {name: page.evaluate(attempt, name) for name in directives} == directives
    assert page.evaluate("window.hurt") is None
    assert page.locator("b").count() == 0
    window.told.clear()  # that is what was refused


def test_ten_thousand_results_are_a_few_dozen_elements(large: Site, visit: Callable[..., Visit]) -> None:
    window = visit(missing=True)
    page = window.open(large.uri)

    assert page.locator("#count").inner_text() == "10,000 results"
    assert page.evaluate("document.querySelectorAll('#grid li').length") < 60
    page.locator("#grid button").first.focus()
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.querySelector('.id').textContent") == "r09999"
    until(page, "document.activeElement.querySelector('video')?.currentTime > 0")
    assert page.evaluate("document.activeElement.parentElement.getAttribute('aria-posinset')") == "10000"
    assert page.evaluate("document.querySelectorAll('#grid li').length") < 60
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight / 2)")
    until(page, "document.querySelector('#grid li').dataset.position > 4500")
    ids = window.ids()
    assert ids == sorted(ids)
    assert ids[0] > "r04500"
    page.get_by_label("Search").fill("cat moving 98")
    found = sum("cat" in row["prompt"] and "98" in row["prompt"] for row in large.rows)
    until(page, f"document.getElementById('count').textContent === '{found} of 10,000 results'")


@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_sticks_out_of_a_narrow_screen(site: Site, visit: Callable[..., Visit], width: int) -> None:
    page = visit(width, 800).open(site.uri)
    fits = "document.scrollingElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    page.locator("#failures summary").first.click()
    page.locator(".config summary").click()
    assert page.evaluate(fits)
    page.locator("#grid button").first.click()
    assert page.evaluate(fits)
    assert page.evaluate("document.getElementById('detail').scrollWidth <= innerWidth")


CONTRAST = """(pairs) => {
  const rgb = (colour) => {
    const context = document.createElement('canvas').getContext('2d');
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
  };
  const light = (colour) => rgb(colour).reduce((sum, part, k) => sum + part * [0.2126, 0.7152, 0.0722][k], 0);
  const probe = document.body.appendChild(document.createElement('i'));
  const colour = (name) => { probe.style.color = `var(${name})`; return getComputedStyle(probe).color; };
  return pairs.map(([ink, paper]) => {
    const [a, b] = [light(colour(ink)), light(colour(paper))].sort((x, y) => y - x);
    return [ink, paper, (a + 0.05) / (b + 0.05)];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_themes(site: Site, visit: Callable[..., Visit], scheme: str) -> None:
    page = visit(color_scheme=scheme).open(site.uri)
    inks = ("--ink", "--soft", "--accent", "--bad")
    pairs = [[ink, paper] for ink in inks for paper in ("--paper", "--raised", "--sunken")] + [["--bad", "--bad-soft"]]
    for ink, paper, ratio in page.evaluate(CONTRAST, pairs):
        assert ratio >= 4.5, (scheme, ink, paper, ratio)  # WCAG 2.2, 1.4.3


def test_the_theme_follows_the_system_or_the_reader(site: Site, visit: Callable[..., Visit]) -> None:
    page = visit(color_scheme="dark").open(site.uri)
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(ground)
    page.get_by_role("button", name="Theme: system").click()
    light = page.evaluate(ground)
    assert (dark, light) == ("rgb(19, 20, 22)", "rgb(252, 252, 251)")
    page.reload()
    assert page.evaluate(ground) == light
    page.get_by_role("button", name="Theme: light").click()
    assert page.evaluate(ground) == dark


def test_who_wants_no_motion_gets_stills_until_asking(site: Site, visit: Callable[..., Visit]) -> None:
    page = visit(reduced_motion="reduce").open(site.uri)
    page.locator("#grid li").first.scroll_into_view_if_needed()
    page.wait_for_selector("#grid li:nth-child(2) canvas:not([hidden])")  # the first frame, laid over the GIF
    assert page.evaluate("document.querySelector('#grid video').paused")
    page.locator("#grid li").first.hover()
    until(page, "document.querySelector('#grid video').currentTime > 0")
    page.locator("#grid li").nth(1).hover()
    page.wait_for_selector("#grid li:nth-child(2) canvas", state="hidden")
    assert page.evaluate("document.querySelector('#grid video').paused")


def test_what_is_missing_says_so(site: Site, visit: Callable[..., Visit]) -> None:
    window = visit(missing=True)
    page = window.open(f"{site.uri}#q=gone.png")
    page.get_by_text("image not reachable from this page").wait_for()
    (site.folder / "aside").mkdir()
    clip = site.folder / "out" / layout.animation_name(site.rows[5]["key"], "mp4")
    moved = clip.rename(site.folder / "aside" / clip.name)
    page.get_by_label("Search").fill("r00005")
    page.locator("#grid").scroll_into_view_if_needed()
    page.get_by_text("animation missing, or not playable here").wait_for()
    moved.rename(clip)


def test_every_control_has_a_name(site: Site, visit: Callable[..., Visit]) -> None:
    page = visit().open(f"{site.uri}#id=r00000")
    unnamed = page.evaluate("""[...document.querySelectorAll('button, input, select, a, [role=img]')]
      .filter((element) => !element.getAttribute('aria-label') && !element.textContent.trim())
      .filter((element) => !element.labels?.length)
      .map((element) => element.outerHTML)""")
    assert unnamed == []


def test_without_javascript_the_head_and_the_failures_stay(site: Site, visit: Callable[..., Visit]) -> None:
    page = visit(java_script_enabled=False).page
    page.goto(site.uri)
    assert page.locator("h1").inner_text() == "14 animations, 4 failures"
    assert page.locator("noscript p").bounding_box()["height"] > 10
    assert not page.get_by_role("button", name="Copy").is_visible()
    assert page.locator("#failures .kind").count() == 3


def test_flagged_clips_are_covered_until_somebody_clicks(visit: Callable[..., Visit], tmp_path: Path) -> None:
    rows = [result(k, nsfw_frames=int(k == 1), nsfw_score=0.1 * k - 0.05, nsfw_input=False) for k in range(4)]
    rows[3] |= {"nsfw_input": True, "context": "windows", "num_frames": 8}
    page = visit().open(build(tmp_path, rows).uri)
    covered = "[...document.querySelectorAll('#grid li')].map((card) => card.querySelectorAll('.veiled').length)"
    until(page, "document.querySelectorAll('#grid video').length === 4")

    assert page.evaluate(covered) == [0, 2, 0, 2]
    assert "blur" in page.evaluate("getComputedStyle(document.querySelector('.veiled > *')).filter")
    assert page.locator("#grid .facts").all_inner_texts()[1].startswith("flagged · ")
    assert "8 frames, windows" in page.locator("#grid .facts").all_inner_texts()[3]
    page.locator("#grid li").nth(1).click()
    assert page.evaluate(covered) == [0, 0, 0, 2]
    assert not page.locator("dialog").is_visible()  # the first click only shows it
    page.locator("#grid li").nth(1).click()
    assert page.locator("dialog .veiled").count() == 0
    page.keyboard.press("Escape")
    until(page, "!location.hash.includes('id=')")  # or the event of closing closes the next one
    page.evaluate("location.hash = '#id=r00003'")
    until(page, "document.querySelector('dialog .strip') !== null")
    assert page.locator("dialog .veiled").count() == 3  # image, animation and film strip
    page.get_by_role("button", name="Show the flagged pictures").click()
    assert page.locator("dialog .veiled").count() == 0
    page.keyboard.press("Escape")
    page.select_option("select[name=safety]", "flagged")
    assert page.locator("#count").inner_text() == "2 of 4 results"


def test_prompts_by_frame_are_under_the_frames_where_they_begin(visit: Callable[..., Visit], tmp_path: Path) -> None:
    keys = [{"frame": 0, "prompt": "a red circle"}, {"frame": 4, "prompt": "a blue square"}]
    rows = [result(0, prompt=None, prompts=keys, prompt_interpolation="linear", prompt_hold=0.5), result(1)]
    page = visit().open(f"{build(tmp_path, rows).uri}#id=r00000")
    until(page, "document.querySelectorAll('dialog .strip .key').length === 2")

    assert page.locator("dialog .strip .key").all_inner_texts() == ["a red circle", "a blue square"]
    left = "(node) => Math.round(node.getBoundingClientRect().left)"
    starts = [key.evaluate(left) for key in page.locator("dialog .strip .key").all()]
    frames_at = [frame.evaluate(left) for frame in page.locator("dialog .strip > li:not(.key)").all()]
    assert starts == [frames_at[0], frames_at[4]]
    assert "linear between texts, each held for 0.5 of the way" in page.locator("dialog .frames .note").inner_text()
    assert page.locator("dialog .detail-body > .prompt").inner_text() == "0: a red circle / 4: a blue square"


@pytest.mark.parametrize(("file_format", "codec"), [("webm", None), ("mp4", "av1")])
def test_other_videos_play_and_show_their_frames(
    file_format: str, codec: str | None, visit: Callable[..., Visit], tmp_path: Path
) -> None:
    page = visit().open(f"{build(tmp_path, [result(0, format=file_format, codec=codec), result(1)]).uri}#id=r00000")

    until(page, "document.querySelectorAll('dialog .strip canvas').length === 8")
    until(page, DRAWN)
    assert page.evaluate("document.querySelector('dialog video').videoWidth") == 64


def test_a_chosen_point_of_a_chart_opens_its_result(site: Site, visit: Callable[..., Visit]) -> None:
    page = visit().open(site.uri)
    chart = page.locator(".chart .pickable")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.click(
        box["x"] + box["width"] * 294 / 320, box["y"] + box["height"] * 20 / 180
    )  # the one that is identical
    assert page.locator("#detail-title").inner_text() == "r00003"


@contextmanager
def served(site: Site) -> Iterator[str]:
    """A plain web server over the site; the address of the page. From a disk a browser shows no pixels to scripts."""
    handler = functools.partial(QuietHandler, directory=site.folder)
    with serving(handler) as address:
        yield f"{address}/out/_runs/{RUN}/report.html"


def strip_of(page: Page) -> npt.NDArray[np.int_]:
    """The frame strip of the result that is open; shape (8, 64, 64, 3), 0-255."""
    until(page, "[...document.querySelectorAll('.strip canvas')].every((canvas) => canvas.height === 64)")
    pixels = page.evaluate("""[...document.querySelectorAll('.strip canvas')].map((canvas) =>
      [...canvas.getContext('2d').getImageData(0, 0, 64, 64).data])""")
    return np.asarray(pixels).reshape(-1, 64, 64, 4)[..., :3].astype(int)


LATE = """
const tell = HTMLVideoElement.prototype.requestVideoFrameCallback;
HTMLVideoElement.prototype.requestVideoFrameCallback = function (callback) {
  this.late = !this.late;
  return this.late ? setTimeout(() => callback(0, { mediaTime: -1 })) : tell.call(this, callback);
};"""
"""A browser that says of each frame first that it still shows the one before."""
SILENT = "delete HTMLVideoElement.prototype.requestVideoFrameCallback;"


@pytest.mark.parametrize("browser", ["", LATE], ids=["as it is", "late"])
def test_a_plain_web_server_is_enough(site: Site, visit: Callable[..., Visit], browser: str) -> None:
    window = visit()
    window.page.add_init_script(browser)
    with served(site) as uri:
        page = window.open(f"{uri}#id=r00000")

        shown = strip_of(page)
        page.context.close()

    assert max(np.abs(shown - frames(0)).mean(axis=(1, 2, 3))) < 4  # frame k of the strip is frame k of the animation
    origin = uri.removesuffix(f"/out/_runs/{RUN}/report.html")
    assert all(asked.startswith((origin, "data:")) for asked in window.asked)


def test_a_browser_that_does_not_tell_which_frame_it_shows_gets_a_strip_too(
    site: Site, visit: Callable[..., Visit]
) -> None:
    window = visit()
    window.page.add_init_script(SILENT)
    with served(site) as uri:
        shown = strip_of(window.open(f"{uri}#id=r00000"))
        window.page.context.close()

    assert shown.std(axis=(1, 2, 3)).min() > 4  # pictures, whichever they are


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its own name for it
        pass


@pytest.mark.long
def test_the_copied_commands_make_the_same_frames(
    visit: Callable[..., Visit], write_manifest: Callable[..., str], tmp_path: Path
) -> None:
    table = requests_table(2, num_inference_steps=[2, 3], motion_scale=[0, 4], format=["gif", "webp"])
    output = tmp_path / "out"
    programs = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    start = functools.partial(subprocess.run, check=True, capture_output=True, text=True, env=os.environ | programs)
    start(["pia-batch", "run", "--manifest", write_manifest(table), "--output", output])
    printed = start(["pia-batch", "report", output]).stdout
    page = visit().open(f"{re.search('report: (.*)', printed)[1]}#id=r001")

    assert "prompt" in start(["bash", "-euc", page.locator("#inspect").inner_text()]).stdout
    start(["bash", "-euc", page.locator("#again").inner_text()], cwd=tmp_path)

    (drawn,), (again,) = output.glob("animations/*/*.webp"), tmp_path.glob("again/animations/*/*")
    assert pixels(again) == pixels(drawn)


def pixels(animation: Path) -> list[bytes]:
    with Image.open(animation) as opened:
        return [frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(opened)]
