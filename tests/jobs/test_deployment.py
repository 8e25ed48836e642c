"""Clusters, image, lock and configs say what Ray, pip, Docker and this package understand."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from deployments import CLUSTERS, FILES, ROOT, commands, keys, options, pins
from dockerfile_parse import DockerfileParser
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import pia_batch
from pia_batch.config import RunConfig

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK = ROOT / "requirements.lock"
CONSTRAINTS = ROOT / "constraints.txt"

by_name = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
on_each_cloud = pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)


@by_name
def test_every_command_and_option_that_is_named_exists(path: Path) -> None:
    known = options()
    for command, flags in commands(path.read_text(encoding="utf-8")):
        assert command in known, command
        assert set(flags) <= known[command], (command, flags)


def test_the_commands_of_a_file_are_found_as_people_write_them() -> None:
    text = (
        "# As pia-batch.\n#   x/pia-batch run a.yaml \\\n#     --manifest m --output=o\n# and `pia-batch gc --delete`\n"
    )
    assert commands(text) == [("run", ["--manifest", "--output"]), ("gc", ["--delete"])]
    assert commands("kubectl -n pia-batch create --x") == []
    found = [command for path in FILES for command, _ in commands(path.read_text(encoding="utf-8"))]
    assert {"run", "submit", "demo", "verify"} <= set(found)


@by_name
def test_every_config_key_that_is_named_exists(path: Path) -> None:
    known = keys()
    sections = {key.partition(".")[0] for key in known if "." in key}
    text = path.read_text(encoding="utf-8")
    if "import torch" in text:
        return  # its names are of tensors
    for key in re.findall(rf"(?<![\w./-])(?:{'|'.join(sections)})\.[a-z_]\w*", text):
        assert key in known, key


@by_name
def test_every_file_of_ours_that_is_named_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("/opt/pia_batch/jobs", " jobs")
    for name in re.findall(r"(?<![\w/.-])((?:jobs|docs|tests|pia_batch)/[\w./-]+\.\w+|[a-z]+\.(?:lock|txt))", text):
        assert (ROOT / name).exists(), name


VARIABLES = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "ray/_private/accelerators/accelerator.py",
    "RAY_ADDRESS": "ray/_private/ray_constants.py",
    "RAY_AUTH_MODE": "ray/_private/authentication/authentication_token_setup.py",
    "RAY_AUTH_TOKEN": "ray/exceptions.py",
    "RAY_AUTH_TOKEN_PATH": "ray/exceptions.py",
    "RAY_AUTOSCALER_AVAILABILITY_RECOVERY_S": "ray/autoscaler/_private/constants.py",
    "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S": "ray/autoscaler/v2/instance_manager/config.py",
    "RAY_BACKEND_LOG_LEVEL": "ray/core/src/ray/raylet/raylet",
    "RAY_HEAD_IP": "ray/autoscaler/_private/util.py",
    "RAY_JOB_STOP_WAIT_TIME_S": "ray/dashboard/modules/job/job_supervisor.py",
    "RAY_USAGE_STATS_ENABLED": "ray/_common/usage/usage_constants.py",
    "HF_HOME": "huggingface_hub/constants.py",
    "HF_HUB_DISABLE_TELEMETRY": "huggingface_hub/constants.py",
    "PIA_BATCH_CACHE": "pia_batch/weights/fetching.py",
}
"""Every variable of Ray's, the hub's and ours that a file may set, and the source that reads it."""


def test_every_environment_variable_that_is_set_is_read_by_somebody() -> None:
    found = set()
    for path in FILES:
        found |= set(re.findall(r"\b(?:RAY|HF|PIA_BATCH)_[A-Za-z_]+[A-Za-z]\b", path.read_text(encoding="utf-8")))
    assert found - set(VARIABLES) == set()
    site = Path(ray.__file__).parents[1]
    for name in found:
        source = VARIABLES[name]
        folder = ROOT if source.startswith("pia_batch") else site
        assert name.encode() in (folder / source).read_bytes(), name


def prepared(path: Path) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config  # noqa: PLC0415 - slow

    config: dict[str, Any] = prepare_config(yaml.safe_load(path.read_text(encoding="utf-8")))
    return config


@on_each_cloud
def test_a_cluster_file_is_valid_for_ray(path: Path) -> None:
    from ray.autoscaler._private.util import validate_config  # noqa: PLC0415

    config = prepared(path)
    validate_config(config)
    with pytest.raises(Exception, match="setup_comands"):
        validate_config(config | {"setup_comands": []})


@on_each_cloud
def test_the_first_worker_is_on_demand_the_others_are_spot_and_none_is_there_without_work(path: Path) -> None:
    assert launched(path, gpus=0) == {}
    assert launched(path, gpus=1) == {"gpu_on_demand": 1}
    assert launched(path, gpus=6) == {"gpu_on_demand": 1, "gpu_spot": 5}
    assert launched(path, gpus=99) == {"gpu_on_demand": 1, "gpu_spot": 15}


def test_ray_does_not_turn_to_another_node_type_by_itself_when_spot_is_refused() -> None:
    """Why the first worker of cluster.yaml is on demand. Once this fails, it can be what spot falls back on."""
    from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import (  # noqa: PLC0415
        CloudResourceMonitor,
    )
    from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent  # noqa: PLC0415

    refused = InstanceUpdateEvent(instance_type="gpu_spot", new_instance_status=Instance.ALLOCATION_FAILED)
    unready = InstanceUpdateEvent(instance_type="gpu_spot", new_instance_status=Instance.ALLOCATION_TIMEOUT)
    monitor = CloudResourceMonitor()
    monitor.notify([refused])
    assert monitor.get_recoverable_resource_availabilities() == {}
    monitor.notify([unready])  # as on Kubernetes, where a pod waits for a node
    assert monitor.get_recoverable_resource_availabilities() == {"gpu_spot": 0.0}


def launched(path: Path, gpus: int) -> dict[str, int]:
    """What Ray's autoscaler starts beside the head when so many engines want a place, by node type."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig  # noqa: PLC0415
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest  # noqa: PLC0415
    from ray.autoscaler.v2.utils import ResourceRequestUtil  # noqa: PLC0415

    config = AutoscalingConfig(prepared(path), skip_content_hash=True)
    place = RunConfig.load(ROOT / "jobs/configs/cluster.yaml", {"manifest": "m", "output": "o"}).placement
    engine = {"GPU": place.num_gpus, "CPU": place.num_cpus}
    wanted = SchedulingRequest(
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(engine) for _ in range(gpus)]),
        disable_launch_config_check=True,
    )
    reply = ResourceDemandScheduler().schedule(wanted)
    return {each.instance_type: each.count for each in reply.to_launch if each.instance_type != "head"}


