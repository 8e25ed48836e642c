"""Whether this machine, the weights, the store and Ray are ready for a run; each finding with its remedy.

Torch is asked in a process of its own, as the driver never imports it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from huggingface_hub.constants import HF_HUB_CACHE
from packaging.requirements import Requirement
from packaging.version import Version

from pia_batch.config import EMBEDDED, FORMATS, EncodingConfig, ModelConfig, PlacementConfig, RunConfig
from pia_batch.errors import EncodingError, PiaBatchError, StorageError, message_of, printable
from pia_batch.journal import layout
from pia_batch.manifest.reader import Manifest, refuse_output_inside
from pia_batch.media import codecs
from pia_batch.planning.capacity import Node, find_shortage, local_cpus
from pia_batch.storage.object_store import Store
from pia_batch.storage.uris import redacted_uri
from pia_batch.weights.fetching import cache_folder
from pia_batch.weights.identity import resolved_dtype
from pia_batch.weights.resolve import resolve

State = Literal["ok", "warn", "fail"]

FREE_BYTES = 10 * 10**9
"""For weights: Stable Diffusion 1.5 with PIA's adapter has 6 GB in float32, and is fetched beside what is there."""

RAY_FULL = 0.95
"""The part of a disk in use from which Ray refuses to store objects. Source: `local_fs_capacity_threshold`."""

MAX_SKEW_S = 5.0
"""Between this machine's clock and the store's; leases last `limits.lease_ttl_s`, a minute by default."""

AMPERE = 8
"""The major compute capability from which NVIDIA's GPUs calculate in bfloat16."""

_PROBE_S = 300.0
_CONNECT_S = 5.0

_ASK_TORCH = """
import json, torch
told = {"torch": torch.__version__, "cuda": torch.version.cuda, "devices": []}
for index in range(torch.cuda.device_count()):
    about = torch.cuda.get_device_properties(index)
    wrong = []
    for name in ("float32", "float16", "bfloat16"):
        try:
            ones = torch.ones(64, 64, device=index, dtype=getattr(torch, name))
            if (ones @ ones).sum().item() != 64**3:
                wrong.append(f"{name}: a product of ones is off")
        except RuntimeError as err:
            wrong.append(f"{name}: {err}")
    told["devices"].append({
        "name": about.name, "capability": about.major, "memory": about.total_memory, "wrong": wrong
    })
print(json.dumps(told))
"""

_ASK_RAY = """
import json, sys
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient
nodes = GcsClient(address=canonicalize_bootstrap_address(sys.argv[1])).get_all_node_info(timeout=30).values()
print(json.dumps([dict(node.resources_total) for node in nodes if node.state == 0]))
"""
"""Of every node that is alive what Ray may give away of it. In a process of its own: Ray ends one that it refuses."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `remedy` is empty where there is nothing to do."""

    state: State
    subject: str
    told: str
    remedy: str = ""


def examine(config: RunConfig | None, facts_of_torch: Callable[[], dict[str, Any]] | None = None) -> Iterator[Finding]:
    """Look at everything that a run needs, one finding after the other.

    Writes two small objects below the output, and removes one of them. Fetches weights that are not on this machine.

    Args:
        config: the run's config; None: this machine and the embedded model alone.
        facts_of_torch: what torch says of itself and its devices, as `ask_torch`, which is the default.
    """
    place = PlacementConfig() if config is None else config.placement
    models = {"default": ModelConfig()} if config is None else config.all_models
    yield from _about_packages()
    yield from _about_codecs()
    facts: dict[str, Any] = {"devices": []}
    try:
        facts = (facts_of_torch or ask_torch)()
    except (OSError, ValueError, subprocess.SubprocessError) as err:
        told = f"torch cannot be used: {printable(str(err))}"
        yield Finding("fail", "devices", told, "install the torch that fits this machine: https://pytorch.org")
    else:
        yield from _about_devices(facts, place, models)
    yield from _about_disks(models)
    yield from _about_weights(models)
    if config is not None:
        yield from _about_manifest(config)
        yield from _about_store(Store(config.output))
    yield from _about_ray(place)
    yield from _about_room(place, len(facts["devices"]))


