from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
import tls

from pia_batch.config import PlacementConfig, RunConfig
from pia_batch.driver import ray_cluster
from pia_batch.driver.authentication import authentication, is_silent, program_at
from pia_batch.driver.preflight import Finding, cluster, devices, examine, machine, storage
from pia_batch.driver.submission import Jobs
from pia_batch.errors import ConfigError
from pia_batch.storage.object_store import Store

MakeConfig = Callable[..., RunConfig]


def torch(*devices: dict[str, Any], cuda: str | None = "12.6") -> Callable[[], dict[str, Any]]:
    usual = {"name": "NVIDIA H100", "capability": 9, "memory": 80 * 2**30, "errors": []}
    return lambda: {"torch": "2.13.0", "cuda": cuda, "devices": [usual | device for device in devices]}


def examined(config: RunConfig | None, ask: Callable[[], dict[str, Any]], obstacle: str | None = None) -> list[Finding]:
    """Every finding, without a start of Ray, which `obstacle` keeps from starting."""
    return list(examine(config, ask, lambda _: obstacle))


def found(config: RunConfig | None, subject: str, ask: Callable[[], dict[str, Any]] | None = None) -> list[Finding]:
    return [finding for finding in examined(config, ask or torch()) if finding.subject == subject]


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

    findings = examined(config, torch(cuda=None))

    assert {finding.subject for finding in findings if finding.state == "ok"} >= {
        *("python", "packages", "codecs", "devices", "weights", "manifest", "store", "clock", "ray", "capacity")
    }
    assert [finding for finding in findings if finding.state == "fail" and finding.subject != "disk"] == []
    assert [item.name for item in Store(config.output).list("")] == ["_journal/create-only"]


def test_without_a_config_only_the_machine_is_checked() -> None:
    subjects = {finding.subject for finding in examined(None, torch())}

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
    ("body", "answer"),
    [
        ('{"authentication_mode": "token"}', "token"),
        ('{"authentication_mode": "disabled"}', "none"),
        ("<html>", "unknown"),
    ],
)
def test_a_dashboard_is_asked_whether_it_wants_a_token(dashboard: Callable[[str], str], body: str, answer: str) -> None:
    assert authentication(dashboard(body)) == answer


def test_an_address_that_answers_in_another_protocol_is_reported(
    make_config: MakeConfig, dashboard: Callable[[str], str]
) -> None:
    address = dashboard("<html>").removeprefix("http://")

    findings = examined(make_config(placement__ray_address=address), torch(), "cannot reach Ray; correct its address")
    warned, unreachable = (finding for finding in findings if finding.subject == "ray")
    refused = only(make_config(placement__ray_address=address, placement__require_auth=True), "ray")

    assert (warned.state, unreachable.state, refused.state) == ("warn", "fail", "fail")
    assert "capacity" not in {finding.subject for finding in findings}
    assert "answers, but not whether it asks for a token" in warned.message
    assert "HEAD:6379" in refused.remedy


def test_a_ray_on_this_machine_starts_next_to_the_other_checks(make_config: MakeConfig) -> None:
    begun = threading.Event()

    def connection(_: PlacementConfig) -> None:
        begun.set()

    def facts() -> dict[str, Any]:
        assert begun.wait(20)
        return torch()()

    findings = list(examine(make_config(), facts, connection))

    assert [finding.state for finding in findings if finding.subject == "ray"] == ["ok"]


def test_what_keeps_a_run_from_ray_is_a_failure_with_its_remedy(make_config: MakeConfig) -> None:
    findings = examined(make_config(), torch(), "Ray cannot start on this machine: no room; free some; and more")

    (ray,) = [finding for finding in findings if finding.subject == "ray"]
    assert ray == Finding("fail", "ray", "Ray cannot start on this machine: no room", "free some; and more")


@pytest.mark.parametrize(
    ("address", "environment", "words"),
    [
        (
            None,
            {"TMPDIR": f"/{'x' * 80}"},
            "TMPDIR: too long for the sockets of a Ray on this machine (got 81 bytes",
        ),
        (None, {"RAY_TMPDIR": "tmp"}, "RAY_TMPDIR: not the absolute path of a folder"),
        ("http://127.0.0.1:8265", {}, "is the URL of a dashboard, which only `submit` and `jobs` use"),
        ("ftp://127.0.0.1:1", {}, "no Ray answers at ftp://127.0.0.1:1"),
    ],
)
@pytest.mark.slow
def test_the_process_that_connects_finds_what_a_run_would_end_with(
    address: str | None, environment: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    place = PlacementConfig(ray_address=address)

    obstacle = cluster.find_obstacle(place)

    assert obstacle is not None
    assert words in obstacle
    assert "; " in obstacle
    with pytest.raises(ConfigError) as refused, ray_cluster.connect(place):
        pass
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("address", "raised", "remedy"),
    [
        ("auto", ConnectionError("Could not find any running Ray instance."), "unset RAY_ADDRESS"),
        ("10.0.0.1:6379", RuntimeError("Version mismatch: The cluster was started with:"), "the same versions of Ray"),
        ("10.0.0.1:6379", ValueError("Package size (643MiB) exceeds the maximum size of 512"), "UV_RUN_RUNTIME_ENV=0"),
        ("10.0.0.1:6379", ConnectionError("Failed to connect"), "run this on one of its nodes"),
        ("ftp://10.0.0.1", ValueError("Module: ftp does not have init()"), "correct placement.ray_address"),
    ],
)
def test_a_cluster_that_cannot_be_reached_is_one_line_with_a_remedy(
    address: str, raised: Exception, remedy: str
) -> None:
    explained = str(ray_cluster._unreachable(address, raised))

    assert explained.startswith(f"cannot reach Ray at {address}: {type(raised).__name__}: {raised}")
    assert remedy in explained


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", b"-ERR unknown\r\n"]
)
def test_another_program_at_the_address_of_a_cluster_is_told_at_once(said: bytes, scheme: str) -> None:
    with (
        _greeting(said) as listening,
        pytest.raises(ConfigError, match=f"another program than Ray answers at {scheme}{listening}; correct placement"),
        ray_cluster.connect(PlacementConfig(ray_address=f"{scheme}{listening}")),
    ):
        pass


