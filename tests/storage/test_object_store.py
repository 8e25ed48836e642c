import contextlib
import errno
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, urlsplit

import pytest
from obstore.exceptions import AlreadyExistsError, GenericError
from servers import serving

from pia_batch.errors import ConfigError, ObjectExistsError, StorageError
from pia_batch.storage import filesystems, object_store, store_clients, store_errors
from pia_batch.storage.local_disk import DISK_REMEDIES, PASSING
from pia_batch.storage.object_store import Store
from pia_batch.storage.store_uris import absolute
from pia_batch.storage.uris import parse


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3"))


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "ATTEMPTS", 2)
    monkeypatch.setattr(store_clients, "REQUEST_TIMEOUT_S", 1.0)


# --- objects ---------------------------------------------------------------------------------------------------------


def test_what_is_created_is_read_back_and_cannot_be_created_again(any_store: Store) -> None:
    any_store.create("a/b.bin", b"first")

    with pytest.raises(ObjectExistsError, match=r"a/b\.bin exists"):
        any_store.create("a/b.bin", b"second")

    assert any_store.read("a/b.bin") == b"first"


def test_exactly_one_of_racing_creators_wins_and_its_bytes_stay(any_store: Store) -> None:
    racers = 4  # more queue for seconds at the test server

    for race in range(3):
        barrier = threading.Barrier(racers)

        def create(racer: int, name: str = f"race-{race}", barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            try:
                any_store.create(name, b"%d" % racer * 10_000)
            except ObjectExistsError:
                return False
            return True

        with ThreadPoolExecutor(racers) as pool:
            won = list(pool.map(create, range(racers)))

        assert won.count(True) == 1
        assert any_store.read(f"race-{race}") == b"%d" % won.index(True) * 10_000


def test_an_empty_object_is_an_object(any_store: Store) -> None:
    any_store.create("empty", b"")

    assert any_store.read("empty") == b""
    with pytest.raises(ObjectExistsError):
        any_store.create("empty", b"more")


def test_replace_writes_whatever_is_there(any_store: Store) -> None:
    any_store.replace("pointer", b"a longer text")
    any_store.replace("pointer", b"short")

    assert any_store.read("pointer") == b"short"


@pytest.mark.parametrize("num_bytes", [0, 10, 12_000_000])
def test_a_file_replaces_whatever_is_there_and_is_what_a_listing_shows(
    any_store: Store, tmp_path: Path, num_bytes: int
) -> None:
    path = tmp_path / "local"
    path.write_bytes(b"x" * num_bytes)
    any_store.replace("table", b"before")

    stored = any_store.replace_file("table", path)

    assert stored == any_store.stat("table")
    assert any_store.read("table") == b"x" * num_bytes
    path.write_bytes(b"y" * num_bytes)
    assert any_store.replace_file("table", path) != stored or not num_bytes


def test_unfinished_files_are_found_below_a_prefix_or_by_a_name(tmp_path: Path) -> None:
    for name in ("README.md#1", "README.md", "README.md#x", "READMES#2", "a/b#3", "a/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    store = Store(str(tmp_path))

    assert [item.name for item in store.staged("README.md")] == ["README.md#1"]
    assert [item.name for item in store.staged("a/")] == ["a/b#3"]


def test_reading_what_is_not_there_is_a_file_not_found_error_with_its_uri(any_store: Store) -> None:
    any_store.create("present", b"1")

    with pytest.raises(FileNotFoundError, match="absent"):
        any_store.read("absent")


def test_list_finds_names_and_sizes_below_a_prefix_only(any_store: Store) -> None:
    for name in ("x/1", "x/deep/2", "xy/3", "z"):
        any_store.create(name, name.encode())

    assert {item.name: item.num_bytes for item in any_store.list("x/")} == {"x/1": 3, "x/deep/2": 8}
    assert list(any_store.list("nothing/")) == []


def test_a_listing_of_many_pages_names_every_object_once_with_its_time(
    any_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "PAGE_OBJECTS", 2)
    names = [f"x/{k}" for k in range(5)]
    for name in names:
        any_store.create(name, b"1")

    found = list(any_store.list("x/"))

    assert sorted(item.name for item in found) == names
    assert all(abs(item.modified_s - time.time()) < 60 for item in [*found, any_store.stat("x/1")])


def test_deleting_removes_one_object_and_is_at_ease_where_there_is_none(any_store: Store) -> None:
    any_store.create("x/1", b"1")
    any_store.create("x/2", b"2")

    for _ in range(2):
        any_store.delete("x/1")

    assert [item.name for item in any_store.list("")] == ["x/2"]
    any_store.create("x/1", b"another")
    assert any_store.read("x/1") == b"another"


def test_read_all_keeps_the_order_that_was_asked_for(any_store: Store) -> None:
    names = [f"n{k:02d}" for k in range(20)]
    for name in names:
        any_store.create(name, name.encode())
    asked = names[::-1] + names[:3]

    assert list(any_store.read_all(asked, threads=4)) == [name.encode() for name in asked]
    assert list(any_store.read_all([])) == []


def test_a_store_pickles_also_after_use(any_store: Store) -> None:
    any_store.create("name", b"data")

    copy = pickle.loads(pickle.dumps(any_store))  # noqa: S301 - our own bytes

    assert copy.uri == any_store.uri
    assert copy.read("name") == b"data"


def test_check_accepts_a_store_that_creates_only_where_nothing_is(any_store: Store) -> None:
    any_store.check("_journal/create-only")
    any_store.check("_journal/create-only")

    assert [item.name for item in any_store.list("")] == ["_journal/create-only"]


def test_uri_of_is_what_other_readers_open(any_store: Store) -> None:
    any_store.create("deep/name.bin", b"data")
    filesystem, path = filesystems.arrow_filesystem(any_store.uri_of("deep/name.bin"))

    with filesystem.open_input_file(path) as file:
        assert file.read() == b"data"


def test_looking_at_an_output_that_is_not_there_creates_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "a" / "out"))

    assert list(store.list("")) == []
    with pytest.raises(FileNotFoundError):
        store.read("name")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_local_write_leaves_no_other_file(store: Store, tmp_path: Path) -> None:
    store.create("name", b"1")
    with pytest.raises(ObjectExistsError):
        store.create("name", b"2")

    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["name"]


