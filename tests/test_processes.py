"""Several worker processes on one server: appends, races, and workers that are killed.

The workers are real processes, forked by a small one that this file starts with itself as the
program: pytest's own process has threads, which do not survive a fork. Each test has its naive
version beside it, which the same check must catch.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
import redis
from consistency import assert_consistent
from programme import Attack, controls, proves

from sessionstore import ServiceSessionInUseError, SessionStatusError, SessionStore

WRITERS = 4
APPENDS = 250
RACERS = 8
ROUNDS = 60


# ---- What the workers do ------------------------------------------------------------------


def forked(work: Callable[..., Any], count: int) -> list[Any]:
    """The results of so many processes, each with a number and a barrier that all share."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(count)
    receivers = []
    processes = []
    for number in range(count):
        receiver, sender = context.Pipe(duplex=False)

        def run(number: int = number, sender: Any = sender) -> None:
            sender.send(work(number, barrier))

        process = context.Process(target=run)
        process.start()
        sender.close()
        receivers.append(receiver)
        processes.append(process)
    results = [receiver.recv() for receiver in receivers]
    for process in processes:
        process.join()
    return results


def appends(url: str, namespace: str, naive: bool) -> Any:
    """Each process appends to one shared session, and makes a session of its own."""
    with SessionStore.from_url(url, namespace=namespace) as store:
        shared = store.create_session("claude", "shared", "/src").id

    def work(number: int, barrier: Any) -> list[int]:
        with SessionStore.from_url(url, namespace=namespace) as store:
            barrier.wait()
            own = store.create_session("codex", f"own-{number}", "/src").id
            totals = []
            for line in range(APPENDS):
                text = f"writer-{number} {line}"
                if naive:
                    buffer = [*store.get_session(shared).output_buffer, text]
                    key = store.keyspace.of_session(shared).output(shared)
                    client = redis.Redis.from_url(url)
                    with client.pipeline() as pipe:
                        pipe.delete(key).rpush(key, *buffer).execute()
                    client.close()
                    if line == 20:
                        break
                else:
                    totals.append(store.add_output(shared, text))
            store.update_status(own, "terminated" if number % 2 else "busy")
            return totals

    return {"shared": shared, "totals": forked(work, WRITERS)}


def creations(url: str, namespace: str, naive: bool) -> Any:
    """All processes create a session for the same service session, round after round."""

    def work(_: int, barrier: Any) -> list[str | None]:
        won: list[str | None] = []
        with SessionStore.from_url(url, namespace=namespace) as store:
            for turn in range(ROUNDS):
                service = f"service-{turn}"
                barrier.wait()
                if naive:
                    free = store.find_session_by_service_id(service, live=True) is None
                    created = store.create_session("claude", service, "/src") if free else None
                    won.append(created.id if created else None)
                    continue
                try:
                    won.append(store.create_session("claude", service, "/src", unique=True).id)
                except ServiceSessionInUseError:
                    won.append(None)
        return won

    return forked(work, RACERS)


def takings(url: str, namespace: str, naive: bool) -> Any:
    """All processes take the same active session, round after round."""
    with SessionStore.from_url(url, namespace=namespace) as store:
        ids = [store.create_session("claude", f"s-{n}", "/src").id for n in range(ROUNDS)]

    def work(_: int, barrier: Any) -> list[str | None]:
        won: list[str | None] = []
        with SessionStore.from_url(url, namespace=namespace) as store:
            for session_id in ids:
                barrier.wait()
                if naive:
                    free = store.get_session(session_id, tail=0).status == "active"
                    if free:
                        store.update_status(session_id, "busy")
                    won.append(session_id if free else None)
                    continue
                try:
                    store.update_status(session_id, "busy", expected="active")
                    won.append(session_id)
                except SessionStatusError:
                    won.append(None)
        return won

    return forked(work, RACERS)


