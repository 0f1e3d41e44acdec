"""Public calls as users write them, for mypy and pyright in strict mode; never executed.

``assert_type`` says what a call's result must be. Where a call must be refused, an ignore stands
with the name of its error: both checkers report an ignore that is not needed.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import Any, assert_type

import redis
import redis.asyncio

from sessionstore import (
    AgentSession,
    AgentSessionStatus,
    AsyncSessionStore,
    BufferPage,
    InvalidArgumentError,
    OutcomeUnknownError,
    SessionMetrics,
    SessionStatusError,
    SessionStore,
    SessionStoreError,
    StoreSettings,
)
from sessionstore.testing import MemoryServer, async_memory_store, memory_store

# ---- Opening -----------------------------------------------------------------------------------


def opening(client: redis.Redis, url: str, redact: Callable[[str], str]) -> None:
    assert_type(SessionStore.from_url(url), SessionStore)
    assert_type(SessionStore(), SessionStore)
    SessionStore(client, redact=redact, namespace="agents", buffer_limit=1000, buffer_bytes=0)
    SessionStore.from_url(url, types={"claude"}, deadline=2, max_connections=5, redact=None)
    SessionStore.from_url(url, types=["claude"], chunk_limit=1000, allow_eviction=True)
    with SessionStore.from_url(url) as store:
        assert_type(store, SessionStore)
        assert_type(store.settings, StoreSettings)
    assert_type(store.close(), None)
    assert_type(memory_store(server=MemoryServer(), namespace="test"), SessionStore)


async def opening_async(client: redis.asyncio.Redis, url: str) -> None:
    assert_type(AsyncSessionStore.from_url(url), AsyncSessionStore)
    AsyncSessionStore(client, redact=str.upper, namespace="agents")
    async with AsyncSessionStore.from_url(url, deadline=2.5) as store:
        assert_type(store, AsyncSessionStore)
    assert_type(await store.close(), None)
    assert_type(async_memory_store(redact=str.strip), AsyncSessionStore)


# ---- The original's twelve ---------------------------------------------------------------------


def original(store: SessionStore, status: AgentSessionStatus) -> None:
    assert_type(store.create_session("claude", "service-1", "/src"), AgentSession)
    assert_type(store.create_session("claude", "service-1", "/src", "task", "mcp"), AgentSession)
    store.create_session(
        "claude",
        service_session_id="service-1",
        project_path="/src",
        task_id=None,
        mcp_session_id=None,
        status="starting",
        metadata={"branch": "main"},
        unique=True,
    )
    assert_type(store.get_session("id"), AgentSession)
    assert_type(store.get_session("id", tail=10), AgentSession)
    assert_type(store.find_session("id", tail=None), AgentSession | None)
    assert_type(store.find_session_by_service_id("s", tail=0, live=True), AgentSession | None)
    assert_type(store.update_status("id", "busy"), None)
    store.update_status("id", status, expected="active")
    store.update_status("id", status, expected=("active", "busy"))
    assert_type(store.update_activity("id"), None)
    assert_type(store.add_output("id", "text", b"bytes"), int)
    assert_type(store.add_error("id", *["several", "chunks"]), int)
    assert_type(store.delete_session("id"), bool)
    assert_type(store.get_all_sessions(), list[AgentSession])
    assert_type(store.get_sessions_by_type("claude", tail=5), list[AgentSession])
    assert_type(store.get_metrics(), SessionMetrics)


async def original_async(store: AsyncSessionStore, status: AgentSessionStatus) -> None:
    assert_type(await store.create_session("claude", "service-1", "/src"), AgentSession)
    assert_type(
        await store.create_session("claude", "s", "/src", "task", "mcp", unique=True), AgentSession
    )
    not_awaited = store.get_session("id")
    assert_type(await assert_type(not_awaited, Coroutine[Any, Any, AgentSession]), AgentSession)
    assert_type(await store.get_session("id", tail=10), AgentSession)
    assert_type(await store.find_session("id"), AgentSession | None)
    assert_type(await store.find_session_by_service_id("s", live=True), AgentSession | None)
    assert_type(await store.update_status("id", status, expected="active"), None)
    assert_type(await store.update_activity("id"), None)
    assert_type(await store.add_output("id", "text", b"bytes"), int)
    assert_type(await store.add_error("id", "text"), int)
    assert_type(await store.delete_session("id"), bool)
    assert_type(await store.get_all_sessions(tail=1), list[AgentSession])
    assert_type(await store.get_sessions_by_type("claude"), list[AgentSession])
    assert_type(await store.get_metrics(), SessionMetrics)


# ---- Beyond the original -----------------------------------------------------------------------


def beyond(store: SessionStore, error: OutcomeUnknownError) -> None:
    assert_type(store.find_sessions(), list[AgentSession])
    store.find_sessions(
        type="claude",
        status=["active", "busy"],
        task_id="task",
        mcp_session_id="mcp",
        service_session_id="service-1",
        owner="worker",
        idle_for=60,
        order="-last_activity",
        limit=10,
        tail=None,
    )
    assert_type(store.read_output("id"), BufferPage)
    assert_type(store.read_errors("id", 5, limit=10), BufferPage)
    assert_type(store.update_metadata("id", {"branch": "main"}), None)
    assert_type(store.update_metadata("id", {"branch": None, "pid": "5"}), None)
    assert_type(store.ping(), bool)
    store.repeat(error)


async def beyond_async(store: AsyncSessionStore, error: OutcomeUnknownError) -> None:
    assert_type(await store.find_sessions(status="active", order="created"), list[AgentSession])
    assert_type(await store.read_output("id", cursor=5), BufferPage)
    assert_type(await store.read_errors("id"), BufferPage)
    assert_type(await store.update_metadata("id", {"branch": None}), None)
    assert_type(await store.ping(), bool)
    await store.repeat(error)


def values(session: AgentSession, page: BufferPage, metrics: SessionMetrics) -> None:
    assert_type(session.status, AgentSessionStatus)
    assert_type(session.created_at, datetime)
    assert_type(session.output_buffer, tuple[str, ...])
    assert_type(session.task_id, str | None)
    assert_type(session.idle_for, float)
    assert_type(session.ended, bool)
    assert_type(session.metadata, dict[str, str])
    assert_type(page.chunks, tuple[str, ...])
    assert_type(page.dropped, int)
    assert_type(metrics.sessions_by_type, dict[str, int])
    assert_type(metrics.sessions_by_status, dict[AgentSessionStatus, int])


def errors(store: SessionStore) -> None:
    try:
        store.update_status("id", "busy", expected="active")
    except SessionStatusError as error:
        assert_type(error.status, str | None)
        assert_type(error.code, str)
    except InvalidArgumentError as error:
        assert_type(error.argument, str | None)
        as_value_error: ValueError = error
        print(as_value_error)
    except OutcomeUnknownError as error:
        as_redis_error: redis.RedisError = error
        print(as_redis_error)
    except SessionStoreError as error:
        assert_type(error.expires_in, float | None)


def passed_on(store: SessionStore, astore: AsyncSessionStore) -> None:
    """A bound method is a callable of its own type."""
    add: Callable[..., int] = store.add_output
    find: Callable[[str], AgentSession | None] = store.find_session
    afind: Callable[[str], Coroutine[Any, Any, AgentSession | None]] = astore.find_session
    print(add, find, afind)


# ---- Refused -----------------------------------------------------------------------------------


def refused(store: SessionStore, url: str) -> None:
    store.create_session("claude", "service-1")  # type: ignore[call-arg]
    store.create_session("claude", "s", "/src", "t", "m", "active")  # type: ignore[call-arg]
    store.get_session(5)  # type: ignore[arg-type]
    store.get_session("id", 10)  # type: ignore[call-arg]
    store.get_session("id", tail="10")  # type: ignore[arg-type]
    store.find_session("id").status  # type: ignore[union-attr]  # noqa: B018
    store.update_status("id", "asleep")  # type: ignore[arg-type]
    store.update_status("id", "busy", expected=("asleep",))  # type: ignore[arg-type]
    store.add_output("id", 5)  # type: ignore[arg-type]
    store.find_sessions("claude")  # type: ignore[call-arg]
    store.find_sessions(order="newest")  # type: ignore[arg-type]
    store.update_metadata("id", {"pid": 5})  # type: ignore[dict-item]
    SessionStore.from_url(url, buffer_size=5)  # type: ignore[call-arg]


async def refused_async(store: AsyncSessionStore, client: redis.Redis) -> None:
    store.get_session("id").status  # type: ignore[attr-defined]  # noqa: B018
    session: AgentSession = store.get_session("id")  # type: ignore[assignment]
    store.update_activity("id")  # type: ignore[unused-coroutine]
    await store.update_status("id", "asleep")  # type: ignore[arg-type]
    for _ in store.get_all_sessions():  # type: ignore[attr-defined]
        pass
    AsyncSessionStore(client)  # type: ignore[arg-type]
    print(session)
