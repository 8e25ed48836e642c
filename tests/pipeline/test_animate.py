import contextlib
import hashlib
import io
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fakes import ENGINE_ID, FakeClip, FakeControl, FakeEngine, FakeShelf, animate_stage
from inputs import png, requests_table
from PIL import Image

from pia_batch.config import RunConfig
from pia_batch.errors import BrokenDeviceError, ConfigError, EncodingError, StorageError
from pia_batch.journal.layout import animation_name
from pia_batch.journal.log import Journal
from pia_batch.manifest.reader import Manifest
from pia_batch.media import codecs
from pia_batch.media.quality import check_animation, measures
from pia_batch.pipeline.animate import Animate, WorkerProcess
from pia_batch.pipeline.outcomes import OUTCOME
from pia_batch.pipeline.stages import Arrange, DropFinished, FetchImages, Validate
from pia_batch.schema.columns import FETCHED, Row
from pia_batch.schema.keys import KeySet, keys_from_hex
from pia_batch.storage.object_store import Store

MakeConfig = Callable[..., RunConfig]


def validated(config: RunConfig) -> pa.Table:
    found = Manifest.open(config.manifest)
    rows = pa.concat_tables([batch.table for batch in found.batches()])
    return Validate(config, {"default": ENGINE_ID})(rows)


def fetched(config: RunConfig) -> pa.Table:
    return FetchImages(config.images, Manifest.open(config.manifest).folder)(validated(config))


def animate(config: RunConfig, engine: Any = None, control: Any = None) -> dict[str, Row]:
    """The result rows of a whole manifest, by request, through all stages and back out of the journal."""
    animate_stage(config, engine, control)(fetched(config))
    return committed(config)


def committed(config: RunConfig) -> dict[str, Row]:
    record = Journal(Store(config.output))
    rows = [row for table in record.winning_rows(record.outcomes()) for row in table.to_pylist()]
    return {row["request_id"]: row for row in rows}


def stored(config: RunConfig) -> dict[str, bytes]:
    store = Store(config.output)
    return {store.uri_of(item.name): store.read(item.name) for item in store.list("animations/")}


# --- the good case ---------------------------------------------------------------------------------------------------


