"""A server at its memory limit: what grows is refused whole, everything else goes on.

Each test fills a small server of its own until it takes no more. One test then works at the limit
for hundreds of operations, the limit moving with them, so that memory runs out at any moment: a
crossing is an operation that memory stopped, or that began with more used than the limit. The
controls begin with a write that grows, or use several commands: the same checks catch them.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fakeredis
import pytest
import redis
from conftest import PROGRAMS, SERVERS, World
from consistency import assert_consistent
from faults import seeded
from programme import Attack, controls, proves
from redis.exceptions import OutOfMemoryError

from sessionstore import (
    LeaseLostError,
    ServiceSessionInUseError,
    SessionBusyError,
    SessionNotActiveError,
    SessionNotFoundError,
    SessionStatusError,
    SessionStore,
)
from sessionstore._server import PrivateServer
from sessionstore.testing import memory_store

ROOM = 3 * 1024 * 1024  # bytes, beside what the empty server takes
SESSIONS = 12  # to begin with

READ: dict[bytes, Callable[[Any, bytes], Any]] = {
    b"hash": lambda client, key: client.hgetall(key),
    b"list": lambda client, key: client.lrange(key, 0, -1),
    b"set": lambda client, key: client.smembers(key),
    b"zset": lambda client, key: client.zrange(key, 0, -1, withscores=True),
    b"stream": lambda client, key: client.xrange(key),
}


class Filled:
    """A world on a full server: its store, its sessions, and a plain client in bytes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.store = world.store()
        self.raw: Any = world.client()
        self.ids = [
            self.store.create_session("claude", f"service-{n}", "/src", f"task-{n % 3}").id
            for n in range(SESSIONS)
        ]
        for own in self.ids:
            self.store.add_output(own, "the first line")
            self.store.update_metadata(own, {"branch": "main"})
        self.raw.config_set("maxmemory", self.used() + ROOM)
        self.fill()

    def used(self) -> int:
        return int(self.raw.info("memory")["used_memory"])

    def fill(self) -> None:
        """Append until nothing fits, then lower the limit a little: buffers of clients may go."""
        for size in (50_000, 5_000):
            number = 0
            while self.refusal(self.ids[number % SESSIONS], "x" * size) is None:
                number += 1
        self.raw.config_set("maxmemory", self.used() - 50_000)

    def refusal(self, own: str, line: str) -> Exception | None:
        """The error with which an append failed; None if it was carried out."""
        try:
            self.store.add_output(own, line)
        except redis.RedisError as error:
            return error
        return None

    def contents(self) -> dict[bytes, Any]:
        """Every key of the namespace with what it holds, apart from lanes.

        Not its DUMP: the order in that of a set changes by itself.
        """
        held = {}
        for key in self.raw.scan_iter(f"{self.world.prefix}*", count=1000):
            if b":lane:" not in key:
                held[key] = READ[self.raw.type(key)](self.raw, key)
        return held


@contextmanager
def filled(style: str, name: str) -> Iterator[Filled]:
    """A server of its own that is full."""
    with PrivateServer(PROGRAMS[name]) as server:
        world = World(style, name, server.url)
        full = Filled(world)
        try:
            yield full
        finally:
            full.raw.config_set("maxmemory", 0)
            world.close()


@pytest.fixture(params=[f"{style}-{name}" for name in SERVERS for style in ("sync", "async")])
def full(request: pytest.FixtureRequest) -> Iterator[Filled]:
    """{sync, async} × each real server, full."""
    style, _, name = request.param.partition("-")
    with filled(style, name) as opened:
        yield opened


@pytest.fixture(params=SERVERS)
def full_sync(request: pytest.FixtureRequest) -> Iterator[Filled]:
    """Each real server, full."""
    with filled("sync", request.param) as opened:
        yield opened


# ---- At the limit --------------------------------------------------------------------------------

with memory_store() as _store:
    _store.add_output(_store.create_session("codex", "imported", "/src", "task").id, "line")
    EXPORT = list(_store.export_sessions())

