"""Requests in a Dataset of one's own: every row a result, whatever became of it; nothing journalled."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pytest
import ray
from columns_of_types import EXTENSIONS, LEAVES, REFUSED, extension_column
from fakes import ENGINE_ID, FakeEngine, FakeEngineLoader, PoisonedEngine, RestlessEngine, animate_stage
from inputs import png, requests_table
from ray.data.block import BlockAccessor
from ray.data.expressions import col

from pia_batch import animate
from pia_batch.config import RunConfig
from pia_batch.errors import ConfigError, ManifestError, StorageError
from pia_batch.manifest.arrow_types import plain_column
from pia_batch.manifest.validation import check
from pia_batch.media import codecs
from pia_batch.pipeline import dataset, stages
from pia_batch.pipeline.request_rows import attempt_key
from pia_batch.planning.plan import engine_ids_of
from pia_batch.schema.columns import FETCHED, RESULT
from pia_batch.schema.key_prompts import key_prompts

MakeConfig = Callable[..., RunConfig]

ENGINES = {"default": ENGINE_ID}
ROOT = Path(__file__).parents[2]


def validated(table: pa.Table, config: RunConfig) -> pa.Table:
    return stages.Validate(config, ENGINES, keep_rejected=True)(table)


def test_every_row_is_validated_in_its_place_and_keeps_its_own_columns(make_config: MakeConfig) -> None:
    config = make_config()
    table = requests_table(5, seed=[1, -1, None, 2, 3], prompt=["a", "b", " ", "d", "e"], shop=list("vwxyz"))

    rows = validated(table, config).to_pylist()

    assert [row["request_id"] for row in rows] == ["r000", "r001", "r002", "r003", "r004"]
    assert [row["error_kind"] for row in rows] == [None, "out_of_range", "missing_value", None, None]
    assert rows[1]["error"].startswith("column 'seed': -1 is not allowed")
    assert [row["shop"] for row in rows] == list("vwxyz")
    assert [row["num_frames"] for row in rows] == [8, None, None, 8, 8]
    valid = [row["key"] for row in rows if row["error_kind"] is None]
    assert valid == check(table, config, ENGINES).requests["key"].to_pylist()


def test_columns_of_other_names_are_those_of_a_request(make_config: MakeConfig) -> None:
    images = pa.array([{"bytes": png(1), "path": "1.png"}, {"bytes": None, "path": "2.png"}])
    theirs = pa.table({"id": ["a", "b"], "photo": images, "meta": [{"text": "p", "n": 1}, {"text": None, "n": 2}]})
    ours = pa.table({"request_id": ["a"], "image_bytes": pa.array([png(1)], pa.large_binary()), "prompt": ["p"]})
    config = make_config(columns={"request_id": "id", "image": "photo", "prompt": "meta.text"})

    rows = validated(theirs, config).to_pylist()

    assert [row["key"] for row in rows][:1] == check(ours, config, ENGINES).requests["key"].to_pylist()
    assert (rows[0]["image"], rows[0]["image_bytes"]) == (None, png(1))
    assert rows[1]["error"].startswith("column 'prompt' (source 'meta.text') is empty")
    assert [row["meta"] for row in rows] == [{"n": 1}, {"n": 2}]
    with pytest.raises(ManifestError, match=r"columns\.prompt: this Dataset of requests has no column 'meta\.txet'"):
        validated(theirs, make_config(columns={"request_id": "id", "image": "photo", "prompt": "meta.txet"}))


def test_equal_rows_have_equal_keys_and_attempts_of_their_own(make_config: MakeConfig) -> None:
    table = pa.concat_tables([requests_table(1)] * 3)

    rows = validated(table, make_config()).to_pylist()

    assert len({attempt_key(row) for row in rows}) == 3
    assert len({row["key"] for row in rows}) == 1


def test_text_in_any_encoding_is_text(make_config: MakeConfig) -> None:
    table = requests_table(2)
    coded = table.set_column(0, "request_id", table["request_id"].dictionary_encode())
    viewed = coded.set_column(2, "prompt", coded["prompt"].cast(pa.string_view()))

    rows = validated(viewed, make_config())

    assert rows["error_kind"].null_count == 2
    assert rows["request_id"].to_pylist() == ["r000", "r001"]


@pytest.mark.parametrize("bad", [0, 1, 3])
@pytest.mark.parametrize("size", ["fixed", "auto"])
def test_every_later_stage_passes_a_rejected_row_through(make_config: MakeConfig, bad: int, size: str) -> None:
    table = requests_table(3, seed=[-1] * bad + [7] * (3 - bad), image_bytes=[png()] * 3, shop=list("abc"))
    config, engine = make_config(defaults__size=size, defaults__format="gif"), FakeEngine()
    requests = validated(table.drop_columns(["image"]), config)
    arranged = stages.Arrange(config.images, "file:///nowhere")(requests)

    done = stages.FetchImages(config.images, "file:///nowhere")(arranged)

    assert len(done) == 3
    assert set(FETCHED.names) < set(done.column_names)
    assert "image_bytes" not in done.column_names
    assert done["error_kind"].null_count == 3 - bad
    assert done["pixels"].null_count == bad
    assert sorted(done["shop"].to_pylist()) == list("abc")
    rejected = done.filter(pc.is_valid(done["error_kind"]))
    assert set(rejected["error_kind"].to_pylist()) <= {"out_of_range"}
    assert rejected["fetch_seconds"].null_count == bad

    results = dataset.CollectedResults()
    animate_stage(config, engine, commits=results)(done)

    (rows,) = results.take()
    assert rows["error_kind"].to_pylist() == done["error_kind"].to_pylist()
    assert rows["error"].to_pylist() == done["error"].to_pylist()
    assert rows["shop"].to_pylist() == done["shop"].to_pylist()
    assert [len(call) for call in engine.calls] == [3 - bad] * (bad < 3)
    for row in rows.to_pylist():
        never_tried = (row["status"], row["attempts"], row["device"], row["engine_id"]) == ("failed", 0, None, None)
        assert never_tried == (row["error_kind"] is not None)


def test_prompts_that_change_reach_the_engine_and_the_results(make_config: MakeConfig) -> None:
    table = requests_table(2, prompt=["fine", None], image_bytes=[png()] * 2, num_frames=[3, 3]).drop_columns(["image"])
    travels = pa.array([None, [(2, "good"), (0, "fine")]], pa.map_(pa.int32(), pa.string()))
    config, engine, results = make_config(defaults__format="gif"), FakeEngine(), dataset.CollectedResults()

    arranged = stages.Arrange(config.images, "file:///nowhere")(
        validated(table.append_column("prompts", travels), config)
    )
    animate_stage(config, engine, commits=results)(stages.FetchImages(config.images, "file:///nowhere")(arranged))

    (call,) = engine.calls
    given = [vars(shot) for shot in call]
    assert [shot.get("prompt") for shot in given] == ["fine", None]
    assert given[0].get("prompts") is None
    assert key_prompts(given[1]["prompts"]) == ((0, "fine"), (2, "good"))
    (rows,) = results.take()
    assert rows["error_kind"].null_count == 2
    assert rows["prompts"].to_pylist() == [
        None,
        [{"frame": 0, "prompt": "fine"}, {"frame": 2, "prompt": "good"}],
    ]


def test_a_request_with_an_unknown_model_is_passed_through_where_its_batch_fails(make_config: MakeConfig) -> None:
    table = requests_table(3, model=["nowhere", None, None], prompt=["fine", "raises", "fine"], format=["gif"] * 3)
    config, results = make_config(table), dataset.CollectedResults()
    requests = stages.FetchImages(config.images, f"file://{config.manifest}")(validated(table, config))

    animate_stage(config, PoisonedEngine(), commits=results)(requests)

    kinds = [row["error_kind"] for rows in results.take() for row in rows.to_pylist()]
    assert kinds == ["invalid_value", "engine_error", None]


def test_identical_rows_of_a_batch_share_one_held_file(make_config: MakeConfig) -> None:
    table = pa.concat_tables([requests_table(1, format=["gif"])] * 2)
    config, files, results = make_config(table), dataset.HeldFiles(), dataset.CollectedResults()
    requests = stages.FetchImages(config.images, f"file://{config.manifest}")(validated(table, config))

    animate_stage(config, RestlessEngine(), store=files, commits=results)(requests)

    (rows,) = results.take()
    ((name, data),) = files.take().items()
    assert rows["animation_uri"].to_pylist() == [name] * 2
    assert rows["sha256"].to_pylist() == [hashlib.sha256(data).hexdigest()] * 2
    assert files.take() == {}


def test_a_required_column_that_is_missing_is_named(make_config: MakeConfig) -> None:
    with pytest.raises(ManifestError, match="this Dataset of requests has no column 'prompt'; it has: request_id"):
        validated(requests_table(1).drop_columns(["prompt"]), make_config())


@pytest.mark.parametrize(
    ("manifest", "folder"),
    [
        ("s3://bucket/m/requests.parquet", "s3://bucket/m"),
        ("s3://bucket/m/", "s3://bucket/m"),
        ("/data/dt=2026-11-22/rows.CSV", "file:///data/dt%3D2026-11-22"),
        ("/data/v1.2", "file:///data/v1.2"),
    ],
)
def test_relative_images_start_from_the_folder_of_a_manifest_that_is_not_read(manifest: str, folder: str) -> None:
    assert dataset._folder(manifest) == folder


# --- on a real Ray --------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """What a Dataset comes to, by request id."""

    table: pa.Table

    @classmethod
    def of(cls, results: ray.data.Dataset) -> Rows:
        blocks = [ray.get(block) for block in results.to_arrow_refs()]
        return cls(pa.concat_tables(blocks, promote_options="permissive"))

    def column(self, name: str) -> dict[str, Any]:
        return dict(zip(self.table["request_id"].to_pylist(), self.table[name].to_pylist(), strict=True))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_example_of_the_documentation_animates_a_dataset(
    write_manifest: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = requests_table(
        6,
        image=["images/0.png", "images/gone.png", "images/1.png", "/etc/passwd", "images/0.png", "images/0.png"],
        prompt=["a red circle moving left"] * 6,
        num_frames=[4, 4, 9999, 4, 4, 4],
        num_inference_steps=[2] * 6,
        format=["gif"] * 6,
        shop=["north"] * 5 + ["south"],
    )
    monkeypatch.chdir(write_manifest(pa.concat_tables([table, table.slice(4, 1)])))
    Path("jobs").symlink_to(ROOT / "jobs")
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n([^`]*animate\(north[^`]*)```", page)

    for name in ("requests.parquet", "table"):  # the workers of this Ray were started in another folder
        example = example.replace(f'"{name}"', f'"{Path.cwd() / name}"')
    for line in ('ray.init(address="local")', "ray.shutdown()"):  # the Ray of this test stands for the reader's
        assert line in example
        example = example.replace(line, "")
    exec(example, {"RunConfig": RunConfig})  # noqa: S102 - what a reader would do

    rows = Rows(ds.dataset("table").to_table())
    assert rows.table.column_names == [*RESULT.names, "shop"]
    assert sorted(rows.table["request_id"].to_pylist()) == ["r000", "r001", "r002", "r003", "r004", "r004"]
    assert rows.column("error_kind") == {
        "r000": None,
        "r001": "image_unavailable",
        "r002": "out_of_range",
        "r003": "image_not_allowed",
        "r004": None,
    }
    assert rows.column("error")["r002"].startswith("column 'num_frames': 9999 is not allowed")
    assert set(rows.column("shop").values()) == {"north"}
    stored = {path.as_uri(): path.read_bytes() for path in (Path.cwd() / "clips").glob("animations/*/*")}
    uris, hashes, keys = (rows.column(name) for name in ("animation_uri", "sha256", "key"))
    assert set(stored) == {uris["r000"], uris["r004"]}
    for name in ("r000", "r004"):
        assert hashlib.sha256(stored[uris[name]]).hexdigest() == hashes[name]
        assert codecs.probe(stored[uris[name]], "gif").num_frames == 4
        assert Path(uris[name]).stem == keys[name]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_row_that_kills_its_worker_fails_alone_each_time_it_is_asked_for(make_config: MakeConfig) -> None:
    table = requests_table(4, prompt=["fine", "exits", "fine", "fine"], format=["gif"] * 4, num_frames=[2] * 4)
    config = make_config(table, limits__max_attempts=2)
    loader = FakeEngineLoader(engine_ids_of(config)["default"], engine=PoisonedEngine)

    results = animate(ray.data.from_arrow(table), config, load_engines=loader)
    for rows in (Rows.of(results), Rows.of(results)):
        kinds = rows.column("error_kind")
        assert kinds == {"r000": None, "r001": "worker_crash", "r002": None, "r003": None}
        stored = {path.as_uri() for path in Path(config.output).glob("animations/*/*")}
        assert {uri for uri in rows.column("animation_uri").values() if uri} == stored
        assert len(stored) == 3


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_files_come_with_their_results_where_nothing_is_to_be_stored(make_config: MakeConfig) -> None:
    table = requests_table(
        3, prompt=["fine", "not finite", "fine"], format=["gif"] * 3, num_frames=[2, 2, 3], poster=[True, True, None]
    )
    config = make_config(table, run_id="mine")
    loader = FakeEngineLoader(engine_ids_of(config)["default"])

    requests = ray.data.from_arrow(table)
    rows = Rows.of(animate(requests, config, store=False, load_engines=loader))
    none = requests.filter(expr=col("request_id") == "unknown")
    assert animate(none, config, store=False, load_engines=loader).count() == 0

    assert rows.table.column_names == [*RESULT.names, "animation_bytes", "poster_bytes"]
    assert rows.column("error_kind") == {"r000": None, "r001": "non_finite", "r002": None}
    files, hashes = rows.column("animation_bytes"), rows.column("sha256")
    assert files["r001"] is None
    for name, frames in (("r000", 2), ("r002", 3)):
        assert codecs.probe(files[name], "gif").num_frames == frames
        assert hashlib.sha256(files[name]).hexdigest() == hashes[name]
    assert set(rows.column("animation_uri").values()) == set(rows.column("poster_uri").values()) == {None}
    posters, poster_hashes = rows.column("poster_bytes"), rows.column("poster_sha256")
    assert [name for name in posters if posters[name]] == ["r000"]
    assert hashlib.sha256(posters["r000"]).hexdigest() == poster_hashes["r000"]
    assert set(rows.column("run_id").values()) == {"mine"}
    assert not Path(config.output).exists()


def _without_prompt(rows: pa.Table) -> pa.Table:
    return rows.drop_columns(["prompt"])


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_what_the_operator_has_to_fix_is_reported_before_anything_is_generated(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config()
    with pytest.raises(ManifestError, match="this Dataset of requests has no column 'prompt'"):
        animate(ray.data.from_items([{"request_id": "a", "image": "a.png"}]), config)
    unknown = ray.data.from_arrow(requests_table(1)).map_batches(_without_prompt, batch_format="pyarrow")
    assert unknown.schema(fetch_if_missing=False) is None
    with pytest.raises(ManifestError, match=r"^this Dataset of requests has no column 'prompt'.*NAME$"):
        animate(unknown, config)
    several = ray.data.from_arrow([requests_table(1), requests_table(1, prompt=[7])])
    with pytest.raises(
        ManifestError, match=r"^this Dataset of requests: its blocks disagree: .*prompt.*string vs int64;"
    ):
        animate(several, config)
    named = requests_table(1, animation_bytes=[b"mine"])
    with pytest.raises(ManifestError, match="'animation_bytes' has the name of a result column"):
        animate(ray.data.from_arrow(named), config, store=False)
    with pytest.raises(ConfigError, match="nowhere"):
        animate(ray.data.from_arrow(requests_table(1)), make_config(model__base=str(tmp_path / "nowhere")))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match="file"):
        animate(ray.data.from_arrow(requests_table(1)), make_config(output=str(tmp_path / "file" / "out")))


def test_views_and_runs_are_carried_in_a_plain_type(make_config: MakeConfig) -> None:
    texts = pa.array([["a"], None, ["b", None]])
    runs = pa.array(["a", None, None])
    table = requests_table(
        3,
        texts=texts.cast(pa.list_(pa.string_view())),
        views=pa.array([["a"], None, ["b", None]], pa.list_view(pa.string())),
        runs=pc.run_end_encode(runs),
    )

    rows = validated(table, make_config())

    assert [rows[name].to_pylist() for name in ("texts", "views", "runs")] == [
        texts.to_pylist(),
        texts.to_pylist(),
        runs.to_pylist(),
    ]
    assert rows["views"].type == pa.list_(pa.string())


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_columns_of_every_type_pass_through_and_what_is_no_text_is_no_prompt(make_config: MakeConfig) -> None:
    leaves = [one for one in LEAVES if one not in (pa.string_view(), pa.binary_view())]  # Ray itself refuses these
    listed = [pa.list_(one) for one in leaves] + [pa.struct([("x", one)]) for one in leaves]
    own = {f"c{number}": pa.nulls(3, one) for number, one in enumerate([*leaves, *listed])}
    own |= {f"e{number}": extension_column(one, 3) for number, one in enumerate(EXTENSIONS)}
    own["far"] = pa.array([-(2**62), None, 2**62], pa.timestamp("s"))
    table = requests_table(3, num_frames=[2] * 3, **own)
    config = make_config(run_id="mine")
    loader = FakeEngineLoader(engine_ids_of(config)["default"])

    results = pa.concat_tables(
        ray.get(animate(ray.data.from_arrow(table), config, store=False, load_engines=loader).to_arrow_refs())
    ).sort_by("request_id")

    assert results["status"].to_pylist() == ["succeeded"] * 3
    for name in own:
        assert plain_column(results[name]).equals(plain_column(table[name])), table[name].type

    frame = pd.DataFrame(requests_table(3).to_pydict() | {"negative_prompt": ["blurry", float("nan"), None]})
    rows = Rows.of(animate(ray.data.from_pandas(frame), config, store=False, load_engines=loader))
    assert rows.column("status") == dict.fromkeys(["r000", "r001", "r002"], "succeeded")
    assert rows.column("negative_prompt") == {"r000": "blurry", "r001": "", "r002": ""}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("bad", REFUSED, ids=str)
def test_a_column_that_results_cannot_hold_is_refused_by_name(bad: pa.DataType, make_config: MakeConfig) -> None:
    table = requests_table(1, mine=pa.nulls(1, bad))

    with pytest.raises(ManifestError, match="this Dataset of requests: column 'mine' has the type"):
        animate(ray.data.from_arrow(table), make_config())


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (pd.arrays.SparseArray([0.0, 1.0]), r"type Sparse\[float64, nan\] of pandas, .* by \.sparse\.to_dense\(\)$"),
        (pd.arrays.SparseArray([0, 1]), r"type Sparse\[int64, 0\] of pandas"),
        (np.array([1j, 2]), r"type complex128 of pandas, which Arrow lacks .* by \.astype\(str\)$"),
        (np.array([1, 2], "longdouble"), r"type float128 of pandas"),
        (np.array([1, 2], ">i4"), r"type >i4 of pandas"),
        (pd.Categorical([1, "a"]), r"type category of pandas"),
        (pd.Categorical([1j, 2]), r"type category of pandas"),
        (pd.Categorical(["a", None]), None),
        (pd.Categorical(pd.interval_range(0, 2)), None),
        (pd.period_range("2020-01", periods=2, freq="M"), None),
        (pd.interval_range(0, 2), None),
        (pd.array([1, None], "Int64"), None),
        (pd.to_datetime(["2020-01-01", None]).tz_localize("Europe/Berlin"), None),
        (pd.Series([{1}, "a"], dtype=object), None),
        (pd.Series([[1], None], dtype=pd.ArrowDtype(pa.list_(pa.int64()))), None),
    ],
    ids=lambda value: str(getattr(value, "dtype", "")),
)
def test_a_column_of_pandas_that_arrow_lacks_is_refused_by_name_before_its_rows(
    values: Any, problem: str | None, make_config: MakeConfig
) -> None:
    frame = pd.DataFrame({"request_id": ["a", "b"], "image": ["x.png"] * 2, "prompt": ["p"] * 2, "mine": values})
    schema = ray.data.Schema(BlockAccessor.for_block(frame).schema())

    if problem is None:
        dataset._check(schema, make_config(), store=True)
        return
    with pytest.raises(ManifestError, match=f"this Dataset of requests: column 'mine' has the {problem}"):
        dataset._check(schema, make_config(), store=True)


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA, pd.NaT], ids=str)
@pytest.mark.parametrize("column", ["request_id", "prompt", "negative_prompt"])
def test_what_pandas_calls_missing_is_missing_in_a_dataset_and_never_a_word(
    missing: object, column: str, make_config: MakeConfig
) -> None:
    rows = {"request_id": ["a", "b"], "image": ["x.png"] * 2, "prompt": ["p", "q"], "negative_prompt": ["n", "None"]}
    frame = pd.DataFrame(rows)
    frame[column] = pd.Series([missing, rows[column][1]], dtype=object)
    validate = stages.Validate(make_config(), {"default": ENGINE_ID}, keep_rejected=True)

    first, second = validate(pa.Table.from_pandas(frame, preserve_index=False)).to_pylist()

    if column == "negative_prompt":
        assert (first["error_kind"], first["negative_prompt"]) == (None, "")
    else:
        assert (first["error_kind"], first[column]) == ("missing_value", None)
        assert f"column {column!r} is empty" in first["error"]
    assert (second["error_kind"], second["negative_prompt"]) == (None, "None")  # a word, as it was given
