"""Every limit holds at its value, just below it and just above it, and a refusal names the key.

`BOUNDS` is read from the config's fields: what a number may be. `CASES` has the limits that a run keeps. A number of
the config that is in no table fails `test_every_number_of_a_config_is_in_a_table`: a new key needs a case, or a reason.
"""

from __future__ import annotations

import ast
import asyncio
import io
import logging
import math
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import annotated_types
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from animated import fetched
from inputs import png, requests_table
from PIL import Image
from pyarrow.fs import LocalFileSystem
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pia_batch.config import RunConfig
from pia_batch.driver import notifications
from pia_batch.driver.budget import Budget
from pia_batch.driver.monitor import _drain, _EngineHealth
from pia_batch.errors import ConfigError, DegenerateError, InterruptedRunError, ManifestError, PiaBatchError
from pia_batch.manifest import discovery, files, text_files
from pia_batch.manifest.casting import Range
from pia_batch.manifest.column_layout import MAX_COLUMNS
from pia_batch.manifest.unify import check_columns
from pia_batch.manifest.validation import check
from pia_batch.media import fetch, images, quality
from pia_batch.pipeline import watchdog
from pia_batch.pipeline.attempts import AttemptTracker, EngineActivity, OutcomeCounts
from pia_batch.planning.capacity import READ_CPUS, Node, find_shortage
from pia_batch.planning.plan import make_plan
from pia_batch.schema.columns import MAX_ID_BYTES, MAX_URI_BYTES
from pia_batch.schema.run_record import RunRecord
from pia_batch.schema.settings import MAX_FPS, MAX_PROMPT_BYTES, MAX_SEED, ROW_SETTINGS
from pia_batch.storage.http_client import HttpReader

ROOT = Path(__file__).parents[2]
PATHS = {"manifest": "requests.parquet", "output": "out"}

# --- every number of the config --------------------------------------------------------------------------------------

SETTINGS = ("defaults.", "encoding.", "model.", "models.")
"""Sections whose numbers are settings of the model or the encoder: they have ranges, and nothing else to keep."""


def _members(annotation: Any) -> Iterator[Any]:
    """Members of a union, without what annotates them; of a container, its elements."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Annotated:
        yield from _members(parts[0])
    elif parts and typing.get_origin(annotation) is not typing.Literal:
        for part in parts:
            yield from _members(part)
    else:
        yield annotation


def numbers(model: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[tuple[str, FieldInfo, type]]:
    """Every key of a config that holds a number, with its declaration and type."""
    for name, field in model.model_fields.items():
        members = list(_members(field.annotation))
        for member in members:
            if isinstance(member, type) and issubclass(member, BaseModel):
                yield from numbers(member, f"{prefix}{name}.")
        kinds = [kind for kind in (int, float) if kind in members]
        if kinds:
            yield prefix + name, field, kinds[-1]


NUMBERS = {key: (field, kind) for key, field, kind in numbers()}


def load(**settings: Any) -> RunConfig:
    """Double underscores stand for dots."""
    return RunConfig.load(None, PATHS | {key.replace("__", "."): value for key, value in settings.items()})


WITHOUT_RANGE = {
    "model.scheduler.settings": "each scheduler has its own",
    "models.scheduler.settings": "each scheduler has its own",
}

ALONGSIDE: dict[str, Callable[[Any], dict[str, Any]]] = {
    "placement.min_engines": lambda value: {"placement.max_engines": max(1, value)},
    "placement.num_cpus": lambda value: {"placement.fetch_num_cpus": 1e-9 if math.isfinite(value) else 0.25},
    "placement.fetch_num_cpus": lambda value: {"placement.num_cpus": max(1.0, 2 * value)},
    "defaults.cond_frame": lambda _: {"defaults.num_frames": 1024},
    "upscale.scale": lambda _: {"upscale.model": "x.safetensors"},
}
"""Keys that another key restricts, with the other's value that leaves them their whole range."""


def _step(kind: type, value: float, direction: int, multiple: float | None) -> Any:
    """The next number in a direction."""
    if multiple:
        return value + direction * multiple
    return value + direction if kind is int else math.nextafter(value, direction * math.inf)


