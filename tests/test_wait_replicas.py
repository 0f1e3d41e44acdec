"""``wait_replicas``: a write is answered when replicas have it, or its caller is told.

What a promoted replica has is what counts: the primary is killed while its replica is held up.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from uuid import uuid4

import fakeredis
import fakeredis.aioredis
import pytest
import redis
from commandline import command_line
from conftest import PROGRAMS, STYLES, Awaiting, World
from programme import Attack, controls, proves
from replicas import Pair
from sendings import noted_sendings
from sentinels import PrivateSentinels
from test_contract_batch import batch_of
from test_sentinel import FAILOVERS, NOTICED
from workers import Appending, at_work

from sessionstore import (
    AsyncSessionStore,
    DurabilityError,
    InvalidArgumentError,
    OutcomeUnknownError,
    SessionNotFoundError,
    SessionStore,
)
from sessionstore.pipelining import Replication

DEADLINE = 20.0


@pytest.fixture(params=PROGRAMS, scope="module")
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    started = Pair(PROGRAMS[request.param])
    yield started
    started.stop()


@pytest.fixture(params=STYLES)
def world(request: pytest.FixtureRequest, pair: Pair) -> Iterator[World]:
    one = World(request.param, "pair", pair.primary.url)
    yield one
    one.close()


@pytest.fixture
def store(world: World) -> Any:
    return world.store(wait_replicas=1, deadline=2.0)


def created(store: Any) -> str:
    return str(store.create_session("claude", "service", "/src").id)


def on_replica(pair: Pair, world: World, session_id: str) -> list[str]:
    with redis.Redis(port=pair.replica.port, decode_responses=True) as client:
        found: Any = client.lrange(world.session(session_id, ":output"), 0, -1)
    return list(found)


def test_what_is_answered_a_replica_has(pair: Pair, world: World, store: Any) -> None:
    session_id = created(store)
    for number in range(50):
        store.add_output(session_id, str(number))
        assert len(on_replica(pair, world, session_id)) == number + 1


def test_a_write_that_no_replica_has_is_told_and_can_be_repeated(
    pair: Pair, world: World, store: Any
) -> None:
    session_id = created(store)
    with pair.held_up():
        with pytest.raises(DurabilityError, match=r"^carried out, but 0 of 1 replicas") as told:
            store.add_output(session_id, "line")
        assert (told.value.code, told.value.acknowledged, told.value.wanted) == ("DURABILITY", 0, 1)
        with pytest.raises(DurabilityError) as again:
            store.repeat(told.value)
    assert store.repeat(again.value) == 1
    assert on_replica(pair, world, session_id) == ["line"]
    assert store.get_session(session_id).output_total == 1  # it happened once


def test_reads_are_answered_and_refusals_told_as_ever(pair: Pair, store: Any) -> None:
    session_id = created(store)
    with pair.held_up():
        assert store.get_session(session_id).output_total == 0
        assert store.get_metrics().total_sessions == 1
        with pytest.raises(SessionNotFoundError):
            store.add_output("agent_claude_00000000-0000-4000-8000-000000000000", "line")


def test_each_write_of_a_batch_is_told_and_its_reads_are_answered(
    pair: Pair, world: World, store: Any
) -> None:
    session_id = created(store)
    with pair.held_up(), batch_of(world, store) as batch:
        added = [batch.add_output(session_id, line) for line in "ab"]
        seen = batch.get_session(session_id)
    assert seen.result().output_buffer == ("a", "b")
    errors = [outcome.error for outcome in added]
    assert [type(error) for error in errors] == [DurabilityError, DurabilityError]
    assert [store.repeat(error) for error in errors] == [1, 2]
    with batch_of(world, store) as batch:
        assert batch.add_output(session_id, "c") is not None
    assert on_replica(pair, world, session_id) == ["a", "b", "c"]


def test_calls_that_are_sent_together_are_each_told(pair: Pair) -> None:
    async_world = World("async", "pair", pair.primary.url)
    try:
        store = async_world.store(wait_replicas=1, deadline=2.0)
        session_id = created(store)

        async def all_at_once() -> list[Any]:
            inner = store.store
            writes = [inner.add_output(session_id, "line") for _ in range(10)]
            reads = [inner.get_session(session_id, tail=0) for _ in range(10)]
            return await asyncio.gather(*writes, *reads, return_exceptions=True)

        assert async_world.runner is not None
        with pair.held_up():
            results = async_world.runner.run(all_at_once())
        assert [type(one) for one in results[:10]] == [DurabilityError] * 10
        assert all(one.id == session_id for one in results[10:])
        assert sorted(store.repeat(error) for error in results[:10]) == list(range(1, 11))
    finally:
        async_world.close()


def test_a_writer_goes_on_until_a_replica_has_it(pair: Pair, world: World, store: Any) -> None:
    session_id = created(store)
    with store.writer(session_id) as out:
        with pair.held_up():
            out.write("a\nb\n")
            world.sleep(1.0)
        out.flush()
        assert on_replica(pair, world, session_id) == ["a", "b"]
    assert store.get_session(session_id).output_total == 2


def test_a_claim_that_no_replica_has_is_told_and_repeated(pair: Pair, store: Any) -> None:
    session_id = created(store)
    with pair.held_up(), pytest.raises(DurabilityError) as told:
        store.claim(session_id, ttl=30)
    assert store.get_session(session_id).status == "busy"
    lease = store.repeat(told.value)
    assert lease.session_id == session_id
    store.add_output(session_id, "under the lease")
    if isinstance(store, Awaiting):
        lease = Awaiting(lease, store._runner)
    lease.release()
    assert store.get_session(session_id).status == "active"


def test_leases_are_renewed_without_waiting(pair: Pair, world: World, store: Any) -> None:
    session_id = created(store)
    lease = store.claim(session_id, ttl=1.0)
    with pair.held_up():
        world.sleep(1.5)
        assert lease.expires_in > 0


def test_it_is_one_round_trip(store: Any) -> None:
    session_id = created(store)
    with noted_sendings() as sent:
        store.add_output(session_id, "line")
    assert len(sent) == 1
    assert b"WAIT" in sent[0]


def test_to_wait_on_another_connection_is_to_wait_for_nothing(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the same WAIT, on a connection that has written nothing."""
    other = socket.create_connection(("127.0.0.1", pair.primary.port))

    def send(self: Any, rounds: Any) -> list[Any]:
        while to_send := rounds.following():
            *writes, wait = to_send
            with self._client.pipeline(transaction=False) as pipe:
                for words in writes:
                    pipe.execute_command(*words)
                replies = pipe.execute(raise_on_error=False)
            other.sendall(" ".join(map(str, wait)).encode() + b"\r\n")
            rounds.take([*replies, int(other.recv(16)[1:])])
        return list(rounds.replies)

    with (
        other,
        SessionStore.from_url(
            pair.primary.url, namespace=f"test-{uuid4().hex}", wait_replicas=1, deadline=2.0
        ) as store,
    ):
        session_id = created(store)
        with pair.held_up():
            with pytest.raises(DurabilityError):
                store.add_output(session_id, "line")
            with monkeypatch.context() as patch:
                patch.setattr(SessionStore, "_send_pipeline", send)
                assert store.add_output(session_id, "line") == 2  # and no replica has it
        store.delete_session(session_id)


