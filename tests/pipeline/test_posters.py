"""Posters: the first frame of each stored file, next to it, once, and whatever else has happened before."""

import hashlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from animated import animated, committed, fetched, stored
from fakes import FakeClip, FakeEngine, animate_stage
from inputs import requests_table
from PIL import Image

from pia_batch.config import RunConfig
from pia_batch.errors import StorageError
from pia_batch.journal.layout import poster_name
from pia_batch.media import codecs
from pia_batch.schema.columns import Row
from pia_batch.schema.settings import FORMATS
from pia_batch.storage.object_store import Store

MakeConfig = Callable[..., RunConfig]

COLUMNS = ("poster_uri", "poster_num_bytes", "poster_sha256")


def shown(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "JPEG"
        return np.asarray(image.convert("RGB")).astype(int)


def assert_posters_are_first_frames(config: RunConfig, rows: dict[str, Row]) -> None:
    objects = stored(config)
    for row in rows.values():
        poster = objects[row["poster_uri"]]
        assert row["poster_uri"] == Store(config.output).uri_of(poster_name(row["key"]))
        assert (row["poster_num_bytes"], row["poster_sha256"]) == (len(poster), hashlib.sha256(poster).hexdigest())
        frames = codecs.decode(objects[row["animation_uri"]], row["format"])
        errors = [float(np.abs(shown(poster) - frame).mean()) for frame in frames]
        assert errors[0] < 8
        assert errors[0] < min(errors[1:])


def test_each_format_has_the_first_frame_of_its_file_next_to_it(make_config: MakeConfig) -> None:
    table = requests_table(len(FORMATS), format=list(FORMATS), interpolate=[1, 2, 1, 2, 1], sharpen=[0.5] * 5)

    rows = animated(config := make_config(table, defaults__poster=True))

    assert {row["status"] for row in rows.values()} == {"succeeded"}
    assert_posters_are_first_frames(config, rows)


def test_only_the_rows_that_ask_for_a_poster_have_one(make_config: MakeConfig) -> None:
    table = requests_table(3, format=["gif"] * 3, poster=[True, None, True], prompt=["fine", "fine", "not finite"])

    rows = animated(config := make_config(table))

    assert [[rows[f"r{k:03d}"][name] is None for name in COLUMNS] for k in range(3)] == [[False] * 3, *[[True] * 3] * 2]
    assert len(stored(config)) == 3


class Otherwise(FakeEngine):
    """Generates other pixels for the same request, as other batches and devices do."""

    def animate(self, shots: Any) -> list[FakeClip]:
        clips = super().animate(shots)
        for clip in clips:
            clip.generated = 255 - clip.generated
        return clips


class DyingStore(Store):
    """Refuses objects after a number of them."""

    def __init__(self, uri: str, objects: int) -> None:
        super().__init__(uri)
        self.left = objects

    def create(self, name: str, data: bytes) -> None:
        if self.left == 0:
            raise StorageError("no answer")
        self.left -= 1
        super().create(name, data)


@pytest.mark.parametrize("objects", range(4))
def test_a_worker_that_dies_between_two_objects_leaves_what_the_next_one_adopts(
    make_config: MakeConfig, objects: int
) -> None:
    config = make_config(requests_table(2, format=["gif", "mp4"]), defaults__poster=True)
    requests = fetched(config)
    with pytest.raises(StorageError):
        animate_stage(config, store=DyingStore(config.output, objects))(requests)
    before = stored(config)
    assert (len(before), committed(config)) == (objects, {})

    animate_stage(config, Otherwise())(requests)

    assert stored(config).items() >= before.items()
    assert len(stored(config)) == 4
    assert_posters_are_first_frames(config, committed(config))


@pytest.mark.parametrize("damage", ["cut", "text", "size"])
def test_a_damaged_poster_under_the_key_fails_the_row_with_its_uri(make_config: MakeConfig, damage: str) -> None:
    config = make_config(requests_table(2, format=["gif"] * 2), defaults__poster=True)
    requests, file, small = fetched(config), io.BytesIO(), io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(file, "JPEG")
    Image.new("RGB", (32, 64)).save(small, "JPEG")
    data = {"cut": file.getvalue()[:900], "text": b"a poster", "size": small.getvalue()}[damage]
    store, name = Store(config.output), poster_name(requests["key"][0].as_py())
    store.create(name, data)

    animate_stage(config)(requests)

    rows = committed(config)
    assert (rows["r000"]["error_kind"], rows["r001"]["status"]) == ("encoding_failed", "succeeded")
    assert f"{store.uri_of(name)} exists already and is damaged" in rows["r000"]["error"]
    assert rows["r000"]["animation_uri"] is None
    assert store.read(name) == data
