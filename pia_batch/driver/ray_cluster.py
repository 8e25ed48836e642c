"""What a run needs of Ray besides Ray Data: a connection, and whom else the cluster lets in."""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import signal
import socket
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal
from urllib.parse import urlsplit

import grpc
import ray
import ray.data
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.exceptions import AuthenticationError

from pia_batch.config import PlacementConfig
from pia_batch.errors import ConfigError, message_of
from pia_batch.planning import capacity
from pia_batch.storage.uris import redacted_uri

log = logging.getLogger(__name__)

Authentication = Literal["token", "none", "unknown"]

ANSWER_S = 5.0
"""Seconds that a cluster has to say whether it asks for a token."""

NO_TOKEN = (
    "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token, or put it into ~/.ray/auth_token; "  # noqa: S105
    "`ray get-auth-token` prints it on the head node"
)
"""The remedy where a cluster refuses a token, or the lack of one."""

_OPEN = (
    "the Ray cluster runs without token authentication: whoever reaches it can run any code there. Start its "
    "nodes with RAY_AUTH_MODE=token; `ray get-auth-token --generate` makes the token"
)


@contextmanager
def connect(place: PlacementConfig) -> Iterator[None]:
    """A connection to Ray: the one that exists, else the cluster's, else a Ray of our own that ends with the run.

    Raises:
        ConfigError: there is no such Ray, it refuses our token, this machine has no room for the engines or for reading
            beside them, or the cluster is open to everyone and `placement.require_auth` is set.
    """
    if ray.is_initialized():
        check_authentication(ray.get_runtime_context().gcs_address, required=place.require_auth)
        _check_room(place, ours=False)
        yield
        return
    address = place.address
    options: dict[str, Any] = {"address": address, "logging_level": logging.ERROR}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of what it will do one day
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # or it prints a warning of every engine's restarts
        # What its workers print is in Ray's session folder; what a request failed of is in its result.
        options |= {"include_dashboard": False, "log_to_driver": False, "num_cpus": capacity.local_cpus()}
        if place.object_store_mb is not None:
            options["object_store_memory"] = place.object_store_mb * 2**20
    _refuse_silence(address)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(**options)
    except AuthenticationError:
        msg = f"Ray at {redacted_uri(address)} refuses the token, or the lack of one: {NO_TOKEN}"
        raise ConfigError(msg) from None
    except (ConnectionError, ValueError, RuntimeError) as err:
        msg = f"cannot reach Ray at {address}: {err}; see placement.ray_address and RAY_ADDRESS"
        raise ConfigError(msg) from None
    _handle(handlers)  # Ray's own would end the process with nothing committed
    try:
        gcs = ray.get_runtime_context().gcs_address
        check_authentication(gcs, required=place.require_auth, ours=address == "local")
        gpus = ray.cluster_resources().get("GPU", 0)
        if address == "local" and gpus < place.num_gpus:
            msg = f"placement.num_gpus is {place.num_gpus:g} and this machine has {gpus:g}; 0 runs on the CPU"
            raise ConfigError(msg)
        _check_room(place, ours=address == "local")
        yield
    finally:
        ray.shutdown()
        _handle(handlers)  # it leaves the system's own, whatever Python says: SIGTERM would end what is left of the run


def _handle(handlers: Mapping[signal.Signals, Any]) -> None:
    """Give signals these handlers, where this thread may."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _check_room(place: PlacementConfig, *, ours: bool) -> None:
    """Say at once what a run would wait for; of a cluster that may grow by itself only as a warning."""
    nodes = [capacity.Node.of(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    short = capacity.find_shortage(place, nodes)
    if short is None:
        return
    if ours:
        msg = f"Ray on this machine: {short}"
        raise ConfigError(msg)
    log.warning("small_cluster nodes=%d: %s", len(nodes), short)


def _refuse_silence(address: str) -> None:
    """Say at once that nobody listens at the address of a cluster; Ray would try for a minute and more."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        if parts.hostname is None or parts.port is None:
            return
        socket.create_connection((parts.hostname, parts.port), timeout=ANSWER_S).close()
    except ValueError:
        return  # Ray says what is wrong with it
    except OSError as err:
        msg = (
            f"no Ray answers at {redacted_uri(address)}: {message_of(err)}; start the cluster, or correct "
            "placement.ray_address or RAY_ADDRESS"
        )
        raise ConfigError(msg) from None


def authentication(address: str | None) -> Authentication:
    """Whether a cluster lets in only those who have its token. Asked as a stranger would: without one.

    Args:
        address: the dashboard's, such as `http://head:8265`, or Ray's own, such as `head:6379`; None: that of the
            connection that this process has, else RAY_ADDRESS, else a Ray that a run starts for itself.

    Returns:
        `unknown` where nobody answers within ANSWER_S seconds, or something else does: a proxy, a Ray behind TLS.
    """
    if address is None and ray.is_initialized():
        address = str(ray.get_runtime_context().gcs_address)
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":  # Ray makes a token for itself where nothing else is said
        return "token" if os.environ.get("RAY_AUTH_MODE", "token").lower() == "token" else "none"
    if address == "auto":
        address = ray._private.services.canonicalize_bootstrap_address("auto") or ""  # noqa: SLF001
    if address.startswith(("http://", "https://")):
        return _authentication_of_dashboard(address)
    return _authentication_of_ray(address) if address and "://" not in address else "unknown"


def _authentication_of_dashboard(address: str) -> Authentication:
    """As the dashboard tells everyone: its page has to know whether to ask for a token."""
    question = f"{address.rstrip('/')}/api/authentication_mode"
    try:
        with urllib.request.urlopen(question, timeout=ANSWER_S) as answer:  # noqa: S310 - http or https, see above
            mode = json.load(answer)["authentication_mode"]
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
    return {"token": "token", "disabled": "none"}.get(mode, "unknown")  # type: ignore[return-value]


def _authentication_of_ray(address: str) -> Authentication:
    """As a call of Ray's own protocol that everyone may make is answered."""
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            call(b"", timeout=ANSWER_S)
        except grpc.RpcError as err:
            return "token" if err.code() == grpc.StatusCode.UNAUTHENTICATED else "unknown"
    return "none"


def check_authentication(address: str, *, required: bool, ours: bool = False) -> None:
    """Tell of a cluster that everyone may use, where others can reach it.

    Args:
        address: as for `authentication`.
        required: `placement.require_auth`.
        ours: this process started it, and it ends with the run.

    Raises:
        ConfigError: authentication is required, and the cluster has none or does not say.
    """
    found = authentication(address)
    where = redacted_uri(address)
    if required and found == "none":
        msg = f"{_OPEN}, or set placement.require_auth: false (its address is {where})"
        raise ConfigError(msg)
    if required and found == "unknown":
        msg = f"placement.require_auth: the Ray cluster at {where} does not say whether it asks for a token"
        raise ConfigError(msg)
    if found == "none" and not ours and not _is_loopback(address):
        log.warning("open_cluster address=%s: %s", where, _OPEN)


def _is_loopback(address: str) -> bool:
    host = urlsplit(address if "://" in address else f"//{address}").hostname
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def end_execution(dataset: ray.data.Dataset) -> None:
    """End what Ray Data still does for a dataset, if it does.

    An executor that waits for an actor which no node can hold goes on after the run. After `ray.shutdown()` it starts
    a Ray of its own, and some time later this process ends without a word.
    """
    for thread in threading.enumerate():
        if isinstance(thread, StreamingExecutor) and thread.name.endswith(f"-{dataset.get_dataset_id()}"):
            thread.shutdown(force=True)
