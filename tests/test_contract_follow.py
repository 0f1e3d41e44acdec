"""``follow_output`` and ``follow_errors``: each entry once and in order, and an end that is told.

Written once, over both stores and every target. What needs real connections to be dropped is in
``test_follow_outages.py``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import CLUSTER, World
from waiting import until

import sessionstore.news
from sessionstore import BufferPage, SessionNotFoundError, SessionStore, SessionStoreError

MISSING = "agent_claude_00000000-0000-4000-8000-000000000000"
FOLLOWED = [("add_output", "follow_output"), ("add_error", "follow_errors")]


def create(store: Any, **settings: Any) -> str:
    return str(store.create_session("claude", "service-1", "/src", **settings).id)


def another(world: World, **settings: Any) -> SessionStore:
    """A blocking store on the same keys, for another thread."""
    settings = {"namespace": world.namespace, "partitions": world.partitions} | settings
    settings |= {"cluster": True} if world.target == CLUSTER else {}
    if world.url is None:
        return SessionStore(world.client(), **settings)
    return SessionStore.from_url(world.url, **settings)


@contextmanager
def meanwhile(act: Callable[[], object]) -> Iterator[None]:
    """Something that another thread does while this one waits; its failure fails the test."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join()
    assert not failures, failures


def entries(pages: Iterable[BufferPage]) -> list[str]:
    return [entry for page in pages for entry in page.chunks]


# ---- What wakes --------------------------------------------------------------------------------


def test_every_change_of_a_buffer_and_every_event_is_published_once(
    world: World, store: Any
) -> None:
    with world.redis.pubsub(ignore_subscribe_messages=True) as listening:
        listening.psubscribe(f"{{{world.namespace}*")
        listening.get_message(timeout=5)
        session_id = create(store)
        store.add_output(session_id, "one", "two")
        store.add_error(session_id, "error")
        store.update_status(session_id, "terminated")
        store.update_status(session_id, "error")
        store.delete_session(session_id)
        events = f"{world.prefix_of(session_id)}events"
        output, errors = (world.session(session_id, part) for part in (":output", ":errors"))
        expected = [
            (events, "created"),
            (output, "2"),
            (errors, "1"),
            (output, "ended"),
            (errors, "ended"),
            (events, "status_changed"),
            (events, "status_changed"),
            (events, "deleted"),
            (output, "deleted"),
            (errors, "deleted"),
        ]
        published: list[tuple[str, str]] = []
        give_up = time.monotonic() + 10
        while len(published) < len(expected) and time.monotonic() < give_up:
            message = listening.get_message(timeout=0.1)
            if message is not None:
                published.append((message["channel"], message["data"]))
    assert published == expected


# ---- What comes, and in which order ------------------------------------------------------------


@pytest.mark.parametrize(("add", "follow"), FOLLOWED)
@pytest.mark.usefixtures("only_news")
def test_what_is_stored_comes_first_and_then_what_is_added(
    world: World, store: Any, add: str, follow: str
) -> None:
    session_id = create(store)
    getattr(store, add)(session_id, "one", "two")
    pages = getattr(store, follow)(session_id)
    assert next(pages).chunks == ("one", "two")

    with another(world) as other:
        for number in range(5):
            with meanwhile(lambda: getattr(other, add)(session_id, f"more {number}")):  # noqa: B023
                page = next(pages)
            assert page == BufferPage(chunks=(f"more {number}",), cursor=3 + number)
    pages.close()


def test_a_follower_begins_at_the_position_it_asks_for(store: Any) -> None:
    session_id = create(store)
    store.add_output(session_id, *map(str, range(10)))
    store.update_status(session_id, "terminated")

    (page,) = store.follow_output(session_id, 7)

    assert page == BufferPage(chunks=("7", "8", "9"), cursor=10, ended=True)


@pytest.mark.usefixtures("only_news")
def test_each_of_thousands_of_entries_comes_once_and_in_order(world: World, store: Any) -> None:
    session_id = create(store)

    def write() -> None:
        with another(world) as other:
            for first in range(0, 3000, 30):
                other.add_output(session_id, *map(str, range(first, first + 30)))
            other.update_status(session_id, "terminated")

    with meanwhile(write):
        pages = list(store.follow_output(session_id))

    assert entries(pages) == list(map(str, range(3000)))
    assert [page.ended for page in pages] == [False] * (len(pages) - 1) + [True]
    assert sum(page.dropped for page in pages) == 0


