"""``sessionstore.testing``: stores in memory, for users' own tests."""

from __future__ import annotations

import asyncio
import builtins
import sys
from typing import Any

import pytest

from sessionstore import AsyncSessionStore, InvalidArgumentError, SessionStore
from sessionstore.testing import MemoryServer, async_memory_store, memory_store


def test_a_store_works_without_a_server() -> None:
    with memory_store() as store:
        assert isinstance(store, SessionStore)
        session = store.create_session("claude", "service-1", "/src")
        store.add_output(session.id, "text")
        assert store.get_session(session.id).output_buffer == ("text",)


def test_an_async_store_works_without_a_server() -> None:
    async def use() -> None:
        async with async_memory_store() as store:
            assert isinstance(store, AsyncSessionStore)
            session = await store.create_session("claude", "service-1", "/src")
            await store.add_output(session.id, "text")
            assert (await store.get_session(session.id)).output_buffer == ("text",)

    asyncio.run(use())


def test_each_store_is_alone_by_default() -> None:
    with memory_store() as one, memory_store() as other:
        one.create_session("claude", "service-1", "/src")
        assert other.get_all_sessions() == []


def test_stores_of_one_server_share_their_sessions() -> None:
    """Like two workers, or a worker in asyncio and a test that looks at what it did."""
    server = MemoryServer()

    async def work() -> str:
        async with async_memory_store(server=server) as store:
            return (await store.create_session("claude", "service-1", "/src")).id

    session_id = asyncio.run(work())
    with memory_store(server=server) as store:
        assert store.get_session(session_id).service_session_id == "service-1"


def test_sessions_outlive_a_store_of_a_shared_server() -> None:
    server = MemoryServer()
    with memory_store(server=server) as store:
        session = store.create_session("claude", "service-1", "/src")
    with memory_store(server=server) as store:
        assert store.find_session(session.id) is not None


def test_settings_and_redact_are_those_of_a_store() -> None:
    with memory_store(buffer_limit=1, namespace="mine", redact=str.upper) as store:
        session = store.create_session("claude", "service-1", "/src")
        store.add_output(session.id, "a", "b")
        assert store.get_session(session.id).output_buffer == ("B",)
        assert store.settings.namespace == "mine"
    with pytest.raises(InvalidArgumentError, match="buffer_limit"):
        memory_store(buffer_limit=-1)


def test_without_fakeredis_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "fakeredis":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.delitem(sys.modules, "sessionstore.testing")
    with pytest.raises(ImportError, match=r"pip install 'sessionstore\[testing\]'"):
        import sessionstore.testing  # noqa: F401
