"""Batches: each operation as alone, in order, and none before the ``with`` is left."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import FAKEREDIS, ON_ONE_SERVER, Awaiting, World, opened
from consistency import assert_consistent
from sendings import noted_sendings

import sessionstore.listing
from sessionstore import (
    AgentSession,
    InvalidArgumentError,
    LeaseLostError,
    OutcomeUnknownError,
    SessionBusyError,
    SessionNotFoundError,
    SessionStatusError,
    SessionStoreError,
    UnreadableSessionError,
)
from sessionstore._operation import feed, operation
from sessionstore._server import PrivateServer
from sessionstore.operations import SessionOperations
from sessionstore.testing import async_memory_store, memory_store

OPERATIONS = [n for n, value in vars(SessionOperations).items() if isinstance(value, operation)]
FEEDS = [n for n, value in vars(SessionOperations).items() if isinstance(value, feed)]


def batch_of(world: World, store: Any) -> Any:
    """A batch to be used in a blocking ``with``, in either style."""
    batch = store.batch()
    return batch if world.runner is None else Awaiting(batch, world.runner)


def together(world: World, store: Any, *calls: Callable[[Any], Any]) -> list[Any]:
    """The outcomes of several operations in one batch."""
    with batch_of(world, store) as batch:
        return [call(batch) for call in calls]


def created(store: Any, name: str) -> str:
    return str(store.create_session("claude", name, "/src", "task", "mcp").id)


# ---- Every operation -----------------------------------------------------------------------------

#: What differs between two sessions that were treated alike.
OWN = {"id", "service_session_id", "created_at", "last_activity", "read_at"}


def comparable(result: Any) -> Any:
    if isinstance(result, AgentSession):
        return result.model_dump(exclude=OWN)
    return [comparable(one) for one in result] if isinstance(result, list) else result


#: By operation, calls on a store or a batch; each gets a session of its own that has one line.
CALLS: dict[str, list[Callable[[Any, str], Any]]] = {
    "create_session": [
        lambda s, own: s.create_session("codex", f"new {own}", "/é", metadata={"a": "é"}),
        lambda s, own: s.create_session("claude", own, "/src", unique=True),
    ],
    "get_session": [
        lambda s, own: s.get_session(own),
        lambda s, own: s.get_session(own, tail=1),
        lambda s, own: s.get_session(own, tail=0),
        lambda s, _: s.get_session("missing"),
        lambda s, _: s.get_session("missing", tail=0),
    ],
    "find_session": [lambda s, own: s.find_session(own), lambda s, _: s.find_session("missing")],
    "find_session_by_service_id": [
        lambda s, own: s.find_session_by_service_id(f"{own} twin"),
        lambda s, own: s.find_session_by_service_id(f"{own} twin", tail=0, live=True),
        lambda s, _: s.find_session_by_service_id("missing"),
    ],
    "update_status": [
        lambda s, own: s.update_status(own, "busy", expected="active"),
        lambda s, own: s.update_status(own, "busy", expected="error"),
        lambda s, own: s.update_status(own, "terminated", force=True),
        lambda s, _: s.update_status("missing", "busy"),
    ],
    "update_activity": [
        lambda s, own: s.update_activity(own),
        lambda s, _: s.update_activity("missing"),
    ],
    "add_output": [
        lambda s, own: s.add_output(own, "é", b"\xff"),
        lambda s, _: s.add_output("missing", "x"),
    ],
    "add_error": [
        lambda s, own: s.add_error(own, "e"),
        lambda s, _: s.add_error("missing", "x"),
    ],
    "delete_session": [
        lambda s, own: s.delete_session(own),
        lambda s, own: s.delete_session(own, force=True),
        lambda s, _: s.delete_session("missing"),
    ],
    "get_all_sessions": [
        lambda s, _: s.get_all_sessions(),
        lambda s, _: s.get_all_sessions(tail=0),
    ],
    "get_sessions_by_type": [lambda s, _: s.get_sessions_by_type("claude", tail=1)],
    "get_metrics": [lambda s, _: s.get_metrics()],
    "find_sessions": [
        lambda s, _: s.find_sessions(task_id="task", tail=None),
        lambda s, _: s.find_sessions(order="-last_activity", limit=3),
        lambda s, own: s.find_sessions(service_session_id=own),
    ],
    "read_output": [
        lambda s, own: s.read_output(own),
        lambda s, own: s.read_output(own, 5),
        lambda s, _: s.read_output("missing"),
    ],
    "read_errors": [lambda s, own: s.read_errors(own, limit=1)],
    "update_metadata": [
        lambda s, own: s.update_metadata(own, {"branch": "é", "pid": None}),
        lambda s, own: s.update_metadata(own, {f"name{n}": "" for n in range(64)}),
    ],
    "reap": [lambda s, _: s.reap(), lambda s, _: s.reap(idle_for=3600, ended_for=0, limit=1)],
    "drift": [lambda s, _: s.drift()],
    "ping": [lambda s, _: s.ping()],
}


def test_every_operation_is_tried() -> None:
    assert sorted(CALLS) == sorted(OPERATIONS)


def outcome_of(call: Callable[[], Any]) -> Any:
    """A call's comparable result, or its error's class."""
    try:
        return comparable(call())
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_in_a_batch_what_it_gives_alone(
    world: World, store: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("PAGE_ROWS", "LEAST_ROWS"):  # several pages of a few sessions
        monkeypatch.setattr(sessionstore.listing, bound, 2)
    for number, call in enumerate(CALLS[name]):
        ids = [created(store, f"{number} {twin}") for twin in ("alone", "together")]
        for own in ids:
            created(store, f"{own} twin")
            store.add_output(own, "the first line")
            store.update_metadata(own, {"pid": "5"})

        reads = name in ("get_all_sessions", "get_metrics", "find_sessions", "reap", "ping")
        own = ids[0] if reads else ids[1]
        if reads:
            alone = outcome_of(lambda call=call, ids=ids: call(store, ids[0]))
        (noted,) = together(world, store, lambda batch, call=call, own=own: call(batch, own))
        if not reads:
            alone = outcome_of(lambda call=call, ids=ids: call(store, ids[0]))

        if name == "reap" and number:
            assert alone == outcome_of(noted.result) == []
        assert outcome_of(noted.result) == alone
        assert noted.operation == name
    assert_consistent(world)


def test_a_session_created_in_a_batch_is_as_it_is_stored(world: World, store: Any) -> None:
    made = together(
        world, store,
        *(lambda b, n=n: b.create_session("claude", f"s{n}", "/src", metadata={"n": str(n)})
          for n in range(20)),
    )  # fmt: skip
    for outcome in made:
        session = outcome.result()
        stored = store.get_session(session.id)
        assert stored.model_copy(update={"read_at": session.read_at}) == session
    assert_consistent(world)


def test_reaping_in_a_batch_reaches_every_partition(world: World, store: Any) -> None:
    ids = [created(store, f"service-{n}") for n in range(12)]

    reaped, line = together(
        world, store, lambda b: b.reap(idle_for=0), lambda b: b.add_output(ids[0], "x")
    )

    assert sorted(one.session_id for one in reaped.result()) == sorted(ids)
    assert line.result() == 1
    assert store.get_metrics().sessions_by_status["terminated"] == 12


# ---- Each by itself, in order --------------------------------------------------------------------


def test_what_is_refused_leaves_the_others_alone(world: World, store: Any) -> None:
    own = created(store, "service")
    outcomes = together(
        world, store,
        lambda b: b.add_output(own, "one"),
        lambda b: b.add_output("missing", "x"),
        lambda b: b.update_status(own, "busy", expected="starting"),
        lambda b: b.get_session("missing"),
        lambda b: b.add_output(own, "two"),
    )  # fmt: skip

    assert [type(one.error) for one in outcomes] == [
        type(None), SessionNotFoundError, SessionStatusError, SessionNotFoundError, type(None)
    ]  # fmt: skip
    assert (outcomes[0].result(), outcomes[4].result()) == (1, 2)
    with pytest.raises(SessionStatusError, match="is active") as refused:
        outcomes[2].result()
    assert refused.value is outcomes[2].error
    assert refused.value.session_id == own


def test_each_sees_what_stood_before_it(world: World, store: Any) -> None:
    own = created(store, "service")
    outcomes = together(
        world, store,
        lambda b: b.get_session(own),
        lambda b: b.add_output(own, "line"),
        lambda b: b.read_output(own),
        lambda b: b.get_session(own),
        lambda b: b.get_metrics(),
        lambda b: b.delete_session(own),
        lambda b: b.add_output(own, "late"),
        lambda b: b.find_session(own),
        lambda b: b.create_session("claude", "service", "/src", unique=True),
    )  # fmt: skip

    before, total, page, after, metrics, deleted, late, gone, again = outcomes
    assert before.result().output_buffer == ()
    assert total.result() == 1
    assert page.result().chunks == after.result().output_buffer == ("line",)
    assert metrics.result().total_sessions == 1
    assert deleted.result() is True
    assert isinstance(late.error, SessionNotFoundError)
    assert gone.result() is None
    assert again.result().service_session_id == "service"
    assert_consistent(world)


def test_appends_to_one_session_keep_their_order(world: World, store: Any) -> None:
    own = created(store, "service")
    outcomes = together(
        world, store, *(lambda b, n=n: b.add_output(own, str(n)) for n in range(50))
    )
    assert [one.result() for one in outcomes] == list(range(1, 51))
    assert store.get_session(own).output_buffer == tuple(map(str, range(50)))


def test_a_scripts_loss_changes_no_order(world: World, store: Any) -> None:
    """Of two scripts the server knows only the second when the batch comes."""
    for number in range(3):
        own = created(store, f"service-{number}")
        world.redis.script_flush()
        store.delete_session("missing")
        outcomes = together(
            world,
            store,
            lambda b, own=own: b.add_output(own, "line"),
            lambda b, own=own: b.delete_session(own),
        )
        assert [one.result() for one in outcomes] == [1, True]


# ---- What a batch is -----------------------------------------------------------------------------


def test_nothing_is_sent_before_the_batch_is_left(world: World, store: Any) -> None:
    own = created(store, "service")
    with batch_of(world, store) as batch:
        outcome = batch.add_output(own, "line")
        assert not outcome.is_known
        assert repr(outcome) == "<add_output in a batch: not sent yet>"
        for look in (outcome.result, lambda: outcome.error):
            with pytest.raises(SessionStoreError, match="has not been sent"):
                look()
        assert store.read_output(own).chunks == ()
    assert outcome.is_known
    assert outcome.error is None
    assert repr(outcome) == "<add_output in a batch: done>"
    assert store.read_output(own).chunks == ("line",)


def test_an_exception_within_sends_nothing(world: World, store: Any) -> None:
    own = created(store, "service")

    def fail() -> None:
        with batch_of(world, store) as batch:
            noted.append(batch.add_output(own, "line"))
            raise ZeroDivisionError

    noted: list[Any] = []
    with pytest.raises(ZeroDivisionError):
        fail()
    assert not noted[0].is_known
    assert store.read_output(own).chunks == ()


def test_a_batch_cannot_be_used_again(world: World, store: Any) -> None:
    own = created(store, "service")
    batch = batch_of(world, store)
    with batch:
        batch.add_output(own, "line")
    with pytest.raises(SessionStoreError, match="begin another"):
        batch.add_output(own, "line")
    with batch:
        pass
    assert store.read_output(own).chunks == ("line",)


def test_an_empty_batch_sends_nothing(world: World, store: Any) -> None:
    store.ping()
    with noted_sendings() as sent, batch_of(world, store):
        pass
    assert sent == []


def test_a_bad_argument_is_refused_at_the_call(world: World, store: Any) -> None:
    own = created(store, "service")
    with batch_of(world, store) as batch:
        batch.add_output(own, "line")
        for call in (
            lambda: batch.add_output(own, 5),
            lambda: batch.get_session("a\nb"),
            lambda: batch.update_status(own, "asleep"),
            lambda: batch.read_output(own, -1),
        ):
            with pytest.raises(InvalidArgumentError):
                call()
        with pytest.raises(TypeError):
            batch.create_session("claude")
    assert store.read_output(own).chunks == ("line",)


@pytest.mark.parametrize("name", FEEDS)
@pytest.mark.parametrize("opened_in_memory", [memory_store, async_memory_store])
def test_a_batch_does_not_iterate(opened_in_memory: Callable[[], Any], name: str) -> None:
    batch = opened_in_memory().batch()
    assert not hasattr(batch, name)
    with pytest.raises(AttributeError, match=f"call {name} of the store"):
        getattr(batch, name)
    assert not hasattr(batch, "claim")


def test_a_batch_shows_its_outcomes_in_order(world: World, store: Any) -> None:
    batch = store.batch()
    with batch if world.runner is None else Awaiting(batch, world.runner):
        outcomes = [batch.ping(), batch.get_metrics(), batch.ping()]
        assert len(batch) == 3
    assert list(batch) == outcomes
    assert repr(batch).endswith("of 3 operations, sent or given up>")


def test_an_error_that_nobody_looks_at_is_logged_at_once(
    world: World, store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the collector of cycles, which may come much later."""
    store.ping()
    caplog.clear()
    caplog.set_level(logging.WARNING, "sessionstore")
    gc.disable()
    try:
        with batch_of(world, store) as batch:
            batch.add_output("missing", "x")
            looked_at = batch.add_error("missing", "x")
        assert looked_at.error is not None
        del batch, looked_at
    finally:
        gc.enable()
    assert [record.getMessage() for record in caplog.records] == [
        "add_output in a batch failed, and nobody has looked at its outcome: no session 'missing'"
    ]


