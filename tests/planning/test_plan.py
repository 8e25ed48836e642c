from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inputs import requests_table
from plans import commit, keys_of, members

from pia_batch.config import RunConfig
from pia_batch.errors import ConfigError, ManifestError
from pia_batch.journal import layout
from pia_batch.journal.log import Journal
from pia_batch.journal.results import publish
from pia_batch.manifest.files import BATCH_ROWS_WITH_BYTES
from pia_batch.manifest.reader import Manifest
from pia_batch.manifest.validation import check
from pia_batch.planning.plan import Plan, Retry, find_published_run, make_plan
from pia_batch.schema.columns import RESULT, results_table
from pia_batch.schema.keys import keys_from_hex
from pia_batch.storage.object_store import Store


def write(folder: Path, *tables: pa.Table) -> RunConfig:
    """A config over a manifest of one file for each table."""
    (folder / "manifest").mkdir(parents=True)
    for index, table in enumerate(tables):
        pq.write_table(table, folder / "manifest" / f"{index}.parquet")
    return RunConfig.load(None, {"manifest": str(folder / "manifest"), "output": str(folder / "out")})


def publish_all(plan: Plan) -> None:
    store = Store(plan.config.output)
    log = Journal(store)
    for table in plan.rejections_to_commit("run"):
        log.append(table)
    publish(log, log.outcomes(), plan.wanted, plan.carried, "run", {})


def left_for_ray(plan: Plan) -> list[str]:
    """What the chain would animate: the manifest's good rows but for the settled ones, and the repeats."""
    keys = keys_of(plan)
    settled = plan.skipped.contains(keys_from_hex(pa.array(keys, pa.string())))
    rows = [key for key, done in zip(keys, settled, strict=True) if not done]
    return sorted(rows + plan.repeats["key"].to_pylist())


# --- a first plan ---------------------------------------------------------------------------------------------------


def test_a_plan_of_good_requests_leaves_them_all_to_do(tmp_path: Path) -> None:
    plan = make_plan(write(tmp_path, requests_table(5)))

    assert (plan.num_pending, plan.num_rejected, plan.num_duplicates, len(plan.repeats)) == (5, 0, 0, 0)
    assert members(plan.wanted) == set(keys_of(plan)) == set(left_for_ray(plan))
    assert len(plan.skipped) == len(plan.outcomes.keys) == 0
    assert plan.carried.names == []
    assert not find_published_run(plan)


