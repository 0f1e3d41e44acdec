"""What is in Redis after operations: indexes, metrics, events, and nothing left behind.

Everything is recomputed from the hashes with plain redis-py (``consistency.py``).
"""

from __future__ import annotations

import logging
import random
from contextlib import suppress
from typing import Any

import pytest
import redis
from consistency import ENDED, assert_consistent, expected_metrics, microseconds, sessions_of
from moments import everything

import sessionstore.operations
from sessionstore import (
    SessionExistsError,
    SessionNotFoundError,
    SessionStoreError,
    UnreadableSessionError,
)
from sessionstore.models import STATUSES

MISSING = "agent_claude_00000000-0000-4000-8000-000000000000"


def create(store: Any, **options: Any) -> str:
    return str(store.create_session("claude", "service-1", "/src", **options).id)


# ---- Random operations -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_indexes_and_metrics_are_exact_after_random_operations(world: Any, seed: int) -> None:
    rng = random.Random(seed)
    stores = [world.store(buffer_limit=9, buffer_bytes=200), world.store(buffer_limit=5)]
    known = [MISSING]
    for step in range(60 if world.target == "fakeredis" else 200):
        store, session_id = rng.choice(stores), rng.choice(known)
        kind = rng.randrange(10)
        with suppress(SessionStoreError):
            if kind < 3:
                session = store.create_session(
                    rng.choice(["claude", "codex"]),
                    f"service-{rng.randrange(5)}",
                    "/src",
                    rng.choice([None, "task-1", "task:2"]),
                    rng.choice([None, "mcp-1", "{mcp}"]),
                    status=rng.choice(STATUSES),
                    unique=rng.random() < 0.3,
                )
                known.append(session.id)
            elif kind < 6:
                expected = rng.choice([None, None, rng.choice(STATUSES)])
                store.update_status(session_id, rng.choice(STATUSES), expected=expected)
            elif kind == 6:
                store.update_activity(session_id)
            elif kind == 7:
                store.add_output(session_id, *["é" * rng.randrange(30)] * rng.randint(1, 4))
            elif kind == 8:
                store.add_error(session_id, "error")
            else:
                store.delete_session(session_id)
        if step % 20 == 19:
            assert_consistent(world)
            assert stores[0].get_metrics().model_dump() == expected_metrics(world)
    assert len(sessions_of(world)) >= 5


# ---- One operation at a time -------------------------------------------------------------------


def test_a_hash_is_readable_with_redis_cli(world: Any, store: Any) -> None:
    session = store.create_session(
        "claude", "service-1", "/src", "task-1", "mcp-1", metadata={"branch": "main"}
    )
    store.add_output(session.id, "é")
    fields = world.redis.hgetall(world.session(session.id))
    created_at = session.created_at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    assert fields.pop("last_activity") >= created_at
    assert fields == {
        "id": session.id,
        "type": "claude",
        "status": "active",
        "created_at": created_at,
        "service_session_id": "service-1",
        "project_path": "/src",
        "task_id": "task-1",
        "mcp_session_id": "mcp-1",
        "meta:branch": "main",
        "output_total": "1",
        "output_bytes": "18",
    }


def test_the_key_names_are_those_of_the_design(world: Any, store: Any) -> None:
    session_id = create(store, task_id="task-1", mcp_session_id="mcp-1")
    store.add_output(session_id, "o")
    store.add_error(session_id, "e")
    ended = create(store, status="error")
    assert {key for key in world.keys() if not key.startswith("lane:")} == {  # noqa: SIM118
        f"session:{session_id}",
        f"session:{session_id}:output",
        f"session:{session_id}:errors",
        f"session:{ended}",
        "sessions",
        "sessions:type:claude",
        "sessions:status:active",
        "sessions:status:error",
        "sessions:service:service-1",
        "sessions:task:task-1",
        "sessions:mcp:mcp-1",
        "types",
        "activity",
        "ended",
        "events",
        "meta",
    }


