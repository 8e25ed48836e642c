"""URIs that requests name: their meaning, the policy that permits them, and their redaction. Opens nothing.

A manifest is written by others, so its URIs are parsed strictly: a URI that two programs could take for two places
(dots that climb, encoded or not; a user name before the host) is refused, and not repaired.
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

from pia_batch.storage import schemes

DECODINGS = 4
"""Layers of percent-encoding that are searched for dots; more are refused. An honest URI has one."""

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://(.*)", re.DOTALL)
_URL = re.compile(r"(\[[^\]/?#]*\]|[^:/?#]*)(?::([^/?#]*))?([^?#]*)(\?[^#]*)?(?:#.*)?", re.DOTALL)
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
BUCKET = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
"""Name of a bucket."""
_CONTAINER = re.compile(r"[a-z0-9$][a-z0-9-]*(@[a-z0-9-]+(\.[a-z0-9-]+)*)?")
_ARN = re.compile(r"(?i)arn:aws[a-z-]*:")
_EXPRESS = "is in a directory bucket (S3 Express One Zone), which is not supported; use a general purpose bucket"
_OTHER_BUCKETS = {
    "--x-s3": _EXPRESS,
    "--xa-s3": _EXPRESS,
    "--op-s3": "is on S3 on Outposts, which is not supported; use a bucket of a region",
}
"""Problems of buckets by the endings of their names, which AWS reserves: requests for them are signed in other ways."""
_LEGAL = "%:/?#[]@!$&'()*+,;=-._~"
"""Characters allowed in a URL besides letters and digits (RFC 3986); others are percent-encoded before it is sent."""


class RefusedError(ValueError):
    """A refused URI. The text follows the URI in a sentence, and repeats nothing that could be secret."""


class NotAllowedError(RefusedError):
    """A well-formed URI that the policy does not permit."""


class TooLargeError(ValueError):
    """An object that its server reports to be longer than the limit."""


@dataclass(frozen=True)
class Location:
    """Meaning of a URI."""

    scheme: str
    """Canonical scheme: `Scheme.store`."""
    authority: str
    """Bucket, container, or `host:port`; empty for files."""
    parts: tuple[str, ...]
    """Segments of the path, decoded if the scheme encodes them."""
    target: str
    """Argument for the client: a path for `file`, otherwise the URI in its one canonical spelling."""

    @property
    def is_web(self) -> bool:
        """True for a URL of a web server."""
        return self.scheme in schemes.WEB_PORTS

    def covers(self, other: Location) -> bool:
        """Return True if `other` is this location or is inside it, segment by segment."""
        place = self.parts if self.parts and self.parts[-1] else self.parts[:-1]
        same_store = (self.scheme, self.authority) == (other.scheme, other.authority)
        return same_store and other.parts[: len(place)] == place


class Policy:
    """Permission to open images: those of the manifest's own store, and those that the operator allows.

    A manifest in a local folder may name files inside that folder; a manifest on object storage may name objects of its
    bucket or container. Links must be followed before a local file is known to be inside a folder: the policy lists the
    folders, and the code that opens the file compares.
    """

    def __init__(self, base_uri: str, allow: Sequence[str] = ()) -> None:
        """Build the policy of one run.

        Args:
            base_uri: Folder of the manifest, with its scheme; empty: none.
            allow: Further prefixes, as `parse_prefix` accepts them.

        Raises:
            ValueError: An entry of `allow` is not a prefix.
        """
        self._base_uri = base_uri
        self._base = _place_of_manifest(base_uri)
        opened = [parse_prefix(entry) for entry in allow]
        if self._base is not None:
            bucket = Location(self._base.scheme, self._base.authority, (), "")
            opened.append(self._base if self._base.scheme == "file" else bucket)
        self.folders = tuple(place.target for place in opened if place.scheme == "file")
        """Local folders that may be read, as they were given: links in them are not followed yet."""
        self._prefixes = [place for place in opened if place.scheme != "file"]
        self._allow = [redacted_uri(entry) for entry in allow]

    def locate(self, uri: str) -> Location:
        """Return the location of `uri` if it may be opened. A file is always returned: compare it with `folders`.

        Args:
            uri: Absolute URI, or a path relative to the manifest's folder.

        Raises:
            NotAllowedError: The policy does not permit the location.
            RefusedError: The text is not a URI, or has more than one meaning.
        """
        location = self.meaning(uri)
        if location.scheme == "file" or any(prefix.covers(location) for prefix in self._prefixes):
            return location
        raise self.refusal()

    def refusal(self) -> NotAllowedError:
        """Return the error for a location that the policy does not permit, with the remedy."""
        own = "the manifest's own folder"
        if self._base is None or self._base.scheme != "file":
            own = f"{self._base.scheme}://{self._base.authority}" if self._base else ""
        places = " and ".join(filter(None, [own, ", ".join(self._allow)])) or "nowhere"
        return NotAllowedError(f"is not allowed: images may come from {places}; allow more with images.allow")

    def meaning(self, uri: str) -> Location:
        """Return the location of `uri`, permitted or not.

        Raises:
            NotAllowedError: The path climbs out of its bucket.
            RefusedError: The text is not a URI, or has more than one meaning.
        """
        if _SCHEME.match(uri) or uri.startswith("/"):
            return parse(uri)
        if uri[:6].lower() == "file:/":  # as Java and Spark write it (RFC 8089)
            return parse(f"file://{uri[5:]}")
        base = self._base
        if base is None:
            shown = redacted_uri(self._base_uri) or "rows without a place"
            raise RefusedError(f"is relative, and images cannot be relative to {shown}; write full URIs")
        if base.scheme == "file":
            return parse(posixpath.join(base.target, uri))
        parts = [part for part in base.parts if part]
        for part in uri.split("/"):
            if part == ".." and not parts:
                raise self.refusal()
            parts = parts[:-1] if part == ".." else [*parts, part] if part != "." else parts
        return parse(f"{base.scheme}://{base.authority}/{'/'.join(parts)}")


def remedy_for_missing(uri: str) -> str | None:
    """Return what to write in place of a local path that does not exist and looks like something else; or None."""
    return next((remedy for pattern, remedy in _UNLIKELY.items() if re.match(pattern, uri)), None)


_UNLIKELY = {
    r"[A-Za-z]:[\\/]|\\\\|[^/]*\\": "it looks like a path of Windows; write one of this machine, with slashes",
    r"~|\$|%[A-Z]+%": "home folders and variables are not filled in; write the full path",
    r"(https?|s3a?|gcs|gs|az|abfss?):(?!//)": "it looks like a URI; write two slashes after the colon",
    r"[\"'<]": "write it without quotes or brackets",
    r"\s|.*\s$": "write it without spaces around it",
}
"""Remedies for local paths by the patterns of their text."""


def parse(uri: str) -> Location:
    """Return the meaning of an absolute URI, or of an absolute local path.

    Raises:
        RefusedError: The scheme is not supported, or the text is not a URI, or has more than one meaning.
    """
    if any(unicodedata.category(character) == "Cc" for character in uri):
        raise RefusedError("cannot be opened: it contains control characters")
    found = _SCHEME.fullmatch(uri)
    if found is None:
        return Location("file", "", tuple(uri.split("/")[1:]), uri)
    try:
        scheme = schemes.find(uri, "image")
    except schemes.UnsupportedSchemeError as err:
        raise RefusedError(f"cannot be opened: {err}") from None
    if scheme.reader == "local":
        return _file(found[2])
    return _url(scheme.store, found[2]) if scheme.reader == "http" else _object(scheme, found[2])


def parse_prefix(entry: str) -> Location:
    """Return the location that an entry of `images.allow` permits, with everything inside it.

    Args:
        entry: Prefix such as `s3://bucket`, `s3://bucket/folder/`, `/mnt/folder`, `https://host/` or
            `https://host:8443/folder/`.

    Raises:
        ValueError: The entry is not a prefix; the message has the entry and what is expected.
    """
    shown = redacted_uri(entry)
    if not _SCHEME.match(entry) and not entry.startswith("/"):
        raise ValueError(f"{shown!r} is not a URI or an absolute path, such as s3://photos/ or /mnt/photos")
    if re.search(r"[*?#]", entry):
        raise ValueError(f"{shown!r} has a wildcard, a query or a fragment; name a bucket, a folder or a host")
    try:
        place = parse(entry)
    except RefusedError as err:
        raise ValueError(f"{shown!r} {err}") from None
    if place.scheme == "file" and ".." in place.parts:
        raise ValueError(f"{shown!r} contains '..'; write the folder's absolute path")
    return place


def bucket_problem(scheme: schemes.Scheme | None, rest: str) -> str | None:
    """Return why a kind of bucket of S3 is refused, and the remedy; None for any other URI.

    Args:
        scheme: Scheme of the URI.
        rest: URI without its scheme.
    """
    if scheme is None or scheme.store != "s3":
        return None
    if _ARN.match(rest):
        return (
            "names an access point by its ARN, which is not supported; "
            "write the access point's alias, such as NAME-...-s3alias, in place of the bucket"
        )
    name = rest.partition("/")[0]
    return next((problem for ending, problem in _OTHER_BUCKETS.items() if name.endswith(ending)), None)


def redacted(text: str) -> str:
    """Return `text` without the user names, passwords and signatures of the URIs in it."""
    for pattern, kept in _REDACTIONS_IN_TEXT:
        text = re.sub(pattern, kept, text)
    return text


def redacted_uri(uri: str) -> str:
    """Return one URI, which may be malformed, without its user name, password and signature."""
    for pattern, kept in REDACTIONS:
        uri = re.sub(pattern, kept, uri)
    return uri


def redacted_json(value: Any) -> Any:  # what JSON can hold
    """Return a JSON value with every text redacted, except the names in its objects."""
    if isinstance(value, dict):
        return {name: redacted_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [redacted_json(item) for item in value]
    return redacted(value) if isinstance(value, str) else value


def _redactions(start: str, space: str, rest: str) -> tuple[tuple[str, str], ...]:
    """Return patterns and replacements, in order, in the syntax that Python's `re` and Arrow's RE2 share.

    Args:
        start: Pattern of the beginning of a URI.
        space: Characters that a URI cannot contain, as the inside of a character class.
        rest: Pattern of everything up to the end of a URI.
    """
    scheme = "[a-z][a-z0-9+.-]*:/*|//"
    signed = "|".join([*(name for name, s in schemes.SCHEMES.items() if s.query_may_be_secret), "wasbs?"])
    secrets = "x-amz-|x-goog-|accesskeyid=|signature=|sig=|token=|secret|password=|credential|api_?key="
    s3 = "|".join(name for name, s in schemes.SCHEMES.items() if s.store == "s3")
    web = "|".join(schemes.WEB_PORTS)
    # The container in abfs://container@account is not a user name. A password may contain slashes, and digits before a
    # slash are a port, except on S3, which has none.
    user = "|".join(
        (
            rf"({scheme})[^/?#:{space}]*:[^/?#{space}]*@",
            rf"({scheme})[^/?#@:{space}]*:[0-9]*[^0-9/@{space}][^@{space}]*@",
            rf"((?:{s3}):/*)[^/@:{space}]*:[^@{space}]*@",
            rf"((?:{web}):/*)[^/?#{space}]*@",
        )
    )
    return (
        (rf"(?is){start}(?:{user})", r"\1\2\3\4"),
        (rf"(?is){start}((?:{signed}):/*[^?#{space}]*)[?#]{rest}", r"\1"),
        (rf"(?is){start}([^?{space}]*)\?{rest}(?:{secrets}){rest}", r"\1"),
    )


REDACTIONS = _redactions("^", "", ".*")
"""Patterns and replacements for values that are one URI each, spaces included; apply them in order."""
_REDACTIONS_IN_TEXT = _redactions("", r"\s", r"\S*")


def _place_of_manifest(base_uri: str) -> Location | None:
    """Return the location of a manifest's folder; None if images cannot be relative to it: a web server, or nothing."""
    if not base_uri:
        return None
    try:
        place = parse(base_uri)
    except RefusedError:
        return None
    return None if place.is_web else place


