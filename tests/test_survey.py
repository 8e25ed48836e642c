from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from conftest import requests_table
from hypothesis import given, settings
from hypothesis import strategies as st

from pia_batch import sd15
from pia_batch.config import RunConfig
from pia_batch.survey import MAX_TOKENS, Survey, least_tokens, work_of
from pia_batch.validation import check

CONFIG = RunConfig.load(None, {"manifest": "m", "output": "o"})


def pending(count: int = 4, **columns: Any) -> pa.Table:
    checked = check(requests_table(count, **columns), CONFIG, {"default": "e" * 32})
    assert not len(checked.rejected)
    return checked.requests


def surveyed(*batches: pa.Table) -> Survey:
    survey = Survey()
    for rows in batches:
        survey(rows, check(rows, CONFIG, {"default": "e" * 32}).requests)
    return survey


def test_requests_that_cost_alike_are_counted_together_over_all_batches() -> None:
    table = requests_table(6, num_inference_steps=[9, 9, 4, 9, 4, 9], size=[None] * 5 + ["auto"])

    survey = surveyed(*(table.slice(k, 1) for k in range(6)))

    assert [(row["steps"], row["width"], row["long_side"], row["num_rows"]) for row in survey.work.to_pylist()] == [
        (9, 64, None, 3),
        (4, 64, None, 2),
        (9, None, 512, 1),
    ]
    assert (survey.num_rows, survey.num_pending, survey.num_given["num_inference_steps"]) == (6, 6, 6)
    assert survey.num_given["size"] == 1
    assert survey.num_given["fps"] == 0


def test_counts_stay_small_over_many_batches() -> None:
    rows = pending(70, num_inference_steps=[1 + k % 3 for k in range(70)])
    survey = Survey()
    for k in range(70):
        survey(rows.slice(k, 1), rows.slice(k, 1))

    assert sum(survey.work["num_rows"].to_pylist()) == 70
    assert len(survey._held) < 64


@pytest.mark.parametrize(
    ("columns", "steps"),
    [
        ({"num_inference_steps": [25]}, 25),
        ({"num_inference_steps": [25], "strength": [0.5]}, 12),
        ({"num_inference_steps": [20], "free_init_iters": [3]}, 60),
        ({"num_inference_steps": [20], "free_init_iters": [3], "free_init_fast": [True]}, 40),
        ({"num_inference_steps": [20], "free_init_iters": [0], "free_init_fast": [True]}, 20),
    ],
)
def test_what_is_drawn_is_counted_with_strength_and_passes(columns: dict[str, Any], steps: float) -> None:
    (work,) = work_of(pending(1, **columns)).to_pylist()

    assert work["steps"] == steps


def test_guidance_of_one_and_below_is_none() -> None:
    work = work_of(pending(3, guidance_scale=[0.0, 1.0, 1.1]))

    assert work["guided"].to_pylist() == [False, False, True]


def test_one_seed_for_all_is_seen_and_two_are_not() -> None:
    assert surveyed(requests_table(3, seed=[7, 7, 7]), requests_table(1, seed=[7])).only_seed == 7
    assert surveyed(requests_table(2, seed=[7, 7]), requests_table(1, seed=[8])).only_seed is None
    assert surveyed(requests_table(2)).only_seed is None
    assert Survey().only_seed is None


def test_gifs_are_counted_by_their_rate() -> None:
    survey = surveyed(requests_table(4, fps=[8.0, 12.0, 12.0, 12.0], format=["gif", "gif", "gif", "mp4"]))

    assert survey.gif_fps == {8.0: 1, 12.0: 2}


def test_prompts_of_certainly_too_many_tokens_are_counted() -> None:
    survey = surveyed(requests_table(3, prompt=["a " * (MAX_TOKENS - 2), "a " * (MAX_TOKENS - 1), "1" * MAX_TOKENS]))

    assert survey.num_truncated == 2


def test_the_bound_of_tokens_never_exceeds_what_the_tokenizer_of_the_model_counts() -> None:
    from transformers import CLIPTokenizer  # noqa: PLC0415 - takes a second

    tokenizer = CLIPTokenizer.from_pretrained(sd15.PATH / "tokenizer")

    @settings(max_examples=150, deadline=None)
    @given(st.text(max_size=60) | st.text(alphabet="aB1'sSltTvVe.,!? -é中🐱\n\x85\u0301\u3000\u200b½²ﬀẞ", max_size=60))
    def holds(text: str) -> None:
        assert least_tokens(pa.array([text]))[0].as_py() <= len(tokenizer(text)["input_ids"])

    holds()
    exact = "a photograph of a cat, 35mm, it's 4 o'clock"
    assert least_tokens(pa.array([exact]))[0].as_py() == len(tokenizer(exact)["input_ids"])
