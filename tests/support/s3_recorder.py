"""A small S3 in memory that records how it is addressed; it also answers as a forward proxy for any host over HTTP."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

from servers import serving


@dataclass(frozen=True)
class Recorded:
    """One request."""

    verb: str
    target: str
    """Target as it stands in the request line: a whole URL if it was sent to a proxy."""
    host: str
    signature: str
    """`Authorization` header; empty for an anonymous request."""
    proxy_authorization: str = ""

    @property
    def access_key(self) -> str:
        return self.signature.partition("Credential=")[2].partition("/")[0]

    @property
    def region(self) -> str:
        return (self.signature.partition("Credential=")[2].split("/") + [""] * 3)[2]

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.target).path)


@dataclass
class Recorder:
    """The server's address, its objects by host and path, and what it was asked."""

    url: str = ""
    objects: dict[tuple[str, str], bytes] = field(default_factory=dict)
    seen: list[Recorded] = field(default_factory=list)
    refusal: tuple[int, str] | None = None
    """Status and code with which every request of `refused_verbs` is refused."""
    refused_verbs: tuple[str, ...] = ("DELETE", "GET", "HEAD", "PUT")
    refused_key: str = ""
    """Part of the paths that are refused; empty: all."""
    region: str | None = None
    """Region in which the buckets are: requests for another one are refused, as AWS does."""


@contextmanager
def recording() -> Iterator[Recorder]:
    """Start a recorder on loopback."""
    recorder = Recorder()

    class Answering(_Handler):
        server_recorder = recorder

    with serving(Answering) as url:
        recorder.url = url
        yield recorder


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_recorder: Recorder

    def do_PUT(self) -> None:
        at = self.record()
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        objects = self.server_recorder.objects
        if self.refused():
            return
        if self.headers.get("If-None-Match") == "*" and at in objects:
            self.answer(412, b"")
            return
        objects[at] = data
        self.answer(200, b"")

    def do_GET(self) -> None:
        data = self.server_recorder.objects.get(self.record())
        if self.refused():
            return
        if data is None:
            self.answer(404, b"<Error><Code>NoSuchKey</Code><Message>absent</Message></Error>")
            return
        self.answer(200, data)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_DELETE(self) -> None:
        at = self.record()
        if self.refused():
            return
        self.server_recorder.objects.pop(at, None)
        self.answer(204, b"")

    def record(self) -> tuple[str, str]:
        """Record a request; return its host and path."""
        headers = self.headers
        request = Recorded(
            self.command,
            self.path,
            headers["Host"],
            headers.get("Authorization", ""),
            headers.get("Proxy-Authorization", ""),
        )
        self.server_recorder.seen.append(request)
        return request.host, request.path

    def refused(self) -> bool:
        refusal, region = self.server_recorder.refusal, self.server_recorder.region
        if self.command not in self.server_recorder.refused_verbs or self.server_recorder.refused_key not in self.path:
            refusal = None
        signed = self.server_recorder.seen[-1].region
        if region is not None and signed != region and refusal is None:
            status, text = 400, f"the region '{signed}' is wrong; expecting '{region}'"
            code = "AuthorizationHeaderMalformed"
            body = f"<Error><Code>{code}</Code><Message>The authorization header is malformed; {text}</Message></Error>"
            self.answer(status, body.encode())
            return True
        if refusal is not None:
            status, code = refusal
            declaration = '<?xml version="1.0" encoding="UTF-8"?>'  # AWS ends a line after it
            error = f"<Error><Code>{code}</Code><Message>refused as {code}</Message></Error>"
            self.answer(status, f"{declaration}\n{error}".encode())
        return refusal is not None

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()[:16]}"')
        if self.server_recorder.region is not None:
            self.send_header("x-amz-bucket-region", self.server_recorder.region)
        self.send_header("Last-Modified", formatdate(usegmt=True))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        del args
