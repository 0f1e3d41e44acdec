"""Following on real servers: connections, outages, other clients, forks.

What is the same on every target is in ``test_contract_follow.py``.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from uuid import uuid4

import pytest
import redis
import redis.asyncio
from conftest import Awaiting
from test_contract_follow import create, entries, meanwhile
from waiting import until

import sessionstore.news
from sessionstore import AsyncSessionStore, SessionStore
from sessionstore._server import PrivateServer

FOLLOWERS = 500


@pytest.fixture
def namespace(server: PrivateServer) -> Iterator[str]:
    """A namespace of its own on the shared server."""
    name = f"test-{uuid4().hex[:12]}"
    yield name
    with redis.Redis.from_url(server.url) as client:
        for key in client.scan_iter(f"{{{name}}}:*", count=1000):
            client.unlink(key)


def named(server: PrivateServer, name: str) -> str:
    """The server's URL, for connections of this name."""
    return f"{server.url}?client_name={name}"


def connections(client: Any, name: str) -> list[dict[str, str]]:
    """The connections that were opened under a name."""
    return [one for one in client.client_list() if one["name"] == name]


# ---- Five hundred at once -----------------------------------------------------------------------


def test_five_hundred_threads_that_follow_use_three_connections(
    server: PrivateServer, namespace: str
) -> None:
    came = [0] * FOLLOWERS
    most = 0
    with (
        redis.Redis.from_url(server.url, decode_responses=True) as admin,
        SessionStore.from_url(server.url, namespace=namespace) as writer,
        SessionStore.from_url(
            f"{server.url}?client_name={namespace}", namespace=namespace
        ) as store,
    ):
        ids = [create(writer) for _ in range(FOLLOWERS)]

        def follow(number: int) -> None:
            for page in store.follow_output(ids[number]):
                came[number] += len(page.chunks)

        threads = [threading.Thread(target=follow, args=(n,)) for n in range(FOLLOWERS)]
        for thread in threads:
            thread.start()
        for number, session_id in enumerate(ids):
            writer.add_output(session_id, "one", "two")
            if number % 25 == 0:
                most = max(most, len(connections(admin, namespace)))
        for session_id in ids:
            writer.update_status(session_id, "terminated")
        for thread in threads:
            thread.join()

    assert came == [2] * FOLLOWERS
    assert 2 <= most <= 3


@pytest.mark.parametrize("coalesce", [True, False])
def test_five_hundred_tasks_that_follow_use_three_connections(
    server: PrivateServer, namespace: str, coalesce: bool
) -> None:
    came = [0] * FOLLOWERS

    async def follow_all(ids: list[str], admin: Any, writer: SessionStore) -> int:
        url = f"{server.url}?client_name={namespace}"
        most = 0
        async with AsyncSessionStore.from_url(url, namespace=namespace, coalesce=coalesce) as store:

            async def follow(number: int) -> None:
                async for page in store.follow_output(ids[number]):
                    came[number] += len(page.chunks)

            tasks = [asyncio.create_task(follow(number)) for number in range(FOLLOWERS)]
            for act in (
                lambda session_id: writer.add_output(session_id, "one", "two"),
                lambda session_id: writer.update_status(session_id, "terminated"),
            ):
                for first in range(0, FOLLOWERS, 20):
                    await asyncio.sleep(0.005)
                    for session_id in ids[first : first + 20]:
                        act(session_id)
                    most = max(most, len(connections(admin, namespace)))
            await asyncio.gather(*tasks)
        return most

    with (
        redis.Redis.from_url(server.url, decode_responses=True) as admin,
        SessionStore.from_url(server.url, namespace=namespace) as writer,
    ):
        ids = [create(writer) for _ in range(FOLLOWERS)]
        most = asyncio.run(follow_all(ids, admin, writer))

    assert came == [2] * FOLLOWERS
    assert 2 <= most <= 3


# ---- Idle ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["sync", "async"])
@pytest.mark.parametrize("may_subscribe", [True, False])
def test_an_idle_follower_costs_at_most_a_command_a_second(
    own_server: PrivateServer, style: str, may_subscribe: bool
) -> None:
    """Without news it looks for itself every second, with news every five."""
    admin = redis.Redis.from_url(own_server.url)
    # resetchannels: no channel, neither to subscribe to nor to publish on.
    channels = "allchannels" if may_subscribe else "resetchannels"
    admin.execute_command("ACL", "SETUSER", "idle", "on", "nopass", "~*", "+@all", channels)
    url = own_server.url.replace("redis://", "redis://idle:any@")
    with _store(style, url) as store:
        session_id = create(store)
        store.add_output(session_id, "one")
        pages = store.follow_output(session_id)
        assert next(pages).chunks == ("one",)
        with meanwhile(lambda: next(pages, None)):
            time.sleep(0.5)
            before, began = _scripts_run(admin), time.monotonic()
            time.sleep(2.5)
            taken, seconds = _scripts_run(admin) - before, time.monotonic() - began
            admin.execute_command("ACL", "SETUSER", "idle", "allchannels")
            with SessionStore.from_url(own_server.url) as other:
                other.update_status(session_id, "terminated")
    admin.close()
    assert taken <= seconds + 1
    assert taken <= (1 if may_subscribe else 4)


