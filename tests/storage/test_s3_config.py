"""One configuration of S3 for reading and for committing: where it comes from, and what is wrong with it."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import botocore.exceptions
import botocore.httpsession
import botocore.session
import psutil
import pytest
import s3_purposes
import seaweedfs
import tls
from s3_faults import FILES, PROFILES, PROGRAMS, REGIONS, VARIABLES, Files, Prepare, program, with_keys
from s3_purposes import PURPOSES, as_image, as_output
from s3_recorder import Recorder, recording
from seaweedfs import SeaweedFS
from servers import free_port

from pia_batch.config import ImagesConfig
from pia_batch.driver.preflight.storage import check_images
from pia_batch.errors import ConfigError, ImageUnavailableError, ManifestError, PiaBatchError, StorageError
from pia_batch.storage import credential_program, object_store, s3_config, s3_connection, s3_errors
from pia_batch.storage.object_store import Store

KEYS = f"aws_access_key_id = {seaweedfs.KEY}\naws_secret_access_key = {seaweedfs.SECRET}\n"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No key, no profile and no proxy but those of the test, and no request to a metadata address."""
    s3_purposes.bare_environment(monkeypatch, tmp_path / "home")
    s3_config.forget()
    yield
    s3_config.forget()


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "ATTEMPTS", 1)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with recording() as found:
        yield found


@pytest.fixture
def write_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Files:
    """Writes the two files of AWS programs, and names them in the environment."""

    def write(config: str = "", credentials: str = "") -> None:
        for variable, name, text in (
            ("AWS_CONFIG_FILE", "config", config),
            ("AWS_SHARED_CREDENTIALS_FILE", "credentials", credentials),
        ):
            (tmp_path / name).write_text(text)
            monkeypatch.setenv(variable, str(tmp_path / name))

    return write


def program_of_credentials(folder: Path, **answer: Any) -> str:
    """Return the command of a `credential_process` that counts its calls in `folder`/calls."""
    program = folder / "credentials.py"
    program.write_text(
        "import datetime, json, pathlib\n"
        f"answer = json.loads({json.dumps(json.dumps(answer))})\n"
        "seconds = answer.pop('seconds', None)\n"
        "if seconds is not None:\n"
        "    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)\n"
        "    answer['Expiration'] = end.isoformat()\n"
        f"with pathlib.Path({str(folder / 'calls')!r}).open('a') as file:\n"
        "    file.write('x')\n"
        "print(json.dumps({'Version': 1} | answer))\n"
    )
    return f"{sys.executable} {program}"


def calls(folder: Path) -> int:
    path = folder / "calls"
    return len(path.read_text()) if path.exists() else 0


purposes = pytest.mark.parametrize("purpose", PURPOSES)


# --- sources ---------------------------------------------------------------------------------------------------------


def environment_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweedfs.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweedfs.SECRET)


