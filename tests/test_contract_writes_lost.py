"""A failover has lost what the holder of a lease had been told is stored: it is told so.

Here the server is put back by hand to what a replica had that lagged behind. Real failovers are in
``test_writes_lost.py``.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from conftest import WORLDS, World
from test_contract_batch import batch_of

from sessionstore import AsyncSessionStore, LeaseLostError, WritesLostError
from sessionstore.holding import Holding


def roll_back(world: World, session_id: str, output: int = 0, errors: int = 0) -> None:
    """Take the newest entries of a session away, as if they had never been added."""
    key = world.session(session_id)
    for buffer, field, count in (("output", "output", output), ("errors", "error", errors)):
        for _ in range(count):
            entry = world.redis.rpop(f"{key}:{buffer}")
            assert entry is not None
            world.redis.hincrby(key, f"{field}_total", -1)
            world.redis.hincrby(key, f"{field}_bytes", -len(entry) - 16)


def held(store: Any) -> str:
    session_id = str(store.create_session("claude", "service", "/src").id)
    store.claim(session_id, ttl=60)
    return session_id


def lost_of(error: pytest.ExceptionInfo[WritesLostError]) -> int:
    assert error.value.code == "WRITES_LOST"
    return error.value.lost


def test_an_append_is_refused_with_how_many_entries_are_gone(world: World, store: Any) -> None:
    session_id = held(store)
    store.add_output(session_id, *"abcde")
    store.add_error(session_id, "x", "y")
    roll_back(world, session_id, output=3, errors=1)
    with pytest.raises(WritesLostError, match=r"has lost 4 entries of session 'agent_") as told:
        store.add_output(session_id, "f")
    assert lost_of(told) == 4
    assert (told.value.session_id, told.value.status) == (session_id, "busy")
    assert (told.value.output_total, told.value.error_total) == (2, 1)
    assert store.get_session(session_id).output_buffer == ("a", "b")


def test_who_was_told_goes_on_from_what_there_is(world: World, store: Any) -> None:
    session_id = held(store)
    store.add_output(session_id, *"abc")
    roll_back(world, session_id, output=1)
    with pytest.raises(WritesLostError):
        store.add_error(session_id, "f")
    assert store.add_output(session_id, "d") == 3
    roll_back(world, session_id, output=2)
    with pytest.raises(WritesLostError) as told:  # a second time
        store.add_output(session_id, "e")
    assert lost_of(told) == 2


@pytest.mark.parametrize("write", ["update_status", "delete_session"])
def test_no_other_write_under_the_lease_goes_on_in_silence(
    world: World, store: Any, write: str
) -> None:
    session_id = held(store)
    store.add_output(session_id, "a")
    roll_back(world, session_id, output=1)
    arguments = (session_id, "terminated") if write == "update_status" else (session_id,)
    before = world.redis.hgetall(world.session(session_id))
    with pytest.raises(WritesLostError) as told:
        getattr(store, write)(*arguments)
    assert lost_of(told) == 1
    assert world.redis.hgetall(world.session(session_id)) == before
    getattr(store, write)(*arguments)


def test_a_release_gives_back_and_tells(world: World, store: Any) -> None:
    session_id = str(store.create_session("claude", "service", "/src").id)
    lease = store.claim(session_id)
    store.add_output(session_id, "a", "b")
    roll_back(world, session_id, output=2)
    with pytest.raises(WritesLostError) as told:
        lease.release()
    assert lost_of(told) == 2
    assert lease.released
    assert store.get_session(session_id).status == "active"


def acknowledge_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the next write is told of a loss, an append of one entry is acknowledged."""
    has_lost = Holding.has_lost

    def told(holding: Holding, *arguments: Any) -> None:
        holding.output.add(1)
        has_lost(holding, *arguments)
        monkeypatch.undo()

    monkeypatch.setattr(Holding, "has_lost", told)


