"""S3 configuration: credentials, region, endpoint, CA bundle, addressing style and proxy, the same for both clients.

botocore resolves them by its own rules, as the AWS command line does. s3fs, which reads, and obstore, which commits,
receive the result and look up nothing themselves, so that what can be read from can also be written to. botocore is
imported at the first `s3://` URI only: it takes a quarter of a second.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

from pia_batch.errors import ConfigError
from pia_batch.storage import s3_credentials
from pia_batch.storage.s3_connection import (
    BUNDLE_VARIABLES,
    ca_bundle_of,
    endpoint_of,
    proxies_of,
    region_of,
    written_region,
)
from pia_batch.storage.s3_errors import NO_CREDENTIALS_REMEDY, explained
from pia_batch.storage.uris import redacted

DENIALS = frozenset({"ExpiredToken", "InvalidToken", "MalformedSecurity", "InvalidSecurity", "TokenRefreshRequired"})
"""Codes with which S3 refuses credentials by a status other than 401 and 403."""

FAILURE_TTL_S = 10.0
"""Time for which a failure is reported again without another attempt, in seconds: every row of a run asks."""

ISSUER_TIMEOUTS_S = (5, 15)
"""Seconds for a connection to a server that issues credentials, and for its answer; botocore makes five attempts.

Its own are 60 and 60: a server that never answers would keep a run waiting for five minutes.
"""

_NO_METADATA = "AWS_EC2_METADATA_DISABLED"
_RELEVANT = ("AWS_", "BOTO_", "HOME", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", *BUNDLE_VARIABLES)


@dataclass(frozen=True)
class BucketEndpoint:
    """Address of one bucket."""

    url: str
    """Endpoint without a final slash; it contains the bucket if `virtual` is set."""
    virtual: bool
    """True for virtual-hosted style (`http://bucket.host/key`), False for path style (`http://host/bucket/key`)."""


@dataclass(frozen=True, eq=False)
class S3Config:
    """Resolved configuration of S3, for every bucket and both clients."""

    region: str
    endpoint: str | None
    """Configured endpoint, without a final slash; None: AWS's own."""
    ca_bundle: str
    """Path of a file of CA certificates in PEM format."""
    proxies: Mapping[str, str]
    """Proxy URLs by the scheme of the endpoint; empty if the endpoint is reached directly."""
    credentials: Any = field(repr=False)  # botocore is untyped
    """botocore's credentials, which refresh themselves; None: requests are not signed."""
    _session: Any = field(repr=False)  # botocore is untyped
    _client: Any = field(repr=False)  # botocore is untyped
    """botocore's client, which only computes URLs: it sends nothing."""

    @property
    def proxy(self) -> str | None:
        """URL of the proxy between this machine and the endpoint, or None."""
        scheme = urlsplit(self._client.meta.endpoint_url).scheme
        return self.proxies.get(scheme)

    def bucket(self, name: str) -> BucketEndpoint:
        """Return the address of a bucket, as botocore computes it from the endpoint and the addressing style.

        Raises:
            ConfigError: The name cannot be that of a bucket.
        """
        key = "k"
        from botocore.exceptions import ParamValidationError  # noqa: PLC0415 - see `_resolve`

        with explained():
            try:
                url = self._client.head_object(Bucket=name, Key=key)["url"]
            except ParamValidationError as err:
                reason = " ".join(str(err).split())
                raise ConfigError(f"S3: {reason}; correct the name of the bucket") from None
        base = url.removesuffix(f"/{key}")
        if base.endswith(f"/{name}"):
            return BucketEndpoint(base.removesuffix(f"/{name}"), virtual=False)
        return BucketEndpoint(base, virtual=True)

    def provide(self) -> Any:  # a TypedDict of obstore's stubs
        """Return the current credentials in obstore's form; refreshes those that expire.

        Raises:
            ConfigError: They have expired, and cannot be refreshed.
        """
        frozen = self.freeze()
        # obstore asks again once these have expired. botocore knows better when, so obstore asks for every request.
        expires_at = datetime.now(UTC) if hasattr(self.credentials, "refresh_needed") else None
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token or None,  # AWS_SESSION_TOKEN may be empty
            "expires_at": expires_at,
        }

    def freeze(self) -> Any:  # botocore is untyped
        """Return the current credentials in botocore's form; refreshes those that expire.

        Raises:
            ConfigError: They have expired, and cannot be refreshed.
        """
        with explained(self._session.get_scoped_config()):
            return self.credentials.get_frozen_credentials()

    def aio_session(self) -> Any:  # aiobotocore is untyped
        """Return a session for s3fs whose credentials are this object's own."""
        from aiobotocore.session import AioSession  # noqa: PLC0415 - slow, and local runs need none

        session = AioSession(profile=self._session.profile)
        session.register_component("credential_provider", _Provider(self))
        session.register_component("data_loader", self._session.get_component("data_loader"))  # parsed already
        # botocore would follow a bucket to its region, and obstore does not: what reads would not write.
        session.register("needs-retry.s3", _refuse_other_region)
        return session


