"""The layout of an output: each name is recognized as what it is, and as nothing else."""

from collections.abc import Callable

import pytest

from pia_batch.journal import layout

KEY = "ab" * 16
NAMES = {
    layout.animation_name(KEY, "gif"): (layout.animation_key, KEY),
    layout.results_part("run-1", 0): (layout.results_run_id, "run-1"),
    layout.success_marker("run-1"): (layout.results_run_id, "run-1"),
    layout.evaluation_part("e-1", 0): (layout.evaluation_id, "e-1"),
    layout.evaluation_success("e-1"): (layout.evaluation_id, "e-1"),
    layout.fragment_name(KEY): (layout.is_fragment, True),
    layout.scan_cache_folder(KEY) + f"{KEY}.parquet": (layout.scan_cache_identity, KEY),
    layout.run_record_name("run-1"): (layout.is_run_record, True),
    layout.lease_name(7): (layout.lease_generation, 7),
}
READERS = [
    layout.animation_key,
    layout.results_run_id,
    layout.evaluation_id,
    layout.is_fragment,
    layout.scan_cache_identity,
    layout.is_run_record,
    layout.lease_generation,
]
FOREIGN = [
    layout.LATEST_RESULTS,
    layout.FRAGMENT_INDEX + f"{KEY}.parquet",
    layout.CREATE_ONLY_PROBE,
    layout.tombstone_name(KEY),
    layout.report_name("run-1"),
    layout.DOCTOR_PROBE,
    f"animations/cd/{KEY}.gif",
    "_lease/7.json",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_recognized_by_its_own_function_and_by_no_other(name: str) -> None:
    own, found = NAMES[name]

    assert own(name) == found
    assert not any(reader(name) for reader in READERS if reader is not own)


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_another_name_is_recognized_by_none(name: str, reader: Callable[[str], object]) -> None:
    assert not reader(name)


def test_every_name_is_under_one_prefix() -> None:
    for name in [*NAMES, *FOREIGN]:
        assert sum(name.startswith(prefix) for prefix in layout.PREFIXES) == 1, name


def test_the_paths_of_stored_outputs_stay_as_they_are() -> None:
    assert [*NAMES, layout.tombstone_name(KEY), layout.LATEST_RESULTS, layout.report_name("run-1")] == [
        f"animations/ab/{KEY}.gif",
        "results/run-1/part-00000.parquet",
        "results/run-1/_SUCCESS.json",
        "evaluations/e-1/part-00000.parquet",
        "evaluations/e-1/_SUCCESS.json",
        f"_journal/{KEY}.parquet",
        f"_scans/{KEY}/{KEY}.parquet",
        "_runs/run-1/run.json",
        "_lease/000000000007.json",
        f"_withdrawn/{KEY}.parquet",
        "results/LATEST.json",
        "_runs/run-1/report.html",
    ]


def test_a_piece_of_an_evaluation_is_recognized_by_its_number() -> None:
    piece = layout.evaluation_piece("e-1", 12)

    assert piece == "evaluations/e-1/_pieces/00000012.parquet"
    assert (layout.evaluation_piece_number(piece), layout.evaluation_id(piece)) == (12, "e-1")
    assert layout.evaluation_piece_number(layout.evaluation_part("e-1", 12)) is None
