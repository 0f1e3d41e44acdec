"""The contract of the original's twelve methods, with the options they have gained."""

from __future__ import annotations

from datetime import UTC, timedelta
from itertools import pairwise
from typing import Any

import pytest
from consistency import ENDED
from pydantic import ValidationError

from sessionstore import (
    ServiceSessionInUseError,
    SessionNotFoundError,
    SessionStatusError,
    SessionStoreError,
)
from sessionstore.models import ENDED_STATUSES, LIVE_STATUSES, STATUSES

MISSING = "agent_claude_00000000-0000-4000-8000-000000000000"

# Everything that needs an existing session.
NEEDS_SESSION = {
    "get_session": (),
    "update_status": ("busy",),
    "update_activity": (),
    "add_output": ("text",),
    "add_error": ("text",),
    "update_metadata": ({"branch": "main"},),
    "read_output": (),
    "read_errors": (),
}


def create(store: Any, service_session_id: str = "service-1", **options: Any) -> Any:
    return store.create_session("claude", service_session_id, "/src", **options)


# ---- create_session ----------------------------------------------------------------------------


def test_a_created_session_has_what_it_was_given(store: Any) -> None:
    session = store.create_session("claude", "service-1", "/home/user/project", "task-1", "mcp-1")
    assert session.type == "claude"
    assert session.service_session_id == "service-1"
    assert session.project_path == "/home/user/project"
    assert session.task_id == "task-1"
    assert session.mcp_session_id == "mcp-1"
    assert session.status == "active"
    assert session.output_buffer == session.error_buffer == ()
    assert session.output_total == session.error_total == 0
    assert session.metadata == {}
    assert session.owner is None
    assert session.lease_expires_at is None


def test_a_created_session_need_not_have_a_task_or_an_mcp_session(store: Any) -> None:
    session = store.get_session(create(store).id)
    assert session.task_id is None
    assert session.mcp_session_id is None


@pytest.mark.parametrize("tail", [None, 0])
def test_what_create_returns_is_what_get_returns(store: Any, tail: int | None) -> None:
    created = create(store, task_id="t", mcp_session_id="m", metadata={"branch": "main"})
    read = store.get_session(created.id, tail=tail)
    assert read.model_copy(update={"read_at": created.read_at}) == created


@pytest.mark.parametrize("status", STATUSES)
def test_a_session_can_begin_with_any_status(store: Any, status: str) -> None:
    session = create(store, status=status)
    assert session.status == store.get_session(session.id).status == status


def test_a_session_can_begin_with_metadata(store: Any) -> None:
    session = create(store, metadata={"branch": "main", "cost": ""})
    assert (
        session.metadata == store.get_session(session.id).metadata == {"branch": "main", "cost": ""}
    )


def test_created_at_grows_strictly(store: Any) -> None:
    times = [create(store).created_at for _ in range(50)]
    assert all(a < b for a, b in pairwise(times))


def test_created_at_grows_though_the_newest_session_is_from_the_future(
    world: Any, store: Any
) -> None:
    """So it does after a failover to a server whose clock is behind."""
    first = create(store)
    future = int(first.created_at.timestamp() * 1_000_000) + 3_600_000_000
    world.redis.zadd(f"{world.prefix_of(first.id)}sessions", {first.id: future})
    second = create(store)
    assert second.created_at > first.created_at + timedelta(hours=1)
    assert [s.id for s in store.get_all_sessions()] == [first.id, second.id]


def test_times_are_aware_and_the_servers(world: Any, store: Any) -> None:
    seconds, microseconds = world.redis.time()
    before = seconds * 1_000_000 + microseconds
    session = create(store)
    seconds, microseconds = world.redis.time()
    assert session.created_at.tzinfo is UTC
    assert session.created_at == session.last_activity
    created_us = round(session.created_at.timestamp() * 1_000_000)
    assert before <= created_us <= seconds * 1_000_000 + microseconds


def test_idle_for_is_the_time_since_the_last_activity_when_it_was_read(store: Any) -> None:
    session = store.get_session(create(store).id)
    assert session.idle_for == (session.read_at - session.last_activity).total_seconds() >= 0


