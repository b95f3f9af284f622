"""The connection to an MLflow server: quick to notice that it is away, and then clear about it.

MLflow's own client would retry for minutes, and print addresses to stdout, where `--json` output belongs.
"""

import contextlib
import functools
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

from dabnn.data.remote import shown
from dabnn.errors import DabError, InvalidInputError
from orchestrator.home import home_path
from orchestrator.processes import without_proxies
from orchestrator.tracking_password import USER, read_password
from orchestrator.tracking_server import is_own_guarded

if TYPE_CHECKING:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

_REACH_TIMEOUT_S = 8.0  # a server on a machine that trains on all cores has taken 3 s for its first answer
_USERNAME, _PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
_NOT_ALLOWED = (http.client.UNAUTHORIZED, http.client.FORBIDDEN)
_REFUSALS = (400, 404, 409, 413)
_UNKNOWN_USER = (
    "MLflow: {uri} asks for a user and a password, and those given are not right. Set MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN), here and on the nodes of the cluster; a job takes them from "
    "its node."
)
_RETRY_DELAYS_S = (0.5, 2.0)
_NOT_REPEATED = frozenset({"create_run", "create_logged_model", "create_model_version"})
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # they would make a run twice whose answer was lost; `_insist` knows better
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",  # a server to which hundreds of trials write at once has taken 25 s
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


@contextlib.contextmanager
def connected(uri: str) -> Iterator["MlflowClient"]:
    """Give a client of a server within the block; what MLflow raises there becomes our errors.

    Raises:
        InvalidInputError: The URI is none of a server, or the server says that something asked for is wrong.
        DabError: The server does not answer, within about 8 s, or fails.
    """
    check_tracking(uri)
    client = cast("MlflowClient", _Patient(unchecked_client(uri)))
    from mlflow.exceptions import MlflowException

    try:
        yield client
    except MlflowException as error:
        if error.get_http_status_code() == http.client.UNAUTHORIZED:  # type: ignore[no-untyped-call]
            raise DabError(_UNKNOWN_USER.format(uri=uri)) from error
        kind = InvalidInputError if is_refusal(error) else DabError
        raise kind(f"MLflow: {uri} answered: {error.message}") from error
    except (OSError, http.client.HTTPException) as error:
        raise DabError(f"MLflow: the connection to {uri} broke ({error}); nothing else was lost. Try again.") from error


class _Patient:
    """A client that asks again where an answer was lost; what would make a second one is its caller's to repeat."""

    def __init__(self, client: "MlflowClient") -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)
        return call if name in _NOT_REPEATED else functools.partial(_insist, call)


def _insist(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    from mlflow.exceptions import MlflowException

    for delay_s in _RETRY_DELAYS_S:
        try:
            return call(*arguments, **named)
        except MlflowException as error:
            if is_refusal(error) or error.get_http_status_code() in _NOT_ALLOWED:  # type: ignore[no-untyped-call]
                raise
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(delay_s)
    return call(*arguments, **named)


def check_tracking(uri: str) -> None:
    """Return if a server answers.

    Raises:
        InvalidInputError: The URI is none of a server.
        DabError: Nothing answers within 8 s.
    """
    if not is_reachable(uri, timeout_s=_REACH_TIMEOUT_S):
        raise DabError(
            f"MLflow: no answer from {uri}; runs are recorded there. Check that the server runs (`dab ui` starts the "
            "one of this machine) and that tracking.uri is right."
        )


def unchecked_client(uri: str) -> "MlflowClient":
    """Return a client without asking whether the server is there."""
    os.environ.update(without_proxies(os.environ))
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    _sign_in(uri)
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def is_reachable(uri: str, *, timeout_s: float) -> bool:
    """Return whether anything answers HTTP at a server's URI.

    Raises:
        InvalidInputError: The URI is not one of a server.
    """
    if urlsplit(uri).username is not None or urlsplit(uri).password is not None:
        raise InvalidInputError(
            f"tracking.uri: {shown(uri)} holds a user or password, which would be kept in the run's records. Leave it "
            "out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, here and on the nodes of the cluster."
        )
    if urlsplit(uri).scheme not in {"http", "https"} or not urlsplit(uri).netloc:
        raise InvalidInputError(
            f"tracking.uri: {shown(uri)!r} is not the address of an MLflow server; it must begin with http:// or "
            "https://, as several processes write to it at once. null stands for a server on this machine."
        )
    os.environ.update(without_proxies(os.environ))
    try:
        with urllib.request.build_opener().open(f"{uri.rstrip('/')}/health", timeout=timeout_s):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return error.code < http.client.INTERNAL_SERVER_ERROR  # a gateway answers 502 to 504 for a server that is away
    except (OSError, http.client.HTTPException):
        return False


def _sign_in(uri: str) -> None:
    """Give MLflow's client the password of this machine's own server, and that only, unless the user gave one."""
    password = read_password(home_path())
    is_ours = password is not None and os.environ.get(_PASSWORD) == password
    if is_own_guarded(uri) and password is not None:
        os.environ.setdefault(_USERNAME, USER)
        os.environ.setdefault(_PASSWORD, password)
    elif is_ours:
        del os.environ[_PASSWORD], os.environ[_USERNAME]


def is_refusal(error: "MlflowException") -> bool:
    """Return whether the server understood a request and refuses it, so that sending it again is useless."""
    from mlflow.exceptions import RestException

    if not isinstance(error, RestException):
        return False
    # MLflow says BAD_REQUEST of its database's failures, such as no free connection; wrong input has other codes.
    is_of_database = error.error_code == "BAD_REQUEST"
    return not is_of_database and error.get_http_status_code() in _REFUSALS  # type: ignore[no-untyped-call]
