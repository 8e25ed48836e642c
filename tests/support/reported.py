"""Published results as a run leaves them, and what stands in the page about them."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import UTC, datetime, timedelta
from html import unescape
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pia_batch import report
from pia_batch.config import EncodingConfig, RunConfig
from pia_batch.journal import layout, log
from pia_batch.media import codecs
from pia_batch.media.posters import make_poster
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


def store_clip(store: Store, row: dict[str, Any], seed: int = 0) -> None:
    data = codecs.encode(
        frames(seed), row["format"], row["fps"], EncodingConfig(), video_codec=row.get("codec") or "h264"
    )
    store.replace(layout.animation_name(row["key"], codecs.CODECS[row["format"]].extension), data)
    if row.get("poster"):
        store.replace(layout.poster_name(row["key"]), make_poster(frames(seed)[0]))


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
