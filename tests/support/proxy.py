"""A proxy between a run and its object store that answers as badly as its rules say.

It reads every request whole before it decides, so a fault can be aimed at one object and one step: before the store
has seen the request, or after it has carried it out. It also keeps a record of requests and answers, which shows
afterwards whether anything was written twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from random import Random
from typing import Literal, Protocol, Self
from urllib.parse import unquote, urlsplit

import psutil
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

Kind = Literal["pass", "error", "500", "503", "reset", "lost", "slow", "cut", "frozen", "held", "careless"]
"""Fates of a request:

pass      forwarded
error     answered by the status and the code of `answer`, and not forwarded
500, 503  answered so, and not forwarded
reset     the connection is reset, and the request is not forwarded
lost      forwarded and carried out; then the connection is reset instead of an answer
slow      forwarded after `seconds`
cut       forwarded; half of the answer's body, then a reset
frozen    neither forwarded nor answered for `seconds`, then a reset
held      forwarded once `release` is set
careless  forwarded without its `If-None-Match`
"""

_ERRORS: dict[Kind, tuple[int, str]] = {"500": (500, "InternalError"), "503": (503, "SlowDown")}


@dataclass(frozen=True)
class Request:
    """A request of a client; `path` begins with the bucket, percent-decoded and without a leading slash."""

    verb: str
    path: str
    port: int
    """The client's end of the connection."""

    def sender(self) -> psutil.Process | None:
        """Return the process that sent it, or None if that has ended."""
        for connection in psutil.net_connections("tcp4"):
            if connection.laddr and connection.laddr.port == self.port and connection.pid:
                return psutil.Process(connection.pid)
        return None


@dataclass(frozen=True)
class Fault:
    """The fate of a request, and an action that goes with it.

    `act` is called in a thread: after the store has answered where the kind is `lost` or `cut`, else before anything.
    """

    kind: Kind
    seconds: float = 0.0
    answer: tuple[int, str] = (500, "InternalError")
    """Status and code of an `error`."""
    act: Callable[[Request], None] = lambda _: None
    release: threading.Event = field(default_factory=threading.Event)


class Rule(Protocol):
    """Decides about requests, one at a time."""

    def fault(self, request: Request) -> Fault | None:
        """Return the fault of this request, or None: another rule may decide."""


@dataclass
class Aimed:
    """A fault for certain requests: from the `nth` on whose verb and path match, `times` of them."""

    strike: Fault
    verb: str
    where: str
    nth: int = 1
    times: int = 1

    def fault(self, request: Request) -> Fault | None:
        if request.verb != self.verb or not re.search(self.where, request.path):
            return None
        self.nth -= 1
        if self.nth > 0 or self.times <= 0:
            return None
        self.times -= 1
        return self.strike


class Weather:
    """Faults by chance, at most `most` of them: one of `faults` with probability `rate` for each request."""

    def __init__(self, random: Random, rate: float, faults: Sequence[Fault], most: int) -> None:
        self._random, self._rate, self._faults, self._left = random, rate, faults, most

    def fault(self, _: Request) -> Fault | None:
        if self._left <= 0 or self._random.random() >= self._rate:
            return None
        self._left -= 1
        return self._random.choice(self._faults)


@dataclass
class Seen:
    """A request and its answer. `status` None: the store has not answered."""

    verb: str
    path: str
    kind: Kind
    sha256: str
    """SHA-256 of the request's body."""
    status: int | None = None