def test_every_good_request_has_an_animation_and_a_result_that_tells_the_truth(make_config: MakeConfig) -> None:
    table = requests_table(
        8,
        format=["mp4", "gif", "webp", "png_zip"] * 2,
        width=pa.array([64, 32, 48, 40, None, None, None, None]),
        height=pa.array([32, 64, 40, 48, None, None, None, None]),
        num_frames=pa.array([4, 5, 3, 2, 1, 1, 1, 1]),
        fps=[8.0, 10.0, 4.0, 2.0, 8.0, 10.0, 4.0, 2.0],
    )
    config, engine = make_config(table), FakeEngine()
    started = datetime.now(UTC)

    rows = animate(config, engine)

    objects = stored(config)
    assert [len(call) for call in engine.calls] == [8]
    assert len(objects) == 8
    for number, request in enumerate(table.to_pylist()):
        row = rows[request["request_id"]]
        assert (row["status"], row["error_kind"], row["error"]) == ("succeeded", None, None)
        name = animation_name(row["key"], codecs.CODECS[request["format"]].extension)
        assert row["animation_uri"] == Store(config.output).uri_of(name)
        data = objects[row["animation_uri"]]
        assert (row["num_bytes"], row["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        size = (request["width"] or 64, request["height"] or 64)
        info = codecs.probe(data, request["format"])
        assert (info.width, info.height) == (row["width"], row["height"]) == size
        assert info.num_frames == row["num_frames"] == request["num_frames"]
        assert info.duration_s == row["duration_s"] == pytest.approx(request["num_frames"] / request["fps"])
        assert row["image_sha256"] == hashlib.sha256(png(number % 4)).hexdigest()
        assert row["image"] == request["image"]
        assert (row["device"], row["engine_id"], row["run_id"], row["attempts"]) == ("fake", ENGINE_ID, "run-1", 1)
        assert (row["prompt_tokens"], row["prompt_truncated"], row["gpu_seconds"]) == (7, False, 0.01)
        assert row["fetch_seconds"] > 0
        assert row["encode_seconds"] > 0
        assert started - timedelta(seconds=1) < row["finished_at"] <= datetime.now(UTC)
        assert row["first_frame_psnr_db"] is None  # the fake engine begins with the condition image itself
        assert (row["motion"] > 0) == (request["num_frames"] > 1)


def test_frames_and_settings_reach_the_engine_and_the_file_unchanged(make_config: MakeConfig) -> None:
    table = requests_table(
        2,
        format=["png_zip", "png_zip"],
        seed=pa.array([7, None]),
        motion_curve=pa.array([[1.0, 0.5], None]),
        motion_scale=pa.array([1, 2]),
        strength=[0.5, 1.0],
        clip_skip=pa.array([1, None]),
        negative_prompt=["blurry", None],
    )
    config, engine = make_config(table), FakeEngine()

    rows = animate(config, engine)

    ((first, second),) = engine.calls
    assert (first.seed, first.motion_curve, first.strength, first.clip_skip) == (7, (1.0, 0.5), 0.5, 1)
    assert (first.negative_prompt, second.negative_prompt) == ("blurry", "")
    assert (second.seed, second.motion_curve, second.motion_scale) == (rows["r001"]["seed"], None, 2)
    assert first.prompt == table["prompt"][0].as_py()
    for shot, row in ((first, rows["r000"]), (second, rows["r001"])):
        picture = np.asarray(shot.image)
        frames = codecs.decode(stored(config)[row["animation_uri"]], "png_zip")
        assert np.array_equal(frames, [np.roll(picture, k, axis=1) for k in range(row["num_frames"])])


def test_the_stage_hands_back_one_small_row_for_each_request_in_order(make_config: MakeConfig) -> None:
    config = make_config(requests_table(3, prompt=["fine", "not finite", "fine"], format=["gif"] * 3))
    requests = fetched(config)

    outcomes = animate_stage(config)(requests)

    assert outcomes.schema == OUTCOME
    assert outcomes["key"].to_pylist() == requests["key"].to_pylist()
    assert outcomes["status"].to_pylist() == ["succeeded", "failed", "succeeded"]
    assert outcomes["error_kind"].to_pylist() == [None, "non_finite", None]
    assert outcomes["animation_uri"][1].as_py() is None
    assert set(stored(config)) == {outcomes["animation_uri"][k].as_py() for k in (0, 2)}


def test_seconds_on_the_device_are_counted_while_they_pass(make_config: MakeConfig) -> None:
    class WatchedEngine(FakeEngine):
        during: list[float | None]

        def animate(self, shots: Sequence[Any]) -> list[FakeClip]:
            clips = super().animate(shots)
            self.during = [animator.generating_seconds]
            return clips

    config = make_config(requests_table(2, format=["gif"] * 2))
    engine = WatchedEngine(seconds=0.05)
    animator = animate_stage(config, engine)
    assert animator.generating_seconds == 0

    animator(fetched(config))

    drawn = animator.generating_seconds
    assert 0.05 <= engine.during[0] <= drawn
    assert animator.generating_seconds == drawn  # nothing is on the device any more


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

    rows = animate(config)

    assert [rows[f"r{k:03d}"]["status"] for k in range(3)] == ["succeeded", "failed", "failed"]
    for name, column in carried.items():
        assert [rows[f"r{k:03d}"][name] for k in range(3)] == column.to_pylist()
    (fragment,) = Journal(Store(config.output)).read(Journal(Store(config.output)).fragments())
    assert [fragment.schema.field(name).type for name in ("price", "tags", "about", "raw")] == [
        column.type for column in list(carried.values())[1:]
    ]
    assert not set(FETCHED.names) - {"fetch_seconds"} & set(fragment.column_names)


def test_no_requests_are_no_work_and_no_fragment(make_config: MakeConfig) -> None:
    config, engine = make_config(), FakeEngine()
    requests = fetched(config).slice(0, 0)

    assert FetchImages(config.images, "")(validated(config).slice(0, 0)).schema == requests.schema
    outcomes = animate_stage(config, engine)(requests)

    assert (len(outcomes), outcomes.schema) == (0, OUTCOME)
    assert engine.calls == []
    assert list(Store(config.output).list("")) == []


# --- Validate, DropFinished, FetchImages -----------------------------------------------------------------------------


def test_validate_drops_what_the_manifest_rules_out_and_fills_in_defaults(make_config: MakeConfig) -> None:
    config = make_config(requests_table(3, motion_scale=pa.array([None, 99, 3]), num_frames=[16, 16, 16]))

    requests = validated(config)

    assert requests["request_id"].to_pylist() == ["r000", "r002"]
    assert requests["motion_scale"].to_pylist() == [config.defaults.motion_scale, 3]
    assert all(len(key) == 32 for key in requests["key"].to_pylist())


def test_drop_finished_keeps_the_others_in_order(make_config: MakeConfig) -> None:
    requests = validated(make_config(requests_table(5)))
    finished = KeySet.of(keys_from_hex(requests["key"].take([3, 1])))

    left = DropFinished(finished)(requests)

    assert left["request_id"].to_pylist() == ["r000", "r002", "r004"]
    assert left.schema == requests.schema
    assert DropFinished(KeySet.of(keys_from_hex(requests["key"])))(requests).num_rows == 0
    assert DropFinished(finished)(requests.slice(0, 0)).num_rows == 0


def test_fetched_pixels_are_rgb_of_the_size_asked_for(make_config: MakeConfig) -> None:
    config = make_config(requests_table(2, width=[64, 24], height=[32, 40]))

    rows = fetched(config).to_pylist()

    assert [len(row["pixels"]) for row in rows] == [64 * 32 * 3, 24 * 40 * 3]
    assert "image_bytes" not in rows[0]
    assert [row["fetched_sha256"] for row in rows] == [hashlib.sha256(png(k)).hexdigest() for k in range(2)]


def test_each_kind_of_bad_image_fails_its_own_row_and_no_other(make_config: MakeConfig) -> None:
    sha256 = hashlib.sha256(png(0)).hexdigest()
    images = {
        "images/0.png": None,
        "images/gone.png": "image_unavailable",
        "images": "image_unavailable",
        "requests.parquet": "image_unreadable",
        "https://169.254.169.254/latest": "image_not_allowed",
        "s3://key:secret@bucket/x.png": "image_unavailable",
        "images/1.png": "image_mismatch",
        "s3://[bucket/x.png": "image_unavailable",
        "images/2.png": None,
    }
    promised = pa.array([sha256.upper() if name in ("images/0.png", "images/1.png") else None for name in images])
    config = make_config(requests_table(len(images), image=list(images), image_sha256=promised, format=["gif"] * 9))

    rows = animate(config)

    assert {row["image"]: row["error_kind"] for row in rows.values()} == {
        name.replace("key:secret@", ""): kind for name, kind in images.items()
    }
    for row in rows.values():
        assert row["status"] == ("failed" if row["error_kind"] else "succeeded")
        assert bool(row["error"]) == (row["animation_uri"] is None) == (row["status"] == "failed")
        assert "secret" not in str(row)
    mismatch = rows["r006"]
    assert mismatch["image_sha256"] == hashlib.sha256(png(1)).hexdigest()
    assert sha256 in mismatch["error"]
    assert mismatch["image_sha256"] in mismatch["error"]
    assert len(stored(config)) == 2


def test_an_image_above_the_caps_is_refused(make_config: MakeConfig) -> None:
    config = make_config(requests_table(1), images__max_bytes=100, images__max_pixels=10)
    (row,) = fetched(config).to_pylist()
    assert (row["error_kind"], row["pixels"]) == ("image_unavailable", None)
    assert "more than 100 bytes" in row["error"]

    config = make_config(requests_table(1), images__max_pixels=10)
    (row,) = fetched(config).to_pylist()
    assert (row["error_kind"], row["pixels"]) == ("image_unreadable", None)


def test_images_inside_the_manifest_are_animated(make_config: MakeConfig) -> None:
    data = [png(9), b"no image", None]
    table = requests_table(3, image=pa.array([None, None, "images/0.png"]), image_bytes=pa.array(data, pa.binary()))
    config = make_config(table, defaults__format="gif")

    rows = animate(config)

    assert [rows[f"r{k:03d}"]["error_kind"] for k in range(3)] == [None, "image_unreadable", None]
    assert rows["r000"]["image_sha256"] == hashlib.sha256(png(9)).hexdigest()
    assert rows["r000"]["image"] is None


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_clip_that_cannot_be_drawn_fails_alone(make_config: MakeConfig) -> None:
    config = make_config(requests_table(3, prompt=["fine", "not finite", "fine"], format=["gif"] * 3))

    rows = animate(config)

    assert [rows[f"r{k:03d}"]["status"] for k in range(3)] == ["succeeded", "failed", "succeeded"]
    failed = rows["r001"]
    assert (failed["error_kind"], failed["sha256"], failed["motion"]) == ("non_finite", None, None)
    assert "not finite" in failed["error"]
    assert failed["gpu_seconds"] == 0.01


def test_a_clip_that_cannot_be_encoded_fails_alone(make_config: MakeConfig) -> None:
    class Clipped(FakeEngine):
        """Draws one frame too few of the second request."""

        def animate(self, shots: Sequence[Any]) -> list[FakeClip]:
            clips = super().animate(shots)
            clips[1].drawn = clips[1].drawn[:-1]
            return clips

    config = make_config(requests_table(3, format=["gif"] * 3, num_frames=[4, 4, 4]))

    rows = animate(config, Clipped())

    assert [rows[f"r{k:03d}"]["error_kind"] for k in range(3)] == [None, "encoding_failed", None]
    assert "(64, 64, 3) and not (64, 64, 4)" in rows["r001"]["error"]
    assert len(stored(config)) == 2


def test_a_batch_without_any_image_never_reaches_the_device(make_config: MakeConfig) -> None:
    config, engine = make_config(requests_table(2, image=["gone", "gone too"])), FakeEngine()

    rows = animate(config, engine)

    assert [row["status"] for row in rows.values()] == ["failed", "failed"]
    assert engine.calls == []


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
    """Draws the same request with other pixels, as other batches and devices do."""

    def animate(self, shots: Sequence[Any]) -> list[FakeClip]:
        clips = super().animate(shots)
        for clip in clips:
            clip.drawn = 255 - clip.drawn
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
    first, before = animate(config), stored(config)

    assert animate(config, Otherwise()) == first
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
    assert "(64, 64, 3) and not (64, 64, 4)" in row["error"]


def test_check_animation_accepts_the_right_and_refuses_other_sizes(make_config: MakeConfig) -> None:
    data = codecs.encode(np.zeros((3, 16, 24, 3), np.uint8), "gif", 10, make_config().encoding)
    row = {"format": "gif", "width": 24, "height": 16, "num_frames": 3}

    assert check_animation(data, row).duration_s == pytest.approx(0.3)
    for name in ("width", "height", "num_frames"):
        with pytest.raises(EncodingError, match="and not"):
            check_animation(data, row | {name: 8})
    with pytest.raises(EncodingError):
        check_animation(data, row | {"format": "webp"})


# --- control ---------------------------------------------------------------------------------------------------------


def test_nothing_begins_and_nothing_is_written_while_the_run_is_stopping(make_config: MakeConfig) -> None:
    config, engine, control = make_config(), FakeEngine(), FakeControl()
    control.stop()
    requests = fetched(config)

    outcomes = animate_stage(config, engine, control)(requests)

    assert outcomes.schema == OUTCOME
    assert outcomes["key"].to_pylist() == requests["key"].to_pylist()
    assert set(outcomes["status"].to_pylist()) == {"interrupted"}
    assert engine.calls == []
    assert list(Store(config.output).list("")) == []


def test_a_batch_ends_only_once_it_is_committed_and_attempts_are_counted(make_config: MakeConfig) -> None:
    config = make_config(requests_table(2, format=["gif"] * 2))

    class Witness(FakeControl):
        known: dict[str, Row] | None = None

        def end(self, outcomes: list[Row]) -> None:
            super().end(outcomes)
            self.known = committed(config)

    control = Witness()

    rows = animate(config, control=control)

    assert control.known == rows
    assert [rows["r000"]["attempts"], rows["r001"]["attempts"]] == [1, 1]
    assert sorted(control.ended) == sorted(row["key"] for row in rows.values())


def test_an_engine_with_other_weights_is_refused_with_the_remedy(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"got engine 0{32}, expected f{32}\); give every node the same weights"):
        animate_stage(make_config(), FakeEngine(engine_id="0" * 32))


@dataclass
class Watched(FakeEngine):
    """Notes when it was drawing."""

    seconds: float = 0.1
    busy: list[tuple[float, float]] = field(default_factory=list)

    def animate(self, shots: Sequence[Any]) -> list[FakeClip]:
        started = time.monotonic()
        clips = super().animate(shots)
        self.busy.append((started, time.monotonic()))
        return clips


class SlowStore(Store):
    """Takes its time for animations, and notes when."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.busy: list[tuple[float, float]] = []

    def create(self, name: str, data: bytes) -> None:
        started = time.monotonic()
        time.sleep(0.08)
        super().create(name, data)
        self.busy.append((started, time.monotonic()))


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def test_two_threads_never_share_the_device_and_commit_while_it_draws(make_config: MakeConfig) -> None:
    config, engine = make_config(requests_table(6, format=["gif"] * 6)), Watched()
    requests, store = fetched(config), SlowStore(config.output)
    animator = animate_stage(config, engine, store=store)

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(animator, [requests.slice(k, 1) for k in range(6)]))

    assert [table["key"].to_pylist() for table in outcomes] == [[key] for key in requests["key"].to_pylist()]
    drawn = sorted(engine.busy)
    assert len(drawn) == 6
    assert not any(overlap(one, other) for k, one in enumerate(drawn) for other in drawn[k + 1 :])
    assert any(overlap(one, other) for one in drawn for other in store.busy)
    assert {row["status"] for row in committed(config).values()} == {"succeeded"}


def test_a_batch_is_committed_by_the_thread_that_drew_it(make_config: MakeConfig) -> None:
    """A call returns after its own commit, however many others are under way."""
    config = make_config(requests_table(4, format=["gif"] * 4))
    requests, animator, unknown = fetched(config), animate_stage(config), []

    def call(start: int) -> None:
        animator(requests.slice(start, 1))
        if requests["request_id"][start].as_py() not in committed(config):
            unknown.append(start)

    threads = [threading.Thread(target=call, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert unknown == []


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_measures_of_known_frames() -> None:
    frames = np.zeros((3, 2, 2, 3), np.uint8)
    frames[1], frames[2] = 30, 10
    condition = np.full((2, 2, 3), 10, np.uint8)

    found = measures(frames, condition)

    assert found["frame_mean"] == pytest.approx(40 / 3)
    assert found["frame_std"] == pytest.approx(np.std([0, 30, 10]))
    assert found["motion"] == pytest.approx((30 + 20) / 2)  # not wrapped around 256
    assert found["first_frame_psnr_db"] == pytest.approx(10 * math.log10(255**2 / 100))


def test_measures_of_a_still_a_single_and_a_perfect_clip() -> None:
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)

    assert measures(np.stack([picture] * 3), picture)["motion"] == 0
    single = measures(picture[None], picture)
    assert (single["motion"], single["first_frame_psnr_db"]) == (0, None)
    black, white = np.zeros((1, 4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert measures(black, white)["first_frame_psnr_db"] == pytest.approx(0)


def test_importing_the_stages_imports_neither_torch_nor_ray() -> None:
    program = (
        "import sys, pia_batch.pipeline.stages;"
        "print(sorted({'torch', 'diffusers', 'transformers', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


# --- sizes, image prompts, models -----------------------------------------------------------------------------------


def arranged(config: RunConfig) -> pa.Table:
    return Arrange(config.images, Manifest.open(config.manifest).folder)(validated(config))


def write_png(config: RunConfig, name: str, width: int, height: int, orientation: int = 1) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.open(io.BytesIO(png(0, width, height)))
    image.save(Path(config.manifest) / "images" / name, exif=exif)


def test_what_can_be_drawn_together_stands_together_and_otherwise_nothing_moves(make_config: MakeConfig) -> None:
    table = requests_table(6, num_frames=[4, 8, 4, 8, 4, 8], width=[64, 64, 128, 64, 64, None])

    rows = arranged(make_config(table)).to_pylist()

    assert [(row["request_id"], row["num_frames"], row["width"]) for row in rows] == [
        ("r000", 4, 64),
        ("r004", 4, 64),
        ("r002", 4, 128),
        ("r001", 8, 64),
        ("r003", 8, 64),
        ("r005", 8, 64),
    ]


def test_a_size_from_the_image_keeps_its_shape_and_is_the_same_however_it_was_found(make_config: MakeConfig) -> None:
    config = make_config(
        requests_table(4, image=[f"images/{name}.png" for name in ("wide", "upright", "small", "gone")]),
        defaults__size="auto",
        defaults__long_side=256,
        defaults__num_frames=2,
        defaults__format="png_zip",
    )
    write_png(config, "wide.png", 640, 330)
    write_png(config, "upright.png", 300, 200, orientation=6)
    write_png(config, "small.png", 30, 60)
    wanted = {"r000": (256, 128), "r001": (192, 256), "r002": (64, 64), "r003": (None, None)}

    early = {row["request_id"]: (row["width"], row["height"]) for row in arranged(config).to_pylist()}
    late = {row["request_id"]: (row["width"], row["height"]) for row in fetched(config).to_pylist()}
    rows = animate(config)

    assert early == late == wanted
    assert {name: (row["width"], row["height"]) for name, row in rows.items()} == wanted
    assert (rows["r003"]["error_kind"], rows["r000"]["size"], rows["r000"]["long_side"]) == (
        "image_unavailable",
        "auto",
        256,
    )
    frames = codecs.decode(stored(config)[rows["r001"]["animation_uri"]], "png_zip")
    assert frames.shape == (2, 256, 192, 3)


def test_an_image_prompt_reaches_the_engine_whole_and_a_bad_one_fails_its_row(make_config: MakeConfig) -> None:
    table = requests_table(3, ip_adapter_image=["images/2.png", None, "requests.parquet"], format=["gif"] * 3)
    config, engine = make_config(table, model__ip_adapter={"source": "adapter.safetensors"}), FakeEngine()

    rows = animate(config, engine)

    ((first, second),) = engine.calls
    assert np.array_equal(np.asarray(first.ip_adapter_image), np.asarray(Image.open(io.BytesIO(png(2)))))
    assert first.ip_adapter_scale == 1.0
    assert not hasattr(second, "ip_adapter_image")
    assert rows["r002"]["error_kind"] == "image_unreadable"
    assert rows["r002"]["error"].startswith("column 'ip_adapter_image': ")
    assert rows["r000"]["ip_adapter_image"] == "images/2.png"


def test_each_request_is_drawn_by_its_own_model_and_says_so(make_config: MakeConfig) -> None:
    table = requests_table(4, model=["toon", None, "toon", "default"], format=["gif"] * 4)
    config = make_config(table, models__toon={"base": "toon/base"})
    ids = {"default": ENGINE_ID, "toon": "a" * 32}
    found = Manifest.open(config.manifest)
    requests = Validate(config, ids)(next(iter(found.batches())).table)
    requests = FetchImages(config.images, found.folder)(requests)
    engines = {"default": FakeEngine(), "toon": FakeEngine(engine_id="a" * 32)}
    shelf = FakeShelf(engines=engines)

    animate_stage(config, shelf=shelf, engine_ids=ids)(requests)

    assert {name: row["engine_id"] for name, row in committed(config).items()} == {
        f"r{k:03d}": ids[model] for k, model in enumerate(["toon", "default", "toon", "default"])
    }
    assert [len(call) for call in engines["toon"].calls] == [len(call) for call in engines["default"].calls] == [2]
    assert shelf.asked == ["default", "toon", "default"]  # the first is loaded before there is work


def test_an_engine_is_checked_whenever_it_was_loaded_and_only_then(make_config: MakeConfig) -> None:
    @dataclass
    class Checked(FakeEngine):
        checks: int = 0

        def check(self) -> None:
            self.checks += 1

    config, engine = make_config(requests_table(2, format=["gif"] * 2)), Checked()
    shelf = FakeShelf(engine)
    animator = animate_stage(config, shelf=shelf)
    requests = fetched(config)
    animator(requests.slice(0, 1))
    again = shelf.default = Checked()
    animator(requests.slice(1))

    assert (engine.checks, again.checks) == (1, 1)


def test_a_batch_that_is_committed_is_handed_back_where_its_task_comes_again(make_config: MakeConfig) -> None:
    config, engine = make_config(requests_table(4, format=["gif"] * 4)), FakeEngine()
    animator = animate_stage(config, engine)
    requests = fetched(config)
    first = animator(requests.slice(0, 2))  # and its worker dies in the next batch of the task

    again = [animator(requests.slice(start, 2)) for start in (0, 2)]

    assert again[0].equals(first)
    assert [len(call) for call in engine.calls] == [2, 2]
    assert len(committed(config)) == 4


def test_a_broken_device_ends_the_run_before_it_draws(make_config: MakeConfig) -> None:
    class Broken(FakeEngine):
        def check(self) -> None:
            raise BrokenDeviceError("cuda:0 draws another clip than it should")

    with pytest.raises(BrokenDeviceError, match="cuda:0"):
        animate_stage(make_config(), Broken())


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
                    clip.drawn = np.full_like(clip.drawn, 128)
                elif "frozen" in shot.prompt:
                    clip.drawn = np.repeat(clip.drawn[:1], len(clip.drawn), axis=0)
            return clips

    table = requests_table(3, prompt=["lively", prompt, "lively too"], format=["gif"] * 3)

    assert {row["status"] for row in animate(make_config(table), Dull()).values()} == {"succeeded"}
    rows = animate(make_config(table, output=str(tmp_path / "strict"), **limits), Dull())

    assert [rows[name]["status"] for name in sorted(rows)] == ["succeeded", "failed", "succeeded"]
    assert rows["r001"]["error_kind"] == "degenerate"
    assert rows["r001"]["error"].startswith(message)
    assert (rows["r001"]["motion"], rows["r001"]["animation_uri"]) == (0, None)


def test_one_frame_cannot_be_frozen(make_config: MakeConfig) -> None:
    config = make_config(requests_table(1, num_frames=[1], format=["gif"]), limits__min_motion=5)

    assert animate(config)["r000"]["status"] == "succeeded"


# --- poison ---------------------------------------------------------------------------------------------------------


class Died(BaseException):
    """The end of a worker's process, as far as this one is concerned. Nothing of the worker may catch it."""


@dataclass
class Poisoned(FakeEngine):
    """Does to its process what a prompt says; is broken for good where `sick`."""

    sick: bool = False

    def check(self) -> None:
        if self.sick:
            raise BrokenDeviceError("the device is gone")

    def animate(self, shots: Sequence[Any]) -> list[FakeClip]:
        for shot in shots:
            if "raises" in shot.prompt:
                raise RuntimeError("weights are " + "cursed")
            if "hungers" in shot.prompt:
                raise MemoryError
            if "kills" in shot.prompt:
                raise Died
            if "hangs" in shot.prompt:
                time.sleep(0.4)
        return super().animate(shots)


def run_to_the_end(config: RunConfig, control: FakeControl | None = None, workers: int = 20) -> pa.Table:
    """Give one batch to worker after worker until one survives it, as Ray does."""
    control, requests = control or FakeControl(), fetched(config)
    for _ in range(workers):
        with contextlib.suppress(Died):
            return animate_stage(config, Poisoned(), control)(requests)
    raise AssertionError("no worker survived")


@pytest.mark.parametrize(
    ("does", "kind", "attempts", "error"),
    [
        ("raises", "engine_error", 2, "the engine raised RuntimeError: weights are cursed"),
        ("hungers", "out_of_memory", 2, "the worker ran out of memory"),
        ("kills", "worker_crash", 4, "its worker died in each of 2 attempts to animate it alone"),
    ],
)
@pytest.mark.parametrize("where", [(0,), (3,), (1, 2)])
def test_poison_fails_alone_with_its_kind_and_its_neighbours_succeed(
    make_config: MakeConfig, does: str, kind: str, attempts: int, error: str, where: tuple[int, ...]
) -> None:
    prompts = [does if k in where else "fine" for k in range(5)]
    config = make_config(requests_table(5, prompt=prompts, format=["gif"] * 5))

    outcomes = run_to_the_end(config)

    rows = committed(config)
    assert outcomes["status"].to_pylist() == [rows[f"r{k:03d}"]["status"] for k in range(5)]
    for k in range(5):
        row = rows[f"r{k:03d}"]
        if k in where:
            assert (row["status"], row["error_kind"], row["attempts"]) == ("failed", kind, attempts)
            assert row["error"].startswith(error)
        else:
            assert row["status"] == "succeeded"
    assert len(stored(config)) == 5 - len(where)


def test_what_was_committed_before_a_worker_died_is_not_drawn_again(make_config: MakeConfig) -> None:
    config = make_config(requests_table(3, prompt=["fine", "fine", "kills"], format=["gif"] * 3))

    run_to_the_end(config)

    record = Journal(Store(config.output))
    fragments = record.read(record.fragments())
    assert sorted(name for table in fragments for name in table["request_id"].to_pylist()) == ["r000", "r001", "r002"]


def test_a_worker_that_hangs_ends_itself_and_the_request_is_told_apart(make_config: MakeConfig) -> None:
    config = make_config(requests_table(3, prompt=["fine", "hangs", "fine"], format=["gif"] * 3), limits__timeout_s=0.2)
    control, requests, deaths = FakeControl(), fetched(config), threading.Event()
    for _ in range(6):
        deaths.clear()
        commits = _MortalCommits(Journal(Store(config.output)), deaths)
        mortal = animate_stage(config, Poisoned(), control, commits=commits, process=WorkerProcess(exit=deaths.set))
        worker = _Mortal(mortal, requests)
        worker.start()
        worker.join()
        if not deaths.is_set():
            break

    rows = committed(config)
    assert [rows[name]["error_kind"] for name in sorted(rows)] == [None, "timeout", None]
    assert "limits.timeout_s" in rows["r001"]["error"]


@dataclass
class _MortalCommits:
    """A commit log that takes nothing more once its worker has died, as a dead process writes no more."""

    journal: Journal
    dead: threading.Event

    def append(self, results: pa.Table) -> None:
        if self.dead.is_set():
            raise Died
        self.journal.append(results)


class _Mortal(threading.Thread):
    """A worker that may die in its call."""

    def __init__(self, animator: Animate, requests: pa.Table) -> None:
        super().__init__(daemon=True)
        self.animator, self.requests = animator, requests

    def run(self) -> None:
        with contextlib.suppress(Died):
            self.animator(self.requests)


def test_a_device_that_breaks_ends_the_worker_and_blames_no_request(make_config: MakeConfig) -> None:
    config = make_config(requests_table(2, prompt=["fine", "raises"], format=["gif"] * 2))
    engine = Poisoned()

    def die() -> None:
        raise Died

    mortal = animate_stage(config, engine, process=WorkerProcess(exit=die))
    engine.sick = True

    with pytest.raises(Died):
        mortal(fetched(config))
    assert committed(config) == {}


def test_a_deadline_grows_with_the_work(make_config: MakeConfig) -> None:
    animator = animate_stage(make_config(limits__timeout_s=100))
    row = {"num_inference_steps": 25, "num_frames": 16, "width": 512, "height": 512, "free_init_iters": 0}

    assert animator.guard.deadline_s([row | {"width": 64}]) == 100
    assert animator.guard.deadline_s([row] * 4) == 400
    assert animator.guard.deadline_s([row | {"free_init_iters": 3}]) == 300
    assert animator.guard.deadline_s([row | {"width": None}]) == 100


def test_images_in_the_manifest_have_the_same_cap_as_others(make_config: MakeConfig) -> None:
    table = requests_table(2, image=[None, None], image_bytes=[png(0), png(1) + bytes(9000)], format=["gif"] * 2)

    rows = animate(make_config(table, images__max_bytes=max(len(png(0)), len(png(1)))))

    assert [rows[name]["error_kind"] for name in sorted(rows)] == [None, "image_unavailable"]
    assert "images.max_bytes" in rows["r001"]["error"]