def source_environment(url: str, patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del files, folder
    environment_keys(patch)
    patch.setenv("AWS_ENDPOINT_URL", url)


def source_keys_in_file(url: str, patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del folder
    files(credentials=f"[default]\n{KEYS}")
    patch.setenv("AWS_ENDPOINT_URL", url)


def source_home_folder(url: str, patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del patch, files
    aws = folder / "home" / ".aws"
    aws.mkdir()
    (aws / "credentials").write_text(f"[default]\n{KEYS}")
    (aws / "config").write_text(f"[default]\nregion = eu-central-1\nendpoint_url = {url}\n")


def source_profile(url: str, patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del folder
    wrong = "aws_access_key_id = wrong\naws_secret_access_key = wrong\n"
    files(
        f"[default]\nendpoint_url = http://127.0.0.1:1\n[profile mine]\nregion = eu-west-1\nendpoint_url = {url}/\n",
        f"[default]\n{wrong}[mine]\n{KEYS}",
    )
    patch.setenv("AWS_PROFILE", "mine")


def source_services_section(url: str, patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del folder
    files(
        f"[profile mine]\nservices = local\nendpoint_url = http://127.0.0.1:1\n{KEYS}"
        f"[services local]\ns3 =\n  endpoint_url = {url}\n"
    )
    patch.setenv("AWS_PROFILE", "mine")


def source_process(url: str, patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del patch
    command = program_of_credentials(folder, AccessKeyId=seaweedfs.KEY, SecretAccessKey=seaweedfs.SECRET, seconds=3600)
    files(f"[default]\nendpoint_url = {url}\ncredential_process = {command}\n")


def source_service_variable(url: str, patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del files, folder
    environment_keys(patch)
    patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    patch.setenv("AWS_ENDPOINT_URL_S3", url)


def source_spellings(url: str, patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del files, folder
    environment_keys(patch)
    patch.setenv("AWS_ENDPOINT_URL_S3", "")
    patch.setenv("AWS_ENDPOINT_URL", url.replace("http:", "HTTP:") + "//")
    patch.setenv("AWS_SESSION_TOKEN", "")


SOURCES = {
    "environment": source_environment,
    "keys in the credentials file": source_keys_in_file,
    "files in the home folder": source_home_folder,
    "profile": source_profile,
    "services section": source_services_section,
    "credential process": source_process,
    "endpoint for S3 only": source_service_variable,
    "other spellings": source_spellings,
}


@pytest.fixture(scope="module")
def filled(s3_server: SeaweedFS) -> str:
    """A prefix of the server with the one object that is read."""
    place = f"s3://{s3_server.bucket}/configured-{time.time_ns()}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment().items():
            patch.setenv(name, value)
        s3_config.forget()
        Store(place).create("name", b"data")
    return place


@pytest.mark.long
@pytest.mark.s3
@purposes
@pytest.mark.parametrize("source", SOURCES)
def test_every_purpose_works_with_every_source_of_the_configuration(
    source: str,
    purpose: str,
    s3_server: SeaweedFS,
    filled: str,
    monkeypatch: pytest.MonkeyPatch,
    write_files: Files,
    tmp_path: Path,
) -> None:
    SOURCES[source](s3_server.url, monkeypatch, write_files, tmp_path)

    PURPOSES[purpose](filled)


# --- what is wrong ---------------------------------------------------------------------------------------------------


def wrong_nothing(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del patch, files, folder


def wrong_profile(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del folder
    files(credentials=f"[default]\n{KEYS}")
    patch.setenv("AWS_PROFILE", "absent")


def wrong_profile_beside_keys(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del files, folder
    environment_keys(patch)
    patch.setenv("AWS_PROFILE", "absent")


def wrong_empty_profile(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del files, folder
    environment_keys(patch)
    patch.setenv("AWS_PROFILE", "")


def wrong_config_file(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del folder
    environment_keys(patch)
    files("region = no section before it\n")


def wrong_credentials_file(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del patch, folder
    files(credentials="[default\nkeys")


def wrong_bytes(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del patch
    files()
    (folder / "credentials").write_bytes(b"\xff\xfe[default]\n")


def wrong_pair(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del files, folder
    patch.setenv("AWS_ACCESS_KEY_ID", seaweedfs.KEY)


def wrong_pair_in_file(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del patch, folder
    files(credentials="[default]\naws_access_key_id = key\n")


def wrong_expired(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del patch
    command = program_of_credentials(folder, AccessKeyId="key", SecretAccessKey="secret", seconds=-60)
    files(f"[default]\ncredential_process = {command}\n")


def wrong_process(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del patch, folder
    files(f"[default]\ncredential_process = {sys.executable} -c 'raise SystemExit(\"the vault is closed\")'\n")


def wrong_sso(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del patch, folder
    files(
        "[default]\nsso_session = me\nsso_account_id = 123456789012\nsso_role_name = role\n"
        "[sso-session me]\nsso_region = us-east-1\nsso_start_url = https://example.invalid/start\n"
    )


def wrong_services(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del patch, folder
    files(f"[default]\nservices = absent\n{KEYS}")


def wrong_style(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del patch, folder
    files(f"[default]\n{KEYS}s3 =\n  addressing_style = sideways\n")


def wrong_ca_bundle(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del files
    environment_keys(patch)
    patch.setenv("AWS_CA_BUNDLE", str(folder / "absent.pem"))


def wrong_ca_bundle_content(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del files
    environment_keys(patch)
    (folder / "empty.pem").write_text("")
    patch.setenv("AWS_CA_BUNDLE", str(folder / "empty.pem"))


def wrong_proxy(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del files, folder
    environment_keys(patch)
    patch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:1080")


def wrong_mfa(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del folder
    role = "role_arn = arn:aws:iam::123456789012:role/me\nsource_profile = keys\nmfa_serial = arn:aws:iam::1:mfa/me\n"
    files(f"[profile role]\n{role}[profile keys]\n{KEYS}")
    patch.setenv("AWS_PROFILE", "role")


def wrong_quotes(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del files, folder
    patch.setenv("AWS_ACCESS_KEY_ID", f'"{seaweedfs.KEY}"')
    patch.setenv("AWS_SECRET_ACCESS_KEY", f'"{seaweedfs.SECRET}"')


def wrong_quotes_in_file(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del patch, folder
    files(credentials=f"[default]\naws_access_key_id = {seaweedfs.KEY}\naws_secret_access_key = '{seaweedfs.SECRET}'\n")


def wrong_line_break(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del files, folder
    environment_keys(patch)
    patch.setenv("AWS_SECRET_ACCESS_KEY", f"{seaweedfs.SECRET}\n")


def wrong_token(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del files, folder
    environment_keys(patch)
    patch.setenv("AWS_SESSION_TOKEN", "token\n")


def wrong_byte_order_mark(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del patch, folder
    files(f"\ufeff[default]\n{KEYS}")


def wrong_services_text(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del patch, folder
    files(f"[default]\nservices = local\n{KEYS}[services local]\ns3 = http://127.0.0.1:9000\n")


def wrong_source_profile(patch: pytest.MonkeyPatch, files: Files, folder: Path) -> None:
    del folder
    files("[profile role]\nrole_arn = arn:aws:iam::123456789012:role/me\nsource_profile = absent\n")
    patch.setenv("AWS_PROFILE", "role")


FAULTS: dict[str, tuple[Prepare, str]] = {
    "no credentials": (wrong_nothing, "no credentials were found; set AWS_ACCESS_KEY_ID"),
    "unknown profile": (wrong_profile, r"profile \(absent\) could not be found; correct or unset AWS_PROFILE"),
    "unknown profile beside keys": (
        wrong_profile_beside_keys,
        r"\(absent\) could not be found; correct or unset AWS_PROFILE",
    ),
    "empty profile": (wrong_empty_profile, "could not be found; correct or unset AWS_PROFILE"),
    "malformed config file": (wrong_config_file, "Unable to parse config file: .*/config; correct the file"),
    "malformed credentials file": (wrong_credentials_file, "Unable to parse config file: .*/credentials; correct"),
    "binary credentials file": (wrong_bytes, "Unable to parse config file: .*/credentials; correct"),
    "incomplete key pair": (wrong_pair, "Partial credentials found in env.*AWS_SECRET_ACCESS_KEY; set both"),
    "incomplete key pair in a file": (
        wrong_pair_in_file,
        "Partial credentials found in shared-credentials.*; set both",
    ),
    "expired credentials": (wrong_expired, "credentials are still expired; renew them"),
    "failing process": (wrong_process, "the vault is closed; renew them, or correct"),
    "SSO without a login": (wrong_sso, "; run `aws sso login`"),
    "unknown services section": (wrong_services, "services section 'absent', which does not exist; add"),
    "unknown addressing style": (wrong_style, "sideways.*; correct the section s3"),
    "absent CA bundle": (wrong_ca_bundle, "AWS_CA_BUNDLE: cannot read .*absent.pem: No such file"),
    "CA bundle without a certificate": (wrong_ca_bundle_content, "AWS_CA_BUNDLE: .* has no certificate in PEM format"),
    "MFA": (wrong_mfa, r"asks for an MFA code \(mfa_serial\), which a run cannot ask for; get keys"),
    "quotes": (wrong_quotes, r"access key id \(from env\) has quotes, .*; write it without them"),
    "quotes in a file": (wrong_quotes_in_file, r"secret access key \(from shared-credentials-file\) has quotes"),
    "line break": (wrong_line_break, r"secret access key \(from env\) has quotes, spaces, line breaks"),
    "line break of a token": (wrong_token, r"session token \(from env\) has quotes, spaces, line breaks"),
    "byte order mark": (wrong_byte_order_mark, "Unable to parse config file: .*/config; correct the file"),
    "services section of text": (wrong_services_text, "services section 'local' is not a group of settings"),
    "unknown source profile": (
        wrong_source_profile,
        'source_profile "absent" referenced in the profile "role" does not',
    ),
    "proxy of another kind": (wrong_proxy, "HTTPS_PROXY: not the URL of an HTTP proxy; write http://HOST:PORT"),
    **{f"program that {name}": fault for name, fault in PROGRAMS.items()},
    **{f"profile that {name}": fault for name, fault in PROFILES.items()},
    **{f"wrong {name}": fault for name, fault in VARIABLES.items()},
    **FILES,
}


def test_a_program_that_hangs_is_ended_with_its_children(
    monkeypatch: pytest.MonkeyPatch, write_files: Files, tmp_path: Path
) -> None:
    monkeypatch.setattr(credential_program, "TIMEOUT_S", 0.5)
    program("sleep 300 & echo $! >child; wait")(monkeypatch, write_files, tmp_path)
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ConfigError, match=r"sh has not ended within 0\.5 s; run it in a shell: it may ask"):
        s3_config.resolve()

    child = psutil.Process(int(Path("child").read_text())) if Path("child").read_text().strip() else None
    assert child is None or child.status() == psutil.STATUS_ZOMBIE


def test_an_empty_region_of_the_environment_leaves_that_of_the_profile(
    monkeypatch: pytest.MonkeyPatch, write_files: Files, tmp_path: Path
) -> None:
    prepare = with_keys("[default]\nregion = eu-west-3\n", AWS_DEFAULT_REGION="", AWS_REGION="")
    prepare(monkeypatch, write_files, tmp_path)

    assert s3_config.resolve().region == "eu-west-3"


@pytest.mark.parametrize("source", REGIONS)
def test_a_bucket_in_another_region_names_what_sets_the_region(
    source: str, monkeypatch: pytest.MonkeyPatch, write_files: Files, tmp_path: Path
) -> None:
    REGIONS[source](monkeypatch, write_files, tmp_path)

    assert s3_config.other_region_remedy() == f"the bucket is in another region; set {source} to it"


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_one_message_with_a_remedy_whatever_the_uri_is_for(
    fault: str, monkeypatch: pytest.MonkeyPatch, write_files: Files, tmp_path: Path
) -> None:
    prepare, expected = FAULTS[fault]
    prepare(monkeypatch, write_files, tmp_path)
    messages = set()

    for purpose in PURPOSES.values():
        with pytest.raises((ConfigError, StorageError)) as caught:
            purpose("s3://bucket/place")
        text = str(caught.value)
        messages.add(text.partition(" cannot be opened: ")[2] or text)

    assert len(messages) == 1
    assert "\n" not in messages.copy().pop()
    with pytest.raises(ConfigError, match=expected):
        s3_config.resolve()
    findings = list(check_images(ImagesConfig(allow=("s3://bucket/",))))
    assert [finding.state for finding in findings] == ["fail"]
    assert findings[0].message in messages


@pytest.mark.parametrize(
    "written",
    [
        "127.0.0.1:9000",
        "localhost:9000",
        "minio",
        "//127.0.0.1:9000",
        '"http://127.0.0.1:9000"',
        "'http://127.0.0.1:9000'",
        " http://127.0.0.1:9000",
        "http://127.0.0.1:9000\n",
        "http:/127.0.0.1:9000",
        "http://",
        "http://:9000",
        "http://127.0.0.1:",
        "http://127.0.0.1:0",
        "http://127.0.0.1:port",
        "http://127.0.0.1:99999",
        "http://[::1",
        "http://[::z]:9000",
        "http://a b:9000",
        "http://a..b:9000",
        "http://${HOST}:9000",
        "http://user:secret@127.0.0.1:9000",
        "http://127.0.0.1:9000/?x=1",
        "http://127.0.0.1:9000/#x",
        "http://127.0.0.1:9000/a%20b",
        "http://127.0.0.1:9000/a;b",
        "ftp://127.0.0.1:9000",
        "s3://bucket",
        "http://höst:9000",
        "null",
    ],
)
@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_that_is_no_url_is_refused_by_the_name_of_its_variable(
    variable: str, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment_keys(monkeypatch)
    monkeypatch.setenv(variable, written)

    for purpose in PURPOSES.values():
        with pytest.raises((ConfigError, StorageError), match=f"{variable}: .*; write ") as caught:
            purpose("s3://bucket/place")
        assert "secret@" not in str(caught.value)
        assert "\n" not in str(caught.value)


OF_BOTOCORE = {
    name: kind
    for name, kind in vars(botocore.exceptions).items()
    if isinstance(kind, type) and issubclass(kind, Exception) and kind.__module__.startswith("botocore")
}


@pytest.mark.parametrize("name", sorted(OF_BOTOCORE))
def test_every_exception_of_botocore_about_credentials_is_one_line_with_a_remedy(name: str) -> None:
    kind = OF_BOTOCORE[name]
    named = type(name, (kind,), {"__str__": lambda _: "first\nsecond", "__module__": kind.__module__})

    with pytest.raises(ConfigError, match=r"^S3: first second; \w") as refused, s3_errors.explained():
        raise named.__new__(named)
    assert "\n" not in str(refused.value)


def test_the_certificates_of_the_system_serve_every_purpose_where_none_are_configured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment_keys(monkeypatch)
    bundle, context = tls.authority(tmp_path)
    with recording() as recorder, tls.ending_tls(context, urlsplit(recorder.url).port or 0) as url:
        recorder.objects[urlsplit(url).netloc, "/bucket/place/name"] = b"data"
        monkeypatch.setattr(s3_connection, "SYSTEM_BUNDLES", ("/absent.pem", str(bundle)))
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)

        for purpose in PURPOSES.values():
            purpose("s3://bucket/place")


def test_a_system_without_certificates_has_those_of_botocore_for_both_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    environment_keys(monkeypatch)
    monkeypatch.setattr(s3_connection, "SYSTEM_BUNDLES", ())
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: SimpleNamespace(cafile=None))

    assert s3_config.resolve().ca_bundle == botocore.httpsession.where()


def test_an_endpoint_in_a_profile_that_is_no_url_is_refused_by_the_name_of_the_profile(
    write_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(f"[profile mine]\nendpoint_url = localhost:9000\n{KEYS}")
    monkeypatch.setenv("AWS_PROFILE", "mine")

    with pytest.raises(ConfigError, match=r"endpoint_url of the profile 'mine': .*'localhost:9000'"):
        s3_config.resolve()


@pytest.mark.parametrize(
    "arn",
    [
        "arn:aws:s3:us-west-2:123456789012:accesspoint/mine",
        "arn:aws:s3:us-west-2:123456789012:accesspoint:mine",
        "arn:aws-cn:s3:cn-north-1:123456789012:accesspoint/mine",
        "arn:aws:s3::123456789012:accesspoint/mine.mrap",
        "arn:aws:s3-outposts:us-west-2:123456789012:outpost/op-1/accesspoint/mine",
        "arn:aws:s3-object-lambda:us-west-2:123456789012:accesspoint/mine",
    ],
)
@pytest.mark.parametrize("purpose", [purpose for purpose in PURPOSES if purpose != "image"])
def test_an_access_point_is_refused_by_name(purpose: str, arn: str) -> None:
    for scheme in ("s3", "s3a", "S3"):
        with pytest.raises((ConfigError, ImageUnavailableError, ValueError), match="access point's alias") as caught:
            PURPOSES[purpose](f"{scheme}://{arn}/key")
        assert "with credentials" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("b--use1-az4--x-s3", "directory bucket"),
        ("point--use1-az4--xa-s3", "directory bucket"),
        ("point-x--op-s3", "Outposts"),
        *((name, "no name of a bucket") for name in ("my bucket", "b\u00fccket", "buck%65t", "-b", ".b")),
    ],
)
@pytest.mark.parametrize("purpose", [purpose for purpose in PURPOSES if purpose != "image"])
def test_a_bucket_that_no_client_can_ask_is_refused_by_name_and_nothing_is_sent(
    purpose: str, name: str, problem: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment_keys(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", recorder.url)

    with pytest.raises((ConfigError, ManifestError, ValueError)) as refused:
        PURPOSES[purpose](f"s3://{name}/place")

    assert problem in str(refused.value) or "invalid name of a bucket" in str(refused.value)
    assert not recorder.seen


SAME_KEYS = [
    "a b",
    "a+b",
    "100%",
    "a%zz",
    "a&b=c",
    "a'b",
    "ünï",
    "日本",
    "a~b",
    "a:b@c",
    "a;b,c",
    "..a",
    "a..",
    "[a]{b}",
]
"""Folders that every client finds under the same key."""


@pytest.mark.long
@pytest.mark.s3
@pytest.mark.parametrize("folder", [*SAME_KEYS, "a#b", "a?b", "a*b"])
def test_a_folder_has_the_same_key_for_every_purpose(
    folder: str, s3_server: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    prefix = f"keys-{time.time_ns()}/{folder}"
    place = f"s3://{s3_server.bucket}/{prefix}"
    s3: Any = botocore.session.Session().create_client("s3", endpoint_url=s3_server.url)
    s3.put_object(Bucket=s3_server.bucket, Key=f"{prefix}/name", Body=b"data")

    for purpose, use in PURPOSES.items():
        if purpose == "images.allow" and folder not in SAME_KEYS:
            with pytest.raises(ValueError, match="has a wildcard, a query or a fragment"):
                use(place)
        else:
            use(place)

    listed = s3.list_objects_v2(Bucket=s3_server.bucket, Prefix=f"{prefix.partition('/')[0]}/")["Contents"]
    assert len(listed) == 2
    assert all(each["Key"].startswith(f"{prefix}/") for each in listed)


# --- refresh ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.s3
def test_credentials_are_obtained_once_for_both_clients_and_again_when_they_expire(
    s3_server: SeaweedFS, filled: str, write_files: Files, tmp_path: Path
) -> None:
    answer = {"AccessKeyId": seaweedfs.KEY, "SecretAccessKey": seaweedfs.SECRET}
    command = program_of_credentials(tmp_path, **answer, seconds=3600)
    write_files(f"[default]\nendpoint_url = {s3_server.url}\ncredential_process = {command}\n")

    for _ in range(2):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda purpose: purpose(filled), PURPOSES.values()))
    assert calls(tmp_path) == 1

    # Less than ten minutes are left, so that botocore renews them before each request, as it would once in an hour.
    program_of_credentials(tmp_path, **answer, seconds=300)
    s3_config.resolve().credentials._expiry_time = s3_config.resolve().credentials._time_fetcher()
    before = calls(tmp_path)
    as_output(filled)
    after_output = calls(tmp_path)
    as_image(filled)
    assert before < after_output < calls(tmp_path)


@pytest.mark.s3
@pytest.mark.usefixtures("quick_retries")
def test_credentials_that_cannot_be_renewed_end_with_the_reason(
    s3_server: SeaweedFS, filled: str, write_files: Files, tmp_path: Path
) -> None:
    command = program_of_credentials(
        tmp_path, AccessKeyId=seaweedfs.KEY, SecretAccessKey=seaweedfs.SECRET, seconds=3600
    )
    write_files(f"[default]\nendpoint_url = {s3_server.url}\ncredential_process = {command}\n")
    store = Store(filled)
    assert store.read("name") == b"data"
    (tmp_path / "credentials.py").write_text("raise SystemExit('the vault is closed')")
    credentials = s3_config.resolve().credentials
    credentials._expiry_time = credentials._time_fetcher()

    with pytest.raises(StorageError, match="the vault is closed"):
        store.read("name")
    with pytest.raises(StorageError, match=r"column 'image'.*the vault is closed"):
        as_image(filled)


@purposes
@pytest.mark.parametrize(
    "refusal",
    [
        (400, "ExpiredToken"),
        (400, "InvalidToken"),
        (403, "InvalidAccessKeyId"),
        (403, "AccessDenied"),
    ],
)
def test_credentials_that_the_server_refuses_are_refused_at_once_with_the_remedy(
    refusal: tuple[int, str], purpose: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment_keys(monkeypatch)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "old")
    monkeypatch.setenv("AWS_ENDPOINT_URL", recorder.url)
    recorder.refusal = refusal

    with pytest.raises((ManifestError, StorageError, ImageUnavailableError), match="check the credentials and the pol"):
        PURPOSES[purpose]("s3://bucket/place")

    assert len(recorder.seen) <= 4


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("style", "virtual"), [(None, False), ("auto", False), ("path", False), ("virtual", True)])
@pytest.mark.parametrize("path", ["", "/", "/gateway/s3"])
def test_both_clients_address_a_bucket_in_the_same_style(
    path: str,
    style: str | None,
    virtual: bool,
    recorder: Recorder,
    write_files: Files,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTP_PROXY", recorder.url)
    setting = f"s3 =\n  addressing_style = {style}\n" if style else ""
    write_files(f"[default]\nregion = eu-west-3\nendpoint_url = http://s3.example:9000{path}\n{KEYS}{setting}")
    base = path.rstrip("/")
    host, root = ("bucket.s3.example:9000", base) if virtual else ("s3.example:9000", f"{base}/bucket")
    recorder.objects[host, f"{root}/a place/name"] = b"data"

    for purpose in PURPOSES.values():
        purpose("s3://bucket/a place")

    assert {request.host for request in recorder.seen} == {host}
    assert all(request.path.startswith(f"{root}/a place/") for request in recorder.seen)
    assert {(request.access_key, request.region) for request in recorder.seen} == {(seaweedfs.KEY, "eu-west-3")}


def test_a_public_bucket_is_read_without_a_signature(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", recorder.url)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    recorder.objects[urlsplit(recorder.url).netloc, "/bucket/place/name"] = b"data"

    for purpose in PURPOSES.values():
        purpose("s3://bucket/place")

    assert {request.signature for request in recorder.seen} == {""}


@pytest.mark.parametrize("variable", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_both_clients_sign_for_the_region_of_the_environment(
    variable: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment_keys(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", recorder.url)
    monkeypatch.setenv(variable, "ap-south-1")
    recorder.objects[urlsplit(recorder.url).netloc, "/bucket/place/name"] = b"data"

    for purpose in PURPOSES.values():
        purpose("s3://bucket/place")

    assert {request.region for request in recorder.seen} == {"ap-south-1"}


@pytest.mark.long
@purposes
@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("refusal", [None, (301, "PermanentRedirect"), (400, "IllegalLocationConstraintException")])
def test_a_bucket_in_another_region_is_refused_by_both_clients_and_followed_by_none(
    purpose: str, refusal: tuple[int, str] | None, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment_keys(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", recorder.url)
    recorder.refusal, recorder.region = refusal, "eu-west-1"
    recorder.objects[urlsplit(recorder.url).netloc, "/bucket/place/name"] = b"data"

    with pytest.raises(PiaBatchError, match=r"the bucket is in another region; set AWS_DEFAULT_REGION to it$"):
        PURPOSES[purpose]("s3://bucket/place")
    assert {request.region for request in recorder.seen} == {"us-east-1"}

    if refusal is None:
        monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
        PURPOSES[purpose]("s3://bucket/place")


# --- proxies, and hosts that were not configured ---------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy"])
@pytest.mark.parametrize("form", ["{host}", "http://{host}", "http://me:word@{host}/"])
def test_both_clients_use_the_proxy_of_the_environment(
    form: str, variable: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment_keys(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.example:9000")
    monkeypatch.setenv(variable, form.format(host=urlsplit(recorder.url).netloc))
    recorder.objects["s3.example:9000", "/bucket/place/name"] = b"data"

    for purpose in PURPOSES.values():
        purpose("s3://bucket/place")

    assert all(request.target.startswith("http://s3.example:9000/bucket/place/") for request in recorder.seen)
    assert {bool(request.proxy_authorization) for request in recorder.seen} == {"@" in form}


@pytest.mark.parametrize(
    ("variable", "excluded"),
    [
        *(("HTTP_PROXY", "127.0.0.1"), ("HTTP_PROXY", "127.0.0.1:{port}"), ("HTTP_PROXY", "x.example, 127.0.0.1")),
        *(("http_proxy", "*"), ("HTTPS_PROXY", ""), ("ALL_PROXY", ""), ("all_proxy", "")),
    ],
)
def test_neither_client_uses_a_proxy_for_a_host_that_is_excluded_or_of_another_scheme(
    variable: str, excluded: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment_keys(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", recorder.url)
    monkeypatch.setenv(variable, f"http://127.0.0.1:{free_port()}")
    if excluded:
        monkeypatch.setenv("NO_PROXY", excluded.format(port=urlsplit(recorder.url).port))
    recorder.objects[urlsplit(recorder.url).netloc, "/bucket/place/name"] = b"data"

    for purpose in PURPOSES.values():
        purpose("s3://bucket/place")

    assert all(request.target.startswith("/bucket/place/") for request in recorder.seen)


@pytest.mark.parametrize("excluded", [".local", "localhost", "127.0.0.0/8", "127.0.0.1:1"])
def test_both_clients_use_the_proxy_for_a_host_that_is_not_excluded(
    excluded: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment_keys(monkeypatch)
    endpoint = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{endpoint}")
    monkeypatch.setenv("HTTP_PROXY", recorder.url)
    monkeypatch.setenv("NO_PROXY", excluded)
    recorder.objects[endpoint, "/bucket/place/name"] = b"data"

    for purpose in PURPOSES.values():
        purpose("s3://bucket/place")

    assert all(request.target.startswith(f"http://{endpoint}/bucket/place/") for request in recorder.seen)


@pytest.mark.usefixtures("quick_retries")
def test_variables_of_one_client_only_lead_nowhere(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, write_files: Files
) -> None:
    """obstore reads AWS_ENDPOINT, s3fs FSSPEC_S3_ENDPOINT_URL, and both read URLs that the profile says to ignore."""
    with recording() as other:
        write_files(f"[default]\n{KEYS}endpoint_url = {recorder.url}\n")
        for name in ("AWS_ENDPOINT", "FSSPEC_S3_ENDPOINT_URL", "AWS_METADATA_ENDPOINT", "AWS_STS_ENDPOINT"):
            monkeypatch.setenv(name, other.url)
        recorder.objects[urlsplit(recorder.url).netloc, "/bucket/place/name"] = b"data"

        for purpose in PURPOSES.values():
            purpose("s3://bucket/place")

        assert recorder.seen
        assert not other.seen


@pytest.mark.long
@pytest.mark.parametrize("disabled", ["true", "TRUE", "1", "yes", " on "])
def test_no_metadata_address_is_asked_where_there_are_no_credentials(
    monkeypatch: pytest.MonkeyPatch, disabled: str
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", disabled)
    with recording() as metadata:
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", metadata.url)
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.url)

        for purpose in PURPOSES.values():
            with pytest.raises((ConfigError, StorageError), match="no credentials were found"):
                purpose("s3://bucket/place")

        assert not metadata.seen


def test_configured_endpoints_can_be_ignored_as_botocore_ignores_them(monkeypatch: pytest.MonkeyPatch) -> None:
    environment_keys(monkeypatch)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:2")
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")

    config = s3_config.resolve()

    assert config.endpoint is None
    assert config.bucket("mine") == s3_config.BucketEndpoint("https://mine.s3.us-west-2.amazonaws.com", virtual=True)
    assert config.bucket("my.own").url == "https://s3.us-west-2.amazonaws.com"
    store: Any = Store("s3://mine/x")._store
    assert {value for name, value in store.config.items() if "endpoint" in name} == {config.bucket("mine").url}


def test_regions_of_other_partitions_and_dual_stack_have_the_addresses_of_botocore(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment_keys(monkeypatch)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "cn-north-1")

    assert s3_config.resolve().bucket("mine").url == "https://mine.s3.cn-north-1.amazonaws.com.cn"
    monkeypatch.setenv("AWS_USE_DUALSTACK_ENDPOINT", "true")
    assert s3_config.resolve().bucket("mine").url == "https://mine.s3.dualstack.cn-north-1.amazonaws.com.cn"


def test_a_local_path_imports_neither_botocore_nor_s3fs(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"request_id": "1", "image": "1.png", "prompt": "p"}\n')
    program = (
        "import sys\n"
        "from pia_batch.manifest.reader import Manifest\n"
        "from pia_batch.storage.object_store import Store\n"
        f"Manifest.open({str(tmp_path / 'm.jsonl')!r})\n"
        f"Store({str(tmp_path / 'out')!r}).create('name', b'')\n"
        "print(sorted({'botocore', 'aiobotocore', 's3fs'} & set(sys.modules)))\n"
    )

    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"
