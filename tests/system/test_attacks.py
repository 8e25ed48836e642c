"""Hostile URIs of a manifest: none of them connects, reads or reveals what it must not.

Every connection that this process opens is counted where Python's own audit hooks report it, and a listener on the
loopback addresses plays what an attacker wants to reach.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import requests_table

from pia_batch.config import ImagesConfig, RunConfig
from pia_batch.errors import ConfigError, ImageNotAllowedError, ImageUnavailableError, RequestError
from pia_batch.manifest.validation import check
from pia_batch.media import fetch as sources
from pia_batch.media.fetch import read_image, read_image_head
from pia_batch.pipeline.request_rows import with_row_error
from pia_batch.pipeline.stages import FetchImages
from pia_batch.storage import http_client, uris
from pia_batch.storage.http_client import HttpReader, is_public

NOWHERE = "file:///nowhere"
SERVER, SENTINEL = "127.0.0.2", "127.0.0.1"
"""Two addresses of this machine: the one that tests call public, and the one that no request may reach."""

CONNECTED: list[Any] = []


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        CONNECTED.append(arguments[1])


sys.addaudithook(_record)


@pytest.fixture
def connections() -> list[Any]:
    """The address of every connection that was tried since the test began."""
    CONNECTED.clear()
    return CONNECTED


class Handler(BaseHTTPRequestHandler):
    """Answers as the path says: /status/404, /to/<number of redirects>, /away?<URL>, and a few more."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        kind, _, rest = self.path.lstrip("/").partition("/")
        try:
            getattr(self, f"_{kind.partition('?')[0].partition('.')[0]}", self._x)(rest)
        except OSError:  # the client has heard enough
            self.close_connection = True

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _x(self, _: str) -> None:
        self._answer(200, b"picture", Content_Type="text/html", Set_Cookie="a=b")

    def _status(self, rest: str) -> None:
        status = int(rest.partition("?")[0])
        self._answer(status, b"" if status == 204 else b"no")

    def _flaky(self, _: str) -> None:
        self._answer(503 if len(self.server.requests) < 3 else 200, b"picture")

    def _to(self, rest: str) -> None:
        left = int(rest)
        self._answer(302, b"", Location=f"/to/{left - 1}" if left > 1 else "/x.png", Set_Cookie="session=1")

    def _away(self, _: str) -> None:
        self._answer(301, b"moved", Location=self.path.partition("?")[2])

    def _decoded(self, _: str) -> None:
        self._answer(301, b"moved", Location=unquote(self.path.partition("?")[2]))

    def _large(self, _: str) -> None:
        self._answer(200, b"", Content_Length=str(10**12))

    def _endless(self, _: str) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while True:
            self.wfile.write(b"10000\r\n" + bytes(65536) + b"\r\n")
            self.server.sent += 65536

    def _drip(self, rest: str) -> None:
        if rest == "body":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
        while not self.server.closing:
            self.wfile.write(b"x")
            time.sleep(0.05)

    def _headers(self, _: str) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while not self.server.closing:
            self.wfile.write(b"X-More: " + b"x" * 1000 + b"\r\n")

    def _gzip(self, _: str) -> None:
        self._answer(200, b"\x1f\x8b" + bytes(9), Content_Encoding="gzip")

    def _short(self, _: str) -> None:
        self._answer(200, b"pic", Content_Length="7")
        self.close_connection = True

    def _range(self, _: str) -> None:
        asked = self.headers["Range"]
        if asked is None:
            self._answer(200, b"picture")
        else:
            end = int(asked.rpartition("-")[2])
            self._answer(206, b"picture"[: end + 1])

    def _nothing(self, _: str) -> None:
        self._answer(416 if self.headers["Range"] else 200)

    def log_message(self, *args: object) -> None:
        del args


class Server(ThreadingHTTPServer):
    def __init__(self, address: str, port: int = 0) -> None:
        super().__init__((address, port), Handler)
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.sent = 0
        self.closing = False


