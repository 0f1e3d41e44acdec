"""NOREPLICAS: a server that is told to take nothing without a replica (``min-replicas-to-write``).

It says so at a script's first write, so nothing of it has happened. It passes by itself: a call is
tried again within its deadline.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from conftest import STYLES, World
from test_contract_batch import batch_of
from test_lua_contracts import NEW_ID, WRITES, Table

from sessionstore import OutcomeUnknownError, SessionStore, SessionStoreError
from sessionstore._server import PrivateServer
from sessionstore.errors import NoReplicasError, is_transient, of_any_server, surely_not_run


@contextmanager
def no_replica(client: Any) -> Iterator[None]:
    """While the server takes no writes."""
    client.config_set("min-replicas-to-write", 1)
    try:
        yield
    finally:
        client.config_set("min-replicas-to-write", 0)


@pytest.fixture(params=STYLES)
def world(
    request: pytest.FixtureRequest, server: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    if "name" in request.fixturenames:
        monkeypatch.setattr("sessionstore.operations.new_session_id", lambda *_: NEW_ID)
    opened = World(request.param, server.program.name.lower(), server.url)
    yield opened
    opened.close()


def changed(table: Table, act: Callable[[Any, str], Any]) -> bool:
    """Whether a write that is refused has changed anything, its lane included."""
    before = table.contents()
    with no_replica(table.raw), pytest.raises(NoReplicasError):
        act(table.store, table.id)
    return table.contents() != before


@pytest.mark.parametrize("world", ["sync"], indirect=True)
@pytest.mark.parametrize("name", WRITES)
def test_a_write_without_replicas_changes_nothing(
    world: World, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = WRITES[name]
    table = Table(world, write.prepare)
    assert table.changed_keys(write.act)  # when all is well

    monkeypatch.setattr("sessionstore.attempts.ATTEMPTS_SHARE", 0)  # no second attempt
    assert not changed(table, write.act)
    table.forget_leases()


@pytest.mark.parametrize("world", ["sync"], indirect=True)
def test_separate_commands_are_found_to_have_changed_something(world: World) -> None:
    """The same look at the keys, at what is no script, when the replica is lost in between."""
    table = Table(world, lambda *_: None)

    def create(_: Any, own: str) -> None:
        table.raw.config_set("min-replicas-to-write", 0)
        table.raw.hset(world.session(f"{own}1"), "status", "active")
        table.raw.config_set("min-replicas-to-write", 1)
        try:
            table.raw.sadd(f"{world.prefix}sessions:status:active", f"{own}1")
        except redis.ResponseError as error:
            raise of_any_server(error) from error

    assert changed(table, create)


def test_a_call_waits_for_replicas_to_come_back(world: World) -> None:
    store = world.store()
    session_id = store.create_session("claude", "service", "/src").id
    raw = world.client()
    with no_replica(raw):
        assert store.get_session(session_id).output_total == 0  # a read goes on
        coming_back = threading.Timer(0.3, raw.config_set, ("min-replicas-to-write", 0))
        coming_back.start()
        assert store.add_output(session_id, "line") == 1
        coming_back.join()
    assert store.get_session(session_id).output_buffer == ("line",)


def test_a_batch_waits_too_and_keeps_its_order(world: World) -> None:
    store = world.store()
    session_id = store.create_session("claude", "service", "/src").id
    raw = world.client()
    with no_replica(raw):
        coming_back = threading.Timer(0.3, raw.config_set, ("min-replicas-to-write", 0))
        coming_back.start()
        with batch_of(world, store) as batch:
            added = [batch.add_output(session_id, str(n)) for n in range(5)]
        coming_back.join()
    assert [one.result() for one in added] == [1, 2, 3, 4, 5]


def test_at_the_deadline_it_is_known_that_nothing_was_done(world: World) -> None:
    store = world.store(deadline=0.5)
    session_id = store.create_session("claude", "service", "/src").id
    with no_replica(world.client()):
        with pytest.raises(NoReplicasError) as told:
            store.add_output(session_id, "line")
        with batch_of(world, store) as batch:
            added = batch.add_output(session_id, "line")
    assert isinstance(told.value, redis.ResponseError)
    assert not isinstance(told.value, SessionStoreError)
    assert isinstance(added.error, NoReplicasError)
    assert store.get_session(session_id).output_total == 0


@pytest.mark.parametrize("world", ["sync"], indirect=True)
def test_with_a_client_that_was_handed_in_it_is_unknown_and_can_be_repeated(world: World) -> None:
    """Such a client may have tried more often than it tells."""
    with SessionStore(world.client(), namespace=world.namespace) as store:
        session_id = store.create_session("claude", "service", "/src").id
        with no_replica(world.client()), pytest.raises(OutcomeUnknownError) as told:
            store.add_output(session_id, "line")
        assert store.repeat(told.value) == 1


@pytest.mark.parametrize(
    "words",
    [
        "NOREPLICAS Not enough good replicas to write.",
        # Of Redis before 7.0, whose scripts are wrapped.
        "Error running script (call to f_1): -NOREPLICAS Not enough good replicas to write.",
    ],
)
def test_every_servers_words_for_it_are_known(words: str) -> None:
    error = of_any_server(redis.ResponseError(words))
    assert isinstance(error, NoReplicasError)
    assert str(error) == "Not enough good replicas to write."
    assert is_transient(error)
    assert surely_not_run(error)
