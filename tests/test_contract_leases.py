"""Leases: who may write to a claimed session, how it is given back, and how a loss is found out.

The blocking and the asyncio store do the same on every server. Where a lease must expire in a test,
it is made older by hand; where one must not, it lasts a minute.
"""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha1
from pathlib import Path
from typing import Any

import pytest
import waiting
from conftest import SERVERS, World, opened
from consistency import assert_consistent, microseconds
from faults import Fault, FaultyWorld
from moments import abandon, everything, expire_lease, now_us
from programme import Attack, controls, proves
from rawkeys import RawKeys

import sessionstore.pipelining
from sessionstore import (
    AsyncSessionStore,
    LeaseLostError,
    SessionBusyError,
    SessionNotActiveError,
    SessionNotFoundError,
    SessionStatusError,
    SessionStore,
    SessionStoreError,
)
from sessionstore._server import PrivateServer
from sessionstore.scripts import Script, load

TTL = 60.0  # seconds: of leases that must not expire while a test runs


@pytest.fixture
def other(world: World) -> Any:
    """Another worker's store."""
    return world.store(worker="other")


@pytest.fixture
def session_id(store: Any) -> str:
    return str(store.create_session("claude", "service", "/src", "task").id)


def fields_of(world: RawKeys, session_id: str) -> dict[str, str]:
    found: Any = world.redis.hgetall(world.session(session_id))
    return dict(found)


def events_of(world: World, session_id: str) -> list[dict[str, str]]:
    return [one for one in world.events() if one["session_id"] == session_id]


def fence_of(world: RawKeys, session_id: str) -> int:
    return int(fields_of(world, session_id)["fence"])


# ---- Claiming -----------------------------------------------------------------------------------


def test_a_claim_makes_a_session_busy_owned_and_fenced(
    world: World, store: Any, session_id: str
) -> None:
    before = now_us(world)

    lease = store.claim(session_id, ttl=TTL)

    fields = fields_of(world, session_id)
    assert (fields["status"], fields["owner"]) == ("busy", store.worker)
    assert fields["fence"] == str(lease.fence)
    assert before // 1000 <= lease.fence <= now_us(world) // 1000
    assert before <= microseconds(fields["last_activity"]) <= now_us(world)
    assert_consistent(world)


def test_a_leases_expiry_is_readable_in_the_hash_and_in_the_session(
    world: World, store: Any, session_id: str
) -> None:
    before = now_us(world)

    store.claim(session_id, ttl=TTL)

    stored = fields_of(world, session_id)["lease_expires_at"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", stored)
    after = now_us(world)
    assert before - 1000 <= microseconds(stored) - TTL * 1_000_000 <= after
    session = store.get_session(session_id)
    assert (session.owner, session.lease_expires_at) == (
        store.worker,
        datetime.fromisoformat(stored),
    )


def test_a_lease_knows_its_session_owner_and_time(store: Any, session_id: str) -> None:
    lease = store.claim(session_id, ttl=TTL)

    assert (lease.session_id, lease.owner, lease.ttl) == (session_id, store.worker, TTL)
    assert TTL - 30 < lease.expires_in <= TTL
    assert (lease.lost, lease.released) == (False, False)


def test_a_claim_is_told_in_the_events(world: World, store: Any, session_id: str) -> None:
    store.claim(session_id, ttl=TTL).release()

    _, claimed, released = events_of(world, session_id)
    common = {"session_id": session_id, "type": "claude", "actor": store.worker}
    common["owner"] = store.worker
    assert claimed == common | {"event": "claimed", "old_status": "active", "status": "busy"}
    assert released == common | {"event": "released", "old_status": "busy", "status": "active"}


def test_a_held_session_is_refused_to_others_naming_holder_and_time(
    world: World, store: Any, other: Any, session_id: str
) -> None:
    store.claim(session_id, ttl=TTL)
    before = everything(world)

    with pytest.raises(SessionBusyError) as refused:
        other.claim(session_id)

    error = refused.value
    assert (error.session_id, error.status, error.owner) == (session_id, "busy", store.worker)
    assert error.expires_in is not None
    assert TTL - 30 < error.expires_in <= TTL
    assert f"held by {store.worker}, whose lease runs for another" in str(error)
    assert everything(world) == before


def test_a_worker_cannot_claim_what_it_holds(store: Any, session_id: str) -> None:
    """Its threads and tasks share it: two of them must not do the same work."""
    lease = store.claim(session_id, ttl=TTL)

    with pytest.raises(SessionBusyError):
        store.claim(session_id)

    assert not lease.lost


@pytest.mark.parametrize("status", ["starting", "busy", "error", "terminated"])
def test_a_session_of_another_status_is_not_active(
    world: World, store: Any, session_id: str, status: str
) -> None:
    store.update_status(session_id, status)
    before = everything(world)

    with pytest.raises(SessionNotActiveError) as refused:
        store.claim(session_id)

    assert (refused.value.session_id, refused.value.status) == (session_id, status)
    assert isinstance(refused.value, SessionStatusError)
    assert everything(world) == before


def test_a_session_that_is_not_there_cannot_be_claimed(world: World, store: Any) -> None:
    with pytest.raises(SessionNotFoundError):
        store.claim("missing")

    assert {key for key in world.keys() if not key.startswith("lane:")} == {"meta"}  # noqa: SIM118


def test_what_is_expected_may_be_one_status_or_several(
    world: World, store: Any, session_id: str
) -> None:
    for status, expected in (
        ("starting", "starting"),
        ("busy", "busy"),
        ("error", ("active", "error")),
        ("terminated", ["active", "terminated"]),
        ("active", {"active"}),
    ):
        store.update_status(session_id, status)
        with store.claim(session_id, expected=expected):
            assert fields_of(world, session_id)["status"] == "busy"
            assert_consistent(world)
        store.update_status(session_id, status)
        with pytest.raises(SessionNotActiveError):
            store.claim(session_id, expected="active" if status != "active" else "error")


def test_a_session_with_an_expired_lease_is_taken_whatever_is_expected(
    world: World, store: Any, other: Any, session_id: str
) -> None:
    store.claim(session_id, ttl=TTL)
    expire_lease(world, session_id)

    other.claim(session_id, expected="starting")

    assert fields_of(world, session_id)["owner"] == other.worker
    told = [(one["event"], one["owner"]) for one in events_of(world, session_id)[2:]]
    assert told == [("lease_expired", store.worker), ("claimed", other.worker)]
    assert_consistent(world)


def test_the_fence_grows_with_each_claim(world: World, store: Any, session_id: str) -> None:
    fences = []
    for _ in range(20):
        with store.claim(session_id, ttl=TTL) as lease:
            fences.append(lease.fence)

    assert fences == sorted(set(fences))
    assert fence_of(world, session_id) == fences[-1]


def test_the_fence_grows_by_one_where_the_clock_has_gone_back(
    world: World, store: Any, session_id: str
) -> None:
    ahead = now_us(world) // 1000 + 3_600_000
    world.redis.hset(world.session(session_id), "fence", ahead)

    assert store.claim(session_id, ttl=TTL).fence == ahead + 1


def test_the_fence_jumps_to_the_clock_where_a_failover_lost_the_last_ones(
    world: World, store: Any, session_id: str
) -> None:
    world.redis.hset(world.session(session_id), "fence", 5)
    before = now_us(world) // 1000

    assert store.claim(session_id, ttl=TTL).fence >= before


def test_a_claim_that_is_over_leaves_only_its_fence(
    world: World, store: Any, session_id: str
) -> None:
    before = fields_of(world, session_id)

    with store.claim(session_id, ttl=TTL):
        pass

    after = fields_of(world, session_id)
    assert after.keys() - before.keys() == {"fence"}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"last_activity"}