@pytest.fixture
def server() -> Iterator[Server]:
    """A web server that is allowed, and a sentinel at the same port of an address that is not."""
    with Server(SERVER) as allowed, Server(SENTINEL, allowed.server_port) as sentinel:
        threads = [
            threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.02}) for one in (allowed, sentinel)
        ]
        for thread in threads:
            thread.start()
        try:
            yield allowed
            assert sentinel.requests == []
        finally:
            allowed.closing = sentinel.closing = True
            for one in (allowed, sentinel):
                one.shutdown()
            for thread in threads:
                thread.join()


def names(table: dict[str, Sequence[str]]) -> Callable[[str, int], Any]:
    """A resolver that knows these hosts."""

    async def resolve(host: str, port: int) -> Sequence[str]:
        del port
        if host not in table:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return table[host]

    return resolve


HOSTS = {"images.example.com": [SERVER], "cdn.example.com": [SERVER], "inside.example.com": [SENTINEL]}
INTERNET = HttpReader(resolve=names(HOSTS), is_public=lambda address: address == SERVER)
"""An internet of one server."""


def fetch(uri: str, *allow: str, base: str = NOWHERE, through: HttpReader = INTERNET, timeout_s: float = 5.0) -> bytes:
    return read_image(uri, base, ImagesConfig(allow=allow, max_bytes=1000, timeout_s=timeout_s), http=through)


def refused(uri: str, *allow: str, **options: Any) -> str:
    with pytest.raises((ImageNotAllowedError, ImageUnavailableError)) as caught:
        fetch(uri, *allow, **options)
    return str(caught.value)


# --- what is allowed works ------------------------------------------------------------------------------------------


def test_an_image_of_an_allowed_host_is_read_and_the_instruments_see_it(server: Server, connections: list[Any]) -> None:
    here = f"http://images.example.com:{server.server_port}"

    assert fetch(f"{here}/a/x.png?size=3#top", f"{here}/a") == b"picture"

    assert connections == [(SERVER, server.server_port)]
    ((path, headers),) = server.requests
    assert path == "/a/x.png?size=3"
    assert headers["Host"] == f"images.example.com:{server.server_port}"
    assert headers["Accept-Encoding"] == "identity"
    assert not {"Authorization", "Cookie", "Referer", "Proxy-Authorization", "Range"} & set(headers)


def test_the_beginning_of_an_image_is_asked_for_and_no_more_is_read(server: Server) -> None:
    here = f"http://images.example.com:{server.server_port}"
    images = ImagesConfig(allow=(here,), timeout_s=5)

    def head(path: str, num_bytes: int) -> bytes:
        return read_image_head(f"{here}/{path}", NOWHERE, images, num_bytes, http=INTERNET)

    assert (head("range", 4), head("range", 99), head("x.png", 4)) == (b"pict", b"picture", b"pict")
    assert server.requests[0][1]["Range"] == "bytes=0-3"
    assert head("endless", 70_000) == bytes(70_000)
    assert server.sent < 64 * 2**20
    with pytest.raises(ImageUnavailableError, match="is empty"):
        head("nothing", 10)


def test_redirects_are_followed_a_few_times_without_cookies_and_every_host_must_be_allowed(server: Server) -> None:
    here, cdn = (f"http://{host}.example.com:{server.server_port}" for host in ("images", "cdn"))

    assert fetch(f"{here}/to/3", here) == b"picture"
    assert all("Cookie" not in headers for _, headers in server.requests)
    assert "more than 3 redirects" in refused(f"{here}/to/4", here)
    assert fetch(f"{here}/away?{cdn}/x.png", here, cdn) == b"picture"
    text = refused(f"{here}/away?{cdn}/x.png", here)
    assert f"redirects to {cdn}/x.png, which is not allowed" in text
    assert "redirect" in refused(f"{here}/a/../away?/x.png".replace("/a/..", ""), f"{here}/away")


