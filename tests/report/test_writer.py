"""Writing of the page: of finished and running runs, by the command, and what must not be in it."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
from reported import (
    RUN,
    begin,
    commit,
    data_in,
    failure,
    page_of,
    publish,
    result,
    store_clip,
    values_of,
    visible,
)

from pia_batch import cli, report
from pia_batch.errors import ConfigError, StorageError
from pia_batch.journal import layout
from pia_batch.storage.object_store import Store


def test_there_is_no_page_before_there_are_results(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="has no results yet; `pia-batch run` publishes them"):
        report.write(store)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["report", store.uri])
    assert "has no results yet" in capsys.readouterr().err

    publish(store, [result(0)])
    with pytest.raises(ConfigError, match=f"run 'other' has no published results .* published runs: {RUN}"):
        report.write(store, "other")


def test_results_that_are_gone_or_damaged_since_they_were_published_are_named(store: Store) -> None:
    publish(store, [result(0)])
    name = layout.success_marker(RUN)
    store.replace(name, b"{}")
    with pytest.raises(StorageError, match=f"{name} is damaged"):
        report.write(store)

    store.delete(name)
    with pytest.raises(ConfigError, match=f"run '{RUN}' has no published results"):
        report.write(store)


def test_damaged_results_are_named(store: Store) -> None:
    publish(store, [result(0)])
    store.replace(f"_runs/{RUN}/run.json", b"{")
    with pytest.raises(StorageError, match=r"run\.json is damaged"):
        report.write(store)
    store.replace(f"{layout.RESULTS}{RUN}/part-00000.parquet", b"PAR1 and no more")
    with pytest.raises(StorageError, match=r"part-00000\.parquet are damaged"):
        report.write(store)


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

    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "fast.html").write_text("<title>exact and fast</title>")
    linked = ["--comparison", str(tmp_path / "pages" / "fast.html"), "--comparison", "https://example.com/other.html"]

    with pytest.raises(SystemExit, match="0"):
        cli.main(["report", store.uri, "--max-results", "2", "--out", str(tmp_path / "pages" / "run.html"), *linked])

    printed = capsys.readouterr().out
    assert "3 results, 2 of them shown" in printed
    assert f"report: {(tmp_path / 'pages' / 'run.html').as_uri()}" in printed
    html = (tmp_path / "pages" / "run.html").read_text(encoding="utf-8")
    assert '<a href="./fast.html"><bdi>exact and fast</bdi></a>' in html
    assert '<a href="https://example.com/other.html"><bdi>other.html</bdi></a>' in html
    data = data_in(html)
    assert data["evaluation"] is None
    assert values_of(data, "media")[0].startswith("../out/animations/")


def test_secrets_of_a_config_do_not_reach_the_page(store: Store) -> None:
    secret = "https://user:CANARY@host/weights.safetensors?X-Amz-Signature=CANARY"  # noqa: S105 - none
    publish(store, [result(0)], **{"model.base": secret, "images.allow": ["s3://photos"]})
    about = json.loads(store.read(f"_runs/{RUN}/run.json"))
    assert "CANARY" in json.dumps(about)

    html = page_of(store)

    assert "CANARY" not in html
    assert "https://host/weights.safetensors" in html


def test_where_files_tell_nothing_the_page_offers_no_inspection(store: Store) -> None:
    publish(store, [result(0)])
    assert data_in(page_of(store))["inspect"] == store.uri
    publish(store, [result(0)], **{"encoding.provenance": False})
    assert data_in(page_of(store))["inspect"] is None


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
