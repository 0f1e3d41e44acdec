"""Public calls as users write them, for mypy and pyright in strict mode; never executed.

``assert_type`` says what a call's result must be. Where a call must be refused, an ignore stands
with the name of its error: both checkers report an ignore that is not needed.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import redirect_stdout
from datetime import datetime
from typing import Any, Literal, assert_type

import redis
import redis.asyncio

from sessionstore import (
    AgentSession,
    AgentSessionStatus,
    AsyncBatch,
    AsyncLease,
    AsyncReaper,
    AsyncSessionStore,
    AsyncWriter,
    Batch,
    BufferPage,
    Drift,
    Imported,
    ImportFormatError,
    InvalidArgumentError,
    Lease,
    LeaseLostError,
    Outcome,
    OutcomeUnknownError,
    Problem,
    Reaped,
    Reaper,
    SessionBusyError,
    SessionEvent,
    SessionMetrics,
    SessionNotActiveError,
    SessionStatusError,
    SessionStore,
    SessionStoreError,
    StoreSettings,
    Writer,
)
from sessionstore.testing import MemoryServer, async_memory_store, memory_store

# ---- Opening -----------------------------------------------------------------------------------


def opening(client: redis.Redis, url: str, redact: Callable[[str], str]) -> None:
    assert_type(SessionStore.from_url(url), SessionStore)
    assert_type(SessionStore(), SessionStore)
    SessionStore(client, redact=redact, namespace="agents", buffer_limit=1000, buffer_bytes=0)
    SessionStore.from_url(url, types={"claude"}, deadline=2, max_connections=5, redact=None)
    SessionStore.from_url(url, types=["claude"], chunk_limit=1000, allow_eviction=True)
    SessionStore.from_url(url, worker="builder-1", reap_grace=5, retention=86400)
    SessionStore.from_url(url, retention=None)
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


# ---- Leases ------------------------------------------------------------------------------------


def leases(store: SessionStore, status: AgentSessionStatus) -> None:
    with store.claim("id") as entered:
        assert_type(entered, Lease)
    lease = store.claim("id", ttl=10, wait=2.5, expected=("active", "error"))
    assert_type(lease, Lease)
    store.claim("id", expected=status)
    assert_type(lease.renew(), None)
    assert_type(lease.release(), None)
    lease.release(status="terminated")
    assert_type(lease.session_id, str)
    assert_type(lease.owner, str)
    assert_type(lease.fence, int)
    assert_type(lease.lost, bool)
    assert_type(lease.released, bool)
    assert_type(lease.expires_in, float)

    def stop(lost: Lease) -> None:
        print(lost.session_id)

    lease.on_lost(stop)
    lease.on_lost(print)
    store.update_status("id", "active", force=True)
    store.delete_session("id", force=True)
    assert_type(store.worker, str)


async def leases_async(store: AsyncSessionStore) -> None:
    async with store.claim("id", ttl=10) as entered:
        assert_type(entered, AsyncLease)
    lease = await store.claim("id", wait=2.5, expected="active")
    assert_type(lease, AsyncLease)
    assert_type(await lease.renew(), None)
    assert_type(await lease.release(status="error"), None)
    async with lease as entered:
        assert_type(entered, AsyncLease)

    def stop(lost: AsyncLease) -> None:
        print(lost.session_id)

    lease.on_lost(stop)
    await store.update_status("id", "active", force=True)


def following(store: SessionStore) -> None:
    for page in store.follow_output("id", 5):
        assert_type(page, BufferPage)
        assert_type(page.deleted, bool)
    assert_type(store.follow_errors("id"), Iterator[BufferPage])
    for event in store.watch("0"):
        assert_type(event, SessionEvent)
        assert_type(event.at, datetime)
        assert_type(event.gap, bool)


async def following_async(store: AsyncSessionStore) -> None:
    async for page in store.follow_output("id"):
        assert_type(page, BufferPage)
    assert_type(store.follow_errors("id", cursor=1), AsyncIterator[BufferPage])
    async for event in store.watch():
        assert_type(event.cursor, str)


def writers(store: SessionStore, process: subprocess.Popen[bytes]) -> None:
    with store.writer("id") as entered:
        assert_type(entered, Writer)
    out = store.writer(
        "id", errors=True, batch_bytes=1000, interval=0.5, max_pending=10_000, patience=5
    )
    assert_type(out, Writer)
    assert_type(out.write("text"), int)
    assert_type(out.write(b"bytes"), int)
    print("line", 5, file=out)
    logging.StreamHandler(out)
    assert process.stdout is not None
    shutil.copyfileobj(process.stdout, out.buffer)
    with redirect_stdout(out):
        print("line")
    assert_type(out.flush(), None)
    assert_type(out.close(), None)
    assert_type(out.closed, bool)
    assert_type(out.session_id, str)


async def writers_async(store: AsyncSessionStore) -> None:
    async with store.writer("id", errors=True) as entered:
        assert_type(entered, AsyncWriter)
    out = store.writer("id", interval=0)
    assert_type(out, AsyncWriter)
    assert_type(await out.write("text"), int)
    assert_type(await out.write(b"bytes"), int)
    assert_type(await out.writelines(["a\n", "b\n"]), None)
    assert_type(await out.flush(), None)
    assert_type(await out.close(), None)
    assert_type(out.closed, bool)


def batches(store: SessionStore) -> None:
    with store.batch() as batch:
        assert_type(batch, Batch)
        created = batch.create_session("claude", "service-1", "/src", metadata={"branch": "main"})
        assert_type(created, Outcome[AgentSession])
        added = batch.add_output("id", "text", b"bytes")
        assert_type(added, Outcome[int])
        assert_type(batch.update_status("id", "busy", expected="active"), Outcome[None])
        assert_type(batch.find_session("id", tail=0), Outcome[AgentSession | None])
        assert_type(batch.get_all_sessions(tail=1), Outcome[list[AgentSession]])
        assert_type(batch.get_metrics(), Outcome[SessionMetrics])
        assert_type(batch.read_output("id", 5), Outcome[BufferPage])
        assert_type(batch.delete_session("id", force=True), Outcome[bool])
        assert_type(batch.reap(idle_for=60), Outcome[list[Reaped]])
        assert_type(len(batch), int)
    assert_type(added.result(), int)
    assert_type(created.result(), AgentSession)
    assert_type(added.error, Exception | None)
    assert_type(added.is_known, bool)
    assert_type(added.operation, str)
    for outcome in batch:
        print(outcome.error)


async def batches_async(store: AsyncSessionStore) -> None:
    async with store.batch() as batch:
        assert_type(batch, AsyncBatch)
        added = batch.add_output("id", "text")
        assert_type(added, Outcome[int])
        assert_type(batch.get_session("id"), Outcome[AgentSession])
        assert_type(batch.update_metadata("id", {"pid": None}), Outcome[None])
        assert_type(batch.reap(), Outcome[list[Reaped]])
    assert_type(added.result(), int)
    AsyncSessionStore.from_url("redis://", coalesce=False)


def reaping(store: SessionStore, told: Reaped) -> None:
    assert_type(store.reap(), list[Reaped])
    store.reap(idle_for=60, ended_for=86400.5, limit=10, dry_run=True)
    assert_type(told.session_id, str)
    assert_type(told.action, Literal["marked", "lost", "terminated", "deleted"])
    assert_type(told.reason, str)
    assert_type(told.status, AgentSessionStatus)
    assert_type(told.owner, str | None)

    def note(one: Reaped) -> None:
        print(one.reason)

    with Reaper(store, every=30, idle_for=60, ended_for=3600, on_reaped=note) as reaper:
        assert_type(reaper, Reaper)
    assert_type(reaper.start(), None)
    assert_type(reaper.stop(), None)


async def reaping_async(store: AsyncSessionStore) -> None:
    assert_type(await store.reap(ended_for=3600), list[Reaped])
    async with AsyncReaper(store, every=2.5, on_reaped=print) as reaper:
        assert_type(reaper, AsyncReaper)
    assert_type(reaper.start(), None)
    assert_type(await reaper.stop(), None)


def doctor(store: SessionStore) -> None:
    assert_type(store.check(), Iterator[Problem])
    assert_type(store.repair(), Iterator[Problem])
    for problem in store.repair():
        assert_type(problem.key, str)
        assert_type(problem.session_id, str | None)
        assert_type(problem.message, str)
        assert_type(problem.mending, str)
        assert_type(problem.repaired, bool)
        assert_type(problem.warning, bool)
    assert_type(store.drift(), Drift)
    assert_type(store.drift().found, bool)
    assert_type(store.drift().sessions, int)


async def doctor_async(store: AsyncSessionStore) -> None:
    assert_type(store.check(), AsyncIterator[Problem])
    async for problem in store.repair():
        assert_type(problem, Problem)
        print(problem.kind == "index_missing")
    assert_type(await store.drift(), Drift)


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
    try:
        store.claim("id")
    except SessionBusyError as error:
        assert_type(error.owner, str | None)
        assert_type(error.expires_in, float | None)
    except SessionNotActiveError as error:
        as_status_error: SessionStatusError = error
        print(as_status_error)
    except LeaseLostError as error:
        assert_type(error.session_id, str | None)


def passed_on(store: SessionStore, astore: AsyncSessionStore) -> None:
    """A bound method is a callable of its own type."""
    add: Callable[..., int] = store.add_output
    find: Callable[[str], AgentSession | None] = store.find_session
    afind: Callable[[str], Coroutine[Any, Any, AgentSession | None]] = astore.find_session
    print(add, find, afind)


# ---- Export and import -------------------------------------------------------------------------


def transfer(store: SessionStore, path: str) -> None:
    assert_type(store.export_sessions(), Iterator[str])
    with open(path, "w") as file:
        file.writelines(store.export_sessions(type="claude", status=["active"], idle_for=60))
    with open(path, "rb") as lines:
        done = store.import_sessions(lines, existing="skip", dry_run=True)
    assert_type(done, Imported)
    assert_type(done.differing_ids, tuple[str, ...])
    try:
        store.import_sessions(store.export_sessions())
    except ImportFormatError as error:
        assert_type(error.line, int | None)


async def transfer_async(store: AsyncSessionStore, other: AsyncSessionStore) -> None:
    assert_type(store.export_sessions(owner="w"), AsyncIterator[str])
    assert_type(await other.import_sessions(store.export_sessions()), Imported)
    assert_type(await other.import_sessions(["{}"], existing="replace"), Imported)


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
    store.claim("id", 30)  # type: ignore[call-arg]
    store.claim("id", expected="asleep")  # type: ignore[arg-type]
    store.claim("id").release(status="asleep")  # type: ignore[arg-type]
    store.reap(60)  # type: ignore[call-arg]
    store.delete_session("id", True)  # type: ignore[call-arg]
    store.repair("id")  # type: ignore[call-arg]
    store.writer("id", True)  # type: ignore[call-arg]
    store.writer("id").write(5)  # type: ignore[arg-type]
    with store.batch() as batch:
        batch.add_output("id", 5)  # type: ignore[arg-type]
        batch.get_session("id").status  # type: ignore[attr-defined]  # noqa: B018
        batch.claim("id")  # type: ignore[attr-defined]
    store.import_sessions([], existing="merge")  # type: ignore[arg-type]
    store.import_sessions([], "skip")  # type: ignore[call-arg]
    store.import_sessions([5])  # type: ignore[list-item]


async def refused_async(store: AsyncSessionStore, client: redis.Redis) -> None:
    store.get_session("id").status  # type: ignore[attr-defined]  # noqa: B018
    session: AgentSession = store.get_session("id")  # type: ignore[assignment]
    store.update_activity("id")  # type: ignore[unused-coroutine]
    await store.update_status("id", "asleep")  # type: ignore[arg-type]
    for _ in store.get_all_sessions():  # type: ignore[attr-defined]
        pass
    AsyncSessionStore(client)  # type: ignore[arg-type]
    for _ in store.check():  # type: ignore[attr-defined]
        pass
    store.claim("id").renew()  # type: ignore[attr-defined]
    with store.claim("id"):  # type: ignore[attr-defined]
        pass
    with store.batch():  # type: ignore[attr-defined]
        pass
    async with store.batch() as batch:
        await batch.add_output("id", "x")  # type: ignore[misc]
    lease: AsyncLease = store.claim("id")  # type: ignore[assignment]
    lease.release()  # type: ignore[unused-coroutine]
    store.writer("id").write("text")  # type: ignore[unused-coroutine]
    with store.writer("id"):  # type: ignore[attr-defined]
        pass
    print(session)
