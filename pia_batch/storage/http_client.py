"""One GET over http or https of a URL that a stranger wrote: to public addresses only, bounded in time and size.

And one POST to a URL that the operator wrote, without those bounds.

Knows nothing of manifests. The name is resolved once, every address that it has is judged, and the connection is made
to one of those very addresses, so that a name cannot point elsewhere between the check and the use. Every redirect is
judged like the first URL. No credentials, no cookies, no proxies of the environment; nothing is decompressed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from pia_batch.storage.schemes import WEB_PORTS
from pia_batch.storage.uris import RefusedError, TooLargeError, redacted_uri

MAX_REDIRECTS = 3
MOVED = frozenset({301, 302, 303, 307, 308})

_ANSWERS_OF_ABSENCE = frozenset({404, 410})
_ANSWERS_OF_REFUSAL = frozenset({401, 403, 407, 451})
_ANSWERS_THAT_PASS = frozenset({408, 425, 429})
_HEADERS = {"Accept": "image/*, */*;q=0.5", "Accept-Encoding": "identity", "User-Agent": "pia-batch"}

_NEVER = tuple(
    map(
        ipaddress.ip_network,
        (
            "192.0.0.0/24",  # IETF protocol assignments
            "192.31.196.0/24",  # AS112
            "192.52.193.0/24",  # AMT
            "192.88.99.0/24",  # 6to4 relays
            "192.175.48.0/24",  # AS112
            "168.63.129.16/32",  # Azure's platform, with the secrets of a machine: its number alone is public
            "2001::/23",  # IETF protocol assignments, Teredo among them
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4, which has any IPv4 address inside
            "2620:4f:8000::/48",  # AS112
            "3fff::/20",  # documentation
        ),
    )
)
"""Not public, whatever `ipaddress` says: Python before 3.11.10 and 3.12.4 calls some of them global.

Source: the IANA special-purpose address registries, read 2026-11-23; Microsoft Learn, "What is IP address
168.63.129.16?".
"""

_UNICAST = ipaddress.IPv6Network("2000::/3")
"""All public IPv6 hosts (RFC 4291). Outside lie the forms that carry an IPv4 address: mapped, compatible, NAT64."""


def is_public(address: str) -> bool:
    """Whether an IP address, in its standard spelling, is that of a host on the public internet."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if parsed.version == 6 and parsed not in _UNICAST:  # noqa: PLR2004 - IPv6
        return False
    special = parsed.is_multicast or parsed.is_reserved or not parsed.is_global
    return not special and not any(parsed in network for network in _NEVER if network.version == parsed.version)


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a host as the system's resolver gives them, in its order.

    Raises:
        OSError: there is no such host (socket.gaierror), or the resolver does not answer.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in found))


