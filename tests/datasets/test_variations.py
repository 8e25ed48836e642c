"""Variations: the product of settings' values, ids that say so, and values that are checked as a run would."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pia_batch.datasets import variations
from pia_batch.datasets.variations import MAX_VARIATIONS, Variations
from pia_batch.errors import ConfigError


def test_every_row_becomes_the_product_with_ids_that_say_so() -> None:
    table = pa.table({"request_id": ["cat-1", "cat-2"], "prompt": ["a", "b"], "seed": [9, 9]})
    varied = Variations.parse(["seed=1,2", "motion_scale=0,1"]).apply(table)
    assert varied["request_id"].to_pylist()[:4] == [
        "cat-1#seed=1,motion_scale=0",
        "cat-1#seed=1,motion_scale=1",
        "cat-1#seed=2,motion_scale=0",
        "cat-1#seed=2,motion_scale=1",
    ]
    assert varied["base_id"].to_pylist() == ["cat-1"] * 4 + ["cat-2"] * 4
    assert varied["seed"].to_pylist() == [1, 1, 2, 2] * 2
    assert varied["motion_scale"].to_pylist() == [0, 1] * 4
    assert varied["prompt"].to_pylist() == ["a"] * 4 + ["b"] * 4
    assert varied.schema.field("seed").type == pa.int64()


def test_values_of_all_types_are_read() -> None:
    found = Variations.parse(["guidance_scale=1,7.5", "loop=true,false", "format=gif,mp4", "style=false"])
    assert found.values == {
        "guidance_scale": (1.0, 7.5),
        "loop": (True, False),
        "format": ("gif", "mp4"),
        "style": (False,),
    }
    assert found.count == 8
    table = found.apply(pa.table({"request_id": ["a"]}))
    assert table["request_id"][0].as_py() == "a#guidance_scale=1,loop=true,format=gif,style=false"


def test_no_variation_changes_nothing() -> None:
    table = pa.table({"request_id": ["a"]})
    assert Variations.parse([]).apply(table) is table


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["sead=1"], ["--vary sead", "did you mean 'seed'"]),
        (["seed"], ["expected NAME=VALUE"]),
        (["seed=1", "seed=2"], ["given twice"]),
        (["seed=1,1"], ["a value is given twice"]),
        (["seed=-1"], ["--vary seed=-1", "greater than or equal to 0"]),
        (["seed=x"], ["--vary seed=x"]),
        (["motion_scale=9"], ["--vary motion_scale=9", "8"]),
        (["format=avi"], ["--vary format=avi", "'mp4'"]),
        (["motion_curve=1"], ["a list cannot vary", "--column motion_curve=COLUMN"]),
    ],
)
def test_an_error_names_the_option_and_the_remedy(options: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        Variations.parse(options)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_the_number_of_variations_is_limited() -> None:
    seeds = "seed=" + ",".join(map(str, range(MAX_VARIATIONS // 2)))
    assert Variations.parse([seeds, "loop=true,false"]).count == variations.MAX_VARIATIONS
    with pytest.raises(ConfigError, match=f"{MAX_VARIATIONS + 2} variations"):
        Variations.parse([seeds + f",{MAX_VARIATIONS}", "loop=true,false"])
