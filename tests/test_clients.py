"""Clients that are handed in: any that redis-py makes, except those that would garble replies.

Runs with redis-py 6, 7 and 8 (``scripts/test-redis-versions``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import fakeredis
import fakeredis.aioredis
import pytest
import redis
import redis.asyncio
from conftest import PROGRAMS, SERVERS, Awaiting, World, on_one_server
from consistency import assert_consistent
from faults import Fault, FaultyWorld
from rawkeys import plain_client
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ConstantBackoff, ExponentialBackoff, NoBackoff
from redis.retry import Retry

from sessionstore import (
    AsyncSessionStore,
    InvalidArgumentError,
    OutcomeUnknownError,
    SessionNotFoundError,
    SessionStatusError,
    SessionStore,
)
from sessionstore._server import PrivateServer

NOBODY = "redis://127.0.0.1:1/0"


# ---- Clients, and what a store must answer on each ---------------------------------------------


class Wrapped:
    """An object around a client, as instrumentation makes them: it passes on what it has not."""

    def __init__(self, client: Any) -> None:
        self._wrapped_client = client
        self.seen = 0

    def execute_command(self, *args: Any, **options: Any) -> Any:
        self.seen += 1
        return self._wrapped_client.execute_command(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped_client, name)


class Subclass(redis.Redis):
    """A client class of the caller's own."""


class AsyncSubclass(redis.asyncio.Redis):
    """The same for asyncio."""


def _retry(style: str, backoff: Any, retries: int) -> Any:
    return (Retry if style == "sync" else AsyncRetry)(backoff, retries)


#: By name, what redis-py is told: a function of "sync" or "async".
RETRIES: dict[str, Callable[[str], dict[str, Any]]] = {
    "redis-py's own": lambda _: {},
    "never": lambda style: {"retry": _retry(style, NoBackoff(), 0)},
    "three times": lambda style: {"retry": _retry(style, ConstantBackoff(0.001), 3)},
    "with growing pauses": lambda style: {
        "retry": _retry(style, ExponentialBackoff(cap=0.01, base=0.001), 5)
    },
    "on errors too": lambda style: {
        "retry": _retry(style, NoBackoff(), 2),
        "retry_on_error": [redis.ConnectionError, redis.TimeoutError],
    },
}
OPTIONS: dict[str, dict[str, Any]] = {
    f"{'text' if text else 'bytes'}, RESP {protocol}": {
        "decode_responses": text,
        "protocol": protocol,
    }
    for text in (False, True)
    for protocol in (2, 3)
} | {
    "replacement": {"decode_responses": True, "encoding_errors": "replace"},
    "an encoding spelt otherwise": {"encoding": "UTF_8"},
}


@contextmanager
def client_of(world: World, **options: Any) -> Iterator[Any]:
    """A client of the world's style and target."""
    if world.style == "sync":
        yield world.client(**options)
        return
    client: Any
    if world.url is None:
        client = fakeredis.aioredis.FakeRedis(server=world._fake, **options)
    else:
        client = plain_client(world.url, of=redis.asyncio, **options)
    try:
        yield client
    finally:
        _blocking(world, client).aclose()


def _blocking(world: World, opened: Any) -> Any:
    """The methods of a client or a store, blocking in either style."""
    if world.style == "sync":
        return opened
    assert world.runner is not None
    return Awaiting(opened, world.runner)


def store_on(world: World, client: Any) -> Any:
    """A store of the world's namespace on that client."""
    store_class: Any = SessionStore if world.style == "sync" else AsyncSessionStore
    return _blocking(
        world, store_class(client, namespace=world.namespace, partitions=world.partitions)
    )


def settings_of(client: Any) -> dict[str, Any]:
    """What a client was told, as far as redis-py shows it."""
    pool, encoder = client.connection_pool, client.get_encoder()
    return {
        "connection": dict(pool.connection_kwargs),
        "connection class": pool.connection_class,
        "most connections": pool.max_connections,
        "retry": client.get_retry(),
        "encoder": (encoder.encoding, encoder.encoding_errors, encoder.decode_responses),
        "callbacks": dict(client.response_callbacks),
    }


