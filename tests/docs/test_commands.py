"""Every command of the documentation is run, or named here with the reason why not, and then at least taken apart."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import foreign_datasets as foreign
import hub_server
import local_ray
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from inputs import png
from places import SUPPORT
from servers import free_port
from walkthroughs import (
    PAGES,
    ROOT,
    SHELL,
    SHELLS,
    Command,
    blocks,
    commands,
    mentions,
    mistake_in,
    mistake_in_mention,
    unprinted,
)

from pia_batch import cli, tiny
from pia_batch.config import RunConfig
from pia_batch.media import codecs, provenance
from pia_batch.schema.columns import EFFECTIVE

FOLLOWED = {
    "README.md",
    "docs/tutorial.md",
    "docs/object-storage.md",
    "docs/schedules.md",
    "docs/budgets.md",
    "docs/retry-verify-gc.md",
    "docs/provenance.md",
    "docs/exporting.md",
    "docs/prepare.md",
    "docs/columns.md",
    "docs/long-clips.md",
    "docs/finishing.md",
    "docs/prompt-travel.md",
    "docs/clusters.md",
    "docs/aws.md",
    "docs/google-cloud.md",
    "docs/kubernetes.md",
    "docs/models.md",
    "docs/monitoring.md",
    "docs/safety.md",
}
"""Pages whose every command is run by a test below, except those of NEEDS_A_CLOUD and of NOT_RUN."""

NEEDS_A_CLOUD = (
    *("ray up", "ray down", "ray dashboard", "until ray job list"),
    *("gcloud", "kubectl", "pia-batch submit", "python -m pip"),
)
"""Beginnings of the commands of the pages on clouds that no test can run."""

NOT_RUN = {
    "make test": "continuous integration runs it",
    "make setup": "the package index; continuous integration runs it",
    "make lint": "continuous integration runs it",
    "python jobs/estimate_cost.py": "test_estimate_cost compares what it prints with the page",
    "make dist": "minutes; test_distribution checks what it builds",
    "pia-batch evaluate": "test_evaluate evaluates outputs; most of these need published weights",
    "pia-batch select": "test_selection selects from outputs with an evaluation",
    "pia-batch export outputs/demo --only": "test_export exports what a table names",
    "pia-batch report outputs/demo --only": "test_selection writes the page of a selection",
    "pia-batch report outputs/demo --comparison": "test_writer links comparisons",
    "pia-batch run --manifest seeds.parquet": "a recipe: a manifest of one's own",
    "hf download": "the internet",
    "pia-batch run --manifest photos.jsonl --output enlarged": "a network; test_upscaling runs it with a small one",
    "pia-batch prepare animatebench": "the dataset; test_kinds prepares its layout",
    "pia-batch plan bench.yaml": "the published weights",
    "pia-batch run bench.yaml": "a GPU and the published weights",
    "python table.py": "an evaluation of a run above; test_animatebench runs it on one",
    "pia-batch compare": "test_comparison compares two outputs",
    "pia-batch bench": "minutes; test_benchmark runs it small",
    "python jobs/benchmark": "minutes; the tests of these programs run them small",
    "python jobs/tiny/train.py": "hours; test_tiny trains for seconds",
    "python jobs/tiny/evaluate.py": "minutes",
    "python jobs/tiny/self_test.py": "rewrites a file of the package",
    "python -m pip": "the package index",
    "python -m pytest": "`make test` runs all of these, with fewer",
    "pipx run": "the package index",
    "docker ": "a container runtime; test_deployment reads the Dockerfile",
}
"""The beginning of each command that no test runs: what it would need."""

ALL = [command for page in PAGES for command in commands(page)]


@pytest.mark.parametrize("command", ALL, ids=str)
def test_a_command_can_be_given_as_it_stands_there(command: Command) -> None:
    assert mistake_in(command) is None


@pytest.mark.parametrize("command", [command for page in PAGES for command in mentions(page)], ids=str)
def test_a_command_that_a_text_names_exists(command: Command) -> None:
    assert mistake_in_mention(command) is None


@pytest.mark.parametrize("page", PAGES)
def test_no_comment_is_in_the_commands_of_a_page(page: str) -> None:
    """An interactive zsh, the shell of macOS, takes `#` and all words after it as arguments."""
    heredocs = re.compile(r"<<'(\w+)'.*?^\1$", re.DOTALL | re.MULTILINE)
    scripts = [heredocs.sub("", block) for block in blocks(page, *SHELLS)]
    assert [line for script in scripts for line in script.splitlines() if re.search(r"(^|\s)#", line)] == []


def test_every_command_is_run_or_has_a_reason_why_not() -> None:
    ours = [command for command in ALL if command.page not in FOLLOWED and command.words[0] not in SHELL]
    left = [f"{command.page}: {command}" for command in ours if not str(command).startswith(tuple(NOT_RUN))]
    assert not left, "run these in a test of this file, or say in NOT_RUN why not"
    stale = [begin for begin in NOT_RUN if not any(str(command).startswith(begin) for command in ALL)]
    assert not stale, "no page has these any more"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("pia-batch rum config.yaml", "No such command 'rum'"),
        ("pia-batch run --mainfest a", "No such option: --mainfest"),
        ("pia-batch run nowhere.yaml", "no config nowhere.yaml"),
        ("pia-batch run --set placement.batchsize=2", "did you mean 'placement.batch_size'"),
        ("pia-batch retry --kind timeouts", "no error kind timeouts"),
        ("pia-batch verify", "Missing argument"),
        ("pia-batch plan --price-per-hour cheap", "a valid number"),
        ("python jobs/animate_all.py", "no program jobs/animate_all.py"),
        ("python jobs/tiny/train.py --works x", "knows no --works"),
        ("python -m pia_batch.nonsense", "no module pia_batch.nonsense"),
        ("make tests", "no target tests"),
        ("pipx run pip-audit -r requirements.text.lock", "no file requirements.text.lock"),
    ],
)
def test_a_command_that_drifted_is_noticed(words: str, found: str) -> None:
    assert found in str(mistake_in(Command("README.md", tuple(words.split()))))


def test_a_script_is_taken_apart_as_a_shell_does(monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
```bash
options="--json --set a.b=[1, 2]"   # a comment
pia-batch plan $options > told.json 2>&1 || test $? = 2
until ray list --x 'a; b' > /dev/null; do sleep 1; done
cat > config.yaml <<'YAML'
manifest: nothing of a command
YAML
pia-batch run config.yaml \\
  --output "$PWD/out" &
```
"""
    monkeypatch.setitem(PAGES, "page", script)

    assert [command.words for command in commands("page")] == [
        ("pia-batch", "plan", "--json", "--set", "a.b=[1,", "2]"),
        ("test", "$?", "=", "2"),
        ("ray", "list", "--x", "a; b"),
        ("do", "sleep", "1"),
        ("done",),
        ("cat",),
        ("pia-batch", "run", "config.yaml", "--output", "$PWD/out"),
    ]


