"""A write happens exactly once, and its caller gets the answer of that one run.

Each test breaks the network at a planned moment with ``faults.py``, on every real server, through
the blocking store and the asyncio store. The controls run the same faults against scripts without
the guard of ``include/once.lua``, and against bare RPUSH, and must see the damage.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from hashlib import sha1
from itertools import repeat
from types import SimpleNamespace
from typing import Any

import pytest
import redis
import redis.asyncio
from consistency import assert_consistent
from faults import (
    AFTER_THE_COMMAND,
    Fault,
    FaultProxy,
    FaultyWorld,
    astray,
    counted,
    seeded,
    shuffled,
    weather,
)
from programme import Attack, controls, proves
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from waiting import until

import sessionstore.lanes
import sessionstore.pipelining
from sessionstore import (
    AgentSession,
    InvalidArgumentError,
    LeaseLostError,
    MetadataLimitError,
    OutcomeUnknownError,
    ServiceSessionInUseError,
    SessionBusyError,
    SessionNotActiveError,
    SessionNotFoundError,
    SessionStatusError,
    SessionStoreError,
)
from sessionstore._server import PrivateServer
from sessionstore.scripts import Script, load

STYLES = ("sync", "async")


@pytest.fixture(params=STYLES)
def style(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def world(style: str, server: PrivateServer) -> Iterator[FaultyWorld]:
    opened = FaultyWorld(style, server, delay=0.3)
    try:
        yield opened
    finally:
        opened.close()


# ---- One lost reply, every mutator, every answer ------------------------------------------


def hide(world: FaultyWorld, session_id: str) -> None:
    """Make the session's hash disappear."""
    world.redis.rename(f"{world.prefix}session:{session_id}", f"{world.prefix}aside")


def put_back(world: FaultyWorld, session_id: str) -> None:
    """Make a hidden hash appear again."""
    world.redis.rename(f"{world.prefix}aside", f"{world.prefix}session:{session_id}")


def copy_aside(world: FaultyWorld, session_id: str) -> None:
    world.redis.copy(f"{world.prefix}session:{session_id}", f"{world.prefix}aside")


def fill_metadata(world: FaultyWorld, session_id: str) -> None:
    world.direct.update_metadata(session_id, {f"name{i}": "x" for i in range(64)})


def delete_created(world: FaultyWorld, _: str) -> None:
    created = world.direct.find_session_by_service_id("new")
    if created is not None:
        world.direct.delete_session(created.id)


LONG = 3600.0  # seconds: no lease is renewed in the background during a test


class Workers:
    """What the cases about leases do besides their one write."""

    def __init__(self) -> None:
        self._leases: dict[str, Any] = {}

    def claim(self, world: FaultyWorld, store: Any, session_id: str) -> None:
        """Through the store under test; and keep the hash as it is then."""
        self._leases[session_id] = store.claim(session_id, ttl=LONG)
        copy_aside(world, session_id)

    def claim_and_lose(self, world: FaultyWorld, store: Any, session_id: str) -> None:
        self.claim(world, store, session_id)
        world.direct.update_status(session_id, "active", force=True)

    def renew(self, _: Any, session_id: str) -> Any:
        return self._leases[session_id].renew()

    def release(self, _: Any, session_id: str) -> Any:
        return self._leases[session_id].release()


WORKERS = Workers()


def claim_by_another(world: FaultyWorld, session_id: str) -> None:
    world.direct.claim(session_id, ttl=LONG)
    world.direct._leases.end_renewal()


def free(world: FaultyWorld, session_id: str) -> None:
    world.direct.update_status(session_id, "active", force=True)


def expire(world: FaultyWorld, session_id: str) -> None:
    """Another worker's lease has expired, and was marked 15 seconds ago."""
    claim_by_another(world, session_id)
    mark = int((time.time() - 15) * 1000)
    fields = {"lease_expires_at": "1970-01-01T00:00:01.000000Z", "reap_seen_ms": mark}
    world.redis.hset(world.session(session_id), mapping=fields)
    world.redis.zadd(f"{world.prefix}leases", {session_id: 1_000})
    copy_aside(world, session_id)


