"""Asyncio calls that are made together travel together, and notice nothing of it.

Each gets its own reply or error, whoever is cancelled, whatever breaks. The control hands replies
out as one might at first, and the same storm of cancellations catches it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import closing
from typing import Any

import pytest
import redis
import redis.asyncio
from conftest import World
from consistency import assert_consistent
from faults import Fault, FaultyWorld, seeded, shuffled
from programme import Attack, controls, proves
from sendings import noted_sendings

from sessionstore import (
    AsyncSessionStore,
    SessionNotFoundError,
    SessionStatusError,
    SessionStoreError,
)
from sessionstore._server import PrivateServer
from sessionstore.coalescing import LARGE_REPLY, MOST_BYTES, MOST_CALLS, Coalescer
from sessionstore.testing import async_memory_store

Use = Callable[[AsyncSessionStore], Coroutine[Any, Any, Any]]


@pytest.fixture
def world(server: PrivateServer) -> Iterator[World]:
    """A namespace on each real server."""
    with closing(World("async", server.program.name.lower(), server.url)) as opened:
        yield opened


def run(world: World, use: Use, **settings: Any) -> Any:
    """What ``use`` returns, on a store and in an event loop of its own; no task is left."""

    async def main() -> Any:
        assert world.url is not None
        async with AsyncSessionStore.from_url(
            world.url, namespace=world.namespace, **settings
        ) as store:
            result = await use(store)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return result

    return asyncio.run(main())


async def sessions(store: AsyncSessionStore, number: int) -> list[str]:
    async with store.batch() as batch:
        made = [batch.create_session("claude", f"service-{n}", "/src") for n in range(number)]
    return [one.result().id for one in made]


def scripts_in(sending: bytes) -> int:
    return sending.count(b"EVALSHA")


# ---- Together and alone --------------------------------------------------------------------------


def test_calls_at_the_same_time_travel_in_few_pipelines(world: World) -> None:
    async def use(store: AsyncSessionStore) -> list[bytes]:
        ids = await sessions(store, 10)
        await store.add_output(ids[0], "the script is known")
        with noted_sendings() as sent:
            totals = await asyncio.gather(
                *(store.add_output(ids[n % 9 + 1], "x") for n in range(900))
            )
        assert Counter(totals) == dict.fromkeys(range(1, 101), 9)
        return sent

    sent = [sending for sending in run(world, use) if scripts_in(sending)]
    assert sum(map(scripts_in, sent)) == 900
    assert max(map(scripts_in, sent)) <= MOST_CALLS
    assert len(sent) <= 900 // MOST_CALLS + 3


def test_a_lone_call_goes_alone_and_at_once(world: World) -> None:
    async def use(store: AsyncSessionStore) -> list[bytes]:
        (own,) = await sessions(store, 1)
        await store.add_output(own, "the script is known")
        with noted_sendings() as sent:
            for number in range(20):
                assert await store.add_output(own, "x") == number + 2
        return sent

    assert list(map(scripts_in, run(world, use))) == [1] * 20


def test_without_coalescing_each_call_goes_alone(world: World) -> None:
    async def use(store: AsyncSessionStore) -> list[bytes]:
        (own,) = await sessions(store, 1)
        await asyncio.gather(*(store.add_output(own, "x") for _ in range(50)))
        with noted_sendings() as sent:
            await asyncio.gather(*(store.add_output(own, "x") for _ in range(50)))
        return sent

    sent = run(world, use, coalesce=False)
    assert [scripts_in(sending) for sending in sent if scripts_in(sending)] == [1] * 50


def test_pipelines_are_bounded_in_bytes(world: World) -> None:
    size = 60_000

    async def use(store: AsyncSessionStore) -> list[bytes]:
        (own,) = await sessions(store, 1)
        await store.add_output(own, "x")
        with noted_sendings() as sent:
            await asyncio.gather(*(store.add_output(own, "x" * size) for _ in range(60)))
        return sent

    sent = run(world, use)
    assert sum(map(scripts_in, sent)) == 60
    assert max(map(scripts_in, sent)) == MOST_BYTES // size
    assert max(map(len, sent)) < MOST_BYTES + 20_000


def test_pipelines_of_large_pages_are_bounded(world: World) -> None:
    async def use(store: AsyncSessionStore) -> list[bytes]:
        (own,) = await sessions(store, 1)
        await store.add_output(own, *["x" * 1000] * 1000)
        await store.read_output(own)
        with noted_sendings() as sent:
            pages = await asyncio.gather(*(store.read_output(own) for _ in range(64)))
        assert {len(page.chunks) for page in pages} == {1000}
        return sent

    sent = run(world, use)
    assert 1 < max(map(scripts_in, sent)) <= MOST_BYTES // LARGE_REPLY


def test_whole_sessions_travel_alone(world: World) -> None:
    async def use(store: AsyncSessionStore) -> list[bytes]:
        ids = await sessions(store, 30)
        with noted_sendings() as sent:
            read = await asyncio.gather(
                *(store.get_session(own) for own in ids), *(store.ping() for _ in ids)
            )
        assert [one.id for one in read[:30]] == ids
        return sent

    sent = run(world, use)
    whole = [sending for sending in sent if b"MULTI" in sending]
    assert [sending.count(b"MULTI") for sending in whole] == [1] * 30
    assert not any(map(scripts_in, whole))


def test_a_new_store_is_opened_once_for_all_its_tasks(world: World) -> None:
    async def use(store: AsyncSessionStore) -> list[bytes]:
        with noted_sendings() as sent:
            assert await asyncio.gather(*(store.ping() for _ in range(100))) == [True] * 100
        return sent

    assert sum(b"\r\nINFO\r\n" in sending for sending in run(world, use)) == 1


def test_of_tasks_that_open_a_store_any_may_be_cancelled(world: World) -> None:
    async def use(store: AsyncSessionStore) -> list[Any]:
        tasks = [asyncio.create_task(store.ping()) for _ in range(20)]
        await asyncio.sleep(0)
        for task in tasks[:10]:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = run(world, use)
    assert [type(one) for one in results[:10]] == [asyncio.CancelledError] * 10
    assert results[10:] == [True] * 10


def test_each_task_that_cannot_open_a_store_has_an_error_of_its_own() -> None:
    async def main() -> list[Any]:
        store = AsyncSessionStore.from_url("redis://127.0.0.1:1/0", deadline=0.3)
        began = time.monotonic()
        results = await asyncio.gather(*(store.ping() for _ in range(50)), return_exceptions=True)
        assert time.monotonic() - began < 0.8
        await store.close()
        return results

    results = asyncio.run(main())
    assert {type(one) for one in results} == {redis.ConnectionError}
    assert len(set(map(id, results))) == 50


# ---- Its own error -------------------------------------------------------------------------------


async def mixed_calls(store: AsyncSessionStore, spoil: Callable[[str], object]) -> list[Any]:
    """Good calls, refused ones, and some on a key of the wrong type, all at once."""
    good, spoilt = await sessions(store, 2)
    spoil(spoilt)
    calls: list[Awaitable[Any]] = []
    for _ in range(30):
        calls += [
            store.add_output(good, "x"),
            store.add_output("missing", "x"),
            store.update_status(good, "busy", expected="error"),
            store.add_output(spoilt, "x"),
            store.get_session(good, tail=0),
        ]
    return await asyncio.gather(*calls, return_exceptions=True)


def assert_each_its_own(results: list[Any]) -> None:
    assert sorted(results[0::5]) == list(range(1, 31))
    assert {type(one) for one in results[1::5]} == {SessionNotFoundError}
    assert {type(one) for one in results[2::5]} == {SessionStatusError}
    assert all(isinstance(one, redis.ResponseError) for one in results[3::5])
    assert all("WRONGTYPE" in str(one) or "wrong kind" in str(one) for one in results[3::5])
    errors = [one for one in results if isinstance(one, Exception)]
    assert len(set(map(id, errors))) == len(errors) == 90


def test_a_calls_error_is_its_own(world: World) -> None:
    def spoil(session_id: str) -> None:
        world.redis.set(f"{world.session(session_id)}:output", "not a list")

    assert_each_its_own(run(world, lambda store: mixed_calls(store, spoil)))


def test_a_calls_error_is_its_own_in_memory() -> None:
    async def main() -> list[Any]:
        async with async_memory_store() as store:
            ids = await sessions(store, 1)
            return await asyncio.gather(
                *(store.add_output(ids[0], "x") for _ in range(20)),
                *(store.add_output("missing", "x") for _ in range(20)),
                return_exceptions=True,
            )

    results = asyncio.run(main())
    assert sorted(results[:20]) == list(range(1, 21))
    assert {type(one) for one in results[20:]} == {SessionNotFoundError}


def test_bytes_that_are_no_text_spoil_no_other_call(world: World) -> None:
    """Through a client that decodes strictly, as redis-py's do."""

    async def main() -> list[Any]:
        async with redis.asyncio.Redis.from_url(world.url, decode_responses=True) as client:
            store = AsyncSessionStore(client, namespace=world.namespace)
            bad, good = await sessions(store, 2)
            world.redis.rpush(f"{world.session(bad)}:output", b"\xff")
            world.redis.hset(world.session(bad), "output_total", 1)
            results = await asyncio.gather(
                *(store.add_output(good, "x") for _ in range(10)),
                store.read_output(bad),
                *(store.add_output(good, "x") for _ in range(10)),
                return_exceptions=True,
            )
            async with store.batch() as batch:
                appended = batch.add_output(good, "x")
                batch.read_output(bad)
            assert appended.result() == 21
            await store.close()
            return results

    results = asyncio.run(main())
    assert results.pop(10).chunks == ("\ufffd",)
    assert sorted(results) == list(range(1, 21))