def test_ended_and_live_sessions_are_in_sorted_sets_of_their_own(world: Any, store: Any) -> None:
    sessions = {status: create(store, status=status) for status in STATUSES}
    assert set(world.scores("ended")) == {sessions[status] for status in ENDED}
    assert set(world.scores("activity")) == set(sessions.values()) - set(world.scores("ended"))


def test_ending_is_dated_and_coming_back_is_activity(world: Any, store: Any) -> None:
    session_id = create(store)
    store.update_status(session_id, "terminated")
    ended_at = world.scores("ended")[session_id]
    assert ended_at == microseconds(sessions_of(world)[session_id]["last_activity"])
    assert world.scores("activity") == {}
    store.update_status(session_id, "active")
    assert world.scores("ended") == {}
    assert world.scores("activity")[session_id] > ended_at


def test_what_follows_the_end_does_not_move_its_date(world: Any, store: Any) -> None:
    session_id = create(store, status="terminated")
    before = world.scores("ended")
    store.update_status(session_id, "error")
    store.update_activity(session_id)
    store.add_output(session_id, "late")
    assert world.scores("ended") == before
    assert world.scores("activity") == {}


def test_nothing_is_left_of_deleted_sessions(world: Any, store: Any) -> None:
    for status in STATUSES:
        session_id = create(
            store, status=status, task_id="t", mcp_session_id="m", metadata={"a": "b"}
        )
        store.add_output(session_id, "o")
        store.add_error(session_id, "e")
        store.delete_session(session_id)
    left = {key.split(":")[0] for key in world.keys()}  # noqa: SIM118
    assert left == {"meta", "events", "lane"}


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("update_status", ("busy",)),
        ("update_activity", ()),
        ("add_output", ("text",)),
        ("add_error", ("text",)),
        ("update_metadata", ({"branch": "main"},)),
    ],
)
def test_a_write_to_a_missing_session_leaves_no_key_behind(
    world: Any, store: Any, method: str, arguments: tuple[Any, ...]
) -> None:
    with pytest.raises(SessionNotFoundError):
        getattr(store, method)(MISSING, *arguments)
    assert store.delete_session(MISSING) is False
    left = {key.split(":")[0] for key in world.keys()}  # noqa: SIM118
    assert left == {"meta", "lane"}