@contextmanager
def _greeting(said: bytes) -> Iterator[str]:
    """A program that says something to everyone who connects, and hangs up; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with client:
                        client.sendall(said)

        threading.Thread(target=greet, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a program that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_program_that_says_nothing_is_not_taken_for_ray(silent: str) -> None:
    assert program_at(silent, seconds=0.5) == program_at(f"ray://{silent}", seconds=0.5) == "silent"
    assert is_silent(f"http://{silent}", seconds=0.5)


def test_a_program_that_says_nothing_is_not_taken_for_a_ray_with_tls(
    silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")

    assert program_at(silent, seconds=0.5) == program_at(f"ray://{silent}", seconds=0.5) == "silent"


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n"])
def test_a_program_without_tls_is_not_taken_for_a_ray_with_tls(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")

    with (
        _greeting(said) as listening,
        pytest.raises(ConfigError, match=f"answers at {listening}; unset RAY_USE_TLS if the cluster has no TLS; corr"),
        ray_cluster.connect(PlacementConfig(ray_address=listening)),
    ):
        pass


@pytest.mark.parametrize("asks_for_a_certificate", [False, True])
def test_a_server_of_grpc_with_tls_is_left_to_ray(
    asks_for_a_certificate: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    bundle, _ = tls.authority(tmp_path)
    chain = (tmp_path / "server.pem").read_bytes()
    credentials = grpc.ssl_server_credentials(
        [(chain, chain)], root_certificates=bundle.read_bytes(), require_client_auth=asks_for_a_certificate
    )
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()

    assert program_at(f"127.0.0.1:{port}", seconds=10) == "ray"
    server.stop(None)


def test_a_dashboard_that_answers_something_is_not_silent(dashboard: Callable[[str], str]) -> None:
    assert not is_silent(dashboard("<html>"))
    assert not is_silent("http://127.0.0.1:1")


@pytest.mark.parametrize("said", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"-ERR unknown\r\n"])
def test_another_program_at_the_address_of_a_dashboard_is_one_line(said: bytes) -> None:
    with _greeting(said) as address, pytest.raises(ConfigError, match=f"no Ray dashboard answers at http://{address}"):
        Jobs(f"http://{address}").ours()


@pytest.mark.long
def test_a_program_that_says_nothing_at_the_address_of_a_cluster_is_one_line_within_seconds(silent: str) -> None:
    began = time.monotonic()

    with (
        pytest.raises(
            ConfigError, match=f"a program listens at {silent}, and does not answer within 15 s; if it is Ray"
        ),
        ray_cluster.connect(PlacementConfig(ray_address=silent)),
    ):
        pass
    assert time.monotonic() - began < 60


def test_auto_without_a_ray_on_this_machine_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def search(_: str) -> str:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", search)

    assert authentication("auto") == "unknown"


def test_a_low_limit_of_open_files_is_a_warning() -> None:
    assert not list(machine.check_process(machine.OPEN_FILES, "utf-8"))
    (finding,) = machine.check_process(machine.OPEN_FILES - 1, "utf-8")

    assert_finding(finding, "warn", f"at most {machine.OPEN_FILES - 1} open files")


def test_names_that_are_not_in_utf_8_are_a_warning() -> None:
    (finding,) = machine.check_process(machine.OPEN_FILES, "iso8859-1")

    assert_finding(finding, "warn", "names of files are in iso8859-1")
    assert "PYTHONUTF8=1" in finding.remedy


def test_what_is_missing_or_unreadable_is_a_failure_with_a_remedy(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    config = make_config(manifest="/nowhere", output=str(tmp_path / "file" / "out"), model__base="/nowhere/model")

    failed = {finding.subject: finding for finding in examined(config, torch()) if finding.state == "fail"}

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

    findings = [each for each in examined(make_config(output=s3), torch()) if each.subject in ("store", "clock")]

    assert [finding.state for finding in findings] == ["ok", "ok"]
    assert time.monotonic() - started < 60
    assert [item.name for item in Store(s3).list("")] == ["_journal/create-only"]
