from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pia_batch.config import RunConfig
from pia_batch.driver.preflight import Finding, devices, examine, machine, storage
from pia_batch.storage.object_store import Store

MakeConfig = Callable[..., RunConfig]


def torch(*devices: dict[str, Any], cuda: str | None = "12.6") -> Callable[[], dict[str, Any]]:
    usual = {"name": "NVIDIA H100", "capability": 9, "memory": 80 * 2**30, "errors": []}
    return lambda: {"torch": "2.13.0", "cuda": cuda, "devices": [usual | device for device in devices]}


def found(config: RunConfig | None, subject: str, ask: Callable[[], dict[str, Any]] | None = None) -> list[Finding]:
    return [finding for finding in examine(config, ask or torch()) if finding.subject == subject]


def only(config: RunConfig | None, subject: str, ask: Callable[[], dict[str, Any]] | None = None) -> Finding:
    (finding,) = found(config, subject, ask)
    return finding


def assert_finding(finding: Finding, state: str, words: str) -> None:
    """Check the state, the message, and that there is a remedy where one is needed."""
    assert finding.state == state
    assert words in finding.message
    assert bool(finding.remedy) == (state != "ok")


@pytest.fixture(autouse=True)
def _neither_cluster_nor_driver_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def test_a_run_that_can_begin_gives_no_failure_and_leaves_one_small_object(make_config: MakeConfig) -> None:
    config = make_config()

    findings = list(examine(config, torch(cuda=None)))

    assert {finding.subject for finding in findings if finding.state == "ok"} >= {
        *("python", "packages", "codecs", "devices", "weights", "manifest", "store", "clock", "ray", "capacity")
    }
    assert [finding for finding in findings if finding.state == "fail" and finding.subject != "disk"] == []
    assert [item.name for item in Store(config.output).list("")] == ["_journal/create-only"]


def test_without_a_config_only_the_machine_is_checked() -> None:
    subjects = {finding.subject for finding in examine(None, torch())}

    assert subjects == {"python", "packages", "codecs", "devices", "disk", "weights", "ray", "capacity"}


def test_torch_runs_in_a_process_of_its_own() -> None:
    facts = devices.torch_facts()

    assert facts["torch"][0].isdigit()
    for device in facts["devices"]:
        assert device["errors"] == []


def test_a_torch_that_cannot_be_imported_is_a_failure_with_its_last_line() -> None:
    def broken() -> dict[str, Any]:
        raise ValueError("ImportError: libcudart.so.12: cannot open shared object file")

    finding = only(None, "devices", broken)

    assert finding.state == "fail"
    assert "libcudart" in finding.message
    assert "pytorch.org" in finding.remedy


@pytest.mark.parametrize(
    ("overrides", "devices", "state", "words"),
    [
        ({"placement__num_gpus": 1}, [{}], "ok", "NVIDIA H100, 80 GiB, torch 2.13.0 for CUDA 12.6"),
        ({"placement__num_gpus": 1}, [{}], "ok", "correct in float16"),
        ({"placement__num_gpus": 0}, [{}], "warn", "not used"),
        ({"placement__num_gpus": 0}, [], "ok", "no GPU, and placement.num_gpus asks for none"),
        ({"placement__num_gpus": 1}, [], "fail", "no GPU, and placement.num_gpus is 1"),
        ({"placement__num_gpus": 1}, [{"errors": ["float16: off"]}], "fail", "float16: off"),
        ({"placement__num_gpus": 1}, [{"errors": ["bfloat16: off"]}], "ok", "correct in float16"),
        ({"placement__num_gpus": 1, "model__dtype": "bfloat16"}, [{"capability": 7}], "warn", "emulates bfloat16"),
        (
            {"placement__num_gpus": 1, "model__dtype": "bfloat16"},
            [{"capability": 8}],
            "ok",
            "correct in bfloat16",
        ),
    ],
)
def test_a_device_is_checked_for_what_the_config_wants_of_it(
    make_config: MakeConfig, overrides: dict[str, Any], devices: list[dict[str, Any]], state: str, words: str
) -> None:
    assert_finding(only(make_config(**overrides), "devices", torch(*devices)), state, words)


def test_half_precision_on_a_cpu_is_reported_as_slow(make_config: MakeConfig) -> None:
    findings = found(make_config(model__dtype="float16"), "devices")

    assert [finding.state for finding in findings] == ["ok", "warn"]
    assert "generates in float16 on a CPU" in findings[1].message


