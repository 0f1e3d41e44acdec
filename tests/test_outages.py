"""The bad days: a server that is gone, stopped, full, or has forgotten its scripts."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from itertools import repeat
from signal import SIGCONT, SIGSTOP
from typing import Any, Self

import pytest
import redis
from conftest import World
from faults import Fault, FaultProxy, FaultyWorld, contents, seeded
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
from sessionstore._operation import feed, operation
from sessionstore._server import PrivateServer
from sessionstore.operations import SessionOperations
from sessionstore.testing import memory_store

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


@pytest.mark.parametrize("policy", ["always", "no"])
@proves("server killed", ordinary=1, full=15)
def test_a_server_killed_under_load_loses_nothing_and_nobody_notices(
    own_server: PrivateServer, policy: str, attack: Attack
) -> None:
    """What it has acknowledged is in its append-only file: in the kernel's hands at least."""
    rng = seeded()
    restart(own_server, "--appendfsync", policy)
    with at_work(own_server.url, threads=4, tasks=4) as work:
        for kill in range(attack.size):
            work.wait_for_turns(3)
            time.sleep(rng.uniform(0.0, 0.1))
            own_server.kill()
            time.sleep(OUTAGE if (policy, kill) == ("always", 0) else rng.uniform(0.0, 1.0))
            own_server.start()
        work.wait_for_turns(3)
    attack.tell(injected=attack.size, wrong=work.broken(), **work.seen())


@proves("server killed", ordinary=1, full=10)
def test_what_is_left_of_a_kill_is_whole_though_the_server_writes_once_a_second(
    own_server: PrivateServer, attack: Attack
) -> None:
    """With ``everysec`` a kill may cost up to two seconds of writes while the disk is slow.

    Of 12 kills with a disk that took 0.7 s to sync, 7 cost up to 3,988 acknowledged writes of bare
    redis-py; with ``always`` or ``no`` none did.
    """
    rng = seeded()
    restart(own_server, "--appendfsync", "everysec")
    wrong = 0
    seen: Counter[str] = Counter()
    for _ in range(attack.size):
        with at_work(own_server.url, threads=4, tasks=4, deadline=2.0) as work:
            work.wait_for_turns(3)
            time.sleep(rng.uniform(0.0, 1.0) if attack.in_full else 0.0)
            own_server.kill()
        own_server.start()
        wrong += work.torn()
        seen += Counter(work.seen() | {"lines_lost_by_everysec": work.lost()})
    attack.tell(injected=attack.size, wrong=wrong, **{"lines_lost_by_everysec": 0} | seen)


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


def first(iterator: Any) -> Any:
    """An iterator's first item, or what to await for it."""
    return anext(iterator) if isinstance(iterator, AsyncIterator) else next(iterator)


def in_a_batch(store: Any) -> Any:
    """The result of an append in a batch, or what to await for it."""
    if isinstance(store, SessionStore):
        with store.batch() as batch:
            outcome = batch.add_output("some-id", "line")
        return outcome.result()

    async def awaited() -> int:
        async with store.batch() as batch:
            outcome = batch.add_output("some-id", "line")
        return outcome.result()

    return awaited()


def small_export() -> list[str]:
    with memory_store() as source:
        source.create_session("claude", "service", "/src")
        return list(source.export_sessions())


EXPORT = small_export()

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
    "drift": lambda store: store.drift(),
    "iter_sessions": lambda store: first(store.iter_sessions()),
    "export_sessions": lambda store: first(store.export_sessions()),
    "follow_output": lambda store: first(store.follow_output("some-id")),
    "follow_errors": lambda store: first(store.follow_errors("some-id")),
    "watch": lambda store: first(store.watch()),
    "watch-oldest": lambda store: first(store.watch("0")),
    "check": lambda store: first(store.check()),
    "repair": lambda store: first(store.repair()),  # which reads first
}
WRITES: dict[str, Callable[[Any], Any]] = {
    "create_session": lambda store: store.create_session("claude", "service", "/src"),
    "update_status": lambda store: store.update_status("some-id", "busy"),
    "update_activity": lambda store: store.update_activity("some-id"),
    "add_output": lambda store: store.add_output("some-id", "line"),
    "add_error": lambda store: store.add_error("some-id", "line"),
    "update_metadata": lambda store: store.update_metadata("some-id", {"a": "b"}),
    "delete_session": lambda store: store.delete_session("some-id"),
    "claim": lambda store: store.claim("some-id"),
    "claim-wait": lambda store: store.claim("some-id", wait=60),
    "reap": lambda store: store.reap(idle_for=1),
    "import_sessions": lambda store: store.import_sessions(EXPORT),
    "batch": in_a_batch,
}
CALLS = READS | WRITES


