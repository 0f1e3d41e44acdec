"""Sentinel: a primary whose address the sentinels tell, whoever it is just now.

redis-py's connections for Sentinel ask a pool where to connect to. Here they ask a ``Primary``, in
blocking pools as without Sentinel. It keeps the address that was told last, and asks again every
half second while connections are used. For after a planned failover, and after one that a stopped
server came back from, the old primary goes on answering until the sentinels make it a replica:
eight seconds and more, in which a client that asks only when it connects writes into what is about
to be thrown away.

So each connection looks twice at what is known: before it is used, and before it hands out an
answer, which may have taken long. One to a server that is not the primary any more is dropped, and
an answer that has come over it counts for nothing: the call is sent again, to the new primary.

Sentinels that do not answer change nothing: the address that is known stays good for connections,
old and new. Each is asked with a timeout of its own, so that all of them together, if all are
silent, take no longer than connecting to a server may.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import unquote, unquote_plus, urlsplit

import redis
import redis.asyncio
from redis.asyncio.connection import SSLConnection as TaskSSLConnection
from redis.asyncio.sentinel import SentinelManagedConnection as ManagedTaskConnection
from redis.connection import SSLConnection as ThreadSSLConnection
from redis.exceptions import AuthenticationError, ConnectionError, RedisError
from redis.sentinel import MasterNotFoundError
from redis.sentinel import SentinelManagedConnection as ManagedThreadConnection

from sessionstore import codec
from sessionstore.errors import is_transient, own_copy

#: Seconds that what was told stays good.
ASK_EVERY = 0.5
DEFAULT_PORT = 26379
URL_FORMS = "redis+sentinel://[[USER]:PASSWORD@]HOST[:PORT][,HOST[:PORT]…]/SERVICE"

_SCHEMES = {"redis+sentinel": "redis", "rediss+sentinel": "rediss"}  # and of the servers' URL
_IN_A_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_")
_OF_SENTINELS = {"sentinel_username": "username", "sentinel_password": "password"}


@dataclass(frozen=True, slots=True)
class SentinelURL:
    """What a URL says: whom to ask, for what, and how to connect to what they tell."""

    service: str
    sentinels: Sequence[tuple[str, int]]
    credentials: dict[str, str]  # for the sentinels
    server: str  # a URL of redis-py, whose host means nothing

    @property
    def addresses(self) -> list[str]:
        """Those of the sentinels, as one writes them."""
        return [joined(host, port) for host, port in self.sentinels]


def joined(host: str, port: int) -> str:
    """An address as one writes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_sentinel_url(url: object) -> bool:
    """Whether a URL names sentinels."""
    return isinstance(url, str) and url.partition("://")[0].lower() in _SCHEMES


def parsed(url: str) -> SentinelURL:
    """The parts of a URL that names sentinels.

    Raises:
        ValueError: it is not valid; the message may quote a part of the password.
    """
    scheme, _, rest = url.partition("://")
    before, _, query = rest.partition("#")[0].partition("?")
    place, _, path = before.partition("/")
    user, at, hosts = place.rpartition("@")
    service = unquote(path)
    if not service or not _IN_A_NAME.issuperset(service):  # as sentinels have them
        raise ValueError("no service")
    kept: list[str] = []
    credentials: dict[str, str] = {}
    for option in filter(None, query.split("&")):
        name, _, value = option.partition("=")
        if name in _OF_SENTINELS:
            credentials[_OF_SENTINELS[name]] = unquote_plus(value)
        else:
            kept.append(option)
    return SentinelURL(
        service,
        tuple(map(_address, hosts.split(","))),
        credentials,
        f"{_SCHEMES[scheme.lower()]}://{user}{at}localhost?{'&'.join(kept)}",
    )


def _address(host: str) -> tuple[str, int]:
    parts = urlsplit(f"//{host}")
    if not parts.hostname or parts.netloc != host:
        raise ValueError("no host")
    return parts.hostname, parts.port or DEFAULT_PORT