def killings(url: str, namespace: str, naive: bool, kills: int) -> Any:
    """Kill a worker that creates, fills and deletes sessions, at any moment, again and again."""
    rng = random.Random(int(os.environ["FAULT_SEED"]))
    killed = 0
    for number in range(kills):
        read_end, write_end = os.pipe()
        worker = os.fork()
        if worker == 0:
            churn(url, namespace, number, naive, write_end)
        os.close(write_end)
        os.read(read_end, 1)  # it has begun
        os.close(read_end)
        time.sleep(rng.uniform(0.005, 0.05))
        os.kill(worker, signal.SIGKILL)
        _, status = os.waitpid(worker, 0)
        killed += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return killed


def churn(url: str, namespace: str, worker: int, naive: bool, begun: int) -> None:
    """Create, fill, end and delete sessions until killed; every other one stays."""
    store = SessionStore.from_url(url, namespace=namespace)
    client = redis.Redis.from_url(url)
    for number in range(10**6):
        service = f"service-{worker}-{number % 7}"
        if naive:
            session_id = create_naively(store, client, service)
        else:
            created = store.create_session(
                "claude", service, "/src", f"task-{number % 3}", "mcp", metadata={"a": "b"}
            )
            session_id = created.id
        if number == 0:
            os.write(begun, b"x")
        store.add_output(session_id, *(f"line {n}" for n in range(20)))
        store.add_error(session_id, "oops")
        store.update_status(session_id, "terminated" if number % 3 else "busy")
        if number % 2:
            store.delete_session(session_id)