def unmark(world: FaultyWorld, session_id: str) -> None:
    world.redis.hdel(world.session(session_id), "reap_seen_ms")


def expire_unmarked(world: FaultyWorld, session_id: str) -> None:
    expire(world, session_id)
    unmark(world, session_id)


def come_to_life(world: FaultyWorld, session_id: str) -> None:
    put_back(world, session_id)
    world.redis.zadd(f"{world.prefix}leases", {session_id: 1_000})


def be_idle(world: FaultyWorld, session_id: str) -> None:
    world.redis.zadd(f"{world.prefix}activity", {session_id: 1_000_000})


def be_ended(world: FaultyWorld, session_id: str) -> None:
    world.direct.update_status(session_id, "terminated")
    world.redis.zadd(f"{world.prefix}ended", {session_id: 1_000_000})
    copy_aside(world, session_id)


def be_ended_again(world: FaultyWorld, session_id: str) -> None:
    put_back(world, session_id)
    world.redis.zadd(f"{world.prefix}ended", {session_id: 1_000_000})


def reap(store: Any, **arguments: Any) -> list[str]:
    return [one.action for one in store.reap(**arguments)]


@dataclass(frozen=True)
class Case:
    """One write with one outcome.

    ``begin`` is what the same store has done before, on a good network. ``meddle`` changes the
    world after the first run so that a second run would do something: the write must still be
    answered as the first run was, and must do nothing more.
    """

    name: str
    act: Callable[[Any, str], Any]
    expected: Any  # the answer, or the class of answer or error
    meddle: Callable[[FaultyWorld, str], Any]
    prepare: Callable[[FaultyWorld, str], Any] = lambda *_: None
    begin: Callable[[FaultyWorld, Any, str], Any] | None = None

    def opened(self, world: FaultyWorld, session_id: str) -> Any:
        """A store that has done what comes before."""
        self.prepare(world, session_id)
        store = world.store()
        store.ping()
        if self.begin is not None:
            self.begin(world, store, session_id)
        return store


MISSING = {"expected": SessionNotFoundError, "prepare": hide, "meddle": put_back}