class Proxy:
    """Listens on 127.0.0.1 in a thread of its own, and forwards to `upstream`; a context manager.

    Args:
        upstream: URL of the store, such as `http://127.0.0.1:8333`.
        credentials: Access key and secret, to sign again what `careless` changes.
    """

    def __init__(self, upstream: str, credentials: tuple[str, str]) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname, parts.port)
        self._credentials = Credentials(*credentials)
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self.rules: list[Rule] = []
        self.seen: list[Seen] = []
        self.url = ""

    def __enter__(self) -> Self:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**20), self._loop
        ).result()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def set(self, *rules: Rule) -> None:
        """Replace the rules; the first of them that names a fault decides."""
        with self._lock:
            self.rules = list(rules)

    def struck(self) -> Counter[str]:
        """Count the requests that met each kind of fault."""
        return Counter(seen.kind for seen in list(self.seen) if seen.kind != "pass")

    def below(self, prefix: str) -> list[Seen]:
        """Return the requests for objects of `prefix`, in order."""
        return [seen for seen in list(self.seen) if seen.path.startswith(prefix)]

    async def _close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._exchange(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            _reset(writer)
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle one request and its answer; a connection carries no more."""
        head = await reader.readuntil(b"\r\n\r\n")
        verb, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        body = await reader.readexactly(int(length[1])) if length else b""
        port = writer.get_extra_info("peername")[1]
        request = Request(verb, unquote(urlsplit(target).path).lstrip("/"), port)
        with self._lock:
            strikes = (rule.fault(request) for rule in self.rules)
            fault = next((strike for strike in strikes if strike), Fault("pass"))
            seen = Seen(verb, request.path, fault.kind, hashlib.sha256(body).hexdigest())
            self.seen.append(seen)
        if fault.kind in ("lost", "cut"):
            answer = await self._forward(head, body, seen)
            await asyncio.to_thread(fault.act, request)
            if fault.kind == "cut":
                end = answer.index(b"\r\n\r\n") + 4
                writer.write(answer[: end + (len(answer) - end) // 2])
                await writer.drain()
            _reset(writer)
            return
        await asyncio.to_thread(fault.act, request)
        match fault.kind:
            case "error" | "500" | "503":
                writer.write(_error(verb, *_ERRORS.get(fault.kind, fault.answer)))
                await writer.drain()
                return
            case "reset":
                _reset(writer)
                return
            case "frozen":
                await asyncio.sleep(fault.seconds)
                _reset(writer)
                return
            case "slow":
                await asyncio.sleep(fault.seconds)
            case "held":
                await asyncio.to_thread(fault.release.wait)
            case "careless":
                head = self._unconditional(head, body)
        writer.write(await self._forward(head, body, seen))
        await writer.drain()

    async def _forward(self, head: bytes, body: bytes, seen: Seen) -> bytes:
        """Return the whole answer of the store; raise an OSError if it gives none."""
        reader, writer = await asyncio.open_connection(*self._upstream)
        try:
            line, rest = head.split(b"\r\n", 1)
            rest = re.sub(rb"(?i)(^|\r\n)connection: [^\r]*", rb"", rest)
            writer.write(line + b"\r\nConnection: close\r\n" + rest.removeprefix(b"\r\n") + body)
            await writer.drain()
            answer = await reader.read()
        finally:
            writer.close()
        if b"\r\n\r\n" not in answer:
            raise ConnectionResetError
        seen.status = int(answer.split(b" ", 2)[1])
        return answer

    def _unconditional(self, head: bytes, body: bytes) -> bytes:
        """Return the head of the same request without its condition, signed again, as signatures cover it."""
        line, *fields = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        verb, target, version = line.split(" ", 2)
        headers = dict(one.split(": ", 1) for one in fields)
        signature = ("if-none-match", "authorization", "x-amz-date", "x-amz-content-sha256")
        headers = {name: value for name, value in headers.items() if name.lower() not in signature}
        host = next(value for name, value in headers.items() if name.lower() == "host")
        kept = {n: v for n, v in headers.items() if n.lower() not in ("host", "content-length", "user-agent")}
        signed = AWSRequest(method=verb, url=f"http://{host}{target}", headers=kept, data=body)
        S3SigV4Auth(self._credentials, "s3", "us-east-1").add_auth(signed)
        lines = [f"{verb} {target} {version}", *(f"{name}: {value}" for name, value in signed.headers.items())]
        lines += [f"Host: {host}", f"Content-Length: {len(body)}"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _error(verb: str, status: int, code: str) -> bytes:
    """Return an answer as S3 gives it: one to HEAD has no body, and so no code."""
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>injected</Message></Error>'
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(text)}\r\n\r\n{'' if verb == 'HEAD' else text}".encode()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection as a crashed peer does, not as one that has finished."""
    with suppress(OSError):
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
