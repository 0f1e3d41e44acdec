"""A pair of servers and three sentinels: the primary killed, stopped, swapped for the other."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any, Self

import redis
from waiting import until

from sessionstore._server import PrivateServer, ServerProgram

SERVICE = "agents-primary"
#: Milliseconds of silence until a server counts as away. With one second, a new primary may, to
#: which a sentinel has not yet connected.
DOWN_AFTER = 2000
#: Milliseconds between two words of a sentinel to the others. After four of them without news it
#: makes a primary that is none any more a replica, which here is to wait until the test has seen
#: who still writes to it.
OFTEN, SELDOM = 500, 10_000


@dataclass(frozen=True, slots=True)
class Locks:
    """Passwords, and TLS on a second port; the first is for the tests."""

    certificates: Path  # cert.pem, key.pem, and ca.pem, which has signed it
    password: str
    sentinel_password: str

    def tls(self, port: int) -> dict[str, str]:
        """Settings of a server or a sentinel."""
        files = {
            name: str(self.certificates / file)
            for name, file in (
                ("tls-cert-file", "cert.pem"),
                ("tls-key-file", "key.pem"),
                ("tls-ca-cert-file", "ca.pem"),
            )
        }
        switches = {"tls-auth-clients": "no", "tls-replication": "yes"}
        return {"tls-port": str(watched(port)), **files, **switches}


def watched(port: int) -> int:
    """The TLS port of what listens on a port too."""
    return port - 10_000


class _Server(PrivateServer):
    def __init__(
        self, program: ServerProgram, arguments: Sequence[str], locks: Locks | None
    ) -> None:
        self._locks = locks
        super().__init__(program, arguments)

    def command(self, port: int) -> list[str]:
        settings: dict[str, str] = {}
        if self._locks:
            password = self._locks.password
            settings = {"requirepass": password, "masterauth": password, **self._locks.tls(port)}
        pairs = chain.from_iterable((f"--{name}", value) for name, value in settings.items())
        return [*super().command(port), *pairs]


class _Sentinel(PrivateServer):
    """One sentinel, which watches a primary from its start on."""

    def __init__(
        self, program: ServerProgram, primary: int, down_after: int, locks: Locks | None
    ) -> None:
        self._lines = [
            f"sentinel monitor {SERVICE} 127.0.0.1 {primary} 2",
            f"sentinel down-after-milliseconds {SERVICE} {down_after}",
            f"sentinel failover-timeout {SERVICE} 2000",
        ]
        self._locks = locks
        super().__init__(program)

    def command(self, port: int) -> list[str]:
        config = self.directory / "sentinel.conf"  # it writes into it what it learns
        if not config.exists():
            config.write_text("\n".join([*self._lines, *self._locked(port)]) + "\n")
        address = ("--bind", "127.0.0.1", "--port", str(port), "--dir", str(self.directory))
        return [self.program.path, str(config), "--sentinel", *address]

    def _locked(self, port: int) -> list[str]:
        locks = self._locks
        if locks is None:
            return []
        return [
            f"sentinel auth-pass {SERVICE} {locks.password}",
            f"requirepass {locks.sentinel_password}",
            f"sentinel sentinel-pass {locks.sentinel_password}",
            *(f"{name} {value}" for name, value in locks.tls(port).items()),
        ]


class PrivateSentinels:
    """A primary and its replica, watched by three sentinels."""

    def __init__(
        self, program: ServerProgram, *, down_after: int = DOWN_AFTER, locks: Locks | None = None
    ) -> None:
        options = (
            *("--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0"),
            *("--appendonly", "yes", "--appendfsync", "no"),
        )
        self.locks = locks
        self._stack = ExitStack()
        self._admins: dict[PrivateServer, Any] = {}  # a plain client of each
        try:
            password, of_sentinels = (
                (locks.password, locks.sentinel_password) if locks else (None, None)
            )
            self.servers = [
                self._started(_Server(program, options, locks), password) for _ in range(2)
            ]
            first, second = self.servers
            port = self.port(first)
            self.admin(second).replicaof("127.0.0.1", port)
            self.sentinels = [
                self._started(_Sentinel(program, port, down_after, locks), of_sentinels)
                for _ in range(3)
            ]
            # One that was held up goes on at once (TILT).
            self._set_periods(ping=200, info=200, ask=200, tilt=500)
            self.wait_until_well()
        except BaseException:
            self.stop()
            raise

    def _started(self, server: PrivateServer, password: str | None) -> Any:
        self._stack.enter_context(server)
        client: Any = redis.Redis(
            port=server.port, password=password, decode_responses=True, socket_timeout=1
        )
        self._stack.callback(client.close)
        self._admins[server] = client
        return server

    def _ask(self, sentinel: PrivateServer, what: str) -> Any:
        return self.admin(sentinel).execute_command(f"SENTINEL {what}", SERVICE)

    def _set_periods(self, **periods: int) -> None:
        for sentinel, (name, period) in product(self.sentinels, periods.items()):
            with suppress(redis.RedisError):  # Redis 6.2, or a sentinel that is away
                self.admin(sentinel).execute_command("SENTINEL DEBUG", f"{name}-PERIOD", period)

    @property
    def url(self) -> str:
        addresses = ",".join(f"127.0.0.1:{self.port(one)}" for one in self.sentinels)
        return f"redis+sentinel://{addresses}/{SERVICE}"

    def port(self, server: PrivateServer) -> int:
        """Where a store, and the others, find a server or a sentinel."""
        return watched(server.port) if self.locks else server.port

    def admin(self, server: PrivateServer) -> Any:
        """A plain client of one server or sentinel."""
        return self._admins[server]

    def told(self) -> list[int]:
        """The primary's port, as each sentinel that answers has it."""
        ports: list[int] = []
        for one in self.sentinels:
            with suppress(redis.RedisError):
                ports.append(int(self._ask(one, "GET-MASTER-ADDR-BY-NAME")[1]))
        return ports

    @property
    def primary(self) -> PrivateServer:
        """The primary, as the first sentinel that answers has it."""
        port = self.told()[0]
        return next(one for one in self.servers if self.port(one) == port)

    @property
    def replica(self) -> PrivateServer:
        """The other one."""
        return next(one for one in self.servers if one is not self.primary)

    @contextmanager
    def _another_takes_over(self, publish: int = SELDOM) -> Iterator[PrivateServer]:
        """Wait until all sentinels tell of the other server; gives the old one."""
        self._set_periods(publish=publish)
        old, new = self.primary, self.replica
        yield old
        until(lambda: set(self.told()) == {self.port(new)})

    def kill_primary(self) -> PrivateServer:
        """Kill the primary, and wait until the other one has taken its place."""
        with self._another_takes_over() as old:
            old.kill()
        return old

    def stop_primary(self) -> PrivateServer:
        """Stop the primary without a word, and wait for the other one. It is to be continued."""
        with self._another_takes_over() as old:
            old.signal(signal.SIGSTOP)
        return old

    def swap(self, *how: str, publish: int = SELDOM) -> PrivateServer:
        """A planned failover: both servers are there all the time.

        ``how``: ``COORDINATED`` for one that waits for the replica, of Valkey 9.
        """
        with self._another_takes_over(publish) as old:
            until(lambda: self._has_swapped(self.port(old), how))
        return old

    def _has_swapped(self, old: int, how: Sequence[str]) -> bool:
        """Whether somebody tells of the new primary; begins, again if it was broken off."""
        if set(self.told()) != {old}:
            return True
        with suppress(redis.ResponseError):  # it is under way, or there was one just now
            self.admin(self.sentinels[0]).execute_command("SENTINEL FAILOVER", SERVICE, *how)
        time.sleep(0.1)
        return False

    def require_replicas(self, count: int) -> None:
        """Have the servers refuse writes while they have fewer replicas."""
        for one in self.servers:
            self.admin(one).config_set("min-replicas-to-write", count)

    def wait_until_well(self) -> None:
        """Until both servers are in step, and all sentinels know of both and of each other."""
        self._set_periods(publish=OFTEN)
        until(self._is_well)

    def wait_until_replicated(self) -> None:
        """Until the replica has what the primary has just now."""
        written = self.admin(self.primary).info("replication")["master_repl_offset"]
        replica = self.admin(self.replica)
        until(lambda: replica.info("replication")["slave_repl_offset"] >= written)

    def _is_well(self) -> bool:
        with suppress(redis.RedisError, IndexError):
            port, replica = self.port(self.primary), self.replica
            link = self.admin(replica).info("replication")
            master = self.admin(self.primary).info("replication")
            return (
                self.told() == [port] * len(self.sentinels)
                and (link["role"], link.get("master_port")) == ("slave", port)
                and link["master_link_status"] == "up"
                and master["role"] == "master"
                and all(self._sees_all(one, self.port(replica)) for one in self.sentinels)
            )
        return False

    def _sees_all(self, sentinel: PrivateServer, replica: int) -> bool:
        state = self._ask(sentinel, "MASTER")
        seen = [one for one in self._ask(sentinel, "SLAVES") if one["port"] == replica]
        return (
            state["flags"] == "master"
            and state["num-other-sentinels"] == len(self.sentinels) - 1
            and [one["flags"] for one in seen] == ["slave"]
        )

    def stop(self) -> None:
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