def test_a_passing_fault_of_a_server_is_tried_again(server: Server) -> None:
    here = f"http://images.example.com:{server.server_port}"

    assert fetch(f"{here}/flaky", here) == b"picture"
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("status", "says", "repeated"),
    [
        (404, "does not exist: the server answered 404", False),
        (410, "does not exist", False),
        (401, "may not be read: the server answered 401", False),
        (403, "may not be read", False),
        (400, "cannot be opened: the server answered 400", False),
        (204, "cannot be opened: the server answered 204", False),
        (206, "cannot be opened: the server answered 206", False),
        (500, "could not be read in time: the server answered 500", True),
        (429, "could not be read in time: the server answered 429", True),
    ],
)
def test_what_a_server_answers_is_reported(server: Server, status: int, says: str, repeated: bool) -> None:
    here = f"http://images.example.com:{server.server_port}"

    assert f"{here}/status/{status} {says}" in refused(f"{here}/status/{status}?sig=secret", here, timeout_s=2.0)
    assert (len(server.requests) > 1) == repeated


# --- what a server tries --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("large", "has more than 1000 bytes"),
        ("endless", "has more than 1000 bytes"),
        ("gzip", "the server sent compressed content"),
        ("short", "could not be read in time"),
        ("drip/body", "could not be read in time"),
        ("drip/start", "could not be read in time"),
        ("headers", "could not be read in time"),
    ],
)
def test_a_hostile_answer_is_bounded_in_time_and_size(server: Server, path: str, says: str) -> None:
    here, started = f"http://images.example.com:{server.server_port}", time.monotonic()

    assert says in refused(f"{here}/{path}", here, timeout_s=1.0)

    assert time.monotonic() - started < 20  # of an answer without an end
    assert server.sent < 64 * 2**20  # what the sockets of both ends hold


REDIRECTS = [
    "http://{sentinel}:{port}/x.png",
    "http://localhost:{port}/x.png",
    "http://inside.example.com:{port}/x.png",
    "//{sentinel}:{port}/x.png",
    "http://images.example.com:{port}@{sentinel}:{port}/x.png",
    "http://key:word@images.example.com:{port}/x.png",
    "http://2130706433:{port}/x.png",
    "http://169.254.169.254/latest/meta-data/",
    "https://images.example.com:{port}/x.png",
    "http://images.example.com/x.png",
    "file:///etc/passwd",
    "s3://photos/x.png",
    "gopher://{sentinel}:{port}/_x",
    "ftp://{sentinel}/x",
    "data:image/png;base64,AAAA",
    "javascript:alert(1)",
    "\\\\{sentinel}\\x",
    "http:\\\\{sentinel}:{port}\\x.png",
    "http://[::1]:{port}/x.png",
    "http://[invalid/x",
    "http://images.example.com:{port}/%2e%2e/x.png",
    "http://images.example.com:{port}evil/x.png",
    "http://images.example.com.evil.example:{port}/x.png",
    "http://images\u3002example\u3002com:{port}/x.png",
]


@pytest.mark.parametrize("location", REDIRECTS)
def test_a_redirect_leads_nowhere_that_is_not_allowed(server: Server, connections: list[Any], location: str) -> None:
    port = server.server_port
    here = f"http://images.example.com:{port}"
    location = location.format(sentinel=SENTINEL, port=port)
    # Even where the operator opened object storage, files, and a name that leads inside.
    allow = (here, "s3://photos/", "/", f"http://inside.example.com:{port}")

    refused(f"{here}/away?{location}", *allow, timeout_s=1.0)

    assert set(connections) <= {(SERVER, port)}


@pytest.mark.parametrize("location", ["file:///etc/hostname", "s3://photos/x.png"])
def test_a_redirect_stays_on_the_web_also_where_the_other_place_is_allowed(server: Server, location: str) -> None:
    here = f"http://images.example.com:{server.server_port}"

    text = refused(f"{here}/away?{location}", here, "/", "s3://photos/")

    assert f"redirects to {location}, which is not an http or https URL" in text


