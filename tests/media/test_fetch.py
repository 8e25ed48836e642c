"""Images by URI: from local folders, object storage and the web, as far as the policy goes."""

from __future__ import annotations

import errno
import os
import random
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import tls
from fsspec.registry import _registry
from inputs import png
from servers import serving

from pia_batch.config import ImagesConfig
from pia_batch.errors import ImageNotAllowedError, ImageUnavailableError, StorageError
from pia_batch.media import fetch
from pia_batch.media.fetch import read_image, read_image_head
from pia_batch.storage import filesystems
from pia_batch.storage.http_client import HttpReader
from pia_batch.storage.object_store import Store

NOWHERE = "file:///nowhere"


def limits(allow: tuple[str, ...] = (), max_bytes: int = 1000, timeout_s: float = 1.0) -> ImagesConfig:
    return ImagesConfig(allow=allow, max_bytes=max_bytes, timeout_s=timeout_s)


def image(uri: str, base: str = NOWHERE, *allow: str, **options: Any) -> bytes:
    return read_image(uri, base, limits(allow, **options))


def head(uri: str, num_bytes: int, base: str = NOWHERE, *allow: str, **options: Any) -> bytes:
    return read_image_head(uri, base, limits(allow, **options), num_bytes)


def refusal(uri: str, base: str = NOWHERE, *allow: str, **options: Any) -> str:
    with pytest.raises(ImageUnavailableError) as caught:
        image(uri, base, *allow, **options)
    if "more than" not in str(caught.value):  # the beginning of a large image may be had
        with pytest.raises(ImageUnavailableError):
            head(uri, 10, base, *allow, **options)
    assert str(caught.value).startswith("column 'image': ")
    return str(caught.value)


def not_allowed(uri: str, base: str = NOWHERE, *allow: str, **options: Any) -> str:
    with pytest.raises(ImageNotAllowedError) as caught:
        image(uri, base, *allow, **options)
    with pytest.raises(ImageNotAllowedError):
        head(uri, 10, base, *allow, **options)
    assert str(caught.value).startswith("column 'image': ")
    assert "allow more with images.allow" in str(caught.value)
    return str(caught.value)


# --- local files -----------------------------------------------------------------------------------------------------


def test_a_local_image_is_read_by_path_by_uri_and_relative_to_the_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "my manifest"
    (folder / "images").mkdir(parents=True)
    path = folder / "images" / "x.png"
    path.write_bytes(b"picture")

    for uri in (str(path), path.as_uri(), "images/x.png", "./images//x.png", "images/../images/x.png"):
        assert image(uri, folder.as_uri()) == b"picture"
    assert image("images/x.png", folder.as_uri() + "/") == b"picture"
    assert image("../my manifest/images/x.png", folder.as_uri()) == b"picture"
    assert image(f"file://localhost{path.as_uri()[7:]}", folder.as_uri()) == b"picture"


@pytest.mark.parametrize(
    "name",
    ["a b.png", "50%.png", "a%20b.png", "what?.png", "no#1.png", "käse.png", "a+b=c&d.png", "%2e%2e", "...", "~"],
)
def test_any_file_name_is_found_as_it_is_written(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"picture")

    for uri in (name, str(tmp_path / name), (tmp_path / name).as_uri()):
        assert image(uri, tmp_path.as_uri()) == b"picture"


