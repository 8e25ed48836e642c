"""What is published: an sdist and a wheel with the package and nothing else, which work in an empty environment.

PIA_BATCH_DIST names a folder with both, as `make dist` builds them; without it they are built here. PIA_BATCH_PYTHONS
lists the Pythons that the wheel is installed for; without it, it is the Python of the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from deployments import ROOT

import pia_batch

PYTHONS = os.environ.get("PIA_BATCH_PYTHONS", f"{sys.version_info.major}.{sys.version_info.minor}").split(",")
BUILT = ("__pycache__", ".pyc", "egg-info")

CONSUMER = """
from pia_batch import ModelConfig, RunConfig, Shot, plan

config = RunConfig.load("config.yaml", {"manifest": "requests.parquet", "output": "out"})
pending: int = plan(config).num_pending
reveal_type(config.model)
shot = Shot(image=3)
config.nonsense
"""

SKIPPED = """
[mypy]
[mypy-accelerate.*,aiohttp.*,av.*,diffusers.*,fsspec.*,huggingface_hub.*,obstore.*,ray.*,torch.*,transformers.*]
follow_imports = skip
"""
"""Configuration of mypy: the types of large libraries, which the program above does not use, are not read."""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sdist and the wheel that is built of it."""
    if given := os.environ.get("PIA_BATCH_DIST"):
        return ROOT / given
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


def package_files() -> set[str]:
    """Return the files of the package as they are in the repository."""
    folder = ROOT / "pia_batch"
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in paths if not any(part in path.as_posix() for part in BUILT)}


@pytest.mark.long
@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    about = f"pia_batch-{pia_batch.__version__}.dist-info/"

    assert {name for name in names if not name.startswith(about)} == package_files()
    assert {
        "pia_batch/py.typed",
        "pia_batch/__init__.pyi",
        "pia_batch/config/embedded.yaml",
        "pia_batch/report/templates/report.html",
        "pia_batch/evaluation/templates/compare.html",
        "pia_batch/tiny/checkpoint/unet/diffusion_pytorch_model.safetensors",
        "pia_batch/tiny/sample/requests.parquet",
        "pia_batch/weights/sd15/tokenizer/vocab.json",
        f"{about}licenses/LICENSE",
    } <= names
    assert not [name for name in names if "train" in name or "test_" in name or "conftest" in name]
    assert wheel.stat().st_size < 20e6


@pytest.mark.long
@pytest.mark.slow
def test_the_sdist_has_what_builds_the_wheel_and_nothing_else(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = [each for each in archive.getmembers() if each.isfile()]
    top = f"pia_batch-{pia_batch.__version__}"
    names = {each.name.removeprefix(f"{top}/") for each in members}

    beside = {name for name in names if not name.startswith(("pia_batch/", "pia_batch.egg-info/"))}
    assert beside == {"LICENSE", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    assert {name for name in names if name.startswith("pia_batch/")} == package_files()


@pytest.mark.slow
def test_the_metadata_says_what_pypi_shows(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        about = f"pia_batch-{pia_batch.__version__}.dist-info"
        metadata = BytesParser().parsebytes(archive.read(f"{about}/METADATA"))
        entries = archive.read(f"{about}/entry_points.txt").decode()

    assert (metadata["Name"], metadata["Version"]) == ("pia-batch", pia_batch.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == "<3.14,>=3.11"
    assert entries.split() == ["[console_scripts]", "pia-batch", "=", "pia_batch.cli:main"]
    command = [sys.executable, "-m", "twine", "check", "--strict", *wheel.parent.glob("pia_batch-*")]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", PYTHONS)
def test_the_wheel_works_in_an_empty_environment(version: str, wheel: Path, tmp_path: Path) -> None:
    environment = clean_environment()
    python = interpreter(version, environment)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    uv = [sys.executable, "-m", "uv"]
    venv = tmp_path / "venv"
    subprocess.run([*uv, "venv", "-q", "--python", python, venv], check=True, env=environment)
    install = [*uv, "pip", "install", "-q", "--python", venv / "bin/python", "-c", ROOT / "constraints.txt"]
    subprocess.run([*install, wheel, "mypy"], check=True, env=environment)
    folder = tmp_path / "empty"
    folder.mkdir()

    demo = subprocess.run(
        [venv / "bin/pia-batch", "demo"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )

    assert demo.returncode == 0, demo.stdout + demo.stderr
    num_samples = pq.read_metadata(ROOT / "pia_batch/tiny/sample/requests.parquet").num_rows
    assert f"{num_samples} requests: {num_samples} succeeded, 0 failed" in demo.stdout + demo.stderr
    assert len(list(folder.glob("outputs/demo/animations/*/*"))) == num_samples
    check_types(venv, folder, environment)


def check_types(venv: Path, folder: Path, environment: dict[str, str]) -> None:
    """Assert that mypy sees the types of the installed package in a program that uses it."""
    (folder / "consumer.py").write_text(CONSUMER)
    (folder / "mypy.ini").write_text(SKIPPED)
    command = [venv / "bin/mypy", "--strict", "consumer.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    found = [line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith("consumer.py:")]
    assert 'note: Revealed type is "pia_batch.config.models.ModelConfig"' in found, done.stdout
    assert any("[arg-type]" in line or "[call-arg]" in line for line in found), done.stdout
    assert any('has no attribute "nonsense"' in line for line in found), done.stdout
    assert not any("py.typed" in line or "import-untyped" in line for line in found), done.stdout


def clean_environment() -> dict[str, str]:
    """Return the environment without this repository's Python, with the Pythons of pyenv on PATH."""
    kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    pyenv = sorted(Path(kept.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.*/bin"))
    places = [place for place in kept["PATH"].split(os.pathsep) if not place.endswith("/shims")]
    kept |= {"PATH": os.pathsep.join([*places, *map(str, pyenv)]), "UV_PYTHON_DOWNLOADS": "never"}
    if wheels := kept.get("PIP_FIND_LINKS"):
        kept.setdefault("UV_FIND_LINKS", wheels)
    return kept


def interpreter(version: str, environment: dict[str, str]) -> str | None:
    """Return the path of a Python of this version on this machine, or None."""
    command = [sys.executable, "-m", "uv", "python", "find", "--no-project", "--system", version]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