# ---- Fencing ------------------------------------------------------------------------------------

FENCED: dict[str, Callable[[Any, str], Any]] = {
    "add_output": lambda store, own: store.add_output(own, "mine"),
    "add_error": lambda store, own: store.add_error(own, "mine"),
    "update_status": lambda store, own: store.update_status(own, "terminated"),
    "delete_session": lambda store, own: store.delete_session(own),
}
OPEN: dict[str, Callable[[Any, str], Any]] = {
    "update_activity": lambda store, own: store.update_activity(own),
    "update_metadata": lambda store, own: store.update_metadata(own, {"a": "b"}),
}


@pytest.mark.parametrize("name", FENCED)
def test_a_write_by_others_is_refused_while_the_lease_is_live(
    world: World, store: Any, other: Any, session_id: str, name: str
) -> None:
    lease = store.claim(session_id, ttl=TTL)
    before = everything(world)

    with pytest.raises(SessionBusyError) as refused:
        FENCED[name](other, session_id)

    assert (refused.value.owner, refused.value.status) == (store.worker, "busy")
    assert everything(world) == before
    assert not lease.lost


@pytest.mark.parametrize("name", FENCED)
def test_a_write_by_others_is_carried_out_after_the_release(
    world: World, store: Any, other: Any, session_id: str, name: str
) -> None:
    store.claim(session_id, ttl=TTL).release()
    before = everything(world)

    FENCED[name](other, session_id)

    assert everything(world) != before
    assert_consistent(world)


@pytest.mark.parametrize("name", FENCED)
def test_a_write_by_others_is_carried_out_when_the_lease_has_expired(
    world: World, store: Any, other: Any, session_id: str, name: str
) -> None:
    store.claim(session_id, ttl=TTL)
    expire_lease(world, session_id)
    before = everything(world)

    FENCED[name](other, session_id)

    assert everything(world) != before
    assert_consistent(world)


@pytest.mark.parametrize("name", OPEN)
def test_activity_and_metadata_stay_open_to_all(
    world: World, store: Any, other: Any, session_id: str, name: str
) -> None:
    lease = store.claim(session_id, ttl=TTL)
    before = everything(world)

    OPEN[name](other, session_id)

    assert everything(world) != before
    assert_consistent(world)
    lease.renew()


@pytest.mark.parametrize("name", FENCED)
def test_the_holders_store_carries_its_fence_by_itself(
    store: Any, session_id: str, name: str
) -> None:
    store.claim(session_id, ttl=TTL)

    FENCED[name](store, session_id)


def test_a_lease_is_the_stores_that_claimed_not_the_processs(
    world: World, store: Any, session_id: str
) -> None:
    """A store of the same process and name is another worker."""
    store.claim(session_id, ttl=TTL)
    twin = world.store()
    assert twin.worker == store.worker

    with pytest.raises(SessionBusyError):
        twin.add_output(session_id, "line")


def forced_status(store: Any, session_id: str) -> None:
    store.update_status(session_id, "active", force=True)


def test_force_sets_a_status_and_ends_the_lease(
    world: World, store: Any, other: Any, session_id: str
) -> None:
    store.claim(session_id, ttl=TTL)

    other.update_status(session_id, "terminated", force=True)

    assert fields_of(world, session_id).keys().isdisjoint({"owner", "lease_expires_at"})
    last = events_of(world, session_id)[-1]
    assert (last["event"], last["owner"], last["actor"]) == (
        "released", store.worker, other.worker
    )  # fmt: skip
    assert_consistent(world)


def test_force_sets_busy_and_ends_the_lease(
    world: World, store: Any, other: Any, session_id: str
) -> None:
    store.claim(session_id, ttl=TTL)

    other.update_status(session_id, "busy", force=True)

    assert "owner" not in fields_of(world, session_id)
    assert_consistent(world)


def test_force_deletes_a_held_session(
    world: World, store: Any, other: Any, session_id: str
) -> None:
    store.claim(session_id, ttl=TTL)

    assert other.delete_session(session_id, force=True) is True

    assert store.find_session(session_id) is None
    assert_consistent(world)


def test_force_still_refuses_an_unexpected_status(
    world: World, store: Any, other: Any, session_id: str
) -> None:
    store.claim(session_id, ttl=TTL)
    before = everything(world)

    with pytest.raises(SessionStatusError):
        other.update_status(session_id, "error", expected="active", force=True)

    assert everything(world) == before


def take_over(world: World, other: Any, session_id: str) -> None:
    """The lease expires, and another worker claims the session."""
    expire_lease(world, session_id)
    other.claim(session_id, ttl=TTL)