@pytest.mark.usefixtures("only_news")
def test_each_entry_wakes_a_follower_that_has_read_the_one_before(world: World, store: Any) -> None:
    session_id = create(store)
    go_on = threading.Semaphore(1)

    def write() -> None:
        with another(world) as other:
            for number in range(100):
                assert go_on.acquire(timeout=20), f"entry {number - 1} woke nobody"
                other.add_output(session_id, str(number))
            other.update_status(session_id, "terminated")

    came: list[str] = []
    with meanwhile(write):
        for page in store.follow_output(session_id):
            came += page.chunks
            for _ in page.chunks:
                go_on.release()

    assert came == list(map(str, range(100)))


def sleeps_for(store: SessionStore, monkeypatch: pytest.MonkeyPatch, *, forgets: bool) -> bool:
    """Whether a follower sleeps on to whom news came between its reading and its waiting."""
    session_id = create(store)
    pages = store.follow_output(session_id)
    store.add_output(session_id, "first")
    assert next(pages).chunks == ("first",)

    def patience(news: sessionstore.news.News, listener: sessionstore.news.Listener) -> float:
        until(lambda: news._confirmed.issuperset(listener.channels))
        listener.signal.clear()
        store.add_output(session_id, "between")
        assert listener.signal.wait(20)
        if forgets:
            listener.signal.clear()
        return 0.2

    monkeypatch.setattr(sessionstore.news.News, "patience", patience)
    heard: list[bool] = []
    wait = threading.Event.wait
    monkeypatch.setattr(
        threading.Event, "wait", lambda *args: heard.append(wait(*args)) or heard[-1]
    )
    assert next(pages).chunks == ("between",)
    pages.close()
    return not heard[-1]


@pytest.mark.usefixtures("only_news")
@pytest.mark.parametrize("forgets", [False, True], ids=["as it is", "control: it forgets"])
def test_news_between_reading_and_waiting_are_not_missed(
    server: Any, monkeypatch: pytest.MonkeyPatch, forgets: bool
) -> None:
    with SessionStore.from_url(server.url, namespace="test-between") as store:
        assert sleeps_for(store, monkeypatch, forgets=forgets) == forgets
        for session in store.get_all_sessions(tail=0):
            store.delete_session(session.id)


def test_without_news_a_follower_looks_for_itself(
    world: World, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessionstore.news, "LOOKS_OFTEN", 0.05)
    monkeypatch.setattr(sessionstore.news, "LOOKS_SELDOM", 0.05)
    monkeypatch.setattr(sessionstore.news.Listener, "hear", lambda *_: None)
    session_id = create(store)
    pages = store.follow_output(session_id)
    store.add_output(session_id, "first")
    assert next(pages).chunks == ("first",)

    with another(world) as other, meanwhile(lambda: other.add_output(session_id, "second")):
        assert next(pages).chunks == ("second",)
    pages.close()


# ---- What is trimmed, and what is lost ----------------------------------------------------------


def test_what_was_trimmed_before_it_was_read_is_counted(world: World) -> None:
    store = world.store(buffer_limit=100)
    session_id = create(store)
    pages = store.follow_output(session_id)
    total = 0
    dropped, came = 0, 0
    for number in (50, 400, 10, 2500, 100):
        for first in range(0, number, 50):
            store.add_output(session_id, *["x"] * min(50, number - first))
        total += number
        while dropped + came < total:
            page = next(pages)
            dropped, came = dropped + page.dropped, came + len(page.chunks)
            assert page.cursor == dropped + came
    store.update_status(session_id, "error")
    (last,) = pages

    assert last == BufferPage(chunks=(), cursor=total, ended=True)
    assert dropped + came == total
    assert dropped > 2000


def test_a_cursor_beyond_the_end_tells_what_the_server_has_lost(store: Any) -> None:
    session_id = create(store)
    store.add_output(session_id, "one")
    pages = store.follow_output(session_id, 5)

    assert next(pages) == BufferPage(chunks=(), cursor=1, lost=4)
    store.add_output(session_id, "two")
    assert next(pages) == BufferPage(chunks=("two",), cursor=2)
    pages.close()


# ---- The end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["terminated", "error"])
@pytest.mark.usefixtures("only_news")
def test_the_end_of_the_session_wakes_and_ends_a_follower(
    world: World, store: Any, status: Any
) -> None:
    session_id = create(store)
    store.add_output(session_id, "last")
    pages = store.follow_output(session_id)
    assert next(pages) == BufferPage(chunks=("last",), cursor=1)

    with another(world) as other, meanwhile(lambda: other.update_status(session_id, status)):
        rest = list(pages)

    assert rest == [BufferPage(chunks=(), cursor=1, ended=True)]


