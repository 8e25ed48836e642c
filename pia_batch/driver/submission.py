"""Job submission: submits runs as jobs of a Ray cluster, lists, follows and stops them, and returns their exit codes.

The job is `pia-batch run` on the head node. Its config is sent as a file with manifest and output inside, so that the
dashboard shows no URI; credentials are never sent.
"""

from __future__ import annotations

import getpass
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobErrorType, JobStatus, JobSubmissionClient

from pia_batch import __version__
from pia_batch.config import RunConfig, yaml_text
from pia_batch.driver.authentication import (
    SILENCE_S,
    TOKEN_REMEDY,
    authentication,
    check_authentication,
    is_silent,
    token,
)
from pia_batch.driver.job_log import FollowedLog
from pia_batch.errors import ConfigError, InterruptedRunError, LeaseHeldError, message_of
from pia_batch.storage.retries import retry
from pia_batch.storage.uris import redacted_uri

log = logging.getLogger(__name__)

LOST_S = 120.0
"""Seconds without an answer after which waiting for a job ends. The job itself may continue."""

AGENT_WAIT_S = 60.0
"""Seconds for which a submission is repeated while the cluster has no job agent yet, as just after its start."""

_POLL_S = 1.0
_STOP_MARGIN_S = 15
"""Seconds that a stopped driver gets, in addition to `limits.stop_grace_s`, before Ray kills it: for its start-up and
its shutdown."""

_NOISY_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers of Ray that report every upload and every connection."""

_NO_AGENT = ("No available agent", "Cannot connect to host")
"""Texts of Ray's answer while the job agent of the head node has not started, or has just ended."""

_NO_PROGRAM = 127
"""Exit code of a shell that finds no such program."""

_NO_MODULE = re.compile(r"No module named '?([\w.]+)'?\)?\s*$")
"""End of the log of a Python that could not import the driver."""

_HEAD_REMEDY = (
    "install pia-batch in the environment of Ray there, and start Ray with that environment activated, so that "
    "`python3` is its Python"
)

_VERSION = "pia_batch_version"
"""Key of the metadata that marks a job as one of this package."""