# --- addresses -------------------------------------------------------------------------------------------------------

INSIDE = [
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "0177.0.0.1",
    "0x7f.0.0.1",
    "0x7f000001",
    "2130706433",
    "017700000001",
    "0",
    "0.0.0.0",  # noqa: S104 - nothing is bound
    "127.0.0.1.",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "ip6-localhost",
    "169.254.169.254",
    "2852039166",
    "0xA9FEA9FE",
    "0xa9.0xfe.0xa9.0xfe",
    "0251.0376.0251.0376",
    "169.254.43518",
    "100.100.100.200",
    "168.63.129.16",
    "10.0.0.1",
    "192.168.0.1",
    "172.16.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::ffff:0:7f00:1]",
    "[::127.0.0.1]",
    "[0:0:0:0:0:ffff:a9fe:a9fe]",
    "[64:ff9b::a9fe:a9fe]",
    "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]",
    "[2001:0:7f00:1::]",
    "[fd00:ec2::254]",
    "[fe80::1]",
    "[fec0::1]",
    "[ff02::1]",
]


@pytest.mark.parametrize("host", INSIDE)
def test_no_spelling_of_an_inner_address_is_connected_to_even_where_it_is_allowed(
    server: Server, connections: list[Any], host: str
) -> None:
    url = f"http://{host}:{server.server_port}/x.png"

    assert "is not allowed" in refused(url, through=HttpReader())
    text = refused(url, f"http://{host}:{server.server_port}", through=HttpReader(), timeout_s=1.0)

    assert connections == []
    if host.strip("[]").replace(".", "").isdigit() or ":" in host:
        assert "is not a host on the public internet" in text


NO_HOSTS = [
    "[fe80::1%25lo]",
    "[::1%25]",
    "①②⑦.⓪.⓪.①",
    "127。0。0。1",
    "loc\u00adalhost",
    "xn--",
    "a..b",
    "-a",
    "a" * 64,
]


@pytest.mark.parametrize("host", NO_HOSTS)
def test_a_host_that_programs_read_in_several_ways_is_no_host(connections: list[Any], host: str) -> None:
    refused(f"http://{host}/x.png", through=HttpReader(), timeout_s=0.5)
    with pytest.raises(ConfigError, match=r"images\.allow"):
        RunConfig.load(None, {"manifest": "m", "output": "o", "images.allow": [f"http://{host}/"]})
    assert connections == []


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["8.8.8.8", "127.0.0.1"],
        ["2606:4700::1111", "::1"],
        ["169.254.169.254"],
        ["fe80::1%lo"],
        ["nonsense"],
        [],
    ],
)
def test_one_inner_address_among_those_of_a_name_is_enough_to_refuse_it(
    connections: list[Any], addresses: list[str]
) -> None:
    through = HttpReader(resolve=names({"images.example.com": addresses}))

    text = refused("https://images.example.com/x.png", "https://images.example.com", through=through)

    assert "images.example.com is not a host on the public internet" in text
    assert connections == []


def test_an_address_stands_for_itself_whatever_a_resolver_says_of_it(server: Server, connections: list[Any]) -> None:
    here = f"http://{SENTINEL}:{server.server_port}"
    through = HttpReader(resolve=names({SENTINEL: [SERVER]}), is_public=INTERNET.is_public)

    assert "is not a host on the public internet" in refused(f"{here}/x.png", here, through=through)
    assert connections == []


def test_a_name_is_resolved_once_and_the_checked_address_is_connected_to(
    server: Server, connections: list[Any]
) -> None:
    answers = [[SERVER]] + [[SENTINEL]] * 9
    asked = []

    async def flipping(host: str, port: int) -> Sequence[str]:
        asked.append((host, port))
        return answers[len(asked) - 1]

    here = f"http://images.example.com:{server.server_port}"
    through = HttpReader(resolve=flipping, is_public=lambda address: address == SERVER)

    assert fetch(f"{here}/x.png", here, through=through) == b"picture"
    assert asked == [("images.example.com", server.server_port)]
    assert connections == [(SERVER, server.server_port)]
    assert "not a host on the public internet" in refused(f"{here}/x.png", here, through=through)
    assert len(connections) == 1


