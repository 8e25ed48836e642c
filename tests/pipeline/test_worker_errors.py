import errno
import socket
import subprocess
import sys

import pytest
import ray.exceptions
import torch
from ray.exceptions import RaySystemError, WorkerCrashedError

from pia_batch import __version__
from pia_batch.errors import BrokenDeviceError, ConfigError, InterruptedRunError, StorageError
from pia_batch.pipeline.worker_errors import check_version, explain, explain_loss, memory_error


class OutOfMemoryError(RuntimeError):
    """As torch calls it."""


@pytest.mark.parametrize(
    ("raised", "kind", "remedy"),
    [
        (ModuleNotFoundError("No module named 'torch'"), ConfigError, "install the versions of constraints.txt"),
        (ImportError("libcudart.so.13: cannot open shared object file"), ConfigError, "constraints.txt on every node"),
        (MemoryError(), ConfigError, "larger device or machine"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), ConfigError, "model.memory: low"),
        (RuntimeError("CUDA error: out of memory"), ConfigError, "placement.num_gpus"),
        (OSError(28, "No space left on device"), ConfigError, "its disk must have room for them"),
        (RuntimeError("The NVIDIA driver on your system is too old"), BrokenDeviceError, "compare its driver"),
        (RuntimeError("No CUDA GPUs are available"), BrokenDeviceError, "repair the node or remove it"),
        (AssertionError("Torch not compiled with CUDA enabled"), BrokenDeviceError, "torch was built for"),
        (RuntimeError("CUDA error: no kernel image is available for execution"), BrokenDeviceError, "nvidia-smi"),
    ],
)
def test_what_a_node_lacks_is_reported_with_the_node_the_cause_and_the_remedy(
    raised: Exception, kind: type[Exception], remedy: str
) -> None:
    explained = explain(raised)

    assert type(explained) is kind
    assert f"an engine cannot start on node {socket.gethostname()}: {type(raised).__name__}" in str(explained)
    assert remedy in str(explained)


@pytest.mark.parametrize(
    ("name", "folder"), [("TORCHINDUCTOR_CACHE_DIR", "/proc/x"), ("HF_HOME", "/data/"), ("TMPDIR", "/data/tmp")]
)
@pytest.mark.parametrize("raised", [FileNotFoundError, PermissionError])
def test_a_folder_that_an_engine_cannot_write_is_named_by_the_variable_that_says_where_it_is(
    monkeypatch: pytest.MonkeyPatch, raised: type[OSError], name: str, folder: str
) -> None:
    monkeypatch.setenv(name, folder)
    remedy = f"set {name} to a folder that can be read and written, or unset it"

    assert str(explain(raised(1, "no", f"{folder.rstrip('/')}/kernels"))).endswith(remedy)
    assert str(explain(raised(1, "no", folder.rstrip("/")))).endswith(remedy)
    assert remedy not in str(explain(raised(1, "no", f"{folder.rstrip('/')}-other/kernels")))


