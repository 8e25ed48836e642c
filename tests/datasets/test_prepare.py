"""`prepare` on Ray Data: the same bytes again, resumed, shuffled, limited, refused; and a manifest that runs."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any, NoReturn

import foreign_datasets as foreign
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inputs import png
from ray.exceptions import RayTaskError

from pia_batch import prepare
from pia_batch.config import RunConfig
from pia_batch.datasets import part_files
from pia_batch.datasets.part_files import SUCCESS
from pia_batch.datasets.prepare import PrepareSummary, _Preparation
from pia_batch.datasets.prepare_options import PrepareOptions
from pia_batch.errors import ConfigError, InterruptedRunError, ManifestError, StorageError
from pia_batch.planning.plan import make_plan

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    tables = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    rows: list[dict[str, Any]] = pa.concat_tables(tables, promote_options="permissive").to_pylist()
    return rows


def write_parts(folder: Path, files: int = 5, rows: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(files):
        table = foreign.image_table(rows, id=[f"{k}-{row}" for row in range(rows)])
        pq.write_table(table, folder / f"{k}.parquet")
    return folder


OPTIONS: dict[str, Any] = {"prompt": "{caption}, cinematic", "columns": {"request_id": "id"}}


@pytest.mark.long
def test_the_same_call_writes_the_same_bytes_and_nothing_twice(tmp_path: Path) -> None:
    source = write_parts(tmp_path / "source")
    first = prepare(source, tmp_path / "one", **OPTIONS)
    other = prepare(source, tmp_path / "two", **OPTIONS)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")}
    again = prepare(source, tmp_path / "one", **OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")} == times
    assert again == first
    assert (first.requests, first.files, first.kind) == (40, 5, "parquet")
    assert other.counts["read"] == 40
    success = json.loads((tmp_path / "one" / SUCCESS).read_text())
    assert success["requests"] == 40
    assert [file["name"] for file in success["files"]] == [f"part-{k:06d}-000.parquet" for k in range(5)]


@pytest.mark.long
def test_paths_go_into_objects_of_json(tmp_path: Path) -> None:
    rows = [{"meta": {"id": f"r{k}", "text": {"en": f"cat {k}"}}, "photo": f"s3://photos/{k}.png"} for k in range(2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"request_id": "meta.id", "image": "photo"}

    prepare(tmp_path / "rows.jsonl", tmp_path / "manifest", prompt="{meta.text.en}, cinematic", columns=columns)

    made = [{name: value for name, value in row.items() if value is not None} for row in rows_of(tmp_path / "manifest")]
    assert made == [
        {
            "request_id": f"r{k}",
            "image": f"s3://photos/{k}.png",
            "prompt": f"cat {k}, cinematic",
            "meta": f'{{"id": "r{k}", "text": {{"en": "cat {k}"}}}}',
        }
        for k in range(2)
    ]
    with pytest.raises(ManifestError, match="--prompt: 'meta' is string, and only a struct has fields"):
        prepare(tmp_path / "rows.jsonl", tmp_path / "other", prompt="{meta.tekst}", columns=columns)


@pytest.mark.long
def test_a_manifest_runs_as_it_is(tmp_path: Path) -> None:
    summary = prepare(
        foreign.write_photographs(tmp_path / "my photos"),
        tmp_path / "manifest",
        prompt="{caption}, cinematic",
        on_missing="drop",
        vary=["seed=1,2", "motion_scale=0,1"],
    )
    assert summary.requests == 12
    assert summary.counts["dropped_missing"] == 1
    plan = make_plan(RunConfig.load(None, {"manifest": summary.manifest, "output": str(tmp_path / "output")}))
    assert (plan.num_pending, plan.num_rejected, plan.num_duplicates) == (12, 0, 0)
    rows = rows_of(tmp_path / "manifest")
    assert rows[0]["request_id"] == "trip 0/day one/IMG 000.png#seed=1,motion_scale=0"
    assert rows[0]["prompt"] == "a photograph, number 0, cinematic"


def test_variations_store_each_image_once(tmp_path: Path) -> None:
    pq.write_table(foreign.image_table(4), tmp_path / "source.parquet")
    seeds = ",".join(map(str, range(20)))
    one = prepare(tmp_path / "source.parquet", tmp_path / "one", **OPTIONS)
    many = prepare(tmp_path / "source.parquet", tmp_path / "many", vary=[f"seed={seeds}"], **OPTIONS)
    assert many.requests == 80
    assert many.num_bytes < 2 * one.num_bytes
    assert {row["image_bytes"] for row in rows_of(tmp_path / "many")} == {png(k) for k in range(4)}


@pytest.mark.long
def test_a_call_that_was_stopped_is_continued(tmp_path: Path) -> None:
    source = write_parts(tmp_path / "source", files=12)
    whole = prepare(source, tmp_path / "whole", **OPTIONS)
    stop = threading.Event()
    with pytest.raises(InterruptedRunError, match="Start again to continue"):
        prepare(
            source, tmp_path / "dest", stop=stop, on_progress=lambda done, _: stop.set() if done else None, **OPTIONS
        )
    assert not (tmp_path / "dest" / SUCCESS).exists()
    seen: list[int] = []
    again = prepare(source, tmp_path / "dest", on_progress=lambda done, _: seen.append(done), **OPTIONS)
    assert again.counts == whole.counts
    assert seen[0] >= 1
    assert files_of(tmp_path / "dest") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("shuffle", [None, pytest.param(7, marks=pytest.mark.long)])
def test_files_that_are_missing_are_written_again(tmp_path: Path, shuffle: int | None) -> None:
    source = write_parts(tmp_path / "source", files=3, rows=20)
    prepare(source, tmp_path / "dest", shuffle=shuffle, **OPTIONS)
    before = files_of(tmp_path / "dest")
    for name in before:
        if name.endswith(("000001-000.parquet", "000001.json", "000002.json", SUCCESS)):
            (tmp_path / "dest" / name).unlink()
    prepare(source, tmp_path / "dest", shuffle=shuffle, **OPTIONS)
    assert files_of(tmp_path / "dest") == before


@pytest.mark.long
def test_a_shuffle_is_a_permutation_by_its_seed(tmp_path: Path) -> None:
    source = write_parts(tmp_path / "source", files=2, rows=12)
    plain = [f"{k}-{row}" for k in range(2) for row in range(12)]
    one = [row["request_id"] for row in rows_of_prepared(source, tmp_path / "a", shuffle=1)]
    other = [row["request_id"] for row in rows_of_prepared(source, tmp_path / "b", shuffle=2)]
    assert sorted(plain) == sorted(one) == sorted(other)
    assert len({tuple(plain), tuple(one), tuple(other)}) == 3
    first = [row["request_id"] for row in rows_of_prepared(source, tmp_path / "c", shuffle=1, limit=7)]
    assert first == one[:7]


def rows_of_prepared(source: Path, to: Path, **options: Any) -> list[dict[str, Any]]:
    prepare(source, to, **OPTIONS, **options)
    return rows_of(to)


@pytest.mark.long
def test_a_limit_takes_the_first_rows_that_become_requests(tmp_path: Path) -> None:
    source = write_parts(tmp_path / "source")
    rows = rows_of_prepared(source, tmp_path / "dest", where="score >= 1", limit=9)
    assert [row["request_id"] for row in rows] == [*(f"0-{k}" for k in range(2, 8)), "1-2", "1-3", "1-4"]
    assert len(rows_of_prepared(source, tmp_path / "all", limit=1000)) == 40


def test_rejected_rows_are_in_a_file_of_their_own(tmp_path: Path) -> None:
    images = [png(), b"no image", None, png()]
    table = foreign.image_table(4, image_bytes=pa.array(images, pa.binary()))
    pq.write_table(table, tmp_path / "source.parquet")
    summary = prepare(tmp_path / "source.parquet", tmp_path / "dest", probe=True, **OPTIONS)
    assert summary.counts["rejected"] == 2
    assert summary.rejects_uri == (tmp_path / "dest/_prepare/rejects.parquet").as_uri()
    rejects = pq.read_table(tmp_path / "dest/_prepare/rejects.parquet").to_pylist()
    assert [reject["request_id"] for reject in rejects] == ["row-1", "row-2"]
    assert "cannot be read" in rejects[0]["reason"]
    assert rejects[1]["place"] == "source.parquet:2"
    assert len(rows_of(tmp_path / "dest")) == 2


def test_a_source_that_changes_between_two_calls_is_refused(tmp_path: Path) -> None:
    source = write_parts(tmp_path / "source")
    prepare(source, tmp_path / "dest", **OPTIONS)
    (tmp_path / "dest" / SUCCESS).unlink()
    pq.write_table(foreign.image_table(3), source / "3.parquet")
    with pytest.raises(ManifestError, match=r"3\.parquet.* was replaced, added or removed"):
        prepare(source, tmp_path / "dest", **OPTIONS)


def test_a_source_that_changes_during_a_call_is_refused(tmp_path: Path) -> None:
    source = write_parts(tmp_path / "source")

    def add(done: int, _: int) -> None:
        if done:
            pq.write_table(foreign.image_table(3), source / "9.parquet")

    with pytest.raises(ManifestError, match=r"9\.parquet.* was replaced, added or removed"):
        prepare(source, tmp_path / "dest", on_progress=add, **OPTIONS)
    assert not (tmp_path / "dest" / SUCCESS).exists()


def test_a_table_is_read_in_the_version_it_was_begun_with(tmp_path: Path) -> None:
    import lance  # noqa: PLC0415 - an optional library

    source = foreign.write_lance(tmp_path / "source")
    whole = prepare(source, tmp_path / "whole", **OPTIONS)
    (tmp_path / "whole" / SUCCESS).unlink()
    before = files_of(tmp_path / "whole")
    lance.write_dataset(foreign.image_table(2), str(source), mode="append")
    assert prepare(source, tmp_path / "whole", **OPTIONS) == whole
    assert files_of(tmp_path / "whole").keys() - before.keys() == {SUCCESS}
    assert json.loads((tmp_path / "whole" / SUCCESS).read_text())["pinned"] == {"lance_version": "2"}


def test_folders_that_belong_to_something_else_are_refused(tmp_path: Path) -> None:
    source = write_parts(tmp_path / "source", files=1)
    prepare(source, tmp_path / "dest", **OPTIONS)
    with pytest.raises(ManifestError, match=r"was begun with another value of the options.*choose another folder"):
        prepare(source, tmp_path / "dest", limit=3, **OPTIONS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    with pytest.raises(ManifestError, match="has other files"):
        prepare(source, tmp_path / "other", **OPTIONS)
    with pytest.raises(ConfigError, match="is inside of the source"):
        prepare(source, source / "dest", **OPTIONS)


@pytest.mark.parametrize(
    ("raised", "kind", "line"),
    [
        (StorageError("the disk is full"), InterruptedRunError, "the disk is full; .*Start again to resume"),
        (ManifestError("row 3: no text"), ManifestError, "row 3: no text"),
    ],
)
def test_an_error_of_a_worker_is_one_line_without_the_traceback_of_ray(
    tmp_path: Path, raised: Exception, kind: type[Exception], line: str
) -> None:
    class Failing:
        def iter_batches(self, **_: object) -> NoReturn:
            raise RayTaskError("each()", "Traceback\n  many lines", raised).as_instanceof_cause()

    preparation = _Preparation(str(tmp_path), tmp_path.parent / "dest", PrepareOptions(), None, lambda *_: None)

    with pytest.raises(kind) as ended:
        list(preparation._batches(Failing()))  # type: ignore[arg-type]
    assert re.fullmatch(line, str(ended.value))


def test_another_file_under_a_name_of_ours_is_never_replaced(tmp_path: Path) -> None:
    source = write_parts(tmp_path / "source", files=1)
    prepare(source, tmp_path / "dest", **OPTIONS)
    for name in (SUCCESS, part_files.record_name(0)):
        (tmp_path / "dest" / name).unlink()
    (tmp_path / "dest" / "part-000000-000.parquet").write_bytes(b"something else")
    with pytest.raises(ManifestError, match="exists with other contents"):
        prepare(source, tmp_path / "dest", **OPTIONS)


def test_columns_that_contradict_each_other_are_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for k, value in enumerate((8001, "08001")):
        row = {"image": f"s3://b/{k}.png", "caption": "a", "zip": value}
        (tmp_path / "source" / f"{k}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ManifestError, match=r"column 'zip': int64 in .*--text COLUMN"):
        prepare(tmp_path / "source", tmp_path / "one", prompt="{caption}")
    summary = prepare(tmp_path / "source", tmp_path / "two", prompt="{caption}", text=["zip"])
    assert [row["zip"] for row in rows_of(tmp_path / "two")] == ["8001", "08001"]
    assert summary.requests == 2


def test_no_request_at_all_is_an_error(tmp_path: Path) -> None:
    source = write_parts(tmp_path / "source", files=1)
    with pytest.raises(ManifestError, match=r"no row becomes a request \(8 filtered, 8 read\)"):
        prepare(source, tmp_path / "dest", where="score > 100", **OPTIONS)


def test_a_ray_dataset_is_a_source(tmp_path: Path) -> None:
    import ray.data  # noqa: PLC0415 - slow
    from ray.data.expressions import col  # noqa: PLC0415

    def dataset() -> ray.data.Dataset:
        rows = ray.data.range(20, override_num_blocks=4)
        return rows.map_batches(
            lambda batch: pa.table(
                {"image": [f"s3://b/{k}.png" for k in batch["id"].to_pylist()], "text": batch["id"].cast(pa.string())}
            ),
            batch_format="pyarrow",
        )

    summary = prepare(dataset(), tmp_path / "dest", prompt="number {text}", vary=["seed=1,2"])
    assert (summary.requests, summary.kind, summary.counts["read"]) == (40, "dataset", 20)
    before = files_of(tmp_path / "dest")
    (tmp_path / "dest" / SUCCESS).unlink()
    assert isinstance(prepare(dataset(), tmp_path / "dest", prompt="number {text}", vary=["seed=1,2"]), PrepareSummary)
    assert files_of(tmp_path / "dest") == before
    other = dataset().filter(expr=col("text") != "3")
    with pytest.raises(ManifestError, match="block 0 was replaced"):
        prepare(other, tmp_path / "dest", prompt="number {text}", vary=["seed=1,2"])


def test_an_unknown_option_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="promt"):
        prepare(tmp_path, tmp_path / "dest", promt="x")
    with pytest.raises(ConfigError, match=r"--images pixels: unknown; write one of bytes, uris"):
        prepare(tmp_path, tmp_path / "dest", images="pixels")
    with pytest.raises(ConfigError, match="--limit 0"):
        prepare(tmp_path, tmp_path / "dest", limit=0)
    with pytest.raises(ConfigError, match=r"--sample 2"):
        prepare(tmp_path, tmp_path / "dest", sample=2)
