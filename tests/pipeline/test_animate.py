"""The last stage as a whole: from fetched requests to committed animations."""

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from animated import animated, committed, fetched, stored, validated
from fakes import ENGINE_ID, FakeClip, FakeControl, FakeEngine, animate_stage
from inputs import png, requests_table

from pia_batch.config import RunConfig
from pia_batch.journal.layout import animation_name
from pia_batch.media import codecs
from pia_batch.pipeline.outcomes import OUTCOME
from pia_batch.pipeline.stages import FetchImages
from pia_batch.schema.columns import Row
from pia_batch.storage.object_store import Store

MakeConfig = Callable[..., RunConfig]


def test_every_good_request_has_an_animation_and_a_true_result(make_config: MakeConfig) -> None:
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

    rows = animated(config, engine)

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

    rows = animated(config, engine)

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

    generated = animator.generating_seconds
    assert 0.05 <= engine.during[0] <= generated
    assert animator.generating_seconds == generated  # nothing is on the device any more


def test_no_requests_are_no_work_and_no_fragment(make_config: MakeConfig) -> None:
    config, engine = make_config(), FakeEngine()
    requests = fetched(config).slice(0, 0)

    assert FetchImages(config.images, "")(validated(config).slice(0, 0)).schema == requests.schema
    outcomes = animate_stage(config, engine)(requests)

    assert (len(outcomes), outcomes.schema) == (0, OUTCOME)
    assert engine.calls == []
    assert list(Store(config.output).list("")) == []


def test_a_batch_without_any_image_never_reaches_the_device(make_config: MakeConfig) -> None:
    config, engine = make_config(requests_table(2, image=["gone", "gone too"])), FakeEngine()

    rows = animated(config, engine)

    assert [row["status"] for row in rows.values()] == ["failed", "failed"]
    assert engine.calls == []


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

    rows = animated(config, control=control)

    assert control.known == rows
    assert [rows["r000"]["attempts"], rows["r001"]["attempts"]] == [1, 1]
    assert sorted(control.ended) == sorted(row["key"] for row in rows.values())


@dataclass
class Watched(FakeEngine):
    """Notes when it was generating."""

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


def test_two_threads_never_share_the_device_and_commit_while_it_generates(make_config: MakeConfig) -> None:
    config, engine = make_config(requests_table(6, format=["gif"] * 6)), Watched()
    requests, store = fetched(config), SlowStore(config.output)
    animator = animate_stage(config, engine, store=store)

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(animator, [requests.slice(k, 1) for k in range(6)]))

    assert [table["key"].to_pylist() for table in outcomes] == [[key] for key in requests["key"].to_pylist()]
    generated = sorted(engine.busy)
    assert len(generated) == 6
    assert not any(overlap(one, other) for k, one in enumerate(generated) for other in generated[k + 1 :])
    assert any(overlap(one, other) for one in generated for other in store.busy)
    assert {row["status"] for row in committed(config).values()} == {"succeeded"}


def test_a_batch_is_committed_by_the_thread_that_generated_it(make_config: MakeConfig) -> None:
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


def test_a_batch_that_is_committed_is_handed_back_where_its_task_comes_again(make_config: MakeConfig) -> None:
    config, engine = make_config(requests_table(4, format=["gif"] * 4)), FakeEngine()
    animator = animate_stage(config, engine)
    requests = fetched(config)
    first = animator(requests.slice(0, 2))  # and its worker dies in the next batch of the task

    again = [animator(requests.slice(start, 2)) for start in (0, 2)]

    assert again[0].equals(first)
    assert [len(call) for call in engine.calls] == [2, 2]
    assert len(committed(config)) == 4
