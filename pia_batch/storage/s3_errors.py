"""Errors of botocore, and of the programs and servers that it asks, as one line with the setting to correct."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pia_batch.errors import MESSAGE_LENGTH, ConfigError, printable
from pia_batch.storage.uris import redacted

NO_CREDENTIALS_REMEDY = (
    "set AWS_ACCESS_KEY_ID with AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a role; "
    "for a public bucket set AWS_SKIP_SIGNATURE=true"
)
"""Remedy where no usable credentials were found."""


@contextmanager
def explained(profile: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Turn an exception of botocore, or of what it asks, into a ConfigError with a remedy.

    Args:
        profile: Settings of the profile that is used; None: unknown.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as err:  # noqa: BLE001 - botocore raises its own, RuntimeError, ValueError, OSError and UnicodeError
        words = " ".join(str(err).split()) or type(err).__name__
        if _is_garbled(err, words):  # its text may repeat the answer, and so a secret
            raise ConfigError(f"S3: {_GARBLED}; {_ISSUER_REMEDY}") from None
        reason = redacted(printable(words)[:MESSAGE_LENGTH]).rstrip(".:")
        if not type(err).__module__.startswith("botocore"):
            reason = f"the credentials could not be obtained: {reason}"
        raise ConfigError(f"S3: {reason}; {_remedy(err, words, profile or {})}") from None


def _is_garbled(err: Exception, words: str) -> bool:
    """Return True for an exception of botocore about an answer that no server of AWS gives.

    It is a KeyError for a part that the answer lacks, and a ClientError without a code for one of another service.
    """
    names = {kind.__name__ for kind in type(err).__mro__}
    return bool(names & {"KeyError", "ResponseParserError"}) or ("ClientError" in names and "(Unknown)" in words)


def _remedy(err: Exception, words: str, profile: Mapping[str, Any]) -> str:
    names = {kind.__name__ for kind in type(err).__mro__}
    if "PartialCredentialsError" in names and "source_profile" in words:
        return "add one of them to the profile that has the role_arn"
    known = next((remedy for kinds, remedy in _REMEDIES if names & kinds), None)
    if known is not None:
        return known
    if setting := setting_quoted_by(words, profile):
        return f"correct {setting}"
    return next((remedy for text, remedy in _BY_WORDS if text in words), _OTHERWISE)


def setting_quoted_by(
    message: str, profile: Mapping[str, Any], environment: Mapping[str, str] = os.environ
) -> str | None:
    """Return the name of the variable, or of the profile's line, whose value a message quotes; None if there is none.

    Args:
        message: Message of another library.
        profile: Settings of the profile.
        environment: Variables of this process.
    """
    quoted = {text for found in _QUOTED.findall(message) for text in found if len(text) > 1}
    quoted.add(message.rpartition(": ")[2])
    of_environment = ((name, value) for name, value in environment.items() if name.startswith("AWS_"))
    of_profile = ((f"{name} of the profile", value) for name, value in profile.items() if isinstance(value, str))
    found = ((name, value) for settings in (of_environment, of_profile) for name, value in settings if value)
    return next((name for name, value in found if any(text == value or f"//{text}" in value for text in quoted)), None)


_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")

_CONFIG_REMEDY = "correct the file, which AWS_CONFIG_FILE or AWS_SHARED_CREDENTIALS_FILE may name, or is in ~/.aws"

_GARBLED = "the server that is asked for the credentials does not answer as AWS does"
_ISSUER_REMEDY = (
    "set AWS_ENDPOINT_URL_STS (for single sign-on AWS_ENDPOINT_URL_SSO and AWS_ENDPOINT_URL_SSO_OIDC), or endpoint_url "
    "of sts in the profile's services; without them AWS_ENDPOINT_URL counts, and a store may issue no credentials"
)

_REMEDIES = (
    (frozenset({"ProfileNotFound"}), "correct or unset AWS_PROFILE, or add the profile to ~/.aws/config"),
    (frozenset({"ConfigParseError", "ConfigNotFound", "InvalidConfigError"}), _CONFIG_REMEDY),
    (frozenset({"PartialCredentialsError"}), "set both the access key id and the secret access key, or neither"),
    (frozenset({"SSOError", "TokenRetrievalError", "LoginError"}), "run `aws sso login`, or `aws login`"),
    (
        frozenset({"UnsupportedS3ConfigurationError", "InvalidS3AddressingStyleError"}),
        "correct the section s3 of the profile",
    ),
    (frozenset({"InvalidMaxRetryAttemptsError"}), "correct AWS_MAX_ATTEMPTS, or max_attempts of the profile"),
    (frozenset({"InvalidRetryModeError"}), "correct AWS_RETRY_MODE, or retry_mode of the profile"),
    (frozenset({"InvalidDefaultsMode"}), "correct AWS_DEFAULTS_MODE, or defaults_mode of the profile"),
    (
        frozenset({"InvalidSTSRegionalEndpointsConfigError"}),
        "correct AWS_STS_REGIONAL_ENDPOINTS, or sts_regional_endpoints of the profile",
    ),
    (
        frozenset({"InvalidIMDSEndpointModeError"}),
        "correct AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE, or ec2_metadata_service_endpoint_mode of the profile",
    ),
    (
        frozenset({"InvalidIMDSEndpointError"}),
        "correct AWS_EC2_METADATA_SERVICE_ENDPOINT, or ec2_metadata_service_endpoint of the profile",
    ),
    (
        frozenset({"InvalidChecksumConfigError"}),
        "correct AWS_REQUEST_CHECKSUM_CALCULATION and AWS_RESPONSE_CHECKSUM_VALIDATION, or their lines of the profile",
    ),
    (
        frozenset({"MissingDependencyException"}),
        "install it on every node, or write the output of `aws configure export-credentials` into the environment",
    ),
    (
        frozenset({"ClientError"}),
        "correct the role, its trust policy, or the keys or the token by which the profile or AWS_ROLE_ARN assumes it",
    ),
    (
        frozenset({"ParamValidationError"}),
        "correct role_arn and web_identity_token_file of the profile, or AWS_ROLE_ARN and AWS_WEB_IDENTITY_TOKEN_FILE",
    ),
    (
        frozenset({"ConnectionError", "HTTPClientError"}),
        "it issues the credentials: check the network, HTTPS_PROXY, NO_PROXY, and AWS_ENDPOINT_URL_STS if it is set",
    ),
    (
        frozenset({"CredentialRetrievalError", "RuntimeError"}),
        "renew them, or correct what the profile names as their source",
    ),
)
"""Remedies by the names of botocore's exceptions and of their base classes."""

_BY_WORDS = (
    ("No closing quotation", "correct the quotes in credential_process of the profile"),
    ("codec can't decode", "correct AWS_WEB_IDENTITY_TOKEN_FILE, or the files of the profile: one is no text in UTF-8"),
    ("Unknown string format", "correct AWS_CREDENTIAL_EXPIRATION: it is no time in ISO 8601"),
)
_OTHERWISE = "correct the AWS_ variables and the profile, or unset what is not needed"