def test_a_session_cannot_be_changed_in_place(store: Any) -> None:
    session = create(store)
    with pytest.raises(ValidationError):
        session.status = "busy"


def test_many_sessions_may_share_a_service_session(store: Any) -> None:
    assert create(store).id != create(store).id


@pytest.mark.parametrize("status", LIVE_STATUSES)
def test_unique_refuses_while_a_session_drives_the_service_session(store: Any, status: str) -> None:
    holder = create(store, status=status)
    with pytest.raises(ServiceSessionInUseError, match=holder.id) as refused:
        create(store, unique=True)
    assert refused.value.session_id == holder.id
    assert refused.value.status == status
    assert refused.value.code == "SERVICE_SESSION_IN_USE"
    assert len(store.get_all_sessions()) == 1


def test_unique_names_the_holder(world: Any, store: Any) -> None:
    holder = create(store)
    world.redis.hset(world.session(holder.id), "owner", "host-1:42")
    with pytest.raises(ServiceSessionInUseError, match="host-1:42") as refused:
        create(store, unique=True)
    assert refused.value.owner == "host-1:42"


@pytest.mark.parametrize("status", ENDED_STATUSES)
def test_unique_ignores_sessions_that_have_ended(store: Any, status: str) -> None:
    create(store, status=status)
    create(store, unique=True)
    assert len(store.get_all_sessions()) == 2


def test_unique_ignores_other_service_sessions(store: Any) -> None:
    create(store, "service-1")
    assert create(store, "service-2", unique=True).service_session_id == "service-2"


# ---- get_session, find_session -----------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(NEEDS_SESSION))
def test_a_missing_session_is_named(store: Any, method: str) -> None:
    with pytest.raises(SessionNotFoundError, match=MISSING) as refused:
        getattr(store, method)(MISSING, *NEEDS_SESSION[method])
    assert refused.value.session_id == MISSING
    assert refused.value.code == "SESSION_NOT_FOUND"
    assert isinstance(refused.value, SessionStoreError)


@pytest.mark.parametrize("tail", [None, 0, 5])
def test_find_session_answers_none_where_get_session_raises(store: Any, tail: int | None) -> None:
    assert store.find_session(MISSING, tail=tail) is None
    with pytest.raises(SessionNotFoundError):
        store.get_session(MISSING, tail=tail)


def test_an_id_that_names_another_key_of_a_session_finds_nothing(store: Any) -> None:
    session = create(store)
    store.add_output(session.id, "text")
    assert store.find_session(f"{session.id}:output") is None
    assert store.find_session(f"{session.id}:output", tail=0) is None
    assert store.delete_session(f"{session.id}:output") is False
    assert store.get_session(session.id).output_buffer == ("text",)


@pytest.mark.parametrize(
    ("tail", "kept"), [(None, "abc"), (0, ""), (1, "c"), (2, "bc"), (3, "abc"), (10**9, "abc")]
)
def test_tail_loads_the_newest_entries_of_each_buffer(
    store: Any, tail: int | None, kept: str
) -> None:
    session_id = create(store).id
    store.add_output(session_id, "a", "b", "c")
    store.add_error(session_id, "A", "B", "C")
    found = [
        store.get_session(session_id, tail=tail),
        store.find_session(session_id, tail=tail),
        store.find_session_by_service_id("service-1", tail=tail),
        *store.get_all_sessions(tail=tail),
        *store.get_sessions_by_type("claude", tail=tail),
        *store.find_sessions(tail=tail),
    ]
    assert [s.output_buffer for s in found] == [tuple(kept)] * 6
    assert [s.error_buffer for s in found] == [tuple(kept.upper())] * 6
    assert {(s.output_total, s.error_total) for s in found} == {(3, 3)}


def test_find_session_by_service_id_finds_the_earliest_created(store: Any) -> None:
    first, *_ = [create(store, "shared") for _ in range(5)]
    create(store, "another")
    assert store.find_session_by_service_id("shared").id == first.id


def test_find_session_by_service_id_answers_none_if_there_is_none(store: Any) -> None:
    create(store, "another")
    assert store.find_session_by_service_id("missing") is None
    assert store.find_session_by_service_id("missing", live=True) is None


