"""Sentinel: the primary dies, is stopped, or is swapped, and workers go on with the other server.

What a store does while nothing happens is in the contract tests, which run on such a pair too.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import pytest
import redis
import redis.asyncio
import trustme
from conftest import PROGRAMS, SENTINEL, STYLES, Awaiting, World
from programme import Attack, controls, proves
from sentinels import OFTEN, SERVICE, Locks, PrivateSentinels
from waiting import until
from workers import Appending, Work, at_work

from sessionstore import (
    AsyncSessionStore,
    InvalidArgumentError,
    OutcomeUnknownError,
    SessionStore,
    connecting,
    sentinels,
)
from sessionstore._server import PrivateServer
from sessionstore.errors import NoReplicasError, surely_not_run
from sessionstore.settings import StoreSettings

NOBODY = "redis+sentinel://127.0.0.1:1/primary"
#: A call rides out a failover: it begins attempts for 11 s, and waits 2.5 s for a stopped server;
#: or with the second one so long that the server may answer in the end.
DEADLINE, PATIENT = 20.0, 60.0
#: Seconds until all who follow have heard of something; without news they look after 600.
HEARD = 6.0
#: Seconds after the sentinels have told: until then, an answer of the old primary may be taken.
NOTICED = sentinels.ASK_EVERY + 0.25


@pytest.fixture
def shared(running: Callable[[str], Any]) -> Any:
    """The pair of the contract tests, to which nothing happens."""
    return running(SENTINEL)


@pytest.fixture(params=STYLES)
def style(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def world_of(pair: PrivateSentinels, style: str, url: str | None = None) -> Iterator[World]:
    world = World(style, SENTINEL, pair.url)
    world.url = url or pair.url
    try:
        yield world
    finally:
        world.close()


# ---- The URL ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "asked", "service"),
    [
        ("redis+sentinel://a/primary", [("a", 26379)], "primary"),
        ("rediss+sentinel://a:1,b,c:3/my.p-1", [("a", 1), ("b", 26379), ("c", 3)], "my.p-1"),
        ("Redis+Sentinel://u:p%40,@[::1]:5,[::2]/p?db=3", [("::1", 5), ("::2", 26379)], "p"),
    ],
)
def test_a_url_names_sentinels_and_a_service(url: str, asked: Any, service: str) -> None:
    named = sentinels.parsed(url)
    assert (list(named.sentinels), named.service) == (asked, service)


@pytest.mark.parametrize("connect", [connecting.connect, connecting.connect_async])
@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_each_option_goes_to_whom_it_is_for(
    connect: Callable[..., Any], scheme: str, tmp_path: Path
) -> None:
    options = "db=3&sentinel_username=s&sentinel_password=%40t&health_check_interval=7"
    tls: dict[str, str] = {}
    if scheme == "rediss":
        tls = {"ssl_ca_certs": f"{tmp_path}/ca.pem", "ssl_certfile": f"{tmp_path}/own.pem"}
        authority = trustme.CA()
        authority.cert_pem.write_to_path(tls["ssl_ca_certs"])
        own = authority.issue_cert("worker")
        own.private_key_and_cert_chain_pem.write_to_path(tls["ssl_certfile"])
    url = f"{scheme}+sentinel://u:p%2F@a,b:5/primary?{options}" + "".join(
        f"&{name}={value}" for name, value in tls.items()
    )
    client = connect(url, StoreSettings(deadline=8))
    of_servers = client.connection_pool.connection_kwargs
    assert {
        "db": 3,
        "username": "u",
        "password": "p/",
        "health_check_interval": 7,
        **tls,
    }.items() <= (of_servers.items())
    assert client.connection_pool.timeout == 8 * 0.05
    asked = [one.connection_pool for one in client.primary._sentinels]
    assert [(one.connection_kwargs["host"], one.connection_kwargs["port"]) for one in asked] == [
        ("a", 26379),
        ("b", 5),
    ]
    for one in asked:
        assert {"username": "s", "password": "@t", **tls}.items() <= one.connection_kwargs.items()
        assert one.connection_kwargs["db"] == 0
        assert ("SSL" in one.connection_class.__name__) == (scheme == "rediss")
    assert ("TLS" in client.connection_pool.connection_class.__name__) == (scheme == "rediss")
    # An attempt may ask all sentinels, each in vain, then connect; then read, and ask them again.
    asking = sum(
        one.connection_kwargs[name]
        for one in asked
        for name in ("socket_connect_timeout", "socket_timeout")
    )
    assert asking + of_servers["socket_connect_timeout"] <= 8 * 0.15 + 1e-9
    assert asking + of_servers["socket_timeout"] <= 8 * 0.25


BAD = [
    "redis+sentinel://",
    "redis+sentinel://:hunter2@a",  # no service
    "redis+sentinel://:hunter2@a/",
    "redis+sentinel://:hunter2@a/p/0",
    "redis+sentinel://:hunter2@/p",
    "redis+sentinel://:hunter2@a,,b/p",
    "redis+sentinel://:hunter2@a:port/p",
    "redis+sentinel://:hunter2@a:99999/p",
    "redis+sentinel://:hunter2@[::1/p",
    "redis+sentinel://:hun/ter2@a/p",  # not percent-encoded
    "redis+sentinel://u:1/hunter2@a",
    "redis+sentinel://:hun?ter2@a/p",
    "redis+sentinel://:hun#ter2@a/p",
    "redis+sentinel://:hunter2@a/two words",
    "redis+sentinel://:hunter2@a/p?nothing=hunter2",
    "redis+sentinel://:hunter2@a/p?db=hunter2",
    "sentinel://:hunter2@a/p",
]


@pytest.mark.parametrize("url", BAD)
@pytest.mark.parametrize("connect", [connecting.connect, connecting.connect_async])
def test_a_bad_url_is_refused_without_its_password(connect: Callable[..., Any], url: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^url is not valid: .*sentinel") as refused:
        connect(url, StoreSettings())
    assert refused.value.argument == "url"
    assert not any(part in str(refused.value) for part in ("hunter", "ter2", "hun/"))
    assert refused.value.__suppress_context__


@pytest.mark.parametrize("store_class", [SessionStore, AsyncSessionStore])
def test_a_cluster_has_no_sentinels(store_class: type[Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^cluster must be false"):
        store_class.from_url(NOBODY, cluster=True)


def test_the_url_from_the_environment(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SESSIONSTORE_URL", f"{shared.url}?db=1")
    with SessionStore(namespace=f"test-{uuid4().hex[:12]}") as store:
        assert store.ping() is True
        client = shared.admin(shared.primary)
        with redis.Redis(port=shared.primary.port, db=1) as other:
            assert other.unlink(store.keyspace.meta) == 1  # so it is in that database
        assert client.exists(store.keyspace.meta) == 0


# ---- Failovers ----------------------------------------------------------------------------------


FAILOVERS: dict[str, Callable[[PrivateSentinels], PrivateServer]] = {
    "kill": PrivateSentinels.kill_primary,
    "stop": PrivateSentinels.stop_primary,
    "pause": PrivateSentinels.stop_primary,
    "swap": PrivateSentinels.swap,
}


class Following:
    """Who follows: blocking and in tasks, the output of one session and all events."""

    def __init__(self, url: str) -> None:
        self._open: Callable[[Any], Any] = lambda kind: kind.from_url(
            url, deadline=DEADLINE, namespace=self._namespace
        )
        self._namespace = f"test-{uuid4().hex[:12]}"
        self._store: SessionStore = self._open(SessionStore)
        self._session_id = self._store.create_session("claude", "followed", "/src").id
        self._lines: list[list[str]] = [[], []]
        self._events: list[list[str]] = [[], []]  # the ids of their sessions
        running = (self._follow, self._watch, lambda: asyncio.run(self._in_tasks()))
        self._threads = [threading.Thread(target=one, daemon=True) for one in running]
        for one in self._threads:
            one.start()
        until(lambda: self._say() and all((*self._lines, *self._events)))

    def _say(self) -> tuple[str, str]:
        line = uuid4().hex
        self._store.add_output(self._session_id, line)
        return line, self._store.create_session("claude", line, "/src").id

    def all_hear(self) -> None:
        """Say something new, and wait until all have heard of it."""
        line, created = self._say()
        until(lambda: all(one[-1] == line for one in self._lines), HEARD)
        until(lambda: all(one[-1] == created for one in self._events), HEARD)

    def end(self) -> None:
        self._store.update_status(self._session_id, "terminated")
        for one in self._threads:
            one.join(15)
            assert not one.is_alive()
        self._store.close()

    def _follow(self) -> None:
        for page in self._store.follow_output(self._session_id):
            self._lines[0] += page.chunks

    def _watch(self) -> None:
        for event in self._store.watch():
            if event.session_id == self._session_id:
                return
            self._events[0].append(event.session_id)

    async def _in_tasks(self) -> None:
        async with self._open(AsyncSessionStore) as store:
            await asyncio.gather(self._follow_in_a_task(store), self._watch_in_a_task(store))

    async def _follow_in_a_task(self, store: AsyncSessionStore) -> None:
        async for page in store.follow_output(self._session_id):
            self._lines[1] += page.chunks

    async def _watch_in_a_task(self, store: AsyncSessionStore) -> None:
        async for event in store.watch():
            if event.session_id == self._session_id:
                return
            self._events[1].append(event.session_id)


def lost_in_failovers(work: Work) -> int:
    return sum(life.lost_in_failovers for life in work.lives if isinstance(life, Appending))


@pytest.mark.parametrize("kind", FAILOVERS)
@proves("sentinel failovers", ordinary=1, full=5)
@pytest.mark.usefixtures("only_news")
def test_the_primary_goes_and_the_workers_go_on(
    pair: PrivateSentinels, kind: str, attack: Attack
) -> None:
    """Nobody gets an error, nothing is twice; lost is only what was not yet with the replica.

    A primary that was stopped goes on when the workers have done so, or before: then it carries out
    what it has been sent, and answers; so does one that was swapped. None of that counts.
    """
    failovers: list[tuple[float, float]] = []
    following = Following(pair.url)
    deadline = PATIENT if kind == "pause" else DEADLINE
    settings: dict[str, Any] = {"life": Appending, "deadline": deadline}
    with at_work(pair.url, threads=2, tasks=2, **settings) as work:
        for _ in range(attack.size):
            work.wait_for_turns(50)
            pair.wait_until_replicated()
            began = time.monotonic()
            old = FAILOVERS[kind](pair)
            failovers.append((began - 1.0, time.monotonic() + NOTICED))
            time.sleep(NOTICED)
            if kind == "pause":
                old.signal(signal.SIGCONT)
            work.wait_for_turns(50)
            following.all_hear()
            if kind == "kill":
                old.start()
            if kind == "stop":
                old.signal(signal.SIGCONT)
            pair.wait_until_well()
        work.wait_for_turns(50)
    following.end()
    wrong = work.broken(failovers=failovers)
    attack.tell(
        injected=len(failovers),
        wrong=wrong,
        **work.seen(),
        lost_in_failovers=lost_in_failovers(work),
    )
    took = [end - begin - 1.0 - NOTICED for begin, end in failovers]
    print(f"{kind}: until the sentinels told of the other server, at most {max(took):.2f} s")


@proves("sentinel failovers", ordinary=1, full=5)
def test_a_planned_failover_with_a_replica_required(pair: PrivateSentinels, attack: Attack) -> None:
    """Lost is only what is on its way to the replica when that is made primary.

    The old primary takes no writes once its replica is gone, and the new one none until the old one
    is its replica.
    """
    pair.require_replicas(1)
    failovers: list[tuple[float, float]] = []
    with at_work(pair.url, threads=2, tasks=2, life=Appending, deadline=PATIENT) as work:
        for _ in range(attack.size):
            work.wait_for_turns(50)
            began = time.monotonic()
            pair.swap(publish=OFTEN)
            failovers.append((began, time.monotonic() + NOTICED))
            work.wait_for_turns(50)
            pair.wait_until_well()
    wrong, lost = work.broken(failovers=failovers), lost_in_failovers(work)
    wrong += max(0, lost - 20 * attack.size)  # thousands otherwise
    attack.tell(injected=attack.size, wrong=wrong, **work.seen(), lost_in_failovers=lost)


@pytest.mark.parametrize("sentinel_program", [name for name in PROGRAMS if name == "valkey"])
@proves("sentinel failovers", ordinary=1, full=5)
def test_a_coordinated_failover_loses_nothing(pair: PrivateSentinels, attack: Attack) -> None:
    """The old primary takes no writes before the new one has all of them (Valkey 9)."""
    with at_work(pair.url, threads=2, tasks=2, life=Appending, deadline=DEADLINE) as work:
        for _ in range(attack.size):
            work.wait_for_turns(50)
            pair.swap("COORDINATED")
            work.wait_for_turns(50)
            pair.wait_until_well()
    attack.tell(injected=attack.size, wrong=work.broken(), **work.seen())


@controls("sentinel failovers", ordinary=1)
def test_who_asks_seldom_writes_to_the_old_primary(
    pair: PrivateSentinels, attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks only when connecting, as redis-py does, until the sentinels make it a replica."""
    monkeypatch.setattr(sentinels, "ASK_EVERY", 3.0)
    with at_work(pair.url, threads=2, tasks=2, life=Appending, deadline=DEADLINE) as work:
        work.wait_for_turns(50)
        began = time.monotonic()
        pair.swap()
        failovers = [(began - 1.0, time.monotonic() + NOTICED)]
        time.sleep(NOTICED)
        work.wait_for_turns(50)
        pair.wait_until_well()
        work.wait_for_turns(50)
    wrong = work.broken(failovers=failovers)
    attack.tell(injected=1, wrong=wrong, **work.seen(), lost_in_failovers=lost_in_failovers(work))