def assert_answers(store: Any) -> None:
    """Every operation once, with text beyond ASCII, and what it must answer."""
    created = store.create_session("claude", "sé", "/src", "t", "m", metadata={"a": "é"})
    assert store.add_output(created.id, "é", b"\xff", "") == 3
    assert store.add_error(created.id, "e") == 1
    store.update_status(created.id, "busy", expected="active")
    with pytest.raises(SessionStatusError):
        store.update_status(created.id, "active", expected="starting")
    store.update_activity(created.id)
    store.update_metadata(created.id, {"b": "c"})
    whole = store.get_session(created.id)
    assert (whole.service_session_id, whole.status) == ("sé", "busy")
    assert whole.metadata == {"a": "é", "b": "c"}
    assert (whole.output_buffer, whole.error_buffer) == (("é", "\ufffd", ""), ("e",))
    for found in (
        store.find_session(created.id),
        store.find_session_by_service_id("sé"),
        *store.get_all_sessions(),
        *store.get_sessions_by_type("claude"),
        *store.find_sessions(task_id="t", status="busy", idle_for=0, tail=None),
        *store.iter_sessions(mcp_session_id="m", tail=None),
    ):
        assert found.model_copy(update={"read_at": whole.read_at}) == whole
    assert store.get_session(created.id, tail=0).output_total == 3
    assert store.read_output(created.id, 1).chunks == ("\ufffd", "")
    assert store.read_errors(created.id).chunks == ("e",)
    assert store.get_metrics().sessions_by_type == {"claude": 1}
    assert store.ping() is True
    assert store.find_session("missing") is None
    with pytest.raises(SessionNotFoundError):
        store.add_output("missing", "x")
    assert store.delete_session(created.id) is True
    assert store.delete_session(created.id) is False


@pytest.mark.parametrize("name", OPTIONS)
@on_one_server
def test_a_store_answers_the_same_whatever_the_clients_options(world: World, name: str) -> None:
    with client_of(world, **OPTIONS[name]) as client:
        assert_answers(store_on(world, client))
    assert_consistent(world)


@pytest.mark.parametrize("name", RETRIES)
@on_one_server
def test_a_store_answers_the_same_whatever_the_clients_retries(world: World, name: str) -> None:
    with client_of(world, **RETRIES[name](world.style)) as client:
        assert_answers(store_on(world, client))


@on_one_server
def test_a_clients_settings_are_left_as_they_are(world: World) -> None:
    retries = RETRIES["three times"](world.style)
    with client_of(world, decode_responses=True, protocol=3, **retries) as client:
        before = settings_of(client)
        store = store_on(world, client)
        assert_answers(store)
        store.close()
        assert settings_of(client) == before


@on_one_server
def test_a_client_goes_on_working_when_the_store_is_closed(world: World) -> None:
    with client_of(world) as client:
        store = store_on(world, client)
        store.get_metrics()
        connections = _blocking(world, client).execute_command("PING"), client.connection_pool
        store.close()
        again = _blocking(world, client).execute_command("PING"), client.connection_pool
        assert again == connections


