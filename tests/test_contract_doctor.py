"""The doctor finds every kind of damage, names it and mends it; a healthy store has none.

What is consistent afterwards is decided by ``consistency.py``, which knows nothing of the library.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from uuid import uuid4

import pytest
import redis
from conftest import SERVERS, World, on_one_server, opened
from consistency import assert_consistent, sessions_of
from corrupt import FAULTS, Fault, Patient
from faults import seeded
from moments import READ, abandon, be_ended, everything, expire_lease, mark

import sessionstore.doctor
from sessionstore import Drift, Problem, SchemaMismatchError, SessionStore
from sessionstore._server import PrivateServer

LONG = 3600.0  # seconds: no lease is renewed in the background
HOSTILE = ("a:b", "}{:session:", "*[?]\\", "%41%%", "naïve ☃", "sessions:status:active", "'\" ;--")

pytestmark = pytest.mark.operator


@pytest.fixture(params=SERVERS)
def ward(
    request: pytest.FixtureRequest, running: Callable[[str], PrivateServer]
) -> Iterator[World]:
    """Each real server with a blocking store: what differs lies in the server.

    (fakeredis's scans skip members when others are removed meanwhile, which Redis's do not.)
    """
    with opened(f"sync-{request.param}", running, "operator") as world:
        yield world


def wrong(problems: Any) -> list[Problem]:
    """All but the warnings."""
    return [one for one in problems if not one.warning]


def kinds(problems: Any) -> set[str]:
    return {one.kind for one in wrong(problems)}


def population(world: World) -> list[str]:
    """Sessions of every kind, in good order; their ids."""
    store = world.store(buffer_limit=5, reap_grace=1000.0, retention=1e6)
    worker, lost = world.store(worker="worker"), world.store(worker="lost", reap_grace=0.001)
    ids = []
    for number, status in enumerate(("starting", "active", "busy", "error", "terminated")):
        for service in (f"service-{number}", HOSTILE[number]):
            session = store.create_session(
                "claude", service, "/src", f"task-{number % 2}", "mcp", status=status
            )
            store.add_output(session.id, *(f"line {n} ü" for n in range(8)))
            store.add_error(session.id, "one")
            ids.append(session.id)
    for hostile in HOSTILE:
        created = store.create_session("codex", hostile, hostile, hostile, hostile)
        store.update_metadata(created.id, {"branch": hostile, "empty": ""})
        ids.append(created.id)
    for owner in (worker, lost):
        for _ in range(2):
            held = store.create_session("gemini", "service-h", "/src", "task-h")
            store.add_output(held.id, "before")
            store.add_error(held.id, "")
            owner.claim(held.id, ttl=LONG)
            ids.append(held.id)
        abandon(owner)
    expire_lease(world, ids[-1], seconds_ago=5)
    mark(world, ids[-1], seconds_ago=2)
    reaped = store.create_session("gemini", "service-r", "/src")
    lost.claim(reaped.id, ttl=LONG)
    abandon(lost)
    expire_lease(world, reaped.id)
    mark(world, reaped.id, seconds_ago=15)
    assert {one.action for one in world.store().reap()} >= {"lost"}
    be_ended(world, ids[8], 100)
    assert_consistent(world)
    return [*ids, reaped.id]


@pytest.fixture
def ids(world: World) -> list[str]:
    return population(world)


# ---- A healthy store ----------------------------------------------------------------------------


def test_a_healthy_store_of_every_kind_of_session_has_nothing_wrong(
    world: World, ids: list[str]
) -> None:
    store = world.store(reap_grace=1000.0)
    before = everything(world)

    assert wrong(store.check()) == []
    assert wrong(store.repair()) == []

    assert everything(world) == before
    assert not store.drift().found
    assert store.drift().sessions == len(ids)


def test_an_empty_namespace_has_nothing_wrong_and_is_not_laid_out(world: World) -> None:
    store = world.store()
    assert wrong(store.check()) == []
    assert wrong(store.repair()) == []
    assert everything(world) == {}


def test_another_namespace_is_not_looked_at(world: World) -> None:
    store = world.store()
    store.create_session("claude", "s", "/src")
    names = [f"{{{world.namespace}2}}:x", f"{{x{world.namespace}}}:x", f"{world.namespace}:x"]
    for name in names:
        world.redis.set(name, "x")
    assert list(wrong(store.check())) == []
    assert "unknown_key" not in {one.kind for one in store.check()}
    world.redis.unlink(*names)


# ---- Every kind of damage -----------------------------------------------------------------------


def snapshot(world: World) -> dict[bytes, tuple[Any, bool]]:
    """Every key with what it holds, in bytes, and whether it expires; lanes of writes too.

    Not DUMP: in it the order of a set changes while the server grows the set's table.
    """
    raw: Any = world.client()
    keys = sorted(raw.scan_iter(world.pattern, count=1000))

    def of_each(ask: Callable[[Any, bytes], object]) -> list[Any]:
        with raw.pipeline(transaction=False) as pipe:
            for key in keys:
                ask(pipe, key)
            return list(pipe.execute())

    types = dict(zip(keys, of_each(lambda pipe, key: pipe.type(key)), strict=True))
    held = of_each(lambda pipe, key: READ[types[key].decode()](pipe, key))
    expires = of_each(lambda pipe, key: pipe.ttl(key))
    return {key: (content, ttl >= 0) for key, content, ttl in zip(keys, held, expires, strict=True)}


def damaged(world: World, ids: list[str], fault: Fault, rng: random.Random) -> Patient:
    """Do it to a session that it can be done to."""
    rng.shuffle(ids)
    for session_id in ids:
        patient = Patient(world, session_id, rng)
        with suppress(redis.ResponseError, AssertionError):  # it has another fault
            if patient.fields and fault.needs(patient):
                fault.do(patient)
                return patient
    raise AssertionError("no session for this fault")


class Hospital:
    """A world and its sessions, one fault after another; built anew after a test that failed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.store = world.store(reap_grace=1000.0)
        self.in_order = False
        self.ids: list[str] = []

    def admit(self) -> None:
        if not self.in_order:
            self.world.remove()
            self.store = self.world.store(reap_grace=1000.0)
            self.ids = population(self.world)
        self.in_order = False


