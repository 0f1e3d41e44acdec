"""A pair of servers and three sentinels: the primary killed, stopped, swapped for the other."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import product
from typing import Any, Self

import redis
from waiting import until

from sessionstore._server import PrivateServer, ServerProgram

SERVICE = "agents-primary"
#: Milliseconds of silence until a server counts as away.
DOWN_AFTER = 1000
#: Milliseconds between two words of a sentinel to the others. After four of them without news it
#: makes a primary that is none any more a replica, which here is to wait until the test has seen
#: who still writes to it.
OFTEN, SELDOM = 500, 10_000


class PrivateSentinel(PrivateServer):
    """One sentinel, which watches a primary from its start on."""

    def __init__(self, program: ServerProgram, primary: PrivateServer, down_after: int) -> None:
        self._primary, self._down_after = primary, down_after
        super().__init__(program)

    def command(self, port: int) -> list[str]:
        config = self.directory / "sentinel.conf"  # it writes into it what it learns
        if not config.exists():
            lines = [
                f"sentinel monitor {SERVICE} 127.0.0.1 {self._primary.port} 2",
                f"sentinel down-after-milliseconds {SERVICE} {self._down_after}",
                f"sentinel failover-timeout {SERVICE} 2000",
            ]
            config.write_text("\n".join(lines) + "\n")
        address = ("--bind", "127.0.0.1", "--port", str(port), "--dir", str(self.directory))
        return [self.program.path, str(config), "--sentinel", *address]


class PrivateSentinels:
    """A primary and its replica, watched by three sentinels."""

    def __init__(self, program: ServerProgram, *, down_after: int = DOWN_AFTER) -> None:
        options = (
            *("--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0"),
            *("--appendonly", "yes", "--appendfsync", "no"),
        )
        self._stack = ExitStack()
        self._admins: dict[PrivateServer, Any] = {}  # a plain client of each
        try:
            self.servers = [self._started(PrivateServer(program, options)) for _ in range(2)]
            first, second = self.servers
            self.admin(second).replicaof("127.0.0.1", first.port)
            self.sentinels = [
                self._started(PrivateSentinel(program, first, down_after)) for _ in range(3)
            ]
            # One that was held up goes on at once (TILT).
            self._set_periods(info=200, ask=200, tilt=500)
            self.wait_until_well()
        except BaseException:
            self.stop()
            raise

    def _started(self, server: PrivateServer) -> Any:
        self._stack.enter_context(server)
        client: Any = redis.Redis(port=server.port, decode_responses=True, socket_timeout=1)
        self._stack.callback(client.close)
        self._admins[server] = client
        return server

    def _set_periods(self, **periods: int) -> None:
        for sentinel, (name, period) in product(self.sentinels, periods.items()):
            with suppress(redis.RedisError):  # Redis 6.2, or a sentinel that is away
                self.admin(sentinel).execute_command("SENTINEL DEBUG", f"{name}-PERIOD", period)

    @property
    def url(self) -> str:
        return f"redis+sentinel://{','.join(self.addresses)}/{SERVICE}"

    @property
    def addresses(self) -> list[str]:
        return [f"127.0.0.1:{one.port}" for one in self.sentinels]

    def admin(self, server: PrivateServer) -> Any:
        """A plain client of one server or sentinel."""
        return self._admins[server]

    def told(self) -> list[int]:
        """The primary's port, as each sentinel that answers has it."""
        ports: list[int] = []
        for one in self.sentinels:
            with suppress(redis.RedisError):
                ports.append(int(self.admin(one).sentinel_get_master_addr_by_name(SERVICE)[1]))
        return ports

    @property
    def primary(self) -> PrivateServer:
        """The primary, as the first sentinel that answers has it."""
        port = self.told()[0]
        return next(one for one in self.servers if one.port == port)

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
        until(lambda: set(self.told()) == {new.port})

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
            until(lambda: self._has_begun_to_swap(how))
        return old

    def _has_begun_to_swap(self, how: Sequence[str]) -> bool:
        with suppress(redis.ResponseError):  # there was one just now
            self.admin(self.sentinels[0]).execute_command("SENTINEL FAILOVER", SERVICE, *how)
            return True
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
            port, replica = self.primary.port, self.replica
            link = self.admin(replica).info("replication")
            master = self.admin(self.primary).info("replication")
            return (
                self.told() == [port] * len(self.sentinels)
                and (link["role"], link.get("master_port")) == ("slave", port)
                and link["master_link_status"] == "up"
                and master["role"] == "master"
                and all(self._sees_all(one, replica.port) for one in self.sentinels)
            )
        return False

    def _sees_all(self, sentinel: PrivateServer, replica: int) -> bool:
        admin = self.admin(sentinel)
        state = admin.sentinel_master(SERVICE)
        seen = [one for one in admin.sentinel_slaves(SERVICE) if one["port"] == replica]
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
