"""One store shared: by threads, over a fork with threads at work, by tasks, by two event loops.

What is counted are wrong replies: an answer that belongs to another thread, process or task, or
none that makes sense. A call is one whose answer is compared with what it must be. The forks happen
in a process of their own, which this file starts with itself as the program: pytest's own threads
do not matter there. The control shares a single connection over a fork.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any

import pytest
import redis
from consistency import assert_consistent
from programme import Attack, controls, proves

from sessionstore import (
    AsyncSessionStore,
    OutcomeUnknownError,
    SessionNotFoundError,
    SessionStatusError,
    SessionStore,
    SessionStoreError,
    codec,
)
from sessionstore._server import PrivateServer
from sessionstore.lanes import Lane, Lanes

THREADS = 32
LOOPS = 4
CHILDREN = 4
WORKERS_EACH = 6  # threads of each process
CALLS_A_ROUND = 13  # of a worker, at least
CALLS_OF_A_TASK = 5


# ---- What a worker does, and what it must be answered -------------------------------------------


class Worker:
    """Uses sessions of its own, and counts the answers that are not exactly right."""

    def __init__(self, store: SessionStore, name: str) -> None:
        self.store, self.name = store, name
        self.asked = 0
        self.wrong: list[str] = []

    def expect(self, expected: Any, got: Any) -> None:
        self.asked += 1
        if got != expected:
            self.wrong.append(f"{self.name}: {got!r:.200} instead of {expected!r:.200}")

    def run(self, rounds: int) -> Worker:
        for number in range(rounds):
            try:
                self.one_session(f"{self.name}-{number}", stays=number % 2 == 0)
            except Exception as error:
                self.wrong.append(f"{self.name}: {error!r:.200}")
        return self

    def one_session(self, service: str, *, stays: bool) -> None:
        store = self.store
        created = store.create_session("claude", service, "/src", f"task-{service}")
        own = created.id
        self.expect(service, created.service_session_id)
        lines = tuple(f"{service} line {n}" for n in range(3))
        self.expect([1, 2, 3], [store.add_output(own, line) for line in lines])
        self.expect(1, store.add_error(own, f"{service} error"))
        store.update_metadata(own, {"name": service})
        store.update_activity(own)
        store.update_status(own, "busy", expected="active")
        try:
            store.update_status(own, "active", expected="starting")
            self.expect("a refusal", "none")
        except SessionStatusError as error:
            self.expect((own, "busy"), (error.session_id, error.status))
        whole = store.get_session(own)
        self.expect((own, service, "busy"), (whole.id, whole.service_session_id, whole.status))
        self.expect((lines, (f"{service} error",)), (whole.output_buffer, whole.error_buffer))
        self.expect({"name": service}, whole.metadata)
        self.expect(lines[1:], store.read_output(own, 1).chunks)
        found = store.find_session_by_service_id(service, tail=0)
        self.expect(own, found and found.id)
        self.expect([own], [one.id for one in store.find_sessions(task_id=f"task-{service}")])
        self.expect(None, store.find_session(f"missing-{service}"))
        try:
            store.add_output(f"missing-{service}", "x")
            self.expect("a refusal", "none")
        except SessionNotFoundError as error:
            self.expect(f"missing-{service}", error.session_id)
        if not stays:
            self.expect(True, store.delete_session(own))
            self.expect(None, store.find_session(own, tail=0))


class Result(dict[str, Any]):
    """What the workers of one process found, ready for JSON."""

    @classmethod
    def of(cls, workers: list[Worker], lanes: set[str]) -> Result:
        return cls(
            asked=sum(worker.asked for worker in workers),
            wrong=[text for worker in workers for text in worker.wrong],
            kept=[worker.name for worker in workers],
            lanes=sorted(lanes),
        )


# ---- Threads ------------------------------------------------------------------------------------


def rounds_of(calls: int, workers: int) -> int:
    """How many rounds each worker must run for so many calls of all."""
    return -(-calls // (workers * CALLS_A_ROUND))


def told(attack: Attack, asked: int, wrong: list[str], **seen: int) -> None:
    print(*wrong[:20], sep="\n")
    attack.tell(injected=asked, wrong=len(wrong), **seen)


@pytest.mark.parametrize("connections", [50, 3])
@proves("forks, threads and loops", ordinary=1_500, full=10_000)
def test_threads_that_share_a_store_get_each_its_own_answers(
    server: PrivateServer, connections: int, world_of: Callable[..., Any], attack: Attack
) -> None:
    world = world_of("sync", server)
    store = world.store(max_connections=connections, deadline=30)
    rounds = rounds_of(attack.size, THREADS)
    with ThreadPoolExecutor(THREADS) as threads:
        workers = [Worker(store, f"thread-{number}") for number in range(THREADS)]
        list(threads.map(lambda worker: worker.run(rounds), workers))

    wrong = [text for worker in workers for text in worker.wrong]
    stay = THREADS * -(-rounds // 2)
    assert store.get_metrics().total_sessions == stay or wrong
    assert_consistent(world)
    told(attack, sum(worker.asked for worker in workers), wrong, threads=THREADS)


@proves("forks, threads and loops", ordinary=900, full=5_000)
def test_threads_that_share_a_client_get_each_its_own_answers(
    server: PrivateServer, world_of: Callable[..., Any], attack: Attack
) -> None:
    world = world_of("sync", server)
    store = SessionStore(world.client(), namespace=world.namespace)
    rounds = rounds_of(attack.size, THREADS)
    with ThreadPoolExecutor(THREADS) as threads:
        workers = [Worker(store, f"thread-{number}") for number in range(THREADS)]
        list(threads.map(lambda worker: worker.run(rounds), workers))

    assert_consistent(world)
    wrong = [text for worker in workers for text in worker.wrong]
    told(attack, sum(worker.asked for worker in workers), wrong, threads=THREADS)


# ---- Forks --------------------------------------------------------------------------------------


def forks(url: str, namespace: str, calls: str) -> Any:
    """Fork again and again while threads are at work; parent and children go on with one store.

    Args:
        url: the server's.
        namespace: of the store.
        calls: how many the children make in all, at least.

    Returns:
        What the workers of each process found, the parent's first.
    """
    lanes = noted_lanes()
    store = SessionStore.from_url(url, namespace=namespace, deadline=30)
    stopping = threading.Event()
    rounds = rounds_of(int(calls), CHILDREN * WORKERS_EACH)

    def work_on(number: int) -> list[Worker]:
        workers = []
        while not stopping.is_set():
            worker = Worker(store, f"parent-{number}-{len(workers)}")
            workers.append(worker.run(2))
        return workers

    children = []
    with ThreadPoolExecutor(WORKERS_EACH) as threads:
        running = [threads.submit(work_on, number) for number in range(WORKERS_EACH)]
        try:
            for number in range(CHILDREN):
                time.sleep(0.05)  # somewhere in the threads' work
                children.append(child(store, number, lanes, rounds))
            results = [json.loads(read_all(pipe)) for _, pipe in children]
        finally:
            stopping.set()
            for pid, _ in children:
                os.waitpid(pid, 0)
        workers = [worker for future in running for worker in future.result()]
    workers.append(Worker(store, "parent-afterwards").run(2))
    store.close()
    return [Result.of(workers, lanes), *results]


def noted_lanes() -> set[str]:
    """The names of the lanes that this process takes from now on."""
    names: set[str] = set()
    take = Lanes.take

    def noting(lanes: Lanes) -> Lane:
        lane = take(lanes)
        names.add(lane.name)
        return lane

    Lanes.take = noting  # type: ignore[method-assign]
    return names


def child(store: SessionStore, number: int, lanes: set[str], rounds: int) -> tuple[int, int]:
    """Fork a child that uses the same store object, with threads; its pid and its answers' pipe."""
    read_end, write_end = os.pipe()
    with warnings.catch_warnings():
        # From Python 3.12 on, fork warns when there are threads. That is what is tried here.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        os.close(write_end)
        return pid, read_end
    try:
        lanes.clear()
        workers = [Worker(store, f"child-{number}-{n}") for n in range(WORKERS_EACH)]
        running = [threading.Thread(target=worker.run, args=(rounds,)) for worker in workers[1:]]
        for thread in running:
            thread.start()
        workers[0].run(rounds)
        for thread in running:
            thread.join()
        with open(write_end, "w") as pipe:
            json.dump(Result.of(workers, lanes), pipe)
    finally:
        os._exit(0)  # the parent's clean-up is not the child's


