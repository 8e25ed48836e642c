"""Errors of workers that could not start or were lost, explained to the operator without a look at the worker's log."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys

from pia_batch import __version__
from pia_batch.errors import (
    BrokenDeviceError,
    ConfigError,
    DeviceMemoryError,
    InterruptedRunError,
    PiaBatchError,
    StorageError,
    environment_error,
    is_out_of_memory,
    message_of,
)

MAX_STARTS = 3
"""Maximum number of consecutive starts of one worker's process without a ready engine."""

_DRIVER_WORDS = ("cuda", "cudnn", "nvidia", "nvrtc", "driver", "hip error", "no kernel image")
"""Words of which one is in every message of torch about a device that it cannot use."""

_NODES = "look at the memory and the disks of the nodes"
_MEMORY = (
    "use nodes with more memory, fewer engines on each (a larger placement.num_cpus), or a smaller placement.batch_size"
)
_STORE = "raise placement.object_store_mb, the shared memory of the container, or the disk where Ray keeps its objects"

_LOST = {
    **dict.fromkeys(("ActorDiedError", "ActorUnavailableError", "NodeDiedError", "WorkerCrashedError"), _NODES),
    **dict.fromkeys(("RayActorError", "LocalRayletDiedError", "RpcError", "GetTimeoutError"), _NODES),
    **dict.fromkeys(("ObjectLostError", "ObjectReconstructionFailedError", "OwnerDiedError"), _NODES),
    **dict.fromkeys(("ObjectFetchTimedOutError", "ReferenceCountingAssertionError"), _NODES),
    "OutOfMemoryError": _MEMORY,
    **dict.fromkeys(("ObjectStoreFullError", "OutOfDiskError"), _STORE),
}
"""Remedies by the names of Ray's errors for work that died, with its process or machine, more often than it retries."""


