"""The Jobs API of a cluster: what jobs there are, their state, their logs; stopping one.

Every request has a time limit, so that a link that was cut is noticed. Leaves out what is submitted
(`orchestrator.submit`) and the checks before that (`orchestrator.reach`).
"""

import asyncio
import contextlib
import functools
import http.client
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from dabnn.errors import DabError, InvalidInputError
from orchestrator import processes
from orchestrator.cluster import find_cluster
from orchestrator.target import Target

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ENDED_JOBS = ("SUCCEEDED", "FAILED", "STOPPED")
LIVING_JOBS = ("PENDING", "RUNNING")
CONNECT_S = 1.5  # a packet that was lost is sent again after 1 s
STOP_GRACE_S = 60
_ANSWER_S = 60.0
_QUIET_S = 1.0
_RETRY_S = 2.0
_PATIENCE_S = 600.0
_END_S = 2.0 * STOP_GRACE_S
_POLL_S = 0.5
_AGAIN_S = (0.5, 1.0, 2.0)
_MAX_SILENT = 2

Value = TypeVar("Value")


@dataclass(frozen=True)
class SeenJob:
    """A job as the Jobs API shows it.

    Attributes:
        job_id: Its name.
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        submitted_at: Seconds since 1970.
        metadata: What was submitted with it.
        has_begun: Whether its program has connected to Ray; before, it may be waiting for its turn.
    """

    job_id: str
    status: str
    submitted_at: float
    metadata: dict[str, str]
    has_begun: bool


def job_client(target: Target) -> "JobSubmissionClient":
    """Return a client of the Jobs API.

    The token travels as a header of this client: Ray reads its own settings only once, when it is imported.

    Raises:
        InvalidInputError: The token is missing or wrong.
        DabError: The Jobs API does not answer.
    """
    os.environ.update(processes.without_proxies(os.environ))
    with asking(target):
        return _client(target)


def job_status(target: Target, job_id: str) -> str | None:
    """Return Ray's status of a job, or None when the cluster does not know it.

    Raises:
        DabError: The cluster does not answer.
    """
    client = job_client(target)
    try:
        with asking(target):
            return str(client.get_job_status(job_id).value)
    except _UnknownJobError:
        return None


def jobs(target: Target) -> list[SeenJob]:
    """Return the jobs that were submitted to a cluster and are known there, the oldest first.

    Raises:
        DabError: The cluster does not answer.
    """
    client = job_client(target)
    with asking(target):
        found = client.list_jobs()
    seen = [
        SeenJob(
            job.submission_id,
            str(job.status.value),
            (job.start_time or 0) / 1000,
            job.metadata or {},
            bool(job.driver_info),
        )
        for job in found
        if job.submission_id
    ]
    return sorted(seen, key=lambda job: (job.submitted_at, job.job_id))


def stop_job(target: Target, job_id: str, on_wait: Callable[[str], None] | None = None) -> None:
    """End a job and wait until it has ended: a next attempt must not meet it.

    Raises:
        DabError: The cluster does not answer, or the job did not end; Ray kills it after `STOP_GRACE_S`.
    """
    if job_status(target, job_id) is None:
        return
    client = job_client(target)
    with asking(target):
        client.stop_job(job_id)
    deadline = time.monotonic() + _END_S
    while insisting(lambda: job_status(target, job_id)) in LIVING_JOBS:
        if time.monotonic() > deadline:
            raise DabError(
                f"{target}: job {job_id} was told to end and has not within {_END_S:.0f} s. It may wait for a node "
                "that is gone: see `dab cluster status`, and try again."
            )
        if on_wait is not None:
            on_wait("waiting for the job to end")
        time.sleep(_POLL_S)


def insisting(ask: Callable[[], Value]) -> Value:
    """Return what `ask` returns; a cluster that does not answer is asked a few times more, within seconds.

    Raises:
        DabError: It does not answer.
    """
    for wait_s in _AGAIN_S:
        try:
            return ask()
        except _ConnectionLostError:
            time.sleep(wait_s)
    return ask()


def job_log(target: Target, job_id: str) -> str:
    """Return the whole log of a job.

    Raises:
        DabError: The cluster does not answer, or has no log of this job.
    """
    client = job_client(target)
    try:
        with asking(target):
            return str(client.get_job_logs(job_id))
    except _UnknownJobError:
        raise _forgotten(target, job_id) from None


def follow_job(target: Target, job_id: str, on_note: Callable[[str], None] | None = None) -> Iterator[str]:
    """Yield the log of a job as it grows, until the job has ended.

    A connection that breaks is made anew and goes on after the last character that was seen; a cluster elsewhere that
    is away is asked again for ten minutes. Where only the stream breaks, as behind a proxy that passes no WebSockets,
    the whole log is asked for every two seconds. When the embedded cluster is ended, it kills the job first: if that is
    seen, the log ends here like any other.

    Args:
        target: Where the job is.
        job_id: Its name.
        on_note: Told when the connection is lost, and when it is back.

    Raises:
        DabError: The cluster went away before the job was seen to end.
    """
    tell = on_note or (lambda _: None)
    seen, lost_at, num_silent = 0, 0.0, 0  # streams in a row that gave nothing
    while True:
        try:
            is_over = has_ended(target, job_id)
            is_asked = is_over or num_silent >= _MAX_SILENT
            num_silent += 1
            for text in [job_log(target, job_id)[seen:]] if is_asked else _tail(target, job_id, seen):
                if lost_at:
                    tell(f"{target} answers again")
                lost_at, num_silent = 0.0, num_silent if is_asked else 0
                seen += len(text)
                yield text
            if is_over:
                return
        except _ConnectionLostError as error:
            if not lost_at:
                lost_at = time.monotonic()
                tell(f"the connection is lost ({error}); the job goes on, trying again")
            if time.monotonic() - lost_at > _PATIENCE_S or (target.is_embedded and find_cluster() is None):
                raise DabError(f"{target}: it went away before job {job_id} was seen to end ({error}).") from error
        time.sleep(_RETRY_S if lost_at or num_silent else 0)


