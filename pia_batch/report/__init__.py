"""One HTML page that shows a run: its counts, its failures, and every animation beside its condition image.

The page is one file: markup, style, script and the results as JSON are in it, and it asks nobody for anything but the
media. Those it names relative to the place where it lies, so that it works from a disk and from a static site alike.
What browsers cannot get there is embedded while a run is small: see `Options.embed`.

Prompts, ids, image URIs and errors are the text of strangers. It is escaped in the markup, reaches the script as data,
and a content security policy lets no other script run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pia_batch.errors import ConfigError, StorageError
from pia_batch.journal import layout
from pia_batch.journal.log import Journal
from pia_batch.journal.results import is_published, read_latest
from pia_batch.media.codecs import CODECS
from pia_batch.report import page, results
from pia_batch.report.facts import REMEDIES, Facts, again_config
from pia_batch.report.media import Places, with_embedded, with_media
from pia_batch.schema.columns import REQUEST, SETTINGS
from pia_batch.schema.run_record import RunRecord
from pia_batch.storage import uris
from pia_batch.storage.object_store import Store

MAX_RESULTS = 20_000
"""Results of one page, about 0.3 KB each and their prompts. A browser opens that many at once."""

EMBED_UP_TO = 200
"""Results of a page that embeds what a browser cannot get by itself: at most a few MB."""

_MEASURES = {
    "motion": ("Motion", ""),
    "first_frame_psnr_db": ("First-frame PSNR", "dB"),
    "frame_mean": ("Frame mean", ""),
    "frame_std": ("Frame deviation", ""),
    "gpu_seconds": ("Device", "s"),
    "fetch_seconds": ("Fetch", "s"),
    "encode_seconds": ("Encode", "s"),
    "duration_s": ("Duration", "s"),
    "num_bytes": ("Size", "B"),
    "prompt_tokens": ("Prompt tokens", ""),
    "attempts": ("Attempts", ""),
    "finished_at": ("Finished", ""),
}
"""What the gallery can be sorted by, with label and unit."""

_AGAIN = [column.name for column in REQUEST if column in list(results.COLUMNS)]
"""What a result row and a manifest share, name and type: enough to make the clip again."""


@dataclass(frozen=True)
class Options:
    """What may differ from page to page of the same results."""

    max_results: int = MAX_RESULTS
    """More than this, and the page holds all failures it can (up to half of its places) and a fair sample of the rest;
    counts, times and failure kinds are those of all results anyway."""
    embed: bool | None = None
    """Put thumbnails of the condition images that the page cannot reach into it, and frame strips of GIF, WebP and
    zipped PNGs, of which a browser shows a page on disk one frame only. None: if there are up to `EMBED_UP_TO`."""
    media_url: str | None = None
    """The http(s) address of the output folder; None: animations are named relative to the page."""
    price_per_hour: float | None = None
    """Of one device, in any currency; None: the page tells no cost."""


@dataclass(frozen=True)
class Report:
    """A page that was written."""

    run_id: str
    uri: str
    num_results: int
    num_shown: int
    num_bytes: int


def write(store: Store, run_id: str | None = None, options: Options | None = None, path: Path | None = None) -> Report:
    """Render the page of a run and store it as `_runs/<run_id>/report.html`, or as the local file `path`.

    Args:
        store: the output.
        run_id: which published run; None: the newest.
        options: what the page holds.
        path: a local file instead; media are then named relative to it.

    Raises:
        ConfigError: there are no such results, or nothing by which a page at `path` could find the media.
        StorageError: the store refused or did not answer, or results are damaged.
    """
    options = options or Options()
    run_id = _published(store, run_id)
    tally, sample = results.Tally(run_id), results.Sample(options.max_results)
    for part in _json_object(store, layout.success_marker(run_id))["parts"]:
        rows = results.read_part(store, f"{layout.results_folder(run_id)}/{part['name']}")
        tally.add(rows)
        sample.add(rows)
    return _write(store, tally, sample, options, path)


def write_so_far(store: Store, run_id: str) -> Report:
    """Render and store the page of a run that has ended without results: it shows what the run has committed itself.

    It reads the whole journal.

    Raises:
        StorageError: the store refused or did not answer, or a fragment is damaged.
    """
    options = Options()
    so_far = results.SoFar(Journal(store), results.Tally(run_id), results.Sample(options.max_results))
    so_far.read_on()
    return _write(store, so_far.tally, so_far.sample, options, None)


def follow(
    store: Store, run_id: str, every_s: float, options: Options | None = None, path: Path | None = None
) -> Iterator[Report]:
    """Write the page of a run that goes on, once for each item that is asked for, and at last that of its results.

    Until the run has published, the page shows what it has committed itself, and browsers load it again.

    Args:
        store: the output.
        run_id: a run that has begun.
        every_s: how often the browser loads the page again, in seconds; the caller waits as long between two items.
        options: what the page holds.
        path: as in `write`.

    Raises:
        ConfigError, StorageError: as in `write`.
    """
    options = options or Options()
    so_far = results.SoFar(Journal(store), results.Tally(run_id), results.Sample(options.max_results))
    while not is_published(store, run_id):
        so_far.read_on()
        yield _write(store, so_far.tally, so_far.sample, options, path, reload_s=every_s)
    yield write(store, run_id, options, path)


def _write(
    store: Store,
    tally: results.Tally,
    sample: results.Sample,
    options: Options,
    path: Path | None,
    reload_s: float | None = None,
) -> Report:
    """Render a page and put it where it belongs."""
    name = layout.report_name(tally.run_id)
    uri = path.absolute().as_uri() if path else store.uri_of(name)
    shown = sample.rows()
    data = _render(store, tally, shown, uri, options, reload_s).encode()
    if path is None:
        store.replace(name, data)
    else:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as err:
            msg = f"cannot write {path}: {err.strerror or err}"
            raise ConfigError(msg) from None
    return Report(tally.run_id, uri, tally.requests, len(shown), len(data))


def _published(store: Store, run_id: str | None) -> str:
    """The run to show, whose results are complete."""
    if run_id is None:
        newest = read_latest(store)
        if newest is None:
            msg = f"{store.uri} has no results yet; `pia-batch run` publishes them when every request is finished"
            raise ConfigError(msg)
        return str(newest["run_id"])
    if not is_published(store, run_id):
        names = {item.name: layout.results_run_id(item.name) for item in store.list(layout.RESULTS)}
        known = ", ".join(sorted(run for name, run in names.items() if run and name == layout.success_marker(run)))
        msg = f"run {run_id!r} has no complete results below {store.uri}; those that have: {known or 'none'}"
        raise ConfigError(msg)
    return run_id


def _render(
    store: Store, tally: results.Tally, shown: pa.Table, page_uri: str, options: Options, reload_s: float | None
) -> str:
    """The page of `shown`; one that a browser loads again while the run goes on, every `reload_s` seconds."""
    record = _run_record(store, tally.run_id)
    config = uris.redacted_json(record.config or {}) if record else {}
    folder = (record.folder if record else None) or ""
    places = Places(store.uri, page_uri, folder, options.media_url, config.get("images"))
    rows = with_media(shown, places)
    if options.embed or (options.embed is None and len(shown) <= EMBED_UP_TO):
        rows = with_embedded(rows, store, places)
    price = (config.get("budget") or {}).get("price_per_hour")
    price = price if options.price_per_hour is None else options.price_per_hour
    head = Facts(store.uri, record, tally, config, price, reload_s)
    data = {
        "run_id": tally.run_id,
        "requests": tally.requests,
        "columns": {name: page.column(name, rows[name]) for name in rows.column_names},
        "rows": len(rows),
        "weights": results.weights(tally, shown),
        "settings": SETTINGS.names,
        "measures": {name: label for name, label in _MEASURES.items() if name in rows.column_names},
        "remedies": REMEDIES,
        "players": {name: codec.player for name, codec in CODECS.items()},
        "inspect": store.uri if (config.get("encoding") or {}).get("provenance", True) else None,
        "again": {"columns": _AGAIN, "config": again_config(config, places.folder), "folder": places.folder},
    }
    return page.assemble(head, data, places.sources)


def _run_record(store: Store, run_id: str) -> RunRecord | None:
    """Return the record of a run, or None if it is gone."""
    name = layout.run_record_name(run_id)
    try:
        return RunRecord.parse(store.read(name), store.uri_of(name))
    except FileNotFoundError:
        return None


def _json_object(store: Store, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads(store.read(name)))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as err:
        msg = f"{store.uri_of(name)} is damaged: {err}; run again, or take another --run-id"
        raise StorageError(msg) from None