#: Each kind of damage on one server; under traffic (``test_doctor_traffic.py``) on all of them.
ADMITTED = [(name, SERVERS[number % len(SERVERS)]) for number, name in enumerate(FAULTS)]


@pytest.fixture(scope="module")
def hospital(
    request: pytest.FixtureRequest, running: Callable[[str], PrivateServer]
) -> Iterator[Hospital]:
    with opened(f"sync-{request.param}", running, "operator") as world:
        yield Hospital(world)


@pytest.mark.parametrize(("name", "hospital"), ADMITTED, indirect=["hospital"])
def test_damage_is_found_named_and_mended(hospital: Hospital, name: str) -> None:
    fault, rng = FAULTS[name], seeded()
    hospital.admit()
    ward, store, ids = hospital.world, hospital.store, hospital.ids
    patient = damaged(ward, ids, fault, rng)
    spoilt = snapshot(ward)

    found = wrong(store.check())

    assert snapshot(ward) == spoilt, "check has changed something"
    assert fault.kinds[0] in kinds(found)
    assert kinds(found) <= set(fault.kinds)
    mended = wrong(store.repair())
    assert kinds(mended) | {"drift"} == kinds(found) | {"drift"}
    assert all(one.repaired for one in mended if one.kind != "drift")
    assert wrong(store.repair()) == []
    assert wrong(store.check()) == []
    clear_quarantine(ward)
    assert_consistent(ward)
    if fault.loses:
        ids.remove(patient.id)
    assert set(sessions_of(ward)) == set(ids)
    hospital.in_order = True


def clear_quarantine(world: World) -> None:
    for key in world.redis.scan_iter(world.pattern, count=1000):
        if ":quarantine:" in key:
            assert world.redis.ttl(key) == -1
            world.redis.unlink(key)


def test_all_damage_at_once_is_mended_in_one_run(ward: World) -> None:
    ids, store, rng = population(ward), ward.store(reap_grace=1000.0), seeded()
    done = set()
    for name, fault in FAULTS.items():
        usable = [
            one
            for one in ids
            if ward.redis.type(ward.session(one)) == "hash"
            and ward.redis.hget(ward.session(one), "status") in ("active", "error", "busy")
            and ward.redis.hget(ward.session(one), "type") is not None
        ]
        # What is lost entirely must not take another fault's only witness with it.
        if fault.to_all or name.startswith(("no ", "a status that", "a creation", "active before")):
            continue
        damaged(ward, usable, fault, rng)
        done.add(name)
    assert len(done) > 35

    mended = wrong(store.repair())

    assert len(mended) > 35
    assert all(one.repaired for one in mended)
    assert wrong(store.repair()) == []
    clear_quarantine(ward)
    assert_consistent(ward)