# --- pages that are followed word by word ---------------------------------------------------------------------------


Variables = Mapping[str, str]


@pytest.fixture(scope="module")
def one_ray() -> Iterator[Variables]:
    """Variables of a Ray that the commands of many pages share. Those of the README start their own."""
    with local_ray.elsewhere() as variables:
        yield variables


def follow(
    page: str,
    folder: Path,
    change: Callable[[str], str] = lambda script: script,
    shared_ray: Variables | None = None,
    *,
    fake_engine: bool = False,
) -> str:
    """Run every block of a page in its order, in one shell, in `folder`; return what it printed.

    A Python block is the file that its first line names, and so is a YAML block. A block of `text` is what the commands
    since the one before it print.

    Args:
        page: Path of the page.
        folder: Working folder of the commands, and their home.
        change: Function that replaces what cannot run here.
        shared_ray: Variables of a Ray that the commands use instead of one of their own each.
        fake_engine: True: `pia-batch` animates by an engine that needs no torch; jobs on a cluster do not.
    """
    shown: list[str] = []
    steps = ["set -eu", "trap 'kill $(jobs -p) 2> /dev/null || true; wait' EXIT"]  # a page that fails leaves no server
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE):
        step = block.replace("source .venv/bin/activate\n", "")
        if language in ("python", "yaml"):
            name = re.match(r"# ([\w.]+)\n", block)
            if name is None:
                continue
            step = f"cat > {name[1]} <<'FILE'\n{block}FILE\n"
        if language in ("python", "yaml", "bash"):
            steps.append(step)
        elif language == "text":
            shown.append(block)
            steps.append(f"echo '{_SHOWN}'\n")
    with tempfile.TemporaryDirectory(prefix="pb", dir="/tmp", ignore_cleanup_errors=True) as sessions:  # a short path
        if fake_engine:
            write_fake_program(Path(sessions, "pia-batch"))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
            "HOME": str(folder),  # Ray puts its token there
            "PATH": f"{sessions}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_TMPDIR": sessions,  # where a script without an address looks for the last cluster
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # or the end of a head node takes half a minute
            **(shared_ray or {}),
        }
        done = subprocess.run(
            ["bash"],
            input=change("\n".join(steps)),
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=840,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Set ray log level" not in done.stderr
    for expected, printed in zip(shown, done.stdout.split(_SHOWN), strict=False):
        assert unprinted(expected, printed) is None, printed
    return done.stdout


def write_fake_program(path: Path) -> None:
    """Write a `pia-batch` whose runs have a fake engine, which starts without torch; all else is real."""
    fake = f'exec {sys.executable} {SUPPORT / "fast_cli.py"} 0 {path.parent} "$@"'
    real = f'exec {Path(sys.executable).parent / "pia-batch"} "$@"'
    path.write_text(f'#!/bin/sh\ncase "$1" in run|retry|demo) {fake};; *) {real};; esac\n')
    path.chmod(0o755)


_SHOWN = "--- shown on the page"
"""Line that parts what was printed before one block of output from what was printed before the next."""


@pytest.mark.parametrize(
    ("expected", "missing"),
    [
        ("rows 3\n", None),
        ("rows 3\ntook ... s\nend\n", None),
        ("took ... h\n", "took ... h"),
        ("end\nrows 3\n", "rows 3"),
        ("row\n", "row"),
    ],
)
def test_output_that_a_page_shows_is_compared_line_by_line(expected: str, missing: str | None) -> None:
    assert unprinted(expected, "rows 3  \nmore\ntook 20.5 s\nend\n") == missing


@pytest.mark.long
def test_the_readme_can_be_followed(tmp_path: Path) -> None:
    # Ray looks for modules in the working folder first, so that a part of the package would hide the package.
    shutil.copytree(ROOT / "pia_batch", tmp_path / "pia_batch", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "photos").mkdir()
    shutil.copy(tiny.SAMPLE / "images" / "red-circle.png", tmp_path / "photos")
    follow(
        "README.md",
        tmp_path,
        lambda script: re.sub(r"^(git|cd|make|python3? -m (venv|pip)) .*$", "", script, flags=re.MULTILINE),
    )

    assert len(list(tmp_path.glob("outputs/first/animations/*/*.mp4"))) == 3
    assert len(list(tmp_path.glob("outputs/photos/animations/*/*.mp4"))) == 1


@contextmanager
def head_of_its_own() -> Iterator[Callable[[str], str]]:
    """Yield a function that gives a page's head node other ports and another folder than a Ray of this machine has."""
    with tempfile.TemporaryDirectory(prefix="pb", dir="/tmp", ignore_cleanup_errors=True) as sessions:
        places = {"6399": str(free_port()), "8265": str(free_port()), r"--temp-dir=\S+": f"--temp-dir={sessions}"}
        places["ray start --head"] = f"ray start --head --dashboard-agent-listen-port={free_port()}"

        def moved(script: str) -> str:
            for here, there in places.items():
                script = re.sub(here, there, script)
            return script

        yield moved


@pytest.mark.long
def test_the_tutorial_can_be_followed(tmp_path: Path, one_ray: Variables) -> None:
    shared = "".join(f"export {name}={value}\n" for name, value in one_ray.items())

    with head_of_its_own() as moved:

        def change(script: str) -> str:
            """Let the commands before and after those of the cluster share a Ray; README and demo start their own."""
            alone = moved(script).replace("export RAY_AUTH_MODE", f"unset {' '.join(one_ray)}\nexport RAY_AUTH_MODE", 1)
            return alone.replace("unset RAY_AUTH_MODE\n", shared, 1)

        follow("docs/tutorial.md", tmp_path, change, one_ray, fake_engine=True)

    first = tmp_path / "first"
    assert {path.suffix for path in first.glob("out/animations/*/*")} == {".mp4", ".webp", ".gif"}
    for day in (20, 21, 22):
        (night,) = [path for path in first.glob(f"nights/2026-11-{day}/results/*") if path.is_dir()]
        assert ds.dataset(night).to_table(["status"])["status"].to_pylist() == ["succeeded"] * 3
    assert len(list(first.glob("out/animations/*/*"))) == 3 * 3


@pytest.mark.long
def test_a_run_is_submitted_to_a_cluster_as_the_page_says(tmp_path: Path) -> None:
    sample_of_three(tmp_path)
    with head_of_its_own() as moved:
        follow("docs/clusters.md", tmp_path, moved)

    assert len(list(tmp_path.glob("out/animations/*/*"))) == 3


@pytest.mark.parametrize("cloud", ["aws", "google-cloud", "kubernetes"])
def test_what_a_page_on_a_cloud_shows_before_anything_is_started_is_printed(cloud: str, tmp_path: Path) -> None:
    for name in ("jobs", "cluster.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    offline = re.compile(rf"^({'|'.join(NEEDS_A_CLOUD)}) .*$", re.MULTILINE)

    printed = follow(f"docs/{cloud}.md", tmp_path, lambda script: offline.sub("true", script))

    assert printed.count(_SHOWN) == 2


@pytest.mark.long
@pytest.mark.parametrize("page", ["models", "monitoring"])
def test_a_run_prints_what_its_guide_shows(page: str, tmp_path: Path, one_ray: Variables) -> None:
    sample_of_three(tmp_path)
    left_out = re.compile(f"^({'|'.join(map(re.escape, NOT_RUN))}).*$", re.MULTILINE)

    follow(
        f"docs/{page}.md",
        tmp_path,
        lambda script: left_out.sub("true", script),
        one_ray,
        fake_engine=page != "models",
    )

    assert len(list(tmp_path.glob("out/animations/*/*"))) == 3


@pytest.mark.long
def test_a_plan_refuses_words_as_the_guide_on_safety_shows(tmp_path: Path) -> None:
    sample_of_three(tmp_path)

    printed = follow("docs/safety.md", tmp_path)

    assert printed.count("the word 'gun'") == 1


@pytest.mark.long
def test_photographs_are_animated_on_a_real_server(tmp_path: Path) -> None:
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")

    told = follow("docs/object-storage.md", tmp_path, lambda script: script.replace("8333", str(free_port())))

    assert "24 requests: 24 succeeded, 0 failed" in told


@pytest.mark.long
def test_the_page_on_finishing_stores_what_it_says(tmp_path: Path, one_ray: Variables) -> None:
    shutil.copytree(tiny.SAMPLE / "images", tmp_path / "images")

    printed = follow(
        "docs/finishing.md",
        tmp_path,
        lambda script: script.replace("python jobs/tiny/finishing.py", "true"),
        one_ray,
        fake_engine=True,
    )

    assert "3 requests: 3 succeeded, 0 failed" in printed
    (results,) = (tmp_path / "out" / "results").glob("2*")
    rows = {row["request_id"]: row for row in ds.dataset(results).to_table().to_pylist()}
    assert {name: (row["num_frames"], row["fps"], row["poster_uri"] is not None) for name, row in rows.items()} == {
        "smooth": (31, 16.0, True),
        "true-colours": (16, 8.0, False),
        "smooth-loop": (64, 32.0, False),
    }


@pytest.mark.long
def test_the_page_on_long_clips_generates_them(tmp_path: Path, one_ray: Variables) -> None:
    shutil.copytree(tiny.SAMPLE / "images", tmp_path / "images")
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")

    printed = follow(
        "docs/long-clips.md", tmp_path, lambda script: script.replace("python jobs/tiny/seams.py", "true"), one_ray
    )

    assert "3 requests: 3 succeeded, 0 failed" in printed
    (results,) = (tmp_path / "out" / "results").glob("2*")
    contexts = {row["request_id"]: row["context"] for row in ds.dataset(results).to_table().to_pylist()}
    assert contexts == {"windows": "windows", "chain": "chain", "loop": "windows"}


@pytest.mark.long
def test_the_page_on_prompts_that_change_animates_one(tmp_path: Path, one_ray: Variables) -> None:
    shutil.copytree(tiny.SAMPLE / "images", tmp_path / "images")

    follow("docs/prompt-travel.md", tmp_path, shared_ray=one_ray)

    (results,) = (tmp_path / "out" / "results").glob("2*")
    (prompts,) = ds.dataset(results).to_table(["prompts"])["prompts"].to_pylist()
    assert [key["frame"] for key in prompts] == [0, 8]


@pytest.mark.long
def test_every_recipe_of_an_export_is_read_by_the_library_that_it_is_for(tmp_path: Path, one_ray: Variables) -> None:
    count = pq.read_table(tiny.SAMPLE / "requests.parquet").num_rows
    printed = follow("docs/exporting.md", tmp_path, shared_ray=one_ray, fake_engine=True).splitlines()

    assert [line for line in printed if line.startswith("a ") and line.endswith(" 8")]  # as it is: a prompt, and frames
    described = [line for line in printed if re.fullmatch(r"(0: )?an? [a-z0-9:/ ]+ \d+ \d+", line)]
    assert len(described) == count  # WebDataset
    assert "True" in printed  # Parquet has a Video
    assert len(list((tmp_path / "files").glob("*.gif"))) == count
    for folder in ("shards", "parquet", "hub", "lance", "delta", "files"):
        assert (tmp_path / folder / "_SUCCESS.json").is_file()


@pytest.mark.long
def test_every_source_is_prepared_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign.write_photographs(tmp_path / "photos")
    foreign.write_webdataset(tmp_path / "shards")
    foreign.write_img2dataset(tmp_path / "laion")
    foreign.write_hugging_face(tmp_path / "boats" / "data")
    pq.write_table(foreign.image_table(), tmp_path / "table.parquet")
    rows = [
        {"id": f"r{k}", "photo": f"s3://photos/{k}.png", "text": "a cat", "zip": zip_} for k, zip_ in ((0, 1), (1, "x"))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "links.csv").write_text(
        'image,caption\n"photos/trip 0/day one/IMG 000.png","a boat, by night"\nphotos/none.png,a boat\n'
    )
    foreign.write_lance(tmp_path / "photos.lance")
    foreign.write_delta(tmp_path / "photos_delta")
    foreign.write_iceberg(tmp_path / "iceberg")
    (tmp_path / "shop").symlink_to(tmp_path / "iceberg" / "shop")

    with hub_server.served("boats/boats", tmp_path / "boats", "b" * 40) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        with local_ray.elsewhere(os.environ | {"HOME": str(tmp_path)}) as variables:
            shown = follow("docs/prepare.md", tmp_path, shared_ray=variables, fake_engine=True)

    assert "source      folder: 4 rows, 1 dropped missing" in shown
    assert "3 requests: 3 succeeded, 0 failed" in shown
    found = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("manifests/*/_SUCCESS.json")}
    requests = {name: success["requests"] for name, success in found.items()}
    assert requests == {
        "photos": 3,
        "uris": 3,
        "shards": 4,
        "laion": 2,
        "boats": 18,
        "table": 6,
        "rows": 2,
        "lance": 3,
        "delta": 4,
        "iceberg": 3,
        "dataset": 18,
        "links": 1,
    }
    assert found["boats"]["pinned"] == {"commit": "b" * 40}


@pytest.mark.long
def test_a_dataset_of_the_hugging_face_library_is_animated_as_the_page_says(tmp_path: Path, one_ray: Variables) -> None:
    printed = follow("docs/columns.md", tmp_path, shared_ray=one_ray, fake_engine=True).splitlines()

    assert {"duplicates  5", "pending     10"} <= set(printed)
    assert [line.split()[:3] for line in printed if line.startswith("succeeded ")] == [
        ["succeeded", str(page), "en"] for page in (0, 1, 2, 3, 4, 7, 8, 9, 10, 11)
    ]


def sample_of_three(folder: Path, image: str = "red-circle.png") -> None:
    """Write a manifest of three small requests next to the sample's images; the last one is of `image`."""
    shutil.copytree(tiny.SAMPLE / "images", folder / "images")
    names = ["blue-square.png", "green-triangle.png", image]
    rows = {
        "request_id": ["a", "b", "c"],
        "image": [f"images/{name}" for name in names],
        "prompt": ["a red circle"] * 3,
    }
    small = {"num_inference_steps": [2] * 3, "num_frames": [2] * 3}
    pq.write_table(pa.table(rows | small), folder / "requests.parquet")


@pytest.mark.long
def test_budgets_limit_a_run_as_the_page_says(tmp_path: Path, one_ray: Variables) -> None:
    sample_of_three(tmp_path)

    follow("docs/budgets.md", tmp_path, shared_ray=one_ray, fake_engine=True)

    assert len(list(tmp_path.glob("out/animations/*/*"))) == 3


@pytest.mark.long
def test_failures_are_retried_and_animations_verified_as_the_page_says(tmp_path: Path, one_ray: Variables) -> None:
    sample_of_three(tmp_path, "late.png")
    first = "pia-batch run --manifest requests.parquet --output out || test $? = 3"
    late = f"{first}\ncp images/red-circle.png images/late.png\n"

    follow(
        "docs/retry-verify-gc.md",
        tmp_path,
        lambda script: script.replace("pia-batch retry", f"{late}pia-batch retry", 1),
        one_ray,
        fake_engine=True,
    )

    assert len(list(tmp_path.glob("out/animations/*/*"))) == 3


def requests(path: Path, request_id: str) -> None:
    """A manifest of one small request, beside its image."""
    path.mkdir(parents=True)
    (path / "image.png").write_bytes(png())
    row = {"request_id": [request_id], "image": ["image.png"], "prompt": ["a red circle"]}
    pq.write_table(pa.table(row | {"num_inference_steps": [2], "num_frames": [2]}), path / "requests.parquet")


@pytest.mark.long
def test_dates_and_backfills_are_run_as_the_page_says(tmp_path: Path, one_ray: Variables) -> None:
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    days = [f"2026-11-{day}" for day in range(20, 23)]
    for date in {*days, str(yesterday)}:
        requests(tmp_path / "photos" / "de" / f"dt={date}", date)
    requests(tmp_path / "photos" / "fr" / "dt=2026-11-22", "fr")

    follow(
        "docs/schedules.md",
        tmp_path,
        lambda script: re.sub("s3://(photos|clips)/", r"\1/", script),
        one_ray,
        fake_engine=True,
    )

    folders = [tmp_path / "clips" / "de" / date.replace("-", "/") for date in {*days, str(yesterday)}]
    for folder in [*folders, tmp_path / "clips" / "fr" / "2026" / "11" / "22"]:
        assert len(list(folder.glob("animations/*/*"))) == 1, folder


@pytest.mark.long
def test_the_blocks_of_the_page_on_python_run_in_their_order(tmp_path: Path, one_ray: Variables) -> None:
    script = "\n".join(blocks("docs/python.md", "python"))
    shown = "\n".join(blocks("docs/python.md", "text"))

    with tempfile.TemporaryDirectory(prefix="pb", dir="/tmp", ignore_cleanup_errors=True) as sessions:
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env=os.environ | {"RAY_TMPDIR": sessions} | one_ray,
            capture_output=True,
            text=True,
            check=False,
        )

    assert done.returncode == 0, done.stderr
    assert unprinted(shown, done.stdout) is None, done.stdout
    results = ds.dataset(next(path for path in (tmp_path / "out/results").iterdir() if path.is_dir())).to_table()
    assert results["status"].to_pylist() == ["succeeded"] * 3
    assert sorted(results["shop"].to_pylist()) == ["north", "north", "south"]
    assert ds.dataset(tmp_path / "table").count_rows() == 2
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 1
    assert codecs.probe((tmp_path / "left.gif").read_bytes(), "gif").num_frames == 8


