"""Notifications: calls the operator's program and webhook (`on_finish`) when a run has ended.

Neither can change how the run ended: failures here are only logged. Addresses, headers and arguments may be secrets:
they are never logged.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from pia_batch.config import OnFinishConfig
from pia_batch.errors import printable
from pia_batch.schema.run_record import RunRecord
from pia_batch.storage import filesystems, http_client

log = logging.getLogger(__name__)

TRIES = 3
"""Maximum number of attempts for a webhook that does not answer, or answers that it may do so later."""

_RETRY_S = 2.0
"""Seconds before the second attempt; twice that before the third."""


def notify(config: OnFinishConfig, record: RunRecord, sleep: Callable[[float], None] = time.sleep) -> None:
    """Send the run record to the program and the webhook of `config`, if they want this kind of end.

    Never raises because of them.

    Args:
        config: Program and webhook, and the ends for which they are called.
        record: Record of the run; `exit_code` decides between success and failure. Its config is not sent.
        sleep: Function that waits for so many seconds.
    """
    end = "failure" if record.exit_code else "success"
    if not {end, "always"}.intersection(config.on):
        return
    data = json.dumps(record.payload(), ensure_ascii=False).encode()
    if config.command:
        _run_command(config, data)
    if config.webhook:
        _post(config, data, sleep)


def _run_command(config: OnFinishConfig, data: bytes) -> None:
    program = config.command[0]
    try:
        done = subprocess.run(  # noqa: S603 - the operator's own program, without a shell
            config.command,
            input=data,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=config.timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        log.warning("on_finish_failed command=%s: killed after %g s (on_finish.timeout_s)", program, config.timeout_s)
        return
    except (OSError, ValueError) as err:
        cause = err.strerror if isinstance(err, OSError) and err.strerror else type(err).__name__
        log.warning("on_finish_failed command=%s: %s", program, cause)
        return
    if done.returncode:
        last = done.stdout.decode(errors="replace").strip().rpartition("\n")[2]
        log.warning("on_finish_failed command=%s exit_code=%d: %s", program, done.returncode, printable(last[:300]))


def _post(config: OnFinishConfig, data: bytes, sleep: Callable[[float], None]) -> None:
    url, headers = _url_and_headers(config)
    if url is None:
        return
    shown = f"{urlsplit(url).scheme}://{urlsplit(url).hostname}"
    for attempt in range(1, TRIES + 1):
        problem, is_transient = _try_post(url, headers, data, config.timeout_s)
        if problem is None:
            return
        log.warning("on_finish_failed webhook=%s attempt=%d of %d: %s", shown, attempt, TRIES, problem)
        if not is_transient:
            return
        if attempt < TRIES:
            sleep(_RETRY_S * attempt)


def _url_and_headers(config: OnFinishConfig) -> tuple[str | None, dict[str, str]]:
    """Return the URL and the headers with the values of their environment variables; no URL if one is missing."""
    variables = dict(config.headers)
    if config.webhook and config.webhook.startswith("$"):
        variables["URL"] = config.webhook[1:]
    missing = sorted(name for name in variables.values() if not os.environ.get(name))
    if missing:
        log.warning("on_finish_failed webhook: environment variable not set: %s", ", ".join(missing))
        return None, {}
    headers = {header: os.environ[name] for header, name in config.headers.items()}
    url = os.environ[variables["URL"]] if "URL" in variables else config.webhook
    if url is None or urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        log.warning("on_finish_failed webhook: the value is not an http or https URL")
        return None, {}
    return url, headers


def _try_post(url: str, headers: dict[str, str], data: bytes, timeout_s: float) -> tuple[str | None, bool]:
    """Post once; return the problem, or None, and whether it may be transient."""
    try:
        status = filesystems.wait(http_client.post, url, headers, data, timeout_s=timeout_s)
    except TimeoutError:
        return f"no answer in {timeout_s:g} s (on_finish.timeout_s)", True
    except Exception as err:  # noqa: BLE001 - any error of the client; its text may have the URL
        return type(err).__name__, True
    if 200 <= status < 300:  # noqa: PLR2004 - success
        return None, False
    return f"the server answered {status}", http_client.is_transient(status)