@contextmanager
def _store(style: str, url: str, **settings: Any) -> Iterator[Any]:
    """A store of a style, its methods blocking in either case."""
    if style == "sync":
        with SessionStore.from_url(url, **settings) as store:
            yield store
        return
    with (
        asyncio.Runner() as runner,
        Awaiting(AsyncSessionStore.from_url(url, **settings), runner) as store,
    ):
        yield store


def _scripts_run(client: Any) -> int:
    """How many scripts and publications the server has carried out."""
    stats = client.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("evalsha", "eval"))


# ---- Outages ------------------------------------------------------------------------------------


def followed_through(
    server: PrivateServer, style: str, harm: Callable[[Any], object], every: int, total: int = 600
) -> tuple[list[str], int]:
    """What a follower gets of so many entries while harm is done; and how much was dropped."""
    admin = redis.Redis.from_url(server.url)
    with SessionStore.from_url(server.url) as writer, _store(style, server.url) as store:
        session_id = create(writer)

        def write() -> None:
            for number in range(total):
                writer.add_output(session_id, str(number))
                if number % every == every - 1:
                    harm(admin)
            writer.update_status(session_id, "terminated")

        with meanwhile(write):
            pages = list(store.follow_output(session_id))
    admin.close()
    return entries(pages), sum(page.dropped + page.lost for page in pages)


def drop_connections(admin: Any) -> None:
    """All that others have: subscriptions too."""
    for kind in ("normal", "pubsub"):
        with suppress(redis.RedisError):
            admin.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")


@pytest.mark.parametrize("style", ["sync", "async"])
def test_dropped_connections_lose_nothing_and_repeat_nothing(
    own_server: PrivateServer, style: str
) -> None:
    came, dropped = followed_through(own_server, style, drop_connections, every=40)
    assert came == list(map(str, range(600)))
    assert dropped == 0


@pytest.mark.parametrize("style", ["sync", "async"])
def test_a_restart_in_the_middle_loses_nothing_and_repeats_nothing(
    own_server: PrivateServer, style: str
) -> None:
    def restart(_: Any) -> None:
        own_server.kill()
        own_server.start()

    came, dropped = followed_through(own_server, style, restart, every=250)
    assert came == list(map(str, range(600)))
    assert dropped == 0


def test_news_come_again_after_the_subscription_was_dropped(
    server: PrivateServer, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessionstore.news, "LOOKS_SELDOM", 600.0)
    with (
        redis.Redis.from_url(server.url, decode_responses=True) as admin,
        SessionStore.from_url(server.url, namespace=namespace) as writer,
        SessionStore.from_url(
            f"{server.url}?client_name={namespace}", namespace=namespace
        ) as store,
    ):
        session_id = create(writer)
        pages = store.follow_output(session_id)
        writer.add_output(session_id, "first")
        assert next(pages).chunks == ("first",)
        for number in range(3):
            (subscribed,) = until(lambda: _subscribed(admin, namespace))
            admin.execute_command("CLIENT", "KILL", "ID", subscribed["id"])
            until(lambda: _subscribed(admin, namespace) not in ([], [subscribed]))  # noqa: B023
            with meanwhile(lambda: writer.add_output(session_id, str(number))):  # noqa: B023
                assert next(pages).chunks == (str(number),)
        pages.close()


def _subscribed(admin: Any, name: str) -> list[dict[str, str]]:
    """The subscriptions that listen to a buffer, apart from the store's word to itself."""
    ids = [one for one in connections(admin, name) if int(one["sub"]) > 1]
    return [{"id": one["id"]} for one in ids]


