"""Credentials of S3 as botocore finds them, without questions to a person and without keys that no server accepts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from pia_batch.errors import ConfigError
from pia_batch.storage.credential_program import CredentialProgram

_TRUE = frozenset({"1", "true", "on", "yes", "y"})

_KEY = re.compile(r"[^\s\"'\x00-\x20\x7f-\uffff]+")
"""Characters of a key id, a secret or a token; they are parts of HTTP headers."""


def find(session: Any) -> Any:  # botocore is untyped
    """Return the credentials of botocore's session, or None if there are none.

    A run does not ask for an MFA code, nor does a `credential_process` of its profiles.

    Raises:
        ConfigError: A profile needs an MFA code, its program prints no credentials, or a key has characters that no
            key has.
    """
    providers = session.get_component("credential_provider")
    roles = providers.get_provider("assume-role")
    roles._prompter = _refuse_prompt  # noqa: SLF001 - botocore has no other way
    of_source = roles._profile_provider_builder  # noqa: SLF001 - likewise
    create = of_source._create_process_provider  # noqa: SLF001 - likewise
    of_source._create_process_provider = lambda profile_name: _checked(create(profile_name))  # noqa: SLF001 - likewise
    _checked(providers.get_provider("custom-process"))
    found = session.get_credentials()
    if found is not None:
        _check_keys(found.get_frozen_credentials(), found.method)
    return found


def is_switched_on(variable: str) -> bool:
    """Return True if an environment variable has one of the values that AWS's tools and object_store take as true."""
    return os.environ.get(variable, "").strip().lower() in _TRUE


def _checked(provider: Any) -> Any:  # botocore is untyped
    """Return botocore's provider of a `credential_process`, which starts our `CredentialProgram` from now on."""
    provider._popen = CredentialProgram  # noqa: SLF001 - botocore has no other way
    return provider


def _refuse_prompt(_: str) -> NoReturn:
    raise ConfigError(
        "S3: the profile asks for an MFA code (mfa_serial), which a run cannot ask for; get keys by "
        "`aws sts get-session-token` or `aws configure export-credentials`, and set AWS_ACCESS_KEY_ID, "
        "AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
    )


def refuse_incomplete_sso(profile: Mapping[str, Any]) -> None:
    """Refuse a profile of single sign-on without an account and a role, which botocore ignores.

    Raises:
        ConfigError: It is one.
    """
    if any(name in profile for name in ("sso_session", "sso_start_url")) and "sso_account_id" not in profile:
        raise ConfigError(
            "S3: the profile has single sign-on without sso_account_id and sso_role_name; add them, or run "
            "`aws configure sso`"
        )


def _check_keys(frozen: Any, method: str) -> None:  # botocore is untyped
    """Refuse quotes and spaces around keys, as `docker --env-file` and editors leave them. Shows no key."""
    for name, value in (
        ("access key id", frozen.access_key),
        ("secret access key", frozen.secret_key),
        ("session token", frozen.token),
    ):
        if value and not _KEY.fullmatch(value):
            raise ConfigError(
                f"S3: the {name} (from {method}) has quotes, spaces, line breaks or other characters that no key has; "
                "write it without them in the environment or in ~/.aws/credentials"
            )