GROWING: dict[str, Callable[[Any, str], Any]] = {
    "create_session": lambda store, _: store.create_session("codex", "new", "/src", "task", "mcp"),
    "create_session, unique": lambda store, _: store.create_session(
        "codex", "unique", "/src", unique=True
    ),
    "add_output": lambda store, own: store.add_output(own, "more"),
    "add_output, many": lambda store, own: store.add_output(own, *["more"] * 5000),
    "add_error": lambda store, own: store.add_error(own, "more"),
    "update_metadata": lambda store, own: store.update_metadata(own, {"a": "b", "branch": None}),
    "import_sessions": lambda store, _: store.import_sessions(EXPORT),
}


def test_every_operation_that_grows_is_refused_whole_and_with_one_exception(full: Filled) -> None:
    for call in GROWING.values():
        before = full.contents()
        with pytest.raises(redis.RedisError) as refused:
            call(full.store, full.ids[0])
        assert type(refused.value) is OutOfMemoryError
        assert full.contents() == before
    assert_consistent(full.world)


def test_statuses_change_at_the_limit(full: Filled) -> None:
    for own, status in zip(full.ids, ("busy", "error", "terminated", "starting"), strict=False):
        full.store.update_status(own, status, expected="active")
        assert full.store.get_session(own, tail=0).status == status
    assert full.store.get_metrics().active_sessions == SESSIONS - 4
    assert_consistent(full.world)


def test_everything_is_read_at_the_limit(full: Filled) -> None:
    store, own = full.store, full.ids[0]
    assert store.get_session(own, tail=0).id == own
    assert store.get_session(own).output_buffer[0] == "the first line"
    assert store.find_session_by_service_id("service-0", tail=0).id == own
    assert [one.id for one in store.get_all_sessions(tail=0)] == full.ids
    assert [one.id for one in store.iter_sessions(tail=1)] == full.ids
    assert [one.id for one in store.find_sessions(task_id="task-1")] == full.ids[1::3]
    assert store.read_output(own, limit=1).chunks == ("the first line",)
    assert store.get_metrics().total_sessions == SESSIONS
    assert store.ping() is True


REFUSED: dict[str, tuple[type[Exception], Callable[[Any, str], Any]]] = {
    "another status": (
        SessionStatusError,
        lambda store, own: store.update_status(own, "busy", expected="starting"),
    ),
    "in use": (
        ServiceSessionInUseError,
        lambda store, _: store.create_session("claude", "service-0", "/src", unique=True),
    ),
    "append to nothing": (SessionNotFoundError, lambda store, _: store.add_output("missing", "x")),
    "metadata of nothing": (
        SessionNotFoundError,
        lambda store, _: store.update_metadata("missing", {"a": "b"}),
    ),
    "activity of nothing": (
        SessionNotFoundError,
        lambda store, _: store.update_activity("missing"),
    ),
}


def test_refusals_are_told_at_the_limit(full: Filled) -> None:
    before = full.contents()
    for error, call in REFUSED.values():
        with pytest.raises(error):
            call(full.store, full.ids[0])
    assert full.store.delete_session("missing") is False
    assert full.contents() == before


def assert_full(full: Filled) -> None:
    assert type(full.refusal(full.ids[-1], "more")) is OutOfMemoryError


def test_a_session_is_claimed_renewed_and_released_at_the_limit(full: Filled) -> None:
    for number in range(SESSIONS):
        with full.store.claim(full.ids[number]) as lease:
            lease.renew()
            assert_full(full)
        assert full.store.get_session(full.ids[number], tail=0).status == "active"
    assert_consistent(full.world)


def test_leaving_at_the_limit_gives_back_what_an_exception_ended(full: Filled) -> None:
    """What went wrong cannot be told in the error buffer; that matters less."""

    def fail() -> None:
        with full.store.claim(full.ids[1]):
            assert_full(full)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert full.store.get_session(full.ids[1], tail=0).status == "active"
    assert_consistent(full.world)