def bounds() -> Iterator[tuple[str, Any, Any, Any]]:
    """Key, last value that is allowed, the one before it, and the first that is not."""
    for key, (field, kind) in NUMBERS.items():
        multiple = next((m.multiple_of for m in field.metadata if isinstance(m, annotated_types.MultipleOf)), None)
        for limit in field.metadata:
            found = {
                annotated_types.Ge: lambda m: (m.ge, 1, True),
                annotated_types.Gt: lambda m: (m.gt, 1, False),
                annotated_types.Le: lambda m: (m.le, -1, True),
                annotated_types.Lt: lambda m: (m.lt, -1, False),
            }.get(type(limit))
            if found is None:
                continue
            value, inward, inclusive = found(limit)
            value = kind(value)
            last = value if inclusive else _step(kind, value, inward, multiple)
            refused = _step(kind, value, -inward, multiple) if inclusive else value
            yield key, last, _step(kind, last, inward, multiple), refused


BOUNDS = list(bounds())


def with_value(key: str, value: Any) -> RunConfig:
    """A config with one number; keys below lists and below `models` get the parents that they need."""
    if ".loras.scale" in key:
        section = {"loras": [{"source": "x.safetensors", "scale": value}]}
    elif ".freeu." in key:
        section = {"freeu": {key.rpartition(".")[2]: value}}
    else:
        return RunConfig.load(None, PATHS | ALONGSIDE.get(key, lambda _: {})(value) | {key: value})
    return RunConfig.load(
        None, PATHS | ({"models": {"a": section}} if key.startswith("models.") else {"model": section})
    )


@pytest.mark.parametrize(("key", "last", "before", "refused"), BOUNDS, ids=[f"{b[0]} {b[3]}" for b in BOUNDS])
def test_a_number_of_a_config_is_kept_to_its_range(key: str, last: Any, before: Any, refused: Any) -> None:
    if key != "placement.num_cpus":  # has fetch_num_cpus below it; see CASES
        with_value(key, last)
        with_value(key, before)

    with pytest.raises(ConfigError) as caught:
        with_value(key, refused)

    assert all(part in str(caught.value) for part in key.split("."))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_of_a_config_is_never_nan_and_infinite_only_where_that_means_no_limit(value: float) -> None:
    for key, (_, kind) in NUMBERS.items():
        if key in WITHOUT_RANGE or (value > 0 and key in INFINITE):
            continue
        with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
            with_value(key, value)
        assert kind in (int, float)


INFINITE = {"limits.lease_wait_s", "placement.wait_s", "budget.max_gpu_hours"}


def test_every_number_of_a_config_has_a_range() -> None:
    assert set(NUMBERS) - {key for key, *_ in BOUNDS} - {"defaults.motion_curve"} == set(WITHOUT_RANGE)


# --- limits that a run keeps -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One limit at one value.

    Attributes:
        value: Value of the key.
        accepted: Amounts that the limit lets through: the limit itself, and the next ones within it.
        refused: Amounts that it does not, the next ones beyond it among them.
        refusal: Function of config and amount that returns the error, or None.
        named: What the error has to contain; by default the key.
        settings: Further keys.
    """

    value: Any
    accepted: tuple[Any, ...]
    refused: tuple[Any, ...]
    refusal: Callable[[RunConfig, Any], str | None]
    named: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()


def raised(call: Callable[..., Any], *args: Any, **options: Any) -> str | None:
    try:
        call(*args, **options)
    except PiaBatchError as err:
        return str(err)
    return None


def _stored(run: RunConfig, num_bytes: int) -> str | None:
    folder = Path(run.output)
    folder.mkdir(exist_ok=True)
    (folder / "image.bin").write_bytes(bytes(num_bytes))
    return raised(fetch.read_image, "image.bin", f"{folder}/", run.images)


def _in_manifest(run: RunConfig, num_bytes: int) -> str | None:
    data = png(0)
    table = requests_table(1, image=[None], image_bytes=[data + bytes(num_bytes - len(data))])
    pq.write_table(table, run.manifest)
    (row,) = fetched(run).to_pylist()
    error: str | None = row["error"]
    return error


def _pixels(run: RunConfig, width: int) -> str | None:
    file = io.BytesIO()
    Image.new("L", (width, 10)).save(file, "PNG")
    return raised(images.decode, file.getvalue(), max_pixels=run.images.max_pixels, background=run.images.background)


def _row(run: RunConfig, **columns: Any) -> str | None:
    """Error of a row of a manifest."""
    table = requests_table(1, **{name: pa.array([value]) for name, value in columns.items()})
    errors = check(table, run, {"default": "e" * 32}).rejected["error"].to_pylist()
    return errors[0] if errors else None


def _clip(run: RunConfig, **measured: float) -> str | None:
    try:
        quality.refuse_degenerate({"frame_std": 99.0, "motion": 99.0} | measured, {"num_frames": 2}, run.limits)
    except DegenerateError as err:
        return str(err)
    return None


def _attempts(run: RunConfig, deaths: int) -> str | None:
    """Cause for which a request is given up that has killed its worker so many times, or None."""
    tracker = AttemptTracker(run.limits.max_attempts)
    tracker.begin(["a"])
    for _ in range(deaths - 1):
        tracker.begin_alone("a")
    return tracker.begin_alone("a").died_of


def _crashes(run: RunConfig, in_a_row: int) -> str | None:
    counts = OutcomeCounts(worker_failures=in_a_row, last_worker_failure="why")
    try:
        _EngineHealth(run, dict).check(EngineActivity(in_flight=1, outcomes=counts))
    except InterruptedRunError as err:
        return str(err)
    return None


class Clock:
    """A clock that moves only where somebody sleeps."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def _without_engine(run: RunConfig, seconds: float) -> str | None:
    clock = Clock()
    health = _EngineHealth(run, dict, clock)
    clock.sleep(seconds)
    return raised(health.check, EngineActivity())