def has_ended(target: Target, job_id: str) -> bool:
    """Return whether a job has ended.

    Raises:
        DabError: The cluster does not know it any more, or does not answer.
    """
    state = job_status(target, job_id)
    if state is None:
        raise _forgotten(target, job_id)
    return state in ENDED_JOBS


class _ConnectionLostError(DabError):
    """The cluster did not answer; asking again may help."""


class _UnknownJobError(Exception):
    """The cluster answered that it knows no such job."""


def _forgotten(target: Target, job_id: str) -> DabError:
    return DabError(f"{target}: it does not know the job {job_id} any more; it was started anew since.")


def _tail(target: Target, job_id: str, skip: int) -> Iterator[str]:
    """Yield what the log holds after `skip` characters, as it grows, until the job has ended or the stream does.

    What is skipped is yielded as an empty text: the stream works.
    """
    client = job_client(target)
    with asking(target), contextlib.closing(asyncio.new_event_loop()) as loop:
        stream = client.tail_job_logs(job_id)
        reading = loop.create_task(_next(stream))
        try:
            while _is_read(loop, reading, target, job_id) and (text := reading.result()) is not None:
                reading = loop.create_task(_next(stream))
                fresh, skip = text[skip:], max(0, skip - len(text))
                yield fresh
        finally:
            loop.run_until_complete(_abandon(stream, reading))


def _is_read(loop: asyncio.AbstractEventLoop, reading: "asyncio.Task[str | None]", target: Target, job_id: str) -> bool:
    """Wait for `reading`; return whether it came before the job ended, which the stream itself says seconds later."""
    while True:
        loop.run_until_complete(asyncio.wait({reading}, timeout=_QUIET_S))
        if reading.done():
            return True
        if has_ended(target, job_id):
            return False


async def _next(stream: AsyncIterator[str]) -> str | None:
    return await anext(stream, None)


async def _abandon(stream: Any, reading: "asyncio.Task[str | None]") -> None:
    reading.cancel()
    await asyncio.wait({reading})
    reading.cancelled() or reading.exception()  # looked at, so that it is not reported as lost
    await stream.aclose()
    await asyncio.sleep(0)


@contextlib.contextmanager
def asking(target: Target) -> Iterator[None]:
    """Within the block, what goes wrong with a request to the Jobs API becomes one of our errors.

    Raises:
        InvalidInputError: The token is missing or wrong.
        DabError: The cluster does not answer, or refuses.
    """
    from aiohttp import ClientError
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        _client.cache_clear()  # the file may hold another token by now
        raise wrong_token(target) from error
    except (OSError, ClientError, http.client.HTTPException) as error:  # the errors of requests are OSErrors
        raise _ConnectionLostError(
            f"{target}: its Jobs API at {target.jobs_url or 'no address'} does not answer; see `dab cluster status`."
        ) from error
    except RuntimeError as error:  # a refusal, in the client's words
        if "status code 404" in str(error):
            raise _UnknownJobError(str(error)) from error
        raise _ConnectionLostError(f"{target}: its Jobs API fails ({error}).") from error


def wrong_token(target: Target) -> InvalidInputError:
    """Return the error for a token that is missing or not the cluster's."""
    if target.token is None:
        return InvalidInputError(
            f"token: {target} at {target.jobs_url} asks for a token, and none is known here. Copy the file "
            "~/.ray/auth_token of its head to this machine (chmod 600), then `dab cluster add NAME --address "
            f"{target.jobs_url} --token-file FILE`."
        )
    return InvalidInputError(
        f"token: {target} at {target.jobs_url} refuses the token of {target.token}. It must be the token that the "
        "cluster was started with."
    )


def headers(target: Target) -> dict[str, str]:
    """Return the header that carries the token, if there is one."""
    return {} if target.token is None else {"authorization": f"Bearer {target.token.read()}"}


@functools.lru_cache(maxsize=8)
def _client(target: Target) -> "JobSubmissionClient":
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """A client whose requests end, one way or another."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, timeout=(CONNECT_S, _ANSWER_S), **options)

    if not target.jobs_url:
        raise ConnectionError("it does not run")
    # RAY_ADDRESS and RAY_API_SERVER_ADDRESS of the environment would win over the address that is passed.
    with _environment(RAY_API_SERVER_ADDRESS=target.jobs_url):
        return Client(target.jobs_url, headers=headers(target), verify=target.verify)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
