"""A release: the version stands everywhere, the changelog is cut, and what GitHub and Docker read is valid for them."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployments import ROOT, pins
from packaging.specifiers import SpecifierSet

import pia_batch

BIN = Path(sys.executable).parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yaml"))
DAY = date(2026, 11, 30)

CHANGELOG = """# Changelog

## [Unreleased]

### Added

- A thing.

## [0.1.0] - 2026-11-01

### Added

- Everything.
"""


@pytest.fixture(scope="module")
def release() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "jobs/release.py"))


@pytest.fixture
def copy(tmp_path: Path, release: dict[str, Any]) -> Path:
    """Return a folder with the files that name the version, and a changelog of its own."""
    for name in ("pia_batch/__init__.py", *release["NAMED_IN"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "docs/releases").mkdir()
    (tmp_path / "docs/releases/0.2.0.md").write_text("# pia_batch 0.2.0\n\nFaster.\n")
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    return tmp_path


# --- version and changelog --------------------------------------------------------------------------------------------


def test_a_release_gives_the_unreleased_changes_a_version_and_a_date(release: dict[str, Any]) -> None:
    cut = release["cut"](CHANGELOG, "0.2.0", DAY)

    assert "## [Unreleased]\n\n## [0.2.0] - 2026-11-30\n\n### Added\n\n- A thing.\n\n## [0.1.0]" in cut


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("0.1.0", "not above the last release (got 0.1.0, last is 0.1.0)"),
        ("0.2", None),
        ("v0.2.0", "not in normal form (got v0.2.0, expected 0.2.0)"),
        ("next", "not a version of PEP 440 (got next)"),
    ],
)
def test_a_version_that_is_not_the_next_one_is_refused(
    version: str, message: str | None, release: dict[str, Any]
) -> None:
    if message is None:
        assert "## [0.2] - " in release["cut"](CHANGELOG, version, DAY)
    else:
        with pytest.raises(ValueError, match=re.escape(message)):
            release["cut"](CHANGELOG, version, DAY)


def test_a_release_without_changes_is_refused(release: dict[str, Any]) -> None:
    empty = release["cut"](CHANGELOG, "0.2.0", DAY)
    with pytest.raises(ValueError, match="nothing is unreleased"):
        release["cut"](empty, "0.3.0", DAY)


def test_preparing_a_release_writes_its_version_wherever_one_stands(copy: Path, release: dict[str, Any]) -> None:
    changed = release["prepare"](copy, "0.2.0", DAY)

    assert sorted(changed) == sorted(["CHANGELOG.md", "pia_batch/__init__.py", *release["NAMED_IN"]])
    for name in changed[1:]:
        text = (copy / name).read_text()
        assert "0.2.0" in text, name
        assert pia_batch.__version__ not in text.replace("127.0.0.1", ""), name
    assert release["notes"](copy, "0.2.0") == "Faster.\n\n## Changes\n\n### Added\n\n- A thing.\n"


def test_a_release_without_notes_changes_no_file(copy: Path, release: dict[str, Any]) -> None:
    (copy / "docs/releases/0.2.0.md").unlink()
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}

    with pytest.raises(ValueError, match=r"write docs/releases/0\.2\.0\.md first"):
        release["prepare"](copy, "0.2.0", DAY)

    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_the_next_release_can_be_cut_and_its_notes_are_written(release: dict[str, Any]) -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    version = pia_batch.__version__
    assert (ROOT / "docs/releases" / f"{version}.md").is_file()
    if f"\n## [{version}]" not in changelog:
        assert f"## [{version}] - 2026-11-30" in release["cut"](changelog, version, DAY)


def test_every_place_that_names_the_version_names_the_same(release: dict[str, Any]) -> None:
    named = {}
    texts = [
        path for path in ROOT.rglob("*") if path.suffix in {".yaml", ".yml", ".md", ".sh"} or path.name == "Dockerfile"
    ]
    for path in texts:
        parts = path.relative_to(ROOT).parts
        if parts[0] not in {"tests", "build", "outputs"} and not any(part.startswith(".venv") for part in parts):
            found = re.findall(r"/pia-batch:(\d[\w.]*)|image\.version=\"(\d[\w.]*)", path.read_text(encoding="utf-8"))
            if found:
                named[path.relative_to(ROOT).as_posix()] = {one or other for one, other in found}
    assert sorted(named) == sorted(release["NAMED_IN"])
    assert set().union(*named.values()) == {pia_batch.__version__}


# --- workflows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        *(("vendor.github-workflows", path) for path in WORKFLOWS),
        *(("custom.github-workflows-require-timeout", path) for path in WORKFLOWS),
        ("vendor.dependabot", ROOT / ".github/dependabot.yml"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_what_github_reads_follows_its_schema(schema: str, path: Path) -> None:
    command = [BIN / "check-jsonschema", "--builtin-schema", schema, path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def workflow(name: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows" / name).read_text(encoding="utf-8"))
    return read


def test_the_workflows_run_targets_that_exist_on_every_supported_python() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    matrix = workflow("test.yaml")["jobs"]["test"]["strategy"]["matrix"]
    assert {*matrix["target"], *(each["target"] for each in matrix["include"])} == {"test", "test-long"} <= targets
    for name in ("test.yaml", "publish.yaml"):
        for text in re.findall(r"run: make ([a-z-]+)", (ROOT / ".github/workflows" / name).read_text(encoding="utf-8")):
            assert text in targets
    supported = SpecifierSet(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"])
    every = [f"3.{minor}" for minor in range(30) if supported.contains(f"3.{minor}.0")]
    assert matrix["python"] == every == workflow("publish.yaml")["jobs"]["install"]["strategy"]["matrix"]["python"]


def test_only_the_job_that_uploads_can_act_as_the_publisher() -> None:
    publish = workflow("publish.yaml")
    jobs = publish["jobs"]
    assert publish["permissions"] == {"contents": "read"}
    assert publish[True] == {"push": {"tags": ["v*"]}}, "YAML 1.1 reads `on` as true"
    uploads = [name for name, job in jobs.items() if "gh-action-pypi-publish" in json.dumps(job)]
    assert uploads == ["pypi"]
    assert jobs["pypi"]["environment"] == "pypi"
    assert jobs["pypi"]["permissions"] == {"id-token": "write"}
    assert not any("run" in step for step in jobs["pypi"]["steps"]), "no code of the package runs with its permissions"
    assert (jobs["pypi"]["needs"], jobs["install"]["needs"], jobs["github"]["needs"]) == ("install", "build", "pypi")
    assert "secrets." not in (ROOT / ".github/workflows/publish.yaml").read_text(encoding="utf-8")


def test_every_attestation_of_the_workflow_is_explained() -> None:
    page = (ROOT / "docs/releasing.md").read_text(encoding="utf-8")
    uses = [
        step["uses"] for job in workflow("publish.yaml")["jobs"].values() for step in job["steps"] if "uses" in step
    ]
    attests = [each.partition("@")[0] for each in uses if "attest" in each or "pypi-publish" in each]
    assert len(attests) == 3
    assert all(f"`{each}`" in page for each in attests)


def test_a_tag_that_is_not_the_version_ends_the_release(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = [
        step["run"] for step in workflow("publish.yaml")["jobs"]["build"]["steps"] if "tag" in step.get("name", "")
    ]
    for tag, code in ((f"v{pia_batch.__version__}", 0), ("v9.9.9", 1)):
        monkeypatch.setenv("GITHUB_REF_NAME", tag)
        assert subprocess.run(["bash", "-e", "-c", check], cwd=ROOT, check=False).returncode == code


# --- Docker image and bill of materials ---------------------------------------------------------------------------


def test_hadolint_finds_nothing_in_the_dockerfile(tmp_path: Path) -> None:
    lint = [BIN / "hadolint", "--failure-threshold", "style", "--no-color"]
    done = subprocess.run([*lint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text("FROM python:latest\nRUN pip install ray\n")
    found = subprocess.run([*lint, tmp_path / "Dockerfile"], capture_output=True, text=True, check=False)
    assert {"DL3007", "DL3013", "DL3042"} <= set(re.findall(r"DL\d+", found.stdout))


def test_the_bill_of_materials_has_every_package_of_the_lock(tmp_path: Path) -> None:
    command = re.search(
        r"^SBOM := \$\(BIN\)/python (.*?-o)$", (ROOT / "Makefile").read_text(), re.MULTILINE | re.DOTALL
    )
    assert command
    words = [word for word in command[1].split() if word != "\\"]

    subprocess.run([sys.executable, *words, tmp_path / "sbom.json"], cwd=ROOT, check=True, capture_output=True)

    bill = json.loads((tmp_path / "sbom.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "pia-batch"
    locked = pins(ROOT / "requirements.lock")
    assert {each["name"]: each["version"] for each in bill["components"]} == locked
    assert all(each["externalReferences"][0]["hashes"] for each in bill["components"])
    places = {reference["url"] for each in bill["components"] for reference in each["externalReferences"]}
    assert places == {f"https://pypi.org/simple/{name}/" for name in locked}
