"""Lanes are used by one write at a time: among threads, tasks and forked processes."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
import redis
from faults import seeded

from sessionstore import AsyncSessionStore, SessionNotFoundError, SessionStore
from sessionstore._server import PrivateServer
from sessionstore.lanes import Lane, Lanes

THREADS = 32
LANE_SECONDS = 600


class Namespace:
    """A fresh namespace of a real server, and a plain client to look at it."""

    def __init__(self, server: PrivateServer) -> None:
        self.url, self.name = server.url, f"test-{uuid4().hex[:12]}"
        self.prefix = f"{{{self.name}}}:"
        self.redis = redis.Redis.from_url(server.url, decode_responses=True)

    def lanes(self) -> list[str]:
        return list(self.redis.scan_iter(f"{self.prefix}lane:*", count=1000))

    def output(self, session_id: str) -> list[str]:
        return list(self.redis.lrange(f"{self.prefix}session:{session_id}:output", 0, -1))

    def close(self) -> None:
        for key in self.redis.scan_iter(f"{self.prefix}*", count=1000):
            self.redis.unlink(key)
        self.redis.close()


@pytest.fixture
def namespace(server: PrivateServer) -> Iterator[Namespace]:
    opened = Namespace(server)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture
def store(namespace: Namespace) -> Iterator[SessionStore]:
    with SessionStore.from_url(namespace.url, namespace=namespace.name) as opened:
        yield opened


# ---- The free list ------------------------------------------------------------------------


def test_a_lane_that_was_given_back_is_taken_again_with_its_next_number() -> None:
    lanes = Lanes()
    first = lanes.take()
    name, sequence = first.name, first.sequence
    lanes.give_back(first)

    again = lanes.take()

    assert (again.name, again.sequence) == (name, sequence + 1)


def test_lanes_in_use_at_the_same_time_have_different_names() -> None:
    lanes = Lanes()

    assert len({lanes.take().name for _ in range(100)}) == 100


def test_two_stores_never_share_a_lane() -> None:
    assert Lanes().take().name != Lanes().take().name


def shared_lanes(take: Callable[[], Lane], give_back: Callable[[Lane], None]) -> int:
    """How often 32 threads found a lane in use that another thread was using."""
    in_use: set[str] = set()
    lock = threading.Lock()
    start = threading.Barrier(THREADS)
    shared = 0

    def work() -> None:
        nonlocal shared
        start.wait()
        for _ in range(200):
            lane = take()
            with lock:
                shared += lane.name in in_use
                in_use.add(lane.name)
            time.sleep(0.0001)  # lets another thread run
            with lock:
                in_use.discard(lane.name)
            give_back(lane)

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(work) for _ in range(THREADS)]:
            done.result()
    return shared


def test_threads_never_share_a_lane() -> None:
    lanes = Lanes()

    assert shared_lanes(lanes.take, lanes.give_back) == 0


def test_a_lane_that_is_only_looked_at_would_be_shared() -> None:
    lane = Lane("the only one")

    assert shared_lanes(lambda: lane, lambda _: None) > 0


# ---- Lane keys ----------------------------------------------------------------------------


def test_a_lane_key_holds_the_last_number_and_its_answer(
    namespace: Namespace, store: SessionStore
) -> None:
    session_id = store.create_session("claude", "service", "/src").id
    store.add_output(session_id, "one", "two")

    (lane,) = namespace.lanes()

    assert namespace.redis.get(lane) == "2 ok 2"


def test_a_refusal_is_kept_in_the_lane_too(namespace: Namespace, store: SessionStore) -> None:
    assert store.delete_session("no-such-session") is False
    with pytest.raises(SessionNotFoundError):
        store.update_activity("no-such-session")

    (lane,) = namespace.lanes()

    held = str(namespace.redis.get(lane))
    assert re.fullmatch(r'2 SESSION_NOT_FOUND \{"session_id":"no-such-session"\}', held)


@pytest.mark.parametrize("refused", [False, True], ids=["done", "refused"])
def test_a_lane_key_is_kept_for_ten_minutes_at_least_and_twenty_at_most(
    namespace: Namespace, store: SessionStore, refused: bool
) -> None:
    if refused:
        store.delete_session("no-such-session")
    else:
        store.create_session("claude", "service", "/src")

    (lane,) = namespace.lanes()

    assert LANE_SECONDS < namespace.redis.ttl(lane) <= 2 * LANE_SECONDS


@pytest.mark.parametrize(("left", "renewed"), [(590, True), (610, False)])
def test_a_write_renews_the_expiry_of_its_lane_only_when_under_ten_minutes_are_left(
    namespace: Namespace, store: SessionStore, left: int, renewed: bool
) -> None:
    session_id = store.create_session("claude", "service", "/src").id
    (lane,) = namespace.lanes()
    namespace.redis.expire(lane, left)

    store.add_output(session_id, "line")

    assert str(namespace.redis.get(lane)).startswith("2 ")
    assert (namespace.redis.ttl(lane) > left) == renewed


def test_a_repeat_refreshes_the_expiry_of_its_lane(
    namespace: Namespace, store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = store.create_session("claude", "service", "/src").id
    (lane,) = namespace.lanes()
    store.add_output(session_id, "line")
    namespace.redis.expire(lane, 10)
    same = Lane(lane.removeprefix(f"{namespace.prefix}lane:"), 2)
    monkeypatch.setattr(store._lanes, "take", lambda: same)

    assert store.add_output(session_id, "line") == 1

    assert namespace.redis.ttl(lane) > LANE_SECONDS
    assert namespace.output(session_id) == ["line"]


def test_there_are_as_many_lanes_as_writes_at_the_same_time(
    namespace: Namespace, store: SessionStore
) -> None:
    """Not as many as writes: 640 of them leave at most 32 keys."""
    session_id = store.create_session("claude", "service", "/src").id
    with ThreadPoolExecutor(THREADS) as pool:
        totals = list(pool.map(lambda n: store.add_output(session_id, f"{n}"), range(THREADS * 20)))

    assert sorted(totals) == list(range(1, THREADS * 20 + 1))
    assert 1 <= len(namespace.lanes()) <= THREADS


# ---- Fork ---------------------------------------------------------------------------------

# In a process of its own: pytest's has threads, which do not survive a fork.
FORKING = """
import os, sys
from sessionstore import SessionStore
from sessionstore.lanes import Lanes