def test_a_plan_writes_nothing_not_even_the_folder_of_the_output(tmp_path: Path) -> None:
    config = write(tmp_path, requests_table(3, seed=[1, -1, 2]))

    plan = make_plan(config, retry=Retry())

    assert find_published_run(plan) is None
    assert len(list(plan.rejections_to_commit("run"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["manifest"]


def test_a_plan_of_a_bad_manifest_ends_before_anything(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="has no rows"):
        make_plan(write(tmp_path, requests_table(0)))
    assert not (tmp_path / "out").exists()


# --- rejected rows --------------------------------------------------------------------------------------------------


def test_a_rejected_row_is_a_failed_result_with_its_place_its_reason_and_what_it_carries(tmp_path: Path) -> None:
    second = requests_table(3, request_id=["x", "y", None], seed=[1, -1, 2], zone=["a", "b", "c"], age=[1, 2, 3])
    config = write(tmp_path, requests_table(2), second)

    plan = make_plan(config)

    assert plan.rejected.schema.equals(pa.schema([*RESULT, ("zone", pa.string()), ("age", pa.int64())]))
    seed, request_id = plan.rejected.to_pylist()
    file = f"{tmp_path}/manifest/1.parquet"
    assert seed["error"] == (
        f"{file} row 1: column 'seed': -1 is not allowed; "
        "allowed: a whole number from 0 to 2^63-1, or null for the default"
    )
    assert request_id["error"].startswith(f"{file} row 2: column 'request_id' is empty")
    assert (seed["request_id"], request_id["request_id"]) == ("y", None)
    assert (seed["error_kind"], request_id["error_kind"]) == ("out_of_range", "missing_value")
    assert (seed["zone"], seed["age"], request_id["zone"]) == ("b", 2, "c")
    assert seed["status"] == request_id["status"] == "failed"
    assert (seed["attempts"], seed["engine_id"], seed["prompt"]) == (0, None, second["prompt"][1].as_py())
    assert seed["key"] != request_id["key"]
    assert seed["finished_at"] is not None
    assert plan.num_pending == 3


def test_rejected_rows_of_a_table_read_in_several_batches_keep_their_row_numbers(tmp_path: Path) -> None:
    count = 2 * BATCH_ROWS_WITH_BYTES + 5
    bad = [3, BATCH_ROWS_WITH_BYTES, count - 1]
    table = requests_table(
        count, image=pa.nulls(count), image_bytes=[b"x"] * count, fps=[99 if k in bad else 9 for k in range(count)]
    )

    plan = make_plan(write(tmp_path, table))

    assert plan.rejected["request_id"].to_pylist() == [f"r{k:03d}" for k in bad]
    assert [error.split(":")[0].split()[-1] for error in plan.rejected["error"].to_pylist()] == [str(k) for k in bad]
    assert plan.num_pending == count - 3


@pytest.mark.parametrize(
    "ids",
    [pa.array([1.5, 2.5]), pa.array([True, False]), pa.array([b"\xff", b"a"]), pa.array([["a"], ["b"]])],
    ids=lambda ids: str(ids.type),
)
def test_ids_of_any_type_are_rejected_one_by_one(tmp_path: Path, ids: pa.Array) -> None:
    plan = make_plan(write(tmp_path, requests_table(2, request_id=ids)))

    assert plan.rejected["error_kind"].to_pylist() == ["invalid_type"] * 2
    assert len(plan.wanted) == 2
    assert plan.num_pending == 0


def test_results_of_rejected_rows_show_no_credentials(tmp_path: Path) -> None:
    table = requests_table(1, image=["https://me:secret@host/x?sign=secret"], image_bytes=[b"x"])

    plan = make_plan(write(tmp_path, table))

    assert plan.rejected["image"].to_pylist() == ["https://host/x"]
    assert "secret" not in str(plan.rejected.to_pylist())


def test_rejections_are_committed_once_and_under_the_run_that_found_them(tmp_path: Path) -> None:
    config = write(tmp_path, requests_table(3, seed=[1, -1, -2]))
    (table,) = make_plan(config).rejections_to_commit("first")
    assert table["run_id"].to_pylist() == ["first"] * 2
    Journal(Store(config.output)).append(table)

    again = make_plan(config, retry=Retry())

    assert list(again.rejections_to_commit("second")) == []
    assert again.num_rejected == 2
    assert again.num_pending == 1


def test_many_rejections_make_several_fragments(tmp_path: Path) -> None:
    plan = make_plan(write(tmp_path, requests_table(10_001, seed=[-1] * 10_001)))

    assert [len(table) for table in plan.rejections_to_commit("run")] == [10_000, 1]
    assert len(plan.wanted) == 10_001


# --- duplicates -----------------------------------------------------------------------------------------------------


def test_identical_requests_are_one_and_the_others_are_counted(tmp_path: Path) -> None:
    table = requests_table(4, zone=["a", "b", "c", "d"])
    config = write(tmp_path, pa.concat_tables([table, table.slice(1, 2)]), table.slice(2, 1))

    plan = make_plan(config)

    assert (plan.num_pending, plan.num_duplicates, plan.num_rejected) == (4, 3, 0)
    assert plan.repeats["request_id"].to_pylist() == ["r001", "r002"]
    assert plan.repeats["zone"].to_pylist() == ["b", "c"]
    assert left_for_ray(plan) == sorted(set(keys_of(plan)))


def test_a_default_written_out_makes_no_other_request(tmp_path: Path) -> None:
    table = requests_table(2, request_id=["a", "a"], image=["x", "x"], prompt=["p", "p"], fps=[None, 8.0])

    assert make_plan(write(tmp_path, table)).num_duplicates == 1


@pytest.mark.parametrize("files", [1, 2])
def test_one_id_with_two_contents_is_rejected_in_both_rows(tmp_path: Path, files: int) -> None:
    table = requests_table(3, request_id=["a", "b", "a"])
    plan = make_plan(write(tmp_path, *([table] if files == 1 else [table.slice(0, 2), table.slice(2)])))

    assert plan.rejected["request_id"].to_pylist() == ["a", "a"]
    assert plan.rejected["error_kind"].to_pylist() == ["duplicate_id"] * 2
    assert all("column 'request_id': the same id" in error for error in plan.rejected["error"].to_pylist())
    assert (plan.num_pending, plan.num_duplicates, len(plan.repeats)) == (1, 0, 0)
    assert len(left_for_ray(plan)) == 1
    assert len(plan.wanted) == 3


def test_one_id_with_two_contents_is_found_across_batches_of_a_file(tmp_path: Path) -> None:
    count = BATCH_ROWS_WITH_BYTES + 5
    ids = [f"r{k}" for k in range(count - 2)] + ["r7", "r9"]
    data = [b"x"] * (count - 2) + [b"y", b"x"]
    table = requests_table(count, request_id=ids, image=pa.nulls(count), image_bytes=data, prompt=["p"] * count)

    plan = make_plan(write(tmp_path, table))

    assert plan.rejected["request_id"].to_pylist() == ["r7", "r7"]
    assert plan.repeats["request_id"].to_pylist() == ["r9"]
    assert (plan.num_pending, plan.num_duplicates) == (count - 3, 1)


def test_an_id_that_a_rejected_row_has_too_is_rejected_with_it(tmp_path: Path) -> None:
    table = requests_table(4, request_id=["a", "b", "a", "a"], prompt=["p"] * 4, seed=[1, 1, -1, 1])

    plan = make_plan(write(tmp_path, table))

    kinds = dict(zip(plan.rejected["error"].to_pylist(), plan.rejected["error_kind"].to_pylist(), strict=True))
    assert [(error.split(":")[0].split()[-1], kind) for error, kind in kinds.items()] == [
        ("0", "duplicate_id"),
        ("2", "out_of_range"),
        ("3", "duplicate_id"),
    ]
    assert (plan.num_pending, plan.num_duplicates) == (1, 0)


def test_a_number_and_its_text_are_the_same_id(tmp_path: Path) -> None:
    config = write(tmp_path, requests_table(3, request_id=[7, 7, 8], image=["x"] * 3, prompt=["p"] * 3))

    plan = make_plan(config)

    assert (plan.num_pending, plan.num_duplicates) == (2, 1)
    assert plan.repeats["request_id"].to_pylist() == ["7"]


# --- planning again -------------------------------------------------------------------------------------------------


def test_what_the_journal_has_is_not_planned_again(tmp_path: Path) -> None:
    config = write(tmp_path, requests_table(5))
    keys = keys_of(make_plan(config))
    commit(config, keys[:2], "succeeded")
    commit(config, keys[2:3], "failed", "non_finite")
    commit(config, ["0" * 32], "succeeded")

    plan = make_plan(config)

    assert plan.num_pending == 2
    assert members(plan.skipped) == set(keys[:3])
    assert left_for_ray(plan) == sorted(keys[3:])
    assert plan.outcomes.failures == Counter(non_finite=1)
    assert len(plan.outcomes.keys) == 3


def test_retrying_brings_failures_back_but_no_success(tmp_path: Path) -> None:
    config = write(tmp_path, requests_table(4))
    keys = keys_of(make_plan(config))
    commit(config, keys[:3], "failed", "non_finite")
    commit(config, keys[1:2], "succeeded")

    plan = make_plan(config, retry=Retry())

    assert plan.num_pending == 3
    assert left_for_ray(plan) == sorted([keys[0], *keys[2:]])
    assert make_plan(config).num_pending == 1


def test_a_finished_duplicate_is_not_planned_again(tmp_path: Path) -> None:
    table = requests_table(2)
    config = write(tmp_path, pa.concat_tables([table, table]))
    commit(config, keys_of(make_plan(config))[:1], "succeeded")

    plan = make_plan(config)

    assert (plan.num_pending, plan.num_duplicates, len(plan.repeats)) == (1, 2, 1)
    assert len(left_for_ray(plan)) == 1


def test_a_changed_setting_makes_its_requests_pending_again_and_no_others(tmp_path: Path) -> None:
    config = write(tmp_path, requests_table(4, format=["gif", "mp4", "gif", None]))
    commit(config, keys_of(make_plan(config)), "succeeded")
    assert make_plan(config).num_pending == 0

    changed = RunConfig.model_validate(config.model_dump() | {"encoding": {"gif_dither": True}})

    assert make_plan(changed).num_pending == 2
    assert make_plan(config).num_pending == 0


# --- published ------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> Callable[[pa.Table], RunConfig]:
    """A config over a manifest whose good requests all succeeded, with published results."""

    def make(table: pa.Table) -> RunConfig:
        config = write(tmp_path, table)
        keys = keys_of(make_plan(config))
        store = Store(config.output)
        rows: dict[str, Any] = {
            "request_id": pa.array(keys, pa.string()),
            "key": pa.array(keys, pa.string()),
            "status": pa.scalar("succeeded"),
            "animation_uri": pa.array([store.uri_of(layout.animation_name(key, "mp4")) for key in keys]),
            "num_bytes": pa.scalar(1),
        }
        for key in keys:
            store.create(layout.animation_name(key, "mp4"), b"x")
        Journal(store).append(results_table(rows, pa.table({}), len(keys)))
        publish_all(make_plan(config))
        return config

    return make


def rewrite(config: RunConfig, table: pa.Table) -> None:
    pq.write_table(table, Path(Manifest.open(config.manifest).files[0]))


def test_finished_and_published_is_published(finished: Callable[[pa.Table], RunConfig]) -> None:
    config = finished(requests_table(3, seed=[1, 2, -1]))

    plan = make_plan(config)

    assert find_published_run(plan)
    assert plan.num_pending == 0
    assert plan.outcomes.failures == Counter(out_of_range=1)


def test_a_new_rejected_row_alone_makes_the_results_outdated(finished: Callable[[pa.Table], RunConfig]) -> None:
    config = finished(requests_table(2, seed=[1, 2]))
    rewrite(config, requests_table(3, seed=[1, 2, -1]))

    plan = make_plan(config)

    assert plan.num_pending == 0
    assert not find_published_run(plan)
    publish_all(plan)
    assert find_published_run(make_plan(config))


def test_a_row_more_a_row_less_or_a_failure_retried_makes_the_results_outdated(
    finished: Callable[[pa.Table], RunConfig],
) -> None:
    config = finished(requests_table(3))
    rewrite(config, requests_table(4))
    assert not find_published_run(make_plan(config))
    rewrite(config, requests_table(2))
    assert not find_published_run(make_plan(config))
    rewrite(config, requests_table(3, notes=["x", "y", "z"]))
    assert find_published_run(make_plan(config))


# --- any manifest at all --------------------------------------------------------------------------------------------

ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "request_id": st.sampled_from(["a", "b", "c", "d", "e", None]),
            "image": st.just("x.png"),
            "prompt": st.sampled_from(["p", "p", "p", "q"]),
            "seed": st.sampled_from([7, 7, 7, 7, 7, -1]),
        }
    ),
    min_size=1,
    max_size=9,
)
SCHEMA = pa.schema([("request_id", pa.string()), ("image", pa.string()), ("prompt", pa.string()), ("seed", pa.int64())])


