"""URIs of stores: folders on object storage or a local disk, as the config and commands name them."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pia_batch.errors import ConfigError, printable
from pia_batch.storage.schemes import LOCAL, SCHEMES, canonical
from pia_batch.storage.uris import BUCKET, bucket_problem, redacted, redacted_uri

_HAS_SCHEME = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://")
_LACKS_SLASHES = re.compile(rf"^({'|'.join(name for name in SCHEMES if name != LOCAL)}):(?!//)")


def absolute(uri: str) -> str:
    """Return a URI with its scheme; paths become absolute `file://` URIs.

    Raises:
        ConfigError: The text is not a URI, lacks a bucket or a path, or contains credentials.
    """
    if not _HAS_SCHEME.match(uri):
        if found := _LACKS_SLASHES.match(uri):
            msg = f"{redacted_uri(uri)} is not a URI, and an unlikely path; write {found[1]}://, with two slashes"
            raise ConfigError(msg)
        if uri[:6].lower() == "file:/":
            msg = f"{uri} is not read as a URI, and an unlikely path; write file:///FULL/PATH, or the path alone"
            raise ConfigError(msg)
        return Path(uri).expanduser().absolute().as_uri()
    try:
        parts = urlsplit(uri)
    except ValueError:
        msg = f"{redacted_uri(uri)} is not a URI"
        raise ConfigError(msg) from None
    scheme = SCHEMES.get(parts.scheme)
    is_bucket = scheme is not None and scheme.committer == "obstore"
    if problem := bucket_problem(scheme, uri.partition("://")[2]):
        raise ConfigError(f"{redacted_uri(uri)} {problem}")
    # An S3 secret key may contain a slash, at which urlsplit ends the netloc.
    if ":" in (parts.netloc if scheme and scheme.store == "s3" else parts.netloc.rpartition("@")[0]):
        msg = (
            f"{redacted_uri(uri)} was given with credentials, which results and logs would repeat; "
            "pass them in the environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
        raise ConfigError(msg)
    if parts.scheme == "file" and parts.netloc not in ("", "localhost"):
        msg = f"{uri} has a host before the path; write file:///FULL/PATH, or the path alone"
        raise ConfigError(msg)
    if is_bucket and not parts.netloc:
        msg = f"{uri} names no bucket; write {parts.scheme}://BUCKET/PATH"
        raise ConfigError(msg)
    if scheme and scheme.store == "s3" and not BUCKET.fullmatch(name := uri.partition("://")[2].partition("/")[0]):
        msg = f"{redacted_uri(uri)}: {redacted(name)!r} is no name of a bucket; write letters, digits, '.', '-' and '_'"
        raise ConfigError(msg)
    return canonical(uri) if parts.scheme == LOCAL else uri


def check_segments(uri: str) -> None:
    """Refuse `.` and `..` in the key of an object: servers resolve them, and then call the signature wrong.

    Raises:
        ConfigError: The URI has one.
    """
    scheme = SCHEMES.get(uri.partition("://")[0].lower())
    if scheme is None or scheme.committer != "obstore":
        return
    if {".", ".."} & set(uri.partition("://")[2].split("/")[1:]):
        msg = f"{redacted_uri(uri)} cannot be opened: a segment of the path is '.' or '..'; write the path without them"
        raise ConfigError(msg)


def check_prefix(uri: str) -> None:
    """Refuse a prefix that the clients of one store take for different keys, or that none of them can write below.

    Raises:
        ConfigError: It is one; the message has the part to correct.
    """
    scheme = SCHEMES.get(uri.partition("://")[0].lower())
    if scheme is None or scheme.committer != "obstore":
        return
    key = uri.partition("://")[2].partition("/")[2]
    for pattern, problem in _UNUSABLE if scheme.store == "s3" else (*_UNUSABLE, _NOT_OF_A_URL):
        if found := re.search(pattern, key):
            msg = f"{printable(redacted_uri(uri))} cannot be a folder: '{printable(found[0])}' in it {problem}"
            raise ConfigError(msg)


_UNUSABLE = (
    (r"%[0-9A-Fa-f]{2}", "is percent-encoded, and keys are not; write the character that it stands for"),
    (r"//|(?<![^/])\.\.?(?![^/])|(?<![^/])/", "is an empty part, '.' or '..'; write the path without it"),
    (r"[\x00-\x1f\x7f\\]", "is a control character or a backslash; choose another path"),
)
"""Patterns of what the keys of an output or of weights cannot have, with the problem and the remedy.

One client decodes `%20`, and others do not: what is written would be found by none of them.
"""

_NOT_OF_A_URL = (r"[?#]", "ends the path of a URL; choose another path")
"""The same of stores whose client takes the URI for a URL."""


def local_path(uri: str) -> str:
    """Return the path of a `file://` URI."""
    return unquote(urlsplit(uri).path)
