"""Ray cluster: connects a run to Ray, checks its capacity, and ends what Ray Data leaves behind."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import ray
import ray.data
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled, without a stub
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.exceptions import AuthenticationError
from ray.job_config import JobConfig

from pia_batch.config import PlacementConfig
from pia_batch.driver import own_ray, own_ray_node, ray_output, worker_modules
from pia_batch.driver.authentication import (
    SILENCE_S,
    TOKEN_REMEDY,
    check_authentication,
    connect_once,
    host_and_port,
    program_at,
    uses_tls,
)
from pia_batch.driver.ray_address import check_address
from pia_batch.errors import ConfigError, message_of, problem_of
from pia_batch.planning import capacity
from pia_batch.storage.uris import redacted_uri

log = logging.getLogger(__name__)


class _JobConfig(JobConfig):  # type: ignore[misc]  # Ray's own, without types
    """Configuration of Ray's job whose workers search for modules where the driver does, and nowhere else."""

    _py_driver_sys_path: list[str]
    """Folders that Ray adds, and puts before those of each worker."""

    def _get_proto_job_config(self) -> Any:
        self._py_driver_sys_path = worker_modules.inherited_paths(self._py_driver_sys_path, sys.path)
        return super()._get_proto_job_config()


@contextmanager
def connect(place: PlacementConfig) -> Iterator[None]:
    """Connect to Ray: by the existing connection, to the cluster, or to a Ray of our own that ends with the run.

    Raises:
        ConfigError: Nothing answers at the address; Ray cannot start here; the cluster refuses our token; this machine
            has too few resources for the engines and the manifest's reader; or the cluster is open to everyone and
            `placement.require_auth` is set.
        InterruptedRunError: A Ray of our own has ended, whatever error that caused meanwhile.
    """
    if ray.is_initialized():
        check_authentication(ray.get_runtime_context().gcs_address, required=place.require_auth)
        _check_capacity(place, ours=False)
        yield
        return
    address = place.address
    check_address(address)
    worker_modules.check_modules()
    options: dict[str, Any] = {"address": address, "logging_level": logging.ERROR}
    if address == "local":
        own_ray.check_limits(object_store_mb=place.object_store_mb)
        own_ray.check_memory_threshold()
        own_ray.check_shared_memory()
        own_ray.check_temp_folder()
        own_ray.check_token_path()
        # Under `uv run`, Ray would pack the working folder for its workers. Ours are on this machine, and need no copy.
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning about a future default
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # silences an error about every engine's restarts
        # Workers' output is in Ray's session folder; the error of a request is in its result.
        options |= {"include_dashboard": False, "log_to_driver": False, "num_cpus": capacity.local_cpus()}
        if place.object_store_mb is not None:
            options["object_store_memory"] = place.object_store_mb * 2**20
    if "://" not in address:  # a Ray client's folders do not exist on the cluster, and Ray does not add them
        options["job_config"] = _JobConfig()
    _check_answer(address)
    with own_ray.session_token() if address == "local" else nullcontext():
        AuthenticationTokenLoader.instance().reset_cache()  # it may keep the token of an earlier run of this process
        with _connected(place, options):
            yield


@contextmanager
def _connected(place: PlacementConfig, options: Mapping[str, Any]) -> Iterator[None]:
    """Connect with these options of `ray.init`, and disconnect."""
    address = place.address
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with ExitStack() as started:
            started.enter_context(ray_output.without_level_line())
            if address == "local":
                started.enter_context(own_ray_node.started_by_init())
                started.enter_context(own_ray.without_warning_filters())
            ray.init(**options)
    except AuthenticationError:
        msg = f"Ray at {redacted_uri(address)} refuses the token, or the lack of one: {TOKEN_REMEDY}"
        raise ConfigError(msg) from None
    except Exception as err:  # noqa: BLE001 - Ray has no class of its own for what it cannot start or reach
        _restore(handlers)
        if address == "local":
            raise own_ray.explain_start(err) from None
        raise _unreachable(address, err) from None
    _restore(handlers)  # Ray's own handlers would end the process with nothing committed
    try:
        check_authentication(
            ray.get_runtime_context().gcs_address, required=place.require_auth, ours=address == "local"
        )
        _check_capacity(place, ours=address == "local")
        yield
    except Exception:
        own_ray_node.check_processes()  # Ray's own error of a Ray that has ended names no cause
        raise
    finally:
        ray.shutdown()
        _restore(handlers)  # Ray leaves the system's default handlers: SIGTERM would end the rest of the run


