"""Least privilege: what the rule of each role allows is what it needs, and nothing else.

That the contract holds under these rules is shown by its tests: on real servers they connect as a
worker, or where they check, repair or import as an operator, and fail if anything was denied.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from typing import Any, get_args
from uuid import uuid4

import pytest
import redis
from conftest import (
    CLUSTER,
    PASSWORD,
    SERVERS,
    STYLES,
    World,
    acl_server,
    acl_words,
    url_for,
)
from consistency import assert_consistent
from moments import expire_lease
from waiting import until

import sessionstore.importing
from sessionstore import InvalidArgumentError, SchemaMismatchError, SessionStore, acl
from sessionstore._server import PrivateServer
from sessionstore.errors import of_any_server
from sessionstore.scripts import load
from sessionstore.settings import StoreSettings
from sessionstore.watching import OLDEST

READER, WORKER, OPERATOR = "reader", "worker", "operator"
ROLES = get_args(acl.Role)
LONG = 3600.0  # seconds: no lease is renewed in the background
#: Denied these, a store goes on, with a warning, a slower way or fewer news.
DONE_WITHOUT = frozenset(
    {"client|setinfo", "info", "script|load", "publish", "subscribe", "unsubscribe"}
)


class Place(World):
    """A real server with users of any rule."""

    def user(
        self, role: acl.Role, *, lacking: str = "", namespace: str = "", partitions: int = 0
    ) -> str:
        """A new user's name: of a role, perhaps without one of its commands."""
        settings = StoreSettings(
            namespace=namespace or self.namespace,
            partitions=partitions or self.partitions,  # type: ignore[arg-type]
            cluster=self.target == CLUSTER,
        )
        assert self.url is not None
        name = f"{self.namespace}-{len(self._users)}"
        self._users[name, 0] = name
        words = acl_words(name, role, self.url, settings)
        self._acl(*(without(word, lacking) for word in words if word != f"+{lacking}"))
        return name

    def as_user(self, name: str, **settings: Any) -> Any:
        """A store of a user."""
        assert self.url is not None
        return self.store(url=url_for(self.url, name), **settings)

    def as_role(self, role: acl.Role, **settings: Any) -> Any:
        """A store of a new user of a role."""
        return self.as_user(self.user(role), **settings)

    def plain(self, name: str) -> Any:
        """A plain client of a user."""
        assert self.url is not None
        client: Any = redis.Redis.from_url(url_for(self.url, name), decode_responses=True)
        self._opened.append(client)
        return client

    def denied(self, name: str) -> set[str]:
        """The commands that a user was denied."""
        logs = [entry for log in self._acl("ACL LOG") for entry in log]
        return {one["object"] for one in logs if one["username"] == name}

    def dump(self) -> dict[str, Any]:
        """Every key of the namespace as it is stored."""
        keys = sorted(self.redis.scan_iter(self.pattern, count=1000))
        with redis.Redis.from_url(str(self.url)) as client:
            return {key: client.dump(key) for key in keys}


def without(word: str, command: str) -> str:
    """A rule's word, or selector, without a command."""
    return re.sub(rf" \+{re.escape(command)}(?=[ )])", "", word) if command else word


@pytest.fixture(params=[f"{server}-{n}" for n in (1, 16) for server in SERVERS])
def place(
    request: pytest.FixtureRequest, running: Callable[[str], PrivateServer], style: str
) -> Iterator[Place]:
    """Each real server, with 1 and 16 partitions."""
    server, partitions = request.param.split("-")
    place = Place(style, server, running(server).url, int(partitions))
    try:
        yield place
    finally:
        place.forget_denied()
        place.close()


@pytest.fixture(params=STYLES)
def style(request: pytest.FixtureRequest) -> str:
    return str(request.param)


each_role = pytest.mark.parametrize("role", ROLES)


# ---- Every operation ----------------------------------------------------------------------------


def works(store: Any, plain: Any, place: Place) -> None:
    """A worker's programme: every operation that writes."""
    session = store.create_session(
        "claude", "service-1", "/src", "task", "mcp", metadata={"a": "1"}, unique=True
    )
    own = session.id
    store.update_activity(own)
    store.update_metadata(own, {"a": None, "b": "2"})
    assert store.add_output(own, *(f"line {n}" for n in range(9))) == 9
    assert store.add_error(own, "an error", "x" * 300) == 2
    store.update_status(own, "busy", expected="active")
    store.update_status(own, "active", expected="busy")
    with place.entered(store.claim(own, ttl=LONG)):
        store.add_output(own, "under a lease")
    with store.writer(own) as out:
        out.write("written\n")
    with store.batch() as batch:
        added, moved = batch.add_output(own, "together"), batch.update_activity(own)
    assert (added.result() > 9, moved.result()) == (True, None)
    with suppress(InvalidArgumentError):
        store.update_status(own, "busy", expected="terminated")
    store.create_session("codex", "service-2", "/src", status="terminated")
    store.create_session("codex", "service-3", "/src")  # and by its retention, the last is gone
    lost = store.create_session("codex", "service-4", "/src").id
    store.claim(lost, ttl=LONG)
    expire_lease(place, lost, 100.0)
    store.reap(idle_for=0)
    store.reap(ended_for=0)
    other = store.create_session("claude", "service-5", "/src").id
    sends_again(plain, place, other)
    assert plain.execute_command("WAIT", 0, 1) == 0  # with wait_replicas, in a write's pipeline
    assert store.delete_session(other) is True
    kept = store.create_session("claude", "service-6", "/src", "task", "mcp").id
    store.add_output(kept, "kept")


