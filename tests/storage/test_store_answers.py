"""Answers of a store that refuses, by real requests to a server on loopback: each is one line with its remedy."""

import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import obstore.exceptions
import pytest
from obstore.exceptions import GenericError
from s3_recorder import Recorder, recording

from pia_batch.config import ImagesConfig
from pia_batch.datasets import sources
from pia_batch.errors import ImageUnavailableError, ManifestError, StorageError, UnwritableStoreError, message_of
from pia_batch.manifest import files
from pia_batch.media.fetch import read_image, read_image_head
from pia_batch.storage import filesystems, object_store, s3_config, store_errors
from pia_batch.storage.object_store import ObjectInfo, Store


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    with recording() as recorder:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}
        for name, value in (keys | {"AWS_ENDPOINT_URL": recorder.url}).items():
            monkeypatch.setenv(name, value)
        s3_config.forget()
        yield recorder
    s3_config.forget()


LONG = f"s3://bucket/{'a-long-prefix/' * 8}out"

REFUSALS = [
    (403, "AccessDenied", "check the credentials and the policy"),
    (400, "ExpiredToken", "the temporary ones have expired; renew them"),
    (403, "InvalidAccessKeyId", "this store does not know the access key"),
    (403, "SignatureDoesNotMatch", "the secret key does not belong to the access key"),
    (403, "RequestTimeTooSkewed", "the clock of this machine differs too much"),
    (404, "NoSuchBucket", "create it, or correct the URI"),
]

CALLS: dict[str, Callable[[Store, Path], object]] = {
    "create": lambda store, _: store.create("name", b"data"),
    "write": lambda store, _: store.replace("name", b"data"),
    "read": lambda store, _: store.read("name"),
    "delete": lambda store, _: store.delete("name"),
    "list": lambda store, _: list(store.list("")),
    "read in parts": lambda store, folder: store.download(ObjectInfo("name", 4, "tag"), folder / "copy"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("status", "code", "remedy"), REFUSALS)
def test_a_refusal_ends_each_call_at_once_with_its_code_and_its_remedy(
    server: Recorder, tmp_path: Path, status: int, code: str, remedy: str, call: str
) -> None:
    server.refusal = (status, code)

    with pytest.raises(StorageError) as refused:
        CALLS[call](Store(LONG), tmp_path)

    line = str(refused.value)
    assert LONG in line
    assert remedy in line
    assert code == "NoSuchBucket" or f"the store answers {status} " in line
    assert code == "NoSuchBucket" or f", {code} (refused as {code})" in line
    assert not set("\n<>") & set(line)
    assert len(server.seen) == 1


def test_an_object_is_deleted_by_a_request_that_every_store_has(server: Recorder) -> None:
    store = Store(LONG)
    store.replace("name", b"data")

    store.delete("name")
    store.delete("name")

    assert server.objects == {}
    assert [(seen.verb, urlsplit(seen.target).query) for seen in server.seen[1:]] == [("DELETE", "")] * 2


@pytest.mark.parametrize(
    ("status", "code"), [(400, "InvalidRequest"), (405, "MethodNotAllowed"), (501, "NotImplemented")]
)
def test_a_refusal_without_a_known_remedy_is_not_tried_again(server: Recorder, status: int, code: str) -> None:
    server.refusal = (status, code)

    with pytest.raises(StorageError, match=rf"answers {status} .*{code}.*; look into the log"):
        Store(LONG).create("name", b"data")

    assert len(server.seen) == (3 if status == 501 else 1)  # obstore's own attempts, within half a second


@pytest.mark.parametrize(
    ("status", "code"),
    [(403, "QuotaExceeded"), (400, "XMinioAdminBucketQuotaExceeded"), (507, "XMinioStorageFull"), (507, "Other")],
)
def test_a_store_without_room_says_how_there_is_some(
    server: Recorder, monkeypatch: pytest.MonkeyPatch, status: int, code: str
) -> None:
    monkeypatch.setattr(object_store, "ATTEMPTS", 1)
    server.refusal, server.refused_verbs = (status, code), ("PUT",)

    with pytest.raises(
        UnwritableStoreError, match=rf"answers {status} .*{code}.*; free some space in the store, or raise"
    ):
        Store(LONG).create("name", b"data")


@pytest.mark.parametrize(
    ("status", "code", "is_unwritable"), [(500, "InternalError", True), (403, "AccessDenied", False)]
)
def test_a_store_that_fails_is_not_one_that_refuses_these_credentials(
    server: Recorder, monkeypatch: pytest.MonkeyPatch, status: int, code: str, is_unwritable: bool
) -> None:
    monkeypatch.setattr(object_store, "ATTEMPTS", 1)
    server.refusal, server.refused_verbs = (status, code), ("PUT",)

    with pytest.raises(StorageError) as refused:
        Store(LONG).create("name", b"data")

    assert isinstance(refused.value, UnwritableStoreError) == is_unwritable
    assert str(refused.value).endswith("its disks or a quota may be full") == is_unwritable


@pytest.mark.parametrize(("status", "code", "remedy"), REFUSALS[:-1])
def test_the_refusal_of_a_head_is_asked_for_its_code_and_ends_the_call_at_once(
    server: Recorder, status: int, code: str, remedy: str
) -> None:
    server.refusal = (status, code)

    with pytest.raises(StorageError, match=rf"the store answers {status} .*, {code} .*{remedy}"):
        Store(LONG).stat("name")

    assert [seen.verb for seen in server.seen] == ["HEAD", "GET"]


def test_a_head_that_is_refused_alone_says_that_the_store_gives_no_reason(
    server: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "ATTEMPTS", 1)
    server.refusal, server.refused_verbs = (400, "ExpiredToken"), ("HEAD",)
    Store(LONG).replace("name", b"data")

    with pytest.raises(StorageError, match=r"the store gives no reason; check the credentials.*may have expired"):
        Store(LONG).stat("name")


@pytest.mark.long
@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (503, "SlowDown"), (400, "RequestTimeout")])
def test_an_answer_that_may_pass_is_tried_again(
    server: Recorder, monkeypatch: pytest.MonkeyPatch, status: int, code: str
) -> None:
    monkeypatch.setattr(object_store, "ATTEMPTS", 2)
    server.refusal = (status, code)

    with pytest.raises(StorageError, match=rf"after 2 attempts: the store answers {status} .*{code}"):
        Store(LONG).create("name", b"data")


