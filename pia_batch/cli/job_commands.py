"""`submit` and `jobs`: runs on a Ray cluster, from a machine that is none of its nodes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pia_batch import errors
from pia_batch.cli.console import err, out, print_json
from pia_batch.cli.flags import RunFlags, with_flags
from pia_batch.cli.options import AsJson, RetryFailed
from pia_batch.cli.signals import first_signal

if TYPE_CHECKING:
    from pia_batch.driver.submission import Job, Jobs, JobSpec

Address = Annotated[
    str | None,
    typer.Option(
        envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"], help="the dashboard's, such as http://head:8265; as `ray job`"
    ),
]


@with_flags
def submit(
    flags: RunFlags,
    *,
    address: Address = None,
    retry_failed: RetryFailed = False,
    package: Annotated[
        Path | None, typer.Option(help="a clone of the project to send along; by default the nodes have it installed")
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="leave with 0 once the job is submitted, and print its id")
    ] = False,
    follow: Annotated[bool, typer.Option(help="show the job's log while waiting")] = True,
    stop_on_interrupt: Annotated[
        bool, typer.Option("--stop-on-interrupt", help="Ctrl-C and SIGTERM stop the job too, and wait for its end")
    ] = False,
) -> None:
    """Submit a run to a Ray cluster, follow it, and leave with its exit code. Takes everything that `run` takes.

    While a job for the same output and date is pending or running, nothing is submitted: exit code 75. Ctrl-C and
    SIGTERM leave the job alone: exit code 4.

    Example: `pia-batch submit nightly.yaml --address http://head:8265 --output s3://bucket/out`
    """
    from pia_batch.driver.submission import Jobs

    spec = _job_spec(flags, package, retry_failed=retry_failed)
    jobs = Jobs(_known(address))
    job = jobs.submit(spec)
    err.print(f"submitted {job.id} to {_shown(jobs)}", soft_wrap=True, markup=False)
    if no_wait:
        out.print(job.id)
        return
    raise typer.Exit(_wait(jobs, job.id, follow=follow, stop_on_interrupt=stop_on_interrupt))


def jobs(
    address: Address = None,
    follow: Annotated[str | None, typer.Option("--follow", help="show the log of this job, to its end")] = None,
    stop: Annotated[str | None, typer.Option("--stop", help="let this job commit what is in flight, and end")] = None,
    as_json: AsJson = False,
) -> None:
    """List the jobs that `submit` has made, the newest first; or follow one, or stop one.

    `--follow` leaves with the job's exit code, as `submit` does.

    Example: `pia-batch jobs --address http://head:8265 --stop pia-batch-0f3a9c41d27e-1`
    """
    from pia_batch.driver.submission import Jobs

    there = Jobs(_known(address))
    if stop is not None:
        _stop(there, stop)
        return
    if follow is not None:
        raise typer.Exit(_wait(there, follow))
    if as_json:
        print_json({"jobs": [_told(job) for job in there.ours()]})
        return
    out.print(f"{'job':26} {'status':9} {'exit':>4} {'started (UTC)':16} {'seconds':>8}  output")
    for job in there.ours():
        exit_code = "" if job.exit_code is None else job.exit_code
        started = f"{job.started_at:%Y-%m-%d %H:%M}" if job.started_at else ""
        line = f"{job.id:26} {job.status:9} {exit_code:>4} {started:16} {job.seconds or 0:>8.0f}  {job.output}"
        out.print(line, soft_wrap=True, markup=False)


def _job_spec(flags: RunFlags, package: Path | None, *, retry_failed: bool) -> JobSpec:
    """What `run` would do with these flags, as work for a cluster. The run date is the one of now."""
    from pia_batch.driver.submission import JobSpec

    config = flags.load({})
    # Local paths relative to this folder are no others on the head node.
    uris = {name: _absolute(uri) for name, uri in (("manifest", config.manifest), ("output", config.output))}
    config = config.model_copy(update=uris)
    arguments = {
        "--retry-failed": retry_failed,
        "--json": flags.as_json,
        f"--backfill={flags.backfill}": flags.backfill,
    }
    filled = config if flags.backfill else config.filled()
    return JobSpec(
        config=config.model_copy(update={"run_date": filled.run_date}),
        arguments=tuple(argument for argument, wanted in arguments.items() if wanted),
        output=filled.output,
        manifest=filled.manifest,
        run_date=flags.backfill or filled.run_date,
        package=package,
        name=flags.config.stem if flags.config else "config",
    )


def _absolute(uri: str) -> str:
    return uri if "://" in uri or uri.startswith("file:") else str(Path(uri).absolute())


def _wait(jobs: Jobs, job_id: str, *, follow: bool = True, stop_on_interrupt: bool = False) -> int:
    """The exit code of a job, once it is over."""
    show = (lambda text: out.print(text, end="", soft_wrap=True, markup=False)) if follow else None
    with first_signal() as leave:
        job = jobs.wait(job_id, show=show, leave=leave)
        if not job.is_over and stop_on_interrupt:
            err.print(f"stopping {job_id}; once more to leave at once", markup=False)
            leave.clear()
            jobs.stop(job_id)
            job = jobs.wait(job_id, leave=leave)
    if not job.is_over:
        msg = f"left job {job_id}, which goes on: `pia-batch jobs --follow {job_id}` shows it, --stop ends it"
        raise errors.InterruptedRunError(msg)
    err.print(f"{job.id} {job.status}", markup=False)
    return job.result()


def _stop(jobs: Jobs, job_id: str) -> None:
    if jobs.stop(job_id).is_over:
        out.print(f"{job_id} is over already", markup=False)
        return
    with first_signal() as leave:
        job = jobs.wait(job_id, leave=leave)
    out.print(f"{job.id} {job.status}" if job.is_over else f"{job.id} is about to stop", markup=False)


def _known(address: str | None) -> str:
    if address is None:
        raise errors.ConfigError("no cluster is named; give --address, or set RAY_ADDRESS, such as http://head:8265")
    return address


def _shown(jobs: Jobs) -> str:
    from pia_batch.storage.uris import redacted_uri

    return redacted_uri(jobs.address)


def _told(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "status": job.status,
        "exit_code": job.exit_code,
        "started_at": job.started_at.isoformat() if job.started_at else None,
        "ended_at": job.ended_at.isoformat() if job.ended_at else None,
        "seconds": job.seconds,
        "output": job.output,
        "manifest": job.manifest,
        "run_date": job.run_date,
        "user": job.user,
        "version": job.version,
    }
