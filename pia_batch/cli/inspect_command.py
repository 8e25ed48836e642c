"""Command `inspect`, which shows the provenance stored in an animation file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import unquote, urlsplit

import typer

from pia_batch import errors
from pia_batch.cli.console import err, out, print_json
from pia_batch.cli.options import AsJson

if TYPE_CHECKING:
    from pia_batch.media.provenance import Provenance

MAX_BYTES = 2**30
"""Maximum size of a file, which is read whole, in bytes. An animation has a few MB."""


def inspect(
    file: Annotated[str, typer.Argument(help="Animation: a local file, or its URI on object storage.")],
    manifest_row: Annotated[
        bool,
        typer.Option(
            "--manifest-row", help="Print one line of a JSONL manifest that generates the same animation again."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show how an animation was made: prompt, settings, seed, model, version and key, as stored in the file.

    Reads GIF, MP4, WebP, zips of PNGs, and single PNGs of those. Anyone with write access can change this metadata.
    Example: `pia-batch inspect outputs/demo/animations/3f/3f09.gif --manifest-row > again.jsonl`
    """
    from pia_batch.storage.uris import redacted_uri

    data, shown = _read(file), redacted_uri(file)
    made = _provenance(data, shown)
    if manifest_row:
        out.print(json.dumps(made.manifest_row()), soft_wrap=True, markup=False)
        _warn_of_gaps(made)
    elif as_json:
        print_json({"file": shown, "provenance": made.model_dump(mode="json"), "manifest_row": made.manifest_row()})
    else:
        _print(made, shown)


def _read(file: str) -> bytes:
    from pia_batch.storage.object_store import Store
    from pia_batch.storage.store_uris import absolute

    uri = absolute(file)
    try:
        if uri.startswith("file://"):
            path = Path(unquote(urlsplit(uri).path))
            _check_size(path.stat().st_size, file)
            return path.read_bytes()
        folder, _, name = uri.rpartition("/")
        store = Store(folder)
        _check_size(store.stat(name).num_bytes, file)
        return store.read(name)
    except FileNotFoundError:
        raise errors.ConfigError(f"{file} does not exist") from None
    except IsADirectoryError:
        raise errors.ConfigError(f"{file} is a folder; name one animation in it") from None
    except OSError as problem:
        raise errors.ConfigError(f"cannot read {file}: {errors.message_of(problem)}") from None


def _check_size(num_bytes: int, file: str) -> None:
    if num_bytes > MAX_BYTES:
        raise errors.ConfigError(f"{file} has {num_bytes} bytes; an animation has at most {MAX_BYTES}")


def _provenance(data: bytes, file: str) -> Provenance:
    from pia_batch.media import codecs
    from pia_batch.media.provenance import Provenance

    try:
        made = Provenance.found_in(codecs.comments(data))
    except errors.EncodingError as problem:
        raise errors.ConfigError(f"{file} is {problem}") from None
    except ValueError as problem:
        raise errors.ConfigError(
            f"{file}: metadata in a form that this version does not support: {problem}; use a newer version"
        ) from None
    if made is None:
        raise errors.ConfigError(
            f"{file}: no provenance in the file: another program made it, it was generated with "
            "`encoding.provenance: false`, or a copy dropped it; find its result by the key in its name"
        )
    return made


def _print(made: Provenance, file: str) -> None:
    from pia_batch.schema.key_prompts import described

    fields = {
        "file": file,
        "made by": f"{made.software}; {made.digital_source_type.rpartition('/')[2]}",
        "key": made.key,
        "request_id": made.request_id,
        "prompt": made.prompt,
        "image": made.image or "(in the manifest)",
        "image_sha256": made.image_sha256,
        "ip_adapter_image": made.ip_adapter_image,
        "model": f"{made.model}  {made.base}  engine {made.engine_id}",
        "speed": made.speed,
        "fit": made.fit,
        "encoder": made.encoder,
    } | made.settings
    for name in ("prompts", "negative_prompts"):
        if fields.get(name):
            fields[name] = described(fields[name])
    for name, value in fields.items():
        if value is not None:
            out.print(f"{name:20} {errors.printable(str(value))}", soft_wrap=True, markup=False)
    _warn_of_gaps(made)


def _warn_of_gaps(made: Provenance) -> None:
    """Print on standard error what a manifest row lacks to generate the same animation."""
    for name in made.withheld:
        words = f"the credentials in column '{name}' are not in the file: add them again for the same key"
        err.print(words, soft_wrap=True, markup=False)
    if made.image is None:
        words = f"the manifest held the image: name a file with the sha256 {made.image_sha256} in column 'image'"
        err.print(words, soft_wrap=True, markup=False)