def test_a_lease_is_ended_by_force_at_the_limit(full: Filled) -> None:
    others = full.world.store(worker="other")
    for own in full.ids[:2]:
        others.claim(own, ttl=3600)
    assert_full(full)
    full.store.update_status(full.ids[0], "active", force=True)
    assert full.store.delete_session(full.ids[1], force=True) is True
    assert_consistent(full.world)


def test_a_lost_lease_is_told_at_the_limit(full: Filled) -> None:
    lease = full.store.claim(full.ids[0], ttl=3600)
    full.world.store(worker="other").update_status(full.ids[0], "active", force=True)
    assert_full(full)
    with pytest.raises(LeaseLostError):
        lease.renew()
    assert lease.lost
    assert full.store.delete_session("agent_claude_00000000-0000-4000-8000-000000000000") is False


def test_the_dead_are_reaped_at_the_limit(full: Filled) -> None:
    store = full.world.store(reap_grace=0.5)
    dead = full.world.store(worker="dead")
    leases = [dead.claim(own, ttl=0.1) for own in full.ids[:3]]
    getattr(dead, "store", dead)._leases.end_renewal()  # as a worker that was killed
    assert_full(full)
    lost: list[str] = []
    while len(lost) < len(leases):
        lost += [one.session_id for one in store.reap() if one.action == "lost"]
        time.sleep(0.1)
    assert sorted(lost) == sorted(full.ids[:3])
    assert_full(full)
    assert {one.action for one in store.reap(idle_for=0)} == {"terminated"}
    assert store.get_metrics().active_sessions == 0
    assert_consistent(full.world)
    assert len(store.reap(ended_for=0)) == SESSIONS
    assert_consistent(full.world)


def test_a_failed_claim_is_told_at_the_limit(full: Filled) -> None:
    holder = full.world.store(worker="holder")
    holder.claim(full.ids[0], ttl=3600)
    full.store.update_status(full.ids[1], "starting")
    before = full.contents()
    for own, error in (
        (full.ids[0], SessionBusyError),
        (full.ids[1], SessionNotActiveError),
        ("missing", SessionNotFoundError),
    ):
        with pytest.raises(error):
            full.store.claim(own)
    for write in (
        lambda: full.store.add_output(full.ids[0], "x"),
        lambda: full.store.update_status(full.ids[0], "active"),
        lambda: full.store.delete_session(full.ids[0]),
    ):
        with pytest.raises(SessionBusyError):
            write()
    assert full.contents() == before


def test_deleting_at_the_limit_makes_room(full: Filled) -> None:
    assert full.store.delete_session(full.ids[0]) is True
    assert full.refusal(full.ids[1], "x" * 1000) is None
    assert_consistent(full.world)


REDIS_6_2 = (
    "Error running script (call to f_0a29afd92581511b3428205f5dede9f5683a12d2): @user_script:132: "
    "@user_script: 132: -OOM command not allowed when used memory > 'maxmemory'."
)


def test_the_words_of_redis_6_2_are_the_same_exception() -> None:
    """There, what failed inside a script is told as a plain error."""

    class Full(fakeredis.FakeRedis):
        def execute_command(self, *args: Any, **options: Any) -> Any:
            if args[0] == "EVALSHA":
                raise redis.ResponseError(REDIS_6_2)
            return super().execute_command(*args, **options)

    with pytest.raises(OutOfMemoryError, match=r"^command not allowed when used memory"):
        SessionStore(Full()).create_session("claude", "s", "/src")


# ---- Crossing it ---------------------------------------------------------------------------------


