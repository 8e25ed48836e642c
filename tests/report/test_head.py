"""The head of the page: counts, figures, failures with remedies, and the config of a clip."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from reported import (
    RUN,
    failure,
    page_of,
    publish,
    result,
    visible,
)

from pia_batch.config import RunConfig
from pia_batch.report import head
from pia_batch.storage.object_store import Store


def test_the_head_counts_every_result_and_tells_only_what_the_data_has(store: Store) -> None:
    rows = [result(k) for k in range(8)]
    rows += [failure(8, "non_finite", "the latents of this request are not finite")]
    rows += [result(9, run_id="an-earlier-run", gpu_seconds=90.0)]
    seconds = sum(row["gpu_seconds"] for row in rows[:9])
    publish(store, rows)

    text = visible(page_of(store))

    assert "9 animations , 1 failure " in text
    assert f"Clips per second {8 / 28:.3g} 28.0 s in all, start-up included" in text
    assert f"GPU time {seconds:.1f} s" in text
    assert "Reused 1 from earlier runs: 1 min 30 s saved" in text
    assert "Engines busy 62% of their uptime" in text
    assert "Cost" not in text
    assert "Cost 1.25 0.5 GPU hours at 2.50, start-up and idle time included" in visible(
        page_of(store, price_per_hour=2.5)
    )


def test_a_page_without_run_json_tells_what_the_results_have(store: Store) -> None:
    publish(store, [result(0)])
    store.delete(f"_runs/{RUN}/run.json")

    text = visible(page_of(store))

    assert "1 animation , no failure" in text
    assert "Clips per second" not in text
    assert "Configuration" not in text


def test_failures_are_grouped_by_kind_with_examples_a_remedy_and_the_command(store: Store) -> None:
    rows = [failure(k, "image_unavailable", f"column 'image': {k}.png does not exist") for k in range(7)]
    rows += [failure(7, "out_of_range", "row 7: column 'motion_scale': 9", attempts=0), result(8)]
    publish(store, rows)

    text = visible(page_of(store))

    assert re.search(r"7 image_unavailable the image is missing, .* r00000 column 'image': 0.png does not exist", text)
    assert "r00004" in text
    assert "r00005" not in text  # five examples of each kind
    assert re.search(r"1 out_of_range choose a value .* row 7: column 'motion_scale': 9", text)
    assert text.index("7 image_unavailable") < text.index("1 out_of_range")
    manifest = store.uri.rsplit("/", 1)[0] + "/manifest"
    assert f"pia-batch run CONFIG --manifest {manifest} --output {store.uri} --retry-failed" in text


def test_every_remedy_is_that_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    rows = [f"| `{kind}` | {remedy} |" for kind, remedy in head.REMEDIES.items()]
    table = "\n".join(["| error kind | what to do |", "| --- | --- |", *rows, ""])
    assert table in page, f"docs/results.md wants this table:\n{table}"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.004, "0.004 s"), (0.48, "0.48 s"), (9.94, "9.9 s"), (9.96, "10.0 s"), (59.4, "59.4 s"), (59.96, "1 min 00 s"),
     (725, "12 min 05 s"), (12_000, "3 h 20 min"), (360_000_000, "100,000 h 00 min")],
)  # fmt: skip
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert head.duration(seconds).replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (12_345, "12.3 kB"), (1.5e9, "1.5 GB"), (2e18, "2e+06 TB")]
)
def test_sizes_are_for_people(num_bytes: float, text: str) -> None:
    assert head.size(num_bytes) == text


def test_the_config_of_a_clip_has_what_is_not_in_its_row(tmp_path: Path) -> None:
    settings = {
        "manifest": "m", "output": "o", "model.base": "/weights", "model.dtype": "float32", "images.fit": "contain",
        "images.allow": ["https://i.example.com/"], "encoding.mp4_crf": 20, "defaults.num_frames": 12,
        "placement.num_gpus": 1.0, "placement.max_engines": 4, "models": {"second": {"base": "/others"}},
    }  # fmt: skip
    config = RunConfig.load(None, settings)

    text = head.reproduction_config(config.model_dump(mode="json"), "s3://bucket/sets/a")

    (tmp_path / "again.yaml").write_text(text, encoding="utf-8")
    again = RunConfig.load(tmp_path / "again.yaml", {"manifest": "m", "output": "o"})
    for section in ("model", "models", "encoding"):
        assert getattr(again, section) == getattr(config, section)
    assert again.images == config.images.model_copy(update={"allow": ("https://i.example.com/", "s3://bucket")})
    assert again.placement.num_gpus == 1.0
    assert "num_frames" not in text
    assert "max_engines" not in text
    plain = RunConfig.load(None, {"manifest": "m", "output": "o"}).model_dump(mode="json")
    assert (
        head.reproduction_config(plain, "file:///d/in")
        == "model:\n  base: embedded\nimages:\n  allow:\n  - file:///d/in\n"
    )
    assert head.reproduction_config({}, "") == "{}\n"
