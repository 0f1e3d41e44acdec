"""Reaping: what is dead is ended, what is only quiet is not, and no pass does too much.

Sessions are made older by hand instead of waiting (``moments.py``). Marks count from one to three
grace periods; the store here has the usual ten seconds, so that no busy machine can turn a mark of
15 seconds into something else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha1
from typing import Any

import pytest
from conftest import SERVERS, World, opened
from consistency import assert_consistent, microseconds
from faults import FaultyWorld
from moments import abandon, be_ended, be_idle, everything, expire_lease, iso, mark, now_us

import sessionstore.pipelining
import sessionstore.reaper
from sessionstore import (
    AsyncReaper,
    LeaseLostError,
    Reaped,
    Reaper,
    SessionNotActiveError,
)
from sessionstore._server import PrivateServer
from sessionstore.scripts import Script, load

TTL = 3600.0  # seconds: of leases that must not expire while a test runs
GRACE = 10.0  # seconds: the usual setting
SHORT_GRACE = 0.3


@pytest.fixture
def worker(world: World) -> Any:
    """The store of a worker that will be lost."""
    return world.store(worker="worker")


@pytest.fixture
def session_id(store: Any) -> str:
    return str(store.create_session("claude", "service", "/src", "task", "mcp").id)


@pytest.fixture(params=[*SERVERS, f"{SERVERS[0]}-16"])
def real(
    request: pytest.FixtureRequest, running: Callable[[str], PrivateServer]
) -> Iterator[World]:
    """Each real server with a blocking store, and 16 partitions."""
    with opened(f"sync-{request.param}", running) as world:
        yield world


def fields_of(world: Any, session_id: str) -> dict[str, str]:
    return dict(world.redis.hgetall(world.session(session_id)))


def told(reaped: list[Reaped]) -> list[tuple[str, str]]:
    return [(one.session_id, one.action) for one in reaped]


def lose(world: World, worker: Any, session_id: str) -> None:
    """The worker holds the session, and is gone."""
    worker.claim(session_id, ttl=TTL)
    abandon(worker)
    expire_lease(world, session_id)


def altered(script: str, old: str, new: str) -> Callable[[str], Script]:
    """A loader that changes one script."""

    def load_altered(name: str) -> Script:
        text = load(name).text
        if name == script:
            assert old in text
            text = text.replace(old, new)
        return Script(text, sha1(text.encode()).hexdigest())

    return load_altered


# ---- Lost workers -------------------------------------------------------------------------------


def test_an_expired_lease_is_marked_and_nothing_else(
    world: World, store: Any, worker: Any, session_id: str
) -> None:
    lose(world, worker, session_id)
    before = fields_of(world, session_id)
    events = world.events()
    now_ms = now_us(world) // 1000

    (marked,) = store.reap()

    assert (marked.session_id, marked.action, marked.status) == (session_id, "marked", "busy")
    assert marked.owner == worker.worker
    assert marked.reason == (
        f"the lease of {worker.worker} expired at {before['lease_expires_at']}"
    )
    after = fields_of(world, session_id)
    seen_ms = int(after.pop("reap_seen_ms"))
    assert now_ms <= seen_ms <= now_us(world) // 1000
    assert after == before
    assert world.events() == events
    assert_consistent(world)


def test_two_passes_at_once_end_nothing(
    world: World, store: Any, worker: Any, session_id: str
) -> None:
    lose(world, worker, session_id)
    store.reap()
    before = everything(world)

    assert world.store(worker="another").reap() == []
    assert store.reap() == []

    assert everything(world) == before


def test_without_the_grace_period_two_passes_at_once_end_a_session(
    world: World, store: Any, worker: Any, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test before it."""
    naive = altered("reap", "age_ms >= grace_ms and", "")
    monkeypatch.setattr(sessionstore.pipelining, "load", naive)
    lose(world, worker, session_id)
    store.reap()

    assert told(store.reap()) == [(session_id, "lost")]


def test_a_session_marked_a_grace_period_ago_is_ended(
    world: World, store: Any, worker: Any, session_id: str
) -> None:
    worker.add_output(session_id, "output stays")
    worker.add_error(session_id, "errors stay")
    worker.update_metadata(session_id, {"branch": "main"})
    lose(world, worker, session_id)
    mark(world, session_id, 1.5 * GRACE)
    before = fields_of(world, session_id)

    (lost,) = store.reap()

    assert (lost.session_id, lost.action, lost.status) == (session_id, "lost", "busy")
    assert lost.owner == worker.worker
    assert lost.reason.endswith("and was not renewed")
    session = store.get_session(session_id)
    assert (session.status, session.owner, session.lease_expires_at) == ("error", None, None)
    assert session.output_buffer == ("output stays",)
    line = f"worker {worker.worker} was lost: its lease expired at {before['lease_expires_at']}"
    assert session.error_buffer == ("errors stay", f"{line}; ended by {store.worker}")
    assert session.metadata == {"branch": "main"}
    after = fields_of(world, session_id)
    assert after["last_activity"] == before["last_activity"]  # the reaper's work is none
    assert after["fence"] == before["fence"]
    assert_consistent(world)