@pytest.mark.long
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=ROWS,
    cuts=st.lists(st.integers(0, 9), max_size=2),
    outcomes=st.lists(st.sampled_from([None, "succeeded", "failed", "both"]), min_size=9, max_size=9),
    retry_failed=st.booleans(),
)
def test_a_plan_is_what_counting_row_by_row_gives(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    cuts: list[int],
    outcomes: list[str | None],
    retry_failed: bool,
) -> None:
    table = pa.Table.from_pylist(rows, SCHEMA)
    bounds = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    files = [table.slice(start, end - start) for start, end in pairwise(bounds)]
    config = write(tmp_path_factory.mktemp("plan"), *files)

    bad = {index for index, row in enumerate(rows) if row["request_id"] is None or row["seed"] < 0}
    contents: dict[str, set[Any]] = {}
    for index, row in enumerate(rows):
        contents.setdefault(row["request_id"], set()).add("bad" if index in bad else row["prompt"])
    clashing = {i for i, row in enumerate(rows) if i not in bad and len(contents[row["request_id"]]) > 1}
    valid = [index for index in range(len(rows)) if index not in bad | clashing]
    distinct = sorted({(rows[index]["request_id"], rows[index]["prompt"]) for index in valid})

    first = make_plan(config)
    key_of = {}
    for index, row in enumerate(rows):
        if index not in bad:
            made = check(table.slice(index, 1), config, first.engine_ids).requests
            key_of[row["request_id"], row["prompt"]] = made["key"][0].as_py()
    done = set()
    for content, outcome in zip(distinct, outcomes, strict=False):
        if outcome in ("failed", "both"):
            commit(config, [key_of[content]], "failed", "non_finite")
        if outcome in ("succeeded", "both"):
            commit(config, [key_of[content]], "succeeded")
        if outcome in ("succeeded", "both") or (outcome == "failed" and not retry_failed):
            done.add(content)

    plan = make_plan(config, retry=Retry() if retry_failed else None)

    pending = sorted(key_of[content] for content in distinct if content not in done)
    assert plan.num_pending == len(pending)
    assert left_for_ray(plan) == pending
    assert plan.num_duplicates == len(valid) - len(distinct)
    assert plan.num_rejected == len(bad) + len(clashing)
    assert len(plan.wanted) == plan.num_rejected + len(distinct)
    assert members(plan.wanted) == {key_of[content] for content in distinct} | set(plan.rejected["key"].to_pylist())
    kinds = Counter(plan.rejected["error_kind"].to_pylist())
    assert kinds["duplicate_id"] == len(clashing)
    times = Counter((rows[index]["request_id"], rows[index]["prompt"]) for index in valid)
    assert plan.repeats["key"].to_pylist() == [
        key_of[content] for content in times if times[content] > 1 and content not in done
    ]
    assert plan.outcomes.succeeded_keys.contains(keys_from_hex(pa.array(pending, pa.string()))).sum() == 0