@contextmanager
def warnings_of(module: str) -> Iterator[list[str]]:
    """Texts that a module logs from the level of warnings on."""
    texts: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logging.getLogger(module).addHandler(handler)
    try:
        yield texts
    finally:
        logging.getLogger(module).removeHandler(handler)


def _stopping(run: RunConfig, seconds: float) -> str | None:
    """Warning about a request that ends so many seconds after the run has been stopped."""
    clock = Clock()

    class Tracker:
        def stop(self) -> None:
            """Nothing begins here."""

        def activity(self) -> EngineActivity:
            return EngineActivity(in_flight=int(clock.now < seconds))

    with warnings_of("pia_batch.driver.monitor") as texts:
        _drain(Tracker(), run.limits.stop_grace_s, clock, clock.sleep)
    return texts[0] if texts else None


def _answer(run: RunConfig, seconds: float) -> str | None:
    """Error of an image whose server answers after so many seconds."""

    class Server(HttpReader):
        async def read(self, *_: Any, **__: Any) -> bytes:
            await asyncio.sleep(seconds)
            return b"image"

    return raised(fetch.read_image, "https://host/a.png", "file:///nowhere", run.images, http=Server())


RECORD = RunRecord(
    exit_code=0,
    started_at=datetime(2026, 11, 22, tzinfo=UTC),
    manifest="m",
    output="o",
    version="0.1.0",
    config={},
)


def _notified(run: RunConfig, seconds: float) -> str | None:
    """Warning about a program that takes so many seconds at the end of a run."""
    config = run.on_finish.model_copy(update={"command": ("sleep", str(seconds)), "on": ("always",)})
    with warnings_of("pia_batch.driver.notifications") as texts:
        notifications.notify(config, RECORD)
    return texts[0] if texts else None


def _reached(run: RunConfig, num_failed: int = 0, hours: float = 0.0) -> str | None:
    reached = Budget(run).reached(num_failed, hours * 3600)
    return None if reached is None else reached.message


def _short(run: RunConfig, node: Node) -> str | None:
    short = find_shortage(run.placement, [node])
    return None if short is None else str(short)


def _memory(_: RunConfig, mebibytes_above: int) -> str | None:
    """Refusal of an engine's process that takes so much more than the limit."""
    taken = watchdog.own_bytes() // 2**20
    return raised(watchdog.memory_limit_bytes, taken - mebibytes_above)


def _unbounded(**settings: Any) -> str | None:
    return raised(load, **settings)


