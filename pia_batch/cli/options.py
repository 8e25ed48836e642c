"""Options that several commands share: a config with overrides, or an existing output."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pia_batch import errors

if TYPE_CHECKING:
    from pia_batch.config import RunConfig
    from pia_batch.journal.lease import Lease
    from pia_batch.storage.object_store import Store

ConfigPath = Annotated[Path | None, typer.Argument(help="YAML config; docs/config.md lists every key.")]
ManifestUri = Annotated[
    str | None, typer.Option("--manifest", metavar="URI", help="URI of the manifest; overrides the config.")
]
OutputUri = Annotated[
    str | None, typer.Option("--output", metavar="URI", help="URI of the output; overrides the config.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a config key, such as placement.batch_size=4; repeatable."
    ),
]
ColumnSources = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="NAME=SOURCE",
        help="Take column NAME from the manifest's SOURCE: a column, or a dotted path into a struct; repeatable.",
    ),
]
RequestIdFrom = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        help="Make request ids of a row's content (content), or of its file and number (location); default: column.",
    ),
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Also process requests that failed before.")]
RunDateText = Annotated[
    str | None,
    typer.Option(
        "--run-date",
        metavar="DATE",
        help="Value of {date} and {hour}, UTC: 2026-11-22 or 2026-11-22T05; default: the last complete one.",
    ),
]
Params = Annotated[
    list[str] | None, typer.Option("--param", metavar="NAME=VALUE", help="Value of {NAME} in templates; repeatable.")
]
Output = Annotated[str, typer.Argument(help="URI of the output.")]
OutputOrConfig = Annotated[str, typer.Argument(help="URI of the output, or the YAML config that names it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else.")]


def load(path: Path | None, overrides: dict[str, Any]) -> RunConfig:
    """Return the config of a YAML file, or of none, with overrides; templates are not filled in.

    Args:
        path: Path of the YAML file, or None.
        overrides: Values by dotted key.

    Raises:
        ConfigError: The config cannot work, or no template contains a parameter among `overrides`.
    """
    from pia_batch.config import RunConfig

    loaded = RunConfig.load(path, overrides)
    named = {key.removeprefix("params.") for key in overrides if key.startswith("params.")}
    if unused := sorted(named - loaded.templates.used):
        words = ", ".join(f"{{{name}}}" for name in unused)
        raise errors.ConfigError(f"--param: neither manifest nor output nor run_id has {words}; leave it out")
    return loaded


def params_of(params: list[str] | None) -> dict[str, Any]:
    """Return the overrides of `--param NAME=VALUE` by dotted key. Values are always strings."""
    found = {}
    for param in params or []:
        name, equals, value = param.partition("=")
        if not equals or "." in name:
            raise errors.ConfigError(f"--param {param}: expected NAME=VALUE, such as country=de")
        found[f"params.{name}"] = value
    return found


def columns_of(columns: list[str] | None) -> dict[str, Any]:
    """Return the overrides of `--column NAME=SOURCE` by dotted key. Sources are taken as they are written."""
    found: dict[str, Any] = {}
    for column in columns or []:
        name, equals, source = column.partition("=")
        if not equals or not name or not source or "." in name:
            raise errors.ConfigError(f"--column {column}: expected NAME=SOURCE, such as prompt=caption")
        if f"columns.{name}" in found:
            raise errors.ConfigError(f"--column {column}: {name} has a source already; give it one")
        found[f"columns.{name}"] = source
    return found


def names_in(columns: str, option: str) -> tuple[str, ...]:
    """Return the column names in an option, which stand between commas.

    A name with a comma, with spaces around it, or without a letter is written in double quotes, its own quotes twice.

    Args:
        columns: Text of the option.
        option: Its name for messages.
    """
    names: list[str] = []
    for quoted, plain in _NAME.findall(f"{columns},"):
        name = quoted[1:-1].replace('""', '"') if quoted else plain.strip()
        if not quoted and not name:
            raise errors.ConfigError(
                f"{option}: invalid value (got {columns!r}, expected names such as prompt,seed; one with a comma or "
                "spaces around it in double quotes)"
            )
        names.append(name)
    return tuple(names)


_NAME = re.compile(r'\s*(?:("(?:[^"]|"")*")\s*|([^,]*)),')
"""A column name with the comma after it."""


def overrides(manifest: str | None, output: str | None, settings: list[str] | None) -> dict[str, Any]:
    """Return the overrides of `--manifest`, `--output` and `--set` by dotted key, each read as its key's type."""
    from pia_batch.config import RunConfig, typed_text

    overrides: dict[str, Any] = {}
    for setting in settings or []:
        key, equals, text = setting.partition("=")
        if not equals or not all(key.split(".")):
            raise errors.ConfigError(
                f"--set {setting}: expected section.key=value, such as placement.batch_size=4; "
                "docs/config.md has all keys"
            )
        try:
            overrides[key] = typed_text.read(text, key, RunConfig)
        except ValueError as err:
            raise errors.ConfigError(
                f"--set {setting}: invalid YAML value: {errors.message_of(err)}; write such as [a, b] or "
                "{name: value}, and put texts with # or : in it in quotes"
            ) from None
    flags = {"manifest": manifest, "output": output}
    return overrides | {name: value for name, value in flags.items() if value is not None}


def given(overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the overrides that were given on the command line."""
    return {key: value for key, value in overrides.items() if value is not None}


def existing(output: str) -> tuple[Store, float]:
    """Return the store of an existing output, and the duration of a lease on it in seconds.

    Args:
        output: URI of the output, or path of a config that names it.

    Raises:
        ConfigError: No run has written to the output.
    """
    from pia_batch.config import LimitsConfig
    from pia_batch.journal import layout
    from pia_batch.storage.object_store import Store
    from pia_batch.storage.uris import redacted_uri

    ttl_s = LimitsConfig().lease_ttl_s
    if output.endswith((".yaml", ".yml")):
        loaded = load(Path(output), {}).filled()
        output, ttl_s = loaded.output, loaded.limits.lease_ttl_s
    store = Store(output)
    if not any(True for prefix in layout.RUN_PREFIXES for _ in store.list(prefix)):
        raise errors.ConfigError(f"no run has ever written to {redacted_uri(store.uri)}; correct the URI of the output")
    return store, ttl_s


@contextmanager
def held(store: Store, command: str, ttl_s: float, make_room: Callable[[], None] | None = None) -> Iterator[Lease]:
    """Hold the lease of an output, so that no run works on it meanwhile.

    Args:
        store: Output.
        command: Name of the command.
        ttl_s: Duration of the lease, in seconds.
        make_room: Function that frees space where the disk is too full for a lease; None: the command then fails.

    Raises:
        LeaseHeldError: A run works on the output.
    """
    from pia_batch.journal.lease import Lease

    with Lease(store, f"{command}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}", ttl_s, make_room=make_room) as lease:
        yield lease


def seconds_of(text: str, option: str) -> float:
    """Return a duration such as `12h`, given to `option`, in seconds."""
    from pia_batch.config import templates

    try:
        return templates.seconds_of(text)
    except ValueError as err:
        raise errors.ConfigError(f"{option}: {err}") from None