def test_each_redirect_is_resolved_and_checked_again(server: Server, connections: list[Any]) -> None:
    answers = iter([[SERVER], [SENTINEL]])

    async def flipping(host: str, port: int) -> Sequence[str]:
        del host, port
        return next(answers)

    here = f"http://images.example.com:{server.server_port}"
    through = HttpReader(resolve=flipping, is_public=lambda address: address == SERVER)

    assert "not a host on the public internet" in refused(f"{here}/to/1", here, through=through)
    assert connections == [(SERVER, server.server_port)]


def test_names_that_do_not_exist_say_so_and_a_silent_resolver_is_not_waited_for_for_ever() -> None:
    async def silent(host: str, port: int) -> Sequence[str]:
        del host, port
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    allow, url = "https://images.example.com", "https://images.example.com/x.png"

    assert "does not exist: no such host: images.example.com" in refused(
        url, allow, through=HttpReader(resolve=names({}))
    )
    assert "could not be read in time: Temporary failure" in refused(
        url, allow, through=HttpReader(resolve=silent), timeout_s=0.5
    )


@settings(max_examples=300, deadline=None)
@given(st.ip_addresses())
def test_whatever_python_calls_special_is_not_public(address: Any) -> None:
    special = address.is_private or address.is_loopback or address.is_link_local or address.is_multicast
    special = special or address.is_unspecified or address.is_reserved

    assert not (special and is_public(str(address)))
    assert not is_public(f"::ffff:{address}")
    assert not is_public(f"64:ff9b::{address}")


def test_public_addresses_are_public() -> None:
    for address in ("8.8.8.8", "1.1.1.1", "93.184.215.14", "2606:4700::1111", "2a00:1450:4001:81b::200e"):
        assert is_public(address)
    for host in INSIDE:
        assert not is_public(host.strip("[]"))


# --- proxies, credentials, TLS ---------------------------------------------------------------------------------------


def test_the_environment_gives_no_proxy_and_no_password(
    server: Server, connections: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://{SENTINEL}:{server.server_port}")
    (tmp_path / "netrc").write_text("machine images.example.com login me password word\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    here = f"http://images.example.com:{server.server_port}"

    assert fetch(f"{here}/x.png", here) == b"picture"

    assert connections == [(SERVER, server.server_port)]
    assert "Authorization" not in server.requests[0][1]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate of images.example.com, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "images.example.com")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("images.example.com")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return path


def test_over_tls_the_name_is_asked_for_and_the_certificate_must_be_that_names(
    server: Server, certificate: Path
) -> None:
    asked: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.sni_callback = lambda _socket, name, _context: asked.append(name)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    trusting = ssl.create_default_context(cafile=str(certificate))
    here, cdn = (f"https://{host}.example.com:{server.server_port}" for host in ("images", "cdn"))
    through = HttpReader(INTERNET.resolve, INTERNET.is_public, trusting)

    assert fetch(f"{here}/x.png", here, through=through) == b"picture"
    assert asked == ["images.example.com"]
    assert server.requests[0][1]["Host"] == f"images.example.com:{server.server_port}"
    untrusted = "the certificate of the server is not trusted"
    assert f"{untrusted} (Hostname mismatch" in refused(f"{cdn}/x.png", cdn, through=through, timeout_s=1.0)
    assert f"{untrusted} (self-signed certificate)" in refused(f"{here}/x.png", here, timeout_s=1.0)
    assert len(server.requests) == 1


# --- the allow-list --------------------------------------------------------------------------------------------------

OPEN = ("s3://photos/", "s3://shared/public", "https://images.example.com/", "https://cdn.example.com:8443/a/b/")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://photos/x.png",
        "s3a://photos/deep/x.png",
        "S3://photos/x",
        "s3://shared/public/x.png",
        "s3://own/anything/x.png",
        "x.png",
        "../elsewhere/x.png",
        "https://images.example.com/x.png",
        "HTTPS://IMAGES.Example.COM./x.png?y#z",
        "https://images.example.com:443/x.png",
        "https://cdn.example.com:8443/a/b/c%20d.png",
        "https://cdn.example.com:8443/a/%62/c.png",
        "https://cdn.example.com:8443/a/b/a%2520b.png",
    ],
)
def test_what_the_allow_list_opens_is_open(uri: str) -> None:
    uris.Policy("s3://own/manifest", OPEN).locate(uri)