CASES: dict[str, list[Case]] = {
    "images.max_bytes": [
        Case(1000, (999, 1000), (1001, 10**6), _stored),
        Case(50_000, (49_999, 50_000), (50_001, 10**6), _in_manifest),
    ],
    "images.max_pixels": [Case(500, (49, 50), (51, 5000), _pixels)],
    "limits.max_frame_pixels": [
        Case(64 * 64 * 8, (7, 8), (9, 32), lambda run, n: _row(run, width=64, height=64, num_frames=n)),
        Case(
            64 * 64 * 24,
            (1, 2, 3),
            (4,),
            lambda run, n: _row(run, width=64, height=64, num_frames=8, interpolate=n),
        ),
    ],
    "limits.max_call_pixels": [
        Case(64 * 64 * 16, (15, 16, 48), (17, 32), lambda run, n: _row(run, width=64, height=64, num_frames=n)),
        Case(
            64 * 64 * 8,
            (7, 8),
            (9, 32),
            lambda run, n: _row(run, width=64, height=64, num_frames=100, context="windows", context_length=n),
        ),
        Case(
            64 * 64 * 40,
            (39, 40),
            (41, 1024),
            lambda run, n: _row(run, width=64, height=64, num_frames=n, context="freenoise"),
        ),
    ],
    "limits.min_frame_std": [Case(4.0, (4.0, 4.001), (3.999, 0.0), lambda run, v: _clip(run, frame_std=v))],
    "limits.min_motion": [Case(0.5, (0.5, 0.501), (0.499, 0.0), lambda run, v: _clip(run, motion=v))],
    "limits.max_attempts": [
        Case(3, (1, 2), (3, 4), _attempts, named="worker_crash"),
        Case(2, (1,), (2, 3), _attempts, named="worker_crash"),
    ],
    "images.timeout_s": [Case(2.0, (0.0,), (60.0,), _answer, settings=(("images.allow", ["https://host/"]),))],
    "on_finish.timeout_s": [Case(2.0, (0.0,), (60.0,), _notified)],
    "limits.stop_grace_s": [
        Case(60.0, (0.0, 59.9, 60.0), (60.001, 10**6), _stopping),
        Case(0.0, (0.0,), (0.001, 1.0), _stopping),
    ],
    "placement.wait_s": [
        Case(100.0, (0.0, 99.9, 100.0), (100.001, 10**6), _without_engine),
        Case(5.0, (5.0,), (5.001,), _without_engine),
    ],
    "limits.max_crashes": [Case(3, (0, 2), (3, 4), _crashes)],
    "limits.max_failed": [
        Case(3, (2, 3), (4, 99), lambda run, n: _reached(run, num_failed=n)),
        Case(0, (0,), (1,), lambda run, n: _reached(run, num_failed=n)),
        Case(None, (0, 10**9), (), lambda run, n: _reached(run, num_failed=n)),
    ],
    "budget.max_gpu_hours": [Case(2.0, (0.0, 1.9999), (2.0, 2.0001), lambda run, h: _reached(run, hours=h))],
    "placement.num_gpus": [
        Case(0.5, (Node(4, gpus=0.5), Node(4, gpus=0.51)), (Node(4, gpus=0.49), Node(4)), _short),
    ],
    "placement.num_cpus": [
        Case(4.0, (Node(4 + READ_CPUS), Node(9)), (Node(4 + READ_CPUS - 0.01), Node(3.99)), _short),
    ],
    "placement.min_engines": [
        Case(
            3,
            (Node(3 + READ_CPUS), Node(9)),
            (Node(3 + READ_CPUS - 0.01),),
            _short,
            settings=(("placement.max_engines", 3),),
        )
    ],
    "placement.max_engines": [
        Case(
            2,
            (1, 2),
            (3, 9),
            lambda _, n: _unbounded(placement__max_engines=2, placement__min_engines=n),
            "max_engines",
        )
    ],
    "placement.fetch_num_cpus": [
        Case(
            0.25,
            (0.26, 1),
            (0.25, 0.24),
            lambda _, cpus: _unbounded(placement__fetch_num_cpus=0.25, placement__num_cpus=cpus),
            "fetch_num_cpus",
        )
    ],
    "placement.memory_mb": [
        Case(10**6, (-64, -1000), (0, 64), _memory),
        Case(512, (Node(4, memory_mb=512), Node(4, memory_mb=513)), (Node(4, memory_mb=511),), _short),
    ],
}

