"""Clips become stored animations and committed results, or failed results; nothing is overwritten."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from animated import animated, committed, fetched, stored
from fakes import ENGINE_ID, FakeClip, FakeControl, FakeEngine, animate_stage
from inputs import requests_table

from pia_batch.config import RunConfig
from pia_batch.errors import EngineError, ObjectExistsError, StorageError
from pia_batch.journal.layout import animation_name
from pia_batch.journal.log import Journal
from pia_batch.media import codecs
from pia_batch.pipeline.committer import Committer
from pia_batch.pipeline.dataset import CollectedResults
from pia_batch.pipeline.request_rows import condition_image
from pia_batch.pipeline.safety_guard import SafetyGuard
from pia_batch.schema.columns import FETCHED, Row
from pia_batch.storage.object_store import Store

MakeConfig = Callable[..., RunConfig]


def test_carried_columns_come_out_as_they_went_in(make_config: MakeConfig) -> None:
    carried = {
        "shop": pa.array(["a", None, "c"]).dictionary_encode(),
        "price": pa.array([1, None, 3], pa.decimal128(10, 2)),
        "tags": pa.array([["x", None], [], None]),
        "about": pa.array([{"n": 1}, None, {"n": None}], pa.struct([("n", pa.int8())])),
        "raw": pa.array([b"\0", None, b""], pa.large_binary()),
    }
    table = requests_table(3, prompt=["fine", "not finite", "fine"], image=["images/0.png", "images/1.png", "gone"])
    for name, column in carried.items():
        table = table.append_column(name, column)
    config = make_config(table, defaults__format="gif")

    rows = animated(config)

    assert [rows[f"r{k:03d}"]["status"] for k in range(3)] == ["succeeded", "failed", "failed"]
    for name, column in carried.items():
        assert [rows[f"r{k:03d}"][name] for k in range(3)] == column.to_pylist()
    (fragment,) = Journal(Store(config.output)).read(Journal(Store(config.output)).fragments())
    assert [fragment.schema.field(name).type for name in ("price", "tags", "about", "raw")] == [
        column.type for column in list(carried.values())[1:]
    ]
    assert not set(FETCHED.names) - {"fetch_seconds"} & set(fragment.column_names)


def test_a_clip_that_cannot_be_generated_fails_alone(make_config: MakeConfig) -> None:
    config = make_config(requests_table(3, prompt=["fine", "not finite", "fine"], format=["gif"] * 3))

    rows = animated(config)

    assert [rows[f"r{k:03d}"]["status"] for k in range(3)] == ["succeeded", "failed", "succeeded"]
    failed = rows["r001"]
    assert (failed["error_kind"], failed["sha256"], failed["motion"]) == ("non_finite", None, None)
    assert "not finite" in failed["error"]
    assert failed["gpu_seconds"] == 0.01


def test_a_clip_that_cannot_be_encoded_fails_alone(make_config: MakeConfig) -> None:
    class Clipped(FakeEngine):
        """Generates one frame too few of the second request."""

        def animate(self, shots: Sequence[Any]) -> list[FakeClip]:
            clips = super().animate(shots)
            clips[1].generated = clips[1].generated[:-1]
            return clips

    config = make_config(requests_table(3, format=["gif"] * 3, num_frames=[4, 4, 4]))

    rows = animated(config, Clipped())

    assert [rows[f"r{k:03d}"]["error_kind"] for k in range(3)] == [None, "encoding_failed", None]
    assert "got (64, 64, 3), expected (64, 64, 4)" in rows["r001"]["error"]
    assert len(stored(config)) == 2


class BrittleStore(Store):
    """Refuses what `refuses` names, and remembers what was asked of it."""

    def __init__(self, uri: str, refuses: str = "nothing") -> None:
        super().__init__(uri)
        self.refuses = refuses
        self.created: list[str] = []

    def create(self, name: str, data: bytes) -> None:
        if name.startswith(self.refuses):
            msg = "no answer"
            raise StorageError(msg)
        super().create(name, data)
        self.created.append(name)


def test_a_store_that_is_down_ends_the_run_and_fails_no_request(make_config: MakeConfig) -> None:
    config, control = make_config(requests_table(2, format=["gif"] * 2)), FakeControl()
    animator = animate_stage(config, control=control, store=BrittleStore(config.output, refuses="animations/"))

    with pytest.raises(StorageError):
        animator(fetched(config))

    assert committed(config) == {}
    assert control.ended == []


class Otherwise(FakeEngine):
    """Generates other pixels for the same request, as other batches and devices do."""

    def animate(self, shots: Sequence[Any]) -> list[FakeClip]:
        clips = super().animate(shots)
        for clip in clips:
            clip.generated = 255 - clip.generated
        return clips


def test_an_animation_stored_before_a_crash_is_adopted_and_never_overwritten(make_config: MakeConfig) -> None:
    config = make_config(requests_table(4, format=["mp4", "gif", "webp", "png_zip"]))
    requests = fetched(config)
    crashing = BrittleStore(config.output, refuses="_journal/")
    with pytest.raises(StorageError):
        animate_stage(config, store=crashing)(requests)
    before = stored(config)
    assert len(crashing.created) == len(before) == 4
    assert committed(config) == {}

    again = BrittleStore(config.output)
    outcomes = animate_stage(config, Otherwise(), run_id="run-2", store=again)(requests)

    assert outcomes["status"].to_pylist() == ["succeeded"] * 4
    assert stored(config) == before
    assert [name.split("/")[0] for name in again.created] == ["_journal"]
    for row in committed(config).values():
        data = before[row["animation_uri"]]
        assert (row["sha256"], row["num_bytes"]) == (hashlib.sha256(data).hexdigest(), len(data))
        assert row["duration_s"] == codecs.probe(data, row["format"]).duration_s
        assert row["run_id"] == "run-2"


def test_committing_the_same_batch_again_changes_nothing(make_config: MakeConfig) -> None:
    config = make_config(requests_table(2, format=["gif"] * 2))
    first, before = animated(config), stored(config)

    assert animated(config, Otherwise()) == first
    assert stored(config) == before
    assert len(Journal(Store(config.output)).fragments()) == 1


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda _: b"", lambda _: b"GIF89a?"], ids=["cut", "empty", "text"]
)
def test_a_damaged_object_under_the_key_fails_the_row_with_its_uri(
    make_config: MakeConfig, damage: Callable[[bytes], bytes]
) -> None:
    config = make_config(requests_table(2, format=["gif", "gif"]))
    requests = fetched(config)
    good = codecs.encode(np.zeros((8, 64, 64, 3), np.uint8), "gif", 8, config.encoding)
    store, name = Store(config.output), animation_name(requests["key"][0].as_py(), "gif")
    store.create(name, damage(good))

    animate_stage(config)(requests)

    rows = committed(config)
    assert [rows[f"r{k:03d}"]["status"] for k in range(2)] == ["failed", "succeeded"]
    assert rows["r000"]["error_kind"] == "encoding_failed"
    assert store.uri_of(name) in rows["r000"]["error"]
    assert "is damaged" in rows["r000"]["error"]
    assert rows["r000"]["animation_uri"] is None
    assert store.read(name) == damage(good)


def test_an_object_of_other_dimensions_under_the_key_is_not_adopted(make_config: MakeConfig) -> None:
    config = make_config(requests_table(1, format=["gif"], num_frames=[4]))
    requests = fetched(config)
    other = codecs.encode(np.zeros((3, 64, 64, 3), np.uint8), "gif", 8, config.encoding)
    Store(config.output).create(animation_name(requests["key"][0].as_py(), "gif"), other)

    animate_stage(config)(requests)

    (row,) = committed(config).values()
    assert row["error_kind"] == "encoding_failed"
    assert "got (64, 64, 3), expected (64, 64, 4)" in row["error"]


@pytest.mark.parametrize(
    ("limits", "prompt", "message"),
    [
        (
            {"limits__min_frame_std": 1},
            "a flat one",
            "the clip is flat: its frame_std is 0, below limits.min_frame_std 1",
        ),
        (
            {"limits__min_motion": 0.5},
            "a frozen one",
            "the clip is frozen: its motion is 0, below limits.min_motion 0.5",
        ),
    ],
)
def test_a_clip_that_shows_nothing_fails_where_the_config_says_so(
    make_config: MakeConfig, tmp_path: Path, limits: dict[str, float], prompt: str, message: str
) -> None:
    class Dull(FakeEngine):
        def animate(self, shots: Sequence[Any]) -> list[FakeClip]:
            clips = super().animate(shots)
            for shot, clip in zip(shots, clips, strict=True):
                if "flat" in shot.prompt:
                    clip.generated = np.full_like(clip.generated, 128)
                elif "frozen" in shot.prompt:
                    clip.generated = np.repeat(clip.generated[:1], len(clip.generated), axis=0)
            return clips

    table = requests_table(3, prompt=["lively", prompt, "lively too"], format=["gif"] * 3)

    assert {row["status"] for row in animated(make_config(table), Dull()).values()} == {"succeeded"}
    rows = animated(make_config(table, output=str(tmp_path / "strict"), **limits), Dull())

    assert [rows[name]["status"] for name in sorted(rows)] == ["succeeded", "failed", "succeeded"]
    assert rows["r001"]["error_kind"] == "degenerate"
    assert rows["r001"]["error"].startswith(message)
    assert (rows["r001"]["motion"], rows["r001"]["animation_uri"]) == (0, None)


def test_one_frame_cannot_be_frozen(make_config: MakeConfig) -> None:
    config = make_config(requests_table(1, num_frames=[1], format=["gif"]), limits__min_motion=5)

    assert animated(config)["r000"]["status"] == "succeeded"


class Objects(dict[str, bytes]):
    """An object store in memory."""

    def create(self, name: str, data: bytes) -> None:
        if name in self:
            raise ObjectExistsError(name)
        self[name] = data

    def read(self, name: str) -> bytes:
        return self[name]

    def uri_of(self, name: str) -> str:
        return f"memory://{name}"


def test_a_committer_needs_a_store_and_a_commit_log_only(make_config: MakeConfig) -> None:
    config, objects, commits = make_config(requests_table(3, format=["gif"] * 3)), Objects(), CollectedResults()
    counted: list[tuple[Any, ...]] = []

    def count(name: str, value: float, **tags: str) -> None:
        counted.append((name, value, *tags.values()))

    safety = SafetyGuard(config.safety, None)
    committer = Committer(
        objects, commits, config, {"default": ENGINE_ID}, safety, device="cuda:7", run_id="mine", count=count
    )
    requests = fetched(config)
    rows = requests.to_pylist()
    clips = [*FakeEngine().animate([FakeEngine.shot(**shot) for shot in shots_of(rows[:2])]), EngineError("broke")]

    results = committer.commit(requests, rows, clips, [1, 2, 3])

    (table,) = commits.take()
    assert [row["status"] for row in results] == table["status"].to_pylist() == ["succeeded", "succeeded", "failed"]
    assert table["attempts"].to_pylist() == [1, 2, 3]
    assert table["error_kind"].to_pylist() == [None, None, "engine_error"]
    assert set(table["device"].to_pylist()) == {"cuda:7"}
    assert set(table["run_id"].to_pylist()) == {"mine"}
    uris = [objects.uri_of(animation_name(row["key"], "gif")) for row in rows[:2]]
    assert table["animation_uri"].to_pylist() == [*uris, None]
    assert ("pia_batch_requests_total", 1, "failed", "engine_error") in counted
    assert {tags[0] for name, _, *tags in counted if name == "pia_batch_stage_seconds_total"} == {
        *("fetch", "finish", "encode", "commit")
    }


def shots_of(rows: list[Row]) -> list[dict[str, Any]]:
    return [{"image": condition_image(row), "prompt": row["prompt"], "num_frames": row["num_frames"]} for row in rows]