class Crossing:
    """Random operations with the limit close to what is used, now above it and now below."""

    def __init__(self, full: Filled, rng: random.Random) -> None:
        self.full, self.rng = full, rng
        self.ids = list(full.ids)
        self.done: Counter[str] = Counter()
        self.done_while_full: Counter[str] = Counter()
        self.out_of_memory: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.made = 0
        self.leases: dict[str, Any] = {}

    @property
    def crossings(self) -> int:
        return self.out_of_memory.total() + self.done_while_full.total()

    def step(self) -> None:
        full, rng = self.full, self.rng
        used, room = full.used(), rng.randint(-20_000, 20_000)
        full.raw.config_set("maxmemory", used + room)
        own = rng.choice(self.ids)
        before = self.of_session(own)
        growing = (self.append, self.append_many, self.create, self.note, self.touch)
        operations: list[Callable[[str], Any]] = [
            self.append, self.append, self.append_many, self.create, self.create,
            self.change_status, self.note, self.touch, self.delete, self.ask_in_vain,
            self.claim, self.claim, self.renew, self.release, self.reap,
        ]  # fmt: skip
        operation = rng.choice(operations)
        name = operation.__name__
        try:
            is_done = operation(own)
        except OutOfMemoryError:
            self.out_of_memory[name] += 1
            if operation not in growing:
                self.wrong.append(f"{name} was refused")
            if self.of_session(own) != before:
                self.wrong.append(f"{name} was refused and has changed {own}")
            self.look()
        else:
            if is_done is not False:
                (self.done_while_full if room < 0 else self.done)[name] += 1

    def look(self) -> None:
        """Nothing is there in part."""
        try:
            assert_consistent(self.full.world)
        except AssertionError as error:
            self.wrong.append(f"a partial change: {error!s:.500}")

    def of_session(self, own: str) -> list[Any]:
        key, client = self.full.world.session(own), self.full.raw
        return [client.hgetall(key), client.llen(f"{key}:output"), client.llen(f"{key}:errors")]

    def append(self, own: str) -> None:
        self.full.store.add_output(own, "x" * self.rng.randint(1, 20_000))

    def append_many(self, own: str) -> None:
        self.full.store.add_error(own, *["line"] * self.rng.randint(1, 500))

    def create(self, _: str) -> None:
        self.made += 1
        created = self.full.store.create_session(
            "codex", f"new-{self.made}", "/src", f"task-{self.made % 3}", metadata={"a": "b"}
        )
        self.ids.append(created.id)

    def change_status(self, own: str) -> None:
        status = self.rng.choice(("active", "busy", "error", "terminated"))
        self.full.store.update_status(own, status)

    def note(self, own: str) -> None:
        self.full.store.update_metadata(own, {"note": "x" * self.rng.randint(1, 4000)})

    def touch(self, own: str) -> None:
        self.full.store.update_activity(own)

    def delete(self, own: str) -> bool:
        if len(self.ids) <= SESSIONS // 2:
            return False
        assert self.full.store.delete_session(own) is True
        self.ids.remove(own)
        return True

    def ask_in_vain(self, own: str) -> None:
        with pytest.raises(SessionStatusError):
            self.full.store.update_status(own, "busy", expected=self.other_status(own))

    def claim(self, own: str) -> bool:
        if self.is_held(own):
            return False
        expected = ("starting", "active", "busy", "error", "terminated")
        self.leases[own] = self.full.store.claim(own, ttl=3600, expected=expected)
        return True

    def is_held(self, own: str) -> bool:
        return own in self.leases and not self.leases[own].released

    def held(self, own: str) -> str | None:
        """This session if it is held, else another that is."""
        return next((one for one in (own, *self.ids) if self.is_held(one)), None)

    def renew(self, own: str) -> bool:
        held = self.held(own)
        if held is not None:
            self.leases[held].renew()
        return held is not None

    def release(self, own: str) -> bool:
        held = self.held(own)
        if held is not None:
            self.leases[held].release(self.rng.choice(("active", "error")))
        return held is not None

    def reap(self, _: str) -> bool:
        """One of those that are idle and not held; and one of those that have ended."""
        ended_for = 0 if len(self.ids) > SESSIONS // 2 else None
        reaped = self.full.store.reap(idle_for=0, ended_for=ended_for, limit=1)
        for one in reaped:
            if one.action == "deleted":
                self.ids.remove(one.session_id)
        return bool(reaped)

    def other_status(self, own: str) -> str:
        status = self.full.store.get_session(own, tail=0).status
        return "starting" if status != "starting" else "busy"