def test_a_plan_counts_what_can_share_a_batch(make_config: Callable[..., RunConfig]) -> None:
    table = requests_table(6, num_frames=[8, 8, 4, 8, 8, 1025], size=[None, None, None, "auto", None, None])

    plan = make_plan(make_config(table))

    assert {tuple(group.values()) for group in plan.groups.to_pylist()} == {
        ("default", 8, "fixed", None, 64, 64, 3),
        ("default", 4, "fixed", None, 64, 64, 1),
        ("default", 8, "auto", 512, None, None, 1),
    }
    assert (plan.is_mixed, plan.models) == (True, ["default"])
    assert not make_plan(make_config()).is_mixed
    assert make_plan(make_config(requests_table(2, size=["auto"] * 2))).is_mixed


def test_the_models_of_a_plan_are_those_that_the_manifest_asks_for(make_config: Callable[..., RunConfig]) -> None:
    table = requests_table(3, model=["toon", None, "toon"])
    toon = {"base": "embedded", "scheduler": {"name": "ddim"}}

    plan = make_plan(make_config(table, models__toon=toon, models__idle=None))

    assert plan.models == ["toon", "default"]
    assert list(plan.engine_ids) == ["default", "toon", "idle"]
    assert plan.engine_ids["default"] == plan.engine_ids["idle"] != plan.engine_ids["toon"]