@pytest.mark.parametrize(
    ("folder", "problem"),
    [
        ("file/out", "cannot create .*: Not a directory; a file has the name of a folder there"),
        ("file", "cannot create .*: File exists; a file, or a link to nothing, has the name of the folder"),
        ("dangling", "cannot create .*: File exists; a file, or a link to nothing, has the name of the folder"),
        ("loop/out", "cannot create .*: Too many levels of symbolic links; a symbolic link there points to itself"),
        ("n" * 300, "cannot create .*: File name too long; choose a shorter path"),
        ("/".join(["d" * 200] * 25), "cannot create .*: File name too long; choose a shorter path"),
    ],
)
def test_a_folder_that_cannot_be_is_refused_with_the_reason_and_its_remedy(
    tmp_path: Path, folder: str, problem: str
) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at all")
    store = Store(str(tmp_path / folder))

    with pytest.raises(StorageError, match=problem) as refused:
        store.create("name", b"")
    assert store.uri in str(refused.value)
    with pytest.raises((StorageError, FileNotFoundError)):
        store.read("name")


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV])
def test_a_disk_without_hard_links_is_refused_at_once(tmp_path: Path, number: int) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"^output: the file system of .*/out has no hard links.*such as ext4, XFS"):
        Store(str(tmp_path / "out")).check("_journal/probe", link)

    assert time.monotonic() - started < 0.5
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_check_of_hard_links_leaves_nothing_but_the_probe(tmp_path: Path) -> None:
    for _ in range(2):
        Store(str(tmp_path / "out")).check("_journal/probe")

    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["probe"]


@pytest.mark.parametrize("number", sorted(set(DISK_REMEDIES) - set(PASSING)))
def test_an_error_of_the_disk_that_lasts_is_one_line_with_a_remedy_at_once(store: Store, number: int) -> None:
    reason = os.strerror(number)
    texts = (
        GenericError(f"Generic LocalFileSystem error: Unable to open file x#1: {reason} (os error {number})\n\nDebug"),
        OSError(number, reason),
    )
    for raised in texts:
        started = time.monotonic()
        with pytest.raises(StorageError) as refused:
            store._attempt(lambda raised=raised: _raise(raised), "create", "x")

        assert str(refused.value) == f"cannot create {store.uri}/x: {reason}; {DISK_REMEDIES[number]}"
        assert time.monotonic() - started < 0.5


def _raise(err: Exception) -> None:
    raise err


