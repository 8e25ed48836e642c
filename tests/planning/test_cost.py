from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from inputs import requests_table
from manifest_statistics import statistics_of

from pia_batch.config import RunConfig
from pia_batch.journal.log import Journal
from pia_batch.planning.cost import estimate_bytes, estimate_costs, estimate_finishing, measure_finished
from pia_batch.planning.statistics import Statistics
from pia_batch.schema.columns import results_table
from pia_batch.storage.object_store import Store

SD15 = {"manifest": "m", "output": "o", "model.base": "somebody/sd15", "placement.num_gpus": 1}
ENGINE = "e" * 32


def statistics_with(table: pa.Table, **overrides: Any) -> tuple[Statistics, RunConfig]:
    config = RunConfig.load(None, SD15 | {name.replace("__", "."): value for name, value in overrides.items()})
    return statistics_of(table, config=config), config


def hours(table: pa.Table, num_requests: int | None = None, **overrides: Any) -> dict[str, tuple[float, float]]:
    statistics, config = statistics_with(table, **overrides)
    return {cost.device: cost.hours for cost in estimate_costs(statistics, num_requests or len(table), config, None)}


def test_the_reference_clip_is_925_tflop_and_takes_an_h100_three_seconds() -> None:
    low, high = (hour * 3600 for hour in hours(requests_table(1))["H100"])

    assert low * 314 == pytest.approx(925, rel=0.001)
    assert 2.9 < low < high < 3.6


@pytest.mark.parametrize(
    ("columns", "factor"),
    [
        ({"num_frames": [32]}, 2.0),
        ({"num_inference_steps": [50]}, 1.955),
        ({"guidance_scale": [1.0]}, 0.522),
        ({"free_init_iters": [3]}, 2.91),
        ({"strength": [0.5]}, 0.503),
        ({"width": [1024], "height": [1024]}, 5.27),
    ],
)
def test_hours_follow_the_work(columns: dict[str, Any], factor: float) -> None:
    usual, changed = (hours(table)["A100"][0] for table in (requests_table(1), requests_table(1, **columns)))

    assert changed / usual == pytest.approx(factor, rel=0.01)


def test_heun_asks_the_network_twice_a_step() -> None:
    usual, heun = (hours(requests_table(1), model__scheduler__name=name)["H100"][0] for name in ("ddim", "heun"))

    assert heun / usual == pytest.approx(1.955, rel=0.01)


@pytest.mark.parametrize(("speed", "times"), [("balanced", 1.58), ("fast", 2.74)])
def test_a_preset_of_speed_leaves_work_out_of_the_network_and_none_out_of_the_vae(speed: str, times: float) -> None:
    exact, lossy = (hours(requests_table(1), model__speed=name)["H100"][0] for name in ("exact", speed))

    assert exact / lossy == pytest.approx(times, rel=0.01)


def test_copies_and_what_the_budget_leaves_out_cost_nothing() -> None:
    assert hours(requests_table(8), 2)["H100"][0] == pytest.approx(2 * hours(requests_table(1))["H100"][0])


def test_every_device_names_its_source_and_that_it_is_an_estimate() -> None:
    statistics, config = statistics_with(requests_table(2))

    costs = estimate_costs(statistics, 2, config, None)

    assert {cost.device for cost in costs} == {"H100", "H200", "A100", "RTX 4090"}
    assert all(cost.source.startswith("estimate: ") for cost in costs)
    assert all(cost.hours[0] < cost.hours[1] for cost in costs)


def test_nothing_is_guessed_of_the_embedded_model_nor_of_nothing() -> None:
    statistics, config = statistics_with(requests_table(2), model__base="embedded")
    assert estimate_costs(statistics, 2, config, None) == []

    assert estimate_costs(Statistics(), 0, config, None) == []
    assert estimate_bytes(Statistics(), 0, None) == (0, 0)


def finished(store: Store, **columns: Any) -> Journal:
    usual: dict[str, Any] = {
        "key": "a" * 32,
        "status": "succeeded",
        "engine_id": ENGINE,
        "device": "cuda:0",
        "gpu_seconds": 4.0,
        "num_bytes": 419_430,
        "format": "mp4",
        "size": "fixed",
        "width": 512,
        "height": 512,
        "num_frames": 16,
        "num_inference_steps": 25,
        "strength": 1.0,
        "guidance_scale": 7.5,
        "free_init_iters": 0,
    }
    journal = Journal(store)
    row = {name: pa.scalar(value) for name, value in (usual | columns).items()}
    journal.append(results_table(row, pa.table({}), 1))
    return journal