def test_a_problem_tells_key_session_and_mending(world: World, store: Any) -> None:
    session = store.create_session("claude", "service-1", "/src")
    index = f"{world.prefix_of(session.id)}sessions:status:busy"
    world.redis.sadd(index, session.id)

    stray, drift = wrong(store.check())

    assert stray == Problem(
        kind="index_stray",
        key=index,
        session_id=session.id,
        message=f"{session.id} is in this index, and its hash says otherwise",
        mending="remove it",
    )
    assert (drift.kind, drift.mendable) == ("drift", False)
    assert "1 listed, 2 by status, 1 by type, 1 by time" in drift.message
    assert wrong(store.repair()) == [stray.model_copy(update={"repaired": True})]


def test_drift_counts_the_same_sessions_in_several_ways(world: World, store: Any) -> None:
    session = store.create_session("claude", "service-1", "/src")
    store.create_session("codex", "service-2", "/src", status="error")
    assert store.drift() == Drift(sessions=2, by_status=2, by_type=2, by_time=2)
    world.redis.srem(f"{world.prefix_of(session.id)}sessions:type:claude", session.id)
    assert store.drift() == Drift(sessions=2, by_status=2, by_type=1, by_time=2)
    assert store.drift().found


# ---- What is set aside --------------------------------------------------------------------------


def test_what_no_session_accounts_for_is_set_aside_and_kept(world: World, store: Any) -> None:
    session = store.create_session("claude", "service-1", "/src")
    store.add_output(session.id, "precious")
    key, prefix = world.session(session.id), world.prefix_of(session.id)
    aside = f"{prefix}quarantine:session:{session.id}:output"
    for content in ("precious", "again"):
        world.redis.unlink(key, f"{key}:output")
        world.redis.rpush(f"{key}:output", content)
        world.redis.expire(f"{key}:output", 1000)
        assert "buffer_orphan" in kinds(store.repair())
    assert world.redis.lrange(aside, 0, -1) == ["precious"]
    assert world.redis.lrange(f"{aside}#2", 0, -1) == ["again"]
    assert world.redis.ttl(aside) == world.redis.ttl(f"{aside}#2") == -1
    assert wrong(store.check()) == []


def test_a_session_of_the_wrong_type_is_set_aside_with_its_buffers(
    world: World, store: Any
) -> None:
    session = store.create_session("claude", "service-1", "/src")
    store.add_output(session.id, "line")
    world.redis.unlink(world.session(session.id))
    world.redis.rpush(world.session(session.id), "x")
    list(store.repair())
    prefix = f"{world.prefix_of(session.id)}quarantine:session:{session.id}"
    assert world.redis.lrange(prefix, 0, -1) == ["x"]
    assert world.redis.lrange(f"{prefix}:output", 0, -1) == ["line"]
    assert store.get_all_sessions() == []
    assert store.drift() == Drift(sessions=0, by_status=0, by_type=0, by_time=0)


# ---- What is only told --------------------------------------------------------------------------


def test_a_session_that_cannot_be_read_is_told_and_left(world: World, store: Any) -> None:
    session = store.create_session("claude", "service-1", "/src", "task")
    world.redis.hdel(world.session(session.id), "service_session_id")
    world.redis.hset(world.session(session.id), "task_id", b"\xff")
    for problems in (store.check(), store.repair(), store.repair()):
        unreadable = [one for one in wrong(problems) if one.kind == "field_unreadable"]
        assert {one.session_id for one in unreadable} == {session.id}
        assert not any(one.repaired or one.mendable for one in unreadable)
        assert len(unreadable) == 2
    # What tells a person which service session it was is left there.
    index = f"{world.prefix_of(session.id)}sessions:service:service-1"
    assert world.redis.smembers(index) == {session.id}


def test_a_key_that_is_not_the_stores_is_told_and_left(world: World, store: Any) -> None:
    session = store.create_session("claude", "service-1", "/src")
    prefix = world.prefix_of(session.id)
    names = {f"{prefix}mine", f"{prefix}session:", f"{prefix}sessions:colour:red", f"{prefix}a b:c"}
    names.add(world.meta.replace("meta", "beside"))  # with partitions, in none of them
    for name in names:
        world.redis.set(name, "x", ex=1000)
    told = {one.key: one for one in store.repair() if one.kind == "unknown_key"}
    assert set(told) == names
    assert all(one.warning and not one.repaired for one in told.values())
    assert all(world.redis.ttl(name) > 0 for name in names)