def _file(rest: str) -> Location:
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    if host not in ("", "localhost") or not slash:
        raise RefusedError("cannot be opened: the URI of a file is file:///path, without a host")
    return parse(unquote(f"/{path}"))


def _object(scheme: schemes.Scheme, rest: str) -> Location:
    authority, _, key = rest.partition("/")
    if problem := bucket_problem(scheme, rest):
        raise RefusedError(problem)
    if ":" in authority or ("@" in authority and not scheme.account_in_authority):
        raise RefusedError("was given with credentials; pass them in the environment of the workers")
    if not (_CONTAINER if scheme.store == "abfs" else BUCKET).fullmatch(authority):
        raise RefusedError("cannot be opened: invalid name of a bucket or container")
    parts = tuple(key.split("/"))
    _forbid_dots(parts)
    return Location(scheme.store, authority, parts, f"{scheme.store}://{authority}/{key}")


def _url(scheme: str, rest: str) -> Location:
    if "@" in re.split(r"[/?#]", rest, maxsplit=1)[0] or "\\" in rest:
        raise RefusedError("was given with credentials or a backslash, which are never sent")
    found = _URL.fullmatch(rest)
    if found is None:
        raise RefusedError("cannot be opened: invalid URL")
    host, port, path, query = _host(found[1]), found[2], found[3], found[4] or ""
    if port and not re.fullmatch("[0-9]{1,5}", port):
        raise RefusedError("cannot be opened: invalid URL: the port is not a number")
    number = int(port or schemes.WEB_PORTS[scheme])
    shown = host if number == schemes.WEB_PORTS[scheme] else f"{host}:{number}"
    _forbid_dots(path.split("/"))
    parts = tuple(unquote(part) for part in path.split("/")[1:])
    target = quote(f"{scheme}://{shown}{path or '/'}{query}", safe=_LEGAL)
    return Location(scheme, f"{host}:{number}", parts, target)


def _host(host: str) -> str:
    """Return a host name in lower case, without a final dot; an IPv6 address in its shortest form, in brackets."""
    if host.startswith("["):
        try:
            address = ipaddress.IPv6Address(host[1:-1])
        except ValueError:
            address = None
        if address is None or address.scope_id:
            raise RefusedError("cannot be opened: invalid URL: the host is not an IPv6 address")
        return f"[{address}]"
    name = host.lower().removesuffix(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in name.split(".")):  # noqa: PLR2004 - RFC 1035
        raise RefusedError("cannot be opened: the host name is not ASCII; write other alphabets as xn--...")
    return name


def _forbid_dots(parts: Sequence[str]) -> None:
    """Refuse `.` and `..` as a whole segment, in any encoding: some programs climb there, to others they are names."""
    for part in parts:
        plain = part
        for _ in range(DECODINGS):
            plain = unquote(plain)
        plain = unicodedata.normalize("NFKC", plain)
        # Servers that cut off path parameters take `..;x` for `..`.
        if unquote(plain) != plain or {".", ".."} & set(re.split(r"[/\\;]", plain)):
            raise RefusedError("cannot be opened: a segment of the path is '.' or '..'; write the path without them")