def show_log() -> None:
    """Write this package's log to the standard error of this process, as the command line does.

    Ray keeps it as a file; by default Python shows warnings only.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("pia_batch").setLevel(logging.INFO)


def check_version(driver_version: str) -> None:
    """Refuse to work for a driver of another version, whose columns and keys may have another meaning.

    Raises:
        ConfigError: The version of this package on this node is not `driver_version`.
    """
    if driver_version != __version__:
        msg = (
            f"node {socket.gethostname()} has pia_batch {__version__}, and the driver {driver_version}; install one "
            "version on every node, by the image of the cluster or by a runtime_env"
        )
        raise ConfigError(msg)


def check_starts(starts: int) -> None:
    """Refuse to load an engine again where loading it ended this worker's process every time.

    Args:
        starts: Number of consecutive starts, this one included.

    Raises:
        BrokenDeviceError: There were more than MAX_STARTS.
    """
    if starts > MAX_STARTS:
        msg = (
            f"an engine's process has died {starts - 1} times in a row while it started, the last time on "
            f"{socket.gethostname()} or the node before it: too little host memory, or a driver that crashes. Look for "
            "an out-of-memory kill in the system's log, at Ray's worker logs, and try `pia-batch demo` there"
        )
        raise BrokenDeviceError(msg)


def explain(err: Exception) -> Exception:
    """Explain an exception that ended the start of an engine on this node.

    Returns:
        One of our own errors, with the remedy. `err` itself where it is one already, or where it is a bug rather than a
        fault of the node.
    """
    if isinstance(err, PiaBatchError):
        return err
    cause, here = f"{type(err).__name__}: {message_of(err)}", f"an engine cannot start on node {socket.gethostname()}"
    if isinstance(err, ImportError):
        return ConfigError(f"{here}: {cause}; install the versions of constraints.txt on every node")
    if is_out_of_memory(err):
        return ConfigError(
            f"{here}: {cause}; it needs a larger device or machine, `model.memory: low`, fewer engines on one GPU "
            "(placement.num_gpus), or fewer models (placement.max_models)"
        )
    if isinstance(err, OSError):
        remedy = "the model's files must be readable there, and its disk must have room for them"
        if (name := _variable_of(err.filename)) is not None:
            remedy = f"set {name} to a folder that can be read and written, or unset it"
        return ConfigError(f"{here}: {cause}; {remedy}")
    if any(word in cause.lower() for word in _DRIVER_WORDS):
        return BrokenDeviceError(
            f"{here}: {cause}; compare its driver with the CUDA version that torch was built for (`nvidia-smi`, "
            "`python -m torch.utils.collect_env`), and repair the node or remove it"
        )
    return err


_FOLDER_VARIABLES = ("_CACHE", "_CACHE_DIR", "_DIR", "_HOME", "TMPDIR")
"""Endings of environment variables by which libraries of an engine find the folders that they write to."""


def _variable_of(path: object) -> str | None:
    """Return the environment variable that names the folder of a path, or the path itself; None if there is none."""
    names = [name for name in os.environ if name.endswith(_FOLDER_VARIABLES) and os.environ[name]]
    return next((name for name in names if f"{path}/".startswith(f"{os.environ[name].rstrip('/')}/")), None)


def memory_error(err: Exception) -> DeviceMemoryError | None:
    """Return the error of a request for which memory ran out, with the remedy; None for any other exception."""
    if not is_out_of_memory(err):
        return None
    return DeviceMemoryError(
        f"the worker ran out of memory: {message_of(err)}; lower its num_frames, width or height, or take a machine or "
        "device with more memory"
    )


def own_cause(err: BaseException) -> PiaBatchError | None:
    """Return the error of ours that a worker raised, without the wrappers of Ray; None if there is none."""
    inner: BaseException | None = err
    while inner is not None:
        if isinstance(cause := getattr(inner, "cause", None), BaseException):
            inner = cause  # the wrapper is of the cause's class too, but its text is a traceback
        elif isinstance(inner, PiaBatchError):
            return inner
        else:
            inner = inner.__cause__
    return None


def own_message(err: PiaBatchError) -> str:
    """Return the message of an error of ours, without the notes about retries that Ray Data appends to it."""
    return _NOTES.split(str(err), maxsplit=1)[0].strip()


_NOTES = re.compile(r"\nFailed to .* after \d+/\d+ attempts ")


def interruption_by(err: BaseException) -> InterruptedRunError | None:
    """Return the end of a run whose store, or whose own machine, failed under way; None for any other exception."""
    if isinstance(err, StorageError):
        reason = own_message(err)
    elif isinstance(err, PiaBatchError) or (explained := environment_error(err)) is None:
        return None
    else:
        reason = str(explained)
    interruption = InterruptedRunError(f"{reason}; everything finished is committed. Start again to resume")
    interruption.__cause__ = err
    return interruption


def explain_loss(err: BaseException) -> BaseException:
    """Explain an error of Ray about a worker that is lost, or could never begin.

    Returns:
        One of our own errors, with the remedy, or `err` itself where it is not Ray's.
    """
    if not type(err).__module__.startswith("ray."):
        return err
    missing = re.search(r"No module named '[\w.]+'", str(err))
    if missing is not None:
        return ConfigError(
            f"a node of the cluster lacks code of this run: {missing[0]}; install one version of pia_batch, and the "
            "versions of constraints.txt, on every node"
        )
    cause = getattr(err, "cause", None)
    if isinstance(cause, BaseException) and (explained := environment_error(cause)) is not None:
        return InterruptedRunError(
            f"a worker failed: {explained}; what was finished is committed. Start again to resume"
        )
    if type(err).__name__ == "RuntimeEnvSetupError":
        return ConfigError(
            f"Ray cannot make the environment of its workers: {message_of(err)}; correct the runtime_env of the job, "
            "or unset RAY_RUNTIME_ENV variables"
        )
    if (remedy := _LOST.get(type(err).__name__)) is not None:
        return InterruptedRunError(
            f"Ray lost a part of this run for good: {type(err).__name__}: {message_of(err)}; what was finished is "
            f"committed. To resume, {remedy}, and start again"
        )
    return err