def test_a_lease_that_nobody_reaps_is_told(world: World) -> None:
    store = world.store(reap_grace=1.0)
    session = store.create_session("claude", "service-1", "/src")
    store.claim(session.id, ttl=LONG)
    abandon(store)
    expire_lease(world, session.id, seconds_ago=5)
    assert "lease_overdue" not in {one.kind for one in store.check()}
    expire_lease(world, session.id, seconds_ago=7)
    (overdue,) = [one for one in store.repair() if one.kind == "lease_overdue"]
    assert overdue.warning
    assert overdue.session_id == session.id
    assert store.get_session(session.id).status == "busy"


def test_a_buffer_over_this_stores_bound_is_only_told(world: World, store: Any) -> None:
    session = store.create_session("claude", "service-1", "/src")
    store.add_output(session.id, *"abcdef")
    strict = world.store(buffer_limit=3)
    (told,) = [one for one in strict.repair() if one.kind == "buffer_over_bound"]
    assert told.warning
    assert store.get_session(session.id).output_buffer == tuple("abcdef")


@on_one_server
@pytest.mark.parametrize("field", ["schema", "partitions"])
def test_another_layout_is_told_and_nothing_is_touched(world: World, field: str) -> None:
    store = world.store()
    session = store.create_session("claude", "service-1", "/src")
    world.redis.srem(f"{world.prefix_of(session.id)}sessions:status:active", session.id)
    world.redis.hset(world.meta, field, "256")
    before = everything(world)
    fresh = world.store()
    for problems in (store.repair(), fresh.check(), fresh.repair()):
        (told,) = wrong(problems)
        assert (told.kind, told.key, told.repaired) == ("layout", world.meta, False)
        assert f"{field} '256'" in told.message
    assert everything(world) == before
    with pytest.raises(SchemaMismatchError):
        fresh.get_metrics()


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_lost_layout_is_written_again(world: World, store: Any, spoilt: bool) -> None:
    store.create_session("claude", "service-1", "/src")
    world.redis.unlink(world.meta)
    if spoilt:
        world.redis.set(world.meta, "spoilt")
    before = everything(world)
    fresh = world.store()
    assert kinds(fresh.check()) == {"layout_missing"}
    assert everything(world) == before
    assert [(one.kind, one.repaired) for one in wrong(fresh.repair())] == [("layout_missing", True)]
    assert wrong(fresh.check()) == []
    layout = world.redis.hgetall(world.meta)
    assert (layout["schema"], layout["partitions"]) == ("1", str(world.partitions))
    clear_quarantine(world)
    assert_consistent(world)


def test_a_lost_layout_is_not_guessed_where_keys_are_of_another(server: PrivateServer) -> None:
    world = World("sync", server.program.name.lower(), server.url, 16)
    try:
        world.store().create_session("claude", "service-1", "/src")
        world.redis.unlink(world.meta)
        other = world.store(partitions=1)
        before = everything(world)
        told = wrong(other.repair())
        assert {one.kind for one in told} == {"wrong_partition", "layout_missing"}
        assert not any(one.repaired for one in told)
        assert everything(world) == before
    finally:
        world.close()


def test_a_session_in_another_partition_is_told_and_left(server: PrivateServer) -> None:
    world = World("sync", server.program.name.lower(), server.url, 16)
    try:
        store = world.store()
        session = store.create_session("claude", "service-1", "/src")
        elsewhere = next(p for p in world.prefixes if p != world.prefix_of(session.id))
        here = world.session(session.id)
        world.redis.copy(here, f"{elsewhere}session:{session.id}")
        told = [one for one in store.check() if one.kind == "wrong_partition"]
        assert {one.key for one in told} == {f"{elsewhere}session:{session.id}"}
        list(store.repair())
        assert world.redis.exists(f"{elsewhere}session:{session.id}")
        assert store.get_session(session.id).service_session_id == "service-1"
    finally:
        world.close()