@dataclass(frozen=True)
class JobSpec:
    """Specification of a job.

    Attributes:
        config: Config of the run, with its templates. Local paths in it are paths on the cluster's nodes.
        output: URI of the output, with its templates filled in; for a backfill, the template.
        manifest: URI of the manifest, as for `output`.
        run_date: Date of the run, or the dates of a backfill; a job for another date is not a duplicate.
        arguments: Further arguments of `pia-batch run`, such as `("--retry-failed",)`.
        package: Folder that contains the package `pia_batch`, which is sent with the job; None: the nodes have it
            installed.
        name: Name of the config, for people who look at the job.
    """

    config: RunConfig
    output: str
    manifest: str
    run_date: str | None = None
    arguments: tuple[str, ...] = ()
    package: Path | None = None
    name: str = "config"

    @property
    def key(self) -> str:
        """Hash over the whole config, the output and the date; equal for equal jobs."""
        content = json.dumps([self.config.model_dump(mode="json"), self.output, self.run_date], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Job:
    """Job of this package, as the cluster reports it.

    Attributes:
        id: Submission id.
        status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        exit_code: Exit code of the driver; None: it runs, was stopped, or never began.
        error_type: Ray's name for the cause of a failure, such as RUNTIME_ENV_SETUP_FAILURE.
        message: Ray's description of the cause.
        started_at: Start of the job, UTC.
        ended_at: End of the job, UTC.
        output: URI of the output, without credentials.
        manifest: URI of the manifest, without credentials.
        run_date: Date of the run, or the dates of a backfill.
        user: Name of the user who submitted the job.
        version: Version of this package that submitted the job.
        key: Key of its `JobSpec`.
    """

    id: str
    status: str
    exit_code: int | None
    error_type: str
    message: str
    started_at: datetime | None
    ended_at: datetime | None
    output: str
    manifest: str
    run_date: str | None
    user: str
    version: str
    key: str

    @property
    def is_over(self) -> bool:
        """True once the job has ended."""
        return bool(JobStatus(self.status).is_terminal())

    @property
    def seconds(self) -> float | None:
        """Seconds from its start to its end, or until now."""
        return ((self.ended_at or datetime.now(UTC)) - self.started_at).total_seconds() if self.started_at else None

    @property
    def attempt(self) -> int:
        """Number of this job among the jobs with the same key on this cluster, from 1."""
        return int(self.id.rpartition("-")[2])

    def result(self) -> int:
        """Return the exit code of the run once the job is over; 128 + n if signal n ended the driver, as in shells.

        Raises:
            InterruptedRunError: The job was stopped, or lost: submit it again to resume.
            ConfigError: The driver could not be started in its runtime environment, or in the head node's Python.
        """
        if self.exit_code is not None:
            if missing := _missing_on_head(self):
                raise ConfigError(f"job {self.id}: {missing}")
            return self.exit_code if self.exit_code >= 0 else 128 - self.exit_code
        if self.status == JobStatus.STOPPED:
            msg = f"job {self.id} was stopped; everything finished is committed. Submit it again to resume"
            raise InterruptedRunError(msg)
        if self.error_type == JobErrorType.RUNTIME_ENV_SETUP_FAILURE:
            msg = f"job {self.id} could not be started: {message_of(RuntimeError(self.message))}"
            raise ConfigError(msg)
        msg = f"job {self.id} was lost: {message_of(RuntimeError(self.message))}; submit it again to resume"
        raise InterruptedRunError(msg)


class _NoAnswerError(ConfigError):
    """Nothing answers at the cluster's address, perhaps only temporarily."""


class _UnknownJobError(ConfigError):
    """Error for a job that the cluster does not know."""


class Jobs:
    """Jobs of one cluster, through its dashboard.

    Args:
        address: Address of the dashboard, such as `http://head:8265`.

    Raises:
        ConfigError: Nothing answers, or the cluster refuses our token. Every method may raise it too.
    """

    def __init__(self, address: str) -> None:
        if not re.match(r"https?://[^/]", address):
            msg = (
                f"--address: not the address of a dashboard (got {redacted_uri(address)}, expected an http or https "
                "URL such as http://head:8265)"
            )
            raise ConfigError(msg)
        self.address = address.rstrip("/")
        for name in _NOISY_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        found = authentication(self.address)
        if found == "unknown" and is_silent(self.address):
            raise _NoAnswerError(
                f"a program listens at {redacted_uri(self.address)}, and does not answer within {SILENCE_S:g} s; "
                "correct --address, or start the cluster again"
            )
        headers = {"Authorization": f"Bearer {token()}"} if found == "token" else None
        with self._operator_errors(), _address_in_environment(self.address):
            self._client = JobSubmissionClient(self.address, headers=headers)

    def ours(self) -> list[Job]:
        """Return every job that this package has submitted to the cluster, the newest first."""
        with self._operator_errors():
            found = self._client.list_jobs()
        jobs = [_job(details) for details in found if details.submission_id and _VERSION in (details.metadata or {})]
        return sorted(jobs, key=lambda job: (job.started_at is None, job.started_at, job.attempt), reverse=True)

    def find(self, job_id: str) -> Job:
        """Return one of `ours`."""
        with self._operator_errors(job_id):
            details = self._client.get_job_info(job_id)
        if _VERSION not in (details.metadata or {}):
            msg = f"job {job_id}: not submitted by pia-batch; manage it with `ray job`"
            raise ConfigError(msg)
        return _job(details)

    def submit(self, spec: JobSpec) -> Job:
        """Submit a job, unless a job for the same output and date is pending or running.

        A run that waits for its output (`limits.lease_wait_s`) may be submitted in addition to such a job.

        Raises:
            LeaseHeldError: There is such a job; the message names it.
            ConfigError: The config requires authentication and the cluster has none; or `spec.package` does not contain
                the package; or the cluster has had no agent to start a job for AGENT_WAIT_S seconds.
        """
        check_authentication(self.address, required=spec.config.placement.require_auth)
        output, waits = redacted_uri(spec.output), spec.config.limits.lease_wait_s > 0
        existing = self.ours()
        for job in existing:
            is_duplicate = job.key == spec.key or (not waits and (job.output, job.run_date) == (output, spec.run_date))
            if is_duplicate and not job.is_over:
                raise LeaseHeldError(_duplicate_message(job.id, job.status, output))
        attempt = max((job.attempt for job in existing if job.key == spec.key), default=0) + 1
        job_id = f"pia-batch-{spec.key}-{attempt}"
        with tempfile.TemporaryDirectory(prefix="pia-batch-") as folder:
            config = pack(spec, Path(folder))
            command = ["python3", "-m", "pia_batch.cli", "run", config, *spec.arguments]
            self._send(
                entrypoint=f"exec {shlex.join(command)}",  # no shell in between, which a stop would end first
                submission_id=job_id,
                runtime_env={"working_dir": folder, "env_vars": environment(spec.config)},
                metadata=_metadata(spec, output),
            )
        return self.find(job_id)

    def stop(self, job_id: str) -> Job:
        """Ask a job to commit its requests in flight and to end; do nothing if it is over."""
        job = self.find(job_id)
        if not job.is_over:
            with self._operator_errors(job_id):
                self._client.stop_job(job_id)
        return job

    def wait(
        self, job_id: str, *, show: Callable[[str], None] | None = None, leave: threading.Event | None = None
    ) -> Job:
        """Wait until a job is over or `leave` is set, and return the job as it is then.

        Args:
            job_id: Id of one of `ours`.
            show: Function that gets the job's log in pieces, from its beginning, as it grows; None: do not read it.
            leave: Event that ends the waiting, but not the job.

        Raises:
            InterruptedRunError: The cluster has not answered for LOST_S seconds, or has forgotten the job.
        """
        leave = leave or threading.Event()
        self.find(job_id)  # a job that never existed is another error than one that the cluster forgets
        job_log = FollowedLog(self._client, job_id, show) if show is not None else None
        answered_at = time.monotonic()
        while True:
            try:
                job = self.find(job_id)
                answered_at = time.monotonic()
                if job.is_over or leave.is_set():
                    break
            except _UnknownJobError:
                msg = (
                    f"{self.address} no longer knows job {job_id}, perhaps because it was restarted. Submit again to "
                    "resume"
                )
                raise InterruptedRunError(msg) from None
            except _NoAnswerError as err:
                if leave.is_set() or time.monotonic() - answered_at > LOST_S:
                    msg = f"{err}; job {job_id} may continue there"
                    raise InterruptedRunError(msg) from None
            leave.wait(_POLL_S)
        if job_log is not None and job.is_over:
            job_log.finish()
        return job

    def _send(self, *, submission_id: str, metadata: dict[str, str], **job: Any) -> None:
        """Send a job, again after a moment while the cluster has no agent that could start it."""
        was_repeated = False

        def send() -> None:
            try:
                self._client.submit_job(submission_id=submission_id, metadata=metadata, **job)
            except RuntimeError as err:
                if "already exists" not in str(err):
                    raise
                if not was_repeated:  # otherwise Ray had started the job, and its answer came too late
                    raise LeaseHeldError(_duplicate_message(submission_id, "there", metadata["output"])) from None

        def note_repetition(_attempt: int, _err: Exception) -> None:
            nonlocal was_repeated
            was_repeated = True

        with self._operator_errors():
            try:
                retry(
                    send,
                    is_transient=_has_no_agent,
                    pauses_s=itertools.repeat(_POLL_S),
                    deadline=time.monotonic() + AGENT_WAIT_S,
                    on_retry=note_repetition,
                )
            except RuntimeError as err:
                if not _has_no_agent(err):
                    raise
                msg = (
                    f"the Ray cluster at {redacted_uri(self.address)} has had no agent to start a job for "
                    f"{AGENT_WAIT_S:.0f} s; see dashboard_agent.log on its head node, and submit again"
                )
                raise ConfigError(msg) from None

    @contextmanager
    def _operator_errors(self, job_id: str = "") -> Iterator[None]:
        """Turn the errors of a request to the cluster into errors with a remedy."""
        try:
            yield
        except AuthenticationError as err:
            if "couldn't find an authentication token" in str(err):  # Ray looks before it asks the cluster
                msg = f"RAY_AUTH_MODE is token, and no token is set: {TOKEN_REMEDY}; or unset RAY_AUTH_MODE"
                raise ConfigError(msg) from None
            problem = "no token was sent" if "required" in str(err) else "the token that was sent is another cluster's"
            msg = f"the Ray cluster at {redacted_uri(self.address)} refused: {problem}; {TOKEN_REMEDY}"
            raise ConfigError(msg) from None
        except OSError:  # includes the errors of `requests`
            msg = f"no Ray dashboard answers at {redacted_uri(self.address)}; correct --address, or start the cluster"
            raise _NoAnswerError(msg) from None
        except RuntimeError as err:
            if job_id and "status code 404" in str(err):
                msg = f"no job {job_id} at {redacted_uri(self.address)}; `pia-batch jobs` lists the jobs"
                raise _UnknownJobError(msg) from None
            msg = f"the Ray cluster at {redacted_uri(self.address)} refused: {message_of(err)}"
            raise ConfigError(msg) from None


def _has_no_agent(err: Exception) -> bool:
    return isinstance(err, RuntimeError) and any(sign in str(err) for sign in _NO_AGENT)


def pack(spec: JobSpec, folder: Path) -> str:
    """Write the files that the job needs into a folder, and return the name of its config file."""
    if spec.package is not None:
        source = spec.package / "pia_batch"
        if not (source / "__init__.py").is_file():
            msg = f"--package {spec.package}: the folder does not contain pia_batch; name a clone of the project"
            raise ConfigError(msg)
        shutil.copytree(source, folder / "pia_batch", ignore=shutil.ignore_patterns("__pycache__"))
    name = f"{spec.name}.yaml"
    (folder / name).write_text(yaml_text.dump(spec.config.model_dump(mode="json", exclude_unset=True)))
    return name


def environment(config: RunConfig) -> dict[str, str]:
    """Return the job's environment variables; without them its supervisor kills a stopped driver after 3 s."""
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(config.limits.stop_grace_s) + _STOP_MARGIN_S)}


