"""Bounds of scripts that are seen only with more than a thousand of something, on real servers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from conftest import World
from shelf import ids

from sessionstore import scripts
from sessionstore._server import PrivateServer

MIB = 1024 * 1024
MANY = 1100  # over the 1,000 that one script walks


@pytest.fixture
def real(server: PrivateServer) -> Iterator[World]:
    world = World("sync", server.program.name.lower(), server.url)
    yield world
    world.close()


def create(store: Any, number: int, kind: str = "claude") -> list[str]:
    with store.batch() as batch:
        made = [batch.create_session(kind, "service-1", "/src") for _ in range(number)]
    return [one.result().id for one in made]


def test_live_and_ended_sessions_are_in_one_order_by_activity_beyond_a_page(real: World) -> None:
    """Ended ones that are older than a page of live ones must wait for the next page."""
    store = real.store()
    first = create(store, 50)
    ended = create(store, 5)
    for session_id in ended:
        store.update_status(session_id, "terminated")
    last = create(store, MANY)
    others = create(store, 980, "codex")  # a page of candidates with hardly a row
    found = store.find_sessions(order="-last_activity")
    assert ids(found) == [*first, *ended, *last, *others][::-1]
    found = store.find_sessions(order="-last_activity", type="claude")
    assert ids(found) == [*first, *ended, *last][::-1]


def test_of_a_service_session_with_many_sessions_none_is_walked(real: World) -> None:
    script = scripts.load("find_session_by_service_id").text
    index, sessions = f"{real.prefix}sessions:service:s", f"{real.prefix}sessions"

    def reply() -> Any:
        return real.redis.eval(script, 2, index, sessions, real.prefix, "", "0", str(MIB))

    real.redis.sadd(index, *map(str, range(1000)))
    assert len(reply()) == 2  # all of them were looked at, and none is there
    real.redis.sadd(index, "one more")
    assert len(reply()) == 1


def test_a_page_of_sessions_with_much_metadata_ends_at_a_mebibyte(real: World) -> None:
    store = real.store()
    heavy = {f"name{number}": "x" * 4096 for number in range(64)}
    made = [
        store.create_session("claude", f"s{number}", "/src", metadata=heavy) for number in range(12)
    ]
    script, indexes = scripts.load("find_sessions").text, ("sessions", "activity", "ended")
    keys = [real.prefix + name for name in indexes]
    arguments = (real.prefix, "created", "", "", "1000", str(MIB), "0", "")
    *_, rows = real.redis.eval(script, len(keys), *keys, *arguments)
    assert 1 < len(rows) <= MIB // (64 * 4096) + 1
    assert ids(store.find_sessions()) == [session.id for session in made]


def test_about_ten_thousand_events_are_kept(real: World) -> None:
    store = real.store()
    client: Any = real.redis
    with client.pipeline(transaction=False) as pipe:
        for number in range(11_000):
            pipe.xadd(f"{real.prefix}events", {"event": "other", "number": number})
        pipe.execute()
    store.create_session("claude", "service-1", "/src")
    assert 10_000 <= client.xlen(f"{real.prefix}events") < 10_200
