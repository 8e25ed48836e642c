from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from inputs import requests_table
from manifest_statistics import statistics_of
from safetensors.numpy import save_file

from pia_batch import tiny
from pia_batch.config import RunConfig
from pia_batch.manifest.validation import check
from pia_batch.planning.plan_warnings import warnings_of
from pia_batch.planning.statistics import WorkClasses
from pia_batch.planning.words import key_of, words_of

SD15 = {"manifest": "m", "output": "o", "model.base": "somebody/sd15"}


def warnings(table: pa.Table, **overrides: Any) -> list[str]:
    config = RunConfig.load(None, SD15 | {name.replace("__", "."): value for name, value in overrides.items()})
    return warnings_of(config, statistics_of(table, config=config))


def test_an_ordinary_run_gives_nothing_to_warn_of() -> None:
    assert warnings(requests_table(5)) == []
    assert warnings(requests_table(5), model__base="embedded") == []
    assert warnings(requests_table(1, seed=[7])) == []
    assert warnings(pa.concat_tables([requests_table(1)] * 2)) == []


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"seed": [7, 7, 7]}, "all 3 pending requests have the seed 7"),
        ({"width": [512, 520, 512]}, "1 requests have a side that is not a multiple of 64"),
        ({"width": [256, 512, 1024]}, "2 requests have a side outside of 384 to 768 px"),
        ({"size": ["auto"] * 3, "long_side": [1024, 512, 512]}, "1 requests have a side outside of 384 to 768 px"),
        ({"prompt": ["word " * 76, "short", "w " * 500]}, "at least 2 prompts have more than 77 tokens"),
        ({"format": ["gif"] * 3, "fps": [8, 12, 12]}, "2 GIFs have 12 fps, which GIF cannot store"),
        ({"format": ["gif"] * 3, "fps": [30.0] * 3}, "frames are shown for 30 or 40 ms"),
    ],
)
def test_a_warning_about_rows_has_their_number(columns: dict[str, Any], words: str) -> None:
    (text,) = warnings(requests_table(3, **columns))

    assert words in text


def test_requests_that_are_enlarged_are_counted_because_no_estimate_has_their_time() -> None:
    (text,) = warnings(requests_table(4, upscale=[2, 1, 4, None]), upscale__model="x.safetensors")

    assert text.startswith("2 requests are enlarged by upscale.model, whose time is not in the estimates")


def test_a_batch_of_long_clips_that_fills_the_hosts_memory_is_a_warning() -> None:
    long = requests_table(4, num_frames=[16, 1024, 1024, 1024])

    (text,) = warnings(long, placement__batch_size=4)

    assert "holds 2.3 GiB of frames in host memory" in text
    assert "placement.batch_size 4); set placement.batch_size to 2" in text
    assert warnings(long, placement__batch_size=2) == []
    assert warnings(requests_table(4, num_frames=[512] * 4), placement__batch_size=4) == []


@pytest.mark.parametrize("fps", [1, 8, 10, 12.5, 20, 25, 50, 7.5])
def test_rates_that_a_gif_holds_or_nearly_holds_are_fine(fps: float) -> None:
    assert warnings(requests_table(2, format=["gif"] * 2, fps=[fps] * 2)) == []


def test_the_embedded_model_at_another_size_is_a_warning() -> None:
    (text,) = warnings(requests_table(2, width=[64, 128]), model__base="embedded")

    assert "1 requests are not 64 x 64, the only size of the embedded model" in text


