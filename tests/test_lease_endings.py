"""How leases end when answers cross: what was given back in good order is never called lost."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
import redis
from conftest import World
from waiting import until

from sessionstore import LeaseLostError, SessionStore, SessionStoreError
from sessionstore._server import PrivateServer
from sessionstore.holding import Leases

HOLD = 60.0  # seconds
TURNS = 1500
THREADS = 8


@pytest.fixture
def world(server: PrivateServer) -> Iterator[World]:
    opened = World("sync", server.program.name.lower(), server.url)
    yield opened
    opened.close()


def test_threads_that_hold_one_session_in_turn_never_lose_it(world: World) -> None:
    """Another thread's claim is answered before the answer to a release has been read."""
    store = world.store()
    own = store.create_session("claude", "s", "/src").id
    wrong: list[object] = []
    done = iter(range(TURNS))

    def work() -> None:
        for _ in done:
            try:
                with store.claim(own, ttl=HOLD, wait=HOLD) as lease:
                    lease.on_lost(wrong.append)
            except Exception as error:
                wrong.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)

    assert wrong == []
    assert store._leases.held() == []


def overtaken(world: World) -> tuple[Any, list[Any]]:
    """A lease that is given back, and whom its loss was told.

    A renewal that was on its way is answered when the session is another's already, and before the
    answer to the release has been read.
    """
    store, another = world.store(), world.store()
    own = store.create_session("claude", "s", "/src").id
    told: list[Any] = []
    lease = store.claim(own, ttl=HOLD)
    lease.on_lost(told.append)
    send = store._send

    def late(request: Any, lane: Any) -> Any:
        reply = send(request, lane)
        if request.script == "update_status":
            another.claim(own, ttl=HOLD)
            store.carry(store._leases.renewing(lease._holding))
        return reply

    store._send = late
    lease.release()
    return lease, told


def test_a_lease_that_looks_lost_while_it_is_given_back_is_released(world: World) -> None:
    lease, told = overtaken(world)

    assert (lease.released, lease.lost, told) == (True, False, [])


def test_the_control_that_takes_a_renewals_word_for_it_tells_a_loss(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose = Leases.lose
    monkeypatch.setattr(
        Leases,
        "lose",
        lambda leases, holding, error, **_: lose(leases, holding, error, surely=True),
    )
    with pytest.raises(LeaseLostError):
        overtaken(world)


def test_a_loss_is_told_all_the_same_when_the_answer_to_the_release_never_comes(
    world: World,
) -> None:
    store, another = world.store(), world.store()
    own = store.create_session("claude", "s", "/src").id
    lease = store.claim(own, ttl=HOLD)
    send = store._send

    def broken(request: Any, lane: Any) -> Any:
        if request.script == "update_status":
            raise redis.ResponseError("no")
        return send(request, lane)

    store._send = broken
    with pytest.raises(redis.ResponseError):
        lease.release()
    store._send = send
    another.update_status(own, "active", force=True)

    with pytest.raises(LeaseLostError):
        lease.renew()
    assert lease.lost


def test_an_abandoned_lease_is_left_alone(world: World) -> None:
    store = world.store()
    own = store.create_session("claude", "s", "/src").id
    with store.claim(own, ttl=0.2) as first:
        first.abandon()
        second = until(lambda: claimed(store, own))
    with pytest.raises(SessionStoreError, match="abandoned"):
        first.release()
    assert not second.lost
    assert store.add_output(own, "mine") == 1
    assert store.get_session(own).owner == store.worker


def claimed(store: SessionStore, session_id: str) -> Any:
    try:
        return store.claim(session_id, ttl=HOLD)
    except SessionStoreError:
        return None


def test_the_late_answer_to_an_older_claim_does_not_displace_a_newer_lease(world: World) -> None:
    store = world.store()
    own = store.create_session("claude", "s", "/src").id
    request = store._leases.claiming(own, 0.1, 0.0, ("active",))
    replies: list[Any] = []
    send = store._send

    def kept_back(asked: Any, lane: Any) -> Any:
        replies.append(send(asked, lane))
        raise redis.ResponseError("kept back")

    store._send = kept_back
    with pytest.raises(redis.ResponseError):
        store.execute(request)
    store._send = send
    newer = until(lambda: claimed(store, own))

    older = request.decode(replies[0])

    assert (older.lost, newer.lost) == (True, False)
    assert store.add_output(own, "mine") == 1


def test_a_callback_that_exits_does_not_end_the_renewal_of_other_leases(world: World) -> None:
    store, another = world.store(), world.store()
    lost, kept = (store.create_session("claude", "s", "/src").id for _ in range(2))
    lease, other = store.claim(lost, ttl=0.5), store.claim(kept, ttl=0.5)
    lease.on_lost(lambda _: sys.exit(1))
    another.update_status(lost, "active", force=True)
    until(lambda: lease.lost)

    time.sleep(1.0)

    until(lambda: other.expires_in > 0)
    other.renew()


def test_an_event_loop_ends_right_after_a_claim(server: PrivateServer) -> None:
    code = """
import asyncio, sys
from sessionstore import AsyncSessionStore
async def main():
    store = AsyncSessionStore.from_url(sys.argv[1], namespace=sys.argv[2])
    session = await store.create_session("claude", "s", "/src")
    await store.claim(session.id)
asyncio.run(main())
"""
    arguments = [sys.executable, "-c", code, server.url, f"test-{uuid4().hex[:12]}"]
    assert subprocess.run(arguments, timeout=30).returncode == 0


def test_a_session_whose_expiry_is_missing_is_ended_whole(world: World) -> None:
    store = world.store(reap_grace=0.2)
    own = store.create_session("claude", "s", "/src").id
    store.claim(own, ttl=0.2).abandon()
    world.redis.hdel(f"{world.prefix}session:{own}", "lease_expires_at")
    until(lambda: store.reap())

    until(lambda: any(one.action == "lost" for one in store.reap()))

    assert store.get_session(own).status == "error"
    assert "unknown time" in store.get_session(own).error_buffer[0]
