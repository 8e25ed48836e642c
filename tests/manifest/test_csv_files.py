"""CSV in the dialects of Excel, pandas, Spark and databases: read rightly, or refused by line with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pia_batch.errors import ManifestError
from pia_batch.manifest.csv_files import NULL_WORDS, read_csv
from pia_batch.manifest.reader import Manifest

HEADER = "request_id,image,prompt"
IDS = ("1e5", "007", "1.0", " 8 ", "TRUE", "nan")


def rows(text: str) -> list[list[Any]]:
    table, _ = read_csv(text.encode(), "a.csv")
    return [list(row.values()) for row in table.to_pylist()]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (f"{HEADER}\r\n1,a,b\r\n", [["1", "a", "b"]]),
        (f"{HEADER}\r1,a,b\r2,c,d\r", [["1", "a", "b"], ["2", "c", "d"]]),
        (f"\n\r\n{HEADER}\n1,a,b", [["1", "a", "b"]]),
        (f"sep=,\r\n{HEADER}\r\n1,a,b\r\n", [["1", "a", "b"]]),
        (f"{HEADER},\n1,a,b,\n", [["1", "a", "b"]]),
        (f'{HEADER},, \n1,a,b,,""\n', [["1", "a", "b"]]),
        (f'{HEADER}\n1,a,"say ""stop"", then ""go"""\n', [["1", "a", 'say "stop", then "go"']]),
        (f"{HEADER}\n1,a,C:\\new\\x\n", [["1", "a", "C:\\new\\x"]]),
        (f'{HEADER}\n1,a,5" wide\n', [["1", "a", '5" wide']]),
        (f'{HEADER}\n1,a,"two\r\nlines"\n', [["1", "a", "two\r\nlines"]]),
        (f'"sep=,"\r\n{HEADER}\r\n1,a,b\r\n', [["1", "a", "b"]]),
        (f"{HEADER}\r\n1,a,b\n2,c,d\r3,e,f\r\n", [["1", "a", "b"], ["2", "c", "d"], ["3", "e", "f"]]),
        (f"{HEADER}\n1e5,a,b\n007,a,b\n1.0,a,b\n 8 ,a,b\nTRUE,a,b\nnan,a,b\n", [[i, "a", "b"] for i in IDS]),
        (f"{HEADER}\n1,a,b\n  , ,\t\n   \n\t\n2,c,d\n\x1a", [["1", "a", "b"], ["2", "c", "d"]]),
        (f"{HEADER}\n1,a,b\n" + "\0" * 40, [["1", "a", "b"]]),
        (f"{HEADER}\n1,a,x\u2028y\u0085z\x0b\n", [["1", "a", "x\u2028y\u0085z\x0b"]]),
        (f"{HEADER}\n1,a, b\n", [["1", "a", " b"]]),
        (f'{HEADER}\n1,a,"one, ""two"""\n', [["1", "a", 'one, "two"']]),
        (f'{HEADER}\n1,a," ""b"""\n', [["1", "a", ' "b"']]),
        (f"ORCID,{HEADER}\n0,1,a,b\n", [["0", "1", "a", "b"]]),
        (f"{HEADER}\n1,a,{{b}}\n", [["1", "a", "{b}"]]),
        (f"{HEADER};x\n1,a,b\n", [["1", "a", "b"]]),
        ('"request_id","image","prompt"\n1,a,b\n', [["1", "a", "b"]]),
    ],
)
def test_what_programs_write_is_read(text: str, read: list[list[Any]]) -> None:
    assert rows(text) == read


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f'{HEADER}\n1,a.png,"a sign that says \\"stop\\""\n', "line 2: text goes on after the closing quote"),
        (f'{HEADER}\n0,b,c\n1,"a\\"",p\n2,b,"x"\n', "line 3: text goes on after the closing quote"),
        (f'{HEADER}\n0,b,"x \\", y"\n', 'Expected 3 columns, got 4: 0,b,"x \\", y"; write a quote inside of a field'),
        (f'{HEADER}\n0,b,"x"y\n', 'Spark: .option("escape"'),
        (f'{HEADER}\n0,b,"x\n', "line 2: text goes on after the closing quote of a field, or a quote is not closed"),
        (f"{HEADER}\n1,a,b,\n", "Expected 3 columns, got 4: 1,a,b,; give each line as many fields as the header has"),
        (f"{HEADER},\n1,a,b,x\n", "column 4 has no name in the header line, and values, such as 'x'; name it"),
        (f",{HEADER}\n0,1,a,b\n", "column 1 has no name in the header line, and values, such as '0'"),
        (f"{HEADER}\n1,a,b\n\ufeff{HEADER}\n2,a,b\n", "line 3: the header line again, as where files are joined"),
        (f"{HEADER}\n1,a,b\n\ufeff2,a,b\n", "line 3: a byte order mark, as where files are joined"),
        ("request_id~image~prompt\n1~a~b\n", "has '~' between its columns; write CSV with commas"),
        ("request_id\x1fimage\x1fprompt\n1\x1fa\x1fb\n", "between its columns; write CSV with commas"),
        ("request_id\uff0cimage\uff0cprompt\n1\uff0ca\uff0cb\n", "has '\uff0c' between its columns"),
        ("id\u00feimage\u00feprompt\n1\u00fea\u00feb\n", "has '\u00fe' between its columns"),
        (
            "'request_id','image','prompt'\n'1','a','b'\n",
            "has other marks than \" around the names of its columns: 'req",
        ),
        ("\u201crequest_id\u201d,\u201cimage\u201d,prompt\n1,a,b\n", 'has other marks than " around the names'),
        ("request_id;image;prompt\n1;a;b, c\n", "has semicolons between its columns"),
        ("request_id\timage\tprompt\n1\ta\tb, c\n", "has tabs between its columns"),
        ("request_id|image|prompt\n1|a|b\n", "has vertical bars between its columns"),
        ("sep=;\nrequest_id;image;prompt\n1;a;b\n", "has ';' between its columns; write CSV with commas"),
        ('"sep=;"\nrequest_id;image;prompt\n1;a;b\n', "has ';' between its columns; write CSV with commas"),
        ('"request_id";"image";"prompt"\n1;"a";"b"\n', "has semicolons between its columns"),
        ("request_id;image;prompt;note, x\n1;a;b;c\n", "has semicolons between its columns"),
        ("request_id;image;prompt,\n1;a;b,\n", "has semicolons between its columns"),
        ("request_id\timage\tprompt, long\n1\ta\tb\n", "has tabs between its columns"),
        ("request_id\x01image\x01prompt\n1\x01a\x01b\n", "has the character \\x01 between its columns"),
        ("request_id:image:prompt\n1:a:b\n", "has colons between its columns"),
        ("request_id^image^prompt\n1^a^b\n", "has carets between its columns"),
        ("request_id image prompt\n1 a b\n", "has spaces between its columns"),
        ("request_id, image, prompt\n1, a, b\n", "has spaces around the names of its columns: ' image', ' prompt'"),
        (f'{HEADER}\n1, "a.png", "a cat"\n', "line 2: a quote after a space does not begin a quoted field"),
        (f'{HEADER}\n0,b,c\n1, "a.png", "a cat, sitting"\n', "line 3: a quote after a space"),
        (f"# made by a tool\n{HEADER}\n1,a,b\n", "line 2: the header line, which must be the first"),
        (f"My images,,\n,,\n{HEADER}\n1,a,b\n", "line 3: the header line, which must be the first"),
        (f"{HEADER}\n1,a,b\n{HEADER}\n2,a,b\n", "line 3: the header line again, as where files are joined"),
        (f'{HEADER}\n1,a,"x\ny"\n{HEADER}\n', "line 4: the header line again"),
        ('{"request_id": "1", "image": "a", "prompt": "b"}\n', "is JSON, not CSV; write one object on each line"),
        ('[{"request_id": "1"}]', "is JSON, not CSV"),
        ("\n\n \n", "Empty CSV file; remove it"),
        (f"{HEADER}\n1,a,b, c\n", "and put fields with commas in quotes"),
        (f"{HEADER}\n1,a,b\\, c\n", "Expected 3 columns, got 4: 1,a,b\\, c"),
    ],
)
def test_what_would_be_read_as_something_else_is_refused_with_the_remedy(text: str, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read_csv(text.encode(), "a.csv")

    assert str(caught.value).startswith("manifest file a.csv")
    assert message in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_in_another_encoding_is_refused_by_name(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(f"{HEADER}\n1,a,b\n".encode(encoding))

    with pytest.raises(ManifestError, match=rf"a\.csv is text in {encoding[:6].upper()}; save it as UTF-8"):
        Manifest.open(str(tmp_path))


@pytest.mark.parametrize("row", ["2,é,c", "é,2,c", "2,c,é"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_line_with_latin_text_is_named(end: str, row: str) -> None:
    with pytest.raises(ManifestError, match=r"line 3: column '\w+' has text that is not UTF-8; save the file as UTF-8"):
        read_csv(end.join([HEADER, "1,a,b", row, "3,é,d"]).encode("latin1"), "a.csv")


@pytest.mark.parametrize("text", [f"{HEADER}é\n1,a,b\n", f"{HEADER}\n1,a,é\n"])
def test_latin_text_is_refused_by_name(text: str) -> None:
    with pytest.raises(ManifestError, match=r"invalid UTF8; save it as UTF-8|'prompt' has text that is not UTF-8"):
        read_csv(text.encode("latin1"), "a.csv")


def test_lines_without_any_value_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f'{HEADER}\n1,a,b\n,,\n\n2,a,b\n,"",\n,,\n')

    found = Manifest.open(str(tmp_path))

    (batch,) = found.batches()
    assert batch.table["request_id"].to_pylist() == ["1", "2"]
    assert (found.num_rows, found.num_blank) == (2, 3)


@pytest.mark.parametrize("word", NULL_WORDS)
def test_a_word_for_missing_is_no_prompt_unless_it_is_quoted_and_other_columns_keep_it(word: str) -> None:
    text = f'{HEADER},negative_prompt,model,seed,zone\n{",".join([word] * 7)}\n1,a,"{word}",x{word},,,\n'

    first, second = rows(text)

    assert first == [word, None, None, None, None, None, word]
    assert second == ["1", "a", word, f"x{word}", None, None, None]


fields = st.text(st.sampled_from('ab,"\n\\ é'), max_size=6)


@given(st.lists(st.tuples(fields, fields, fields), min_size=1, max_size=4))
def test_whatever_is_quoted_as_the_standard_says_comes_back(written: list[tuple[str, str, str]]) -> None:
    def quoted(value: str) -> str:
        return '"' + value.replace('"', '""') + '"'

    text = HEADER + "\n" + "\n".join(",".join(map(quoted, row)) for row in written) + "\n"

    table, num_blank = read_csv(text.encode(), "a.csv")

    kept = [list(row) for row in written if any(map(str.strip, row))]
    assert [list(row.values()) for row in table.to_pylist()] == kept
    assert num_blank == len(written) - len(kept)
    assert set(table.schema.types) == {pa.string()}


@pytest.mark.parametrize("second", ["2,a.png,y\n", "2,a.png,y\n3,a.png,z\n", "2\n"])
def test_a_part_without_a_header_line_is_refused_rather_than_its_first_row_lost(second: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("request_id,image,prompt\n1,a.png,x\n")
    (tmp_path / "b.csv").write_text(second)

    with pytest.raises(ManifestError, match=r"b\.csv, line 1: no header line"):
        Manifest.open(str(tmp_path))