class Primary:
    """Where the primary of a service is, as was told last; apart from I/O.

    To redis-py's connections it is the pool that they ask.
    """

    is_master, check_connection = True, False

    def __init__(self, service_name: str, sentinels: Sequence[Any]) -> None:
        self.service_name = service_name
        self._sentinels = sentinels  # a client of each
        self._first = 0  # the one that is asked first
        self._address: tuple[str, int] | None = None
        self._asked_at = float("-inf")  # time.monotonic()
        self._failure: RedisError = MasterNotFoundError("No master found: nobody was asked")

    def is_due(self) -> bool:
        """Whether it is time to ask."""
        return time.monotonic() - self._asked_at > ASK_EVERY

    def is_elsewhere(self, connection: Any) -> bool:
        """Whether a connection's address is not that of the primary."""
        return self._address not in (None, (connection.host, connection.port))

    def known_address(self) -> tuple[str, int]:
        """Where to connect to.

        Raises:
            redis.RedisError: no sentinel has ever told; what became of asking the last one.
        """
        if self._address is None:
            raise own_copy(self._failure)
        return self._address

    def moved(self) -> ConnectionError:
        """What a call is told whose answer came from another server than the primary."""
        return ConnectionError(f"the primary of {self.service_name!r} is now {self._address}")

    def _in_turn(self) -> Iterator[tuple[int, Any]]:
        """The sentinels, first the one that has told last."""
        first = self._first
        for number in range(len(self._sentinels)):
            number = (first + number) % len(self._sentinels)
            yield number, self._sentinels[number]
        self._asked_at = time.monotonic()  # nobody knows anything else

    def _question(self) -> tuple[str, ...]:
        return ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service_name)

    def _is_told(self, number: int, reply: Any) -> bool:
        if reply is None:
            self._failure = MasterNotFoundError(
                f"No master found: this sentinel knows no service {self.service_name!r}"
            )
            return False
        host, port = codec.texts(reply)
        self._first, self._address = number, (host, int(port))
        self._asked_at = time.monotonic()
        return True

    def _is_not_told(self, error: RedisError) -> None:
        if is_transient(error):
            error = MasterNotFoundError(f"No master found: no sentinel answers: {error}")
        elif isinstance(error, AuthenticationError):
            error = AuthenticationError(f"a sentinel refuses: {error}")
        self._failure = error


def _options_of_sentinels(url: SentinelURL, of_servers: dict[str, Any]) -> dict[str, Any]:
    """How to connect to the sentinels, given how to connect to the servers.

    One may take a timeout to connect and another one to answer.
    """
    timeout = of_servers["socket_connect_timeout"] / len(url.sentinels) / 2
    return {
        **{name: value for name, value in of_servers.items() if name.startswith("ssl_")},
        **url.credentials,
        "ssl": url.server.startswith("rediss:"),
        "retry": of_servers["retry"],
        "protocol": of_servers["protocol"],
        "socket_connect_timeout": timeout,
        "socket_timeout": timeout,
    }


def _clients(kind: Any, url: SentinelURL, pool: Any) -> list[Any]:
    options = _options_of_sentinels(url, pool.connection_kwargs)
    return [kind(host=host, port=port, **options) for host, port in url.sentinels]


def _watch(pool: Any, primary: Primary, connection_class: Any) -> None:
    """Have a pool connect to the primary, instead of to one address."""
    pool.connection_class = connection_class
    pool.connection_kwargs.pop("host", None)
    pool.connection_kwargs.pop("port", None)
    pool.connection_kwargs["connection_pool"] = primary


# ---- Blocking -----------------------------------------------------------------------------------


class ThreadPrimary(Primary):
    """The primary, asked for by blocking."""

    def ask(self) -> None:
        """Have the sentinels tell, the first that can."""
        for number, sentinel in self._in_turn():
            try:
                if self._is_told(number, sentinel.execute_command(*self._question())):
                    return
            except RedisError as error:
                self._is_not_told(error)

    def get_master_address(self) -> tuple[str, int]:
        return self.known_address()

    def close(self) -> None:
        for sentinel in self._sentinels:
            sentinel.close()


