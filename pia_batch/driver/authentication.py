"""Ray authentication: finds out whether a cluster asks for a token, and finds the token."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import socket
import ssl
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import grpc
import ray

from pia_batch.config import PlacementConfig
from pia_batch.errors import ConfigError
from pia_batch.storage.uris import redacted_uri

log = logging.getLogger(__name__)

Authentication = Literal["token", "none", "unknown"]

ANSWER_S = 5.0
"""Seconds that a cluster has to answer."""

SILENCE_S = 15.0
"""Seconds after which what answers nothing counts as no Ray; gRPC itself gives up the connection after 20."""

TOKEN_REMEDY = (
    "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token, or put it into ~/.ray/auth_token; "  # noqa: S105
    "`ray get-auth-token` prints it on the head node"
)
"""Remedy where a cluster refuses a token, or the lack of one."""

OPEN_REMEDY = "start its nodes with RAY_AUTH_MODE=token; `ray get-auth-token --generate` makes the token"
"""Remedy where a cluster asks for no token."""

_OPEN = (
    "the Ray cluster runs without token authentication: everyone who can reach it can run any code there. Start its "
    "nodes with RAY_AUTH_MODE=token; `ray get-auth-token --generate` makes the token"
)


def host_and_port(address: str) -> tuple[str | None, int | None]:
    """Return the host and the port of a dashboard's URL or of Ray's own `HOST:PORT`, None for what it lacks.

    Raises:
        ValueError: The port is not a number.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    return parts.hostname, parts.port


def connect_once(address: str) -> None:
    """Open a connection to a cluster and close it.

    Raises:
        OSError: Nothing listens at the address.
        ValueError: The port is not a number.
    """
    host, port = host_and_port(address)
    socket.create_connection((host or "", port or 80), timeout=ANSWER_S).close()


def authentication(address: str | None) -> Authentication:
    """Return whether a cluster asks for a token, by a request without one.

    Args:
        address: Address of the dashboard, such as `http://head:8265`, or of Ray itself, such as `head:6379`. None: that
            of the connection that this process has, else RAY_ADDRESS, else a Ray that a run starts for itself.

    Returns:
        `unknown` where nothing answers within ANSWER_S seconds, or something else does: a proxy, a Ray behind TLS.
    """
    if address is None and ray.is_initialized():
        address = str(ray.get_runtime_context().gcs_address)
    address = address or PlacementConfig().address
    if address == "local":  # Ray makes a token for itself unless RAY_AUTH_MODE says otherwise
        return "token" if os.environ.get("RAY_AUTH_MODE", "token").lower() == "token" else "none"
    if address == "auto":
        try:
            address = ray._private.services.canonicalize_bootstrap_address("auto") or ""  # noqa: SLF001
        except ConnectionError:  # no Ray runs on this machine
            return "unknown"
    if address.startswith(("http://", "https://")):
        return _authentication_of_dashboard(address)
    return _authentication_of_ray(address) if address and "://" not in address else "unknown"


def _authentication_of_dashboard(address: str) -> Authentication:
    """Ask the dashboard: its page has to know whether to ask for a token."""
    url = f"{address.rstrip('/')}/api/authentication_mode"
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_S) as answer:  # noqa: S310 - http or https, see above
            mode = json.load(answer)["authentication_mode"]
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return "unknown"
    return {"token": "token", "disabled": "none"}.get(mode, "unknown")  # type: ignore[return-value]


def is_silent(dashboard: str, seconds: float = SILENCE_S) -> bool:
    """Return True if a program listens at a dashboard's URL and answers nothing; Ray's client would wait for ever."""
    try:
        urllib.request.urlopen(f"{dashboard.rstrip('/')}/api/version", timeout=seconds).close()  # noqa: S310 - http or https
    except OSError as err:
        return isinstance(getattr(err, "reason", err), TimeoutError)
    except (HTTPException, ValueError):
        pass
    return False


def _authentication_of_ray(address: str) -> Authentication:
    code = _code_of_ray(address)
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return "token"
    return "none" if code is grpc.StatusCode.OK else "unknown"


def _code_of_ray(address: str, seconds: float = ANSWER_S) -> grpc.StatusCode:
    """Make a call of Ray's own protocol that changes nothing, without a token; return how it ends within `seconds`."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            call(b"", timeout=seconds)
        except grpc.RpcError as err:
            code: grpc.StatusCode = err.code()
            return code
    return grpc.StatusCode.OK


def program_at(address: str, seconds: float = SILENCE_S) -> Literal["ray", "another", "silent"]:
    """Return what listens at a cluster's address: `another` for HTTP, SSH or Redis, `silent` if it answers nothing.

    Ray itself would try for minutes. Where this process uses TLS (RAY_USE_TLS), all that answers in TLS counts as Ray.

    Args:
        address: Address with host and port.
        seconds: Time that it has to answer, in seconds.
    """
    host, port = host_and_port(address)
    if uses_tls():
        return _program_behind_tls(host or "", port or 0, seconds)
    code = _code_of_ray(f"[{host}]:{port}" if ":" in (host or "") else f"{host}:{port}", seconds)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "silent"
    return "another" if code is grpc.StatusCode.UNAVAILABLE else "ray"


def uses_tls() -> bool:
    """Return True if Ray connects by TLS in this process."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _program_behind_tls(host: str, port: int, seconds: float) -> Literal["ray", "another", "silent"]:
    """Begin TLS as any client does. A server that refuses this client by an alert of TLS is left to Ray."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((host, port), timeout=seconds) as connected:
            context.wrap_socket(connected).close()
    except TimeoutError:
        return "silent"
    except ssl.SSLError as err:
        return "ray" if "ALERT" in (err.reason or "") else "another"
    except OSError:
        return "another"
    return "ray"


def check_authentication(address: str, *, required: bool, ours: bool = False) -> None:
    """Warn of a cluster without authentication that others can reach, or refuse it.

    Args:
        address: Address as for `authentication`.
        required: Value of `placement.require_auth`.
        ours: True if this process started the cluster, which then ends with the run.

    Raises:
        ConfigError: Authentication is required, and the cluster has none or does not answer the question.
    """
    found = authentication(address)
    shown = redacted_uri(address)
    if required and found == "none":
        msg = f"{_OPEN}, or set placement.require_auth: false (its address is {shown})"
        raise ConfigError(msg)
    if required and found == "unknown":
        msg = (
            f"placement.require_auth: cannot find out whether the Ray cluster at {shown} asks for a token; name its "
            "dashboard (http://HEAD:8265) or Ray's own address (HEAD:6379), or set placement.require_auth: false"
        )
        raise ConfigError(msg)
    if found == "none" and not ours and not _is_loopback(address):
        log.warning("open_cluster_found address=%s: %s", shown, _OPEN)


def _is_loopback(address: str) -> bool:
    try:
        host, _ = host_and_port(address)
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def token() -> str:
    """Return the token from where Ray itself looks for it.

    Raises:
        ConfigError: There is none.
    """
    if found := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return found
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        found = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        found = ""
    if not found:
        msg = f"the Ray cluster asks for a token, and none is set: {TOKEN_REMEDY}"
        raise ConfigError(msg)
    return found