def ask_torch() -> dict[str, Any]:
    """What torch says: its version, its CUDA, and of every device `name`, `capability`, `memory` and what is `wrong`.

    Raises:
        OSError, ValueError, subprocess.SubprocessError: it cannot be imported, or does not answer.
    """
    command = [sys.executable, "-c", _ASK_TORCH]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_S, check=False)  # noqa: S603 - ours
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


def _about_packages() -> Iterator[Finding]:
    python = platform.python_version()
    yield Finding("ok", "python", f"{python} at {sys.executable}")
    try:
        needs = [Requirement(text) for text in importlib.metadata.requires("pia-batch") or []]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("warn", "packages", "pia-batch is not installed here", "`python -m pip install .` in its folder")
        return
    needs = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    versions = {need.name: _version_of(need.name) for need in needs}
    wrong = [need for need in needs if not need.specifier.contains(versions[need.name] or "0", prereleases=True)]
    for need in wrong:
        told = f"{need.name} {versions[need.name] or 'is missing'}, and {need} is needed"
        yield Finding("fail", "packages", told, f"python -m pip install '{need}'")
    if not wrong:
        yield Finding("ok", "packages", f"{len(needs)} in the ranges that pia-batch {_version_of('pia-batch')} needs")
    pins = _pins(Path(__file__).parents[2] / "constraints.txt")
    others = [
        f"{name} {found} (not {pins[name]})"
        for name, found in versions.items()
        if found is not None and name in pins and Version(found).public != Version(pins[name]).public
    ]
    if others:
        remedy = "python -m pip install -c constraints.txt -e . gives the versions that were tested"
        yield Finding("warn", "packages", f"others than were tested: {', '.join(others)}", remedy)


def _version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pins(constraints: Path) -> dict[str, str]:
    """Versions by name, as a source checkout has them; nothing where there is none."""
    if not constraints.is_file():
        return {}
    return dict(re.findall(r"^([\w.-]+)==(\S+)", constraints.read_text(encoding="utf-8"), re.MULTILINE))


def _about_codecs() -> Iterator[Finding]:
    frames = np.stack([np.full((16, 16, 3), level, np.uint8) for level in (60, 190)])
    sound = []
    for fmt in FORMATS:
        try:
            codecs.probe(codecs.encode(frames, fmt, 8, EncodingConfig()), fmt)
            sound.append(fmt)
        except EncodingError as err:
            yield Finding("fail", "codecs", str(err), "python -m pip install --force-reinstall av pillow")
    if sound:
        yield Finding("ok", "codecs", f"{', '.join(sound)}: encoded and decoded")


def _about_devices(facts: dict[str, Any], place: PlacementConfig, models: dict[str, ModelConfig]) -> Iterator[Finding]:
    built = f"torch {facts['torch']}" + (f" for CUDA {facts['cuda']}" if facts["cuda"] else " without CUDA")
    driver = _nvidia_driver()
    for device in facts["devices"]:
        yield from _about_device(device, place, models, f"{built}, driver {driver or 'unknown'}")
    if facts["devices"]:
        return
    if driver is not None:
        remedy = f"a torch for a CUDA that driver {driver} supports, or a newer driver; https://pytorch.org says which"
        yield Finding("fail" if place.num_gpus else "warn", "devices", f"{built} sees no GPU, and one is there", remedy)
    elif not place.num_gpus:
        yield Finding("ok", "devices", f"{built}; no GPU, and placement.num_gpus asks for none")
    elif place.address == "local":
        told = f"no GPU, and placement.num_gpus is {place.num_gpus:g}"
        yield Finding("fail", "devices", told, "set placement.num_gpus: 0, or name a cluster by placement.ray_address")
    else:
        yield Finding("ok", "devices", f"{built}; no GPU here: engines run on the cluster's")
    for name, model in models.items():
        if not place.num_gpus and resolved_dtype(model, on_gpu=False) != "float32":
            told = f"model {name!r} is drawn in {model.dtype} on a CPU, which is slow"
            yield Finding("warn", "devices", told, "set model.dtype: float32")