def create_naively(store: SessionStore, client: redis.Redis, service: str) -> str:
    """One command after the other."""
    session_id, keys = f"agent_claude_{uuid4()}", store.keyspace.all[0]
    fields = {
        "id": session_id,
        "type": "claude",
        "status": "active",
        "service_session_id": service,
        "project_path": "/src",
        "created_at": "2026-01-01T00:00:00.000000Z",
        "last_activity": "2026-01-01T00:00:00.000000Z",
    }
    for name, value in fields.items():
        client.hset(keys.session(session_id), name, value)
    client.zadd(keys.sessions, {session_id: time.time_ns() // 1000})
    client.sadd(keys.types, "claude")
    client.zadd(keys.activity, {session_id: time.time_ns() // 1000})
    for index in (keys.by_type("claude"), keys.by_status("active"), keys.by_service(service)):
        client.sadd(index, session_id)
    return session_id


# ---- What must be true of what they leave -------------------------------------------------


class Namespace:
    """A fresh namespace of a real server, its workers, and a plain client."""

    def __init__(self, url: str) -> None:
        self.url, self.name = url, f"test-{uuid4().hex[:12]}"
        self.prefix = f"{{{self.name}}}:"
        self.redis = redis.Redis.from_url(url, decode_responses=True)

    def run(self, work: Callable[..., Any], *args: int, naive: bool = False) -> Any:
        """The result of one of the functions above, in a process of its own."""
        seed = os.environ.get("FAULT_SEED") or str(random.randrange(2**32))
        print(f"replay with FAULT_SEED={seed}")
        arguments = [work.__name__, json.dumps([self.url, self.name, naive, *args])]
        finished = subprocess.run(
            [sys.executable, __file__, *arguments],
            env=os.environ | {"FAULT_SEED": seed},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert finished.returncode == 0, finished.stderr
        return json.loads(finished.stdout)

    def keys(self) -> set[str]:
        """All keys of the namespace, without their common prefix."""
        found = self.redis.scan_iter(f"{self.prefix}*", count=1000)
        return {key.removeprefix(self.prefix) for key in found}

    def chunks(self) -> int:
        keys = self.redis.scan_iter(f"{self.prefix}session:*:output", count=1000)
        return sum(self.redis.llen(key) for key in keys)

    def close(self) -> None:
        for key in self.redis.scan_iter(f"{self.prefix}*", count=1000):
            self.redis.unlink(key)
        self.redis.close()


@pytest.fixture
def namespace(server: Any) -> Iterator[Namespace]:
    opened = Namespace(server.url)
    try:
        yield opened
    finally:
        opened.close()


def test_the_appends_of_several_processes_are_stored_once_and_in_each_ones_order(
    namespace: Namespace,
) -> None:
    result = namespace.run(appends)

    stored = namespace.redis.lrange(f"{namespace.prefix}session:{result['shared']}:output", 0, -1)
    for number in range(WRITERS):
        own = [line for line in stored if line.startswith(f"writer-{number} ")]
        assert own == [f"writer-{number} {line}" for line in range(APPENDS)]
    assert len(stored) == WRITERS * APPENDS
    totals = sorted(total for totals in result["totals"] for total in totals)
    assert totals == list(range(1, WRITERS * APPENDS + 1))


def test_the_metrics_of_several_processes_sessions_are_right(namespace: Namespace) -> None:
    namespace.run(appends)

    with SessionStore.from_url(namespace.url, namespace=namespace.name) as store:
        metrics = store.get_metrics()
    assert metrics.sessions_by_type == {"claude": 1, "codex": WRITERS}
    assert metrics.sessions_by_status == {
        "starting": 0,
        "active": 1,
        "busy": WRITERS // 2,
        "error": 0,
        "terminated": WRITERS // 2,
    }
    assert_consistent(namespace)


def test_appending_by_reading_and_writing_back_loses_lines(namespace: Namespace) -> None:
    result = namespace.run(appends, naive=True)

    key = f"{namespace.prefix}session:{result['shared']}:output"
    assert namespace.redis.llen(key) < WRITERS * 21


def winners(results: list[list[str | None]]) -> Counter[int]:
    """How many processes won a round, and in how many rounds it was so many."""
    return Counter(sum(one is not None for one in turn) for turn in zip(*results, strict=True))


def test_of_processes_that_create_one_unique_session_exactly_one_wins(
    namespace: Namespace,
) -> None:
    assert winners(namespace.run(creations)) == {1: ROUNDS}

    assert namespace.redis.zcard(f"{namespace.prefix}sessions") == ROUNDS


def test_finding_first_and_creating_then_makes_doubles(namespace: Namespace) -> None:
    assert max(winners(namespace.run(creations, naive=True))) > 1


def test_of_processes_that_take_one_active_session_exactly_one_wins(
    namespace: Namespace,
) -> None:
    assert winners(namespace.run(takings)) == {1: ROUNDS}

    assert namespace.redis.scard(f"{namespace.prefix}sessions:status:busy") == ROUNDS


def test_reading_the_status_first_and_setting_it_then_lets_several_win(
    namespace: Namespace,
) -> None:
    assert max(winners(namespace.run(takings, naive=True))) > 1


def torn(namespace: Namespace) -> int:
    try:
        assert_consistent(namespace)
    except (AssertionError, KeyError):
        return 1
    return 0


@proves("kills", ordinary=15, full=100)
def test_killed_workers_leave_no_partial_session_and_no_orphan(
    namespace: Namespace, attack: Attack
) -> None:
    killed = namespace.run(killings, attack.size)

    assert_consistent(namespace)
    assert namespace.redis.zcard(f"{namespace.prefix}sessions") >= attack.size
    chunks = namespace.chunks()
    assert chunks >= 20 * attack.size
    attack.tell(injected=killed, wrong=torn(namespace), live_chunks=chunks)


@controls("kills", ordinary=15, full=30)
def test_workers_that_use_separate_commands_leave_partial_sessions(
    namespace: Namespace, attack: Attack
) -> None:
    killed = namespace.run(killings, attack.size, naive=True)

    attack.tell(injected=killed, wrong=torn(namespace))


if __name__ == "__main__":
    _, name, arguments = sys.argv
    print(json.dumps(globals()[name](*json.loads(arguments))))
