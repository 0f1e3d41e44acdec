"""What a replica has acknowledged is there after it is promoted, however it was written.

The primary is cut off from its replica in two ways, while workers write to it in every style: the
replica is held up until the primary is killed, or it is promoted while the primary goes on. Either
way the promoted one lacks what was written meanwhile. A primary that refuses writes without a
replica (``min-replicas-to-write``) does so only when the silence has lasted. (Failovers by
sentinels, which workers follow by themselves, are in ``test_wait_replicas.py``.)
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count, pairwise
from typing import Any
from uuid import uuid4

import pytest
import redis
from conftest import PROGRAMS
from programme import Attack, controls, proves
from replicas import Pair
from waiting import until

from sessionstore import AsyncSessionStore, DurabilityError, SessionStore, SessionStoreError
from sessionstore.errors import NoReplicasError

SECONDS = 0.3  # before and after the primary is cut off
DEADLINE = 1.0

#: What a worker may be told: that no replica has it, that the server is away, or takes nothing.
ERRORS = (redis.RedisError, SessionStoreError)


class Worker:
    """One session that one worker writes numbered lines to; the lines that were acknowledged."""

    def __init__(self) -> None:
        self.session_id = ""
        self.acknowledged: list[int] = []
        self.errors: list[Exception] = []
        self._numbers = count()

    def some(self, size: int) -> list[int]:
        return [next(self._numbers) for _ in range(size)]

    def note(self, numbers: list[int], error: Exception | None = None) -> None:
        if error is None:
            self.acknowledged += numbers
        else:
            self.errors.append(error)


def appending(store: SessionStore, worker: Worker, is_over: threading.Event) -> None:
    while not is_over.is_set():
        numbers = worker.some(1)
        try:
            store.add_output(worker.session_id, *map(str, numbers))
            worker.note(numbers)
        except ERRORS as error:
            worker.note(numbers, error)


def batching(store: SessionStore, worker: Worker, is_over: threading.Event) -> None:
    while not is_over.is_set():
        with store.batch() as batch:
            noted = [
                (numbers, batch.add_output(worker.session_id, str(numbers[0])))
                for numbers in (worker.some(1) for _ in range(10))
            ]
        for numbers, outcome in noted:
            worker.note(numbers, outcome.error)


def writing(store: SessionStore, worker: Worker, is_over: threading.Event) -> None:
    while not is_over.is_set():
        numbers = worker.some(20)
        with suppress(*ERRORS), store.writer(worker.session_id, patience=0) as out:
            try:
                print(*numbers, sep="\n", file=out)
                out.flush()
                worker.note(numbers)
            except ERRORS as error:
                worker.note(numbers, error)
                raise


async def _tasks(store: AsyncSessionStore, workers: list[Worker], is_over: threading.Event) -> None:
    async def live(worker: Worker) -> None:
        while not is_over.is_set():
            numbers = worker.some(1)
            try:
                await store.add_output(worker.session_id, *map(str, numbers))
                worker.note(numbers)
            except ERRORS as error:
                worker.note(numbers, error)

    await asyncio.gather(*map(live, workers))


class Crowd:
    """Workers of every style on one primary, until they are told to end."""

    def __init__(self, url: str, wait_replicas: int) -> None:
        self.namespace = f"test-{uuid4().hex[:12]}"
        self._url = url
        self._settings: dict[str, Any] = {
            "namespace": self.namespace, "wait_replicas": wait_replicas, "deadline": DEADLINE,
            "buffer_limit": 0, "buffer_bytes": 0,
        }  # fmt: skip
        self.is_over = threading.Event()
        self.styles = {
            "appends": [Worker() for _ in range(2)],
            "batches": [Worker()],
            "writers": [Worker()],
            "together": [Worker() for _ in range(8)],
            "tasks": [Worker() for _ in range(2)],
        }
        self.workers = [worker for some in self.styles.values() for worker in some]
        with SessionStore.from_url(url, **self._settings) as store:
            for worker in self.workers:
                worker.session_id = store.create_session("claude", uuid4().hex, "/src").id
        self._threads = [
            *(self._thread(appending, worker) for worker in self.styles["appends"]),
            *(self._thread(batching, worker) for worker in self.styles["batches"]),
            *(self._thread(writing, worker) for worker in self.styles["writers"]),
            self._loop(self.styles["together"], coalesce=True),
            self._loop(self.styles["tasks"], coalesce=False),
        ]
        for thread in self._threads:
            thread.start()

    def _thread(self, live: Callable[..., None], worker: Worker) -> threading.Thread:
        def run() -> None:
            with SessionStore.from_url(self._url, **self._settings) as store:
                live(store, worker, self.is_over)

        return threading.Thread(target=run)

    def _loop(self, workers: list[Worker], *, coalesce: bool) -> threading.Thread:
        async def run() -> None:
            async with AsyncSessionStore.from_url(
                self._url, coalesce=coalesce, **self._settings
            ) as store:
                await _tasks(store, workers, self.is_over)

        return threading.Thread(target=lambda: asyncio.run(run()))

    def end(self) -> None:
        self.is_over.set()
        for thread in self._threads:
            thread.join()

    def wrong(self, url: str) -> int:
        """How many acknowledged lines a server lacks, how many come twice, and what is torn."""
        wrong = 0
        with SessionStore.from_url(url, namespace=self.namespace) as store:
            for worker in self.workers:
                found = store.find_session(worker.session_id)
                stored = [] if found is None else list(map(int, found.output_buffer))
                wrong += len(set(worker.acknowledged) - set(stored))
                wrong += sum(one >= other for one, other in pairwise(stored))
            wrong += len([one for one in store.check() if not one.warning])
        return wrong


def hold_up(pair: Pair) -> None:
    """The replica takes nothing any more, and is promoted when the primary has been killed."""
    with pair.client(pair.primary) as primary:
        pair.replica.signal(signal.SIGSTOP)
        time.sleep(SECONDS / 2)
        # What lies in the kernel's buffers reaches it after all; what comes now does not.
        primary.client_kill_filter(_type="replica")
        time.sleep(SECONDS / 2)


def promote(pair: Pair) -> None:
    """The replica is made a primary while the other goes on."""
    with pair.client(pair.replica) as replica:
        replica.replicaof("NO", "ONE")
    time.sleep(SECONDS)


def have_it_refuse(pair: Pair) -> None:
    """The same, of a primary that takes nothing when it has not heard of its replica for 1 s."""
    with pair.client(pair.primary) as primary:
        primary.config_set("min-replicas-max-lag", 1)
        primary.config_set("min-replicas-to-write", 1)
        pair.replica.signal(signal.SIGSTOP)
        time.sleep(3.5)


def fail_over(pair: Pair, cut_off: Callable[[Pair], None], wait_replicas: int) -> Crowd:
    """One failover under a crowd; the crowd, which has ended."""
    crowd = Crowd(pair.primary.url, wait_replicas)
    try:
        time.sleep(SECONDS)
        until(lambda: all(one.acknowledged for one in crowd.workers))
        cut_off(pair)
    finally:
        crowd.end()
        pair.replica.signal(signal.SIGCONT)
    pair.fail_over()
    return crowd


def attacked(attack: Attack, pair: Pair, cut_off: Callable[[Pair], None], wait: int) -> None:
    wrong, seen = 0, {"acknowledged_lines": 0, "lines_told_of": 0}
    for _ in range(attack.size):
        crowd = fail_over(pair, cut_off, wait)
        wrong += crowd.wrong(pair.primary.url)
        for style, workers in crowd.styles.items():
            told = [one for worker in workers for one in worker.errors]
            if wait:
                assert any(isinstance(one, DurabilityError) for one in told), style
            if cut_off is have_it_refuse:
                assert any(isinstance(one, NoReplicasError) for one in told), style
            seen["acknowledged_lines"] += sum(len(worker.acknowledged) for worker in workers)
            seen["lines_told_of"] += len(told)
    attack.tell(injected=attack.size, wrong=wrong, **seen)


@pytest.fixture(params=PROGRAMS, scope="module")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with Pair(PROGRAMS[request.param]) as started:
        yield started


@pytest.mark.parametrize("cut_off", [hold_up, promote, have_it_refuse])
@proves("replicas waited for", ordinary=1, full=5)
def test_what_was_acknowledged_is_there_after_the_promotion(
    pair: Pair, cut_off: Callable[[Pair], None], attack: Attack
) -> None:
    attacked(attack, pair, cut_off, wait=1)


@pytest.mark.parametrize("cut_off", [hold_up, promote])
@controls("replicas waited for", ordinary=1)
def test_without_waiting_what_was_acknowledged_is_lost(
    pair: Pair, cut_off: Callable[[Pair], None], attack: Attack
) -> None:
    attacked(attack, pair, cut_off, wait=0)
