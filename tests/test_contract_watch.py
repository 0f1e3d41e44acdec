"""``watch``: what happens to sessions, in order, resumable, and gaps told."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
from conftest import World
from test_contract_follow import another, meanwhile

import sessionstore.following
import sessionstore.news
from sessionstore import InvalidArgumentError, SessionEvent
from sessionstore._server import PrivateServer

OLDEST = "0"


def life(store: Any, service: str = "service-1") -> str:
    """A session from its creation to its deletion: six events."""
    session_id = str(store.create_session("claude", service, "/src", status="starting").id)
    store.update_status(session_id, "active")
    lease = store.claim(session_id)
    lease.release()
    store.update_status(session_id, "terminated")
    store.delete_session(session_id)
    return session_id


#: event, old status, status, whether it has an owner
OF_A_LIFE = [
    ("created", None, "starting", False),
    ("status_changed", "starting", "active", False),
    ("claimed", "active", "busy", True),
    ("released", "busy", "active", True),
    ("status_changed", "active", "terminated", False),
    ("deleted", "terminated", None, False),
]


def taken(events: Iterator[SessionEvent], number: int) -> list[SessionEvent]:
    return list(islice(events, number))


def told(events: list[SessionEvent]) -> list[tuple[str, str | None, str | None, bool]]:
    return [(e.event, e.old_status, e.status, e.owner is not None) for e in events]


def test_the_events_of_a_life_say_what_happened_and_who_did_it(world: World) -> None:
    store = world.store(worker="blue")
    session_id = life(store)

    events = taken(store.watch(OLDEST), 6)

    assert told(events) == OF_A_LIFE
    assert {(e.session_id, e.type, e.actor, e.gap) for e in events} == {
        (session_id, "claude", store.worker, False)
    }
    assert events[2].owner == store.worker
    times = [e.at for e in events]
    assert times == sorted(times)
    seconds, _ = world.redis.time()
    assert abs(seconds - times[0].timestamp()) < 60


def test_a_watcher_goes_on_after_any_cursor(world: World, store: Any) -> None:
    for number in range(5):
        life(store, f"service-{number}")
    events = taken(store.watch(OLDEST), 30)

    for number in (0, 1, 7, 28):
        rest = taken(world.store().watch(events[number].cursor), 29 - number)
        assert rest == events[number + 1 :]


def test_without_a_cursor_it_begins_with_what_happens_from_then_on(
    world: World, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessionstore.news, "LOOKS_OFTEN", 0.1)
    monkeypatch.setattr(sessionstore.news, "LOOKS_SELDOM", 0.1)
    life(store)
    watching = store.watch()

    def more() -> None:
        with another(world) as other:
            while not came:  # the iteration has begun by one of these
                other.create_session("codex", "service-2", "/src")

    came: list[SessionEvent] = []
    with meanwhile(more):
        came += taken(watching, 1)
    watching.close()

    assert (came[0].event, came[0].type) == ("created", "codex")


@pytest.mark.usefixtures("only_news")
def test_an_event_wakes_a_watcher(world: World, store: Any) -> None:
    watching = store.watch(OLDEST)
    store.create_session("claude", "service-1", "/src")
    first = taken(watching, 1)

    with another(world) as other, meanwhile(lambda: life(other, "service-2")):
        rest = taken(watching, 6)
    watching.close()

    assert told(first) == [("created", None, "active", False)]
    assert told(rest) == OF_A_LIFE


def test_events_of_one_session_come_in_order_over_all_partitions(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessionstore.following, "_PAGE", 32)  # so that pages are cut
    ids = [life(store, f"service-{number}") for number in range(40)]

    events = taken(store.watch(OLDEST), 240)

    for session_id in ids:
        assert told([e for e in events if e.session_id == session_id]) == OF_A_LIFE
    assert len({e.cursor for e in events}) == 240
    half = events[119].cursor
    assert taken(store.watch(half), 120) == events[120:]


# ---- Gaps ---------------------------------------------------------------------------------------


def trim(world: World, kept: int) -> None:
    for prefix in world.prefixes:
        world.redis.xtrim(f"{prefix}events", maxlen=kept, approximate=False)


def test_a_gap_is_told_with_the_first_event_after_it(world: World, store: Any) -> None:
    service = "service-1"  # all in one partition
    for _ in range(3):
        life(store, service)
    events = taken(store.watch(OLDEST), 18)
    trim(world, 6)

    after = taken(store.watch(events[3].cursor), 6)

    assert [e.gap for e in after] == [True] + [False] * 5
    assert [e.cursor for e in after] == [e.cursor for e in events[12:]]


def test_without_a_gap_none_is_told(world: World, store: Any) -> None:
    """The control: the event at the cursor is there still."""
    for _ in range(3):
        life(store, "service-1")
    events = taken(store.watch(OLDEST), 18)
    trim(world, 6)

    assert not any(e.gap for e in taken(store.watch(events[12].cursor), 5))
    assert not any(e.gap for e in taken(store.watch(OLDEST), 6))


def test_what_others_have_written_to_the_stream_is_left_out(
    world: World, store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    session_id = life(store)
    key = f"{world.prefix_of(session_id)}events"
    world.redis.xadd(key, {"event": "created"})
    world.client().xadd(key, {"event": b"\xff", "session_id": "x", "type": "y"})
    life(store)

    assert told(taken(store.watch(OLDEST), 12)) == OF_A_LIFE * 2
    assert caplog.text.count("an event cannot be read") == 2


def test_an_event_of_a_later_version_is_passed_on_as_far_as_it_is_known(
    world: World, store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    session_id = life(store)
    fields = {"event": "renamed", "session_id": session_id, "type": "claude", "status": "paused"}
    world.redis.xadd(f"{world.prefix_of(session_id)}events", fields | {"name": "blue"})

    event = taken(store.watch(OLDEST), 7)[6]

    assert {name: getattr(event, name) for name in fields} == fields
    assert event.actor is event.owner is event.old_status is None
    assert "cannot be read" not in caplog.text


def test_a_cursor_of_another_number_of_partitions_is_refused(world: World, store: Any) -> None:
    life(store)
    cursor = taken(store.watch(OLDEST), 1)[0].cursor
    partitions = 16 if world.partitions == 1 else 1
    elsewhere = world.store(namespace=f"{world.namespace}-other", partitions=partitions)

    with pytest.raises(InvalidArgumentError, match=f"this one has {partitions}"):
        elsewhere.watch(cursor)


# ---- A server that restarts ---------------------------------------------------------------------


def test_a_watcher_goes_on_through_a_restart(own_server: PrivateServer) -> None:
    world = World("sync", "restarted", own_server.url)
    try:
        store = world.store()
        watching = store.watch(OLDEST)
        life(store)
        events = taken(watching, 3)
        own_server.kill()
        own_server.start()
        with meanwhile(lambda: life(store, "service-2")):
            events += taken(watching, 9)
        watching.close()
    finally:
        world.close()

    assert told(events) == OF_A_LIFE * 2
    assert not any(e.gap for e in events)