def test_a_file_above_the_limit_of_this_process_is_refused_at_once(tmp_path: Path) -> None:
    program = (
        "import resource, time\n"
        "from pia_batch.storage.object_store import Store\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "started = time.monotonic()\n"
        f"try: Store({str(tmp_path)!r}).create('x', bytes(100_000))\n"
        "except Exception as err: print(type(err).__name__, err, time.monotonic() - started < 3)\n"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    remedy = DISK_REMEDIES[errno.EFBIG]
    assert done.stdout == f"StorageError cannot create {tmp_path.as_uri()}/x: File too large; {remedy} True\n"
    assert list(tmp_path.glob("x")) == []


def test_a_name_that_is_too_long_is_refused_at_once(store: Store) -> None:
    with pytest.raises(StorageError, match="File name too long; choose a shorter path"):
        store.create("x" * 300, b"")


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A disk with the options of the parameter."""
    done = subprocess.run(
        ["/bin/mount", "-t", "tmpfs", "-o", request.param, "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("only root can mount a disk")
    yield tmp_path
    subprocess.run(["/bin/umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("small_disk", ["size=1m,ro"], indirect=True)
def test_a_read_only_disk_is_refused_at_once(small_disk: Path) -> None:
    started = time.monotonic()

    with pytest.raises(StorageError, match=r"^cannot create .*/_journal/x: Read-only file system; "):
        Store(str(small_disk)).create("_journal/x", b"x" * 2**10)

    assert time.monotonic() - started < 0.5


@pytest.mark.parametrize("small_disk", ["size=64k"], indirect=True)
def test_a_full_disk_is_refused_at_the_start_and_waited_for_later(small_disk: Path) -> None:
    ballast, store = small_disk / "ballast", Store(str(small_disk / "out"))
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))

    with pytest.raises(StorageError, match="No space left on device; free some space there"):
        store.check("_journal/probe")
    timer = threading.Timer(0.5, ballast.unlink)
    timer.start()
    store.create("_journal/x", b"x" * 2**13)
    timer.join()

    assert store.read("_journal/x") == b"x" * 2**13


def test_spaces_and_percent_signs_in_the_name_of_the_output_are_kept(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "100% mine #1"))
    store.create("name", b"data")

    assert (tmp_path / "100% mine #1" / "name").read_bytes() == b"data"
    assert parse(store.uri_of("name")).target == str(tmp_path / "100% mine #1" / "name")


@pytest.mark.parametrize(
    ("key", "part", "remedy"),
    [
        ("a%20b", "%20", "percent-encoded"),
        ("day%3D1/x", "%3D", "percent-encoded"),
        ("a%2fb", "%2f", "percent-encoded"),
        ("a//b", "//", "an empty part"),
        ("/a", "/", "an empty part"),
        ("a/./b", ".", "write the path without it"),
        ("a/..", "..", "write the path without it"),
        ("a\\b", "\\", "backslash"),
        ("a\tb", r"\t", "control character"),
    ],
)
@pytest.mark.parametrize("scheme", ["s3", "s3a", "gs", "az", "S3"])
def test_a_prefix_that_clients_take_for_different_keys_is_refused_by_its_part(
    scheme: str, key: str, part: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        Store(f"{scheme}://bucket/{key}")

    assert f"cannot be a folder: '{part}' in it" in str(refused.value)
    assert remedy in str(refused.value)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("uri", ["gs://bucket/a#b", "az://bucket/a?b"])
def test_what_ends_the_path_of_a_url_is_refused_where_the_client_takes_the_uri_for_one(uri: str) -> None:
    with pytest.raises(ConfigError, match="ends the path of a URL; choose another path"):
        Store(uri)


@pytest.mark.parametrize(
    ("uri", "variable", "remedy"),
    [
        ("az://container/x", "", "Account must be specified; set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT"),
        ("abfss://c@account/x", "", "pattern for scheme: abfs://c@account/x; .* abfss://CONTAINER@ACCOUNT.dfs.core"),
        ("gs://b/x", "GOOGLE_APPLICATION_CREDENTIALS", "No such file .*; correct the URI, or GOOGLE_APPLICATION_CRED"),
    ],
)
def test_a_client_that_refuses_its_configuration_has_the_remedy_of_its_store(
    uri: str, variable: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    if variable:
        monkeypatch.setenv(variable, "/absent")

    with pytest.raises(ConfigError, match=rf"^cannot open {uri}: (?!Generic).*{remedy}"):
        Store(uri).create("name", b"")


@pytest.mark.parametrize("data", [b"", b"{", b"<html>Log in</html>", b"[]", b"null", b"{}", b"\xff", b"[" * 100_000])
def test_a_damaged_json_object_is_one_line_with_its_uri(store: Store, data: bytes) -> None:
    store.replace("state.json", data)

    with pytest.raises(StorageError, match=r"state.json is damaged: it is (empty|not the JSON .*); restore it, or del"):
        store.read_json("state.json", ("run_id",))
    store.replace("state.json", b'{"run_id": "r"}')
    assert store.read_json("state.json", ("run_id",)) == {"run_id": "r"}


def test_an_unknown_scheme_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="carrier-pigeon://coop/out"):
        Store("carrier-pigeon://coop/out").create("name", b"")


@pytest.mark.s3
@pytest.mark.usefixtures("s3")
def test_a_missing_bucket_says_so_and_what_to_do() -> None:
    store = Store("s3://no-such-bucket/out")

    with pytest.raises(StorageError, match="no such bucket or folder; create it"):
        store.create("name", b"data")
    with pytest.raises(StorageError, match="no such bucket or folder; create it"):
        list(store.list(""))


@pytest.mark.s3
def test_a_wrong_secret_is_refused_at_once_and_not_repeated_in_the_error(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-one")
    store, started = Store(s3), time.monotonic()

    for call in (lambda: store.create("n", b""), lambda: store.read("n"), lambda: list(store.list(""))):
        with pytest.raises(StorageError, match="check the credentials and the policy") as caught:
            call()
        assert "not-the-one" not in str(caught.value)
    assert time.monotonic() - started < 5


@pytest.mark.usefixtures("quick_retries")
def test_a_dead_server_is_a_storage_error_after_the_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    _point_clients_at(monkeypatch, f"http://127.0.0.1:{port}")

    with pytest.raises(StorageError, match="cannot create s3://bucket/out/name after 2 attempts"):
        Store("s3://bucket/out").create("name", b"data")


def test_a_listing_that_breaks_off_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, breaking_server: str) -> None:
    _point_clients_at(monkeypatch, breaking_server)
    monkeypatch.setattr(object_store, "PAGE_OBJECTS", 2)

    names = [item.name for item in Store("s3://bucket/out").list("x/")]

    assert names == [f"x/{k}" for k in range(4)]


def test_a_store_that_ignores_if_none_match_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, careless_server: str
) -> None:
    _point_clients_at(monkeypatch, careless_server)

    with pytest.raises(StorageError, match=r"s3://bucket/out: the store ignores conditional creation.*use a store"):
        Store("s3://bucket/out").check("_journal/create-only")


@pytest.mark.s3
@pytest.mark.usefixtures("quick_retries")
def test_a_create_whose_reply_was_lost_ends_as_exists_with_our_own_bytes(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = urlsplit(os.environ["AWS_ENDPOINT_URL"])
    assert upstream.hostname is not None
    assert upstream.port is not None
    with _ReplySwallower((upstream.hostname, upstream.port)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        store = Store(s3)

        with pytest.raises(ObjectExistsError):
            store.create("name", b"ours")

        assert proxy.swallowed == 1
        assert store.read("name") == b"ours"


# --- URIs ------------------------------------------------------------------------------------------------------------


def test_credentials_in_a_uri_are_refused_without_repeating_them() -> None:
    for uri in (
        "s3://key:secret@bucket/x",
        "s3a://key:sec/ret@bucket/x",
        "S3://key:secret@bucket/x",
        "abfs://key:secret@bucket/x",
    ):
        for use in (Store, absolute, filesystems.arrow_filesystem):
            with pytest.raises(ConfigError, match="AWS_ACCESS_KEY_ID") as caught:
                use(uri)
            assert "bucket/x" in str(caught.value)
            assert "key:" not in str(caught.value)
            assert "ret@" not in str(caught.value)


def test_what_is_no_uri_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="is not a URI"):
        Store("s3://[bucket/x")
    for uri in ("file:/tmp/x", "FILE:/tmp/x"):
        with pytest.raises(ConfigError, match="an unlikely path; write file:///FULL/PATH, or the path alone"):
            absolute(uri)


def test_paths_become_file_uris_and_uris_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")

    assert absolute("a b/c") == f"{tmp_path.as_uri()}/a%20b/c"
    assert absolute("~/c") == "file:///home/me/c"
    for uri in ("s3://bucket/a b", "file:///x", "abfs://container@account.dfs.core.windows.net/x"):
        assert absolute(uri) == uri


# --- servers ---------------------------------------------------------------------------------------------------------


def _point_clients_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture
def careless_server() -> Iterator[str]:
    """An HTTP server that says yes to every PUT, conditional or not."""

    class Careless(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            del args

    with serving(Careless) as address:
        yield address


@pytest.fixture
def breaking_server() -> Iterator[str]:
    """An S3 of four objects that gives two a page, and says no to every continuation, but not to a fresh listing."""

    class Breaking(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            after = query.get("start-after", [""])[0]
            names = [name for name in (f"out/x/{k}" for k in range(4)) if name > after]
            listed = "".join(
                f"<Contents><Key>{name}</Key><Size>1</Size><LastModified>2026-11-01T00:00:00.000Z</LastModified>"
                '<ETag>"1"</ETag></Contents>'
                for name in names[:2]
            )
            more = len(names) > 2
            token = "<NextContinuationToken>t</NextContinuationToken>" if more else ""
            body = (
                f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{token}{listed}</ListBucketResult>"
            ).encode()
            self.send_response(400 if "continuation-token" in query else 200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            del args

    with serving(Breaking) as address:
        yield address


class _ReplySwallower:
    """A TCP proxy that forwards the first connection's requests and keeps its replies; later ones pass."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self._upstream = upstream
        self._server = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._server]
        self.port = self._server.getsockname()[1]
        self.swallowed = 0

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._sockets:
            with _closed_is_fine():
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        first = True
        while True:
            client, _ = self._server.accept()
            up = socket.create_connection(self._upstream)
            self._sockets += [client, up]
            self._start(lambda source=client, sink=up: self._pump(source, sink.sendall))
            self._start(lambda source=up, sink=client.sendall if not first else self._keep: self._pump(source, sink))
            first = False

    def _keep(self, reply: bytes) -> None:
        self.swallowed += reply.startswith(b"HTTP/1.1 200")

    @staticmethod
    def _pump(source: socket.socket, sink: Callable[[bytes], object]) -> None:
        while data := source.recv(65536):
            sink(data)

    @staticmethod
    def _start(target: Callable[[], None]) -> None:
        def run() -> None:
            with _closed_is_fine():
                target()

        threading.Thread(target=run, daemon=True).start()