#: How a lease comes to be lost while its session stays.
LOSSES: dict[str, Callable[[World, Any, str], Any]] = {
    "forced": lambda _, other, own: forced_status(other, own),
    "taken over": take_over,
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", FENCED)
def test_a_write_under_a_lost_lease_is_refused_and_changes_nothing(
    world: World, store: Any, other: Any, session_id: str, name: str, loss: str
) -> None:
    lease = store.claim(session_id, ttl=TTL)
    LOSSES[loss](world, other, session_id)
    before = everything(world)

    for _ in range(2):  # not just the first
        with pytest.raises(LeaseLostError) as refused:
            FENCED[name](store, session_id)

    assert everything(world) == before
    assert lease.lost
    taken = loss == "taken over"
    assert refused.value.session_id == session_id
    assert refused.value.owner == (other.worker if taken else None)
    assert refused.value.status == ("busy" if taken else "active")


def unfenced(name: str) -> Script:
    """A script that lets every write pass."""
    text = load(name).text.replace("given == 'force' then", "true then", 1)
    return Script(text, sha1(text.encode()).hexdigest())


@pytest.mark.parametrize("name", FENCED)
def test_without_the_fence_a_stale_write_lands(
    world: World, store: Any, other: Any, session_id: str, name: str, monkeypatch: Any
) -> None:
    """The control of the test before it."""
    monkeypatch.setattr(sessionstore.pipelining, "load", unfenced)
    store.claim(session_id, ttl=TTL)
    take_over(world, other, session_id)
    before = everything(world)

    FENCED[name](store, session_id)

    assert everything(world) != before


def test_an_expired_lease_is_its_workers_until_somebody_claims(
    world: World, store: Any, session_id: str
) -> None:
    """So that an outage longer than the lease ends no work."""
    lease = store.claim(session_id, ttl=TTL)
    expire_lease(world, session_id, 3600)

    store.add_output(session_id, "line")
    store.update_status(session_id, "busy")
    lease.renew()

    expires = microseconds(fields_of(world, session_id)["lease_expires_at"])
    assert expires > now_us(world) + 30_000_000
    assert_consistent(world)


def test_a_session_can_be_claimed_again_by_the_worker_that_lost_it(
    store: Any, other: Any, session_id: str
) -> None:
    lost = store.claim(session_id, ttl=TTL)
    forced_status(other, session_id)
    with pytest.raises(LeaseLostError):
        store.add_output(session_id, "line")

    with store.claim(session_id, ttl=TTL) as lease:
        assert store.add_output(session_id, "line") == 1

    assert (lost.lost, lease.lost) == (True, False)


def test_claiming_ones_own_expired_session_again_ends_the_older_lease(
    world: World, store: Any, session_id: str
) -> None:
    older = store.claim(session_id, ttl=TTL)
    expire_lease(world, session_id)

    newer = store.claim(session_id, ttl=TTL)

    assert older.lost
    assert newer.fence > older.fence
    with pytest.raises(LeaseLostError):
        older.renew()
    newer.renew()


# ---- Giving back --------------------------------------------------------------------------------


def test_the_holders_own_status_but_busy_gives_the_session_back(
    world: World, store: Any, session_id: str
) -> None:
    for status in ("active", "starting", "error", "terminated"):
        lease = store.claim(
            session_id, ttl=TTL, expected=("active", "starting", "error", "terminated")
        )
        store.update_status(session_id, "busy")
        assert not lease.released

        store.update_status(session_id, status)

        assert lease.released
        assert "owner" not in fields_of(world, session_id)
        assert fence_of(world, session_id) == lease.fence
        assert_consistent(world)


def test_the_holders_own_delete_ends_its_lease(world: World, store: Any, session_id: str) -> None:
    with store.claim(session_id, ttl=TTL) as lease:
        assert store.delete_session(session_id) is True
        assert lease.released

    assert not lease.lost
    assert_consistent(world)


def test_a_refused_status_change_of_the_holders_ends_no_lease(store: Any, session_id: str) -> None:
    lease = store.claim(session_id, ttl=TTL)

    with pytest.raises(SessionStatusError):
        store.update_status(session_id, "active", expected="starting")

    assert not lease.released
    lease.renew()


def test_leaving_gives_the_session_back_as_active(
    world: World, store: Any, session_id: str
) -> None:
    with store.claim(session_id, ttl=TTL) as lease:
        assert fields_of(world, session_id)["status"] == "busy"

    assert lease.released
    fields = fields_of(world, session_id)
    assert fields["status"] == "active"
    assert fields.keys().isdisjoint({"owner", "lease_expires_at"})
    assert_consistent(world)


class AgentCrashed(Exception):  # noqa: N818  as a caller may name it
    pass


def fail_with(store: Any, session_id: str, error: BaseException) -> None:
    """Claim, write a line, and fail."""
    with store.claim(session_id, ttl=TTL):
        store.add_output(session_id, "a line")
        raise error


def test_an_exception_is_told_in_the_error_buffer_and_propagates(
    world: World, store: Any, session_id: str
) -> None:
    with pytest.raises(AgentCrashed, match="exit code 3"):
        fail_with(store, session_id, AgentCrashed("exit code 3"))

    session = store.get_session(session_id)
    assert (session.status, session.owner) == ("active", None)
    assert session.error_buffer == ("AgentCrashed: exit code 3",)
    assert [one["event"] for one in events_of(world, session_id)[1:]] == ["claimed", "released"]
    assert_consistent(world)


def test_nothing_of_a_traceback_is_told(store: Any, session_id: str) -> None:
    try:
        raise ValueError("the cause, with a secret")
    except ValueError as cause:
        error = AgentCrashed("it broke")
        error.__cause__ = cause
        error.add_note("a note, with a secret")

    with pytest.raises(AgentCrashed):
        fail_with(store, session_id, error)

    assert store.get_session(session_id).error_buffer == ("AgentCrashed: it broke",)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        pytest.param(AgentCrashed(), ("AgentCrashed",), id="no message"),
        pytest.param(AgentCrashed("\ud800é"), ("AgentCrashed: ?é",), id="surrogate"),
        pytest.param(KeyboardInterrupt(), ("KeyboardInterrupt",), id="interrupt"),
        pytest.param(SystemExit(3), ("SystemExit: 3",), id="a bad exit"),
        pytest.param(SystemExit(0), (), id="a good exit"),
        pytest.param(SystemExit(), (), id="an exit"),
        pytest.param(GeneratorExit(), (), id="a closed generator"),
    ],
)
def test_what_is_told_of_an_exception(
    real: World, error: BaseException, told: tuple[str, ...]
) -> None:
    store = real.store()
    session_id = store.create_session("claude", "s", "/src").id
    lease = store.claim(session_id, ttl=TTL)

    # Not raised: on an event loop that would be the end of the loop too.
    lease.__exit__(type(error), error, None)

    session = store.get_session(session_id)
    assert (session.status, session.error_buffer) == ("active", told)


def test_a_long_message_is_cut(store: Any, session_id: str) -> None:
    with pytest.raises(AgentCrashed):
        fail_with(store, session_id, AgentCrashed("x" * 3_000_000))

    (told,) = store.get_session(session_id).error_buffer
    assert told == ("AgentCrashed: " + "x" * 4096)[:4096]


@dataclass(frozen=True)
class Held:
    """A lease, its store, another worker's store, and the session."""

    lease: Any
    store: Any
    other: Any
    id: str