def test_every_operation_is_among_the_calls() -> None:
    shown = vars(SessionOperations).items()
    operations = {name for name, value in shown if isinstance(value, (operation, feed))}

    assert {name.partition("-")[0] for name in CALLS} == (
        operations | {"claim", "batch", "import_sessions"}
    )


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

    def __init__(self, style: str, url: str, **settings: Any) -> None:
        self.style = style
        self.runner = asyncio.Runner()
        cls: Any = SessionStore if style == "sync" else AsyncSessionStore
        self.store = cls.from_url(url, deadline=DEADLINE, **settings)
        self.stranger = cls.from_url(url, deadline=DEADLINE)  # has never seen the server
        until(self._warmed_up)

    def _warmed_up(self) -> bool:
        """Open a connection for each of the calls to come; a busy machine may take a while."""
        outcomes = self.together([self.store.ping] * len(CALLS))
        return all(outcome is True for outcome, _ in outcomes)

    def together(self, calls: Sequence[Callable[[], Any]]) -> list[tuple[Any, float]]:
        """What each call returns or raises, and its seconds; all are made at the same time."""
        if self.style == "sync":
            with ThreadPoolExecutor(len(calls)) as pool:
                return list(pool.map(timed, calls))

        async def gathered() -> list[tuple[Any, float]]:
            await asyncio.sleep(0.01)  # a loop that runs hears that a server is gone
            return await asyncio.gather(*map(timed_async, calls))

        return self.runner.run(gathered())

    def outcomes(self, store: Any) -> dict[str, Any]:
        """What each of the calls returns or raises."""
        found = self.together([partial(call, store) for call in CALLS.values()])
        return {name: outcome for name, (outcome, _) in zip(CALLS, found, strict=True)}

    def close(self) -> None:
        for store in (self.store, self.stranger):
            closing = store.close()
            if closing is not None:
                self.runner.run(closing)
        self.runner.close()


@contextmanager
def falling_silent(how: str, server: PrivateServer) -> Iterator[tuple[str, Callable[[], object]]]:
    """A server's URL, and what makes it give no more answers: in one of four ways."""
    if how == "stopped":  # takes connections, and reads nothing
        yield server.url, lambda: server.signal(SIGSTOP)
        server.signal(SIGCONT)
    elif how == "dead":  # refuses connections
        yield server.url, server.kill
    elif how == "mute":  # does all that it is told, and says nothing
        with FaultProxy(server.port, matches=lambda _: True) as proxy:
            yield proxy.url, lambda: proxy.plan(repeat(Fault.NEVER_REPLY))
    else:  # out of reach: nobody refuses a connection, nobody takes it
        with FaultProxy(server.port) as proxy, ExitStack() as sockets:

            def be_out_of_reach() -> None:
                proxy.down()
                listener, *others = (sockets.enter_context(socket.socket()) for _ in range(5))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("127.0.0.1", proxy.port))
                listener.listen(0)
                for one in others:  # nobody accepts these, and there is no room for more
                    one.setblocking(False)
                    one.connect_ex(("127.0.0.1", proxy.port))

            yield proxy.url, be_out_of_reach


@pytest.fixture(params=["sync", "async"])
def silence(request: pytest.FixtureRequest, own_server: PrivateServer) -> Iterator[Silence]:
    with closing(Silence(request.param, own_server.url)) as opened:
        yield opened


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


