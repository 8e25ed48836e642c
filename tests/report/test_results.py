"""Results on the page: read part by part, all counted, a fair sample shown."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
from reported import (
    RUN,
    data_in,
    failure,
    page_of,
    publish,
    result,
    values_of,
    visible,
)

from pia_batch.journal import layout, log
from pia_batch.storage.object_store import Store


def test_parts_are_read_one_by_one_and_older_ones_may_lack_columns(store: Store) -> None:
    publish(store, [result(k) for k in range(25)], part_rows=10)
    name = f"{layout.RESULTS}{RUN}/part-00001.parquet"
    part = pq.read_table(pa.BufferReader(store.read(name)))
    store.replace(name, log.to_parquet(part.drop_columns(["eta", "motion"])))

    data = data_in(page_of(store))

    assert values_of(data, "request_id") == [f"r{k:05d}" for k in range(25)]
    assert [value is None for value in values_of(data, "motion")] == [10 <= k < 20 for k in range(25)]


def test_a_large_run_is_shown_by_all_its_failures_and_a_fair_sample(store: Store) -> None:
    rows = [result(k) if k % 10 else failure(k, "non_finite", "not finite") for k in range(300)]
    data = data_in(html := page_of(publish(store, rows, part_rows=37), max_results=100))

    statuses = Counter(values_of(data, "status"))
    assert statuses == {"succeeded": 70, "failed": 30}
    assert data["weights"] == {"succeeded": 270 / 70, "failed": 1.0}
    chosen = {
        key
        for key, status in zip(values_of(data, "key"), values_of(data, "status"), strict=True)
        if status == "succeeded"
    }
    assert chosen == set(sorted(row["key"] for row in rows if row["status"] == "succeeded")[:70])
    assert "270 animations , 30 failures" in visible(html)
    assert "This page has 100 of 300 results" in visible(html)


def test_failures_leave_half_of_the_page_to_animations(store: Store) -> None:
    rows = [result(k) if k % 10 == 0 else failure(k, "non_finite", "not finite") for k in range(300)]
    assert Counter(values_of(data_in(page_of(publish(store, rows), max_results=40)), "status")) == {
        "succeeded": 20,
        "failed": 20,
    }
