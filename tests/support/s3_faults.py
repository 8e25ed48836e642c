"""Faults of an S3 configuration, each with how to prepare it and the pattern of the message that reports it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import seaweedfs

Files = Callable[..., None]
Prepare = Callable[[pytest.MonkeyPatch, Files, Path], None]

KEYS = f"aws_access_key_id = {seaweedfs.KEY}\naws_secret_access_key = {seaweedfs.SECRET}\n"

ROLE = "role_arn = arn:aws:iam::123456789012:role/me\n"
IDENTITY = {"AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/me", "AWS_ENDPOINT_URL_STS": "http://127.0.0.1:9"}


def profile(config: str, **variables: str) -> Prepare:
    """Return a preparation of the profile `me`, with the other profiles after it."""
    return environment(f"[profile me]\n{config}", AWS_PROFILE="me", **variables)


def environment(config: str = "", **variables: str) -> Prepare:
    """Return a preparation by a file of configuration and variables; {folder} is a folder of the test."""

    def prepare(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
        (folder / "empty").write_text("")
        (folder / "binary").write_bytes(b"\xff\xfe")
        os.mkfifo(folder / "pipe")
        files(config.replace("{folder}", str(folder)))
        for name, value in variables.items():
            patch.setenv(name, value.replace("{folder}", str(folder)))

    return prepare


def program(text: str) -> Prepare:
    """Return a preparation of a profile whose program is a line of the shell."""
    return profile(f"credential_process = sh -c {shlex.quote(text)}\n")


def with_keys(config: str = "", **variables: str) -> Prepare:
    keys = {"AWS_ACCESS_KEY_ID": seaweedfs.KEY, "AWS_SECRET_ACCESS_KEY": seaweedfs.SECRET}
    return environment(config, **keys | variables)


def printing(**fields: object) -> Prepare:
    return program(f"echo {shlex.quote(json.dumps({'Version': 1} | fields))}")


PROGRAMS: dict[str, tuple[Prepare, str]] = {
    "prints text": (program("echo hello"), "sh prints no JSON; it must print"),
    "prints nothing": (program("true"), "sh prints nothing; it must print"),
    "prints no UTF-8": (program(r"printf '\377\376'"), "sh prints no JSON; it must print"),
    "prints a part": (program('echo \'{"Version": 1, "SecretAccessKey": "hidden\''), "prints no JSON; it must print"),
    "prints a list": (program("echo []"), "sh prints JSON that is no object; it must print"),
    "prints null": (program("echo null"), "sh prints JSON that is no object; it must print"),
    "prints no version": (program("echo {}"), "sh prints no `Version` of 1; it must print"),
    "prints another version": (printing(Version=2), "sh prints no `Version` of 1; it must print"),
    "prints no keys": (printing(), "JSON whose `AccessKeyId` is missing, empty or no text; it must"),
    "prints no secret": (printing(AccessKeyId="a"), "JSON whose `SecretAccessKey` is missing, empty or no text"),
    "prints null for keys": (printing(AccessKeyId=None, SecretAccessKey=None), "`AccessKeyId` is missing, empty or"),
    "prints numbers": (printing(AccessKeyId=5, SecretAccessKey=6), "`AccessKeyId` is missing, empty or no text"),
    "prints a wrong time": (
        printing(AccessKeyId="a", SecretAccessKey="b", Expiration="soon"),
        "JSON whose `Expiration` is no time in ISO 8601; it must print",
    ),
    "asks a question": (program("read code && echo $code"), "sh: exit code 1, and nothing on standard error; renew"),
    "fails": (program("echo first >&2; echo the vault is closed >&2; exit 1"), "sh: the vault is closed; renew"),
    "fails without a word": (program("exit 3"), "sh: exit code 3, and nothing on standard error; renew them"),
    "is ended": (program("kill -9 $$"), "sh: exit code -9, and nothing on standard error; renew them"),
    "is absent": (profile("credential_process = /no/such/program\n"), "/no/such/program cannot run: No such file"),
    "is not in PATH": (profile("credential_process = nosuchprogram get\n"), "nosuchprogram cannot run: No such file"),
    "is a folder": (profile("credential_process = {folder}\n"), "cannot run: Permission denied; install"),
    "is no program": (profile("credential_process = {folder}/empty\n"), "cannot run: Permission denied; install"),
    "is not named": (profile("credential_process =\n"), "credential_process of the profile names no program; write"),
    "has an open quote": (profile("credential_process = sh 'a\n"), "No closing quotation; correct the quotes in cred"),
    "is that of the source": (
        profile(f"{ROLE}source_profile = b\n[profile b]\ncredential_process = echo hello\n"),
        "credential_process of the profile: echo prints no JSON; it must print",
    ),
}
"""What may be wrong with a program of credentials, by what it does."""

PROFILES: dict[str, tuple[Prepare, str]] = {
    "is its own source": (profile(f"{ROLE}source_profile = me\n"), r"Infinite loop .*\['me'\]; correct the file"),
    "has a source in a circle": (
        profile(f"{ROLE}source_profile = b\n[profile b]\n{ROLE}source_profile = me\n"),
        r"Infinite loop .*\['me', 'b'\]; correct the file",
    ),
    "has an absent source": (profile(f"{ROLE}source_profile = absent\n"), 'source_profile "absent" referenced in the'),
    "has an empty source": (
        profile(f"{ROLE}source_profile = b\n[profile b]\nregion = us-east-1\n"),
        'The source profile "b" must have credentials; correct the file',
    ),
    "has a role and no source": (profile(ROLE), "source_profile or credential_source; add one of them to the profile"),
    "has two sources": (profile(f"{ROLE}source_profile=me\ncredential_source=Environment\n"), "contains both source_"),
    "has an unknown source": (profile(f"{ROLE}credential_source = Foo\n"), 'credential source "Foo" referenced in'),
    "has a source without keys": (
        profile(f"{ROLE}credential_source = Environment\n"),
        "No credentials found in credential_source referenced in profile me; renew them, or correct",
    ),
    "has SSO without an account": (profile("sso_start_url = https://x.example\n"), "without sso_account_id and sso_r"),
    "has an SSO session without an account": (
        profile("sso_session = s\n[sso-session s]\nsso_region = us-east-1\nsso_start_url = https://x.example\n"),
        "without sso_account_id and sso_role_name; add them, or run `aws configure sso`",
    ),
    "has an absent SSO session": (
        profile("sso_session = absent\nsso_account_id = 1\nsso_role_name = r\n"),
        '"absent" sso_session configuration does not exist; correct the file',
    ),
    "has no token": (profile(f"{ROLE}web_identity_token_file = /absent\n"), "correct web_identity_token_file of the"),
    "has a text for s3": (profile(f"s3 = zz\n{KEYS}"), "s3 of the profile is not a group of settings"),
    "has an invalid region": (profile(f"region = eu/west\n{KEYS}"), "S3: the region of the profile 'me': not the name"),
}
"""What may be wrong with a profile."""

VARIABLES: dict[str, tuple[Prepare, str]] = {
    "AWS_REGION": (with_keys(AWS_REGION="eu_west_1"), r"S3: AWS_REGION: not the name of a region \(got 'eu_west_1'\)"),
    "AWS_REGION in quotes": (with_keys(AWS_REGION='"eu-west-1"'), "S3: AWS_REGION: not the name of a region"),
    "AWS_REGION with a space": (
        with_keys(AWS_REGION="eu-west-1 "),
        "write one such as eu-west-1, without quotes",
    ),
    "AWS_DEFAULT_REGION": (with_keys(AWS_DEFAULT_REGION="us east 1"), "S3: AWS_DEFAULT_REGION: not the name of a reg"),
    "AWS_MAX_ATTEMPTS of text": (with_keys(AWS_MAX_ATTEMPTS="many"), "'many'; correct AWS_MAX_ATTEMPTS"),
    "AWS_MAX_ATTEMPTS": (with_keys(AWS_MAX_ATTEMPTS="0"), "; correct AWS_MAX_ATTEMPTS, or max_attempts of the"),
    "AWS_RETRY_MODE": (with_keys(AWS_RETRY_MODE="often"), "; correct AWS_RETRY_MODE, or retry_mode of the profile"),
    "AWS_DEFAULTS_MODE": (with_keys(AWS_DEFAULTS_MODE="zz"), "; correct AWS_DEFAULTS_MODE"),
    "AWS_STS_REGIONAL_ENDPOINTS": (with_keys(AWS_STS_REGIONAL_ENDPOINTS="zz"), "; correct AWS_STS_REGIONAL_ENDPOINTS"),
    "AWS_REQUEST_CHECKSUM_CALCULATION": (
        with_keys(AWS_REQUEST_CHECKSUM_CALCULATION="zz"),
        "; correct AWS_REQUEST_CHECKSUM_CALCULATION and",
    ),
    "AWS_METADATA_SERVICE_TIMEOUT": (
        environment(AWS_METADATA_SERVICE_TIMEOUT="zz"),
        "; correct AWS_METADATA_SERVICE",
    ),
    "AWS_CONTAINER_CREDENTIALS_FULL_URI": (
        environment(AWS_CONTAINER_CREDENTIALS_FULL_URI="http://example.com/creds"),
        "Unsupported host 'example.com'.*; correct AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ),
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": (
        environment(
            AWS_CONTAINER_CREDENTIALS_FULL_URI="http://127.0.0.1:9/creds",
            AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE="/absent",  # noqa: S106 - no password
        ),
        "'/absent'; correct AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    ),
    "AWS_WEB_IDENTITY_TOKEN_FILE": (
        environment(AWS_WEB_IDENTITY_TOKEN_FILE="/absent", **IDENTITY),  # noqa: S106 - no password
        "'/absent'; correct AWS_WEB_IDENTITY_TOKEN_FILE",
    ),
    "AWS_WEB_IDENTITY_TOKEN_FILE of bytes": (
        environment(AWS_WEB_IDENTITY_TOKEN_FILE="{folder}/binary", **IDENTITY),  # noqa: S106 - no password
        "correct AWS_WEB_IDENTITY_TOKEN_FILE, or the files of the profile: one is no text",
    ),
    "AWS_WEB_IDENTITY_TOKEN_FILE without a token": (
        environment(AWS_WEB_IDENTITY_TOKEN_FILE="{folder}/empty", **IDENTITY),  # noqa: S106 - no password
        "parameter WebIdentityToken, .*; correct role_arn and web_identity_token_file",
    ),
    "AWS_WEB_IDENTITY_TOKEN_FILE without a role": (
        environment(AWS_WEB_IDENTITY_TOKEN_FILE="/absent"),  # noqa: S106 - no password
        "no role ARN configured",
    ),
    "AWS_ROLE_ARN": (
        environment(AWS_WEB_IDENTITY_TOKEN_FILE="/etc/hostname", **IDENTITY | {"AWS_ROLE_ARN": "r"}),  # noqa: S106
        "parameter RoleArn, .*, or AWS_ROLE_ARN and AWS_WEB_IDENTITY_TOKEN_FILE",
    ),
}
"""Values of variables that no client can use."""


def _files(name: str, regular: str) -> dict[str, tuple[Prepare, str]]:
    """Return places of a file that is none: a pipe that nobody writes to would be opened without end."""
    problems = {"pipe": regular, "": regular, "absent": "does not exist"}
    return {
        f"{name} of {place or 'a folder'}": (
            environment(**{name: f"{{folder}}/{place}"}),
            f"^{name}: .*{place} {problem}, so S3 has no credentials of it; correct or unset {name}",
        )
        for place, problem in problems.items()
    }


FILES: dict[str, tuple[Prepare, str]] = {
    **_files("AWS_SHARED_CREDENTIALS_FILE", "is no regular file"),
    **_files("AWS_CONFIG_FILE", "is no regular file"),
    "AWS_CONFIG_FILE of a profile": (
        environment(AWS_CONFIG_FILE="{folder}/absent", AWS_PROFILE="me"),
        "^AWS_CONFIG_FILE: .*absent does not exist",
    ),
    **{
        f"{name} of {place}": (
            with_keys(**{name: f"{{folder}}/{place}"}),
            f"^{name}: .*{problem}; name a file .*{more}",
        )
        for name, more in (
            ("AWS_CA_BUNDLE", "in PEM format$"),
            ("REQUESTS_CA_BUNDLE", "by AWS_CA_BUNDLE, which counts before REQUESTS_CA_BUNDLE$"),
        )
        for place, problem in (
            ("pipe", "is no regular file"),
            (".", "is no regular file"),
            ("absent", "No such file or directory"),
            ("empty", "has no certificate in PEM format"),
        )
    },
    "SSL_CERT_FILE of empty": (with_keys(SSL_CERT_FILE="{folder}/empty"), "^SSL_CERT_FILE: .*no certificate in PEM"),
    "ca_bundle": (
        profile(f"ca_bundle = /absent\n{KEYS}"),
        "^ca_bundle of the profile 'me': cannot read /absent: No such file",
    ),
}
"""Files that variables and a profile name, and that are none."""

REGIONS = {
    "AWS_REGION": with_keys(AWS_REGION="us-east-1"),
    "AWS_DEFAULT_REGION": with_keys(AWS_DEFAULT_REGION="us-east-1", AWS_REGION="us-west-2"),
    "the region of the profile 'me'": profile(f"region = us-east-1\n{KEYS}"),
}