# --- trying again ---------------------------------------------------------------------------------------------------


@pytest.fixture
def failures(tmp_path: Path) -> tuple[RunConfig, list[str]]:
    """A config over six requests, of which two succeeded, two, one and none failed with kinds; and their keys."""
    config = write(tmp_path, requests_table(6))
    made = keys_of(make_plan(config))
    commit(config, made[:2], "succeeded")
    commit(config, made[2:4], "failed", "non_finite")
    commit(config, made[4:5], "failed", "timeout")
    commit(config, made[1:2], "failed", "timeout")  # and succeeded
    return config, made


@pytest.mark.parametrize(
    ("kinds", "pending"),
    [
        (None, [2, 3, 4, 5]),
        ({"non_finite"}, [2, 3, 5]),
        ({"timeout"}, [4, 5]),
        ({"timeout", "non_finite"}, [2, 3, 4, 5]),
        ({"worker_crash"}, [5]),
    ],
    ids=["all", "one", "another", "two", "none of them"],
)
def test_retrying_brings_back_the_kinds_that_were_asked_for(
    failures: tuple[RunConfig, list[str]], kinds: set[str] | None, pending: list[int]
) -> None:
    config, made = failures

    plan = make_plan(config, retry=Retry(None if kinds is None else frozenset(kinds)))

    assert left_for_ray(plan) == sorted(made[index] for index in pending)
    assert plan.num_pending == len(pending)


