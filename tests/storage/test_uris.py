"""What URIs mean and how they are shown. What the policy refuses is in test_attacks.py."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pia_batch.schema import columns
from pia_batch.storage import uris
from pia_batch.storage.uris import Location, Policy, RefusedError, parse, parse_prefix


@pytest.mark.parametrize(
    ("uri", "location"),
    [
        ("/a b/c%20d.png", Location("file", "", ("a b", "c%20d.png"), "/a b/c%20d.png")),
        ("file:///a%20b/c", Location("file", "", ("a b", "c"), "/a b/c")),
        ("FILE://localhost/x?y#z", Location("file", "", ("x",), "/x")),
        ("s3://bucket/a b/c%20d#e?f", Location("s3", "bucket", ("a b", "c%20d#e?f"), "s3://bucket/a b/c%20d#e?f")),
        ("S3A://bucket/x", Location("s3", "bucket", ("x",), "s3://bucket/x")),
        ("s3://bucket", Location("s3", "bucket", ("",), "s3://bucket/")),
        ("gcs://bucket/x", Location("gs", "bucket", ("x",), "gs://bucket/x")),
        ("abfss://c@a.dfs.core.windows.net/x", Location("abfs", "c@a.dfs.core.windows.net", ("x",), "abfs://c@a.dfs.core.windows.net/x")),
        ("https://Host.Example.:443", Location("https", "host.example:443", (), "https://host.example/")),
        ("http://h:8080/a%20b/ü?q=%2F+ #z", Location("http", "h:8080", ("a b", "ü"), "http://h:8080/a%20b/%C3%BC?q=%2F+%20")),
        ("https://[2606:4700:0:0::1111]/x", Location("https", "[2606:4700::1111]:443", ("x",), "https://[2606:4700::1111]/x")),
    ],
)  # fmt: skip
def test_a_uri_has_one_meaning_and_one_spelling(uri: str, location: Location) -> None:
    assert parse(uri) == location


def test_a_prefix_covers_itself_and_what_is_below_it_segment_by_segment() -> None:
    for entry in ("s3://b/a", "s3://b/a/", "s3a://b/a"):
        prefix = parse_prefix(entry)
        assert all(prefix.covers(parse(uri)) for uri in ("s3://b/a", "s3://b/a/", "s3://b/a/c/d"))
        assert not any(prefix.covers(parse(uri)) for uri in ("s3://b/ab", "s3://b/", "s3://b2/a/c", "gs://b/a/c"))
    assert parse_prefix("https://h").covers(parse("https://h:443/x"))


@settings(deadline=None)
@given(st.lists(st.text("abc%. ", min_size=1, max_size=3), min_size=1, max_size=3), st.text("abc%. /", max_size=4))
def test_no_prefix_covers_a_sibling(folders: list[str], more: str) -> None:
    try:
        prefix, inside = parse_prefix("s3://b/" + "/".join(folders)), parse("s3://b/" + "/".join([*folders, more]))
        sibling = parse("s3://b/" + "/".join(folders) + "x" + more)
    except RefusedError:
        return
    except ValueError:
        return

    assert prefix.covers(inside)
    assert not prefix.covers(sibling)


def test_relative_paths_start_at_the_manifest_and_stay_in_its_bucket() -> None:
    policy = Policy("s3://bucket/day/one")

    assert policy.locate("x.png").target == "s3://bucket/day/one/x.png"
    assert policy.locate("./a//../b/x.png").target == "s3://bucket/day/one/a/b/x.png"
    assert policy.locate("../../x.png").target == "s3://bucket/x.png"
    with pytest.raises(uris.NotAllowedError, match="images may come from s3://bucket; allow more"):
        policy.locate("../../../x.png")


@pytest.mark.parametrize("base", ["file:///day/one", "s3://bucket/day/one", ""])
@pytest.mark.parametrize("uri", ["file:/a%20b/c.png", "FILE:/a%20b/c.png?x#y", "file:///a%20b/c.png"])
def test_the_uri_of_a_file_may_have_one_slash_as_java_writes_it(base: str, uri: str) -> None:
    assert Policy(base).locate(uri).target == "/a b/c.png"


@pytest.mark.parametrize(
    ("uri", "remedy"),
    [
        ("C:\\photos\\a.png", "a path of Windows"),
        ("c:/photos/a.png", "a path of Windows"),
        ("\\\\server\\photos\\a.png", "a path of Windows"),
        ("photos\\a.png", "a path of Windows"),
        ("~/a.png", "write the full path"),
        ("$HOME/a.png", "write the full path"),
        ("%USERPROFILE%/a.png", "write the full path"),
        ("http:/host/a.png", "two slashes"),
        ("s3:bucket/a.png", "two slashes"),
        ('"a.png"', "without quotes"),
        ("<a.png>", "without quotes or brackets"),
        (" a.png", "without spaces"),
        ("a.png ", "without spaces"),
        ("a b.png", None),
        ("a/b~.png", None),
        ("https://host/a.png", None),
        ("x:y.png", None),
    ],
)
def test_a_path_that_is_missing_has_a_remedy_by_what_it_looks_like(uri: str, remedy: str | None) -> None:
    found = uris.remedy_for_missing(uri)

    assert found is None if remedy is None else remedy in str(found)


def test_folders_are_those_of_the_manifest_and_of_the_list(tmp_path: Path) -> None:
    policy = Policy(tmp_path.as_uri(), ("/mnt/a b", "file:///mnt/c%20d", "s3://b"))

    assert sorted(policy.folders) == ["/mnt/a b", "/mnt/c d", str(tmp_path)]
    assert policy.locate("x.png").target == f"{tmp_path}/x.png"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/x", "s3://bucket/x"),
        ("s3://key:se/cr/et@bucket/x", "s3://bucket/x"),
        ("https://key:se/cr?et@host/x", "https://host/x"),
        ("https://key:1234@host:80/x", "https://host:80/x"),
        ("cannot open HTTPS://token@host/x now", "cannot open HTTPS://host/x now"),
        ("https://host/x?X-Amz-Signature=1&y=2 and s3://b/y", "https://host/x and s3://b/y"),
        ("http://host/x#part", "http://host/x"),
        ("abfs://c@account.dfs.core.windows.net/x?sv=1&sig=2", "abfs://c@account.dfs.core.windows.net/x"),
        ("gs://bucket/x?X-Goog-Signature=1", "gs://bucket/x"),
        ("s3://bucket/key?versionId=3", "s3://bucket/key?versionId=3"),
        ("s3://bucket/folder/me@home.png", "s3://bucket/folder/me@home.png"),
        ("file:///home/me@work/x.png", "file:///home/me@work/x.png"),
        ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x"),
        ("s3://bucket/what?.png", "s3://bucket/what?.png"),
        ("https://host:8080/me@home.png", "https://host:8080/me@home.png"),
        ("images/a b@2x.png", "images/a b@2x.png"),
        ("write to me@home.org at 12:30", "write to me@home.org at 12:30"),
    ],
)
def test_user_names_passwords_and_signatures_are_taken_out_and_nothing_else(text: str, shown: str) -> None:
    assert uris.redacted(text) == shown


@settings(deadline=None)
@given(st.text("aZ:/@?#%.= \n", max_size=12).map(lambda text: "https://u:" + text) | st.text(max_size=20))
def test_a_column_is_redacted_like_its_values(uri: str) -> None:
    assert columns.redacted(pa.array([uri])).to_pylist() == [uris.redacted_uri(uri)]


@pytest.mark.parametrize("part", ["a:", "a://", "?", "?sig", "@", ":@", "//", "%25", "a:1", "https://u:"])
def test_no_text_takes_long_to_redact_or_to_read(part: str) -> None:
    text = (part * 4096)[:4096]
    started = time.process_time()

    uris.redacted(text[:400])
    for uri in (text, f"https://{text}", f"s3://b/{text}", f"https://h/{text}"):
        uris.redacted_uri(uri)
        with contextlib.suppress(RefusedError):
            Policy("s3://b/m").locate(uri)

    assert time.process_time() - started < 1
