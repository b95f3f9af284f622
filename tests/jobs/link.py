"""A link to a server that can be cut, and that counts what goes over it."""

import socket
import ssl
import threading
from contextlib import suppress


class Link:
    """Listens on a port of its own and passes bytes on to the server, both ways."""

    def __init__(self, server_port: int, tls: ssl.SSLContext | None = None) -> None:
        self._server_port = server_port
        self._tls = tls
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._is_cut = False
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.bytes_up = 0
        self.num_connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        """End all connections and refuse others."""
        with self._lock:
            self._is_cut = True
            for each in self._open:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        """Let connections through again."""
        self._is_cut = False

    def close(self) -> None:
        """End it."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, suppress(OSError):
            if self._is_cut:
                return
            if self._tls is not None:
                near = self._tls.wrap_socket(near, server_side=True)
            with near, socket.create_connection(("127.0.0.1", self._server_port)) as far:
                with self._lock:
                    self._open |= {near, far}
                    self.num_connections += 1
                back = threading.Thread(target=self._pass, args=(far, near), daemon=True)
                back.start()
                self._pass(near, far, is_up=True)
                back.join()
                with self._lock:
                    self._open -= {near, far}

    def _pass(self, source: socket.socket, sink: socket.socket, *, is_up: bool = False) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if is_up:
                    self.bytes_up += len(data)
                sink.sendall(data)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