ELSEWHERE = {
    "upscale.scale": "tests/weights/test_upscaler_files.py::test_a_factor_is_kept_to_that_of_the_network",
    "safety.frames": "tests/pipeline/test_safety_guard.py::test_frames_are_chosen_evenly",
    "limits.timeout_s": "tests/pipeline/test_watchdog.py::"
    "test_the_time_of_requests_is_the_limit_up_to_the_work_that_it_is_meant_for_and_grows_beyond",
    "limits.lease_ttl_s": "tests/journal/test_lease.py::"
    "test_a_silent_lease_is_free_once_its_time_is_over_and_not_before",
    "limits.lease_wait_s": "tests/journal/test_lease.py::test_a_run_queues_as_long_as_it_may_and_no_longer",
    "placement.max_models": "tests/engine/test_model_cache.py::"
    "test_a_model_draws_what_it_draws_alone_in_any_order_of_loads_and_evictions",
    "placement.batch_size": "tests/pipeline/test_batching.py::"
    "test_an_engine_is_given_several_batches_at_a_time_where_it_has_very_many",
    "budget.limit": "tests/planning/test_selection.py::test_a_limit_takes_the_first_rows_and_counts_copies_once",
    "budget.sample": "tests/planning/test_selection.py::test_a_larger_sample_contains_a_smaller_one",
}
"""Limits in time, or over a whole plan, that a test of their module holds."""

NOT_LIMITS = {
    "images.threads": "number of threads",
    "placement.object_store_mb": "given to Ray as it is",
    "budget.price_per_hour": "a price",
}


def test_every_number_of_a_config_is_in_a_table() -> None:
    tables = [set(CASES), set(ELSEWHERE), set(NOT_LIMITS)]
    settings = {key for key in NUMBERS if key.startswith(SETTINGS)}

    assert set.union(*tables) == set(NUMBERS) - settings
    assert sum(map(len, tables)) == len(set.union(*tables))


