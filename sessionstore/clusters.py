"""Redis Cluster: a cluster client of redis-py, used as a store uses a plain client.

redis-py finds the node of each script by its keys, follows MOVED and ASK, waits at TRYAGAIN, and
learns the topology anew after a failure. What it leaves is here: pipelines that span nodes and load
scripts where they are needed, failures to learn the topology told as failures of the connection,
and a first connection that is made by the first call, not before it.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import redis
import redis.asyncio
from redis.exceptions import (
    ClusterError,
    ConnectionError,
    RedisClusterException,
)

from sessionstore.pipelining import Words


@contextmanager
def _as_connection_errors() -> Generator[None]:
    """What a cluster client raises beside redis-py's usual errors, or in place of them."""
    try:
        yield
    except (ClusterError, RedisClusterException) as error:
        # redirected in a circle, no node in reach, a slot that no node serves
        raise ConnectionError(f"the cluster: {error}") from error


class _Pipeline:
    """Commands for several nodes, sent to each in their order; no transaction.

    SCRIPT LOAD goes to each node that one of the others goes to, INFO to every primary: each has
    one reply all the same.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._noted: list[tuple[Words, dict[str, Any]]] = []

    def execute_command(self, *words: Any, **options: Any) -> None:
        self._noted.append((words, options))

    def _fill(self, pipe: Any) -> list[int]:
        """Put all into redis-py's pipeline; for each command, of how many its reply is made."""
        keys = [words[3] for words, _ in self._noted if words[0] in ("EVALSHA", "EVAL")]
        asked = {node.name: node for node in map(self._node, keys)}
        primaries = {node.name: node for node in self._client.get_primaries()}
        counts: list[int] = []
        for words, options in self._noted:
            if words[0] not in ("SCRIPT", "INFO"):
                pipe.execute_command(*words, **options)
                counts.append(1)
                continue
            nodes = (asked if words[0] == "SCRIPT" else primaries).values()
            for node in nodes:
                pipe.execute_command(*words, target_nodes=[node], **options)
            counts.append(len(nodes))
        self._noted.clear()
        return counts

    def _node(self, key: str | bytes) -> Any:
        node = self._client.get_node_from_key(key)
        if node is None:
            raise RedisClusterException(f"no node serves the slot of {key!r}")
        return node


def _merged(replies: Sequence[Any], counts: Sequence[int]) -> list[Any]:
    """One reply of several nodes: an error if there is one, else what the strictest of them says.

    Only INFO tells something that may differ: the node that evicts keys is the one to look at.
    """
    merged: list[Any] = []
    at = 0
    for count in counts:
        some = replies[at : at + count]
        at += count
        failed = next((one for one in some if isinstance(one, Exception)), None)
        merged.append(failed or max(some, key=_strictness))
    return merged


def _strictness(reply: Any) -> int:
    if not isinstance(reply, dict):
        return 0
    policy = str(reply.get("maxmemory_policy", ""))  # pyright: ignore[reportUnknownMemberType]
    is_bounded = int(reply.get("maxmemory", 0)) > 0  # pyright: ignore
    return is_bounded * (1 + policy.startswith("volatile-") + 2 * policy.startswith("allkeys-"))


# ---- Blocking -----------------------------------------------------------------------------------


class ThreadPipeline(_Pipeline):
    """A pipeline of a ``ThreadCluster``."""

    def execute(self, *, raise_on_error: bool) -> list[Any]:
        """The replies; errors are among them."""
        assert not raise_on_error
        with _as_connection_errors(), self._client.pipeline() as pipe:
            counts = self._fill(pipe)
            return _merged(pipe.execute(raise_on_error=False), counts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._noted.clear()


class ThreadCluster:
    """A ``redis.RedisCluster``: the caller's, or one that the first call connects."""

    def __init__(self, connect: Callable[[], redis.RedisCluster], *, decodes: bool = False) -> None:
        self._connect = connect
        self.decodes = decodes
        self._connecting = threading.Lock()
        self._connected: Any = None

    @property
    def _client(self) -> Any:
        if self._connected is None:
            with self._connecting, _as_connection_errors():
                self._connected = self._connected or self._connect()
        return self._connected

    def execute_command(self, *words: Any, **options: Any) -> Any:
        with _as_connection_errors():
            return self._client.execute_command(*words, **options)

    def pipeline(self, *, transaction: bool) -> ThreadPipeline:
        assert not transaction
        return ThreadPipeline(self._client)

    def publish(self, channel: str, message: str) -> Any:
        with _as_connection_errors():
            return self._client.publish(channel, message)

    def pubsub(self) -> Any:
        return self._client.pubsub()

    def close(self) -> None:
        if self._connected is not None:
            self._connected.close()


# ---- On an event loop ---------------------------------------------------------------------------


class TaskPipeline(_Pipeline):
    """A pipeline of a ``TaskCluster``."""

    async def execute(self, *, raise_on_error: bool) -> list[Any]:
        """The replies; errors are among them."""
        assert not raise_on_error
        with _as_connection_errors():
            await self._client.initialize()  # for the topology; nothing if it is known
            async with self._client.pipeline() as pipe:
                counts = self._fill(pipe)
                return _merged(await pipe.execute(raise_on_error=False), counts)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._noted.clear()


class TaskCluster:
    """A ``redis.asyncio.RedisCluster``; it connects at its first call."""

    def __init__(self, client: redis.asyncio.RedisCluster, *, decodes: bool = False) -> None:
        self._client: Any = client
        self.decodes = decodes
        self.max_connections: int = client.get_connection_kwargs()["max_connections"]

    def execute_command(self, *words: Any, **options: Any) -> Awaitable[Any]:
        return self._translated(self._client.execute_command(*words, **options))

    async def _translated(self, reply: Awaitable[Any]) -> Any:
        with _as_connection_errors():
            return await reply

    def pipeline(self, *, transaction: bool) -> TaskPipeline:
        assert not transaction
        return TaskPipeline(self._client)

    def publish(self, channel: str, message: str) -> Awaitable[Any]:
        return self.execute_command("PUBLISH", channel, message)

    def pubsub(self) -> Any:
        return self._client.pubsub()

    async def aclose(self) -> None:
        await self._client.aclose()