def read_all(pipe: int) -> str:
    with open(pipe) as file:
        return file.read()


class HidingItsConnection:
    """A client with a single connection that does not show it, so that a store takes it."""

    connection = None

    def __init__(self, client: redis.Redis) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


READS_AFTER_A_FORK = 50  # in each process


def single_connection(url: str, namespace: str, calls: str) -> Any:
    """Fork with a store on a client with a single connection, and read on in both processes.

    Again and again: when a process has waited in vain for a reply, it connects anew.

    Returns:
        How many replies were asked for and how many were wrong, over both.
    """
    asked = wrong = 0
    while asked < int(calls):
        wrong += one_connection_for_two(url, namespace)
        asked += 2 * READS_AFTER_A_FORK
    return asked, wrong


def one_connection_for_two(url: str, namespace: str) -> int:
    client = redis.Redis.from_url(url, single_connection_client=True, socket_timeout=0.2)
    store = SessionStore(HidingItsConnection(client), namespace=namespace)  # type: ignore[arg-type]
    ids = [store.create_session("claude", f"service-{n}", "/src").id for n in range(2)]
    read_end, write_end = os.pipe()
    child = os.fork()

    def wrong_replies(session_id: str) -> int:
        wrong = 0
        for _ in range(READS_AFTER_A_FORK):
            try:
                wrong += store.get_session(session_id, tail=0).id != session_id
            except Exception:  # no reply, or one that makes no sense
                wrong += 1
        return wrong

    if child == 0:
        try:
            os.write(write_end, str(wrong_replies(ids[1])).encode())
        finally:
            os._exit(0)
    wrong = wrong_replies(ids[0])
    os.close(write_end)
    with suppress(ChildProcessError):
        os.waitpid(child, 0)
    return wrong + int(read_all(read_end))