@pytest.mark.parametrize("how", ["stopped", "dead", "mute", "out of reach"])
@pytest.mark.parametrize("style", ["sync", "async"])
@proves("server stopped", ordinary=2 * len(CALLS), full=5 * len(CALLS))
def test_every_call_ends_within_its_deadline_when_the_server_falls_silent(
    own_server: PrivateServer, style: str, how: str, attack: Attack
) -> None:
    """Too late is what is too late in three rounds out of three.

    A busy machine may hold up any call once; what waits too long by design always does.
    """
    made = again = late = repeated = 0
    unknown: list[Any] = []
    with (
        falling_silent(how, own_server) as (url, fall_silent),
        closing(Silence(style, url)) as silence,
    ):
        stores = (silence.store, silence.stranger)
        fall_silent()
        while made < attack.size:
            calls = [partial(call, store) for store in stores for call in CALLS.values()]
            calls += [partial(silence.store.repeat, error) for error in unknown]
            repeated += len(unknown)
            fewest = len(calls)
            for number in range(3):
                found = silence.together(calls)
                made, again = made + len(calls), again + (len(calls) if number else 0)
                fewest = min(fewest, sum(took > DEADLINE + GRACE for _, took in found))
                if not fewest:
                    break
            late += fewest
            unknown = [one for one, _ in found if can_be_repeated(one, silence.store)]
    attack.tell(
        injected=made, wrong=late, operations=len(CALLS), repeats=repeated, made_again=again
    )


def can_be_repeated(outcome: Any, store: Any) -> bool:
    return isinstance(outcome, OutcomeUnknownError) and outcome.pending.store is store


@pytest.mark.usefixtures("hasty")
def test_every_call_to_a_stopped_server_raises(stopped: Silence) -> None:
    for name, outcome in stopped.outcomes(stopped.store).items():
        assert isinstance(outcome, redis.RedisError), name
        assert isinstance(outcome, OutcomeUnknownError) == (name in WRITES), name


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("which", ["store", "stranger"])
def test_a_dead_server_never_looks_empty_and_surely_has_run_nothing(
    dead: Silence, which: str
) -> None:
    for name, outcome in dead.outcomes(getattr(dead, which)).items():
        # On a busy machine an attempt to connect may time out before it is refused.
        assert isinstance(outcome, (redis.ConnectionError, redis.TimeoutError)), (
            f"{name}: {outcome!r}"
        )


@pytest.mark.parametrize(
    ("style", "coalesce"), [("sync", False), ("async", False), ("async", True)]
)
def test_the_calls_of_many_to_a_stopped_server_end_within_the_deadline_too(
    own_server: PrivateServer, style: str, coalesce: bool
) -> None:
    """Whoever waits for others, to share a pipeline or a few connections, waits in vain."""
    silence = Silence(style, own_server.url, coalesce=coalesce)
    crowd = 1500 if coalesce else 8
    follow: Callable[[Any], Any] = lambda store: first(store.follow_output("some-id"))  # noqa: E731
    append: Callable[[Any], Any] = lambda store: store.add_output("some-id", "line")  # noqa: E731
    own_server.signal(SIGSTOP)
    with closing(silence):
        for call in (follow, append):
            fewest = crowd
            for _ in range(3):  # see above
                found = silence.together([partial(call, silence.store)] * crowd)
                assert all(isinstance(outcome, redis.RedisError) for outcome, _ in found)
                fewest = min(fewest, sum(took > DEADLINE + GRACE for _, took in found))
                if not fewest:
                    break
            assert fewest == 0
        own_server.signal(SIGCONT)


@controls("server stopped", ordinary=4, full=10)
def test_the_default_client_waits_much_longer_for_a_stopped_server(
    own_server: PrivateServer, attack: Attack
) -> None:
    with redis.Redis(port=own_server.port) as client:
        client.ping()
        own_server.signal(SIGSTOP)
        waiting = [
            threading.Thread(target=timed, args=(client.ping,), daemon=True)
            for _ in range(attack.size)
        ]
        for one in waiting:
            one.start()
        time.sleep(DEADLINE + GRACE)
        late = sum(one.is_alive() for one in waiting)
        own_server.signal(SIGCONT)
        for one in waiting:
            one.join()
    attack.tell(injected=attack.size, wrong=late)


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
        until(lambda: work.calls() >= attack.size and flusher.flushes >= 2)
        refused += flusher.refused()
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
