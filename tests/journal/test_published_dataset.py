"""A published output is a dataset: the library `datasets` loads it, whatever formats it has."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from finished_outputs import animation, make_output
from journals import RecordingStore

from pia_batch.errors import StorageError
from pia_batch.journal import dataset_table
from pia_batch.journal.garbage_collection import find_garbage
from pia_batch.journal.log import Journal
from pia_batch.journal.results import find_dataset_difference, read_latest, restore_dataset
from pia_batch.storage.object_store import Store
from pia_batch.storage.store_uris import local_path

datasets = pytest.importorskip("datasets")


def folder_of(store: Store) -> Path:
    return Path(local_path(store.uri))


def load(store: Store, tmp_path: Path) -> Any:
    return datasets.load_dataset(str(folder_of(store)), split="train", cache_dir=str(tmp_path / "cache"))


def paths(dataset: Any, column: str) -> list[str]:
    feature = {"video": datasets.Video, "image": datasets.Image}[column](decode=False)
    return [value["path"] for value in dataset.cast_column(column, feature)[column]]


def card(store: Store) -> str:
    return store.read("README.md").decode()


# --- what `datasets` loads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formats", "column", "rows"),
    [
        (["mp4", "mp4", "mp4"], "video", 3),
        (["gif", "gif"], "image", 2),
        (["gif", "webp"], "image", 2),
        (["mp4", "mp4", "gif"], "video", 2),
        (["mp4", "webp", "gif", "png_zip"], "image", 2),
        (["mp4", "gif"], "video", 1),
    ],
)
def test_a_published_output_loads_as_its_most_frequent_media(
    store: Store, tmp_path: Path, formats: list[str], column: str, rows: int
) -> None:
    make_output(store, formats, failed=1)

    dataset = load(store, tmp_path)

    assert dataset.num_rows == rows
    assert {"prompt", "seed", "num_frames", "condition_image"} < set(dataset.column_names)
    assert not {"label", "file_name", "status", "error", "animation_uri"} & set(dataset.column_names)
    for path, prompt in zip(paths(dataset, column), dataset["prompt"], strict=True):
        number = int(prompt.removeprefix("prompt "))
        assert Path(path).read_bytes() == animation(number, formats[number])
    left_out = len(formats) - rows
    assert (f"{left_out:,} animations of other formats are not in it" in card(store)) == (left_out > 0)


def test_images_are_decoded_with_all_their_frames(store: Store, tmp_path: Path) -> None:
    make_output(store, ["gif", "webp"])

    assert {image.n_frames for image in load(store, tmp_path)["image"]} == {3}


def test_frames_in_zips_load_as_a_table_of_paths_and_the_card_says_why(store: Store, tmp_path: Path) -> None:
    make_output(store, ["png_zip", "png_zip"])

    dataset = load(store, tmp_path)

    assert [(folder_of(store) / name).is_file() for name in dataset["file_name"]] == [True, True]
    assert sorted(dataset["prompt"]) == ["prompt 0", "prompt 1"]
    assert "which `datasets` does not decode. `pia-batch export --format huggingface --transcode mp4`" in card(store)


def test_an_output_without_a_success_has_no_rows_which_datasets_refuses_to_load(store: Store, tmp_path: Path) -> None:
    make_output(store, [], failed=2)

    with pytest.raises(ValueError, match="corresponds to no data"):
        load(store, tmp_path)
    assert "| failed requests | 2, not in this dataset |" in card(store)


def test_carried_columns_load_whatever_their_names_and_types(store: Store, tmp_path: Path) -> None:
    nested = pa.struct([("a", pa.map_(pa.string(), pa.int64()))])
    carried = pa.table(
        {
            "video": pa.array([1]),
            "image_file_name": pa.array(["cat.png"]),
            "condition_image": pa.array(["mine"]),
            "label": pa.array(["cat"]),
            "scores": pa.array([[("x", 1)]], pa.map_(pa.string(), pa.int64())),
            "nested": pa.array([{"a": [("y", 2)]}], nested),
            "price": pa.array([1], pa.decimal128(5, 1)).cast(pa.decimal32(5, 1)),
            "id": pa.array([b"0123456789abcdef"], pa.uuid()),
            "where": pa.array([{"file_name": "x"}]),
        }
    )
    make_output(store, ["mp4"], carried=carried)

    row = load(store, tmp_path).remove_columns("video")[0]

    assert row["video_"] == 1
    assert row["image_file_name_"] == "cat.png"
    assert (row["condition_image"], row["condition_image_"], row["label_"]) == ("images/0.png", "mine", "cat")
    assert row["scores"] == [{"key": "x", "value": 1}]
    assert row["nested"] == {"a": [{"key": "y", "value": 2}]}
    assert (float(row["price"]), row["id"]) == (1.0, b"0123456789abcdef")
    assert "cannot hold are in `results/` only: `where` (struct<file_name: string>)" in card(store)
    assert "| `video_` | Column `video` of the manifest. |" in card(store)


def test_readers_of_results_see_what_they_saw_before(store: Store) -> None:
    make_output(store, ["mp4", "gif"], failed=1)

    rows = pq.read_table(folder_of(store) / "results" / "run-1").to_pylist()

    assert [row["status"] for row in rows] == ["succeeded", "succeeded", "failed"]


def test_later_results_replace_both_and_earlier_animations_are_not_in_them(store: Store, tmp_path: Path) -> None:
    make_output(store, ["mp4", "mp4"])
    make_output(store, ["gif"], run_id="run-2", first=2)

    dataset = load(store, tmp_path)

    assert dataset["prompt"][:] == ["prompt 2"]
    assert "run `run-2`" in card(store)
    assert json.loads(pq.read_schema(folder_of(store) / "metadata.parquet").metadata[b"pia_batch"])["run_id"] == "run-2"


def test_row_groups_bound_the_memory_of_readers(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_table, "ROW_GROUP_ROWS", 2)
    monkeypatch.setattr("pia_batch.journal.results.PART_ROWS", 4)
    make_output(store, ["gif"] * 9)

    file = pq.ParquetFile(folder_of(store) / "metadata.parquet")

    assert [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)] == [2, 2, 2, 2, 1]
    assert file.read()["request_id"].to_pylist() == [f"r{number:03d}" for number in range(9)]


# --- the card of a person ---------------------------------------------------------------------------------------------


def test_what_a_person_adds_to_the_card_stays(store: Store) -> None:
    make_output(store, ["mp4"])
    edited = card(store).replace("license: unknown", "license: cc-by-4.0\npretty_name: Foxes")
    edited = edited.replace("Not stated yet.", "Ours, by permission.") + "\n## Thanks\n\nTo the foxes.\n"
    store.replace("README.md", edited.encode())

    make_output(store, ["gif", "gif"], run_id="run-2", first=1)

    now = card(store)
    assert "license: cc-by-4.0\n" in now
    assert "pretty_name: Foxes\n" in now
    assert "Ours, by permission." in now
    assert now.endswith("To the foxes.\n")
    assert "run `run-2`" in now
    assert "run `run-1`" not in now
    assert "animations/*/*.gif" in now
    assert "*.mp4" not in now


def test_the_generated_part_joins_a_readme_that_was_there_before(store: Store, tmp_path: Path) -> None:
    store.replace("README.md", b"# Foxes\n\nBy us.\n")

    make_output(store, ["mp4"])

    assert "# Foxes\n\nBy us.\n" in card(store)
    assert load(store, tmp_path).num_rows == 1


@pytest.mark.parametrize("mine", [b"---\na: [1\n---\n# Foxes\n", b"---\n- a\n---\n", b"\xff\xfe"])
def test_a_readme_that_cannot_be_read_is_kept(store: Store, mine: bytes, caplog: pytest.LogCaptureFixture) -> None:
    store.replace("README.md", mine)

    with caplog.at_level(logging.WARNING):
        make_output(store, ["mp4"])

    assert store.read("README.md") == mine
    assert "dataset_card_kept" in caplog.text
    assert "is not the dataset card of a run; delete it" in str(find_dataset_difference(store))


# --- faults -----------------------------------------------------------------------------------------------------------


def test_both_are_written_after_the_parts_and_before_the_success_marker(store: Store) -> None:
    recording = RecordingStore(store.uri)

    make_output(recording, ["mp4"])

    assert [name for name in recording.written if not name.startswith("animations/")] == [
        "results/run-1/part-00000.parquet",
        "metadata.parquet",
        "README.md",
        "results/run-1/_SUCCESS.json",
        "results/LATEST.json",
    ]


def test_publishing_again_writes_the_same_bytes(store: Store) -> None:
    make_output(store, ["mp4", "gif"])
    first = [store.read(name) for name in ("metadata.parquet", "README.md")]

    make_output(store, ["mp4", "gif"])

    assert [store.read(name) for name in ("metadata.parquet", "README.md")] == first


class DyingStore(Store):
    """Store whose process dies before it writes an object."""

    def __init__(self, uri: str, before: str) -> None:
        super().__init__(uri)
        self.before = before

    def replace(self, name: str, data: bytes) -> None:
        if name == self.before:
            raise StorageError("died")
        super().replace(name, data)


@pytest.mark.parametrize("before", ["README.md", "results/run-2/_SUCCESS.json", "results/LATEST.json"])
def test_a_death_while_publishing_is_found_and_healed_by_the_next_run_or_by_verify(store: Store, before: str) -> None:
    make_output(store, ["mp4"])
    with pytest.raises(StorageError):
        make_output(DyingStore(store.uri, before), ["gif", "gif"], run_id="run-2", first=1)
    assert read_latest(store)["run_id"] == "run-1"
    assert find_dataset_difference(store) is not None

    restore_dataset(Journal(store))
    assert find_dataset_difference(store) is None
    assert "run `run-1`" in card(store)

    make_output(store, ["gif", "gif"], run_id="run-2", first=1)
    assert find_dataset_difference(store) is None
    assert "run `run-2`" in card(store)


def test_a_lost_table_is_found_and_written_again_byte_by_byte(store: Store) -> None:
    record = make_output(store, ["mp4", "gif"])
    before = store.read("metadata.parquet")
    assert find_dataset_difference(store) is None
    store.replace("metadata.parquet", b"something else")
    assert "is not the table that the dataset card states" in str(find_dataset_difference(store))
    store.delete("metadata.parquet")
    assert "does not exist" in str(find_dataset_difference(store))

    restore_dataset(record)

    assert find_dataset_difference(store) is None
    assert store.read("metadata.parquet") == before


def test_an_output_that_never_published_has_no_dataset(store: Store) -> None:
    restore_dataset(Journal(store))

    assert find_dataset_difference(store) is None
    assert list(store.list("")) == []


def test_unfinished_files_of_both_are_garbage_and_the_files_are_not(store: Store) -> None:
    record = make_output(store, ["mp4"])
    (folder_of(store) / "metadata.parquet#1").write_bytes(b"half")
    (folder_of(store) / "README.md#17").write_bytes(b"half")

    found = [item.info.name for item in find_garbage(record, 1e12)]

    assert found == ["metadata.parquet#1", "README.md#17"]