@dataclass(frozen=True)
class Web:
    """How URLs are read; the fields are there for a test that has no internet."""

    resolve: Callable[[str, int], Awaitable[Sequence[str]]] = resolve
    is_public: Callable[[str], bool] = is_public
    tls: ssl.SSLContext | None = None
    """Whom to trust; None: the authorities that the system trusts."""

    async def read(self, url: str, judge: Callable[[str], str], num_bytes: int, *, whole: bool = True) -> bytes:
        """The first `num_bytes` bytes of what `url` holds, or all of it where that is less.

        Cancel it to bound its time: it reads for as long as bytes come.

        Args:
            url: http or https, already judged.
            judge: gives the URL to open for one that a redirect names, or raises RefusedError.
            num_bytes: no more than this is ever read.
            whole: False: only the beginning is wanted, and asked for.

        Raises:
            RefusedError: here or there, for a reason that will not pass.
            TooLargeError: with `whole`, an answer that says to be longer, before it is read.
            FileNotFoundError: the server says so.
            PermissionError: the server says so.
            OSError: a fault that may pass; or aiohttp.ClientError, or asyncio.TimeoutError.
        """
        for _ in range(MAX_REDIRECTS + 1):
            try:
                answer = await self._get(url, num_bytes, whole=whole)
            except aiohttp.ClientResponseError:  # its text repeats what the server sent
                raise OSError("the server's answer is not HTTP") from None
            if isinstance(answer, bytes):
                return answer
            url = _next(urljoin(url, answer), judge)
        raise RefusedError(f"leads on by more than {MAX_REDIRECTS} redirects")

    async def _get(self, url: str, num_bytes: int, *, whole: bool) -> bytes | str:
        """The bytes, or where a redirect leads."""
        target = URL(url, encoded=True)
        addresses = await self._addresses(target.host or "", target.port or 0)
        connector = aiohttp.TCPConnector(resolver=_Pinned(addresses), use_dns_cache=False, force_close=True)
        headers = _HEADERS if whole else _HEADERS | {"Range": f"bytes=0-{num_bytes - 1}"}
        # A session for each request keeps no cookies and no connections.
        async with (
            aiohttp.ClientSession(
                connector=connector,
                auto_decompress=False,
                trust_env=False,
                timeout=aiohttp.ClientTimeout(total=None),
            ) as session,
            session.get(
                target, headers=headers, allow_redirects=False, max_redirects=0, ssl=self.tls or True
            ) as response,
        ):
            if response.status in MOVED:
                return _text(response.headers.get("Location", ""))
            if response.status == 416 and not whole:  # noqa: PLR2004 - "range not satisfiable": there is no first byte
                return b""
            _check_status(response, whole=whole)
            if whole and (response.content_length or 0) > num_bytes:
                raise TooLargeError
            return await _first(response.content, num_bytes)

    async def _addresses(self, host: str, port: int) -> Sequence[str]:
        try:
            addresses = [host] if _is_address(host) else await self.resolve(host, port)
        except socket.gaierror as err:
            if err.errno == socket.EAI_AGAIN:
                raise
            raise FileNotFoundError(f"no such host: {host}") from None
        except UnicodeError:
            raise RefusedError(f"no name of a host: {host}") from None
        if not addresses or not all(map(self.is_public, addresses)):
            raise RefusedError(f"is refused: {host} is not a host on the public internet")
        return addresses


async def post(url: str, headers: Mapping[str, str], data: bytes) -> int:
    """Send JSON to a URL of the operator's own, and give the answer's status.

    Cancel it to bound its time. No redirect is followed; the proxies of the environment are used.
    """
    sent = {"Content-Type": "application/json", "User-Agent": _HEADERS["User-Agent"], **headers}
    async with (
        aiohttp.ClientSession(trust_env=True, timeout=aiohttp.ClientTimeout(total=None)) as session,
        session.post(url, data=data, headers=sent, allow_redirects=False) as response,
    ):
        return response.status


def may_pass(status: int) -> bool:
    """Whether a server that answers so may answer otherwise soon."""
    return status in _ANSWERS_THAT_PASS or status >= 500  # noqa: PLR2004 - server errors


class _Pinned(AbstractResolver):
    """Answers with the addresses that were judged, whatever is asked."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        del family
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in self._addresses
        ]

    async def close(self) -> None:
        pass


def _is_address(host: str) -> bool:
    """Whether aiohttp would connect to `host` without asking a resolver."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _next(url: str, judge: Callable[[str], str]) -> str:
    """Where a redirect leads, judged."""
    try:
        target = judge(url)
    except RefusedError as err:
        raise type(err)(f"leads by a redirect to {redacted_uri(url)}, which {err}") from None
    if urlsplit(target).scheme not in WEB_PORTS:
        raise RefusedError(f"leads by a redirect to {redacted_uri(url)}, which is not on the web")
    return target


def _text(location: str) -> str:
    """The Location header; aiohttp keeps bytes that are no UTF-8 as half surrogate pairs."""
    return location.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _check_status(response: aiohttp.ClientResponse, *, whole: bool) -> None:
    """Raise what an answer without an image means."""
    status = response.status
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    if status == 200 or (status == 206 and not whole):  # noqa: PLR2004 - all, or the part that was asked for
        if encoding != "identity":
            raise RefusedError("is refused: the server sent it compressed, which was not asked for")
    elif status in _ANSWERS_OF_ABSENCE:
        raise FileNotFoundError(f"the server answered {status}")
    elif status in _ANSWERS_OF_REFUSAL:
        raise PermissionError(f"the server answered {status}")
    elif may_pass(status):
        raise OSError(f"the server answered {status}")
    else:
        raise RefusedError(f"cannot be opened: the server answered {status}")


async def _first(stream: aiohttp.StreamReader, num_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < num_bytes and (more := await stream.read(num_bytes - len(data))):
        data += more
    return bytes(data)