def test_a_client_that_was_handed_in_waits_for_a_second(pair: Pair) -> None:
    with redis.Redis(port=pair.primary.port) as client:
        store = SessionStore(client, namespace=f"test-{uuid4().hex}", wait_replicas=1)
        session_id = created(store)
        began = time.monotonic()
        with pair.held_up(), pytest.raises(DurabilityError, match="after 1 s"):
            store.add_output(session_id, "line")
        assert time.monotonic() - began < 3.0
        store.delete_session(session_id)


def test_a_user_who_may_not_wait_is_told(pair: Pair) -> None:
    with redis.Redis(port=pair.primary.port) as admin:
        admin.execute_command(
            *("ACL", "SETUSER", "impatient", "on", ">secret", "~*", "&*", "+@all", "-wait")
        )
        url = pair.primary.url.replace("//", "//impatient:secret@")
        name = f"test-{uuid4().hex}"
        with (
            SessionStore.from_url(url, namespace=name, wait_replicas=1) as store,
            pytest.raises(redis.exceptions.NoPermissionError, match="wait"),
        ):
            created(store)
        assert not list(admin.scan_iter(match=f"{{{name}}}:session*"))
        admin.execute_command("ACL", "DELUSER", "impatient")


def test_a_cluster_has_no_one_primary_to_wait_for() -> None:
    with pytest.raises(InvalidArgumentError, match=r"^wait_replicas must be 0 on a Redis Cluster"):
        SessionStore.from_url("redis://127.0.0.1:1", cluster=True, wait_replicas=1)


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:1",
        "redis://127.0.0.1:1?socket_timeout=3600",
        "redis+sentinel://127.0.0.1:1/primary",
    ],
)
@pytest.mark.parametrize("kind", [SessionStore, AsyncSessionStore])
def test_replicas_are_waited_for_within_the_time_to_read_an_answer(url: str, kind: Any) -> None:
    store: Any = kind.from_url(url, wait_replicas=1, deadline=8.0)
    timeout = store._client.connection_pool.connection_kwargs["socket_timeout"]
    assert 0 < store._replication.wait_ms / 1000 < timeout <= 2.0


