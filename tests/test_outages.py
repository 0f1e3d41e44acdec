"""The bad days: a server that is gone, stopped, full, or has forgotten its scripts."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from signal import SIGCONT, SIGSTOP
from typing import Any, Self

import pytest
import redis
from conftest import World
from faults import Fault, FaultyWorld, contents, seeded
from programme import Attack, controls, proves
from waiting import until
from workers import at_work

from sessionstore import (
    AsyncSessionStore,
    OutcomeUnknownError,
    ServiceSessionInUseError,
    SessionNotFoundError,
    SessionStatusError,
    SessionStore,
)
from sessionstore._server import PrivateServer

OUTAGE = 3.0  # seconds
BETWEEN_FLUSHES = 0.05  # seconds
DEADLINE = 1.0
GRACE = 0.5  # seconds over the deadline that a call may take


# ---- The server is gone for a while -------------------------------------------------------


def restart(server: PrivateServer, *arguments: str) -> None:
    """Start a server anew, with further arguments: the last of a kind counts."""
    server.arguments += arguments
    server.kill()
    server.start()


@pytest.mark.parametrize("policy", ["always", "everysec"])
@proves("server killed", ordinary=1, full=15)
def test_a_server_killed_under_load_loses_nothing_and_nobody_notices(
    own_server: PrivateServer, policy: str, attack: Attack
) -> None:
    """What it has acknowledged is in the append-only file: in the kernel's hands at least."""
    rng = seeded()
    restart(own_server, "--appendfsync", policy)
    with at_work(own_server.url, threads=4, tasks=4) as work:
        for kill in range(attack.size):
            work.wait_for_turns(3)
            time.sleep(rng.uniform(0.0, 0.1))
            own_server.kill()
            time.sleep(OUTAGE if kill == 0 else rng.uniform(0.0, 1.0))
            own_server.start()
        work.wait_for_turns(3)
    attack.tell(injected=attack.size, wrong=work.broken(), **work.seen())


@controls("server killed", ordinary=1)
def test_without_an_append_only_file_all_that_was_acknowledged_is_lost(
    own_server: PrivateServer, attack: Attack
) -> None:
    restart(own_server, "--appendonly", "no")
    with at_work(own_server.url, threads=4, tasks=4) as work:
        work.wait_for_turns(3)
        own_server.kill()
        own_server.start()
    attack.tell(injected=attack.size, wrong=work.broken(), **work.seen())


# ---- Every call, on a server that does not answer -----------------------------------------