def test_a_subscription_that_is_silent_is_replaced(
    own_server: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection whose other end is gone tells nothing: only that its own word is not heard."""
    monkeypatch.setattr(sessionstore.news, "PULSE", 0.2)
    monkeypatch.setattr(sessionstore.news, "SILENCE", 0.2)
    monkeypatch.setattr(sessionstore.news, "_LISTENS_FOR", 0.1)
    with SessionStore.from_url(own_server.url) as store:
        session_id = create(store)
        pages = store.follow_output(session_id)
        store.add_output(session_id, "one")
        next(pages)
        first = store._news.control
        told: list[str] = []
        monkeypatch.setattr(
            sessionstore.news.News, "is_down", lambda _, error: told.append(str(error))
        )
        time.sleep(0.5)
        assert told == []  # the control: while its word is heard, nothing is replaced
        with redis.Redis.from_url(own_server.url) as admin:
            admin.execute_command("ACL", "SETUSER", "default", "resetchannels", "&none")
            monkeypatch.setattr(store._news, "control", "none")  # heard by nobody
            with suppress(AssertionError):
                until(lambda: told, 5)
        assert first != "none"
        assert told
        pages.close()


# ---- Other clients, other users -----------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("decode_responses", [False, True])
@pytest.mark.usefixtures("only_news")
def test_clients_handed_in_follow_by_news(
    server: PrivateServer, namespace: str, protocol: int, decode_responses: bool
) -> None:
    options: dict[str, Any] = {"protocol": protocol, "decode_responses": decode_responses}
    with redis.Redis.from_url(server.url, **options) as client:
        store = SessionStore(client, namespace=namespace)
        writer = SessionStore.from_url(server.url, namespace=namespace)
        session_id = create(writer)
        pages = store.follow_output(session_id)
        writer.add_output(session_id, "é")
        came = list(next(pages).chunks)
        for number in range(20):
            with meanwhile(lambda: writer.add_output(session_id, str(number))):  # noqa: B023
                came += next(pages).chunks
        with meanwhile(lambda: writer.delete_session(session_id)):
            (last,) = pages
        writer.close()
        store.close()
    assert came == ["é", *map(str, range(20))]
    assert last.deleted


@pytest.mark.parametrize("protocol", [2, 3])
def test_asyncio_clients_handed_in_follow_by_news(
    server: PrivateServer, namespace: str, protocol: int, only_news: None
) -> None:
    del only_news

    async def follow() -> list[str]:
        client = redis.asyncio.Redis.from_url(server.url, protocol=protocol)
        async with AsyncSessionStore(client, namespace=namespace) as store:
            session_id = (await store.create_session("claude", "s", "/src")).id
            came: list[str] = []

            async def read() -> None:
                async for page in store.follow_output(session_id):
                    came.extend(page.chunks)

            reading = asyncio.create_task(read())
            for number in range(20):
                await store.add_output(session_id, str(number))
                async with asyncio.timeout(20):
                    while len(came) <= number:
                        await asyncio.sleep(0)
            await store.update_status(session_id, "error")
            await reading
        await client.aclose()
        return came

    assert asyncio.run(follow()) == list(map(str, range(20)))


def test_a_user_without_a_right_to_any_channel_writes_and_follows(
    own_server: PrivateServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessionstore.news, "LOOKS_OFTEN", 0.05)
    with redis.Redis.from_url(own_server.url) as admin:
        admin.execute_command(
            *("ACL", "SETUSER", "quiet", "on", "nopass", "~*", "+@all", "resetchannels")
        )
        url = own_server.url.replace("redis://", "redis://quiet:any@")
        with SessionStore.from_url(url) as store:
            session_id = create(store)
            pages = store.follow_output(session_id)
            for number in range(3):
                assert store.add_output(session_id, str(number)) == number + 1
                assert next(pages).chunks == (str(number),)
            store.update_status(session_id, "terminated")
            store.delete_session(session_id)
            (last,) = pages
            assert last.ended


# ---- What is left behind ------------------------------------------------------------------------


def news_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "sessionstore-news"]


def test_who_stops_following_leaves_neither_thread_nor_subscription(
    server: PrivateServer, namespace: str
) -> None:
    with (
        redis.Redis.from_url(server.url) as admin,
        SessionStore.from_url(server.url, namespace=namespace) as store,
    ):
        session_id = create(store)
        store.add_output(session_id, "one")
        for page in store.follow_output(session_id):
            assert page.chunks == ("one",)
            break
        gc.collect()
        until(lambda: not news_threads())
        until(lambda: not admin.pubsub_channels(f"{{{namespace}}}*"))
        # And another begins anew.
        pages = store.follow_output(session_id)
        assert next(pages).chunks == ("one",)
        until(lambda: admin.pubsub_numsub(f"{{{namespace}}}:session:{session_id}:output")[0][1])
        pages.close()


def test_no_task_is_left_when_an_asyncio_store_is_closed(
    server: PrivateServer, namespace: str
) -> None:
    async def follow() -> set[asyncio.Task[Any]]:
        async with AsyncSessionStore.from_url(server.url, namespace=namespace) as store:
            session_id = (await store.create_session("claude", "s", "/src")).id
            await store.add_output(session_id, "one")
            pages = store.follow_output(session_id)
            assert (await anext(pages)).chunks == ("one",)
        await pages.aclose()  # type: ignore[attr-defined]
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(follow()) == set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_follows_by_a_subscription_of_its_own(
    server: PrivateServer, namespace: str
) -> None:
    with SessionStore.from_url(server.url, namespace=namespace) as store:
        session_id = create(store)
        pages = store.follow_output(session_id)
        store.add_output(session_id, "one")
        next(pages)
        child = os.fork()
        if child == 0:
            code = 1
            with suppress(BaseException):
                signal.alarm(30)
                came = 0
                for page in store.follow_output(session_id):
                    came += len(page.chunks)
                code = 0 if came == 21 else 2
            os._exit(code)
        for number in range(20):
            store.add_output(session_id, str(number))
            time.sleep(0.01)
        store.update_status(session_id, "terminated")
        rest = entries(pages)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert rest == list(map(str, range(20)))
