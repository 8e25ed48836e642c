"""Parts of `benchmark_gpu.py`, each in a process of its own: `python jobs/gpu_parts.py PART FILE WORK --size full`.

Each part writes its results to FILE after every measurement, so that it can be stopped at any moment, and keeps what an
earlier process wrote there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

Record = dict[str, Any]


def main() -> None:
    """Run the part that the command line names."""
    parser = argparse.ArgumentParser(description="Run one part of benchmark_gpu.py.")
    parser.add_argument("part", choices=tuple(RUN), help="part to run")
    parser.add_argument("file", type=Path, help="JSON file for the results; results in it are kept")
    parser.add_argument("work", type=Path, help="folder for the checkpoint and other large files")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: the embedded model")
    parser.add_argument("--minutes", type=float, default=10.0, help="time that the part has")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    RUN[arguments.part](arguments)


def _about(arguments: argparse.Namespace) -> None:
    """Write what results must have in common to be in one file: device, size and versions."""
    import torch

    here = torch.cuda.is_available()
    names = ("torch", "diffusers", "transformers", "ray", "av", "triton")
    installed = {name: metadata.version(name) for name in names if importlib.util.find_spec(name)}
    found = {
        "device": torch.cuda.get_device_name() if here else "cpu",
        "size": arguments.size,
        "versions": {"python": platform.python_version(), **installed, "cuda": torch.version.cuda},
    }
    _write(arguments.file, found)


def _tests(arguments: argparse.Namespace) -> None:
    """Run the tests that need a GPU; where there is none, a few others, so that a trial finds out if tests run."""
    import torch

    chosen = ["-m", "gpu", "tests/engine"] if torch.cuda.is_available() else ["tests/engine/test_batch_limit.py"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        options = ["-q", "-p", "no:cacheprovider", "--timeout=300", f"--junitxml={report}"]
        done = subprocess.run([sys.executable, "-m", "pytest", *options, *chosen], cwd=ROOT, check=False)  # noqa: S603
        if not report.exists():
            raise SystemExit(f"pytest ended with {done.returncode} before it wrote a report")
        cases = list(ET.parse(report).getroot().iter("testcase"))  # noqa: S314 - written by the process above
    failed = {case.attrib["name"]: _reason(case) for case in cases if _reason(case)}
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failed) - skipped
    _write(arguments.file, {"chosen": " ".join(chosen), "passed": passed, "skipped": skipped, "failed": failed})
    if failed or not passed:
        raise SystemExit(f"{len(failed)} tests failed, {passed} passed")


def _reason(case: ET.Element) -> str | None:
    """Return the message of a failed test; None if it did not fail."""
    found = next((case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None)
    return None if found is None else found.attrib.get("message", "")[:500]


def _features(arguments: argparse.Namespace) -> None:
    from pia_batch.engine.benchmark import features

    folder = arguments.work / "addons"
    folder.mkdir(exist_ok=True)
    base = _checkpoint(arguments)
    measured = features.measure(arguments.size, base, folder, _writer(arguments.file), _known(arguments.file))
    errors = [name for name, one in measured.items() if "error" in one]
    if errors:
        raise SystemExit(f"features with an error: {', '.join(errors)}")


def _bench(only: str, rounds: int, *, profiles: bool = False) -> Callable[[argparse.Namespace], None]:
    """Return a part that measures variants of the benchmark in turns."""

    def part(arguments: argparse.Namespace) -> None:
        from pia_batch.engine.benchmark import runner

        tiny: Record = {"side_px": 32, "frames": 4, "steps": 2} if arguments.size == "tiny" else {}
        options = runner.BenchmarkOptions(
            size=arguments.size,
            rounds=rounds,
            batches=(1,) if tiny else (4,),
            compiles=not tiny,
            only=only,
            minutes=arguments.minutes,
            profiles=profiles,
            **tiny,
        )
        known = _known(arguments.file)

        def report(record: Record, line: str) -> None:
            print(line, flush=True)
            _write(arguments.file, runner.merged(known, record))

        measured = runner.run(options, _encoder(), report)
        errors = [name for name, one in measured["variants"].items() if "error" in one]
        if errors or "error" in measured.get("profile", {}):
            raise SystemExit(f"variants with an error: {', '.join(errors) or 'none, but the profile failed'}")

    return part


def _encoder() -> Callable[[Any], bytes]:
    """Return the encoder of MP4 files; without PyAV, one that encodes nothing, so that variants are still compared."""
    if not importlib.util.find_spec("av"):
        print("PyAV is missing: nothing is encoded in this benchmark", flush=True)
        return lambda _: b""
    from pia_batch.config import EncodingConfig
    from pia_batch.media.codecs import encode

    return lambda frames: encode(frames, "mp4", 8, EncodingConfig())


def _chain(arguments: argparse.Namespace) -> None:
    from gpu_chain import measured_run, write_manifest

    tiny = arguments.size == "tiny"
    batch, requests = (1, 4) if tiny else (4, 64)
    found = _known(arguments.file)
    base, manifest = _checkpoint(arguments), write_manifest(arguments.work, requests)
    for speed in ("exact", "fast"):
        if speed not in found:
            found[speed] = measured_run(manifest, base, speed, arguments.work, batch, requests, tiny=tiny)
            _write(arguments.file, found)


def _memory(arguments: argparse.Namespace) -> None:
    from pia_batch.engine.benchmark import memory

    small: Record = {"frames": 4, "largest": 4} if arguments.size == "tiny" else {}
    sides = (32, 64) if small else (512, 768)
    memory.by_batch(_engine(arguments), sides, _writer(arguments.file), _known(arguments.file), **small)


def _windows(arguments: argparse.Namespace) -> None:
    from pia_batch.engine.benchmark import memory

    small: Record = {"side": 32, "steps": 1} if arguments.size == "tiny" else {}
    frames = (24,) if small else (48, 128)
    memory.long_clips(_engine(arguments), frames, _writer(arguments.file), _known(arguments.file), **small)


def _engine(arguments: argparse.Namespace) -> Any:
    from pia_batch.config import ModelConfig
    from pia_batch.engine import PiaEngine

    return PiaEngine.load(ModelConfig(base=_checkpoint(arguments), compile=False, memory="max_speed"))


def _checkpoint(arguments: argparse.Namespace) -> str:
    """Return the checkpoint of this size; write one with random weights first if the work folder has none."""
    if arguments.size == "tiny":
        return "embedded"
    folder = arguments.work / "checkpoint"
    if not (folder / "model_index.json").exists():  # written last
        program = Path(__file__).with_name("write_full_checkpoint.py")
        subprocess.run([sys.executable, str(program), str(folder)], check=True)  # noqa: S603 - ourselves
    return str(folder)


def _known(file: Path) -> Record:
    found: Record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found


def _writer(file: Path) -> Callable[[Record], None]:
    return lambda record: _write(file, record)


def _write(file: Path, record: Record) -> None:
    """Write the results atomically."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(file)


RUN: dict[str, Callable[[argparse.Namespace], None]] = {
    "about": _about,
    "tests": _tests,
    "features": _features,
    "engine": _bench("db", rounds=3),
    "profile": _bench("d", rounds=1, profiles=True),
    "baselines": _bench("ca", rounds=2),
    "presets": _bench("e", rounds=2),
    "chain": _chain,
    "memory": _memory,
    "windows": _windows,
}
"""Function of each part; `about` comes before all others."""


if __name__ == "__main__":
    main()