#: After these there is nothing to give back; the caller's own end stands.
ENDS: dict[str, Callable[[Held], Any]] = {
    "released": lambda held: held.lease.release(),
    "released as terminated": lambda held: held.lease.release(status="terminated"),
    "own status": lambda held: held.store.update_status(held.id, "starting"),
    "own delete": lambda held: held.store.delete_session(held.id),
    "ended by force": lambda held: held.other.update_status(held.id, "error", force=True),
    "activated by force": lambda held: held.other.update_status(held.id, "active", force=True),
    "deleted by force": lambda held: held.other.delete_session(held.id, force=True),
}


@pytest.mark.parametrize("how", ENDS)
def test_leaving_does_nothing_when_the_session_is_held_no_more(
    world: World, store: Any, other: Any, session_id: str, how: str
) -> None:
    with store.claim(session_id, ttl=TTL) as lease:
        ENDS[how](Held(lease, store, other, session_id))
        before = everything(world)

    assert everything(world) == before


@pytest.mark.parametrize("how", ENDS)
def test_an_exception_propagates_when_the_session_is_held_no_more(
    world: World, store: Any, other: Any, session_id: str, how: str
) -> None:
    before: dict[str, Any] = {}

    def fail() -> None:
        with store.claim(session_id, ttl=TTL) as lease:
            ENDS[how](Held(lease, store, other, session_id))
            before.update(everything(world))
            raise AgentCrashed

    with pytest.raises(AgentCrashed):
        fail()

    assert everything(world) == before


def test_after_a_release_the_session_may_be_claimed_within_the_with(
    world: World, store: Any, other: Any, session_id: str
) -> None:
    """And leaving takes nothing from the next holder."""
    with store.claim(session_id, ttl=TTL) as lease:
        lease.release()
        other.claim(session_id, ttl=TTL)
        before = everything(world)

    assert everything(world) == before


def test_leaving_while_another_worker_holds_the_session_says_so(
    world: World, store: Any, other: Any, session_id: str
) -> None:
    before: dict[str, Any] = {}

    def work() -> None:
        with store.claim(session_id, ttl=TTL):
            take_over(world, other, session_id)
            before.update(everything(world))

    with pytest.raises(LeaseLostError) as lost:
        work()

    assert (lost.value.session_id, lost.value.owner) == (session_id, other.worker)
    assert everything(world) == before


def test_an_exception_propagates_while_another_worker_holds_the_session(
    world: World, store: Any, other: Any, session_id: str
) -> None:
    before: dict[str, Any] = {}

    def work() -> None:
        with store.claim(session_id, ttl=TTL):
            take_over(world, other, session_id)
            before.update(everything(world))
            raise AgentCrashed

    with pytest.raises(AgentCrashed):
        work()

    assert everything(world) == before


def test_after_leaving_the_store_writes_like_anybody(
    store: Any, other: Any, session_id: str
) -> None:
    with store.claim(session_id, ttl=TTL):
        forced_status(other, session_id)

    assert store.add_output(session_id, "line") == 1


@pytest.mark.parametrize("status", ["active", "starting", "error", "terminated"])
def test_a_session_is_released_with_a_status(
    world: World, store: Any, session_id: str, status: str
) -> None:
    lease = store.claim(session_id, ttl=TTL)

    lease.release(status=status)

    assert lease.released
    fields = fields_of(world, session_id)
    assert fields["status"] == status
    assert "owner" not in fields
    assert_consistent(world)


def test_a_second_release_does_nothing(
    world: World, store: Any, other: Any, session_id: str
) -> None:
    lease = store.claim(session_id, ttl=TTL)
    lease.release()
    other.claim(session_id, ttl=TTL)
    before = everything(world)

    lease.release(status="terminated")

    assert everything(world) == before


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_lease_cannot_be_released(
    world: World, store: Any, other: Any, session_id: str, loss: str
) -> None:
    lease = store.claim(session_id, ttl=TTL)
    LOSSES[loss](world, other, session_id)
    before = everything(world)

    for _ in range(2):
        with pytest.raises(LeaseLostError):
            lease.release()

    assert everything(world) == before
    assert (lease.lost, lease.released) == (True, False)


def test_closing_a_store_gives_back_all_it_holds(world: World, store: Any) -> None:
    held = [store.create_session("claude", f"s-{n}", "/src").id for n in range(5)]
    leaving = world.store(worker="leaving")
    leases = [leaving.claim(own, ttl=TTL) for own in held]
    leases[0].release(status="terminated")

    leaving.close()

    assert all(lease.released for lease in leases)
    assert [fields_of(world, own)["status"] for own in held] == ["terminated", *["active"] * 4]
    assert_consistent(world)


def test_closing_a_store_takes_nothing_from_others(
    world: World, other: Any, session_id: str
) -> None:
    leaving = world.store(worker="leaving")
    leaving.claim(session_id, ttl=TTL)
    take_over(world, other, session_id)
    before = everything(world)

    leaving.close()

    assert everything(world) == before


# ---- Renewing -----------------------------------------------------------------------------------


def test_a_renewal_lets_the_lease_last_from_now_on(
    world: World, store: Any, session_id: str
) -> None:
    lease = store.claim(session_id, ttl=TTL)
    expire_lease(world, session_id, -5)  # it runs for another five seconds
    activity = fields_of(world, session_id)["last_activity"]

    lease.renew()

    fields = fields_of(world, session_id)
    assert microseconds(fields["lease_expires_at"]) > now_us(world) + 30_000_000
    assert fields["last_activity"] == activity  # a renewal is no activity
    assert fields["fence"] == str(lease.fence)
    assert TTL - 30 < lease.expires_in <= TTL
    assert_consistent(world)


def test_a_released_lease_cannot_be_renewed(world: World, store: Any, session_id: str) -> None:
    lease = store.claim(session_id, ttl=TTL)
    lease.release()
    before = everything(world)

    with pytest.raises(SessionStoreError, match="has been released"):
        lease.renew()

    assert everything(world) == before


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_lease_cannot_be_renewed(
    world: World, store: Any, other: Any, session_id: str, loss: str
) -> None:
    lease = store.claim(session_id, ttl=TTL)
    LOSSES[loss](world, other, session_id)
    before = everything(world)

    for _ in range(2):
        with pytest.raises(LeaseLostError):
            lease.renew()

    assert everything(world) == before
    assert lease.lost