def test_a_closed_store_says_so_in_every_outcome(world: World) -> None:
    store = world.store()
    store.ping()
    store.close()
    outcomes = together(world, store, lambda b: b.ping(), lambda b: b.add_output("id", "x"))
    for outcome in outcomes:
        assert "closed" in str(outcome.error)
    assert outcomes[0].error is not outcomes[1].error


def test_a_record_that_cannot_be_read_spoils_its_own_outcome_only(world: World, store: Any) -> None:
    bad, good = created(store, "bad"), created(store, "good")
    world.redis.hset(f"{world.prefix_of(bad)}session:{bad}", "created_at", "yesterday")
    outcomes = together(
        world, store, lambda b: b.get_session(bad), lambda b: b.add_output(good, "line")
    )
    assert isinstance(outcomes[0].error, UnreadableSessionError)
    assert outcomes[1].result() == 1


# ---- Round trips ---------------------------------------------------------------------------------


@pytest.fixture(params=[name for name in ON_ONE_SERVER if FAKEREDIS not in name])
def real(
    request: pytest.FixtureRequest, running: Callable[[str], PrivateServer]
) -> Iterator[World]:
    """The worlds of real servers."""
    with opened(request.param, running) as world:
        yield world


def test_a_batch_is_one_round_trip(real: World) -> None:
    store = real.store()
    ids = [created(store, f"service-{n}") for n in range(10)]
    real.redis.script_flush()
    with noted_sendings() as sent:
        outcomes = together(
            real, store,
            *(lambda b, own=own: b.add_output(own, "line") for own in ids),
            *(lambda b, own=own: b.get_session(own) for own in ids),
            lambda b: b.get_metrics(),
            lambda b: b.update_metadata(ids[0], {"a": "b"}),
        )  # fmt: skip
    assert len(sent) == 1
    assert [one.error for one in outcomes] == [None] * 22