@pytest.mark.parametrize("way", ["release", "leave"])
def test_a_session_is_given_back_though_its_release_is_refused_again(
    world: World, store: Any, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    session_id = str(store.create_session("claude", "service", "/src").id)

    def work() -> None:
        with store.claim(session_id) as lease:
            store.add_output(session_id, "a", "b")
            roll_back(world, session_id, output=1)
            acknowledge_late(monkeypatch)
            if way == "release":
                lease.release()

    with pytest.raises(WritesLostError) as told:
        work()
    assert lost_of(told) == 2
    session = store.get_session(session_id)
    assert (session.status, session.owner) == ("active", None)


@pytest.mark.parametrize("total", ["junk", "", "-5", "3.5", "inf", "nan", "1e400"])
def test_a_total_that_is_no_number_leaves_the_session_to_its_worker(
    world: World, store: Any, total: str
) -> None:
    session_id = str(store.create_session("claude", "service", "/src").id)
    world.redis.hset(world.session(session_id), "output_total", total)
    with store.claim(session_id, ttl=60) as lease:
        store.add_error(session_id, "a")
        lease.renew()
        assert (lease.lost, lease.writes_lost) == (False, 0)
    assert lease.released


def test_leaving_a_lease_gives_back_and_tells(world: World, store: Any) -> None:
    session_id = str(store.create_session("claude", "service", "/src").id)

    def work() -> None:
        with store.claim(session_id):
            store.add_output(session_id, "a")
            roll_back(world, session_id, output=1)

    with pytest.raises(WritesLostError):
        work()
    session = store.get_session(session_id)
    assert (session.status, session.owner) == ("active", None)


def test_an_exception_in_a_lease_is_told_and_the_loss_is_logged(
    world: World, store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    session_id = str(store.create_session("claude", "service", "/src").id)

    def work() -> None:
        with store.claim(session_id):
            store.add_output(session_id, "a")
            roll_back(world, session_id, output=1)
            raise ZeroDivisionError("by zero")

    with pytest.raises(ZeroDivisionError):
        work()
    session = store.get_session(session_id)
    assert (session.status, session.error_buffer) == ("active", ("ZeroDivisionError: by zero",))
    assert "has lost 1 entry" in caplog.text


def test_each_append_of_a_batch_is_told(world: World, store: Any) -> None:
    session_id = held(store)
    with batch_of(world, store) as batch:
        added = batch.add_output(session_id, "a", "b")
    assert added.result() == 2
    roll_back(world, session_id, output=1)
    with batch_of(world, store) as batch:
        outcomes = [batch.add_output(session_id, one) for one in "cd"]
    assert [getattr(outcome.error, "lost", None) for outcome in outcomes] == [1, 1]
    assert store.add_output(session_id, "e") == 2


def test_a_writer_tells_once_and_loses_no_line_of_its_own(world: World, store: Any) -> None:
    session_id = held(store)
    with store.writer(session_id) as out:
        out.write("a\nb\nc\n")
        out.flush()
        roll_back(world, session_id, output=2)
        out.write("d\n")
        with pytest.raises(WritesLostError) as told:
            out.flush()
        assert lost_of(told) == 2
        out.write("e\n")
        out.flush()
    assert store.get_session(session_id).output_buffer == ("a", "d", "e")


def test_a_writer_that_is_closed_tells(world: World, store: Any) -> None:
    session_id = held(store)
    out = store.writer(session_id)
    out.write("a\n")
    out.flush()
    roll_back(world, session_id, output=1)
    out.write("b\n")
    with pytest.raises(WritesLostError):
        out.close()
    assert store.get_session(session_id).output_buffer == ("b",)


def test_an_append_that_refills_what_is_lost_hides_nothing(world: World, store: Any) -> None:
    """It was on its way, carrying what was known before, when the server was lost."""
    session_id = str(store.create_session("claude", "service", "/src").id)
    store.add_output(session_id, "of", "before")
    store.claim(session_id, ttl=60)
    with batch_of(world, store) as batch:
        late = batch.add_output(session_id, "d")
        assert store.add_output(session_id, *"abc") == 5
        roll_back(world, session_id, output=1)
    assert late.result() == 5
    with pytest.raises(WritesLostError) as told:
        store.add_output(session_id, "e")
    assert lost_of(told) == 1
    assert store.add_output(session_id, "e") == 6


@pytest.mark.parametrize("errors", [False, True])
def test_a_renewal_finds_the_loss_and_the_next_write_is_told(
    world: World, store: Any, caplog: pytest.LogCaptureFixture, errors: bool
) -> None:
    """Also if nothing is ever written again, the log has it."""
    session_id = str(store.create_session("claude", "service", "/src").id)
    lease = store.claim(session_id, ttl=60)
    (store.add_error if errors else store.add_output)(session_id, "a", "b", "c")
    assert lease.writes_lost == 0
    roll_back(world, session_id, **{"errors" if errors else "output": 2})
    for _ in range(3):
        lease.renew()
    found = f"the server has lost 2 entries of session {session_id!r} that had been acknowledged"
    assert caplog.text.count(found) == 1
    assert (lease.writes_lost, lease.lost) == (2, False)
    with pytest.raises(WritesLostError) as told:
        store.add_output(session_id, "d")
    assert lost_of(told) == 2
    store.add_output(session_id, "d")
    lease.renew()
    assert (lease.writes_lost, caplog.text.count("has lost")) == (2, 1)


def test_a_renewal_in_the_background_finds_the_loss(
    world: World, store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    session_id = str(store.create_session("claude", "service", "/src").id)
    lease = store.claim(session_id, ttl=0.3)
    store.add_output(session_id, "a")
    roll_back(world, session_id, output=1)
    world.until(lambda: lease.writes_lost == 1)
    assert "has lost 1 entry" in caplog.text


def test_a_lease_counts_each_loss_once(world: World, store: Any) -> None:
    session_id = str(store.create_session("claude", "service", "/src").id)
    lease = store.claim(session_id, ttl=60)
    store.add_output(session_id, *"abc")
    roll_back(world, session_id, output=2)
    with batch_of(world, store) as batch:
        outcomes = [batch.add_output(session_id, one) for one in "de"]
    assert [getattr(outcome.error, "lost", None) for outcome in outcomes] == [2, 2]
    assert lease.writes_lost == 2
    store.add_output(session_id, "f")
    roll_back(world, session_id, output=1)
    lease.renew()
    assert lease.writes_lost == 3


def test_what_the_server_trims_is_not_lost(world: World) -> None:
    store = world.store(buffer_limit=2)
    session_id = held(store)
    assert store.add_output(session_id, *"abcdef") == 6
    assert store.add_output(session_id, "g") == 7


def test_the_next_holder_knows_nothing_of_what_was_lost_before(world: World, store: Any) -> None:
    session_id = str(store.create_session("claude", "service", "/src").id)
    with store.claim(session_id):
        store.add_output(session_id, "a", "b")
    roll_back(world, session_id, output=1)
    with store.claim(session_id):
        assert store.add_output(session_id, "c") == 2


def test_without_a_lease_nobody_counts(world: World, store: Any) -> None:
    session_id = str(store.create_session("claude", "service", "/src").id)
    store.add_output(session_id, "a", "b")
    roll_back(world, session_id, output=1)
    assert store.add_output(session_id, "c") == 2


def test_who_lost_the_session_as_well_is_told_that(world: World, store: Any) -> None:
    """The claim itself did not reach the replica."""
    session_id = held(store)
    store.add_output(session_id, "a")
    roll_back(world, session_id, output=1)
    world.store().update_status(session_id, "active", force=True)
    with pytest.raises(LeaseLostError):
        store.add_output(session_id, "b")


def test_a_reader_beyond_the_end_is_told_how_much_is_gone(world: World, store: Any) -> None:
    session_id = held(store)
    store.add_output(session_id, *"abcde")
    roll_back(world, session_id, output=3)
    page = store.read_output(session_id, cursor=5)
    assert (page.chunks, page.cursor, page.lost) == ((), 2, 3)


@pytest.mark.parametrize("world", [one for one in WORLDS if "async" in one], indirect=True)
def test_appends_of_several_tasks_are_each_told(world: World, store: Any) -> None:
    """Those that were sent together, too."""
    session_id = held(store)
    store.add_output(session_id, *"abc")
    roll_back(world, session_id, output=1)

    async def all_at_once(inner: AsyncSessionStore) -> list[Any]:
        appends = [inner.add_output(session_id, "d") for _ in range(5)]
        return await asyncio.gather(*appends, return_exceptions=True)

    assert world.runner is not None
    results = world.runner.run(all_at_once(store.store))
    assert [getattr(one, "lost", None) for one in results] == [1] * 5
