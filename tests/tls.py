"""TLS: certificates of every kind, and a front that ends TLS before a plain server.

Any server can stand behind the front, those too that are built without TLS.
"""

from __future__ import annotations

import datetime
import select
import socket
import ssl
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

import trustme

HOST = "localhost"
_PAST = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


class Certificates:
    """A CA, another one that nobody trusts, and what they have issued, as files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.authority, self._other = trustme.CA(), trustme.CA()
        self.ca = self._written("ca.pem", self.authority.cert_pem)
        self.other_ca = self._written("other-ca.pem", self._other.cert_pem)
        self.good = self.issued("good")
        self.of_another_name = self._of("name", self.authority.issue_cert("elsewhere.test"))
        self.expired = self._of(
            "expired",
            self.authority.issue_cert(
                HOST, "127.0.0.1", not_before=_PAST - datetime.timedelta(1), not_after=_PAST
            ),
        )
        self.of_another_ca = self._of("other", self._other.issue_cert(HOST, "127.0.0.1"))

    def issued(self, name: str) -> Path:
        """Another certificate with its key, of the CA, for this host."""
        return self._of(name, self.authority.issue_cert(HOST, "127.0.0.1"))

    def _of(self, name: str, issued: trustme.LeafCert) -> Path:
        path = self._directory / f"{name}.pem"
        issued.private_key_and_cert_chain_pem.write_to_path(str(path))
        return path

    def _written(self, name: str, blob: trustme.Blob) -> Path:
        path = self._directory / name
        blob.write_to_path(str(path))
        return path


class Front:
    """Takes TLS connections and passes them on, as plain text, to a server's port.

    ``certificate`` is looked up for each connection; with ``clients`` it demands a certificate of
    that CA from who connects. ``taken`` counts connections, whatever became of them.
    """

    def __init__(self, port: int, certificate: Path, clients: Path | None = None) -> None:
        self.certificate, self._clients, self._target = certificate, clients, port
        self.taken = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, **options: object) -> str:
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"rediss://{HOST}:{self.port}/0?{query}"

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                taken, _ = self._listening.accept()
                self.taken += 1
                threading.Thread(target=self._serve, args=(taken,), daemon=True).start()

    def _serve(self, taken: socket.socket) -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.certificate)
        if self._clients is not None:
            context.load_verify_locations(self._clients)
            context.verify_mode = ssl.CERT_REQUIRED
        self._open.add(taken)
        with suppress(OSError), taken:
            taken.settimeout(10)
            with (
                context.wrap_socket(taken, server_side=True) as client,
                socket.create_connection(("127.0.0.1", self._target)) as server,
            ):
                self._open.add(client)
                _pass_on(client, server)

    def cut(self) -> None:
        """End every connection."""
        while self._open:
            with suppress(OSError):
                self._open.pop().shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.cut()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _pass_on(client: ssl.SSLSocket, server: socket.socket) -> None:
    """Both ways by one thread: an SSLSocket is not for two at a time."""
    client.settimeout(0.0)
    server.settimeout(0.0)
    while True:
        if not client.pending():
            select.select([client, server], [], [], 60)
        for source, target in ((client, server), (server, client)):
            try:
                data = source.recv(65536)
            except (ssl.SSLWantReadError, BlockingIOError):
                continue
            if not data:
                return
            _send(target, data)


def _send(target: socket.socket, data: bytes) -> None:
    while data:
        try:
            data = data[target.send(data) :]
        except (ssl.SSLWantWriteError, BlockingIOError):
            select.select([], [target], [], 10)
