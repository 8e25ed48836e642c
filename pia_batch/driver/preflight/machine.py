"""Machine checks: Python packages, codecs and disks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from huggingface_hub.constants import HF_HUB_CACHE
from packaging.requirements import Requirement
from packaging.version import Version

import pia_batch
from pia_batch.config import EMBEDDED, FORMATS, EncodingConfig, ModelConfig
from pia_batch.driver.preflight.finding import Finding
from pia_batch.errors import EncodingError
from pia_batch.media import codecs
from pia_batch.weights.fetching import cache_folder

FREE_BYTES = 10 * 10**9
"""Free disk space wanted for weights: Stable Diffusion 1.5 with PIA's adapter has 6 GB in float32, and a fetch keeps
what is there until it is complete."""

RAY_FULL = 0.95
"""Used share of a disk from which Ray refuses to store objects. Source: `local_fs_capacity_threshold`."""


def check_packages() -> Iterator[Finding]:
    """Compare the installed packages with the required ranges, and with the tested versions of a source checkout."""
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
        found = f"is {versions[need.name]}" if versions[need.name] else "is missing"
        yield Finding("fail", "packages", f"{need.name} {found}, expected {need}", f"python -m pip install '{need}'")
    if not wrong:
        message = f"{len(needs)} packages in the ranges that pia-batch {_version_of('pia-batch')} needs"
        yield Finding("ok", "packages", message)
    pins = pinned_versions(Path(pia_batch.__file__).parents[1] / "constraints.txt")
    others = [
        f"{name} {found} (not {pins[name]})"
        for name, found in versions.items()
        if found is not None and name in pins and Version(found).public != Version(pins[name]).public
    ]
    if others:
        remedy = "python -m pip install -c constraints.txt -e . installs the tested versions"
        yield Finding("warn", "packages", f"versions that were not tested: {', '.join(others)}", remedy)


def _version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def pinned_versions(constraints: Path) -> dict[str, str]:
    """Return the version by name from a source checkout's constraints file; empty if there is no such file."""
    if not constraints.is_file():
        return {}
    return dict(re.findall(r"^([\w.-]+)==(\S+)", constraints.read_text(encoding="utf-8"), re.MULTILINE))


def check_codecs() -> Iterator[Finding]:
    """Encode and decode a tiny clip in every format."""
    frames = np.stack([np.full((16, 16, 3), level, np.uint8) for level in (60, 190)])
    working = []
    for fmt in FORMATS:
        try:
            codecs.probe(codecs.encode(frames, fmt, 8, EncodingConfig()), fmt)
            working.append(fmt)
        except EncodingError as err:
            yield Finding("fail", "codecs", str(err), "python -m pip install --force-reinstall av pillow")
    if working:
        yield Finding("ok", "codecs", f"{', '.join(working)}: encoded and decoded")


OPEN_FILES = 4096
"""Limit of open files below which Ray itself warns of connection errors. Source: `ray.init`."""


def check_process(open_files: int | None = None, encoding: str | None = None) -> Iterator[Finding]:
    """Check what every process takes from the one that starts it: the limit of open files, and the encoding of names.

    Args:
        open_files: Limit up to which a process may raise its own; None: that of this process.
        encoding: Encoding of names of files; None: that of this process.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1] if open_files is None else open_files
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES:
        message = f"at most {hard} open files: too few for many engines or large manifests"
        yield Finding("warn", "limits", message, f"raise the limit to {OPEN_FILES} or more (`ulimit -n`)")
    encoding = encoding or sys.getfilesystemencoding()
    if encoding != "utf-8":
        message = f"names of files are in {encoding}: those with other characters cannot be opened"
        yield Finding("warn", "locale", message, "set PYTHONUTF8=1, or LC_ALL to a locale such as C.UTF-8")


def check_disks(models: dict[str, ModelConfig]) -> Iterator[Finding]:
    """Check the free space for weights, if any model needs them, and for Ray's objects."""
    fetched = any(model.base != EMBEDDED for model in models.values())
    caches = {"PIA_BATCH_CACHE": cache_folder(), "HF_HUB_CACHE": Path(HF_HUB_CACHE)} if fetched else {}
    for name, folder in caches.items():
        usage = shutil.disk_usage(nearest_existing(folder))
        message = f"{usage.free / 1e9:.1f} GB free for weights in {folder}"
        if usage.free < FREE_BYTES:
            yield Finding("warn", "disk", message, f"free some space, or set {name} to a folder on another disk")
        else:
            yield Finding("ok", "disk", message)
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    usage = shutil.disk_usage(nearest_existing(folder))
    used = 1 - usage.free / usage.total
    message = f"{used:.0%} used of the disk where Ray keeps its objects, {folder}"
    if used >= RAY_FULL:
        remedy = (
            f"free some space: Ray stores nothing from {RAY_FULL:.0%} on; or set RAY_TMPDIR to a folder on another disk"
        )
        yield Finding("fail", "disk", message, remedy)
    else:
        yield Finding("ok", "disk", message)


def nearest_existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
