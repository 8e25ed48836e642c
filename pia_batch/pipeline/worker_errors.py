"""Why a worker could not start or was lost, in words for the operator, who should not have to read its log for that."""

from __future__ import annotations

import logging
import re
import socket
import sys

from pia_batch import __version__
from pia_batch.errors import BrokenDeviceError, ConfigError, InterruptedRunError, PiaBatchError, message_of

_DRIVER_WORDS = ("cuda", "cudnn", "nvidia", "nvrtc", "driver", "hip error", "no kernel image")
"""One of these is in whatever torch says of a device that it cannot use."""


_LOST = frozenset(
    {
        *("ActorDiedError", "ActorUnavailableError", "NodeDiedError", "OutOfDiskError", "OutOfMemoryError"),
        *("ObjectLostError", "ObjectReconstructionFailedError", "OwnerDiedError", "WorkerCrashedError"),
    }
)
"""Ray's names for work that died with its process or machine more often than Ray does it again."""


def show_log() -> None:
    """Let the standard error of this process have what this package logs, as that of the command line has.

    Ray keeps it as a file; by default Python shows warnings only.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("pia_batch").setLevel(logging.INFO)


def check_version(drivers: str) -> None:
    """Refuse to work for a driver of another version: columns and keys may mean other things there.

    Raises:
        ConfigError: the version of this package on this node is not `drivers`.
    """
    if drivers != __version__:
        msg = (
            f"node {socket.gethostname()} has pia_batch {__version__}, and the driver {drivers}; install one version "
            "on every node, by the image of the cluster or by a runtime_env"
        )
        raise ConfigError(msg)


def explain(err: Exception) -> Exception:
    """What the operator has to do about an exception that ended the start of an engine on this node.

    Returns:
        One of our own errors; `err` itself where it is one, or where it tells of a bug rather than of the node.
    """
    if isinstance(err, PiaBatchError):
        return err
    said, here = f"{type(err).__name__}: {message_of(err)}", f"an engine cannot start on node {socket.gethostname()}"
    if isinstance(err, ImportError):
        return ConfigError(f"{here}: {said}; install the versions of constraints.txt on every node")
    if isinstance(err, MemoryError) or "OutOfMemory" in type(err).__name__ or "out of memory" in said:
        return ConfigError(
            f"{here}: {said}; it needs a larger device or machine, `model.memory: low`, fewer engines on one GPU "
            "(placement.num_gpus), or fewer models (placement.max_models)"
        )
    if isinstance(err, OSError):
        return ConfigError(f"{here}: {said}; the model's files must be readable there, and there must be room for them")
    if any(word in said.lower() for word in _DRIVER_WORDS):
        return BrokenDeviceError(
            f"{here}: {said}; compare its driver with the CUDA version that torch was built for (`nvidia-smi`, "
            "`python -m torch.utils.collect_env`), and mend the node or take it out"
        )
    return err


def explain_loss(err: BaseException) -> BaseException:
    """What Ray means that says of a worker that it is lost, or could never begin.

    Returns:
        One of our own errors, or `err` itself where it is none of Ray's.
    """
    if not type(err).__module__.startswith("ray."):
        return err
    missing = re.search(r"No module named '[\w.]+'", str(err))
    if missing is not None:
        return ConfigError(
            f"a node of the cluster lacks code of this run: {missing[0]}; install one version of pia_batch, and the "
            "versions of constraints.txt, on every node"
        )
    if type(err).__name__ in _LOST:
        return InterruptedRunError(
            f"Ray lost a part of this run for good: {type(err).__name__}: {message_of(err)}; what was finished is "
            "committed. Look at the memory and the disks of the nodes, and start again to go on"
        )
    return err