READS: dict[str, Callable[[Any], Any]] = {
    "get_session": lambda store: store.get_session("some-id"),
    "get_session-tail": lambda store: store.get_session("some-id", tail=0),
    "find_session": lambda store: store.find_session("some-id"),
    "find_session-tail": lambda store: store.find_session("some-id", tail=0),
    "find_session_by_service_id": lambda store: store.find_session_by_service_id("service"),
    "get_all_sessions": lambda store: store.get_all_sessions(),
    "get_sessions_by_type": lambda store: store.get_sessions_by_type("claude"),
    "find_sessions": lambda store: store.find_sessions(status="active"),
    "get_metrics": lambda store: store.get_metrics(),
    "read_output": lambda store: store.read_output("some-id"),
    "read_errors": lambda store: store.read_errors("some-id"),
    "ping": lambda store: store.ping(),
}
WRITES: dict[str, Callable[[Any], Any]] = {
    "create_session": lambda store: store.create_session("claude", "service", "/src"),
    "update_status": lambda store: store.update_status("some-id", "busy"),
    "update_activity": lambda store: store.update_activity("some-id"),
    "add_output": lambda store: store.add_output("some-id", "line"),
    "add_error": lambda store: store.add_error("some-id", "line"),
    "update_metadata": lambda store: store.update_metadata("some-id", {"a": "b"}),
    "delete_session": lambda store: store.delete_session("some-id"),
}
CALLS = READS | WRITES


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns or raises, and how many seconds it takes."""
    began = time.monotonic()
    try:
        outcome = call()
    except Exception as error:
        outcome = error
    return outcome, time.monotonic() - began


async def timed_async(call: Callable[[], Awaitable[Any]]) -> tuple[Any, float]:
    began = time.monotonic()
    try:
        outcome = await call()
    except Exception as error:
        outcome = error
    return outcome, time.monotonic() - began


class Silence:
    """Stores with a deadline of one second, and what each of their calls does in it."""

    def __init__(self, style: str, url: str) -> None:
        self.style = style
        self.runner = asyncio.Runner()
        cls: Any = SessionStore if style == "sync" else AsyncSessionStore
        self.store = cls.from_url(url, deadline=DEADLINE)
        self.stranger = cls.from_url(url, deadline=DEADLINE)  # has never seen the server

    def warm_up(self) -> None:
        """Open a connection for each of the calls to come; a busy machine may take a while."""
        until(self._warmed_up)

    def _warmed_up(self) -> bool:
        try:
            self._ping_together()
        except redis.RedisError:
            return False
        return True

    def _ping_together(self) -> None:
        if self.style == "sync":
            with ThreadPoolExecutor(len(CALLS)) as pool:
                list(pool.map(lambda _: self.store.ping(), range(len(CALLS))))
        else:

            async def pings() -> None:
                await asyncio.gather(*(self.store.ping() for _ in CALLS))

            self.runner.run(pings())

    def outcomes(self, store: Any, names: list[str]) -> dict[str, tuple[Any, float]]:
        """The outcome of each call, all made at the same time."""
        if self.style == "sync":
            with ThreadPoolExecutor(len(names)) as pool:
                found = list(pool.map(lambda name: timed(lambda: CALLS[name](store)), names))
        else:

            async def together() -> list[tuple[Any, float]]:
                await asyncio.sleep(0.01)  # a loop that runs hears that a server is gone
                return await asyncio.gather(
                    *(timed_async(lambda name=name: CALLS[name](store)) for name in names)
                )

            found = self.runner.run(together())
        return dict(zip(names, found, strict=True))

    def late(self, store: Any) -> dict[str, list[float]]:
        """The calls that are over deadline and grace three times out of three.

        A busy machine may hold up any call once; what waits too long by design always does.
        """
        names, took = list(CALLS), {name: [] for name in CALLS}
        for _ in range(3):
            for name, (_, seconds) in self.outcomes(store, names).items():
                took[name].append(seconds)
            names = [name for name in names if took[name][-1] > DEADLINE + GRACE]
            if not names:
                break
        return {name: took[name] for name in names}

    def close(self) -> None:
        for store in (self.store, self.stranger):
            closing = store.close()
            if closing is not None:
                self.runner.run(closing)
        self.runner.close()


@pytest.fixture(params=["sync", "async"])
def silence(request: pytest.FixtureRequest, own_server: PrivateServer) -> Iterator[Silence]:
    opened = Silence(request.param, own_server.url)
    opened.warm_up()
    yield opened
    opened.close()


@pytest.fixture
def stopped(silence: Silence, own_server: PrivateServer) -> Iterator[Silence]:
    """The server takes connections and never answers."""
    own_server.signal(SIGSTOP)
    yield silence
    own_server.signal(SIGCONT)


@pytest.fixture
def hasty(silence: Silence, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001  when warm
    """Stores soon begin no more attempts, where only the outcome matters, not when it comes."""
    monkeypatch.setattr("sessionstore.attempts.ATTEMPTS_SHARE", 0.1)


@pytest.fixture
def dead(silence: Silence, own_server: PrivateServer) -> Silence:
    """The server refuses connections."""
    own_server.kill()
    return silence


def test_every_call_to_a_stopped_server_ends_within_its_deadline(stopped: Silence) -> None:
    assert stopped.late(stopped.store) == {}
    assert stopped.late(stopped.stranger) == {}


@pytest.mark.usefixtures("hasty")
def test_every_call_to_a_stopped_server_raises(stopped: Silence) -> None:
    outcomes = stopped.outcomes(stopped.store, list(CALLS))

    for name, (outcome, _) in outcomes.items():
        assert isinstance(outcome, redis.RedisError), name
        assert isinstance(outcome, OutcomeUnknownError) == (name in WRITES), name


def test_every_call_to_a_dead_server_ends_within_its_deadline(dead: Silence) -> None:
    assert dead.late(dead.store) == {}
    assert dead.late(dead.stranger) == {}


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("which", ["store", "stranger"])
def test_a_dead_server_never_looks_empty_and_surely_has_run_nothing(
    dead: Silence, which: str
) -> None:
    outcomes = dead.outcomes(getattr(dead, which), list(CALLS))

    for name, (outcome, _) in outcomes.items():
        assert isinstance(outcome, redis.ConnectionError), f"{name}: {outcome!r}"


def test_the_default_client_waits_much_longer_for_a_stopped_server(
    own_server: PrivateServer,
) -> None:
    client = redis.Redis(port=own_server.port)
    client.ping()
    own_server.signal(SIGSTOP)
    waiting = threading.Thread(target=timed, args=(client.ping,), daemon=True)
    waiting.start()
    waiting.join(DEADLINE + GRACE)
    still_waits = waiting.is_alive()
    own_server.signal(SIGCONT)
    waiting.join()
    client.close()

    assert still_waits


# ---- SCRIPT FLUSH -------------------------------------------------------------------------


class Flusher:
    """SCRIPT FLUSH again and again, also of a server that comes and goes."""

    def __init__(self, server: PrivateServer) -> None:
        self.flushes = 0
        self._client = redis.Redis(port=server.port)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._is_over.wait(BETWEEN_FLUSHES):
            with suppress(redis.RedisError):
                self._client.script_flush()
                self.flushes += 1

    def refused(self) -> int:
        """How often the server has had to say that it knows no such script, since its start."""
        told: Any = self._client.info("errorstats")
        return int(told.get("errorstat_NOSCRIPT", {"count": 0})["count"])

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._client.close()


@pytest.mark.parametrize("style", ["sync", "async"])
@proves("script flush", ordinary=300, full=5_000)
def test_script_flush_at_any_time_is_not_noticed(
    own_server: PrivateServer, style: str, attack: Attack
) -> None:
    restarts = 10 if attack.in_full else 1
    kind = {"threads": 4} if style == "sync" else {"tasks": 4}
    refused = 0
    with Flusher(own_server) as flusher, at_work(own_server.url, **kind) as work:
        for part in range(1, restarts + 1):
            until(lambda: work.calls() >= attack.size * part // (restarts + 1))  # noqa: B023
            refused += flusher.refused()
            own_server.kill()
            own_server.start()
        until(lambda: work.calls() >= attack.size)
        refused += flusher.refused()
    assert flusher.flushes >= 2
    attack.tell(
        injected=work.calls(),
        wrong=work.broken(),
        flushes=flusher.flushes,
        restarts=restarts,
        scripts_unknown_to_the_server=refused,
        **work.seen(),
    )


@controls("script flush", ordinary=300, full=5_000)
def test_evalsha_alone_notices_script_flush(own_server: PrivateServer, attack: Attack) -> None:
    calls = noticed = 0
    with Flusher(own_server) as flusher, redis.Redis(port=own_server.port) as client:
        digest = client.script_load("return 1")
        while calls < attack.size or flusher.flushes < 2:
            calls += 1
            try:
                client.evalsha(digest, 0)
            except redis.exceptions.NoScriptError:
                noticed += 1
                client.script_load("return 1")
    attack.tell(injected=calls, wrong=noticed, flushes=flusher.flushes)


# ---- Few connections ----------------------------------------------------------------------


def test_many_threads_share_one_connection(server: PrivateServer) -> None:
    world = FaultyWorld("sync", server)
    try:
        store = world.store(max_connections=1)
        session_id = store.create_session("claude", "service", "/src").id
        with ThreadPoolExecutor(16) as pool:
            totals = pool.map(lambda n: store.add_output(session_id, f"{n}"), range(320))
            assert sorted(totals) == list(range(1, 321))
    finally:
        world.close()


def test_many_tasks_share_one_connection(server: PrivateServer) -> None:
    world = FaultyWorld("async", server)
    try:
        store = world.store(max_connections=1)
        session_id = store.create_session("claude", "service", "/src").id

        async def together() -> list[int]:
            appends = (store.store.add_output(session_id, f"{n}") for n in range(320))
            return await asyncio.gather(*appends)

        assert world.runner is not None
        assert sorted(world.runner.run(together())) == list(range(1, 321))
    finally:
        world.close()


def test_a_pool_that_does_not_block_fails_with_one_connection(server: PrivateServer) -> None:
    pool = redis.ConnectionPool(port=server.port, max_connections=1)
    client = redis.Redis(connection_pool=pool)

    with (
        ThreadPoolExecutor(16) as threads,
        pytest.raises(redis.exceptions.MaxConnectionsError),
    ):
        list(threads.map(lambda _: client.ping(), range(2000)))
    pool.disconnect()


# ---- Full memory --------------------------------------------------------------------------


class FullServer:
    """A server whose memory is full, with one session in it and one that will not be there."""

    def __init__(self, server: PrivateServer) -> None:
        self.raw = redis.Redis(port=server.port)
        self.store = SessionStore.from_url(server.url)
        self.session_id = self.store.create_session("claude", "service", "/src", "task").id
        self.store.add_output(self.session_id, "line")
        self.store.update_metadata(self.session_id, {"branch": "main"})
        self.raw.config_set("maxmemory", 1)

    def contents(self) -> dict[bytes, bytes]:
        return contents(self.raw, self.store.keyspace.all[0].prefix)

    def close(self) -> None:
        self.raw.config_set("maxmemory", 0)
        self.store.close()
        self.raw.close()


@pytest.fixture
def full(own_server: PrivateServer) -> Iterator[FullServer]:
    opened = FullServer(own_server)
    yield opened
    opened.close()


GROWING: dict[str, Callable[[SessionStore, str], Any]] = {
    "create_session": lambda store, _: store.create_session("codex", "other", "/src"),
    "add_output": lambda store, session_id: store.add_output(session_id, "more"),
    "add_error": lambda store, session_id: store.add_error(session_id, "more"),
    "update_metadata": lambda store, session_id: store.update_metadata(session_id, {"a": "b"}),
}


@pytest.mark.parametrize("name", GROWING)
def test_full_memory_refuses_what_grows_and_changes_nothing(full: FullServer, name: str) -> None:
    before = full.contents()

    with pytest.raises(redis.exceptions.OutOfMemoryError):
        GROWING[name](full.store, full.session_id)

    assert full.contents() == before


READING: dict[str, Callable[[Any, str], Any]] = {
    "get_session": lambda store, session_id: store.get_session(session_id).output_buffer,
    "get_session, tail=1": lambda store, known: store.get_session(known, tail=1).output_buffer,
    "find_session": lambda store, session_id: store.find_session(session_id).output_buffer,
    "get_all_sessions": lambda store, _: store.get_all_sessions()[0].output_buffer,
    "read_output": lambda store, session_id: store.read_output(session_id).chunks,
}


@pytest.mark.parametrize("style", ["sync", "async"])
def test_everything_can_be_read_at_full_memory(own_server: PrivateServer, style: str) -> None:
    """Redis 7.0 refuses MULTI then, even to commands that only read."""
    full = FullServer(own_server)
    world = World(style, own_server.program.name.lower(), own_server.url)
    try:
        store = world.store(namespace=full.store.settings.namespace)
        found = {name: read(store, full.session_id) for name, read in READING.items()}
        assert found == dict.fromkeys(READING, ("line",))
        assert store.ping() is True
    finally:
        full.close()
        world.close()


def test_a_session_can_be_deleted_at_full_memory(full: FullServer) -> None:
    assert full.store.delete_session(full.session_id) is True

    prefix = full.store.keyspace.all[0].prefix
    assert set(full.contents()) == {f"{prefix}{name}".encode() for name in ("meta", "events")}


@pytest.mark.parametrize("status", ["busy", "terminated"])
def test_a_status_can_be_changed_at_full_memory(full: FullServer, status: Any) -> None:
    full.store.update_status(full.session_id, status, expected="active")

    assert full.store.get_session(full.session_id, tail=0).status == status
    assert [one.id for one in full.store.find_sessions(status=status)] == [full.session_id]
    assert full.store.get_metrics().active_sessions == 0


def test_metadata_can_be_removed_at_full_memory(full: FullServer) -> None:
    full.store.update_metadata(full.session_id, {"branch": None})

    assert full.store.get_session(full.session_id, tail=0).metadata == {}


REFUSED: dict[str, tuple[type[Exception], Callable[[SessionStore, str], Any]]] = {
    "status": (
        SessionStatusError,
        lambda store, session_id: store.update_status(session_id, "busy", expected="starting"),
    ),
    "in-use": (
        ServiceSessionInUseError,
        lambda store, _: store.create_session("claude", "service", "/src", unique=True),
    ),
    "missing-output": (SessionNotFoundError, lambda store, _: store.add_output("no-such-id", "x")),
    "missing-status": (
        SessionNotFoundError,
        lambda store, _: store.update_status("no-such-id", "busy"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_given_and_remembered_at_full_memory(full: FullServer, name: str) -> None:
    error, call = REFUSED[name]

    with pytest.raises(error) as caught:
        call(full.store, full.session_id)

    (lane,) = full.raw.scan_iter(f"{full.store.keyspace.all[0].prefix}lane:*")
    assert f" {getattr(caught.value, 'code', None)} ".encode() in full.raw.get(lane)


def test_deleting_what_is_not_there_answers_no_at_full_memory(full: FullServer) -> None:
    assert full.store.delete_session("no-such-session") is False


@pytest.mark.parametrize("style", ["sync", "async"])
def test_a_write_whose_reply_was_lost_is_answered_though_memory_is_full_by_now(
    own_server: PrivateServer, style: str
) -> None:
    world = FaultyWorld(style, own_server)
    try:
        session_id = world.direct.create_session("claude", "service", "/src").id
        world.proxy.on_fault = lambda: world.redis.config_set("maxmemory", 1)
        world.proxy.plan([Fault.LOSE_REPLY])

        assert world.store().add_output(session_id, "line") == 1

        assert world.proxy.injected == {Fault.LOSE_REPLY: 1}
        assert world.direct.read_output(session_id).chunks == ("line",)
    finally:
        world.redis.config_set("maxmemory", 0)
        world.close()