def test_a_client_that_reads_for_less_than_a_second_waits_for_less(pair: Pair) -> None:
    with redis.Redis(port=pair.primary.port, socket_timeout=0.5) as client:
        store = SessionStore(client, namespace=f"test-{uuid4().hex}", wait_replicas=1)
        session_id = created(store)
        with pair.held_up(), pytest.raises(DurabilityError, match=r"after 0\.3 s"):
            store.add_output(session_id, "line")
        store.delete_session(session_id)


@pytest.mark.parametrize("kind", [SessionStore, AsyncSessionStore])
def test_what_does_not_know_wait_is_told_at_once(kind: Any) -> None:
    server = fakeredis.FakeServer()
    is_sync = kind is SessionStore
    client = (fakeredis if is_sync else fakeredis.aioredis).FakeRedis(server=server)
    store = kind(client, namespace="test", wait_replicas=1)
    with pytest.raises(InvalidArgumentError, match=r"^wait_replicas must be 0: .* know WAIT"):
        created(store) if is_sync else asyncio.run(
            store.create_session("claude", "service", "/src")
        )
    assert not fakeredis.FakeRedis(server=server).keys("*session*")


def test_a_primary_that_is_demoted_meanwhile_is_an_outage(
    pair: Pair, world: World, store: Any
) -> None:
    """The write waits for its replica when the primary is made one: it is sent again."""
    session_id = created(store)
    with pair.client(pair.primary) as primary:
        demotion = threading.Timer(0.1, primary.replicaof, ("127.0.0.1", 1))
        try:
            with pair.held_up():
                demotion.start()
                with pytest.raises(OutcomeUnknownError) as told:
                    store.add_output(session_id, "line")
        finally:
            demotion.join()
            pair.follow()
    assert not isinstance(told.value, DurabilityError)
    assert store.repeat(told.value) == 1
    assert on_replica(pair, world, session_id) == ["line"]


@pytest.mark.parametrize(
    "reply",
    [
        "UNBLOCKED force unblock from blocking operation, instance state changed",
        "WAIT cannot be used with replica instances.",
    ],
)
def test_demoted_before_or_while_it_waits_is_the_same(reply: str) -> None:
    """A script ran and its server was demoted before it came to WAIT: no promise, no lie."""
    failure = Replication(1, 100).failure(b"ok 1", redis.ResponseError(reply))
    assert isinstance(failure, redis.ConnectionError)


# ---- Leases -------------------------------------------------------------------------------------


def test_a_lease_that_no_replica_knows_to_be_given_back_is_given_back(
    pair: Pair, world: World, store: Any
) -> None:
    session_id = created(store)
    lease = store.claim(session_id, ttl=1.0)
    lost: list[Any] = []
    lease.on_lost(lost.append)
    with pair.held_up(), pytest.raises(DurabilityError):
        lease.release()
    assert lease.released
    assert store.get_session(session_id).status == "active"
    store.add_output(session_id, "as anybody may")
    world.sleep(0.5)  # a renewal would have been due
    assert not lost


