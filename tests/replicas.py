"""A primary and its replica, without sentinels: the replica held up, and promoted by hand."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import redis
from waiting import until

from sessionstore._server import PrivateServer, ServerProgram

# A replica that asks for all there is gets it at once, not after five seconds.
AT_ONCE = ("--repl-diskless-sync-delay", "0")


class Pair:
    """Two servers; the second follows the first."""

    def __init__(self, program: ServerProgram) -> None:
        self.primary, self.replica = (PrivateServer(program, AT_ONCE) for _ in range(2))
        self.follow()

    def client(self, server: PrivateServer) -> Any:
        """A plain client of one of the two."""
        return redis.Redis(port=server.port, decode_responses=True)

    def follow(self) -> None:
        """Have the replica follow the primary, and wait until it has all."""
        with self.client(self.primary) as primary, self.client(self.replica) as replica:
            primary.replicaof("NO", "ONE")
            replica.replicaof("127.0.0.1", self.primary.port)
            for _ in range(2):  # Valkey's may answer the first as soon as it is connected
                primary.incr("followed")  # on the connection that waits
                until(lambda: primary.wait(1, 1000))
            primary.delete("followed")

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """While its replica takes nothing."""
        self.replica.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.replica.signal(signal.SIGCONT)

    def fail_over(self) -> None:
        """Kill the primary, promote the replica as it is, start the old one as its replica."""
        self.primary.kill()
        with self.client(self.replica) as promoted:
            promoted.replicaof("NO", "ONE")
        self.primary, self.replica = self.replica, self.primary
        self.replica.start()
        self.follow()

    def stop(self) -> None:
        self.primary.stop()
        self.replica.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