def test_what_the_server_may_do_to_the_store_is_told(own_server: PrivateServer) -> None:
    with World("sync", "own", own_server.url).store(namespace=f"n{uuid4().hex[:8]}") as store:
        assert list(store.check()) == []  # it has an append-only file
        client: Any = World("sync", "own", own_server.url).redis
        client.config_set("appendonly", "no")
        (told,) = store.check()
        assert (told.kind, told.warning) == ("server", True)
        assert "append-only" in told.message
        client.config_set("maxmemory", "1gb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        told, _ = store.check()
        assert "allkeys-lru" in told.message
        assert not told.warning


def test_a_reader_who_may_not_write_can_check(own_server: PrivateServer) -> None:
    with World("sync", "own", own_server.url).store(namespace="reader") as store:
        ids = [store.create_session("claude", f"s{n}", "/src").id for n in range(3)]
    client: Any = World("sync", "own", own_server.url).redis
    client.srem("{reader}:sessions:type:claude", ids[0])
    client.acl_setuser(
        "reader", enabled=True, nopass=True, keys=["*"], categories=["+@all", "-@write"]
    )
    url = own_server.url.replace("redis://", "redis://reader:x@")
    with SessionStore.from_url(url, namespace="reader") as reader:
        assert kinds(reader.check()) == {"index_missing", "drift"}
        with pytest.raises(redis.ResponseError):
            list(reader.repair())


# ---- Much of it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["bytes", "none"])
def test_a_large_buffer_is_weighed_in_pieces(
    world: World, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(sessionstore.doctor, "WEIGHED_ENTRIES", 100)
    monkeypatch.setattr(sessionstore.doctor, "WEIGHED_BYTES", 5000)
    store = world.store(buffer_limit=800)
    session = store.create_session("claude", "service-1", "/src")
    for number in range(5):
        store.add_output(session.id, *(f"{number} {n} ü" for n in range(200)))
    if damage == "bytes":
        world.redis.hincrby(world.session(session.id), "output_bytes", 3)
    found = ["buffer_bytes"] if damage == "bytes" else []
    assert [one.kind for one in wrong(store.check())] == found
    assert [one.kind for one in wrong(store.repair())] == found
    assert wrong(store.check()) == []
    assert_consistent(world)


@pytest.mark.parametrize("keys_a_page", [50, 100_000])
def test_many_sessions_are_walked_in_pages(
    ward: World, monkeypatch: pytest.MonkeyPatch, keys_a_page: int
) -> None:
    """Large indexes too, also those that come with the last page of keys."""
    monkeypatch.setattr(sessionstore.doctor, "KEYS_A_PAGE", keys_a_page)
    monkeypatch.setattr(sessionstore.doctor, "MEMBERS_A_SCRIPT", 20)
    store = ward.store()
    ids = [store.create_session("claude", f"s{n % 3}", "/src", "task").id for n in range(400)]
    assert wrong(store.check()) == []
    ghosts = [f"{one[:-4]}ffff" for one in ids[::7]]
    for ghost in ghosts:
        ward.redis.sadd(f"{ward.prefix_of(ghost)}sessions:task:task", ghost)
    lost = ids[::11]
    for one in lost:
        ward.redis.srem(f"{ward.prefix_of(one)}sessions:type:claude", one)
    mended = wrong(store.repair())
    found = {(one.kind, one.session_id) for one in mended}
    expected = {("index_orphan", one) for one in ghosts} | {("index_missing", one) for one in lost}
    assert found == expected
    assert_consistent(ward)
    assert wrong(store.repair()) == []


def test_a_run_that_is_broken_off_can_be_begun_again(world: World, store: Any) -> None:
    sessions = [store.create_session("claude", f"s{n}", "/src") for n in range(5)]
    for session in sessions:
        world.redis.srem(f"{world.prefix_of(session.id)}sessions:type:claude", session.id)
    first = next(one for one in store.repair() if not one.warning)
    assert first.repaired
    list(store.repair())
    assert_consistent(world)


def test_a_client_that_answers_in_text_sees_the_same(ward: World) -> None:
    ids = population(ward)
    store = SessionStore(
        ward.client(decode_responses=True),
        namespace=ward.namespace,
        partitions=ward.partitions,
        reap_grace=1000.0,
    )
    assert wrong(store.check()) == []
    ward.redis.sadd(f"{ward.prefix_of(ids[0])}sessions:status:error", b"\xff\xfe", "☃")
    found = wrong(store.repair())
    assert {one.session_id for one in found} == {"\\xff\\xfe", "☃"}
    assert wrong(store.check()) == []
