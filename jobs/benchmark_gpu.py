"""All measurements on a machine with a GPU, in one command that ends in time: nine parts, the most valuable first.

    python jobs/benchmark_gpu.py --to gpu                              # 28 minutes; full size, random weights
    python jobs/benchmark_gpu.py --to gpu --minutes 9                  # as far as it gets; the same again goes on
    python jobs/benchmark_gpu.py --to trial --size tiny --minutes 5    # trial of all parts on any CPU

Results are in `gpu.json`, which is written after each part. docs/gpu-day.md explains how to run and to read it. This
program imports nothing but Python's own library, so that it can always say what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]

GRACE_S = 10.0
"""Time that a part has to end by itself after it was asked to, in seconds."""

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
"""Signals that end the program after the running part is ended and recorded."""

ENGINE = (
    *("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "PIL", "numpy", "psutil"),
    *("pydantic", "ruamel.yaml", "obstore", "pyarrow"),
)
RUN = (*ENGINE, "ray", "av", "aiohttp", "fsspec", "grpc", "jinja2", "rich", "typer")
TESTS = (*ENGINE, "pytest", "pytest_timeout", "hypothesis", "xdist")
"""Packages that parts import."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the measurements.

    Attributes:
        name: Name of the part, in the results and in `gpu_parts.py`.
        minutes: Time that the part may take; more where earlier parts left some over.
        needs: Packages without which it cannot run.
        what: Description for people.
    """

    name: str
    minutes: float
    needs: tuple[str, ...]
    what: str


PARTS = (
    Part("tests", 3, TESTS, "tests marked gpu"),
    Part("features", 5, ENGINE, "half precision against float32, every feature"),
    Part("engine", 6, ENGINE, "the engine (d) and PIAPipeline (b), in turns"),
    Part("profile", 2, ENGINE, "where a step of the engine goes"),
    Part("baselines", 4, ENGINE, "PIAPipeline compiled (c) and as documented (a), in turns"),
    Part("presets", 2, ENGINE, "lossy presets of the engine (e)"),
    Part("chain", 3, RUN, "64 requests through Ray"),
    Part("memory", 1.5, ENGINE, "memory against batch, 512 and 768 px"),
    Part("windows", 1.5, ENGINE, "long clips of 48 and 128 frames"),
)
"""Parts in the order of their value."""

LEAST_SHARE = 0.4
"""Share of a part's minutes that must be left when it begins; with less, it is skipped."""


class OtherResultsError(Exception):
    """Failure to add to results of another device, size or set of versions."""


class SignalledError(Exception):
    """Signal that ends this program, such as that of a lease that ends.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that have no results yet, and return the exit code.

    It is 0 if all parts asked for are done at the end, 1 if one of them is not, and 128 + n if signal n ended the
    program; the part that was running is recorded first.
    """
    options = _parse(arguments)
    try:
        return _measure(options)
    except SignalledError as err:
        print(f"stopped {err}; the same command again runs what is not done", file=sys.stderr)
        return err.exit_code


def _measure(options: argparse.Namespace) -> int:
    """Run the parts that have no results yet; return 1 if one of those asked for is not done at the end."""
    ends = time.monotonic() + 60 * options.minutes
    options.to.mkdir(parents=True, exist_ok=True)
    missing = [name for name in dict.fromkeys((*TESTS, *RUN)) if not _is_installed(name)]
    for name in missing:
        blocked = [str(number) for number, part in enumerate(PARTS, 1) if name in part.needs]
        print(f"{name} is missing: no part {', '.join(blocked)}", flush=True)
    if "torch" in missing:
        return 1
    try:
        results = _opened(options)
    except OtherResultsError as err:
        print(err, file=sys.stderr)
        return 1
    pending = [part for part in options.parts if results["parts"].get(part.name, {}).get("status") != "done"]
    for index, part in enumerate(pending):
        began = time.monotonic()
        try:
            status, reason = _attempt(part, options, ends - began, pending[index + 1 :], set(missing))
        except SignalledError as err:
            _save(results, part, options, began, "stopped", str(err))
            raise
        _save(results, part, options, began, status, reason)
    num_left = sum(results["parts"][part.name]["status"] != "done" for part in options.parts)
    rest = "; the same command again runs the rest" if num_left else ""
    print(f"{options.to / 'gpu.json'}: {len(options.parts) - num_left} of {len(options.parts)} parts done{rest}")
    return int(num_left > 0)