def test_files_show_how_they_were_made_by_the_commands_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = RunConfig.load(None, {"manifest": "m", "output": "o"})
    row: dict[str, Any] = dict.fromkeys(EFFECTIVE.names) | {
        "key": "3f" + 30 * "0",
        "request_id": "a",
        "prompt": "a red circle",
        "image": "a.png",
        "model": "default",
        "fetched_sha256": "0" * 64,
        "width": 16,
        "height": 16,
        "num_frames": 2,
        "fps": 8.0,
        "seed": 7,
        "format": "mp4",
    }
    tags = provenance.metadata_of(row, config, "e" * 32)
    made = ["outputs/demo/animations/3f/3f09.gif", "bucket/out/animations/3f/3f09.mp4", "3f09.mp4"]
    for path in map(Path, made):
        path.parent.mkdir(parents=True, exist_ok=True)
        frames = np.zeros((2, 16, 16, 3), np.uint8)
        path.write_bytes(codecs.encode(frames, "gif" if path.suffix == ".gif" else "mp4", 8.0, config.encoding, tags))

    told = []
    for command in commands("docs/provenance.md"):
        with pytest.raises(SystemExit) as left:
            cli.main([word.replace("s3://bucket", "bucket") for word in command.words[1:]])
        assert not left.value.code
        told.append(capsys.readouterr().out)

    people, programs, again = told
    assert "a red circle" in people
    assert json.loads(programs)["provenance"]["prompt"] == "a red circle"
    assert json.loads(again)["request_id"] == "a"
