"""Batches on a bad network and on bad servers: in order, nothing twice, nothing lost.

The controls resend without lanes, or send scripts without loading them first: the same checks must
see what that does.
"""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import pytest
import redis
from conftest import PROGRAMS, SERVERS, World
from consistency import assert_consistent
from faults import Fault, FaultyWorld, astray, counted, seeded, shuffled, weather
from programme import Attack, controls, proves
from redis.exceptions import OutOfMemoryError, ReadOnlyError
from test_contract_batch import batch_of, created, together
from test_exactly_once import unguarded

import sessionstore.pipelining
import sessionstore.store
from sessionstore import (
    OutcomeUnknownError,
    SessionNotFoundError,
    SessionStore,
)
from sessionstore._server import PrivateServer
from sessionstore.pipelining import Rounds
from sessionstore.scripts import load

STYLES = ("sync", "async")


@contextmanager
def faulty(style: str, server: PrivateServer, delay: float = 0.3) -> Iterator[FaultyWorld]:
    world = FaultyWorld(style, server, delay=delay)
    try:
        yield world
    finally:
        world.close()


@pytest.fixture(params=STYLES)
def world(request: pytest.FixtureRequest, server: PrivateServer) -> Iterator[FaultyWorld]:
    with faulty(request.param, server) as opened:
        yield opened