#: What must work while memory is full, besides refusing.
MUST_WORK = {"claim", "renew", "release", "reap", "delete", "change_status", "ask_in_vain"}
MUST_BE_REFUSED = {"append", "append_many", "create", "note"}


@proves("full memory", ordinary=75, full=150)
def test_crossing_the_limit_at_any_moment_never_leaves_a_partial_change(
    full: Filled, attack: Attack
) -> None:
    crossing = Crossing(full, seeded())
    for number in range(attack.size * 20):
        seen = crossing.done_while_full.keys() | crossing.out_of_memory.keys()
        has_done = crossing.done.keys() >= {"append", "create"}
        if crossing.crossings >= attack.size and seen >= MUST_WORK | MUST_BE_REFUSED and has_done:
            break
        crossing.step()
        if number % 15 == 0:
            crossing.look()
    crossing.look()

    found = {one.id for one in full.store.iter_sessions()}
    crossing.wrong += [f"lost or left over: {one}" for one in found ^ set(crossing.ids)]
    print(*crossing.wrong[:20], sep="\n")
    # Both sides of the limit were seen, by each operation.
    assert crossing.done_while_full.keys() >= MUST_WORK
    assert crossing.out_of_memory.keys() >= MUST_BE_REFUSED
    assert crossing.done.keys() >= {"append", "create"}
    attack.tell(
        injected=crossing.crossings,
        wrong=len(crossing.wrong),
        refused_whole=crossing.out_of_memory.total(),
        **{f"{name}d_while_full": crossing.done_while_full[name] for name in ("delete", "release")},
        reaped_while_full=crossing.done_while_full["reap"],
        claimed_while_full=crossing.done_while_full["claim"],
    )


# ---- Controls ------------------------------------------------------------------------------------


def test_a_script_that_shrinks_first_runs_beyond_the_limit(full_sync: Filled) -> None:
    """So an append that began with SREM would not be stopped by full memory at all."""
    world, own = full_sync.world, full_sync.ids[0]
    before = full_sync.used()
    full_sync.raw.eval(
        "redis.call('SREM', KEYS[1], ARGV[1]) redis.call('SADD', KEYS[1], ARGV[1])"
        "for i = 1, 20 do redis.call('RPUSH', KEYS[2], ARGV[2] .. i) end",
        2,
        f"{world.prefix}sessions:status:active",
        world.session(own, ":output"),
        own,
        "x" * 50_000,
    )
    assert full_sync.used() > before + 500_000


@controls("full memory", ordinary=SESSIONS)
def test_separate_commands_leave_a_partial_change(full_sync: Filled, attack: Attack) -> None:
    world, partial = full_sync.world, 0
    active, busy = (f"{world.prefix}sessions:status:{name}" for name in ("active", "busy"))
    for own in full_sync.ids:
        full_sync.raw.srem(active, own)
        with pytest.raises(OutOfMemoryError):
            full_sync.raw.sadd(busy, own)
        partial += not any(full_sync.raw.sismember(key, own) for key in (active, busy))
    with pytest.raises(AssertionError):
        assert_consistent(world)
    attack.tell(injected=len(full_sync.ids), wrong=partial)


@controls("full memory", ordinary=SESSIONS)
def test_a_release_that_begins_with_what_grows_does_not_work(
    full_sync: Filled, attack: Attack
) -> None:
    world, refused = full_sync.world, 0
    for own in full_sync.ids:
        full_sync.store.claim(own, ttl=3600)
        try:
            full_sync.raw.eval(
                "redis.call('SADD', KEYS[1], ARGV[1]) redis.call('SREM', KEYS[2], ARGV[1])",
                2,
                f"{world.prefix}sessions:status:active",
                f"{world.prefix}sessions:status:busy",
                own,
            )
        except redis.ResponseError:
            refused += 1
    attack.tell(injected=len(full_sync.ids), wrong=refused)