def test_an_id_that_is_taken_is_refused_and_nothing_changes(
    world: Any, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the creation is sent again after its lane has run out."""
    session_id = create(store)
    monkeypatch.setattr(sessionstore.operations, "new_session_id", lambda *_: session_id)
    before = everything(world)
    with pytest.raises(SessionExistsError) as refused:
        store.create_session("codex", "service-1", "/elsewhere")
    assert refused.value.session_id == session_id
    assert everything(world) == before


def test_memory_for_lanes_is_bounded_by_concurrency_and_not_by_traffic(
    world: Any, store: Any
) -> None:
    session_id = create(store)
    for _ in range(50):
        store.update_activity(session_id)
    lanes = [key for key in world.keys() if key.startswith("lane:")]  # noqa: SIM118
    assert len(lanes) == 1
    assert 600 < world.redis.ttl(world.prefix_of(session_id) + lanes[0]) <= 1200


# ---- Events ------------------------------------------------------------------------------------


def test_a_session_leaves_its_life_in_the_events(world: Any, store: Any) -> None:
    session_id = create(store, status="starting")
    store.update_status(session_id, "active")
    store.update_status(session_id, "terminated", expected="active")
    store.delete_session(session_id)
    common = {"session_id": session_id, "type": "claude", "actor": store.worker}
    assert world.events() == [
        {"event": "created", "status": "starting"} | common,
        {"event": "status_changed", "old_status": "starting", "status": "active"} | common,
        {"event": "status_changed", "old_status": "active", "status": "terminated"} | common,
        {"event": "deleted", "old_status": "terminated"}
        | {"output_total": "0", "error_total": "0"}
        | common,
    ]


def test_what_changes_nothing_of_a_life_is_no_event(world: Any, store: Any) -> None:
    session_id = create(store)
    store.update_status(session_id, "active")
    store.update_activity(session_id)
    store.add_output(session_id, "text")
    store.update_metadata(session_id, {"branch": "main"})
    store.delete_session(MISSING)
    with pytest.raises(SessionStoreError):
        store.update_status(session_id, "busy", expected="starting")
    with pytest.raises(SessionStoreError):
        create(store, unique=True)
    assert [event["event"] for event in world.events()] == ["created"]


# ---- Records that cannot be read ---------------------------------------------------------------

DAMAGE: dict[str, dict[str, str | bytes]] = {
    "a status that is none": {"status": "asleep"},
    "a time that is none": {"created_at": "yesterday"},
    "a total that is no number": {"output_total": "many"},
    "bytes that are not UTF-8": {"project_path": b"/src/\xff"},
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_one_unreadable_record_does_not_spoil_a_listing(
    world: Any, store: Any, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    first, broken, last = create(store), create(store), create(store)
    world.redis.hset(world.session(broken), mapping=DAMAGE[damage])
    caplog.set_level(logging.WARNING, "sessionstore")
    for tail in (0, None):
        caplog.clear()
        assert [s.id for s in store.find_sessions(tail=tail)] == [first, last]
        (record,) = [r for r in caplog.records if r.name == "sessionstore"]
        assert broken in record.getMessage()
    for tail in (0, None):
        with pytest.raises(UnreadableSessionError, match=broken) as refused:
            store.get_session(broken, tail=tail)
        assert refused.value.session_id == broken


def test_a_limit_is_filled_past_an_unreadable_record(world: Any, store: Any) -> None:
    broken, *others = [create(store) for _ in range(4)]
    world.redis.hset(world.session(broken), "status", "asleep")
    assert [s.id for s in store.find_sessions(limit=2)] == others[:2]
    assert store.find_session_by_service_id("service-1").id == others[0]


def test_an_id_without_a_session_does_not_spoil_a_listing(
    world: Any, store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    kept, gone = create(store), create(store)
    world.redis.delete(world.session(gone))
    with caplog.at_level(logging.WARNING, "sessionstore"):
        assert [s.id for s in store.get_all_sessions()] == [kept]
    assert caplog.records


def test_bytes_that_somebody_else_put_into_a_buffer_are_replaced(world: Any, store: Any) -> None:
    session_id = create(store)
    store.add_output(session_id, "before")
    world.redis.rpush(world.session(session_id, ":output"), b"caf\xe9")
    world.redis.hincrby(world.session(session_id), "output_total", 1)
    expected = ("before", "caf\ufffd")
    assert store.read_output(session_id).chunks == expected
    assert store.get_session(session_id).output_buffer == expected
    assert store.get_all_sessions()[0].output_buffer == expected


def test_an_unreadable_record_names_fields_and_not_values(world: Any, store: Any) -> None:
    session_id = create(store)
    world.redis.hset(world.session(session_id), "output_total", "a secret")
    with pytest.raises(UnreadableSessionError, match="output_total") as refused:
        store.get_session(session_id)
    assert "a secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "operate"),
    [
        ("activity", lambda store, i: store.update_status(i, "error")),
        ("events", lambda store, i: store.update_status(i, "error")),
        ("sessions", lambda store, _: create(store)),
        ("events", lambda store, _: create(store)),
        ("leases", lambda store, i: store.delete_session(i)),
        ("sessions:status:active", lambda store, i: store.delete_session(i)),
        ("activity", lambda store, i: store.add_output(i, "text")),
    ],
)
def test_a_key_of_a_wrong_type_stops_a_write_before_it_changes_anything(
    world: Any, store: Any, key: str, operate: Any
) -> None:
    session_id = create(store)
    prefix = world.prefix_of(session_id)
    world.redis.delete(prefix + key)
    world.redis.set(prefix + key, "somebody else's")

    def everything() -> dict[bytes, Any]:
        client = world.client()
        kept = client.scan_iter(world.pattern, count=1000)
        return {key: client.dump(key) for key in kept if b":lane:" not in key}

    before = everything()
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        operate(store, session_id)
    assert everything() == before
