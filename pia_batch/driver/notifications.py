"""Who is told when a run has ended: `on_finish`, a program and a URL of the operator's own.

Neither can change how the run ended: what goes wrong here is logged. Addresses, headers and arguments may be secrets,
and are not.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from pia_batch.config import OnFinishConfig
from pia_batch.errors import printable
from pia_batch.storage import filesystems, http_client

log = logging.getLogger(__name__)

TRIES = 3
"""How often a webhook is tried that does not answer, or answers that it may do so later."""

_AGAIN_S = 2.0
"""Seconds before the second try; twice that before the third."""


def tell(config: OnFinishConfig, told: dict[str, Any], sleep: Callable[[float], None] = time.sleep) -> None:
    """Hand the summary to whom `config` names, if it asks for such an end. Never raises for their sake.

    Args:
        config: whom, and when.
        told: what run.json says, without the config; `exit_code` decides between success and failure.
        sleep: waits so many seconds.
    """
    ended = "failure" if told["exit_code"] else "success"
    if not {ended, "always"}.intersection(config.on):
        return
    data = json.dumps(told, ensure_ascii=False).encode()
    if config.command:
        _run(config, data)
    if config.webhook:
        _post(config, data, sleep)


def _run(config: OnFinishConfig, data: bytes) -> None:
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
        log.warning("on_finish_failed command=%s: it took more than %g s and was killed", program, config.timeout_s)
        return
    except (OSError, ValueError) as err:
        cause = err.strerror if isinstance(err, OSError) and err.strerror else type(err).__name__
        log.warning("on_finish_failed command=%s: %s", program, cause)
        return
    if done.returncode:
        last = done.stdout.decode(errors="replace").strip().rpartition("\n")[2]
        log.warning("on_finish_failed command=%s exit_code=%d: %s", program, done.returncode, printable(last[:300]))


def _post(config: OnFinishConfig, data: bytes, sleep: Callable[[float], None]) -> None:
    url, headers = _resolved(config)
    if url is None:
        return
    shown = f"{urlsplit(url).scheme}://{urlsplit(url).hostname}"
    for attempt in range(1, TRIES + 1):
        problem, passes = _try(url, headers, data, config.timeout_s)
        if problem is None:
            return
        log.warning("on_finish_failed webhook=%s attempt=%d of %d: %s", shown, attempt, TRIES, problem)
        if not passes:
            return
        if attempt < TRIES:
            sleep(_AGAIN_S * attempt)


def _resolved(config: OnFinishConfig) -> tuple[str | None, dict[str, str]]:
    """The URL and the headers, with what the environment has of them; None where it lacks something."""
    named = dict(config.headers)
    if config.webhook and config.webhook.startswith("$"):
        named["URL"] = config.webhook[1:]
    missing = sorted(name for name in named.values() if not os.environ.get(name))
    if missing:
        log.warning("on_finish_failed webhook: the environment has no %s", ", ".join(missing))
        return None, {}
    headers = {header: os.environ[name] for header, name in config.headers.items()}
    url = os.environ[named["URL"]] if "URL" in named else config.webhook
    if url is None or urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        log.warning("on_finish_failed webhook: what it names is no http or https URL")
        return None, {}
    return url, headers


def _try(url: str, headers: dict[str, str], data: bytes, timeout_s: float) -> tuple[str | None, bool]:
    """What went wrong, None if nothing did, and whether that may pass."""
    try:
        status = filesystems.wait(http_client.post, url, headers, data, timeout_s=timeout_s)
    except TimeoutError:
        return f"no answer in {timeout_s:g} s", True
    except Exception as err:  # noqa: BLE001 - whatever the client raises; its text may have the URL
        return type(err).__name__, True
    if 200 <= status < 300:  # noqa: PLR2004 - success
        return None, False
    return f"the server answered {status}", http_client.may_pass(status)