def test_a_local_manifest_opens_its_own_folder_and_no_other(tmp_path: Path) -> None:
    for name in ("manifest/x.png", "manifest-evil/x.png", "other/x.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"picture")
    base = (tmp_path / "manifest").as_uri()

    assert image("x.png", base) == b"picture"
    for uri in ("../other/x.png", str(tmp_path / "other/x.png"), "../manifest-evil/x.png", "/etc/passwd", "../other"):
        text = not_allowed(uri, base)
        assert "images may come from the manifest's own folder; allow" in text
    other = str(tmp_path / "other")
    assert image("../other/x.png", base, other) == image(f"{other}/x.png", base, f"file://{other}/") == b"picture"
    assert f"the manifest's own folder and {other}; allow" in not_allowed("../manifest-evil/x.png", base, other)
    assert image("../other/x.png", base, f"{other}/x.png") == b"picture"  # an entry may be one file


def test_links_may_lead_within_the_folder_and_not_out_of_it(tmp_path: Path) -> None:
    folder, outside = tmp_path / "manifest", tmp_path / "outside"
    (folder / "deep").mkdir(parents=True)
    outside.mkdir()
    for path in (folder / "x.png", outside / "x.png"):
        path.write_bytes(str(path.parent.name).encode())
    (folder / "inside.png").symlink_to("x.png")
    (folder / "deep" / "up.png").symlink_to("../x.png")
    (folder / "out.png").symlink_to(outside / "x.png")
    (folder / "way").symlink_to(outside)
    (folder / "dangling-out").symlink_to(tmp_path / "nothing")
    (tmp_path / "alias").symlink_to(folder)

    assert image("inside.png", folder.as_uri()) == image("deep/up.png", folder.as_uri()) == b"manifest"
    assert image("x.png", (tmp_path / "alias").as_uri()) == b"manifest"
    for uri in ("out.png", "way/x.png", "deep/../way/x.png", "dangling-out", str(folder / "way" / "x.png")):
        not_allowed(uri, folder.as_uri())
    assert image("out.png", folder.as_uri(), str(outside)) == b"outside"
    (folder / "loop").symlink_to("loop")
    assert "cannot be opened" in refusal("loop", folder.as_uri())


def test_what_is_exchanged_for_a_link_after_the_check_is_not_followed(tmp_path: Path) -> None:
    """The race that a check by name loses, played between a file, and a folder, and a link out of the manifest."""
    folder, outside = tmp_path / "manifest", tmp_path / "outside"
    for place in (folder / "a", outside):
        place.mkdir(parents=True)
        (place / "x.png").write_bytes(str(place).encode())
    (tmp_path / "link").symlink_to(outside)
    (tmp_path / "filelink").symlink_to(outside / "x.png")
    done = threading.Event()

    def exchange() -> None:
        while not done.is_set():
            os.rename(folder / "a", tmp_path / "b")  # noqa: PTH104 - the plain system call
            os.rename(tmp_path / "link", folder / "a")  # noqa: PTH104
            os.rename(folder / "a", tmp_path / "link")  # noqa: PTH104
            os.rename(tmp_path / "b", folder / "a")  # noqa: PTH104

    thread = threading.Thread(target=exchange)
    thread.start()
    found = set()
    least, most = time.monotonic() + 1.5, time.monotonic() + 60  # on a busy machine few reads are in time
    while time.monotonic() < least or (str(folder / "a").encode() not in found and time.monotonic() < most):
        try:
            found.add(image("a/x.png", folder.as_uri(), timeout_s=0.001))
        except (ImageNotAllowedError, ImageUnavailableError) as err:
            found.add(type(err).__name__.encode())
    done.set()
    thread.join()

    assert str(outside).encode() not in found
    assert str(folder / "a").encode() in found


def test_exactly_the_cap_is_accepted_and_one_byte_more_is_not(tmp_path: Path) -> None:
    (tmp_path / "fits").write_bytes(bytes(1000))
    (tmp_path / "large").write_bytes(bytes(1001))

    assert len(image("fits", tmp_path.as_uri())) == 1000
    assert "large has more than 1000 bytes (images.max_bytes)" in refusal("large", tmp_path.as_uri())


def test_the_beginning_of_an_image_is_as_long_as_was_asked_for_or_all_of_it(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(5000)
    (tmp_path / "x").write_bytes(data)

    assert head("x", 1, tmp_path.as_uri()) == data[:1]
    assert head("x", 4096, tmp_path.as_uri()) == data[:4096]  # more than max_bytes: it is a beginning
    assert head("x", 9999, tmp_path.as_uri()) == data


def test_a_sparse_file_of_a_terabyte_is_refused_at_once(tmp_path: Path) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)

    assert "more than 1000 bytes" in refusal("huge", tmp_path.as_uri())


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/stdin", "/dev/tty", "/dev/null"])
def test_a_device_is_refused_and_not_read_even_where_it_is_allowed(tmp_path: Path, device: str) -> None:
    (tmp_path / "link").symlink_to(device)
    started = time.monotonic()

    for uri, base in ((device, NOWHERE), ("link", tmp_path.as_uri())):
        not_allowed(uri, base)
        with pytest.raises(
            (ImageUnavailableError, ImageNotAllowedError), match=r"not a regular file|not allowed|exist"
        ):
            image(uri, base, "/")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "path", ["/proc/self/environ", "/proc/cpuinfo", "/proc/self/root/proc/version", "/sys/kernel/mm"]
)
def test_what_the_kernel_shows_as_files_is_refused_even_where_everything_is_allowed(path: str) -> None:
    for uri in (path, "/" + path, path.replace("/proc", "/proc/.")):
        not_allowed(uri, NOWHERE, "/")