def test_a_lease_on_a_deleted_session_is_lost(
    world: World, store: Any, other: Any, session_id: str
) -> None:
    lease = store.claim(session_id, ttl=TTL)
    other.delete_session(session_id, force=True)

    with pytest.raises(LeaseLostError, match="the session is now gone"):
        lease.renew()

    assert lease.lost
    assert not world.redis.exists(world.session(session_id))


def test_leases_are_renewed_in_the_background(world: World, store: Any, session_id: str) -> None:
    lease = store.claim(session_id, ttl=0.6)
    seen = {fields_of(world, session_id)["lease_expires_at"]}

    def renewed() -> bool:
        seen.add(fields_of(world, session_id)["lease_expires_at"])
        return len(seen) > 3

    world.until(renewed)
    assert not lease.lost
    assert_consistent(world)
    lease.release()


def test_a_released_lease_is_renewed_no_more(world: World, store: Any, session_id: str) -> None:
    kept = store.create_session("claude", "kept", "/src").id
    store.claim(session_id, ttl=0.6).release()
    kept_lease = store.claim(kept, ttl=0.6)
    first = fields_of(world, kept)["lease_expires_at"]
    world.until(lambda: fields_of(world, kept)["lease_expires_at"] != first)

    assert "lease_expires_at" not in fields_of(world, session_id)
    assert_consistent(world)
    kept_lease.release()


def test_the_background_finds_out_that_a_lease_is_lost(
    world: World, store: Any, other: Any, session_id: str
) -> None:
    lease = store.claim(session_id, ttl=0.6)
    told: list[Any] = []
    lease.on_lost(told.append)

    forced_status(other, session_id)

    world.until(lambda: told)
    assert [one.session_id for one in told] == [session_id]
    assert lease.lost


def test_a_callback_is_called_once_however_often_the_loss_is_seen(
    store: Any, other: Any, session_id: str
) -> None:
    lease = store.claim(session_id, ttl=TTL)
    told: list[Any] = []
    lease.on_lost(told.append)
    forced_status(other, session_id)

    for _ in range(2):
        with pytest.raises(LeaseLostError):
            store.add_output(session_id, "line")
        with pytest.raises(LeaseLostError):
            lease.renew()

    assert len(told) == 1
    assert told[0].session_id == session_id


def test_a_callback_is_called_at_once_if_the_lease_is_lost_already(
    store: Any, other: Any, session_id: str
) -> None:
    lease = store.claim(session_id, ttl=TTL)
    forced_status(other, session_id)
    with pytest.raises(LeaseLostError):
        lease.renew()
    told: list[Any] = []

    lease.on_lost(told.append)

    assert len(told) == 1