CASES = (
    Case(
        "create_session",
        lambda store, _: store.create_session("claude", "new", "/src", "task", metadata={"a": "b"}),
        AgentSession,
        delete_created,
    ),
    Case(
        "create_session-in-use",
        lambda store, _: store.create_session("claude", "service", "/src", unique=True),
        ServiceSessionInUseError,
        lambda world, session_id: world.direct.delete_session(session_id),
    ),
    Case(
        "update_status",
        lambda store, session_id: store.update_status(session_id, "busy", expected="active"),
        None,
        lambda world, session_id: world.direct.update_status(session_id, "active"),
    ),
    Case(
        "update_status-unexpected",
        lambda store, session_id: store.update_status(session_id, "busy", expected="starting"),
        SessionStatusError,
        lambda world, session_id: world.direct.update_status(session_id, "starting"),
    ),
    Case(
        "update_status-missing",
        lambda store, session_id: store.update_status(session_id, "busy"),
        **MISSING,
    ),
    Case(
        "update_activity",
        lambda store, session_id: store.update_activity(session_id),
        None,
        lambda *_: None,  # a second run would set a later time
    ),
    Case(
        "update_activity-missing",
        lambda store, session_id: store.update_activity(session_id),
        **MISSING,
    ),
    Case(
        "add_output",
        lambda store, session_id: store.add_output(session_id, "first", "second"),
        2,
        lambda world, session_id: world.direct.add_output(session_id, "somebody else's"),
    ),
    Case(
        "add_output-missing",
        lambda store, session_id: store.add_output(session_id, "line"),
        **MISSING,
    ),
    Case(
        "add_error",
        lambda store, session_id: store.add_error(session_id, "line"),
        1,
        lambda world, session_id: world.direct.add_error(session_id, "somebody else's"),
    ),
    Case(
        "add_error-missing",
        lambda store, session_id: store.add_error(session_id, "line"),
        **MISSING,
    ),
    Case(
        "update_metadata",
        lambda store, session_id: store.update_metadata(session_id, {"branch": "ours"}),
        None,
        lambda world, session_id: world.direct.update_metadata(session_id, {"branch": "theirs"}),
    ),
    Case(
        "update_metadata-limit",
        lambda store, session_id: store.update_metadata(session_id, {"one-more": "x"}),
        MetadataLimitError,
        lambda world, session_id: world.direct.update_metadata(session_id, {"name1": None}),
        fill_metadata,
    ),
    Case(
        "update_metadata-missing",
        lambda store, session_id: store.update_metadata(session_id, {"a": "b"}),
        **MISSING,
    ),
    Case(
        "delete_session",
        lambda store, session_id: store.delete_session(session_id),
        True,
        put_back,
        copy_aside,
    ),
    Case(
        "delete_session-missing",
        lambda store, session_id: store.delete_session(session_id),
        False,
        put_back,
        hide,
    ),
    Case(
        "claim",
        lambda store, session_id: store.claim(session_id, ttl=LONG).session_id == session_id,
        True,
        free,
    ),
    Case(
        "claim-busy",
        lambda store, session_id: store.claim(session_id, ttl=LONG),
        SessionBusyError,
        free,
        claim_by_another,
    ),
    Case(
        "claim-not-active",
        lambda store, session_id: store.claim(session_id, ttl=LONG),
        SessionNotActiveError,
        free,
        lambda world, session_id: world.direct.update_status(session_id, "starting"),
    ),
    Case("claim-missing", lambda store, session_id: store.claim(session_id, ttl=LONG), **MISSING),
    Case(
        "renew",
        WORKERS.renew,
        None,
        lambda *_: None,  # a second run would set a later time
        begin=WORKERS.claim,
    ),
    Case("renew-lost", WORKERS.renew, LeaseLostError, put_back, begin=WORKERS.claim_and_lose),
    Case("release", WORKERS.release, None, put_back, begin=WORKERS.claim),
    Case("release-lost", WORKERS.release, LeaseLostError, put_back, begin=WORKERS.claim_and_lose),
    Case(
        "add_output-held",
        lambda store, session_id: store.add_output(session_id, "line"),
        1,
        lambda *_: None,
        begin=WORKERS.claim,
    ),
    Case(
        "add_output-lost",
        lambda store, session_id: store.add_output(session_id, "line"),
        LeaseLostError,
        put_back,
        begin=WORKERS.claim_and_lose,
    ),
    Case(
        "add_output-busy",
        lambda store, session_id: store.add_output(session_id, "line"),
        SessionBusyError,
        free,
        claim_by_another,
    ),
    Case(
        "update_status-busy",
        lambda store, session_id: store.update_status(session_id, "terminated"),
        SessionBusyError,
        free,
        claim_by_another,
    ),
    Case(
        "update_status-force",
        lambda store, session_id: store.update_status(session_id, "active", force=True),
        None,
        claim_by_another,
        claim_by_another,
    ),
    Case(
        "delete_session-busy",
        lambda store, session_id: store.delete_session(session_id),
        SessionBusyError,
        free,
        claim_by_another,
    ),
    Case("reap-marked", lambda store, _: reap(store), ["marked"], unmark, expire_unmarked),
    Case("reap-lost", lambda store, _: reap(store), ["lost"], come_to_life, expire),
    Case(
        "reap-idle",
        lambda store, _: reap(store, idle_for=1000),
        ["terminated"],
        lambda world, session_id: (free(world, session_id), be_idle(world, session_id)),
        be_idle,
    ),
    Case(
        "reap-ended",
        lambda store, _: reap(store, ended_for=1000),
        ["deleted"],
        be_ended_again,
        be_ended,
    ),
)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def outcome_of(call: Callable[[], Any]) -> Any:
    """What a call returns or raises."""
    try:
        return call()
    except Exception as error:
        return error


def is_as_expected(outcome: Any, expected: Any) -> bool:
    if isinstance(expected, type):
        return type(outcome) is expected
    return type(outcome) is type(expected) and outcome == expected


@dataclass(frozen=True)
class Observed:
    """What a write with a lost reply did: its outcome, and what was stored at which moment."""

    outcome: Any
    before: dict[bytes, bytes]
    after_first_run: dict[bytes, bytes]
    meddled: dict[bytes, bytes]
    after: dict[bytes, bytes]