@pytest.fixture
def impatient(world: FaultyWorld, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A store that soon begins no more attempts; each attempt has its usual time."""
    monkeypatch.setattr("sessionstore.attempts.ATTEMPTS_SHARE", 0.02)
    return world.store()


def lines_of(world: World, session_id: str) -> list[str]:
    return list(world.redis.lrange(f"{world.session(session_id)}:output", 0, -1))


# ---- Scripts that get lost -----------------------------------------------------------------------

BATCHES, APPENDS = 8, 200  # in each batch, twice as many with the notes between them


@contextmanager
def flushing(world: World, every: float = 0.003) -> Iterator[None]:
    """SCRIPT FLUSH again and again, from another connection."""
    stopping = threading.Event()
    flushes = 0

    def flush() -> None:
        nonlocal flushes
        client = world.client()
        while not stopping.wait(every):
            client.script_flush()
            flushes += 1

    thread = threading.Thread(target=flush)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
    assert flushes >= 10, "there was hardly any storm"


@contextmanager
def working(world: World) -> Iterator[None]:
    """Another worker's calls, which bring the scripts back."""
    stopping = threading.Event()

    def work() -> None:
        with SessionStore(world.client(), namespace=world.namespace) as store:
            own = created(store, "the other worker's")
            while not stopping.is_set():
                store.add_output(own, "line")

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def totals_in_a_storm(world: World) -> list[int]:
    """Appends in batches while scripts get lost; what each was answered."""
    store = world.store()
    own = created(store, "service")
    totals = []
    with flushing(world), working(world):
        for number in range(BATCHES):
            with batch_of(world, store) as batch:
                outcomes = []
                for line in range(APPENDS):
                    outcomes.append(batch.add_output(own, f"{number * APPENDS + line}"))
                    batch.update_metadata(own, {"last": f"{number * APPENDS + line}"})
            totals += [one.result() for one in outcomes]
    assert sorted(map(int, lines_of(world, own))) == list(range(BATCHES * APPENDS))
    return totals


def test_order_holds_while_scripts_get_lost_all_the_time(world: FaultyWorld) -> None:
    world.url = _direct_url(world)
    assert totals_in_a_storm(world) == list(range(1, BATCHES * APPENDS + 1))


def _direct_url(world: FaultyWorld) -> str:
    options = world.raw.connection_pool.connection_kwargs
    return f"redis://{options['host']}:{options['port']}/0"


def test_without_variants_another_worker_brings_a_script_back_too_early(
    server: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: batches that send the scripts that everybody sends."""
    monkeypatch.setattr(sessionstore.pipelining, "variant", lambda script, _: script)
    with faulty("sync", server) as world:
        world.url = _direct_url(world)
        in_order = list(range(1, BATCHES * APPENDS + 1))
        assert any(totals_in_a_storm(world) != in_order for _ in range(6))


def second_script_only(world: World, store: Any) -> list[Any]:
    """An append and a deletion in one batch, when the server knows only the deletion's script."""
    own = created(store, "service")
    world.redis.script_flush()
    for number in range(sessionstore.pipelining.VARIANTS):
        script = sessionstore.pipelining.variant(load("delete_session"), number)
        world.redis.script_load(script.text)
    world.redis.script_load(load("delete_session").text)
    return together(
        world, store, lambda b: b.add_output(own, "line"), lambda b: b.delete_session(own)
    )


def test_a_script_that_is_known_overtakes_none_that_is_not(world: FaultyWorld) -> None:
    appended, deleted = second_script_only(world, world.store())
    assert (appended.result(), deleted.result()) == (1, True)


def test_without_loading_first_a_known_script_overtakes(
    world: FaultyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    monkeypatch.setattr(sessionstore.store, "Rounds", lambda commands, **_: Rounds(commands))
    appended, _ = second_script_only(world, world.store())
    assert isinstance(appended.error, SessionNotFoundError)


@pytest.mark.parametrize("style", STYLES)
def test_a_user_who_may_not_load_scripts_has_batches_in_order(
    own_server: PrivateServer, style: str
) -> None:
    world = World(style, own_server.program.name.lower(), own_server.url)
    world.redis.execute_command(
        "ACL", "SETUSER", "worker", "on", ">secret", "~*", "&*", "+@all", "-script"
    )
    world.url = own_server.url.replace("redis://", "redis://worker:secret@")
    store = world.store()
    for outcomes in (second_script_only(world, store), second_script_only(world, store)):
        assert [one.result() for one in outcomes] == [1, True]
    world.url = own_server.url
    world.close()


# ---- Replies and requests that get lost ----------------------------------------------------------

IN_A_BATCH = 40


def batches_in_bad_weather(world: FaultyWorld, attack: Attack) -> None:
    """Batches of appends until every fault has struck; tell what came of it."""
    rng = seeded()
    world.proxy.plan(shuffled(rng, weather(rng, attack.size, waits=0.0), 40 * attack.size))
    store = world.store(buffer_limit=0, buffer_bytes=0)
    own = world.direct.create_session("claude", "service", "/src").id
    totals: list[int] = []
    late = 0
    while world.proxy.injected.total() < attack.size:
        first = len(totals)
        outcomes = together(
            world, store,
            *(lambda b, n=n: b.add_output(own, str(n)) for n in range(first, first + IN_A_BATCH)),
        )  # fmt: skip
        totals += [one.result() for one in outcomes]
        for harmed in world.proxy.harmed[-3:]:  # and once more, as late as that
            world.proxy.deliver(harmed.request)
            late += 1
    assert len(totals) >= 3 * IN_A_BATCH
    wrong = sum(total != number + 1 for number, total in enumerate(totals))
    wrong += astray(lines_of(world, own), [str(n) for n in range(len(totals))])
    assert_consistent(world)
    attack.tell(
        injected=world.proxy.injected.total(),
        wrong=wrong,
        answers=len(totals),
        late_duplicates=late,
        **counted(world.proxy.injected),
    )


@proves("bad network", ordinary=16, full=500)
def test_batches_at_random_faults_happen_once_and_in_order(
    world: FaultyWorld, attack: Attack
) -> None:
    batches_in_bad_weather(world, attack)


@controls("bad network", ordinary=16, full=100)
def test_without_the_guard_batches_at_random_faults_happen_twice(
    server: PrivateServer, attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    monkeypatch.setattr(sessionstore.pipelining, "load", unguarded)
    with faulty("sync", server) as world:
        batches_in_bad_weather(world, attack)


@pytest.mark.parametrize("fault", [Fault.DELAY_REPLY, Fault.NEVER_REPLY], ids=lambda f: f.name)
def test_a_reply_that_does_not_come_in_time_in_mid_batch(world: FaultyWorld, fault: Fault) -> None:
    store = world.store(deadline=2)  # half a second for each reply
    own = world.direct.create_session("claude", "service", "/src").id
    world.proxy.delay = 0.8
    world.proxy.plan([*[None] * 20, fault])
    outcomes = together(
        world, store, *(lambda b, n=n: b.add_output(own, str(n)) for n in range(40))
    )
    assert world.proxy.injected == {fault: 1}
    assert [one.result() for one in outcomes] == list(range(1, 41))
    assert lines_of(world, own) == [str(n) for n in range(40)]


def test_a_create_whose_reply_is_lost_creates_one(world: FaultyWorld) -> None:
    world.proxy.plan([None, Fault.LOSE_REPLY])
    outcomes = together(
        world, world.store(),
        *(lambda b, n=n: b.create_session("claude", f"s{n}", "/src", unique=True)
          for n in range(3)),
    )  # fmt: skip
    assert [one.result().id for one in outcomes] == [
        one.id for one in world.direct.get_all_sessions()
    ]


# ---- Outcomes that stay unknown ------------------------------------------------------------------


def test_each_write_of_unknown_outcome_can_be_repeated_by_itself(
    world: FaultyWorld, impatient: Any
) -> None:
    own = world.direct.create_session("claude", "service", "/src").id
    impatient.ping()
    world.proxy.plan([None, None, *repeat(Fault.LOSE_REPLY, 1000)])
    outcomes = together(
        world, impatient,
        lambda b: b.add_output(own, "one"),
        lambda b: b.get_session(own),
        lambda b: b.add_output(own, "two"),
        lambda b: b.update_status(own, "busy", expected="starting"),
        lambda b: b.read_output(own),
    )  # fmt: skip
    world.proxy.plan(())
    errors = [one.error for one in outcomes]
    writes = [errors[0], errors[2], errors[3]]
    assert [type(error) for error in writes] == [OutcomeUnknownError] * 3
    assert [type(errors[n]) for n in (1, 4)] == [redis.ConnectionError] * 2
    assert len(set(map(id, errors))) == 5
    assert all("in a batch" in str(error) for error in writes)

    assert impatient.repeat(writes[0]) == 1
    assert impatient.repeat(writes[1]) == 2
    with pytest.raises(sessionstore.SessionStatusError):
        impatient.repeat(writes[2])
    assert lines_of(world, own) == ["one", "two"]
    together(world, impatient, *(lambda b: b.add_output(own, "x") for _ in range(5)))
    assert len(lines_of(world, own)) == 7


def test_a_server_that_is_away_is_told_within_the_deadline_and_nothing_later_is_sent(
    world: FaultyWorld,
) -> None:
    store = world.store(deadline=1)
    own = world.direct.create_session("claude", "service", "/src").id
    store.ping()

    def be_away() -> None:
        world.proxy.down()
        time.sleep(0.9)  # beyond the last attempt
        world.proxy.up()

    away = threading.Thread(target=be_away)
    world.proxy.plan([Fault.LOSE_REPLY])
    world.proxy.on_fault = away.start
    began = time.monotonic()
    outcomes = together(
        world, store,
        lambda b: b.get_metrics(),
        *(lambda b, n=n: b.add_output(own, str(n)) for n in range(2500)),
    )  # fmt: skip
    assert time.monotonic() - began < 1.5 + 1.0  # and the time to write down 2,500
    away.join()
    kinds = [type(one.error) for one in outcomes]
    assert kinds[0] is redis.ConnectionError
    assert set(kinds[1:1000]) == {OutcomeUnknownError}
    # Surely not sent: no repeat is needed, and none could be overtaken by them.
    assert set(kinds[1000:]) == {redis.ConnectionError}
    for number in range(100):
        assert store.repeat(outcomes[1 + number].error) == number + 1
    assert lines_of(world, own) == [str(n) for n in range(100)]


def test_a_mute_server_is_told_within_the_deadline(own_server: PrivateServer) -> None:
    with faulty("sync", own_server) as world:
        store = world.store(deadline=1)
        own = created(store, "service")
        own_server.signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            (outcome,) = together(world, store, lambda b: b.add_output(own, "x"))
            assert time.monotonic() - began < 1.5
        finally:
            own_server.signal(signal.SIGCONT)
        assert isinstance(outcome.error, OutcomeUnknownError)
        assert store.repeat(outcome.error) == 1


@pytest.mark.parametrize("style", STYLES)
def test_a_write_that_may_have_run_is_not_told_by_a_later_refusal(
    own_server: PrivateServer, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply is lost, and then the server is somebody's replica: it may have run before."""
    monkeypatch.setattr("sessionstore.attempts.ATTEMPTS_SHARE", 0.03)
    with faulty(style, own_server) as world:
        store = world.store()
        own = world.direct.create_session("claude", "service", "/src").id
        store.ping()
        world.proxy.plan([Fault.LOSE_REPLY])
        world.proxy.on_fault = lambda: world.raw.replicaof("127.0.0.1", "1")
        outcomes = together(
            world, store, lambda b: b.add_output(own, "line"), lambda b: b.read_output(own)
        )
        world.proxy.on_fault = None
        world.raw.replicaof("NO", "ONE")
        assert isinstance(outcomes[0].error, OutcomeUnknownError)
        assert outcomes[1].result().chunks == ("line",)
        assert store.repeat(outcomes[0].error) == 1

        world.raw.replicaof("127.0.0.1", "1")
        (refused,) = together(world, store, lambda b: b.add_output(own, "x"))
        world.raw.replicaof("NO", "ONE")
        assert type(refused.error) is ReadOnlyError
        assert lines_of(world, own) == ["line"]


@pytest.mark.parametrize("style", STYLES)
def test_a_round_that_cannot_connect_leaves_known_answers_known(
    server: PrivateServer, style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The append is carried out, the deletion is not known; then nothing can be reached."""
    monkeypatch.setattr("sessionstore.attempts.ATTEMPTS_SHARE", 0.0)
    monkeypatch.setattr(sessionstore.store, "Rounds", lambda commands, **_: Rounds(commands))
    with faulty(style, server) as world:
        store = world.store()
        own = created(store, "service")
        store.add_output(own, "its script is known")
        world.redis.script_flush()
        world.redis.script_load(load("add_output").text)
        take = Rounds.take

        def taken(rounds: Rounds, replies: Any) -> None:
            take(rounds, replies)
            if world.proxy.port:
                world.proxy.down()

        monkeypatch.setattr(Rounds, "take", taken)
        appended, deleted = together(
            world, store, lambda b: b.add_output(own, "line"), lambda b: b.delete_session(own)
        )
        monkeypatch.setattr(Rounds, "take", take)
        world.proxy.up()
        assert appended.result() == 2
        assert isinstance(deleted.error, (redis.ConnectionError, OutcomeUnknownError))
        assert lines_of(world, own) == ["its script is known", "line"]


# ---- Full memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"{style}-{name}" for name in SERVERS for style in STYLES])
def test_at_full_memory_what_grows_is_refused_and_the_rest_is_carried_out(name: str) -> None:
    style, _, program = name.partition("-")
    with PrivateServer(PROGRAMS[program]) as server:
        world = World(style, program, server.url)
        store = world.store()
        ids = [created(store, f"service-{n}") for n in range(3)]
        store.add_output(ids[0], "line")
        together(world, store, lambda b: b.ping(), lambda b: b.get_metrics())
        world.redis.config_set("maxmemory", 1)
        outcomes = together(
            world, store,
            lambda b: b.add_output(ids[0], "x"),
            lambda b: b.update_status(ids[0], "busy"),
            lambda b: b.create_session("claude", "new", "/src"),
            lambda b: b.get_session(ids[0]),
            lambda b: b.get_session("missing"),
            lambda b: b.find_session("missing"),
            lambda b: b.delete_session(ids[1]),
            lambda b: b.add_output("missing", "x"),
            lambda b: b.get_metrics(),
        )  # fmt: skip
        world.redis.config_set("maxmemory", 0)
        errors = [type(one.error) for one in outcomes]
        assert errors == [
            OutOfMemoryError, type(None), OutOfMemoryError, type(None), SessionNotFoundError,
            type(None), type(None), SessionNotFoundError, type(None),
        ]  # fmt: skip
        whole = outcomes[3].result()
        assert (whole.status, whole.output_buffer) == ("busy", ("line",))
        assert outcomes[5].result() is None
        assert outcomes[6].result() is True
        assert outcomes[8].result().total_sessions == 2
        assert_consistent(world)
        world.close()


# ---- Interrupted ---------------------------------------------------------------------------------


def lanes_free(store: Any) -> list[str]:
    """The names of the lanes that no write uses."""
    return [lane.name for lane in getattr(store, "store", store)._lanes._free]


def interrupt_sync(world: FaultyWorld, store: Any, note: Callable[[Any], Any]) -> None:
    """Ctrl-C when the commands have been carried out, and nobody has heard of it yet."""

    def press(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rounds, "take", press)
        with pytest.raises(KeyboardInterrupt):
            together(world, store, note)


def interrupt_async(world: FaultyWorld, store: Any, note: Callable[[Any], Any]) -> None:
    """The task is cancelled when the fifth command waits for its reply."""

    async def cancelled() -> None:
        async def send() -> None:
            async with store.store.batch() as batch:
                note(batch)

        task = asyncio.create_task(send())
        while not world.proxy.harmed:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    world.proxy.plan([None] * 4 + [Fault.NEVER_REPLY])
    assert world.runner is not None
    world.runner.run(cancelled())
    world.proxy.plan(())


def test_an_interrupted_batch_leaves_lanes_right(world: FaultyWorld) -> None:
    store = world.store()
    own = created(store, "service")
    outcomes: list[Any] = []

    def note(batch: Any) -> None:
        outcomes.extend(batch.add_output(own, f"interrupted {n}") for n in range(10))

    interrupt = interrupt_sync if world.style == "sync" else interrupt_async
    interrupt(world, store, note)

    assert not any(one.is_known for one in outcomes)
    free = lanes_free(store)
    assert len(free) == len(set(free)) == 10
    before = lines_of(world, own)
    assert len(before) == len(set(before))
    again = together(world, store, *(lambda b, n=n: b.add_output(own, str(n)) for n in range(20)))
    assert [one.result() for one in again] == list(range(len(before) + 1, len(before) + 21))
    assert lines_of(world, own) == before + [str(n) for n in range(20)]
    for harmed in world.proxy.harmed:
        world.proxy.deliver(harmed.request)
    assert len(lines_of(world, own)) == len(before) + 20
    assert_consistent(world)
