"""Commands `submit` and `jobs`, for runs on a Ray cluster from a machine outside of it."""

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
        envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
        help="URL of the dashboard, such as http://head:8265, as for `ray job`.",
    ),
]


@with_flags
def submit(
    flags: RunFlags,
    *,
    address: Address = None,
    retry_failed: RetryFailed = False,
    package: Annotated[
        Path | None,
        typer.Option(help="Clone of the project to send with the job; default: the nodes have it installed."),
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Print the job's id once it is submitted, and exit with 0.")
    ] = False,
    follow: Annotated[bool, typer.Option(help="Show the job's log while waiting.")] = True,
    stop_on_interrupt: Annotated[
        bool, typer.Option("--stop-on-interrupt", help="Stop the job too on Ctrl-C and SIGTERM, and wait for its end.")
    ] = False,
) -> None:
    """Submit a run to a Ray cluster, follow it, and exit with its exit code. Takes all options of `run`.

    Nothing is submitted while a job for the same output and date is pending or running (exit code 75). Ctrl-C and
    SIGTERM do not stop the job (exit code 4).

    Example: `pia-batch submit nightly.yaml --address http://head:8265 --output s3://bucket/out`
    """
    from pia_batch.driver.submission import Jobs

    spec = _job_spec(flags, package, retry_failed=retry_failed)
    jobs = Jobs(_required_address(address))
    job = jobs.submit(spec)
    err.print(f"submitted {job.id} to {_shown(jobs)}", soft_wrap=True, markup=False)
    if no_wait:
        out.print(job.id)
        return
    raise typer.Exit(_wait(jobs, job.id, follow=follow, stop_on_interrupt=stop_on_interrupt))


def jobs(
    address: Address = None,
    follow: Annotated[
        str | None, typer.Option("--follow", help="Show the log of this job until its end; exit with its exit code.")
    ] = None,
    stop: Annotated[
        str | None, typer.Option("--stop", help="Let this job commit its requests in flight, and stop it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the jobs that `submit` has started, the newest first; or follow one, or stop one.

    Example: `pia-batch jobs --address http://head:8265 --stop pia-batch-0f3a9c41d27e-1`
    """
    from pia_batch.driver.submission import Jobs

    there = Jobs(_required_address(address))
    if stop is not None:
        _stop(there, stop)
        return
    if follow is not None:
        raise typer.Exit(_wait(there, follow))
    if as_json:
        print_json({"jobs": [_job_payload(job) for job in there.ours()]})
        return
    out.print(f"{'job':26} {'status':9} {'exit':>4} {'started (UTC)':16} {'seconds':>8}  output")
    for job in there.ours():
        exit_code = "" if job.exit_code is None else job.exit_code
        started = f"{job.started_at:%Y-%m-%d %H:%M}" if job.started_at else ""
        line = f"{job.id:26} {job.status:9} {exit_code:>4} {started:16} {job.seconds or 0:>8.0f}  {job.output}"
        out.print(line, soft_wrap=True, markup=False)


def _job_spec(flags: RunFlags, package: Path | None, *, retry_failed: bool) -> JobSpec:
    """Return the job that does what `run` would do with these flags; the run date is fixed now."""
    from pia_batch.driver.submission import JobSpec

    config = flags.load({})
    # Relative paths refer to this folder, not to the working folder on the head node.
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
    """Wait until a job is over, and return its exit code."""
    with first_signal() as leave:

        def show(text: str) -> None:
            out.print(text, end="", soft_wrap=True, markup=False)
            if out.is_abandoned and not stop_on_interrupt:
                leave.set()

        job = jobs.wait(job_id, show=show if follow else None, leave=leave)
        if not job.is_over and stop_on_interrupt:
            err.print(f"stopping {job_id}; send the signal again to exit at once", markup=False)
            leave.clear()
            jobs.stop(job_id)
            job = jobs.wait(job_id, leave=leave)
    if not job.is_over:
        msg = f"job {job_id} continues; `pia-batch jobs --follow {job_id}` shows it, --stop ends it"
        raise errors.InterruptedRunError(msg)
    err.print(f"{job.id} {job.status}", markup=False)
    return job.result()


def _stop(jobs: Jobs, job_id: str) -> None:
    if jobs.stop(job_id).is_over:
        out.print(f"{job_id} is already over", markup=False)
        return
    with first_signal() as leave:
        job = jobs.wait(job_id, leave=leave)
    out.print(f"{job.id} {job.status}" if job.is_over else f"{job.id} is stopping", markup=False)


def _required_address(address: str | None) -> str:
    if address is None:
        raise errors.ConfigError("no cluster is named; give --address, or set RAY_ADDRESS, such as http://head:8265")
    return address


def _shown(jobs: Jobs) -> str:
    from pia_batch.storage.uris import redacted_uri

    return redacted_uri(jobs.address)


def _job_payload(job: Job) -> dict[str, Any]:
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
