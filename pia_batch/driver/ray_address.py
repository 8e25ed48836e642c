"""Address of Ray: checks its form before anything connects to it. Does not import Ray."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from pia_batch.errors import ConfigError, printable
from pia_batch.storage.uris import redacted_uri

_PLAIN = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(\d+)", re.ASCII)
_MAX_PORT = 65535


def check_address(address: str) -> None:
    """Check that a run can connect to an address. Ray waits for ever for some of those that it cannot.

    Args:
        address: `local`, `auto`, `HOST:PORT`, or a URL of another scheme than those of a dashboard.

    Raises:
        ConfigError: The address has another form, or is the URL of a dashboard.
    """
    if address.startswith(("http://", "https://")):
        msg = (
            f"placement.ray_address or RAY_ADDRESS: {redacted_uri(address)} is the URL of a dashboard, which only "
            "`submit` and `jobs` use; give Ray's own address (HEAD:6379), or start the run by `pia-batch submit`"
        )
        raise ConfigError(msg)
    if address in ("local", "auto") or _is_valid(address):
        return
    shown = printable(redacted_uri(address))
    msg = (
        f"placement.ray_address or RAY_ADDRESS: invalid address (got {shown!r}, expected HOST:PORT, such as "
        f"HEAD:6379, or auto or local); correct it, or unset it for a Ray of the run's own"
    )
    raise ConfigError(msg)


def _is_valid(address: str) -> bool:
    if "://" in address:
        try:
            parts = urlsplit(address)
            return parts.port != 0 and address.isprintable() and " " not in address
        except ValueError:
            return False
    found = _PLAIN.fullmatch(address)
    return found is not None and 0 < int(found[2]) <= _MAX_PORT
