"""Connection of S3: region, endpoint, proxy and CA certificates, found by the rules of botocore and checked by name."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pia_batch.errors import ConfigError
from pia_batch.storage.uris import redacted

DEFAULT_REGION = "us-east-1"
"""Region where none is configured. Servers other than AWS accept any."""

BUNDLE_VARIABLES = ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
"""Variables of other programs for a file of CA certificates. obstore would read the second one, and s3fs neither."""

SYSTEM_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Ubuntu, Arch
    "/etc/pki/tls/certs/ca-bundle.crt",  # Fedora, RHEL, Amazon Linux
    "/etc/ssl/ca-bundle.pem",  # SUSE
    "/etc/ssl/cert.pem",  # Alpine, macOS
)
"""Certificates that the system trusts, by the systems that keep them there."""

_SCHEMES = frozenset({"http", "https"})


def region_of(session: Any) -> str:  # botocore is untyped
    """Return the region.

    Raises:
        ConfigError: it has no such name; the message has what sets it.
    """
    from botocore.exceptions import InvalidRegionError  # noqa: PLC0415 - see `s3_config`
    from botocore.utils import validate_region_name  # noqa: PLC0415

    source, region = written_region(session)
    try:
        validate_region_name(region)
    except InvalidRegionError:
        raise ConfigError(
            f"S3: {source}: not the name of a region (got {region!r}); write one such as eu-west-1, without quotes and "
            "spaces"
        ) from None
    return region


def written_region(session: Any) -> tuple[str, str]:  # botocore is untyped
    """Return what sets the region, and the region; without any, the variable that sets it, and the default."""
    # botocore reads AWS_DEFAULT_REGION only; every other AWS program, and our own deployment files, use AWS_REGION.
    for variable in ("AWS_DEFAULT_REGION", "AWS_REGION"):
        if region := os.environ.get(variable):
            return variable, region
    if region := session.get_scoped_config().get("region"):
        return f"the region of the profile {session.profile or 'default'!r}", region
    return "AWS_DEFAULT_REGION", DEFAULT_REGION


def endpoint_of(session: Any) -> str | None:  # botocore is untyped
    """Return the configured endpoint in the spelling that both clients accept; None if there is none.

    Raises:
        ConfigError: it is no URL that both clients send to as it is written; the message has what sets it.
    """
    ignored = session.get_config_variable("ignore_configured_endpoint_urls")
    if ignored is True or str(ignored).lower() == "true":
        return None
    scoped = session.get_scoped_config()
    services = session.full_config.get("services", {})
    section = scoped.get("services")
    if section is not None and section not in services:
        raise ConfigError(
            f"S3: the profile names the services section {section!r}, which does not exist; "
            f"add [services {section}] to {_config_file(session)}, or remove the line"
        )
    of_service = services.get(section, {}).get("s3", {})
    if not isinstance(of_service, dict):
        raise ConfigError(
            f"S3: s3 in the services section {section!r} is not a group of settings (got "
            f"{redacted(str(of_service))!r}); write `s3 =`, and below it `  endpoint_url = …`, into "
            f"{_config_file(session)}"
        )
    profile = f"endpoint_url of the profile {session.profile or 'default'!r}"
    found = (
        ("AWS_ENDPOINT_URL_S3", os.environ.get("AWS_ENDPOINT_URL_S3")),
        ("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT_URL")),
        (profile, of_service.get("endpoint_url")),
        (profile, scoped.get("endpoint_url")),
    )
    for source, written in found:
        if written:
            return _normal_endpoint(source, written)
    return None


def _normal_endpoint(source: str, written: str) -> str:
    def refusal(problem: str) -> ConfigError:
        shown = redacted(written)
        return ConfigError(f"{source}: {problem} (got {shown!r}); write http://HOST:PORT or https://HOST")

    if not written.isprintable() or any(character.isspace() or character in "'\"\\<>^`{|}" for character in written):
        raise refusal("invalid URL: it contains quotes, spaces or other characters that no URL contains")
    try:
        parts = urlsplit(written)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise refusal("invalid URL") from None
    if parts.scheme not in _SCHEMES:
        raise refusal("the URL does not begin with http:// or https://")
    if "@" in parts.netloc:
        raise ConfigError(
            f"{source}: the URL was given with credentials, which logs would repeat; "
            "write them to AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if not host or port == 0 or parts.netloc.endswith(":"):
        raise refusal("invalid URL: no host, or no port after the colon")
    if parts.query or parts.fragment:
        raise refusal("invalid URL: an endpoint has no query and no fragment")
    if "%" in parts.path or ";" in parts.path:  # botocore encodes the first again, and cuts the path at the second
        raise refusal("invalid URL: the path of an endpoint has no '%' and no ';'")
    from botocore.utils import is_valid_endpoint_url, is_valid_ipv6_endpoint_url  # noqa: PLC0415 - see `s3_config`

    if not (is_valid_endpoint_url(written) or is_valid_ipv6_endpoint_url(written)):
        raise refusal("invalid URL: the host is not a host name or an IP address")
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))


def proxies_of(endpoint: str) -> dict[str, str]:
    """Return the proxy for the endpoint by the rules of botocore: HTTP_PROXY, HTTPS_PROXY and NO_PROXY.

    Raises:
        ConfigError: it is not the URL of an HTTP proxy.
    """
    from botocore.httpsession import ProxyConfiguration  # noqa: PLC0415 - see `s3_config`
    from botocore.utils import get_environ_proxies  # noqa: PLC0415

    scheme = urlsplit(endpoint).scheme
    written = get_environ_proxies(endpoint)
    url = ProxyConfiguration(written).proxy_url_for(endpoint)
    if not url:
        return {}
    name = f"{scheme.upper()}_PROXY"
    remedy = f"write http://HOST:PORT, or add the endpoint's host to NO_PROXY (got {redacted(written[scheme])!r})"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ConfigError(f"{name}: invalid URL; {remedy}") from None
    known = parts.scheme in _SCHEMES and "://" not in url.split("://", 1)[1]
    if not known or not host or port == 0 or not url.isprintable() or " " in url:
        raise ConfigError(f"{name}: not the URL of an HTTP proxy; {remedy}")
    return {scheme: url}


def ca_bundle_of(session: Any) -> str:  # botocore is untyped
    """Return the file of CA certificates that both clients get: the configured one, or that of the system.

    Raises:
        ConfigError: It is no file of certificates.
    """
    found = (
        ("AWS_CA_BUNDLE", os.environ.get("AWS_CA_BUNDLE")),
        (f"ca_bundle of the profile {session.profile or 'default'!r}", session.get_scoped_config().get("ca_bundle")),
        *((name, os.environ.get(name)) for name in BUNDLE_VARIABLES),
    )
    source, path = next(((name, path) for name, path in found if path), ("", None))
    if path is None or (source == "SSL_CERT_FILE" and not Path(path).exists()):  # OpenSSL ignores an absent one
        return _system_bundle()
    remedy = "name a file of certificates in PEM format"
    if source in BUNDLE_VARIABLES:
        remedy += f" there, or by AWS_CA_BUNDLE, which counts before {source}"
    if Path(path).exists() and not Path(path).is_file():
        raise ConfigError(f"{source}: {path} is no regular file; {remedy}")
    try:
        text = Path(path).read_bytes()
    except OSError as err:
        raise ConfigError(f"{source}: cannot read {path}: {err.strerror}; {remedy}") from None
    if b"-----BEGIN CERTIFICATE-----" not in text:
        raise ConfigError(f"{source}: {path} has no certificate in PEM format; {remedy}")
    return str(path)


def _system_bundle() -> str:
    """Return the file of CA certificates that the system trusts; that of botocore, if the system has none.

    s3fs by itself would use botocore's, and obstore the system's: what is read could not be written, or the reverse.
    """
    from botocore.httpsession import where  # noqa: PLC0415 - see `s3_config`

    candidates = (*SYSTEM_BUNDLES, ssl.get_default_verify_paths().cafile)
    return next((path for path in candidates if path and os.path.isfile(path)), None) or str(where())  # noqa: PTH113


def _config_file(session: Any) -> str:  # botocore is untyped
    return str(session.get_config_variable("config_file"))
