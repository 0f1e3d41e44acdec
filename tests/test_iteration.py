"""``iter_sessions``: lazy pages, each session exactly once, whatever happens in between."""

from __future__ import annotations

import logging
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import pytest
from conftest import ON_ONE_SERVER, SERVERS, World, on_one_server, opened
from faults import seeded
from shelf import FILTERS, Shelf, ids, stock
from waiting import until

from sessionstore import InvalidArgumentError, SessionStore, listing
from sessionstore._server import PrivateServer

T = TypeVar("T")

#: Those of the contract, and 256 partitions.
EVERYWHERE = [
    *ON_ONE_SERVER,
    "sync-fakeredis-256",
    f"sync-{SERVERS[0]}-256",
    f"async-{SERVERS[-1]}-256",
]
ONE_PARTITION = [f"sync-{SERVERS[0]}", f"async-{SERVERS[-1]}"]
ON_SERVERS = [name for name in EVERYWHERE if "fakeredis" not in name]
PAGE = 10


@pytest.fixture
def world(
    request: pytest.FixtureRequest, running: Callable[[str], PrivateServer]
) -> Iterator[World]:
    """A world by its name."""
    with opened(request.param, running) as world:
        yield world


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few sessions are many pages."""
    monkeypatch.setattr(listing, "PAGE_ROWS", PAGE)
    monkeypatch.setattr(listing, "LEAST_ROWS", 2)


def create(store: Any, count: int, **options: Any) -> list[str]:
    return [store.create_session("claude", f"service-{i}", "/src", **options).id
            for i in range(count)]  # fmt: skip


# ---- What is given -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=EVERYWHERE)
def shelf(request: pytest.FixtureRequest, running: Callable[[str], Any]) -> Iterator[Shelf]:
    """Sessions that tests only read."""
    with opened(request.param, running) as world:
        store = world.store()
        stock(world, store)
        yield Shelf(world, store)


def test_it_gives_what_get_all_sessions_gives(shelf: Shelf) -> None:
    assert ids(shelf.store.iter_sessions()) == ids(shelf.store.get_all_sessions()) == shelf.find()


@pytest.mark.usefixtures("small_pages")
def test_in_small_pages_it_gives_the_same(shelf: Shelf) -> None:
    assert ids(shelf.store.iter_sessions()) == shelf.find()


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("name", sorted(FILTERS))
def test_it_filters_as_find_sessions_does(shelf: Shelf, name: str) -> None:
    filters = {name: FILTERS[name]}
    assert ids(shelf.store.iter_sessions(**filters)) == shelf.find(**filters)


@pytest.mark.usefixtures("small_pages")
def test_its_filters_combine(shelf: Shelf) -> None:
    filters = {"type": "claude", "status": ("active", "busy"), "task_id": "task-1"}
    expected = shelf.find(**filters)
    assert expected
    assert ids(shelf.store.iter_sessions(**filters)) == expected


def test_it_gives_nothing_of_an_empty_store_or_of_a_value_that_no_session_has(
    shelf: Shelf,
) -> None:
    assert list(shelf.store.iter_sessions(owner="nobody")) == []


@pytest.mark.parametrize("world", EVERYWHERE, indirect=True)
def test_it_loads_no_buffers_unless_asked(world: World) -> None:
    store = world.store()
    (session_id,) = create(store, 1)
    store.add_output(session_id, "a", "b")
    tails = {tail: next(store.iter_sessions(tail=tail)).output_buffer for tail in (0, 1, None)}
    assert tails == {0: (), 1: ("b",), None: ("a", "b")}
    assert next(store.iter_sessions()).output_buffer == ()


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("world", ON_SERVERS, indirect=True)
def test_two_iterations_do_not_disturb_each_other(world: World) -> None:
    store = world.store()
    created = create(store, 25)
    one, other = store.iter_sessions(), store.iter_sessions()
    taken = [(next(one).id, next(other).id) for _ in created]
    assert taken == [(session_id, session_id) for session_id in created]


@pytest.mark.parametrize("world", ["sync-fakeredis", "async-fakeredis"], indirect=True)
@pytest.mark.parametrize(
    ("argument", "value"), [("status", "asleep"), ("idle_for", -1), ("type", "X"), ("tail", -1)]
)
def test_a_bad_argument_is_refused_by_the_call_itself(
    world: World, argument: str, value: Any
) -> None:
    store = world.store()
    with pytest.raises(InvalidArgumentError, match=f"^{argument}"):
        store.iter_sessions(**{argument: value})
    assert world.keys() == set()


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("world", EVERYWHERE, indirect=True)
def test_what_cannot_be_read_is_left_out_and_logged(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    store = world.store()
    created = create(store, 25)
    broken, gone = created[0], created[17]
    world.redis.hset(world.session(broken), "status", "asleep")
    world.redis.delete(world.session(gone))
    with caplog.at_level(logging.WARNING, "sessionstore"):
        given = ids(store.iter_sessions())
    assert given == [one for one in created if one not in (broken, gone)]
    logged = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert len(logged) == 2
    assert [broken in message for message in logged].count(True) == 1


# ---- Pages -------------------------------------------------------------------------------------


def scripts_run(world: World) -> int:
    """How many scripts the server has run."""
    return int(world.redis.info("commandstats")["cmdstat_evalsha"]["calls"])


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("world", ONE_PARTITION, indirect=True)
def test_a_page_is_read_when_the_one_before_has_been_given(world: World) -> None:
    store = world.store()
    create(store, 35)
    list(store.iter_sessions())
    before = scripts_run(world)
    iterator = store.iter_sessions()
    read = [scripts_run(world) - before]
    read += [scripts_run(world) - before for _ in iterator]
    pages = [1 + given // PAGE for given in range(35)]
    assert read == [0, *pages]
    assert scripts_run(world) - before == 4


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("world", ON_SERVERS, indirect=True)
def test_breaking_off_costs_no_more_pages(world: World) -> None:
    store = world.store()
    create(store, 2000 // PAGE)
    list(store.iter_sessions())
    before = scripts_run(world)
    for _ in store.iter_sessions():
        break
    assert scripts_run(world) - before == world.partitions


@pytest.mark.parametrize(
    "world", [f"sync-{SERVERS[0]}-256", f"async-{SERVERS[-1]}-16"], indirect=True
)
def test_a_filter_by_service_session_asks_one_partition(world: World) -> None:
    store = world.store()
    created = create(store, 20)
    list(store.iter_sessions())
    before = scripts_run(world)
    assert ids(store.iter_sessions(service_session_id="service-7")) == [created[7]]
    assert scripts_run(world) - before == 1


# ---- Changes meanwhile -------------------------------------------------------------------------


class Churn:
    """Threads that create, delete, touch and end sessions, while others stay.

    Those that stay keep what the iteration filters by; all else of them changes. A thread creates
    so many sessions and no more: an iteration does not end before its end stops moving away.
    """

    THREADS = 3
    CREATED = 40

    def __init__(self, world: World, created: list[str], seed: int) -> None:
        self.kept = [one for i, one in enumerate(created) if i % 4]
        self.done = Counter[str]()
        self.failures: list[BaseException] = []
        self._passing, self._stopping = created[::4], threading.Event()
        self._store = SessionStore.from_url(
            str(world.url), namespace=world.namespace, partitions=world.partitions
        )
        self._threads = [
            threading.Thread(target=self._work, args=(n, random.Random(seed + n)))
            for n in range(self.THREADS)
        ]

    def __enter__(self) -> Churn:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        self._store.close()

    def among(self, iterator: Iterable[T]) -> Iterator[T]:
        """The items, some operations of the threads between them."""
        for number, item in enumerate(iterator):
            if number % 8 == 0:
                wanted = self.done.total() + 12
                until(lambda wanted=wanted: self.failures or self.done.total() >= wanted)
            yield item

    def _work(self, number: int, rng: random.Random) -> None:
        try:
            to_create, own = list(range(self.CREATED)), self._passing[number :: self.THREADS]
            while not self._stopping.is_set():
                kind = rng.choice(["create", "delete", "end", "revive", "touch", "append", "note"])
                self._do(kind, rng, to_create, own)
        except BaseException as error:
            self.failures.append(error)

    def _do(self, kind: str, rng: random.Random, to_create: list[int], own: list[str]) -> None:
        store, kept = self._store, rng.choice(self.kept)
        if kind == "create" and to_create:
            service = f"passing-{to_create.pop()}"
            own.append(store.create_session(rng.choice(["claude", "codex"]), service, "/src").id)
        elif kind == "touch":
            store.update_activity(kept)
        elif kind == "append":
            store.add_output(kept, "line")
        elif kind == "note":
            store.update_metadata(kept, {"note": str(rng.random())})
        elif kind == "delete" and own:
            store.delete_session(own.pop(rng.randrange(len(own))))
        elif kind in ("end", "revive") and own:
            store.update_status(rng.choice(own), "terminated" if kind == "end" else "active")
        else:
            return
        self.done[kind] += 1


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("filters", [{}, {"status": "active"}, {"type": "claude"}], ids=str)
@pytest.mark.parametrize("world", ON_SERVERS, indirect=True)
def test_a_session_that_stays_is_given_exactly_once_whatever_others_do(
    world: World, filters: dict[str, Any]
) -> None:
    store = world.store()
    with Churn(world, create(store, 160), seeded().randrange(2**32)) as churn:
        given = list(churn.among(store.iter_sessions(**filters)))
    assert churn.failures == []
    assert len(churn.done) == 7
    assert min(churn.done.values()) >= 5
    assert len(set(ids(given))) == len(given)
    assert [session.id for session in given if session.id in set(churn.kept)] == churn.kept
    places = [(session.created_at, session.id) for session in given]
    assert places == sorted(places)


@pytest.mark.parametrize("world", ONE_PARTITION[:1], indirect=True)
def test_pages_that_are_counted_off_miss_sessions_that_stay(world: World) -> None:
    """The control: what is deleted moves the others into pages that have been read."""

    def counted_off() -> Iterator[str]:
        first = 0
        while page := world.redis.zrange(f"{world.prefix}sessions", first, first + PAGE - 1):
            yield from page
            first += PAGE

    with Churn(world, create(world.store(), 160), seeded().randrange(2**32)) as churn:
        given = list(churn.among(counted_off()))
    assert set(churn.kept) - set(given)


def commands_run(world: World, name: str) -> int:
    return int(world.redis.info("commandstats").get(f"cmdstat_{name}", {}).get("calls", 0))


@pytest.mark.parametrize("world", ONE_PARTITION, indirect=True)
def test_each_is_given_exactly_once_while_the_index_grows_and_shrinks_over_500(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 500 members the index is taken whole, beyond that the creation order is walked."""
    monkeypatch.setattr(listing, "PAGE_ROWS", 50)
    store = world.store()
    created = create(store, 525)
    passing, kept = created[5::10], [one for i, one in enumerate(created) if i % 10 != 5]

    def switch(status: str) -> None:
        for session_id in passing[:30]:
            store.update_status(session_id, status)

    taken_whole, walked = commands_run(world, "zinter"), commands_run(world, "zrangebyscore")
    given = []
    for number, session in enumerate(store.iter_sessions(status="active")):
        given.append(session.id)
        if number % 50 == 30:
            switch("terminated" if number % 100 == 30 else "active")
    taken_whole = commands_run(world, "zinter") - taken_whole
    walked = commands_run(world, "zrangebyscore") - walked
    assert min(taken_whole, walked) >= 3
    assert len(set(given)) == len(given)
    assert [session_id for session_id in given if session_id not in set(passing)] == kept


@pytest.mark.usefixtures("small_pages")
@on_one_server
def test_what_is_deleted_before_its_page_is_not_given(world: World) -> None:
    store = world.store()
    created = create(store, 40)
    iterator = store.iter_sessions()
    first = next(iterator).id
    for session_id in created:
        store.delete_session(session_id)
    rest = ids(iterator)
    assert first == created[0]
    assert len(rest) < len(created) - 1
    assert rest == [one for one in created if one in rest]


# ---- A server that restarts --------------------------------------------------------------------


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize(("style", "partitions"), [("sync", 1), ("async", 16)])
def test_each_is_given_exactly_once_through_restarts_of_the_server(
    own_server: PrivateServer, style: str, partitions: int
) -> None:
    world = World(style, own_server.program.name.lower(), own_server.url, partitions)
    try:
        store = world.store()
        created = create(store, 100)
        iterator = store.iter_sessions()
        given = ids(islice(iterator, 25))
        own_server.kill()
        own_server.start()
        given += ids(islice(iterator, 25))
        own_server.kill()
        later = threading.Timer(0.2, own_server.start)  # the next page is asked for before
        later.start()
        given += ids(iterator)
        later.join()
        assert given == created
    finally:
        world.close()
