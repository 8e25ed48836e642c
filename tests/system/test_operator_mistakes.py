"""Mistakes of a newcomer: one line that says what, where and what to do, exit code 2, and nothing is started."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from inputs import requests_table
from servers import free_port

from pia_batch import cli

FILES = {
    "typo.yaml": "manifest: good.parquet\noutput: out\nplacment:\n  num_gpus: 0\n",
    "types.yaml": "manifest: good.parquet\noutput: out\nplacement:\n  num_gpus: none\nimages:\n  allow: s3://photos\n",
    "indent.yaml": "manifest: good.parquet\noutput: out\n  placement: [\n",
    "list.yaml": "- manifest\n- output\n",
    "twice.yaml": "manifest: good.parquet\noutput: out\nplacement:\n  num_gpus: 0\nplacement:\n  batch_size: 2\n",
    "two.yaml": "manifest: good.parquet\n---\noutput: out\n",
    "keys.yaml": "manifest: good.parquet\noutput: out\n7: seven\n",
    "null.yaml": "manifest: good.parquet\noutput: out\nplacement:\n  num_gpus:\n",
    "names.yaml": "manifest: good.parquet\noutput: out\nmodels:\n  default: {}\n",
    "colour.yaml": "manifest: good.parquet\noutput: out\nimages: {background: red}\n",
    "hook.yaml": "manifest: good.parquet\noutput: out\non_finish: {webhook: example.com/hook}\n",
    "endless.yaml": "manifest: good.parquet\noutput: out\nlimits: {timeout_s: .inf}\n",
    "array.jsonl": '[{"request_id": "a"}]\n',
    "null.jsonl": "null\n",
    "semicolons.csv": "request_id;image;prompt\na;b;c\n",
    "prompts.csv": "request_id,image,prompt,prompt\na,b,c,d\n",
    "folder/readme.md": "no manifest",
    "mixed/a.csv": "request_id,image,prompt\n",
    "mixed/b.jsonl": "{}\n",
    "days/2026-11-20.csv": "request_id,image,prompt\n",
    "broken.jsonl": '{"request_id": "a", "image": "x.png"\n{oops',
    "notes.txt": "hello",
}
"""Files of the folder, besides `good.parquet`."""

ENCODED = {
    "latin.yaml": ("manifest: été.parquet\noutput: out\n", "latin-1"),
    "latin.csv": ("request_id,image,prompt\na,x.png,été\n", "latin-1"),
    "latin.jsonl": ('{"request_id": "a", "prompt": "été"}\n', "latin-1"),
    "utf16.csv": ("request_id,image,prompt\na,x.png,p\n", "utf-16"),
}
"""Files in another encoding than UTF-8."""

TABLES = {
    "good.parquet": requests_table(2),
    "names.parquet": pa.table({"id": ["a"], "text": ["x"], "image": ["q.png"]}),
    "taken.parquet": requests_table(1, status=["new"]),
    "empty.parquet": requests_table(0),
    "columns.parquet": pa.table({}),
    "requests/a.parquet": requests_table(1),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for name, (text, encoding) in ENCODED.items():
        (tmp_path / name).write_text(text, encoding=encoding)
    for name, table in TABLES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / name)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing of the kind")
    monkeypatch.chdir(tmp_path)
    for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def typed(words: str, code: int = 2) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(words.split())
    assert left.value.code == code


GOOD = "--manifest good.parquet --output out"

CASES = [
    ("run typo.yaml", "typo.yaml: placment: unknown key; did you mean 'placement'?"),
    ("run types.yaml", "images.allow: must be a list, such as [a, b] (got 's3://photos'); placement.num_gpus: must be"),
    (
        "run indent.yaml",
        "cannot read config indent.yaml, line 3, column 12: mapping values are not allowed here; correct",
    ),
    ("run list.yaml", "config list.yaml must be a mapping of keys to values, not list"),
    ("run twice.yaml", "twice.yaml, line 5, column 1: the key 'placement' is in line 3 already; correct the YAML"),
    (
        "run two.yaml",
        "two.yaml, line 2, column 1: expected a single document in the stream, but found",
    ),
    ("run keys.yaml", "keys.yaml: 7: a key must be a text; write it in quotes (got 7)"),
    ("run null.yaml", "null.yaml: placement.num_gpus: must be a number (got null)"),
    (
        "run names.yaml",
        "names.yaml: models.default: this is the name of `model` too; set model.name, or",
    ),
    ("run colour.yaml", "images.background: must be a colour such as '#ff8000', six hexadecimal digits"),
    (
        "run hook.yaml",
        "on_finish.webhook: must be a URL with http:// or https://, or $NAME of a variable (got 'example.com/hook')",
    ),
    ("run endless.yaml", "limits.timeout_s: must be a finite number (got inf)"),
    ("run latin.yaml", "cannot read config latin.yaml: 'utf-8' codec can't decode byte 0xe9"),
    (
        "run good.parquet",
        "good.parquet is a manifest, not a config in YAML; write --manifest",
    ),
    ("run list.yaml", "not list; write lines such as `manifest: requests.parquet`"),
    ("run nowhere.yaml", "cannot read config nowhere.yaml: No such file or directory; give a YAML file"),
    ("run .", "cannot read config .: Is a directory; give a YAML file"),
    ("run --manifest good.parquet", "command line: output: required, and not given"),
    (
        f"run {GOOD} --set placement.batchsize=2",
        "placement.batchsize: unknown key; did you mean 'placement.batch_size'",
    ),
    (f"run {GOOD} --set defaults.format=avi", "must be 'mp4', 'gif', 'webp', 'png_zip' or 'webm' (got 'avi')"),
    (
        f"run {GOOD} --set defaults.fps",
        "--set defaults.fps: expected section.key=value, such as placement.",
    ),
    (f"run {GOOD} --set =5", "--set =5: expected section.key=value, such as placement.batch_size=4"),
    (f"run {GOOD} --set placement.=5", "--set placement.=5: expected section.key=value"),
    (
        f"run {GOOD} --set models.toon.base=not/here/at/all",
        "models.toon: model.base: there is no folder or",
    ),
    ("run --manifest= --output out", "command line: manifest: must have at least 1 character (got '')"),
    ("run --manifest good.parquet --output=", "command line: output: must have at least 1 character (got '')"),
    (
        f"run {GOOD} --backfill 2026-11-20..2026-11-22",
        "every run would be the same; write it there, or leave",
    ),
    (
        "run --manifest days/{date}.csv --output out --backfill 2026-11-22..2026-11-20",
        "ends before it begins; write the earlier date first",
    ),
    (
        "run --manifest days/{date}.csv --output out --run-date 2026-11-20T05",
        "run_date 2026-11-20T05: the templates have no {hour}; write 2026-11-20",
    ),
    (
        f"run {GOOD} --set model.base=some/where/not",
        "model.base: there is no folder or file some/where/not, and it is no",
    ),
    (f"run {GOOD} --set images.allow=[photos]", "'photos' is not a URI or an absolute path, such as s3://photos/"),
    (f"run {GOOD} --run-id ../x", "run_id: invalid value (got '../x', expected up to 128 letters, digits"),
    (
        f"run {GOOD} --run-date tomorrow",
        "must be a date such as 2026-11-22, or an hour such as 2026-11-22T05 (got 'tomorrow')",
    ),
    (
        f"run {GOOD} --deadline never",
        "must be a time such as 06:00 or 2026-11-23T06:00, or a duration such as 5h (got 'never')",
    ),
    (f"run {GOOD} --param country=de", "neither manifest nor output nor run_id has {country}; leave it out"),
    (
        "run --manifest days/{dat}.parquet --output out",
        "nothing stands for {dat}; known: {date}, {hour}. Give others by",
    ),
    (
        f"retry {GOOD} --kind timeot",
        "the kind timeot; did you mean timeout?; this output's journal has: none",
    ),
    ("plan --manifest gone.parquet --output out", "gone.parquet does not exist"),
    ("plan --manifest empty.parquet --output out", "empty.parquet has no rows; give it one for each request"),
    ("plan --manifest columns.parquet --output out", "columns.parquet has no rows; give it one for each request"),
    ("plan --manifest folder --output out", "text may be compressed (.jsonl.gz, .csv.zst)"),
    ("plan --manifest mixed --output out", "mixed has files of several formats, csv and jsonl; leave those of one"),
    (
        "plan --manifest days/*.csv --output out",
        "does not exist; correct its path or URI, and name a folder in",
    ),
    ("plan --manifest array.jsonl --output out", "line 1: each line must be one JSON object, such as {"),
    ("plan --manifest null.jsonl --output out", "line 1: each line must be one JSON object, such as {"),
    ("plan --manifest semicolons.csv --output out", "it has: request_id;image;prompt; write CSV with commas between"),
    ("plan --manifest prompts.csv --output out", "has more than one column 'prompt'; rename or drop the others"),
    ("plan --manifest latin.csv --output out", "line 2: column 'prompt' has text that is not UTF-8; save the file as"),
    ("plan --manifest latin.jsonl --output out", "invalid continuation byte; save it as UTF-8"),
    ("plan --manifest utf16.csv --output out", "utf16.csv is text in UTF-16; save it as UTF-8"),
    ("plan --manifest requests --output requests", "lies inside the folder of the manifest"),
    ("plan --manifest requests --output requests/out", "its results would be read as requests; choose another folder"),
    (
        "plan --manifest file://good.parquet --output out",
        "has a host before the path; write file:///FULL",
    ),
    ("plan --manifest s3:// --output out", "s3:// names no bucket; write s3://BUCKET/PATH"),
    ("plan --manifest good.parquet --output s3://", "s3:// names no bucket; write s3://BUCKET/PATH"),
    (
        "plan --manifest good.parquet --output https://host/out",
        "output: nothing can be written to https:// (got 'https://host/out')",
    ),
    ("plan --manifest http://127.0.0.1:PORT/x.csv --output out", "Cannot connect to host 127.0.0.1:PORT"),
    (
        "plan --manifest names.parquet --output out",
        "no column 'request_id' and no column 'prompt'; it has: id, text, im",
    ),
    (
        "plan --manifest names.parquet --output out",
        "image; add it, or say which column is meant: --column request_id=id",
    ),
    ("plan --manifest taken.parquet --output out", "column 'status' has the name of a result column; rename it"),
    ("plan --manifest broken.parquet --output out", "magic bytes not found in footer. Either"),
    ("plan --manifest broken.jsonl --output out", "broken.jsonl, line 1: not JSON: Expecting ','"),
    ("plan --manifest notes.txt --output out", "JSONL and CSV are known by their names: .jsonl, .ndjson, .csv"),
    ("plan --manifest s3:/bucket/x --output out", "s3:/bucket/x is not a URI, and an unlikely path; write s3://"),
    (
        "plan --manifest gs3://bucket/x --output out",
        "scheme 'gs3' is not supported; use a local path, file://",
    ),
    (
        "plan --manifest good.parquet --output ftp://host/x",
        "scheme 'ftp' is not supported (got 'ftp://host/x'); use a local path, file://",
    ),
    ("run --manifest good.parquet --output s3://key:secret@bucket/x", "given with credentials"),
    (
        "run --manifest good.parquet --output notes.txt/out",
        "notes.txt/out: Not a directory; a file has the name of a folder there",
    ),
    ("status nowhere", "no run has ever written to"),
    ("verify s3:bucket/out", "write s3://, with two slashes"),
    ("report nowhere", "has no results yet; `pia-batch run` publishes them"),
    ("inspect notes.txt", "notes.txt is not a GIF, an MP4, a WebM, a WebP, a PNG or a zip of PNGs"),
    ("inspect gone.gif", "gone.gif does not exist"),
    ("inspect folder", "folder is a folder; name one animation in it"),
    ("demo --output notes.txt", "notes.txt: File exists; a file, or a link to nothing, has the name"),
    (
        "jobs --address http://127.0.0.1:PORT",
        "no Ray dashboard answers at http://127.0.0.1:PORT; correct --address, or",
    ),
    (f"run {GOOD} --set placement.ray_address=127.0.0.1:PORT", "no Ray answers at 127.0.0.1:PORT: Connection refused"),
]


@pytest.mark.parametrize(
    ("words", "reported"), CASES, ids=[f"{number}: {words}" for number, (words, _) in enumerate(CASES)]
)
def test_a_mistake_is_one_line_with_its_place_and_its_remedy(
    words: str, reported: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = str(free_port())
    before = {path.name for path in folder.iterdir()}

    typed(words.replace("PORT", port))

    error = capsys.readouterr().err
    assert reported.replace("PORT", port) in error
    assert "Traceback" not in error
    assert "secret" not in error
    lines = [line for line in error.splitlines() if not re.match(r"\d{4}-\d\d-\d\d .* INFO ", line)]
    assert len(lines) == 1
    assert lines[0].startswith("pia-batch: ")
    if "ray_address" not in words:  # which is asked for when the plan is made
        assert {path.name for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        ("frobnicate", "No such command 'frobnicate'"),
        (f"run {GOOD} --mainfest x", "No such option: --mainfest"),
        (f"run {GOOD} --limit many", "Invalid value for '--limit'"),
        ("verify", "Missing argument"),
    ],
)
def test_what_is_no_command_is_reported_with_the_help_to_ask_for(
    words: str, reported: str, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(words)

    error = " ".join(capsys.readouterr().err.split())
    assert reported in error
    assert "--help" in error
    assert "Traceback" not in error


def test_rows_that_cannot_be_animated_are_counted_by_kind_with_place_and_remedy(
    folder: Path, write_manifest: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    table = requests_table(5, seed=["lots", "-3", "1", "2", None], model=["defalt", None, "defalt", None, None])
    typed(f"plan --manifest {write_manifest(table)} --output out", code=0)

    reported = capsys.readouterr().out
    assert "rejected    3" in reported
    assert "row 0: column 'seed': 'lots' is not allowed; allowed: a whole number from 0 to 2^63-1" in reported
    assert "row 1: column 'seed': '-3' is not allowed" in reported
    assert "row 2: column 'model': 'defalt' is not allowed; allowed: default, or null for the default" in reported
    assert not (folder / "out").exists()


@pytest.mark.usefixtures("folder")
def test_debug_shows_where_a_mistake_was_found(caplog: pytest.LogCaptureFixture) -> None:
    typed("plan --manifest gone.parquet --output out")
    assert not caplog.records

    typed("--debug plan --manifest gone.parquet --output out")

    (record,) = [record for record in caplog.records if record.exc_info]
    assert "in open" in caplog.text
    assert "gone.parquet does not exist" in str(record.exc_info and record.exc_info[1])
