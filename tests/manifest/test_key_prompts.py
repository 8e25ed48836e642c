"""Columns of key prompts: every form is read alike, every mistake is named, and the key is that of the sorted pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pia_batch.config import RunConfig
from pia_batch.manifest.reader import Manifest
from pia_batch.manifest.validation import Checked, check
from pia_batch.planning.words import count_words
from pia_batch.planning.words import key_of as word_key
from pia_batch.schema.key_prompts import KEY_PROMPTS_TYPE
from pia_batch.schema.settings import MAX_PROMPT_BYTES

KEYS = [{"frame": 0, "prompt": "a red circle"}, {"frame": 8, "prompt": 'a blue, "big" square'}]
MAPPING = {"0": "a red circle", "8": 'a blue, "big" square'}


def checked(prompts: Any, column: str = "prompts", config: dict[str, Any] | None = None, **columns: Any) -> Checked:
    run = RunConfig.load(None, {"manifest": "m", "output": "o", "defaults.num_frames": 16} | (config or {}))
    array = prompts if isinstance(prompts, pa.Array) else pa.array(prompts)
    given = {"request_id": [f"r{k}" for k in range(len(array))], "image": ["a.png"] * len(array)}
    if column != "prompts":
        given["prompt"] = ["text"] * len(array)
    return check(pa.table(given | {column: array} | columns), run, {"default": "e" * 32})


def key_of(prompts: Any, **columns: Any) -> str:
    found = checked(prompts, **columns)
    assert not len(found.rejected), found.rejected["error"].to_pylist()
    return str(found.requests["key"][0])


@pytest.mark.parametrize(
    "column",
    [
        pa.array([KEYS], KEY_PROMPTS_TYPE),
        pa.array([[{"prompt": each["prompt"], "frame": float(each["frame"])} for each in KEYS]]),
        pa.array([KEYS], pa.large_list(pa.struct([("frame", pa.uint64()), ("prompt", pa.large_string())]))),
        pa.array([KEYS], pa.list_(KEY_PROMPTS_TYPE.value_type, 2)),
        pa.array([[(8, KEYS[1]["prompt"]), (0, "a red circle")]], pa.map_(pa.int64(), pa.string())),
        pa.array([list(MAPPING.items())], pa.map_(pa.string(), pa.large_string())),
        pa.array([MAPPING | {"4": None}], pa.struct([("0", pa.string()), ("4", pa.string()), ("8", pa.string())])),
        pa.array([json.dumps(KEYS)]),
        pa.array([json.dumps(dict(reversed(MAPPING.items())))], pa.large_string()),
        pa.array([json.dumps([[each["frame"], each["prompt"]] for each in KEYS])]),
        pa.array([json.dumps(KEYS)]).dictionary_encode(),
    ],
    ids=lambda column: str(column.type)[:40],
)
def test_every_form_is_the_same_request(column: pa.Array) -> None:
    found = checked(column)

    assert found.requests["prompts"].type == KEY_PROMPTS_TYPE
    assert found.requests["prompts"].to_pylist() == [KEYS]
    assert found.requests["prompt"].to_pylist() == [None]
    assert str(found.requests["key"][0]) == key_of([KEYS])


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
def test_every_file_keeps_the_frames_of_each_row_apart(tmp_path: Path, suffix: str) -> None:
    rows: list[dict[str, Any]] = [
        {"request_id": "a", "image": "a.png", "prompt": None, "prompts": MAPPING},
        {"request_id": "b", "image": "a.png", "prompt": None, "prompts": {"0": "x", "3": "y"}},
        {"request_id": "c", "image": "a.png", "prompt": "plain", "prompts": None},
        {"request_id": "d", "image": "a.png", "prompt": None, "prompts": KEYS},
    ]
    path = tmp_path / f"requests.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        texts = [None if row["prompts"] is None else json.dumps(row["prompts"]) for row in rows]
        table = pa.Table.from_pylist([row | {"prompts": text} for row, text in zip(rows, texts, strict=True)])
        if suffix == "parquet":
            pq.write_table(table, path)
        else:
            pa.csv.write_csv(table, path)

    (batch,) = Manifest.open(str(path)).batches()
    run = RunConfig.load(None, {"manifest": "m", "output": "o", "defaults.num_frames": 16})
    found = check(batch.table, run, {"default": "e" * 32})

    assert not len(found.rejected), found.rejected["error"].to_pylist()
    own = [KEYS, [{"frame": 0, "prompt": "x"}, {"frame": 3, "prompt": "y"}], None, KEYS]
    assert found.requests["prompts"].to_pylist() == own
    assert found.requests["prompt"].to_pylist() == [None, None, "plain", None]


def test_a_frame_that_a_line_of_json_has_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"request_id": "a", "image": "a.png", "prompts": {"0": "x", "0": "y"}}\n')
    (batch,) = Manifest.open(str(path)).batches()

    found = check(batch.table, RunConfig.load(None, {"manifest": "m", "output": "o"}), {"default": "e" * 32})

    assert "one text for each frame" in found.rejected["error"][0].as_py()


def keys(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"frame": frame, "prompt": prompt} for frame, prompt in pairs]


@pytest.mark.parametrize(
    ("prompts", "kind", "allowed"),
    [
        (keys((0, "a"), (-1, "b")), "out_of_range", "frames from 0"),
        (keys((1, "a"), (2, "b")), "out_of_range", "0 as the first frame"),
        (keys((0, "a"), (16, "b")), "out_of_range", "frames below num_frames"),
        (keys((0, "a"), (3, "b"), (3, "c")), "invalid_value", "one text for each frame"),
        (keys((0, "a"), (9, "b"), (3, "c")), "invalid_value", "frames that rise; sort the list"),
        (keys((0, "a"), (9, "b"), (0, "c")), "invalid_value", "one text for each frame"),
        (keys((0, "a"), (9, " \t")), "missing_value", "texts that are not empty"),
        (keys((0, "a"), (None, "b")), "missing_value", "a frame and a text in every entry"),
        (keys((0, "a"), (3, None)), "missing_value", "a frame and a text in every entry"),
        ([keys((0, "a"))[0], None], "missing_value", "a frame and a text in every entry"),
        ([], "missing_value", "at least the text of frame 0"),
        (keys((0, "a" * (MAX_PROMPT_BYTES - 1)), (9, "bb")), "out_of_range", f"at most {MAX_PROMPT_BYTES} bytes"),
    ],
    ids=str,
)
def test_a_list_that_cannot_be_is_rejected_alone_with_what_is_allowed(prompts: Any, kind: str, allowed: str) -> None:
    found = checked(pa.array([KEYS, prompts, KEYS], KEY_PROMPTS_TYPE))

    (rejected,) = found.rejected.to_pylist()
    assert (rejected["row"], rejected["error_kind"]) == (1, kind)
    assert rejected["error"].startswith("column 'prompts': ")
    assert allowed in rejected["error"]
    assert found.rows.tolist() == [0, 2]


def test_texts_of_all_the_bytes_that_are_allowed_are_read() -> None:
    key_of([keys((0, "a" * (MAX_PROMPT_BYTES - 1)), (9, "b"))])


@pytest.mark.parametrize(
    "text",
    [
        *("a red circle", "5", "true", "[1]", '["a"]', '{"a": "b"}', '{"0": 5}', '{"0.5": "a"}', '[{"frame": 0}]'),
        *(
            '{"0": "a"',
            '[{"frame": 0, "frame": 1, "prompt": "a"}]',
            '[[0.5, "a"]]',
            '{"0": "\\ud800"}',
            '[[true, "a"]]',
        ),
        *('{"0": "a", "99999999999": "b"}', '[{"frame": 0, "prompt": "a", "weight": 2}]', "[" * 5000),
    ],
    ids=lambda text: text[:30],
)
def test_text_that_holds_no_key_prompts_is_rejected_alone_with_the_forms(text: str) -> None:
    found = checked([json.dumps(MAPPING), text, None], prompt=[None, None, "plain"])

    (rejected,) = found.rejected.to_pylist()
    assert (rejected["row"], rejected["error_kind"]) == (1, "invalid_type")
    assert 'a map such as {"0": "..."' in rejected["error"]


def test_a_row_has_either_a_prompt_or_prompts() -> None:
    found = checked([KEYS, KEYS, None, None], prompt=["text", " ", None, "text"])

    assert found.rows.tolist() == [1, 3]
    both, neither = found.rejected["error"].to_pylist()
    assert "either `prompt` or `prompts`, not both" in both
    assert "column 'prompt' is empty; required: a text that is not empty, or `prompts`" in neither


def test_a_single_key_prompt_has_the_key_of_the_prompt() -> None:
    found = checked([keys((0, "text"))])

    assert found.requests["prompt"].to_pylist() == ["text"]
    assert found.requests["prompts"].to_pylist() == [None]
    assert key_of([keys((0, "text"))]) == key_of(pa.nulls(1), prompt=["text"])
    assert key_of([keys((0, "no"))], column="negative_prompts") == key_of(
        pa.nulls(1), column="negative_prompts", negative_prompt=["no"]
    )


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.integers(1, 15), st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=4))
def test_the_key_is_that_of_the_sorted_pairs_whatever_their_order(rest: dict[int, str]) -> None:
    pairs = {0: "a", **{frame: f"x{text}" for frame, text in rest.items()}}
    backwards = {str(frame): text for frame, text in reversed(pairs.items())}

    assert key_of([json.dumps(backwards)]) == key_of([keys(*sorted(pairs.items()))])


def test_the_interpolation_is_part_of_the_key_where_something_travels_and_nowhere_else() -> None:
    plain, held = {"prompt_hold": [0.5]}, {"prompt_interpolation": ["hold"]}
    base = key_of([KEYS])

    assert len({base, key_of([KEYS], **plain), key_of([KEYS], **held)}) == 3
    assert key_of([KEYS], **plain | held) == key_of([KEYS], **held)
    single = [keys((0, "text"))]
    assert len({key_of(single), key_of(single, **plain), key_of(single, **held)}) == 1
    assert checked(single).requests["prompt_interpolation"].to_pylist() == [None]


def test_negative_prompts_have_a_default_that_a_row_with_negatives_of_its_own_does_not_use() -> None:
    config = {"defaults.negative_prompts": {0: "blur", 8: ""}, "defaults.negative_prompt": "dark"}
    own = [None, keys((0, "green"), (3, "")), None, None]
    found = checked(
        pa.array(own, KEY_PROMPTS_TYPE),
        "negative_prompts",
        config,
        negative_prompt=[None, None, "red", ""],
        num_frames=[16, 16, 4, 16],
    )

    assert not len(found.rejected)
    default = keys((0, "blur"), (8, ""))
    assert found.requests["negative_prompts"].to_pylist() == [default, own[1], None, None]
    assert found.requests["negative_prompt"].to_pylist() == [None, None, "red", ""]
    short = checked(pa.nulls(1, KEY_PROMPTS_TYPE), "negative_prompts", config, num_frames=[8])
    assert "the default is not allowed; allowed: frames below num_frames" in short.rejected["error"][0].as_py()


def test_negative_prompts_and_a_negative_prompt_exclude_each_other() -> None:
    found = checked(pa.array([KEYS], KEY_PROMPTS_TYPE), "negative_prompts", negative_prompt=["dark"])

    assert "either `negative_prompt` or `negative_prompts`" in found.rejected["error"][0].as_py()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({1: "a"}, "the first frame must be 0"),
        ([[0, "a"], [4, "b"], [4, "c"]], "each frame may have one text"),
        ([[0, "a"], [4, "b"], [2, "c"]], "the frames must rise"),
        ({"x": "a"}, "must be a whole number"),
        ("text", "must be a list"),
    ],
    ids=str,
)
def test_a_default_that_cannot_be_is_an_error_of_the_config(value: Any, message: str) -> None:
    with pytest.raises(Exception, match=message):
        RunConfig.load(None, {"manifest": "m", "output": "o", "defaults.negative_prompts": value})


def test_a_blocked_word_in_any_of_the_prompts_rejects_the_row_and_a_phrase_is_one_prompt() -> None:
    two = keys((0, "a red"), (4, "circle"))
    config = {"safety.blocked_words": ["square", "red circle"]}

    found = checked(pa.array([[*keys((0, "a dog")), KEYS[1]], two, two], KEY_PROMPTS_TYPE), config=config)

    assert found.rows.tolist() == [1, 2]
    assert found.rejected["error_kind"].to_pylist() == ["blocked_prompt"]
    assert "column 'prompts'" in found.rejected["error"][0].as_py()


def test_words_of_textual_inversions_are_found_in_all_prompts() -> None:
    made = checked(pa.array([KEYS, KEYS], KEY_PROMPTS_TYPE)).requests

    assert count_words(made, {"default": ("square", "hat")}) == {word_key("default", "square"): 2}
