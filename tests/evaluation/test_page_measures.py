"""Measures for the page of a run: which evaluation it shows, and rows that belong together."""

from __future__ import annotations

import pyarrow as pa
import pytest
from evaluated import publish_evaluation, publish_output, shifted

from pia_batch import cli, report
from pia_batch.errors import ConfigError
from pia_batch.evaluation.measures import MEASURES
from pia_batch.evaluation.page_measures import measured
from pia_batch.report.results import COLUMNS
from pia_batch.storage.object_store import Store


@pytest.fixture
def evaluated(store: Store) -> Store:
    """Two runs of the same three requests, each with an evaluation."""
    for run, first in (("run-1", 0.5), ("run-2", 0.7)):
        publish_output(store, {each: shifted(2, 16) for each in ("a", "b", "c")}, run_id=run)
        publish_evaluation(store, {"flicker": [first, None, 0.9]}, f"of-{run}", run)
    return store


def test_the_newest_evaluation_of_the_run_is_shown(evaluated: Store) -> None:
    for given, found in (
        ({}, ("of-run-2", "run-2")),
        ({"run_id": "run-1"}, ("of-run-1", "run-1")),
        ({"evaluation_id": "of-run-1"}, ("of-run-1", "run-1")),
    ):
        shown = measured(evaluated, **given)
        assert shown is not None
        assert (shown.evaluation_id, shown.run_id) == found
        assert [each.name for each in shown.measures] == ["flicker"]  # the others have no value
    assert measured(evaluated, run_id="run-3") is None


def test_an_evaluation_that_does_not_fit_is_refused(evaluated: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"of-run-1 measures another run \(got run-2, expected run-1\)"):
        measured(evaluated, "of-run-1", "run-2")
    for arguments, message in (
        (["--evaluation", "of-run-9"], "of-run-9 is not complete in"),
        (["--evaluation", "of-run-1", "--live"], "--live, --evaluation: mutually exclusive"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["report", evaluated.uri, *arguments])
        assert message in " ".join(capsys.readouterr().err.split())


def test_a_page_shows_the_run_of_its_evaluation(evaluated: Store) -> None:
    shown = measured(evaluated, "of-run-1")
    assert report.write(evaluated, options=report.ReportOptions(measured=shown)).run_id == "run-1"


def test_rows_get_their_own_measures_in_any_order(evaluated: Store) -> None:
    shown = measured(evaluated, "of-run-1")
    assert shown is not None
    part = "results/run-1/part-00000.parquet"
    theirs = shown.read(part).select(["request_id", "key"])
    rows = theirs.take(pa.array([2, 0]))
    rows = pa.concat_tables([rows, pa.table({"request_id": ["new", "b"], "key": ["0" * 32, "1" * 32]})])

    assert shown.joined(rows, part)["flicker"].to_pylist() == [0.9, 0.5, None, None]


def test_no_measure_has_the_name_of_a_column_of_the_page() -> None:
    assert not {measure.name for measure in MEASURES} & set(COLUMNS.names)