def test_a_token_in_the_words_of_a_store_is_not_repeated() -> None:
    text = (
        "Server returned non-2xx status code: 403 Forbidden: <?xml?>\n<Error><Code>AccessDenied</Code><Message>"
        "no\nAWS_SECRET\x1b</Message><Token-0>hidden</Token-0></Error>"
    )

    reason = store_errors.reason_of(GenericError(text))

    assert reason == r"the store answers 403 Forbidden, AccessDenied (no AWS_SECRET\x1b)"


@pytest.mark.parametrize(("status", "code", "remedy"), REFUSALS)
@pytest.mark.parametrize("reading", [files.reading, sources.reading])
def test_a_listing_that_is_refused_is_one_line_with_the_remedy_of_its_code(
    server: Recorder, status: int, code: str, remedy: str, reading: Callable[[str], object]
) -> None:
    server.refusal = (status, code)

    with pytest.raises(ManifestError) as refused, reading(LONG):  # type: ignore[attr-defined]
        filesystems.list_files(*filesystems.arrow_filesystem(LONG))

    assert LONG in str(refused.value)
    assert remedy in str(refused.value)
    assert "\n" not in str(refused.value)


IMAGES = ImagesConfig(timeout_s=20)


@pytest.mark.parametrize(
    ("status", "code", "remedy"), [*REFUSALS[1:-1], (400, "InvalidToken", "check the credentials")]
)
def test_what_is_refused_to_every_image_is_no_fault_of_a_request(
    server: Recorder, status: int, code: str, remedy: str
) -> None:
    server.refusal = (status, code)

    with pytest.raises(StorageError) as refused:
        read_image("x.png", LONG, IMAGES)

    line = str(refused.value)
    assert line.startswith("column 'image': x.png cannot be opened: ")
    assert f"{code} (refused as {code})" in line
    assert remedy in line
    assert len(server.seen) == 2  # of the image, and of another name
    with pytest.raises(StorageError, match=remedy):
        read_image_head("x.png", LONG, IMAGES, 100)