def test_a_lost_worker_is_told_in_the_events(
    world: World, store: Any, worker: Any, session_id: str
) -> None:
    lose(world, worker, session_id)
    mark(world, session_id, 1.5 * GRACE)

    store.reap()

    assert world.events()[-1] == {
        "event": "lease_expired",
        "session_id": session_id,
        "type": "claude",
        "actor": store.worker,
        "owner": worker.worker,
        "old_status": "busy",
        "status": "error",
    }


def test_a_session_whose_worker_was_lost_has_ended_when_it_was_reaped(
    world: World, store: Any, worker: Any, session_id: str
) -> None:
    lose(world, worker, session_id)
    mark(world, session_id, 1.5 * GRACE)
    before = now_us(world)

    store.reap()

    assert before <= world.scores("ended")[session_id] <= now_us(world)


@pytest.mark.parametrize("seconds_ago", [0.0, 0.5 * GRACE])
def test_a_younger_mark_is_left_as_it_is(
    world: World, store: Any, worker: Any, session_id: str, seconds_ago: float
) -> None:
    lose(world, worker, session_id)
    mark(world, session_id, seconds_ago)
    before = everything(world)

    assert store.reap() == []

    assert everything(world) == before


@pytest.mark.parametrize("seconds_ago", [3 * GRACE + 1, 86_400.0, -60.0])
def test_a_mark_from_before_an_outage_or_from_the_future_is_renewed(
    world: World, store: Any, worker: Any, session_id: str, seconds_ago: float
) -> None:
    """While nobody passed, nobody may have been able to renew either."""
    lose(world, worker, session_id)
    mark(world, session_id, seconds_ago)
    now_ms = now_us(world) // 1000

    assert told(store.reap()) == [(session_id, "marked")]

    fields = fields_of(world, session_id)
    assert (fields["status"], fields["owner"]) == ("busy", worker.worker)
    assert now_ms <= int(fields["reap_seen_ms"]) <= now_us(world) // 1000


