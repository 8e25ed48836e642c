"""JSON lines as people have them: read rightly, rejected by row, or refused by line with the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pia_batch.config import RunConfig
from pia_batch.errors import ManifestError
from pia_batch.manifest.column_map import NO_MAP
from pia_batch.manifest.json_lines import read_json_lines
from pia_batch.manifest.reader import Manifest
from pia_batch.manifest.validation import check

ROW = {"request_id": "1", "image": "a.png", "prompt": "p"}


def line(**values: Any) -> str:
    return json.dumps(ROW | values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(ROW, indent=1), "line 1: not JSON: Expecting property name"),
        (json.dumps([ROW]), "line 1: each line must be one JSON object, such as"),
        (f"[\n{line()},\n{line()}\n]", "line 1: not JSON: Expecting value"),
        (f"{line()},\n{line()},", "line 1: not JSON: Extra data (column "),
        (line() * 2, "line 1: not JSON: Extra data (column "),
        (f"{line()}\n{ROW!s}", "line 2: not JSON: Expecting property name"),
        (f"# note\n{line()}", "line 1: not JSON: Expecting value"),
    ],
)
def test_json_in_another_layout_is_refused_by_line_with_the_remedy(text: str, message: str) -> None:
    with pytest.raises(ManifestError) as refused:
        read_json_lines(text.encode(), "m.jsonl", NO_MAP)

    assert message in str(refused.value)
    assert "write one object on each line (pandas: to_json(" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"request_id": "1", "request_id": "2"}', "line 1: the object has the name 'request_id' more than once"),
        (line() + '\n{"x": 1, "x": 1}', "line 2: the object has the name 'x' more than once"),
        (line() + '\n{"x": [{"y": {"z": 1, "z": 2}}]}', "line 2: an object inside has the name 'z' more than once"),
        ('{"prompts": {"0": "a"}, "x": {"y": 1, "y": 2}}', "line 1: an object inside has the name 'y' more than once"),
        (r'{"prompt": "a\ud83d"}', r"line 1: \ud83d is half of a surrogate pair"),
        (r'{"a": [{"b\uDE00": 1}]}', r"line 1: \ude00 is half of a surrogate pair"),
        ('{"x": ' + "[" * 700 + "]" * 700 + "}", "lists or objects are nested too deeply; write them as text"),
        ('{"x": ' + "[" * 99_999 + "]" * 99_999 + "}", "line 1: lists or objects are nested too deeply; write them as"),
        ('{"x": ' + "9" * 5000 + "}", "line 1: a number has more than 4300 digits; write it as text"),
    ],
)
def test_what_would_be_lost_or_is_no_text_is_refused_by_line(text: str, message: str) -> None:
    with pytest.raises(ManifestError) as refused:
        read_json_lines(text.encode(), "m.jsonl", NO_MAP)

    assert message in str(refused.value)


@pytest.mark.parametrize("half", [b"\xed\xa0\xbd\xed\xb8\x80", b"\xed\xb0\x80"], ids=["CESU-8", "one half"])
def test_bytes_of_surrogates_are_refused_by_line(half: bytes) -> None:
    with pytest.raises(ManifestError, match=r"line 2: not JSON: 'utf-8' codec can't decode .*; save it as UTF-8"):
        read_json_lines(line().encode() + b'\n{"prompt": "' + half + b'"}', "m.jsonl", NO_MAP)


def test_whole_surrogate_pairs_and_a_byte_order_mark_on_every_line_are_read() -> None:
    one = rb'{"a": "\ud83d\ude00 \\ud800"}'

    table = read_json_lines(b"\xef\xbb\xbf" + one + b"\n\xef\xbb\xbf" + one, "m.jsonl", NO_MAP)

    assert table.to_pylist() == [{"a": "\U0001f600 \\ud800"}] * 2


NO_TEXTS = [1.0, 2.5, 1e5, True, float("nan"), float("inf"), ["1"], {}, {"$oid": "1"}]


@pytest.mark.parametrize("bad", [[value] for value in NO_TEXTS] + [NO_TEXTS])
@pytest.mark.parametrize("others", [[], ["x"], [7], ["x", 7], [None]])
@pytest.mark.parametrize("files", [1, 2])
@pytest.mark.parametrize("name", ["request_id", "prompt"])
def test_what_is_no_text_is_rejected_alone_whatever_else_is_in_the_column(
    name: str, files: int, others: list[Any], bad: list[Any], tmp_path: Path
) -> None:
    good = [value for value in others if isinstance(value, str) or (name == "request_id" and value == 7)]
    lines = [line(**{name: value}) for value in [*others, *bad]]
    for number in range(files):
        part = lines if files == 1 else (lines[: len(others)], lines[len(others) :])[number]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(part))
    config = RunConfig.load(None, {"manifest": str(tmp_path), "output": "out"})

    requests, kinds = [], []
    for batch in Manifest.open(str(tmp_path)).batches():
        checked = check(batch.table, config, {"default": "e" * 32})
        requests += checked.requests[name].to_pylist()
        kinds += checked.rejected["error_kind"].to_pylist()

    assert requests == [str(value) for value in good]
    assert set(kinds) <= {"invalid_type", "missing_value"}
    assert len(kinds) == len(lines) - len(good)


def test_integer_ids_are_texts_in_every_file(tmp_path: Path) -> None:
    for number, ids in enumerate(([1, 2**64, -0], ["x", None], [7])):
        (tmp_path / f"{number}.jsonl").write_text("\n".join(line(request_id=each) for each in ids))

    found = Manifest.open(str(tmp_path))

    assert found.schema.field("request_id").type == pa.string()
    read = [each for batch in found.batches() for each in batch.table["request_id"].to_pylist()]
    assert read == ["1", str(2**64), "0", "x", None, "7"]


@pytest.mark.parametrize("data", [b"{}", b"{}\n\n{}\n"])
def test_objects_without_names_are_not_called_no_rows(data: bytes) -> None:
    with pytest.raises(ManifestError, match=r"m\.jsonl: its objects are empty; give each a request_id"):
        read_json_lines(data, "m.jsonl", NO_MAP)