def test_missing_empty_and_other_than_files_say_why(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    base = tmp_path.as_uri()

    assert "absent does not exist" in refusal("absent", base)
    assert "dangling does not exist" in refusal("dangling", base)
    assert "; home folders and variables are not filled in; write the full path" in refusal("~/a.png", base)
    assert "empty is empty" in refusal("empty", base)
    assert "folder cannot be opened: not a regular file" in refusal("folder", base)
    assert "empty/x cannot be opened" in refusal("empty/x", base)
    assert "cannot be opened: it contains control characters" in refusal("nul\0byte", base)
    assert "cannot be opened: it contains control characters" in refusal(f"{base}/nul%00byte", base)
    assert "name too long" in refusal("x" * 3000, base)
    assert "not a regular file" in refusal("", base)


def test_a_pipe_and_a_socket_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    started = time.monotonic()

    assert "not a regular file" in refusal("pipe", tmp_path.as_uri())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket")[-100:] if len(str(tmp_path)) < 90 else "\0abstract")
        if (tmp_path / "socket").exists():
            assert "not a regular file" in refusal("socket", tmp_path.as_uri())
    assert time.monotonic() - started < 30


def test_a_file_without_permission_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(real: str) -> int:  # root may read everything
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), real)

    monkeypatch.setattr(fetch, "_open_regular", refuse)

    found = refusal("secret", tmp_path.as_uri())

    assert "secret may not be read: " in found
    assert found.endswith("; choose another path, or give this user access to it")


def test_an_error_is_text_that_every_result_can_hold(tmp_path: Path) -> None:
    os.symlink(b"\xff\xfe\n\x1b[31m", os.fsencode(tmp_path / "odd"))  # noqa: PTH211 - a name that is no text

    for uri in ("odd", "esc\x1b[31m", "a\u202eb", "x\ud800"):
        with pytest.raises((ImageUnavailableError, ImageNotAllowedError)) as caught:
            image(uri, tmp_path.as_uri())
        text = str(caught.value)
        assert text.encode().isascii() or text.isprintable()
        assert text.isprintable()


# --- object storage --------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_clients() -> Iterator[None]:
    """Clients for reading are kept for the life of the process, with the credentials they were made with."""
    forget_clients()
    yield
    forget_clients()


def forget_clients() -> None:
    filesystems._other_filesystem.cache_clear()
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def point_clients_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.s3
def test_an_s3_image_is_read_by_uri_and_relative_to_the_manifest(s3: str) -> None:
    store = Store(s3)
    names = ["images/x.png", "images/a b.png", "images/50%.png", "images/a%20b.png", "images/no#1.png", "i/what?.png"]
    filesystem = fsspec.filesystem("s3")
    for name in names:
        filesystem.pipe_file(f"{s3}/{name}", name.encode())

    for name in names:
        assert image(store.uri_of(name), s3, timeout_s=10) == name.encode()
        assert image(name, s3, timeout_s=10) == name.encode()
        assert image(f"../{name}", f"{s3}/manifest", timeout_s=10) == name.encode()
        assert image(store.uri_of(name).replace("s3://", "S3A://"), NOWHERE, s3, timeout_s=10) == name.encode()
        assert head(name, 3, s3, timeout_s=10) == name.encode()[:3]
        assert head(name, 99, s3, timeout_s=10) == name.encode()
    not_allowed(store.uri_of(names[0]), "s3://other/manifest")
    not_allowed(store.uri_of(names[0]), NOWHERE, f"{s3}/image")
    assert image(store.uri_of(names[0]), NOWHERE, f"{s3}/images", timeout_s=10) == names[0].encode()


