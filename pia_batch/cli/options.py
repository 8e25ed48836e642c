"""What several commands take: a config and what is laid over it, or an output that exists."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pia_batch import errors
from pia_batch.config import yaml_text

if TYPE_CHECKING:
    from pia_batch.config import RunConfig
    from pia_batch.journal.lease import Lease
    from pia_batch.storage.object_store import Store

ConfigPath = Annotated[Path | None, typer.Argument(help="a YAML config; docs/config.md has every key")]
ManifestUri = Annotated[str | None, typer.Option("--manifest", help="the manifest's URI, over the config's")]
OutputUri = Annotated[str | None, typer.Option("--output", help="the output's URI, over the config's")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value over the config; may be repeated")
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="draw again what failed before")]
RunDateText = Annotated[
    str | None,
    typer.Option(
        "--run-date", help="what {date} and {hour} stand for, UTC: 2026-11-22 or 2026-11-22T05; the last one by default"
    ),
]
Params = Annotated[
    list[str] | None, typer.Option("--param", metavar="NAME=VALUE", help="what {NAME} stands for; may be repeated")
]
Output = Annotated[str, typer.Argument(help="the output's URI")]
OutputOrConfig = Annotated[str, typer.Argument(help="the output's URI, or the YAML config that names it")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on standard output, and nothing else")]


def load(path: Path | None, overrides: dict[str, Any]) -> RunConfig:
    """The config of a YAML file, or of none, with `overrides` by dotted key over it. Templates are not filled in.

    Raises:
        ConfigError: it cannot work, or a parameter among `overrides` stands for nothing in it.
    """
    from pia_batch.config import RunConfig

    loaded = RunConfig.load(path, overrides)
    named = {key.removeprefix("params.") for key in overrides if key.startswith("params.")}
    if unused := sorted(named - loaded.templates.used):
        words = ", ".join(f"{{{name}}}" for name in unused)
        raise errors.ConfigError(f"--param: neither manifest nor output nor run_id has {words}; leave it out")
    return loaded


def params_of(params: list[str] | None) -> dict[str, Any]:
    """What `--param NAME=VALUE` lays over a config, by dotted key. Values are texts, whatever they look like."""
    found = {}
    for param in params or []:
        name, equals, value = param.partition("=")
        if not equals or "." in name:
            raise errors.ConfigError(f"--param {param}: expected NAME=VALUE, such as country=de")
        found[f"params.{name}"] = value
    return found


def overrides(manifest: str | None, output: str | None, settings: list[str] | None) -> dict[str, Any]:
    """What `--manifest`, `--output` and `--set` lay over a config, by dotted key."""
    overrides: dict[str, Any] = {}
    for setting in settings or []:
        key, equals, text = setting.partition("=")
        if not equals or not all(key.split(".")):
            raise errors.ConfigError(
                f"--set {setting}: expected section.key=value, such as placement.batch_size=4; "
                "docs/config.md has all keys"
            )
        try:
            overrides[key] = yaml_text.parse(text)
        except ValueError:
            raise errors.ConfigError(f"--set {setting}: {text!r} is no value in YAML; put it in quotes") from None
    flags = {"manifest": manifest, "output": output}
    return overrides | {name: value for name, value in flags.items() if value is not None}


def given(overrides: dict[str, Any]) -> dict[str, Any]:
    """Those that were given on the command line."""
    return {key: value for key, value in overrides.items() if value is not None}


def existing(output: str) -> tuple[Store, float]:
    """The store of an output that something was written to, and how many seconds a lease on it lasts.

    Args:
        output: its URI, or the path of a config that names it.
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
def held(store: Store, command: str, ttl_s: float) -> Iterator[Lease]:
    """The lease of an output, so that no run goes on or begins meanwhile.

    Raises:
        LeaseHeldError: a run works there.
    """
    from pia_batch.journal.lease import Lease

    with Lease(store, f"{command}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}", ttl_s) as lease:
        yield lease


def seconds_of(text: str, option: str) -> float:
    """A duration such as `12h`, given to `option`, in seconds."""
    from pia_batch.config import templates

    try:
        return templates.seconds_of(text)
    except ValueError as err:
        raise errors.ConfigError(f"{option}: {err}") from None
