"""Workers that use a store in all ways while something happens to its server; what became of it.

Each lives by a session of its own that nobody else writes to, so it knows what every call must
answer, and in the end what must be stored: all that was acknowledged, once and in order, and
nothing else. Processes, threads and tasks live the same life: to the first two, a blocking store is
shown as one whose methods are awaited.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
import traceback
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from itertools import islice, pairwise
from types import SimpleNamespace
from typing import Any, Protocol
from uuid import uuid4

from consistency import assert_consistent
from faults import astray
from rawkeys import RawKeys, plain_client
from waiting import until

from sessionstore import AgentSession, AsyncSessionStore, Batch, Lease, SessionStore

KEPT = 3  # further sessions that a worker has at a time


class Blocking:
    """A blocking store or lease, to be awaited; it blocks all the same."""

    def __init__(self, one: SessionStore | Lease) -> None:
        self._one = one

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._one, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return Blocking(result) if isinstance(result, Lease) else result

        return call

    @asynccontextmanager
    async def batch(self) -> AsyncIterator[Batch]:
        assert isinstance(self._one, SessionStore)
        with self._one.batch() as batch:
            yield batch


class Event(Protocol):
    """What tells the workers to end: ``threading.Event``, or that of other processes."""

    def is_set(self) -> bool: ...


class Life:
    """One worker: what it has done, and how many answers were not as promised."""

    def __init__(self) -> None:
        self.counted: Any = SimpleNamespace(value=0)  # turns; for a process, in shared memory
        self.session_id = ""
        self.calls = self.wrong_answers = self.acknowledged = 0
        self.lines: list[str] = []
        self.noted = "0"  # in the metadata: how many lines there were then
        self.kept: list[str] = []  # sessions it has made besides

    @property
    def turns(self) -> int:
        return int(self.counted.value)

    def end_turn(self) -> None:
        self.counted.value += 1

    async def live(self, store: Any, is_over: Event) -> None:
        """Turn after turn. An error that a caller sees is a broken promise, and the end."""
        try:
            made = await store.create_session("claude", "own", "/src", metadata={"lines": "0"})
            self.session_id = made.id
            while not is_over.is_set():
                await self._hold(store)
                await self._have_others(store)
                self.end_turn()
        except Exception:
            self.wrong_answers += 1
            traceback.print_exc()

    def _expect(self, answer: object, promised: object) -> None:
        self.calls += 1
        if answer != promised:
            self.wrong_answers += 1
            print(f"{self.session_id}: answered {answer!r}, not {promised!r}")

    def _line(self) -> str:
        self.lines.append(f"line {len(self.lines)}")
        return self.lines[-1]

    async def _hold(self, store: Any) -> None:
        """Claim the session, add to it in all ways, and give it back."""
        own = self.session_id
        lease = await store.claim(own)
        for _ in range(3):
            self.acknowledged = await store.add_output(own, self._line())
            self._expect(self.acknowledged, len(self.lines))
        async with store.batch() as batch:
            outcomes = [(batch.add_output(own, self._line()), len(self.lines)) for _ in range(5)]
        for outcome, total in outcomes:
            self.acknowledged = outcome.result()
            self._expect(self.acknowledged, total)
        self.noted = str(len(self.lines))
        self._expect(await store.update_metadata(own, {"lines": self.noted}), None)
        found = await store.get_session(own, tail=1)
        self._expect(found.output_buffer, (self.lines[-1],))
        self._expect((found.status, found.output_total), ("busy", len(self.lines)))
        self._expect(await lease.release(), None)

    async def _have_others(self, store: Any) -> None:
        """Make a session and end it; delete the oldest of those."""
        made = await store.create_session("codex", f"of {self.session_id}", "/src", unique=True)
        self.kept.append(made.id)
        found = await store.find_session_by_service_id(f"of {self.session_id}", live=True)
        self._expect(found and found.id, made.id)
        self._expect(await store.update_status(made.id, "terminated", expected="active"), None)
        if len(self.kept) > KEPT:
            self._expect(await store.delete_session(self.kept.pop(0)), True)

    def broken(self, stored: dict[str, AgentSession]) -> int:
        """How much is not stored as it was promised to this worker; it takes out what it knows."""
        own = stored.pop(self.session_id, None)
        wrong = self.wrong_answers + sum(stored.pop(one, None) is None for one in self.kept)
        if own is None:
            return wrong + 1 + len(self.lines)
        wrong += (own.status, own.metadata) != ("active", {"lines": self.noted})
        return wrong + astray(own.output_buffer, self.lines)


class Appending(Life):
    """A worker that only appends, and knows when each line was acknowledged.

    So it can tell what a failover took away from what was lost otherwise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.acknowledged_at: dict[str, float] = {}  # time.monotonic()
        self.lost_in_failovers = 0

    async def live(self, store: Any, is_over: Event) -> None:
        self.session_id = (await store.create_session("claude", uuid4().hex, "/src")).id
        while not is_over.is_set():
            line = self._line()
            try:
                await store.add_output(self.session_id, line)
                self.acknowledged_at[line] = time.monotonic()
            except Exception:
                self.wrong_answers += 1
                traceback.print_exc()
            self.calls += 1
            self.end_turn()

    def broken(
        self, stored: dict[str, AgentSession], failovers: Sequence[tuple[float, float]] = ()
    ) -> int:
        """What is stored twice, out of order, or not although it was acknowledged.

        ``failovers``: from when to when one went on. What was acknowledged meanwhile may be lost.
        """
        own = stored.pop(self.session_id, None)
        if own is None:
            return self.wrong_answers + 1 + len(self.acknowledged_at)
        numbers = [int(line.removeprefix("line ")) for line in own.output_buffer]
        wrong = self.wrong_answers + sum(one >= other for one, other in pairwise(numbers))
        lines = set(own.output_buffer)
        lost = [at for line, at in self.acknowledged_at.items() if line not in lines]
        in_failovers = sum(any(a <= at <= b for a, b in failovers) for at in lost)
        self.lost_in_failovers += in_failovers
        return wrong + len(lost) - in_failovers


