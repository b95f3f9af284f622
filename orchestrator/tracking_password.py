"""The password of this machine's MLflow server, which it asks for where other machines reach it.

Its user is `dab`, an administrator of MLflow's own basic authentication; colleagues can get users of their own there.
Jobs of the embedded cluster and `dab` on this machine find the password in its file, so it is never part of a job.
Other machines have it in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
"""

import secrets
from pathlib import Path

from orchestrator.home import write_private

USER = "dab"
PASSWORD_FILE = "tracking_password"  # noqa: S105 - a file
_CACHE_S = 60  # else each request costs one slow hash, tens of milliseconds of a core


def server_environment(folder: Path) -> dict[str, str]:
    """Return what makes `mlflow server --app-name basic-auth` ask for the password, made on the first call.

    Args:
        folder: DAB_HOME; its files `tracking_password` and `tracking_auth.ini` have mode 0600.
    """
    file = folder / PASSWORD_FILE
    if not file.exists():
        write_private(file, secrets.token_urlsafe(24))
    settings, users = folder / "tracking_auth.ini", folder / "tracking_users.db"
    users.touch(mode=0o600)
    write_private(settings, _ini(users, file.read_text(encoding="ascii").strip()))
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",  # by default a route that MLflow forgot to guard is open
    }


def read_password(folder: Path) -> str | None:
    """Return the password; None where there is none."""
    try:
        return (folder / PASSWORD_FILE).read_text(encoding="ascii").strip() or None
    except OSError:
        return None


def _ini(users: Path, password: str) -> str:
    lines = [
        "[mlflow]",
        "default_permission = NO_PERMISSIONS",
        f"database_uri = sqlite:///{users}".replace("%", "%%"),
        f"admin_username = {USER}",
        f"admin_password = {password}",
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
        f"auth_cache_ttl_seconds = {_CACHE_S}",
    ]
    return "\n".join(lines) + "\n"