@pytest.mark.parametrize(
    ("status", "code", "problem"),
    [
        (403, "AccessDenied", "may not be read: refused as AccessDenied; check the credentials and the policy"),
        (403, "InvalidObjectState", "may not be read: refused as InvalidObjectState"),
        (403, "SignatureDoesNotMatch", "the secret key does not belong to the access key"),
        (404, "NoSuchKey", "does not exist"),
        (404, "NoSuchBucket", "no such bucket or folder; create it, or correct the URI"),
    ],
)
def test_what_is_refused_to_one_image_fails_its_request_alone(
    server: Recorder, status: int, code: str, problem: str
) -> None:
    server.refusal, server.refused_key = (status, code), "x.png"
    server.objects[urlsplit(server.url).netloc, f"{urlsplit(LONG).path.replace('/', '/bucket/', 1)}/y.png"] = b"picture"

    with pytest.raises(ImageUnavailableError, match=re.escape(problem)):
        read_image("x.png", LONG, IMAGES)
    assert read_image("y.png", LONG, IMAGES) == b"picture"


def test_the_message_about_an_image_with_a_long_key_ends_with_the_remedy(server: Recorder) -> None:
    server.refusal = (403, "AccessDenied")

    with pytest.raises(ImageUnavailableError) as refused:
        read_image(f"{'long/' * 150}x.png", LONG, IMAGES)

    assert message_of(refused.value).endswith("; check the credentials and the policy")


def test_a_file_that_may_not_be_opened_is_not_called_missing(server: Recorder) -> None:
    server.refusal = (403, "AccessDenied")
    filesystem, path = filesystems.arrow_filesystem(f"{LONG}/requests.parquet")

    with pytest.raises(PermissionError):
        filesystem.open_input_file(path)
    server.refusal = None
    with pytest.raises(FileNotFoundError):
        filesystem.open_input_file(path)


@pytest.mark.parametrize("response", [object(), None, {}, {"Error": {}}, {"Error": {"Code": "Unknown"}}])
def test_the_answer_of_another_client_has_no_remedy_of_s3(response: object) -> None:
    answered, err = OSError("404"), FileNotFoundError("no such dataset")
    answered.response = response  # type: ignore[attr-defined]
    err.__cause__ = answered

    assert filesystems.remedy_for(err) is None


# --- every error ------------------------------------------------------------------------------------------------------

OF_OBSTORE = {
    name: kind
    for name, kind in vars(obstore.exceptions).items()
    if isinstance(kind, type) and issubclass(kind, Exception) and name != "AlreadyExistsError"  # its callers expect it
}


@pytest.mark.parametrize("uri", ["s3://bucket/out/x", "file:///data/out/x"])
@pytest.mark.parametrize("name", sorted(OF_OBSTORE))
def test_every_error_of_obstore_is_one_line_with_a_remedy(name: str, uri: str) -> None:
    line = str(store_errors.explain(OF_OBSTORE[name]("first\nsecond"), "create", uri, 2))

    assert uri in line
    assert "; " in line
    assert "\n" not in line
    assert uri.startswith("s3") or "AWS_" not in line


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_error_of_a_disk_is_one_line_with_a_remedy_for_disks(number: int) -> None:
    raised = GenericError(
        f"Generic LocalFileSystem error: Unable to open file: {os.strerror(number)} (os error {number})"
    )

    line = str(store_errors.explain(raised, "create", "file:///data/out/x", 2))

    assert os.strerror(number) in line
    assert "; " in line
    assert "AWS_" not in line


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_and_a_full_quota_of_a_disk_are_a_full_store(number: int) -> None:
    raised = GenericError(f"Generic LocalFileSystem error: {os.strerror(number)} (os error {number})")

    assert isinstance(store_errors.explain(raised, "create", "file:///data/out/x", 2), UnwritableStoreError)


def test_too_many_open_files_on_the_way_to_a_store_are_no_silent_store() -> None:
    raised = GenericError("Generic S3 error: tcp open error: Too many open files (os error 24)")

    assert "raise the limit of open files" in str(store_errors.explain(raised, "create", "s3://bucket/x", 2))