def _about_device(
    device: dict[str, Any], place: PlacementConfig, models: dict[str, ModelConfig], built: str
) -> Iterator[Finding]:
    named = f"{device['name']}, {device['memory'] / 2**30:.0f} GiB, {built}"
    dtypes = {resolved_dtype(model, on_gpu=True) for model in models.values()}
    wrong = [text for text in device["wrong"] if text.partition(":")[0] in dtypes]
    if wrong:
        told = f"{named}: {printable('; '.join(wrong))}"
        yield Finding("fail", "devices", told, "take it out, restart it, or mend its drivers; then run `doctor` again")
    elif not place.num_gpus:
        yield Finding("warn", "devices", f"{named}: not used", "set placement.num_gpus: 1")
    elif "bfloat16" in dtypes and device["capability"] < AMPERE:
        told = f"{named}: it has no bfloat16 of its own, and emulates it slowly"
        yield Finding("warn", "devices", told, "set model.dtype: float16")
    else:
        yield Finding("ok", "devices", f"{named}: calculates in {', '.join(sorted(dtypes))}")


def _nvidia_driver() -> str | None:
    """The version of NVIDIA's driver, if there is one with a device."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    question = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(question, capture_output=True, text=True, timeout=30, check=True)  # noqa: S603 - ours
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def _about_disks(models: dict[str, ModelConfig]) -> Iterator[Finding]:
    fetched = any(model.base != EMBEDDED for model in models.values())
    caches = {"PIA_BATCH_CACHE": cache_folder(), "HF_HUB_CACHE": Path(HF_HUB_CACHE)} if fetched else {}
    for name, folder in caches.items():
        usage = shutil.disk_usage(_existing(folder))
        told = f"{usage.free / 1e9:.1f} GB free for weights in {folder}"
        if usage.free < FREE_BYTES:
            yield Finding("warn", "disk", told, f"make room, or set {name} to a folder on another disk")
        else:
            yield Finding("ok", "disk", told)
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    usage = shutil.disk_usage(_existing(folder))
    told = f"{1 - usage.free / usage.total:.0%} in use where Ray keeps its objects, {folder}"
    if 1 - usage.free / usage.total >= RAY_FULL:
        remedy = f"make room: Ray stores nothing from {RAY_FULL:.0%} on; or set RAY_TMPDIR to a folder on another disk"
        yield Finding("fail", "disk", told, remedy)
    else:
        yield Finding("ok", "disk", told)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _about_weights(models: dict[str, ModelConfig]) -> Iterator[Finding]:
    for name, model in models.items():
        try:
            found = resolve(model)
        except PiaBatchError as err:
            told = f"model {name!r}: {' '.join(str(err).split())}"
            yield Finding("fail", "weights", told, "correct the config, or fetch them once here")
        else:
            parts = ", ".join(label for label, _ in found.parts())
            yield Finding("ok", "weights", f"model {name!r} from {redacted_uri(model.base)}: {parts}")


def _about_manifest(config: RunConfig) -> Iterator[Finding]:
    try:
        found = Manifest.open(config.manifest)
        refuse_output_inside(found, config.output)
    except PiaBatchError as err:
        yield Finding("fail", "manifest", str(err), "correct `manifest` or `output`, or the files there")
    else:
        yield Finding("ok", "manifest", f"{found.num_rows} rows in {redacted_uri(found.uri)}; `plan` checks each")


def _about_store(store: Store) -> Iterator[Finding]:
    shown, probe = redacted_uri(store.uri), layout.DOCTOR_PROBE
    try:
        store.check(layout.CREATE_ONLY_PROBE)
        store.replace(probe, b"{}")
        now = time.time()
        written_s = store.stat(probe).modified_s
        store.read(probe)
    except (PiaBatchError, OSError) as err:
        remedy = "correct `output`, its bucket or folder, the credentials or the policy"
        yield Finding("fail", "store", message_of(err), remedy)
        return
    yield Finding("ok", "store", f"{shown}: reads, writes, and creates only where nothing is")
    try:
        store.delete(probe)
    except StorageError as err:
        yield Finding("warn", "store", message_of(err), "allow it for `gc --delete` and `verify --repair`; runs do not")
    skew_s = 0.0 if written_s is None else written_s - now
    if abs(skew_s) > MAX_SKEW_S:
        told = f"this clock is {abs(skew_s):.0f} s {'behind' if skew_s > 0 else 'ahead of'} the store's"
        yield Finding("warn", "clock", told, "let NTP set it: `status` and `gc` compare the two")
    else:
        yield Finding("ok", "clock", f"within {MAX_SKEW_S:g} s of the store's")


def _about_ray(place: PlacementConfig) -> Iterator[Finding]:
    address = place.address
    if address == "local":
        yield Finding("ok", "ray", "a Ray of its own on this machine, for as long as a run lasts")
        return
    from pia_batch.driver import ray_cluster  # noqa: PLC0415 - Ray takes a second to import

    shown, asks = redacted_uri(address), ray_cluster.authentication(address)
    if asks == "token":
        yield Finding("ok", "ray", f"{shown} answers, and lets in only those who have its token")
    elif asks == "none":
        told = f"{shown} answers, and lets in everyone: whoever reaches it can run any code there"
        remedy = "start its nodes with RAY_AUTH_MODE=token; `ray get-auth-token --generate` makes the token"
        yield Finding("fail" if place.require_auth else "warn", "ray", told, remedy)
    elif _answers(address):
        told = f"{shown} answers, and does not say whether it asks for a token"
        remedy = "name the dashboard (http://HEAD:8265) or Ray's own address (HEAD:6379) to know"
        yield Finding("fail" if place.require_auth else "warn", "ray", told, remedy)
    else:
        told = f"nobody answers at {shown}"
        yield Finding("fail", "ray", told, "start the cluster, or correct placement.ray_address or RAY_ADDRESS")


def _answers(address: str) -> bool:
    """Whether something accepts connections there."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=_CONNECT_S):
            return True
    except (OSError, ValueError):
        return False


