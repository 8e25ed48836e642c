"""Credentials that other services of AWS issue, and S3 over TLS: fakes of these services and a real S3 server."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
import s3_purposes
import tls
from places import PYTHONPATH
from s3_purposes import PURPOSES
from s3_recorder import Recorder, recording
from seaweedfs import SeaweedFS
from servers import serving

from pia_batch.errors import CERTIFICATE_REMEDY, ConfigError, PiaBatchError
from pia_batch.storage import object_store, s3_config
from pia_batch.storage.object_store import Store

ISSUED = {"AccessKeyId": "ISSUED", "SecretAccessKey": "secret", "SessionToken": "of-the-session"}
LATER = "2099-01-01T00:00:00Z"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    s3_purposes.bare_environment(monkeypatch, tmp_path / "home")
    s3_config.forget()
    yield
    s3_config.forget()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    with recording() as found:
        found.objects[urlsplit(found.url).netloc, "/bucket/place/name"] = b"data"
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", found.url)
        yield found


class _Issuer(BaseHTTPRequestHandler):
    """Answers as AWS's STS, its SSO portal, and the metadata services of its machines and containers."""

    asked: list[str]

    def do_POST(self) -> None:
        fields = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        action = fields["Action"][0]
        given = fields.get("WebIdentityToken", ["signed" if self.headers.get("Authorization") else ""])[0]
        self.asked.append(f"{action} {fields['RoleArn'][0]} {given}")
        issued = "".join(f"<{name}>{value}</{name}>" for name, value in {**ISSUED, "Expiration": LATER}.items())
        self.answer(
            f'<{action}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{action}Result>'
            f"<Credentials>{issued}</Credentials></{action}Result></{action}Response>"
        )

    def do_PUT(self) -> None:
        self.asked.append(f"PUT {self.path}")
        self.answer("a token")

    def do_GET(self) -> None:
        path = urlsplit(self.path)
        secret = next((self.headers[name] for name in _SECRETS if name in self.headers), "")
        self.asked.append(f"GET {path.path} {secret}")
        renamed = {"AccessKeyId": "ISSUED", "SecretAccessKey": "secret", "Token": "t", "Expiration": LATER}
        if path.path == "/federation/credentials":
            issued = {"accessKeyId": "ISSUED", "secretAccessKey": "secret", "sessionToken": "t", "expiration": 4e12}
            self.answer(json.dumps({"roleCredentials": issued}))
        elif path.path.endswith("/security-credentials/"):
            self.answer("the-role")
        else:
            self.answer(json.dumps({"Code": "Success", **renamed}))

    def answer(self, text: str) -> None:
        data = text.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


_SECRETS = ("x-amz-sso_bearer_token", "X-aws-ec2-metadata-token", "Authorization")


@pytest.fixture
def issuer() -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    with serving(type("_Own", (_Issuer,), {"asked": asked})) as url:
        yield url, asked


def machine(url: str, folder: Path) -> dict[str, str]:
    del folder
    return {"AWS_EC2_METADATA_DISABLED": "false", "AWS_EC2_METADATA_SERVICE_ENDPOINT": url}


