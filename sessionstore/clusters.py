"""Redis Cluster: a cluster client of redis-py, used as a store uses a plain client.

redis-py finds the node of each script by its keys, follows MOVED and ASK, waits at TRYAGAIN, and
learns the topology anew after a failure. What it leaves is here: pipelines that span nodes and load
scripts where they are needed, failures to learn the topology told as failures of the connection,
and a first connection that is made by the first call, not before it.

While a slot is moved key by key, its keys are on two nodes. A script would meet half of them: a key
that it has not declared is refused in the middle of it, when others are written already. So on a
cluster each script has one more key, which is never there (``Keys.guard_of``): a node that lacks
one of several declared keys of a slot on the move answers TRYAGAIN before the script begins. A
partition thus waits while its slot moves, reads too, and nothing is torn. Where slots move as a
whole (atomic slot migration, Valkey 9 and Redis 8.4) the key costs nothing and changes nothing.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from itertools import islice
from typing import Any, Self, TypeAlias

import redis
import redis.asyncio
from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    ClusterError,
    ConnectionError,
    MaxConnectionsError,
    RedisClusterException,
    RedisError,
    SlotNotCoveredError,
    TimeoutError,
    TryAgainError,
)

from sessionstore import opening
from sessionstore.errors import own_copy
from sessionstore.pipelining import Words


def _of_any_client(error: Exception) -> Exception:
    """What a cluster client raises beside redis-py's usual errors, as one of these."""
    if isinstance(error, ClusterDownError):
        return error
    if isinstance(error, (ClusterError, AskError)):  # 16 times redirected, or asked to try again
        told: Exception = TryAgainError(f"the cluster moves slots: {error}")
    elif isinstance(error, SlotNotCoveredError):
        told = ClusterDownError(f"no node serves the slot: {error}")
    elif isinstance(error, RedisClusterException):  # no node in reach
        told = ConnectionError(f"the cluster: {error}")
    else:
        return error
    told.__cause__ = error
    return told


@contextmanager
def _usual_errors() -> Generator[None]:
    try:
        yield
    except (ClusterError, AskError, RedisClusterException) as error:
        raise _of_any_client(error) from error.__cause__


#: A command with the node it goes to, and its options.
_Routed: TypeAlias = tuple[Any, Words, dict[str, Any]]


class _Pipeline:
    """Commands for several nodes, sent to each in their order; no transaction.

    SCRIPT LOAD goes to each node that one of the others goes to, INFO to every primary: each has
    one reply all the same. What is redirected is sent again by itself, which is when redis-py
    learns where its slot is now; as soon as that does not help, the rest is left to the next
    attempt of the store, in its order.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._noted: list[tuple[Words, dict[str, Any]]] = []

    def execute_command(self, *words: Any, **options: Any) -> None:
        self._noted.append((words, options))

    def _routed(self) -> tuple[list[_Routed], list[int]]:
        """All with their nodes; for each that was noted, of how many its reply is made."""
        nodes = [self._node_of(words) for words, _ in self._noted]
        asked = {node.name: node for node in nodes if node is not None}
        primaries = {node.name: node for node in self._client.get_primaries()}
        if not primaries:
            raise RedisClusterException("no primary is known")
        routed: list[_Routed] = []
        counts: list[int] = []
        for (words, options), node in zip(self._noted, nodes, strict=True):
            everywhere = asked if words[0] == "SCRIPT" else primaries
            to = [node] if node is not None else list(everywhere.values())
            routed += [(one, words, options) for one in to]
            counts.append(len(to))
        self._noted.clear()
        return routed, counts

    def _node_of(self, words: Words) -> Any:
        """The node of a script, or of a word to oneself; None if it is not one node's."""
        if words[0] in ("SCRIPT", "INFO"):
            return None
        return _node_of(self._client, words[3] if words[0] in _SCRIPTS else words[1])


_SCRIPTS = ("EVALSHA", "EVAL")


def _node_of(client: Any, key: Any) -> Any:
    node = client.get_node_from_key(key)
    if node is None:
        raise SlotNotCoveredError(f"of {key!r}")
    return node


def _by_node(routed: Sequence[_Routed]) -> list[list[int]]:
    """The numbers of the commands that go to each node."""
    by_node: dict[str, list[int]] = defaultdict(list)
    for number, (node, _, _) in enumerate(routed):
        by_node[node.name].append(number)
    return list(by_node.values())


def _is_lost(reply: Any) -> bool:
    return isinstance(reply, (ConnectionError, TimeoutError))


_WELL_CONNECTED = (AuthenticationError, AuthorizationError, MaxConnectionsError)


def _is_outdated(reply: Any) -> bool:
    """Whether this failure may come of a topology that is not the cluster's any more."""
    is_away = isinstance(reply, (ConnectionError, TimeoutError, ClusterDownError))
    return is_away and not isinstance(reply, _WELL_CONNECTED)