def test_a_gpu_that_torch_does_not_see_is_reported_with_its_driver(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 535.104.05\n")
    program.chmod(0o755)

    finding = only(make_config(placement__num_gpus=1), "devices", torch())

    assert finding.state == "fail"
    assert "does not see the GPU of this machine" in finding.message
    assert "driver 535.104.05" in finding.remedy


@pytest.mark.parametrize(
    ("overrides", "devices", "state", "words"),
    [
        ({}, [], "ok", "enough for one engine and for reading the manifest"),
        (
            {"placement__min_engines": 999, "placement__max_engines": 999},
            [],
            "fail",
            "no CPU is left to read the manifest",
        ),
        ({"placement__num_cpus": 9999}, [], "fail", "no room for one engine"),
        ({"placement__num_gpus": 1, "placement__min_engines": 2, "placement__max_engines": 2}, [{}], "ok", "2 engines"),
    ],
)
def test_engines_need_room_on_this_machine_and_leave_some_for_reading(
    make_config: MakeConfig, overrides: dict[str, Any], devices: list[dict[str, Any]], state: str, words: str
) -> None:
    assert_finding(only(make_config(**overrides), "capacity", torch(*devices)), state, words)


def test_a_driver_of_a_cluster_needs_no_gpu(make_config: MakeConfig) -> None:
    config = make_config(placement__num_gpus=1, placement__ray_address="127.0.0.1:1")

    assert only(config, "devices", torch()).state == "ok"
    assert only(config, "ray", torch()) == Finding(
        "fail",
        "ray",
        "nothing answers at 127.0.0.1:1",
        "start the cluster, or correct placement.ray_address or RAY_ADDRESS",
    )


@pytest.fixture
def dashboard() -> Iterator[Callable[[str], str]]:
    """Return a function that starts a server which answers every request with one JSON text."""
    listening: list[socket.socket] = []

    def serve(body: str) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        listening.append(server)
        answer = f"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"

        def run() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer.encode())

        threading.Thread(target=run, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    yield serve
    for server in listening:
        server.close()


@pytest.mark.parametrize(
    ("body", "required", "state", "words"),
    [
        ('{"authentication_mode": "token"}', False, "ok", "asks for its token"),
        ('{"authentication_mode": "disabled"}', False, "warn", "asks for no token"),
        ('{"authentication_mode": "disabled"}', True, "fail", "asks for no token"),
        ("<html>", False, "warn", "not whether it asks for a token"),
        ("<html>", True, "fail", "not whether it asks for a token"),
    ],
)
def test_a_cluster_is_asked_whether_it_wants_a_token(
    make_config: MakeConfig, dashboard: Callable[[str], str], body: str, required: bool, state: str, words: str
) -> None:
    config = make_config(placement__ray_address=dashboard(body), placement__require_auth=required)

    finding = only(config, "ray")

    assert finding.state == state
    assert words in finding.message


def test_what_is_missing_or_unreadable_is_a_failure_with_a_remedy(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    config = make_config(manifest="/nowhere", output=str(tmp_path / "file" / "out"), model__base="/nowhere/model")

    failed = {finding.subject: finding for finding in examine(config, torch()) if finding.state == "fail"}

    assert set(failed) - {"disk"} == {"manifest", "store", "weights"}
    assert "does not exist" in failed["manifest"].message
    assert all(finding.remedy for finding in failed.values())


def test_an_output_inside_its_manifest_is_a_failure(make_config: MakeConfig) -> None:
    config = make_config()

    finding = only(config.model_copy(update={"output": f"{config.manifest}/out"}), "manifest")

    assert finding.state == "fail"
    assert "its results would be read as requests" in finding.message


class SkewedStore(Store):
    """Store with a clock of its own."""

    def __init__(self, uri: str, ahead_s: float) -> None:
        super().__init__(uri)
        self._ahead_s = ahead_s

    def stat(self, name: str) -> Any:
        item = super().stat(name)
        return type(item)(item.name, item.num_bytes, item.etag, item.modified_s + self._ahead_s)


@pytest.mark.parametrize(("ahead_s", "words"), [(60.0, "60 s behind"), (-60.0, "60 s ahead of"), (1.0, "within 5 s")])
def test_a_clock_that_differs_from_the_stores_is_reported(tmp_path: Path, ahead_s: float, words: str) -> None:
    *_, clock = storage.check_store(SkewedStore(str(tmp_path / "out"), ahead_s))

    assert clock.state == ("ok" if abs(ahead_s) < 5 else "warn")
    assert words in clock.message


def test_versions_are_compared_with_what_was_tested(tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("# made by hand\nnumpy==2.0.0\nray==2.60.0\n")

    assert machine.pinned_versions(tmp_path / "constraints.txt") == {"numpy": "2.0.0", "ray": "2.60.0"}
    assert machine.pinned_versions(tmp_path / "none.txt") == {}


def test_a_disk_is_measured_where_the_folder_will_be(tmp_path: Path) -> None:
    assert machine.nearest_existing(tmp_path / "not" / "yet" / "there") == tmp_path


@pytest.mark.s3
def test_a_real_store_is_read_written_and_its_clock_compared(s3: str, make_config: MakeConfig) -> None:
    started = time.monotonic()

    findings = [each for each in examine(make_config(output=s3), torch()) if each.subject in ("store", "clock")]

    assert [finding.state for finding in findings] == ["ok", "ok"]
    assert time.monotonic() - started < 60
    assert [item.name for item in Store(s3).list("")] == ["_journal/create-only"]