def test_a_schedule_that_pia_was_not_trained_on_is_a_warning(tmp_path: Path) -> None:
    (text,) = warnings(requests_table(1), model__scheduler__settings={"beta_schedule": "scaled_linear"})
    assert "uses beta_schedule 'scaled_linear': PIA was trained with 'linear'" in text

    shutil.copytree(tiny.PATH, tmp_path / "base")
    file = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    shipped = json.loads(file.read_text())
    usual = {"model__base": str(tmp_path / "base"), "model__scheduler__name": "checkpoint"}
    for schedule, count in (("linear", 0), ("scaled_linear", 1)):
        file.write_text(json.dumps(shipped | {"beta_schedule": schedule}))
        assert len(warnings(requests_table(1), **usual)) == count
    overridden = {"model__scheduler__settings": {"beta_schedule": "linear"}}
    assert warnings(requests_table(1), **usual, **overridden) == []


def test_a_default_that_every_row_overrides_is_a_warning_and_others_are_not() -> None:
    table = requests_table(2, fps=[8.0, 9.0], num_frames=[8, None], eta=[0.5, 0.5])

    (text,) = warnings(table, defaults__fps=12, defaults__num_frames=24)

    assert text.startswith("defaults.fps has no effect: every row has its own value in column 'fps'")


def test_the_embedded_models_own_defaults_are_nobodys_mistake() -> None:
    table = requests_table(2, width=[64, 64], fps=[9, 9])

    assert warnings(table, model__base="embedded") == []
    assert len(warnings(table, model__base="embedded", defaults__fps=10)) == 1


def test_engines_that_leave_no_cpu_to_read_with_are_a_warning_where_the_machine_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    crowd = {"placement__min_engines": 999, "placement__max_engines": 999}

    (text,) = warnings(requests_table(5), **crowd)

    assert "no CPU is left to read the manifest" in text
    assert "set placement.min_engines to" in text
    assert warnings(requests_table(5), placement__ray_address="head:6379", **crowd) == []
    assert warnings(requests_table(5), placement__num_gpus=1, **crowd) == []


@pytest.mark.parametrize(
    ("columns", "defaults", "used"),
    [
        ({}, {}, False),
        ({"prompt": ["a cat", "in EasyNegative style"]}, {}, True),
        ({"negative_prompt": [None, "easynegative, blurry"]}, {}, True),
        ({}, {"defaults__negative_prompt": "EASYNEGATIVE"}, True),
        ({"prompt": ["an easy negative", "a cat"]}, {}, False),
    ],
)
def test_a_textual_inversion_that_no_prompt_uses_is_a_warning(
    columns: dict[str, Any], defaults: dict[str, str], used: bool, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"EasyNegative": np.zeros((2, 64), np.float16)}, path)
    entry = {"source": str(path)}

    found = warnings(
        requests_table(2, **columns),
        **{"model__base": "embedded", "model__textual_inversions": [entry], **defaults},
    )

    expected = (
        "the textual inversion 'EasyNegative' of model 'default' has no effect: no prompt and no negative prompt of "
        "the manifest has this word; write it there or in defaults.negative_prompt, or remove it"
    )
    assert found == ([] if used else [expected])


def test_words_are_counted_for_each_model_and_kept_with_a_scan(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"<cat>": np.zeros((1, 64), np.float16)}, path)
    config = RunConfig.load(
        None,
        {
            "manifest": "m",
            "output": "o",
            "model.textual_inversions": [{"source": str(path)}],
            "models": {"other": {"textual_inversions": [{"source": str(path)}]}},
        },
    )
    table = requests_table(3, prompt=["a <CAT>", "<cat>", "a <cat>"], model=[None, "other", None])
    parts = [table.slice(0, 1), table.slice(1)]

    counted = statistics_of(*parts, config=config)

    assert counted.num_using == {key_of("default", "<cat>"): 2, key_of("other", "<cat>"): 1}
    checked = check(table, config, dict.fromkeys(config.all_models, "e" * 32))
    classes = WorkClasses.of(table, checked.requests, words_of(config))
    assert WorkClasses.unpacked(classes.packed()).num_using == counted.num_using
    joined = WorkClasses.joined([classes, classes], [checked.id_hashes] * 2)
    assert joined.num_using == counted.num_using + counted.num_using