def _closed_is_fine() -> contextlib.suppress:
    return contextlib.suppress(OSError)


# --- faults that begin after the start -------------------------------------------------------------------------------


def test_a_checked_folder_that_is_gone_is_not_made_again(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"))
    store.check("_journal/probe")
    (tmp_path / "out").rename(tmp_path / "elsewhere")

    worker = pickle.loads(pickle.dumps(store))  # noqa: S301 - our own bytes
    calls = (
        lambda: worker.create("x", b""),
        lambda: store.replace("x", b""),
        lambda: store.read("x"),
        lambda: list(store.list("")),
    )
    for call in calls:
        with pytest.raises(StorageError, match=r"/out was removed, replaced or unmounted after the start; restore"):
            call()
    assert not (tmp_path / "out").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "out")
    store.create("x", b"1")
    assert store.read("x") == b"1"


def test_a_run_that_ends_waits_for_no_further_attempt(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "MAX_PAUSE_S", 600.0)
    calls = []

    def full() -> None:
        calls.append(1)
        raise OSError(errno.ENOSPC, "full")

    threading.Timer(0.2, store.stop_retrying).start()
    started = time.monotonic()
    for attempts in (2, 3):
        with pytest.raises(StorageError, match="No space left on device; free some space there"):
            store._attempt(full, "create", "x")
        assert len(calls) == attempts
    assert time.monotonic() - started < 5


