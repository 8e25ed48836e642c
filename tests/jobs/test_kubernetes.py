"""The files of jobs/kubernetes/ against schemas that others made, against each other, and against Ray's autoscaler."""

from __future__ import annotations

import copy
import functools
import json
import lzma
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from cronsim import CronSim
from deployments import ROOT, documents, pins

from pia_batch.config import RunConfig

FOLDER = ROOT / "jobs/kubernetes"
VERSIONS = ("1.31", "1.37")
"""Of Kubernetes: the oldest that KubeRay 1.7 was made for, and the newest that has a schema here."""

KUBERAY = json.loads(lzma.decompress((ROOT / "tests/jobs/kuberay.json.xz").read_bytes()))


def strict(node: Any) -> Any:
    """A structural schema as a JSON Schema that refuses fields it does not name."""
    if isinstance(node, list):
        return [strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    node = {key: strict(each) for key, each in node.items()}
    if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
        node.setdefault("additionalProperties", False)
    if node.pop("x-kubernetes-int-or-string", False):
        node.pop("type", None)
        node["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return node


@functools.cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    """Of one of KubeRay's kinds."""
    schema = strict(KUBERAY[kind])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    return jsonschema.Draft202012Validator(schema)


def check(document: dict[str, Any]) -> None:
    """Raise unless a document is what its kind's schema allows, unknown fields refused."""
    if document["apiVersion"] == "ray.io/v1":
        validator(document["kind"]).validate(document)
    else:
        for version in VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)


RUN_DATE = "2026-11-22"


def read(name: str) -> list[dict[str, Any]]:
    """A file's documents, for one run date."""
    return [yaml.safe_load(json.dumps(each).replace("RUN_DATE", RUN_DATE)) for each in documents(FOLDER / name)]


def everything() -> dict[tuple[str, str], dict[str, Any]]:
    """All objects by kind and name, with the config map that kustomize makes."""
    found = [each for name in ("base.yaml", "cronjob.yaml", "rayjob.yaml", "raycronjob.yaml") for each in read(name)]
    (kustomization,) = documents(FOLDER / "kustomization.yaml")
    for made in kustomization["configMapGenerator"]:
        data = {name: (FOLDER / name).read_text(encoding="utf-8") for name in made["files"]}
        found.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": made["name"]}, "data": data})
    return {(each["kind"], each["metadata"]["name"]): each for each in found}


OBJECTS = everything()
RAYJOB = OBJECTS["RayJob", f"pia-batch-{RUN_DATE}"]
CRONJOB = OBJECTS["CronJob", "pia-batch-nightly"]
CLUSTER = RAYJOB["spec"]["rayClusterSpec"]


@pytest.mark.parametrize("name", OBJECTS, ids="/".join)
def test_an_object_is_what_its_schema_allows(name: tuple[str, str]) -> None:
    check(OBJECTS[name])


def add(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    place: Any = changed
    *parents, leaf = path.split("/")
    for part in parents:
        place = place[int(part) if part.isdigit() else part]
    place[leaf] = value
    return changed


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayJob", "spec/shutdownAfterJobFinished", True),
        ("RayJob", "spec/ttlSecondsAfterFinished", "300"),
        ("RayJob", "spec/rayClusterSpec/authOptions/mode", "tokens"),
        ("RayJob", "spec/rayClusterSpec/workerGroupSpecs/0/template/spec/toleration", []),
        ("RayJob", "spec/rayClusterSpec/headGroupSpec/template/spec/containers/0/resources/limit", {}),
        ("RayCronJob", "spec/concurrencyPolicy", "Forbid"),
        ("RayCronJob", "spec/jobTemplate/entrypoints", ""),
        ("CronJob", "spec/concurencyPolicy", "Forbid"),
        ("CronJob", "spec/jobTemplate/spec/backoffLimit", "six"),
        ("NetworkPolicy", "spec/ingres", []),
        ("Role", "rule", []),
    ],
)
def test_a_misspelt_field_or_a_wrong_type_is_refused(kind: str, path: str, value: Any) -> None:
    (document,) = [each for (one, _), each in OBJECTS.items() if one == kind]
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(add(document, path, value))


def pod_specs(node: Any) -> list[dict[str, Any]]:
    """Every pod's spec in an object."""
    if isinstance(node, list):
        return [spec for each in node for spec in pod_specs(each)]
    if not isinstance(node, dict):
        return []
    below = [spec for each in node.values() for spec in pod_specs(each)]
    return [node, *below] if "containers" in node else below


PODS = [(name, spec) for name, each in OBJECTS.items() for spec in pod_specs(each)]