class Work:
    """Several workers at the store of one namespace."""

    def __init__(self, url: str, workers: int, life: type[Life] = Life, **settings: Any) -> None:
        self.url, self.namespace = url, f"test-{uuid4().hex[:12]}"
        self._settings = settings | {"namespace": self.namespace}
        self.lives = [life() for _ in range(workers)]

    def wait_for_turns(self, turns: int) -> None:
        """Until each worker has had so many more turns."""
        goals = [life.turns + turns for life in self.lives]
        until(lambda: all(one.turns >= goal for one, goal in zip(self.lives, goals, strict=True)))

    def calls(self) -> int:
        return sum(life.calls for life in self.lives)

    def seen(self) -> dict[str, int]:
        lines = sum(len(life.lines) for life in self.lives)
        return {"workers": len(self.lives), "acknowledged_lines": lines, "calls": self.calls()}

    def broken(self, **known: Any) -> int:
        """How many promises to the workers are broken, in their answers and in what is stored."""
        stored = self._stored()
        wrong = sum(life.broken(stored, **known) for life in self.lives)
        return wrong + len(stored) + self._inconsistencies()  # left in it: nobody's, or deleted

    def torn(self) -> int:
        """How much of what is stored is not what a worker wrote up to some moment, in order."""
        stored = self._stored()
        wrong = self._inconsistencies()
        for life in self.lives:
            lines = list(stored[life.session_id].output_buffer) if life.session_id in stored else []
            wrong += lines != life.lines[: len(lines)]
        return wrong

    def lost(self) -> int:
        """How many of the acknowledged lines are not stored."""
        stored = self._stored()
        totals = {life: stored[life.session_id].output_total for life in self.lives
                  if life.session_id in stored}  # fmt: skip
        return sum(max(0, life.acknowledged - totals.get(life, 0)) for life in self.lives)

    def _stored(self) -> dict[str, AgentSession]:
        with SessionStore.from_url(self.url, **self._settings) as store:
            return {one.id: one for one in store.get_all_sessions()}

    def _inconsistencies(self) -> int:
        """What the doctor finds, and whether the tests' own look at the keys agrees."""
        is_cluster = bool(self._settings.get("cluster"))
        client = plain_client(self.url, cluster=is_cluster, decode_responses=True)
        with SessionStore.from_url(self.url, **self._settings) as store, client:
            problems = [one for one in store.check() if not one.warning]
            print(*problems, sep="\n")
            try:
                partitions = self._settings.get("partitions", 1)
                assert_consistent(RawKeys(client, self.namespace, partitions))
            except AssertionError as error:
                print(error)
                return len(problems) + 1
        return len(problems)


def _in_a_process(life: Life, url: str, settings: Any, is_over: Any, told: Any) -> None:
    with SessionStore.from_url(url, **settings) as store:
        asyncio.run(life.live(Blocking(store), is_over))
    del life.counted
    told.send(vars(life))


@contextmanager
def _processes(lives: Sequence[Life], url: str, settings: Any) -> Iterator[None]:
    """A process for each life; what became of it is told at the end."""
    context = multiprocessing.get_context("spawn")
    is_over, running = context.Event(), list[Any]()
    for life in lives:
        life.counted = context.Value("q")
        told, tells = context.Pipe(duplex=False)
        arguments = (life, url, settings, is_over, tells)
        process = context.Process(target=_in_a_process, args=arguments)
        process.start()
        tells.close()
        running.append((life, process, told))
    try:
        yield
    finally:
        is_over.set()
        for life, process, told in running:
            with told:
                vars(life).update(told.recv())
            process.join()


@contextmanager
def at_work(
    url: str,
    *,
    processes: int = 0,
    threads: int = 0,
    tasks: int = 0,
    life: type[Life] = Life,
    deadline: float = 30.0,
    **settings: Any,
) -> Iterator[Work]:
    """So many workers: a store for each process, one for all threads, one for all tasks."""
    work, is_over = Work(url, processes + threads + tasks, life, **settings), threading.Event()
    settings |= {
        "namespace": work.namespace, "deadline": deadline, "buffer_limit": 0, "buffer_bytes": 0,
    }  # fmt: skip
    lives = iter(work.lives)
    alone, in_threads, in_tasks = (
        list(islice(lives, count)) for count in (processes, threads, tasks)
    )

    def in_a_thread(life: Life, store: SessionStore) -> None:
        asyncio.run(life.live(Blocking(store), is_over))

    async def on_a_loop() -> None:
        async with AsyncSessionStore.from_url(url, **settings) as store:
            await asyncio.gather(*(life.live(store, is_over) for life in in_tasks))

    with (
        _processes(alone, url, settings),
        SessionStore.from_url(url, **settings) as store,
        ThreadPoolExecutor(threads + 1) as pool,
    ):
        try:
            running = [pool.submit(in_a_thread, life, store) for life in in_threads]
            running.append(pool.submit(asyncio.run, on_a_loop()))
            yield work
        finally:
            is_over.set()
        for one in running:
            one.result()