def _is_redirected(reply: Any) -> bool:
    return isinstance(reply, (AskError, TryAgainError))


def _merged(replies: Sequence[Any], counts: Sequence[int]) -> list[Any]:
    """One reply of several nodes: a refusal if there is one, else that of the most dangerous.

    Only INFO may differ. A node that is away tells nothing.
    """
    merged: list[Any] = []
    following = iter(replies)
    for count in counts:
        if count == 1:
            reply = next(following)
            merged.append(_of_any_client(reply) if isinstance(reply, Exception) else reply)
            continue
        some = list(islice(following, count))
        some = [one for one in some if not _is_lost(one)] or some
        failed = next((one for one in some if isinstance(one, Exception)), None)
        merged.append(_of_any_client(failed) if failed else max(some, key=opening.danger))
    return merged


# ---- Blocking -----------------------------------------------------------------------------------


def _learn_topology(client: Any) -> None:
    with suppress(Exception):  # what failed before is told; this the next attempt will tell
        client.nodes_manager.initialize()


@contextmanager
def _closed_by_another_thread() -> Generator[None]:
    """redis-py 6 and 7 close the connections of all threads when they learn the topology."""
    try:
        yield
    except AttributeError as error:
        raise ConnectionError("the connection was closed by another thread") from error


class ThreadPipeline(_Pipeline):
    """A pipeline of a ``ThreadCluster``: written to all nodes, then read from all."""

    def execute(self, *, raise_on_error: bool) -> list[Any]:
        """The replies; errors are among them."""
        assert not raise_on_error
        with _usual_errors():
            try:
                routed, counts = self._routed()
            except RedisClusterException:
                _learn_topology(self._client)
                raise
            replies = self._send(routed)
            if any(map(_is_outdated, replies)):
                _learn_topology(self._client)
            for number in filter(lambda n: _is_redirected(replies[n]), range(len(replies))):
                _, words, options = routed[number]
                try:
                    replies[number] = self._client.execute_command(*words, **options)
                except (RedisError, RedisClusterException) as error:
                    replies[number] = error
                    break
            return _merged(replies, counts)

    def _send(self, routed: Sequence[_Routed]) -> list[Any]:
        replies: list[Any] = [None] * len(routed)
        with ExitStack() as stack:
            parts: list[tuple[list[int], _Part]] = []
            for numbers in _by_node(routed):
                client = self._client.get_redis_connection(routed[numbers[0]][0])
                part = _Part(client, [routed[number] for number in numbers])
                parts.append((numbers, stack.enter_context(part)))
            for numbers, part in parts:
                for number, reply in zip(numbers, part.read(), strict=True):
                    replies[number] = reply
        return replies

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._noted.clear()


class _Part:
    """What a pipeline has for one node: entering writes it. The node's failure is its alone.

    With redis-py's own pipeline all fail if one node cannot be reached, and 16 scripts take a
    quarter longer.
    """

    def __init__(self, client: Any, routed: Sequence[_Routed]) -> None:
        self._client = client
        self._sent = [(words, options) for _, words, options in routed]
        self._connection: Any = None
        self._failure: Exception | None = None
        self._is_read = False

    def __enter__(self) -> Self:
        try:
            self._connection = self._client.connection_pool.get_connection()
            packed = self._connection.pack_commands([words for words, _ in self._sent])
            with _closed_by_another_thread():
                self._connection.send_packed_command(packed)
        except (ConnectionError, TimeoutError) as error:
            self._failure = error
        except BaseException:
            self.__exit__()
            raise
        return self

    def read(self) -> list[Any]:
        """The replies, errors among them; it waits for them."""
        replies = [self._reply(words[0], options) for words, options in self._sent]
        self._is_read = self._failure is None
        return replies

    def _reply(self, command: Any, options: dict[str, Any]) -> Any:
        if self._failure is not None:
            return own_copy(self._failure)
        try:
            with _closed_by_another_thread():
                return self._client.parse_response(self._connection, command, **options)
        except (ConnectionError, TimeoutError) as error:
            self._failure = error
            return error
        except RedisError as error:
            return error

    def __exit__(self, *exc_info: object) -> None:
        if self._connection is None:
            return
        try:
            if not self._is_read:  # what is still to come would be taken for others' replies
                self._connection.disconnect()
        finally:
            self._client.connection_pool.release(self._connection)


