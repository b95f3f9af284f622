"""A small S3 server over a folder, as a process of its own, for tests that stop it, fill it and lock it.

What it has of S3 is what s3fs asks for: objects, ranges, listings with a delimiter, uploads in parts, and signatures
(version 4, in headers and in URLs), which it verifies together with the checksum of what was sent. Objects are files
below ROOT/BUCKET, so they outlive it. A number in the file `quota` beside them limits their bytes.
"""

import fcntl
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
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

KEY_ID, SECRET = "test-key", "test-secret"
BUCKET = "bucket"


class S3Server:
    """Serves the buckets in a folder while it is entered; `stop` and `start` again on the same port."""

    def __init__(self, root: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        self.root = root
        self.objects = root / "objects" / BUCKET
        self.objects.mkdir(parents=True, exist_ok=True)
        self.host, self.port = host, port or _free_port(host)
        self.url = f"http://{host}:{self.port}"
        self.environment = {
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        settings = {"root": str(self.root), "host": self.host, "port": self.port}
        self._process = subprocess.Popen([sys.executable, __file__, json.dumps(settings)], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"up\n"

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def set_quota(self, num_bytes: int | None) -> None:
        """Limit the bytes of all objects together, or do so no more."""
        file = self.root / "quota"
        file.write_text(str(num_bytes)) if num_bytes is not None else file.unlink(missing_ok=True)

    def names(self, folder: str = "") -> list[str]:
        """Return the names of all objects below a folder, the oldest first."""
        root = self.objects / folder
        found = [path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")]
        return [str(path.relative_to(root)) for path in sorted(found, key=lambda path: path.stat().st_mtime_ns)]

    def requests(self) -> list[tuple[float, str, str, int]]:
        """Return (time, method, path, status) of each request so far."""
        log = self.root / "requests.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [(float(at), method, path, int(status)) for at, method, path, status in map(str.split, lines)]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def _free_port(host: str) -> int:
    with socket.socket() as free:
        free.bind((host, 0))
        return int(free.getsockname()[1])


class RefusalError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    """Answers what s3fs asks."""

    protocol_version = "HTTP/1.1"
    root: Path

    def serve(self) -> None:
        parts = urlsplit(self.path)
        self.query = dict(parse_qsl(parts.query, keep_blank_values=True))
        self.bucket, _, self.key = unquote(parts.path).lstrip("/").partition("/")
        try:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.check_signature(parts.path)
            if not self.folder.is_dir():
                raise RefusalError(404, "NoSuchBucket")
            (self.serve_object if self.key else self.serve_bucket)()
        except RefusalError as refusal:
            self.answer(refusal.status, f"<Error><Code>{refusal.code}</Code><Message>{refusal.code}</Message></Error>")
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve  # noqa: N815 - the base class looks for these

    @property
    def folder(self) -> Path:
        return self.root / "objects" / self.bucket

    @property
    def file(self) -> Path:
        return self.folder / self.key

    def check_signature(self, path: str) -> None:
        head = self.headers.get("Authorization", "")
        if not head and "X-Amz-Signature" not in self.query:
            raise RefusalError(403, "AccessDenied")
        query = {key: value for key, value in self.query.items() if key != "X-Amz-Signature"}
        if head:
            given = dict(part.strip().partition("=")[::2] for part in head.partition(" ")[2].split(","))
            date, sent = self.headers["X-Amz-Date"], self.headers["X-Amz-Content-SHA256"]
        else:
            given = {key: query[f"X-Amz-{key}"] for key in ("Credential", "SignedHeaders")}
            given["Signature"], date, sent = self.query["X-Amz-Signature"], query["X-Amz-Date"], "UNSIGNED-PAYLOAD"
        key_id, day, region, service, end = given["Credential"].split("/")
        if key_id != KEY_ID:
            raise RefusalError(403, "InvalidAccessKeyId")
        if sent != "UNSIGNED-PAYLOAD" and sent != hashlib.sha256(self.body).hexdigest():
            raise RefusalError(400, "XAmzContentSHA256Mismatch")
        names = given["SignedHeaders"].split(";")
        headers = "".join(f"{name}:{' '.join((self.headers[name] or '').split())}\n" for name in names)
        asked = "&".join(f"{quote(key, safe='')}={quote(value, safe='')}" for key, value in sorted(query.items()))
        canonical = f"{self.command}\n{path}\n{asked}\n{headers}\n{given['SignedHeaders']}\n{sent}"
        scope = f"{day}/{region}/{service}/{end}"
        text = f"AWS4-HMAC-SHA256\n{date}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
        key = f"AWS4{SECRET}".encode()
        for part in (day, region, service, end, text):
            key = hmac.digest(key, part.encode(), "sha256")
        if not hmac.compare_digest(key.hex(), given["Signature"]):
            raise RefusalError(403, "SignatureDoesNotMatch")

    def serve_bucket(self) -> None:
        if self.command == "GET":
            self.answer(200, self.listing(self.query.get("prefix", ""), self.query.get("delimiter", "")))
        elif self.command == "POST" and "delete" in self.query:
            for part in self.body.decode().split("<Key>")[1:]:
                self.remove(self.folder / part.partition("</Key>")[0])
            self.answer(200, "<DeleteResult></DeleteResult>")
        else:
            self.answer(200)

    def listing(self, prefix: str, delimiter: str) -> str:
        files, folders = [], set()
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name = str(path.relative_to(self.folder))
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix) or path.name.startswith(".part-"):
                continue
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
                continue
            stat = path.stat()
            written = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(stat.st_mtime))
            files.append(
                f"<Contents><Key>{escape(name)}</Key><Size>{stat.st_size}</Size><ETag>{stat.st_mtime_ns}</ETag>"
                f"<LastModified>{written}</LastModified></Contents>"
            )
        common = "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders)
        )
        return (
            f"<ListBucketResult><Name>{self.bucket}</Name><Prefix>{escape(prefix)}</Prefix><IsTruncated>false"
            f"</IsTruncated>{''.join(files)}{common}</ListBucketResult>"
        )

    def serve_object(self) -> None:
        if self.command == "PUT" and "partNumber" in self.query:
            self.keep(self.upload() / f"{int(self.query['partNumber']):05d}")
        elif self.command == "PUT":
            self.keep(self.file)
        elif self.command == "POST":
            self.serve_upload()
        elif self.command == "DELETE":
            self.remove(self.file)
            self.answer(204)
        else:
            self.serve_content()

    def remove(self, path: Path) -> None:
        if path.is_file():
            path.unlink()

    def serve_upload(self) -> None:
        if "uploads" in self.query:
            number = uuid.uuid4().hex
            (self.root / "uploads" / number).mkdir(parents=True)
            self.answer(
                200, f"<InitiateMultipartUploadResult><UploadId>{number}</UploadId></InitiateMultipartUploadResult>"
            )
            return
        self.body = b"".join(part.read_bytes() for part in sorted(self.upload().iterdir()))
        self.keep(self.file, "<CompleteMultipartUploadResult><ETag>whole</ETag></CompleteMultipartUploadResult>")

    def upload(self) -> Path:
        folder = self.root / "uploads" / self.query["uploadId"]
        if not folder.is_dir():
            raise RefusalError(404, "NoSuchUpload")
        return folder

    def keep(self, path: Path, text: str = "") -> None:
        with (self.root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            quota = self.root / "quota"
            if quota.exists():
                used = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
                if used + len(self.body) > int(quota.read_text()):
                    raise RefusalError(403, "QuotaExceeded")
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".part-{uuid.uuid4().hex}")
        part.write_bytes(self.body)
        part.replace(path)
        self.answer(200, text, ETag=f'"{path.stat().st_mtime_ns}"')

    def serve_content(self) -> None:
        if not self.file.is_file():
            raise RefusalError(404, "NoSuchKey")
        data, stat = self.file.read_bytes(), self.file.stat()
        extra = {"ETag": f'"{stat.st_mtime_ns}"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        status, total = 200, len(data)
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or total - 1), total - 1)
            status, data = 206, data[begin : end + 1]
            extra["Content-Range"] = f"bytes {begin}-{end}/{total}"
        self.answer(status, data, **extra)

    def answer(self, status: int, body: str | bytes = b"", **headers: str) -> None:
        data = body.encode() if isinstance(body, str) else body
        with (self.root / "requests.log").open("a") as log:  # first, as the server may be killed right after
            log.write(f"{time.time()} {self.command} {quote(urlsplit(self.path).path)} {status}\n")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing; `requests` knows."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = json.loads(sys.argv[1])
    Handler.root = Path(settings["root"])
    parent = os.getppid()
    server = ThreadingHTTPServer((settings["host"], settings["port"]), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdout.write("up\n")
    sys.stdout.flush()
    while os.getppid() == parent:
        time.sleep(0.2)


if __name__ == "__main__":
    main()
