"""HTTP client: a GET of a URL written by a stranger, and a POST to a URL written by the operator.

A GET goes to public addresses only, and is bounded in time and size. The host name is resolved once, every address of
it is checked, and the connection is made to one of those addresses, so that a name cannot point elsewhere between the
check and the use. Every redirect is checked like the first URL. A GET sends no credentials and no cookies, ignores the
proxies of the environment, and decompresses nothing.
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

_ABSENT_STATUSES = frozenset({404, 410})
_DENIED_STATUSES = frozenset({401, 403, 407, 451})
_TRANSIENT_STATUSES = frozenset({408, 425, 429})
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
            "168.63.129.16/32",  # Azure's platform, with the secrets of a machine, at an address that looks public
            "2001::/23",  # IETF protocol assignments, Teredo among them
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4, which embeds any IPv4 address
            "2620:4f:8000::/48",  # AS112
            "3fff::/20",  # documentation
        ),
    )
)
"""Networks that are not public, whatever `ipaddress` reports: Python before 3.11.10 and 3.12.4 calls some global.

Source: the IANA special-purpose address registries, read 2026-11-23; Microsoft Learn, "What is IP address
168.63.129.16?".
"""

_UNICAST = ipaddress.IPv6Network("2000::/3")
"""Network of all public IPv6 hosts (RFC 4291).

It excludes the forms that carry an IPv4 address: mapped, compatible, NAT64.
"""


def is_public(address: str) -> bool:
    """Return True if an IP address, in its standard spelling, belongs to a host on the public internet."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    if parsed.version == 6 and parsed not in _UNICAST:  # noqa: PLR2004 - IPv6
        return False
    special = parsed.is_multicast or parsed.is_reserved or not parsed.is_global
    return not special and not any(parsed in network for network in _NEVER if network.version == parsed.version)


async def resolve(host: str, port: int) -> Sequence[str]:
    """Return the addresses of a host in the order of the system's resolver.

    Raises:
        OSError: There is no such host (socket.gaierror), or the resolver does not answer.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in found))


@dataclass(frozen=True)
class HttpReader:
    """Reader of URLs. Tests, which have no internet, replace its fields."""

    resolve: Callable[[str, int], Awaitable[Sequence[str]]] = resolve
    is_public: Callable[[str], bool] = is_public
    tls: ssl.SSLContext | None = None
    """Trusted certificate authorities; None: those that the system trusts."""

    async def read(self, url: str, check: Callable[[str], str], num_bytes: int, *, whole: bool = True) -> bytes:
        """Return the first `num_bytes` bytes of the content of `url`, or all of it if it is shorter.

        Reads for as long as bytes arrive: cancel it to bound its time.

        Args:
            url: URL with the scheme http or https, already checked.
            check: Returns the URL to open for the target of a redirect, or raises RefusedError.
            num_bytes: Number of bytes; never more are read.
            whole: True to refuse longer content; False to request only its beginning.

        Raises:
            RefusedError: The host, a redirect or the answer is refused, permanently.
            TooLargeError: `whole` is set, and the server announces longer content; nothing of it is read.
            FileNotFoundError: The host or the resource does not exist.
            PermissionError: The server denies access.
            OSError: A transient fault; or aiohttp.ClientError, or asyncio.TimeoutError.
        """
        for _ in range(MAX_REDIRECTS + 1):
            try:
                answer = await self._get(url, num_bytes, whole=whole)
            except aiohttp.ClientResponseError:  # its text repeats the server's answer
                raise OSError("the server's answer is not HTTP") from None
            if isinstance(answer, bytes):
                return answer
            url = _redirect_target(urljoin(url, answer), check)
        raise RefusedError(f"is refused: more than {MAX_REDIRECTS} redirects")

    async def _get(self, url: str, num_bytes: int, *, whole: bool) -> bytes | str:
        """Return the bytes, or the target of a redirect."""
        target = URL(url, encoded=True)
        addresses = await self._addresses(target.host or "", target.port or 0)
        connector = aiohttp.TCPConnector(resolver=_Pinned(addresses), use_dns_cache=False, force_close=True)
        headers = _HEADERS if whole else _HEADERS | {"Range": f"bytes=0-{num_bytes - 1}"}
        # A session per request keeps no cookies and no connections.
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
            if response.status == 416 and not whole:  # noqa: PLR2004 - "range not satisfiable": the content is empty
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
            raise RefusedError(f"is refused: invalid host name {host}") from None
        if not addresses or not all(map(self.is_public, addresses)):
            raise RefusedError(f"is refused: {host} is not a host on the public internet")
        return addresses


async def post(url: str, headers: Mapping[str, str], data: bytes) -> int:
    """Send JSON to a URL written by the operator, and return the HTTP status of the answer.

    Follows no redirect and uses the proxies of the environment. Cancel it to bound its time.
    """
    sent = {"Content-Type": "application/json", "User-Agent": _HEADERS["User-Agent"], **headers}
    async with (
        aiohttp.ClientSession(trust_env=True, timeout=aiohttp.ClientTimeout(total=None)) as session,
        session.post(url, data=data, headers=sent, allow_redirects=False) as response,
    ):
        return response.status


def is_transient(status: int) -> bool:
    """Return True for an HTTP status after which another attempt may succeed."""
    return status in _TRANSIENT_STATUSES or status >= 500  # noqa: PLR2004 - server errors


class _Pinned(AbstractResolver):
    """Resolver that returns the checked addresses for every host."""

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
    """Return True if aiohttp would connect to `host` without asking a resolver."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _redirect_target(url: str, check: Callable[[str], str]) -> str:
    """Return the checked target of a redirect."""
    try:
        target = check(url)
    except RefusedError as err:
        raise type(err)(f"redirects to {redacted_uri(url)}, which {err}") from None
    if urlsplit(target).scheme not in WEB_PORTS:
        raise RefusedError(f"redirects to {redacted_uri(url)}, which is not an http or https URL")
    return target


def _text(location: str) -> str:
    """Return the Location header as text; aiohttp keeps bytes that are not UTF-8 as half surrogate pairs."""
    return location.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _check_status(response: aiohttp.ClientResponse, *, whole: bool) -> None:
    """Raise the exception that corresponds to an answer without content."""
    status = response.status
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    if status == 200 or (status == 206 and not whole):  # noqa: PLR2004 - all, or the requested part
        if encoding != "identity":
            raise RefusedError("is refused: the server sent compressed content, which was not requested")
    elif status in _ABSENT_STATUSES:
        raise FileNotFoundError(f"the server answered {status}")
    elif status in _DENIED_STATUSES:
        raise PermissionError(f"the server answered {status}")
    elif is_transient(status):
        raise OSError(f"the server answered {status}")
    else:
        raise RefusedError(f"cannot be opened: the server answered {status}")


async def _first(stream: aiohttp.StreamReader, num_bytes: int) -> bytes:
    data = bytearray()
    while len(data) < num_bytes and (more := await stream.read(num_bytes - len(data))):
        data += more
    return bytes(data)