@pytest.mark.usefixtures("only_news")
def test_a_follower_of_errors_gets_the_line_that_names_the_lost_worker(world: World) -> None:
    store = world.store(reap_grace=0.05)
    session_id = create(store)
    with another(world, worker="gone") as worker:
        worker.claim(session_id, ttl=0.1).abandon()
    pages = store.follow_errors(session_id)

    def reap() -> None:
        with another(world, reap_grace=0.05) as other:
            while not any(one.action == "lost" for one in other.reap()):
                threading.Event().wait(0.06)

    with meanwhile(reap):
        found = list(pages)

    assert "gone was lost" in entries(found)[0]
    assert found[-1].ended


@pytest.mark.usefixtures("only_news")
def test_deletion_wakes_a_follower_and_tells_what_it_has_missed(world: World, store: Any) -> None:
    session_id = create(store)
    store.add_output(session_id, "one", "two")
    pages = store.follow_output(session_id)
    assert next(pages).cursor == 2

    def delete() -> None:
        with another(world) as other, other.batch() as batch:  # nobody reads in between
            batch.add_output(session_id, "three", "four", "five")
            batch.delete_session(session_id)

    with meanwhile(delete):
        (last,) = [page for page in pages if page.ended]

    assert last.deleted
    assert last.cursor == 5
    assert last.dropped in (3, 0)  # 0 if it has read between the two after all


def test_who_comes_after_the_deletion_is_told_what_it_has_missed(store: Any) -> None:
    session_id = create(store)
    store.add_output(session_id, *map(str, range(10)))
    store.add_error(session_id, "error")
    store.delete_session(session_id)

    told = [
        list(store.follow_output(session_id, 4)),
        list(store.follow_output(session_id, 10)),
        list(store.follow_errors(session_id)),
    ]

    assert told == [
        [BufferPage(chunks=(), cursor=10, dropped=6, ended=True, deleted=True)],
        [BufferPage(chunks=(), cursor=10, ended=True, deleted=True)],
        [BufferPage(chunks=(), cursor=1, dropped=1, ended=True, deleted=True)],
    ]


def test_a_deletion_is_found_behind_hundreds_of_other_events(world: World, store: Any) -> None:
    session_id = create(store)
    store.add_output(session_id, "one")
    store.delete_session(session_id)
    with world.redis.pipeline(transaction=False) as pipe:
        for _ in range(1100):
            event: Any = {"event": "created", "session_id": MISSING, "type": "x", "actor": "y"}
            pipe.xadd(f"{world.prefix_of(session_id)}events", event)
        pipe.execute()

    (page,) = store.follow_output(session_id)

    assert (page.dropped, page.deleted) == (1, True)


def test_sessions_deleted_by_retention_and_by_reaping_are_told_too(world: World) -> None:
    store = world.store(retention=0.0)
    reaped, retired = create(store), create(store)
    for session_id in (reaped, retired):
        store.add_output(session_id, "line")
        store.update_status(session_id, "terminated")
    store.reap(limit=1)
    create(store)

    for session_id in (reaped, retired):
        (page,) = store.follow_output(session_id)
        assert (page.dropped, page.deleted) == (1, True)


def test_a_deletion_without_its_event_is_told_without_a_number(
    world: World, store: Any, caplog: pytest.LogCaptureFixture
) -> None:
    session_id = create(store)
    store.add_output(session_id, "one")
    pages = store.follow_output(session_id)
    assert next(pages).chunks == ("one",)
    store.delete_session(session_id)
    world.redis.delete(f"{world.prefix_of(session_id)}events")

    assert list(pages) == [BufferPage(chunks=(), cursor=1, ended=True, deleted=True)]
    assert "how much was not read is unknown" in caplog.text


def test_a_session_that_never_was_is_an_error(store: Any) -> None:
    pages = store.follow_output(MISSING)
    with pytest.raises(SessionNotFoundError):
        next(pages)


# ---- Many, and the store's end ------------------------------------------------------------------


def test_a_follower_that_is_not_asked_holds_up_nobody(store: Any) -> None:
    slow_id, quick_id = create(store), create(store)
    slow, quick = store.follow_output(slow_id), store.follow_output(quick_id)
    store.add_output(slow_id, "one")
    assert next(slow).chunks == ("one",)
    for number in range(50):
        store.add_output(slow_id, str(number))
        store.add_output(quick_id, str(number))
        assert next(quick).chunks == (str(number),)
    assert entries([next(slow)]) == list(map(str, range(50)))
    slow.close()
    quick.close()


def test_closing_the_store_ends_its_followers_with_an_error(world: World) -> None:
    store = world.store()
    session_id = create(store)
    store.add_output(session_id, "one")
    pages = store.follow_output(session_id)
    next(pages)
    store.close()
    with pytest.raises(SessionStoreError, match="closed"):
        next(pages)