def test_every_pod_runs_without_root_rights_and_within_bounds() -> None:
    assert len(PODS) == 9
    for name, spec in PODS:
        assert spec["securityContext"]["runAsNonRoot"], name
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"]
            assert container["resources"]["limits"]


def test_what_a_pod_refers_to_is_there() -> None:
    headers = "".join((FOLDER / name).read_text(encoding="utf-8") for name in ("base.yaml", "kustomization.yaml"))
    for name, spec in PODS:
        if account := spec.get("serviceAccountName"):
            assert ("ServiceAccount", account) in OBJECTS, name
        volumes = {each["name"]: each for each in spec.get("volumes", [])}
        for container in spec["containers"]:
            assert {each["name"] for each in container.get("volumeMounts", [])} <= volumes.keys()
            for source in container.get("envFrom", []):
                assert f"create secret generic {source['secretRef']['name']} " in headers
        for volume in volumes.values():
            if source := volume.get("configMap"):
                assert ("ConfigMap", source["name"]) in OBJECTS
    assert f"create secret generic {CLUSTER['authOptions']['secretName']} --from-literal=auth_token=" in headers


def test_the_submitter_finds_its_script_and_may_do_what_that_does() -> None:
    spec = CRONJOB["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    (mount,) = container["volumeMounts"]
    path = Path(container["command"][-1])
    assert str(path.parent) == mount["mountPath"]
    assert {path.name, "rayjob.yaml"} == OBJECTS["ConfigMap", "pia-batch-nightly"]["data"].keys()
    binding = OBJECTS["RoleBinding", "pia-batch-submitter"]
    assert [each["name"] for each in binding["subjects"]] == [spec["serviceAccountName"]]
    (rule,) = OBJECTS[binding["roleRef"]["kind"], binding["roleRef"]["name"]]["rules"]
    assert (rule["apiGroups"], rule["resources"]) == (["ray.io"], ["rayjobs"])
    script = (FOLDER / path.name).read_text(encoding="utf-8")
    assert {verb for verb in ("get", "create", "patch", "delete") if f"kubectl {verb}" in script} <= set(rule["verbs"])


def test_the_cluster_wants_a_token_and_only_its_own_pods_and_kuberay_reach_it() -> None:
    assert CLUSTER["authOptions"] == {"mode": "token", "secretName": "pia-batch-token"}
    policy = OBJECTS["NetworkPolicy", "pia-batch"]["spec"]
    ours = policy["podSelector"]["matchLabels"]
    own, operator = policy["ingress"]
    assert "Ingress" in policy["policyTypes"]
    assert own["from"] == [{"podSelector": {"matchLabels": ours}}]
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    groups = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
    templates = [RAYJOB["spec"]["submitterPodTemplate"], *(group["template"] for group in groups)]
    for template in templates:
        assert template["metadata"]["labels"].items() >= ours.items()
    outside = CRONJOB["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"]
    assert not outside.items() >= ours.items()


def test_a_run_ends_by_itself_and_leaves_nothing_behind() -> None:
    spec = RAYJOB["spec"]
    job = CRONJOB["spec"]["jobTemplate"]["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["activeDeadlineSeconds"] < job["activeDeadlineSeconds"] < 24 * 3600
    assert CRONJOB["spec"]["concurrencyPolicy"] == "Forbid"
    limits = nightly().limits
    (head,) = CLUSTER["headGroupSpec"]["template"]["spec"]["containers"]
    seconds = {each["name"]: each["value"] for each in head["env"]}["RAY_JOB_STOP_WAIT_TIME_S"]
    assert (
        limits.stop_grace_s
        < int(seconds)
        <= CLUSTER["headGroupSpec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    )


def test_the_versions_are_those_of_the_constraints_and_the_package() -> None:
    assert CLUSTER["rayVersion"] == pins(ROOT / "constraints.txt")["ray"]
    images = {container["image"] for name, spec in PODS if "Ray" in name[0] for container in spec["containers"]}
    (image,) = images
    assert f"docker build -t {image} ." in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_the_scheduled_job_of_kuberay_is_the_same_job_on_the_same_schedule() -> None:
    cron = OBJECTS["RayCronJob", "pia-batch-nightly"]["spec"]
    template = cron["jobTemplate"]
    assert template | {"entrypoint": f"{template['entrypoint']} --run-date {RUN_DATE}"} == RAYJOB["spec"]
    assert (cron["schedule"], cron["timeZone"]) == (CRONJOB["spec"]["schedule"], CRONJOB["spec"]["timeZone"])
    CronSim(cron["schedule"], __import__("datetime").datetime(2026, 11, 22))


def nightly() -> RunConfig:
    return RunConfig.load(ROOT / "jobs/configs/nightly.yaml")


def launched(gpus: int, *, without_spot: bool = False) -> dict[str, int]:
    """What Ray's autoscaler asks KubeRay for when so many engines want a place, by worker group."""
    from ray.autoscaler._private.kuberay.autoscaling_config import (  # noqa: PLC0415 - slow
        _derive_autoscaling_config_from_ray_cr,
    )
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig  # noqa: PLC0415
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest  # noqa: PLC0415
    from ray.autoscaler.v2.utils import ResourceRequestUtil  # noqa: PLC0415

    resource = {"metadata": {"name": "pia-batch", "namespace": "pia-batch"}, "spec": CLUSTER}
    config = AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(resource), skip_content_hash=True)
    place = nightly().placement
    engine = {"GPU": place.num_gpus, "CPU": place.num_cpus}
    wanted = SchedulingRequest(
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(engine) for _ in range(gpus)]),
        recoverable_resource_availabilities={"gpu-spot": 0.0} if without_spot else {},
        disable_launch_config_check=True,
    )
    reply = ResourceDemandScheduler().schedule(wanted)
    return {each.instance_type: each.count for each in reply.to_launch if not each.instance_type.startswith("head")}


def test_workers_are_spot_while_there_is_spot_and_on_demand_otherwise() -> None:
    assert launched(0) == {}
    assert launched(5) == {"gpu-spot": 5}
    assert launched(3, without_spot=True) == {"gpu-on-demand": 3}
    assert launched(99) == {"gpu-spot": 16, "gpu-on-demand": 4}
    assert CLUSTER["workerGroupSpecs"][0]["maxReplicas"] == nightly().placement.max_engines


KUBECTL = """#!/bin/sh
# A cluster with at most one RayJob: its state is the first line of the file `states`, and each look takes one line off.
cd "$FAKE" && echo "$@" >> calls
case "$1 $*" in
  get*" name") if [ -e there ]; then echo rayjob.ray.io/"$3"; fi ;;
  get*jobDeploymentStatus*) if [ -e there ]; then head -n 1 states && sed -i 1d states; fi ;;
  get*) echo "some reason" ;;
  create*) cat > created && touch there ;;
  delete*) rm there ;;
esac
"""


@pytest.fixture
def submit(tmp_path: Path) -> Callable[..., tuple[int, list[str], str]]:
    """Runs submit.sh against a cluster that goes through some states; returns exit code, calls and what was created."""
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.parent.mkdir()
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)

    def run(*states: str, there: bool = False, owner: bool = False) -> tuple[int, list[str], str]:
        (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
        if there:
            (tmp_path / "there").touch()
        environment = os.environ | {
            "PATH": f"{kubectl.parent}:{os.environ['PATH']}",
            "FAKE": str(tmp_path),
            "POLL_S": "0",
        }
        environment |= {"JOB_NAME": "nightly-1", "JOB_UID": "u-1"} if owner else {}
        done = subprocess.run(
            ["sh", str(FOLDER / "submit.sh"), RUN_DATE], env=environment, check=False, timeout=30, capture_output=True
        )
        created = tmp_path / "created"
        calls = (tmp_path / "calls").read_text().splitlines()
        return done.returncode, calls, created.read_text() if created.exists() else ""

    return run


def test_the_script_makes_the_job_of_a_date_and_waits_for_its_end(submit: Callable[..., Any]) -> None:
    code, calls, created = submit("", "Running", "Complete", owner=True)
    assert code == 0
    assert yaml.safe_load(created) == RAYJOB
    (patch,) = [call for call in calls if call.startswith("patch")]
    assert json.loads(patch.split(" -p ")[1])["metadata"]["ownerReferences"][0]["uid"] == "u-1"


def test_the_script_tells_a_failed_job_from_a_submitter_that_was_lost(submit: Callable[..., Any]) -> None:
    code, _, created = submit("Initializing", "Failed")
    rules = CRONJOB["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert created
    assert [code] == rules[0]["onExitCodes"]["values"]


def test_the_script_waits_for_a_job_that_works_and_makes_one_anew_that_has_ended(submit: Callable[..., Any]) -> None:
    code, calls, created = submit("Running", "Running", "Complete", there=True)
    assert (code, created) == (0, "")
    assert not any(call.startswith(("create", "delete")) for call in calls)

    code, calls, created = submit("Complete", "Running", "Complete", there=True)
    assert code == 0
    assert created
    assert any(call.startswith(f"delete rayjob pia-batch-{RUN_DATE}") for call in calls)
