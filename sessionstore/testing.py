"""Stores for the tests of code that uses a store: no server, nothing to clean up.

    from sessionstore.testing import memory_store

    def test_my_manager():
        with memory_store() as store:
            ...

The stores run the same Lua scripts as on a server, on an in-process fakeredis (extra
``testing``). Stores that are given the same ``server`` share their sessions, like workers do.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Unpack

try:
    import fakeredis
    import fakeredis.aioredis
except ImportError as error:
    raise ImportError(
        "sessionstore.testing needs fakeredis with Lua: pip install 'sessionstore[testing]'"
    ) from error

from sessionstore.settings import SettingsArguments
from sessionstore.store import AsyncSessionStore, SessionStore

if find_spec("lupa") is None:  # fakeredis needs it for scripts, and would tell only later
    raise ImportError("sessionstore.testing needs Lua: pip install 'sessionstore[testing]'")

__all__ = ["MemoryServer", "async_memory_store", "memory_store"]

#: What several stores share, as they would a server.
MemoryServer = fakeredis.FakeServer


def memory_store(
    *,
    server: MemoryServer | None = None,
    redact: Callable[[str], str] | None = None,
    **settings: Unpack[SettingsArguments],
) -> SessionStore:
    """A ``SessionStore`` in memory; its own, unless stores share a ``server``."""
    client = fakeredis.FakeRedis(server=server or MemoryServer())
    return SessionStore(client, redact=redact, **settings)


def async_memory_store(
    *,
    server: MemoryServer | None = None,
    redact: Callable[[str], str] | None = None,
    **settings: Unpack[SettingsArguments],
) -> AsyncSessionStore:
    """An ``AsyncSessionStore`` in memory; its own, unless stores share a ``server``."""
    client = fakeredis.aioredis.FakeRedis(server=server or MemoryServer())
    return AsyncSessionStore(client, redact=redact, **settings)