@on_each_cloud
def test_a_cluster_has_a_node_for_every_engine_of_its_config(path: Path) -> None:
    place = RunConfig.load(ROOT / "jobs/configs/cluster.yaml", {"manifest": "m", "output": "o"}).placement
    config = prepared(path)
    workers = {name: kind for name, kind in config["available_node_types"].items() if name != "head"}
    assert sum(kind["max_workers"] for kind in workers.values()) == config["max_workers"] == place.max_engines
    for kind in workers.values():
        assert kind["resources"]["GPU"] >= place.num_gpus
        assert kind["resources"]["CPU"] >= place.num_cpus + place.fetch_num_cpus


@on_each_cloud
def test_a_cluster_lets_in_those_with_the_token_through_a_tunnel(path: Path) -> None:
    config = prepared(path)
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"].endswith(".ray/auth_token")
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])
    for commands_ in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert all(command.startswith(". ~/pia_batch.env && ") for command in commands_)
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert not re.search(r"access_key|secret|AKIA|private_key", path.read_text(encoding="utf-8"), re.IGNORECASE)


@on_each_cloud
def test_ray_knows_the_options_that_a_node_starts_it_with(path: Path) -> None:
    from ray.scripts.scripts import start  # noqa: PLC0415 - slow

    known = {option for parameter in start.params for option in parameter.opts}
    config = prepared(path)
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        given = re.findall(r"--[a-z-]+", command.partition("ray start")[2])
        assert given
        assert set(given) <= known, command


