"""Notifications of a run that has ended: real programs, and a real HTTP server on loopback."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pia_batch.config import OnFinishConfig, RunConfig
from pia_batch.driver import notifications
from pia_batch.errors import ConfigError
from pia_batch.schema.run_record import RunRecord

RECORD = RunRecord(
    run_id="2026-11-22",
    exit_code=0,
    message="größer",
    started_at=datetime(2026, 11, 22, 4, tzinfo=UTC),
    manifest="m",
    output="o",
    version="0.1.0",
    config={"not": "sent"},
)


@dataclass
class Server:
    """Answers each POST with the next of `statuses`, and the last one from then on; remembers what it got."""

    url: str = ""
    statuses: list[int] = field(default_factory=lambda: [204])
    got: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    silent: threading.Event = field(default_factory=threading.Event)
    """While it is set, nothing is answered."""


@pytest.fixture
def server() -> Iterator[Server]:
    fake = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            fake.got.append((self.path, dict(self.headers.items()), body))
            while fake.silent.is_set():
                time.sleep(0.02)
            status = fake.statuses.pop(0) if len(fake.statuses) > 1 else fake.statuses[0]
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield fake
    fake.silent.clear()
    http.shutdown()
    thread.join()
    http.server_close()


def notify(config: OnFinishConfig, record: RunRecord = RECORD) -> list[float]:
    """Notify, and return the seconds waited between the attempts."""
    waits: list[float] = []
    notifications.notify(config, record, sleep=waits.append)
    return waits


def leaves(path: Path) -> tuple[str, ...]:
    """Return a command that writes its standard input to a file."""
    return (sys.executable, "-c", f"import sys; open({str(path)!r}, 'wb').write(sys.stdin.buffer.read())")


def test_a_command_reads_the_summary(tmp_path: Path) -> None:
    notify(OnFinishConfig(command=leaves(tmp_path / "got.json")))

    assert json.loads((tmp_path / "got.json").read_bytes()) == RECORD.payload()


@pytest.mark.parametrize(
    ("on", "exit_code", "notified"),
    [
        (("success",), 0, True),
        (("success",), 3, False),
        (("failure",), 0, False),
        (("failure",), 3, True),
        (("failure",), 75, True),
        (("success", "failure"), 4, True),
        (("always",), 1, True),
    ],
)
def test_it_is_notified_of_the_ends_that_it_asks_for(
    server: Server, on: Any, exit_code: int, *, notified: bool
) -> None:
    notify(OnFinishConfig(webhook=server.url, on=on), RECORD.model_copy(update={"exit_code": exit_code}))

    assert bool(server.got) == notified


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (("/nowhere/program",), "command=/nowhere/program: No such file or directory"),
        ((sys.executable, "-c", "print('no mail'); raise SystemExit(7)"), "exit_code=7: no mail"),
        ((sys.executable, "-c", "import time; time.sleep(60)"), "killed after 1 s (on_finish.timeout_s)"),
        (("bad\0name",), "ValueError"),
    ],
)
def test_a_command_that_fails_is_logged_and_nothing_else(
    caplog: pytest.LogCaptureFixture, command: tuple[str, ...], text: str
) -> None:
    notify(OnFinishConfig(command=command, timeout_s=1 if "time.sleep(60)" in command[-1] else 60))

    assert text in caplog.text


def test_arguments_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    notify(OnFinishConfig(command=(sys.executable, "-c", "raise SystemExit(1)", "--token", "hunter2")))

    assert "exit_code=1" in caplog.text
    assert "hunter2" not in caplog.text


def test_a_webhook_gets_the_summary_and_headers_of_the_environment(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK_TOKEN", "Bearer hunter2")
    monkeypatch.setenv("HOOK_URL", f"{server.url}/services/T0/secret")

    notify(OnFinishConfig(webhook="$HOOK_URL", headers={"Authorization": "HOOK_TOKEN"}))

    ((path, headers, body),) = server.got
    assert path == "/services/T0/secret"
    assert json.loads(body) == RECORD.payload()
    assert (headers["Content-Type"], headers["Authorization"]) == ("application/json", "Bearer hunter2")


def test_a_webhook_that_fails_for_a_while_is_tried_again(server: Server) -> None:
    server.statuses = [503, 429, 200]

    waits = notify(OnFinishConfig(webhook=server.url))

    assert (len(server.got), waits) == (3, [2.0, 4.0])


@pytest.mark.parametrize(("status", "tries"), [(400, 1), (404, 1), (302, 1), (500, 3)])
def test_a_webhook_that_refuses_is_logged_without_its_address(
    server: Server, caplog: pytest.LogCaptureFixture, status: int, tries: int
) -> None:
    server.statuses = [status]

    notify(OnFinishConfig(webhook=f"{server.url}/services/secret?key=hunter2"))

    assert len(server.got) == tries
    assert f"webhook=http://127.0.0.1 attempt={tries} of 3: the server answered {status}" in caplog.text
    assert "secret" not in caplog.text
    assert "hunter2" not in caplog.text


def test_a_webhook_that_never_answers_costs_its_time_and_no_more(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.silent.set()
    started = time.monotonic()

    notify(OnFinishConfig(webhook=server.url, timeout_s=0.3))

    assert caplog.text.count("no answer in 0.3 s") == 3
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"webhook": "http://127.0.0.1:1/secret"}, "webhook=http://127.0.0.1 attempt=3 of 3: ClientConnectorError"),
        ({"webhook": "$NOWHERE"}, "environment variable not set: NOWHERE"),
        ({"webhook": "http://127.0.0.1:1", "headers": {"X-Key": "NOWHERE"}}, "environment variable not set: NOWHERE"),
        ({"webhook": "$NOT_A_URL"}, "the value is not an http or https URL"),
        ({"webhook": "http:///secret"}, "the value is not an http or https URL"),
    ],
)
def test_a_webhook_that_cannot_be_reached_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], text: str
) -> None:
    monkeypatch.setenv("NOT_A_URL", "secret")

    notify(OnFinishConfig(**settings))

    assert text in caplog.text
    assert "secret" not in caplog.text
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_the_key_on_needs_no_quotes_in_yaml(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("manifest: m\noutput: o\non_finish:\n  on: [failure]\n")

    assert RunConfig.load(tmp_path / "run.yaml").on_finish.on == ("failure",)


def test_an_address_that_is_no_url_is_refused_when_the_config_is_read() -> None:
    with pytest.raises(ConfigError, match=r"on_finish\.webhook"):
        RunConfig.load(None, {"manifest": "m", "output": "o", "on_finish.webhook": "hooks.example.com"})
    with pytest.raises(ConfigError, match=r"on_finish\.on"):
        RunConfig.load(None, {"manifest": "m", "output": "o", "on_finish.on": ["sometimes"]})
