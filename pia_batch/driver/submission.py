"""Runs as jobs of a Ray cluster: submit one, find those there are, follow, stop, and tell how one ended.

The job is `pia-batch run` on the head node. Its config travels as a file, with manifest and output inside, so that no
URI stands in what the dashboard shows; credentials do not travel at all.
"""

from __future__ import annotations

import getpass
import hashlib
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

import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobErrorType, JobStatus, JobSubmissionClient

from pia_batch import __version__
from pia_batch.config import RunConfig
from pia_batch.driver import ray_cluster
from pia_batch.driver.job_log import FollowedLog
from pia_batch.errors import ConfigError, InterruptedRunError, LeaseHeldError, message_of
from pia_batch.storage.uris import redacted_uri

log = logging.getLogger(__name__)

LOST_S = 120.0
"""Seconds without an answer after which waiting for a job ends. The job may go on."""

_POLL_S = 1.0
_STOP_MARGIN_S = 15
"""Seconds over `limits.stop_grace_s` that a stopped driver gets before Ray kills it: to start up, and to shut down."""

_CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging")
"""Loggers of Ray that tell of every upload and of every connection."""

_VERSION = "pia_batch_version"
"""The metadata by which a job is known as ours."""


@dataclass(frozen=True)
class Work:
    """What a job is to do.

    Attributes:
        config: the run's config, with its templates. Its local paths are taken to be those of the cluster's nodes.
        output: of this run, filled in; of a backfill, the template.
        manifest: as `output`.
        run_date: that of the run, or the dates of a backfill; a job of another date is no double.
        arguments: what else `pia-batch run` gets, such as `("--retry-failed",)`.
        package: a folder that holds the package `pia_batch`, to be sent along; None: the nodes have it installed.
        name: of the config, for whoever looks at the job.
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
        """Equal for equal work: of the whole config, output included, and of the date."""
        told = json.dumps([self.config.model_dump(mode="json"), self.output, self.run_date], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Job:
    """One of our jobs, as the cluster tells of it.

    Attributes:
        id: its submission id.
        status: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        exit_code: the driver's own; None: it runs, was stopped, or never began.
        error_type: Ray's name for what befell a job that failed, such as RUNTIME_ENV_SETUP_FAILURE.
        message: Ray's word on it.
        started_at, ended_at: UTC.
        output, manifest: without credentials.
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
        """Whether nothing more will come of it."""
        return bool(JobStatus(self.status).is_terminal())

    @property
    def seconds(self) -> float | None:
        """From its start to its end, or until now."""
        return ((self.ended_at or datetime.now(UTC)) - self.started_at).total_seconds() if self.started_at else None

    @property
    def attempt(self) -> int:
        """1 for the first job of this work on this cluster."""
        return int(self.id.rpartition("-")[2])

    def result(self) -> int:
        """The exit code of the run, once it is over; 128 + n where signal n ended the driver, as shells tell it.

        Raises:
            InterruptedRunError: it was stopped, or lost: submit again to resume.
            ConfigError: the driver could not be started for what its environment asks.
        """
        if self.exit_code is not None:
            return self.exit_code if self.exit_code >= 0 else 128 - self.exit_code
        if self.status == JobStatus.STOPPED:
            msg = f"job {self.id} was stopped; what was finished is committed. Submit it again to resume"
            raise InterruptedRunError(msg)
        if self.error_type == JobErrorType.RUNTIME_ENV_SETUP_FAILURE:
            msg = f"job {self.id} could not be started: {message_of(RuntimeError(self.message))}"
            raise ConfigError(msg)
        msg = f"job {self.id} was lost: {message_of(RuntimeError(self.message))}; submit it again to resume"
        raise InterruptedRunError(msg)


class _NoAnswerError(ConfigError):
    """Nobody answers at the cluster's address, perhaps only for now."""


class _UnknownJobError(ConfigError):
    """The cluster does not know the job."""