@on_one_server
def test_a_client_is_neither_closed_nor_disconnected(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client_of(world) as client:
        called: list[str] = []
        for owner, names in (
            (client, ("close", "aclose")),
            (client.connection_pool, ("close", "aclose", "disconnect", "reset")),
        ):
            for name in names:
                monkeypatch.setattr(owner, name, lambda *_, n=name: called.append(n), raising=False)
        store = store_on(world, client)
        store.get_metrics()
        store.close()
        monkeypatch.undo()
        assert called == []


@on_one_server
def test_an_object_that_passes_on_to_a_client_is_accepted(world: World) -> None:
    with client_of(world) as client:
        wrapped = Wrapped(client)
        assert_answers(store_on(world, wrapped))
        assert wrapped.seen > 0


@pytest.mark.parametrize("style", ["sync", "async"])
def test_a_client_of_a_subclass_is_accepted(server: PrivateServer, style: str) -> None:
    with real_world(style, server) as world:
        client_class: Any = Subclass if style == "sync" else AsyncSubclass
        client = client_class.from_url(server.url)
        assert_answers(store_on(world, client))
        _blocking(world, client).close() if style == "sync" else _blocking(world, client).aclose()


@contextmanager
def real_world(style: str, server: PrivateServer) -> Iterator[World]:
    """A world of one style on a server."""
    with closing(World(style, server.program.name.lower(), server.url)) as world:
        yield world


@pytest.mark.parametrize("style", ["sync", "async"])
def test_a_client_that_checks_its_connections_is_accepted(
    server: PrivateServer, style: str
) -> None:
    options = {"health_check_interval": 1, "client_name": "mine", "socket_timeout": 5}
    with real_world(style, server) as world, client_of(world, **options) as client:
        assert_answers(store_on(world, client))


def _pool(style: str, name: str) -> Any:
    return getattr(redis if style == "sync" else redis.asyncio, name)


@pytest.mark.parametrize("pool_name", ["ConnectionPool", "BlockingConnectionPool"])
@pytest.mark.parametrize("style", ["sync", "async"])
def test_a_client_from_a_pool_is_accepted(
    server: PrivateServer, style: str, pool_name: str
) -> None:
    with real_world(style, server) as world:
        pool = _pool(style, pool_name).from_url(server.url, max_connections=2)
        client = _pool(style, "Redis").from_pool(pool)
        assert_answers(store_on(world, client))
        closing_method = "close" if style == "sync" else "aclose"
        getattr(_blocking(world, client), closing_method)()


@pytest.mark.parametrize("style", ["sync", "async"])
def test_clients_that_share_a_pool_are_accepted(server: PrivateServer, style: str) -> None:
    with real_world(style, server) as world:
        pool = _pool(style, "ConnectionPool").from_url(server.url)
        stores = [store_on(world, _pool(style, "Redis")(connection_pool=pool)) for _ in range(2)]
        for store in stores:
            assert_answers(store)
        stores[0].close()
        assert_answers(stores[1])
        _blocking(world, pool).disconnect()


@pytest.fixture(params=SERVERS)
def socket_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PrivateServer]:
    """Each real server in turn, with a unix socket."""
    path = tmp_path / "s"
    with PrivateServer(PROGRAMS[request.param], ("--unixsocket", str(path))) as server:
        yield server


@pytest.mark.parametrize("style", ["sync", "async"])
def test_a_client_on_a_unix_socket_is_accepted(
    socket_server: PrivateServer, tmp_path: Path, style: str
) -> None:
    with real_world(style, socket_server) as world:
        client = _pool(style, "Redis")(unix_socket_path=str(tmp_path / "s"))
        assert_answers(store_on(world, client))
        getattr(_blocking(world, client), "close" if style == "sync" else "aclose")()


@pytest.mark.parametrize("style", ["sync", "async"])
def test_a_url_of_a_unix_socket(socket_server: PrivateServer, tmp_path: Path, style: str) -> None:
    with real_world(style, socket_server) as world:
        world.url = f"unix://{tmp_path / 's'}?db=0"
        assert_answers(world.store())
        world.url = socket_server.url


# ---- Retries of the client, and replies that are lost ------------------------------------------

HIDDEN = [name for name in RETRIES if name not in ("never", "redis-py's own")]


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("style", ["sync", "async"])
def test_a_clients_hidden_retry_adds_nothing_twice(
    server: PrivateServer, style: str, name: str
) -> None:
    with closing(FaultyWorld(style, server)) as world:
        session_id = world.direct.create_session("claude", "s", "/src").id
        store = world.store_on_client(**RETRIES[name](style))
        world.proxy.plan([Fault.LOSE_REPLY, None, Fault.CUT_REPLY])

        totals = [store.add_output(session_id, line) for line in ("one", "two")]

        assert totals == [1, 2]
        assert world.direct.read_output(session_id).chunks == ("one", "two")
        assert world.proxy.injected == {Fault.LOSE_REPLY: 1, Fault.CUT_REPLY: 1}