@pytest.mark.parametrize(
    ("ids", "kinds", "pending"),
    [([2, 4], None, [2, 4, 5]), ([2, 4], {"timeout"}, [4, 5]), ([0, 5], None, [5]), ([1, 3, 99], None, [3, 5])],
)
def test_retrying_brings_back_only_the_requests_of_a_table(
    failures: tuple[RunConfig, list[str]], ids: list[int], kinds: set[str] | None, pending: list[int]
) -> None:
    config, made = failures
    named = pa.array([f"r{index:03d}" for index in ids])

    plan = make_plan(config, retry=Retry(None if kinds is None else frozenset(kinds), named))

    assert left_for_ray(plan) == sorted(made[index] for index in pending)


def test_a_table_of_other_requests_is_refused(failures: tuple[RunConfig, list[str]]) -> None:
    with pytest.raises(ConfigError, match="--only: the manifest has none of the 2 requests of that table"):
        make_plan(failures[0], retry=Retry(only=pa.array(["x", "y"])))


def test_a_kind_that_does_not_exist_is_refused_with_those_that_do(failures: tuple[RunConfig, list[str]]) -> None:
    message = r"the kind non-finite; did you mean non_finite\?; .* has: non_finite \(2\), timeout \(1\)$"
    with pytest.raises(ConfigError, match=message):
        make_plan(failures[0], retry=Retry(frozenset({"non-finite", "timeout"})))


def test_a_rejected_row_is_not_retried_even_by_its_kind(tmp_path: Path) -> None:
    config = write(tmp_path, requests_table(3, seed=[1, -1, 2]))
    (table,) = make_plan(config).rejections_to_commit("first")
    Journal(Store(config.output)).append(table)
    kind = table["error_kind"][0].as_py()

    plan = make_plan(config, retry=Retry(frozenset({kind})))

    assert (plan.num_pending, plan.num_rejected) == (2, 1)
    assert len(left_for_ray(plan)) == 2


def test_what_was_taken_back_is_planned_again_also_where_it_had_failed_before(
    failures: tuple[RunConfig, list[str]],
) -> None:
    config, made = failures
    log = Journal(Store(config.output))

    log.add_tombstones(keys_from_hex(pa.array(made[:2])), log.outcomes())

    assert left_for_ray(make_plan(config)) == sorted([made[0], made[1], made[5]])


@pytest.mark.long
def test_results_are_outdated_once_an_animation_was_generated_again(finished: Callable[[pa.Table], RunConfig]) -> None:
    config = finished(requests_table(2))
    log = Journal(Store(config.output))
    (made,) = list(log.read(log.fragments()))

    log.add_tombstones(keys_from_hex(made["key"]), log.outcomes())
    assert make_plan(config).num_pending == 2
    log.append(made)

    plan = make_plan(config)
    assert (plan.num_pending, find_published_run(plan)) == (0, None)