ESCAPES = [
    "s3://photos-evil/x.png",
    "s3://photo/x.png",
    "s3://PHOTOS/x.png",
    "s3://photos.evil/x.png",
    "s3://shared/publicity/x.png",
    "s3://shared/x.png",
    "s3://shared/public/../x.png",
    "s3://shared/public/./../x.png",
    "s3://shared/public/%2e%2e/x.png",
    "s3://shared/public/%252e%252e/x.png",
    "s3://shared/public/..%2fx.png",
    "s3://shared/public/..\\x.png",
    "s3://shared//public/x.png",
    "s3://own@photos-evil/x.png",
    "s3://photos@evil/x.png",
    "s3://photos:word@evil/x.png",
    "s3://photos\\@evil/x",
    "s3://photos%2f..%2fevil/x.png",
    "s3:///photos/x.png",
    "s3://",
    "gs://photos/x.png",
    "az://photos/x.png",
    "hf://photos/x.png",
    "../../x.png",
    "a/../../../x.png",
    "/photos/x.png",
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "file://localhost/etc/passwd",
    "http://images.example.com/x.png",
    "https://images.example.com:8443/x.png",
    "https://images.example.com.evil.example/x.png",
    "https://evil.example/images.example.com/x.png",
    "https://images.example.com@evil.example/x.png",
    "https://images.example.com:443@evil.example/x.png",
    "https://images.example.com%40evil.example/x.png",
    "https://images.example.com\\@evil.example/x.png",
    "https://evil.example#@images.example.com/x.png",
    "https://evil.example?@images.example.com/x.png",
    "https://evil.example\t.images.example.com/x.png",
    "https://images.example.com\n.evil.example/x.png",
    "https://images.example.com\0.evil.example/x.png",
    "https://\u0456mages.example.com/x.png",
    "https://images.example\u3002com/x.png",
    "https://\uff49mages.example.com/x.png",
    "https://images.example.com\u2044x.png",
    "https:///images.example.com/x.png",
    "https://cdn.example.com/a/b/x.png",
    "https://cdn.example.com:8443/a/x.png",
    "https://cdn.example.com:8443/a/bc/x.png",
    "https://cdn.example.com:8443/a/b/../x.png",
    "https://cdn.example.com:8443/a/b/%2e%2e/x.png",
    "https://cdn.example.com:8443/a/b/%2e./x.png",
    "https://cdn.example.com:8443/a/b/.%252e/x.png",
    "https://cdn.example.com:8443/a/b/%25252525252e%2e/x.png",
    "https://cdn.example.com:8443/a/b/..%2fx.png",
    "https://cdn.example.com:8443/a/b/..%5cx.png",
    "https://cdn.example.com:8443/a/b/..;/x.png",
    "https://cdn.example.com:8443/a/b/\uff0e\uff0e/x.png",
    "https://cdn.example.com:8443/a%2fb/x.png",
    "https://cdn.example.com:8443//a/b/x.png",
    "https://cdn.example.com:08443x/a/b/x.png",
]