def sends_again(plain: Any, place: Place, session_id: str) -> None:
    """A write whose reply was lost."""
    prefix, session = place.prefix_of(session_id), place.session(session_id)
    keys = (f"{prefix}lane:again-0", session, f"{prefix}activity")
    text = load("update_activity").text
    for _ in range(2):
        assert plain.eval(text, len(keys), *keys, 1, session_id) == "ok"


def reads(store: Any) -> None:
    """A reader's programme: every operation that only reads."""
    assert store.ping() is True
    (first, *_) = sessions = store.get_all_sessions()
    assert store.get_session(first.id) is not None
    assert store.get_session(first.id, tail=0).id == first.id
    assert store.find_session(first.id, tail=1).id == first.id
    found = store.find_session_by_service_id(first.service_session_id, live=True)
    assert found is None or found.id == first.id
    assert store.get_sessions_by_type(first.type)
    assert store.find_sessions(type=first.type, status=first.status, task_id=first.task_id)
    store.find_sessions(idle_for=0, mcp_session_id="mcp")
    assert store.find_sessions(idle_for=0)
    assert store.find_sessions(order="-last_activity", limit=1)
    assert [one.id for one in store.iter_sessions()] == [one.id for one in sessions]
    store.read_output(first.id)
    store.read_errors(first.id, limit=1)
    assert next(store.watch(OLDEST)).event
    assert store.get_metrics().total_sessions == len(sessions)
    assert store.drift().sessions == len(sessions)
    assert len(list(store.export_sessions())) > len(sessions)
    assert len(list(store.export_sessions(type="claude", idle_for=0))) > 1


def follows(store: Any, place: Place, name: str) -> None:
    """Follow the output of two sessions, of which one ends."""
    ids = [place.store().create_session("claude", f"f{n}", "/src").id for n in range(2)]
    channels = [place.session(one, ":output") for one in ids]
    admin = place.store()
    for one in ids:
        admin.add_output(one, "first")
    first, second = (store.follow_output(one) for one in ids)
    assert next(first).chunks == next(second).chunks == ("first",)

    def heard(*wanted: str) -> bool:
        return set(wanted) == {*place.redis.pubsub_channels()} & {*channels}

    place.until(lambda: heard(*channels) or place.denied(name), 5)
    admin.update_status(ids[0], "terminated")
    assert list(first)[-1].ended
    admin.add_output(ids[1], "second")
    assert next(second).chunks == ("second",)
    place.until(lambda: heard(channels[1]) or place.denied(name), 5)


def mends(store: Any, place: Place) -> None:
    """An operator's programme: what it does beside a worker's and a reader's."""
    sessions = store.get_all_sessions()
    key, prefix = place.session(sessions[0].id), place.prefix_of(sessions[0].id)
    place.redis.hset(key, "output_bytes", 1)
    place.redis.expire(key, 1000)
    place.redis.set(f"{prefix}sessions:task:spoilt", "a string")
    place.redis.sadd(f"{prefix}sessions:service:large", *(f"ghost{n}" for n in range(300)))
    place.redis.zadd(f"{prefix}activity", {f"ghost{n}": n for n in range(300)})
    assert {one.kind for one in store.check()} > {"index_orphan", "wrong_type", "expiry"}
    assert any(one.repaired for one in store.repair())
    assert not [one for one in store.check() if not one.warning]
    lines = list(store.export_sessions())
    assert store.import_sessions(lines).imported == 0
    for one in sessions:
        store.delete_session(one.id)
    assert store.import_sessions(lines).imported == len(sessions)
    changed = [line.replace('"/src"', '"/dst"') for line in lines]
    store.import_sessions(changed, existing="replace")
    assert {one.project_path for one in store.get_all_sessions()} == {"/dst"}


SETTINGS: dict[str, Any] = {
    "buffer_limit": 5, "buffer_bytes": 200, "retention": 0.0, "reap_grace": 0.001,
}  # fmt: skip


def programme(place: Place, role: acl.Role, name: str) -> None:
    """All that a user of a role does."""
    store = place.as_user(name, **SETTINGS)
    if role == READER:
        works(place.store(**SETTINGS), place.redis, place)
    else:
        works(store, place.plain(name), place)
    reads(store)
    if role == OPERATOR:
        mends(store, place)
    if role != OPERATOR:  # as a worker does
        follows(store, place, name)


@pytest.fixture(autouse=True)
def _staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small buffers are staged by an import."""
    monkeypatch.setattr(sessionstore.importing, "MOST_AT_ONCE", 100)


@each_role
def test_a_role_is_denied_nothing_that_it_needs(place: Place, role: acl.Role) -> None:
    name = place.user(role)

    programme(place, role, name)

    assert place.denied(name) == set()
    assert_consistent(place)