def _unreachable(address: str, err: Exception) -> ConfigError:
    """Return the error of a cluster to which Ray could not connect, with what the operator can do about it."""
    cause, shown = message_of(err), redacted_uri(address)
    if "uv run" in str(err) or "exceeds the maximum size" in str(err) or "runtime_env" in str(err):
        remedy = (
            "under `uv run`, Ray sends the working folder to the cluster: start from a folder with only the project, "
            "or set RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 where the nodes have the packages already"
        )
    elif "ersion mismatch" in str(err):
        cause = " ".join(str(err).split())  # the versions are on lines of their own
        remedy = (
            "install the same versions of Ray and Python here and on every node, or use `pia-batch submit` from here"
        )
    elif address == "auto":
        remedy = (
            "no Ray runs on this machine: unset RAY_ADDRESS or placement.ray_address for a Ray of the run's own, or "
            "start one by `ray start --head`"
        )
    else:
        remedy = (
            "start the cluster, run this on one of its nodes, and correct placement.ray_address or RAY_ADDRESS "
            "(HEAD:6379)"
        )
    return ConfigError(f"cannot reach Ray at {shown}: {type(err).__name__}: {cause}; {remedy}")


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    """Install these signal handlers, if this is the main thread."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _check_capacity(place: PlacementConfig, *, ours: bool) -> None:
    """Refuse a Ray of our own that would block the run; only warn of a cluster, because it may grow by itself."""
    gpus = ray.cluster_resources().get("GPU", 0)
    if ours and gpus < place.num_gpus:
        msg = (
            f"placement.num_gpus: this machine has too few (got {place.num_gpus:g}, expected at most {gpus:g}); 0 "
            "runs on the CPU"
        )
        raise ConfigError(msg)
    nodes = [capacity.Node.of(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    shortage = capacity.find_shortage(place, nodes)
    if shortage is None:
        return
    if ours:
        msg = f"Ray on this machine: {shortage}"
        raise ConfigError(msg)
    log.warning("small_cluster_found nodes=%d: %s", len(nodes), shortage)


def _check_answer(address: str) -> None:
    """Fail at once if no Ray listens at the address of a cluster; Ray would try for minutes."""
    try:
        if None in host_and_port(address):
            return
        connect_once(address)
    except ValueError:
        return  # Ray reports what is wrong with it
    except OSError as err:
        msg = (
            f"no Ray answers at {redacted_uri(address)}: {problem_of(err)}; start the cluster, or correct "
            "placement.ray_address or RAY_ADDRESS"
        )
        raise ConfigError(msg) from None
    found = program_at(address)
    if found == "ray":
        return
    shown, remedy = redacted_uri(address), "correct placement.ray_address or RAY_ADDRESS (HEAD:6379)"
    problem = f"another program than Ray answers at {shown}"
    if found == "silent":
        problem = f"a program listens at {shown}, and does not answer within {SILENCE_S:g} s"
        remedy = f"if it is Ray, start the cluster again; otherwise {remedy}"
    if uses_tls():
        remedy = f"unset RAY_USE_TLS if the cluster has no TLS; {remedy}"
    raise ConfigError(f"{problem}; {remedy}")


def end_execution(dataset: ray.data.Dataset) -> None:
    """End the execution of a dataset if Ray Data still works on it.

    An executor that waits for an actor which no node can hold would continue after the run. After `ray.shutdown()` it
    starts a Ray of its own, and some time later this process ends without a message.
    """
    for thread in threading.enumerate():
        if isinstance(thread, StreamingExecutor) and thread.name.endswith(f"-{dataset.get_dataset_id()}"):
            thread.shutdown(force=True)