@pytest.mark.parametrize("style", ["sync", "async"])
def test_without_retries_of_the_client_an_outcome_is_unknown_and_can_be_repeated(
    server: PrivateServer, style: str
) -> None:
    with closing(FaultyWorld(style, server)) as world:
        session_id = world.direct.create_session("claude", "s", "/src").id
        store = world.store_on_client(**RETRIES["never"](style))
        world.proxy.plan([Fault.LOSE_REPLY])

        with pytest.raises(OutcomeUnknownError) as unknown:
            store.add_output(session_id, "one")

        assert store.repeat(unknown.value) == 1
        assert world.direct.read_output(session_id).chunks == ("one",)


# ---- Clients that are refused ------------------------------------------------------------------


@pytest.fixture(params=["sync", "async"])
def refused(request: pytest.FixtureRequest) -> Callable[[Any], InvalidArgumentError]:
    """The error with which a store refuses a client."""
    store_class: Any = SessionStore if request.param == "sync" else AsyncSessionStore

    def refusal(client: Any) -> InvalidArgumentError:
        with pytest.raises(InvalidArgumentError) as caught:
            store_class(client)
        assert caught.value.argument == "client"
        return caught.value

    refusal.style = request.param  # type: ignore[attr-defined]
    return refusal


def single(style: str, url: str) -> list[Any]:
    """Clients with one connection, in all ways to make one."""
    client_class, subclass = (
        (redis.Redis, Subclass) if style == "sync" else (redis.asyncio.Redis, AsyncSubclass)
    )
    clients: list[Any] = [
        client_class.from_url(url, single_connection_client=True),
        client_class.from_url(url).client(),
        subclass.from_url(url, single_connection_client=True),
    ]
    return [*clients, Wrapped(client_class.from_url(url, single_connection_client=True))]


def test_a_client_with_a_single_connection_is_refused_and_told_why(
    server: PrivateServer, refused: Any
) -> None:
    for client in single(refused.style, server.url):
        error = refused(client)
        assert "single_connection_client" in str(error)
        assert "fork" in str(error)
        if refused.style == "sync":  # the others have not connected yet
            client.close()


def test_a_refused_client_is_left_as_it_was(server: PrivateServer) -> None:
    with redis.Redis.from_url(server.url, single_connection_client=True) as client:
        before = client.connection
        with pytest.raises(InvalidArgumentError):
            SessionStore(client)
        assert client.connection is before
        assert client.ping() is True


def test_a_single_connection_is_refused_in_memory_too() -> None:
    with (
        fakeredis.FakeRedis(single_connection_client=True) as client,
        pytest.raises(InvalidArgumentError, match="single_connection_client"),
    ):
        SessionStore(client)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "ascii"])
def test_a_client_of_another_encoding_is_refused(refused: Any, encoding: str) -> None:
    """It would store and read other bytes than everybody else who shares the sessions."""
    client_class: Any = redis.Redis if refused.style == "sync" else redis.asyncio.Redis
    client = client_class.from_url(NOBODY, encoding=encoding)
    assert "utf-8" in str(refused(client))


@pytest.mark.parametrize("style", ["sync", "async"])
def test_a_url_that_asks_for_another_encoding_gets_utf8(server: PrivateServer, style: str) -> None:
    with real_world(style, server) as world:
        world.url = f"{server.url}?encoding=latin-1"
        store = world.store()
        store.create_session("claude", "sé", "/src")
        assert store.find_session_by_service_id("sé").service_session_id == "sé"
        assert world.redis.scard(f"{world.prefix}sessions:service:sé") == 1