def lose_the_reply(world: FaultyWorld, case: Case) -> Observed:
    """Carry out the case's write; its first reply gets lost, and the world moves on meanwhile."""
    session_id = world.direct.create_session("claude", "service", "/src").id
    store = case.opened(world, session_id)
    seen: list[dict[bytes, bytes]] = [world.contents()]

    def meanwhile() -> None:
        seen.append(world.contents())
        case.meddle(world, session_id)
        seen.append(world.contents())

    world.proxy.on_fault = meanwhile
    world.proxy.plan([Fault.LOSE_REPLY])
    outcome = outcome_of(lambda: case.act(store, session_id))
    assert world.proxy.injected == {Fault.LOSE_REPLY: 1}
    return Observed(outcome, *seen, world.contents())


@every_case
def test_a_write_whose_reply_is_lost_is_applied_once_and_answered_as_it_ran(
    world: FaultyWorld, case: Case
) -> None:
    observed = lose_the_reply(world, case)

    assert is_as_expected(observed.outcome, case.expected), repr(observed.outcome)
    refused = isinstance(observed.outcome, Exception) or observed.outcome is False
    assert (observed.after_first_run == observed.before) is refused
    assert observed.after == observed.meddled


@every_case
def test_without_the_guard_a_lost_reply_is_noticed_in_every_case(
    server: PrivateServer, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessionstore.pipelining, "load", unguarded)
    world = FaultyWorld("sync", server)
    try:
        observed = lose_the_reply(world, case)
    finally:
        world.close()

    assert observed.after != observed.meddled


def unguarded(name: str) -> Script:
    """A script that does not look at what its lane remembers."""
    text = load(name).text
    for guard in ("last_sequence == sequence", "tonumber(last_sequence) > tonumber(sequence)"):
        text = text.replace(guard, "false")
    return Script(text, sha1(text.encode()).hexdigest())


def test_a_session_created_despite_a_lost_reply_is_returned_as_it_is_stored(
    world: FaultyWorld,
) -> None:
    world.proxy.plan([Fault.LOSE_REPLY])

    created = world.store().create_session("claude", "service", "/src", metadata={"a": "b"})

    stored = world.direct.get_session(created.id)
    assert created == stored.model_copy(update={"read_at": created.read_at})


def test_a_lease_claimed_despite_a_lost_reply_has_the_fence_that_is_stored(
    world: FaultyWorld,
) -> None:
    session_id = world.direct.create_session("claude", "service", "/src").id
    world.proxy.plan([Fault.LOSE_REPLY])

    lease = world.store().claim(session_id)

    assert world.redis.hget(world.session(session_id), "fence") == str(lease.fence)
    lease.release()


def test_a_refusal_keeps_its_details_through_a_lost_reply(world: FaultyWorld) -> None:
    holder = world.direct.create_session("claude", "service", "/src", status="starting")
    world.proxy.plan([Fault.LOSE_REPLY])

    with pytest.raises(ServiceSessionInUseError) as caught:
        world.store().create_session("claude", "service", "/src", unique=True)

    assert (caught.value.session_id, caught.value.status) == (holder.id, "starting")


# ---- Late duplicates ----------------------------------------------------------------------


def deliver_late(world: FaultyWorld, case: Case) -> tuple[list[bytes], list[bool]]:
    """Hold back the first sending of a write, and deliver it after its retry has run.

    Once when the retry was the lane's last write, and once when the lane has seen a later one.

    Returns:
        The server's two answers, and for each whether it changed anything.
    """
    session_id = world.direct.create_session("claude", "service", "/src").id
    store = case.opened(world, session_id)
    world.proxy.plan([Fault.LOSE_REQUEST])
    assert is_as_expected(outcome_of(lambda: case.act(store, session_id)), case.expected)
    (harmed,) = world.proxy.harmed
    own_lane = re.findall(rb"lane:[\w-]+", harmed.request)[0].decode()
    answers, changes = [], []

    def deliver() -> None:
        before = world.contents()
        answers.append(world.proxy.deliver(harmed.request))
        changes.append(world.contents() != before)

    case.meddle(world, session_id)
    deliver()
    store.create_session("claude", "the lane's next write", "/src")
    (last_write,) = [held for key, held in world.lanes().items() if key.endswith(own_lane)]
    assert last_write.startswith("2 ok " if case.begin is None else "3 ok ")
    deliver()
    return answers, changes