OTHER_REGION = re.compile(
    r"PermanentRedirect|IllegalLocationConstraint|AuthorizationHeaderMalformed.*region '"
    r"|indicates an incorrectly configured region",  # obstore's words for a redirection
    re.DOTALL,
)
"""Pattern of S3's answers, and of obstore's errors, for a bucket that is in another region."""


def other_region_remedy() -> str:
    """Return what to do about a bucket in another region, by what sets the region of this process."""
    from botocore.session import Session  # noqa: PLC0415 - see `_resolve`

    source, _ = written_region(Session())
    return f"the bucket is in another region; set {source} to it"


def _refuse_other_region(response: Any = None, request_dict: Any = None, **_: object) -> None:  # botocore is untyped
    """Raise PermissionError if S3 answers that a bucket is in another region than the configured one."""
    parsed: Mapping[str, Any] = response[1] if response else {}
    error, answer = parsed.get("Error", {}), parsed.get("ResponseMetadata", {})
    if not error:
        return
    asked = (request_dict or {}).get("context", {}).get("client_region")
    has = answer.get("HTTPHeaders", {}).get("x-amz-bucket-region", asked)  # in place of a body where HEAD has none
    moved = answer.get("HTTPStatusCode") == HTTPStatus.MOVED_PERMANENTLY or has != asked
    if moved or OTHER_REGION.search(f"{error.get('Code')} {error.get('Message')}"):
        raise PermissionError(other_region_remedy())


class _Provider:
    """Credential provider of an aiobotocore session, which asks `S3Config` instead of searching by itself."""

    def __init__(self, config: S3Config) -> None:
        self._config = config

    async def load_credentials(self) -> Any:  # aiobotocore is untyped
        if self._config.credentials is None:
            return None
        return _shared_credentials()(self._config)


@lru_cache(maxsize=1)
def _shared_credentials() -> Callable[[S3Config], Any]:
    from aiobotocore.credentials import AioCredentials  # noqa: PLC0415 - slow, and local runs need none

    class Shared(AioCredentials):  # type: ignore[misc]  # aiobotocore is untyped
        """Credentials for aiobotocore that are those of an `S3Config`."""

        def __init__(self, config: S3Config) -> None:
            frozen = config.freeze()
            super().__init__(frozen.access_key, frozen.secret_key, frozen.token, method=config.credentials.method)
            self._config = config

        async def get_frozen_credentials(self) -> Any:  # botocore is untyped
            refresh_needed = getattr(self._config.credentials, "refresh_needed", None)
            if refresh_needed is not None and refresh_needed():  # may start a program or send a request
                return await asyncio.to_thread(self._config.freeze)
            return self._config.freeze()

    return Shared


_lock = threading.Lock()
_failed: dict[tuple[tuple[str, str], ...], tuple[float, str]] = {}


def resolve() -> S3Config:
    """Return the configuration of S3 in this process's environment. Resolved once for each environment.

    Raises:
        ConfigError: There are no credentials, or something is malformed; the message names the remedy.
    """
    if s3_credentials.is_switched_on(_NO_METADATA):
        os.environ[_NO_METADATA] = "true"  # botocore knows no other value, and would ask a metadata address
    environment = tuple(sorted((k, v) for k, v in os.environ.items() if k.upper().startswith(_RELEVANT)))
    with _lock:
        until_s, message = _failed.get(environment, (0.0, ""))
        if time.monotonic() < until_s:
            raise ConfigError(message)
        try:
            return _resolve(environment)
        except ConfigError as err:
            _failed.clear()
            _failed[environment] = (time.monotonic() + FAILURE_TTL_S, str(err))
            raise