def _opened(options: argparse.Namespace) -> dict[str, Any]:
    """Return the results so far, with the device, the size and the versions.

    Raises:
        OtherResultsError: The folder has results that these cannot be added to.
    """
    with tempfile.TemporaryDirectory() as folder:
        about = Path(folder) / "about.json"
        _status, reason = _run("about", about, options, limit_s=120.0)
        if not about.exists():
            raise OtherResultsError(f"torch cannot be used: {reason}")
        now = json.loads(about.read_text(encoding="utf-8"))
    print(f"{now['device']}, {now['size']}, torch {now['versions'].get('torch')}", flush=True)
    file = options.to / "gpu.json"
    if not file.exists():
        return {**now, "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"), "parts": {}}
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    other = [name for name, value in now.items() if known.get(name) != value]
    if other:
        raise OtherResultsError(f"{file} has results of another {' and '.join(other)}; give another folder to --to")
    return known


def _attempt(
    part: Part, options: argparse.Namespace, left_s: float, later: Sequence[Part], missing: set[str]
) -> tuple[str, str | None]:
    """Run one part if it can run and there is time; return its status and a reason."""
    lacking = sorted(missing.intersection(part.needs))
    limit_s = min(left_s - GRACE_S, max(60 * part.minutes, left_s - 60 * sum(each.minutes for each in later)))
    if lacking:
        return "missing", f"install {' '.join(lacking)}"
    if limit_s < LEAST_SHARE * 60 * part.minutes:
        return "skipped", f"{max(0.0, left_s) / 60:.1f} minutes are left, it needs {part.minutes:g}"
    print(f"{part.name}: {part.what}, at most {limit_s / 60:.1f} minutes", flush=True)
    return _run(part.name, options.to / f"{part.name}.json", options, limit_s)


def _save(
    results: dict[str, Any], part: Part, options: argparse.Namespace, began: float, status: str, reason: str | None
) -> None:
    """Add a part with what it has measured so far to the results, write them, and print its status."""
    record: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - began, 1)}
    if reason:
        record["reason"] = reason
    file = options.to / f"{part.name}.json"
    if file.exists():
        record["measured"] = json.loads(file.read_text(encoding="utf-8"))
    results["parts"][part.name] = record
    _write(options.to / "gpu.json", results)
    print(f"{part.name}: {status} {reason or ''}".rstrip(), flush=True)


def _run(name: str, file: Path, options: argparse.Namespace, limit_s: float) -> tuple[str, str | None]:
    """Run a part in a process of its own, and end it and its children at the limit; return its status and a reason."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("gpu_parts.py")), name]
    command += [str(file), str(options.work), "--size", options.size, "--minutes", f"{0.9 * limit_s / 60:.2f}"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with (options.to / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603 - ourselves
            command, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return "stopped", f"at its limit of {limit_s / 60:.1f} minutes"
        finally:
            _end(process)
    if code == 0:
        return "done", None
    lines = (options.to / f"{name}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "failed", f"exit code {code}: {lines[-1][:500] if lines else 'no output'}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a part's process and its children: ask first, then kill what is left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(GRACE_S)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def _write(file: Path, results: dict[str, Any]) -> None:
    """Write the results atomically."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(file)


def _parts(text: str) -> list[Part]:
    """Return the parts of a list of numbers or names, in their usual order."""
    asked = set(text.split(","))
    chosen = [part for number, part in enumerate(PARTS, 1) if asked & {str(number), part.name}]
    known = {each for number, part in enumerate(PARTS, 1) for each in (str(number), part.name)}
    if not asked <= known:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers from 1 to 9 or names, such as 1,3")
    return chosen


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    numbered = "; ".join(f"{number} {part.name}: {part.what}" for number, part in enumerate(PARTS, 1))
    parser = argparse.ArgumentParser(description="Run all measurements on a machine with a GPU.", epilog=numbered)
    parser.add_argument("--to", type=Path, required=True, help="folder for gpu.json; results in it are kept")
    parser.add_argument("--minutes", type=float, default=28.0, help="end after this time (default: %(default)g)")
    parser.add_argument("--parts", type=_parts, default=list(PARTS), help="such as 1,3 (default: all)")
    parser.add_argument(
        "--size", choices=("full", "tiny"), default="full", help="full: random weights; tiny: the embedded model"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / f"pia-batch-gpu-{os.getuid()}",
        help="folder that keeps the checkpoint for the next command (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    options.to, options.work = options.to.absolute(), options.work.absolute()
    return options


def _raise(number: int, _frame: object) -> NoReturn:
    """Raise SignalledError, once: another signal would interrupt what records the part."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise SignalledError(number)


if __name__ == "__main__":
    for each in SIGNALS:
        if signal.getsignal(each) is not signal.SIG_IGN:  # as SIGHUP under nohup
            signal.signal(each, _raise)
    sys.exit(main())