# ---- Cancelled callers ---------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [0, 1, 2, 3, None])
def test_a_cancelled_caller_disturbs_nobody(world: World, turns: int | None) -> None:
    """Cancelled before it is sent, on its way, and after so many turns of the loop."""

    async def use(store: AsyncSessionStore) -> None:
        ids = await sessions(store, 40)
        tasks = [asyncio.create_task(store.add_output(own, own)) for own in ids]
        if turns is None:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for _ in range(turns or 0):
            await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert results[1::2] == [1] * 20
        again = await asyncio.gather(*(store.add_output(own, "again") for own in ids))
        assert set(again[1::2]) == {2}
        for own, result, total in zip(ids, results, again, strict=True):
            stored = (await store.get_session(own)).output_buffer
            assert sorted(stored) in (["again"], sorted([own, "again"]))
            assert result != 1 or total == 2

    run(world, use)
    assert_consistent(world)


WORKERS = 60


class Stormy:
    """Workers that cancel most of their calls; each can tell its own replies from others'."""

    def __init__(self, store: AsyncSessionStore, ids: list[str], most: int, rng: Any) -> None:
        self.store, self.ids, self.most, self.rng = store, ids, most, rng
        self.cancelled = self.answered = self.wrong = 0
        self.acknowledged: dict[str, list[str]] = {own: [] for own in ids}

    async def run(self) -> None:
        await asyncio.gather(*map(self.work, self.ids))

    async def work(self, own: str) -> None:
        number = total = 0
        while self.cancelled < self.most:
            number += 1
            line = f"{own} {number}"
            kind = number % 3
            call: Coroutine[Any, Any, Any] = (
                self.store.add_output(own, line) if kind == 0
                else self.store.get_session(own, tail=0) if kind == 1
                else self.store.read_output(own, max(0, total - 1), 2)
            )  # fmt: skip
            task = asyncio.create_task(call)
            for _ in range(self.rng.randrange(8)):
                await asyncio.sleep(0)
            if self.rng.random() < 0.9:
                task.cancel()
            try:
                reply = await task
            except asyncio.CancelledError:
                self.cancelled += 1
                continue
            except Exception:
                self.wrong += 1
                continue
            self.answered += 1
            if kind == 0:
                is_own = isinstance(reply, int) and total < reply <= number
                self.acknowledged[own].append(line)
                total = reply if is_own else total
            elif kind == 1:
                is_own = reply.id == own
            else:
                is_own = all(chunk.startswith(own) for chunk in reply.chunks)
            self.wrong += not is_own