class ThreadCluster:
    """A ``redis.RedisCluster``: the caller's, or one that the first call connects.

    ``retries``: it tries again by itself.
    """

    def __init__(
        self,
        connect: Callable[[], redis.RedisCluster],
        *,
        decodes: bool = False,
        retries: bool = False,
    ) -> None:
        self._connect = connect
        self.decodes = decodes
        self._retries = retries
        self._connecting = threading.Lock()
        self._connected: Any = None

    @property
    def _client(self) -> Any:
        if self._connected is None:
            with self._connecting, _usual_errors():
                self._connected = self._connected or self._connect()
        return self._connected

    def execute_command(self, *words: Any, **options: Any) -> Any:
        """Send one command to its node.

        A script goes there by itself: redis-py would look at each of its keys, twice. What fails
        then is not tried again, so this is not for clients that do that.
        """
        with _usual_errors():
            client = self._client
            if self._retries or words[0] not in _SCRIPTS:
                return client.execute_command(*words, **options)
            try:
                node = _node_of(client, words[3])
            except RedisClusterException:
                _learn_topology(client)
                raise
            with _Part(client.get_redis_connection(node), [(node, words, options)]) as part:
                (reply,) = part.read()
            if _is_outdated(reply):
                _learn_topology(client)
            if _is_redirected(reply):
                return client.execute_command(*words, **options)
            if isinstance(reply, Exception):
                raise reply
            return reply

    def pipeline(self, *, transaction: bool) -> ThreadPipeline:
        assert not transaction
        return ThreadPipeline(self._client)

    def publish(self, channel: str, message: str) -> Any:
        with _usual_errors():
            return self._client.publish(channel, message)

    def pubsub(self) -> Any:
        return self._client.pubsub()

    def close(self) -> None:
        if self._connected is not None:
            self._connected.close()


# ---- On an event loop ---------------------------------------------------------------------------


async def _learn_topology_async(client: Any) -> None:
    with suppress(Exception):  # as in ``_learn_topology``
        await client.nodes_manager.initialize()


@asynccontextmanager
async def _closed_meanwhile() -> AsyncGenerator[None]:
    """Another task has closed the connection that this one was about to write to.

    redis-py 8.1's client closes all of them when a node tells that the cluster is down.
    """
    try:
        yield
    except AttributeError as error:
        raise ConnectionError("the connection was closed by another task") from error


class TaskPipeline(_Pipeline):
    """A pipeline of a ``TaskCluster``: to each node by itself, so that one fails without others."""

    async def execute(self, *, raise_on_error: bool) -> list[Any]:
        """The replies; errors are among them."""
        assert not raise_on_error
        with _usual_errors():
            await self._client.initialize()  # for the topology; nothing if it is known
            try:
                routed, counts = self._routed()
            except RedisClusterException:
                await _learn_topology_async(self._client)
                raise
            replies = await self._send(routed)
            if any(map(_is_outdated, replies)):
                await _learn_topology_async(self._client)
            for number in filter(lambda n: _is_redirected(replies[n]), range(len(replies))):
                _, words, options = routed[number]
                try:
                    replies[number] = await self._client.execute_command(*words, **options)
                except (RedisError, RedisClusterException) as error:
                    replies[number] = error
                    break
            return _merged(replies, counts)

    async def _send(self, routed: Sequence[_Routed]) -> list[Any]:
        replies: list[Any] = [None] * len(routed)

        async def send_to_one(numbers: Sequence[int]) -> None:
            try:
                async with self._client.pipeline() as pipe, _closed_meanwhile():
                    for node, words, options in (routed[number] for number in numbers):
                        pipe.execute_command(*words, target_nodes=[node], **options)
                    some = await pipe.execute(raise_on_error=False, allow_redirections=False)
            except (RedisError, RedisClusterException) as error:
                some = [own_copy(error) for _ in numbers]
            for number, reply in zip(numbers, some, strict=True):
                replies[number] = reply

        await asyncio.gather(*map(send_to_one, _by_node(routed)))
        return replies

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._noted.clear()


class TaskCluster:
    """A ``redis.asyncio.RedisCluster``; it connects at its first call."""

    def __init__(self, client: redis.asyncio.RedisCluster, *, decodes: bool = False) -> None:
        self._client: Any = client
        self.decodes = decodes
        options: dict[str, Any] = client.get_connection_kwargs()
        self.max_connections = int(options["max_connections"])  # to each node

    def execute_command(self, *words: Any, **options: Any) -> Awaitable[Any]:
        return self._translated(self._client.execute_command(*words, **options))

    async def _translated(self, reply: Awaitable[Any]) -> Any:
        with _usual_errors():
            try:
                async with _closed_meanwhile():
                    return await reply
            except KeyError as error:  # redis-py's, of a slot that no node serves
                await _learn_topology_async(self._client)
                raise SlotNotCoveredError(str(error)) from error

    def pipeline(self, *, transaction: bool) -> TaskPipeline:
        assert not transaction
        return TaskPipeline(self._client)

    def publish(self, channel: str, message: str) -> Awaitable[Any]:
        return self.execute_command("PUBLISH", channel, message)

    def pubsub(self) -> Any:
        return self._client.pubsub()

    async def aclose(self) -> None:
        await self._client.aclose()