def test_closing_gives_every_session_back(pair: Pair, world: World, store: Any) -> None:
    session_ids = [created(store) for _ in range(3)]
    for session_id in session_ids:
        store.claim(session_id)
    with pair.held_up():
        store.close()
    other = world.store()
    assert {other.get_session(one).status for one in session_ids} == {"active"}


def test_a_cancelled_claim_that_no_replica_has_holds_nothing(pair: Pair) -> None:
    one = World("async", "pair", pair.primary.url)
    try:
        store = one.store(wait_replicas=1, deadline=2.0)
        session_id = created(store)

        async def cancelled() -> None:
            claiming = asyncio.ensure_future(store.store.claim(session_id).__aenter__())
            await asyncio.sleep(0.1)
            claiming.cancel()
            with suppress(asyncio.CancelledError):
                await claiming

        assert one.runner is not None
        with pair.held_up():
            one.runner.run(cancelled())
        assert store.get_session(session_id).status == "active"
    finally:
        one.close()


def test_an_import_that_no_replica_has_goes_on_when_it_is_run_again(
    pair: Pair, world: World, store: Any
) -> None:
    session_id = created(store)
    store.add_output(session_id, *map(str, range(100)))
    lines = list(store.export_sessions())
    other = world.store(namespace=f"{world.namespace}-b", wait_replicas=1, deadline=2.0)
    try:
        with pair.held_up(), pytest.raises(DurabilityError):
            other.import_sessions(lines)
        other.import_sessions(lines)
        assert other.get_session(session_id).output_total == 100
        assert not [one for one in other.check() if not one.warning]
    finally:
        other.delete_session(session_id)


def test_the_command_line_says_that_the_change_was_made(pair: Pair) -> None:
    with command_line(pair.primary) as shell:
        session_id = created(shell.store)
        with pair.held_up():
            ended = shell.run("rm", session_id, env={"SESSIONSTORE_WAIT_REPLICAS": "1"})
        assert shell.store.find_session(session_id) is None
    assert ended.code == 1
    assert "the change was made at 127.0.0.1" in ended.err
    assert "but 0 of 1 replicas have acknowledged it" in ended.err


# ---- Failovers ----------------------------------------------------------------------------------


@pytest.fixture
def watched(sentinel_program: str) -> Iterator[PrivateSentinels]:
    with PrivateSentinels(PROGRAMS[sentinel_program]) as started:
        yield started


class Asking(Appending):
    """A worker that asks again for what no replica has acknowledged, and counts what has been."""

    async def live(self, store: Any, is_over: Any) -> None:
        self.session_id = (await store.create_session("claude", uuid4().hex, "/src")).id
        while not is_over.is_set():
            line = self._line()
            try:
                await store.add_output(self.session_id, line)
                self.acknowledged_at[line] = time.monotonic()
            except DurabilityError:
                pass
            self.calls += 1
            self.end_turn()


def run(attack: Attack, pair: PrivateSentinels, kind: str, wait_replicas: int) -> None:
    settings: dict[str, Any] = {
        "life": Asking,
        "deadline": DEADLINE,
        "wait_replicas": wait_replicas,
    }
    with at_work(pair.url, threads=2, tasks=2, **settings) as work:
        for _ in range(attack.size):
            work.wait_for_turns(50)
            old = FAILOVERS[kind](pair)
            time.sleep(NOTICED)
            if kind == "kill":
                old.start()
            if kind == "stop":
                old.signal(signal.SIGCONT)
            pair.wait_until_well()
            work.wait_for_turns(50)
    attack.tell(injected=attack.size, wrong=work.broken(), **work.seen())


@pytest.mark.parametrize("kind", ["kill", "stop", "swap"])
@proves("replicas waited for", ordinary=1, full=5)
def test_no_failover_takes_what_a_replica_has_acknowledged(
    watched: PrivateSentinels, kind: str, attack: Attack
) -> None:
    run(attack, watched, kind, wait_replicas=1)


@controls("replicas waited for", ordinary=1)
def test_a_failover_takes_what_was_not_waited_for(
    watched: PrivateSentinels, attack: Attack
) -> None:
    run(attack, watched, "swap", wait_replicas=0)
