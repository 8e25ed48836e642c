"""Modules of workers: from where Ray's workers import them, and files of the operator that have their names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pia_batch.config import PlacementConfig
from pia_batch.driver.preflight import cluster
from pia_batch.driver.ray_cluster import _JobConfig
from pia_batch.driver.worker_modules import check_modules, inherited_paths
from pia_batch.errors import ConfigError
from pia_batch.planning.child_python import child_environment, module_command

INSTALLED = [path for path in sys.path if path and Path(path).is_dir()]
"""Search path of a program that was installed: nothing in it is the working folder of a test."""

SHADOWS = [
    "torch.py", "PIL/__init__.py", "numpy.py", "ray.py", "ray/__init__.py", "transformers/__init__.py",
    "queue.py", "json.py", "json/__init__.py", "random.py", "logging.py", "typing.py", "platform.py", "calendar.py",
    "code.py", "inspect.py", "pickle.py", "select.py", "socket.py", "types.py", "uuid.py", "email.py", "yaml.py",
    "google/__init__.py",
]  # fmt: skip

NO_SHADOWS = [
    "main.py", "test.py", "train.py", "turtle.py", "time.py", "sys.py", "os.py", "io.py", "json/a.txt",
    "torch/weights.pt", "torch.txt", "queue.parquet", "utils/__init__.py", "pia_batch/__init__.py", "PIL.png",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _make(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("")


@pytest.mark.parametrize("name", SHADOWS)
def test_a_file_with_the_name_of_a_module_is_refused_where_modules_are_searched(folder: Path, name: str) -> None:
    _make(folder, name)

    for entry in ("", str(folder)):
        with pytest.raises(ConfigError) as refused:
            check_modules([entry, *INSTALLED], script="/nowhere/x.py")
        assert "\n" not in str(refused.value)
        assert name in str(refused.value)
        assert "rename it, or start `pia-batch` itself" in str(refused.value)
    with pytest.raises(ConfigError, match="rename it"):  # next to the script
        check_modules([str(folder), *INSTALLED], script=str(folder / "script.py"))
    check_modules(INSTALLED, script="/nowhere/x.py")  # `pia-batch`: nothing is imported from here
    check_modules([*INSTALLED, str(folder)], script="/nowhere/x.py")  # the module itself is found first


@pytest.mark.parametrize("name", NO_SHADOWS)
def test_another_file_is_not(folder: Path, name: str) -> None:
    _make(folder, name)

    check_modules(["", *INSTALLED], script=str(folder / "script.py"))


def test_a_package_that_is_only_in_the_working_folder_is_used_from_there(folder: Path) -> None:
    _make(folder, "spandrel/__init__.py")

    check_modules([str(folder)], script="/nowhere/x.py")


def test_workers_inherit_the_folders_in_which_the_driver_searches(folder: Path) -> None:
    assert inherited_paths([str(folder), "/scripts"], INSTALLED) == []
    assert inherited_paths([str(folder), "/scripts"], ["/scripts", *INSTALLED]) == ["/scripts"]
    assert inherited_paths([str(folder)], ["", *INSTALLED]) == [str(folder)]


@pytest.mark.parametrize(("search_path", "inherited"), [(INSTALLED, False), (["", *INSTALLED], True)])
def test_ray_is_given_no_other_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, search_path: list[str], inherited: bool
) -> None:
    monkeypatch.setattr(sys, "path", search_path)
    job = _JobConfig()
    job._py_driver_sys_path.extend([os.path.realpath(folder)])  # as `ray.init` does

    assert list(job._get_proto_job_config().py_driver_sys_path) == [os.path.realpath(folder)] * inherited


def test_a_process_of_ours_searches_where_this_one_does_and_not_in_the_working_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, "/last/of/all"])
    (folder / "queue.py").write_text("raise SystemExit('shadowed')")
    (folder / "found.py").write_text("import queue, sys; print(sys.path.count('/last/of/all'), queue.__name__)")
    command = module_command("found")

    missing = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    found = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)

    assert "No module named found" in missing.stderr
    assert found.stdout == "1 queue\n"


@pytest.mark.long
@pytest.mark.slow
def test_a_ray_starts_and_runs_a_task_next_to_such_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc/none")  # a home folder is not needed either
    for name in ("torch.py", "ray.py", "queue.py", "json.py", "random.py", "cgi.py", "pia_batch/__init__.py"):
        _make(folder, name)
        (folder / name).write_text("raise SystemExit('shadowed')")

    assert cluster.find_obstacle(PlacementConfig(object_store_mb=80)) is None
