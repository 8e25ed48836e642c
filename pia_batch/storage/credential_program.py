"""Program of a profile's `credential_process`: starts it, limits its time and checks what it prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pia_batch.errors import MESSAGE_LENGTH, ConfigError, printable
from pia_batch.storage.uris import redacted

TIMEOUT_S = 60.0
"""Seconds that the program has. A vault that asks a person for a code would keep every engine of a run waiting."""

_FORM = '{"Version": 1, "AccessKeyId": "…", "SecretAccessKey": "…"}'


class CredentialProgram:
    """Running program, with what botocore uses of `subprocess.Popen`. Its output is never shown: it has secrets."""

    returncode: int

    def __init__(self, command: Sequence[str], **_: Any) -> None:
        """Start the program without a standard input.

        Raises:
            ConfigError: It cannot be started.
        """
        self._name = command[0] if command else ""
        if not self._name:
            raise ConfigError(
                "S3: credential_process of the profile names no program; write a command there, or remove the line"
            )
        try:
            self._process = subprocess.Popen(  # noqa: S603 - the operator's own profile names it
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # so that its children end with it
            )
        except OSError as err:
            raise self._refusal(f"cannot run: {err.strerror}", "install the program, or correct the path") from None

    def communicate(self) -> tuple[bytes, bytes]:
        """Wait for the program, and return its standard output and the reason on its standard error.

        Raises:
            ConfigError: It takes longer than TIMEOUT_S, or succeeds and prints no credentials.
        """
        try:
            printed, errors = self._process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._kill()
            problem = f"has not ended within {TIMEOUT_S:g} s"
            raise self._refusal(
                problem, "run it in a shell: it may ask a question, which a run cannot answer"
            ) from None
        except BaseException:
            self._kill()
            raise
        self.returncode = self._process.returncode
        if self.returncode == 0:
            self._check(printed)
        lines = errors.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"exit code {self.returncode}, and nothing on standard error"
        return printed, f"{printable(self._name)}: {redacted(printable(reason))[:MESSAGE_LENGTH]}".encode()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def _check(self, printed: bytes) -> None:
        from botocore.utils import parse_timestamp  # noqa: PLC0415 - slow, and local runs need none

        remedy = f"it must print {_FORM}; run it in a shell, and correct it or the profile"
        try:
            parsed = json.loads(printed.decode())
        except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
            problem = "prints no JSON" if printed.strip() else "prints nothing"
            raise self._refusal(problem, remedy) from None
        if not isinstance(parsed, dict):
            raise self._refusal("prints JSON that is no object", remedy)
        if parsed.get("Version") != 1:
            raise self._refusal("prints no `Version` of 1", remedy)
        for name in ("AccessKeyId", "SecretAccessKey", "SessionToken", "Expiration"):
            value = parsed.get(name)
            if value is None and name in ("SessionToken", "Expiration"):
                continue
            if not isinstance(value, str) or not value:
                raise self._refusal(f"prints JSON whose `{name}` is missing, empty or no text", remedy)
        try:
            parse_timestamp(parsed.get("Expiration") or "2026-11-29T00:00:00Z")
        except (ValueError, OverflowError):
            raise self._refusal("prints JSON whose `Expiration` is no time in ISO 8601", remedy) from None

    def _refusal(self, problem: str, remedy: str) -> ConfigError:
        return ConfigError(f"S3: credential_process of the profile: {printable(self._name)} {problem}; {remedy}")