ANSWERS = [
    ("RequestTimeTooSkewed", "403 Forbidden", "the clock of this machine differs too much"),
    ("ExpiredToken", "400 Bad Request", "the temporary ones have expired; renew them"),
    ("AccessDenied", "403 Forbidden", "check the credentials and the policy"),
    ("QuotaExceeded", "403 Forbidden", "raise its quota"),
    ("XMinioStorageFull", "507 Insufficient Storage", "raise its quota"),
    ("SlowDown", "503 Service Unavailable", "use fewer engines"),
    ("InternalError", "500 Internal Server Error", "look into the log"),
]


@pytest.mark.parametrize(("code", "status", "remedy"), ANSWERS)
def test_an_answer_of_a_store_is_one_line_with_its_remedy(code: str, status: str, remedy: str) -> None:
    text = (
        f"Generic S3 error: Server returned non-2xx status code: {status}: <Error><Code>{code}</Code></Error>\n\nDebug"
    )

    line = str(store_errors.explain(GenericError(text), "create", "s3://bucket/x", 1))

    assert line.startswith(("cannot create s3://bucket/x", "may not create s3://bucket/x"))
    assert remedy in line
    assert "\n" not in line


@pytest.mark.parametrize("code", ["ConditionalRequestConflict", "OperationAborted"])
def test_a_conflict_of_two_writes_is_tried_again_and_no_existing_object(code: str) -> None:
    text = f"Server returned non-2xx status code: 409 Conflict: <Error><Code>{code}</Code></Error>"

    assert store_errors.is_transient(AlreadyExistsError(text))