@pytest.mark.parametrize("uri", ESCAPES)
def test_what_only_looks_like_an_allowed_place_is_not(uri: str, connections: list[Any]) -> None:
    location = None
    with contextlib.suppress(uris.RefusedError):
        location = uris.Policy("s3://own/manifest", OPEN).locate(uri)
    # A file is located, to be compared with the open folders; and there are none.
    assert location is None or (location.scheme == "file" and uris.Policy("s3://own/manifest", OPEN).folders == ())
    refused(uri, *OPEN, base="s3://own/manifest", timeout_s=0.5)
    assert connections == []


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("photos/", "is not a URI or an absolute path"),
        ("", "is not a URI or an absolute path"),
        ("s3", "is not a URI or an absolute path"),
        ("https://*.example.com/", "has a wildcard"),
        ("https://host/x?y=1", "has a wildcard, a query"),
        ("https://me:word@host/", "was given with credentials"),
        ("https:///x", "the host name is not ASCII"),
        ("s3://key:word@bucket/", "was given with credentials"),
        ("s3://", "invalid name of a bucket"),
        ("memory://x", "scheme 'memory' is not supported; use a local path, file://, s3://"),
        ("ftp://host/", "scheme 'ftp' is not supported"),
        ("/mnt/../etc", "contains '..'"),
        ("s3://photos/../x", "a segment of the path is '.' or '..'"),
        ("https://b\u00fccher.example/", "write other alphabets as xn--"),
    ],
)
def test_an_entry_that_opens_nothing_or_too_much_is_a_config_error(entry: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(None, {"manifest": "m", "output": "o", "images.allow": [entry]})

    assert says in str(caught.value)
    assert "images.allow" in str(caught.value)
    assert "word" not in str(caught.value).replace("keyword", "")


SEGMENT = st.sampled_from(
    [
        ".",
        "",
        "a",
        "%2e%2e",
        "%2E.",
        "..%2f",
        "%252e%252e",
        "%5c..",
        "b c",
        "..;",
        "\uff0e.",
        "%",
        "a%00",
        *"é@:?#",
        "..",
    ]
)


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(["s3://", "https://", "http://", "gs://", "file://", "", "/", "//", "s3:/", "HTTPS://"]),
    st.sampled_from(["photos", "photos-evil", "images.example.com", "images.example.com.", "u@images.example.com", ""]),
    st.lists(SEGMENT, max_size=6),
)
def test_whatever_is_located_names_its_place_in_one_plain_way(scheme: str, host: str, segments: list[str]) -> None:
    policy = uris.Policy("s3://photos/m", ("https://images.example.com/a/", "s3://photos/a"))
    try:
        location = policy.locate(f"{scheme}{host}/{'/'.join(segments)}")
    except uris.RefusedError:
        return

    if location.scheme == "file":
        assert policy.folders == ()
        return
    assert (location.scheme, location.authority) in {("s3", "photos"), ("https", "images.example.com:443")}
    assert not {".", ".."} & set(location.parts)
    assert uris.parse(location.target).target == location.target
    if location.scheme == "https":
        assert location.parts[0] == "a"
        assert location.target.isascii()


# --- secrets ---------------------------------------------------------------------------------------------------------

