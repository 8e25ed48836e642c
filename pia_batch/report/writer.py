"""Writing of pages: reads the results of a run, finished or not, and stores its page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pia_batch.errors import ConfigError
from pia_batch.journal import layout
from pia_batch.journal.log import Journal
from pia_batch.journal.results import is_published, read_latest, read_success_marker
from pia_batch.manifest import id_tables
from pia_batch.media.codecs import CODECS
from pia_batch.report import page, results
from pia_batch.report.embedded import with_embedded
from pia_batch.report.head import REMEDIES, PageHead, reproduction_config
from pia_batch.report.links import MediaLinks, with_media
from pia_batch.report.measured import Measured
from pia_batch.schema.columns import REQUEST, SETTINGS
from pia_batch.schema.run_record import RunRecord
from pia_batch.storage import local_disk, uris
from pia_batch.storage.object_store import Store

MAX_RESULTS = 20_000
"""Largest number of results of one page, about 0.3 KB each plus their prompts. A browser opens that many at once."""

EMBED_UP_TO = 200
"""Largest number of results of a page that embeds media which a browser cannot get by itself: at most a few MB."""

_MEASURES = {
    "motion": ("Motion", ""),
    "first_frame_psnr_db": ("First-frame PSNR", "dB"),
    "frame_mean": ("Frame mean", ""),
    "frame_std": ("Frame deviation", ""),
    "nsfw_score": ("Safety score", ""),
    "gpu_seconds": ("Device", "s"),
    "fetch_seconds": ("Fetch", "s"),
    "finish_seconds": ("Finish", "s"),
    "encode_seconds": ("Encode", "s"),
    "duration_s": ("Duration", "s"),
    "num_bytes": ("Size", "B"),
    "prompt_tokens": ("Prompt tokens", ""),
    "attempts": ("Attempts", ""),
    "finished_at": ("Finished", ""),
}
"""Measures by which the gallery can be sorted, with label and unit."""

_REPRODUCING = [column.name for column in REQUEST if column in list(results.COLUMNS)]
"""Columns that a result and a manifest share, by name and type: they suffice to make the clip again."""


@dataclass(frozen=True)
class ReportOptions:
    """Options of a page."""

    max_results: int = MAX_RESULTS
    """Largest number of results on the page.

    If there are more, the page has all failures (up to half of its results) and a random sample of the rest. Counts,
    times and error kinds are those of all results in any case.
    """
    embed: bool | None = None
    """True to embed thumbnails of condition images that the page cannot reach, and frame strips of GIF, WebP and
    zipped PNGs, of which a browser gives a page on disk only one frame, and of videos that not every browser plays.
    None: if there are up to `EMBED_UP_TO` results.
    """
    media_url: str | None = None
    """HTTP(S) address of the output folder; None: animations are named relative to the page."""
    only: pa.Array | None = None
    """Ids of the requests on the page and in its counts, strings; None: all requests."""
    price_per_hour: float | None = None
    """Price of one device-hour, in any currency; None: the price in the run's config, or no cost."""
    measured: Measured | None = None
    """Evaluation of the run, whose measures the page shows; None: none. Pages of unfinished runs have none."""
    comparisons: tuple[str, ...] = ()
    """Pages of `pia-batch compare` to link to: files, URIs where the page is, or HTTP(S) addresses."""


@dataclass(frozen=True)
class Report:
    """Page that was written."""

    run_id: str
    uri: str
    num_results: int
    num_shown: int
    num_bytes: int


def write(
    store: Store, run_id: str | None = None, options: ReportOptions | None = None, path: Path | None = None
) -> Report:
    """Render the page of a run and store it as `_runs/<run_id>/report.html`, or as the local file `path`.

    A page of chosen requests is stored next to it, as `report-<hash of their ids>.html`.

    Args:
        store: Store of the output.
        run_id: Id of a published run; None: the newest.
        options: Options of the page; None: the defaults.
        path: Local file to write instead; media are then named relative to it.

    Raises:
        ConfigError: There are no such results, or a page at `path` could not reach the media.
        StorageError: The store refused or did not answer, or results are damaged.
    """
    options = options or ReportOptions()
    measured = options.measured
    run_id, parts = _published(store, measured.run_id if run_id is None and measured else run_id)
    counts = results.ResultCounts(run_id)
    sample = results.ResultSample(options.max_results, measured.fields if measured else ())
    for part in parts:
        name = f"{layout.results_folder(run_id)}/{part['name']}"
        rows = results.read_part(store, name)
        rows = measured.joined(rows, name) if measured else rows
        if options.only is not None:
            rows = rows.filter(pc.is_in(rows["request_id"], options.only))
        counts.add(rows)
        sample.add(rows)
    if not counts.requests and options.only is not None:
        msg = f"--only: run {run_id} has none of the {len(options.only)} requests of that table; check its ids"
        raise ConfigError(msg)
    return _write(store, counts, sample, options, path)


def write_so_far(store: Store, run_id: str) -> Report:
    """Render and store the page of a run that ended without publishing: it shows the results which that run committed.

    Reads the whole journal.

    Raises:
        StorageError: The store refused or did not answer, or a fragment is damaged.
    """
    options = ReportOptions()
    running = results.RunningResults(
        Journal(store), results.ResultCounts(run_id), results.ResultSample(options.max_results)
    )
    running.read_on()
    return _write(store, running.counts, running.sample, options, None)


