"""A door before a server that loses answers, or lets nothing in."""

import http.client
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit


class Gate(ThreadingHTTPServer):
    """Passes requests on; those whose path ends in `lossy_path` reach the server, and their answers are lost.

    Attributes:
        num_to_lose: How many more answers are lost.
        num_lost: How many were.
        is_open: Whether requests are passed on; otherwise connections are cut.
    """

    daemon_threads = True
    lossy_path = "/runs/log-batch"

    def __init__(self, behind: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = urlsplit(behind).netloc
        self.num_to_lose = self.num_lost = 0
        self.is_open = True

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Gate

    def do_GET(self) -> None:
        self._pass_on()

    def do_POST(self) -> None:
        self._pass_on()

    def do_PUT(self) -> None:
        self._pass_on()

    def log_message(self, *_: object) -> None:
        pass

    def _pass_on(self) -> None:
        self.close_connection = True
        if not self.server.is_open:
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        connection = http.client.HTTPConnection(self.server.behind, timeout=30)
        headers = dict(self.headers.items()) | {"Connection": "close"}
        connection.request(self.command, self.path, body=body, headers=headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if self.path.endswith(self.server.lossy_path) and self.server.num_to_lose:
            self.server.num_to_lose -= 1
            self.server.num_lost += 1
            return
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers.get("Content-Type", "text/plain"))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def gate(behind: str) -> Iterator[Gate]:
    """A gate before the server `behind` within the block."""
    with Gate(behind) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