class ThreadConnection(ManagedThreadConnection):
    """A connection to the primary, as long as it is one."""

    connection_pool: ThreadPrimary

    def connect(self) -> None:
        """Connect, unless it is connected already to where the primary is."""
        primary = self.connection_pool
        if primary.is_due():
            primary.ask()
        if primary.is_elsewhere(self):
            cast("Any", self).disconnect()
        cast("Any", super()).connect()

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """An answer of the primary.

        Raises:
            redis.ConnectionError: this server is not the primary any more.
        """
        reply = cast("Any", super()).read_response(*args, **kwargs)
        self._look()
        return reply

    def can_read(self, *args: Any, **kwargs: Any) -> bool:
        """Whether there is something to be read; so a subscription waits."""
        found: bool = super().can_read(*args, **kwargs)
        self._look()
        return found

    def _look(self) -> None:
        primary = self.connection_pool
        if primary.is_due():
            primary.ask()
        if primary.is_elsewhere(self):
            cast("Any", self).disconnect()
            raise primary.moved()


class ThreadTLSConnection(ThreadConnection, ThreadSSLConnection):
    """The same over TLS."""


class ThreadClient(redis.Redis):
    """A client of the primary."""

    primary: ThreadPrimary

    def close(self) -> None:
        super().close()
        self.primary.close()


def thread_client(url: SentinelURL, pool: Any) -> ThreadClient:
    """A client whose pool, made for a server at one address, follows the primary instead."""
    is_tls = issubclass(pool.connection_class, ThreadSSLConnection)
    primary = ThreadPrimary(url.service, _clients(redis.Redis, url, pool))
    _watch(pool, primary, ThreadTLSConnection if is_tls else ThreadConnection)
    client: ThreadClient = cast("Any", ThreadClient).from_pool(pool)
    client.primary = primary
    return client


# ---- On an event loop ---------------------------------------------------------------------------


class TaskPrimary(Primary):
    """The primary, asked for by awaiting."""

    async def ask(self) -> None:
        """Have the sentinels tell, the first that can."""
        for number, sentinel in self._in_turn():
            try:
                if self._is_told(number, await sentinel.execute_command(*self._question())):
                    return
            except RedisError as error:
                self._is_not_told(error)

    async def get_master_address(self) -> tuple[str, int]:
        return self.known_address()

    async def aclose(self) -> None:
        for sentinel in self._sentinels:
            await sentinel.aclose()


class TaskConnection(ManagedTaskConnection):
    """A connection to the primary; see ``ThreadConnection``."""

    connection_pool: TaskPrimary

    async def connect(self) -> None:
        """Connect, unless it is connected already to where the primary is."""
        primary = self.connection_pool
        if primary.is_due():
            await primary.ask()
        if primary.is_elsewhere(self):
            await self.disconnect()
        await cast("Any", super()).connect()

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """An answer of the primary, or nothing after a while; see ``ThreadConnection``."""
        reply = await cast("Any", super()).read_response(*args, **kwargs)
        primary = self.connection_pool
        if primary.is_due():
            await primary.ask()
        if primary.is_elsewhere(self):
            await self.disconnect()
            raise primary.moved()
        return reply


class TaskTLSConnection(TaskConnection, TaskSSLConnection):
    """The same over TLS."""


class TaskClient(redis.asyncio.Redis):
    """A client of the primary."""

    primary: TaskPrimary

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        await self.primary.aclose()


def task_client(url: SentinelURL, pool: Any) -> TaskClient:
    """The same for asyncio."""
    is_tls = issubclass(pool.connection_class, TaskSSLConnection)
    primary = TaskPrimary(url.service, _clients(redis.asyncio.Redis, url, pool))
    _watch(pool, primary, TaskTLSConnection if is_tls else TaskConnection)
    client: TaskClient = cast("Any", TaskClient).from_pool(pool)
    client.primary = primary
    return client