def _metadata(spec: JobSpec, output: str) -> dict[str, str]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    metadata = {_VERSION: __version__, "output": output, "manifest": redacted_uri(spec.manifest), "user": user}
    return metadata | {"key": spec.key} | ({"run_date": spec.run_date} if spec.run_date else {})


def _job(details: JobDetails) -> Job:
    metadata = details.metadata or {}
    return Job(
        id=str(details.submission_id),
        status=str(details.status.value),
        exit_code=details.driver_exit_code,
        error_type=details.error_type or "",
        message=details.message or "",
        started_at=_time(details.start_time),
        ended_at=_time(details.end_time),
        output=metadata.get("output", ""),
        manifest=metadata.get("manifest", ""),
        run_date=metadata.get("run_date"),
        user=metadata.get("user", ""),
        version=metadata.get(_VERSION, ""),
        key=metadata.get("key", ""),
    )


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None


def _missing_on_head(job: Job) -> str | None:
    """Return what the head node lacks, and the remedy, where the driver could not even be started there."""
    if job.exit_code == _NO_PROGRAM:
        return f"the head node has no `python3` on the PATH of its Ray; {_HEAD_REMEDY}"
    found = _NO_MODULE.search(job.message) if job.exit_code == 1 else None
    if found is None:
        return None
    return f"`python3` on the head node has no module {found[1]}; {_HEAD_REMEDY}"


def _duplicate_message(job_id: str, status: str, output: str) -> str:
    return f"job {job_id} for {output} is already {status}; `pia-batch jobs --follow {job_id}` shows it, --stop ends it"


@contextmanager
def _address_in_environment(address: str) -> Iterator[None]:
    """Set RAY_API_SERVER_ADDRESS: Ray prefers RAY_ADDRESS to its argument, and this variable to both."""
    name = "RAY_API_SERVER_ADDRESS"
    previous = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        if previous is None:
            del os.environ[name]
        else:
            os.environ[name] = previous