def storm(world: World, most: int) -> tuple[Stormy, dict[str, tuple[str, ...]]]:
    """A storm, and afterwards a calm in which everything must be as it should."""
    rng = seeded()

    async def use(store: AsyncSessionStore) -> Any:
        stormy = Stormy(store, await sessions(store, WORKERS), most, rng)
        await stormy.run()
        if stormy.wrong:
            return stormy, {}
        assert all(await asyncio.gather(*(calmly(store, own) for own in stormy.ids)))
        pool: Any = store._client.connection_pool
        assert not pool._in_use_connections
        lanes = [lane.name for lane in store._lanes._free]
        assert len(lanes) == len(set(lanes))
        return stormy, {one.id: one.output_buffer for one in await store.get_all_sessions()}

    stormy, buffers = run(world, use, max_connections=8)
    return stormy, buffers


async def calmly(store: AsyncSessionStore, own: str) -> bool:
    first = await store.add_output(own, f"{own} calm 0")
    totals = [await store.add_output(own, f"{own} calm {n}") for n in range(1, 4)]
    return totals == [first + n for n in range(1, 4)]


@proves("cancellations", ordinary=5_000, full=200_000)
def test_in_a_storm_of_cancellations_every_reply_reaches_its_own_caller(
    world: World, attack: Attack
) -> None:
    stormy, buffers = storm(world, attack.size)
    attack.tell(injected=stormy.cancelled, wrong=stormy.wrong, answered=stormy.answered)
    assert stormy.answered > attack.size // 20
    for own, lines in buffers.items():
        assert len(lines) == len(set(lines)), "a write happened twice"
        acknowledged = set(stormy.acknowledged[own])
        assert [line for line in lines if line in acknowledged] == stormy.acknowledged[own]
        assert lines[-4:] == tuple(f"{own} calm {n}" for n in range(4))
    assert world.redis.info("clients")["connected_clients"] < 20
    assert_consistent(world)