@every_case
def test_a_late_duplicate_changes_nothing(world: FaultyWorld, case: Case) -> None:
    answers, changes = deliver_late(world, case)

    assert changes == [False, False]
    assert b"LATE_DUPLICATE" not in answers[0]
    assert b"LATE_DUPLICATE" in answers[1]


@every_case
def test_without_the_guard_a_late_duplicate_is_noticed_in_every_case(
    server: PrivateServer, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessionstore.pipelining, "load", unguarded)
    world = FaultyWorld("sync", server)
    try:
        _, changes = deliver_late(world, case)
    finally:
        world.close()

    assert changes[0]


# ---- Appends at random faults -------------------------------------------------------------


def patient_client(world: FaultyWorld) -> Any:
    """A store on a client with hidden retries, as many and as patient as any plan needs."""
    retry = (Retry if world.style == "sync" else AsyncRetry)(ConstantBackoff(0.001), 50)
    return world.store_on_client(socket_timeout=0.15, retry=retry)


def append_in_bad_weather(
    world: FaultyWorld, store: Any, attack: Attack, *, waits: float = 0.0
) -> None:
    """Append while faults strike and old copies keep arriving; tell what came of it."""
    rng = seeded()
    session_id = world.direct.create_session("claude", "service", "/src").id
    lines = [f"line {number}" for number in range(5 * attack.size)]
    world.proxy.plan(shuffled(rng, weather(rng, attack.size, waits=waits), len(lines)))
    wrong = late = 0
    for number, line in enumerate(lines):
        wrong += store.add_output(session_id, line) != number + 1
        if world.proxy.harmed and rng.random() < 0.1:
            world.proxy.deliver(rng.choice(world.proxy.harmed).request)
            late += 1
    assert late >= attack.size // 10
    wrong += astray(world.redis.lrange(f"{world.session(session_id)}:output", 0, -1), lines)
    attack.tell(
        injected=world.proxy.injected.total(),
        wrong=wrong,
        answers=len(lines),
        late_duplicates=late,
        **counted(world.proxy.injected),
    )


@proves("bad network", ordinary=20, full=500)
def test_appends_at_random_faults_are_stored_once_and_in_order(
    world: FaultyWorld, attack: Attack
) -> None:
    append_in_bad_weather(world, world.store(), attack)


@proves("bad network", ordinary=20, full=400)
def test_a_client_with_hidden_retries_stores_each_append_once(
    world: FaultyWorld, attack: Attack
) -> None:
    """The client's own retries, also past timeouts."""
    append_in_bad_weather(world, patient_client(world), attack, waits=0.1)


@controls("bad network", ordinary=20, full=100)
def test_without_the_guard_appends_at_random_faults_go_wrong(
    server: PrivateServer, attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessionstore.pipelining, "load", unguarded)
    with closing(FaultyWorld("sync", server)) as world:
        append_in_bad_weather(world, world.store(), attack)


# ---- Claims at random faults --------------------------------------------------------------


def take_turns_in_bad_weather(
    world: FaultyWorld, store: Any, attack: Attack, *, waits: float = 0.0
) -> None:
    """Claim, renew, append and release while faults strike and old copies keep arriving."""
    rng = seeded()
    session_id = world.direct.create_session("claude", "service", "/src").id
    turns = attack.size * 5 // 4  # each of four writes
    world.proxy.plan(shuffled(rng, weather(rng, attack.size, waits=waits), 4 * turns))
    wrong = late = 0
    fences = []
    for number in range(turns):
        with store.claim(session_id, ttl=LONG) as lease:
            lease.renew()
            wrong += store.add_output(session_id, f"line {number}") != number + 1
            fences.append(lease.fence)
        for harmed in world.proxy.harmed[-2:]:
            if rng.random() < 0.5:
                world.proxy.deliver(harmed.request)
                late += 1
    assert late >= attack.size // 10
    lines = [f"line {number}" for number in range(turns)]
    wrong += astray(world.redis.lrange(f"{world.session(session_id)}:output", 0, -1), lines)
    wrong += fences != sorted(set(fences))
    events = [event["event"] for event in world.events()]
    wrong += events != ["created", *["claimed", "released"] * turns]
    assert_consistent(world)
    attack.tell(
        injected=world.proxy.injected.total(),
        wrong=wrong,
        answers=4 * turns,
        late_duplicates=late,
        **counted(world.proxy.injected),
    )


