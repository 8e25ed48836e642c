"""A scan by several processes finds what one in threads does, and a process that dies is not the end of the driver."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inputs import requests_table
from manifest_statistics import counts_of
from plans import commit, content_of, keys_of

from pia_batch.config import RunConfig
from pia_batch.errors import InterruptedRunError, ManifestError
from pia_batch.manifest.pieces import Piece
from pia_batch.manifest.reader import Manifest
from pia_batch.planning import scan_pool
from pia_batch.planning.plan import make_plan
from pia_batch.planning.scan_validate import ScanTask
from pia_batch.planning.statistics import Statistics
from pia_batch.schema.columns import REQUEST


@pytest.fixture
def in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_pool, "MIN_ROWS", 0)
    monkeypatch.setattr(scan_pool, "PROCESSES", 2)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig.load(None, {"manifest": str(tmp_path / "manifest"), "output": str(tmp_path / "out")})


def write(config: RunConfig, *tables: pa.Table) -> None:
    folder = Path(config.manifest)
    folder.mkdir()
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=2)


def requests(start: int, count: int, **columns: list[object]) -> pa.Table:
    return requests_table(count, request_id=[f"r{number}" for number in range(start, start + count)], **columns)


def pieces_of(config: RunConfig) -> tuple[ScanTask, list[Piece]]:
    found = Manifest.open(config.manifest)
    schema = pa.schema([item for item in found.schema if item.name in REQUEST.names])
    return ScanTask(schema, config, {"default": "e" * 32}), list(found.pieces())


def test_processes_find_what_threads_find(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pia_batch.manifest.pieces.BATCH_ROWS", 2)  # several pieces a file
    write(
        config,
        requests(0, 7, seed=[1, -1, 3, None, 5, 6, 7]),
        requests(100, 0),
        requests(6, 5, prompt=["", "a", "b", "c", "d"], fps=[8, 12, 8, 12, None]),
        requests(8, 3, prompt=["b", "another", "d"], fps=[8, 12, None]),
    )
    commit(config, keys_of(make_plan(config))[:3], "succeeded")
    in_threads = Statistics()
    truth = content_of(make_plan(config, statistics=in_threads))
    monkeypatch.setattr(scan_pool, "MIN_ROWS", 0)
    monkeypatch.setattr(scan_pool, "PROCESSES", 2)

    in_processes = Statistics()

    assert content_of(make_plan(config, statistics=in_processes)) == truth
    assert counts_of(in_processes) == counts_of(in_threads)


def test_an_error_of_a_file_is_the_same_as_without_processes(config: RunConfig, in_processes: None) -> None:
    del in_processes
    write(config, requests(0, 500, prompt=[f"{row} of {'many ' * 9}" for row in range(500)]), requests(500, 4))
    task, pieces = pieces_of(config)
    path = Path(config.manifest) / "0.parquet"
    whole = path.read_bytes()
    changed = path.stat()
    path.write_bytes(whole[:2000] + bytes(500) + whole[2500:])
    os.utime(path, ns=(changed.st_mtime_ns, changed.st_mtime_ns))

    with pytest.raises(ManifestError, match=r"0\.parquet"):
        list(scan_pool.validate_in_processes(task, pieces))

    path.write_bytes(whole + b" ")
    with pytest.raises(InterruptedRunError, match="was replaced or removed"):
        list(scan_pool.validate_in_processes(task, pieces))


@dataclass(frozen=True)
class Deadly(Piece):
    """Ends the process that reads it, as a C++ exception or the kernel would."""

    def tables(self, schema: pa.Schema) -> Iterator[pa.Table]:
        del schema
        os.kill(os.getpid(), signal.SIGKILL)
        yield from ()


@dataclass(frozen=True)
class Buggy(Piece):
    """Meets a bug in the process that reads it."""

    def tables(self, schema: pa.Schema) -> Iterator[pa.Table]:
        msg = f"{len(schema)} columns"
        raise ZeroDivisionError(msg)


def test_a_process_that_dies_names_the_file_that_it_read(config: RunConfig, in_processes: None) -> None:
    del in_processes
    write(config, requests(0, 4), requests(10, 4))
    task, (first, second) = pieces_of(config)

    results = scan_pool.validate_in_processes(task, [first, Deadly(**vars(second))])

    with pytest.raises(ManifestError, match=r"1\.parquet ended with signal 9: it ran out of memory"):
        list(results)  # the result of the first piece comes first or not, as the processes start


def test_a_bug_stays_a_bug(config: RunConfig, in_processes: None) -> None:
    del in_processes
    write(config, requests(0, 4))
    task, (piece,) = pieces_of(config)

    with pytest.raises(ZeroDivisionError, match="columns"):
        list(scan_pool.validate_in_processes(task, [Buggy(**vars(piece))]))


def test_what_lies_in_the_folder_that_one_works_in_is_not_run(
    config: RunConfig, in_processes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del in_processes
    write(config, requests(0, 4))
    (tmp_path / "numpy.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)

    assert make_plan(config).num_pending == 4


def test_no_process_is_left_behind_where_the_rest_is_not_consumed(config: RunConfig, in_processes: None) -> None:
    del in_processes
    write(config, requests(0, 4), requests(10, 4), requests(20, 4))
    task, pieces = pieces_of(config)
    before = set(psutil.Process().children())

    results = scan_pool.validate_in_processes(task, pieces)
    next(results)
    started = set(psutil.Process().children()) - before
    results.close()

    assert len(started) == 2
    assert not any(process.is_running() for process in started)


def test_lines_of_json_are_read_once_and_by_the_driver(
    config: RunConfig, in_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    del in_processes
    folder = Path(config.manifest)
    folder.mkdir()
    (folder / "0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in requests(0, 3).to_pylist()))
    monkeypatch.setattr(sys, "executable", "/nowhere/python")

    assert make_plan(config).num_pending == 3