def _about_room(place: PlacementConfig, num_gpus: int) -> Iterator[Finding]:
    """Whether engines leave a CPU to read with, as far as the machines can be known before a run is on them."""
    address = place.address
    if address == "local" and num_gpus < place.num_gpus:  # told above
        return
    if address == "local":
        nodes, where = [Node(local_cpus(), num_gpus)], "this machine"
    else:
        nodes, where = _nodes_of(address), f"the cluster at {redacted_uri(address)}"
    if not nodes:
        return
    short = find_shortage(place, nodes)
    has = f"{where} has {sum(node.cpus for node in nodes):g} CPUs on {len(nodes)} node{'s'[: len(nodes) > 1]}"
    if short is None:
        engines = "one engine" if place.min_engines == 1 else f"{place.min_engines} engines at once"
        yield Finding("ok", "room", f"{has}: enough for {engines}, and to read the manifest beside")
        return
    if address == "local":
        yield Finding("fail", "room", f"{has}: {short.problem}", short.remedy)
    else:
        yield Finding(
            "warn", "room", f"{has}: {short.problem}", f"{short.remedy}; a cluster that scales may do so itself"
        )


def _nodes_of(address: str) -> list[Node]:
    """The nodes of a cluster that tells what it has; none where it does not, or only its dashboard is known."""
    if "://" in address:
        return []
    command = [sys.executable, "-c", _ASK_RAY, address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_S / 5, check=True)  # noqa: S603 - ours
        told = json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return []
    return [Node.of(resources) for resources in told]