def test_a_callback_that_fails_hurts_nobody(
    world: World, store: Any, other: Any, session_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    lease = store.claim(session_id, ttl=0.6)
    kept = store.create_session("claude", "kept", "/src").id
    kept_lease = store.claim(kept, ttl=0.6)
    told: list[Any] = []
    lease.on_lost(lambda _: 1 // 0)
    lease.on_lost(told.append)

    forced_status(other, session_id)

    world.until(lambda: told)
    assert "a callback failed" in caplog.text
    before = fields_of(world, kept)["lease_expires_at"]
    world.until(lambda: fields_of(world, kept)["lease_expires_at"] != before)
    kept_lease.release()


def test_a_released_lease_is_never_lost(store: Any, other: Any, session_id: str) -> None:
    lease = store.claim(session_id, ttl=TTL)
    told: list[Any] = []
    lease.on_lost(told.append)
    lease.release()

    other.claim(session_id, ttl=TTL)
    with pytest.raises(SessionBusyError):
        store.add_output(session_id, "line")

    assert (told, lease.lost) == ([], False)


# ---- Waiting ------------------------------------------------------------------------------------


@contextmanager
def soon(what: Callable[[], Any], seconds: float = 0.2) -> Iterator[None]:
    """Do something in a thread after a while."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            what()
        except BaseException as error:
            failures.append(error)

    timer = threading.Timer(seconds, run)
    timer.start()
    try:
        yield
    finally:
        timer.join()
    assert failures == []


@pytest.fixture
def blocking(world: World) -> Iterator[SessionStore]:
    """Another worker's blocking store in any world, for threads."""
    with SessionStore(
        world.client(),
        namespace=world.namespace,
        partitions=world.partitions,
        worker="blocking",
    ) as store:
        yield store


def test_a_waiting_claim_gets_the_session_when_it_is_released(
    world: World, store: Any, blocking: SessionStore, session_id: str
) -> None:
    held = blocking.claim(session_id, ttl=TTL)

    with soon(held.release), store.claim(session_id, ttl=TTL, wait=30) as lease:
        assert fields_of(world, session_id)["owner"] == store.worker

    assert lease.fence > held.fence


def test_a_waiting_claim_gets_the_session_when_its_lease_expires(
    world: World, store: Any, blocking: SessionStore, session_id: str
) -> None:
    blocking.claim(session_id, ttl=0.3)
    abandon(blocking)

    with store.claim(session_id, ttl=TTL, wait=30):
        assert fields_of(world, session_id)["owner"] == store.worker


def test_a_waiting_claim_gets_a_session_that_becomes_active(
    world: World, store: Any, blocking: SessionStore, session_id: str
) -> None:
    store.update_status(session_id, "starting")

    with (
        soon(lambda: blocking.update_status(session_id, "active")),
        store.claim(session_id, ttl=TTL, wait=30),
    ):
        assert fields_of(world, session_id)["owner"] == store.worker


def test_a_waiting_claim_gives_up_in_time_with_the_last_error(
    store: Any, blocking: SessionStore, session_id: str
) -> None:
    blocking.claim(session_id, ttl=TTL)
    began = time.monotonic()

    with pytest.raises(SessionBusyError) as refused:
        store.claim(session_id, wait=0.3)

    assert 0.3 <= time.monotonic() - began < 5
    assert refused.value.owner == blocking.worker
    assert refused.value.expires_in is not None
    assert refused.value.expires_in < TTL - 0.2  # as it was at the end


@pytest.mark.parametrize("status", ["error", "terminated"])
def test_a_claim_does_not_wait_for_an_ended_session(
    store: Any, session_id: str, status: str
) -> None:
    store.update_status(session_id, status)
    began = time.monotonic()

    with pytest.raises(SessionNotActiveError):
        store.claim(session_id, wait=60)

    assert time.monotonic() - began < 20


def test_a_waiting_claim_ends_when_the_session_is_deleted(
    store: Any, blocking: SessionStore, session_id: str
) -> None:
    blocking.claim(session_id, ttl=TTL)

    with (
        soon(lambda: blocking.delete_session(session_id)),
        pytest.raises(SessionNotFoundError),
    ):
        store.claim(session_id, wait=60)


# ---- What it costs the server -------------------------------------------------------------------


@pytest.fixture(params=[f"{style}-{name}" for name in SERVERS for style in ("sync", "async")])
def real(
    request: pytest.FixtureRequest, running: Callable[[str], PrivateServer]
) -> Iterator[World]:
    """{sync, async} × each real server."""
    with opened(request.param, running) as world:
        yield world


@pytest.fixture(params=SERVERS)
def real_sync(
    request: pytest.FixtureRequest, running: Callable[[str], PrivateServer]
) -> Iterator[World]:
    """Each real server."""
    with opened(f"sync-{request.param}", running) as world:
        yield world


def scripts_run(world: World) -> int:
    """How many scripts the server has been asked to run."""
    client: Any = world.redis
    stats = client.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("evalsha", "eval"))


MOST_ATTEMPTS = 8  # in a second


def attempts_in_a_second(world: World, wait: Callable[[Any, str], Any]) -> int:
    store, other = world.store(), world.store(worker="other")
    session_id = store.create_session("claude", "s", "/src").id
    store.claim(session_id, ttl=TTL)
    with pytest.raises(SessionBusyError):
        other.claim(session_id)
    before = scripts_run(world)
    with pytest.raises(SessionBusyError):
        wait(other, session_id)
    return scripts_run(world) - before


def test_waiting_does_not_hammer_the_server(real: World) -> None:
    attempts = attempts_in_a_second(real, lambda store, own: store.claim(own, wait=1))

    assert 3 <= attempts <= MOST_ATTEMPTS


def test_claiming_in_a_bare_loop_hammers_the_server(real: World) -> None:
    """The control of the count."""

    def naive(store: Any, own: str) -> None:
        give_up = time.monotonic() + 1
        while True:
            try:
                return store.claim(own)
            except SessionBusyError:
                if time.monotonic() > give_up:
                    raise

    assert attempts_in_a_second(real, naive) > 10 * MOST_ATTEMPTS


HELD = 40
ROUNDS = 2


def expiries(world: World) -> dict[str, float]:
    return dict(world.scores("leases"))


def scripts_for_renewals(world: World, store: Any, renew: Callable[[list[Any]], Any]) -> int:
    """Scripts run until every lease of one worker has been renewed so many times."""
    created = [store.create_session("claude", f"s-{n}", "/src").id for n in range(HELD)]
    leases = [store.claim(own, ttl=1.2) for own in created]
    before = scripts_run(world)
    for _ in range(ROUNDS):
        last = expiries(world)
        assert len(last) == HELD

        def all_renewed(last: dict[str, float] = last) -> bool:
            renew(leases)
            now = expiries(world)
            return all(now[own] > last[own] for own in last)

        world.until(all_renewed)
    used = scripts_run(world) - before
    for lease in leases:
        lease.release()
    return used


def test_all_leases_of_a_worker_are_renewed_in_one_round_trip(real: World) -> None:
    used = scripts_for_renewals(real, real.store(), lambda _: None)

    assert ROUNDS <= used <= 5 * ROUNDS  # a few, should a slow machine spread the claims


def test_renewing_leases_one_by_one_takes_a_round_trip_each(real: World) -> None:
    """The control of the count."""
    used = scripts_for_renewals(
        real, real.store(), lambda leases: [lease.renew() for lease in leases]
    )

    assert used >= HELD * ROUNDS


def test_leases_in_many_partitions_are_renewed(world: World, store: Any) -> None:
    created = [store.create_session("claude", f"s-{n}", "/src").id for n in range(30)]
    leases = [store.claim(own, ttl=1.2) for own in created]
    first = expiries(world)

    world.until(lambda: all(now > first[own] for own, now in expiries(world).items()))

    assert len(first) == 30
    assert not any(lease.lost for lease in leases)
    for lease in leases:
        lease.abandon()
    world.sleep(0.3)  # a round that is on its way, which would meddle with what is read now
    assert_consistent(world)


# ---- Nothing is left ----------------------------------------------------------------------------


def shape(world: World) -> dict[str, Any]:
    """Keys, fields and members, without what changes from write to write."""
    found: dict[str, Any] = {}
    for key, held in everything(world).items():
        if key.endswith(":events"):
            found[key] = "a stream"
        elif isinstance(held, dict):
            found[key] = set(held) - {"fence"}
        elif held and isinstance(held[0] if isinstance(held, list) else "", tuple):
            found[key] = {member for member, _ in held}
        else:
            found[key] = held
    return found


def turns_leave(world: World, turns: int) -> dict[str, Any]:
    """What so many claims and releases leave that was not there before."""
    store = world.store()
    session_id = store.create_session("claude", "s", "/src", "task", "mcp").id
    store.add_output(session_id, "line")
    before = shape(world)
    for _ in range(turns):
        store.claim(session_id, ttl=TTL).release()
    after = shape(world)
    lanes: Any = [key for key in world.keys() if key.startswith("lane:")]  # noqa: SIM118
    assert len(lanes) == 1
    assert world.redis.xlen(f"{world.prefix}events") <= 11_000
    assert fence_of(world, session_id) > 0
    return {
        key: (before.get(key), after.get(key))
        for key in before | after
        if before.get(key) != after.get(key)
    }


@proves("claims and releases", ordinary=1000, full=10_000)
def test_claims_and_releases_leave_nothing_but_the_fence(real_sync: World, attack: Attack) -> None:
    left = turns_leave(real_sync, attack.size)

    assert_consistent(real_sync)
    attack.tell(injected=attack.size, wrong=len(left))


@controls("claims and releases", ordinary=1)
@pytest.mark.parametrize(
    "forgotten",
    [
        "redis.call('ZREM', prefix .. 'leases', id)",
        "redis.call('SREM', prefix .. 'sessions:owner:' .. owner, id)",
        "'owner', 'lease_expires_at', ",
    ],
)
def test_what_a_release_forgets_is_noticed(
    real_sync: World, forgotten: str, monkeypatch: pytest.MonkeyPatch, attack: Attack
) -> None:
    """``end_lease`` without one of its parts."""

    def without(name: str) -> Script:
        text = load(name).text.replace(forgotten, "")
        return Script(text, sha1(text.encode()).hexdigest())

    assert without("update_status").text != load("update_status").text
    monkeypatch.setattr(sessionstore.pipelining, "load", without)

    attack.tell(injected=1, wrong=len(turns_leave(real_sync, 1)))


# ---- Processes ----------------------------------------------------------------------------------

PROCESS = """
import os, sys, time
from sessionstore import SessionBusyError, SessionStore
url, namespace, session_id = sys.argv[1:]
store = SessionStore.from_url(url, namespace=namespace, worker="process")

def ready():
    print("ready", flush=True)

"""


class Process:
    """A Python process with a store and the id of a session, and what it does there."""

    def __init__(self, world: World, code: str) -> None:
        self.world = world
        self.store = world.store()
        self.id = self.store.create_session("claude", "s", "/src").id
        assert world.url is not None
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROCESS + code, world.url, world.namespace, self.id],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == "ready\n", self.finish()

    def finish(self) -> tuple[int, str, str]:
        try:
            out, err = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        return self.process.returncode, out, err

    def session(self) -> Any:
        return self.store.get_session(self.id)