async def by_index(coalescer: Any, gathered: list[Any]) -> None:
    """Replies handed to those who still wait, in their order: as one might at first."""
    replies = await coalescer._together([command for command, _, _ in gathered])
    waiting = [future for *_, future in gathered if not future.done()]
    for future, reply in zip(waiting, replies, strict=False):
        if isinstance(reply, Exception):
            future.set_exception(reply)
        else:
            future.set_result(reply)
    coalescer._has_come_back()


@controls("cancellations", ordinary=1000)
def test_replies_handed_out_by_index_reach_the_wrong_callers(
    world: World, monkeypatch: pytest.MonkeyPatch, attack: Attack
) -> None:
    monkeypatch.setattr(Coalescer, "_send_together", by_index)
    stormy, _ = storm(world, attack.size)
    attack.tell(injected=stormy.cancelled, wrong=stormy.wrong)


def pipelines_of(store: AsyncSessionStore) -> set[asyncio.Task[None]]:
    assert store._coalescing is not None
    return store._coalescing._pipelines


def test_a_pipeline_that_others_cancel_leaves_nobody_waiting(world: World) -> None:
    """As a framework may that cancels every task it finds; callers then send again."""

    async def use(store: AsyncSessionStore) -> None:
        (own,) = await sessions(store, 1)
        cancelled = 0
        for turns in range(4):
            tasks = [asyncio.create_task(store.add_output(own, "x")) for _ in range(30)]
            for _ in range(turns + 1):
                await asyncio.sleep(0)
            for task in list(pipelines_of(store)):
                task.cancel()
                cancelled += 1
            totals = await asyncio.wait_for(asyncio.gather(*tasks), 10)
            assert sorted(totals) == list(range(turns * 30 + 1, turns * 30 + 31))
        assert cancelled >= 2

    run(world, use)


# ---- Scripts, replies and servers that get lost --------------------------------------------------

TASKS, APPENDS = 64, 12


async def append_all(store: AsyncSessionStore, ids: list[str], appends: int = APPENDS) -> None:
    """One task a session appends line after line; each answer must be the next total."""

    async def append(own: str) -> None:
        for number in range(appends):
            assert await store.add_output(own, str(number)) == number + 1

    await asyncio.gather(*map(append, ids))


