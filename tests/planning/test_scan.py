"""A plan is the same whether its manifest was scanned before or not, and costs less where it was."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import requests_table
from plans import commit, content_of, members

from pia_batch.config import RunConfig
from pia_batch.errors import ConfigError, InterruptedRunError, ManifestError, StorageError
from pia_batch.manifest import files as manifest_files
from pia_batch.manifest.reader import Manifest
from pia_batch.manifest.validation import check
from pia_batch.planning import scan, scan_cache, scan_validate
from pia_batch.planning.plan import Plan, make_plan
from pia_batch.storage.object_store import Store


@pytest.fixture
def worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_cache, "MIN_ROWS", 0)


@pytest.fixture
def config(tmp_path: Path, worth_it: None) -> RunConfig:
    del worth_it
    (tmp_path / "manifest").mkdir()
    return RunConfig.load(None, {"manifest": str(tmp_path / "manifest"), "output": str(tmp_path / "out")})


@pytest.fixture
def clock() -> Iterator[float]:
    """Times of change long ago, all different."""
    return iter(range(1_700_000_000, 1_800_000_000))


def put(path: Path, table: pa.Table, changed_s: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    os.utime(path, (changed_s, changed_s))


def requests(start: int, count: int, **columns: Any) -> pa.Table:
    ids = [f"r{number:03d}" for number in range(start, start + count)]
    return requests_table(count, request_id=ids, **columns)


def saved(config: RunConfig) -> Plan:
    plan = make_plan(config)
    plan.save_scan()
    return plan


def read_files(config: RunConfig) -> set[str]:
    """The files that a plan has to scan now."""
    return {Path(chunk.file.path).name for chunk in make_plan(config).new_chunks}


def planned(config: RunConfig) -> dict[str, Any] | str:
    try:
        return content_of(make_plan(config))
    except (ManifestError, ConfigError) as err:
        return str(err)


# --- what is read again ----------------------------------------------------------------------------------------------


def test_only_files_that_are_new_or_changed_are_scanned(
    config: RunConfig, tmp_path: Path, clock: Iterator[float]
) -> None:
    for number in range(3):
        put(tmp_path / "manifest" / f"{number}.parquet", requests(10 * number, 4), next(clock))
    assert read_files(config) == {"0.parquet", "1.parquet", "2.parquet"}
    saved(config)
    assert read_files(config) == set()

    put(tmp_path / "manifest" / "3.parquet", requests(30, 4), next(clock))
    put(tmp_path / "manifest" / "1.parquet", requests(10, 4, prompt=["another"] * 4), next(clock))
    assert read_files(config) == {"1.parquet", "3.parquet"}
    saved(config)
    assert read_files(config) == set()

    (tmp_path / "manifest" / "0.parquet").unlink()
    plan = make_plan(config)
    assert (plan.num_pending, plan.new_chunks) == (12, ())


def test_a_plan_by_itself_keeps_nothing(config: RunConfig, tmp_path: Path, clock: Iterator[float]) -> None:
    put(tmp_path / "manifest" / "0.parquet", requests(0, 4), next(clock))

    make_plan(config)

    assert not (tmp_path / "out").exists()


def test_a_file_that_was_known_is_not_opened_at_all(config: RunConfig, tmp_path: Path, clock: Iterator[float]) -> None:
    path = tmp_path / "manifest" / "0.parquet"
    put(path, requests(0, 4), next(clock))
    truth = content_of(saved(config))
    changed = path.stat()
    path.write_bytes(bytes(changed.st_size))
    os.utime(path, ns=(changed.st_mtime_ns, changed.st_mtime_ns))

    assert content_of(make_plan(config)) == truth


@pytest.mark.parametrize(
    ("key", "value", "again"),
    [
        ("defaults.guidance_scale", 3.0, True),
        ("defaults.num_frames", 4, True),
        ("encoding.mp4_crf", 30, True),
        ("images.fit", "contain", True),
        ("images.background", "#ffffff", True),
        ("limits.max_frame_pixels", 4, True),
        ("limits.max_call_pixels", 4, True),
        ("model.scheduler.name", "euler", True),
        ("model.name", "other", True),
        ("images.threads", 3, False),
        ("images.timeout_s", 3.0, False),
        ("limits.max_failed", 3, False),
        ("placement.batch_size", 3, False),
    ],
)
def test_a_setting_that_decides_keys_asks_for_another_scan(
    config: RunConfig, tmp_path: Path, clock: Iterator[float], key: str, value: Any, again: bool
) -> None:
    put(tmp_path / "manifest" / "0.parquet", requests(0, 2), next(clock))
    saved(config)

    changed = RunConfig.load(None, {"manifest": config.manifest, "output": config.output, key: value})

    assert bool(read_files(changed)) == again


class Spy:
    """Config that records the names that are read."""

    def __init__(self, inner: Any, name: str, asked: set[str]) -> None:
        self._inner, self._name, self._asked = inner, name, asked

    def __getattr__(self, name: str) -> Any:
        full = f"{self._name}.{name}".removeprefix(".")
        value = getattr(self._inner, name)
        if name in RunConfig.model_fields and not self._name and hasattr(value, "model_fields_set"):
            return Spy(value, name, self._asked)
        self._asked.add(full)
        return value


def test_checking_rows_asks_for_nothing_of_the_config_that_a_scan_is_not_known_by(config: RunConfig) -> None:
    asked: set[str] = set()
    columns = {"format": ["gif", None, "mp4", "webp"], "size": ["auto", None, "fixed", None], "seed": [1, 2, -3, None]}

    check(requests_table(4, **columns), Spy(config, "", asked), {"default": "x"})

    whole = ("defaults.", "encoding.")
    single = {"images.identity", "limits.max_frame_pixels", "limits.max_call_pixels", "all_models", "model.name"}
    single |= {"columns", "request_id_from", "safety.blocked_words"}
    single |= {"original_models"}  # part of the engine ids
    single |= {"upscaler", "upscale.scale", "upscale.model"}  # no upscaler: none of its identity
    assert {name for name in asked if not name.startswith(whole)} <= single
    assert {name.split(".")[0] for name in asked} >= {"defaults", "encoding", "images", "limits", "model", "all_models"}


def test_the_columns_of_other_files_decide_how_a_file_is_read(
    config: RunConfig, tmp_path: Path, clock: Iterator[float]
) -> None:
    put(tmp_path / "manifest" / "0.parquet", requests(0, 2, seed=[1, 2]), next(clock))
    saved(config)

    put(tmp_path / "manifest" / "1.parquet", requests(10, 2, seed=[1.0, 2.5]), next(clock))

    assert read_files(config) == {"0.parquet", "1.parquet"}
    put(tmp_path / "manifest" / "1.parquet", requests(10, 2, shop=["a", "b"]), next(clock))
    assert read_files(config) == {"1.parquet"}


def test_lines_of_json_are_known_too(config: RunConfig, tmp_path: Path, clock: Iterator[float]) -> None:
    def write(number: int, **more: Any) -> None:
        rows = requests(10 * number, 3).to_pylist()
        path = tmp_path / "manifest" / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row | more) + "\n" for row in rows), encoding="utf-8")
        os.utime(path, (changed := next(clock), changed))

    write(0, prompt="")
    write(1)
    truth = content_of(saved(config))
    assert read_files(config) == set()
    assert content_of(make_plan(config)) == truth

    write(2, seed=7)
    assert read_files(config) == {"0.jsonl", "1.jsonl", "2.jsonl"}  # there is a column more to read now


def test_a_scan_by_other_code_does_not_count(
    config: RunConfig, tmp_path: Path, clock: Iterator[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "manifest" / "0.parquet", requests(0, 2), next(clock))
    saved(config)

    monkeypatch.setattr(scan_cache, "_CODE", (*scan_cache._CODE, "storage/object_store.py"))

    assert read_files(config) == {"0.parquet"}


def test_the_code_that_decides_keys_is_there_under_the_names_that_a_scan_is_known_by() -> None:
    found = {pattern: list(Path(scan_cache.__file__).parents[1].glob(pattern)) for pattern in scan_cache._CODE}

    assert all(found.values()), found
    assert "requests.py" in {path.name for path in found["config/*.py"]}


def test_a_file_that_changed_just_now_is_not_kept(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_cache, "SETTLED_WHOLE_SECONDS_NS", 600 * 10**9)  # however slow this machine is
    put(tmp_path / "manifest" / "0.parquet", requests(0, 2), int(time.time()))
    put(tmp_path / "manifest" / "1.parquet", requests(2, 2), time.time() + 3600.5)

    saved(config)

    assert read_files(config) == {"0.parquet", "1.parquet"}


def test_a_file_that_is_replaced_after_its_scan_is_not_kept(
    config: RunConfig, tmp_path: Path, clock: Iterator[float]
) -> None:
    for number in range(2):
        put(tmp_path / "manifest" / f"{number}.parquet", requests(10 * number, 4), next(clock))
    plan = make_plan(config)
    put(tmp_path / "manifest" / "1.parquet", requests(50, 4), next(clock))
    plan.save_scan()

    assert read_files(config) == {"1.parquet"}


def test_a_file_that_is_replaced_while_it_is_scanned_ends_the_plan(
    config: RunConfig, tmp_path: Path, clock: Iterator[float]
) -> None:
    put(tmp_path / "manifest" / "0.parquet", requests(0, 4), next(clock))
    found = Manifest.open(config.manifest)
    put(tmp_path / "manifest" / "0.parquet", requests(50, 4), next(clock))

    with pytest.raises(InterruptedRunError, match="was replaced or removed"):
        scan.scan_manifest(found, config, {"default": "x"})


def test_entries_of_replaced_files_are_dropped_once_they_are_most(
    config: RunConfig, tmp_path: Path, clock: Iterator[float]
) -> None:
    sizes = []
    for _ in range(6):
        put(tmp_path / "manifest" / "0.parquet", requests(0, 500), next(clock))
        saved(config)
        heads = sorted((tmp_path / "out" / "_scans").rglob("*.json"))
        sizes.append(sum(size for _, size in json.loads(heads[-1].read_bytes())["packs"]))

    assert max(sizes) < 3.5 * sizes[0]
    assert read_files(config) == set()


def test_small_manifests_leave_nothing_behind(tmp_path: Path, clock: Iterator[float]) -> None:
    config = RunConfig.load(None, {"manifest": str(tmp_path / "manifest"), "output": str(tmp_path / "out")})
    put(tmp_path / "manifest" / "0.parquet", requests(0, 5), next(clock))
    saved(config)
    assert not (tmp_path / "out").exists()

    for number in range(1, scan_cache.MIN_FILES):
        put(tmp_path / "manifest" / f"{number}.parquet", requests(10 * number, 1), next(clock))
    saved(config)
    assert (tmp_path / "out" / "_scans").exists()


def test_a_scan_that_cannot_be_kept_is_a_warning(
    config: RunConfig, tmp_path: Path, clock: Iterator[float], caplog: pytest.LogCaptureFixture
) -> None:
    class Full(Store):
        def create(self, name: str, data: bytes) -> None:
            msg = f"cannot create {name}: {len(data)} bytes"
            raise StorageError(msg)

    put(tmp_path / "manifest" / "0.parquet", requests(0, 5), next(clock))
    ids = make_plan(config).engine_ids
    cache = scan_cache.ScanCache(Full(config.output), config, ids)
    found = Manifest.open(config.manifest)

    cache.save(found, scan.scan_manifest(found, config, ids, cache).new_chunks)

    assert "scan_cache_save_failed" in caplog.text


def test_only_the_row_groups_that_hold_what_is_asked_for_are_read(tmp_path: Path) -> None:
    pq.write_table(requests(0, 12), tmp_path / "0.parquet", row_group_size=3)
    pq.write_table(requests(100, 5), tmp_path / "1.parquet", row_group_size=3)
    found = Manifest.open(str(tmp_path))

    batches = list(found.batches(["request_id"], ordinals=pa.array([4, 10, 11, 16]).to_numpy()))

    assert [(batch.first_row, batch.ordinal, len(batch.table)) for batch in batches] == [
        (3, 3, 3),
        (9, 9, 3),
        (3, 15, 2),
    ]
    assert batches[-1].table["request_id"].to_pylist() == ["r103", "r104"]
    assert list(found.batches(ordinals=pa.array([], pa.int64()).to_numpy())) == []


# --- the same plan ---------------------------------------------------------------------------------------------------

ROWS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", "d", "e", "f", "", "bad\x00id"]),
        st.sampled_from(["red circle", "blue square", ""]),
        st.sampled_from([None, 1, 2, -1]),
    ),
    max_size=9,
)
KINDS = st.sampled_from([pa.int64(), pa.int32(), pa.float64(), pa.string(), None])
SETTINGS = st.sampled_from(
    [
        ("defaults.guidance_scale", 3.0),
        ("defaults.motion", "large"),
        ("defaults.size", "auto"),
        ("encoding.mp4_crf", 30),
        ("images.fit", "contain"),
        ("limits.max_frame_pixels", 1),
        ("limits.max_call_pixels", 1),
        ("placement.batch_size", 3),
        ("limits.max_failed", 3),
    ]
)
EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 3), st.tuples(ROWS, KINDS)),
        st.tuples(st.just("delete"), st.integers(0, 3), st.none()),
        st.tuples(st.just("configure"), st.none(), SETTINGS),
        st.tuples(st.just("forget"), st.none(), st.none()),
        st.tuples(st.just("finish"), st.integers(0, 3), st.none()),
        st.tuples(st.just("lose"), st.integers(0, 9), st.none()),
        st.tuples(st.just("save"), st.none(), st.none()),
    ),
    min_size=2,
    max_size=7,
)
NAMES = ("a.parquet", "b.parquet", "seed=1/c.parquet", "seed=2/d.parquet")


def table_of(rows: list[tuple[str, str, int | None]], kind: pa.DataType | None) -> pa.Table:
    names = {"request_id": 0, "prompt": 1}
    columns = {name: pa.array([row[at] for row in rows], pa.string()) for name, at in names.items()}
    columns["image"] = pa.array(["images/0.png"] * len(rows), pa.string())
    if kind is not None:
        columns["seed"] = pa.array([row[2] for row in rows], pa.int64()).cast(kind)
    return pa.table(columns)


@pytest.mark.long
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(EDITS, st.sampled_from([2, 5, 500_000]))
def test_a_plan_is_the_same_with_and_without_what_was_scanned_before(
    edits: list[tuple[str, Any, Any]], rows: int
) -> None:
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        for module, constant, value in (
            (scan_cache, "MIN_ROWS", 0),
            (scan, "CHUNK_ROWS", rows),
            (scan_validate, "CHECKED_ROWS", rows),
            (manifest_files, "BATCH_ROWS", rows),
        ):
            patch.setattr(module, constant, value)
        folder, changes = Path(name), iter(range(1_700_000_000, 1_800_000_000))
        overrides = {"manifest": str(folder / "manifest"), "output": str(folder / "out")}
        put(folder / "manifest" / NAMES[0], requests(0, 3), next(changes))
        for verb, number, argument in edits:
            if verb == "write":
                put(folder / "manifest" / NAMES[number], table_of(*argument), next(changes))
            elif verb == "delete":
                (folder / "manifest" / NAMES[number]).unlink(missing_ok=True)
            elif verb == "configure":
                overrides |= {argument[0]: argument[1]}
            elif verb == "forget":
                overrides = {key: overrides[key] for key in ("manifest", "output")}
            elif verb == "lose" and (files := sorted((folder / "out").glob("_scans/*/*"))):
                files[number % len(files)].unlink()
            compare(folder, RunConfig.load(None, overrides), verb, number)


def compare(folder: Path, config: RunConfig, verb: str, number: int | None) -> None:
    """Plan in this output, and in one that has the same journal and no scans."""
    bare = folder / "bare"
    shutil.rmtree(bare, ignore_errors=True)
    if (folder / "out" / "_journal").exists():
        shutil.copytree(folder / "out" / "_journal", bare / "_journal")
    truth = planned(config.model_copy(update={"output": str(bare)}))
    assert planned(config) == truth
    if isinstance(truth, str):
        return
    if verb == "save":
        assert content_of(saved(config)) == truth
        assert planned(config) == truth
    elif verb == "finish" and number is not None:
        plan = make_plan(config)
        wanted = sorted(members(plan.wanted))
        commit(config, wanted[number : number + 1], "succeeded")


# --- what it costs ---------------------------------------------------------------------------------------------------


def seconds(function: Callable[[], object]) -> float:
    """CPU seconds of this process, all threads: other processes do not count."""
    start = time.process_time()
    function()
    return time.process_time() - start


def test_a_plan_of_known_files_is_at_least_five_times_cheaper_than_their_scan(
    config: RunConfig, tmp_path: Path, clock: Iterator[float]
) -> None:
    for number in range(4):
        put(tmp_path / "manifest" / f"{number}.parquet", requests(20_000 * number, 20_000), next(clock))
    scanned = seconds(lambda: make_plan(config))
    saved(config)

    known = min(seconds(lambda: make_plan(config)) for _ in range(2))

    assert scanned > 5 * known


@pytest.mark.s3
def test_scans_are_kept_by_etag_on_s3(s3: str, worth_it: None) -> None:
    del worth_it
    store = Store(f"{s3}/scanning")
    paths = {"manifest": f"{store.uri}/manifest", "output": f"{store.uri}/out"}
    config = RunConfig.load(None, paths)

    def upload(number: int, **columns: Any) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(requests(10 * number, 4, **columns), sink)
        store.replace(f"manifest/{number}.parquet", bytes(sink.getvalue()))

    upload(0)
    upload(1)
    truth = content_of(saved(config))
    assert read_files(config) == set()
    assert content_of(make_plan(config)) == truth
    upload(1, prompt=["another"] * 4)
    assert read_files(config) == {"1.parquet"}
    assert len(content_of(make_plan(config))["wanted"] & truth["wanted"]) == 4