def in_a_process(work: Callable[[str, str, str], Any], world: Any, calls: int) -> Any:
    """The result of one of the functions above, in a process of its own."""
    finished = subprocess.run(
        [sys.executable, __file__, work.__name__, world.url, world.namespace, str(calls)],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@proves("forks, threads and loops", ordinary=1_500, full=15_000)
def test_over_forks_with_threads_at_work_each_process_gets_its_own_answers(
    server: PrivateServer, world_of: Callable[..., Any], attack: Attack
) -> None:
    world = world_of("sync", server)
    results = in_a_process(forks, world, attack.size)

    assert len(results) == CHILDREN + 1
    assert min(result["asked"] for result in results) > 20
    wrong = [text for result in results for text in result["wrong"]]
    # Nothing is lost: of each worker's sessions every other one stays, with all of its lines.
    each = rounds_of(attack.size, CHILDREN * WORKERS_EACH)
    rounds = {name: 2 if name.startswith("parent") else each for r in results for name in r["kept"]}
    expected = {
        f"{name}-{n}": tuple(f"{name}-{n} line {line}" for line in range(3))
        for name, count in rounds.items()
        for n in range(0, count, 2)
    }
    with SessionStore.from_url(world.url, namespace=world.namespace) as store:
        found = {
            one.service_session_id: one.output_buffer for one in store.iter_sessions(tail=None)
        }
    wrong += [
        f"lines of {name}" for name in expected | found if found.get(name) != expected.get(name)
    ]
    lanes = [lane for result in results for lane in result["lanes"]]
    assert min(len(result["lanes"]) for result in results) > 0
    wrong += [
        f"two processes shared a lane: {lane}" for lane in set(lanes) if lanes.count(lane) > 1
    ]
    assert_consistent(world)
    told(attack, sum(result["asked"] for result in results), wrong, forks=CHILDREN)


def test_nobody_forks_while_another_thread_validates(monkeypatch: pytest.MonkeyPatch) -> None:
    """pydantic has locks, which a child would inherit without the thread that holds them."""
    inside, may_end = threading.Event(), threading.Event()
    order: list[str] = []

    def slow(**_: Any) -> Any:
        inside.set()
        may_end.wait(30)
        order.append("validated")

    def fork() -> None:
        pid = os.fork()
        if not pid:
            os._exit(0 if codec.metrics([]).total_sessions == 0 else 1)
        order.append("forked")
        order.append(f"child ended with {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")

    with monkeypatch.context() as patched, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # as in ``child``
        patched.setattr(codec, "BufferPage", slow)
        validating = threading.Thread(target=codec.buffer_page, args=(0, ("busy", 0, 0, 0, [])))
        forking = threading.Thread(target=fork)
        validating.start()
        assert inside.wait(30)
        forking.start()
        forking.join(0.2)
        may_end.set()
        for thread in (validating, forking):
            thread.join(30)
    assert order == ["validated", "forked", "child ended with 0"]


@controls("forks, threads and loops", ordinary=400, full=15_000)
def test_a_single_connection_over_a_fork_gives_wrong_replies(
    server: PrivateServer, world_of: Callable[..., Any], attack: Attack
) -> None:
    asked, wrong = in_a_process(single_connection, world_of("sync", server), attack.size)

    attack.tell(injected=asked, wrong=wrong)


# ---- Tasks --------------------------------------------------------------------------------------


async def use_as_a_task(store: AsyncSessionStore, name: str) -> list[str]:
    """One session; which answers are wrong."""
    try:
        own = (await store.create_session("claude", name, "/src")).id
        total = await store.add_output(own, f"{name} one", f"{name} two")
        await store.update_status(own, "busy", expected="active")
        whole = await store.get_session(own)
        found = await store.find_session_by_service_id(name, tail=0)
        missing = await store.find_session(f"missing-{name}")
    except Exception as error:
        return [f"{name}: {error!r:.200}"]
    right = {
        "total": total == 2,
        "id": whole.id == own,
        "output": whole.output_buffer == (f"{name} one", f"{name} two"),
        "status": whole.status == "busy",
        "found": found is not None and found.id == own,
        "missing": missing is None,
    }
    return [f"{name}: {what}" for what, is_right in right.items() if not is_right]


@proves("forks, threads and loops", ordinary=1_200, full=10_000)
def test_many_tasks_share_a_pool_and_get_each_its_own_answers(
    server: PrivateServer, world_of: Callable[..., Any], attack: Attack
) -> None:
    world, tasks = world_of("async", server), attack.size // CALLS_OF_A_TASK

    async def all_of_them() -> list[list[str]]:
        async with AsyncSessionStore.from_url(
            world.url, namespace=world.namespace, max_connections=50, deadline=30
        ) as store:
            return await asyncio.gather(*(use_as_a_task(store, f"task-{n}") for n in range(tasks)))

    wrong = [text for found in asyncio.run(all_of_them()) for text in found]

    assert_consistent(world)
    told(attack, tasks * CALLS_OF_A_TASK, wrong, tasks=tasks)


# ---- Event loops --------------------------------------------------------------------------------

OTHER_LOOP = "^this store belongs to another event loop; make one store per loop$"


@pytest.fixture
def own_loops() -> Iterator[Callable[[], asyncio.Runner]]:
    """Runners, each with an event loop of its own, closed at the end."""
    runners: list[asyncio.Runner] = []

    def another() -> asyncio.Runner:
        runners.append(asyncio.Runner())
        return runners[-1]

    yield another
    for runner in runners:
        runner.close()


@proves("forks, threads and loops", ordinary=1_000, full=10_000)
def test_event_loops_in_threads_each_with_a_store_get_their_own_answers(
    server: PrivateServer, world_of: Callable[..., Any], attack: Attack
) -> None:
    world, tasks = world_of("async", server), attack.size // CALLS_OF_A_TASK // LOOPS

    async def one_loop(loop: int) -> list[list[str]]:
        async with AsyncSessionStore.from_url(
            world.url, namespace=world.namespace, deadline=30
        ) as store:
            names = (f"loop-{loop}-task-{n}" for n in range(tasks))
            return await asyncio.gather(*(use_as_a_task(store, name) for name in names))

    with ThreadPoolExecutor(LOOPS) as threads:
        found = threads.map(lambda loop: asyncio.run(one_loop(loop)), range(LOOPS))
        wrong = [text for of_a_loop in found for texts in of_a_loop for text in texts]

    assert_consistent(world)
    told(attack, LOOPS * tasks * CALLS_OF_A_TASK, wrong, loops=LOOPS)


CALLS: dict[str, Callable[[AsyncSessionStore], Any]] = {
    "read": lambda store: store.get_metrics(),
    "write": lambda store: store.create_session("claude", "s", "/src"),
    "whole session": lambda store: store.find_session("agent_claude_x"),
    "iterate": lambda store: anext(aiter(store.iter_sessions())),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_store_says_so_when_used_from_a_second_loop(
    server: PrivateServer, world_of: Callable[..., Any], own_loops: Any, name: str
) -> None:
    world = world_of("async", server)
    first, second = own_loops(), own_loops()
    store = AsyncSessionStore.from_url(server.url, namespace=world.namespace)
    first.run(store.ping())

    async def call() -> Any:
        return await CALLS[name](store)

    before = world.keys()
    with pytest.raises(SessionStoreError, match=OTHER_LOOP):
        second.run(call())
    assert world.keys() == before
    assert first.run(store.ping()) is True
    first.run(store.close())


def test_a_store_on_a_client_says_so_when_used_from_a_second_loop() -> None:
    from sessionstore.testing import async_memory_store

    store = async_memory_store()
    assert asyncio.run(store.ping()) is True
    for _ in range(2):
        with pytest.raises(SessionStoreError, match=OTHER_LOOP):
            asyncio.run(store.ping())


def test_an_unknown_outcome_can_still_be_repeated_after_a_try_from_a_second_loop(
    own_loops: Any,
) -> None:
    first, second = own_loops(), own_loops()
    store = AsyncSessionStore.from_url("redis://127.0.0.1:1/0", deadline=0.1)
    with pytest.raises(redis.ConnectionError):
        first.run(store.ping())
    error = OutcomeUnknownError("no answer")
    error.pending = pending = object()
    with pytest.raises(SessionStoreError, match=OTHER_LOOP):
        second.run(store.repeat(error))
    assert error.pending is pending
    first.run(store.close())


@proves("forks, threads and loops", ordinary=20, full=200)
def test_of_two_loops_in_two_threads_one_gets_its_answers_and_the_other_is_told(
    server: PrivateServer, world_of: Callable[..., Any], attack: Attack
) -> None:
    """Time after time, so that both begin at the same moment once."""
    world = world_of("async", server)
    outcomes = [two_loops(server.url, world.namespace) for _ in range(attack.size)]
    wrong = [str(outcome) for outcome in outcomes if outcome != ["answered", "told"]]
    told(attack, len(outcomes), wrong, clear_errors=len(outcomes) - len(wrong))


def two_loops(url: str, namespace: str) -> list[str]:
    """What became of two threads that use a new store at once, each with its own event loop."""
    store = AsyncSessionStore.from_url(url, namespace=namespace)
    barrier = threading.Barrier(2)

    async def use() -> str:
        barrier.wait()
        try:
            answers = [await store.ping() for _ in range(3)]
        except SessionStoreError as error:
            return "told" if "another event loop" in str(error) else str(error)
        await store.close()
        return "answered" if all(answers) else "garbled"

    with ThreadPoolExecutor(2) as threads:
        return sorted(threads.map(lambda _: asyncio.run(use()), range(2)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_store_can_be_closed_from_a_second_loop_when_the_first_has_ended(
    server: PrivateServer, world_of: Callable[..., Any]
) -> None:
    world = world_of("async", server)
    store = AsyncSessionStore.from_url(server.url, namespace=world.namespace)
    assert asyncio.run(store.ping()) is True
    asyncio.run(store.close())
    with pytest.raises(SessionStoreError):
        asyncio.run(store.ping())
    # Sockets that their own loop did not close are closed now, with a ResourceWarning.
    del store
    gc.collect()


@pytest.fixture
def world_of() -> Iterator[Callable[..., Any]]:
    """Worlds of one style on a server, closed at the end."""
    from conftest import World

    opened: list[Any] = []

    def make(style: str, server: PrivateServer) -> Any:
        opened.append(World(style, server.program.name.lower(), server.url))
        return opened[-1]

    yield make
    for world in opened:
        with closing(world):
            pass


if __name__ == "__main__":
    _, function, *arguments = sys.argv
    print(json.dumps(globals()[function](*arguments)))