def forget() -> None:
    """Resolve again at the next call of `resolve`, such as after a change of a configuration file."""
    with _lock:
        _resolve.cache_clear()
        _failed.clear()


@lru_cache(maxsize=8)
def _resolve(environment: tuple[tuple[str, str], ...]) -> S3Config:
    del environment  # the key of the cache
    profile: dict[str, Any] = {}
    with explained(profile):
        from botocore import UNSIGNED  # noqa: PLC0415 - slow, and local runs need none
        from botocore.config import Config  # noqa: PLC0415
        from botocore.session import Session  # noqa: PLC0415

        session = Session()
        connect_s, read_s = ISSUER_TIMEOUTS_S
        session.set_default_client_config(Config(connect_timeout=connect_s, read_timeout=read_s))
        _check_profile(session)
        profile |= session.get_scoped_config()
        _check_section(profile)
        endpoint = endpoint_of(session)
        region = region_of(session)
        ca_bundle = ca_bundle_of(session)
        session.set_config_variable("ca_bundle", ca_bundle)  # also for the servers that issue credentials
        client = session.create_client(
            "s3", region_name=region, endpoint_url=endpoint, config=Config(signature_version=UNSIGNED)
        )
        client.meta.events.register("before-call.s3.HeadObject", _answer_with_url)
        proxies = proxies_of(client.meta.endpoint_url)
        credentials = None if _is_anonymous() else s3_credentials.find(session)
        if credentials is None and not _is_anonymous():
            s3_credentials.refuse_incomplete_sso(profile)
            _check_readable(session)
            raise ConfigError(f"S3: no credentials were found; {NO_CREDENTIALS_REMEDY}")
    return S3Config(region, endpoint, ca_bundle, proxies, credentials, session, client)


def _answer_with_url(params: Mapping[str, Any], **_: object) -> tuple[Any, dict[str, str]]:
    """Answer a request of botocore's client with the request's own URL, in place of sending it."""
    return SimpleNamespace(status_code=200), {"url": params["url"]}


def _is_anonymous() -> bool:
    return s3_credentials.is_switched_on("AWS_SKIP_SIGNATURE")


def _check_profile(session: Any) -> None:  # botocore is untyped
    """Refuse a profile that does not exist, which botocore ignores where the environment has keys."""
    wanted = session.profile
    if wanted and wanted not in session.available_profiles:
        from botocore.exceptions import ProfileNotFound  # noqa: PLC0415 - see `_resolve`

        _check_readable(session)
        raise ProfileNotFound(profile=wanted)


def _check_section(profile: Mapping[str, Any]) -> None:
    """Refuse a profile whose s3 is a text, which botocore takes for a group of settings."""
    section = profile.get("s3", {})
    if not isinstance(section, dict):
        raise ConfigError(
            f"S3: s3 of the profile is not a group of settings (got {redacted(str(section))!r}); write `s3 =`, and "
            "below it lines such as `  addressing_style = path`"
        )


def _check_readable(session: Any) -> None:  # botocore is untyped
    """Refuse a file of credentials or configuration that botocore ignored: it may not be read, or is named and no file.

    Raises:
        ConfigError: There is such a file.
    """
    for variable, name in (("credentials_file", "AWS_SHARED_CREDENTIALS_FILE"), ("config_file", "AWS_CONFIG_FILE")):
        path = Path(os.path.expandvars(session.get_config_variable(variable))).expanduser()
        try:
            is_file = path.is_file()
            if is_file:
                path.open("rb").close()
        except OSError as err:
            msg = (
                f"S3: no credentials were found, and {path} cannot be read: {err.strerror}; give this user access to it"
            )
            raise ConfigError(msg) from None
        if not is_file and name in os.environ and str(path) != os.devnull:
            problem = "is no regular file" if path.exists() else "does not exist"
            raise ConfigError(f"{name}: {path} {problem}, so S3 has no credentials of it; correct or unset {name}")