@pytest.mark.parametrize("test", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_test_that_the_table_names_is_there(test: str) -> None:
    path, _, name = test.partition("::")
    functions = ast.walk(ast.parse((ROOT / path).read_text()))

    assert name in {"", *(each.name for each in functions if isinstance(each, ast.FunctionDef))}


@pytest.mark.parametrize(
    ("key", "case"), [(key, case) for key, cases in CASES.items() for case in cases], ids=lambda value: str(value)[:40]
)
def test_a_limit_holds_at_its_value_below_and_above(key: str, case: Case, tmp_path: Path) -> None:
    run = RunConfig.load(
        None,
        {
            "manifest": str(tmp_path / "m.parquet"),
            "output": str(tmp_path / "out"),
            key: case.value,
            **dict(case.settings),
        },
    )

    for amount in case.accepted:
        assert case.refusal(run, amount) is None, amount
    for amount in case.refused:
        refusal = case.refusal(run, amount)
        assert refusal is not None, amount
        assert (case.named or key) in refusal


def test_a_limit_on_requests_holds_at_its_value_below_and_above(make_config: Callable[..., RunConfig]) -> None:
    table = requests_table(4)

    assert [make_plan(make_config(table, budget__limit=n)).num_selected for n in (1, 3, 4, 5)] == [1, 3, 4, 4]


# --- limits of a row -------------------------------------------------------------------------------------------------

LARGE = {"limits__max_frame_pixels": 2**62, "limits__max_call_pixels": 2**62}
ROW_ALONGSIDE = {"cond_frame": {"num_frames": 1024}, "fps": {"format": "mp4"}}


NUMERIC = {each.name: each for each in ROW_SETTINGS if each.data_type in (pa.int64(), pa.int32(), pa.float64())}


def refused_by(error: str | None, *parts: str) -> bool:
    return error is not None and all(part in error for part in parts)


@pytest.mark.parametrize("name", NUMERIC)
def test_a_number_of_a_row_is_kept_to_its_range(name: str) -> None:
    allowed, others = Range.of(name), ROW_ALONGSIDE.get(name, {})
    kind = int if allowed.integer else float
    multiple = allowed.multiple_of if allowed.multiple_of > 1 else None
    run = load(**LARGE)
    lowest, high = kind(allowed.minimum), kind(allowed.maximum)
    low = _step(kind, lowest, 1, multiple) if allowed.open_below else lowest

    for value in (low, _step(kind, low, 1, multiple), _step(kind, high, -1, multiple), high):
        assert not refused_by(_row(run, **{name: value}, **others), str(allowed)), value
    for value in (
        lowest if allowed.open_below else _step(kind, low, -1, multiple),
        *([] if high >= MAX_SEED else [_step(kind, high, 1, multiple)]),
    ):
        assert refused_by(_row(run, **{name: value}, **others), f"column '{name}'", str(allowed)), value


TEXTS = {
    "request_id": (MAX_ID_BYTES, lambda n: "x" * n),
    "prompt": (MAX_PROMPT_BYTES, lambda n: "x" * n),
    "negative_prompt": (MAX_PROMPT_BYTES, lambda n: "x" * n),
    "image": (MAX_URI_BYTES, lambda n: "s3://bucket/".ljust(n, "x")),
    "ip_adapter_image": (MAX_URI_BYTES, lambda n: "s3://bucket/".ljust(n, "x")),
}


@pytest.mark.parametrize("column", TEXTS)
def test_a_text_of_a_row_is_kept_to_its_bytes(column: str) -> None:
    limit, text = TEXTS[column]
    run = load(**{"model__ip_adapter": {"source": "x.safetensors"}} if column == "ip_adapter_image" else {})

    for length in (limit - 1, limit):
        assert _row(run, **{column: text(length)}) is None
    for value in (text(limit + 1), text(limit - 1) + "\N{LATIN SMALL LETTER E WITH ACUTE}"):  # bytes, not letters
        assert refused_by(_row(run, **{column: value}), f"'{column}'", str(limit))


@pytest.mark.parametrize("file_format", MAX_FPS)
def test_a_frame_rate_is_kept_to_what_its_format_holds(file_format: str) -> None:
    limit = float(MAX_FPS[file_format])

    for fps in (limit - 1, limit):
        assert _row(load(), format=file_format, fps=fps) is None
    assert refused_by(_row(load(), format=file_format, fps=limit + 0.5), "column 'fps'", f"{limit:g}")


def test_seeds_are_kept_to_64_bits_with_a_sign() -> None:
    assert _row(load(), seed=0) is None
    assert _row(load(), seed=MAX_SEED) is None
    for seed in (pa.scalar(-1), pa.scalar(MAX_SEED + 1, pa.uint64())):
        assert refused_by(_row(load(), seed=seed), "column 'seed'")


# --- limits that no config changes -----------------------------------------------------------------------------------

IMAGES, READER, HERE = (
    "tests/media/test_images.py::",
    "tests/manifest/test_reader.py::",
    "tests/config/test_limits.py::",
)
FIXED = {
    "schema/settings.MAX_FPS": f"{HERE}test_a_frame_rate_is_kept_to_what_its_format_holds",
    "schema/settings.MAX_SEED": f"{HERE}test_seeds_are_kept_to_64_bits_with_a_sign",
    "schema/lora_scales.MAX_SCALE": "tests/manifest/test_lora_scales.py::"
    "test_what_cannot_be_scaled_is_rejected_with_what_is_allowed",
    "schema/settings.MAX_FRAMES": f"{HERE}test_a_number_of_a_row_is_kept_to_its_range",
    "schema/settings.MAX_PROMPT_BYTES": f"{HERE}test_a_text_of_a_row_is_kept_to_its_bytes",
    "schema/expressions.MAX_EXPRESSION_BYTES": "tests/schema/test_expressions.py::test_the_length_is_limited",
    "schema/columns.MAX_ID_BYTES": f"{HERE}test_a_text_of_a_row_is_kept_to_its_bytes",
    "schema/columns.MAX_URI_BYTES": f"{HERE}test_a_text_of_a_row_is_kept_to_its_bytes",
    "manifest/column_layout.MAX_COLUMNS": f"{HERE}test_the_number_of_columns_is_kept_to_its_limit",
    "manifest/text_files.MAX_TEXT_BYTES": f"{HERE}test_text_is_kept_to_its_bytes_in_all",
    "manifest/files._MAX_FOOTER_BYTES": f"{HERE}test_a_footer_is_kept_to_its_bytes",
    "manifest/files.MAX_ROW_BYTES": f"{READER}test_a_value_that_a_million_rows_share_is_refused_before_it_is_unpacked",
    "manifest/files.MAX_ROW_BYTES_WITH_BYTES": f"{READER}"
    "test_a_value_that_a_million_rows_share_is_refused_before_it_is_unpacked",
    "manifest/files.MAX_EXPANSION": f"{READER}"
    "test_a_row_group_that_unpacks_to_more_than_a_machine_should_hold_is_refused_by_the_footer",
    "manifest/files.MAX_EXPANDED_BYTES": f"{READER}"
    "test_a_row_group_that_unpacks_to_more_than_a_machine_should_hold_is_refused_by_the_footer",
    "manifest/reader.MAX_ROWS": f"{READER}test_more_rows_than_a_driver_can_plan_are_refused_by_the_footer",
    "media/image_headers.MAX_SIDE": f"{IMAGES}test_the_longest_side_is_an_image",
    "media/image_headers.MAX_PARTS": f"{IMAGES}test_the_number_of_parts_is_kept_to_its_limit",
    "media/bitmaps.MAX_IDLE_CODES": "tests/media/test_transparency.py::"
    "test_codes_that_do_not_advance_are_refused_before_they_take_long",
    "media/image_headers.MAX_CHUNKS": f"{IMAGES}test_the_number_of_parts_is_kept_to_its_limit",
    "media/image_headers.MAX_SCANS": f"{IMAGES}test_the_number_of_parts_is_kept_to_its_limit",
    "media/image_headers.MAX_PROFILE_BYTES": f"{IMAGES}test_a_profile_is_used_up_to_its_limit",
    "media/codecs/png_zip._MAX_COMMENT_BYTES": "the archive is one of ours; bounds what `probe` reads of it",
    "manifest/blocklist.MAX_BLOCKLIST_BYTES": "tests/manifest/test_blocklist.py::"
    "test_a_blocklist_is_read_up_to_its_limit",
    "manifest/tokens.MAX_TOKENS": "tests/manifest/test_tokens.py::",
    "manifest/tokens._MAX_WORDS": "tests/manifest/test_tokens.py::",
}
"""Fixed limits of what is read, with their tests. A path alone: every test of that file."""


def test_every_fixed_limit_of_what_is_read_has_a_test() -> None:
    found = set()
    package = ROOT / "pia_batch"
    for room in ("schema", "manifest", "media"):
        for path in (package / room).rglob("*.py"):
            for node in ast.parse(path.read_text()).body:
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                names = [each.id for each in targets if isinstance(each, ast.Name)]
                module = path.relative_to(package).with_suffix("").as_posix()
                found |= {f"{module}.{name}" for name in names if name.lstrip("_").startswith("MAX_")}

    assert found == set(FIXED)
    for test in FIXED.values():
        if "::" in test:
            test_a_test_that_the_table_names_is_there(test)


def test_the_number_of_columns_is_kept_to_its_limit() -> None:
    names = ["request_id", "image", "prompt", *(f"c{k}" for k in range(MAX_COLUMNS))]

    for count in (MAX_COLUMNS - 1, MAX_COLUMNS):
        check_columns(names[:count], "the manifest")
    with pytest.raises(ManifestError, match=f"{MAX_COLUMNS + 1} columns; at most {MAX_COLUMNS}"):
        check_columns(names[: MAX_COLUMNS + 1], "the manifest")


def test_text_is_kept_to_its_bytes_in_all(tmp_path: Path) -> None:
    one, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.write_bytes(b"x" * 1000)
    for above in (-1, 0, 1):
        with other.open("wb") as file:  # sparse
            file.truncate(text_files.MAX_TEXT_BYTES - 1000 + above)
        error = raised(discovery.check_stored_bytes, LocalFileSystem(), (str(one), str(other)), str(tmp_path))
        assert (error is not None) == (above > 0)
        assert error is None or (str(text_files.MAX_TEXT_BYTES) in error and "write it as Parquet" in error)


def test_a_footer_is_kept_to_its_bytes() -> None:
    limit = files._MAX_FOOTER_BYTES
    for footer_bytes in (limit - 1, limit, limit + 1):
        end = footer_bytes.to_bytes(4, "little") + b"PAR1"

        class Source:
            """The end of a file, of which nothing else is read."""

            def read_at(self, num_bytes: int, offset: int, end: bytes = end) -> bytes:
                assert (num_bytes, offset) == (8, 2**30 - 8)
                return end

        error = raised(files._check_footer_bytes, Source(), 2**30, "a.parquet")
        assert (error is not None) == (footer_bytes > limit)
        assert error is None or "larger row groups" in error