class Jobs:
    """The jobs of one cluster, through its dashboard.

    Args:
        address: of the dashboard, such as `http://head:8265`.

    Raises:
        ConfigError: from here and from every method: nobody answers, or the cluster refuses our token.
    """

    def __init__(self, address: str) -> None:
        if not re.match(r"https?://[^/]", address):
            msg = f"--address {redacted_uri(address)}: expected the dashboard's address, such as http://head:8265"
            raise ConfigError(msg)
        self.address = address.rstrip("/")
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        found = ray_cluster.authentication(self.address)
        headers = {"Authorization": f"Bearer {_token()}"} if found == "token" else None
        with self._asked(), _over_the_environment(self.address):
            self._client = JobSubmissionClient(self.address, headers=headers)

    def ours(self) -> list[Job]:
        """Every job that this module has submitted there, the newest first."""
        with self._asked():
            found = self._client.list_jobs()
        jobs = [_job(details) for details in found if details.submission_id and _VERSION in (details.metadata or {})]
        return sorted(jobs, key=lambda job: (job.started_at is None, job.started_at, job.attempt), reverse=True)

    def find(self, job_id: str) -> Job:
        """One of `ours`."""
        with self._asked(job_id):
            details = self._client.get_job_info(job_id)
        if _VERSION not in (details.metadata or {}):
            msg = f"job {job_id} is none of pia-batch; `ray job` knows it"
            raise ConfigError(msg)
        return _job(details)

    def submit(self, work: Work) -> Job:
        """Submit a job, unless one for the same output and date is there that is not over.

        A run that queues for its output (`limits.lease_wait_s`) may be submitted beside another one for it.

        Raises:
            LeaseHeldError: there is one; the message names it.
            ConfigError: the config wants authentication and the cluster has none; or `work.package` holds no package.
        """
        ray_cluster.check_authentication(self.address, required=work.config.placement.require_auth)
        output, queues = redacted_uri(work.output), work.config.limits.lease_wait_s > 0
        before = self.ours()
        for job in before:
            same = job.key == work.key or (not queues and (job.output, job.run_date) == (output, work.run_date))
            if same and not job.is_over:
                raise LeaseHeldError(_double(job.id, job.status, output))
        attempt = max((job.attempt for job in before if job.key == work.key), default=0) + 1
        job_id = f"pia-batch-{work.key}-{attempt}"
        with tempfile.TemporaryDirectory(prefix="pia-batch-") as folder:
            config = pack(work, Path(folder))
            command = ["python3", "-m", "pia_batch.cli", "run", config, *work.arguments]
            with self._asked():
                try:
                    self._client.submit_job(
                        entrypoint=f"exec {shlex.join(command)}",  # no shell in between that a stop would end first
                        submission_id=job_id,
                        runtime_env={"working_dir": folder, "env_vars": environment(work.config)},
                        metadata=_metadata(work, output),
                    )
                except RuntimeError as err:
                    if "already exists" in str(err):  # another submitter was faster
                        raise LeaseHeldError(_double(job_id, "there", output)) from None
                    raise
        return self.find(job_id)

    def stop(self, job_id: str) -> Job:
        """Ask a job to stop: it commits what is in flight, and ends. Nothing happens to one that is over."""
        job = self.find(job_id)
        if not job.is_over:
            with self._asked(job_id):
                self._client.stop_job(job_id)
        return job

    def wait(
        self, job_id: str, *, show: Callable[[str], None] | None = None, leave: threading.Event | None = None
    ) -> Job:
        """The job once it is over, or as it is when `leave` is set.

        Args:
            job_id: one of `ours`.
            show: gets the job's log in pieces, from the beginning, as it grows; None: nobody.
            leave: ends the waiting, not the job.

        Raises:
            InterruptedRunError: no answer for LOST_S seconds, or the cluster has forgotten the job.
        """
        leave = leave or threading.Event()
        self.find(job_id)  # a job that never was is another mistake than one that is no more
        told = FollowedLog(self._client, job_id, show) if show is not None else None
        heard_at = time.monotonic()
        while True:
            try:
                job = self.find(job_id)
                heard_at = time.monotonic()
                if job.is_over or leave.is_set():
                    break
            except _UnknownJobError:
                msg = f"{self.address} does not know job {job_id} any more: was it started anew? Submit again to resume"
                raise InterruptedRunError(msg) from None
            except _NoAnswerError as err:
                if leave.is_set() or time.monotonic() - heard_at > LOST_S:
                    msg = f"{err}; job {job_id} may go on there"
                    raise InterruptedRunError(msg) from None
            leave.wait(_POLL_S)
        if told is not None and job.is_over:
            told.finish()
        return job

    @contextmanager
    def _asked(self, job_id: str = "") -> Iterator[None]:
        """What a question to the cluster can end with, in words for the operator."""
        try:
            yield
        except AuthenticationError as err:
            what = "no token" if "required" in str(err) else "a token that is not its own"
            msg = f"the Ray cluster at {redacted_uri(self.address)} got {what}: {ray_cluster.NO_TOKEN}"
            raise ConfigError(msg) from None
        except OSError:  # what `requests` raises is one too
            msg = f"no Ray dashboard answers at {redacted_uri(self.address)}; correct --address, or start the cluster"
            raise _NoAnswerError(msg) from None
        except RuntimeError as err:
            if job_id and "status code 404" in str(err):
                msg = f"no job {job_id} at {redacted_uri(self.address)}; `pia-batch jobs` lists those there are"
                raise _UnknownJobError(msg) from None
            msg = f"the Ray cluster at {redacted_uri(self.address)} refused: {message_of(err)}"
            raise ConfigError(msg) from None


