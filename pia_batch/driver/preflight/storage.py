"""Storage checks: weights, manifest and the output's store."""

from __future__ import annotations

import time
from collections.abc import Iterator

from pia_batch.config import ImagesConfig, ModelConfig, RunConfig, UpscaleConfig
from pia_batch.driver.preflight.finding import Finding
from pia_batch.errors import PiaBatchError, StorageError, message_of
from pia_batch.journal import layout
from pia_batch.manifest.column_map import ColumnMap
from pia_batch.manifest.reader import Manifest, refuse_output_inside
from pia_batch.storage import filesystems
from pia_batch.storage.object_store import Store
from pia_batch.storage.uris import redacted_uri
from pia_batch.weights import upscaler_files
from pia_batch.weights.resolve import resolve

MAX_SKEW_S = 5.0
"""Seconds that this machine's clock may differ from the store's; leases last `limits.lease_ttl_s`, a minute by
default."""


def check_weights(models: dict[str, ModelConfig]) -> Iterator[Finding]:
    """Resolve the weights of every model, and fetch those that are not on this machine."""
    for name, model in models.items():
        try:
            found = resolve(model)
        except PiaBatchError as err:
            message = f"model {name!r}: {' '.join(str(err).split())}"
            yield Finding("fail", "weights", message, "correct the config, or fetch the weights once on this machine")
        else:
            parts = ", ".join(label for label, _ in found.parts())
            message = "; ".join([f"model {name!r} from {redacted_uri(model.base)}: {parts}", *found.notices])
            yield Finding("ok", "weights", message)


def check_upscaler(upscale: UpscaleConfig) -> Iterator[Finding]:
    """Find the upscaler, if there is one, and fetch it if it is not on this machine."""
    try:
        found = upscaler_files.resolve(upscale)
        if found is not None:
            upscaler_files.require_spandrel()
    except PiaBatchError as err:
        message = " ".join(str(err).split())
        yield Finding("fail", "upscaler", message, "correct the config, or install what is missing")
    else:
        if found is not None:
            message = f"{found.network.architecture}, {found.network.scale} times, sha256 {found.sha256}"
            yield Finding("ok", "upscaler", message)


def check_manifest(config: RunConfig) -> Iterator[Finding]:
    """Open the manifest; its rows are checked by `plan`."""
    try:
        found = Manifest.open(config.manifest, column_map=ColumnMap.of(config))
        refuse_output_inside(found, config.output)
    except PiaBatchError as err:
        yield Finding("fail", "manifest", str(err), "correct `manifest` or `output`, or the files there")
    else:
        message = f"{found.num_rows} rows in {redacted_uri(found.uri)}; `plan` checks each"
        yield Finding("ok", "manifest", message)


def check_images(images: ImagesConfig) -> Iterator[Finding]:
    """Check that the places of `images.allow` on S3 can be asked; nothing is read from them."""
    try:
        filesystems.check_access(images.allow)
    except PiaBatchError as err:
        yield Finding("fail", "images", str(err), "correct `images.allow`, or the configuration of S3 on this machine")


def check_store(store: Store) -> Iterator[Finding]:
    """Read, write, create and delete below the output, and compare the store's clock with this machine's."""
    shown, probe = redacted_uri(store.uri), layout.DOCTOR_PROBE
    try:
        store.check(layout.CREATE_ONLY_PROBE)
        store.replace(probe, b"{}")
        now = time.time()
        written_s = store.stat(probe).modified_s
        store.read(probe)
    except (PiaBatchError, OSError) as err:
        remedy = "correct `output`, its bucket or folder, the credentials or the access policy"
        yield Finding("fail", "store", message_of(err), remedy)
        return
    yield Finding("ok", "store", f"{shown}: reads, writes, and never overwrites when it creates")
    try:
        store.delete(probe)
    except StorageError as err:
        remedy = "allow deletion for `gc --delete` and `verify --repair`; runs never delete"
        yield Finding("warn", "store", message_of(err), remedy)
    skew_s = 0.0 if written_s is None else written_s - now
    if abs(skew_s) > MAX_SKEW_S:
        message = f"this clock is {abs(skew_s):.0f} s {'behind' if skew_s > 0 else 'ahead of'} the store's"
        yield Finding("warn", "clock", message, "set the clock by NTP: `status` and `gc` compare the two clocks")
    else:
        yield Finding("ok", "clock", f"within {MAX_SKEW_S:g} s of the store's")