def test_more_than_a_thousand_take_a_round_trip_for_each_thousand(real: World) -> None:
    store = real.store()
    own = created(store, "service")
    with noted_sendings() as sent:
        outcomes = together(
            real, store, *(lambda b, n=n: b.add_output(own, str(n)) for n in range(2001))
        )
    assert len(sent) == 3
    assert [one.result() for one in outcomes] == list(range(1, 2002))
    assert store.get_session(own).output_buffer == tuple(map(str, range(2001)))


def test_a_long_listing_goes_on_after_the_others(
    real: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("PAGE_ROWS", "LEAST_ROWS"):
        monkeypatch.setattr(sessionstore.listing, bound, 3)
    store = real.store()
    ids = [created(store, f"service-{n}") for n in range(10 if real.partitions == 1 else 64)]
    with noted_sendings() as sent:
        listed, total = together(
            real, store, lambda b: b.get_all_sessions(), lambda b: b.add_output(ids[0], "x")
        )
    assert len(sent) > 2
    assert [one.id for one in listed.result()] == ids
    assert total.result() == 1


# ---- Leases --------------------------------------------------------------------------------------


def test_a_batch_carries_the_fence_of_a_lease(world: World, store: Any) -> None:
    own = created(store, "service")
    other = world.store(worker="other")
    with store.claim(own) as lease:
        ours = together(world, store, lambda b: b.add_output(own, "ours"))
        theirs = together(world, other, lambda b: b.add_output(own, "theirs"))
        assert ours[0].result() == 1
        assert isinstance(theirs[0].error, SessionBusyError)
        assert not lease.lost
    assert store.read_output(own).chunks == ("ours",)
    assert_consistent(world)


def test_a_lost_lease_is_told_to_its_holder(world: World, store: Any) -> None:
    own = created(store, "service")
    lease = store.claim(own)
    told: list[bool] = []
    lease.on_lost(lambda lost: told.append(lost.lost))
    world.store(worker="other").update_status(own, "active", force=True)

    (line,) = together(world, store, lambda b: b.add_output(own, "line"))

    assert isinstance(line.error, LeaseLostError)
    assert lease.lost
    assert told == [True]
    assert store.read_output(own).chunks == ()


def test_a_status_in_a_batch_gives_a_lease_back(world: World, store: Any) -> None:
    own = created(store, "service")
    with store.claim(own) as lease:
        outcomes = together(
            world, store,
            lambda b: b.add_output(own, "done"),
            lambda b: b.update_status(own, "terminated"),
        )  # fmt: skip
        assert [one.error for one in outcomes] == [None, None]
        assert lease.released
    assert store.get_session(own).status == "terminated"
    assert_consistent(world)


def test_after_a_batch_that_was_given_up_a_lost_lease_is_told_at_once(
    world: World, store: Any
) -> None:
    """A write that gives the session back is not waited for if it has never been sent."""
    own = created(store, "service")
    lease = store.claim(own, ttl=0.4)

    def fail() -> None:
        with batch_of(world, store) as batch:
            batch.update_status(own, "active")
            batch.delete_session(own)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    world.store(worker="other").update_status(own, "active", force=True)
    world.until(lambda: lease.lost, 5)


def test_an_outcomes_class_is_public() -> None:
    assert {"Outcome", "Batch", "AsyncBatch"} <= set(sessionstore.__all__)
    assert OutcomeUnknownError.code == "OUTCOME_UNKNOWN"
