"""Clients of object stores and local disks: obstore's, with the configuration that the reading client has too."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

from obstore.exceptions import BaseError
from obstore.store import LocalStore, S3Store, from_url

from pia_batch.errors import ConfigError, StorageError, message_of
from pia_batch.storage import local_disk, s3_config
from pia_batch.storage.schemes import UnsupportedSchemeError, canonical, find
from pia_batch.storage.store_uris import local_path
from pia_batch.storage.uris import redacted, redacted_uri

REQUEST_TIMEOUT_S = 30.0
"""Time limit of one request to the store, in seconds; an animation is a few MB."""

_RETRIES: Any = {"max_retries": 2, "retry_timeout": timedelta(seconds=20)}  # a TypedDict of obstore's stubs


def open_store(uri: str) -> Any:  # obstore's stores share no public base class
    """Return the client of a store; a local folder is made.

    Args:
        uri: URI of the folder, from `store_uris.absolute`.

    Raises:
        ConfigError: Nothing can be written to that scheme, or its client refuses the URI or its configuration.
        StorageError: A local folder cannot be made.
    """
    try:
        scheme = find(uri, "output")
    except UnsupportedSchemeError as err:
        raise ConfigError(f"cannot open {redacted_uri(uri)}: {err}") from None
    if scheme.committer == "local":
        path = Path(local_path(uri))
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise StorageError(f"cannot create the folder {uri}: {local_disk.reason_of(err)}") from None
        return LocalStore(path)
    client_options: Any = {  # a TypedDict of obstore's stubs
        "timeout": timedelta(seconds=REQUEST_TIMEOUT_S),
        "connect_timeout": timedelta(seconds=5),
    }
    try:
        if scheme.store == "s3":
            return _open_s3(canonical(uri), client_options)
        return from_url(canonical(uri), client_options=client_options, retry_config=_RETRIES)
    except (BaseError, ValueError) as err:
        reason = re.sub(r"^Generic \w+ error: ", "", redacted(message_of(err))).rstrip(".")
        raise ConfigError(f"cannot open {redacted_uri(uri)}: {reason}; {_OPENING_REMEDIES[scheme.store]}") from None


_OPENING_REMEDIES = {
    "s3": "correct the URI, the AWS_ variables or the profile",
    "gs": "correct the URI, or GOOGLE_APPLICATION_CREDENTIALS, or unset that and give the machine a service account",
    "abfs": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or give the machine an identity, or write "
    "abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH",
}
"""Remedies where a client refuses its configuration, by the store."""


def _open_s3(uri: str, client_options: Any) -> S3Store:
    """Open a bucket with the configuration that s3fs has too. Everything that obstore would look up itself is set."""
    config = s3_config.resolve()
    name, _, prefix = uri.removeprefix("s3://").partition("/")
    bucket = config.bucket(name)
    client_options["allow_http"] = bucket.url.startswith("http://")
    if config.proxy:
        client_options |= {"proxy_url": config.proxy, "proxy_excludes": ""}
    elif any(name.upper().endswith("_PROXY") for name in os.environ):
        # obstore's own rules differ from botocore's, and nothing but a proxy without any host switches them off.
        client_options |= {"proxy_url": "http://proxy.invalid", "proxy_excludes": "*,0.0.0.0/0,::/0"}
    client_options["root_certificate"] = Path(config.ca_bundle).read_bytes()
    options: dict[str, Any] = {
        "region": config.region,
        "endpoint": bucket.url,
        "virtual_hosted_style_request": bucket.virtual,
        "skip_signature": config.credentials is None,
        # Objects are deleted one by one; a bulk request reports a refusal inside of an answer of status 200, and not
        # every store has it.
        "disable_bulk_delete": True,
    }
    if "AWS_ENDPOINT_URL_S3" in os.environ:  # obstore would prefer it, even empty, to `endpoint`
        options["aws_endpoint_url_s3"] = bucket.url
    return S3Store(
        name,
        prefix=prefix or None,
        client_options=client_options,
        retry_config=_RETRIES,
        credential_provider=None if config.credentials is None else config.provide,
        **options,
    )