def pack(work: Work, folder: Path) -> str:
    """Put what the job needs into a folder; the name of the config there."""
    if work.package is not None:
        source = work.package / "pia_batch"
        if not (source / "__init__.py").is_file():
            msg = f"--package {work.package}: there is no package pia_batch in it; name a clone of the project"
            raise ConfigError(msg)
        shutil.copytree(source, folder / "pia_batch", ignore=shutil.ignore_patterns("__pycache__"))
    name = f"{work.name}.yaml"
    (folder / name).write_text(yaml.safe_dump(work.config.model_dump(mode="json", exclude_unset=True), sort_keys=False))
    return name


def environment(config: RunConfig) -> dict[str, str]:
    """Variables of the job: its supervisor would kill a stopped driver after 3 s otherwise."""
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(config.limits.stop_grace_s) + _STOP_MARGIN_S)}


def _metadata(work: Work, output: str) -> dict[str, str]:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    told = {_VERSION: __version__, "output": output, "manifest": redacted_uri(work.manifest), "user": user}
    return told | {"key": work.key} | ({"run_date": work.run_date} if work.run_date else {})


def _job(details: JobDetails) -> Job:
    told = details.metadata or {}
    return Job(
        id=str(details.submission_id),
        status=str(details.status.value),
        exit_code=details.driver_exit_code,
        error_type=details.error_type or "",
        message=details.message or "",
        started_at=_time(details.start_time),
        ended_at=_time(details.end_time),
        output=told.get("output", ""),
        manifest=told.get("manifest", ""),
        run_date=told.get("run_date"),
        user=told.get("user", ""),
        version=told.get(_VERSION, ""),
        key=told.get("key", ""),
    )


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None


def _double(job_id: str, status: str, output: str) -> str:
    return f"job {job_id} is {status} for {output} already; `pia-batch jobs --follow {job_id}` shows it, --stop ends it"


def _token() -> str:
    """The token as Ray finds it.

    Raises:
        ConfigError: there is none.
    """
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        token = ""
    if not token:
        msg = f"the Ray cluster asks for a token, and there is none: {ray_cluster.NO_TOKEN}"
        raise ConfigError(msg)
    return token


@contextmanager
def _over_the_environment(address: str) -> Iterator[None]:
    """Ray takes RAY_ADDRESS over what it is told, and RAY_API_SERVER_ADDRESS over both."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