def test_live_passes_over_sessions_that_have_ended(store: Any) -> None:
    ended, failed, live, _ = [create(store, "shared") for _ in range(4)]
    store.update_status(ended.id, "terminated")
    store.update_status(failed.id, "error")
    assert store.find_session_by_service_id("shared").id == ended.id
    assert store.find_session_by_service_id("shared", live=True).id == live.id


def test_live_answers_none_if_all_have_ended(store: Any) -> None:
    create(store, status="terminated")
    assert store.find_session_by_service_id("service-1", live=True) is None


# ---- update_status, update_activity ------------------------------------------------------------


@pytest.mark.parametrize("new", STATUSES)
@pytest.mark.parametrize("old", STATUSES)
def test_any_status_may_follow_any_other(store: Any, old: str, new: str) -> None:
    session = create(store, status=old)
    assert store.update_status(session.id, new) is None
    assert store.get_session(session.id).status == new


def test_update_status_is_activity(store: Any) -> None:
    session = create(store)
    store.update_status(session.id, "busy")
    assert store.get_session(session.id).last_activity > session.last_activity


@pytest.mark.parametrize("expected", ["active", ("active",), ["busy", "active"], {"active"}])
def test_update_status_with_the_expected_status(store: Any, expected: Any) -> None:
    session = create(store)
    store.update_status(session.id, "busy", expected=expected)
    assert store.get_session(session.id).status == "busy"


@pytest.mark.parametrize("expected", ["busy", ("starting", "terminated")])
def test_update_status_refuses_and_changes_nothing_if_the_status_is_another(
    store: Any, expected: Any
) -> None:
    session = create(store)
    with pytest.raises(SessionStatusError, match="active") as refused:
        store.update_status(session.id, "error", expected=expected)
    assert refused.value.status == "active"
    assert refused.value.session_id == session.id
    after = store.get_session(session.id)
    assert after.model_copy(update={"read_at": session.read_at}) == session


def test_one_of_two_who_expect_the_same_status_wins(store: Any) -> None:
    session = create(store)
    store.update_status(session.id, "busy", expected="active")
    with pytest.raises(SessionStatusError):
        store.update_status(session.id, "busy", expected="active")


def test_update_activity_moves_last_activity_and_nothing_else(store: Any) -> None:
    session = create(store)
    assert store.update_activity(session.id) is None
    after = store.get_session(session.id)
    assert after.last_activity > session.last_activity
    same = {"last_activity": session.last_activity, "read_at": session.read_at}
    assert after.model_copy(update=same) == session


@pytest.mark.parametrize("read", ["get_session", "find_session", "read_output", "read_errors"])
def test_reading_is_not_activity(store: Any, read: str) -> None:
    session = create(store)
    getattr(store, read)(session.id)
    store.get_all_sessions()
    store.get_metrics()
    assert store.get_session(session.id).last_activity == session.last_activity


# ---- add_output, add_error ---------------------------------------------------------------------


def test_entries_are_kept_in_order_and_apart(store: Any) -> None:
    session_id = create(store).id
    store.add_output(session_id, "1")
    store.add_error(session_id, "e1")
    store.add_output(session_id, "2", "3")
    store.add_error(session_id, "e2")
    session = store.get_session(session_id)
    assert session.output_buffer == ("1", "2", "3")
    assert session.error_buffer == ("e1", "e2")


def test_adding_answers_the_total_ever_added(store: Any) -> None:
    session_id = create(store).id
    assert [store.add_output(session_id, "a"), store.add_output(session_id, "b", "c")] == [1, 3]
    assert store.add_error(session_id, "a", "b") == 2


@pytest.mark.parametrize("method", ["add_output", "add_error"])
def test_adding_is_activity(store: Any, method: str) -> None:
    session = create(store)
    getattr(store, method)(session.id, "text")
    assert store.get_session(session.id).last_activity > session.last_activity


@pytest.mark.parametrize("status", STATUSES)
def test_adding_does_not_change_the_status(store: Any, status: str) -> None:
    session_id = create(store, status=status).id
    store.add_output(session_id, "last words")
    session = store.get_session(session_id)
    assert (session.status, session.output_buffer) == (status, ("last words",))
    assert session.ended == (status in ENDED)