@contextmanager
def process(world: World, code: str) -> Iterator[Process]:
    started = Process(world, code)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.communicate()


CLAIM_AND_WAIT = "lease = store.claim(session_id)\nready()\ntime.sleep(60)\n"


def test_the_end_of_the_interpreter_gives_sessions_back(real_sync: World) -> None:
    with process(real_sync, "lease = store.claim(session_id)") as one:
        code, _, err = one.finish()

        assert (code, err) == (0, "")
        assert (one.session().status, one.session().owner) == ("active", None)
        assert_consistent(real_sync)


def test_an_exception_that_ends_the_interpreter_gives_sessions_back(real_sync: World) -> None:
    with process(real_sync, "lease = store.claim(session_id)\nraise ValueError('x')") as one:
        code, _, err = one.finish()

        assert (code, err.splitlines()[-1]) == (1, "ValueError: x")
        assert one.session().status == "active"


def test_a_killed_worker_keeps_its_session_until_the_lease_expires(real_sync: World) -> None:
    """The control: nobody is there to give it back."""
    with process(real_sync, CLAIM_AND_WAIT) as one:
        one.wait_until_ready()
        one.process.kill()
        one.finish()

        assert one.session().status == "busy"
        with pytest.raises(SessionBusyError, match=":process"):
            one.store.claim(one.id)
        expire_lease(real_sync, one.id)
        one.store.claim(one.id).release()


def test_an_interrupt_within_a_with_is_told_and_gives_the_session_back(real_sync: World) -> None:
    code = "with store.claim(session_id):\n    ready()\n    time.sleep(60)\n"
    with process(real_sync, code) as one:
        one.wait_until_ready()
        one.process.send_signal(signal.SIGINT)
        returned, _, err = one.finish()

        assert returned == -signal.SIGINT
        assert err.rstrip().endswith("KeyboardInterrupt")
        session = one.session()
        assert (session.status, session.error_buffer) == ("active", ("KeyboardInterrupt",))
        assert_consistent(real_sync)


FORK = """
lease = store.claim(session_id)
child = os.fork()
if child == 0:
    held = (lease.released, len(store._leases.held()), store.worker == lease.owner)
    try:
        store.add_output(session_id, "the child's")
    except SessionBusyError as error:
        print(*held, error.owner == lease.owner, flush=True)
    with lease:
        pass
    lease.release()
    store.close()
    os._exit(0)
os.waitpid(child, 0)
store.add_output(session_id, "the parent's")
lease.renew()
ready()
time.sleep(60)
"""


def test_a_forked_child_does_not_hold_its_parents_leases(real_sync: World) -> None:
    with process(real_sync, FORK) as one:
        assert one.process.stdout is not None
        assert one.process.stdout.readline() == "True 0 False True\n", one.finish()
        one.wait_until_ready()

        session = one.session()
        assert session.owner == f"{one.store.worker.split(':')[0]}:{one.process.pid}:process"
        assert (session.status, session.output_buffer) == ("busy", ("the parent's",))


# ---- asyncio ------------------------------------------------------------------------------------


@pytest.fixture
def faulty(server: PrivateServer) -> Iterator[FaultyWorld]:
    """An asyncio world behind a bad network."""
    world = FaultyWorld("async", server, delay=0.5)
    try:
        yield world
    finally:
        world.close()


class Tasks:
    """An asyncio store behind a proxy, and a session that it may claim."""

    def __init__(self, world: FaultyWorld) -> None:
        self.world = world
        self.store: AsyncSessionStore = world.store().store
        self.id = world.direct.create_session("claude", "s", "/src").id
        self.is_inside = False

    def run(self, work: Any) -> Any:
        assert self.world.runner is not None
        return self.world.runner.run(work)

    def session(self) -> Any:
        return self.world.direct.get_session(self.id)

    async def hold(self) -> None:
        """Claim the session and stay inside."""
        async with self.store.claim(self.id, ttl=TTL):
            self.is_inside = True
            await asyncio.sleep(60)

    async def until_inside(self) -> None:
        await self._until(lambda: self.is_inside)

    async def until_busy(self) -> None:
        await self._until(lambda: self.session().status == "busy")

    async def until_free(self) -> None:
        """On the server, and then as the store knows it: the reply may be delayed."""
        await self._until(lambda: self.session().status != "busy")
        await self._until(lambda: not self.store._leases.held())

    async def _until(self, condition: Callable[[], bool]) -> None:
        give_up = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < give_up
            await asyncio.sleep(0.01)

    def assert_given_back(self, *told: str, status: str = "active") -> None:
        session = self.session()
        assert (session.status, session.owner, session.error_buffer) == (status, None, told)
        assert self.store._leases.held() == []
        assert_consistent(self.world)


@pytest.fixture
def tasks(faulty: FaultyWorld) -> Tasks:
    return Tasks(faulty)


def test_cancelling_the_body_gives_the_session_back(tasks: Tasks) -> None:
    async def cancel() -> None:
        task = asyncio.create_task(tasks.hold())
        await tasks.until_inside()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    tasks.run(cancel())

    tasks.assert_given_back("CancelledError")


async def cancelled(task: asyncio.Task[Any], times: int) -> None:
    """Cancel a task again and again."""
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.02)
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("status", ["active", "error"])
def test_cancelling_a_claim_that_the_server_has_granted_does_not_leave_the_session_held(
    tasks: Tasks, status: Any, times: int
) -> None:
    """It gets back the status it had."""
    tasks.world.direct.update_status(tasks.id, status)

    async def claim() -> None:
        await tasks.store.claim(tasks.id, ttl=TTL, expected=("active", "error"))

    async def cancel() -> None:
        await tasks.store.ping()
        tasks.world.proxy.plan([Fault.DELAY_REPLY])
        task = asyncio.create_task(claim())
        await tasks.until_busy()
        await cancelled(task, times)
        await tasks.until_free()

    tasks.run(cancel())

    tasks.assert_given_back(status=status)