def assert_all_once(world: World, appends: int = APPENDS, tasks: int = TASKS) -> None:
    lines = [str(number) for number in range(appends)]
    ids = world.redis.zrange(f"{world.prefix}sessions", 0, -1)
    assert len(ids) == tasks
    for own in ids:
        assert world.redis.lrange(f"{world.session(own)}:output", 0, -1) == lines


def test_a_lost_script_reaches_no_caller(world: World) -> None:
    stopping = threading.Event()
    flushes = 0

    def flush() -> None:
        nonlocal flushes
        while not stopping.wait(0.002):
            world.redis.script_flush()
            flushes += 1

    async def use(store: AsyncSessionStore) -> None:
        await append_all(store, await sessions(store, TASKS), 30)

    thread = threading.Thread(target=flush)
    thread.start()
    try:
        run(world, use)
    finally:
        stopping.set()
        thread.join()
    assert flushes >= 10
    assert_all_once(world, 30)
    assert_consistent(world)


BREAKS = (Fault.LOSE_REQUEST, Fault.CUT_REQUEST, Fault.LOSE_REPLY, Fault.CUT_REPLY)


def test_at_random_faults_each_call_of_many_tasks_happens_once(server: PrivateServer) -> None:
    with closing(FaultyWorld("async", server)) as world:
        faults = BREAKS * 4
        world.proxy.plan(shuffled(seeded(), faults, TASKS * APPENDS))
        ids = [world.direct.create_session("claude", f"s{n}", "/src").id for n in range(TASKS)]

        run(world, lambda store: append_all(store, ids))

        assert world.proxy.injected == Counter(faults)
        for harmed in world.proxy.harmed:
            world.proxy.deliver(harmed.request)
        assert_all_once(world)
        assert_consistent(world)


def test_a_restart_of_the_server_is_ridden_out(own_server: PrivateServer) -> None:
    with closing(World("async", own_server.program.name.lower(), own_server.url)) as world:
        world.redis.config_set("appendfsync", "always")
        begun = threading.Event()

        def restart() -> None:
            begun.wait()
            time.sleep(0.05)
            own_server.kill()
            own_server.start()

        async def use(store: AsyncSessionStore) -> None:
            ids = await sessions(store, TASKS)
            begun.set()
            await append_all(store, ids, 40)

        thread = threading.Thread(target=restart)
        thread.start()
        run(world, use)
        thread.join()
        assert_all_once(world, 40)
        assert_consistent(world)


# ---- Clients that are handed in ------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"decode_responses": True},
    "RESP 3": {"protocol": 3},
    "text, RESP 3": {"decode_responses": True, "protocol": 3},
    "a pool of 2": {"max_connections": 2},
    "a pool of 4": {"max_connections": 4},
    "text, a pool of 4": {"max_connections": 4, "decode_responses": True},
}


@pytest.mark.parametrize(
    ("name", "partitions"), [*((name, 1) for name in OPTIONS), ("a pool of 4", 16)]
)
def test_many_tasks_share_a_client_whatever_its_options(
    world: World, name: str, partitions: int
) -> None:
    async def one(store: AsyncSessionStore, number: int) -> list[Any]:
        own = (await store.create_session("claude", f"s{number}", "/é", metadata={"a": "é"})).id
        total = await store.add_output(own, "é", str(number))
        whole = await store.get_session(own)
        async with store.batch() as batch:
            status = batch.update_status(own, "busy")
            read = batch.get_session(own)
        found = await store.find_session_by_service_id(f"s{number}", tail=0)
        counted = (await store.get_metrics()).total_sessions
        assert found is not None
        assert counted > 0
        return [
            total, whole.output_buffer, status.result(), read.result().output_buffer,
            found.id == own, found.status, found.metadata,
        ]  # fmt: skip

    async def main() -> list[list[Any]]:
        async with redis.asyncio.Redis.from_url(world.url, **OPTIONS[name]) as client:
            store = AsyncSessionStore(client, namespace=world.namespace, partitions=partitions)
            results = await asyncio.gather(*(one(store, number) for number in range(200)))
            await store.close()
            return results

    world.partitions = partitions
    world.prefixes = World("async", world.target, world.url, partitions).prefixes
    assert asyncio.run(main()) == [
        [2, ("é", str(n)), None, ("é", str(n)), True, "busy", {"a": "é"}] for n in range(200)
    ]