def follow(
    store: Store, run_id: str, every_s: float, options: ReportOptions | None = None, path: Path | None = None
) -> Iterator[Report]:
    """Write the page of an unfinished run for each item that the caller takes, and finally that of its results.

    Until the run has published, the page shows the results that it has committed, and browsers reload it.

    Args:
        store: Store of the output.
        run_id: Id of a run that has begun.
        every_s: Interval at which browsers reload the page, in seconds; the caller waits as long between two items.
        options: Options of the page; None: the defaults.
        path: Local file to write instead, see `write`.

    Raises:
        ConfigError, StorageError: See `write`.
    """
    options = options or ReportOptions()
    running = results.RunningResults(
        Journal(store), results.ResultCounts(run_id), results.ResultSample(options.max_results)
    )
    while not is_published(store, run_id):
        running.read_on()
        yield _write(store, running.counts, running.sample, options, path, reload_s=every_s)
    yield write(store, run_id, options, path)


def _write(
    store: Store,
    counts: results.ResultCounts,
    sample: results.ResultSample,
    options: ReportOptions,
    path: Path | None,
    reload_s: float | None = None,
) -> Report:
    """Render a page and store it."""
    selection = "" if options.only is None else id_tables.digest_of(options.only)[:8]
    name = layout.report_name(counts.run_id, selection)
    uri = path.absolute().as_uri() if path else store.uri_of(name)
    shown = sample.rows()
    data = _render(store, counts, shown, uri, options, reload_s).encode()
    if path is None:
        store.replace(name, data)
    else:
        local_disk.write_file(path, data, "--out")
    return Report(counts.run_id, uri, counts.requests, len(shown), len(data))


def _published(store: Store, run_id: str | None) -> tuple[str, list[dict[str, Any]]]:
    """Return the id of the published run to show, and the files of its results."""
    if run_id is None:
        newest = read_latest(store)
        if newest is None:
            msg = f"{store.uri} has no results yet; `pia-batch run` publishes them when every request is finished"
            raise ConfigError(msg)
        run_id = str(newest["run_id"])
    marker = read_success_marker(store, run_id)
    if marker is None:
        names = {item.name: layout.results_run_id(item.name) for item in store.list(layout.RESULTS)}
        known = ", ".join(sorted(run for name, run in names.items() if run and name == layout.success_marker(run)))
        msg = f"run {run_id!r} has no published results in {store.uri}; published runs: {known or 'none'}"
        raise ConfigError(msg)
    return run_id, marker["parts"]


def _render(
    store: Store,
    counts: results.ResultCounts,
    shown: pa.Table,
    page_uri: str,
    options: ReportOptions,
    reload_s: float | None,
) -> str:
    """Return the HTML of the page; browsers reload it every `reload_s` seconds, if that is not None."""
    record = _run_record(store, counts.run_id)
    config = uris.redacted_json(record.config or {}) if record else {}
    folder = (record.folder if record else None) or ""
    links = MediaLinks(store.uri, page_uri, folder, options.media_url, config.get("images"))
    rows = with_media(shown, links)
    if options.embed or (options.embed is None and len(shown) <= EMBED_UP_TO):
        rows = with_embedded(rows, store, links)
    price = (config.get("budget") or {}).get("price_per_hour")
    price = price if options.price_per_hour is None else options.price_per_hour
    about = _about_evaluation(store, options.measured, rows)
    comparisons = [links.linked_page(uri) for uri in options.comparisons]
    page_head = PageHead(
        store.uri,
        record,
        counts,
        config,
        price,
        reload_s,
        options.measured.evaluation_id if about and options.measured else None,
        comparisons,
    )
    data = {
        "run_id": counts.run_id,
        "requests": counts.requests,
        "columns": {name: page.column(name, rows[name]) for name in rows.column_names},
        "rows": len(rows),
        "weights": results.weights(counts, shown),
        "settings": SETTINGS.names,
        "measures": {name: label for name, label in _MEASURES.items() if name in rows.column_names},
        "evaluation": about,
        "remedies": REMEDIES,
        "players": {name: codec.player for name, codec in CODECS.items()},
        "inspect": store.uri if (config.get("encoding") or {}).get("provenance", True) else None,
        "reproduction": {
            "columns": _REPRODUCING,
            "config": reproduction_config(config, links.folder),
            "folder": links.folder,
        },
    }
    return page.assemble(page_head, data, links.sources)


def _about_evaluation(store: Store, measured: Measured | None, rows: pa.Table) -> dict[str, Any] | None:
    """Return what the script needs of an evaluation; None if the rows have no measures of one."""
    if measured is None or not {field.name for field in measured.fields} <= set(rows.column_names):
        return None
    return {"id": measured.evaluation_id, "output": store.uri, "measures": [asdict(each) for each in measured.measures]}


def _run_record(store: Store, run_id: str) -> RunRecord | None:
    """Return the record of a run, or None if it is gone."""
    name = layout.run_record_name(run_id)
    try:
        return RunRecord.parse(store.read(name), store.uri_of(name))
    except FileNotFoundError:
        return None