def test_connections_that_were_idle_are_not_used_for_the_old_primary(
    pair: PrivateSentinels, style: str
) -> None:
    with world_of(pair, style) as world:
        store = world.store()
        session_id = store.create_session("claude", "s", "/src").id
        pair.wait_until_replicated()
        old = pair.stop_primary()
        world.sleep(sentinels.ASK_EVERY)
        began = time.monotonic()
        store.add_output(session_id, "line")
        assert time.monotonic() - began < 1.0  # it has not waited for the one that is stopped
        old.signal(signal.SIGCONT)
        key = f"{world.prefix_of(session_id)}session:{session_id}:output"
        assert pair.admin(pair.primary).lrange(key, 0, -1) == ["line"]


def test_a_client_of_master_for_is_used_as_it_is(pair: PrivateSentinels) -> None:
    addresses = [("127.0.0.1", one.port) for one in pair.sentinels]

    async def in_a_task(session_id: str) -> int:
        sentinel: Any = redis.asyncio.Sentinel(addresses)
        client = sentinel.master_for(SERVICE)
        store = AsyncSessionStore(client, namespace="test-handed-in")
        total = await store.add_output(session_id, "line")
        await client.aclose()
        for one in sentinel.sentinels:
            await one.aclose()
        return total

    client: Any = redis.Sentinel(addresses).master_for(SERVICE)
    with SessionStore(client, namespace="test-handed-in") as store:
        session_id = store.create_session("claude", "s", "/src").id
        pair.wait_until_replicated()
        assert asyncio.run(in_a_task(session_id)) == 1
        pair.kill_primary()
        total = 0

        def goes_on() -> bool:
            nonlocal total
            with suppress(redis.ConnectionError, OutcomeUnknownError):
                total = store.add_output(session_id, "line")
            return total > 1

        until(goes_on)
        assert asyncio.run(in_a_task(session_id)) == total + 1