def test_what_finished_clips_took_comes_before_every_guess(store: Store) -> None:
    statistics, config = statistics_with(requests_table(10))
    journal = finished(store)
    finished(store, key="b" * 32, status="failed")
    finished(store, key="c" * 32, engine_id="d" * 32, gpu_seconds=99.0)

    found = measure_finished(journal, journal.fragments(), config, {"default": ENGINE})

    assert found is not None
    assert (found.num_clips, found.device) == (1, "cuda:0")
    first = estimate_costs(statistics, 10, config, found)[0]
    assert first.device == "cuda:0"
    assert first.hours == pytest.approx((40 / 3600, 40 / 3600))
    assert first.source.startswith("measured: 1 finished")
    assert estimate_bytes(statistics, 10, found) == pytest.approx((4_194_300, 4_194_300), abs=1)


def test_finishing_costs_time_of_a_core_and_none_of_the_device() -> None:
    def core_seconds(**columns: Any) -> float:
        statistics, _ = statistics_with(requests_table(2, **columns))
        return 3600 * estimate_finishing(statistics, 1)

    pixels = 16 * 512 * 512 / 1e9
    assert core_seconds() == estimate_finishing(Statistics(), 0) == 0
    assert core_seconds(color_match=[True, True]) == pytest.approx(80 * pixels)
    assert core_seconds(sharpen=[0.5, 0.5]) == pytest.approx(40 * pixels)
    assert core_seconds(interpolate=[4, 4]) == pytest.approx(3 * 230 * pixels)
    assert core_seconds(interpolate=[2, 1], color_match=[False, True]) == pytest.approx((230 + 80) / 2 * pixels)
    assert hours(requests_table(1, interpolate=[4], sharpen=[1.0])) == hours(requests_table(1))


def test_what_was_interpolated_is_measured_by_the_frames_that_were_generated(store: Store) -> None:
    """The results have the frames of the file: (16 - 1) x 4 + 1, and 16 x 4 of a loop."""
    statistics, config = statistics_with(requests_table(1))
    journal = finished(store, num_frames=61, interpolate=4, num_bytes=61 * 512 * 512 // 10)
    finished(store, key="b" * 32, num_frames=64, interpolate=4, num_bytes=64 * 512 * 512 // 10)

    found = measure_finished(journal, journal.fragments(), config, {"default": ENGINE})

    assert found is not None
    assert estimate_costs(statistics, 1, config, found)[0].hours == pytest.approx((4 / 3600, 4 / 3600))
    assert found.bytes_per_pixel == pytest.approx({"mp4": 0.1}, rel=1e-4)


def test_a_large_journal_is_sampled(store: Store) -> None:
    _, config = statistics_with(requests_table(1))
    for number in range(40):
        journal = finished(store, key=f"{number:032x}", gpu_seconds=4.0)

    found = measure_finished(journal, journal.fragments(), config, {"default": ENGINE})

    assert found is not None
    assert 10 <= found.num_clips <= 16


def test_an_output_without_clips_of_these_engines_has_no_measurement(store: Store) -> None:
    _, config = statistics_with(requests_table(1))
    journal = finished(store, engine_id="d" * 32)

    assert measure_finished(journal, journal.fragments(), config, {"default": ENGINE}) is None
    assert measure_finished(journal, [], config, {"default": ENGINE}) is None


def test_bytes_follow_format_frames_and_size() -> None:
    def low(**columns: Any) -> int:
        statistics, _ = statistics_with(requests_table(1, **columns))
        return estimate_bytes(statistics, 1, None)[0]

    assert low() == int(16 * 512 * 512 * 0.03)
    assert low(format=["gif"]) == int(16 * 512 * 512 * 0.33)
    assert low(num_frames=[8]) == pytest.approx(low() / 2, abs=1)
    assert low(interpolate=[3]) == pytest.approx(3 * low(), abs=1)
    assert low(size=["auto"], long_side=[1024]) == pytest.approx(4 * low(), abs=4)
