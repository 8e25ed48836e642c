"""Tasks of several blocks, on a real Ray: fewer of them, with the same batches, and none lost."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
import ray.data

from pia_batch.pipeline import batching, larger_tasks
from pia_batch.pipeline.larger_tasks import Load

ROWS, BATCH = 160, 2


@pytest.mark.parametrize(
    ("speed", "left", "engines", "most", "rows"),
    [
        (0.0, 10_000, 8, 64, 0),  # nothing has ended yet
        (1.6, 10_000, 8, 64, 1),  # eight GPUs of five seconds a row: one batch at a time, as rows are fewer than it has
        (256.0, 10_000, 64, 64, 39),
        (256.0, 2_560, 64, 64, 10),  # a fourth of what is left for each
        (256.0, 255, 64, 64, 0),
        (9_999.0, 1_000_000, 64, 40, 40),
        (10.0, 100, 0, 64, 2),  # every engine has died
    ],
)
def test_a_task_has_more_requests_the_more_are_processed_and_the_more_are_left(
    speed: float, left: int, engines: int, most: int, rows: int
) -> None:
    assert batching.rows_at_once(speed, left, engines, most) == rows


class Note:
    """Actor that notes with how many others a row came."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Return the rows with the size of their batch."""
        return batch.append_column("batch", [[len(batch)] * len(batch)])


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("load", [None, Load(ROWS, 16)])
def test_fast_engines_are_given_several_batches_at_a_time_and_few_at_the_end(load: Load | None) -> None:
    pool: Any = ray.data.ActorPoolStrategy(size=2, max_tasks_in_flight_per_actor=3)
    requests = ray.data.from_arrow([pa.table({"id": [row, row + 1]}) for row in range(0, ROWS, BATCH)])
    noted = requests.map_batches(Note, batch_size=BATCH, batch_format="pyarrow", num_cpus=0.1, compute=pool)
    if load is not None:
        larger_tasks.allow(noted, load)

    tasks = list(noted.iter_batches(batch_size=None, batch_format="pyarrow"))  # a task returns a block

    rows = pa.concat_tables(tasks)
    assert sorted(rows["id"].to_pylist()) == list(range(ROWS))
    assert set(rows["batch"].to_pylist()) == {BATCH}
    sizes = [len(task) for task in tasks]
    assert sizes[-4:] == [BATCH] * 4
    if load is None:
        assert max(sizes) == BATCH
    else:
        assert BATCH < max(sizes) <= load.max_rows
