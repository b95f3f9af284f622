"""A small HTTP server with byte ranges, as a process of its own, which can be told to misbehave.

Under the name of a file, a list of actions is used up request by request: a status such as "503", "cut N" to close the
connection after N bytes, "garbage" for wrong bytes, "slow N" for N bytes at first and the rest after a second. The last
action repeats when it ends in "*". With a secret key it takes signed requests only, as S3 does (signature version 4).
"""

import hashlib
import hmac
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, quote, unquote, urlsplit

KEY_ID = "test-key"


class RangeServer:
    """Serves a folder while it is entered; `stop` and `start` again on the same port, as often as wanted."""

    def __init__(
        self,
        root: Path,
        scratch: Path,
        actions: Mapping[str, Sequence[str]] | None = None,
        *,
        has_ranges: bool = True,
        secret: str = "",
    ) -> None:
        self.log = scratch / "requests.log"
        self.actions = {name: list(found) for name, found in (actions or {}).items()}
        self._settings = {
            "root": str(root),
            "log": str(self.log),
            "has_ranges": has_ranges,
            "secret": secret,
        }
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, __file__, json.dumps(self._settings | {"port": self.port, "actions": self.actions})]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"up\n"

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def requests(self, ending: str = "") -> list[tuple[str, int]]:
        """Return the name of the file and the first byte asked for, of each request so far."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        found = [(line.split()[0], int(line.split()[1])) for line in lines]
        return [(name, start) for name, start in found if name.endswith(ending)]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def is_signed(path: str, host: str, secret: str) -> bool:
    """Return whether a presigned URL bears the signature that belongs to the secret key."""
    parts = urlsplit(path)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    given = query.pop("X-Amz-Signature", "")
    key_id, date, region, service, end = query.get("X-Amz-Credential", "////").split("/")
    if key_id != KEY_ID:
        return False
    canonical_query = "&".join(f"{quote(k, safe='')}={quote(v, safe='')}" for k, v in sorted(query.items()))
    canonical = f"GET\n{parts.path}\n{canonical_query}\nhost:{host}\n\nhost\nUNSIGNED-PAYLOAD"
    scope = f"{date}/{region}/{service}/{end}"
    text = f"AWS4-HMAC-SHA256\n{query['X-Amz-Date']}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = f"AWS4{secret}".encode()
    for part in (date, region, service, end, text):
        key = hmac.digest(key, part.encode(), "sha256")
    return hmac.compare_digest(key.hex(), given)


class Handler(BaseHTTPRequestHandler):
    """Answers GET."""

    protocol_version = "HTTP/1.1"
    settings: dict[str, Any]
    lock = threading.Lock()

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/")
        given = self.headers.get("Range") or "bytes=0-"
        start = int(given.removeprefix("bytes=").partition("-")[0])
        with self.lock, Path(self.settings["log"]).open("a") as log:
            log.write(f"{name} {start}\n")
        action = self.action(name.rpartition("/")[2])
        file = Path(self.settings["root"]) / name
        if self.settings["secret"] and not is_signed(self.path, self.headers["Host"], self.settings["secret"]):
            self.refuse(403, "SignatureDoesNotMatch")
        elif action.isdecimal():
            self.refuse(int(action), "Told")
        elif not file.is_file():
            self.refuse(404, "NoSuchKey")
        else:
            self.answer(file.read_bytes(), start, action)

    def action(self, name: str) -> str:
        with self.lock:
            left = self.settings["actions"].get(name, [])
            if not left:
                return ""
            return left[0].rstrip("*") if left[0].endswith("*") else left.pop(0)

    def refuse(self, status: int, code: str) -> None:
        body = f"<Error><Code>{code}</Code></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self, data: bytes, start: int, action: str) -> None:
        kind, _, number = action.partition(" ")
        if kind == "garbage":
            data = bytes(len(data))
        is_partial = self.settings["has_ranges"] and "Range" in self.headers
        sent = data[start:] if is_partial else data
        self.send_response(206 if is_partial else 200)
        if is_partial:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        if kind == "cut":
            self.wfile.write(sent[: int(number)])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if kind == "slow":
            self.wfile.write(sent[: int(number)])
            self.wfile.flush()
            time.sleep(1)
            sent = sent[int(number) :]
        self.wfile.write(sent)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing; `requests` knows."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Handler.settings = json.loads(sys.argv[1])
    parent = os.getppid()
    server = ThreadingHTTPServer(("127.0.0.1", Handler.settings["port"]), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write("up\n")
    sys.stdout.flush()
    while os.getppid() == parent:
        time.sleep(0.2)


if __name__ == "__main__":
    main()