def test_without_the_upper_bound_an_old_mark_ends_a_session(
    world: World, store: Any, worker: Any, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test before it."""
    naive = altered("reap", "or age_ms > 3 * grace_ms", "")
    monkeypatch.setattr(sessionstore.pipelining, "load", naive)
    lose(world, worker, session_id)
    mark(world, session_id, 86_400)

    assert told(store.reap()) == [(session_id, "lost")]


def test_a_renewal_takes_the_mark_away(
    world: World, store: Any, worker: Any, session_id: str
) -> None:
    lease = worker.claim(session_id, ttl=TTL)
    expire_lease(world, session_id)
    mark(world, session_id, 1.5 * GRACE)

    lease.renew()

    assert "reap_seen_ms" not in fields_of(world, session_id)
    assert store.reap() == []
    expire_lease(world, session_id)
    assert told(store.reap()) == [(session_id, "marked")]


def test_another_workers_claim_takes_the_mark_away(
    world: World, store: Any, worker: Any, session_id: str
) -> None:
    lose(world, worker, session_id)
    mark(world, session_id, 1.5 * GRACE)

    store.claim(session_id, ttl=TTL)

    assert "reap_seen_ms" not in fields_of(world, session_id)
    assert store.reap() == []


def test_a_release_takes_the_mark_away(
    world: World, store: Any, worker: Any, session_id: str
) -> None:
    lease = worker.claim(session_id, ttl=TTL)
    expire_lease(world, session_id)
    mark(world, session_id, 1.5 * GRACE)

    lease.release()

    assert "reap_seen_ms" not in fields_of(world, session_id)
    assert store.reap() == []


def test_a_live_lease_is_never_reaped_however_quiet_its_session(
    world: World, store: Any, worker: Any, session_id: str
) -> None:
    worker.claim(session_id, ttl=TTL)
    mark(world, session_id, 1.5 * GRACE)
    be_idle(world, session_id, 1_000_000)
    before = everything(world)

    assert store.reap(idle_for=1, ended_for=1) == []

    assert everything(world) == before


def test_an_entry_of_leases_alone_ends_nothing(
    world: World, store: Any, worker: Any, session_id: str
) -> None:
    """The hash is the truth: there the lease is live."""
    worker.claim(session_id, ttl=TTL)
    mark(world, session_id, 1.5 * GRACE)
    world.redis.zadd(f"{world.prefix_of(session_id)}leases", {session_id: 1})
    before = everything(world)

    assert store.reap() == []

    assert everything(world) == before


def test_an_ended_session_can_be_claimed_by_another_worker(
    world: World, store: Any, worker: Any, session_id: str
) -> None:
    lose(world, worker, session_id)
    mark(world, session_id, 1.5 * GRACE)
    fence = int(fields_of(world, session_id)["fence"])
    store.reap()
    with pytest.raises(SessionNotActiveError):
        store.claim(session_id)

    with store.claim(session_id, expected=("active", "error")) as lease:
        assert lease.fence > fence
        assert store.add_output(session_id, "it goes on") == 1

    assert store.get_session(session_id).status == "active"
    assert_consistent(world)


def test_a_worker_that_wakes_up_after_it_was_reaped_cannot_write(
    world: World, store: Any, worker: Any, session_id: str
) -> None:
    lease = worker.claim(session_id, ttl=TTL)
    expire_lease(world, session_id)
    mark(world, session_id, 1.5 * GRACE)
    store.reap()
    before = everything(world)

    with pytest.raises(LeaseLostError) as refused:
        worker.add_output(session_id, "late")

    assert (refused.value.status, refused.value.owner) == ("error", None)
    assert lease.lost
    assert everything(world) == before


def test_the_line_about_a_lost_worker_keeps_the_bound_of_entries(
    world: World, worker: Any, session_id: str
) -> None:
    store = world.store(buffer_limit=3)
    store.add_error(session_id, "1", "2", "3")
    lose(world, worker, session_id)
    mark(world, session_id, 1.5 * GRACE)

    store.reap()

    session = store.get_session(session_id)
    assert session.error_buffer[:2] == ("2", "3")
    assert "was lost" in session.error_buffer[2]
    assert session.error_total == 4
    assert_consistent(world)


def test_the_line_about_a_lost_worker_keeps_the_bound_of_bytes(
    world: World, worker: Any, session_id: str
) -> None:
    store = world.store(buffer_bytes=500)
    store.add_error(session_id, *["é" * 50] * 4)
    lose(world, worker, session_id)
    mark(world, session_id, 1.5 * GRACE)

    store.reap()

    session = store.get_session(session_id)
    sizes = [len(entry.encode()) + 16 for entry in session.error_buffer]
    assert sum(sizes) <= 500 < sum(sizes) + 116
    assert "was lost" in session.error_buffer[-1]
    assert session.error_total == 5
    assert_consistent(world)


def test_the_newest_line_stays_whatever_the_bounds(
    world: World, worker: Any, session_id: str
) -> None:
    store = world.store(buffer_bytes=20)
    lose(world, worker, session_id)
    mark(world, session_id, 1.5 * GRACE)

    store.reap()

    assert len(store.get_session(session_id).error_buffer) == 1
    assert_consistent(world)


def test_a_dead_workers_session_is_ended_after_its_lease_and_the_grace_period(
    world: World, worker: Any, session_id: str
) -> None:
    """With nothing made older."""
    store = world.store(reap_grace=SHORT_GRACE)
    worker.claim(session_id, ttl=0.2)
    abandon(worker)
    expires = microseconds(fields_of(world, session_id)["lease_expires_at"])

    world.until(lambda: "lost" in [one.action for one in store.reap()])

    assert world.scores("ended")[session_id] - expires >= SHORT_GRACE * 1_000_000
    assert_consistent(world)


# ---- Idle sessions ------------------------------------------------------------------------------


def test_idle_sessions_that_nobody_holds_are_terminated(
    world: World, store: Any, worker: Any
) -> None:
    created = {
        name: store.create_session("claude", name, "/src").id
        for name in ("active", "starting", "busy", "fresh", "held", "expired", "error")
    }
    for name in ("starting", "busy", "error"):
        store.update_status(created[name], name)
    for name in ("held", "expired"):
        worker.claim(created[name], ttl=TTL)
    expire_lease(world, created["expired"])
    for name, own in created.items():
        if name not in ("fresh", "error"):
            be_idle(world, own, 1000)
    be_ended(world, created["error"], 1000)
    before = {name: fields_of(world, own) for name, own in created.items()}

    reaped = store.reap(idle_for=999)

    expected = {created[name]: "terminated" for name in ("active", "starting", "busy")}
    assert dict(told(reaped)) == expected | {created["expired"]: "marked"}
    for name, own in created.items():
        fields = fields_of(world, own)
        fields.pop("reap_seen_ms", None)
        ended = {"status": "terminated"} if own in expected else {}
        assert fields == before[name] | ended, name
    assert_consistent(world)


def test_an_idle_session_is_told_with_its_reason_and_event(
    world: World, store: Any, session_id: str
) -> None:
    be_idle(world, session_id, 1000)

    (terminated,) = store.reap(idle_for=60)

    assert terminated.status == "active"
    assert terminated.owner is None
    assert terminated.reason.startswith("idle for 100")
    last = world.events()[-1]
    assert last["event"] == "status_changed"
    assert (last["actor"], last["old_status"], last["status"]) == (
        store.worker, "active", "terminated"
    )  # fmt: skip


def test_idle_sessions_are_left_alone_unless_asked(
    world: World, store: Any, session_id: str
) -> None:
    be_idle(world, session_id, 1_000_000)
    before = everything(world)

    assert store.reap() == []

    assert everything(world) == before


HEAD = 1100


def crowd(world: World, store: Any, worker: Any, count: int = HEAD) -> tuple[list[str], str]:
    """So many sessions that are quiet and held, and after them one that is idle; all together.

    One service session: so they are in one partition.
    """
    held = [store.create_session("claude", "crowd", "/src").id for _ in range(count)]
    idle = str(store.create_session("claude", "crowd", "/src").id)
    for own in held:
        worker.claim(own, ttl=TTL)
    now = now_us(world)
    prefix = world.prefix_of(idle)
    with world.redis.pipeline(transaction=False) as pipe:
        for number, own in enumerate([*held, idle]):
            us = now - 2_000_000_000 + number
            pipe.hset(world.session(own), "last_activity", iso(us))
            pipe.zadd(f"{prefix}activity", {own: us})
        pipe.execute()
    return held, idle


def test_a_long_head_of_quiet_held_sessions_starves_nobody(real: World) -> None:
    store = real.store()
    _, idle = crowd(real, store, real.store(worker="worker"))

    passes = [told(store.reap(idle_for=60)) for _ in range(3)]

    assert passes == [[], [(idle, "terminated")], []]
    assert_consistent(real)


def test_without_the_place_to_go_on_from_a_long_head_starves_others(
    real: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test before it."""
    monkeypatch.setattr(
        sessionstore.pipelining, "load", altered("reap", "redis.call('SET', place, candidate)", "")
    )
    store = real.store()
    crowd(real, store, real.store(worker="worker"))

    assert [store.reap(idle_for=60) for _ in range(5)] == [[]] * 5


def test_after_the_end_passes_begin_at_the_head_again(real: World) -> None:
    store = real.store()
    held, idle = crowd(real, store, real.store(worker="worker"))
    assert store.reap(idle_for=60) == []
    store.update_status(held[0], "active", force=True)
    be_idle(real, held[0], 5000)

    reaped = [one for _ in range(3) for one in told(store.reap(idle_for=60))]

    assert reaped == [(idle, "terminated"), (held[0], "terminated")]


def test_a_session_that_is_idle_again_at_the_place_itself_is_not_starved(real: World) -> None:
    """The one that the last pass stopped at is not looked at twice in turn, but later."""
    store = real.store()
    held, _ = crowd(real, store, real.store(worker="worker"), 1000)
    assert store.reap(idle_for=60) == []
    stopped_at = str(real.redis.get(f"{real.prefix_of(held[0])}reaping"))
    assert stopped_at.endswith(held[999])
    score = real.scores("activity")[held[999]]
    store.update_status(held[999], "active", force=True)
    real.redis.zadd(f"{real.prefix_of(held[0])}activity", {held[999]: score})

    for _ in range(4):
        store.reap(idle_for=60)

    assert store.get_session(held[999]).status == "terminated"


@pytest.mark.parametrize("spoilt", ["", "garbage", "99999999999999999 x", "12345 missing"])
def test_any_place_to_go_on_from_is_as_good(
    world: World, store: Any, session_id: str, spoilt: str
) -> None:
    be_idle(world, session_id, 1000)
    world.redis.set(f"{world.prefix_of(session_id)}reaping", spoilt)

    reaped = [one for _ in range(2) for one in told(store.reap(idle_for=60))]

    assert reaped == [(session_id, "terminated")]


def test_a_place_of_the_wrong_type_is_replaced(world: World, store: Any, session_id: str) -> None:
    be_idle(world, session_id, 1000)
    world.redis.rpush(f"{world.prefix_of(session_id)}reaping", "spoilt")

    assert told(store.reap(idle_for=60, limit=1)) == [(session_id, "terminated")]

    assert_consistent(world)


# ---- Ended sessions -----------------------------------------------------------------------------


def end(world: World, store: Any, service: str, seconds: float, status: str = "terminated") -> str:
    """A session that ended so long ago."""
    own = str(store.create_session("codex", service, "/src", "task", "mcp").id)
    store.add_output(own, "line")
    store.add_error(own, "line")
    store.update_status(own, status)
    be_ended(world, own, seconds)
    return own


def test_sessions_that_ended_long_ago_are_deleted_with_all_that_is_theirs(
    world: World, store: Any, session_id: str
) -> None:
    before = {key for key in world.keys() if not key.startswith("lane:")}  # noqa: SIM118
    old = [end(world, store, "old-1", 1000), end(world, store, "old-2", 900, "error")]
    recent = end(world, store, "recent", 500)

    reaped = store.reap(ended_for=800)

    assert sorted(told(reaped)) == sorted((own, "deleted") for own in old)
    assert {one.status for one in reaped} == {"terminated", "error"}
    assert any(one.reason.startswith("terminated for 100") for one in reaped)
    assert [one.id for one in store.get_all_sessions()] == [session_id, recent]
    assert_consistent(world)
    store.delete_session(recent)
    assert {key for key in world.keys() if not key.startswith("lane:")} == before  # noqa: SIM118


def test_a_deletion_is_told_in_the_events(world: World, store: Any) -> None:
    own = end(world, store, "old", 1000, "error")

    store.reap(ended_for=800)

    assert [one for one in world.events() if one["session_id"] == own][-1] == {
        "event": "deleted",
        "session_id": own,
        "type": "codex",
        "actor": store.worker,
        "old_status": "error",
        "output_total": "1",
        "error_total": "1",
    }


def test_ended_sessions_are_kept_unless_asked(world: World, store: Any) -> None:
    end(world, store, "old", 1_000_000)
    before = everything(world)

    assert store.reap(idle_for=0) == []

    assert everything(world) == before


def test_a_pass_follows_the_stores_retention(world: World) -> None:
    store = world.store(retention=800)
    kept = world.store()
    old, recent = end(world, kept, "old", 1000), end(world, kept, "recent", 500)

    assert told(store.reap()) == [(old, "deleted")]
    assert told(store.reap(ended_for=400)) == [(recent, "deleted")]


def test_a_session_that_is_ended_by_a_pass_is_deleted_by_no_earlier_than_its_time(
    world: World, store: Any, session_id: str
) -> None:
    be_idle(world, session_id, 1000)

    assert told(store.reap(idle_for=60, ended_for=60)) == [(session_id, "terminated")]

    assert store.get_session(session_id).status == "terminated"


# ---- Limit and dry run --------------------------------------------------------------------------

EACH = 5
KINDS = ("marked", "lost", "terminated", "deleted")


def scene(world: World, store: Any, worker: Any) -> dict[str, list[str]]:
    """Sessions of each kind, all in one partition, and others that must stay."""
    found: dict[str, list[str]] = {kind: [] for kind in (*KINDS, "stays")}
    for number in range(EACH):
        for kind in (*KINDS, "stays"):
            found[kind].append(str(store.create_session("claude", "scene", "/src", kind).id))
        for kind in ("marked", "lost"):
            worker.claim(found[kind][number], ttl=TTL)
            expire_lease(world, found[kind][number])
        mark(world, found["lost"][number], 1.5 * GRACE)
        be_idle(world, found["terminated"][number], 1000)
        store.update_status(found["deleted"][number], "error")
        be_ended(world, found["deleted"][number], 1000)
    abandon(worker)
    return found


PASS = {"idle_for": 60, "ended_for": 60}


@pytest.fixture(params=[100, 4], ids=["one script", "many scripts"])
def work(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass is one script, or one after another that do next to nothing each."""

    bound = f"local MOST_WORK = {request.param} "
    loader = altered("reap", "local MOST_WORK = 100 ", bound)
    monkeypatch.setattr(sessionstore.pipelining, "load", loader)


@pytest.mark.usefixtures("work")
def test_a_pass_does_at_most_so_many_of_each_kind(world: World, store: Any, worker: Any) -> None:
    found = scene(world, store, worker)

    first = store.reap(limit=2, **PASS)

    assert Counter(one.action for one in first) == dict.fromkeys(KINDS, 2)
    assert_consistent(world)
    more = [one for _ in range(4) for one in told(store.reap(limit=2, **PASS))]
    assert sorted(told(first) + more) == sorted(
        (own, kind) for kind in KINDS for own in found[kind]
    )
    assert_consistent(world)


@pytest.mark.usefixtures("work")
def test_a_dry_run_changes_nothing_and_tells_what_a_pass_then_does(
    world: World, store: Any, worker: Any
) -> None:
    found = scene(world, store, worker)
    before = everything(world)

    foretold = store.reap(dry_run=True, **PASS)

    assert everything(world) == before
    assert sorted(told(foretold)) == sorted((own, kind) for kind in KINDS for own in found[kind])
    done = store.reap(**PASS)
    ours, theirs = (
        [one.model_dump(exclude={"reason"}) for one in reaped] for reaped in (foretold, done)
    )
    assert ours == theirs
    assert everything(world) != before


@pytest.mark.usefixtures("work")
def test_a_dry_run_tells_no_more_than_the_limit(world: World, store: Any, worker: Any) -> None:
    scene(world, store, worker)
    before = everything(world)

    foretold = store.reap(dry_run=True, limit=3, **PASS)

    assert everything(world) == before
    assert told(foretold) == told(store.reap(limit=3, **PASS))
    assert Counter(one.action for one in foretold) == dict.fromkeys(KINDS, 3)


def test_a_dry_run_does_not_move_the_place_to_go_on_from(real: World) -> None:
    store = real.store()
    _, idle = crowd(real, store, real.store(worker="worker"))
    before = everything(real)

    assert [store.reap(idle_for=60, dry_run=True) for _ in range(3)] == [[]] * 3

    assert everything(real) == before
    assert store.reap(idle_for=60) == []
    at_the_place = everything(real)
    for _ in range(2):
        assert told(store.reap(idle_for=60, dry_run=True)) == [(idle, "terminated")]
    assert everything(real) == at_the_place


def test_a_pass_over_an_empty_namespace_does_nothing(world: World, store: Any) -> None:
    assert store.reap(**PASS) == []

    assert {key for key in world.keys() if not key.startswith("lane:")} == {"meta"}  # noqa: SIM118


def test_a_pass_reaches_every_partition(world: World, store: Any, worker: Any) -> None:
    created = [store.create_session("claude", f"s-{n}", "/src").id for n in range(60)]
    for own in created[:20]:
        be_idle(world, own, 1000)
    for own in created[20:40]:
        worker.claim(own, ttl=TTL)
        expire_lease(world, own)
    abandon(worker)
    for own in created[40:]:
        store.update_status(own, "terminated")
        be_ended(world, own, 1000)

    reaped = dict(told(store.reap(**PASS)))

    assert reaped == (
        dict.fromkeys(created[:20], "terminated")
        | dict.fromkeys(created[20:40], "marked")
        | dict.fromkeys(created[40:], "deleted")
    )
    assert_consistent(world)


# ---- Retention with each new session ------------------------------------------------------------


def test_each_new_session_clears_at_most_two_that_are_past_retention(world: World) -> None:
    store, kept = world.store(retention=800), world.store()
    old = [end(world, kept, "service", 2000 - number) for number in range(5)]
    recent = end(world, kept, "service", 500)

    left = []
    for _ in range(4):
        store.create_session("claude", "service", "/src")
        left.append([own for own in [*old, recent] if store.find_session(own) is not None])
        assert_consistent(world)

    assert left == [[*old[2:], recent], [old[4], recent], [recent], [recent]]  # the oldest first
    deleted = [one["session_id"] for one in world.events() if one["event"] == "deleted"]
    assert deleted == old


def test_retention_is_off_unless_set(world: World, store: Any) -> None:
    old = end(world, store, "service", 1_000_000_000)

    store.create_session("claude", "service", "/src")

    assert store.find_session(old) is not None


def test_a_refused_session_clears_nothing(world: World, session_id: str) -> None:
    store = world.store(retention=800)
    end(world, world.store(), "service", 2000)
    before = everything(world)

    with pytest.raises(sessionstore.ServiceSessionInUseError, match=session_id):
        store.create_session("claude", "service", "/src", unique=True)

    assert everything(world) == before


# ---- Sessions that are spoilt -------------------------------------------------------------------


def replace(world: World, key: str) -> None:
    world.redis.delete(key)
    world.redis.set(key, "spoilt")


SPOILT: dict[str, Callable[[World, str], Any]] = {
    "its hash": lambda world, own: replace(world, world.session(own)),
    "its status": lambda world, own: world.redis.hdel(world.session(own), "status"),
    "no hash": lambda world, own: world.redis.delete(world.session(own)),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_session_is_passed_over_and_blocks_no_other(
    world: World, store: Any, worker: Any, how: str
) -> None:
    found = scene(world, store, worker)
    spoilt = [found[kind].pop(0) for kind in KINDS]  # at the head, each
    for own in spoilt:
        SPOILT[how](world, own)
    before = {own: world.redis.dump(world.session(own)) for own in spoilt}

    reaped = told(store.reap(**PASS))

    assert sorted(reaped) == sorted((own, kind) for kind in KINDS for own in found[kind])
    assert {own: world.redis.dump(world.session(own)) for own in spoilt} == before
    assert {own for own in spoilt if own in world.scores("sessions")} == set(spoilt)


def test_a_spoilt_error_buffer_keeps_a_lost_session_from_being_torn(
    world: World, store: Any, worker: Any
) -> None:
    found = scene(world, store, worker)
    first = found["lost"].pop(0)
    replace(world, world.session(first, ":errors"))
    before = fields_of(world, first)

    reaped = told(store.reap())

    assert (first, "lost") not in reaped
    assert {own for own, action in reaped if action == "lost"} == set(found["lost"])
    assert fields_of(world, first) == before


def test_a_spoilt_session_past_retention_does_not_stop_new_ones(world: World) -> None:
    store, kept = world.store(retention=800), world.store()
    spoilt, old = end(world, kept, "service", 3000), end(world, kept, "service", 2000)
    replace(world, world.session(spoilt))

    created = store.create_session("claude", "service", "/src")

    assert store.get_session(created.id).status == "active"
    assert store.find_session(old) is None


# ---- In the background --------------------------------------------------------------------------


@contextmanager
def reaping(world: World, store: Any, **arguments: Any) -> Iterator[Any]:
    """A reaper of the world's style."""
    if world.runner is None:
        with Reaper(store, **arguments) as reaper:
            yield reaper
        return
    background = AsyncReaper(store.store, **arguments)
    world.runner.run(background.__aenter__())
    try:
        yield background
    finally:
        world.runner.run(background.stop())


def status_of(world: World, session_id: str) -> str | None:
    return fields_of(world, session_id).get("status")


@pytest.fixture
def quick(world: World) -> Any:
    """A store with a short grace period."""
    return world.store(reap_grace=SHORT_GRACE)


def test_a_reaper_follows_up_what_it_has_marked_however_rare_its_passes(
    world: World, quick: Any, worker: Any, session_id: str
) -> None:
    lose(world, worker, session_id)
    seen: list[Reaped] = []

    with reaping(world, quick, every=600, on_reaped=seen.append):
        world.until(lambda: status_of(world, session_id) == "error")

    world.until(lambda: len(seen) > 1)
    assert {one.session_id for one in seen} == {session_id}
    actions = [one.action for one in seen]
    assert actions == ["marked"] * (len(seen) - 1) + ["lost"]
    assert_consistent(world)


def test_a_reaper_that_does_not_look_again_leaves_it_to_the_next_pass(
    world: World, quick: Any, worker: Any, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test before it."""
    monkeypatch.setattr(sessionstore.reaper, "LOOK_AGAIN", 1_000_000.0)
    lose(world, worker, session_id)

    with reaping(world, quick, every=600):
        world.until(lambda: "reap_seen_ms" in fields_of(world, session_id))
        world.sleep(3 * SHORT_GRACE)

    assert status_of(world, session_id) == "busy"


def test_a_reaper_passes_again_and_again(world: World, quick: Any, store: Any) -> None:
    with reaping(world, quick, every=0.05, idle_for=60, ended_for=60):
        for number in range(3):
            idle = str(store.create_session("claude", f"idle-{number}", "/src").id)
            be_idle(world, idle, 1000)
            old = end(world, store, f"old-{number}", 1000)
            world.until(lambda idle=idle: status_of(world, idle) == "terminated")
            world.until(lambda old=old: status_of(world, old) is None)

    assert_consistent(world)


def test_a_reaper_leaves_alone_what_it_was_not_asked_for(
    world: World, quick: Any, store: Any, worker: Any
) -> None:
    idle = str(store.create_session("claude", "idle", "/src").id)
    be_idle(world, idle, 1_000_000)
    old = end(world, store, "old", 1_000_000)
    held = str(store.create_session("claude", "held", "/src").id)
    worker.claim(held, ttl=TTL)
    before = everything(world)

    with reaping(world, quick, every=0.02):
        world.sleep(0.3)

    assert {status_of(world, own) for own in (idle, old, held)} == {"active", "terminated", "busy"}
    assert everything(world) == before


def test_two_reapers_end_a_session_once(
    world: World, quick: Any, worker: Any, session_id: str
) -> None:
    lose(world, worker, session_id)
    second = world.store(reap_grace=SHORT_GRACE, worker="second")

    with reaping(world, quick, every=0.02), reaping(world, second, every=0.02):
        world.until(lambda: status_of(world, session_id) == "error")
        world.sleep(0.2)

    assert [one["event"] for one in world.events()].count("lease_expired") == 1
    assert quick.get_session(session_id).error_total == 1


def test_a_callback_that_fails_does_not_keep_a_reaper_from_its_work(
    world: World, quick: Any, worker: Any, session_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    lose(world, worker, session_id)

    def fail(_: Reaped) -> None:
        raise RuntimeError("the callback's own trouble")

    with reaping(world, quick, every=600, on_reaped=fail):
        world.until(lambda: status_of(world, session_id) == "error", seconds=10)

    assert "the callback's own trouble" in caplog.text


def test_a_reaper_stops_and_starts_again(world: World, quick: Any, store: Any) -> None:
    def idle_one() -> str:
        own = str(store.create_session("claude", "idle", "/src").id)
        be_idle(world, own, 1000)
        return own

    with reaping(world, quick, every=0.02, idle_for=60) as reaper:
        first = idle_one()
        world.until(lambda: status_of(world, first) == "terminated")
        run(world, reaper.stop)
        second = idle_one()
        world.sleep(0.2)
        assert status_of(world, second) == "active"
        run(world, reaper.start)
        world.until(lambda: status_of(world, second) == "terminated")


def test_a_reaper_may_be_started_and_stopped_twice(world: World, quick: Any) -> None:
    before = threading.active_count()
    with reaping(world, quick, every=600) as reaper:
        run(world, reaper.start)
        assert threading.active_count() <= before + 1
        run(world, reaper.stop)
        run(world, reaper.stop)


def run(world: World, method: Callable[[], Any]) -> None:
    """Call a reaper's method where it must be called."""
    if world.runner is None:
        method()
        return

    async def on_the_loop() -> None:
        result = method()
        if result is not None:
            await result

    world.runner.run(on_the_loop())


def reapers() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "sessionstore-reaper"]


def test_a_reaper_is_a_daemon_thread_that_ends_with_it(real: World) -> None:
    with Reaper(real.store(), every=600):
        (thread,) = reapers()
        assert thread.daemon

    assert not thread.is_alive()


def test_a_callback_may_stop_its_reaper(real: World) -> None:
    store = real.store()
    be_idle(real, store.create_session("claude", "s", "/src").id, 1000)
    stopped = threading.Event()

    def stop(_: Reaped) -> None:
        reaper.stop()
        stopped.set()

    reaper = Reaper(store, every=600, idle_for=60, on_reaped=stop)
    reaper.start()
    assert stopped.wait(30)

    give_up = time.monotonic() + 30
    while reapers():
        assert time.monotonic() < give_up
        time.sleep(0.01)


@pytest.mark.parametrize("style", ["sync", "async"])
def test_a_reaper_goes_on_after_an_outage(
    server: PrivateServer, style: str, caplog: pytest.LogCaptureFixture
) -> None:
    world = FaultyWorld(style, server)
    try:
        session_id = world.direct.create_session("claude", "s", "/src").id
        be_idle(world, session_id, 1000)
        world.proxy.down()
        with reaping(world, world.store(deadline=0.2), every=0.05, idle_for=60):
            world.until(lambda: "a pass of the reaper failed" in caplog.text)
            assert status_of(world, session_id) == "active"
            world.proxy.up()
            world.until(lambda: status_of(world, session_id) == "terminated")
        assert {one.levelno for one in caplog.records} == {logging.WARNING}
    finally:
        world.close()


def test_what_a_reaper_does_is_logged(
    world: World, quick: Any, worker: Any, session_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sessionstore")
    lose(world, worker, session_id)

    with reaping(world, quick, every=600):
        world.until(lambda: "lost" in caplog.text)

    (line,) = [one.getMessage() for one in caplog.records if one.levelno == logging.INFO]
    assert line.startswith(f"{session_id} lost: the lease of {worker.worker} expired at ")