def test_cancelling_a_claim_that_waits_takes_nothing(tasks: Tasks) -> None:
    held = tasks.world.direct.claim(tasks.id, ttl=TTL)

    async def cancel() -> None:
        async def claim() -> None:
            await tasks.store.claim(tasks.id, ttl=TTL, wait=60)

        task = asyncio.create_task(claim())
        await asyncio.sleep(0.3)
        await cancelled(task, 1)
        held.release()
        await asyncio.sleep(0.3)

    tasks.run(cancel())

    tasks.assert_given_back()


@pytest.mark.parametrize("times", [1, 2, 3])
def test_cancelling_while_leaving_still_gives_the_session_back(tasks: Tasks, times: int) -> None:
    leaving = asyncio.Event()

    async def work() -> None:
        async with tasks.store.claim(tasks.id, ttl=TTL):
            tasks.world.proxy.plan([Fault.LOSE_REQUEST, Fault.DELAY_REPLY])
            leaving.set()

    async def cancel() -> None:
        task = asyncio.create_task(work())
        await leaving.wait()
        await asyncio.sleep(0)
        await cancelled(task, times)
        await tasks.until_free()

    tasks.run(cancel())

    tasks.world.proxy.plan(())
    tasks.assert_given_back()


def test_a_timeout_in_the_body_gives_the_session_back(tasks: Tasks) -> None:
    async def work() -> None:
        async with asyncio.timeout(0.2), tasks.store.claim(tasks.id, ttl=TTL):
            await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        tasks.run(work())

    tasks.assert_given_back("CancelledError")


def test_a_timeout_around_a_waiting_claim_takes_nothing(tasks: Tasks) -> None:
    held = tasks.world.direct.claim(tasks.id, ttl=TTL)

    async def work() -> None:
        async with asyncio.timeout(0.2):
            await tasks.store.claim(tasks.id, ttl=TTL, wait=60)

    with pytest.raises(TimeoutError):
        tasks.run(work())
    held.release()

    tasks.assert_given_back()


def test_a_failing_task_of_a_group_gives_back_what_the_others_hold(tasks: Tasks) -> None:
    async def fail() -> None:
        await tasks.until_inside()
        raise AgentCrashed("the other's")

    async def group() -> None:
        async with asyncio.TaskGroup() as tasks_of_group:
            tasks_of_group.create_task(tasks.hold())
            tasks_of_group.create_task(fail())

    with pytest.raises(ExceptionGroup) as failed:
        tasks.run(group())

    assert failed.group_contains(AgentCrashed, match="the other's")
    tasks.assert_given_back("CancelledError")


def test_tasks_hold_sessions_side_by_side(tasks: Tasks) -> None:
    created = [tasks.world.direct.create_session("claude", f"s-{n}", "/src").id for n in range(40)]

    async def work(own: str) -> int:
        async with tasks.store.claim(own, ttl=TTL):
            await asyncio.sleep(0)
            return await tasks.store.add_output(own, "line")

    async def together() -> list[int]:
        return await asyncio.gather(*(work(own) for own in created))

    assert tasks.run(together()) == [1] * 40
    assert tasks.store._leases.held() == []
    assert_consistent(tasks.world)


def test_tasks_that_wait_for_one_session_hold_it_in_turn(tasks: Tasks) -> None:
    inside: list[int] = []
    most: list[int] = []

    async def work(number: int) -> None:
        async with tasks.store.claim(tasks.id, ttl=TTL, wait=60):
            inside.append(number)
            most.append(len(inside))
            await asyncio.sleep(0.01)
            inside.remove(number)

    async def together() -> None:
        await asyncio.gather(*map(work, range(5)))

    tasks.run(together())

    assert most == [1] * 5
    tasks.assert_given_back()


def test_a_claim_can_be_awaited_once(tasks: Tasks) -> None:
    async def twice() -> None:
        claim = tasks.store.claim(tasks.id, ttl=TTL)
        lease = await claim
        with pytest.raises(SessionStoreError, match="awaited once"):
            await claim
        await lease.release()

    tasks.run(twice())


def test_a_claim_that_is_never_awaited_takes_nothing(tasks: Tasks) -> None:
    async def forget() -> None:
        tasks.store.claim(tasks.id, ttl=TTL)

    tasks.run(forget())

    tasks.assert_given_back()


# ---- Threads ------------------------------------------------------------------------------------


def test_threads_that_wait_for_one_session_hold_it_in_turn(real_sync: World) -> None:
    store = real_sync.store()
    session_id = store.create_session("claude", "s", "/src").id
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        with store.claim(session_id, ttl=TTL, wait=60):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.01)
            inside.remove(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert most == [1] * 5
    assert_consistent(real_sync)


def renewing() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "sessionstore-leases"]


def test_one_thread_renews_all_leases_of_a_store_and_ends_with_it(real_sync: World) -> None:
    before = set(renewing())
    store = real_sync.store()
    for number in range(5):
        store.claim(store.create_session("claude", f"s-{number}", "/src").id, ttl=TTL)
    (thread,) = set(renewing()) - before
    assert thread.daemon

    store.close()

    waiting.until(lambda: not thread.is_alive())


def test_renewals_go_on_after_an_outage(server: PrivateServer) -> None:
    """Longer than the lease, with every attempt refused."""
    world = FaultyWorld("sync", server)
    try:
        store = world.store(deadline=0.3)
        session_id = store.create_session("claude", "s", "/src").id
        with store.claim(session_id, ttl=0.6) as lease:
            world.proxy.down()
            waiting.until(lambda: now_us(world) > expiry(world, session_id) + 300_000)
            world.proxy.up()
            waiting.until(lambda: now_us(world) < expiry(world, session_id))
            assert not lease.lost
            store.add_output(session_id, "after the outage")
        assert store.get_session(session_id).status == "active"
    finally:
        world.close()


def expiry(world: RawKeys, session_id: str) -> int:
    return microseconds(fields_of(world, session_id)["lease_expires_at"])


def test_a_failed_renewal_is_logged(
    server: PrivateServer, caplog: pytest.LogCaptureFixture
) -> None:
    world = FaultyWorld("sync", server)
    try:
        store = world.store(deadline=0.2)
        session_id = store.create_session("claude", "s", "/src").id
        store.claim(session_id, ttl=0.3)
        world.proxy.down()
        waiting.until(lambda: "leases were not renewed" in caplog.text)
        assert {one.levelno for one in caplog.records} == {logging.WARNING}
        world.proxy.up()
    finally:
        world.close()