@pytest.mark.parametrize(
    ("store_class", "of"), [(SessionStore, redis), (AsyncSessionStore, redis.asyncio)]
)
def test_neither_sentinels_nor_replicas_are_a_client(store_class: type[Any], of: Any) -> None:
    sentinel = of.Sentinel([("127.0.0.1", 1)])
    with pytest.raises(InvalidArgumentError, match=r"^client must be what master_for gives"):
        store_class(sentinel)
    with pytest.raises(InvalidArgumentError, match=r"^client must be of the primary"):
        store_class(sentinel.slave_for(SERVICE))
    store_class(sentinel.master_for(SERVICE))


# ---- The sentinels ------------------------------------------------------------------------------


@contextmanager
def silent() -> Iterator[str]:
    """An address that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_sentinels_that_are_down_or_silent_do_not_matter(shared: Any, style: str) -> None:
    with silent() as one, silent() as other:
        url = shared.url.replace("//", f"//{one},127.0.0.1:1,{other},")
        with world_of(shared, style, url) as world:
            began = time.monotonic()
            store = world.store()
            store.create_session("claude", "s", "/src")
            assert time.monotonic() - began < 1.0
            for _ in range(3):  # from now on the one that told is asked first
                world.sleep(sentinels.ASK_EVERY)
                began = time.monotonic()
                store.get_metrics()
                assert time.monotonic() - began < 0.1


@pytest.mark.parametrize("deadline", [1.0, 4.0])
def test_a_call_ends_in_time_when_all_sentinels_are_silent(style: str, deadline: float) -> None:
    kind: Any = SessionStore if style == "sync" else AsyncSessionStore
    with silent() as one, silent() as other, asyncio.Runner() as runner:
        store = kind.from_url(f"redis+sentinel://{one},{other}/{SERVICE}", deadline=deadline)
        blocking: Any = store if style == "sync" else Awaiting(store, runner)
        began = time.monotonic()
        with blocking, pytest.raises(redis.ConnectionError, match="no sentinel answers"):
            blocking.create_session("claude", "s", "/src")
        assert time.monotonic() - began < deadline + 0.5


def test_a_service_that_no_sentinel_knows(shared: Any, style: str) -> None:
    url = shared.url.replace(SERVICE, "nobody")
    with (
        world_of(shared, style, url) as world,
        pytest.raises(redis.ConnectionError, match="knows no service 'nobody'"),
    ):
        world.store(deadline=2.0).create_session("claude", "s", "/src")


def test_the_primary_is_enough_when_all_sentinels_are_away(
    pair: PrivateSentinels, style: str
) -> None:
    """For connections that are there and for new ones; a call or two wait for silent sentinels."""
    with world_of(pair, style) as world:
        store = world.store()
        session_id = store.create_session("claude", "s", "/src").id
        primary = pair.admin(pair.primary)
        pair.sentinels[0].kill()
        for one in pair.sentinels[1:]:
            one.signal(signal.SIGSTOP)
        for number in range(10):
            assert store.add_output(session_id, "line") == number + 1
            world.sleep(0.1)
            if number == 5:
                primary.client_kill_filter(_type="normal")


def test_a_call_ends_in_time_when_all_are_stopped(pair: PrivateSentinels, style: str) -> None:
    with world_of(pair, style) as world:
        store = world.store(deadline=2.0)
        session_id = store.create_session("claude", "s", "/src").id
        for one in (*pair.servers, *pair.sentinels):
            one.signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(OutcomeUnknownError):
            store.add_output(session_id, "line")
        assert time.monotonic() - began < 2.5
        for one in (*pair.servers, *pair.sentinels):
            one.signal(signal.SIGCONT)
        world.sleep(0.2)


# ---- Passwords and TLS --------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[name for name in PROGRAMS if name == "redis"])
def locked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PrivateSentinels]:
    """A pair with passwords, other ones for the sentinels, and TLS between all.

    Valkey's wheel is built without TLS.
    """
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("", "other-"):  # each signed by itself
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"),
                *("-pkeyopt", "ec_paramgen_curve:prime256v1"),
                *("-subj", "/CN=tests", "-addext", "subjectAltName=IP:127.0.0.1"),
                *("-keyout", folder / f"{name}key.pem", "-out", folder / f"{name}ca.pem"),
            ],
            check=True,
            capture_output=True,
        )
    shutil.copy(folder / "ca.pem", folder / "cert.pem")
    locks = Locks(folder, "of-servers", "of-sentinels")
    with PrivateSentinels(PROGRAMS[request.param], locks=locks) as started:
        yield started


def url_of(pair: PrivateSentinels, **changes: str) -> str:
    locks = pair.locks
    assert locks is not None
    options = {
        "sentinel_password": locks.sentinel_password,
        "ssl_ca_certs": str(locks.certificates / "ca.pem"),
        **changes,
    }
    locked = pair.url.replace("redis+sentinel://", f"rediss+sentinel://:{locks.password}@")
    return f"{locked}?{urlencode(options)}"


def test_servers_and_sentinels_with_passwords_and_tls(locked: PrivateSentinels) -> None:
    url, name = url_of(locked), f"test-{uuid4().hex[:12]}"
    with (
        asyncio.Runner() as runner,
        SessionStore.from_url(url, namespace=name) as store,
        Awaiting(AsyncSessionStore.from_url(url, namespace=name), runner) as other,
    ):
        session_id = store.create_session("claude", "s", "/src").id
        assert other.add_output(session_id, "before") == 1
        locked.wait_until_replicated()
        locked.swap()
        assert store.add_output(session_id, "after") == 2
        assert other.get_session(session_id).output_buffer == ("before", "after")


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"sentinel_password": "wrong"}, redis.AuthenticationError, "a sentinel refuses"),
        ({"ssl_ca_certs": "other-ca.pem"}, redis.ConnectionError, "CERTIFICATE_VERIFY_FAILED"),
    ],
)
def test_a_wrong_password_or_authority_is_told(
    locked: PrivateSentinels, style: str, changes: dict[str, str], error: type[Exception], told: str
) -> None:
    assert locked.locks is not None
    if "ssl_ca_certs" in changes:
        changes = {"ssl_ca_certs": str(locked.locks.certificates / changes["ssl_ca_certs"])}
    kind: Any = SessionStore if style == "sync" else AsyncSessionStore
    with asyncio.Runner() as runner:
        url = url_of(locked, **changes)
        first, _, rest = url.partition(",")  # the others would say the same
        store = kind.from_url(f"{first}/{rest.partition('/')[2]}", deadline=2.0)
        blocking: Any = store if style == "sync" else Awaiting(store, runner)
        with blocking, pytest.raises(error, match=told) as refused:
            blocking.create_session("claude", "s", "/src")
        assert "of-sentinels" not in str(refused.value)


# ---- Servers that take no writes ----------------------------------------------------------------


@contextmanager
def lacking_replicas(pair: PrivateSentinels) -> Iterator[None]:
    pair.require_replicas(2)
    try:
        yield
    finally:
        pair.require_replicas(0)


def test_a_write_waits_until_there_are_enough_replicas(shared: Any, style: str) -> None:
    with world_of(shared, style) as world:
        store = world.store()
        session_id = store.create_session("claude", "s", "/src").id
        back = threading.Event()

        def come_back() -> None:
            with lacking_replicas(shared):
                back.set()
                time.sleep(0.7)

        with_too_few = threading.Thread(target=come_back)
        with_too_few.start()
        assert back.wait(5)
        began = time.monotonic()
        assert store.add_output(session_id, "line") == 1
        assert time.monotonic() - began > 0.5
        with_too_few.join()


def test_a_write_that_found_too_few_replicas_has_not_happened(shared: Any, style: str) -> None:
    with world_of(shared, style) as world:
        store = world.store(deadline=0.5)
        session_id = store.create_session("claude", "s", "/src").id
        with lacking_replicas(shared), pytest.raises(NoReplicasError) as refused:
            store.add_output(session_id, "line")
        assert surely_not_run(refused.value)
        assert store.get_session(session_id).output_total == 0