@pytest.mark.parametrize(
    "raised",
    [
        MemoryError(),
        MemoryError("Unable to allocate 2.00 GiB for an array"),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
        ),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: not enough memory: you tried 9 bytes"),
        RuntimeError("unable to mmap 3438167540 bytes from file <unet.safetensors>: Cannot allocate memory (12)"),
        RuntimeError("Storage size calculation overflowed with sizes=[4611686018427387904, 8]"),
        RuntimeError("could not create a primitive"),
        RuntimeError("could not create a memory object"),
        RuntimeError("could not execute a primitive"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_a_lack_of_memory_is_the_error_of_one_request_with_the_remedy(raised: Exception) -> None:
    error = memory_error(raised)

    assert error is not None
    assert error.kind == "out_of_memory"
    assert str(error).startswith("the worker ran out of memory: ")
    assert "lower its num_frames, width or height" in str(error)


@pytest.mark.parametrize(
    "raised",
    [
        RuntimeError("cursed"),
        RuntimeError("could not create a primitive descriptor for the convolution forward propagation primitive"),
        KeyError("out of memory"),
        OSError(errno.ENOSPC, "full"),
    ],
)
def test_another_error_is_no_lack_of_memory(raised: Exception) -> None:
    assert memory_error(raised) is None


@pytest.mark.parametrize("raised", [KeyError("unet"), TypeError("no such argument"), StorageError("S3 is down")])
def test_a_bug_and_what_is_explained_already_stay_what_they_are(raised: Exception) -> None:
    assert explain(raised) is raised


def test_work_that_ray_gave_up_is_an_interruption_and_code_that_is_missing_a_config_error() -> None:
    lost = explain_loss(WorkerCrashedError())
    missing = explain_loss(RaySystemError("No module named 'pia_batch.pipeline.worker_errors'", "Traceback"))

    assert isinstance(lost, InterruptedRunError)
    assert "WorkerCrashedError" in str(lost)
    assert isinstance(missing, ConfigError)
    assert "lacks code of this run: No module named 'pia_batch.pipeline.worker_errors'; install one version" in str(
        missing
    )
    for bug in (RaySystemError("what?", "Traceback"), ModuleNotFoundError("No module named 'x'"), KeyError("unet")):
        assert explain_loss(bug) is bug


def test_a_worker_shows_what_this_package_logs_and_no_more_of_others() -> None:
    logs = "; ".join(
        f"logging.getLogger('{name}').info('{name} is ready')" for name in ("pia_batch.pipeline.animate", "other")
    )
    program = f"import logging; from pia_batch.pipeline import worker_errors; worker_errors.show_log(); {logs}"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stderr.strip().endswith("INFO pia_batch.pipeline.animate is ready")
    assert "other" not in done.stderr


def test_a_node_with_another_version_is_refused() -> None:
    check_version(__version__)

    with pytest.raises(ConfigError, match=rf"has pia_batch {__version__}, and the driver 99\.0; install one version"):
        check_version("99.0")


BUGS = {
    *(
        "ActorAlreadyExistsError",
        "ActorHandleNotFoundError",
        "AsyncioActorExit",
        "CrossLanguageError",
        "ObjectFreedError",
    ),
    *("OufOfBandObjectRefSerializationException", "PendingCallsLimitExceeded", "PlasmaObjectNotAvailable", "RayError"),
    *("RaySystemError", "RayTaskError", "TaskCancelledError", "UnserializableException", "UserCodeException"),
    *("ObjectRefStreamEndOfStreamError", "StreamingGeneratorReplayInconsistentError", "RayDirectTransportError"),
    *("RayChannelError", "RayChannelTimeoutError", "RayCgraphCapacityExceeded"),
    *("ActorPlacementGroupRemoved", "TaskPlacementGroupRemoved", "ActorUnschedulableError", "TaskUnschedulableError"),
    "AuthenticationError",  # raised where a run connects, which explains it
}
"""Errors of Ray that only a use of Ray that this package does not make can raise."""

LOSSES = {
    name: kind
    for name, kind in vars(ray.exceptions).items()
    if isinstance(kind, type) and issubclass(kind, ray.exceptions.RayError) and name not in BUGS
}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_error_of_ray_that_machines_cause_is_one_line_with_a_remedy(name: str) -> None:
    raised = LOSSES[name].__new__(LOSSES[name])
    raised.__class__ = type(
        name, (LOSSES[name],), {"__str__": lambda _: "first\nsecond", "__module__": "ray.exceptions"}
    )

    explained = explain_loss(raised)

    assert isinstance(explained, InterruptedRunError if name != "RuntimeEnvSetupError" else ConfigError)
    assert "\n" not in str(explained)
    assert "first" in str(explained)


@pytest.mark.parametrize(
    ("name", "key"),
    [("OutOfMemoryError", "placement.batch_size"), ("ObjectStoreFullError", "placement.object_store_mb")],
)
def test_memory_that_ray_ends_work_for_is_reported_with_the_keys_that_help(name: str, key: str) -> None:
    kind = type(name, (RuntimeError,), {"__module__": "ray.exceptions"})

    assert key in str(explain_loss(kind("a node is low on memory")))


NO_FAULTS_OF_TORCH = {
    *("FatalError", "Error", "_LinAlgError"),
    *("DistError", "DistBackendError", "DistNetworkError", "DistStoreError", "QueueEmptyError"),
}
"""Errors of torch that only a use of torch that this package does not make can raise."""

OF_TORCH = {
    kind.__name__: kind
    for module in (torch, torch.cuda, torch._C)
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Exception) and kind.__module__.startswith("torch")
}


@pytest.mark.parametrize("name", sorted(set(OF_TORCH) - NO_FAULTS_OF_TORCH))
def test_every_error_of_torch_about_a_device_is_one_line_with_a_remedy(name: str) -> None:
    raised = OF_TORCH[name].__new__(OF_TORCH[name], "CUDA error: an illegal memory access\nsecond")

    explained = explain(raised)

    assert isinstance(explained, ConfigError | BrokenDeviceError)
    assert "; " in str(explained)
    assert "\n" not in str(explained)