# ---- delete_session ----------------------------------------------------------------------------


def test_deleting_tells_whether_there_was_a_session(store: Any) -> None:
    session_id = create(store).id
    assert store.delete_session(session_id) is True
    assert store.delete_session(session_id) is False
    assert store.find_session(session_id) is None


def test_deleting_leaves_other_sessions_alone(store: Any) -> None:
    kept, gone = create(store), create(store)
    store.add_output(kept.id, "text")
    before = store.get_session(kept.id)
    store.delete_session(gone.id)
    (after,) = store.get_all_sessions()
    assert after.model_copy(update={"read_at": before.read_at}) == before


# ---- get_all_sessions, get_sessions_by_type, get_metrics ---------------------------------------


def test_an_empty_store_answers_empty(store: Any) -> None:
    assert store.get_all_sessions() == []
    assert store.get_sessions_by_type("claude") == []
    metrics = store.get_metrics()
    assert (metrics.total_sessions, metrics.sessions_by_type) == (0, {})
    assert metrics.sessions_by_status == dict.fromkeys(STATUSES, 0)


def test_sessions_are_listed_in_the_order_of_their_creation(store: Any) -> None:
    types = ["codex", "claude", "gemini", "claude", "codex", "claude"]
    created = [store.create_session(type, f"service-{i}", "/src") for i, type in enumerate(types)]
    store.update_activity(created[0].id)
    assert [s.id for s in store.get_all_sessions()] == [s.id for s in created]
    for type in set(types):
        of_type = [s.id for s in created if s.type == type]
        assert [s.id for s in store.get_sessions_by_type(type)] == of_type


def test_metrics_count_by_status_and_by_type(store: Any) -> None:
    kinds = [
        ("claude", "active"),
        ("claude", "busy"),
        ("codex", "busy"),
        ("codex", "error"),
        ("codex", "terminated"),
        ("my-agent_2", "starting"),
    ]
    for i, (type, status) in enumerate(kinds):
        store.create_session(type, f"service-{i}", "/src", status=status)
    metrics = store.get_metrics()
    assert metrics.total_sessions == 6
    assert (metrics.active_sessions, metrics.busy_sessions, metrics.error_sessions) == (1, 2, 1)
    assert metrics.sessions_by_type == {"claude": 2, "codex": 3, "my-agent_2": 1}
    assert metrics.sessions_by_status == {
        "starting": 1, "active": 1, "busy": 2, "error": 1, "terminated": 1
    }  # fmt: skip


def test_a_type_without_sessions_is_not_counted_any_more(store: Any) -> None:
    store.delete_session(create(store).id)
    assert store.get_metrics().sessions_by_type == {}


# ---- The original's names on the wire ----------------------------------------------------------


def test_a_session_dumps_under_the_original_wire_names(store: Any) -> None:
    session = create(store, task_id="task-1", mcp_session_id="mcp-1")
    store.add_output(session.id, "out")
    dumped = store.get_session(session.id).model_dump(by_alias=True, mode="json")
    created_at = dumped["created_at"]
    assert created_at == session.created_at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    original = {
        "id", "type", "serviceSessionId", "status", "projectPath", "taskId", "mcpSessionId",
        "created_at", "last_activity", "output_buffer", "error_buffer",
    }  # fmt: skip
    assert {name: dumped[name] for name in original - {"created_at", "last_activity"}} == {
        "id": session.id,
        "type": "claude",
        "serviceSessionId": "service-1",
        "status": "active",
        "projectPath": "/src",
        "taskId": "task-1",
        "mcpSessionId": "mcp-1",
        "output_buffer": ["out"],
        "error_buffer": [],
    }


def test_metrics_dump_under_the_original_wire_names(store: Any) -> None:
    create(store)
    dumped = store.get_metrics().model_dump(by_alias=True, mode="json")
    del dumped["sessionsByStatus"]
    assert dumped == {
        "totalSessions": 1,
        "activeSessions": 1,
        "busySessions": 0,
        "errorSessions": 0,
        "sessionsByType": {"claude": 1},
    }


def test_ping(store: Any) -> None:
    assert store.ping() is True