url, namespace, session_id, naive = sys.argv[1:]
store = SessionStore.from_url(url, namespace=namespace)
for n in range(5):
    store.add_output(session_id, f"before {n}")
if naive:
    Lanes._start_afresh = lambda self: None
children = []
for child in range(3):
    pid = os.fork()
    if pid == 0:
        for n in range(100):
            store.add_output(session_id, f"child-{child} {n}")
        os._exit(0)
    children.append(pid)
for n in range(100):
    store.add_output(session_id, f"parent {n}")
for pid in children:
    assert os.waitpid(pid, 0)[1] == 0 or naive
"""


def write_in_forked_processes(namespace: Namespace, session_id: str, naive: bool) -> list[str]:
    """Four processes write through one store object; the lines as they are stored."""
    arguments = [namespace.url, namespace.name, session_id, "naive" if naive else ""]
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKING, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert naive or finished.returncode == 0, finished.stderr
    return namespace.output(session_id)


def test_forked_processes_write_through_one_store_and_lose_nothing(
    namespace: Namespace, store: SessionStore
) -> None:
    session_id = store.create_session("claude", "service", "/src").id

    stored = write_in_forked_processes(namespace, session_id, naive=False)

    writers = {"before": 5, "parent": 100, "child-0": 100, "child-1": 100, "child-2": 100}
    by_writer = {name: [s for s in stored if s.startswith(f"{name} ")] for name in writers}
    assert by_writer == {name: [f"{name} {n}" for n in range(c)] for name, c in writers.items()}
    assert len(stored) == sum(writers.values())


def test_lanes_kept_over_a_fork_would_lose_writes(
    namespace: Namespace, store: SessionStore
) -> None:
    session_id = store.create_session("claude", "service", "/src").id

    stored = write_in_forked_processes(namespace, session_id, naive=True)

    assert len(stored) < 405


# ---- Cancelled calls ----------------------------------------------------------------------

CALLS = 2000
AT_ONCE = 50


async def storm(ask: Callable[[int], Awaitable[object]]) -> tuple[set[int], set[int]]:
    """Make many calls and cancel half of them at any moment.

    Args:
        ask: a call whose right answer is the number that it is given.

    Returns:
        The numbers of the calls that were cancelled, and of those that got a wrong answer.
    """
    rng = seeded()
    cancelled: set[int] = set()
    wrong: set[int] = set()

    async def one(number: int) -> None:
        task = asyncio.ensure_future(ask(number))
        if rng.random() < 0.5:
            # Some within the first steps of the call, some while its reply is on its way.
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            await asyncio.sleep(rng.choice([0, 0.001, 0.002, 0.005]))
            task.cancel()
        try:
            if await task != number:
                wrong.add(number)
        except asyncio.CancelledError:
            cancelled.add(number)

    for first in range(0, CALLS, AT_ONCE):
        await asyncio.gather(*(one(number) for number in range(first, first + AT_ONCE)))
    return cancelled, wrong


def test_cancelled_writes_happen_at_most_once_and_the_others_exactly_once(
    namespace: Namespace, store: SessionStore
) -> None:
    session_id = store.create_session("claude", "service", "/src").id

    async def run() -> tuple[set[int], set[int]]:
        settings = {"namespace": namespace.name, "max_connections": 8}
        async with AsyncSessionStore.from_url(namespace.url, **settings) as writing:

            async def append(number: int) -> int:
                await writing.add_output(session_id, str(number))
                return number

            return await storm(append)

    cancelled, _ = asyncio.run(run())
    stored = [int(line) for line in namespace.output(session_id)]
    assert len(cancelled) >= CALLS / 10
    assert len(stored) == len(set(stored))
    assert set(stored) | cancelled == set(range(CALLS))


def test_no_answer_reaches_another_caller_than_its_own_when_calls_are_cancelled(
    namespace: Namespace, store: SessionStore
) -> None:
    ids = [store.create_session("claude", f"service-{n}", "/src").id for n in range(AT_ONCE)]

    async def run() -> tuple[set[int], set[int]]:
        settings = {"namespace": namespace.name, "max_connections": 8}
        async with AsyncSessionStore.from_url(namespace.url, **settings) as reading:

            async def find(number: int) -> int:
                tail = number % 2 or None  # with a script, or with a MULTI
                session = await reading.get_session(ids[number % AT_ONCE], tail=tail)
                return number if session.id == ids[number % AT_ONCE] else -1

            return await storm(find)

    cancelled, wrong = asyncio.run(run())
    assert len(cancelled) >= CALLS / 10
    assert wrong == set()


def test_a_connection_kept_after_a_cancelled_call_would_answer_the_wrong_caller(
    server: PrivateServer,
) -> None:
    async def run() -> tuple[set[int], set[int]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        turn = asyncio.Lock()

        async def echo(number: int) -> int:
            async with turn:
                writer.write(f"ECHO {number}\r\n".encode())
                await reader.readline()
                return int(await reader.readline())

        try:
            return await storm(echo)
        finally:
            writer.close()
            await writer.wait_closed()

    async def tolerant() -> tuple[set[int], set[int]]:
        try:
            return await run()
        except ValueError:  # half of a reply: wrong as well
            return {0}, {0}

    cancelled, wrong = asyncio.run(tolerant())
    assert cancelled
    assert wrong