@proves("bad network", ordinary=20, full=500)
def test_claims_at_random_faults_happen_once_and_in_order(
    world: FaultyWorld, attack: Attack
) -> None:
    take_turns_in_bad_weather(world, world.store(), attack)


@proves("bad network", ordinary=20, full=400)
def test_claims_through_a_client_with_hidden_retries_happen_once(
    world: FaultyWorld, attack: Attack
) -> None:
    take_turns_in_bad_weather(world, patient_client(world), attack, waits=0.1)


def test_without_the_guard_claims_at_random_faults_go_wrong(
    server: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Soon a lease is lost that nobody has taken: no use in going on."""
    monkeypatch.setattr(sessionstore.pipelining, "load", unguarded)
    attack = Attack("bad network", "", is_control=False, size=48, in_full=False)
    with (
        closing(FaultyWorld("sync", server)) as world,
        pytest.raises((SessionStoreError, AssertionError)),
    ):
        take_turns_in_bad_weather(world, world.store(), attack)


def test_the_default_client_of_redis_py_stores_an_append_once(world: FaultyWorld) -> None:
    store = world.store_on_client()
    session_id = store.create_session("claude", "service", "/src").id
    world.proxy.plan([Fault.LOSE_REPLY] * 3)

    assert store.add_output(session_id, "line") == 1

    assert world.proxy.injected == {Fault.LOSE_REPLY: 3}
    assert world.direct.get_session(session_id).output_buffer == ("line",)


@controls("bad network", ordinary=20, full=100)
def test_bare_rpush_with_retries_duplicates_at_each_lost_reply(
    style: str, server: PrivateServer, attack: Attack
) -> None:
    world = FaultyWorld(style, server)
    try:
        lines = list(map(str, range(5 * attack.size)))
        world.proxy.matches = lambda command: command[0] == b"RPUSH"
        world.proxy.plan(shuffled(seeded(), [Fault.LOSE_REPLY] * attack.size, len(lines)))
        key = f"{world.prefix}naive"
        retry = (Retry if style == "sync" else AsyncRetry)(ConstantBackoff(0.001), 50)
        client = world.store_on_client(retry=retry)._client
        for line in lines:
            pushed = client.rpush(key, line)
            if world.runner is not None:
                world.runner.run(pushed)
        stored = world.redis.lrange(key, 0, -1)
        assert world.proxy.injected == {Fault.LOSE_REPLY: attack.size}
        assert len(stored) == len(lines) + attack.size
        attack.tell(
            injected=attack.size,
            wrong=astray(stored, lines),
            answers=len(lines),
            **counted(world.proxy.injected),
        )
    finally:
        world.close()


# ---- When the outcome stays unknown -------------------------------------------------------


def unknown_append(world: FaultyWorld, store: Any, session_id: str) -> OutcomeUnknownError:
    """An append that the server carries out and nobody hears of."""
    world.proxy.plan(repeat(Fault.LOSE_REPLY))
    with pytest.raises(OutcomeUnknownError) as caught:
        store.add_output(session_id, "uncertain")
    world.proxy.plan(())
    assert world.proxy.injected[Fault.LOSE_REPLY] >= 2
    return caught.value


@pytest.fixture
def impatient(world: FaultyWorld, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A store that soon begins no more attempts; each attempt has its usual time."""
    monkeypatch.setattr("sessionstore.attempts.ATTEMPTS_SHARE", 0.02)
    return world.store()


@pytest.fixture
def session_id(world: FaultyWorld) -> str:
    return world.direct.create_session("claude", "service", "/src").id


def test_an_unknown_outcome_is_a_redis_error_with_a_code(
    world: FaultyWorld, impatient: Any, session_id: str
) -> None:
    error = unknown_append(world, impatient, session_id)

    assert isinstance(error, redis.RedisError)
    assert error.code == "OUTCOME_UNKNOWN"


def test_repeating_a_write_that_ran_gives_its_answer_and_changes_nothing(
    world: FaultyWorld, impatient: Any, session_id: str
) -> None:
    error = unknown_append(world, impatient, session_id)
    world.direct.add_output(session_id, "somebody else's")

    assert impatient.repeat(error) == 1

    assert world.direct.get_session(session_id).output_buffer == ("uncertain", "somebody else's")


def test_repeating_a_write_that_never_ran_carries_it_out(
    world: FaultyWorld, impatient: Any, session_id: str
) -> None:
    world.proxy.plan(repeat(Fault.CUT_REQUEST))
    with pytest.raises(OutcomeUnknownError) as caught:
        impatient.add_output(session_id, "uncertain")
    world.proxy.plan(())
    world.direct.add_output(session_id, "somebody else's")

    assert impatient.repeat(caught.value) == 2

    assert world.direct.get_session(session_id).output_buffer == ("somebody else's", "uncertain")


def test_repeating_gives_a_refusal_too(world: FaultyWorld, impatient: Any, session_id: str) -> None:
    world.proxy.plan(repeat(Fault.LOSE_REPLY))
    with pytest.raises(OutcomeUnknownError) as caught:
        impatient.update_status(session_id, "busy", expected="starting")
    world.proxy.plan(())
    world.direct.update_status(session_id, "starting")

    with pytest.raises(SessionStatusError, match="is active"):
        impatient.repeat(caught.value)

    assert world.direct.get_session(session_id).status == "starting"


def test_other_writes_leave_the_lane_of_an_unknown_outcome_alone(
    world: FaultyWorld, impatient: Any, session_id: str
) -> None:
    error = unknown_append(world, impatient, session_id)
    (lane,) = [key for key, held in world.lanes().items() if held.endswith(" ok 1")]
    held = world.redis.get(lane)

    for number in range(5):
        impatient.add_output(session_id, f"line {number}")

    assert world.redis.get(lane) == held
    assert impatient.repeat(error) == 1


def test_a_write_cannot_be_repeated_twice(
    world: FaultyWorld, impatient: Any, session_id: str
) -> None:
    error = unknown_append(world, impatient, session_id)
    impatient.repeat(error)

    with pytest.raises(InvalidArgumentError, match="repeated already"):
        impatient.repeat(error)


def test_a_write_cannot_be_repeated_through_another_store(
    world: FaultyWorld, impatient: Any, session_id: str
) -> None:
    error = unknown_append(world, impatient, session_id)

    with pytest.raises(InvalidArgumentError, match="not of this store"):
        world.store().repeat(error)

    assert impatient.repeat(error) == 1


class Clock:
    """The time of the store's process, as far ahead as a test likes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = 0.0
        shifted = SimpleNamespace(monotonic=lambda: time.monotonic() + self.ahead)
        monkeypatch.setattr(sessionstore.lanes, "time", shifted)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_write_can_be_repeated_until_nine_minutes_have_passed(
    world: FaultyWorld, impatient: Any, session_id: str, clock: Clock
) -> None:
    error = unknown_append(world, impatient, session_id)
    clock.ahead = 530

    assert impatient.repeat(error) == 1


def test_a_write_cannot_be_repeated_after_nine_minutes(
    world: FaultyWorld, impatient: Any, session_id: str, clock: Clock
) -> None:
    error = unknown_append(world, impatient, session_id)
    clock.ahead = 541

    with pytest.raises(InvalidArgumentError, match="nine minutes"):
        impatient.repeat(error)


def test_a_repeat_in_vain_does_not_prolong_the_nine_minutes(
    world: FaultyWorld, impatient: Any, session_id: str, clock: Clock
) -> None:
    """The repeat may not have reached the server, and so have prolonged nothing there."""
    error = unknown_append(world, impatient, session_id)
    clock.ahead = 500
    world.proxy.plan(repeat(Fault.CUT_REQUEST))
    with pytest.raises(OutcomeUnknownError) as caught:
        impatient.repeat(error)
    world.proxy.plan(())
    clock.ahead = 541

    with pytest.raises(InvalidArgumentError, match="nine minutes"):
        impatient.repeat(caught.value)


def test_a_repeat_in_vain_can_be_repeated(
    world: FaultyWorld, impatient: Any, session_id: str
) -> None:
    error = unknown_append(world, impatient, session_id)
    world.proxy.plan(repeat(Fault.LOSE_REPLY))
    with pytest.raises(OutcomeUnknownError) as caught:
        impatient.repeat(error)
    world.proxy.plan(())

    assert impatient.repeat(caught.value) == 1

    assert world.direct.get_session(session_id).output_buffer == ("uncertain",)


def test_a_cancelled_repeat_can_be_repeated(server: PrivateServer) -> None:
    world = FaultyWorld("async", server)
    session_id = world.direct.create_session("claude", "service", "/src").id
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sessionstore.attempts.ATTEMPTS_SHARE", 0.02)
        store = world.store()
        error = unknown_append(world, store, session_id)

        async def cancelled_repeat() -> None:
            repeating = asyncio.create_task(store.store.repeat(error))
            await asyncio.sleep(0.05)
            repeating.cancel()
            with pytest.raises(asyncio.CancelledError):
                await repeating

        world.proxy.plan(repeat(Fault.NEVER_REPLY))
        assert world.runner is not None
        world.runner.run(cancelled_repeat())
        world.proxy.plan(())

    assert store.repeat(error) == 1
    assert world.direct.get_session(session_id).output_buffer == ("uncertain",)
    world.close()


def test_a_repeat_that_cannot_connect_leaves_the_outcome_unknown(
    world: FaultyWorld, impatient: Any, session_id: str
) -> None:
    """Only this repeat has surely not run; the write itself may have."""
    error = unknown_append(world, impatient, session_id)
    world.proxy.down()
    with pytest.raises(OutcomeUnknownError) as caught:
        impatient.repeat(error)
    world.proxy.up()

    assert impatient.repeat(caught.value) == 1

    assert world.direct.get_session(session_id).output_buffer == ("uncertain",)


def test_a_server_that_refuses_the_second_attempt_leaves_the_first_unknown(
    style: str, own_server: PrivateServer
) -> None:
    """Too few replicas fail a repeat that finds its stored answer: the first run stands."""
    world = FaultyWorld(style, own_server)
    try:
        session_id = world.direct.create_session("claude", "service", "/src").id
        store = world.store()
        store.update_activity(session_id)
        world.proxy.on_fault = lambda: world.redis.config_set("min-replicas-to-write", 1)
        world.proxy.plan([Fault.LOSE_REPLY])
        with pytest.raises(OutcomeUnknownError) as caught:
            store.add_output(session_id, "line")
        world.redis.config_set("min-replicas-to-write", 0)

        assert store.repeat(caught.value) == 1
        assert world.direct.get_session(session_id).output_buffer == ("line",)
    finally:
        world.redis.config_set("min-replicas-to-write", 0)
        world.close()


def test_every_fault_after_the_command_has_let_it_run(
    server: PrivateServer,
) -> None:
    """The proxy keeps its word: these faults strike after the server's answer."""
    for fault in Fault:
        with FaultProxy(
            server.port, matches=lambda command: command[0] == b"INCRBY", delay=0.05
        ) as proxy:
            key = f"faults-{proxy.port}"
            direct = redis.Redis(port=server.port)
            client = redis.Redis(
                port=proxy.port, socket_timeout=0.02, retry=Retry(ConstantBackoff(0), 0)
            )
            proxy.plan([fault])
            with pytest.raises((redis.ConnectionError, redis.TimeoutError)):
                client.incr(key)
            until(lambda: proxy.injected)  # this client is not patient
            assert proxy.injected == {fault: 1}
            assert int(direct.delete(key)) == (fault in AFTER_THE_COMMAND)
            client.close()
            direct.close()