SECRET = "SEKRET1234"  # noqa: S105 - what is looked for
WITH_SECRETS = [
    f"https://user:{SECRET}@images.example.com/x.png",
    f"https://user:{SECRET}/x@images.example.com/x.png",
    f"https://{SECRET}@images.example.com/x.png",
    f"HTTPS://user:p@{SECRET}@images.example.com/x.png",
    f"https://user:a {SECRET}@images.example.com/x.png",
    "https://images.example.com/x.png?X-Amz-Credential=AKIA&X-Amz-Signature=" + SECRET,
    f"https://images.example.com/x.png#{SECRET}",
    f"https://images.example.com:PORT/status/404?sig={SECRET}",
    f"http://images.example.com:PORT/status/404?sig={SECRET}",
    f"http://images.example.com:PORT/status/500?sig={SECRET}",
    f"http://images.example.com:PORT/large?sig={SECRET}",
    f"http://images.example.com:PORT/away?http://images.example.com:PORT/status/403?token={SECRET}",
    f"http://images.example.com:PORT/away?http://inside.example.com/x.png?token={SECRET}",
    f"http://images.example.com:PORT/away?http://user:{SECRET}@images.example.com:PORT/x.png",
    f"http://images.example.com:PORT/decoded?http://user:a%20{SECRET}@images.example.com:PORT/x.png",
    f"http://images.example.com:1/x.png?sig={SECRET}",
    f"https:/user:{SECRET}@images.example.com/x.png",
    f"//user:{SECRET}@images.example.com/x.png",
    f"s3://key:{SECRET}@bucket/x.png",
    f"s3a://key:a/{SECRET}/b@bucket/x.png",
    f"s3://bucket/x.png?X-Amz-Signature={SECRET}",
    f"abfs://me:{SECRET}@account.dfs.core.windows.net/x.png",
    f"abfs://c@account.dfs.core.windows.net/x.png?sv=1&sig={SECRET}",
    f"sftp://me:{SECRET}@host/x.png",
    f"memory://me:{SECRET}@host/x.png?password={SECRET}",
    f"x.png?sig={SECRET}",
    f"http://[user:{SECRET}@images.example.com/x.png",
    f"https://images.example.com\\user:{SECRET}@evil.example/x.png",
]


@pytest.mark.parametrize("number", range(len(WITH_SECRETS)))
def test_a_secret_in_a_uri_reaches_no_result_no_log_and_no_error(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    caplog.set_level(logging.INFO)
    uri = WITH_SECRETS[number].replace("PORT", str(server.server_port))
    here = f"http://images.example.com:{server.server_port}"
    base = tmp_path.as_uri()
    reported: list[str] = []

    for allow in ((), (here, "s3://bucket", "https://images.example.com", "http://images.example.com:1")):
        with pytest.raises(RequestError) as caught:
            fetch(uri, *(allow if not uri.startswith(("s3", "abfs")) else ()), base=base, timeout_s=0.3)
        reported.append(str(caught.value))
    config = RunConfig.load(None, {"manifest": "m", "output": str(tmp_path / "out"), "images.timeout_s": 0.1})
    tables = [requests_table(1, image=[uri]), requests_table(1, image=[uri], image_bytes=[b"x"])]
    for table in tables:
        checked = check(table, config, {"default": "e" * 32})
        reported.append(str(checked.rejected.to_pylist()))
        fetched = FetchImages(config.images, base)(with_row_error(checked.requests))
        reported.append(str(fetched["error"].to_pylist()))
    with contextlib.suppress(ConfigError):
        RunConfig.load(None, {"manifest": "m", "output": "o", "images.allow": [uri]})
        reported.append("an entry of images.allow like any other")
    for key, value in (("images.allow", [uri, "*"]), ("images.allow", uri), ("images", {uri: 1})):
        with pytest.raises(ConfigError) as mistake:
            RunConfig.load(None, {"manifest": "m", "output": "o", key: value})
        reported.append(str(mistake.value))

    reported += [caplog.text, *capfd.readouterr()]
    assert not [text for text in reported if SECRET in text]
    assert any("column 'image'" in text for text in reported)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["https", "http", "HTTPS", "s3", "s3a", "sftp", "ftp", "hdfs"]),
    st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=5),
    st.text(st.sampled_from("ab1:+=%-_.~!$&'()*,;"), max_size=8),
)
def test_no_password_survives_redaction(scheme: str, user: str, around: str) -> None:
    uri = f"{scheme}://{user}:{around}{SECRET}{around}@host/x.png"

    for text in (uri, f"cannot open {uri} now", f"error='{uri}'"):
        assert SECRET not in uris.redacted(text)
    assert uris.redacted_uri(uri) == f"{scheme}://host/x.png"


def test_a_run_uses_the_systems_resolver_and_the_rule_for_addresses() -> None:
    assert sources.HTTP == HttpReader() == HttpReader(resolve=http_client.resolve, is_public=is_public, tls=None)
