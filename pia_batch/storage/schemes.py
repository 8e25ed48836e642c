"""URL schemes: the one table of what can be read and written, by which client, and for which purpose.

Images, manifests, weights and outputs accept the same schemes, with two exceptions: `http` and `https` are read-only
and cannot be listed, and `hf` has no client that bounds a read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Purpose = Literal["image", "images.allow", "manifest", "weights", "output"]
"""Use of a URI."""

LOCAL = "file"

_PREFIX = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")


@dataclass(frozen=True, slots=True)
class Scheme:
    """One URL scheme, as a user may write it."""

    name: str
    store: str
    """Scheme under which the clients know the store: several names may mean the same one."""
    reader: Literal["local", "fsspec", "http"]
    """Client that reads images; manifests are read through Arrow's local file system or fsspec."""
    committer: Literal["local", "obstore"] | None = None
    """Client of `Store`, which writes outputs and lists and fetches weights; None: read-only."""
    is_bounded: bool = True
    """Reads are bounded in time and size, so that URIs written by strangers may be opened."""
    package: str | None = None
    """Package that fsspec needs for this scheme, where it is no dependency of this one."""
    port: int | None = None
    """Port of a web server, unless its URL names another."""
    account_in_authority: bool = False
    """The authority may be CONTAINER@ACCOUNT.HOST."""
    query_may_be_secret: bool = False
    """A query may hold a signature, so it is never shown."""

    def serves(self, purpose: Purpose) -> bool:
        """Return True if a URI of this scheme can be used for `purpose`."""
        if purpose in ("weights", "output"):
            return self.committer is not None
        return purpose == "manifest" or self.is_bounded


def _object_store(name: str, store: str, package: str | None = None, *, azure: bool = False) -> Scheme:
    with_account = azure and name != "az"
    return Scheme(
        name,
        store,
        "fsspec",
        "obstore",
        package=package,
        account_in_authority=with_account,
        query_may_be_secret=azure,
    )


SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {
        scheme.name: scheme
        for scheme in (
            Scheme("file", LOCAL, "local", "local"),
            _object_store("s3", "s3"),
            _object_store("s3a", "s3"),
            _object_store("gs", "gs", "gcsfs"),
            _object_store("gcs", "gs", "gcsfs"),
            _object_store("az", "abfs", "adlfs", azure=True),
            _object_store("abfs", "abfs", "adlfs", azure=True),
            _object_store("abfss", "abfs", "adlfs", azure=True),
            Scheme("http", "http", "http", port=80, query_may_be_secret=True),
            Scheme("https", "https", "http", port=443, query_may_be_secret=True),
            Scheme("hf", "hf", "fsspec", is_bounded=False),
        )
    }
)
"""Every scheme by its name in lower case."""

EXTRAS: Mapping[str, str] = MappingProxyType({"gcsfs": "gcp", "adlfs": "azure"})
"""Extra of this package that installs each `Scheme.package`."""

WEB_PORTS: Mapping[str, int] = MappingProxyType({name: s.port for name, s in SCHEMES.items() if s.port is not None})
"""Schemes of web servers, with their default ports."""


class UnsupportedSchemeError(ValueError):
    """A scheme that cannot be used for a purpose. The text follows the URI in a sentence, and repeats no part of it."""


def find(uri: str, purpose: Purpose) -> Scheme:
    """Return the scheme of `uri`; a path without a scheme is a local file.

    Raises:
        UnsupportedSchemeError: The scheme is unknown, or cannot be used for `purpose`.
    """
    written = _PREFIX.match(uri)
    name = written[1].lower() if written else LOCAL
    scheme = SCHEMES.get(name)
    if scheme is not None and scheme.serves(purpose):
        return scheme
    if scheme is None:
        problem = f"scheme {name!r} is not supported"
    elif purpose == "output":
        problem = f"nothing can be written to {name}://"
    else:
        problem = f"{purpose} cannot be read from {name}://"
    raise UnsupportedSchemeError(f"{problem}; use {expected(purpose)}")


def expected(purpose: Purpose) -> str:
    """Return what can be given for `purpose`, for messages: `a local path, file://, s3://, ...`."""
    names = [f"{scheme.name}://" for scheme in SCHEMES.values() if scheme.serves(purpose)]
    return f"a local path, {', '.join(names[:-1])} or {names[-1]}"


def canonical(uri: str) -> str:
    """Return `uri` with its scheme in the spelling that every client knows; a path stays as it is."""
    written = _PREFIX.match(uri)
    if written is None:
        return uri
    scheme = SCHEMES.get(written[1].lower())
    return uri if scheme is None else f"{scheme.store}://{uri[written.end() :]}"