@pytest.mark.s3
def test_images_on_s3_that_cannot_be_used_say_why(s3: str) -> None:
    store = Store(s3)
    store.create("folder/big", bytes(1001))
    store.create("fits", bytes(1000))
    store.create("empty", b"")
    started = time.monotonic()

    assert "does not exist" in refusal("absent", s3, timeout_s=60)
    with pytest.raises(ImageUnavailableError, match=r"does not exist.*create it, or correct the URI"):
        image("s3://no-such-bucket/x.png", s3, "s3://no-such-bucket", timeout_s=60)
    assert "more than 1000 bytes" in refusal("folder/big", s3, timeout_s=60)
    assert len(head("folder/big", 1001, s3, timeout_s=60)) == 1001
    assert len(image("fits", s3, timeout_s=60)) == 1000
    assert "is empty" in refusal("empty", s3, timeout_s=60)
    assert "does not exist" in refusal("folder", s3, timeout_s=60)
    assert "cannot be opened: a prefix, not an object" in refusal(f"{s3}/folder/", s3, timeout_s=60)
    assert "cannot be opened: a prefix, not an object" in refusal("s3://pia", s3, timeout_s=60)
    assert time.monotonic() - started < 50  # none of them waits until its time is over


@pytest.mark.s3
@pytest.mark.usefixtures("fresh_clients")
def test_a_wrong_secret_is_no_fault_of_an_image(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-one")

    with pytest.raises(StorageError, match="the secret key does not belong to the access key") as caught:
        image("x.png", s3, timeout_s=10)

    assert str(caught.value).startswith("column 'image': x.png")
    assert "not-the-one" not in str(caught.value)


class FakeS3(BaseHTTPRequestHandler):
    """One bucket whose objects misbehave as their names say."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[tuple[str, str | None]]] = []
    sent = 0

    def do_GET(self) -> None:
        FakeS3.seen.append((self.path, self.headers["Range"]))
        name = self.path.rsplit("/", 1)[-1]
        self.send_response(200)
        self.send_header("ETag", '"1"')
        if name.startswith("liar"):  # says little, sends without end
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"10000\r\n" + bytes(65536) + b"\r\n")
                    FakeS3.sent += 65536
            except OSError:
                return
        if name.startswith("huge"):
            self.send_header("Content-Length", str(10**12))
            self.end_headers()
            self.close_connection = True
            return
        self.send_header("Content-Length", "7")
        self.end_headers()
        self.wfile.write(b"picture")

    def log_message(self, *args: object) -> None:
        del args


@pytest.fixture
def fake_s3(monkeypatch: pytest.MonkeyPatch, fresh_clients: None) -> Iterator[type[FakeS3]]:
    del fresh_clients
    FakeS3.seen, FakeS3.sent = [], 0
    with serving(FakeS3) as address:
        point_clients_at(monkeypatch, address)
        yield FakeS3
        forget_clients()


def test_an_image_on_s3_costs_one_request_and_may_name_a_version(fake_s3: type[FakeS3]) -> None:
    assert image("s3://photos/a/x.png", "s3://photos/m", timeout_s=5) == b"picture"
    assert image("s3://photos/a/x.png?versionId=3", "s3://photos/m", timeout_s=5) == b"picture"
    assert head("s3://photos/a/x.png", 4, "s3://photos/m", timeout_s=5) == b"pict"

    assert fake_s3.seen == [
        ("/photos/a/x.png", None),
        ("/photos/a/x.png?versionId=3", None),
        ("/photos/a/x.png", "bytes=0-3"),
    ]


@pytest.mark.parametrize("name", ["liar.png", "huge.png"])
def test_a_store_that_sends_more_than_it_should_is_not_listened_to(fake_s3: type[FakeS3], name: str) -> None:
    started = time.monotonic()

    with pytest.raises(ImageUnavailableError, match="more than 1000 bytes"):
        image(f"s3://photos/{name}", "s3://photos", timeout_s=20)
    if name == "liar.png":
        assert head(f"s3://photos/{name}", 100, "s3://photos", timeout_s=20) == bytes(100)

    assert time.monotonic() - started < 15
    assert fake_s3.sent < 64 * 2**20  # what the sockets of both ends hold


@pytest.mark.usefixtures("fresh_clients")
def test_a_server_that_never_answers_costs_no_more_than_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=16) as silent:
        point_clients_at(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()

        with pytest.raises(ImageUnavailableError, match="could not be read in time"):
            image("s3://bucket/x.png", "s3://bucket", timeout_s=1.0)

        assert time.monotonic() - started < 20


class FakeGcs(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]  # fsspec is untyped
    """A store for which fsspec has a synchronous client; the first requests may fail."""

    protocol = "gs"
    failures = 0
    store: ClassVar[dict[str, Any]] = {}

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("gs://").lstrip("/")

    def cat_file(self, path: str, **options: int) -> bytes:
        if FakeGcs.failures:
            FakeGcs.failures -= 1
            raise ConnectionResetError
        return bytes(super().cat_file(path, **options))


@pytest.fixture
def fake_gcs() -> Iterator[type[FakeGcs]]:
    fsspec.register_implementation("gs", FakeGcs, clobber=True)
    filesystems._other_filesystem.cache_clear()
    filesystem = fsspec.filesystem("gs")
    filesystem.pipe_file("/photos/x.png", b"picture")
    filesystem.pipe_file("/photos/big.png", bytes(1001))
    filesystem.pipe_file("/photos/empty.png", b"")
    yield FakeGcs
    filesystems._other_filesystem.cache_clear()
    _registry.pop("gs")


def test_other_stores_are_read_by_the_same_rules(fake_gcs: type[FakeGcs]) -> None:
    del fake_gcs
    base = "gs://photos/manifest"

    assert image("../x.png", base) == image("gcs://photos/x.png", base) == b"picture"
    assert head("gs://photos/x.png", 3, base) == b"pic"
    assert "more than 1000 bytes" in refusal("gs://photos/big.png", base)
    assert head("gs://photos/big.png", 1001, base) == bytes(1001)
    assert "is empty" in refusal("gs://photos/empty.png", base)
    assert "does not exist" in refusal("gs://photos/absent.png", base)
    assert "a prefix, not an object" in refusal("gs://photos/", base)
    not_allowed("gs://other/x.png", base)


def test_a_passing_fault_is_tried_again_until_the_image_is_there(fake_gcs: type[FakeGcs]) -> None:
    fake_gcs.failures = 2
    assert image("gs://photos/x.png", "gs://photos", timeout_s=10.0) == b"picture"
    fake_gcs.failures = 1000
    with pytest.raises(ImageUnavailableError, match="could not be read in time: ConnectionResetError"):
        image("gs://photos/x.png", "gs://photos", timeout_s=0.5)
    fake_gcs.failures = 0


def test_a_store_without_its_client_says_what_to_install() -> None:
    with pytest.raises(StorageError, match="cannot be opened: abfs:// needs the package adlfs"):
        image("abfs://photos@account.dfs.core.windows.net/x.png", NOWHERE, "abfs://photos@account.dfs.core.windows.net")


# --- what is no URI --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://[bucket/x", "invalid name of a bucket"),
        ("s3://bu\u2100cket/x", "invalid name of a bucket"),
        ("s3://", "invalid name of a bucket"),
        ("s3://key:secret@bucket/x.png", "s3://bucket/x.png was given with credentials"),
        ("memory://x", "scheme 'memory' is not supported; use a local path, file://, s3://"),
        ("ftp://host/x.png", "scheme 'ftp' is not supported"),
        ("local:///etc/passwd", "scheme 'local' is not supported"),
        ("simplecache://s3://bucket/x", "scheme 'simplecache' is not supported"),
        ("file://host/etc/passwd", "without a host"),
        ("https://[::1/x", "the host is not an IPv6 address"),
        ("https://host:99999999/x", "the port is not a number"),
    ],
)
def test_what_is_no_uri_of_ours_fails_the_image_and_not_the_run(uri: str, reason: str) -> None:
    text = refusal(uri, timeout_s=0.1)

    assert reason in text
    assert "secret" not in text


def test_a_relative_path_needs_a_manifest_where_images_can_be() -> None:
    assert "is relative, and images cannot be relative to https://host/m" in refusal(
        "x.png", "https://key:word@host/m?sig=1"
    )
    assert "is relative, and images cannot be relative to memory://m" in refusal("x.png", "memory://m")


def test_the_column_that_an_error_names_can_be_another(tmp_path: Path) -> None:
    for read in (
        lambda: read_image("x", tmp_path.as_uri(), limits(), column="ip_adapter_image"),
        lambda: read_image_head("x", tmp_path.as_uri(), limits(), 9, column="ip_adapter_image"),
    ):
        with pytest.raises(ImageUnavailableError, match="column 'ip_adapter_image': x does not exist"):
            read()


def test_many_threads_read_at_once(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    found: dict[int, bytes] = {}

    def work(number: int) -> None:
        for _ in range(50):
            found[number] = fetch.read_image(f"{number}.png", tmp_path.as_uri(), limits(max_bytes=10**6))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == {number: png(number) for number in range(8)}


# --- certificates ----------------------------------------------------------------------------------------------------


async def _anywhere(host: str, port: int) -> list[str]:
    del host, port
    return ["127.0.0.1"]


def _over_tls(context: ssl.SSLContext, host: str, trusted: Path | None) -> str:
    """Error of an image on a server with this context, or its text."""
    through = HttpReader(
        _anywhere, lambda _: True, None if trusted is None else ssl.create_default_context(cafile=str(trusted))
    )
    with serving(_ImageHandler) as plain, tls.ending_tls(context, int(plain.rpartition(":")[2])) as url:
        there = f"https://{host}:{url.rpartition(':')[2]}"
        try:
            return read_image(f"{there}/a.png", NOWHERE, limits((there,), timeout_s=20), http=through).decode()
        except ImageUnavailableError as err:
            return str(err)


class _ImageHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"image")

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_certificate_that_is_not_trusted_is_named_at_once_with_the_setting_that_trusts_it(tmp_path: Path) -> None:
    bundle, context = tls.authority(tmp_path)

    began = time.monotonic()
    unknown = _over_tls(context, "127.0.0.1", None)
    elsewhere = _over_tls(context, "images.example.com", bundle)

    assert time.monotonic() - began < 10  # of the 20 s that each may take
    assert re.fullmatch(
        r"column 'image': https://127\.0\.0\.1:\d+/a\.png cannot be opened: the certificate of the server is not "
        r"trusted \(unable to get local issuer certificate\); name the certificates of your network by .*SSL_CERT_.*",
        unknown,
    )
    assert "not trusted (Hostname mismatch, certificate is not valid for 'images.example.com'" in elsewhere
    assert elsewhere.endswith("; use a name that the certificate has")
    assert _over_tls(context, "127.0.0.1", bundle) == "image"


def test_ssl_cert_file_names_the_authority_of_https_images(tmp_path: Path) -> None:
    bundle, context = tls.authority(tmp_path)
    with tls.ending_tls(context, 1) as url:
        program = (
            "import ssl, sys, urllib.parse, socket\n"
            "from pia_batch.storage.http_client import HttpReader\n"
            "import asyncio\n"
            "async def anywhere(*_): return ['127.0.0.1']\n"
            "reader = HttpReader(anywhere, lambda _: True)\n"
            "try: asyncio.run(reader.read(sys.argv[1], str, 9))\n"
            "except Exception as err: print(err)\n"
        )
        printed = [
            subprocess.run(
                [sys.executable, "-c", program, url],
                env=os.environ | extra,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for extra in ({}, {"SSL_CERT_FILE": str(bundle)})
        ]

    assert ["CERTIFICATE_VERIFY_FAILED" in each for each in printed] == [True, False]