@on_each_cloud
def test_the_environment_of_a_node_is_written_as_a_shell_reads_it(path: Path, tmp_path: Path) -> None:
    (writes,) = [each for each in prepared(path)["setup_commands"] if "pia_batch.env" in each and "printf" in each]
    clean = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}

    subprocess.run(["bash", "-c", writes], env=clean, check=True)
    shown = subprocess.run(
        ["bash", "-c", ". ~/pia_batch.env && env"], env=clean, check=True, capture_output=True, text=True
    )

    found = dict(line.split("=", 1) for line in shown.stdout.splitlines())
    assert found["PATH"] == f"{tmp_path}/venv/bin:/usr/bin:/bin"
    assert found["RAY_AUTH_MODE"] == "token"
    assert found["PIA_BATCH_CACHE"].endswith("nvme/pia_batch/weights")


def test_the_image_has_one_pinned_base_and_a_user_that_is_not_root() -> None:
    image = dockerfile()
    assert image.is_multistage is False
    name, _, tag = image.baseimage.partition(":")
    assert name == "python"
    assert tag.split("-")[0] in SpecifierSet(PYPROJECT["project"]["requires-python"])
    assert re.match(r"\d+\.\d+\.\d+-", tag), "a tag without the patch version moves"
    (user,) = [each["value"] for each in image.structure if each["instruction"] == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert image.envs["RAY_AUTH_MODE"] == "token"


def test_the_image_installs_the_lock_and_the_package_and_leaves_nothing_else_behind() -> None:
    image = dockerfile()
    runs = [each["value"] for each in image.structure if each["instruction"] == "RUN"]
    installs = [run for run in runs if "pip install" in run]
    assert [("--require-hashes" in run, "--no-deps" in run) for run in installs] == [(True, False), (False, True)]
    assert all("--no-cache-dir" in run and "--mount=type=bind" in run for run in installs)
    assert all("rm -rf /var/lib/apt/lists" in run for run in runs if "apt-get install" in run)
    copied = [each["value"].split()[:-1] for each in image.structure if each["instruction"] in {"COPY", "ADD"}]
    assert copied == [["jobs"]]
    assert image.labels["org.opencontainers.image.version"] == pia_batch.__version__


def test_the_context_of_the_image_is_what_it_is_made_of() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    sent = {rule[1:] for rule in rules if rule.startswith("!")}
    assert rules[0] == "*"
    assert all((ROOT / name).exists() for name in sent)
    build = {PYPROJECT["project"]["readme"], *PYPROJECT["project"]["license-files"]}
    assert {"pia_batch", "jobs", "pyproject.toml", LOCK.name} | build == sent


def dockerfile() -> Any:
    return DockerfileParser(str(ROOT / "Dockerfile"), env_replace=True)


def test_the_lock_has_everything_that_the_package_needs_in_the_versions_of_the_constraints() -> None:
    locked, constrained = pins(LOCK), pins(CONSTRAINTS)
    for requirement in needed():
        assert requirement.name in locked
        assert locked[requirement.name] in requirement.specifier
    for name in locked.keys() & constrained.keys():
        assert locked[name] == constrained[name], f"{name}: run `make lock`"
    beyond = locked.keys() - constrained.keys()
    assert all(re.match(r"nvidia-|cuda-|triton$|setuptools$|py-spy$", name) for name in beyond), beyond


def test_the_lock_has_what_the_needed_packages_need_themselves() -> None:
    from importlib import metadata  # noqa: PLC0415

    locked = pins(LOCK)
    environment = default_environment() | {"sys_platform": "linux", "platform_machine": "x86_64", "extra": ""}
    waiting, seen = [(each.name, tuple(sorted(each.extras))) for each in needed()], set()
    while waiting:
        name, extras = waiting.pop()
        assert name in locked, name
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # what only clouds need is not installed for tests
            continue
        for requirement in map(Requirement, requires):
            chosen = requirement.marker
            if chosen is None or any(chosen.evaluate(environment | {"extra": extra}) for extra in ("", *extras)):
                waiting.append((canonical(requirement.name), tuple(sorted(requirement.extras))))
    assert len(seen) > 80, "the walk ended early"


def test_every_package_of_the_lock_has_hashes_and_no_other_source() -> None:
    text = LOCK.read_text(encoding="utf-8")
    for block in re.split(r"\n(?=[a-z])", text)[1:]:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", block), block
    assert "://" not in text
    assert not re.search(r"^--|^-[a-z]", text, re.MULTILINE)


def needed() -> Iterator[Requirement]:
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    for line in [*project["dependencies"], *extras["aws"], *extras["evaluate"], *extras["gcp"]]:
        requirement = Requirement(line)
        requirement.name = canonical(requirement.name)
        yield requirement


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