def container(url: str, folder: Path) -> dict[str, str]:
    del folder
    return {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{url}/creds", "AWS_CONTAINER_AUTHORIZATION_TOKEN": "a token"}


def pod(url: str, folder: Path) -> dict[str, str]:
    (folder / "pod-token").write_text("a token")
    return {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{url}/v1/credentials",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(folder / "pod-token"),
    }


def web_identity(url: str, folder: Path) -> dict[str, str]:
    (folder / "token").write_text("of the pod")
    return {
        "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/r",
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(folder / "token"),
        "AWS_ENDPOINT_URL_STS": url,
    }


def assumed_role(url: str, folder: Path) -> dict[str, str]:
    (folder / "config").write_text(
        "[profile base]\naws_access_key_id = a\naws_secret_access_key = b\n"
        "[profile mine]\nrole_arn = arn:aws:iam::123456789012:role/r\nsource_profile = base\n"
    )
    return {"AWS_CONFIG_FILE": str(folder / "config"), "AWS_PROFILE": "mine", "AWS_ENDPOINT_URL_STS": url}


def chain_of_roles(url: str, folder: Path) -> dict[str, str]:
    """A role of a role of a pod, with the server in the services of the profile: the one of S3 is another."""
    (folder / "token").write_text("of the pod")
    (folder / "config").write_text(
        f"[profile mine]\nservices = here\nrole_arn = arn:aws:iam::123456789012:role/last\nsource_profile = middle\n"
        f"[profile middle]\nrole_arn = arn:aws:iam::123456789012:role/first\n"
        f"web_identity_token_file = {folder / 'token'}\n[services here]\nsts =\n  endpoint_url = {url}\n"
    )
    return {"AWS_CONFIG_FILE": str(folder / "config"), "AWS_PROFILE": "mine"}


ROLES = {
    "machine": (machine, "GET /latest/meta-data/iam/security-credentials/the-role a token"),
    "container": (container, "GET /creds a token"),
    "pod": (pod, "GET /v1/credentials a token"),
    "web identity": (web_identity, "AssumeRoleWithWebIdentity arn:aws:iam::123456789012:role/r of the pod"),
    "assumed role": (assumed_role, "AssumeRole arn:aws:iam::123456789012:role/r signed"),
    "chain of roles": (chain_of_roles, "AssumeRole arn:aws:iam::123456789012:role/last signed"),
}


@pytest.mark.parametrize("role", ROLES)
def test_credentials_of_a_role_serve_every_purpose_and_are_asked_for_once(
    role: str,
    recorder: Recorder,
    issuer: tuple[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    configure, last = ROLES[role]
    for name, value in configure(issuer[0], tmp_path).items():
        monkeypatch.setenv(name, value)
    s3_config.forget()

    for purpose in PURPOSES.values():
        purpose("s3://bucket/place")

    assert {request.access_key for request in recorder.seen} == {"ISSUED"}
    assert issuer[1].count(last) == 1
    assert issuer[1][-1] == last


class _Garbling(BaseHTTPRequestHandler):
    """Answers requests for credentials as other servers do."""

    status = 200
    text = ""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.text)))
        self.end_headers()
        self.wfile.write(self.text.encode())

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (200, ""),
        (200, "{}"),
        (200, "<html>Log in</html>"),
        (404, "<html>Not found</html>"),
        (405, "<Error><Code>MethodNotAllowed</Code><Message>a store</Message></Error>"),
        (502, "Bad gateway"),
        (200, "<AssumeRoleResponse><AssumeRoleResult/></AssumeRoleResponse>"),
        (200, "<R><AssumeRoleResult><Credentials><SecretAccessKey>a secret</SecretAccessKey></Credentials>"),
    ],
)
def test_what_no_server_of_credentials_answers_names_the_setting_of_its_address_and_shows_no_secret(
    status: int, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serving(type("_Own", (_Garbling,), {"status": status, "text": text})) as url:
        for name, value in assumed_role(url, tmp_path).items():
            monkeypatch.setenv(name, value)
        s3_config.forget()

        with pytest.raises(ConfigError, match="does not answer as AWS does; set AWS_ENDPOINT_URL_STS") as refused:
            s3_config.resolve()

    assert "secret" not in str(refused.value)


def test_a_server_of_credentials_that_never_answers_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(s3_config, "ISSUER_TIMEOUTS_S", (1, 0.1))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for name, value in assumed_role(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path).items():
            monkeypatch.setenv(name, value)
        s3_config.forget()

        with pytest.raises(ConfigError, match=r"Read timeout on endpoint URL.*; it issues the credentials: check"):
            s3_config.resolve()


@pytest.mark.parametrize("disabled", ["true", "TRUE", "1", "yes", " on "])
def test_a_role_of_the_machine_is_not_asked_for_where_that_is_disabled(
    disabled: str, issuer: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config").write_text(
        "[default]\nrole_arn = arn:aws:iam::123456789012:role/r\ncredential_source = Ec2InstanceMetadata\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", issuer[0])
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", disabled)
    s3_config.forget()

    with pytest.raises(ConfigError, match="No credentials found in credential_source"):
        s3_config.resolve()
    assert issuer[1] == []


_PROGRAM = """
from s3_purposes import PURPOSES
for purpose in PURPOSES.values():
    purpose("s3://bucket/place")
"""


@pytest.mark.parametrize("form", ["of a profile", "of a session"])
def test_a_token_of_single_sign_on_serves_every_purpose(
    form: str, recorder: Recorder, issuer: tuple[str, list[str]], tmp_path: Path
) -> None:
    """In a process of its own, because botocore reads HOME once."""
    start, home = "https://portal.example/start", tmp_path / "home"
    account = "sso_account_id = 123456789012\nsso_role_name = r\n"
    session = f"sso_start_url = {start}\nsso_region = us-east-1\n"
    own = f"[profile mine]\n{account}{session}"
    shared = f"[profile mine]\n{account}sso_session = s\n[sso-session s]\n{session}sso_registration_scopes = x\n"
    cache = home / ".aws" / "sso" / "cache"
    cache.mkdir(parents=True)
    (home / ".aws" / "config").write_text(own if form == "of a profile" else shared)
    name = hashlib.sha1((start if form == "of a profile" else "s").encode(), usedforsecurity=False).hexdigest()
    token = {"startUrl": start, "region": "us-east-1", "accessToken": "cached", "expiresAt": LATER}
    (cache / f"{name}.json").write_text(json.dumps(token))
    environment = os.environ | {"AWS_PROFILE": "mine", "AWS_ENDPOINT_URL_SSO": issuer[0], "PYTHONPATH": PYTHONPATH}

    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, check=False, timeout=120
    )

    assert done.returncode == 0, done.stderr[-2000:]
    assert {request.access_key for request in recorder.seen} == {"ISSUED"}
    assert issuer[1] == ["GET /federation/credentials cached"]


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def filled(s3_server: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of the server with the one object that is read, and the server's keys."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    s3_config.forget()
    place = f"s3://{s3_server.bucket}/secured-{time.time_ns()}"
    Store(place).create("name", b"data")
    return place


def by_variable(bundle: Path, folder: Path) -> dict[str, str]:
    del folder
    return {"AWS_CA_BUNDLE": str(bundle)}


def by_profile(bundle: Path, folder: Path) -> dict[str, str]:
    (folder / "config").write_text(f"[default]\nca_bundle = {bundle}\n")
    return {"AWS_CONFIG_FILE": str(folder / "config")}


def by_requests(bundle: Path, folder: Path) -> dict[str, str]:
    del folder
    return {"REQUESTS_CA_BUNDLE": str(bundle)}


def by_openssl(bundle: Path, folder: Path) -> dict[str, str]:
    del folder
    return {"SSL_CERT_FILE": str(bundle)}


@pytest.mark.long
@pytest.mark.s3
@pytest.mark.parametrize("configure", [by_variable, by_profile, by_requests, by_openssl])
@pytest.mark.parametrize("proxied", [False, True])
def test_a_server_with_a_certificate_of_ones_own_authority_serves_every_purpose(
    configure: Callable[[Path, Path], dict[str, str]],
    proxied: bool,
    s3_server: SeaweedFS,
    filled: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    bundle, context = tls.authority(tmp_path)
    asked: list[str] = []
    with tls.ending_tls(context, s3_server.ports[3]) as url, tls.connecting(asked) as proxy:
        variables = (
            {"AWS_ENDPOINT_URL": url} | configure(bundle, tmp_path) | ({"HTTPS_PROXY": proxy} if proxied else {})
        )
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        s3_config.forget()
        for purpose in PURPOSES.values():
            before = len(asked)
            purpose(filled)
            assert (len(asked) > before) >= (proxied and purpose is s3_purposes.as_output)

    assert set(asked) == ({f"CONNECT {urlsplit(url).netloc} HTTP/1.1"} if proxied else set())


@pytest.mark.long
@pytest.mark.s3
@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_certificate_that_nobody_vouches_for_is_refused_for_every_purpose(
    purpose: str, s3_server: SeaweedFS, filled: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(object_store, "ATTEMPTS", 1)
    _, context = tls.authority(tmp_path)
    with tls.ending_tls(context, s3_server.ports[3]) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3_config.forget()
        with pytest.raises(PiaBatchError) as caught:
            PURPOSES[purpose](filled)

    assert "\n" not in str(caught.value)
    assert "certificate" in str(caught.value)
    assert str(caught.value).endswith(CERTIFICATE_REMEDY)