# ---- Order, fairness, the end --------------------------------------------------------------------


def test_calls_of_one_task_stay_in_order_among_those_of_others(world: World) -> None:
    async def use(store: AsyncSessionStore) -> None:
        await append_all(store, await sessions(store, TASKS), 40)

    run(world, use)
    assert_all_once(world, 40)


def test_no_call_starves_under_constant_load(world: World) -> None:
    async def use(store: AsyncSessionStore) -> list[int]:
        ids = await sessions(store, 300)
        rounds = Counter[str]()
        stopping = False

        async def load(own: str) -> None:
            while not stopping:
                await store.add_output(own, "x")
                rounds[own] += 1

        loading = [asyncio.create_task(load(own)) for own in ids]
        for _ in range(20):
            before = rounds.total()
            await store.ping()
            waited.append(rounds.total() - before)
        stopping = True
        await asyncio.gather(*loading)
        return list(rounds.values())

    waited: list[int] = []
    done = run(world, use)
    # While one call waits, no other gets more than a few turns.
    assert max(waited) <= 4 * 300
    assert max(done) <= 2 * min(done)


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 20])
def test_calls_on_their_way_end_when_the_store_is_closed(world: World, turns: int) -> None:
    async def main() -> tuple[list[str], list[Any]]:
        assert world.url is not None
        store = AsyncSessionStore.from_url(world.url, namespace=world.namespace)
        ids = await sessions(store, 200)
        tasks = [asyncio.create_task(store.add_output(own, "x")) for own in ids]
        tasks.append(asyncio.create_task(store.ping()))
        for _ in range(turns):
            await asyncio.sleep(0)
        await store.close()
        others = asyncio.all_tasks() - {asyncio.current_task(), *tasks}
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert others == set()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return ids, results[:-1]

    ids, results = asyncio.run(main())
    for own, result in zip(ids, results, strict=True):
        stored = world.redis.llen(f"{world.session(own)}:output")
        if result == 1:
            assert stored == 1
        else:
            assert isinstance(result, SessionStoreError)
            assert "closed" in str(result)
            assert stored == 0
    assert_consistent(world)


def test_a_lone_call_on_its_way_is_answered_when_the_store_is_closed(
    server: PrivateServer,
) -> None:
    with closing(FaultyWorld("async", server, delay=0.2)) as world:
        own = world.direct.create_session("claude", "service", "/src").id

        async def main() -> Any:
            store = AsyncSessionStore.from_url(world.proxy.url, namespace=world.namespace)
            await store.ping()
            world.proxy.plan([Fault.DELAY_REPLY])
            task = asyncio.create_task(store.add_output(own, "x"))
            while not world.proxy.harmed:
                await asyncio.sleep(0.01)
            await store.close()
            return await task

        assert asyncio.run(main()) == 1


def test_closing_a_store_of_a_mute_server_ends_in_time(server: PrivateServer) -> None:
    """On a client without timeouts, which would wait for ever."""
    with closing(FaultyWorld("async", server)) as world:
        own = world.direct.create_session("claude", "service", "/src").id

        async def main() -> list[Any]:
            async with redis.asyncio.Redis.from_url(world.proxy.url, socket_timeout=None) as client:
                store = AsyncSessionStore(client, namespace=world.namespace, deadline=0.3)
                await store.ping()
                world.proxy.plan([Fault.NEVER_REPLY] * 8)
                tasks = [asyncio.create_task(store.add_output(own, "x")) for _ in range(30)]
                await asyncio.sleep(0.05)
                began = time.monotonic()
                await store.close()
                assert time.monotonic() - began < 3
                done, hanging = await asyncio.wait(tasks, timeout=1)
                for task in hanging:  # the first went alone, on the client's own patience
                    task.cancel()
                await asyncio.gather(*hanging, return_exceptions=True)
                assert len(hanging) <= 1
                return [task.exception() for task in done]

        errors = asyncio.run(main())
        assert all(isinstance(one, (redis.RedisError, SessionStoreError)) for one in errors)
